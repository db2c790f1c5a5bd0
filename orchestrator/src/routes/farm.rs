//! S: the farm around the jobs: health, who am I, workers, tokens.

use std::sync::Arc;

use alloy_shared::id::{TokenId, WorkerId};
use alloy_shared::wire::farm::{
    DrainRequest, EnrolRequest, Enrolled, Info, Invite, InviteRequest, Storage, TokenCreated, TokenList, TokenRequest,
    TokenView, WhoAmI, WorkerList, WorkerView,
};
use alloy_shared::wire::{ErrorCode, PROTOCOL, path};
use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::extract::{Admin, JsonBody, JsonOrNothing, PathOf, Peer, Viewer};
use super::refuse;
use crate::App;
use crate::auth::Denied;
use crate::error::Fault;
use crate::ops::{OpError, access, workers};

/// The process lives.
#[utoipa::path(get, path = path::HEALTHZ, tag = "farm", responses((status = 200, body = String)))]
pub async fn health() -> &'static str {
    "ok\n"
}

/// The farm takes requests: its database answers and it is not stopping. With a full disk it answers `storage_full`: it takes
/// nothing new, and everything else works.
#[utoipa::path(get, path = path::READYZ, tag = "farm", responses((status = 200, body = String)))]
pub async fn ready(State(app): State<Arc<App>>) -> Result<String, Fault> {
    if app.stopping.is_cancelled() {
        return Err(Fault::new(ErrorCode::Unavailable, "the farm is stopping").retry_after(1));
    }
    app.store.meta(crate::FARM_SECRET).await?;
    let storage = app.blobs.storage().map_err(OpError::from)?;
    Ok(match storage.filter(Storage::is_full) {
        None => "ready\n".to_owned(),
        Some(Storage { free_bytes, floor_bytes }) => {
            let (free, floor) = (free_bytes >> 20, floor_bytes >> 20);
            format!("ready\nstorage_full: {free} MiB are free, {floor} MiB are kept: no new jobs and uploads\n")
        }
    })
}

/// This document.
#[utoipa::path(get, path = path::OPENAPI, tag = "farm", responses((status = 200, body = String)))]
pub async fn openapi(Viewer(_who): Viewer) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], super::openapi().clone()).into_response()
}

/// Version, protocol, time.
#[utoipa::path(get, path = path::INFO, tag = "farm", responses((status = 200, body = Info)))]
pub async fn info(State(app): State<Arc<App>>, Viewer(_who): Viewer) -> Result<Json<Info>, Fault> {
    Ok(Json(Info {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        protocol_min: *PROTOCOL.start(),
        protocol_max: *PROTOCOL.end(),
        capabilities: Vec::new(),
        base_url: app.base_url.clone(),
        time: app.env.now().wall.rfc3339(),
        timeout_max_ms: Some(app.limits.job_timeout_max_ms),
        queue_timeout_max_ms: Some(app.limits.queue_timeout_max_ms()),
        storage: app.blobs.storage().map_err(OpError::from)?,
    }))
}

/// Whose token this is.
#[utoipa::path(get, path = path::WHOAMI, tag = "farm", responses((status = 200, body = WhoAmI)))]
pub async fn whoami(Viewer(who): Viewer) -> Json<WhoAmI> {
    Json(WhoAmI { name: who.name, role: who.role, org: who.org })
}

/// All workers, as they are at this moment.
#[utoipa::path(get, path = path::WORKERS, tag = "workers", responses((status = 200, body = WorkerList)))]
pub async fn list_workers(State(app): State<Arc<App>>, Viewer(who): Viewer) -> Result<Json<WorkerList>, Fault> {
    Ok(Json(WorkerList { workers: workers::list(&app, &who).await? }))
}

/// One worker.
#[utoipa::path(get, path = path::WORKER, tag = "workers", params(("id" = String, Path,)), responses((status = 200, body = WorkerView)))]
pub async fn show_worker(
    State(app): State<Arc<App>>,
    Viewer(who): Viewer,
    PathOf(id): PathOf<WorkerId>,
) -> Result<Json<WorkerView>, Fault> {
    let worker = workers::one(&app, &who, id).await?;
    Ok(Json(workers::view(&app, worker).await?))
}

