//! S: the spool on disk. Appends and reads use the page cache directly; only syncs and deletions take a thread of their own.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use alloy_shared::id::{AttemptRef, Digest};
use alloy_shared::limits;
use alloy_shared::room::is_full;
use alloy_shared::wire::session::{Assignment, Held, HeldState, Report};
use bytes::{Bytes, BytesMut};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use super::segments::Segments;
use super::{Cap, Cut, PIECE, PIECES_AHEAD, gone, journal, judge};
use crate::host::disk_free;

const JOURNAL: &str = "journal";
const STASH: &str = "stash";
/// Directories with these prefixes are no attempts: being deleted, and set aside because of damage.
const GONE: &str = ".gone-";
const ASIDE: &str = ".aside-";

#[derive(Debug)]
pub struct Disk {
    root: PathBuf,
    /// Bytes that logs and artifacts leave free.
    reserve: u64,
    entries: Mutex<HashMap<AttemptRef, Arc<Entry>>>,
}

#[derive(Debug)]
struct Entry {
    dir: PathBuf,
    log: Segments,
    cap: Mutex<Cap>,
    journal: File,
    journal_len: Mutex<u64>,
    /// The directory entries themselves are on disk.
    rooted: AtomicBool,
    /// So much of the log the farm has.
    farm_has: AtomicU64,
    /// A sync has failed.
    suspect: AtomicBool,
    /// Names unfinished artifacts.
    counter: AtomicU64,
}

