//! `run`, its signals, `stop`, `delete` and the locks (contract 1.3 to 1.6, 1.15; kit cases 1 and 2).

use std::fs::File;
use std::os::unix::fs::FileTypeExt as _;
use std::process::Command;

use nix::sys::signal::Signal;

use super::kit::{Kit, killed_by, output};

#[test]
fn a_run_is_silent_listed_as_running_and_holds_the_lock() {
    let kit = Kit::any();
    let mut run = kit.boot(&[]);
    let vm = run.name.clone();
    assert_eq!(run.stdout_so_far(), "", "1.3: there is no message for a boot");
    assert!(!run.has_ended());
    // 1.15: the lock on config.json is what "running" means, and its holder is the process.
    let config = File::open(kit.vm_dir(&vm).join("config.json")).expect("1.17: config.json");
    let asked = nix::libc::flock {
        l_type: nix::libc::F_WRLCK as nix::libc::c_short,
        l_whence: nix::libc::SEEK_SET as nix::libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    let mut found = asked;
    nix::fcntl::fcntl(&config, nix::fcntl::FcntlArg::F_GETLK(&mut found)).expect("F_GETLK");
    assert_eq!((i32::from(found.l_type), found.l_pid), (nix::libc::F_WRLCK, run.pid()));

    kit.tart(&["run", &vm, "--no-graphics"]).is(2, "", &format!("VM \"{vm}\" is already running!\n"));
    kit.tart(&["delete", &vm]).is(1, "", &format!("VM \"{vm}\" is running\n"));
    let out = run.stop();
    out.is(0, "Stopping VM...\n", "");
    assert_eq!(kit.state(&vm), "stopped");
    let socket = kit.vm_dir(&vm).join("control.sock");
    let kind = std::fs::symlink_metadata(&socket).expect("1.3: it stays behind").file_type();
    assert!(kind.is_socket());
    assert!(std::os::unix::net::UnixStream::connect(&socket).is_err(), "and it is dead");
    // A stale socket does not disturb the next run.
    let run = kit.start(&vm, &[]);
    run.ready();
    run.stop();
    kit.tart(&["delete", &vm]).is(0, "", "");
    assert!(!kit.vm_dir(&vm).exists());
}

#[test]
fn signals_end_a_run_as_the_table_says() {
    let kit = Kit::any();
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGKILL] {
        let run = kit.boot(&[]);
        let vm = run.name.clone();
        run.signal(signal);
        let out = run.end();
        assert!(killed_by(&out, signal), "{signal}: {out:?}");
        assert_eq!((&*out.stdout, &*out.stderr), ("", ""), "{signal}");
        // The lock is the kernel's: it is gone with the process.
        assert_eq!(kit.state(&vm), "stopped");
        kit.tart(&["delete", &vm]).is(0, "", "");
    }
    let run = kit.boot(&[]);
    run.signal(Signal::SIGINT);
    run.end().is(0, "Stopping VM...\n", "");
}

#[test]
fn sigint_before_the_guest_has_booted_ends_the_run_too() {
    let kit = Kit::any();
    let run = kit.start(&kit.vm(), &[]);
    kit.wait_for("the control socket is bound", || kit.vm_dir(&run.name).join("control.sock").exists());
    run.stop();
}

#[test]
fn a_guest_that_shuts_down_ends_the_run_with_0() {
    let kit = Kit::any();
    let run = kit.boot(&[]);
    // The guest may be gone before the agent has answered.
    let _ = run.shell("sudo shutdown -h now");
    run.end().is(0, "guest has stopped the virtual machine\n", "");
}

#[test]
fn a_guest_that_reboots_keeps_its_run_and_comes_back() {
    let kit = Kit::any();
    let run = kit.boot(&[]);
    run.shell("echo kept > $HOME/kept; echo volatile > /tmp/volatile; sync").ok();
    let _ = run.shell("sudo reboot");
    kit.wait_for("the rebooted agent answers", || run.shell("test ! -e /tmp/volatile").status.success());
    assert_eq!(run.shell("cat $HOME/kept").ok(), "kept\n");
    run.stop();
}

#[test]
fn a_run_survives_the_death_of_its_parent() {
    let kit = Kit::any();
    let vm = kit.vm();
    let mut shell = Command::new("/bin/sh");
    // 1.3: in its own session, with its output in files.
    shell.args(["-c", "set -m; \"$@\" >\"$0.out\" 2>&1 & exit 0"]).arg(kit.scratch().join("orphan"));
    let run = kit.command(&["run", &vm, "--no-graphics"]);
    shell.arg(run.get_program()).args(run.get_args());
    if kit.is_simulated() {
        shell.env_clear().envs(kit.host().env());
    }
    assert!(output(&mut shell).status.success());
    kit.wait_for("the orphan runs and answers", || kit.tart(&["exec", &vm, "true"]).status.success());
    kit.tart(&["stop", &vm]).is(0, "", "");
    assert_eq!(kit.state(&vm), "stopped");
}

#[test]
fn stop_kills_a_run_that_does_not_react_and_returns_at_once() {
    let kit = Kit::any();
    let run = kit.boot(&[]);
    let vm = run.name.clone();
    // A stopped process cannot react to SIGINT, but SIGKILL ends it.
    run.signal(Signal::SIGSTOP);
    kit.tart(&["stop", "--timeout", "1", &vm]).is(0, "", "");
    assert!(killed_by(&run.end(), Signal::SIGKILL));
    kit.wait_for("delete gets the lock", || kit.tart(&["delete", &vm]).status.success());
}

#[test]
fn nothing_of_a_guest_survives_the_death_of_its_run() {
    let kit = Kit::any();
    let shared = kit.scratch().join("pulse");
    std::fs::create_dir(&shared).expect("a directory");
    let run = kit.boot(&[&format!("--dir=pulse:{}", shared.display())]);
    let beat = "cd '/Volumes/My Shared Files/pulse' && (nohup sh -c 'while :; do date > beat; done' \
                >/dev/null 2>&1 </dev/null &) ; while [ ! -s beat ]; do :; done";
    run.shell(beat).ok();
    run.signal(Signal::SIGKILL);
    assert!(killed_by(&run.end(), Signal::SIGKILL));
    let file = shared.join("beat");
    kit.wait_for("the guest has stopped writing", || {
        let _ = std::fs::remove_file(&file);
        // Several lists take much longer than one beat.
        (0..5).all(|_| !kit.list().is_empty() && !file.exists())
    });
}

#[test]
fn exclusive_network_flags_and_bad_shares_are_usage_errors() {
    let kit = Kit::any();
    let vm = kit.vm();
    let text = "Error: --net-bridged, --net-softnet and --net-host are mutually exclusive";
    kit.tart(&["run", &vm, "--net-host", "--net-softnet"]).fails(64, text);
    kit.tart(&["run", &vm, "--net-host", "--net-softnet-allow", "10.0.0.0/8"]).fails(64, text);
    let text = "invalid --dir syntax: for multiple directory shares each one of them should be named";
    kit.tart(&["run", &vm, "--dir", "/usr", "--dir", "b:/bin"]).fails(64, text);
    assert_eq!(kit.state(&vm), "stopped");
}
