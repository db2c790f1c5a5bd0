use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use alloy_shared::limits::Limits;
use alloy_shared::runtime::{Lifecycle, SystemEnv};
use alloy_shared::wire::session::ToWorker;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::{self, Message};

use crate::config::Config;
use crate::{ServeError, Served, serve};

struct Running {
    served: Served,
    life: Lifecycle,
}

async fn start(dir: &Path) -> Result<Running, ServeError> {
    let life = Lifecycle::new();
    let env = Arc::new(SystemEnv::new(life.clone()));
    let served = serve(Config::embedded(dir.to_owned()), env, life.clone()).await?;
    Ok(Running { served, life })
}

impl Running {
    async fn stop(self) {
        self.life.soft.cancel();
        let code = self.life.wait(Limits::default().stop_ms).await;
        assert_eq!(format!("{code:?}"), format!("{:?}", std::process::ExitCode::SUCCESS));
    }

    fn token(&self) -> String {
        std::fs::read_to_string(&self.served.admin_token_file).unwrap().trim().to_owned()
    }

    async fn ask(&self, method: &str, path: &str, body: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(self.served.addr).await.unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            self.token(),
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }
}

#[tokio::test]
async fn a_farm_keeps_its_directory_its_token_and_its_jobs() {
    let dir = tempfile::tempdir().unwrap();
    let first = start(dir.path()).await.unwrap();
    let mode = std::fs::metadata(&first.served.admin_token_file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(matches!(start(dir.path()).await, Err(ServeError::Lock(_))));
    let made = first.ask("POST", "/v1/jobs", r#"{"spec":{"shell":"true"}}"#).await;
    assert!(made.starts_with("HTTP/1.1 201"), "{made}");
    let token = first.token();
    let grant = first
        .served
        .app
        .grants
        .mint(&alloy_shared::id::AttemptRef { job: alloy_shared::id::JobId::from_raw(1), attempt: 1 });
    first.stop().await;

    let second = start(dir.path()).await.unwrap();
    assert_eq!(second.token(), token);
    let at = alloy_shared::id::AttemptRef { job: alloy_shared::id::JobId::from_raw(1), attempt: 1 };
    assert_eq!(second.served.app.grants.mint(&at), grant);
    let list = second.ask("GET", "/v1/jobs", "").await;
    assert!(list.contains("\"queued\"") && list.contains("\"true\""), "{list}");
    second.stop().await;
}

#[tokio::test]
async fn no_farm_begins_where_a_restore_was_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let left = dir.path().join("farm.restoring");
    std::fs::create_dir(&left).unwrap();
    let Err(refused) = start(dir.path()).await else { panic!("it started") };
    assert!(matches!(refused, ServeError::Unfinished(_)), "{refused}");
    assert!(refused.to_string().contains(&left.display().to_string()), "{refused}");
    assert!(!dir.path().join("farm/alloy.db").exists(), "the next restore finds no farm");
    std::fs::remove_dir(&left).unwrap();
    start(dir.path()).await.unwrap().stop().await;
    // A farm that is there already is one.
    std::fs::create_dir(&left).unwrap();
    start(dir.path()).await.unwrap().stop().await;
}

#[tokio::test]
async fn a_farm_that_takes_no_more_jobs_says_so_and_still_answers() {
    let dir = tempfile::tempdir().unwrap();
    let farm = start(dir.path()).await.unwrap();
    farm.served.app.take_no_more_jobs().await;
    let refused = farm.ask("POST", "/v1/jobs", r#"{"spec":{"shell":"true"}}"#).await;
    assert!(refused.starts_with("HTTP/1.1 503") && refused.contains("unavailable"), "{refused}");
    let list = farm.ask("GET", "/v1/jobs", "").await;
    assert!(list.contains("\"jobs\":[]"), "{list}");
    farm.stop().await;
}

#[tokio::test]
async fn a_stop_ends_a_feed_and_a_wait_that_would_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let farm = start(dir.path()).await.unwrap();
    let made = farm.ask("POST", "/v1/jobs", r#"{"spec":{"shell":"true"}}"#).await;
    let id = made.split("location: ").nth(1).unwrap().lines().next().unwrap().to_owned();
    let feed_path = format!("{id}/feed");
    let wait_path = format!("{id}?wait=terminal");
    let (feed, wait, ()) = tokio::join!(farm.ask("GET", &feed_path, ""), farm.ask("GET", &wait_path, ""), async {
        // Both answers have begun once the farm has taken both connections; a stop before that refuses them, which ends
        // them as well.
        farm.ask("GET", "/v1/info", "").await;
        farm.life.soft.cancel();
    });
    assert!(!feed.contains("event: end"), "{feed}");
    assert!(!wait.contains("\"state\":\"succeeded\""), "{wait}");
    farm.stop().await;
}

#[tokio::test]
async fn a_worker_is_challenged_and_a_stranger_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let farm = start(dir.path()).await.unwrap();
    let worker = super::worker(&farm.served.app, alloy_shared::id::DEFAULT_ORG, [4; 32]).await;
    let url = format!("ws://{}/v1/worker/connect", farm.served.addr);
    let dial = |authorization: String, protocol: &'static str, origin: bool| {
        let mut request = url.as_str().into_client_request().unwrap();
        request.headers_mut().insert("authorization", authorization.parse().unwrap());
        request.headers_mut().insert("sec-websocket-protocol", protocol.parse().unwrap());
        if origin {
            request.headers_mut().insert("origin", "http://evil.example".parse().unwrap());
        }
        tokio_tungstenite::connect_async(request)
    };
    let status = |error: tungstenite::Error| match error {
        tungstenite::Error::Http(response) => response.status().as_u16(),
        other => panic!("{other}"),
    };
    let own = format!("Worker {}", worker.id);
    assert_eq!(status(dial(format!("Bearer {}", farm.token()), "alloy.v1", false).await.unwrap_err()), 401);
    assert_eq!(status(dial(own.clone(), "alloy.v9", false).await.unwrap_err()), 400);
    assert_eq!(status(dial(own.clone(), "alloy.v1", true).await.unwrap_err()), 403);

    let (mut socket, response) = dial(own, "alloy.v1", false).await.unwrap();
    assert_eq!(response.headers()["sec-websocket-protocol"], "alloy.v1");
    let first = futures_util::StreamExt::next(&mut socket).await.unwrap().unwrap();
    let Message::Text(text) = first else { panic!("{first:?}") };
    assert!(matches!(ToWorker::decode(&text), Ok(ToWorker::Challenge { .. })), "{text}");
    farm.stop().await;
}
