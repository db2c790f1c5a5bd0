//! Daemons that stand still: shorter than a lease nobody notices; longer, a worker's command dies without it, and whoever
//! wakes up asks the clock before anything else. At 1:20 a lease ends after 2 s and a worker is given up after 3 s.

use std::time::Duration;

use alloy_tests::chaos::Dice;
use alloy_tests::chaos::pause;
use alloy_tests::chaos::stage::Stage;
use alloy_tests::chaos::watch::running;
use alloy_tests::farm::{Farm, Provider, Setup};
use alloy_tests::observe::{PATIENCE, until, until_blocking};
use alloy_tests::process::Daemon;
use alloy_tests::proxy::{Proxy, Then, Way};
use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use serde_json::json;

on_every_provider! {
    the_command_of_a_worker_that_stands_still_too_long_dies_without_it_and_runs_once_elsewhere,
}

async fn stage(name: &str, workers: usize, provider: Provider) -> Result<Stage> {
    let setup = Setup { workers, slots: 1, time_scale: 20, ..Setup::default() }.on(provider);
    Stage::new(name, setup, provider, Dice::from_environment()).await
}

fn steps(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// A daemon as the system shows it.
fn state(daemon: &Daemon) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

fn freeze(daemon: &Daemon) -> Result<()> {
    daemon.signal(Signal::SIGSTOP);
    until_blocking("it stands still", PATIENCE, || matches!(state(daemon), None | Some('T')))
}

fn lives(job: &str, attempt: u32) -> bool {
    running(1).iter().any(|vm| vm.job == job && vm.attempt == attempt)
}

/// The reason and message of the only requeue.
async fn requeued(farm: &Farm, job: &str) -> Result<(String, String)> {
    let events = farm.api().events(job).await?;
    let event = events.iter().find(|event| event["kind"] == "requeued").context("it was tried again")?;
    let word = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
    Ok((word("reason"), word("message")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nobody_notices_daemons_that_stand_still_for_less_than_a_lease() -> Result<()> {
    let mut stage = stage("short-freeze", 1, Provider::Host).await?;
    let gate = stage.dir.join("gate");
    let trickle = format!("trickle:{}", gate.display());
    let (job, mut progress) = stage.submit(&steps(&["bytes:3000", &trickle, "bytes:50"])).await?;
    stage.follows(&job, &mut progress, |at| at.offset > 3_000).await?;
    for round in 0..4 {
        let daemon = if round % 2 == 0 { stage.farm.worker(0) } else { stage.farm.orchestrator() };
        freeze(daemon)?;
        // The fault itself: about half of what a lease lasts.
        pause(Duration::from_millis(900)).await;
        daemon.signal(Signal::SIGCONT);
        let at = progress.borrow().offset;
        stage.follows(&job, &mut progress, |now| now.offset > at + 512).await?;
    }
    std::fs::write(&gate, "")?;
    let view = stage.settle(&job).await?;
    assert_eq!((&view["attempt"], &view["lost"]), (&json!(1), &json!(0)), "{view}");
    assert_eq!(progress.borrow().cuts, 0, "no follower was cut off");
    stage.leave().await
}

async fn the_command_of_a_worker_that_stands_still_too_long_dies_without_it_and_runs_once_elsewhere(
    provider: Provider,
) -> Result<()> {
    let setup = Setup { workers: 2, slots: 1, time_scale: 10, ..Setup::default() }.on(provider);
    let mut stage = Stage::new("long-freeze", setup, provider, Dice::from_environment()).await?;
    if provider == Provider::Host {
        // Nothing is heard after the assignment: the lease of that moment is the command's only one.
        stage.links.iter().for_each(|link| drop(link.trap(Way::Down, "\"assign\"", 1, Then::HoldBody(usize::MAX))));
    }
    let run = stage.run(alloy_tests::chaos::stage::Plan {
        steps: steps(&["bytes:3000", "stay:1", "bytes:50"]),
        ..Default::default()
    })?;
    let (job, mut progress) = super::aim::named(&mut stage, &run).await;
    stage.follows(&job, &mut progress, |at| at.has(3_000)).await?;
    let first = stage.holder(&job).await?;
    stage.links[1 - first].heal();
    freeze(stage.farm.worker(first))?;
    assert!(!cfg!(target_os = "linux") || lives(&job, 1), "it runs: {:?}", running(1));
    // The daemon cannot do it: its guard does, at the end of the lease.
    until_blocking("the command is dead", PATIENCE, || !lives(&job, 1))?;
    assert!(matches!(state(stage.farm.worker(first)), None | Some('T')), "and the daemon still stands");
    let view = stage.settle(&job).await?;
    assert_eq!(view["state"], "succeeded", "{view}");
    // Where deadlines are this short, a disk that takes three seconds makes an assignment late: it is revoked, and comes again.
    let tries = view["attempt"].as_u64().unwrap_or(0);
    assert!((2..=3).contains(&tries) && view["lost"] == json!(tries - 1), "{view}");
    assert_ne!(stage.holder(&job).await?, first, "another worker did it");
    assert_eq!(requeued(&stage.farm, &job).await?.0, "worker_lost");
    stage.links.iter().for_each(Proxy::heal);
    stage.farm.worker(first).signal(Signal::SIGCONT);
    stage.farm.all_connected().await;
    stage.leave().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_worker_that_wakes_up_with_an_old_assignment_before_it_does_not_start_it() -> Result<()> {
    let mut stage = stage("late-assign", 2, Provider::Host).await?;
    let gate = stage.dir.join("gate");
    let wait = format!("until:{}", gate.display());
    let (blocker, mut busy) = stage.submit(&steps(&["bytes:100", &wait])).await?;
    stage.follows(&blocker, &mut busy, |at| at.has(100)).await?;
    let other = 1 - stage.holder(&blocker).await?;
    freeze(stage.farm.worker(other))?;
    let (job, _) = stage.submit(&steps(&["bytes:1000"])).await?;
    let api = stage.api();
    until("the job is given to the worker that stands still", async || {
        let view = api.job(&job).await?;
        anyhow::ensure!(view["worker_name"] == format!("mini-{other}"), "{view}");
        Ok(Some(()))
    })
    .await;
    until("it was taken back", async || Ok((api.job(&job).await?["state"] == "queued").then_some(()))).await;
    // Nobody else is free; the assignment waits in the socket of the one that stands still.
    stage.farm.worker(other).signal(Signal::SIGCONT);
    std::fs::write(&gate, "")?;
    stage.settle(&blocker).await?;
    let view = stage.settle(&job).await?;
    assert_eq!((&view["attempt"], &view["lost"]), (&json!(2), &json!(1)), "{view}");
    assert!(!stage.dir.join(format!("printed/{job}.1")).exists(), "the first attempt never ran");
    let log = api.request(reqwest::Method::GET, &format!("/v1/jobs/{job}/log?attempt=1")).send().await?.bytes().await?;
    assert!(log.is_empty(), "{} bytes", log.len());
    stage.farm.all_connected().await;
    stage.leave().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_orchestrator_that_stood_still_believes_no_silence_that_it_did_not_hear() -> Result<()> {
    let mut stage = stage("orchestrator-freeze", 2, Provider::Host).await?;
    let gate = stage.dir.join("gate");
    let wait = format!("until:{}", gate.display());
    let (ends, one) = stage.submit(&steps(&["bytes:2000", &wait, "bytes:500"])).await?;
    let (stays, other) = stage.submit(&steps(&["bytes:2000", "stay:1", "bytes:500"])).await?;
    for (job, mut progress) in [(&ends, one), (&stays, other)] {
        stage.follows(job, &mut progress, |at| at.has(2_000)).await?;
    }
    // Output may be ahead of the report that the attempt was taken.
    for job in [&ends, &stays] {
        let api = stage.api();
        until("it runs by the books", async || Ok((api.job(job).await?["state"] == "running").then_some(()))).await;
    }
    freeze(stage.farm.orchestrator())?;
    std::fs::write(&gate, "")?;
    // One has its result before its lease ends, the other is killed by its worker.
    until_blocking("no command runs", PATIENCE, || !lives(&ends, 1) && !lives(&stays, 1))?;
    // Longer than it would wait for a silent worker.
    pause(Duration::from_millis(3_500)).await;
    stage.farm.orchestrator().signal(Signal::SIGCONT);
    let view = stage.settle(&ends).await?;
    assert_eq!((&view["attempt"], &view["lost"]), (&json!(1), &json!(0)), "its result was there: {view}");
    let view = stage.settle(&stays).await?;
    assert_eq!((&view["attempt"], &view["lost"]), (&json!(2), &json!(1)), "{view}");
    let (reason, message) = requeued(&stage.farm, &stays).await?;
    assert!(reason == "worker_lost" && message.contains("lease"), "{reason}: {message}");
    stage.farm.all_connected().await;
    stage.leave().await
}
