use std::fmt::Write as _;
use std::path::Path;

use alloy_shared::id::WorkerId;

use super::*;

const W1: WorkerId = WorkerId::from_raw(1);
const NOW: Ms = Ms(10_000_000_000);

fn rules() -> Rules {
    Rules { retries: 1, ..Rules::of(&JobSpec::default(), &Limits::default()) }
}

fn lease(attempt: u32) -> Lease {
    Lease { attempt, worker: W1, assigned_at: Ms(0), avoid: Vec::new() }
}

/// One state of each kind, with and without tries left.
fn states() -> Vec<(&'static str, State)> {
    let state = |lost, failed, step| State { tries: Tries { made: 2, lost, failed }, step };
    let running = |phase| Step::Running { lease: lease(2), accepted_at: Ms(0), phase };
    let canceling = |then| Step::Canceling { lease: lease(2), since: Ms(0), then };
    vec![
        ("queued", state(0, 0, Step::Queued { since: Ms(0), avoid: vec![] })),
        ("assigned", state(0, 0, Step::Assigned { lease: lease(2) })),
        ("assigned, no tries left", state(2, 1, Step::Assigned { lease: lease(2) })),
        ("running preparing", state(0, 0, running(Phase::Preparing))),
        ("running executing", state(0, 0, running(Phase::Executing))),
        ("running executing, no tries left", state(2, 1, running(Phase::Executing))),
        ("running executing, lost by many hosts", state(5, 1, running(Phase::Executing))),
        ("canceling by the user", state(0, 0, canceling(Then::End(Reason::UserCanceled)))),
        ("canceling to requeue", state(0, 0, canceling(Then::Requeue(Reason::WorkerLost)))),
        ("done", state(0, 0, Step::Done { end: End::success(), at: Ms(0) })),
    ]
}

fn events(attempt: u32) -> Vec<(&'static str, Event)> {
    let finished = |end| Event::Finished { attempt, end };
    let because = |reason| finished(End::because(reason, "why"));
    let lost = Event::Lost { attempt, reason: Reason::WorkerLost, message: "gone".into() };
    vec![
        ("assigned", Event::Assigned { worker: W1 }),
        ("accepted", Event::Accepted { attempt }),
        ("refused", Event::Refused { attempt, message: "no".into() }),
        ("phase preparing", Event::Phase { attempt, phase: Phase::Preparing }),
        ("phase collecting", Event::Phase { attempt, phase: Phase::Collecting }),
        ("artifact", Event::Artifact { attempt }),
        ("finished well", finished(End::success())),
        ("finished, script failed", because(Reason::ScriptFailure)),
        ("finished, timed out", because(Reason::RunTimeout)),
        ("finished, canceled", because(Reason::UserCanceled)),
        ("finished, vm lost", because(Reason::VmLost)),
        ("finished, handed back", because(Reason::WorkerDrained)),
        ("finished, no image", because(Reason::ImagePullFailure)),
        ("no image anywhere", Event::NoImage { message: "404".into() }),
        ("finished, config error", because(Reason::ConfigError)),
        ("lost", lost),
        ("cancel asked", Event::CancelAsked { reason: Reason::UserCanceled }),
        ("deadline passed", late()),
    ]
}

fn late() -> Event {
    Event::DeadlinePassed { why: "nobody came".into() }
}

fn show(state: &State) -> String {
    let Tries { made, lost, failed } = state.tries;
    let step = match &state.step {
        Step::Queued { avoid, .. } if avoid.is_empty() => "queued".to_owned(),
        Step::Queued { .. } => "queued, elsewhere".to_owned(),
        Step::Assigned { lease } => format!("assigned attempt {}", lease.attempt),
        Step::Running { phase, .. } => format!("running {phase}"),
        Step::Canceling { then: Then::End(reason), .. } => format!("canceling, then {reason}"),
        Step::Canceling { then: Then::Requeue(_), .. } => "canceling, then requeue".to_owned(),
        Step::Done { end, .. } => match end.reason {
            None => "done: succeeded".to_owned(),
            Some(reason) => format!("done: {} ({reason})", end.outcome()),
        },
    };
    format!("{step} [made {made}, lost {lost}, failed {failed}]")
}

