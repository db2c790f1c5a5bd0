//! D: one worker's session, from challenge to hang-up. It knows what the orchestrator wants of each attempt and what the
//! worker says it has, and sends the difference. No acknowledgement before the disk has it.

use std::collections::BTreeMap;
use std::sync::Arc;

use alloy_shared::env::{Mono, Now};
use alloy_shared::id::{AttemptRef, JobId, Labels, WorkerId};
use alloy_shared::limits::{self, Limits};
use alloy_shared::wire::image::Inventory;
use alloy_shared::wire::session::{
    Held, HeldState, Hello, LogChunk, Order, Report, SlotView, ToOrchestrator, ToWorker, Welcome,
};
use alloy_shared::wire::{ErrorCode, PROTOCOL};

use super::io::{Effect, Input, NotStored, Settled};
use super::reconcile::{Say, Want, reconcile};
use super::track::{Settling, Taking, Track};
use crate::store::Job;

/// Attempts that one session keeps in mind: those that its worker may hold, and as many that it no longer does.
const TRACKS_MAX: usize = 2 * limits::HELD_MAX;
/// Of all reports in one session that are not decided: more than a job with the most artifacts, of the longest names, has to say.
const WAITING_BYTES_MAX: usize = 64 << 20;

#[derive(Debug, Clone)]
enum Phase {
    Fresh,
    Challenged { since: Mono },
    Opening { hello: Box<Hello> },
    Open,
    Closed,
}

#[derive(Debug, Clone)]
pub struct Core {
    worker: WorkerId,
    nonce: String,
    limits: Limits,
    phase: Phase,
    jobs: BTreeMap<JobId, Job>,
    tracks: BTreeMap<AttemptRef, Track>,
    handles: BTreeMap<u32, AttemptRef>,
    next_handle: u32,
    acked: u64,
    heard_at: Mono,
    labels: Labels,
    slots: Vec<SlotView>,
    images: Arc<Inventory>,
    worker_draining: bool,
    trouble: Option<String>,
    /// What the operator last said in this session.
    operator_draining: Option<bool>,
}

impl Core {
    pub fn new(worker: WorkerId, nonce: String, limits: Limits, now: Now) -> Self {
        Self {
            worker,
            nonce,
            limits,
            phase: Phase::Fresh,
            jobs: BTreeMap::new(),
            tracks: BTreeMap::new(),
            handles: BTreeMap::new(),
            next_handle: 1,
            acked: 0,
            heard_at: now.mono,
            labels: Labels::default(),
            slots: Vec::new(),
            images: Arc::default(),
            worker_draining: false,
            trouble: None,
            operator_draining: None,
        }
    }

    /// How many attempts it keeps in mind.
    #[cfg(test)]
    pub fn known(&self) -> usize {
        self.tracks.len() + self.handles.len() + self.jobs.len()
    }

    /// When the session must be looked at although nothing arrived.
    pub fn next_wake(&self) -> Mono {
        match self.phase {
            Phase::Fresh => self.heard_at,
            Phase::Challenged { since } => since + self.limits.accept_ms,
            Phase::Opening { .. } | Phase::Open | Phase::Closed => self.heard_at + self.limits.link_silent_ms,
        }
    }

