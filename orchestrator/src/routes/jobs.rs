//! S: jobs over HTTP: submit, list, show, cancel, and the feed.

use std::str::FromStr as _;
use std::sync::Arc;
use std::time::Duration;

use alloy_shared::id::JobId;
use alloy_shared::limits;
use alloy_shared::wire::job::{FeedCursor, FeedFrame, JobPage, JobSpec, JobView, StateWord, SubmitJob};
use alloy_shared::wire::{ErrorCode, header as own, path};
use axum::Json;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::extract::{Developer, PathOf, QueryOf, Viewer, header_text, parameter, parse, whole};
use crate::App;
use crate::error::{Fault, showable};
use crate::feed;
use crate::ops::archive::Format;
use crate::ops::job as ops;
use crate::ops::upload::Depot;
use crate::store::{Job, JobFilter, Scope};

/// Frames that are ready leave together, up to this many bytes.
const BURST_BYTES: usize = 256 << 10;

/// Submits a job: as JSON, or as a tar (zstd, gzip or plain) with the spec in the query.
#[utoipa::path(
    post, path = path::JOBS, tag = "jobs",
    params(
        ("Idempotency-Key" = Option<String>, Header, description = "The same key and body give the same job"),
        ("command" = Option<String>, Query, description = "With a tar: the line for the shell"),
        ("artifact" = Option<Vec<String>>, Query, description = "With a tar: a glob of files to keep"),
        ("label" = Option<Vec<String>>, Query, description = "With a tar: key=value that the worker must have"),
        ("env" = Option<Vec<String>>, Query, description = "With a tar: NAME=value for the command"),
        ("image" = Option<String>, Query, description = "With a tar: the VM image"),
        ("network" = Option<String>, Query, description = "With a tar: none, default, or allow= and IPv4 ranges with commas"),
        ("timeout_ms" = Option<u64>, Query, description = "With a tar: how long the command may run"),
        ("retries" = Option<u32>, Query, description = "With a tar: how often a failed command is tried again"),
    ),
    request_body = SubmitJob,
    responses((status = 201, body = JobView), (status = 200, body = JobView, description = "The key was known"))
)]
pub async fn submit(
    State(app): State<Arc<App>>,
    Developer(who): Developer,
    request: Request,
) -> Result<Response, Fault> {
    let (parts, body) = request.into_parts();
    let key = match parts.headers.get(own::IDEMPOTENCY_KEY) {
        Some(value) => {
            let text = value.to_str().map_err(|_| parameter("Idempotency-Key", "is printable ASCII"))?;
            Some(text.to_owned())
        }
        None => None,
    };
    let submit = match Media::of(&parts.headers)? {
        Media::Json => {
            let bytes = whole(body, limits::JSON_BODY_MAX as usize).await?;
            parse(&bytes)?
        }
        Media::Tar(format) => {
            let spec = spec_of(parts.uri.query().unwrap_or_default())?;
            let depot = Depot {
                store: &*app.store,
                blobs: &app.blobs,
                env: &app.env,
                fresh_ms: app.keep.grace_ms,
                org: who.org,
            };
            let body = body.into_data_stream().map_err(std::io::Error::other).boxed();
            SubmitJob { spec, source: Some(depot.tar(body, Some(format)).await?) }
        }
    };
    let done = ops::submit(&app, &who, submit, key).await?;
    let view = ops::view(&app, &done.job).await?;
    let status = if done.created { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, [(header::LOCATION, path::job(view.id))], Json(view)).into_response())
}

/// What a body is, by its `Content-Type`.
enum Media {
    Json,
    Tar(Format),
}

impl Media {
    fn of(headers: &HeaderMap) -> Result<Self, Fault> {
        let text = header_text(headers, "content-type").unwrap_or_default();
        match text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase().as_str() {
            "application/json" => Ok(Self::Json),
            "application/zstd" => Ok(Self::Tar(Format::Zstd)),
            "application/gzip" | "application/x-gzip" => Ok(Self::Tar(Format::Gzip)),
            "application/x-tar" => Ok(Self::Tar(Format::Plain)),
            other => Err(Fault::new(ErrorCode::InvalidBody, format!("a body of type `{}` is no job", showable(other)))
                .hint("send application/json, or a tar as application/zstd, application/gzip or application/x-tar")),
        }
    }
}

