//! D: the worker's session, decided: lease and self-fence, heartbeats, orders, reports with numbers, log window, drain.
//!
//! No lease, no start; lease gone, VM gone. A report is sent only after the disk has it, and a result only after the
//! last byte of its log. Everything the orchestrator says may come twice, late, or after it stopped being true.

use std::collections::{BTreeMap, VecDeque};

use alloy_shared::env::{Mono, Now, backoff};
use alloy_shared::id::{AttemptRef, BootId};
use alloy_shared::limits::{self, Limits};
use alloy_shared::wire::image::Inventory;
use alloy_shared::wire::session::{
    Assignment, Heartbeat, Held, Order, Report, SlotView, ToOrchestrator, ToWorker, Welcome,
};
use alloy_shared::wire::{self, ErrorCode};

use super::attempt::{Attempt, Missing};
use super::{Effect, Input, KillReason, Reason, Stop};
use crate::vm_care::Trouble;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    /// Nothing was dialled yet.
    Idle,
    Dialing,
    /// Connected, the challenge has not come.
    Linked,
    Greeted {
        hello_at: Mono,
    },
    Up,
    /// Superseded or refused: this process never dials again.
    Over,
}

/// Heartbeats whose acknowledgement may still come.
const BEATS_MAX: usize = 32;

#[derive(Debug, Clone)]
pub struct Core {
    limits: Limits,
    boot: BootId,
    line: Line,
    /// The end of the lease.
    lease: Option<Mono>,
    beats: VecDeque<(u64, Mono)>,
    beat: u64,
    /// The newest acknowledged heartbeat of this session.
    beat_heard: u64,
    next_beat: Mono,
    last_heard: Mono,
    tries: u32,
    slots: Vec<SlotView>,
    /// Absent before anybody looked.
    images: Option<Inventory>,
    /// What the orchestrator was last told about slots or draining is out of date.
    news: bool,
    /// This daemon is stopping.
    draining: bool,
    /// The disk has no room for new work. To the farm it is as if this worker were draining.
    full: bool,
    /// What a person should look after. It may be so bad that to the farm this worker is draining.
    trouble: Option<Trouble>,
    /// The operator wants no new work here.
    told_to_drain: bool,
    attempts: BTreeMap<AttemptRef, Attempt>,
    /// Attempts that ended here or were refused, and why. A late assignment of one of them must not start it.
    gone: VecDeque<(AttemptRef, Option<String>)>,
    /// The attempt whose log was sent last: the next one is served first.
    turn: Option<AttemptRef>,
}

impl Core {
    /// A core that knows what an earlier daemon left in the spool: what is held, with the reports of each.
    pub fn restore(held: Vec<(Held, Vec<(u64, Report)>)>, boot: BootId, limits: Limits) -> Self {
        let attempts =
            held.into_iter().map(|(held, reports)| (held.attempt, Attempt::restored(&held, reports))).collect();
        Self {
            limits,
            boot,
            line: Line::Idle,
            lease: None,
            beats: VecDeque::new(),
            beat: 0,
            beat_heard: 0,
            next_beat: Mono(0),
            last_heard: Mono(0),
            tries: 0,
            slots: Vec::new(),
            images: None,
            news: false,
            draining: false,
            full: false,
            trouble: None,
            told_to_drain: false,
            attempts,
            gone: VecDeque::new(),
            turn: None,
        }
    }

    pub fn boot(&self) -> BootId {
        self.boot
    }

    pub fn holds(&self, attempt: AttemptRef) -> bool {
        self.attempts.contains_key(&attempt)
    }

    /// True while this attempt's executor runs.
    pub fn runs(&self, attempt: AttemptRef) -> bool {
        self.attempts.get(&attempt).is_some_and(Attempt::is_running)
    }

    /// True while any executor runs.
    pub fn is_running(&self) -> bool {
        self.attempts.values().any(Attempt::is_running)
    }

