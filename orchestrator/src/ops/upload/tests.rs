use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use alloy_shared::env::{Mono, Ms, Now};
use alloy_shared::id::DEFAULT_ORG;
use alloy_shared::wire::source::{Entry, EntryKind};
use async_trait::async_trait;
use bytes::BytesMut;
use futures_util::future::BoxFuture;

use super::*;
use crate::keep::DAY_MS;
use crate::store::mem::MemStore;

/// A machine whose clock stands still.
#[derive(Default)]
struct Still(AtomicU64);

#[async_trait]
impl Env for Still {
    fn now(&self) -> Now {
        Now { wall: Ms(1_000), mono: Mono(1_000) }
    }
    async fn sleep_until(&self, _at: Mono) {
        std::future::pending().await
    }
    fn spawn(&self, _name: &'static str, _task: BoxFuture<'static, ()>) {}
    fn dice(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

struct World {
    store: Arc<MemStore>,
    blobs: Arc<Blobs>,
    env: Arc<dyn Env>,
}

impl World {
    fn new() -> Self {
        Self { store: Arc::default(), blobs: Arc::new(Blobs::memory()), env: Arc::new(Still::default()) }
    }

    fn of(&self, org: OrgId) -> Depot<'_> {
        Depot { store: &*self.store, blobs: &self.blobs, env: &self.env, fresh_ms: DAY_MS, org }
    }

    fn depot(&self) -> Depot<'_> {
        self.of(DEFAULT_ORG)
    }

    fn objects(&self) -> usize {
        match &*self.blobs {
            Blobs::Mem(mem) => mem.keys().len(),
            Blobs::Fs(_) | Blobs::S3(_) => unreachable!(),
        }
    }

    async fn known(&self, kind: BlobKind, digests: &[Digest]) -> usize {
        self.store.blobs(&Scope::farm(), kind, digests).await.unwrap().len()
    }
}

fn body(bytes: impl Into<Bytes>, step: usize) -> Body {
    let bytes = bytes.into();
    let parts: Vec<_> = bytes.chunks(step).map(|part| Ok(Bytes::copy_from_slice(part))).collect();
    stream::iter(parts).boxed()
}

async fn gather(mut body: Body) -> Bytes {
    let mut out = BytesMut::new();
    while let Some(part) = body.next().await {
        out.extend_from_slice(&part.unwrap());
    }
    out.freeze()
}

fn code(result: Result<impl std::fmt::Debug, OpError>) -> ErrorCode {
    match result {
        Err(OpError::Refused { code, .. }) => code,
        other => panic!("{other:?}"),
    }
}

fn blob(n: u64) -> (Digest, Bytes) {
    let text: Vec<u8> = (0..200 + n * 37).map(|i| (i.wrapping_mul(n + 3) >> 2) as u8).collect();
    (Digest::of(&text), text.into())
}

/// A tree of `n` files, its manifest, and a pack with all of them.
fn tree(n: u64) -> (Manifest, Vec<(Digest, Bytes)>, Bytes) {
    let blobs: Vec<_> = (0..n).map(blob).collect();
    let file = |(i, (digest, bytes)): (usize, &(Digest, Bytes))| Entry {
        path: format!("f{i}"),
        kind: EntryKind::File,
        mode: 0o644,
        size: bytes.len() as u64,
        chunks: vec![*digest],
        target: None,
    };
    let manifest = Manifest::new(blobs.iter().enumerate().map(file).collect()).unwrap();
    let mut pack = BytesMut::new();
    for some in blobs.chunks(7) {
        pack.extend_from_slice(&pack::encode(&PackFrame::pack(some, 3)));
    }
    pack.extend_from_slice(&PACK_END);
    (manifest, blobs, pack.freeze())
}

fn unpack(pack: &[u8]) -> Vec<(Digest, Bytes)> {
    let mut reader = PackReader::default();
    reader.push(pack);
    let mut out = Vec::new();
    while let Some(frame) = reader.next_frame().unwrap() {
        out.extend(frame.unpack().unwrap());
    }
    reader.finish().unwrap();
    out
}

