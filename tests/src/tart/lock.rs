//! The two families of kernel locks: `flock` on directories and work places, `fcntl` on `config.json`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use nix::libc;

/// Waits without limit, as `tart` does. Works for directories too.
pub(crate) fn exclusive(path: &Path) -> io::Result<Flock<File>> {
    let mut file = File::open(path)?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusive) {
            Ok(held) => return Ok(held),
            Err((back, Errno::EINTR)) => file = back,
            Err((_, error)) => return Err(error.into()),
        }
    }
}

/// Nothing if somebody else holds it.
pub(crate) fn try_exclusive(path: &Path) -> io::Result<Option<Flock<File>>> {
    match Flock::lock(File::open(path)?, FlockArg::LockExclusiveNonblock) {
        Ok(held) => Ok(Some(held)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(error.into()),
    }
}

/// A file that exists only to be locked.
pub(crate) fn exclusive_file(path: &Path) -> io::Result<Flock<File>> {
    OpenOptions::new().create(true).append(true).open(path)?;
    exclusive(path)
}

/// The record lock of a VM that runs. It goes when this process closes any descriptor of that file, so nobody here opens it
/// again while it is held.
#[derive(Debug)]
pub(crate) struct RunLock {
    _file: File,
}

impl RunLock {
    /// Nothing if another process holds it.
    pub(crate) fn take(config: &Path) -> io::Result<Option<RunLock>> {
        let file = OpenOptions::new().read(true).write(true).open(config)?;
        match fcntl(&file, FcntlArg::F_SETLK(&write_lock())) {
            Ok(_) => Ok(Some(RunLock { _file: file })),
            Err(Errno::EACCES | Errno::EAGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// The process that holds the record lock.
pub(crate) fn holder(config: impl AsFd) -> io::Result<Option<i32>> {
    let mut found = write_lock();
    fcntl(config, FcntlArg::F_GETLK(&mut found))?;
    Ok((found.l_type != libc::F_UNLCK as libc::c_short).then_some(found.l_pid))
}

fn write_lock() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}
