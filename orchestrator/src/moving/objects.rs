//! S: objects of a farm that moves: from sealed files to a bucket, each read again where it went.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;

use alloy_shared::id::Digest;
use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use sha2::Digest as _;

use super::journal::Brought;
use super::{MoveError, Mover, at};
use crate::backup::elsewhere::sizes;
use crate::backup::{OBJECTS, sound};
use crate::blobs::mark::bucket_of;
use crate::blobs::{BlobError, BlobKey, Blobs, Body, off_thread};
use crate::store::sql::backup::Needs;
use crate::sums::{BLOCK, Seal};

/// Objects on their way at once.
const AT_ONCE: usize = 8;

enum Came {
    Whole(Seal),
    Lost(String),
}

impl Mover {
    /// Brings every object that the database names and that the target lacks.
    pub(super) async fn bring_objects(&mut self, needs: &Needs) -> Result<(), MoveError> {
        if bucket_of(&self.farm)?.is_some() {
            return Ok(());
        }
        // Listed once: the last pass has no time for that, and nobody removes anything there.
        let mut there = match (self.there.take(), &self.blobs) {
            (Some(there), _) => there,
            (None, Some(blobs)) => sizes(blobs).await?,
            (None, None) => HashMap::new(),
        };
        let mut wanted = Vec::new();
        for object in &needs.objects {
            let Some(key) = BlobKey::parse(object) else {
                self.damaged.push(format!("{object} is no object's name"));
                continue;
            };
            let known = self.journal.get(object).map(|brought| brought.len);
            match known.filter(|len| self.blobs.is_none() || there.get(&key) == Some(len)) {
                Some(len) => self.count_object(len),
                None => wanted.push((key.clone(), there.get(&key).copied())),
            }
        }
        let (blobs, root) = (self.blobs.clone(), self.farm.join(OBJECTS));
        let coming = stream::iter(wanted).map(move |(key, size)| one(blobs.clone(), root.clone(), key, size));
        let mut coming = pin!(coming.buffer_unordered(AT_ONCE));
        while let Some((key, came)) = coming.try_next().await? {
            match came {
                Came::Lost(why) => self.damaged.push(format!("object {key} {why}")),
                Came::Whole(seal) => {
                    self.count_object(seal.len);
                    there.insert(key.clone(), seal.len);
                    let brought = Brought { name: key.to_string(), len: seal.len, sha256: seal.sha256, last: true };
                    self.brought(brought)?;
                }
            }
        }
        self.there = Some(there);
        Ok(())
    }

    fn count_object(&mut self, len: u64) {
        self.counts.objects += 1;
        self.counts.bytes += len;
        (self.heard)(&self.counts);
    }
}

async fn one(
    blobs: Option<Arc<Blobs>>,
    root: PathBuf,
    key: BlobKey,
    size: Option<u64>,
) -> Result<(BlobKey, Came), MoveError> {
    let path = root.join(key.as_str());
    let looked = path.clone();
    let seal = match off_thread(move || sound(&looked)).await {
        Ok(Some(seal)) => seal,
        Ok(None) => return Ok((key, Came::Lost("is damaged".to_owned()))),
        Err(error) => return Ok((key, Came::Lost(format!("cannot be read: {error}")))),
    };
    let Some(blobs) = blobs else { return Ok((key, Came::Whole(seal))) };
    let there = size == Some(seal.len) && digest(&blobs, &key, seal.len).await.is_ok_and(|have| have == seal.sha256);
    if !there {
        blobs.put(&key, contents(&path, seal.len).map_err(at(&path))?, Some(seal.sha256)).await?;
        let have = digest(&blobs, &key, seal.len).await?;
        if have != seal.sha256 {
            let why = format!("it hashes to {have}, not to {}", seal.sha256);
            return Err(MoveError::Wrong { what: format!("object {key}"), why });
        }
    }
    Ok((key, Came::Whole(seal)))
}

/// What an object's bytes hash to where they are.
pub(super) async fn digest(blobs: &Blobs, key: &BlobKey, len: u64) -> Result<Digest, BlobError> {
    let mut body = blobs.read(key, 0..len).await?;
    let mut sha = sha2::Sha256::new();
    while let Some(part) = body.next().await {
        sha.update(part.map_err(BlobError::Body)?);
    }
    Ok(Digest::from_hasher(sha))
}

/// The first bytes of a file, piece by piece.
fn contents(path: &Path, len: u64) -> io::Result<Body> {
    let file = Arc::new(File::open(path)?);
    let pieces = (0..len.div_ceil(BLOCK)).map(move |index| index * BLOCK..((index + 1) * BLOCK).min(len));
    let read = move |piece: std::ops::Range<u64>| {
        let file = file.clone();
        async move {
            off_thread(move || {
                let mut bytes = vec![0; (piece.end - piece.start) as usize];
                file.read_exact_at(&mut bytes, piece.start)?;
                Ok(Bytes::from(bytes))
            })
            .await
        }
    };
    Ok(stream::iter(pieces).then(read).boxed())
}
