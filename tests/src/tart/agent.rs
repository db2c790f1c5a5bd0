//! The guest agent: both calls of the protocol, and an sshd beside it. It runs inside of the guest; what it knows of the host
//! comes through the channel to `run`.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::process::{Child, Command};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::server::{Grpc, StreamingService, UnaryService};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use super::guest::{HOST_GONE, Spec};
use super::image;
use super::rpc::{self, Chunk, ExecRequest, ExecResponse, Exit, ResolveIpRequest, ResolveIpResponse};
use super::shims::SSHD_CONFIG;

/// The agent's own reads of a pipe.
const OUTPUT_CHUNK: usize = 4096;
const RESPONSES_IN_FLIGHT: usize = 16;
const PATH: &str = "/bin:/usr/bin:/usr/sbin:/usr/local/bin:/opt/homebrew/bin";

pub(crate) struct Agent {
    spec: Spec,
    host: Mutex<Host>,
}

/// Questions to `run`, one at a time.
struct Host {
    ask: OwnedWriteHalf,
    answers: mpsc::Receiver<Value>,
}

impl Agent {
    async fn ask(&self, question: &Value) -> Value {
        let mut host = self.host.lock().await;
        let line = format!("{question}\n");
        if host.ask.write_all(line.as_bytes()).await.is_err() {
            return Value::Null;
        }
        host.answers.recv().await.unwrap_or(Value::Null)
    }
}

pub(crate) fn serve(spec: Spec) -> Result<()> {
    let listener = std::os::unix::net::UnixListener::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let channel = std::os::unix::net::UnixStream::from(std::io::stdout().as_fd().try_clone_to_owned()?);
    listener.set_nonblocking(true)?;
    channel.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (hear, ask) = UnixStream::from_std(channel)?.into_split();
        let (tell, answers) = mpsc::channel(1);
        task(async move {
            let mut lines = BufReader::new(hear).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let _ = tell.send(serde_json::from_str(&line).unwrap_or(Value::Null)).await;
            }
            std::process::exit(HOST_GONE);
        });
        let agent = Arc::new(Agent { spec, host: Mutex::new(Host { ask, answers }) });
        let listener = UnixListener::from_std(listener)?;
        loop {
            let (stream, _) = listener.accept().await?;
            task(connection(agent.clone(), stream));
        }
    })
}

#[expect(clippy::disallowed_methods, reason = "tasks of a guest end with the guest")]
fn task(future: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    tokio::spawn(future)
}

/// The host says first which port it wants.
async fn connection(agent: Arc<Agent>, mut stream: UnixStream) {
    let mut port = String::new();
    while let Ok(byte) = stream.read_u8().await {
        match byte {
            b'\n' => break,
            byte => port.push(char::from(byte)),
        }
    }
    match &*port {
        "8080" => rpc_connection(agent, stream).await,
        "22" => ssh_connection(stream).await,
        _ => {}
    }
}

async fn ssh_connection(stream: UnixStream) {
    let Ok(stream) = stream.into_std() else { return };
    if stream.set_nonblocking(false).is_err() {
        return;
    }
    let stream = OwnedFd::from(stream);
    let Ok(copy) = stream.try_clone() else { return };
    let _ = std::fs::create_dir_all("/run/sshd");
    let mut sshd = Command::new("/usr/sbin/sshd");
    sshd.args(["-i", "-e", "-f", SSHD_CONFIG]).env_clear().env("PATH", PATH);
    if let Ok(mut child) = sshd.stdin(stream).stdout(copy).stderr(Stdio::null()).spawn() {
        let _ = child.wait().await;
    }
}

async fn rpc_connection(agent: Arc<Agent>, stream: UnixStream) {
    let service = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
        let agent = agent.clone();
        async move {
            let answer = match request.uri().path() {
                rpc::EXEC => {
                    let codec = ProstCodec::<ExecResponse, ExecRequest>::default();
                    Grpc::new(codec).streaming(ExecCall(agent), request).await
                }
                rpc::RESOLVE_IP => {
                    let codec = ProstCodec::<ResolveIpResponse, ResolveIpRequest>::default();
                    Grpc::new(codec).unary(ResolveIpCall(agent), request).await
                }
                _ => Status::unimplemented("unknown method").into_http(),
            };
            Ok::<_, Infallible>(answer)
        }
    });
    let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    // A client that goes away is no error here.
    let _ = http.serve_connection(TokioIo::new(stream), service).await;
}

type Called<T> = Pin<Box<dyn Future<Output = Result<Response<T>, Status>> + Send>>;

struct ResolveIpCall(Arc<Agent>);

impl UnaryService<ResolveIpRequest> for ResolveIpCall {
    type Response = ResolveIpResponse;
    type Future = Called<ResolveIpResponse>;

