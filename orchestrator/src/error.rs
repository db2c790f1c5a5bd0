//! S: the only way from an error to a problem document. A fault of ours is logged here, once, under its request id.

use alloy_shared::id::printable;
use alloy_shared::wire::{ErrorCode, FieldError, Problem};
use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::auth::Denied;
use crate::auth::sign_in::NotIn;
use crate::ops::OpError;
use crate::store::StoreError;

/// Missing blobs named in one answer; the upload's own query tells them all.
const NAMED_MAX: usize = 100;
const BUSY_RETRY_S: u64 = 1;
const FULL_RETRY_S: u64 = 10;

/// An answer that is no success. Handlers return it; the edge writes it out with the request's id.
#[derive(Debug, Clone)]
pub struct Fault {
    problem: Box<Problem>,
    /// What only the log may say.
    cause: Option<String>,
}

impl Fault {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { problem: Box::new(Problem::new(code, message)), cause: None }
    }
    /// A fault of ours: the caller learns the request id, the log learns why.
    pub fn internal(cause: impl Into<String>) -> Self {
        let fault = Self::new(ErrorCode::Internal, "the orchestrator failed; its log has the reason");
        Self {
            cause: Some(cause.into()),
            ..fault.hint("try again; if it stays, give the request id to who runs the farm")
        }
    }
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.problem.hint = Some(hint.into());
        self
    }
    pub fn field(mut self, field: impl Into<String>, message: impl Into<String>) -> Self {
        self.problem.errors.push(FieldError { field: field.into(), message: message.into() });
        self
    }
    pub fn retry_after(mut self, seconds: u64) -> Self {
        self.problem.retry_after_s = Some(seconds);
        self
    }
    pub fn code(&self) -> ErrorCode {
        self.problem.code
    }

    fn cause(mut self, cause: impl Into<String>) -> Self {
        self.cause = Some(cause.into());
        self
    }

    /// What an answer without a problem document means, by its status alone.
    fn of_status(status: StatusCode) -> Self {
        match status {
            StatusCode::UNAUTHORIZED => Self::new(ErrorCode::Unauthenticated, "this needs a token"),
            StatusCode::FORBIDDEN => Self::new(ErrorCode::Forbidden, "this is not allowed"),
            StatusCode::NOT_FOUND => Self::new(ErrorCode::NotFound, "there is no such route"),
            StatusCode::METHOD_NOT_ALLOWED => Self::new(
                ErrorCode::MethodNotAllowed,
                "the route does not take this method; `Allow` lists those it takes",
            ),
            StatusCode::PAYLOAD_TOO_LARGE => Self::new(ErrorCode::TooLarge, "the body is too large"),
            StatusCode::RANGE_NOT_SATISFIABLE => {
                Self::new(ErrorCode::RangeNotSatisfiable, "the range lies outside of the bytes that are there")
            }
            StatusCode::REQUEST_TIMEOUT | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => {
                Self::new(ErrorCode::Unavailable, "the farm did not answer in time").retry_after(BUSY_RETRY_S)
            }
            other if other.is_client_error() => {
                Self::new(ErrorCode::InvalidBody, format!("the request cannot be read ({other})"))
            }
            other => Self::internal(format!("an answer of {other} without a reason")),
        }
    }

    /// Writes the problem out. `head` keeps the headers of the answer that it replaces.
    fn render(mut self, head: Response, request_id: &str, route: &str) -> Response {
        if self.problem.status >= 500 {
            let cause = self.cause.as_deref().unwrap_or(&self.problem.message);
            tracing::error!(request.id = request_id, http.route = route, code = self.problem.code.as_str(), "{cause}");
        }
        self.problem.request_id = Some(request_id.to_owned());
        let (mut parts, _) = head.into_parts();
        parts.status = StatusCode::from_u16(self.problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        parts.headers.remove(header::CONTENT_LENGTH);
        parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        parts.headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if self.problem.status == 401 {
            parts.headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"alloy\""));
        }
        if let Some(seconds) = self.problem.retry_after_s {
            parts.headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        let body = serde_json::to_vec(&self.problem).unwrap_or_else(|_| unreachable!("a problem is plain data"));
        Response::from_parts(parts, Body::from(body))
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// Turns every answer of 400 and above into a problem document.
pub fn finish(mut response: Response, request_id: &str, route: &str) -> Response {
    let fault = response.extensions_mut().remove::<Fault>();
    let status = response.status();
    match fault {
        Some(fault) => fault.render(response, request_id, route),
        None if status.is_client_error() || status.is_server_error() => {
            Fault::of_status(status).render(response, request_id, route)
        }
        None => response,
    }
}

/// What a handler that panicked answers.
pub fn panicked(panic: Box<dyn std::any::Any + Send + 'static>) -> Response {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    Fault::internal(format!("a handler panicked: {}", text.unwrap_or("without a message"))).into_response()
}

impl From<OpError> for Fault {
    fn from(error: OpError) -> Self {
        match error {
            OpError::Refused { code, message, hint, errors } => {
                let mut fault = Self::new(code, message);
                fault.problem.hint = hint;
                fault.problem.errors = errors;
                match code {
                    ErrorCode::StorageFull => fault.retry_after(FULL_RETRY_S),
                    code if code.is_retryable() => fault.retry_after(BUSY_RETRY_S),
                    _ => fault,
                }
            }
            OpError::Missing(digests) => {
                let mut fault = Self::new(
                    ErrorCode::SourceIncomplete,
                    format!("{} blobs of the source are missing", digests.len()),
                )
                .hint("PUT the manifest to learn which, send them in packs, then submit again");
                for digest in digests.iter().take(NAMED_MAX) {
                    fault = fault.field("source", format!("blob {digest} is missing"));
                }
                fault
            }
            OpError::Store(error) => error.into(),
            OpError::Io { what, error } if error.kind() == std::io::ErrorKind::StorageFull => {
                full().cause(format!("{what}: {error}"))
            }
            OpError::Io { what, error } => Self::internal(format!("{what}: {error}")),
        }
    }
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        match &error {
            StoreError::Unavailable(_) | StoreError::Unknown(_) | StoreError::Broken(_) => {
                Self::new(ErrorCode::Unavailable, "the farm's database is busy or away")
                    .retry_after(BUSY_RETRY_S)
                    .cause(error.to_string())
            }
            StoreError::Full(_) => full().cause(error.to_string()),
            StoreError::Corrupt { .. } => Self::internal(error.to_string()),
        }
    }
}