    pub fn handle(&mut self, input: Input, now: Now) -> Vec<Effect> {
        let mut out = Vec::new();
        match input {
            Input::Heard(message) => {
                self.heard_at = now.mono;
                self.heard(message, &mut out);
            }
            Input::HeardLog(chunk) => {
                self.heard_at = now.mono;
                self.heard_log(chunk, &mut out);
            }
            Input::Opened { epoch, jobs, draining } => self.opened(epoch, jobs, draining, &mut out),
            Input::Refused { code, message, retry_after_ms } => {
                // An open session is refused when its worker was revoked: that one does not come back.
                out.extend(matches!(self.phase, Phase::Open).then_some(Effect::Left));
                out.push(Effect::Send(ToWorker::Reject { code, message, retry_after_ms }));
                self.hang_up("refused", &mut out);
            }
            Input::Job(job) => self.job(job, &mut out),
            Input::Settled { attempt, seq, result } => self.settled(attempt, seq, result, &mut out),
            Input::Appended { attempt, result } => self.appended(attempt, result, &mut out),
            Input::Durable { attempt, len } => out.push(Effect::Send(ToWorker::LogAck { attempt, durable: len })),
            Input::Measured { attempt, len } => self.continue_from(attempt, len, &mut out),
            Input::NotMeasured { attempt } => self.continue_later(&attempt),
            Input::Superseded => {
                out.push(Effect::Send(ToWorker::Superseded));
                self.hang_up("superseded by a newer session", &mut out);
            }
            Input::Drain { on } if self.operator_draining == Some(on) => {}
            Input::Drain { on } => {
                self.operator_draining = Some(on);
                if matches!(self.phase, Phase::Open) {
                    out.push(Effect::Send(ToWorker::Drain { on }));
                    self.offer(&mut out);
                }
            }
            Input::Wishes => out.extend(matches!(self.phase, Phase::Open).then_some(Effect::Wish)),
            Input::Stop { after_ms } => {
                out.push(Effect::Send(ToWorker::Reconnect { after_ms }));
                self.hang_up("the orchestrator stops", &mut out);
            }
            Input::Unlinked => self.hang_up("the worker hung up", &mut out),
            Input::Tick => self.tick(now, &mut out),
        }
        out
    }

    fn tick(&mut self, now: Now, out: &mut Vec<Effect>) {
        match self.phase {
            Phase::Fresh => {
                self.phase = Phase::Challenged { since: now.mono };
                out.push(Effect::Send(ToWorker::Challenge { nonce: self.nonce.clone() }));
            }
            Phase::Challenged { since } if now.mono >= since + self.limits.accept_ms => {
                self.hang_up("no hello in time", out);
            }
            Phase::Opening { .. } | Phase::Open if now.mono >= self.heard_at + self.limits.link_silent_ms => {
                self.hang_up("silent for too long", out);
            }
            Phase::Challenged { .. } | Phase::Opening { .. } | Phase::Open | Phase::Closed => {}
        }
    }

    fn hang_up(&mut self, why: &'static str, out: &mut Vec<Effect>) {
        if !matches!(self.phase, Phase::Closed) {
            self.phase = Phase::Closed;
            out.push(Effect::Hangup(why));
        }
    }

    fn heard(&mut self, message: ToOrchestrator, out: &mut Vec<Effect>) {
        match (&self.phase, message) {
            (Phase::Challenged { .. }, ToOrchestrator::Hello(hello)) => self.hello(hello, out),
            (Phase::Open, ToOrchestrator::Heartbeat(beat)) => {
                self.worker_draining = beat.draining;
                self.trouble = beat.trouble.map(told);
                self.slots = beat.slots;
                self.heartbeat(beat.n, beat.heard, beat.held, out);
            }
            (Phase::Open, ToOrchestrator::Report { attempt, seq, report }) => self.report(attempt, seq, report, out),
            (Phase::Open, ToOrchestrator::Closed { attempt, teardown_ms, log_len }) => {
                out.push(Effect::Close { attempt, teardown_ms, log_len });
                self.forget(&attempt);
            }
            (Phase::Open, ToOrchestrator::Images(inventory)) => self.inventory(inventory, out),
            (Phase::Open, ToOrchestrator::Goodbye { .. }) => {
                out.push(Effect::Left);
                self.hang_up("the worker said goodbye", out);
            }
            (_, ToOrchestrator::Unsupported { .. }) | (Phase::Closed, _) => {}
            (Phase::Fresh | Phase::Challenged { .. } | Phase::Opening { .. } | Phase::Open, _) => {
                let message = "this message does not belong here".to_owned();
                out.push(Effect::Send(ToWorker::Reject {
                    code: ErrorCode::InvalidBody,
                    message,
                    retry_after_ms: None,
                }));
                self.hang_up("a message out of place", out);
            }
        }
    }

