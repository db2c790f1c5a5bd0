use std::os::fd::AsRawFd as _;
use std::sync::Arc;

use alloy_shared::id::JobId;
use alloy_shared::mem_disk::MemDisk;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::*;
use crate::broken::Broken;

fn at(job: u128, attempt: u32) -> AttemptRef {
    AttemptRef { job: JobId::from_raw(job), attempt }
}

fn files(dir: &tempfile::TempDir) -> Logs {
    Logs::Files(Files::open(dir.path().to_owned(), 0).unwrap())
}

/// xorshift, so that a printed seed gives the same walk anywhere.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n.max(1)
    }
}

async fn gather(logs: &Logs, at: &AttemptRef, mut from: u64, max: u32) -> Vec<u8> {
    let mut out = Vec::new();
    loop {
        let parts = logs.read(at, from, max).await.unwrap();
        let len: usize = parts.iter().map(Bytes::len).sum();
        assert!(len <= max as usize);
        assert!(parts.iter().all(|part| !part.is_empty()));
        if len == 0 {
            return out;
        }
        from += len as u64;
        parts.iter().for_each(|part| out.extend_from_slice(part));
    }
}

/// Appends, re-sends with other bytes, gaps, reads, syncs, restarts and seals, against vectors.
async fn walk(seed: u64, steps: u32, restarts: bool) {
    let dir = tempfile::tempdir().unwrap();
    let mut logs = if restarts { files(&dir) } else { Logs::memory() };
    let mut dice = Dice(seed * 2 + 1);
    let mut model: Vec<(AttemptRef, Vec<u8>, bool)> =
        (0..4).map(|i| (at(i as u128 / 2 + 1, i % 2 + 1), Vec::new(), false)).collect();
    let mut chunks = 0u8;
    for step in 0..steps {
        let index = dice.below(4) as usize;
        let (at, bytes, sealed) = &mut model[index];
        let have = bytes.len() as u64;
        let what = format!("seed {seed} step {step} {at}");
        match dice.below(12) {
            0..=5 => {
                let offset = have.saturating_sub(dice.below(3) * dice.below(5_000));
                chunks = chunks.wrapping_add(1);
                // What was stored before stays as it was, even if the chunk says otherwise.
                let chunk = vec![chunks; dice.below(60_000) as usize];
                match logs.append(at, offset, chunk.clone().into()).await {
                    Err(LogError::Sealed) => assert!(*sealed, "{what}"),
                    Ok(len) => {
                        assert!(!*sealed, "{what}");
                        bytes.extend(chunk.iter().skip((have - offset) as usize));
                        assert_eq!(len, bytes.len() as u64, "{what}");
                    }
                    Err(other) => panic!("{what}: {other}"),
                }
            }
            6 => match logs.append(at, have + 1 + dice.below(9), Bytes::from_static(b"x")).await {
                Err(LogError::Gap { have: said }) => assert_eq!(said, have, "{what}"),
                Err(LogError::Sealed) => assert!(*sealed, "{what}"),
                other => panic!("{what}: {other:?}"),
            },
            7 | 8 => {
                let from = dice.below(have + 10);
                let want = bytes.get(from as usize..).unwrap_or_default();
                assert_eq!(gather(&logs, at, from, 1 + dice.below(200_000) as u32).await, want, "{what}");
            }
            9 => {
                for (synced, len) in logs.sync().await.unwrap() {
                    let (_, bytes, _) = model.iter().find(|(at, _, _)| *at == synced).unwrap();
                    assert_eq!(len, bytes.len() as u64, "{what}");
                }
                assert!(logs.sync().await.unwrap().is_empty(), "{what}");
            }
            10 if restarts => logs = files(&dir),
            10 => {}
            _ if dice.below(20) == 0 => {
                let digest = logs.seal(at).await.unwrap();
                *sealed = true;
                assert_eq!(digest, Digest::of(bytes), "{what}");
                assert_eq!(logs.durable(at).await.unwrap(), have, "{what}");
            }
            _ => assert_eq!(logs.len(at).await.unwrap(), have, "{what}"),
        }
    }
}

#[tokio::test]
async fn logs_are_what_their_model_is() {
    for seed in 1..=6 {
        walk(seed, 400, true).await;
        walk(seed, 400, false).await;
    }
}

