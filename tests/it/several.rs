//! T: several orchestrators of one farm: whichever is asked, whichever dies.

use std::time::Duration;

use alloy_tests::farm::full;
use alloy_tests::observe::{Api, BEAT, PATIENCE, is_terminal, now, until};
use alloy_tests::several::Several;
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tokio::task::JoinSet;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_is_the_same_whichever_orchestrator_is_asked() -> Result<()> {
    let farm = Several::start(2, 1, 2, 10).await?;
    let id = farm.api_of(0).shell("for n in 1 2 3; do echo $n; sleep 0.3; done; exit 4").await?;
    for number in [0, 1] {
        let api = farm.api_of(number);
        let job = api.end(&id).await;
        assert_eq!(job["exit_code"], 4, "{job}");
        assert_eq!(api.log(&id).await?, b"1\n2\n3\n");
        let kinds: Vec<String> = api.events(&id).await?.iter().map(|event| event["kind"].to_string()).collect();
        assert_eq!(kinds.iter().filter(|kind| *kind == "\"finished\"").count(), 1, "{kinds:?}");
    }
    // Canceled by one that does not have the worker.
    let id = farm.api_of(0).shell("sleep 600").await?;
    for number in [1, 0] {
        let api = farm.api_of(number);
        until("it runs", async || Ok((api.job(&id).await?["state"] == "running").then_some(()))).await;
    }
    let asked = now();
    for number in [0, 1] {
        let answer = farm.api_of(number).post(&format!("/v1/jobs/{id}/cancel"), &json!({})).await;
        ensure!(answer.is_ok() || number == 1, "{answer:?}");
    }
    assert_eq!(farm.api_of(1).end(&id).await["state"], "canceled");
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    Ok(())
}

/// What a job prints, line by line with its number.
fn script(n: usize) -> (String, String) {
    let lines: String = (0..40).map(|line| format!("job {n} line {line}\n")).collect();
    (
        format!(
            "i=0; while [ $i -lt 40 ]; do echo job {n} line $i; i=$((i+1)); [ $((i % 10)) = 0 ] && sleep 0.1; done; true"
        ),
        lines,
    )
}

/// Follows a job's log to its end, coming back to whichever orchestrator answers.
async fn follow(api: Api, id: String) -> Result<Vec<u8>> {
    let mut have: Vec<u8> = Vec::new();
    let end = now() + Duration::from_secs(280);
    loop {
        ensure!(now() < end, "{id} did not end; {} bytes came", have.len());
        let path = format!("/v1/jobs/{id}/log?follow=1&offset={}", have.len());
        let answer = api.request(reqwest::Method::GET, &path).send().await;
        let Ok(mut answer) = answer.and_then(reqwest::Response::error_for_status) else {
            alloy_tests::chaos::pause(Duration::from_millis(100)).await;
            continue;
        };
        let whole = loop {
            match answer.chunk().await {
                Ok(Some(bytes)) => have.extend_from_slice(&bytes),
                Ok(None) => break true,
                Err(_) => break false,
            }
        };
        if whole && api.job(&id).await.is_ok_and(|job| is_terminal(&job)) {
            return Ok(have);
        }
    }
}

/// Submits under a key until somebody answers: it may have been taken the first time.
async fn submit(api: Api, n: usize, command: String) -> String {
    let end = now() + PATIENCE;
    loop {
        let last = match try_submit(&api, n, &command).await {
            Ok(id) => return id,
            Err(error) => error,
        };
        assert!(now() < end, "nobody took job {n}: {last:#}");
        alloy_tests::chaos::pause(BEAT).await;
    }
}

async fn try_submit(api: &Api, n: usize, command: &str) -> Result<String> {
    let body = json!({ "spec": { "shell": command } });
    let request = api.request(reqwest::Method::POST, "/v1/jobs").header("Idempotency-Key", format!("several-{n}"));
    let answer = request.json(&body).timeout(Duration::from_secs(20)).send().await?.error_for_status()?;
    let job: Value = answer.json().await?;
    Ok(job["id"].as_str().context("an id")?.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orchestrators_that_are_killed_one_after_another_lose_nothing() -> Result<()> {
    let (workers, jobs, kills) = if full() { (40, 2_000, 10) } else { (6, 300, 3) };
    let mut farm = Several::start(3, workers, 4, 10).await?;
    let api = farm.api();
    let mut following = JoinSet::new();
    let mut submitting = JoinSet::new();
    let clients = api.clone();
    submitting.spawn(async move {
        let mut ids = Vec::with_capacity(jobs);
        for n in 0..jobs {
            ids.push(submit(clients.clone(), n, script(n).0).await);
        }
        ids
    });
    let mut longest = Duration::ZERO;
    for kill in 0..kills {
        let number = kill % 3;
        farm.kill_orchestrator(number);
        // Some job begins although one of them is gone.
        let asked = now();
        let id = submit(api.clone(), jobs + kill, "true".to_owned()).await;
        until("a new job runs", async || {
            let job = api.job(&id).await?;
            Ok((job["attempt"].as_u64() > Some(0) || is_terminal(&job)).then_some(()))
        })
        .await;
        longest = longest.max(asked.elapsed());
        farm.start_orchestrator(number).await?;
        farm.all_connected().await;
    }
    let ids = submitting.join_next().await.context("somebody submits")??;
    for (n, id) in ids.iter().enumerate() {
        following.spawn(check(farm.api_of(n % 3), n, id.clone()));
    }
    while let Some(done) = following.join_next().await {
        done??;
    }
    eprintln!("{jobs} jobs, {kills} kills, longest wait of a job for its worker {longest:?}");
    Ok(())
}

/// The job has ended once, well, and its log has every byte.
async fn check(api: Api, n: usize, id: String) -> Result<()> {
    let log = follow(api.clone(), id.clone()).await?;
    let job = api.end(&id).await;
    ensure!(job["state"] == "succeeded", "{job}");
    let ends = api.events(&id).await?.iter().filter(|event| event["kind"] == "finished").count();
    ensure!(ends == 1, "{id} has {ends} ends");
    ensure!(job["attempt"] != 1 || log == script(n).1.as_bytes(), "{id}: {}", String::from_utf8_lossy(&log));
    Ok(())
}
