//! P: people who sign in elsewhere: who of them may use the farm, and how far.

use alloy_shared::id::UserId;
use alloy_shared::wire::farm::{MemberRequest, MemberView};

use super::OpError;
use super::access::{commit_one, wrong_field};
use crate::App;
use crate::auth::Principal;
use crate::store::{MemberRow, Write};

/// The longest address that mail knows.
const EMAIL_MAX: usize = 254;
/// Members of one organisation.
const MEMBERS_MAX: usize = 10_000;

pub async fn list(app: &App, who: &Principal) -> Result<Vec<MemberView>, OpError> {
    Ok(app.store.members(&who.scope()).await?.into_iter().map(view).collect())
}

/// Makes somebody a member of the caller's organisation, or changes what they may do there.
pub async fn set(app: &App, who: &Principal, user: UserId, request: MemberRequest) -> Result<MemberView, OpError> {
    let email = request.email.map(|text| text.trim().to_owned()).filter(|text| !text.is_empty());
    if let Some(email) = &email
        && (email.len() > EMAIL_MAX || !email.contains('@') || email.chars().any(char::is_control))
    {
        return Err(wrong_field("email", format!("is an address like me@example.com, at most {EMAIL_MAX} bytes")));
    }
    let known = app.store.members(&who.scope()).await?;
    if known.len() >= MEMBERS_MAX && !known.iter().any(|row| row.user == user) {
        return Err(wrong_field("user_id", format!("an organisation has at most {MEMBERS_MAX} members")));
    }
    let row = MemberRow { user, org: who.org, role: request.role, email, created_at: app.env.now().wall };
    commit_one(app, Write::SetMember(row.clone())).await?;
    app.auth.forget();
    let kept = app.store.memberships(&user).await?.into_iter().find(|kept| kept.org == who.org);
    Ok(view(kept.unwrap_or(row)))
}

/// Takes somebody out of the caller's organisation, at once.
pub async fn remove(app: &App, who: &Principal, user: UserId) -> Result<(), OpError> {
    if !app.store.memberships(&user).await?.iter().any(|row| row.org == who.org) {
        return Err(OpError::not_found("member"));
    }
    commit_one(app, Write::DropMember { org: who.org, user }).await?;
    app.auth.forget();
    Ok(())
}

fn view(row: MemberRow) -> MemberView {
    MemberView { user_id: row.user, role: row.role, email: row.email, created_at: row.created_at.rfc3339() }
}
