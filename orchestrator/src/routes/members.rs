//! S: people who sign in elsewhere.

use std::sync::Arc;

use alloy_shared::id::UserId;
use alloy_shared::wire::farm::{MemberList, MemberRequest, MemberView};
use alloy_shared::wire::path;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::extract::{Admin, JsonBody, PathOf};
use crate::App;
use crate::error::Fault;
use crate::ops::members;

/// Everybody who may use the farm by signing in.
#[utoipa::path(get, path = path::MEMBERS, tag = "members", responses((status = 200, body = MemberList)))]
pub async fn list(State(app): State<Arc<App>>, Admin(who): Admin) -> Result<Json<MemberList>, Fault> {
    Ok(Json(MemberList { members: members::list(&app, &who).await? }))
}

/// Makes somebody a member, or changes what they may do. `user_id` is the `sub` of their sign-in tokens.
#[utoipa::path(put, path = path::MEMBER, tag = "members", params(("user_id" = String, Path,)), request_body = MemberRequest, responses((status = 200, body = MemberView)))]
pub async fn set(
    State(app): State<Arc<App>>,
    Admin(who): Admin,
    PathOf(user): PathOf<UserId>,
    JsonBody(request): JsonBody<MemberRequest>,
) -> Result<Json<MemberView>, Fault> {
    Ok(Json(members::set(&app, &who, user, request).await?))
}

/// Takes somebody out of the organisation, at once. What they started goes on.
#[utoipa::path(delete, path = path::MEMBER, tag = "members", params(("user_id" = String, Path,)), responses((status = 204)))]
pub async fn remove(
    State(app): State<Arc<App>>,
    Admin(who): Admin,
    PathOf(user): PathOf<UserId>,
) -> Result<StatusCode, Fault> {
    members::remove(&app, &who, user).await?;
    Ok(StatusCode::NO_CONTENT)
}