#[tokio::test]
async fn a_source_goes_in_and_its_blobs_come_out() {
    let world = World::new();
    let depot = world.depot();
    let (manifest, blobs, pack) = tree(40);
    let (digest, text) = (manifest.digest(), Bytes::from(manifest.encode()));
    let first = depot.put_source(digest, text.clone()).await.unwrap();
    assert_eq!((first.complete, first.missing.len(), world.objects()), (false, 40, 0));
    assert!(!depot.has_source(&digest).await.unwrap());
    let stored = depot.pack(body(pack.clone(), 1000)).await.unwrap();
    assert_eq!(stored.blobs, 40);
    assert_eq!(stored.bytes, blobs.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>());
    assert_eq!(world.objects(), 1);
    let second = depot.put_source(digest, text.clone()).await.unwrap();
    assert_eq!((second.complete, second.missing.len()), (true, 0));
    assert!(depot.has_source(&digest).await.unwrap());
    let (len, manifest) = depot.manifest(&digest).await.unwrap();
    assert_eq!((len, gather(manifest).await), (text.len() as u64, text));
    for some in [&blobs[..], &blobs[3..4], &blobs[5..9]] {
        let digests: Vec<Digest> = some.iter().map(|(digest, _)| *digest).collect();
        let sent = unpack(&gather(depot.source_blobs(&digests).await.unwrap()).await);
        assert!(some.iter().all(|blob| sent.contains(blob)));
    }
    // The same pack again adds nothing.
    depot.pack(body(pack, 77)).await.unwrap();
    assert_eq!(world.objects(), 2);
}

#[tokio::test]
async fn organisations_do_not_see_each_others_bytes() {
    let world = World::new();
    let (manifest, blobs, pack) = tree(5);
    let (digest, text) = (manifest.digest(), Bytes::from(manifest.encode()));
    world.depot().pack(body(pack, 4096)).await.unwrap();
    world.depot().put_source(digest, text.clone()).await.unwrap();
    let other = world.of(OrgId::from_raw(77));
    assert_eq!(other.put_source(digest, text).await.unwrap().missing.len(), 5);
    assert!(!other.has_source(&digest).await.unwrap());
    assert_eq!(code(other.manifest(&digest).await.map(|_| ())), ErrorCode::NotFound);
    let missing = other.source_blobs(&[blobs[0].0]).await.map(|_| ());
    assert!(matches!(missing, Err(OpError::Missing(list)) if list == [blobs[0].0]));
}

#[tokio::test]
async fn a_manifest_that_is_not_its_digest_or_not_canonical_is_refused() {
    let world = World::new();
    let (manifest, _, _) = tree(2);
    let text = manifest.encode();
    let wrong = world.depot().put_source(Digest::of(b"other"), text.clone().into()).await;
    assert_eq!(code(wrong), ErrorCode::DigestMismatch);
    let spaced = String::from_utf8(text).unwrap().replace("{\"path\"", "{ \"path\"").into_bytes();
    let wrong = world.depot().put_source(Digest::of(&spaced), spaced.into()).await;
    assert_eq!(code(wrong), ErrorCode::InvalidSource);
    assert_eq!(world.objects(), 0);
}

#[tokio::test]
async fn a_damaged_or_short_pack_leaves_nothing() {
    let (_, blobs, pack) = tree(20);
    let digests: Vec<Digest> = blobs.iter().map(|(digest, _)| *digest).collect();
    let mut seed = 0x1234_5678_9abc_def1u64;
    for round in 0..300 {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        let at = (seed % pack.len() as u64) as usize;
        let mut wrong = pack.to_vec();
        match round % 3 {
            0 => wrong.truncate(at),
            1 => wrong[at] ^= 1 << (seed >> 60 & 7),
            _ => {
                wrong.splice(at..at, [seed as u8]);
            }
        }
        let world = World::new();
        if let Ok(stored) = world.depot().pack(body(wrong, 999)).await {
            // A change that changes no blob, in a byte of zstd's own that means nothing.
            assert_eq!((round % 3, stored.blobs), (1, 20), "round {round} at {at}");
            continue;
        }
        assert_eq!((world.objects(), world.known(BlobKind::Chunk, &digests).await), (0, 0), "round {round} at {at}");
    }
    let world = World::new();
    let broken = stream::iter([Ok(pack.slice(..pack.len() / 2)), Err(std::io::Error::other("gone"))]).boxed();
    assert_eq!(code(world.depot().pack(broken).await), ErrorCode::IncompleteBody);
    let long = stream::repeat_with(|| Ok(Bytes::from_static(&[0; 1 << 20]))).boxed();
    assert_eq!(code(world.depot().pack(long).await), ErrorCode::InvalidSource);
    assert_eq!((world.objects(), world.known(BlobKind::Chunk, &digests).await), (0, 0));
}

fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, bytes) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o755);
        builder.append_data(&mut header, path, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

#[tokio::test]
async fn a_tar_is_the_same_source_as_its_manifest_and_pack() {
    let world = World::new();
    let big: Vec<u8> = (0..9_000_000u32).map(|i| (i ^ (i >> 7)) as u8).collect();
    let archive = tar_of(&[("a/x", b"one"), ("b", b"two"), ("a/same", b"one"), ("big", &big)]);
    let packed = zstd::bulk::compress(&archive, 1).unwrap();
    let digest = world.depot().tar(body(packed, 100_000), Some(Format::Zstd)).await.unwrap();
    assert!(world.depot().has_source(&digest).await.unwrap());
    let (_, text) = world.depot().manifest(&digest).await.unwrap();
    let text = gather(text).await;
    let manifest = Manifest::decode(&text).unwrap();
    assert_eq!((manifest.digest(), manifest.entries().len()), (digest, 4));
    assert!(world.depot().put_source(digest, text).await.unwrap().complete);
    let needed = manifest.blobs();
    let sent = unpack(&gather(world.depot().source_blobs(&needed).await.unwrap()).await);
    assert_eq!(sent.len(), needed.len());
    let big_chunks = &manifest.entries().iter().find(|entry| entry.path == "big").unwrap().chunks;
    let find = |digest: &Digest| sent.iter().find(|(d, _)| d == digest).unwrap().1.to_vec();
    assert_eq!(big_chunks.iter().flat_map(find).collect::<Vec<u8>>(), big);
    // The same tree again, plainly: no second pack.
    let objects = world.objects();
    assert_eq!(world.depot().tar(body(archive, 4096), None).await.unwrap(), digest);
    assert_eq!(world.objects(), objects);
}

#[tokio::test]
async fn a_refused_tar_leaves_nothing_and_says_which_entry() {
    let world = World::new();
    let big: Vec<u8> = (0..5_000_000u32).map(|i| (i ^ (i >> 7)) as u8).collect();
    let mut archive = tar_of(&[("good", &big), ("evil", b"x")]);
    // The same checksum: two characters change places.
    let at = archive.windows(4).rposition(|part| part == b"evil").unwrap();
    archive[at..at + 4].copy_from_slice(b"/vil");
    archive[at + 148..at + 156].fill(b' ');
    let sum: u32 = archive[at..at + 512].iter().map(|byte| u32::from(*byte)).sum();
    archive[at + 148..at + 155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    let digests: Vec<Digest> = big.chunks(limits::BLOB_MAX).map(Digest::of).collect();
    match world.depot().tar(body(archive.clone(), 65_536), None).await {
        Err(OpError::Refused { code: ErrorCode::InvalidSource, message, .. }) => {
            assert!(message.contains("/vil") && message.contains("absolute"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    let cut = body(archive[..archive.len() / 2].to_vec(), 65_536);
    assert_eq!(code(world.depot().tar(cut, None).await), ErrorCode::InvalidSource);
    let gone = body(archive, 65_536).take(3).chain(stream::iter([Err(std::io::Error::other("gone"))])).boxed();
    assert_eq!(code(world.depot().tar(gone, None).await), ErrorCode::IncompleteBody);
    assert_eq!((world.objects(), world.known(BlobKind::Chunk, &digests).await), (0, 0));
}

#[tokio::test]
async fn a_refused_tar_is_heard_to_its_end_but_not_for_ever() {
    let world = World::new();
    let sent = Arc::new(Mutex::new(0u64));
    let seen = sent.clone();
    let lock = |sent: &Mutex<u64>| -> u64 {
        let sent: MutexGuard<'_, u64> = sent.lock().unwrap();
        *sent
    };
    let endless = stream::repeat_with(move || {
        *seen.lock().unwrap() += 65_536;
        Ok(Bytes::from_static(&[b'x'; 65_536]))
    });
    assert_eq!(code(world.depot().tar(endless.boxed(), None).await), ErrorCode::InvalidSource);
    assert!((limits::UPLOAD_DRAIN..2 * limits::UPLOAD_DRAIN).contains(&lock(&sent)));
}

#[tokio::test]
async fn an_artifact_goes_on_where_it_broke_off() {
    let world = World::new();
    let depot = world.depot();
    let bytes: Vec<u8> = (0..300_000u32).map(|i| (i ^ (i >> 5)) as u8).collect();
    let (digest, total) = (Digest::of(&bytes), bytes.len() as u64);
    assert_eq!(depot.artifact_progress(&digest).await.unwrap(), Progress { have: 0, complete: false });
    let broken =
        body(bytes[..100_000].to_vec(), 9_999).chain(stream::iter([Err(std::io::Error::other("gone"))])).boxed();
    assert_eq!(code(depot.artifact(digest, 0, total, broken).await), ErrorCode::IncompleteBody);
    assert_eq!(depot.artifact_progress(&digest).await.unwrap().have, 99_999);
    assert_eq!(world.known(BlobKind::Artifact, &[digest]).await, 0);
    let gap = depot.artifact(digest, 150_000, total, body(bytes[150_000..].to_vec(), 4096)).await;
    assert_eq!(code(gap), ErrorCode::OffsetMismatch);
    let done = depot.artifact(digest, 99_999, total, body(bytes[99_999..].to_vec(), 4096)).await.unwrap();
    assert_eq!(done, Progress { have: total, complete: true });
    assert_eq!(depot.artifact_progress(&digest).await.unwrap(), done);
    // Once it is there, nothing of a further upload is read.
    let again = stream::repeat_with(|| -> std::io::Result<Bytes> { panic!("nobody asked") }).boxed();
    assert_eq!(depot.artifact(digest, 0, total, again).await.unwrap(), done);
    let (size, all) = depot.read_artifact(&digest, None).await.unwrap();
    assert_eq!((size, &gather(all).await[..]), (total, &bytes[..]));
    let (_, part) = depot.read_artifact(&digest, Some(5..10)).await.unwrap();
    assert_eq!(&gather(part).await[..], &bytes[5..10]);
}

#[tokio::test]
async fn an_upload_that_nobody_finished_is_finished_by_whoever_goes_on() {
    for bytes in [&b"x"[..], b"all of it"] {
        let world = World::new();
        let depot = world.depot();
        let (digest, total) = (Digest::of(bytes), bytes.len() as u64);
        let key = BlobKey::alone(DEFAULT_ORG, BlobKind::Artifact, &digest);
        world.blobs.append(&key, 0, body(bytes, 4)).await.unwrap();
        let have = depot.artifact_progress(&digest).await.unwrap();
        assert_eq!(have, Progress { have: total - 1, complete: false });
        let done = depot.artifact(digest, have.have, total, body(&bytes[have.have as usize..], 4)).await.unwrap();
        assert!(done.complete);
        assert_eq!(world.known(BlobKind::Artifact, &[digest]).await, 1);
    }
}

#[tokio::test]
async fn an_artifact_of_other_bytes_or_another_length_is_refused() {
    let world = World::new();
    let depot = world.depot();
    let digest = Digest::of(b"what was promised");
    let wrong = depot.artifact(digest, 0, 17, body(&b"what was sent----"[..], 4)).await;
    assert_eq!(code(wrong), ErrorCode::DigestMismatch);
    let long = depot.artifact(digest, 0, 17, body(&b"what was promised and more"[..], 4)).await;
    assert_eq!(code(long), ErrorCode::TooLarge);
    let huge = depot.artifact(digest, 0, limits::ARTIFACT_BYTES_MAX + 1, body(&b"x"[..], 4)).await;
    assert_eq!(code(huge), ErrorCode::TooLarge);
    assert_eq!(world.known(BlobKind::Artifact, &[digest]).await, 0);
    let empty = Digest::of(b"");
    assert!(depot.artifact(empty, 0, 0, body(Bytes::new(), 1)).await.unwrap().complete);
    assert_eq!(world.known(BlobKind::Artifact, &[empty]).await, 1);
}