    pub fn is_empty(&self) -> bool {
        self.attempts.is_empty()
    }

    pub fn is_up(&self) -> bool {
        self.line == Line::Up
    }

    /// True when [`Input::Room`] would give a log frame.
    pub fn has_log(&self) -> bool {
        self.is_up() && self.attempts.values().any(|attempt| attempt.next_log().is_some())
    }

    /// The moment at which [`Input::Tick`] is due at the latest.
    pub fn next_wake(&self) -> Mono {
        let line = match self.line {
            Line::Idle => Mono(0),
            Line::Dialing | Line::Over => Mono(u64::MAX),
            Line::Linked | Line::Greeted { .. } => self.last_heard + self.limits.link_silent_ms,
            Line::Up => self.next_beat.min(self.last_heard + self.limits.link_silent_ms),
        };
        let results = self.attempts.values().filter_map(Attempt::wake).min().unwrap_or(Mono(u64::MAX));
        line.min(self.lease.unwrap_or(Mono(u64::MAX))).min(results)
    }

    /// Takes one input. `now` never goes back; `dice` is any number.
    pub fn handle(&mut self, input: Input, now: Now, dice: u64) -> Vec<Effect> {
        let mut out = Vec::new();
        let now = now.mono;
        // First of all: after a pause of this process, what is heard next must not meet a lease that has ended.
        self.expire_lease(now, &mut out);
        match input {
            Input::Linked => self.linked(now),
            Input::Unlinked => self.redial(None, dice, &mut out),
            Input::Rejected { code, message, retry_after_ms } => {
                self.rejected(code, message, retry_after_ms, dice, &mut out);
            }
            Input::Heard(message) => self.heard(message, now, dice, &mut out),
            Input::Unknown(message) => {
                self.last_heard = now;
                out.push(Effect::Send(ToOrchestrator::Unsupported { message }));
            }
            Input::Garbled(what) => self.hang_up(Reason::Garbled(what), None, dice, &mut out),
            Input::Slots(slots) => {
                self.news |= slots != self.slots;
                self.slots = slots;
            }
            Input::Images(images) => {
                self.images = Some(images);
                self.tell_images(&mut out);
            }
            Input::NotStarted { attempt, message } => {
                self.attempts.remove(&attempt);
                self.refuse(attempt, message, &mut out);
            }
            Input::Room => self.room(now, &mut out),
            Input::Drain => {
                self.news |= !self.draining;
                self.draining = true;
            }
            Input::Full(full) => {
                self.news |= full != self.full;
                self.full = full;
            }
            Input::Trouble(trouble) => {
                self.news |= trouble != self.trouble;
                self.trouble = trouble;
            }
            Input::Report { attempt, .. }
            | Input::Recorded { attempt, .. }
            | Input::Spooled { attempt, .. }
            | Input::Closed { attempt, .. }
            | Input::Uploaded { attempt, .. } => self.progress(attempt, input, now, &mut out),
            Input::Tick => {}
        }
        self.keep_time(now, dice, &mut out);
        out
    }

    /// What an executor, the disk or an upload says of one attempt.
    fn progress(&mut self, at: AttemptRef, input: Input, now: Mono, out: &mut Vec<Effect>) {
        let retry_at = now + self.limits.heartbeat_ms;
        let Some(attempt) = self.attempts.get_mut(&at) else { return };
        match input {
            Input::Report { report, .. } => out.extend(attempt.report(report)),
            Input::Recorded { seq, .. } => attempt.recorded(seq),
            Input::Spooled { len, .. } => attempt.spooled(len),
            Input::Closed { teardown_ms, .. } => {
                if attempt.is_running() && !attempt.has_result() {
                    out.extend(attempt.report(attempt.vanished()));
                }
                attempt.closed(teardown_ms);
                self.news |= attempt.is_lost();
            }
            Input::Uploaded { complete, .. } => attempt.uploaded(if complete { Mono(0) } else { retry_at }),
            Input::Linked
            | Input::Unlinked
            | Input::Rejected { .. }
            | Input::Heard(_)
            | Input::Unknown(_)
            | Input::Garbled(_)
            | Input::Slots(_)
            | Input::Images(_)
            | Input::NotStarted { .. }
            | Input::Room
            | Input::Full(_)
            | Input::Trouble(_)
            | Input::Drain
            | Input::Tick => {}
        }
        self.flush(at, now, out);
    }

