//! Images of VMs: brought, shown, kept and removed, and what becomes of jobs whose image nobody can get.

use alloy_tests::farm::{Farm, IMAGE, Setup};
use alloy_tests::sim_host::{self, Profile};
use anyhow::Result;
use serde_json::{Value, json};

fn macs() -> Setup {
    Setup { macs: Some(sim_host::Setup::default()), time_scale: 10, slots: 1, ..Setup::default() }
}

async fn job(farm: &Farm, spec: Value) -> Result<Value> {
    let id = farm.api().submit(spec).await?;
    Ok(farm.api().end(&id).await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_record_of_a_job_names_the_digest_that_it_ran() -> Result<()> {
    let farm = Farm::start(macs()).await?;
    let first = farm.mac(0).publish(IMAGE, &Profile::default())?;
    let ended = job(&farm, json!({ "shell": "exit 3" })).await?;
    let shown = (&ended["state"], &ended["image"], &ended["image_digest"]);
    assert_eq!(shown, (&json!("failed"), &json!(IMAGE), &json!(first)), "{ended}");
    assert!(ended["vm_source"].is_string(), "{ended}");
    Ok(())
}
