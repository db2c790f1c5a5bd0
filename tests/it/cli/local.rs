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
    assert_eq!(out.status.code(), Some(2), "{}", told(&out));
    let said = text(&out.stderr);
    assert!(said.contains("worker join URL TOKEN") && said.contains("alloy worker invite"), "{}", told(&out));

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

/// `alloy up` on a port of its own, ready for commands of the same home.
async fn up(alone: &Alone, name: &str, slots: &str) -> Result<Daemon> {
    let mut command = alone.alloy(&["up", "--listen", "127.0.0.1:0"]);
    command.env("VM_POOL_SIZE", slots);
    let up = Daemon::start(name, command, &alone.0.path().join(format!("{name}.log")))?;
    until("alloy up is ready", async || Ok(up.log_text().contains("Ready in").then_some(()))).await;
    Ok(up)
}

fn gate(alone: &Alone) -> (std::path::PathBuf, String) {
    let gate = alone.0.path().join("gate");
    let wait = format!("while [ ! -e {} ]; do sleep 0.05; done", gate.display());
    (gate, wait)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_is_told_twice_cancels_the_jobs_of_others_and_nothing_starts_by_surprise_later() -> Result<()> {
    let alone = Alone::new()?;
    let (open, wait) = gate(&alone);
    let runs = alone.0.path().join("runs");
    let mut host = background(&alone, "host", &format!("echo up; {wait}"))?;
    says(&host, 1, "up").await;
    let mut guest = background(&alone, "guest", &format!("echo run >> {}; echo begun; sleep 600", runs.display()))?;
    says(&guest, 1, "begun").await;
    fs::write(&open, "")?;
    until("the host waits", async || Ok(host.log_text().contains("still in the farm").then_some(()))).await;
    host.signal(nix::sys::signal::Signal::SIGINT);
    let whose = format!("of process {}", guest.pid());
    until("the host says whose", async || Ok(host.log_text().contains(&whose).then_some(()))).await;
    assert!(host.log_text().contains("`echo run") && host.has_ended().is_none(), "{}", host.log_text());
    host.signal(nix::sys::signal::Signal::SIGINT);
    assert_eq!(host.wait(PATIENCE)?.code(), Some(0), "its own job succeeded: {}", host.log_text());
    assert_eq!(guest.wait(PATIENCE)?.code(), Some(130), "{}", guest.log_text());
    let out = output(alone.alloy(&["run", "--local", "-c", "echo next"])).await?;
    assert_eq!((text(&out.stdout).as_str(), out.status.code()), ("next\n", Some(0)), "{}", told(&out));
    assert_eq!(jobs(&alone).await?[1]["reason"], "user_canceled");
    assert_eq!(fs::read_to_string(&runs)?, "run\n");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_local_run_leaves_the_jobs_of_a_killed_alloy_up_for_the_next_one() -> Result<()> {
    let alone = Alone::new()?;
    let (open, wait) = gate(&alone);
    let runs = alone.0.path().join("runs");
    let mut first = up(&alone, "first", "1").await?;
    for name in ["one", "two"] {
        let line = format!("echo {name} >> {}; {wait}", runs.display());
        let out = output(alone.alloy(&["run", "--detach", "-c", &line])).await?;
        assert_eq!(out.status.code(), Some(0), "{}", told(&out));
    }
    until("the first one runs", async || Ok(runs.exists().then_some(()))).await;
    first.kill();
    let out = output(alone.alloy(&["run", "--local", "-c", "echo mine"])).await?;
    assert_eq!((text(&out.stdout).as_str(), out.status.code()), ("mine\n", Some(0)), "{}", told(&out));
    assert!(text(&out.stderr).contains("2 jobs that nobody waits for stay"), "{}", told(&out));
    let states: Vec<_> = jobs(&alone).await?.iter().map(|job| job["state"].clone()).collect();
    assert_eq!(states, ["queued", "queued", "succeeded"]);
    assert_eq!(fs::read_to_string(&runs)?, "one\n", "neither was started");
    fs::write(&open, "")?;
    let mut second = up(&alone, "second", "1").await?;
    until("both have run", async || {
        Ok(jobs(&alone).await?.iter().all(|job| job["state"] == "succeeded").then_some(()))
    })
    .await;
    second.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(second.wait(PATIENCE)?.success(), "{}", second.log_text());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn alloy_up_lets_end_what_runs_and_leaves_the_queue_to_the_next_farm() -> Result<()> {
    let alone = Alone::new()?;
    let (open, wait) = gate(&alone);
    let mut up = up(&alone, "up", "1").await?;
    let mut running = background(&alone, "running", &format!("echo begun; {wait}; echo done"))?;
    says(&running, 1, "begun").await;
    let mut waiting = background(&alone, "waiting", "echo at last")?;
    until("the second job is in the queue", async || Ok(waiting.log_text().contains("queued").then_some(()))).await;
    up.signal(nix::sys::signal::Signal::SIGINT);
    until("it says what it waits for", async || {
        Ok(up.log_text().contains("1 job that runs here ends first").then_some(()))
    })
    .await;
    assert!(up.log_text().contains("1 job in the queue for the next start"), "{}", up.log_text());
    assert!(up.has_ended().is_none() && !waiting.log_text().contains("at last"), "{}", up.log_text());
    fs::write(&open, "")?;
    assert!(up.wait(PATIENCE)?.success(), "{}", up.log_text());
    for daemon in [&mut running, &mut waiting] {
        assert_eq!(daemon.wait(PATIENCE)?.code(), Some(0), "{}", daemon.log_text());
    }
    says(&running, 1, "done").await;
    says(&waiting, 1, "at last").await;
    assert_eq!(running.log_text().matches("begun\n").count(), 1, "it ran once: {}", running.log_text());
    assert_eq!(jobs(&alone).await?[0]["attempt"], 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_second_signal_ends_alloy_up_at_once() -> Result<()> {
    let alone = Alone::new()?;
    let mut up = up(&alone, "up", "1").await?;
    let out = output(alone.alloy(&["run", "--detach", "-c", "sleep 600"])).await?;
    assert_eq!(out.status.code(), Some(0), "{}", told(&out));
    until("it runs", async || Ok((jobs(&alone).await?[0]["phase"] == "executing").then_some(()))).await;
    up.signal(nix::sys::signal::Signal::SIGINT);
    until("it waits", async || Ok(up.log_text().contains("that runs here ends first").then_some(()))).await;
    up.signal(nix::sys::signal::Signal::SIGINT);
    assert!(up.wait(PATIENCE)?.success(), "{}", up.log_text());
    let job = &jobs(&alone).await?[0];
    assert_eq!(job["state"], "queued", "it starts over with the next farm: {job}");
    Ok(())
}
