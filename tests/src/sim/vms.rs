//! Simulated hosts: VMs that boot late, never, die or will not go, their guards, and guests that act out their plans. A host
//! outlives its worker's daemon; a power cut takes its VMs and leaves their directories.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use alloy_shared::env::{Env, Mono};
use alloy_shared::id::{AttemptRef, Digest};
use alloy_shared::wire::image::PullProgress;
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::FutureExt as _;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use worker::artifacts::Matcher;
use worker::provider::{
    ArtifactRule, Command, Exec, ExecInput, ExecOutput, Exit, Guest, GuestFile, Image, ImageRef, Listing,
    NetworkPolicy, Run, Shape, Signal, VmError, VmFault, VmName, VmProvider,
};

use super::check::Check;
use super::cover::Fault;
use super::exec::{Sim, SimEnv};
use super::plan::{self, Plan};

/// macOS lets so many guests run on one host.
const GUESTS_MAX: usize = 2;
/// What slots are made of; it is always here.
pub const OWN_IMAGE: &str = "sim.registry/base:1";
/// An image that must be brought, and one that nobody gets.
pub const FAR_IMAGE: &str = "sim.registry/far:1";
pub const NO_IMAGE: &str = "sim.registry/none:1";
/// Room for what a command says before its reader has taken it.
const OUTPUT_QUEUE: usize = 16;

/// How a host misbehaves, in times of a thousand.
#[derive(Debug, Clone, Copy, Default)]
pub struct Moods {
    pub clone_fails: u64,
    pub boot_fails: u64,
    pub boot_hangs: u64,
    pub restrict_fails: u64,
    pub dies_busy: u64,
    pub dies_warm: u64,
    pub destroy_fails: u64,
    pub unpack_fails: u64,
    pub file_changes: u64,
    pub pull_fails: u64,
}

pub struct Host {
    sim: Sim,
    pub index: usize,
    check: Arc<Check>,
    /// From the decision to kill until a VM is dead.
    kill_ms: u64,
    state: Mutex<State>,
}

struct State {
    vms: BTreeMap<VmName, Arc<Vm>>,
    here: Vec<&'static str>,
    moods: Moods,
}

