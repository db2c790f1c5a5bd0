//! T: a farm whose database goes away: for a while, without a word, or just when it should have said that it committed.

use std::collections::BTreeSet;
use std::time::Duration;

use alloy_tests::chaos::pause;
use alloy_tests::farm::{Farm, Setup, full};
use alloy_tests::observe::{Api, PATIENCE, now, until};
use alloy_tests::pg::Own;
use alloy_tests::proxy::{Proxy, Then, Way};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tokio::task::JoinSet;

async fn farm_on(url: &str, setup: Setup) -> Result<Farm> {
    let variables = [("DATABASE_MODE", "postgres"), ("DATABASE_URL", url)];
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
    Farm::start(Setup { orchestrator_env: variables.into(), ..setup }).await
}

/// Keeps submitting jobs that take a moment, `count` of them, one after another.
fn load(api: &Api, count: usize) -> JoinSet<Vec<String>> {
    let api = api.clone();
    let mut set = JoinSet::new();
    set.spawn(async move {
        let mut ids = Vec::new();
        for n in 0..count {
            ids.push(api.shell_once(&format!("load-{n}"), &format!("echo job {n}; sleep 0.2; echo end {n}")).await);
        }
        ids
    });
    set
}

/// Every one has ended once, in its first attempt, with its whole log; and there are no others.
async fn all_well(api: &Api, ids: &[String], least: usize) -> Result<()> {
    for (n, id) in ids.iter().enumerate() {
        let job = api.end(id).await;
        assert!((&job["state"], &job["attempt"]) == (&json!("succeeded"), &json!(1)), "{job}");
        let log = String::from_utf8(api.log(id).await?)?;
        ensure!(log == format!("job {n}\nend {n}\n"), "{id}: {log}");
        let ends = api.events(id).await?.iter().filter(|event| event["kind"] == "finished").count();
        ensure!(ends == 1, "{id} has {ends} ends");
    }
    let different: BTreeSet<&String> = ids.iter().collect();
    let mut found = BTreeSet::new();
    let mut cursor = String::new();
    loop {
        let page = api.get(&format!("/v1/jobs?limit=200{cursor}")).await?;
        found.extend(
            page["jobs"].as_array().into_iter().flatten().filter_map(|job| job["id"].as_str().map(str::to_owned)),
        );
        let Some(next) = page["next_cursor"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    let more = found.iter().filter(|id| !different.contains(id)).count();
    ensure!(
        different.len() == ids.len() && ids.len() >= least && more <= 4,
        "{} jobs, {more} that nobody knows",
        ids.len()
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_away_for_a_minute_costs_no_build() -> Result<()> {
    // The farm's own times are as much shorter as the minute is.
    let (scale, away, count) =
        if full() { (1, Duration::from_secs(60), 100) } else { (5, Duration::from_secs(12), 30) };
    let database = Own::start_on(11_601)?;
    let farm = farm_on(&database.url(), Setup { workers: 2, slots: 4, time_scale: scale, ..Setup::default() }).await?;
    let api = farm.api();
    let seconds = away.as_secs() * 2;
    let mut long = Vec::new();
    for n in 0..2 {
        long.push(api.shell(&format!("for n in $(seq {seconds}); do echo {n} $n; sleep 1; done")).await?);
    }
    for id in &long {
        api.log_has(id, " 1\n").await;
    }
    let mut loading = load(&api, count);
    until("the load has begun", async || {
        Ok((api.get("/v1/jobs").await?["jobs"].as_array().map_or(0, Vec::len) > 6).then_some(()))
    })
    .await;
    database.stop()?;
    let back = now() + away;
    let mut refused = 0;
    while now() < back {
        let ready = api.request(reqwest::Method::GET, "/readyz").timeout(PATIENCE).send().await?;
        refused += usize::from(ready.status().as_u16() == 503);
        pause(Duration::from_millis(200)).await;
    }
    ensure!(refused > 0, "it said that it was ready without a database");
    database.start()?;
    let ids = loading.join_next().await.context("somebody submits")??;
    all_well(&api, &ids, count).await?;
    for (n, id) in long.iter().enumerate() {
        let job = api.end(id).await;
        assert!((&job["state"], &job["attempt"]) == (&json!("succeeded"), &json!(1)), "{job}");
        let expect: String = (1..=seconds).map(|second| format!("{n} {second}\n")).collect();
        ensure!(api.log(id).await? == expect.as_bytes(), "{id} lacks bytes");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_killed_again_and_again_loses_nothing() -> Result<()> {
    let (kills, count) = if full() { (10, 400) } else { (3, 60) };
    let database = Own::start_on(11_602)?;
    let farm = farm_on(&database.url(), Setup { workers: 2, slots: 4, ..Setup::default() }).await?;
    let api = farm.api();
    let mut loading = load(&api, count);
    for _ in 0..kills {
        let before = api.get("/v1/jobs?limit=1").await?["jobs"][0]["id"].clone();
        database.kill()?;
        database.start()?;
        until("the farm goes on", async || {
            let newest = api.get("/v1/jobs?limit=1").await?["jobs"][0]["id"].clone();
            Ok((newest != before || loading.is_empty()).then_some(()))
        })
        .await;
    }
    let ids = loading.join_next().await.context("somebody submits")??;
    all_well(&api, &ids, count).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_whose_answer_is_lost_makes_one_job_of_a_key() -> Result<()> {
    let times = if full() { 100 } else { 15 };
    let database = Own::start_on(11_603)?;
    let proxy = Proxy::open(database.address).await?;
    let setup = Setup { workers: 1, slots: 4, ..Setup::default() };
    let farm = farm_on(&database.url_at(proxy.address), setup).await?;
    let api = farm.api();
    let mut ids = Vec::new();
    for n in 0..times {
        // Only a commit that inserts a job carries this word. It is one statement, so that its answer is the commit's; sent
        // again it passes.
        let lost = proxy.trap(Way::Up, "submitted", 1, Then::DropReply);
        ids.push(api.shell_once(&format!("load-{n}"), &format!("echo job {n}; sleep 0.2; echo end {n}")).await);
        ensure!(lost.borrow().seen == 1, "the commit of {n} has its answer");
    }
    all_well(&api, &ids, times).await
}
