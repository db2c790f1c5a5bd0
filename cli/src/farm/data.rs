//! S: the data directory of a farm on this machine: who runs it, at which address, and how to be let in.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use alloy_shared::secret::Secret;
use alloy_shared::wire::PROTOCOL;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::context::check_token;
use crate::output::{Failure, Fault};

/// The orchestrator's own lock: it is held as long as the farm runs, and dies with the process.
const LOCK: &str = "farm.lock";
const NOTE: &str = "farm.json";
/// The first admin's token, written by the orchestrator at its first start.
const TOKEN: &str = "admin.token";

/// `ALLOY_DATA_DIR`.
#[derive(Debug, Clone)]
pub(crate) struct DataDir(PathBuf);

/// `farm/farm.json`: what the host of a farm tells the other commands of this user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Note {
    pub(crate) url: String,
    pub(crate) pid: u32,
    pub(crate) version: String,
    pub(crate) protocol_min: u32,
    pub(crate) protocol_max: u32,
}

/// What the holder of the lock is, by the name of its program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Holder {
    /// It writes no note, and nobody need wait for one.
    Orchestrator,
    /// Another command of this program, without its arguments: there may be secrets in them. One that only looks into the
    /// farm writes no note either.
    Alloy { command: String },
    /// Not to be found out.
    Unknown,
}

impl Holder {
    pub(crate) fn of(pid: u32) -> Self {
        let ps = |what: &str| {
            let out = std::process::Command::new("ps").args(["-o", what, "-p", &pid.to_string()]).output().ok()?;
            Some(String::from_utf8_lossy(&out.stdout).trim().to_owned()).filter(|told| !told.is_empty())
        };
        let Some(program) = ps("comm=") else { return Self::Unknown };
        Self::named(&program, || ps("args="))
    }

    fn named(program: &str, line: impl FnOnce() -> Option<String>) -> Self {
        match program.rsplit('/').next() {
            Some("orchestrator") => Self::Orchestrator,
            Some("alloy") => {
                let line = line().unwrap_or_default();
                let verb = line.split_whitespace().nth(1).filter(|word| word.bytes().all(|c| c.is_ascii_lowercase()));
                Self::Alloy { command: verb.map_or_else(|| "alloy".to_owned(), |verb| format!("alloy {verb}")) }
            }
            Some(_) | None => Self::Unknown,
        }
    }
}

/// Whether somebody runs the farm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lock {
    Free,
    Taken { pid: Option<u32> },
}

impl DataDir {
    pub(crate) fn new(root: &Path) -> Self {
        Self(root.to_owned())
    }

    pub(crate) fn farm(&self) -> PathBuf {
        self.0.join("farm")
    }

    #[cfg(feature = "farm")]
    pub(crate) fn root(&self) -> &Path {
        &self.0
    }

    /// One file for each command that wants a job of this farm.
    pub(crate) fn leases(&self) -> PathBuf {
        self.farm().join("leases")
    }

    /// Of the worker inside this farm. The one that `alloy worker join` made belongs to another farm and keeps its own.
    #[cfg(feature = "farm")]
    pub(crate) fn worker(&self) -> PathBuf {
        self.farm().join("worker")
    }

    #[cfg(feature = "farm")]
    pub(crate) fn write_note(&self, note: &Note) -> Result<(), Failure> {
        let text = serde_json::to_vec(note).map_err(|error| Failure::error(format!("{NOTE}: {error}")))?;
        crate::context::write_private(&self.farm().join(NOTE), &text)
    }

    /// A note that stays is harmless: it is believed only while its process holds the lock.
    #[cfg(feature = "farm")]
    pub(crate) fn remove_note(&self) {
        let _ = fs::remove_file(self.farm().join(NOTE));
    }

