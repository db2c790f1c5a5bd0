use std::collections::BTreeMap;
use std::sync::Arc;

use alloy_shared::id::{DEFAULT_ORG, JobId};
use alloy_shared::mem_disk::MemDisk;
use alloy_shared::secret::Secret;
use alloy_shared::wire::job::{End, JobSpec, Phase, Timings};
use alloy_shared::wire::session::{ArtifactReport, ResultReport};

use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

use super::*;

const AT: AttemptRef = AttemptRef { job: JobId::from_raw(77), attempt: 3 };

pub(crate) fn assignment() -> Assignment {
    Assignment {
        attempt: AT,
        handle: 1,
        org: DEFAULT_ORG,
        spec: JobSpec { shell: Some("true".into()), ..JobSpec::default() },
        source: None,
        grant: Secret::new("alloy_job_x".into()),
        timeout_ms: 1,
        cancel_grace_ms: 1,
        job_url: "http://farm/jobs/1".into(),
    }
}

const ALONE: &str = "ALLOY_TEST_ALONE";

/// Runs a test again in a process of its own, where it may do to its limits what it likes, and is true in there.
pub(crate) fn alone(test: &str) -> bool {
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let own = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test])
        .env(ALONE, "1")
        .output()
        .unwrap();
    assert!(own.status.success(), "{}", String::from_utf8_lossy(&own.stdout));
    assert!(String::from_utf8_lossy(&own.stdout).contains("1 passed"), "there is no test {test}");
    false
}

/// While it is there, this process can open nothing more.
pub(crate) struct Short((rlim_t, rlim_t));

impl Short {
    pub(crate) fn begin() -> Self {
        let before = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 3, before.1).unwrap();
        Self(before)
    }
}

impl Drop for Short {
    fn drop(&mut self) {
        setrlimit(Resource::RLIMIT_NOFILE, self.0.0, self.0.1).unwrap();
    }
}

fn result(log_len: u64) -> Report {
    Report::Result(Box::new(ResultReport {
        end: End::success(),
        timings: Timings::default(),
        log_len,
        artifacts: 1,
        facts: BTreeMap::new(),
    }))
}

fn phase() -> Report {
    Report::Phase {
        phase: Phase::Executing,
        timings: Timings::default(),
        message: Some("go".into()),
        facts: BTreeMap::new(),
    }
}

fn artifact(sha256: Digest, size: u64) -> Report {
    Report::Artifact(ArtifactReport { path: "out/a".into(), size, sha256, mode: 0o644, link: None })
}

async fn stash(spool: &Spool, bytes: &[u8]) -> (Digest, u64) {
    let mut file = spool.stash(AT).await.unwrap();
    for piece in bytes.chunks(7_000) {
        file.write(Bytes::copy_from_slice(piece)).await.unwrap();
    }
    file.finish().await.unwrap()
}

async fn collect(mut pieces: mpsc::Receiver<Bytes>) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(piece) = pieces.recv().await {
        all.extend_from_slice(&piece);
    }
    all
}

