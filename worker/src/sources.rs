//! S: a job's sources: a cache of blobs with a byte budget, what is missing from the orchestrator, one archive for the guest.
//!
//! The cache is the first to go where the disk has little room: jobs need what it takes. Only what an attempt is being
//! given stays.
//!
//! Every file in the archive carries the time of its staging. One time for all is what build tools need: nothing is older
//! than what it was made of, and nothing looks as if it had been edited since.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use alloy_shared::env::Ms;
use alloy_shared::id::Digest;
use alloy_shared::limits::{self, Limits};
use alloy_shared::wire::source::{Entry, EntryKind, Manifest};
use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use crate::host::FreeBytes;
use crate::upstream::{Grant, TransferError, Upstream};

/// The archive's name in the inbox.
pub const SOURCE_TAR: &str = "source.tar";
/// What GNU tar calls an entry that holds a long link's target. Readers look at its type.
const LONG_LINK: &str = "@LongLink";
/// Digests in one request.
const BATCH: usize = 4_096;
/// One for the manifest, one for its blobs, and some for blobs that turn out to be damaged when they are read.
const ROUNDS: usize = 5;

#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// What arrived is not what its digest says.
    #[error("{0}")]
    Corrupt(String),
    /// The bytes are the ones that the job names, and they make no tree.
    #[error("{0}")]
    NoTree(String),
    #[error("sources could not be fetched: {0}")]
    Transfer(#[from] TransferError),
    #[error("sources could not be staged: {0}")]
    Disk(#[from] std::io::Error),
}

pub enum Sources {
    Disk(Arc<Disk>),
    Mem(Mem),
}

/// A source that an attempt is being given. None of its blobs leaves the cache before this is dropped.
#[derive(Debug, Clone)]
pub struct Hold(Arc<Held>);

#[derive(Debug)]
struct Held {
    source: Digest,
    /// Known as soon as the manifest is here.
    blobs: OnceLock<HashSet<Digest>>,
}

impl Held {
    fn has(&self, digest: &Digest) -> bool {
        self.source == *digest || self.blobs.get().is_some_and(|blobs| blobs.contains(digest))
    }
}

impl Sources {
    /// A cache on a disk without end.
    #[cfg(test)]
    pub fn open(root: &Path, budget_bytes: u64) -> std::io::Result<Self> {
        let limits = Limits { disk_floor: 0, ..Limits::default() };
        Self::open_keeping(root, budget_bytes, &limits, Box::new(|| Ok(u64::MAX)))
    }

    /// Opens a cache directory, which may hold blobs of earlier runs. Some of its disk stays free, whatever the budget says.
    pub fn open_keeping(root: &Path, budget_bytes: u64, limits: &Limits, free: FreeBytes) -> std::io::Result<Self> {
        Disk::open(root, budget_bytes, limits, free).map(|disk| Self::Disk(Arc::new(disk)))
    }

    pub fn memory() -> Self {
        Self::Mem(Mem::default())
    }

    /// Announces that the tree with this manifest digest is about to be staged.
    pub fn hold(&self, source: Digest) -> Hold {
        let held = Arc::new(Held { source, blobs: OnceLock::new() });
        if let Self::Disk(disk) = self {
            let mut index = disk.index();
            index.held.retain(|held| held.strong_count() > 0);
            index.held.push(Arc::downgrade(&held));
        }
        Hold(held)
    }

    /// Lets go of a source, however its staging ended, and of what the cache has too much then.
    pub async fn let_go(&self, hold: Hold) {
        drop(hold);
        self.evict().await;
    }

    /// Gives up what no attempt is being given, oldest first, down to the budget and to what leaves the disk its room.
    /// Returns how many bytes that were.
    pub async fn evict(&self) -> u64 {
        match self {
            Self::Disk(disk) => {
                let disk = Arc::clone(disk);
                tokio::task::spawn_blocking(move || disk.evict(disk.keep)).await.unwrap_or(0)
            }
            Self::Mem(_) => 0,
        }
    }

    /// Puts the tree that is held into the inbox, as one archive. Returns the archive's name.
    pub async fn stage(
        &self,
        hold: &Hold,
        inbox: &Path,
        upstream: &dyn Upstream,
        grant: &Grant,
        now: Ms,
    ) -> Result<&'static str, SourceError> {
        let source = hold.0.source;
        let mut wanted = vec![source];
        for _ in 0..ROUNDS {
            if wanted == [source] {
                self.manifest(source, upstream, grant).await?;
            } else {
                self.fetch(&wanted, upstream, grant).await?;
            }
            wanted = match self {
                Self::Disk(disk) => {
                    let (disk, hold, inbox) = (Arc::clone(disk), hold.clone(), inbox.to_owned());
                    let stop = CancellationToken::new();
                    let _while_waited_for = stop.clone().drop_guard();
                    let stage = move || disk.stage(&hold.0, &inbox, now, &stop);
                    tokio::task::spawn_blocking(stage)
                        .await
                        .unwrap_or_else(|_| Err(SourceError::Disk(std::io::Error::other("staging ended early"))))?
                }
                Self::Mem(mem) => mem.missing(source)?,
            };
            if wanted.is_empty() {
                return Ok(SOURCE_TAR);
            }
        }
        Err(SourceError::Disk(std::io::Error::other("the source cache loses what it is given")))
    }

    /// A manifest may be larger than any blob, so it comes by itself; here it is kept like one.
    async fn manifest(&self, source: Digest, upstream: &dyn Upstream, grant: &Grant) -> Result<(), SourceError> {
        if self.has(&source) {
            return Ok(());
        }
        let bytes = upstream.manifest(grant).await?;
        if Digest::of(&bytes) != source {
            return Err(SourceError::Corrupt(format!("the farm sent other bytes than manifest {source}")));
        }
        self.put(source, bytes).await
    }

    async fn put(&self, digest: Digest, bytes: Bytes) -> Result<(), SourceError> {
        match self {
            Self::Disk(disk) => {
                let disk = Arc::clone(disk);
                let stored = tokio::task::spawn_blocking(move || disk.put(digest, &bytes)).await;
                Ok(stored.unwrap_or_else(|_| Err(std::io::Error::other("storing ended early")))?)
            }
            Self::Mem(mem) => {
                mem.put(digest, bytes);
                Ok(())
            }
        }
    }

    async fn fetch(&self, wanted: &[Digest], upstream: &dyn Upstream, grant: &Grant) -> Result<(), SourceError> {
        for batch in wanted.chunks(BATCH) {
            let mut missing: HashSet<Digest> = batch.iter().filter(|digest| !self.has(digest)).copied().collect();
            if missing.is_empty() {
                continue;
            }
            let ask: Vec<Digest> = batch.iter().filter(|digest| missing.contains(digest)).copied().collect();
            let mut blobs = upstream.fetch(grant, &ask).await?;
            while let Some(blob) = blobs.recv().await {
                let (digest, bytes) = blob?;
                // Frames travel whole, with blobs that nobody asked for: mostly older contents of the same files, which are
                // not worth their room in the cache.
                if !missing.contains(&digest) {
                    continue;
                }
                if Digest::of(&bytes) != digest {
                    return Err(SourceError::Corrupt(format!("the farm sent other bytes than blob {digest}")));
                }
                self.put(digest, bytes).await?;
                missing.remove(&digest);
            }
            if !missing.is_empty() {
                let why = format!("{} of {} blobs did not come", missing.len(), ask.len());
                return Err(SourceError::Transfer(TransferError::Broken(why)));
            }
        }
        Ok(())
    }

    fn has(&self, digest: &Digest) -> bool {
        match self {
            Self::Disk(disk) => disk.has(digest),
            Self::Mem(mem) => mem.blobs.lock().unwrap_or_else(PoisonError::into_inner).contains_key(digest),
        }
    }
}

