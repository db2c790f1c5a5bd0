//! `exec` and shares (contract 4 and 5; kit case 4).

use std::io::{Read as _, Write as _};
use std::process::Stdio;

use nix::sys::signal::Signal;

use super::kit::{Kit, killed_by, output};

const SHA256: &str = "if command -v sha256sum >/dev/null; then exec sha256sum; else exec shasum -a 256; fi";

#[test]
fn the_exit_code_and_both_streams_are_those_of_the_command() {
    let kit = Kit::any();
    let run = kit.boot(&[]);
    for code in [0, 1, 2, 64, 255] {
        run.shell(&format!("echo out; echo err >&2; exit {code}")).is(code, "out\n", "err\n");
    }
    // 4.3: -1 of the agent, as a status.
    assert_eq!(run.shell("kill -KILL $$").status.code(), Some(255));
    let out = run.exec(&["no-such-program-anywhere"]);
    let text = "Error: unknown (2): exec: \"no-such-program-anywhere\": executable file not found in $PATH\n";
    out.is(1, "", text);
    run.stop();
}

#[test]
fn everything_after_the_name_belongs_to_the_guest() {
    let kit = Kit::any();
    let run = kit.boot(&[]);
    // 4.2: also what looks like a flag of tart, and a literal `--`.
    assert_eq!(run.exec(&["echo", "-i", "--help", "--"]).ok(), "-i --help --\n");
    let out = run.exec(&["--", "true"]);
    out.is(1, "", "Error: unknown (2): exec: \"--\": executable file not found in $PATH\n");
    // Without a shell nothing is expanded.
    assert_eq!(run.exec(&["echo", "$HOME"]).ok(), "$HOME\n");
    run.stop();
}

#[test]
fn the_environment_is_the_agents_and_not_the_hosts() {
    let kit = Kit::any();
    let run = kit.boot(&[]);
    let mut command = kit.command(&["exec", &run.name, "env"]);
    let out = output(command.env("CANARY_OF_THE_HOST", "1"));
    let env = out.ok();
    assert!(!env.contains("CANARY_OF_THE_HOST") && !env.contains("TART_HOME"), "{env}");
    assert!(env.lines().any(|line| line == "PATH=/bin:/usr/bin:/usr/sbin:/usr/local/bin:/opt/homebrew/bin"), "{env}");
    assert!(env.lines().any(|line| line == "TERM=xterm-256color"), "{env}");
    assert_eq!(run.exec(&["pwd"]).ok(), "/Users/admin\n");
    assert_eq!(run.shell("whoami; sudo -n true; touch here && cat here").ok(), "admin\n");
    run.stop();
}

