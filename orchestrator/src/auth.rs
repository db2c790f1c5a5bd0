//! P: from a credential to who is calling, and what an attempt's grant opens.
//!
//! A token is checked by its own digits first, then looked up by its hash. What was found is believed for one second,
//! which is the longest that a revoked token still opens a door elsewhere; here it is forgotten at once.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use alloy_shared::env::{Env, Mono, Ms};
use alloy_shared::id::{AttemptRef, Digest, OrgId, TokenId, UserId, WorkerId};
use alloy_shared::limits;
use alloy_shared::secret::{BadToken, Secret, Token, TokenKind};
use alloy_shared::wire::farm::Role;
use base64::Engine as _;
use governor::clock::{Clock, Reference as _};
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::keyed::HashMapStateStore;
use governor::{Quota, RateLimiter};
use ring::hmac;
use subtle::ConstantTimeEq as _;

use crate::store::{MemberRow, Scope, Store, StoreError, TokenRow};

pub mod jwt;
pub mod sign_in;

use sign_in::{NotIn, SignIn};

/// Who is calling. Exists only for a token that was looked up, and for a member who has signed in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    pub org: OrgId,
    /// The id of its token, or of the person.
    pub caller: String,
    pub name: String,
    pub role: Role,
}

impl Principal {
    pub fn scope(&self) -> Scope {
        Scope::org(self.org)
    }
}

/// The right of a worker to the bytes of one open attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttemptGrant {
    pub at: AttemptRef,
    pub org: OrgId,
    pub worker: WorkerId,
}

