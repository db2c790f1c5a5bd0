//! S: logs as rows of a database that several orchestrators share, moved to objects bit by bit.
//!
//! Bytes wait in memory until the next [`Chunks::sync`] commits them; only then they can be read. A row begins where the log
//! ended when its writer last looked, so of two writers of one log one is told that its row is there already. Bytes at one
//! offset are always the same, so it goes on behind them.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use alloy_shared::id::{AttemptRef, Digest, JobId};
use alloy_shared::limits;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use sha2::Digest as _;

use super::{LogError, news};
use crate::blobs::{BlobKey, Blobs};
use crate::store::StoreError;
use crate::store::sql::chunks::{ChunkTable, Part, ROW_MAX};

/// Bytes in rows of one statement: each connection keeps room for the most that went through it, each way.
const STATEMENT: u64 = 256 << 10;
/// What one object holds at most, but for the rest of its last row: its rows are in memory at once.
const OBJECT: u64 = 4 << 20;
/// Logs that are moved in one go.
const MOVES: u32 = 16;
const FAILING: u32 = 3;
/// What is read of an object at once.
const PIECE: u32 = 1 << 20;

#[derive(Debug)]
pub struct Chunks {
    table: ChunkTable,
    blobs: Arc<Blobs>,
    open: Mutex<HashMap<AttemptRef, Arc<Mutex<Log>>>>,
    /// One commit of rows at a time: each continues where the last one ended.
    committing: tokio::sync::Mutex<()>,
    /// Logs of this orchestrator's with rows for an object; true: all of their rows, because they are finished.
    ripe: Mutex<HashMap<AttemptRef, bool>>,
    clock: AtomicU64,
}

