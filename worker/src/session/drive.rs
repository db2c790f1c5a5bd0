//! P: runs the core over a link: dials, performs effects, sends control frames before log frames, ends when told.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;

use alloy_shared::env::{Env, Mono};
use alloy_shared::id::{AttemptRef, Digest, Labels, WorkerId};
use alloy_shared::limits::Limits;
use alloy_shared::room::{is_full, is_short};
use alloy_shared::wire::image::ImageWish;
use alloy_shared::wire::session::{
    Assignment, BadFrame, Frame, Hello, Link, LogChunk, ToOrchestrator, ToWorker, signed_text,
};
use alloy_shared::wire::{self, ErrorCode};
use futures_util::StreamExt as _;
use futures_util::future::{BoxFuture, OptionFuture};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::records::{Recorded, Records};
use super::core::Core;
use super::{Effect, Fence, Input, Inputs, KillReason, Reason, Stop};
use crate::spool::Spool;
use crate::upstream::{DialError, Grant, Upstream};

mod records;

/// Frames sent between two looks at what came in.
const FRAMES_PER_TURN: usize = 4;
/// Inputs taken between two looks at the link.
const INPUTS_PER_TURN: usize = 64;
/// Stops that an executor may not have read: each degree comes once, and the end of the daemon.
const STOPS_MAX: usize = 4;

/// Starts an executor. It reports through [`Inputs`] and ends with `Closed`.
pub type Starter = Box<dyn Fn(Assignment, mpsc::Receiver<Stop>) -> BoxFuture<'static, ()> + Send + Sync>;
/// Takes the farm's wishes for images.
pub type Wisher = Box<dyn Fn(Vec<ImageWish>) + Send + Sync>;
/// Signs a text with the worker's key, base64.
pub type Signer = Box<dyn Fn(&str) -> String + Send + Sync>;

/// Who this worker is.
pub struct Me {
    pub worker: WorkerId,
    pub version: String,
    pub labels: Labels,
    pub sign: Signer,
}

/// What a session stands on.
pub struct Seams {
    pub env: Arc<dyn Env>,
    pub limits: Limits,
    pub upstream: Arc<dyn Upstream>,
    pub spool: Arc<Spool>,
    pub fence: Arc<Fence>,
    pub me: Me,
    pub start: Starter,
    pub wish: Wisher,
    /// Finish what is held, take nothing new.
    pub soft: CancellationToken,
    /// Let go of everything.
    pub hard: CancellationToken,
}

/// Why the session is over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Over {
    #[error("it was told to stop")]
    Stopped,
    #[error("another process uses this worker's identity; give each worker a state directory of its own")]
    Superseded,
    /// Nothing but a person changes that.
    #[error("the farm refuses this worker ({}): {message}. {}", code.as_str(), remedy(*code))]
    Refused { code: ErrorCode, message: String },
    /// What the disk says can no longer be trusted.
    #[error("the spool fails: {0}")]
    Spool(String),
}

fn remedy(code: ErrorCode) -> &'static str {
    if code == ErrorCode::UnsupportedProtocol {
        "Update the older of the two, worker and orchestrator"
    } else {
        "If it shall belong to the farm: an admin's `alloy worker invite`, then here `worker join URL TOKEN --force`"
    }
}

enum Stage {
    Serving,
    Draining {
        until: Mono,
    },
    /// Every executor was told to end.
    Ending {
        until: Mono,
        over: Over,
    },
}

struct Session {
    core: Core,
    seams: Seams,
    inputs: Inputs,
    link: Option<Link>,
    dialing: Option<BoxFuture<'static, Result<Link, DialError>>>,
    /// Control frames that wait for room. The core's own bounds and a silent link's end bound them.
    out: VecDeque<Frame>,
    stops: BTreeMap<AttemptRef, mpsc::Sender<Stop>>,
    records: Records,
    unread: Option<Unread>,
    stage: Stage,
    /// While it stops, acknowledgements of what is on disk anyway are awaited until then.
    linger: Option<Mono>,
    /// Cancelled when the session is over: uploads for it end.
    over: CancellationToken,
}

/// A slice of a log that the core counts as sent and that could not be read. Until it is, no other follows it.
struct Unread {
    attempt: AttemptRef,
    handle: u32,
    offset: u64,
    len: u32,
    again_at: Mono,
}

