//! S: bytes on their way into an object store: one request if they are few, else parts. Nothing is visible before the end.

use std::collections::VecDeque;
use std::sync::Arc;

use alloy_shared::id::Digest;
use alloy_shared::limits;
use bytes::Bytes;
use futures_util::StreamExt as _;
use object_store::multipart::{MultipartStore as _, PartId};
use object_store::{ObjectStore as _, PutPayload};
use sha2::Digest as _;
use tokio::task::JoinSet;

use super::super::{BlobError, BlobKey, Stored, check};
use super::Shop;
use super::ask::{Failed, Kind};

/// An object on its way. Dropped, it leaves nothing.
#[derive(Debug)]
struct Upload {
    shop: Arc<Shop>,
    key: BlobKey,
    /// All parts but the last have this length.
    part: usize,
    waiting: VecDeque<Bytes>,
    waiting_len: usize,
    parts: Option<Parts>,
}

/// An upload that takes more than one request.
#[derive(Debug)]
struct Parts {
    id: String,
    next: usize,
    running: JoinSet<Result<(usize, PartId), Failed>>,
    stored: Vec<(usize, PartId)>,
}

impl Parts {
    async fn settle(&mut self, down_to: usize) -> Result<(), Failed> {
        while self.running.len() > down_to {
            match self.running.join_next().await {
                Some(Ok(part)) => self.stored.push(part?),
                Some(Err(error)) => return Err(Failed::away(error.to_string())),
                None => break,
            }
        }
        Ok(())
    }
}

impl Upload {
    fn new(shop: Arc<Shop>, key: &BlobKey, size: Option<u64>) -> Self {
        let least = size.unwrap_or(0).div_ceil(limits::S3_PARTS_MAX);
        let part = usize::try_from(least).unwrap_or(usize::MAX).max(limits::S3_PART);
        Self { shop, key: key.clone(), part, waiting: VecDeque::new(), waiting_len: 0, parts: None }
    }

    async fn push(&mut self, bytes: Bytes) -> Result<(), Failed> {
        self.waiting_len += bytes.len();
        self.waiting.push_back(bytes);
        // More than a part: what fits into one is sent in one request at the end.
        while self.waiting_len > self.part {
            let part = self.take(self.part);
            self.send(part).await?;
        }
        Ok(())
    }

    fn take(&mut self, len: usize) -> PutPayload {
        let mut left = len.min(self.waiting_len);
        self.waiting_len -= left;
        let mut out = Vec::new();
        while left > 0
            && let Some(mut bytes) = self.waiting.pop_front()
        {
            if bytes.len() > left {
                self.waiting.push_front(bytes.split_off(left));
            }
            left -= bytes.len();
            out.push(bytes);
        }
        out.into_iter().collect()
    }

    async fn send(&mut self, payload: PutPayload) -> Result<(), Failed> {
        let path = self.shop.path(&self.key);
        let parts = match &mut self.parts {
            Some(parts) => parts,
            none => {
                let store = &self.shop.store;
                let id = self.shop.ask("begin an object", || store.create_multipart(&path)).await?;
                none.insert(Parts { id, next: 0, running: JoinSet::new(), stored: Vec::new() })
            }
        };
        parts.settle(limits::S3_PARTS_AT_ONCE - 1).await?;
        let (shop, id, index) = (self.shop.clone(), parts.id.clone(), parts.next);
        parts.next += 1;
        parts.running.spawn(async move {
            let put = || shop.store.put_part(&path, &id, index, payload.clone());
            shop.ask("take a part", put).await.map(|part| (index, part))
        });
        Ok(())
    }

