//! S: the guest agent's gRPC over a VM's `control.sock`: one connection, one command, an explicit end.
//!
//! The service has no version to ask for, so only what every agent knows is used: a program with arguments and bytes for
//! its standard input. A guest that is still booting accepts the connection and closes it without a byte.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Request;
use tonic::client::Grpc;
use tonic::transport::{Channel, Endpoint};
use tonic_prost::ProstCodec;

use super::{VmError, VmFault};

/// A peer that is there answers at once; one that does not is not ready.
const CONNECT: Duration = Duration::from_secs(5);
/// Requests on their way: the command, its input, the end of it.
const REQUESTS: usize = 4;
/// One message of standard input. The agent's own chunks are smaller.
const INPUT_CHUNK: usize = 64 << 10;

#[derive(Clone, PartialEq, Message)]
struct ExecRequest {
    #[prost(oneof = "Ask", tags = "1, 2")]
    ask: Option<Ask>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Ask {
    #[prost(message, tag = "1")]
    Command(Command),
    #[prost(message, tag = "2")]
    StandardInput(Chunk),
}

#[derive(Clone, PartialEq, Message)]
struct Command {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, repeated, tag = "2")]
    args: Vec<String>,
    #[prost(bool, tag = "3")]
    interactive: bool,
}

#[derive(Clone, PartialEq, Message)]
struct Chunk {
    #[prost(bytes = "bytes", tag = "1")]
    data: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct Code {
    #[prost(int32, tag = "1")]
    code: i32,
}

#[derive(Clone, PartialEq, Message)]
struct ExecResponse {
    #[prost(oneof = "Answer", tags = "1, 2, 3")]
    answer: Option<Answer>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Answer {
    #[prost(message, tag = "1")]
    Exit(Code),
    #[prost(message, tag = "2")]
    StandardOutput(Chunk),
    #[prost(message, tag = "3")]
    StandardError(Chunk),
}

/// What a program in the guest says.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Said {
    Bytes(Bytes),
    /// The program's own end: the only proof that it ran to it.
    Exit(i32),
    Lost(VmError),
}

/// Runs a program in the guest with these bytes as its whole standard input. `stop` ends the stream, and with it the
/// program. The channel ends with `Exit` or `Lost`.
pub(super) async fn exec(
    socket: &Path,
    argv: &[&str],
    input: Bytes,
    said: mpsc::Sender<Said>,
    stop: CancellationToken,
) {
    let talk = talk(socket, argv, input, &said);
    let last = tokio::select! {
        biased;
        () = stop.cancelled() => return,
        last = talk => last,
    };
    let last = last.unwrap_or_else(|why| Said::Lost(VmError::farm(VmFault::Lost, why)));
    let _nobody_asks = said.send(last).await;
}

async fn talk(socket: &Path, argv: &[&str], input: Bytes, said: &mpsc::Sender<Said>) -> Result<Said, String> {
    let mut client = Grpc::new(connect(socket).await?);
    client.ready().await.map_err(|error| format!("the guest agent does not answer: {error}"))?;
    let (asks, asked) = mpsc::channel(REQUESTS);
    let stream = futures_util::stream::unfold(asked, |mut asked| async { Some((asked.recv().await?, asked)) });
    let call = client.streaming(
        Request::new(stream),
        PathAndQuery::from_static("/Agent/Exec"),
        ProstCodec::<ExecRequest, ExecResponse>::default(),
    );
    let (name, args) = argv.split_first().ok_or("there is no program to run")?;
    let command = Command {
        name: (*name).to_owned(),
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        interactive: true,
    };
    let ask = async {
        let empty = Bytes::new();
        let chunks = input.chunks(INPUT_CHUNK).map(|chunk| input.slice_ref(chunk)).chain([empty]);
        let chunks = chunks.map(|data| Ask::StandardInput(Chunk { data }));
        for ask in [Ask::Command(command)].into_iter().chain(chunks) {
            // A call that is over needs no more input.
            if asks.send(ExecRequest { ask: Some(ask) }).await.is_err() {
                return;
            }
        }
        // The stream stays open: an agent may take its end for the end of the command.
        std::future::pending().await
    };
    let hear = async {
        let mut answers = call.await.map_err(|status| told(&status))?.into_inner();
        while let Some(response) = answers.message().await.map_err(|status| told(&status))? {
            let bytes = match response.answer {
                Some(Answer::Exit(Code { code })) => return Ok(Said::Exit(code)),
                Some(Answer::StandardOutput(chunk) | Answer::StandardError(chunk)) => chunk.data,
                // Something that a newer agent says beside.
                None => continue,
            };
            if said.send(Said::Bytes(bytes)).await.is_err() {
                return Err("nobody listens".to_owned());
            }
        }
        Err("the guest agent ended the command without saying how".to_owned())
    };
    tokio::select! {
        biased;
        heard = hear => heard,
        () = ask => Err("the guest agent took no input".to_owned()),
    }
}

async fn connect(socket: &Path) -> Result<Channel, String> {
    let socket = socket.to_owned();
    let dial = tower::service_fn(move |_uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    // The host's name is never looked up: the connector knows one way.
    let endpoint = Endpoint::from_static("http://guest").connect_timeout(CONNECT);
    match tokio::time::timeout(CONNECT, endpoint.connect_with_connector(dial)).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) => Err(format!("no way to the guest agent: {}", chain(&error))),
        Err(_late) => Err("no way to the guest agent in time".to_owned()),
    }
}

fn told(status: &tonic::Status) -> String {
    format!("the guest agent: {:?}: {}", status.code(), status.message())
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}
