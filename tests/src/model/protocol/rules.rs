//! What can happen in a state of the protocol's model, and what must hold in each.

use alloy_shared::wire::session::{Order, Report, ToOrchestrator, ToWorker};
use orchestrator::job::Step;
use stateright::Property;

use super::super::mutant::Mutant;
use super::books::index_of;
use super::state::{Action, Farm, LOG_LEN, Msg, Run, Stop, byte};
use super::{Protocol, Text};

pub fn actions(model: &Protocol, farm: &Farm, out: &mut Vec<Action>) {
    let books = model.known.books.get(farm.books);
    let state = &books.job.state;
    let unlucky = farm.left.misfortunes > 0;
    for w in 0..2u8 {
        let worker = &farm.workers[usize::from(w)];
        let idle = worker.runs == [Run::Nothing; 2];
        // Workers are alike: the first attempt goes to the first one.
        let first = books.made() > 0 || w == 0;
        if matches!(state.step, Step::Queued { .. }) && farm.sessions[usize::from(w)].is_some() && idle && first {
            out.push(Action::Offer(w));
        }
        if books.holder() == Some(w) && (unlucky || is_timely(model, farm, w)) {
            out.push(Action::Silent(w));
        }
        worker_actions(model, farm, w, out);
    }
    if !state.is_done() {
        out.extend((farm.left.cancels > 0).then_some(Action::Cancel));
        let leased = state.lease().is_some();
        out.extend((unlucky && leased).then_some(Action::Overdue));
    }
    out.extend(farm.logs.iter().any(|log| log.durable < log.len).then_some(Action::Sync));
    out.extend((unlucky && farm.left.crashes > 0).then_some(Action::CrashServer));
    out.extend(farm.settling.is_some().then_some(Action::Settle));
    out.extend(farm.unwritten.is_some().then_some(Action::Write));
    for (at, msg) in farm.net.iter().enumerate() {
        let earlier = farm.net[..at].iter().filter(|other| same_link(msg, other));
        let (beat, assign) = kind(model, msg);
        // A socket keeps the order, and in two cases more than economy rests on it: no heartbeat overtakes a refusal, and
        // no acknowledgement of one an assignment.
        if beat && earlier.clone().any(|other| kind(model, other).1) {
            continue;
        }
        out.extend((unlucky || earlier.count() == 0).then_some(Action::Deliver(*msg)));
        let report = matches!(model.known.texts.get(msg.text), Text::Up(ToOrchestrator::Report { .. }));
        out.extend((unlucky && report && farm.settling.is_none()).then_some(Action::DeliverSlowly(*msg)));
        out.extend(unlucky.then_some(Action::Repeat(*msg)));
        // On a socket an assignment is lost only with all that follows it.
        out.extend((unlucky && !assign).then_some(Action::Lose(*msg)));
    }
}

/// How many misfortunes an action is.
pub fn cost(model: &Protocol, farm: &Farm, action: &Action) -> u8 {
    u8::from(match action {
        Action::Silent(w) => !is_timely(model, farm, *w),
        Action::Cut(w) => farm.sessions[usize::from(*w)].is_some(),
        Action::Deliver(msg) => farm.net.iter().take_while(|other| *other != msg).any(|other| same_link(msg, other)),
        Action::Overdue
        | Action::CrashServer
        | Action::CrashWorker(_)
        | Action::LeaseEnds(_)
        | Action::Break(..)
        | Action::Repeat(_)
        | Action::Lose(_)
        | Action::DeliverSlowly(_) => true,
        Action::Offer(_)
        | Action::Cancel
        | Action::Sync
        | Action::Connect(_)
        | Action::Wake(_)
        | Action::SendLog(_)
        | Action::Say(..)
        | Action::Finish(..)
        | Action::Close(..)
        | Action::Settle
        | Action::Write => false,
    })
}

fn same_link(a: &Msg, b: &Msg) -> bool {
    (a.up, a.worker, a.epoch) == (b.up, b.worker, b.epoch)
}

