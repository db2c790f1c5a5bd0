//! Disks of a test's own: small ones that fill up, and images of which a power cut can be taken. They need root and a kernel
//! that lets a process mount; where that is not given the test says that it was skipped, and `tests/run` tells it at its end.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// A mounted file system. Dropping it takes it away, also from under whoever still uses it.
#[derive(Debug)]
pub struct Mount {
    at: PathBuf,
}

impl Mount {
    /// A disk in memory that holds so many MiB. The directory is made.
    pub fn tmpfs(at: &Path, mib: u64) -> Result<Mount> {
        fs::create_dir_all(at)?;
        let options = format!("size={mib}m,mode=700");
        system::mount_tmpfs(at, &options).with_context(|| format!("mount a tmpfs at {}", at.display()))?;
        Ok(Mount { at: at.to_owned() })
    }

    /// The file system in an image. `options` beside `loop`.
    pub fn image(image: &Path, at: &Path, options: &str) -> Result<Mount> {
        fs::create_dir_all(at)?;
        let mut command = Command::new("mount");
        run(command.arg("-o").arg(format!("loop{options}")).arg(image).arg(at))?;
        Ok(Mount { at: at.to_owned() })
    }

    pub fn path(&self) -> &Path {
        &self.at
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = system::unmount(&self.at) {
            eprintln!("{} stays mounted: {error}", self.at.display());
        }
    }
}

/// A disk whose power can be cut: an ext4 image on an XFS, of which a copy is taken at one moment. What ext4 has not written
/// by then is not in the copy, as after a real cut.
#[derive(Debug)]
pub struct CutDisk {
    disk: Mount,
    base: Mount,
}

impl CutDisk {
    /// `scratch` holds the images.
    pub fn new(scratch: &Path, at: &Path) -> Result<CutDisk> {
        fs::create_dir_all(scratch)?;
        let image = scratch.join("xfs.img");
        fs::File::create(&image)?.set_len(2 << 30)?;
        run(Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(&image))?;
        let base = Mount::image(&image, &scratch.join("xfs"), "")?;
        let inner = base.path().join("disk.img");
        fs::File::create(&inner)?.set_len(256 << 20)?;
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&inner))?;
        CutDisk::mount(base, &inner, at)
    }

    /// What nobody synced is saved by no accident: nothing is written back by itself for an hour, nor when a file that was
    /// cut to nothing is closed.
    fn mount(base: Mount, inner: &Path, at: &Path) -> Result<CutDisk> {
        Ok(CutDisk { disk: Mount::image(inner, at, ",commit=3600,noauto_da_alloc")?, base })
    }

    /// Cuts the power of a copy; the disk itself goes on.
    pub fn cut(&self) -> Result<PathBuf> {
        let copy = self.base.path().join("cut.img");
        run(Command::new("cp").arg("--reflink=always").arg(self.base.path().join("disk.img")).arg(&copy))?;
        Ok(copy)
    }

    /// Goes on with what a cut left, where the disk was.
    pub fn go_on_after(self, cut: &Path) -> Result<CutDisk> {
        let Self { disk, base } = self;
        let at = disk.path().to_owned();
        drop(disk);
        let inner = base.path().join("disk.img");
        fs::rename(cut, &inner)?;
        CutDisk::mount(base, &inner, &at)
    }
}

pub fn run(command: &mut Command) -> Result<()> {
    let out = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
    Ok(())
}

/// Runs a test whose mounts nobody else sees: however it ends, they are gone with it.
pub fn alone(test: &str, work: impl Future<Output = Result<()>>) -> Result<()> {
    if let Err(error) = system::set_mounts_apart() {
        skipped(test, &format!("no mounts of its own: {error}"));
        return Ok(());
    }
    if !may_mount(test) {
        return Ok(());
    }
    // Its threads begin after the mounts were set apart.
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(work)
}

/// Whether this process may mount a disk in memory. If not, the test was skipped, and says so.
fn may_mount(test: &str) -> bool {
    let tried = tempfile::tempdir().map_err(anyhow::Error::from).and_then(|dir| Mount::tmpfs(dir.path(), 1).map(drop));
    match tried {
        Ok(()) => true,
        Err(error) => {
            skipped(test, &format!("{error:#}"));
            false
        }
    }
}

/// Says that a test did not look at what it is for. `tests/run` lists these at its end.
pub fn skipped(test: &str, why: &str) {
    eprintln!("SKIPPED {test}: {why}");
    if let Some(list) = std::env::var_os("ALLOY_TEST_SKIPPED") {
        let open = fs::File::options().create(true).append(true).open(list);
        if let Err(error) = open.and_then(|mut list| writeln!(list, "{test}: {why}")) {
            eprintln!("the list of skipped tests cannot be written: {error}");
        }
    }
}

/// Bytes that may still be written at a path.
pub fn free(at: &Path) -> u64 {
    worker::host::disk_free(at).expect("a mounted disk can be asked")
}

/// A file that takes all but so many bytes of its disk. Deleting it gives them back.
#[derive(Debug)]
pub struct Filler {
    path: PathBuf,
}

impl Filler {
    pub fn leave(at: &Path, free_bytes: u64) -> Result<Filler> {
        let filler = Filler { path: at.join("filler") };
        filler.resize(free_bytes)?;
        Ok(filler)
    }

    /// Grows so that so much is free.
    pub fn resize(&self, free_bytes: u64) -> Result<()> {
        let mut file = fs::File::options().create(true).append(true).open(&self.path)?;
        let dir = self.path.parent().context("a file lies in a directory")?;
        let zeros = vec![0; 64 << 10];
        while let Some(more) = free(dir).checked_sub(free_bytes).filter(|more| *more > 0) {
            let part = usize::try_from(more)?.min(zeros.len());
            match file.write(&zeros[..part]) {
                Err(error) if error.kind() == std::io::ErrorKind::StorageFull => break,
                done => done.map(drop)?,
            }
        }
        Ok(())
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        // With its disk it is gone too.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(target_os = "linux")]
mod system {
    use std::path::Path;

    use nix::Result;
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    use nix::sched::{CloneFlags, unshare};

    pub(super) fn mount_tmpfs(at: &Path, options: &str) -> Result<()> {
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(options))
    }

    /// At once, or else when whoever holds it lets go.
    pub(super) fn unmount(at: &Path) -> Result<()> {
        umount2(at, MntFlags::empty()).or_else(|_| umount2(at, MntFlags::MNT_DETACH))
    }

    pub(super) fn set_mounts_apart() -> Result<()> {
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
    }
}

/// Elsewhere no process has mounts of its own.
#[cfg(not(target_os = "linux"))]
mod system {
    use std::path::Path;

    use nix::Result;
    use nix::errno::Errno;

    pub(super) fn mount_tmpfs(_: &Path, _: &str) -> Result<()> {
        Err(Errno::ENOTSUP)
    }

    pub(super) fn unmount(_: &Path) -> Result<()> {
        Err(Errno::ENOTSUP)
    }

    pub(super) fn set_mounts_apart() -> Result<()> {
        Err(Errno::ENOTSUP)
    }
}
