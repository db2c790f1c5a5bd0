//! D: one held attempt: its numbered reports, its log window, and what is left to do before it may be forgotten.

use std::collections::{BTreeMap, VecDeque};

use alloy_shared::env::Mono;
use alloy_shared::id::{AttemptRef, Digest};
use alloy_shared::limits;
use alloy_shared::wire::job::{End, Reason, Timings};
use alloy_shared::wire::session::{Held, HeldState, Report, ResultReport, ToOrchestrator};

use super::{Effect, KillReason, Stop};
use crate::provider::VmError;

/// The smallest log window. On a line of 64 kbit/s it delays a heartbeat by 4 s, a tenth of the lease.
const WINDOW_MIN: u64 = 32 << 10;
/// An acknowledgement that took this long says that the line or the disk behind it is slow: less is put in flight.
const ACK_SLOW_MS: u64 = 2_000;
const ACK_FAST_MS: u64 = 500;
/// Room below this waits for more, so that a full window does not turn into crumbs.
const CRUMB: u64 = 16 << 10;

#[derive(Debug, Clone)]
pub(super) struct Attempt {
    at: AttemptRef,
    stage: Stage,
    /// Names the attempt in log chunks of the present session; none until the orchestrator said it there.
    handle: Option<u32>,
    /// True once the orchestrator mentioned the attempt in the present session: reports may go.
    talking: bool,
    reports: Reports,
    log: Log,
    result: Option<Ended>,
    /// Not ours any more: nothing of it is wanted but the rest of its log.
    fenced: bool,
    /// Not even that is wanted.
    dropped: bool,
    /// It was killed because the lease ran out.
    lost_its_lease: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// An executor runs.
    Running(Stopping),
    /// The executor is gone and its slot is clean.
    Closed { teardown_ms: u64 },
    /// An earlier daemon died under it.
    Lost,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stopping {
    No,
    Cancel,
    Kill,
}

/// The result's way to the orchestrator.
#[derive(Debug, Clone)]
struct Ended {
    seq: u64,
    log_len: u64,
    acked: bool,
}

/// What the orchestrator has, where that is not enough.
pub(super) struct Missing {
    pub(super) seq: u64,
    pub(super) log_len: u64,
    pub(super) artifacts: Vec<Digest>,
}

/// Reports that are not acknowledged. An executor makes at most `ARTIFACTS_MAX` and a handful, which bounds the queue.
#[derive(Debug, Clone, Default)]
struct Reports {
    queue: VecDeque<(u64, Report)>,
    newest: u64,
    recorded: u64,
    sent: u64,
    acked: u64,
    /// Artifacts that the orchestrator missed are on their way again.
    uploading: bool,
    /// How often the orchestrator answered that something is missing.
    missing: u32,
    not_before: Mono,
}

#[derive(Debug, Clone)]
struct Log {
    spooled: u64,
    sent: u64,
    durable: u64,
    window: u64,
    /// Where it was last sent again from.
    went_back_to: Option<u64>,
    /// An offset in flight and when it left, to time one acknowledgement.
    probe: Option<(u64, Mono)>,
    /// When the orchestrator last gave a sign of progress.
    moved_at: Mono,
}

impl Attempt {
    pub(super) fn assigned(at: AttemptRef, handle: u32, now: Mono) -> Self {
        Self {
            at,
            stage: Stage::Running(Stopping::No),
            handle: Some(handle),
            talking: true,
            reports: Reports::default(),
            log: Log::new(0, now),
            result: None,
            fenced: false,
            dropped: false,
            lost_its_lease: false,
        }
    }

    /// What an earlier daemon left on disk.
    pub(super) fn restored(held: &Held, reports: Vec<(u64, Report)>) -> Self {
        let result = reports.iter().find_map(|(seq, report)| match report {
            Report::Result(result) => Some(Ended::new(*seq, result.log_len)),
            Report::Accepted | Report::Refused { .. } | Report::Phase { .. } | Report::Artifact(_) => None,
        });
        let (stage, result) = match (held.state, result) {
            (HeldState::ResultPending, Some(result)) => (Stage::Closed { teardown_ms: 0 }, Some(result)),
            (HeldState::ResultPending | HeldState::Running | HeldState::Lost, _) => (Stage::Lost, None),
        };
        Self {
            at: held.attempt,
            stage,
            handle: None,
            talking: false,
            reports: Reports {
                queue: if result.is_some() { reports.into() } else { VecDeque::new() },
                newest: held.seq,
                recorded: held.seq,
                ..Reports::default()
            },
            log: Log::new(held.log_len, Mono(0)),
            result,
            fenced: false,
            dropped: false,
            lost_its_lease: false,
        }
    }

