//! The guest agent on `control.sock`, by bytes: the contract's field numbers are spelled here a second time (contract 4.1, 4.3).

use bytes::{Buf as _, BufMut as _};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Endpoint;
use tonic::{Status, Streaming};

use super::kit::{Kit, Run};

/// Messages as the bytes that they are.
#[derive(Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let len = from.remaining();
        Ok(Some(from.copy_to_bytes(len).to_vec()))
    }
}

/// A length-delimited field.
pub(super) fn field(number: u8, content: &[u8]) -> Vec<u8> {
    assert!(content.len() < 16_384, "two bytes of length");
    let (low, high) = ((content.len() & 0x7f) as u8, (content.len() >> 7) as u8);
    let mut out = vec![number << 3 | 2];
    out.extend(if high == 0 { vec![low] } else { vec![low | 0x80, high] });
    out.extend(content);
    out
}

fn flag(number: u8) -> Vec<u8> {
    vec![number << 3, 1]
}

/// `ExecRequest{command}` for a shell, and more fields of the command.
pub(super) fn shell(script: &str, more: &[Vec<u8>]) -> Vec<u8> {
    let words = [field(1, b"/bin/sh"), field(2, b"-c"), field(2, script.as_bytes())].concat();
    field(1, &[words, more.concat()].concat())
}

fn stdin(data: &[u8]) -> Vec<u8> {
    field(2, &if data.is_empty() { Vec::new() } else { field(1, data) })
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Exit(i32),
    Out(Vec<u8>),
    Err(Vec<u8>),
}

/// `ExecResponse`, of messages below 128 bytes.
fn decode(bytes: &[u8]) -> Answer {
    let inner = &bytes[2..];
    assert_eq!(usize::from(bytes[1]), inner.len(), "{bytes:?}");
    match bytes[0] >> 3 {
        // A zero is not written; a negative number takes ten bytes.
        1 if inner.is_empty() => Answer::Exit(0),
        1 => {
            let bits = inner[1..].iter().rev().fold(0_u128, |sum, byte| sum << 7 | u128::from(byte & 0x7f));
            Answer::Exit(bits as u64 as i64 as i32)
        }
        number => {
            let data = inner.get(2..).unwrap_or_default().to_vec();
            if number == 2 { Answer::Out(data) } else { Answer::Err(data) }
        }
    }
}

pub(super) type Conversation = (mpsc::Sender<Vec<u8>>, Streaming<Vec<u8>>);

/// The driver's way: a short symlink to the directory with the socket.
async fn client(kit: &Kit, run: &Run<'_>) -> tonic::client::Grpc<tonic::transport::Channel> {
    let link = kit.scratch().join(format!("s{}", run.pid()));
    let _ = std::os::unix::fs::symlink(kit.vm_dir(&run.name), &link);
    let path = link.join("control.sock");
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://guest").connect_with_connector(connector).await.expect("a connection");
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.expect("it is ready");
    grpc
}

pub(super) async fn exec(kit: &Kit, run: &Run<'_>, first: Vec<u8>) -> Result<Conversation, Status> {
    let (send, requests) = mpsc::channel(8);
    send.send(first).await.expect("there is room");
    let path = http::uri::PathAndQuery::from_static("/Agent/Exec");
    let answer =
        client(kit, run).await.streaming(tonic::Request::new(ReceiverStream::new(requests)), path, Raw).await?;
    Ok((send, answer.into_inner()))
}

pub(super) async fn answers(mut stream: Streaming<Vec<u8>>) -> Vec<Answer> {
    let mut all = Vec::new();
    while let Some(bytes) = stream.message().await.expect("status OK") {
        all.push(decode(&bytes));
    }
    all
}

