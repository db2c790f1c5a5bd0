//! T: everything that crosses a process border: paths, versions, errors, and one file per noun.

pub mod farm;
pub mod feed;
#[cfg(test)]
mod golden;
pub mod image;
pub mod job;
pub mod network;
pub mod rule;
pub mod session;
pub mod source;
pub mod spec;
pub mod vm;

use serde::{Deserialize, Serialize};

/// Versions of the worker protocol that this build speaks.
pub const PROTOCOL: std::ops::RangeInclusive<u32> = 1..=1;
pub const SUBPROTOCOL: &str = "alloy.v1";

/// Header names of our own.
pub mod header {
    /// For a person who belongs to several organisations: the one that this request is about.
    pub const ORG: &str = "alloy-org";
    /// A create sent again with the same key gives the same thing.
    pub const IDEMPOTENCY_KEY: &str = "idempotency-key";
    /// On a log: which attempt's it is.
    pub const ATTEMPT: &str = "alloy-attempt";
    /// On a log: the offset of the body's first byte. On an attempt's artifact: how many bytes are stored.
    pub const OFFSET: &str = "alloy-offset";
}

/// URL paths. The router and the client both take them from here.
pub mod path {
    use crate::id::{AttemptRef, Digest, JobId, TokenId, UserId, WorkerId};

    pub const HEALTHZ: &str = "/healthz";
    pub const READYZ: &str = "/readyz";
    pub const OPENAPI: &str = "/openapi.json";
    pub const INFO: &str = "/v1/info";
    pub const WHOAMI: &str = "/v1/whoami";
    pub const JOBS: &str = "/v1/jobs";
    pub const JOB: &str = "/v1/jobs/{id}";
    pub const JOB_CANCEL: &str = "/v1/jobs/{id}/cancel";
    pub const JOB_FEED: &str = "/v1/jobs/{id}/feed";
    pub const JOB_LOG: &str = "/v1/jobs/{id}/log";
    pub const JOB_ARTIFACTS: &str = "/v1/jobs/{id}/artifacts";
    pub const JOB_ARTIFACT: &str = "/v1/jobs/{id}/artifacts/{*path}";
    /// `PUT` a manifest, learn what is missing.
    pub const SOURCE: &str = "/v1/sources/{digest}";
    /// `POST` a plain tar, get the manifest's digest.
    pub const SOURCES: &str = "/v1/sources";
    /// `POST` a pack of blobs.
    pub const PACKS: &str = "/v1/packs";
    pub const WORKERS: &str = "/v1/workers";
    pub const WORKER: &str = "/v1/workers/{id}";
    pub const WORKER_INVITES: &str = "/v1/workers/invites";
    pub const WORKER_ENROL: &str = "/v1/workers/enrol";
    pub const WORKER_DRAIN: &str = "/v1/workers/{id}/drain";
    pub const WORKER_RESUME: &str = "/v1/workers/{id}/resume";
    pub const WORKER_CONNECT: &str = "/v1/worker/connect";
    /// With an attempt's token: `GET` the manifest of its source.
    pub const ATTEMPT_SOURCE: &str = "/v1/attempts/{job}/{attempt}/source";
    /// With an attempt's token: `POST` a list of digests, receive a pack.
    pub const ATTEMPT_BLOBS: &str = "/v1/attempts/{job}/{attempt}/blobs";
    /// With an attempt's token: `PUT` an artifact's bytes from an offset; `HEAD` tells how much is there.
    pub const ATTEMPT_ARTIFACT: &str = "/v1/attempts/{job}/{attempt}/artifacts/{digest}";
    pub const IMAGES: &str = "/v1/images";
    pub const IMAGE_PIN: &str = "/v1/images/pin";
    pub const IMAGE_REMOVE: &str = "/v1/images/rm";
    pub const TOKENS: &str = "/v1/tokens";
    pub const TOKEN: &str = "/v1/tokens/{id}";
    pub const MEMBERS: &str = "/v1/members";
    pub const MEMBER: &str = "/v1/members/{user_id}";
    pub const RETENTION: &str = "/v1/retention";

    pub fn job(id: JobId) -> String {
        format!("/v1/jobs/{id}")
    }
    pub fn job_cancel(id: JobId) -> String {
        format!("/v1/jobs/{id}/cancel")
    }
    pub fn job_feed(id: JobId) -> String {
        format!("/v1/jobs/{id}/feed")
    }
    pub fn job_log(id: JobId) -> String {
        format!("/v1/jobs/{id}/log")
    }
    pub fn job_artifacts(id: JobId) -> String {
        format!("/v1/jobs/{id}/artifacts")
    }
    /// `artifact` is a relative path; everything but its slashes is percent-encoded.
    pub fn job_artifact(id: JobId, artifact: &str) -> String {
        format!("/v1/jobs/{id}/artifacts/{}", percent(artifact))
    }
    pub fn source(digest: &Digest) -> String {
        format!("/v1/sources/{digest}")
    }
    pub fn worker(id: WorkerId) -> String {
        format!("/v1/workers/{id}")
    }
    pub fn worker_drain(id: WorkerId) -> String {
        format!("/v1/workers/{id}/drain")
    }
    pub fn worker_resume(id: WorkerId) -> String {
        format!("/v1/workers/{id}/resume")
    }
    pub fn attempt_source(at: &AttemptRef) -> String {
        format!("/v1/attempts/{}/{}/source", at.job, at.attempt)
    }
    pub fn attempt_blobs(at: &AttemptRef) -> String {
        format!("/v1/attempts/{}/{}/blobs", at.job, at.attempt)
    }
    pub fn attempt_artifact(at: &AttemptRef, digest: &Digest) -> String {
        format!("/v1/attempts/{}/{}/artifacts/{digest}", at.job, at.attempt)
    }
    pub fn token(id: TokenId) -> String {
        format!("/v1/tokens/{id}")
    }
    pub fn member(id: UserId) -> String {
        format!("/v1/members/{id}")
    }