impl Disk {
    pub(super) fn open(root: &Path, reserve: u64) -> io::Result<(Self, Vec<Held>)> {
        DirBuilder::new().recursive(true).mode(0o700).create(root)?;
        let mut entries = HashMap::new();
        let mut held = Vec::new();
        for found in fs::read_dir(root)? {
            let found = found?;
            let name = found.file_name().to_string_lossy().into_owned();
            if name.starts_with(GONE) {
                if let Err(error) = fs::remove_dir_all(found.path()) {
                    tracing::warn!(name, %error, "a record that is done cannot be removed; the next start tries again");
                }
                continue;
            }
            if name.starts_with(ASIDE) {
                continue;
            }
            let Some(at) = parse_name(&name) else {
                set_aside(root, &name, "its name is no attempt's");
                continue;
            };
            match reopen(at, found.path()) {
                Ok((entry, view)) => {
                    entries.insert(at, Arc::new(entry));
                    held.push(view);
                }
                Err(error) => {
                    set_aside(root, &name, &error.to_string());
                    held.push(Held { attempt: at, state: HeldState::Lost, log_len: 0, seq: 0 });
                }
            }
        }
        held.sort_by_key(|held| held.attempt);
        Ok((Self { root: root.to_owned(), reserve, entries: Mutex::new(entries) }, held))
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn reserve(&self) -> u64 {
        self.reserve
    }

    pub(super) fn is_tight(&self) -> bool {
        has_less(&self.root, self.reserve)
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<AttemptRef, Arc<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry(&self, at: AttemptRef) -> io::Result<Arc<Entry>> {
        self.entries().get(&at).cloned().ok_or_else(gone)
    }

    fn dir(&self, at: AttemptRef) -> PathBuf {
        self.root.join(format!("{}.{}", at.job, at.attempt))
    }

    pub(super) fn begin(&self, assignment: &Assignment) -> io::Result<()> {
        let at = assignment.attempt;
        if self.entries().contains_key(&at) {
            return Ok(());
        }
        let dir = self.dir(at);
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        let made = fresh(dir.clone(), assignment);
        if made.is_err() {
            // Half a directory would come back as a lost attempt.
            fs::remove_dir_all(&dir).ok();
        }
        self.entries().insert(at, Arc::new(made?));
        Ok(())
    }

    pub(super) fn append(&self, at: AttemptRef, bytes: &[u8]) -> io::Result<u64> {
        let entry = self.entry(at)?;
        let mut cap = lock(&entry.cap);
        let (now, later) = cap.split(bytes)?;
        let extended = match !now.is_empty() && self.is_tight() {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => entry.extend_log(&mut cap, now),
        };
        match extended {
            Ok(()) => cap.keep(later),
            Err(error) if is_full(&error) => {
                // The job goes on.
                tracing::warn!(attempt = %at, "the disk is full: the log is cut off and only its end is kept");
                cap.no_room();
                cap.keep(bytes);
            }
            Err(error) => return Err(error),
        }
        Ok(cap.len)
    }

    pub(super) async fn seal_log(&self, at: AttemptRef) -> io::Result<u64> {
        let entry = self.entry(at)?;
        {
            let mut cap = lock(&entry.cap);
            if !cap.sealed {
                let end = cap.take_end();
                match entry.extend_log(&mut cap, &end.whole) {
                    Err(error) if is_full(&error) => {
                        entry.extend_log(&mut cap, &end.alone)?;
                        cap.lose_end(&end);
                    }
                    done => done?,
                }
            }
        }
        self.sync(at).await
    }

    pub(super) fn cut(&self, at: AttemptRef) -> io::Result<Option<Cut>> {
        Ok(lock(&self.entry(at)?.cap).cut())
    }

    pub(super) async fn sync(&self, at: AttemptRef) -> io::Result<u64> {
        let entry = self.entry(at)?;
        blocking(move || entry.sync_log()).await
    }

    pub(super) fn read(&self, at: AttemptRef, from: u64, max: u32, head: usize) -> io::Result<BytesMut> {
        let entry = self.entry(at)?;
        let len = entry.log.len().saturating_sub(from).min(u64::from(max));
        let mut out = BytesMut::zeroed(head + len as usize);
        entry.log.read(from, &mut out[head..])?;
        Ok(out)
    }

    pub(super) async fn release(&self, at: AttemptRef, durable: u64) -> io::Result<()> {
        let entry = self.entry(at)?;
        entry.farm_has.fetch_max(durable, Ordering::AcqRel);
        self.let_go(entry).await
    }

    pub(super) async fn make_room(&self, at: AttemptRef) -> io::Result<()> {
        self.let_go(self.entry(at)?).await
    }

    /// Some of what the farm has is kept, for one that loses it again, unless the room is needed.
    async fn let_go(&self, entry: Arc<Entry>) -> io::Result<()> {
        let keep = if self.is_tight() { 0 } else { limits::SPOOL_KEEP };
        let durable = entry.farm_has.load(Ordering::Acquire);
        match entry.log.can_release(durable, keep) {
            true => blocking(move || entry.log.release(durable, keep)).await,
            false => Ok(()),
        }
    }

    pub(super) async fn record(&self, at: AttemptRef, reports: &[(u64, Report)]) -> io::Result<()> {
        let entry = self.entry(at)?;
        let mut lines = Vec::new();
        let mut is_end = false;
        for (seq, report) in reports {
            lines.extend(journal::report_line(*seq, report));
            is_end |= matches!(report, Report::Result(_));
        }
        let root = self.root.clone();
        blocking(move || {
            // Raised first: a directory that is made meanwhile lowers it for the next report.
            let rooted = entry.rooted.swap(true, Ordering::AcqRel);
            let done = entry.record(&lines, is_end, (!rooted).then_some(&root));
            if done.is_err() && !rooted {
                entry.rooted.store(false, Ordering::Release);
            }
            done
        })
        .await
    }

    fn journal(&self, at: AttemptRef) -> io::Result<journal::Journal> {
        let entry = self.entry(at)?;
        Ok(journal::read(&fs::read(entry.dir.join(JOURNAL))?))
    }

    pub(super) fn reports(&self, at: AttemptRef, after: u64) -> io::Result<Vec<(u64, Report)>> {
        Ok(self.journal(at)?.reports.into_iter().filter(|(seq, _)| *seq > after).collect())
    }

    pub(super) fn assignment(&self, at: AttemptRef) -> io::Result<Option<Assignment>> {
        if self.entries().contains_key(&at) { Ok(self.journal(at)?.assignment) } else { Ok(None) }
    }

    pub(super) fn stash(&self, at: AttemptRef) -> io::Result<Stashing> {
        let entry = self.entry(at)?;
        let dir = entry.dir.join(STASH);
        match DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => entry.rooted.store(false, Ordering::Release),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        let temp = dir.join(format!(".new-{}", entry.counter.fetch_add(1, Ordering::Relaxed)));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temp)?;
        Ok(Stashing {
            file: Arc::new(file),
            temp: Temp(temp),
            dir,
            reserve: self.reserve,
            hasher: Sha256::new(),
            len: 0,
        })
    }

    pub(super) fn stashed(&self, at: AttemptRef, digest: &Digest) -> PathBuf {
        self.dir(at).join(STASH).join(digest.to_string())
    }

    pub(super) async fn remove(&self, at: AttemptRef) -> io::Result<()> {
        self.entries().remove(&at);
        let dir = self.dir(at);
        let doomed = self.root.join(format!("{GONE}{}.{}", at.job, at.attempt));
        blocking(move || match fs::rename(&dir, &doomed) {
            Ok(()) => fs::remove_dir_all(&doomed),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        })
        .await
    }
}

impl Entry {
    fn extend_log(&self, cap: &mut Cap, bytes: &[u8]) -> io::Result<()> {
        let done = self.log.append(bytes);
        if self.log.take_made() {
            self.rooted.store(false, Ordering::Release);
        }
        done?;
        cap.len += bytes.len() as u64;
        Ok(())
    }