/// A single-use token with which one new worker joins.
#[utoipa::path(post, path = path::WORKER_INVITES, tag = "workers", request_body = InviteRequest, responses((status = 201, body = Invite)))]
pub async fn invite(
    State(app): State<Arc<App>>,
    Admin(who): Admin,
    JsonOrNothing(request): JsonOrNothing<InviteRequest>,
) -> Result<(StatusCode, Json<Invite>), Fault> {
    Ok((StatusCode::CREATED, Json(access::invite(&app, &who, request).await?)))
}

/// A new worker's first call, with the invitation as its credential.
#[utoipa::path(post, path = path::WORKER_ENROL, tag = "workers", request_body = EnrolRequest, responses((status = 200, body = Enrolled)))]
pub async fn enrol(
    State(app): State<Arc<App>>,
    peer: Peer,
    JsonBody(request): JsonBody<EnrolRequest>,
) -> Result<Json<Enrolled>, Fault> {
    match access::enrol(&app, request).await {
        Ok(enrolled) => Ok(Json(enrolled)),
        // An unknown invitation is a guess like any other; what is wrong with it is told until the limit.
        Err(OpError::Refused { code: ErrorCode::Unauthenticated, message, hint, errors }) => {
            match refuse(&app, &peer, Denied::Unknown) {
                throttled if throttled.code() == ErrorCode::TooManyRequests => Err(throttled),
                _ => Err(OpError::Refused { code: ErrorCode::Unauthenticated, message, hint, errors }.into()),
            }
        }
        Err(error) => Err(error.into()),
    }
}

/// Lets a worker finish what it has and take no more.
#[utoipa::path(post, path = path::WORKER_DRAIN, tag = "workers", params(("id" = String, Path,)), request_body = DrainRequest, responses((status = 200, body = WorkerView)))]
pub async fn drain(
    State(app): State<Arc<App>>,
    Admin(who): Admin,
    PathOf(id): PathOf<WorkerId>,
    JsonOrNothing(request): JsonOrNothing<DrainRequest>,
) -> Result<Json<WorkerView>, Fault> {
    let worker = workers::set_drain(&app, &who, id, Some(request)).await?;
    Ok(Json(workers::view(&app, worker).await?))
}

/// Lets a drained worker take jobs again.
#[utoipa::path(post, path = path::WORKER_RESUME, tag = "workers", params(("id" = String, Path,)), responses((status = 200, body = WorkerView)))]
pub async fn resume(
    State(app): State<Arc<App>>,
    Admin(who): Admin,
    PathOf(id): PathOf<WorkerId>,
) -> Result<Json<WorkerView>, Fault> {
    let worker = workers::set_drain(&app, &who, id, None).await?;
    Ok(Json(workers::view(&app, worker).await?))
}

/// Takes a worker out of the farm for ever. What it holds is tried elsewhere.
#[utoipa::path(delete, path = path::WORKER, tag = "workers", params(("id" = String, Path,)), responses((status = 204)))]
pub async fn revoke_worker(
    State(app): State<Arc<App>>,
    Admin(who): Admin,
    PathOf(id): PathOf<WorkerId>,
) -> Result<StatusCode, Fault> {
    workers::revoke(&app, &who, id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A new token. It is shown once.
#[utoipa::path(post, path = path::TOKENS, tag = "tokens", request_body = TokenRequest, responses((status = 201, body = TokenCreated)))]
pub async fn create_token(
    State(app): State<Arc<App>>,
    Admin(who): Admin,
    JsonBody(request): JsonBody<TokenRequest>,
) -> Result<(StatusCode, Json<TokenCreated>), Fault> {
    Ok((StatusCode::CREATED, Json(access::create_token(&app, &who, request).await?)))
}

/// All tokens, without what is secret of them.
#[utoipa::path(get, path = path::TOKENS, tag = "tokens", responses((status = 200, body = TokenList)))]
pub async fn list_tokens(State(app): State<Arc<App>>, Admin(who): Admin) -> Result<Json<TokenList>, Fault> {
    Ok(Json(TokenList { tokens: access::list_tokens(&app, &who).await? }))
}

/// Makes a token void at once. Revoking it again changes nothing and gives the same answer.
#[utoipa::path(delete, path = path::TOKEN, tag = "tokens", params(("id" = String, Path,)), responses((status = 200, body = TokenView)))]
pub async fn revoke_token(
    State(app): State<Arc<App>>,
    Admin(who): Admin,
    PathOf(id): PathOf<TokenId>,
) -> Result<Json<TokenView>, Fault> {
    Ok(Json(access::revoke_token(&app, &who, id).await?))
}
