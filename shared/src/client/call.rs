//! S: one request: how it is built, sent and judged, and when it may be sent again.

use std::error::Error as _;

use bytes::{Bytes, BytesMut};
use reqwest::header::{HeaderValue, RETRY_AFTER};
use reqwest::{Method, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Client, ClientError, unreachable};
use crate::env::{Env, Mono, backoff};
use crate::id::{printable, printable_to};
use crate::limits;
use crate::secret::Secret;
use crate::wire::Problem;

/// From sending a plain request to the last byte of its answer.
const ANSWER_MS: u64 = 30_000;
/// A body gets more time: a line this slow still counts as working.
const SLOW_LINE_BYTES_PER_MS: u64 = 16;
/// Between two bytes of a stream. Three signs of life fit in.
const IDLE_MS: u64 = 3 * limits::KEEP_ALIVE_MS;
/// How long a plain request is tried.
const QUICK_BUDGET_MS: u64 = 10_000;
const QUICK_TRIES: u32 = 8;
/// How long nobody may answer at the address before it counts as unreachable.
const CONNECT_BUDGET_MS: u64 = 2_000;
const CONNECT_TRIES: u32 = 3;
/// How long a stream without any progress is tried.
const STREAM_BUDGET_MS: u64 = 10 * 60_000;
/// Of a library's sentence: it may name a certificate's subject.
const WHY_MAX: usize = 300;
/// What the TLS library says of a peer that answers in plain text.
const NO_TLS: &str = "InvalidContentType";
const RETRY_BASE_MS: u64 = 200;
const RETRY_CAP_MS: u64 = 3_000;

/// A request as a value, so that it can be sent again exactly as it was.
#[derive(Debug, Clone)]
pub(super) struct Call {
    pub(super) method: Method,
    pub(super) path: String,
    query: Vec<(&'static str, String)>,
    headers: Vec<(&'static str, String)>,
    body: Bytes,
    grant: Option<Secret<String>>,
    deadline_ms: u64,
    repeat: bool,
    patient: bool,
}

impl Call {
    fn new(method: Method, path: impl Into<String>) -> Self {
        Self {
            method,
            path: path.into(),
            query: Vec::new(),
            headers: Vec::new(),
            body: Bytes::new(),
            grant: None,
            deadline_ms: ANSWER_MS,
            repeat: true,
            patient: false,
        }
    }
    pub(super) fn get(path: impl Into<String>) -> Self {
        Self::new(Method::GET, path)
    }
    pub(super) fn head(path: impl Into<String>) -> Self {
        Self::new(Method::HEAD, path)
    }
    pub(super) fn post(path: impl Into<String>) -> Self {
        Self::new(Method::POST, path)
    }
    pub(super) fn put(path: impl Into<String>) -> Self {
        Self::new(Method::PUT, path)
    }
    pub(super) fn delete(path: impl Into<String>) -> Self {
        Self::new(Method::DELETE, path)
    }
    pub(super) fn query(mut self, name: &'static str, value: impl ToString) -> Self {
        self.query.push((name, value.to_string()));
        self
    }
    pub(super) fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
    pub(super) fn json<T: Serialize>(self, value: &T) -> Self {
        let body = serde_json::to_vec(value).unwrap_or_else(|_| unreachable!("a request's body is plain data"));
        self.body(body.into()).header("content-type", "application/json")
    }
    pub(super) fn body(mut self, body: Bytes) -> Self {
        self.deadline_ms += body.len() as u64 / SLOW_LINE_BYTES_PER_MS;
        self.body = body;
        self
    }
    /// Uses an attempt's grant in place of the client's own token.
    pub(super) fn grant(mut self, grant: &Secret<String>) -> Self {
        self.grant = Some(grant.clone());
        self
    }
    pub(super) fn deadline(mut self, ms: u64) -> Self {
        self.deadline_ms = ms;
        self
    }
    /// Doing it twice is not the same as doing it once.
    pub(super) fn once(mut self) -> Self {
        self.repeat = false;
        self
    }
    /// Somebody waits for a long time anyway: outages as long as a stream's are sat out.
    pub(super) fn patient(mut self) -> Self {
        self.patient = true;
        self
    }

    pub(super) fn header_value(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| *known == name).map(|(_, value)| value.as_str())
    }

    pub(super) fn deadline_ms(&self) -> u64 {
        self.deadline_ms
    }

    pub(super) fn budget(&self) -> Budget {
        if self.patient { Budget::Stream } else { Budget::Quick }
    }

    pub(super) fn may_repeat(&self, failure: &Failure) -> bool {
        match failure.kind {
            Kind::Connect | Kind::Busy => true,
            Kind::Cut | Kind::Silent | Kind::Wrong => self.repeat,
            Kind::Final => false,
        }
    }
}

/// One try that failed.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: ClientError,
    pub(super) kind: Kind,
    /// Of the answer, if there was one.
    pub(super) status: Option<u16>,
    retry_after_ms: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// There was no connection: nothing was sent.
    Connect,
    /// The farm said "later" and did nothing.
    Busy,
    /// It broke on the way, here or there: it may have been done.
    Cut,
    /// Nothing more came for long: it may have nothing to say.
    Silent,
    /// Bytes arrived that do not fit. One more try, then it is an error.
    Wrong,
    /// The same request would fail again.
    Final,
}

