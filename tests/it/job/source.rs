//! Sources on workers that have seen nothing of them.

use std::fs;

use alloy_tests::farm::{Farm, Setup, output};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edited_tree_reaches_a_worker_that_has_none_of_it() -> Result<()> {
    let farm = Farm::start(Setup { workers: 2, slots: 1, time_scale: 1, ..Setup::default() }).await?;
    let (api, tree) = (farm.api(), farm.scratch("tree")?);
    for number in 0..9 {
        fs::write(tree.join(format!("file-{number}")), format!("content {number}\n").repeat(20))?;
    }
    let run = async || {
        let mut run = farm.alloy(&["run", "-c", "cat file-*; echo on $ALLOY_WORKER"]);
        run.current_dir(&tree);
        let out = output(run).await?;
        let (log, talk) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        ensure!(out.status.success(), "{}\n{log}\n{talk}", out.status);
        let worker = log.lines().find_map(|line| line.strip_prefix("on ")).context("it tells its worker")?;
        anyhow::Ok((worker.to_owned(), log.contains("edited")))
    };
    let (first, edited) = run().await?;
    assert!(!edited);
    // One frame holds all that the first run sent; the second one wants all of it but one blob.
    fs::write(tree.join("file-4"), "edited\n")?;
    api.post(&format!("/v1/workers/{}/drain", id_of(&farm, &first).await?), &json!({})).await?;
    let (second, edited) = run().await?;
    assert!(edited && second != first, "{first}, then {second}");
    let jobs = api.get("/v1/jobs").await?;
    let jobs = jobs["jobs"].as_array().context("a list")?;
    assert!(jobs.len() == 2 && jobs.iter().all(|job| job["attempt"] == 1), "each at the first try: {jobs:#?}");
    Ok(())
}

async fn id_of(farm: &Farm, name: &str) -> Result<String> {
    let list = farm.api().get("/v1/workers").await?;
    let workers = list["workers"].as_array().context("a list")?;
    let worker = workers.iter().find(|worker| worker["name"] == name).context("a worker of this name")?;
    Ok(worker["id"].as_str().context("an id")?.to_owned())
}
