//! Uploads, submits and reports that meet the collector at the very moment when it removes what they refer to: in files with
//! SQLite, and in a bucket with Postgres. The clock is the test's own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use alloy_shared::env::{Env, Mono, Ms, Now};
use alloy_shared::id::{DEFAULT_ORG, Digest, JobId};
use alloy_shared::limits::Limits;
use alloy_shared::runtime::SystemEnv;
use alloy_shared::secret::Secret;
use alloy_shared::wire::ErrorCode;
use alloy_shared::wire::job::{JobSpec, SubmitJob};
use alloy_shared::wire::source::{Entry, EntryKind, Manifest, PACK_END, PackFrame};
use alloy_tests::farm::full;
use alloy_tests::pg;
use alloy_tests::s3::S3;
use alloy_tests::sim::farm::admin;
use anyhow::{Context as _, Result, bail, ensure};
use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use futures_util::{StreamExt as _, stream};
use orchestrator::blobs::{Blobs, Body};
use orchestrator::gc::Collector;
use orchestrator::keep::{DAY_MS, Keep};
use orchestrator::logs::Logs;
use orchestrator::ops::upload::Depot;
use orchestrator::ops::{OpError, job};
use orchestrator::store::Store;
use orchestrator::store::sql::SqlStore;
use orchestrator::{App, Ground};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{bucket, noise, whole};

/// What a client does again when the farm says that it may.
const TRIES: usize = 50;

/// The system's, ahead by what the test says.
struct Clock {
    real: SystemEnv,
    ahead_ms: AtomicU64,
}

#[async_trait::async_trait]
impl Env for Clock {
    fn now(&self) -> Now {
        let now = self.real.now();
        Now { wall: now.wall.plus(self.ahead_ms.load(Ordering::Relaxed)), ..now }
    }

    async fn sleep_until(&self, at: Mono) {
        self.real.sleep_until(at).await;
    }

    fn spawn(&self, name: &'static str, task: BoxFuture<'static, ()>) {
        self.real.spawn(name, task);
    }

    fn dice(&self) -> u64 {
        self.real.dice()
    }
}

#[derive(Clone)]
struct World {
    app: Arc<App>,
    clock: Arc<Clock>,
}

impl World {
    async fn on(store: SqlStore, blobs: Blobs) -> Result<Self> {
        let clock = Arc::new(Clock { real: SystemEnv::detached(), ahead_ms: AtomicU64::new(0) });
        let ground = Ground {
            store: Arc::new(store) as Arc<dyn Store>,
            logs: Logs::memory(),
            blobs: Arc::new(blobs),
            shared: None,
            env: clock.clone(),
            // Jobs wait for as long as the test likes.
            limits: Limits { queue_timeout_ms: 5_000 * DAY_MS, ..Limits::default() },
            keep: Keep::default(),
            secret: Secret::new([1; 32]),
            base_url: "http://farm.test".to_owned(),
            behind_proxy: false,
            random: || [1; 32],
            sign_in: None,
            stopping: CancellationToken::new(),
        };
        Ok(Self { app: App::on(ground).await?, clock })
    }

    fn pass(&self, hours: u64) {
        self.clock.ahead_ms.fetch_add(hours * DAY_MS / 24, Ordering::Relaxed);
    }

