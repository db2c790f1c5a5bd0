//! T: what is written and read so that a farm does not keep everything for ever. Every write looks again whether what it
//! removes may go.

use alloy_shared::env::Ms;
use alloy_shared::id::{AttemptRef, Digest, JobId, OrgId};

use super::{Blob, BlobKind};

#[derive(Debug, Clone, PartialEq)]
pub enum Tidy {
    /// Blobs of which nobody knows when they were used count as used now, at most so many of them. Gives back how many.
    Adopt {
        kind: BlobKind,
        at: Ms,
        most: u32,
    },
    /// These are in use: none of them goes for a while. Misses with `Stale` unless all are there. Each is named once.
    Use {
        org: OrgId,
        kind: BlobKind,
        digests: Vec<Digest>,
        at: Ms,
    },
    /// Drops those that nobody used since and nothing refers to. Objects that no other blob lies in go to the trash. Gives
    /// back how many blobs went.
    DropBlobs {
        blobs: Vec<Blob>,
        unused_since: Ms,
        at: Ms,
    },
    /// The log of an attempt goes to the trash. Misses with `Stale` if it may not.
    DropLog(Fade),
    /// An attempt's artifacts are no longer listed. Misses with `Stale` if they must stay.
    DropFiles(Fade),
    /// A job goes with its events, attempts, artifacts and idempotency key, its logs to the trash. Misses with `Stale` if it
    /// has not ended long enough ago, or the books of an attempt are open.
    Prune {
        job: JobId,
        ended_before: Ms,
        open_before: Ms,
        at: Ms,
    },
    /// Those of these objects that no blob lies in go to the trash.
    Trash {
        objects: Vec<String>,
        at: Ms,
    },
    /// From here on no blob may lie in the object. Gives back 1 if it may be deleted; 0 if a blob lies in it after all.
    TakeTrash {
        object: String,
        before: Ms,
        at: Ms,
    },
    /// It was deleted at this time, from which on its name is remembered.
    Burnt {
        object: String,
        at: Ms,
    },
    /// Forgets the names of what was deleted long ago.
    Forget {
        before: Ms,
    },
    SetRetention(RetentionRow),
}

/// What must hold of an attempt of which something is removed: its job is over, it ended before this, and its books are
/// closed, unless it began before `open_before`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fade {
    pub attempt: AttemptRef,
    pub ended_before: Ms,
    pub open_before: Ms,
    pub at: Ms,
}

/// A job that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    pub job: JobId,
    pub org: OrgId,
    pub at: Ms,
}

/// An attempt that has ended and has something left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fading {
    pub attempt: AttemptRef,
    pub org: OrgId,
    pub ended_at: Ms,
    /// Whether the log, and the artifacts, are still there.
    pub log: bool,
    pub files: bool,
}

/// Something that nothing names any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrashRow {
    pub object: String,
    pub root: String,
    /// When it came here; once it is deleted, when that was.
    pub at: Ms,
    pub taken_at: Option<Ms>,
    /// It is deleted, and its name is not used again for a while.
    pub gone: bool,
}

/// How many days an organisation wants things to be kept; 0: for ever. Absent: as the farm does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetentionRow {
    pub org: OrgId,
    pub jobs_days: Option<u32>,
    pub artifacts_days: Option<u32>,
    pub logs_days: Option<u32>,
    pub sources_days: Option<u32>,
}

/// Behind which of the unused blobs a page begins.
pub type BlobCursor = (Ms, Digest, OrgId);
/// Where a page of the trash ended.
pub type TrashCursor = (Ms, String);
