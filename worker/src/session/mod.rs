//! T: the worker's half of the conversation with the orchestrator: what goes in, what comes out, and the fence.
//!
//! [`core`] decides, [`drive`] performs. Executors and the pool talk to the core through [`Inputs`]; the core's lease
//! reaches the guards through [`Fence`].

mod attempt;
pub mod core;
pub mod drive;

use alloy_shared::env::Mono;
use alloy_shared::id::{AttemptRef, Digest};
use alloy_shared::wire::ErrorCode;
use alloy_shared::wire::image::{ImageWish, Inventory};
use alloy_shared::wire::session::{Assignment, Held, Report, SlotView, ToOrchestrator, ToWorker};
use tokio::sync::{mpsc, watch};

pub use self::core::Core;
use crate::vm_care::Trouble;

/// The door to a session's core. Executors, the pool and the images send `Report`, `Spooled`, `Slots`, `Images`, `Trouble`
/// and `Closed`, nothing else.
pub type Inputs = mpsc::Sender<Input>;

/// Inputs that may wait for the session. A full channel slows the executors, never the session.
pub const INPUT_QUEUE: usize = 1_024;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// The dial succeeded.
    Linked,
    /// The dial failed, or the connection was cut.
    Unlinked,
    /// The farm answered the dial with a refusal.
    Rejected {
        code: ErrorCode,
        message: String,
        retry_after_ms: Option<u64>,
    },
    Heard(ToWorker),
    /// A message of a type that this build does not know.
    Unknown(String),
    /// A frame that is no message at all.
    Garbled(String),
    Report {
        attempt: AttemptRef,
        report: Report,
    },
    /// The report is on disk.
    Recorded {
        attempt: AttemptRef,
        seq: u64,
    },
    /// The attempt's log in the spool is this long.
    Spooled {
        attempt: AttemptRef,
        len: u64,
    },
    Slots(Vec<SlotView>),
    /// What images there are.
    Images(Inventory),
    /// The executor is gone, the slot is clean.
    Closed {
        attempt: AttemptRef,
        teardown_ms: u64,
    },
    /// The spool could not take the attempt: nothing was started.
    NotStarted {
        attempt: AttemptRef,
        message: String,
    },
    /// An [`Effect::Upload`] is over.
    Uploaded {
        attempt: AttemptRef,
        complete: bool,
    },
    /// The link takes one more log frame.
    Room,
    /// The disk has too little room for new work, or has enough again.
    Full(bool),
    /// What a person should look after on this host, or that it is over.
    Trouble(Option<Trouble>),
    Drain,
    Tick,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    Dial {
        after_ms: u64,
    },
    Hangup(Reason),
    /// Answers the challenge: sign the nonce and send the hello with these contents.
    Hello {
        nonce: String,
        slots: Vec<SlotView>,
        held: Vec<Held>,
        draining: bool,
        trouble: Option<String>,
    },
    Send(ToOrchestrator),
    SendLog {
        attempt: AttemptRef,
        handle: u32,
        from: u64,
        len: u32,
    },
    /// So much of the log is durable at the orchestrator.
    Release {
        attempt: AttemptRef,
        durable: u64,
    },
    Record {
        attempt: AttemptRef,
        seq: u64,
        report: Report,
    },
    Start(Box<Assignment>),
    Stop {
        attempt: AttemptRef,
        how: Stop,
    },
    /// Sends artifacts from the spool again, which the orchestrator says it does not have.
    Upload {
        attempt: AttemptRef,
        artifacts: Vec<Digest>,
    },
    Forget {
        attempt: AttemptRef,
    },
    FenceAt(Mono),
    /// What the farm wishes of images: the whole list.
    Wish(Vec<ImageWish>),
}

/// How an executor is to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    Cancel { grace_ms: u64 },
    Kill(KillReason),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KillReason {
    Fenced,
    LeaseLost,
    Shutdown,
}

/// Why the core hangs up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    Silent,
    Rejected {
        code: ErrorCode,
        message: String,
    },
    /// Asking again does not help: nothing but a person changes the answer. The daemon ends.
    Refused {
        code: ErrorCode,
        message: String,
    },
    /// Another process uses this worker's identity. The daemon ends.
    Superseded,
    /// The orchestrator is restarting.
    Asked,
    Garbled(String),
    Protocol(u32),
}

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
