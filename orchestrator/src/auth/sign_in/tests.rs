use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::*;
use crate::tests::TestEnv;
use crate::tests::keys::{SECRET, Signer, claims};

/// A sign-in service on a real port: what it publishes, and how often it was asked.
pub(crate) struct Service {
    pub(crate) url: String,
    said: Arc<Mutex<Option<Vec<Value>>>>,
    asked: Arc<AtomicUsize>,
}

impl Service {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (said, asked) = (Arc::new(Mutex::new(Some(Vec::new()))), Arc::new(AtomicUsize::new(0)));
        let service = Self { url, said: said.clone(), asked: asked.clone() };
        let answer = move || {
            asked.fetch_add(1, Ordering::SeqCst);
            let said = said.lock().unwrap().clone();
            async move { said.map(|keys| json!({ "keys": keys }).to_string()).ok_or(StatusCode::BAD_GATEWAY) }
        };
        let router = Router::new().route("/auth/v1/.well-known/jwks.json", get(answer));
        #[allow(clippy::disallowed_methods, reason = "a neighbour of the test's own")]
        tokio::spawn(async move { axum::serve(listener, router).await });
        service
    }

    pub(crate) fn issuer(&self) -> String {
        format!("{}/auth/v1", self.url)
    }

    /// `None`: it is broken.
    pub(crate) fn publish(&self, keys: Option<Vec<Value>>) {
        *self.said.lock().unwrap() = keys;
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    pub(crate) fn config(&self) -> Supabase {
        Supabase { url: self.url.clone(), jwt_secret: Some(Secret::new(SECRET.into())) }
    }
}

struct Fixture {
    service: Service,
    clock: Arc<TestEnv>,
    sign_in: SignIn,
}

impl Fixture {
    async fn new() -> Self {
        let (service, clock) = (Service::start().await, TestEnv::new());
        let sign_in = SignIn::new(&service.config(), clock.clone()).unwrap();
        Self { service, clock, sign_in }
    }

    async fn check(&self, signer: &Signer, kid: &str) -> Result<Person, NotIn> {
        let claims = claims(&self.service.issuer(), self.clock.now().wall.0 / 1_000);
        self.sign_in.check(&Secret::new(signer.sign(kid, &claims))).await
    }
}

#[tokio::test]
async fn keys_are_fetched_once_and_kept_through_an_outage() {
    let at = Fixture::new().await;
    let (first, second) = (Signer::ec(), Signer::rsa());
    at.service.publish(Some(vec![first.jwk("1")]));
    assert!(at.check(&Signer::secret(SECRET), "old").await.is_ok());
    assert_eq!(at.service.asked(), 0, "the shared secret needs no key");
    for _ in 0..3 {
        assert!(at.check(&first, "1").await.is_ok());
    }
    assert_eq!(at.service.asked(), 1);

    // The service changes its key: the first token that is signed with it is good, once the pause is over.
    at.service.publish(Some(vec![first.jwk("1"), second.jwk("2")]));
    for _ in 0..3 {
        assert_eq!(at.check(&second, "2").await, Err(NotIn::Bad(BadJwt::UnknownKey)));
    }
    assert_eq!(at.service.asked(), 1, "nobody makes the farm ask again and again");
    at.clock.advance(limits::SIGN_IN_KEYS_AGAIN_MS);
    assert!(at.check(&second, "2").await.is_ok());
    assert_eq!(at.service.asked(), 2);

    at.service.publish(None);
    at.clock.advance(limits::SIGN_IN_KEYS_FRESH_MS);
    for _ in 0..3 {
        assert!(at.check(&first, "1").await.is_ok(), "what is known stays known");
    }
    assert_eq!(at.check(&Signer::ec(), "3").await, Err(NotIn::Bad(BadJwt::UnknownKey)));
    at.clock.settled().await;
    assert!((3..=4).contains(&at.service.asked()), "{}", at.service.asked());
}

#[tokio::test]
async fn old_keys_are_asked_for_again_and_a_withdrawn_one_is_forgotten() {
    let at = Fixture::new().await;
    let key = Signer::ec();
    at.service.publish(Some(vec![key.jwk("1")]));
    assert!(at.check(&key, "1").await.is_ok());
    at.service.publish(Some(Vec::new()));
    at.clock.advance(limits::SIGN_IN_KEYS_FRESH_MS);
    assert!(at.check(&key, "1").await.is_ok(), "the old ones serve while the new ones come");
    at.clock.settled().await;
    assert_eq!(at.service.asked(), 2);
    assert_eq!(at.check(&key, "1").await, Err(NotIn::Bad(BadJwt::UnknownKey)));
}

#[tokio::test]
async fn a_service_that_never_answered_is_told_from_a_bad_token() {
    let at = Fixture::new().await;
    let key = Signer::ec();
    at.service.publish(None);
    assert_eq!(at.check(&key, "1").await, Err(NotIn::Away));
    assert_eq!(at.check(&key, "1").await, Err(NotIn::Away));
    assert_eq!(at.service.asked(), 1);
    at.service.publish(Some(vec![json!("x".repeat(limits::SIGN_IN_KEYS_MAX))]));
    at.clock.advance(limits::SIGN_IN_KEYS_FIRST_MS);
    assert_eq!(at.check(&key, "1").await, Err(NotIn::Away), "too much to read");
    at.service.publish(Some(vec![key.jwk("1")]));
    at.clock.advance(limits::SIGN_IN_KEYS_FIRST_MS);
    assert!(at.check(&key, "1").await.is_ok());
}
