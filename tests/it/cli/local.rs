//! `--local`: a farm for the length of a command, and what it leaves behind, also when it is killed.

use std::fs;

use alloy_tests::farm::{Farm, Setup, output};
use anyhow::{Context as _, Result};

use super::{Alone, text, told};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_local_run_does_not_touch_the_identity_of_a_joined_worker() -> Result<()> {
    let (farm, alone) = (Farm::orchestrator_only(Setup::default()).await?, Alone::new()?);
    let out = output(alone.alloy(&["run", "--local", "-c", "true"])).await?;
    assert_eq!(out.status.code(), Some(0), "{}", told(&out));
    let out = output(alone.alloy(&["worker", "run", "--provider", "host"])).await?;
    assert_eq!(out.status.code(), Some(1), "{}", told(&out));
    assert!(text(&out.stderr).contains("worker join"), "{}", told(&out));

    let invite = farm.api().post("/v1/workers/invites", &serde_json::json!({})).await?;
    let token = invite["token"].as_str().context("an invitation has a token")?;
    let out = output(alone.alloy(&["worker", "join", &farm.url(), token, "--name", "joined"])).await?;
    assert_eq!(out.status.code(), Some(0), "{}", told(&out));
    let identity = alone.data().join("worker/identity.json");
    let joined = fs::read(&identity)?;
    let out = output(alone.alloy(&["run", "--local", "-c", "true"])).await?;
    assert_eq!(out.status.code(), Some(0), "{}", told(&out));
    assert_eq!(fs::read(&identity)?, joined);
    Ok(())
}
