//! Images of VMs: brought, shown, kept and removed, and what becomes of jobs whose image nobody can get.

use std::process::Output;

use alloy_tests::farm::{Farm, IMAGE, Setup, output};
use alloy_tests::observe::until;
use alloy_tests::sim_host::{self, Profile};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

fn macs() -> Setup {
    Setup { macs: Some(sim_host::Setup::default()), time_scale: 10, slots: 1, ..Setup::default() }
}

async fn job(farm: &Farm, spec: Value) -> Result<Value> {
    let id = farm.api().submit(spec).await?;
    Ok(farm.api().end(&id).await)
}

const OTHER: &str = "registry.test/alloy/other:1";
const THIRD: &str = "registry.test/alloy/third:1";

/// An image that is not the workers' own; each is another digest.
fn profile(compressed_gb: f64) -> Profile {
    Profile { compressed_gb, ..Profile::default() }
}

async fn alloy(farm: &Farm, args: &[&str]) -> Result<Output> {
    output(farm.alloy(args)).await
}

async fn done(farm: &Farm, args: &[&str]) -> Result<String> {
    let out = alloy(farm, args).await?;
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    ensure!(out.status.success(), "{args:?}: {} {said}", out.status);
    Ok(said)
}

/// What each worker says of an image, by the workers' names.
async fn reports(farm: &Farm, name: &str) -> Result<Vec<Value>> {
    let list = farm.api().get("/v1/images").await?;
    let images = list["images"].as_array().context("a list")?;
    let view = images.iter().find(|view| view["name"] == name);
    Ok(view.map(|view| view["workers"].as_array().cloned().unwrap_or_default()).unwrap_or_default())
}

async fn until_report(farm: &Farm, name: &str, what: &str, holds: impl Fn(&Value) -> bool) {
    until(what, async || Ok(reports(farm, name).await?.iter().any(&holds).then_some(()))).await;
}

/// Layers of unfinished downloads.
fn layers(farm: &Farm) -> usize {
    let dirs = std::fs::read_dir(farm.mac(0).home().join("tmp")).into_iter().flatten().flatten();
    dirs.map(|dir| std::fs::read_dir(dir.path()).map_or(0, Iterator::count)).sum()
}