/// Whether a message is a heartbeat or acknowledges one, and whether it assigns or refuses.
fn kind(model: &Protocol, msg: &Msg) -> (bool, bool) {
    match model.known.texts.get(msg.text) {
        Text::Down(ToWorker::HeartbeatAck { .. }) | Text::Up(ToOrchestrator::Heartbeat(_)) => (true, false),
        Text::Down(ToWorker::Order { order: Order::Assign(_) })
        | Text::Up(ToOrchestrator::Report { report: Report::Refused { .. }, .. }) => (false, true),
        Text::Down(_) | Text::Up(_) | Text::Log(_) => (false, false),
    }
}

fn worker_actions(model: &Protocol, farm: &Farm, w: u8, out: &mut Vec<Action>) {
    let worker = &farm.workers[usize::from(w)];
    let unlucky = farm.left.misfortunes > 0;
    let daemon = model.known.daemons.get(worker.core);
    // A worker that has nothing to do with the job brings nothing new by dying or talking.
    let concerned = worker.spool.iter().any(Option::is_some) || farm.net.iter().any(|msg| msg.worker == w);
    match worker.link {
        None => out.push(Action::Connect(w)),
        Some(_) => {
            let free = farm.sessions[usize::from(w)].is_none();
            out.extend((free || concerned && unlucky).then_some(Action::Cut(w)));
            out.extend((farm.left.beats > 0 && daemon.is_up() && concerned).then_some(Action::Wake(w)));
            out.extend(daemon.has_log().then_some(Action::SendLog(w)));
        }
    }
    out.extend((concerned && unlucky && farm.left.crashes > 0).then_some(Action::CrashWorker(w)));
    out.extend((concerned && unlucky && worker.leased).then_some(Action::LeaseEnds(w)));
    for a in 1..=2u8 {
        let said = worker.spool[usize::from(a) - 1].map_or(0, |spool| spool.len);
        match worker.runs[usize::from(a) - 1] {
            Run::Nothing => {}
            Run::Teardown | Run::Command { stop: Stop::Kill } => out.push(Action::Close(w, a)),
            Run::Command { stop } => {
                if said < LOG_LEN && stop == Stop::No {
                    out.push(Action::Say(w, a));
                }
                if said == LOG_LEN || stop == Stop::Cancel {
                    out.push(Action::Finish(w, a));
                }
                out.extend(unlucky.then_some(Action::Break(w, a)));
            }
        }
    }
}

/// True if a worker may be called silent by the clock: its lease was over for as long as a VM needs to die. That the
/// numbers give this is the timed model's matter.
pub fn is_timely(model: &Protocol, farm: &Farm, w: u8) -> bool {
    let worker = &farm.workers[usize::from(w)];
    let in_grace = farm.memory.crashed_server && farm.sessions[usize::from(w)].is_none();
    if in_grace && model.mutant == Some(Mutant::ExpireInGrace) {
        return true;
    }
    !worker.leased && !worker.runs.contains(&Run::Command { stop: Stop::Kill })
}

pub const ENDS_ONCE: &str = "a job ends once";
pub const ATTEMPT_ENDS_ONCE: &str = "an attempt ends once";
pub const NEWEST_ENDS: &str = "only the newest attempt, by its own worker, ends the job";
pub const STARTS_ONCE: &str = "an attempt starts once";
pub const PREFIX: &str = "a stored log is what its attempt said, from the start, without a gap or anything twice";
pub const WHOLE_LOG: &str = "a success has its whole log, on the disk";
pub const NO_STALE_SESSION: &str = "no session but a worker's newest changes a job";
pub const ACK_DURABLE: &str = "nothing is acknowledged before the disk has it";
pub const ONE_VM: &str = "while clocks are kept, one command of a job runs at a time";
pub const CANCEL_STAYS: &str = "a cancel that was answered is never forgotten";

