//! S: logs of a farm that moves: from files to rows and objects, each read again where it went. What was brought of a log that
//! grows is looked at again: its first bytes are hashed here and compared with what they were then.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use alloy_shared::id::{AttemptRef, Digest};
use alloy_shared::limits;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use sha2::Digest as _;

use super::journal::Brought;
use super::{MoveError, Mover, at};
use crate::backup::{LOGS, sorted};
use crate::blobs::{BlobKey, Blobs, off_thread};
use crate::logs::{Chunks, Logs};
use crate::store::sql::backup::Needs;
use crate::store::sql::chunks::{ChunkTable, Part, ROW_MAX};
use crate::store::sql::tables::Tables;
use crate::store::sql::target::LogsThen;
use crate::sums::{BLOCK, Seal};

/// What one object holds at most.
const OBJECT: u64 = 16 << 20;

/// A log's file as it is now.
struct Here {
    len: u64,
    sha256: Digest,
    sealed: bool,
    /// What its first bytes hash to, as many as were brought before.
    before: Digest,
}

impl Mover {
    /// Brings what is new of every log.
    pub(super) async fn bring_logs(&mut self, needs: &Needs) -> Result<(), MoveError> {
        let pool = self.sql.shared().map(|shared| shared.pool().clone());
        let Some(table) = pool.map(ChunkTable) else { return Ok(()) };
        let nowhere = || std::sync::Arc::new(Blobs::memory());
        let blobs = self.blobs.clone().unwrap_or_else(nowhere);
        let logs = Logs::Chunks(Chunks::new(table.clone(), blobs));
        let here = files(&self.farm.join(LOGS)).map_err(at(&self.farm))?;
        for (attempt, path) in &here {
            let damaged = self.damaged.len();
            self.bring_log(&table, &logs, *attempt, path).await?;
            self.counts.logs += u64::from(self.damaged.len() == damaged);
            (self.heard)(&self.counts);
        }
        self.forget_logs(&here.into_iter().map(|(attempt, _)| attempt).collect()).await?;
        for (job, attempt, len) in &needs.logs {
            let name = format!("{LOGS}/{job}/{attempt}");
            let have = self.journal.get(&name).map_or(0, |brought| brought.len);
            let told = self.damaged.iter().any(|told| told.starts_with(&format!("{name}.log ")));
            if have < *len && !told {
                self.damaged.push(format!("{name}.log has less than its {len} bytes"));
            }
        }
        Ok(())
    }

    /// Takes back the logs that were brought and that the farm has removed since.
    async fn forget_logs(&mut self, here: &HashSet<AttemptRef>) -> Result<(), MoveError> {
        let (Tables::Postgres(conn), Some(shared)) = (&mut self.tables, self.sql.shared()) else { return Ok(()) };
        let table = ChunkTable(shared.pool().clone());
        for gone in LogsThen(conn).all().await?.iter().filter(|attempt| !here.contains(attempt)) {
            table.remove(gone).await?;
        }
        Ok(())
    }

