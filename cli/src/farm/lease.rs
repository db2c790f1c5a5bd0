//! S: who wants a job of the farm on this machine. A command of `--local` holds a lease while it lives; the system lets go of
//! it when the command dies, however it dies. The farm's host ends the jobs of the dead: nobody would hear of them.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use alloy_shared::id::JobId;
use alloy_shared::wire::job::JobSpec;
use nix::fcntl::{Flock, FlockArg};

use super::data::DataDir;
use crate::context::App;
use crate::output::Failure;

/// Commands of this user that may be at it at once; leases beyond are looked at later.
const LEASES_MAX: usize = 1_000;
const ENDING: &str = "lease";

/// Held while a command lives. Its first line is what the command asks for, its second the job that came of it.
#[derive(Debug)]
pub(crate) struct Lease {
    path: PathBuf,
    file: Flock<File>,
}

impl Lease {
    /// Before the job is asked for: a command that dies before it has read the answer leaves a trace too.
    pub(crate) fn take(app: &App, spec: &JobSpec) -> Result<Self, Failure> {
        let dir = DataDir::new(&app.places.data).leases();
        let name = format!("{}-{:016x}", std::process::id(), app.env.dice());
        Self::take_in(&dir, &name, spec).map_err(|error| Failure::io(&dir.display().to_string(), &error))
    }

    fn take_in(dir: &Path, name: &str, spec: &JobSpec) -> std::io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        // It gets its name when it is locked and filled: whoever looks before must not take it for a dead one's.
        let (temp, path) = (dir.join(format!("{name}.new")), dir.join(format!("{name}.{ENDING}")));
        let file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&temp)?;
        let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)?;
        let mut line = serde_json::to_vec(spec)?;
        line.push(b'\n');
        file.write_all(&line)?;
        fs::rename(&temp, &path)?;
        Ok(Self { path, file })
    }

    pub(crate) fn name(&mut self, job: JobId) -> Result<(), Failure> {
        writeln!(self.file, "{job}").map_err(|error| Failure::io(&self.path.display().to_string(), &error))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // One that stays is that of a dead command with a job that has ended: the next look removes it.
        let _ = fs::remove_file(&self.path);
    }
}

/// What one look at the leases shows.
#[cfg(feature = "farm")]
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Leases {
    pub(super) dead: Vec<Dead>,
    /// Jobs that somebody waits for.
    pub(super) wanted: BTreeSet<JobId>,
}

/// The lease of a command that is no more.
#[cfg(feature = "farm")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Dead {
    path: PathBuf,
    spec: Option<JobSpec>,
    job: Option<JobId>,
}

#[cfg(feature = "farm")]
impl Leases {
    pub(super) fn look(data: &DataDir) -> Self {
        let mut leases = Self::default();
        let Ok(entries) = fs::read_dir(data.leases()) else { return leases };
        let paths = entries.flatten().map(|entry| entry.path());
        for path in paths.filter(|path| path.extension().is_some_and(|end| end == ENDING)).take(LEASES_MAX) {
            // Gone between the two looks: its command ended well.
            let Ok(file) = File::open(&path) else { continue };
            let text = fs::read_to_string(&path).unwrap_or_default();
            let mut lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
            let spec = lines.next().and_then(|line| serde_json::from_str(line).ok());
            let job = lines.next().and_then(|line| line.trim().parse().ok());
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(_nobody_has_it) => leases.dead.push(Dead { path, spec, job }),
                Err(_) => leases.wanted.extend(job),
            }
        }
        leases
    }
}

#[cfg(feature = "farm")]
impl Dead {
    /// Which of the live jobs was its own: the one it names, or one that looks like it and is nobody else's.
    pub(super) fn job_of(&self, live: &[(JobId, &JobSpec)], wanted: &BTreeSet<JobId>) -> Option<JobId> {
        let found = |is_it: &dyn Fn(&(JobId, &JobSpec)) -> bool| live.iter().find(|job| is_it(job)).map(|job| job.0);
        match (self.job, &self.spec) {
            (Some(own), _) => found(&|(id, _)| *id == own),
            (None, Some(spec)) => found(&|(id, asked)| *asked == spec && !wanted.contains(id)),
            (None, None) => None,
        }
    }

    pub(super) fn forget(self) {
        // The next look tries again.
        let _ = fs::remove_file(self.path);
    }
}

#[cfg(all(test, feature = "farm"))]
mod tests {
    use super::*;

    fn spec(line: &str) -> JobSpec {
        JobSpec { shell: Some(line.to_owned()), ..JobSpec::default() }
    }

    #[test]
    fn a_lease_lives_as_long_as_its_command() {
        let root = tempfile::tempdir().unwrap();
        let data = DataDir::new(root.path());
        assert_eq!(Leases::look(&data), Leases::default());
        let mut lease = Lease::take_in(&data.leases(), "1-a", &spec("make")).unwrap();
        assert_eq!(Leases::look(&data), Leases::default(), "it asks for a job and has none yet");
        lease.name(JobId::from_raw(7)).unwrap();
        assert_eq!(Leases::look(&data), Leases { dead: vec![], wanted: [JobId::from_raw(7)].into() });

        // As if the process had died: the lock goes, the file stays.
        let kept = data.leases().join("2-b.lease");
        fs::copy(&lease.path, &kept).unwrap();
        let dead = Dead { path: kept, spec: Some(spec("make")), job: Some(JobId::from_raw(7)) };
        let mut found = Leases::look(&data).dead;
        assert_eq!(found, [dead]);
        found.remove(0).forget();
        drop(lease);
        assert_eq!(Leases::look(&data), Leases::default());
        assert_eq!(fs::read_dir(data.leases()).unwrap().count(), 0);
    }

    #[test]
    fn a_dead_commands_job_is_found_even_if_it_died_before_it_had_the_answer() {
        let (one, two, three) = (JobId::from_raw(1), JobId::from_raw(2), JobId::from_raw(3));
        let (make, test) = (spec("make"), spec("test"));
        let live = [(one, &make), (two, &make), (three, &test)];
        let dead = |spec: Option<&JobSpec>, job| Dead { path: PathBuf::new(), spec: spec.cloned(), job };
        let wanted = BTreeSet::from([one]);
        for (lease, found) in [
            (dead(Some(&make), Some(three)), Some(three)),
            (dead(Some(&make), Some(JobId::from_raw(9))), None),
            (dead(Some(&make), None), Some(two)),
            (dead(Some(&spec("other")), None), None),
            (dead(None, None), None),
        ] {
            assert_eq!(lease.job_of(&live, &wanted), found, "{lease:?}");
        }
    }
}
