//! D: when a job's state has lasted too long, on the desk's own clock.

use alloy_shared::env::{Mono, Now};

use super::Live;
use crate::job::Term;

/// When a state's term ends by the monotonic clock. It is set once for each term: a wall clock that is set meanwhile
/// changes nothing.
#[derive(Debug, Clone, Copy)]
pub(super) struct Due {
    term: Term,
    pub at: Mono,
}

impl Due {
    /// All of a term, from now on.
    pub(super) fn whole(term: Term, now: Mono) -> Self {
        Self { term, at: now + term.ms }
    }

    pub(super) fn is_of(&self, term: Term) -> bool {
        self.term == term
    }

    /// The deadline of the job's state; one that is set for the same term stays. A job that is leased, or was found at the
    /// start, is not overdue before `patient_until`; `patience_ms` is added to any term.
    pub(super) fn of(live: &Live, patient_until: Mono, patience_ms: u64, now: Now) -> Option<Self> {
        let term = live.job.state.term(&live.rules)?;
        if let Some(due) = live.due.filter(|due| due.term == term) {
            return Some(due);
        }
        let at = now.mono + term.left(now.wall) + patience_ms;
        let patient = live.found || live.job.state.lease().is_some();
        Some(Self { term, at: if patient { at.max(patient_until) } else { at } })
    }
}
