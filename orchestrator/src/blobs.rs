//! S: objects by key: manifests, artifacts, packs. An object is there whole or not at all.
//!
//! `Fs` writes to a temporary file, syncs it, renames it, syncs the directory. Its objects end in a [`crate::sums::Seal`],
//! which every read checks. `S3` writes to a bucket, of which nothing but a key's bytes is expected. `Mem` is for the
//! simulator and tests and needs no runtime.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use alloy_shared::env::{Env, Ms};
use alloy_shared::id::{AttemptRef, Digest, OrgId};
use alloy_shared::limits;
use alloy_shared::wire::farm::Storage;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use tokio::sync::Semaphore;

use crate::broken::Care;
use crate::store::BlobKind;
use crate::store::tidy::TrashRow;

mod fs;
pub mod mark;
mod mem;
mod owner;
mod s3;
#[cfg(test)]
mod tests;

pub use fs::Fs;
pub use mem::Mem;
pub use s3::{BadPlace, Patience, S3};

/// Bytes on their way in or out. An error is the sender's end of it: a client that is gone, a disk that rots.
pub type Body = BoxStream<'static, std::io::Result<Bytes>>;

/// The name of an object: a few components of plain characters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlobKey(String);

impl BlobKey {
    /// A pack's name is thrown, because its content is not known before it is written.
    pub fn pack(org: OrgId, dice: (u64, u64)) -> Self {
        Self(format!("{org}/packs/{:016x}{:016x}", dice.0, dice.1))
    }

    /// An object of its own is named by its content.
    pub fn alone(org: OrgId, kind: BlobKind, digest: &Digest) -> Self {
        let kind = match kind {
            BlobKind::Chunk => "chunks",
            BlobKind::Manifest => "manifests",
            BlobKind::Artifact => "artifacts",
        };
        let hex = digest.to_string();
        Self(format!("{org}/{kind}/{}/{hex}", &hex[..2]))
    }

    /// A part of a log.
    pub fn log(at: &AttemptRef, start: u64, end: u64) -> Self {
        Self(format!("logs/{}/{}/{start:010x}_{end:010x}", at.job, at.attempt))
    }

