//! S: a child process around one command, so that nothing of the command outlives its right to run.
//!
//! The guard is this same binary under a hidden subcommand. It holds a pipe from the daemon, the leash: when the pipe
//! ends, or when the fence deadline passes that the daemon last sent, it kills all that it started. On Linux it is a
//! subreaper: a process that forks twice and opens a session of its own is still its descendant, and the guard ends
//! only when it has none. Its standard error is the command's log, its standard output tells the daemon how the command
//! ended. It runs no tasks: threads that block and one channel.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use alloy_shared::runtime::uptime;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, setsid};
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};

use crate::provider::Exit;

pub mod leash;
#[cfg(test)]
pub(crate) mod tests;
mod tree;

/// The hidden subcommand that every binary with a worker inside passes to [`main`].
pub const SUBCOMMAND: &str = "__guard";

/// The variable by which every process of a VM is known: the VM's directory. The farm sets it and takes none of this
/// prefix from a job, whose HOME, say, could be the user's own.
pub const MARK: &str = "ALLOY_VM_DIR";

/// A wait stands still while the machine sleeps and the fence's clock goes on, so the clock is looked at this often.
const FENCE_LOOK: Duration = Duration::from_secs(1);
/// Between two looks at what is still alive, while killing.
const KILL_ROUND: Duration = Duration::from_millis(10);
/// A kill that has not worked for a second will not be hurried.
const KILL_ROUNDS_FAST: u32 = 100;
const KILL_ROUND_SLOW: Duration = Duration::from_millis(500);

/// What to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    pub argv: Vec<String>,
    /// The whole environment, but for [`MARK`].
    pub env: Vec<(String, String)>,
    pub dir: String,
    pub vm_dir: String,
    /// A Unix socket to connect to; the command inherits the connection as [`CONTROL_FD`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<String>,
}

/// Above every descriptor that a guard has of its own.
pub const CONTROL_FD: i32 = 100;

/// From the daemon, a line each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Order {
    Run(Launch),
    Term,
    Kill,
    /// Kill by yourself after this time, unless told another.
    Fence {
        within_ms: u64,
    },
}

/// To the daemon, a line each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Word {
    Started {
        pid: i32,
    },
    Exited(Exit),
    /// It was killed at the fence: how it ended says nothing about it.
    Fenced,
}

/// Runs the guard: `ALLOY __guard RECORD`. The record names the guard's and the command's process, so that a later daemon
/// finds them if both daemon and guard were killed.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let Some(record) = args.into_iter().next().map(PathBuf::from) else {
        return ExitCode::from(2);
    };
    match watch(&record) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The log is the only place where somebody reads what a guard says.
            complain(&format!("guard: {error}"));
            ExitCode::FAILURE
        }
    }
}

enum Event {
    Order(Order),
    /// The daemon is gone or has let go.
    Cut,
    Ended {
        exit: Exit,
        alone: bool,
    },
    /// No child is left.
    Empty,
}

fn watch(record: &Path) -> std::io::Result<()> {
    outlive_stop_signals()?;
    // Away from the terminal of `alloy run --local`: neither Ctrl-C nor /dev/tty reaches the job. Fails only for a leader.
    let _leader_already = setsid();
    tree::adopt_orphans()?;
    let mut record = std::fs::OpenOptions::new().create(true).append(true).open(record)?;
    note(&mut record, "guard", Pid::this())?;

    let (tx, rx) = mpsc::sync_channel(64);
    let orders = tx.clone();
    std::thread::Builder::new().stack_size(256 << 10).spawn(move || hear(&orders))?;
    let mut fence = None;
    let launch = loop {
        match rx.recv() {
            Ok(Event::Order(Order::Run(launch))) => break launch,
            Ok(Event::Order(Order::Fence { within_ms })) => fence = Some(uptime() + Duration::from_millis(within_ms)),
            Ok(Event::Order(Order::Term | Order::Kill)) | Ok(Event::Cut) | Err(mpsc::RecvError) => return Ok(()),
            Ok(Event::Ended { .. } | Event::Empty) => {}
        }
    };
    let mut out = std::io::stdout();
    let pid = match start(&launch) {
        Ok(pid) => pid,
        Err((code, why)) => {
            complain(&why);
            return say(&mut out, &Word::Exited(Exit::Code(code)));
        }
    };
    // From here on a failure may not end the guard before the command: a full disk or a dead daemon changes nothing.
    let _unrecorded = note(&mut record, "command", pid);
    let _unheard = say(&mut out, &Word::Started { pid: pid.as_raw() });
    if let Err(error) = std::thread::Builder::new().stack_size(256 << 10).spawn(move || reap(pid, &tx)) {
        tree::signal(&tree::descendants(Some(Pid::this()), Some(pid)), Signal::SIGKILL);
        return Err(error);
    }
    guard(&Tree { pid, vm_dir: &launch.vm_dir }, fence, &rx, &mut out);
    Ok(())
}

