//! S: objects as files: `objects/KEY`, temporary ones in `tmp/`, unfinished uploads in `partial/`.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use alloy_shared::env::Ms;
use alloy_shared::id::Digest;
use alloy_shared::room::{is_full, is_short};
use alloy_shared::wire::farm::Storage;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};

use super::{BlobError, BlobKey, Body, Stored, check, free_bytes, off_thread, sync_dir};
use crate::broken::Care;
use crate::sums::{BLOCK, FOOTER, Seal, Sums};

mod list;
mod pen;

pub(super) use pen::Draft;
use pen::{Pen, Target, Temp};

/// An upload that nobody went on with for a day is swept at the next start.
const PARTIAL_AGE_MS: i64 = 24 * 3600 * 1000;
/// Unfinished uploads that nobody sends whose file stays open and whose running hash is remembered; others are hashed again at their end.
const PARTIALS_MAX: usize = 64;
/// Where logs that became objects lie.
const LOGS: &str = "logs/";
/// Blocks read ahead of a client.
const READ_AHEAD: usize = 2;

#[derive(Debug)]
pub struct Fs {
    place: Arc<Place>,
    names: AtomicU64,
    partials: Mutex<HashMap<BlobKey, Arc<Mutex<Partial>>>>,
}

#[derive(Debug)]
struct Place {
    root: PathBuf,
    care: Care,
    /// Directories whose names this process knows to be durable. One for each kind of object and two letters of its name, and
    /// those of logs.
    dirs: Mutex<HashSet<PathBuf>>,
}

/// An upload in progress. Its owner is the newest request; older ones find their number out of date.
#[derive(Debug, Default)]
struct Partial {
    file: Option<Arc<File>>,
    len: u64,
    owner: u64,
    /// Of all bytes so far, if this process saw them all.
    sums: Option<Sums>,
    /// The file is the object: nothing can follow.
    sealed: bool,
}

fn fault(what: &'static str) -> impl Fn(io::Error) -> BlobError {
    move |error| if is_full(&error) { BlobError::Full } else { BlobError::Io { what, error } }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Place {
    fn object(&self, key: &BlobKey) -> PathBuf {
        self.root.join("objects").join(key.as_str())
    }

    fn partial(&self, key: &BlobKey) -> PathBuf {
        self.root.join("partial").join(key.as_str().replace('/', "-"))
    }

    fn storage(&self) -> Result<Storage, BlobError> {
        let free_bytes = free_bytes(&self.root).map_err(fault("look at the disk's free space"))?;
        Ok(Storage { free_bytes, floor_bytes: self.care.floor })
    }

    fn check_room(&self, keep: u64) -> Result<(), BlobError> {
        if self.storage()?.free_bytes < keep { Err(BlobError::Full) } else { Ok(()) }
    }

    /// A write or a sync that failed.
    fn fails(&self, what: &'static str, error: io::Error) -> BlobError {
        if !is_full(&error) && !is_short(&error) {
            self.care.broken.tell(what, &error);
        }
        fault(what)(error)
    }

    /// Seals a file of `seal.len` bytes and makes it the object.
    fn publish(&self, file: &File, from: &Path, key: &BlobKey, seal: &Seal) -> Result<Stored, BlobError> {
        let object = self.object(key);
        let dir = object.parent().unwrap_or(&self.root);
        let done = (|| {
            file.write_all_at(&seal.encode(), seal.len)?;
            file.sync_all()?;
            self.make_dirs(dir)?;
            match fs::rename(from, &object) {
                // Whoever deleted the last object in it took it along.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.forget_dirs(dir);
                    self.make_dirs(dir)?;
                    fs::rename(from, &object)?;
                }
                done => done?,
            }
            sync_dir(dir)
        })();
        done.map_err(|error| self.fails("finish an object", error))?;
        Ok(Stored { size: seal.len, sha256: seal.sha256 })
    }

    /// Creates a directory below the root. It and those above it are durable in their parents, whoever made them.
    fn make_dirs(&self, dir: &Path) -> io::Result<()> {
        if dir == self.root || lock(&self.dirs).contains(dir) {
            return Ok(());
        }
        let Some(parent) = dir.parent() else { return Ok(()) };
        self.make_dirs(parent)?;
        match fs::create_dir(dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            Ok(()) | Err(_) => sync_dir(parent)?,
        }
        lock(&self.dirs).insert(dir.to_owned());
        Ok(())
    }

    fn forget_dirs(&self, dir: &Path) {
        let mut dirs = lock(&self.dirs);
        dir.ancestors().take_while(|above| *above != self.root).for_each(|above| {
            dirs.remove(above);
        });
    }

    /// Removes an object, and of a log's the directories of its attempt and its job with the last one in them: there are as many
    /// as there were jobs.
    fn remove(&self, key: &BlobKey) -> io::Result<()> {
        let object = self.object(key);
        match fs::remove_file(&object) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        if key.as_str().starts_with(LOGS) {
            let mut dirs = lock(&self.dirs);
            for dir in object.ancestors().skip(1).take(2) {
                if fs::remove_dir(dir).is_err() {
                    break;
                }
                dirs.remove(dir);
            }
        }
        Ok(())
    }

    /// Makes the name of an object durable that somebody else published.
    fn settle(&self, key: &BlobKey) -> Result<(), BlobError> {
        let object = self.object(key);
        let dir = object.parent().unwrap_or(&self.root);
        self.make_dirs(dir).and_then(|()| sync_dir(dir)).map_err(|error| self.fails("settle an object", error))
    }

    fn open_sealed(&self, key: &BlobKey) -> Result<(File, Seal), BlobError> {
        let file = match File::open(self.object(key)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(BlobError::Missing(key.clone())),
            Err(error) => return Err(fault("open an object")(error)),
        };
        let seal = read_seal(&file).map_err(fault("read an object's seal"))?;
        let seal = seal.ok_or_else(|| BlobError::Damaged(key.clone()))?;
        Ok((file, seal))
    }
}

