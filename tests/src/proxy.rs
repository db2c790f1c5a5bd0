//! A TCP proxy that does to connections what networks do, by order of a test or by seed: it holds one direction or both,
//! leaves a connection half open, delays, cuts after a number of bytes, and drops the reply to a request that it passed on.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::chaos::pause;
use crate::noise::mix;

pub struct Proxy {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

/// The first `cuts` connections that carry enough are cut after a number of answer bytes between `least` and `most`.
#[derive(Debug, Clone, Copy)]
pub struct Cuts {
    pub seed: u64,
    pub cuts: u64,
    pub least: u64,
    pub most: u64,
}

/// From the client to the farm, or back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Up,
    Down,
}

/// Which connections an order is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    All,
    /// The WebSocket of a worker, and no transfer of bytes.
    Sessions,
}

/// What becomes of a connection on which the words of a trap were seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// Only counted.
    Note,
    /// The request goes on, its answer stays here.
    HoldReply,
    /// So many bytes behind the words go on, and no more.
    HoldBody(usize),
    /// The connection breaks before the farm has the request.
    DropRequest,
    /// The request goes on; when the answer comes, the connection breaks instead.
    DropReply,
}

/// Bytes that it kept from those for whom they were.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Kept {
    /// Held on the way to the farm, at least for a moment.
    pub up: u64,
    /// The same on the way back.
    pub down: u64,
    /// Taken from a client whose connection is half open.
    pub swallowed: u64,
}

struct Trap {
    way: Way,
    words: Vec<u8>,
    then: Then,
    /// How often it still strikes.
    left: u64,
    told: watch::Sender<Sprung>,
}

/// How often a trap was seen to strike, and how often the farm has answered what it holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sprung {
    pub seen: u64,
    pub answered: u64,
}

#[derive(Default)]
struct Orders {
    held: Vec<(Way, Which)>,
    delay: Duration,
    traps: Vec<Trap>,
    /// How often the network was healed.
    heals: u64,
}

struct Shared {
    upstream: SocketAddr,
    plan: Option<Cuts>,
    cut: AtomicU64,
    accepted: AtomicU64,
    kept: Mutex<Kept>,
    orders: Mutex<Orders>,
    /// Says that orders changed.
    moved: watch::Sender<u64>,
    /// Connections up to this number are broken, and left half open.
    broken: watch::Sender<u64>,
    halved: watch::Sender<u64>,
}

impl Proxy {
    /// One that cuts by seed.
    pub async fn start(upstream: SocketAddr, plan: Cuts) -> Result<Proxy> {
        Proxy::with(upstream, Some(plan)).await
    }

    /// One that does nothing until it is told.
    pub async fn open(upstream: SocketAddr) -> Result<Proxy> {
        Proxy::with(upstream, None).await
    }

    async fn with(upstream: SocketAddr, plan: Option<Cuts>) -> Result<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            upstream,
            plan,
            cut: AtomicU64::new(0),
            accepted: AtomicU64::new(0),
            kept: Mutex::default(),
            orders: Mutex::default(),
            moved: watch::Sender::new(0),
            broken: watch::Sender::new(0),
            halved: watch::Sender::new(0),
        });
        let mut tasks = JoinSet::new();
        let accepting = Arc::clone(&shared);
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let number = accepting.accepted.fetch_add(1, Ordering::SeqCst) + 1;
                connections.spawn(carry(client, Arc::clone(&accepting), number));
                while connections.try_join_next().is_some() {}
            }
        });
        Ok(Proxy { address, shared, _tasks: tasks })
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Connections cut by plan so far.
    pub fn cuts_made(&self) -> u64 {
        self.shared.cut.load(Ordering::SeqCst)
    }

    /// What it kept from others so far.
    pub fn kept(&self) -> Kept {
        *self.shared.kept()
    }

    /// Lets nothing through in this direction, on connections that are there and on those to come. What was sent waits.
    pub fn hold(&self, way: Way, which: Which) {
        self.shared.order(|orders| orders.held.push((way, which)));
    }

    pub fn delay(&self, by: Duration) {
        self.shared.order(|orders| orders.delay = by);
    }

    /// Waits for words in one direction and strikes the first `times` connections that carry them.
    pub fn trap(&self, way: Way, words: &str, times: u64, then: Then) -> watch::Receiver<Sprung> {
        let told = watch::Sender::new(Sprung::default());
        let heard = told.subscribe();
        let trap = Trap { way, words: words.as_bytes().to_vec(), then, left: times, told };
        self.shared.order(|orders| orders.traps.push(trap));
        heard
    }

    /// Breaks every connection that is there. What was held on them is lost.
    pub fn break_all(&self) {
        self.shared.broken.send_replace(self.shared.accepted.load(Ordering::SeqCst));
    }

    /// The farm's end of every connection that is there is closed; the other end is left open and hears nothing of it.
    pub fn leave_half_open(&self) {
        self.shared.halved.send_replace(self.shared.accepted.load(Ordering::SeqCst));
    }

    /// The network is well again: held bytes go on, no trap is left.
    pub fn heal(&self) {
        self.shared.order(|orders| *orders = Orders { heals: orders.heals + 1, ..Orders::default() });
    }
}