/// Blobs without files, for the simulator: the tree is checked, the archive is only a name.
#[derive(Default)]
pub struct Mem {
    blobs: Mutex<HashMap<Digest, Bytes>>,
}

impl Mem {
    fn put(&self, digest: Digest, bytes: Bytes) {
        self.blobs.lock().unwrap_or_else(PoisonError::into_inner).insert(digest, bytes);
    }

    fn missing(&self, source: Digest) -> Result<Vec<Digest>, SourceError> {
        let blobs = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(manifest) = blobs.get(&source) else { return Ok(vec![source]) };
        let manifest = Manifest::decode(manifest).map_err(|error| SourceError::NoTree(error.to_string()))?;
        Ok(manifest.blobs().into_iter().filter(|digest| !blobs.contains_key(digest)).collect())
    }
}

/// One file a blob, in 256 directories, least recently used out first.
pub struct Disk {
    root: PathBuf,
    budget_bytes: u64,
    /// Bytes that stay free whatever is fetched: for reports, and for what a log that was cut off ends in.
    reserve: u64,
    /// Bytes that are free after an eviction, if the cache has so many to give: somewhat more than jobs are refused for.
    keep: u64,
    free: FreeBytes,
    index: Mutex<Index>,
}

#[derive(Default)]
struct Index {
    /// Size and the turn of the last use.
    blobs: HashMap<Digest, (u64, u64)>,
    held: Vec<Weak<Held>>,
    bytes: u64,
    turn: u64,
}