fn read_seal(file: &File) -> io::Result<Option<Seal>> {
    let whole = file.metadata()?.len();
    let Some(footer_at) = whole.checked_sub(FOOTER) else { return Ok(None) };
    let mut footer = [0; FOOTER as usize];
    file.read_exact_at(&mut footer, footer_at)?;
    let Some(at) = Seal::size(&footer).and_then(|size| whole.checked_sub(size)) else { return Ok(None) };
    let mut bytes = vec![0; (whole - at) as usize];
    file.read_exact_at(&mut bytes, at)?;
    Ok(Seal::decode(&bytes).filter(|seal| seal.len == at))
}

impl Fs {
    pub async fn open(root: PathBuf, now: Ms, care: impl Into<Care>) -> Result<Self, BlobError> {
        let place = Arc::new(Place { root, care: care.into(), dirs: Mutex::default() });
        let opened = place.clone();
        off_thread(move || prepare(&opened.root, now)).await.map_err(fault("open the blob directory"))?;
        Ok(Self { place, names: AtomicU64::new(0), partials: Mutex::default() })
    }

    pub(super) fn look(root: PathBuf) -> Self {
        let place = Arc::new(Place { root, care: Care::default(), dirs: Mutex::default() });
        Self { place, names: AtomicU64::new(0), partials: Mutex::default() }
    }

    pub(super) fn storage(&self) -> Result<Storage, BlobError> {
        self.place.storage()
    }

    pub(super) async fn create(&self, key: &BlobKey) -> Result<Draft, BlobError> {
        let path = self.place.root.join("tmp").join(self.names.fetch_add(1, Ordering::Relaxed).to_string());
        let place = self.place.clone();
        let temp = off_thread(move || {
            place.check_room(place.care.floor)?;
            let file =
                OpenOptions::new().write(true).create_new(true).open(&path).map_err(fault("create an object"))?;
            Ok(Temp { file: Arc::new(file), path })
        })
        .await?;
        Ok(Draft { place: self.place.clone(), key: key.clone(), temp, pen: Pen::new(Some(Sums::default())), len: 0 })
    }

    pub(super) async fn read(&self, key: &BlobKey, range: Range<u64>) -> Result<Body, BlobError> {
        let (place, name) = (self.place.clone(), key.clone());
        let (file, seal) = off_thread(move || place.open_sealed(&name)).await?;
        if range.start > range.end || range.end > seal.len {
            return Err(BlobError::Damaged(key.clone()));
        }
        let object = Arc::new((file, seal, key.clone()));
        let blocks = range.start / BLOCK..range.end.div_ceil(BLOCK).max(range.start / BLOCK);
        let parts = stream::iter(blocks).map(move |index| {
            let (object, range) = (object.clone(), range.clone());
            async move { off_thread(move || read_block(&object.0, &object.1, &object.2, index, &range)).await }
        });
        Ok(parts.buffered(READ_AHEAD).filter(|part| std::future::ready(!matches!(part, Ok(b) if b.is_empty()))).boxed())
    }