enum Event {
    Soft,
    Hard,
    Recorded(Recorded),
    Dialed(Result<Link, DialError>),
    Heard(Option<Frame>),
    Input(Input),
    Room,
    Tick,
}

/// Runs one worker's session until a stop, in one task. `inputs` is the other end of `door`.
pub async fn drive(core: Core, seams: Seams, door: Inputs, mut inputs: mpsc::Receiver<Input>) -> Over {
    let mut session = Session {
        core,
        seams,
        inputs: door,
        link: None,
        dialing: None,
        out: VecDeque::new(),
        stops: BTreeMap::new(),
        records: Records::default(),
        unread: None,
        stage: Stage::Serving,
        linger: None,
        over: CancellationToken::new(),
    };
    let _ends_uploads = session.over.clone().drop_guard();
    loop {
        if let Some(over) = session.step(&mut inputs).await {
            // Nobody renews a lease or takes a report any more: what still runs must not.
            session.kill_all();
            if session.core.is_up() {
                session.send(&ToOrchestrator::Goodbye { reason: over.to_string() });
                session.pump().await.ok();
            }
            return over;
        }
    }
}

impl Session {
    async fn step(&mut self, inputs: &mut mpsc::Receiver<Input>) -> Option<Over> {
        if let Err(over) = self.pump().await {
            return Some(over);
        }
        let now = self.seams.env.now().mono;
        if let Some(over) = self.ending(now) {
            return Some(over);
        }
        let event = self.wait(inputs).await;
        let done = match event {
            Event::Soft => self.stop_softly().await,
            Event::Hard => self.stop_hard(Over::Stopped).await,
            Event::Recorded(recorded) => self.recorded(recorded).await,
            Event::Dialed(result) => self.dialed(result).await,
            Event::Heard(frame) => self.heard(frame).await,
            Event::Input(input) => {
                let mut done = self.feed(input).await;
                for _ in 1..INPUTS_PER_TURN {
                    match inputs.try_recv() {
                        Ok(input) if done.is_ok() => done = self.feed(input).await,
                        Ok(_) | Err(_) => break,
                    }
                }
                done
            }
            Event::Room => Ok(()),
            Event::Tick => {
                let done = self.feed(Input::Tick).await;
                // Only an empty channel proves that an executor that is gone did not say so.
                if done.is_ok() && inputs.is_empty() { self.bury().await } else { done }
            }
        };
        done.err()
    }

    async fn wait(&mut self, inputs: &mut mpsc::Receiver<Input>) -> Event {
        let (mut until, linger) = (Mono(u64::MAX), self.linger.unwrap_or(Mono(u64::MAX)));
        let (watch_soft, watch_hard) = match &self.stage {
            Stage::Serving => (true, true),
            Stage::Draining { until: end } => {
                until = *end;
                (false, true)
            }
            Stage::Ending { until: end, .. } => {
                until = *end;
                (false, false)
            }
        };
        let log_is_due = self.log_is_due();
        let unread = self.unread.as_ref().filter(|_| !log_is_due).map_or(Mono(u64::MAX), |unread| unread.again_at);
        let wake = self.core.next_wake().min(until).min(linger).min(unread);
        let wants_room = !self.out.is_empty() || log_is_due;
        let room = self.link.as_ref().filter(|_| wants_room).map(|link| link.tx.clone());
        tokio::select! {
            biased;
            () = self.seams.hard.cancelled(), if watch_hard => Event::Hard,
            () = self.seams.soft.cancelled(), if watch_soft => Event::Soft,
            Some(recorded) = self.records.running.next() => Event::Recorded(recorded),
            Some(result) = OptionFuture::from(self.dialing.as_mut()) => Event::Dialed(result),
            Some(frame) = OptionFuture::from(self.link.as_mut().map(|link| link.rx.recv())) => Event::Heard(frame),
            Some(input) = inputs.recv() => Event::Input(input),
            Some(room) = OptionFuture::from(room.as_ref().map(mpsc::Sender::reserve)) => match room {
                Ok(_) => Event::Room,
                Err(_) => Event::Heard(None),
            },
            () = self.seams.env.sleep_until(wake) => Event::Tick,
        }
    }

    /// Gives the core one input and does what it says, until nothing follows from it.
    async fn feed(&mut self, input: Input) -> Result<(), Over> {
        let mut queue = VecDeque::from([input]);
        while let Some(input) = queue.pop_front() {
            let (now, dice) = (self.seams.env.now(), self.seams.env.dice());
            for effect in self.core.handle(input, now, dice) {
                queue.extend(self.perform(effect).await?);
            }
        }
        Ok(())
    }