pub struct Vm {
    pub name: VmName,
    dead: CancellationToken,
    running: Mutex<bool>,
    /// The one attempt that it serves.
    attempt: Mutex<Option<AttemptRef>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Vm {
    fn is_running(&self) -> bool {
        *lock(&self.running) && !self.dead.is_cancelled()
    }
}

impl Host {
    pub fn new(sim: Sim, index: usize, check: Arc<Check>, kill_ms: u64) -> Self {
        let state = State { vms: BTreeMap::new(), here: vec![OWN_IMAGE], moods: Moods::default() };
        Self { sim, index, check, kill_ms, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    pub fn set_moods(&self, moods: Moods) {
        self.state().moods = moods;
    }

    /// Rolls for a fault and counts it if it comes.
    fn fault(&self, fault: Fault, per_mille: impl FnOnce(&Moods) -> u64) -> bool {
        let per_mille = per_mille(&self.state().moods);
        let hit = self.sim.chance(per_mille);
        if hit {
            self.check.cover.fault(fault);
        }
        hit
    }

    /// Every VM is dead at once; what they leave on the disk stays.
    pub fn cut_power(&self) {
        let vms: Vec<Arc<Vm>> = self.state().vms.values().cloned().collect();
        vms.iter().for_each(|vm| self.kill(vm));
    }

    fn kill(&self, vm: &Vm) {
        vm.dead.cancel();
        self.check.vm_dead(&vm.name);
    }

    pub fn running(&self) -> usize {
        self.state().vms.values().filter(|vm| vm.is_running()).count()
    }

    /// Attempts whose VMs are still there.
    pub fn claimed(&self) -> Vec<AttemptRef> {
        self.state().vms.values().filter(|vm| !vm.dead.is_cancelled()).filter_map(|vm| *lock(&vm.attempt)).collect()
    }
}

/// One daemon's way to its host's VMs.
pub struct SimVms {
    pub host: Arc<Host>,
    pub sim: Sim,
    pub env: Arc<SimEnv>,
    pub fence: watch::Receiver<Mono>,
    /// Cancelled when the daemon dies: its pipes close.
    pub daemon: CancellationToken,
}

impl SimVms {
    fn vm(&self, name: &VmName) -> Result<Arc<Vm>, VmError> {
        let found = self.host.state().vms.get(name).cloned();
        found.ok_or_else(|| VmError::farm(VmFault::Start, format!("{name} is not here")))
    }

    /// A process beside the VM. It outlives the daemon, and kills when the daemon's pipe closes or its fence has passed.
    async fn guard(
        host: Arc<Host>,
        vm: Arc<Vm>,
        env: Arc<SimEnv>,
        mut fence: watch::Receiver<Mono>,
        daemon: CancellationToken,
    ) {
        let mut wired = true;
        let most = loop {
            let at = *fence.borrow_and_update();
            tokio::select! {
                biased;
                () = vm.dead.cancelled() => return,
                () = daemon.cancelled() => break host.kill_ms / 10,
                moved = fence.changed(), if wired => wired = moved.is_ok(),
                () = env.sleep_until(at) => {
                    host.check.cover.fault(Fault::Fenced);
                    break host.kill_ms;
                }
            }
        };
        host.sim.sleep(host.sim.roll(most)).await;
        host.kill(&vm);
    }
}

#[async_trait]
impl VmProvider for SimVms {
    async fn list(&self) -> Result<Vec<VmName>, VmError> {
        self.sim.sleep(self.sim.between(1, 100)).await;
        Ok(self.host.state().vms.keys().cloned().collect())
    }

    async fn images(&self) -> Result<Vec<Image>, VmError> {
        self.sim.sleep(self.sim.between(1, 100)).await;
        let image = |name: &&str| Image {
            digest: Digest::of(name.as_bytes()),
            names: vec![ImageRef((*name).to_owned())],
            size_bytes: 1 << 30,
            removable: true,
        };
        Ok(self.host.state().here.iter().map(image).collect())
    }

    fn pulls(&self) -> bool {
        true
    }

    async fn find(&self, image: &ImageRef) -> Result<Option<Digest>, VmError> {
        let here = self.host.state().here.iter().any(|name| *name == image.0);
        Ok(here.then(|| Digest::of(image.0.as_bytes())))
    }

    async fn pull(
        &self,
        image: &ImageRef,
        progress: &watch::Sender<PullProgress>,
        stop: &CancellationToken,
    ) -> Result<Digest, VmError> {
        if image.0 == NO_IMAGE {
            self.sim.sleep(500).await;
            self.host.check.cover.fault(Fault::PullRefused);
            return Err(VmError::policy(VmFault::NoImage, "no such image anywhere"));
        }
        for _ in 0..4 {
            let part = self.sim.sleep(self.sim.between(1_000, 20_000));
            if stop.run_until_cancelled(part).await.is_none() {
                return Err(VmError::farm(VmFault::Pull, "nobody wants it any more"));
            }
            progress.send_modify(|progress| *progress = PullProgress::default());
            if self.host.fault(Fault::PullBroken, |moods| moods.pull_fails) {
                return Err(VmError::farm(VmFault::Pull, "the registry broke off"));
            }
        }
        let mut state = self.host.state();
        let name = if image.0 == OWN_IMAGE { OWN_IMAGE } else { FAR_IMAGE };
        if !state.here.contains(&name) {
            state.here.push(name);
        }
        Ok(Digest::of(image.0.as_bytes()))
    }

    async fn remove(&self, image: &Digest) -> Result<(), VmError> {
        self.host.state().here.retain(|name| Digest::of(name.as_bytes()) != *image);
        Ok(())
    }

    async fn create(&self, vm: &VmName, _image: &Digest, _shape: &Shape) -> Result<(), VmError> {
        self.sim.sleep(self.sim.between(50, 1_500)).await;
        if self.host.fault(Fault::CloneFails, |moods| moods.clone_fails) {
            return Err(VmError::farm(VmFault::Start, "it cannot be cloned"));
        }
        let new = Arc::new(Vm {
            name: vm.clone(),
            dead: CancellationToken::new(),
            running: Mutex::new(false),
            attempt: Mutex::new(None),
        });
        if self.host.state().vms.insert(vm.clone(), new).is_some() {
            self.host.check.fail("I8", format!("the name {vm} is used twice"));
        }
        Ok(())
    }

    async fn boot(&self, name: &VmName, _inbox: &Path) -> Result<Arc<dyn Guest>, VmError> {
        let vm = self.vm(name)?;
        if self.host.running() >= GUESTS_MAX {
            return Err(VmError::farm(VmFault::Full, "the number of VMs exceeds the system limit"));
        }
        *lock(&vm.running) = true;
        let (host, world) = (self.host.clone(), self.sim.world());
        let guard = Self::guard(host, vm.clone(), self.env.clone(), self.fence.clone(), self.daemon.clone());
        world.spawn("guard", guard.boxed());
        if self.host.fault(Fault::BootHangs, |moods| moods.boot_hangs) {
            std::future::pending::<()>().await;
        }
        self.sim.sleep(self.sim.between(2_000, 15_000)).await;
        if self.host.fault(Fault::BootFails, |moods| moods.boot_fails) {
            self.host.kill(&vm);
            return Err(VmError::farm(VmFault::Start, "it ended while it booted"));
        }
        if vm.dead.is_cancelled() {
            return Err(VmError::farm(VmFault::Start, "it was killed while it booted"));
        }
        if self.host.fault(Fault::DiesWarm, |moods| moods.dies_warm) {
            let (host, vm, after) = (self.host.clone(), vm.clone(), self.sim.between(1, 600_000));
            let sim = self.sim.clone();
            world.spawn(
                "doom",
                async move {
                    sim.sleep(after).await;
                    // Where the air is good by now it lives.
                    if host.state().moods.dies_warm > 0 {
                        host.kill(&vm);
                    }
                }
                .boxed(),
            );
        }
        Ok(Arc::new(SimGuest { host: self.host.clone(), vm, sim: self.sim.clone() }))
    }

    fn restricts(&self) -> bool {
        true
    }

    async fn restrict(&self, vm: &VmName, network: &NetworkPolicy) -> Result<(), VmError> {
        self.vm(vm)?;
        self.sim.sleep(self.sim.between(1, 50)).await;
        if self.host.fault(Fault::RestrictFails, |moods| moods.restrict_fails) {
            return Err(VmError::farm(VmFault::Network, "the filter does not answer"));
        }
        if *network == NetworkPolicy::None {
            // Stands for a policy that this host never takes.
            return Err(VmError::policy(VmFault::Network, "this policy is not to be had here"));
        }
        Ok(())
    }

    async fn destroy(&self, name: &VmName) -> Result<(), VmError> {
        let Ok(vm) = self.vm(name) else { return Ok(()) };
        self.sim.sleep(self.sim.between(20, 2_000)).await;
        if self.host.fault(Fault::DestroyFails, |moods| moods.destroy_fails) {
            return Err(VmError::farm(VmFault::Destroy, "it does not go"));
        }
        self.host.kill(&vm);
        self.host.state().vms.remove(name);
        Ok(())
    }
}

pub struct SimGuest {
    host: Arc<Host>,
    vm: Arc<Vm>,
    sim: Sim,
}

fn lost() -> VmError {
    VmError::farm(VmFault::Lost, "the VM ended")
}

impl SimGuest {
    /// Something that takes a moment, in a VM that may be gone by then.
    async fn after(&self, most_ms: u64) -> Result<(), VmError> {
        self.sim.sleep(self.sim.roll(most_ms)).await;
        if self.vm.dead.is_cancelled() { Err(lost()) } else { Ok(()) }
    }
}

#[async_trait]
impl Guest for SimGuest {
    fn workspace(&self) -> &str {
        "/sim"
    }

    async fn unpack(&self, _tar: &str, _into: &str) -> Result<(), VmError> {
        self.after(500).await?;
        if self.host.fault(Fault::UnpackFails, |moods| moods.unpack_fails) {
            return Err(VmError::user(VmFault::File, "the archive makes no tree"));
        }
        Ok(())
    }

    async fn exec(&self, command: &Command) -> Result<Exec, VmError> {
        self.after(50).await?;
        let (attempt, plan) = about(command).map_err(|error| VmError::farm(VmFault::Lost, error.to_string()))?;
        let known = lock(&self.vm.attempt).replace(attempt);
        if known.is_some() {
            self.host.check.fail("I8", format!("{} serves {known:?} and {attempt}", self.vm.name));
        }
        let (input, orders) = mpsc::channel(4);
        let (says, output) = mpsc::channel(OUTPUT_QUEUE);
        self.host.check.command_started(attempt, &self.vm.name, self.host.index);
        let (sim, check) = (self.sim.clone(), self.host.check.clone());
        let dies = self.host.fault(Fault::DiesBusy, |moods| moods.dies_busy);
        let dies_at = dies.then(|| self.sim.now() + self.sim.roll(plan.run_ms + 1));
        let process =
            Process { sim, check, host: self.host.clone(), vm: self.vm.clone(), attempt, plan, orders, says, dies_at };
        self.sim.world().spawn("command", process.run().boxed());
        Ok(Exec { input, output })
    }

    async fn read(&self, path: &str, limit: u64) -> Result<mpsc::Receiver<Bytes>, VmError> {
        self.after(100).await?;
        let attempt = lock(&self.vm.attempt).ok_or_else(lost)?;
        let number = (0..8).find(|number| plan::file_name(*number) == path).ok_or_else(lost)?;
        let mut bytes = plan::file_bytes(&attempt, number);
        if self.host.fault(Fault::FileChanges, |moods| moods.file_changes) {
            bytes = bytes.slice(..bytes.len() / 2);
        }
        bytes.truncate(limit as usize);
        let (tx, rx) = mpsc::channel(2);
        let (sim, vm) = (self.sim.clone(), self.vm.clone());
        self.sim.world().spawn(
            "file",
            async move {
                for piece in bytes.chunks(8_192) {
                    sim.sleep(sim.roll(20)).await;
                    if vm.dead.is_cancelled() || tx.send(Bytes::copy_from_slice(piece)).await.is_err() {
                        return;
                    }
                }
            }
            .boxed(),
        );
        Ok(rx)
    }

    async fn list(&self, rules: &[ArtifactRule]) -> Result<Listing, VmError> {
        self.after(200).await?;
        let attempt = lock(&self.vm.attempt).ok_or_else(lost)?;
        let files = self.host.check.plan_of(&attempt).map_or(0, |plan| plan.files);
        let matcher = Matcher::new(rules).map_err(|error| VmError::user(VmFault::File, error.to_string()))?;
        let file = |number| GuestFile {
            path: plan::file_name(number),
            size: plan::file_bytes(&attempt, number).len() as u64,
            mode: 0o644,
            link: None,
        };
        let files = (0..files).map(file).filter(|file| matcher.takes(&file.path)).collect();
        Ok(Listing { files, unfit: Vec::new(), unfit_more: 0 })
    }

    async fn ended(&self) -> VmError {
        self.vm.dead.cancelled().await;
        lost()
    }
}

/// Whose command it is, and what it is to do.
fn about(command: &Command) -> anyhow::Result<(AttemptRef, Plan)> {
    let var = |name: &str| command.env.get(name).ok_or_else(|| anyhow::anyhow!("no {name}"));
    let attempt = AttemptRef { job: var("ALLOY_JOB_ID")?.parse()?, attempt: var("ALLOY_JOB_ATTEMPT")?.parse()? };
    match &command.run {
        Run::Shell(line) => Ok((attempt, line.parse()?)),
        Run::Argv(_) => anyhow::bail!("no line"),
    }
}

/// A command in a guest.
struct Process {
    sim: Sim,
    check: Arc<Check>,
    host: Arc<Host>,
    vm: Arc<Vm>,
    attempt: AttemptRef,
    plan: Plan,
    orders: mpsc::Receiver<ExecInput>,
    says: mpsc::Sender<ExecOutput>,
    dies_at: Option<u64>,
}

impl Process {
    async fn run(mut self) {
        let last = self.act().await;
        self.check.command_ended(&self.attempt);
        let _nobody_asks = self.says.send(last).await;
    }

    async fn act(&mut self) -> ExecOutput {
        let bursts = if self.plan.burst > 0 { 1 } else { (self.plan.run_ms / 5_000).clamp(1, 40) };
        let (mut said, mut burst) = (0, 0);
        let dead = self.vm.dead.clone();
        let end = self.sim.now() + self.plan.run_ms;
        let mut dies = self.dies_at;
        loop {
            let next = match burst < bursts {
                true => self.sim.now() + if burst == 0 { 0 } else { self.plan.run_ms / bursts },
                false => end.max(self.sim.now()),
            };
            let next = next.min(dies.unwrap_or(u64::MAX));
            tokio::select! {
                biased;
                () = dead.cancelled() => return ExecOutput::Lost(lost()),
                order = self.orders.recv() => match order {
                    Some(ExecInput::Signal(Signal::Term)) if self.plan.stubborn > 0 => continue,
                    Some(ExecInput::Signal(Signal::Term)) => return self.ends_by(15, 400).await,
                    Some(ExecInput::Signal(Signal::Kill)) => return self.ends_by(9, 100).await,
                    // Nobody follows it: it is killed.
                    None => return self.ends_by(9, 100).await,
                },
                () = self.says.closed() => return self.ends_by(9, 100).await,
                () = self.sim.sleep(next.saturating_sub(self.sim.now())) => {}
            }
            if dies.take_if(|at| *at <= self.sim.now()).is_some() {
                self.host.kill(&self.vm);
            } else if burst < bursts {
                burst += 1;
                let to = self.plan.log * burst / bursts;
                if !self.say(&mut said, to).await {
                    return self.ends_by(9, 100).await;
                }
            } else {
                return ExecOutput::Exit(Exit::Code(self.plan.exit(self.attempt.attempt)));
            }
        }
    }

    /// Writes the log up to there. False: nobody reads it.
    async fn say(&mut self, said: &mut u64, to: u64) -> bool {
        while *said < to {
            let upto = to.min(*said + 1 + self.sim.roll(16_384));
            self.check.logs.produced(&self.attempt, upto);
            let bytes = plan::log_bytes(&self.attempt, *said, upto);
            *said = upto;
            let sent = tokio::select! {
                biased;
                () = self.vm.dead.cancelled() => false,
                sent = self.says.send(ExecOutput::Bytes(bytes)) => sent.is_ok(),
            };
            if !sent {
                return false;
            }
        }
        true
    }

    async fn ends_by(&mut self, signal: i32, most_ms: u64) -> ExecOutput {
        self.sim.sleep(self.sim.roll(most_ms)).await;
        ExecOutput::Exit(Exit::Signal(signal))
    }
}
