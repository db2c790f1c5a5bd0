//! S: bytes over HTTP: sources and packs in, blobs out to workers, artifacts in and out, raw logs.

use std::sync::Arc;

use alloy_shared::id::{AttemptRef, Digest};
use alloy_shared::limits;
use alloy_shared::wire::job::ArtifactList;
use alloy_shared::wire::source::{BlobRequest, PackStored, SourceStatus};
use alloy_shared::wire::{ErrorCode, header as own, path};
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream};
use serde::Deserialize;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::extract::{Developer, JsonBody, PathOf, QueryOf, Viewer, header_text, parameter, whole_within};
use super::range::{self, Asked};
use crate::App;
use crate::auth::AttemptGrant;
use crate::blobs;
use crate::error::{Fault, showable};
use crate::feed;
use crate::logs::Logs;
use crate::ops::archive::Format;
use crate::ops::upload::Depot;
use crate::ops::{OpError, job as jobs};
use crate::store::{Job, Scope};

#[cfg(test)]
mod tests;

/// Room in memory for manifests that are being taken, in KiB.
static MANIFESTS: Semaphore = Semaphore::const_new(limits::MANIFESTS_BYTES >> 10);
/// A manifest is decompressed in such steps.
const UNZSTD_STEP: u64 = 1 << 20;
/// Log bytes in one read.
const READ: u32 = 1 << 20;
/// Nothing that a build made may act in this origin.
const NO_ORIGIN: (HeaderName, &str) = (header::CONTENT_SECURITY_POLICY, "sandbox; default-src 'none'");
const RANGES: (HeaderName, &str) = (header::ACCEPT_RANGES, "bytes");
/// Ask again before using a kept copy.
const NO_CACHE: (HeaderName, &str) = (header::CACHE_CONTROL, "private, no-cache");
const NO_STORE: (HeaderName, &str) = (header::CACHE_CONTROL, "no-store");
const BINARY: (HeaderName, &str) = (header::CONTENT_TYPE, "application/octet-stream");

fn depot(app: &App, org: alloy_shared::id::OrgId) -> Depot<'_> {
    Depot { store: &*app.store, blobs: &app.blobs, env: &app.env, fresh_ms: app.keep.grace_ms, org }
}

fn incoming(body: Body) -> blobs::Body {
    body.into_data_stream().map_err(std::io::Error::other).boxed()
}

/// A body that is cut off when its bytes cannot be read: an incomplete answer, never a wrong one.
fn outgoing(body: blobs::Body) -> Body {
    Body::from_stream(body.inspect_err(|error| tracing::error!(%error, "a download is cut off")))
}

