//! S: what must survive until the orchestrator has acknowledged it: log bytes, reports, artifacts.
//!
//! On disk every attempt has a directory: `journal` (the assignment, then its reports), `log.0` and its successors, and `stash/` with artifacts
//! under their digests. In memory it is the same for the simulator, without a single system call or task.

mod disk;
mod journal;
pub mod mem;
mod segments;

use std::collections::VecDeque;
use std::io;
use std::path::Path;

use alloy_shared::id::{AttemptRef, Digest};
use alloy_shared::limits;
use alloy_shared::wire::session::{Assignment, Held, HeldState, Report};
use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;

/// Bytes of one piece when a stashed file is read back.
const PIECE: usize = 256 << 10;
/// Pieces read ahead of whoever sends them.
const PIECES_AHEAD: usize = 4;

#[derive(Debug)]
pub enum Spool {
    Disk(disk::Disk),
    Mem(mem::Mem),
}

impl Spool {
    /// Opens what an earlier daemon left. A damaged record is set aside and its attempt reported as lost.
    pub fn open(root: &Path) -> io::Result<(Self, Vec<Held>)> {
        Self::open_keeping(root, 0)
    }

    /// The same on a disk of which so many bytes stay free: for reports, and for what a log that was cut off ends in.
    pub fn open_keeping(root: &Path, reserve: u64) -> io::Result<(Self, Vec<Held>)> {
        let (disk, held) = disk::Disk::open(root, reserve)?;
        Ok((Self::Disk(disk), held))
    }

    pub fn memory() -> Self {
        Self::Mem(mem::Mem::default())
    }

    /// Opens the same spool again, as a daemon does that starts after this one died.
    pub fn reopen(&self) -> io::Result<(Self, Vec<Held>)> {
        match self {
            Self::Disk(disk) => Self::open_keeping(disk.root(), disk.reserve()),
            Self::Mem(mem) => Ok((Self::Mem(mem.clone()), mem.reopen())),
        }
    }

    /// True if log bytes that come now would be left out.
    pub fn is_tight(&self) -> bool {
        match self {
            Self::Disk(disk) => disk.is_tight(),
            Self::Mem(mem) => mem.is_tight(),
        }
    }

    /// Makes room for an attempt. It is durable with its first report.
    pub async fn begin(&self, assignment: &Assignment) -> io::Result<()> {
        match self {
            Self::Disk(disk) => disk.begin(assignment),
            Self::Mem(mem) => mem.begin(assignment),
        }
    }

    /// Appends to the log and returns its spooled length. Beyond `LOG_CAP` only the last `LOG_TAIL` bytes are kept, and
    /// [`Spool::seal_log`] appends them.
    ///
    /// The write goes straight to the page cache on the calling thread: 64 KiB take some ten microseconds, about what
    /// handing them to another thread would cost, and readers see them at once.
    pub async fn append(&self, at: AttemptRef, bytes: Bytes) -> io::Result<u64> {
        match self {
            Self::Disk(disk) => disk.append(at, &bytes),
            Self::Mem(mem) => mem.append(at, &bytes),
        }
    }

    /// Ends the log: appends what the cap held back, syncs, returns the final length. Nothing may be appended after.
    pub async fn seal_log(&self, at: AttemptRef) -> io::Result<u64> {
        match self {
            Self::Disk(disk) => disk.seal_log(at).await,
            Self::Mem(mem) => mem.seal_log(at).await,
        }
    }

    /// What is missing in the middle of a log that was sealed.
    pub fn cut(&self, at: AttemptRef) -> io::Result<Option<Cut>> {
        match self {
            Self::Disk(disk) => disk.cut(at),
            Self::Mem(mem) => mem.cut(at),
        }
    }

    /// Returns the log length that is on disk.
    pub async fn sync(&self, at: AttemptRef) -> io::Result<u64> {
        match self {
            Self::Disk(disk) => disk.sync(at).await,
            Self::Mem(mem) => mem.sync(at).await,
        }
    }

    /// At most `max` bytes of the log, fewer only where it ends, behind `head` bytes of room.
    pub async fn read(&self, at: AttemptRef, from: u64, max: u32, head: usize) -> io::Result<BytesMut> {
        match self {
            Self::Disk(disk) => disk.read(at, from, max, head),
            Self::Mem(mem) => mem.read(at, from, max, head),
        }
    }