    async fn bring_log(
        &mut self,
        table: &ChunkTable,
        logs: &Logs,
        attempt: AttemptRef,
        path: &Path,
    ) -> Result<(), MoveError> {
        let name = format!("{LOGS}/{}/{}", attempt.job, attempt.attempt);
        let known = self.journal.get(&name).cloned();
        if let Some(known) = known.as_ref().filter(|known| known.last) {
            self.counts.bytes += known.len;
            return Ok(());
        }
        let (file, prefix) = (path.to_owned(), known.as_ref().map_or(0, |known| known.len));
        let here = match off_thread(move || look(&file, prefix)).await {
            Ok(Some(here)) => here,
            Ok(None) => {
                self.damaged.push(format!("{name}.log is damaged"));
                return Ok(());
            }
            // Retention was faster. What the books name of it is told behind all of them.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => {
                self.damaged.push(format!("{name}.log cannot be read: {error}"));
                return Ok(());
            }
        };
        self.counts.bytes += here.len;
        let same = known.as_ref().filter(|known| known.len <= here.len && known.sha256 == here.before);
        let have = table.end(&attempt).await?;
        let from = match same {
            Some(known) if known.len == have => have,
            _ if have == 0 => 0,
            Some(_) | None => {
                table.remove(&attempt).await?;
                0
            }
        };
        if from == here.len && !here.sealed && same.is_some() {
            return Ok(());
        }
        self.write_log(table, attempt, path, from, &here).await?;
        if here.sealed {
            table.add_seal(&attempt, here.len, here.sha256).await?;
        }
        let (len, sha256) = read_again(logs, &attempt).await?;
        if (len, sha256) != (here.len, here.sha256) {
            let why = format!("{len} bytes that hash to {sha256}, not {} that hash to {}", here.len, here.sha256);
            return Err(MoveError::Wrong { what: format!("{name}.log"), why });
        }
        let brought = Brought { name, len, sha256, last: here.sealed };
        self.journal.add(brought).map_err(at(&self.work))
    }

    /// A finished log, and much of any, goes into objects; the rest waits in rows.
    async fn write_log(
        &self,
        table: &ChunkTable,
        attempt: AttemptRef,
        path: &Path,
        mut from: u64,
        here: &Here,
    ) -> Result<(), MoveError> {
        while from < here.len {
            let left = here.len - from;
            let blobs = self.blobs.as_ref().filter(|_| here.sealed || left >= limits::LOG_OBJECT_MIN);
            let end = from + left.min(if blobs.is_some() { OBJECT } else { ROW_MAX });
            let file = path.to_owned();
            let bytes = off_thread(move || piece(&file, from, end - from)).await.map_err(at(path))?;
            match blobs {
                Some(blobs) => {
                    let key = BlobKey::log(&attempt, from, end);
                    let sha256 = Digest::of(&bytes);
                    blobs.put(&key, stream::iter([Ok(bytes)]).boxed(), Some(sha256)).await?;
                    table.moved(&attempt, from, &Part { start: from, end, object: key.to_string() }).await?;
                }
                None => {
                    table.add(&[(attempt, from, bytes)]).await?;
                }
            }
            from = end;
        }
        Ok(())
    }
}

/// Every log below a directory.
fn files(root: &Path) -> io::Result<Vec<(AttemptRef, PathBuf)>> {
    let mut found = Vec::new();
    for (name, is_dir) in sorted(root)? {
        let Some(job) = name.parse().ok().filter(|_| is_dir) else { continue };
        for (name, _) in sorted(&root.join(&name))? {
            let number = name.strip_suffix(".log").and_then(|number| number.parse().ok());
            if let Some(attempt) = number {
                found.push((AttemptRef { job, attempt }, root.join(job.to_string()).join(&name)));
            }
        }
    }
    Ok(found)
}

/// `None`: it is not what its seal says.
fn look(path: &Path, prefix: u64) -> io::Result<Option<Here>> {
    // Looked for first: a seal that comes later speaks of bytes that this look may lack.
    let seal = match fs::read(path.with_extension("seal")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        read => Some(read?),
    };
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    let (mut sha, mut before, mut done) = (sha2::Sha256::new(), None, 0);
    let mut buffer = vec![0; BLOCK as usize];
    while done < len {
        if done == prefix {
            before = Some(Digest::from_hasher(sha.clone()));
        }
        let stop = if done < prefix { prefix.min(len) } else { len };
        let most = (stop - done).min(BLOCK) as usize;
        let read = file.read(&mut buffer[..most])?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        sha.update(&buffer[..read]);
        done += read as u64;
    }
    let sha256 = Digest::from_hasher(sha);
    let before = before.unwrap_or(sha256);
    let Some(seal) = seal else { return Ok(Some(Here { len, sha256, sealed: false, before })) };
    let fits = Seal::decode(&seal).is_some_and(|seal| (seal.len, seal.sha256) == (len, sha256));
    Ok(fits.then_some(Here { len, sha256, sealed: true, before }))
}

fn piece(path: &Path, from: u64, len: u64) -> io::Result<Bytes> {
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
    File::open(path)?.read_exact_at(&mut bytes, from)?;
    Ok(bytes.into())
}

/// The log as an orchestrator reads it.
async fn read_again(logs: &Logs, attempt: &AttemptRef) -> Result<(u64, Digest), MoveError> {
    let (mut len, mut sha) = (0, sha2::Sha256::new());
    loop {
        let pieces = logs.read(attempt, len, BLOCK as u32).await?;
        if pieces.is_empty() {
            return Ok((len, Digest::from_hasher(sha)));
        }
        for piece in pieces {
            len += piece.len() as u64;
            sha.update(&piece);
        }
    }
}
