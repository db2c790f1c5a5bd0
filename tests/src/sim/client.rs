//! Those who use the farm: they submit with a key and try again until they have an answer, cancel, and follow with a cursor
//! through cut connections.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use alloy_shared::env::Env as _;
use alloy_shared::id::{AttemptRef, Digest, JobId};
use alloy_shared::limits::PAGE_MAX;
use alloy_shared::wire::job::{FeedCursor, FeedFrame, JobSpec, SubmitJob};
use alloy_shared::wire::network::Network;
use alloy_shared::wire::source::{Entry, EntryKind, Manifest, PACK_END, PackFrame};
use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _, stream};
use orchestrator::App;
use orchestrator::feed;
use orchestrator::ops::upload::Depot;
use orchestrator::ops::{OpError, job};
use orchestrator::store::JobFilter;

use super::check::Check;
use super::cover::Fault;
use super::exec::Sim;
use super::farm::admin;
use super::net::{Broken, Line};
use super::plan::Plan;
use super::vms::{FAR_IMAGE, NO_IMAGE};

/// A request without an answer is given up, and tried again for so long.
const ANSWER_MS: u64 = 30_000;
const PATIENCE_MS: u64 = 20 * 60_000;

pub struct Client {
    pub sim: Sim,
    pub line: Arc<Line>,
    pub check: Arc<Check>,
    pub index: usize,
    /// The longest pause between two jobs.
    pub pause_ms: u64,
    /// Jobs that it has not seen to their end, or left alone.
    busy: AtomicUsize,
}

/// What became of a request.
enum Said<T> {
    Yes(T),
    No,
    /// Nobody knows; the same may be asked again.
    Again,
}

impl Client {
    pub fn new(sim: Sim, line: Arc<Line>, check: Arc<Check>, index: usize, pause_ms: u64) -> Self {
        Self { sim, line, check, index, pause_ms, busy: AtomicUsize::new(0) }
    }

    /// Submits until `end`.
    pub async fn run(self: Arc<Self>, end: u64) {
        for number in 1.. {
            self.sim.sleep(self.sim.between(100, self.pause_ms)).await;
            if self.sim.now() >= end {
                return;
            }
            self.busy.fetch_add(1, Ordering::Relaxed);
            let me = self.clone();
            let job = async move {
                me.one(number).await;
                me.busy.fetch_sub(1, Ordering::Relaxed);
            };
            self.sim.world().spawn("job", job.boxed());
        }
    }

