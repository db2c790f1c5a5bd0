//! What only files have; what holds for all kinds of objects is tested in `tests/it/s3`.

use std::path::Path;

use alloy_shared::id::{AttemptRef, DEFAULT_ORG, JobId};
use futures_util::stream;

use super::*;
use crate::broken::Care;
use crate::sums::BLOCK;

/// So early that nothing is old.
const NOW: Ms = Ms(0);

fn body(parts: Vec<std::io::Result<Bytes>>) -> Body {
    stream::iter(parts).boxed()
}

fn whole(bytes: &[u8], step: usize) -> Body {
    body(bytes.chunks(step).map(|part| Ok(Bytes::copy_from_slice(part))).collect())
}

fn gone() -> std::io::Result<Bytes> {
    Err(std::io::Error::other("the client is gone"))
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x as u8
        })
        .collect()
}

async fn gather(body: Result<Body, BlobError>) -> Vec<u8> {
    let mut body = body.unwrap();
    let mut out = Vec::new();
    while let Some(part) = body.next().await {
        let part = part.unwrap();
        assert!(part.len() as u64 <= BLOCK && !part.is_empty());
        out.extend_from_slice(&part);
    }
    out
}

fn files_below(dir: &Path) -> Vec<String> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { out.extend(files_below(&path)) } else { out.push(path.display().to_string()) }
    }
    out
}

#[tokio::test]
async fn an_upload_goes_on_where_it_stopped_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = noise(4 << 20, 9);
    let digest = Digest::of(&bytes);
    let key = BlobKey::alone(DEFAULT_ORG, BlobKind::Artifact, &digest);
    for restart in [false, true] {
        let mut blobs = Blobs::Fs(Fs::open(dir.path().to_owned(), NOW, 0).await.unwrap());
        let mut at = 0;
        for cut in [1usize, 700_000, 2 << 20, (3 << 20) + 5] {
            let broken = body(vec![Ok(Bytes::copy_from_slice(&bytes[at..cut])), gone()]);
            assert!(matches!(blobs.append(&key, at as u64, broken).await, Err(BlobError::Body(_))));
            at = cut;
            if restart {
                blobs = Blobs::Fs(Fs::open(dir.path().to_owned(), NOW, 0).await.unwrap());
            }
            assert_eq!(blobs.partial(&key).await.unwrap(), at as u64);
            let have = at as u64;
            for wrong in [0, have - 1, have + 1] {
                let refused = blobs.append(&key, wrong, whole(b"xx", 1)).await;
                let same = wrong == have;
                assert!(same || matches!(refused, Err(BlobError::Offset { have: h }) if h == have), "{wrong}");
            }
            assert!(matches!(blobs.read(&key, 0..1).await, Err(BlobError::Missing(_))), "not visible before its end");
        }
        assert_eq!(blobs.append(&key, at as u64, whole(&bytes[at..], 65_536)).await.unwrap(), 4 << 20);
        assert_eq!(blobs.finish(&key, digest).await.unwrap(), Stored { size: 4 << 20, sha256: digest });
        assert_eq!(gather(blobs.read(&key, 0..4 << 20).await).await, bytes);
        // A finished upload that nobody registered is found again.
        assert_eq!(blobs.partial(&key).await.unwrap(), 4 << 20);
        assert_eq!(blobs.append(&key, 4 << 20, body(vec![])).await.unwrap(), 4 << 20);
        assert_eq!(blobs.finish(&key, digest).await.unwrap().sha256, digest);
        blobs.delete(&key).await.unwrap();
        assert_eq!(files_below(dir.path()), Vec::<String>::new());
    }
}

