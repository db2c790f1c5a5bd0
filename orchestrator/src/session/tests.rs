use std::sync::Arc;

use alloy_shared::env::{Mono, Ms, Now};
use alloy_shared::id::{AttemptRef, BootId, DEFAULT_ORG, Digest, JobId, Labels, WorkerId};
use alloy_shared::limits::{self, Limits};
use alloy_shared::wire::ErrorCode;
use alloy_shared::wire::job::{End, JobSpec, Phase, Reason, Timings};
use alloy_shared::wire::session::{
    Heartbeat, Held, HeldState, Hello, LogChunk, Order, Report, ResultReport, ToOrchestrator, ToWorker,
};
use bytes::Bytes;

use super::core::Core;
use super::io::{Effect, Input, NotStored, Settled};
use crate::job::{Lease, State, Step, Then, Tries};
use crate::store::Job;

const ME: WorkerId = WorkerId::from_raw(1);
const OTHER: WorkerId = WorkerId::from_raw(2);

fn at(ms: u64) -> Now {
    Now { wall: Ms(ms as i64), mono: Mono(ms) }
}

fn attempt(n: u128) -> AttemptRef {
    AttemptRef { job: JobId::from_raw(n), attempt: 1 }
}

fn job(n: u128, version: i64, step: Step) -> Job {
    Job {
        id: JobId::from_raw(n),
        org: DEFAULT_ORG,
        version,
        state: State { tries: Tries { made: 1, lost: 0, failed: 0 }, step },
        spec: Arc::new(JobSpec::default()),
        source: None,
        created_at: Ms(0),
        created_by: "me".into(),
        events: 2,
    }
}

fn lease(worker: WorkerId) -> Lease {
    Lease { attempt: 1, worker, assigned_at: Ms(0), avoid: Vec::new() }
}

fn assigned() -> Step {
    Step::Assigned { lease: lease(ME) }
}

fn running() -> Step {
    Step::Running { lease: lease(ME), accepted_at: Ms(0), phase: Phase::Executing }
}

fn done() -> Step {
    Step::Done { end: End::success(), at: Ms(0) }
}

fn hello(held: Vec<Held>) -> ToOrchestrator {
    ToOrchestrator::Hello(Box::new(Hello {
        protocol_min: 1,
        protocol_max: 1,
        capabilities: vec![],
        worker: ME,
        boot: BootId::from_raw(1),
        signature: String::new(),
        version: "1".into(),
        labels: Labels::default(),
        slots: vec![],
        held,
        draining: false,
        trouble: None,
    }))
}

fn held(n: u128, state: HeldState) -> Held {
    Held { attempt: attempt(n), state, log_len: 0, seq: 1 }
}

fn beat(n: u64, heard: u64, held: Vec<Held>) -> Input {
    Input::Heard(ToOrchestrator::Heartbeat(Heartbeat { n, heard, slots: vec![], held, draining: false, trouble: None }))
}

fn report(n: u128, seq: u64, report: Report) -> Input {
    Input::Heard(ToOrchestrator::Report { attempt: attempt(n), seq, report })
}

fn result() -> Report {
    let timings = Timings::default();
    Report::Result(Box::new(ResultReport {
        end: End::success(),
        timings,
        log_len: 0,
        artifacts: 0,
        facts: Default::default(),
    }))
}

/// A session past its hello.
fn open(held: Vec<Held>, jobs: Vec<Job>) -> (Core, Vec<Effect>) {
    let mut core = Core::new(ME, "nonce".into(), Limits::default(), at(0));
    assert!(matches!(core.handle(Input::Tick, at(0)).as_slice(), [Effect::Send(ToWorker::Challenge { .. })]));
    assert!(matches!(core.handle(Input::Heard(hello(held)), at(0)).as_slice(), [Effect::Open(_)]));
    let effects = core.handle(Input::Opened { epoch: 7, jobs, draining: false }, at(0));
    (core, effects)
}

