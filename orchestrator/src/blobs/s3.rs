//! S: objects in a bucket, as plain bytes under `PREFIX/KEY`.
//!
//! Packs go there as they come. An upload that can be interrupted grows in a spool on this machine, is hashed there, and only
//! then goes there as a whole: what the bucket shows is verified. Another orchestrator knows nothing of the spool and begins anew.
//! No object has a seal; what is read as a whole is hashed on its way, and frames of packs are by whoever unpacks them.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use alloy_shared::env::{Env, Ms};
use alloy_shared::id::Digest;
use alloy_shared::limits;
use alloy_shared::wire::farm::Storage;
use bytes::Bytes;
use futures_util::future::{BoxFuture, Shared};
use futures_util::{FutureExt as _, StreamExt as _};
use object_store::aws::{AmazonS3, AmazonS3Builder, S3ConditionalPut};
use object_store::list::{PaginatedListOptions, PaginatedListStore as _};
use object_store::path::Path;
use object_store::signer::{Method, SignedUrlOptions, Signer as _};
use object_store::{ClientOptions, ObjectStoreExt as _, RetryConfig};
use tokio::sync::Semaphore;

use super::{BlobError, BlobKey, Body, Fs, Listed, Stored, check};
use crate::config::S3 as Place;

mod ask;
mod probe;
mod read;
mod upload;

pub use ask::Patience;
pub use probe::BadPlace;
pub(super) use upload::Draft;

use ask::{Failed, ask};

/// A verified upload may fail to reach the bucket as a whole so often before its sender is told.
const ROUNDS: u32 = 2;
const CONNECT: Duration = Duration::from_secs(5);

/// A bucket, and how to ask for things there.
pub(super) struct Shop {
    store: AmazonS3,
    prefix: String,
    env: Arc<dyn Env>,
    patience: Patience,
}

impl fmt::Debug for Shop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shop").field("store", &self.store.to_string()).field("prefix", &self.prefix).finish()
    }
}

impl Shop {
    fn new(place: &Place, patience: Patience, env: Arc<dyn Env>) -> object_store::Result<Self> {
        // An error says that a provider is installed, which is all that is wanted.
        let _ = rustls::crypto::ring::default_provider().install_default();
        // Requests have a deadline of ours, bodies may take as long as they move.
        let client = ClientOptions::new().with_timeout_disabled().with_connect_timeout(CONNECT);
        let insecure = place.endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("http://"));
        let mut builder = AmazonS3Builder::new()
            .with_client_options(client.with_allow_http(insecure))
            .with_retry(RetryConfig { max_retries: 0, ..RetryConfig::default() })
            .with_virtual_hosted_style_request(false)
            .with_conditional_put(S3ConditionalPut::ETagMatch)
            .with_disable_bulk_delete(true)
            .with_region(&place.region)
            .with_bucket_name(&place.bucket)
            .with_access_key_id(&place.key_id)
            .with_secret_access_key(place.secret.expose());
        if let Some(endpoint) = &place.endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        Ok(Self { store: builder.build()?, prefix: place.prefix.clone(), env, patience })
    }

    fn full(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}/{name}", self.prefix) }
    }

    fn path(&self, key: &BlobKey) -> Path {
        Path::from(self.full(key.as_str()))
    }

    async fn ask<T, F>(&self, what: &str, request: impl Fn() -> F) -> Result<T, Failed>
    where
        F: Future<Output = object_store::Result<T>>,
    {
        ask(&self.env, self.patience, what, request).await
    }

    async fn size(&self, key: &BlobKey) -> Result<u64, BlobError> {
        let path = self.path(key);
        let meta = self.ask("describe an object", || self.store.head(&path)).await;
        meta.map(|meta| meta.size).map_err(|failed| failed.of(key))
    }

    async fn delete(&self, key: &BlobKey) -> Result<(), BlobError> {
        let path = self.path(key);
        match self.ask("delete an object", || self.store.delete(&path)).await {
            Ok(()) => Ok(()),
            Err(failed) => match failed.of(key) {
                BlobError::Missing(_) => Ok(()),
                error => Err(error),
            },
        }
    }

    /// One page of keys in their order. What is not a key of ours is not told.
    async fn list(&self, prefix: &str, after: Option<&BlobKey>) -> Result<Vec<Listed>, BlobError> {
        let full = self.full(prefix);
        let mut offset = after.map(|key| self.full(key.as_str()));
        loop {
            let options = PaginatedListOptions {
                offset: offset.clone(),
                max_keys: Some(limits::BLOBS_PER_PAGE),
                ..PaginatedListOptions::default()
            };
            let page = self.ask("list objects", || self.store.list_paginated(Some(&full), options.clone())).await;
            let page = page.map_err(|failed| BlobError::Away(failed.why))?;
            let objects = page.result.objects;
            let last = objects.iter().map(|object| object.location.to_string()).max();
            let mut listed: Vec<Listed> = objects.iter().filter_map(|object| self.listed(object)).collect();
            listed.sort_by(|a, b| a.key.cmp(&b.key));
            // A page of strangers is not the end.
            if !listed.is_empty() || page.page_token.is_none() || last.is_none() {
                return Ok(listed);
            }
            offset = last;
        }
    }

    fn listed(&self, object: &object_store::ObjectMeta) -> Option<Listed> {
        let own = match self.prefix.as_str() {
            "" => object.location.as_ref(),
            prefix => object.location.as_ref().strip_prefix(prefix)?.strip_prefix('/')?,
        };
        let key = BlobKey::parse(own).filter(|_| !own.starts_with("probe/"))?;
        Some(Listed { key, size: object.size, modified: Ms(object.last_modified.timestamp_millis()) })
    }
}