    fn call(&mut self, _: Request<ResolveIpRequest>) -> Self::Future {
        let agent = self.0.clone();
        Box::pin(async move {
            match agent.ask(&json!({ "ask": "ip" })).await["ip"].as_str() {
                Some(ip) => Ok(Response::new(ResolveIpResponse { ip: ip.to_owned() })),
                None => Err(Status::unknown("cannot resolve VM's IP address")),
            }
        })
    }
}

type Answers = ReceiverStream<Result<ExecResponse, Status>>;

struct ExecCall(Arc<Agent>);

impl StreamingService<ExecRequest> for ExecCall {
    type Response = ExecResponse;
    type ResponseStream = Answers;
    type Future = Called<Answers>;

    fn call(&mut self, request: Request<Streaming<ExecRequest>>) -> Self::Future {
        let agent = self.0.clone();
        Box::pin(async move { Ok(Response::new(exec(agent, request.into_inner()).await?)) })
    }
}

async fn exec(agent: Arc<Agent>, mut requests: Streaming<ExecRequest>) -> Result<Answers, Status> {
    let first = requests.message().await?.and_then(|request| request.kind);
    let Some(rpc::Request::Command(mut command)) = first else {
        return Err(Status::invalid_argument("the first message must be a command"));
    };
    if agent.spec.agent == image::Agent::V0_9 {
        (command.env, command.workdir, command.detach) = (HashMap::new(), String::new(), false);
    }
    let fault = agent.ask(&json!({ "ask": "exec", "name": command.name })).await;
    let (tell, answers) = mpsc::channel(RESPONSES_IN_FLIGHT);
    if command.detach {
        // Its end is nobody's business but the reaper's.
        drop(start(&agent.spec, &command, Stdio::null(), Stdio::null(), Stdio::null())?);
        let _ = tell.send(Ok(exited(0))).await;
        return Ok(ReceiverStream::new(answers));
    }
    let attended = if command.tty { with_terminal(&agent, &command)? } else { with_pipes(&agent, &command)? };
    task(attend(agent, attended, requests, tell, fault));
    Ok(ReceiverStream::new(answers))
}

type Out = Box<dyn AsyncRead + Send + Unpin>;

/// A command that runs, and its streams.
struct Attended {
    child: Child,
    stdin: Option<Box<dyn tokio::io::AsyncWrite + Send + Unpin>>,
    stdout: Option<Out>,
    stderr: Option<Out>,
}

fn with_pipes(agent: &Agent, command: &rpc::Command) -> Result<Attended, Status> {
    let stdin = if command.interactive { Stdio::piped() } else { Stdio::null() };
    let mut child = start(&agent.spec, command, stdin, Stdio::piped(), Stdio::piped())?;
    Ok(Attended {
        stdin: child.stdin.take().map(|stdin| Box::new(stdin) as _),
        stdout: child.stdout.take().map(|stdout| Box::new(stdout) as _),
        stderr: child.stderr.take().map(|stderr| Box::new(stderr) as _),
        child,
    })
}

/// One terminal for all three streams; what the command says on stderr comes out on stdout.
fn with_terminal(agent: &Agent, command: &rpc::Command) -> Result<Attended, Status> {
    let failed = |error: nix::errno::Errno| Status::unknown(error.desc());
    let size = command.terminal_size.clone().unwrap_or(rpc::TerminalSize { rows: 24, cols: 80 });
    let small = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
    let size = nix::pty::Winsize { ws_row: small(size.rows), ws_col: small(size.cols), ws_xpixel: 0, ws_ypixel: 0 };
    let pty = nix::pty::openpty(Some(&size), None).map_err(failed)?;
    let copy = |fd: &OwnedFd| fd.try_clone().map_err(|error| Status::unknown(error.to_string()));
    let wrapped = rpc::Command {
        name: "setsid".into(),
        args: ["-c".to_owned(), command.name.clone()].into_iter().chain(command.args.iter().cloned()).collect(),
        ..command.clone()
    };
    let (slave, other) = (copy(&pty.slave)?, copy(&pty.slave)?);
    let child = start(&agent.spec, &wrapped, pty.slave.into(), slave.into(), other.into())?;
    let file = |fd: OwnedFd| tokio::fs::File::from_std(fd.into());
    let input = file(copy(&pty.master)?);
    Ok(Attended { child, stdin: Some(Box::new(input)), stdout: Some(Box::new(file(pty.master))), stderr: None })
}