/// Orders sent, and assignments, as short words.
fn orders(effects: &[Effect]) -> Vec<String> {
    let word = |order: &Order| match order {
        Order::Assign(_) => "assign".to_owned(),
        Order::Continue { log_durable, .. } => format!("continue {log_durable}"),
        Order::Cancel { .. } => "cancel".to_owned(),
        Order::Fence { .. } => "fence".to_owned(),
        Order::ResultAck { .. } => "result ack".to_owned(),
    };
    effects
        .iter()
        .flat_map(|effect| match effect {
            Effect::Send(ToWorker::Order { order }) => vec![word(order)],
            Effect::Send(ToWorker::HeartbeatAck { orders, .. }) => orders.iter().map(word).collect(),
            Effect::Assign { .. } => vec!["assign".to_owned()],
            Effect::Measure { .. } => vec!["measure".to_owned()],
            Effect::NotHeld { .. } => vec!["lost".to_owned()],
            Effect::Hangup(why) => vec![format!("hang up: {why}")],
            _ => vec![],
        })
        .collect()
}

#[test]
fn a_hello_is_the_whole_truth() {
    for (held_state, step, expected) in [
        (None, assigned(), vec!["assign"]),
        (None, running(), vec!["lost"]),
        (Some(HeldState::Running), running(), vec!["measure"]),
        (Some(HeldState::ResultPending), running(), vec!["measure"]),
        (Some(HeldState::Lost), running(), vec!["lost"]),
    ] {
        let held_list = held_state.map(|state| held(10, state)).into_iter().collect();
        let (_, effects) = open(held_list, vec![job(10, 2, step.clone())]);
        assert_eq!(orders(&effects), expected, "{held_state:?} {step:?}");
    }
    let (_, effects) = open(vec![held(10, HeldState::Running), held(11, HeldState::Lost)], vec![]);
    assert_eq!(orders(&effects), ["measure", "fence"], "nobody knows 10; the tail of 11 is still wanted");
}

#[test]
fn the_rest_of_a_lost_log_is_asked_for_once_the_books_know_that_it_is_lost() {
    let lost = || vec![held(10, HeldState::Lost)];
    let (mut core, effects) = open(lost(), vec![job(10, 1, assigned())]);
    assert_eq!(orders(&effects), ["lost"]);
    // The store did not take it: the worker must still have the attempt, or it would be given to it again.
    assert_eq!(orders(&core.handle(beat(1, 0, lost()), at(1))), ["lost"]);
    let queued = Step::Queued { since: Ms(0), avoid: vec![ME] };
    assert_eq!(orders(&core.handle(Input::Job(job(10, 2, queued)), at(2))), ["measure"]);
    assert_eq!(orders(&core.handle(beat(2, 1, lost()), at(3))), Vec::<String>::new());
}

#[test]
fn an_assignment_is_sent_at_once_and_again_only_when_it_surely_was_lost() {
    let (mut core, _) = open(vec![], vec![]);
    core.handle(beat(1, 0, vec![]), at(1));
    assert_eq!(orders(&core.handle(Input::Job(job(10, 1, assigned())), at(2))), ["assign"]);
    assert_eq!(
        orders(&core.handle(beat(2, 1, vec![]), at(3))),
        Vec::<String>::new(),
        "sent before the order was heard"
    );
    assert_eq!(orders(&core.handle(beat(3, 2, vec![]), at(4))), ["assign"], "heard, and not held");
    assert_eq!(orders(&core.handle(beat(4, 3, vec![held(10, HeldState::Running)]), at(5))), Vec::<String>::new());
}

#[test]
fn a_cancel_that_was_lost_heals_with_the_next_heartbeat() {
    let (mut core, _) = open(vec![], vec![]);
    core.handle(Input::Job(job(10, 1, assigned())), at(1));
    core.handle(beat(1, 0, vec![held(10, HeldState::Running)]), at(1));
    let canceling = Step::Canceling { lease: lease(ME), since: Ms(0), then: Then::End(Reason::UserCanceled) };
    assert_eq!(orders(&core.handle(Input::Job(job(10, 3, canceling)), at(2))), ["cancel"]);
    assert_eq!(orders(&core.handle(beat(2, 1, vec![held(10, HeldState::Running)]), at(3))), ["cancel"]);
}