impl Failure {
    pub(super) fn new(kind: Kind, error: ClientError) -> Self {
        Self { error, kind, status: None, retry_after_ms: None }
    }
    pub(super) fn wrong(why: impl Into<String>) -> Self {
        Self::new(Kind::Wrong, ClientError::protocol(why.into()))
    }
    pub(super) fn last(why: impl Into<String>) -> Self {
        Self::new(Kind::Final, ClientError::protocol(why.into()))
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::new(Kind::Final, error)
    }
}

/// How long to go on after failures.
#[derive(Debug, Clone, Copy)]
pub(super) enum Budget {
    Quick,
    Stream,
}

/// Failures in a row, without any progress between them.
#[derive(Debug, Default)]
pub(super) struct Lost {
    pub(super) tries: u32,
    since: Option<Mono>,
    wrong: bool,
}

impl Lost {
    /// Counts the time from here, and not only from the first failure.
    pub(super) fn from(now: Mono) -> Self {
        Self { since: Some(now), ..Self::default() }
    }

    /// Counts a failure. Gives the milliseconds until the next try, or the error if there is none left.
    pub(super) fn count(&mut self, env: &dyn Env, failure: Failure, budget: Budget) -> Result<u64, ClientError> {
        let now = env.now().mono;
        let since = *self.since.get_or_insert(now);
        let backoff = backoff(self.tries, RETRY_BASE_MS, RETRY_CAP_MS, env.dice());
        let delay = failure.retry_after_ms.unwrap_or(0).max(backoff);
        self.tries += 1;
        let (budget_ms, tries) = match (budget, failure.kind) {
            (Budget::Quick, Kind::Connect) => (CONNECT_BUDGET_MS, CONNECT_TRIES),
            (Budget::Quick, Kind::Busy | Kind::Cut | Kind::Silent | Kind::Wrong | Kind::Final) => {
                (QUICK_BUDGET_MS, QUICK_TRIES)
            }
            (Budget::Stream, _) => (STREAM_BUDGET_MS, u32::MAX),
        };
        let twice_wrong = failure.kind == Kind::Wrong && std::mem::replace(&mut self.wrong, true);
        let too_late = now.since(since).saturating_add(delay) >= budget_ms;
        if failure.kind == Kind::Final || twice_wrong || self.tries >= tries || too_late {
            return Err(failure.error);
        }
        Ok(delay)
    }

    /// Counts a failure and waits until the next try.
    pub(super) async fn pause(&mut self, env: &dyn Env, failure: Failure, budget: Budget) -> Result<(), ClientError> {
        let delay = self.count(env, failure, budget)?;
        env.sleep_until(env.now().mono + delay).await;
        Ok(())
    }

    /// Something arrived: the next failure is the first one.
    pub(super) fn forget(&mut self) {
        *self = Self::default();
    }
}

impl Client {
    /// Sends a request until it is answered, refused, or its budget is used up.
    pub(super) async fn ask<T: DeserializeOwned>(&self, call: Call) -> Result<T, ClientError> {
        let body = self.answer(&call).await?;
        self.decode(&call, &body)
    }

    /// Like [`Client::ask`], where the answer is that it is done.
    pub(super) async fn tell(&self, call: Call) -> Result<(), ClientError> {
        self.answer(&call).await.map(drop)
    }

    async fn answer(&self, call: &Call) -> Result<Bytes, ClientError> {
        let mut lost = Lost::from(self.env.now().mono);
        loop {
            let failure = match self.once(call).await {
                Ok(body) => return Ok(body),
                Err(failure) => failure,
            };
            if !call.may_repeat(&failure) {
                return Err(failure.error);
            }
            lost.pause(&*self.env, failure, call.budget()).await?;
        }
    }

