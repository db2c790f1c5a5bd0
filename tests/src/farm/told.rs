//! What a farm's logs, files and answers tell.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::farm::output;
use crate::observe::{Api, is_terminal};

/// The address in the last line that tells it.
pub fn told_address(log: &str) -> Option<SocketAddr> {
    let (_, rest) = log.rsplit_once("listening on http://")?;
    rest.split([',', ' ', '\n']).next()?.parse().ok()
}

pub(super) fn read_token(farm_dir: &Path) -> Option<String> {
    let text = fs::read_to_string(farm_dir.join("admin.token")).ok()?;
    let token = text.trim();
    (!token.is_empty()).then(|| token.to_owned())
}

/// VM directories of the host provider that still exist.
pub fn vm_dirs(worker_dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(worker_dir.join("vms")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// Sends a tree as `curl` would, and returns its digest for a job to name.
pub async fn upload_tree(api: &Api, tree: &Path) -> Result<Value> {
    let mut tar = Command::new("tar");
    tar.args(["-c", "."]).current_dir(tree);
    let out = output(tar).await?;
    let request = api.request(reqwest::Method::POST, "/v1/sources");
    let answer = request.header("content-type", "application/x-tar").body(out.stdout).send().await?;
    let told: Value = answer.json().await?;
    ensure!(told["digest"].is_string(), "{told}");
    Ok(told["digest"].clone())
}

/// Asks from a thread of its own: `Drop` may run inside a runtime.
pub(super) fn live_jobs(api: Api) -> Result<Vec<Value>> {
    let ask = move || -> Result<Vec<Value>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let page = runtime.block_on(api.get("/v1/jobs?limit=200"))?;
        let jobs = page["jobs"].as_array().context("a page of jobs")?;
        Ok(jobs.iter().filter(|job| !is_terminal(job)).cloned().collect())
    };
    match std::thread::spawn(ask).join() {
        Ok(found) => found,
        Err(_) => bail!("asking for live jobs panicked"),
    }
}
