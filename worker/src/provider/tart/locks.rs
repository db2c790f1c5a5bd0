//! S: the files of `tart` and of ours that are looked at directly: locks, directories, settings.

use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use alloy_shared::limits::MACOS_GUESTS_MAX;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::unistd::Pid;

use crate::lock::{self, NotTaken};
use crate::provider::{VmError, VmFault};

/// Takes the right to make VMs below this home, for as long as the lock is held. Two workers would take each other's
/// VMs for left-overs.
pub(super) fn claim(home: &Path) -> io::Result<lock::Held> {
    std::fs::create_dir_all(home)?;
    lock::take(&home.join(".alloy-worker.lock")).map_err(|why| match why {
        NotTaken::Taken { pid } => io::Error::other(format!("another worker{} makes its VMs here", number(pid))),
        NotTaken::Io(error) => error,
    })
}

/// Takes one of the host's places for a VM, which all workers of this host share, whatever their homes are.
pub(super) fn place(dir: &Path) -> Result<lock::Held, VmError> {
    lock::take_place(dir, MACOS_GUESTS_MAX).map_err(|why| match why {
        NotTaken::Taken { pid } => {
            let who = number(pid);
            let why =
                format!("{MACOS_GUESTS_MAX} VMs run on this host, some for another worker{who}; macOS allows no more");
            VmError::farm(fault_of(pid), why)
        }
        NotTaken::Io(error) => {
            VmError::io(VmFault::Host, &format!("count the VMs of this host in {}", dir.display()), &error)
        }
    })
}

/// What it means that this process has a place. One that is dead leaves it in a moment.
fn fault_of(pid: Option<i32>) -> VmFault {
    match pid {
        Some(pid) if pid == lock::own_pid() || !lock::is_alive(pid) => VmFault::Full,
        Some(_) | None => VmFault::Taken,
    }
}

fn number(pid: Option<i32>) -> String {
    pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
}

/// Who holds the lock that makes a VM count as running.
pub(super) fn holder(config: &Path) -> Option<Pid> {
    let file = OpenOptions::new().read(true).write(true).open(config).ok()?;
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_GETLK(&mut lock)).ok()?;
    (lock.l_type != libc::F_UNLCK as libc::c_short && lock.l_pid > 0).then(|| Pid::from_raw(lock.l_pid))
}

pub(super) fn entries(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// VMs whose settings are no JSON.
pub(super) fn broken(vms: &Path) -> Vec<String> {
    let unreadable = |name: &String| {
        let config = std::fs::read(vms.join(name).join("config.json"));
        config.is_ok_and(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).is_err())
    };
    entries(vms).into_iter().filter(unreadable).collect()
}

/// The hardware address in a VM's settings.
pub(super) fn mac(config: &Path) -> Option<String> {
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(config).ok()?).ok()?;
    Some(config.get("macAddress")?.as_str()?.to_lowercase())
}

pub(super) fn make_private(vm_dir: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(vm_dir.join("inbox"))
}

pub(super) fn remove(dir: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_has_one_worker() {
        let home = tempfile::tempdir().unwrap();
        let first = claim(home.path()).unwrap();
        assert!(claim(home.path()).unwrap_err().to_string().contains("another worker"));
        drop(first);
        claim(home.path()).unwrap();
    }

    #[test]
    fn a_host_runs_two_vms_for_all_of_its_workers() {
        let shared = tempfile::tempdir().unwrap();
        let (first, _second) = (place(shared.path()).unwrap(), place(shared.path()).unwrap());
        let error = place(shared.path()).unwrap_err();
        assert!(error.what == VmFault::Full && error.tail.contains("macOS allows no more"), "{error}");
        drop(first);
        place(shared.path()).unwrap();
        let file = shared.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert_eq!(place(&file.join("below")).unwrap_err().what, VmFault::Host);
    }

    #[test]
    fn places_of_another_worker_that_lives_are_no_fault_of_the_host() {
        let (init, nobody) = (1, i32::MAX);
        for (pid, what) in [
            (Some(init), VmFault::Taken),
            (None, VmFault::Taken),
            (Some(nobody), VmFault::Full),
            (Some(lock::own_pid()), VmFault::Full),
        ] {
            assert_eq!(fault_of(pid), what, "{pid:?}");
        }
    }

    #[test]
    fn settings_that_cannot_be_read_are_found() {
        let vms = tempfile::tempdir().unwrap();
        for (name, text) in [("good", "{\"macAddress\":\"7E:00\"}"), ("torn", "{\"mac"), ("empty", "")] {
            std::fs::create_dir(vms.path().join(name)).unwrap();
            std::fs::write(vms.path().join(name).join("config.json"), text).unwrap();
        }
        std::fs::create_dir(vms.path().join("bare")).unwrap();
        let mut found = broken(vms.path());
        found.sort();
        assert_eq!(found, ["empty", "torn"]);
        assert_eq!(mac(&vms.path().join("good/config.json")).as_deref(), Some("7e:00"));
        assert_eq!(holder(&vms.path().join("good/config.json")), None);
    }
}
