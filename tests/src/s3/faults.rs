//! What happens to requests on their way to an object store and back, by seed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use s3s::Body;
use s3s::dto::StreamingBlob;
use s3s::service::S3Service;

use super::Broken;
use crate::noise::mix;

/// Of a hundred requests so many meet each fault.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Odds {
    pub seed: u64,
    /// Answered 500 or 503 and not done.
    pub errors: u64,
    /// Done, and the connection breaks instead of an answer.
    pub lost_replies: u64,
    /// Of those for an object's bytes: done, and the connection breaks within the body.
    pub cut_bodies: u64,
}

/// How often each fault was met.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub requests: u64,
    pub errors: u64,
    pub lost_replies: u64,
    pub cut_bodies: u64,
}

#[derive(Debug, Default)]
pub struct Faults {
    odds: Mutex<Odds>,
    requests: AtomicU64,
    errors: AtomicU64,
    lost_replies: AtomicU64,
    cut_bodies: AtomicU64,
    farm_tokens: AtomicU64,
}

enum Fate {
    Error(u64),
    LoseReply,
    CutBody(u64),
    None,
}

impl Faults {
    pub fn set(&self, odds: Odds) {
        *self.odds.lock().unwrap_or_else(PoisonError::into_inner) = odds;
    }

    pub fn counts(&self) -> Counts {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Counts {
            requests: of(&self.requests),
            errors: of(&self.errors),
            lost_replies: of(&self.lost_replies),
            cut_bodies: of(&self.cut_bodies),
        }
    }

    /// Requests that carried a token of a farm.
    pub fn farm_tokens(&self) -> u64 {
        self.farm_tokens.load(Ordering::Relaxed)
    }

    fn look_for_tokens(&self, request: &Request<Incoming>) {
        if format!("{} {:?}", request.uri(), request.headers()).contains("alloy_") {
            self.farm_tokens.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn fate(&self, method: &Method) -> Fate {
        let odds = *self.odds.lock().unwrap_or_else(PoisonError::into_inner);
        let roll = mix(odds.seed ^ mix(self.requests.fetch_add(1, Ordering::Relaxed)));
        let (at, more) = (roll % 100, mix(roll));
        let lost = odds.errors + odds.lost_replies;
        let (count, fate) = match at {
            at if at < odds.errors => (&self.errors, Fate::Error(more)),
            at if at < lost => (&self.lost_replies, Fate::LoseReply),
            at if at < lost + odds.cut_bodies && method == Method::GET => (&self.cut_bodies, Fate::CutBody(more)),
            _ => return Fate::None,
        };
        count.fetch_add(1, Ordering::Relaxed);
        fate
    }
}

pub(super) async fn answer(
    service: &S3Service,
    faults: &Faults,
    request: Request<Incoming>,
) -> Result<Response<Body>, Broken> {
    faults.look_for_tokens(&request);
    let fate = faults.fate(request.method());
    if let Fate::Error(dice) = fate {
        return Ok(refused(dice));
    }
    let answer = service.call(request.map(Body::from)).await.map_err(|_| Broken)?;
    match fate {
        Fate::LoseReply => Err(Broken),
        Fate::CutBody(dice) if answer.status().is_success() => Ok(answer.map(|body| cut(body, dice))),
        Fate::Error(_) | Fate::CutBody(_) | Fate::None => Ok(answer),
    }
}

fn refused(dice: u64) -> Response<Body> {
    let (status, code) = match dice % 3 {
        0 => (StatusCode::INTERNAL_SERVER_ERROR, "InternalError"),
        1 => (StatusCode::SERVICE_UNAVAILABLE, "SlowDown"),
        _ => (StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable"),
    };
    let text = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>not now</Message></Error>");
    let mut answer = Response::new(Body::from(text));
    *answer.status_mut() = status;
    answer
}

/// Some parts of the body, half of the next one, then an error in place of the rest.
fn cut(body: Body, dice: u64) -> Body {
    let whole = (dice % 8) as usize;
    let parts = body.enumerate().filter_map(move |(index, part)| {
        let kept = match part {
            Ok(part) if index < whole => Some(Ok(part)),
            Ok(part) if index == whole => Some(Ok(part.slice(..part.len() / 2))),
            Ok(_) | Err(_) => Some(Err(std::io::Error::other("cut"))),
        };
        std::future::ready(kept)
    });
    let end = stream::iter([Err::<Bytes, _>(std::io::Error::other("cut"))]);
    Body::from(StreamingBlob::wrap(parts.chain(end)))
}