    /// Reads a name that was stored. `None`: it could point anywhere.
    pub fn parse(text: &str) -> Option<Self> {
        let plain = |part: &str| {
            !part.is_empty() && part.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_')
        };
        (text.len() <= 200 && text.split('/').all(plain)).then(|| Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// True if a farm gives such names. What else lies in a bucket is somebody else's.
    pub fn is_made(&self) -> bool {
        let parts: Vec<&str> = self.0.split('/').collect();
        let is_org = |org: &str| org.parse::<OrgId>().is_ok();
        match parts[..] {
            ["logs", _, _, range] => log_of(&self.0).is_some() && range.contains('_'),
            [org, "packs", name] => {
                let dice = name.split('_').next().unwrap_or_default();
                is_org(org) && dice.len() == 32 && dice.bytes().all(|c| c.is_ascii_hexdigit())
            }
            [org, "chunks" | "manifests" | "artifacts", head, name] => {
                is_org(org) && name.starts_with(head) && self.digest().is_some()
            }
            _ => false,
        }
    }

    /// What the bytes of an object of its own hash to.
    pub fn digest(&self) -> Option<Digest> {
        root_of(&self.0).rsplit_once('/')?.1.parse().ok()
    }

    /// The name itself, or one made of it, that was not thrown away of late: whoever deletes an object may be late, and must
    /// not meet a new one.
    pub fn afresh(self, thrown: &[TrashRow]) -> Self {
        let Some(newest) = thrown.iter().map(|row| row.at.0.unsigned_abs()).max() else { return self };
        let is_new = |name: &String| thrown.iter().all(|row| row.object != *name);
        let mut names = (newest..).map(|n| format!("{}_{n:x}", self.0));
        names.find(is_new).map_or(self, Self)
    }
}

/// An object's name without what was put behind it to make it a new one.
pub fn root_of(object: &str) -> &str {
    let name = object.rsplit_once('/').map_or(object, |(_, name)| name);
    match name.split_once('_') {
        Some((hex, _)) if hex.parse::<Digest>().is_ok() => &object[..object.len() - name.len() + hex.len()],
        Some(_) | None => object,
    }
}

/// A whole log, as the trash names it. The names of its parts begin with it and a slash.
pub fn log_object(at: &AttemptRef) -> String {
    format!("logs/{}/{}", at.job, at.attempt)
}

/// The log that an entry of the trash, or an object with a part of a log, is about.
pub fn log_of(object: &str) -> Option<AttemptRef> {
    let mut parts = object.strip_prefix("logs/")?.split('/');
    Some(AttemptRef { job: parts.next()?.parse().ok()?, attempt: parts.next()?.parse().ok()? })
}

impl fmt::Display for BlobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    #[error("there is no object {0}")]
    Missing(BlobKey),
    #[error("the farm's disk is full")]
    Full,
    #[error("the bytes hash to {actual}, not to {expected}")]
    Digest { expected: Digest, actual: Digest },
    /// An upload goes on at another byte.
    #[error("{have} bytes are stored")]
    Offset { have: u64 },
    #[error("object {0} is damaged on the disk")]
    Damaged(BlobKey),
    /// Whoever sends stopped sending.
    #[error("the upload ended early: {0}")]
    Body(std::io::Error),
    #[error("{what}: {error}")]
    Io { what: &'static str, error: std::io::Error },
    /// It does not answer, or not with what it has. Another time it may.
    #[error("the farm's object store is away: {0}")]
    Away(String),
}

impl BlobError {
    /// The same for somebody else who waited for it.
    fn again(&self) -> Self {
        let same = |error: &std::io::Error| std::io::Error::new(error.kind(), error.to_string());
        match self {
            Self::Missing(key) => Self::Missing(key.clone()),
            Self::Full => Self::Full,
            Self::Digest { expected, actual } => Self::Digest { expected: *expected, actual: *actual },
            Self::Offset { have } => Self::Offset { have: *have },
            Self::Damaged(key) => Self::Damaged(key.clone()),
            Self::Body(error) => Self::Body(same(error)),
            Self::Io { what, error } => Self::Io { what, error: same(error) },
            Self::Away(why) => Self::Away(why.clone()),
        }
    }
}

/// An object among others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub key: BlobKey,
    pub size: u64,
    /// When it was written last.
    pub modified: Ms,
}

/// Why a bucket cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenS3 {
    #[error(transparent)]
    Place(#[from] BadPlace),
    #[error("the spool for uploads: {0}")]
    Spool(#[from] BlobError),
}

/// What an object turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    pub size: u64,
    pub sha256: Digest,
}

#[derive(Debug)]
pub enum Blobs {
    Fs(Fs),
    S3(S3),
    Mem(Mem),
}

impl Blobs {
    /// Opens a directory of objects and sweeps what a crash left half-written.
    pub async fn open(root: PathBuf, now: Ms, care: Care) -> Result<Self, BlobError> {
        Fs::open(root, now, care).await.map(Self::Fs)
    }

    /// Opens a bucket, after a look whether it does what is needed. `spool` is a directory of this machine for uploads that
    /// can be interrupted.
    pub async fn open_s3(
        place: &crate::config::S3,
        spool: PathBuf,
        care: Care,
        env: Arc<dyn Env>,
    ) -> Result<Self, OpenS3> {
        let spool = Fs::open(spool, env.now().wall, care).await?;
        spool.sweep(env.now().wall).await?;
        Ok(Self::S3(S3::open(place, Patience::default(), spool, env).await?))
    }

    /// Reads a directory of objects that somebody else may be writing, and sweeps nothing.
    pub fn look(root: PathBuf) -> Self {
        Self::Fs(Fs::look(root))
    }

    pub fn memory() -> Self {
        Self::Mem(Mem::default())
    }

