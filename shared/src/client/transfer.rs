//! S: bodies that are sent: manifests, packs and artifacts. A body may take as long as it moves.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures_util::stream;
use reqwest::Response;
use tokio::sync::mpsc;

use super::call::{Call, Failure, Kind, Lost};
use super::{Client, ClientError};
use crate::env::{Env, Mono};
use crate::id::{AttemptRef, Digest};
use crate::secret::Secret;
use crate::wire::source::{PACK_END, PackFrame, PackStored, SourceStatus};
use crate::wire::{ErrorCode, Problem, header, path};

/// A manifest above this size is compressed.
const COMPRESS_ABOVE: usize = 64 << 10;
const MANIFEST_LEVEL: i32 = 3;
/// A manifest names up to half a million blobs, each of which the farm looks up.
const MANIFEST_ANSWER_MS: u64 = 120_000;
/// A body from which the network took nothing for this long, or a farm that stored it for this long, is given up.
const STALL_MS: u64 = 120_000;
/// Bytes are handed to the network in pieces of this size, so that progress is smooth and a slow line is no stall.
const PIECE: usize = 64 << 10;

impl Client {
    /// Offers a manifest and learns which blobs are missing.
    pub async fn put_source(&self, digest: &Digest, manifest: Bytes) -> Result<SourceStatus, ClientError> {
        let mut call = Call::put(path::source(digest)).deadline(MANIFEST_ANSWER_MS);
        call = call.header("content-type", "application/x-ndjson");
        let body = if manifest.len() > COMPRESS_ABOVE {
            call = call.header("content-encoding", "zstd");
            let packed = tokio::task::spawn_blocking(move || zstd::bulk::compress(&manifest, MANIFEST_LEVEL)).await;
            let packed = packed.map_err(std::io::Error::other).and_then(|packed| packed);
            packed.map_err(|error| ClientError::protocol(format!("the manifest does not compress: {error}")))?.into()
        } else {
            manifest
        };
        self.ask(call.body(body)).await
    }

    /// Sends one pack. `sent` is called with the number of bytes that the network took since the last call. The pack is
    /// not sent again by itself: after a failure the caller asks what is missing.
    pub async fn send_pack(
        &self,
        frames: mpsc::Receiver<PackFrame>,
        sent: impl Fn(u64) + Send + Sync + 'static,
    ) -> Result<PackStored, ClientError> {
        let call = Call::post(path::PACKS).header("content-type", "application/octet-stream");
        let source = Source::Pack { frames, stored: None, ended: false };
        let answer = self.upload(&call, source, Box::new(sent)).await.map_err(|failure| failure.error)?;
        self.decode(&call, &answer)
    }

    /// The manifest of the attempt's source. It may be larger than a blob, so it has a route of its own.
    pub async fn attempt_source(&self, at: &AttemptRef, grant: &Secret<String>) -> Result<Bytes, ClientError> {
        let call = Call::get(path::attempt_source(at)).grant(grant).deadline(MANIFEST_ANSWER_MS);
        let mut lost = Lost::from(self.env.now().mono);
        loop {
            let failure = match self.once_up_to(&call, crate::limits::MANIFEST_BYTES_MAX).await {
                Ok(manifest) => return Ok(manifest),
                Err(failure) => failure,
            };
            if failure.kind == Kind::Final {
                return Err(failure.error);
            }
            lost.pause(&*self.env, failure, call.budget()).await?;
        }
    }

    async fn once_up_to(&self, call: &Call, max: usize) -> Result<Bytes, Failure> {
        let mut response = self.open(call).await?;
        self.collect(&mut response, max).await
    }

    /// Asks how many bytes of an artifact the farm has.
    pub async fn attempt_artifact_len(
        &self,
        at: &AttemptRef,
        grant: &Secret<String>,
        digest: &Digest,
    ) -> Result<u64, ClientError> {
        let call = Call::head(path::attempt_artifact(at, digest)).grant(grant);
        let response = match self.head(&call).await {
            Ok(response) => response,
            Err(ClientError::Problem(problem)) if problem.code == ErrorCode::NotFound => return Ok(0),
            Err(error) => return Err(error),
        };
        match response.headers().get(header::OFFSET).map(|value| value.to_str().ok()?.parse().ok()) {
            None => Ok(0),
            Some(Some(len)) => Ok(len),
            Some(None) => Err(ClientError::protocol("the farm's Alloy-Offset is no number".to_owned())),
        }
    }

