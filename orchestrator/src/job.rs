//! D: the life of a job. [`apply`] is the only place where a job's state changes; it is total, pure and takes `now`.
//!
//! An attempt's number is its fence: news of another attempt is refused as stale. `Done` is absorbing. Every other
//! state has a deadline, so nothing can wait for ever on a worker that says nothing.

use alloy_shared::env::Ms;
use alloy_shared::id::WorkerId;
use alloy_shared::limits::{HANDED_BACK_MAX, Limits};
use alloy_shared::wire::job::{Blame, End, JobSpec, Phase, Reason, StateWord};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub tries: Tries,
    pub step: Step,
}

/// How often it was tried, and why again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tries {
    /// Attempts made; the newest one's number.
    pub made: u32,
    /// Attempts that the farm lost.
    pub lost: u32,
    /// Attempts that failed by themselves and were tried again.
    pub failed: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Any other worker is better than those in `avoid`, where one qualifies.
    Queued {
        since: Ms,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        avoid: Vec<WorkerId>,
    },
    Assigned {
        lease: Lease,
    },
    Running {
        lease: Lease,
        accepted_at: Ms,
        phase: Phase,
    },
    Canceling {
        lease: Lease,
        since: Ms,
        then: Then,
    },
    Done {
        end: End,
        at: Ms,
    },
}

/// One worker's right to the newest attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    pub attempt: u32,
    pub worker: WorkerId,
    pub assigned_at: Ms,
    /// Whoever lost an earlier attempt, in the order of their last losses. As many as a job may be lost and handed back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub avoid: Vec<WorkerId>,
}

impl Lease {
    /// Whom the job avoids once this worker has lost it too.
    pub fn losers(&self) -> Vec<WorkerId> {
        let others = self.avoid.iter().filter(|worker| **worker != self.worker);
        others.copied().chain([self.worker]).collect()
    }
}

/// How long a state may last, and from when on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Term {
    pub from: Ms,
    pub ms: u64,
}

impl Term {
    /// What is left of it by the wall clock. A clock that went back does not make it longer than it is.
    pub fn left(self, now: Ms) -> u64 {
        self.from.plus(self.ms).since(now).min(self.ms)
    }
}

/// What follows when the worker has let go of a canceled attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Then {
    End(Reason),
    /// The assignment was revoked; the job is tried elsewhere.
    Requeue(Reason),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Assigned {
        worker: WorkerId,
    },
    Accepted {
        attempt: u32,
    },
    /// The worker did not start it.
    Refused {
        attempt: u32,
        message: String,
    },
    Phase {
        attempt: u32,
        phase: Phase,
    },
    Artifact {
        attempt: u32,
    },
    Finished {
        attempt: u32,
        end: End,
    },
    /// The worker does not have it any more, or is not there any more.
    Lost {
        attempt: u32,
        reason: Reason,
        message: String,
    },
    CancelAsked {
        reason: Reason,
    },
    /// Every worker that could run it has said that its image is not to be had.
    NoImage {
        message: String,
    },
    /// The state has lasted as long as it may, by the desk's monotonic clock: the wall clock may say anything.
    DeadlinePassed {
        /// Why it still waits, if it does.
        why: String,
    },
}

/// Why an event changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// It is about an attempt that is not the current one.
    Stale,
    /// The job has ended.
    Terminal,
    /// It is so already.
    Already,
    /// Nobody should have sent it in this state.
    Impossible,
}

/// What decides about one job: its own wishes within the farm's limits, and what the desk sees of the farm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    pub retries: u32,
    pub lost_max: u32,
    pub lost_hosts_max: u32,
    /// A worker is there that could run it and has not lost it. So far its losses may be the other workers' fault.
    pub untried: bool,
    pub queue_ms: u64,
    pub accept_ms: u64,
    /// From acceptance to the moment when the worker must have ended it by its own timers.
    pub run_ms: u64,
    pub cancel_ms: u64,
}

