//! T: writes as values. A [`Group`] happens whole or not at all; what a group may touch is checked by its guards.

use alloy_shared::env::Ms;
use alloy_shared::id::{AttemptRef, Digest, JobId, Labels, OrgId, UserId, WorkerId};

use super::tidy::Tidy;
use super::{Artifact, Attempt, Blob, ImageRow, Job, JobEventRow, MemberRow, TokenRow, Worker};

/// All of it or nothing of it. The guarded write comes first.
#[derive(Debug, Clone, PartialEq)]
pub struct Group(pub Vec<Write>);

#[derive(Debug, Clone, PartialEq)]
pub enum Write {
    InsertJob(Box<InsertJob>),
    Advance(Box<Advance>),
    CloseAttempt(CloseAttempt),
    Enrol(Box<Enrol>),
    SetWorker(SetWorker),
    /// Opens no session for it any more, for ever.
    RevokeWorker {
        org: OrgId,
        worker: WorkerId,
    },
    OpenSession(Box<OpenSession>),
    /// Remembers when a worker was last heard; written when it goes, not with each heartbeat. One that said goodbye has
    /// no boot any more.
    Seen {
        worker: WorkerId,
        at: Ms,
        left: bool,
    },
    AddToken(TokenRow),
    RevokeToken {
        org: OrgId,
        id: alloy_shared::id::TokenId,
        at: Ms,
    },
    /// Makes somebody a member, or changes what they may do. Who is one already keeps the time, and the email if the new row
    /// has none.
    SetMember(MemberRow),
    DropMember {
        org: OrgId,
        user: UserId,
    },
    /// Misses with `Stale` if the image has a newer wish.
    SetImage(ImageRow),
    DropImage {
        org: OrgId,
        name: String,
    },
    /// Blobs that are known already stay as they are. Their objects leave the trash; misses with `Stale` if one of them has
    /// been taken from there to be deleted.
    AddBlobs(Vec<Blob>),
    Tidy(Box<Tidy>),
    /// A named value of the farm's own; the first one stays.
    AddMeta {
        name: &'static str,
        value: String,
    },
}

/// A new job, perhaps with its first attempt. Misses with `Exists` if the key is known.
#[derive(Debug, Clone, PartialEq)]
pub struct InsertJob {
    /// Version 1.
    pub job: Job,
    pub key: Option<IdempotencyKey>,
    pub attempt: Option<Attempt>,
    pub events: Vec<JobEventRow>,
}

/// Names a submit: the same caller, key and body give the same job again.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct IdempotencyKey {
    pub org: OrgId,
    /// The credential's id: keys of two callers never meet.
    pub caller: String,
    pub key: String,
    /// SHA-256 of the request, to notice another body under the same key.
    pub body: Digest,
}

/// The only write that changes an existing job.
#[derive(Debug, Clone, PartialEq)]
pub struct Advance {
    /// The job as it shall be. Its version is one more than the one that must be there.
    pub next: Job,
    pub guard: Guard,
    /// The attempt as it shall be: inserted if it is new.
    pub attempt: Option<Attempt>,
    pub events: Vec<JobEventRow>,
    pub artifacts: Vec<Artifact>,
}

/// What must hold besides the version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guard {
    Version,
    /// The job's current attempt is this one, on this worker, whose newest session is this one.
    Fence {
        attempt: u32,
        worker: WorkerId,
        epoch: i64,
    },
    /// The job's current attempt is on this worker, and the books have not heard of the worker since that time, if one is given.
    Silent {
        worker: WorkerId,
        unseen_since: Option<Ms>,
    },
}

/// The end of an attempt's books. Changes no job. Misses with `Stale` if the attempt was never this worker's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloseAttempt {
    pub at: AttemptRef,
    pub worker: WorkerId,
    pub teardown_ms: u64,
    pub log_len: u64,
}

/// Uses up a join token and adds the worker. Misses with `Stale` if the token is unknown, used, revoked or expired.
#[derive(Debug, Clone, PartialEq)]
pub struct Enrol {
    pub token: Digest,
    pub at: Ms,
    pub worker: Worker,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetWorker {
    pub org: OrgId,
    pub worker: WorkerId,
    pub draining: bool,
    pub note: Option<String>,
}

/// A worker's new connection. The number that the group gives back is the new epoch, one more than the last.
#[derive(Debug, Clone, PartialEq)]
pub struct OpenSession {
    pub worker: WorkerId,
    pub boot: String,
    pub labels: Labels,
    pub version: String,
    pub at: Ms,
}

/// What a commit did, group by group.
#[derive(Debug, Clone, PartialEq)]
pub struct Committed {
    /// The new number of each write's row: a job's version, a session's epoch, else 0. Or why the group did nothing.
    pub groups: Vec<Result<Vec<i64>, Miss>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Miss {
    /// The guard did not hold.
    Stale,
    /// The idempotency key belongs to this job, submitted with this body.
    Exists { job: JobId, body: Digest },
    /// The row cannot be read or written as it is.
    Corrupt(String),
}
