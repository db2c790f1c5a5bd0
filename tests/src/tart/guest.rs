//! What happens inside of a VM: its helper process, the first process of the guest, and the rules by which it ends. `run`
//! starts `__vm` (the helper: it makes the namespaces), which starts `__init` (process 1), which starts `__agent`. Without
//! namespaces `run` starts `__init` itself.
//!
//! Descriptor 0 of all three is the listener for connections from the host, descriptor 1 the channel to `run`. When `run`
//! dies, the channel ends and so does everything here.

use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::image::Agent;
use super::{agent, isolate, watch};

/// How a guest ended, as the exit code of its first process.
pub(crate) const HALTED: u8 = 0;
pub(crate) const REBOOT: u8 = 3;
/// The agent's own: the host is gone.
pub(crate) const HOST_GONE: i32 = 77;

/// What a share is inside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Share {
    pub(crate) tag: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
}

/// What the guest is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Spec {
    pub(crate) dir: PathBuf,
    pub(crate) runner: i32,
    pub(crate) os: String,
    pub(crate) mac: String,
    pub(crate) home: String,
    pub(crate) isolated: bool,
    pub(crate) agent: Agent,
    pub(crate) shares: Vec<Share>,
    pub(crate) hidden: Vec<PathBuf>,
    pub(crate) disk_free_mib: Option<u64>,
    pub(crate) clock_offset: i64,
    /// The key of the guest's sshd, where there is one.
    pub(crate) host_key: Option<PathBuf>,
}

impl Spec {
    pub(crate) fn is_darwin(&self) -> bool {
        self.os == "darwin"
    }

    /// Where the guest's root is seen from its own commands.
    pub(crate) fn root(&self) -> PathBuf {
        if self.isolated { PathBuf::from("/") } else { self.dir.join("guest/root") }
    }

    /// A path of the guest as its commands must spell it.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        if self.isolated { PathBuf::from(path) } else { self.root().join(path.trim_start_matches('/')) }
    }
}

/// The roles that the executable plays besides its commands.
pub(crate) fn inner(role: &str, spec: &str) -> ExitCode {
    watch::unblock_all();
    let spec: Spec = match serde_json::from_str(spec) {
        Ok(spec) => spec,
        Err(error) => {
            eprintln!("{role} is no command: {error}");
            return ExitCode::from(64);
        }
    };
    let ended = match role {
        "__vm" => helper(&spec),
        "__init" => init(&spec),
        "__agent" => agent::serve(spec).map(|()| HALTED),
        _ => Err(anyhow::anyhow!("no such role")),
    };
    ended.map_or_else(
        |error| {
            eprintln!("{role}: {error:#}");
            ExitCode::FAILURE
        },
        ExitCode::from,
    )
}

/// The process that a hypervisor's helper would be: it dies with `run`, and the guest dies with it.
fn helper(spec: &Spec) -> anyhow::Result<u8> {
    isolate::die_with_parent();
    if nix::unistd::getppid().as_raw() != spec.runner {
        return Ok(HALTED);
    }
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGCHLD].into_iter().collect();
    signals.thread_block()?;
    isolate::new_namespaces()?;
    // From here on this process cannot have threads.
    let mut init = Command::new(std::env::current_exe()?).arg("__init").arg(serde_json::to_string(spec)?).spawn()?;
    loop {
        // Process 1 is gone only when all others of its namespace are.
        if let Some(status) = init.try_wait()? {
            return Ok(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1));
        }
        if signals.wait()? == Signal::SIGTERM {
            init.kill()?;
        }
    }
}

fn init(spec: &Spec) -> anyhow::Result<u8> {
    watch::block(&[Signal::SIGCHLD, Signal::SIGUSR1, Signal::SIGUSR2]);
    let signals = watch::each(&[Signal::SIGCHLD, Signal::SIGUSR1, Signal::SIGUSR2]);
    if spec.isolated {
        isolate::die_with_parent();
        isolate::enter(spec)?;
    } else {
        // It must outlive `run` to clean up: the end of the channel tells it.
        isolate::become_reaper();
        isolate::lay_out(spec)?;
    }
    let mut agent = start_agent(spec)?;
    for signal in signals {
        match signal {
            Signal::SIGUSR1 => return Ok(end(spec, HALTED)),
            Signal::SIGUSR2 => return Ok(end(spec, REBOOT)),
            _ => match reap(agent.id()) {
                None => {}
                Some(HOST_GONE) => return Ok(end(spec, HALTED)),
                // As launchd does it: nothing of the old one stays, and it is started again.
                Some(_) => {
                    isolate::kill_all(spec);
                    agent = start_agent(spec)?;
                }
            },
        }
    }
    Ok(HALTED)
}

/// Without a namespace nobody else kills what is left.
fn end(spec: &Spec, code: u8) -> u8 {
    isolate::kill_all(spec);
    code
}

fn start_agent(spec: &Spec) -> anyhow::Result<Child> {
    let text = serde_json::to_string(spec)?;
    let mut command = isolate::without_dangerous_rights(spec);
    // Not the host's: the guest's environment is made by the agent.
    command.arg("__agent").arg(text).env_clear().env("PATH", "/usr/bin:/bin");
    Ok(command.stdin(Stdio::inherit()).stdout(Stdio::inherit()).spawn()?)
}

/// Reaps whoever has ended; returns the agent's status if it was among them.
fn reap(agent: u32) -> Option<i32> {
    let mut found = None;
    loop {
        match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid.as_raw().unsigned_abs() == agent => found = Some(code),
            Ok(WaitStatus::Signaled(pid, ..)) if pid.as_raw().unsigned_abs() == agent => found = Some(-1),
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return found,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return found,
        }
    }
}

/// Ends every process that a walk of parents leads from here.
pub(crate) fn kill_descendants() {
    let own = std::process::id().cast_signed();
    // A process that forks while we look is found by the next look.
    for _ in 0..100 {
        let mut found = false;
        for pid in isolate::descendants(own) {
            found |= kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok();
        }
        reap(0);
        if !found {
            return;
        }
    }
}
