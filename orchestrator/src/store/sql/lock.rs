//! S: one orchestrator per data directory.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// Held while the farm in a directory runs. The system lets go of it when the process ends, however it ends.
#[derive(Debug)]
pub struct DataLock {
    _file: Flock<File>,
}

#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it; its number, if it has written it down already.
    #[error("{} is in use by another orchestrator{}; stop it first, or choose another data directory", dir.display(), by(*pid))]
    Taken { dir: PathBuf, pid: Option<u32> },
    #[error("{} is no directory and cannot be made one: {error}", dir.display())]
    NoDirectory { dir: PathBuf, error: io::Error },
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
}

fn by(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

/// Looks are over in far less, all tries together take 100 ms.
const TRIES: u32 = 11;
const PAUSE: Duration = Duration::from_millis(10);

impl DataLock {
    /// Makes the directory if it is not there, and takes `farm.lock` in it.
    pub fn acquire(dir: &Path) -> Result<Self, LockError> {
        Self::acquire_after(dir, || std::thread::sleep(PAUSE))
    }

    /// Waits between two tries for those who only look: they share the lock for a moment.
    fn acquire_after(dir: &Path, mut pause: impl FnMut()) -> Result<Self, LockError> {
        let path = dir.join("farm.lock");
        let failed = |error| LockError::Io { path: path.clone(), error };
        let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|error| LockError::NoDirectory { dir: dir.to_owned(), error })?;
        let mut tries = 1;
        loop {
            let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
            match Flock::lock(open.map_err(failed)?, FlockArg::LockExclusiveNonblock) {
                Ok(mut file) => {
                    file.set_len(0).and_then(|()| file.rewind()).map_err(failed)?;
                    writeln!(file, "{}", std::process::id()).map_err(failed)?;
                    return Ok(Self { _file: file });
                }
                Err((file, Errno::EWOULDBLOCK)) => match Flock::lock(file, FlockArg::LockSharedNonblock) {
                    Ok(shared) if tries < TRIES => {
                        drop(shared);
                        tries += 1;
                        pause();
                    }
                    Ok(shared) => return Err(taken(dir, &shared)),
                    Err((file, _)) => return Err(taken(dir, &file)),
                },
                Err((_, errno)) => return Err(failed(errno.into())),
            }
        }
    }
}

fn taken(dir: &Path, mut file: &File) -> LockError {
    let mut text = String::new();
    // Only for the message: a number that cannot be read is left out.
    let read = file.read_to_string(&mut text);
    LockError::Taken { dir: dir.to_owned(), pid: read.ok().and_then(|_| text.trim().parse().ok()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_one_is_told_who_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("a/farm");
        let first = DataLock::acquire(&data).unwrap();
        let second = DataLock::acquire(&data).unwrap_err();
        assert!(matches!(&second, LockError::Taken { pid, .. } if *pid == Some(std::process::id())), "{second:?}");
        assert!(second.to_string().contains(&format!("process {}", std::process::id())));
        drop(first);
        DataLock::acquire(&data).unwrap();
    }

    #[test]
    fn who_only_looks_does_not_keep_a_farm_from_starting() {
        let dir = tempfile::tempdir().unwrap();
        drop(DataLock::acquire(dir.path()).unwrap());
        let file = File::open(dir.path().join("farm.lock")).unwrap();
        let mut looking = Some(Flock::lock(file, FlockArg::LockSharedNonblock).unwrap());
        DataLock::acquire_after(dir.path(), || drop(looking.take())).unwrap();
        assert!(looking.is_none());
    }
}
