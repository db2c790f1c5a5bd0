//! What holds for objects wherever they lie: in files, in a bucket, in memory.

use std::path::Path;

use alloy_shared::env::Ms;
use alloy_shared::id::{DEFAULT_ORG, Digest};
use alloy_tests::chaos::Dice;
use alloy_tests::observe::until;
use alloy_tests::s3::S3;
use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use futures_util::{StreamExt as _, future, stream};
use orchestrator::blobs::{BlobError, BlobKey, Blobs, Body, Fs, Stored};
use orchestrator::store::BlobKind;
use orchestrator::sums::BLOCK;
use tempfile::TempDir;

use super::{bucket, noise, whole};

/// One of each kind, and where their files are.
struct Kinds {
    all: Vec<Blobs>,
    files: TempDir,
    spool: TempDir,
    s3: S3,
}

impl Kinds {
    async fn new() -> Result<Kinds> {
        let (files, spool) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let s3 = S3::start().await?;
        let fs = Fs::open(files.path().to_owned(), Ms(0), 0).await?;
        let all = vec![Blobs::Fs(fs), bucket(&s3, spool.path()).await?, Blobs::memory()];
        Ok(Kinds { all, files, spool, s3 })
    }

    /// No object, no half of one, and no upload is left.
    async fn is_empty(&self) -> Result<()> {
        for blobs in &self.all {
            ensure!(blobs.list("", None).await?.is_empty());
        }
        ensure!(files_below(self.files.path())?.is_empty() && files_below(self.spool.path())?.is_empty());
        ensure!(self.s3.objects()?.is_empty());
        until("dropped uploads are aborted", async || Ok(self.s3.stray_parts()?.is_empty().then_some(()))).await;
        Ok(())
    }
}

fn files_below(dir: &Path) -> Result<Vec<String>> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() { out.extend(files_below(&path)?) } else { out.push(path.display().to_string()) }
    }
    Ok(out)
}

fn body(parts: Vec<std::io::Result<Bytes>>) -> Body {
    stream::iter(parts).boxed()
}

fn gone() -> std::io::Result<Bytes> {
    Err(std::io::Error::other("the client is gone"))
}

fn artifact(bytes: &[u8]) -> (Digest, BlobKey) {
    let digest = Digest::of(bytes);
    (digest, BlobKey::alone(DEFAULT_ORG, BlobKind::Artifact, &digest))
}

