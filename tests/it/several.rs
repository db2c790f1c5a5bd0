//! T: several orchestrators of one farm: whichever is asked, whichever dies.

use std::fs;
use std::time::Duration;

use alloy_tests::chaos::pause;
use alloy_tests::farm::{Farm, Setup, full, output};
use alloy_tests::observe::{Api, PATIENCE, is_terminal, now, until};
use alloy_tests::pg;
use alloy_tests::process::Daemon;
use alloy_tests::s3::S3;
use alloy_tests::several::Several;
use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_goes_on_although_its_orchestrator_died_before_the_others_heard_of_it() -> Result<()> {
    // At their own pace: what one of them gives to its own worker the other one reads within two seconds.
    let mut farm = Several::start(2, 1, 4, 1).await?;
    let mut owner = usize::from(!farm.said(0).contains(" connected"));
    for round in 0..4 {
        let (has_it, other) = (farm.api_of(owner), farm.api_of(1 - owner));
        let gate = farm.dir().join(format!("gate-{round}"));
        let wait = format!("while [ ! -e {} ]; do sleep 0.05; done; echo on", gate.display());
        let goes_on = has_it.shell(&wait).await?;
        let canceled = has_it.shell("sleep 600").await?;
        for id in [&goes_on, &canceled] {
            until("it runs", async || Ok((has_it.job(id).await?["state"] == "running").then_some(()))).await;
        }
        farm.kill_orchestrator(owner);
        fs::write(&gate, "")?;
        other.post(&format!("/v1/jobs/{canceled}/cancel"), &json!({})).await?;
        for (id, state) in [(&goes_on, "succeeded"), (&canceled, "canceled")] {
            let job = other.end(id).await;
            ensure!(job["state"] == state && job["attempt"] == 1, "{job}");
        }
        farm.start_orchestrator(owner).await?;
        farm.all_connected().await;
        owner = 1 - owner;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_result_is_taken_by_an_orchestrator_that_did_not_hear_of_the_reports_before_it() -> Result<()> {
    let mut farm = Several::start(2, 1, 1, 1).await?;
    let mut owner = usize::from(!farm.said(0).contains(" connected"));
    let mut in_the_middle = 0;
    for _ in 0..2 {
        let (has_it, other) = (farm.api_of(owner), farm.api_of(1 - owner));
        let shell = "mkdir build; for n in $(seq 400); do echo $n >build/$n; done; sleep 2";
        let id = has_it.submit(json!({ "shell": shell, "artifacts": ["build/*"] })).await?;
        until("it has told of an artifact", async || {
            let list = has_it.get(&format!("/v1/jobs/{id}/artifacts")).await?;
            Ok(list["artifacts"].as_array().is_some_and(|list| !list.is_empty()).then_some(()))
        })
        .await;
        farm.kill_orchestrator(owner);
        in_the_middle += u32::from(!is_terminal(&other.job(&id).await?));
        let job = other.end(&id).await;
        ensure!(job["state"] == "succeeded" && job["attempt"] == 1, "{job}");
        farm.start_orchestrator(owner).await?;
        farm.all_connected().await;
        owner = 1 - owner;
    }
    ensure!(in_the_middle > 0, "every job had ended before its orchestrator died");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn alloy_up_on_a_second_machine_says_whose_token_it_lacks_and_goes_on_with_it() -> Result<()> {
    let (s3, database) = (S3::start().await?, pg::empty_database().await);
    let mut variables = s3.env("farm");
    let postgres = [("DATABASE_MODE", "postgres"), ("DATABASE_URL", database.as_str())];
    variables.extend(postgres.map(|(name, value)| (name.to_owned(), value.to_owned())));
    let first = Farm::orchestrator_only(Setup { orchestrator_env: variables.clone(), ..Setup::default() }).await?;
    let data = first.scratch("second")?;
    let up = || {
        let mut command = first.alloy(&["up", "--listen", "127.0.0.1:0"]);
        command.envs(variables.clone()).env("ALLOY_DATA_DIR", &data);
        command
    };
    let out = output(up()).await?;
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    ensure!(out.status.code() == Some(4), "{:?}: {said}", out.status);
    let token = data.join("farm/admin.token");
    for word in [&token.display().to_string()[..], "hint: copy farm/admin.token", "alloy token create"] {
        ensure!(said.contains(word), "no `{word}` in: {said}");
    }
    fs::copy(first.farm_dir().join("admin.token"), token)?;
    let mut second = Daemon::start("up", up(), &first.dir().join("logs/up.log"))?;
    until("it is ready", async || {
        let text = second.log_text();
        ensure!(second.has_ended().is_none(), "{text}");
        Ok(text.contains("Ready in").then_some(()))
    })
    .await;
    let id = first.api().shell("echo there").await?;
    ensure!(first.api().end(&id).await["state"] == "succeeded");
    second.signal(Signal::SIGTERM);
    let status = second.wait(PATIENCE)?;
    ensure!(status.success(), "{status}: {}", second.log_text());
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

/// Follows the log of a job's last attempt to its end, at the next orchestrator whenever one does not go on.
async fn follow(apis: &[Api], first: usize, id: &str) -> Result<Vec<u8>> {
    let (mut attempt, mut have) = (1, Vec::new());
    let end = now() + Duration::from_secs(280);
    for api in apis.iter().cycle().skip(first % apis.len()) {
        ensure!(now() < end, "{id} did not end; {} bytes came", have.len());
        let path = format!("/v1/jobs/{id}/log?follow=1&attempt={attempt}&offset={}", have.len());
        let answer = api.request(reqwest::Method::GET, &path).send().await;
        let Ok(mut answer) = answer.and_then(reqwest::Response::error_for_status) else {
            pause(Duration::from_millis(100)).await;
            continue;
        };
        let whole = loop {
            match answer.chunk().await {
                Ok(Some(bytes)) => have.extend_from_slice(&bytes),
                Ok(None) => break true,
                Err(_) => break false,
            }
        };
        let Some(job) = api.job(id).await.ok().filter(|_| whole) else { continue };
        if job["attempt"] != attempt {
            (attempt, have) = (job["attempt"].as_u64().context("an attempt")?, Vec::new());
        } else if is_terminal(&job) {
            break;
        }
    }
    Ok(have)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orchestrators_that_are_killed_one_after_another_lose_nothing() -> Result<()> {
    // The farm's own times, too, are shorter in the gate.
    let (workers, jobs, kills, scale) = if full() { (40, 2_000, 10, 1) } else { (6, 300, 3, 10) };
    let between = Duration::from_secs(10) / u32::try_from(scale)?;
    let mut farm = Several::start(3, workers, 4, scale).await?;
    let api = farm.api();
    let all: [Api; 3] = [0, 1, 2].map(|number| farm.api_of(number));
    let mut submitting = JoinSet::new();
    let clients = api.clone();
    let gap = between * kills / u32::try_from(jobs)?;
    submitting.spawn(async move {
        let mut following = JoinSet::new();
        for n in 0..jobs {
            let id = clients.shell_once(&format!("several-{n}"), &script(n).0).await;
            following.spawn(check(all.clone(), n, id));
            pause(gap).await;
        }
        following.join_all().await.into_iter().sum::<Result<u64>>()
    });
    let (mut stalled, mut away) = (Duration::ZERO, Duration::ZERO);
    for kill in 0..kills {
        let number = kill as usize % 3;
        farm.kill_orchestrator(number);
        let killed = now();
        // Some job begins although one of them is gone.
        let id = api.shell_once(&format!("after-{kill}"), "true").await;
        until("a new job runs", async || {
            let job = api.job(&id).await?;
            Ok((job["attempt"].as_u64() > Some(0) || is_terminal(&job)).then_some(()))
        })
        .await;
        stalled = stalled.max(killed.elapsed());
        farm.all_connected().await;
        away = away.max(killed.elapsed());
        farm.start_orchestrator(number).await?;
        pause(between.saturating_sub(killed.elapsed())).await;
    }
    let again = submitting.join_next().await.context("somebody submits")???;
    eprintln!(
        "{jobs} jobs, {again} further tries, {kills} kills: a job waited for {stalled:?} at most, workers were back in {away:?}"
    );
    if full() {
        ensure!(stalled <= Duration::from_secs(10) && away <= Duration::from_secs(20), "{stalled:?}, {away:?}");
    }
    Ok(())
}

/// The job ends once, well, and a follower from its beginning on gets every byte of its log. Returns how often it was tried
/// again: where deadlines are a tenth of what they are, a machine with much to do may miss one.
async fn check(apis: [Api; 3], n: usize, id: String) -> Result<u64> {
    let log = follow(&apis, n, &id).await?;
    let job = apis[n % 3].end(&id).await;
    ensure!(job["state"] == "succeeded", "{job}");
    let ends = events(&apis[n % 3], &id).await?.iter().filter(|event| event["kind"] == "finished").count();
    ensure!(ends == 1, "{id} has {ends} ends");
    ensure!(log == script(n).1.as_bytes(), "{id}: {}", String::from_utf8_lossy(&log));
    Ok(job["attempt"].as_u64().context("an attempt")? - 1)
}

/// Whoever is asked may be killed in the middle of the answer.
async fn events(api: &Api, id: &str) -> Result<Vec<Value>> {
    let end = now() + PATIENCE;
    loop {
        match api.events(id).await {
            Err(_) if now() < end => pause(Duration::from_millis(100)).await,
            events => return events,
        }
    }
}
