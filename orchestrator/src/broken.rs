//! T: a disk that failed. What it holds is not known from then on: nothing more is acknowledged, the process ends, and the
//! next one goes on from what is durable.

use std::fmt::Display;

use tokio_util::sync::CancellationToken;

/// Shared by all that write to one disk.
#[derive(Debug, Clone, Default)]
pub struct Broken(CancellationToken);

impl Broken {
    /// Says that a write or a sync failed for another reason than a full disk.
    pub fn tell(&self, what: &str, error: &dyn Display) {
        if !self.0.is_cancelled() {
            tracing::error!(
                "the farm's disk fails ({what}: {error}): nothing is acknowledged any more and the orchestrator ends. Look at \
                 the disk, then start it again: it goes on from what is stored"
            );
        }
        self.0.cancel();
    }

    pub fn is_told(&self) -> bool {
        self.0.is_cancelled()
    }

    /// Returns when it was said.
    pub async fn told(&self) {
        self.0.cancelled().await;
    }
}

/// How the farm's bytes are kept: how much space stays free, and whom to tell when the disk fails.
#[derive(Debug, Clone, Default)]
pub struct Care {
    /// Below this many free bytes nothing new is stored.
    pub floor: u64,
    /// What runs already is stored down to this.
    pub reserve: u64,
    pub broken: Broken,
}

impl From<u64> for Care {
    fn from(floor: u64) -> Self {
        Self { floor, reserve: floor, broken: Broken::default() }
    }
}