    fn depot(&self) -> Depot<'_> {
        let app = &self.app;
        Depot { store: &*app.store, blobs: &app.blobs, env: &app.env, fresh_ms: app.keep.grace_ms, org: DEFAULT_ORG }
    }

    /// A look at everything.
    async fn collect(&self) -> Result<()> {
        let mut collector = Collector::default();
        while collector.step(&self.app).await? {}
        Ok(())
    }

    async fn try_upload(&self, tree: &Tree) -> Result<bool, OpError> {
        let status = self.depot().put_source(tree.digest, tree.text.clone()).await?;
        if status.complete {
            return Ok(true);
        }
        let sent: Vec<_> = tree.blobs.iter().filter(|(digest, _)| status.missing.contains(digest)).cloned().collect();
        self.depot().pack(packed(&sent)).await?;
        self.depot().put_source(tree.digest, tree.text.clone()).await.map(|status| status.complete)
    }

    /// As the command line: uploads, submits, and both again when it is told that something is missing.
    async fn submit(&self, tree: &Tree) -> Result<JobId> {
        for _ in 0..TRIES {
            match self.try_upload(tree).await {
                Ok(true) => {}
                Ok(false) => continue,
                Err(OpError::Refused { code: ErrorCode::Unavailable, .. }) => continue,
                Err(error) => bail!("upload: {error}"),
            }
            let spec = JobSpec { shell: Some("true".to_owned()), ..JobSpec::default() };
            let body = SubmitJob { spec, source: Some(tree.digest) };
            match job::submit(&self.app, &admin(), body, None).await {
                Ok(submitted) => return Ok(submitted.job.id),
                Err(OpError::Refused { code: ErrorCode::SourceIncomplete | ErrorCode::Unavailable, .. }) => {}
                Err(error) => bail!("submit: {error}"),
            }
        }
        bail!("a source that was sent {TRIES} times is still not here")
    }

    /// As a worker, and then as the report that lists it.
    async fn artifact(&self, bytes: &[u8]) -> Result<()> {
        let (digest, total) = (Digest::of(bytes), bytes.len() as u64);
        for _ in 0..TRIES {
            let progress = self.depot().artifact_progress(&digest).await.context("how far it is")?;
            if !progress.complete {
                let rest = whole(&bytes[progress.have as usize..], 10_000);
                match self.depot().artifact(digest, progress.have, total, rest).await {
                    Ok(_) => {}
                    Err(OpError::Refused { code: ErrorCode::Unavailable | ErrorCode::OffsetMismatch, .. }) => continue,
                    Err(error) => bail!("artifact: {error}"),
                }
            }
            if self.depot().has_artifact(&digest).await? == Some(total) {
                return Ok(());
            }
        }
        bail!("an artifact that was sent {TRIES} times is still not here")
    }

    /// Every byte of the source, as a worker gets it.
    async fn check_source(&self, tree: &Tree) -> Result<()> {
        let (_, body) = self.depot().manifest(&tree.digest).await?;
        ensure!(read(body).await? == tree.text);
        let needed: Vec<Digest> = tree.blobs.iter().map(|(digest, _)| *digest).collect();
        let pack = read(self.depot().source_blobs(&needed).await?).await?;
        let mut reader = alloy_shared::wire::source::PackReader::default();
        reader.push(&pack);
        let mut got = Vec::new();
        while let Some(frame) = reader.next_frame()? {
            got.extend(frame.unpack()?);
        }
        ensure!(tree.blobs.iter().all(|blob| got.contains(blob)), "{} blobs came", got.len());
        Ok(())
    }

    async fn check_artifact(&self, bytes: &[u8]) -> Result<()> {
        let (_, body) = self.depot().read_artifact(&Digest::of(bytes), None).await?;
        ensure!(read(body).await? == bytes);
        Ok(())
    }
}

async fn read(mut body: Body) -> Result<Bytes> {
    let mut all = BytesMut::new();
    while let Some(part) = body.next().await {
        all.extend_from_slice(&part?);
    }
    Ok(all.freeze())
}

struct Tree {
    digest: Digest,
    text: Bytes,
    blobs: Vec<(Digest, Bytes)>,
}

fn tree(seeds: &[u64]) -> Tree {
    let bytes = seeds.iter().map(|seed| Bytes::from(noise(3_000, *seed)));
    let blobs: Vec<(Digest, Bytes)> = bytes.map(|bytes| (Digest::of(&bytes), bytes)).collect();
    let file = |(n, (digest, bytes)): (usize, &(Digest, Bytes))| Entry {
        path: format!("f{n}"),
        kind: EntryKind::File,
        mode: 0o644,
        size: bytes.len() as u64,
        chunks: vec![*digest],
        target: None,
    };
    let manifest = Manifest::new(blobs.iter().enumerate().map(file).collect()).expect("a plain tree");
    Tree { digest: manifest.digest(), text: Bytes::from(manifest.encode()), blobs }
}

