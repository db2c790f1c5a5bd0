//! The store and the way upstream, with the faults that a database and a network have. Behind both lie the real things: the
//! memory store, and the orchestrator's own operations.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use alloy_shared::env::{Env, Ms, backoff};
use alloy_shared::id::{AttemptRef, Digest, JobId, OrgId, UserId, WorkerId};
use alloy_shared::limits::BLOB_MAX;
use alloy_shared::wire::ErrorCode;
use alloy_shared::wire::session::Link;
use alloy_shared::wire::source::PackReader;
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures_util::{FutureExt as _, StreamExt as _, stream};
use orchestrator::App;
use orchestrator::auth::{AttemptGrant, Denied, attempt_grant, named_worker};
use orchestrator::ops::OpError;
use orchestrator::ops::upload::Depot;
use orchestrator::session::drive::drive;
use orchestrator::store::mem::MemStore;
use orchestrator::store::tidy::{BlobCursor, Ended, Fading, RetentionRow, TrashCursor, TrashRow};
use orchestrator::store::{
    Artifact, Attempt, Blob, BlobKind, Committed, Group, ImageRow, Job, JobEventRow, JobFilter, MemberRow, Scope,
    Store, StoreError, TokenRow, Worker,
};
use tokio::sync::mpsc;
use worker::spool::SpoolFile;
use worker::upstream::{Blobs, DialError, Grant, TransferError, Upstream};

use super::check::Check;
use super::cover::Fault;
use super::exec::{Sim, SimEnv};
use super::net::{Broken, Line};

/// How the store misbehaves, in times of a thousand.
#[derive(Default)]
pub struct StoreMood {
    pub away: AtomicU64,
    pub full: AtomicU64,
    /// A commit that happened, or did not, and nobody knows.
    pub unknown: AtomicU64,
    pub slow_ms: AtomicU64,
}

pub struct SimStore {
    pub sim: Sim,
    pub check: Arc<Check>,
    pub mem: Arc<MemStore>,
    pub mood: StoreMood,
}

impl SimStore {
    fn hit(&self, per_mille: &AtomicU64, fault: Fault) -> bool {
        let per_mille = per_mille.load(Ordering::Relaxed);
        let hit = per_mille > 0 && self.sim.chance(per_mille);
        if hit {
            self.check.cover.fault(fault);
        }
        hit
    }

    async fn moment(&self) {
        let slow = self.mood.slow_ms.load(Ordering::Relaxed);
        let ms = self.sim.roll(slow + 1);
        if ms > 0 {
            self.sim.sleep(ms).await;
        }
    }

    async fn look(&self) -> Result<&MemStore, StoreError> {
        self.moment().await;
        if self.hit(&self.mood.away, Fault::StoreAway) {
            return Err(StoreError::Unavailable("the simulated database is away".to_owned()));
        }
        Ok(&*self.mem)
    }
}

macro_rules! reads {
    ($($name:ident($($arg:ident: $kind:ty),*) -> $answer:ty;)+) => {
        #[async_trait]
        impl Store for SimStore {
            async fn commit(&self, groups: &[Group]) -> Result<Committed, StoreError> {
                self.commit_groups(groups).await
            }
            $(async fn $name(&self, $($arg: $kind),*) -> Result<$answer, StoreError> {
                self.look().await?.$name($($arg),*).await
            })+
        }
    };
}

reads! {
    job(scope: &Scope, id: &JobId) -> Option<Job>;
    keyed(org: &OrgId, caller: &str, key: &str) -> Option<(JobId, Digest)>;
    jobs_ending(scope: &Scope, suffix: &str) -> Vec<JobId>;
    jobs(scope: &Scope, filter: &JobFilter, limit: u32) -> Vec<Job>;
    live(after: Option<JobId>, limit: u32) -> Vec<Job>;
    held(worker: &WorkerId) -> Vec<Job>;
    attempts(scope: &Scope, job: &JobId) -> Vec<Attempt>;
    attempt(scope: &Scope, at: &AttemptRef) -> Option<Attempt>;
    events(scope: &Scope, job: &JobId, after: u64, limit: u32) -> Vec<JobEventRow>;
    artifacts(scope: &Scope, job: &JobId) -> Vec<Artifact>;
    artifact(scope: &Scope, at: &AttemptRef, path: &str) -> Option<Artifact>;
    worker(scope: &Scope, id: &WorkerId) -> Option<Worker>;
    worker_by_key(public_key: &[u8; 32]) -> Option<Worker>;
    workers(scope: &Scope) -> Vec<Worker>;
    blobs(scope: &Scope, kind: BlobKind, digests: &[Digest]) -> Vec<Blob>;
    token(hash: &Digest) -> Option<TokenRow>;
    tokens(scope: &Scope) -> Vec<TokenRow>;
    memberships(user: &UserId) -> Vec<MemberRow>;
    members(scope: &Scope) -> Vec<MemberRow>;
    images(scope: &Scope) -> Vec<ImageRow>;
    meta(name: &str) -> Option<String>;
    ended(before: Ms, after: Option<(Ms, JobId)>, limit: u32) -> Vec<Ended>;
    fading(before: Ms, after: Option<(Ms, AttemptRef)>, limit: u32) -> Vec<Fading>;
    unused(kind: BlobKind, before: Ms, after: Option<BlobCursor>, limit: u32) -> Vec<Blob>;
    trash(before: Ms, after: Option<TrashCursor>, limit: u32) -> Vec<TrashRow>;
    trashed(root: &str) -> Vec<TrashRow>;
    named(objects: &[String]) -> Vec<String>;
    retention(scope: &Scope) -> Vec<RetentionRow>;
}

