//! P: bytes from outside: sources as manifests and packs, as one tar, and artifacts. Verified, stored, then registered:
//! what is refused half-way leaves nothing that has a name.

use std::collections::{BTreeSet, HashSet};
use std::io::{ErrorKind, Read};
use std::sync::Arc;

use alloy_shared::env::{Env, Ms};
use alloy_shared::id::{Digest, OrgId};
use alloy_shared::limits;
use alloy_shared::wire::ErrorCode;
use alloy_shared::wire::source::{BadSource, Manifest, PACK_END, PackFrame, PackReader, PackStored, SourceStatus};
use bytes::{Buf as _, Bytes, BytesMut};
use futures_util::{FutureExt as _, StreamExt as _, future, stream};
use tokio::sync::{Semaphore, mpsc};

use super::OpError;
use super::archive::{self, Format, Unread};
use crate::blobs::{BlobError, BlobKey, Blobs, Body, Draft, read_archive};
use crate::error::{AWAY_HINT, FULL_HINT};
use crate::logs::LogError;
use crate::pack;
use crate::store::tidy::Tidy;
use crate::store::{Blob, BlobKind, Committed, Group, Miss, Place, Scope, Store, Write};

#[cfg(test)]
mod tests;

/// Compression of what arrives as a plain tar.
const TAR_LEVEL: i32 = 3;
/// Parts of an archive on their way to its reader, and bunches of blobs on their way back.
const ARCHIVE_PARTS: usize = 4;
const ARCHIVE_BUNCHES: usize = 2;
/// Blobs that are in use are noted so often, when some of them go meanwhile.
const RELY_TRIES: usize = 3;
/// Frames read ahead of a worker.
const FRAMES_AHEAD: usize = 2;
/// Room in memory for manifests that are read again, in KiB. Whoever finds none waits.
static READ_AGAIN: Semaphore = Semaphore::const_new(limits::MANIFESTS_BYTES >> 10);

/// One caller's view of the farm's bytes.
#[derive(Clone, Copy)]
pub struct Depot<'a> {
    pub store: &'a dyn Store,
    pub blobs: &'a Arc<Blobs>,
    pub env: &'a Arc<dyn Env>,
    /// Who relies on a blob says so, unless it was said less than this ago.
    pub fresh_ms: u64,
    pub org: OrgId,
}

/// Where an artifact's upload stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    pub have: u64,
    /// It is verified and registered.
    pub complete: bool,
}

impl From<BadSource> for OpError {
    fn from(bad: BadSource) -> Self {
        let code = match &bad {
            BadSource::Digest { .. } => ErrorCode::DigestMismatch,
            BadSource::Path { .. } | BadSource::Manifest(_) | BadSource::Pack(_) => ErrorCode::InvalidSource,
        };
        Self::refused(code, bad.to_string())
    }
}

impl From<BlobError> for OpError {
    fn from(error: BlobError) -> Self {
        let message = error.to_string();
        match error {
            BlobError::Full => Self::refused(ErrorCode::StorageFull, message).hint(FULL_HINT),
            BlobError::Digest { .. } => Self::refused(ErrorCode::DigestMismatch, message),
            BlobError::Offset { .. } => Self::refused(ErrorCode::OffsetMismatch, message),
            BlobError::Body(error) if error.kind() == ErrorKind::FileTooLarge => {
                Self::refused(ErrorCode::TooLarge, error.to_string())
            }
            BlobError::Body(_) => Self::refused(ErrorCode::IncompleteBody, message),
            BlobError::Missing(_) | BlobError::Damaged(_) => {
                Self::Io { what: "read stored bytes", error: std::io::Error::new(ErrorKind::InvalidData, message) }
            }
            BlobError::Io { what, error } => Self::Io { what, error },
            BlobError::Away(_) => Self::refused(ErrorCode::Unavailable, message).hint(AWAY_HINT),
        }
    }
}

impl From<LogError> for OpError {
    fn from(error: LogError) -> Self {
        let message = error.to_string();
        match error {
            LogError::Full => Self::refused(ErrorCode::StorageFull, message).hint(FULL_HINT),
            LogError::Away(_) => Self::refused(ErrorCode::Unavailable, message),
            LogError::Io { what, error } => Self::Io { what, error },
            LogError::Gap { .. } | LogError::Sealed | LogError::TooLong | LogError::Damaged { .. } => {
                Self::Io { what: "use a log", error: std::io::Error::new(ErrorKind::InvalidData, message) }
            }
        }
    }
}

