use alloy_shared::env::Ms;
use alloy_shared::id::{DEFAULT_ORG, Digest, JobId};
use alloy_shared::secret::Secret;
use alloy_shared::wire::ErrorCode;
use alloy_shared::wire::job::{End, JobSpec, Phase, Reason as EndReason, Timings};
use alloy_shared::wire::session::{HeldState, ResultReport, SlotState};

use super::*;

mod earlier;
mod walk;

const AT: AttemptRef = AttemptRef { job: JobId::from_raw(9), attempt: 1 };
const HEARTBEAT: u64 = 5_000;
const FENCE: u64 = 40_000;

fn now(ms: u64) -> Now {
    Now { wall: Ms(0), mono: Mono(ms) }
}

fn assignment(attempt: AttemptRef, handle: u32) -> Box<Assignment> {
    Box::new(Assignment {
        attempt,
        handle,
        org: DEFAULT_ORG,
        spec: JobSpec::default(),
        source: None,
        grant: Secret::new(String::new()),
        timeout_ms: 1,
        cancel_grace_ms: 1,
        job_url: String::new(),
    })
}

fn assign(attempt: AttemptRef, handle: u32) -> Input {
    Input::Heard(ToWorker::Order { order: Order::Assign(assignment(attempt, handle)) })
}

fn order(order: Order) -> Input {
    Input::Heard(ToWorker::Order { order })
}

fn welcome() -> Input {
    Input::Heard(ToWorker::Welcome(Welcome {
        protocol: 1,
        epoch: 1,
        heartbeat_ms: HEARTBEAT,
        self_fence_ms: FENCE,
        kill_budget_ms: 10_000,
        draining: false,
    }))
}

fn phase() -> Report {
    Report::Phase { phase: Phase::Executing, timings: Timings::default(), message: None, facts: Default::default() }
}

fn result(log_len: u64) -> Report {
    Report::Result(Box::new(ResultReport {
        end: End::success(),
        timings: Timings::default(),
        log_len,
        artifacts: 0,
        facts: Default::default(),
    }))
}

fn report(report: Report) -> Input {
    Input::Report { attempt: AT, report }
}

fn recorded(seq: u64) -> Input {
    Input::Recorded { attempt: AT, seq }
}

fn held(state: HeldState, log_len: u64, seq: u64) -> Held {
    Held { attempt: AT, state, log_len, seq }
}

/// Numbers of the reports that these effects send.
fn sent(effects: &[Effect]) -> Vec<u64> {
    effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Send(ToOrchestrator::Report { seq, .. }) => Some(*seq),
            _ => None,
        })
        .collect()
}

fn closes(effects: &[Effect]) -> bool {
    effects.iter().any(|effect| matches!(effect, Effect::Send(ToOrchestrator::Closed { .. })))
}

fn forgets(effects: &[Effect]) -> bool {
    effects.contains(&Effect::Forget { attempt: AT })
}

fn logs(effects: &[Effect]) -> Option<(u32, u64, u32)> {
    effects.iter().find_map(|effect| match effect {
        Effect::SendLog { handle, from, len, .. } => Some((*handle, *from, *len)),
        _ => None,
    })
}

fn with_a_slot(held: Vec<(Held, Vec<(u64, Report)>)>, boot: BootId) -> Core {
    let mut core = Core::restore(held, boot, Limits::default());
    core.slots = vec![SlotView { state: SlotState::Cold, attempt: None, image: None }];
    core
}

/// A core at a time.
struct Bench {
    core: Core,
    ms: u64,
}

impl Bench {
    fn new(held: Vec<(Held, Vec<(u64, Report)>)>) -> Self {
        Self { core: with_a_slot(held, BootId::from_raw(1)), ms: 0 }
    }

    fn give(&mut self, input: Input) -> Vec<Effect> {
        self.core.handle(input, now(self.ms), 7)
    }

    fn wait(&mut self, ms: u64) -> Vec<Effect> {
        self.ms += ms;
        self.give(Input::Tick)
    }

    /// From dialling to a session.
    fn link(&mut self) -> Vec<Effect> {
        self.give(Input::Linked);
        self.give(Input::Heard(ToWorker::Challenge { nonce: "n".into() }));
        self.give(welcome())
    }

