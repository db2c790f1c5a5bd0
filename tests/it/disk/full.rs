//! A full disk stops what is new and nothing that runs, and nobody has to start anything again.

use std::process::Command;

use alloy_tests::farm::{Farm, Setup, bin_dir, output};
use alloy_tests::mount::Filler;
use alloy_tests::noise::{blocks, sha256, sha256_of};
use alloy_tests::observe::{Api, until};
use alloy_tests::process::Daemon;
use anyhow::{Context as _, Result};
use reqwest::Method;
use serde_json::{Value, json};

with_own_mounts! {
    a_farm_whose_disk_is_full_takes_nothing_new_and_finishes_what_runs,
    a_cancel_works_on_a_farm_whose_disk_is_full,
    a_worker_whose_disk_is_full_takes_no_job_until_there_is_room,
    a_log_that_outgrows_the_workers_disk_waits_for_the_farm_and_is_whole,
    a_log_that_nobody_takes_keeps_its_head_a_count_and_its_end,
}

const MIB: u64 = 1 << 20;

/// Half of the floor stays free for the database, and on a worker for reports and the ends of logs.
fn setup() -> Setup {
    Setup { workers: 1, slots: 2, time_scale: 10, disk_floor_mib: 16, ..Setup::default() }
}

/// A command that prints so many bytes of a stream when the gate is open.
fn behind(gate: &std::path::Path, seed: u64, bytes: u64) -> String {
    let noise = bin_dir().join("noise");
    format!("echo before; while [ ! -e {} ]; do sleep 0.02; done; {} {seed} {bytes}", gate.display(), noise.display())
}

async fn refused(api: &Api) -> Result<()> {
    let spec = json!({ "spec": { "shell": "true" } });
    let answer = api.request(Method::POST, "/v1/jobs").json(&spec).send().await?;
    let retry = answer.headers().get("retry-after").map(|value| value.to_str().unwrap_or("").to_owned());
    assert_eq!((answer.status().as_u16(), retry.as_deref()), (507, Some("10")));
    let problem: Value = answer.json().await?;
    assert_eq!(problem["code"], "storage_full", "{problem}");
    assert!(problem["hint"].as_str().is_some_and(|hint| hint.contains("free space")), "{problem}");
    Ok(())
}

async fn ready(api: &Api) -> Result<(u16, String)> {
    let answer = api.request(Method::GET, "/readyz").send().await?;
    Ok((answer.status().as_u16(), answer.text().await?))
}

fn lives(daemon: &mut Daemon, pid: i32) {
    assert!(daemon.has_ended().is_none() && daemon.pid() == pid, "{}", daemon.log_text());
}

async fn a_farm_whose_disk_is_full_takes_nothing_new_and_finishes_what_runs() -> Result<()> {
    let mut farm = Farm::start(Setup { farm_disk_mib: Some(96), ..setup() }).await?;
    let (api, pid) = (farm.api(), farm.orchestrator().pid());
    let (first, second) = (farm.scratch("gates")?.join("first"), farm.scratch("gates")?.join("second"));
    let runs = api.shell(&behind(&first, 1, 2 * MIB)).await?;
    let waits = api.shell(&behind(&second, 2, 3 * MIB)).await?;
    for id in [&runs, &waits] {
        api.log_has(id, "before").await;
    }
    let queued = api.shell("echo queued").await?;
    let tree = farm.scratch("tree")?;
    std::fs::write(tree.join("file"), "some bytes")?;

    // Below the floor, above the reserve.
    let filler = Filler::leave(&farm.farm_dir(), 12 * MIB)?;
    refused(&api).await?;
    let upload = farm.upload(&tree).await.unwrap_err().to_string();
    assert!(upload.contains("storage_full"), "{upload}");
    let (status, text) = ready(&api).await?;
    assert_eq!(status, 200, "reads and cancels work: {text}");
    assert!(text.contains("storage_full"), "{text}");
    let doctor = output(farm.alloy(&["doctor"])).await?;
    let told = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(!doctor.status.success() && told.contains("the farm's disk is full"), "{told}");
    std::fs::write(&first, "")?;
    assert_eq!(api.end(&runs).await["state"], "succeeded", "what runs ends well");
    assert_eq!(sha256_of(&api.log(&runs).await?[7..]), sha256(1, 2 * MIB));
    assert_eq!(api.end(&queued).await["state"], "succeeded", "what was accepted runs");

    // Below the reserve: log bytes wait on the worker.
    filler.resize(4 * MIB)?;
    std::fs::write(&second, "")?;
    refused(&api).await?;
    let worker = farm.worker_dir(0);
    until("the worker has spooled the log", async || {
        let spooled = output(du(&worker.join("spool"))).await?;
        let kib: u64 =
            String::from_utf8_lossy(&spooled.stdout).split_whitespace().next().context("a number")?.parse()?;
        Ok((kib * 1024 > 3 * MIB).then_some(()))
    })
    .await;
    // Full to the last byte: not even the books can be written.
    filler.resize(0)?;
    refused(&api).await?;
    assert_eq!(api.job(&waits).await?["state"], "running", "reads work");
    assert!(api.log(&waits).await?.starts_with(b"before\n"));
    lives(farm.orchestrator(), pid);
    drop(filler);
    assert_eq!(api.end(&waits).await["state"], "succeeded");
    let job = api.job(&waits).await?;
    assert_eq!((job["attempt"].as_u64(), job["lost"].as_u64()), (Some(1), Some(0)), "{job}");
    assert_eq!(sha256_of(&api.log(&waits).await?[7..]), sha256(2, 3 * MIB), "not a byte is missing");
    let again = api.shell("echo again").await?;
    assert_eq!(api.end(&again).await["state"], "succeeded");
    assert_eq!(ready(&api).await?, (200, "ready\n".to_owned()));
    farm.upload(&tree).await?;
    lives(farm.orchestrator(), pid);
    Ok(())
}

