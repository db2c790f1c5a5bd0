//! The farm in a seed: the daemons' own deciders and procedures on virtual time, with a network, disks, clocks, VMs and a
//! database that fail as the seed says. Nothing of a daemon is written a second time here: what is simulated stands behind
//! the seams.
//!
//! | Invariant | Where it is checked |
//! |---|---|
//! | I1 | at each answer to a submit, and at the end |
//! | I2, I3, I4, I10, I14 | at each commit; I14 also at each frame that a follower gets |
//! | I5, I12 | when an attempt's command has come to its own end; I5 also over all stored logs, every so many steps and at the end |
//! | I6 | at each frame, at the end of each feed, and for what came later at the end |
//! | I7 | at each commit that lists an artifact |
//! | I8, I9 | when a VM is made or a command starts, and over all hosts, every so many steps |
//! | I11 | the faults stop, everything must end, and then new jobs run at once and at their first try |
//! | what is old | at each commit that removes something; at the end of one seed in three, that nothing is left |
//! | I13 | not here: memory is measured on real processes; every queue of the daemons is as bounded here as it is there |

pub mod check;
pub mod client;
pub mod cover;
pub mod exec;
pub mod farm;
pub mod kept;
pub mod log_check;
pub mod nemesis;
pub mod net;
pub mod plan;
pub mod probe;
pub mod run;
pub mod seams;
pub mod vms;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use alloy_shared::env::{Env as _, Ms};
use alloy_shared::limits::Limits;
use alloy_shared::mem_disk::MemDisk;
use futures_util::FutureExt as _;
use orchestrator::keep::Keep;
use orchestrator::store::mem::MemStore;
use orchestrator::{blobs, logs};

use check::Check;
use client::Client;
pub use cover::Seen;
use exec::BEGIN;
use exec::Sim;
use farm::{Centre, Mini};
use kept::KeptCheck;
use nemesis::Nemesis;
use net::Line;
use probe::Probe;
use seams::{SimStore, StoreMood};

/// Steps between two looks at everything.
const FULL_EVERY: u64 = 1_000;
/// After the last fault everything ends within this.
const CALM_MS: u64 = 90 * 60_000;
/// Then what is tried last ends within this: slots that were out of use are tried again before.
const PROBE_MS: u64 = 30 * 60_000;

/// Where things are kept for minutes, nothing is left so long after the last job: a job is kept for 45 minutes, and one whose
/// worker did not say that it is done with it for 30 from its beginning.
const EMPTY_MS: u64 = 75 * 60_000;

/// What one seed came to.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub seed: u64,
    pub violations: Vec<String>,
    pub trace: u64,
    pub virtual_ms: u64,
    pub polls: u64,
    pub jobs: usize,
    pub attempts: usize,
    pub seen: Seen,
}

/// Everything of one seed.
struct World {
    sim: Sim,
    check: Arc<Check>,
    centre: Arc<Centre>,
    minis: Vec<Arc<Mini>>,
    clients: Vec<Arc<Client>>,
    nemesis: Arc<Nemesis>,
}

/// The farm's own numbers, some of them small enough that two hours reach their ends.
fn limits(sim: &Sim) -> Limits {
    let mut limits = Limits { queue_timeout_ms: 30 * 60_000, drain_ms: 10 * 60_000, ..Limits::default() };
    if sim.chance(500) {
        limits.image_ms = 5 * 60_000;
        limits.stage_source_ms = 60_000;
        limits.collect_ms = 60_000;
    }
    limits.validate().expect("the lease holds");
    limits
}

/// In one seed of three things are kept for minutes only: long enough for whoever submits again to find his job, which tries for
/// 20 minutes.
fn keep(seed: u64) -> Keep {
    match is_short(seed) {
        true => Keep { every_ms: 15_000, ..Keep::of_days([45, 8, 10, 5], 60_000) },
        false => Keep::default(),
    }
}

fn is_short(seed: u64) -> bool {
    seed % 3 == 1
}

impl World {
    fn new(seed: u64) -> Self {
        let sim = Sim::new(seed);
        let limits = limits(&sim);
        let disk = Arc::new(MemDisk::on(sim.world()));
        let (mem, mood) = (Arc::new(MemStore::default()), StoreMood::default());
        let (logs, blobs) = (logs::Mem::on(disk.clone()), blobs::Mem::on(disk.clone()));
        let kept = KeptCheck::new(keep(seed), mem.clone(), blobs.clone());
        let check = Arc::new(Check::new(sim.clone(), logs, blobs, kept));
        let store = Arc::new(SimStore { sim: sim.clone(), check: check.clone(), mem, mood });
        let drift = sim.roll(1_001) as i64 - 500;
        let centre = Arc::new(Centre::new(sim.clone(), store, disk, limits.clone(), drift));
        let line = || Arc::new(Line::new(sim.clone(), centre.front.clone()));
        let mini = |index| Arc::new(Mini::new(sim.clone(), index, line(), check.clone(), limits.clone()));
        let minis: Vec<Arc<Mini>> = (0..sim.between(1, 4) as usize).map(mini).collect();
        let pause_ms = sim.between(20_000, 240_000);
        let client = |index| Arc::new(Client::new(sim.clone(), line(), check.clone(), index, pause_ms));
        let clients: Vec<Arc<Client>> = (0..2).map(client).collect();
        let lines = minis.iter().map(|mini| mini.line.clone()).chain(clients.iter().map(|client| client.line.clone()));
        let nemesis = Nemesis {
            sim: sim.clone(),
            check: check.clone(),
            centre: centre.clone(),
            minis: minis.clone(),
            lines: lines.collect(),
            pause_ms: sim.between(10_000, 300_000),
            // What is old is told by the clock: one that jumps by more than things are kept for is not promised anything.
            wall_ms: if is_short(seed) { 30_000 } else { 3_600_000 },
        };
        Self { check, centre, minis, clients, nemesis: Arc::new(nemesis), sim }
    }

