//! S: one attempt's log on disk, in files of equal size: its beginning can be given up while its end still grows.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use alloy_shared::limits::{LOG_CAP, LOG_TAIL, SPOOL_SEGMENT};

/// What stands for bytes that were given up and are asked for again. The log keeps its length, and the job its result.
const LOST: &[u8] = b"[alloy: the farm had stored this part of the log and lost it]\n";
const NAME: &str = "log.";
/// Says that files at the beginning were given up. Without it one that is missing is damage.
const RELEASED: &str = "released";
const NUMBER_MAX: u64 = (LOG_CAP + 2 * LOG_TAIL) / SPOOL_SEGMENT;

#[derive(Debug)]
pub(super) struct Segments {
    dir: PathBuf,
    files: Mutex<Files>,
    len: AtomicU64,
    /// So much is on disk.
    synced: AtomicU64,
    /// A file was made whose name is not durable.
    made: AtomicBool,
}

/// Held open are the file that is written and the one that was read last: a flood has a hundred and more.
#[derive(Debug, Default)]
struct Files {
    /// What lies before this one was given up.
    first: u64,
    /// The first one that was not yet deleted.
    deleted: u64,
    written: Option<(u64, Arc<File>)>,
    read: Option<(u64, Arc<File>)>,
}

impl Segments {
    pub(super) fn create(dir: &Path) -> io::Result<Self> {
        let log = Self::new(dir, 0, 0);
        log.file_to_write(0)?;
        log.made.store(false, Ordering::Release);
        Ok(log)
    }

    fn new(dir: &Path, first: u64, len: u64) -> Self {
        Self {
            dir: dir.to_owned(),
            files: Mutex::new(Files { first, deleted: first, ..Files::default() }),
            len: AtomicU64::new(len),
            synced: AtomicU64::new(0),
            made: AtomicBool::new(false),
        }
    }

