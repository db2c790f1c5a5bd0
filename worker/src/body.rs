//! P: a worker's parts put together, from what an earlier run left to the last VM of this one.

use std::path::PathBuf;
use std::sync::Arc;

use alloy_shared::env::Env;
use alloy_shared::id::BootId;
use alloy_shared::limits::Limits;
use alloy_shared::runtime::Lifecycle;
use alloy_shared::wire::session::{Held, HeldState, Report};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::ctx::Ctx;
use crate::executor::run_attempt;
use crate::hooks::Hooks;
use crate::host::FreeBytes;
use crate::image_book::BookFile;
use crate::images::{ImageSetup, ImageStore};
use crate::provider::VmProvider;
use crate::session::drive::{Me, Over, Seams, Starter, drive};
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

/// Runs until `life` stops it. No slot is offered to the farm before nothing of an earlier run is left.
pub async fn run(parts: Parts, life: &Lifecycle) -> Over {
    let left = left_behind(parts.held, &parts.spool).await;
    let (env, limits) = (parts.env, parts.limits);
    let patience_ms = patience_ms(&left, &limits);
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
    let setup = PoolSetup {
        env: Arc::clone(&env),
        limits: limits.clone(),
        provider: parts.provider,
        inputs: door.clone(),
        fence: parts.fence.watch(),
        state_dir: parts.state_dir,
        images: Arc::clone(&images),
        wish,
    };
    let sources = Arc::new(parts.sources);
    let disk = Disk { free: parts.free, floor: limits.disk_floor, sources: Arc::clone(&sources) };
    env.spawn("disk", Box::pin(watch_disk(Arc::clone(&env), disk, door.clone(), life.soft.clone())));
    let boot = BootId::mint(env.now().wall, (env.dice(), env.dice()));
    let core = Core::restore(left, boot, limits.clone());
    let spool = Arc::new(parts.spool);
    let ctx = {
        let (env, limits, spool) = (Arc::clone(&env), limits.clone(), Arc::clone(&spool));
        let (upstream, inputs, hooks) = (Arc::clone(&parts.upstream), door.clone(), Arc::new(parts.hooks));
        move |pool| Ctx { env, limits, pool, spool, sources, upstream, inputs, hooks, worker_name: parts.name }
    };
    let mut ready = open(setup, ctx, wishes, life.soft.clone());
    tokio::select! {
        biased;
        () = life.soft.cancelled() => return Over::Stopped,
        () = life.hard.cancelled() => return Over::Stopped,
        _ = started(&mut ready) => {}
        () = env.sleep_until(env.now().mono + patience_ms) => {
            tracing::warn!("it speaks to the farm without slots until no VM of an earlier run is left");
        }
    }
    let stop_ms = limits.stop_ms;
    let seams = Seams {
        env: Arc::clone(&env),
        limits,
        upstream: parts.upstream,
        spool,
        fence: parts.fence,
        me: parts.me,
        start: starter(ready.clone()),
        wish: Box::new(move |wishes| images.wish(wishes)),
        soft: life.soft.clone(),
        hard: life.hard.clone(),
    };
    let over = drive(core, seams, door, inputs).await;
    let ctx = ready.borrow().clone();
    if let Some(ctx) = ctx {
        close(&ctx, stop_ms).await;
    }
    over
}

async fn close(Ctx { pool, env, .. }: &Ctx, stop_ms: u64) {
    tokio::select! {
        biased;
        () = pool.close() => {}
        () = env.sleep_until(env.now().mono + stop_ms) => tracing::warn!("not every VM is gone; their guards see to it"),
    }
}

type Ready = watch::Receiver<Option<Arc<Ctx>>>;

/// Opens the pool while its worker goes on. What attempts use is there once the pool is.
fn open(
    setup: PoolSetup,
    ctx: impl FnOnce(Arc<VmPool>) -> Ctx + Send + 'static,
    wishes: watch::Receiver<Wish>,
    soft: CancellationToken,
) -> Ready {
    let (opened, ready) = watch::channel(None);
    let env = Arc::clone(&setup.env);
    env.spawn(
        "pool_start",
        Box::pin(async move {
            let pool = tokio::select! {
                biased;
                () = soft.cancelled() => return,
                pool = VmPool::start(setup) => pool,
            };
            opened.send_replace(Some(Arc::new(ctx(Arc::clone(&pool)))));
            follow(wishes, pool, soft).await;
        }),
    );
    ready
}

/// Runs attempts. None is taken before there are slots, and with that a pool: so none waits for it here.
fn starter(ready: Ready) -> Starter {
    Box::new(move |assignment, stop| {
        let mut ready = ready.clone();
        Box::pin(async move {
            if let Some(ctx) = started(&mut ready).await {
                run_attempt(ctx, assignment, stop).await;
            }
        })
    })
}

async fn started(ready: &mut Ready) -> Option<Arc<Ctx>> {
    ready.wait_for(Option::is_some).await.ok().and_then(|ctx| ctx.clone())
}

/// How long the farm hears nothing while VMs of an earlier run are still here. It may begin anew what is told to be lost: not
/// while that may live on, and not later than it would without a word. What has ended need not wait for that.
fn patience_ms(left: &[(Held, Vec<(u64, Report)>)], limits: &Limits) -> u64 {
    let is_lost = |(held, _): &(Held, Vec<_>)| match held.state {
        HeldState::Running | HeldState::Lost => true,
        HeldState::ResultPending => false,
    };
    if left.iter().any(is_lost) { limits.expiry_ms } else { limits.heartbeat_ms }
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