    fn begin(&self, end: u64) {
        let world = self.sim.world();
        world.spawn("orchestrator's supervisor", self.centre.clone().supervise().boxed());
        for mini in &self.minis {
            world.spawn("worker's supervisor", mini.clone().supervise().boxed());
        }
        for client in &self.clients {
            world.spawn("client", client.clone().run(end).boxed());
            world.spawn("visitor", client.clone().look_around(end).boxed());
        }
        world.spawn("nemesis", self.nemesis.clone().run(end).boxed());
    }

    /// Runs until `end` or a violation.
    fn run(&self, end: u64, mut over: impl FnMut() -> bool) {
        let mut steps = 0u64;
        self.sim.run(end, || {
            steps += 1;
            if steps.is_multiple_of(16) {
                self.check.blobs.tell_time(Ms(BEGIN.0 + self.sim.now() as i64));
            }
            if steps.is_multiple_of(FULL_EVERY) {
                self.full();
                if over() {
                    return false;
                }
            }
            self.check.is_clean()
        });
    }

    fn full(&self) {
        let claimed: Vec<_> = self.minis.iter().map(|mini| (mini.host.index, mini.host.claimed())).collect();
        let running: Vec<usize> = self.minis.iter().map(|mini| mini.host.running()).collect();
        self.minis.iter().for_each(|mini| self.check.logs.spooled(&mini.spool.held()));
        self.check.full(&claimed, &running);
        self.check.all_there();
    }

    /// Every job has ended, nobody holds anything of one, and nobody is about to submit another.
    fn is_over(&self) -> bool {
        self.check.open().is_empty()
            && self.minis.iter().all(|mini| mini.spool.held().is_empty())
            && !self.clients.iter().any(|client| client.is_busy())
    }

    /// Nothing may be left to do: what is missing now never comes.
    fn check_end(&self) {
        if self.check.is_clean() {
            self.check.at_the_end();
            let (open, busy) = (self.check.open(), self.clients.iter().any(|client| client.is_busy()));
            if !open.is_empty() || busy {
                self.check.fail("I11", format!("the faults are over and {open:?} are open; clients wait: {busy}"));
            }
            for mini in &self.minis {
                let held = mini.spool.held();
                if !held.is_empty() {
                    self.check.fail("I11", format!("host {} still holds {held:?}", mini.host.index));
                }
            }
        }
    }

    /// Nobody uses the farm any more: all that is old goes, and nothing is left behind of what was cut off half-way.
    fn empties(&self) {
        let told = self.sim.now();
        self.run(told + EMPTY_MS, || self.check.left().is_empty());
        let left = self.check.left();
        if !left.is_empty() && self.check.is_clean() {
            self.check.fail("I5", format!("{EMPTY_MS} ms after the last job these are left: {left:?}"));
        }
    }

    /// Tries whether the farm is as good as new.
    fn probe(&self) {
        let (sim, check, centre) = (self.sim.clone(), self.check.clone(), self.centre.clone());
        let (minis, client) = (self.minis.clone(), self.clients[0].clone());
        let probe = Arc::new(Probe { sim, check, centre, minis, client });
        let (done, told) = (Arc::new(AtomicBool::new(false)), self.sim.now());
        let over = done.clone();
        self.sim.world().spawn(
            "probe",
            async move {
                probe.run().await;
                done.store(true, Ordering::Relaxed);
            }
            .boxed(),
        );
        self.run(told + PROBE_MS, || over.load(Ordering::Relaxed) && self.is_over());
        if !over.load(Ordering::Relaxed) && self.check.is_clean() {
            self.check.fail("I11", format!("the faults are over and in {PROBE_MS} ms new jobs came to no end"));
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.sim.end();
    }
}

/// Runs one seed of so many virtual hours, and then without faults to the end of all jobs.
pub fn run_seed(seed: u64, hours_milli: u64) -> Outcome {
    run::catch_panics();
    let world = World::new(seed);
    let end = hours_milli * 3_600;
    world.begin(end);
    world.run(end, || false);
    if world.check.is_clean() {
        world.nemesis.calm();
        world.run(end + CALM_MS, || world.is_over());
        world.check_end();
    }
    if world.check.is_clean() {
        world.probe();
    }
    if world.check.is_clean() {
        world.full();
        world.check_end();
    }
    if world.check.is_clean() && is_short(seed) {
        world.empties();
    }
    let panics = run::take_panics();
    for broken in world.sim.take_broken().into_iter().chain(panics) {
        world.check.fail("panic", broken);
    }
    let (jobs, attempts) = world.check.counts();
    Outcome {
        seed,
        violations: world.check.violations(),
        trace: world.sim.trace(),
        virtual_ms: world.sim.now(),
        polls: world.sim.polls(),
        jobs,
        attempts,
        seen: world.check.cover.take(),
    }
}
