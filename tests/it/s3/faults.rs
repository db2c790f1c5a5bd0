//! An object store that fails, loses its answers and breaks off in the middle of bodies.

use std::sync::Arc;

use alloy_shared::env::Env;
use alloy_shared::id::{DEFAULT_ORG, Digest};
use alloy_shared::wire::ErrorCode;
use alloy_tests::chaos::Dice;
use alloy_tests::farm::full;
use alloy_tests::s3::{Odds, S3};
use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use orchestrator::blobs::{BlobError, BlobKey, Blobs};
use orchestrator::keep::DAY_MS;
use orchestrator::ops::OpError;
use orchestrator::ops::upload::Depot;
use orchestrator::store::mem::MemStore;
use orchestrator::store::{BlobKind, Scope, Store as _};
use tokio::task::JoinSet;

use super::{bucket, env, noise, whole};

/// What a sender goes through before it may say that the farm does not take its artifact.
const TRIES: usize = 200;

struct World {
    s3: S3,
    store: Arc<MemStore>,
    blobs: Arc<Blobs>,
    env: Arc<dyn Env>,
    _spool: tempfile::TempDir,
}

impl World {
    async fn new() -> Result<World> {
        let spool = tempfile::tempdir()?;
        let s3 = S3::start().await?;
        let blobs = Arc::new(bucket(&s3, spool.path()).await?);
        Ok(World { s3, store: Arc::default(), blobs, env: env(), _spool: spool })
    }

    fn depot(&self) -> Depot<'_> {
        Depot { store: &*self.store, blobs: &self.blobs, env: &self.env, fresh_ms: DAY_MS, org: DEFAULT_ORG }
    }

    /// Every artifact that is registered lies in the bucket with the bytes that its name says.
    async fn listed_is_whole(&self, digests: &[Digest]) -> Result<usize> {
        let rows = self.store.blobs(&Scope::farm(), BlobKind::Artifact, digests).await?;
        for row in &rows {
            let key = BlobKey::alone(DEFAULT_ORG, BlobKind::Artifact, &row.digest);
            let bytes = std::fs::read(self.s3.file(&format!("one/two/{key}"))).context("a listed artifact is there")?;
            ensure!(bytes.len() as u64 == row.size && Digest::of(&bytes) == row.digest, "{key} is damaged");
        }
        Ok(rows.len())
    }

    /// Sends as a worker does: asks how much is there, sends from there on, and may break off.
    async fn send(&self, bytes: &[u8], dice: &mut Dice) -> Result<()> {
        let (digest, total) = (Digest::of(bytes), bytes.len() as u64);
        for _ in 0..TRIES {
            let have = match self.depot().artifact_progress(&digest).await {
                Ok(progress) if progress.complete => return Ok(()),
                Ok(progress) => progress.have,
                Err(error) => {
                    is_unavailable(&error)?;
                    continue;
                }
            };
            let rest = &bytes[have as usize..];
            let breaks = dice.roll(4) == 0;
            let sent = if breaks { &rest[..dice.roll(rest.len() as u64 + 1) as usize] } else { rest };
            let end = stream::iter(breaks.then(|| Err(std::io::Error::other("the worker is gone"))));
            let body = whole(sent, 100_000).chain(end).boxed();
            match self.depot().artifact(digest, have, total, body).await {
                Ok(progress) if progress.complete => {
                    ensure!(self.listed_is_whole(&[digest]).await? == 1);
                    return Ok(());
                }
                Ok(_) => {}
                Err(_) if breaks => {}
                Err(error) => is_unavailable(&error)?,
            }
        }
        anyhow::bail!("an artifact of {total} bytes did not arrive in {TRIES} tries")
    }

    /// Reads until all of it came; what came before is never wrong.
    async fn read(&self, bytes: &[u8]) -> Result<()> {
        for _ in 0..TRIES {
            let mut body = match self.depot().read_artifact(&Digest::of(bytes), None).await {
                Ok((_, body)) => body,
                Err(error) => {
                    is_unavailable(&error)?;
                    continue;
                }
            };
            let mut at = 0;
            while let Some(Ok(part)) = body.next().await {
                ensure!(bytes[at..].starts_with(&part), "other bytes at {at}");
                at += part.len();
            }
            if at == bytes.len() {
                return Ok(());
            }
        }
        anyhow::bail!("{} bytes did not come back in {TRIES} tries", bytes.len())
    }
}

