//! A follower that comes back whatever happens, and writes down each frame that it gets.

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use futures_util::StreamExt as _;
use reqwest::{Method, Response};
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::pause;
use crate::history::{Recorder, Seen};
use crate::observe::{Api, BEAT};

/// How far a follower is.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    pub event: u64,
    pub attempt: u32,
    /// Bytes of that attempt's log.
    pub offset: u64,
    /// The job, once the last frame has come.
    pub end: Option<Value>,
    /// Connections that ended before the job.
    pub cuts: u64,
}

impl Progress {
    /// Whether all but three bytes of so many are here: what may be half a character comes with the rest of it.
    pub fn has(&self, bytes: u64) -> bool {
        self.offset + 3 >= bytes
    }
}

/// Follows a job's feed to its end in the background. Whatever does not join on is written down, for the check to find.
pub fn feed(api: Api, job: &str, who: &str, recorder: Recorder) -> watch::Receiver<Progress> {
    let (told, heard) = watch::channel(Progress::default());
    let (job, who) = (job.to_owned(), who.to_owned());
    spawn(async move {
        while told.borrow().end.is_none() && !told.is_closed() {
            // A farm that is away or that cuts the connection is asked again.
            let _cut_or_away = feed_once(&api, &job, &who, &recorder, &told).await;
            pause(BEAT).await;
        }
    });
    heard
}

async fn feed_once(api: &Api, job: &str, who: &str, recorder: &Recorder, told: &watch::Sender<Progress>) -> Result<()> {
    let at = told.borrow().clone();
    let path = format!("/v1/jobs/{job}/feed?cursor={}.{}.{}", at.event, at.attempt, at.offset);
    let answer = api.request(Method::GET, &path).header("accept", "application/x-ndjson").send().await?;
    ensure!(answer.status().is_success(), "{}", answer.status());
    let read = frames(answer, job, who, recorder, told).await;
    if told.borrow().end.is_none() {
        told.send_modify(|progress| progress.cuts += 1);
    }
    read
}

async fn frames(
    answer: Response,
    job: &str,
    who: &str,
    recorder: &Recorder,
    told: &watch::Sender<Progress>,
) -> Result<()> {
    let mut body = answer.bytes_stream();
    let mut rest = Vec::new();
    while let Some(bytes) = body.next().await {
        rest.extend_from_slice(&bytes?);
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            if line.len() > 1 {
                frame(&serde_json::from_slice(&line)?, job, who, recorder, told)?;
            }
        }
    }
    Ok(())
}

fn frame(frame: &Value, job: &str, who: &str, recorder: &Recorder, told: &watch::Sender<Progress>) -> Result<()> {
    match frame["type"].as_str().context("a frame has a type")? {
        "event" => {
            recorder.event(who, job, frame);
            told.send_modify(|progress| progress.event = frame["seq"].as_u64().unwrap_or(0));
        }
        "log" => {
            let bytes = match (frame["text"].as_str(), frame["base64"].as_str()) {
                (Some(text), _) => text.as_bytes().to_vec(),
                (None, encoded) => base64::engine::general_purpose::STANDARD.decode(encoded.unwrap_or("?"))?,
            };
            let attempt = u32::try_from(frame["attempt"].as_u64().unwrap_or(0))?;
            let offset = frame["offset"].as_u64().context("a log frame has an offset")?;
            recorder.log(who, job, attempt, offset, &bytes);
            told.send_modify(|progress| (progress.attempt, progress.offset) = (attempt, offset + bytes.len() as u64));
        }
        "end" => {
            recorder.end(who, &frame["job"]);
            told.send_modify(|progress| progress.end = Some(frame["job"].clone()));
        }
        _ => {}
    }
    Ok(())
}

/// Follows the raw log of one attempt to its end, which `is_over` tells, and returns how many bytes came.
pub fn raw(api: Api, job: &str, attempt: u32, who: &str, recorder: Recorder) -> JoinHandle<Result<u64>> {
    let (job, who) = (job.to_owned(), who.to_owned());
    spawn(async move {
        let mut at = 0;
        loop {
            let path = format!("/v1/jobs/{job}/log?attempt={attempt}&follow=1&offset={at}");
            if let Ok(answer) = api.request(Method::GET, &path).send().await
                && answer.status().is_success()
            {
                let mut body = answer.bytes_stream();
                loop {
                    match body.next().await {
                        Some(Ok(bytes)) => {
                            recorder.log(&who, &job, attempt, at, &bytes);
                            at += bytes.len() as u64;
                        }
                        Some(Err(_)) => break,
                        None => {
                            recorder.write(Seen::Through { who, job, attempt });
                            return Ok(at);
                        }
                    }
                }
            }
            pause(BEAT).await;
        }
    })
}

#[expect(clippy::disallowed_methods, reason = "an observer outside of the farm; it ends with its test's runtime")]
fn spawn<T: Send + 'static>(task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    tokio::spawn(task)
}
