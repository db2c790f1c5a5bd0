//! `clone` and `create`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::Flock;

use super::args::Parsed;
use super::context::{Sim, Version, dice};
use super::fault::{Fault, find};
use super::home::{Config, GB, RemoteName, VmDir, local_vms, new_mac};
use super::image::Profile;
use super::vm::remove_tree;
use super::watch::Cancelled;
use super::{Done, Failure, host, lock, pull};

/// A work place below `tmp` that is locked, so that nobody's garbage collection takes it.
struct Work {
    path: PathBuf,
    _held: Flock<File>,
}

impl Work {
    fn new(sim: &Sim) -> Result<Work, Failure> {
        let (a, b) = (dice(), dice().rotate_left(17));
        let hex = format!("{a:016X}{b:016X}");
        let name = format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]);
        let path = sim.tmp().join(name);
        fs::create_dir(&path)?;
        let held = lock::exclusive(&path)?;
        Ok(Work { path, _held: held })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // After the move it is not there any more.
        let _ = fs::remove_dir_all(&self.path);
    }
}

pub(crate) fn clone(sim: &Sim, parsed: &Parsed, faults: &[Fault]) -> Done {
    let (source, new) = (&parsed.names[0], &parsed.names[1]);
    let cancelled = Cancelled::by_interrupt();
    let target = VmDir::local(sim, new);
    if sim.version >= Version::V2_40 && target.exists() && !parsed.has("overwrite") {
        return Err(Failure::RootUsage(format!("VM \"{new}\" already exists, use --overwrite to replace it")));
    }
    let remote = RemoteName::parse(source);
    if parsed.has("stacked") {
        return Err(match remote {
            None => Failure::Usage("--stacked requires a remote image".into()),
            Some(_) => Failure::Error("stacked disks require DiskImageKit on macOS 27 or newer".into()),
        });
    }
    let image = match &remote {
        None => VmDir::open(sim, source)?,
        Some(remote) => cached_image(sim, remote, faults)?,
    };
    let work = Work::new(sim)?;
    if find(faults, "tmp_gone").is_some() {
        fs::remove_dir_all(&work.path)?;
    }
    let global = lock::exclusive(&sim.home)?;
    if let Some(fault) = find(faults, "slow") {
        fault.wait(sim);
    }
    if find(faults, "no_space").is_some() || host::free(sim) < image.extra().grown {
        let name = work.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let text = format!("“disk.img” couldn’t be copied to “{name}” because there isn’t enough space.");
        return Err(Failure::Error(text));
    }
    let copy = VmDir { name: new.clone(), path: work.path.clone() };
    if cancelled.is_set() {
        return Err(Failure::Error("CancellationError()".into()));
    }
    copy_vm(sim, &image, &copy)?;
    if cancelled.is_set() {
        return Err(Failure::Error("CancellationError()".into()));
    }
    replace(&copy.path, &target.path)?;
    drop(global);
    let unallocated = target.disk_bytes().saturating_sub(host::allocated(&image));
    let limit = parsed.number("prune-limit")?.unwrap_or(100) << 30;
    host::reclaim(sim, unallocated.min(limit), &fs::canonicalize(&image.path)?)
}

/// The image's directory; it is pulled first where the cache does not have it. The registry is not asked otherwise.
fn cached_image(sim: &Sim, remote: &RemoteName, faults: &[Fault]) -> Result<VmDir, Failure> {
    if find(faults, "source_gone").is_some()
        && let Some(digest) = remote.cached_digest(sim)
    {
        host::remove_image(&remote.with(&digest).cached(sim))?;
    }
    if remote.cached_digest(sim).is_none() {
        pull::fetch(sim, remote, &super::fault::Faults::of(sim, "pull", ""))?;
    }
    let image = VmDir { name: remote.to_string(), path: remote.cached(sim) };
    image.complete()?;
    super::home::touch(&fs::canonicalize(&image.path)?);
    Ok(image)
}

fn copy_vm(sim: &Sim, from: &VmDir, to: &VmDir) -> Done {
    let mut config = from.config()?;
    let suspended = from.state_path().exists();
    // Decodes the configuration of every local VM: one broken file fails all clones.
    let mut taken = false;
    for vm in local_vms(sim) {
        taken |= vm.config()?.mac_address == config.mac_address;
    }
    if taken && !suspended {
        config.mac_address = new_mac();
    }
    config.write(&to.config_path())?;
    fs::copy(from.path.join("nvram.bin"), to.path.join("nvram.bin")).map_err(vanished)?;
    sparse(&to.disk_path(), from.disk_bytes())?;
    if suspended {
        sparse(&to.state_path(), fs::metadata(from.state_path())?.len())?;
    }
    to.write_extra(&from.extra())?;
    let written = from.guest_path().join("upper");
    if written.exists() {
        fs::create_dir_all(to.guest_path())?;
        copy_tree(&written, &to.guest_path().join("upper"))?;
    }
    Ok(())
}

fn vanished(error: std::io::Error) -> Failure {
    match error.kind() {
        std::io::ErrorKind::NotFound => {
            Failure::Error("The file “nvram.bin” doesn’t exist. (No such file or directory)".into())
        }
        _ => error.into(),
    }
}

/// Stands for a copy on write: the blocks are shared, so nothing is written.
fn sparse(path: &Path, len: u64) -> Done {
    Ok(File::create(path)?.set_len(len)?)
}

/// With owners, modes, attributes and the marks of deleted files. Of a running VM it is whatever is there at the time.
fn copy_tree(from: &Path, to: &Path) -> Done {
    let out = Command::new("cp").arg("-a").arg(from).arg(to).output()?;
    if out.status.success() || String::from_utf8_lossy(&out.stderr).lines().all(|line| line.contains("No such file")) {
        return Ok(());
    }
    Err(Failure::Error(String::from_utf8_lossy(&out.stderr).into_owned()))
}

/// Swaps the directory in, even under a process that runs the old one.
fn replace(from: &Path, to: &Path) -> Done {
    if to.exists() {
        let aside = from.with_extension("replaced");
        fs::rename(to, &aside)?;
        fs::rename(from, to)?;
        return remove_tree(&aside);
    }
    Ok(fs::rename(from, to)?)
}

pub(crate) fn create(sim: &Sim, parsed: &Parsed) -> Done {
    let work = Work::new(sim)?;
    let vm = VmDir { name: parsed.names[0].clone(), path: work.path.clone() };
    let disk_gb = parsed.number("disk-size")?.unwrap_or(50);
    let profile = match (parsed.has("linux"), parsed.value("from-ipsw")) {
        (true, None) => Profile { disk_gb, ..Profile::linux() },
        (false, Some(_)) => Profile { disk_gb, ..Profile::vanilla() },
        _ => return Err(Failure::Usage("Please specify either a --from-ipsw or --linux option!".into())),
    };
    vm.fill(&Profile { allocated_gb: 0.0, ..profile })?;
    let mut config: Config = vm.config()?;
    config.disk_format = parsed.value("disk-format").unwrap_or("raw").to_owned();
    config.write(&vm.config_path())?;
    File::options().write(true).open(vm.disk_path())?.set_len(disk_gb * GB)?;
    replace(&vm.path, &VmDir::local(sim, &vm.name).path)
}