    fn percent(text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        for byte in text.bytes() {
            if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b'/') {
                out.push(char::from(byte));
            } else {
                out.push_str(&format!("%{byte:02X}"));
            }
        }
        out
    }
}

macro_rules! error_codes {
    ($($(#[$doc:meta])* $name:ident = $word:literal, $status:literal, $retry:literal;)+) => {
        /// What went wrong, for programs. A code never changes its meaning.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
        #[serde(rename_all = "snake_case")]
        pub enum ErrorCode { $($(#[$doc])* $name,)+ }

        impl ErrorCode {
            pub const ALL: &'static [ErrorCode] = &[$(ErrorCode::$name,)+];
            pub const fn as_str(self) -> &'static str { match self { $(ErrorCode::$name => $word,)+ } }
            pub const fn http_status(self) -> u16 { match self { $(ErrorCode::$name => $status,)+ } }
            /// True when the same request may succeed later without a change.
            pub const fn is_retryable(self) -> bool { match self { $(ErrorCode::$name => $retry,)+ } }
        }
    };
}

error_codes! {
    /// The body is not what the route takes.
    InvalidBody = "invalid_body", 400, false;
    /// The body broke off: whoever sent it stopped, or the connection did.
    IncompleteBody = "incomplete_body", 408, true;
    /// A field of the job's spec is wrong; `errors` names each.
    InvalidSpec = "invalid_spec", 422, false;
    /// A query parameter or header is wrong.
    InvalidParameter = "invalid_parameter", 400, false;
    /// No credential, or one that nobody knows, or one that has expired.
    Unauthenticated = "unauthenticated", 401, false;
    /// The credential is known and may not do this.
    Forbidden = "forbidden", 403, false;
    /// There is no such thing, or it is not yours.
    NotFound = "not_found", 404, false;
    /// It was there, and is no longer kept.
    Gone = "gone", 410, false;
    MethodNotAllowed = "method_not_allowed", 405, false;
    /// The same key came with another body.
    IdempotencyMismatch = "idempotency_mismatch", 422, false;
    /// The job is in a state that does not allow this.
    InvalidTransition = "invalid_transition", 409, false;
    /// Blobs of the source are not here; `missing` names them.
    SourceIncomplete = "source_incomplete", 409, false;
    /// Bytes do not hash to the digest they came under.
    DigestMismatch = "digest_mismatch", 422, false;
    /// A manifest, pack or archive breaks the rules.
    InvalidSource = "invalid_source", 422, false;
    /// No worker of this farm could ever run it.
    NoSuchWorker = "no_such_worker", 422, false;
    /// An upload continues at another offset than the one that is stored.
    OffsetMismatch = "offset_mismatch", 409, false;
    RangeNotSatisfiable = "range_not_satisfiable", 416, false;
    TooLarge = "too_large", 413, false;
    TooManyRequests = "too_many_requests", 429, true;
    /// The versions of worker and orchestrator have nothing in common.
    UnsupportedProtocol = "unsupported_protocol", 400, false;
    /// A newer connection of the same worker took over.
    Superseded = "superseded", 409, false;
    /// The attempt has ended, or belongs to another worker.
    Fenced = "fenced", 409, false;
    /// The farm is starting, stopping, or its database is away.
    Unavailable = "unavailable", 503, true;
    /// No room on the farm's disk.
    StorageFull = "storage_full", 507, true;
    /// A fault of ours; the request id finds it in the log.
    Internal = "internal", 500, true;
}

/// RFC 9457 problem document, the body of every error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Problem {
    pub status: u16,
    pub code: ErrorCode,
    /// One sentence: what failed and why.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// Every wrong field, by its path.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_s: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct FieldError {
    /// `labels.chip`, `env.PATH`, `artifacts[2]`.
    pub field: String,
    pub message: String,
}

impl Problem {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            status: code.http_status(),
            code,
            message: message.into(),
            hint: None,
            request_id: None,
            errors: Vec::new(),
            retry_after_s: None,
        }
    }
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_on_the_wire_are_their_words() {
        for code in ErrorCode::ALL {
            assert_eq!(serde_json::to_string(code).unwrap(), format!("\"{}\"", code.as_str()));
            assert!((400..=599).contains(&code.http_status()));
        }
    }

    #[test]
    fn an_artifact_path_cannot_leave_its_url() {
        let id = crate::id::JobId::from_raw(1);
        assert!(path::job_artifact(id, "a b/ü?#.txt").ends_with("/artifacts/a%20b/%C3%BC%3F%23.txt"));
    }
}
