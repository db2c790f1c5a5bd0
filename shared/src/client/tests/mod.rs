//! The client against a server of a few lines on a real socket: it says exactly what a test wants, and cuts where it wants.

mod request;
mod stream;
mod transfer;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use serde::Serialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::*;
use crate::env::{Mono, Ms, Now};
use crate::runtime::{Lifecycle, SystemEnv};

pub(super) const TOKEN: &str = "alloy_pat_notatokenbutnobodymayseeit";

/// A clock that stands until a test moves it, and dice that always show 0, so that no retry waits.
pub(super) struct Bench {
    clock: watch::Sender<u64>,
    pub(super) life: Lifecycle,
    system: SystemEnv,
}

impl Bench {
    pub(super) fn new() -> Arc<Self> {
        let life = Lifecycle::new();
        Arc::new(Self { clock: watch::Sender::new(0), system: SystemEnv::new(life.clone()), life })
    }

    pub(super) fn advance(&self, ms: u64) {
        self.clock.send_modify(|now| *now += ms);
    }

    /// Runs something while time passes, a step whenever nothing else happens.
    pub(super) async fn pass<T>(&self, step_ms: u64, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return done,
                () = tokio::task::yield_now() => self.advance(step_ms),
            }
        }
    }

    pub(super) fn client(self: &Arc<Self>, url: &str) -> Client {
        let token = Some(Secret::new(TOKEN.to_owned()));
        let options = Options { url: url.to_owned(), token, agent: "alloy-test".to_owned() };
        Client::new(options, self.clone()).unwrap()
    }
}

#[async_trait]
impl Env for Bench {
    fn now(&self) -> Now {
        Now { wall: Ms(0), mono: Mono(*self.clock.borrow()) }
    }
    async fn sleep_until(&self, at: Mono) {
        self.clock.subscribe().wait_for(|now| *now >= at.0).await.unwrap();
    }
    fn spawn(&self, name: &'static str, task: BoxFuture<'static, ()>) {
        self.system.spawn(name, task);
    }
    fn dice(&self) -> u64 {
        0
    }
}

/// One request as it arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Heard {
    /// `GET /v1/info`.
    pub(super) line: String,
    pub(super) headers: BTreeMap<String, String>,
    pub(super) body: Vec<u8>,
}

impl Heard {
    pub(super) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
    /// The value of a query parameter.
    pub(super) fn query(&self, name: &str) -> Option<&str> {
        let (_, query) = self.line.split_once('?')?;
        query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
    }
}

pub(super) enum Reply {
    /// These bytes, then the connection is closed.
    Close(Vec<u8>),
    /// These bytes, then silence.
    Hold(Vec<u8>),
}

impl From<Vec<u8>> for Reply {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Close(bytes)
    }
}

pub(super) struct Server {
    pub(super) url: String,
    heard: Arc<Mutex<Vec<Heard>>>,
    /// How many requests came.
    pub(super) count: watch::Receiver<usize>,
}

impl Server {
    /// Answers each connection's one request.
    pub(super) async fn start<R: Into<Reply>>(mut answer: impl FnMut(&Heard) -> R + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let heard = Arc::new(Mutex::new(Vec::new()));
        let (counter, count) = watch::channel(0);
        let list = heard.clone();
        let serve = async move {
            let mut held = Vec::new();
            loop {
                let (mut socket, _) = listener.accept().await.unwrap();
                let Some(request) = hear(&mut socket).await else { continue };
                let reply = answer(&request).into();
                list.lock().unwrap().push(request);
                counter.send_modify(|count| *count += 1);
                // A client may have gone already.
                match reply {
                    Reply::Close(bytes) => drop(socket.write_all(&bytes).await),
                    Reply::Hold(bytes) => {
                        let _ = socket.write_all(&bytes).await;
                        held.push(socket);
                    }
                }
            }
        };
        // Outside the lifecycle that a test waits for.
        SystemEnv::detached().spawn("server", Box::pin(serve));
        Self { url, heard, count }
    }