#[tokio::test]
async fn an_exit_is_explicit_and_environment_and_directory_are_honoured() {
    let kit = Kit::any();
    let run = kit.boot(&[]);
    let out = |text: &str| Answer::Out(text.as_bytes().to_vec());
    // Appendix A.
    let (_send, stream) = exec(&kit, &run, shell("printf hi; exit 3", &[])).await.unwrap();
    assert_eq!(answers(stream).await, [out("hi"), Answer::Exit(3)]);
    let variable = field(7, &[field(1, b"NAME"), field(2, b"value")].concat());
    let (_send, stream) =
        exec(&kit, &run, shell("printf \"$NAME $(pwd)\"", &[variable, field(8, b"/usr")])).await.unwrap();
    assert_eq!(answers(stream).await, [out("value /usr"), Answer::Exit(0)]);
    let (_send, stream) = exec(&kit, &run, shell("printf e >&2; kill -9 $$", &[])).await.unwrap();
    assert_eq!(answers(stream).await, [Answer::Err(b"e".to_vec()), Answer::Exit(-1)]);
    // Detached: an exit at once, and no output.
    let (_send, stream) = exec(&kit, &run, shell("touch $HOME/detached; sleep 1000", &[flag(6)])).await.unwrap();
    assert_eq!(answers(stream).await, [Answer::Exit(0)]);
    kit.wait_for("it runs on", || run.shell("test -e $HOME/detached").status.success());
    run.stop();
}

#[tokio::test]
async fn only_an_empty_chunk_ends_stdin() {
    let kit = Kit::any();
    let run = kit.boot(&[]);
    let (send, stream) = exec(&kit, &run, shell("cat; echo over", &[flag(3)])).await.unwrap();
    send.send(stdin(b"line\n")).await.unwrap();
    send.send(stdin(b"")).await.unwrap();
    let said: Vec<u8> = answers(stream)
        .await
        .into_iter()
        .filter_map(|answer| match answer {
            Answer::Out(data) => Some(data),
            Answer::Err(_) | Answer::Exit(_) => None,
        })
        .flatten()
        .collect();
    assert_eq!(said, b"line\nover\n");
    // A stream that is only half closed leaves the command waiting.
    let (send, mut stream) = exec(&kit, &run, shell("echo up; cat; echo over", &[flag(3)])).await.unwrap();
    assert_eq!(decode(&stream.message().await.unwrap().unwrap()), Answer::Out(b"up\n".to_vec()));
    drop(send);
    for _ in 0..3 {
        run.exec(&["true"]).ok();
    }
    let waits = tokio::time::timeout(std::time::Duration::ZERO, stream.message()).await;
    assert!(waits.is_err(), "{waits:?}");
    run.stop();
}

#[tokio::test]
async fn what_cannot_start_is_a_status_and_not_an_exit() {
    let kit = Kit::any();
    let run = kit.boot(&[]);
    let status = exec(&kit, &run, field(1, &field(1, b"no-such-program"))).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unknown);
    assert_eq!(status.message(), "exec: \"no-such-program\": executable file not found in $PATH");
    let status = exec(&kit, &run, shell("true", &[field(8, b"/no/such/dir")])).await.unwrap_err();
    assert!(
        status.code() == tonic::Code::Unknown && status.message().contains("no such file or directory"),
        "{status}"
    );
    let status = exec(&kit, &run, stdin(b"x")).await.unwrap_err();
    assert_ne!(status.code(), tonic::Code::Ok, "the first request must be a command");
    let path = http::uri::PathAndQuery::from_static("/Agent/ResolveIP");
    let ip = client(&kit, &run).await.unary(tonic::Request::new(Vec::new()), path, Raw).await.unwrap().into_inner();
    assert_eq!(String::from_utf8_lossy(&ip[2..]), kit.tart(&["ip", &run.name]).ok().trim());
    run.stop();
}

#[test]
fn a_terminal_merges_both_streams_and_needs_one_here() {
    let kit = Kit::any();
    let run = kit.boot(&[]);
    // 4.2: with stdout a pipe, the size of the window cannot be asked.
    let out = kit.tart(&["exec", "-t", &run.name, "true"]);
    assert!(super::kit::killed_by(&out, nix::sys::signal::Signal::SIGTRAP), "{out:?}");
    let mut script = std::process::Command::new("script");
    let exec = kit.command(&["exec", "-t", &run.name, "/bin/sh", "-c", "'tty >/dev/null && echo yes >&2; exit 4'"]);
    let words: Vec<_> =
        std::iter::once(exec.get_program()).chain(exec.get_args()).map(|word| word.to_str().unwrap()).collect();
    script.args(["-qec", &words.join(" "), "/dev/null"]);
    if kit.is_simulated() {
        script.env_clear().envs(kit.host().env());
    }
    let out = super::kit::output(script.stdin(std::process::Stdio::null()));
    assert_eq!((out.status.code(), out.stdout.trim()), (Some(4), "yes"), "{out:?}");
    run.stop();
}
