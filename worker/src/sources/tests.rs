use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use alloy_shared::id::{AttemptRef, JobId};
use alloy_shared::secret::Secret;
use alloy_shared::wire::session::Link;
use async_trait::async_trait;
use tokio::sync::mpsc;

use super::*;
use crate::spool::SpoolFile;
use crate::upstream::{Blobs, DialError};

/// A farm that has some blobs and counts what it is asked for.
#[derive(Default)]
struct Farm {
    blobs: HashMap<Digest, Bytes>,
    asked: Mutex<Vec<Digest>>,
    /// Sends everything it has, whatever is asked for.
    whole_frames: bool,
}

#[async_trait]
impl Upstream for Farm {
    async fn dial(&self) -> Result<Link, DialError> {
        Err(DialError::Unreachable("not here".into()))
    }
    async fn manifest(&self, _: &Grant) -> Result<Bytes, TransferError> {
        let manifest = self.blobs.values().find(|bytes| Manifest::decode(bytes).is_ok());
        let text = manifest.or(self.blobs.values().next()).cloned();
        self.asked.lock().unwrap().extend(text.as_ref().map(|text| Digest::of(text)));
        text.ok_or_else(|| TransferError::Refused("no manifest".into()))
    }
    async fn fetch(&self, _: &Grant, missing: &[Digest]) -> Result<Blobs, TransferError> {
        self.asked.lock().unwrap().extend(missing);
        let all: Vec<Digest> = self.blobs.keys().copied().collect();
        let sent = if self.whole_frames { &all } else { missing };
        let (tx, rx) = mpsc::channel(sent.len());
        for digest in sent {
            if let Some(bytes) = self.blobs.get(digest) {
                tx.try_send(Ok((*digest, bytes.clone()))).unwrap();
            }
        }
        Ok(rx)
    }
    async fn put(&self, _: &Grant, _: &SpoolFile) -> Result<Digest, TransferError> {
        Err(TransferError::Refused("not here".into()))
    }
}

fn grant() -> Grant {
    let attempt = AttemptRef { job: JobId::from_raw(1), attempt: 1 };
    Grant { attempt, token: Secret::new("alloy_job_x".into()) }
}

fn entry(path: &str, kind: EntryKind, pieces: &[&[u8]], target: Option<&str>) -> Entry {
    Entry {
        path: path.into(),
        kind,
        mode: if path.ends_with(".sh") { 0o755 } else { 0o644 },
        size: pieces.iter().map(|piece| piece.len() as u64).sum(),
        chunks: pieces.iter().map(|piece| Digest::of(piece)).collect(),
        target: target.map(str::to_owned),
    }
}

fn farm(entries: Vec<Entry>, pieces: &[&[u8]]) -> (Farm, Digest) {
    let manifest = Manifest::new(entries).unwrap();
    let mut farm = Farm::default();
    farm.blobs.insert(manifest.digest(), manifest.encode().into());
    farm.blobs.extend(pieces.iter().map(|piece| (Digest::of(piece), Bytes::copy_from_slice(piece))));
    (farm, manifest.digest())
}

fn tree() -> (Farm, Digest) {
    let long = format!("{}/deep.txt", "directory".repeat(20));
    let entries = vec![
        entry("run.sh", EntryKind::File, &[b"one", b"two", b"one"], None),
        entry("none", EntryKind::File, &[], None),
        entry("dir", EntryKind::Dir, &[], None),
        entry("link", EntryKind::Symlink, &[], Some("../outside")),
        entry(&long, EntryKind::File, &[b"two"], None),
    ];
    farm(entries, &[b"one", b"two"])
}

async fn stage(sources: &Sources, source: Digest, inbox: &Path, farm: &Farm) -> Result<&'static str, SourceError> {
    let hold = sources.hold(source);
    let staged = stage_held(sources, &hold, inbox, farm).await;
    sources.let_go(hold).await;
    staged
}

async fn stage_held(sources: &Sources, hold: &Hold, inbox: &Path, farm: &Farm) -> Result<&'static str, SourceError> {
    // As a provider does with its VM.
    std::fs::create_dir_all(inbox).unwrap();
    sources.stage(hold, inbox, farm, &grant(), Ms(1_700_000_000_999)).await
}

