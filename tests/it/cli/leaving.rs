//! How a run ends early: a cancel that meets an outage, a reader that leaves.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use alloy_tests::farm::{Farm, Setup};
use alloy_tests::observe::{PATIENCE, until};
use alloy_tests::process::Daemon;
use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;

use super::told;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_that_meets_an_outage_is_sent_again_until_it_arrives() -> Result<()> {
    let mut farm = Farm::start(Setup::default()).await?;
    let run = farm.alloy(&["run", "-c", "echo up; sleep 600"]);
    let mut run = Daemon::start("run", run, &farm.scratch("run")?.join("log"))?;
    until("the job runs", async || Ok(run.log_text().contains("up\n").then_some(()))).await;
    farm.kill_orchestrator();
    run.signal(Signal::SIGTERM);
    until("the cancel did not arrive", async || Ok(run.log_text().contains("not heard").then_some(()))).await;
    farm.start_orchestrator().await?;
    let status = run.wait(PATIENCE)?;
    assert_eq!(status.code(), Some(130), "{}", run.log_text());
    let jobs = farm.api().get("/v1/jobs").await?;
    assert_eq!(jobs["jobs"][0]["state"], "canceled", "{}", run.log_text());
    let reconnecting = run.log_text().matches("reconnecting").count();
    assert_eq!(reconnecting, 1, "an outage is one line: {}", run.log_text());
    farm.all_connected().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_whose_reader_leaves_is_canceled_and_its_end_is_waited_for() -> Result<()> {
    let farm = Farm::start(Setup::default()).await?;
    let mut run = farm.alloy(&["run", "-c", "while :; do echo line; sleep 0.05; done"]);
    let mut child = run.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("a pipe")?).read_line(&mut line)?;
    assert_eq!(line, "line\n");
    let out = tokio::task::spawn_blocking(move || child.wait_with_output()).await??;
    assert_eq!(out.status.code(), Some(130), "{}", told(&out));
    assert!(super::text(&out.stderr).contains("Nobody reads standard output"), "{}", told(&out));
    let jobs = farm.api().get("/v1/jobs").await?;
    assert_eq!(jobs["jobs"][0]["state"], "canceled", "{}", told(&out));
    Ok(())
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_whose_output_cannot_be_written_is_canceled() -> Result<()> {
    let farm = Farm::start(Setup::default()).await?;
    let mut run = farm.alloy(&["run", "-c", "while :; do echo line; sleep 0.05; done"]);
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full")?;
    let child = run.stdin(Stdio::null()).stdout(full).stderr(Stdio::piped()).spawn()?;
    let out = tokio::task::spawn_blocking(move || child.wait_with_output()).await??;
    assert_eq!(out.status.code(), Some(130), "{}", told(&out));
    assert!(super::text(&out.stderr).contains("No space left"), "{}", told(&out));
    let jobs = farm.api().get("/v1/jobs").await?;
    assert_eq!(jobs["jobs"][0]["state"], "canceled", "{}", told(&out));
    Ok(())
}

/// Whoever reads from a command and leaves early gets no word of it, and an exit code that is no error's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_leaves_ends_what_only_prints_without_a_word() -> Result<()> {
    let farm = Farm::start(Setup::default()).await?;
    let id = farm.api().shell("seq 1 300000").await?;
    farm.api().end(&id).await;
    for args in [&["logs", &id][..], &["list"], &["status", &id], &["--json", "list"], &["worker", "list"]] {
        let mut command = farm.alloy(args);
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        let child = command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped()).spawn()?;
        drop(command);
        let out = tokio::task::spawn_blocking(move || child.wait_with_output()).await??;
        assert_eq!(out.status.code(), Some(141), "{args:?}: {}", told(&out));
        assert!(!super::text(&out.stderr).contains("error"), "{args:?}: {}", told(&out));
    }
    Ok(())
}
