//! The simulated network. A line joins one site to the orchestrator. It delays, swallows one way or both, and is cut; what
//! travels on one connection arrives in order, what travels on two does not.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use alloy_shared::env::Env;
use alloy_shared::wire::session::{Frame, Link};
use futures_util::FutureExt as _;
use orchestrator::App;
use tokio::sync::{Notify, mpsc, oneshot};

use super::exec::Sim;

/// Frames that a connection holds under way: its sockets' buffers.
const FLIGHT: usize = 24;
/// What the two daemons give their sockets.
const WORKER_QUEUE: usize = 4;
const SERVER_QUEUE: usize = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Towards the orchestrator.
    Up,
    Down,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Weather {
    /// Nothing arrives that way.
    pub up_black: bool,
    pub down_black: bool,
    pub latency_ms: u64,
    /// Raised when all connections are reset.
    pub cuts: u64,
    /// The site's machine has no power: nobody sends, and nobody says that it is gone.
    pub dark: bool,
    /// Of a thousand requests, so many are answered and the answer is lost.
    pub lost_replies: u64,
}

/// One site's way to the orchestrator.
pub struct Line {
    sim: Sim,
    weather: Mutex<Weather>,
    /// Not a `watch`, which wakes its receivers in an order that is not the seed's.
    moved: Notify,
    farm: Arc<Front>,
}

/// Where the orchestrator listens, while there is one.
#[derive(Default)]
pub struct Front(Mutex<Option<Arc<App>>>);

impl Front {
    pub fn set(&self, app: Option<Arc<App>>) {
        let old = std::mem::replace(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), app);
        drop(old);
    }
    pub fn app(&self) -> Option<Arc<App>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The connection broke off; whether the other side did anything is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Broken;

impl Line {
    pub fn new(sim: Sim, farm: Arc<Front>) -> Self {
        let calm =
            Weather { up_black: false, down_black: false, latency_ms: 10, cuts: 0, dark: false, lost_replies: 0 };
        Self { sim, weather: Mutex::new(calm), moved: Notify::new(), farm }
    }

    pub fn change(&self, change: impl FnOnce(&mut Weather)) {
        change(&mut self.weather.lock().unwrap_or_else(PoisonError::into_inner));
        self.moved.notify_waiters();
    }

