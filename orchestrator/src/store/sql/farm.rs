//! S: workers, their sessions, tokens.

use alloy_shared::env::Ms;
use alloy_shared::id::{Digest, OrgId, TokenId, WorkerId};
use alloy_shared::secret::TokenKind;
use alloy_shared::wire::farm::Role;

use super::SqlStore;
use super::conn::{Args, Conn, Reader, Row};
use super::fault::Fault;
use super::job::json;
use crate::store::write::{Enrol, OpenSession, SetWorker};
use crate::store::{Miss, Scope, StoreError, TokenRow, Worker};

super::statements! {
    USE_JOIN_TOKEN = "UPDATE tokens SET used_by = $1 WHERE hash = $2 AND org_id = $3 AND kind = 'join' \
        AND used_by IS NULL AND revoked_at_ms IS NULL AND (expires_at_ms IS NULL OR expires_at_ms > $4)";
    INSERT_WORKER = "INSERT INTO workers (id, org_id, name, public_key, labels, host_labels, version, epoch, boot, draining, \
        drain_note, enrolled_at_ms, seen_at_ms, revoked) \
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)";
    SET_WORKER = "UPDATE workers SET draining = $1, drain_note = $2 WHERE id = $3 AND org_id = $4";
    REVOKE_WORKER = "UPDATE workers SET revoked = TRUE WHERE id = $1 AND org_id = $2";
    OPEN_SESSION = "UPDATE workers SET epoch = epoch + 1, boot = $1, host_labels = $2, version = $3, seen_at_ms = $4 \
        WHERE id = $5 AND revoked = FALSE RETURNING epoch";
    SEEN = "UPDATE workers SET seen_at_ms = CASE WHEN seen_at_ms > $1 THEN seen_at_ms ELSE $1 END WHERE id = $2";
    LEFT = "UPDATE workers SET seen_at_ms = CASE WHEN seen_at_ms > $1 THEN seen_at_ms ELSE $1 END, boot = '' WHERE id = $2";
    INSERT_TOKEN = "INSERT INTO tokens (id, org_id, hash, kind, role, name, shown, labels, created_at_ms, expires_at_ms, \
        revoked_at_ms, used_by) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) ON CONFLICT DO NOTHING";
    REVOKE_TOKEN = "UPDATE tokens SET revoked_at_ms = COALESCE(revoked_at_ms, $1) WHERE id = $2 AND org_id = $3";

    WORKER = "SELECT id, org_id, name, public_key, labels, host_labels, version, epoch, boot, draining, drain_note, \
        enrolled_at_ms, seen_at_ms, revoked FROM workers WHERE id = $1 AND (org_id = $2 OR $2 IS NULL)";
    WORKER_BY_KEY = "SELECT id, org_id, name, public_key, labels, host_labels, version, epoch, boot, draining, drain_note, \
        enrolled_at_ms, seen_at_ms, revoked FROM workers WHERE public_key = $1";
    WORKERS = "SELECT id, org_id, name, public_key, labels, host_labels, version, epoch, boot, draining, drain_note, \
        enrolled_at_ms, seen_at_ms, revoked FROM workers WHERE org_id BETWEEN $1 AND $2";
    TOKEN = "SELECT id, org_id, hash, kind, role, name, shown, labels, created_at_ms, expires_at_ms, revoked_at_ms, used_by \
        FROM tokens WHERE hash = $1";
    TOKENS = "SELECT id, org_id, hash, kind, role, name, shown, labels, created_at_ms, expires_at_ms, revoked_at_ms, used_by \
        FROM tokens WHERE org_id BETWEEN $1 AND $2 AND kind <> 'join'";
}

pub(super) async fn enrol(conn: &mut Conn<'_>, enrol: &Enrol) -> Result<bool, Fault> {
    let worker = &enrol.worker;
    let token = Args::new().text(worker.id).text(enrol.token).text(worker.org).int(enrol.at.0);
    if conn.run(USE_JOIN_TOKEN, token).await? == 0 {
        return Ok(false);
    }
    let args = Args::new()
        .text(worker.id)
        .text(worker.org)
        .text(&worker.name)
        .text(Digest(worker.public_key))
        .text(json(&worker.labels))
        .text(json(&worker.host_labels))
        .text(&worker.version)
        .int(worker.epoch)
        .text(&worker.boot)
        .flag(worker.draining)
        .maybe_text(worker.drain_note.as_ref())
        .int(worker.enrolled_at.0)
        .maybe_int(worker.seen_at.map(|at| at.0))
        .flag(worker.revoked);
    Ok(conn.run(INSERT_WORKER, args).await? == 1)
}

pub(super) async fn set_worker(conn: &mut Conn<'_>, set: &SetWorker) -> Result<bool, Fault> {
    let args = Args::new().flag(set.draining).maybe_text(set.note.as_ref()).text(set.worker).text(set.org);
    Ok(conn.run(SET_WORKER, args).await? == 1)
}

pub(super) async fn revoke_worker(conn: &mut Conn<'_>, org: &OrgId, worker: &WorkerId) -> Result<bool, Fault> {
    Ok(conn.run(REVOKE_WORKER, Args::new().text(worker).text(org)).await? == 1)
}

