//! An orchestrator that is killed or stopped and started again, many times under many jobs: whoever follows reads on, on this
//! machine and on another one.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use alloy_tests::chaos::follow::raw;
use alloy_tests::chaos::stage::{Client, Plan, Stage, is_what_was_printed};
use alloy_tests::chaos::{Dice, pause};
use alloy_tests::farm::{Provider, Setup, bin_dir, full, isolated};
use alloy_tests::observe::until;
use alloy_tests::proxy::{Way, Which};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::aim::named;

const JOBS: usize = 20;
const RUNS: usize = 3;

/// A user's machine that knows the farm by its context only.
struct Elsewhere(tempfile::TempDir);

impl Elsewhere {
    fn new(stage: &Stage) -> Result<Elsewhere> {
        let elsewhere = Elsewhere(tempfile::Builder::new().prefix("alloy-elsewhere-").tempdir()?);
        std::fs::create_dir(elsewhere.0.path().join("home"))?;
        let mut login = elsewhere.alloy(&["login", &stage.front.url(), "--with-token"]);
        let mut login = login.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        login.stdin.take().context("a pipe")?.write_all(stage.farm.token().as_bytes())?;
        let out = login.wait_with_output()?;
        ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        Ok(elsewhere)
    }

    fn alloy(&self, args: &[&str]) -> Command {
        let mut command = isolated(&bin_dir().join("alloy"), self.0.path());
        command.args(args);
        command
    }

    /// Returns when it follows.
    async fn attach(&self, job: &str, name: &str) -> Result<Client> {
        let client = Client::start(self.alloy(&["attach", job]), &self.dir().join(name))?;
        until("it follows elsewhere", async || Ok((client.printed().len() > 3_000).then_some(()))).await;
        Ok(client)
    }

    fn dir(&self) -> &Path {
        self.0.path()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_orchestrator_that_restarts_again_and_again_costs_no_attempt_and_no_follower_a_byte() -> Result<()> {
    let restarts = if full() { 50 } else { 8 };
    let setup = Setup { workers: 4, slots: 5, time_scale: 1, ..Setup::default() };
    let mut stage = Stage::new("restarts", setup, Provider::Host, Dice::from_environment()).await?;
    let gate = stage.dir.join("all");
    let steps = ["bytes:3000".to_owned(), format!("trickle:{}", gate.display()), "bytes:70".to_owned()];
    let (mut jobs, mut runs) = (Vec::new(), Vec::new());
    for number in 0..JOBS {
        if number < RUNS {
            let run = stage.run(Plan { steps: steps.to_vec(), ..Plan::default() })?;
            jobs.push(named(&mut stage, &run).await);
            runs.push(run);
        } else {
            jobs.push(stage.submit(&steps).await?);
        }
    }
    for (job, progress) in &mut jobs {
        stage.follows(job, progress, |at| at.offset > 3_000).await?;
    }
    let raws: Vec<_> =
        jobs[..4].iter().map(|(job, _)| raw(stage.api(), job, 1, "raw", stage.recorder.clone())).collect();
    let elsewhere = Elsewhere::new(&stage)?;
    let mut attached = vec![elsewhere.attach(&jobs[0].0, "early").await?];
    for round in 0..restarts {
        if round % 4 == 3 {
            stage.farm.stop_orchestrator()?;
        } else {
            stage.farm.kill_orchestrator();
        }
        let before: Vec<u64> = jobs.iter().map(|(_, progress)| progress.borrow().offset).collect();
        stage.farm.start_orchestrator().await?;
        stage.all_online().await;
        for ((job, progress), before) in jobs.iter_mut().zip(before) {
            let on = stage.follows(job, progress, |at| at.offset > before + 600).await;
            on.with_context(|| format!("round {round}: {job} does not go on"))?;
        }
        if round == restarts / 2 {
            attached.push(elsewhere.attach(&jobs[0].0, "late").await?);
        }
    }
    std::fs::write(&gate, "")?;
    let mut lens = Vec::new();
    for (job, progress) in &jobs {
        let view = stage.settle(job).await?;
        ensure!((&view["attempt"], &view["lost"]) == (&json!(1), &json!(0)), "an attempt was lost: {view}");
        let cuts = progress.borrow().cuts;
        ensure!(cuts == restarts as u64, "a follower was cut off {cuts} times by {restarts} restarts");
        lens.push(stage.printed(job, 1)?);
    }
    for (raw, len) in raws.into_iter().zip(&lens) {
        ensure!(raw.await?? == *len, "the raw log has {len} bytes");
    }
    for (number, client) in runs.iter_mut().map(|run| &mut run.client).enumerate() {
        same_to_the_end(client, &jobs[number].0, lens[number], restarts).await?;
    }
    for client in &mut attached {
        same_to_the_end(client, &jobs[0].0, lens[0], restarts).await?;
    }
    println!("{restarts} restarts under {JOBS} jobs, {} bytes each at least", lens.iter().min().unwrap_or(&0));
    stage.leave().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_orchestrator_that_is_back_before_its_workers_waits_for_them() -> Result<()> {
    // A lease ends after 20 s then, and who is silent is looked for every 2.5 s.
    let setup = Setup { workers: 2, slots: 1, time_scale: 2, ..Setup::default() };
    let mut stage = Stage::new("back-first", setup, Provider::Host, Dice::from_environment()).await?;
    let gate = stage.dir.join("gate");
    let steps = ["bytes:3000".to_owned(), format!("trickle:{}", gate.display()), "bytes:70".to_owned()];
    let (job, mut progress) = stage.submit(&steps).await?;
    stage.follows(&job, &mut progress, |at| at.offset > 3_000).await?;
    let link = stage.holder(&job).await?;
    [Way::Up, Way::Down].into_iter().for_each(|way| stage.links[link].hold(way, Which::All));
    stage.farm.kill_orchestrator();
    stage.farm.start_orchestrator().await?;
    // The fault itself: some looks at who is silent, and less than a lease.
    pause(Duration::from_secs(6)).await;
    let before = progress.borrow().offset;
    stage.links[link].break_all();
    stage.links[link].heal();
    stage.follows(&job, &mut progress, |at| at.offset > before + 600).await?;
    std::fs::write(&gate, "")?;
    let view = stage.settle(&job).await?;
    ensure!((&view["attempt"], &view["lost"]) == (&json!(1), &json!(0)), "it was given up too early: {view}");
    stage.farm.all_connected().await;
    stage.leave().await
}

/// It printed every byte once, and said of each outage in one line that it began and in one that it was over.
async fn same_to_the_end(client: &mut Client, job: &str, len: u64, restarts: usize) -> Result<()> {
    let status = client.ends().await?;
    let said = client.said();
    ensure!(status.code() == Some(0), "{status}: {said}");
    is_what_was_printed(job, 1, len, &client.printed())?;
    let lines = |word: &str| said.lines().filter(|line| line.contains(word)).count();
    let (lost, back) = (lines("reconnecting"), lines("reconnected"));
    ensure!(lost == back && (1..=restarts).contains(&lost), "{lost} and {back} lines for {restarts} restarts: {said}");
    Ok(())
}
