//! T: what the desk is asked, and what it answers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use alloy_shared::env::{Mono, Ms};
use alloy_shared::id::{AttemptRef, JobId, Labels, OrgId, WorkerId};
use alloy_shared::wire::FieldError;
use alloy_shared::wire::image::Inventory;
use alloy_shared::wire::job::{Reason, SubmitJob, Timings};
use alloy_shared::wire::session::SlotView;

use crate::job::{Event, Refused};
use crate::pick::WhyNot;
use crate::store::write::{CloseAttempt, IdempotencyKey};
use crate::store::{Artifact, Attempt, Job, StoreError};

/// Ties an answer to its question.
pub type Ticket = u64;

pub enum Request {
    Submit {
        ticket: Ticket,
        id: JobId,
        by: By,
        body: Arc<SubmitJob>,
        key: Option<IdempotencyKey>,
    },
    Cancel {
        ticket: Ticket,
        job: JobId,
        reason: Reason,
    },
    /// A worker's numbered news of an attempt.
    Report {
        ticket: Ticket,
        from: From,
        seq: u64,
        event: Event,
        news: Box<News>,
    },
    /// The worker's session found that the worker does not have the attempt.
    NotHeld {
        ticket: Ticket,
        from: From,
        reason: Reason,
        message: String,
    },
    Close {
        ticket: Ticket,
        close: CloseAttempt,
    },
    Offer(Offer),
    /// The worker's connection is gone. Its jobs stay its own until it is silent for too long.
    Gone {
        worker: WorkerId,
        /// It said goodbye: nobody need wait for it.
        left: bool,
    },
    Silent(WorkerId),
    /// The books have not heard of the worker since that time, by their own clock.
    Unseen(WorkerId, Ms),
    /// Another orchestrator of the farm changed these jobs.
    Loaded(Vec<(Job, Option<Attempt>)>),
    /// All workers that are connected to other orchestrators: none of them gets a job from this one.
    Elsewhere(Vec<Offer>),
    /// The books were away a moment ago, or are: for so long from now a worker may still come back that was there before.
    Expect {
        for_ms: u64,
    },
    /// Which workers hold jobs?
    Holders {
        ticket: Ticket,
    },
    Why {
        ticket: Ticket,
        job: JobId,
    },
    /// These jobs wait for another host of the farm: this one gives them to no worker.
    Asleep {
        ticket: Ticket,
        jobs: BTreeSet<JobId>,
    },
}

#[derive(Debug, Clone)]
pub struct By {
    pub org: OrgId,
    pub caller: String,
}

/// Who says something about which attempt, over which session.
#[derive(Debug, Clone, Copy)]
pub struct From {
    pub at: AttemptRef,
    pub worker: WorkerId,
    pub epoch: i64,
}

/// What a report brings besides its event.
#[derive(Debug, Clone, Default)]
pub struct News {
    pub timings: Timings,
    pub artifact: Option<Artifact>,
    pub message: Option<String>,
    /// Of the attempt's VM. They stay once they are known.
    pub facts: BTreeMap<String, String>,
    /// For a result: when it was heard. What is done with it until it is decided belongs to `collect`.
    pub heard: Option<Mono>,
}

/// A connected worker, as its last heartbeat describes it.
#[derive(Debug, Clone)]
pub struct Offer {
    pub worker: WorkerId,
    /// Whose jobs it runs.
    pub org: OrgId,
    pub name: String,
    pub labels: Labels,
    pub slots: Vec<SlotView>,
    pub images: Arc<Inventory>,
    pub draining: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// The job as it is after the commit.
    Job(Box<Job>),
    /// The idempotency key names this job.
    Exists {
        job: JobId,
        body: alloy_shared::id::Digest,
    },
    Rejected(Vec<FieldError>),
    /// Too many live jobs.
    Full,
    /// This report was applied before.
    Applied,
    /// Reports in between are missing: the newest applied one is `have`.
    Gap {
        have: u64,
    },
    /// The state does not allow it.
    Refused(Refused),
    /// No live job of that id.
    NotLive,
    /// Somebody else was faster, or the session is not the worker's newest.
    Stale,
    Done,
    Holders(BTreeSet<WorkerId>),
    Why(Option<WhyNot>),
    /// The store did not commit; nothing happened.
    Failed(StoreError),
}

#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    Answer {
        ticket: Ticket,
        answer: Answer,
    },
    /// The job changed. `left` is a worker whose attempt this change ended or took away.
    Moved {
        job: Box<Job>,
        left: Option<WorkerId>,
    },
    /// Another orchestrator changed the job. `left` as above.
    Learned {
        job: Box<Job>,
        left: Option<WorkerId>,
    },
    /// The picture of this job is not to be trusted: load it again. `left` is a worker that may have lost it unheard.
    Reload {
        job: JobId,
        left: Option<WorkerId>,
    },
}