    fn up() -> Self {
        let mut bench = Self::new(Vec::new());
        bench.give(Input::Tick);
        bench.link();
        bench
    }

    /// A session with one attempt that was accepted and acknowledged.
    fn running() -> Self {
        let mut bench = Self::up();
        bench.give(assign(AT, 4));
        bench.give(recorded(1));
        bench.give(Input::Heard(ToWorker::EventAck { attempt: AT, seq: 1 }));
        bench
    }

    fn drain_log(&mut self) -> u64 {
        let mut bytes = 0;
        while self.core.has_log() {
            bytes += u64::from(logs(&self.give(Input::Room)).unwrap().2);
        }
        bytes
    }
}

#[test]
fn an_assignment_starts_at_once_and_nothing_is_said_of_it_before_the_disk_has_it() {
    let mut bench = Bench::up();
    let effects = bench.give(assign(AT, 4));
    assert_eq!(
        effects,
        [Effect::Start(assignment(AT, 4)), Effect::Record { attempt: AT, seq: 1, report: Report::Accepted }]
    );
    assert_eq!(sent(&bench.give(Input::Tick)), [0u64; 0]);
    bench.give(Input::Spooled { attempt: AT, len: 100 });
    assert!(!bench.core.has_log(), "a second start under this number would print again");
    let accepted = bench.give(recorded(1));
    assert_eq!(accepted, [Effect::Send(ToOrchestrator::Report { attempt: AT, seq: 1, report: Report::Accepted })]);
    assert_eq!(logs(&bench.give(Input::Room)), Some((4, 0, 100)));
    let again = bench.give(assign(AT, 4));
    assert_eq!(again, [], "heard twice in one session, nothing is lost: nothing is said");
}

#[test]
fn no_start_without_a_lease_while_draining_or_beyond_the_bound() {
    let refused = |effects: &[Effect]| {
        assert!(!effects.iter().any(|effect| matches!(effect, Effect::Start(_) | Effect::Record { .. })));
        effects.iter().any(|effect| {
            matches!(effect, Effect::Send(ToOrchestrator::Report { seq: 1, report: Report::Refused { .. }, .. }))
        })
    };
    let mut bench = Bench::up();
    bench.give(Input::Drain);
    assert!(refused(&bench.give(assign(AT, 1))));

    let mut bench = Bench::up();
    bench.give(Input::Heard(ToWorker::Drain { on: true }));
    assert!(refused(&bench.give(assign(AT, 1))));
    bench.give(Input::Heard(ToWorker::Drain { on: false }));
    assert!(refused(&bench.give(assign(AT, 1))), "another worker may have the job by now");
    let next = AttemptRef { attempt: AT.attempt + 1, ..AT };
    bench.give(assign(next, 1));
    assert!(bench.core.runs(next), "resumed");

    let mut bench = Bench::up();
    bench.give(Input::Slots(Vec::new()));
    assert!(refused(&bench.give(assign(AT, 1))), "nothing would run it");

    let mut bench = Bench::up();
    let effects = bench.give(Input::Full(true));
    let [Effect::Send(ToOrchestrator::Heartbeat(beat))] = &effects[..] else { panic!("{effects:?}") };
    assert!(beat.draining, "to the farm a full disk is a drain");
    assert!(beat.trouble.as_ref().is_some_and(|why| why.contains("disk is full")), "{beat:?}");
    assert!(refused(&bench.give(assign(AT, 1))));
    bench.give(Input::Full(false));
    bench.give(assign(next, 1));
    assert!(bench.core.runs(next));

    // The process slept: the order was in the socket all the while.
    let mut bench = Bench::up();
    bench.ms += FENCE;
    assert!(refused(&bench.give(assign(AT, 1))));

    let mut bench = Bench::up();
    for n in 0..limits::HELD_MAX as u128 {
        bench.give(assign(AttemptRef { job: JobId::from_raw(n + 100), attempt: 1 }, n as u32));
    }
    assert!(refused(&bench.give(assign(AT, 1))));
}

