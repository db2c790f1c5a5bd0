//! Disks that fail under a daemon: it says so and ends, nothing that it acknowledged is missing, and started again it goes on.

use std::collections::BTreeMap;

use alloy_tests::farm::{Farm, Setup, full};
use alloy_tests::inject::{Fault, Injected, injected};
use alloy_tests::load::{check, check_or_cut, submit};
use alloy_tests::mount::skipped;
use alloy_tests::observe::{Api, is_terminal, until};
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tokio::task::JoinSet;

const SYNCS: &str = "fdatasync,fsync";
const RENAMES: &str = "rename,renameat,renameat2";
/// What a worker's jobs do not call themselves comes first.
const FAULTS: [(&str, &str); 6] = [
    (SYNCS, "EIO"),
    ("pwrite64", "EIO"),
    ("pwrite64", "ENOSPC"),
    (RENAMES, "EIO"),
    (RENAMES, "ENOSPC"),
    ("openat", "EIO"),
];
/// Attempts that the farm may lose of a job.
const TRIES: u64 = 3;
/// Jobs under each fault.
const JOBS: u64 = 4;

fn setup() -> Setup {
    Setup { workers: 1, slots: 2, time_scale: 1, ..Setup::default() }
}

/// Which calls of a thread fail: each alone, and some with all that follow.
fn points(rounds: u64) -> Vec<String> {
    (1..=rounds).map(|n| if n.is_multiple_of(3) { format!("{n}+") } else { n.to_string() }).collect()
}