#[tokio::test]
async fn a_tail_reader_reads_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let logs = files(&dir);
    let at = at(7, 1);
    let chunk = Bytes::from(vec![b'a'; 64 << 10]);
    for n in 0..100u64 {
        logs.append(&at, n * chunk.len() as u64, chunk.clone()).await.unwrap();
    }
    let path = dir.path().join(at.job.to_string()).join("1.log");
    let len = std::fs::metadata(&path).unwrap().len();
    // Bytes that only a read of the file could bring.
    std::fs::write(&path, vec![b'b'; len as usize]).unwrap();
    let from = len - limits::LOG_RING;
    assert!(gather(&logs, &at, from, u32::MAX).await.iter().all(|byte| *byte == b'a'));
    assert!(gather(&logs, &at, 0, u32::MAX).await[..1 << 20].iter().all(|byte| *byte == b'b'));
    // The same memory, not a copy.
    let tail = logs.read(&at, len - 10, 100).await.unwrap();
    assert_eq!(tail.len(), 1);
    assert_eq!(tail[0].as_ptr() as usize, chunk.as_ptr() as usize + chunk.len() - 10);
}

#[tokio::test]
async fn many_logs_stay_within_the_bound_of_open_files() {
    let dir = tempfile::tempdir().unwrap();
    let logs = files(&dir);
    let count = limits::LOG_FILES_OPEN as u128 + 40;
    for job in 0..count {
        logs.append(&at(job, 1), 0, Bytes::from(job.to_string())).await.unwrap();
        logs.sync().await.unwrap();
    }
    let Logs::Files(inner) = &logs else { unreachable!() };
    assert!(inner.open_count() <= limits::LOG_FILES_OPEN);
    for job in 0..count {
        assert_eq!(gather(&logs, &at(job, 1), 0, 100).await, job.to_string().as_bytes());
    }
}

#[tokio::test]
async fn rot_in_a_sealed_log_is_never_served() {
    let dir = tempfile::tempdir().unwrap();
    let (logs, at) = (files(&dir), at(9, 1));
    let bytes: Vec<u8> = (0..2_500_000u32).map(|i| (i % 251) as u8).collect();
    for (n, chunk) in bytes.chunks(60_000).enumerate() {
        logs.append(&at, n as u64 * 60_000, Bytes::copy_from_slice(chunk)).await.unwrap();
    }
    assert_eq!(logs.seal(&at).await.unwrap(), Digest::of(&bytes));
    assert_eq!(gather(&logs, &at, 0, 100_000).await, bytes);
    let path = dir.path().join(at.job.to_string()).join("1.log");
    let mut rotten = bytes.clone();
    rotten[1_500_000] ^= 1;
    std::fs::write(&path, &rotten).unwrap();
    let logs = files(&dir);
    assert_eq!(logs.read(&at, 5, 100).await.unwrap()[0], bytes[5..105]);
    let damaged = logs.read(&at, 1 << 20, 100).await;
    assert!(matches!(damaged, Err(LogError::Damaged { from: 1_048_576, to: 2_097_152 })), "{damaged:?}");
    // A file that lost its end is not the log that was sealed.
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    assert!(matches!(files(&dir).len(&at).await, Err(LogError::Damaged { .. })));
}

#[tokio::test]
async fn a_log_has_an_end_and_a_full_disk_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let logs = Logs::Files(Files::open(dir.path().to_owned(), u64::MAX).unwrap());
    assert!(matches!(logs.append(&at(1, 1), 0, Bytes::from_static(b"x")).await, Err(LogError::Full)));
    assert_eq!(logs.len(&at(1, 1)).await.unwrap(), 0);
    let long = news(MAX, MAX, &Bytes::from_static(b"x"));
    assert!(matches!(long, Err(LogError::TooLong)));
    assert!(news(MAX, MAX - 1, &Bytes::from_static(b"x")).unwrap().is_empty());
}

