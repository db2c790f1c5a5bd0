//! S: how long things are kept.

use std::sync::Arc;

use alloy_shared::wire::farm::{RetentionRequest, RetentionView};
use alloy_shared::wire::path;
use axum::Json;
use axum::extract::State;

use super::extract::{Admin, JsonBody};
use crate::App;
use crate::error::Fault;
use crate::ops::retention;

/// How long jobs, artifacts, logs and sources of the caller's organisation are kept.
#[utoipa::path(get, path = path::RETENTION, tag = "retention", responses((status = 200, body = RetentionView)))]
pub async fn show(State(app): State<Arc<App>>, Admin(who): Admin) -> Result<Json<RetentionView>, Fault> {
    Ok(Json(retention::show(&app, &who).await?))
}

/// Says it anew, all four. What is older goes at the next look.
#[utoipa::path(put, path = path::RETENTION, tag = "retention", request_body = RetentionRequest, responses((status = 200, body = RetentionView)))]
pub async fn set(
    State(app): State<Arc<App>>,
    Admin(who): Admin,
    JsonBody(request): JsonBody<RetentionRequest>,
) -> Result<Json<RetentionView>, Fault> {
    Ok(Json(retention::set(&app, &who, request).await?))
}