    /// Makes it an object. After an error it may be one nevertheless.
    async fn finish(&mut self) -> Result<(), Failed> {
        let rest = self.take(usize::MAX);
        let path = self.shop.path(&self.key);
        if self.parts.is_none() {
            let put = || self.shop.store.put_opts(&path, rest.clone(), Default::default());
            return self.shop.ask("take an object", put).await.map(drop);
        }
        self.send(rest).await?;
        let Some(parts) = &mut self.parts else { return Ok(()) };
        parts.settle(0).await?;
        parts.stored.sort_by_key(|(index, _)| *index);
        let all: Vec<PartId> = parts.stored.iter().map(|(_, part)| part.clone()).collect();
        let store = &self.shop.store;
        self.shop.ask("finish an object", || store.complete_multipart(&path, &parts.id, all.clone())).await?;
        self.parts = None;
        Ok(())
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let Some(mut parts) = self.parts.take() else { return };
        let (shop, path) = (self.shop.clone(), self.shop.path(&self.key));
        let abort = async move {
            // A part that arrives after the abort would stay.
            parts.running.shutdown().await;
            // Of what is finished or gone there is nothing to abort.
            let _ = shop.ask("drop an upload", || shop.store.abort_multipart(&path, &parts.id)).await;
        };
        self.shop.env.spawn("drop an upload", Box::pin(abort));
    }
}

/// An object that is being written.
#[derive(Debug)]
pub struct Draft {
    upload: Upload,
    sha: sha2::Sha256,
    len: u64,
}

impl Draft {
    pub(super) fn new(shop: Arc<Shop>, key: &BlobKey, size: Option<u64>) -> Self {
        Self { upload: Upload::new(shop, key, size), sha: sha2::Sha256::new(), len: 0 }
    }

    pub(in super::super) fn len(&self) -> u64 {
        self.len
    }

    pub(in super::super) async fn append(&mut self, bytes: Bytes) -> Result<(), BlobError> {
        self.sha.update(&bytes);
        self.len += bytes.len() as u64;
        self.upload.push(bytes).await.map_err(|failed| gone(failed, &self.upload.key))
    }

    /// Checks the bytes before anything is visible, and the object when it is.
    pub(in super::super) async fn finish(self, expect: Option<Digest>) -> Result<Stored, BlobError> {
        let Self { mut upload, sha, len } = self;
        let stored = Stored { size: len, sha256: Digest::from_hasher(sha) };
        check(expect, stored.sha256)?;
        let (shop, key) = (upload.shop.clone(), upload.key.clone());
        let failed = match upload.finish().await {
            Ok(()) => return shop.settled(&key, len).await.map(|()| stored),
            Err(failed) => failed,
        };
        // The answer to an earlier try may be lost, and this one refused because it is done. What can be read back is there.
        if !failed.kind.may_pass() && shop.hash(&key, len).await.is_ok_and(|sha256| sha256 == stored.sha256) {
            return Ok(stored);
        }
        Err(gone(failed, &key))
    }
}

/// An upload that the store no longer knows is no missing object.
fn gone(failed: Failed, key: &BlobKey) -> BlobError {
    match failed.kind {
        Kind::Missing => BlobError::Away(failed.why),
        _ => failed.of(key),
    }
}

impl Shop {
    /// An object that was just written has the length that was written.
    async fn settled(&self, key: &BlobKey, len: u64) -> Result<(), BlobError> {
        match self.size(key).await {
            Ok(size) if size == len => Ok(()),
            Ok(size) => Err(BlobError::Away(format!("it kept {size} bytes of {len}"))),
            Err(BlobError::Missing(_)) => Err(BlobError::Away("it did not keep what it took".to_owned())),
            Err(error) => Err(error),
        }
    }

    /// Reads an object of a known length back and hashes it.
    async fn hash(self: &Arc<Self>, key: &BlobKey, len: u64) -> Result<Digest, BlobError> {
        self.settled(key, len).await?;
        let mut body = self.read(key, 0..len).await?;
        let mut sha = sha2::Sha256::new();
        while let Some(part) = body.next().await {
            sha.update(&part.map_err(|error| BlobError::Away(error.to_string()))?);
        }
        Ok(Digest::from_hasher(sha))
    }
}
