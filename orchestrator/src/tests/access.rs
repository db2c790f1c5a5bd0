use alloy_shared::id::{AttemptRef, BootId, DEFAULT_ORG, JobId, Labels, OrgId, WorkerId};
use alloy_shared::secret::{Secret, Token, TokenKind};
use alloy_shared::wire::ErrorCode;
use alloy_shared::wire::farm::{DrainRequest, EnrolRequest, InviteRequest, Role, TokenRequest, TokenView};
use alloy_shared::wire::session::{Frame, Held, HeldState, Hello, Link, Order, ToOrchestrator, ToWorker, signed_text};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use tokio::sync::mpsc;

use super::{app, token_of};
use crate::App;
use crate::auth::Principal;
use crate::ops::{OpError, access, workers};
use crate::session::drive;

fn admin(org: OrgId) -> Principal {
    Principal { org, caller: "tok_test".into(), name: "admin".into(), role: Role::Admin }
}

fn code<T: std::fmt::Debug>(result: Result<T, OpError>) -> ErrorCode {
    match result.unwrap_err() {
        OpError::Refused { code, .. } => code,
        other => panic!("{other}"),
    }
}

async fn invited(app: &App, request: InviteRequest) -> Secret<String> {
    access::invite(app, &admin(DEFAULT_ORG), request).await.unwrap().token
}

fn join(token: &Secret<String>, key: u8) -> EnrolRequest {
    EnrolRequest { token: token.clone(), public_key: BASE64.encode([key; 32]), name: " mini-1 ".into() }
}

#[tokio::test]
async fn the_first_token_is_made_once_and_again_when_no_admin_is_left() {
    let (app, _) = app().await;
    let made = std::sync::Mutex::new(Vec::new());
    let first = async || {
        access::first_token(&app, async |token: &Token| {
            made.lock().unwrap().push(token.clone());
            Ok(())
        })
        .await
        .unwrap()
    };
    assert!(first().await && !first().await);
    let header = format!("Bearer {}", made.lock().unwrap()[0].expose());
    let who = app.auth.principal(&*app.store, Some(&header)).await.unwrap();
    assert_eq!(who.role, Role::Admin);
    access::revoke_token(&app, &who, who.caller.parse().unwrap()).await.unwrap();
    assert!(app.auth.principal(&*app.store, Some(&header)).await.is_err());
    assert!(first().await);
}

#[tokio::test]
async fn a_first_token_that_cannot_be_kept_does_not_count() {
    let (app, _) = app().await;
    let lost = access::first_token(&app, async |_: &Token| Err(std::io::Error::other("no disk"))).await;
    assert!(lost.is_err());
    assert!(access::list_tokens(&app, &admin(DEFAULT_ORG)).await.unwrap().is_empty());
}

#[tokio::test]
async fn an_invitation_enrols_one_worker_and_answers_it_again() {
    let (app, _) = app().await;
    let labels = [("site".to_owned(), "berlin".to_owned())].into();
    let token = invited(&app, InviteRequest { labels, ttl_s: None }).await;
    let first = access::enrol(&app, join(&token, 1)).await.unwrap();
    assert_eq!(first.name, "mini-1");
    assert_eq!(access::enrol(&app, join(&token, 1)).await.unwrap(), first);
    assert_eq!(code(access::enrol(&app, join(&token, 2)).await), ErrorCode::Unauthenticated);
    let worker = app.store.worker(&crate::store::Scope::farm(), &first.worker).await.unwrap().unwrap();
    assert_eq!(worker.labels.get("site"), Some("berlin"));
    // A known key under a second invitation is the same worker, and the invitation stays for another.
    let second = invited(&app, InviteRequest::default()).await;
    assert_eq!(access::enrol(&app, join(&second, 1)).await.unwrap(), first);
    assert_ne!(access::enrol(&app, join(&second, 2)).await.unwrap(), first);
}