    pub(super) fn view(&self) -> Held {
        let state = match (self.stage, &self.result) {
            (Stage::Lost, _) => HeldState::Lost,
            (_, Some(result)) if result.seq <= self.reports.recorded => HeldState::ResultPending,
            (Stage::Running(_) | Stage::Closed { .. }, _) => HeldState::Running,
        };
        Held { attempt: self.at, state, log_len: self.log.spooled, seq: self.reports.recorded }
    }

    pub(super) fn is_running(&self) -> bool {
        match self.stage {
            Stage::Running(_) => true,
            Stage::Closed { .. } | Stage::Lost => false,
        }
    }

    pub(super) fn is_lost(&self) -> bool {
        match self.stage {
            Stage::Lost => true,
            Stage::Running(_) | Stage::Closed { .. } => false,
        }
    }

    pub(super) fn has_result(&self) -> bool {
        self.result.is_some()
    }

    /// The result of an executor that ended without one.
    pub(super) fn vanished(&self) -> Report {
        let end = if self.lost_its_lease {
            End::because(Reason::WorkerLost, VmError::fenced().to_string())
        } else {
            End::because(Reason::InternalError, "the worker's executor ended without a result")
        };
        Report::Result(Box::new(ResultReport {
            end,
            timings: Timings::default(),
            log_len: self.log.spooled,
            artifacts: 0,
            facts: BTreeMap::new(),
        }))
    }

    /// The link is gone: the next session names the attempt anew.
    pub(super) fn unlink(&mut self) {
        self.handle = None;
        self.talking = false;
        self.log.probe = None;
    }

    /// Orders the executor to stop, once per degree.
    pub(super) fn stop(&mut self, how: Stop) -> Option<Effect> {
        let degree = match how {
            Stop::Cancel { .. } => Stopping::Cancel,
            Stop::Kill(KillReason::Fenced | KillReason::LeaseLost | KillReason::Shutdown) => Stopping::Kill,
        };
        match &mut self.stage {
            Stage::Running(now) if *now < degree => {
                *now = degree;
                self.lost_its_lease = how == Stop::Kill(KillReason::LeaseLost);
                Some(Effect::Stop { attempt: self.at, how })
            }
            Stage::Running(_) | Stage::Closed { .. } | Stage::Lost => None,
        }
    }

    /// What runs is killed, and then it is like an attempt whose daemon died: the rest of its log is sent once the
    /// orchestrator names it. One that was named and is fenced again has a log that is not taken.
    pub(super) fn fence(&mut self) -> Option<Effect> {
        match self.stage {
            Stage::Running(_) => {}
            Stage::Closed { .. } => self.lose(),
            // The orchestrator may not have heard yet that what it fences is lost by now.
            Stage::Lost => self.dropped |= self.handle.is_some() || !self.fenced,
        }
        self.fenced = true;
        self.result = None;
        self.reports.queue.clear();
        self.stop(Stop::Kill(KillReason::Fenced))
    }

    pub(super) fn closed(&mut self, teardown_ms: u64) {
        match self.stage {
            Stage::Running(_) if self.fenced => self.lose(),
            Stage::Running(_) => self.stage = Stage::Closed { teardown_ms },
            Stage::Closed { .. } | Stage::Lost => {}
        }
    }

    /// The orchestrator names it anew when it hears that it is lost.
    fn lose(&mut self) {
        self.stage = Stage::Lost;
        self.unlink();
    }

    /// Numbers a report and asks for it to be put on disk. Nothing follows a result or a fence.
    pub(super) fn report(&mut self, report: Report) -> Option<Effect> {
        if let Report::Result(result) = &report {
            // The end of the log is on the disk, also of an attempt whose result nobody wants any more.
            self.log.spooled = self.log.spooled.max(result.log_len);
        }
        if self.result.is_some() || self.fenced || !self.is_running() {
            return None;
        }
        let seq = self.reports.newest + 1;
        self.reports.newest = seq;
        if let Report::Result(result) = &report {
            self.result = Some(Ended::new(seq, result.log_len));
        }
        self.reports.queue.push_back((seq, report.clone()));
        Some(Effect::Record { attempt: self.at, seq, report })
    }

