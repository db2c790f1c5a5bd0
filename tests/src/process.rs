//! Processes of the machine as `/proc` shows them, and children that a test starts.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::observe::until_blocking;

/// A child whose output goes to a file.
pub struct Daemon {
    pub name: String,
    pub log: PathBuf,
    child: Child,
}

impl Daemon {
    pub fn start(name: &str, mut command: Command, log: &Path) -> Result<Daemon> {
        let out = File::options().create(true).append(true).open(log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        Ok(Daemon { name: name.to_owned(), log: log.to_owned(), child })
    }

    /// A child whose terminal is gone: nobody reads what it says, and saying it fails.
    pub fn unheard(name: &str, mut command: Command) -> Result<Daemon> {
        let (_, gone) = std::io::pipe()?;
        let child = command.stdin(Stdio::null()).stdout(gone.try_clone()?).stderr(gone).spawn()?;
        Ok(Daemon { name: name.to_owned(), log: PathBuf::new(), child })
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid is small")
    }

    pub fn signal(&self, signal: Signal) {
        // It may have ended by itself.
        let _ = kill(Pid::from_raw(self.pid()), signal);
    }

    pub fn has_ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    pub fn wait(&mut self, patience: Duration) -> Result<ExitStatus> {
        let what = format!("{} (pid {}) has ended", self.name, self.pid());
        until_blocking(&what, patience, || self.has_ended().is_some())?;
        Ok(self.child.wait()?)
    }

    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        let _ = self.child.wait();
    }

    pub fn log_text(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

/// A process that has something to do with a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub pid: i32,
    pub line: String,
    pub state: char,
}

/// Every process whose working directory, environment or command line names something below `dir`. Zombies count as gone.
#[cfg(target_os = "linux")]
pub fn processes_in(dir: &Path) -> Vec<Found> {
    let needle = dir.to_str().expect("a temporary directory has a plain name").as_bytes();
    let own = std::process::id();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        if pid.unsigned_abs() == own {
            continue;
        }
        let read = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        let inside = fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(dir))
            || contains(&read("environ"), needle)
            || contains(&read("cmdline"), needle);
        let state = process_state(&String::from_utf8_lossy(&read("stat")));
        if inside && state != 'Z' && state != 'X' {
            let line = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
            found.push(Found { pid, line, state });
        }
    }
    found
}

/// Without `/proc`, the command line is what there is to see.
#[cfg(not(target_os = "linux"))]
pub fn processes_in(dir: &Path) -> Vec<Found> {
    let Ok(out) = Command::new("ps").args(["-axo", "pid=,state=,command="]).output() else { return Vec::new() };
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let lines = text.lines().filter(|line| line.contains(dir.to_str().unwrap_or("/")));
    lines
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let pid = words.next()?.parse().ok()?;
            let state = words.next()?.chars().next()?;
            Some(Found { pid, state, line: words.collect::<Vec<_>>().join(" ") })
        })
        .filter(|found| found.state != 'Z' && found.pid.unsigned_abs() != std::process::id())
        .collect()
}

#[cfg(target_os = "linux")]
fn process_state(stat: &str) -> char {
    stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).unwrap_or('X')
}

#[cfg(target_os = "linux")]
fn contains(hay: &[u8], needle: &[u8]) -> bool {
    hay.windows(needle.len()).any(|window| window == needle)
}

/// What a process calls itself: in a PID namespace of its own, another number than ours.
#[cfg(target_os = "linux")]
pub fn pid_inside(pid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    line.split_whitespace().next_back()?.parse().ok()
}

#[cfg(not(target_os = "linux"))]
pub fn pid_inside(pid: i32) -> Option<i32> {
    Some(pid)
}

pub fn signal(pid: i32, signal: Signal) {
    let _ = kill(Pid::from_raw(pid), signal);
}

pub fn is_alive(pid: i32) -> bool {
    kill(Pid::from_raw(pid), None).is_ok()
}
