//! The operator's hooks around jobs, on real workers, and what a job is told of where it runs.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use alloy_tests::farm::{Farm, Setup};
use alloy_tests::observe::until;
use alloy_tests::sim_host;
use anyhow::{Context as _, Result};
use serde_json::{Value, json};

fn write(farm: &Farm, worker: usize, hook: &str, script: &str) -> Result<()> {
    let dir = farm.worker_dir(worker).join("hooks");
    fs::create_dir_all(&dir)?;
    let path = dir.join(hook);
    fs::write(&path, format!("#!/bin/sh\n{script}\n"))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

async fn job(farm: &Farm, spec: Value) -> Result<(Value, String)> {
    let id = farm.api().submit(spec).await?;
    let ended = farm.api().end(&id).await;
    Ok((ended, String::from_utf8_lossy(&farm.api().log(&id).await?).into_owned()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hooks_run_on_the_host_before_and_after_a_job_and_speak_into_the_workers_log() -> Result<()> {
    let mut farm = Farm::start(Setup { slots: 1, ..Setup::default() }).await?;
    let told = farm.scratch("told")?;
    let about = "$ALLOY_HOOK $ALLOY_JOB_ID $ALLOY_JOB_ATTEMPT $ALLOY_WORKER $ALLOY_IMAGE ${ALLOY_VM%%-*}";
    let dir = told.display();
    write(&farm, 0, "pre-job", &format!("echo \"{about}\" > '{dir}/pre'; echo words of the operator"))?;
    let post = format!(
        "echo \"{about} $ALLOY_OUTCOME $ALLOY_REASON $ALLOY_EXIT_CODE\" > '{dir}/part'; mv '{dir}/part' '{dir}/post'"
    );
    write(&farm, 0, "post-job", &post)?;
    let (ended, log) = job(&farm, json!({ "shell": format!("cat '{dir}/pre'; exit 7") })).await?;
    let id = ended["id"].as_str().context("an id")?.to_owned();
    let words = format!("{id} 1 mini-0 host alloy");
    assert_eq!((ended["exit_code"].as_i64(), log), (Some(7), format!("pre-job {words}\n")), "{ended}");
    let post =
        until("the hook after the job has spoken", async || Ok(fs::read_to_string(told.join("post")).ok())).await;
    assert_eq!(post, format!("post-job {words} failed script_failure 7\n"));
    let log = farm.worker(0).log_text();
    assert!(log.contains("pre-job: words of the operator"), "{log}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pre_job_that_fails_sends_the_job_elsewhere_and_a_post_job_that_fails_changes_nothing() -> Result<()> {
    let mut farm = Farm::start(Setup { workers: 2, slots: 1, ..Setup::default() }).await?;
    for worker in 0..2 {
        write(&farm, worker, "pre-job", "[ \"$ALLOY_JOB_ATTEMPT\" != 1 ] || exit 3")?;
        write(&farm, worker, "post-job", "exit 4")?;
    }
    let (ended, log) = job(&farm, json!({ "shell": "echo \"ran on $ALLOY_WORKER\"" })).await?;
    assert_eq!(
        (&ended["state"], &ended["attempt"], &ended["lost"]),
        (&json!("succeeded"), &json!(2), &json!(1)),
        "{ended}"
    );
    let events = farm.api().events(ended["id"].as_str().context("an id")?).await?;
    let lost = events.iter().find(|event| event["kind"] == "requeued").context("it was requeued")?;
    let why = lost["message"].as_str().unwrap_or_default();
    assert!(
        lost["reason"] == "vm_start_failure" && why.contains("pre-job hook of this worker ended with status 3"),
        "{lost}"
    );
    let second = ended["worker_name"].as_str().context("a worker")?.to_owned();
    assert_eq!(log, format!("ran on {second}\n"), "nothing of it ran where the hook failed");
    // Both take jobs as before.
    let number = usize::from(second == "mini-1");
    until("the hook after the job has failed", async || {
        Ok(farm.worker(number).log_text().contains("post-job ended with status 4").then_some(()))
    })
    .await;
    farm.all_connected().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_in_a_vm_is_told_what_a_job_on_the_host_is_told() -> Result<()> {
    let macs = Some(sim_host::Setup::default());
    let mut farm = Farm::start(Setup { macs, slots: 1, time_scale: 10, ..Setup::default() }).await?;
    farm.add_host_worker().await?;
    let mut told = Vec::new();
    for name in ["mini-0", "mini-1"] {
        let spec = json!({
            "shell": "env",
            "env": { "MY": "own" },
            "git": { "commit": "abc", "branch": "main", "dirty": true },
            "timeout_ms": 90_000,
            "labels": { "name": name },
        });
        let (ended, log) = job(&farm, spec).await?;
        assert_eq!(ended["state"], "succeeded", "{ended}");
        let env: BTreeMap<String, String> = log
            .lines()
            .filter_map(|line| line.split_once('='))
            .filter(|(key, _)| {
                key.starts_with("ALLOY") || ["CI", "TZ", "LANG", "TERM", "NSUnbufferedIO", "MY"].contains(key)
            })
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        for (key, value) in [
            ("CI", "true"),
            ("ALLOY", "true"),
            ("TZ", "UTC"),
            ("LANG", "en_US.UTF-8"),
            ("NSUnbufferedIO", "YES"),
            ("MY", "own"),
            ("ALLOY_JOB_ATTEMPT", "1"),
            ("ALLOY_TIMEOUT_SECONDS", "90"),
            ("ALLOY_GIT_COMMIT", "abc"),
            ("ALLOY_GIT_BRANCH", "main"),
            ("ALLOY_GIT_DIRTY", "true"),
            ("ALLOY_WORKER", name),
            ("ALLOY_JOB_ID", ended["id"].as_str().context("an id")?),
        ] {
            assert_eq!(env.get(key).map(String::as_str), Some(value), "{key} on {name}: {env:?}");
        }
        told.push(env.into_keys().collect::<Vec<_>>());
    }
    // By this one the guard on a host knows a job's processes.
    told[1].retain(|key| key != "ALLOY_VM_DIR");
    // And only a VM can have been waiting.
    told[0].retain(|key| key != "ALLOY_VM_SOURCE");
    assert_eq!(told[0], told[1]);
    Ok(())
}