/// What a disk of this size has free when nothing but the cache and so many bytes of others are on it.
pub(crate) fn small_disk(cache: &Path, bytes: u64, others: &Arc<AtomicU64>) -> FreeBytes {
    let (cache, others) = (cache.to_owned(), Arc::clone(others));
    Box::new(move || Ok(bytes.saturating_sub(others.load(Ordering::Relaxed) + cached(&cache))))
}

/// The bytes of all blobs in a cache's directory.
pub(crate) fn cached(cache: &Path) -> u64 {
    let shards = std::fs::read_dir(cache).into_iter().flatten().flatten();
    let blobs = shards.flat_map(|shard| std::fs::read_dir(shard.path()).unwrap());
    blobs.map(|blob| blob.unwrap().metadata().unwrap().len()).sum()
}

/// A reserve of 10 000 bytes, and 30 000 that are free after an eviction.
pub(crate) fn small_limits() -> Limits {
    Limits { disk_floor: 20_000, ..Limits::default() }
}

/// A source of so many files of 10 000 bytes, which nobody else has.
fn files(seed: u8, count: u8) -> (Farm, Digest) {
    let pieces: Vec<Vec<u8>> = (0..count).map(|n| [&[seed, n][..], &[0; 9_998]].concat()).collect();
    let entries = pieces.iter().enumerate().map(|(n, piece)| entry(&format!("{n}"), EntryKind::File, &[piece], None));
    farm(entries.collect(), &pieces.iter().map(Vec::as_slice).collect::<Vec<_>>())
}

fn read(tar: &Path) -> BTreeMap<String, String> {
    let mut archive = tar::Archive::new(File::open(tar).unwrap());
    let shown = |entry: std::io::Result<tar::Entry<'_, File>>| {
        let mut entry = entry.unwrap();
        assert_eq!(entry.header().mtime().unwrap(), 1_700_000_000);
        let path = entry.path().unwrap().display().to_string();
        let link = entry.link_name().unwrap().map(|to| format!(" -> {}", to.display())).unwrap_or_default();
        let (kind, mode) = (entry.header().entry_type(), entry.header().mode().unwrap());
        let mut body = String::new();
        entry.read_to_string(&mut body).unwrap();
        (path, format!("{kind:?} {mode:o} {body}{link}"))
    };
    archive.entries().unwrap().map(shown).collect()
}

#[tokio::test]
async fn a_tree_becomes_one_archive_and_the_second_time_nothing_is_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let (farm, source) = tree();
    let inbox = dir.path().join("inbox");
    let sources = Sources::open(&dir.path().join("cache"), 1 << 20).unwrap();
    assert_eq!(stage(&sources, source, &inbox, &farm).await.unwrap(), SOURCE_TAR);
    let long = format!("{}/deep.txt", "directory".repeat(20));
    let expected = [
        ("dir/", "Directory 644 "),
        (long.as_str(), "Regular 644 two"),
        ("link", "Symlink 644  -> ../outside"),
        ("none", "Regular 644 "),
        ("run.sh", "Regular 755 onetwoone"),
    ];
    let expected: BTreeMap<String, String> = expected.map(|(path, what)| (path.into(), what.into())).into();
    assert_eq!(read(&inbox.join(SOURCE_TAR)), expected);
    assert_eq!(farm.asked.lock().unwrap().len(), 3, "the manifest and each blob once");

    // A new daemon finds the cache.
    let sources = Sources::open(&dir.path().join("cache"), 1 << 20).unwrap();
    let empty = Farm::default();
    let second = dir.path().join("second");
    stage(&sources, source, &second, &empty).await.unwrap();
    assert_eq!(read(&second.join(SOURCE_TAR)), expected);
    assert!(empty.asked.lock().unwrap().is_empty());
}

