//! S: requests to an object store: what its answers mean, and when to ask again.

use std::sync::Arc;

use alloy_shared::env::Env;
use alloy_shared::id::printable_to;
use alloy_shared::limits;
use object_store::Error;

use super::super::{BlobError, BlobKey};

/// What a store says of itself may be a page of HTML.
const WHY_MAX: usize = 300;

/// How long and how often a request is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    pub tries: u32,
    /// No try begins later than this.
    pub budget_ms: u64,
    pub request_ms: u64,
    /// The silence within a body.
    pub idle_ms: u64,
    /// The first pause, which doubles up to the longest.
    pub pause_ms: u64,
    pub pause_max_ms: u64,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            tries: limits::S3_TRIES,
            budget_ms: limits::S3_BUDGET_MS,
            request_ms: limits::S3_REQUEST_MS,
            idle_ms: limits::S3_IDLE_MS,
            pause_ms: limits::S3_PAUSE_MS,
            pause_max_ms: limits::S3_PAUSE_MAX_MS,
        }
    }
}

/// What an answer that is no success means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Missing,
    NoBucket,
    Exists,
    /// The range lies behind the end.
    Range,
    /// The key is unknown, its secret is wrong, or it may not do this.
    Denied,
    /// It asks to be asked less.
    Throttled,
    Away,
    /// The request will never be taken.
    Refused,
}

impl Kind {
    /// The same request may be done another time.
    pub(super) fn may_pass(self) -> bool {
        matches!(self, Self::Throttled | Self::Away)
    }
}

#[derive(Debug, Clone)]
pub(super) struct Failed {
    pub(super) kind: Kind,
    /// In the store's words.
    pub(super) why: String,
}

impl Failed {
    pub(super) fn away(why: impl Into<String>) -> Self {
        Self { kind: Kind::Away, why: why.into() }
    }

    pub(super) fn of(self, key: &BlobKey) -> BlobError {
        match self.kind {
            Kind::Missing => BlobError::Missing(key.clone()),
            Kind::Range => BlobError::Damaged(key.clone()),
            Kind::NoBucket | Kind::Denied | Kind::Throttled | Kind::Away => BlobError::Away(self.why),
            Kind::Exists | Kind::Refused => {
                BlobError::Io { what: "use the object store", error: std::io::Error::other(self.why) }
            }
        }
    }
}

impl From<&Error> for Failed {
    fn from(error: &Error) -> Self {
        let text = texts(error);
        let status = status(&text);
        let code = between(&text, "<Code>", "</Code>");
        let kind = match (error, status, code) {
            (_, _, Some("NoSuchBucket")) => Kind::NoBucket,
            (_, _, Some("SlowDown")) | (_, Some(429 | 503), _) => Kind::Throttled,
            (Error::NotFound { .. }, _, _) | (_, Some(404), _) => Kind::Missing,
            (Error::AlreadyExists { .. } | Error::Precondition { .. } | Error::NotModified { .. }, _, _) => {
                Kind::Exists
            }
            (Error::PermissionDenied { .. } | Error::Unauthenticated { .. }, _, _) | (_, Some(401 | 403), _) => {
                Kind::Denied
            }
            // Some stores call a key that they do not know a bad request.
            (_, _, Some("InvalidAccessKeyId" | "SignatureDoesNotMatch" | "AccessDenied")) => Kind::Denied,
            (_, Some(416), _) => Kind::Range,
            // Amazon closes a connection that was silent with a 400.
            (_, _, Some("RequestTimeout")) | (_, Some(408), _) => Kind::Away,
            (_, Some(300..500), _) | (Error::NotImplemented { .. } | Error::NotSupported { .. }, _, _) => Kind::Refused,
            _ => Kind::Away,
        };
        let why = match (status, code) {
            (status, Some(code)) => {
                let says =
                    between(&text, "<Message>", "</Message>").map(|says| format!(": {says}")).unwrap_or_default();
                format!("{} {code}{says}", status.unwrap_or(200))
            }
            (Some(status), None) => format!("it answers {status}"),
            (None, None) => root(error),
        };
        Self { kind, why: printable_to(WHY_MAX, &why) }
    }
}

