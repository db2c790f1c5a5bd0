//! S: a farm from its backup, in a place where there is none. Whole or not at all, every byte checked.
//!
//! The farm that was lost may have given out jobs after the backup was taken, and its workers may still run them. They let go
//! of them when they have not heard from it for as long as a lease lasts. So the first start waits for the rest of that time
//! from the restore on: [`wait`].

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use alloy_shared::env::{Env, Ms};
use alloy_shared::limits::Limits;
use alloy_shared::runtime::Lifecycle;

use super::list::{self, Head, ListError};
use super::{BackupError, DATABASE, at, beside, copy, make_dir, parent, settle};
use crate::blobs::{off_thread, sync_dir};
use crate::store::sql::backup::{examine, schema};
use crate::store::sql::{DataLock, LockError};

/// Tells a start that this farm was restored, and when.
const MARK: &str = "restored";
const FARM_LOCK: &str = "farm.lock";
/// What a restore writes to until all of it is there.
const PART: &str = ".restoring";

/// Why no farm begins where a restore has not come to its end. The text is for people.
#[derive(Debug, thiserror::Error)]
#[error(
    "a restore has not come to its end here: run `alloy admin restore` again, or remove {} to begin with an empty farm",
    .0.display()
)]
pub struct Unfinished(PathBuf);

/// Refuses to begin a farm that the next restore would find in its place.
pub(crate) fn check(farm: &Path) -> Result<(), Unfinished> {
    let part = beside(&place(farm), PART);
    let begins = !farm.join(DATABASE).exists();
    if begins && part.exists() { Err(Unfinished(part)) } else { Ok(()) }
}

/// Where a farm is. A link to it cannot be replaced by a directory, and what lies beside the link is on another disk perhaps.
fn place(farm: &Path) -> PathBuf {
    farm.canonicalize().unwrap_or_else(|_| farm.to_owned())
}

#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("{} is no backup that can be restored: {error}", dir.display())]
    List { dir: PathBuf, error: ListError },
    #[error("the backup is damaged: {path} {why}")]
    Damaged { path: String, why: &'static str },
    #[error("{} holds a farm already; restore into another data directory, or move that one away", .0.display())]
    Occupied(PathBuf),
    #[error(
        "{} is the top of a disk, and a restore gives the farm its name when all of it is there: unmount it and mount it as the data \
         directory itself, or put a link in its place that leads to a directory on that disk",
        .0.display()
    )]
    Mounted(PathBuf),
    #[error(transparent)]
    Live(#[from] LockError),
    #[error(transparent)]
    Other(#[from] BackupError),
}

/// What was restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    pub head: Head,
    pub files: usize,
    pub bytes: u64,
}

/// Makes the farm in `farm`, where there must be none. Whoever ran the farm of the backup must not run it any more.
pub async fn restore(backup: &Path, farm: &Path, now: Ms) -> Result<Restored, RestoreError> {
    let listed = list::read(backup, schema());
    let (head, entries) = listed.map_err(|error| RestoreError::List { dir: backup.to_owned(), error })?;
    let lock = vacant(farm)?;
    let farm = place(farm);
    if mounted(&farm).map_err(at(&farm))? {
        return Err(RestoreError::Mounted(farm));
    }
    let part = beside(&farm, PART);
    let (from, to, whole) = (backup.to_owned(), part.clone(), entries.clone());
    off_thread(move || {
        if to.exists() {
            fs::remove_dir_all(&to).map_err(at(&to))?;
        }
        make_dir(&to).map_err(at(&to))?;
        whole.iter().try_for_each(|entry| checked(&from, &to, entry))
    })
    .await?;
    examine(&part.join(DATABASE)).await.map_err(BackupError::from)?;
    off_thread(move || {
        fs::write(part.join(MARK), now.0.to_string()).map_err(at(&part))?;
        settle(&part).map_err(at(&part))?;
        // Whoever takes the lock from here on finds the farm whole, or makes the renaming fail.
        fs::remove_file(farm.join(FARM_LOCK)).map_err(at(&farm))?;
        fs::rename(&part, &farm).map_err(at(&farm))?;
        drop(lock);
        sync_dir(parent(&farm)).map_err(at(&farm))
    })
    .await?;
    Ok(Restored { head, files: entries.len(), bytes: entries.iter().map(|entry| entry.size).sum() })
}

