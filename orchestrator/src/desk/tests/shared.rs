//! One of several orchestrators: what the others decide, and whom it may not call late.

use super::*;

fn limits() -> Limits {
    Limits::default()
}

/// A desk beside others, past the time that workers have to come back.
fn desk() -> (Desk, i64) {
    (Desk::new(limits(), Mono(0)).shared(), limits().startup_grace_ms as i64)
}

/// The job as a desk has it, with its open attempt.
fn held(desk: &Desk, n: u128) -> (Job, Option<Attempt>) {
    let live = desk.live.get(&id(n)).expect("a live job");
    (live.job.clone(), live.attempt.clone())
}

fn elsewhere(n: u128) -> Request {
    let Request::Offer(offer) = offer(n, &[FREE]) else { unreachable!() };
    Request::Elsewhere(vec![offer])
}

fn lefts(effects: &[Effect]) -> Vec<Option<WorkerId>> {
    let left = |effect: &Effect| match effect {
        Effect::Learned { left, .. } => Some(*left),
        Effect::Answer { .. } | Effect::Moved { .. } | Effect::Reload { .. } => None,
    };
    effects.iter().filter_map(left).collect()
}

#[test]
fn what_another_one_decided_is_news_once_and_never_goes_back() {
    let (mut theirs, _) = desk();
    turn(&mut theirs, 0, vec![offer(1, &[FREE]), submit(1, 10)]);
    let assigned = held(&theirs, 10);
    turn(&mut theirs, 1, vec![report(2, 10, 1, 1, Event::Accepted { attempt: 1 })]);
    let accepted = held(&theirs, 10);

    let (mut ours, _) = desk();
    let (groups, effects) = turn(&mut ours, 2, vec![Request::Loaded(vec![accepted.clone()])]);
    assert!(groups.is_empty(), "what is read is not written again: {groups:?}");
    assert_eq!((moved(&effects), lefts(&effects)), (vec![(10, accepted.0.state.word())], vec![None]));
    for known in [accepted.clone(), assigned] {
        assert_eq!(turn(&mut ours, 3, vec![Request::Loaded(vec![known])]).1, []);
        assert_eq!(held(&ours, 10), accepted);
    }
}

#[test]
fn what_was_read_of_a_job_before_its_end_does_not_bring_it_back() {
    let finish = |desk: &mut Desk| {
        let end = Event::Finished { attempt: 1, end: End::success() };
        moved(&turn(desk, 2, vec![report(2, 10, 1, 1, Event::Accepted { attempt: 1 }), report(3, 10, 1, 2, end)]).1)
    };
    let (mut theirs, _) = desk();
    turn(&mut theirs, 0, vec![offer(1, &[FREE]), submit(1, 10)]);
    let assigned = held(&theirs, 10);
    let state = job::State { step: Step::Done { end: End::success(), at: Ms(2) }, ..assigned.0.state.clone() };
    let done = (Job { state, version: 9, ..assigned.0.clone() }, None);

    // It ended here, or was heard to have ended, or was found so after a miss.
    for how in 0..3 {
        let (mut ours, _) = desk();
        turn(&mut ours, 1, vec![offer(1, &[FREE]), Request::Loaded(vec![assigned.clone()])]);
        match how {
            0 => assert_eq!(finish(&mut ours).last(), Some(&(10, StateWord::Succeeded))),
            1 => assert_eq!(moved(&turn(&mut ours, 2, vec![Request::Loaded(vec![done.clone()])]).1).len(), 1),
            _ => ours.restore(vec![done.clone()], at(2)),
        }
        assert_eq!(turn(&mut ours, 3, vec![Request::Loaded(vec![assigned.clone()])]).1, [], "{how}");
        assert_eq!(ours.live_count(), 0, "{how}");
        assert_eq!(moved(&turn(&mut ours, 4, vec![submit(4, 11)]).1), [(11, StateWord::Assigned)], "{how}");
    }
}