/// The error and all its causes, which is where the store's own words stand.
fn texts(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text.push('\n');
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

fn root(error: &Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

fn status(text: &str) -> Option<u16> {
    let (_, rest) = text.split_once("status code: ")?;
    rest.get(..3)?.parse().ok()
}

fn between<'a>(text: &'a str, from: &str, to: &str) -> Option<&'a str> {
    text.split_once(from)?.1.split_once(to).map(|(found, _)| found)
}

/// The tries of one request.
#[derive(Debug)]
pub(super) struct Tries {
    patience: Patience,
    begun: alloy_shared::env::Mono,
    failed: u32,
}

impl Tries {
    pub(super) fn new(patience: Patience, env: &dyn Env) -> Self {
        Self { patience, begun: env.now().mono, failed: 0 }
    }

    /// Nothing failed yet.
    pub(super) fn are_fresh(&self) -> bool {
        self.failed == 0
    }

    /// Counts a failure and waits until the next try; an error if there is none.
    pub(super) async fn pause(&mut self, env: &dyn Env, what: &str, failed: Failed) -> Result<(), Failed> {
        self.failed += 1;
        let most = self.patience.pause_max_ms;
        let doubled = self.patience.pause_ms.saturating_mul(1 << self.failed.min(20)) / 2;
        let wait = if failed.kind == Kind::Throttled { doubled.saturating_mul(4) } else { doubled }.min(most).max(1);
        let wait = wait / 2 + env.dice() % (wait / 2 + 1);
        let late = env.now().mono.since(self.begun).saturating_add(wait) > self.patience.budget_ms;
        if !failed.kind.may_pass() || late || self.failed >= self.patience.tries {
            if failed.kind.may_pass() || failed.kind == Kind::Denied {
                tracing::warn!(tries = self.failed, "the object store did not {what}: {}", failed.why);
            }
            return Err(failed);
        }
        tracing::debug!(tries = self.failed, wait, "the object store did not {what}: {}", failed.why);
        env.sleep_until(env.now().mono + wait).await;
        Ok(())
    }
}

/// Asks until there is an answer or no patience left.
pub(super) async fn ask<T, F>(
    env: &Arc<dyn Env>,
    patience: Patience,
    what: &str,
    request: impl Fn() -> F,
) -> Result<T, Failed>
where
    F: Future<Output = Result<T, Error>>,
{
    let mut tries = Tries::new(patience, &**env);
    loop {
        let done = within(&**env, patience.request_ms, request()).await;
        let failed = match done {
            Some(Ok(answer)) => return Ok(answer),
            Some(Err(error)) => Failed::from(&error),
            None => Failed::away(format!("no answer within {} s", patience.request_ms / 1000)),
        };
        tries.pause(&**env, what, failed).await?;
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(text: &str) -> Error {
        Error::Generic { store: "S3", source: text.to_owned().into() }
    }

    #[test]
    fn answers_are_told_apart() {
        let body = |status: &str, code: &str| {
            generic(&format!(
                "Server returned non-2xx status code: {status}: <Error><Code>{code}</Code><Message>m</Message></Error>"
            ))
        };
        let missing = |text: &str| Error::NotFound { path: "p".into(), source: text.to_owned().into() };
        for (error, kind) in [
            (body("503 Service Unavailable", "SlowDown"), Kind::Throttled),
            (body("500 Internal Server Error", "InternalError"), Kind::Away),
            (body("400 Bad Request", "RequestTimeout"), Kind::Away),
            (body("400 Bad Request", "InvalidAccessKeyId"), Kind::Denied),
            (body("413 Payload Too Large", "EntityTooLarge"), Kind::Refused),
            (generic("Server returned non-2xx status code: 429 Too Many Requests: "), Kind::Throttled),
            (generic("Server returned non-2xx status code: 416 Range Not Satisfiable: "), Kind::Range),
            (generic("Server returned error response: <Code>InternalError</Code>"), Kind::Away),
            (generic("connection refused"), Kind::Away),
            (missing("status code: 404 Not Found: <Code>NoSuchKey</Code>"), Kind::Missing),
            (missing("status code: 404 Not Found: <Code>NoSuchBucket</Code>"), Kind::NoBucket),
        ] {
            assert_eq!(Failed::from(&error).kind, kind, "{error}");
        }
        assert_eq!(Failed::from(&body("403 Forbidden", "AccessDenied")).why, "403 AccessDenied: m");
        assert_eq!(Failed::from(&generic("status code: 502 Bad Gateway: <html>")).why, "it answers 502");
    }
}
