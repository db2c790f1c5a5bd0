//! Commands on a local VM: `delete`, `rename`, `set`, `stop`, `suspend`.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::args::Parsed;
use super::context::{Sim, dice, now};
use super::fault::{Fault, die_of, find};
use super::home::{Config, GB, MIB, Reference, RemoteName, State, VmDir, new_mac};
use super::host::remove_image;
use super::lock::RunLock;
use super::{Done, Failure};

/// What `stop` and `ip` grant at least, unless they were told less: a guest takes real time, however fast the simulated
/// clock.
pub(super) const REAL_PATIENCE: Duration = Duration::from_secs(10);

pub(crate) fn delete(sim: &Sim, parsed: &Parsed, faults: &[Fault]) -> Done {
    for name in &parsed.names {
        match RemoteName::parse(name) {
            Some(remote) => delete_image(sim, &remote)?,
            None => delete_vm(sim, name, faults)?,
        }
    }
    Ok(())
}

fn delete_vm(sim: &Sim, name: &str, faults: &[Fault]) -> Done {
    let vm = VmDir::local(sim, name);
    if name.is_empty() || !vm.exists() {
        return Err(Failure::no_vm(name));
    }
    let running = || Failure::Bare(format!("VM \"{name}\" is running"));
    if find(faults, "running").is_some() {
        return Err(running());
    }
    let Some(_lock) = RunLock::take(&vm.config_path())? else { return Err(running()) };
    remove_tree(&vm.path)
}

/// Guests leave directories that nobody may enter; their owner still can.
pub(crate) fn remove_tree(path: &Path) -> Done {
    for _ in 0..100 {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            // Mounts of a guest that was killed a moment ago go with its last process.
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            other => return Ok(other?),
        }
    }
    Ok(fs::remove_dir_all(path)?)
}

fn delete_image(sim: &Sim, remote: &RemoteName) -> Done {
    let path = remote.cached(sim);
    let Some(digest) = remote.cached_digest(sim) else { return Err(Failure::no_vm(&remote.to_string())) };
    match &remote.reference {
        Reference::Digest(_) => remove_image(&path),
        Reference::Tag(_) => {
            fs::remove_file(&path)?;
            collect_unreferenced(&remote.with(&digest).cached(sim))
        }
    }
}

/// A digest without a tag goes, unless somebody pulled it by its name.
pub(crate) fn collect_unreferenced(digest_dir: &Path) -> Done {
    if !digest_dir.exists() || digest_dir.join(".explicitly-pulled").exists() {
        return Ok(());
    }
    let (Some(parent), Some(digest)) = (digest_dir.parent(), digest_dir.file_name()) else { return Ok(()) };
    let links = fs::read_dir(parent)?.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
    if links.into_iter().any(|target| target.as_os_str() == digest) {
        return Ok(());
    }
    Ok(fs::remove_dir_all(digest_dir)?)
}

pub(crate) fn rename(sim: &Sim, parsed: &Parsed) -> Done {
    let (old, new) = (&parsed.names[0], &parsed.names[1]);
    let (from, to) = (VmDir::local(sim, old), VmDir::local(sim, new));
    if !from.exists() {
        return Err(Failure::RootUsage(format!("failed to rename a non-existent local VM: {old}")));
    }
    if to.exists() {
        let text = format!("failed to rename VM {old}, target VM {new} already exists, delete it first!");
        return Err(Failure::RootUsage(text));
    }
    Ok(fs::rename(&from.path, &to.path)?)
}

