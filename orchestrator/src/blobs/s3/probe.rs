//! S: what is learned of an object store before a farm relies on it, and how to say that it will not do.

use object_store::list::{PaginatedListOptions, PaginatedListStore as _};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore as _, ObjectStoreExt as _, PutMode, PutOptions, PutPayload};

use super::Shop;
use super::ask::{Failed, Kind, Patience, ask};
use crate::config::S3 as Place;

const TEXT: &[u8] = b"alloy looks whether this bucket keeps what it takes";
/// A start is not the time for patience.
const TRIES: u32 = 5;
const BUDGET_MS: u64 = 10_000;
const REQUEST_MS: u64 = 15_000;

/// Why a farm cannot keep its objects there. The text is for people.
#[derive(Debug, thiserror::Error)]
#[error("{place} does not {what}: {why}; {hint}")]
pub struct BadPlace {
    pub place: String,
    pub what: &'static str,
    pub why: String,
    pub hint: &'static str,
}

impl BadPlace {
    pub(super) fn new(place: &Place, what: &'static str, failed: Failed) -> Self {
        let hint = match failed.kind {
            Kind::NoBucket => "make the bucket, or name another one with ALLOY_S3_URL",
            Kind::Denied => {
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not a pair that is known there, or may not list, read, write and \
                 delete in this bucket"
            }
            Kind::Away | Kind::Throttled => "is ALLOY_S3_ENDPOINT right, and does this machine reach it?",
            Kind::Missing => "it forgot an object, or ALLOY_S3_URL or ALLOY_S3_ENDPOINT is not quite right",
            Kind::Exists | Kind::Range | Kind::Refused => {
                "ALLOY_S3_ENDPOINT or ALLOY_S3_REGION is not the bucket's, or this is no S3"
            }
        };
        Self { place: place.place(), what, why: failed.why, hint }
    }
}

impl Shop {
    /// Lists, writes, reads and deletes. The answer is whether the store refuses to overwrite when asked to; nothing relies on it.
    pub(super) async fn probe(&self, place: &Place) -> Result<bool, BadPlace> {
        let patience = Patience {
            tries: self.patience.tries.min(TRIES),
            budget_ms: self.patience.budget_ms.min(BUDGET_MS),
            request_ms: self.patience.request_ms.min(REQUEST_MS),
            ..self.patience
        };
        let bad = |what| move |failed| BadPlace::new(place, what, failed);
        let (env, store) = (&self.env, &self.store);
        let name = format!("probe/{:016x}{:016x}", self.env.dice(), self.env.dice());
        let path = Path::from(self.full(&name));
        let one = PaginatedListOptions { max_keys: Some(1), ..PaginatedListOptions::default() };
        let prefix = self.full("probe/");
        let list = || store.list_paginated(Some(&prefix), one.clone());
        ask(env, patience, "list a bucket", list).await.map_err(bad("list its objects"))?;

        let put = |mode: PutMode| store.put_opts(&path, PutPayload::from_static(TEXT), PutOptions::from(mode));
        ask(env, patience, "take a probe", || put(PutMode::Overwrite)).await.map_err(bad("take an object"))?;
        let conditional = match ask(env, patience, "refuse a probe", || put(PutMode::Create)).await {
            Err(Failed { kind: Kind::Exists, .. }) => true,
            Ok(_) | Err(_) => false,
        };
        let range = GetOptions { range: Some(GetRange::Bounded(6..11)), ..GetOptions::default() };
        let get = || async { store.get_opts(&path, range.clone()).await?.bytes().await };
        let part = ask(env, patience, "send a probe", get).await.map_err(bad("send a part of an object"))?;
        if part.as_ref() != &TEXT[6..11] {
            let why = "other bytes came than were stored".to_owned();
            return Err(bad("send a part of an object")(Failed { kind: Kind::Refused, why }));
        }
        ask(env, patience, "delete a probe", || store.delete(&path)).await.map_err(bad("delete an object"))?;
        Ok(conditional)
    }
}
