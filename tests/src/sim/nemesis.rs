//! Who breaks things: one fault after the other, each for a while, several at once. Every seed has its own habits.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use alloy_shared::env::Env as _;
use futures_util::FutureExt as _;

use super::check::Check;
use super::cover::Fault;
use super::exec::{Node, Sim};
use super::farm::{Centre, Mini};
use super::net::Line;
use super::vms::Moods;

pub struct Nemesis {
    pub sim: Sim,
    pub check: Arc<Check>,
    pub centre: Arc<Centre>,
    pub minis: Vec<Arc<Mini>>,
    /// Clients' lines too.
    pub lines: Vec<Arc<Line>>,
    /// The longest pause between two faults.
    pub pause_ms: u64,
    /// The most that a clock jumps by.
    pub wall_ms: u64,
}

/// How long a fault lasts: mostly within a lease, sometimes beyond it.
fn span(sim: &Sim) -> u64 {
    match sim.roll(10) {
        0..5 => sim.between(500, 20_000),
        5..8 => sim.between(20_000, 70_000),
        8 => sim.between(70_000, 200_000),
        _ => sim.between(10, 500),
    }
}

impl Nemesis {
    pub async fn run(self: Arc<Self>, end: u64) {
        for mini in &self.minis {
            mini.host.set_moods(self.moods());
            mini.disk.set_sync_ms(self.sync_ms());
        }
        self.centre.disk.set_sync_ms(self.sync_ms());
        self.centre.store.mood.slow_ms.store(self.sim.between(0, 5), Ordering::Relaxed);
        while self.sim.now() < end {
            self.sim.sleep(self.sim.between(1_000, self.pause_ms)).await;
            if self.sim.now() >= end {
                return;
            }
            let me = self.clone();
            // Some come in swarms.
            for _ in 0..(if self.sim.chance(100) { 3 } else { 1 }) {
                let me = me.clone();
                self.sim.world().spawn("fault", async move { me.fault(end).await }.boxed());
            }
        }
    }

    /// The longest that a disk takes: little, or as long as one that others keep busy.
    fn sync_ms(&self) -> u64 {
        match self.sim.chance(250) {
            true => {
                self.check.cover.fault(Fault::SlowDisk);
                self.sim.between(200, 4_000)
            }
            false => self.sim.between(0, 30),
        }
    }

    fn moods(&self) -> Moods {
        let some = |most| if self.sim.chance(500) { self.sim.roll(most) } else { 0 };
        Moods {
            clone_fails: some(40),
            boot_fails: some(60),
            boot_hangs: some(40),
            restrict_fails: some(40),
            dies_busy: some(60),
            dies_warm: some(100),
            destroy_fails: some(60),
            unpack_fails: some(60),
            file_changes: some(40),
            pull_fails: some(200),
        }
    }

    async fn fault(&self, end: u64) {
        let span = span(&self.sim).min(end.saturating_sub(self.sim.now()));
        match self.sim.roll(20) {
            0..7 => self.network(span).await,
            7..10 => self.worker(span).await,
            10..13 => self.orchestrator(span).await,
            13..15 => self.disks(span).await,
            15..17 => self.store(span).await,
            17 => self.clocks(span).await,
            _ => self.freeze(span).await,
        }
    }

    fn mini(&self) -> &Arc<Mini> {
        &self.minis[self.sim.roll(self.minis.len() as u64) as usize]
    }

    async fn network(&self, span: u64) {
        let line = &self.lines[self.sim.roll(self.lines.len() as u64) as usize];
        let fault = [Fault::SlowLine, Fault::BlackUp, Fault::BlackDown, Fault::Partition, Fault::Cut, Fault::LostReply];
        let fault = fault[self.sim.roll(fault.len() as u64) as usize];
        self.check.cover.fault(fault);
        let (slow, all) = (self.sim.between(100, 3_000), self.sim.chance(150));
        let lines = if all { self.lines.clone() } else { vec![line.clone()] };
        for line in &lines {
            match fault {
                Fault::SlowLine => line.change(|weather| weather.latency_ms = slow),
                Fault::BlackUp => line.change(|weather| weather.up_black = true),
                Fault::BlackDown => line.change(|weather| weather.down_black = true),
                Fault::LostReply => line.change(|weather| weather.lost_replies = 300),
                Fault::Cut => line.cut(),
                _ => line.change(|weather| (weather.up_black, weather.down_black) = (true, true)),
            }
        }
        self.sim.sleep(span).await;
        let cut = self.sim.chance(300);
        for line in &lines {
            line.change(|weather| {
                (weather.up_black, weather.down_black, weather.latency_ms, weather.lost_replies) =
                    (false, false, 10, 0);
            });
            if cut {
                line.cut();
            }
        }
    }

    /// The process dies at once, or in the middle of something.
    fn kill(&self, node: Node) {
        match self.sim.chance(500) {
            true => self.sim.kill(node),
            false => self.sim.doom(node, self.sim.roll(60)),
        }
    }

    async fn worker(&self, span: u64) {
        let mini = self.mini();
        match self.sim.roll(5) {
            0..3 => {
                self.check.cover.fault(Fault::WorkerKilled);
                self.kill(mini.unit.node);
            }
            3 => {
                self.check.cover.fault(Fault::WorkerDrained);
                mini.unit.stop();
            }
            _ => {
                self.check.cover.fault(Fault::WorkerPower);
                mini.unit.set_power(false);
                mini.line.change(|weather| weather.dark = true);
                self.sim.kill(mini.unit.node);
                mini.host.cut_power();
                let before = mini.spool.held();
                mini.spool.cut_power(|unsynced| self.torn(unsynced, Fault::SpoolTorn));
                self.check.logs.torn(&before, &mini.spool.held());
                self.sim.sleep(span).await;
                mini.line.change(|weather| (weather.dark, weather.cuts) = (false, weather.cuts + 1));
                mini.unit.set_power(true);
            }
        }
    }

