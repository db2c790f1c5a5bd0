//! P: runs the slots: performs the plan's actions, gives VMs to attempts, destroys each after its one attempt.
//!
//! One task owns the slots. A claimed VM comes back when its [`Claimed`] is dropped, wherever and why ever that happens,
//! so that neither an error nor a panic nor a dropped future leaks a slot.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use alloy_shared::env::{Env, Mono, backoff};
use alloy_shared::limits::{HELD_MAX, Limits, SLOTS_MAX};
use alloy_shared::wire::session::SlotView;
use alloy_shared::wire::vm::{Miss, VmStages};
use futures_util::future::{BoxFuture, join_all};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::image_shelf::Use;
use crate::images::ImageStore;
use crate::provider::{Guest, ImageRef, VmError, VmFault, VmName, VmProvider, inbox_of};
use crate::session::{Input, Inputs};
use crate::vm_care::{Care, Trouble};
use crate::vm_demand::{Demand, Wish};
use crate::vm_plan::{Gap, PoolAction, Slot, View, Waiting, miss, next_wake, plan, views};

mod claim;
mod faults;
mod making;
mod wishes;

use claim::Claim;
pub use claim::Claimed;
use making::Held;

const RECLAIM_RETRY_CAP_MS: u64 = 15_000;
/// VMs that may not come, or not as they should be, before a claim is given up.
const CLAIM_TRIES: u32 = 2;

/// What a pool is made of.
pub struct PoolSetup {
    pub env: Arc<dyn Env>,
    pub limits: Limits,
    pub provider: Arc<dyn VmProvider>,
    pub inputs: Inputs,
    /// When guards kill every VM.
    pub fence: watch::Receiver<Mono>,
    /// Where the VMs' directories lie.
    pub state_dir: PathBuf,
    pub images: Arc<ImageStore>,
    /// How many slots, and what they keep warm.
    pub wish: Wish,
}

pub struct VmPool {
    env: Arc<dyn Env>,
    limits: Limits,
    provider: Arc<dyn VmProvider>,
    images: Arc<ImageStore>,
    /// What a job without an image of its own gets.
    image: watch::Sender<ImageRef>,
    asks: mpsc::Sender<Ask>,
    freed: mpsc::Sender<Freed>,
}

enum Ask {
    Claim(Claim),
    /// A fault of the host that a claim has met. It may try again unless the answer is an error.
    Judge {
        error: VmError,
        reply: oneshot::Sender<Result<(), VmError>>,
    },
    Change(Wish),
    Close(oneshot::Sender<()>),
}

enum Freed {
    Slot {
        slot: usize,
        gone: Option<oneshot::Sender<()>>,
    },
    /// A look at who still waits.
    Claims,
}

impl VmPool {
    /// Destroys every VM that an earlier daemon left, then starts the slots. Nothing is offered before nothing is left:
    /// two VMs of one job must never live.
    pub async fn start(setup: PoolSetup) -> Arc<Self> {
        reclaim(&setup).await;
        let (asks, asked) = mpsc::channel(HELD_MAX);
        let (freed, frees) = mpsc::channel(HELD_MAX + SLOTS_MAX);
        let pool = Arc::new(Self {
            env: Arc::clone(&setup.env),
            limits: setup.limits.clone(),
            provider: Arc::clone(&setup.provider),
            images: Arc::clone(&setup.images),
            image: watch::channel(setup.wish.image.clone()).0,
            asks,
            freed: freed.clone(),
        });
        let env = Arc::clone(&setup.env);
        let runner = Runner::new(setup, freed);
        env.spawn("vm_pool", Box::pin(runner.run(asked, frees)));
        pool
    }

    /// From here on idle slots are as many, and keep warm what this says. Jobs that run or wait for a VM notice nothing.
    pub async fn change(&self, wish: Wish) {
        self.image.send_replace(wish.image.clone());
        self.images.keep(wish.kept());
        // The pool ends before its daemon.
        let _the_pool_is_gone = self.asks.send(Ask::Change(wish)).await;
    }

    /// Destroys every VM that no attempt has and makes no more. Returns when that is done.
    pub async fn close(&self) {
        let (reply, done) = oneshot::channel();
        if self.asks.send(Ask::Close(reply)).await.is_ok() {
            // The pool's task may have ended with the daemon's other tasks; the guards kill what it left.
            let _ended = done.await;
        }
    }
}

fn gone() -> VmError {
    VmError::farm(VmFault::Lost, "the pool has ended")
}

async fn within<T>(
    env: &Arc<dyn Env>,
    ms: u64,
    work: impl Future<Output = Result<T, VmError>> + Send,
) -> Result<T, VmError> {
    tokio::select! {
        biased;
        done = work => done,
        () = env.sleep_until(env.now().mono + ms) => {
            Err(VmError::farm(VmFault::Start, format!("it took more than {ms} ms")))
        }
    }
}