    fn linked(&mut self, now: Mono) {
        if self.line == Line::Dialing {
            self.line = Line::Linked;
            self.last_heard = now;
        }
    }

    fn hang_up(&mut self, why: Reason, after_ms: Option<u64>, dice: u64, out: &mut Vec<Effect>) {
        out.push(Effect::Hangup(why));
        self.redial(after_ms, dice, out);
    }

    /// Forgets the link and dials again, after a while that grows with the failures in a row.
    fn redial(&mut self, after_ms: Option<u64>, dice: u64, out: &mut Vec<Effect>) {
        if self.line == Line::Over {
            return;
        }
        self.line = Line::Dialing;
        self.beats.clear();
        self.beat_heard = 0;
        for attempt in self.attempts.values_mut() {
            attempt.unlink();
        }
        // While an attempt is held its lease runs: then no wish for patience goes beyond the short cap.
        let (cap, cap_asked) = if self.attempts.is_empty() {
            (self.limits.reconnect_cap_ms, 10 * self.limits.reconnect_cap_ms)
        } else {
            (self.limits.reconnect_cap_held_ms, self.limits.reconnect_cap_held_ms)
        };
        let jitter = backoff(self.tries, self.limits.reconnect_base_ms, cap, dice);
        self.tries = self.tries.saturating_add(1);
        out.push(Effect::Dial {
            after_ms: after_ms.map_or(jitter, |after| after.saturating_add(jitter).min(cap_asked)),
        });
    }

    fn heard(&mut self, message: ToWorker, now: Mono, dice: u64, out: &mut Vec<Effect>) {
        self.last_heard = now;
        match message {
            ToWorker::Challenge { nonce } => self.challenged(nonce, now, out),
            ToWorker::Welcome(welcome) => self.welcomed(welcome, now, dice, out),
            ToWorker::Reject { code, message, retry_after_ms } => {
                self.rejected(code, message, retry_after_ms, dice, out);
            }
            ToWorker::Superseded => self.give_up(Reason::Superseded, out),
            ToWorker::Reconnect { after_ms } => self.hang_up(Reason::Asked, Some(after_ms), dice, out),
            ToWorker::Unsupported { .. } => {}
            ToWorker::HeartbeatAck { .. }
            | ToWorker::Order { .. }
            | ToWorker::EventAck { .. }
            | ToWorker::Missing { .. }
            | ToWorker::LogAck { .. }
            | ToWorker::Images { .. }
            | ToWorker::Drain { .. }
                if self.line != Line::Up => {}
            ToWorker::HeartbeatAck { n, orders } => {
                self.beat_acked(n, out);
                for order in orders {
                    self.ordered(order, now, out);
                }
            }
            ToWorker::Order { order } => self.ordered(order, now, out),
            ToWorker::EventAck { attempt, seq } => self.told(attempt, now, out, |a| {
                a.acked(seq, now);
                None
            }),
            ToWorker::Missing { attempt, seq, log_len, artifacts } => {
                let wait_ms = self.limits.heartbeat_ms;
                self.told(attempt, now, out, |a| a.missing(Missing { seq, log_len, artifacts }, now, wait_ms));
            }
            ToWorker::LogAck { attempt, durable } => self.told(attempt, now, out, |a| {
                a.log_acked(durable, now);
                Some(Effect::Release { attempt, durable })
            }),
            ToWorker::Drain { on } => self.told_to_drain = on,
            ToWorker::Images { wishes } => out.push(Effect::Wish(wishes)),
        }
    }