/// The spec in a query string: repeated keys are lists.
fn spec_of(query: &str) -> Result<JobSpec, Fault> {
    let uri = axum::http::Uri::builder().path_and_query(format!("/?{query}")).build();
    let uri = uri.map_err(|_| parameter("query", "cannot be read"))?;
    let pairs = axum::extract::Query::<Vec<(String, String)>>::try_from_uri(&uri);
    let axum::extract::Query(pairs) = pairs.map_err(|_| parameter("query", "cannot be read"))?;
    let mut spec = JobSpec::default();
    for (name, value) in pairs {
        let pair = || value.split_once('=').ok_or_else(|| parameter(&name, "is written name=value"));
        match name.as_str() {
            "command" => spec.shell = Some(value),
            "artifact" => spec.artifacts.push(value),
            "label" => {
                let (key, value) = pair()?;
                spec.labels.insert(key.to_owned(), value.to_owned());
            }
            "env" => {
                let (key, value) = pair()?;
                spec.env.insert(key.to_owned(), value.to_owned());
            }
            "image" => spec.image = Some(value),
            "network" => spec.network = value.parse().map_err(|why: String| parameter(&name, &showable(&why)))?,
            "timeout_ms" => spec.timeout_ms = Some(number(&name, &value)?),
            "queue_timeout_ms" => spec.queue_timeout_ms = Some(number(&name, &value)?),
            "retries" => spec.retries = number(&name, &value)?,
            other => return Err(parameter(&showable(other), "is not a parameter of this route")),
        }
    }
    Ok(spec)
}

fn number<T: std::str::FromStr>(name: &str, text: &str) -> Result<T, Fault> {
    text.parse().map_err(|_| parameter(name, "is a whole number"))
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListQuery {
    limit: Option<u32>,
    cursor: Option<String>,
    /// Words with commas between them.
    state: Option<String>,
    #[serde(default)]
    mine: bool,
}

/// Jobs, the newest first.
#[utoipa::path(
    get, path = path::JOBS, tag = "jobs",
    params(
        ("limit" = Option<u32>, Query, description = "At most this many, 1 to 200; 50 if absent"),
        ("cursor" = Option<String>, Query, description = "`next_cursor` of the page before"),
        ("state" = Option<String>, Query, description = "Only these states, with commas between them"),
        ("mine" = Option<bool>, Query, description = "Only those that this token submitted"),
    ),
    responses((status = 200, body = JobPage))
)]
pub async fn list(
    State(app): State<Arc<App>>,
    Viewer(who): Viewer,
    QueryOf(query): QueryOf<ListQuery>,
) -> Result<Json<JobPage>, Fault> {
    let limit = query.limit.unwrap_or(50);
    if !(1..=limits::PAGE_MAX).contains(&limit) {
        return Err(parameter("limit", &format!("is 1 to {}", limits::PAGE_MAX)));
    }
    let before = match &query.cursor {
        Some(text) => Some(JobId::from_str(text).map_err(|_| parameter("cursor", "is not one of ours"))?),
        None => None,
    };
    let filter = JobFilter {
        states: states(query.state.as_deref())?,
        created_by: query.mine.then(|| who.caller.clone()),
        before,
    };
    let mut jobs = app.store.jobs(&who.scope(), &filter, limit + 1).await?;
    let more = jobs.len() > limit as usize;
    jobs.truncate(limit as usize);
    let next_cursor = jobs.last().filter(|_| more).map(|job| job.id.to_string());
    Ok(Json(JobPage { jobs: ops::views(&app, &jobs).await?, next_cursor }))
}

fn states(text: Option<&str>) -> Result<Vec<StateWord>, Fault> {
    let words = text.into_iter().flat_map(|text| text.split(',')).map(str::trim).filter(|word| !word.is_empty());
    words
        .map(|word| if word == "cancelled" { "canceled" } else { word })
        .map(|word| word.parse().map_err(|bad: alloy_shared::id::BadName| parameter("state", &bad.why)))
        .collect()
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShowQuery {
    wait: Option<Wait>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Wait {
    Terminal,
}

/// One job. With `?wait=terminal` the answer comes when the job has ended; white space before it keeps the connection.
#[utoipa::path(
    get, path = path::JOB, tag = "jobs",
    params(
        ("id" = String, Path, description = "The id, or at least its last 6 characters"),
        ("wait" = Option<String>, Query, description = "`terminal`: answer when the job has ended"),
    ),
    responses((status = 200, body = JobView))
)]
pub async fn show(
    State(app): State<Arc<App>>,
    Viewer(who): Viewer,
    PathOf(id): PathOf<String>,
    QueryOf(query): QueryOf<ShowQuery>,
) -> Result<Response, Fault> {
    let job = ops::resolve(&app, &who.scope(), &id).await?;
    match query.wait {
        Some(Wait::Terminal) if !job.state.is_done() => Ok(when_done(app, who.scope(), job)),
        Some(Wait::Terminal) | None => Ok(Json(ops::view(&app, &job).await?).into_response()),
    }
}

