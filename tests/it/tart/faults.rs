//! Every fault of the contract's table 10.4 can be injected and looks as the table says. What a worker must make of it is
//! the driver's test.

use alloy_tests::sim_host::Setup;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::kit::{BASE, Kit, Out, killed_by};

fn kit(faults: &[Value]) -> Kit {
    let kit = Kit::sim(Setup::default());
    kit.host().faults(faults);
    kit
}

/// A run that ends by itself.
fn ended(fault: Value) -> Out {
    let kit = kit(&[fault]);
    kit.spawn(&kit.vm(), &[]).end()
}

#[test]
fn f1_a_boot_that_hangs_has_no_lease_and_no_agent() {
    let kit = kit(&[json!({"command": "run", "fault": "boot_hang"})]);
    let run = kit.start(&kit.vm(), &[]);
    // Longer than any boot.
    kit.tart(&["ip", "--wait", "60", &run.name]).is(1, "", "no IP address found\n");
    run.exec(&["true"]).fails(1, "is the Tart Guest Agent running?");
    run.stop();
    let run = kit.boot(&[]);
    run.stop();
}

#[test]
fn f2_addresses_are_missing_late_wrong_or_unreadable() {
    let kit = kit(&[
        json!({"command": "run", "fault": "no_lease", "vm": "*"}),
        json!({"command": "ip", "fault": "malformed", "skip": 1}),
        json!({"command": "ip", "fault": "answer", "text": "192.168.64.99", "skip": 2}),
        json!({"command": "ip", "fault": "no_address", "skip": 3}),
    ]);
    let run = kit.boot(&[]);
    kit.tart(&["ip", &run.name]).is(1, "", "no IP address found\n");
    kit.tart(&["ip", &run.name]).is(1, "", "Error: malformed DHCP leases file\n");
    kit.tart(&["ip", &run.name]).is(0, "192.168.64.99\n", "");
    // An error of the agent ends the wait.
    kit.tart(&["ip", "--resolver", "agent", "--wait", "60", &run.name]).is(
        1,
        "",
        "no IP address found (also make sure that Guest agent for Tart is running inside of a VM)\n",
    );
    kit.tart(&["ip", "--resolver", "agent", "--wait", "60", &run.name]).is(
        1,
        "",
        "Error: unknown (2): cannot resolve VM's IP address\n",
    );
    let other = kit.vm();
    kit.host().faults(&[json!({"command": "run", "vm": other, "fault": "late_lease", "seconds": 10})]);
    let late = kit.boot_named(&other, &[]);
    let ip = kit.tart(&["ip", "--wait", "60", &other]).ok().to_owned();
    run.stop();
    let third = kit.vm();
    kit.host().faults(&[json!({"command": "run", "vm": third, "fault": "duplicate_lease", "of": other})]);
    let duplicate = kit.boot_named(&third, &[]);
    kit.tart(&["ip", "--wait", "60", &third]).is(0, &ip, "");
    std::fs::write(kit.host().lease_file(), "{\n\tip_address=1").unwrap();
    kit.tart(&["ip", &third]).fails(1, "Error: ");
    late.stop();
    duplicate.stop();
}

#[test]
fn f3_an_agent_is_absent_late_or_lost_by_a_reboot() {
    let kit = kit(&[
        json!({"command": "run", "fault": "agent_late", "seconds": 20}),
        json!({"command": "run", "fault": "agent_lost_by_reboot", "skip": 1}),
    ]);
    let run = kit.boot(&[]);
    kit.host().faults(&[json!({"command": "agent", "fault": "absent", "times": 0})]);
    run.exec(&["true"]).fails(1, "is the Tart Guest Agent running?");
    run.stop();
    kit.host().faults(&[json!({"command": "run", "fault": "agent_lost_by_reboot"})]);
    let run = kit.boot(&[]);
    let _ = run.shell("sudo reboot");
    kit.wait_for("the agent is gone", || !run.exec(&["true"]).status.success());
    run.exec(&["true"]).fails(1, "is the Tart Guest Agent running?");
    run.stop();
}

