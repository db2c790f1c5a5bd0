//! S: logs as byte streams by offset. Stored bytes never change; what was sent twice is stored once.
//!
//! `Files` has one file per attempt, `JOB/ATTEMPT.log`, and a seal beside it once it is final. The newest bytes also stay in
//! memory, so that a follower at the end reads no file. Appends of at most 64 KiB go into the page cache by a plain `pwrite`
//! on the caller's thread (some 15 µs, less than a hop to another thread); everything that can wait for the disk does not.
//! `Chunks` has rows of the database that orchestrators share, and objects that they become. `Mem` is for the simulator.

use alloy_shared::id::{AttemptRef, Digest};
use alloy_shared::limits;
use bytes::Bytes;

use crate::broken::Care;

mod chunks;
mod files;
mod mem;
#[cfg(test)]
mod tests;
mod zeros;

pub use chunks::Chunks;
pub use files::Files;
pub use mem::Mem;

#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Bytes before this offset are missing: `have` are stored.
    #[error("the log has {have} bytes; the chunk begins later")]
    Gap { have: u64 },
    #[error("the log is sealed")]
    Sealed,
    #[error("the log would be longer than {} bytes", MAX)]
    TooLong,
    #[error("the farm's disk is full")]
    Full,
    #[error("the stored log is damaged between bytes {from} and {to}")]
    Damaged { from: u64, to: u64 },
    /// What holds the log cannot be reached.
    #[error("the log cannot be reached: {0}")]
    Away(String),
    #[error("{what}: {error}")]
    Io { what: &'static str, error: std::io::Error },
}

/// A worker keeps to `LOG_CAP`; its marker about dropped bytes and the tail come on top.
const MAX: u64 = limits::LOG_CAP + 2 * limits::LOG_TAIL;

#[derive(Debug)]
pub enum Logs {
    Files(Files),
    Chunks(Chunks),
    Mem(Mem),
}

impl Logs {
    /// Opens a directory of logs. A log's length after a restart is its file's: bytes that were not yet acknowledged may
    /// be missing from it, and the worker still has them.
    pub fn open(root: std::path::PathBuf, care: Care) -> Result<Self, LogError> {
        Files::open(root, care).map(Self::Files)
    }

    pub fn memory() -> Self {
        Self::Mem(Mem::default())
    }

    /// An attempt is about to begin that has no log yet, as far as the books know.
    pub fn begin(&self, at: &AttemptRef) {
        match self {
            Self::Files(_) | Self::Mem(_) => {}
            Self::Chunks(chunks) => chunks.begin(at),
        }
    }

    /// Stores the bytes that are new and returns the readable length.
    pub async fn append(&self, at: &AttemptRef, offset: u64, bytes: Bytes) -> Result<u64, LogError> {
        match self {
            Self::Files(files) => files.append(at, offset, bytes).await,
            Self::Chunks(chunks) => chunks.append(at, offset, &bytes).await,
            Self::Mem(mem) => mem.append(at, offset, &bytes),
        }
    }

    /// Whether bytes can be read only once they are durable.
    pub fn shows_what_is_durable(&self) -> bool {
        matches!(self, Self::Chunks(_))
    }

    /// Makes everything durable that was appended before the call; answers with the durable length of each log that has
    /// grown. One caller at a time. A log whose sync failed is not in the answer and falls back to what is durable.
    pub async fn sync(&self) -> Result<Vec<(AttemptRef, u64)>, LogError> {
        match self {
            Self::Files(files) => files.sync().await,
            Self::Chunks(chunks) => chunks.sync().await,
            Self::Mem(mem) => Ok(mem.sync().await),
        }
    }

    /// Some of the bytes from `from` on, at most `max`; nothing at the end.
    pub async fn read(&self, at: &AttemptRef, from: u64, max: u32) -> Result<Vec<Bytes>, LogError> {
        match self {
            Self::Files(files) => files.read(at, from, max).await,
            Self::Chunks(chunks) => chunks.read(at, from, max).await,
            Self::Mem(mem) => Ok(mem.read(at, from, max)),
        }
    }

    /// The readable length; 0 for a log that nobody wrote.
    pub async fn len(&self, at: &AttemptRef) -> Result<u64, LogError> {
        match self {
            Self::Files(files) => files.len(at).await,
            Self::Chunks(chunks) => chunks.len(at).await,
            Self::Mem(mem) => Ok(mem.len(at)),
        }
    }

    /// The length that survives a power cut: what a worker may be told to forget.
    pub async fn durable(&self, at: &AttemptRef) -> Result<u64, LogError> {
        match self {
            Self::Files(files) => files.durable(at).await,
            // What can be read is committed.
            Self::Chunks(chunks) => chunks.len(at).await,
            Self::Mem(mem) => Ok(mem.durable(at)),
        }
    }

    /// The readable length, whoever wrote the log last: this orchestrator may not have been the one.
    pub async fn measure(&self, at: &AttemptRef) -> Result<u64, LogError> {
        match self {
            Self::Files(_) | Self::Mem(_) => self.len(at).await,
            Self::Chunks(chunks) => chunks.measure(at).await,
        }
    }

    /// The durable length of a log whose writer comes back with all that lies behind it. Zeros at the end of what an earlier
    /// process left may be of a power cut, and nobody is shown them: here they go. If they are the log's they come again,
    /// for a worker keeps more than a window of what the farm has, unless its disk is full.
    pub async fn resume(&self, at: &AttemptRef) -> Result<u64, LogError> {
        match self {
            Self::Files(files) => files.resume(at).await,
            // What can be read is committed.
            Self::Chunks(chunks) => chunks.measure(at).await,
            Self::Mem(mem) => Ok(mem.resume(at)),
        }
    }

    /// The durable log has as many bytes as its worker said: from now on zeros at its end are its own, whatever happens.
    pub async fn keep(&self, at: &AttemptRef, len: u64) -> Result<(), LogError> {
        match self {
            Self::Files(files) => files.keep(at, len).await,
            Self::Chunks(_) => Ok(()),
            Self::Mem(mem) => {
                mem.keep(at, len);
                Ok(())
            }
        }
    }

    /// Removes a log that nobody writes or reads any more; one that is not there is removed already. Parts that lie in
    /// objects are for the caller to delete.
    pub async fn remove(&self, at: &AttemptRef) -> Result<(), LogError> {
        match self {
            Self::Files(files) => files.remove(at).await,
            Self::Chunks(chunks) => chunks.remove(at).await,
            Self::Mem(mem) => {
                mem.remove(at);
                Ok(())
            }
        }
    }

    /// Makes the log final and returns its SHA-256. Sealing again gives the same.
    pub async fn seal(&self, at: &AttemptRef) -> Result<Digest, LogError> {
        match self {
            Self::Files(files) => files.seal(at).await,
            Self::Chunks(chunks) => chunks.seal(at).await,
            Self::Mem(mem) => mem.seal(at).await,
        }
    }
}

/// The part of a chunk at `offset` that a log of `have` bytes does not hold yet.
fn news(have: u64, offset: u64, bytes: &Bytes) -> Result<Bytes, LogError> {
    let Some(known) = have.checked_sub(offset) else { return Err(LogError::Gap { have }) };
    let news = bytes.slice(usize::try_from(known).unwrap_or(usize::MAX).min(bytes.len())..);
    if have + news.len() as u64 > MAX { Err(LogError::TooLong) } else { Ok(news) }
}