    fn hello(&mut self, hello: Box<Hello>, out: &mut Vec<Effect>) {
        let known = hello.protocol_min.max(*PROTOCOL.start()) <= hello.protocol_max.min(*PROTOCOL.end());
        if !known
            || hello.worker != self.worker
            || hello.held.len() > limits::HELD_MAX
            || hello.slots.len() > limits::SLOTS_MAX
        {
            let (code, message) = if known {
                (ErrorCode::InvalidBody, "the hello is another worker's, or too large".to_owned())
            } else {
                let (ours, theirs) = (PROTOCOL, hello.protocol_min..=hello.protocol_max);
                (ErrorCode::UnsupportedProtocol, format!("this farm speaks protocol {ours:?}, the worker {theirs:?}"))
            };
            out.push(Effect::Send(ToWorker::Reject { code, message, retry_after_ms: Some(self.limits.expiry_ms) }));
            return self.hang_up("a hello that cannot be served", out);
        }
        out.push(Effect::Open(hello.clone()));
        self.phase = Phase::Opening { hello };
    }

    fn opened(&mut self, epoch: i64, jobs: Vec<Job>, draining: bool, out: &mut Vec<Effect>) {
        let Phase::Opening { hello } = std::mem::replace(&mut self.phase, Phase::Open) else {
            self.phase = Phase::Closed;
            return;
        };
        self.labels = hello.labels;
        self.slots = hello.slots;
        self.worker_draining = hello.draining;
        self.trouble = hello.trouble.map(told);
        let draining = self.operator_draining.unwrap_or(draining);
        self.operator_draining = Some(draining);
        out.push(Effect::Send(ToWorker::Welcome(Welcome {
            protocol: hello.protocol_max.min(*PROTOCOL.end()),
            epoch,
            heartbeat_ms: self.limits.heartbeat_ms,
            self_fence_ms: self.limits.self_fence_ms,
            kill_budget_ms: self.limits.kill_budget_ms,
            draining,
        })));
        out.push(Effect::Seen);
        out.push(Effect::Wish);
        for job in jobs {
            // News that came while the session was being opened is newer than this list.
            if self.jobs.get(&job.id).is_none_or(|known| known.version < job.version) {
                self.jobs.insert(job.id, job);
            }
        }
        self.say(hello.held);
        // A hello is the whole truth about what the worker has.
        let orders = self.orders(true, out);
        out.extend(orders.into_iter().map(|order| Effect::Send(ToWorker::Order { order })));
        self.offer(out);
    }

    fn say(&mut self, held: Vec<Held>) {
        for track in self.tracks.values_mut() {
            track.say = Say::NotHeld;
        }
        for held in held {
            let track = self.track(held.attempt);
            track.log_len = held.log_len;
            track.say = match held.state {
                HeldState::Running => Say::Running,
                HeldState::ResultPending => Say::ResultPending,
                HeldState::Lost => Say::Lost,
            };
        }
    }

    fn track(&mut self, attempt: AttemptRef) -> &mut Track {
        let next = &mut self.next_handle;
        let handles = &mut self.handles;
        self.tracks.entry(attempt).or_insert_with(|| {
            let handle = *next;
            *next = next.wrapping_add(1);
            handles.insert(handle, attempt);
            Track::new(handle)
        })
    }

    fn forget(&mut self, attempt: &AttemptRef) {
        match self.tracks.get_mut(attempt) {
            // What is being decided still counts among what it may have.
            Some(track) if track.settling.is_some() => {
                track.say = Say::NotHeld;
                track.nothing_waits();
            }
            Some(track) => {
                self.handles.remove(&track.handle);
                self.tracks.remove(attempt);
            }
            None => {}
        }
        self.jobs.retain(|_, job| job.attempt() != *attempt || !job.state.is_done());
    }