    pub(super) async fn read_piece(&self, key: &BlobKey, at: u64, len: u32) -> Result<Bytes, BlobError> {
        let (path, key) = (self.place.object(key), key.clone());
        off_thread(move || {
            let mut bytes = vec![0; len as usize];
            match File::open(path).and_then(|file| file.read_exact_at(&mut bytes, at)) {
                Ok(()) => Ok(bytes.into()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Err(BlobError::Missing(key)),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(BlobError::Damaged(key)),
                Err(error) => Err(fault("read an object")(error)),
            }
        })
        .await
    }

    pub(super) async fn delete(&self, key: &BlobKey) -> Result<(), BlobError> {
        let (place, name) = (self.place.clone(), key.clone());
        off_thread(move || place.remove(&name)).await.map_err(fault("delete an object"))?;
        // Whoever sends the same bytes again must not be told that they are here.
        lock(&self.partials).remove(key);
        Ok(())
    }

    /// The upload's state, read from the disk if this process has not met it.
    async fn load(&self, key: &BlobKey) -> Result<Arc<Mutex<Partial>>, BlobError> {
        let entry = {
            let mut partials = lock(&self.partials);
            if partials.len() >= PARTIALS_MAX && !partials.contains_key(key) {
                partials.retain(|_, partial| Arc::strong_count(partial) > 1);
            }
            partials.entry(key.clone()).or_default().clone()
        };
        let (place, key, loaded) = (self.place.clone(), key.clone(), entry.clone());
        off_thread(move || {
            let mut partial = lock(&loaded);
            if partial.file.is_some() {
                return Ok(());
            }
            match place.open_sealed(&key) {
                // The upload was finished, but whoever finished it did not live to say so.
                Ok((file, seal)) => {
                    *partial = Partial { file: Some(Arc::new(file)), len: seal.len, sealed: true, ..Partial::default() }
                }
                Err(BlobError::Missing(_) | BlobError::Damaged(_)) => {}
                Err(error) => return Err(error),
            }
            if partial.file.is_none() {
                let mut options = OpenOptions::new();
                let file = options.read(true).write(true).create(true).truncate(false).open(place.partial(&key));
                let file = file.map_err(fault("open an upload"))?;
                let len = upload_len(&file).map_err(fault("look at an upload"))?;
                file.set_len(len).map_err(fault("look at an upload"))?;
                let sums = (len == 0).then(Sums::default);
                *partial = Partial { file: Some(Arc::new(file)), len, sums, ..Partial::default() };
            }
            Ok(())
        })
        .await?;
        Ok(entry)
    }

    pub(super) async fn partial(&self, key: &BlobKey) -> Result<u64, BlobError> {
        let known = lock(&self.partials).get(key).cloned();
        if let Some(entry) = known {
            // Whoever finishes it holds it for as long as its bytes are hashed.
            return Ok(off_thread(move || lock(&entry).len).await);
        }
        let (place, key) = (self.place.clone(), key.clone());
        off_thread(move || match place.open_sealed(&key) {
            Ok((_, seal)) => Ok(seal.len),
            Err(BlobError::Missing(_) | BlobError::Damaged(_)) => match File::open(place.partial(&key)) {
                Ok(file) => upload_len(&file).map_err(fault("look at an upload")),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
                Err(error) => Err(fault("look at an upload")(error)),
            },
            Err(error) => Err(error),
        })
        .await
    }

    pub(super) async fn append(&self, key: &BlobKey, offset: u64, mut body: Body) -> Result<u64, BlobError> {
        let entry = self.load(key).await?;
        let (owner, sums, sealed) = off_thread({
            let entry = entry.clone();
            move || {
                let mut partial = lock(&entry);
                if partial.len != offset {
                    return Err(BlobError::Offset { have: partial.len });
                }
                partial.owner += 1;
                Ok((partial.owner, partial.sums.take(), partial.sealed))
            }
        })
        .await?;
        let target = Target::Partial { place: self.place.clone(), partial: entry.clone(), owner };
        let mut pen = Pen::new(sums);
        let mut broken = None;
        while let Some(part) = body.next().await {
            match part {
                Ok(bytes) if sealed && !bytes.is_empty() => return Err(BlobError::Offset { have: offset }),
                Ok(bytes) => pen.write(&target, bytes).await?,
                Err(error) => {
                    broken = Some(BlobError::Body(error));
                    break;
                }
            }
        }
        let sums = pen.flush(&target).await?;
        let len = off_thread(move || {
            let mut partial = lock(&entry);
            if partial.owner == owner {
                partial.sums = sums.filter(|sums| sums.so_far() == partial.len);
            }
            partial.len
        });
        let len = len.await;
        broken.map_or(Ok(len), Err)
    }

    #[cfg(test)]
    pub(super) fn hold(&self, key: &BlobKey) -> Arc<Mutex<impl Send + 'static>> {
        lock(&self.partials)[key].clone()
    }