/// A log that this orchestrator writes.
#[derive(Debug, Default)]
struct Log {
    used: u64,
    durable: u64,
    sealed: bool,
    pending: VecDeque<Bytes>,
    pending_len: u64,
    /// The newest committed bytes.
    ring: VecDeque<Bytes>,
    ring_len: u64,
    /// What was committed since rows were last said to be enough for an object.
    grown: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Chunks {
    pub fn new(table: ChunkTable, blobs: Arc<Blobs>) -> Self {
        Self {
            table,
            blobs,
            open: Mutex::default(),
            committing: tokio::sync::Mutex::default(),
            ripe: Mutex::default(),
            clock: AtomicU64::new(0),
        }
    }

    fn known(&self, at: &AttemptRef) -> Option<Arc<Mutex<Log>>> {
        lock(&self.open).get(at).cloned()
    }

    async fn log(&self, at: &AttemptRef) -> Result<Arc<Mutex<Log>>, LogError> {
        let used = self.clock.fetch_add(1, Ordering::Relaxed);
        if let Some(log) = self.known(at) {
            lock(&log).used = used;
            return Ok(log);
        }
        let sealed = self.table.seal(at).await?;
        let durable = self.table.end(at).await?;
        let fresh = Log { used, durable, sealed: sealed.is_some(), ..Log::default() };
        let mut open = lock(&self.open);
        if open.len() >= limits::LOG_FILES_OPEN {
            close_oldest(&mut open);
        }
        Ok(open.entry(*at).or_insert_with(|| Arc::new(Mutex::new(fresh))).clone())
    }

    /// A log that is not there yet need not be looked for: its first bytes wait for no database. Where it is there already, its
    /// writer meets that row.
    pub(super) fn begin(&self, at: &AttemptRef) {
        let used = self.clock.fetch_add(1, Ordering::Relaxed);
        let mut open = lock(&self.open);
        if open.len() >= limits::LOG_FILES_OPEN {
            close_oldest(&mut open);
        }
        open.entry(*at).or_insert_with(|| Arc::new(Mutex::new(Log { used, ..Log::default() })));
    }

    pub(super) async fn append(&self, at: &AttemptRef, offset: u64, bytes: &Bytes) -> Result<u64, LogError> {
        let log = self.log(at).await?;
        let mut log = lock(&log);
        if log.sealed {
            return Err(LogError::Sealed);
        }
        let news = news(log.durable + log.pending_len, offset, bytes)?;
        if !news.is_empty() {
            log.pending_len += news.len() as u64;
            // A slice would keep the network's whole buffer.
            log.pending.push_back(Bytes::copy_from_slice(&news));
        }
        Ok(log.durable + log.pending_len)
    }

    pub(super) async fn sync(&self) -> Result<Vec<(AttemptRef, u64)>, LogError> {
        let _turn = self.committing.lock().await;
        let mut goals: Vec<(AttemptRef, Arc<Mutex<Log>>, u64)> = Vec::new();
        for (at, log) in lock(&self.open).iter() {
            let state = lock(log);
            if state.pending_len > 0 {
                goals.push((*at, log.clone(), state.durable + state.pending_len));
            }
        }
        loop {
            let rows = rows_of(&goals);
            if rows.is_empty() {
                goals.iter().for_each(|(at, log, _)| self.note_growth(at, &mut lock(log)));
                return Ok(goals.iter().map(|(at, log, _)| (*at, lock(log).durable)).collect());
            }
            let all = self.table.add(&rows).await?;
            let written = |at: &AttemptRef| rows.iter().any(|(of, ..)| of == at);
            for (at, log, _) in goals.iter().filter(|(at, ..)| written(at)) {
                match all {
                    // Whoever measured the log meanwhile may have seen them before this one heard that they are there.
                    Some(()) => rows
                        .iter()
                        .filter(|(of, ..)| of == at)
                        .for_each(|(_, start, bytes)| lock(log).skip_to(start + bytes.len() as u64)),
                    // One of them was there already, or a log was finished by somebody else: not all were written.
                    None => {
                        let (end, seal) = (self.table.end(at).await?, self.table.seal(at).await?);
                        let mut log = lock(log);
                        log.skip_to(end);
                        if seal.is_some() {
                            log.finish();
                        }
                    }
                }
            }
        }
    }

    fn note_growth(&self, at: &AttemptRef, log: &mut Log) {
        if log.grown >= limits::LOG_OBJECT_MIN {
            log.grown = 0;
            lock(&self.ripe).entry(*at).or_insert(false);
        }
    }

    pub(super) async fn read(&self, at: &AttemptRef, from: u64, max: u32) -> Result<Vec<Bytes>, LogError> {
        if max == 0 {
            return Ok(Vec::new());
        }
        if let Some(log) = self.known(at) {
            let log = lock(&log);
            if from >= log.durable - log.ring_len {
                return Ok(log.tail(from, max));
            }
        }
        self.stored(at, from, max).await
    }

    /// From the rows, or else from the object that has the byte at `from`.
    async fn stored(&self, at: &AttemptRef, from: u64, max: u32) -> Result<Vec<Bytes>, LogError> {
        let most = u64::from(max.min(PIECE));
        let found = self.rows_from(at, from, most.min(STATEMENT)).await?;
        if !found.is_empty() {
            return Ok(found);
        }
        // Rows that were moved since are in an object now.
        let Some(part) = self.table.part(at, from).await? else { return Ok(Vec::new()) };
        let key = BlobKey::parse(&part.object).ok_or(LogError::Damaged { from: part.start, to: part.end })?;
        let len = (part.end - from).min(most);
        let mut body = self.blobs.read(&key, from - part.start..from - part.start + len).await?;
        let mut pieces = Vec::new();
        while let Some(piece) = body.next().await {
            pieces.push(piece.map_err(|error| match error.kind() {
                io::ErrorKind::InvalidData => LogError::Damaged { from: part.start, to: part.end },
                _ => LogError::Away(error.to_string()),
            })?);
        }
        Ok(pieces)
    }

    /// At most so many bytes from `from` on, as far as rows have them without a gap.
    async fn rows_from(&self, at: &AttemptRef, from: u64, most: u64) -> Result<Vec<Bytes>, LogError> {
        let (mut next, to) = (from, from.saturating_add(most));
        let mut found = Vec::new();
        for (start, bytes) in self.table.rows(at, from, to).await? {
            let Some(skip) = next.checked_sub(start) else { break };
            let end = (to - start).min(bytes.len() as u64);
            if skip < end {
                found.push(bytes.slice(skip as usize..end as usize));
                next = start + end;
            }
        }
        Ok(found)
    }

    /// What can be read.
    pub(super) async fn len(&self, at: &AttemptRef) -> Result<u64, LogError> {
        match self.known(at) {
            Some(log) => Ok(lock(&log).durable),
            None => Ok(self.table.end(at).await?),
        }
    }

    /// The same, whoever wrote it last.
    pub(super) async fn measure(&self, at: &AttemptRef) -> Result<u64, LogError> {
        let end = self.table.end(at).await?;
        self.heard(at, end);
        Ok(end)
    }

    /// How long the logs of these jobs' newest attempts are, whoever wrote them last.
    pub async fn ends(&self, jobs: &[JobId]) -> Result<Vec<(AttemptRef, u64)>, LogError> {
        let ends = self.table.ends(jobs).await?;
        ends.iter().for_each(|(at, end)| self.heard(at, *end));
        Ok(ends)
    }

    /// Another orchestrator may have gone on with a log that was this one's.
    fn heard(&self, at: &AttemptRef, end: u64) {
        if let Some(log) = self.known(at) {
            lock(&log).skip_to(end);
        }
    }

    pub(super) async fn remove(&self, at: &AttemptRef) -> Result<(), LogError> {
        lock(&self.open).remove(at);
        Ok(self.table.remove(at).await?)
    }

    pub(super) async fn seal(&self, at: &AttemptRef) -> Result<Digest, LogError> {
        loop {
            self.sync().await?;
            if let Some((_, sha256)) = self.table.seal(at).await? {
                return Ok(sha256);
            }
            let (mut sha, mut len) = (sha2::Sha256::new(), 0);
            loop {
                let pieces = self.stored(at, len, PIECE).await?;
                if pieces.is_empty() {
                    break;
                }
                for piece in pieces {
                    len += piece.len() as u64;
                    sha.update(&piece);
                }
            }
            let log = self.log(at).await?;
            // What came meanwhile belongs to it.
            let whole = {
                let mut log = lock(&log);
                let whole = log.pending_len == 0 && log.durable <= len;
                log.sealed |= whole;
                whole
            };
            if whole {
                let sha256 = Digest::from_hasher(sha);
                let done = self.table.add_seal(at, len, sha256).await;
                lock(&self.open).remove(at);
                done?;
                lock(&self.ripe).insert(*at, true);
                return Ok(sha256);
            }
        }
    }

    /// Moves rows of this orchestrator's own logs into objects: of those that have grown, and of those that are finished.
    pub async fn compact_own(&self) -> Result<(), LogError> {
        let ripe: Vec<(AttemptRef, bool)> = lock(&self.ripe).iter().map(|(at, finished)| (*at, *finished)).collect();
        let mut failing = Failing::default();
        for (at, finished) in ripe {
            let least = if finished { 0 } else { limits::LOG_OBJECT_MIN };
            if let Err(error) = self.move_all(&at, least).await {
                failing.add(error)?;
                continue;
            }
            failing.in_a_row = 0;
            let mut ripe = lock(&self.ripe);
            // It may have been finished since.
            if ripe.get(&at) == Some(&finished) {
                ripe.remove(&at);
            }
        }
        failing.end()
    }

    async fn move_all(&self, at: &AttemptRef, least: u64) -> Result<(), LogError> {
        while self.move_rows(at, least).await? {}
        Ok(())
    }

    /// The same for all logs, also those of orchestrators that are gone. It looks at every row that there is. Returns how many logs
    /// it moved.
    pub async fn compact(&self) -> Result<usize, LogError> {
        let (mut moved, mut failing) = (0, Failing::default());
        for at in self.table.to_move(limits::LOG_OBJECT_MIN, MOVES).await? {
            match self.move_rows(&at, 0).await {
                Ok(did) => (moved, failing.in_a_row) = (moved + usize::from(did), 0),
                Err(error) => failing.add(error)?,
            }
        }
        failing.end().map(|()| moved)
    }

    /// Moves the first rows of a log, if they hold at least so many bytes. False: nothing was moved.
    async fn move_rows(&self, at: &AttemptRef, least: u64) -> Result<bool, LogError> {
        let Some(first) = self.table.first(at).await? else { return Ok(false) };
        // A row that came late may repeat what objects have.
        let mut start = first;
        while let Some(part) = self.table.part(at, start).await? {
            start = part.end;
        }
        let (mut pieces, mut end, mut sha) = (Vec::new(), start, sha2::Sha256::new());
        while end < start + OBJECT {
            let more = self.rows_from(at, end, STATEMENT).await?;
            if more.is_empty() {
                break;
            }
            for bytes in more {
                end += bytes.len() as u64;
                sha.update(&bytes);
                pieces.push(Ok(bytes));
            }
        }
        if end == start {
            return Ok(self.table.drop_moved(at, first, start).await?);
        }
        if end - start < least {
            return Ok(false);
        }
        let key = BlobKey::log(at, start, end);
        let body = futures_util::stream::iter(pieces).boxed();
        self.blobs.put(&key, body, Some(Digest::from_hasher(sha))).await?;
        Ok(self.table.moved(at, first, &Part { start, end, object: key.as_str().to_owned() }).await?)
    }
}

/// One log that cannot be moved holds up no other; some in a row are not their own fault.
#[derive(Default)]
struct Failing {
    first: Option<LogError>,
    in_a_row: u32,
}

impl Failing {
    fn add(&mut self, error: LogError) -> Result<(), LogError> {
        self.in_a_row += 1;
        if self.in_a_row == FAILING {
            return Err(error);
        }
        self.first.get_or_insert(error);
        Ok(())
    }

