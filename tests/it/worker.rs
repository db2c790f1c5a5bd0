//! Workers over real processes: what the farm says of each, joining twice, leaving, being refused.

use alloy_tests::farm::{Farm, Setup, output};
use alloy_tests::observe::{Api, PATIENCE, until};
use alloy_tests::process::Daemon;
use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

async fn worker(api: &Api, name: &str) -> Result<Value> {
    let list = api.get("/v1/workers").await?;
    let workers = list["workers"].as_array().context("a list")?;
    workers.iter().find(|worker| worker["name"] == name).cloned().with_context(|| format!("no {name} in {list}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_worker_is_offline_and_after_a_restart_of_the_farm_nobody_is_lost() -> Result<()> {
    let mut farm = Farm::start(Setup { workers: 2, slots: 1, time_scale: 1, ..Setup::default() }).await?;
    farm.stop_worker(1)?;
    let api = farm.api();
    until("it is offline", async || Ok((worker(&api, "mini-1").await?["state"] == "offline").then_some(()))).await;
    // Not killed: that may overtake the write of the goodbye.
    farm.stop_orchestrator()?;
    farm.start_orchestrator().await?;
    assert_eq!(worker(&farm.api(), "mini-1").await?["state"], "offline");
    let state = worker(&farm.api(), "mini-0").await?["state"].clone();
    assert!(state == "suspect" || state == "ready", "{state}");
    farm.all_connected().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn daemons_whose_terminal_is_gone_work_on_and_end_when_they_are_told_to() -> Result<()> {
    let mut farm = Farm::start(Setup { workers: 1, slots: 1, time_scale: 1, ..Setup::default() }).await?;
    farm.stop_worker(0)?;
    farm.stop_orchestrator()?;
    let mut orchestrator = Daemon::unheard("orchestrator", farm.orchestrator_command(farm.address()))?;
    let mut unheard = Daemon::unheard("worker", farm.worker_command(0)?)?;
    let api = farm.api();
    until("both are there", async || Ok((worker(&api, "mini-0").await?["state"] == "ready").then_some(()))).await;
    let job = api.shell("echo heard").await?;
    assert_eq!(api.end(&job).await["state"], "succeeded");
    assert_eq!(api.log(&job).await?, b"heard\n");
    for daemon in [&mut unheard, &mut orchestrator] {
        daemon.signal(Signal::SIGTERM);
        assert!(daemon.wait(PATIENCE)?.success(), "{}", daemon.name);
    }
    farm.start_orchestrator().await?;
    farm.start_worker(0)?;
    farm.all_connected().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drain_and_resume_answer_with_the_new_state() -> Result<()> {
    let farm = Farm::start(Setup { workers: 1, slots: 1, time_scale: 1, ..Setup::default() }).await?;
    let api = farm.api();
    let id = worker(&api, "mini-0").await?["id"].as_str().context("an id")?.to_owned();
    for _ in 0..3 {
        for (verb, state) in [("drain", "drained"), ("resume", "ready")] {
            let answer = api.post(&format!("/v1/workers/{id}/{verb}"), &json!({})).await?;
            assert_eq!(answer["state"], state, "{verb}: {answer}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_worker_ends_and_what_it_held_is_tried_elsewhere() -> Result<()> {
    let mut farm = Farm::start(Setup { workers: 2, slots: 1, time_scale: 10, ..Setup::default() }).await?;
    let api = farm.api();
    let job = api.shell("if [ $ALLOY_JOB_ATTEMPT = 1 ]; then echo up; sleep 600; fi; echo done").await?;
    api.log_has(&job, "up").await;
    let held = api.job(&job).await?["worker_name"].as_str().context("a worker has it")?.to_owned();
    let out = output(farm.alloy(&["worker", "rm", &held, "--json"])).await?;
    assert!(out.status.success(), "{out:?}");
    let told: Value = serde_json::from_slice(&out.stdout)?;
    assert_eq!((&told["name"], &told["jobs"]), (&json!(held), &json!([job])));
    assert!(worker(&api, &held).await.is_err(), "it is in no list any more");

    let number = if held == "mini-0" { 0 } else { 1 };
    let (status, log) = farm.ended_worker(number)?;
    assert_eq!(status.code(), Some(4), "{log}");
    for word in ["unauthenticated", "removed from the farm", "worker invite", "--force"] {
        assert!(log.contains(word), "no {word} in\n{log}");
    }
    let ended = api.end(&job).await;
    assert_eq!((&ended["state"], &ended["attempt"], &ended["lost"]), (&json!("succeeded"), &json!(2), &json!(1)));
    assert_ne!(ended["worker_name"], held.as_str());

    // Its key opens nothing; by force the same directory becomes another worker.
    farm.start_worker(number)?;
    assert_eq!(farm.ended_worker(number)?.0.code(), Some(4));
    let invite = api.post("/v1/workers/invites", &json!({})).await?;
    let token = invite["token"].as_str().context("a token")?;
    let join = |more: &[&str]| {
        let mut join = farm.command("worker");
        join.arg("join").arg(farm.url()).arg(token).arg("--state-dir").arg(farm.worker_dir(number)).args(more);
        output(join)
    };
    let refused = join(&["--name", "again"]).await?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && said.contains(&held) && said.contains("--force"), "{said}");
    let bad = join(&["--force", "--name", "a\nb"]).await?;
    assert_eq!(bad.status.code(), Some(2), "{bad:?}");
    let done = join(&["--force", "--name", "again"]).await?;
    assert!(done.status.success(), "{done:?}");
    farm.start_worker(number)?;
    farm.all_connected().await;
    assert_eq!(worker(&api, "again").await?["state"], "ready");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_of_a_farm_that_lost_its_data_says_so_and_ends() -> Result<()> {
    let mut farm = Farm::start(Setup { workers: 1, slots: 1, time_scale: 10, ..Setup::default() }).await?;
    farm.kill_orchestrator();
    farm.lose_data().await?;
    farm.start_orchestrator().await?;
    let (status, log) = farm.ended_worker(0)?;
    assert_eq!(status.code(), Some(4), "{log}");
    assert!(log.contains("unauthenticated") && log.contains("worker invite"), "{log}");
    Ok(())
}