fn packed(blobs: &[(Digest, Bytes)]) -> Body {
    let frame = PackFrame::pack(blobs, 1);
    let parts = [frame.encode_header(), frame.stored.clone(), Bytes::from_static(&PACK_END)];
    stream::iter(parts.map(Ok)).boxed()
}

/// Hours after which something is about to go: rows of artifacts after two days, their objects a day later; manifests after 15
/// days, chunks after 17, their objects a day later.
const AGES: [u64; 8] = [30, 47, 49, 73, 15 * 24 + 1, 17 * 24 + 1, 18 * 24 + 2, 40 * 24];

async fn meet(world: World) -> Result<()> {
    let rounds = if full() { 25 } else { 2 };
    let mut ahead = 0;
    for round in 0..rounds * AGES.len() as u64 {
        let age = AGES[(round % AGES.len() as u64) as usize];
        let tree = Arc::new(tree(&[1, 2, 3 + round % 3]));
        let bytes = Arc::new(noise(30_000, round % 5));
        let known = world.try_upload(&tree).await? && world.artifact(&bytes).await.is_ok();
        ensure!(known, "round {round}");
        // Some of the way was gone before, in steps: objects then lie in the trash, or are taken from it.
        for step in 0..round % 4 {
            world.pass(age / (2 + step));
            world.collect().await?;
        }
        world.pass(age);
        let mut all: JoinSet<Result<Option<JobId>>> = JoinSet::new();
        for _ in 0..2 {
            let world = world.clone();
            all.spawn(async move {
                for _ in 0..2 {
                    world.collect().await?;
                }
                Ok(None)
            });
        }
        let (me, sent) = (world.clone(), tree.clone());
        all.spawn(async move { me.submit(&sent).await.map(Some) });
        let (me, sent) = (world.clone(), bytes.clone());
        all.spawn(async move { me.artifact(&sent).await.map(|()| None) });
        let mut id = None;
        while let Some(done) = all.join_next().await {
            id = id.or(done?.with_context(|| format!("round {round}"))?);
        }
        let id = id.context("somebody submitted")?;
        // What was told to be here stays for a while, and what the job needs as long as it waits.
        for hours in [0, 23] {
            world.pass(hours);
            world.collect().await?;
            world.check_artifact(&bytes).await.with_context(|| format!("round {round}, {hours} hours later"))?;
            world.check_source(&tree).await.with_context(|| format!("round {round}, {hours} hours later"))?;
        }
        for _ in 0..3 {
            world.pass(15 * 24);
            world.collect().await?;
            world.check_source(&tree).await.with_context(|| format!("round {round}: the job still waits"))?;
        }
        job::cancel(&world.app, &admin(), id).await?;
        ahead = world.app.env.now().wall.0;
    }
    for _ in 0..6 {
        world.pass(40 * 24);
        world.collect().await?;
    }
    ensure!(world.app.env.now().wall.0 > ahead);
    let left = world.app.blobs.list("", None).await?;
    ensure!(left.is_empty(), "in the end nothing is left: {left:?}");
    ensure!(world.app.store.trash(Ms(i64::MAX), None, 9).await?.is_empty());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_files_whoever_relies_on_something_that_is_about_to_go_has_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = SqlStore::open_sqlite(&dir.path().join("farm.db")).await?;
    let blobs = Blobs::open(dir.path().join("blobs"), Ms(0), orchestrator::broken::Care::default()).await?;
    meet(World::on(store, blobs).await?).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_bucket_whoever_relies_on_something_that_is_about_to_go_has_it() -> Result<()> {
    let (s3, spool) = (S3::start().await?, tempfile::tempdir()?);
    let store = SqlStore::open_postgres(&pg::database().await).await?;
    meet(World::on(store, bucket(&s3, spool.path()).await?).await?).await
}
