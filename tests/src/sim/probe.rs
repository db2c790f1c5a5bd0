//! After the last fault the farm is as good as new: jobs run at their first try, through short cuts, partitions and a restart
//! of the orchestrator, which are no reason to lose an attempt; they fill every slot; and what was canceled stays so.

use std::sync::Arc;

use alloy_shared::env::Env as _;
use alloy_shared::wire::job::{JobSpec, StateWord, SubmitJob};
use futures_util::FutureExt as _;
use futures_util::future::join_all;

use super::check::Check;
use super::client::Client;
use super::exec::Sim;
use super::farm::{Centre, Mini};
use super::plan::Plan;

const SETTLED_MS: u64 = 60_000;
/// Jobs run for longer than any lease lasts.
const RUN_MS: u64 = 100_000;
/// By then jobs are with their workers, and nothing has gone wrong yet.
const LOOK_AT_MS: u64 = 9_000;
/// The longest break of a line that no job may notice.
const BREAK_MS: u64 = 20_000;
/// When the orchestrator is restarted: the lines have been whole again for long enough.
const RESTART_AT_MS: u64 = 75_000;
/// From the answer to a cancel to the end of its job: a restart, grace and kill, some heartbeats.
const CANCEL_MS: u64 = 60_000;
/// A slot that made trouble rests for a while before it is tried again.
const FILL_MS: u64 = 15 * 60_000;

pub struct Probe {
    pub sim: Sim,
    pub check: Arc<Check>,
    pub centre: Arc<Centre>,
    pub minis: Vec<Arc<Mini>>,
    pub client: Arc<Client>,
}

impl Probe {
    pub async fn run(self: Arc<Self>) {
        // Whoever was told to stop has stopped, and is back.
        self.sim.sleep(SETTLED_MS).await;
        let look = self.clone();
        let rooms = async move {
            look.sim.sleep(LOOK_AT_MS).await;
            look.check.rooms();
        };
        self.sim.world().spawn("rooms", rooms.boxed());
        let hiccups = self.clone();
        self.sim.world().spawn("hiccups", async move { hiccups.hiccups().await }.boxed());
        // One more than there are slots: a slot must come free again.
        let slots: usize = self.minis.iter().map(|mini| mini.slots()).sum();
        join_all((0..=slots).map(|number| self.runs(number))).await;
        self.fills(slots).await;
        self.cancels().await;
    }

    async fn hiccups(self: Arc<Self>) {
        self.sim.sleep(self.sim.between(10_000, 30_000)).await;
        for mini in &self.minis {
            let (sim, line) = (self.sim.clone(), mini.line.clone());
            let (up, down, cut) = (sim.chance(700), sim.chance(700), sim.chance(500));
            let span = sim.between(1_000, BREAK_MS);
            let hiccup = async move {
                line.change(|weather| (weather.up_black, weather.down_black) = (up, down));
                sim.sleep(span).await;
                line.change(|weather| (weather.up_black, weather.down_black) = (false, false));
                if cut {
                    line.cut();
                }
            };
            self.sim.world().spawn("hiccup", hiccup.boxed());
        }
        self.sim.sleep(RESTART_AT_MS).await;
        match self.sim.chance(500) {
            true => self.sim.kill(self.centre.unit.node),
            false => self.centre.unit.stop(),
        }
    }

    fn job(plan: Plan) -> SubmitJob {
        let artifacts = if plan.files > 0 { vec!["=out".to_owned()] } else { Vec::new() };
        SubmitJob { spec: JobSpec { shell: Some(plan.line()), artifacts, ..JobSpec::default() }, source: None }
    }

    async fn runs(&self, number: usize) {
        let plan = Plan { run_ms: RUN_MS, log: 40_000, files: 2, ..Plan::default() };
        let (body, key) = (Self::job(plan), format!("probe-{number}"));
        let Some(id) = self.client.ask(&body, &key).await else {
            return self.check.fail("I11", "the faults are over and a job is not taken");
        };
        self.client.follow(id).await;
        let end = self.check.end_of(id);
        if end != Some((StateWord::Succeeded, 1)) {
            self.check.fail("P4", format!("nothing was wrong for long and {id} ended as {end:?}"));
        }
        // Also by another process: what a key names is in the books.
        if self.client.submit(&body, &key).await != Some(id) {
            self.check.fail("I1", format!("{key} does not name {id} any more"));
        }
    }

    /// As many jobs as there are slots run at once.
    async fn fills(&self, slots: usize) {
        let plan = Plan { run_ms: 2 * FILL_MS, ..Plan::default() };
        let ask = |number| async move { self.client.ask(&Self::job(plan), &format!("probe-fill-{number}")).await };
        let ids = join_all((0..slots).map(ask)).await;
        let until = self.sim.now() + FILL_MS;
        while !self.check.is_full() {
            if self.sim.now() >= until {
                return self
                    .check
                    .fail("I11", format!("a job for every slot, and for {FILL_MS} ms some slot stays empty"));
            }
            self.sim.sleep(1_000).await;
        }
        join_all(ids.into_iter().flatten().map(|id| self.client.cancel_at_once(id))).await;
    }

    /// The orchestrator dies with its word that a job is canceled.
    async fn cancels(&self) {
        let plan = Plan { run_ms: 600_000, log: 1_000, stubborn: self.sim.roll(2), ..Plan::default() };
        let Some(id) = self.client.ask(&Self::job(plan), "probe-cancel").await else {
            return self.check.fail("I11", "the faults are over and a job is not taken");
        };
        while !self.check.is_alive(id) && self.check.end_of(id).is_none() {
            self.sim.sleep(500).await;
        }
        self.client.cancel_at_once(id).await;
        self.sim.kill(self.centre.unit.node);
        self.sim.sleep(CANCEL_MS).await;
        let (end, alive) = (self.check.end_of(id), self.check.is_alive(id));
        if end != Some((StateWord::Canceled, 1)) || alive {
            self.check.fail("I11", format!("{id} was canceled {CANCEL_MS} ms ago: {end:?}, its command runs: {alive}"));
        }
    }
}
