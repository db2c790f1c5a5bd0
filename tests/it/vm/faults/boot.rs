//! VMs that do not come, or come wrong.

use super::*;
use alloy_tests::sim_host::Profile;

/// What a worker of an earlier life might have left.
const EARLIER: &str = "alloy-00000001-1";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f1_a_boot_that_hangs_is_ended_and_made_again_once_before_the_attempt_is_given_up() -> Result<()> {
    let setup = Setup { time_scale: 20, slots: 1, faults: vec![vec![rule("run", "boot_hang", 0, 2)]], ..macs() };
    let farm = Farm::start(setup).await?;
    let ended = job(&farm, json!({ "shell": "true" })).await?;
    assert_eq!((&ended["state"], &ended["lost"]), (&json!("succeeded"), &json!(1)), "{ended}");
    let losses = losses(&farm, &ended).await?;
    assert!(losses.len() == 1 && losses[0].0 == "vm_start_failure", "one attempt for two hangs: {losses:?}");
    all_warm(&farm).await;
    let mut names: Vec<_> = calls(farm.mac(0), "run").into_iter().map(|run| run.argv[1].clone()).collect();
    let runs = names.len();
    names.dedup();
    assert_eq!(
        (runs, farm.mac(0).vms().len()),
        (names.len(), 1),
        "never a name twice, and what hung is gone: {names:?}"
    );
    Ok(())
}

/// A VM of somebody else on the same Mac, and its address.
fn stranger(mac: &SimHost) -> Result<(std::process::Child, String)> {
    clone_by_hand(mac, "stranger")?;
    let run = mac.tart(&["run", "stranger", "--no-graphics"]).spawn()?;
    let mut address = String::new();
    until_blocking("the stranger has an address", PATIENCE, || {
        let out = mac.tart(&["ip", "stranger"]).output();
        address = out.map(|out| text(&out.stdout).trim().to_owned()).unwrap_or_default();
        !address.is_empty()
    })?;
    Ok((run, address))
}