#[tokio::test]
async fn bytes_whose_sync_failed_are_gone_from_the_file_too() {
    let dir = tempfile::tempdir().unwrap();
    let broken = Broken::default();
    let care = Care { broken: broken.clone(), ..Care::default() };
    let (logs, at) = (Logs::Files(Files::open(dir.path().to_owned(), care).unwrap()), at(3, 1));
    logs.append(&at, 0, Bytes::from_static(b"perhaps lost")).await.unwrap();
    let (home, away) = (dir.path().join(at.job.to_string()), dir.path().join("away"));
    // A directory that is not there cannot be synced.
    std::fs::rename(&home, &away).unwrap();
    assert!(!broken.is_told() && logs.sync().await.unwrap().is_empty());
    assert!(broken.is_told(), "the process ends by it");
    std::fs::rename(&away, &home).unwrap();
    assert_eq!(logs.len(&at).await.unwrap(), 0);
    assert_eq!(files(&dir).durable(&at).await.unwrap(), 0);
    logs.append(&at, 0, Bytes::from_static(b"again")).await.unwrap();
    assert_eq!(logs.sync().await.unwrap(), [(at, 5)]);
    assert_eq!(logs.seal(&at).await.unwrap(), Digest::of(b"again"));
}

#[tokio::test]
async fn a_log_that_is_whole_keeps_the_zeros_that_it_ends_in() {
    let dir = tempfile::tempdir().unwrap();
    let at = at(3, 1);
    let note = dir.path().join(format!("{}/1.whole", at.job));
    let logs = files(&dir);
    logs.append(&at, 0, Bytes::from_static(b"said\0\0\0")).await.unwrap();
    logs.sync().await.unwrap();
    logs.keep(&at, 4).await.unwrap();
    assert!(!note.exists(), "its last byte is no zero");
    assert_eq!(files(&dir).len(&at).await.unwrap(), 4);
    logs.keep(&at, 6).await.unwrap();
    let again = files(&dir);
    assert_eq!((again.len(&at).await.unwrap(), again.resume(&at).await.unwrap()), (6, 6), "the last one is unknown");
    assert_eq!(again.append(&at, 6, Bytes::from_static(b"!")).await.unwrap(), 7);
    again.seal(&at).await.unwrap();
    assert_eq!(gather(&files(&dir), &at, 0, 1 << 20).await, b"said\0\0!");
    again.remove(&at).await.unwrap();
    assert!(!note.exists() && !dir.path().join(at.job.to_string()).exists());
}

#[tokio::test]
async fn zeros_that_a_power_cut_left_are_not_shown_and_come_again_from_the_worker() {
    let dir = tempfile::tempdir().unwrap();
    let at = at(3, 1);
    files(&dir).append(&at, 0, Bytes::from_static(b"said")).await.unwrap();
    let path = dir.path().join(format!("{}/{}.log", at.job, at.attempt));
    let longer = |by: u64| {
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(file.metadata().unwrap().len() + by).unwrap();
    };
    longer(3_000_000);
    let logs = files(&dir);
    assert_eq!((logs.len(&at).await.unwrap(), logs.durable(&at).await.unwrap()), (4, 4));
    assert_eq!(gather(&logs, &at, 0, 1 << 20).await, b"said");
    assert_eq!(logs.resume(&at).await.unwrap(), 4);
    // Zeros that the worker sends are the log's.
    logs.append(&at, 4, Bytes::from_static(b"\0\0")).await.unwrap();
    assert_eq!((logs.resume(&at).await.unwrap(), logs.len(&at).await.unwrap()), (4, 6));
    logs.sync().await.unwrap();
    assert_eq!(logs.resume(&at).await.unwrap(), 6);
    logs.seal(&at).await.unwrap();
    assert_eq!(gather(&files(&dir), &at, 0, 1 << 20).await, b"said\0\0");
    // Closed and opened again in one process it ends as it was written, and without a look at its end it goes on.
    let (closed, late) = (AttemptRef { attempt: 3, ..at }, AttemptRef { attempt: 4, ..at });
    logs.append(&closed, 0, Bytes::from_static(b"own\0")).await.unwrap();
    logs.sync().await.unwrap();
    match &logs {
        Logs::Files(files) => files.close(&closed),
        Logs::Chunks(_) | Logs::Mem(_) => unreachable!(),
    }
    assert_eq!((logs.len(&closed).await.unwrap(), logs.durable(&closed).await.unwrap()), (4, 4));
    logs.append(&late, 0, Bytes::from_static(b"all\0")).await.unwrap();
    let again = files(&dir);
    assert!(matches!(again.append(&late, 4, Bytes::from_static(b"more")).await, Err(LogError::Gap { have: 3 })));
    assert_eq!(again.append(&late, 3, Bytes::from_static(b"\0more")).await.unwrap(), 8);
    again.sync().await.unwrap();
    assert_eq!((again.durable(&late).await.unwrap(), gather(&again, &late, 0, 99).await), (8, b"all\0more".to_vec()));
    // No worker keeps more than a window that it was not told of.
    let (other, window) = (AttemptRef { attempt: 2, ..at }, limits::LOG_WINDOW);
    logs.append(&other, 0, vec![0; window as usize + 10].into()).await.unwrap();
    assert_eq!(files(&dir).resume(&other).await.unwrap(), 10);
}