impl Rules {
    pub fn of(spec: &JobSpec, limits: &Limits) -> Self {
        let timeout = spec.timeout_ms.unwrap_or(limits.job_timeout_ms).min(limits.job_timeout_max_ms);
        let ending = limits.cancel_grace_ms + limits.kill_budget_ms + limits.collect_ms + limits.backstop_ms;
        Self {
            retries: spec.retries,
            lost_max: limits.lost_max,
            lost_hosts_max: limits.lost_hosts_max,
            untried: false,
            queue_ms: spec.queue_timeout_ms.unwrap_or(limits.queue_timeout_ms),
            accept_ms: limits.accept_ms,
            run_ms: limits.image_ms + limits.claim_ms + limits.hook_ms + limits.stage_source_ms + timeout + ending,
            cancel_ms: ending,
        }
    }
}

impl State {
    pub fn new(now: Ms) -> Self {
        Self { tries: Tries::default(), step: Step::Queued { since: now, avoid: Vec::new() } }
    }

    pub fn word(&self) -> StateWord {
        match &self.step {
            Step::Queued { .. } => StateWord::Queued,
            Step::Assigned { .. } => StateWord::Assigned,
            Step::Running { .. } => StateWord::Running,
            Step::Canceling { .. } => StateWord::Canceling,
            Step::Done { end, .. } => end.outcome().into(),
        }
    }

    pub fn lease(&self) -> Option<&Lease> {
        match &self.step {
            Step::Assigned { lease } | Step::Running { lease, .. } | Step::Canceling { lease, .. } => Some(lease),
            Step::Queued { .. } | Step::Done { .. } => None,
        }
    }

    pub fn phase(&self) -> Option<Phase> {
        match &self.step {
            Step::Running { phase, .. } => Some(*phase),
            Step::Queued { .. } | Step::Assigned { .. } | Step::Canceling { .. } | Step::Done { .. } => None,
        }
    }

    pub fn is_done(&self) -> bool {
        matches!(self.step, Step::Done { .. })
    }

    /// Since when it is so, and how long it may stay so. Only `Done` may last.
    pub fn term(&self, rules: &Rules) -> Option<Term> {
        let (from, ms) = match &self.step {
            Step::Queued { since, .. } => (*since, rules.queue_ms),
            Step::Assigned { lease } => (lease.assigned_at, rules.accept_ms),
            Step::Running { accepted_at, .. } => (*accepted_at, rules.run_ms),
            Step::Canceling { since, .. } => (*since, rules.cancel_ms),
            Step::Done { .. } => return None,
        };
        Some(Term { from, ms })
    }
}

/// Returns the state after the event, or why there is no change.
pub fn apply(state: &State, event: &Event, now: Ms, rules: &Rules) -> Result<State, Refused> {
    if state.is_done() {
        return Err(Refused::Terminal);
    }
    check_fence(state, event)?;
    let tries = state.tries;
    match &state.step {
        Step::Queued { avoid, .. } => queued(tries, avoid, event, now),
        Step::Assigned { lease } => assigned(tries, lease, event, now, rules),
        Step::Running { lease, accepted_at, phase } => running(tries, lease, (*accepted_at, *phase), event, now, rules),
        Step::Canceling { lease, since, then } => canceling(tries, lease, (*since, *then), event, now, rules),
        Step::Done { .. } => Err(Refused::Terminal),
    }
}

/// News of an attempt counts only while that attempt is the current one.
fn check_fence(state: &State, event: &Event) -> Result<(), Refused> {
    let attempt = match event {
        Event::Accepted { attempt }
        | Event::Refused { attempt, .. }
        | Event::Phase { attempt, .. }
        | Event::Artifact { attempt }
        | Event::Finished { attempt, .. }
        | Event::Lost { attempt, .. } => *attempt,
        Event::Assigned { .. } | Event::CancelAsked { .. } | Event::NoImage { .. } | Event::DeadlinePassed { .. } => {
            return Ok(());
        }
    };
    match state.lease() {
        Some(lease) if lease.attempt == attempt => Ok(()),
        Some(_) | None => Err(Refused::Stale),
    }
}

