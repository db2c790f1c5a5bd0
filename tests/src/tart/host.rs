//! The simulated Mac: room on its disk, and Apple's two slots for macOS guests, which count across every `TART_HOME`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};

use super::context::Sim;
use super::home::{GB, MIB, VmDir, cached_images, local_vms, never, set_accessed};
use super::{Failure, lock};

/// What Apple's licence and its hypervisor allow.
const SLOTS: usize = 2;

/// `host.json`: facts of the Mac that a test may set.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Facts {
    pub(crate) capacity_gb: f64,
}

impl Default for Facts {
    fn default() -> Facts {
        Facts { capacity_gb: 10_000.0 }
    }
}

impl Facts {
    pub(crate) fn write(&self, host: &Path) -> std::io::Result<()> {
        fs::create_dir_all(host)?;
        fs::write(host.join("host.json"), serde_json::to_vec(self)?)
    }

    fn read(host: &Path) -> Facts {
        let text = fs::read(host.join("host.json")).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }
}

fn bytes(gb: f64) -> u64 {
    (gb * GB as f64) as u64
}

/// What an image or VM has allocated; a clone shares the blocks of its image and is still reported with them.
pub(crate) fn allocated(vm: &VmDir) -> u64 {
    let extra = vm.extra();
    bytes(extra.profile.allocated_gb) + extra.grown
}

/// Bytes that are free on the volume of this `TART_HOME`.
pub(crate) fn free(sim: &Sim) -> u64 {
    let images = cached_images(sim).into_iter().filter(|image| !image.path.is_symlink());
    let cached: u64 = images.map(|image| allocated(&image)).sum();
    // A clone takes what the guest wrote, and its saved state.
    let grown: u64 = local_vms(sim)
        .iter()
        .map(|vm| {
            let saved = fs::metadata(vm.state_path()).map_or(0, |found| found.len());
            vm.extra().grown + saved
        })
        .sum();
    bytes(Facts::read(&sim.host).capacity_gb).saturating_sub(cached + grown)
}

/// Makes room by the images that were not used for longest. Does nothing where they are too small to help.
pub(crate) fn reclaim(sim: &Sim, need: u64, keep: &Path) -> Result<(), Failure> {
    let room = free(sim);
    if !sim.prunes || room >= need {
        return Ok(());
    }
    let mut images: Vec<_> =
        cached_images(sim).into_iter().filter(|image| !image.path.is_symlink() && image.path != keep).collect();
    if room + images.iter().map(allocated).sum::<u64>() < need {
        return Ok(());
    }
    images.sort_by_key(VmDir::accessed);
    for image in images {
        if free(sim) >= need {
            break;
        }
        remove_image(&image.path)?;
    }
    Ok(())
}

/// Removes a digest and the tags that led to it.
pub(crate) fn remove_image(digest_dir: &Path) -> Result<(), Failure> {
    fs::remove_dir_all(digest_dir)?;
    if let Some(parent) = digest_dir.parent() {
        for entry in fs::read_dir(parent)?.flatten() {
            if entry.path().is_symlink() && !entry.path().exists() {
                fs::remove_file(entry.path())?;
            }
        }
    }
    Ok(())
}

/// The reserve that a pull wants beside the disk itself.
pub(crate) fn pull_need(disk_gb: u64) -> u64 {
    disk_gb * GB + 128 * MIB
}

pub(crate) fn first_in_line(path: &Path) {
    set_accessed(path, never());
}

/// One of Apple's slots, taken until it is dropped or its process is gone.
#[derive(Debug)]
pub(crate) struct Slot {
    _held: Flock<File>,
    dir: PathBuf,
}

impl Slot {
    /// Nothing if all are taken.
    pub(crate) fn take(sim: &Sim) -> std::io::Result<Option<Slot>> {
        let dir = sim.host.join("slots");
        fs::create_dir_all(&dir)?;
        let _one_at_a_time = lock::exclusive_file(&dir.join("lock"))?;
        let leaked = (0..SLOTS).filter(|number| dir.join(format!("leaked-{number}")).exists()).count();
        let mut free = Vec::new();
        for number in 0..SLOTS {
            let path = dir.join(number.to_string());
            File::options().create(true).append(true).open(&path)?;
            free.extend(lock::try_exclusive(&path)?);
        }
        if free.len() <= leaked {
            return Ok(None);
        }
        Ok(free.pop().map(|held| Slot { _held: held, dir }))
    }

    /// It stays taken after the end, until the host is rebooted.
    pub(crate) fn leak(&self) {
        let free = (0..SLOTS).map(|number| self.dir.join(format!("leaked-{number}"))).find(|path| !path.exists());
        if let Some(path) = free {
            let _ = File::create(path);
        }
    }
}

/// What a reboot of the Mac heals.
pub(crate) fn reboot(host: &Path) -> std::io::Result<()> {
    for number in 0..SLOTS {
        match fs::remove_file(host.join(format!("slots/leaked-{number}"))) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}
