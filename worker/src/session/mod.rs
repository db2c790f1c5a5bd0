//! T: the worker's half of the conversation with the orchestrator: what goes in, what comes out, and the fence.
//!
//! [`core`] decides, [`drive`] performs. Executors and the pool talk to the core through [`Inputs`]; the core's lease
//! reaches the guards through [`Fence`].

mod attempt;
pub mod core;

use alloy_shared::env::Mono;
use tokio::sync::{mpsc, watch};

pub use self::core::{Core, Effect, Input, KillReason, Stop};

/// The door to a session's core. Executors and the pool send `Report`, `Spooled`, `Slots` and `Closed`, nothing else.
pub type Inputs = mpsc::Sender<Input>;

/// Inputs that may wait for the session. A full channel slows the executors, never the session.
pub const INPUT_QUEUE: usize = 1_024;

/// The moment at which the lease ends, unless it is renewed before. Guards kill what they guard when it has passed.
#[derive(Debug)]
pub struct Fence(watch::Sender<Mono>);

impl Fence {
    /// Before the first lease there is nothing to fence: the moment is the end of time.
    pub fn new() -> Self {
        Self(watch::Sender::new(Mono(u64::MAX)))
    }

    pub fn set(&self, at: Mono) {
        self.0.send_replace(at);
    }

    pub fn watch(&self) -> watch::Receiver<Mono> {
        self.0.subscribe()
    }
}

impl Default for Fence {
    fn default() -> Self {
        Self::new()
    }
}
