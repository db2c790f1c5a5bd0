use alloy_shared::id::{AttemptRef, DEFAULT_ORG, JobId};
use alloy_shared::secret::{Secret, Token, TokenKind};
use alloy_shared::wire::farm::Role;
use base64::Engine as _;

use super::{app, token_of, write};
use crate::auth::{Denied, Grants, attempt_grant, credential, named_worker};
use crate::store::Write;

#[test]
fn a_credential_is_bearer_or_a_basic_password() {
    let token = Token::mint(TokenKind::Ci, [9; 32]);
    let text = token.expose();
    let basic = |pair: String| format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair));
    for good in [
        format!("Bearer {text}"),
        format!("bearer  {text} "),
        basic(format!("anybody:{text}")),
        basic(format!(":{text}")),
    ] {
        assert_eq!(credential(Some(&good)).unwrap(), token, "{good}");
    }
    assert_eq!(credential(None), Err(Denied::Missing));
    for bad in [text.to_owned(), format!("Digest {text}"), basic(text.to_owned()), "Basic ?".to_owned(), String::new()]
    {
        assert_eq!(credential(Some(&bad)), Err(Denied::Unreadable), "{bad}");
    }
    let mut typo = format!("Bearer {text}");
    typo.pop();
    assert!(matches!(credential(Some(&typo)), Err(Denied::Malformed(_))));
}

#[tokio::test]
async fn only_a_known_usable_token_of_a_caller_is_a_principal() {
    let (app, clock) = app().await;
    let store = &*app.store;
    let (row, text) = token_of(&app, DEFAULT_ORG, TokenKind::Personal, Role::Developer).await;
    let header = format!("Bearer {text}");
    let who = app.auth.principal(store, Some(&header)).await.unwrap();
    assert_eq!((who.org, who.caller, who.role), (DEFAULT_ORG, row.id.to_string(), Role::Developer));

    let stranger = format!("Bearer {}", Token::mint(TokenKind::Personal, [1; 32]).expose());
    assert_eq!(app.auth.principal(store, Some(&stranger)).await, Err(Denied::Unknown));
    for kind in [TokenKind::Join, TokenKind::Job] {
        let (_, text) = token_of(&app, DEFAULT_ORG, kind, Role::Admin).await;
        let denied = app.auth.principal(store, Some(&format!("Bearer {text}"))).await;
        assert_eq!(denied, Err(Denied::WrongKind(kind.prefix())));
    }
    let token = Token::mint(TokenKind::Ci, [2; 32]);
    let expires_at = Some(app.env.now().wall.plus(5_000));
    let short = crate::store::TokenRow { hash: token.hash(), kind: TokenKind::Ci, expires_at, id: row_id(9), ..row };
    write(&app, Write::AddToken(short)).await;
    let header = format!("Bearer {}", token.expose());
    assert!(app.auth.principal(store, Some(&header)).await.is_ok());
    clock.advance(5_000);
    assert_eq!(app.auth.principal(store, Some(&header)).await, Err(Denied::Expired));
}

fn row_id(n: u128) -> alloy_shared::id::TokenId {
    alloy_shared::id::TokenId::from_raw(n)
}

#[tokio::test]
async fn a_token_revoked_elsewhere_opens_nothing_after_a_second_and_one_revoked_here_at_once() {
    let (app, clock) = app().await;
    for here in [false, true] {
        let (row, text) = token_of(&app, DEFAULT_ORG, TokenKind::Personal, Role::Viewer).await;
        let header = format!("Bearer {text}");
        app.auth.principal(&*app.store, Some(&header)).await.unwrap();
        write(&app, Write::RevokeToken { org: row.org, id: row.id, at: app.env.now().wall }).await;
        if here {
            app.auth.forget();
        } else {
            clock.advance(999);
            assert!(app.auth.principal(&*app.store, Some(&header)).await.is_ok());
            clock.advance(1);
        }
        assert_eq!(app.auth.principal(&*app.store, Some(&header)).await, Err(Denied::Revoked));
    }
}

#[tokio::test]
async fn ten_guesses_a_minute_are_answered_and_the_next_one_waits() {
    let (app, clock) = app().await;
    for n in 0..10 {
        assert_eq!(app.auth.failed("10.0.0.1"), Ok(()), "guess {n}");
    }
    assert_eq!(app.auth.failed("10.0.0.1"), Err(Denied::Throttled { retry_after_s: 6 }));
    assert_eq!(app.auth.failed("10.0.0.2"), Ok(()));
    clock.advance(6_000);
    assert_eq!(app.auth.failed("10.0.0.1"), Ok(()));
    assert!(app.auth.failed("10.0.0.1").is_err());
}

#[test]
fn a_grant_opens_its_own_attempt_of_its_own_farm_only() {
    let farm = Grants::new(&Secret::new([1; 32]));
    let at = AttemptRef { job: JobId::from_raw(5), attempt: 1 };
    let token = Token::parse(farm.mint(&at).expose()).unwrap();
    assert_eq!(token.kind, TokenKind::Job);
    assert!(farm.check(&at, &token));
    assert!(!farm.check(&AttemptRef { attempt: 2, ..at }, &token));
    assert!(!farm.check(&AttemptRef { job: JobId::from_raw(6), ..at }, &token));
    assert!(!Grants::new(&Secret::new([2; 32])).check(&at, &token));
}

#[tokio::test]
async fn a_grant_without_an_open_attempt_opens_nothing() {
    let (app, _) = app().await;
    let at = AttemptRef { job: JobId::from_raw(5), attempt: 1 };
    let good = format!("Bearer {}", app.grants.mint(&at).expose());
    let open = |header: Option<String>| {
        let app = app.clone();
        async move { attempt_grant(&*app.store, &app.grants, at, header.as_deref()).await }
    };
    assert_eq!(open(Some(good)).await, Err(Denied::Ended));
    let other = AttemptRef { attempt: 2, ..at };
    assert_eq!(open(Some(format!("Bearer {}", app.grants.mint(&other).expose()))).await, Err(Denied::Unknown));
    let (_, admin) = token_of(&app, DEFAULT_ORG, TokenKind::Personal, Role::Admin).await;
    assert_eq!(open(Some(format!("Bearer {admin}"))).await, Err(Denied::WrongKind("alloy_pat_")));
    assert_eq!(open(None).await, Err(Denied::Missing));
}

#[tokio::test]
async fn a_worker_names_itself_and_must_be_enrolled() {
    let (app, _) = app().await;
    let worker = super::worker(&app, DEFAULT_ORG, [4; 32]).await;
    let named = |text: String| {
        let app = app.clone();
        async move { named_worker(&*app.store, Some(&text)).await }
    };
    assert_eq!(named(format!("Worker {}", worker.id)).await, Ok(worker.id));
    assert_eq!(named("Worker wkr_00000000000000000000000001".into()).await, Err(Denied::Unknown));
    assert_eq!(named("Worker mini".into()).await, Err(Denied::Unreadable));
    assert_eq!(named(format!("Bearer {}", worker.id)).await, Err(Denied::Unreadable));
}