#[tokio::test]
async fn the_newest_upload_of_an_object_wins() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = Fs::open(dir.path().to_owned(), NOW, 0).await.unwrap();
    let bytes = noise(3 << 20, 77);
    let digest = Digest::of(&bytes);
    let key = BlobKey::alone(DEFAULT_ORG, BlobKind::Artifact, &digest);
    let (tx, rx) = tokio::sync::mpsc::channel(1);
    let slow = stream::unfold(rx, |mut rx| async { Some((rx.recv().await?, rx)) }).boxed();
    let old = blobs.append(&key, 0, slow);
    let new = async {
        // The old one waits for more of its body by the time that it has taken two parts.
        tx.send(Ok(Bytes::copy_from_slice(&bytes[..1 << 20]))).await.unwrap();
        tx.send(Ok(Bytes::copy_from_slice(&bytes[1 << 20..2 << 20]))).await.unwrap();
        let _ = tx.reserve().await;
        let have = loop {
            let have = blobs.partial(&key).await.unwrap();
            if have >= 1 << 20 {
                break have as usize;
            }
            tokio::task::yield_now().await;
        };
        let done = blobs.append(&key, have as u64, whole(&bytes[have..], 1 << 20)).await;
        // Unless it knows by now, the old one learns of the new one with its next part.
        let _ = tx.send(Ok(Bytes::copy_from_slice(&bytes[2 << 20..]))).await;
        drop(tx);
        (have, done)
    };
    let (old, (have, new)) = futures_util::future::join(old, new).await;
    // Whichever lost was told the length; nothing is in the file twice.
    assert!(old.is_err() || new.is_err(), "from {have}: {old:?} {new:?}");
    let have = blobs.partial(&key).await.unwrap() as usize;
    blobs.append(&key, have as u64, whole(&bytes[have..], 1 << 20)).await.unwrap();
    assert_eq!(blobs.finish(&key, digest).await.unwrap().sha256, digest);
}

#[tokio::test]
async fn rot_on_the_disk_is_never_served() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = Blobs::Fs(Fs::open(dir.path().to_owned(), NOW, 0).await.unwrap());
    let bytes = noise(2 * BLOCK as usize + 100, 4);
    let key = BlobKey::alone(DEFAULT_ORG, BlobKind::Artifact, &Digest::of(&bytes));
    blobs.put(&key, whole(&bytes, 4096), None).await.unwrap();
    let path = &files_below(dir.path())[0];
    let good = std::fs::read(path).unwrap();
    for (at, first_part_is_good) in
        [(0, false), (BLOCK as usize + 3, true), (good.len() - 1, false), (good.len() - 30, false)]
    {
        let mut rotten = good.clone();
        rotten[at] ^= 0x10;
        std::fs::write(path, &rotten).unwrap();
        let mut parts = Vec::new();
        match blobs.read(&key, 0..bytes.len() as u64).await {
            Ok(body) => parts = body.collect::<Vec<_>>().await,
            Err(BlobError::Damaged(_)) => {}
            Err(other) => panic!("{other}"),
        }
        assert_eq!(parts.first().is_some_and(Result::is_ok), first_part_is_good, "byte {at}");
        assert!(parts.is_empty() || parts.iter().any(Result::is_err), "byte {at}");
    }
    std::fs::write(path, &good[..good.len() - 1]).unwrap();
    assert!(matches!(blobs.read(&key, 0..1).await, Err(BlobError::Damaged(_))));
}

#[tokio::test]
async fn what_a_crash_left_is_swept_and_fresh_uploads_stay() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    Fs::open(root.to_owned(), NOW, 0).await.unwrap();
    std::fs::write(root.join("tmp/3"), b"half a pack").unwrap();
    std::fs::write(root.join("partial/upload"), b"half an artifact").unwrap();
    let written = std::fs::metadata(root.join("partial/upload")).unwrap().modified().unwrap();
    let written = Ms(written.duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as i64);
    Fs::open(root.to_owned(), written.plus(3_600_000), 0).await.unwrap();
    assert_eq!(files_below(root), [root.join("partial/upload").display().to_string()]);
    Fs::open(root.to_owned(), written.plus(25 * 3_600_000), 0).await.unwrap();
    assert_eq!(files_below(root), Vec::<String>::new());
}

#[tokio::test]
async fn an_upload_that_died_while_it_was_finished_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = noise(50_000, 8);
    let digest = Digest::of(&bytes);
    let key = BlobKey::alone(DEFAULT_ORG, BlobKind::Artifact, &digest);
    let blobs = Fs::open(dir.path().to_owned(), NOW, 0).await.unwrap();
    blobs.append(&key, 0, whole(&bytes, 5_000)).await.unwrap();
    let path = &files_below(dir.path())[0];
    let mut sums = crate::sums::Sums::default();
    sums.update(&bytes);
    let mut left = bytes.clone();
    left.extend(sums.seal().encode());
    std::fs::write(path, left).unwrap();
    let blobs = Fs::open(dir.path().to_owned(), NOW, 0).await.unwrap();
    assert_eq!(blobs.partial(&key).await.unwrap(), 50_000);
    blobs.append(&key, 50_000, body(vec![])).await.unwrap();
    blobs.finish(&key, digest).await.unwrap();
    assert_eq!(gather(blobs.read(&key, 0..50_000).await).await, bytes);
}

