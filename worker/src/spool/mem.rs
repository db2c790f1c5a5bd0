//! S: the spool in memory, for the simulator. No task, no system call: a crash is survived by whoever holds the value.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use alloy_shared::id::{AttemptRef, Digest};
use alloy_shared::limits;
use alloy_shared::wire::session::{Assignment, Held, Report};
use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;

use super::{Cap, PIECE, gone, judge};

#[derive(Debug, Clone, Default)]
pub struct Mem(Arc<Mutex<HashMap<AttemptRef, Entry>>>);

#[derive(Debug)]
struct Entry {
    assignment: Assignment,
    log: Vec<u8>,
    cap: Cap,
    reports: Vec<(u64, Report)>,
    stash: HashMap<Digest, Bytes>,
}

impl Mem {
    fn entries(&self) -> MutexGuard<'_, HashMap<AttemptRef, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, at: AttemptRef, f: impl FnOnce(&mut Entry) -> io::Result<T>) -> io::Result<T> {
        f(self.entries().get_mut(&at).ok_or_else(gone)?)
    }

    /// What a daemon finds that starts on this memory.
    pub(super) fn reopen(&self) -> Vec<Held> {
        let mut held = Vec::new();
        for (at, entry) in self.entries().iter_mut() {
            let log_len = entry.log.len() as u64;
            entry.cap = Cap::sealed(log_len);
            let state = judge(&entry.reports, log_len, |digest| entry.stash.contains_key(digest));
            held.push(Held { attempt: *at, state, log_len, seq: entry.reports.last().map_or(0, |(seq, _)| *seq) });
        }
        held.sort_by_key(|held| held.attempt);
        held
    }

    pub(super) fn begin(&self, assignment: &Assignment) -> io::Result<()> {
        self.entries().entry(assignment.attempt).or_insert_with(|| Entry {
            assignment: assignment.clone(),
            log: Vec::new(),
            cap: Cap::new(limits::LOG_CAP),
            reports: Vec::new(),
            stash: HashMap::new(),
        });
        Ok(())
    }

    pub(super) fn append(&self, at: AttemptRef, bytes: &[u8]) -> io::Result<u64> {
        self.with(at, |entry| {
            let (now, later) = entry.cap.split(bytes)?;
            entry.log.extend_from_slice(now);
            entry.cap.len += now.len() as u64;
            entry.cap.keep(later);
            Ok(entry.cap.len)
        })
    }

    pub(super) fn seal_log(&self, at: AttemptRef) -> io::Result<u64> {
        self.with(at, |entry| {
            if !entry.cap.sealed {
                let end = entry.cap.take_end();
                entry.cap.len += end.len() as u64;
                entry.log.extend(end);
            }
            Ok(entry.cap.len)
        })
    }

    pub(super) fn log_len(&self, at: AttemptRef) -> io::Result<u64> {
        self.with(at, |entry| Ok(entry.log.len() as u64))
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

    pub(super) fn record(&self, at: AttemptRef, reports: &[(u64, Report)]) -> io::Result<()> {
        self.with(at, |entry| {
            entry.reports.extend_from_slice(reports);
            Ok(())
        })
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
    pub(super) fn write(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn finish(self) -> io::Result<(Digest, u64)> {
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