pub fn properties() -> Vec<Property<Protocol>> {
    let mut all = vec![
        Property::always(ENDS_ONCE, |m: &Protocol, f: &Farm| m.seen.always(0, || f.memory.ends <= 1)),
        Property::always(ATTEMPT_ENDS_ONCE, |m, f: &Farm| {
            m.seen.always(1, || f.memory.attempt_ends.iter().all(|n| *n <= 1))
        }),
        Property::always(NEWEST_ENDS, |m, f: &Farm| m.seen.always(2, || !f.memory.ended_by_stranger)),
        Property::always(STARTS_ONCE, |m, f: &Farm| m.seen.always(3, || f.memory.starts.iter().all(|n| *n <= 1))),
        Property::always(PREFIX, |m, f: &Farm| m.seen.always(4, || is_prefix(m, f))),
        Property::always(WHOLE_LOG, |m, f: &Farm| m.seen.always(5, || has_whole_log(m, f))),
        Property::always(NO_STALE_SESSION, |m, f: &Farm| m.seen.always(6, || !f.memory.stale_session_wrote)),
        Property::always(ACK_DURABLE, |m, f: &Farm| m.seen.always(7, || acks_follow_the_disk(m, f))),
        Property::always(ONE_VM, |m, f: &Farm| m.seen.always(8, || f.memory.early || commands(f) <= 1)),
        Property::always(CANCEL_STAYS, |m, f: &Farm| m.seen.always(9, || cancel_stays(m, f))),
    ];
    all.extend(super::sights::properties());
    all
}

pub fn commands(farm: &Farm) -> usize {
    let runs = farm.workers.iter().flat_map(|worker| worker.runs);
    runs.filter(|run| matches!(run, Run::Command { .. })).count()
}

fn is_prefix(model: &Protocol, farm: &Farm) -> bool {
    let books = model.known.books.get(farm.books);
    (1..=2u8).all(|a| {
        let log = &farm.logs[usize::from(a) - 1];
        let owner = books.row(a).map(|row| index_of(row.worker));
        log.stored().iter().enumerate().all(|(at, stored)| owner.is_some_and(|w| *stored == byte(w, a, at as u8)))
    })
}

fn has_whole_log(model: &Protocol, farm: &Farm) -> bool {
    let books = model.known.books.get(farm.books);
    match &books.job.state.step {
        Step::Done { end, .. } if end.reason.is_none() => farm.logs[usize::from(books.made()) - 1].durable == LOG_LEN,
        Step::Queued { .. }
        | Step::Assigned { .. }
        | Step::Running { .. }
        | Step::Canceling { .. }
        | Step::Done { .. } => true,
    }
}

fn acks_follow_the_disk(model: &Protocol, farm: &Farm) -> bool {
    let books = model.known.books.get(farm.books);
    let row = |attempt: u32| books.row(attempt as u8);
    let durable = |attempt: u32| u64::from(farm.logs[attempt as usize - 1].durable);
    farm.net.iter().filter(|msg| !msg.up).all(|msg| match model.known.texts.get(msg.text) {
        Text::Down(ToWorker::EventAck { attempt, seq }) => row(attempt.attempt).is_some_and(|row| row.seq >= *seq),
        Text::Down(ToWorker::LogAck { attempt, durable: len }) => durable(attempt.attempt) >= *len,
        Text::Down(ToWorker::Order { order: Order::Continue { attempt, log_durable, .. } }) => {
            durable(attempt.attempt) >= *log_durable
        }
        Text::Down(ToWorker::Order { order: Order::ResultAck { attempt } }) => {
            row(attempt.attempt).is_some_and(|row| row.ended_at.is_some())
        }
        Text::Down(_) | Text::Up(_) | Text::Log(_) => true,
    })
}

fn cancel_stays(model: &Protocol, farm: &Farm) -> bool {
    let books = model.known.books.get(farm.books);
    !farm.memory.canceled || matches!(books.job.state.step, Step::Canceling { .. } | Step::Done { .. })
}