    /// Puts lines into the journal, behind the log if they are `its_end`, and makes them durable, with the names of the
    /// attempt's files and of itself in `root` if those are not yet. All is opened before anything is written: what fails
    /// for want of descriptors has left nothing behind and can be done again.
    fn record(&self, lines: &[u8], its_end: bool, root: Option<&PathBuf>) -> io::Result<()> {
        let dirs = root.map_or(Vec::new(), |root| vec![&self.dir, root]);
        let dirs = dirs.into_iter().map(File::open).collect::<io::Result<Vec<File>>>()?;
        if its_end {
            self.sync_log()?;
        }
        {
            let mut len = lock(&self.journal_len);
            extend(&self.journal, *len, lines)?;
            *len += lines.len() as u64;
        }
        self.durable(|| {
            self.journal.sync_data()?;
            dirs.iter().try_for_each(File::sync_all)
        })
    }

    fn sync_log(&self) -> io::Result<u64> {
        self.believed()?;
        self.log.sync(|file| self.durable(|| file.sync_data()))
    }

    /// Runs a sync. One that failed may have dropped the very pages that it was for, and the next would succeed without
    /// them: no later one is believed, and its error is never one that asks for another try.
    fn durable<T>(&self, sync: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.believed()?;
        sync().map_err(|error| {
            self.suspect.store(true, Ordering::Release);
            unsynced(error)
        })
    }

    fn believed(&self) -> io::Result<()> {
        match self.suspect.load(Ordering::Acquire) {
            true => Err(io::Error::other("an earlier sync failed")),
            false => Ok(()),
        }
    }
}

/// An artifact that is being written.
#[derive(Debug)]
pub struct Stashing {
    file: Arc<File>,
    temp: Temp,
    dir: PathBuf,
    reserve: u64,
    hasher: Sha256,
    len: u64,
}

/// Deletes an unfinished file when its writer is dropped. After the rename there is nothing under this name.
#[derive(Debug)]
struct Temp(PathBuf);

impl Drop for Temp {
    fn drop(&mut self) {
        fs::remove_file(&self.0).ok();
    }
}

impl Stashing {
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if has_less(&self.dir, self.reserve) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        (&*self.file).write_all(bytes)?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    pub(super) async fn finish(self) -> io::Result<(Digest, u64)> {
        let Self { file, temp, dir, reserve: _, hasher, len } = self;
        let digest = Digest::from_hasher(hasher);
        blocking(move || {
            file.sync_all().map_err(unsynced)?;
            fs::rename(&temp.0, dir.join(digest.to_string()))?;
            sync_dir(&dir).map_err(unsynced)
        })
        .await?;
        Ok((digest, len))
    }
}

/// Reads a file on a thread of its own, as fast as the channel is emptied.
pub(super) fn pieces(path: &Path, from: u64) -> io::Result<mpsc::Receiver<Bytes>> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(from))?;
    let (tx, rx) = mpsc::channel(PIECES_AHEAD);
    tokio::task::spawn_blocking(move || {
        loop {
            let mut piece = Vec::with_capacity(PIECE);
            match (&mut file).take(PIECE as u64).read_to_end(&mut piece) {
                Ok(0) => return,
                Ok(_) if tx.blocking_send(piece.into()).is_ok() => {}
                Ok(_) => return,
                Err(error) => return tracing::error!(%error, "a stashed artifact cannot be read"),
            }
        }
    });
    Ok(rx)
}

fn fresh(dir: PathBuf, assignment: &Assignment) -> io::Result<Entry> {
    DirBuilder::new().mode(0o700).create(&dir)?;
    let journal = open_rw(&dir.join(JOURNAL))?;
    let line = journal::assignment_line(assignment);
    journal.write_all_at(&line, 0)?;
    Ok(Entry {
        log: Segments::create(&dir)?,
        cap: Mutex::new(Cap::new(limits::LOG_CAP)),
        journal,
        journal_len: Mutex::new(line.len() as u64),
        rooted: AtomicBool::new(false),
        farm_has: AtomicU64::new(0),
        suspect: AtomicBool::new(false),
        counter: AtomicU64::new(0),
        dir,
    })
}

