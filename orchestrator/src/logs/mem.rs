//! P: logs in memory, with the same rules.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use alloy_shared::id::{AttemptRef, Digest};
use bytes::Bytes;

use super::{LogError, news};

#[derive(Debug, Default)]
pub struct Mem(Mutex<BTreeMap<AttemptRef, Log>>);

#[derive(Debug, Default)]
struct Log {
    bytes: Vec<u8>,
    durable: u64,
    sealed: bool,
}

impl Mem {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<AttemptRef, Log>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn append(&self, at: &AttemptRef, offset: u64, bytes: &Bytes) -> Result<u64, LogError> {
        let mut logs = self.lock();
        let log = logs.entry(*at).or_default();
        if log.sealed {
            return Err(LogError::Sealed);
        }
        let news = news(log.bytes.len() as u64, offset, bytes)?;
        log.bytes.extend_from_slice(&news);
        Ok(log.bytes.len() as u64)
    }

    pub(super) fn sync(&self) -> Vec<(AttemptRef, u64)> {
        let mut logs = self.lock();
        let grown = logs.iter_mut().filter(|(_, log)| log.durable < log.bytes.len() as u64);
        grown
            .map(|(at, log)| {
                log.durable = log.bytes.len() as u64;
                (*at, log.durable)
            })
            .collect()
    }

    pub(super) fn read(&self, at: &AttemptRef, from: u64, max: u32) -> Vec<Bytes> {
        let logs = self.lock();
        let rest = usize::try_from(from).ok().and_then(|from| logs.get(at)?.bytes.get(from..)).unwrap_or_default();
        let part = &rest[..rest.len().min(max as usize)];
        if part.is_empty() { Vec::new() } else { vec![Bytes::copy_from_slice(part)] }
    }

    pub(super) fn len(&self, at: &AttemptRef) -> u64 {
        self.lock().get(at).map_or(0, |log| log.bytes.len() as u64)
    }

    pub(super) fn durable(&self, at: &AttemptRef) -> u64 {
        self.lock().get(at).map_or(0, |log| log.durable)
    }

    pub(super) fn seal(&self, at: &AttemptRef) -> Digest {
        let mut logs = self.lock();
        let log = logs.entry(*at).or_default();
        log.sealed = true;
        log.durable = log.bytes.len() as u64;
        Digest::of(&log.bytes)
    }
}
