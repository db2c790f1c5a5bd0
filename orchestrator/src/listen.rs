//! S: the listening socket: connections with a cap and deadlines, and an orderly end.
//!
//! A head that trickles in is cut by its deadline, an answer that nobody reads by the stuck writer's; both are what keeps
//! a slow stranger from holding a connection for ever.

use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use alloy_shared::limits;
use axum::Router;
use axum::http::Request;
use bytes::{Buf as _, BytesMut};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Sleep, sleep, timeout};
use tokio_util::io::poll_read_buf;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use crate::routes::extract::Peer;

/// An accept that fails (no file descriptors left) is tried again after this.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `stop`, then lets open requests end for `grace_ms`.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    tracker: TaskTracker,
    stop: CancellationToken,
    grace_ms: u64,
) {
    let room = Arc::new(Semaphore::new(limits::CONNECTIONS_MAX));
    let open = GracefulShutdown::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = accept(&listener, &room) => accepted,
        };
        let (stream, peer, permit) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let service = router.clone().map_request(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(Peer(peer));
            request
        });
        let mut builder = auto::Builder::new(TokioExecutor::new());
        let head = Duration::from_millis(limits::HEAD_READ_MS);
        builder.http1().timer(TokioTimer::new()).header_read_timeout(head);
        builder.http2().timer(TokioTimer::new()).keep_alive_interval(head).max_concurrent_streams(256);
        let connection = builder
            .serve_connection_with_upgrades(TokioIo::new(Stuck::new(stream, head)), TowerToHyperService::new(service))
            .into_owned();
        let connection = open.watch(connection);
        // The tracker knows each; a connection that breaks is its peer's affair.
        tracker.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("a connection from {peer} ended: {error}");
            }
            drop(permit);
        });
    }
    drop(listener);
    if timeout(Duration::from_millis(grace_ms), open.shutdown()).await.is_err() {
        tracing::warn!("requests still ran {grace_ms} ms after the stop and are cut");
    }
}

async fn accept(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
) -> io::Result<(TcpStream, IpAddr, tokio::sync::OwnedSemaphorePermit)> {
    let permit = room.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (stream, address) = listener.accept().await?;
    stream.set_nodelay(true)?;
    Ok((stream, address.ip(), permit))
}

/// A stream whose peer must take bytes now and then: a write without progress for `FOLLOWER_STUCK_MS` fails. It reads ahead
/// for a reader with a small buffer, a worker's socket: a frame of log else costs sixteen calls to the system.
struct Stuck {
    stream: TcpStream,
    /// Set while a write waits.
    until: Option<Pin<Box<Sleep>>>,
    opening: Option<Opening>,
    ahead: Ahead,
}

/// What every connection of HTTP/2 begins with: RFC 9113, section 3.4.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Before it is known which HTTP a connection speaks nobody else looks at the clock.
struct Opening {
    until: Pin<Box<Sleep>>,
    /// Bytes of the preface that came.
    matched: usize,
}

impl Opening {
    fn is_over(&mut self, news: &[u8]) -> bool {
        let same = news.iter().zip(&PREFACE[self.matched..]).take_while(|(said, preface)| said == preface).count();
        self.matched += same;
        same < news.len() || self.matched == PREFACE.len()
    }
}

/// Bytes that were read before they were asked for. Holds memory while they keep coming, until the next small read.
#[derive(Default)]
struct Ahead {
    /// The last small buffer was filled whole: more lies behind.
    wanted: bool,
    bytes: BytesMut,
}

impl Ahead {
    fn hand_out(&mut self, buf: &mut ReadBuf<'_>) {
        let len = buf.remaining().min(self.bytes.len());
        buf.put_slice(&self.bytes[..len]);
        self.bytes.advance(len);
    }
}

impl Stuck {
    /// Closes a connection that does not say which HTTP it speaks `within` this time.
    fn new(stream: TcpStream, within: Duration) -> Self {
        let opening = Some(Opening { until: Box::pin(sleep(within)), matched: 0 });
        Self { stream, until: None, opening, ahead: Ahead::default() }
    }

    fn watch<T>(&mut self, cx: &mut Context<'_>, done: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if done.is_ready() {
            self.until = None;
            return done;
        }
        let wait = Duration::from_millis(limits::FOLLOWER_STUCK_MS);
        let until = self.until.get_or_insert_with(|| Box::pin(sleep(wait)));
        ready!(until.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the peer does not read")))
    }
}

