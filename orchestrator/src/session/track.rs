//! D: what one session knows of one attempt.

use std::collections::VecDeque;

use alloy_shared::wire::session::Report;

use super::reconcile::Say;

/// What is known of one attempt in this session.
#[derive(Debug, Clone)]
pub(super) struct Track {
    pub(super) handle: u32,
    /// What the worker said last.
    pub(super) say: Say,
    pub(super) log_len: u64,
    /// Reports that wait for the one that is being settled.
    pub(super) waiting: VecDeque<(u64, Report)>,
    /// What these are as text.
    waiting_bytes: usize,
    pub(super) settling: Option<Settling>,
    /// What that report is as text.
    settling_bytes: usize,
    /// The last report that came while its worker is told to go back. The next one that is decided is one that came before:
    /// deciding a later one would say that those before it need not come again.
    seen: Option<u64>,
    /// The assignment was sent when this heartbeat was the newest acknowledged one.
    pub(super) assigned_after: Option<u64>,
    /// Its result is durable.
    pub(super) finished: bool,
    pub(super) continued: bool,
    pub(super) fenced: bool,
    pub(super) taking: Taking,
}

impl Track {
    pub(super) fn new(handle: u32) -> Self {
        Self {
            handle,
            say: Say::NotHeld,
            log_len: 0,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            settling: None,
            settling_bytes: 0,
            seen: None,
            assigned_after: None,
            finished: false,
            continued: false,
            fenced: false,
            taking: Taking::All,
        }
    }

    /// What is kept of its reports, as text.
    pub(super) fn bytes(&self) -> usize {
        self.settling_bytes + self.waiting_bytes
    }

    pub(super) fn settles(&mut self, report: &Report) {
        self.settling = Some(if matches!(report, Report::Result(_)) { Settling::Result } else { Settling::Step });
        self.settling_bytes = size(report);
    }

    /// Which report was decided.
    pub(super) fn settled(&mut self) -> Option<Settling> {
        self.settling_bytes = 0;
        self.settling.take()
    }

    pub(super) fn waits(&mut self, seq: u64, report: Report) {
        self.waiting_bytes += size(&report);
        self.waiting.push_back((seq, report));
    }

    pub(super) fn next_waiting(&mut self) -> Option<(u64, Report)> {
        let (seq, report) = self.waiting.pop_front()?;
        self.waiting_bytes -= size(&report);
        Some((seq, report))
    }

    pub(super) fn nothing_waits(&mut self) {
        self.waiting.clear();
        self.waiting_bytes = 0;
    }

    /// Its worker is told to go back: this report, and those that wait for it, cannot be decided yet.
    pub(super) fn goes_back(&mut self, seq: u64) {
        self.seen = self.waiting.iter().map(|(seq, _)| *seq).chain([seq]).max();
        self.nothing_waits();
    }

    /// Whether this report was under way when the worker was told to go back, and will come once more after those before it.
    pub(super) fn passes_over(&mut self, seq: u64) -> bool {
        let new = self.seen.is_some_and(|seen| seq > seen);
        self.seen = new.then_some(seq);
        new
    }

    /// True the first time: a second fence means that its log is not taken either. Once heard as lost, the rest is asked for.
    pub(super) fn fence(&mut self) -> bool {
        self.continued = false;
        !std::mem::replace(&mut self.fenced, true)
    }
}

fn size(report: &Report) -> usize {
    serde_json::to_vec(report).map_or(0, |text| text.len())
}

/// Whether a log's bytes can be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taking {
    All,
    /// They could not be: what comes is dropped until the next heartbeat asks for it again.
    Nothing,
    /// They were asked for again and none was stored yet: each heartbeat asks once more, because the worker goes back to one
    /// place only now and then.
    Again,
}

/// The report whose fate is being decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Settling {
    Step,
    Result,
}
