//! Faults of system calls, by `strace`: the call is not made and fails.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::observe::until_blocking;

const LET_GO: Duration = Duration::from_secs(2);

/// Which calls fail, how, and which of each thread's: `3` the third, `3+` from the third on.
#[derive(Debug, Clone)]
pub struct Fault {
    pub calls: &'static str,
    pub error: &'static str,
    pub when: String,
}

impl Fault {
    fn options(&self) -> [String; 4] {
        let Self { calls, error, when } = self;
        ["-e".into(), format!("trace={calls}"), "-e".into(), format!("inject={calls}:error={error}:when={when}")]
    }

    /// The same program, with the fault from its first call on.
    pub fn around(&self, program: &Command) -> Command {
        let mut strace = Command::new("strace");
        strace.args(["-f", "-qq", "-o", "/dev/null"]).args(self.options()).arg(program.get_program());
        strace.args(program.get_args()).env_clear();
        for (name, value) in program.get_envs() {
            if let Some(value) = value {
                strace.env(name, value);
            }
        }
        if let Some(dir) = program.get_current_dir() {
            strace.current_dir(dir);
        }
        strace
    }
}

/// A process whose calls fail. Dropping it ends that.
#[derive(Debug)]
pub struct Injected {
    strace: Child,
}

impl Injected {
    /// From now on, in all threads of the process and in what it starts. What was injected is listed in `trace`.
    pub fn into(pid: i32, fault: &Fault, trace: &Path) -> Result<Injected> {
        // It ends with whoever started it.
        let mut strace = Command::new("setpriv");
        strace
            .args(["--pdeathsig", "KILL", "strace", "-f", "-qq", "-o"])
            .arg(trace)
            .args(fault.options())
            .args(["-p", &pid.to_string()]);
        let strace = strace.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create("/dev/null")?).spawn();
        let injected = Injected { strace: strace.context("start strace")? };
        until_blocking("every thread is traced", Duration::from_secs(20), || all_traced(pid))?;
        Ok(injected)
    }
}

impl Drop for Injected {
    fn drop(&mut self) {
        // It may have ended with its process.
        let _ = kill(Pid::from_raw(i32::try_from(self.strace.id()).expect("a pid is small")), Signal::SIGTERM);
        // Letting go of a process that is about to start another one can take for ever: then the kernel does it.
        let left =
            until_blocking("strace has let go", LET_GO, || matches!(self.strace.try_wait(), Ok(Some(_)) | Err(_)));
        if left.is_err() {
            let _ = self.strace.kill();
            let _ = self.strace.wait();
        }
    }
}

/// True also if the process is gone.
fn all_traced(pid: i32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    threads.map(|thread| fs::read_to_string(thread.path().join("status")).unwrap_or_default()).all(|status| {
        let dead = status.lines().any(|line| line.starts_with("State:") && line.contains(['Z', 'X']));
        let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
        dead || tracer.is_none_or(|tracer| tracer.trim() != "0")
    })
}

/// How many calls a trace says were failed.
pub fn injected(trace: &Path) -> usize {
    fs::read_to_string(trace).unwrap_or_default().matches("(INJECTED)").count()
}