#[test]
fn f4_an_agent_that_crashes_ends_the_command_and_comes_back() {
    let kit = kit(&[json!({"command": "guest-exec", "skip": 1, "fault": "agent_crash", "seconds": 1})]);
    let run = kit.boot(&[]);
    run.exec(&["sleep", "1000"]).is(1, "", "Error: unavailable (14): Transport became inactive\n");
    run.ready();
    assert_eq!(run.shell("ps -axo args= | grep -c '^sleep 1000'").stdout, "0\n");
    run.stop();
}

#[test]
fn f5_a_stream_without_an_exit_looks_like_success() {
    let kit = kit(&[json!({"command": "guest-exec", "skip": 1, "fault": "no_exit"})]);
    let run = kit.boot(&[]);
    run.shell("echo said; exit 9").is(0, "said\n", "");
    run.shell("exit 9").is(9, "", "");
    run.stop();
}

#[test]
fn f6_a_stream_can_stay_open_after_its_command() {
    let kit = kit(&[json!({"command": "guest-exec", "skip": 1, "fault": "hang"})]);
    let run = kit.boot(&[]);
    let mut command = kit.command(&["exec", &run.name, "echo", "done"]);
    let mut child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut said = [0; 5];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut said).unwrap();
    // The command has ended for long when others have run.
    for _ in 0..3 {
        run.exec(&["true"]).ok();
    }
    assert!(child.try_wait().unwrap().is_none());
    child.kill().unwrap();
    child.wait().unwrap();
    run.stop();
}

#[test]
fn f7_a_run_dies_by_itself_in_every_way_at_every_phase() {
    let crash = "guest has stopped the virtual machine due to error: Error Domain=VZErrorDomain";
    let network = "virtual machine's network attachment ";
    for (number, phase) in ["vm_started", "lease", "sshd", "agent"].into_iter().enumerate() {
        let how = ["crash", "network", "error", "kill"][number];
        let out = ended(json!({"command": "run", "fault": "die", "how": how, "at": phase}));
        match how {
            "crash" => assert!(out.ok().starts_with(crash), "{out:?}"),
            "network" => {
                assert!(out.ok().starts_with(network) && out.stdout.contains("disconnected with error"), "{out:?}")
            }
            "error" => out.fails(1, "Error Domain=VZErrorDomain Code=1"),
            _ => assert!(killed_by(&out, Signal::SIGKILL), "{out:?}"),
        }
    }
}

#[test]
fn f7_a_run_dies_when_the_test_says_so() {
    let kit = Kit::sim(Setup::default());
    let file = kit.scratch().join("now");
    kit.host().faults(&[json!({"command": "run", "fault": "die", "how": "crash", "at": "agent", "file": file})]);
    let mut run = kit.boot(&[]);
    run.exec(&["true"]).ok();
    assert!(!run.has_ended());
    std::fs::write(file, "").unwrap();
    assert!(run.end().ok().contains("due to error"));
}

#[test]
fn f8_a_guest_shuts_itself_down() {
    let out = ended(json!({"command": "run", "fault": "die", "how": "stop", "at": "agent"}));
    out.is(0, "guest has stopped the virtual machine\n", "");
}

#[test]
fn f9_clones_run_out_of_space_of_their_source_and_of_time() {
    let kit = Kit::sim(Setup::default());
    let held_by = kit.scratch().join("held-by");
    nix::unistd::mkfifo(&held_by, nix::sys::stat::Mode::S_IRWXU).unwrap();
    kit.host().faults(&[
        json!({"command": "clone", "fault": "no_space"}),
        json!({"command": "clone", "fault": "slow", "while": held_by, "skip": 1}),
        json!({"command": "clone", "fault": "source_gone", "skip": 2}),
        json!({"command": "pull", "fault": "offline"}),
    ]);
    let vm = kit.name();
    let out = kit.tart(&["clone", BASE, &vm]);
    assert!(out.stderr.starts_with("Error: “disk.img” couldn’t be copied to “"), "{out:?}");
    assert!(out.status.code() == Some(1) && out.stderr.ends_with("” because there isn’t enough space.\n"));
    assert_eq!((kit.state(&vm), kit.tmp_entries()), (String::new(), Vec::new()));
    // The slow one holds the global lock: a run cannot start meanwhile.
    let mut slow = kit.command(&["clone", BASE, &vm]).spawn().unwrap();
    kit.wait_for("the slow one works", || !kit.tmp_entries().is_empty());
    let home = std::fs::File::open(kit.home()).unwrap();
    kit.wait_for("it holds the lock", || {
        nix::fcntl::Flock::lock(home.try_clone().unwrap(), nix::fcntl::FlockArg::LockSharedNonblock).is_err()
    });
    // Open at both ends: whoever waits at the pipe goes on, and so does who only comes to it.
    let _both_ends = std::fs::File::options().read(true).write(true).open(held_by).unwrap();
    assert!(slow.wait().unwrap().success());
    let out = kit.tart(&["clone", BASE, &kit.name()]);
    out.fails(1, "Error: The Internet connection appears to be offline.");
}