    pub fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Relaxed) > 0
    }

    async fn one(self: &Arc<Self>, number: u64) {
        let source = if self.sim.chance(300) { Some(self.upload(self.sim.roll(4)).await) } else { None };
        let Some(source) = source.map_or(Some(None), |uploaded| uploaded.map(Some)) else { return };
        let body = SubmitJob { spec: self.spec(), source };
        let key = format!("key-{}-{number}", self.index);
        let Some(id) = self.ask(&body, &key).await else { return };
        if self.sim.chance(50) {
            // Asked again, it is the same job.
            if self.submit(&body, &key).await.is_some_and(|again| again != id) {
                self.check.fail("I1", format!("{key} gave {id} and then another job"));
            }
        }
        if self.sim.chance(150) {
            let me = self.clone();
            self.sim.world().spawn("cancel", async move { me.cancel(id).await }.boxed());
        }
        if self.sim.chance(100) {
            let (me, later) = (self.clone(), self.sim.roll(120_000));
            let attach = async move {
                me.sim.sleep(later).await;
                me.follow(id).await;
            };
            self.sim.world().spawn("attach", attach.boxed());
        }
        if self.sim.chance(800) {
            self.follow(id).await;
        }
    }

    fn spec(&self) -> JobSpec {
        let sim = &self.sim;
        let code = if sim.chance(250) { 1 + sim.roll(100) as i32 } else { 0 };
        let log = match sim.roll(20) {
            0 => 0,
            1 => sim.between(300_000, 2_000_000),
            2..6 => sim.between(20_000, 100_000),
            _ => sim.between(1, 20_000),
        };
        let plan = Plan {
            run_ms: match sim.roll(8) {
                0 => sim.between(120_000, 400_000),
                1 | 2 => sim.between(1, 1_000),
                _ => sim.between(1_000, 90_000),
            },
            log,
            code,
            fails: if code == 0 { 0 } else { 1 + sim.roll(3) as u32 },
            files: if sim.chance(400) { sim.between(0, 4) } else { 0 },
            stubborn: u64::from(sim.chance(150)),
            burst: u64::from(sim.chance(300)),
        };
        let artifacts = match (plan.files, sim.roll(4)) {
            (0, 0) => vec!["=out/missing".to_owned()],
            (0, _) => Vec::new(),
            (_, 0) => vec!["=out".to_owned()],
            (_, _) => vec!["out".to_owned(), "!out/3.bin".to_owned()],
        };
        JobSpec {
            shell: Some(plan.line()),
            artifacts,
            timeout_ms: sim.chance(150).then(|| sim.between(500, 60_000)),
            queue_timeout_ms: sim.chance(50).then(|| sim.between(1_000, 60_000)),
            retries: if sim.chance(300) { sim.roll(3) as u32 } else { 0 },
            image: match sim.roll(40) {
                0 => Some(NO_IMAGE.to_owned()),
                1 | 2 => Some(FAR_IMAGE.to_owned()),
                _ => None,
            },
            network: if sim.chance(10) { Network::None } else { Network::Default },
            ..JobSpec::default()
        }
    }

    /// Asks until there is an answer or patience is at its end.
    async fn until<T, F>(&self, mut ask: impl FnMut() -> F) -> Option<T>
    where
        F: Future<Output = Said<T>>,
    {
        let end = self.sim.now() + PATIENCE_MS;
        let mut tries = 0;
        while self.sim.now() < end {
            let said = tokio::select! {
                biased;
                said = ask() => said,
                () = self.sim.sleep(ANSWER_MS) => Said::Again,
            };
            match said {
                Said::Yes(answer) => return Some(answer),
                Said::No => return None,
                Said::Again => {}
            }
            tries += 1;
            self.sim.sleep(self.sim.between(200, 500 * tries.min(20))).await;
        }
        None
    }

    /// Submits a new job.
    pub async fn ask(&self, body: &SubmitJob, key: &str) -> Option<JobId> {
        self.check.asked();
        let id = self.submit(body, key).await?;
        self.check.accepted(id);
        Some(id)
    }

    pub async fn submit(&self, body: &SubmitJob, key: &str) -> Option<JobId> {
        let mut again = false;
        let ask = || {
            if std::mem::replace(&mut again, true) {
                self.check.cover.fault(Fault::SubmitRepeated);
            }
            let (body, key) = (body.clone(), key.to_owned());
            let call = self.line.call(async move |app| job::submit(&app, &admin(), body, Some(key)).await);
            async move { heard(call.await).map(|submitted| submitted.job.id) }
        };
        self.until(ask).await
    }

    async fn cancel(&self, id: JobId) {
        self.sim.sleep(self.sim.roll(100_000)).await;
        self.check.cover.fault(Fault::CancelAsked);
        self.cancel_at_once(id).await;
    }

    pub async fn cancel_at_once(&self, id: JobId) {
        let ask = || {
            let call = self.line.call(async move |app| job::cancel(&app, &admin(), id).await);
            async move { heard(call.await) }
        };
        self.until(ask).await;
    }

    /// Brings one of a few trees to the farm.
    async fn upload(&self, tree: u64) -> Option<Digest> {
        let files: Vec<Bytes> =
            (0..=tree).map(|file| Bytes::from(format!("file {file} of tree {tree}\n").repeat(50))).collect();
        let entry = |(number, bytes): (usize, &Bytes)| Entry {
            path: format!("src/{number}.txt"),
            kind: EntryKind::File,
            mode: 0o644,
            size: bytes.len() as u64,
            chunks: vec![Digest::of(bytes)],
            target: None,
        };
        let manifest = Manifest::new(files.iter().enumerate().map(entry).collect()).expect("a plain tree");
        let (digest, text) = (manifest.digest(), Bytes::from(manifest.encode()));
        let ask = || {
            let (text, files) = (text.clone(), files.clone());
            let call = self.line.call(async move |app| {
                let depot = depot(&app);
                let status = depot.put_source(digest, text.clone()).await?;
                if status.complete {
                    return Ok(status.digest);
                }
                let missing = files.into_iter().map(|bytes| (Digest::of(&bytes), bytes));
                let blobs: Vec<(Digest, Bytes)> = missing.filter(|(blob, _)| status.missing.contains(blob)).collect();
                let frame = PackFrame::pack(&blobs, 1);
                let parts = [frame.encode_header(), frame.stored.clone(), Bytes::from_static(&PACK_END)];
                depot.pack(stream::iter(parts.map(Ok)).boxed()).await?;
                depot.put_source(digest, text).await.map(|status| status.digest)
            });
            async move { heard(call.await) }
        };
        self.until(ask).await
    }

    /// Reads a job's feed to its end, from the cursor after every cut.
    pub async fn follow(&self, id: JobId) {
        let mut got = Got { id, cursor: FeedCursor::default(), logs: BTreeMap::new() };
        loop {
            let cursor = got.cursor;
            let open = self.line.call(async move |app| feed::follow(app, admin().scope(), id, cursor));
            if self.check.is_pruned(id) {
                return;
            }
            let Ok(mut frames) = open.await else {
                self.sim.sleep(self.sim.between(200, 5_000)).await;
                continue;
            };
            let patience = if self.sim.chance(100) { self.sim.roll(60_000) } else { 3_600_000 };
            let left = self.sim.now() + patience;
            loop {
                let frame = tokio::select! {
                    biased;
                    frame = frames.recv() => frame,
                    () = self.sim.sleep(left.saturating_sub(self.sim.now())) => None,
                };
                let Some((cursor, frame)) = frame else { break };
                if self.line.call_down().await.is_err() {
                    break;
                }
                if got.take(&self.check, cursor, &frame) {
                    return;
                }
            }
            self.check.cover.fault(Fault::FollowerCut);
            drop(frames);
            self.sim.sleep(self.sim.between(10, 3_000)).await;
        }
    }

    /// Now and then somebody looks at the list.
    pub async fn look_around(self: Arc<Self>, end: u64) {
        while self.sim.now() < end {
            self.sim.sleep(self.sim.between(10_000, 300_000)).await;
            let list = self.line.call(async move |app| {
                let jobs = app.store.jobs(&admin().scope(), &JobFilter::default(), PAGE_MAX).await?;
                job::views(&app, &jobs).await
            });
            tokio::select! {
                biased;
                _ = list => {}
                () = self.sim.sleep(ANSWER_MS) => {}
            }
        }
    }
}