/// A VM that is being made when the pool closes is given up: nobody will have it.
async fn unless_halted<T>(
    halt: &CancellationToken,
    work: impl Future<Output = Result<T, VmError>> + Send,
) -> Result<T, VmError> {
    tokio::select! {
        biased;
        () = halt.cancelled() => Err(VmError::farm(VmFault::Lost, "the worker is stopping")),
        done = work => done,
    }
}

async fn reclaim(setup: &PoolSetup) {
    let mut tries = 0;
    loop {
        match reclaim_once(setup).await {
            Ok(()) => break,
            Err(error) => {
                let why =
                    format!("VMs of an earlier run are not known to be gone, and no job comes here before: {error}");
                tracing::error!("{why}");
                tell(setup, Some(Trouble { why, drains: true })).await;
                let wait = backoff(tries, 1_000, RECLAIM_RETRY_CAP_MS, setup.env.dice());
                setup.env.sleep_until(setup.env.now().mono + wait).await;
                tries += 1;
            }
        }
    }
    if tries > 0 {
        tracing::info!("no VM of an earlier run is left");
        tell(setup, None).await;
    }
}

async fn tell(setup: &PoolSetup, trouble: Option<Trouble>) {
    // The session ends before the pool when the daemon stops.
    let _session_is_gone = setup.inputs.send(Input::Trouble(trouble)).await;
}

async fn reclaim_once(setup: &PoolSetup) -> Result<(), VmError> {
    let left = within(&setup.env, setup.limits.boot_ms, setup.provider.list()).await?;
    for vm in &left {
        tracing::info!(vm.id = %vm, "destroying a VM that an earlier run left");
    }
    destroy_all(&setup.env, &setup.provider, setup.limits.boot_ms, &left).await
}

/// Destroys them side by side: one that does not go keeps no other alive. The error is the first one's.
async fn destroy_all(
    env: &Arc<dyn Env>,
    provider: &Arc<dyn VmProvider>,
    each_ms: u64,
    vms: &[VmName],
) -> Result<(), VmError> {
    join_all(vms.iter().map(|vm| within(env, each_ms, provider.destroy(vm)))).await.into_iter().collect()
}

/// The end of an action.
enum Done {
    Cloned {
        slot: usize,
        made: Result<Made, VmError>,
    },
    Booted {
        slot: usize,
        made: Made,
        guest: Result<Arc<dyn Guest>, VmError>,
    },
    Destroyed {
        slot: usize,
        result: Result<(), VmError>,
    },
    Listed(Result<Vec<VmName>, VmError>),
    Swept(Result<(), VmError>),
    /// A warm VM is no more, or no longer warm.
    Ended {
        slot: usize,
        error: Option<VmError>,
    },
}

/// What a VM was cloned from, and what that and its boot cost. The image stays here for as long: the slot will want it again.
struct Made {
    image: Use,
    stages: VmStages,
}

/// The live part of a slot that has a VM.
type Running = Option<(Arc<dyn Guest>, Made)>;

struct Runner {
    setup: PoolSetup,
    freed: mpsc::Sender<Freed>,
    nonce: u32,
    made: u64,
    slots: Vec<Slot>,
    running: Vec<Running>,
    /// Why a slot has no warm VM, while it has none.
    gaps: Vec<Gap>,
    /// Watches of warm VMs, by slot.
    watches: Vec<Option<DropGuard>>,
    /// Who waits until a slot's VM is gone.
    leaving: Vec<Option<oneshot::Sender<()>>>,
    claims: Vec<Claim>,
    work: FuturesUnordered<BoxFuture<'static, Done>>,
    care: Care,
    /// VMs that nobody has are being looked for.
    sweeping: bool,
    /// They were looked for behind a VM of this life, and what was found is gone.
    looked_again: bool,
    shown: Vec<SlotView>,
    told: Option<Trouble>,
    demand: Demand,
    closing: Option<oneshot::Sender<()>>,
    halt: CancellationToken,
}

impl Runner {
    fn new(setup: PoolSetup, freed: mpsc::Sender<Freed>) -> Self {
        let count = setup.wish.slots.clamp(1, SLOTS_MAX);
        Self {
            nonce: setup.env.dice() as u32,
            made: 0,
            slots: vec![Slot::Cold { faults: 0, rest: Mono(0) }; count],
            running: (0..count).map(|_| None).collect(),
            gaps: vec![None; count],
            watches: (0..count).map(|_| None).collect(),
            leaving: (0..count).map(|_| None).collect(),
            claims: Vec::new(),
            work: FuturesUnordered::new(),
            care: Care::new(count, &setup.limits),
            sweeping: false,
            looked_again: false,
            shown: Vec::new(),
            told: None,
            demand: Demand::default(),
            closing: None,
            halt: CancellationToken::new(),
            setup,
            freed,
        }
    }

