//! S: a farm's data in a directory of its own, whole or not at all, taken while the farm runs.
//!
//! First the database as it is at one moment, then everything that it can name: objects, which never change, by a hard link
//! where that is possible; logs as far as they are. Last a list of all files with their digests. What was cut off has no list
//! and another name, so nobody takes it for a backup. [`restore`] is the way back.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use alloy_shared::id::Digest;
use sha2::Digest as _;
use tokio_util::sync::CancellationToken;

use crate::blobs::mark::{Elsewhere, compare};
use crate::blobs::{BlobError, OpenS3, off_thread, sync_dir};
use crate::moving::mark::{self, MovedAway};
use crate::store::sql::OpenError;
use crate::store::sql::backup::{Needs, copy_at_once, examine, schema};
use crate::sums::{FOOTER, Seal, Sums};

pub mod elsewhere;
pub mod list;
mod part;
pub mod restore;

use list::{Entry, Head};
use part::{Part, unless_stopped};

pub const DATABASE: &str = "alloy.db";
pub(crate) const OBJECTS: &str = "blobs/objects";
pub(crate) const LOGS: &str = "logs";
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
    #[error(
        "a backup grows in {}, but that is no directory that one has left there, closed to everybody else: move it away, or name \
         another directory",
        .0.display()
    )]
    Foreign(PathBuf),
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
    #[error("told to stop: there is no backup")]
    Stopped,
    #[error("{why}. What was copied by then is left in {}, remove it: {left}", path.display())]
    Left { path: PathBuf, why: Box<BackupError>, left: Box<BackupError> },
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

/// Takes a backup of the farm in `farm` into `target`, which must not exist. Who says `stop` waits for the end all the same: what
/// was copied is removed.
pub async fn take(
    farm: &Path,
    target: &Path,
    taken_at: String,
    stop: &CancellationToken,
) -> Result<Taken, BackupError> {
    if !farm.join(DATABASE).is_file() {
        return Err(BackupError::NoFarm(farm.to_owned()));
    }
    mark::check(farm)?;
    // Its books alone would name what the backup does not hold.
    compare(farm, None)?;
    if fs::symlink_metadata(target).is_ok() {
        return Err(BackupError::Exists(target.to_owned()));
    }
    let part = Part::begin(target)?;
    let taken = fill(farm, part.path(), taken_at, stop).await;
    part.end(target, taken).await
}

async fn fill(farm: &Path, part: &Path, taken_at: String, stop: &CancellationToken) -> Result<Taken, BackupError> {
    let needs = unless_stopped(stop, async {
        copy_at_once(&farm.join(DATABASE), &part.join(DATABASE)).await?;
        Ok(examine(&part.join(DATABASE)).await?)
    });
    let (needs, farm, part, stop) = (needs.await?, farm.to_owned(), part.to_owned(), stop.clone());
    off_thread(move || Copy::new(&farm, &part, stop).all(&needs, taken_at)).await
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
    stop: CancellationToken,
}

impl<'a> Copy<'a> {
    fn new(farm: &'a Path, part: &'a Path, stop: CancellationToken) -> Self {
        let device = |path: &Path| fs::metadata(path).map(|meta| meta.dev()).ok();
        Self { farm, part, entries: Vec::new(), missing: Vec::new(), apart: device(farm) != device(part), stop }
    }

    /// Asked before each file: nobody drops a thread.
    fn unless_stopped(&self) -> Result<(), BackupError> {
        if self.stop.is_cancelled() { Err(BackupError::Stopped) } else { Ok(()) }
    }

    fn all(mut self, needs: &Needs, taken_at: String) -> Result<Taken, BackupError> {
        self.books()?;
        self.objects(OBJECTS)?;
        self.logs()?;
        self.finish(needs, taken_at)
    }

    /// The database that was copied, readable to nobody else: it holds the farm's secret.
    fn books(&mut self) -> Result<(), BackupError> {
        let path = self.part.join(DATABASE);
        fs::set_permissions(&path, Permissions::from_mode(0o600)).map_err(at(&path))?;
        self.add(DATABASE.to_owned())
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
        self.unless_stopped()?;
        let from = self.farm.join(name);
        match sound(&from) {
            Ok(Some(_)) => {}
            Ok(None) => {
                self.missing.push(format!("{name} is damaged"));
                return Ok(());
            }
            // Taken away meanwhile. If the books name it, that is told in the end.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
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
        match self.file(name, None) {
            Err(BackupError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            copied => copied.map(drop),
        }
    }

    /// Every log, as far as it is. Retention goes on meanwhile: what it takes away is no reason to have no backup, and what the
    /// books name of it is looked for in the end.
    fn logs(&mut self) -> Result<(), BackupError> {
        let from = self.farm.join(LOGS);
        for (job, is_dir) in sorted(&from).map_err(at(&from))? {
            let dir = from.join(&job);
            if !is_dir {
                continue;
            }
            for (name, _) in sorted(&dir).map_err(at(&dir))? {
                let Some(stem) = name.strip_suffix(".log") else { continue };
                let had = self.entries.len();
                match self.log(&format!("{LOGS}/{job}/{stem}")) {
                    Err(BackupError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => {
                        self.take_back(had)?
                    }
                    copied => copied?,
                }
            }
        }
        Ok(())
    }

    /// A log that is sealed is final. One that is not goes on growing: what it has by now is what counts.
    fn log(&mut self, stem: &str) -> Result<(), BackupError> {
        self.unless_stopped()?;
        let (log, seal, whole) = (format!("{stem}.log"), format!("{stem}.seal"), format!("{stem}.whole"));
        // Looked for first: a seal that comes later speaks of bytes that this copy may lack.
        let sealed = self.farm.join(&seal).is_file();
        let from = self.farm.join(&log);
        let len = fs::metadata(&from).map_err(at(&from))?.len();
        let whole = Some(whole).filter(|whole| self.farm.join(whole).is_file());
        let copied = self.file(&log, Some(len))?;
        whole.map(|whole| self.file(&whole, None)).transpose()?;
        if sealed {
            self.file(&seal, None)?;
            let text = fs::read(self.part.join(seal)).map_err(at(&from))?;
            if Seal::decode(&text).map(|seal| (seal.len, seal.sha256)) != Some(copied) {
                self.missing.push(format!("{log} is damaged: it is not what its seal says"));
            }
        }
        Ok(())
    }

    /// Removes what was copied since there were so many.
    fn take_back(&mut self, had: usize) -> Result<(), BackupError> {
        for half in self.entries.drain(had..) {
            let path = self.part.join(&half.path);
            fs::remove_file(&path).map_err(at(&path))?;
        }
        Ok(())
    }

    /// Copies a file, or its first bytes, and returns what it copied.
    fn file(&mut self, name: &str, len: Option<u64>) -> Result<(u64, Digest), BackupError> {
        let (from, to) = (self.farm.join(name), self.part.join(name));
        make_dir(parent(&to)).map_err(at(&to))?;
        let (size, sha256) = copy(&from, &to, len).map_err(at(&from))?;
        self.entries.push(Entry { path: name.to_owned(), size, sha256 });
        Ok((size, sha256))
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

/// Names and whether they are directories. What is not there, or not any more, is empty.
pub(crate) fn sorted(dir: &Path) -> io::Result<Vec<(String, bool)>> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for entry in entries {
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
