//! S: the store in SQL: one text per read or write, the same on SQLite and on Postgres.
//!
//! Each noun's file holds its texts, its writes and its reads; `CATALOGUE` lists them all, and a test prepares every one
//! on both engines. `batch` turns a commit's groups into statements.

pub mod backup;
mod batch;
mod blob;
pub mod chunks;
mod conn;
mod farm;
mod fault;
mod image;
mod job;
mod lock;
mod member;
mod open;
mod reach;
pub mod shared;
pub mod tables;
pub mod target;
mod tidy;
mod wide;

use alloy_shared::env::Ms;
use alloy_shared::id::{AttemptRef, Digest, JobId, OrgId, UserId, WorkerId};
use alloy_shared::limits;
use async_trait::async_trait;
use sqlx::Connection as _;

use super::tidy::{BlobCursor, Ended, Fading, RetentionRow, TrashCursor, TrashRow};
use super::{
    Artifact, Attempt, Blob, BlobKind, Committed, Group, ImageRow, Job, JobEventRow, JobFilter, MemberRow, Scope,
    Store, StoreError, TokenRow, Worker,
};
use crate::broken::Broken;
use conn::{Args, Conn, Db, Row, end, tx};
use fault::within;
use wide::Wide;

pub use lock::{DataLock, LockError};
pub use open::{OpenError, postgres_migrations, sqlite_migrations};
pub use reach::shown_address;
pub use shared::Shared;

/// Names each text by a constant and lists them for the catalogue.
macro_rules! statements {
    ($($name:ident = $text:literal;)+) => {
        $(pub(super) const $name: &str = $text;)+
        pub(super) const TEXTS: &[(&str, &str)] = &[$((stringify!($name), $name),)+];
    };
}
use statements;

/// Every text that the store sends, by name.
pub const CATALOGUE: &[&[(&str, &str)]] = &[
    batch::TEXTS,
    job::TEXTS,
    farm::TEXTS,
    member::TEXTS,
    image::TEXTS,
    blob::TEXTS,
    tidy::TEXTS,
    backup::TEXTS,
    tables::TEXTS,
];

/// The texts that only Postgres is sent.
pub const CATALOGUE_OF_POSTGRES: &[&[(&str, &str)]] = &[shared::TEXTS, chunks::TEXTS, target::TEXTS];

/// The texts that are made for Postgres of those in the catalogue, because they take many rows.
pub fn made_for_postgres() -> impl Iterator<Item = String> {
    let wides =
        [&blob::WIDE[..], &tidy::WIDE[..]].concat().into_iter().chain(tables::TABLES.iter().map(|table| &table.copy));
    wides.map(Wide::for_postgres).chain(job::CHAIN.for_postgres())
}

/// The store on SQLite or Postgres.
#[derive(Debug)]
pub struct SqlStore {
    db: Db,
    /// Lies beside a SQLite file while it is open: found at start, it tells of an unclean stop.
    marker: Option<std::path::PathBuf>,
    broken: Broken,
    shared: Option<shared::Shared>,
}

impl SqlStore {
    async fn rows(&self, text: &'static str, args: Args) -> Result<Vec<Row>, StoreError> {
        let work = async { self.db.rows(text, args).await.map_err(fault::of) };
        self.heard(within(limits::STORE_READ_MS, StoreError::Unavailable, work).await)
    }

    /// Raised when the file's disk has failed.
    pub fn broken(&self) -> Broken {
        self.broken.clone()
    }

    fn heard<T>(&self, done: Result<T, StoreError>) -> Result<T, StoreError> {
        if let Err(StoreError::Broken(why)) = &done {
            self.broken.tell("the database", why);
        }
        done
    }

    async fn rows_wide(&self, wide: &Wide, rows: Args) -> Result<Vec<Row>, StoreError> {
        let work = async { self.db.rows_wide(wide, rows).await.map_err(fault::of) };
        self.heard(within(limits::STORE_READ_MS, StoreError::Unavailable, work).await)
    }

    async fn commit_now(&self, groups: &[Group]) -> Result<Committed, StoreError> {
        if let Db::Postgres(pool) = &self.db
            && let Some(done) = batch::at_once(pool, groups).await?
        {
            return Ok(done);
        }
        let tried: Result<_, StoreError> = tx!(&self.db, |conn| {
            let done = batch::try_all(&mut conn, groups).await?;
            let keep = done.as_ref().is_some_and(|done| done.groups.iter().all(Result::is_ok));
            (done, keep)
        });
        match tried? {
            Some(done) => Ok(done),
            None => tx!(&self.db, |conn| (batch::each(&mut conn, groups).await?, true)),
        }
    }
}

#[async_trait]
impl Store for SqlStore {
    async fn commit(&self, groups: &[Group]) -> Result<Committed, StoreError> {
        if groups.is_empty() {
            return Ok(Committed { groups: Vec::new() });
        }
        // A sync that failed is not repeated: the next one would succeed without the pages that this one lost.
        if self.broken.is_told() {
            return Err(StoreError::Broken("an earlier write failed".to_owned()));
        }
        self.heard(within(limits::STORE_COMMIT_MS, StoreError::Unknown, self.commit_now(groups)).await)
    }