fn is_here(report: &Value) -> bool {
    report["digest"].is_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_record_of_a_job_names_the_digest_that_it_ran() -> Result<()> {
    let farm = Farm::start(macs()).await?;
    let first = farm.mac(0).publish(IMAGE, &Profile::default())?;
    let ended = job(&farm, json!({ "shell": "exit 3" })).await?;
    let shown = (&ended["state"], &ended["image"], &ended["image_digest"]);
    assert_eq!(shown, (&json!("failed"), &json!(IMAGE), &json!(first)), "{ended}");
    assert!(ended["vm_source"].is_string(), "{ended}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pull_brings_an_image_to_every_worker_and_shows_how_far_it_is() -> Result<()> {
    let farm = Farm::start(Setup { workers: 2, ..macs() }).await?;
    let digest = farm.mac(0).publish(OTHER, &Profile { pull_seconds: 600.0, ..profile(30.0) })?;
    let said = done(&farm, &["image", "pull", OTHER]).await?;
    for worker in ["mini-0", "mini-1"] {
        assert!(said.contains(&format!("{worker}: pulling, ")) && said.contains("of 30.0 GB"), "{said}");
        assert!(said.contains(&format!("{worker} has {}", &digest[..19])), "{said}");
    }
    assert_eq!(reports(&farm, OTHER).await?.iter().filter(|report| report["digest"] == digest).count(), 2);
    let listed = done(&farm, &["image", "list"]).await?;
    let rows: Vec<&str> = listed.lines().filter(|line| line.starts_with(OTHER)).collect();
    assert_eq!(rows.len(), 2, "{listed}");
    assert!(rows.iter().all(|row| row.contains("wanted") && row.contains(&digest[..19])), "{listed}");
    let json: Value = serde_json::from_str(&done(&farm, &["image", "list", "--json"]).await?)?;
    assert!(json["images"].as_array().is_some_and(|images| images.len() == 2), "{json}");

    // The tag moves; who pulls again gets what it stands for.
    let moved = farm.mac(0).publish(OTHER, &profile(31.0))?;
    done(&farm, &["image", "pull", OTHER, "--worker", "mini-1"]).await?;
    let shown: Vec<Value> = reports(&farm, OTHER).await?.iter().map(|report| report["digest"].clone()).collect();
    assert_eq!(shown, [json!(digest), json!(moved)]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_budget_evicts_what_nobody_needs_and_never_what_is_pinned() -> Result<()> {
    // The worker's own image and one more fit.
    let farm = Farm::start(Setup { image_budget_gib: 60, ..macs() }).await?;
    farm.mac(0).publish(OTHER, &profile(26.0))?;
    farm.mac(0).publish(THIRD, &profile(24.0))?;
    let run = async |image| job(&farm, json!({ "shell": "true", "image": image })).await;
    assert_eq!(run(OTHER).await?["state"], "succeeded");
    done(&farm, &["image", "pin", OTHER]).await?;
    assert_eq!(run(THIRD).await?["state"], "succeeded");
    until_report(&farm, OTHER, "the pinned image stays and the other one goes", is_here).await;
    until("the image that is not pinned goes", async || {
        Ok(reports(&farm, THIRD).await?.iter().all(|report| !is_here(report)).then_some(()))
    })
    .await;
    assert!(reports(&farm, OTHER).await?.iter().all(is_here) && reports(&farm, IMAGE).await?.iter().all(is_here));

    let refused = alloy(&farm, &["image", "rm", OTHER]).await?;
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("pin --off"));
    done(&farm, &["image", "pin", OTHER, "--off"]).await?;
    let said = done(&farm, &["image", "rm", OTHER]).await?;
    assert!(said.contains("no worker has"), "{said}");
    let said = done(&farm, &["image", "rm", IMAGE]).await?;
    assert!(said.contains("still on 1 worker: mini-0"), "idle slots need it: {said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_goes_on_where_a_killed_worker_left_it() -> Result<()> {
    let mut farm = Farm::start(macs()).await?;
    let slow = Profile { layers: 10, pull_seconds: 3_000.0, ..profile(30.0) };
    farm.mac(0).publish(OTHER, &slow)?;
    done(&farm, &["image", "pull", OTHER, "--detach"]).await?;
    let percent = |report: &Value| report["pulling"]["percent"].as_u64().unwrap_or(0);
    until_report(&farm, OTHER, "four layers are here", |report| percent(report) >= 40).await;
    farm.kill_worker(0);
    farm.start_worker(0)?;
    until("the new worker pulls, with what was there", async || {
        let mac = farm.mac(0);
        let pulls = mac.journal().iter().filter(|entry| entry.argv.iter().any(|arg| arg == "pull")).count();
        assert!(layers(&farm) >= 4 || reports(&farm, OTHER).await?.iter().any(is_here), "what was downloaded is gone");
        Ok((pulls >= 3).then_some(()))
    })
    .await;
    until_report(&farm, OTHER, "the image is here", is_here).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_whose_image_nobody_can_get_ends_with_the_reason_after_every_worker_tried() -> Result<()> {
    let farm = Farm::start(Setup { workers: 2, ..macs() }).await?;
    let spec = || json!({ "shell": "true", "image": "registry.test/alloy/nowhere" });
    let ended = job(&farm, spec()).await?;
    let told = (&ended["state"], &ended["reason"], &ended["blame"], &ended["attempt"], &ended["lost"]);
    let expected = ("errored", "image_pull_failure", "farm");
    assert_eq!(told, (&json!(expected.0), &json!(expected.1), &json!(expected.2), &json!(2), &json!(0)), "{ended}");
    let why = ended["message"].as_str().context("a message")?;
    assert!(
        why.contains("registry.test/alloy/nowhere") && why.contains("404") && why.contains("manifest unknown"),
        "{why}"
    );
    // It is known: the next one is refused before there is a job.
    let refused = alloy(&farm, &["run", "--image", "registry.test/alloy/nowhere", "-c", "true"]).await?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(125), "{said}");
    assert!(said.contains("no worker can get the image") && said.contains("404"), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_worker_cannot_get_another_one_may() -> Result<()> {
    let farm = Farm::start(Setup { workers: 2, ..macs() }).await?;
    farm.mac(0).publish(OTHER, &profile(26.0))?;
    farm.mac(0).faults(&[json!({ "command": "pull", "times": 0, "fault": "status", "code": 401 })]);
    for _ in 0..3 {
        let ended = job(&farm, json!({ "shell": "true", "image": OTHER })).await?;
        assert_eq!((&ended["state"], &ended["worker_name"]), (&json!("succeeded"), &json!("mini-1")), "{ended}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_that_is_ill_for_a_while_costs_time_and_not_the_job() -> Result<()> {
    let farm = Farm::start(macs()).await?;
    farm.mac(0).publish(OTHER, &profile(26.0))?;
    farm.mac(0).faults(&[json!({ "command": "pull", "times": 3, "fault": "status", "code": 503 })]);
    let ended = job(&farm, json!({ "shell": "true", "image": OTHER })).await?;
    let told = (&ended["state"], &ended["attempt"], &ended["lost"]);
    assert_eq!(told, (&json!("succeeded"), &json!(4), &json!(0)), "{ended}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_whose_job_is_canceled_makes_room_for_the_next_and_is_resumed() -> Result<()> {
    let farm = Farm::start(macs()).await?;
    farm.mac(0).publish(OTHER, &Profile { layers: 10, pull_seconds: 3_000.0, ..profile(30.0) })?;
    farm.mac(0).publish(THIRD, &profile(24.0))?;
    let id = farm.api().submit(json!({ "shell": "true", "image": OTHER })).await?;
    let percent = |report: &Value| report["pulling"]["percent"].as_u64().unwrap_or(0);
    until_report(&farm, OTHER, "a layer is here", |report| percent(report) >= 10).await;
    done(&farm, &["cancel", &id]).await?;
    assert_eq!(job(&farm, json!({ "shell": "true", "image": THIRD })).await?["state"], "succeeded");
    assert!(!reports(&farm, OTHER).await?.iter().any(is_here), "the job waited for a download that nobody wanted");
    assert!(layers(&farm) >= 1, "what was downloaded is gone");

    done(&farm, &["image", "pull", OTHER, "--detach"]).await?;
    until_report(&farm, OTHER, "it goes on behind what was there", |report| percent(report) >= 10).await;
    until_report(&farm, OTHER, "the image is here", is_here).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tag_is_removed_alone_while_its_image_has_another() -> Result<()> {
    const LATER: &str = "registry.test/alloy/other:2";
    let farm = Farm::start(macs()).await?;
    for name in [OTHER, LATER] {
        farm.mac(0).publish(name, &profile(26.0))?;
        done(&farm, &["image", "pull", name]).await?;
    }
    let said = done(&farm, &["image", "rm", OTHER]).await?;
    assert!(said.contains("no worker has"), "{said}");
    assert!(reports(&farm, LATER).await?.iter().all(is_here), "the other tag stays");
    assert_eq!(job(&farm, json!({ "shell": "true", "image": LATER })).await?["state"], "succeeded");
    let listed = String::from_utf8(farm.mac(0).tart(&["list"]).output()?.stdout)?;
    assert!(listed.contains(LATER) && !listed.contains(OTHER), "{listed}");
    // The job's VM may still be going.
    done(&farm, &["image", "rm", LATER]).await?;
    until("the image goes with its last tag", async || {
        Ok((!reports(&farm, LATER).await?.iter().any(is_here)).then_some(()))
    })
    .await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_that_make_no_vms_have_no_part_in_images_and_nobody_waits_for_them() -> Result<()> {
    let farm = Farm::start(Setup::default()).await?;
    until_report(&farm, "host", "the worker has said what it has", is_here).await;
    let pulled = done(&farm, &["image", "pull", OTHER]).await?;
    assert!(pulled.contains("no worker that makes VMs is meant"), "{pulled}");
    assert_eq!(reports(&farm, OTHER).await?, Vec::<Value>::new());
    let list = done(&farm, &["image", "list"]).await?;
    assert!(list.lines().any(|line| line.contains(OTHER) && !line.contains("mini-0")), "{list}");
    let removed = done(&farm, &["image", "rm", OTHER]).await?;
    assert!(removed.contains("no worker has") && !removed.contains("waiting for"), "{removed}");
    Ok(())
}
