//! The whole under random faults and random deaths of workers. `ALLOY_SEED` repeats the dice, not the instants.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use alloy_tests::chaos::{Dice, pause};
use alloy_tests::farm::{Farm, Setup, full};
use alloy_tests::observe::until;
use alloy_tests::process::processes_in;
use alloy_tests::sim_host::SimHost;
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{macs, text};

/// What Apple allows.
const GUESTS_MAX: usize = 2;

/// Faults that a worker must hide from its jobs.
fn hidden() -> Vec<Value> {
    let plain = [
        ("clone", "no_space"),
        ("clone", "source_gone"),
        ("clone", "tmp_gone"),
        ("clone", "abort"),
        ("set", "truncated_config"),
        ("get", "kill"),
        ("run", "limit"),
        ("run", "slot_leak"),
        ("run", "no_lease"),
        ("run", "ignore_interrupt"),
        ("agent", "absent"),
        ("delete", "running"),
        ("list", "fail"),
        ("list", "old_schema"),
        ("stop", "fail"),
        ("softnet", "no_reply"),
        ("softnet", "conflict"),
        ("softnet", "no_privilege"),
    ];
    let mut rules: Vec<Value> =
        plain.iter().map(|(command, fault)| json!({ "command": command, "fault": fault })).collect();
    for how in ["crash", "network", "error", "kill"] {
        rules.push(json!({ "command": "run", "fault": "die", "how": how, "at": "lease" }));
    }
    for what in ["keychain", "storage", "start"] {
        rules.push(json!({ "command": "run", "fault": "start_error", "what": what }));
    }
    rules.push(json!({ "command": "clone", "fault": "slow", "seconds": 50 }));
    rules.push(json!({ "command": "run", "fault": "clock_offset", "seconds": -9_000 }));
    rules
}

/// Faults that end what runs in a VM: the job is tried again. Three of them at one job would end it, so they are rare.
fn deadly() -> Vec<Value> {
    vec![
        json!({ "command": "run", "fault": "die", "how": "crash", "at": "agent", "after": 60 }),
        json!({ "command": "run", "fault": "die", "how": "softnet", "at": "agent", "after": 90 }),
        json!({ "command": "guest-exec", "fault": "agent_crash", "seconds": 5, "skip": 3 }),
    ]
}

/// Lets something go wrong on one of the hosts but the last, and reboots one whose operator was asked to.
async fn trouble(farm: &Farm, dice: &mut Dice, ill: usize) -> Result<Value> {
    let number = dice.roll(ill as u64) as usize;
    let rules = if dice.roll(12) == 0 { deadly() } else { hidden() };
    let rule = rules[dice.roll(rules.len() as u64) as usize].clone();
    farm.mac(number).faults(std::slice::from_ref(&rule));
    let list = farm.api().get("/v1/workers").await?;
    for worker in list["workers"].as_array().context("a list")? {
        let asked = worker["trouble"].as_str().is_some_and(|why| why.contains("reboot"));
        let name = worker["name"].as_str().unwrap_or_default();
        if let (true, Some(Ok(number))) = (asked, name.strip_prefix("mini-").map(str::parse::<usize>)) {
            farm.mac(number).reboot()?;
        }
    }
    Ok(rule)
}

/// Jobs of every kind, and how each must end.
fn job(dice: &mut Dice, number: usize) -> (Value, Value) {
    let (shell, end) = match dice.roll(4) {
        0 => (format!("echo {number}; exit 3"), json!(["failed", 3])),
        1 => (format!("sleep 0.3; echo {number}"), json!(["succeeded", 0])),
        2 => (format!("head -c 100000 /dev/zero; echo {number}"), json!(["succeeded", 0])),
        _ => (format!("echo {number}"), json!(["succeeded", 0])),
    };
    (json!({ "shell": shell }), end)
}