impl AsyncRead for Stuck {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { stream, ahead, opening, .. } = &mut *self;
        if let Some(open) = opening {
            let before = buf.filled().len();
            let Poll::Ready(read) = Pin::new(stream).poll_read(cx, buf) else {
                ready!(open.until.as_mut().poll(cx));
                return Poll::Ready(Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "the peer does not say what it wants",
                )));
            };
            if open.is_over(&buf.filled()[before..]) {
                *opening = None;
            }
            return Poll::Ready(read);
        }
        let room = buf.remaining();
        if ahead.bytes.is_empty() {
            if !ahead.wanted || room > limits::SOCKET_BUFFER {
                let before = buf.filled().len();
                ready!(Pin::new(stream).poll_read(cx, buf))?;
                ahead.wanted = room <= limits::SOCKET_BUFFER && buf.filled().len() - before == room;
                if !ahead.wanted {
                    ahead.bytes = BytesMut::new();
                }
                return Poll::Ready(Ok(()));
            }
            ahead.bytes.reserve(limits::LOG_CHUNK_MAX);
            let read = poll_read_buf(Pin::new(stream), cx, &mut ahead.bytes);
            ahead.wanted = read.is_ready();
            ready!(read)?;
        }
        ahead.hand_out(buf);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stuck {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.watch(cx, done)
    }
    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.watch(cx, done)
    }
    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use axum::extract::State;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::sync::{mpsc, oneshot};

    use super::*;

    #[tokio::test]
    async fn a_reader_with_a_small_buffer_is_read_ahead_for_until_it_reads_little() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut stuck = Stuck::new(listener.accept().await.unwrap().0, Duration::from_secs(60));
        let sent: Vec<u8> = (0..300_000u32).map(|n| (n / 7) as u8).collect();
        let mut read_ahead = 0;
        for _ in 0..2 {
            let (mut got, mut small) = (Vec::new(), [0; 4096]);
            let reading = async {
                while got.len() < sent.len() {
                    let len = stuck.read(&mut small).await.unwrap();
                    got.extend_from_slice(&small[..len]);
                    read_ahead += stuck.ahead.bytes.len();
                }
            };
            let (written, ()) = tokio::join!(peer.write_all(&sent), reading);
            written.unwrap();
            assert!(got == sent && read_ahead > 0);
            assert!(timeout(Duration::ZERO, stuck.read(&mut small)).await.is_err());
            peer.write_all(b"heartbeat").await.unwrap();
            assert_eq!(stuck.read(&mut small).await.unwrap(), 9);
            assert_eq!(stuck.ahead.bytes.capacity(), 0);
        }
        drop(peer);
        assert_eq!(stuck.read(&mut [0; 10]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_peer_that_does_not_say_which_http_it_speaks_is_not_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let within = Duration::from_millis(20);
        for (said, is_left) in [("", true), ("PRI * HTTP/2.0\r\n", true), ("P", true), ("PO", false), ("G", false)] {
            let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            peer.write_all(said.as_bytes()).await.unwrap();
            let mut stuck = Stuck::new(listener.accept().await.unwrap().0, within);
            let mut got = vec![0; said.len()];
            stuck.read_exact(&mut got).await.unwrap();
            match timeout(10 * within, stuck.read(&mut [0; 100])).await {
                Ok(read) => assert!(is_left && read.unwrap_err().kind() == io::ErrorKind::TimedOut, "{said}"),
                Err(_waits) => assert!(!is_left, "{said}"),
            }
        }
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        peer.write_all(PREFACE).await.unwrap();
        let mut stuck = Stuck::new(listener.accept().await.unwrap().0, within);
        stuck.read_exact(&mut [0; 24]).await.unwrap();
        assert!(timeout(10 * within, stuck.read(&mut [0; 100])).await.is_err(), "its pings see to the rest");
    }

    struct Server {
        addr: SocketAddr,
        stop: CancellationToken,
        tracker: TaskTracker,
        ended: oneshot::Receiver<()>,
    }

    async fn start(router: Router, grace_ms: u64) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (stop, tracker) = (CancellationToken::new(), TaskTracker::new());
        let (end, ended) = oneshot::channel();
        let serving = serve(listener, router, tracker.clone(), stop.clone(), grace_ms);
        tracker.spawn(async move {
            serving.await;
            end.send(()).unwrap();
        });
        Server { addr, stop, tracker, ended }
    }

    async fn send(addr: SocketAddr, path: &str) -> TcpStream {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
        stream
    }

    #[tokio::test]
    async fn a_stop_lets_an_open_request_end_and_takes_no_new_one() {
        let (arrived, mut arrivals) = mpsc::channel::<oneshot::Sender<String>>(4);
        let handler = async |State(arrived): State<mpsc::Sender<oneshot::Sender<String>>>, PeerOf(peer): PeerOf| {
            let (answer, wait) = oneshot::channel();
            arrived.send(answer).await.unwrap();
            format!("{} to {}", wait.await.unwrap(), peer.0)
        };
        let server = start(Router::new().route("/", get(handler)).with_state(arrived), 60_000).await;
        let mut client = send(server.addr, "/").await;
        let answer = arrivals.recv().await.unwrap();
        server.stop.cancel();
        // The listener is gone once a connection to it fails.
        while TcpStream::connect(server.addr).await.is_ok() {
            tokio::task::yield_now().await;
        }
        answer.send("late".to_owned()).unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 200") && text.ends_with("late to 127.0.0.1"), "{text}");
        server.ended.await.unwrap();
        server.tracker.close();
        server.tracker.wait().await;
    }

    #[tokio::test]
    async fn a_request_that_never_ends_does_not_hold_up_the_stop() {
        let (arrived, mut arrivals) = mpsc::channel::<()>(1);
        let handler = async |State(arrived): State<mpsc::Sender<()>>| {
            arrived.send(()).await.unwrap();
            std::future::pending::<()>().await;
        };
        let server = start(Router::new().route("/", get(handler)).with_state(arrived), 1).await;
        let _client = send(server.addr, "/").await;
        arrivals.recv().await.unwrap();
        server.stop.cancel();
        server.ended.await.unwrap();
    }

    impl<S: Send + Sync> axum::extract::FromRequestParts<S> for PeerOf {
        type Rejection = std::convert::Infallible;
        async fn from_request_parts(parts: &mut axum::http::request::Parts, _: &S) -> Result<Self, Self::Rejection> {
            Ok(Self(Peer::of(parts, false)))
        }
    }

    struct PeerOf(Peer);
}
