//! P: the spool in memory, for the simulator. No task, no system call: a crash is survived by whoever holds the value, and
//! what a power cut leaves is what was synced.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use alloy_shared::id::{AttemptRef, Digest};
use alloy_shared::limits;
use alloy_shared::mem_disk::MemDisk;
use alloy_shared::wire::session::{Assignment, Held, Report};
use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;

use super::{Cap, Cut, PIECE, gone, has_result, judge, written};

#[derive(Debug, Clone, Default)]
pub struct Mem {
    entries: Arc<Mutex<BTreeMap<AttemptRef, Entry>>>,
    disk: Arc<MemDisk>,
}

#[derive(Debug)]
struct Entry {
    assignment: Assignment,
    log: Vec<u8>,
    cap: Cap,
    reports: Vec<(u64, Report)>,
    stash: BTreeMap<Digest, Bytes>,
    /// Bytes of the log, and reports, that survive a power cut.
    synced: (usize, usize),
    /// A sync has failed: no later one is believed.
    suspect: bool,
}

impl Entry {
    /// As much of the log as a daemon finds that starts.
    fn found(&self) -> usize {
        if has_result(&self.reports) { self.log.len() } else { written(&self.log) }
    }
}

impl Mem {
    pub fn on(disk: Arc<MemDisk>) -> Self {
        Self { entries: Arc::default(), disk }
    }

    /// What a power cut leaves of what was not synced: as many bytes of each log, and as many reports, as `keep` says. The
    /// second half of those bytes was never written and reads as zeros.
    pub fn cut_power(&self, mut keep: impl FnMut(u64) -> u64) {
        let mut kept = |synced: usize, len: usize| match len - synced {
            0 => len,
            unsynced => synced + (keep(unsynced as u64) as usize).min(unsynced),
        };
        let mut entries = self.entries();
        for entry in entries.values_mut() {
            entry.log.truncate(kept(entry.synced.0, entry.log.len()));
            let unwritten = entry.log.len().saturating_sub(entry.synced.0) / 2;
            let end = entry.log.len() - unwritten;
            entry.log[end..].fill(0);
            entry.reports.truncate(kept(entry.synced.1, entry.reports.len()));
        }
        // Its directory is durable with its first report.
        entries.retain(|_, entry| !entry.reports.is_empty());
    }

    /// The attempts that it holds, and how long their logs are.
    pub fn held(&self) -> BTreeMap<AttemptRef, u64> {
        self.entries().iter().map(|(at, entry)| (*at, entry.found() as u64)).collect()
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<AttemptRef, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, at: AttemptRef, f: impl FnOnce(&mut Entry) -> io::Result<T>) -> io::Result<T> {
        f(self.entries().get_mut(&at).ok_or_else(gone)?)
    }

    /// What a daemon finds that starts on this memory.
    pub(super) fn reopen(&self) -> Vec<Held> {
        let view = |(at, entry): (&AttemptRef, &mut Entry)| {
            entry.log.truncate(entry.found());
            let log_len = entry.log.len() as u64;
            entry.cap = Cap::sealed(log_len);
            entry.suspect = false;
            let state = judge(&entry.reports, log_len, |digest| entry.stash.contains_key(digest));
            Held { attempt: *at, state, log_len, seq: entry.reports.last().map_or(0, |(seq, _)| *seq) }
        };
        self.entries().iter_mut().map(view).collect()
    }

    pub(super) fn is_tight(&self) -> bool {
        self.disk.is_full()
    }

    pub(super) fn begin(&self, assignment: &Assignment) -> io::Result<()> {
        self.disk.room()?;
        self.entries().entry(assignment.attempt).or_insert_with(|| Entry {
            assignment: assignment.clone(),
            log: Vec::new(),
            cap: Cap::new(limits::LOG_CAP),
            reports: Vec::new(),
            stash: BTreeMap::new(),
            synced: (0, 0),
            suspect: false,
        });
        Ok(())
    }

    pub(super) fn append(&self, at: AttemptRef, bytes: &[u8]) -> io::Result<u64> {
        self.with(at, |entry| {
            let (now, later) = entry.cap.split(bytes)?;
            if self.disk.is_full() {
                // The job goes on.
                entry.cap.no_room();
                entry.cap.keep(bytes);
                return Ok(entry.cap.len);
            }
            entry.log.extend_from_slice(now);
            entry.cap.len += now.len() as u64;
            entry.cap.keep(later);
            Ok(entry.cap.len)
        })
    }

