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
    pub(super) settling: Option<Settling>,
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
            settling: None,
            seen: None,
            assigned_after: None,
            finished: false,
            continued: false,
            fenced: false,
            taking: Taking::All,
        }
    }

    /// Its worker is told to go back: this report, and those that wait for it, cannot be decided yet.
    pub(super) fn goes_back(&mut self, seq: u64) {
        self.seen = self.waiting.drain(..).map(|(seq, _)| seq).chain([seq]).max();
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

impl Settling {
    pub(super) fn of(report: &Report) -> Self {
        if matches!(report, Report::Result(_)) { Self::Result } else { Self::Step }
    }
}