    /// Applies what was said of one attempt and sends what became possible. Of an unknown one nothing is left to say.
    fn told(
        &mut self,
        at: AttemptRef,
        now: Mono,
        out: &mut Vec<Effect>,
        apply: impl FnOnce(&mut Attempt) -> Option<Effect>,
    ) {
        if let Some(attempt) = self.attempts.get_mut(&at) {
            out.extend(apply(attempt));
            self.flush(at, now, out);
        }
    }

    fn challenged(&mut self, nonce: String, now: Mono, out: &mut Vec<Effect>) {
        if self.line != Line::Linked {
            return;
        }
        self.line = Line::Greeted { hello_at: now };
        self.news = false;
        out.push(Effect::Hello {
            nonce,
            slots: self.slots.clone(),
            held: self.held(),
            draining: self.takes_nothing(),
            trouble: self.why_nothing(),
        });
    }

    fn welcomed(&mut self, welcome: Welcome, now: Mono, dice: u64, out: &mut Vec<Effect>) {
        let Line::Greeted { hello_at } = self.line else { return };
        if !wire::PROTOCOL.contains(&welcome.protocol) {
            let after = self.limits.reconnect_cap_ms;
            return self.hang_up(Reason::Protocol(welcome.protocol), Some(after), dice, out);
        }
        self.line = Line::Up;
        self.tries = 0;
        self.told_to_drain = welcome.draining;
        // The stricter side rules: both then keep the lease inequality.
        self.limits.heartbeat_ms = self.limits.heartbeat_ms.min(welcome.heartbeat_ms).max(1);
        self.limits.self_fence_ms = self.limits.self_fence_ms.min(welcome.self_fence_ms);
        self.next_beat = now + jittered(self.limits.heartbeat_ms, dice);
        self.renew_lease(hello_at, out);
        self.tell_images(out);
    }

    fn tell_images(&self, out: &mut Vec<Effect>) {
        if self.is_up() {
            out.extend(self.images.clone().map(|images| Effect::Send(ToOrchestrator::Images(images))));
        }
    }

    fn rejected(&mut self, code: ErrorCode, message: String, after_ms: Option<u64>, dice: u64, out: &mut Vec<Effect>) {
        if is_final(code) {
            return self.give_up(Reason::Refused { code, message }, out);
        }
        let after = after_ms.unwrap_or(self.limits.reconnect_cap_ms);
        self.hang_up(Reason::Rejected { code, message }, Some(after), dice, out);
    }

    /// Nothing of this worker is wanted any more: what runs is killed, and nobody dials again.
    fn give_up(&mut self, why: Reason, out: &mut Vec<Effect>) {
        self.line = Line::Over;
        out.push(Effect::Hangup(why));
        out.extend(self.attempts.values_mut().filter_map(|attempt| attempt.stop(Stop::Kill(KillReason::Fenced))));
    }

    fn beat_acked(&mut self, n: u64, out: &mut Vec<Effect>) {
        let Some((_, sent_at)) = self.beats.iter().find(|(beat, _)| *beat == n).copied() else { return };
        self.beats.retain(|(beat, _)| *beat > n);
        self.beat_heard = n;
        self.renew_lease(sent_at, out);
    }

    fn renew_lease(&mut self, sent_at: Mono, out: &mut Vec<Effect>) {
        let until = sent_at + self.limits.self_fence_ms;
        if self.lease.is_none_or(|lease| lease < until) {
            self.lease = Some(until);
            out.push(Effect::FenceAt(until));
        }
    }

    fn expire_lease(&mut self, now: Mono, out: &mut Vec<Effect>) {
        if self.lease.is_some_and(|lease| lease <= now) {
            self.lease = None;
            let kill = Stop::Kill(KillReason::LeaseLost);
            out.extend(self.attempts.values_mut().filter_map(|attempt| attempt.stop(kill)));
        }
    }