impl Depot<'_> {
    fn scope(&self) -> Scope {
        Scope::org(self.org)
    }

    /// Takes a manifest; answers which of its blobs are missing. With none missing the source is known from here on.
    pub async fn put_source(&self, digest: Digest, manifest: Bytes) -> Result<SourceStatus, OpError> {
        let text = manifest.clone();
        let decoded = self.blobs.compute(move || match Digest::of(&text) {
            actual if actual == digest => Manifest::decode(&text).map(|manifest| manifest.blobs()),
            actual => Err(BadSource::Digest { expected: digest, actual }),
        });
        let needed = decoded.await?;
        let done = SourceStatus { digest, complete: true, missing: Vec::new() };
        let now = self.env.now().wall;
        let known = self.blob(BlobKind::Manifest, &digest).await?;
        if known.as_ref().is_some_and(|row| self.is_fresh(row, now)) {
            return Ok(done);
        }
        let missing = self.missing(&needed).await?;
        if !missing.is_empty() {
            return Ok(SourceStatus { complete: false, missing, ..done });
        }
        if known.is_some() && self.rely(BlobKind::Manifest, vec![digest], now).await? {
            return Ok(done);
        }
        let row = self.put_manifest(digest, manifest).await?;
        self.register(vec![row]).await?;
        Ok(done)
    }

    pub async fn has_source(&self, digest: &Digest) -> Result<bool, OpError> {
        Ok(!self.store.blobs(&self.scope(), BlobKind::Manifest, &[*digest]).await?.is_empty())
    }

    /// Notes that a source is in use, with all of its blobs. False: it is not here, or not all of it.
    pub async fn freshen(&self, digest: &Digest, now: Ms) -> Result<bool, OpError> {
        let Some(row) = self.blob(BlobKind::Manifest, digest).await? else { return Ok(false) };
        if self.is_fresh(&row, now) {
            return Ok(true);
        }
        let size = row.size.div_ceil(1 << 10).clamp(1, limits::MANIFESTS_BYTES as u64 >> 10);
        let _room = READ_AGAIN.acquire_many(size as u32).await;
        let (_, mut body) = self.manifest(digest).await?;
        let mut text = BytesMut::new();
        while let Some(part) = body.next().await {
            text.extend_from_slice(&part.map_err(|error| OpError::Io { what: "read a manifest", error })?);
        }
        let needed = self.blobs.compute(move || Manifest::decode(&text).map(|manifest| manifest.blobs())).await?;
        Ok(self.missing_at(&needed, now).await?.is_empty() && self.rely(BlobKind::Manifest, vec![*digest], now).await?)
    }

    /// A known source's manifest, and its length.
    pub async fn manifest(&self, digest: &Digest) -> Result<(u64, Body), OpError> {
        self.alone(BlobKind::Manifest, digest, None).await
    }

    /// Takes a pack. Its frames are checked one by one as they arrive and stored as they came.
    pub async fn pack(&self, body: Body) -> Result<PackStored, OpError> {
        let mut body = bounded(body, limits::PACK_MAX);
        let stored = self.frames(&mut body).await;
        if stored.is_err() {
            drain(&mut body).await;
        }
        stored
    }

    async fn frames(&self, body: &mut Body) -> Result<PackStored, OpError> {
        let mut reader = PackReader::default();
        let mut shelf = Shelf::new(*self);
        let mut stored = PackStored { blobs: 0, bytes: 0 };
        while let Some(part) = body.next().await {
            reader.push(&part.map_err(BlobError::Body)?);
            while let Some(frame) = reader.next_frame()? {
                stored.blobs += frame.header.blobs.len() as u64;
                if stored.blobs > limits::MANIFEST_ENTRIES_MAX as u64 {
                    let message = format!("a pack has at most {} blobs", limits::MANIFEST_ENTRIES_MAX);
                    return Err(OpError::refused(ErrorCode::TooLarge, message));
                }
                let (frame, bytes) = self.blobs.compute(move || (pack::verify(&frame), frame)).map(swap).await;
                stored.bytes += bytes?;
                shelf.add(frame).await?;
            }
        }
        reader.finish()?;
        let rows = shelf.finish().await?;
        self.register(rows).await?;
        Ok(stored)
    }

    /// Takes a whole tree as one tar and answers with the digest of its manifest.
    pub async fn tar(&self, body: Body, format: Option<Format>) -> Result<Digest, OpError> {
        let (parts_tx, parts) = mpsc::channel(ARCHIVE_PARTS);
        let (bunches_tx, mut bunches) = mpsc::channel::<Vec<(Digest, Bytes)>>(ARCHIVE_BUNCHES);
        let feed = self.feed(bounded(body, limits::SOURCE_BYTES_MAX), parts_tx);
        let depot = *self;
        let store = async move {
            let mut shelf = Shelf::new(depot);
            while let Some(bunch) = bunches.recv().await {
                shelf.add_blobs(bunch).await?;
            }
            Ok::<_, OpError>(shelf)
        };
        let read = read_archive(move || {
            archive::read(Parts::new(parts), format, &mut |bunch| bunches_tx.blocking_send(bunch).is_ok())
        });
        let (fed, shelf, manifest) = future::join3(feed, store, read).await;
        let shelf = shelf?;
        fed?;
        let manifest = match manifest {
            Some(Ok(manifest)) => manifest,
            Some(Err(Unread::Bad(bad))) => return Err(bad.into()),
            Some(Err(Unread::Stopped)) => return Err(cut_off("the archive's reader stopped")),
            None => {
                let message = format!("the farm reads {} archives already", limits::ARCHIVE_READERS);
                return Err(OpError::refused(ErrorCode::TooManyRequests, message));
            }
        };
        let encode = move || {
            let text = Bytes::from(manifest.encode());
            (Digest::of(&text), text, manifest.blobs())
        };
        let (digest, text, needed) = self.blobs.compute(encode).await;
        let (rows, text) = (shelf.finish().await?, text);
        self.register(rows).await?;
        // Last: a source is known only when all of its blobs are, those too that were here before.
        if !self.missing(&needed).await?.is_empty() {
            return Err(gone_meanwhile());
        }
        let row = self.put_manifest(digest, text).await?;
        self.register(vec![row]).await?;
        // One that was known stays as it was, but for when it was used last.
        if !self.rely(BlobKind::Manifest, vec![digest], self.env.now().wall).await? {
            return Err(gone_meanwhile());
        }
        Ok(digest)
    }

    /// Hands an upload to its reader. A reader that is gone has refused it.
    async fn feed(&self, mut body: Body, parts: mpsc::Sender<Bytes>) -> Result<(), OpError> {
        while let Some(part) = body.next().await {
            if parts.send(part.map_err(BlobError::Body)?).await.is_err() {
                drain(&mut body).await;
                break;
            }
        }
        Ok(())
    }

    /// Packs with these blobs, frame by frame and with the pack's end.
    pub async fn source_blobs(&self, digests: &[Digest]) -> Result<Body, OpError> {
        let mut known = Vec::with_capacity(digests.len());
        for some in digests.chunks(limits::DIGESTS_PER_READ) {
            known.extend(self.store.blobs(&self.scope(), BlobKind::Chunk, some).await?);
        }
        let have: HashSet<Digest> = known.iter().map(|blob| blob.digest).collect();
        let missing: Vec<Digest> = digests.iter().filter(|digest| !have.contains(*digest)).copied().collect();
        if !missing.is_empty() {
            return Err(OpError::Missing(missing));
        }
        let blobs = self.blobs.clone();
        let frames = stream::iter(pack::plan(&known)).map(move |read| send_frame(blobs.clone(), read));
        let end = stream::iter([Ok(Bytes::from_static(&PACK_END))]);
        Ok(frames.buffered(FRAMES_AHEAD).chain(end).boxed())
    }

    /// How much of an artifact need not be sent. Less than all of it until it is verified, so that whoever goes on from
    /// there always sends something, and with it brings the upload to its end.
    pub async fn artifact_progress(&self, digest: &Digest) -> Result<Progress, OpError> {
        if let Some(size) = self.has_artifact(digest).await? {
            return Ok(Progress { have: size, complete: true });
        }
        let key = self.place(BlobKind::Artifact, digest).await?;
        Ok(Progress { have: self.blobs.partial(&key).await?.saturating_sub(1), complete: false })
    }

    /// The length of an artifact that is here, and stays so for a while.
    pub async fn has_artifact(&self, digest: &Digest) -> Result<Option<u64>, OpError> {
        let Some(row) = self.blob(BlobKind::Artifact, digest).await? else { return Ok(None) };
        let now = self.env.now().wall;
        let stays = self.is_fresh(&row, now) || self.rely(BlobKind::Artifact, vec![*digest], now).await?;
        Ok(stays.then_some(row.size))
    }

    /// Takes an artifact's bytes from `offset` on. When all `total` are there they are checked and registered.
    pub async fn artifact(&self, digest: Digest, offset: u64, total: u64, body: Body) -> Result<Progress, OpError> {
        if total > limits::ARTIFACT_BYTES_MAX {
            let message = format!("an artifact has at most {} bytes", limits::ARTIFACT_BYTES_MAX);
            return Err(OpError::refused(ErrorCode::TooLarge, message));
        }
        let progress = self.artifact_progress(&digest).await?;
        if progress.complete {
            return Ok(progress);
        }
        let key = self.place(BlobKind::Artifact, &digest).await?;
        let body = bounded(body, total.saturating_sub(offset));
        let have = self.blobs.partial(&key).await?;
        // What is here already may come again.
        let again = have.saturating_sub(offset);
        let have = self.blobs.append(&key, offset + again, without_head(body, again)).await?;
        if have < total {
            return Ok(Progress { have: have.saturating_sub(1), complete: false });
        }
        let stored = self.blobs.finish(&key, digest).await?;
        self.register(vec![self.alone_row(BlobKind::Artifact, digest, stored.size, &key)]).await?;
        Ok(Progress { have: stored.size, complete: true })
    }

    /// A registered artifact's bytes, or some of them.
    pub async fn read_artifact(
        &self,
        digest: &Digest,
        range: Option<std::ops::Range<u64>>,
    ) -> Result<(u64, Body), OpError> {
        self.alone(BlobKind::Artifact, digest, range).await
    }

    /// An address from which the artifact can be fetched past this farm, if that is wanted.
    pub async fn artifact_link(&self, digest: &Digest, disposition: &str) -> Result<Option<String>, OpError> {
        let Some(blob) = self.blob(BlobKind::Artifact, digest).await? else { return Ok(None) };
        let Place::Alone { object } = &blob.place else { return Ok(None) };
        Ok(self.blobs.presign(&stored_key(object)?, limits::S3_LINK_S, disposition).await?)
    }

    async fn alone(
        &self,
        kind: BlobKind,
        digest: &Digest,
        range: Option<std::ops::Range<u64>>,
    ) -> Result<(u64, Body), OpError> {
        let what = match kind {
            BlobKind::Manifest => "source",
            BlobKind::Artifact => "artifact",
            BlobKind::Chunk => "blob",
        };
        let blob = self.blob(kind, digest).await?.ok_or_else(|| OpError::not_found(what))?;
        let key = stored_key(blob.place.object())?;
        Ok((blob.size, self.blobs.read(&key, range.unwrap_or(0..blob.size)).await?))
    }

    async fn blob(&self, kind: BlobKind, digest: &Digest) -> Result<Option<Blob>, OpError> {
        Ok(self.store.blobs(&self.scope(), kind, &[*digest]).await?.pop())
    }

    /// Where an object of its own goes: to a name under which nothing was thrown away of late.
    async fn place(&self, kind: BlobKind, digest: &Digest) -> Result<BlobKey, OpError> {
        let key = BlobKey::alone(self.org, kind, digest);
        let thrown = self.store.trashed(key.as_str()).await?;
        Ok(key.afresh(&thrown))
    }

    /// Asked minus answered, in the order asked. The others stay for a while.
    async fn missing(&self, digests: &[Digest]) -> Result<Vec<Digest>, OpError> {
        self.missing_at(digests, self.env.now().wall).await
    }

    async fn missing_at(&self, digests: &[Digest], now: Ms) -> Result<Vec<Digest>, OpError> {
        let mut missing = Vec::new();
        for some in digests.chunks(limits::DIGESTS_PER_READ) {
            let known = self.staying(some, now).await?;
            missing.extend(some.iter().filter(|digest| !known.contains(*digest)));
        }
        Ok(missing)
    }

    /// Which of these chunks are here and stay for a while.
    async fn staying(&self, digests: &[Digest], now: Ms) -> Result<HashSet<Digest>, OpError> {
        for _ in 0..RELY_TRIES {
            let known = self.store.blobs(&self.scope(), BlobKind::Chunk, digests).await?;
            let stale: BTreeSet<Digest> =
                known.iter().filter(|blob| !self.is_fresh(blob, now)).map(|blob| blob.digest).collect();
            if stale.is_empty() || self.rely(BlobKind::Chunk, stale.into_iter().collect(), now).await? {
                return Ok(known.iter().map(|blob| blob.digest).collect());
            }
        }
        Err(gone_meanwhile())
    }

    fn is_fresh(&self, blob: &Blob, now: Ms) -> bool {
        now.since(blob.used_at) < self.fresh_ms
    }

    /// Says that these are in use, each named once. False: one of them has just gone.
    async fn rely(&self, kind: BlobKind, digests: Vec<Digest>, at: Ms) -> Result<bool, OpError> {
        let write = Write::Tidy(Box::new(Tidy::Use { org: self.org, kind, digests, at }));
        let done = self.store.commit(&[Group(vec![write])]).await?.groups;
        Ok(done.iter().all(Result::is_ok))
    }

    async fn put_manifest(&self, digest: Digest, text: Bytes) -> Result<Blob, OpError> {
        let key = self.place(BlobKind::Manifest, &digest).await?;
        let body = stream::iter([Ok(text)]).boxed();
        let stored = self.blobs.put(&key, body, Some(digest)).await?;
        Ok(self.alone_row(BlobKind::Manifest, digest, stored.size, &key))
    }

    fn alone_row(&self, kind: BlobKind, digest: Digest, size: u64, key: &BlobKey) -> Blob {
        let place = Place::Alone { object: key.as_str().to_owned() };
        let now = self.env.now().wall;
        Blob { org: self.org, digest, kind, size, place, created_at: now, used_at: now }
    }

    /// In commits that do not hold up the farm's other writes, in the rows' order. What became of one may be unknown;
    /// then the objects stay, and sending again is harmless.
    async fn register(&self, rows: Vec<Blob>) -> Result<(), OpError> {
        for some in rows.chunks(limits::BLOBS_PER_COMMIT) {
            let Committed { groups } = self.store.commit(&[Group(vec![Write::AddBlobs(some.to_vec())])]).await?;
            match groups.into_iter().next() {
                Some(Ok(_)) => {}
                // Its object was thrown away while it came.
                Some(Err(Miss::Stale)) => return Err(gone_meanwhile()),
                Some(Err(miss)) => return Err(not_registered(format!("{miss:?}"))),
                None => return Err(not_registered("the store did not answer".to_owned())),
            }
        }
        Ok(())
    }
}

