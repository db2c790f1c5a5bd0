//! P: what a follower reads: events and log bytes of one job from its two cursors, until the end. Every follower reads
//! the stored truth at its own pace; a slow one slows nobody.

use std::sync::Arc;

use alloy_shared::env::Env;
use alloy_shared::id::{AttemptRef, JobId, WorkerId};
use alloy_shared::limits;
use alloy_shared::wire::job::{ArtifactView, EventKind, FeedCursor, FeedFrame, JobEvent, LogFrame, WorkerNews};
use bytes::Bytes;
use tokio::sync::mpsc;
use tracing::warn;

use crate::App;
use crate::ops;
use crate::store::{Artifact, JobEventRow, Scope};

/// Frames that wait for a follower; it reads from storage, so few are enough.
const FRAMES: usize = 16;
const EVENTS: u32 = 100;
/// Log bytes read at once.
const READ: u32 = 1 << 20;

/// Why a follower gets no more.
enum Stop {
    /// It has gone, or made no progress for too long.
    Gone,
    /// The truth cannot be read; the follower comes back with its cursor.
    Failed,
}

/// Sends frames with the cursor after each, the last one `End`. A stream that ends without it was cut: come back.
pub fn follow(app: Arc<App>, scope: Scope, job: JobId, cursor: FeedCursor) -> mpsc::Receiver<(FeedCursor, FeedFrame)> {
    let (tx, rx) = mpsc::channel(FRAMES);
    let env = app.env.clone();
    let follower = Follower { app, scope, job, cursor, tx, holder: None };
    env.spawn(
        "feed",
        Box::pin(async move {
            let _ = follower.run().await;
        }),
    );
    rx
}

struct Follower {
    app: Arc<App>,
    scope: Scope,
    job: JobId,
    cursor: FeedCursor,
    tx: mpsc::Sender<(FeedCursor, FeedFrame)>,
    holder: Option<Holder>,
}

/// Who has the job's newest attempt.
#[derive(Debug, Clone, Copy)]
struct Holder {
    worker: WorkerId,
    attempt: u32,
    /// The follower was told that it is not heard.
    silent: bool,
}

impl Follower {
    async fn run(mut self) -> Result<(), Stop> {
        let mut listener = self.app.wake.job(self.job);
        let mut look = true;
        let mut attempt = 0;
        loop {
            if look && self.events(&mut attempt).await? {
                return self.end().await;
            }
            if attempt > 0 {
                self.log(attempt, false).await?;
            }
            self.hear().await?;
            self.pause().await;
            let floor = self.app.limits.poll_floor_ms;
            look = tokio::select! {
                biased;
                () = self.tx.closed() => return Err(Stop::Gone),
                look = listener.wait(&*self.app.env, floor) => look,
            };
        }
    }

    /// Sends the events that are new. True once the job has ended and all of it was sent.
    async fn events(&mut self, attempt: &mut u32) -> Result<bool, Stop> {
        if *attempt == 0 {
            let job = self.app.store.job(&self.scope, &self.job).await.map_err(failed)?.ok_or(Stop::Failed)?;
            *attempt = job.state.tries.made;
            self.holder = job.state.lease().map(|lease| Holder::new(lease.worker, lease.attempt));
            if job.state.is_done() && self.cursor.event >= job.events {
                self.rest(job.state.tries.made).await?;
                return Ok(true);
            }
        }
        loop {
            let rows =
                self.app.store.events(&self.scope, &self.job, self.cursor.event, EVENTS).await.map_err(failed)?;
            let Some(last) = rows.last() else { return Ok(false) };
            let done = last.kind == EventKind::Finished;
            for row in rows {
                // All bytes of an attempt come before the news that it ended.
                if matches!(row.kind, EventKind::Finished | EventKind::Requeued) {
                    self.rest(row.attempt).await?;
                }
                *attempt = (*attempt).max(row.attempt);
                self.holder = match row.kind {
                    EventKind::Assigned => row.worker.map(|worker| Holder::new(worker, row.attempt)),
                    EventKind::Requeued | EventKind::Finished => None,
                    EventKind::Submitted
                    | EventKind::Accepted
                    | EventKind::Phase
                    | EventKind::Artifact
                    | EventKind::CancelRequested => self.holder,
                };
                let event = self.event(row).await?;
                self.send(FeedFrame::Event(event)).await?;
            }
            if done {
                return Ok(true);
            }
        }
    }