/// The same acts on both kinds of spool.
async fn walk(spool: Spool) {
    spool.begin(&assignment()).await.unwrap();
    assert_eq!(spool.append(AT, Bytes::from_static(b"one ")).await.unwrap(), 4);
    assert_eq!(spool.append(AT, Bytes::from_static(b"two")).await.unwrap(), 7);
    assert_eq!(spool.read(AT, 2, 3, 0).await.unwrap(), "e t", "bytes are readable before any sync");
    assert_eq!(spool.read(AT, 5, 100, 0).await.unwrap(), "wo");
    assert_eq!(spool.read(AT, 900, 100, 0).await.unwrap(), "");
    assert_eq!(spool.sync(AT).await.unwrap(), 7);

    let bytes: Vec<u8> = (0..700_000u32).map(|n| (n % 251) as u8).collect();
    let (digest, size) = stash(&spool, &bytes).await;
    assert_eq!((digest, size), (Digest::of(&bytes), 700_000));
    let file = spool.stashed(AT, &digest);
    assert_eq!(file.size().unwrap(), size);
    assert_eq!(collect(file.open(0).unwrap()).await, bytes);
    assert_eq!(collect(file.open(699_990).unwrap()).await, &bytes[699_990..]);
    drop(spool.stash(AT).await.unwrap());

    spool.record(AT, &[(1, Report::Accepted), (2, phase())]).await.unwrap();
    spool.record(AT, &[(3, artifact(digest, size))]).await.unwrap();
    let len = spool.seal_log(AT).await.unwrap();
    assert_eq!((len, spool.seal_log(AT).await.unwrap()), (7, 7));
    assert!(spool.append(AT, Bytes::from_static(b"late")).await.is_err());

    let (_, held) = spool.reopen().unwrap();
    assert_eq!(held, [Held { attempt: AT, state: HeldState::Lost, log_len: 7, seq: 3 }], "no result: lost");
    spool.record(AT, &[(4, result(7))]).await.unwrap();
    let (spool, held) = spool.reopen().unwrap();
    assert_eq!(held, [Held { attempt: AT, state: HeldState::ResultPending, log_len: 7, seq: 4 }]);
    assert_eq!(spool.reports(AT, 2).await.unwrap(), [(3, artifact(digest, size)), (4, result(7))]);
    assert_eq!(spool.assignment(AT).await.unwrap(), Some(assignment()));
    assert_eq!(spool.read(AT, 0, 100, 0).await.unwrap(), "one two");
    assert_eq!(collect(spool.stashed(AT, &digest).open(0).unwrap()).await, bytes);

    spool.remove(AT).await.unwrap();
    spool.remove(AT).await.unwrap();
    assert!(spool.read(AT, 0, 1, 0).await.is_err() && spool.stashed(AT, &digest).size().is_err());
    assert_eq!(spool.reopen().unwrap().1, []);
}

#[tokio::test]
async fn in_memory_and_on_disk_the_spool_is_the_same() {
    walk(Spool::memory()).await;
    let dir = tempfile::tempdir().unwrap();
    walk(Spool::open(&dir.path().join("spool")).unwrap().0).await;
    assert_eq!(std::fs::read_dir(dir.path().join("spool")).unwrap().count(), 0, "nothing is left behind");
}

#[test]
fn a_log_beyond_its_cap_keeps_its_head_and_its_end_and_counts_the_rest() {
    let seed: u64 = 0x5eed_0001;
    println!("seed {seed:#x}");
    let mut dice = seed;
    let tail = limits::LOG_TAIL;
    for total in [0, 10, 1_000, 1_001, 1_000 + tail, 1_001 + tail, 5_000_000] {
        let all: Vec<u8> = (0..total).map(|n| (n % 253) as u8).collect();
        let mut cap = Cap::new(1_000);
        let mut log = Vec::new();
        let mut rest = &all[..];
        while !rest.is_empty() {
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (piece, after) = rest.split_at(rest.len().min(1 + (dice >> 33) as usize % 3_000_000));
            let (now, later) = cap.split(piece).unwrap();
            log.extend_from_slice(now);
            cap.len += now.len() as u64;
            cap.keep(later);
            rest = after;
        }
        log.extend(cap.take_end().whole);
        let dropped = total.saturating_sub(1_000 + tail);
        assert_eq!(cap.cut(), (dropped > 0).then_some(Cut { bytes: dropped, disk_full: false }));
        let mut want = all[..all.len().min(1_000)].to_vec();
        if dropped > 0 {
            want.extend(
                format!("\n[alloy: {dropped} bytes of log are left out here, its last {tail} follow]\n").bytes(),
            );
        }
        want.extend(&all[all.len().min(1_000 + dropped as usize)..]);
        assert!(log == want, "total {total}: {} bytes, {} expected", log.len(), want.len());
    }
}

fn journal_of(root: &Path) -> std::path::PathBuf {
    root.join(format!("{}.{}", AT.job, AT.attempt)).join("journal")
}

/// What a restart finds after `harm` was done to the files.
async fn after(harm: impl FnOnce(&Path)) -> (Vec<Held>, Spool, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let (spool, _) = Spool::open(dir.path()).unwrap();
    spool.begin(&assignment()).await.unwrap();
    spool.append(AT, Bytes::from_static(b"log")).await.unwrap();
    let (digest, size) = stash(&spool, b"artifact").await;
    spool.record(AT, &[(1, Report::Accepted), (2, artifact(digest, size)), (3, result(3))]).await.unwrap();
    drop(spool);
    harm(dir.path());
    let (spool, held) = Spool::open(dir.path()).unwrap();
    (held, spool, dir)
}