    /// Sends an artifact's bytes from `offset` on. `body` must give exactly `total - offset` bytes: one that ends early
    /// is a cut upload. Not sent again by itself: after a failure the caller asks for the length.
    pub async fn put_attempt_artifact(
        &self,
        at: &AttemptRef,
        grant: &Secret<String>,
        digest: &Digest,
        offset: u64,
        total: u64,
        body: mpsc::Receiver<Bytes>,
    ) -> Result<(), ClientError> {
        let Some(len) = total.checked_sub(offset) else {
            return Err(ClientError::protocol(format!("an artifact of {total} bytes has no byte {offset}")));
        };
        let range = match total.checked_sub(1) {
            Some(last) if len > 0 => format!("bytes {offset}-{last}/{total}"),
            Some(_) | None => format!("bytes */{total}"),
        };
        let call = Call::put(path::attempt_artifact(at, digest))
            .grant(grant)
            .header("content-type", "application/octet-stream")
            .header("content-length", len.to_string())
            .header("content-range", range);
        let source = if len == 0 { Source::Empty } else { Source::Parts(body) };
        self.upload(&call, source, Box::new(|_| {})).await.map(drop).map_err(|failure| failure.error)
    }

    /// A `HEAD` request. Its errors have no body, so the status alone says what is wrong.
    async fn head(&self, call: &Call) -> Result<Response, ClientError> {
        let mut lost = Lost::from(self.env.now().mono);
        loop {
            let failure = match self.open(call).await {
                Ok(response) => return Ok(response),
                Err(failure) => failure,
            };
            if failure.kind == Kind::Final {
                return Err(head_problem(failure));
            }
            lost.pause(&*self.env, failure, call.budget()).await?;
        }
    }

    async fn upload(&self, call: &Call, source: Source, sent: Sent) -> Result<Bytes, Failure> {
        let pace = Arc::new(Pace(AtomicU64::new(self.env.now().mono.0)));
        let body = Body { source, rest: Bytes::new(), pace: pace.clone(), env: self.env.clone(), sent };
        let body = reqwest::Body::wrap_stream(stream::unfold(body, Body::next));
        let request = self.request(call)?.body(body);
        let work = async {
            let mut response = self.send(request).await?;
            self.collect(&mut response, crate::limits::JSON_ANSWER_MAX).await
        };
        tokio::select! {
            biased;
            done = work => done,
            () = pace.stalled(&*self.env) => Err(self.cut(format!("nothing moved for {} s", STALL_MS / 1000))),
        }
    }
}

fn head_problem(failure: Failure) -> ClientError {
    let code = match failure.status {
        Some(401) => ErrorCode::Unauthenticated,
        Some(403) => ErrorCode::Forbidden,
        Some(404) => ErrorCode::NotFound,
        Some(409) => ErrorCode::Fenced,
        Some(_) | None => return failure.error,
    };
    let message = match code {
        ErrorCode::Fenced => "the attempt has ended, or belongs to another worker",
        ErrorCode::NotFound => "there is no such artifact",
        _ => "the grant does not allow this",
    };
    ClientError::Problem(Problem::new(code, message))
}

type Sent = Box<dyn Fn(u64) + Send + Sync>;

/// Where a body's bytes come from.
enum Source {
    Empty,
    Parts(mpsc::Receiver<Bytes>),
    Pack { frames: mpsc::Receiver<PackFrame>, stored: Option<Bytes>, ended: bool },
}

impl Source {
    async fn next(&mut self) -> Option<Bytes> {
        match self {
            Self::Empty => None,
            Self::Parts(parts) => parts.recv().await,
            Self::Pack { frames, stored, ended } => {
                if let Some(bytes) = stored.take() {
                    return Some(bytes);
                }
                match frames.recv().await {
                    Some(frame) => {
                        let head = frame.encode_header();
                        *stored = Some(frame.stored);
                        Some(head)
                    }
                    None if *ended => None,
                    None => {
                        *ended = true;
                        Some(Bytes::from_static(&PACK_END))
                    }
                }
            }
        }
    }
}

/// A body while it is sent.
struct Body {
    source: Source,
    rest: Bytes,
    pace: Arc<Pace>,
    env: Arc<dyn Env>,
    sent: Sent,
}

impl Body {
    async fn next(mut self) -> Option<(Result<Bytes, Infallible>, Self)> {
        while self.rest.is_empty() {
            self.pace.wait_for_source();
            let next = self.source.next().await;
            self.pace.moved(self.env.now().mono);
            self.rest = next?;
        }
        let piece = self.rest.split_to(self.rest.len().min(PIECE));
        self.pace.moved(self.env.now().mono);
        (self.sent)(piece.len() as u64);
        Some((Ok(piece), self))
    }
}

/// When the network last took something. `u64::MAX` while it is the source that is waited for.
struct Pace(AtomicU64);

impl Pace {
    fn moved(&self, now: Mono) {
        self.0.store(now.0, Ordering::Relaxed);
    }

    fn wait_for_source(&self) {
        self.0.store(u64::MAX, Ordering::Relaxed);
    }

    /// Ends when nothing has moved for too long.
    async fn stalled(&self, env: &dyn Env) {
        loop {
            let now = env.now().mono;
            let last = self.0.load(Ordering::Relaxed);
            let until = Mono(last.min(now.0)) + STALL_MS;
            if until <= now {
                return;
            }
            env.sleep_until(until).await;
        }
    }
}
