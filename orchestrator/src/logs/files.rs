//! S: logs as files, their newest bytes in memory.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use alloy_shared::id::{AttemptRef, Digest};
use alloy_shared::limits;
use alloy_shared::room::{is_full, is_short};
use bytes::Bytes;

use super::{LogError, news, zeros};
use crate::blobs::{free_bytes, off_thread};
use crate::broken::{Broken, Care};
use crate::sums::{BLOCK, Seal, Sums};

/// Copied rather than kept as a slice of the network's buffer.
const SMALL: usize = 4 << 10;

#[derive(Debug)]
pub struct Files {
    root: PathBuf,
    care: Care,
    open: Mutex<HashMap<AttemptRef, Arc<Log>>>,
    /// Logs without an end that this process has written to: their zeros are their own.
    written: Mutex<HashSet<AttemptRef>>,
    clock: AtomicU64,
}

#[derive(Debug)]
struct Log {
    at: AttemptRef,
    path: PathBuf,
    /// Raised with every use; the least one is closed first.
    used: AtomicU64,
    loaded: AtomicBool,
    dirty: AtomicBool,
    /// What the disk has is not known: of no use until a restart.
    broken: AtomicBool,
    /// Told of every fault of the disk but a full one.
    disk_broken: Broken,
    /// Held while the disk is asked: a fault is told to one caller only, who must settle it before the next one asks.
    /// Taken before `pen`.
    disk: Mutex<()>,
    pen: Mutex<Pen>,
    view: Mutex<View>,
}

/// The writer's side. Held while bytes go into the page cache.
#[derive(Debug, Default)]
struct Pen {
    file: Option<Arc<File>>,
    len: u64,
    durable: u64,
    sealed: bool,
    /// Neither the file's name nor its directory's is durable yet.
    fresh: bool,
    /// From here on what an earlier process left is zeros.
    zeros_from: Option<u64>,
}

impl Pen {
    /// What lies before them was durable when the log was opened.
    fn cut_zeros(&mut self) -> io::Result<()> {
        if let Some((end, file)) = self.zeros_from.filter(|_| !self.sealed).zip(self.file.as_ref()) {
            file.set_len(end)?;
            (self.len, self.durable, self.zeros_from) = (end, end, None);
        }
        Ok(())
    }
}

/// The readers' side. Never held across a call to the system.
#[derive(Debug, Default)]
struct View {
    file: Option<Arc<File>>,
    len: u64,
    ring: VecDeque<Bytes>,
    ring_len: u64,
    seal: Option<Arc<Seal>>,
    /// The block of a sealed log that was read and checked last.
    block: Option<(u64, Bytes)>,
}

