//! P: workers as people see them, and draining.

use alloy_shared::env::Ms;
use alloy_shared::id::WorkerId;
use alloy_shared::limits::Limits;
use alloy_shared::wire::farm::{DrainRequest, WorkerState, WorkerView};
use alloy_shared::wire::session::SlotState;

use super::OpError;
use super::access::{commit_one, wrong_field};
use crate::App;
use crate::auth::Principal;
use crate::hub::LiveWorker;
use crate::store::write::SetWorker;
use crate::store::{Worker, Write};

const NOTE_MAX: usize = 200;

/// All workers of the caller's organisation that were not revoked.
pub async fn list(app: &App, who: &Principal) -> Result<Vec<WorkerView>, OpError> {
    let mut views = Vec::new();
    for worker in app.store.workers(&who.scope()).await?.into_iter().filter(|worker| !worker.revoked) {
        views.push(view(app, worker).await?);
    }
    Ok(views)
}

/// One worker that was not revoked.
pub async fn one(app: &App, who: &Principal, id: WorkerId) -> Result<Worker, OpError> {
    let found = app.store.worker(&who.scope(), &id).await?.filter(|worker| !worker.revoked);
    found.ok_or_else(|| OpError::not_found("worker"))
}

/// Lets a worker finish what it has and take no more, or take jobs again.
pub async fn set_drain(app: &App, who: &Principal, id: WorkerId, on: Option<DrainRequest>) -> Result<Worker, OpError> {
    let worker = one(app, who, id).await?;
    let draining = on.is_some();
    let note = on.and_then(|request| request.note);
    if let Some(text) = &note
        && (text.len() > NOTE_MAX || text.chars().any(char::is_control))
    {
        return Err(wrong_field("note", format!("is at most {NOTE_MAX} bytes without control characters")));
    }
    let set = SetWorker { org: worker.org, worker: id, draining, note: note.clone() };
    commit_one(app, Write::SetWorker(set)).await?;
    app.hub.set_drain(id, draining);
    Ok(Worker { draining, drain_note: note, ..worker })
}

/// Takes a worker out of the farm for ever: its session ends and no other opens. What it holds is tried elsewhere once it
/// has been silent for as long as a lease lasts, because until then it may still run. Revoking it again changes nothing.
pub async fn revoke(app: &App, who: &Principal, id: WorkerId) -> Result<(), OpError> {
    let worker = app.store.worker(&who.scope(), &id).await?.ok_or_else(|| OpError::not_found("worker"))?;
    commit_one(app, Write::RevokeWorker { org: worker.org, worker: id }).await?;
    app.hub.revoke(id);
    Ok(())
}

/// What the books say of a worker, and what its session says at this moment.
pub async fn view(app: &App, worker: Worker) -> Result<WorkerView, OpError> {
    let now = app.env.now();
    let live = app.hub.view(&worker.id, now.mono);
    let held = app.store.held(&worker.id).await?;
    // Others' that an orchestrator of before gave it keep it busy, and are nobody's business here.
    let own = held.iter().filter(|job| job.org == worker.org);
    let jobs = own.map(|job| job.id.to_string()).collect();
    let mut labels = worker.host_labels.clone();
    for (key, value) in worker.labels.iter() {
        // Labels of the enrolment win; together they may be more than the most, then the host's own stay out.
        if labels.insert(key, value).is_err() {
            labels = worker.labels.clone();
            break;
        }
    }
    let last_seen = match &live {
        Some(live) => Some(Ms(now.wall.0.saturating_sub_unsigned(live.silent_ms))),
        None => worker.seen_at,
    };
    let slots = live.as_ref().map_or(&[][..], |live| &live.slots);
    Ok(WorkerView {
        id: worker.id,
        state: state(&worker, !held.is_empty(), live.as_ref(), app.hub.is_in_grace(now.mono), &app.limits),
        slots: slots.len() as u32,
        slots_busy: slots.iter().filter(|slot| slot.attempt.is_some()).count() as u32,
        slots_warm: slots.iter().filter(|slot| slot.state == SlotState::Warm).count() as u32,
        labels: labels.iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
        last_seen_at: last_seen.map(Ms::rfc3339),
        name: worker.name,
        version: worker.version,
        drain_note: worker.drain_note,
        trouble: live.and_then(|live| live.trouble),
        jobs,
    })
}

