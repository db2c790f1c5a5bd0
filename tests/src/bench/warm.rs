//! A warm VM against a cold one and against none, by the jobs' own stage timings: simulated Macs that boot as slowly as real
//! ones, and a worker that runs jobs on this machine itself.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::floors::{Floors, quantile};
use super::report::{Better, Row};
use super::{Options, rounds};
use crate::farm::{Farm, Setup};
use crate::observe::{Api, until};
use crate::sim_host::{self, Profile};

const MACS: usize = 2;
const SLOTS: usize = 2;

/// Milliseconds of one job.
struct Seen {
    warm: bool,
    /// From the claim of a slot to the start of the command.
    start: f64,
    /// From the claim of a slot to the end of the command.
    whole: f64,
}

pub async fn rows(options: &Options, floors: &mut Vec<Floors>) -> Result<Vec<Row>> {
    let macs = sim_host::Setup { time_scale: 1.0, ..sim_host::Setup::default() };
    let farm =
        Farm::start(Setup { workers: MACS, slots: SLOTS, time_scale: 1, macs: Some(macs), ..Setup::default() }).await?;
    let host = Farm::start(Setup { workers: 1, slots: SLOTS, time_scale: 1, ..Setup::default() }).await?;
    let tries = if options.quick { 20 } else { 60 };
    let mut start = Row::new("warm VM: slot claim → command start", "ms", Better::Lower, "p50 1 s, p95 2 s");
    start.note = format!("{MACS} simulated Macs of {SLOTS} slots at real boot delays; the jobs' own stages");
    let whole = Row::new(
        "warm VM: slot claim → end of `true`",
        "ms",
        Better::Lower,
        "at most 150 ms more than the host itself",
    );
    let mut rows = [start, whole];
    let mut images = 0;
    rounds(options, floors, &mut rows, async |rows| {
        all_warm(&farm.api()).await;
        // Images that nobody asked for before, so that the pool cannot have learned them.
        let mut jobs = Vec::new();
        for _ in 0..MACS {
            images += 1;
            let name = format!("registry.test/alloy/bench-{images}:latest");
            farm.mac(0).publish(&name, &Profile { pull_seconds: 0.1, ..Profile::default() })?;
            jobs.push(json!({ "argv": ["true"], "image": name }));
        }
        let mut seen = Vec::new();
        for _ in 0..MACS {
            seen.push(one(&farm.api(), json!({ "argv": ["true"] })).await?);
        }
        seen.extend(all(&farm.api(), jobs).await?);
        let mut on_host = Vec::new();
        for _ in 0..tries {
            on_host.push(one(&host.api(), json!({ "argv": ["true"] })).await?);
        }
        for (row, of) in rows.iter_mut().zip([(|seen| seen.start) as fn(&Seen) -> f64, |seen| seen.whole]) {
            row.ours(seen.iter().filter(|seen| seen.warm).map(of).collect());
            row.peer("cold VM", Some(seen.iter().filter(|seen| !seen.warm).map(of).collect()));
            row.peer("host, no VM", Some(on_host.iter().map(of).collect()));
        }
        Ok(())
    })
    .await?;
    rows.iter_mut().for_each(tell);
    Ok(rows.into())
}

/// Adds what the aims ask for: p50, p95, and what a warm hit costs beside none.
fn tell(row: &mut Row) {
    let shown = |samples: &[f64]| format!("p50 {:.0}, p95 {:.0} ms", quantile(samples, 0.5), quantile(samples, 0.95));
    let mut told = vec![format!("warm {}", shown(&row.ours))];
    for (name, samples) in &row.peers {
        let samples = samples.as_deref().unwrap_or_default();
        let more = quantile(&row.ours, 0.5) - quantile(samples, 0.5);
        told.push(format!("{name} {} (warm: {more:+.0} ms)", shown(samples)));
    }
    let told = told.join("; ");
    row.note = if row.note.is_empty() { told } else { format!("{}; {told}", row.note) };
}

async fn all_warm(api: &Api) {
    until("every slot holds a warm VM", async || {
        let list = api.get("/v1/workers").await?;
        let workers = list["workers"].as_array().context("a list")?;
        let warm = |worker: &Value| worker["slots_warm"] == worker["slots"];
        Ok((workers.len() == MACS && workers.iter().all(warm)).then_some(()))
    })
    .await;
}

async fn all(api: &Api, specs: Vec<Value>) -> Result<Vec<Seen>> {
    let mut jobs = JoinSet::new();
    for spec in specs {
        let api = api.clone();
        jobs.spawn(async move { one(&api, spec).await });
    }
    let mut seen = Vec::new();
    while let Some(job) = jobs.join_next().await {
        seen.push(job??);
    }
    Ok(seen)
}

async fn one(api: &Api, spec: Value) -> Result<Seen> {
    let id = api.submit(spec).await?;
    let job = api.end(&id).await;
    ensure!(job["state"] == "succeeded", "{job}");
    let stage = |name: &str| job["timings"][name].as_f64().unwrap_or(0.0);
    let start = stage("vm_ms") + stage("source_ms");
    let warm = job["timings"]["vm"]["warm"].as_bool().context("a VM")?;
    Ok(Seen { warm, start, whole: start + stage("exec_ms") })
}
