//! P: logs in memory, with the same rules.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use alloy_shared::id::{AttemptRef, Digest};
use alloy_shared::mem_disk::MemDisk;
use bytes::Bytes;

use super::{LogError, news};

/// Its clones are the same logs.
#[derive(Debug, Clone, Default)]
pub struct Mem {
    logs: Arc<Mutex<BTreeMap<AttemptRef, Log>>>,
    disk: Arc<MemDisk>,
}

#[derive(Debug, Default)]
struct Log {
    bytes: Vec<u8>,
    durable: u64,
    sealed: bool,
    /// From here on what was found when it was opened is zeros.
    zeros_from: Option<u64>,
    /// Before here they are the log's own.
    whole: u64,
}

impl Log {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn shown(&self) -> u64 {
        self.zeros_from.unwrap_or(self.len())
    }

    fn cut_zeros(&mut self) {
        if let Some(end) = self.zeros_from.take() {
            self.bytes.truncate(end as usize);
            self.durable = self.durable.min(end);
        }
    }

    fn find_zeros(&mut self) {
        let written = self.bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u64 + 1);
        let written = written.max(self.whole);
        self.zeros_from = Some(written).filter(|written| !self.sealed && *written < self.len());
    }
}

impl Mem {
    pub fn on(disk: Arc<MemDisk>) -> Self {
        Self { logs: Arc::default(), disk }
    }

    /// What a process finds that starts on this disk: opening a log makes durable what an earlier process wrote.
    pub fn reopen(&self) {
        for log in self.lock().values_mut() {
            log.durable = log.len();
            log.find_zeros();
        }
    }

    /// What a power cut leaves: of the bytes that were not synced, as many as `keep` says. The second half of them was
    /// never written and reads as zeros.
    pub fn cut_power(&self, mut keep: impl FnMut(u64) -> u64) {
        for log in self.lock().values_mut() {
            let unsynced = log.len() - log.durable;
            let kept = if unsynced > 0 { keep(unsynced).min(unsynced) } else { 0 };
            log.bytes.truncate((log.durable + kept) as usize);
            let written = log.bytes.len() - (kept / 2) as usize;
            log.bytes[written..].fill(0);
            log.find_zeros();
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<AttemptRef, Log>> {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn append(&self, at: &AttemptRef, offset: u64, bytes: &Bytes) -> Result<u64, LogError> {
        let mut logs = self.lock();
        let log = logs.entry(*at).or_default();
        if log.sealed {
            return Err(LogError::Sealed);
        }
        log.cut_zeros();
        let news = news(log.len(), offset, bytes)?;
        if !news.is_empty() {
            self.disk.room().map_err(|_| LogError::Full)?;
        }
        log.bytes.extend_from_slice(&news);
        Ok(log.len())
    }

    pub(super) async fn sync(&self) -> Vec<(AttemptRef, u64)> {
        let grown = |(at, log): (&AttemptRef, &Log)| (log.durable < log.len()).then(|| (*at, log.len()));
        let dirty: Vec<(AttemptRef, u64)> = self.lock().iter().filter_map(grown).collect();
        if dirty.is_empty() {
            return dirty;
        }
        let synced = self.disk.sync().await.is_ok();
        let mut logs = self.lock();
        dirty.into_iter().filter_map(|(at, len)| Some((at, logs.get_mut(&at)?.settle(len, synced)?))).collect()
    }

    pub(super) fn read(&self, at: &AttemptRef, from: u64, max: u32) -> Vec<Bytes> {
        let logs = self.lock();
        let shown = logs.get(at).map(|log| &log.bytes[..log.shown() as usize]).unwrap_or_default();
        let rest = usize::try_from(from).ok().and_then(|from| shown.get(from..)).unwrap_or_default();
        let part = &rest[..rest.len().min(max as usize)];
        if part.is_empty() { Vec::new() } else { vec![Bytes::copy_from_slice(part)] }
    }

    pub(super) fn len(&self, at: &AttemptRef) -> u64 {
        self.lock().get(at).map_or(0, Log::shown)
    }

    pub(super) fn durable(&self, at: &AttemptRef) -> u64 {
        self.lock().get(at).map_or(0, |log| log.zeros_from.unwrap_or(u64::MAX).min(log.durable))
    }

    pub(super) fn resume(&self, at: &AttemptRef) -> u64 {
        let mut logs = self.lock();
        let Some(log) = logs.get_mut(at) else { return 0 };
        log.cut_zeros();
        log.durable
    }

    pub(super) fn keep(&self, at: &AttemptRef, len: u64) {
        if let Some(log) = self.lock().get_mut(at) {
            log.whole = log.whole.max(len);
        }
    }

    pub(super) fn remove(&self, at: &AttemptRef) {
        self.lock().remove(at);
    }

    pub(super) async fn seal(&self, at: &AttemptRef) -> Result<Digest, LogError> {
        loop {
            let len = self.lock().get(at).map_or(0, Log::len);
            let synced = self.disk.sync().await;
            let mut logs = self.lock();
            let log = logs.entry(*at).or_default();
            log.settle(len, synced.is_ok());
            synced.map_err(|error| LogError::Io { what: "seal a log", error })?;
            // What came meanwhile belongs to it and is synced first.
            if log.len() == len {
                (log.sealed, log.zeros_from) = (true, None);
                return Ok(Digest::of(&log.bytes));
            }
        }
    }
}

impl Log {
    /// Takes the end of a sync of the first `len` bytes. After one that failed, what it was for counts as never written.
    fn settle(&mut self, len: u64, synced: bool) -> Option<u64> {
        if !synced {
            self.bytes.truncate(self.durable as usize);
            return None;
        }
        self.durable = self.durable.max(len.min(self.len()));
        Some(self.durable)
    }
}