    async fn job(&self, scope: &Scope, id: &JobId) -> Result<Option<Job>, StoreError> {
        self.read_job(scope, id).await
    }
    async fn keyed(&self, org: &OrgId, caller: &str, key: &str) -> Result<Option<(JobId, Digest)>, StoreError> {
        self.read_keyed(org, caller, key).await
    }
    async fn jobs_ending(&self, scope: &Scope, suffix: &str) -> Result<Vec<JobId>, StoreError> {
        self.read_jobs_ending(scope, suffix).await
    }
    async fn jobs(&self, scope: &Scope, filter: &JobFilter, limit: u32) -> Result<Vec<Job>, StoreError> {
        self.read_jobs(scope, filter, limit).await
    }
    async fn live(&self, after: Option<JobId>, limit: u32) -> Result<Vec<Job>, StoreError> {
        self.read_live(after, limit).await
    }
    async fn held(&self, worker: &WorkerId) -> Result<Vec<Job>, StoreError> {
        self.read_held(worker).await
    }
    async fn attempts(&self, scope: &Scope, job: &JobId) -> Result<Vec<Attempt>, StoreError> {
        self.read_attempts(scope, job).await
    }
    async fn attempt(&self, scope: &Scope, at: &AttemptRef) -> Result<Option<Attempt>, StoreError> {
        self.read_attempt(scope, at).await
    }
    async fn events(&self, scope: &Scope, job: &JobId, after: u64, limit: u32) -> Result<Vec<JobEventRow>, StoreError> {
        self.read_events(scope, job, after, limit).await
    }
    async fn artifacts(&self, scope: &Scope, job: &JobId) -> Result<Vec<Artifact>, StoreError> {
        self.read_artifacts(scope, job).await
    }
    async fn artifact(&self, scope: &Scope, at: &AttemptRef, path: &str) -> Result<Option<Artifact>, StoreError> {
        self.read_artifact(scope, at, path).await
    }
    async fn worker(&self, scope: &Scope, id: &WorkerId) -> Result<Option<Worker>, StoreError> {
        self.read_worker(scope, id).await
    }
    async fn worker_by_key(&self, public_key: &[u8; 32]) -> Result<Option<Worker>, StoreError> {
        self.read_worker_by_key(public_key).await
    }
    async fn workers(&self, scope: &Scope) -> Result<Vec<Worker>, StoreError> {
        self.read_workers(scope).await
    }
    async fn blobs(&self, scope: &Scope, kind: BlobKind, digests: &[Digest]) -> Result<Vec<Blob>, StoreError> {
        self.read_blobs(scope, kind, digests).await
    }
    async fn token(&self, hash: &Digest) -> Result<Option<TokenRow>, StoreError> {
        self.read_token(hash).await
    }
    async fn tokens(&self, scope: &Scope) -> Result<Vec<TokenRow>, StoreError> {
        self.read_tokens(scope).await
    }
    async fn memberships(&self, user: &UserId) -> Result<Vec<MemberRow>, StoreError> {
        self.read_memberships(user).await
    }
    async fn members(&self, scope: &Scope) -> Result<Vec<MemberRow>, StoreError> {
        self.read_members(scope).await
    }
    async fn images(&self, scope: &Scope) -> Result<Vec<ImageRow>, StoreError> {
        self.read_images(scope).await
    }
    async fn meta(&self, name: &str) -> Result<Option<String>, StoreError> {
        self.read_meta(name).await
    }
    async fn ended(&self, before: Ms, after: Option<(Ms, JobId)>, limit: u32) -> Result<Vec<Ended>, StoreError> {
        self.read_ended(before, after, limit).await
    }
    async fn fading(&self, before: Ms, after: Option<(Ms, AttemptRef)>, limit: u32) -> Result<Vec<Fading>, StoreError> {
        self.read_fading(before, after, limit).await
    }
    async fn unused(
        &self,
        kind: BlobKind,
        before: Ms,
        after: Option<BlobCursor>,
        limit: u32,
    ) -> Result<Vec<Blob>, StoreError> {
        self.read_unused(kind, before, after, limit).await
    }
    async fn trash(&self, before: Ms, after: Option<TrashCursor>, limit: u32) -> Result<Vec<TrashRow>, StoreError> {
        self.read_trash(before, after, limit).await
    }
    async fn trashed(&self, root: &str) -> Result<Vec<TrashRow>, StoreError> {
        self.read_trashed(root).await
    }
    async fn named(&self, objects: &[String]) -> Result<Vec<String>, StoreError> {
        self.read_named(objects).await
    }
    async fn retention(&self, scope: &Scope) -> Result<Vec<RetentionRow>, StoreError> {
        self.read_retention(scope).await
    }
}
