//! D: the one table between what a job says and what the worker says. Used at hello, at every change, in every heartbeat.

use crate::job::{State, Step};

/// What the worker says of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Say {
    NotHeld,
    Running,
    ResultPending,
    /// The daemon died under it; only its log's tail is left.
    Lost,
}

/// What the orchestrator wants of the attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    Nothing,
    Assign,
    Continue,
    Cancel,
    Fence,
    /// The attempt is gone: the desk decides what follows.
    SettleLost,
}

/// `state` is the job's, if its current attempt is this one and leased to this worker; else `None`. `counts` says
/// whether "not held" was said after the assignment was heard.
pub fn reconcile(state: Option<&State>, say: Say, counts: bool) -> Want {
    let Some(state) = state else {
        return match say {
            Say::NotHeld => Want::Nothing,
            Say::Running | Say::ResultPending => Want::Fence,
            Say::Lost => Want::Continue,
        };
    };
    match (&state.step, say) {
        (Step::Assigned { .. }, Say::NotHeld) if counts => Want::Assign,
        (Step::Assigned { .. } | Step::Running { .. }, Say::Running | Say::ResultPending) => Want::Continue,
        (Step::Running { .. } | Step::Canceling { .. }, Say::NotHeld) if counts => Want::SettleLost,
        (Step::Assigned { .. } | Step::Running { .. } | Step::Canceling { .. }, Say::Lost) => Want::SettleLost,
        (Step::Canceling { .. }, Say::Running) => Want::Cancel,
        (Step::Canceling { .. }, Say::ResultPending) => Want::Continue,
        (Step::Assigned { .. } | Step::Running { .. } | Step::Canceling { .. }, Say::NotHeld) => Want::Nothing,
        (Step::Queued { .. } | Step::Done { .. }, _) => Want::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{Lease, Then, Tries};
    use alloy_shared::env::Ms;
    use alloy_shared::id::WorkerId;
    use alloy_shared::wire::job::{Phase, Reason};

    #[test]
    fn the_table_is_as_designed() {
        let lease = Lease { attempt: 1, worker: WorkerId::from_raw(1), assigned_at: Ms(0), avoid: Vec::new() };
        let state = |step| State { tries: Tries { made: 1, lost: 0, failed: 0 }, step };
        let assigned = state(Step::Assigned { lease: lease.clone() });
        let running = state(Step::Running { lease: lease.clone(), accepted_at: Ms(0), phase: Phase::Executing });
        let canceling = state(Step::Canceling { lease, since: Ms(0), then: Then::End(Reason::UserCanceled) });
        use Want::{Assign, Cancel, Continue, Fence, Nothing, SettleLost};
        for (state, wants) in [
            (Some(&assigned), [Assign, Continue, Continue, SettleLost]),
            (Some(&running), [SettleLost, Continue, Continue, SettleLost]),
            (Some(&canceling), [SettleLost, Cancel, Continue, SettleLost]),
            (None, [Nothing, Fence, Fence, Continue]),
        ] {
            for (say, want) in [Say::NotHeld, Say::Running, Say::ResultPending, Say::Lost].into_iter().zip(wants) {
                assert_eq!(reconcile(state, say, true), want, "{state:?} {say:?}");
            }
            assert_eq!(reconcile(state, Say::NotHeld, false), Nothing, "a silence that proves nothing: {state:?}");
        }
    }
}
