//! Networks that are gone for a while, one way or both, and answers that never come back. `ALLOY_SEED` repeats which.

use std::time::Duration;

use alloy_tests::chaos::stage::{Plan, Stage, is_what_was_printed};
use alloy_tests::chaos::{Dice, pause};
use alloy_tests::farm::{Provider, Setup, full};
use alloy_tests::history::Seen;
use alloy_tests::observe::{Api, PATIENCE, until};
use alloy_tests::proxy::{Proxy, Then, Way, Which};
use anyhow::{Context as _, Result, ensure};
use futures_util::future::try_join_all;
use reqwest::Method;
use serde_json::{Value, json};

/// What a partition may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

#[derive(Debug, Clone, Copy)]
enum Kind {
    Both,
    Up,
    Down,
    /// The farm sees the connection close, the worker hears nothing.
    HalfOpen,
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

/// A job on a worker whose network goes away.
struct Case {
    seconds: u64,
    cost: Cost,
    kind: Kind,
    job: String,
    link: usize,
    gate: std::path::PathBuf,
    progress: tokio::sync::watch::Receiver<alloy_tests::chaos::follow::Progress>,
}

impl Case {
    async fn run(&mut self, link: &Proxy, api: &Api, scale: u64) -> Result<()> {
        cut_off(link, self.kind);
        // The fault itself.
        pause(Duration::from_millis(self.seconds * 1_000 / scale)).await;
        let before = self.progress.borrow().clone();
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
        println!("{} s, {:?}: {tries} attempts", self.seconds, self.kind);
        ensure!(allowed.contains(&tries) && view["lost"] == tries - 1, "{} s, {:?}: {view}", self.seconds, self.kind);
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_partition_is_a_gap_in_the_live_output_or_one_clean_retry_and_never_two_vms() -> Result<()> {
    let scale = if full() { 1 } else { 5 };
    let workers = PARTITIONS.len() + 2;
    let setup = Setup { workers, slots: 1, time_scale: scale, ..Setup::default() };
    let mut stage = Stage::new("partitions", setup, Provider::Host, Dice::from_environment()).await?;
    let mut cases = Vec::new();
    for number in 0..workers {
        let gate = stage.dir.join(format!("gate-{number}"));
        let flow = format!("trickle:{}", gate.display());
        let job = stage.submit(&["bytes:2000".to_owned(), flow, "bytes:50".to_owned()]).await?;
        let mut progress = stage.follow(&job);
        tokio::time::timeout(PATIENCE, progress.wait_for(|at| at.offset > 2_000)).await??;
        let link = stage.holder(&job).await?;
        let Some((seconds, cost)) = PARTITIONS.get(number).copied() else {
            // Its worker takes what is tried again.
            std::fs::write(&gate, "")?;
            stage.settle(&job).await?;
            continue;
        };
        let kinds = [Kind::Both, Kind::Up, Kind::Down, Kind::HalfOpen];
        let kind = kinds[stage.dice.roll(kinds.len() as u64) as usize];
        cases.push(Case { seconds, cost, kind, job, link, gate, progress });
    }
    let api = stage.api();
    try_join_all(cases.iter_mut().map(|case| {
        let link = &stage.links[case.link];
        case.run(link, &api, scale)
    }))
    .await?;
    for case in &cases {
        let view = stage.settle(&case.job).await?;
        case.check(&view)?;
    }
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
    let clients = stage.front.trap(Way::Up, "POST /v1/jobs HTTP", runs + 2, Then::DropReply);
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
    assert_eq!(clients.borrow().answered, runs + 2, "replies were lost");
    // The same by hand: every answer under a key names one job.
    let front = Api::new(&stage.front.url(), Some(stage.farm.token()));
    for key in ["one", "two", "three"] {
        let lost = stage.front.trap(Way::Up, "POST /v1/jobs HTTP", 2, Then::DropReply);
        let job = submit_until_answered(&stage, &front, key).await?;
        assert_eq!(lost.borrow().answered, 2);
        stage.follow(&job);
        stage.settle(&job).await?;
    }
    assert_eq!(stage.listed().await?.len() as u64, runs + 3, "one job for each");
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
