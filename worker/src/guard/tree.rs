//! S: who descends from whom on this host. The one place that differs between Linux and other Unix systems.

use std::collections::{HashMap, HashSet, VecDeque};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

pub(super) use platform::{adopt_orphans, children_are_all, inside, started_at};

/// A living process: zombies are not listed.
pub(super) struct Process {
    pid: i32,
    parent: i32,
    group: i32,
}

/// Returns every living descendant of `root`, and every member of the process group `group` with its descendants. Parents
/// stand before their children: a shell that is killed first does not go on because its child was killed.
pub(super) fn descendants(root: Option<Pid>, group: Option<Pid>) -> Vec<Pid> {
    let all = platform::processes();
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for process in &all {
        children.entry(process.parent).or_default().push(process.pid);
    }
    let members = all.iter().filter(|process| group.is_some_and(|group| group.as_raw() == process.group));
    let mut todo: VecDeque<i32> = root.iter().map(|pid| pid.as_raw()).chain(members.map(|member| member.pid)).collect();
    let mut seen: HashSet<i32> = HashSet::new();
    let mut order = Vec::new();
    while let Some(pid) = todo.pop_front() {
        if seen.insert(pid) {
            order.push(pid);
            todo.extend(children.get(&pid).into_iter().flatten());
        }
    }
    let own = std::process::id() as i32;
    order.retain(|pid| *pid != own && Some(*pid) != root.map(Pid::as_raw));
    order.into_iter().map(Pid::from_raw).collect()
}

/// Sends a signal to all of them. One that is gone needs none.
pub(super) fn signal(pids: &[Pid], signal: Signal) {
    for pid in pids {
        let _gone = kill(*pid, signal);
    }
}

/// True while anything is in the process group.
pub(super) fn group_lives(group: Pid) -> bool {
    !matches!(killpg(group, None), Err(Errno::ESRCH))
}

#[cfg(target_os = "linux")]
mod platform {
    use nix::unistd::Pid;

    use super::Process;

    /// Orphans of this process become its children, so that waiting for children waits for all descendants.
    pub(in super::super) fn adopt_orphans() -> std::io::Result<()> {
        nix::sys::prctl::set_child_subreaper(true).map_err(std::io::Error::from)
    }

    /// True when a process without children has no descendants either.
    pub(in super::super) const fn children_are_all() -> bool {
        true
    }

    pub(super) fn processes() -> Vec<Process> {
        let number = |text: Option<&&str>| text.and_then(|text| text.parse::<i32>().ok());
        pids()
            .filter_map(|pid| {
                let stat = stat(pid)?;
                let fields: Vec<&str> = stat.split(' ').collect();
                Some(Process { pid, parent: number(fields.get(1))?, group: number(fields.get(2))? })
            })
            .collect()
    }

    /// Tells a process from a later one with the same number. Nothing for a zombie.
    pub(in super::super) fn started_at(pid: Pid) -> Option<String> {
        stat(pid.as_raw())?.split(' ').nth(19).map(str::to_owned)
    }

    /// Finds processes that carry the mark of this VM, however far they went from their parents.
    pub(in super::super) fn inside(vm_dir: &str) -> Vec<Pid> {
        let wanted = format!("{}={vm_dir}", super::super::MARK);
        pids()
            .filter(|pid| {
                let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
                environ.split(|byte| *byte == 0).any(|pair| pair == wanted.as_bytes()) && stat(*pid).is_some()
            })
            .map(Pid::from_raw)
            .collect()
    }

    fn pids() -> impl Iterator<Item = i32> {
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
    }

    /// The fields of `/proc/PID/stat` from the state on: a command's name may hold anything, even `)`.
    fn stat(pid: i32) -> Option<String> {
        let text = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
        let text = String::from_utf8_lossy(&text);
        let (_, fields) = text.rsplit_once(") ")?;
        (!fields.starts_with(['Z', 'X'])).then(|| fields.trim_end().to_owned())
    }
}

#[cfg(not(target_os = "linux"))]
mod platform {
    use std::io::Read;
    use std::process::{Command, Stdio};

    use nix::unistd::Pid;

    use super::Process;

    /// There is no such thing here. A process that leaves its group and outlives its parents is found by its environment,
    /// which the system shows for most programs and not for its own.
    pub(in super::super) fn adopt_orphans() -> std::io::Result<()> {
        Ok(())
    }

    pub(in super::super) const fn children_are_all() -> bool {
        false
    }

    pub(super) fn processes() -> Vec<Process> {
        let list = ps(&["-axo", "pid=,ppid=,pgid=,stat="]).unwrap_or_default();
        list.lines()
            .filter_map(|line| {
                let mut fields = line.split_whitespace();
                let mut number = || fields.next()?.parse::<i32>().ok();
                let (pid, parent, group) = (number()?, number()?, number()?);
                (!fields.next()?.starts_with('Z')).then_some(Process { pid, parent, group })
            })
            .collect()
    }

    pub(in super::super) fn started_at(pid: Pid) -> Option<String> {
        let line = ps(&["-o", "stat=,lstart=", "-p", &pid.to_string()])?;
        let (state, start) = line.trim().split_once(char::is_whitespace)?;
        (!state.starts_with('Z')).then(|| start.split_whitespace().collect::<Vec<_>>().join("_"))
    }

    /// Finds processes that carry the mark of this VM, as far as their environment is shown.
    pub(in super::super) fn inside(vm_dir: &str) -> Vec<Pid> {
        let wanted = format!(" {}={vm_dir} ", super::super::MARK);
        let list = ps(&["-axEww", "-o", "pid=,stat=,command="]).unwrap_or_default();
        list.lines()
            .filter_map(|line| {
                let (pid, rest) = line.trim_start().split_once(' ')?;
                let found = !rest.trim_start().starts_with('Z') && format!("{rest} ").contains(&wanted);
                found.then(|| pid.parse().ok().map(Pid::from_raw))?
            })
            .collect()
    }

    /// The lines of `ps`, without its own.
    fn ps(args: &[&str]) -> Option<String> {
        let mut command = Command::new("/bin/ps");
        let mut child =
            command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()?;
        let mut text = String::new();
        let read = child.stdout.take()?.read_to_string(&mut text);
        // In a guard another thread waits for every child, and may have been faster.
        let _reaped = child.wait();
        read.ok()?;
        let own = child.id().to_string();
        let other = |line: &&str| line.split_whitespace().next() != Some(own.as_str());
        Some(text.lines().filter(other).collect::<Vec<_>>().join("\n"))
    }
}