    /// The orchestrator has so much of the log: what lies far behind that need not be kept.
    pub async fn release(&self, at: AttemptRef, durable: u64) -> io::Result<()> {
        match self {
            Self::Disk(disk) => disk.release(at, durable).await,
            Self::Mem(_) => Ok(()),
        }
    }

    /// Lets go of all of the log that the farm has, if the disk is tight.
    pub async fn make_room(&self, at: AttemptRef) -> io::Result<()> {
        match self {
            Self::Disk(disk) => disk.make_room(at).await,
            Self::Mem(_) => Ok(()),
        }
    }

    /// Puts reports on disk, in order, with one sync for all. A result's log is synced with it. After an error
    /// of [`alloy_shared::room`] none of it counts: the same may be asked again.
    pub async fn record(&self, at: AttemptRef, reports: &[(u64, Report)]) -> io::Result<()> {
        match self {
            Self::Disk(disk) => disk.record(at, reports).await,
            Self::Mem(mem) => mem.record(at, reports).await,
        }
    }

    pub async fn reports(&self, at: AttemptRef, after: u64) -> io::Result<Vec<(u64, Report)>> {
        match self {
            Self::Disk(disk) => disk.reports(at, after),
            Self::Mem(mem) => mem.reports(at, after),
        }
    }

    /// A file for an artifact's bytes. It counts once it is finished.
    pub async fn stash(&self, at: AttemptRef) -> io::Result<StashFile> {
        match self {
            Self::Disk(disk) => disk.stash(at).map(StashFile::Disk),
            Self::Mem(mem) => mem.stash(at).map(StashFile::Mem),
        }
    }

    /// A handle to read a finished artifact again.
    pub fn stashed(&self, at: AttemptRef, digest: &Digest) -> SpoolFile {
        let kind = match self {
            Self::Disk(disk) => FileKind::Disk(disk.stashed(at, digest)),
            Self::Mem(mem) => FileKind::Mem(mem.stashed(at, digest)),
        };
        SpoolFile { digest: *digest, kind }
    }

    pub async fn assignment(&self, at: AttemptRef) -> io::Result<Option<Assignment>> {
        match self {
            Self::Disk(disk) => disk.assignment(at),
            Self::Mem(mem) => Ok(mem.assignment(at)),
        }
    }

    pub async fn remove(&self, at: AttemptRef) -> io::Result<()> {
        match self {
            Self::Disk(disk) => disk.remove(at).await,
            Self::Mem(mem) => {
                mem.remove(at);
                Ok(())
            }
        }
    }
}

/// An artifact on its way into the spool.
#[derive(Debug)]
pub enum StashFile {
    Disk(disk::Stashing),
    Mem(mem::Stashing),
}

impl StashFile {
    pub async fn write(&mut self, bytes: Bytes) -> io::Result<()> {
        match self {
            Self::Disk(file) => file.write(&bytes),
            Self::Mem(file) => file.write(&bytes),
        }
    }

    /// Makes the bytes durable under their digest. A file that is dropped instead leaves nothing behind.
    pub async fn finish(self) -> io::Result<(Digest, u64)> {
        match self {
            Self::Disk(file) => file.finish().await,
            Self::Mem(file) => file.finish().await,
        }
    }
}

/// A finished artifact in the spool.
#[derive(Debug, Clone)]
pub struct SpoolFile {
    digest: Digest,
    kind: FileKind,
}

#[derive(Debug, Clone)]
enum FileKind {
    Disk(std::path::PathBuf),
    Mem(Option<Bytes>),
}

impl SpoolFile {
    pub fn digest(&self) -> Digest {
        self.digest
    }

    pub fn size(&self) -> io::Result<u64> {
        match &self.kind {
            FileKind::Disk(path) => Ok(std::fs::metadata(path)?.len()),
            FileKind::Mem(bytes) => bytes.as_ref().map(|bytes| bytes.len() as u64).ok_or_else(gone),
        }
    }

    /// The bytes from an offset to the end. A channel that closes early means that the rest could not be read.
    pub fn open(&self, from: u64) -> io::Result<mpsc::Receiver<Bytes>> {
        match &self.kind {
            FileKind::Disk(path) => disk::pieces(path, from),
            FileKind::Mem(bytes) => mem::pieces(bytes.as_ref().ok_or_else(gone)?, from),
        }
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, "the spool does not hold it")
}

