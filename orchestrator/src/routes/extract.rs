//! S: what handlers take from a request. Every rejection is a problem document with the field's path.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use alloy_shared::id::WorkerId;
use alloy_shared::wire::ErrorCode;
use alloy_shared::wire::farm::Role;
use axum::body::Body;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use serde::de::DeserializeOwned;

use super::plain::{plain, plain_json};
use crate::auth::{AttemptGrant, Denied, Principal};
use crate::error::{Fault, showable};

/// Where a connection comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer(pub IpAddr);

impl Peer {
    /// The peer of a request: the connection's, or behind a proxy the last address that the proxy wrote down.
    pub fn of(parts: &Parts, behind_proxy: bool) -> Self {
        let forwarded = || {
            let last = parts.headers.get_all("x-forwarded-for").iter().next_back()?.to_str().ok()?;
            last.rsplit(',').next()?.trim().parse().ok()
        };
        if behind_proxy && let Some(address) = forwarded() {
            return Self(address);
        }
        parts.extensions.get::<Peer>().copied().unwrap_or(Self(IpAddr::V4(Ipv4Addr::UNSPECIFIED)))
    }

    /// What failed tries are counted under: an IPv6 host owns its whole /64.
    pub fn key(&self) -> String {
        match self.0 {
            IpAddr::V4(v4) => v4.to_string(),
            IpAddr::V6(v6) => {
                let s = v6.segments();
                format!("{:x}:{:x}:{:x}:{:x}", s[0], s[1], s[2], s[3])
            }
        }
    }
}

macro_rules! callers {
    ($($(#[$doc:meta])* $name:ident = $role:expr;)+) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone)]
            pub struct $name(pub Principal);

            impl<S: Send + Sync> FromRequestParts<S> for $name {
                type Rejection = Fault;
                async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Fault> {
                    Ok(Self(caller(parts, $role)?.clone()))
                }
            }
        )+
    };
}

callers! {
    /// A caller who may read.
    Viewer = Role::Viewer;
    /// A caller who may submit and cancel jobs.
    Developer = Role::Developer;
    /// A caller who may also change workers and tokens.
    Admin = Role::Admin;
}

/// The gate before the handler found out who it is; a route without a gate finds nobody here.
fn caller(parts: &Parts, need: Role) -> Result<&Principal, Fault> {
    let principal = parts.extensions.get::<Arc<Principal>>().ok_or(Denied::Missing)?;
    if principal.role < need {
        return Err(Denied::Role { have: principal.role.as_str(), need: need.as_str() }.into());
    }
    Ok(principal)
}

/// Refuses a caller without this role.
pub(super) fn check_role(parts: &Parts, need: Role) -> Result<(), Fault> {
    caller(parts, need).map(|_| ())
}

impl<S: Send + Sync> FromRequestParts<S> for AttemptGrant {
    type Rejection = Fault;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Fault> {
        Ok(parts.extensions.get::<AttemptGrant>().copied().ok_or(Denied::Missing)?)
    }
}

/// The enrolled worker that a connection names.
#[derive(Debug, Clone, Copy)]
pub struct NamedWorker(pub WorkerId);

impl<S: Send + Sync> FromRequestParts<S> for NamedWorker {
    type Rejection = Fault;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Fault> {
        Ok(parts.extensions.get::<NamedWorker>().copied().ok_or(Denied::Missing)?)
    }
}

/// A JSON body.
#[derive(Debug, Clone)]
pub struct JsonBody<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = Fault;
    async fn from_request(request: Request, state: &S) -> Result<Self, Fault> {
        if !is_json(request.headers()) {
            return Err(Fault::new(ErrorCode::InvalidBody, "the body is not marked as JSON")
                .hint("send `Content-Type: application/json`"));
        }
        let bytes = Bytes::from_request(request, state).await.map_err(unread)?;
        Ok(Self(parse(&bytes)?))
    }
}

/// A JSON body that may be left out.
#[derive(Debug, Clone)]
pub struct JsonOrNothing<T>(pub T);

impl<T: DeserializeOwned + Default, S: Send + Sync> FromRequest<S> for JsonOrNothing<T> {
    type Rejection = Fault;
    async fn from_request(request: Request, state: &S) -> Result<Self, Fault> {
        let marked = is_json(request.headers());
        let bytes = Bytes::from_request(request, state).await.map_err(unread)?;
        if bytes.is_empty() {
            return Ok(Self(T::default()));
        }
        if !marked {
            return Err(Fault::new(ErrorCode::InvalidBody, "the body is not marked as JSON")
                .hint("send `Content-Type: application/json`, or no body"));
        }
        Ok(Self(parse(&bytes)?))
    }
}