pub(crate) fn set(sim: &Sim, parsed: &Parsed, faults: &[Fault]) -> Done {
    let vm = VmDir::open(sim, &parsed.names[0])?;
    let mut config = vm.config()?;
    if let Some(cpu) = parsed.number("cpu")? {
        if cpu < config.cpu_count_min {
            let least = config.cpu_count_min;
            return Err(Failure::Error(format!(
                "LessThanMinimalResourcesError(\"VM should have {least} CPU cores at minimum (requested {cpu})\")"
            )));
        }
        config.cpu_count = cpu;
    }
    if let Some(memory) = parsed.number("memory")? {
        if memory * MIB < config.memory_size_min {
            let least = config.memory_size_min;
            return Err(Failure::Error(format!(
                "LessThanMinimalResourcesError(\"VM should have {least} bytes of memory at minimum (requested {})\")",
                memory * MIB
            )));
        }
        config.memory_size = memory * MIB;
    }
    if let Some(text) = parsed.value("display") {
        config.display = display(text)?;
    }
    config.display_refit = match (parsed.has("display-refit"), parsed.has("no-display-refit")) {
        (true, _) => Some(true),
        (false, true) => Some(false),
        (false, false) => None,
    };
    if parsed.has("random-mac") {
        config.mac_address = new_mac();
    }
    if parsed.has("random-serial") {
        config.ecid = format!("{:x}", dice());
    }
    write_config(&vm, &config, faults)?;
    if let Some(disk) = parsed.value("disk") {
        fs::copy(disk, vm.disk_path())?;
    }
    match parsed.number("disk-size")? {
        Some(size) => resize(&vm, size),
        None => Ok(()),
    }
}

fn write_config(vm: &VmDir, config: &Config, faults: &[Fault]) -> Done {
    if find(faults, "truncated_config").is_some() {
        fs::write(vm.config_path(), b"{\"version\":1,\"os\"")?;
        die_of("KILL");
    }
    config.write(&vm.config_path())
}

fn display(text: &str) -> Result<super::home::Display, Failure> {
    let invalid = || Failure::Usage(format!("The value '{text}' is invalid for '--display <display>'"));
    let (numbers, unit) = match text.strip_suffix("pt") {
        Some(numbers) => (numbers, Some("pt".to_owned())),
        None => text.strip_suffix("px").map_or((text, None), |numbers| (numbers, Some("px".to_owned()))),
    };
    let (width, height) = numbers.split_once('x').ok_or_else(invalid)?;
    let number = |text: &str| text.parse::<u64>().map_err(|_| invalid());
    Ok(super::home::Display { width: number(width)?, height: number(height)?, unit })
}

fn resize(vm: &VmDir, size: u64) -> Done {
    let (wanted, have) = (size * GB, vm.disk_bytes());
    if wanted < have {
        let text = format!("new disk size of {wanted} should be larger than the current disk size of {have}");
        return Err(Failure::Bare(text));
    }
    Ok(File::options().write(true).open(vm.disk_path())?.set_len(wanted)?)
}

pub(crate) fn stop(sim: &Sim, parsed: &Parsed) -> Done {
    let vm = VmDir::open(sim, &parsed.names[0])?;
    match vm.state() {
        State::Stopped => Err(Failure::not_running(&vm.name)),
        State::Suspended => Ok(fs::remove_file(vm.state_path())?),
        State::Running => stop_running(sim, &vm, parsed.number("timeout")?.unwrap_or(30)),
    }
}

fn stop_running(sim: &Sim, vm: &VmDir, timeout: u64) -> Done {
    // It may end by itself between the look and the signal.
    let Some(pid) = vm.runner().map(Pid::from_raw) else { return Ok(()) };
    let _ = kill(pid, Signal::SIGINT);
    let patience = sim.scaled(timeout as f64).max(REAL_PATIENCE.min(Duration::from_secs(timeout)));
    let end = now() + patience;
    while now() < end {
        if vm.runner().is_none() {
            return Ok(());
        }
        sim.pause(0.1);
    }
    let Some(pid) = vm.runner().map(Pid::from_raw) else { return Ok(()) };
    match kill(pid, Signal::SIGKILL) {
        Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
        Err(error) => {
            Err(Failure::Bare(format!("failed to forcefully terminate the VM \"{}\": {}", vm.name, error.desc())))
        }
    }
}

pub(crate) fn suspend(sim: &Sim, parsed: &Parsed) -> Done {
    let vm = VmDir::open(sim, &parsed.names[0])?;
    match vm.runner() {
        None => Err(Failure::State(format!("VM \"VM \"{}\" is not running\" is not running", vm.name))),
        Some(pid) => Ok(kill(Pid::from_raw(pid), Signal::SIGUSR1)?),
    }
}