#[tokio::test]
async fn targets_of_links_are_kept_to_the_byte() {
    let dir = tempfile::tempdir().unwrap();
    let long = format!("{}./x/", "up/../".repeat(20));
    let deep = format!("{}/link", "directory".repeat(20));
    let exact = "y".repeat(100);
    let targets =
        [("a", "./b"), ("c", "d//e/"), ("f", "/"), ("g", long.as_str()), (deep.as_str(), long.as_str()), ("h", &exact)];
    let links = targets.map(|(path, to)| entry(path, EntryKind::Symlink, &[], Some(to)));
    let (farm, source) = farm(links.into(), &[]);
    let sources = Sources::open(&dir.path().join("cache"), 1 << 20).unwrap();
    stage(&sources, source, dir.path(), &farm).await.unwrap();
    let found = read(&dir.path().join(SOURCE_TAR));
    let expected: BTreeMap<String, String> =
        targets.map(|(path, to)| (path.to_owned(), format!("Symlink 644  -> {to}"))).into();
    assert_eq!(found, expected);
}

#[tokio::test]
async fn strangers_in_the_cache_do_not_stop_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let name = Digest::of(b"x").to_string();
    for stray in ["ab/stray/deep", "ab/half.part", &format!("{}/{name}/deep", &name[..2])] {
        let path = dir.path().join(stray);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "x").unwrap();
    }
    let sources = Sources::open(dir.path(), 1 << 20).unwrap();
    assert!(!sources.has(&Digest::of(b"x")), "a directory is no blob");
    assert!(!dir.path().join("ab/half.part").exists());
}

#[tokio::test]
async fn a_damaged_blob_in_the_cache_is_fetched_again() {
    let dir = tempfile::tempdir().unwrap();
    let (farm, source) = tree();
    let cache = dir.path().join("cache");
    let sources = Sources::open(&cache, 1 << 20).unwrap();
    stage(&sources, source, &dir.path().join("a"), &farm).await.unwrap();
    for blob in [source, Digest::of(b"two")] {
        std::fs::write(cache.join(&blob.to_string()[..2]).join(blob.to_string()), "xxx").unwrap();
        farm.asked.lock().unwrap().clear();
        stage(&sources, source, &dir.path().join("b"), &farm).await.unwrap();
        assert_eq!(*farm.asked.lock().unwrap(), [blob]);
    }
    assert_eq!(read(&dir.path().join("b").join(SOURCE_TAR))["run.sh"], "Regular 755 onetwoone");
}

#[tokio::test]
async fn the_cache_keeps_to_its_budget() {
    let dir = tempfile::tempdir().unwrap();
    let pieces: Vec<Vec<u8>> = (0..10u8).map(|n| vec![n; 10_000]).collect();
    let sources = Sources::open(&dir.path().join("cache"), 35_000).unwrap();
    for piece in &pieces {
        let (farm, source) = farm(vec![entry("f", EntryKind::File, &[piece], None)], &[piece]);
        stage(&sources, source, &dir.path().join("inbox"), &farm).await.unwrap();
    }
    let Sources::Disk(disk) = &sources else { panic!("a disk") };
    assert!(disk.index.lock().unwrap().bytes <= 35_000);
    let kept: Vec<bool> = pieces.iter().map(|piece| disk.path(&Digest::of(piece)).exists()).collect();
    assert_eq!(kept, [false, false, false, false, false, false, false, true, true, true]);
}

#[test]
fn the_oldest_goes_first_and_nothing_that_is_held() {
    for (budget, bytes, free, keep, expected) in
        [(100, 50, 1_000, 10, 100), (100, 50, 20, 30, 40), (100, 50, 0, 90, 0), (100, 50, u64::MAX, 30, 100)]
    {
        assert_eq!(allowance(budget, bytes, free, keep), expected);
    }
    let [a, b, c] = [b"a", b"b", b"c"].map(|name| Digest::of(name));
    let mut index = Index::default();
    for digest in [a, b, c] {
        index.touch(digest, 10);
    }
    assert_eq!(index.surplus(30), []);
    assert_eq!(index.surplus(29), [a]);
    index.touch(a, 10);
    assert_eq!(index.surplus(10), [b, c]);
    let held = Arc::new(Held { source: b, blobs: OnceLock::new() });
    index.held.push(Arc::downgrade(&held));
    assert_eq!(index.surplus(10), [c, a]);
    held.blobs.set([c].into()).unwrap();
    assert_eq!(index.surplus(0), [a]);
    drop(held);
    assert_eq!(index.surplus(0), [b, c, a]);
}

