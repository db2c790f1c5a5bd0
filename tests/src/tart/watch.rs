//! Signals without handlers: they are blocked, and a thread waits for them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use nix::sys::signal::{SigSet, Signal};

/// The default action of SIGINT is off from the start, as in `tart`.
pub(crate) fn ignore_interrupts() {
    block(&[Signal::SIGINT]);
}

pub(crate) fn block(signals: &[Signal]) {
    let set: SigSet = signals.iter().copied().collect();
    set.thread_block().expect("signals can be blocked");
}

/// A child inherits the mask; programs of the guest must not.
pub(crate) fn unblock_all() {
    SigSet::all().thread_unblock().expect("signals can be unblocked");
}

/// Cancellation that a command looks at between its steps.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cancelled(Arc<AtomicBool>);

impl Cancelled {
    /// Set by the first SIGINT.
    pub(crate) fn by_interrupt() -> Cancelled {
        let cancelled = Cancelled::default();
        let flag = cancelled.clone();
        thread::spawn(move || {
            let set: SigSet = [Signal::SIGINT].into_iter().collect();
            if set.wait().is_ok() {
                flag.0.store(true, Ordering::Relaxed);
            }
        });
        cancelled
    }

    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Every one of these signals that arrives, in order. They must be blocked in all threads already.
pub(crate) fn each(signals: &[Signal]) -> mpsc::Receiver<Signal> {
    let set: SigSet = signals.iter().copied().collect();
    let (tell, heard) = mpsc::channel();
    thread::spawn(move || {
        while let Ok(signal) = set.wait() {
            if tell.send(signal).is_err() {
                break;
            }
        }
    });
    heard
}