/// The body with a bound on its length. The bound on its silence is the router's.
fn bounded(body: Body, most: u64) -> Body {
    let mut seen = 0;
    let check = move |part: std::io::Result<Bytes>| {
        let part = part?;
        seen += part.len() as u64;
        if seen > most {
            return Err(std::io::Error::new(ErrorKind::FileTooLarge, format!("more than {most} bytes came")));
        }
        Ok(part)
    };
    body.map(check).boxed()
}

/// Takes some more of a refused upload and drops it.
async fn drain(body: &mut Body) {
    let mut dropped = 0;
    while let Some(Ok(part)) = body.next().await {
        dropped += part.len() as u64;
        if dropped > limits::UPLOAD_DRAIN {
            return;
        }
    }
}

fn without_head(body: Body, mut skip: u64) -> Body {
    let rest = move |part: std::io::Result<Bytes>| {
        let mut part = part?;
        let known = skip.min(part.len() as u64);
        skip -= known;
        part.advance(known as usize);
        Ok(part)
    };
    body.map(rest).boxed()
}

fn swap<A, B>((a, b): (A, B)) -> (B, A) {
    (b, a)
}

fn cut_off(why: &str) -> OpError {
    OpError::refused(ErrorCode::IncompleteBody, format!("the upload ended early: {why}"))
}

