//! Networks that are gone for a while, one way or both, and answers that never come back. `ALLOY_SEED` repeats which.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use alloy_shared::limits::Limits;
use alloy_tests::chaos::stage::{Plan, Stage, is_what_was_printed};
use alloy_tests::chaos::{Dice, pause};
use alloy_tests::farm::{Provider, Setup, full};
use alloy_tests::history::Seen;
use alloy_tests::observe::{Api, PATIENCE, now, until};
use alloy_tests::proxy::{Kept, Proxy, Then, Way, Which};
use anyhow::{Context as _, Result, ensure};
use futures_util::future::try_join_all;
use reqwest::Method;
use serde_json::{Value, json};

/// What a partition may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Cost {
    Nothing,
    AtMostOneTry,
    OneTry,
}

/// Seconds at full scale.
const PARTITIONS: [(u64, Cost); 8] = [
    (5, Cost::Nothing),
    (10, Cost::Nothing),
    (20, Cost::Nothing),
    (25, Cost::AtMostOneTry),
    (40, Cost::AtMostOneTry),
    (60, Cost::AtMostOneTry),
    (70, Cost::OneTry),
    (300, Cost::OneTry),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Both,
    Up,
    Down,
    /// The farm sees the connection close, the worker hears nothing.
    HalfOpen,
}

const KINDS: [Kind; 4] = [Kind::Both, Kind::Up, Kind::Down, Kind::HalfOpen];

/// Which partitions come: in a full run every length with every kind; in the gate every cost with every kind, and every
/// length, dealt in turn from where the dice say.
fn deal(dice: &mut Dice) -> Vec<(u64, Cost, Kind)> {
    if full() {
        return PARTITIONS.iter().flat_map(|(seconds, cost)| KINDS.map(|kind| (*seconds, *cost, kind))).collect();
    }
    let mut dealt = Vec::new();
    for cost in [Cost::Nothing, Cost::AtMostOneTry, Cost::OneTry] {
        let mut lengths: Vec<_> = PARTITIONS.iter().filter(|(_, of)| *of == cost).collect();
        dice.shuffle(&mut lengths);
        dealt.extend(KINDS.into_iter().zip(lengths.iter().cycle()).map(|(kind, (seconds, _))| (*seconds, cost, kind)));
    }
    dealt
}

#[test]
fn a_gate_run_deals_every_kind_of_partition_at_every_cost_and_every_length() {
    for seed in 0..50 {
        let dealt = deal(&mut Dice::seeded(seed));
        let cells: BTreeSet<_> = dealt.iter().map(|(_, cost, kind)| (*cost, *kind)).collect();
        let lengths: BTreeSet<_> = dealt.iter().map(|(seconds, ..)| *seconds).collect();
        assert_eq!((cells.len(), lengths.len()), (3 * KINDS.len(), PARTITIONS.len()), "{dealt:?}");
    }
}

fn cut_off(link: &Proxy, kind: Kind) {
    match kind {
        Kind::Both => [Way::Up, Way::Down].into_iter().for_each(|way| link.hold(way, Which::All)),
        Kind::Up => link.hold(Way::Up, Which::All),
        Kind::Down => link.hold(Way::Down, Which::All),
        Kind::HalfOpen => {
            link.leave_half_open();
            [Way::Up, Way::Down].into_iter().for_each(|way| link.hold(way, Which::All));
        }
    }
}

/// Of the bytes that were kept, those that a partition of this kind keeps.
fn kept(kind: Kind, all: Kept) -> u64 {
    match kind {
        // A farm that hears nothing may have nothing to answer.
        Kind::Both | Kind::Up => all.up,
        Kind::Down => all.down,
        Kind::HalfOpen => all.swallowed,
    }
}

/// A job on a worker whose network goes away.
struct Case {
    seconds: u64,
    cost: Cost,
    kind: Kind,
    job: String,
    link: usize,
    gate: std::path::PathBuf,
    /// What the network kept from somebody meanwhile.
    kept: u64,
    progress: tokio::sync::watch::Receiver<alloy_tests::chaos::follow::Progress>,
}

impl Case {
    async fn run(&mut self, link: &Proxy, api: &Api, scale: u64) -> Result<()> {
        let well = link.kept();
        cut_off(link, self.kind);
        // The fault itself.
        pause(Duration::from_millis(self.seconds * 1_000 / scale)).await;
        let before = self.progress.borrow().clone();
        self.kept = kept(self.kind, link.kept()) - kept(self.kind, well);
        link.heal();
        match self.cost {
            Cost::Nothing => {
                // The gap in the live output is over, and it goes on.
                let on = self.progress.wait_for(|at| at.attempt == 1 && at.offset > before.offset + 1_024);
                tokio::time::timeout(PATIENCE, on).await??;
            }
            Cost::AtMostOneTry => {}
            Cost::OneTry => {
                until(&format!("{} is tried again", self.job), async || {
                    let view = api.job(&self.job).await?;
                    Ok((view["attempt"] == 2 && view["phase"] == "executing").then_some(()))
                })
                .await;
            }
        }
        std::fs::write(&self.gate, "")?;
        Ok(())
    }

