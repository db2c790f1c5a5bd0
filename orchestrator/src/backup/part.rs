//! S: what a backup writes to until all of it is there. One process does so at a time, and it leaves none behind that has failed.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::future::Future;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use tokio_util::sync::CancellationToken;

use super::{BackupError, Taken, at, beside, parent, settle};
use crate::blobs::{off_thread, sync_dir};

const LOCK: &str = "backup.lock";

pub(super) struct Part {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Part {
    /// Makes the directory empty, whatever a backup left there that was cut off.
    pub(super) fn begin(target: &Path) -> Result<Self, BackupError> {
        let path = beside(target, ".partial");
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(BackupError::Nowhere(parent(&path).to_owned()));
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if !left_by_one(&path).map_err(at(&path))? {
                    return Err(BackupError::Foreign(path));
                }
            }
            made => made.map_err(at(&path))?,
        }
        let file = path.join(LOCK);
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&file);
        let lock = Flock::lock(open.map_err(at(&file))?, FlockArg::LockExclusiveNonblock);
        let part = Self { _lock: lock.map_err(|_| BackupError::Busy(path.clone()))?, path };
        part.empty()?;
        Ok(part)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives what is complete its name, and removes what is not.
    pub(super) async fn end(self, target: &Path, taken: Result<Taken, BackupError>) -> Result<Taken, BackupError> {
        let target = target.to_owned();
        off_thread(move || match taken {
            Ok(taken) => self.publish(&target).map(|()| taken),
            Err(why) => Err(self.discard(why)),
        })
        .await
    }

    fn publish(self, target: &Path) -> Result<(), BackupError> {
        let settled = settle(&self.path).map_err(at(&self.path));
        if let Err(why) = settled.and_then(|()| fs::rename(&self.path, target).map_err(at(target))) {
            return Err(self.discard(why));
        }
        // Under this name nobody else writes to it.
        fs::remove_file(target.join(LOCK)).map_err(at(target))?;
        sync_dir(parent(target)).map_err(at(target))
    }

    /// A farm that has run out of disk shall get it back, and not wait for the next backup to do so.
    fn discard(self, why: BackupError) -> BackupError {
        // What was dropped in the middle may have made one more file meanwhile.
        match self.empty().or_else(|_| self.empty()).and_then(|()| self.remove()) {
            Ok(()) => why,
            Err(left) => BackupError::Left { path: self.path, why: Box::new(why), left: Box::new(left) },
        }
    }

    fn empty(&self) -> Result<(), BackupError> {
        for left in fs::read_dir(&self.path).map_err(at(&self.path))? {
            let left = left.map_err(at(&self.path))?;
            let (path, kind) = (left.path(), left.file_type());
            if left.file_name() == LOCK {
                continue;
            }
            let is_dir = kind.map_err(at(&path))?.is_dir();
            if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }.map_err(at(&path))?;
        }
        Ok(())
    }

    fn remove(&self) -> Result<(), BackupError> {
        let lock = self.path.join(LOCK);
        fs::remove_file(&lock).map_err(at(&lock))?;
        fs::remove_dir(&self.path).map_err(|error| {
            // With it the next backup knows what this is.
            let _ = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&lock);
            at(&self.path)(error)
        })
    }
}

/// Whether a backup that was cut off has made this. What is somebody's own is not emptied, and where others may look or write, no
/// secrets go, unless the file system knows no such thing.
fn left_by_one(path: &Path) -> io::Result<bool> {
    let meta = fs::symlink_metadata(path)?;
    if !meta.is_dir() || meta.uid() != nix::unistd::geteuid().as_raw() {
        return Ok(false);
    }
    let locked = fs::symlink_metadata(path.join(LOCK)).is_ok_and(|lock| lock.is_file());
    if locked {
        fs::set_permissions(path, Permissions::from_mode(0o700))?;
        return Ok(true);
    }
    Ok(meta.mode() & 0o777 == 0o700 && fs::read_dir(path)?.next().is_none())
}

/// Does some work that a wish to stop may drop.
pub(super) async fn unless_stopped<T>(
    stop: &CancellationToken,
    work: impl Future<Output = Result<T, BackupError>>,
) -> Result<T, BackupError> {
    tokio::select! {
        biased;
        () = stop.cancelled() => Err(BackupError::Stopped),
        done = work => done,
    }
}
