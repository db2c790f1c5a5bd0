//! The farm's bytes in a bucket: what holds for them, what faults of the store do, and a farm that keeps them there.

mod contract;
mod farm;
mod faults;
mod gc;
mod meet;

use std::path::Path;
use std::sync::Arc;

use alloy_shared::env::{Env, Ms};
use alloy_shared::runtime::SystemEnv;
use alloy_tests::s3::S3;
use anyhow::Result;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use orchestrator::blobs::{self, Blobs, Body, Fs, Patience};
use orchestrator::config::S3 as Place;

/// Shorter than a farm's, and with more tries in it.
const PATIENCE: Patience =
    Patience { tries: 8, budget_ms: 30_000, request_ms: 20_000, idle_ms: 5_000, pause_ms: 2, pause_max_ms: 40 };

fn env() -> Arc<dyn Env> {
    Arc::new(SystemEnv::detached())
}

async fn open(place: &Place, spool: &Path) -> Result<Blobs> {
    let spool = Fs::open(spool.to_owned(), Ms(0), 0).await?;
    Ok(Blobs::S3(blobs::S3::open(place, PATIENCE, spool, env()).await?))
}

/// The test's bucket, below a prefix.
async fn bucket(s3: &S3, spool: &Path) -> Result<Blobs> {
    open(&s3.place("one/two"), spool).await
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    alloy_tests::noise::range(seed, 0, len as u64)
}

fn whole(bytes: &[u8], step: usize) -> Body {
    let parts: Vec<_> = bytes.chunks(step).map(|part| Ok(Bytes::copy_from_slice(part))).collect();
    stream::iter(parts).boxed()
}
