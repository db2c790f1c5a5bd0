//! T: what goes into a session's core, and what comes out.

use std::sync::Arc;

use alloy_shared::id::{AttemptRef, Digest, Labels};
use alloy_shared::wire::ErrorCode;
use alloy_shared::wire::image::Inventory;
use alloy_shared::wire::session::{Hello, LogChunk, Report, SlotView, ToOrchestrator, ToWorker};
use bytes::Bytes;

use crate::store::Job;

pub enum Input {
    Heard(ToOrchestrator),
    HeardLog(LogChunk),
    /// The session is in the store: its epoch, and the jobs leased to this worker.
    Opened {
        epoch: i64,
        jobs: Vec<Job>,
        draining: bool,
    },
    /// The session is refused, or its worker does not belong to the farm any more.
    Refused {
        code: ErrorCode,
        message: String,
        retry_after_ms: Option<u64>,
    },
    /// A job changed that is or was this worker's.
    Job(Job),
    /// The report was decided.
    Settled {
        attempt: AttemptRef,
        seq: u64,
        result: Settled,
    },
    /// Bytes were appended to the stored log, or belong further back.
    Appended {
        attempt: AttemptRef,
        result: Result<u64, NotStored>,
    },
    Durable {
        attempt: AttemptRef,
        len: u64,
    },
    /// A log that was asked for with `Effect::Measure`.
    Measured {
        attempt: AttemptRef,
        len: u64,
    },
    /// How long that log is cannot be read now.
    NotMeasured {
        attempt: AttemptRef,
    },
    Superseded,
    Drain {
        on: bool,
    },
    /// What the farm wishes of images changed.
    Wishes,
    /// The orchestrator stops.
    Stop {
        after_ms: u64,
    },
    Unlinked,
    Tick,
}

/// Why log bytes were not appended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotStored {
    /// They belong further back: so many are stored.
    Gap { have: u64 },
    /// The disk is full or failing: the worker keeps them and sends them again.
    Later,
    /// This log takes no more.
    Never,
}

/// What became of a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Settled {
    /// It is durable, now or since an earlier time.
    Applied,
    /// The attempt is not this worker's to report on any more.
    Fenced,
    /// A report before it is missing.
    Gap { have: u64 },
    /// The result cannot stand yet: this much log is here, these artifacts are not.
    Missing { log_len: u64, artifacts: Vec<Digest> },
    /// Nothing was decided: the store is away.
    Failed,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Check the signature and open the session in the store.
    Open(Box<Hello>),
    Send(ToWorker),
    /// Send the order to run this job's attempt, with a fresh grant.
    Assign {
        job: Box<Job>,
        handle: u32,
    },
    Append {
        attempt: AttemptRef,
        offset: u64,
        bytes: Bytes,
    },
    /// Find out how much of the stored log is durable: what lies below is what a worker may forget.
    Measure {
        attempt: AttemptRef,
    },
    Settle {
        attempt: AttemptRef,
        seq: u64,
        report: Report,
    },
    /// The worker does not have this attempt.
    NotHeld {
        attempt: AttemptRef,
        message: String,
    },
    Close {
        attempt: AttemptRef,
        teardown_ms: u64,
        log_len: u64,
    },
    Offer {
        labels: Labels,
        slots: Vec<SlotView>,
        images: Arc<Inventory>,
        /// It takes no new work, whoever said so.
        draining: bool,
        /// The worker itself said so: it is stopping, or its disk is full.
        stopping: bool,
        trouble: Option<String>,
    },
    /// Tell the worker what the farm wishes of images at this moment.
    Wish,
    Seen,
    /// The worker said goodbye, or was revoked: nobody need wait for it.
    Left,
    Hangup(&'static str),
}