/// How the holder of a job is at this moment.
pub fn state_of_holder(app: &App, worker: &Worker) -> WorkerState {
    let now = app.env.now().mono;
    state(worker, true, app.hub.view(&worker.id, now).as_ref(), app.hub.is_in_grace(now), &app.limits)
}

fn state(worker: &Worker, has_jobs: bool, live: Option<&LiveWorker>, in_grace: bool, limits: &Limits) -> WorkerState {
    let silent = |silent_ms: u64| match in_grace {
        // Nobody had time to come back yet.
        true => WorkerState::Suspect,
        false if silent_ms > limits.expiry_ms => WorkerState::Lost,
        false => WorkerState::Suspect,
    };
    let Some(live) = live else {
        // Without a boot it said goodbye to an earlier process of the farm, or never came.
        return if worker.boot.is_empty() { WorkerState::Offline } else { silent(u64::MAX) };
    };
    if live.left {
        return WorkerState::Offline;
    }
    if !live.connected || live.silent_ms >= limits.suspect_ms() {
        return silent(live.silent_ms);
    }
    let busy = has_jobs || live.slots.iter().any(|slot| slot.attempt.is_some());
    match worker.draining || live.stopping {
        true if busy => WorkerState::Draining,
        true => WorkerState::Drained,
        false if live.slots.iter().any(|slot| slot.state.is_free()) => WorkerState::Ready,
        false => WorkerState::Busy,
    }
}

#[cfg(test)]
mod tests {
    use alloy_shared::id::{AttemptRef, JobId};
    use alloy_shared::wire::session::{SlotState, SlotView};

    use super::*;

    fn worker(draining: bool) -> Worker {
        Worker { boot: "boot_1".into(), epoch: 1, draining, ..crate::tests::enrolled(1) }
    }

    fn slot(busy: bool) -> SlotView {
        let attempt = busy.then(|| AttemptRef { job: JobId::from_raw(1), attempt: 1 });
        SlotView { state: if busy { SlotState::Claimed } else { SlotState::Warm }, attempt, image: None }
    }

    #[test]
    fn a_worker_is_what_its_session_and_its_slots_say() {
        let limits = Limits::default();
        let live = |silent_ms, connected, busy: &[bool], stopping| {
            let slots = busy.iter().copied().map(slot).collect();
            let images = Default::default();
            Some(LiveWorker { silent_ms, connected, left: false, slots, images, stopping, trouble: None })
        };
        let left = |silent_ms| live(silent_ms, false, &[false], true).map(|live| LiveWorker { left: true, ..live });
        for (expect, drained, live) in [
            (WorkerState::Lost, false, None),
            (WorkerState::Lost, false, live(60_001, true, &[false], false)),
            (WorkerState::Suspect, false, live(0, false, &[false], false)),
            (WorkerState::Suspect, false, live(15_000, true, &[false], false)),
            (WorkerState::Ready, false, live(14_999, true, &[false], false)),
            (WorkerState::Offline, false, left(0)),
            (WorkerState::Offline, true, left(60_001)),
            (WorkerState::Ready, false, live(5_000, true, &[false, true], false)),
            (WorkerState::Busy, false, live(0, true, &[true, true], false)),
            (WorkerState::Draining, true, live(0, true, &[true, false], false)),
            (WorkerState::Draining, false, live(0, true, &[true], true)),
            (WorkerState::Drained, true, live(0, true, &[false], false)),
        ] {
            assert_eq!(state(&worker(drained), false, live.as_ref(), false, &limits), expect, "{live:?}");
        }
        let assigned = live(0, true, &[false], false);
        assert_eq!(state(&worker(true), true, assigned.as_ref(), false, &limits), WorkerState::Draining);
    }

    #[test]
    fn after_a_start_of_the_farm_nobody_is_lost_before_the_grace_is_over() {
        let limits = Limits::default();
        let gone = Worker { boot: String::new(), ..worker(false) };
        for (expect, worker, in_grace) in [
            (WorkerState::Suspect, worker(false), true),
            (WorkerState::Lost, worker(false), false),
            (WorkerState::Offline, gone.clone(), true),
            (WorkerState::Offline, gone, false),
        ] {
            assert_eq!(state(&worker, false, None, in_grace, &limits), expect, "{worker:?}");
        }
    }
}