/// Status and headers leave at once, so a fault that comes later breaks the body off: half an answer is no answer.
fn when_done(app: Arc<App>, scope: Scope, job: Job) -> Response {
    let (tx, rx) = mpsc::channel::<std::io::Result<Bytes>>(1);
    let stop = app.stopping.clone();
    let env = app.env.clone();
    let wait = async move {
        let until = app.env.now().mono + limits::WAIT_MAX_MS;
        let job = ops::wait_terminal(&app, &scope, job.id, until).await?;
        ops::view(&app, &job).await
    };
    env.spawn(
        "wait",
        Box::pin(async move {
            let mut wait = std::pin::pin!(wait);
            loop {
                let keep_alive = tokio::time::sleep(Duration::from_millis(limits::KEEP_ALIVE_MS));
                let done = tokio::select! {
                    biased;
                    () = tx.closed() => return,
                    () = stop.cancelled() => Some(Err(std::io::Error::other("the orchestrator is stopping"))),
                    done = &mut wait => Some(done.map_err(std::io::Error::other).map(|view| json(&view))),
                    () = keep_alive => None,
                };
                let end = done.is_some();
                // A reader that has gone is noticed at the top.
                let _ = tx.send(done.unwrap_or(Ok(Bytes::from_static(b"\n")))).await;
                if end {
                    return;
                }
            }
        }),
    );
    let body = Body::from_stream(stream::unfold(rx, async |mut rx| rx.recv().await.map(|piece| (piece, rx))));
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

fn json<T: serde::Serialize>(value: &T) -> Bytes {
    serde_json::to_vec(value).unwrap_or_else(|_| unreachable!("a view is plain data")).into()
}

/// Cancels a job. A job that is canceled already stays so.
#[utoipa::path(post, path = path::JOB_CANCEL, tag = "jobs", params(("id" = String, Path,)), responses((status = 202, body = JobView)))]
pub async fn cancel(
    State(app): State<Arc<App>>,
    Developer(who): Developer,
    PathOf(id): PathOf<String>,
) -> Result<(StatusCode, Json<JobView>), Fault> {
    let job = ops::resolve(&app, &who.scope(), &id).await?;
    let job = ops::cancel(&app, &who, job.id).await?;
    Ok((StatusCode::ACCEPTED, Json(ops::view(&app, &job).await?)))
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeedQuery {
    cursor: Option<String>,
}

/// Events and log of a job until its end: SSE with ids to resume from, or with `Accept: application/x-ndjson` one JSON
/// object a line. An empty line or a comment says that the stream lives.
#[utoipa::path(
    get, path = path::JOB_FEED, tag = "jobs",
    params(
        ("id" = String, Path,),
        ("cursor" = Option<String>, Query, description = "Go on after this: `event.attempt.offset`"),
        ("Last-Event-ID" = Option<String>, Header, description = "The same, as browsers send it"),
    ),
    responses((status = 200, body = FeedFrame, content_type = "text/event-stream"))
)]
pub async fn feed(
    State(app): State<Arc<App>>,
    Viewer(who): Viewer,
    PathOf(id): PathOf<String>,
    QueryOf(query): QueryOf<FeedQuery>,
    headers: HeaderMap,
) -> Result<Response, Fault> {
    let text =
        query.cursor.as_deref().or_else(|| header_text(&headers, "last-event-id")).filter(|text| !text.is_empty());
    let cursor = match text {
        Some(text) => text.parse().map_err(|bad: alloy_shared::id::BadName| parameter("cursor", &bad.why))?,
        None => FeedCursor::default(),
    };
    let framing = Framing::of(header_text(&headers, "accept"));
    let job = ops::resolve(&app, &who.scope(), &id).await?;
    let stop = app.stopping.clone();
    let frames = feed::follow(app, who.scope(), job.id, cursor);
    let body = Body::from_stream(stream::unfold((frames, stop, framing), async |(mut frames, stop, framing)| {
        let piece = next_burst(&mut frames, &stop, framing).await?;
        Some((Ok::<_, std::convert::Infallible>(piece), (frames, stop, framing)))
    }));
    let mut response = ([(header::CONTENT_TYPE, framing.media_type())], body).into_response();
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // Asks proxies of the nginx family to pass bytes on as they come.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    Sse,
    Ndjson,
}

impl Framing {
    fn of(accept: Option<&str>) -> Self {
        if accept.is_some_and(|text| text.contains("application/x-ndjson")) { Self::Ndjson } else { Self::Sse }
    }
    fn media_type(self) -> &'static str {
        match self {
            Self::Sse => "text/event-stream",
            Self::Ndjson => "application/x-ndjson",
        }
    }
    fn keep_alive(self) -> &'static [u8] {
        match self {
            Self::Sse => b":\n\n",
            Self::Ndjson => b"\n",
        }
    }
    fn write(self, out: &mut BytesMut, cursor: FeedCursor, frame: &FeedFrame) {
        match self {
            Self::Sse => {
                let kind = match frame {
                    FeedFrame::Event(_) => "event",
                    FeedFrame::Log(_) => "log",
                    FeedFrame::Worker(_) => "worker",
                    FeedFrame::End { .. } => "end",
                };
                out.put_slice(format!("id: {cursor}\nevent: {kind}\ndata: ").as_bytes());
                // JSON holds no raw line end, so one `data:` line is enough.
                out.put_slice(&json(frame));
                out.put_slice(b"\n\n");
            }
            Self::Ndjson => {
                out.put_slice(&json(frame));
                out.put_u8(b'\n');
            }
        }
    }
}

