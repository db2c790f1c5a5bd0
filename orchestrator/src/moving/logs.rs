//! S: logs of a farm that moves: from files to rows and objects, each read again where it went. What was brought of a log that
//! grows is looked at again: its first bytes are hashed here and compared with what they were then.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;

use alloy_shared::id::{AttemptRef, Digest};
use alloy_shared::limits;
use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
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
/// Logs on their way at once. Each asks the database between its bytes.
const AT_ONCE: usize = 4;

/// A log's file as it is now.
struct Here {
    len: u64,
    sha256: Digest,
    sealed: bool,
    /// What its first bytes hash to, as many as were brought before.
    before: Digest,
}

enum Came {
    /// As long as it is, and as much of it was brought before.
    Same(u64),
    Brought(Brought),
    Lost(String),
    /// Retention was faster. What the books name of it is told behind all of them.
    Gone,
}

impl Mover {
    /// Brings what is new of every log.
    pub(super) async fn bring_logs(&mut self, needs: &Needs) -> Result<(), MoveError> {
        let pool = self.sql.shared().map(|shared| shared.pool().clone());
        let Some(table) = pool.map(ChunkTable) else { return Ok(()) };
        let here = files(&self.farm.join(LOGS)).map_err(at(&self.farm))?;
        let mut wanted = Vec::new();
        for (attempt, path) in &here {
            let known = self.journal.get(&name_of(attempt)).cloned();
            match known.as_ref().filter(|known| known.last) {
                Some(known) => self.count_log(known.len),
                None => wanted.push((*attempt, path.clone(), known)),
            }
        }
        let way = Way::new(table, self.blobs.clone());
        let coming = stream::iter(wanted).map(|(attempt, path, known)| way.bring(attempt, path, known));
        let mut coming = pin!(coming.buffer_unordered(AT_ONCE));
        while let Some(came) = coming.try_next().await? {
            match came {
                Came::Same(len) => self.count_log(len),
                Came::Brought(brought) => {
                    self.count_log(brought.len);
                    self.brought(brought)?;
                }
                Came::Lost(why) => self.damaged.push(why),
                Came::Gone => {}
            }
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

    fn count_log(&mut self, len: u64) {
        self.counts.logs += 1;
        self.counts.bytes += len;
        (self.heard)(&self.counts);
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
}

/// Where logs go.
struct Way {
    table: ChunkTable,
    /// Absent: logs are rows at first.
    blobs: Option<Arc<Blobs>>,
    /// As an orchestrator reads them.
    logs: Logs,
}

impl Way {
    fn new(table: ChunkTable, blobs: Option<Arc<Blobs>>) -> Self {
        let read = blobs.clone().unwrap_or_else(|| Arc::new(Blobs::memory()));
        let logs = Logs::Chunks(Chunks::new(table.clone(), read));
        Self { table, blobs, logs }
    }

    /// `known`: what was brought of it before.
    async fn bring(&self, attempt: AttemptRef, path: PathBuf, known: Option<Brought>) -> Result<Came, MoveError> {
        let name = name_of(&attempt);
        let (file, prefix) = (path.clone(), known.as_ref().map_or(0, |known| known.len));
        let here = match off_thread(move || look(&file, prefix)).await {
            Ok(Some(here)) => here,
            Ok(None) => return Ok(Came::Lost(format!("{name}.log is damaged"))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Came::Gone),
            Err(error) => return Ok(Came::Lost(format!("{name}.log cannot be read: {error}"))),
        };
        let same = known.as_ref().filter(|known| known.len <= here.len && known.sha256 == here.before);
        let have = self.table.end(&attempt).await?;
        let from = match same {
            Some(known) if known.len == have => have,
            _ if have == 0 => 0,
            Some(_) | None => {
                self.table.remove(&attempt).await?;
                0
            }
        };
        if from == here.len && !here.sealed && same.is_some() {
            return Ok(Came::Same(here.len));
        }
        self.write(attempt, &path, from, &here).await?;
        if here.sealed {
            self.table.add_seal(&attempt, here.len, here.sha256).await?;
        }
        let (len, sha256) = read_again(&self.logs, &attempt).await?;
        if (len, sha256) != (here.len, here.sha256) {
            let why = format!("{len} bytes that hash to {sha256}, not {} that hash to {}", here.len, here.sha256);
            return Err(MoveError::Wrong { what: format!("{name}.log"), why });
        }
        Ok(Came::Brought(Brought { name, len, sha256, last: here.sealed }))
    }

    /// A finished log, and much of any, goes into objects; the rest waits in rows.
    async fn write(&self, attempt: AttemptRef, path: &Path, mut from: u64, here: &Here) -> Result<(), MoveError> {
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
                    let part = Part { start: from, end, object: key.to_string() };
                    self.table.moved(&attempt, from, &part).await?;
                }
                None => {
                    self.table.add(&[(attempt, from, bytes)]).await?;
                }
            }
            from = end;
        }
        Ok(())
    }
}

fn name_of(attempt: &AttemptRef) -> String {
    format!("{LOGS}/{}/{}", attempt.job, attempt.attempt)
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
