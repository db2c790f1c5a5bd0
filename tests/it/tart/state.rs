//! Saved states, clones of them, addresses, and clones that meet (contract 1.2, 1.5, 1.10, 7; kit cases 5, 6 and 8).

use std::process::{Child, Stdio};

use nix::sys::signal::Signal;

use super::kit::{Kit, killed_by};

const SUSPENDED: &str = "pausing VM to take a snapshot...\ncreating a snapshot...\n\
                         snapshot created successfully! shutting down the VM...\n";
const RESUMED: &str = "restoring VM state from a snapshot...\nresuming VM...\n";

/// A suspended VM.
fn suspended(kit: &Kit) -> String {
    let run = kit.boot(&["--suspendable"]);
    let vm = run.name.clone();
    kit.tart(&["suspend", &vm]).is(0, "", "");
    run.end().is(0, SUSPENDED, "");
    assert_eq!(kit.state(&vm), "suspended");
    assert!(kit.vm_dir(&vm).join("state.vzvmsave").exists());
    vm
}

#[test]
fn a_saved_state_is_restored_once() {
    let kit = Kit::any();
    let vm = suspended(&kit);
    // A suspended VM turns --suspendable on by itself.
    let run = kit.start(&vm, &[]);
    run.ready();
    assert!(!kit.vm_dir(&vm).join("state.vzvmsave").exists(), "7.1: the file is consumed");
    assert_eq!(run.stop().stdout, format!("{RESUMED}Stopping VM...\n"));
    assert_eq!(kit.state(&vm), "stopped");
}

#[test]
fn stop_discards_a_saved_state_and_delete_takes_it_too() {
    let kit = Kit::any();
    let vm = suspended(&kit);
    kit.tart(&["stop", &vm]).is(0, "", "");
    assert_eq!(kit.state(&vm), "stopped");
    let vm = suspended(&kit);
    kit.tart(&["delete", &vm]).is(0, "", "");
    assert!(!kit.vm_dir(&vm).exists());
}

#[test]
fn a_vm_that_is_not_suspendable_dies_of_suspend() {
    let kit = Kit::any();
    let run = kit.boot(&[]);
    let vm = run.name.clone();
    kit.tart(&["suspend", &vm]).is(0, "", "");
    let out = run.end();
    // 1.3: the text is on stdout.
    assert!(out.status.code() == Some(1) && out.stdout.starts_with("Failed to suspend the VM: "), "{out:?}");
    assert_eq!((&*out.stderr, kit.state(&vm)), ("", "stopped".to_owned()));
}

#[test]
fn of_two_clones_of_a_suspended_vm_the_second_boots_cold() {
    let kit = Kit::any();
    let base = suspended(&kit);
    let (first, second) = (kit.name(), kit.name());
    for name in [&first, &second] {
        kit.tart(&["clone", &base, name]).is(0, "", "");
        assert_eq!(kit.state(name), "suspended", "7.2: a clone has the state too");
    }
    let one = kit.start(&first, &[]);
    let two = kit.start(&second, &[]);
    one.ready();
    two.ready();
    let collision = "There is already a running VM with the same MAC address!\n\
                     Resetting VM to assign a new MAC address...\n";
    assert_eq!(two.stop().stdout, format!("{collision}Stopping VM...\n"));
    assert_eq!(one.stop().stdout, format!("{RESUMED}Stopping VM...\n"));
    assert_eq!(kit.state(&base), "suspended");
}

#[test]
fn a_changed_configuration_cannot_be_restored_until_the_state_is_discarded() {
    let kit = Kit::any();
    let vm = suspended(&kit);
    kit.tart(&["set", &vm, "--cpu", "6"]).is(0, "", "");
    for _ in 0..2 {
        let out = kit.spawn(&vm, &[]).end();
        assert_eq!(out.status.code(), Some(1), "{out:?}");
        assert!(out.stderr.contains("Error Domain=VZErrorDomain Code=12"), "{out:?}");
        assert_eq!(kit.state(&vm), "suspended", "7.1: the file stays");
    }
    kit.tart(&["stop", &vm]).is(0, "", "");
    let run = kit.start(&vm, &[]);
    run.ready();
    run.stop();
}

#[test]
fn an_address_is_answered_while_the_lease_lives_even_for_a_stopped_vm() {
    let kit = Kit::any();
    let vm = kit.vm();
    kit.tart(&["ip", &vm]).is(1, "", "no IP address found, is your VM running?\n");
    let suffix = " (also make sure that Guest agent for Tart is running inside of a VM)";
    let text = format!("no IP address found, is your VM running?{suffix}\n");
    kit.tart(&["ip", "--resolver", "agent", &vm]).is(1, "", &text);
    let run = kit.start(&vm, &[]);
    let ip = kit.tart(&["ip", "--wait", "120", &vm]).ok().to_owned();
    assert!(ip.trim_end().parse::<std::net::Ipv4Addr>().is_ok() && ip.ends_with('\n'), "{ip}");
    run.ready();
    let by_agent = kit.tart(&["ip", "--resolver", "agent", "--wait", "30", &vm]);
    by_agent.is(0, &ip, "");
    run.stop();
    kit.tart(&["ip", &vm]).is(0, &ip, "");
}

#[test]
fn clones_of_one_image_at_once_all_succeed() {
    let kit = Kit::any();
    let names: Vec<_> = (0..4).map(|_| kit.name()).collect();
    let clones: Vec<Child> = names
        .iter()
        .map(|name| kit.command(&["clone", kit.image(), name]).stderr(Stdio::piped()).spawn().expect("tart starts"))
        .collect();
    for child in clones {
        let out = child.wait_with_output().expect("it ends");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
    let macs: std::collections::BTreeSet<_> = names
        .iter()
        .map(|name| std::fs::read_to_string(kit.vm_dir(name).join("config.json")).expect("1.17: config.json"))
        .map(|text| serde_json::from_str::<serde_json::Value>(&text).expect("JSON")["macAddress"].to_string())
        .collect();
    assert_eq!(macs.len(), names.len(), "the global lock makes their MACs different");
}

#[test]
fn a_running_vm_can_be_cloned() {
    let kit = Kit::any();
    let run = kit.boot(&[]);
    run.shell("echo here > $HOME/file; sync").ok();
    let copy = kit.name();
    kit.tart(&["clone", &run.name, &copy]).is(0, "", "");
    run.stop();
    let run = kit.start(&copy, &[]);
    run.ready();
    assert_eq!(run.shell("cat $HOME/file").ok(), "here\n");
    run.stop();
}

#[test]
fn a_signal_before_the_boot_is_over_frees_the_name() {
    let kit = Kit::any();
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let run = kit.start(&kit.vm(), &[]);
        let vm = run.name.clone();
        run.signal(signal);
        assert!(killed_by(&run.end(), signal));
        assert_eq!(kit.state(&vm), "stopped");
        kit.tart(&["delete", &vm]).is(0, "", "");
        assert!(!kit.vm_dir(&vm).exists(), "{signal}");
    }
}
