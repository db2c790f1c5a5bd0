//! S: people who sign in elsewhere.

use alloy_shared::id::{OrgId, UserId};
use alloy_shared::wire::farm::Role;

use super::SqlStore;
use super::conn::{Args, Conn, Reader, Row};
use super::farm::orgs;
use super::fault::Fault;
use crate::store::{MemberRow, Scope, StoreError};

super::statements! {
    SET_MEMBER = "INSERT INTO members (user_id, org_id, role, email, created_at_ms) VALUES ($1, $2, $3, $4, $5) \
        ON CONFLICT (user_id, org_id) DO UPDATE SET role = excluded.role, email = COALESCE(excluded.email, members.email)";
    DROP_MEMBER = "DELETE FROM members WHERE user_id = $1 AND org_id = $2";

    MEMBERSHIPS = "SELECT user_id, org_id, role, email, created_at_ms FROM members WHERE user_id = $1";
    MEMBERS = "SELECT user_id, org_id, role, email, created_at_ms FROM members WHERE org_id BETWEEN $1 AND $2";
}

pub(super) async fn set_member(conn: &mut Conn<'_>, row: &MemberRow) -> Result<bool, Fault> {
    let args = Args::new().text(row.user).text(row.org).text(row.role.as_str()).maybe_text(row.email.as_ref());
    Ok(conn.run(SET_MEMBER, args.int(row.created_at.0)).await? == 1)
}

pub(super) async fn drop_member(conn: &mut Conn<'_>, org: &OrgId, user: &UserId) -> Result<bool, Fault> {
    Ok(conn.run(DROP_MEMBER, Args::new().text(user).text(org)).await? == 1)
}

impl SqlStore {
    pub(super) async fn read_memberships(&self, user: &UserId) -> Result<Vec<MemberRow>, StoreError> {
        let rows = self.rows(MEMBERSHIPS, Args::new().text(user)).await?;
        let mut found: Vec<MemberRow> = rows.iter().map(member).collect::<Result<_, _>>()?;
        found.sort_by_key(|row| (row.created_at, row.org));
        Ok(found)
    }

    pub(super) async fn read_members(&self, scope: &Scope) -> Result<Vec<MemberRow>, StoreError> {
        let (from, to) = orgs(scope);
        let rows = self.rows(MEMBERS, Args::new().text(from).text(to)).await?;
        let mut found: Vec<MemberRow> = rows.iter().map(member).collect::<Result<_, _>>()?;
        found.sort_by_key(|row| (row.created_at, row.user, row.org));
        Ok(found)
    }
}

fn member(row: &Row) -> Result<MemberRow, StoreError> {
    let row = Reader::new(row, "members", "user_id");
    Ok(MemberRow {
        user: row.parsed("user_id")?,
        org: row.parsed("org_id")?,
        role: Role::parse(&row.text("role")?).ok_or_else(|| row.corrupt("role"))?,
        email: row.maybe_text("email")?,
        created_at: row.ms("created_at_ms")?,
    })
}
