//! D: what a change of state leaves in the books: events, the attempt's row, timings, artifacts.

use std::collections::BTreeMap;

use alloy_shared::env::Ms;
use alloy_shared::wire::job::{Blame, End, EventKind, Reason, Timings};

use super::{Live, News};
use crate::job::{Event, State, Step, Then};
use crate::store::{Artifact, Attempt, Job, JobEventRow};

/// The rows that go with a new state.
pub(super) struct Change {
    pub events: Vec<JobEventRow>,
    pub artifacts: Vec<Artifact>,
    /// True when the attempt's row changed.
    pub attempt: bool,
}

pub(super) fn submitted(job: &Job, now: Ms) -> JobEventRow {
    row(job, &job.state, 1, now, EventKind::Submitted)
}

/// Makes `live` what it is after the event and returns the rows for it.
pub(super) fn enter(live: &mut Live, state: State, event: &Event, report: Option<(u64, News)>, now: Ms) -> Change {
    let before = std::mem::replace(&mut live.job.state, state);
    live.job.version += 1;
    let mut change = Change { events: Vec::new(), artifacts: Vec::new(), attempt: false };
    if let Event::Assigned { worker } = event {
        let queue_ms = match &before.step {
            Step::Queued { since, .. } => Some(now.since(*since)),
            Step::Assigned { .. } | Step::Running { .. } | Step::Canceling { .. } | Step::Done { .. } => None,
        };
        live.attempt = Some(Attempt {
            at: live.job.attempt(),
            org: live.job.org,
            worker: *worker,
            assigned_at: now,
            ended_at: None,
            end: None,
            timings: Timings { queue_ms, ..Timings::default() },
            seq: 0,
            facts: BTreeMap::new(),
            log_len: None,
            log_gone_at: None,
            files_gone_at: None,
        });
        change.attempt = true;
    }
    let message = note(live, &before, event, report, now, &mut change);
    if let Some(mut event_row) = event_row(live, &before, event, now) {
        live.job.events += 1;
        event_row.seq = live.job.events;
        event_row.message = event_row.message.filter(|text| !text.is_empty()).or(message);
        event_row.artifact = change.artifacts.first().map(|artifact| artifact.path.clone());
        change.events.push(event_row);
    }
    change
}

/// Brings the attempt's row up to date. Returns what the worker said beside the event.
fn note(
    live: &mut Live,
    before: &State,
    event: &Event,
    report: Option<(u64, News)>,
    now: Ms,
    change: &mut Change,
) -> Option<String> {
    let attempt = live.attempt.as_mut()?;
    let mut message = None;
    if let Some((seq, news)) = report {
        attempt.seq = seq;
        merge(&mut attempt.timings, &news.timings);
        // What was said first was acted upon, and shown: a later word does not change it.
        for (name, value) in news.facts {
            attempt.facts.entry(name).or_insert(value);
        }
        change.artifacts.extend(news.artifact);
        message = news.message;
        change.attempt = true;
    }
    if matches!(event, Event::Accepted { .. }) && attempt.timings.assign_ms.is_none() {
        attempt.timings.assign_ms = Some(now.since(attempt.assigned_at));
    }
    if before.lease().is_some() && live.job.state.lease().is_none() {
        attempt.ended_at = Some(now);
        attempt.end = Some(attempt_end(before, event, &live.job.state));
        change.attempt = true;
    }
    message
}

/// The stages that the worker measured; the others are ours.
fn merge(ours: &mut Timings, theirs: &Timings) {
    ours.vm_ms = theirs.vm_ms.or(ours.vm_ms);
    ours.vm = theirs.vm.clone().or(ours.vm.take());
    ours.source_ms = theirs.source_ms.or(ours.source_ms);
    ours.exec_ms = theirs.exec_ms.or(ours.exec_ms);
    ours.collect_ms = theirs.collect_ms.or(ours.collect_ms);
}

fn attempt_end(before: &State, event: &Event, after: &State) -> End {
    let revoked = match &before.step {
        Step::Canceling { then: Then::Requeue(reason), .. } => Some(*reason),
        Step::Queued { .. }
        | Step::Assigned { .. }
        | Step::Running { .. }
        | Step::Canceling { .. }
        | Step::Done { .. } => None,
    };
    match (event, &after.step) {
        (_, Step::Done { end, .. }) => end.clone(),
        // The worker let go as it was told to. Nobody canceled the job.
        (Event::Finished { end, .. }, _) if end.blame() != Some(Blame::User) && revoked.is_some() => {
            End::because(revoked.unwrap_or(Reason::WorkerLost), "the assignment was revoked")
        }
        (Event::Finished { end, .. }, _) => end.clone(),
        (Event::Lost { reason, message, .. }, _) => End::because(*reason, message.clone()),
        (Event::Refused { message, .. }, _) => End::because(Reason::WorkerLost, message.clone()),
        (
            Event::Assigned { .. }
            | Event::Accepted { .. }
            | Event::Phase { .. }
            | Event::Artifact { .. }
            | Event::CancelAsked { .. }
            | Event::NoImage { .. }
            | Event::DeadlinePassed { .. },
            _,
        ) => End::because(Reason::WorkerLost, "the assignment was revoked"),
    }
}

/// What a follower is told. News that changes nothing visible leaves no event.
fn event_row(live: &Live, before: &State, event: &Event, now: Ms) -> Option<JobEventRow> {
    let state = &live.job.state;
    let kind = match (&state.step, event) {
        (Step::Done { .. }, _) => EventKind::Finished,
        (Step::Queued { .. }, _) => EventKind::Requeued,
        (_, Event::Assigned { .. }) => EventKind::Assigned,
        (_, Event::Accepted { .. }) => EventKind::Accepted,
        (_, Event::Artifact { .. }) => EventKind::Artifact,
        (_, Event::Phase { .. }) if state.phase().is_some() && state.phase() != before.phase() => EventKind::Phase,
        (Step::Canceling { .. }, Event::CancelAsked { .. } | Event::DeadlinePassed { .. }) => {
            EventKind::CancelRequested
        }
        (Step::Assigned { .. } | Step::Running { .. } | Step::Canceling { .. }, _) => return None,
    };
    let mut row = row(&live.job, state, live.attempt.as_ref().map_or(0, |attempt| attempt.at.attempt), now, kind);
    let told = match (&state.step, &live.attempt) {
        (Step::Done { end, .. }, _) => Some((end.reason, end.message.clone())),
        (Step::Queued { .. }, Some(attempt)) => attempt.end.as_ref().map(|end| (end.reason, end.message.clone())),
        (Step::Canceling { then: Then::End(reason) | Then::Requeue(reason), .. }, _)
            if kind == EventKind::CancelRequested =>
        {
            Some((Some(*reason), String::new()))
        }
        (Step::Queued { .. } | Step::Assigned { .. } | Step::Running { .. } | Step::Canceling { .. }, _) => None,
    };
    if let Some((reason, message)) = told {
        row.reason = reason;
        row.message = Some(message);
    }
    row.worker = live.attempt.as_ref().filter(|_| row.attempt > 0).map(|attempt| attempt.worker);
    Some(row)
}

fn row(job: &Job, state: &State, attempt: u32, at: Ms, kind: EventKind) -> JobEventRow {
    JobEventRow {
        job: job.id,
        seq: job.events,
        at,
        attempt: if kind == EventKind::Submitted { 0 } else { attempt },
        kind,
        state: state.word(),
        phase: state.phase(),
        reason: None,
        worker: None,
        message: None,
        artifact: None,
    }
}
