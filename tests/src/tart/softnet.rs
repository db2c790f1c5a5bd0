//! The simulated `softnet`: it filters nothing, because a simulated guest has no network, but it holds a policy that the
//! control channel changes and that tests read from `SIM_TART_HOST/softnet/VM.json`.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::watch;

const RULES_MAX: usize = 4096;
const FRAME_MAX: usize = 1 << 20;

/// What is known of one softnet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    pub vm: String,
    pub pid: u32,
    pub mac: String,
    pub host_only: bool,
    pub allow: Vec<String>,
    pub block: Vec<String>,
    pub expose: Vec<String>,
    /// How often the control channel has set it.
    pub sets: u64,
    pub revision: u64,
}

pub fn policy_path(host: &Path, vm: &str) -> PathBuf {
    host.join("softnet").join(format!("{vm}.json"))
}

impl Policy {
    fn write(&self) {
        let Some(host) = std::env::var_os("SIM_TART_HOST").map(PathBuf::from) else { return };
        let path = policy_path(&host, &self.vm);
        let part = path.with_extension("part");
        let text = serde_json::to_vec(self).expect("a policy is JSON");
        let written = fs::create_dir_all(host.join("softnet"))
            .and_then(|()| fs::write(&part, text))
            .and_then(|()| fs::rename(part, path));
        if let Err(error) = written {
            eprintln!("softnet: {error}");
        }
    }

    /// Isolation between guests holds until everything is allowed.
    fn isolates(&self) -> bool {
        !self.allow.iter().any(|rule| rule == "0.0.0.0/0")
    }
}

