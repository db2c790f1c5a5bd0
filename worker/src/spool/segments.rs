//! S: one attempt's log on disk, in files of equal size: its beginning can be given up while its end still grows.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::disk::open_rw;

/// Small enough that a flood's memory is used again and again, large enough that making a file costs nothing.
pub(super) const SEGMENT: u64 = 8 << 20;
/// Acknowledged bytes that stay all the same: an orchestrator whose disk was put back to an earlier state gets them again.
pub(super) const KEEP: u64 = 64 << 20;
/// What stands for bytes that were given up and are asked for again. The log keeps its length, and the job its result.
const LOST: &[u8] = b"[alloy: the farm had stored this part of the log and lost it]\n";
const NAME: &str = "log.";

#[derive(Debug)]
pub(super) struct Segments {
    dir: PathBuf,
    files: Mutex<Files>,
    len: AtomicU64,
    /// So much is on disk.
    synced: AtomicU64,
}

#[derive(Debug, Default)]
struct Files {
    /// The number of the first one.
    first: u64,
    open: VecDeque<Arc<File>>,
}

impl Segments {
    pub(super) fn create(dir: &Path) -> io::Result<Self> {
        let files = Files { first: 0, open: VecDeque::from([Arc::new(open_rw(&path(dir, 0))?)]) };
        Ok(Self { dir: dir.to_owned(), files: Mutex::new(files), len: AtomicU64::new(0), synced: AtomicU64::new(0) })
    }

    /// Opens what an earlier daemon left: the bytes up to the first one that is missing.
    pub(super) fn reopen(dir: &Path) -> io::Result<Self> {
        let mut found: Vec<(u64, u64)> = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let number = entry.file_name().to_str().and_then(|name| name.strip_prefix(NAME)?.parse().ok());
            if let Some(number) = number {
                found.push((number, entry.metadata()?.len()));
            }
        }
        found.sort_unstable();
        let log = Self::create_empty(dir, found.first().map_or(0, |(number, _)| *number));
        let mut whole = true;
        for (number, size) in found {
            let next = log.len() / SEGMENT;
            if !whole || number != next {
                fs::remove_file(path(dir, number))?;
                continue;
            }
            log.files().open.push_back(Arc::new(open_rw(&path(dir, number))?));
            log.len.store(number * SEGMENT + size.min(SEGMENT), Ordering::Release);
            whole = size >= SEGMENT;
        }
        Ok(log)
    }

    fn create_empty(dir: &Path, first: u64) -> Self {
        let files = Files { first, open: VecDeque::new() };
        let len = AtomicU64::new(first * SEGMENT);
        Self { dir: dir.to_owned(), files: Mutex::new(files), len, synced: AtomicU64::new(0) }
    }

    fn files(&self) -> MutexGuard<'_, Files> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// Appends, for one caller at a time. A write that fails half-way leaves the log as long as it was. True: a file was
    /// made, whose name is not durable.
    pub(super) fn append(&self, bytes: &[u8]) -> io::Result<bool> {
        let start = self.len();
        self.write(start, bytes).inspect_err(|_| {
            if let Err(error) = self.cut(start) {
                tracing::error!(%error, "a spool file cannot be cut back after a failed write");
            }
        })
    }

    fn write(&self, mut at: u64, mut bytes: &[u8]) -> io::Result<bool> {
        let mut made = false;
        while !bytes.is_empty() {
            let (file, new) = self.last(at / SEGMENT)?;
            made |= new;
            let room = (SEGMENT - at % SEGMENT) as usize;
            let (now, later) = bytes.split_at(bytes.len().min(room));
            file.write_all_at(now, at % SEGMENT)?;
            (at, bytes) = (at + now.len() as u64, later);
        }
        self.len.store(at, Ordering::Release);
        Ok(made)
    }

    /// The file of this number, the last one or the one to follow it.
    fn last(&self, number: u64) -> io::Result<(Arc<File>, bool)> {
        let mut files = self.files();
        if files.open.is_empty() {
            files.first = number;
        }
        if let Some(file) = files.open.get((number - files.first) as usize) {
            return Ok((file.clone(), false));
        }
        let file = Arc::new(open_rw(&path(&self.dir, number))?);
        files.open.push_back(file.clone());
        Ok((file, true))
    }

    fn cut(&self, len: u64) -> io::Result<()> {
        let mut files = self.files();
        while files.first + files.open.len() as u64 > len / SEGMENT + 1 {
            let number = files.first + files.open.len() as u64 - 1;
            files.open.pop_back();
            fs::remove_file(path(&self.dir, number))?;
        }
        match files.open.back() {
            Some(last) if files.first + files.open.len() as u64 == len / SEGMENT + 1 => last.set_len(len % SEGMENT),
            Some(_) | None => Ok(()),
        }
    }

    /// Fills `out` with the bytes from `from` on; all of them lie in the log.
    pub(super) fn read(&self, mut from: u64, mut out: &mut [u8]) -> io::Result<()> {
        while !out.is_empty() {
            let number = from / SEGMENT;
            let file = {
                let files = self.files();
                number.checked_sub(files.first).map(|index| files.open.get(index as usize).cloned())
            };
            let room = (SEGMENT - from % SEGMENT) as usize;
            let (now, later) = out.split_at_mut(room.min(out.len()));
            match file {
                Some(Some(file)) => file.read_exact_at(now, from % SEGMENT)?,
                Some(None) => return Err(io::ErrorKind::UnexpectedEof.into()),
                None => lost(from, now),
            }
            (from, out) = (from + now.len() as u64, later);
        }
        Ok(())
    }

    /// Makes durable what was appended before the call; returns how much that is.
    pub(super) fn sync(&self) -> io::Result<u64> {
        let len = self.len();
        let synced = self.synced.load(Ordering::Acquire);
        if synced < len {
            let dirty: Vec<_> = {
                let files = self.files();
                let clean = (synced / SEGMENT).saturating_sub(files.first);
                files.open.iter().skip(clean as usize).cloned().collect()
            };
            dirty.iter().try_for_each(|file| file.sync_data())?;
            self.synced.fetch_max(len, Ordering::AcqRel);
        }
        Ok(len)
    }

    /// Lets go of whole files that lie `KEEP` behind what the orchestrator has; the caller deletes the returned ones.
    pub(super) fn release(&self, durable: u64) -> Vec<PathBuf> {
        let upto = durable.min(self.len()).saturating_sub(KEEP);
        let mut files = self.files();
        let mut doomed = Vec::new();
        while (files.first + 1) * SEGMENT <= upto && files.open.pop_front().is_some() {
            doomed.push(path(&self.dir, files.first));
            files.first += 1;
        }
        doomed
    }
}

fn path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{NAME}{number}"))
}

/// The text that stands for lost bytes, from this offset of the log on.
fn lost(from: u64, out: &mut [u8]) {
    let skip = (from % LOST.len() as u64) as usize;
    for (to, byte) in out.iter_mut().zip(LOST.iter().cycle().skip(skip)) {
        *to = *byte;
    }
}
