//! S: how an object's bytes get into its file: a temporary one, or one of an upload that goes on.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use alloy_shared::id::Digest;
use bytes::Bytes;
use tokio::task::{JoinHandle, spawn_blocking};

use super::super::{BlobError, BlobKey, Stored, check, off_thread};
use super::{Partial, Place, lock};
use crate::sums::{BLOCK, Sums};

/// A temporary file; removed unless it was renamed.
#[derive(Debug)]
pub(super) struct Temp {
    pub(super) file: Arc<File>,
    pub(super) path: PathBuf,
}

impl Drop for Temp {
    fn drop(&mut self) {
        // After the rename there is nothing of that name.
        let _ = fs::remove_file(&self.path);
    }
}

#[derive(Debug)]
pub struct Draft {
    pub(super) place: Arc<Place>,
    pub(super) key: BlobKey,
    pub(super) temp: Temp,
    pub(super) pen: Pen,
    pub(super) len: u64,
}

impl Draft {
    pub(in super::super) fn len(&self) -> u64 {
        self.len
    }

    fn target(&self, at: u64) -> Target {
        Target::Temp { place: self.place.clone(), file: self.temp.file.clone(), at }
    }

    pub(in super::super) async fn append(&mut self, bytes: Bytes) -> Result<(), BlobError> {
        let target = self.target(self.len - self.pen.waiting_len);
        self.len += bytes.len() as u64;
        self.pen.write(&target, bytes).await
    }

    pub(in super::super) async fn finish(mut self, expect: Option<Digest>) -> Result<Stored, BlobError> {
        let target = self.target(self.len - self.pen.waiting_len);
        let seal = self.pen.flush(&target).await?.unwrap_or_default().seal();
        check(expect, seal.sha256)?;
        off_thread(move || self.place.publish(&self.temp.file, &self.temp.path, &self.key, &seal)).await
    }
}

/// Where a pen writes.
#[derive(Debug, Clone)]
pub(super) enum Target {
    Temp { place: Arc<Place>, file: Arc<File>, at: u64 },
    Partial { place: Arc<Place>, partial: Arc<Mutex<Partial>>, owner: u64 },
}

impl Target {
    fn write(&self, parts: &[Bytes]) -> Result<(), BlobError> {
        match self {
            Self::Temp { place, file, at } => {
                place.check_room(place.care.floor)?;
                write_parts(file, parts, *at).map_err(|error| place.fails("write an object", error))
            }
            Self::Partial { place, partial, owner } => {
                place.check_room(place.care.reserve)?;
                let mut partial = lock(partial);
                let Some(file) = partial.file.clone().filter(|_| partial.owner == *owner) else {
                    return Err(BlobError::Offset { have: partial.len });
                };
                write_parts(&file, parts, partial.len).map_err(|error| place.fails("write an object", error))?;
                partial.len += parts.iter().map(|part| part.len() as u64).sum::<u64>();
                Ok(())
            }
        }
    }
}

fn write_parts(file: &File, parts: &[Bytes], mut at: u64) -> io::Result<()> {
    for part in parts {
        file.write_all_at(part, at)?;
        at += part.len() as u64;
    }
    Ok(())
}

/// Gathers a block, then writes it and hashes it on two threads while the next one arrives.
#[derive(Debug)]
pub(super) struct Pen {
    waiting: Vec<Bytes>,
    waiting_len: u64,
    writing: Option<JoinHandle<Result<(), BlobError>>>,
    hashing: Option<JoinHandle<Sums>>,
    sums: Option<Sums>,
}

impl Pen {
    pub(super) fn new(sums: Option<Sums>) -> Self {
        Self { waiting: Vec::new(), waiting_len: 0, writing: None, hashing: None, sums }
    }

    pub(super) async fn write(&mut self, target: &Target, bytes: Bytes) -> Result<(), BlobError> {
        self.waiting_len += bytes.len() as u64;
        self.waiting.push(bytes);
        if self.waiting_len >= BLOCK { self.send(target).await } else { Ok(()) }
    }

    async fn send(&mut self, target: &Target) -> Result<(), BlobError> {
        self.settle().await?;
        if self.waiting.is_empty() {
            return Ok(());
        }
        let parts: Arc<[Bytes]> = std::mem::take(&mut self.waiting).into();
        self.waiting_len = 0;
        if let Some(mut sums) = self.sums.take() {
            let parts = parts.clone();
            self.hashing = Some(spawn_blocking(move || {
                parts.iter().for_each(|part| sums.update(part));
                sums
            }));
        }
        let target = target.clone();
        self.writing = Some(spawn_blocking(move || target.write(&parts)));
        Ok(())
    }

    async fn settle(&mut self) -> Result<(), BlobError> {
        let gone = |error| BlobError::Io { what: "wait for a write", error: io::Error::other(error) };
        if let Some(hashing) = self.hashing.take() {
            self.sums = Some(hashing.await.map_err(gone)?);
        }
        match self.writing.take() {
            Some(writing) => writing.await.map_err(gone)?,
            None => Ok(()),
        }
    }

    pub(super) async fn flush(&mut self, target: &Target) -> Result<Option<Sums>, BlobError> {
        self.send(target).await?;
        self.settle().await?;
        Ok(self.sums.take())
    }
}