#[tokio::test]
async fn damage_costs_one_attempt_and_never_the_start() {
    let one = |state, log_len, seq| vec![Held { attempt: AT, state, log_len, seq }];
    let cut = |path: &Path, by: u64| {
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(file.metadata().unwrap().len() - by).unwrap();
    };
    let (held, ..) = after(|_| {}).await;
    assert_eq!(held, one(HeldState::ResultPending, 3, 3), "no harm done");
    let (held, spool, _dir) = after(|root| cut(&journal_of(root), 5)).await;
    assert_eq!(held, one(HeldState::Lost, 3, 2), "a torn line is as if never written");
    assert_eq!(spool.reports(AT, 0).await.unwrap().len(), 2);
    let (held, ..) = after(|root| {
        let path = journal_of(root);
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.iter().position(|byte| *byte == b'\n').unwrap() + 20;
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    })
    .await;
    assert_eq!(held, one(HeldState::Lost, 3, 0), "what follows a damaged line is not trusted");
    let (held, ..) = after(|root| cut(&journal_of(root).with_file_name("log.0"), 1)).await;
    assert_eq!(held, one(HeldState::Lost, 2, 3), "the log is shorter than the result says");
    let (held, ..) = after(|root| std::fs::remove_dir_all(journal_of(root).with_file_name("stash")).unwrap()).await;
    assert_eq!(held, one(HeldState::Lost, 3, 3), "an artifact is missing");
    let (held, ..) = after(|root| std::fs::remove_file(journal_of(root)).unwrap()).await;
    assert_eq!(held, one(HeldState::Lost, 3, 0));
    let (held, ..) = after(|root| {
        std::fs::remove_dir_all(journal_of(root).parent().unwrap()).unwrap();
        std::fs::write(journal_of(root).parent().unwrap(), "a file where a directory was").unwrap();
        std::fs::write(root.join("stranger"), "?").unwrap();
    })
    .await;
    assert_eq!(held, one(HeldState::Lost, 0, 0));
}

#[tokio::test]
async fn leftovers_that_cannot_be_removed_do_not_stop_the_start() {
    let dir = tempfile::tempdir().unwrap();
    // A file, where only directories are removed.
    std::fs::write(dir.path().join(".gone-x"), "?").unwrap();
    assert_eq!(Spool::open(dir.path()).unwrap().1, []);
}

#[tokio::test]
async fn secrets_in_the_spool_are_for_the_owner_only() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let (spool, _) = Spool::open(&dir.path().join("spool")).unwrap();
    spool.begin(&assignment()).await.unwrap();
    let journal = journal_of(&dir.path().join("spool"));
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&journal), 0o600);
    assert_eq!(mode(journal.parent().unwrap()), 0o700);
}

/// What the log of the flood below has at an offset.
fn flood(from: u64, len: usize) -> Vec<u8> {
    (from..).take(len).map(|n| (n >> 3) as u8 ^ (n >> 19) as u8).collect()
}

#[tokio::test]
async fn a_flood_gives_up_what_the_farm_has_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (spool, _) = Spool::open(dir.path()).unwrap();
    spool.begin(&assignment()).await.unwrap();
    let files = || std::fs::read_dir(journal_of(dir.path()).parent().unwrap()).unwrap().count();
    let total = limits::SPOOL_KEEP + 3 * limits::SPOOL_SEGMENT + 1_000;
    let mut at = 0;
    while at < total {
        let len = (total - at).min(700_001);
        at = spool.append(AT, flood(at, len as usize).into()).await.unwrap();
    }
    let across = 2 * limits::SPOOL_SEGMENT - 10;
    assert!(spool.read(AT, across, 20, 3).await.unwrap()[3..] == flood(across, 20)[..]);
    spool.release(AT, limits::SPOOL_KEEP).await.unwrap();
    assert_eq!(files(), 1 + 12, "a journal and the whole log");
    spool.release(AT, total).await.unwrap();
    assert_eq!(files(), 2 + 9, "and the word that some were given up");
    let first = 3 * limits::SPOOL_SEGMENT;
    assert!(spool.read(AT, first, 1 << 20, 0).await.unwrap() == flood(first, 1 << 20));
    let lost = spool.read(AT, first - 100, 200, 0).await.unwrap();
    assert!(String::from_utf8_lossy(&lost[..100]).contains("the farm had stored this part"), "{lost:?}");
    assert!(lost[100..] == flood(first, 100)[..]);
    assert_eq!(spool.seal_log(AT).await.unwrap(), total);
    spool.record(AT, &[(1, result(total))]).await.unwrap();
    drop(spool);

    let (spool, held) = Spool::open(dir.path()).unwrap();
    assert_eq!(held, [Held { attempt: AT, state: HeldState::ResultPending, log_len: total, seq: 1 }]);
    assert!(spool.read(AT, total - 2_000, 5_000, 0).await.unwrap() == flood(total - 2_000, 2_000));
    drop(spool);
    // Of a log with a hole what lies before it counts, and nothing of it is deleted.
    let log = |number: u64| journal_of(dir.path()).with_file_name(format!("log.{number}"));
    std::fs::remove_file(log(5)).unwrap();
    std::fs::write(log(u64::MAX), "a stranger").unwrap();
    let (_, held) = Spool::open(dir.path()).unwrap();
    assert_eq!((held[0].state, held[0].log_len), (HeldState::Lost, 5 * limits::SPOOL_SEGMENT));
    assert!(log(6).exists());
    // Files that nobody gave up are missing.
    std::fs::remove_file(journal_of(dir.path()).with_file_name("released")).unwrap();
    let (_, held) = Spool::open(dir.path()).unwrap();
    assert_eq!((held[0].state, held[0].log_len), (HeldState::Lost, 0));
}

