//! A warm VM against a cold one and against none, by the jobs' own stage timings: simulated Macs that boot as slowly as real
//! ones, and a worker that runs jobs on this machine itself.
//!
//! The boots decide how long it takes, so every slot of every Mac boots at once: a wave of jobs takes all warm VMs one after
//! the other, and the next wave waits until all are there again.

use std::fmt::Write as _;
use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::Options;
use super::floors::{self, Floors, quantile};
use super::report::{Better, Row};
use crate::farm::{Farm, Setup};
use crate::observe::Api;
use crate::sim_host::{self, Profile};

const MACS: usize = 4;
/// macOS allows no more guests.
const SLOTS: usize = 2;
/// Jobs on warm VMs, one per slot, and then again when all slots are warm again.
const WAVES: usize = 3;
/// What a warm VM may cost beside the host itself.
const AIM_MS: f64 = 150.0;
/// The jobs' source tree.
const FILES: usize = 20;
const FILE_BYTES: usize = 2_000;

/// Milliseconds of one job.
struct Seen {
    /// None where there is no VM.
    warm: Option<bool>,
    /// From the claim of a slot to the start of the command: the VM and the unpacked tree.
    start: f64,
    /// From the claim of a slot to the end of the command.
    whole: f64,
}

pub async fn rows(options: &Options, floors: &mut Vec<Floors>) -> Result<Vec<Row>> {
    let before = floors::measure()?;
    let waves = if options.quick { 1 } else { WAVES * options.rounds };
    let (hits, misses) = in_vms(waves).await?;
    let on_host = on_host(waves * MACS * SLOTS).await?;
    let after = floors::measure()?;
    let moved = before.moved(&after);
    floors.extend([before, after]);
    let start =
        Row::new("warm VM: slot claim → command start", "ms", Better::Lower, "at most 150 ms more than the host");
    let whole =
        Row::new("warm VM: slot claim → end of `true`", "ms", Better::Lower, "at most 150 ms more than the host");
    let mut rows = [start, whole];
    for (row, of) in rows.iter_mut().zip([(|seen| seen.start) as fn(&Seen) -> f64, |seen| seen.whole]) {
        row.ours(hits.iter().map(of).collect());
        row.peer("cold VM", Some(misses.iter().map(of).collect()));
        row.peer("host, no VM", Some(on_host.iter().map(of).collect()));
        row.note = told(row);
        if moved {
            row.note.push_str("; a floor of the machine moved meanwhile");
        }
    }
    Ok(rows.into())
}

/// What the aim asks for: p50 and p95 of each, and what a warm VM costs beside none.
fn told(row: &Row) -> String {
    let samples = |name: &str| row.peers.get(name).and_then(Option::as_deref).unwrap_or_default();
    let (cold, host) = (samples("cold VM"), samples("host, no VM"));
    let mut told =
        format!("{MACS} simulated Macs of {SLOTS} slots at real boot delays, {FILES} small files of sources");
    for (name, samples) in [("hit", row.ours.as_slice()), ("miss", cold), ("host", host)] {
        let (p50, p95, count) = (quantile(samples, 0.5), quantile(samples, 0.95), samples.len());
        let _ = write!(told, "; {name} p50 {p50:.0} ms, p95 {p95:.0} ms ({count} jobs)");
    }
    let more = [0.5, 0.95].map(|at| quantile(&row.ours, at) - quantile(host, at));
    let verdict = if more.iter().all(|more| *more <= AIM_MS) { "met" } else { "missed" };
    let _ = write!(told, "; hit − host {:+.0} ms at p50, {:+.0} ms at p95: the aim is {verdict}", more[0], more[1]);
    told
}

/// Jobs that find a warm VM, and jobs that find none.
async fn in_vms(waves: usize) -> Result<(Vec<Seen>, Vec<Seen>)> {
    let macs = sim_host::Setup { time_scale: 1.0, ..sim_host::Setup::default() };
    let image = Profile { pull_seconds: 0.1, ..Profile::default() };
    let setup = Setup { workers: MACS, slots: SLOTS, time_scale: 1, image, macs: Some(macs), ..Setup::default() };
    let farm = Farm::start(setup).await?;
    let source = tree(&farm).await?;
    let mut hits = Vec::new();
    for _ in 0..waves {
        farm.all_warm().await;
        for _ in 0..MACS * SLOTS {
            hits.push(one(&farm.api(), json!({ "argv": ["true"] }), &source).await?);
        }
    }
    farm.all_warm().await;
    let mut jobs = JoinSet::new();
    for number in 0..MACS * SLOTS {
        // Nobody asked for this image before, so no pool can have learned to keep it warm.
        let name = format!("registry.test/alloy/bench-{number}:latest");
        farm.mac(0).publish(&name, &Profile { pull_seconds: 0.1, ..Profile::default() })?;
        let (api, source) = (farm.api(), source.clone());
        jobs.spawn(async move { one(&api, json!({ "argv": ["true"], "image": name }), &source).await });
    }
    let mut misses = Vec::new();
    while let Some(job) = jobs.join_next().await {
        misses.push(job??);
    }
    ensure!(hits.iter().all(|seen| seen.warm == Some(true)), "a job of a full pool found no warm VM");
    ensure!(misses.iter().all(|seen| seen.warm == Some(false)), "an image that nobody had was warm");
    Ok((hits, misses))
}

async fn on_host(jobs: usize) -> Result<Vec<Seen>> {
    let farm = Farm::start(Setup { workers: 1, slots: SLOTS, time_scale: 1, ..Setup::default() }).await?;
    let source = tree(&farm).await?;
    let mut seen = Vec::new();
    for _ in 0..jobs {
        seen.push(one(&farm.api(), json!({ "argv": ["true"] }), &source).await?);
    }
    ensure!(seen.iter().all(|seen| seen.warm.is_none()), "a host told of VMs");
    Ok(seen)
}

async fn tree(farm: &Farm) -> Result<Value> {
    let tree = farm.scratch("tree")?;
    for number in 0..FILES {
        fs::write(tree.join(format!("file-{number}")), format!("{number}").repeat(FILE_BYTES))?;
    }
    farm.upload(&tree).await
}

async fn one(api: &Api, spec: Value, source: &Value) -> Result<Seen> {
    let job = api.post("/v1/jobs", &json!({ "spec": spec, "source": source })).await?;
    let job = api.end(job["id"].as_str().context("a job has an id")?).await;
    ensure!(job["state"] == "succeeded", "{job}");
    let stage = |name: &str| job["timings"][name].as_f64().with_context(|| format!("{name}: {job}"));
    let start = stage("vm_ms")? + stage("source_ms")?;
    let warm = job["timings"]["vm"]["warm"].as_bool();
    Ok(Seen { warm, start, whole: start + stage("exec_ms")? })
}