    /// The disk of this machine that the bytes go to, on their way to a bucket too. `None`: there is none.
    pub fn storage(&self) -> Result<Option<Storage>, BlobError> {
        match self {
            Self::Fs(fs) => fs.storage().map(Some),
            Self::S3(s3) => s3.storage().map(Some),
            Self::Mem(_) => Ok(None),
        }
    }

    /// Whether something new may begin.
    pub fn room(&self) -> Result<(), BlobError> {
        match self {
            Self::Mem(mem) => mem.room(),
            Self::Fs(_) | Self::S3(_) => match self.storage()? {
                Some(storage) if storage.is_full() => Err(BlobError::Full),
                Some(_) | None => Ok(()),
            },
        }
    }

    /// Starts an object. It becomes visible with [`Draft::finish`] and leaves nothing if it is dropped.
    pub async fn create(&self, key: &BlobKey) -> Result<Draft, BlobError> {
        match self {
            Self::Fs(fs) => fs.create(key).await.map(|draft| Draft::Fs(Box::new(draft))),
            Self::S3(s3) => Ok(Draft::S3(Box::new(s3.create(key)))),
            Self::Mem(mem) => Ok(Draft::Mem(mem.create(key))),
        }
    }

    pub async fn put(&self, key: &BlobKey, mut body: Body, expect: Option<Digest>) -> Result<Stored, BlobError> {
        let mut draft = self.create(key).await?;
        while let Some(part) = body.next().await {
            draft.append(part.map_err(BlobError::Body)?).await?;
        }
        draft.finish(expect).await
    }

    /// The bytes of `range`, in blocks of at most 1 MiB. Of files each is checked; of a bucket an object that is named by its
    /// content is, when it is read as a whole: its last block comes only if all of it is right.
    pub async fn read(&self, key: &BlobKey, range: Range<u64>) -> Result<Body, BlobError> {
        match self {
            Self::Fs(fs) => fs.read(key, range).await,
            Self::S3(s3) => s3.read(key, range).await,
            Self::Mem(mem) => mem.read(key, range),
        }
    }

    /// A short range as one piece. It is not checked: a frame's blobs are, by their digests.
    pub async fn read_piece(&self, key: &BlobKey, at: u64, len: u32) -> Result<Bytes, BlobError> {
        match self {
            Self::Fs(fs) => fs.read_piece(key, at, len).await,
            Self::S3(s3) => s3.read_piece(key, at, len).await,
            Self::Mem(mem) => {
                let mut body = mem.read(key, at..at.saturating_add(u64::from(len)))?;
                let mut out = BytesMut::with_capacity(len as usize);
                while let Some(part) = body.next().await {
                    out.extend_from_slice(&part.map_err(BlobError::Body)?);
                }
                Ok(out.freeze())
            }
        }
    }

    /// Removes an object; one that is not there is removed already.
    pub async fn delete(&self, key: &BlobKey) -> Result<(), BlobError> {
        match self {
            Self::Fs(fs) => fs.delete(key).await,
            Self::S3(s3) => s3.delete(key).await,
            Self::Mem(mem) => {
                mem.delete(key);
                Ok(())
            }
        }
    }

    /// A page of the objects whose keys begin with `prefix`, after one of them, in the order of their keys. Empty: there are no
    /// more.
    pub async fn list(&self, prefix: &str, after: Option<&BlobKey>) -> Result<Vec<Listed>, BlobError> {
        match self {
            Self::Fs(fs) => fs.list(prefix, after).await,
            Self::S3(s3) => s3.list(prefix, after).await,
            Self::Mem(mem) => Ok(mem.list(prefix, after)),
        }
    }

    /// An address from which anybody may fetch the object for some seconds, past this farm, and which answers with this
    /// `Content-Disposition`. `None`: there is none, or it is not wanted.
    pub async fn presign(&self, key: &BlobKey, ttl_s: u64, disposition: &str) -> Result<Option<String>, BlobError> {
        match self {
            Self::S3(s3) => s3.presign(key, ttl_s, disposition).await,
            Self::Fs(_) | Self::Mem(_) => Ok(None),
        }
    }

