use alloy_shared::id::{DEFAULT_ORG, OrgId};
use alloy_shared::secret::TokenKind;
use alloy_shared::wire::farm::Role;
use axum::body::Body;

use super::{Answer, app, ask, get, post, request, token, token_of};
use crate::routes::{Audience, RouteRow, table};

/// A path of this route with something in every hole.
fn filled(row: &RouteRow) -> String {
    row.path
        .replace("{job}", "job_00000000000000000000000001")
        .replace("{attempt}", "1")
        .replace("{*path}", "a/b")
        .replace("{user_id}", "3f0c2f1e-8a51-4c1e-9d0b-6f1f3f0f9a11")
        .replace("{digest}", &"0".repeat(64))
        .replace(
            "{id}",
            if row.path.contains("tokens") {
                "tok_00000000000000000000000001"
            } else if row.path.contains("workers") {
                "wkr_00000000000000000000000001"
            } else {
                "job_00000000000000000000000001"
            },
        )
}

async fn call(app: &std::sync::Arc<crate::App>, row: &RouteRow, token: &str) -> Answer {
    ask(app, request(row.method, &filled(row), token).body(Body::empty()).unwrap()).await
}

#[test]
fn public_is_a_closed_list() {
    let public: Vec<String> = table()
        .into_iter()
        .filter(|row| row.audience == Audience::Public)
        .map(|row| format!("{} {}", row.method, row.path))
        .collect();
    assert_eq!(public, ["GET /healthz", "GET /readyz", "POST /v1/workers/enrol"]);
}

#[tokio::test]
async fn every_other_route_answers_401_without_a_token() {
    let (app, _) = app().await;
    let rows = table();
    assert!(rows.len() >= 30, "{rows:#?}");
    for row in rows.iter().filter(|row| row.audience != Audience::Public) {
        let answer = call(&app, row, "").await;
        assert_eq!(answer.status, 401, "{row:?}");
        if row.method != "HEAD" {
            assert_eq!(answer.problem(), "unauthenticated", "{row:?}");
        }
        assert_eq!(answer.header("www-authenticate"), "Bearer realm=\"alloy\"", "{row:?}");
    }
}

#[tokio::test]
async fn a_role_opens_its_own_routes_and_those_below() {
    let (app, clock) = app().await;
    let need = |audience| match audience {
        Audience::Viewer => Some(Role::Viewer),
        Audience::Developer => Some(Role::Developer),
        Audience::Admin => Some(Role::Admin),
        Audience::Public | Audience::Attempt | Audience::Worker => None,
    };
    for role in Role::ALL {
        let token = token(&app, role).await;
        // A caller's token on an attempt's route counts as a guess.
        clock.advance(60_000);
        for row in table() {
            let answer = call(&app, &row, &token).await;
            match need(row.audience) {
                Some(need) if need > role => assert_eq!(answer.status, 403, "{role:?} {row:?}"),
                Some(_) => assert!(![401, 403].contains(&answer.status.as_u16()), "{role:?} {row:?} {}", answer.body),
                None if row.audience == Audience::Public => {}
                None => assert_eq!(answer.status, 401, "{role:?} {row:?}"),
            }
        }
    }
}

#[tokio::test]
async fn an_unknown_path_and_a_wrong_method_are_problems() {
    let (app, _) = app().await;
    let answer = get(&app, "/v1/nothing", "").await;
    assert_eq!((answer.status.as_u16(), answer.problem().as_str()), (404, "not_found"));
    let answer = ask(&app, request("DELETE", "/v1/info", "").body(Body::empty()).unwrap()).await;
    assert_eq!((answer.status.as_u16(), answer.problem().as_str()), (405, "method_not_allowed"));
    assert!(answer.header("allow").contains("GET"));
}

/// No name of a type, no word of the parser's, and the field's name once.
fn told_plainly(answer: &Answer) {
    let json = answer.json();
    let (message, field) = (json["message"].as_str().unwrap(), json["errors"][0]["field"].as_str().unwrap());
    for jargon in ["StateWord", "Id:", "struct ", "u64", "deserialize", "variant", "expected one of", "::"] {
        assert!(!message.contains(jargon), "{message}");
    }
    let rest = message.strip_prefix(field).unwrap_or_else(|| panic!("{message} names {field}"));
    assert!(!rest.contains(&format!("{field}:")), "{message}");
}