    /// One try, to the last byte of the answer.
    pub(super) async fn once(&self, call: &Call) -> Result<Bytes, Failure> {
        let work = async {
            let mut response = self.send(self.request(call)?.body(call.body.clone())).await?;
            self.collect(&mut response, limits::JSON_ANSWER_MAX).await
        };
        match within(&*self.env, call.deadline_ms, work).await {
            Some(done) => done,
            None => Err(self.cut(format!("no answer within {} s", call.deadline_ms / 1000))),
        }
    }

    /// One try, to the head of a successful answer. The body is read with [`Client::piece`].
    pub(super) async fn open(&self, call: &Call) -> Result<Response, Failure> {
        let response = self.open_unjudged(call).await?;
        self.judge(response).await
    }

    /// One try, to the head of an answer of any kind.
    pub(super) async fn open_unjudged(&self, call: &Call) -> Result<Response, Failure> {
        let request = self.request(call)?.body(call.body.clone());
        let work = async { request.send().await.map_err(|error| self.broken(&error)) };
        match within(&*self.env, call.deadline_ms, work).await {
            Some(done) => done,
            None => Err(self.cut(format!("no answer within {} s", call.deadline_ms / 1000))),
        }
    }

    /// The next piece of a body; `None` at its end. A body cut short is a failure, never an end.
    pub(super) async fn piece(&self, response: &mut Response) -> Result<Option<Bytes>, Failure> {
        match within(&*self.env, IDLE_MS, response.chunk()).await {
            Some(Ok(piece)) => Ok(piece),
            Some(Err(error)) => Err(self.cut(root_cause(&error))),
            None => {
                let why = format!("nothing was heard for {} s", IDLE_MS / 1000);
                Err(Failure::new(Kind::Silent, unreachable(&self.base, why)))
            }
        }
    }

    /// The request without its body.
    pub(super) fn request(&self, call: &Call) -> Result<reqwest::RequestBuilder, ClientError> {
        let mut request = self.http.request(call.method.clone(), format!("{}{}", self.base, call.path));
        if !call.query.is_empty() {
            request = request.query(&call.query);
        }
        for (name, value) in &call.headers {
            request = request.header(*name, value);
        }
        if let Some(token) = call.grant.as_ref().or(self.token.as_ref()) {
            request = request.header(reqwest::header::AUTHORIZATION, bearer(token)?);
        }
        Ok(request)
    }

    /// Sends, and turns every answer that is no success into a failure.
    pub(super) async fn send(&self, request: reqwest::RequestBuilder) -> Result<Response, Failure> {
        let response = request.send().await.map_err(|error| self.broken(&error))?;
        self.judge(response).await
    }

    pub(super) async fn judge(&self, mut response: Response) -> Result<Response, Failure> {
        if response.status().is_success() {
            return Ok(response);
        }
        // What arrived of the body is enough: the status alone already says that it failed.
        let mut body = BytesMut::new();
        while let Ok(Some(piece)) = self.piece(&mut response).await {
            body.extend_from_slice(&piece);
            if body.len() > limits::PROBLEM_MAX {
                break;
            }
        }
        Err(refusal(&self.base, &response, &body))
    }

    pub(super) async fn collect(&self, response: &mut Response, max: usize) -> Result<Bytes, Failure> {
        let mut body = BytesMut::new();
        while let Some(piece) = self.piece(response).await? {
            if body.len() + piece.len() > max {
                return Err(Failure::last(format!("{} is answered with more than {max} bytes", response.url().path())));
            }
            body.extend_from_slice(&piece);
        }
        Ok(body.freeze())
    }

    /// Reads an answer. What does not fit is named by its place only: it may hold a token.
    pub(super) fn decode<T: DeserializeOwned>(&self, call: &Call, body: &[u8]) -> Result<T, ClientError> {
        serde_json::from_slice(body).map_err(|error| {
            let (method, path, base) = (&call.method, &call.path, &self.base);
            let (line, column) = (error.line(), error.column());
            ClientError::protocol(format!(
                "{method} {path} at {base} is answered with something that is no answer of a farm (line {line}, column {column}); is the address right, and is this `alloy` as new as the farm?"
            ))
        })
    }

    pub(super) fn cut(&self, why: impl Into<String>) -> Failure {
        Failure::new(Kind::Cut, unreachable(&self.base, why))
    }