    fn heartbeat(&mut self, n: u64, heard: u64, held: Vec<Held>, out: &mut Vec<Effect>) {
        if self.slots.len() > limits::SLOTS_MAX || held.len() > limits::HELD_MAX {
            return self.hang_up("more slots or attempts than a worker has", out);
        }
        self.say(held);
        let orders = self.orders_at(heard, out);
        self.acked = n;
        self.unstick(out);
        self.prune();
        // Those whose reports are being decided stay, also when their worker says no more of them.
        if self.tracks.len() > TRACKS_MAX {
            return self.hang_up("more attempts than a worker has", out);
        }
        out.push(Effect::Seen);
        out.push(Effect::Send(ToWorker::HeartbeatAck { n, orders }));
        self.offer(out);
    }

    fn inventory(&mut self, inventory: Inventory, out: &mut Vec<Effect>) {
        if inventory.images.len() > limits::IMAGES_MAX {
            return self.hang_up("more images than a worker has", out);
        }
        let mut inventory = inventory;
        // Looked up by name.
        inventory.images.sort_by(|a, b| a.name.cmp(&b.name));
        self.images = Arc::new(inventory);
        self.offer(out);
    }

    /// Logs that could not be stored are tried again, one heartbeat apart.
    fn unstick(&mut self, out: &mut Vec<Effect>) {
        for (attempt, track) in self.tracks.iter_mut().filter(|(_, track)| track.taking != Taking::All) {
            track.taking = Taking::Again;
            out.push(Effect::Measure { attempt: *attempt });
        }
    }

    /// Forgets what neither side has any more.
    fn prune(&mut self) {
        let leased: std::collections::BTreeSet<AttemptRef> =
            self.jobs.values().filter(|job| self.leases(job)).map(Job::attempt).collect();
        let idle = |at: &AttemptRef, track: &Track| {
            track.say == Say::NotHeld && track.settling.is_none() && !leased.contains(at)
        };
        self.tracks.retain(|at, track| !idle(at, track));
        self.handles.retain(|_, at| self.tracks.contains_key(at));
        self.jobs.retain(|id, job| leased.contains(&job.attempt()) || self.tracks.keys().any(|at| at.job == *id));
    }

    fn orders_at(&mut self, heard_ack: u64, out: &mut Vec<Effect>) -> Vec<Order> {
        // A heartbeat sent after the acknowledgement that followed the assignment was sent after the assignment was heard.
        let heard: Vec<AttemptRef> = self
            .tracks
            .iter()
            .filter(|(_, track)| track.assigned_after.is_none_or(|after| heard_ack > after))
            .map(|(attempt, _)| *attempt)
            .collect();
        let mut orders = Vec::new();
        for attempt in self.attempts() {
            orders.extend(self.order(attempt, heard.contains(&attempt) || !self.tracks.contains_key(&attempt), out));
        }
        orders
    }

    fn orders(&mut self, whole_truth: bool, out: &mut Vec<Effect>) -> Vec<Order> {
        self.attempts().filter_map(|attempt| self.order(attempt, whole_truth, out)).collect()
    }

    /// Every attempt that one of the two sides knows.
    fn attempts(&self) -> impl Iterator<Item = AttemptRef> + use<> {
        let mut all: std::collections::BTreeSet<AttemptRef> = self.tracks.keys().copied().collect();
        all.extend(self.jobs.values().filter(|job| self.leases(job)).map(Job::attempt));
        all.into_iter()
    }

    fn leases(&self, job: &Job) -> bool {
        job.state.lease().is_some_and(|lease| lease.worker == self.worker)
    }