#[tokio::test]
async fn a_void_invitation_enrols_nobody() {
    let (app, clock) = app().await;
    let token = invited(&app, InviteRequest { ttl_s: Some(60), ..InviteRequest::default() }).await;
    clock.advance(60_000);
    assert_eq!(code(access::enrol(&app, join(&token, 1)).await), ErrorCode::Unauthenticated);
    let unknown = Secret::new(Token::mint(TokenKind::Join, [1; 32]).expose().to_owned());
    assert_eq!(code(access::enrol(&app, join(&unknown, 1)).await), ErrorCode::Unauthenticated);
    let (_, personal) = token_of(&app, DEFAULT_ORG, TokenKind::Personal, Role::Admin).await;
    assert_eq!(code(access::enrol(&app, join(&Secret::new(personal), 1)).await), ErrorCode::Unauthenticated);
    let good = invited(&app, InviteRequest::default()).await;
    for wrong in [
        EnrolRequest { public_key: BASE64.encode([1; 31]), ..join(&good, 1) },
        EnrolRequest { name: "a\u{1b}[2J".into(), ..join(&good, 1) },
        EnrolRequest { name: "  ".into(), ..join(&good, 1) },
    ] {
        assert_eq!(code(access::enrol(&app, wrong).await), ErrorCode::InvalidBody);
    }
    for ttl_s in [Some(0), Some(1_000_000)] {
        let request = InviteRequest { ttl_s, ..InviteRequest::default() };
        assert_eq!(code(access::invite(&app, &admin(DEFAULT_ORG), request).await), ErrorCode::InvalidBody);
    }
}

pub(super) fn hello(key: &Ed25519KeyPair, worker: WorkerId, nonce: &str) -> Hello {
    let boot = BootId::from_raw(8);
    let mut labels = Labels::default();
    labels.insert("os", "macos").unwrap();
    Hello {
        protocol_min: 1,
        protocol_max: 1,
        capabilities: vec![],
        worker,
        boot,
        signature: BASE64.encode(key.sign(signed_text(nonce, worker, boot).as_bytes())),
        version: "0.1.0".into(),
        labels,
        slots: vec![],
        held: vec![],
        draining: false,
        trouble: None,
    }
}

#[tokio::test]
async fn a_session_opens_for_the_key_that_signed_this_nonce() {
    let (app, _) = app().await;
    let key = Ed25519KeyPair::from_seed_unchecked(&[5; 32]).unwrap();
    let other = Ed25519KeyPair::from_seed_unchecked(&[6; 32]).unwrap();
    let public: [u8; 32] = key.public_key().as_ref().try_into().unwrap();
    let id = super::worker(&app, DEFAULT_ORG, public).await.id;

    let first = access::open_session(&app, &hello(&key, id, "n1"), "n1").await.unwrap().epoch;
    let worker = app.store.worker(&crate::store::Scope::farm(), &id).await.unwrap().unwrap();
    assert_eq!((worker.epoch, worker.host_labels.get("os")), (first, Some("macos")));
    let second = access::open_session(&app, &hello(&key, id, "n2"), "n2").await.unwrap().epoch;
    assert_eq!(second, first + 1);

    for (expect, hello) in [
        (ErrorCode::Unauthenticated, hello(&key, id, "n2")),
        (ErrorCode::Unauthenticated, hello(&other, id, "n3")),
        (ErrorCode::Unauthenticated, hello(&key, WorkerId::from_raw(1), "n3")),
        (ErrorCode::Unauthenticated, Hello { boot: BootId::from_raw(9), ..hello(&key, id, "n3") }),
        (ErrorCode::Unauthenticated, Hello { signature: "?".into(), ..hello(&key, id, "n3") }),
        (ErrorCode::UnsupportedProtocol, Hello { protocol_min: 2, protocol_max: 3, ..hello(&key, id, "n3") }),
    ] {
        assert_eq!(access::open_session(&app, &hello, "n3").await.unwrap_err().code, expect);
    }
    let third = access::open_session(&app, &hello(&key, id, "n4"), "n4").await.unwrap().epoch;
    assert_eq!(third, first + 2, "a refused hello opens no session");
}