    /// How many bytes of an unfinished upload are stored on this machine.
    pub async fn partial(&self, key: &BlobKey) -> Result<u64, BlobError> {
        match self {
            Self::Fs(fs) => fs.partial(key).await,
            Self::S3(s3) => s3.partial(key).await,
            Self::Mem(mem) => Ok(mem.partial(key)),
        }
    }

    /// Goes on with an upload. What arrived stays, also when the body breaks off. The newest caller wins: an older one
    /// that still sends the same object is told [`BlobError::Offset`].
    pub async fn append(&self, key: &BlobKey, offset: u64, body: Body) -> Result<u64, BlobError> {
        match self {
            Self::Fs(fs) => fs.append(key, offset, body).await,
            Self::S3(s3) => s3.append(key, offset, body).await,
            Self::Mem(mem) => mem.append(key, offset, body).await,
        }
    }

    /// Checks the whole upload against its digest and makes it an object. Bytes that do not fit are thrown away.
    pub async fn finish(&self, key: &BlobKey, expect: Digest) -> Result<Stored, BlobError> {
        match self {
            Self::Fs(fs) => fs.finish(key, expect).await,
            Self::S3(s3) => s3.finish(key, expect).await,
            Self::Mem(mem) => mem.finish(key, expect).await,
        }
    }

    /// Runs a computation of some milliseconds where it does not hold up the connections.
    pub async fn compute<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        match self {
            Self::Fs(_) | Self::S3(_) => off_thread(work).await,
            Self::Mem(_) => work(),
        }
    }
}

/// An object that is being written.
#[derive(Debug)]
pub enum Draft {
    Fs(Box<fs::Draft>),
    S3(Box<s3::Draft>),
    Mem(mem::Draft),
}

impl Draft {
    pub fn len(&self) -> u64 {
        match self {
            Self::Fs(draft) => draft.len(),
            Self::S3(draft) => draft.len(),
            Self::Mem(draft) => draft.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub async fn append(&mut self, bytes: Bytes) -> Result<(), BlobError> {
        match self {
            Self::Fs(draft) => draft.append(bytes).await,
            Self::S3(draft) => draft.append(bytes).await,
            Self::Mem(draft) => {
                draft.append(&bytes);
                Ok(())
            }
        }
    }

    pub async fn finish(self, expect: Option<Digest>) -> Result<Stored, BlobError> {
        match self {
            Self::Fs(draft) => draft.finish(expect).await,
            Self::S3(draft) => draft.finish(expect).await,
            Self::Mem(draft) => draft.finish(expect).await,
        }
    }
}

fn check(expect: Option<Digest>, actual: Digest) -> Result<(), BlobError> {
    match expect {
        Some(expected) if expected != actual => Err(BlobError::Digest { expected, actual }),
        Some(_) | None => Ok(()),
    }
}

/// Each holds a thread for as long as its client sends, so they are few.
static ARCHIVE_READERS: Semaphore = Semaphore::const_new(limits::ARCHIVE_READERS);

/// Runs a reader of an archive on a thread of its own. `None`: too many of them run.
pub async fn read_archive<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let _permit = ARCHIVE_READERS.try_acquire().ok()?;
    Some(off_thread(work).await)
}

/// Runs blocking work on tokio's threads for it. A panic there is a panic here.
pub(crate) async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Only a runtime that is shutting down cancels; then nobody polls this either.
            Err(_) => std::future::pending().await,
        },
    }
}

/// Bytes that an ordinary user may still write on the file system of `path`.
pub(crate) fn free_bytes(path: &std::path::Path) -> std::io::Result<u64> {
    let fs = nix::sys::statvfs::statvfs(path)?;
    Ok((fs.blocks_available() as u64).saturating_mul(fs.fragment_size() as u64))
}

/// Makes a directory's entries durable.
pub(crate) fn sync_dir(path: &std::path::Path) -> std::io::Result<()> {
    std::fs::File::open(path)?.sync_all()
}
