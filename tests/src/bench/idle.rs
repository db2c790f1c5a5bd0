//! What costs memory while nothing happens: the daemons, and a worker's connection.

use std::time::Duration;

use alloy_shared::id::{BootId, Labels, WorkerId};
use alloy_shared::wire::session::{Hello, SlotState, SlotView, signed_text};
use alloy_shared::wire::{PROTOCOL, SUBPROTOCOL, path};
use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_util::{SinkExt as _, StreamExt as _};
use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::protocol::{Message, WebSocketConfig};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

use super::floors::rss_kib;
use super::report::{Better, Row};
use super::{Options, path as calls};
use crate::farm::{Farm, Setup};
use crate::observe::{Api, until};

pub async fn rows(options: &Options) -> Result<Vec<Row>> {
    let mut farm = Farm::start(Setup { workers: 1, slots: 2, time_scale: 1, ..Setup::default() }).await?;
    calls::hello(&farm.api()).await?;
    let mut orchestrator = Row::new("idle orchestrator, RSS", "MiB", Better::Lower, "told, no aim");
    let mut worker = Row::new("idle worker, RSS", "MiB", Better::Lower, "told, no aim");
    orchestrator.ours(vec![rss_kib(farm.orchestrator().pid())? / 1024.0]);
    worker.ours(vec![rss_kib(farm.worker(0).pid())? / 1024.0]);

    let count = if options.quick { 50 } else { 500 };
    let mut connection = Row::new("idle worker connection", "KiB", Better::Lower, "at most 16 KiB");
    let api = farm.api();
    let mut identities = Vec::new();
    for number in 0..count {
        identities.push(Identity::enrol(&api, number).await?);
    }
    // The memory of enrolling is not the memory of a connection.
    let before = rss_kib(farm.orchestrator().pid())?;
    let mut sockets = Vec::new();
    for identity in &identities {
        sockets.push(identity.connect(&farm).await?);
    }
    let after = rss_kib(farm.orchestrator().pid())?;
    connection.ours(vec![(after - before) / f64::from(count)]);
    connection.note = format!("{count} connections, welcomed, 4 KiB buffers; orchestrator's RSS before and after");
    drop(sockets);
    Ok(vec![orchestrator, worker, connection])
}

/// An enrolled worker that is nothing but its key.
struct Identity {
    id: WorkerId,
    key: Ed25519KeyPair,
}

type Socket = WebSocketStream<TcpStream>;

impl Identity {
    async fn enrol(api: &Api, number: u32) -> Result<Identity> {
        let invite = patient(api, path::WORKER_INVITES, &json!({})).await?;
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|_| anyhow::anyhow!("no key"))?;
        let key = Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).map_err(|_| anyhow::anyhow!("no key"))?;
        let body = json!({
            "token": invite["token"],
            "public_key": BASE64.encode(key.public_key().as_ref()),
            "name": format!("idle-{number}"),
        });
        let enrolled = patient(api, path::WORKER_ENROL, &body).await?;
        Ok(Identity { id: enrolled["worker"].as_str().context("an id")?.parse()?, key })
    }

    /// Opens a session as a worker does, with its buffers, and stays silent.
    async fn connect(&self, farm: &Farm) -> Result<Socket> {
        let mut request = format!("ws://{}{}", farm.address(), path::WORKER_CONNECT).into_client_request()?;
        let headers = request.headers_mut();
        headers.insert("authorization", format!("Worker {}", self.id).parse()?);
        headers.insert("sec-websocket-protocol", SUBPROTOCOL.parse()?);
        let stream = TcpStream::connect(farm.address()).await?;
        let config = WebSocketConfig::default().read_buffer_size(4096).write_buffer_size(4096);
        let (mut socket, _) = client_async_with_config(request, stream, Some(config)).await?;
        let challenge = message(&mut socket).await?;
        let nonce = challenge["nonce"].as_str().with_context(|| challenge.to_string())?;
        let boot = BootId::from_raw(7);
        let hello = Hello {
            protocol_min: *PROTOCOL.start(),
            protocol_max: *PROTOCOL.end(),
            capabilities: Vec::new(),
            worker: self.id,
            boot,
            signature: BASE64.encode(self.key.sign(signed_text(nonce, self.id, boot).as_bytes()).as_ref()),
            version: "bench".into(),
            labels: Labels::default(),
            slots: vec![SlotView { state: SlotState::Cold, attempt: None, image: None }; 2],
            held: Vec::new(),
            draining: true,
            trouble: None,
        };
        let mut hello = serde_json::to_value(hello)?;
        hello["type"] = "hello".into();
        socket.send(Message::Text(hello.to_string().into())).await?;
        let welcome = message(&mut socket).await?;
        ensure!(welcome["type"] == "welcome", "{welcome}");
        Ok(socket)
    }
}

async fn message(socket: &mut Socket) -> Result<Value> {
    match tokio::time::timeout(Duration::from_secs(10), socket.next()).await?.context("the socket ended")?? {
        Message::Text(text) => Ok(serde_json::from_str(&text)?),
        other => bail!("not a message: {other:?}"),
    }
}

/// A call that waits when it is told to.
async fn patient(api: &Api, path: &str, body: &Value) -> Result<Value> {
    until(&format!("{path} takes the call"), async || {
        let (status, answer) = api.try_post(path, body).await?;
        match status.as_u16() {
            429 => Ok(None),
            200..=299 => Ok(Some(Ok(answer))),
            _ => Ok(Some(Err(anyhow::anyhow!("{path}: {status}: {answer}")))),
        }
    })
    .await
}