/// How many bytes the cache may have: its budget, and no more than leave `keep` bytes of the disk free.
fn allowance(budget_bytes: u64, bytes: u64, free: u64, keep: u64) -> u64 {
    budget_bytes.min(bytes.saturating_add(free).saturating_sub(keep))
}

impl Index {
    fn next_turn(&mut self) -> u64 {
        self.turn += 1;
        self.turn
    }

    fn touch(&mut self, digest: Digest, size: u64) {
        let turn = self.next_turn();
        let old = self.blobs.insert(digest, (size, turn));
        self.bytes = self.bytes + size - old.map_or(0, |(size, _)| size);
    }

    /// Returns the size of what was there.
    fn forget(&mut self, digest: &Digest) -> u64 {
        let size = self.blobs.remove(digest).map_or(0, |(size, _)| size);
        self.bytes -= size;
        size
    }

    fn is_held(&self, digest: &Digest) -> bool {
        self.held.iter().filter_map(Weak::upgrade).any(|held| held.has(digest))
    }

    /// What has to go, oldest first. What is held stays, also if the rest is not enough.
    fn surplus(&self, allowance: u64) -> Vec<Digest> {
        if self.bytes <= allowance {
            return Vec::new();
        }
        let held: Vec<Arc<Held>> = self.held.iter().filter_map(Weak::upgrade).collect();
        let idle = self.blobs.iter().filter(|(digest, _)| !held.iter().any(|held| held.has(digest)));
        let mut oldest: Vec<(u64, u64, Digest)> = idle.map(|(digest, (size, turn))| (*turn, *size, *digest)).collect();
        oldest.sort_unstable();
        let mut left = self.bytes;
        let enough = oldest.into_iter().take_while(|(_, size, _)| {
            let more = left > allowance;
            left = left.saturating_sub(*size);
            more
        });
        enough.map(|(_, _, digest)| digest).collect()
    }
}

impl Disk {
    fn open(root: &Path, budget_bytes: u64, limits: &Limits, free: FreeBytes) -> std::io::Result<Self> {
        std::fs::create_dir_all(root)?;
        let mut found = Vec::new();
        for shard in std::fs::read_dir(root)?.flatten() {
            for entry in std::fs::read_dir(shard.path()).into_iter().flatten().flatten() {
                let digest = entry.file_name().to_str().and_then(|name| name.parse::<Digest>().ok());
                match (digest, entry.metadata()) {
                    (Some(digest), Ok(meta)) if meta.is_file() => {
                        found.push((meta.modified().ok(), meta.len(), digest));
                    }
                    // A half-written file of a daemon that died, or something that nobody here made.
                    (None | Some(_), _) => {
                        if let Err(error) = std::fs::remove_file(entry.path()) {
                            tracing::warn!(path = %entry.path().display(), %error, "this is no blob and stays in the cache");
                        }
                    }
                }
            }
        }
        found.sort();
        let mut index = Index::default();
        found.into_iter().for_each(|(_, size, digest)| index.touch(digest, size));
        let reserve = limits.disk_reserve();
        let keep = limits.disk_floor.saturating_add(reserve);
        let disk = Self { root: root.to_owned(), budget_bytes, reserve, keep, free, index: Mutex::new(index) };
        disk.evict(keep);
        Ok(disk)
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        self.root.join(&name[..2]).join(name)
    }

