//! S: a farm's data in a directory of its own, whole or not at all, taken while the farm runs.
//!
//! First the database as it is at one moment, then everything that it can name: objects, which never change, by a hard link
//! where that is possible; logs as far as they are. Last a list of all files with their digests. What was cut off has no list
//! and another name, so nobody takes it for a backup. [`restore`] is the way back.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use alloy_shared::id::Digest;
use nix::fcntl::{Flock, FlockArg};
use sha2::Digest as _;

use crate::blobs::mark::{Elsewhere, compare};
use crate::blobs::{BlobError, OpenS3, off_thread, sync_dir};
use crate::moving::mark::{self, MovedAway};
use crate::store::sql::OpenError;
use crate::store::sql::backup::{Needs, copy_at_once, examine, schema};
use crate::sums::{FOOTER, Seal, Sums};

pub mod elsewhere;
pub mod list;
pub mod restore;

use list::{Entry, Head};

pub const DATABASE: &str = "alloy.db";
pub(crate) const OBJECTS: &str = "blobs/objects";
pub(crate) const LOGS: &str = "logs";
const LOCK: &str = "backup.lock";
/// What is read at once.
const PIECE: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error("there is no farm in {}: it holds no {DATABASE}", .0.display())]
    NoFarm(PathBuf),
    #[error("{} is there already; name a directory that is not", .0.display())]
    Exists(PathBuf),
    /// Where a disk is not mounted, a backup would fill another one.
    #[error("{} is not there: a backup makes its own directory, and none above it", .0.display())]
    Nowhere(PathBuf),
    #[error("another backup is being written to {}", .0.display())]
    Busy(PathBuf),
    #[error(transparent)]
    Moved(#[from] MovedAway),
    #[error(transparent)]
    Place(#[from] Elsewhere),
    #[error("there is no farm in that database, or not a whole one")]
    NoFarmThere,
    #[error(transparent)]
    Objects(#[from] OpenS3),
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error(transparent)]
    Database(#[from] OpenError),
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> BackupError + '_ {
    move |error| BackupError::Io { path: path.to_owned(), error }
}

/// What a backup holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Taken {
    pub files: usize,
    pub bytes: u64,
    /// What the database names and the farm has lost or has damaged. Everything else is in the backup.
    pub missing: Vec<String>,
}

/// Takes a backup of the farm in `farm` into `target`, which must not exist.
pub async fn take(farm: &Path, target: &Path, taken_at: String) -> Result<Taken, BackupError> {
    if !farm.join(DATABASE).is_file() {
        return Err(BackupError::NoFarm(farm.to_owned()));
    }
    mark::check(farm)?;
    // Its books alone would name what the backup does not hold.
    compare(farm, None)?;
    if fs::symlink_metadata(target).is_ok() {
        return Err(BackupError::Exists(target.to_owned()));
    }
    let part = beside(target, ".partial");
    let lock = begin(&part)?;
    copy_at_once(&farm.join(DATABASE), &part.join(DATABASE)).await?;
    let needs = examine(&part.join(DATABASE)).await?;
    let (farm, target) = (farm.to_owned(), target.to_owned());
    off_thread(move || {
        let taken = Copy::new(&farm, &part).all(&needs, taken_at)?;
        publish(&part, &target, lock)?;
        Ok(taken)
    })
    .await
}

/// Gives a backup that is complete its name.
fn publish(part: &Path, target: &Path, lock: Flock<File>) -> Result<(), BackupError> {
    settle(part).map_err(at(part))?;
    fs::rename(part, target).map_err(at(target))?;
    // Under this name nobody else writes to it.
    fs::remove_file(target.join(LOCK)).map_err(at(target))?;
    sync_dir(parent(target)).map_err(at(target))?;
    drop(lock);
    Ok(())
}

/// A sibling of a path.
fn beside(path: &Path, ending: &str) -> PathBuf {
    // Behind a slash at the end it would be a child.
    let mut name = path.components().as_path().as_os_str().to_owned();
    name.push(ending);
    name.into()
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes the directory empty, whatever a backup left there that was cut off. Only one process writes it at a time.
fn begin(part: &Path) -> Result<Flock<File>, BackupError> {
    match DirBuilder::new().mode(0o700).create(part) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(BackupError::Nowhere(parent(part).to_owned()));
        }
        // What is left of one that was cut off.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => made.map_err(at(part))?,
    }
    let path = part.join(LOCK);
    let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
    let lock = Flock::lock(open.map_err(at(&path))?, FlockArg::LockExclusiveNonblock);
    let lock = lock.map_err(|_| BackupError::Busy(part.to_owned()))?;
    for left in fs::read_dir(part).map_err(at(part))? {
        let left = left.map_err(at(part))?;
        let is_dir = left.file_type().map_err(at(part))?.is_dir();
        let path = left.path();
        if left.file_name() == LOCK {
            continue;
        }
        if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }.map_err(at(&path))?;
    }
    Ok(lock)
}

