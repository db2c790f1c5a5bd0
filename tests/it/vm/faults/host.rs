//! Hosts that cannot run VMs, and workers that die.

use super::*;

const STRAY: &str = "alloy-00000001-1";
const TORN: &str = "alloy-00000001-2";
/// What our own recipe calls the image that it makes.
const RECIPE: &str = "alloy-macos-xcode";

/// Jobs until this worker has drained itself. None of them is lost, and the other worker runs what comes after.
async fn jobs_until_drained(farm: &Farm, name: &str) -> Result<String> {
    until(&format!("{name} has trouble"), async || {
        assert!(fine_anywhere(farm, "true").await?, "a job is lost by a host's fault");
        Ok((!worker(farm, name).await?["trouble"].is_null()).then_some(()))
    })
    .await;
    let why = drained(farm, name).await;
    for _ in 0..2 {
        assert!(fine_anywhere(farm, "true").await?);
    }
    Ok(why)
}

/// A job that succeeds uncharged, on whatever worker and attempt.
async fn fine_anywhere(farm: &Farm, shell: &str) -> Result<bool> {
    let ended = job(farm, json!({ "shell": shell })).await?;
    Ok(ended["state"] == "succeeded" && ended["lost"] == 0)
}

/// A VM with a name of ours that no worker has: what a worker of an earlier life might have left.
async fn stray(mac: &SimHost) -> Result<std::process::Child> {
    clone_by_hand(mac, STRAY)?;
    let run = mac.tart(&["run", STRAY, "--no-graphics"]).spawn()?;
    let socket = mac.home().join("vms").join(STRAY).join("control.sock");
    until("the stray runs", async || Ok(socket.exists().then_some(()))).await;
    Ok(run)
}

/// As its owner does, so that the host ends with nothing on it.
fn delete_by_hand(mac: &SimHost, name: &str) -> Result<()> {
    anyhow::ensure!(mac.tart(&["delete", name]).status()?.success(), "tart delete {name}");
    Ok(())
}

