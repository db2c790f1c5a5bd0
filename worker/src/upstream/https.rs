//! S: the network: one WebSocket a session, and the typed client for everything large.

use std::sync::Arc;

use alloy_shared::client::{Client, ClientError, Options};
use alloy_shared::env::{Env, backoff};
use alloy_shared::id::{Digest, WorkerId};
use alloy_shared::limits;
use alloy_shared::wire::session::{Frame, Link};
use alloy_shared::wire::source::PackFrame;
use alloy_shared::wire::{ErrorCode, Problem, SUBPROTOCOL, path};
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{Sink, SinkExt as _, Stream, StreamExt as _};
use tokio::sync::mpsc;
use tokio_tungstenite::connect_async_tls_with_config;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::http::header::{AUTHORIZATION, SEC_WEBSOCKET_PROTOCOL, USER_AGENT};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error as SocketError, Message};

use super::{Blobs, DialError, Grant, TransferError, Upstream};
use crate::spool::SpoolFile;

/// Frames between the session and its socket, each way. Few: a heartbeat stands behind them.
const LINK_QUEUE: usize = 4;
/// Blobs that wait for whoever unpacks them. Each may be as large as `BLOB_MAX`.
const BLOB_QUEUE: usize = 4;
/// What is still queued when a session ends may leave within this time.
const LINGER_MS: u64 = 1_000;
/// An upload without any progress is given up after this, the time that collecting has. Whoever waits may give up earlier.
const PUT_BUDGET_MS: u64 = 10 * 60_000;
const PUT_PAUSE_MS: u64 = 200;
const PUT_PAUSE_CAP_MS: u64 = 10_000;

pub struct Https {
    client: Client,
    worker: WorkerId,
    env: Arc<dyn Env>,
}

impl Https {
    pub fn new(url: &str, worker: WorkerId, env: Arc<dyn Env>) -> Result<Self, ClientError> {
        let options = Options { url: url.to_owned(), token: None, agent: agent() };
        Ok(Self { client: Client::new(options, env.clone())?, worker, env })
    }
}

/// How workers name themselves in requests.
pub(crate) fn agent() -> String {
    format!("alloy-worker/{}", env!("CARGO_PKG_VERSION"))
}

#[async_trait]
impl Upstream for Https {
    async fn dial(&self) -> Result<Link, DialError> {
        // `http` becomes `ws`, `https` becomes `wss`.
        let url = format!("{}{}", self.client.url().replacen("http", "ws", 1), path::WORKER_CONNECT);
        let unusable = |error: &dyn std::fmt::Display| DialError::Unreachable(format!("{url}: {error}"));
        let mut request = url.as_str().into_client_request().map_err(|error| unusable(&error))?;
        let header = |text: String| HeaderValue::try_from(text).map_err(|error| unusable(&error));
        request.headers_mut().insert(AUTHORIZATION, header(format!("Worker {}", self.worker))?);
        request.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(SUBPROTOCOL));
        request.headers_mut().insert(USER_AGENT, header(agent())?);
        let config = WebSocketConfig::default()
            .read_buffer_size(limits::SOCKET_BUFFER)
            .write_buffer_size(limits::SOCKET_BUFFER)
            .max_message_size(Some(limits::FRAME_MAX))
            .max_frame_size(Some(limits::FRAME_MAX));
        let without_delay = true;
        let (socket, _) = connect_async_tls_with_config(request, Some(config), without_delay, None)
            .await
            .map_err(|error| dial_error(&url, error))?;
        let (sink, stream) = socket.split();
        let (tx, from_session) = mpsc::channel(LINK_QUEUE);
        let (to_session, rx) = mpsc::channel(LINK_QUEUE);
        let env = self.env.clone();
        let pump = async move {
            let (read, write) = (receive(stream, to_session), transmit(sink, from_session));
            tokio::pin!(read, write);
            tokio::select! {
                biased;
                () = &mut write => {}
                () = &mut read => tokio::select! {
                    biased;
                    () = &mut write => {}
                    () = env.sleep_until(env.now().mono + LINGER_MS) => {}
                },
            }
        };
        self.env.spawn("socket", Box::pin(pump));
        Ok(Link { tx, rx })
    }

    async fn manifest(&self, grant: &Grant) -> Result<Bytes, TransferError> {
        self.client.attempt_source(&grant.attempt, &grant.token).await.map_err(transfer_error)
    }

    async fn fetch(&self, grant: &Grant, missing: &[Digest]) -> Result<Blobs, TransferError> {
        let (tx, rx) = mpsc::channel(BLOB_QUEUE);
        let frames = self.client.attempt_blobs(&grant.attempt, &grant.token, missing.to_vec());
        self.env.spawn("fetch", Box::pin(unpack_all(frames, tx)));
        Ok(rx)
    }

    async fn put(&self, grant: &Grant, file: &SpoolFile) -> Result<Digest, TransferError> {
        let (at, token, digest) = (&grant.attempt, &grant.token, file.digest());
        let total = file.size().map_err(|error| TransferError::Spool(error.to_string()))?;
        let (mut tries, mut best, mut moved_at) = (0u32, 0, self.env.now().mono);
        loop {
            // An orchestrator that restarts answers neither the question nor the upload.
            let error = match self.client.attempt_artifact_len(at, token, &digest).await {
                Ok(have) if have == total && total > 0 => return Ok(digest),
                Ok(have) if have > total => {
                    return Err(TransferError::Refused(format!("it has {have} bytes of {digest}, which has {total}")));
                }
                Ok(have) => {
                    if have > best {
                        (tries, best, moved_at) = (0, have, self.env.now().mono);
                    }
                    let body = file.open(have).map_err(|error| TransferError::Spool(error.to_string()))?;
                    match self.client.put_attempt_artifact(at, token, &digest, have, total, body).await {
                        Ok(()) => return Ok(digest),
                        Err(error) => error,
                    }
                }
                Err(error) => error,
            };
            let now = self.env.now().mono;
            if !may_retry(&error) || now.since(moved_at) >= PUT_BUDGET_MS {
                return Err(transfer_error(error));
            }
            tries = tries.saturating_add(1);
            let backoff = backoff(tries, PUT_PAUSE_MS, PUT_PAUSE_CAP_MS, self.env.dice());
            let pause_ms = backoff.max(error.retry_after_ms().min(PUT_PAUSE_CAP_MS));
            self.env.sleep_until(now + pause_ms).await;
        }
    }
}

