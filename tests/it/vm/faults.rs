//! Every fault of the contract's table 10.4 under a worker of a farm: the table's last column, as the job's owner and the
//! operator see it. That a fault looks as the table says is held by the conformance kit.

mod boot;
mod exec;
mod host;
mod image;

use std::collections::BTreeSet;

use alloy_tests::farm::{Farm, IMAGE, Setup, output};
use alloy_tests::observe::{PATIENCE, until, until_blocking};
use alloy_tests::sim_host::{Entry, FAULTS, SimHost};
use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{all_warm, job, macs, text};

/// A farm of one simulated Mac with one slot, on which this goes wrong from its first moment on.
async fn one(faults: &[Value]) -> Result<Farm> {
    Farm::start(Setup { slots: 1, faults: vec![faults.to_vec()], ..macs() }).await
}

/// Two Macs with one slot each: the first one is ill, the second one well.
async fn ill_and_well(faults: &[Value]) -> Result<Farm> {
    Farm::start(Setup { workers: 2, slots: 1, faults: vec![faults.to_vec()], ..macs() }).await
}

/// A fault that strikes the invocations `skip..skip + times` of a command for one of the worker's VMs.
fn rule(command: &str, fault: &str, skip: u64, times: u64) -> Value {
    json!({ "command": command, "fault": fault, "skip": skip, "times": times })
}

fn with(mut rule: Value, more: Value) -> Value {
    let more = more.as_object().cloned().unwrap_or_default();
    rule.as_object_mut().expect("a rule is an object").extend(more);
    rule
}

/// A job that succeeds at its first attempt, whatever the host suffers meanwhile. Returns what it said.
async fn fine(farm: &Farm, shell: &str) -> Result<String> {
    let ended = job(farm, json!({ "shell": shell })).await?;
    let told = (&ended["state"], &ended["attempt"], &ended["lost"]);
    let id = ended["id"].as_str().context("an id")?;
    assert_eq!(told, (&json!("succeeded"), &json!(1), &json!(0)), "{ended}\n{:#?}", farm.api().events(id).await?);
    Ok(text(&farm.api().log(id).await?))
}

/// Why attempts of a job that has ended were lost: reason and message of each.
async fn losses(farm: &Farm, ended: &Value) -> Result<Vec<(String, String)>> {
    let events = farm.api().events(ended["id"].as_str().context("an id")?).await?;
    let word = |event: &Value, key: &str| event[key].as_str().unwrap_or_default().to_owned();
    let lost = events.iter().filter(|event| event["kind"] == "requeued");
    Ok(lost.map(|event| (word(event, "reason"), word(event, "message"))).collect())
}

/// A job whose first attempt does this and then waits for its end; the second one succeeds.
async fn dies_once(farm: &Farm, first: &str) -> Result<(Value, Vec<(String, String)>)> {
    let shell = format!("if [ \"$ALLOY_JOB_ATTEMPT\" = 1 ]; then echo up; {first}; sleep 600; fi; echo done");
    let ended = job(farm, json!({ "shell": shell })).await?;
    assert_eq!((&ended["state"], &ended["attempt"]), (&json!("succeeded"), &json!(2)), "{ended}");
    let losses = losses(farm, &ended).await?;
    Ok((ended, losses))
}

/// What the farm says of a worker.
async fn worker(farm: &Farm, name: &str) -> Result<Value> {
    let list = farm.api().get("/v1/workers").await?;
    let workers = list["workers"].as_array().context("a list")?;
    workers.iter().find(|worker| worker["name"] == name).cloned().with_context(|| format!("no {name} in {list}"))
}

/// Waits until this worker takes no jobs, and returns why.
async fn drained(farm: &Farm, name: &str) -> String {
    until(&format!("{name} has drained itself"), async || {
        let worker = worker(farm, name).await?;
        let told = worker["trouble"].as_str().filter(|_| worker["state"] == "drained");
        Ok(told.map(str::to_owned))
    })
    .await
}

/// Waits until this worker takes jobs and has no trouble.
async fn well(farm: &Farm, name: &str) {
    until(&format!("{name} is well"), async || {
        let worker = worker(farm, name).await?;
        Ok((worker["state"] == "ready" && worker["trouble"].is_null()).then_some(()))
    })
    .await;
}

/// Clones the workers' image by hand. A worker that writes a VM's settings at that moment makes a clone fail, as on any Mac.
fn clone_by_hand(mac: &SimHost, name: &str) -> Result<()> {
    until_blocking("a VM is cloned by hand", PATIENCE, || {
        mac.tart(&["clone", IMAGE, name]).status().is_ok_and(|status| status.success())
    })
}

/// The invocations of a command, in the order of starting.
fn calls(mac: &SimHost, command: &str) -> Vec<Entry> {
    mac.journal().into_iter().filter(|entry| entry.argv.first().is_some_and(|word| word == command)).collect()
}

const SOURCES: [&str; 4] = [
    include_str!("faults/boot.rs"),
    include_str!("faults/exec.rs"),
    include_str!("faults/host.rs"),
    include_str!("faults/image.rs"),
];

/// `F9, F14: text` → 9 and 14.
fn numbers(what: &str) -> impl Iterator<Item = u32> {
    let head = what.split(':').next().unwrap_or_default();
    head.split(',').filter_map(|word| word.trim().strip_prefix('F')?.parse().ok())
}

#[test]
fn every_fault_that_can_be_injected_has_a_test_of_its_name() {
    let tests = SOURCES.iter().flat_map(|source| source.lines()).filter_map(|line| {
        let name = line.strip_prefix("async fn f").or_else(|| line.strip_prefix("fn f"))?;
        name.split('_').next()?.parse::<u32>().ok()
    });
    let tested: BTreeSet<u32> = tests.collect();
    // The kill of a worker is a test's own act, and what a job says is the job's.
    let injected: BTreeSet<u32> = FAULTS.iter().flat_map(|(_, _, what)| numbers(what)).chain([21, 26]).collect();
    assert_eq!(tested, injected);
    assert_eq!(injected, (1..=26).collect());
    for (command, name, what) in FAULTS {
        let quoted = format!("\"{name}\"");
        assert!(SOURCES.iter().any(|source| source.contains(&quoted)), "no test strikes {command} by {name} ({what})");
    }
}