    async fn run(mut self, mut asked: mpsc::Receiver<Ask>, mut frees: mpsc::Receiver<Freed>) {
        let mut here = self.setup.images.here();
        let mut fence = self.setup.fence.clone();
        loop {
            here.mark_unchanged();
            fence.mark_unchanged();
            let wake = self.turn();
            self.publish().await;
            if self.closing.is_some() && self.work.is_empty() && self.running.iter().all(Option::is_none) {
                if let Some(reply) = self.closing.take() {
                    let _nobody_waits = reply.send(());
                }
                return;
            }
            let env = Arc::clone(&self.setup.env);
            tokio::select! {
                biased;
                freed = frees.recv() => match freed {
                    Some(Freed::Slot { slot, gone }) => self.take_back(slot, gone),
                    Some(Freed::Claims) => self.claims.retain(|claim| !claim.reply.is_closed()),
                    None => return,
                },
                ask = asked.recv(), if self.closing.is_none() => match ask {
                    Some(Ask::Claim(claim)) => self.ask(claim),
                    Some(Ask::Change(wish)) => self.change(wish),
                    Some(Ask::Judge { error, reply }) => self.judge(&error, reply),
                    Some(Ask::Close(reply)) => self.close(reply),
                    None => return,
                },
                done = self.work.next(), if !self.work.is_empty() => if let Some(done) = done {
                    self.finish(done);
                },
                Ok(()) = here.changed() => {}
                Ok(()) = fence.changed() => {}
                () = sleep(&env, wake) => {}
            }
        }
    }

    fn fence(&self) -> Mono {
        *self.setup.fence.borrow()
    }

    /// Performs the plan until it has nothing more to do. Returns when it will have.
    fn turn(&mut self) -> Option<Mono> {
        let now = self.setup.env.now().mono;
        if self.closing.is_some() {
            self.claims.clear();
            for slot in 0..self.slots.len() {
                if let Slot::Warm { .. } = self.slots[slot] {
                    self.destroy(slot, None, 0);
                }
            }
            return None;
        }
        let mut shares = self.shares(now);
        loop {
            self.shrink();
            let waiting: Vec<Waiting> = self.claims.iter().map(|claim| claim.waiting.clone()).collect();
            let view = View {
                slots: &self.slots,
                waiting: &waiting,
                shares: &shares,
                size: self.setup.wish.slots,
                warm_age_max_ms: self.setup.limits.warm_age_max_ms,
                host: self.care.host(),
                fence: self.fence(),
            };
            let actions = plan(&view, now);
            let held = match self.hold(&actions) {
                Ok(held) => held,
                Err(gone) => {
                    shares.retain(|share| share.image != gone);
                    continue;
                }
            };
            let wake = next_wake(&view, now);
            for (index, claim) in self.claims.iter_mut().enumerate() {
                let is_met = |action: &PoolAction| matches!(action, PoolAction::Give { claim, .. } if *claim == index);
                if claim.missed.is_none() && !actions.iter().any(is_met) {
                    claim.missed = Some(miss(&view, &self.gaps, &claim.waiting.image, now));
                }
            }
            if actions.is_empty() {
                self.hand_back();
                return wake;
            }
            self.perform(actions, &held, now);
        }
    }

    fn close(&mut self, reply: oneshot::Sender<()>) {
        self.closing = Some(reply);
        self.halt.cancel();
        for slot in 0..self.slots.len() {
            if let Slot::Quarantined { vm: Some(_), attempt, faults, .. } = self.slots[slot] {
                self.destroy(slot, attempt, faults);
            }
        }
    }

    fn perform(&mut self, actions: Vec<PoolAction>, held: &BTreeMap<ImageRef, Held>, now: Mono) {
        let mut claims: Vec<Option<Claim>> = self.claims.drain(..).map(Some).collect();
        for action in actions {
            match action {
                PoolAction::Make { slot, image } => {
                    if let Some(held) = held.get(&image) {
                        self.make(slot, image, held.clone());
                    }
                }
                PoolAction::Unmake { slot } => {
                    let (attempt, faults) = match &self.slots[slot] {
                        Slot::Quarantined { attempt, faults, .. } => (*attempt, *faults),
                        Slot::Warm { since, .. } => {
                            let old = now.since(*since) >= self.setup.limits.warm_age_max_ms;
                            self.gap(slot, if old { Miss::TooOld } else { Miss::NoWarmVm });
                            (None, 0)
                        }
                        Slot::Cold { .. }
                        | Slot::Cloning { .. }
                        | Slot::Booting { .. }
                        | Slot::Claimed { .. }
                        | Slot::Recycling { .. } => (None, 0),
                    };
                    self.destroy(slot, attempt, faults);
                }
                PoolAction::Release { slot } => self.slots[slot] = Slot::Cold { faults: 0, rest: now },
                PoolAction::Give { slot, claim } => {
                    if let Some(claim) = claims.get_mut(claim).and_then(Option::take) {
                        self.give(slot, claim);
                    }
                }
            }
        }
        self.claims = claims.into_iter().flatten().collect();
    }

