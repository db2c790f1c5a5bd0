//! S: an object's bytes as they come from an object store: goes on where a body broke off, and holds back the end of what
//! does not hash to its name.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use alloy_shared::id::Digest;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt as _, stream};
use object_store::{GetOptions, GetRange, ObjectStore as _};
use sha2::Digest as _;

use super::super::{BlobError, BlobKey, Body};
use super::Shop;
use super::ask::{Failed, Kind, Tries, within};
use crate::sums::BLOCK;

type Parts = BoxStream<'static, object_store::Result<Bytes>>;

struct Reading {
    shop: Arc<Shop>,
    key: BlobKey,
    at: u64,
    end: u64,
    parts: Option<Parts>,
    /// Came, and is not handed on yet.
    rest: Bytes,
    tries: Tries,
    /// The next byte after which a broken body counts as the first one.
    fresh_at: u64,
    /// What the whole must hash to, and what came of it.
    check: Option<(Digest, sha2::Sha256)>,
    /// The last part before this one: it goes out when another one follows or all is well.
    held: Bytes,
}

impl Shop {
    /// The bytes of a range. What is asked for as a whole is checked against the key.
    pub(super) async fn read(self: &Arc<Self>, key: &BlobKey, range: Range<u64>) -> Result<Body, BlobError> {
        if range.start >= range.end {
            let size = self.size(key).await?;
            let inside = range.start == range.end && range.end <= size;
            return if inside { Ok(stream::empty().boxed()) } else { Err(BlobError::Damaged(key.clone())) };
        }
        let (size, parts) = self.open(key, range.clone()).await.map_err(|failed| failed.of(key))?;
        if range.end > size {
            return Err(BlobError::Damaged(key.clone()));
        }
        let whole = range.start == 0 && range.end == size;
        let check = key.digest().filter(|_| whole).map(|digest| (digest, sha2::Sha256::new()));
        let reading = Reading {
            shop: self.clone(),
            key: key.clone(),
            at: range.start,
            end: range.end,
            parts: Some(parts),
            rest: Bytes::new(),
            tries: Tries::new(self.patience, &*self.env),
            fresh_at: range.start + BLOCK,
            check,
            held: Bytes::new(),
        };
        let next = |reading: Option<Reading>| async {
            let mut reading = reading?;
            match reading.next().await {
                Ok(part) => Some((Ok(part?), Some(reading))),
                Err(error) => Some((Err(error), None)),
            }
        };
        Ok(stream::unfold(Some(reading), next).boxed())
    }

    /// The object's size, and the body of a range in it that is not empty.
    async fn open(&self, key: &BlobKey, range: Range<u64>) -> Result<(u64, Parts), Failed> {
        let path = self.path(key);
        let options = GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() };
        let answer = self.ask("send an object", || self.store.get_opts(&path, options.clone())).await?;
        Ok((answer.meta.size, answer.into_stream()))
    }

    /// A short range as one piece.
    pub(super) async fn read_piece(&self, key: &BlobKey, at: u64, len: u32) -> Result<Bytes, BlobError> {
        if len == 0 {
            let size = self.size(key).await?;
            return if at <= size { Ok(Bytes::new()) } else { Err(BlobError::Damaged(key.clone())) };
        }
        let path = self.path(key);
        let range = GetRange::Bounded(at..at.saturating_add(u64::from(len)));
        let options = GetOptions { range: Some(range), ..GetOptions::default() };
        let get = || async { self.store.get_opts(&path, options.clone()).await?.bytes().await };
        let bytes = self.ask("send a piece", get).await.map_err(|failed| failed.of(key))?;
        // An object that ends earlier answers with what there is.
        if bytes.len() == len as usize { Ok(bytes) } else { Err(BlobError::Damaged(key.clone())) }
    }
}

impl Reading {
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        loop {
            if !self.rest.is_empty() {
                let part = self.rest.split_to(self.rest.len().min(BLOCK as usize));
                let Some((_, sha)) = &mut self.check else { return Ok(Some(part)) };
                sha.update(&part);
                let before = std::mem::replace(&mut self.held, part);
                if !before.is_empty() {
                    return Ok(Some(before));
                }
                continue;
            }
            if self.at == self.end {
                return self.last();
            }
            self.rest = self.more().await.map_err(io::Error::other)?;
        }
    }

    fn last(&mut self) -> io::Result<Option<Bytes>> {
        if let Some((digest, sha)) = self.check.take()
            && Digest::from_hasher(sha) != digest
        {
            let what = format!("object {} is damaged in the object store", self.key);
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        Ok(Some(std::mem::take(&mut self.held)).filter(|part| !part.is_empty()))
    }

    /// The next bytes, from another answer if this one broke off.
    async fn more(&mut self) -> Result<Bytes, BlobError> {
        let shop = self.shop.clone();
        loop {
            let parts = match &mut self.parts {
                Some(parts) => parts,
                none => {
                    let (size, parts) =
                        shop.open(&self.key, self.at..self.end).await.map_err(|failed| failed.of(&self.key))?;
                    if size < self.end {
                        return Err(BlobError::Damaged(self.key.clone()));
                    }
                    none.insert(parts)
                }
            };
            let failed = match within(&*shop.env, shop.patience.idle_ms, parts.next()).await {
                Some(Some(Ok(mut bytes))) => {
                    bytes.truncate(usize::try_from(self.end - self.at).unwrap_or(usize::MAX));
                    self.at += bytes.len() as u64;
                    if self.at >= self.fresh_at || self.tries.are_fresh() {
                        self.fresh_at = self.at + BLOCK;
                        self.tries = Tries::new(shop.patience, &*shop.env);
                    }
                    if bytes.is_empty() {
                        continue;
                    }
                    return Ok(bytes);
                }
                // Whatever it was, the bytes so far are good and the rest can be asked for.
                Some(Some(Err(error))) => Failed { kind: Kind::Away, ..Failed::from(&error) },
                Some(None) => Failed::away("the body ended early"),
                None => Failed::away(format!("nothing came for {} s", shop.patience.idle_ms / 1000)),
            };
            self.parts = None;
            self.tries.pause(&*shop.env, "send all of an object", failed).await.map_err(|f| f.of(&self.key))?;
        }
    }
}