async fn refused_once_with_a_stray(fault: Value) -> Result<()> {
    let farm = one(&[]).await?;
    let mac = farm.mac(0);
    all_warm(&farm).await;
    clone_by_hand(mac, RECIPE)?;
    let mut stray = stray(mac).await?;
    mac.faults(&[with(fault, json!({ "vm": "alloy-*" }))]);
    for _ in 0..2 {
        fine(&farm, "true").await?;
    }
    stray.wait()?;
    assert!(!mac.vms().contains(STRAY) && mac.vms().contains(RECIPE), "{:?}", mac.vms());
    assert!(worker(&farm, "mini-0").await?["trouble"].is_null(), "one fault is none of the host's");
    delete_by_hand(mac, RECIPE)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f11_a_refused_vm_is_made_again_after_strays_were_looked_for() -> Result<()> {
    refused_once_with_a_stray(rule("run", "limit", 0, 1)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_a_recipe_has_made_outlives_a_start_of_the_worker_and_a_stray_does_not() -> Result<()> {
    let mut farm = one(&[]).await?;
    all_warm(&farm).await;
    farm.kill_worker(0);
    for name in [STRAY, RECIPE] {
        clone_by_hand(farm.mac(0), name)?;
    }
    farm.start_worker(0)?;
    all_warm(&farm).await;
    fine(&farm, "true").await?;
    let vms = farm.mac(0).vms();
    assert!(!vms.contains(STRAY) && vms.contains(RECIPE), "{vms:?}");
    delete_by_hand(farm.mac(0), RECIPE)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f12_leaked_slots_drain_the_worker_which_asks_for_a_reboot() -> Result<()> {
    let farm = ill_and_well(&[rule("run", "slot_leak", 0, 2)]).await?;
    let why = jobs_until_drained(&farm, "mini-0").await?;
    assert!(why.contains("reboot") && why.contains("exceeds the system limit"), "{why}");
    let list = output(farm.alloy(&["worker", "list"])).await?;
    let row = text(&list.stdout).lines().find(|line| line.starts_with("mini-0")).map(str::to_owned);
    assert!(row.is_some_and(|row| row.contains("drained") && row.contains("reboot")), "{list:?}");
    farm.mac(0).reboot()?;
    well(&farm, "mini-0").await;
    let log = std::fs::read_to_string(farm.dir().join("logs/worker-0.log"))?;
    let told = log.lines().filter(|line| line.contains("ERROR") && line.contains("reboot"));
    assert_eq!(told.count(), 1, "{log}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f12_one_leaked_slot_is_closed_and_the_other_goes_on() -> Result<()> {
    let leak = rule("run", "slot_leak", 0, 1);
    let farm = Farm::start(Setup { faults: vec![vec![leak]], ..macs() }).await?;
    until("the leak is told", async || {
        assert!(fine_anywhere(&farm, "true").await?, "a job is lost by a host's fault");
        Ok(worker(&farm, "mini-0").await?["trouble"].as_str().map(str::to_owned).map(|why| {
            assert!(why.contains("reboot"), "{why}");
        }))
    })
    .await;
    for _ in 0..3 {
        assert!(fine_anywhere(&farm, "true").await?);
    }
    let state = worker(&farm, "mini-0").await?["state"].clone();
    assert!(state == "ready" || state == "busy", "one slot is left: {state}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f15_a_vm_that_does_not_listen_is_killed_and_its_slot_used_only_then() -> Result<()> {
    let farm = one(&[rule("run", "ignore_interrupt", 0, 1)]).await?;
    fine(&farm, "true").await?;
    fine(&farm, "true").await?;
    let runs = calls(farm.mac(0), "run");
    let stop = calls(farm.mac(0), "stop").into_iter().find(|stop| stop.argv.last() == runs[0].argv.get(1));
    let stopped_ms = stop.and_then(|stop| stop.end_ms).context("it was stopped")?;
    assert!(runs[1].start_ms >= stopped_ms, "{stopped_ms} {:?}", runs[1]);
    assert!(!nix_alive(runs[0].pid));
    Ok(())
}

fn nix_alive(pid: u32) -> bool {
    alloy_tests::process::is_alive(pid.cast_signed())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f17_a_locked_keychain_makes_the_host_ill_and_is_not_tried_in_a_hurry() -> Result<()> {
    let error = |(skip, what): (u64, &str)| {
        with(rule("run", "start_error", skip, if skip < 2 { 1 } else { 0 }), json!({ "what": what }))
    };
    let errors: Vec<_> = [(0, "security"), (1, "start"), (2, "keychain")].map(error).into();
    let farm = ill_and_well(&errors).await?;
    let why = jobs_until_drained(&farm, "mini-0").await?;
    assert!(why.contains("worker doctor") && why.contains("SecKeyCreateRandomKey"), "{why}");
    farm.mac(0).faults(&[]);
    well(&farm, "mini-0").await;
    let starts: Vec<i64> = calls(farm.mac(0), "run").iter().map(|run| run.start_ms).collect();
    // The quarantine of a minute, in this farm's time.
    assert!(starts[2..].windows(2).all(|pair| pair[1] - pair[0] >= 5_500), "{starts:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f18_a_stale_lock_below_tart_is_met_by_looking_for_strays() -> Result<()> {
    let locked = with(rule("run", "start_error", 0, 1), json!({ "what": "storage" }));
    refused_once_with_a_stray(locked).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f18_a_stale_lock_that_stays_drains_the_worker_and_its_job_waits() -> Result<()> {
    let locked = with(rule("run", "start_error", 0, 0), json!({ "what": "storage" }));
    let farm = one(&[locked]).await?;
    let id = farm.api().shell("true").await?;
    let why = drained(&farm, "mini-0").await;
    assert!(why.contains("reboot") && why.contains("auxiliary storage"), "{why}");
    assert_eq!(farm.api().job(&id).await?["state"], "queued");
    farm.mac(0).faults(&[]);
    let ended = farm.api().end(&id).await;
    assert_eq!((&ended["state"], &ended["lost"]), (&json!("succeeded"), &json!(0)), "{ended}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f19_without_a_filter_no_vm_runs() -> Result<()> {
    let farm = one(&[rule("softnet", "missing", 0, 2), rule("softnet", "no_privilege", 2, 0)]).await?;
    let id = farm.api().shell("true").await?;
    let why = drained(&farm, "mini-0").await;
    assert!(why.contains("privileges") || why.to_lowercase().contains("softnet"), "{why}");
    assert_eq!(farm.api().job(&id).await?["state"], "queued");
    let boots = calls(farm.mac(0), "run");
    assert!(boots.iter().all(|run| run.exit.is_some_and(|code| code != 0)), "{boots:?}");
    farm.mac(0).faults(&[]);
    assert_eq!(farm.api().end(&id).await["state"], "succeeded");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f19_a_filter_that_does_not_confirm_costs_its_vm_and_one_that_dies_ends_it() -> Result<()> {
    let files = tempfile::tempdir()?;
    let file = files.path().join("now");
    let farm = one(&[
        rule("softnet", "no_reply", 0, 1),
        rule("softnet", "conflict", 2, 1),
        with(rule("softnet", "dies", 4, 1), json!({ "file": file })),
    ])
    .await?;
    for _ in 0..2 {
        all_warm(&farm).await;
        fine(&farm, "true").await?;
    }
    let id = farm.api().shell("echo up; [ \"$ALLOY_JOB_ATTEMPT\" = 2 ] || sleep 600").await?;
    farm.api().log_has(&id, "up").await;
    std::fs::write(&file, "")?;
    let ended = farm.api().end(&id).await;
    assert_eq!((&ended["state"], &ended["attempt"]), (&json!("succeeded"), &json!(2)), "{ended}");
    let losses = losses(&farm, &ended).await?;
    assert!(losses[0].0 == "vm_lost" && losses[0].1.to_lowercase().contains("softnet"), "{losses:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f20_a_list_that_fails_or_looks_different_is_read_all_the_same() -> Result<()> {
    let farm = one(&[
        with(rule("list", "fail", 0, 2), json!({ "exit": 1, "stderr": "Error: The file “x” couldn’t be opened." })),
        rule("list", "old_schema", 2, 2),
        rule("list", "extra_keys", 4, 0),
    ])
    .await?;
    for _ in 0..3 {
        fine(&farm, "true").await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f21_a_worker_that_dies_under_a_job_leaves_no_vm_to_the_next_one() -> Result<()> {
    let mut farm = one(&[]).await?;
    let shell = "hostname; [ \"$ALLOY_JOB_ATTEMPT\" = 2 ] || sleep 600";
    let id = farm.api().shell(shell).await?;
    farm.api().log_has(&id, "alloy-").await;
    let first = text(&farm.api().log(&id).await?).trim().to_owned();
    farm.kill_worker(0);
    farm.start_worker(0)?;
    let ended = farm.api().end(&id).await;
    assert_eq!((&ended["state"], &ended["attempt"]), (&json!("succeeded"), &json!(2)), "{ended}");
    assert!(!farm.mac(0).vms().contains(&first));
    let second = text(&farm.api().log(&id).await?);
    assert!(second.contains("alloy-") && !second.contains(&first), "{first}, then {second}");
    let journal = farm.mac(0).journal();
    let at = |word: &str, name: Option<&str>| {
        journal
            .iter()
            .position(|entry| entry.argv[0] == word && name.is_none_or(|name| entry.argv.iter().any(|arg| arg == name)))
    };
    let deleted = at("delete", Some(&first)).context("the old VM was deleted")?;
    let made = journal.iter().rposition(|entry| entry.argv[0] == "clone").context("a clone")?;
    assert!(deleted < made, "nothing is made before what was left is gone");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f22_a_worker_without_a_tart_that_it_knows_does_not_start_and_says_why() -> Result<()> {
    let mut farm = one(&[]).await?;
    farm.stop_worker(0)?;
    let version = with(rule("--version", "version", 0, 1), json!({ "text": "1.0.0" }));
    farm.mac(0).faults(&[version, rule("--version", "abort", 1, 1), rule("--version", "kill", 2, 1)]);
    for word in ["1.0.0 is too old", "killed", "killed"] {
        farm.start_worker(0)?;
        let (status, log) = farm.ended_worker(0)?;
        let last = log.lines().rev().take(3).collect::<Vec<_>>().join("\n");
        assert!(!status.success() && last.contains(word), "{word}: {log}");
    }
    let (tart, aside) = (farm.mac(0).tart_path(), farm.mac(0).dir().join("tart.aside"));
    std::fs::rename(&tart, &aside)?;
    farm.start_worker(0)?;
    let (status, log) = farm.ended_worker(0)?;
    assert!(!status.success() && log.contains("does not start") && log.contains("ALLOY_PROVIDER=host"), "{log}");
    std::fs::rename(&aside, &tart)?;
    farm.start_worker(0)?;
    all_warm(&farm).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f22_a_tart_that_aborts_once_is_asked_again_and_one_that_vanishes_drains_the_worker() -> Result<()> {
    let farm = one(&[rule("clone", "abort", 0, 1), rule("set", "kill", 1, 1)]).await?;
    fine(&farm, "true").await?;
    fine(&farm, "true").await?;
    let (tart, aside) = (farm.mac(0).tart_path(), farm.mac(0).dir().join("tart.aside"));
    all_warm(&farm).await;
    std::fs::rename(&tart, &aside)?;
    let id = farm.api().shell("true").await?;
    let why = drained(&farm, "mini-0").await;
    assert!(why.contains("does not start"), "{why}");
    std::fs::rename(&aside, &tart)?;
    let ended = farm.api().end(&id).await;
    assert_eq!((&ended["state"], &ended["lost"]), (&json!("succeeded"), &json!(0)), "{ended}");
    well(&farm, "mini-0").await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f25_settings_that_cannot_be_read_are_removed_if_they_are_ours_and_named_if_not() -> Result<()> {
    let farm = one(&[rule("set", "truncated_config", 0, 1)]).await?;
    fine(&farm, "true").await?;
    let mac = farm.mac(0);
    for name in [TORN, "stranger"] {
        clone_by_hand(mac, name)?;
    }
    let config = |name: &str| mac.home().join("vms").join(name).join("config.json");
    std::fs::write(config(TORN), "{\"vers")?;
    fine(&farm, "true").await?;
    fine(&farm, "true").await?;
    assert!(!mac.vms().contains(TORN));
    std::fs::write(config("stranger"), "{\"vers")?;
    let id = farm.api().shell("true").await?;
    let why = drained(&farm, "mini-0").await;
    assert!(why.contains("stranger") && why.contains("delete"), "{why}");
    let waits = farm.api().shell("true").await?;
    assert!(mac.tart(&["delete", "stranger"]).status()?.success());
    for id in [id, waits] {
        let ended = farm.api().end(&id).await;
        assert_eq!((&ended["state"], &ended["lost"]), (&json!("succeeded"), &json!(0)), "{ended}");
    }
    Ok(())
}
