//! `run`: the start sequence in its order, the life of a VM, and every way it ends.

mod machine;
mod network;

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::sys::signal::Signal;

use super::args::Parsed;
use super::context::{Sim, wall_ms};
use super::fault::{Fault, find};
use super::home::{Config, VmDir, local_vms, new_mac};
use super::host::Slot;
use super::lock::RunLock;
use super::run_args::{Flags, Network};
use super::{Done, Failure, lock, say, watch};
use machine::{Ended, Machine};

const LIMIT: &str = "The number of VMs exceeds the system limit";

pub(crate) fn run(sim: &Sim, parsed: &Parsed, faults: &[Fault]) -> Done {
    let name = &parsed.names[0];
    // The look of argument validation: not a state error.
    let vm = VmDir::open(sim, name).map_err(|failure| match failure {
        Failure::State(text) | Failure::Bare(text) => Failure::Error(text),
        other => other,
    })?;
    let flags = Flags::of(parsed)?;
    let global = lock::exclusive(&sim.home)?;
    let config = own_mac(sim, &vm, faults)?;
    configure(&flags)?;
    let Some(run_lock) = RunLock::take(&vm.config_path())? else {
        return Err(Failure::State(format!("VM \"{name}\" is already running!")));
    };
    drop(global);
    watch::block(&[Signal::SIGUSR1, Signal::SIGUSR2]);
    let signals = watch::each(&[Signal::SIGINT, Signal::SIGUSR1, Signal::SIGUSR2]);
    let suspendable = flags.suspendable || vm.state_path().exists();
    let restored = restore(&vm, &config, &flags, faults)?;
    let softnet = network::start(sim, &vm, &config, &flags.network)?;
    start_errors(faults)?;
    let slot = take_slot(sim, &config, name, faults)?;
    std::env::set_current_dir(&vm.path)?;
    let mut machine = Machine { sim, vm: &vm, config: &config, flags: &flags, faults, suspendable, restored, softnet };
    let ended = machine.live(signals);
    record_growth(&vm)?;
    if let (Some(slot), Some(_)) = (&slot, find(faults, "slot_leak")) {
        slot.leak();
    }
    drop((slot, run_lock));
    match ended? {
        Ended::Quietly => Ok(()),
        Ended::Failed(text) => {
            eprintln!("{text}");
            Err(Failure::Silent(1))
        }
        // Said on stdout already.
        Ended::FailedSilently => Err(Failure::Silent(1)),
    }
}

/// The configuration, with another MAC if a VM that runs has the same.
fn own_mac(sim: &Sim, vm: &VmDir, faults: &[Fault]) -> Result<Config, Failure> {
    let mut config = vm.config()?;
    let others = local_vms(sim).into_iter().filter(|other| other.name != vm.name && other.runner().is_some());
    let taken = others.filter_map(|other| other.config().ok()).any(|other| other.mac_address == config.mac_address);
    if taken || find(faults, "mac_collision").is_some() {
        say("There is already a running VM with the same MAC address!");
        say("Resetting VM to assign a new MAC address...");
        config.mac_address = new_mac();
        config.write(&vm.config_path())?;
        if vm.state_path().exists() {
            fs::remove_file(vm.state_path())?;
        }
    }
    Ok(config)
}

/// Errors of the configuration, before any lock of the VM.
fn configure(flags: &Flags) -> Done {
    match &flags.network {
        Network::Softnet { control_fd, .. } => network::check(*control_fd),
        Network::Nat | Network::Bridged => Ok(()),
    }
}

/// Whether there was a saved state; it is consumed.
fn restore(vm: &VmDir, config: &Config, flags: &Flags, faults: &[Fault]) -> Result<bool, Failure> {
    if !vm.state_path().exists() {
        return Ok(false);
    }
    say("restoring VM state from a snapshot...");
    let fits = vm.extra().saved_with.as_deref() == Some(&fingerprint(config, flags));
    if !fits || find(faults, "restore_fails").is_some() {
        let text = "Error Domain=VZErrorDomain Code=12 \"Invalid argument\" UserInfo={NSLocalizedFailure=The virtual machine \
                    failed to restore., NSLocalizedFailureReason=invalid argument}";
        return Err(Failure::Bare(text.into()));
    }
    fs::remove_file(vm.state_path())?;
    say("resuming VM...");
    Ok(true)
}

/// All that must not change between save and restore.
fn fingerprint(config: &Config, flags: &Flags) -> String {
    let Config { cpu_count, memory_size, mac_address, ecid, display, .. } = config;
    format!("{cpu_count} {memory_size} {mac_address} {ecid} {display:?} {}", flags.devices)
}

fn start_errors(faults: &[Fault]) -> Done {
    let Some(fault) = find(faults, "start_error") else { return Ok(()) };
    let text = match fault.text("what").unwrap_or("start") {
        "keychain" => {
            "Failed to generate keypair: SecKeyCreateRandomKey_ios failed, Interaction is not allowed with the \
                       Security Server"
                .to_owned()
        }
        "security" => error(-9, "security error"),
        "start" => error(1, "The virtual machine failed to start."),
        "storage" => error(2, "Failed to lock auxiliary storage."),
        other => other.to_owned(),
    };
    Err(Failure::Bare(text))
}

fn error(code: i32, text: &str) -> String {
    format!("Error Domain=VZErrorDomain Code={code} Description=\"{text}\"")
}

/// Linux guests need none.
fn take_slot(sim: &Sim, config: &Config, name: &str, faults: &[Fault]) -> Result<Option<Slot>, Failure> {
    if config.os != "darwin" {
        return Ok(None);
    }
    if find(faults, "limit").is_none()
        && let Some(slot) = Slot::take(sim)?
    {
        return Ok(Some(slot));
    }
    let others = local_vms(sim).into_iter().filter(|vm| vm.name != name && vm.runner().is_some());
    let names: Vec<_> = others.map(|vm| vm.name).collect();
    let list = if names.is_empty() { String::new() } else { format!(" (other running VMs: {})", names.join(", ")) };
    Err(Failure::Bare(format!("{LIMIT}{list}")))
}

/// Writes the saved state of a VM that is about to end.
fn save(vm: &VmDir, config: &Config, flags: &Flags) -> Done {
    let mut extra = vm.extra();
    extra.suspended_at_ms = Some(wall_ms());
    extra.saved_with = Some(fingerprint(config, flags));
    vm.write_extra(&extra)?;
    Ok(fs::File::create(vm.state_path())?.set_len(config.memory_size)?)
}

/// What the guest wrote counts as its own blocks from here on.
fn record_growth(vm: &VmDir) -> Done {
    let written = size_below(&vm.guest_path().join("upper"));
    let mut extra = vm.extra();
    if extra.grown < written {
        extra.grown = written;
        vm.write_extra(&extra)?;
    }
    Ok(())
}

fn size_below(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(found) if found.is_dir() => size_below(&entry.path()),
            Ok(found) if found.is_file() => found.blocks() * 512,
            _ => 0,
        })
        .sum()
}
