//! Tests of the front door: a whole `App` over the memory store, on a clock that the test turns.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use alloy_shared::env::{Env, Mono, Ms, Now};
use alloy_shared::id::{DEFAULT_ORG, Labels, OrgId, TokenId, WorkerId};
use alloy_shared::limits::Limits;
use alloy_shared::secret::{Secret, Token, TokenKind};
use alloy_shared::wire::farm::Role;
use async_trait::async_trait;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use futures_util::future::BoxFuture;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use crate::auth::sign_in::SignIn;
use crate::blobs::Blobs;
use crate::logs::Logs;
use crate::store::mem::MemStore;
use crate::store::{Group, TokenRow, Worker, Write};
use crate::{App, Ground};

mod access;
mod auth;
mod gc;
pub(crate) mod keys;
mod orgs;
mod people;
mod routes;
mod serve;
mod submit;

/// A worker as it is right after it was enrolled.
pub(crate) fn enrolled(n: u128) -> Worker {
    Worker {
        id: WorkerId::from_raw(n),
        org: DEFAULT_ORG,
        name: format!("w{n}"),
        public_key: [n as u8; 32],
        labels: Labels::default(),
        host_labels: Labels::default(),
        version: String::new(),
        epoch: 0,
        boot: String::new(),
        draining: false,
        drain_note: None,
        enrolled_at: Ms(0),
        seen_at: None,
        revoked: false,
    }
}

const START: Ms = Ms(1_700_000_000_000);

/// Time stands still until the test moves it.
pub(crate) struct TestEnv {
    mono: watch::Sender<u64>,
    dice: AtomicU64,
    tasks: TaskTracker,
}

impl TestEnv {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { mono: watch::channel(0).0, dice: AtomicU64::new(1), tasks: TaskTracker::new() })
    }
    pub(crate) fn advance(&self, ms: u64) {
        self.mono.send_modify(|now| *now += ms);
    }
    /// Waits for the end of every task that was begun.
    pub(crate) async fn settled(&self) {
        self.tasks.close();
        self.tasks.wait().await;
        self.tasks.reopen();
    }
}

#[async_trait]
impl Env for TestEnv {
    fn now(&self) -> Now {
        let mono = *self.mono.borrow();
        Now { wall: START.plus(mono), mono: Mono(mono) }
    }
    async fn sleep_until(&self, at: Mono) {
        let mut mono = self.mono.subscribe();
        if mono.wait_for(|now| *now >= at.0).await.is_err() {
            std::future::pending().await
        }
    }
    fn spawn(&self, _: &'static str, task: BoxFuture<'static, ()>) {
        self.tasks.spawn(task);
    }
    fn dice(&self) -> u64 {
        self.dice.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}

fn random() -> [u8; 32] {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let mut out = [7; 32];
    out[..8].copy_from_slice(&NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes());
    out
}

async fn app() -> (Arc<App>, Arc<TestEnv>) {
    app_on(Blobs::memory()).await
}

async fn app_on(blobs: Blobs) -> (Arc<App>, Arc<TestEnv>) {
    let clock = TestEnv::new();
    (app_with(blobs, clock.clone(), None).await, clock)
}

async fn app_with(blobs: Blobs, clock: Arc<TestEnv>, sign_in: Option<SignIn>) -> Arc<App> {
    let env: Arc<dyn Env> = clock;
    let ground = Ground {
        store: Arc::new(MemStore::default()),
        logs: Logs::memory(),
        blobs: Arc::new(blobs),
        shared: None,
        env,
        limits: Limits::default(),
        keep: crate::keep::Keep::default(),
        secret: Secret::new([3; 32]),
        base_url: "http://farm.test".into(),
        behind_proxy: false,
        random,
        sign_in,
        stopping: CancellationToken::new(),
    };
    App::on(ground).await.unwrap()
}

async fn write(app: &App, write: Write) {
    let done = app.store.commit(&[Group(vec![write])]).await.unwrap();
    assert!(done.groups[0].is_ok(), "{done:?}");
}

/// A token of this kind and role, in the store.
async fn token_of(app: &App, org: OrgId, kind: TokenKind, role: Role) -> (TokenRow, String) {
    let token = Token::mint(kind, random());
    let row = TokenRow {
        id: TokenId::mint(START, (app.env.dice(), app.env.dice())),
        org,
        hash: token.hash(),
        kind,
        role,
        name: role.as_str().into(),
        shown: token.shown(),
        labels: Labels::default(),
        created_at: START,
        expires_at: None,
        revoked_at: None,
        used_by: None,
    };
    write(app, Write::AddToken(row.clone())).await;
    (row, token.expose().to_owned())
}

async fn token(app: &App, role: Role) -> String {
    token_of(app, DEFAULT_ORG, TokenKind::Personal, role).await.1
}

/// A worker enrolled into this organisation by the normal way.
async fn worker(app: &App, org: OrgId, public_key: [u8; 32]) -> Worker {
    use base64::Engine as _;
    let (_, join) = token_of(app, org, TokenKind::Join, Role::Viewer).await;
    let request = alloy_shared::wire::farm::EnrolRequest {
        token: Secret::new(join),
        public_key: base64::engine::general_purpose::STANDARD.encode(public_key),
        name: "mini".into(),
    };
    let id: WorkerId = crate::ops::access::enrol(app, request).await.unwrap().worker;
    app.store.worker(&crate::store::Scope::farm(), &id).await.unwrap().unwrap()
}

struct Answer {
    status: StatusCode,
    headers: axum::http::HeaderMap,
    body: String,
}

impl Answer {
    fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
    /// The problem's code, after checking that it is one.
    fn problem(&self) -> String {
        assert_eq!(self.header("content-type"), "application/problem+json", "{}", self.body);
        let json = self.json();
        assert_eq!(json["status"], self.status.as_u16());
        assert_eq!(json["request_id"], self.header("x-request-id"));
        json["code"].as_str().unwrap().to_owned()
    }
}

async fn ask(app: &Arc<App>, request: Request<Body>) -> Answer {
    let response = crate::routes::router(app.clone()).oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let body = axum::body::to_bytes(body, 1 << 24).await.unwrap();
    Answer { status: parts.status, headers: parts.headers, body: String::from_utf8(body.to_vec()).unwrap() }
}

fn request(method: &str, path: &str, token: &str) -> axum::http::request::Builder {
    let builder = Request::builder().method(method).uri(path);
    if token.is_empty() { builder } else { builder.header("authorization", format!("Bearer {token}")) }
}

async fn get(app: &Arc<App>, path: &str, token: &str) -> Answer {
    ask(app, request("GET", path, token).body(Body::empty()).unwrap()).await
}

async fn post(app: &Arc<App>, path: &str, token: &str, body: &str) -> Answer {
    let request = request("POST", path, token).header("content-type", "application/json");
    ask(app, request.body(Body::from(body.to_owned())).unwrap()).await
}