fn checked(from: &Path, to: &Path, entry: &list::Entry) -> Result<(), RestoreError> {
    let (source, target) = (from.join(&entry.path), to.join(&entry.path));
    let damaged = |why| RestoreError::Damaged { path: entry.path.clone(), why };
    if !source.is_file() {
        return Err(damaged("is not there"));
    }
    make_dir(parent(&target)).map_err(at(&target))?;
    let (size, sha256) = copy(&source, &target, None).map_err(at(&source))?;
    if size != entry.size {
        return Err(damaged("has another length"));
    }
    if sha256 != entry.sha256 { Err(damaged("has other bytes")) } else { Ok(()) }
}

/// Takes the place of a farm, which nobody uses and where nothing lies.
fn vacant(farm: &Path) -> Result<DataLock, RestoreError> {
    let occupied = || RestoreError::Occupied(farm.to_owned());
    if farm.join(DATABASE).exists() {
        // Told before the lock is tried: the farm that runs here is the reason, not its process.
        let _live = DataLock::acquire(farm)?;
        return Err(occupied());
    }
    let lock = DataLock::acquire(farm)?;
    for left in fs::read_dir(farm).map_err(at(farm))? {
        if left.map_err(at(farm))?.file_name() != FARM_LOCK {
            return Err(occupied());
        }
    }
    Ok(lock)
}

/// Nothing is renamed to such a directory.
fn mounted(farm: &Path) -> io::Result<bool> {
    Ok(fs::metadata(farm)?.dev() != fs::metadata(parent(farm))?.dev())
}

/// Whether a farm that starts was restored since its last start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Past {
    Own,
    /// No worker runs anything of it any more.
    Restored,
    /// It was told to stop before that was sure.
    Stopped,
}

/// Waits after a restore until no worker runs anything that the farm of old gave it.
pub(crate) async fn wait(farm: &Path, limits: &Limits, env: &dyn Env, life: &Lifecycle) -> io::Result<Past> {
    let text = match fs::read_to_string(farm.join(MARK)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Past::Own),
        read => read?,
    };
    Ok(wait_since(&text, limits, env, life).await)
}

/// The same after a restore at this time.
pub(crate) async fn wait_since(text: &str, limits: &Limits, env: &dyn Env, life: &Lifecycle) -> Past {
    let lease_ms = limits.expiry_ms;
    let since = text.trim().parse().map_or(0, |at| env.now().wall.since(Ms(at)));
    let left_ms = lease_ms.saturating_sub(since);
    if left_ms > 0 {
        tracing::info!(
            "restored from a backup: waiting {} s until every worker has let go of what it runs for the farm of old",
            left_ms.div_ceil(1_000)
        );
        tokio::select! {
            biased;
            () = life.soft.cancelled() => return Past::Stopped,
            () = env.sleep_until(env.now().mono + left_ms) => {}
        }
    }
    Past::Restored
}

/// From here on it is a farm like any other.
pub(crate) fn forget(farm: &Path) -> io::Result<()> {
    fs::remove_file(farm.join(MARK))?;
    sync_dir(farm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_top_of_a_disk_is_told_from_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let farm = dir.path().join("farm");
        fs::create_dir(&farm).unwrap();
        assert!(!mounted(&farm).unwrap());
        assert!(mounted(Path::new("/dev")).unwrap(), "on every system that has one");
    }

    #[test]
    fn a_restore_that_was_cut_off_is_seen_behind_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let (link, big) = (dir.path().join("farm"), dir.path().join("big"));
        fs::create_dir_all(big.join("farm")).unwrap();
        std::os::unix::fs::symlink(big.join("farm"), &link).unwrap();
        check(&link).unwrap();
        fs::create_dir(big.join("farm.restoring")).unwrap();
        check(&link).unwrap_err();
    }
}
