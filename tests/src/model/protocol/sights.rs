//! What must be reachable in the protocol's model, so that what holds everywhere does not hold of nothing.

use alloy_shared::wire::job::Reason;
use orchestrator::job::Step;
use stateright::Property;

use super::Protocol;
use super::state::{Farm, Run};

fn end(model: &Protocol, farm: &Farm) -> Option<(Option<Reason>, u8)> {
    let books = model.known.books.get(farm.books);
    match &books.job.state.step {
        Step::Done { end, .. } => Some((end.reason, books.made())),
        Step::Queued { .. } | Step::Assigned { .. } | Step::Running { .. } | Step::Canceling { .. } => None,
    }
}

fn succeeded(model: &Protocol, farm: &Farm, attempt: u8) -> bool {
    end(model, farm) == Some((None, attempt))
}

fn is_canceled(model: &Protocol, farm: &Farm) -> bool {
    farm.memory.canceled && end(model, farm) == Some((Some(Reason::UserCanceled), 1))
}

/// Both sides have nothing left of the job.
fn is_at_rest(farm: &Farm) -> bool {
    farm.net.is_empty() && farm.workers.iter().all(|w| w.spool == [None; 2] && w.runs == [Run::Nothing; 2])
}

pub fn properties() -> Vec<Property<Protocol>> {
    vec![
        Property::sometimes("a job succeeds and nothing of it is left over", |m: &Protocol, f: &Farm| {
            m.seen.sometimes(10, || succeeded(m, f, 1) && is_at_rest(f))
        }),
        Property::sometimes("a job succeeds at its second attempt after a worker died", |m, f: &Farm| {
            m.seen.sometimes(11, || f.memory.crashed_worker && !f.memory.early && succeeded(m, f, 2))
        }),
        Property::sometimes("a job outlives the orchestrator's death at its first attempt", |m, f: &Farm| {
            m.seen.sometimes(12, || f.memory.crashed_server && succeeded(m, f, 1) && is_at_rest(f))
        }),
        Property::sometimes("a result survives its worker's death", |m, f: &Farm| {
            m.seen.sometimes(13, || f.memory.crashed_worker && succeeded(m, f, 1) && is_at_rest(f))
        }),
        Property::sometimes("a running job is canceled and its command is gone", |m, f: &Farm| {
            m.seen.sometimes(14, || is_canceled(m, f) && f.logs[0].len > 0 && is_at_rest(f))
        }),
        Property::sometimes("a command ends by itself before its cancel reaches it", |m, f: &Farm| {
            m.seen.sometimes(15, || f.memory.canceled && succeeded(m, f, 1))
        }),
        Property::sometimes("a cancel outlives the orchestrator's death", |m, f: &Farm| {
            m.seen.sometimes(16, || f.memory.crashed_server && is_canceled(m, f))
        }),
        Property::sometimes("a lost attempt's rest of log arrives while the next one runs", |m, f: &Farm| {
            let runs = || f.workers.iter().any(|w| matches!(w.runs[1], Run::Command { .. }));
            m.seen.sometimes(17, || f.logs[0].sealed && f.logs[0].len > 0 && runs())
        }),
        Property::sometimes("clocks that are not kept let two commands run", |m, f: &Farm| {
            m.seen.sometimes(18, || super::rules::commands(f) > 1)
        }),
        Property::sometimes("a message of a connection that was replaced is still read", |m, f: &Farm| {
            m.seen.sometimes(19, || f.old.iter().any(|old| f.sessions[usize::from(old.worker)].is_some()))
        }),
    ]
}