#[test]
fn stdin_is_the_null_device_or_streamed_to_its_end() {
    let kit = Kit::any();
    let run = kit.boot(&[]);
    assert_eq!(run.exec(&["cat"]).ok(), "", "4.2: without -i the child's stdin is the null device");
    let mut command = kit.command(&["exec", "-i", &run.name, "/bin/sh", "-c", SHA256]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("tart starts");
    let sent: Vec<u8> = alloy_tests::noise::blocks(3, 10 << 20).flatten().collect();
    child.stdin.take().expect("a pipe").write_all(&sent).expect("it reads");
    let out = child.wait_with_output().expect("it ends");
    let sum = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(sum.starts_with(&alloy_tests::noise::sha256_of(&sent)), "{sum} {out:?}");
    run.stop();
}

#[test]
fn ten_megabytes_arrive_as_they_were_written() {
    let kit = Kit::any();
    let shared = kit.scratch().join("in");
    std::fs::create_dir(&shared).expect("a directory");
    let sent: Vec<u8> = alloy_tests::noise::blocks(4, 10 << 20).flatten().collect();
    std::fs::write(shared.join("noise"), &sent).expect("a file");
    let run = kit.boot(&[&format!("--dir={}:ro", shared.display())]);
    let out = kit.command(&["exec", &run.name, "cat", "/Volumes/My Shared Files/noise"]).output().expect("tart starts");
    assert!(out.status.success() && out.stdout == sent, "{} bytes of {}", out.stdout.len(), sent.len());
    run.stop();
}

#[test]
fn a_grandchild_that_holds_the_output_keeps_exec_open_and_is_not_killed_with_it() {
    let kit = Kit::any();
    let run = kit.boot(&[]);
    let mut command = kit.command(&["exec", &run.name, "/bin/sh", "-c", "sleep 1000 & echo $!; exit 3"]);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("tart starts");
    let mut pid = [0; 1];
    let mut text = String::new();
    let mut stdout = child.stdout.take().expect("a pipe");
    while !text.ends_with('\n') {
        stdout.read_exact(&mut pid).expect("the pid");
        text.push(char::from(pid[0]));
    }
    let grandchild = text.trim();
    // The command has exited for long when other commands have run.
    for _ in 0..3 {
        run.exec(&["true"]).ok();
    }
    assert!(child.try_wait().expect("a child").is_none(), "4.4: the stream is open while the grandchild holds it");
    alloy_tests::process::signal(i32::try_from(child.id()).expect("a pid"), Signal::SIGINT);
    assert_eq!(child.wait().expect("a child").code(), Some(1), "4.3: exec is cancelled");
    run.shell(&format!("kill -0 {grandchild}")).ok();
    run.shell(&format!("kill {grandchild}")).ok();
    run.stop();
}

#[test]
fn a_cancelled_exec_kills_its_direct_child() {
    let kit = Kit::any();
    let run = kit.boot(&[]);
    let mut child = kit.command(&["exec", &run.name, "sleep", "12345"]).spawn().expect("tart starts");
    let count = || run.shell("ps -axo args= | grep -c '^sleep 12345'").stdout.trim().to_owned();
    kit.wait_for("the command runs", || count() == "1");
    let _ = child.kill();
    let _ = child.wait();
    kit.wait_for("the command is gone", || count() == "0");
    run.stop();
}

#[test]
fn a_vm_that_dies_under_a_command_is_exit_1() {
    let kit = Kit::any();
    let run = kit.boot(&[]);
    let mut command = kit.command(&["exec", &run.name, "/bin/sh", "-c", "echo started; sleep 1000"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("tart starts");
    let mut started = [0; 8];
    child.stdout.as_mut().expect("a pipe").read_exact(&mut started).expect("it started");
    run.signal(Signal::SIGKILL);
    assert!(killed_by(&run.end(), Signal::SIGKILL));
    let out = child.wait_with_output().expect("it ends");
    assert_eq!(out.status.code(), Some(1));
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(text.starts_with("Error: unavailable (14): "), "{text}");
}

#[test]
fn exec_without_an_agent_gives_up_with_a_hint() {
    let kit = Kit::any();
    let run = kit.start(&kit.vm(), &[]);
    kit.wait_for("the control socket is bound", || kit.vm_dir(&run.name).join("control.sock").exists());
    if kit.is_simulated() {
        // On a Mac the agent of the base image answers after the boot, in time for the client's own patience.
        kit.host().faults(&[serde_json::json!({"command": "agent", "fault": "absent", "times": 0})]);
        let out = run.exec(&["true"]);
        assert_eq!(out.status.code(), Some(1), "{out:?}");
        assert!(out.stderr.starts_with("Failed to connect to the VM using its control socket: "), "{out:?}");
        assert!(out.stderr.ends_with(", is the Tart Guest Agent running?\n"), "{out:?}");
        kit.host().faults(&[]);
    }
    run.ready();
    run.stop();
}

#[test]
fn shares_are_live_and_read_only_where_asked() {
    let kit = Kit::any();
    let (input, output) = (kit.scratch().join("input"), kit.scratch().join("output"));
    std::fs::create_dir(&input).expect("a directory");
    std::fs::create_dir(&output).expect("a directory");
    std::fs::write(input.join("file"), "from the host\n").expect("a file");
    let flags = [format!("--dir=in:{}:ro", input.display()), format!("--dir=out:{}", output.display())];
    let run = kit.boot(&[&flags[0], &flags[1]]);
    let text = "cd '/Volumes/My Shared Files'; cat in/file; echo late > out/file; \
                if touch in/new 2>/dev/null; then echo written; else echo refused; fi";
    run.shell(text).is(0, "from the host\nrefused\n", "");
    assert_eq!(std::fs::read_to_string(output.join("file")).expect("written by the guest"), "late\n");
    std::fs::write(input.join("later"), "live\n").expect("a file");
    assert_eq!(run.exec(&["cat", "/Volumes/My Shared Files/in/later"]).ok(), "live\n");
    run.stop();
}
