//! How a run ends that loses the farm when there is a job already, or may be one: never as if nothing had run.

use alloy_tests::farm::{Farm, Setup, output};
use alloy_tests::observe::{PATIENCE, until};
use alloy_tests::process::Daemon;
use alloy_tests::proxy::{Proxy, Then, Way};
use anyhow::{Context as _, Result};
use reqwest::Method;
use serde_json::json;

use super::{text, told};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_whose_submit_is_never_answered_says_that_the_farm_may_have_the_job() -> Result<()> {
    let mut farm = Farm::orchestrator_only(Setup::default()).await?;
    farm.leaves_live_jobs = true;
    let proxy = Proxy::open(farm.address()).await?;
    let replies = proxy.trap(Way::Up, "POST /v1/jobs HTTP", u64::MAX, Then::DropReply);
    let mut run = farm.alloy(&["run", "-c", "true"]);
    run.env("ORCHESTRATOR_URL", proxy.url()).current_dir(farm.scratch("empty")?);
    let out = output(run).await?;
    let stderr = text(&out.stderr);
    assert_eq!(out.status.code(), Some(7), "{}", told(&out));
    assert!(stderr.contains("error: the farm may have the job"), "{}", told(&out));
    assert!(stderr.contains("hint: alloy list ") && !stderr.contains("alloy up"), "{}", told(&out));
    assert!(replies.borrow().answered > 1, "it was sent again: {}", told(&out));
    let jobs = farm.api().get("/v1/jobs").await?;
    assert_eq!(jobs["jobs"].as_array().map(Vec::len), Some(1), "it has it: {jobs}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_is_let_in_no_more_while_its_job_runs_does_not_end_as_if_nothing_ran() -> Result<()> {
    let farm = Farm::start(Setup::default()).await?;
    let proxy = Proxy::open(farm.address()).await?;
    let api = farm.api();
    let token = api.post("/v1/tokens", &json!({ "name": "ci", "role": "developer" })).await?;
    let mut run = farm.alloy(&["run", "-c", "echo up; sleep 600"]);
    run.env("ORCHESTRATOR_URL", proxy.url()).env("ALLOY_TOKEN", token["token"].as_str().context("a token")?);
    let mut run = Daemon::start("run", run, &farm.scratch("run")?.join("log"))?;
    until("the job runs", async || Ok(run.log_text().contains("up\n").then_some(()))).await;
    let path = format!("/v1/tokens/{}", token["view"]["id"].as_str().context("an id")?);
    api.request(Method::DELETE, &path).send().await?.error_for_status()?;
    proxy.break_all();
    let status = run.wait(PATIENCE)?;
    assert_eq!(status.code(), Some(4), "{}", run.log_text());
    assert!(run.log_text().contains("hint: alloy attach job_"), "{}", run.log_text());
    let jobs = api.get("/v1/jobs").await?;
    assert_eq!(jobs["jobs"][0]["state"], "running", "{jobs}");
    let id = jobs["jobs"][0]["id"].as_str().context("an id")?;
    api.post(&format!("/v1/jobs/{id}/cancel"), &json!({})).await?;
    assert_eq!(api.end(id).await["state"], "canceled");
    Ok(())
}
