//! S: files that one process of this machine holds at a time. Whoever dies lets go.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::kill;
use nix::unistd::Pid;

const TRIES: u32 = 30;
const PAUSE: Duration = Duration::from_millis(100);

/// Held until it is dropped.
pub(crate) type Held = Flock<File>;

#[derive(Debug)]
pub(crate) enum NotTaken {
    /// By the process of this number, if that is known.
    Taken {
        pid: Option<i32>,
    },
    Io(io::Error),
}

impl From<io::Error> for NotTaken {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Takes the lock and writes down whose it is. A process that was killed leaves its locks for a moment to a child that it
/// was about to start: that moment is waited for.
pub(crate) fn take(path: &Path) -> Result<Held, NotTaken> {
    for _ in 0..TRIES {
        match take_now(path) {
            Err(NotTaken::Taken { pid: Some(pid) }) if !is_alive(pid) => std::thread::sleep(PAUSE),
            done => return done,
        }
    }
    take_now(path)
}

/// The same without a wait.
fn take_now(path: &Path) -> Result<Held, NotTaken> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut held) => {
            held.set_len(0)?;
            writeln!(held, "{}", std::process::id())?;
            Ok(held)
        }
        Err((_, Errno::EWOULDBLOCK)) => {
            Err(NotTaken::Taken { pid: fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()) })
        }
        Err((_, errno)) => Err(NotTaken::Io(errno.into())),
    }
}

fn is_alive(pid: i32) -> bool {
    kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH)
}

/// Takes one of `count` places in a directory that all users of this machine share.
pub(crate) fn take_place(dir: &Path, count: usize) -> Result<Held, NotTaken> {
    if !dir.is_dir() {
        DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
        fs::set_permissions(dir, Permissions::from_mode(0o1777))?;
    }
    let mut last = NotTaken::Taken { pid: None };
    for place in 0..count {
        let path = dir.join(format!("vm-{place}.lock"));
        let is_new = !path.exists();
        match take_now(&path) {
            Ok(held) => {
                if is_new {
                    // The next one may be another user's.
                    held.set_permissions(Permissions::from_mode(0o666))?;
                }
                return Ok(held);
            }
            Err(taken @ NotTaken::Taken { .. }) => last = taken,
            Err(error @ NotTaken::Io(_)) => return Err(error),
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own_pid() -> Option<i32> {
        i32::try_from(std::process::id()).ok()
    }

    #[test]
    fn what_is_held_names_its_holder_until_it_is_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = take(&path).unwrap();
        assert!(matches!(take(&path), Err(NotTaken::Taken { pid }) if pid == own_pid()));
        drop(first);
        take(&path).unwrap();
        assert!(matches!(take(&dir.path().join("no/lock")), Err(NotTaken::Io(_))));
    }

    #[test]
    fn there_are_so_many_places_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let shared = dir.path().join("farm/host");
        let first = take_place(&shared, 2).unwrap();
        let _second = take_place(&shared, 2).unwrap();
        assert!(matches!(take_place(&shared, 2), Err(NotTaken::Taken { pid }) if pid == own_pid()));
        drop(first);
        let again = take_place(&shared, 2).unwrap();
        assert_eq!(again.metadata().unwrap().permissions().mode() & 0o777, 0o666);
        assert_eq!(fs::metadata(&shared).unwrap().permissions().mode() & 0o7777, 0o1777);
    }
}