type Finishing = Shared<BoxFuture<'static, Result<Stored, Arc<BlobError>>>>;

#[derive(Debug, Clone)]
pub struct S3(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    shop: Arc<Shop>,
    spool: Fs,
    presigns: bool,
    conditional: bool,
    /// The farm that has claimed the bucket here.
    owner: OnceLock<Digest>,
    uploads: Semaphore,
    /// Uploads that are on their way into the bucket. They go on when whoever waits for them is gone.
    finishing: Mutex<HashMap<BlobKey, Finishing>>,
    /// What this process has brought there, until somebody registers it.
    done: Mutex<VecDeque<(BlobKey, Stored)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl S3 {
    /// Looks whether the bucket does what is needed of it.
    pub async fn open(place: &Place, patience: Patience, spool: Fs, env: Arc<dyn Env>) -> Result<Self, BadPlace> {
        let shop = Shop::new(place, patience, env);
        let shop = shop.map_err(|error| BadPlace::new(place, "look like a bucket", Failed::from(&error)))?;
        let conditional = shop.probe(place).await?;
        Ok(Self(Arc::new(Inner {
            shop: Arc::new(shop),
            spool,
            presigns: place.presign,
            conditional,
            owner: OnceLock::new(),
            uploads: Semaphore::new(limits::S3_UPLOADS),
            finishing: Mutex::default(),
            done: Mutex::default(),
        })))
    }

    /// Whether the bucket refuses to overwrite when asked to. Nothing relies on it.
    pub fn refuses_overwrites(&self) -> bool {
        self.0.conditional
    }

    pub(super) fn owner(&self) -> &OnceLock<Digest> {
        &self.0.owner
    }

    pub(super) fn storage(&self) -> Result<Storage, BlobError> {
        self.0.spool.storage()
    }

    pub(super) fn create(&self, key: &BlobKey) -> Draft {
        Draft::new(self.0.shop.clone(), key, None)
    }

    pub(super) async fn read(&self, key: &BlobKey, range: Range<u64>) -> Result<Body, BlobError> {
        self.0.shop.read(key, range).await
    }

    pub(super) async fn read_piece(&self, key: &BlobKey, at: u64, len: u32) -> Result<Bytes, BlobError> {
        self.0.shop.read_piece(key, at, len).await
    }

    pub(super) async fn delete(&self, key: &BlobKey) -> Result<(), BlobError> {
        lock(&self.0.done).retain(|(done, _)| done != key);
        self.0.spool.delete(key).await?;
        self.0.shop.delete(key).await
    }

    pub(super) async fn list(&self, prefix: &str, after: Option<&BlobKey>) -> Result<Vec<Listed>, BlobError> {
        self.0.shop.list(prefix, after).await
    }

    pub(super) async fn presign(&self, key: &BlobKey, ttl_s: u64, answer: &str) -> Result<Option<String>, BlobError> {
        if !self.0.presigns {
            return Ok(None);
        }
        let query = [("response-content-disposition", answer), ("response-content-type", "application/octet-stream")];
        let options = SignedUrlOptions::new().with_query(query);
        let path = self.0.shop.path(key);
        let url = self.0.shop.store.signed_url_opts(Method::GET, &path, Duration::from_secs(ttl_s), &options).await;
        url.map(|url| Some(url.to_string())).map_err(|error| Failed::from(&error).of(key))
    }

    pub(super) async fn partial(&self, key: &BlobKey) -> Result<u64, BlobError> {
        match self.0.done(key) {
            Some(stored) => Ok(stored.size),
            None => self.0.spool.partial(key).await,
        }
    }

    pub(super) async fn append(&self, key: &BlobKey, offset: u64, body: Body) -> Result<u64, BlobError> {
        match self.0.done(key) {
            Some(stored) if stored.size == offset => Ok(offset),
            Some(stored) => Err(BlobError::Offset { have: stored.size }),
            None => self.0.spool.append(key, offset, body).await,
        }
    }

    /// Verifies an upload and brings it to the bucket. Whoever asks meanwhile waits for the same.
    pub(super) async fn finish(&self, key: &BlobKey, expect: Digest) -> Result<Stored, BlobError> {
        let begun = {
            let mut finishing = lock(&self.0.finishing);
            match (finishing.get(key), self.0.done(key)) {
                (Some(running), _) => Ok(running.clone()),
                (None, Some(stored)) => Err(stored),
                (None, None) => {
                    let work = self.0.clone().bring(key.clone(), expect).boxed().shared();
                    finishing.insert(key.clone(), work.clone());
                    self.0.shop.env.spawn("bring an upload", Box::pin(work.clone().map(drop)));
                    Ok(work)
                }
            }
        };
        match begun {
            Ok(running) => running.await.map_err(|error| error.again()),
            Err(stored) => {
                check(Some(expect), stored.sha256)?;
                match self.0.shop.size(key).await {
                    Ok(size) if size == stored.size => Ok(stored),
                    Ok(_) | Err(BlobError::Missing(_)) => {
                        lock(&self.0.done).retain(|(done, _)| done != key);
                        Err(BlobError::Offset { have: 0 })
                    }
                    Err(error) => Err(error),
                }
            }
        }
    }
}

impl Inner {
    fn done(&self, key: &BlobKey) -> Option<Stored> {
        lock(&self.done).iter().find(|(done, _)| done == key).map(|(_, stored)| *stored)
    }

    async fn bring(self: Arc<Self>, key: BlobKey, expect: Digest) -> Result<Stored, Arc<BlobError>> {
        let brought = self.bring_verified(&key, expect).await;
        if let Ok(stored) = &brought {
            let mut done = lock(&self.done);
            done.push_back((key.clone(), *stored));
            if done.len() > limits::S3_DONE_MAX {
                done.pop_front();
            }
        }
        // After it is known to be done: whoever comes in between finds one or the other.
        lock(&self.finishing).remove(&key);
        brought.map_err(Arc::new)
    }

    async fn bring_verified(&self, key: &BlobKey, expect: Digest) -> Result<Stored, BlobError> {
        let verified = self.spool.finish(key, expect).await?;
        // Never closed, so there is always a permit in the end.
        let _permit = self.uploads.acquire().await;
        let mut round = 1;
        loop {
            match self.send(key, verified).await {
                Ok(()) => break,
                Err(BlobError::Away(why)) if round < ROUNDS => tracing::info!(%key, "an upload begins anew: {why}"),
                Err(error) => return Err(error),
            }
            round += 1;
        }
        if let Err(error) = self.spool.delete(key).await {
            tracing::warn!(%error, %key, "an upload that is done stays in the spool");
        }
        Ok(verified)
    }

    async fn send(&self, key: &BlobKey, verified: Stored) -> Result<(), BlobError> {
        let mut body = match self.spool.read(key, 0..verified.size).await {
            Ok(body) => body,
            // It was brought, and forgotten since: whoever sends it begins anew.
            Err(BlobError::Missing(_)) => return Err(BlobError::Offset { have: 0 }),
            Err(error) => return Err(error),
        };
        let mut draft = Draft::new(self.shop.clone(), key, Some(verified.size));
        while let Some(part) = body.next().await {
            let part = part.map_err(|error| BlobError::Io { what: "read the spool", error })?;
            draft.append(part).await?;
        }
        draft.finish(Some(verified.sha256)).await.map(drop)
    }
}