/// A farm whose store fails says "later", and never that it failed itself.
fn is_unavailable(error: &OpError) -> Result<()> {
    ensure!(matches!(error, OpError::Refused { code: ErrorCode::Unavailable, .. }), "{error:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_artifact_arrives_and_none_is_listed_whose_bytes_do_not_hash_to_its_name() -> Result<()> {
    let dice = Dice::from_environment();
    let world = Arc::new(World::new().await?);
    let seed = dice.apart(0).roll(u64::MAX);
    println!("seed {seed}");
    world.s3.faults.set(Odds { seed, errors: 20, lost_replies: 10, cut_bodies: 15 });
    let count = if full() { 1_000 } else { 200 };
    let mut sizes = dice.apart(1);
    let all: Vec<Vec<u8>> = (0..count)
        .map(|number| {
            let len = match number % 50 {
                0 => (8 << 20) + sizes.roll(4 << 20),
                1..=4 => sizes.roll(1 << 20),
                _ => sizes.roll(60_000),
            };
            noise(len as usize, number)
        })
        .collect();
    let all = Arc::new(all);
    let digests: Vec<Digest> = all.iter().map(|bytes| Digest::of(bytes)).collect();
    let mut senders = JoinSet::new();
    for sender in 0..8u64 {
        let (world, all, mut dice) = (world.clone(), all.clone(), dice.apart(10 + sender));
        senders.spawn(async move {
            for bytes in all.iter().skip(sender as usize).step_by(8) {
                world.send(bytes, &mut dice).await?;
                world.read(bytes).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = senders.join_next().await {
        done??;
        world.listed_is_whole(&digests).await?;
    }
    assert_eq!(world.listed_is_whole(&digests).await?, digests.len());
    let counts = world.s3.faults.counts();
    println!("{counts:?}");
    assert!(counts.errors > 50 && counts.lost_replies > 20 && counts.cut_bodies > 10, "{counts:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packs_are_stored_whole_or_not_at_all_while_the_store_fails() -> Result<()> {
    let dice = Dice::from_environment();
    let world = World::new().await?;
    let seed = dice.apart(0).roll(u64::MAX);
    println!("seed {seed}");
    world.s3.faults.set(Odds { seed, errors: 20, lost_replies: 10, cut_bodies: 15 });
    let mut dice = dice.apart(1);
    for number in 0..if full() { 100 } else { 24u64 } {
        let len = if number % 12 == 0 { (16 << 20) + dice.roll(4 << 20) } else { dice.roll(300_000) };
        let bytes = noise(len as usize, number);
        let mut tries = 0;
        let key = loop {
            let key = BlobKey::pack(DEFAULT_ORG, (number, tries));
            match world.blobs.put(&key, whole(&bytes, 200_000), None).await {
                Ok(stored) => {
                    assert_eq!((stored.size, stored.sha256), (len, Digest::of(&bytes)));
                    break key;
                }
                Err(BlobError::Away(_)) if tries < 50 => tries += 1,
                Err(error) => return Err(error.into()),
            }
        };
        ensure!(std::fs::read(world.s3.file(&format!("one/two/{key}")))? == bytes, "{key}");
        let (at, part) = (dice.roll(len / 2 + 1), dice.roll(len / 2 + 1));
        match world.blobs.read_piece(&key, at, u32::try_from(part)?).await {
            Ok(piece) => ensure!(piece == bytes[at as usize..(at + part) as usize], "{key}"),
            Err(BlobError::Away(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_away_is_no_fault_of_the_farm_and_nothing_is_lost() -> Result<()> {
    let world = World::new().await?;
    let bytes = noise(300_000, 1);
    let digest = Digest::of(&bytes);
    let depot = world.depot();
    world.s3.faults.set(Odds { seed: 1, errors: 100, ..Odds::default() });
    let refused = depot.artifact(digest, 0, 300_000, whole(&bytes, 5_000)).await.unwrap_err();
    is_unavailable(&refused)?;
    assert!(!depot.artifact_progress(&digest).await?.complete);
    assert_eq!(world.listed_is_whole(&[digest]).await?, 0);

    world.s3.faults.set(Odds::default());
    // Its last byte is all that must come again.
    assert_eq!(depot.artifact_progress(&digest).await?.have, 299_999);
    let done = depot.artifact(digest, 299_999, 300_000, whole(&bytes[299_999..], 1)).await?;
    assert!(done.complete);
    assert_eq!(world.listed_is_whole(&[digest]).await?, 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_changed_in_the_bucket_are_never_handed_out_whole() -> Result<()> {
    let world = World::new().await?;
    let bytes = noise(3_000_000, 2);
    let digest = Digest::of(&bytes);
    world.depot().artifact(digest, 0, 3_000_000, whole(&bytes, 100_000)).await?;
    let key = BlobKey::alone(DEFAULT_ORG, BlobKind::Artifact, &digest);
    let file = world.s3.file(&format!("one/two/{key}"));
    for at in [0, 1_500_000, 2_999_999] {
        let mut rotten = bytes.clone();
        rotten[at] ^= 1;
        std::fs::write(&file, &rotten)?;
        let (_, body) = world.depot().read_artifact(&digest, None).await?;
        let parts: Vec<std::io::Result<Bytes>> = body.collect().await;
        let came: usize = parts.iter().flatten().map(Bytes::len).sum();
        assert!(parts.last().is_some_and(Result::is_err) && came < 3_000_000, "byte {at}: {came} came");
    }
    std::fs::write(&file, &bytes[..2_000_000])?;
    assert!(world.depot().read_artifact(&digest, None).await.is_err(), "shorter than it is registered");
    std::fs::remove_file(&file)?;
    assert!(matches!(world.blobs.read(&key, 0..1).await, Err(BlobError::Missing(_))));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_orchestrator_begins_an_upload_anew_and_finishes_it() -> Result<()> {
    let world = World::new().await?;
    let spool = tempfile::tempdir()?;
    let other = Arc::new(bucket(&world.s3, spool.path()).await?);
    let elsewhere = Depot { blobs: &other, ..world.depot() };
    let bytes = noise(500_000, 3);
    let digest = Digest::of(&bytes);
    let half = world.depot().artifact(digest, 0, 500_000, whole(&bytes[..250_000], 10_000)).await?;
    assert!(!half.complete && half.have > 0);
    assert_eq!(elsewhere.artifact_progress(&digest).await?.have, 0);
    assert!(elsewhere.artifact(digest, 0, 500_000, whole(&bytes, 10_000)).await?.complete);
    // The first one hears of it from the books.
    assert!(world.depot().artifact_progress(&digest).await?.complete);
    assert_eq!(world.listed_is_whole(&[digest]).await?, 1);
    world.read(&bytes).await
}
