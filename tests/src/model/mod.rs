//! Models of the farm's protocol that are explored to the end, and the mutants that prove that the checks see.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

pub mod mutant;
pub mod outage;
pub mod pool;
pub mod protocol;
pub mod run;

/// Which checks have spoken. The checker would go on to report the latest trace of each; the first is the shortest.
#[derive(Debug, Default)]
pub struct Seen([AtomicBool; 32]);

impl Seen {
    /// False the first time that it does not hold.
    pub fn always(&self, check: usize, holds: impl FnOnce() -> bool) -> bool {
        self.0[check].load(Relaxed) || holds() || self.0[check].swap(true, Relaxed)
    }

    /// True the first time that it is so.
    pub fn sometimes(&self, check: usize, is_so: impl FnOnce() -> bool) -> bool {
        !self.0[check].load(Relaxed) && is_so() && !self.0[check].swap(true, Relaxed)
    }
}
