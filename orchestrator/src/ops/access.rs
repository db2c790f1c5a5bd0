//! P: who belongs to the farm: invitations, enrolment, sessions of workers, tokens of callers.

use alloy_shared::env::Ms;
use alloy_shared::id::{DEFAULT_ORG, Digest, Labels, OrgId, TokenId, WorkerId, check_name, printable};
use alloy_shared::limits;
use alloy_shared::secret::{BadToken, Secret, Token, TokenKind};
use alloy_shared::wire::farm::{
    EnrolRequest, Enrolled, Invite, InviteRequest, Role, TokenCreated, TokenRequest, TokenView,
};
use alloy_shared::wire::session::{Hello, signed_text};
use alloy_shared::wire::{ErrorCode, FieldError, PROTOCOL};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::signature::{ED25519, UnparsedPublicKey};

use super::OpError;
use crate::App;
use crate::auth::Principal;
use crate::store::write::{Enrol, OpenSession};
use crate::store::{Group, Miss, Scope, TokenRow, Worker, Write};

/// Ten years: longer is a mistake of units.
const TOKEN_TTL_MAX_S: u64 = 10 * 365 * 86_400;

/// A session as the books have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened {
    pub epoch: i64,
    /// The worker's.
    pub org: OrgId,
    pub name: String,
}

/// Why a worker's session does not come about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reject {
    pub code: ErrorCode,
    pub message: String,
    pub retry_after_ms: Option<u64>,
}

/// Makes a join token for one worker.
pub async fn invite(app: &App, who: &Principal, request: InviteRequest) -> Result<Invite, OpError> {
    let labels = Labels::try_from(&request.labels).map_err(|bad| wrong_field("labels", bad.to_string()))?;
    let ttl_s = request.ttl_s.unwrap_or(limits::JOIN_TTL_S);
    if ttl_s == 0 || ttl_s > limits::JOIN_TTL_S {
        return Err(wrong_field("ttl_s", format!("is 1 to {} seconds", limits::JOIN_TTL_S)));
    }
    let now = app.env.now().wall;
    let token = Token::mint(TokenKind::Join, (app.random)());
    let expires_at = now.plus(ttl_s * 1000);
    let row = TokenRow {
        kind: TokenKind::Join,
        labels,
        expires_at: Some(expires_at),
        ..row_of(app, who.org, &token, "invitation".to_owned(), Role::Viewer, now)
    };
    commit_one(app, Write::AddToken(row)).await?;
    Ok(Invite {
        command: format!("worker join {} {}", app.base_url, token.expose()),
        token: Secret::new(token.expose().to_owned()),
        expires_at: expires_at.rfc3339(),
    })
}

/// Uses an invitation up. The same key under the same invitation gives the same worker again.
pub async fn enrol(app: &App, request: EnrolRequest) -> Result<Enrolled, OpError> {
    let name = checked_name("name", &request.name)?;
    let public_key = BASE64
        .decode(&request.public_key)
        .ok()
        .and_then(|bytes| <[u8; 32]>::try_from(bytes).ok())
        .ok_or_else(|| wrong_field("public_key", "is base64 of the 32 bytes of an Ed25519 key"))?;
    let token = Token::parse(request.token.expose()).map_err(|bad| match bad {
        BadToken::Prefix => void(format!("an invitation starts with {}", TokenKind::Join.prefix())),
        BadToken::Length | BadToken::Check => void(format!("this is no invitation: {bad}")),
    })?;
    let hash = token.hash();
    let row = invitation(app, &token, &hash).await?;
    if let Some(worker) = app.store.worker_by_key(&public_key).await? {
        return known_again(&row, worker);
    }
    if row.used_by.is_some() {
        return Err(used());
    }
    let now = app.env.now().wall;
    let worker = Worker {
        id: WorkerId::mint(now, (app.env.dice(), app.env.dice())),
        org: row.org,
        name,
        public_key,
        labels: row.labels,
        host_labels: Labels::default(),
        version: String::new(),
        epoch: 0,
        boot: String::new(),
        draining: false,
        drain_note: None,
        enrolled_at: now,
        seen_at: None,
        revoked: false,
    };
    let enrolled = Enrolled { worker: worker.id, name: worker.name.clone() };
    let enrol = Write::Enrol(Box::new(Enrol { token: hash, at: now, worker }));
    match app.store.commit(&[Group(vec![enrol])]).await?.groups.pop() {
        Some(Ok(_)) => Ok(enrolled),
        Some(Err(Miss::Corrupt(what))) => Err(corrupt(&what)),
        // Somebody else used it between the look and the write; perhaps this worker's own first try.
        Some(Err(Miss::Stale | Miss::Exists { .. })) | None => {
            let row = invitation(app, &token, &hash).await?;
            match app.store.worker_by_key(&public_key).await? {
                Some(worker) => known_again(&row, worker),
                None => Err(used()),
            }
        }
    }
}