    fn check(&self, view: &Value) -> Result<()> {
        let tries = view["attempt"].as_u64().unwrap_or(0);
        let allowed = match self.cost {
            Cost::Nothing => 1..=1,
            Cost::AtMostOneTry => 1..=2,
            Cost::OneTry => 2..=2,
        };
        let cuts = self.progress.borrow().cuts;
        println!("{} s, {:?}: {tries} attempts, {} bytes kept", self.seconds, self.kind, self.kept);
        ensure!(cuts == 0, "{} s, {:?}: a follower whose own network was well was cut off", self.seconds, self.kind);
        ensure!(allowed.contains(&tries) && view["lost"] == tries - 1, "{} s, {:?}: {view}", self.seconds, self.kind);
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_partition_is_a_gap_in_the_live_output_or_one_clean_retry_and_never_two_vms_undisturbed() -> Result<()> {
    let scale = if full() { 1 } else { 5 };
    let mut dice = Dice::from_environment();
    let dealt = deal(&mut dice);
    // One for each job that is tried again, and some for those that may be.
    let spare = dealt.iter().filter(|(_, cost, _)| *cost == Cost::OneTry).count() + 2;
    let setup = Setup { workers: dealt.len() + spare, slots: 1, time_scale: scale, ..Setup::default() };
    let (workers, grace) = (setup.workers, Duration::from_millis(Limits::default().startup_grace_ms / scale));
    let started = now();
    let mut stage = Stage::new("partitions", setup, Provider::Host, dice).await?;
    let mut cases = Vec::new();
    for number in 0..workers {
        let gate = stage.dir.join(format!("gate-{number}"));
        let flow = format!("trickle:{}", gate.display());
        let steps = ["bytes:2000".to_owned(), flow, "bytes:50".to_owned()];
        let (job, mut progress) = stage.submit(&steps).await?;
        stage.follows(&job, &mut progress, |at| at.offset > 2_000).await?;
        let link = stage.holder(&job).await?;
        let Some((seconds, cost, kind)) = dealt.get(number).copied() else {
            // Its worker takes what is tried again.
            std::fs::write(&gate, "")?;
            stage.settle(&job).await?;
            continue;
        };
        cases.push(Case { seconds, cost, kind, job, link, gate, kept: 0, progress });
    }
    // A young orchestrator calls nobody silent, and would hide that it is impatient.
    pause(grace.saturating_sub(started.elapsed())).await;
    let api = stage.api();
    try_join_all(cases.iter_mut().map(|case| {
        let link = &stage.links[case.link];
        case.run(link, &api, scale)
    }))
    .await?;
    let mut met = BTreeMap::<(Cost, Kind), u64>::new();
    for case in &cases {
        let view = stage.settle(&case.job).await?;
        case.check(&view)?;
        *met.entry((case.cost, case.kind)).or_default() += case.kept;
    }
    ensure!(met.values().all(|kept| *kept > 0), "a partition kept nothing from anybody: {met:?}");
    stage.farm.all_connected().await;
    stage.leave().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_submit_whose_reply_is_lost_is_one_job_however_often_it_is_sent() -> Result<()> {
    let mut stage =
        Stage::new("lost-replies", Setup { slots: 4, ..Setup::default() }, Provider::Host, Dice::from_environment())
            .await?;
    stage.front.delay(Duration::from_millis(20));
    let runs = 5;
    // No more in all than one client tries.
    let requests = stage.front.trap(Way::Up, "POST /v1/jobs HTTP", 3, Then::DropRequest);
    let replies = stage.front.trap(Way::Up, "POST /v1/jobs HTTP", 4, Then::DropReply);
    let mut under_way = Vec::new();
    for _ in 0..runs {
        under_way.push(stage.run(Plan { steps: vec!["bytes:9000".to_owned()], ..Plan::default() })?);
    }
    for mut run in under_way {
        let (job, _) = super::aim::named(&mut stage, &run).await;
        let view = stage.settle(&job).await?;
        let status = run.client.ends().await?;
        ensure!(status.code() == Some(0), "{}", run.client.said());
        is_what_was_printed(&job, 1, 9_000, &run.client.printed())?;
        assert_eq!(view["attempt"], 1, "{view}");
    }
    assert_eq!((requests.borrow().seen, replies.borrow().answered), (3, 4), "lost before they were heard, and after");
    // The same by hand: every answer under a key names one job.
    let front = Api::new(&stage.front.url(), Some(stage.farm.token()));
    let ways = [("before", 2, 0), ("after", 0, 2), ("both", 1, 1)];
    for (key, before, after) in ways {
        let requests = stage.front.trap(Way::Up, "POST /v1/jobs HTTP", before, Then::DropRequest);
        let replies = stage.front.trap(Way::Up, "POST /v1/jobs HTTP", after, Then::DropReply);
        let job = submit_until_answered(&stage, &front, key).await?;
        assert_eq!((requests.borrow().seen, replies.borrow().answered), (before, after), "{key}");
        stage.follow(&job, &["bytes:500".to_owned()]);
        stage.settle(&job).await?;
        println!("{key}: {before} requests lost before they were heard, {after} replies after");
    }
    assert_eq!(stage.listed().await?.len(), runs + ways.len(), "one job for each");
    stage.leave().await
}

async fn submit_until_answered(stage: &Stage, front: &Api, key: &str) -> Result<String> {
    stage.recorder.write(Seen::Submit { key: key.to_owned(), retries: 0 });
    let mut answers = Vec::new();
    // Once more after the first answer: it is the same job again.
    while answers.len() < 2 {
        let program = alloy_tests::farm::bin_dir().join("noise");
        let body = json!({ "spec": { "argv": [program, "tell", "bytes:500"] } });
        let request = front.request(Method::POST, "/v1/jobs").header("idempotency-key", key).json(&body);
        let job = match request.send().await {
            Ok(answer) => {
                let view: Value = answer.error_for_status()?.json().await?;
                Some(view["id"].as_str().context("an id")?.to_owned())
            }
            Err(_) => None,
        };
        stage.recorder.write(Seen::Answer { key: key.to_owned(), job: job.clone() });
        answers.extend(job);
    }
    answers.pop().context("an answer")
}