#[test]
fn a_write_that_fails_leaves_the_log_as_long_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let log = segments::Segments::create(dir.path()).unwrap();
    let most = vec![1; limits::SPOOL_SEGMENT as usize - 1];
    log.append(&most).unwrap();
    assert!(!log.take_made(), "the first file was there");
    // Where the next file belongs is a directory.
    std::fs::create_dir(dir.path().join("log.1")).unwrap();
    assert!(log.append(b"abc").is_err());
    assert_eq!(log.len(), most.len() as u64);
    assert_eq!(std::fs::metadata(dir.path().join("log.0")).unwrap().len(), most.len() as u64);
    std::fs::remove_dir(dir.path().join("log.1")).unwrap();
    log.append(b"abc").unwrap();
    assert!(log.take_made());
    let mut end = [0; 4];
    log.read(most.len() as u64 - 1, &mut end).unwrap();
    assert_eq!(&end, b"\x01abc");
}

#[tokio::test]
async fn zeros_that_a_power_cut_left_at_the_end_of_a_log_are_not_sent() {
    let dir = tempfile::tempdir().unwrap();
    let (spool, _) = Spool::open(dir.path()).unwrap();
    spool.begin(&assignment()).await.unwrap();
    spool.append(AT, Bytes::from_static(b"said")).await.unwrap();
    spool.record(AT, &[(1, Report::Accepted)]).await.unwrap();
    let log = journal_of(dir.path()).with_file_name("log.0");
    std::fs::File::options().write(true).open(log).unwrap().set_len(5_000).unwrap();
    let (spool, held) = Spool::open(dir.path()).unwrap();
    assert_eq!((held[0].state, held[0].log_len), (HeldState::Lost, 4));
    assert_eq!(spool.read(AT, 0, 100, 0).await.unwrap(), "said");
    // With a result its whole log was synced: zeros are the command's.
    let (spool, _) = Spool::open(&dir.path().join("other")).unwrap();
    spool.begin(&assignment()).await.unwrap();
    spool.append(AT, Bytes::from_static(b"zero\0")).await.unwrap();
    let log_len = spool.seal_log(AT).await.unwrap();
    spool.record(AT, &[(1, result(log_len))]).await.unwrap();
    let (_, held) = Spool::open(&dir.path().join("other")).unwrap();
    assert_eq!((held[0].state, held[0].log_len), (HeldState::ResultPending, 5));
}

#[test]
fn a_file_that_cannot_be_deleted_is_tried_again_before_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let log = segments::Segments::create(dir.path()).unwrap();
    let block = vec![7; limits::SPOOL_SEGMENT as usize];
    let all = limits::SPOOL_KEEP + 3 * limits::SPOOL_SEGMENT;
    while log.len() < all {
        log.append(&block).unwrap();
    }
    // A directory cannot be removed like a file.
    let (first, aside) = (dir.path().join("log.0"), dir.path().join("aside"));
    std::fs::rename(&first, &aside).unwrap();
    std::fs::create_dir(&first).unwrap();
    assert!(log.release(all, limits::SPOOL_KEEP).is_err() && log.can_release(all, limits::SPOOL_KEEP));
    assert!(dir.path().join("log.1").exists());
    std::fs::remove_dir(&first).unwrap();
    std::fs::rename(&aside, &first).unwrap();
    log.release(all, limits::SPOOL_KEEP).unwrap();
    assert!(!log.can_release(all, limits::SPOOL_KEEP) && !first.exists() && !dir.path().join("log.2").exists());
    assert!(dir.path().join("log.3").exists());
}

