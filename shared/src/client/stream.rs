//! S: answers that go on: feed, log, downloads and blobs. Each is a task that resumes from where it is until all is there.

use std::collections::HashSet;

use bytes::{Buf, Bytes, BytesMut};
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE};
use reqwest::{Response, StatusCode};
use tokio::sync::mpsc;

use super::call::{Budget, Call, Failure, Kind, Lost};
use super::link::Linked;
use super::{Client, ClientError};
use crate::id::{AttemptRef, Digest, JobId};
use crate::limits;
use crate::secret::Secret;
use crate::wire::job::{FeedCursor, FeedFrame, JobView, LogFrame, StateWord};
use crate::wire::source::{BlobRequest, PackFrame, PackReader, check_path};
use crate::wire::{header, path};

/// What waits between the network and a slow reader. Beyond it the connection is not read, and so the farm waits.
const FEED_QUEUE: usize = 256;
const BYTES_QUEUE: usize = 64;
/// Frames are up to 9 MiB.
const FRAME_QUEUE: usize = 4;
/// Between two looks at a log that has ended for now, or at a job: a farm that does not wait is not hammered.
const LOOK_AGAIN_MS: u64 = 1_000;

/// What a follower of a job gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FeedItem {
    Frame(FeedFrame),
    /// The connection is gone; try number `tries` follows.
    Reconnecting {
        tries: u32,
        why: String,
    },
    /// It is back, at the byte where it was lost.
    Reconnected,
}

/// Which log, from where.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogQuery {
    /// Absent: the newest attempt's.
    pub attempt: Option<u32>,
    pub offset: u64,
    /// Goes on until the attempt has ended.
    pub follow: bool,
}

type Sender<T> = mpsc::Sender<Result<T, ClientError>>;

impl Client {
    /// Follows a job from a cursor to its end. Frames come in order, each once, whatever happens to the connection; the
    /// last one is `End`. An error ends the stream.
    pub fn feed(&self, id: JobId, cursor: FeedCursor) -> mpsc::Receiver<Result<FeedItem, ClientError>> {
        self.stream("feed", FEED_QUEUE, move |client, tx| async move {
            let mut cursor = cursor;
            let mut lost = Lost::default();
            while let Err(failure) = client.feed_once(id, &mut cursor, &mut lost, &tx).await {
                let why = failure.error.why().to_owned();
                let delay = lost.count(&*client.env, failure, Budget::Stream)?;
                give(&tx, FeedItem::Reconnecting { tries: lost.tries, why }).await;
                client.env.sleep_until(client.env.now().mono + delay).await;
            }
            Ok(())
        })
    }

    /// Waits until the job has ended.
    pub async fn job_wait(&self, id: JobId) -> Result<JobView, ClientError> {
        let call = Call::get(path::job(id)).query("wait", "terminal");
        let mut lost = Lost::default();
        loop {
            let asked = self.env.now().mono;
            match self.wait_once(&call, &mut lost).await {
                Ok(body) => {
                    let view: JobView = self.decode(&call, &body)?;
                    if view.state.is_terminal() {
                        return Ok(view);
                    }
                    lost.forget();
                    self.env.sleep_until(asked + LOOK_AGAIN_MS).await;
                }
                Err(failure) => lost.pause(&*self.env, failure, Budget::Stream).await?,
            }
        }
    }

    /// Reads a log's bytes from an offset, each once. The stream ends where the log ends.
    pub fn log(&self, id: JobId, query: LogQuery) -> mpsc::Receiver<Result<Bytes, ClientError>> {
        self.stream("log", BYTES_QUEUE, move |client, tx| async move {
            let mut at = query;
            let mut lost = Lost::default();
            loop {
                match client.log_once(id, &mut at, &mut lost, &tx).await {
                    Ok(()) if !at.follow => return Ok(()),
                    Ok(()) => client.after_log(id, &mut at, &mut lost).await?,
                    // It says nothing while the job does not.
                    Err(failure) if at.follow && failure.kind == Kind::Silent => {
                        client.after_log(id, &mut at, &mut lost).await?;
                    }
                    Err(failure) => lost.pause(&*client.env, failure, Budget::Stream).await?,
                }
            }
        })
    }