    pub(super) fn recorded(&mut self, seq: u64) {
        self.reports.recorded = self.reports.recorded.max(seq.min(self.reports.newest));
    }

    pub(super) fn spooled(&mut self, len: u64) {
        self.log.spooled = self.log.spooled.max(len);
    }

    /// Reports up to `seq` are durable. In a fresh session it also says: go on from there.
    pub(super) fn acked(&mut self, seq: u64, now: Mono) {
        self.reports.ack(seq, now, &mut self.log.moved_at);
        if !self.talking {
            self.talking = true;
            self.reports.sent = self.reports.acked;
        }
    }

    pub(super) fn log_acked(&mut self, durable: u64, now: Mono) {
        self.log.ack(durable, now);
    }

    /// The orchestrator names the attempt in this session. What it does not have is sent again, once. Later in the
    /// session it says the same when bytes before those it got are missing: the log goes back to there, once for all
    /// the chunks that were under way, and once more whenever nothing has moved for `stalled_ms`.
    pub(super) fn resume(&mut self, handle: u32, from: Option<(u64, u64)>, now: Mono, stalled_ms: u64) {
        let fresh = !self.talking || self.handle != Some(handle);
        let stalled = now.since(self.log.moved_at) >= stalled_ms;
        self.handle = Some(handle);
        self.talking = true;
        if let Some((log_durable, seq)) = from {
            self.reports.ack(seq, now, &mut self.log.moved_at);
            self.log.ack(log_durable, now);
            if fresh || log_durable < self.log.sent && self.log.went_back_to != Some(log_durable) {
                self.log.rewind(log_durable, now);
            }
        }
        if fresh || stalled {
            self.reports.sent = self.reports.acked;
            self.log.rewind(self.log.durable, now);
        }
    }

    /// Reports up to `seq` are there and a later one cannot be accepted: sends again what is missing, artifacts first.
    pub(super) fn missing(&mut self, what: Missing, now: Mono, wait_ms: u64) -> Option<Effect> {
        let before = self.result.as_ref().map_or(self.reports.newest, |result| result.seq - 1);
        self.reports.ack(what.seq.min(before), now, &mut self.log.moved_at);
        self.reports.sent = self.reports.acked;
        if self.result.is_some() {
            self.log.rewind(what.log_len, now);
        }
        // The first answer is followed at once: the bytes were merely under way. Then ever more slowly.
        let reports = &mut self.reports;
        let wait = match reports.missing {
            0 => 0,
            n => wait_ms.min(20u64 << n.min(16)),
        };
        reports.missing = reports.missing.saturating_add(1);
        reports.not_before = now + wait;
        if what.artifacts.is_empty() || reports.uploading {
            return None;
        }
        reports.uploading = true;
        Some(Effect::Upload { attempt: self.at, artifacts: what.artifacts })
    }

    pub(super) fn uploaded(&mut self, retry_at: Mono) {
        self.reports.uploading = false;
        self.reports.not_before = self.reports.not_before.max(retry_at);
    }

    pub(super) fn result_acked(&mut self, now: Mono) {
        match (&mut self.result, self.stage) {
            (Some(result), _) => {
                result.acked = true;
                // With the result all before it is durable.
                self.reports.ack(result.seq, now, &mut self.log.moved_at);
                self.log.ack(result.log_len, now);
                self.talking = true;
            }
            // The job ended without us; nothing of ours is wanted any more.
            (None, Stage::Lost | Stage::Closed { .. }) => self.dropped = true,
            (None, Stage::Running(_)) => {}
        }
    }

    /// The next moment at which something may be sent that may not be sent earlier.
    pub(super) fn wake(&self) -> Option<Mono> {
        let held_back = !self.reports.queue.is_empty() && self.reports.not_before > Mono(0);
        held_back.then_some(self.reports.not_before)
    }

