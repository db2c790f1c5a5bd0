//! Power cuts: what was acknowledged is there when the machine comes back.

use std::path::Path;
use std::time::Duration;

use alloy_tests::chaos::Dice;
use alloy_tests::farm::{Cuts, Farm, Setup, bin_dir, full, isolated_orchestrator};
use alloy_tests::load::{Known, LOG, Load, check_bytes};
use alloy_tests::mount::Mount;
use alloy_tests::noise::{sha256, sha256_of};
use alloy_tests::observe::{Api, until};
use alloy_tests::process::Daemon;
use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;

with_own_mounts! {
    nothing_that_was_acknowledged_is_lost_when_the_orchestrators_host_loses_its_power,
    a_recorded_result_survives_when_its_workers_host_loses_its_power,
}

const BOOT: Duration = Duration::from_secs(40);

async fn nothing_that_was_acknowledged_is_lost_when_the_orchestrators_host_loses_its_power() -> Result<()> {
    let setup = Setup {
        workers: 2,
        slots: 2,
        time_scale: 1,
        disk_floor_mib: 1,
        cuts: Some(Cuts::Orchestrator),
        ..Setup::default()
    };
    let mut farm = Farm::start(setup).await?;
    farm.leaves_live_jobs = true;
    let (api, mut dice) = (farm.api(), Dice::from_environment());
    let load = Load::on(&api, 6);
    until("some jobs have ended", async || {
        Ok((load.known().iter().filter(|job| job.done.is_some()).count() >= 6).then_some(()))
    })
    .await;
    let cuts = if full() { 50 } else { 5 };
    let (mut acknowledged, mut ended) = (0, 0);
    for cut in 1..=cuts {
        dice.instant(700).await;
        // Read before the cut: all of it was acknowledged before.
        let known = load.known();
        let image = farm.disk().cut().inspect_err(|error| eprintln!("cut {cut}: {error:#}"))?;
        // What comes meanwhile is for the next cut.
        load.hold(true);
        let at = farm.scratch(&format!("after-{cut}"))?;
        let disk = Mount::image(&image, &at, "").inspect_err(|error| eprintln!("cut {cut}: {error:#}"))?;
        look(&farm, &at, &known).await.inspect_err(|error| eprintln!("cut {cut}: {error:#}"))?;
        drop(disk);
        std::fs::remove_file(&image)?;
        (acknowledged, ended) = (known.len(), known.iter().filter(|job| job.done.is_some()).count());
        load.hold(false);
        println!("cut {cut}: {acknowledged} acknowledged jobs, {ended} of them ended: all there");
    }
    assert!(acknowledged > 20 && ended > 10, "{acknowledged} {ended}");
    load.stop().await;
    Ok(())
}

/// Starts an orchestrator on what a cut left, and looks for everything that was acknowledged.
async fn look(farm: &Farm, data: &Path, known: &[Known]) -> Result<()> {
    let log = farm.dir().join("logs/after.log");
    let _ = std::fs::remove_file(&log);
    let command = isolated_orchestrator(farm.dir(), data);
    let mut daemon = Daemon::start("orchestrator", command, &log)?;
    let address = until("it listens", async || {
        ensure!(daemon.has_ended().is_none(), "it does not start: {}", daemon.log_text());
        Ok(alloy_tests::farm::told_address(&daemon.log_text()))
    })
    .await;
    // The token is the farm's own: it was acknowledged too.
    let api = Api::new(&format!("http://{address}"), Some(farm.token()));
    let found = look_for(&api, known).await;
    daemon.signal(Signal::SIGTERM);
    let status = daemon.wait(BOOT)?;
    found.with_context(|| daemon.log_text())?;
    ensure!(status.success(), "it ended with {status}");
    orchestrator::store::sql::backup::examine(&data.join("farm/alloy.db")).await.context("integrity_check")?;
    Ok(())
}

async fn look_for(api: &Api, known: &[Known]) -> Result<()> {
    for Known { id, seed, done } in known {
        let job = api.job(id).await.with_context(|| format!("{id} was acknowledged"))?;
        let Some(events) = done else { continue };
        ensure!(job["state"] == "succeeded", "its end was told: {job}");
        ensure!(api.events(id).await? == *events, "the events of {id}");
        check_bytes(api, id, *seed).await?;
    }
    Ok(())
}

async fn a_recorded_result_survives_when_its_workers_host_loses_its_power() -> Result<()> {
    let setup =
        Setup { workers: 1, slots: 2, time_scale: 1, disk_floor_mib: 1, cuts: Some(Cuts::Worker), ..Setup::default() };
    let mut farm = Farm::start(setup).await?;
    let mut dice = Dice::from_environment();
    let (mut delivered, mut again) = (0, 0);
    for round in 1..=if full() { 20 } else { 4 } {
        let api = farm.api();
        let gate = farm.scratch("gates")?.join(round.to_string());
        let noise = bin_dir().join("noise");
        let line = |seed: u64| {
            let (gate, noise) = (gate.display(), noise.display());
            format!("echo before; while [ ! -e {gate} ]; do sleep 0.02; done; {noise} {seed} {LOG}")
        };
        let ids = [api.shell(&line(2 * round)).await?, api.shell(&line(2 * round + 1)).await?];
        for id in &ids {
            api.log_has(id, "before").await;
        }
        // Results are recorded, and nobody takes them.
        farm.kill_orchestrator();
        std::fs::write(&gate, "")?;
        let late = round.is_multiple_of(2);
        let spool = farm.worker_dir(0).join("spool");
        if late {
            until("a cut finds both results on the disk", async || has_results(&farm, &spool)).await;
        } else {
            dice.instant(300).await;
        }
        let cut = farm.disk().cut()?;
        farm.kill_worker(0);
        farm.go_on_after(&cut)?;
        farm.start_orchestrator().await?;
        farm.start_worker(0)?;
        let api = farm.api();
        for (id, seed) in ids.iter().zip([2 * round, 2 * round + 1]) {
            let job = api.end(id).await;
            ensure!(job["state"] == "succeeded", "round {round}: {job}");
            ensure!(sha256_of(&api.log(id).await?[7..]) == sha256(seed, LOG), "round {round}: the log of {id}");
            let first = job["attempt"].as_u64() == Some(1);
            ensure!(first || !late, "round {round}: its result was on the disk: {job}");
            (delivered, again) = (delivered + u32::from(first), again + u32::from(!first));
        }
        farm.all_connected().await;
    }
    println!("{delivered} jobs ended by what the disk had, {again} ran again");
    Ok(())
}

/// What a cut of this moment would leave has the results of both attempts.
fn has_results(farm: &Farm, spool: &Path) -> Result<Option<()>> {
    let image = farm.disk().cut()?;
    let at = farm.scratch("peek")?;
    let disk = Mount::image(&image, &at, "")?;
    let mut found = 0;
    for entry in std::fs::read_dir(at.join(spool.file_name().context("a name")?))? {
        let journal = std::fs::read_to_string(entry?.path().join("journal")).unwrap_or_default();
        found += usize::from(journal.contains("\"result\""));
    }
    drop(disk);
    std::fs::remove_file(image)?;
    Ok((found == 2).then_some(()))
}