    /// Opens what an earlier daemon left, to be read: the bytes up to the first one that is missing.
    pub(super) fn reopen(dir: &Path) -> io::Result<Self> {
        let mut found: Vec<(u64, u64)> = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if let Some(number) = entry.file_name().to_str().and_then(number_of) {
                found.push((number, entry.metadata()?.len()));
            }
        }
        found.sort_unstable();
        let released = dir.join(RELEASED).try_exists()?;
        let first = found.first().filter(|_| released).map_or(0, |(number, _)| *number);
        let mut len = first * SPOOL_SEGMENT;
        for (number, size) in found {
            if number * SPOOL_SEGMENT != len {
                break;
            }
            len += size.min(SPOOL_SEGMENT);
        }
        Ok(Self::new(dir, first, len))
    }

    /// After a power cut a file system may give files a length whose end it never wrote: that reads as zeros, and counts no
    /// more. Files are left closed: there may be many of them.
    pub(super) fn forget_zeros(&self) -> io::Result<()> {
        let first = self.files().first;
        while let Some(last) = self.len().checked_sub(1).map(|last| last / SPOOL_SEGMENT).filter(|last| *last >= first)
        {
            let start = last * SPOOL_SEGMENT;
            let mut bytes = vec![0; (self.len() - start) as usize];
            File::open(self.path(last))?.read_exact_at(&mut bytes, 0)?;
            let written = super::written(&bytes) as u64;
            self.len.store(start + written, Ordering::Release);
            if written > 0 {
                break;
            }
        }
        Ok(())
    }

    fn files(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// True once after files were made: their names are not durable.
    pub(super) fn take_made(&self) -> bool {
        self.made.swap(false, Ordering::AcqRel)
    }

    /// Appends, for one caller at a time. A write that fails half-way leaves the log as long as it was.
    pub(super) fn append(&self, bytes: &[u8]) -> io::Result<()> {
        let start = self.len();
        self.write(start, bytes).inspect_err(|_| {
            if let Err(error) = self.cut(start) {
                tracing::error!(%error, "a spool file cannot be cut back after a failed write");
            }
        })
    }

    fn write(&self, mut at: u64, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let file = self.file_to_write(at)?;
            let room = (SPOOL_SEGMENT - at % SPOOL_SEGMENT) as usize;
            let (now, later) = bytes.split_at(bytes.len().min(room));
            file.write_all_at(now, at % SPOOL_SEGMENT)?;
            (at, bytes) = (at + now.len() as u64, later);
        }
        self.len.store(at, Ordering::Release);
        Ok(())
    }

    /// The file that holds this offset. One that begins with it is made anew: what an append left there that failed is
    /// no part of the log.
    fn file_to_write(&self, at: u64) -> io::Result<Arc<File>> {
        let (number, begins) = (at / SPOOL_SEGMENT, at.is_multiple_of(SPOOL_SEGMENT));
        let mut files = self.files();
        if let Some((_, file)) = files.written.as_ref().filter(|(open, _)| *open == number) {
            return Ok(file.clone());
        }
        let mut how = OpenOptions::new();
        let file = how.read(true).write(true).create(true).truncate(begins).mode(0o600).open(self.path(number))?;
        self.made.store(true, Ordering::Release);
        let file = Arc::new(file);
        files.written = Some((number, file.clone()));
        Ok(file)
    }

    fn cut(&self, len: u64) -> io::Result<()> {
        self.files().written = None;
        self.file_to_write(len)?.set_len(len % SPOOL_SEGMENT)
    }

    /// Fills `out` with the bytes from `from` on; all of them lie in the log.
    pub(super) fn read(&self, mut from: u64, mut out: &mut [u8]) -> io::Result<()> {
        while !out.is_empty() {
            let room = (SPOOL_SEGMENT - from % SPOOL_SEGMENT) as usize;
            let (now, later) = out.split_at_mut(room.min(out.len()));
            match self.file_to_read(from / SPOOL_SEGMENT)? {
                Some(file) => file.read_exact_at(now, from % SPOOL_SEGMENT)?,
                None => lost(from, now),
            }
            (from, out) = (from + now.len() as u64, later);
        }
        Ok(())
    }

    fn file_to_read(&self, number: u64) -> io::Result<Option<Arc<File>>> {
        let mut files = self.files();
        if number < files.first {
            return Ok(None);
        }
        let open = [&files.written, &files.read];
        if let Some((_, file)) = open.into_iter().flatten().find(|(open, _)| *open == number) {
            return Ok(Some(file.clone()));
        }
        let file = Arc::new(File::open(self.path(number))?);
        files.read = Some((number, file.clone()));
        Ok(Some(file))
    }

    /// Makes durable what was appended before the call, file by file with `sync`; returns how much that is. A file that
    /// cannot be opened is no sync that failed.
    pub(super) fn sync(&self, sync: impl Fn(&File) -> io::Result<()>) -> io::Result<u64> {
        let len = self.len();
        let mut at = self.synced.load(Ordering::Acquire);
        while at < len {
            if let Some(file) = self.file_to_read(at / SPOOL_SEGMENT)? {
                sync(&file)?;
            }
            at = (at / SPOOL_SEGMENT + 1) * SPOOL_SEGMENT;
        }
        self.synced.fetch_max(len, Ordering::AcqRel);
        Ok(len)
    }

    /// True if whole files lie far enough behind what the orchestrator has.
    pub(super) fn can_release(&self, durable: u64, keep: u64) -> bool {
        self.files().deleted < self.releasable(durable, keep)
    }

    /// Deletes those files, the first one first: what a crash or an error leaves has no hole.
    pub(super) fn release(&self, durable: u64, keep: u64) -> io::Result<()> {
        let upto = self.releasable(durable, keep);
        let from = {
            let mut files = self.files();
            files.first = files.first.max(upto);
            files.deleted
        };
        if from == 0 && upto > 0 {
            File::create(self.dir.join(RELEASED))?;
        }
        for number in from..upto {
            match fs::remove_file(self.path(number)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => self.files().deleted = number + 1,
            }
        }
        Ok(())
    }

    fn releasable(&self, durable: u64, keep: u64) -> u64 {
        durable.min(self.len()).saturating_sub(keep) / SPOOL_SEGMENT
    }

    fn path(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{NAME}{number}"))
    }
}

fn number_of(name: &str) -> Option<u64> {
    let number = name.strip_prefix(NAME)?.parse().ok()?;
    (number <= NUMBER_MAX && name == format!("{NAME}{number}")).then_some(number)
}

/// The text that stands for lost bytes, from this offset of the log on.
fn lost(from: u64, out: &mut [u8]) {
    let skip = (from % LOST.len() as u64) as usize;
    for (to, byte) in out.iter_mut().zip(LOST.iter().cycle().skip(skip)) {
        *to = *byte;
    }
}
