//! S: files that one process of this machine holds at a time. Whoever dies lets go.
//!
//! Some lie in a directory that every user of this machine may write to: what lies there under a lock's name is looked at
//! before a byte of it is changed. Nobody's link leads out of it.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use alloy_shared::limits::{LOCK_PAUSE_MS, LOCK_TRIES};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, Flock, FlockArg, OFlag, open, openat};
use nix::sys::signal::kill;
use nix::sys::stat::{Mode, fstatat};
use nix::unistd::{Pid, Uid, UnlinkatFlags, unlinkat};
use rustix::fs::RenameFlags;

/// All users may make files there, and remove their own.
const SHARED_DIR: u32 = 0o1777;
/// All users may take the lock and write down that it is theirs.
const SHARED_FILE: u32 = 0o666;
const STICKY: u32 = 0o1000;
const OTHERS_WRITE: u32 = 0o022;
/// A process number and its line's end.
const NOTE_MAX: u64 = 32;

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

impl From<Errno> for NotTaken {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// Takes the lock and writes down whose it is. A process that was killed leaves its locks for a moment to a child that it
/// was about to start: that moment is waited for, and the thread with it.
pub(crate) fn take(path: &Path) -> Result<Held, NotTaken> {
    for _ in 0..LOCK_TRIES {
        match take_now(path) {
            Err(NotTaken::Taken { pid: Some(pid) }) if !is_alive(pid) => {
                std::thread::sleep(Duration::from_millis(LOCK_PAUSE_MS));
            }
            done => return done,
        }
    }
    take_now(path)
}

/// The same without a wait.
fn take_now(path: &Path) -> Result<Held, NotTaken> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::EINVAL.into());
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let dir = open(parent, DIR, Mode::empty())?;
    hold(&dir, Path::new(name), openat(&dir, name, FILE | OFlag::O_CREAT, Mode::S_IRUSR | Mode::S_IWUSR)?)
}

/// Takes one of `count` places in a directory that all users of this machine share. One that cannot be had, whatever lies
/// there, leaves the others.
pub(crate) fn take_place(dir: &Path, count: usize) -> Result<Held, NotTaken> {
    let dir = shared_dir(dir)?;
    let (mut taken, mut broken) = (None, None);
    for place in 0..count {
        match take_place_now(&dir, Path::new(&format!("vm-{place}.lock"))) {
            Ok(held) => return Ok(held),
            // The other worker's number says more than our own.
            Err(NotTaken::Taken { pid }) if taken.is_none_or(|known| known == Some(own_pid())) => taken = Some(pid),
            Err(NotTaken::Taken { .. }) => {}
            Err(NotTaken::Io(error)) => {
                tracing::warn!(place, %error, "a place for a VM cannot be had; see `worker doctor`");
                broken = Some(error);
            }
        }
    }
    match (taken, broken) {
        (None, Some(error)) => Err(NotTaken::Io(error)),
        (pid, _) => Err(NotTaken::Taken { pid: pid.flatten() }),
    }
}

const DIR: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);
/// No link is followed, and no pipe waited for.
const FILE: OFlag = OFlag::O_RDWR.union(OFlag::O_NOFOLLOW).union(OFlag::O_NONBLOCK).union(OFlag::O_CLOEXEC);

fn take_place_now(dir: &OwnedFd, name: &Path) -> Result<Held, NotTaken> {
    let file = match openat(dir, name, FILE, Mode::empty()) {
        Err(Errno::ENOENT) => {
            make_file(dir, name)?;
            openat(dir, name, FILE, Mode::empty())?
        }
        file => file?,
    };
    let held = hold(dir, name, file)?;
    let meta = held.metadata()?;
    if meta.uid() == Uid::effective().as_raw() && meta.mode() & 0o777 != SHARED_FILE {
        held.set_permissions(Permissions::from_mode(SHARED_FILE))?;
    }
    Ok(held)
}