    async fn perform(&mut self, effect: Effect) -> Result<Option<Input>, Over> {
        match effect {
            Effect::Dial { after_ms } => self.dial(after_ms),
            Effect::Hangup(why) => self.hang_up(why),
            Effect::Hello { nonce, slots, held, draining, trouble } => {
                let me = &self.seams.me;
                let hello = ToOrchestrator::Hello(Box::new(Hello {
                    protocol_min: *wire::PROTOCOL.start(),
                    protocol_max: *wire::PROTOCOL.end(),
                    capabilities: Vec::new(),
                    worker: me.worker,
                    boot: self.core.boot(),
                    signature: (me.sign)(&signed_text(&nonce, me.worker, self.core.boot())),
                    version: me.version.clone(),
                    labels: me.labels.clone(),
                    slots,
                    held,
                    draining,
                    trouble,
                }));
                self.send(&hello);
            }
            Effect::Send(message) => self.send(&message),
            Effect::SendLog { attempt, handle, from, len } => self.send_log(attempt, handle, from, len).await?,
            Effect::Record { attempt, seq, report } => {
                if self.core.holds(attempt) {
                    self.records.push(attempt, seq, report, &self.seams.spool);
                }
            }
            Effect::Start(assignment) => return Ok(self.start(*assignment).await),
            Effect::Release { attempt, durable } => self.release(attempt, durable).await,
            Effect::Stop { attempt, how } => self.stop(attempt, how),
            Effect::Upload { attempt, artifacts } => self.upload(attempt, artifacts),
            Effect::Forget { attempt } => self.forget(attempt),
            Effect::FenceAt(at) => self.seams.fence.set(at),
            Effect::Wish(wishes) => (self.seams.wish)(wishes),
        }
        Ok(None)
    }

    fn dial(&mut self, after_ms: u64) {
        self.link = None;
        self.out.clear();
        // In the next session the farm says where its log goes on.
        self.unread = None;
        let (env, upstream) = (self.seams.env.clone(), self.seams.upstream.clone());
        let timeout_ms = self.seams.limits.connect_timeout_ms;
        self.dialing = Some(Box::pin(async move {
            env.sleep_until(env.now().mono + after_ms).await;
            tokio::select! {
                biased;
                link = upstream.dial() => link,
                () = env.sleep_until(env.now().mono + timeout_ms) => {
                    Err(DialError::Unreachable(format!("no answer within {timeout_ms} ms")))
                }
            }
        }));
    }

    async fn dialed(&mut self, result: Result<Link, DialError>) -> Result<(), Over> {
        self.dialing = None;
        match result {
            Ok(link) => {
                tracing::info!("connected to the farm");
                self.link = Some(link);
                self.feed(Input::Linked).await
            }
            Err(DialError::Refused { code, message, retry_after_ms }) => {
                self.feed(Input::Rejected { code, message, retry_after_ms }).await
            }
            Err(error @ DialError::Unreachable(_)) => {
                tracing::warn!(%error, "cannot connect to the farm; trying again");
                self.feed(Input::Unlinked).await
            }
        }
    }

    fn hang_up(&mut self, why: Reason) {
        self.link = None;
        self.out.clear();
        self.unread = None;
        match why {
            Reason::Silent => tracing::warn!("the farm is silent; connecting anew"),
            Reason::Asked => tracing::info!("the farm is restarting; connecting again soon"),
            Reason::Rejected { code, message } => {
                tracing::error!(code = code.as_str(), "the farm rejects this worker; trying again: {message}");
            }
            Reason::Refused { code, message } => self.end(Over::Refused { code, message }),
            Reason::Garbled(what) => tracing::error!(%what, "the farm sent what is no message; connecting anew"),
            Reason::Protocol(version) => tracing::error!(version, "the farm chose a protocol that this build lacks"),
            Reason::Superseded => {
                tracing::error!("another process uses this worker's identity; stopping");
                self.end(Over::Superseded);
            }
        }
    }

    async fn heard(&mut self, frame: Option<Frame>) -> Result<(), Over> {
        let input = match frame {
            None => {
                tracing::info!("the connection to the farm is cut");
                self.link = None;
                Input::Unlinked
            }
            Some(Frame::Binary(bytes)) => Input::Garbled(format!("a binary frame of {} bytes", bytes.len())),
            Some(Frame::Text(text)) => match ToWorker::decode(&text) {
                Ok(message) => Input::Heard(message),
                Err(BadFrame::Unknown(message)) => Input::Unknown(message),
                Err(error @ (BadFrame::Chunk(_) | BadFrame::Message(_))) => Input::Garbled(error.to_string()),
            },
        };
        self.feed(input).await
    }