fn start(spec: &Spec, command: &rpc::Command, stdin: Stdio, stdout: Stdio, stderr: Stdio) -> Result<Child, Status> {
    let home = spec.path(&spec.home);
    let dir = match &*command.workdir {
        "" => home.clone(),
        given => Some(spec.path(given)).filter(|path| path.is_dir()).unwrap_or_else(|| PathBuf::from(given)),
    };
    if !dir.is_dir() {
        return Err(Status::unknown(format!("chdir {}: no such file or directory", command.workdir)));
    }
    let mut child = Command::new(&command.name);
    child.args(&command.args).env_clear().env("PATH", PATH).env("TERM", "xterm-256color").env("HOME", &home);
    child.env("USER", "admin").env("LOGNAME", "admin").env("SHELL", "/bin/zsh").env("PWD", &dir);
    child.envs(&command.env).current_dir(&dir).stdin(stdin).stdout(stdout).stderr(stderr);
    child.spawn().map_err(|error| Status::unknown(not_started(&command.name, &error)))
}

/// In the words of the agent's language.
fn not_started(name: &str, error: &std::io::Error) -> String {
    let is_path = Path::new(name).components().count() > 1;
    match error.kind() {
        std::io::ErrorKind::NotFound if is_path => format!("fork/exec {name}: no such file or directory"),
        std::io::ErrorKind::NotFound => format!("exec: \"{name}\": executable file not found in $PATH"),
        std::io::ErrorKind::PermissionDenied if is_path => format!("fork/exec {name}: permission denied"),
        _ => format!("exec: \"{name}\": {error}"),
    }
}

async fn attend(
    agent: Arc<Agent>,
    mut running: Attended,
    requests: Streaming<ExecRequest>,
    tell: mpsc::Sender<Result<ExecResponse, Status>>,
    fault: Value,
) {
    if fault["fault"] == "agent_crash" {
        let after = Duration::from_secs_f64(fault["seconds"].as_f64().unwrap_or(0.0));
        task(async move {
            tokio::time::sleep(after).await;
            std::process::exit(9);
        });
    }
    let fed = running.stdin.take().map(|stdin| task(feed(stdin, requests)));
    run_to_end(&agent, &mut running, &tell, &fault).await;
    if let Some(fed) = fed {
        fed.abort();
    }
}

async fn run_to_end(
    agent: &Agent,
    running: &mut Attended,
    tell: &mpsc::Sender<Result<ExecResponse, Status>>,
    fault: &Value,
) {
    let (stdout, stderr) = (running.stdout.take(), running.stderr.take());
    let ended = async {
        // Pipes are drained before the end is reported: who still holds one keeps the stream open.
        tokio::join!(
            pump(stdout, tell, rpc::Response::StandardOutput),
            pump(stderr, tell, rpc::Response::StandardError),
        );
    };
    tokio::select! {
        biased;
        // Only the direct child dies with its stream.
        () = tell.closed() => {
            let _ = running.child.kill().await;
            return;
        }
        () = ended => {}
    }
    match fault["fault"].as_str() {
        Some("no_exit") => return,
        Some("hang") => tell.closed().await,
        _ => {}
    }
    if let Ok(status) = running.child.wait().await {
        let _ = tell.send(Ok(exited(code(&agent.spec, status)))).await;
    }
}

fn exited(code: i32) -> ExecResponse {
    rpc::Response::Exit(Exit { code }).into()
}

fn code(spec: &Spec, status: ExitStatus) -> i32 {
    match (status.code(), spec.agent) {
        (Some(code), _) => code,
        (None, image::Agent::V0_12) => 128 + status.signal().unwrap_or(0),
        (None, _) => -1,
    }
}

async fn feed(mut stdin: Box<dyn tokio::io::AsyncWrite + Send + Unpin>, mut requests: Streaming<ExecRequest>) {
    while let Ok(Some(request)) = requests.message().await {
        match request.kind {
            Some(rpc::Request::StandardInput(chunk)) if chunk.data.is_empty() => return,
            Some(rpc::Request::StandardInput(chunk)) => {
                if stdin.write_all(&chunk.data).await.and(stdin.flush().await).is_err() {
                    return;
                }
            }
            Some(rpc::Request::Command(_) | rpc::Request::TerminalResize(_)) | None => {}
        }
    }
    // A half-closed stream is not the end of stdin: only an empty chunk is.
    std::future::pending().await
}

async fn pump(
    out: Option<Out>,
    tell: &mpsc::Sender<Result<ExecResponse, Status>>,
    wrap: impl Fn(Chunk) -> rpc::Response,
) {
    let Some(mut out) = out else { return };
    let mut buffer = vec![0; OUTPUT_CHUNK];
    // A terminal whose last user has gone gives an error where a pipe gives its end.
    while let Ok(len @ 1..) = out.read(&mut buffer).await {
        let chunk = Chunk { data: buffer[..len].to_vec() };
        if tell.send(Ok(wrap(chunk).into())).await.is_err() {
            return;
        }
    }
}
