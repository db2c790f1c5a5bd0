//! S: images of VMs: what there is, and what the farm wishes.

use std::sync::Arc;

use alloy_shared::wire::image::{ImageList, ImageView, PinRequest, PullRequest, RemoveRequest};
use alloy_shared::wire::path;
use axum::Json;
use axum::extract::State;

use super::extract::{Admin, JsonBody, Viewer};
use crate::App;
use crate::error::Fault;
use crate::ops::images;

/// Every image that the farm wants or that a worker has, with how far each worker is.
#[utoipa::path(get, path = path::IMAGES, tag = "images", responses((status = 200, body = ImageList)))]
pub async fn list(State(app): State<Arc<App>>, Viewer(who): Viewer) -> Result<Json<ImageList>, Fault> {
    Ok(Json(images::list(&app, &who).await?))
}

/// Workers shall have this image, as its registry has it now.
#[utoipa::path(post, path = path::IMAGES, tag = "images", request_body = PullRequest, responses((status = 200, body = ImageView)))]
pub async fn pull(
    State(app): State<Arc<App>>,
    Admin(who): Admin,
    JsonBody(request): JsonBody<PullRequest>,
) -> Result<Json<ImageView>, Fault> {
    Ok(Json(images::pull(&app, &who, request).await?))
}

/// Keeps an image from being evicted, or no longer.
#[utoipa::path(post, path = path::IMAGE_PIN, tag = "images", request_body = PinRequest, responses((status = 200, body = ImageView)))]
pub async fn pin(
    State(app): State<Arc<App>>,
    Admin(who): Admin,
    JsonBody(request): JsonBody<PinRequest>,
) -> Result<Json<ImageView>, Fault> {
    Ok(Json(images::pin(&app, &who, request).await?))
}

/// Removes an image from every worker, where nothing needs it.
#[utoipa::path(post, path = path::IMAGE_REMOVE, tag = "images", request_body = RemoveRequest, responses((status = 200, body = ImageView)))]
pub async fn remove(
    State(app): State<Arc<App>>,
    Admin(who): Admin,
    JsonBody(request): JsonBody<RemoveRequest>,
) -> Result<Json<ImageView>, Fault> {
    Ok(Json(images::remove(&app, &who, &request.name).await?))
}
