//! A job's own network policy: put in force and confirmed at the filter before anything of the job runs, or no run at all.

use alloy_tests::farm::{Farm, Setup, output};
use alloy_tests::sim_host::Policy;
use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{all_warm, job, macs, text};

/// What the guest itself can tell: its name, and that it reaches nobody, not even the host that it runs on. The simulated
/// guest has no network card whatever the policy is, so the filter's own word is what these tests hold.
const LOOK: &str = "hostname; export LC_ALL=C; perl -MSocket -e 'socket(S,AF_INET,SOCK_STREAM,0); \
                    print \"reached\\n\" if connect(S,sockaddr_in(53,inet_aton(\"192.0.2.1\")))'; true";

/// Runs a job with this policy and returns what its VM's filter had in force when the command ran.
async fn policy(farm: &Farm, network: Value) -> Result<Policy> {
    let ended = job(farm, json!({ "shell": LOOK, "network": network })).await?;
    assert_eq!((&ended["state"], &ended["attempt"]), (&json!("succeeded"), &json!(1)), "{ended}");
    let said = text(&farm.api().log(ended["id"].as_str().context("an id")?).await?);
    farm.mac(0).softnet_policy(said.trim()).with_context(|| format!("no filter of `{said}`"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_job_has_the_policy_that_it_asks_for_in_a_vm_that_was_warm_before() -> Result<()> {
    let farm = Farm::start(Setup { slots: 1, ..macs() }).await?;
    let everybody = vec!["0.0.0.0/0".to_owned()];
    let some = vec!["10.0.0.0/8".to_owned(), "192.168.7.1/32".to_owned()];
    for (asked, allow, block) in [
        (json!("none"), vec![], everybody.clone()),
        (json!({ "allow": some.clone() }), some, everybody),
        (json!("default"), vec![], vec![]),
    ] {
        all_warm(&farm).await;
        let found = policy(&farm, asked.clone()).await?;
        // Set once: when the VM was claimed.
        assert_eq!((&found.allow, &found.block, found.sets), (&allow, &block, 1), "{asked}");
    }
    // No policy stands in a command line, and no VM is started with less than this.
    let runs = farm.mac(0).journal().into_iter().filter(|entry| entry.argv.first().is_some_and(|word| word == "run"));
    let mut seen = 0;
    for run in runs {
        let [_, vm, options @ ..] = run.argv.as_slice() else { panic!("{:?}", run.argv) };
        assert!(vm.starts_with("alloy-"), "{vm}");
        let plain: Vec<&str> = options.iter().filter(|word| !word.starts_with("--dir=inbox:")).map(|w| &**w).collect();
        let wanted = "--no-graphics --no-audio --no-clipboard --root-disk-opts=sync=none --net-softnet \
                      --net-softnet-control-fd=100";
        assert_eq!((plain.join(" ").as_str(), options.len() - plain.len()), (wanted, 1));
        seen += 1;
    }
    assert!(seen >= 3, "{seen}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_whose_policy_is_not_confirmed_runs_elsewhere_or_nowhere() -> Result<()> {
    let ill = vec![json!({ "command": "softnet", "fault": "conflict", "times": 0 })];
    let farm = Farm::start(Setup { workers: 2, slots: 1, faults: vec![ill], ..macs() }).await?;
    for _ in 0..3 {
        let ended = job(&farm, json!({ "shell": "hostname", "network": "none" })).await?;
        assert_eq!(ended["state"], "succeeded", "{ended}");
        assert_eq!(ended["worker_name"], "mini-1", "{ended}");
        let said = text(&farm.api().log(ended["id"].as_str().context("an id")?).await?);
        let found = farm.mac(1).softnet_policy(said.trim()).with_context(|| format!("no filter of `{said}`"))?;
        assert_eq!((found.allow.len(), found.block.as_slice()), (0, &["0.0.0.0/0".to_owned()][..]));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_without_vms_is_not_given_a_job_with_a_policy_of_its_own() -> Result<()> {
    let mut farm = Farm::start(Setup { slots: 1, ..macs() }).await?;
    farm.add_host_worker().await?;
    let api = farm.api();
    let mut ids = Vec::new();
    for _ in 0..3 {
        ids.push(api.submit(json!({ "shell": "true", "network": "none" })).await?);
    }
    for id in &ids {
        let ended = api.end(id).await;
        assert_eq!((&ended["state"], &ended["worker_name"]), (&json!("succeeded"), &json!("mini-0")), "{ended}");
    }
    farm.stop_worker(0)?;
    let id = api.submit(json!({ "shell": "true", "network": "none" })).await?;
    let waits = api.job(&id).await?;
    let why = waits["waiting_reason"].as_str().unwrap_or_default();
    assert!(waits["state"] == "queued" && why.contains("network policy of its own"), "{waits}");
    api.post(&format!("/v1/jobs/{id}/cancel"), &json!({})).await?;
    api.end(&id).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_farm_without_vms_refuses_a_policy_at_once_and_a_wrong_one_is_told_by_its_field() -> Result<()> {
    let farm = Farm::start(Setup { slots: 1, ..Setup::default() }).await?;
    let submit = async |network: Value| {
        farm.api().try_post("/v1/jobs", &json!({ "spec": { "shell": "true", "network": network } })).await
    };
    let (status, problem) = submit(json!("none")).await?;
    assert_eq!((status.as_u16(), problem["code"].as_str()), (422, Some("no_such_worker")), "{problem}");
    assert!(problem["message"].as_str().is_some_and(|text| text.contains("network policy of its own")), "{problem}");
    for (wrong, field, says) in [
        (json!({ "allow": ["10.0.0.0/8", "10.1.2.3"] }), "network.allow[1]", "write 10.1.2.3/32"),
        (json!({ "allow": [] }), "network.allow", "none"),
        (json!("off"), "spec.network", "none"),
        (json!({ "allow": "10.0.0.0/8" }), "spec.network", "a list"),
        (json!({ "deny": [] }), "spec.network", "allow"),
    ] {
        let (status, problem) = submit(wrong.clone()).await?;
        let error = &problem["errors"][0];
        assert!(status.is_client_error(), "{wrong}: {problem}");
        assert!(error["field"].as_str().is_some_and(|told| told.starts_with(field)), "{wrong}: {problem}");
        assert!(error["message"].as_str().is_some_and(|told| told.contains(says)), "{wrong}: {problem}");
    }
    let out = output(farm.alloy(&["run", "--network", "none", "-c", "true"])).await?;
    assert_eq!(out.status.code(), Some(125), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains("network policy of its own"), "{}", text(&out.stderr));
    for (wrong, says) in [("off", "allow=10.1.0.0/16"), ("allow=10.1.2.3/8", "write 10.0.0.0/8"), ("allow=", "range 1")]
    {
        let out = output(farm.alloy(&["run", "--network", wrong, "-c", "true"])).await?;
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{wrong}: {said}");
        assert!(said.contains("--network") && said.contains(says), "{wrong}: {said}");
    }
    Ok(())
}