/// Offers a manifest; the answer names the blobs that are missing. With none missing, jobs may name the source.
#[utoipa::path(
    put, path = path::SOURCE, tag = "sources", request_body = String,
    params(("digest" = String, Path, description = "SHA-256 of the manifest"), ("Content-Encoding" = Option<String>, Header, description = "zstd")),
    responses((status = 200, body = SourceStatus))
)]
pub async fn put_source(
    State(app): State<Arc<App>>,
    Developer(who): Developer,
    PathOf(digest): PathOf<Digest>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<SourceStatus>, Fault> {
    let mut room = Room::new(&MANIFESTS);
    let body = whole_within(body, limits::MANIFEST_BYTES_MAX, |len| room.hold(len)).await?;
    // Held until the manifest is stored.
    let (manifest, _room) = match header_text(&headers, "content-encoding") {
        None | Some("identity") => (body, room),
        Some("zstd") => app.blobs.compute(move || unzstd(&body, room)).await?,
        Some(other) => {
            return Err(parameter("Content-Encoding", &format!("is zstd or nothing, not {}", showable(other))));
        }
    };
    Ok(Json(depot(&app, who.org).put_source(digest, manifest).await?))
}

/// What one request may hold of a room that all share.
struct Room {
    all: &'static Semaphore,
    held: Option<SemaphorePermit<'static>>,
}

impl Room {
    fn new(all: &'static Semaphore) -> Self {
        Self { all, held: None }
    }

    /// Holds room for so many bytes in all. It is asked as they come: what a sender only announces takes nothing.
    fn hold(&mut self, bytes: usize) -> Result<(), Fault> {
        let held = self.held.as_ref().map_or(0, SemaphorePermit::num_permits);
        let more = bytes.div_ceil(1 << 10).saturating_sub(held);
        if more == 0 {
            return Ok(());
        }
        let more = u32::try_from(more).ok().and_then(|more| self.all.try_acquire_many(more).ok()).ok_or_else(|| {
            let message = format!("the farm takes {} MiB of manifests already", limits::MANIFESTS_BYTES >> 20);
            Fault::new(ErrorCode::TooManyRequests, message).retry_after(1)
        })?;
        match &mut self.held {
            Some(held) => held.merge(more),
            none => *none = Some(more),
        }
        Ok(())
    }
}

fn unzstd(bytes: &[u8], mut room: Room) -> Result<(Bytes, Room), Fault> {
    use std::io::Read as _;
    let damaged = |error| Fault::new(ErrorCode::InvalidBody, format!("the manifest does not decompress: {error}"));
    let mut reader = zstd::stream::read::Decoder::new(bytes).map_err(damaged)?;
    let mut out = Vec::new();
    loop {
        let from = out.len();
        if from > limits::MANIFEST_BYTES_MAX {
            let message = format!("the manifest has more than {} bytes", limits::MANIFEST_BYTES_MAX);
            return Err(Fault::new(ErrorCode::TooLarge, message));
        }
        room.hold(bytes.len() + from + UNZSTD_STEP as usize)?;
        if (&mut reader).take(UNZSTD_STEP).read_to_end(&mut out).map_err(damaged)? == 0 {
            return Ok((out.into(), room));
        }
    }
}

/// Takes a source as one tar, compressed with zstd or gzip or not at all.
#[utoipa::path(
    post, path = path::SOURCES, tag = "sources", request_body(content = Vec<u8>, content_type = "application/zstd"),
    responses((status = 201, body = SourceStatus))
)]
pub async fn post_tar(
    State(app): State<Arc<App>>,
    Developer(who): Developer,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Fault> {
    let media = header_text(&headers, "content-type").unwrap_or_default();
    let format = match media.split(';').next().unwrap_or_default().trim().to_ascii_lowercase().as_str() {
        "application/zstd" => Some(Format::Zstd),
        "application/gzip" | "application/x-gzip" => Some(Format::Gzip),
        "application/x-tar" => Some(Format::Plain),
        "" | "application/octet-stream" => None,
        other => {
            let message = format!("a body of type `{}` is no source", showable(other));
            return Err(Fault::new(ErrorCode::InvalidBody, message)
                .hint("send a tar as application/zstd, application/gzip or application/x-tar"));
        }
    };
    let digest = depot(&app, who.org).tar(incoming(body), format).await?;
    let status = SourceStatus { digest, complete: true, missing: Vec::new() };
    Ok((StatusCode::CREATED, [(header::LOCATION, path::source(&digest))], Json(status)).into_response())
}

/// Takes a pack of blobs: all of it or nothing.
#[utoipa::path(
    post, path = path::PACKS, tag = "sources", request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 200, body = PackStored))
)]
pub async fn post_pack(
    State(app): State<Arc<App>>,
    Developer(who): Developer,
    body: Body,
) -> Result<Json<PackStored>, Fault> {
    Ok(Json(depot(&app, who.org).pack(incoming(body)).await?))
}

/// The manifest of the attempt's source.
#[utoipa::path(
    get, path = path::ATTEMPT_SOURCE, tag = "attempts", params(("job" = String, Path,), ("attempt" = u32, Path,)),
    responses((status = 200, body = String))
)]
pub async fn attempt_source(State(app): State<Arc<App>>, grant: AttemptGrant) -> Result<Response, Fault> {
    let job = app.store.job(&Scope::org(grant.org), &grant.at.job).await?.ok_or_else(|| OpError::not_found("job"))?;
    let source = job.source.ok_or_else(|| OpError::not_found("source"))?;
    let (size, body) = depot(&app, grant.org).manifest(&source).await?;
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson")),
        (header::CONTENT_LENGTH, size.into()),
    ];
    Ok((headers, outgoing(body)).into_response())
}

/// A pack with these blobs.
#[utoipa::path(
    post, path = path::ATTEMPT_BLOBS, tag = "attempts", params(("job" = String, Path,), ("attempt" = u32, Path,)),
    request_body = BlobRequest, responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"))
)]
pub async fn attempt_blobs(
    State(app): State<Arc<App>>,
    grant: AttemptGrant,
    JsonBody(asked): JsonBody<BlobRequest>,
) -> Result<Response, Fault> {
    let pack = depot(&app, grant.org).source_blobs(&asked.digests).await?;
    Ok(([BINARY], outgoing(pack)).into_response())
}