    fn has(&self, digest: &Digest) -> bool {
        self.index().blobs.contains_key(digest)
    }

    /// A disk that cannot be asked shows by its next write how full it is.
    fn has_room(&self, len: u64) -> bool {
        self.reserve == 0 || (self.free)().map_or(true, |free| free >= self.reserve.saturating_add(len))
    }

    /// Sees to it that so many bytes can be written and the reserve stays free.
    fn make_room(&self, len: u64) -> std::io::Result<()> {
        if self.has_room(len) {
            return Ok(());
        }
        self.evict(self.keep.max(self.reserve.saturating_add(len)));
        match self.has_room(len) {
            true => Ok(()),
            false => Err(std::io::ErrorKind::StorageFull.into()),
        }
    }

    fn put(&self, digest: Digest, bytes: &[u8]) -> std::io::Result<()> {
        self.make_room(bytes.len() as u64)?;
        let path = self.path(&digest);
        // Two jobs may fetch the same blob at once.
        let turn = self.index().next_turn();
        let temp = path.with_extension(format!("{turn}.part"));
        if let Some(shard) = path.parent() {
            std::fs::create_dir_all(shard)?;
        }
        // No sync: what a power cut damages is noticed by its digest and fetched again.
        let written = std::fs::write(&temp, bytes).and_then(|()| std::fs::rename(&temp, &path));
        if let Err(error) = written {
            let _already_failing = std::fs::remove_file(&temp);
            return Err(error);
        }
        self.index().touch(digest, bytes.len() as u64);
        Ok(())
    }

    /// Reads a blob and checks it. A damaged or vanished one is forgotten.
    fn get(&self, digest: &Digest) -> Option<Vec<u8>> {
        let bytes = std::fs::read(self.path(digest)).ok().filter(|bytes| Digest::of(bytes) == *digest);
        let mut index = self.index();
        match &bytes {
            Some(bytes) => index.touch(*digest, bytes.len() as u64),
            None => _ = index.forget(digest),
        }
        bytes
    }

    /// Writes the archive if everything is here, else returns what is not.
    fn stage(&self, held: &Held, inbox: &Path, now: Ms, stop: &CancellationToken) -> Result<Vec<Digest>, SourceError> {
        let Some(manifest) = self.get(&held.source) else { return Ok(vec![held.source]) };
        let manifest = Manifest::decode(&manifest).map_err(|error| SourceError::NoTree(error.to_string()))?;
        let blobs = manifest.blobs();
        // Before the look: what is here then stays here.
        held.blobs.get_or_init(|| blobs.iter().copied().collect());
        let missing: Vec<Digest> = blobs.into_iter().filter(|digest| !self.has(digest)).collect();
        if !missing.is_empty() {
            return Ok(missing);
        }
        self.make_room(manifest.total_bytes())?;
        waited_for(stop)?;
        // The inbox is there as long as its VM is. It is not made here: nothing is staged for a VM that is gone.
        let temp = inbox.join("source.part");
        let missing = self.assemble(&manifest, &temp, now, stop)?;
        if missing.is_empty() {
            std::fs::rename(&temp, inbox.join(SOURCE_TAR))?;
        }
        Ok(missing)
    }

    fn assemble(
        &self,
        manifest: &Manifest,
        tar: &Path,
        now: Ms,
        stop: &CancellationToken,
    ) -> Result<Vec<Digest>, SourceError> {
        let mtime = u64::try_from(now.0 / 1000).unwrap_or(0);
        let mut archive = tar::Builder::new(BufWriter::with_capacity(1 << 20, File::create(tar)?));
        let mut lost = Vec::new();
        for entry in manifest.entries() {
            waited_for(stop)?;
            let mut header = tar::Header::new_gnu();
            header.set_mtime(mtime);
            header.set_mode(entry.mode);
            header.set_size(entry.size);
            match entry.kind {
                EntryKind::File => {
                    header.set_entry_type(tar::EntryType::Regular);
                    let mut content = Chunks::new(self, entry, stop);
                    let wrote = archive.append_data(&mut header, &entry.path, &mut content);
                    if let Some(digest) = content.lost {
                        lost.push(digest);
                        return Ok(lost);
                    }
                    wrote?;
                    if !content.is_exact() {
                        let why = format!("{}: its blobs do not make its size", entry.path);
                        return Err(SourceError::NoTree(why));
                    }
                }
                EntryKind::Dir => {
                    header.set_entry_type(tar::EntryType::Directory);
                    archive.append_data(&mut header, format!("{}/", entry.path), std::io::empty())?;
                }
                EntryKind::Symlink => {
                    header.set_entry_type(tar::EntryType::Symlink);
                    append_link(&mut archive, &mut header, &entry.path, entry.target.as_deref().unwrap_or(""))?;
                }
            }
        }
        archive.into_inner()?.flush()?;
        Ok(lost)
    }

