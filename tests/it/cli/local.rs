//! `--local`: a farm for the length of a command, and what it leaves behind, also when it is killed.

use std::fs;

use alloy_tests::farm::{Farm, Setup, output};
use alloy_tests::observe::{PATIENCE, until};
use alloy_tests::process::Daemon;
use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{Alone, text, told};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_local_run_does_not_touch_the_identity_of_a_joined_worker() -> Result<()> {
    let (farm, alone) = (Farm::orchestrator_only(Setup::default()).await?, Alone::new()?);
    let out = output(alone.alloy(&["run", "--local", "-c", "true"])).await?;
    assert_eq!(out.status.code(), Some(0), "{}", told(&out));
    let out = output(alone.alloy(&["worker", "run", "--provider", "host"])).await?;
    assert_eq!(out.status.code(), Some(1), "{}", told(&out));
    assert!(text(&out.stderr).contains("worker join"), "{}", told(&out));

    let invite = farm.api().post("/v1/workers/invites", &serde_json::json!({})).await?;
    let token = invite["token"].as_str().context("an invitation has a token")?;
    let out = output(alone.alloy(&["worker", "join", &farm.url(), token, "--name", "joined"])).await?;
    assert_eq!(out.status.code(), Some(0), "{}", told(&out));
    let identity = alone.data().join("worker/identity.json");
    let joined = fs::read(&identity)?;
    let out = output(alone.alloy(&["run", "--local", "-c", "true"])).await?;
    assert_eq!(out.status.code(), Some(0), "{}", told(&out));
    assert_eq!(fs::read(&identity)?, joined);
    Ok(())
}

/// `alloy run --local -c LINE` in the background; its output of both kinds is its log.
fn background(alone: &Alone, name: &str, line: &str) -> Result<Daemon> {
    Daemon::start(name, alone.alloy(&["run", "--local", "-c", line]), &alone.0.path().join(format!("{name}.log")))
}

async fn says(daemon: &Daemon, times: usize, word: &str) {
    until(&format!("{} says `{word}` {times} times", daemon.name), async || {
        let text = daemon.log_text();
        anyhow::ensure!(text.lines().filter(|line| *line == word).count() >= times, "{text}");
        Ok(Some(()))
    })
    .await;
}

/// Jobs of the books, the oldest first.
async fn jobs(alone: &Alone) -> Result<Vec<Value>> {
    let out = output(alone.alloy(&["list", "--local", "--json"])).await?;
    let list: Value = serde_json::from_slice(&out.stdout).with_context(|| told(&out))?;
    let mut jobs = list["jobs"].as_array().cloned().context("a list")?;
    jobs.reverse();
    Ok(jobs)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_job_of_a_killed_local_run_is_ended_and_does_not_run_again() -> Result<()> {
    let alone = Alone::new()?;
    let mut first = background(&alone, "first", "echo up; echo run >> ../runs; sleep 600")?;
    says(&first, 1, "up").await;
    first.kill();
    let out = output(alone.alloy(&["run", "--local", "-c", "echo next"])).await?;
    assert_eq!((text(&out.stdout).as_str(), out.status.code()), ("next\n", Some(0)), "{}", told(&out));
    let jobs = jobs(&alone).await?;
    assert_eq!((jobs[0]["state"].as_str(), jobs[0]["reason"].as_str()), (Some("canceled"), Some("parent_canceled")));
    assert_eq!(jobs[0]["attempt"], 1, "it was not tried again");
    assert_eq!(fs::read_dir(alone.data().join("farm/leases"))?.count(), 0, "no lease is left");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_guest_of_a_killed_host_opens_the_farm_again_and_follows_its_job_to_the_end() -> Result<()> {
    let alone = Alone::new()?;
    let gate = alone.0.path().join("gate");
    let wait = format!("while [ ! -e {} ]; do sleep 0.05; done", gate.display());
    let mut host = background(&alone, "host", "echo up; sleep 600")?;
    says(&host, 1, "up").await;
    let mut guest = background(&alone, "guest", &format!("echo begun; {wait}; echo done; exit 3"))?;
    says(&guest, 1, "begun").await;
    let third = background(&alone, "third", &format!("echo begun; {wait}"))?;
    // The farm has two slots: this one waits for the host's job to end.
    until("the third job is in the queue", async || Ok(third.log_text().contains("queued").then_some(()))).await;
    host.kill();
    says(&guest, 2, "begun").await;
    says(&third, 1, "begun").await;
    fs::write(&gate, "")?;
    let mut third = third;
    for (daemon, code) in [(&mut guest, 3), (&mut third, 0)] {
        let status = daemon.wait(PATIENCE)?;
        assert_eq!(status.code(), Some(code), "{}", daemon.log_text());
    }
    says(&guest, 1, "done").await;
    let ends: Vec<_> = jobs(&alone).await?.iter().map(|job| job["reason"].as_str().map(str::to_owned)).collect();
    assert_eq!(ends, [Some("parent_canceled".to_owned()), Some("script_failure".to_owned()), None]);
    Ok(())
}
