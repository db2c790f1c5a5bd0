//! D: jobs that ended lately. What was read of one before its end may arrive after it.

use std::collections::BTreeSet;

use alloy_shared::id::JobId;

/// As many are remembered at least. What was read arrives within seconds, in which far fewer end.
pub(super) const ENDED_MIN: usize = 1 << 16;

#[derive(Default)]
pub(super) struct Ended {
    newer: BTreeSet<JobId>,
    older: BTreeSet<JobId>,
}

impl Ended {
    pub(super) fn note(&mut self, id: JobId) {
        self.newer.insert(id);
        if self.newer.len() >= ENDED_MIN {
            self.older = std::mem::take(&mut self.newer);
        }
    }

    pub(super) fn has(&self, id: &JobId) -> bool {
        self.newer.contains(id) || self.older.contains(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_are_remembered_and_the_oldest_go() {
        let mut ended = Ended::default();
        let last = 3 * ENDED_MIN as u128;
        (1..=last).for_each(|n| ended.note(JobId::from_raw(n)));
        assert!((last - ENDED_MIN as u128 + 1..=last).all(|n| ended.has(&JobId::from_raw(n))));
        assert!(!ended.has(&JobId::from_raw(1)) && ended.newer.len() + ended.older.len() <= 2 * ENDED_MIN);
    }
}