    /// Returns how many bytes were given up.
    fn evict(&self, keep: u64) -> u64 {
        let free = (self.free)().unwrap_or(u64::MAX);
        let surplus = {
            let index = self.index();
            index.surplus(allowance(self.budget_bytes, index.bytes, free, keep))
        };
        let mut evicted = 0;
        for digest in surplus {
            let mut index = self.index();
            // Since then an attempt may have come that is given this one.
            if !index.is_held(&digest) {
                // One that cannot be removed is found again at the next start.
                let _found_again = std::fs::remove_file(self.path(&digest));
                evicted += index.forget(&digest);
            }
        }
        evicted
    }
}

/// An error once nobody waits for the archive any more: the VM that it is for may be gone, and the disk's room is not.
fn waited_for(stop: &CancellationToken) -> std::io::Result<()> {
    match stop.is_cancelled() {
        true => Err(std::io::Error::other("nobody waits for the archive any more")),
        false => Ok(()),
    }
}

/// Appends a link with exactly this target. The library's own way would clean it up like a path.
fn append_link(
    archive: &mut tar::Builder<impl Write>,
    header: &mut tar::Header,
    path: &str,
    target: &str,
) -> std::io::Result<()> {
    if target.len() <= header.as_old().linkname.len() {
        header.set_link_name_literal(target)?;
    } else {
        // GNU's form for a long one: an entry before this one whose body is the target.
        let mut long = tar::Header::new_gnu();
        long.set_path(LONG_LINK)?;
        long.set_entry_type(tar::EntryType::GNULongLink);
        long.set_mode(0o644);
        long.set_size(target.len() as u64 + 1);
        long.set_cksum();
        archive.append(&long, target.as_bytes().chain(&b"\0"[..]))?;
    }
    archive.append_data(header, path, std::io::empty())
}

/// The bytes of one file, blob after blob, never more than its size.
struct Chunks<'a> {
    disk: &'a Disk,
    stop: &'a CancellationToken,
    chunks: std::slice::Iter<'a, Digest>,
    current: std::io::Cursor<Vec<u8>>,
    left: u64,
    overlong: bool,
    lost: Option<Digest>,
}

impl<'a> Chunks<'a> {
    fn new(disk: &'a Disk, entry: &'a Entry, stop: &'a CancellationToken) -> Self {
        let current = std::io::Cursor::new(Vec::new());
        Self { disk, stop, chunks: entry.chunks.iter(), current, left: entry.size, overlong: false, lost: None }
    }

    fn is_exact(&self) -> bool {
        self.left == 0 && !self.overlong
    }
}

impl Read for Chunks<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        loop {
            let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(out.len());
            let len = self.current.read(&mut out[..most])?;
            if len > 0 {
                self.left -= len as u64;
                return Ok(len);
            }
            if (self.current.position() as usize) < self.current.get_ref().len() {
                self.overlong = !out.is_empty();
                return Ok(0);
            }
            waited_for(self.stop)?;
            let Some(digest) = self.chunks.next() else { return Ok(0) };
            match self.disk.get(digest) {
                Some(bytes) => self.current = std::io::Cursor::new(bytes),
                None => {
                    self.lost = Some(*digest);
                    return Err(std::io::Error::other("a blob left the cache"));
                }
            }
        }
    }
}

const _: () = assert!(BATCH * 67 < limits::JSON_BODY_MAX as usize);

#[cfg(test)]
pub(crate) mod tests;