#[test]
fn the_lease_counts_from_when_an_acknowledged_heartbeat_was_sent() {
    let mut bench = Bench::new(Vec::new());
    bench.give(Input::Tick);
    bench.give(Input::Linked);
    bench.ms = 100;
    bench.give(Input::Heard(ToWorker::Challenge { nonce: "n".into() }));
    bench.ms = 900;
    assert_eq!(bench.give(welcome()), [Effect::FenceAt(Mono(100 + FENCE))], "the hello's time, not the welcome's");
    let effects = bench.wait(5_500);
    assert!(matches!(&effects[..], [Effect::Send(ToOrchestrator::Heartbeat(Heartbeat { n: 1, .. }))]), "{effects:?}");
    bench.ms += 3_000;
    let ack = |n| Input::Heard(ToWorker::HeartbeatAck { n, orders: Vec::new() });
    assert_eq!(bench.give(ack(1)), [Effect::FenceAt(Mono(6_400 + FENCE))]);
    assert_eq!(bench.give(ack(1)), [], "an old acknowledgement moves nothing");
    assert_eq!(bench.give(ack(77)), []);
}

#[test]
fn heartbeats_come_in_time_and_at_once_when_slots_change() {
    for dice in [0, 1, 500, 999, u64::MAX] {
        let wait = jittered(HEARTBEAT, dice);
        assert!((4_500..=5_500).contains(&wait), "{wait}");
    }
    let mut bench = Bench::up();
    let slots = vec![SlotView { state: SlotState::Warm, attempt: None, image: None }];
    let effects = bench.give(Input::Slots(slots.clone()));
    assert!(matches!(&effects[..], [Effect::Send(ToOrchestrator::Heartbeat(beat))] if beat.slots == slots));
    assert_eq!(bench.give(Input::Slots(slots.clone())), [], "no news");
    bench.give(Input::Unlinked);
    let other = vec![SlotView { state: SlotState::Cold, attempt: None, image: None }];
    assert_eq!(bench.give(Input::Slots(other.clone())), []);
    bench.give(Input::Linked);
    let effects = bench.give(Input::Heard(ToWorker::Challenge { nonce: "n".into() }));
    assert!(matches!(&effects[..], [Effect::Hello { slots, .. }] if *slots == other));
}

#[test]
fn the_hosts_trouble_is_told_at_once_and_may_be_a_drain() {
    for drains in [true, false] {
        let mut bench = Bench::up();
        let trouble = Some(Trouble { why: "reboot".into(), drains });
        let effects = bench.give(Input::Trouble(trouble.clone()));
        let [Effect::Send(ToOrchestrator::Heartbeat(beat))] = &effects[..] else { panic!("{effects:?}") };
        assert_eq!((beat.draining, beat.trouble.as_deref()), (drains, Some("reboot")));
        assert_eq!(bench.give(Input::Trouble(trouble)), [], "no news");
        // What was assigned before the farm heard of it is the pool's to give back.
        bench.give(assign(AT, 1));
        assert!(bench.core.runs(AT));
        let effects = bench.give(Input::Trouble(None));
        let [Effect::Send(ToOrchestrator::Heartbeat(beat))] = &effects[..] else { panic!("{effects:?}") };
        assert_eq!((beat.draining, beat.trouble.as_deref()), (false, None));
    }
}

#[test]
fn at_the_end_of_the_lease_everything_is_killed_once() {
    let mut bench = Bench::running();
    bench.give(Input::Unlinked);
    assert!(bench.core.next_wake() <= Mono(FENCE));
    assert_eq!(bench.wait(FENCE - 1), []);
    let kill = Effect::Stop { attempt: AT, how: Stop::Kill(KillReason::LeaseLost) };
    assert_eq!(bench.wait(1), [kill]);
    assert_eq!(bench.wait(1), []);
    bench.link();
    assert_eq!(bench.give(order(Order::Fence { attempt: AT })), [], "it was killed already");
    bench.give(Input::Closed { attempt: AT, teardown_ms: 5 });
    let go_on = Order::Continue { attempt: AT, handle: 9, log_durable: 0, seq: 0 };
    assert!(forgets(&bench.give(order(go_on))), "of an empty log nothing is left to send");

    let mut bench = Bench::running();
    bench.give(Input::Unlinked);
    bench.wait(FENCE);
    let effects = bench.give(Input::Closed { attempt: AT, teardown_ms: 5 });
    let [Effect::Record { report: Report::Result(result), .. }] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!(result.end.reason, Some(EndReason::WorkerLost), "it says why it was killed");
}