/// Descriptors are the whole process's: this test runs again in one of its own.
#[tokio::test]
async fn a_sync_without_room_for_open_files_takes_nothing_back_and_is_made_again() {
    const ALONE: &str = "ALLOY_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let name = "logs::tests::a_sync_without_room_for_open_files_takes_nothing_back_and_is_made_again";
        let again = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name])
            .env(ALONE, "1")
            .output()
            .unwrap();
        assert!(again.status.success(), "{again:?}");
        assert!(String::from_utf8_lossy(&again.stdout).contains("1 passed"), "there is no test {name}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let broken = Broken::default();
    let care = Care { broken: broken.clone(), ..Care::default() };
    let (logs, at) = (Logs::Files(Files::open(dir.path().to_owned(), care).unwrap()), at(3, 1));
    logs.append(&at, 0, Bytes::from_static(b"kept")).await.unwrap();
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let next = std::fs::File::open("/dev/null").unwrap().as_raw_fd();
    setrlimit(Resource::RLIMIT_NOFILE, u64::try_from(next).unwrap(), hard).unwrap();
    let round = logs.sync().await;
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    assert!(matches!(round, Err(LogError::Io { .. })), "{round:?}");
    assert!(!broken.is_told(), "it says nothing about the disk");
    assert_eq!((logs.len(&at).await.unwrap(), logs.durable(&at).await.unwrap()), (4, 0));
    // Without another byte from the worker.
    assert_eq!(logs.sync().await.unwrap(), [(at, 4)]);
}

#[tokio::test]
async fn appends_during_a_seal_are_in_it_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (logs, at) = (files(&dir), at(4, 1));
    let chunk = Bytes::from(vec![7; 64 << 10]);
    for n in 0..64 {
        logs.append(&at, n * chunk.len() as u64, chunk.clone()).await.unwrap();
    }
    let more = async {
        loop {
            let have = logs.len(&at).await.unwrap();
            match logs.append(&at, have, Bytes::from_static(b"x")).await {
                Ok(len) if len < 5 << 20 => tokio::task::yield_now().await,
                Ok(_) | Err(LogError::Sealed) => return,
                Err(other) => panic!("{other}"),
            }
        }
    };
    let (digest, again, ()) = tokio::join!(logs.seal(&at), logs.seal(&at), more);
    let stored = gather(&logs, &at, 0, 1 << 20).await;
    assert_eq!(digest.unwrap(), Digest::of(&stored));
    assert_eq!(again.unwrap(), Digest::of(&stored));
    assert_eq!(gather(&files(&dir), &at, 0, 1 << 20).await, stored);
}

#[tokio::test]
async fn memory_keeps_over_a_power_cut_what_was_synced_and_over_a_failed_sync_too() {
    let disk = Arc::new(MemDisk::default());
    let mem = Mem::on(Arc::clone(&disk));
    let (logs, at) = (Logs::Mem(mem.clone()), at(1, 1));
    logs.append(&at, 0, Bytes::from_static(b"synced")).await.unwrap();
    assert_eq!(logs.sync().await.unwrap(), [(at, 6)]);
    logs.append(&at, 6, Bytes::from_static(b" and not")).await.unwrap();
    mem.cut_power(|unsynced| unsynced / 2);
    assert_eq!((logs.len(&at).await.unwrap(), logs.durable(&at).await.unwrap()), (8, 6));
    mem.reopen();
    assert_eq!(logs.durable(&at).await.unwrap(), 8, "opening a log makes durable what is there, but for zeros");
    assert_eq!(logs.resume(&at).await.unwrap(), 8);
    logs.append(&at, 8, Bytes::from_static(b"more")).await.unwrap();
    disk.set_broken(true);
    assert_eq!(logs.sync().await.unwrap(), []);
    assert_eq!(logs.len(&at).await.unwrap(), 8, "what was not synced counts as never written");
    disk.set_full(true);
    assert!(matches!(logs.append(&at, 8, Bytes::from_static(b"x")).await, Err(LogError::Full)));
}