/// Compares with a committed text; `ALLOY_BLESS=1` writes it.
fn golden(path: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("ALLOY_BLESS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let known = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(known, text, "{} differs; ALLOY_BLESS=1 writes it anew", path.display());
}

#[test]
fn the_whole_table_is_as_committed() {
    let mut text = String::from("Every state and every event, from `apply`. The newest attempt is 2.\n");
    for (name, state) in states() {
        writeln!(text, "\n{name}").unwrap();
        for (event_name, event) in events(2) {
            let after = |rules| match apply(&state, &event, NOW, &rules) {
                Ok(after) if after == state => "the same".to_owned(),
                Ok(after) => show(&after),
                Err(refused) => format!("refused: {refused:?}"),
            };
            let (alone, untried) = (after(rules()), after(Rules { untried: true, ..rules() }));
            writeln!(text, "  {event_name:<24} -> {alone}").unwrap();
            if untried != alone {
                writeln!(text, "  {:>24} -> {untried}", "(another host is there)").unwrap();
            }
        }
    }
    let text: String = text.lines().map(|line| format!("{}\n", line.trim_end())).collect();
    golden("src/job/table.txt", &text);
}

#[test]
fn news_of_another_attempt_changes_nothing() {
    for (name, state) in states() {
        for stale in [1, 3] {
            for (event_name, event) in events(stale).into_iter().filter(|(name, _)| {
                !matches!(*name, "assigned" | "cancel asked" | "no image anywhere" | "deadline passed")
            }) {
                let refused = apply(&state, &event, NOW, &rules()).unwrap_err();
                assert!(matches!(refused, Refused::Stale | Refused::Terminal), "{name}: {event_name}");
            }
        }
    }
}

#[test]
fn what_is_left_of_a_term_is_never_more_than_all_of_it() {
    let term = Term { from: Ms(1_000), ms: 500 };
    for (now, left) in [(1_000, 500), (1_200, 300), (1_500, 0), (9_999, 0), (0, 500), (-5_000, 500)] {
        assert_eq!(term.left(Ms(now)), left, "at {now}");
    }
    for (name, state) in states() {
        assert_eq!(state.term(&rules()).is_none(), state.is_done(), "{name}");
    }
}

/// A walk over random events: what must hold after every step, whatever happens.
#[test]
fn whatever_happens_the_rules_hold() {
    let seed: u64 = std::env::var("ALLOY_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(20_261_120);
    println!("ALLOY_SEED={seed}");
    let mut dice = seed;
    let mut roll = move |n: u64| {
        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (dice >> 33) % n
    };
    for _ in 0..2_000 {
        let mut state = State::new(Ms(0));
        let mut now = Ms(0);
        for _ in 0..60 {
            let rules = Rules { untried: roll(3) > 0, ..rules() };
            now = now.plus(roll(2 * rules.queue_ms / 40));
            let attempt = (state.tries.made + 1).saturating_sub(roll(3) as u32);
            let all = events(attempt);
            let (_, event) = &all[roll(all.len() as u64) as usize];
            let Ok(next) = apply(&state, event, now, &rules) else { continue };
            assert!(!state.is_done(), "the end is for ever");
            assert!(next.tries.made >= state.tries.made && next.tries.made <= state.tries.made + 1);
            let losses_max = if rules.untried { rules.lost_hosts_max } else { rules.lost_max };
            assert!(next.tries.lost <= losses_max.max(state.tries.lost) && next.tries.failed <= rules.retries);
            let causes = next.tries.lost + next.tries.failed + HANDED_BACK_MAX;
            assert!(next.tries.made <= 1 + causes, "every further try has a cause");
            assert_eq!(next.lease().map(|lease| lease.attempt).unwrap_or(next.tries.made), next.tries.made);
            assert_eq!(next.term(&rules).is_none(), next.is_done(), "only the end may last");
            state = next;
        }
    }
}

#[test]
fn a_farm_fault_is_never_charged_to_the_user() {
    let state = State {
        tries: Tries { made: 1, lost: 0, failed: 0 },
        step: Step::Running { lease: lease(1), accepted_at: Ms(0), phase: Phase::Executing },
    };
    let end = End::because(Reason::VmLost, "gone");
    let after = apply(&state, &Event::Finished { attempt: 1, end }, NOW, &rules()).unwrap();
    assert_eq!(after.tries, Tries { made: 1, lost: 1, failed: 0 });
    assert!(matches!(after.step, Step::Queued { avoid, .. } if avoid == [W1]));
}

#[test]
fn a_job_is_tried_on_while_another_host_is_there_but_not_through_the_whole_farm() {
    let losses = |untried: &dyn Fn(u32) -> bool| {
        let mut state = State::new(Ms(0));
        while !state.is_done() {
            let worker = WorkerId::from_raw(u128::from(state.tries.made));
            let attempt = state.tries.made + 1;
            let end = Event::Finished { attempt, end: End::because(Reason::VmLost, "gone") };
            let rules = Rules { untried: untried(attempt), ..rules() };
            for event in [Event::Assigned { worker }, Event::Accepted { attempt }, end] {
                state = apply(&state, &event, NOW, &rules).unwrap();
            }
        }
        state.tries.made
    };
    assert_eq!(losses(&|_| false), 3, "all there are have lost it");
    assert_eq!(losses(&|attempt| attempt < 4), 4, "the fourth host was the last one");
    assert_eq!(losses(&|_| true), 6, "it kills whom it meets");
}

#[test]
fn a_job_that_was_handed_back_is_not_charged_but_not_for_ever() {
    let mut state = State::new(Ms(0));
    for lost in [0; HANDED_BACK_MAX as usize].into_iter().chain([1, 2]) {
        state = apply(&state, &Event::Assigned { worker: W1 }, NOW, &rules()).unwrap();
        let end = End::because(Reason::WorkerDrained, "ill");
        let event = Event::Finished { attempt: state.tries.made, end };
        state = apply(&state, &event, NOW, &rules()).unwrap();
        assert_eq!((state.tries.lost, state.tries.failed), (lost, 0));
        assert!(matches!(&state.step, Step::Queued { avoid, .. } if *avoid == [W1]));
    }
}

#[test]
fn a_command_that_has_begun_is_not_handed_back_but_lost() {
    let mut state = State::new(Ms(0));
    for lost in 1..=2 {
        let attempt = state.tries.made + 1;
        for event in [
            Event::Assigned { worker: W1 },
            Event::Accepted { attempt },
            Event::Phase { attempt, phase: Phase::Executing },
            Event::Finished { attempt, end: End::because(Reason::WorkerDrained, "stopping") },
        ] {
            state = apply(&state, &event, NOW, &rules()).unwrap();
        }
        assert_eq!(state.tries.lost, lost);
    }
}

#[test]
fn whoever_lost_a_job_is_remembered_through_every_later_attempt() {
    let worker = WorkerId::from_raw;
    let vm_lost = |attempt| Event::Finished { attempt, end: End::because(Reason::VmLost, "gone") };
    let failed = |attempt| Event::Finished { attempt, end: End::because(Reason::ScriptFailure, "3") };
    let handed_back = |attempt| Event::Finished { attempt, end: End::because(Reason::WorkerDrained, "ill") };
    let lost = |attempt| Event::Lost { attempt, reason: Reason::WorkerLost, message: "gone".into() };
    type Ends<'a> = &'a [(u128, &'a dyn Fn(u32) -> Event)];
    let cases: [(Ends<'_>, &[u128]); 5] = [
        (&[(1, &vm_lost), (2, &lost)], &[1, 2]),
        (&[(1, &handed_back), (2, &vm_lost), (3, &handed_back)], &[1, 2, 3]),
        (&[(1, &vm_lost), (2, &lost), (1, &handed_back)], &[2, 1]),
        // A command that failed by itself says nothing about its worker.
        (&[(1, &vm_lost), (2, &failed)], &[1]),
        (&[(2, &failed)], &[]),
    ];
    for (number, (ends, avoided)) in cases.into_iter().enumerate() {
        let mut state = State::new(Ms(0));
        for (by, end) in ends {
            let attempt = state.tries.made + 1;
            let steps = [Event::Assigned { worker: worker(*by) }, Event::Accepted { attempt }, end(attempt)];
            state = steps.iter().fold(state, |state, event| apply(&state, event, NOW, &rules()).unwrap());
        }
        let Step::Queued { avoid, .. } = state.step else { panic!("case {number}: {state:?}") };
        let avoided: Vec<_> = avoided.iter().copied().map(worker).collect();
        assert_eq!(avoid, avoided, "case {number}");
    }
}

#[test]
fn a_job_that_waited_too_long_says_what_it_waited_for() {
    let after = apply(&State::new(Ms(0)), &late(), NOW, &rules()).unwrap();
    let Step::Done { end, .. } = after.step else { panic!("{after:?}") };
    assert_eq!(end, End::because(Reason::QueueExpired, "nobody came"));
}
