//! S: logs as files, their newest bytes in memory.

use std::collections::{HashMap, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use alloy_shared::id::{AttemptRef, Digest};
use alloy_shared::limits;
use bytes::Bytes;

use super::{LogError, news};
use crate::blobs::{free_bytes, is_full, make_dirs, off_thread, sync_dir};
use crate::sums::{BLOCK, Seal, Sums};

/// Copied rather than kept as a slice of the network's buffer.
const SMALL: usize = 4 << 10;

#[derive(Debug)]
pub struct Files {
    root: PathBuf,
    floor: u64,
    open: Mutex<HashMap<AttemptRef, Arc<Log>>>,
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
    /// The file's name is not durable yet.
    fresh: bool,
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
    pub fn open(root: PathBuf, floor: u64) -> Result<Self, LogError> {
        fs::create_dir_all(&root).map_err(fault("create the log directory"))?;
        Ok(Self { root, floor, open: Mutex::default(), clock: AtomicU64::new(0) })
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
            open.entry(*at).or_insert_with(|| Arc::new(Log::new(*at, path))).clone()
        };
        log.used.store(self.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        if log.loaded.load(Ordering::Acquire) {
            return Ok(log);
        }
        off_thread(move || log.load().map(|()| log)).await
    }

    pub(super) async fn append(&self, at: &AttemptRef, offset: u64, bytes: Bytes) -> Result<u64, LogError> {
        let log = self.log(at).await?;
        let mut pen = lock(&log.pen);
        if pen.sealed {
            return Err(LogError::Sealed);
        }
        let news = news(pen.len, offset, &bytes)?;
        if news.is_empty() {
            return Ok(pen.len);
        }
        if free_bytes(&self.root).map_err(fault("look at the disk's free space"))? < self.floor {
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
        file.write_all_at(&news, pen.len).map_err(fault("append to a log"))?;
        pen.len += news.len() as u64;
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
        Ok(off_thread(move || dirty.iter().filter_map(|log| Some((log.at, log.sync()?))).collect()).await)
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
        let durable = lock(&log.pen).durable;
        Ok(durable)
    }

    pub(super) async fn seal(&self, at: &AttemptRef) -> Result<Digest, LogError> {
        let log = self.log(at).await?;
        let root = self.root.clone();
        off_thread(move || log.seal(&root)).await
    }
}

/// Closes the log that was used longest ago. One that is in use or not yet synced stays.
fn close_oldest(open: &mut HashMap<AttemptRef, Arc<Log>>) {
    let idle = open.values().filter(|log| Arc::strong_count(log) == 1 && !log.dirty.load(Ordering::Acquire));
    if let Some(at) = idle.min_by_key(|log| log.used.load(Ordering::Relaxed)).map(|log| log.at) {
        open.remove(&at);
    }
}

fn create(root: &Path, path: &Path) -> io::Result<File> {
    make_dirs(root, path.parent().unwrap_or(root))?;
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

fn read_at(file: &File, from: u64, len: usize) -> io::Result<Bytes> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, from)?;
    Ok(bytes.into())
}

fn cut(bytes: &Bytes, from: u64, max: u32) -> Bytes {
    let from = from as usize;
    bytes.slice(from..bytes.len().min(from.saturating_add(max as usize)))
}

impl Log {
    fn new(at: AttemptRef, path: PathBuf) -> Self {
        Self {
            at,
            path,
            used: AtomicU64::new(0),
            loaded: AtomicBool::new(false),
            dirty: AtomicBool::new(false),
            pen: Mutex::default(),
            view: Mutex::default(),
        }
    }

    fn seal_path(&self) -> PathBuf {
        self.path.with_extension("seal")
    }

    fn load(&self) -> Result<(), LogError> {
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
                    // Bytes of a process that died may still be on their way to the disk.
                    file.sync_data().map_err(fault("sync a log"))?;
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
        let mut view = lock(&self.view);
        (view.file, view.len, view.seal) = (pen.file.clone(), pen.len, seal.map(Arc::new));
        self.loaded.store(true, Ordering::Release);
        Ok(())
    }

    /// Returns the durable length. After a failed sync nobody knows which of the bytes since the last one the disk has,
    /// so they count as never written: the worker still holds them and sends them again.
    fn sync(&self) -> Option<u64> {
        let (file, len, fresh) = {
            let pen = lock(&self.pen);
            (pen.file.clone()?, pen.len, pen.fresh)
        };
        let dir = self.path.parent().filter(|_| fresh);
        let done = file.sync_data().and_then(|()| dir.map_or(Ok(()), sync_dir));
        let mut pen = lock(&self.pen);
        match done {
            Ok(()) => {
                pen.durable = pen.durable.max(len);
                pen.fresh = false;
                Some(pen.durable)
            }
            Err(error) => {
                tracing::error!(job.id = %self.at.job, attempt.no = self.at.attempt, %error, "a log did not reach the disk");
                pen.len = pen.durable;
                let mut view = lock(&self.view);
                *view = View { file: view.file.take(), len: pen.len, ..View::default() };
                None
            }
        }
    }

    fn seal(&self, root: &Path) -> Result<Digest, LogError> {
        let mut pen = lock(&self.pen);
        if let Some(seal) = &lock(&self.view).seal {
            return Ok(seal.sha256);
        }
        let done = (|| {
            let file = match &pen.file {
                Some(file) => file.clone(),
                None => Arc::new(create(root, &self.path)?),
            };
            // After a failed sync the file may be longer than the log.
            file.set_len(pen.len)?;
            file.sync_all()?;
            let mut sums = Sums::default();
            while sums.so_far() < pen.len {
                let len = (pen.len - sums.so_far()).min(BLOCK) as usize;
                sums.update(&read_at(&file, sums.so_far(), len)?);
            }
            let seal = sums.seal();
            let temp = self.path.with_extension("seal.new");
            let text = File::create(&temp)?;
            text.write_all_at(&seal.encode(), 0)?;
            text.sync_all()?;
            fs::rename(&temp, self.seal_path())?;
            sync_dir(self.path.parent().unwrap_or(root))?;
            Ok((file, seal))
        })();
        let (file, seal) = done.map_err(fault("seal a log"))?;
        let sha256 = seal.sha256;
        (pen.sealed, pen.durable) = (true, pen.len);
        self.dirty.store(false, Ordering::Release);
        *lock(&self.view) = View { file: Some(file), len: pen.len, seal: Some(Arc::new(seal)), ..View::default() };
        Ok(sha256)
    }
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