impl SimStore {
    async fn commit_groups(&self, groups: &[Group]) -> Result<Committed, StoreError> {
        self.moment().await;
        if self.hit(&self.mood.away, Fault::StoreAway) {
            return Err(StoreError::Unavailable("the simulated database is away".to_owned()));
        }
        if self.hit(&self.mood.full, Fault::StoreFull) {
            return Err(StoreError::Full("the simulated disk is full".to_owned()));
        }
        let unknown = self.hit(&self.mood.unknown, Fault::CommitUnknown);
        if unknown && self.sim.chance(500) {
            self.check.cover.fault(Fault::CommitLost);
            self.moment().await;
            return Err(StoreError::Unknown("the connection broke in the commit".to_owned()));
        }
        let done = self.mem.commit(groups).await?;
        for (group, result) in groups.iter().zip(&done.groups) {
            self.sim.note((group.0.len(), result.is_ok()));
            let numbers = result.as_ref().map(Vec::as_slice).unwrap_or_default();
            group.0.iter().zip(numbers).for_each(|(write, number)| self.check.committed(write, *number));
        }
        // What is committed stays, whether its asker hears of it or not.
        self.moment().await;
        if unknown { Err(StoreError::Unknown("the connection broke after the commit".to_owned())) } else { Ok(done) }
    }
}

/// A worker's way to the orchestrator.
pub struct SimUpstream {
    pub sim: Sim,
    pub env: Arc<SimEnv>,
    pub line: Arc<Line>,
    pub worker: WorkerId,
}

const PUT_PAUSE_MS: u64 = 200;
const PUT_PAUSE_CAP_MS: u64 = 10_000;
const PUT_BUDGET_MS: u64 = 10 * 60_000;
/// A request without an answer is given up.
const ANSWER_MS: u64 = 30_000;

fn broken(_: Broken) -> TransferError {
    TransferError::Broken("the connection broke off".to_owned())
}

/// How a worker's client reads a refusal.
fn refusal(error: OpError) -> TransferError {
    match error {
        OpError::Store(_) | OpError::Io { .. } => TransferError::Broken(error.to_string()),
        OpError::Refused { code, .. } if code.is_retryable() || code == ErrorCode::OffsetMismatch => {
            TransferError::Broken(error.to_string())
        }
        OpError::Refused { .. } | OpError::Missing(_) => TransferError::Refused(error.to_string()),
    }
}

fn denied(denied: Denied) -> TransferError {
    match denied {
        Denied::Store(_) | Denied::Throttled { .. } => TransferError::Broken(denied.to_string()),
        _ => TransferError::Fenced(denied.to_string()),
    }
}

async fn open(app: &App, at: AttemptRef, token: &str) -> Result<AttemptGrant, TransferError> {
    let header = format!("Bearer {token}");
    attempt_grant(&*app.store, &app.grants, at, Some(&header)).await.map_err(denied)
}

fn depot(app: &App, org: OrgId) -> Depot<'_> {
    Depot { store: &*app.store, blobs: &app.blobs, env: &app.env, fresh_ms: app.keep.grace_ms, org }
}

async fn whole(mut body: orchestrator::blobs::Body) -> Result<Bytes, TransferError> {
    let mut all = BytesMut::new();
    while let Some(part) = body.next().await {
        all.extend_from_slice(&part.map_err(|error| TransferError::Broken(error.to_string()))?);
    }
    Ok(all.freeze())
}

impl SimUpstream {
    /// One request of an attempt, within a bound on its time.
    async fn ask<T, F, R>(&self, grant: &Grant, handler: F) -> Result<T, TransferError>
    where
        T: Send + 'static,
        F: FnOnce(Arc<App>, AttemptGrant) -> R + Send + 'static,
        R: Future<Output = Result<T, TransferError>> + Send + 'static,
    {
        let (at, token) = (grant.attempt, grant.token.expose().clone());
        let call = self.line.call(async move |app| {
            let open = open(&app, at, &token).await?;
            handler(app, open).await
        });
        tokio::select! {
            biased;
            answer = call => answer.map_err(broken)?,
            () = self.sim.sleep(ANSWER_MS) => Err(broken(Broken)),
        }
    }