/// Why a credential opens nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    #[error("this needs a token")]
    Missing,
    #[error("the token is not one of ours: {0}")]
    Malformed(#[from] BadToken),
    /// A form of `Authorization` that nobody here reads.
    #[error("the Authorization header is neither `Bearer TOKEN` nor `Basic` with the token as password")]
    Unreadable,
    #[error("a token of this kind ({0}…) does not sign in; those that do start with alloy_pat_ or alloy_ci_")]
    WrongKind(&'static str),
    #[error("nobody knows this token")]
    Unknown,
    #[error("this token has expired")]
    Expired,
    #[error("this token was revoked")]
    Revoked,
    #[error("the role {have} is not enough: this needs {need}")]
    Role { have: &'static str, need: &'static str },
    #[error(transparent)]
    SignIn(#[from] NotIn),
    #[error("this farm takes no sign-in tokens")]
    NoSignIn,
    #[error("you have signed in, but you are no member of this farm's organisation")]
    NoMember(UserId),
    /// The grant is good, its attempt is over.
    #[error("the attempt has ended")]
    Ended,
    #[error("too many requests")]
    Throttled { retry_after_s: u64 },
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Denied {
    /// True when somebody may be guessing.
    pub fn is_guess(&self) -> bool {
        match self {
            Self::Malformed(_)
            | Self::Unreadable
            | Self::WrongKind(_)
            | Self::Unknown
            | Self::Expired
            | Self::NoSignIn => true,
            Self::SignIn(NotIn::Bad(bad)) => bad.is_guess(),
            Self::SignIn(NotIn::Away)
            | Self::NoMember(_)
            | Self::Missing
            | Self::Revoked
            | Self::Role { .. }
            | Self::Ended
            | Self::Throttled { .. }
            | Self::Store(_) => false,
        }
    }
}

/// What the orchestrator knows about its callers between two requests.
pub struct Auth {
    env: Arc<dyn Env>,
    known: Mutex<HashMap<Digest, (Mono, TokenRow)>>,
    members: Mutex<HashMap<UserId, (Mono, Vec<MemberRow>)>>,
    sign_in: Option<SignIn>,
    guesses: Throttle<String>,
    calls: Throttle<TokenId>,
    people: Throttle<UserId>,
}

impl Auth {
    pub fn new(env: Arc<dyn Env>) -> Self {
        Self {
            known: Mutex::new(HashMap::new()),
            members: Mutex::new(HashMap::new()),
            sign_in: None,
            people: Throttle::new(env.clone(), limits::TOKEN_CALLS_PER_S, limits::TOKEN_CALLS_BURST),
            guesses: Throttle::new(env.clone(), limits::GUESSES_PER_MINUTE / 60.0, limits::GUESSES_PER_MINUTE),
            calls: Throttle::new(env.clone(), limits::TOKEN_CALLS_PER_S, limits::TOKEN_CALLS_BURST),
            env,
        }
    }

    /// Also takes the tokens of this service.
    pub fn with(self, sign_in: Option<SignIn>) -> Self {
        Self { sign_in, ..self }
    }

    /// Reads an `Authorization` header and finds whose it is.
    pub async fn principal(&self, store: &dyn Store, header: Option<&str>) -> Result<Principal, Denied> {
        self.principal_in(store, header, None).await
    }

    /// The same for a request that names the organisation it is about.
    pub async fn principal_in(
        &self,
        store: &dyn Store,
        header: Option<&str>,
        org: Option<&str>,
    ) -> Result<Principal, Denied> {
        if let Some(text) = sign_in_token(header) {
            return self.person(store, &text, org).await;
        }
        let token = credential(header)?;
        match token.kind {
            TokenKind::Personal | TokenKind::Ci => {}
            kind @ (TokenKind::Join | TokenKind::Job) => return Err(Denied::WrongKind(kind.prefix())),
        }
        let row = self.look_up(store, &token).await?;
        usable(&row, self.env.now().wall)?;
        self.calls.take(&row.id)?;
        Ok(Principal { org: row.org, caller: row.id.to_string(), name: row.name, role: row.role })
    }

    /// A member, by the token of the service that they signed in with.
    async fn person(&self, store: &dyn Store, text: &Secret<String>, org: Option<&str>) -> Result<Principal, Denied> {
        let person = self.sign_in.as_ref().ok_or(Denied::NoSignIn)?.check(text).await?;
        self.people.take(&person.user)?;
        let own = self.memberships(store, person.user).await?;
        // Nobody who adds them somewhere else later changes where they are without a word.
        let asked = |row: &MemberRow| org.is_none_or(|org| row.org.to_string() == org);
        let found = own.into_iter().find(asked).ok_or(Denied::NoMember(person.user))?;
        let MemberRow { user, org, role, email, .. } = found;
        let caller = user.to_string();
        Ok(Principal { org, name: person.email.or(email).unwrap_or_else(|| caller.clone()), caller, role })
    }

    async fn memberships(&self, store: &dyn Store, user: UserId) -> Result<Vec<MemberRow>, StoreError> {
        let now = self.env.now().mono;
        if let Some((at, rows)) = self.lock_members().get(&user)
            && now.since(*at) < limits::TOKEN_CACHE_MS
        {
            return Ok(rows.clone());
        }
        let rows = store.memberships(&user).await?;
        let mut members = self.lock_members();
        if members.len() >= limits::TOKEN_CACHE_MAX {
            members.clear();
        }
        members.insert(user, (now, rows.clone()));
        Ok(rows)
    }

    async fn look_up(&self, store: &dyn Store, token: &Token) -> Result<TokenRow, Denied> {
        let hash = token.hash();
        let now = self.env.now().mono;
        if let Some((at, row)) = self.cache().get(&hash)
            && now.since(*at) < limits::TOKEN_CACHE_MS
        {
            return Ok(row.clone());
        }
        let row = store.token(&hash).await?.ok_or(Denied::Unknown)?;
        let mut known = self.cache();
        if known.len() >= limits::TOKEN_CACHE_MAX {
            known.clear();
        }
        known.insert(hash, (now, row.clone()));
        Ok(row)
    }

    /// Looks every token and member up again. Called where one was revoked or changed.
    pub fn forget(&self) {
        self.cache().clear();
        self.lock_members().clear();
    }

    /// Counts a failed try of this peer; past the limit the answer is to wait.
    pub fn failed(&self, peer: &str) -> Result<(), Denied> {
        self.guesses.take(&peer.to_owned())
    }

    fn lock_members(&self) -> std::sync::MutexGuard<'_, HashMap<UserId, (Mono, Vec<MemberRow>)>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cache(&self) -> std::sync::MutexGuard<'_, HashMap<Digest, (Mono, TokenRow)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) fn usable(row: &TokenRow, now: Ms) -> Result<(), Denied> {
    if row.revoked_at.is_some() {
        return Err(Denied::Revoked);
    }
    if row.expires_at.is_some_and(|at| at <= now) {
        return Err(Denied::Expired);
    }
    Ok(())
}

/// What `Bearer` carries that is no token of ours: those have no dot.
fn sign_in_token(header: Option<&str>) -> Option<Secret<String>> {
    let (scheme, rest) = header?.trim().split_once(' ')?;
    (scheme.eq_ignore_ascii_case("bearer") && rest.contains('.')).then(|| Secret::new(rest.trim().to_owned()))
}

/// The token in an `Authorization` header: `Bearer TOKEN`, or `Basic` with any user and the token as password.
pub fn credential(header: Option<&str>) -> Result<Token, Denied> {
    let (scheme, rest) = header.ok_or(Denied::Missing)?.trim().split_once(' ').ok_or(Denied::Unreadable)?;
    if scheme.eq_ignore_ascii_case("bearer") {
        return Ok(Token::parse(rest.trim())?);
    }
    if scheme.eq_ignore_ascii_case("basic") {
        let bytes = base64::engine::general_purpose::STANDARD.decode(rest.trim()).map_err(|_| Denied::Unreadable)?;
        let text = std::str::from_utf8(&bytes).map_err(|_| Denied::Unreadable)?;
        let (_, password) = text.split_once(':').ok_or(Denied::Unreadable)?;
        return Ok(Token::parse(password)?);
    }
    Err(Denied::Unreadable)
}

/// Makes and checks attempts' tokens: a MAC of the attempt's name, so that none needs to be stored.
pub struct Grants {
    key: hmac::Key,
}

impl Grants {
    pub fn new(farm_secret: &Secret<[u8; 32]>) -> Self {
        Self { key: hmac::Key::new(hmac::HMAC_SHA256, farm_secret.expose()) }
    }

    pub fn mint(&self, at: &AttemptRef) -> Secret<String> {
        Secret::new(self.token(at).expose().to_owned())
    }

    /// True when the token is this attempt's.
    pub fn check(&self, at: &AttemptRef, token: &Token) -> bool {
        self.token(at).expose().as_bytes().ct_eq(token.expose().as_bytes()).into()
    }

    fn token(&self, at: &AttemptRef) -> Token {
        let tag = hmac::sign(&self.key, format!("alloy attempt grant\n{at}\n").as_bytes());
        let mut bytes = [0; 32];
        bytes.copy_from_slice(tag.as_ref());
        Token::mint(TokenKind::Job, bytes)
    }
}

/// Checks that the header carries the token of this attempt, and that the attempt is open.
pub async fn attempt_grant(
    store: &dyn Store,
    grants: &Grants,
    at: AttemptRef,
    header: Option<&str>,
) -> Result<AttemptGrant, Denied> {
    let token = credential(header)?;
    match token.kind {
        TokenKind::Job => {}
        kind @ (TokenKind::Personal | TokenKind::Ci | TokenKind::Join) => return Err(Denied::WrongKind(kind.prefix())),
    }
    if !grants.check(&at, &token) {
        return Err(Denied::Unknown);
    }
    let attempt = store.attempt(&Scope::farm(), &at).await?.ok_or(Denied::Ended)?;
    if attempt.ended_at.is_some() {
        return Err(Denied::Ended);
    }
    Ok(AttemptGrant { at, org: attempt.org, worker: attempt.worker })
}

/// Finds the enrolled worker that `Authorization: Worker wkr_…` names. Its signature comes later, in `hello`.
pub async fn named_worker(store: &dyn Store, header: Option<&str>) -> Result<WorkerId, Denied> {
    let (scheme, rest) = header.ok_or(Denied::Missing)?.trim().split_once(' ').ok_or(Denied::Unreadable)?;
    if !scheme.eq_ignore_ascii_case("worker") {
        return Err(Denied::Unreadable);
    }
    let id: WorkerId = rest.trim().parse().map_err(|_| Denied::Unreadable)?;
    let worker = store.worker(&Scope::farm(), &id).await?.ok_or(Denied::Unknown)?;
    if worker.revoked { Err(Denied::Revoked) } else { Ok(id) }
}

/// A rate limit per key, on the time of `Env`.
struct Throttle<K: Hash + Eq + Clone> {
    clock: EnvClock,
    limiter: RateLimiter<K, HashMapStateStore<K>, EnvClock, NoOpMiddleware<Nanos>>,
}

impl<K: Hash + Eq + Clone> Throttle<K> {
    fn new(env: Arc<dyn Env>, per_s: f64, burst: f64) -> Self {
        let period = core::time::Duration::from_secs_f64(1.0 / per_s.max(0.001));
        let burst = std::num::NonZeroU32::new(burst as u32).unwrap_or(std::num::NonZeroU32::MIN);
        let quota = Quota::with_period(period)
            .unwrap_or_else(|| Quota::per_second(std::num::NonZeroU32::MIN))
            .allow_burst(burst);
        let clock = EnvClock(env);
        Self { limiter: RateLimiter::hashmap_with_clock(quota, clock.clone()), clock }
    }

    fn take(&self, key: &K) -> Result<(), Denied> {
        if self.limiter.len() >= limits::THROTTLE_KEYS_MAX {
            self.limiter.retain_recent();
        }
        self.limiter.check_key(key).map_err(|until| {
            let wait = until.earliest_possible().duration_since(self.clock.now());
            Denied::Throttled { retry_after_s: wait.as_u64().div_ceil(1_000_000_000).max(1) }
        })
    }
}

#[derive(Clone)]
struct EnvClock(Arc<dyn Env>);

impl Clock for EnvClock {
    type Instant = Nanos;
    fn now(&self) -> Nanos {
        Nanos::new(self.0.now().mono.0.saturating_mul(1_000_000))
    }
}
