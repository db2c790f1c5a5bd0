//! What only a simulated host can show: slots across homes, room on the disk, the journal, garbage, the clock of a guest
//! (contract 1.1, 1.16, 2, 7.3; kit case 3).

use alloy_tests::sim_host::{Profile, Setup};

use super::kit::{BASE, Kit};

#[test]
fn a_third_macos_vm_is_refused_across_homes_and_linux_guests_do_not_count() {
    let kit = Kit::sim(Setup::default());
    let other_home = kit.host().other_home("other-user");
    let in_other = |args: &[&str]| {
        let mut command = kit.command(args);
        super::kit::output(command.env("TART_HOME", &other_home))
    };
    in_other(&["clone", BASE, "elsewhere"]).ok();
    let elsewhere = kit.spawn_with("elsewhere", &[], |command| {
        command.env("TART_HOME", &other_home);
    });
    kit.wait_for("the other user's VM runs", || in_other(&["exec", "elsewhere", "true"]).status.success());
    let first = kit.boot(&[]);
    let third = kit.vm();
    let text = format!("The number of VMs exceeds the system limit (other running VMs: {})\n", first.name);
    kit.spawn(&third, &[]).end().is(1, "", &text);

    kit.host().publish("registry.test/alloy/linux:latest", &Profile::linux()).unwrap();
    kit.tart(&["pull", "registry.test/alloy/linux:latest"]).ok();
    let linux = kit.name();
    kit.tart(&["clone", "registry.test/alloy/linux:latest", &linux]).ok();
    let linux = kit.start(&linux, &[]);
    linux.ready();
    assert_eq!(linux.exec(&["pwd"]).ok(), "/home/admin\n");
    linux.stop();

    first.stop();
    // The slot is free when the run has ended.
    let run = kit.start(&third, &[]);
    run.ready();
    run.stop();
    in_other(&["stop", "elsewhere"]).is(0, "", "");
    elsewhere.end();
    in_other(&["delete", "elsewhere"]).is(0, "", "");
}

#[test]
fn a_linux_guest_without_a_macos_vm_beside_it_has_no_list_in_the_refusal() {
    let kit = Kit::sim(Setup::default());
    kit.host().faults(&[serde_json::json!({"command": "run", "fault": "limit"})]);
    kit.spawn(&kit.vm(), &[]).end().is(1, "", "The number of VMs exceeds the system limit\n");
}

#[test]
fn garbage_in_tmp_goes_with_the_next_command_except_for_clone_and_pull() {
    let kit = Kit::sim(Setup::default());
    let garbage = kit.home().join("tmp/1234");
    std::fs::create_dir(&garbage).unwrap();
    kit.vm();
    kit.tart(&["pull", BASE]).ok();
    assert!(garbage.exists(), "1.1: not before clone and pull");
    let worked_in = kit.home().join("tmp/5678");
    std::fs::create_dir(&worked_in).unwrap();
    let held =
        nix::fcntl::Flock::lock(std::fs::File::open(&worked_in).unwrap(), nix::fcntl::FlockArg::LockExclusiveNonblock);
    kit.list();
    assert!(!garbage.exists() && worked_in.exists(), "what somebody works in stays");
    drop(held);
    kit.list();
    assert!(!worked_in.exists());
}

#[test]
fn the_journal_has_a_line_for_every_invocation_in_the_order_of_starting() {
    let kit = Kit::sim(Setup::default());
    let run = kit.boot(&[]);
    kit.tart(&["stop", "no-such-vm"]);
    run.signal(nix::sys::signal::Signal::SIGKILL);
    run.end();
    let journal = kit.host().journal();
    let of = |command: &str| journal.iter().filter(|entry| entry.argv[0] == command).collect::<Vec<_>>();
    assert_eq!(journal[0].argv, ["pull", BASE]);
    assert_eq!((of("stop")[0].exit, of("clone")[0].exit), (Some(2), Some(0)));
    assert!(of("stop")[0].end_ms >= Some(of("stop")[0].start_ms) && of("clone")[0].no_auto_prune);
    assert_eq!((of("run").len(), of("run")[0].exit, of("run")[0].end_ms), (1, None, None), "it was killed");
    assert!(journal.is_sorted_by_key(|entry| entry.start_ms));
}