    pub(super) async fn seal_log(&self, at: AttemptRef) -> io::Result<u64> {
        self.with(at, |entry| {
            if !entry.cap.sealed {
                self.disk.room()?;
                let end = entry.cap.take_end().whole;
                entry.cap.len += end.len() as u64;
                entry.log.extend(end);
            }
            Ok(())
        })?;
        self.sync(at).await
    }

    pub(super) fn cut(&self, at: AttemptRef) -> io::Result<Option<Cut>> {
        self.with(at, |entry| Ok(entry.cap.cut()))
    }

    /// Lets a log be as long as this and no longer.
    #[cfg(test)]
    pub(crate) fn limit_log(&self, at: AttemptRef, limit: u64) {
        self.with(at, |entry| {
            entry.cap.limit = limit;
            Ok(())
        })
        .unwrap();
    }

    /// Makes durable what was written before the call.
    pub(super) async fn sync(&self, at: AttemptRef) -> io::Result<u64> {
        let len = self.with(at, |entry| Ok(entry.log.len()))?;
        self.synced(at, (len, 0)).await?;
        Ok(len as u64)
    }

    async fn synced(&self, at: AttemptRef, upto: (usize, usize)) -> io::Result<()> {
        let done = self.disk.sync().await;
        self.with(at, |entry| {
            entry.suspect |= done.is_err();
            if entry.suspect {
                return Err(io::Error::other("a sync failed"));
            }
            entry.synced = (entry.synced.0.max(upto.0), entry.synced.1.max(upto.1));
            Ok(())
        })
    }

    pub(super) fn read(&self, at: AttemptRef, from: u64, max: u32, head: usize) -> io::Result<BytesMut> {
        self.with(at, |entry| {
            let from = entry.log.len().min(usize::try_from(from).unwrap_or(usize::MAX));
            let to = entry.log.len().min(from + max as usize);
            let mut out = BytesMut::zeroed(head);
            out.extend_from_slice(&entry.log[from..to]);
            Ok(out)
        })
    }

    pub(super) async fn record(&self, at: AttemptRef, reports: &[(u64, Report)]) -> io::Result<()> {
        if reports.iter().any(|(_, report)| matches!(report, Report::Result(_))) {
            self.sync(at).await?;
        }
        let count = self.with(at, |entry| {
            self.disk.room()?;
            entry.reports.extend_from_slice(reports);
            Ok(entry.reports.len())
        })?;
        self.synced(at, (0, count)).await
    }

    pub(super) fn reports(&self, at: AttemptRef, after: u64) -> io::Result<Vec<(u64, Report)>> {
        self.with(at, |entry| Ok(entry.reports.iter().filter(|(seq, _)| *seq > after).cloned().collect()))
    }

    pub(super) fn assignment(&self, at: AttemptRef) -> Option<Assignment> {
        self.entries().get(&at).map(|entry| entry.assignment.clone())
    }

    pub(super) fn stash(&self, at: AttemptRef) -> io::Result<Stashing> {
        self.with(at, |_| Ok(Stashing { mem: self.clone(), at, bytes: BytesMut::new() }))
    }

    pub(super) fn stashed(&self, at: AttemptRef, digest: &Digest) -> Option<Bytes> {
        self.entries().get(&at).and_then(|entry| entry.stash.get(digest).cloned())
    }

    pub(super) fn remove(&self, at: AttemptRef) {
        self.entries().remove(&at);
    }
}

/// An artifact that is being written.
#[derive(Debug)]
pub struct Stashing {
    mem: Mem,
    at: AttemptRef,
    bytes: BytesMut,
}

impl Stashing {
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.mem.disk.room()?;
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    pub(super) async fn finish(self) -> io::Result<(Digest, u64)> {
        // A sync that found no room is no write that did: nobody may try it again.
        self.mem.disk.sync().await?;
        let bytes = self.bytes.freeze();
        let (digest, len) = (Digest::of(&bytes), bytes.len() as u64);
        self.mem.with(self.at, |entry| {
            entry.stash.insert(digest, bytes);
            Ok(())
        })?;
        Ok((digest, len))
    }
}

/// All pieces lie in the channel from the start: they share the memory of the artifact.
pub(super) fn pieces(bytes: &Bytes, from: u64) -> io::Result<mpsc::Receiver<Bytes>> {
    let mut rest = bytes.slice(bytes.len().min(usize::try_from(from).unwrap_or(usize::MAX))..);
    let (tx, rx) = mpsc::channel(rest.len().div_ceil(PIECE).max(1));
    while !rest.is_empty() {
        let piece = rest.split_to(rest.len().min(PIECE));
        tx.try_send(piece).map_err(io::Error::other)?;
    }
    Ok(rx)
}
