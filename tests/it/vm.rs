//! Jobs in VMs: a worker with the `tart` provider on a simulated Mac.

mod chaos;
mod faults;
mod network;

use std::collections::BTreeSet;
use std::fs;
use std::process::Output;

use alloy_tests::farm::{Farm, IMAGE, Setup, full, output};
use alloy_tests::observe::until;
use alloy_tests::sim_host::{self, Profile};
use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const OTHER: &str = "registry.test/alloy/other:latest";

fn macs() -> Setup {
    Setup { macs: Some(sim_host::Setup::default()), time_scale: 10, ..Setup::default() }
}

/// `alloy run ARGS` in an empty tree.
async fn run(farm: &Farm, args: &[&str]) -> Result<Output> {
    let tree = farm.scratch("tree")?;
    let mut command = farm.alloy(&[&["run"], args].concat());
    command.current_dir(tree);
    output(command).await
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

async fn job(farm: &Farm, spec: Value) -> Result<Value> {
    let id = farm.api().submit(spec).await?;
    Ok(farm.api().end(&id).await)
}

async fn all_warm(farm: &Farm) {
    farm.all_warm().await;
}

/// Waits until the worker has so many slots, all warm, and at most `left` of the VMs that it had before.
async fn changed(farm: &Farm, slots: u64, before: &BTreeSet<String>, left: usize) {
    let api = farm.api();
    until("the pool is as it is wished", async || {
        let list = api.get("/v1/workers").await?;
        let worker = &list["workers"][0];
        let is_full = worker["slots"] == slots && worker["slots_warm"] == slots;
        Ok((is_full && farm.mac(0).vms().intersection(before).count() <= left).then_some(()))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_runs_in_a_vm_with_its_tree_and_brings_back_its_files() -> Result<()> {
    let farm = Farm::start(macs()).await?;
    let tree = farm.scratch("tree")?;
    fs::write(tree.join("in put.txt"), "from the tree\n")?;
    let line = r#"hostname; pwd; cat 'in put.txt'; mkdir -p out/deep; printf 'made\n' > 'out/deep/a file'; ln -s deep out/link; echo err >&2; exit 7"#;
    let out = run(&farm, &["--artifact", "out", "-c", line]).await?;
    assert_eq!(out.status.code(), Some(7), "{}", text(&out.stderr));
    let said = text(&out.stdout);
    let (name, rest) = said.split_once('\n').context("a host name")?;
    assert!(name.starts_with("alloy-"), "{name}");
    assert_eq!(rest, "/Users/admin/workspace\nfrom the tree\nerr\n");
    let got = tree.join("alloy-out/latest/out");
    assert_eq!(fs::read_to_string(got.join("deep/a file"))?, "made\n");
    assert_eq!(fs::read_link(got.join("link"))?.to_str(), Some("deep"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_a_job_is_left_for_the_next_ones() -> Result<()> {
    let farm = Farm::start(Setup { slots: 1, ..macs() }).await?;
    let leave = "export LC_ALL=C; touch ~/left /tmp/left /usr/local/left; (setsid sleep 98765 &); (setsid perl -MSocket -e 'socket(S,AF_INET,SOCK_STREAM,0);bind(S,sockaddr_in(7999,INADDR_ANY));listen(S,1);sleep 9999' &); sleep 0.2; echo done";
    let left = job(&farm, json!({ "shell": leave })).await?;
    assert_eq!(left["state"], "succeeded", "{left}");
    let look = "export LC_ALL=C; ls ~/left /tmp/left /usr/local/left 2>/dev/null; pgrep -f '9876[5]'; perl -MSocket -e 'socket(S,AF_INET,SOCK_STREAM,0);print \"port\" if connect(S,sockaddr_in(7999,INADDR_LOOPBACK))'; ls -A; true";
    for round in 0..if full() { 200 } else { 5 } {
        let out = run(&farm, &["-c", look]).await?;
        assert_eq!(
            (out.status.code(), text(&out.stdout).as_str()),
            (Some(0), ""),
            "round {round}: {}",
            text(&out.stderr)
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_without_the_agent_is_reached_by_ssh() -> Result<()> {
    let farm = Farm::start(Setup { slots: 1, image: Profile::vanilla(), ..macs() }).await?;
    fs::write(farm.scratch("tree")?.join("file"), "tree\n")?;
    let out =
        run(&farm, &["--artifact", "made", "-c", "cat file; echo it\\'s; head -c 300000 /dev/zero > made; exit 3"])
            .await?;
    assert_eq!((out.status.code(), text(&out.stdout).as_str()), (Some(3), "tree\nit's\n"), "{}", text(&out.stderr));
    assert_eq!(fs::metadata(farm.scratch("tree")?.join("alloy-out/latest/made"))?.len(), 300_000);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_dies_under_a_job_costs_another_try_and_not_the_job() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let flag = dir.path().join("now");
    let first = json!({ "command": "run", "vm": "alloy-*", "times": 1, "fault": "die", "how": "crash", "at": "agent", "file": flag });
    let farm = Farm::start(Setup { slots: 1, faults: vec![vec![first]], ..macs() }).await?;
    let spec = json!({ "shell": "echo \"$ALLOY_JOB_ATTEMPT\"; [ \"$ALLOY_JOB_ATTEMPT\" = 1 ] && sleep 600; true" });
    let api = farm.api();
    let id = api.submit(spec).await?;
    api.log_has(&id, "1\n").await;
    fs::write(&flag, "")?;
    let ended = api.end(&id).await;
    assert_eq!((&ended["state"], &ended["attempt"]), (&json!("succeeded"), &json!(2)), "{ended}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_whose_image_nobody_keeps_warm_is_told_why_it_waits() -> Result<()> {
    let farm = Farm::start(macs()).await?;
    farm.mac(0).publish(OTHER, &Profile::default())?;
    all_warm(&farm).await;
    let ended = job(&farm, json!({ "shell": "true", "image": OTHER })).await?;
    let stages = &ended["timings"]["vm"];
    assert_eq!((&stages["warm"], &stages["why"]), (&json!(false), &json!("no_warm_vm")), "{ended}");
    assert!(stages["pull_ms"].is_u64(), "{ended}");
    let made: u64 =
        ["pull_ms", "clone_ms", "boot_ms", "agent_ms", "clock_ms"].iter().filter_map(|s| stages[s].as_u64()).sum();
    assert!(made <= ended["timings"]["vm_ms"].as_u64().context("vm_ms")? + 3, "{ended}");
    let id = ended["id"].as_str().context("an id")?;
    let events = farm.api().events(id).await?;
    let told = events.iter().find(|event| event["phase"] == "executing").context("it ran")?;
    let told = told["message"].as_str().context("a word about the VM")?;
    assert!(told.starts_with("in a cold VM after ") && told.contains(": no warm VM of this image (clone "), "{told}");
    let status = text(&output(farm.alloy(&["status", id])).await?.stdout);
    assert!(
        status.contains("cold: no warm VM of this image") && status.contains("(pull ") && status.contains(", clone "),
        "{status}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_says_whether_its_vm_was_warm_and_on_a_host_nothing_of_vms() -> Result<()> {
    let farm = Farm::start(macs()).await?;
    farm.mac(0).publish(OTHER, &Profile::default())?;
    all_warm(&farm).await;
    for (args, how, words) in [
        (&[][..], "started in a warm VM after ", None),
        (&["--image", OTHER], "started in a cold VM after ", Some(": no warm VM of this image (clone ")),
    ] {
        let out = run(&farm, &[args, &["-c", "true"]].concat()).await?;
        let said = text(&out.stderr);
        let line = said.lines().find(|line| line.contains(how)).with_context(|| said.clone())?;
        assert!(words.is_none_or(|words| line.contains(words)), "{said}");
        assert!(said.find(" running on mini-0").context("where")? < said.find(how).context("how")?, "{said}");
    }
    let host = Farm::start(Setup::default()).await?;
    let out = run(&host, &["-c", "true"]).await?;
    let said = text(&out.stderr);
    assert!(said.contains(" running on mini-0") && !said.contains("started"), "{said}");
    let out = run(&host, &["--json", "-c", "env"]).await?;
    let status = output(host.alloy(&["status"])).await?;
    let everything = [out.stdout, out.stderr, status.stdout].map(|bytes| text(&bytes)).concat();
    assert!(everything.contains("succeeded") && everything.contains("vm_ms"), "{everything}");
    for word in ["warm", "cold", "vm_source", "VM_SOURCE", r#""vm":"#] {
        assert!(!everything.contains(word), "{word}: {everything}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_is_asked_for_again_and_again_is_kept_warm() -> Result<()> {
    let farm = Farm::start(macs()).await?;
    farm.mac(0).publish(OTHER, &Profile::default())?;
    let spec = json!({ "shell": "true", "image": OTHER });
    for _ in 0..3 {
        assert_eq!(job(&farm, spec.clone()).await?["state"], "succeeded");
    }
    all_warm(&farm).await;
    let ended = job(&farm, spec).await?;
    assert_eq!((&ended["image"], &ended["timings"]["vm"]["warm"]), (&json!(OTHER), &json!(true)), "{ended}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_floor_keeps_an_image_warm_that_nobody_asked_for() -> Result<()> {
    let mut farm = Farm::start(macs()).await?;
    farm.mac(0).publish(OTHER, &Profile::default())?;
    all_warm(&farm).await;
    let before = farm.mac(0).vms();
    farm.configure_worker(0, 2, IMAGE, &format!("min_idle = \"{OTHER}=1\""))?;
    farm.worker(0).signal(Signal::SIGHUP);
    changed(&farm, 2, &before, 1).await;
    let ended = job(&farm, json!({ "shell": "true", "image": OTHER })).await?;
    assert_eq!(ended["timings"]["vm"]["warm"], true, "{ended}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_image_and_size_count_without_a_restart_and_running_jobs_notice_nothing() -> Result<()> {
    let mut farm = Farm::start(macs()).await?;
    farm.mac(0).publish(OTHER, &Profile::default())?;
    all_warm(&farm).await;
    let (api, before) = (farm.api(), farm.mac(0).vms());
    let id = api.submit(json!({ "shell": "echo here; sleep 5; echo done" })).await?;
    api.log_has(&id, "here\n").await;
    farm.configure_worker(0, 1, OTHER, "")?;
    farm.worker(0).signal(Signal::SIGHUP);
    let ended = api.end(&id).await;
    assert_eq!((&ended["state"], &ended["attempt"]), (&json!("succeeded"), &json!(1)), "{ended}");
    changed(&farm, 1, &before, 0).await;
    assert_eq!(farm.mac(0).vms().len(), 1);
    let ended = job(&farm, json!({ "shell": "true" })).await?;
    assert_eq!((&ended["image"], &ended["timings"]["vm"]["warm"]), (&json!(OTHER), &json!(true)), "{ended}");
    farm.configure_worker(0, 2, OTHER, "")?;
    farm.worker(0).signal(Signal::SIGHUP);
    changed(&farm, 2, &before, 0).await;
    assert_eq!(farm.mac(0).vms().len(), 2);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_killed_with_its_vms_starts_clean() -> Result<()> {
    let mut farm = Farm::start(macs()).await?;
    all_warm(&farm).await;
    let before = farm.mac(0).vms();
    assert!(!before.is_empty());
    farm.kill_worker(0);
    farm.start_worker(0)?;
    let mac = farm.mac(0);
    until("two new VMs stand where the old ones stood", async || {
        let now = mac.vms();
        Ok((now.len() == 2 && now.is_disjoint(&before)).then_some(()))
    })
    .await;
    all_warm(&farm).await;
    assert_eq!(farm.mac(0).vms().len(), 2);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_warm_vm_has_its_filter_and_its_image_on_record() -> Result<()> {
    let farm = Farm::start(macs()).await?;
    all_warm(&farm).await;
    let ended = job(&farm, json!({ "shell": "echo \"$ALLOY_VM_SOURCE $ALLOY_IMAGE\"" })).await?;
    let id = ended["id"].as_str().context("an id")?;
    assert_eq!(text(&farm.api().log(id).await?), format!("warm {IMAGE}\n"));
    let stages = &ended["timings"]["vm"];
    assert_eq!((&stages["warm"], &stages["why"]), (&json!(true), &Value::Null), "{ended}");
    assert!(stages["pull_ms"].is_null(), "{ended}");
    for stage in ["clone_ms", "boot_ms", "agent_ms", "clock_ms"] {
        assert!(stages[stage].is_u64(), "{stage}: {ended}");
    }
    let runs: Vec<_> =
        farm.mac(0).journal().into_iter().filter(|entry| entry.argv.iter().any(|arg| arg == "run")).collect();
    assert!(!runs.is_empty());
    for run in runs {
        for flag in ["--no-graphics", "--no-audio", "--no-clipboard", "--net-softnet"] {
            assert!(run.argv.iter().any(|arg| arg == flag), "{:?}", run.argv);
        }
    }
    Ok(())
}