#[test]
fn a_job_that_moved_on_is_fenced() {
    let (mut core, _) = open(vec![], vec![]);
    core.handle(Input::Job(job(10, 1, assigned())), at(1));
    core.handle(beat(1, 0, vec![held(10, HeldState::Running)]), at(1));
    let elsewhere = Step::Assigned { lease: Lease { attempt: 2, ..lease(OTHER) } };
    let mut moved = job(10, 3, elsewhere);
    moved.state.tries.made = 2;
    assert_eq!(orders(&core.handle(Input::Job(moved), at(2))), ["fence"]);
}

#[test]
fn old_news_of_a_job_is_ignored() {
    let (mut core, _) = open(vec![], vec![]);
    core.handle(Input::Job(job(10, 5, running())), at(1));
    assert_eq!(orders(&core.handle(Input::Job(job(10, 4, assigned())), at(2))), Vec::<String>::new());
}

#[test]
fn reports_are_settled_one_after_the_other_and_acknowledged_after_that() {
    let (mut core, _) = open(vec![], vec![]);
    core.handle(Input::Job(job(10, 1, assigned())), at(0));
    let first = core.handle(report(10, 1, Report::Accepted), at(1));
    assert!(matches!(first.as_slice(), [Effect::Settle { seq: 1, .. }]));
    assert_eq!(core.handle(report(10, 2, result()), at(1)), []);
    let effects = core.handle(Input::Settled { attempt: attempt(10), seq: 1, result: Settled::Applied }, at(2));
    assert!(
        matches!(effects.as_slice(), [Effect::Send(ToWorker::EventAck { seq: 1, .. }), Effect::Settle { seq: 2, .. }]),
        "{effects:?}"
    );
    let effects = core.handle(Input::Settled { attempt: attempt(10), seq: 2, result: Settled::Applied }, at(3));
    assert_eq!(orders(&effects), ["result ack"]);
    core.handle(Input::Job(job(10, 4, done())), at(3));
    let effects = core.handle(beat(1, 0, vec![held(10, HeldState::ResultPending)]), at(4));
    assert_eq!(orders(&effects), ["result ack"], "a lost acknowledgement heals");
}

#[test]
fn what_cannot_be_settled_is_answered_with_what_to_do() {
    for (result_of, expected) in [(Settled::Fenced, "fence"), (Settled::Failed, "hang up: the store is away")] {
        let (mut core, _) = open(vec![], vec![]);
        core.handle(report(10, 1, Report::Accepted), at(1));
        let effects = core.handle(Input::Settled { attempt: attempt(10), seq: 1, result: result_of }, at(2));
        assert_eq!(orders(&effects), [expected]);
    }
    let (mut core, _) = open(vec![], vec![]);
    core.handle(report(10, 5, result()), at(1));
    let missing = Settled::Missing { log_len: 40, artifacts: vec![] };
    let effects = core.handle(Input::Settled { attempt: attempt(10), seq: 5, result: missing }, at(2));
    assert!(matches!(effects.as_slice(), [Effect::Send(ToWorker::Missing { seq: 4, log_len: 40, .. })]), "{effects:?}");
}