    fn broken(&self, error: &reqwest::Error) -> Failure {
        let why = if error.is_timeout() { "no connection within 5 s".to_owned() } else { root_cause(error) };
        if error.is_connect()
            && why.contains(NO_TLS)
            && let Some(rest) = self.base.strip_prefix("https://")
        {
            let (why, hint) = ("it speaks no TLS there".to_owned(), Some(format!("http://{rest} may be its address")));
            return Failure::new(Kind::Final, ClientError::Protocol { why, hint });
        }
        let kind = if error.is_builder() {
            Kind::Final
        } else if error.is_connect() {
            Kind::Connect
        } else {
            Kind::Cut
        };
        let unknown_host = names_no_host(&why);
        Failure::new(kind, ClientError::Unreachable { url: self.base.to_string(), why, unknown_host })
    }
}

/// What resolvers say when they know that a name stands for no machine: those of glibc, macOS and musl. Whatever else they say
/// may be over soon.
const NO_HOST: [&str; 5] = [
    "Name or service not known",
    "No address associated with",
    "nodename nor servname provided",
    "Name does not resolve",
    "Name has no usable address",
];

/// True for what the standard library says of a name that stands for no machine.
pub(super) fn names_no_host(why: &str) -> bool {
    let told = why.strip_prefix("failed to lookup address information: ");
    told.is_some_and(|told| NO_HOST.iter().any(|known| told.starts_with(known)))
}

/// Runs until `ms` have passed; `None` if that was not enough.
pub(super) async fn within<T>(env: &dyn Env, ms: u64, work: impl Future<Output = T>) -> Option<T> {
    let late = env.sleep_until(env.now().mono + ms);
    tokio::select! {
        biased;
        done = work => Some(done),
        () = late => None,
    }
}

/// The `Authorization` header, which never shows up in a debug text.
pub(super) fn bearer(token: &Secret<String>) -> Result<HeaderValue, ClientError> {
    let mut value = HeaderValue::try_from(format!("Bearer {}", token.expose())).map_err(|_| {
        ClientError::protocol("the token holds characters that no token has; was it copied whole?".to_owned())
    })?;
    value.set_sensitive(true);
    Ok(value)
}

/// The innermost error says what happened; the outer ones only who noticed.
pub(super) fn root_cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    // An error without a cause would print its address, which may hold a query.
    if error.source().is_none() { "the request failed".to_owned() } else { printable_to(WHY_MAX, &cause.to_string()) }
}

/// Judges an answer that is no success.
fn refusal(base: &str, response: &Response, body: &[u8]) -> Failure {
    let status = response.status();
    let seconds = |value: &HeaderValue| value.to_str().ok()?.trim().parse::<u64>().ok();
    let header = response.headers().get(RETRY_AFTER).and_then(seconds);
    let kind = match status.as_u16() {
        // What came of a body that broke off is not used.
        408 | 429 | 503 | 507 => Kind::Busy,
        500.. => Kind::Cut,
        _ => Kind::Final,
    };
    let (error, after) = match serde_json::from_slice::<Problem>(body) {
        Ok(mut problem) => {
            problem.retry_after_s = header.or(problem.retry_after_s);
            let after = problem.retry_after_s;
            (ClientError::Problem(problem), after)
        }
        Err(_) => (foreign(base, response, status, body), header),
    };
    Failure { error, kind, status: Some(status.as_u16()), retry_after_ms: after.map(|s| s.saturating_mul(1000)) }
}

/// What to say about an error that is no problem document of this version.
fn foreign(base: &str, response: &Response, status: StatusCode, body: &[u8]) -> ClientError {
    #[derive(serde::Deserialize)]
    struct Newer {
        message: String,
        hint: Option<String>,
    }
    if let Ok(newer) = serde_json::from_slice::<Newer>(body) {
        let why = format!("{} ({status})", newer.message);
        return ClientError::Protocol { why, hint: newer.hint.as_deref().map(printable) };
    }
    let path = response.url().path();
    let host = response.url().host_str().unwrap_or_default();
    if let Some(to) = response.headers().get(reqwest::header::LOCATION).and_then(|to| to.to_str().ok()) {
        let to = printable(to);
        return ClientError::protocol(format!("{path} at {host} is redirected ({status}) to {to}; use that address"));
    }
    let html = body.trim_ascii_start().starts_with(b"<");
    let why = match std::str::from_utf8(body) {
        Ok(text) if !html && !text.trim().is_empty() => {
            format!("{path} at {host} is answered {status}: {}", printable(text.trim()))
        }
        Ok(_) | Err(_) => {
            format!("{path} at {host} is answered {status} by something that is not a farm; a proxy in between?")
        }
    };
    // What a proxy says for a farm that is away.
    if matches!(status.as_u16(), 502..=504) { unreachable(base, why) } else { ClientError::protocol(why) }
}