#[test]
fn f10_delete_finds_the_vm_running_for_a_while() {
    let kit = kit(&[json!({"command": "delete", "fault": "running", "times": 2})]);
    let vm = kit.vm();
    for _ in 0..2 {
        kit.tart(&["delete", &vm]).is(1, "", &format!("VM \"{vm}\" is running\n"));
    }
    kit.tart(&["delete", &vm]).is(0, "", "");
}

#[test]
fn f11_a_run_is_refused_though_there_is_room() {
    ended(json!({"command": "run", "fault": "limit"})).fails(1, "The number of VMs exceeds the system limit\n");
}

#[test]
fn f12_leaked_slots_stay_taken_until_the_host_is_rebooted() {
    let kit = kit(&[json!({"command": "run", "fault": "slot_leak", "times": 2})]);
    for _ in 0..2 {
        kit.boot(&[]).stop();
    }
    assert!(kit.list().iter().all(|vm| vm["Running"] == false));
    kit.spawn(&kit.vm(), &[]).end().is(1, "", "The number of VMs exceeds the system limit\n");
    kit.host().reboot().unwrap();
    kit.boot(&[]).stop();
}

#[test]
fn f14_an_image_pruned_before_the_clone_is_pulled_again() {
    let kit = kit(&[json!({"command": "clone", "fault": "source_gone"})]);
    assert!(kit.tart(&["clone", BASE, &kit.name()]).ok().starts_with("pulling "));
}

#[test]
fn f15_a_run_that_ignores_the_interrupt_is_killed_by_stop() {
    let kit = kit(&[json!({"command": "run", "fault": "ignore_interrupt"})]);
    let run = kit.boot(&[]);
    kit.tart(&["stop", "--timeout", "1", &run.name]).is(0, "", "");
    assert!(killed_by(&run.end(), Signal::SIGKILL));
}

#[test]
fn f16_saving_fails_or_hangs_and_restoring_fails_or_is_dropped() {
    let kit = kit(&[json!({"command": "run", "fault": "suspend_fails"})]);
    let run = kit.boot(&["--suspendable"]);
    kit.tart(&["suspend", &run.name]).is(0, "", "");
    let out = run.end();
    assert!(out.status.code() == Some(1) && out.stdout.starts_with("Failed to suspend the VM: "), "{out:?}");

    kit.host().faults(&[json!({"command": "run", "fault": "suspend_hangs"})]);
    let run = kit.boot(&["--suspendable"]);
    kit.tart(&["suspend", &run.name]).is(0, "", "");
    kit.wait_for("it saves", || run.stdout_so_far().ends_with("creating a snapshot...\n"));
    kit.tart(&["stop", "--timeout", "1", &run.name]).is(0, "", "");
    assert!(killed_by(&run.end(), Signal::SIGKILL));

    kit.host().faults(&[
        json!({"command": "run", "fault": "restore_fails", "skip": 1}),
        json!({"command": "run", "fault": "mac_collision", "skip": 2}),
    ]);
    let run = kit.boot(&["--suspendable"]);
    let vm = run.name.clone();
    kit.tart(&["suspend", &vm]).ok();
    run.end().ok();
    kit.spawn(&vm, &[]).end().fails(1, "Code=12");
    assert_eq!(kit.state(&vm), "suspended");
    let run = kit.start(&vm, &[]);
    run.ready();
    assert!(run.stdout_so_far().ends_with("Resetting VM to assign a new MAC address...\n"), "{}", run.stdout_so_far());
    run.stop();
}

#[test]
fn f17_f18_a_host_that_cannot_start_vms_says_why() {
    for (what, text) in [
        ("keychain", "SecKeyCreateRandomKey_ios failed"),
        ("security", "Code=-9"),
        ("start", "Error Domain=VZErrorDomain Code=1 Description=\"The virtual machine failed to start.\""),
        ("storage", "Failed to lock auxiliary storage."),
    ] {
        ended(json!({"command": "run", "fault": "start_error", "what": what})).fails(1, text);
    }
}