fn queued(tries: Tries, avoid: &[WorkerId], event: &Event, now: Ms) -> Result<State, Refused> {
    match event {
        Event::Assigned { worker } => {
            let tries = Tries { made: tries.made + 1, ..tries };
            let lease = Lease { attempt: tries.made, worker: *worker, assigned_at: now, avoid: avoid.to_vec() };
            Ok(State { tries, step: Step::Assigned { lease } })
        }
        Event::CancelAsked { reason } => Ok(done(tries, End::because(*reason, "canceled while it waited"), now)),
        Event::NoImage { message } => Ok(done(tries, End::because(Reason::ImagePullFailure, message.clone()), now)),
        Event::DeadlinePassed { why } => Ok(done(tries, End::because(Reason::QueueExpired, why.clone()), now)),
        Event::Accepted { .. }
        | Event::Refused { .. }
        | Event::Phase { .. }
        | Event::Artifact { .. }
        | Event::Finished { .. }
        | Event::Lost { .. } => Err(Refused::Stale),
    }
}

fn assigned(tries: Tries, lease: &Lease, event: &Event, now: Ms, rules: &Rules) -> Result<State, Refused> {
    match event {
        Event::Accepted { .. } => {
            Ok(State { tries, step: Step::Running { lease: lease.clone(), accepted_at: now, phase: Phase::Preparing } })
        }
        Event::Refused { message, .. } => Ok(lost(tries, lease, Reason::WorkerLost, message, now, rules)),
        Event::Lost { reason, message, .. } => Ok(lost(tries, lease, *reason, message, now, rules)),
        Event::Finished { end, .. } => Ok(finished(tries, lease, end, now, rules)),
        Event::CancelAsked { reason } => Ok(cancel(tries, lease, Then::End(*reason), now)),
        // The worker may have started it without our knowing: revoke first, so that never two of its VMs are alive.
        Event::DeadlinePassed { .. } => Ok(cancel(tries, lease, Then::Requeue(Reason::WorkerLost), now)),
        Event::Assigned { .. } | Event::Phase { .. } | Event::Artifact { .. } | Event::NoImage { .. } => {
            Err(Refused::Impossible)
        }
    }
}

fn running(
    tries: Tries,
    lease: &Lease,
    (accepted_at, current): (Ms, Phase),
    event: &Event,
    now: Ms,
    rules: &Rules,
) -> Result<State, Refused> {
    let stay = |phase| Ok(State { tries, step: Step::Running { lease: lease.clone(), accepted_at, phase } });
    match event {
        Event::Phase { phase, .. } if *phase < current => Err(Refused::Impossible),
        Event::Phase { phase, .. } => stay(*phase),
        Event::Artifact { .. } => stay(current),
        // A command that has begun may have done anything: whoever lets go of it then has lost it.
        Event::Finished { end, .. } if current > Phase::Preparing && is_handed_back(end) => {
            Ok(lost(tries, lease, end.reason.unwrap_or(Reason::InternalError), &end.message, now, rules))
        }
        Event::Finished { end, .. } => Ok(finished(tries, lease, end, now, rules)),
        Event::Lost { reason, message, .. } => Ok(lost(tries, lease, *reason, message, now, rules)),
        Event::CancelAsked { reason } => Ok(cancel(tries, lease, Then::End(*reason), now)),
        Event::DeadlinePassed { .. } => Ok(cancel(tries, lease, Then::End(Reason::RunTimeout), now)),
        Event::Accepted { .. } => Err(Refused::Already),
        Event::Assigned { .. } | Event::Refused { .. } | Event::NoImage { .. } => Err(Refused::Impossible),
    }
}