#[test]
fn a_worker_that_another_one_took_the_job_from_is_told() {
    let (mut ours, _) = desk();
    turn(&mut ours, 0, vec![offer(1, &[FREE]), submit(1, 10)]);
    let (mut theirs, _) = desk();
    turn(&mut theirs, 0, vec![Request::Loaded(vec![held(&ours, 10)])]);
    let cancel = Request::Cancel { ticket: 2, job: id(10), reason: Reason::UserCanceled };
    turn(&mut theirs, 1, vec![cancel]);
    let canceling = held(&theirs, 10);
    let end = End::because(Reason::UserCanceled, "canceled");
    let (groups, _) = turn(&mut theirs, 2, vec![report(3, 10, 1, 1, Event::Finished { attempt: 1, end })]);
    let [Write::Advance(ended)] = groups[0].0.as_slice() else { panic!("{groups:?}") };

    let (_, effects) = turn(&mut ours, 3, vec![Request::Loaded(vec![canceling])]);
    assert_eq!((moved(&effects), lefts(&effects)), (vec![(10, StateWord::Canceling)], vec![None]), "it still has it");
    let (_, effects) = turn(&mut ours, 4, vec![Request::Loaded(vec![(ended.next.clone(), None)])]);
    assert_eq!((moved(&effects), lefts(&effects)), (vec![(10, StateWord::Canceled)], vec![Some(worker(1))]));
    assert_eq!(ours.live_count(), 0);
    let (_, effects) = turn(&mut ours, 5, vec![submit(4, 11)]);
    assert_eq!(moved(&effects), [(11, StateWord::Assigned)], "its slot is free again");
}

#[test]
fn a_worker_of_another_one_gets_no_job_from_here_and_is_yet_a_reason_to_wait() {
    let (mut desk, _) = desk();
    let (_, effects) = turn(&mut desk, 0, vec![elsewhere(1), submit(1, 10)]);
    assert_eq!(moved(&effects), [(10, StateWord::Queued)]);
    let nobody = turn(&mut Desk::new(limits(), Mono(0)), 0, vec![submit(1, 10)]);
    assert_eq!(moved(&nobody.1), [(10, StateWord::Queued)]);
    assert_eq!(desk.why_not(&id(10)), Some(pick::WhyNot::Busy { workers: 1, slots: 1 }));
    let (_, effects) = turn(&mut desk, 1, vec![offer(2, &[FREE])]);
    assert_eq!(moved(&effects), [(10, StateWord::Assigned)]);
    assert_eq!(held(&desk, 10).0.state.lease().map(|lease| lease.worker), Some(worker(2)));
}

#[test]
fn whoever_has_the_worker_calls_it_late_first() {
    let (mut theirs, start) = desk();
    turn(&mut theirs, start, vec![offer(1, &[FREE]), submit(1, 10)]);
    let job = held(&theirs, 10);
    let (mut ours, _) = desk();
    turn(&mut ours, start, vec![Request::Loaded(vec![job])]);
    let (late, patience) = (start + limits().accept_ms as i64, 2 * limits().expiry_ms as i64);
    assert_eq!(moved(&turn(&mut ours, late + patience - 1, vec![]).1), []);
    assert_eq!(moved(&turn(&mut theirs, late, vec![]).1), [(10, StateWord::Canceling)]);
    assert_eq!(moved(&turn(&mut ours, late + patience, vec![]).1), [(10, StateWord::Canceling)], "if nobody else does");
}

#[test]
fn a_job_of_another_one_waits_its_whole_time_whatever_the_clock_there_says() {
    let (mut theirs, _) = desk();
    turn(&mut theirs, 0, vec![submit(1, 10)]);
    let waits = limits().queue_timeout_ms as i64;
    // By the clock here it has waited too long already.
    let (mut ours, now) = (desk().0, waits + 60_000);
    assert_eq!(
        moved(&turn(&mut ours, now, vec![Request::Loaded(vec![held(&theirs, 10)])]).1),
        [(10, StateWord::Queued)]
    );
    assert_eq!(moved(&turn(&mut ours, now + waits - 1, vec![]).1), []);
    assert_eq!(moved(&turn(&mut ours, now + waits, vec![]).1).len(), 1);
}

#[test]
fn after_a_commit_that_took_too_long_or_failed_nobody_is_late_before_all_that_waited_was_heard() {
    let accept_ms = limits().accept_ms;
    for (done, took) in [(true, accept_ms), (false, 1)] {
        let (mut desk, start) = desk();
        turn(&mut desk, start, vec![offer(1, &[FREE]), submit(1, 10)]);
        let begun = start + accept_ms as i64 - 1;
        let groups = desk.decide(vec![submit(2, 11)], at(begun));
        let committed = Committed { groups: groups.iter().map(|_| Ok(vec![1])).collect() };
        let done = if done { Ok(committed) } else { Err(StoreError::Unavailable("away".into())) };
        let back = Mono(begun as u64) + took;
        desk.committed(done, false, back);
        let heard = back + accept_ms;
        assert_eq!(desk.next_wake(), Some(heard));
        assert_eq!(moved(&turn(&mut desk, heard.0 as i64 - 1, vec![]).1), []);
        assert_eq!(moved(&turn(&mut desk, heard.0 as i64, vec![]).1), [(10, StateWord::Canceling)]);
    }
}
