//! Daemons that die: the job's processes die with them, the job is tried again, and the user is not charged.

use std::time::Duration;

use alloy_tests::farm::{Farm, Setup, vm_dirs};
use alloy_tests::observe::{Api, until, until_blocking};
use alloy_tests::process::processes_in;
use anyhow::{Context as _, Result};
use serde_json::Value;

/// The first attempt stays for ever, the second ends.
const TWICE: &str = "echo attempt $ALLOY_JOB_ATTEMPT; [ $ALLOY_JOB_ATTEMPT = 2 ] || sleep 600; echo done";

/// The number in `mini-N`.
async fn holder(api: &Api, id: &str) -> Result<usize> {
    let job = api.job(id).await?;
    let name = job["worker_name"].as_str().context("a worker has it")?;
    Ok(name.trim_start_matches("mini-").parse()?)
}

fn requeue(events: &[Value]) -> Result<&Value> {
    events.iter().find(|event| event["kind"] == "requeued").context("an event tells that it was tried again")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_dies_for_good_loses_its_job_to_another_one() -> Result<()> {
    let mut farm = Farm::start(Setup { workers: 2, slots: 1, time_scale: 20 }).await?;
    let api = farm.api();
    let id = api.shell(TWICE).await?;
    api.log_has(&id, "attempt 1").await;
    let first = holder(&api, &id).await?;
    farm.kill_worker(first);
    let dir = farm.worker_dir(first);
    until_blocking("its commands died with it", Duration::from_secs(10), || processes_in(&dir).is_empty())?;

    let job = api.end(&id).await;
    assert_eq!(job["state"], "succeeded", "{job}");
    assert_eq!((job["attempt"].as_u64(), job["lost"].as_u64()), (Some(2), Some(1)), "{job}");
    assert_ne!(holder(&api, &id).await?, first, "another worker has it");
    let events = api.events(&id).await?;
    let requeue = requeue(&events)?;
    assert_eq!(requeue["reason"], "worker_lost", "the farm is blamed: {requeue}");
    assert!(String::from_utf8(api.log(&id).await?)?.contains("attempt 2\ndone\n"));
    // Its directory is cleaned when it is started again.
    farm.start_worker(first)?;
    farm.all_connected().await;
    until_blocking("the dead VM's directory is gone", Duration::from_secs(20), || {
        vm_dirs(&dir).iter().all(|left| !left.join("workspace").join("mark").exists())
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_dies_and_comes_back_gives_its_job_back_at_once() -> Result<()> {
    let mut farm = Farm::start(Setup { workers: 1, slots: 1, time_scale: 1 }).await?;
    let api = farm.api();
    let id = api.shell(TWICE).await?;
    api.log_has(&id, "attempt 1").await;
    let dir = farm.worker_dir(0);
    farm.kill_worker(0);
    until_blocking("its commands died with it", Duration::from_secs(10), || processes_in(&dir).is_empty())?;
    farm.start_worker(0)?;
    // The lease would run for a minute: the worker itself says what it lost.
    let job = api.end(&id).await;
    assert_eq!(job["state"], "succeeded", "{job}");
    assert_eq!((job["attempt"].as_u64(), job["lost"].as_u64()), (Some(2), Some(1)), "{job}");
    let events = api.events(&id).await?;
    let requeue = requeue(&events)?;
    assert!(matches!(requeue["reason"].as_str(), Some("worker_lost" | "vm_lost")), "{requeue}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_is_lost_three_times_ends_as_the_farms_fault() -> Result<()> {
    let mut farm = Farm::start(Setup { workers: 1, slots: 1, time_scale: 1 }).await?;
    let api = farm.api();
    let id = api.shell("echo attempt $ALLOY_JOB_ATTEMPT; sleep 600").await?;
    for attempt in 1..=3 {
        until(&format!("attempt {attempt} runs"), async || {
            let job = api.job(&id).await?;
            Ok((job["attempt"] == attempt && job["phase"] == "executing").then_some(()))
        })
        .await;
        farm.kill_worker(0);
        farm.start_worker(0)?;
    }
    let job = api.end(&id).await;
    let told = (job["state"].as_str(), job["blame"].as_str(), job["exit_code"].as_i64());
    assert_eq!(told, (Some("errored"), Some("farm"), Some(125)), "{job}");
    farm.all_connected().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_runs_on_while_the_orchestrator_is_killed_and_started_again() -> Result<()> {
    let mut farm = Farm::start(Setup { workers: 1, slots: 1, time_scale: 1 }).await?;
    let gate = farm.scratch("gate")?.join("open");
    let api = farm.api();
    let waits = api.shell("echo never before the first; exit 0").await;
    let waits = waits?;
    api.end(&waits).await;
    let command = format!("echo before; while [ ! -e {} ]; do sleep 0.05; done; echo after", gate.display());
    let id = api.shell(&command).await?;
    let queued = api.shell("echo queued").await?;
    api.log_has(&id, "before").await;
    farm.kill_orchestrator();
    std::fs::write(&gate, "")?;
    farm.start_orchestrator().await?;
    let api = farm.api();
    let job = api.end(&id).await;
    assert_eq!(job["state"], "succeeded", "{job}");
    assert_eq!((job["attempt"].as_u64(), job["lost"].as_u64()), (Some(1), Some(0)), "nobody was charged: {job}");
    assert_eq!(String::from_utf8(api.log(&id).await?)?, "before\nafter\n");
    assert_eq!(api.end(&queued).await["state"], "succeeded", "what waited was not forgotten");
    assert_eq!(api.job(&waits).await?["state"], "succeeded");
    Ok(())
}