impl Shared {
    fn orders(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, change: impl FnOnce(&mut Orders)) {
        change(&mut self.orders());
        self.moved.send_modify(|number| *number += 1);
    }
}

/// One connection, as both directions see it.
struct Line {
    shared: Arc<Shared>,
    number: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    is_session: bool,
    /// Held by a trap since so many heals.
    held: Vec<(Way, u64)>,
    drops_reply: bool,
    /// Who wants to know of an answer.
    asks: Option<watch::Sender<Sprung>>,
    /// Answer bytes before the planned cut.
    left: u64,
}

/// What to do with bytes that were read.
enum Verdict {
    Pass,
    /// So many of them, then wait.
    Part(usize),
    Break,
}

impl Line {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn judge(&self, way: Way, tail: &[u8], bytes: &[u8]) -> Verdict {
        let mut state = self.state();
        if way == Way::Down {
            if let Some(asks) = state.asks.take() {
                asks.send_modify(|sprung| sprung.answered += 1);
            }
            if state.drops_reply {
                return Verdict::Break;
            }
        }
        let all = [tail, bytes].concat();
        state.is_session |= way == Way::Up && find(&all, b"/v1/worker/connect").is_some();
        let mut verdict = Verdict::Pass;
        let mut orders = self.shared.orders();
        let heals = orders.heals;
        for trap in orders.traps.iter_mut().filter(|trap| trap.way == way) {
            // What stands wholly in the tail was judged before.
            let fresh = tail.len().saturating_sub(trap.words.len() - 1);
            if trap.left == 0 {
                continue;
            }
            let Some(end) = find(&all[fresh..], &trap.words).map(|at| fresh + at + trap.words.len()) else { continue };
            trap.left -= 1;
            match trap.then {
                Then::Note => {}
                Then::DropRequest => verdict = Verdict::Break,
                Then::HoldReply => {
                    state.held.push((Way::Down, heals));
                    state.asks = Some(trap.told.clone());
                }
                Then::HoldBody(more) => {
                    state.held.push((way, heals));
                    verdict = Verdict::Part(end.saturating_add(more).saturating_sub(tail.len()).min(bytes.len()));
                }
                Then::DropReply => {
                    state.drops_reply = true;
                    state.asks = Some(trap.told.clone());
                }
            }
            trap.told.send_modify(|sprung| sprung.seen += 1);
            // Of several traps for the same words each one has connections of its own.
            break;
        }
        verdict
    }

    fn is_held(&self, way: Way) -> bool {
        let state = self.state();
        let orders = self.shared.orders();
        let ordered = |(held, which): &(Way, Which)| *held == way && (*which == Which::All || state.is_session);
        orders.held.iter().any(ordered) || state.held.contains(&(way, orders.heals))
    }

    /// Returns when this direction is open.
    async fn gate(&self, way: Way) {
        let mut moved = self.shared.moved.subscribe();
        while self.is_held(way) {
            if moved.changed().await.is_err() {
                return;
            }
        }
    }