fn can_trace(test: &str) -> bool {
    let found = std::process::Command::new("strace").arg("-V").output().is_ok();
    if !found || !nix::unistd::geteuid().is_root() {
        skipped(test, "it needs strace, and root");
        return false;
    }
    true
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_that_an_orchestrator_acknowledged_is_lost_when_its_disk_fails() -> Result<()> {
    if !can_trace("nothing_that_an_orchestrator_acknowledged_is_lost_when_its_disk_fails") {
        return Ok(());
    }
    let mut farm = Farm::start(setup()).await?;
    let (trace, mut seed, mut hits) = (farm.scratch("trace")?.join("calls"), 0, BTreeMap::new());
    for (calls, error) in FAULTS {
        for when in points(if full() { 25 } else { 3 }) {
            let fault = Fault { calls, error, when };
            let under = Injected::into(farm.orchestrator().pid(), &fault, &trace)?;
            let mut asked = JoinSet::new();
            for _ in 0..JOBS {
                seed += 1;
                let (api, seed) = (farm.api(), seed);
                asked.spawn(async move { (submit(&api, seed).await, seed) });
            }
            let mut told = Vec::new();
            while let Some(done) = asked.join_next().await {
                told.push(done?);
            }
            let ids = told.iter().filter_map(|(id, _)| id.as_ref());
            let api = farm.api();
            let mut ended = under_way(&api, ids, is_terminal, || farm.orchestrator().has_ended().is_some()).await;
            drop(under);
            // It may have met the fault in the last moment.
            ended |= farm.orchestrator().has_ended().is_some();
            if ended {
                let (status, log) = farm.ended_orchestrator()?;
                ensure!(status.code() == Some(1), "{fault:?}: it ended with {status}\n{log}");
                ensure!(log.contains("the farm's disk fails"), "{fault:?}: it does not say why\n{log}");
                farm.start_orchestrator().await?;
            }
            let count = injected(&trace);
            println!("{fault:?}: {count} calls failed, ended: {ended}");
            let cell: &mut (usize, usize) = hits.entry((calls, error)).or_default();
            *cell = (cell.0 + count, cell.1 + usize::from(ended));
            let api = farm.api();
            for (id, seed) in told {
                // What was not acknowledged may be there or not; asked again it is one job.
                let id = match id {
                    Some(id) => id,
                    None => until("it is taken", async || Ok(submit(&api, seed).await)).await,
                };
                check(&api, &id, seed).await.with_context(|| format!("{fault:?}"))?;
            }
        }
    }
    println!("failed calls and ends by kind: {hits:#?}");
    assert!(hits.values().all(|(count, _)| *count > 0), "a kind of fault was never met: {hits:#?}");
    assert!(hits[&(SYNCS, "EIO")].1 > 0 && hits[&("pwrite64", "EIO")].1 > 0, "{hits:#?}");
    Ok(())
}

/// Waits until these jobs are so far, or the daemon has ended, or for a while: a fault may hold them up for as long as it stays.
/// True: it has ended.
async fn under_way(
    api: &Api,
    jobs: impl IntoIterator<Item = &String>,
    so_far: impl Fn(&Value) -> bool,
    mut has_ended: impl FnMut() -> bool,
) -> bool {
    let jobs: Vec<&String> = jobs.into_iter().collect();
    let looks = 150;
    for _ in 0..looks {
        if has_ended() {
            return true;
        }
        let mut open = 0;
        for id in &jobs {
            let job = tokio::time::timeout(std::time::Duration::from_secs(2), api.job(id)).await;
            open += usize::from(!matches!(job, Ok(Ok(job)) if so_far(&job)));
        }
        if open == 0 {
            return false;
        }
        alloy_tests::chaos::pause(std::time::Duration::from_millis(20)).await;
    }
    false
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_orchestrator_whose_every_sync_fails_acknowledges_nothing_and_does_not_start_either() -> Result<()> {
    if !can_trace("an_orchestrator_whose_every_sync_fails_acknowledges_nothing_and_does_not_start_either") {
        return Ok(());
    }
    let mut farm = Farm::start(setup()).await?;
    // Told before the farm is taken down, which tells only what it finds itself.
    every_sync_fails(&mut farm).await.inspect_err(|error| eprintln!("{error:#}"))
}

async fn every_sync_fails(farm: &mut Farm) -> Result<()> {
    let trace = farm.scratch("trace")?.join("calls");
    let before = farm.api().shell("echo before").await?;
    assert_eq!(farm.api().end(&before).await["state"], "succeeded");
    let every = Fault { calls: SYNCS, error: "EIO", when: "1+".into() };
    let under = Injected::into(farm.orchestrator().pid(), &every, &trace)?;
    let mut asked = JoinSet::new();
    for seed in 1..=8 {
        let api = farm.api();
        asked.spawn(async move { submit(&api, seed).await });
    }
    while let Some(done) = asked.join_next().await {
        assert_eq!(done?, None, "nothing reached the disk");
    }
    let (status, log) = farm.ended_orchestrator()?;
    drop(under);
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("the farm's disk fails"), "{log}");

    let out = every.around(&farm.orchestrator_command(farm.address())).output()?;
    let told = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{told}");
    assert!(told.contains("orchestrator: ") && told.contains("I/O error"), "{told}");
    farm.start_orchestrator().await?;
    let api = farm.api();
    assert_eq!(api.job(&before).await?["state"], "succeeded");
    for seed in 1..=8 {
        let id = until("it is taken", async || Ok(submit(&api, seed).await)).await;
        check(&api, &id, seed).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_job_is_lost_when_the_disk_of_its_worker_fails() -> Result<()> {
    if !can_trace("no_job_is_lost_when_the_disk_of_its_worker_fails") {
        return Ok(());
    }
    let mut farm = Farm::start(setup()).await?;
    // Told before the farm is taken down, which tells only what it finds itself.
    a_disk_fails_under_the_worker(&mut farm).await.inspect_err(|error| eprintln!("{error:#}"))
}

async fn a_disk_fails_under_the_worker(farm: &mut Farm) -> Result<()> {
    let (trace, mut seed, mut spent, mut hits) = (farm.scratch("trace")?.join("calls"), 0, 0, BTreeMap::new());
    for (calls, error) in FAULTS.into_iter().filter(|(calls, _)| *calls != "openat") {
        for when in points(if full() { 30 } else { 2 }) {
            let fault = Fault { calls, error, when };
            let under = Injected::into(farm.worker(0).pid(), &fault, &trace)?;
            let api = farm.api();
            let mut jobs = Vec::new();
            for _ in 0..2 {
                seed += 1;
                jobs.push((submit(&api, seed).await.context("the farm is well")?, seed));
            }
            // What it holds up is tried again elsewhere in time: here nobody else is there.
            let so_far = |job: &Value| is_terminal(job) || job["attempt"].as_u64() >= Some(2);
            let ids = jobs.iter().map(|(id, _)| id);
            let mut ended = under_way(&api, ids, so_far, || farm.worker(0).has_ended().is_some()).await;
            drop(under);
            ended |= farm.worker(0).has_ended().is_some();
            if ended {
                start_again(farm, &fault)?;
            }
            let count = injected(&trace);
            println!("{fault:?}: {count} calls failed, ended: {ended}");
            let cell: &mut (usize, usize) = hits.entry((calls, error)).or_default();
            *cell = (cell.0 + count, cell.1 + usize::from(ended));
            for (id, seed) in jobs {
                // A fault strikes each thread, and so may strike every try of one job, which then ends by that.
                let job = end_of(farm, &fault, &api, &id).await?;
                if job["state"] == "errored" && job["attempt"] == TRIES {
                    spent += 1;
                } else {
                    check_or_cut(&api, &id, seed).await.with_context(|| format!("{fault:?}"))?;
                }
            }
            // The fault may have struck it behind its jobs.
            if farm.worker(0).has_ended().is_some() {
                start_again(farm, &fault)?;
            }
        }
    }
    println!("failed calls and ends by kind: {hits:#?}");
    assert!(hits[&(SYNCS, "EIO")].0 > 0 && hits[&(SYNCS, "EIO")].1 > 0, "{hits:#?}");
    assert!(hits[&("pwrite64", "EIO")].0 > 0, "{hits:#?}");
    assert!(spent * 4 <= seed, "{spent} of {seed} jobs used up their tries");
    farm.all_connected().await;
    Ok(())
}

/// The end of a job, while the worker is started again if it ends: the fault may have struck it just before it was taken away.
async fn end_of(farm: &mut Farm, fault: &Fault, api: &Api, id: &str) -> Result<Value> {
    loop {
        let worker_ends = async {
            while farm.worker(0).has_ended().is_none() {
                alloy_tests::chaos::pause(std::time::Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            job = api.end(id) => return Ok(job),
            () = worker_ends => start_again(farm, fault)?,
        }
    }
}

/// After an end that the fault has made, and of which the worker said so.
fn start_again(farm: &mut Farm, fault: &Fault) -> Result<()> {
    let (status, log) = farm.ended_worker(0)?;
    ensure!(status.code() == Some(1), "{fault:?}: it ended with {status}\n{log}");
    ensure!(log.contains("the spool fails"), "{fault:?}: it does not say why\n{log}");
    farm.start_worker(0)
}