/// What to do about a full disk of the farm.
pub const FULL_HINT: &str =
    "who runs the farm must free space; what runs goes on, and this works again as soon as there is room";

/// What to do about an object store that does not answer.
pub const AWAY_HINT: &str =
    "nothing is lost, and this works again when it is back; the orchestrator's log has the reason";

fn full() -> Fault {
    Fault::new(ErrorCode::StorageFull, "the farm's disk is full").hint(FULL_HINT).retry_after(FULL_RETRY_S)
}

impl From<Denied> for Fault {
    fn from(denied: Denied) -> Self {
        let sentence = denied.to_string();
        let sign_in = "sign in with `alloy login --with-token`, or send `Authorization: Bearer TOKEN`";
        match denied {
            Denied::Missing => Self::new(ErrorCode::Unauthenticated, sentence).hint(sign_in),
            Denied::Malformed(_) | Denied::Unreadable | Denied::Unknown | Denied::Expired | Denied::Revoked => {
                Self::new(ErrorCode::Unauthenticated, sentence).hint(sign_in)
            }
            Denied::SignIn(NotIn::Bad(_)) => {
                Self::new(ErrorCode::Unauthenticated, sentence).hint("sign in again, and send the new access token")
            }
            Denied::SignIn(NotIn::Away) => Self::new(ErrorCode::Unavailable, sentence).retry_after(BUSY_RETRY_S),
            Denied::NoSignIn => Self::new(ErrorCode::Unauthenticated, sentence)
                .hint("use a token of the farm's own; who runs the farm switches sign-in on with SUPABASE_URL"),
            Denied::NoMember(user) => Self::new(ErrorCode::Forbidden, sentence)
                .hint(format!("ask an admin to add you: `alloy admin member set {user} --role developer`")),
            Denied::WrongKind(_) => Self::new(ErrorCode::Unauthenticated, sentence).hint(
                "join tokens enrol a worker and job tokens fetch one attempt's bytes; use a personal or CI token",
            ),
            Denied::Role { .. } => {
                Self::new(ErrorCode::Forbidden, sentence).hint("ask an admin for a token with this role")
            }
            Denied::Ended => Self::new(ErrorCode::Fenced, sentence),
            Denied::Throttled { retry_after_s } => {
                Self::new(ErrorCode::TooManyRequests, sentence).retry_after(retry_after_s)
            }
            Denied::Store(error) => error.into(),
        }
    }
}

/// A stranger's mistake in words that can be shown: no control characters, and nothing that looks like a token of ours.
pub fn showable(text: &str) -> String {
    let mut out = String::new();
    for word in printable_long(text).split_inclusive(|c: char| !(c.is_ascii_alphanumeric() || c == '_')) {
        match alloy_shared::secret::TokenKind::ALL.iter().find(|kind| word.starts_with(kind.prefix())) {
            Some(kind) => {
                out.push_str(kind.prefix());
                out.push_str("***");
                out.extend(word.chars().last().filter(|c| !c.is_ascii_alphanumeric() && *c != '_'));
            }
            None => out.push_str(word),
        }
    }
    out
}

/// Like [`printable`], for sentences: cut at 400 characters.
fn printable_long(text: &str) -> String {
    let chars: Vec<char> = text.chars().take(400).collect();
    chars.chunks(80).map(|part| printable(&part.iter().collect::<String>())).collect()
}