async fn invitation(app: &App, token: &Token, hash: &Digest) -> Result<TokenRow, OpError> {
    let row = match token.kind {
        TokenKind::Join => app.store.token(hash).await?,
        other @ (TokenKind::Personal | TokenKind::Ci | TokenKind::Job) => {
            let (other, join) = (other.prefix(), TokenKind::Join.prefix());
            return Err(void(format!(
                "a token of this kind ({other}…) invites nobody; an invitation starts with {join}"
            )));
        }
    };
    let row = row.ok_or_else(|| void("nobody knows this invitation"))?;
    if row.revoked_at.is_some() {
        return Err(void("this invitation was revoked"));
    }
    // A used invitation stays good for its worker, which may never have heard the answer.
    if row.used_by.is_none() && row.expires_at.is_some_and(|at| at <= app.env.now().wall) {
        return Err(void("this invitation has expired"));
    }
    Ok(row)
}

fn known_again(row: &TokenRow, worker: Worker) -> Result<Enrolled, OpError> {
    if worker.revoked {
        return Err(void("this worker was revoked").hint("join with --force: that makes a new key"));
    }
    let ours = row.used_by.is_none_or(|by| by == worker.id);
    if worker.org != row.org || !ours {
        return Err(used());
    }
    Ok(Enrolled { worker: worker.id, name: worker.name })
}

fn used() -> OpError {
    void("this invitation was used already")
}

fn void(message: impl Into<String>) -> OpError {
    OpError::refused(ErrorCode::Unauthenticated, message).hint("ask an admin for a new one: `alloy worker invite`")
}

/// Opens a worker's session: its key must have signed this connection's nonce, and the versions must meet.
/// Gives the epoch, the worker and the jobs that are leased to it.
pub async fn open_session(app: &App, hello: &Hello, nonce: &str) -> Result<Opened, Reject> {
    if hello.protocol_max < *PROTOCOL.start() || hello.protocol_min > *PROTOCOL.end() {
        return Err(reject(
            ErrorCode::UnsupportedProtocol,
            format!(
                "the worker speaks protocol {} to {}, this orchestrator {} to {}",
                hello.protocol_min,
                hello.protocol_max,
                PROTOCOL.start(),
                PROTOCOL.end()
            ),
        ));
    }
    if hello.held.len() > limits::HELD_MAX || hello.slots.len() > limits::SLOTS_MAX {
        return Err(reject(ErrorCode::TooLarge, "it says that it holds more than a worker may"));
    }
    let worker = app.store.worker(&Scope::farm(), &hello.worker).await.map_err(away)?;
    let worker = worker.ok_or_else(|| reject(ErrorCode::Unauthenticated, "nobody knows this worker"))?;
    if worker.revoked {
        return Err(revoked());
    }
    let text = signed_text(nonce, hello.worker, hello.boot);
    let signature = BASE64.decode(&hello.signature).unwrap_or_default();
    UnparsedPublicKey::new(&ED25519, &worker.public_key)
        .verify(text.as_bytes(), &signature)
        .map_err(|_| reject(ErrorCode::Unauthenticated, "the signature is not this worker's"))?;
    let open = OpenSession {
        worker: worker.id,
        boot: hello.boot.to_string(),
        labels: hello.labels.clone(),
        version: printable(&hello.version),
        at: app.books_time().await.map_err(away)?,
    };
    let done = app.store.commit(&[Group(vec![Write::OpenSession(Box::new(open))])]).await.map_err(away)?;
    let epoch = match done.groups.first() {
        Some(Ok(numbers)) => numbers.first().copied(),
        Some(Err(_)) | None => None,
    };
    let epoch = epoch.ok_or_else(revoked)?;
    Ok(Opened { epoch, org: worker.org, name: worker.name })
}

pub fn revoked() -> Reject {
    reject(ErrorCode::Unauthenticated, "this worker was removed from the farm")
}

fn reject(code: ErrorCode, message: impl Into<String>) -> Reject {
    Reject { code, message: message.into(), retry_after_ms: None }
}

fn away(error: crate::store::StoreError) -> Reject {
    tracing::warn!("a worker's session cannot be opened: {error}");
    Reject {
        code: ErrorCode::Unavailable,
        message: "the farm's database is busy or away".to_owned(),
        retry_after_ms: Some(1_000),
    }
}