#[tokio::test]
async fn a_cache_gives_up_what_the_disk_has_no_room_for_when_it_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let sources = Sources::open(&cache, 1 << 20).unwrap();
    for seed in 0..8 {
        let (farm, source) = files(seed, 1);
        stage(&sources, source, &dir.path().join("inbox"), &farm).await.unwrap();
    }
    let free = || small_disk(&cache, 100_000, &Arc::default());
    assert!(free()().unwrap() < 20_000);
    Sources::open_keeping(&cache, 1 << 20, &small_limits(), free()).unwrap();
    assert!((30_000..45_000).contains(&free()().unwrap()), "no more than has to go");
}

#[tokio::test]
async fn a_fetch_keeps_the_reserve_free_and_what_nobody_needs_goes_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, inbox, others) = (dir.path().join("cache"), dir.path().join("inbox"), Arc::new(AtomicU64::new(0)));
    let free = || small_disk(&cache, 100_000, &others);
    let sources = Sources::open_keeping(&cache, 1 << 20, &small_limits(), free()).unwrap();
    let (idle_farm, idle) = files(1, 3);
    stage(&sources, idle, &inbox, &idle_farm).await.unwrap();
    let (neighbour_farm, neighbour) = files(2, 2);
    let hold = sources.hold(neighbour);
    stage_held(&sources, &hold, &inbox, &neighbour_farm).await.unwrap();

    // What others write leaves less than the reserve.
    others.store(45_000, Ordering::Relaxed);
    let (farm, source) = files(3, 1);
    stage(&sources, source, &inbox, &farm).await.unwrap();
    assert!(idle_farm.blobs.keys().all(|blob| !sources.has(blob)));

    let (large_farm, large) = files(4, 8);
    let (hold_large, free_before) = (sources.hold(large), free()().unwrap());
    let error = stage_held(&sources, &hold_large, &inbox, &large_farm).await.unwrap_err();
    let SourceError::Disk(error) = error else { panic!("{error}") };
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    assert!((10_000..free_before).contains(&free()().unwrap()), "some came, and the reserve is free");
    sources.let_go(hold_large).await;
    assert!(free()().unwrap() >= 30_000);
    assert!(neighbour_farm.blobs.keys().all(|blob| sources.has(blob)), "an attempt is being given it");

    others.store(99_000, Ordering::Relaxed);
    sources.let_go(hold).await;
    assert_eq!(cached(&cache), 0);
}

#[tokio::test]
async fn an_archive_without_room_is_not_begun() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, inbox) = (dir.path().join("cache"), dir.path().join("inbox"));
    let free = small_disk(&cache, 60_000, &Arc::default());
    let sources = Sources::open_keeping(&cache, 1 << 20, &small_limits(), free).unwrap();
    let piece = vec![7; 10_000];
    let (farm, source) = farm(vec![entry("f", EntryKind::File, &[&piece[..]; 8], None)], &[&piece]);
    let error = stage(&sources, source, &inbox, &farm).await.unwrap_err();
    assert!(matches!(&error, SourceError::Disk(error) if error.kind() == std::io::ErrorKind::StorageFull), "{error}");
    assert_eq!(std::fs::read_dir(&inbox).unwrap().count(), 0);
}

#[tokio::test]
async fn nothing_is_staged_for_a_vm_that_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let sources = Sources::open(&dir.path().join("cache"), 1 << 20).unwrap();
    let (farm, source) = tree();
    let inbox = dir.path().join("vms").join("inbox");
    let hold = sources.hold(source);
    let error = sources.stage(&hold, &inbox, &farm, &grant(), Ms(0)).await.unwrap_err();
    assert!(matches!(&error, SourceError::Disk(error) if error.kind() == std::io::ErrorKind::NotFound), "{error}");
    assert!(!dir.path().join("vms").exists());
}

