//! softnet and its control descriptor (contract 6; kit case 9).

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;

use alloy_tests::sim_host::{Policy, Setup};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde_json::{Value, json};

use super::kit::{Kit, Run};

/// The worker's end of the control channel.
struct Control {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Control {
    fn ask(&mut self, request: &Value) -> Value {
        self.ask_text(&request.to_string())
    }

    fn ask_text(&mut self, text: &str) -> Value {
        writeln!(self.stream, "{text}").expect("softnet listens");
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("softnet answers");
        serde_json::from_str(&line).expect("JSON")
    }
}

/// A run whose softnet is controlled; the descriptor is inherited.
fn controlled<'a>(kit: &'a Kit, flags: &[&str]) -> (Run<'a>, Control) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let theirs = OwnedFd::from(theirs);
    let number = theirs.as_raw_fd().to_string();
    let vm = kit.vm();
    let run = kit.spawn(&vm, &[&["--net-softnet-control-fd", &number], flags].concat());
    drop(theirs);
    let lines = BufReader::new(ours.try_clone().unwrap());
    (run, Control { stream: ours, lines })
}

fn policy(kit: &Kit, vm: &str) -> Policy {
    kit.wait_for("softnet has a policy", || kit.host().softnet_policy(vm).is_some());
    kit.host().softnet_policy(vm).unwrap()
}

#[test]
fn a_policy_is_set_atomically_and_confirmed_over_the_descriptor() {
    let kit = Kit::sim(Setup::default());
    let (run, mut control) = controlled(&kit, &["--net-softnet-block", "0.0.0.0/0"]);
    let get = json!({"jsonrpc": "2.0", "id": "a", "method": "softnet.policy.get"});
    let result = json!({"allow": [], "block": ["0.0.0.0/0"], "ruleCount": 1});
    assert_eq!(control.ask(&get), json!({"jsonrpc": "2.0", "id": "a", "result": result}));
    let rules = json!({"allow": ["@host", "10.1.2.3/32"], "block": ["0.0.0.0/0"]});
    let set = control.ask(&json!({"jsonrpc": "2.0", "id": 1, "method": "softnet.policy.set", "params": rules}));
    assert_eq!(set["result"]["ruleCount"], 3, "{set}");
    let found = policy(&kit, &run.name);
    assert_eq!((found.sets, found.allow.len(), &*found.block[0]), (1, 2, "0.0.0.0/0"));
    // Closing the channel keeps the policy.
    drop(control);
    run.ready();
    assert_eq!(policy(&kit, &run.name), found);
    run.stop();
}

#[test]
fn wrong_requests_have_the_standard_errors_and_change_nothing() {
    let kit = Kit::sim(Setup::default());
    let (run, mut control) = controlled(&kit, &[]);
    let code = |answer: Value| answer["error"]["code"].as_i64().unwrap_or_else(|| panic!("{answer}"));
    assert_eq!(code(control.ask_text("{")), -32700);
    assert_eq!(code(control.ask(&json!({"jsonrpc": "2.0", "method": "softnet.policy.get"}))), -32600);
    assert_eq!(code(control.ask(&json!({"jsonrpc": "2.0", "id": 1, "method": "softnet.no.such"}))), -32601);
    for params in [
        json!({"allow": ["10.0.0.0/33"], "block": []}),
        json!({"allow": []}),
        json!({"allow": [], "block": [], "more": 1}),
        json!({"allow": [], "block": [], "desiredRevision": 1}),
        json!({"allow": ["example.com"], "block": []}),
    ] {
        let request = json!({"jsonrpc": "2.0", "id": 1, "method": "softnet.policy.set", "params": params});
        assert_eq!(code(control.ask(&request)), -32602, "{request}");
    }
    assert_eq!(policy(&kit, &run.name).sets, 0);
    run.stop();
}

#[test]
fn the_first_published_form_counts_revisions() {
    let kit = Kit::sim(Setup { first_softnet: true, ..Setup::default() });
    let (run, mut control) = controlled(&kit, &[]);
    let mut set = |revision: Value, allow: Value| {
        let params = json!({"allow": allow, "block": [], "desiredRevision": revision});
        control.ask(&json!({"jsonrpc": "2.0", "id": 1, "method": "softnet.policy.set", "params": params}))
    };
    assert_eq!(set(json!(1), json!([]))["result"]["desiredRevision"], 1);
    assert_eq!(set(json!(1), json!([]))["error"]["code"], -32001);
    assert_eq!(set(json!(2), json!(["0.0.0.0/0"]))["error"]["code"], -32002, "bridge isolation is fixed at start");
    assert_eq!(set(json!(2), json!([]))["result"]["bridgeIsolation"], true);
    run.stop();
}