    /// Downloads an artifact's bytes from an offset, each once. The caller checks them against the artifact's digest.
    pub fn download(&self, id: JobId, artifact: &str, offset: u64) -> mpsc::Receiver<Result<Bytes, ClientError>> {
        let artifact = artifact.to_owned();
        self.stream("download", BYTES_QUEUE, move |client, tx| async move {
            // A path with `..` would be another URL.
            check_path(&artifact).map_err(|error| ClientError::protocol(error.to_string()))?;
            let mut at = Download { path: path::job_artifact(id, &artifact), offset, etag: None };
            let mut lost = Lost::default();
            while let Err(failure) = client.download_once(&mut at, &mut lost, &tx).await {
                lost.pause(&*client.env, failure, Budget::Stream).await?;
            }
            Ok(())
        })
    }

    /// Fetches blobs of an attempt's source. Frames are whole but not yet unpacked; what the farm does not have is
    /// missing from them.
    pub fn attempt_blobs(
        &self,
        at: &AttemptRef,
        grant: &Secret<String>,
        digests: Vec<Digest>,
    ) -> mpsc::Receiver<Result<PackFrame, ClientError>> {
        let call = Call::post(path::attempt_blobs(at)).grant(grant);
        self.stream("attempt blobs", FRAME_QUEUE, move |client, tx| async move {
            let mut missing: HashSet<Digest> = digests.iter().copied().collect();
            let mut lost = Lost::default();
            while !missing.is_empty() {
                let digests = digests.iter().filter(|digest| missing.contains(digest)).copied().collect();
                let call = call.clone().json(&BlobRequest { digests });
                match client.blobs_once(&call, &mut missing, &mut lost, &tx).await {
                    Ok(()) => return Ok(()),
                    Err(failure) => lost.pause(&*client.env, failure, Budget::Stream).await?,
                }
            }
            Ok(())
        })
    }

    /// Starts a task that fills a channel. It ends with its work, with an error, or when the reader is gone.
    fn stream<T, F>(
        &self,
        name: &'static str,
        bound: usize,
        work: impl FnOnce(Self, Sender<T>) -> F,
    ) -> mpsc::Receiver<Result<T, ClientError>>
    where
        T: Send + 'static,
        F: Future<Output = Result<(), ClientError>> + Send + 'static,
    {
        let (tx, rx) = mpsc::channel(bound);
        let work = work(self.clone(), tx.clone());
        self.env.spawn(
            name,
            Box::pin(async move {
                let done = tokio::select! {
                    biased;
                    () = tx.closed() => return,
                    done = work => done,
                };
                if let Err(error) = done {
                    // A reader that has gone wants no error either.
                    let _ = tx.send(Err(error)).await;
                }
            }),
        );
        rx
    }

    /// One connection that waits for a job. White space before the answer says that the farm waits too.
    async fn wait_once(&self, call: &Call, lost: &mut Lost) -> Result<Bytes, Failure> {
        let mut response = self.open(call).await?;
        let mut body = BytesMut::new();
        while let Some(piece) = self.piece(&mut response).await? {
            if body.len() + piece.len() > limits::JSON_ANSWER_MAX {
                return Err(Failure::last("the farm's view of the job is too long"));
            }
            if piece.trim_ascii().is_empty() {
                lost.forget();
            }
            body.extend_from_slice(&piece);
        }
        Ok(body.freeze())
    }

    /// One connection of a feed. Ends well only with the `End` frame.
    async fn feed_once(
        &self,
        id: JobId,
        cursor: &mut FeedCursor,
        lost: &mut Lost,
        tx: &Sender<FeedItem>,
    ) -> Result<(), Failure> {
        let call = Call::get(path::job_feed(id)).query("cursor", *cursor).header("accept", "application/x-ndjson");
        let mut response = self.open(&call).await?;
        if lost.tries > 0 {
            give(tx, FeedItem::Reconnected).await;
        }
        let mut lines = Lines::default();
        while let Some(piece) = self.piece(&mut response).await? {
            lines.push(&piece);
            while let Some(line) = lines.next_line().map_err(Failure::wrong)? {
                // A keep-alive is progress too; what was seen before is not.
                if line.is_empty() {
                    lost.forget();
                    continue;
                }
                let Some(frame) = read_frame(&line, cursor).map_err(Failure::wrong)? else { continue };
                lost.forget();
                let end = matches!(frame, FeedFrame::End { .. });
                give(tx, FeedItem::Frame(frame)).await;
                if end {
                    return Ok(());
                }
            }
        }
        Err(self.cut("the farm ended the feed before the job"))
    }

