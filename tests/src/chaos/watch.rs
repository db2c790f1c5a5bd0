//! Looks at the list of processes again and again and writes down which VMs run commands of which attempts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::history::{Recorder, Seen, Vm};

/// Between two looks. Two VMs of a job that live for longer than this are seen.
const BEAT: Duration = Duration::from_millis(40);

pub struct Watch {
    over: Arc<AtomicBool>,
    looks: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Watches hosts that may run `room` VMs each.
    pub fn start(recorder: Recorder, room: usize) -> Watch {
        let (over, looks) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (told, counted) = (Arc::clone(&over), Arc::clone(&looks));
        let thread = std::thread::spawn(move || {
            let mut before = Vec::new();
            while !told.load(Ordering::Relaxed) {
                let vms = running(room);
                if vms != before {
                    recorder.write(Seen::Running { vms: vms.clone() });
                    before = vms;
                }
                counted.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(BEAT);
            }
        });
        Watch { over, looks, thread: Some(thread) }
    }

    /// How often it has looked.
    pub fn looks(&self) -> u64 {
        self.looks.load(Ordering::Relaxed)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _panicked_already = thread.join();
        }
    }
}

/// VMs that run commands of jobs at this moment.
pub fn running(room: usize) -> Vec<Vm> {
    let mut found = look(room);
    // A look takes its time: what was seen first may have ended before what was seen last began.
    let (mut attempts, mut hosts) = (BTreeMap::<&str, BTreeSet<u32>>::new(), BTreeMap::<&str, BTreeSet<&str>>::new());
    for (_, vm) in &found {
        attempts.entry(&vm.job).or_default().insert(vm.attempt);
        hosts.entry(&vm.host).or_default().insert(&vm.name);
    }
    if attempts.values().any(|attempts| attempts.len() > 1) || hosts.values().any(|names| names.len() > room) {
        let again: BTreeSet<_> = look(room).into_iter().collect();
        found.retain(|seen| again.contains(seen));
    }
    let vms: BTreeSet<Vm> = found.into_iter().map(|(_, vm)| vm).collect();
    vms.into_iter().collect()
}

/// Processes that carry the marks of a job in their environment, and live.
#[cfg(target_os = "linux")]
fn look(room: usize) -> Vec<(i32, Vm)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let Ok(environment) = std::fs::read(entry.path().join("environ")) else { continue };
        let Some(mut vm) = marks(&environment, room) else { continue };
        if vm.name.is_empty() {
            // A guest knows no name of its own.
            vm.name = vm_of(pid).unwrap_or_default();
        }
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        if !matches!(state, None | Some('Z' | 'X')) {
            found.push((pid, vm));
        }
    }
    found
}

/// The name of the VM that this process runs in: it descends from `tart run NAME`.
#[cfg(target_os = "linux")]
fn vm_of(mut pid: i32) -> Option<String> {
    while pid > 1 {
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
        let mut words = line.split('\0');
        if words.next().is_some_and(|program| program.ends_with("tart")) && words.next() == Some("run") {
            return words.find(|word| !word.starts_with('-')).map(str::to_owned);
        }
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        pid = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()?;
    }
    None
}

/// The environment of another process is not to be read there.
#[cfg(not(target_os = "linux"))]
fn look(_room: usize) -> Vec<(i32, Vm)> {
    Vec::new()
}

#[cfg(target_os = "linux")]
fn marks(environment: &[u8], room: usize) -> Option<Vm> {
    let text = std::str::from_utf8(environment).ok()?;
    // Few processes are worth a closer look.
    text.find("ALLOY_JOB_")?;
    let value = |name: &str| {
        let mut pairs = text.split('\0').filter_map(|pair| pair.split_once('='));
        pairs.find(|(key, _)| *key == name).map(|(_, value)| value.to_owned())
    };
    // A hook around a job is none of its commands.
    if value("ALLOY_HOOK").is_some() {
        return None;
    }
    Some(Vm {
        host: value("ALLOY_WORKER")?,
        room,
        name: value("ALLOY_VM_DIR").unwrap_or_default(),
        job: value("ALLOY_JOB_ID")?,
        attempt: value("ALLOY_JOB_ATTEMPT")?.parse().ok()?,
    })
}