fn end_stranger(mac: &SimHost, mut run: std::process::Child) -> Result<()> {
    assert!(mac.tart(&["stop", "stranger"]).status()?.success());
    run.wait()?;
    assert!(mac.tart(&["delete", "stranger"]).status()?.success());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f2_an_address_is_not_trusted_before_the_vm_behind_it_is_known() -> Result<()> {
    let mine = |rule| with(rule, json!({ "vm": "alloy-*" }));
    let unknown = mine(rule("ip", "no_address", 0, 0));
    let setup = Setup { slots: 1, image: Profile::vanilla(), faults: vec![vec![unknown]], ..macs() };
    let farm = Farm::start(setup).await?;
    let mac = farm.mac(0);
    until("the image is here", async || Ok((!mac.vms().is_empty()).then_some(()))).await;
    let (run, address) = stranger(mac)?;
    mac.faults(&[
        mine(rule("ip", "malformed", 0, 1)),
        mine(rule("ip", "no_address", 1, 1)),
        mine(with(rule("ip", "answer", 2, 2), json!({ "text": address }))),
    ]);
    let name = fine(&farm, "hostname").await?;
    assert!(name.starts_with("alloy-"), "{name}");
    end_stranger(mac, run)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f2_a_guest_with_an_agent_needs_no_address() -> Result<()> {
    let farm = one(&[]).await?;
    let mac = farm.mac(0);
    all_warm(&farm).await;
    let (run, _) = stranger(mac)?;
    mac.faults(&[
        rule("run", "no_lease", 0, 1),
        with(rule("run", "late_lease", 1, 1), json!({ "seconds": 1000 })),
        with(rule("run", "duplicate_lease", 2, 1), json!({ "of": "stranger" })),
    ]);
    for _ in 0..4 {
        assert!(fine(&farm, "hostname").await?.starts_with("alloy-"));
    }
    end_stranger(mac, run)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f3_a_guest_whose_agent_is_late_is_waited_for_and_one_without_is_reached_by_ssh() -> Result<()> {
    let late = with(rule("run", "agent_late", 0, 1), json!({ "seconds": 60 }));
    let farm = one(&[late]).await?;
    fine(&farm, "true").await?;
    farm.mac(0).faults(&[rule("agent", "absent", 0, 0)]);
    // The VM that is warm by now lost its agent too: it is thrown away.
    assert_eq!(fine(&farm, "echo by ssh").await?, "by ssh\n");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f3_a_guest_that_reboots_and_loses_its_agent_is_a_lost_vm() -> Result<()> {
    let farm = one(&[rule("run", "agent_lost_by_reboot", 0, 1)]).await?;
    let (_, losses) = dies_once(&farm, "sudo reboot").await?;
    assert_eq!(losses[0].0, "vm_lost", "{losses:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f7_a_vm_that_dies_while_it_boots_is_made_again() -> Result<()> {
    let die = |skip, how: &str, at: &str| with(rule("run", "die", skip, 1), json!({ "how": how, "at": at }));
    // Every second one, so that no claim meets two.
    let deaths =
        [die(0, "crash", "vm_started"), die(2, "network", "lease"), die(4, "error", "sshd"), die(6, "kill", "lease")];
    let farm = one(&deaths).await?;
    for _ in 0..4 {
        fine(&farm, "true").await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f7_a_warm_vm_that_dies_is_replaced_before_a_job_meets_it() -> Result<()> {
    let files = tempfile::tempdir()?;
    let file = files.path().join("now");
    let die = with(rule("run", "die", 0, 1), json!({ "how": "network", "at": "agent", "file": file }));
    let farm = one(&[die]).await?;
    all_warm(&farm).await;
    let before = farm.mac(0).vms();
    std::fs::write(&file, "")?;
    until("another VM has its place", async || {
        let now = farm.mac(0).vms();
        Ok((now.len() == 1 && now.is_disjoint(&before)).then_some(()))
    })
    .await;
    all_warm(&farm).await;
    assert_eq!(fine(&farm, "echo \"$ALLOY_VM_SOURCE\"").await?, "warm\n");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f16_the_worker_never_suspends_and_takes_no_saved_state_of_an_earlier_run() -> Result<()> {
    let saved = |fault: &str| with(rule("run", fault, 0, 0), json!({ "vm": "alloy-*" }));
    let mut farm = one(&[]).await?;
    all_warm(&farm).await;
    farm.kill_worker(0);
    let mac = farm.mac(0);
    until("the dead worker's VM does not run any more", async || Ok(mac.processes().is_empty().then_some(()))).await;
    let before = mac.journal().len();
    clone_by_hand(mac, EARLIER)?;
    let mut run = mac.tart(&["run", EARLIER, "--no-graphics", "--suspendable"]).spawn()?;
    until_blocking("it is suspended", PATIENCE, || {
        mac.tart(&["suspend", EARLIER]).status().is_ok_and(|status| status.success())
    })?;
    run.wait()?;
    let by_test = mac.journal().len() - before;
    mac.faults(&["suspend_fails", "suspend_hangs", "restore_fails", "mac_collision"].map(saved));
    farm.start_worker(0)?;
    all_warm(&farm).await;
    fine(&farm, "true").await?;
    let mac = farm.mac(0);
    assert!(!mac.vms().contains(EARLIER), "{:?}", mac.vms());
    let journal = mac.journal();
    let theirs = journal[..before].iter().chain(&journal[before + by_test..]);
    for entry in theirs {
        assert!(!entry.argv.iter().any(|word| word == "suspend" || word == "--suspendable"), "{:?}", entry.argv);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f24_a_guests_clock_is_right_when_its_job_starts() -> Result<()> {
    let farm = one(&[with(rule("run", "clock_offset", 0, 0), json!({ "seconds": -86_400 }))]).await?;
    let now = || std::time::UNIX_EPOCH.elapsed().expect("a clock").as_secs();
    let before = now();
    let guest: u64 = fine(&farm, "date +%s").await?.trim().parse()?;
    assert!((before..=now() + 1).contains(&guest), "{before} {guest}");
    Ok(())
}