fn depot(app: &Arc<App>) -> Depot<'_> {
    Depot { store: &*app.store, blobs: &app.blobs, env: &app.env, fresh_ms: app.keep.grace_ms, org: admin().org }
}

impl<T> Said<T> {
    fn map<U>(self, with: impl FnOnce(T) -> U) -> Said<U> {
        match self {
            Self::Yes(value) => Said::Yes(with(value)),
            Self::No => Said::No,
            Self::Again => Said::Again,
        }
    }
}

/// How the command line reads an answer: what a farm in trouble says may be asked again.
fn heard<T>(answer: Result<Result<T, OpError>, Broken>) -> Said<T> {
    match answer {
        Ok(Ok(value)) => Said::Yes(value),
        Ok(Err(OpError::Refused { code, .. })) if !code.is_retryable() => Said::No,
        Ok(Err(OpError::Missing(_))) => Said::No,
        Ok(Err(OpError::Refused { .. } | OpError::Store(_) | OpError::Io { .. })) | Err(Broken) => Said::Again,
    }
}

/// What a follower has of a job.
struct Got {
    id: JobId,
    cursor: FeedCursor,
    logs: BTreeMap<u32, Vec<u8>>,
}

impl Got {
    /// I6, I14: takes a frame, which must go on where the last one ended. True at the end.
    fn take(&mut self, check: &Check, cursor: FeedCursor, frame: &FeedFrame) -> bool {
        match frame {
            FeedFrame::Event(event) if event.seq != self.cursor.event + 1 => {
                check.fail(
                    "I14",
                    format!("{}: a follower hears event {} after {}", self.id, event.seq, self.cursor.event),
                );
            }
            // What is heard of a worker at the moment is no part of the record.
            FeedFrame::Event(_) | FeedFrame::Worker(_) => {}
            FeedFrame::Log(log) => {
                let bytes = self.logs.entry(log.attempt).or_default();
                let more = log.bytes().unwrap_or_default();
                if log.offset != bytes.len() as u64 || more.is_empty() {
                    let have = bytes.len();
                    check.fail("I6", format!("{}/{}: byte {} follows {have}", self.id, log.attempt, log.offset));
                }
                bytes.extend(more);
            }
            FeedFrame::End { job } => {
                if !job.state.is_terminal() {
                    check.fail("I3", format!("{} is {} at the end of its feed", self.id, job.state));
                }
                for (attempt, bytes) in &self.logs {
                    check.followed(&AttemptRef { job: self.id, attempt: *attempt }, bytes);
                }
                return true;
            }
        }
        self.cursor.advance(frame);
        // The farm may be at the beginning of a later attempt's log already.
        let ahead = cursor.attempt > self.cursor.attempt && cursor.offset == 0 && cursor.event == self.cursor.event;
        if self.cursor != cursor && !ahead {
            check.fail("I6", format!("{}: the cursor is {cursor}, {} was due", self.id, self.cursor));
        }
        self.cursor = cursor;
        false
    }
}
