use std::sync::atomic::{AtomicU64, Ordering};

use alloy_shared::env::{Mono, Ms, Now};
use alloy_shared::id::{AttemptRef, JobId};
use alloy_shared::runtime::{Lifecycle, SystemEnv};
use alloy_shared::secret::Secret;
use futures_util::TryStreamExt as _;
use futures_util::future::BoxFuture;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::accept_hdr_async;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::http::StatusCode;

use super::*;
use crate::spool::Spool;
use crate::spool::tests::assignment;

const WORKER: WorkerId = WorkerId::from_raw(8);

async fn listen() -> (TcpListener, Https, Lifecycle) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let life = Lifecycle::new();
    let url = format!("http://{}/farm/", listener.local_addr().unwrap());
    let https = Https::new(&url, WORKER, Arc::new(SystemEnv::new(life.clone()))).unwrap();
    (listener, https, life)
}

/// Checks the upgrade as the orchestrator would, and answers it.
async fn accept(stream: TcpStream) -> tokio_tungstenite::WebSocketStream<TcpStream> {
    // The callback's type is the library's; its error is a whole response.
    #[allow(clippy::result_large_err, reason = "the library's own signature")]
    let check = |request: &Request, mut response: Response| -> Result<Response, ErrorResponse> {
        assert_eq!(request.uri().path(), "/farm/v1/worker/connect");
        assert_eq!(request.headers()[AUTHORIZATION], format!("Worker {WORKER}"));
        assert_eq!(request.headers()[SEC_WEBSOCKET_PROTOCOL], SUBPROTOCOL);
        response.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(SUBPROTOCOL));
        Ok(response)
    };
    accept_hdr_async(stream, check).await.unwrap()
}

#[tokio::test]
async fn frames_travel_both_ways_and_either_end_may_cut() {
    let (listener, https, life) = listen().await;
    for cut_by_farm in [true, false] {
        let (link, socket) = tokio::join!(https.dial(), async { accept(listener.accept().await.unwrap().0).await });
        let (Link { tx, mut rx }, mut socket) = (link.unwrap(), socket);
        let big = Bytes::from(vec![7; 64 << 10]);
        tx.send(Frame::Text("one".into())).await.unwrap();
        tx.send(Frame::Binary(big.clone())).await.unwrap();
        assert_eq!(socket.try_next().await.unwrap(), Some(Message::text("one")));
        assert_eq!(socket.try_next().await.unwrap(), Some(Message::Binary(big)));
        socket.send(Message::text("two")).await.unwrap();
        socket.send(Message::Ping(Bytes::from_static(b"p"))).await.unwrap();
        socket.send(Message::binary(&b"three"[..])).await.unwrap();
        assert_eq!(rx.recv().await, Some(Frame::Text("two".into())));
        assert_eq!(rx.recv().await, Some(Frame::Binary(Bytes::from_static(b"three"))));
        if cut_by_farm {
            drop(socket);
            assert_eq!(rx.recv().await, None);
        } else {
            tx.send(Frame::Text("bye".into())).await.unwrap();
            drop((tx, rx));
            let mut rest = Vec::new();
            while let Ok(Some(message)) = socket.try_next().await {
                rest.push(message);
            }
            assert!(rest.contains(&Message::text("bye")), "what was queued still leaves: {rest:?}");
        }
    }
    life.soft.cancel();
    life.wait(60_000).await;
}

#[tokio::test]
async fn a_frame_that_is_too_long_cuts_the_link() {
    let (listener, https, _life) = listen().await;
    let (link, socket) = tokio::join!(https.dial(), async { accept(listener.accept().await.unwrap().0).await });
    let (mut link, mut socket) = (link.unwrap(), socket);
    socket.send(Message::binary(vec![0; limits::FRAME_MAX + 1])).await.ok();
    assert_eq!(link.rx.recv().await, None);
}

#[tokio::test]
async fn a_refusal_is_told_from_an_absence() {
    let (listener, https, _life) = listen().await;
    let refuse = async {
        #[allow(clippy::result_large_err, reason = "the library's own signature")]
        let check = |_: &Request, _: Response| -> Result<Response, ErrorResponse> {
            let problem = serde_json::to_string(&Problem::new(ErrorCode::Unauthenticated, "who are you?")).unwrap();
            let mut response = ErrorResponse::new(Some(problem));
            *response.status_mut() = StatusCode::UNAUTHORIZED;
            Err(response)
        };
        accept_hdr_async(listener.accept().await.unwrap().0, check).await.unwrap_err();
    };
    let (link, ()) = tokio::join!(https.dial(), refuse);
    let error = link.unwrap_err();
    assert!(matches!(error, DialError::Refused { code: ErrorCode::Unauthenticated, .. }), "{error}");
    assert!(error.to_string().contains("who are you?"), "{error}");
    drop(listener);
    assert!(matches!(https.dial().await.unwrap_err(), DialError::Unreachable(_)));
}

/// Pauses pass at once; deadlines never come.
#[derive(Default)]
struct Hasty(AtomicU64);

#[async_trait]
impl Env for Hasty {
    fn now(&self) -> Now {
        Now { wall: Ms(0), mono: Mono(self.0.load(Ordering::Relaxed)) }
    }
    async fn sleep_until(&self, at: Mono) {
        if at.since(self.now().mono) > PUT_PAUSE_CAP_MS {
            std::future::pending::<()>().await;
        }
        self.0.fetch_max(at.0, Ordering::Relaxed);
    }
    fn spawn(&self, _: &'static str, task: BoxFuture<'static, ()>) {
        SystemEnv::detached().spawn("task", task);
    }
    fn dice(&self) -> u64 {
        7
    }
}

#[tokio::test]
async fn an_upload_outlives_a_restart_of_the_farm() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let https = Https::new(&url, WORKER, Arc::new(Hasty::default())).unwrap();
    let spool = Spool::memory();
    let assignment = assignment();
    let at = assignment.attempt;
    spool.begin(&assignment).await.unwrap();
    let mut stash = spool.stash(at).await.unwrap();
    stash.write(Bytes::from_static(b"artifact")).await.unwrap();
    let (digest, _) = stash.finish().await.unwrap();
    let farm = async {
        // More cuts than one question survives by itself.
        for _ in 0..20 {
            drop(listener.accept().await.unwrap());
        }
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut heard = vec![0; 4];
        stream.read_exact(&mut heard).await.unwrap();
        assert_eq!(heard, b"HEAD");
        stream.write_all(b"HTTP/1.1 200 OK\r\nalloy-offset: 8\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        stream
    };
    let grant = Grant { attempt: AttemptRef { job: JobId::from_raw(1), attempt: 1 }, token: Secret::new("g".into()) };
    let file = spool.stashed(at, &digest);
    let (put, _stream) = tokio::join!(https.put(&grant, &file), farm);
    assert_eq!(put.unwrap(), digest);
}