fn gone_meanwhile() -> OpError {
    OpError::refused(ErrorCode::Unavailable, "some of it was here and has just been removed").hint("send it again")
}

fn not_registered(why: String) -> OpError {
    OpError::Io { what: "register blobs", error: std::io::Error::other(why) }
}

fn stored_key(object: &str) -> Result<BlobKey, OpError> {
    BlobKey::parse(object).ok_or_else(|| OpError::Io {
        what: "read a blob's place",
        error: std::io::Error::new(ErrorKind::InvalidData, format!("`{object}` names no object")),
    })
}

async fn send_frame(blobs: Arc<Blobs>, read: pack::FrameRead) -> std::io::Result<Bytes> {
    let key = stored_key(&read.object).map_err(std::io::Error::other)?;
    let bytes = blobs.read_piece(&key, read.at, read.stored).await.map_err(std::io::Error::other)?;
    match read.send {
        pack::Portion::Whole => Ok(bytes),
        pack::Portion::Some(_) | pack::Portion::Blob(_) => {
            blobs.compute(move || pack::pick(&read, bytes)).await.map_err(std::io::Error::other)
        }
    }
}

/// A pack object in the making, with what the index will say about it.
struct Shelf<'a> {
    depot: Depot<'a>,
    draft: Option<(BlobKey, Draft)>,
    rows: Vec<Blob>,
    added: HashSet<Digest>,
}

