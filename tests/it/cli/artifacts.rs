//! Artifacts on their way to the disk: what keeps one out, and what a run that ends early leaves of them.

use std::fs;
use std::path::{Path, PathBuf};

use alloy_tests::farm::{Farm, Setup, output};
use alloy_tests::observe::{PATIENCE, until};
use alloy_tests::process::Daemon;
use alloy_tests::proxy::{Proxy, Then, Way};
use anyhow::Result;
use nix::sys::signal::Signal;

use super::{text, told};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_artifact_that_a_plain_file_keeps_out_is_a_failure() -> Result<()> {
    let farm = Farm::start(Setup::default()).await?;
    let line = "mkdir report; echo page > report/index.html; echo other > other";
    let id = farm.api().submit(serde_json::json!({ "shell": line, "artifacts": ["report/**", "other"] })).await?;
    assert_eq!(farm.api().end(&id).await["state"], "succeeded");
    let dir = farm.scratch("out")?;
    fs::write(dir.join("report"), "mine")?;
    let out = output(farm.alloy(&["artifacts", "get", &id, "-o", &dir.display().to_string()])).await?;
    assert_eq!(out.status.code(), Some(1), "{}", told(&out));
    let said = text(&out.stderr);
    assert!(said.contains("error: `report/index.html` is not written: `report` on the way"), "{}", told(&out));
    assert_eq!((fs::read(dir.join("report"))?, fs::read(dir.join("other"))?), (b"mine".into(), b"other\n".into()));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_that_is_interrupted_leaves_no_half_of_a_file() -> Result<()> {
    let farm = Farm::start(Setup::default()).await?;
    let proxy = Proxy::open(farm.address()).await?;
    let tree = farm.scratch("tree")?;
    // The file is begun, and its bytes never come.
    proxy.trap(Way::Up, "/artifacts/out/app HTTP", 1, Then::HoldReply);
    let mut run = farm.alloy(&["run", "--artifact", "out/app", "-c", "mkdir out; echo x > out/app"]);
    run.env("ORCHESTRATOR_URL", proxy.url()).current_dir(&tree);
    let mut run = Daemon::start("run", run, &farm.scratch("run")?.join("log"))?;
    let part = until("a file is begun", async || part_below(&tree.join("alloy-out"))).await;
    // Until then it would be a wish to cancel.
    until("the job has ended", async || Ok(run.log_text().contains("succeeded").then_some(()))).await;
    run.signal(Signal::SIGINT);
    let status = run.wait(PATIENCE)?;
    assert!(!part.exists(), "{}: {}", part.display(), run.log_text());
    assert_eq!(part_below(&tree.join("alloy-out"))?, None, "{}", run.log_text());
    assert_eq!(status.code(), Some(130), "{}", run.log_text());
    Ok(())
}

fn part_below(dir: &Path) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry?.path();
        if path.extension().is_some_and(|ending| ending == "alloy-part") {
            return Ok(Some(path));
        }
        if path.is_dir()
            && !path.is_symlink()
            && let Some(found) = part_below(&path)?
        {
            return Ok(Some(found));
        }
    }
    Ok(None)
}
