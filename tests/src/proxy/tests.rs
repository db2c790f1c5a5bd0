//! The proxy against a server that echoes.

use super::*;
use crate::observe::{PATIENCE, until};

struct Echo {
    address: SocketAddr,
    heard: Arc<AtomicU64>,
    closed: Arc<AtomicU64>,
    _tasks: JoinSet<()>,
}

async fn echo() -> Echo {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (heard, closed, mut tasks) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)), JoinSet::new());
    let (counter, ends) = (Arc::clone(&heard), Arc::clone(&closed));
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut socket, _)) = listener.accept().await {
            let (counter, ends) = (Arc::clone(&counter), Arc::clone(&ends));
            connections.spawn(async move {
                let mut buffer = [0; 1024];
                while let Ok(n @ 1..) = socket.read(&mut buffer).await {
                    counter.fetch_add(n as u64, Ordering::SeqCst);
                    if socket.write_all(&buffer[..n]).await.is_err() {
                        return;
                    }
                }
                ends.fetch_add(1, Ordering::SeqCst);
            });
        }
    });
    Echo { address, heard, closed, _tasks: tasks }
}

async fn counted(what: &str, counter: &AtomicU64, number: u64) {
    until(&format!("the server has {what} {number}"), async || {
        Ok((counter.load(Ordering::SeqCst) == number).then_some(()))
    })
    .await;
}

async fn read_exactly(socket: &mut TcpStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    tokio::time::timeout(PATIENCE, socket.read_exact(&mut bytes)).await.unwrap().unwrap();
    bytes
}

/// True if nothing can be read at this moment, and nothing is over.
fn is_silent(socket: &TcpStream) -> bool {
    let mut byte = [0; 1];
    socket.try_read(&mut byte).is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
}

async fn ends(socket: &mut TcpStream) -> Vec<u8> {
    let mut rest = Vec::new();
    // A reset is an end too.
    let _reset = tokio::time::timeout(PATIENCE, socket.read_to_end(&mut rest)).await.unwrap();
    rest
}

#[tokio::test]
async fn a_direction_that_is_held_gives_all_of_it_when_it_is_healed() {
    for way in [Way::Up, Way::Down] {
        let echo = echo().await;
        let proxy = Proxy::open(echo.address).await.unwrap();
        let mut old = TcpStream::connect(proxy.address).await.unwrap();
        old.write_all(b"before").await.unwrap();
        assert_eq!(read_exactly(&mut old, 6).await, b"before");
        proxy.hold(way, Which::All);
        let mut new = TcpStream::connect(proxy.address).await.unwrap();
        old.write_all(b"held").await.unwrap();
        new.write_all(b"new").await.unwrap();
        counted("heard", &echo.heard, if way == Way::Up { 6 } else { 13 }).await;
        let held = if way == Way::Up { Kept { up: 7, ..Kept::default() } } else { Kept { down: 7, ..Kept::default() } };
        until("what is held is counted", async || Ok((proxy.kept() == held).then_some(()))).await;
        assert!(is_silent(&old) && is_silent(&new));
        proxy.heal();
        assert_eq!((read_exactly(&mut old, 4).await, read_exactly(&mut new, 3).await), (b"held".into(), b"new".into()));
    }
}

#[tokio::test]
async fn only_sessions_are_held_if_only_they_are_meant() {
    let echo = echo().await;
    let proxy = Proxy::open(echo.address).await.unwrap();
    let mut session = TcpStream::connect(proxy.address).await.unwrap();
    session.write_all(b"GET /v1/worker/connect").await.unwrap();
    read_exactly(&mut session, 22).await;
    proxy.hold(Way::Down, Which::Sessions);
    let mut bulk = TcpStream::connect(proxy.address).await.unwrap();
    session.write_all(b"x").await.unwrap();
    bulk.write_all(b"GET /v1/x").await.unwrap();
    assert_eq!(read_exactly(&mut bulk, 9).await, b"GET /v1/x");
    assert!(is_silent(&session));
}

#[tokio::test]
async fn a_trap_holds_the_reply_or_the_body_or_drops_the_reply_of_what_it_was_set_for() {
    let echo = echo().await;
    let proxy = Proxy::open(echo.address).await.unwrap();

    let mut reply = proxy.trap(Way::Up, "POST /jobs ", 1, Then::HoldReply);
    let mut client = TcpStream::connect(proxy.address).await.unwrap();
    // The words come in two parts, behind others.
    client.write_all(b"GET / POST /jo").await.unwrap();
    read_exactly(&mut client, 14).await;
    client.write_all(b"bs body").await.unwrap();
    reply.wait_for(|sprung| sprung.answered == 1).await.unwrap();
    assert_eq!(reply.borrow().seen, 1);
    assert!(is_silent(&client));
    proxy.break_all();
    assert_eq!(ends(&mut client).await, b"", "what was held is lost");
    proxy.heal();

    echo.heard.store(0, Ordering::SeqCst);
    let mut body = proxy.trap(Way::Up, "PUT /a ", 1, Then::HoldBody(2));
    let mut client = TcpStream::connect(proxy.address).await.unwrap();
    client.write_all(b"PUT /a 12345").await.unwrap();
    body.wait_for(|sprung| sprung.seen == 1).await.unwrap();
    counted("heard", &echo.heard, 9).await;
    proxy.heal();
    assert_eq!(read_exactly(&mut client, 12).await, b"PUT /a 12345");
    // The same connection again.
    let mut again = proxy.trap(Way::Up, "PUT /b ", 1, Then::HoldReply);
    client.write_all(b"PUT /b ").await.unwrap();
    again.wait_for(|sprung| sprung.answered == 1).await.unwrap();
    assert!(is_silent(&client));
    proxy.heal();
    assert_eq!(read_exactly(&mut client, 7).await, b"PUT /b ");

    echo.heard.store(0, Ordering::SeqCst);
    let unheard = proxy.trap(Way::Up, "POST /jobs ", 1, Then::DropRequest);
    let mut dropped = proxy.trap(Way::Up, "POST /jobs ", 1, Then::DropReply);
    for (expected, heard) in [("", 0), ("", 11), ("POST /jobs ", 22)] {
        let mut client = TcpStream::connect(proxy.address).await.unwrap();
        client.write_all(b"POST /jobs ").await.unwrap();
        client.shutdown().await.unwrap();
        assert_eq!(ends(&mut client).await, expected.as_bytes());
        assert_eq!(echo.heard.load(Ordering::SeqCst), heard);
    }
    assert_eq!(unheard.borrow().seen, 1);
    assert_eq!(dropped.wait_for(|sprung| sprung.answered == 1).await.unwrap().seen, 1);
}

#[tokio::test]
async fn a_connection_that_is_half_open_is_closed_for_the_server_only() {
    let echo = echo().await;
    let proxy = Proxy::open(echo.address).await.unwrap();
    let mut client = TcpStream::connect(proxy.address).await.unwrap();
    client.write_all(b"x").await.unwrap();
    read_exactly(&mut client, 1).await;
    proxy.leave_half_open();
    counted("closed", &echo.closed, 1).await;
    client.write_all(b"swallowed").await.unwrap();
    until("what came is counted", async || Ok((proxy.kept().swallowed == 9).then_some(()))).await;
    assert!(is_silent(&client));
    let mut new = TcpStream::connect(proxy.address).await.unwrap();
    new.write_all(b"new").await.unwrap();
    assert_eq!(read_exactly(&mut new, 3).await, b"new");
}