impl<'a> Shelf<'a> {
    fn new(depot: Depot<'a>) -> Self {
        Self { depot, draft: None, rows: Vec::new(), added: HashSet::new() }
    }

    /// Adds a verified frame, unless the farm has all of its blobs.
    async fn add(&mut self, frame: PackFrame) -> Result<(), OpError> {
        let digests: Vec<Digest> = frame.header.blobs.iter().map(|blob| blob.digest).collect();
        let fresh = self.depot.missing(&digests).await?.iter().any(|digest| !self.added.contains(digest));
        if fresh { self.append(frame).await } else { Ok(()) }
    }

    /// Packs those of the blobs that the farm does not have.
    async fn add_blobs(&mut self, mut blobs: Vec<(Digest, Bytes)>) -> Result<(), OpError> {
        let digests: Vec<Digest> = blobs.iter().map(|(digest, _)| *digest).collect();
        let missing: HashSet<Digest> = self.depot.missing(&digests).await?.into_iter().collect();
        blobs.retain(|(digest, _)| missing.contains(digest));
        if blobs.is_empty() {
            return Ok(());
        }
        let frame = self.depot.blobs.compute(move || PackFrame::pack(&blobs, TAR_LEVEL)).await;
        self.append(frame).await
    }

    async fn append(&mut self, frame: PackFrame) -> Result<(), OpError> {
        let depot = self.depot;
        let (key, draft) = match &mut self.draft {
            Some(draft) => draft,
            none => {
                let key = BlobKey::pack(depot.org, (depot.env.dice(), depot.env.dice()));
                let draft = depot.blobs.create(&key).await?;
                none.insert((key, draft))
            }
        };
        let bytes = pack::encode(&frame);
        let (at, now) = (draft.len(), depot.env.now().wall);
        let rows = pack::rows(depot.org, key.as_str(), now, at, bytes.len() as u32, &frame);
        self.rows.extend(rows.into_iter().filter(|row| self.added.insert(row.digest)));
        Ok(draft.append(bytes).await?)
    }

    /// Makes the object durable; its rows are still to be committed.
    async fn finish(self) -> Result<Vec<Blob>, OpError> {
        if let Some((_, mut draft)) = self.draft {
            draft.append(Bytes::from_static(&PACK_END)).await?;
            draft.finish(None).await?;
        }
        Ok(self.rows)
    }
}

/// An upload as its reader's thread sees it.
struct Parts {
    parts: mpsc::Receiver<Bytes>,
    part: Bytes,
}

impl Parts {
    fn new(parts: mpsc::Receiver<Bytes>) -> Self {
        Self { parts, part: Bytes::new() }
    }
}

impl Read for Parts {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.part.is_empty() {
            match self.parts.blocking_recv() {
                Some(part) => self.part = part,
                None => return Ok(0),
            }
        }
        let len = buffer.len().min(self.part.len());
        self.part.copy_to_slice(&mut buffer[..len]);
        Ok(len)
    }
}