/// Opens what an earlier daemon left of one attempt.
fn reopen(at: AttemptRef, dir: PathBuf) -> io::Result<(Entry, Held)> {
    let path = dir.join(JOURNAL);
    let bytes = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        other => other?,
    };
    let read = journal::read(&bytes);
    if read.damaged {
        tracing::warn!(attempt = %at, "a record in the spool is damaged: it is set aside and the attempt is lost");
        fs::copy(&path, dir.join("journal.damaged"))?;
    }
    let journal = open_rw(&path)?;
    journal.set_len(read.good as u64)?;
    let log = Segments::reopen(&dir)?;
    if !super::has_result(&read.reports) {
        log.forget_zeros()?;
    }
    let log_len = log.len();
    let stash = dir.join(STASH);
    let state = if read.damaged || read.assignment.is_none() {
        HeldState::Lost
    } else {
        judge(&read.reports, log_len, |digest| stash.join(digest.to_string()).exists())
    };
    let seq = read.reports.last().map_or(0, |(seq, _)| *seq);
    let entry = Entry {
        log,
        cap: Mutex::new(Cap::sealed(log_len)),
        journal,
        journal_len: Mutex::new(read.good as u64),
        rooted: AtomicBool::new(false),
        farm_has: AtomicU64::new(0),
        suspect: AtomicBool::new(false),
        counter: AtomicU64::new(0),
        dir,
    };
    Ok((entry, Held { attempt: at, state, log_len, seq }))
}

fn parse_name(name: &str) -> Option<AttemptRef> {
    let (job, attempt) = name.split_once('.')?;
    Some(AttemptRef { job: job.parse().ok()?, attempt: attempt.parse().ok()? })
}

/// Keeps what cannot be read for a person to look at. The daemon starts all the same.
fn set_aside(root: &Path, name: &str, why: &str) {
    let moved = fs::rename(root.join(name), root.join(format!("{ASIDE}{name}")));
    match moved {
        Ok(()) => tracing::warn!(name, why, "a record in the spool is set aside"),
        Err(error) => tracing::error!(name, why, %error, "a record in the spool can be neither read nor set aside"),
    }
}

/// Appends at `len`. A write that fails half-way leaves the file as long as it was.
fn extend(file: &File, len: u64, bytes: &[u8]) -> io::Result<()> {
    file.write_all_at(bytes, len).inspect_err(|_| {
        if let Err(error) = file.set_len(len) {
            tracing::error!(%error, "a spool file cannot be cut back after a failed write");
        }
    })
}

fn open_rw(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// A disk that cannot be asked shows by its next write how full it is.
fn has_less(dir: &Path, reserve: u64) -> bool {
    reserve > 0 && disk_free(dir).is_ok_and(|free| free < reserve)
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Hides the kind: that the disk is full excuses a write and no sync.
fn unsynced(error: io::Error) -> io::Error {
    io::Error::other(error)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Short, alone, assignment};
    use super::*;
    use alloy_shared::room::is_short;

    #[test]
    fn a_sync_that_failed_is_final() {
        let dir = tempfile::tempdir().unwrap();
        let entry = reopen(AttemptRef { job: alloy_shared::id::JobId::from_raw(1), attempt: 1 }, dir.path().into());
        let (entry, _) = entry.unwrap();
        entry.sync_log().unwrap();
        let error = entry.durable(|| Err::<(), _>(io::ErrorKind::StorageFull.into())).unwrap_err();
        assert!(!is_full(&error), "nobody may try it again: {error}");
        assert!(entry.sync_log().is_err(), "the next one says nothing about the lost pages");
    }

    #[tokio::test]
    async fn a_want_of_descriptors_is_no_sync_that_failed() {
        if !alone("spool::disk::tests::a_want_of_descriptors_is_no_sync_that_failed") {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (disk, _) = Disk::open(dir.path(), 0).unwrap();
        let (at, reports) = (assignment().attempt, [(1, Report::Accepted)]);
        let short = Short::begin();
        assert!(is_short(&disk.begin(&assignment()).unwrap_err()));
        drop(short);
        disk.begin(&assignment()).unwrap();
        let rooted = |disk: &Disk| disk.entry(at).unwrap().rooted.load(Ordering::Acquire);
        for _ in 0..2 {
            let short = Short::begin();
            let error = disk.record(at, &reports).await.unwrap_err();
            assert!(is_short(&error), "{error}");
            drop(short);
            assert!(!rooted(&disk), "a power cut would take the names");
        }
        disk.record(at, &reports).await.unwrap();
        assert!(rooted(&disk));
        disk.append(at, b"log").unwrap();
        // In a new daemon its log is not open.
        let (disk, _) = Disk::open(dir.path(), 0).unwrap();
        let short = Short::begin();
        assert!(is_short(&disk.sync(at).await.unwrap_err()));
        assert!(is_short(&disk.read(at, 0, 3, 0).unwrap_err()));
        drop(short);
        assert_eq!((disk.sync(at).await.unwrap(), disk.read(at, 0, 3, 0).unwrap().as_ref()), (3, &b"log"[..]));
        assert_eq!(disk.reports(at, 0).unwrap(), reports, "each once");
    }
}