#[tokio::test]
async fn a_worker_may_forget_an_attempt_that_the_books_do_not_know() {
    let (app, _) = app().await;
    let key = Ed25519KeyPair::from_seed_unchecked(&[5; 32]).unwrap();
    let id = super::worker(&app, DEFAULT_ORG, key.public_key().as_ref().try_into().unwrap()).await.id;
    let (tx, mut said) = mpsc::channel(64);
    let (says, rx) = mpsc::channel(64);
    let attempt = AttemptRef { job: JobId::from_raw(7), attempt: 1 };
    let story = async {
        let ToWorker::Challenge { nonce } = heard(&mut said).await else { panic!("no challenge") };
        let held = vec![Held { attempt, state: HeldState::Lost, log_len: 9, seq: 0 }];
        let hello = Hello { held, ..hello(&key, id, &nonce) };
        says.send(ToOrchestrator::Hello(Box::new(hello)).encode()).await.unwrap();
        let order = loop {
            match heard(&mut said).await {
                ToWorker::Order { order } => break order,
                ToWorker::Reject { message, .. } => panic!("{message}"),
                _ => {}
            }
        };
        drop((says, said));
        order
    };
    let (order, ()) = tokio::join!(story, drive::drive(app, id, Link { tx, rx }));
    assert_eq!(order, Order::ResultAck { attempt });
}

async fn heard(said: &mut mpsc::Receiver<Frame>) -> ToWorker {
    match said.recv().await.unwrap() {
        Frame::Text(text) => ToWorker::decode(&text).unwrap(),
        Frame::Binary(_) => panic!("a worker is sent no bytes"),
    }
}

#[tokio::test]
async fn draining_is_remembered_and_belongs_to_the_own_organisation() {
    let (app, _) = app().await;
    let id = super::worker(&app, DEFAULT_ORG, [4; 32]).await.id;
    let who = admin(DEFAULT_ORG);
    let note = Some("new disk".to_owned());
    let worker = workers::set_drain(&app, &who, id, Some(DrainRequest { note })).await.unwrap();
    assert!(worker.draining);
    let stored = app.store.worker(&who.scope(), &id).await.unwrap().unwrap();
    assert_eq!((stored.draining, stored.drain_note.as_deref()), (true, Some("new disk")));
    let stored = workers::set_drain(&app, &who, id, None).await.unwrap();
    assert_eq!((stored.draining, stored.drain_note), (false, None));
    let stranger = admin(OrgId::from_raw(77));
    assert_eq!(code(workers::set_drain(&app, &stranger, id, None).await), ErrorCode::NotFound);
    let long = DrainRequest { note: Some("x".repeat(201)) };
    assert_eq!(code(workers::set_drain(&app, &who, id, Some(long)).await), ErrorCode::InvalidBody);
}

#[tokio::test]
async fn tokens_are_made_shown_once_and_revoked_within_an_organisation() {
    let (app, _) = app().await;
    let who = admin(DEFAULT_ORG);
    let request = |name: &str, ttl_s| TokenRequest { name: name.into(), role: Role::Developer, ci: true, ttl_s };
    let made = access::create_token(&app, &who, request("ci", Some(60))).await.unwrap();
    assert!(made.token.expose().starts_with("alloy_ci_"));
    assert_eq!(made.view.expires_at, Some(app.env.now().wall.plus(60_000).rfc3339()));
    let listed = access::list_tokens(&app, &who).await.unwrap();
    assert_eq!(listed, std::slice::from_ref(&made.view));
    assert!(!serde_json::to_string(&listed).unwrap().contains(made.token.expose().as_str()));

    let stranger = admin(OrgId::from_raw(77));
    assert!(access::list_tokens(&app, &stranger).await.unwrap().is_empty());
    assert_eq!(code(access::revoke_token(&app, &stranger, made.view.id).await), ErrorCode::NotFound);
    for _ in 0..2 {
        let view = access::revoke_token(&app, &who, made.view.id).await.unwrap();
        assert_eq!(view, TokenView { revoked: true, ..made.view.clone() });
    }
    assert!(access::list_tokens(&app, &who).await.unwrap()[0].revoked);
    for (name, ttl_s) in [("", None), ("x\n", None), ("ok", Some(0)), ("ok", Some(u64::MAX / 1000))] {
        let made = access::create_token(&app, &who, request(name.trim_end_matches(' '), ttl_s)).await;
        if name == "x\n" {
            assert_eq!(made.unwrap().view.name, "x");
        } else {
            assert_eq!(code(made), ErrorCode::InvalidBody, "{name:?} {ttl_s:?}");
        }
    }
}