/// The rest of the path, the attempt, is the grant's.
#[derive(Debug, Deserialize)]
pub struct ArtifactPlace {
    digest: Digest,
}

/// How many bytes of an artifact need not be sent again; all of them once it is verified.
#[utoipa::path(
    head, path = path::ATTEMPT_ARTIFACT, tag = "attempts",
    params(("job" = String, Path,), ("attempt" = u32, Path,), ("digest" = String, Path,)),
    responses((status = 200, headers(("Alloy-Offset" = u64))))
)]
pub async fn attempt_artifact_len(
    State(app): State<Arc<App>>,
    grant: AttemptGrant,
    PathOf(place): PathOf<ArtifactPlace>,
) -> Result<Response, Fault> {
    let progress = depot(&app, grant.org).artifact_progress(&place.digest).await?;
    Ok([(own::OFFSET, progress.have.to_string())].into_response())
}

/// Takes an artifact's bytes, all or from an offset. With the last one it is verified and kept.
#[utoipa::path(
    put, path = path::ATTEMPT_ARTIFACT, tag = "attempts",
    params(("job" = String, Path,), ("attempt" = u32, Path,), ("digest" = String, Path,), ("Content-Range" = Option<String>, Header,)),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 201, description = "Verified and kept"), (status = 202, description = "More is to come"))
)]
pub async fn put_attempt_artifact(
    State(app): State<Arc<App>>,
    grant: AttemptGrant,
    PathOf(place): PathOf<ArtifactPlace>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Fault> {
    let sent = match (header_text(&headers, "content-range"), header_text(&headers, "content-length")) {
        (Some(text), _) => range::sent(text).ok_or_else(|| parameter("Content-Range", "is written `bytes 5-9/10`"))?,
        (None, Some(len)) => {
            let total = len.parse().map_err(|_| parameter("Content-Length", "is a number"))?;
            range::Sent { offset: 0, end: total, total }
        }
        (None, None) => return Err(parameter("Content-Range", "or a Content-Length is needed")),
    };
    let progress = depot(&app, grant.org).artifact(place.digest, sent.offset, sent.total, incoming(body)).await?;
    let status = if progress.complete { StatusCode::CREATED } else { StatusCode::ACCEPTED };
    if !progress.complete && progress.have + 1 < sent.end {
        return Err(
            Fault::new(ErrorCode::IncompleteBody, "the upload ended before the bytes that it announced").retry_after(1)
        );
    }
    Ok((status, [(own::OFFSET, progress.have.to_string())]).into_response())
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogParameters {
    attempt: Option<u32>,
    #[serde(default)]
    offset: u64,
    follow: Option<String>,
}

/// A log's raw bytes. `follow=1` stays until the attempt has ended; otherwise `Range` gives a part.
#[utoipa::path(
    get, path = path::JOB_LOG, tag = "jobs",
    params(
        ("id" = String, Path,),
        ("attempt" = Option<u32>, Query, description = "Default: the newest"),
        ("offset" = Option<u64>, Query, description = "The first byte"),
        ("follow" = Option<String>, Query, description = "1: send what comes until the attempt has ended"),
    ),
    responses((status = 200, body = String), (status = 206, body = String))
)]
pub async fn job_log(
    State(app): State<Arc<App>>,
    Viewer(who): Viewer,
    PathOf(id): PathOf<String>,
    QueryOf(asked): QueryOf<LogParameters>,
    headers: HeaderMap,
) -> Result<Response, Fault> {
    let follow = match asked.follow.as_deref() {
        None | Some("0" | "false") => false,
        Some("" | "1" | "true") => true,
        Some(_) => return Err(parameter("follow", "is 1 or 0")),
    };
    let scope = who.scope();
    let job = jobs::resolve(&app, &scope, &id).await?;
    let at = log_of(&job, asked.attempt)?;
    jobs::check_kept(&app, &scope, &at, "log", |attempt| attempt.log_gone_at).await?;
    let mut response = if follow {
        let chunks = feed::follow_log(app.clone(), scope, at, asked.offset);
        let chunks = stream::unfold(Some(chunks), |chunks| async {
            let mut chunks = chunks?;
            match chunks.recv().await {
                Some(None) => None,
                Some(Some(bytes)) => Some((Ok(bytes), Some(chunks))),
                None => Some((Err(std::io::Error::other("there is more of the log")), None)),
            }
        });
        // Cut off rather than ended: the follower comes back for the rest.
        let stop = app.stopping.clone().cancelled_owned().map(|()| Err(std::io::Error::other("the farm is stopping")));
        let body = Body::from_stream(stream_until(chunks, stop));
        ([(own::OFFSET, asked.offset.to_string())], body).into_response()
    } else {
        stored_log(&app, at, asked.offset, &headers).await?
    };
    let add = response.headers_mut();
    add.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    add.insert(NO_ORIGIN.0, HeaderValue::from_static(NO_ORIGIN.1));
    add.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    add.insert(own::ATTEMPT, at.attempt.into());
    Ok(response)
}