fn fault(what: &'static str) -> impl Fn(io::Error) -> LogError {
    move |error| if is_full(&error) { LogError::Full } else { LogError::Io { what, error } }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Files {
    pub fn open(root: PathBuf, care: impl Into<Care>) -> Result<Self, LogError> {
        fs::create_dir_all(&root).map_err(fault("create the log directory"))?;
        Ok(Self {
            root,
            care: care.into(),
            open: Mutex::default(),
            written: Mutex::default(),
            clock: AtomicU64::new(0),
        })
    }

    /// As if others had been used since.
    #[cfg(test)]
    pub(super) fn close(&self, at: &AttemptRef) {
        lock(&self.open).remove(at);
    }

    /// How many logs are held open.
    pub fn open_count(&self) -> usize {
        lock(&self.open).len()
    }

    /// The log, its length read from the disk if it was not open.
    async fn log(&self, at: &AttemptRef) -> Result<Arc<Log>, LogError> {
        let log = {
            let mut open = lock(&self.open);
            if open.len() >= limits::LOG_FILES_OPEN && !open.contains_key(at) {
                close_oldest(&mut open);
            }
            let path = self.root.join(at.job.to_string()).join(format!("{}.log", at.attempt));
            open.entry(*at).or_insert_with(|| Arc::new(Log::new(*at, path, self.care.broken.clone()))).clone()
        };
        log.used.store(self.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        log.check()?;
        if log.loaded.load(Ordering::Acquire) {
            return Ok(log);
        }
        let own = lock(&self.written).contains(at);
        off_thread(move || log.load(own).map(|()| log)).await
    }

    pub(super) async fn append(&self, at: &AttemptRef, offset: u64, bytes: Bytes) -> Result<u64, LogError> {
        let log = self.log(at).await?;
        let mut pen = lock(&log.pen);
        log.check()?;
        if pen.sealed {
            return Err(LogError::Sealed);
        }
        pen.cut_zeros().map_err(fault("cut the zeros off a log"))?;
        let news = news(pen.len, offset, &bytes)?;
        if news.is_empty() {
            return Ok(pen.len);
        }
        if free_bytes(&self.root).map_err(fault("look at the disk's free space"))? < self.care.reserve {
            return Err(LogError::Full);
        }
        let file = match &pen.file {
            Some(file) => file.clone(),
            None => {
                let file = Arc::new(create(&self.root, &log.path).map_err(fault("create a log"))?);
                pen.fresh = true;
                pen.file.insert(file).clone()
            }
        };
        file.write_all_at(&news, pen.len).map_err(|error| log.fails("append to a log", error))?;
        pen.len += news.len() as u64;
        lock(&self.written).insert(*at);
        log.dirty.store(true, Ordering::Release);
        let share = limits::LOG_RINGS_MAX / lock(&self.open).len().max(1) as u64;
        lock(&log.view).push(file, pen.len, news, share.min(limits::LOG_RING));
        Ok(pen.len)
    }

    pub(super) async fn sync(&self) -> Result<Vec<(AttemptRef, u64)>, LogError> {
        let dirty: Vec<Arc<Log>> =
            lock(&self.open).values().filter(|log| log.dirty.swap(false, Ordering::AcqRel)).cloned().collect();
        if dirty.is_empty() {
            return Ok(Vec::new());
        }
        let rounds: Vec<_> = off_thread(move || dirty.iter().map(|log| (log.at, log.sync())).collect()).await;
        let mut durable = Vec::new();
        for (at, round) in rounds {
            // With an error the round is made again, for those that it settled too.
            durable.extend(round.map_err(fault("sync a log"))?.map(|len| (at, len)));
        }
        Ok(durable)
    }

    pub(super) async fn read(&self, at: &AttemptRef, from: u64, max: u32) -> Result<Vec<Bytes>, LogError> {
        let log = self.log(at).await?;
        let (file, seal, len) = {
            let view = lock(&log.view);
            if from >= view.len || max == 0 {
                return Ok(Vec::new());
            }
            if from >= view.len - view.ring_len {
                return Ok(view.tail(from, max));
            }
            if let Some((start, block)) = &view.block
                && let Some(at) = from.checked_sub(*start).filter(|at| *at < block.len() as u64)
            {
                return Ok(vec![cut(block, at, max)]);
            }
            (view.file.clone(), view.seal.clone(), view.len)
        };
        let Some(file) = file else { return Ok(Vec::new()) };
        let Some(seal) = seal else {
            let len = (len - from).min(u64::from(max)).min(BLOCK) as usize;
            let bytes = off_thread(move || read_at(&file, from, len)).await;
            return bytes.map(|bytes| vec![bytes]).map_err(fault("read a log"));
        };
        let range = seal.block(from / BLOCK);
        let (start, size) = (range.start, (range.end - range.start) as usize);
        let bytes =
            off_thread(move || read_at(&file, start, size).map(|bytes| (seal.fits(start / BLOCK, &bytes), bytes)));
        match bytes.await.map_err(fault("read a log"))? {
            (false, _) => Err(LogError::Damaged { from: range.start, to: range.end }),
            (true, bytes) => {
                lock(&log.view).block = Some((start, bytes.clone()));
                Ok(vec![cut(&bytes, from - start, max)])
            }
        }
    }

    pub(super) async fn len(&self, at: &AttemptRef) -> Result<u64, LogError> {
        let log = self.log(at).await?;
        let len = lock(&log.view).len;
        Ok(len)
    }

    pub(super) async fn durable(&self, at: &AttemptRef) -> Result<u64, LogError> {
        let log = self.log(at).await?;
        let pen = lock(&log.pen);
        Ok(pen.zeros_from.unwrap_or(pen.durable))
    }

    pub(super) async fn resume(&self, at: &AttemptRef) -> Result<u64, LogError> {
        let log = self.log(at).await?;
        let mut pen = lock(&log.pen);
        pen.cut_zeros().map_err(fault("cut the zeros off a log"))?;
        Ok(pen.durable)
    }

    pub(super) async fn keep(&self, at: &AttemptRef, len: u64) -> Result<(), LogError> {
        let log = self.log(at).await?;
        let file = lock(&log.pen).file.clone();
        let Some(file) = file else { return Ok(()) };
        let kept = off_thread(move || zeros::keep(&file, &log.path, len)).await;
        kept.map_err(fault("note how long a log is"))
    }

    pub(super) async fn remove(&self, at: &AttemptRef) -> Result<(), LogError> {
        lock(&self.open).remove(at);
        lock(&self.written).remove(at);
        let dir = self.root.join(at.job.to_string());
        let name = at.attempt.to_string();
        let gone = off_thread(move || {
            // Without its seal the file is a log like any other, so a crash in between leaves nothing that is wrong.
            for end in ["seal.new", "seal", "whole.new", "whole", "log"] {
                match fs::remove_file(dir.join(format!("{name}.{end}"))) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    Ok(()) | Err(_) => {}
                }
            }
            // The last of its job's logs takes the directory with it.
            let _ = fs::remove_dir(&dir);
            Ok(())
        });
        gone.await.map_err(fault("remove a log"))
    }

    pub(super) async fn seal(&self, at: &AttemptRef) -> Result<Digest, LogError> {
        let log = self.log(at).await?;
        let root = self.root.clone();
        let sealed = off_thread(move || log.seal(&root)).await?;
        lock(&self.written).remove(at);
        Ok(sealed)
    }
}

/// Closes the log that was used longest ago. One that is in use, not yet synced or broken stays.
fn close_oldest(open: &mut HashMap<AttemptRef, Arc<Log>>) {
    let busy = |log: &Log| log.dirty.load(Ordering::Acquire) || log.broken.load(Ordering::Acquire);
    let idle = open.values().filter(|log| Arc::strong_count(log) == 1 && !busy(log));
    if let Some(at) = idle.min_by_key(|log| log.used.load(Ordering::Relaxed)).map(|log| log.at) {
        open.remove(&at);
    }
}

/// The names become durable with the first sync of the bytes, so that the first byte waits for no disk.
fn create(root: &Path, path: &Path) -> io::Result<File> {
    fs::create_dir_all(path.parent().unwrap_or(root))?;
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

pub(super) fn read_at(file: &File, from: u64, len: usize) -> io::Result<Bytes> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, from)?;
    Ok(bytes.into())
}

