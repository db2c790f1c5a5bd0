//! Faults on order. `SIM_TART_FAULTS` names a JSON array of rules, read at every invocation:
//!
//! ```json
//! [{"command": "clone", "vm": "job-*", "skip": 1, "times": 2, "fault": "no_space"}]
//! ```
//!
//! A rule counts what it matches: the first `skip` pass, the next `times` (1; 0 without end) are struck. Besides the commands
//! there are `agent` (every connection to a guest's agent), `guest-exec` (every command that an agent starts), `softnet`, and
//! `--version`. Any command can `fail` (`exit`, `stdout`, `stderr`), `delay` (`seconds`), `hang`, `abort` and be `kill`ed; what else
//! there is stands in [`NAMES`], with the numbers of the contract's table.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::context::Sim;
use super::{Failure, lock, say};

/// Command, fault and what it is: the whole list.
pub const NAMES: &[(&str, &str, &str)] = &[
    ("*", "fail", "F20: ends with `exit`, `stdout` and `stderr`"),
    ("*", "delay", "F9, F13: waits `seconds` first, and as long as the named pipe `while` is there"),
    ("*", "hang", "F13: never goes on"),
    ("*", "abort", "F22: ends by signal 6"),
    ("*", "kill", "F7: ends by signal 9"),
    ("--version", "version", "F22: prints `text`"),
    ("run", "boot_hang", "F1: no lease, no sshd, no agent"),
    ("run", "no_lease", "F2: the guest never asks for an address"),
    ("run", "late_lease", "F2: `seconds` later"),
    ("run", "duplicate_lease", "F2: the address of the VM `of`"),
    ("run", "agent_late", "F3: `seconds` later, and not as long as the named pipe `while` is there"),
    ("run", "agent_lost_by_reboot", "F3: does not come back after a reboot of the guest"),
    (
        "run",
        "die",
        "F7, F8, F19: `how` is crash, network, error, kill, stop or softnet; `at` a phase, `after` seconds, `file` a trigger",
    ),
    ("run", "limit", "F11: refused as the third macOS VM"),
    ("run", "slot_leak", "F12: the slot stays taken after the end"),
    ("run", "ignore_interrupt", "F15: SIGINT does nothing"),
    ("run", "suspend_fails", "F16: the VM dies"),
    ("run", "suspend_hangs", "F16: saving never ends"),
    ("run", "restore_fails", "F16: Code=12"),
    ("run", "mac_collision", "F16: the saved state is dropped"),
    ("run", "start_error", "F17, F18: `what` is keychain, security, start, storage, or any text"),
    ("run", "clock_offset", "F24: the guest's clock is off by `seconds`"),
    ("agent", "absent", "F3: the connection is closed without a byte"),
    ("guest-exec", "agent_crash", "F4: after `seconds`"),
    ("guest-exec", "no_exit", "F5: the stream ends without an exit"),
    ("guest-exec", "hang", "F6: the stream never ends"),
    ("ip", "answer", "F2: `text`, exit 0"),
    ("ip", "no_address", "F2"),
    ("ip", "malformed", "F2: the lease file cannot be read"),
    ("clone", "no_space", "F9"),
    ("clone", "source_gone", "F9, F14: the image is pruned first"),
    ("clone", "slow", "F9: `seconds` under the global lock, and as long as the named pipe `while` is there"),
    ("clone", "tmp_gone", "F23: another command's gc takes the work directory"),
    ("delete", "running", "F10: the lock seems held"),
    ("list", "extra_keys", "F20"),
    ("list", "old_schema", "F20"),
    ("pull", "status", "F13: `code` of the registry"),
    ("pull", "offline", "F13: the registry cannot be reached"),
    ("pull", "reset", "F13: `times_reset` connections break, five are too many"),
    ("pull", "stall", "F13: at `percent`, without end"),
    ("pull", "killed", "F13: by SIGKILL at `percent`"),
    ("pull", "lock_held", "F13: somebody else pulls for `seconds`"),
    ("pull", "no_space", "F13"),
    ("softnet", "no_privilege", "F19"),
    ("softnet", "missing", "F19: not in PATH"),
    ("softnet", "dies", "F19: at `file`"),
    ("softnet", "no_reply", "F19"),
    ("softnet", "conflict", "F19: -32001"),
    ("set", "truncated_config", "F25: the process dies in the middle of its write"),
];

#[derive(Debug, Deserialize)]
struct Rule {
    command: String,
    #[serde(default = "any")]
    vm: String,
    #[serde(default)]
    skip: u64,
    #[serde(default = "once")]
    times: u64,
    fault: String,
    #[serde(flatten)]
    details: Map<String, Value>,
}

fn any() -> String {
    "*".to_owned()
}

fn once() -> u64 {
    1
}

/// A fault that strikes this invocation.
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    pub(crate) name: String,
    details: Map<String, Value>,
}

/// How often a file is looked for that a fault names.
pub(crate) const LOOK: Duration = Duration::from_millis(3);

pub(crate) struct Faults;