pub(crate) fn make_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

struct Copy<'a> {
    farm: &'a Path,
    part: &'a Path,
    entries: Vec<Entry>,
    missing: Vec<String>,
    /// The backup lies on another file system.
    apart: bool,
}

impl<'a> Copy<'a> {
    fn new(farm: &'a Path, part: &'a Path) -> Self {
        let device = |path: &Path| fs::metadata(path).map(|meta| meta.dev()).ok();
        Self { farm, part, entries: Vec::new(), missing: Vec::new(), apart: device(farm) != device(part) }
    }

    fn all(mut self, needs: &Needs, taken_at: String) -> Result<Taken, BackupError> {
        self.add(DATABASE.to_owned())?;
        self.objects(OBJECTS)?;
        self.logs()?;
        self.finish(needs, taken_at)
    }

    /// What is left to do when database, objects and logs are there.
    fn finish(mut self, needs: &Needs, taken_at: String) -> Result<Taken, BackupError> {
        for name in ["admin.token", "worker/identity.json", "worker/worker.key", "worker/worker.other.key"] {
            if self.farm.join(name).is_file() {
                self.file(name, None)?;
            }
        }
        self.look_for(needs);
        let head = Head::new(schema(), taken_at);
        list::write(self.part, &head, &self.entries).map_err(at(self.part))?;
        let bytes = self.entries.iter().map(|entry| entry.size).sum();
        Ok(Taken { files: self.entries.len(), bytes, missing: self.missing })
    }

    /// Lists what somebody else has put into a directory of the backup.
    fn add_dir(&mut self, dir: &str) -> Result<(), BackupError> {
        let from = self.part.join(dir);
        if !from.is_dir() {
            return Ok(());
        }
        for (name, is_dir) in sorted(&from).map_err(at(&from))? {
            let path = format!("{dir}/{name}");
            if is_dir { self.add_dir(&path)? } else { self.add(path)? }
        }
        Ok(())
    }

    fn add(&mut self, name: String) -> Result<(), BackupError> {
        let path = self.part.join(&name);
        let (size, sha256) = hash(&path).map_err(at(&path))?;
        self.entries.push(Entry { path: name, size, sha256 });
        Ok(())
    }

    /// Every file below a directory of objects.
    fn objects(&mut self, dir: &str) -> Result<(), BackupError> {
        let from = self.farm.join(dir);
        if !from.is_dir() {
            return Ok(());
        }
        for (name, is_dir) in sorted(&from).map_err(at(&from))? {
            let path = format!("{dir}/{name}");
            if is_dir {
                self.objects(&path)?;
            } else {
                self.object(&path)?;
            }
        }
        Ok(())
    }

    fn object(&mut self, name: &str) -> Result<(), BackupError> {
        let from = self.farm.join(name);
        match sound(&from) {
            Ok(Some(_)) => {}
            Ok(None) => {
                self.missing.push(format!("{name} is damaged"));
                return Ok(());
            }
            Err(error) => {
                self.missing.push(format!("{name} cannot be read: {error}"));
                return Ok(());
            }
        }
        let to = self.part.join(name);
        make_dir(parent(&to)).map_err(at(&to))?;
        if !self.apart && fs::hard_link(&from, &to).is_ok() {
            return self.add(name.to_owned());
        }
        self.file(name, None)
    }

    /// A log that is sealed is final. One that is not goes on growing: what it has by now is what counts.
    fn logs(&mut self) -> Result<(), BackupError> {
        let from = self.farm.join(LOGS);
        if !from.is_dir() {
            return Ok(());
        }
        for (job, is_dir) in sorted(&from).map_err(at(&from))? {
            let dir = from.join(&job);
            if !is_dir {
                continue;
            }
            for (name, _) in sorted(&dir).map_err(at(&dir))? {
                let Some(stem) = name.strip_suffix(".log") else { continue };
                // Looked for first: a seal that comes later speaks of bytes that this copy may lack.
                let sealed = dir.join(format!("{stem}.seal")).is_file();
                let log = dir.join(&name);
                let len = fs::metadata(&log).map_err(at(&log))?.len();
                self.file(&format!("{LOGS}/{job}/{name}"), Some(len))?;
                if sealed {
                    self.file(&format!("{LOGS}/{job}/{stem}.seal"), None)?;
                }
            }
        }
        Ok(())
    }