/// The next bytes of a feed: all frames that are ready, or a sign of life. `None`: it is over.
async fn next_burst(
    frames: &mut mpsc::Receiver<(FeedCursor, FeedFrame)>,
    stop: &CancellationToken,
    framing: Framing,
) -> Option<Bytes> {
    let (cursor, frame) = tokio::select! {
        biased;
        () = stop.cancelled() => return None,
        frame = frames.recv() => frame?,
        () = tokio::time::sleep(Duration::from_millis(limits::KEEP_ALIVE_MS)) => {
            return Some(Bytes::from_static(framing.keep_alive()));
        }
    };
    let mut out = BytesMut::new();
    framing.write(&mut out, cursor, &frame);
    while out.len() < BURST_BYTES
        && let Ok((cursor, frame)) = frames.try_recv()
    {
        framing.write(&mut out, cursor, &frame);
    }
    Some(out.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloy_shared::wire::job::LogFrame;

    #[test]
    fn a_query_is_a_spec() {
        let query =
            "command=make%20test&artifact=*.zip&artifact=out%2F**&label=chip%3Dm4&env=A%3Db%3Dc&timeout_ms=5&retries=2";
        let spec = spec_of(query).unwrap();
        assert_eq!(spec.shell.as_deref(), Some("make test"));
        assert_eq!(spec.artifacts, ["*.zip", "out/**"]);
        assert_eq!(spec.labels["chip"], "m4");
        assert_eq!(spec.env["A"], "b=c");
        assert_eq!((spec.timeout_ms, spec.retries), (Some(5), 2));
        for wrong in ["label=m4", "timeout_ms=soon", "retries=-1", "comand=x", "env=A"] {
            assert_eq!(spec_of(wrong).unwrap_err().code(), ErrorCode::InvalidParameter, "{wrong}");
        }
    }

    #[test]
    fn states_are_words_with_commas() {
        assert_eq!(states(Some("queued, cancelled,")).unwrap(), [StateWord::Queued, StateWord::Canceled]);
        assert!(states(None).unwrap().is_empty());
        assert!(states(Some("waiting")).is_err());
    }

    fn log(offset: u64, text: &str) -> (FeedCursor, FeedFrame) {
        let frame = FeedFrame::Log(LogFrame::new(1, offset, text.as_bytes()));
        (FeedCursor { event: 2, attempt: 1, offset: offset + text.len() as u64 }, frame)
    }

    #[tokio::test]
    async fn ready_frames_leave_together_and_every_sse_message_has_its_cursor() {
        let (tx, mut rx) = mpsc::channel(8);
        tx.send(log(0, "a\n")).await.unwrap();
        tx.send(log(2, "b")).await.unwrap();
        drop(tx);
        let stop = CancellationToken::new();
        let burst = next_burst(&mut rx, &stop, Framing::Sse).await.unwrap();
        let text = String::from_utf8(burst.to_vec()).unwrap();
        assert!(text.starts_with("id: 2.1.2\nevent: log\ndata: {"), "{text}");
        assert!(text.contains("\n\nid: 2.1.3\nevent: log\ndata: {") && text.ends_with("}\n\n"), "{text}");
        assert_eq!(text.lines().filter(|line| line.starts_with("data: ")).count(), 2);
        assert!(next_burst(&mut rx, &stop, Framing::Sse).await.is_none());
    }

    #[tokio::test]
    async fn a_stop_ends_a_silent_feed() {
        let (_tx, mut rx) = mpsc::channel(1);
        let stop = CancellationToken::new();
        stop.cancel();
        assert!(next_burst(&mut rx, &stop, Framing::Ndjson).await.is_none());
    }

    #[test]
    fn ndjson_comes_by_accept_only() {
        for (accept, framing) in [
            (None, Framing::Sse),
            (Some("*/*"), Framing::Sse),
            (Some("application/x-ndjson"), Framing::Ndjson),
            (Some("text/html, application/x-ndjson;q=0.9"), Framing::Ndjson),
        ] {
            assert_eq!(Framing::of(accept), framing);
        }
        let mut out = BytesMut::new();
        let (cursor, frame) = log(0, "x\ny");
        Framing::Ndjson.write(&mut out, cursor, &frame);
        assert_eq!(out.iter().filter(|byte| **byte == b'\n').count(), 1);
    }
}