    /// What to tell the worker about one attempt. Orders that need work first become effects.
    fn order(&mut self, attempt: AttemptRef, counts: bool, out: &mut Vec<Effect>) -> Option<Order> {
        let job = self.jobs.get(&attempt.job).filter(|job| job.attempt() == attempt && self.leases(job)).cloned();
        let acked = self.acked;
        let track = self.track(attempt);
        if track.finished {
            return Some(Order::ResultAck { attempt }).filter(|_| track.say == Say::ResultPending);
        }
        let want = reconcile(job.as_ref().map(|job| &job.state), track.say, counts);
        match want {
            Want::Nothing => None,
            // What it does not hold it may have refused just now. Its next heartbeat asks again.
            Want::Assign if track.settling.is_some() => None,
            Want::Assign => {
                let handle = track.handle;
                track.assigned_after = Some(acked);
                track.continued = true;
                out.push(Effect::Assign { job: Box::new(job?), handle });
                None
            }
            Want::Continue if track.continued => None,
            Want::Continue => {
                track.continued = true;
                out.push(Effect::Measure { attempt });
                None
            }
            Want::Cancel => {
                out.extend(self.start_continuing(attempt));
                Some(Order::Cancel { attempt, grace_ms: self.limits.cancel_grace_ms })
            }
            // The answer to the report that is being decided says what becomes of the attempt.
            Want::Fence if track.settling.is_some() => None,
            Want::Fence => track.fence().then_some(Order::Fence { attempt }),
            Want::SettleLost => {
                let lost = self.tracks[&attempt].say == Say::Lost;
                let message = if lost {
                    "the worker restarted, which ended what ran on it"
                } else {
                    "the worker does not have it"
                };
                // The rest of its log is asked for when the books know. Who has sent it all forgets the attempt, and as long as
                // it stands as assigned it would be given to him a second time.
                out.push(Effect::NotHeld { attempt, message: message.to_owned() });
                None
            }
        }
    }

    /// A log that was begun in another session goes on once its stored length is known.
    fn start_continuing(&mut self, attempt: AttemptRef) -> Option<Effect> {
        let track = self.track(attempt);
        if track.say == Say::NotHeld || std::mem::replace(&mut track.continued, true) {
            return None;
        }
        Some(Effect::Measure { attempt })
    }

    fn continue_from(&mut self, attempt: AttemptRef, len: u64, out: &mut Vec<Effect>) {
        let handle = self.track(attempt).handle;
        // Reports are numbered from 1; those below the applied ones are answered at once when they come again.
        let order = Order::Continue { attempt, handle, log_durable: len, seq: 0 };
        out.push(Effect::Send(ToWorker::Order { order }));
    }

    /// The next heartbeat asks for the log's length again.
    fn continue_later(&mut self, attempt: &AttemptRef) {
        if let Some(track) = self.tracks.get_mut(attempt) {
            track.continued = false;
        }
    }

    fn job(&mut self, job: Job, out: &mut Vec<Effect>) {
        let id = job.id;
        if self.jobs.get(&id).is_some_and(|known| known.version >= job.version) {
            return;
        }
        let attempts: Vec<AttemptRef> =
            self.tracks.keys().filter(|at| at.job == id).copied().chain([job.attempt()]).collect();
        if self.leases(&job) || self.tracks.keys().any(|at| at.job == id) {
            self.jobs.insert(id, job);
        } else {
            self.jobs.remove(&id);
        }
        if !matches!(self.phase, Phase::Open) {
            return;
        }
        for attempt in std::collections::BTreeSet::from_iter(attempts) {
            let known = self.tracks.contains_key(&attempt);
            let ours = self.jobs.get(&id).is_some_and(|job| job.attempt() == attempt && self.leases(job));
            if !known && !ours {
                continue;
            }
            // A new assignment is sent at once; what a known attempt's silence means is for the next heartbeat.
            if let Some(order) = self.order(attempt, !known, out) {
                out.push(Effect::Send(ToWorker::Order { order }));
            }
        }
    }