    fn send(&mut self, message: &ToOrchestrator) {
        if self.link.is_some() {
            self.out.push_back(message.encode());
        }
    }

    /// Sends what the link takes: control frames first, so that no heartbeat waits behind log bytes.
    async fn pump(&mut self) -> Result<(), Over> {
        for _ in 0..FRAMES_PER_TURN {
            let Some(link) = &self.link else { break };
            if link.tx.capacity() == 0 {
                break;
            }
            if let Some(frame) = self.out.pop_front() {
                // A link that is closed says so at its other channel.
                link.tx.try_send(frame).ok();
            } else if !self.log_is_due() {
                break;
            } else if let Some(Unread { attempt, handle, offset, len, .. }) = self.unread.take() {
                self.send_log(attempt, handle, offset, len).await?;
            } else {
                self.feed(Input::Room).await?;
            }
        }
        Ok(())
    }

    fn log_is_due(&self) -> bool {
        match &self.unread {
            Some(unread) => unread.again_at <= self.seams.env.now().mono,
            None => self.core.has_log(),
        }
    }

    async fn send_log(&mut self, attempt: AttemptRef, handle: u32, offset: u64, len: u32) -> Result<(), Over> {
        if !self.core.holds(attempt) {
            return Ok(());
        }
        let frame = match self.seams.spool.read(attempt, offset, len, LogChunk::HEADER).await {
            Err(error) if is_short(&error) => {
                tracing::warn!(%attempt, %error, "a log cannot be read now; trying again");
                let again_at = self.seams.env.now().mono + self.seams.limits.heartbeat_ms;
                self.unread = Some(Unread { attempt, handle, offset, len, again_at });
                return Ok(());
            }
            frame => frame.map_err(broken)?,
        };
        if let Some(link) = &self.link {
            // Only `pump` asks for log, and it has seen room; nobody else sends on this link.
            link.tx.try_send(LogChunk::finish(frame, handle, offset)).ok();
        }
        Ok(())
    }

    async fn release(&mut self, attempt: AttemptRef, durable: u64) {
        if let Err(error) = self.seams.spool.release(attempt, durable).await {
            tracing::warn!(%attempt, %error, "log bytes that are no longer needed stay in the spool until the attempt ends");
        }
    }

    async fn start(&mut self, assignment: Assignment) -> Option<Input> {
        let attempt = assignment.attempt;
        if let Err(error) = self.seams.spool.begin(&assignment).await {
            tracing::error!(%attempt, %error, "the spool cannot take an attempt; it is refused");
            return Some(Input::NotStarted { attempt, message: format!("the worker's spool fails: {error}") });
        }
        tracing::info!(%attempt, "starting");
        let (tx, rx) = mpsc::channel(STOPS_MAX);
        self.stops.insert(attempt, tx);
        self.seams.env.spawn("attempt", (self.seams.start)(assignment, rx));
        None
    }

    fn stop(&self, attempt: AttemptRef, how: Stop) {
        tracing::info!(%attempt, ?how, "stopping");
        if let Some(executor) = self.stops.get(&attempt) {
            // A closed channel: the executor is done. A full one cannot be: there are fewer stops than room.
            executor.try_send(how).ok();
        }
    }

    /// An executor that ended without a word, because it panicked, is reported as closed.
    async fn bury(&mut self) -> Result<(), Over> {
        let core = &self.core;
        self.stops.retain(|attempt, executor| !executor.is_closed() || core.runs(*attempt));
        let dead: Vec<AttemptRef> =
            self.stops.iter().filter(|(_, executor)| executor.is_closed()).map(|(attempt, _)| *attempt).collect();
        for attempt in dead {
            tracing::error!(%attempt, "an executor ended without a word");
            self.feed(Input::Closed { attempt, teardown_ms: 0 }).await?;
        }
        Ok(())
    }