    fn now(&self) -> Weather {
        *self.weather.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The weather once it is so.
    async fn until(&self, is_so: impl Fn(&Weather) -> bool) -> Weather {
        loop {
            let mut moved = std::pin::pin!(self.moved.notified());
            moved.as_mut().enable();
            let now = self.now();
            if is_so(&now) {
                return now;
            }
            moved.await;
        }
    }

    /// Everything that was under way is lost, and both ends know.
    pub fn cut(&self) {
        self.change(|weather| weather.cuts += 1);
    }

    fn latency(&self) -> u64 {
        let most = self.now().latency_ms;
        self.sim.between(most / 4, most)
    }

    /// One message on its way.
    async fn travel(&self, way: Way, cuts: u64) -> Result<(), Broken> {
        self.sim.sleep(self.latency()).await;
        let open = self.until(|now| now.cuts != cuts || is_open(now, way)).await;
        if open.cuts == cuts { Ok(()) } else { Err(Broken) }
    }

    /// A request: the handler runs at the orchestrator and is dropped there if the asker goes.
    pub async fn call<T, F, R>(&self, handler: F) -> Result<T, Broken>
    where
        T: Send + 'static,
        F: FnOnce(Arc<App>) -> R + Send + 'static,
        R: Future<Output = T> + Send + 'static,
    {
        let cuts = self.now().cuts;
        self.travel(Way::Up, cuts).await?;
        let app = self.farm.app().ok_or(Broken)?;
        let (mut answer, answered) = oneshot::channel();
        let env = app.env.clone();
        env.spawn(
            "request",
            Box::pin(async move {
                tokio::select! {
                    biased;
                    () = answer.closed() => {}
                    done = handler(app) => drop(answer.send(done)),
                }
            }),
        );
        let done = answered.await.map_err(|_| Broken)?;
        let lost = self.now().lost_replies;
        if self.sim.chance(lost) {
            return Err(Broken);
        }
        self.travel(Way::Down, cuts).await?;
        Ok(done)
    }

    /// The way of one more piece of an answer that streams.
    pub async fn call_down(&self) -> Result<(), Broken> {
        let cuts = self.now().cuts;
        self.travel(Way::Down, cuts).await
    }

    /// Opens a connection; `serve` gets the far end and starts the session there.
    pub async fn connect(self: &Arc<Self>, serve: impl FnOnce(Arc<App>, Link)) -> Result<Link, Broken> {
        let cuts = self.now().cuts;
        self.travel(Way::Up, cuts).await?;
        let app = self.farm.app().ok_or(Broken)?;
        let (tx, from_worker) = mpsc::channel(WORKER_QUEUE);
        let (to_worker, rx) = mpsc::channel(WORKER_QUEUE);
        let (far_tx, from_server) = mpsc::channel(SERVER_QUEUE);
        let (to_server, far_rx) = mpsc::channel(SERVER_QUEUE);
        serve(app, Link { tx: far_tx, rx: far_rx });
        let world = self.sim.world();
        let (up, down) = (self.clone(), self.clone());
        world.spawn("wire", async move { up.pump(Way::Up, cuts, from_worker, to_server).await }.boxed());
        world.spawn("wire", async move { down.pump(Way::Down, cuts, from_server, to_worker).await }.boxed());
        self.travel(Way::Down, cuts).await?;
        Ok(Link { tx, rx })
    }

    /// Carries the frames of one direction until its sender is gone or the connection is cut.
    async fn pump(&self, way: Way, cuts: u64, mut from: mpsc::Receiver<Frame>, to: mpsc::Sender<Frame>) {
        let mut flight: VecDeque<(u64, Frame)> = VecDeque::new();
        let mut open = true;
        loop {
            let now = self.now();
            let gone = to.is_closed();
            if gone {
                // The sender hears of it on the way back.
                flight.clear();
            }
            if now.cuts != cuts || !open && flight.is_empty() {
                break;
            }
            let passes = is_open(&now, way) && !now.dark;
            let due = flight.front().map(|(at, _)| *at).filter(|_| passes);
            tokio::select! {
                biased;
                _ = self.until(|later| *later != now) => {}
                () = to.closed(), if !gone => {}
                frame = from.recv(), if open && flight.len() < FLIGHT => match frame {
                    Some(frame) => {
                        let soonest = flight.back().map_or(0, |(at, _)| *at);
                        flight.push_back((soonest.max(self.sim.now() + self.latency()), frame));
                    }
                    None => open = false,
                },
                Some(room) = arrival(&self.sim, due, &to), if due.is_some() => {
                    if let Some((_, frame)) = flight.pop_front() {
                        self.sim.note(frame_size(&frame));
                        room.send(frame);
                    }
                }
            }
        }
        // The end of a connection travels like everything else, and a machine without power does not send it.
        self.until(|now| now.cuts != cuts || is_open(now, way) && !now.dark).await;
    }
}

fn frame_size(frame: &Frame) -> usize {
    match frame {
        Frame::Text(text) => text.len(),
        Frame::Binary(bytes) => bytes.len() << 20,
    }
}

/// When the first frame is there, and its receiver has room for it.
async fn arrival<'a>(sim: &Sim, due: Option<u64>, to: &'a mpsc::Sender<Frame>) -> Option<mpsc::Permit<'a, Frame>> {
    sim.sleep(due?.saturating_sub(sim.now())).await;
    to.reserve().await.ok()
}

fn is_open(weather: &Weather, way: Way) -> bool {
    match way {
        Way::Up => !weather.up_black,
        Way::Down => !weather.down_black,
    }
}
