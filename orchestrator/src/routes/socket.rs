//! S: a worker's WebSocket as a [`Link`]: two bounded channels, and the session in between.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use alloy_shared::id::WorkerId;
use alloy_shared::limits;
use alloy_shared::wire::session::{Frame, Link};
use alloy_shared::wire::{ErrorCode, SUBPROTOCOL, path};
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::http::{HeaderMap, header};
use axum::response::Response;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::sync::{mpsc, oneshot};

use super::extract::NamedWorker;
use crate::App;
use crate::error::Fault;
use crate::session::drive;

/// The session of a worker: a WebSocket of subprotocol `alloy.v1`.
#[utoipa::path(get, path = path::WORKER_CONNECT, tag = "workers", responses((status = 101, description = "The session")))]
pub async fn connect(
    State(app): State<Arc<App>>,
    NamedWorker(worker): NamedWorker,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Fault> {
    if headers.contains_key(header::ORIGIN) {
        return Err(Fault::new(ErrorCode::Forbidden, "a web page is no worker"));
    }
    if app.stopping.is_cancelled() {
        return Err(Fault::new(ErrorCode::Unavailable, "the farm is stopping").retry_after(1));
    }
    let upgrade = upgrade.map_err(|_| {
        Fault::new(ErrorCode::UnsupportedProtocol, "this route takes only WebSocket connections")
            .hint("a proxy in between must pass the Upgrade header on")
    })?;
    accept(app, worker, upgrade)
}

/// Answers the upgrade and starts the session.
fn accept(app: Arc<App>, worker: WorkerId, upgrade: WebSocketUpgrade) -> Result<Response, Fault> {
    let upgrade = upgrade
        .protocols([SUBPROTOCOL])
        .max_frame_size(limits::FRAME_MAX)
        .max_message_size(limits::FRAME_MAX)
        .read_buffer_size(limits::SOCKET_BUFFER)
        .write_buffer_size(limits::SOCKET_BUFFER)
        .max_write_buffer_size(2 * limits::FRAME_MAX);
    if upgrade.selected_protocol().is_none() {
        return Err(Fault::new(ErrorCode::UnsupportedProtocol, format!("the subprotocol is {SUBPROTOCOL}"))
            .hint("update the worker"));
    }
    let (opened, socket) = oneshot::channel();
    let env = app.env.clone();
    let session = app.sessions.track_future(serve(app.clone(), worker, socket));
    env.spawn("session", Box::pin(session));
    // A dropped receiver means that the orchestrator is stopping; the socket closes with it.
    Ok(upgrade.on_upgrade(async move |socket| drop(opened.send(socket))))
}

async fn serve(app: Arc<App>, worker: WorkerId, socket: oneshot::Receiver<WebSocket>) {
    let Ok(socket) = socket.await else { return };
    let stopping = app.stopping.clone();
    let stop = stopping.clone();
    let late = async move {
        stop.cancelled().await;
        tokio::time::sleep(Duration::from_millis(limits::SOCKET_GOODBYE_MS)).await;
    };
    // A session that has not opened yet hears nothing of the stop.
    let session = async move |link| {
        tokio::select! {
            biased;
            () = drive::drive(app, worker, link) => {}
            () = late => {}
        }
    };
    carry(socket, session, || stopping.is_cancelled()).await;
}

/// Carries frames both ways until the session is over or the socket is cut. One task, and no half waits for the other:
/// a session that does not read holds up the socket's reading half only.
async fn carry<F>(socket: WebSocket, session: impl FnOnce(Link) -> F, stopping: impl Fn() -> bool)
where
    F: Future<Output = ()>,
{
    let (to_socket, from_session) = mpsc::channel(limits::SOCKET_QUEUE);
    let (to_session, from_socket) = mpsc::channel(limits::SOCKET_QUEUE);
    let (sink, stream) = socket.split();
    let code = AtomicU16::new(close_code::NORMAL);
    let mut session = std::pin::pin!(session(Link { tx: to_socket, rx: from_socket }));
    let mut reading = std::pin::pin!(read(stream, to_session, &code));
    let close = || if stopping() { close_code::RESTART } else { code.load(Ordering::Relaxed) };
    let mut writing = std::pin::pin!(write(sink, from_session, close));
    let (mut read, mut written) = (false, false);
    loop {
        tokio::select! {
            biased;
            () = &mut session => break,
            () = &mut reading, if !read => read = true,
            () = &mut writing, if !written => written = true,
        }
    }
    if !written {
        // Whatever it could not write by then, the worker hears from the next session.
        let _ = tokio::time::timeout(Duration::from_millis(limits::SOCKET_GOODBYE_MS), writing).await;
    }
}

async fn read(mut stream: SplitStream<WebSocket>, to_session: mpsc::Sender<Frame>, code: &AtomicU16) {
    loop {
        let frame = match stream.next().await {
            Some(Ok(Message::Text(text))) => Frame::Text(text.to_string()),
            Some(Ok(Message::Binary(bytes))) => Frame::Binary(bytes),
            // Pings are answered below this layer.
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
            Some(Ok(Message::Close(_))) | None => return,
            Some(Err(_)) => return code.store(close_code::PROTOCOL, Ordering::Relaxed),
        };
        if to_session.send(frame).await.is_err() {
            return;
        }
    }
}

async fn write(
    mut sink: SplitSink<WebSocket, Message>,
    mut from_session: mpsc::Receiver<Frame>,
    close: impl Fn() -> u16,
) {
    while let Some(frame) = from_session.recv().await {
        let mut frame = Some(frame);
        // One flush for all that is ready.
        while let Some(next) = frame.take() {
            let message = match next {
                Frame::Text(text) => Message::Text(text.into()),
                Frame::Binary(bytes) => Message::Binary(bytes),
            };
            if sink.feed(message).await.is_err() {
                return;
            }
            frame = from_session.try_recv().ok();
        }
        if sink.flush().await.is_err() {
            return;
        }
    }
    let _ = sink.send(Message::Close(Some(CloseFrame { code: close(), reason: "".into() }))).await;
}

#[cfg(test)]
mod tests {
    use alloy_shared::wire::session::Frame;
    use axum::Router;
    use axum::routing::any;
    use futures_util::{SinkExt as _, StreamExt as _};
    use tokio::net::{TcpListener, TcpStream};
    use tokio_tungstenite::tungstenite::Message as Wire;
    use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
    use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};
    use tokio_util::sync::CancellationToken;
    use tokio_util::task::TaskTracker;

    use super::*;

    /// A server whose every socket is carried to `session`.
    async fn connect<F>(session: fn(Link) -> F, stopping: bool) -> WebSocketStream<MaybeTlsStream<TcpStream>>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("ws://{}/", listener.local_addr().unwrap());
        let handler = async move |upgrade: WebSocketUpgrade| {
            let upgrade = upgrade.max_frame_size(limits::FRAME_MAX).max_message_size(limits::FRAME_MAX);
            upgrade.on_upgrade(move |socket| carry(socket, session, move || stopping))
        };
        let router = Router::new().route("/", any(handler));
        let tracker = TaskTracker::new();
        let serving = crate::listen::serve(listener, router, tracker.clone(), CancellationToken::new(), 0);
        tracker.spawn(serving);
        tokio_tungstenite::connect_async(url).await.unwrap().0
    }

    async fn echo(mut link: Link) {
        while let Some(frame) = link.rx.recv().await {
            if frame == Frame::Text("bye".into()) || link.tx.send(frame).await.is_err() {
                return;
            }
        }
    }

    #[tokio::test]
    async fn frames_go_both_ways_in_order_and_the_end_of_a_session_closes_the_socket() {
        for (stopping, expect) in [(false, CloseCode::Normal), (true, CloseCode::Restart)] {
            let mut socket = connect(echo, stopping).await;
            let sent = [Wire::text("one"), Wire::binary(vec![0, 255]), Wire::text(""), Wire::text("ü")];
            for message in &sent {
                socket.send(message.clone()).await.unwrap();
            }
            socket.send(Wire::text("bye")).await.unwrap();
            for message in sent {
                assert_eq!(socket.next().await.unwrap().unwrap(), message);
            }
            match socket.next().await.unwrap().unwrap() {
                Wire::Close(Some(close)) => assert_eq!(close.code, expect),
                other => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn a_session_that_does_not_read_can_still_write() {
        async fn deaf(link: Link) {
            for n in 0..1_000 {
                link.tx.send(Frame::Text(n.to_string())).await.unwrap();
            }
            drop(link);
        }
        let mut socket = connect(deaf, false).await;
        for _ in 0..100 {
            socket.feed(Wire::binary(vec![7; 1000])).await.unwrap();
        }
        socket.flush().await.unwrap();
        for n in 0..1_000 {
            assert_eq!(socket.next().await.unwrap().unwrap(), Wire::text(n.to_string()));
        }
    }

    #[tokio::test]
    async fn a_frame_that_is_too_large_ends_the_session() {
        let mut socket = connect(echo, false).await;
        socket.send(Wire::binary(vec![0; limits::FRAME_MAX])).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap().len(), limits::FRAME_MAX);
        // Its size is refused before its bytes are read, so the sending may break off as well.
        let _ = socket.send(Wire::binary(vec![0; limits::FRAME_MAX + 1])).await;
        loop {
            match socket.next().await {
                Some(Ok(Wire::Close(Some(close)))) => assert_eq!(close.code, CloseCode::Protocol),
                Some(Ok(other)) => panic!("{} bytes", other.len()),
                Some(Err(_)) | None => break,
            }
        }
    }
}
