//! What goes from a bucket that fails, and what comes back to it.

use std::sync::Arc;

use alloy_shared::env::Ms;
use alloy_shared::id::{DEFAULT_ORG, Digest};
use alloy_shared::limits::Limits;
use alloy_shared::secret::Secret;
use alloy_tests::chaos::Dice;
use alloy_tests::farm::full;
use alloy_tests::s3::{Odds, S3};
use anyhow::{Context as _, Result, ensure};
use futures_util::StreamExt as _;
use orchestrator::gc::Collector;
use orchestrator::keep::Keep;
use orchestrator::logs::Logs;
use orchestrator::ops::upload::Depot;
use orchestrator::store::mem::MemStore;
use orchestrator::store::{BlobKind, Scope};
use orchestrator::{App, Ground};
use tokio_util::sync::CancellationToken;

use super::{bucket, env, noise, whole};

const TRIES: usize = 2_000;

async fn send(depot: Depot<'_>, bytes: &[u8]) -> Result<()> {
    let (digest, total) = (Digest::of(bytes), bytes.len() as u64);
    for _ in 0..TRIES {
        let Ok(progress) = depot.artifact_progress(&digest).await else { continue };
        if progress.complete {
            return Ok(());
        }
        let rest = whole(&bytes[progress.have as usize..], 50_000);
        if depot.artifact(digest, progress.have, total, rest).await.is_ok_and(|progress| progress.complete) {
            return Ok(());
        }
    }
    anyhow::bail!("an artifact of {total} bytes did not arrive")
}

/// Looks again and again until a look came to its end and nothing waits any more.
async fn collect(app: &Arc<App>) -> Result<()> {
    let mut collector = Collector::default();
    for _ in 0..TRIES {
        match collector.step(app).await {
            Ok(true) => {}
            Ok(false) if app.store.trash(Ms(i64::MAX), None, 1).await?.is_empty() => return Ok(()),
            Ok(false) => {}
            // It begins anew, as after a crash.
            Err(_) => collector = Collector::default(),
        }
    }
    anyhow::bail!("what is old stays")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_that_fails_is_emptied_all_the_same_and_takes_the_same_bytes_again() -> Result<()> {
    let dice = Dice::from_environment();
    let (s3, spool) = (S3::start().await?, tempfile::tempdir()?);
    let blobs = Arc::new(bucket(&s3, spool.path()).await?);
    let keep = Keep { sources_ms: 1, grace_ms: 1, ..Keep::default() };
    let ground = Ground {
        store: Arc::new(MemStore::default()),
        logs: Logs::memory(),
        blobs,
        shared: None,
        env: env(),
        limits: Limits::default(),
        keep,
        secret: Secret::new([1; 32]),
        base_url: "http://farm.test".to_owned(),
        behind_proxy: false,
        random: || [1; 32],
        sign_in: None,
        stopping: CancellationToken::new(),
    };
    let app = App::on(ground).await?;
    let depot = || Depot { store: &*app.store, blobs: &app.blobs, env: &app.env, fresh_ms: 60_000, org: DEFAULT_ORG };
    let seed = dice.apart(0).roll(u64::MAX);
    println!("seed {seed}");
    s3.faults.set(Odds { seed, errors: 20, lost_replies: 10, cut_bodies: 15 });
    let count = if full() { 200 } else { 20 };
    let all: Vec<Vec<u8>> = (0..count).map(|n| noise(10_000 + 1_000 * n as usize, n)).collect();
    let digests: Vec<Digest> = all.iter().map(|bytes| Digest::of(bytes)).collect();
    for round in 0..2 {
        for bytes in &all {
            send(depot(), bytes).await.with_context(|| format!("round {round}"))?;
        }
        let rows = app.store.blobs(&Scope::farm(), BlobKind::Artifact, &digests).await?;
        ensure!(rows.len() == all.len());
        for row in &rows {
            let bytes = std::fs::read(s3.file(&format!("one/two/{}", row.place.object())))?;
            ensure!(Digest::of(&bytes) == row.digest, "{:?}", row.place);
        }
        let until = app.env.now().mono + 20;
        app.env.sleep_until(until).await;
        collect(&app).await?;
        let rows = app.store.blobs(&Scope::farm(), BlobKind::Artifact, &digests).await?;
        ensure!(rows.is_empty(), "round {round}: {} are still listed", rows.len());
        s3.faults.set(Odds::default());
        let left = app.blobs.list("", None).await?;
        ensure!(left.is_empty(), "round {round}: {left:?}");
        s3.faults.set(Odds { seed: seed ^ 1, errors: 20, lost_replies: 10, cut_bodies: 15 });
    }
    s3.faults.set(Odds::default());
    send(depot(), &all[0]).await?;
    let (_, body) = depot().read_artifact(&digests[0], None).await.map_err(|error| anyhow::anyhow!("{error}"))?;
    let parts: Vec<_> = body.collect().await;
    ensure!(parts.iter().flatten().flat_map(|part| part.iter()).eq(all[0].iter()));
    Ok(())
}
