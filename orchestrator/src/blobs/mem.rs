//! P: objects in memory, with the same rules.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use alloy_shared::env::Ms;
use alloy_shared::id::Digest;
use alloy_shared::limits;
use alloy_shared::mem_disk::MemDisk;
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt as _, stream};

use super::{BlobError, BlobKey, Body, Listed, Stored, check};
use crate::sums::BLOCK;

#[derive(Debug, Clone, Default)]
pub struct Mem {
    shelves: Arc<Mutex<Shelves>>,
    disk: Arc<MemDisk>,
}

#[derive(Debug, Default)]
struct Shelves {
    /// Each with the time that was told last before it.
    objects: BTreeMap<BlobKey, (Bytes, Ms)>,
    now: Ms,
    partial: BTreeMap<BlobKey, BytesMut>,
}

impl Mem {
    pub fn on(disk: Arc<MemDisk>) -> Self {
        Self { shelves: Arc::default(), disk }
    }

    /// What a power cut leaves of unfinished uploads: as many of their bytes as `keep` says.
    pub fn cut_power(&self, mut keep: impl FnMut(u64) -> u64) {
        for bytes in self.lock().partial.values_mut() {
            let kept = keep(bytes.len() as u64) as usize;
            bytes.truncate(kept);
        }
    }

    /// An object as it is, for whoever checks what the farm lists.
    pub fn object(&self, key: &BlobKey) -> Option<Bytes> {
        self.lock().objects.get(key).map(|(bytes, _)| bytes.clone())
    }

    /// What time it is for the objects that come from now on. Without it they are of the epoch's beginning.
    pub fn tell_time(&self, now: Ms) {
        self.lock().now = now;
    }

    fn lock(&self) -> MutexGuard<'_, Shelves> {
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The keys of all objects.
    pub fn keys(&self) -> Vec<BlobKey> {
        self.lock().objects.keys().cloned().collect()
    }

    pub(super) fn create(&self, key: &BlobKey) -> Draft {
        Draft { mem: self.clone(), key: key.clone(), bytes: BytesMut::new() }
    }

    async fn insert(&self, key: &BlobKey, bytes: Bytes, expect: Option<Digest>) -> Result<Stored, BlobError> {
        let sha256 = Digest::of(&bytes);
        check(expect, sha256)?;
        self.room()?;
        self.disk.sync().await.map_err(|error| BlobError::Io { what: "sync an object", error })?;
        let size = bytes.len() as u64;
        let mut shelves = self.lock();
        let now = shelves.now;
        shelves.objects.insert(key.clone(), (bytes, now));
        Ok(Stored { size, sha256 })
    }

    pub(super) fn room(&self) -> Result<(), BlobError> {
        self.disk.room().map_err(|_| BlobError::Full)
    }

    pub(super) fn read(&self, key: &BlobKey, range: Range<u64>) -> Result<Body, BlobError> {
        let bytes = self.object(key).ok_or_else(|| BlobError::Missing(key.clone()))?;
        if range.start > range.end || range.end > bytes.len() as u64 {
            return Err(BlobError::Damaged(key.clone()));
        }
        let mut rest = bytes.slice(range.start as usize..range.end as usize);
        let parts = std::iter::from_fn(move || {
            let part = rest.split_to(rest.len().min(BLOCK as usize));
            (!part.is_empty()).then_some(Ok(part))
        });
        Ok(stream::iter(parts).boxed())
    }

    pub(super) fn delete(&self, key: &BlobKey) {
        self.lock().objects.remove(key);
    }

    pub(super) fn list(&self, prefix: &str, after: Option<&BlobKey>) -> Vec<Listed> {
        let shelves = self.lock();
        let wanted = shelves
            .objects
            .iter()
            .filter(|(key, _)| key.as_str().starts_with(prefix) && after.is_none_or(|after| *key > after));
        let listed = |(key, (bytes, modified)): (&BlobKey, &(Bytes, Ms))| Listed {
            key: key.clone(),
            size: bytes.len() as u64,
            modified: *modified,
        };
        wanted.take(limits::BLOBS_PER_PAGE).map(listed).collect()
    }

    pub(super) fn partial(&self, key: &BlobKey) -> u64 {
        let shelves = self.lock();
        let whole = shelves.objects.get(key).map(|(bytes, _)| bytes.len());
        whole.or_else(|| shelves.partial.get(key).map(|bytes| bytes.len())).unwrap_or(0) as u64
    }

    pub(super) async fn append(&self, key: &BlobKey, offset: u64, mut body: Body) -> Result<u64, BlobError> {
        let mut have = self.partial(key);
        if have != offset {
            return Err(BlobError::Offset { have });
        }
        // It is finished, but whoever finished it did not live to say so: there is nothing to add.
        if self.lock().objects.contains_key(key) {
            return Ok(have);
        }
        self.lock().partial.entry(key.clone()).or_default();
        while let Some(part) = body.next().await {
            let part = part.map_err(BlobError::Body)?;
            self.room()?;
            let mut shelves = self.lock();
            let bytes = shelves.partial.entry(key.clone()).or_default();
            if bytes.len() as u64 != have {
                return Err(BlobError::Offset { have: bytes.len() as u64 });
            }
            bytes.extend_from_slice(&part);
            have = bytes.len() as u64;
        }
        Ok(have)
    }

    pub(super) async fn finish(&self, key: &BlobKey, expect: Digest) -> Result<Stored, BlobError> {
        let bytes = {
            let shelves = self.lock();
            let partial = shelves.partial.get(key).map(|bytes| bytes.clone().freeze());
            let whole = || shelves.objects.get(key).map(|(bytes, _)| bytes.clone());
            partial.or_else(whole).ok_or_else(|| BlobError::Missing(key.clone()))?
        };
        let done = self.insert(key, bytes, Some(expect)).await;
        // Only now: whoever sends the same bytes at the same time goes on with one or the other.
        self.lock().partial.remove(key);
        done
    }
}

#[derive(Debug)]
pub struct Draft {
    mem: Mem,
    key: BlobKey,
    bytes: BytesMut,
}

impl Draft {
    pub(super) fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    pub(super) fn append(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) async fn finish(self, expect: Option<Digest>) -> Result<Stored, BlobError> {
        self.mem.insert(&self.key, self.bytes.freeze(), expect).await
    }
}