    /// Copies a file, or its first bytes.
    fn file(&mut self, name: &str, len: Option<u64>) -> Result<(), BackupError> {
        let (from, to) = (self.farm.join(name), self.part.join(name));
        make_dir(parent(&to)).map_err(at(&to))?;
        let (size, sha256) = copy(&from, &to, len).map_err(at(&from))?;
        self.entries.push(Entry { path: name.to_owned(), size, sha256 });
        Ok(())
    }

    /// What the database names must be there.
    fn look_for(&mut self, needs: &Needs) {
        let have: HashSet<&str> = self.entries.iter().map(|entry| entry.path.as_str()).collect();
        let lens: std::collections::HashMap<&str, u64> =
            self.entries.iter().map(|entry| (entry.path.as_str(), entry.size)).collect();
        for object in &needs.objects {
            let path = format!("{OBJECTS}/{object}");
            if !have.contains(path.as_str()) && !self.missing.iter().any(|told| told.starts_with(&path)) {
                self.missing.push(format!("{path} is not there"));
            }
        }
        for (job, attempt, len) in &needs.logs {
            let path = format!("{LOGS}/{job}/{attempt}.log");
            if lens.get(path.as_str()).is_none_or(|have| have < len) {
                self.missing.push(format!("{path} has less than its {len} bytes"));
            }
        }
    }
}

/// Names and whether they are directories.
pub(crate) fn sorted(dir: &Path) -> io::Result<Vec<(String, bool)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        // Ours are plain; what is not is not ours.
        if let Ok(name) = entry.file_name().into_string() {
            found.push((name, entry.file_type()?.is_dir()));
        }
    }
    found.sort();
    Ok(found)
}

/// An object's seal, if its bytes are those that it speaks of.
pub(crate) fn sound(path: &Path) -> io::Result<Option<Seal>> {
    let bytes = fs::metadata(path)?.len();
    let mut file = File::open(path)?;
    let Some(footer_at) = bytes.checked_sub(FOOTER) else { return Ok(None) };
    let mut footer = [0; FOOTER as usize];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut footer, footer_at)?;
    let Some(content) = Seal::size(&footer).and_then(|size| bytes.checked_sub(size)) else { return Ok(None) };
    let mut seal = vec![0; usize::try_from(bytes - content).unwrap_or(usize::MAX)];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut seal, content)?;
    let Some(seal) = Seal::decode(&seal).filter(|seal| seal.len == content) else { return Ok(None) };
    let mut sums = Sums::default();
    pieces(&mut file, content, |piece| {
        sums.update(piece);
        Ok(())
    })?;
    Ok(Some(seal).filter(|seal| sums.seal() == *seal))
}

fn pieces(file: &mut File, mut left: u64, mut each: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<u64> {
    let (mut piece, mut read) = (vec![0; PIECE], 0);
    while left > 0 {
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(PIECE);
        let n = file.read(&mut piece[..most])?;
        if n == 0 {
            break;
        }
        each(&piece[..n])?;
        (left, read) = (left - n as u64, read + n as u64);
    }
    Ok(read)
}

pub(crate) fn hash(path: &Path) -> io::Result<(u64, Digest)> {
    let mut sha = sha2::Sha256::new();
    let size = pieces(&mut File::open(path)?, u64::MAX, |piece| {
        sha.update(piece);
        Ok(())
    })?;
    Ok((size, Digest::from_hasher(sha)))
}

/// Copies a file with its mode. Nothing is synced.
pub(crate) fn copy(from: &Path, to: &Path, len: Option<u64>) -> io::Result<(u64, Digest)> {
    let mut source = File::open(from)?;
    let mode = source.metadata()?.mode() & 0o777;
    let mut out = OpenOptions::new().write(true).create_new(true).mode(mode).open(to)?;
    let mut sha = sha2::Sha256::new();
    let size = pieces(&mut source, len.unwrap_or(u64::MAX), |piece| {
        sha.update(piece);
        out.write_all(piece)
    })?;
    Ok((size, Digest::from_hasher(sha)))
}

/// Makes a whole tree durable.
pub(crate) fn settle(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            settle(&entry.path())?;
        } else {
            File::open(entry.path())?.sync_all()?;
        }
    }
    sync_dir(dir)
}

#[cfg(test)]
mod tests;