#[test]
fn a_descriptor_must_be_a_connected_unix_stream_above_2() {
    let kit = Kit::sim(Setup::default());
    let refused = |number: &str, change: &dyn Fn(&mut std::process::Command)| {
        let run = kit.spawn_with(&kit.vm(), &["--net-softnet-control-fd", number], |command| change(command));
        let out = run.end();
        assert_eq!(out.status.code(), Some(1), "{out:?}");
        out.stderr
    };
    let prefix = "Error: InitializationFailed(why: \"Softnet control file descriptor ";
    assert_eq!(refused("2", &|_| ()), format!("{prefix}must be greater than 2\")\n"));
    let closed = refused("77", &|_| ());
    assert!(closed.starts_with(&format!("{prefix}is not a socket: ")), "{closed}");
    let (datagram, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
    fcntl(&datagram, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let text = refused(&datagram.as_raw_fd().to_string(), &|_| ());
    assert_eq!(text, format!("{prefix}must be a Unix stream socket\")\n"));
    let unconnected = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Unix,
        nix::sys::socket::SockType::Stream,
        nix::sys::socket::SockFlag::empty(),
        None,
    )
    .unwrap();
    let text = refused(&unconnected.as_raw_fd().to_string(), &|_| ());
    assert!(text.starts_with(&format!("{prefix}is not connected: ")), "{text}");
}

#[test]
fn softnet_dies_with_its_run_and_the_run_with_its_softnet() {
    let kit = Kit::sim(Setup::default());
    let run = kit.boot(&["--net-softnet"]);
    let pid = policy(&kit, &run.name).pid;
    assert!(kit.host().processes().iter().any(|found| found.pid.unsigned_abs() == pid));
    run.signal(nix::sys::signal::Signal::SIGKILL);
    run.end();
    kit.wait_for("softnet has noticed", || !alloy_tests::process::is_alive(pid.cast_signed()));
    let run = kit.boot(&["--net-softnet"]);
    alloy_tests::process::signal(policy(&kit, &run.name).pid.cast_signed(), nix::sys::signal::Signal::SIGKILL);
    run.end().is(1, "", "RuntimeFailed(why: \"Softnet process terminated prematurely\")\n");
}

#[test]
fn without_a_working_softnet_a_run_fails_and_never_falls_back() {
    let kit = Kit::sim(Setup::default());
    let run = |fault: Option<Value>, flags: &[&str]| {
        kit.host().faults(&fault.into_iter().collect::<Vec<_>>());
        kit.spawn(&kit.vm(), flags).end()
    };
    let missing = "Error: InitializationFailed(why: \"softnet not found in PATH\")\n";
    run(Some(json!({"command": "softnet", "fault": "missing"})), &["--net-softnet"]).is(1, "", missing);
    let out = run(Some(json!({"command": "softnet", "fault": "no_privilege"})), &["--net-softnet-block", "0.0.0.0/0"]);
    let privilege = "root privileges are required to run and passwordless sudo was not available\n";
    out.is(1, "", &format!("{privilege}RuntimeFailed(why: \"Softnet process terminated prematurely\")\n"));
    kit.host().uninstall("softnet").unwrap();
    run(None, &["--net-softnet"]).is(1, "", missing);
}

#[test]
fn a_control_channel_can_refuse_or_say_nothing() {
    let kit = Kit::sim(Setup::default());
    kit.host().faults(&[
        json!({"command": "softnet", "fault": "conflict"}),
        json!({"command": "softnet", "fault": "no_reply", "skip": 1}),
    ]);
    let set = json!({"jsonrpc": "2.0", "id": 1, "method": "softnet.policy.set", "params": {"allow": [], "block": []}});
    let (run, mut control) = controlled(&kit, &[]);
    assert_eq!(control.ask(&set)["error"]["code"], -32001);
    run.stop();
    let (run, control) = controlled(&kit, &[]);
    writeln!(&control.stream, "{set}").unwrap();
    kit.wait_for("it has obeyed", || policy(&kit, &run.name).sets == 1);
    control.stream.set_nonblocking(true).unwrap();
    let silent = std::io::Read::read(&mut &control.stream, &mut [0; 1]).unwrap_err();
    assert_eq!(silent.kind(), std::io::ErrorKind::WouldBlock);
    run.stop();
}
