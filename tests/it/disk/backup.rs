//! Backups of a farm under load, cut off and whole, and the farm that comes back from one.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use alloy_tests::chaos::Dice;
use alloy_tests::farm::{Farm, Setup, full, output};
use alloy_tests::load::{Known, Load, check_bytes};
use alloy_tests::observe::{is_terminal, until};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;

fn setup() -> Setup {
    Setup { workers: 2, slots: 2, time_scale: 20, ..Setup::default() }
}

/// A command for the farm where it is.
fn admin_command(farm: &Farm, args: &[&str]) -> Command {
    let words: Vec<&str> = ["admin"].iter().chain(args).copied().collect();
    let mut command = farm.alloy(&words);
    command.envs(farm.orchestrator_env());
    command
}

async fn admin(farm: &Farm, args: &[&str]) -> Result<(bool, String)> {
    let out = output(admin_command(farm, args)).await?;
    Ok((out.status.success(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned()))
}

/// Makes a farm on files of a backup of any farm.
async fn restore_as_files(farm: &Farm, backup: &Path, data: &Path) -> Result<(bool, String)> {
    let (backup, data) = (backup.display().to_string(), data.display().to_string());
    let out = output(farm.alloy(&["admin", "restore", &backup, "--data-dir", &data])).await?;
    Ok((out.status.success(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned()))
}

/// A command that holds a lock while it runs, and tells if somebody else holds it: two VMs of one job.
fn one_at_a_time(dir: &Path) -> String {
    let (lock, twice, gate) = (dir.join("lock"), dir.join("twice"), dir.join("gate"));
    format!(
        "exec 9>{}; flock -n 9 || echo twice >> {}; echo attempt $ALLOY_JOB_ATTEMPT; \
         while [ ! -e {} ]; do sleep 0.05; done",
        lock.display(),
        twice.display(),
        gate.display()
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_farm_comes_back_from_a_backup_that_was_taken_under_load() -> Result<()> {
    let mut farm = Farm::start(setup()).await?;
    let api = farm.api();
    let dir = farm.scratch("one")?;
    let runs = api.shell(&one_at_a_time(&dir)).await?;
    api.log_has(&runs, "attempt 1").await;
    let token = api.post("/v1/tokens", &json!({ "name": "ci", "role": "developer" })).await?;
    let token = token["token"].as_str().context("a token")?.to_owned();
    let load = Load::on(&api, 4);
    until("some jobs have ended", async || {
        Ok((load.known().iter().filter(|job| job.done.is_some()).count() >= 5).then_some(()))
    })
    .await;
    let known = load.known();
    let target = farm.dir().join("backup");
    let (fine, told) = admin(&farm, &["backup", &target.display().to_string()]).await?;
    ensure!(fine, "{told}");
    let (fine, told) = admin(&farm, &["restore", &target.display().to_string()]).await?;
    let is_held = ["in use", "holds a farm"].iter().any(|says| told.contains(says));
    ensure!(!fine && is_held, "a farm that runs is not replaced: {told}");
    load.stop().await;

    // Another machine: nothing of the farm is there but what the backup has.
    farm.kill_orchestrator();
    farm.lose_data().await?;
    let (fine, told) = admin(&farm, &["restore", &target.display().to_string()]).await?;
    ensure!(fine, "{told}");
    farm.start_orchestrator().await?;
    farm.leaves_live_jobs = true;
    let api = farm.api();
    come_back(&farm, &known).await?;
    // Workers come with their identity; what ran when the backup was taken is tried again, and runs once.
    until("it is tried again", async || {
        let job = api.job(&runs).await?;
        Ok((job["attempt"].as_u64() >= Some(2) && job["phase"] == "executing").then_some(()))
    })
    .await;
    std::fs::write(dir.join("gate"), "")?;
    let job = api.end(&runs).await;
    ensure!(job["state"] == "succeeded", "{job}");
    ensure!(!dir.join("twice").exists(), "two commands of one job at once");
    let ours = alloy_tests::observe::Api::new(&farm.url(), Some(&token));
    let new = ours.shell("echo after").await?;
    ensure!(api.end(&new).await["state"] == "succeeded");
    Ok(())
}

/// All that was acknowledged before the backup was begun is there, and what had not ended ends.
async fn come_back(farm: &Farm, known: &[Known]) -> Result<()> {
    let api = farm.api();
    ensure!(known.len() > 5, "{known:?}");
    for Known { id, seed, done } in known {
        let job = api.job(id).await.with_context(|| format!("{id} was acknowledged"))?;
        if let Some(events) = done {
            ensure!(is_terminal(&job) && api.events(id).await? == *events, "the events of {id}: {job}");
        }
        let job = api.end(id).await;
        ensure!(job["state"] == "succeeded", "{job}");
        check_bytes(&api, id, *seed).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_is_killed_is_never_taken_for_a_whole_one() -> Result<()> {
    let mut dice = Dice::from_environment();
    let (mut cut, mut whole) = (0, 0);
    // A farm grows under its load, and its backups with it.
    for _ in 0..if full() { 6 } else { 1 } {
        let (some_cut, some_whole) = backups_that_are_killed(&mut dice, 8).await?;
        (cut, whole) = (cut + some_cut, whole + some_whole);
    }
    println!("{cut} backups were cut off, {whole} were faster");
    assert!(cut > 0);
    Ok(())
}

/// How many were cut off, and how many were faster.
async fn backups_that_are_killed(dice: &mut Dice, rounds: u32) -> Result<(u32, u32)> {
    let mut farm = Farm::start(setup()).await?;
    farm.leaves_live_jobs = true;
    let api = farm.api();
    let load = Load::paced(&api, 4, Duration::from_millis(200));
    until("some jobs have ended", async || {
        Ok((load.known().iter().filter(|job| job.done.is_some()).count() >= 5).then_some(()))
    })
    .await;
    let (mut cut, mut whole) = (0, 0);
    for round in 0..rounds {
        let target = farm.dir().join(format!("backup-{round}"));
        let known = load.known();
        let mut command = admin_command(&farm, &["backup", &target.display().to_string()]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        dice.instant(120).await;
        child.kill()?;
        child.wait()?;
        if target.exists() {
            // It was faster: then it is one.
            whole += 1;
            restored(&farm, &target, &known).await?;
            continue;
        }
        cut += 1;
        for left in [target.clone(), partial(&target)] {
            let elsewhere = farm.dir().join("elsewhere");
            let (fine, told) = restore_as_files(&farm, &left, &elsewhere).await?;
            if fine {
                // All of it was there, and only its name was not.
                std::fs::remove_dir_all(&elsewhere)?;
                restored(&farm, &left, &known).await?;
                continue;
            }
            ensure!(told.contains("is no backup"), "{told}");
            ensure!(!elsewhere.join("farm/alloy.db").exists());
        }
        // The next one begins anew, where that one left off.
        let (fine, told) = admin(&farm, &["backup", &target.display().to_string()]).await?;
        ensure!(fine && !partial(&target).exists(), "{told}");
        restored(&farm, &target, &known).await?;
    }
    load.stop().await;
    Ok((cut, whole))
}

fn partial(target: &Path) -> PathBuf {
    PathBuf::from(format!("{}.partial", target.display()))
}

/// The backup can be restored, and holds what was acknowledged before it was begun.
async fn restored(farm: &Farm, target: &Path, known: &[Known]) -> Result<()> {
    let data = farm.scratch("restored")?;
    let (fine, told) = restore_as_files(farm, target, &data).await?;
    ensure!(fine, "{told}");
    for Known { id, done, .. } in known {
        if done.is_some() {
            ensure!(data.join(format!("farm/logs/{id}/1.log")).exists(), "the log of {id}");
        }
    }
    let mut gone = Command::new("rm");
    let out = output({
        gone.arg("-rf").arg(&data).arg(target);
        gone
    })
    .await?;
    ensure!(out.status.success());
    alloy_tests::chaos::pause(Duration::ZERO).await;
    Ok(())
}