pub fn main(args: impl Iterator<Item = String>) -> ExitCode {
    watch::unblock_all();
    let fault = std::env::var("SIM_SOFTNET_FAULT").unwrap_or_default();
    if fault == "no_privilege" {
        eprintln!("root privileges are required to run and passwordless sudo was not available");
        return ExitCode::FAILURE;
    }
    let (policy, has_control) = match parse(args) {
        Ok(parsed) => parsed,
        Err(text) => {
            eprintln!("error: {text}");
            return ExitCode::from(2);
        }
    };
    policy.write();
    let policy = Arc::new(Mutex::new(policy));
    if has_control {
        let control = std::io::stdout().as_fd().try_clone_to_owned().expect("stdout is the control socket");
        let fault = fault.clone();
        thread::spawn(move || converse(UnixStream::from(control), &policy, &fault));
    }
    if fault == "dies" {
        let file = std::env::var_os("SIM_SOFTNET_FAULT_FILE").map(PathBuf::from);
        thread::spawn(move || {
            while !file.as_ref().is_none_or(|file| file.exists()) {
                thread::sleep(Duration::from_millis(3));
            }
            std::process::exit(101);
        });
    }
    let cable = std::io::stdin().as_raw_fd();
    let mut frame = [0; 2048];
    // The other end of the cable belongs to the VM's process.
    while recv(cable, &mut frame, MsgFlags::empty()).is_ok_and(|len| len > 0) {}
    ExitCode::SUCCESS
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<(Policy, bool), String> {
    let mut policy = Policy {
        vm: std::env::var("SIM_TART_VM").unwrap_or_else(|_| "unknown".into()),
        pid: std::process::id(),
        ..Policy::default()
    };
    let mut has_control = false;
    while let Some(flag) = args.next() {
        let value = args.next().ok_or_else(|| format!("a value is required for '{flag}'"))?;
        let list = || value.split(',').map(|rule| rule.trim().to_owned()).collect::<Vec<_>>();
        match &*flag {
            "--vm-fd" => {}
            "--vm-mac-address" => policy.mac = value,
            "--vm-net-type" => policy.host_only = value == "host",
            "--allow" => policy.allow.extend(list()),
            "--block" => policy.block.extend(list()),
            "--expose" => policy.expose.extend(list()),
            "--control-fd" => has_control = true,
            other => return Err(format!("unexpected argument '{other}' found")),
        }
    }
    match policy.allow.iter().chain(&policy.block).find(|rule| !is_rule(rule)) {
        Some(wrong) => Err(format!("invalid value '{wrong}'")),
        None => Ok((policy, has_control)),
    }
}

/// `[in |out ]TARGET[:PORT[-PORT]]`, where a target is `@host` or a network.
fn is_rule(rule: &str) -> bool {
    let rule = rule.strip_prefix("in ").or_else(|| rule.strip_prefix("out ")).unwrap_or(rule);
    let (target, ports) = rule.split_once(':').unwrap_or((rule, "1"));
    let is_port = |text: &str| text.parse::<u16>().is_ok();
    let ports_valid = ports.split_once('-').map_or_else(|| is_port(ports), |(from, to)| is_port(from) && is_port(to));
    let (address, bits) = target.split_once('/').unwrap_or((target, "32"));
    let network = address.parse::<Ipv4Addr>().is_ok() && bits.parse::<u8>().is_ok_and(|bits| bits <= 32);
    ports_valid && (target == "@host" || network)
}

fn converse(control: UnixStream, policy: &Mutex<Policy>, fault: &str) {
    let Ok(mut answers) = control.try_clone() else { return };
    let mut lines = BufReader::new(control);
    let mut line = Vec::new();
    // Closing the channel keeps the last policy.
    while lines.read_until(b'\n', &mut line).is_ok_and(|len| len > 0) {
        let answer = if line.len() > FRAME_MAX {
            failure(&Value::Null, -32600, "frame too large")
        } else {
            answer(&line, policy, fault)
        };
        line.clear();
        if fault != "no_reply" && writeln!(answers, "{answer}").is_err() {
            return;
        }
    }
}

fn failure(id: &Value, code: i32, text: &str) -> Value {
    json!({ "jsonrpc": "2.0", "id": id, "error": { "code": code, "message": text } })
}

fn answer(line: &[u8], policy: &Mutex<Policy>, fault: &str) -> Value {
    let Ok(request) = serde_json::from_slice::<Value>(line) else {
        return failure(&Value::Null, -32700, "Parse error");
    };
    let id = &request["id"];
    let id_valid = id.is_u64() || id.as_str().is_some_and(|id| id.len() <= 256);
    let Some(method) = request["method"].as_str().filter(|_| id_valid && request["jsonrpc"] == "2.0") else {
        return failure(&Value::Null, -32600, "Invalid Request");
    };
    let mut policy = policy.lock().expect("nobody panics with it");
    let first_form = std::env::var("SIM_TART_SOFTNET").is_ok_and(|form| form == "revision");
    let done = match method {
        "softnet.policy.get" if request.get("params").is_some() => Err((-32602, "Invalid params")),
        "softnet.policy.get" => Ok(()),
        "softnet.policy.set" if fault == "conflict" => Err((-32001, "revision conflict")),
        "softnet.policy.set" => set(&mut policy, &request["params"], first_form),
        _ => Err((-32601, "Method not found")),
    };
    match done {
        Err((code, text)) => failure(id, code, text),
        Ok(()) => json!({ "jsonrpc": "2.0", "id": id, "result": shown(&policy, first_form) }),
    }
}

fn shown(policy: &Policy, first_form: bool) -> Value {
    let count = policy.allow.len() + policy.block.len();
    let mut shown = json!({ "allow": policy.allow, "block": policy.block, "ruleCount": count });
    if first_form {
        shown["desiredRevision"] = policy.revision.into();
        shown["bridgeIsolation"] = policy.isolates().into();
    }
    shown
}

fn set(policy: &mut Policy, params: &Value, first_form: bool) -> Result<(), (i32, &'static str)> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "camelCase")]
    struct Params {
        allow: Vec<String>,
        block: Vec<String>,
        desired_revision: Option<u64>,
    }
    let invalid = (-32602, "Invalid params");
    let params: Params = serde_json::from_value(params.clone()).map_err(|_| invalid)?;
    let rules = params.allow.iter().chain(&params.block);
    if params.desired_revision.is_some() != first_form
        || rules.clone().count() > RULES_MAX
        || !rules.clone().all(|r| is_rule(r))
    {
        return Err(invalid);
    }
    let revision = params.desired_revision.unwrap_or_default();
    if first_form && revision <= policy.revision {
        return Err((-32001, "revision conflict"));
    }
    let next = Policy { allow: params.allow, block: params.block, sets: policy.sets + 1, revision, ..policy.clone() };
    if first_form && next.isolates() != policy.isolates() {
        return Err((-32002, "bridge isolation cannot change"));
    }
    *policy = next;
    policy.write();
    Ok(())
}
