use std::sync::Arc;

use alloy_shared::id::{DEFAULT_ORG, OrgId, UserId};
use alloy_shared::wire::farm::Role;
use axum::body::Body;
use serde_json::{Value, json};

use super::keys::{SECRET, Signer, USER, claims};
use super::{Answer, TestEnv, app, app_with, ask, get, request, token, write};
use crate::App;
use crate::auth::sign_in::SignIn;
use crate::auth::sign_in::tests::Service;
use crate::blobs::Blobs;
use crate::store::{MemberRow, Write};

async fn signed_in() -> (Arc<App>, Arc<TestEnv>, Service) {
    let service = Service::start().await;
    let clock = TestEnv::new();
    let sign_in = SignIn::new(&service.config(), clock.clone()).unwrap();
    (app_with(Blobs::memory(), clock.clone(), Some(sign_in)).await, clock, service)
}

fn now_s(app: &App) -> i64 {
    app.env.now().wall.0 / 1_000
}

async fn become_member(app: &App, org: OrgId, role: Role) {
    let user: UserId = USER.parse().unwrap();
    write(app, Write::SetMember(MemberRow { user, org, role, email: None, created_at: app.env.now().wall })).await;
}

#[tokio::test]
async fn a_member_is_let_in_as_what_the_books_say() {
    let (app, clock, service) = signed_in().await;
    let key = Signer::ec();
    service.publish(Some(vec![key.jwk("1")]));
    let good = claims(&service.issuer(), now_s(&app));
    for token in [key.sign("1", &good), Signer::secret(SECRET).sign("old", &good)] {
        let answer = get(&app, "/v1/whoami", &token).await;
        assert_eq!((answer.status.as_u16(), answer.problem().as_str()), (403, "forbidden"));
        let hint = answer.json()["hint"].as_str().unwrap().to_owned();
        assert!(hint.contains(&format!("alloy admin member set {USER}")), "{hint}");
    }
    clock.advance(1_000);
    become_member(&app, DEFAULT_ORG, Role::Developer).await;
    let token = key.sign("1", &good);
    let who = get(&app, "/v1/whoami", &token).await.json();
    assert_eq!((&who["name"], &who["role"]), (&json!("ada@example.com"), &json!("developer")));
    assert_eq!(who["org"], json!(DEFAULT_ORG));
    assert_eq!(get(&app, "/v1/members", &token).await.status, 403, "a developer is no admin");
    // The jobs of a person are found again by the same person with another token.
    let body = json!({ "spec": { "shell": "true" } }).to_string();
    let submit = request("POST", "/v1/jobs", &token).header("content-type", "application/json");
    let made = ask(&app, submit.body(Body::from(body)).unwrap()).await;
    assert_ne!(made.status, 403, "{}", made.body);

    for (token, code) in [
        (key.sign("1", &claims("https://else.test/auth/v1", now_s(&app))), "issued by another service"),
        (key.sign("2", &good), "nobody knows the key"),
        (format!("{token}AA"), "signature"),
        ("a.b.c".to_owned(), "three parts"),
    ] {
        let answer = get(&app, "/v1/whoami", &token).await;
        assert_eq!((answer.status.as_u16(), answer.problem().as_str()), (401, "unauthenticated"), "{code}");
        let message = answer.json()["message"].as_str().unwrap().to_owned();
        assert!(message.contains(code), "{message}");
    }
}

#[tokio::test]
async fn who_belongs_to_several_organisations_is_in_the_first_one_and_may_name_another() {
    let (app, clock, service) = signed_in().await;
    let other = OrgId::from_raw(77);
    become_member(&app, DEFAULT_ORG, Role::Viewer).await;
    clock.advance(1_000);
    become_member(&app, other, Role::Admin).await;
    let token = Signer::secret(SECRET).sign("", &claims(&service.issuer(), now_s(&app)));
    assert_eq!(get(&app, "/v1/whoami", &token).await.json()["org"], json!(DEFAULT_ORG));
    for (org, role) in [(DEFAULT_ORG, "viewer"), (other, "admin")] {
        let asked = request("GET", "/v1/whoami", &token).header("alloy-org", org.to_string());
        let answer = ask(&app, asked.body(Body::empty()).unwrap()).await.json();
        assert_eq!((answer["role"].as_str(), answer["org"].as_str()), (Some(role), Some(&*org.to_string())));
    }
    let asked = request("GET", "/v1/whoami", &token).header("alloy-org", OrgId::from_raw(78).to_string());
    assert_eq!(ask(&app, asked.body(Body::empty()).unwrap()).await.status, 403);
}

#[tokio::test]
async fn without_a_service_no_sign_in_token_opens_anything() {
    let (app, _) = app().await;
    become_member(&app, DEFAULT_ORG, Role::Admin).await;
    let token = Signer::secret(SECRET).sign("", &claims("", now_s(&app)));
    let answer = get(&app, "/v1/whoami", &token).await;
    assert_eq!(
        (answer.status.as_u16(), answer.json()["message"].as_str().unwrap()),
        (401, "this farm takes no sign-in tokens")
    );
}

async fn put(app: &Arc<App>, user: &str, token: &str, body: Value) -> Answer {
    let request = request("PUT", &format!("/v1/members/{user}"), token).header("content-type", "application/json");
    ask(app, request.body(Body::from(body.to_string())).unwrap()).await
}

async fn delete(app: &Arc<App>, user: &str, token: &str) -> Answer {
    ask(app, request("DELETE", &format!("/v1/members/{user}"), token).body(Body::empty()).unwrap()).await
}

#[tokio::test]
async fn an_admin_adds_changes_and_removes_members_and_it_counts_at_once() {
    let (app, _, service) = signed_in().await;
    let admin = token(&app, Role::Admin).await;
    let person = Signer::secret(SECRET).sign("", &claims(&service.issuer(), now_s(&app)));
    let made = put(&app, &USER.to_uppercase(), &admin, json!({ "role": "viewer", "email": " ada@example.com " })).await;
    assert_eq!((made.status.as_u16(), &made.json()["user_id"]), (200, &json!(USER)));
    assert_eq!(get(&app, "/v1/whoami", &person).await.json()["role"], "viewer");
    let raised = put(&app, USER, &admin, json!({ "role": "admin" })).await.json();
    assert_eq!((&raised["role"], &raised["email"]), (&json!("admin"), &json!("ada@example.com")));
    assert_eq!(get(&app, "/v1/members", &person).await.json()["members"], json!([raised]));
    assert_eq!(delete(&app, USER, &admin).await.status, 204);
    assert_eq!(get(&app, "/v1/whoami", &person).await.status, 403);
    assert_eq!(delete(&app, USER, &admin).await.problem(), "not_found");
    for (user, body, code) in [
        ("ada", json!({ "role": "admin" }), "invalid_parameter"),
        (USER, json!({ "role": "king" }), "invalid_body"),
        (USER, json!({ "role": "admin", "email": "ada" }), "invalid_body"),
        (USER, json!({ "role": "admin", "email": format!("{}@x", "a".repeat(300)) }), "invalid_body"),
    ] {
        assert_eq!(put(&app, user, &admin, body).await.problem(), code, "{user}");
    }
}