pub(super) async fn open_session(conn: &mut Conn<'_>, open: &OpenSession) -> Result<Result<i64, Miss>, Fault> {
    let host = Args::new().text(&open.boot).text(json(&open.labels)).text(&open.version);
    let row = conn.first(OPEN_SESSION, host.int(open.at.0).text(open.worker)).await?;
    match row {
        Some(row) => Ok(Ok(Reader::new(&row, "workers", "epoch").int("epoch")?)),
        None => Ok(Err(Miss::Stale)),
    }
}

pub(super) async fn seen(conn: &mut Conn<'_>, worker: &WorkerId, at: Ms, left: bool) -> Result<bool, Fault> {
    Ok(conn.run(if left { LEFT } else { SEEN }, Args::new().int(at.0).text(worker)).await? == 1)
}

pub(super) async fn add_token(conn: &mut Conn<'_>, token: &TokenRow) -> Result<bool, Fault> {
    let args = Args::new()
        .text(token.id)
        .text(token.org)
        .text(token.hash)
        .text(kind_word(token.kind))
        .text(token.role.as_str())
        .text(&token.name)
        .text(&token.shown)
        .text(json(&token.labels))
        .int(token.created_at.0)
        .maybe_int(token.expires_at.map(|at| at.0))
        .maybe_int(token.revoked_at.map(|at| at.0))
        .maybe_text(token.used_by);
    Ok(conn.run(INSERT_TOKEN, args).await? == 1)
}

pub(super) async fn revoke_token(conn: &mut Conn<'_>, org: &OrgId, id: &TokenId, at: Ms) -> Result<bool, Fault> {
    Ok(conn.run(REVOKE_TOKEN, Args::new().int(at.0).text(id).text(org)).await? == 1)
}

const fn kind_word(kind: TokenKind) -> &'static str {
    match kind {
        TokenKind::Personal => "personal",
        TokenKind::Ci => "ci",
        TokenKind::Join => "join",
        TokenKind::Job => "job",
    }
}

/// The first and the last organisation that a scope sees.
pub(super) fn orgs(scope: &Scope) -> (OrgId, OrgId) {
    match scope.filter() {
        Some(org) => (org, org),
        None => (OrgId::from_raw(0), OrgId::from_raw(u128::MAX)),
    }
}

impl SqlStore {
    pub(super) async fn read_worker(&self, scope: &Scope, id: &WorkerId) -> Result<Option<Worker>, StoreError> {
        let rows = self.rows(WORKER, Args::new().text(id).maybe_text(scope.filter())).await?;
        rows.first().map(worker).transpose()
    }

    pub(super) async fn read_worker_by_key(&self, public_key: &[u8; 32]) -> Result<Option<Worker>, StoreError> {
        let rows = self.rows(WORKER_BY_KEY, Args::new().text(Digest(*public_key))).await?;
        rows.first().map(worker).transpose()
    }

    pub(super) async fn read_workers(&self, scope: &Scope) -> Result<Vec<Worker>, StoreError> {
        let (from, to) = orgs(scope);
        let rows = self.rows(WORKERS, Args::new().text(from).text(to)).await?;
        let mut found: Vec<Worker> = rows.iter().map(worker).collect::<Result<_, _>>()?;
        // Sorted here: a database sorts names by the rules of its language.
        found.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
        Ok(found)
    }

    pub(super) async fn read_token(&self, hash: &Digest) -> Result<Option<TokenRow>, StoreError> {
        self.rows(TOKEN, Args::new().text(hash)).await?.first().map(token).transpose()
    }

    pub(super) async fn read_tokens(&self, scope: &Scope) -> Result<Vec<TokenRow>, StoreError> {
        let (from, to) = orgs(scope);
        let rows = self.rows(TOKENS, Args::new().text(from).text(to)).await?;
        let mut found: Vec<TokenRow> = rows.iter().map(token).collect::<Result<_, _>>()?;
        found.sort_by_key(|token| std::cmp::Reverse((token.created_at, token.id)));
        Ok(found)
    }
}

fn worker(row: &Row) -> Result<Worker, StoreError> {
    let row = Reader::new(row, "workers", "id");
    Ok(Worker {
        id: row.parsed("id")?,
        org: row.parsed("org_id")?,
        name: row.text("name")?,
        public_key: row.parsed::<Digest>("public_key")?.0,
        labels: row.json("labels")?,
        host_labels: row.json("host_labels")?,
        version: row.text("version")?,
        epoch: row.int("epoch")?,
        boot: row.text("boot")?,
        draining: row.flag("draining")?,
        drain_note: row.maybe_text("drain_note")?,
        enrolled_at: row.ms("enrolled_at_ms")?,
        seen_at: row.maybe_ms("seen_at_ms")?,
        revoked: row.flag("revoked")?,
    })
}

fn token(row: &Row) -> Result<TokenRow, StoreError> {
    let row = Reader::new(row, "tokens", "id");
    let kind = row.text("kind")?;
    Ok(TokenRow {
        id: row.parsed("id")?,
        org: row.parsed("org_id")?,
        hash: row.parsed("hash")?,
        kind: TokenKind::ALL.into_iter().find(|known| kind_word(*known) == kind).ok_or_else(|| row.corrupt("kind"))?,
        role: Role::parse(&row.text("role")?).ok_or_else(|| row.corrupt("role"))?,
        name: row.text("name")?,
        shown: row.text("shown")?,
        labels: row.json("labels")?,
        created_at: row.ms("created_at_ms")?,
        expires_at: row.maybe_ms("expires_at_ms")?,
        revoked_at: row.maybe_ms("revoked_at_ms")?,
        used_by: row.maybe_parsed("used_by")?,
    })
}