/// Locks a file that was opened by this name, if it is nothing but that, and writes down whose it is.
fn hold(dir: &OwnedFd, name: &Path, file: OwnedFd) -> Result<Held, NotTaken> {
    let file = File::from(file);
    check_file(dir, name, &file)?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut held) => {
            // Between opening and locking it somebody may have put another one there.
            check_file(dir, name, &held)?;
            held.set_len(0)?;
            held.rewind()?;
            writeln!(held, "{}", std::process::id())?;
            Ok(held)
        }
        Err((file, Errno::EWOULDBLOCK)) => {
            let mut note = String::new();
            let read = file.take(NOTE_MAX).read_to_string(&mut note);
            Err(NotTaken::Taken { pid: read.ok().and_then(|_| note.trim().parse().ok()) })
        }
        Err((_, errno)) => Err(errno.into()),
    }
}

/// A file that has another name is somebody's, and may hold something: it is not written to.
fn check_file(dir: &OwnedFd, name: &Path, file: &File) -> io::Result<()> {
    let meta = file.metadata()?;
    let named = fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    let is_same = (named.st_ino as u64, named.st_dev as u64) == (meta.ino(), meta.dev());
    // Of the name: a file's count may fall as soon as it is open.
    match meta.is_file() && is_same && named.st_nlink as u64 == 1 {
        true => Ok(()),
        false => Err(io::Error::other(format!("{} is no file of its own", name.display()))),
    }
}

/// Makes a file that every user may take, all at once: whoever is killed meanwhile leaves none that others cannot use.
fn make_file(dir: &OwnedFd, name: &Path) -> io::Result<()> {
    let new = fresh(name);
    let flags = FILE | OFlag::O_CREAT | OFlag::O_EXCL;
    let file = File::from(openat(dir, &new, flags, Mode::S_IRUSR | Mode::S_IWUSR)?);
    let made = file.set_permissions(Permissions::from_mode(SHARED_FILE)).and_then(|()| put(dir, &new, dir, name));
    if !matches!(made, Ok(true)) {
        let _nobody_misses_it = unlinkat(dir, &new, UnlinkatFlags::NoRemoveDir);
    }
    made.map(drop)
}

/// Gives what is complete its name; false if somebody was faster.
fn put(from_dir: impl AsFd, from: &Path, to_dir: impl AsFd, to: &Path) -> io::Result<bool> {
    match rustix::fs::renameat_with(from_dir, from, to_dir, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::EXIST) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Opens the directory of the places, and makes it where it is missing.
fn shared_dir(path: &Path) -> Result<OwnedFd, NotTaken> {
    let dir = match open(path, DIR | OFlag::O_NOFOLLOW, Mode::empty()) {
        Err(Errno::ENOENT) => {
            make_dir(path)?;
            open(path, DIR | OFlag::O_NOFOLLOW, Mode::empty())?
        }
        dir => dir?,
    };
    let meta = File::from(dir.try_clone()?).metadata()?;
    judge_dir(meta.is_dir(), meta.uid(), meta.mode(), Uid::effective().as_raw()).map_err(io::Error::other)?;
    Ok(dir)
}

fn make_dir(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Err(Errno::EINVAL.into()) };
    DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
    let new = parent.join(fresh(Path::new(name)));
    DirBuilder::new().mode(0o700).create(&new)?;
    let at = rustix::fs::CWD;
    let made = fs::set_permissions(&new, Permissions::from_mode(SHARED_DIR)).and_then(|()| put(at, &new, at, path));
    if !matches!(made, Ok(true)) {
        let _nobody_misses_it = fs::remove_dir(&new);
    }
    made.map(drop)
}

/// Where others may write, they must not be able to take away what is ours. The owner of such a directory could, which
/// costs places and nothing else.
fn judge_dir(is_dir: bool, owner: u32, mode: u32, me: u32) -> Result<(), &'static str> {
    let (others, sticky) = (mode & OTHERS_WRITE != 0, mode & STICKY != 0);
    match (is_dir, others, sticky) {
        (false, _, _) => Err("it is no directory"),
        (true, true, false) => Err("everybody may remove what others put there: its mode must be 1777"),
        (true, true, true) => Ok(()),
        (true, false, _) if owner == 0 || owner == me => Ok(()),
        (true, false, _) => Err("it is another user's own: its mode must be 1777"),
    }
}

