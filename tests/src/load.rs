//! Jobs whose log and artifact anybody can compute again from a number, and the check that all of it is there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::farm::bin_dir;
use crate::noise::{blocks, sha256, sha256_of};
use crate::observe::{Api, is_terminal};

/// Of each log, and of each artifact.
pub const LOG: u64 = 50_000;
pub const ARTIFACT: u64 = 300;
/// An answer that takes longer is none.
const ANSWER: Duration = Duration::from_secs(20);

pub fn spec(seed: u64) -> Value {
    let noise = bin_dir().join("noise");
    let noise = noise.display();
    let line = format!("{noise} {seed} {LOG}; {noise} {seed} {ARTIFACT} > result.bin");
    json!({ "spec": { "shell": line, "artifacts": ["=result.bin"] } })
}

/// Submits once, under a key of its own. `None`: it was not acknowledged.
pub async fn submit(api: &Api, seed: u64) -> Option<String> {
    let request = api.request(Method::POST, "/v1/jobs").header("idempotency-key", format!("seed-{seed}"));
    let answer = request.json(&spec(seed)).timeout(ANSWER).send().await.ok()?;
    if !answer.status().is_success() {
        return None;
    }
    Some(answer.json::<Value>().await.ok()?["id"].as_str()?.to_owned())
}

/// The job ends well, and all that it leaves is what it was.
pub async fn check(api: &Api, id: &str, seed: u64) -> Result<Value> {
    let job = api.end(id).await;
    ensure!(job["state"] == "succeeded", "seed {seed}: {job}");
    check_bytes(api, id, seed).await?;
    Ok(job)
}

/// The same for a job whose worker's disk was full for a moment: its log is whole, or it says in the log and beside it what it
/// lacks.
pub async fn check_or_cut(api: &Api, id: &str, seed: u64) -> Result<()> {
    let job = api.end(id).await;
    let warned =
        job["warnings"].as_array().is_some_and(|all| all.iter().any(|one| one.to_string().contains("disk was full")));
    if !warned {
        return check(api, id, seed).await.map(drop);
    }
    ensure!(job["state"] == "succeeded", "seed {seed}: {job}");
    ensure!(
        is_cut_of(&api.log(id).await?, seed),
        "{id}, seed {seed}: its log is cut, and is not what the job wrote less what it names"
    );
    check_artifact(api, id, seed).await
}

/// The log of `seed` with a line that says how many bytes are missing in its place.
fn is_cut_of(log: &[u8], seed: u64) -> bool {
    let whole: Vec<u8> = blocks(seed, LOG).flatten().collect();
    let Some((head, rest)) = split(log, b"\n[alloy: ") else { return false };
    let Some((dropped, rest)) = split(rest, b" bytes of log are left out here, ") else { return false };
    let Some((_, tail)) = split(rest, b"]\n") else { return false };
    let dropped: Option<usize> = std::str::from_utf8(dropped).ok().and_then(|count| count.parse().ok());
    dropped.is_some_and(|dropped| head.len() + dropped + tail.len() == whole.len())
        && whole.starts_with(head)
        && whole.ends_with(tail)
}

fn split<'a>(bytes: &'a [u8], at: &[u8]) -> Option<(&'a [u8], &'a [u8])> {
    let found = bytes.windows(at.len()).position(|window| window == at)?;
    Some((&bytes[..found], &bytes[found + at.len()..]))
}

/// The log and the artifact of a job that has ended.
pub async fn check_bytes(api: &Api, id: &str, seed: u64) -> Result<()> {
    ensure!(sha256_of(&api.log(id).await?) == sha256(seed, LOG), "the log of {id}, seed {seed}");
    check_artifact(api, id, seed).await
}

async fn check_artifact(api: &Api, id: &str, seed: u64) -> Result<()> {
    let artifact = api.request(Method::GET, &format!("/v1/jobs/{id}/artifacts/result.bin")).send().await?;
    ensure!(artifact.status().is_success(), "the artifact of {id}, seed {seed}: {}", artifact.status());
    ensure!(sha256_of(&artifact.bytes().await?) == sha256(seed, ARTIFACT), "the artifact of {id}, seed {seed}");
    Ok(())
}