/// A command with all that it started.
struct Tree<'a> {
    pid: Pid,
    vm_dir: &'a str,
}

impl Tree<'_> {
    fn members(&self) -> Vec<Pid> {
        let mut members = tree::descendants(Some(Pid::this()), Some(self.pid));
        if !tree::children_are_all() {
            members.extend(tree::inside(self.vm_dir).into_iter().filter(|pid| *pid != Pid::this()));
        }
        members
    }

    /// True when the guard has no child and nothing is left anywhere.
    fn is_over(&self) -> bool {
        tree::children_are_all() || self.members().is_empty()
    }
}

/// Waits until the command and all its descendants are gone, and sees to it that they go when they must.
fn guard(tree: &Tree<'_>, mut fence: Option<Duration>, rx: &mpsc::Receiver<Event>, out: &mut impl Write) {
    let (mut killing, mut stopping, mut childless, mut rounds) = (false, false, false, 0u32);
    let mut fenced = false;
    loop {
        let wait = match (killing || childless, fence) {
            (true, _) if rounds < KILL_ROUNDS_FAST => KILL_ROUND,
            (true, _) => KILL_ROUND_SLOW,
            (false, Some(at)) => at.saturating_sub(uptime()).min(FENCE_LOOK),
            (false, None) => Duration::from_secs(3600),
        };
        match rx.recv_timeout(wait) {
            Ok(Event::Order(Order::Term)) => {
                stopping = true;
                tree::signal(&tree.members(), Signal::SIGTERM);
            }
            Ok(Event::Order(Order::Kill) | Event::Cut) => killing = true,
            Ok(Event::Order(Order::Fence { within_ms })) => fence = Some(uptime() + Duration::from_millis(within_ms)),
            Ok(Event::Order(Order::Run(_))) => {}
            Ok(Event::Ended { exit, alone }) => {
                // A daemon that is gone cannot hear it; the rest must still be killed.
                let _deaf = say(out, &if fenced { Word::Fenced } else { Word::Exited(exit) });
                if alone && tree.is_over() {
                    return;
                }
                // What a command leaves behind ends with it, unless it was told to stop and its grace still runs.
                killing |= !stopping;
            }
            Ok(Event::Empty) => childless = true,
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => killing = true,
        }
        if childless && tree.is_over() {
            return;
        }
        fenced |= !killing && fence.is_some_and(|at| uptime() >= at);
        killing |= fenced;
        if killing || childless {
            rounds = rounds.saturating_add(1);
        }
        if killing {
            tree::signal(&tree.members(), Signal::SIGKILL);
        }
    }
}

/// Gives the signals that stop a process handlers that do nothing: a service manager that stops the whole group must not
/// stop the one process that cleans up. Handlers, unlike a mask, end at the start of another program: the command hears
/// them all, and none that came before can wait for the moment of its start.
fn outlive_stop_signals() -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let _inside = runtime.enter();
    for kind in [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup(), SignalKind::quit()] {
        // The handler stays when its listener goes.
        drop(signal(kind)?);
    }
    Ok(())
}

/// Connects to a socket in a way that a child process inherits.
fn inherit(socket: &str) -> std::io::Result<OwnedControl> {
    let connection = std::os::unix::net::UnixStream::connect(socket)?;
    match fcntl(&connection, FcntlArg::F_DUPFD(CONTROL_FD))? {
        CONTROL_FD => Ok(OwnedControl),
        other => {
            let _closed = nix::unistd::close(other);
            Err(std::io::Error::other("its descriptor is taken"))
        }
    }
}

/// [`CONTROL_FD`], open as long as this lives.
struct OwnedControl;

impl Drop for OwnedControl {
    fn drop(&mut self) {
        let _closed = nix::unistd::close(CONTROL_FD);
    }
}

/// Starts the command in a process group of its own, with the log as its output and nothing as its input.
fn start(launch: &Launch) -> Result<Pid, (i32, String)> {
    let failed = |what: &str, error: &std::io::Error| (126, format!("{what}: {error}"));
    let name = launch.argv.first().map_or("", String::as_str);
    let path = launch.env.iter().find(|(key, _)| key == "PATH").map_or("", |(_, path)| path.as_str());
    let program = find_program(name, path, Path::new(&launch.dir))?;
    let log = std::io::stderr().as_fd().try_clone_to_owned().map_err(|error| failed("log", &error))?;
    let _inherited = launch.control.as_deref().map(inherit).transpose().map_err(|error| failed("control", &error))?;
    let mut command = Command::new(program);
    command
        .arg0(name)
        .args(launch.argv.iter().skip(1))
        .env_clear()
        .envs(launch.env.iter().map(|(key, value)| (key, value)))
        .env(MARK, &launch.vm_dir)
        .current_dir(&launch.dir)
        .stdin(Stdio::null())
        .stdout(Stdio::from(log))
        .process_group(0);
    let child = command.spawn();
    child.map(|child| Pid::from_raw(child.id() as i32)).map_err(|error| failed(name, &error))
}