    /// Sends every report that is on disk and whose turn it is. True when the attempt is over and to be forgotten.
    pub(super) fn flush(&mut self, up: bool, now: Mono, out: &mut Vec<Effect>) -> bool {
        if self.reports.not_before <= now {
            self.reports.not_before = Mono(0);
        }
        if self.dropped {
            return !self.is_running();
        }
        if !up || !self.talking {
            return false;
        }
        let held_back = self.reports.uploading || self.reports.not_before > now;
        for (seq, report) in &self.reports.queue {
            if *seq <= self.reports.sent {
                continue;
            }
            let waits = match &self.result {
                Some(end) if end.seq == *seq => end.acked || self.log.sent < self.log.spooled,
                Some(_) | None => false,
            };
            if *seq > self.reports.recorded || held_back || waits {
                break;
            }
            self.reports.sent = *seq;
            let report = report.clone();
            out.push(Effect::Send(ToOrchestrator::Report { attempt: self.at, seq: *seq, report }));
        }
        // A disk whose sync failed may have more of a log than the result speaks of.
        let whole = self.log.durable >= self.log.spooled;
        let teardown_ms = match (self.stage, &self.result) {
            (Stage::Closed { teardown_ms }, Some(end)) if end.acked && (whole || self.handle.is_none()) => teardown_ms,
            (Stage::Lost, _) if self.handle.is_some() && whole => 0,
            (Stage::Running(_) | Stage::Closed { .. } | Stage::Lost, _) => return false,
        };
        let log_len = self.log.spooled;
        out.push(Effect::Send(ToOrchestrator::Closed { attempt: self.at, teardown_ms, log_len }));
        true
    }

    /// The next slice of log that the window lets through. Nothing goes before the disk has the attempt: after a power cut
    /// without a record it is given out again under its number, and its log begins anew.
    pub(super) fn next_log(&self) -> Option<(u32, u64, u32)> {
        let handle = self.handle?;
        let unrecorded = self.reports.recorded == 0 && self.reports.newest > 0;
        if self.dropped || unrecorded || self.fenced && self.is_running() {
            return None;
        }
        let ready = self.log.spooled.saturating_sub(self.log.sent);
        let room = self.log.window.saturating_sub(self.log.sent.saturating_sub(self.log.durable));
        if ready == 0 || room < ready.min(CRUMB) {
            return None;
        }
        let len = ready.min(room).min(limits::LOG_CHUNK_MAX as u64);
        Some((handle, self.log.sent, len as u32))
    }

    pub(super) fn log_sent(&mut self, upto: u64, now: Mono) {
        if self.log.sent == self.log.durable {
            // Nothing was in flight: the line was idle, not stalled.
            self.log.moved_at = now;
        }
        self.log.sent = upto;
        if self.log.probe.is_none() {
            self.log.probe = Some((upto, now));
        }
    }
}

impl Ended {
    fn new(seq: u64, log_len: u64) -> Self {
        Self { seq, log_len, acked: false }
    }
}

impl Reports {
    fn ack(&mut self, seq: u64, now: Mono, moved_at: &mut Mono) {
        if seq <= self.acked {
            return;
        }
        *moved_at = now;
        self.acked = seq;
        self.sent = self.sent.max(seq);
        while self.queue.front().is_some_and(|(front, _)| *front <= seq) {
            self.queue.pop_front();
        }
    }
}

impl Log {
    fn new(spooled: u64, now: Mono) -> Self {
        Self { spooled, sent: 0, durable: 0, window: 2 * WINDOW_MIN, went_back_to: None, probe: None, moved_at: now }
    }

    fn ack(&mut self, durable: u64, now: Mono) {
        if durable <= self.durable {
            return;
        }
        self.durable = durable;
        self.sent = self.sent.max(durable);
        self.moved_at = now;
        let Some((offset, left_at)) = self.probe else { return };
        if offset > durable {
            return;
        }
        self.probe = None;
        let took = now.since(left_at);
        if took > ACK_SLOW_MS {
            self.window = (self.window / 2).max(WINDOW_MIN);
        } else if took < ACK_FAST_MS {
            self.window = (self.window * 2).min(limits::LOG_WINDOW);
        }
    }

    /// Goes back to `to`, also behind what was once acknowledged: whoever has to store it knows what it has.
    fn rewind(&mut self, to: u64, now: Mono) {
        self.durable = self.durable.min(to);
        self.sent = self.sent.min(to);
        self.went_back_to = Some(to);
        self.probe = None;
        self.moved_at = now;
    }
}