#[test]
fn an_archive_that_nobody_waits_for_is_not_written() {
    let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).build().unwrap();
    runtime.block_on(async {
        let dir = tempfile::tempdir().unwrap();
        let sources = Sources::open(&dir.path().join("cache"), 1 << 20).unwrap();
        let (farm, source) = tree();
        stage(&sources, source, &dir.path().join("other"), &farm).await.unwrap();
        // The one thread for files is busy.
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let busy = tokio::task::spawn_blocking(move || wait.recv());
        let inbox = dir.path().join("inbox");
        let mut staged = Box::pin(stage(&sources, source, &inbox, &farm));
        assert!(futures_util::poll!(&mut staged).is_pending());
        drop(staged);
        go.send(()).unwrap();
        busy.await.unwrap().unwrap();
        // Behind all work before it.
        tokio::task::spawn_blocking(|| ()).await.unwrap();
        assert_eq!(std::fs::read_dir(&inbox).unwrap().count(), 0);
    });
}

#[test]
fn a_file_that_nobody_waits_for_ends_within_it() {
    let dir = tempfile::tempdir().unwrap();
    let Ok(Sources::Disk(disk)) = Sources::open(dir.path(), 1 << 20) else { panic!("a disk") };
    disk.put(Digest::of(b"one"), b"one").unwrap();
    let (entry, stop) = (entry("f", EntryKind::File, &[b"one", b"one"], None), CancellationToken::new());
    let mut chunks = Chunks::new(&disk, &entry, &stop);
    assert_eq!(chunks.read(&mut [0; 8]).unwrap(), 3);
    stop.cancel();
    assert!(chunks.read(&mut [0; 8]).is_err());
}

#[tokio::test]
async fn what_the_farm_does_not_have_or_gets_wrong_is_told_apart() {
    for sources in [Sources::open(&tempfile::tempdir().unwrap().path().join("c"), 1 << 20).unwrap(), Sources::memory()]
    {
        let dir = tempfile::tempdir().unwrap();
        let (mut lying, source) = tree();
        lying.blobs.remove(&Digest::of(b"two"));
        let error = stage(&sources, source, dir.path(), &lying).await.unwrap_err();
        assert!(matches!(error, SourceError::Transfer(TransferError::Broken(_))), "{error}");
        lying.blobs.insert(Digest::of(b"two"), Bytes::from_static(b"not two"));
        let error = stage(&sources, source, dir.path(), &lying).await.unwrap_err();
        assert!(matches!(error, SourceError::Corrupt(_)), "{error}");

        let (farm, source) =
            farm(vec![Entry { size: 4, ..entry("f", EntryKind::File, &[b"three"], None) }], &[b"three"]);
        if let Sources::Disk(_) = sources {
            let error = stage(&sources, source, dir.path(), &farm).await.unwrap_err();
            assert!(matches!(error, SourceError::NoTree(_)), "{error}");
        }
        let text = Bytes::from_static(b"no manifest");
        let other = Farm { blobs: [(Digest::of(&text), text.clone())].into(), ..Farm::default() };
        let error = stage(&sources, Digest::of(&text), dir.path(), &other).await.unwrap_err();
        assert!(matches!(error, SourceError::NoTree(_)), "{error}");
    }
}

#[tokio::test]
async fn blobs_that_were_not_asked_for_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    for sources in [Sources::open(&dir.path().join("cache"), 1 << 20).unwrap(), Sources::memory()] {
        let (mut farm, source) = tree();
        let older = Digest::of(b"an older content");
        farm.blobs.insert(older, Bytes::from_static(b"an older content"));
        farm.whole_frames = true;
        assert_eq!(stage(&sources, source, dir.path(), &farm).await.unwrap(), SOURCE_TAR);
        assert!(sources.has(&Digest::of(b"one")) && !sources.has(&older));
    }
}

#[tokio::test]
async fn memory_checks_the_tree_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (farm, source) = tree();
    assert_eq!(stage(&Sources::memory(), source, dir.path(), &farm).await.unwrap(), SOURCE_TAR);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}