    /// How much of what was not synced is on the disk after all.
    fn torn(&self, unsynced: u64, fault: Fault) -> u64 {
        let kept = self.sim.roll(unsynced + 1);
        if kept < unsynced {
            self.check.cover.fault(fault);
        }
        kept
    }

    async fn orchestrator(&self, span: u64) {
        let unit = &self.centre.unit;
        match self.sim.roll(5) {
            0..3 => {
                self.check.cover.fault(Fault::OrchestratorKilled);
                self.kill(unit.node);
            }
            3 => {
                self.check.cover.fault(Fault::OrchestratorRestarted);
                unit.stop();
            }
            _ => {
                self.check.cover.fault(Fault::OrchestratorPower);
                unit.set_power(false);
                self.sim.kill(unit.node);
                self.centre.logs.cut_power(|unsynced| self.torn(unsynced, Fault::LogTorn));
                self.centre.blobs.cut_power(|unsynced| self.sim.roll(unsynced + 1));
                self.sim.sleep(span).await;
                self.lines.iter().for_each(|line| line.cut());
                unit.set_power(true);
            }
        }
    }

    async fn disks(&self, span: u64) {
        let mini = self.mini();
        // A full disk may stay so for longer than a job lasts.
        let long = span * self.sim.between(1, 8);
        match self.sim.roll(4) {
            0 => {
                self.check.cover.fault(Fault::WorkerDiskFull);
                mini.disk.set_full(true);
                self.sim.sleep(long).await;
                mini.disk.set_full(false);
            }
            1 => {
                self.check.cover.fault(Fault::OrchestratorDiskFull);
                self.centre.disk.set_full(true);
                self.sim.sleep(span).await;
                self.centre.disk.set_full(false);
            }
            2 => {
                self.check.cover.fault(Fault::WorkerDiskBroken);
                mini.disk.set_broken(true);
                self.sim.sleep(span.min(20_000)).await;
                mini.disk.set_broken(false);
            }
            _ => {
                self.check.cover.fault(Fault::OrchestratorDiskBroken);
                self.centre.disk.set_broken(true);
                self.sim.sleep(span.min(20_000)).await;
                self.centre.disk.set_broken(false);
            }
        }
    }

    async fn store(&self, span: u64) {
        let mood = &self.centre.store.mood;
        let (knob, most) = match self.sim.roll(4) {
            0 => (&mood.away, 1_000),
            1 => (&mood.full, 1_000),
            2 if self.sim.chance(300) => (&mood.slow_ms, 10_000),
            2 => (&mood.slow_ms, 2_000),
            _ => (&mood.unknown, 500),
        };
        let before = knob.load(Ordering::Relaxed).min(5);
        knob.store(self.sim.between(most / 10, most), Ordering::Relaxed);
        self.sim.sleep(span).await;
        knob.store(before, Ordering::Relaxed);
    }

    async fn clocks(&self, span: u64) {
        let (fault, node) = match self.sim.chance(500) {
            true => (Fault::WorkerWall, self.mini().unit.node),
            false => (Fault::OrchestratorWall, self.centre.unit.node),
        };
        self.check.cover.fault(fault);
        let most = if self.sim.chance(500) { self.wall_ms } else { 30_000 };
        self.sim.set_wall(node, self.sim.roll(2 * most) as i64 - most as i64);
        self.sim.sleep(span).await;
        if self.sim.chance(500) {
            self.sim.set_wall(node, 0);
        }
    }

    /// The whole process stands still, and goes on as if nothing had been.
    async fn freeze(&self, span: u64) {
        let (fault, node) = match self.sim.chance(600) {
            true => (Fault::WorkerFrozen, self.mini().unit.node),
            false => (Fault::OrchestratorFrozen, self.centre.unit.node),
        };
        if self.sim.is_alive(node) {
            self.check.cover.fault(fault);
            if fault == Fault::OrchestratorFrozen {
                self.check.kept.freezes(self.sim.now());
            }
            self.sim.freeze(node, true);
            self.sim.sleep(span).await;
            self.sim.freeze(node, false);
            if fault == Fault::OrchestratorFrozen {
                self.check.kept.thaws(self.sim.now());
            }
        }
    }

    /// From here on nothing goes wrong.
    pub fn calm(&self) {
        self.sim.spare_all();
        for line in &self.lines {
            line.change(|weather| {
                (weather.up_black, weather.down_black, weather.latency_ms, weather.lost_replies) =
                    (false, false, 10, 0);
                weather.dark = false;
            });
            line.cut();
        }
        for mini in &self.minis {
            mini.host.set_moods(Moods::default());
            mini.disk.set_full(false);
            mini.disk.set_broken(false);
            mini.disk.set_sync_ms(5);
            mini.unit.set_power(true);
            self.sim.freeze(mini.unit.node, false);
        }
        self.centre.disk.set_full(false);
        self.centre.disk.set_broken(false);
        self.centre.disk.set_sync_ms(5);
        self.centre.unit.set_power(true);
        self.sim.freeze(self.centre.unit.node, false);
        self.check.kept.thaws(self.sim.now());
        let mood = &self.centre.store.mood;
        [&mood.away, &mood.full, &mood.unknown].into_iter().for_each(|knob| knob.store(0, Ordering::Relaxed));
        mood.slow_ms.store(2, Ordering::Relaxed);
    }
}
