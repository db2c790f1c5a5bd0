//! P: a worker's parts put together, from what an earlier run left to the last VM of this one.

use std::path::PathBuf;
use std::sync::Arc;

use alloy_shared::env::Env;
use alloy_shared::id::BootId;
use alloy_shared::limits::Limits;
use alloy_shared::runtime::Lifecycle;
use alloy_shared::wire::session::{Held, Report};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::ctx::Ctx;
use crate::executor::run_attempt;
use crate::hooks::Hooks;
use crate::host::FreeBytes;
use crate::image_book::BookFile;
use crate::images::{ImageSetup, ImageStore};
use crate::provider::VmProvider;
use crate::session::drive::{Me, Over, Seams, drive};
use crate::session::{Core, Fence, INPUT_QUEUE, Input, Inputs};
use crate::sources::Sources;
use crate::spool::Spool;
use crate::upstream::Upstream;
use crate::vm_demand::Wish;
use crate::vm_pool::{PoolSetup, VmPool};

/// Between two looks at the free disk.
const DISK_LOOK_MS: u64 = 2_000;

/// What a worker is made of.
pub struct Parts {
    pub env: Arc<dyn Env>,
    pub limits: Limits,
    pub provider: Arc<dyn VmProvider>,
    pub upstream: Arc<dyn Upstream>,
    pub hooks: Hooks,
    pub spool: Spool,
    /// What an earlier run left in the spool.
    pub held: Vec<Held>,
    pub sources: Sources,
    pub book: BookFile,
    pub me: Me,
    /// What jobs are told about where they run.
    pub name: String,
    pub fence: Arc<Fence>,
    /// Where the VMs' directories lie.
    pub state_dir: PathBuf,
    /// What a person wants of the pool, for as long as the worker runs.
    pub wishes: watch::Receiver<Wish>,
    pub image_budget: Option<u64>,
    /// On the disk of the state directory.
    pub free: FreeBytes,
}

/// Runs until `life` stops it. Nothing is offered to the farm before nothing of an earlier run is left.
pub async fn run(parts: Parts, life: &Lifecycle) -> Over {
    let left = left_behind(parts.held, &parts.spool).await;
    let (env, limits) = (parts.env, parts.limits);
    let (door, inputs) = mpsc::channel(INPUT_QUEUE);
    let mut wishes = parts.wishes;
    let wish = wishes.borrow_and_update().clone();
    let images = ImageStore::start(ImageSetup {
        env: Arc::clone(&env),
        limits: limits.clone(),
        provider: Arc::clone(&parts.provider),
        inputs: door.clone(),
        book: parts.book,
        kept: wish.kept(),
        budget: parts.image_budget,
    });
    let pool = VmPool::start(PoolSetup {
        env: Arc::clone(&env),
        limits: limits.clone(),
        provider: parts.provider,
        inputs: door.clone(),
        fence: parts.fence.watch(),
        state_dir: parts.state_dir,
        images: Arc::clone(&images),
        wish,
    });
    let pool = tokio::select! {
        biased;
        () = life.soft.cancelled() => return Over::Stopped,
        () = life.hard.cancelled() => return Over::Stopped,
        pool = pool => pool,
    };
    let sources = Arc::new(parts.sources);
    let disk = Disk { free: parts.free, floor: limits.disk_floor, sources: Arc::clone(&sources) };
    env.spawn("disk", Box::pin(watch_disk(Arc::clone(&env), disk, door.clone(), life.soft.clone())));
    env.spawn("reload", Box::pin(follow(wishes, Arc::clone(&pool), life.soft.clone())));
    let boot = BootId::mint(env.now().wall, (env.dice(), env.dice()));
    let core = Core::restore(left, boot, limits.clone());
    let spool = Arc::new(parts.spool);
    let ctx = Arc::new(Ctx {
        env: Arc::clone(&env),
        limits: limits.clone(),
        pool: Arc::clone(&pool),
        spool: Arc::clone(&spool),
        sources,
        upstream: Arc::clone(&parts.upstream),
        inputs: door.clone(),
        hooks: Arc::new(parts.hooks),
        worker_name: parts.name,
    });
    let stop_ms = limits.stop_ms;
    let seams = Seams {
        env: Arc::clone(&env),
        limits,
        upstream: parts.upstream,
        spool,
        fence: parts.fence,
        me: parts.me,
        start: Box::new(move |assignment, stop| Box::pin(run_attempt(Arc::clone(&ctx), assignment, stop))),
        wish: Box::new(move |wishes| images.wish(wishes)),
        soft: life.soft.clone(),
        hard: life.hard.clone(),
    };
    let over = drive(core, seams, door, inputs).await;
    tokio::select! {
        biased;
        () = pool.close() => {}
        () = env.sleep_until(env.now().mono + stop_ms) => tracing::warn!("not every VM is gone; their guards see to it"),
    }
    over
}

/// The attempts of an earlier run, with all that was reported of each.
async fn left_behind(all: Vec<Held>, spool: &Spool) -> Vec<(Held, Vec<(u64, Report)>)> {
    let mut left = Vec::with_capacity(all.len());
    for held in all {
        tracing::info!(attempt = %held.attempt, state = ?held.state, "an earlier run left an attempt");
        let reports = spool.reports(held.attempt, 0).await.unwrap_or_default();
        left.push((held, reports));
    }
    left
}

/// Takes over what a person wants of the pool, each time that changes.
async fn follow(mut wishes: watch::Receiver<Wish>, pool: Arc<VmPool>, over: CancellationToken) {
    loop {
        tokio::select! {
            biased;
            () = over.cancelled() => return,
            changed = wishes.changed() => if changed.is_err() { return },
        }
        let wish = wishes.borrow_and_update().clone();
        pool.change(wish).await;
    }
}

/// The disk that jobs are done on, and what on it can be given up for them.
struct Disk {
    free: FreeBytes,
    floor: u64,
    sources: Arc<Sources>,
}

/// Tells the session when the disk is too full for new work, and when it no longer is. A disk that the cache of sources
/// can make room on is not full.
async fn watch_disk(env: Arc<dyn Env>, disk: Disk, inputs: Inputs, over: CancellationToken) {
    let Disk { free: free_bytes, floor, sources } = disk;
    let mut full = false;
    loop {
        let mut look = free_bytes();
        if look.as_ref().is_ok_and(|free| *free < floor) {
            let evicted = tokio::select! {
                biased;
                () = over.cancelled() => return,
                evicted = sources.evict() => evicted,
            };
            if evicted > 0 {
                tracing::info!(evicted, "free disk was below its floor of {floor} bytes: cached sources were given up");
                look = free_bytes();
            }
        }
        match look {
            Ok(free) if full != (free < floor) => {
                full = !full;
                tracing::warn!(free, full, "free disk crossed its floor of {floor} bytes");
                if inputs.send(Input::Full(full)).await.is_err() {
                    return;
                }
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "free disk cannot be read"),
        }
        tokio::select! {
            biased;
            () = over.cancelled() => return,
            () = env.sleep_until(env.now().mono + DISK_LOOK_MS) => {}
        }
    }
}

#[cfg(test)]
mod tests;