    fn ordered(&mut self, order: Order, now: Mono, out: &mut Vec<Effect>) {
        let stalled_ms = 2 * self.limits.heartbeat_ms;
        let at = order.attempt();
        match order {
            Order::Assign(assignment) if !self.attempts.contains_key(&at) => self.assigned(assignment, now, out),
            Order::Assign(assignment) => self.told(at, now, out, |a| {
                a.resume(assignment.handle, None, now, stalled_ms);
                None
            }),
            Order::Continue { handle, log_durable, seq, .. } => self.told(at, now, out, |a| {
                a.resume(handle, Some((log_durable, seq)), now, stalled_ms);
                None
            }),
            Order::Cancel { grace_ms, .. } => self.told(at, now, out, |a| a.stop(Stop::Cancel { grace_ms })),
            Order::Fence { .. } => self.told(at, now, out, Attempt::fence),
            Order::ResultAck { .. } => self.told(at, now, out, |a| {
                a.result_acked(now);
                None
            }),
        }
    }

    /// A new attempt. It starts at once; only the word about it waits for the disk.
    fn assigned(&mut self, assignment: Box<Assignment>, now: Mono, out: &mut Vec<Effect>) {
        let at = assignment.attempt;
        if let Some((_, refused)) = self.gone.iter().find(|(gone, _)| *gone == at) {
            // Of one that ended the next heartbeat shows that it is not held. A refusal stands: it may be decided by now.
            out.extend(refused.clone().map(|message| refusal(at, message)));
            return;
        }
        let why = if self.lease.is_none() {
            "this worker holds no lease"
        } else if self.slots.is_empty() {
            // It was offered in an earlier life: VMs of that may still be here, and nothing would run it.
            "this worker has no slots yet"
        } else if self.draining || self.told_to_drain {
            "this worker is draining"
        } else if self.full {
            "this worker's disk is full"
        } else if self.attempts.len() >= limits::HELD_MAX {
            "this worker still holds too many ended attempts"
        } else {
            let mut attempt = Attempt::assigned(at, assignment.handle, now);
            out.push(Effect::Start(assignment));
            out.extend(attempt.report(Report::Accepted));
            self.attempts.insert(at, attempt);
            return;
        };
        self.refuse(at, why.to_owned(), out);
    }

    fn refuse(&mut self, at: AttemptRef, why: String, out: &mut Vec<Effect>) {
        out.push(refusal(at, why.clone()));
        self.is_gone(at, Some(why));
    }

    fn is_gone(&mut self, at: AttemptRef, refused: Option<String>) {
        if self.gone.len() >= limits::HELD_MAX {
            self.gone.pop_front();
        }
        self.gone.push_back((at, refused));
    }

    fn room(&mut self, now: Mono, out: &mut Vec<Effect>) {
        if !self.is_up() {
            return;
        }
        let after = self.attempts.iter().filter(|(at, _)| self.turn.is_none_or(|turn| **at > turn));
        let next = after
            .chain(self.attempts.iter())
            .find_map(|(at, attempt)| attempt.next_log().map(|(handle, from, len)| (*at, handle, from, len)));
        let Some((at, handle, from, len)) = next else { return };
        self.turn = Some(at);
        out.push(Effect::SendLog { attempt: at, handle, from, len });
        self.told(at, now, out, |attempt| {
            attempt.log_sent(from + u64::from(len), now);
            None
        });
    }

    fn flush(&mut self, at: AttemptRef, now: Mono, out: &mut Vec<Effect>) {
        let up = self.is_up();
        if self.attempts.get_mut(&at).is_some_and(|attempt| attempt.flush(up, now, out)) {
            self.attempts.remove(&at);
            self.is_gone(at, None);
            out.push(Effect::Forget { attempt: at });
        }
    }