    /// Looks, and leaves the lock as it was.
    pub(crate) fn lock(&self) -> Result<Lock, Failure> {
        let path = self.farm().join(LOCK);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Lock::Free),
            Err(error) => return Err(Failure::io(&path.display().to_string(), &error)),
        };
        // A shared lock conflicts with the orchestrator's and not with another one who looks.
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(_looked) => Ok(Lock::Free),
            Err((_, Errno::EWOULDBLOCK)) => {
                let pid = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
                Ok(Lock::Taken { pid })
            }
            Err((_, errno)) => Err(Failure::io(&path.display().to_string(), &errno.into())),
        }
    }

    /// The note of the process that holds the lock; one that a dead process left is none.
    pub(crate) fn note(&self, holder: Option<u32>) -> Option<Note> {
        let text = fs::read_to_string(self.farm().join(NOTE)).ok()?;
        let note: Note = serde_json::from_str(&text).ok()?;
        (holder.is_none() || holder == Some(note.pid)).then_some(note)
    }

    /// Where the token of the farm's first administrator lies.
    pub(crate) fn token_file(&self) -> PathBuf {
        self.farm().join(TOKEN)
    }

    pub(crate) fn token(&self) -> Result<Secret<String>, Failure> {
        let path = self.token_file();
        let shown = path.display().to_string();
        let text = fs::read_to_string(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => no_token(&shown),
            _ => Failure::io(&shown, &error),
        })?;
        check_token(&text, &shown)
    }
}

/// A farm writes one administrator's token, where it first starts. One that orchestrators share may have started elsewhere.
fn no_token(file: &str) -> Failure {
    let why = format!("this farm has an administrator's token already, and it is not in {file}");
    Failure::new(Fault::Unauthenticated, why).hint(
        "copy farm/admin.token there from the data directory that the farm was first started with\n\
         or write another into it: where an admin is signed in, alloy token create NAME --role admin   prints one",
    )
}

impl Note {
    /// A newer `alloy` meets the farm of an older one: better a sentence than a guess.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        if self.protocol_min > *PROTOCOL.end() || self.protocol_max < *PROTOCOL.start() {
            return Err(Failure::error(format!(
                "the farm on this machine is of version {}, this alloy of version {}: they do not understand each other",
                self.version,
                env!("CARGO_PKG_VERSION")
            ))
            .hint(format!("restart `alloy up` (process {})", self.pid)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(pid: u32) -> Note {
        Note { url: "http://127.0.0.1:4711".into(), pid, version: "0.1.0".into(), protocol_min: 1, protocol_max: 1 }
    }

    #[test]
    fn a_lock_is_seen_and_a_dead_hosts_note_is_not() {
        let root = tempfile::tempdir().unwrap();
        let data = DataDir::new(root.path());
        assert_eq!(data.lock().unwrap(), Lock::Free);
        fs::create_dir_all(data.farm()).unwrap();
        fs::write(data.farm().join(LOCK), "41\n").unwrap();
        fs::write(data.farm().join(NOTE), serde_json::to_vec(&note(41)).unwrap()).unwrap();
        assert_eq!(data.lock().unwrap(), Lock::Free);
        let held = File::options().read(true).write(true).open(data.farm().join(LOCK)).unwrap();
        let held = Flock::lock(held, FlockArg::LockExclusiveNonblock).unwrap();
        assert_eq!(data.lock().unwrap(), Lock::Taken { pid: Some(41) });
        assert_eq!(data.note(Some(41)), Some(note(41)));
        assert_eq!(data.note(Some(42)), None);
        drop(held);
        assert_eq!(data.lock().unwrap(), Lock::Free);
    }

    #[test]
    fn the_holder_of_the_lock_is_known_by_its_program() {
        let named = |program: &str, line: &str| Holder::named(program, || Some(line.to_owned()));
        for (line, command) in [
            ("/opt/bin/alloy logs --local job_x", "alloy logs"),
            ("alloy run --env TOKEN=hush", "alloy run"),
            ("alloy --local list", "alloy"),
            ("alloy", "alloy"),
        ] {
            assert_eq!(named("alloy", line), Holder::Alloy { command: command.into() }, "{line}");
        }
        assert_eq!(named("/opt/bin/alloy", "alloy logs"), Holder::Alloy { command: "alloy logs".into() });
        assert_eq!(named("/opt/bin/orchestrator", "orchestrator"), Holder::Orchestrator);
        assert_eq!(named("bash", "bash"), Holder::Unknown);
        assert_eq!(Holder::of(std::process::id()), Holder::Unknown, "the program of this test has another name");
    }

    #[test]
    fn a_farm_of_another_time_is_named() {
        note(1).check().unwrap();
        let failure = Note { protocol_min: 7, protocol_max: 9, ..note(5) }.check().unwrap_err();
        assert!(failure.hint.unwrap().contains("restart `alloy up` (process 5)"));
    }
}
