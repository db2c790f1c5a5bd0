use std::sync::Arc;

use alloy_shared::id::{DEFAULT_ORG, JobId, Labels, WorkerId};
use alloy_shared::mem_disk::MemDisk;
use alloy_shared::wire::farm::Role;
use axum::body::Body;

use super::{Answer, app, app_on, ask, post, request, token, worker, write};
use crate::App;
use crate::blobs::{Blobs, Mem};
use crate::store::Write;
use crate::store::write::OpenSession;

async fn submit(app: &std::sync::Arc<App>, token: &str, key: &str, body: &str) -> Answer {
    let request = request("POST", "/v1/jobs", token).header("content-type", "application/json");
    ask(app, request.header("idempotency-key", key).body(Body::from(body.to_owned())).unwrap()).await
}

/// What the host says of itself when it connects.
async fn connects(app: &App, worker: WorkerId, labels: &[(&str, &str)]) {
    let mut said = Labels::default();
    labels.iter().for_each(|(key, value)| said.insert(key, value).unwrap());
    let open = OpenSession { worker, boot: "boot".into(), labels: said, version: "0".into(), at: app.env.now().wall };
    write(app, Write::OpenSession(Box::new(open))).await;
}

#[tokio::test]
async fn a_known_key_is_answered_whatever_has_become_of_the_farm_since() {
    let (app, _) = app().await;
    let token = token(&app, Role::Developer).await;
    let mini = worker(&app, DEFAULT_ORG, [5; 32]).await.id;
    connects(&app, mini, &[("xcode", "16.4")]).await;
    let body = r#"{"spec":{"shell":"true","labels":{"xcode":"16.4"}}}"#;
    let first = submit(&app, &token, "k1", body).await;
    assert_eq!(first.status, 201, "{}", first.body);

    connects(&app, mini, &[("xcode", "26.0")]).await;
    assert_eq!(submit(&app, &token, "k2", body).await.problem(), "no_such_worker");
    let again = submit(&app, &token, "k1", body).await;
    assert_eq!((again.status.as_u16(), &again.json()["id"]), (200, &first.json()["id"]), "{}", again.body);

    // Another body is a mismatch first, whatever else is wrong with it.
    let zeros = "0".repeat(64);
    for other in [
        r#"{"spec":{"shell":"false"}}"#.to_owned(),
        r#"{"spec":{}}"#.to_owned(),
        format!(r#"{{"spec":{{"shell":"true"}},"source":"{zeros}"}}"#),
        body.replace("16.4", "1.0"),
    ] {
        assert_eq!(submit(&app, &token, "k1", &other).await.problem(), "idempotency_mismatch", "{other}");
    }
    let jobs = app.store.live(None, 9).await.unwrap();
    assert_eq!(jobs.len(), 1, "{jobs:?}");
}

#[tokio::test]
async fn a_spec_that_no_worker_could_be_sent_is_refused() {
    let (app, _) = app().await;
    let token = token(&app, Role::Developer).await;
    let escaped = "\\u0001".repeat(83_000);
    let body = format!(r#"{{"spec":{{"shell":"true","env":{{"A":"{escaped}","B":"{escaped}"}}}}}}"#);
    assert!(body.len() < alloy_shared::limits::JSON_BODY_MAX as usize);
    let answer = submit(&app, &token, "k", &body).await;
    assert!(answer.body.contains("at most 983040"), "{}", answer.body);
    assert_eq!(answer.problem(), "invalid_spec");
}

#[tokio::test]
async fn ids_of_new_jobs_are_in_turn() {
    let (app, _) = app().await;
    let token = token(&app, Role::Developer).await;
    let mut turns = Vec::new();
    for key in ["k1", "k2", "k3"] {
        let job = submit(&app, &token, key, r#"{"spec":{"shell":"true"}}"#).await.json();
        let id: JobId = job["id"].as_str().unwrap().parse().unwrap();
        turns.push(id.turn());
    }
    assert!(turns.windows(2).all(|pair| pair[1] == JobId::from_raw(0).in_turn(pair[0] + 1).turn()), "{turns:?}");
}

#[tokio::test]
async fn a_closed_door_answers_the_retry_of_a_submit_and_opens_again() {
    let (app, _) = app().await;
    let token = token(&app, Role::Developer).await;
    let body = r#"{"spec":{"shell":"true"}}"#;
    let first = submit(&app, &token, "k1", body).await;
    app.take_no_more_jobs().await;
    assert_eq!(submit(&app, &token, "k2", body).await.problem(), "unavailable");
    let again = submit(&app, &token, "k1", body).await;
    assert_eq!((again.status.as_u16(), &again.json()["id"]), (200, &first.json()["id"]), "{}", again.body);
    app.take_jobs_again();
    assert_eq!(submit(&app, &token, "k2", body).await.status, 201);
}

#[tokio::test]
async fn a_full_disk_takes_nothing_new_answers_retries_and_heals_by_itself() {
    let disk = Arc::new(MemDisk::default());
    let (app, _) = app_on(Blobs::Mem(Mem::on(Arc::clone(&disk)))).await;
    let token = token(&app, Role::Developer).await;
    let body = r#"{"spec":{"shell":"true"}}"#;
    let first = submit(&app, &token, "k1", body).await.json();
    disk.set_full(true);
    let refused = submit(&app, &token, "k2", body).await;
    assert_eq!((refused.status.as_u16(), refused.header("retry-after")), (507, "10"));
    let problem = refused.json();
    assert_eq!(problem["code"], "storage_full");
    assert!(problem["hint"].as_str().is_some_and(|hint| hint.contains("free space")), "{problem}");
    assert_eq!(submit(&app, &token, "k1", body).await.json()["id"], first["id"], "a retry is no new job");
    let cancel = format!("/v1/jobs/{}/cancel", first["id"].as_str().unwrap());
    assert_eq!(post(&app, &cancel, &token, "").await.json()["state"], "canceled");
    disk.set_full(false);
    assert_eq!(submit(&app, &token, "k2", body).await.status, 201);
}