fn canceling(
    tries: Tries,
    lease: &Lease,
    (since, then): (Ms, Then),
    event: &Event,
    now: Ms,
    rules: &Rules,
) -> Result<State, Refused> {
    let stay = |then| Ok(State { tries, step: Step::Canceling { lease: lease.clone(), since, then } });
    match (event, then) {
        (Event::Accepted { .. } | Event::Phase { .. } | Event::Artifact { .. }, _) => stay(then),
        // The command may have ended before the order reached it; then its own end is the truth.
        (Event::Finished { end, .. }, Then::End(_)) if is_own_end(end) => Ok(done(tries, end.clone(), now)),
        (Event::Finished { end, .. }, Then::Requeue(_)) if is_own_end(end) => {
            Ok(finished(tries, lease, end, now, rules))
        }
        (Event::Finished { .. } | Event::Lost { .. } | Event::Refused { .. }, Then::End(reason)) => {
            Ok(done(tries, canceled_end(reason, event), now))
        }
        (Event::Finished { .. } | Event::Lost { .. } | Event::Refused { .. }, Then::Requeue(reason)) => {
            Ok(lost(tries, lease, reason, "the worker did not accept it in time", now, rules))
        }
        (Event::CancelAsked { reason }, Then::Requeue(_)) => stay(Then::End(*reason)),
        (Event::CancelAsked { .. }, Then::End(_)) => Err(Refused::Already),
        (Event::DeadlinePassed { .. }, Then::End(reason)) => {
            Ok(done(tries, End::because(reason, "the worker did not confirm the end in time"), now))
        }
        // It is connected and does not let go: to try elsewhere could run the job twice.
        (Event::DeadlinePassed { .. }, Then::Requeue(_)) => {
            Ok(done(tries, End::because(Reason::InternalError, "the worker neither ran nor released it"), now))
        }
        (Event::Assigned { .. } | Event::NoImage { .. }, _) => Err(Refused::Impossible),
    }
}

/// True for an end that the command reached by itself.
fn is_own_end(end: &End) -> bool {
    match end.blame() {
        None | Some(Blame::User) => true,
        Some(Blame::Policy) => end.reason == Some(Reason::RunTimeout),
        Some(Blame::Farm) => false,
    }
}

fn canceled_end(reason: Reason, event: &Event) -> End {
    let message = match event {
        Event::Finished { end, .. } => end.message.clone(),
        Event::Lost { message, .. } => format!("canceled; the worker was lost meanwhile: {message}"),
        Event::Refused { .. }
        | Event::Assigned { .. }
        | Event::Accepted { .. }
        | Event::Phase { .. }
        | Event::Artifact { .. }
        | Event::CancelAsked { .. }
        | Event::NoImage { .. }
        | Event::DeadlinePassed { .. } => String::new(),
    };
    End::because(reason, message)
}

fn finished(tries: Tries, lease: &Lease, end: &End, now: Ms, rules: &Rules) -> State {
    // A job that was handed back has not run there: that is no try, but it does not go on for ever.
    let handed_back = tries.made.saturating_sub(1 + tries.lost + tries.failed);
    match end.blame() {
        Some(Blame::Farm) if is_handed_back(end) && handed_back < HANDED_BACK_MAX => {
            State { tries, step: Step::Queued { since: now, avoid: lease.losers() } }
        }
        Some(Blame::Farm) => lost(tries, lease, end.reason.unwrap_or(Reason::InternalError), &end.message, now, rules),
        Some(Blame::User) if tries.failed < rules.retries => {
            let tries = Tries { failed: tries.failed + 1, ..tries };
            State { tries, step: Step::Queued { since: now, avoid: lease.avoid.clone() } }
        }
        Some(Blame::User) | Some(Blame::Policy) | None => done(tries, end.clone(), now),
    }
}

/// True if the worker did not begin with it: it let go, or the image did not come.
fn is_handed_back(end: &End) -> bool {
    matches!(end.reason, Some(Reason::WorkerDrained | Reason::ImagePullFailure))
}

/// The farm's fault: tried again elsewhere, never charged to the user, but not for ever. A job that has killed one worker
/// after the other does not go through the whole farm.
fn lost(tries: Tries, lease: &Lease, reason: Reason, message: &str, now: Ms, rules: &Rules) -> State {
    let requeues_max = if rules.untried { rules.lost_hosts_max } else { rules.lost_max };
    if tries.lost >= requeues_max {
        return done(tries, End::because(reason, message), now);
    }
    let tries = Tries { lost: tries.lost + 1, ..tries };
    State { tries, step: Step::Queued { since: now, avoid: lease.losers() } }
}

fn cancel(tries: Tries, lease: &Lease, then: Then, now: Ms) -> State {
    State { tries, step: Step::Canceling { lease: lease.clone(), since: now, then } }
}

fn done(tries: Tries, end: End, now: Ms) -> State {
    State { tries, step: Step::Done { end, at: now } }
}

#[cfg(test)]
mod tests;