    pub(super) fn heard(&self) -> Vec<Heard> {
        self.heard.lock().unwrap().clone()
    }
}

/// Reads one request with its body; `None` if the connection ends first.
async fn hear(socket: &mut TcpStream) -> Option<Heard> {
    let mut bytes = Vec::new();
    let head = loop {
        if let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break at;
        }
        if socket.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    };
    let text = String::from_utf8(bytes[..head].to_vec()).unwrap();
    let mut lines = text.lines();
    let line = lines.next().unwrap().trim_end_matches(" HTTP/1.1").to_owned();
    let headers: BTreeMap<String, String> = lines
        .map(|line| line.split_once(": ").unwrap())
        .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
        .collect();
    let mut rest = bytes.split_off(head + 4);
    let chunked = headers.contains_key("transfer-encoding");
    let len: usize = headers.get("content-length").map_or(0, |len| len.parse().unwrap());
    while if chunked { !rest.ends_with(b"0\r\n\r\n") } else { rest.len() < len } {
        if socket.read_buf(&mut rest).await.ok()? == 0 {
            return None;
        }
    }
    let body = if chunked { unchunk(&rest) } else { rest };
    Some(Heard { line, headers, body })
}

fn unchunk(mut bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    loop {
        let at = bytes.windows(2).position(|two| two == b"\r\n").unwrap();
        let len = usize::from_str_radix(std::str::from_utf8(&bytes[..at]).unwrap(), 16).unwrap();
        out.extend_from_slice(&bytes[at + 2..at + 2 + len]);
        bytes = &bytes[at + 2 + len + 2..];
        if len == 0 {
            return out;
        }
    }
}

/// A whole answer.
pub(super) fn reply(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut out = format!("HTTP/1.1 {status} Word\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
    for (name, value) in headers {
        out.push_str(&format!("{name}: {value}\r\n"));
    }
    out.push_str("\r\n");
    [out.as_bytes(), body].concat()
}

pub(super) fn json(value: &impl Serialize) -> Vec<u8> {
    reply(200, &[("content-type", "application/json")], &serde_json::to_vec(value).unwrap())
}

pub(super) fn problem(code: ErrorCode) -> Vec<u8> {
    let problem = Problem::new(code, format!("it is {}", code.as_str()));
    reply(code.http_status(), &[("retry-after", "0")], &serde_json::to_vec(&problem).unwrap())
}

/// A body without a length, with or without its end.
pub(super) fn chunked(status: u16, headers: &[(&str, &str)], body: &[u8], whole: bool) -> Vec<u8> {
    let mut out = format!("HTTP/1.1 {status} Word\r\nconnection: close\r\ntransfer-encoding: chunked\r\n");
    for (name, value) in headers {
        out.push_str(&format!("{name}: {value}\r\n"));
    }
    out.push_str("\r\n");
    let mut out = out.into_bytes();
    for part in body.chunks(777) {
        out.extend_from_slice(format!("{:x}\r\n", part.len()).as_bytes());
        out.extend_from_slice(part);
        out.extend_from_slice(b"\r\n");
    }
    if whole {
        out.extend_from_slice(b"0\r\n\r\n");
    }
    out
}

/// Random numbers from a seed that a failing test prints.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % n.max(1)
    }
}

pub(super) const JOB: JobId = JobId::from_raw(0x0190_0000_0000_7000_8000_0000_0000_0001);

pub(super) fn view(state: StateWord) -> JobView {
    serde_json::from_value(serde_json::json!({
        "id": JOB, "org": crate::id::DEFAULT_ORG, "state": state, "spec": {"shell": "true"}, "attempt": 1, "lost": 0,
        "created_at": "2026-01-01T00:00:00.000Z", "timings": {}, "url": "http://farm/jobs/1"
    }))
    .unwrap()
}