#[tokio::test]
async fn memory_keeps_over_a_power_cut_what_was_synced_and_over_a_crash_what_was_written() {
    let disk = Arc::new(MemDisk::default());
    let mem = mem::Mem::on(Arc::clone(&disk));
    let spool = Spool::Mem(mem.clone());
    spool.begin(&assignment()).await.unwrap();
    mem.cut_power(|_| 0);
    assert!(mem.held().is_empty(), "an attempt is durable with its first report");
    spool.begin(&assignment()).await.unwrap();
    spool.record(AT, &[(1, Report::Accepted)]).await.unwrap();
    spool.append(AT, Bytes::from_static(b"synced")).await.unwrap();
    spool.sync(AT).await.unwrap();
    spool.append(AT, Bytes::from_static(b" and not")).await.unwrap();
    disk.set_broken(true);
    assert!(spool.record(AT, &[(2, phase())]).await.is_err());
    disk.set_broken(false);
    assert!(spool.sync(AT).await.is_err(), "after a failed sync no later one is believed");
    let (spool, held) = spool.reopen().unwrap();
    assert_eq!((held[0].log_len, held[0].seq), (14, 2), "a crash loses nothing that was written");
    mem.cut_power(|unsynced| unsynced / 2);
    let (_, held) = spool.reopen().unwrap();
    assert_eq!((held[0].log_len, held[0].seq), (8, 1));
    disk.set_full(true);
    assert_eq!(spool.record(AT, &[(2, phase())]).await.unwrap_err().kind(), io::ErrorKind::StorageFull);
}

#[tokio::test]
async fn what_stays_free_is_for_reports_and_for_the_end_of_a_log() {
    let dir = tempfile::tempdir().unwrap();
    let (spool, _) = Spool::open_keeping(dir.path(), u64::MAX).unwrap();
    assert!(spool.is_tight());
    spool.begin(&assignment()).await.unwrap();
    let mut stash = spool.stash(AT).await.unwrap();
    assert_eq!(stash.write(Bytes::from_static(b"artifact")).await.unwrap_err().kind(), io::ErrorKind::StorageFull);
    let many = Bytes::from(vec![b'x'; limits::LOG_TAIL as usize]);
    assert_eq!(spool.append(AT, Bytes::from_static(b"0123456789")).await.unwrap(), 0);
    assert_eq!(spool.append(AT, many.clone()).await.unwrap(), 0);
    spool.record(AT, &[(1, Report::Accepted)]).await.unwrap();
    let len = spool.seal_log(AT).await.unwrap();
    let line = "\n[alloy: 10 bytes of log are left out here, its last 1048576 follow]\n";
    assert_eq!(len, line.len() as u64 + limits::LOG_TAIL);
    let read = spool.read(AT, 0, u32::MAX, 0).await.unwrap();
    assert_eq!((&read[..line.len()], &read[line.len()..]), (line.as_bytes(), &many[..]));
    assert!(!Spool::open(&dir.path().join("other")).unwrap().0.is_tight());
}

#[test]
fn a_log_whose_end_has_no_room_either_says_so_in_one_line_and_counts_it_as_cut() {
    for (len, cut) in [(limits::LOG_TAIL + 5, Some(5)), (7, None)] {
        let mut cap = Cap::new(0);
        cap.keep(&vec![b'x'; len as usize]);
        assert_eq!(cap.cut().map(|cut| cut.bytes), cut, "as long as its end has room");
        let end = cap.take_end();
        let text = String::from_utf8(end.alone.clone()).unwrap();
        assert_eq!(text, format!("\n[alloy: {len} bytes of log are left out here, to its end: the disk is full]\n"));
        cap.lose_end(&end);
        assert_eq!(cap.cut(), Some(Cut { bytes: len, disk_full: true }));
    }
}
