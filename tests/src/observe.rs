//! The outside observer: its own clock, and plain HTTP without any of Alloy's client code.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde_json::Value;

/// How long a fact may take to become true before a test gives up. Generous: it costs nothing when all is well.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks.
pub const BEAT: Duration = Duration::from_millis(20);

/// The observer's clock.
#[expect(clippy::disallowed_methods, reason = "the observer stands outside of the farm and has a clock of its own")]
pub fn now() -> Instant {
    Instant::now()
}

/// Looks again and again until `look` gives something; panics with `what` when patience ends.
pub async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Result<Option<T>>) -> T {
    let end = now() + PATIENCE;
    loop {
        let last = match look().await {
            Ok(Some(found)) => return found,
            Ok(None) => String::new(),
            Err(error) => format!("; the last look: {error:#}"),
        };
        assert!(now() < end, "gave up waiting until {what}{last}");
        tokio::time::sleep(BEAT).await;
    }
}

/// The same for facts that need no runtime.
pub fn until_blocking(what: &str, patience: Duration, mut look: impl FnMut() -> bool) -> Result<()> {
    let end = now() + patience;
    while !look() {
        if now() > end {
            bail!("gave up waiting until {what}");
        }
        std::thread::sleep(BEAT);
    }
    Ok(())
}

/// A principal's view of one farm.
#[derive(Debug, Clone)]
pub struct Api {
    pub url: String,
    pub token: Option<String>,
    http: reqwest::Client,
}

impl Api {
    pub fn new(url: &str, token: Option<&str>) -> Api {
        // Only the first call in a process installs it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder().no_proxy().connect_timeout(Duration::from_secs(5)).build();
        Api { url: url.to_owned(), token: token.map(str::to_owned), http: http.expect("a plain HTTP client") }
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.url));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    /// The JSON answer of a `GET` that must succeed.
    pub async fn get(&self, path: &str) -> Result<Value> {
        let answer = self.request(Method::GET, path).timeout(PATIENCE).send().await?;
        json(answer).await.with_context(|| format!("GET {path}"))
    }

    pub async fn post(&self, path: &str, body: &Value) -> Result<Value> {
        let answer = self.request(Method::POST, path).json(body).timeout(PATIENCE).send().await?;
        json(answer).await.with_context(|| format!("POST {path}"))
    }

    /// Status and body of any request with a JSON body; an error is an answer too.
    pub async fn try_post(&self, path: &str, body: &Value) -> Result<(StatusCode, Value)> {
        let answer = self.request(Method::POST, path).json(body).timeout(PATIENCE).send().await?;
        let status = answer.status();
        Ok((status, serde_json::from_slice(&answer.bytes().await?).unwrap_or(Value::Null)))
    }

    /// Submits a job without sources and returns its id.
    pub async fn submit(&self, spec: Value) -> Result<String> {
        let job = self.post("/v1/jobs", &serde_json::json!({ "spec": spec })).await?;
        Ok(job["id"].as_str().context("a job has an id")?.to_owned())
    }

    pub async fn shell(&self, command: &str) -> Result<String> {
        self.submit(serde_json::json!({ "shell": command })).await
    }

    /// Submits a command under a key until somebody answers: it may have been taken the first time.
    pub async fn shell_once(&self, key: &str, command: &str) -> String {
        let end = now() + PATIENCE * 3;
        loop {
            let last = match self.try_shell_once(key, command).await {
                Ok(id) => return id,
                Err(error) => error,
            };
            assert!(now() < end, "nobody took {key}: {last:#}");
            tokio::time::sleep(BEAT).await;
        }
    }

    async fn try_shell_once(&self, key: &str, command: &str) -> Result<String> {
        let body = serde_json::json!({ "spec": { "shell": command } });
        let request = self.request(Method::POST, "/v1/jobs").header("Idempotency-Key", key).json(&body);
        let job = json(request.timeout(PATIENCE * 2 / 3).send().await?).await?;
        Ok(job["id"].as_str().context("a job has an id")?.to_owned())
    }

    pub async fn job(&self, id: &str) -> Result<Value> {
        self.get(&format!("/v1/jobs/{id}")).await
    }

    /// Waits for the job's end and returns the job.
    pub async fn end(&self, id: &str) -> Value {
        let end = now() + PATIENCE * 5;
        let path = format!("/v1/jobs/{id}?wait=terminal");
        loop {
            let last = match self.get(&path).await {
                Ok(job) if is_terminal(&job) => return job,
                Ok(job) => job.to_string(),
                Err(error) => format!("{error:#}"),
            };
            assert!(now() < end, "gave up waiting for the end of {id}; the last look: {last}");
            tokio::time::sleep(BEAT).await;
        }
    }

    /// Waits until the job's log has these bytes in it.
    pub async fn log_has(&self, id: &str, text: &str) {
        until(&format!("the log of {id} has `{text}`"), async || {
            let log = self.log(id).await?;
            Ok(String::from_utf8_lossy(&log).contains(text).then_some(()))
        })
        .await;
    }

    /// The log's bytes as stored by now.
    pub async fn log(&self, id: &str) -> Result<Vec<u8>> {
        let answer = self.request(Method::GET, &format!("/v1/jobs/{id}/log")).timeout(PATIENCE).send().await?;
        if !answer.status().is_success() {
            bail!("GET log: {}", answer.status());
        }
        Ok(answer.bytes().await?.to_vec())
    }

    /// Every event of the job's feed, which must have ended.
    pub async fn events(&self, id: &str) -> Result<Vec<Value>> {
        let request = self.request(Method::GET, &format!("/v1/jobs/{id}/feed"));
        let answer = request.header("accept", "application/x-ndjson").timeout(PATIENCE).send().await?;
        let text = answer.text().await?;
        let frames = text.lines().filter(|line| !line.trim().is_empty()).map(serde_json::from_str::<Value>);
        Ok(frames.collect::<Result<Vec<_>, _>>()?.into_iter().filter(|frame| frame["type"] == "event").collect())
    }
}

async fn json(answer: Response) -> Result<Value> {
    let status = answer.status();
    let body = answer.text().await?;
    if !status.is_success() {
        bail!("{status}: {body}");
    }
    Ok(serde_json::from_str(&body)?)
}

pub fn is_terminal(job: &Value) -> bool {
    !matches!(job["state"].as_str(), Some("queued" | "assigned" | "running" | "canceling"))
}
