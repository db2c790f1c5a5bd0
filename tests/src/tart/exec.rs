//! `exec`: a client of the guest agent over `control.sock`, with the status rules of the contract.

use std::error::Error as _;
use std::io::{IsTerminal as _, Read as _};
use std::net::Ipv4Addr;
use std::thread;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use nix::sys::signal::{Signal, kill};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::Grpc;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};
use tonic_prost::ProstCodec;

use super::args::Parsed;
use super::context::{Sim, now};
use super::home::VmDir;
use super::rpc::{self, Chunk, ExecRequest, ExecResponse, Request, ResolveIpRequest, ResolveIpResponse, Response};
use super::{Done, Failure, fault, watch};

/// How long the client's connection pool waits for an agent, and how often it looks.
const CONNECT_SECONDS: f64 = 10.0;
const LOOK_SECONDS: f64 = 0.1;
/// Reads of the host's stdin.
const STDIN_CHUNK: usize = 64 * 1024;

pub(crate) fn exec(sim: &Sim, parsed: &Parsed) -> Done {
    let vm = VmDir::open(sim, &parsed.names[0])?;
    if vm.runner().is_none() {
        return Err(Failure::not_running(&vm.name));
    }
    let (interactive, tty) = (parsed.has("i"), parsed.has("t"));
    if tty && !std::io::stdout().is_terminal() {
        // The size of a window that is none.
        kill(nix::unistd::getpid(), Signal::SIGTRAP)?;
    }
    let command = rpc::Command {
        name: parsed.names[1].clone(),
        args: parsed.names[2..].to_vec(),
        interactive,
        tty,
        terminal_size: tty.then_some(rpc::TerminalSize { rows: 24, cols: 80 }),
        ..rpc::Command::default()
    };
    let interrupted = interrupt();
    // The path of a socket is short, and this way it is.
    std::env::set_current_dir(&vm.path)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let code = runtime.block_on(async {
        tokio::select! {
            biased;
            _ = interrupted => Err(Failure::Error("CancellationError()".into())),
            code = converse(sim, command, interactive || tty) => code,
        }
    })?;
    match code {
        0 => Ok(()),
        code => Err(Failure::Silent(code as u8)),
    }
}

fn interrupt() -> oneshot::Receiver<Signal> {
    let signals = watch::each(&[Signal::SIGINT]);
    let (tell, heard) = oneshot::channel();
    thread::spawn(move || signals.recv().map(|signal| tell.send(signal)));
    heard
}

async fn converse(sim: &Sim, command: rpc::Command, sends_stdin: bool) -> Result<i32, Failure> {
    let end = now() + sim.scaled(CONNECT_SECONDS).max(Duration::from_millis(500));
    let (input, mut output) = loop {
        let error = match begin(&command).await {
            Ok(begun) => break begun,
            Err(status) if is_connection(&status) => status,
            Err(status) => return Err(Failure::Error(describe(&status))),
        };
        if now() >= end {
            let text = format!(
                "Failed to connect to the VM using its control socket: {}, is the Tart Guest Agent running?",
                describe(&error)
            );
            return Err(Failure::Bare(text));
        }
        tokio::time::sleep(sim.scaled(LOOK_SECONDS).max(Duration::from_millis(2))).await;
    };
    // Held to the end: to half-close is not to end the guest's stdin.
    let _input = input.clone();
    if sends_stdin {
        thread::spawn(move || send_stdin(&input));
    }
    loop {
        match output.message().await {
            Ok(Some(ExecResponse { kind: Some(Response::Exit(exit)) })) => return Ok(exit.code),
            Ok(Some(ExecResponse { kind: Some(Response::StandardOutput(chunk)) })) => {
                write(&mut std::io::stdout().lock(), &chunk.data);
            }
            Ok(Some(ExecResponse { kind: Some(Response::StandardError(chunk)) })) => {
                write(&mut std::io::stderr().lock(), &chunk.data);
            }
            Ok(Some(ExecResponse { kind: None })) => {}
            // The loop just finishes.
            Ok(None) => return Ok(0),
            Err(status) if is_connection(&status) => {
                return Err(Failure::Error("unavailable (14): Transport became inactive".into()));
            }
            Err(status) => return Err(Failure::Error(describe(&status))),
        }
    }
}