#[test]
fn f19_softnet_dies_in_the_middle_or_does_not_answer() {
    let kit = Kit::sim(Setup::default());
    let file = kit.scratch().join("now");
    kit.host().faults(&[json!({"command": "softnet", "fault": "dies", "file": file})]);
    let run = kit.boot(&["--net-softnet"]);
    std::fs::write(&file, "").unwrap();
    run.end().is(1, "", "RuntimeFailed(why: \"Softnet process terminated prematurely\")\n");
}

#[test]
fn f20_list_fails_once_has_more_keys_or_an_old_schema() {
    let kit = kit(&[
        json!({"command": "list", "fault": "fail", "exit": 1, "stderr": "Error: The file “x” couldn’t be opened."}),
        json!({"command": "list", "fault": "extra_keys", "skip": 1}),
        json!({"command": "list", "fault": "old_schema", "skip": 2}),
    ]);
    kit.tart(&["list", "--format", "json"]).is(1, "", "Error: The file “x” couldn’t be opened.\n");
    assert!(kit.list()[0]["FutureKey"].is_object());
    let old = kit.list();
    assert!(old[0]["SizeOnDisk"].is_u64() && old[0].get("Accessed").is_none(), "{old:?}");
}

#[test]
fn f22_tart_is_missing_of_another_version_or_aborts() {
    let kit = kit(&[
        json!({"command": "--version", "fault": "version", "text": "1.0.0"}),
        json!({"command": "list", "fault": "abort"}),
    ]);
    kit.tart(&["--version"]).is(0, "1.0.0\n", "");
    assert!(killed_by(&kit.tart(&["list"]), Signal::SIGABRT));
    let tart = kit.host().tart_path();
    let aside = tart.with_extension("aside");
    std::fs::rename(&tart, &aside).unwrap();
    let error = kit.command(&["list"]).output().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
    std::fs::rename(aside, tart).unwrap();
}

#[test]
fn f23_the_work_place_of_a_clone_is_collected_under_it() {
    let kit = kit(&[json!({"command": "clone", "fault": "tmp_gone"})]);
    let vm = kit.name();
    kit.tart(&["clone", BASE, &vm]).fails(1, "No such file");
    kit.tart(&["clone", BASE, &vm]).is(0, "", "");
}

#[test]
fn f24_the_clock_of_a_guest_is_off() {
    let kit = kit(&[json!({"command": "run", "fault": "clock_offset", "seconds": -86400})]);
    let run = kit.boot(&[]);
    let guest: u64 = run.exec(&["date", "+%s"]).ok().trim().parse().unwrap();
    let real: u64 = run.exec(&["/usr/lib/sim-tart/date.real", "+%s"]).ok().trim().parse().unwrap();
    assert!((86_390..86_410).contains(&(real - guest)), "{guest} {real}");
    run.stop();
}

#[test]
fn f25_a_set_that_dies_leaves_a_configuration_that_fails_every_clone() {
    let kit = kit(&[json!({"command": "set", "fault": "truncated_config"})]);
    let vm = kit.vm();
    assert!(killed_by(&kit.tart(&["set", &vm, "--cpu", "5"]), Signal::SIGKILL));
    kit.tart(&["clone", BASE, &kit.name()]).fails(1, "Error: ");
    kit.tart(&["delete", &vm]).is(0, "", "");
    kit.tart(&["clone", BASE, &kit.name()]).is(0, "", "");
}

#[test]
fn rules_match_by_name_and_count_across_processes() {
    let kit = kit(&[json!({"command": "clone", "vm": "*-b", "skip": 1, "times": 2, "fault": "fail", "exit": 9})]);
    let code = |name: &str| kit.tart(&["clone", BASE, name]).status.code();
    assert_eq!((code("x-a"), code("x-b")), (Some(0), Some(0)));
    assert_eq!((code("y-b"), code("y-a"), code("y-b"), code("z-b")), (Some(9), Some(0), Some(9), Some(0)));
    kit.tart(&["delete", "x-a", "x-b", "y-a", "z-b"]).is(0, "", "");
}