fn du(dir: &std::path::Path) -> Command {
    let mut du = Command::new("du");
    du.arg("-sk").arg(dir);
    du
}

async fn a_cancel_works_on_a_farm_whose_disk_is_full() -> Result<()> {
    let farm = Farm::start(Setup { farm_disk_mib: Some(96), slots: 1, ..setup() }).await?;
    let api = farm.api();
    let runs = api.shell("echo before; sleep 600").await?;
    let queued = api.shell("true").await?;
    api.log_has(&runs, "before").await;
    let _filler = Filler::leave(&farm.farm_dir(), 4 * MIB)?;
    for id in [&queued, &runs] {
        let asked = api.request(Method::POST, &format!("/v1/jobs/{id}/cancel")).send().await?;
        assert!(asked.status().is_success(), "{}", asked.text().await?);
        assert_eq!(api.end(id).await["state"], "canceled");
    }
    Ok(())
}

async fn a_worker_whose_disk_is_full_takes_no_job_until_there_is_room() -> Result<()> {
    let mut farm = Farm::start(Setup { worker_disk_mib: Some(64), ..setup() }).await?;
    let (api, pid) = (farm.api(), farm.worker(0).pid());
    let gate = farm.scratch("gates")?.join("open");
    let runs = api.shell(&behind(&gate, 3, 100_000)).await?;
    api.log_has(&runs, "before").await;
    let filler = Filler::leave(&farm.worker_dir(0), 12 * MIB)?;
    until("the worker takes nothing, and says why", async || {
        let list = api.get("/v1/workers").await?;
        let worker = &list["workers"][0];
        let why = worker["trouble"].as_str().unwrap_or_default();
        Ok((worker["state"] == "draining" && why.contains("disk is full")).then_some(()))
    })
    .await;
    let waits = api.shell("echo waited").await?;
    std::fs::write(&gate, "")?;
    assert_eq!(api.end(&runs).await["state"], "succeeded", "what runs goes on");
    assert_eq!(api.job(&waits).await?["state"], "queued");
    drop(filler);
    assert_eq!(api.end(&waits).await["state"], "succeeded");
    lives(farm.worker(0), pid);
    farm.all_connected().await;
    Ok(())
}

async fn a_log_that_outgrows_the_workers_disk_waits_for_the_farm_and_is_whole() -> Result<()> {
    let farm = Farm::start(Setup { worker_disk_mib: Some(64), ..setup() }).await?;
    let api = farm.api();
    let bytes = 90 * MIB;
    let id = api.shell(&format!("{} 4 {bytes}", bin_dir().join("noise").display())).await?;
    let job = api.end(&id).await;
    assert_eq!(job["state"], "succeeded", "{job}");
    assert_eq!(sha256_of(&api.log(&id).await?), sha256(4, bytes), "not a byte is missing");
    farm.all_connected().await;
    Ok(())
}

async fn a_log_that_nobody_takes_keeps_its_head_a_count_and_its_end() -> Result<()> {
    let mut farm = Farm::start(Setup { worker_disk_mib: Some(64), farm_disk_mib: Some(160), ..setup() }).await?;
    let (api, pid) = (farm.api(), farm.worker(0).pid());
    let (gate, bytes) = (farm.scratch("gates")?.join("open"), 70 * MIB);
    let id = api.shell(&behind(&gate, 5, bytes)).await?;
    api.log_has(&id, "before").await;
    let filler = Filler::leave(&farm.farm_dir(), 4 * MIB)?;
    std::fs::write(&gate, "")?;
    let log = farm.dir().join("logs/worker-0.log");
    until("the worker has cut the log off", async || {
        Ok(std::fs::read_to_string(&log)?.contains("the log is cut off").then_some(()))
    })
    .await;
    drop(filler);
    let job = api.end(&id).await;
    assert_eq!((job["state"].as_str(), job["attempt"].as_u64()), (Some("succeeded"), Some(1)), "{job}");
    let stored = api.log(&id).await?;
    let whole: Vec<u8> = b"before\n".iter().copied().chain(blocks(5, bytes).flatten()).collect();
    let tail = usize::try_from(MIB)?;
    let line_at = stored.windows(9).rposition(|window| window == b"\n[alloy: ").context("a line tells of it")?;
    let dropped = whole.len() - line_at - tail;
    let line = format!("\n[alloy: {dropped} bytes of log are left out here, its last {tail} follow]\n");
    assert!(
        stored[line_at..].starts_with(line.as_bytes()),
        "{:?}",
        String::from_utf8_lossy(&stored[line_at..line_at + 99])
    );
    assert!(stored[..line_at] == whole[..line_at], "its head");
    assert!(stored[line_at + line.len()..] == whole[whole.len() - tail..], "its end");
    assert!(line_at > tail, "{line_at}");
    lives(farm.worker(0), pid);
    farm.all_connected().await;
    Ok(())
}