    pub(super) async fn finish(&self, key: &BlobKey, expect: Digest) -> Result<Stored, BlobError> {
        let entry = self.load(key).await?;
        let (place, name, own) = (self.place.clone(), key.clone(), entry.clone());
        let done = off_thread(move || finish_partial(&place, &name, &mut lock(&entry), expect)).await;
        let mut partials = lock(&self.partials);
        // Somebody else may have begun it anew.
        if partials.get(key).is_some_and(|entry| Arc::ptr_eq(entry, &own)) {
            partials.remove(key);
        }
        done
    }
}

/// A crash while an upload was finished leaves its seal behind its bytes.
fn upload_len(file: &File) -> io::Result<u64> {
    match read_seal(file)? {
        Some(seal) => Ok(seal.len),
        None => file.metadata().map(|meta| meta.len()),
    }
}

fn prepare(root: &Path, now: Ms) -> io::Result<()> {
    for dir in ["objects", "tmp", "partial"] {
        fs::create_dir_all(root.join(dir))?;
    }
    for left in fs::read_dir(root.join("tmp"))? {
        fs::remove_file(left?.path())?;
    }
    for upload in fs::read_dir(root.join("partial"))? {
        let upload = upload?;
        let changed = upload.metadata()?.modified()?;
        let limit = UNIX_EPOCH + Duration::from_millis(u64::try_from(now.0 - PARTIAL_AGE_MS).unwrap_or(0));
        if changed < limit {
            fs::remove_file(upload.path())?;
        }
    }
    sync_dir(root)
}

fn read_block(file: &File, seal: &Seal, key: &BlobKey, index: u64, want: &Range<u64>) -> io::Result<Bytes> {
    let block = seal.block(index);
    let mut bytes = vec![0; (block.end - block.start) as usize];
    file.read_exact_at(&mut bytes, block.start)?;
    if !bytes.is_empty() && !seal.fits(index, &bytes) {
        let what = format!("object {key} is damaged between bytes {} and {}", block.start, block.end);
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    let from = want.start.clamp(block.start, block.end) - block.start;
    let to = want.end.clamp(block.start, block.end) - block.start;
    Ok(Bytes::from(bytes).slice(from as usize..to as usize))
}

fn finish_partial(place: &Place, key: &BlobKey, partial: &mut Partial, expect: Digest) -> Result<Stored, BlobError> {
    partial.owner += 1;
    let file = match partial.file.take() {
        Some(file) => file,
        // Somebody who sent the same bytes at the same time has just finished it.
        None => {
            let (file, seal) = match place.open_sealed(key) {
                // Or has failed to.
                Err(BlobError::Missing(_)) => return Err(BlobError::Offset { have: 0 }),
                sealed => sealed?,
            };
            partial.len = seal.len;
            Arc::new(file)
        }
    };
    let seal = match partial.sums.take() {
        Some(sums) if sums.so_far() == partial.len => sums.seal(),
        Some(_) | None => hash_file(&file, partial.len).map_err(fault("read an upload"))?,
    };
    let path = place.partial(key);
    let finished = !path.exists();
    if let Err(error) = check(Some(expect), seal.sha256) {
        fs::remove_file(if finished { place.object(key) } else { path }).map_err(fault("drop an upload"))?;
        return Err(error);
    }
    if finished {
        // It may have been deleted since its file was opened.
        match place.open_sealed(key) {
            Err(BlobError::Missing(_)) => return Err(BlobError::Offset { have: 0 }),
            sealed => sealed?,
        };
        place.settle(key)?;
        return Ok(Stored { size: seal.len, sha256: seal.sha256 });
    }
    place.publish(&file, &path, key, &seal).inspect_err(|error| {
        // After a sync that failed the next one would succeed, whatever the disk lacks.
        if !matches!(error, BlobError::Full)
            && let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::error!(%error, "an upload whose sync failed cannot be removed");
        }
    })
}

fn hash_file(file: &File, len: u64) -> io::Result<Seal> {
    let mut sums = Sums::default();
    let mut block = vec![0; BLOCK as usize];
    while sums.so_far() < len {
        let part = (len - sums.so_far()).min(BLOCK) as usize;
        file.read_exact_at(&mut block[..part], sums.so_far())?;
        sums.update(&block[..part]);
    }
    Ok(sums.seal())
}
