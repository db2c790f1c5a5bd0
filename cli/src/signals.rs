//! S: the wishes of whoever started this process to stop it.

use std::future::{Future, pending};
use std::pin::pin;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::output::{Failure, Fault};

/// What a person or a CI system wants of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    Interrupt,
    Terminate,
}

pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    pub(crate) fn install() -> Result<Self, Failure> {
        let listen = |kind| signal(kind).map_err(|error| Failure::io("signals", &error));
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    /// Waits for the next wish. May be dropped while it waits.
    pub(crate) async fn next(&mut self) -> Told {
        tokio::select! {
            biased;
            Some(()) = self.interrupt.recv() => Told::Interrupt,
            Some(()) = self.terminate.recv() => Told::Terminate,
            // The terminal is gone: whoever typed the command cannot say what to do with the job.
            Some(()) = self.hangup.recv() => Told::Terminate,
            else => pending().await,
        }
    }

    /// Does some work that a wish to stop may drop.
    pub(crate) async fn unless_told<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Failure> {
        tokio::select! {
            biased;
            _ = self.next() => Err(Failure::new(Fault::Interrupted, "interrupted")),
            done = work => Ok(done),
        }
    }

    /// Does some work that the first wish to stop does not drop; true if there was one. The second one drops it.
    pub(crate) async fn finish_unless_told_twice<T>(
        &mut self,
        work: impl Future<Output = T>,
        heard: impl FnOnce(),
    ) -> Result<(T, bool), Failure> {
        let mut work = pin!(work);
        match self.unless_told(&mut work).await {
            Ok(done) => Ok((done, false)),
            Err(_) => {
                heard();
                Ok((self.unless_told(work).await?, true))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::{Signal as Sent, raise};
    use tokio::sync::oneshot;

    use super::*;

    /// In one test: every one of a process's listeners hears a signal.
    #[tokio::test]
    async fn the_first_wish_to_stop_lets_work_end_and_the_second_does_not() {
        let mut signals = Signals::install().unwrap();
        assert_eq!(signals.finish_unless_told_twice(async { 1 }, || panic!("nobody spoke")).await.unwrap(), (1, false));

        let (finish, finished) = oneshot::channel();
        raise(Sent::SIGHUP).unwrap();
        let heard = move || finish.send(2).unwrap();
        assert_eq!(signals.finish_unless_told_twice(finished, heard).await.unwrap(), (Ok(2), true));

        raise(Sent::SIGHUP).unwrap();
        let again = || raise(Sent::SIGHUP).unwrap();
        let left = signals.finish_unless_told_twice(pending::<()>(), again).await.unwrap_err();
        assert_eq!(left.fault, Fault::Interrupted);
    }
}
