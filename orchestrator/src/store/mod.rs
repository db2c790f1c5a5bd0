//! T: what the orchestrator remembers: about fifteen reads, and `commit`, the only verb that changes anything.

use std::collections::BTreeMap;
use std::sync::Arc;

use alloy_shared::env::Ms;
use alloy_shared::id::{AttemptRef, Digest, JobId, Labels, OrgId, TokenId, UserId, WorkerId};
use alloy_shared::secret::TokenKind;
use alloy_shared::wire::farm::Role;
use alloy_shared::wire::image::ImageWant;
use alloy_shared::wire::job::{End, EventKind, JobSpec, Phase, Reason, StateWord, Timings};
use async_trait::async_trait;

use crate::job::State;

pub mod mem;
pub mod sql;
pub mod tidy;
pub mod write;

pub use write::{Committed, Group, Guard, Miss, Write};

use tidy::{BlobCursor, Ended, Fading, RetentionRow, TrashCursor, TrashRow};

/// Whose rows a read may see. Routes get theirs from the credential; `farm` is for the orchestrator's own work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scope(Option<OrgId>);

impl Scope {
    pub fn org(org: OrgId) -> Self {
        Self(Some(org))
    }
    pub fn farm() -> Self {
        Self(None)
    }
    /// The organisation to filter by; `None`: all.
    pub fn filter(&self) -> Option<OrgId> {
        self.0
    }
    pub fn sees(&self, org: OrgId) -> bool {
        self.0.is_none_or(|own| own == org)
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    pub id: JobId,
    pub org: OrgId,
    /// Raised by one with every change; what a change is decided on.
    pub version: i64,
    pub state: State,
    pub spec: Arc<JobSpec>,
    pub source: Option<Digest>,
    pub created_at: Ms,
    /// The credential that submitted it.
    pub created_by: String,
    /// The number of its newest event.
    pub events: u64,
}

impl Job {
    pub fn attempt(&self) -> AttemptRef {
        AttemptRef { job: self.id, attempt: self.state.tries.made }
    }
}

/// One try, as the books have it.
#[derive(Debug, Clone, PartialEq)]
pub struct Attempt {
    pub at: AttemptRef,
    pub org: OrgId,
    pub worker: WorkerId,
    pub assigned_at: Ms,
    pub ended_at: Option<Ms>,
    /// How this attempt ended, which is not always how the job did.
    pub end: Option<End>,
    pub timings: Timings,
    /// What is kept of its VM, by the names in [`alloy_shared::wire::session::fact`].
    pub facts: BTreeMap<String, String>,
    /// The newest report that was applied.
    pub seq: u64,
    /// Final length, once the worker has closed it.
    pub log_len: Option<u64>,
    /// Since when its log, and its artifacts, are no longer kept.
    pub log_gone_at: Option<Ms>,
    pub files_gone_at: Option<Ms>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobEventRow {
    pub job: JobId,
    pub seq: u64,
    pub at: Ms,
    pub attempt: u32,
    pub kind: EventKind,
    pub state: StateWord,
    pub phase: Option<Phase>,
    pub reason: Option<Reason>,
    pub worker: Option<WorkerId>,
    pub message: Option<String>,
    /// For `EventKind::Artifact`: the path it is about.
    pub artifact: Option<String>,
}

/// A file that an attempt left. Unique by (job, attempt, path).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    pub at: AttemptRef,
    pub org: OrgId,
    pub path: String,
    pub size: u64,
    pub sha256: Digest,
    pub mode: u32,
    pub link: Option<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Worker {
    pub id: WorkerId,
    pub org: OrgId,
    pub name: String,
    /// Ed25519.
    pub public_key: [u8; 32],
    /// Given at enrolment; they win over what the host says of itself.
    pub labels: Labels,
    /// What the host said of itself when it last connected.
    pub host_labels: Labels,
    pub version: String,
    pub epoch: i64,
    pub boot: String,
    pub draining: bool,
    pub drain_note: Option<String>,
    pub enrolled_at: Ms,
    pub seen_at: Option<Ms>,
    pub revoked: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRow {
    pub id: TokenId,
    pub org: OrgId,
    pub hash: Digest,
    pub kind: TokenKind,
    pub role: Role,
    pub name: String,
    pub shown: String,
    /// For join tokens: labels of the worker to come.
    pub labels: Labels,
    pub created_at: Ms,
    pub expires_at: Option<Ms>,
    pub revoked_at: Option<Ms>,
    /// For join tokens: who used it.
    pub used_by: Option<WorkerId>,
}

/// A person who signs in elsewhere, and what they may do in one organisation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberRow {
    pub user: UserId,
    pub org: OrgId,
    pub role: Role,
    pub email: Option<String>,
    pub created_at: Ms,
}

/// What the farm wishes of one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRow {
    pub org: OrgId,
    pub name: String,
    pub want: ImageWant,
    pub pinned: bool,
    /// Every worker that is named and has the labels is meant; none named: all.
    pub workers: Vec<WorkerId>,
    pub labels: Labels,
    /// Raised with every wish: each worker fulfils each once.
    pub generation: i64,
    pub at: Ms,
}

/// Where a blob's bytes are. The same digest in two organisations is two rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    pub org: OrgId,
    pub digest: Digest,
    pub kind: BlobKind,
    pub size: u64,
    pub place: Place,
    pub created_at: Ms,
    /// When somebody relied on it, to within a day; 0: nobody knows.
    pub used_at: Ms,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BlobKind {
    Chunk,
    Manifest,
    Artifact,
}

impl Place {
    /// The object that it lies in.
    pub fn object(&self) -> &str {
        match self {
            Self::Alone { object } | Self::Packed { object, .. } => object,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// An object of its own.
    Alone { object: String },
    /// A frame inside a pack: `stored` bytes from `frame_at`; the blob lies at `raw_at` of the unpacked frame.
    Packed { object: String, frame_at: u64, stored: u32, zstd: bool, raw_len: u32, raw_at: u32 },
}

/// Newest first. `before`: the id to go on below.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JobFilter {
    /// Empty: all.
    pub states: Vec<StateWord>,
    pub created_by: Option<String>,
    pub before: Option<JobId>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Nothing happened; the same call may succeed later.
    #[error("the database is busy or away: {0}")]
    Unavailable(String),
    /// Whether the commit happened is not known: read, then decide again.
    #[error("the database did not say whether it committed: {0}")]
    Unknown(String),
    #[error("the disk is full: {0}")]
    Full(String),
    /// The disk failed under a write: what it holds is not known, and this process learns no more about it.
    #[error("the database's disk fails: {0}")]
    Broken(String),
    #[error("{table} {id}: {column} cannot be read")]
    Corrupt { table: &'static str, id: String, column: &'static str },
}

#[async_trait]
pub trait Store: Send + Sync {
    /// One transaction; every group in a savepoint of its own.
    async fn commit(&self, groups: &[Group]) -> Result<Committed, StoreError>;

