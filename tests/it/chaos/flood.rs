//! A job that prints without a line end and far beyond the cap: no process grows, other jobs notice nothing, and what is left
//! out is counted to the byte.

use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use alloy_shared::limits::{LOG_CAP, LOG_TAIL};
use alloy_tests::chaos::stage::Stage;
use alloy_tests::chaos::{Dice, pause};
use alloy_tests::farm::{Provider, Setup, bin_dir, full};
use alloy_tests::noise::flood;
use alloy_tests::observe::{BEAT, now};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;

/// A process may grow by this after it has carried so much: by then each connection and each buffer has been used.
const GROWTH: u64 = 32 << 20;
const WARM: u64 = 256 << 20;
const GULP: usize = 1 << 20;

/// Reads a flood and compares it as it comes. Returns all that stands behind the head.
fn compare(mut from: impl Read, head: u64, passed: &AtomicU64) -> Result<Vec<u8>> {
    let (mut at, mut buffer) = (0u64, vec![0; GULP]);
    while at < head {
        let want = usize::try_from(head - at).unwrap_or(GULP).min(GULP);
        from.read_exact(&mut buffer[..want]).with_context(|| format!("{at} bytes came"))?;
        ensure!(buffer[..want] == flood(at, want as u64), "wrong bytes behind {at}");
        at += want as u64;
        passed.store(at, Ordering::Relaxed);
    }
    let mut rest = Vec::new();
    from.read_to_end(&mut rest)?;
    Ok(rest)
}

/// Resident bytes of these processes, in their order.
fn resident(pids: &[i32]) -> Result<Vec<u64>> {
    let list = pids.iter().map(i32::to_string).collect::<Vec<_>>().join(",");
    let out = Command::new("ps").args(["-o", "pid=,rss=", "-p", &list]).output()?;
    let text = String::from_utf8(out.stdout)?;
    let of = |pid: &i32| {
        let mut lines = text.lines().map(str::split_whitespace);
        lines.find_map(|mut words| (words.next()? == pid.to_string()).then(|| words.next()?.parse::<u64>().ok())?)
    };
    Ok(pids.iter().map(|pid| of(pid).unwrap_or(0) * 1024).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_flood_without_a_line_end_grows_no_process_and_is_cut_to_the_byte_undisturbed() -> Result<()> {
    let total: u64 = if full() { 20_000_000_000 } else { 1_200_000_000 };
    let setup = Setup { workers: 1, slots: 2, time_scale: 1, ..Setup::default() };
    let mut stage = Stage::new("flood", setup, Provider::Host, Dice::from_environment()).await?;
    let program = bin_dir().join("noise").display().to_string();
    let mut run = stage.farm.alloy(&["run", "--", &program, "tell", &format!("plain:{total}")]);
    let dir = stage.fresh("flood")?;
    let said = std::fs::File::create(dir.join("err"))?;
    let started = now();
    let mut run = run.current_dir(&dir).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(said).spawn()?;
    let pids =
        [stage.farm.orchestrator().pid(), stage.farm.worker(0).pid(), i32::try_from(run.id()).expect("a pid is small")];
    let (passed, out) = (Arc::new(AtomicU64::new(0)), run.stdout.take().context("a pipe")?);
    let counter = Arc::clone(&passed);
    let reader = tokio::task::spawn_blocking(move || compare(out, LOG_CAP, &counter));

    let (mut warm, mut most, mut samples, mut others) = (None, vec![0; 3], 0, 0);
    while !reader.is_finished() {
        if passed.load(Ordering::Relaxed) >= WARM {
            let sample = resident(&pids)?;
            let base = warm.get_or_insert_with(|| sample.clone()).len();
            most = (0..base).map(|index| most[index].max(sample[index])).collect::<Vec<u64>>();
            samples += 1;
            let (job, _) = stage.submit(&["bytes:2000".to_owned()]).await?;
            let view = stage.settle(&job).await?;
            ensure!(view["attempt"] == 1, "{view}");
            others += 1;
        }
        pause(BEAT).await;
    }
    let rest = reader.await??;
    let status = tokio::task::spawn_blocking(move || run.wait()).await??;
    let told = std::fs::read_to_string(dir.join("err"))?;
    ensure!(status.success(), "{status}: {told}");
    let marker = format!(
        "\n[alloy: {} bytes of log are left out here, its last {LOG_TAIL} follow]\n",
        total - LOG_CAP - LOG_TAIL
    );
    let (line, tail) = rest.split_at(marker.len().min(rest.len()));
    ensure!(line == marker.as_bytes(), "the marker is {:?}", String::from_utf8_lossy(line));
    ensure!(tail == flood(total - LOG_TAIL, LOG_TAIL), "the tail has {} bytes", tail.len());
    let warm = warm.context("it was too fast to be looked at")?;
    let mib = |bytes: &[u64]| bytes.iter().map(|bytes| bytes >> 20).collect::<Vec<_>>();
    println!(
        "{total} bytes in {:?}; resident MiB of orchestrator, worker, alloy: warm {:?}, most {:?} in {samples} samples; {others} other jobs",
        started.elapsed(),
        mib(&warm),
        mib(&most)
    );
    ensure!(samples >= 5 && others >= 5, "{samples} samples");
    for (index, most) in most.iter().enumerate() {
        ensure!(*most <= warm[index] + GROWTH, "{} grew: {warm:?}, {most}", ["orchestrator", "worker", "alloy"][index]);
    }
    let job = stage.unnamed().await?.pop().context("the flood's job")?;
    let view = stage.api().end(&job).await;
    ensure!(view["state"] == json!("succeeded") && view["attempt"] == json!(1), "{view}");
    let dropped = format!("{} bytes in its middle were dropped", total - LOG_CAP - LOG_TAIL);
    ensure!(view["warnings"][0].as_str().is_some_and(|warning| warning.ends_with(&dropped)), "{view}");
    ensure!(told.contains(&dropped), "{told}");
    stage.leave().await
}
