//! What a farm's logs, files and answers tell.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

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
