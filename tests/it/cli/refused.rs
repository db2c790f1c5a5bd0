//! How a run ends that never becomes a job.

use std::fs;
use std::path::Path;
use std::process::Output;

use alloy_tests::farm::{Farm, Setup, output};
use anyhow::Result;

use super::{Alone, text, told};

async fn run_in(farm: &Farm, tree: &Path) -> Result<Output> {
    let mut run = farm.alloy(&["run", "-c", "true"]);
    run.current_dir(tree);
    output(run).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_ends_a_run_at_once_whether_or_not_there_is_a_tree_to_send() -> Result<()> {
    let farm = Farm::orchestrator_only(Setup { disk_floor_mib: 1 << 40, ..Setup::default() }).await?;
    let (empty, tree) = (farm.scratch("empty")?, farm.scratch("tree")?);
    fs::write(tree.join("file"), "the farm does not have this")?;
    for dir in [empty, tree] {
        let out = run_in(&farm, &dir).await?;
        let stderr = text(&out.stderr);
        assert_eq!(out.status.code(), Some(125), "{}", told(&out));
        assert!(stderr.contains("error: the farm's disk is full\n"), "{}", told(&out));
        assert!(stderr.contains("  hint: "), "{}", told(&out));
        assert!(!stderr.contains("warning") && !stderr.contains("reconnect"), "{}", told(&out));
        assert!(!stderr.contains('\u{fffd}'), "{}", told(&out));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_local_run_in_an_image_is_refused_each_time() -> Result<()> {
    let alone = Alone::new()?;
    for round in 0..6 {
        let out = output(alone.alloy(&["run", "--local", "--image", "foo", "-c", "true"])).await?;
        let stderr = text(&out.stderr);
        assert_eq!(out.status.code(), Some(125), "{round}: {}", told(&out));
        assert!(stderr.contains("error: no worker can get the image foo: "), "{round}: {}", told(&out));
        assert!(stderr.contains("it brings no images and runs jobs in `host`"), "{round}: {}", told(&out));
    }
    let list = output(alone.alloy(&["list", "--local", "--json"])).await?;
    assert!(text(&list.stdout).contains(r#""jobs":[]"#), "no job came of it: {}", told(&list));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_farm_that_speaks_no_tls_is_told_at_once() -> Result<()> {
    let farm = Farm::orchestrator_only(Setup::default()).await?;
    let tree = farm.scratch("tree")?;
    fs::write(tree.join("file"), "content")?;
    let url = farm.url().replace("http://", "https://");
    let mut run = farm.alloy(&["run", "--url", &url, "-c", "true"]);
    run.current_dir(&tree);
    let out = output(run).await?;
    let stderr = text(&out.stderr);
    assert_eq!(out.status.code(), Some(125), "{}", told(&out));
    assert!(stderr.contains("it speaks no TLS there\n"), "{}", told(&out));
    assert!(stderr.contains(&format!("hint: {} may be its address", farm.url())), "{}", told(&out));
    assert!(!stderr.contains("waiting for it"), "{}", told(&out));
    Ok(())
}