    fn give(&mut self, slot: usize, claim: Claim) {
        let (Slot::Warm { vm, image, .. }, Some((guest, made))) = (&self.slots[slot], &self.running[slot]) else {
            return;
        };
        let stages = VmStages { warm: claim.missed.is_none(), why: claim.missed, ..made.stages };
        let claimed = Claimed {
            vm: vm.clone(),
            guest: Arc::clone(guest),
            image: image.clone(),
            digest: made.image.digest(),
            inbox: inbox_of(&self.setup.state_dir, vm),
            stages: self.setup.provider.makes_vms().then_some(stages),
            slot,
            freed: self.freed.clone(),
            gone: None,
        };
        self.watches[slot] = None;
        self.slots[slot] = Slot::Claimed { vm: vm.clone(), image: image.clone(), attempt: claim.waiting.attempt };
        // A claimer that is gone drops the VM, which brings it back here.
        let _claimer_is_gone = claim.reply.send(Ok(claimed));
    }

    fn take_back(&mut self, slot: usize, gone: Option<oneshot::Sender<()>>) {
        if let Slot::Claimed { attempt, .. } = self.slots[slot] {
            self.leaving[slot] = gone;
            self.gap(slot, Miss::Recycling);
            self.destroy(slot, Some(attempt), 0);
        }
    }

    fn finish(&mut self, done: Done) {
        let now = self.setup.env.now().mono;
        match done {
            Done::Cloned { slot, made: Ok(made) } => {
                // A command that an earlier life had begun may outlive it, and make its VM after all was reclaimed. VMs are
                // made one after the other, so by now it has.
                if !self.looked_again && !self.sweeping {
                    self.looked_again = true;
                    self.look();
                }
                self.boot(slot, made);
            }
            Done::Booted { slot, made, guest: Ok(guest) } => {
                self.care.came_up(slot);
                self.gaps[slot] = None;
                if let Slot::Booting { vm, image, .. } = &self.slots[slot] {
                    self.slots[slot] = Slot::Warm { vm: vm.clone(), image: image.clone(), since: now };
                    self.watch(slot, Arc::clone(&guest));
                    self.running[slot] = Some((guest, made));
                }
            }
            Done::Cloned { slot, made: Err(error) } | Done::Booted { slot, guest: Err(error), .. } => {
                self.failed(slot, error);
            }
            Done::Destroyed { slot, result } => self.destroyed(slot, result, now),
            Done::Listed(Ok(names)) => self.sweep(names),
            Done::Listed(Err(error)) | Done::Swept(Err(error)) => {
                (self.sweeping, self.looked_again) = (false, false);
                tracing::warn!(%error, "VMs that nobody has could not be looked for, or not be destroyed");
            }
            Done::Swept(Ok(())) => self.sweeping = false,
            Done::Ended { slot, error: Some(error) } => {
                tracing::warn!(slot, %error, "a warm VM has died; another one takes its place");
                self.gap(slot, Miss::Died);
                self.destroy(slot, None, 0);
            }
            Done::Ended { error: None, .. } => {}
        }
    }

    async fn publish(&mut self) {
        let waiting: Vec<Waiting> = self.claims.iter().map(|claim| claim.waiting.clone()).collect();
        let shown = views(&self.slots, &waiting, self.setup.wish.slots);
        if shown != self.shown {
            self.shown.clone_from(&shown);
            // The session ends before the pool when the daemon stops.
            let _session_is_gone = self.setup.inputs.send(Input::Slots(shown)).await;
        }
        let trouble = self.care.trouble();
        if trouble != self.told {
            match (&self.told, &trouble) {
                (None, Some(trouble)) => tracing::error!(drains = trouble.drains, "{}", trouble.why),
                (Some(_), None) => tracing::info!("the host's trouble is over"),
                (Some(_), Some(_)) | (None, None) => {}
            }
            self.told.clone_from(&trouble);
            tell(&self.setup, trouble).await;
        }
    }
}

async fn sleep(env: &Arc<dyn Env>, until: Option<Mono>) {
    match until {
        Some(at) => env.sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