type Begun = (mpsc::Sender<ExecRequest>, Streaming<ExecResponse>);

async fn begin(command: &rpc::Command) -> Result<Begun, Status> {
    let mut grpc = connect().await?;
    let (send, requests) = mpsc::channel(4);
    send.send(Request::Command(command.clone()).into()).await.map_err(|_| Status::internal("closed"))?;
    let codec = ProstCodec::<ExecRequest, ExecResponse>::default();
    let request = tonic::Request::new(ReceiverStream::new(requests));
    let path = http::uri::PathAndQuery::from_static(rpc::EXEC);
    Ok((send, grpc.streaming(request, path, codec).await?.into_inner()))
}

async fn connect() -> Result<Grpc<Channel>, Status> {
    let socket = tower::service_fn(|_| async { UnixStream::connect("control.sock").await.map(TokioIo::new) });
    let channel = Endpoint::from_static("http://guest").connect_with_connector(socket).await;
    let mut grpc = Grpc::new(channel.map_err(|error| Status::from_error(Box::new(error)))?);
    grpc.ready().await.map_err(|error| Status::from_error(Box::new(error)))?;
    Ok(grpc)
}

/// An answer of the agent has no cause on this side.
fn is_connection(status: &Status) -> bool {
    status.source().is_some()
}

fn send_stdin(input: &mpsc::Sender<ExecRequest>) {
    let mut buffer = vec![0; STDIN_CHUNK];
    let mut stdin = std::io::stdin().lock();
    loop {
        let len = stdin.read(&mut buffer).unwrap_or(0);
        let chunk = Chunk { data: buffer[..len].to_vec() };
        if input.blocking_send(Request::StandardInput(chunk).into()).is_err() || len == 0 {
            return;
        }
    }
}

fn write(out: &mut impl std::io::Write, data: &[u8]) {
    if out.write_all(data).and_then(|()| out.flush()).is_err_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe) {
        fault::die_of("PIPE");
    }
}

fn describe(status: &Status) -> String {
    let name = match status.code() {
        Code::Ok => "ok",
        Code::Cancelled => "cancelled",
        Code::Unknown => "unknown",
        Code::InvalidArgument => "invalid argument",
        Code::DeadlineExceeded => "deadline exceeded",
        Code::NotFound => "not found",
        Code::AlreadyExists => "already exists",
        Code::PermissionDenied => "permission denied",
        Code::ResourceExhausted => "resource exhausted",
        Code::FailedPrecondition => "failed precondition",
        Code::Aborted => "aborted",
        Code::OutOfRange => "out of range",
        Code::Unimplemented => "unimplemented",
        Code::Internal => "internal error",
        Code::Unavailable => "unavailable",
        Code::DataLoss => "data loss",
        Code::Unauthenticated => "unauthenticated",
    };
    format!("{name} ({}): {}", status.code() as i32, status.message())
}

/// Asks the agent for the guest's address. A connection that fails is "not yet"; an error of the agent is an error.
pub(crate) fn resolve_ip(sim: &Sim, vm: &VmDir) -> Result<Option<Ipv4Addr>, Failure> {
    std::env::set_current_dir(&vm.path)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let patience = sim.scaled(1.0).max(Duration::from_millis(500));
    let asked = runtime.block_on(async {
        tokio::time::timeout(patience, async {
            let mut grpc = connect().await?;
            let codec = ProstCodec::<ResolveIpRequest, ResolveIpResponse>::default();
            let path = http::uri::PathAndQuery::from_static(rpc::RESOLVE_IP);
            grpc.unary(tonic::Request::new(ResolveIpRequest {}), path, codec).await
        })
        .await
    });
    match asked {
        Err(_late) => Ok(None),
        Ok(Err(status)) if is_connection(&status) => Ok(None),
        Ok(Err(status)) => Err(Failure::Error(describe(&status))),
        Ok(Ok(answer)) => Ok(answer.into_inner().ip.parse().ok()),
    }
}