/// Looks a program up as a shell does: 127 when there is none, 126 when it cannot be run.
fn find_program(name: &str, path: &str, dir: &Path) -> Result<PathBuf, (i32, String)> {
    let candidates: Vec<PathBuf> = match name {
        "" => return Err((127, "the command is empty".to_owned())),
        name if name.contains('/') => vec![dir.join(name)],
        name => path.split(':').map(|part| dir.join(part).join(name)).collect(),
    };
    let mut verdict = (127, format!("{name}: command not found"));
    for candidate in candidates {
        match std::fs::metadata(&candidate) {
            Ok(meta) if meta.is_file() && meta.permissions().mode() & 0o111 != 0 => return Ok(candidate),
            Ok(meta) if meta.is_dir() => verdict = (126, format!("{name}: is a directory")),
            Ok(_) => verdict = (126, format!("{name}: permission denied")),
            Err(_absent) => {}
        }
    }
    Err(verdict)
}

/// Reads the leash until it ends.
fn hear(tx: &mpsc::SyncSender<Event>) {
    let mut lines = BufReader::with_capacity(16 << 10, std::io::stdin());
    let mut line = Vec::new();
    while let Ok(1..) = lines.read_until(b'\n', &mut line) {
        // Half a line: the daemon died while it wrote.
        let Ok(order) = serde_json::from_slice(&line) else { break };
        if tx.send(Event::Order(order)).is_err() {
            break;
        }
        line.clear();
    }
    let _main_is_gone = tx.send(Event::Cut);
}

/// Waits for every child, adopted ones included.
fn reap(command: Pid, tx: &mpsc::SyncSender<Event>) {
    loop {
        let exit = match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, code)) if pid == command => Exit::Code(code),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == command => Exit::Signal(signal as i32),
            Err(Errno::ECHILD) => break,
            Ok(_) | Err(_) => continue,
        };
        if tx.send(Event::Ended { exit, alone: none_left() }).is_err() {
            return;
        }
    }
    let _main_is_gone = tx.send(Event::Empty);
}

/// True when no child is left, which is the usual case.
fn none_left() -> bool {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => return false,
            Err(Errno::ECHILD) => return true,
            Ok(_) | Err(_) => {}
        }
    }
}

fn say(out: &mut impl Write, word: &Word) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(word)?;
    line.push(b'\n');
    out.write_all(&line)?;
    out.flush()
}

/// A line in the command's log. A log that nobody reads is no reason to stop.
fn complain(why: &str) {
    let _unread = writeln!(std::io::stderr(), "alloy: {why}");
}

fn note(record: &mut impl Write, what: &str, pid: Pid) -> std::io::Result<()> {
    let start = tree::started_at(pid).unwrap_or_default();
    record.write_all(format!("{what} {pid} {start}\n").as_bytes())
}

/// Kills what the records' guards and commands left, and every process that carries the mark of `vm_dir`. Returns false if
/// something is still alive after `budget`.
pub fn sweep(records: &[PathBuf], vm_dir: &str, budget: Duration) -> bool {
    let named: Vec<(String, Pid, String)> = records.iter().flat_map(|record| read_record(record)).collect();
    let end = uptime() + budget;
    loop {
        let mut left = tree::inside(vm_dir);
        for (what, pid, start) in &named {
            let alive = tree::started_at(*pid).is_some_and(|at| at == *start);
            match what.as_str() {
                "guard" if alive => {
                    let below = tree::descendants(Some(*pid), None);
                    // The guard goes last: until then its descendants cannot get lost.
                    if below.is_empty() {
                        left.push(*pid);
                    }
                    left.extend(below);
                }
                // Its number names the group as long as anything is in it.
                "command" if alive || tree::group_lives(*pid) && same_group(*pid, vm_dir) => {
                    left.extend(tree::descendants(None, Some(*pid)));
                }
                _ => {}
            }
        }
        if left.is_empty() {
            return true;
        }
        if uptime() >= end {
            return false;
        }
        tree::signal(&left, Signal::SIGKILL);
        std::thread::sleep(KILL_ROUND);
    }
}

/// A group whose leader is gone could be a stranger's with the same number: on this host only members that live in our
/// directory prove that it is not.
fn same_group(group: Pid, vm_dir: &str) -> bool {
    let members = tree::descendants(None, Some(group));
    tree::inside(vm_dir).iter().any(|pid| members.contains(pid))
}

fn read_record(record: &Path) -> Vec<(String, Pid, String)> {
    let text = std::fs::read_to_string(record).unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (what, pid, start) = (words.next()?, words.next()?.parse().ok()?, words.next()?);
            Some((what.to_owned(), Pid::from_raw(pid), start.to_owned()))
        })
        .collect()
}