#[test]
fn nothing_behind_a_report_that_is_missing_is_decided_before_it_has_come_again() {
    let (mut core, _) = open(vec![], vec![]);
    let settles = |effects: Vec<Effect>| {
        let seqs = effects.iter().filter_map(|effect| match effect {
            Effect::Settle { seq, .. } => Some(*seq),
            _ => None,
        });
        seqs.collect::<Vec<_>>()
    };
    let artifacts = vec![Digest::of(b"gone")];
    for back in [Settled::Missing { log_len: 40, artifacts }, Settled::Gap { have: 5 }] {
        assert_eq!(settles(core.handle(report(10, 6, Report::Accepted), at(1))), [6]);
        assert_eq!(settles(core.handle(report(10, 7, Report::Accepted), at(1))), [0; 0], "one at a time");
        let effects = core.handle(Input::Settled { attempt: attempt(10), seq: 6, result: back }, at(2));
        assert!(matches!(effects.as_slice(), [Effect::Send(ToWorker::Missing { seq: 5, .. })]), "{effects:?}");
        assert_eq!(settles(core.handle(report(10, 8, result()), at(3))), [0; 0], "it was under way");
        assert_eq!(settles(core.handle(report(10, 6, Report::Accepted), at(4))), [6]);
        assert_eq!(settles(core.handle(report(10, 7, Report::Accepted), at(4))), [0; 0]);
        let done = |seq| Input::Settled { attempt: attempt(10), seq, result: Settled::Applied };
        assert_eq!(settles(core.handle(done(6), at(5))), [7]);
        assert_eq!(settles(core.handle(done(7), at(6))), [0; 0]);
    }
}

#[test]
fn a_worker_that_has_nothing_before_what_it_sends_again_is_answered_again() {
    let (mut core, _) = open(vec![], vec![]);
    let gap = || Input::Settled { attempt: attempt(10), seq: 8, result: Settled::Gap { have: 5 } };
    for round in 1..4 {
        let effects = core.handle(report(10, 8, Report::Accepted), at(round));
        assert!(matches!(effects.as_slice(), [Effect::Settle { seq: 8, .. }]), "round {round}: {effects:?}");
        core.handle(report(10, 9, result()), at(round));
        let effects = core.handle(gap(), at(round));
        assert!(matches!(effects.as_slice(), [Effect::Send(ToWorker::Missing { seq: 5, .. })]), "{effects:?}");
        // It was under way.
        assert_eq!(core.handle(report(10, 10, result()), at(round)), []);
    }
}

#[test]
fn what_is_fenced_is_told_so_once_and_the_rest_of_its_log_is_asked_for() {
    let pending = || vec![held(10, HeldState::ResultPending)];
    let (mut core, effects) = open(pending(), vec![job(10, 1, running())]);
    assert!(effects.contains(&Effect::Measure { attempt: attempt(10) }), "{effects:?}");
    assert_eq!(orders(&core.handle(Input::Job(job(10, 2, done())), at(1))), ["fence"]);
    // These were sent before the worker heard it.
    core.handle(report(10, 5, result()), at(2));
    let effects = core.handle(Input::Settled { attempt: attempt(10), seq: 5, result: Settled::Fenced }, at(3));
    assert_eq!(orders(&effects), Vec::<String>::new());
    assert_eq!(orders(&core.handle(beat(1, 0, pending()), at(4))), Vec::<String>::new());
    let effects = core.handle(beat(2, 0, vec![held(10, HeldState::Lost)]), at(5));
    assert!(effects.contains(&Effect::Measure { attempt: attempt(10) }), "{effects:?}");
    let never = Input::Appended { attempt: attempt(10), result: Err(NotStored::Never) };
    assert_eq!(orders(&core.handle(never, at(6))), ["fence"], "nor is its log taken");
}

#[test]
fn a_gap_in_the_log_is_answered_with_the_place_to_go_on_from() {
    let (mut core, _) = open(vec![], vec![]);
    let effects = core.handle(Input::Job(job(10, 1, assigned())), at(0));
    let [Effect::Assign { handle, .. }] = effects.as_slice() else { panic!("{effects:?}") };
    let chunk = LogChunk { handle: *handle, offset: 9, bytes: Bytes::from_static(b"x") };
    assert!(matches!(core.handle(Input::HeardLog(chunk), at(1)).as_slice(), [Effect::Append { offset: 9, .. }]));
    let effects = core.handle(Input::Appended { attempt: attempt(10), result: Err(NotStored::Gap { have: 3 }) }, at(1));
    assert_eq!(orders(&effects), ["continue 3"]);
    let stranger = LogChunk { handle: 99, offset: 0, bytes: Bytes::new() };
    assert_eq!(orders(&core.handle(Input::HeardLog(stranger), at(1))), ["hang up: a log chunk of an unknown attempt"]);
}