#[test]
fn pruning_makes_room_by_the_image_that_was_used_least_and_can_be_switched_off() {
    let kit = Kit::sim(Setup::default());
    let (old, new) = ("registry.test/alloy/old:latest", "registry.test/alloy/new:latest");
    let profile = |cpu| Profile { allocated_gb: 30.0, cpu, ..Profile::default() };
    kit.host().publish(old, &profile(4)).unwrap();
    kit.host().publish(new, &profile(5)).unwrap();
    kit.tart(&["pull", old]).ok();
    kit.tart(&["clone", BASE, &kit.name()]).ok();
    // 27 + 30 are taken; the pull wants 50 and a bit, and needs 30.
    kit.host().set_capacity_gb(80.0).unwrap();
    let refused = kit.tart(&["pull", new]);
    refused.fails(1, "No space left on device");
    let names = || kit.list().iter().map(|image| image["Name"].to_string()).collect::<Vec<_>>().join(" ");
    assert!(names().contains(old), "TART_NO_AUTO_PRUNE: {}", names());
    let mut command = kit.command(&["pull", new]);
    super::kit::output(command.env_remove("TART_NO_AUTO_PRUNE")).ok();
    assert!(!names().contains(old) && names().contains(BASE) && names().contains(new), "{}", names());
    kit.tart(&["prune", "--space-budget", "1"]).is(0, "", "");
    assert!(!names().contains('/'), "{}", names());
}

#[test]
fn prune_of_vms_spares_the_running_and_takes_the_suspended() {
    let kit = Kit::sim(Setup::default());
    let run = kit.boot(&["--suspendable"]);
    let suspended = run.name.clone();
    kit.tart(&["suspend", &suspended]).ok();
    run.end();
    let run = kit.boot(&[]);
    kit.tart(&["prune", "--entries", "vms", "--older-than", "0"]).is(0, "", "");
    assert_eq!((kit.state(&suspended), kit.state(&run.name)), (String::new(), "running".to_owned()));
    run.stop();
}

#[test]
fn the_clock_of_a_resumed_guest_is_stale_until_it_is_set() {
    let kit = Kit::sim(Setup::default());
    kit.host().faults(&[serde_json::json!({"command": "run", "skip": 1, "fault": "clock_offset", "seconds": -3600})]);
    let run = kit.boot(&["--suspendable"]);
    let vm = run.name.clone();
    kit.tart(&["suspend", &vm]).ok();
    run.end();
    let run = kit.start(&vm, &[]);
    run.ready();
    let behind = |run: &super::kit::Run<'_>| -> i64 {
        let guest: i64 = run.exec(&["date", "+%s"]).ok().trim().parse().unwrap();
        let host = std::process::Command::new("date").arg("+%s").output().unwrap();
        String::from_utf8(host.stdout).unwrap().trim().parse::<i64>().unwrap() - guest
    };
    assert!((3595..3660).contains(&behind(&run)), "{}", behind(&run));
    let set = "sudo -n date -u \"$(TZ=UTC0 /usr/lib/sim-tart/date.real -u +%m%d%H%M%Y.%S)\"";
    run.shell(set).ok();
    assert!((-2..5).contains(&behind(&run)), "{}", behind(&run));
    run.stop();
}

#[test]
fn export_and_import_make_a_vm_of_another_name() {
    let kit = Kit::sim(Setup::default());
    let (vm, new) = (kit.vm(), kit.name());
    let file = kit.scratch().join("vm.tvm").display().to_string();
    kit.tart(&["export", &vm, &file]).is(0, "exporting...\n", "");
    kit.tart(&["import", &file, &new]).is(0, "importing...\n", "");
    let run = kit.start(&new, &[]);
    run.ready();
    run.stop();
}

#[test]
fn a_guest_without_namespaces_is_a_directory_and_ends_with_its_run() {
    let kit = Kit::sim(Setup { isolated: false, ..Setup::default() });
    let input = kit.scratch().join("input");
    std::fs::create_dir(&input).unwrap();
    std::fs::write(input.join("file"), "shared\n").unwrap();
    let run = kit.boot(&[&format!("--dir={}:ro", input.display())]);
    let root = kit.vm_dir(&run.name).join("guest/root");
    assert_eq!(run.exec(&["pwd"]).ok().trim(), root.join("Users/admin").to_str().unwrap());
    assert_eq!(run.shell("cat \"$HOME/../../Volumes/My Shared Files/file\"").ok(), "shared\n");
    run.shell("setsid sleep 4321 >/dev/null 2>&1 </dev/null &").ok();
    let left = || kit.host().processes().iter().filter(|found| found.line.contains("sleep 4321")).count();
    kit.wait_for("what the guest started runs", || left() == 1);
    run.signal(nix::sys::signal::Signal::SIGKILL);
    run.end();
    kit.wait_for("what the guest started is gone", || left() == 0);
    let run = kit.boot(&[]);
    let _ = run.shell("true");
    run.stop();
}