    fn end(self) -> Result<(), LogError> {
        self.first.map_or(Ok(()), Err)
    }
}

/// Closes the log that was used longest ago and has nothing to write.
fn close_oldest(open: &mut HashMap<AttemptRef, Arc<Mutex<Log>>>) {
    let idle = open.iter().filter(|(_, log)| lock(log).pending_len == 0);
    if let Some(at) = idle.min_by_key(|(_, log)| lock(log).used).map(|(at, _)| *at) {
        open.remove(&at);
    }
}

/// The next rows on the way to these lengths.
fn rows_of(goals: &[(AttemptRef, Arc<Mutex<Log>>, u64)]) -> Vec<(AttemptRef, u64, Bytes)> {
    let (mut rows, mut room) = (Vec::new(), STATEMENT);
    for (at, log, goal) in goals {
        let log = lock(log);
        let mut start = log.durable;
        let mut row = BytesMut::new();
        for bytes in &log.pending {
            let none = rows.is_empty() && row.is_empty();
            if start + row.len() as u64 >= *goal || (room < bytes.len() as u64 && !none) {
                break;
            }
            if row.len() as u64 + bytes.len() as u64 > ROW_MAX {
                let full = std::mem::take(&mut row).freeze();
                let end = start + full.len() as u64;
                rows.push((*at, std::mem::replace(&mut start, end), full));
            }
            row.extend_from_slice(bytes);
            room = room.saturating_sub(bytes.len() as u64);
        }
        if !row.is_empty() {
            rows.push((*at, start, row.freeze()));
        }
    }
    rows
}

impl Log {
    /// The first `len` waiting bytes are stored.
    fn commit(&mut self, len: usize) {
        let mut left = len;
        while left > 0 {
            let Some(mut bytes) = self.pending.pop_front() else { break };
            let rest = bytes.split_off(left.min(bytes.len()));
            left -= bytes.len();
            self.pending_len -= bytes.len() as u64;
            self.durable += bytes.len() as u64;
            self.grown += bytes.len() as u64;
            self.ring_len += bytes.len() as u64;
            self.ring.push_back(bytes);
            if !rest.is_empty() {
                self.pending.push_front(rest);
            }
        }
        while self.ring_len > limits::LOG_RING_SHARED || self.ring.len() > limits::LOG_RING_CHUNKS {
            let Some(old) = self.ring.pop_front() else { break };
            self.ring_len -= old.len() as u64;
        }
    }