fn cut(bytes: &Bytes, from: u64, max: u32) -> Bytes {
    let from = from as usize;
    bytes.slice(from..bytes.len().min(from.saturating_add(max as usize)))
}

impl Log {
    fn new(at: AttemptRef, path: PathBuf, disk_broken: Broken) -> Self {
        Self {
            at,
            path,
            used: AtomicU64::new(0),
            loaded: AtomicBool::new(false),
            dirty: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            disk_broken,
            disk: Mutex::default(),
            pen: Mutex::default(),
            view: Mutex::default(),
        }
    }

    fn check(&self) -> Result<(), LogError> {
        match self.broken.load(Ordering::Acquire) {
            true => Err(fault("use a log")(io::Error::other("what the disk has of it is unknown until a restart"))),
            false => Ok(()),
        }
    }

    /// A write that failed.
    fn fails(&self, what: &'static str, error: io::Error) -> LogError {
        if !is_full(&error) && !is_short(&error) {
            self.disk_broken.tell(what, &error);
        }
        fault(what)(error)
    }

    fn seal_path(&self) -> PathBuf {
        self.path.with_extension("seal")
    }

    /// `own`: this process has written to it and closed it since.
    fn load(&self, own: bool) -> Result<(), LogError> {
        let mut pen = lock(&self.pen);
        if self.loaded.load(Ordering::Acquire) {
            return Ok(());
        }
        let seal = match fs::read(self.seal_path()) {
            Ok(bytes) => Some(Seal::decode(&bytes).ok_or(LogError::Damaged { from: 0, to: 0 })?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(fault("read a log's seal")(error)),
        };
        match OpenOptions::new().read(true).write(seal.is_none()).open(&self.path) {
            Ok(file) => {
                pen.len = file.metadata().map_err(fault("look at a log"))?.len();
                if seal.is_none() {
                    // Bytes and the name of a file of a process that died may still be on their way to the disk.
                    let homes = self.homes().map_err(fault("open a log's directory"))?;
                    let synced = file.sync_data().and_then(|()| homes.iter().try_for_each(File::sync_all));
                    synced.map_err(|error| {
                        // The disk tells of a fault once: the next try would succeed, whatever was lost.
                        self.broken.store(true, Ordering::Release);
                        self.disk_broken.tell("sync a log", &error);
                        fault("sync a log")(error)
                    })?;
                }
                pen.file = Some(Arc::new(file));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(fault("open a log")(error)),
        }
        if let Some(seal) = seal.as_ref().filter(|seal| seal.len != pen.len) {
            return Err(LogError::Damaged { from: pen.len.min(seal.len), to: seal.len.max(pen.len) });
        }
        pen.durable = pen.len;
        pen.sealed = seal.is_some();
        // After a power cut a file system may give a file a length whose last bytes it never wrote.
        let written = match pen.file.as_deref().filter(|_| !own && !pen.sealed) {
            Some(file) => zeros::begin(file, &self.path, pen.len).map_err(fault("look at a log's end"))?,
            None => pen.len,
        };
        pen.zeros_from = Some(written).filter(|written| *written < pen.len);
        let mut view = lock(&self.view);
        (view.file, view.len, view.seal) = (pen.file.clone(), written, seal.map(Arc::new));
        self.loaded.store(true, Ordering::Release);
        Ok(())
    }

    /// The directories that have the names of the file and of its job's directory.
    fn homes(&self) -> io::Result<Vec<File>> {
        self.path.ancestors().skip(1).take(2).map(File::open).collect()
    }

    /// Returns the durable length; nothing of a log that fell back. An error: nothing was tried.
    fn sync(&self) -> io::Result<Option<u64>> {
        match self.settle() {
            Ok(durable) => Ok(Some(durable)),
            Err(error) => {
                tracing::error!(job.id = %self.at.job, attempt.no = self.at.attempt, %error, "a log did not reach the disk");
                if is_short(&error) { Err(error) } else { Ok(None) }
            }
        }
    }

    /// Makes durable what was appended before the call. After a failed sync nobody knows which of the bytes since the
    /// last one the disk has, so they count as never written: the worker still holds them and sends them again.
    fn settle(&self) -> io::Result<u64> {
        let _turn = lock(&self.disk);
        let (file, len, fresh) = {
            let pen = lock(&self.pen);
            let Some(file) = pen.file.clone().filter(|_| pen.durable < pen.len) else { return Ok(pen.durable) };
            (file, pen.len, pen.fresh)
        };
        let homes = match fresh.then(|| self.homes()).transpose() {
            Err(error) if is_short(&error) => {
                // Nothing was asked of the disk: the bytes wait for the next round.
                self.dirty.store(true, Ordering::Release);
                return Err(error);
            }
            homes => homes,
        };
        let done = homes.and_then(|homes| {
            file.sync_data()?;
            homes.iter().flatten().try_for_each(File::sync_all)
        });
        let mut pen = lock(&self.pen);
        let Err(error) = done else {
            pen.durable = pen.durable.max(len);
            pen.fresh = false;
            return Ok(pen.durable);
        };
        self.disk_broken.tell("sync a log", &error);
        // The file's length is what a restart believes.
        if let Err(error) = file.set_len(pen.durable).and_then(|()| file.sync_all()) {
            tracing::error!(job.id = %self.at.job, attempt.no = self.at.attempt, %error, "a log is out of use until a restart");
            self.broken.store(true, Ordering::Release);
        }
        pen.len = pen.durable;
        let mut view = lock(&self.view);
        *view = View { file: view.file.take(), len: pen.len, ..View::default() };
        Err(error)
    }

    /// The whole log goes to the disk and through the hash while appends and readers go on; what came meanwhile follows.
    fn seal(&self, root: &Path) -> Result<Digest, LogError> {
        let failed = fault("seal a log");
        let mut sums = Sums::default();
        loop {
            self.settle().map_err(&failed)?;
            let (file, len) = {
                let mut pen = lock(&self.pen);
                self.check()?;
                if let Some(seal) = &lock(&self.view).seal {
                    return Ok(seal.sha256);
                }
                let file = match &pen.file {
                    Some(file) => file.clone(),
                    None => {
                        let file = Arc::new(create(root, &self.path).map_err(&failed)?);
                        pen.fresh = true;
                        pen.file.insert(file).clone()
                    }
                };
                (file, pen.len)
            };
            hash(&mut sums, &file, len).map_err(&failed)?;
            let mut pen = lock(&self.pen);
            self.check()?;
            if let Some(seal) = &lock(&self.view).seal {
                return Ok(seal.sha256);
            }
            if pen.len < sums.so_far() {
                // A failed sync took some of it back.
                sums = Sums::default();
            } else if (pen.len, pen.durable) == (sums.so_far(), pen.len) {
                let seal = sums.seal();
                self.write_seal(&file, &seal).map_err(|error| self.fails("seal a log", error))?;
                let sha256 = seal.sha256;
                (pen.sealed, pen.zeros_from) = (true, None);
                self.dirty.store(false, Ordering::Release);
                *lock(&self.view) =
                    View { file: Some(file), len: pen.len, seal: Some(Arc::new(seal)), ..View::default() };
                return Ok(sha256);
            }
        }
    }

    fn write_seal(&self, file: &File, seal: &Seal) -> io::Result<()> {
        // An append that failed half-way leaves the file longer than the log.
        if file.metadata()?.len() != seal.len {
            file.set_len(seal.len)?;
            file.sync_all()?;
        }
        zeros::replace(&self.seal_path(), &seal.encode())?;
        // What has no bytes was never synced.
        if seal.len == 0 { self.homes()?.iter().try_for_each(File::sync_all) } else { Ok(()) }
    }
}

fn hash(sums: &mut Sums, file: &File, to: u64) -> io::Result<()> {
    while sums.so_far() < to {
        let len = (to - sums.so_far()).min(BLOCK) as usize;
        sums.update(&read_at(file, sums.so_far(), len)?);
    }
    Ok(())
}

impl View {
    fn push(&mut self, file: Arc<File>, len: u64, bytes: Bytes, share: u64) {
        self.file = Some(file);
        self.len = len;
        self.ring_len += bytes.len() as u64;
        self.ring.push_back(if bytes.len() < SMALL { Bytes::copy_from_slice(&bytes) } else { bytes });
        while self.ring_len > share || self.ring.len() > limits::LOG_RING_CHUNKS {
            let Some(old) = self.ring.pop_front() else { break };
            self.ring_len -= old.len() as u64;
        }
    }

    /// From the ring; `from` lies in it.
    fn tail(&self, from: u64, max: u32) -> Vec<Bytes> {
        // Followers are near the end, so the search begins there.
        let mut start = self.len;
        let mut index = self.ring.len();
        while start > from && index > 0 {
            index -= 1;
            start -= self.ring[index].len() as u64;
        }
        let mut skip = from - start;
        let mut room = max;
        let mut out = Vec::new();
        for chunk in self.ring.range(index..) {
            let part = cut(chunk, skip, room);
            skip = 0;
            room -= part.len() as u32;
            out.push(part);
            if room == 0 {
                break;
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use alloy_shared::id::JobId;

    use super::*;

    #[tokio::test]
    async fn a_log_whose_file_cannot_be_put_right_is_out_of_use() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::open(dir.path().to_owned(), 0).unwrap();
        let at = AttemptRef { job: JobId::from_raw(1), attempt: 1 };
        files.append(&at, 0, Bytes::from_static(b"kept")).await.unwrap();
        files.sync().await.unwrap();
        files.append(&at, 4, Bytes::from_static(b"lost")).await.unwrap();
        let log = files.log(&at).await.unwrap();
        // A file that can neither be synced nor cut.
        lock(&log.pen).file = Some(Arc::new(OpenOptions::new().write(true).open("/dev/null").unwrap()));
        drop(log);
        assert!(files.sync().await.unwrap().is_empty());
        assert!(files.read(&at, 0, 10).await.is_err());
        assert!(files.append(&at, 4, Bytes::from_static(b"lost")).await.is_err());
        assert!(files.durable(&at).await.is_err() && files.seal(&at).await.is_err());
        close_oldest(&mut lock(&files.open));
        assert_eq!(files.open_count(), 1);
    }
}