/// Looks at every host ten times a second, until it is told to stop. Returns the most VMs that one ran at once.
async fn most_at_once(dirs: Vec<std::path::PathBuf>, over: &AtomicBool) -> Result<usize> {
    let mut most = 0;
    while !over.load(Ordering::Relaxed) {
        let dirs = dirs.clone();
        let look = move || {
            // By name: a process that is about to become another one still looks like its parent.
            let names = |dir: &std::path::PathBuf| {
                let found = processes_in(dir);
                let runs = found.iter().filter_map(|found| found.line.strip_prefix("tart run "));
                runs.filter_map(|rest| rest.split(' ').next()).map(str::to_owned).collect::<BTreeSet<_>>()
            };
            let running = |dir: &std::path::PathBuf| {
                let mut found = names(dir);
                if found.len() > GUESTS_MAX {
                    // A look takes its time: what was seen first may have ended before what was seen last began.
                    let again = names(dir);
                    found.retain(|name| again.contains(name));
                }
                found.len()
            };
            dirs.iter().map(running).max().unwrap_or(0)
        };
        most = most.max(tokio::task::spawn_blocking(look).await?);
        pause(Duration::from_millis(100)).await;
    }
    Ok(most)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_on_four_hosts_end_well_while_random_faults_fire() -> Result<()> {
    let (hosts, jobs) = (4, if full() { 1_000 } else { 80 });
    let farm = Farm::start(Setup { workers: hosts, ..macs() }).await?;
    let mut dice = Dice::from_environment();
    // So rare that a job hardly meets three that it cannot survive.
    let beat = Duration::from_millis(400);
    let dirs = (0..hosts).map(|number| farm.worker_dir(number)).collect();
    let over = AtomicBool::new(false);
    let work = async {
        let specs = (0..jobs).map(|number| job(&mut dice, number)).collect();
        let ends = ends(&farm, specs);
        tokio::pin!(ends);
        let mut ticks = 0;
        let mut fired = BTreeSet::new();
        loop {
            tokio::select! {
                biased;
                ended = &mut ends => return ended.map(|lost| (lost, ticks, fired)),
                () = pause(beat) => {
                    ticks += 1;
                    fired.insert(trouble(&farm, &mut dice, hosts - 1).await?.to_string());
                }
            }
        }
    };
    let watched = async {
        let done = work.await;
        over.store(true, Ordering::Relaxed);
        done
    };
    let (done, most) = tokio::join!(watched, most_at_once(dirs, &over));
    let (lost, ticks, fired) = done?;
    println!("{jobs} jobs, {lost} attempts lost, {ticks} faults on order, of {} kinds", fired.len());
    let most = most?;
    assert!((1..=GUESTS_MAX).contains(&most), "{most} VMs at once on one host");
    for number in 0..hosts {
        farm.mac(number).faults(&[]);
        farm.mac(number).reboot()?;
    }
    // What is left on a host when the farm has stopped is found when it is dropped.
    Ok(())
}

/// Runs all jobs. Every one ends as it must; returns how many attempts were lost on the way.
async fn ends(farm: &Farm, specs: Vec<(Value, Value)>) -> Result<u64> {
    let api = farm.api();
    let (mut waiting, mut lost) = (Vec::new(), 0);
    for (spec, end) in specs {
        waiting.push((api.submit(spec).await?, end));
    }
    for (id, end) in waiting {
        let ended = api.end(&id).await;
        let code = ended["exit_code"].clone();
        ensure!(json!([ended["state"], code]) == end, "{ended}\n{:#?}", api.events(&id).await?);
        lost += ended["lost"].as_u64().unwrap_or(0);
    }
    Ok(lost)
}

/// `alloy-NONCE-NUMBER` → the worker's life that made it.
fn life(vm: &str) -> &str {
    vm.rsplit_once('-').map_or(vm, |(life, _)| life)
}

/// How a VM goes.
const REMOVALS: [&str; 2] = ["stop", "delete"];

/// Nothing is done to a VM of an earlier life once a life has made its first one, but to remove it, and no name comes twice.
fn check_lives(mac: &SimHost) -> Result<usize> {
    let (mut lives, mut made) = (Vec::<String>::new(), BTreeSet::new());
    for entry in mac.journal() {
        let Some(vm) = entry.argv.iter().rev().find(|word| word.starts_with("alloy-")) else { continue };
        let (is_known, is_last) =
            (lives.iter().any(|old| old == life(vm)), lives.last().is_some_and(|last| last == life(vm)));
        if entry.argv[0] == "clone" {
            // One that came to nothing is tried again.
            ensure!(entry.exit != Some(0) || made.insert(vm.clone()), "{vm} was made twice");
            if !is_known {
                lives.push(life(vm).to_owned());
                continue;
            }
        }
        let goes = REMOVALS.contains(&entry.argv[0].as_str());
        ensure!(is_last || !is_known || goes, "{vm} outlived its worker: {:?}", entry.argv);
    }
    Ok(lives.len())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_killed_at_any_instant_loses_no_job_and_no_vm_and_uses_none_twice() -> Result<()> {
    // A job that is lost for the third time ends: no job sees more than two deaths.
    let rounds = if full() { 100 } else { 5 };
    let mut farm = Farm::start(macs()).await?;
    let mut dice = Dice::from_environment();
    let mut hosts = BTreeSet::new();
    let (mut lost, mut dead) = (0, BTreeSet::new());
    for round in 0..rounds {
        let api = farm.api();
        let mut ids = Vec::new();
        for _ in 0..3 {
            ids.push(api.shell("[ ! -e ~/mark ] || echo used; touch ~/mark; sleep 0.2; hostname").await?);
        }
        for _ in 0..2 {
            dice.instant(1_500).await;
            farm.kill_worker(0);
            dead = farm.mac(0).vms();
            farm.start_worker(0)?;
        }
        for id in ids {
            let ended = api.end(&id).await;
            assert_eq!(ended["state"], "succeeded", "round {round}: {ended}\n{:#?}", api.events(&id).await?);
            lost += ended["lost"].as_u64().unwrap_or(0);
            let host = text(&api.log(&id).await?);
            assert!(host.starts_with("alloy-") && hosts.insert(host.clone()), "round {round}: {host} was used twice");
        }
    }
    let mac = farm.mac(0);
    // What the farm says of the slots may be the last word of a dead worker.
    until("two VMs stand there, and none of a dead worker", async || {
        let vms = mac.vms();
        Ok((vms.len() == 2 && vms.is_disjoint(&dead)).then_some(()))
    })
    .await;
    let lives = check_lives(mac)?;
    println!("{} kills, {lives} lives that made VMs, {lost} attempts lost", 2 * rounds);
    Ok(())
}