#[test]
fn a_workers_trouble_comes_with_its_offer_and_has_a_bound() {
    let (mut core, _) = open(vec![], vec![]);
    let long = "é".repeat(limits::TROUBLE_MAX);
    for (draining, trouble, told) in [(true, Some(long), Some(limits::TROUBLE_MAX)), (false, None, None)] {
        let beat = Heartbeat { n: 1, heard: 0, slots: vec![], held: vec![], draining, trouble };
        let effects = core.handle(Input::Heard(ToOrchestrator::Heartbeat(beat)), at(1));
        let offer = effects.iter().find_map(|effect| match effect {
            Effect::Offer { stopping, trouble, .. } => Some((*stopping, trouble.as_ref().map(String::len))),
            _ => None,
        });
        assert_eq!(offer, Some((draining, told)));
    }
}

#[test]
fn silence_and_strangers_end_the_session() {
    let limits = Limits::default();
    let mut core = Core::new(ME, "nonce".into(), limits.clone(), at(0));
    core.handle(Input::Tick, at(0));
    assert_eq!(core.next_wake(), Mono(limits.accept_ms));
    assert_eq!(orders(&core.handle(Input::Tick, at(limits.accept_ms))), ["hang up: no hello in time"]);

    let (mut core, _) = open(vec![], vec![]);
    assert_eq!(orders(&core.handle(Input::Tick, at(limits.link_silent_ms))), ["hang up: silent for too long"]);

    let mut core = Core::new(ME, "nonce".into(), limits, at(0));
    core.handle(Input::Tick, at(0));
    let ToOrchestrator::Hello(mut newer) = hello(vec![]) else { unreachable!() };
    (newer.protocol_min, newer.protocol_max) = (7, 9);
    let effects = core.handle(Input::Heard(ToOrchestrator::Hello(newer)), at(1));
    assert!(
        matches!(&effects[0], Effect::Send(ToWorker::Reject { code: ErrorCode::UnsupportedProtocol, .. })),
        "{effects:?}"
    );
    assert_eq!(orders(&effects), ["hang up: a hello that cannot be served"]);
}

#[test]
fn nobody_waits_for_a_worker_that_was_revoked() {
    let refused = || Input::Refused { code: ErrorCode::Forbidden, message: "revoked".into(), retry_after_ms: None };
    let (mut core, _) = open(vec![], vec![]);
    let effects = core.handle(refused(), at(1));
    assert!(
        matches!(effects.as_slice(), [Effect::Left, Effect::Send(ToWorker::Reject { .. }), Effect::Hangup("refused")]),
        "{effects:?}"
    );
    let mut core = Core::new(ME, "nonce".into(), Limits::default(), at(0));
    core.handle(Input::Tick, at(0));
    core.handle(Input::Heard(hello(vec![])), at(0));
    let effects = core.handle(refused(), at(1));
    assert!(
        matches!(effects.as_slice(), [Effect::Send(_), Effect::Hangup("refused")]),
        "it was never here: {effects:?}"
    );
}

#[test]
fn a_heartbeat_that_overtakes_the_result_does_not_acknowledge_it() {
    let (mut core, _) = open(vec![], vec![]);
    core.handle(Input::Job(job(10, 1, running())), at(0));
    core.handle(report(10, 1, Report::Accepted), at(1));
    core.handle(beat(1, 0, vec![held(10, HeldState::ResultPending)]), at(1));
    let effects = core.handle(Input::Settled { attempt: attempt(10), seq: 1, result: Settled::Applied }, at(2));
    assert!(matches!(effects.as_slice(), [Effect::Send(ToWorker::EventAck { seq: 1, .. })]), "{effects:?}");
    core.handle(report(10, 2, result()), at(3));
    let effects = core.handle(Input::Settled { attempt: attempt(10), seq: 2, result: Settled::Applied }, at(4));
    assert_eq!(orders(&effects), ["result ack"]);
}