impl Faults {
    /// The faults that strike this act; it is counted for every rule that matches.
    pub(crate) fn of(sim: &Sim, command: &str, vm: &str) -> Vec<Fault> {
        let Some(path) = &sim.faults else { return Vec::new() };
        let Ok(text) = std::fs::read_to_string(path) else { return Vec::new() };
        let rules: Vec<Rule> = serde_json::from_str(&text).expect("SIM_TART_FAULTS is an array of rules");
        let matching: Vec<_> = rules
            .into_iter()
            .enumerate()
            .filter(|(_, rule)| matches(&rule.command, command) && matches(&rule.vm, vm))
            .collect();
        if matching.is_empty() {
            return Vec::new();
        }
        for (_, rule) in &matching {
            let known = NAMES.iter().any(|(_, name, _)| *name == rule.fault);
            assert!(known, "no fault is called `{}`", rule.fault);
        }
        let counts = bump(path.with_extension("counts"), matching.iter().map(|(index, rule)| key(*index, rule)));
        let struck = matching
            .into_iter()
            .zip(counts)
            .filter(|((_, rule), count)| *count >= rule.skip && (rule.times == 0 || *count < rule.skip + rule.times));
        struck.map(|((_, rule), _)| Fault { name: rule.fault, details: rule.details }).collect()
    }
}

/// A rule is the same one as long as it stands at its place.
fn key(index: usize, rule: &Rule) -> String {
    format!("{index} {} {} {} {} {}", rule.command, rule.vm, rule.skip, rule.times, rule.fault)
}

/// Adds one to each count and returns what they were.
fn bump(path: PathBuf, keys: impl Iterator<Item = String>) -> Vec<u64> {
    let Ok(_held) = lock::exclusive_file(&path) else { return Vec::new() };
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let mut counts: BTreeMap<String, u64> = serde_json::from_str(&text).unwrap_or_default();
    let before = keys
        .map(|key| {
            let count = counts.entry(key).or_default();
            *count += 1;
            *count - 1
        })
        .collect();
    let _ = std::fs::write(&path, serde_json::to_string(&counts).unwrap_or_default());
    before
}

impl Fault {
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.details.get(key).and_then(Value::as_str)
    }

    pub(crate) fn number(&self, key: &str) -> Option<f64> {
        self.details.get(key).and_then(Value::as_f64)
    }

    pub(crate) fn seconds(&self) -> f64 {
        self.number("seconds").unwrap_or(0.0)
    }

    /// `seconds`, and as long as the pipe `while` is there.
    pub(crate) fn wait(&self, sim: &Sim) {
        sim.pause(self.seconds());
        if let Some(pipe) = self.text("while") {
            // Opened by whoever opens the other end; one that is gone holds nobody.
            let _ = File::open(pipe);
        }
    }

    /// Its pipe `while` is there.
    pub(crate) fn holds(&self) -> bool {
        self.text("while").is_some_and(|file| Path::new(file).exists())
    }

    /// What any command can suffer, before it does anything.
    pub(crate) fn strike_any(&self, sim: &Sim) -> Result<(), Failure> {
        match &*self.name {
            "delay" => self.wait(sim),
            "hang" => loop {
                std::thread::park();
            },
            "abort" => std::process::abort(),
            "kill" => die_of("KILL"),
            "fail" => {
                if let Some(text) = self.text("stdout") {
                    say(text);
                }
                if let Some(text) = self.text("stderr") {
                    eprintln!("{text}");
                }
                let code = self.number("exit").unwrap_or(1.0);
                return Err(Failure::Silent(code as u8));
            }
            _ => {}
        }
        Ok(())
    }
}

pub(crate) fn find<'a>(faults: &'a [Fault], name: &str) -> Option<&'a Fault> {
    faults.iter().find(|fault| fault.name == name)
}

/// What `--version` says under the fault.
pub(crate) fn version(sim: &Sim) -> Option<String> {
    let faults = Faults::of(sim, "--version", "");
    for fault in &faults {
        // A fault that lets it go on is none of the others.
        if let Err(Failure::Silent(code)) = fault.strike_any(sim) {
            std::process::exit(i32::from(code));
        }
    }
    find(&faults, "version").and_then(|fault| fault.text("text")).map(str::to_owned)
}

/// Ends by a signal with its default action, which a Rust program has given up for SIGPIPE.
pub(crate) fn die_of(signal: &str) -> ! {
    let error = Command::new("/bin/sh").args(["-c", &format!("kill -{signal} $$")]).exec();
    panic!("no shell to die with: {error}")
}

/// A glob of which only `*` has a meaning.
pub(crate) fn matches(glob: &str, text: &str) -> bool {
    let mut parts = glob.split('*');
    let Some(mut rest) = parts.next().and_then(|head| text.strip_prefix(head)) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_anything() {
        for (glob, text) in [("*", ""), ("a*", "a"), ("job-*-b", "job-1-b"), ("*x*y*", "axbyc"), ("job", "job")] {
            assert!(matches(glob, text), "{glob} {text}");
        }
        for (glob, text) in [("a", "ab"), ("a*", "ba"), ("*x", "xy"), ("a*a", "a"), ("*y*x*", "xy")] {
            assert!(!matches(glob, text), "{glob} {text}");
        }
    }

    #[test]
    fn no_fault_of_the_contract_is_missing() {
        // F21 is a test's own kill, F26 any command's own output.
        for number in (1..=25).filter(|number| *number != 21) {
            let wanted = format!("F{number}");
            let named = NAMES.iter().any(|(_, _, what)| what.split([',', ':', ' ']).any(|word| word == wanted));
            assert!(named, "nothing injects {wanted}");
        }
    }
}