    fn upload(&self, attempt: AttemptRef, artifacts: Vec<Digest>) {
        let (spool, upstream) = (self.seams.spool.clone(), self.seams.upstream.clone());
        let (inputs, over) = (self.inputs.clone(), self.over.clone());
        let task = async move {
            let complete = tokio::select! {
                biased;
                () = over.cancelled() => return,
                complete = upload(&spool, &*upstream, attempt, &artifacts) => complete,
            };
            let complete = complete.inspect_err(|error| {
                tracing::warn!(%attempt, %error, "an artifact that the farm misses cannot be sent");
            });
            inputs.send(Input::Uploaded { attempt, complete: complete.is_ok() }).await.ok();
        };
        self.seams.env.spawn("upload", Box::pin(task));
    }

    fn forget(&mut self, attempt: AttemptRef) {
        tracing::info!(%attempt, "over; its VM is gone and the farm has heard of its end");
        self.stops.remove(&attempt);
        self.records.waiting.remove(&attempt);
        let spool = self.seams.spool.clone();
        let task = async move {
            if let Err(error) = spool.remove(attempt).await {
                tracing::warn!(%attempt, %error, "a spool directory cannot be removed; the next start does it");
            }
        };
        self.seams.env.spawn("forget", Box::pin(task));
    }

    async fn recorded(&mut self, done: Recorded) -> Result<(), Over> {
        let Recorded { attempt, reports, result } = done;
        let wanted = self.core.holds(attempt);
        match result {
            Err(error) if wanted && !is_full(&error) && !is_short(&error) => Err(broken(error)),
            Err(error) if wanted => {
                tracing::warn!(%attempt, %error, "a report cannot be written down now; trying again");
                let (env, pause_ms) = (self.seams.env.clone(), self.seams.limits.heartbeat_ms);
                self.records.repeat(attempt, reports, env, pause_ms, &self.seams.spool);
                Ok(())
            }
            Ok(()) | Err(_) => {
                self.records.next(attempt, &self.seams.spool);
                match reports.last() {
                    Some((seq, _)) => self.feed(Input::Recorded { attempt, seq: *seq }).await,
                    None => Ok(()),
                }
            }
        }
    }

    async fn stop_softly(&mut self) -> Result<(), Over> {
        tracing::info!("draining: taking nothing new");
        self.stage = Stage::Draining { until: self.seams.env.now().mono + self.seams.limits.drain_ms };
        self.feed(Input::Drain).await
    }

    async fn stop_hard(&mut self, over: Over) -> Result<(), Over> {
        self.end(over);
        self.kill_all();
        self.feed(Input::Drain).await
    }

    fn kill_all(&self) {
        for executor in self.stops.values() {
            executor.try_send(Stop::Kill(KillReason::Shutdown)).ok();
        }
    }

    fn end(&mut self, over: Over) {
        self.stage = Stage::Ending { until: self.seams.env.now().mono + self.seams.limits.stop_ms, over };
    }

    /// Whether the stop is complete: nothing runs, and what is on disk is acknowledged or had its time.
    fn ending(&mut self, now: Mono) -> Option<Over> {
        let over = match &self.stage {
            Stage::Serving => return None,
            Stage::Draining { until } if now >= *until => {
                tracing::warn!("the time to drain is over: jobs are given back");
                self.seams.hard.cancel();
                return None;
            }
            Stage::Draining { .. } => Over::Stopped,
            Stage::Ending { until, over } if now >= *until => return Some(over.clone()),
            Stage::Ending { over, .. } => over.clone(),
        };
        if self.core.is_running() {
            return None;
        }
        let linger = *self.linger.get_or_insert(now + self.seams.limits.stop_ms);
        let alone = matches!(self.stage, Stage::Ending { .. }) && !self.core.is_up();
        (self.core.is_empty() || alone || now >= linger).then_some(over)
    }
}

/// Sends artifacts again that an earlier upload, or an earlier daemon, left in the spool.
async fn upload(spool: &Spool, upstream: &dyn Upstream, at: AttemptRef, artifacts: &[Digest]) -> Result<(), String> {
    let assignment = spool.assignment(at).await.map_err(|error| error.to_string())?;
    let assignment = assignment.ok_or("its assignment is gone")?;
    let grant = Grant { attempt: at, token: assignment.grant };
    for digest in artifacts {
        upstream.put(&grant, &spool.stashed(at, digest)).await.map_err(|error| format!("{digest}: {error}"))?;
    }
    Ok(())
}

fn broken(error: io::Error) -> Over {
    tracing::error!(%error, "the spool fails; stopping");
    Over::Spool(error.to_string())
}

#[cfg(test)]
mod tests;