    /// Says once that the job's worker is not heard, and once that it is back.
    async fn hear(&mut self) -> Result<(), Stop> {
        let Some(mut holder) = self.holder else { return Ok(()) };
        let now = self.app.env.now();
        let silence = self.app.hub.silence(&holder.worker, now.mono);
        let silent = silence.ms >= self.app.limits.suspect_ms();
        if silent == holder.silent {
            return Ok(());
        }
        holder.silent = silent;
        self.holder = Some(holder);
        let known = self.app.store.worker(&self.scope, &holder.worker).await.map_err(failed)?;
        // Another organisation's is nobody that the follower may hear of.
        let Some(worker) = known else { return Ok(()) };
        let lost_at = silent.then(|| now.wall.plus(silence.lost_at.since(now.mono)).rfc3339());
        let message = match &lost_at {
            Some(at) => format!(
                "worker {} was not heard for {} s; if that goes on, what it runs counts as lost at {at}",
                worker.name,
                silence.ms / 1_000
            ),
            None => format!("worker {} is heard again", worker.name),
        };
        let news = WorkerNews {
            at: now.wall.rfc3339(),
            attempt: holder.attempt,
            worker: holder.worker,
            worker_name: worker.name,
            silent,
            lost_at,
            message,
        };
        self.send(FeedFrame::Worker(news)).await
    }

    /// The stored log of every attempt up to this one. Of one that is no longer kept there is nothing to wait for.
    async fn rest(&mut self, attempt: u32) -> Result<(), Stop> {
        let known = self.app.store.attempts(&self.scope, &self.job).await.map_err(failed)?;
        let gone = |attempt| known.iter().any(|row| row.at.attempt == attempt && row.log_gone_at.is_some());
        for earlier in (self.cursor.attempt.max(1)..=attempt).filter(|attempt| !gone(*attempt)) {
            self.log(earlier, true).await?;
        }
        Ok(())
    }

    async fn event(&self, row: JobEventRow) -> Result<JobEvent, Stop> {
        let artifact = match &row.artifact {
            None => None,
            Some(path) => {
                let at = AttemptRef { job: self.job, attempt: row.attempt };
                let known = self.app.store.artifact(&self.scope, &at, path).await.map_err(failed)?;
                known.map(artifact_view).map(Box::new)
            }
        };
        Ok(JobEvent {
            seq: row.seq,
            at: row.at.rfc3339(),
            attempt: row.attempt,
            kind: row.kind,
            state: row.state,
            phase: row.phase,
            reason: row.reason,
            worker: row.worker,
            message: row.message,
            artifact,
        })
    }

    /// Sends the attempt's bytes from the cursor to what is stored. `whole`: nothing more comes.
    async fn log(&mut self, attempt: u32, whole: bool) -> Result<(), Stop> {
        if attempt < self.cursor.attempt {
            return Ok(());
        }
        if attempt > self.cursor.attempt {
            (self.cursor.attempt, self.cursor.offset) = (attempt, 0);
        }
        let at = AttemptRef { job: self.job, attempt };
        if whole {
            // The last of it may have been stored by another orchestrator.
            self.app.logs.measure(&at).await.map_err(failed)?;
        }
        loop {
            let chunks = self.app.logs.read(&at, self.cursor.offset, READ).await.map_err(failed)?;
            if chunks.is_empty() {
                return Ok(());
            }
            let chunks = joined(chunks);
            let mut moved = false;
            for chunk in pieces(chunks) {
                let text = whole_text(&chunk);
                let send = if text == 0 && (whole || chunk.len() > 3) { chunk.len() } else { text };
                if send == 0 {
                    break;
                }
                moved = true;
                let cut = send < chunk.len();
                self.send(FeedFrame::Log(LogFrame::new(attempt, self.cursor.offset, &chunk[..send]))).await?;
                // The tail of this piece is read again together with what follows it.
                if cut {
                    break;
                }
            }
            if !moved {
                return Ok(());
            }
        }
    }

    async fn end(mut self) -> Result<(), Stop> {
        let job = self.app.store.job(&self.scope, &self.job).await.map_err(failed)?.ok_or(Stop::Failed)?;
        let view = ops::job::view(&self.app, &job).await.map_err(failed)?;
        self.send(FeedFrame::End { job: Box::new(view) }).await
    }

    async fn send(&mut self, frame: FeedFrame) -> Result<(), Stop> {
        self.cursor.advance(&frame);
        deliver(&*self.app.env, &self.tx, (self.cursor, frame)).await
    }

    /// With many followers of one job, each of them reads less often and more at once.
    async fn pause(&self) {
        pause(&self.app, self.job).await;
    }
}

