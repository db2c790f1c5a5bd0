//! S: who wants a job of the farm on this machine. A command of `--local` holds a lease while it lives; the system lets go of
//! it when the command dies, however it dies. The farm's host ends the jobs of the dead: nobody would hear of them.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

#[cfg(feature = "farm")]
use alloy_shared::env::Ms;
use nix::fcntl::{Flock, FlockArg};

use super::data::DataDir;
use crate::context::App;
use crate::output::Failure;

/// Commands of this user that may be at it at once; leases beyond are looked at later.
#[cfg(feature = "farm")]
const LEASES_MAX: usize = 1_000;
const ENDING: &str = "lease";
/// Of one that is being written.
const HALF: &str = "new";
/// A request of a command that is dead is answered or gone after this time.
#[cfg(feature = "farm")]
const SETTLED_MS: u64 = 60_000;

/// Held while a command lives. It holds the idempotency key of the submit: whatever becomes of the command, its job is found.
#[derive(Debug)]
pub(crate) struct Lease {
    path: PathBuf,
    _file: Flock<File>,
    stays: bool,
}

impl Lease {
    /// Before the job is asked for: a command that dies before it has read the answer leaves a trace too.
    pub(crate) fn take(app: &App, key: &str) -> Result<Self, Failure> {
        let dir = DataDir::new(&app.places.data).leases();
        let name = format!("{}-{:016x}", std::process::id(), app.env.dice());
        Self::take_in(&dir, &name, key).map_err(|error| Failure::io(&dir.display().to_string(), &error))
    }

    fn take_in(dir: &Path, name: &str, key: &str) -> std::io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        // It gets its name when it is locked and filled: whoever looks before must not take it for a dead one's.
        let (temp, path) = (dir.join(format!("{name}.{HALF}")), dir.join(format!("{name}.{ENDING}")));
        let file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&temp)?;
        let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)?;
        writeln!(file, "{key}")?;
        fs::rename(&temp, &path)?;
        Ok(Self { path, _file: file, stays: false })
    }

    /// Whether the file outlives this command: as long as nobody knows what became of the submit, it is the only trace.
    pub(crate) fn stays(&mut self, stays: bool) {
        self.stays = stays;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.stays {
            // One that is left is that of a dead command with a job that has ended: a look removes it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// What one look at the leases shows.
#[cfg(feature = "farm")]
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Leases {
    pub(super) dead: Vec<Dead>,
    /// Commands that live: each has a job, or is about to.
    pub(super) living: Vec<Alive>,
}

/// The lease of a command that lives.
#[cfg(feature = "farm")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Alive {
    /// The command's process.
    pub(super) pid: String,
    pub(super) key: String,
}

/// The lease of a command that is no more.
#[cfg(feature = "farm")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Dead {
    path: PathBuf,
    pub(super) key: String,
    /// Its submit has arrived by now, or never will.
    pub(super) settled: bool,
}

#[cfg(feature = "farm")]
impl Leases {
    pub(super) fn look(data: &DataDir, now: Ms) -> Self {
        let mut leases = Self::default();
        let Ok(entries) = fs::read_dir(data.leases()) else { return leases };
        for path in entries.flatten().map(|entry| entry.path()).take(LEASES_MAX) {
            // Gone between the two looks: its command ended well.
            let Ok(file) = File::open(&path) else { continue };
            let settled = age_ms(&file, now).is_some_and(|age| age >= SETTLED_MS);
            let ending = path.extension().and_then(|ending| ending.to_str());
            if ending == Some(HALF) && settled {
                // A command was killed between two lines of its own.
                let _ = fs::remove_file(&path);
            }
            if ending != Some(ENDING) {
                continue;
            }
            let key = fs::read_to_string(&path).unwrap_or_default().trim_end().to_owned();
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(_nobody_has_it) => leases.dead.push(Dead { path, key, settled }),
                Err(_) => leases.living.push(Alive { pid: pid_of(&path), key }),
            }
        }
        leases
    }
}

/// The process that a lease is named after.
#[cfg(feature = "farm")]
fn pid_of(path: &Path) -> String {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.split('-').next().unwrap_or_default().to_owned()
}

#[cfg(feature = "farm")]
fn age_ms(file: &File, now: Ms) -> Option<u64> {
    let written = file.metadata().ok()?.modified().ok()?.duration_since(std::time::UNIX_EPOCH).ok()?;
    u64::try_from(now.0.checked_sub(i64::try_from(written.as_millis()).ok()?)?).ok()
}

#[cfg(feature = "farm")]
impl Dead {
    pub(super) fn forget(self) {
        // The next look tries again.
        let _ = fs::remove_file(self.path);
    }
}

#[cfg(all(test, feature = "farm"))]
mod tests {
    use alloy_shared::env::Env as _;
    use alloy_shared::runtime::{Lifecycle, SystemEnv};

    use super::*;

    #[test]
    fn a_lease_lives_as_long_as_its_command() {
        let root = tempfile::tempdir().unwrap();
        let data = DataDir::new(root.path());
        let now = SystemEnv::new(Lifecycle::new()).now().wall;
        let later = now.plus(2 * SETTLED_MS);
        assert_eq!(Leases::look(&data, now), Leases::default());
        let lease = Lease::take_in(&data.leases(), "1-a", "k1").unwrap();
        let alive = Alive { pid: "1".into(), key: "k1".into() };
        assert_eq!(
            Leases::look(&data, later),
            Leases { dead: vec![], living: vec![alive] },
            "also before it has a job"
        );

        // As if the process had died: the lock goes, the file stays.
        let kept = data.leases().join("2-b.lease");
        fs::copy(&lease.path, &kept).unwrap();
        let dead = |settled| Dead { path: kept.clone(), key: "k1".into(), settled };
        assert_eq!(Leases::look(&data, now).dead, [dead(false)]);
        let mut found = Leases::look(&data, later).dead;
        assert_eq!(found, [dead(true)]);
        found.remove(0).forget();
        drop(lease);
        assert_eq!(Leases::look(&data, now), Leases::default());
        assert_eq!(fs::read_dir(data.leases()).unwrap().count(), 0);
    }

    #[test]
    fn a_lease_stays_behind_if_nobody_knows_what_became_of_the_submit() {
        let root = tempfile::tempdir().unwrap();
        let data = DataDir::new(root.path());
        let mut lease = Lease::take_in(&data.leases(), "1-a", "k1").unwrap();
        lease.stays(true);
        drop(lease);
        let left = Leases::look(&data, Ms(0));
        assert_eq!((left.living.len(), left.dead.len()), (0, 1), "{left:?}");
        assert_eq!(left.dead[0].key, "k1");
    }

    #[test]
    fn half_a_lease_is_removed_when_it_is_old() {
        let root = tempfile::tempdir().unwrap();
        let data = DataDir::new(root.path());
        let now = SystemEnv::new(Lifecycle::new()).now().wall;
        fs::create_dir_all(data.leases()).unwrap();
        fs::write(data.leases().join("1-a.new"), "").unwrap();
        assert_eq!(Leases::look(&data, now), Leases::default());
        assert_eq!(fs::read_dir(data.leases()).unwrap().count(), 1, "its command may be about to name it");
        assert_eq!(Leases::look(&data, now.plus(2 * SETTLED_MS)), Leases::default());
        assert_eq!(fs::read_dir(data.leases()).unwrap().count(), 0);
    }
}