#[tokio::test]
async fn a_finished_object_takes_no_more_and_the_disk_is_not_blamed() {
    let dir = tempfile::tempdir().unwrap();
    let care = Care::default();
    let blobs = Fs::open(dir.path().to_owned(), NOW, care.clone()).await.unwrap();
    let key = BlobKey::alone(DEFAULT_ORG, BlobKind::Artifact, &Digest::of(b"whole"));
    blobs.append(&key, 0, whole(b"whole", 9)).await.unwrap();
    blobs.finish(&key, Digest::of(b"whole")).await.unwrap();
    assert!(matches!(blobs.append(&key, 5, whole(b"!", 9)).await, Err(BlobError::Offset { have: 5 })));
    assert!(!care.broken.is_told());
    // Whoever did not hear that it is finished says it again.
    assert_eq!(blobs.append(&key, 5, body(vec![])).await.unwrap(), 5);
    assert_eq!(blobs.finish(&key, Digest::of(b"whole")).await.unwrap().size, 5);
}

#[tokio::test]
async fn a_question_about_an_upload_that_is_being_finished_holds_nobody_up() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = Fs::open(dir.path().to_owned(), NOW, 0).await.unwrap();
    let key = BlobKey::alone(DEFAULT_ORG, BlobKind::Artifact, &Digest::of(b"whole"));
    blobs.append(&key, 0, whole(b"whole", 9)).await.unwrap();
    let (held, release) = (blobs.hold(&key), std::sync::mpsc::channel());
    let (holds, is_held) = tokio::sync::oneshot::channel();
    let holder = std::thread::spawn(move || {
        let _whole = held.lock().unwrap();
        holds.send(()).unwrap();
        release.1.recv().unwrap();
    });
    is_held.await.unwrap();
    let others = async {
        tokio::task::yield_now().await;
        release.0.send(()).unwrap();
    };
    assert_eq!(tokio::join!(blobs.partial(&key), others).0.unwrap(), 5);
    holder.join().unwrap();
}

#[tokio::test]
async fn with_the_last_part_of_a_log_its_directories_go_and_come_back_when_they_are_needed() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = Fs::open(dir.path().to_owned(), NOW, 0).await.unwrap();
    let at = |attempt| AttemptRef { job: JobId::from_raw(7), attempt };
    let [one, two, other] =
        [(1, 0), (1, 5), (2, 0)].map(|(attempt, start)| BlobKey::log(&at(attempt), start, start + 5));
    let put = async |key: &BlobKey| {
        let mut draft = blobs.create(key).await.unwrap();
        draft.append(Bytes::from_static(b"bytes")).await.unwrap();
        draft.finish(None).await.unwrap();
    };
    let logs = dir.path().join("objects/logs");
    for round in 0..2 {
        put(&one).await;
        put(&two).await;
        put(&other).await;
        for (key, dirs) in [(&one, 2), (&two, 1), (&other, 0)] {
            blobs.delete(key).await.unwrap();
            let job = logs.join(at(1).job.to_string());
            assert_eq!(job.read_dir().map_or(0, Iterator::count), dirs, "{key} {round}");
        }
        assert_eq!(logs.read_dir().unwrap().count(), 0);
    }
    // They go while somebody who knows them is about to use them.
    put(&one).await;
    let draft = blobs.create(&two).await.unwrap();
    std::fs::remove_dir_all(logs.join(at(1).job.to_string())).unwrap();
    draft.finish(None).await.unwrap();
}

#[tokio::test]
async fn a_full_disk_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = Blobs::Fs(Fs::open(dir.path().to_owned(), NOW, u64::MAX).await.unwrap());
    let key = BlobKey::pack(DEFAULT_ORG, (1, 2));
    assert!(matches!(blobs.put(&key, whole(b"x", 1), None).await, Err(BlobError::Full)));
    assert!(matches!(blobs.append(&key, 0, whole(b"x", 1)).await, Err(BlobError::Full)));
    assert!(matches!(blobs.read(&key, 0..1).await, Err(BlobError::Missing(_))));
}

#[test]
fn keys_cannot_point_elsewhere() {
    let key = BlobKey::alone(DEFAULT_ORG, BlobKind::Chunk, &Digest::of(b""));
    assert_eq!(BlobKey::parse(key.as_str()), Some(key));
    for wrong in ["", "/", "a//b", "../x", "a/../b", "a/./b", "A", "a b", "/etc/passwd", "a\0", &"a/".repeat(200)] {
        assert_eq!(BlobKey::parse(wrong), None, "{wrong:?}");
    }
}