impl Holder {
    fn new(worker: WorkerId, attempt: u32) -> Self {
        Self { worker, attempt, silent: false }
    }
}

/// Bytes of one attempt's log from `offset`, and nothing as the last thing when the attempt has ended and all of it was
/// sent. A channel that closes without that was cut: come back.
pub fn follow_log(app: Arc<App>, scope: Scope, at: AttemptRef, offset: u64) -> mpsc::Receiver<Option<Bytes>> {
    let (tx, rx) = mpsc::channel(FRAMES);
    let env = app.env.clone();
    env.spawn(
        "follow_log",
        Box::pin(async move {
            if raw(&app, &scope, at, offset, &tx).await.is_ok() {
                let _gone = deliver(&*app.env, &tx, None).await;
            }
        }),
    );
    rx
}

async fn raw(
    app: &App,
    scope: &Scope,
    at: AttemptRef,
    mut offset: u64,
    tx: &mpsc::Sender<Option<Bytes>>,
) -> Result<(), Stop> {
    let mut listener = app.wake.job(at.job);
    let mut look = true;
    loop {
        let ended = look && has_ended(app, scope, &at).await?;
        if ended {
            app.logs.measure(&at).await.map_err(failed)?;
        }
        loop {
            let chunks = app.logs.read(&at, offset, READ).await.map_err(failed)?;
            if chunks.is_empty() {
                break;
            }
            for chunk in chunks {
                offset += chunk.len() as u64;
                deliver(&*app.env, tx, Some(chunk)).await?;
            }
        }
        if ended {
            return Ok(());
        }
        pause(app, at.job).await;
        look = tokio::select! {
            biased;
            () = tx.closed() => return Err(Stop::Gone),
            look = listener.wait(&*app.env, app.limits.poll_floor_ms) => look,
        };
    }
}

async fn has_ended(app: &App, scope: &Scope, at: &AttemptRef) -> Result<bool, Stop> {
    match app.store.attempt(scope, at).await.map_err(failed)? {
        Some(attempt) => Ok(attempt.ended_at.is_some()),
        // Not yet assigned: it ends with the job.
        None => {
            let job = app.store.job(scope, &at.job).await.map_err(failed)?;
            Ok(job.is_none_or(|job| job.state.is_done()))
        }
    }
}

async fn pause(app: &App, job: JobId) {
    let followers = app.wake.audience(job) as u64;
    let window = (followers * limits::FAN_OUT_US_PER_FOLLOWER / 1_000).min(limits::FAN_OUT_CAP_MS);
    if window > 0 {
        app.env.sleep_until(app.env.now().mono + window).await;
    }
}

async fn deliver<T>(env: &dyn Env, tx: &mpsc::Sender<T>, item: T) -> Result<(), Stop> {
    let deadline = env.now().mono + limits::FOLLOWER_STUCK_MS;
    tokio::select! {
        biased;
        sent = tx.send(item) => sent.map_err(|_| Stop::Gone),
        () = env.sleep_until(deadline) => Err(Stop::Gone),
    }
}

fn failed(error: impl std::fmt::Display) -> Stop {
    warn!(%error, "a follower's stream ends early");
    Stop::Failed
}

/// Pieces small enough for one frame.
fn pieces(chunks: Vec<Bytes>) -> impl Iterator<Item = Bytes> {
    chunks.into_iter().flat_map(|mut chunk| {
        let mut parts = Vec::with_capacity(chunk.len() / limits::LOG_CHUNK_MAX + 1);
        while chunk.len() > limits::LOG_CHUNK_MAX {
            parts.push(chunk.split_to(limits::LOG_CHUNK_MAX));
        }
        parts.push(chunk);
        parts
    })
}

/// A character may be cut between two stored chunks: a first chunk too short to show that is joined to the next ones.
fn joined(chunks: Vec<Bytes>) -> Vec<Bytes> {
    match chunks.first() {
        Some(first) if first.len() < 4 && chunks.len() > 1 => vec![Bytes::from(chunks.concat())],
        Some(_) | None => chunks,
    }
}

/// How many leading bytes are whole UTF-8, if only the last character is cut; 0 if the bytes are no text at all.
fn whole_text(bytes: &[u8]) -> usize {
    match std::str::from_utf8(bytes) {
        Ok(_) => bytes.len(),
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        Err(_) => 0,
    }
}

pub fn artifact_view(artifact: Artifact) -> ArtifactView {
    ArtifactView {
        path: artifact.path,
        size_bytes: artifact.size,
        sha256: artifact.sha256,
        mode: artifact.mode,
        link: artifact.link,
    }
}