/// Makes a token for a person or a CI system.
pub async fn create_token(app: &App, who: &Principal, request: TokenRequest) -> Result<TokenCreated, OpError> {
    let name = checked_name("name", &request.name)?;
    if let Some(ttl_s) = request.ttl_s
        && (ttl_s == 0 || ttl_s > TOKEN_TTL_MAX_S)
    {
        return Err(wrong_field("ttl_s", format!("is 1 to {TOKEN_TTL_MAX_S} seconds")));
    }
    let now = app.env.now().wall;
    let kind = if request.ci { TokenKind::Ci } else { TokenKind::Personal };
    let token = Token::mint(kind, (app.random)());
    let row = TokenRow {
        expires_at: request.ttl_s.map(|ttl_s| now.plus(ttl_s * 1000)),
        ..row_of(app, who.org, &token, name, request.role, now)
    };
    commit_one(app, Write::AddToken(row.clone())).await?;
    Ok(TokenCreated { token: Secret::new(token.expose().to_owned()), view: token_view(&row) })
}

/// An admin's token if no other opens the farm: at the first start, and after the last admin's was revoked. `keep` puts it where only the owner can read it; it is
/// called before the token counts, so that a crash in between leaves no token that nobody has.
pub async fn first_token<F>(app: &App, keep: F) -> Result<bool, OpError>
where
    F: AsyncFnOnce(&Token) -> std::io::Result<()>,
{
    let now = app.env.now().wall;
    let opens = |row: &TokenRow| row.role == Role::Admin && crate::auth::usable(row, now).is_ok();
    if app.store.tokens(&Scope::farm()).await?.iter().any(opens) {
        return Ok(false);
    }
    let token = Token::mint(TokenKind::Personal, (app.random)());
    keep(&token).await.map_err(|error| OpError::Io { what: "the first token's file", error })?;
    let row = row_of(app, DEFAULT_ORG, &token, "first admin".to_owned(), Role::Admin, now);
    commit_one(app, Write::AddToken(row)).await?;
    Ok(true)
}

pub async fn list_tokens(app: &App, who: &Principal) -> Result<Vec<TokenView>, OpError> {
    Ok(app.store.tokens(&who.scope()).await?.iter().map(token_view).collect())
}

/// Makes a token void at once. Revoking it again changes nothing. The last admin's may go too: the next start of
/// the orchestrator makes another one for who can read its data directory.
pub async fn revoke_token(app: &App, who: &Principal, id: TokenId) -> Result<TokenView, OpError> {
    let all = app.store.tokens(&who.scope()).await?;
    let row = all.iter().find(|row| row.id == id).ok_or_else(|| OpError::not_found("token"))?;
    if row.revoked_at.is_none() {
        let at = app.env.now().wall;
        commit_one(app, Write::RevokeToken { org: row.org, id, at }).await?;
    }
    app.auth.forget();
    Ok(TokenView { revoked: true, ..token_view(row) })
}

fn token_view(row: &TokenRow) -> TokenView {
    TokenView {
        id: row.id,
        name: row.name.clone(),
        role: row.role,
        shown: row.shown.clone(),
        created_at: row.created_at.rfc3339(),
        expires_at: row.expires_at.map(Ms::rfc3339),
        revoked: row.revoked_at.is_some(),
    }
}

fn row_of(app: &App, org: OrgId, token: &Token, name: String, role: Role, now: Ms) -> TokenRow {
    TokenRow {
        id: TokenId::mint(now, (app.env.dice(), app.env.dice())),
        org,
        hash: token.hash(),
        kind: token.kind,
        role,
        name,
        shown: token.shown(),
        labels: Labels::default(),
        created_at: now,
        expires_at: None,
        revoked_at: None,
        used_by: None,
    }
}

pub(super) async fn commit_one(app: &App, write: Write) -> Result<(), OpError> {
    match app.store.commit(&[Group(vec![write])]).await?.groups.pop() {
        Some(Ok(_)) => Ok(()),
        Some(Err(Miss::Corrupt(what))) => Err(corrupt(&what)),
        Some(Err(Miss::Stale | Miss::Exists { .. })) | None => {
            Err(OpError::refused(ErrorCode::NotFound, "it went away while it was being changed"))
        }
    }
}

fn corrupt(what: &str) -> OpError {
    OpError::Io { what: "the database", error: std::io::Error::other(what.to_owned()) }
}

fn checked_name(field: &'static str, text: &str) -> Result<String, OpError> {
    check_name(text).map(str::to_owned).map_err(|bad| wrong_field(field, bad.why))
}

pub(super) fn wrong_field(field: &str, message: impl Into<String>) -> OpError {
    let message = message.into();
    OpError::Refused {
        code: ErrorCode::InvalidBody,
        message: format!("{field}: {message}"),
        hint: None,
        errors: vec![FieldError { field: field.to_owned(), message }],
    }
}