/// Socket → session, until either is gone.
async fn receive(mut stream: impl Stream<Item = Result<Message, SocketError>> + Unpin, tx: mpsc::Sender<Frame>) {
    loop {
        let message = tokio::select! {
            biased;
            () = tx.closed() => return,
            message = stream.next() => message,
        };
        let frame = match message {
            Some(Ok(Message::Text(text))) => Frame::Text(text.as_str().to_owned()),
            Some(Ok(Message::Binary(bytes))) => Frame::Binary(bytes),
            Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => continue,
            Some(Ok(Message::Close(_))) | None => return,
            Some(Err(error)) => {
                tracing::debug!(%error, "the socket failed");
                return;
            }
        };
        if tx.send(frame).await.is_err() {
            return;
        }
    }
}

/// Session → socket, until either is gone. What is queued together leaves together.
async fn transmit(mut sink: impl Sink<Message, Error = SocketError> + Unpin, mut rx: mpsc::Receiver<Frame>) {
    while let Some(frame) = rx.recv().await {
        let mut next = Some(frame);
        while let Some(frame) = next {
            let message = match frame {
                Frame::Text(text) => Message::text(text),
                Frame::Binary(bytes) => Message::Binary(bytes),
            };
            if sink.feed(message).await.is_err() {
                return;
            }
            next = rx.try_recv().ok();
        }
        if sink.flush().await.is_err() {
            return;
        }
    }
    // A peer that is gone cannot be told.
    sink.close().await.ok();
}

/// Unpacks frames on threads for such work, until the first that cannot be used.
async fn unpack_all(
    mut frames: mpsc::Receiver<Result<PackFrame, ClientError>>,
    tx: mpsc::Sender<Result<(Digest, Bytes), TransferError>>,
) {
    while let Some(frame) = frames.recv().await {
        let blobs = match frame {
            Ok(frame) => match tokio::task::spawn_blocking(move || frame.unpack()).await {
                Ok(Ok(blobs)) => Ok(blobs),
                Ok(Err(bad)) => Err(TransferError::Broken(bad.to_string())),
                Err(error) => Err(TransferError::Broken(error.to_string())),
            },
            Err(error) => Err(transfer_error(error)),
        };
        let failed = blobs.is_err();
        let blobs = blobs.map_or_else(|error| vec![Err(error)], |blobs| blobs.into_iter().map(Ok).collect());
        for blob in blobs {
            if tx.send(blob).await.is_err() {
                return;
            }
        }
        if failed {
            return;
        }
    }
}

fn dial_error(url: &str, error: SocketError) -> DialError {
    match error {
        SocketError::Http(response) => {
            let problem = serde_json::from_slice::<Problem>(response.body().as_deref().unwrap_or_default());
            match problem {
                Ok(Problem { code, message, retry_after_s, .. }) if response.status().is_client_error() => {
                    DialError::Refused { code, message, retry_after_ms: retry_after_s.map(|s| s.saturating_mul(1000)) }
                }
                // A proxy's word, or a farm that is starting or stopping.
                Ok(_) | Err(_) => DialError::Unreachable(format!("{url} answers {}", response.status())),
            }
        }
        error => DialError::Unreachable(format!("{url}: {error}")),
    }
}

fn may_retry(error: &ClientError) -> bool {
    match error {
        ClientError::Unreachable { .. } => true,
        ClientError::Problem(problem) => problem.code.is_retryable() || problem.code == ErrorCode::OffsetMismatch,
        ClientError::Protocol { .. } => false,
    }
}

fn transfer_error(error: ClientError) -> TransferError {
    let text = error.to_string();
    let is_final = !may_retry(&error);
    match error.problem().map(|problem| problem.code) {
        Some(ErrorCode::Fenced | ErrorCode::Unauthenticated | ErrorCode::Forbidden) => TransferError::Fenced(text),
        Some(_) if is_final => TransferError::Refused(text),
        Some(_) | None => TransferError::Broken(text),
    }
}

#[cfg(test)]
mod tests;
