//! Daemons that die: the job's processes die with them, the job is tried again, and the user is not charged.

use std::time::Duration;

use alloy_tests::farm::{Farm, Provider, Setup, vm_dirs};
use alloy_tests::observe::{Api, until, until_blocking};
use alloy_tests::process::processes_in;
use anyhow::{Context as _, Result};
use reqwest::Method;
use serde_json::{Value, json};

on_every_provider! {
    a_worker_that_dies_for_good_loses_its_job_to_another_one,
    a_worker_that_dies_and_comes_back_gives_its_job_back_at_once,
}

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

async fn a_worker_that_dies_for_good_loses_its_job_to_another_one(provider: Provider) -> Result<()> {
    let mut farm = Farm::start(Setup { workers: 2, slots: 1, time_scale: 20, ..Setup::default() }.on(provider)).await?;
    let api = farm.api();
    let id = api.shell(TWICE).await?;
    api.log_has(&id, "attempt 1").await;
    let first = holder(&api, &id).await?;
    farm.kill_worker(first);
    let commands = || farm.processes(first).into_iter().filter(|found| found.line.starts_with("sleep 600")).count();
    until_blocking("its commands died with it", Duration::from_secs(10), || commands() == 0)?;

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
    let dir = farm.worker_dir(first);
    until_blocking("the dead VM's directory is gone", Duration::from_secs(20), || {
        vm_dirs(&dir).iter().all(|left| !left.join("workspace").join("mark").exists())
    })
}

async fn a_worker_that_dies_and_comes_back_gives_its_job_back_at_once(provider: Provider) -> Result<()> {
    let mut farm = Farm::start(Setup { workers: 1, slots: 1, time_scale: 1, ..Setup::default() }.on(provider)).await?;
    let api = farm.api();
    let id = api.shell(TWICE).await?;
    api.log_has(&id, "attempt 1").await;
    farm.kill_worker(0);
    until_blocking("its commands died with it", Duration::from_secs(10), || farm.processes(0).is_empty())?;
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
    let mut farm = Farm::start(Setup { workers: 1, slots: 1, time_scale: 1, ..Setup::default() }).await?;
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
    let mut farm = Farm::start(Setup { workers: 1, slots: 1, time_scale: 1, ..Setup::default() }).await?;
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

/// Submits under a key. `None`: nobody answered.
async fn submit_once(api: &Api, key: &str, command: &str) -> Option<String> {
    let body = json!({ "spec": { "shell": command } });
    let request = api.request(Method::POST, "/v1/jobs").header("idempotency-key", key).json(&body);
    let answer = request.send().await.ok().filter(|answer| answer.status().is_success())?;
    Some(answer.json::<Value>().await.ok()?["id"].as_str()?.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_submit_is_one_job_that_runs_once_though_the_orchestrator_is_killed_among_them() -> Result<()> {
    let mut farm = Farm::start(Setup { workers: 1, slots: 2, time_scale: 1, ..Setup::default() }).await?;
    let marks = farm.scratch("marks")?.join("ran");
    let (rounds, each) = (3, 8);
    let mut answered = Vec::new();
    for round in 0..rounds {
        let mut under_way = tokio::task::JoinSet::new();
        for n in 0..each {
            let (api, key) = (farm.api(), format!("r{round}n{n}"));
            let command = format!("echo {key} >> {}", marks.display());
            under_way.spawn(async move { (submit_once(&api, &key, &command).await, key) });
        }
        // Some are answered, some are on their way, some never arrive.
        answered.extend(under_way.join_next().await.transpose()?);
        farm.kill_orchestrator();
        while let Some(done) = under_way.join_next().await {
            answered.push(done?);
        }
        farm.start_orchestrator().await?;
    }
    let api = farm.api();
    for (first, key) in &answered {
        let command = format!("echo {key} >> {}", marks.display());
        let again = submit_once(&api, key, &command).await.context("an answer")?;
        assert!(first.as_ref().is_none_or(|first| *first == again), "{key}: {first:?}, then {again}");
        let job = api.end(&again).await;
        assert_eq!((job["state"].as_str(), job["attempt"].as_u64()), (Some("succeeded"), Some(1)), "{key}: {job}");
        let numbers: Vec<_> = api.events(&again).await?.iter().map(|event| event["seq"].as_u64()).collect();
        assert!(numbers.iter().copied().eq((1..=numbers.len() as u64).map(Some)), "{key}: {numbers:?}");
    }
    let mut ran: Vec<String> = std::fs::read_to_string(&marks)?.lines().map(str::to_owned).collect();
    let mut keys: Vec<String> = answered.into_iter().map(|(_, key)| key).collect();
    ran.sort_unstable();
    keys.sort_unstable();
    assert_eq!((ran.len(), ran), (rounds * each, keys), "each ran once");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_longer_than_the_lease_kills_the_command_and_the_user_reads_why() -> Result<()> {
    let mut farm = Farm::start(Setup { workers: 1, slots: 1, time_scale: 20, ..Setup::default() }).await?;
    let api = farm.api();
    let id = api.shell(TWICE).await?;
    let waits = api.shell("echo waited").await?;
    api.log_has(&id, "attempt 1").await;
    let dir = farm.worker_dir(0);
    let alive = || processes_in(&dir).iter().any(|found| found.line.contains("sleep 600"));
    assert!(alive(), "{:?}", processes_in(&dir));
    farm.kill_orchestrator();
    until_blocking("its lease ended and the worker killed it", Duration::from_secs(20), || !alive())?;

    farm.start_orchestrator().await?;
    let api = farm.api();
    let job = api.end(&id).await;
    assert_eq!(job["state"], "succeeded", "{job}");
    assert_eq!((job["attempt"].as_u64(), job["lost"].as_u64()), (Some(2), Some(1)), "{job}");
    let events = api.events(&id).await?;
    let requeue = requeue(&events)?;
    assert_eq!(requeue["reason"], "worker_lost", "{requeue}");
    assert!(requeue["message"].as_str().is_some_and(|text| text.contains("lease")), "{requeue}");
    assert_eq!(api.end(&waits).await["state"], "succeeded", "what waited was not forgotten");
    Ok(())
}