    /// What time alone brings about: the first dial, a silent link, a heartbeat, a result whose pause is over.
    fn keep_time(&mut self, now: Mono, dice: u64, out: &mut Vec<Effect>) {
        match self.line {
            Line::Idle => {
                self.line = Line::Dialing;
                out.push(Effect::Dial { after_ms: 0 });
            }
            Line::Linked | Line::Greeted { .. } | Line::Up
                if now.since(self.last_heard) >= self.limits.link_silent_ms =>
            {
                self.hang_up(Reason::Silent, None, dice, out);
            }
            Line::Up if self.news || now >= self.next_beat => self.send_beat(now, dice, out),
            Line::Dialing | Line::Linked | Line::Greeted { .. } | Line::Up | Line::Over => {}
        }
        let due: Vec<AttemptRef> =
            self.attempts.iter().filter(|(_, a)| a.wake().is_some_and(|at| at <= now)).map(|(at, _)| *at).collect();
        for at in due {
            self.flush(at, now, out);
        }
    }

    fn send_beat(&mut self, now: Mono, dice: u64, out: &mut Vec<Effect>) {
        self.news = false;
        self.next_beat = now + jittered(self.limits.heartbeat_ms, dice);
        self.beat += 1;
        if self.beats.len() >= BEATS_MAX {
            self.beats.pop_front();
        }
        self.beats.push_back((self.beat, now));
        out.push(Effect::Send(ToOrchestrator::Heartbeat(Heartbeat {
            n: self.beat,
            heard: self.beat_heard,
            slots: self.slots.clone(),
            held: self.held(),
            draining: self.takes_nothing(),
            trouble: self.why_nothing(),
        })));
    }

    /// By its own word, whatever the operator wants.
    fn takes_nothing(&self) -> bool {
        self.draining || self.full || self.trouble.as_ref().is_some_and(|trouble| trouble.drains)
    }

    /// What people read about a worker that takes nothing, or soon may not.
    fn why_nothing(&self) -> Option<String> {
        let full = || format!("its disk is full: less than {} MiB are free", self.limits.disk_floor >> 20);
        self.trouble.as_ref().map(|trouble| trouble.why.clone()).or_else(|| self.full.then(full))
    }

    fn held(&self) -> Vec<Held> {
        self.attempts.values().map(Attempt::view).collect()
    }
}

/// True for a refusal that stays until a person does something about it.
fn is_final(code: ErrorCode) -> bool {
    match code {
        ErrorCode::Unauthenticated | ErrorCode::Forbidden | ErrorCode::UnsupportedProtocol => true,
        ErrorCode::InvalidBody
        | ErrorCode::IncompleteBody
        | ErrorCode::InvalidSpec
        | ErrorCode::InvalidParameter
        | ErrorCode::NotFound
        | ErrorCode::Gone
        | ErrorCode::MethodNotAllowed
        | ErrorCode::IdempotencyMismatch
        | ErrorCode::InvalidTransition
        | ErrorCode::SourceIncomplete
        | ErrorCode::DigestMismatch
        | ErrorCode::InvalidSource
        | ErrorCode::NoSuchWorker
        | ErrorCode::OffsetMismatch
        | ErrorCode::RangeNotSatisfiable
        | ErrorCode::TooLarge
        | ErrorCode::TooManyRequests
        | ErrorCode::Superseded
        | ErrorCode::Fenced
        | ErrorCode::Unavailable
        | ErrorCode::StorageFull
        | ErrorCode::Internal => false,
    }
}

/// ± 10 %, so that a farm's heartbeats do not march in step.
fn jittered(ms: u64, dice: u64) -> u64 {
    let spread = ms / 5;
    ms - ms / 10 + dice % (spread + 1)
}

/// Level-triggered like the assignment that it answers: it is said again as often as that comes, so no disk is needed.
fn refusal(attempt: AttemptRef, message: String) -> Effect {
    Effect::Send(ToOrchestrator::Report { attempt, seq: 1, report: Report::Refused { message } })
}

#[cfg(test)]
mod tests;