/// All of a body that may have so many bytes.
pub async fn whole(body: Body, max: usize) -> Result<Bytes, Fault> {
    whole_within(body, max, |_| Ok(())).await
}

/// The same; `hold` hears the length before so much is kept, and may refuse it.
pub async fn whole_within(
    body: Body,
    max: usize,
    mut hold: impl FnMut(usize) -> Result<(), Fault>,
) -> Result<Bytes, Fault> {
    let mut parts = body.into_data_stream();
    let mut whole = BytesMut::new();
    while let Some(part) = parts.next().await {
        let part = part.map_err(|_| broke_off())?;
        if whole.len() + part.len() > max {
            return Err(Fault::new(ErrorCode::TooLarge, format!("the body has more than {max} bytes")));
        }
        hold(whole.len() + part.len())?;
        whole.extend_from_slice(&part);
    }
    Ok(whole.freeze())
}

fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim();
    essence.eq_ignore_ascii_case("application/json") || essence.to_ascii_lowercase().ends_with("+json")
}

fn broke_off() -> Fault {
    Fault::new(ErrorCode::IncompleteBody, "the body broke off").hint("send it again").retry_after(1)
}

fn unread(rejection: BytesRejection) -> Fault {
    match axum::response::IntoResponse::into_response(rejection).status() {
        axum::http::StatusCode::PAYLOAD_TOO_LARGE => Fault::new(ErrorCode::TooLarge, "the body is too large")
            .hint(format!("a JSON body is at most {} bytes", alloy_shared::limits::JSON_BODY_MAX)),
        _ => broke_off(),
    }
}

/// Reads JSON; what is wrong is told by the path of the field, without repeating a secret.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Fault> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        // An unknown place is written `?`; what surrounds it is the nearest name there is.
        let known = path.trim_end_matches('?').trim_end_matches('.');
        let field = if known.is_empty() { "body".to_owned() } else { showable(known) };
        let message = if is_private(&path) {
            format!("the value has the wrong form (line {})", error.inner().line())
        } else {
            showable(&plain_json(error.inner()))
        };
        Fault::new(ErrorCode::InvalidBody, format!("{field}: {message}")).field(field, message)
    })?;
    json.end().map_err(|error| {
        let message = showable(&plain_json(&error));
        Fault::new(ErrorCode::InvalidBody, format!("body: {message}")).field("body", message)
    })?;
    Ok(value)
}

/// Fields whose values may be secrets: what a parser says about them quotes them.
fn is_private(path: &str) -> bool {
    path.split(['.', '[']).any(|part| matches!(part, "env" | "token"))
}

/// The query string.
#[derive(Debug, Clone)]
pub struct QueryOf<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for QueryOf<T> {
    type Rejection = Fault;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Fault> {
        match Query::<T>::try_from_uri(&parts.uri) {
            Ok(Query(value)) => Ok(Self(value)),
            Err(rejection) => {
                let text = rejection.body_text();
                let text = text.strip_prefix("Failed to deserialize query string: ").unwrap_or(&text);
                let (name, said) = text.split_once(": ").filter(|(name, _)| is_name(name)).unwrap_or(("query", text));
                Err(parameter(name, &showable(&plain(said))))
            }
        }
    }
}

/// True for the name of a parameter, as opposed to the beginning of a sentence.
fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|c| c.is_ascii_lowercase() || c == b'_')
}

/// The parts of the path.
#[derive(Debug, Clone)]
pub struct PathOf<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for PathOf<T> {
    type Rejection = Fault;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Fault> {
        match Path::<T>::from_request_parts(parts, state).await {
            Ok(Path(value)) => Ok(Self(value)),
            Err(rejection) => {
                let text = rejection.body_text();
                let text = text.strip_prefix("Invalid URL: ").unwrap_or(&text);
                Err(parameter("path", &showable(&plain(text))))
            }
        }
    }
}

/// A wrong parameter, by name.
pub fn parameter(field: &str, message: &str) -> Fault {
    Fault::new(ErrorCode::InvalidParameter, format!("{field}: {message}")).field(field, message)
}

/// A header's text, if it is there and is text.
pub fn header_text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

impl FromRequestParts<Arc<crate::App>> for Peer {
    type Rejection = std::convert::Infallible;
    async fn from_request_parts(parts: &mut Parts, app: &Arc<crate::App>) -> Result<Self, Self::Rejection> {
        Ok(Self::of(parts, app.behind_proxy))
    }
}