    fn report(&mut self, attempt: AttemptRef, seq: u64, report: Report, out: &mut Vec<Effect>) {
        if !self.tracks.contains_key(&attempt) && self.tracks.len() >= TRACKS_MAX {
            return self.hang_up("reports of more attempts than a worker has", out);
        }
        let kept: usize = self.tracks.values().map(Track::bytes).sum();
        let track = self.track(attempt);
        if track.say == Say::NotHeld {
            track.say = Say::Running;
        }
        if matches!(report, Report::Result(_)) {
            track.say = Say::ResultPending;
        }
        if track.passes_over(seq) {
            return;
        }
        if track.waiting.len() >= limits::ARTIFACTS_MAX + 16 || kept >= WAITING_BYTES_MAX {
            return self.hang_up("more reports at once than an attempt can have", out);
        }
        if track.settling.is_some() {
            track.waits(seq, report);
        } else {
            track.settles(&report);
            out.push(Effect::Settle { attempt, seq, report });
        }
    }

    fn settled(&mut self, attempt: AttemptRef, seq: u64, result: Settled, out: &mut Vec<Effect>) {
        let Some(track) = self.tracks.get_mut(&attempt) else { return };
        let settling = track.settled();
        match result {
            Settled::Applied => {
                // What a heartbeat said does not count here: it may know of a result that has not arrived.
                if settling == Some(Settling::Result) {
                    track.finished = true;
                    out.push(Effect::Send(ToWorker::Order { order: Order::ResultAck { attempt } }));
                } else {
                    out.push(Effect::Send(ToWorker::EventAck { attempt, seq }));
                }
            }
            Settled::Fenced => {
                track.nothing_waits();
                out.extend(track.fence().then_some(Effect::Send(ToWorker::Order { order: Order::Fence { attempt } })));
            }
            Settled::Gap { have } => {
                track.goes_back(seq);
                let log_len = track.log_len;
                out.push(Effect::Send(ToWorker::Missing { attempt, seq: have, log_len, artifacts: Vec::new() }));
            }
            Settled::Missing { log_len, artifacts } => {
                track.goes_back(seq);
                let seq = seq.saturating_sub(1);
                out.push(Effect::Send(ToWorker::Missing { attempt, seq, log_len, artifacts }));
            }
            // Unsettled reports come again in the next session.
            Settled::Failed => return self.hang_up("the store is away", out),
        }
        if let Some(track) = self.tracks.get_mut(&attempt)
            && let Some((seq, report)) = track.next_waiting()
        {
            track.settles(&report);
            out.push(Effect::Settle { attempt, seq, report });
        }
    }

    fn heard_log(&mut self, chunk: LogChunk, out: &mut Vec<Effect>) {
        match self.handles.get(&chunk.handle) {
            Some(attempt) if self.tracks.get(attempt).is_some_and(|track| track.taking == Taking::Nothing) => {}
            Some(attempt) => out.push(Effect::Append { attempt: *attempt, offset: chunk.offset, bytes: chunk.bytes }),
            // The attempt was closed while the chunk travelled.
            None if chunk.handle < self.next_handle => {}
            None => self.hang_up("a log chunk of an unknown attempt", out),
        }
    }

    fn appended(&mut self, attempt: AttemptRef, result: Result<u64, NotStored>, out: &mut Vec<Effect>) {
        let Some(track) = self.tracks.get_mut(&attempt) else { return };
        match result {
            Ok(len) => (track.log_len, track.taking) = (len, Taking::All),
            Err(NotStored::Gap { have }) => {
                track.log_len = have;
                self.continue_from(attempt, have, out);
            }
            Err(NotStored::Later) => track.taking = Taking::Nothing,
            Err(NotStored::Never) => out.push(Effect::Send(ToWorker::Order { order: Order::Fence { attempt } })),
        }
    }

    fn offer(&self, out: &mut Vec<Effect>) {
        out.push(Effect::Offer {
            labels: self.labels.clone(),
            slots: self.slots.clone(),
            images: Arc::clone(&self.images),
            draining: self.worker_draining || self.operator_draining == Some(true),
            stopping: self.worker_draining,
            trouble: self.trouble.clone(),
        });
    }
}

/// A worker's own words, as long as they may be.
fn told(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(limits::TROUBLE_MAX));
    text
}