    async fn log_once(&self, id: JobId, at: &mut LogQuery, lost: &mut Lost, tx: &Sender<Bytes>) -> Result<(), Failure> {
        let mut call = Call::get(path::job_log(id)).query("offset", at.offset);
        if let Some(attempt) = at.attempt {
            call = call.query("attempt", attempt);
        }
        if at.follow {
            call = call.query("follow", 1);
        }
        let mut response = self.open(&call).await?;
        let attempt: Option<u32> = number(&response, header::ATTEMPT);
        match (at.attempt, attempt) {
            (Some(asked), Some(given)) if asked != given => {
                return Err(Failure::last(format!("the farm sends the log of attempt {given}, asked was {asked}")));
            }
            (None, None) => return Err(Failure::last("the farm does not say which attempt this log is of")),
            (asked, given) => at.attempt = asked.or(given),
        }
        let start = number(&response, header::OFFSET).unwrap_or(at.offset);
        self.copy(&mut response, start, &mut at.offset, lost, tx).await
    }

    /// Where a followed log goes no further: the attempt has ended, or only somebody's patience.
    async fn after_log(&self, id: JobId, at: &mut LogQuery, lost: &mut Lost) -> Result<(), ClientError> {
        let job = self.ask::<JobView>(Call::get(path::job(id)).patient()).await?;
        lost.forget();
        let requeued = job.state == StateWord::Queued && job.attempt > 0;
        if job.state.is_terminal() || requeued || at.attempt.is_some_and(|attempt| attempt < job.attempt) {
            // One last read, begun after the end was known, misses nothing.
            at.follow = false;
        } else {
            self.env.sleep_until(self.env.now().mono + LOOK_AGAIN_MS).await;
        }
        Ok(())
    }

    async fn download_once(&self, at: &mut Download, lost: &mut Lost, tx: &Sender<Bytes>) -> Result<(), Failure> {
        let mut call = Call::get(&at.path);
        if at.offset > 0 {
            // From one byte earlier, because a range of no bytes is refused: an artifact that is already whole ends well.
            call = call.header("range", format!("bytes={}-", at.offset - 1));
            if let Some(etag) = &at.etag {
                call = call.header("if-range", etag);
            }
        }
        let Linked { mut response, etag } = self.open_linked(&call).await?;
        if at.etag.is_some() && at.etag != etag {
            return Err(Failure::last("the artifact was replaced while it was downloaded; download it again"));
        }
        at.etag = etag;
        let (start, total) = extent(&response).map_err(Failure::wrong)?;
        self.copy(&mut response, start, &mut at.offset, lost, tx).await?;
        match total {
            Some(total) if total != at.offset => {
                Err(Failure::wrong(format!("the artifact has {total} bytes, {} arrived", at.offset)))
            }
            Some(_) | None => Ok(()),
        }
    }

    async fn blobs_once(
        &self,
        call: &Call,
        missing: &mut HashSet<Digest>,
        lost: &mut Lost,
        tx: &Sender<PackFrame>,
    ) -> Result<(), Failure> {
        let mut response = self.open(call).await?;
        let mut reader = PackReader::default();
        while let Some(piece) = self.piece(&mut response).await? {
            reader.push(&piece);
            while let Some(frame) = reader.next_frame().map_err(|error| Failure::wrong(error.to_string()))? {
                for blob in &frame.header.blobs {
                    missing.remove(&blob.digest);
                }
                lost.forget();
                give(tx, frame).await;
            }
        }
        reader.finish().map_err(|error| self.cut(error.to_string()))
    }

    /// Passes on a body that begins at `start` from `offset` on, and moves `offset` along.
    async fn copy(
        &self,
        response: &mut Response,
        start: u64,
        offset: &mut u64,
        lost: &mut Lost,
        tx: &Sender<Bytes>,
    ) -> Result<(), Failure> {
        let Some(mut seen) = offset.checked_sub(start) else {
            return Err(Failure::wrong(format!("the answer starts at byte {start}, asked was {offset}")));
        };
        while let Some(mut piece) = self.piece(response).await? {
            let skip = seen.min(piece.len() as u64);
            seen -= skip;
            piece.advance(skip as usize);
            if !piece.is_empty() {
                *offset += piece.len() as u64;
                lost.forget();
                give(tx, piece).await;
            }
        }
        Ok(())
    }
}

/// A download's place.
struct Download {
    path: String,
    offset: u64,
    etag: Option<String>,
}

/// Hands an item over. A reader that is gone is noticed by the task around, which then ends.
async fn give<T>(tx: &Sender<T>, item: T) {
    let _ = tx.send(Ok(item)).await;
}

fn number<T: std::str::FromStr>(response: &Response, name: &str) -> Option<T> {
    response.headers().get(name)?.to_str().ok()?.parse().ok()
}