#[test]
fn a_heartbeat_that_overtakes_a_refusal_does_not_assign_the_attempt_again() {
    let (mut core, effects) = open(vec![], vec![job(1, 3, assigned())]);
    assert_eq!(orders(&effects), ["assign"]);
    core.handle(beat(1, 0, vec![]), at(0));
    core.handle(report(1, 1, Report::Refused { message: "full".into() }), at(0));
    assert!(orders(&core.handle(beat(2, 1, vec![]), at(0))).is_empty(), "its refusal is being decided");
}

#[test]
fn a_job_that_ends_before_its_report_was_answered_is_not_fenced() {
    let (mut core, _) = open(vec![], vec![]);
    core.handle(Input::Job(job(10, 1, running())), at(0));
    core.handle(report(10, 1, result()), at(1));
    assert_eq!(orders(&core.handle(Input::Job(job(10, 2, done())), at(2))), Vec::<String>::new());
    let effects = core.handle(Input::Settled { attempt: attempt(10), seq: 1, result: Settled::Applied }, at(2));
    assert_eq!(orders(&effects), ["result ack"]);
}

#[test]
fn news_that_came_while_the_session_was_opened_wins() {
    let mut core = Core::new(ME, "nonce".into(), Limits::default(), at(0));
    core.handle(Input::Tick, at(0));
    core.handle(Input::Heard(hello(vec![held(10, HeldState::Running)])), at(0));
    let canceling = Step::Canceling { lease: lease(ME), since: Ms(0), then: Then::End(Reason::UserCanceled) };
    core.handle(Input::Job(job(10, 3, canceling)), at(0));
    assert_eq!(core.handle(Input::Drain { on: true }, at(0)), []);
    let jobs = vec![job(10, 2, running())];
    let effects = core.handle(Input::Opened { epoch: 7, jobs, draining: false }, at(0));
    assert_eq!(orders(&effects), ["measure", "cancel"]);
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Offer { draining: true, .. })), "{effects:?}");
}

#[test]
fn a_log_that_cannot_be_stored_is_asked_for_again_with_the_next_heartbeat() {
    let (mut core, _) = open(vec![], vec![]);
    let effects = core.handle(Input::Job(job(10, 1, assigned())), at(0));
    let [Effect::Assign { handle, .. }] = effects.as_slice() else { panic!("{effects:?}") };
    let handle = *handle;
    let chunk = || Input::HeardLog(LogChunk { handle, offset: 0, bytes: Bytes::from_static(b"x") });
    assert!(matches!(core.handle(chunk(), at(1)).as_slice(), [Effect::Append { .. }]));
    core.handle(Input::Appended { attempt: attempt(10), result: Err(NotStored::Later) }, at(1));
    assert_eq!(core.handle(chunk(), at(1)), [], "dropped until then");
    let mut beat = |n| orders(&core.handle(beat(n, n - 1, vec![held(10, HeldState::Running)]), at(n)));
    assert_eq!(
        (beat(2), beat(3)),
        (vec!["measure".to_owned()], vec!["measure".to_owned()]),
        "until something is stored"
    );
    assert!(matches!(core.handle(chunk(), at(3)).as_slice(), [Effect::Append { .. }]));
    core.handle(Input::Appended { attempt: attempt(10), result: Ok(1) }, at(3));
    assert!(orders(&core.handle(self::beat(4, 3, vec![held(10, HeldState::Running)]), at(4))).is_empty());
}