    /// The log is stored up to `end`, by whomever.
    fn skip_to(&mut self, end: u64) {
        if end <= self.durable {
            return;
        }
        let known = (end - self.durable).min(self.pending_len);
        self.commit(known as usize);
        if self.durable < end {
            (self.ring, self.ring_len, self.durable) = (VecDeque::new(), 0, end);
        }
    }

    /// Somebody else has finished the log: nothing more belongs to it.
    fn finish(&mut self) {
        (self.pending, self.pending_len, self.sealed) = (VecDeque::new(), 0, true);
    }

    /// From the ring; `from` lies in it or behind it.
    fn tail(&self, from: u64, max: u32) -> Vec<Bytes> {
        let mut start = self.durable - self.ring_len;
        let mut room = u64::from(max);
        let mut out = Vec::new();
        for chunk in &self.ring {
            let end = start + chunk.len() as u64;
            if end > from && room > 0 {
                let skip = from.saturating_sub(start) as usize;
                let part = chunk.slice(skip..chunk.len().min(skip.saturating_add(room as usize)));
                room -= part.len() as u64;
                out.push(part);
            }
            start = end;
        }
        out
    }
}

impl From<StoreError> for LogError {
    fn from(error: StoreError) -> Self {
        Self::Away(error.to_string())
    }
}

impl From<crate::blobs::BlobError> for LogError {
    fn from(error: crate::blobs::BlobError) -> Self {
        Self::Away(error.to_string())
    }
}