    /// Carries one direction to its end. True if the other direction may go on.
    async fn pump(&self, way: Way, mut from: OwnedReadHalf, to: &mut Option<OwnedWriteHalf>) -> bool {
        let mut buffer = vec![0; 64 << 10];
        let mut tail = Vec::new();
        let mut halved = self.shared.halved.subscribe();
        loop {
            let read = tokio::select! {
                biased;
                () = reached(&mut halved, self.number) => return self.half_open(way, from, to).await,
                read = from.read(&mut buffer) => read,
            };
            let Ok(n @ 1..) = read else {
                self.gate(way).await;
                if let Some(to) = to {
                    let _peer_is_gone = to.shutdown().await;
                }
                return read.is_ok();
            };
            let bytes = &buffer[..n];
            let first = match self.judge(way, &tail, bytes) {
                Verdict::Break => return false,
                Verdict::Pass => 0,
                Verdict::Part(first) => first,
            };
            tail.extend_from_slice(&bytes[n - n.min(128)..]);
            tail.drain(..tail.len().saturating_sub(128));
            let Some(to) = to.as_mut() else { continue };
            if first > 0 && to.write_all(&bytes[..first]).await.is_err() {
                return false;
            }
            let delay = self.shared.orders().delay;
            if !delay.is_zero() {
                pause(delay).await;
            }
            if self.is_held(way) {
                let mut kept = self.shared.kept();
                let held = match way {
                    Way::Up => &mut kept.up,
                    Way::Down => &mut kept.down,
                };
                *held += (n - first) as u64;
            }
            self.gate(way).await;
            let (send, cut) = self.planned(way, n - first);
            if to.write_all(&bytes[first..first + send]).await.is_err() || cut {
                return false;
            }
        }
    }

    /// Lets go of the farm's end and keeps the client's: what comes from it is swallowed.
    async fn half_open(&self, way: Way, mut from: OwnedReadHalf, to: &mut Option<OwnedWriteHalf>) -> bool {
        match way {
            Way::Up => {
                *to = None;
                let mut sink = [0; 4096];
                while let Ok(n @ 1..) = from.read(&mut sink).await {
                    self.shared.kept().swallowed += n as u64;
                }
                false
            }
            Way::Down => {
                drop(from);
                true
            }
        }
    }

    /// How much of an answer the plan lets through, and whether it cuts there.
    fn planned(&self, way: Way, n: usize) -> (usize, bool) {
        let (Some(plan), Way::Down) = (self.shared.plan, way) else { return (n, false) };
        if self.shared.cut.load(Ordering::SeqCst) >= plan.cuts {
            return (n, false);
        }
        let mut state = self.state();
        let send = n.min(usize::try_from(state.left).unwrap_or(n));
        state.left -= send as u64;
        if state.left == 0 {
            self.shared.cut.fetch_add(1, Ordering::SeqCst);
        }
        (send, state.left == 0)
    }
}

async fn carry(client: TcpStream, shared: Arc<Shared>, number: u64) {
    let Ok(server) = TcpStream::connect(shared.upstream).await else { return };
    // What waits here waits by order of a test.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let dice = shared.plan.map_or(0, |plan| mix(plan.seed ^ mix(number)));
    let left = shared.plan.map_or(0, |plan| (plan.least + dice % (plan.most - plan.least).max(1)).max(1));
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let (mut to_client, mut to_server) = (Some(to_client), Some(to_server));
    let mut broken = shared.broken.subscribe();
    let line = Line { shared, number, state: Mutex::new(State { left, ..State::default() }) };
    let both = async {
        let mut up = std::pin::pin!(line.pump(Way::Up, from_client, &mut to_server));
        let mut down = std::pin::pin!(line.pump(Way::Down, from_server, &mut to_client));
        tokio::select! {
            biased;
            goes_on = &mut up => if goes_on { down.await } else { false },
            goes_on = &mut down => if goes_on { up.await } else { false },
        }
    };
    let whole = tokio::select! {
        biased;
        () = reached(&mut broken, number) => false,
        whole = both => whole,
    };
    if let (false, true, Some(client)) = (whole, dice & (1 << 40) != 0, &to_client) {
        // An immediate reset instead of an orderly end.
        let _closed_already = client.as_ref().set_zero_linger();
    }
}

/// Returns when the number is this or more; never if nobody can say so any more.
async fn reached(number: &mut watch::Receiver<u64>, this: u64) {
    if number.wait_for(|number| *number >= this).await.is_err() {
        std::future::pending().await
    }
}

fn find(hay: &[u8], needle: &[u8]) -> Option<usize> {
    let first = *needle.first()?;
    let starts = hay.iter().enumerate().filter(|(_, byte)| **byte == first).map(|(at, _)| at);
    starts.into_iter().find(|at| hay[*at..].starts_with(needle))
}

#[cfg(test)]
mod tests;