/// A name that nobody else uses, beside this one.
fn fresh(name: &Path) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    PathBuf::from(format!(".{}.{}.{count}", name.display(), std::process::id()))
}

pub(crate) fn is_alive(pid: i32) -> bool {
    kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH)
}

pub(crate) fn own_pid() -> i32 {
    Pid::this().as_raw()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_ours<T>(taken: &Result<T, NotTaken>) -> bool {
        matches!(taken, Err(NotTaken::Taken { pid }) if *pid == Some(own_pid()))
    }

    #[test]
    fn what_is_held_names_its_holder_until_it_is_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = take(&path).unwrap();
        assert!(is_ours(&take(&path)));
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
        assert!(is_ours(&take_place(&shared, 2)));
        drop(first);
        let again = take_place(&shared, 2).unwrap();
        assert_eq!(again.metadata().unwrap().permissions().mode() & 0o777, 0o666);
        assert_eq!(fs::metadata(&shared).unwrap().permissions().mode() & 0o7777, 0o1777);
        assert_eq!(fs::read_dir(&shared).unwrap().count(), 2, "and nothing half made");
        assert_eq!(fs::read_dir(dir.path().join("farm")).unwrap().count(), 1);
    }

    #[test]
    fn nobodys_link_leads_out_of_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let (shared, victim) = (dir.path().join("host"), dir.path().join("profile"));
        drop(take_place(&shared, 1).unwrap());
        fs::write(&victim, "words").unwrap();
        fs::set_permissions(&victim, Permissions::from_mode(0o600)).unwrap();
        let place = shared.join("vm-0.lock");
        let links: [fn(&Path, &Path) -> io::Result<()>; 2] =
            [|to, at| std::os::unix::fs::symlink(to, at), |to, at| fs::hard_link(to, at)];
        for link in links {
            fs::remove_file(&place).unwrap();
            link(&victim, &place).unwrap();
            assert!(matches!(take_place(&shared, 1), Err(NotTaken::Io(_))));
            assert!(matches!(take(&place), Err(NotTaken::Io(_))));
            // The other place is as good.
            drop(take_place(&shared, 2).unwrap());
        }
        assert_eq!(fs::read_to_string(&victim).unwrap(), "words");
        assert_eq!(fs::metadata(&victim).unwrap().mode() & 0o777, 0o600);
        // Nor does the directory's own name.
        let led = dir.path().join("led");
        std::os::unix::fs::symlink(&shared, &led).unwrap();
        assert!(matches!(take_place(&led, 2), Err(NotTaken::Io(_))));
    }

    #[test]
    fn a_place_that_an_earlier_run_left_closed_is_opened_for_others() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("vm-0.lock");
        fs::write(&place, "1234567\n").unwrap();
        fs::set_permissions(&place, Permissions::from_mode(0o600)).unwrap();
        let _held = take_place(dir.path(), 1).unwrap();
        assert_eq!(fs::metadata(&place).unwrap().mode() & 0o777, 0o666);
        assert_eq!(fs::read_to_string(&place).unwrap(), format!("{}\n", own_pid()));
    }

    #[test]
    fn a_directory_is_trusted_by_its_owner_and_its_mode() {
        const ME: u32 = 501;
        for (owner, mode, good) in [
            (ME, 0o1777, true),
            (0, 0o1777, true),
            // Another worker's user was the first on this Mac.
            (502, 0o1777, true),
            (ME, 0o755, true),
            (0, 0o755, true),
            (502, 0o755, false),
            (ME, 0o777, false),
            (0, 0o775, false),
        ] {
            assert_eq!(judge_dir(true, owner, mode, ME).is_ok(), good, "{owner} {mode:o}");
        }
        assert!(judge_dir(false, ME, 0o1777, ME).is_err());
    }
}