/// Where a body begins and how long the whole is.
fn extent(response: &Response) -> Result<(u64, Option<u64>), String> {
    if response.status() != StatusCode::PARTIAL_CONTENT {
        return Ok((0, number(response, CONTENT_LENGTH.as_str())));
    }
    let range = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok()).unwrap_or_default();
    let parts = range.strip_prefix("bytes ").and_then(|range| range.split_once('/'));
    let start = parts.and_then(|(range, _)| range.split_once('-')?.0.parse().ok());
    match (start, parts) {
        (Some(start), Some((_, total))) => Ok((start, total.parse().ok())),
        (_, _) => Err("a partial answer does not say which part it is".to_owned()),
    }
}

/// Cuts bytes into lines.
#[derive(Default)]
struct Lines {
    buffer: BytesMut,
    /// Bytes at the front that hold no newline.
    seen: usize,
}

impl Lines {
    fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    fn next_line(&mut self) -> Result<Option<Bytes>, String> {
        match self.buffer[self.seen..].iter().position(|byte| *byte == b'\n') {
            Some(at) => {
                let line = self.buffer.split_to(self.seen + at).freeze();
                self.buffer.advance(1);
                self.seen = 0;
                Ok(Some(line))
            }
            None if self.buffer.len() > limits::FEED_LINE_MAX => {
                Err(format!("a line of the feed is longer than {} bytes", limits::FEED_LINE_MAX))
            }
            None => {
                self.seen = self.buffer.len();
                Ok(None)
            }
        }
    }
}

/// Reads a line and fits it to the cursor. `None`: seen before, or of a kind that this version does not know.
pub(super) fn read_frame(line: &[u8], cursor: &mut FeedCursor) -> Result<Option<FeedFrame>, String> {
    #[derive(serde::Deserialize)]
    struct Unknown<'a> {
        r#type: &'a str,
        seq: Option<u64>,
    }
    // A tagged enum copies every string twice; log frames are nearly all of the bytes.
    let frame = if line.starts_with(br#"{"type":"log","#) {
        serde_json::from_slice(line).map(FeedFrame::Log)
    } else {
        serde_json::from_slice(line)
    };
    match (frame, serde_json::from_slice::<Unknown<'_>>(line)) {
        (Ok(frame), _) => fit(frame, cursor),
        (Err(_), Ok(Unknown { r#type: "event", seq: Some(seq) })) => next_event(seq, cursor).map(|_| None),
        (Err(error), Ok(Unknown { r#type: "log" | "end" | "event", .. }) | Err(_)) => {
            Err(format!("a line of the feed is not understood: {error}"))
        }
        (Err(_), Ok(_)) => Ok(None),
    }
}

/// Fits a frame to the cursor and moves it: nothing may be missing, and nothing is passed on twice.
fn fit(frame: FeedFrame, cursor: &mut FeedCursor) -> Result<Option<FeedFrame>, String> {
    match frame {
        FeedFrame::Event(event) => {
            Ok(if next_event(event.seq, cursor)? { Some(FeedFrame::Event(event)) } else { None })
        }
        FeedFrame::Log(log) => Ok(next_log(log, cursor)?.map(FeedFrame::Log)),
        FeedFrame::Worker(_) | FeedFrame::End { .. } => Ok(Some(frame)),
    }
}

fn next_event(seq: u64, cursor: &mut FeedCursor) -> Result<bool, String> {
    if seq <= cursor.event {
        return Ok(false);
    }
    if seq != cursor.event + 1 {
        return Err(format!("event {seq} of the feed follows event {}", cursor.event));
    }
    cursor.event = seq;
    Ok(true)
}

fn next_log(log: LogFrame, cursor: &mut FeedCursor) -> Result<Option<LogFrame>, String> {
    if log.attempt < cursor.attempt {
        return Ok(None);
    }
    let have = if log.attempt == cursor.attempt { cursor.offset } else { 0 };
    let bytes = match &log.text {
        Some(text) if log.base64.is_none() => text.as_bytes(),
        Some(_) | None => &log.bytes().ok_or("a log frame of the feed is damaged")?,
    };
    let Some(seen) = have.checked_sub(log.offset) else {
        return Err(format!("the feed's log jumps from byte {have} to {} of attempt {}", log.offset, log.attempt));
    };
    let end = log.offset + bytes.len() as u64;
    if end <= have {
        return Ok(None);
    }
    let rest = (seen > 0).then(|| LogFrame::new(log.attempt, have, &bytes[seen as usize..]));
    (cursor.attempt, cursor.offset) = (log.attempt, end);
    Ok(Some(rest.unwrap_or(log)))
}
