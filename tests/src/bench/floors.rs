//! What the machine itself costs at this moment: nothing of Alloy's.

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::ms;
use crate::observe::now;

#[derive(Debug, Clone, Copy, Serialize)]
pub struct Floors {
    pub fdatasync_p50_ms: f64,
    pub fdatasync_p99_ms: f64,
    pub pipe_mb_s: f64,
    pub fork_exec_p50_ms: f64,
    pub spin_ms: f64,
}

impl Floors {
    /// True when the machine became another one in between.
    pub fn moved(&self, later: &Floors) -> bool {
        let twice = |a: f64, b: f64| a > 2.0 * b || b > 2.0 * a;
        twice(self.fdatasync_p50_ms, later.fdatasync_p50_ms)
            || twice(self.pipe_mb_s, later.pipe_mb_s)
            || twice(self.fork_exec_p50_ms, later.fork_exec_p50_ms)
            || twice(self.spin_ms, later.spin_ms)
    }
}

pub fn measure() -> Result<Floors> {
    let syncs = fdatasync(60)?;
    let forks = fork_exec(20)?;
    Ok(Floors {
        fdatasync_p50_ms: quantile(&syncs, 0.5),
        fdatasync_p99_ms: quantile(&syncs, 0.99),
        pipe_mb_s: pipe(128 << 20)?,
        fork_exec_p50_ms: quantile(&forks, 0.5),
        spin_ms: spin(),
    })
}

/// The value at a fraction of the sorted samples.
pub fn quantile(samples: &[f64], at: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        count => sorted[((count - 1) as f64 * at).round() as usize],
    }
}

fn fdatasync(times: usize) -> Result<Vec<f64>> {
    let mut file = tempfile::tempfile()?;
    (0..times)
        .map(|_| {
            file.write_all(&[7; 4096])?;
            let started = now();
            file.sync_data()?;
            Ok(ms(started))
        })
        .collect()
}

fn fork_exec(times: usize) -> Result<Vec<f64>> {
    (0..times)
        .map(|_| {
            let started = now();
            Command::new("true").status()?;
            Ok(ms(started))
        })
        .collect()
}

fn pipe(bytes: u64) -> Result<f64> {
    let mut child =
        Command::new("head").arg("-c").arg(bytes.to_string()).arg("/dev/zero").stdout(Stdio::piped()).spawn()?;
    let started = now();
    let mut out = child.stdout.take().context("a pipe")?;
    let mut buffer = vec![0; 64 << 10];
    while out.read(&mut buffer)? > 0 {}
    let rate = bytes as f64 / 1e3 / ms(started);
    child.wait()?;
    Ok(rate)
}

fn spin() -> f64 {
    let started = now();
    let mut state = 1;
    for _ in 0..5_000_000 {
        state = crate::noise::mix(state);
    }
    std::hint::black_box(state);
    ms(started)
}

/// Writes so much into the page cache and lets it go. A virtual machine pays its host for memory that it touches for the
/// first time, or again after it was idle, several times what a copy costs; that is no matter of the programs measured.
pub fn touch(path: &Path, bytes: u64) -> Result<()> {
    let mut file = std::fs::File::create(path)?;
    let block = vec![0; 1 << 20];
    for _ in 0..bytes >> 20 {
        file.write_all(&block)?;
    }
    Ok(std::fs::remove_file(path)?)
}

/// Resident memory of a process.
#[cfg(target_os = "linux")]
pub fn rss_kib(pid: i32) -> Result<f64> {
    let mut text = String::new();
    std::fs::File::open(format!("/proc/{pid}/status"))?.read_to_string(&mut text)?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

#[cfg(not(target_os = "linux"))]
pub fn rss_kib(pid: i32) -> Result<f64> {
    let out = Command::new("ps").args(["-o", "rss=", "-p", &pid.to_string()]).output()?;
    Ok(String::from_utf8(out.stdout)?.trim().parse()?)
}