/// What a log may be called after a restart: the result counts only with every byte that it speaks of.
fn judge(reports: &[(u64, Report)], log_len: u64, has: impl Fn(&Digest) -> bool) -> HeldState {
    let whole = reports.iter().all(|(_, report)| match report {
        Report::Artifact(artifact) => artifact.link.is_some() || has(&artifact.sha256),
        Report::Result(result) => log_len >= result.log_len,
        Report::Accepted | Report::Refused { .. } | Report::Phase { .. } => true,
    });
    if has_result(reports) && whole { HeldState::ResultPending } else { HeldState::Lost }
}

/// Whether the attempt came to its end: before its result is written down, all of its log is on the disk.
fn has_result(reports: &[(u64, Report)]) -> bool {
    matches!(reports.last(), Some((_, Report::Result(_))))
}

/// The length without the zeros at the end.
fn written(bytes: &[u8]) -> usize {
    bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1)
}

/// Bytes of a log that nobody will see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    pub bytes: u64,
    /// The log was not too long: the disk had no room for it.
    pub disk_full: bool,
}

/// What stands behind the head of a log that was cut.
struct LogEnd {
    /// A line that counts what is missing, if anything is, then the end of the log.
    whole: Vec<u8>,
    /// What stands there if that has no room: the line alone.
    alone: Vec<u8>,
    /// Bytes of the log at the end of `whole`.
    kept: u64,
}

/// Where appended bytes go: to the log up to the cap, then into a ring that remembers only the end.
#[derive(Debug)]
struct Cap {
    /// Bytes in the log.
    len: u64,
    /// The log grows no further than this.
    limit: u64,
    ring: VecDeque<u8>,
    dropped: u64,
    disk_full: bool,
    sealed: bool,
}

impl Cap {
    fn new(limit: u64) -> Self {
        Self { len: 0, limit, ring: VecDeque::new(), dropped: 0, disk_full: false, sealed: false }
    }

    /// A log that an earlier daemon left: it grows no more.
    fn sealed(len: u64) -> Self {
        Self { len, sealed: true, ..Self::new(len) }
    }

    /// The part of `bytes` that goes into the log now. The rest is for [`Cap::keep`].
    fn split<'a>(&self, bytes: &'a [u8]) -> io::Result<(&'a [u8], &'a [u8])> {
        if self.sealed {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the log is sealed"));
        }
        let fits = usize::try_from(self.limit.saturating_sub(self.len)).unwrap_or(usize::MAX);
        Ok(bytes.split_at(fits.min(bytes.len())))
    }

    /// The disk takes no more: the log grows no further than it is, and keeps the end, like any log that is too long.
    fn no_room(&mut self) {
        self.limit = self.len;
        self.disk_full = true;
    }

    fn cut(&self) -> Option<Cut> {
        (self.dropped > 0).then_some(Cut { bytes: self.dropped, disk_full: self.disk_full })
    }

    /// Remembers the end of what has no room in the log.
    fn keep(&mut self, bytes: &[u8]) {
        let tail = limits::LOG_TAIL as usize;
        let kept = &bytes[bytes.len().saturating_sub(tail)..];
        let over = (self.ring.len() + kept.len()).saturating_sub(tail);
        self.ring.drain(..over);
        self.ring.extend(kept);
        self.dropped += (over + bytes.len() - kept.len()) as u64;
    }

    /// Not even the end of the log has room.
    fn lose_end(&mut self, end: &LogEnd) {
        self.dropped += end.kept;
        self.disk_full = true;
    }

    /// What stands after the head.
    fn take_end(&mut self) -> LogEnd {
        self.sealed = true;
        let kept = self.ring.len() as u64;
        let ring = std::mem::take(&mut self.ring);
        let line = |dropped: u64, rest: &str| format!("\n[alloy: {dropped} bytes of log are left out here{rest}]\n");
        let mut end = Vec::new();
        if self.dropped > 0 {
            end.extend_from_slice(line(self.dropped, &format!(", its last {} follow", ring.len())).as_bytes());
        }
        let alone = line(self.dropped + ring.len() as u64, ", to its end: the disk is full").into_bytes();
        end.extend(ring);
        LogEnd { whole: end, alone, kept }
    }
}

#[cfg(test)]
pub(crate) mod tests;