/// A job as its submitter knows it.
#[derive(Debug, Clone)]
pub struct Known {
    pub id: String,
    pub seed: u64,
    /// Its events, once it was seen to have ended well.
    pub done: Option<Vec<Value>>,
}

/// Jobs without end, a few at a time. Dropping it stops submitting.
pub struct Load {
    known: Arc<Mutex<Vec<Known>>>,
    held: Arc<AtomicBool>,
    tasks: JoinSet<()>,
}

impl Load {
    pub fn on(api: &Api, at_once: u64) -> Load {
        Self::paced(api, at_once, Duration::ZERO)
    }

    /// With a pause after each job. Without one, release programs end a hundred jobs a second, and backups that are taken and
    /// restored again and again grow faster than that is done.
    pub fn paced(api: &Api, at_once: u64, pause: Duration) -> Load {
        let known = Arc::new(Mutex::new(Vec::new()));
        let (held, mut tasks) = (Arc::new(AtomicBool::new(false)), JoinSet::new());
        for lane in 0..at_once {
            let seeds = (1 + lane..).step_by(usize::try_from(at_once).expect("few"));
            tasks.spawn(lane_of_jobs(api.clone(), known.clone(), held.clone(), seeds, pause));
        }
        Load { known, held, tasks }
    }

    /// Submits nothing while it is held.
    pub fn hold(&self, held: bool) {
        self.held.store(held, Ordering::Relaxed);
    }

    /// What was acknowledged by now.
    pub fn known(&self) -> Vec<Known> {
        self.known.lock().expect("nobody panics with it").clone()
    }

    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

async fn lane_of_jobs(
    api: Api,
    known: Arc<Mutex<Vec<Known>>>,
    held: Arc<AtomicBool>,
    seeds: impl Iterator<Item = u64>,
    pause: Duration,
) {
    for seed in seeds {
        while held.load(Ordering::Relaxed) {
            crate::chaos::pause(Duration::from_millis(10)).await;
        }
        let Some(id) = submit(&api, seed).await else {
            crate::chaos::pause(Duration::from_millis(50)).await;
            continue;
        };
        let place = {
            let mut known = known.lock().expect("nobody panics with it");
            known.push(Known { id: id.clone(), seed, done: None });
            known.len() - 1
        };
        if let Ok(events) = ended(&api, &id).await {
            known.lock().expect("nobody panics with it")[place].done = Some(events);
        }
        crate::chaos::pause(pause).await;
    }
}

async fn ended(api: &Api, id: &str) -> Result<Vec<Value>> {
    let job = api.get(&format!("/v1/jobs/{id}?wait=terminal")).await?;
    ensure!(is_terminal(&job) && job["state"] == "succeeded", "{job}");
    let events = api.events(id).await?;
    events.last().filter(|event| event["kind"] == "finished").context("its last event is its end")?;
    Ok(events)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_cut_only_as_it_says() {
        let whole: Vec<u8> = blocks(7, LOG).flatten().collect();
        let cut = |head: usize, named: usize, tail: usize, rest: &str| {
            let line = format!("\n[alloy: {named} bytes of log are left out here, {rest}]\n");
            [&whole[..head], line.as_bytes(), &whole[whole.len() - tail..]].concat()
        };
        let all = whole.len();
        assert!(is_cut_of(&cut(30, all - 50, 20, "its last 20 follow"), 7));
        assert!(is_cut_of(&cut(30, all - 30, 0, "to its end: the disk is full"), 7));
        assert!(!is_cut_of(&cut(30, all - 51, 20, "its last 20 follow"), 7), "a byte is missing");
        assert!(!is_cut_of(&cut(30, all - 50, 20, "its last 20 follow"), 8), "other bytes");
        assert!(!is_cut_of(&whole, 7), "nothing is named");
    }
}