/// The items until `stop` is ready, whose answer is then the last one.
fn stream_until<T: Send + 'static>(
    items: impl futures_util::Stream<Item = T> + Send + 'static,
    stop: impl Future<Output = T> + Send + 'static,
) -> impl futures_util::Stream<Item = T> + Send {
    let start = Some((items.boxed(), stop.boxed()));
    stream::unfold(start, |state| async {
        let (mut items, mut stop) = state?;
        tokio::select! {
            biased;
            item = items.next() => Some((item?, Some((items, stop)))),
            last = &mut stop => Some((last, None)),
        }
    })
}

/// The attempt whose log is meant. A job that still waits has the log of its first attempt to come.
fn log_of(job: &Job, attempt: Option<u32>) -> Result<AttemptRef, Fault> {
    let newest = job.attempt().attempt.max(1);
    match attempt.unwrap_or(newest) {
        attempt if (1..=newest).contains(&attempt) => Ok(AttemptRef { job: job.id, attempt }),
        _ => Err(OpError::not_found("attempt").into()),
    }
}

async fn stored_log(app: &App, at: AttemptRef, offset: u64, headers: &HeaderMap) -> Result<Response, Fault> {
    let len = app.logs.measure(&at).await.map_err(OpError::from)?;
    let Some(rest) = len.checked_sub(offset) else { return Ok(unsatisfiable(len)) };
    // With an offset the log begins there.
    let (status, from, to) = match range::asked(header_text(headers, "range"), rest) {
        Asked::Whole => (StatusCode::OK, offset, len),
        Asked::Part(part) => (StatusCode::PARTIAL_CONTENT, offset + part.start, offset + part.end),
        Asked::Nothing => return Ok(unsatisfiable(rest)),
    };
    let body = Body::from_stream(log_part(app.logs.clone(), at, from, to));
    let mut response = (status, [RANGES], [(own::OFFSET, from.to_string())], body).into_response();
    response.headers_mut().insert(header::CONTENT_LENGTH, (to - from).into());
    if status == StatusCode::PARTIAL_CONTENT {
        content_range(&mut response, from - offset, to - offset, rest);
    }
    Ok(response)
}

fn log_part(
    logs: Arc<Logs>,
    at: AttemptRef,
    from: u64,
    to: u64,
) -> impl futures_util::Stream<Item = std::io::Result<Bytes>> {
    let next = move |from: u64| {
        let logs = logs.clone();
        async move {
            if from >= to {
                return Ok(None);
            }
            let most = u32::try_from(to - from).unwrap_or(READ).min(READ);
            let chunks = logs.read(&at, from, most).await.map_err(std::io::Error::other)?;
            let len: usize = chunks.iter().map(Bytes::len).sum();
            if len == 0 {
                return Err(std::io::Error::other("the log became shorter"));
            }
            Ok(Some((stream::iter(chunks.into_iter().map(Ok)), from + len as u64)))
        }
    };
    let cut = |error: &std::io::Error| tracing::error!(%error, "a log is cut off");
    stream::try_unfold(from, next).try_flatten().inspect_err(cut)
}

fn content_range(response: &mut Response, from: u64, to: u64, total: u64) {
    let text = format!("bytes {from}-{}/{total}", to.saturating_sub(1));
    if let Ok(value) = HeaderValue::from_str(&text) {
        response.headers_mut().insert(header::CONTENT_RANGE, value);
    }
}