#[tokio::test]
async fn a_wrong_body_is_told_by_its_field_and_never_repeats_a_secret() {
    let (app, _) = app().await;
    let admin = token(&app, Role::Admin).await;
    for (path, body, code, field) in [
        ("/v1/tokens", "{", "invalid_body", "body"),
        ("/v1/tokens", r#"{"name":"x"}"#, "invalid_body", "body"),
        ("/v1/tokens", r#"{"name":"x","role":"king"}"#, "invalid_body", "role"),
        ("/v1/tokens", r#"{"name":"x","role":"admin","rolle":1}"#, "invalid_body", "rolle"),
        ("/v1/tokens", r#"{"name":"","role":"admin"}"#, "invalid_body", "name"),
        ("/v1/workers/invites", r#"{"ttl_s":-1}"#, "invalid_body", "ttl_s"),
        ("/v1/workers/invites", r#"{"labels":{"a b":"c"}}"#, "invalid_body", "labels"),
        ("/v1/jobs", r#"{"spec":{"env":{"A":17}}}"#, "invalid_body", "spec.env.A"),
        ("/v1/jobs", r#"{"spec":{}} trailing"#, "invalid_body", "body"),
    ] {
        let answer = post(&app, path, &admin, body).await;
        assert_eq!(answer.problem(), code, "{body}");
        assert_eq!(answer.json()["errors"][0]["field"], field, "{}", answer.body);
        told_plainly(&answer);
    }
    let secret = "alloy_pat_0123456789";
    for (path, body) in [
        ("/v1/tokens", format!(r#"{{"name":"x","role":"{secret}"}}"#)),
        ("/v1/workers/enrol", format!(r#"{{"token":["{secret}"]}}"#)),
        ("/v1/jobs", format!(r#"{{"spec":{{"env":{{"A":["{secret}"]}}}}}}"#)),
        ("/v1/jobs", format!(r#"{{"spec":{{"{secret}":1}}}}"#)),
    ] {
        let answer = post(&app, path, &admin, &body).await;
        assert_eq!(answer.problem(), "invalid_body");
        assert!(!answer.body.contains("0123456789"), "{}", answer.body);
    }
}

#[tokio::test]
async fn wrong_parameters_types_and_sizes_are_problems() {
    let (app, _) = app().await;
    let admin = token(&app, Role::Admin).await;
    for (path, message) in [
        ("/v1/jobs?limit=many", "limit: is a whole number"),
        ("/v1/jobs?limit=0", "limit: is 1 to 200"),
        ("/v1/jobs?limit=201", "limit: is 1 to 200"),
        ("/v1/jobs?limit=3&nonsense=1", "nonsense: `nonsense` is not known here; known are limit, cursor, state, mine"),
        ("/v1/jobs?state=waiting", "state: is one of queued, assigned, "),
        ("/v1/jobs?cursor=x", "cursor: is not one of ours"),
        ("/v1/workers/mini", "path: a worker id is written wkr_ and 26 characters"),
    ] {
        let answer = get(&app, path, &admin).await;
        assert_eq!((answer.status.as_u16(), answer.problem().as_str()), (400, "invalid_parameter"), "{path}");
        assert!(answer.json()["message"].as_str().unwrap().starts_with(message), "{path}: {}", answer.body);
        told_plainly(&answer);
    }
    let plain = request("POST", "/v1/tokens", &admin).header("content-type", "text/plain");
    let answer = ask(&app, plain.body(Body::from("{}")).unwrap()).await;
    assert_eq!(answer.problem(), "invalid_body");
    let long = format!("{{\"name\":\"{}\"}}", "x".repeat(2 << 20));
    for path in ["/v1/tokens", "/v1/jobs"] {
        let answer = post(&app, path, &admin, &long).await;
        assert_eq!((answer.status.as_u16(), answer.problem().as_str()), (413, "too_large"), "{path}");
    }
}

#[tokio::test]
async fn a_guesser_is_told_to_wait_while_a_known_token_passes() {
    let (app, clock) = app().await;
    let viewer = token(&app, Role::Viewer).await;
    let guess = alloy_shared::secret::Token::mint(TokenKind::Personal, [200; 32]);
    for _ in 0..10 {
        assert_eq!(get(&app, "/v1/info", guess.expose()).await.status, 401);
    }
    let answer = get(&app, "/v1/info", guess.expose()).await;
    assert_eq!((answer.problem().as_str(), answer.header("retry-after")), ("too_many_requests", "6"));
    assert_eq!(get(&app, "/v1/info", &viewer).await.status, 200);
    assert_eq!(get(&app, "/v1/info", "").await.status, 401, "no token is no guess");
    clock.advance(60_000);
    assert_eq!(get(&app, "/v1/info", guess.expose()).await.status, 401);
}

#[tokio::test]
async fn a_request_id_is_kept_if_it_is_harmless() {
    let (app, _) = app().await;
    let with = |id: &'static str| {
        let app = app.clone();
        async move {
            let request = request("GET", "/healthz", "").header("x-request-id", id);
            ask(&app, request.body(Body::empty()).unwrap()).await.header("x-request-id").to_owned()
        }
    };
    assert_eq!(with("ci-42.a_b").await, "ci-42.a_b");
    assert!(with("a b\"c").await.starts_with("req_"));
    assert!(with("").await.starts_with("req_"));
    assert_ne!(with("").await, with("").await);
}

#[tokio::test]
async fn nobody_sees_a_worker_of_another_organisation() {
    let (app, _) = app().await;
    let worker = super::worker(&app, DEFAULT_ORG, [4; 32]).await;
    let (_, stranger) = token_of(&app, OrgId::from_raw(77), TokenKind::Personal, Role::Admin).await;
    let own = token(&app, Role::Viewer).await;
    let path = format!("/v1/workers/{}", worker.id);
    let answer = get(&app, &path, &own).await;
    assert_eq!((answer.status.as_u16(), answer.json()["state"].as_str()), (200, Some("offline")));
    let (foreign, absent) =
        (get(&app, &path, &stranger).await, get(&app, "/v1/workers/wkr_00000000000000000000000001", &stranger).await);
    assert_eq!((foreign.status, foreign.json()["message"].clone()), (absent.status, absent.json()["message"].clone()));
    assert_eq!(foreign.problem(), "not_found");
    assert_eq!(get(&app, "/v1/workers", &stranger).await.json()["workers"].as_array().unwrap().len(), 0);
    let drain = post(&app, &format!("{path}/drain"), &stranger, "{}").await;
    assert_eq!(drain.problem(), "not_found");
}

#[tokio::test]
async fn tokens_live_over_http() {
    let (app, _) = app().await;
    let admin = token(&app, Role::Admin).await;
    let made = post(&app, "/v1/tokens", &admin, r#"{"name":"bot","role":"viewer","ci":true}"#).await;
    assert_eq!(made.status, 201);
    let (text, id) =
        (made.json()["token"].as_str().unwrap().to_owned(), made.json()["view"]["id"].as_str().unwrap().to_owned());
    let who = get(&app, "/v1/whoami", &text).await;
    assert_eq!((who.json()["name"].as_str(), who.json()["role"].as_str()), (Some("bot"), Some("viewer")));
    let gone = ask(&app, request("DELETE", &format!("/v1/tokens/{id}"), &admin).body(Body::empty()).unwrap()).await;
    assert_eq!(gone.status, 200);
    assert_eq!((gone.json()["id"].as_str(), gone.json()["revoked"].as_bool()), (Some(id.as_str()), Some(true)));
    assert_eq!(get(&app, "/v1/whoami", &text).await.problem(), "unauthenticated");
}

#[tokio::test]
async fn a_stopping_farm_is_not_ready_and_still_healthy() {
    let (app, _) = app().await;
    assert_eq!(get(&app, "/readyz", "").await.status, 200);
    app.stopping.cancel();
    assert_eq!(get(&app, "/readyz", "").await.problem(), "unavailable");
    assert_eq!(get(&app, "/healthz", "").await.status, 200);
}

#[tokio::test]
async fn the_document_has_every_route_with_its_problem() {
    let (app, _) = app().await;
    let viewer = token(&app, Role::Viewer).await;
    let document = get(&app, "/openapi.json", &viewer).await.json();
    for row in table() {
        let operation = &document["paths"][&row.path][row.method.to_lowercase()];
        let problem = &operation["responses"]["default"]["content"]["application/problem+json"]["schema"]["$ref"];
        assert_eq!(problem, "#/components/schemas/Problem", "{row:?}");
        let open = operation["security"] == serde_json::json!([]);
        assert_eq!(open, row.audience == Audience::Public, "{row:?}");
    }
    for name in ["Problem", "ErrorCode", "FieldError", "JobView", "SubmitJob", "WorkerList"] {
        assert!(document["components"]["schemas"][name].is_object(), "{name}");
    }
}

#[tokio::test]
async fn a_panic_and_an_inner_fault_say_nothing_to_the_caller() {
    use crate::error::{Fault, finish, panicked};
    use axum::response::IntoResponse as _;
    let inner = "SELECT secret FROM /private/path";
    for response in [
        panicked(Box::new(inner)),
        panicked(Box::new(inner.to_owned())),
        Fault::internal(inner).into_response(),
        Fault::from(crate::store::StoreError::Unavailable(inner.into())).into_response(),
    ] {
        let response = finish(response, "req_1", "/x");
        assert!(response.status().is_server_error());
        let body = axum::body::to_bytes(response.into_body(), 1 << 16).await.unwrap();
        let text = String::from_utf8(body.to_vec()).unwrap();
        assert!(!text.contains("secret") && text.contains("req_1"), "{text}");
    }
}