#[test]
fn a_silent_link_is_hung_up_and_dialled_again() {
    let mut bench = Bench::up();
    let silent = Limits::default().link_silent_ms;
    bench.wait(silent - 1);
    let effects = bench.wait(1);
    assert!(matches!(&effects[..], [Effect::Hangup(Reason::Silent), Effect::Dial { .. }]), "{effects:?}");
    bench.give(Input::Linked);
    let effects = bench.wait(silent);
    assert!(matches!(&effects[..], [Effect::Hangup(Reason::Silent), ..]), "also without a challenge");
}

#[test]
fn dialling_slows_down_and_stays_quick_while_an_attempt_is_held() {
    let limits = Limits::default();
    for (bench, cap) in [(Bench::up(), limits.reconnect_cap_ms), (Bench::running(), limits.reconnect_cap_held_ms)] {
        let mut core = bench.core;
        let mut longest = 0;
        for n in 0..50u64 {
            let effects = core.handle(Input::Unlinked, now(10), n.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let [Effect::Dial { after_ms }] = effects[..] else { panic!("{effects:?}") };
            assert!(after_ms <= cap, "{after_ms}");
            longest = longest.max(after_ms);
        }
        assert!(longest > cap / 2, "{longest}");
    }
}

#[test]
fn what_the_orchestrator_says_about_the_session() {
    let dials = |effects: &[Effect]| match effects {
        [Effect::Hangup(why), Effect::Dial { after_ms }] => (why.clone(), *after_ms),
        other => panic!("{other:?}"),
    };
    let reject = ToWorker::Reject { code: ErrorCode::Unavailable, message: "no".into(), retry_after_ms: Some(60_000) };
    let (why, after) = dials(&Bench::up().give(Input::Heard(reject)));
    assert!(matches!(why, Reason::Rejected { code: ErrorCode::Unavailable, .. }) && after >= 60_000);
    let reconnect = || Input::Heard(ToWorker::Reconnect { after_ms: 1_000 });
    let (why, after) = dials(&Bench::up().give(reconnect()));
    assert!(why == Reason::Asked && (1_000..1_500).contains(&after));
    let far = Input::Heard(ToWorker::Reconnect { after_ms: 1 << 40 });
    assert!(dials(&Bench::running().give(far)).1 <= Limits::default().reconnect_cap_held_ms, "its lease runs");
    let (why, _) = dials(&Bench::up().give(Input::Garbled("x".into())));
    assert_eq!(why, Reason::Garbled("x".into()));
    let unsupported = Effect::Send(ToOrchestrator::Unsupported { message: "sing".into() });
    assert_eq!(Bench::up().give(Input::Unknown("sing".into())), [unsupported]);

    let mut bench = Bench::running();
    let effects = bench.give(Input::Heard(ToWorker::Superseded));
    let kill = Effect::Stop { attempt: AT, how: Stop::Kill(KillReason::Fenced) };
    assert_eq!(effects, [Effect::Hangup(Reason::Superseded), kill]);
    assert_eq!(bench.give(Input::Unlinked), [], "it never dials again");
}

#[test]
fn a_refusal_that_only_a_person_changes_ends_everything_and_any_other_is_waited_out() {
    for (code, is_final) in [
        (ErrorCode::Unauthenticated, true),
        (ErrorCode::Forbidden, true),
        (ErrorCode::UnsupportedProtocol, true),
        (ErrorCode::TooManyRequests, false),
        (ErrorCode::TooLarge, false),
        (ErrorCode::InvalidBody, false),
        (ErrorCode::Unavailable, false),
    ] {
        let message = || "no".to_owned();
        let in_session = Input::Heard(ToWorker::Reject { code, message: message(), retry_after_ms: None });
        for input in [in_session, Input::Rejected { code, message: message(), retry_after_ms: None }] {
            let mut bench = Bench::running();
            let effects = bench.give(input);
            let refused = Effect::Hangup(Reason::Refused { code, message: message() });
            let kill = Effect::Stop { attempt: AT, how: Stop::Kill(KillReason::Fenced) };
            let dials = effects.iter().any(|effect| matches!(effect, Effect::Dial { .. }));
            assert_eq!((effects.contains(&refused), effects.contains(&kill), dials), (is_final, is_final, !is_final));
        }
    }
}

#[test]
fn orders_before_the_welcome_are_not_heard() {
    let mut bench = Bench::new(Vec::new());
    bench.give(Input::Tick);
    bench.give(Input::Linked);
    assert_eq!(bench.give(assign(AT, 1)), []);
    bench.give(Input::Heard(ToWorker::Challenge { nonce: "n".into() }));
    assert_eq!(bench.give(assign(AT, 1)), []);
    assert_eq!(bench.give(Input::Heard(ToWorker::Challenge { nonce: "m".into() })), [], "one hello a session");
}

#[test]
fn a_result_goes_after_its_record_and_after_the_last_byte_of_its_log() {
    let mut bench = Bench::running();
    bench.give(Input::Spooled { attempt: AT, len: 100 });
    let effects = bench.give(report(result(100)));
    assert!(matches!(&effects[..], [Effect::Record { seq: 2, .. }]), "{effects:?}");
    assert_eq!(sent(&bench.give(recorded(2))), [0u64; 0], "on disk, but the log is not sent");
    let effects = bench.give(Input::Room);
    assert_eq!((logs(&effects), sent(&effects)), (Some((4, 0, 100)), vec![2]));
    assert_eq!(bench.give(report(phase())), [], "nothing follows a result");
    let ack = order(Order::ResultAck { attempt: AT });
    assert_eq!(bench.give(ack.clone()), [], "the executor still tears down");
    let effects = bench.give(Input::Closed { attempt: AT, teardown_ms: 30 });
    assert!(closes(&effects) && forgets(&effects), "{effects:?}");
    assert_eq!(bench.give(assign(AT, 9)), [], "a late assignment does not start it again");

    let mut bench = Bench::running();
    bench.give(report(result(0)));
    bench.give(recorded(2));
    assert_eq!(bench.give(Input::Closed { attempt: AT, teardown_ms: 30 }), [], "not acknowledged");
    let effects = bench.give(ack);
    assert!(closes(&effects) && forgets(&effects), "{effects:?}");
}

#[test]
fn the_log_window_opens_with_acknowledgements() {
    let mut bench = Bench::running();
    bench.give(Input::Spooled { attempt: AT, len: 100 << 20 });
    let mut durable = 0;
    let mut windows = Vec::new();
    for _ in 0..9 {
        let sent = bench.drain_log();
        assert!(sent <= limits::LOG_WINDOW);
        durable += sent;
        windows.push(sent);
        bench.ms += 10;
        let effects = bench.give(Input::Heard(ToWorker::LogAck { attempt: AT, durable }));
        assert!(effects.contains(&Effect::Release { attempt: AT, durable }), "{effects:?}");
    }
    assert_eq!((windows[0], windows[8]), (64 << 10, limits::LOG_WINDOW), "{windows:?}");
    // A slow line: less is in flight, so that heartbeats do not stand behind much.
    for _ in 0..12 {
        durable += bench.drain_log();
        bench.ms += 3_000;
        bench.give(Input::Heard(ToWorker::LogAck { attempt: AT, durable }));
    }
    assert_eq!(bench.drain_log(), 32 << 10);
}

#[test]
fn a_new_session_goes_on_from_what_is_durable() {
    let mut bench = Bench::running();
    bench.give(Input::Spooled { attempt: AT, len: 1_000 });
    bench.drain_log();
    bench.give(report(phase()));
    bench.give(recorded(2));
    bench.give(Input::Heard(ToWorker::LogAck { attempt: AT, durable: 300 }));
    bench.give(Input::Unlinked);
    bench.link();
    assert!(!bench.core.has_log(), "the handle of this session is not known yet");
    let go_on = |log_durable| order(Order::Continue { attempt: AT, handle: 8, log_durable, seq: 1 });
    assert_eq!(sent(&bench.give(go_on(400))), [2]);
    assert_eq!(logs(&bench.give(Input::Room)), Some((8, 400, 600)));
    assert_eq!(bench.give(go_on(400)), [], "said again, it sends nothing again");
    bench.ms += 2 * HEARTBEAT;
    let effects = bench.give(go_on(400));
    assert_eq!(sent(&effects), [2], "unless nothing moved for long");
    assert_eq!(logs(&bench.give(Input::Room)), Some((8, 400, 600)));
    assert_eq!(bench.give(go_on(700)), []);
    assert_eq!(logs(&bench.give(Input::Room)), Some((8, 700, 300)), "a gap in the middle of a session");
    bench.give(go_on(700));
    assert!(!bench.core.has_log(), "once for all chunks that were under way behind the gap");

    bench.give(Input::Unlinked);
    bench.link();
    bench.give(go_on(200));
    assert_eq!(logs(&bench.give(Input::Room)), Some((8, 200, 800)), "whoever stores it knows best");

    bench.give(Input::Unlinked);
    bench.link();
    assert_eq!(sent(&bench.give(assign(AT, 9))), [2], "an assignment of what is held: resend, no second start");
    bench.give(Input::Unlinked);
    bench.link();
    assert_eq!(sent(&bench.give(Input::Heard(ToWorker::EventAck { attempt: AT, seq: 1 }))), [2]);
}

#[test]
fn an_artifact_that_is_missing_goes_before_its_report_comes_again_ever_more_slowly() {
    let mut bench = Bench::running();
    bench.give(report(phase()));
    bench.give(report(phase()));
    bench.give(recorded(2));
    assert_eq!(sent(&bench.give(recorded(3))), [3]);
    let digest = Digest::of(b"artifact");
    let missing = || Input::Heard(ToWorker::Missing { attempt: AT, seq: 1, log_len: 0, artifacts: vec![digest] });
    let uploaded = || Input::Uploaded { attempt: AT, complete: true };
    assert_eq!(bench.give(missing()), [Effect::Upload { attempt: AT, artifacts: vec![digest] }]);
    assert_eq!(sent(&bench.give(uploaded())), [2, 3]);
    bench.give(missing());
    assert_eq!(sent(&bench.give(uploaded())), [0u64; 0]);
    bench.ms = bench.core.next_wake().0;
    assert_eq!(sent(&bench.wait(0)), [2, 3]);
}

#[test]
fn what_a_result_misses_is_sent_again() {
    let mut bench = Bench::running();
    bench.give(Input::Spooled { attempt: AT, len: 1_000 });
    bench.give(report(result(1_000)));
    bench.give(recorded(2));
    bench.drain_log();
    let missing = |log_len, artifacts| Input::Heard(ToWorker::Missing { attempt: AT, seq: 2, log_len, artifacts });
    assert_eq!(bench.give(missing(600, vec![])), []);
    let effects = bench.give(Input::Room);
    assert_eq!((logs(&effects), sent(&effects)), (Some((4, 600, 400)), vec![2]));
    // Then more slowly, so that a farm that cannot take it is not hammered.
    assert_eq!(sent(&bench.give(missing(1_000, vec![]))), [0u64; 0]);
    bench.ms = bench.core.next_wake().0;
    assert_eq!(sent(&bench.wait(0)), [2]);

    let digest = Digest::of(b"artifact");
    let effects = bench.give(missing(1_000, vec![digest]));
    assert_eq!(effects, [Effect::Upload { attempt: AT, artifacts: vec![digest] }]);
    bench.wait(1_000);
    assert_eq!(bench.give(missing(1_000, vec![digest])), [], "one upload at a time");
    bench.ms += 1_000;
    assert_eq!(sent(&bench.give(Input::Uploaded { attempt: AT, complete: true })), [2]);
    bench.give(missing(1_000, vec![digest]));
    bench.ms += 1_000;
    assert_eq!(sent(&bench.give(Input::Uploaded { attempt: AT, complete: false })), [0u64; 0]);
    assert!(sent(&bench.wait(HEARTBEAT)).contains(&2), "after a failed upload the result is tried again later");
}

#[test]
fn a_gap_in_the_reports_is_filled() {
    let mut bench = Bench::running();
    for seq in 2..=4 {
        bench.give(report(phase()));
        bench.give(recorded(seq));
    }
    let missing = Input::Heard(ToWorker::Missing { attempt: AT, seq: 2, log_len: 0, artifacts: vec![] });
    assert_eq!(sent(&bench.give(missing)), [3, 4]);
}

#[test]
fn cancel_and_fence_are_said_often_and_done_once() {
    let mut bench = Bench::running();
    let cancel = Order::Cancel { attempt: AT, grace_ms: 10 };
    let stop = Effect::Stop { attempt: AT, how: Stop::Cancel { grace_ms: 10 } };
    assert_eq!(bench.give(order(cancel.clone())), [stop]);
    let ack = Input::Heard(ToWorker::HeartbeatAck { n: 99, orders: vec![cancel.clone()] });
    assert_eq!(bench.give(ack), []);
    let kill = Effect::Stop { attempt: AT, how: Stop::Kill(KillReason::Fenced) };
    assert_eq!(bench.give(order(Order::Fence { attempt: AT })), [kill]);
    assert_eq!(bench.give(order(Order::Fence { attempt: AT })), []);
    bench.give(Input::Spooled { attempt: AT, len: 6 });
    assert!(!bench.core.has_log(), "a fenced attempt says nothing more while it runs");
    assert_eq!(bench.give(report(result(10))), [], "it has no result any more; its log has got its end");
    let effects = bench.give(Input::Closed { attempt: AT, teardown_ms: 1 });
    assert_eq!(bench.give(order(Order::Fence { attempt: AT })), [], "said before the farm heard that it is lost");
    let lost = |effect: &Effect| match effect {
        Effect::Send(ToOrchestrator::Heartbeat(beat)) => beat.held == [held(HeldState::Lost, 10, 1)],
        _ => false,
    };
    assert!(effects.iter().any(lost), "{effects:?}");
    let go_on = Order::Continue { attempt: AT, handle: 9, log_durable: 4, seq: 0 };
    bench.give(order(go_on));
    assert_eq!(logs(&bench.give(Input::Room)), Some((9, 4, 6)), "the rest of its log is sent");
    let effects = bench.give(Input::Heard(ToWorker::LogAck { attempt: AT, durable: 10 }));
    assert!(closes(&effects) && forgets(&effects), "{effects:?}");
    for late in [cancel, Order::Fence { attempt: AT }, Order::ResultAck { attempt: AT }] {
        assert_eq!(bench.give(order(late)), []);
    }
}

#[test]
fn a_fenced_attempt_whose_log_is_not_taken_is_forgotten() {
    let mut bench = Bench::running();
    bench.give(Input::Spooled { attempt: AT, len: 10 });
    bench.give(order(Order::Fence { attempt: AT }));
    bench.give(Input::Closed { attempt: AT, teardown_ms: 1 });
    bench.give(order(Order::Continue { attempt: AT, handle: 9, log_durable: 0, seq: 0 }));
    assert_eq!(bench.give(order(Order::Fence { attempt: AT })), [Effect::Forget { attempt: AT }]);
}

#[test]
fn an_executor_without_a_last_word_ends_as_a_fault_of_the_farm() {
    let mut bench = Bench::running();
    bench.give(Input::Spooled { attempt: AT, len: 7 });
    let effects = bench.give(Input::Closed { attempt: AT, teardown_ms: 0 });
    let [Effect::Record { seq: 2, report: Report::Result(result), .. }] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!((result.end.reason, result.log_len), (Some(EndReason::InternalError), 7));
    assert_eq!(bench.give(Input::Closed { attempt: AT, teardown_ms: 0 }), []);

    let mut bench = Bench::up();
    bench.give(assign(AT, 1));
    let effects = bench.give(Input::NotStarted { attempt: AT, message: "full".into() });
    let refused = Report::Refused { message: "full".into() };
    assert_eq!(effects, [Effect::Send(ToOrchestrator::Report { attempt: AT, seq: 1, report: refused })]);
    assert_eq!(bench.give(assign(AT, 1)), effects, "the same, as often as it is asked");
    assert!(bench.core.is_empty());
}