fn unsatisfiable(total: u64) -> Response {
    let message = format!("the range begins behind the end; there are {total} bytes");
    let mut response = Fault::new(ErrorCode::RangeNotSatisfiable, message).into_response();
    if let Ok(value) = HeaderValue::from_str(&format!("bytes */{total}")) {
        response.headers_mut().insert(header::CONTENT_RANGE, value);
    }
    response
}

/// What the newest attempt has left.
#[utoipa::path(
    get, path = path::JOB_ARTIFACTS, tag = "jobs", params(("id" = String, Path,)),
    responses((status = 200, body = ArtifactList))
)]
pub async fn list_artifacts(
    State(app): State<Arc<App>>,
    Viewer(who): Viewer,
    PathOf(id): PathOf<String>,
) -> Result<Json<ArtifactList>, Fault> {
    let job = jobs::resolve(&app, &who.scope(), &id).await?;
    let mut all = app.store.artifacts(&who.scope(), &job.id).await?;
    all.retain(|artifact| artifact.at == job.attempt());
    if all.is_empty() {
        jobs::check_kept(&app, &who.scope(), &job.attempt(), "artifacts", |attempt| attempt.files_gone_at).await?;
    }
    Ok(Json(ArtifactList { artifacts: all.into_iter().map(feed::artifact_view).collect() }))
}

#[derive(Debug, Deserialize)]
pub struct JobArtifact {
    id: String,
    path: String,
}

/// One artifact's bytes, always as a download: what a build made never acts in this origin.
#[utoipa::path(
    get, path = path::JOB_ARTIFACT, tag = "jobs", params(("id" = String, Path,), ("path" = String, Path,)),
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"), (status = 206, body = Vec<u8>, content_type = "application/octet-stream"), (status = 304), (status = 307, description = "The bytes are at `Location`, for some minutes and without a token", headers(("Location" = String))))
)]
pub async fn get_artifact(
    State(app): State<Arc<App>>,
    Viewer(who): Viewer,
    PathOf(place): PathOf<JobArtifact>,
    headers: HeaderMap,
) -> Result<Response, Fault> {
    let JobArtifact { id, path: name } = place;
    let job = jobs::resolve(&app, &who.scope(), &id).await?;
    let artifact = app.store.artifact(&who.scope(), &job.attempt(), &name).await?;
    if artifact.is_none() {
        jobs::check_kept(&app, &who.scope(), &job.attempt(), "artifacts", |attempt| attempt.files_gone_at).await?;
    }
    let artifact = artifact.ok_or_else(|| OpError::not_found("artifact"))?;
    if let Some(target) = &artifact.link {
        let message = format!("`{}` is a link to `{}` and has no bytes", showable(&name), showable(target));
        return Err(Fault::new(ErrorCode::NotFound, message));
    }
    let etag = format!("\"{}\"", artifact.sha256);
    if header_text(&headers, "if-none-match").is_some_and(|tags| tags.split(',').any(|tag| tag.trim() == etag)) {
        return Ok((StatusCode::NOT_MODIFIED, [(header::ETAG, etag)]).into_response());
    }
    if let Some(link) = depot(&app, who.org).artifact_link(&artifact.sha256, &range::attachment(&name)).await? {
        return Ok((StatusCode::TEMPORARY_REDIRECT, [NO_STORE], [(header::ETAG, etag), (header::LOCATION, link)])
            .into_response());
    }
    // A range of what is no longer there is no range.
    let same = header_text(&headers, "if-range").is_none_or(|tag| tag == etag);
    let (status, part) = match range::asked(header_text(&headers, "range").filter(|_| same), artifact.size) {
        Asked::Whole => (StatusCode::OK, 0..artifact.size),
        Asked::Part(part) => (StatusCode::PARTIAL_CONTENT, part),
        Asked::Nothing => return Ok(unsatisfiable(artifact.size)),
    };
    let (_, body) = depot(&app, who.org).read_artifact(&artifact.sha256, Some(part.clone())).await?;
    let disposition = [(header::CONTENT_DISPOSITION, range::attachment(&name))];
    let headers = [BINARY, NO_ORIGIN, RANGES, NO_CACHE];
    let mut response = (status, headers, disposition, [(header::ETAG, etag)], outgoing(body)).into_response();
    response.headers_mut().insert(header::CONTENT_LENGTH, (part.end - part.start).into());
    if status == StatusCode::PARTIAL_CONTENT {
        content_range(&mut response, part.start, part.end, artifact.size);
    }
    Ok(response)
}