#[test]
fn what_neither_side_has_is_forgotten() {
    let (mut core, _) = open(vec![], vec![]);
    for n in 0..1_000 {
        core.handle(beat(n, n, vec![held(u128::from(n) + 1, HeldState::Running)]), at(1));
    }
    core.handle(beat(1_000, 1_000, vec![]), at(1));
    assert_eq!(core.known(), 0);
}

#[test]
fn a_log_whose_length_could_not_be_read_is_asked_for_with_the_next_heartbeat() {
    let queued = Step::Queued { since: Ms(0), avoid: vec![ME] };
    for (state, step) in [(HeldState::Running, running()), (HeldState::Lost, queued)] {
        let have = || vec![held(10, state)];
        let (mut core, effects) = open(have(), vec![job(10, 2, step)]);
        assert_eq!(orders(&effects).last().map(String::as_str), Some("measure"), "{state:?}");
        assert!(orders(&core.handle(beat(1, 0, have()), at(1))).is_empty(), "{state:?}: it is being read");
        assert_eq!(core.handle(Input::NotMeasured { attempt: attempt(10) }, at(2)), []);
        assert_eq!(orders(&core.handle(beat(2, 1, have()), at(3))), ["measure"], "{state:?}");
    }
}

#[test]
fn a_worker_that_reports_on_more_attempts_than_it_can_have_is_cut() {
    for closes in [false, true] {
        let (mut core, _) = open(vec![], vec![]);
        let heard = (1..10_000).take_while(|n| {
            let effects = core.handle(report(*n, 1, Report::Accepted), at(1));
            if closes {
                let closed = ToOrchestrator::Closed { attempt: attempt(*n), teardown_ms: 0, log_len: 0 };
                core.handle(Input::Heard(closed), at(1));
            }
            orders(&effects).is_empty()
        });
        assert_eq!(heard.count(), 2 * limits::HELD_MAX, "closes: {closes}");
    }
}

#[test]
fn reports_that_wait_have_a_bound_in_bytes_and_those_that_are_decided_do_not_count() {
    let long = || Report::Refused { message: "x".repeat(1 << 20) };
    let (mut core, _) = open(vec![], vec![job(10, 1, running()), job(11, 1, running())]);
    let cut = |effects: &[Effect]| matches!(effects, [Effect::Hangup(_)]);
    for seq in 1..=100 {
        assert!(!cut(&core.handle(report(10, seq, long()), at(1))));
        assert!(!cut(&core.handle(report(10, seq + 1, long()), at(1))));
        for seq in [seq, seq + 1] {
            core.handle(Input::Settled { attempt: attempt(10), seq, result: Settled::Applied }, at(1));
        }
    }
    // Half of them of another attempt.
    let waiting = (1..1_000).take_while(|n| !cut(&core.handle(report(10 + n % 2, *n as u64, long()), at(1)))).count();
    assert!((60..=66).contains(&waiting), "{waiting} of 1 MiB");
    // Each the only one of its attempt.
    let (mut core, _) = open(vec![], vec![]);
    let decided = (1..1_000).take_while(|n| !cut(&core.handle(report(*n, 1, long()), at(1)))).count();
    assert!((60..=66).contains(&decided), "{decided} of 1 MiB");
}

#[test]
fn a_worker_that_holds_other_attempts_at_each_heartbeat_is_cut_when_too_many_of_them_are_being_decided() {
    let (mut core, _) = open(vec![], vec![]);
    let most = limits::HELD_MAX as u64;
    let beats = (0..100).take_while(|n| {
        let ids = (0..most).map(|k| u128::from(n * most + k + 1));
        let effects = core.handle(beat(n + 1, *n, ids.clone().map(|id| held(id, HeldState::Running)).collect()), at(1));
        let fits = !effects.iter().any(|effect| matches!(effect, Effect::Hangup(_)));
        ids.for_each(|id| drop(core.handle(report(id, 1, Report::Accepted), at(1))));
        fits
    });
    assert_eq!(beats.count(), 2);
}