    /// One try to bring the rest of an artifact. Answers how much is there, and whether that is all.
    async fn put_once(&self, grant: &Grant, file: &SpoolFile, total: u64) -> Result<(u64, bool), TransferError> {
        let digest = file.digest();
        let progress = self.ask(grant, move |app, open| async move {
            depot(&app, open.org).artifact_progress(&digest).await.map_err(refusal)
        });
        let progress = progress.await?;
        if progress.complete {
            return Ok((total, true));
        }
        let mut pieces = file.open(progress.have).map_err(|error| TransferError::Spool(error.to_string()))?;
        let mut parts = Vec::new();
        while let Some(piece) = pieces.recv().await {
            parts.extend(piece.chunks(4_096).map(Bytes::copy_from_slice));
        }
        // Some uploads break off half-way.
        if self.sim.chance(20) {
            parts.truncate(parts.len() / 2);
        }
        let body = stream::iter(parts.into_iter().map(Ok)).boxed();
        let offset = progress.have;
        let sent = self.ask(grant, move |app, open| async move {
            depot(&app, open.org).artifact(digest, offset, total, body).await.map_err(refusal)
        });
        let sent = sent.await?;
        Ok((sent.have, sent.complete))
    }
}

#[async_trait]
impl Upstream for SimUpstream {
    async fn dial(&self) -> Result<Link, DialError> {
        let unreachable = || DialError::Unreachable("nobody answers".to_owned());
        let worker = self.worker;
        let known = self.line.call(async move |app| named_worker(&*app.store, Some(&format!("Worker {worker}"))).await);
        match known.await {
            Ok(Ok(_)) => {}
            Ok(Err(Denied::Unknown | Denied::Revoked)) => {
                let code = ErrorCode::Unauthenticated;
                return Err(DialError::Refused { code, message: "who?".to_owned(), retry_after_ms: None });
            }
            Ok(Err(_)) | Err(Broken) => return Err(unreachable()),
        }
        let serve = |app: Arc<App>, link| {
            let session = app.sessions.track_future(drive(app.clone(), worker, link));
            app.env.spawn("session", session.boxed());
        };
        self.line.connect(serve).await.map_err(|Broken| unreachable())
    }

    async fn manifest(&self, grant: &Grant) -> Result<Bytes, TransferError> {
        let read = async move |app: Arc<App>, open: AttemptGrant| {
            let job = app.store.job(&Scope::org(open.org), &open.at.job).await;
            let job = job.map_err(|error| TransferError::Broken(error.to_string()))?;
            let source = job.and_then(|job| job.source);
            let source = source.ok_or_else(|| TransferError::Refused("it has no source".to_owned()))?;
            let (_, body) = depot(&app, open.org).manifest(&source).await.map_err(refusal)?;
            whole(body).await
        };
        self.ask(grant, read).await
    }

    async fn fetch(&self, grant: &Grant, missing: &[Digest]) -> Result<Blobs, TransferError> {
        let digests = missing.to_vec();
        let read = async move |app: Arc<App>, open: AttemptGrant| {
            let body = depot(&app, open.org).source_blobs(&digests).await.map_err(refusal)?;
            whole(body).await
        };
        let pack = self.ask(grant, read).await?;
        let mut reader = PackReader::default();
        reader.push(&pack);
        let mut blobs = Vec::new();
        let bad = |error: &dyn std::fmt::Display| TransferError::Broken(error.to_string());
        while let Some(frame) = reader.next_frame().map_err(|error| bad(&error))? {
            blobs.extend(frame.unpack().map_err(|error| bad(&error))?);
        }
        assert!(blobs.iter().all(|(_, bytes)| bytes.len() <= BLOB_MAX));
        let (tx, rx) = mpsc::channel(4);
        let sim = self.sim.clone();
        self.env.spawn(
            "fetch",
            async move {
                for blob in blobs {
                    sim.sleep(sim.roll(3)).await;
                    if tx.send(Ok(blob)).await.is_err() {
                        return;
                    }
                }
            }
            .boxed(),
        );
        Ok(rx)
    }

    async fn put(&self, grant: &Grant, file: &SpoolFile) -> Result<Digest, TransferError> {
        let total = file.size().map_err(|error| TransferError::Spool(error.to_string()))?;
        let (mut tries, mut best, mut moved_at) = (0, 0, self.env.now().mono);
        loop {
            let error = match self.put_once(grant, file, total).await {
                Ok((_, true)) => return Ok(file.digest()),
                Ok((have, false)) => {
                    if have > best {
                        (tries, best, moved_at) = (0, have, self.env.now().mono);
                    }
                    broken(Broken)
                }
                Err(error @ TransferError::Broken(_)) => error,
                Err(error) => return Err(error),
            };
            let now = self.env.now().mono;
            if now.since(moved_at) >= PUT_BUDGET_MS {
                return Err(error);
            }
            tries += 1;
            self.env.sleep_until(now + backoff(tries, PUT_PAUSE_MS, PUT_PAUSE_CAP_MS, self.env.dice())).await;
        }
    }
}