    async fn job(&self, scope: &Scope, id: &JobId) -> Result<Option<Job>, StoreError>;
    /// The job of an idempotency key, and the digest of the body that it came with.
    async fn keyed(&self, org: &OrgId, caller: &str, key: &str) -> Result<Option<(JobId, Digest)>, StoreError>;
    /// Jobs whose id ends in these characters, six or more; at most two: enough to know whether the name is unique.
    async fn jobs_ending(&self, scope: &Scope, suffix: &str) -> Result<Vec<JobId>, StoreError>;
    async fn jobs(&self, scope: &Scope, filter: &JobFilter, limit: u32) -> Result<Vec<Job>, StoreError>;
    /// Non-terminal jobs by id, above `after`: fills the desk at start.
    async fn live(&self, after: Option<JobId>, limit: u32) -> Result<Vec<Job>, StoreError>;
    /// Jobs whose current attempt is leased to this worker.
    async fn held(&self, worker: &WorkerId) -> Result<Vec<Job>, StoreError>;
    /// In order of their numbers.
    async fn attempts(&self, scope: &Scope, job: &JobId) -> Result<Vec<Attempt>, StoreError>;
    async fn attempt(&self, scope: &Scope, at: &AttemptRef) -> Result<Option<Attempt>, StoreError>;
    async fn events(&self, scope: &Scope, job: &JobId, after: u64, limit: u32) -> Result<Vec<JobEventRow>, StoreError>;
    /// Of all attempts, by (attempt, path).
    async fn artifacts(&self, scope: &Scope, job: &JobId) -> Result<Vec<Artifact>, StoreError>;
    async fn artifact(&self, scope: &Scope, at: &AttemptRef, path: &str) -> Result<Option<Artifact>, StoreError>;
    async fn worker(&self, scope: &Scope, id: &WorkerId) -> Result<Option<Worker>, StoreError>;
    async fn worker_by_key(&self, public_key: &[u8; 32]) -> Result<Option<Worker>, StoreError>;
    /// By name, then id.
    async fn workers(&self, scope: &Scope) -> Result<Vec<Worker>, StoreError>;
    /// Those that are there; missing = asked − answered.
    async fn blobs(&self, scope: &Scope, kind: BlobKind, digests: &[Digest]) -> Result<Vec<Blob>, StoreError>;
    async fn token(&self, hash: &Digest) -> Result<Option<TokenRow>, StoreError>;
    /// Newest first, join tokens left out.
    async fn tokens(&self, scope: &Scope) -> Result<Vec<TokenRow>, StoreError>;
    /// In every organisation that this person belongs to, the oldest first.
    async fn memberships(&self, user: &UserId) -> Result<Vec<MemberRow>, StoreError>;
    /// Oldest first.
    async fn members(&self, scope: &Scope) -> Result<Vec<MemberRow>, StoreError>;
    /// By name.
    async fn images(&self, scope: &Scope) -> Result<Vec<ImageRow>, StoreError>;
    async fn meta(&self, name: &str) -> Result<Option<String>, StoreError>;

    /// Jobs that ended before, by that time and their ids, above `after`.
    async fn ended(&self, before: Ms, after: Option<(Ms, JobId)>, limit: u32) -> Result<Vec<Ended>, StoreError>;
    /// Attempts that ended before and have something left, in the order of that time, job and number.
    async fn fading(&self, before: Ms, after: Option<(Ms, AttemptRef)>, limit: u32) -> Result<Vec<Fading>, StoreError>;
    /// Blobs that were used last before, by that time, digest and organisation.
    async fn unused(
        &self,
        kind: BlobKind,
        before: Ms,
        after: Option<BlobCursor>,
        limit: u32,
    ) -> Result<Vec<Blob>, StoreError>;
    /// What lies in the trash since before, behind a cursor, the oldest first.
    async fn trash(&self, before: Ms, after: Option<TrashCursor>, limit: u32) -> Result<Vec<TrashRow>, StoreError>;
    /// What was thrown away under this name, or under one that was made of it.
    async fn trashed(&self, root: &str) -> Result<Vec<TrashRow>, StoreError>;
    /// Those of these objects that blobs lie in or that wait in the trash.
    async fn named(&self, objects: &[String]) -> Result<Vec<String>, StoreError>;
    /// By organisation.
    async fn retention(&self, scope: &Scope) -> Result<Vec<RetentionRow>, StoreError>;
}