async fn gather(body: Result<Body, BlobError>) -> Result<Vec<u8>> {
    let mut body = body?;
    let mut out = Vec::new();
    while let Some(part) = body.next().await {
        let part = part?;
        ensure!(part.len() as u64 <= BLOCK && !part.is_empty());
        out.extend_from_slice(&part);
    }
    Ok(out)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_is_read_as_it_was_put_in_any_range() -> Result<()> {
    let kinds = Kinds::new().await?;
    assert!(matches!(&kinds.all[1], Blobs::S3(s3) if s3.refuses_overwrites()), "the probe has learned it");
    for blobs in &kinds.all {
        for len in [0usize, 1, 5_000, BLOCK as usize, 3 * BLOCK as usize + 17, 9 << 20] {
            let bytes = noise(len, len as u64);
            let (digest, key) = artifact(&bytes);
            let stored = blobs.put(&key, whole(&bytes, 70_001), Some(digest)).await?;
            assert_eq!(stored, Stored { size: len as u64, sha256: digest });
            let size = len as u64;
            for range in [0..size, 0..size.min(1), size / 2..size, size.saturating_sub(1)..size, size..size] {
                let want = &bytes[range.start as usize..range.end as usize];
                ensure!(gather(blobs.read(&key, range.clone()).await).await? == want, "{len} {range:?}");
                ensure!(blobs.read_piece(&key, range.start, want.len() as u32).await? == want, "{len} {range:?}");
            }
            assert!(blobs.read(&key, 0..size + 1).await.is_err());
            assert!(blobs.read_piece(&key, size, 1 << 20).await.is_err());
            blobs.delete(&key).await?;
            blobs.delete(&key).await?;
            for range in [0..0, 0..1] {
                assert!(matches!(blobs.read(&key, range).await, Err(BlobError::Missing(_))));
            }
            assert!(matches!(blobs.read_piece(&key, 0, 1).await, Err(BlobError::Missing(_))));
        }
    }
    kinds.is_empty().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_breaks_off_or_does_not_fit_leaves_nothing() -> Result<()> {
    let kinds = Kinds::new().await?;
    for len in [1 << 20, 9 << 20] {
        let bytes = noise(len, 5);
        let digest = Digest::of(&bytes);
        let key = BlobKey::alone(DEFAULT_ORG, BlobKind::Manifest, &digest);
        for blobs in &kinds.all {
            let broken = body(vec![Ok(bytes.clone().into()), gone()]);
            assert!(matches!(blobs.put(&key, broken, Some(digest)).await, Err(BlobError::Body(_))));
            let short = blobs.put(&key, whole(&bytes[1..], 4096), Some(digest)).await;
            assert!(matches!(short, Err(BlobError::Digest { .. })));
            assert!(matches!(blobs.read(&key, 0..1).await, Err(BlobError::Missing(_))));
            let mut draft = blobs.create(&key).await?;
            draft.append(bytes.clone().into()).await?;
            drop(draft);
        }
    }
    kinds.is_empty().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_goes_on_where_it_broke_off_and_is_visible_at_its_end() -> Result<()> {
    let kinds = Kinds::new().await?;
    let bytes = noise(4 << 20, 9);
    let (digest, key) = artifact(&bytes);
    for blobs in &kinds.all {
        let mut at = 0;
        for cut in [1usize, 700_000, 2 << 20, (3 << 20) + 5] {
            let broken = body(vec![Ok(Bytes::copy_from_slice(&bytes[at..cut])), gone()]);
            assert!(matches!(blobs.append(&key, at as u64, broken).await, Err(BlobError::Body(_))));
            at = cut;
            let have = at as u64;
            assert_eq!(blobs.partial(&key).await?, have);
            for wrong in [have - 1, have + 1] {
                let refused = blobs.append(&key, wrong, whole(b"xx", 1)).await;
                assert!(matches!(refused, Err(BlobError::Offset { have: h }) if h == have), "{wrong}");
            }
            assert!(matches!(blobs.read(&key, 0..1).await, Err(BlobError::Missing(_))), "not visible before its end");
        }
        assert_eq!(blobs.append(&key, at as u64, whole(&bytes[at..], 65_536)).await?, 4 << 20);
        assert_eq!(blobs.finish(&key, digest).await?, Stored { size: 4 << 20, sha256: digest });
        ensure!(gather(blobs.read(&key, 0..4 << 20).await).await? == bytes);
        // A finished upload that nobody registered is found again.
        assert_eq!(blobs.partial(&key).await?, 4 << 20);
        assert_eq!(blobs.append(&key, 4 << 20, body(vec![])).await?, 4 << 20);
        assert_eq!(blobs.finish(&key, digest).await?.sha256, digest);
        blobs.delete(&key).await?;
    }
    kinds.is_empty().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_of_other_bytes_is_thrown_away_and_can_begin_again() -> Result<()> {
    let kinds = Kinds::new().await?;
    let bytes = noise(100_000, 3);
    let (digest, key) = artifact(&bytes);
    for blobs in &kinds.all {
        blobs.append(&key, 0, whole(&bytes[1..], 999)).await?;
        assert!(matches!(blobs.finish(&key, digest).await, Err(BlobError::Digest { .. })));
        assert_eq!(blobs.partial(&key).await?, 0);
        assert!(blobs.list("", None).await?.is_empty());
        blobs.append(&key, 0, whole(&bytes, 999)).await?;
        blobs.finish(&key, digest).await?;
        blobs.delete(&key).await?;
    }
    kinds.is_empty().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_that_several_finish_at_once_is_finished_for_each_of_them() -> Result<()> {
    let kinds = Kinds::new().await?;
    for (blobs, len) in kinds.all.iter().flat_map(|blobs| [(blobs, 0), (blobs, 100_000), (blobs, 9 << 20)]) {
        let bytes = noise(len, 5);
        let (digest, key) = artifact(&bytes);
        blobs.append(&key, 0, whole(&bytes, 65_536)).await?;
        let done = future::join_all((0..4).map(|_| blobs.finish(&key, digest))).await;
        assert!(done.iter().all(|done| done.as_ref().is_ok_and(|done| done.sha256 == digest)), "{len}: {done:?}");
        ensure!(gather(blobs.read(&key, 0..len as u64).await).await? == bytes);
        // Nobody registered it, and its last byte comes again, of which nothing is new.
        assert_eq!(blobs.append(&key, len as u64, body(vec![Ok(Bytes::new())])).await?, len as u64);
        assert_eq!(blobs.finish(&key, digest).await?.sha256, digest);
        blobs.delete(&key).await?;
    }
    kinds.is_empty().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn objects_are_listed_in_the_order_of_their_keys_from_any_of_them_on() -> Result<()> {
    let seed = 11;
    println!("seed {seed}");
    let mut dice = Dice::seeded(seed);
    let kinds = Kinds::new().await?;
    for blobs in &kinds.all {
        if let Blobs::Mem(mem) = blobs {
            mem.tell_time(Ms(7));
        }
        let mut keys = Vec::new();
        for number in 0..24u64 {
            let bytes = noise(dice.roll(3 << 10) as usize, number);
            let kind = [BlobKind::Artifact, BlobKind::Chunk, BlobKind::Manifest][number as usize % 3];
            let key = match number % 4 {
                0 => BlobKey::pack(DEFAULT_ORG, (dice.roll(1 << 40), number)),
                _ => BlobKey::alone(DEFAULT_ORG, kind, &Digest::of(&bytes)),
            };
            blobs.put(&key, whole(&bytes, 1_000), None).await?;
            keys.push((key, bytes.len() as u64));
        }
        keys.sort();
        keys.dedup();
        let listed = blobs.list("", None).await?;
        let told: Vec<(BlobKey, u64)> = listed.iter().map(|one| (one.key.clone(), one.size)).collect();
        assert_eq!(told, keys);
        assert!(listed.iter().all(|one| one.modified.0 > 0), "{listed:?}");
        for (number, one) in listed.iter().enumerate() {
            assert_eq!(blobs.list("", Some(&one.key)).await?, listed[number + 1..]);
            let prefix = &one.key.as_str()[..dice.roll(one.key.as_str().len() as u64 + 1) as usize];
            let after = &listed[dice.roll(listed.len() as u64) as usize].key;
            let wanted = listed.iter().filter(|other| other.key.as_str().starts_with(prefix) && other.key > *after);
            let told = blobs.list(prefix, Some(after)).await?;
            assert_eq!(told, wanted.cloned().collect::<Vec<_>>(), "`{prefix}` after {after}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_longer_than_a_page_comes_in_pages() -> Result<()> {
    let kinds = Kinds::new().await?;
    let names: Vec<String> = (0..2_100).map(|number| format!("org_x/packs/{number:05}")).collect();
    let roots = [kinds.files.path().join("objects"), kinds.s3.file("one/two")];
    for root in &roots {
        std::fs::create_dir_all(root.join("org_x/packs"))?;
        for name in &names {
            std::fs::write(root.join(name), "x")?;
        }
    }
    // What is not the farm's is not told, also where it fills a page.
    for number in 0..1_100 {
        let stranger = kinds.s3.file(&format!("one/two/a/UP{number}"));
        std::fs::create_dir_all(stranger.parent().context("a directory")?)?;
        std::fs::write(stranger, "x")?;
    }
    for blobs in &kinds.all[..2] {
        let mut told: Vec<String> = Vec::new();
        let mut after = None;
        loop {
            let page = blobs.list("", after.as_ref()).await?;
            assert!(page.len() <= 1_000);
            let Some(last) = page.last() else { break };
            after = Some(last.key.clone());
            told.extend(page.iter().map(|one| one.key.to_string()));
        }
        assert!(told == names, "{} of {}", told.len(), names.len());
    }
    Ok(())
}
