use alloy_shared::env::Mono;
use alloy_shared::id::{DEFAULT_ORG, Digest};
use alloy_shared::wire::job::{End, JobSpec, Phase, StateWord, Timings};
use alloy_shared::wire::session::{SlotState, SlotView};

use super::*;

mod away;
mod orgs;
mod shared;
mod walk;

const EPOCH: i64 = 1;

fn worker(n: u128) -> WorkerId {
    WorkerId::from_raw(n)
}

fn id(n: u128) -> JobId {
    JobId::from_raw(n)
}

fn at(ms: i64) -> Now {
    Now { wall: Ms(ms), mono: Mono(ms as u64) }
}

fn submit(ticket: Ticket, n: u128) -> Request {
    let spec = JobSpec { shell: Some("true".into()), ..JobSpec::default() };
    let by = By { org: DEFAULT_ORG, caller: "me".into() };
    Request::Submit { ticket, id: id(n), by, body: Arc::new(SubmitJob { spec, source: None }), key: None }
}

fn offer(n: u128, slots: &[(SlotState, Option<AttemptRef>)]) -> Request {
    let slots =
        slots.iter().map(|(state, attempt)| SlotView { state: *state, attempt: *attempt, image: None }).collect();
    Request::Offer(Offer {
        worker: worker(n),
        org: DEFAULT_ORG,
        name: format!("w{n}"),
        labels: Labels::default(),
        slots,
        images: Default::default(),
        draining: false,
    })
}

fn report(ticket: Ticket, job: u128, from: u128, seq: u64, event: Event) -> Request {
    let attempt = match &event {
        Event::Accepted { attempt } | Event::Phase { attempt, .. } | Event::Finished { attempt, .. } => *attempt,
        _ => panic!("a worker's report"),
    };
    let from = From { at: AttemptRef { job: id(job), attempt }, worker: worker(from), epoch: EPOCH };
    Request::Report { ticket, from, seq, event, news: Box::default() }
}

/// Decides and commits; the store agrees with everything.
fn turn(desk: &mut Desk, now: i64, requests: Vec<Request>) -> (Vec<Group>, Vec<Effect>) {
    let groups = desk.decide(requests, at(now));
    let done = Committed { groups: groups.iter().map(|_| Ok(vec![1])).collect() };
    let effects = desk.committed(Ok(done), false, Mono(0));
    (groups, effects)
}

fn answers(effects: &[Effect]) -> Vec<(Ticket, &Answer)> {
    effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Answer { ticket, answer } => Some((*ticket, answer)),
            Effect::Moved { .. } | Effect::Learned { .. } | Effect::Reload { .. } => None,
        })
        .collect()
}

fn moved(effects: &[Effect]) -> Vec<(u128, StateWord)> {
    effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Moved { job, .. } | Effect::Learned { job, .. } => Some((job.id.raw(), job.state.word())),
            Effect::Answer { .. } | Effect::Reload { .. } => None,
        })
        .collect()
}

fn reloads(effects: &[Effect]) -> Vec<(u128, Option<WorkerId>)> {
    effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Reload { job, left } => Some((job.raw(), *left)),
            Effect::Answer { .. } | Effect::Moved { .. } | Effect::Learned { .. } => None,
        })
        .collect()
}

const FREE: (SlotState, Option<AttemptRef>) = (SlotState::Warm, None);

#[test]
fn with_a_free_slot_a_job_is_born_assigned_in_one_group() {
    let mut desk = Desk::new(Limits::default(), Mono(0));
    turn(&mut desk, 0, vec![offer(1, &[FREE])]);
    let (groups, effects) = turn(&mut desk, 5, vec![submit(1, 10), submit(2, 11)]);
    let [Write::InsertJob(first)] = groups[0].0.as_slice() else { panic!("{groups:?}") };
    assert_eq!((first.job.version, first.job.state.word(), first.job.events), (1, StateWord::Assigned, 2));
    assert_eq!(first.attempt.as_ref().unwrap().timings.queue_ms, Some(0));
    assert_eq!(first.events.iter().map(|event| event.seq).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(moved(&effects), [(10, StateWord::Assigned), (11, StateWord::Queued)]);
    assert_eq!(groups.len(), 2);
}

#[test]
fn a_job_that_sleeps_is_given_to_nobody_and_can_be_canceled() {
    let mut desk = Desk::new(Limits::default(), Mono(0));
    turn(&mut desk, 0, vec![submit(1, 10), submit(2, 11), submit(3, 12)]);
    turn(&mut desk, 1, vec![Request::Asleep { ticket: 4, jobs: BTreeSet::from([id(10), id(12)]) }]);
    let (_, effects) = turn(&mut desk, 2, vec![offer(1, &[FREE, FREE])]);
    assert_eq!(moved(&effects), [(11, StateWord::Assigned)]);
    assert_eq!((desk.why_not(&id(10)), desk.why_not(&id(11))), (Some(pick::WhyNot::Asleep), None));
    let cancel = Request::Cancel { ticket: 5, job: id(10), reason: Reason::UserCanceled };
    assert_eq!(moved(&turn(&mut desk, 3, vec![cancel]).1), [(10, StateWord::Canceled)]);
    let awake = Request::Asleep { ticket: 6, jobs: BTreeSet::new() };
    assert_eq!(moved(&turn(&mut desk, 4, vec![awake]).1), [(12, StateWord::Assigned)]);
}

#[test]
fn the_versions_of_a_job_that_was_born_assigned_go_on_from_one() {
    let mut desk = Desk::new(Limits::default(), Mono(0));
    turn(&mut desk, 0, vec![offer(1, &[FREE]), submit(1, 10)]);
    let (groups, _) = turn(&mut desk, 7, vec![report(2, 10, 1, 1, Event::Accepted { attempt: 1 })]);
    let [Write::Advance(accepted)] = groups[0].0.as_slice() else { panic!("{groups:?}") };
    assert_eq!((accepted.next.version, accepted.next.events), (2, 3));
    assert_eq!(accepted.attempt.as_ref().unwrap().timings.assign_ms, Some(7));
    assert_eq!(accepted.guard, Guard::Fence { attempt: 1, worker: worker(1), epoch: EPOCH });
}

#[test]
fn an_attempt_that_was_revoked_is_told_as_lost_and_not_as_canceled() {
    let mut desk = Desk::new(Limits::default(), Mono(0));
    turn(&mut desk, 0, vec![offer(1, &[FREE]), submit(1, 10)]);
    let late = (Limits::default().startup_grace_ms + Limits::default().accept_ms) as i64;
    assert_eq!(moved(&turn(&mut desk, late, vec![]).1), [(10, StateWord::Canceling)]);
    let end = End::because(Reason::UserCanceled, "canceled");
    let (groups, _) = turn(&mut desk, late + 5, vec![report(2, 10, 1, 1, Event::Finished { attempt: 1, end })]);
    let [Write::Advance(requeued)] = groups[0].0.as_slice() else { panic!("{groups:?}") };
    assert_eq!(requeued.next.state.word(), StateWord::Queued);
    assert_eq!(requeued.attempt.as_ref().unwrap().end.as_ref().unwrap().reason, Some(Reason::WorkerLost));
    assert_eq!(requeued.events[0].reason, Some(Reason::WorkerLost));
}

#[test]
fn a_report_is_applied_once_and_in_order() {
    let mut desk = Desk::new(Limits::default(), Mono(0));
    turn(&mut desk, 0, vec![offer(1, &[FREE]), submit(1, 10)]);
    let accepted = || Event::Accepted { attempt: 1 };
    let (_, effects) = turn(
        &mut desk,
        1,
        vec![
            report(2, 10, 1, 1, accepted()),
            report(3, 10, 1, 1, accepted()),
            report(4, 10, 1, 5, accepted()),
            report(5, 10, 2, 2, accepted()),
        ],
    );
    let answers = answers(&effects);
    assert!(matches!(answers[0], (2, Answer::Job(_))));
    assert_eq!(
        &answers[1..],
        [(3, &Answer::Applied), (4, &Answer::Gap { have: 1 }), (5, &Answer::Refused(Refused::Stale))]
    );
}

#[test]
fn a_slot_counts_as_taken_until_the_worker_says_that_it_is_clean() {
    let mut desk = Desk::new(Limits::default(), Mono(0));
    let attempt = AttemptRef { job: id(10), attempt: 1 };
    turn(&mut desk, 0, vec![offer(1, &[FREE]), submit(1, 10)]);
    turn(&mut desk, 1, vec![offer(1, &[(SlotState::Claimed, Some(attempt))])]);
    turn(&mut desk, 2, vec![report(2, 10, 1, 1, Event::Accepted { attempt: 1 })]);
    let end = Event::Finished { attempt: 1, end: End::success() };
    let (_, effects) = turn(&mut desk, 3, vec![report(3, 10, 1, 2, end), submit(4, 11)]);
    assert_eq!(moved(&effects), [(10, StateWord::Succeeded), (11, StateWord::Queued)]);
    let (_, effects) = turn(&mut desk, 4, vec![offer(1, &[(SlotState::Recycling, Some(attempt))])]);
    assert_eq!(moved(&effects), []);
    let (_, effects) = turn(&mut desk, 5, vec![offer(1, &[FREE])]);
    assert_eq!(moved(&effects), [(11, StateWord::Assigned)]);
}

#[test]
fn a_quarantined_slot_is_no_slot() {
    let mut desk = Desk::new(Limits::default(), Mono(0));
    let offer = offer(1, &[(SlotState::Quarantined, None), FREE]);
    let (_, effects) = turn(&mut desk, 0, vec![offer, submit(1, 10), submit(2, 11)]);
    assert_eq!(moved(&effects), [(10, StateWord::Assigned), (11, StateWord::Queued)]);
}

#[test]
fn a_silent_worker_loses_its_jobs_to_another_one() {
    let mut desk = Desk::new(Limits::default(), Mono(0));
    turn(&mut desk, 0, vec![offer(1, &[FREE]), submit(1, 10)]);
    turn(&mut desk, 1, vec![report(2, 10, 1, 1, Event::Accepted { attempt: 1 }), offer(2, &[FREE])]);
    let (groups, effects) = turn(&mut desk, 2, vec![Request::Silent(worker(1))]);
    assert_eq!(moved(&effects), [(10, StateWord::Queued), (10, StateWord::Assigned)]);
    let [Write::Advance(again)] = groups[1].0.as_slice() else { panic!("{groups:?}") };
    let lease = again.next.state.lease().unwrap();
    assert_eq!((lease.worker, lease.attempt, again.next.state.tries.lost), (worker(2), 2, 1));
}

#[test]
fn when_nothing_was_committed_nothing_is_answered_as_done_and_all_is_loaded_again() {
    let mut desk = Desk::new(Limits::default(), Mono(0));
    turn(&mut desk, 0, vec![offer(1, &[FREE]), submit(1, 10)]);
    let reports =
        vec![report(2, 10, 1, 1, Event::Accepted { attempt: 1 }), report(3, 10, 1, 1, Event::Accepted { attempt: 1 })];
    let groups = desk.decide([reports, vec![submit(4, 11)]].concat_requests(), at(1));
    assert_eq!(groups.len(), 2);
    let effects = desk.committed(Err(StoreError::Full("disk".into())), false, Mono(0));
    let answers = answers(&effects);
    assert_eq!(
        answers,
        [
            (2, &Answer::Failed(StoreError::Full("disk".into()))),
            (4, &Answer::Failed(StoreError::Full("disk".into()))),
            (3, &Answer::Stale)
        ]
    );
    assert_eq!(reloads(&effects), [(10, None)]);
    assert_eq!(desk.live_count(), 0);
}

trait ConcatRequests {
    fn concat_requests(self) -> Vec<Request>;
}
impl ConcatRequests for [Vec<Request>; 2] {
    fn concat_requests(self) -> Vec<Request> {
        self.into_iter().flatten().collect()
    }
}

#[test]
fn a_known_key_gives_its_job_and_frees_the_slot_again() {
    let mut desk = Desk::new(Limits::default(), Mono(0));
    turn(&mut desk, 0, vec![offer(1, &[FREE])]);
    let groups = desk.decide(vec![submit(1, 10)], at(1));
    assert_eq!(groups.len(), 1);
    let body = Digest::of(b"x");
    let effects =
        desk.committed(Ok(Committed { groups: vec![Err(Miss::Exists { job: id(5), body })] }), false, Mono(0));
    assert_eq!(answers(&effects), [(1, &Answer::Exists { job: id(5), body })]);
    let (_, effects) = turn(&mut desk, 2, vec![submit(2, 11)]);
    assert_eq!(moved(&effects), [(11, StateWord::Assigned)]);
}

#[test]
fn a_deadline_wakes_the_desk_and_ends_the_wait() {
    let limits = Limits::default();
    let mut desk = Desk::new(limits.clone(), Mono(0));
    turn(&mut desk, 0, vec![submit(1, 10)]);
    let due = desk.next_wake().unwrap();
    assert_eq!(due, Mono(limits.queue_timeout_ms));
    let (_, effects) = turn(&mut desk, due.0 as i64, vec![]);
    assert_eq!(moved(&effects), [(10, StateWord::Expired)]);
    let Some(Effect::Moved { job, .. }) = effects.first() else { panic!("{effects:?}") };
    let Step::Done { end, .. } = &job.state.step else { panic!("{job:?}") };
    assert_eq!(end.message, "no worker took it in time: no worker is connected");
    assert_eq!((desk.next_wake(), desk.live_count()), (None, 0));
}

#[test]
fn phases_and_cancel_are_told_as_events() {
    let mut desk = Desk::new(Limits::default(), Mono(0));
    turn(&mut desk, 0, vec![offer(1, &[FREE]), submit(1, 10)]);
    let phase = Event::Phase { attempt: 1, phase: Phase::Executing };
    let cancel = Request::Cancel { ticket: 4, job: id(10), reason: Reason::UserCanceled };
    let (groups, _) = turn(
        &mut desk,
        1,
        vec![
            report(2, 10, 1, 1, Event::Accepted { attempt: 1 }),
            report(3, 10, 1, 2, phase.clone()),
            report(5, 10, 1, 3, phase),
            cancel,
        ],
    );
    let kinds: Vec<Vec<&str>> = groups
        .iter()
        .map(|group| match group.0.as_slice() {
            [Write::Advance(advance)] => advance.events.iter().map(|event| event.kind.as_str()).collect(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(kinds, [vec!["accepted"], vec!["phase"], vec![], vec!["cancel_requested"]]);
}

#[test]
fn a_commit_of_unknown_fate_is_not_a_second_job() {
    let mut desk = Desk::new(Limits::default(), Mono(0));
    desk.decide(vec![submit(1, 10)], at(1));
    let effects = desk.committed(Ok(Committed { groups: vec![Err(Miss::Stale)] }), true, Mono(0));
    assert!(matches!(answers(&effects)[..], [(1, Answer::Job(_))]), "{effects:?}");
    assert!(reloads(&effects) == [(10, None)] && desk.live_count() == 1);
}

#[test]
fn whoever_lost_a_job_in_a_commit_of_unknown_fate_is_told_when_it_is_loaded() {
    let mut desk = Desk::new(Limits::default(), Mono(0));
    turn(&mut desk, 0, vec![offer(1, &[FREE]), submit(1, 10)]);
    let from = From { at: AttemptRef { job: id(10), attempt: 1 }, worker: worker(1), epoch: EPOCH };
    let event = Event::Refused { attempt: 1, message: "no room".into() };
    let refused = Request::Report { ticket: 2, from, seq: 1, event, news: Box::default() };
    // It is requeued and given to the next worker in one commit.
    let groups = desk.decide(vec![offer(2, &[FREE]), refused], at(1));
    assert_eq!(groups.len(), 2);
    let effects = desk.committed(Ok(Committed { groups: vec![Err(Miss::Stale), Err(Miss::Stale)] }), true, Mono(0));
    assert_eq!(reloads(&effects), [(10, Some(worker(1)))]);
}

#[test]
fn after_a_start_a_leased_job_is_not_overdue_before_its_worker_could_come_back() {
    let limits = Limits::default();
    let grace = limits.startup_grace_ms as i64;
    let mut first = Desk::new(limits.clone(), Mono(0));
    turn(&mut first, 0, vec![offer(1, &[FREE]), submit(1, 10)]);
    let live = first.live[&id(10)].clone();
    let started = 10_000_000;
    let mut desk = Desk::new(limits, Mono(started as u64));
    desk.restore(vec![(live.job, live.attempt)], at(started));
    assert_eq!(desk.next_wake(), Some(Mono((started + grace) as u64)));
    assert_eq!(moved(&turn(&mut desk, started + 1, vec![]).1), []);
    assert_eq!(moved(&turn(&mut desk, started + grace, vec![]).1), [(10, StateWord::Canceling)]);
}

/// The same on a wall clock that differs from the monotonic one.
fn turn_at(desk: &mut Desk, mono: u64, wall: i64, requests: Vec<Request>) -> Vec<Effect> {
    let groups = desk.decide(requests, Now { wall: Ms(wall), mono: Mono(mono) });
    desk.committed(Ok(Committed { groups: groups.iter().map(|_| Ok(vec![1])).collect() }), false, Mono(0))
}

const DAY: i64 = 86_400_000;

#[test]
fn a_wall_clock_that_is_set_ends_no_wait_early_and_keeps_none_late() {
    let limits = Limits::default();
    let queue = limits.queue_timeout_ms;
    for (name, set) in [("forward", 400 * DAY), ("back", -400 * DAY), ("not", 0)] {
        let mut desk = Desk::new(limits.clone(), Mono(0));
        turn_at(&mut desk, 0, 0, vec![submit(1, 10)]);
        assert_eq!(moved(&turn_at(&mut desk, 1, set, vec![submit(2, 11)])), [(11, StateWord::Queued)], "{name}");
        assert_eq!(moved(&turn_at(&mut desk, queue - 1, set, vec![])), [], "{name}");
        assert_eq!(moved(&turn_at(&mut desk, queue, set, vec![])), [(10, StateWord::Expired)], "{name}");
        assert_eq!(moved(&turn_at(&mut desk, queue + 1, set, vec![])), [(11, StateWord::Expired)], "{name}");
        assert_eq!(desk.next_wake(), None, "{name}");
    }
}

#[test]
fn a_running_job_keeps_its_deadline_over_news_a_missed_commit_and_a_clock_that_is_set() {
    let limits = Limits::default();
    let run = Rules::of(&JobSpec::default(), &limits).run_ms;
    for (name, set) in [("forward", 400 * DAY), ("back", -400 * DAY)] {
        let mut desk = Desk::new(limits.clone(), Mono(0));
        turn_at(&mut desk, 0, 0, vec![offer(1, &[FREE]), submit(1, 10)]);
        turn_at(&mut desk, 0, 0, vec![report(2, 10, 1, 1, Event::Accepted { attempt: 1 })]);
        let truth = desk.live[&id(10)].clone();
        assert_eq!(desk.next_wake(), Some(Mono(run)), "{name}");
        let phase = |seq, phase| report(3, 10, 1, seq, Event::Phase { attempt: 1, phase });
        let end = Event::Finished { attempt: 1, end: End::success() };

        let set_at = Now { wall: Ms(set), mono: Mono(5) };
        assert_eq!(desk.decide(vec![phase(2, Phase::Executing), report(4, 10, 1, 3, end)], set_at).len(), 2, "{name}");
        let effects = desk.committed(Err(StoreError::Full("disk".into())), false, Mono(0));
        assert!(matches!(reloads(&effects)[..], [(10, _)]), "{name}: {effects:?}");
        desk.restore(vec![(truth.job, truth.attempt)], set_at);
        assert_eq!(desk.next_wake(), Some(Mono(run)), "{name}: loaded again");

        assert_eq!(moved(&turn_at(&mut desk, 6, set, vec![phase(2, Phase::Executing)])), [(10, StateWord::Running)]);
        assert_eq!(desk.next_wake(), Some(Mono(run)), "{name}: after news");
        let cancel = Request::Cancel { ticket: 5, job: id(10), reason: Reason::UserCanceled };
        turn_at(&mut desk, 7, set, vec![cancel]);
        let cancel_ms = Rules::of(&JobSpec::default(), &limits).cancel_ms;
        assert_eq!(desk.next_wake(), Some(Mono(7 + cancel_ms)), "{name}: a new state has a term of its own");
    }
}

#[test]
fn what_is_loaded_has_what_the_wall_clock_left_of_it() {
    let limits = Limits::default();
    let (queue, started) = (limits.queue_timeout_ms, Mono(3));
    let mut first = Desk::new(limits.clone(), Mono(0));
    turn_at(&mut first, 0, 0, vec![submit(1, 10)]);
    let job = first.live[&id(10)].job.clone();
    let grace = limits.startup_grace_ms;
    let rows =
        [("later", 1_000, queue - 1_000), ("much later", 400 * DAY, grace), ("on a clock set back", -400 * DAY, queue)];
    for (name, wall, left) in rows {
        let mut desk = Desk::new(limits.clone(), started);
        desk.restore(vec![(job.clone(), None)], Now { wall: Ms(wall), mono: started });
        assert_eq!(desk.next_wake(), Some(started + left), "{name}");
    }
}

#[test]
fn a_job_whose_wait_was_over_while_nobody_looked_gets_a_worker_that_comes_in_time() {
    let limits = Limits::default();
    let grace = limits.startup_grace_ms as i64;
    let mut first = Desk::new(limits.clone(), Mono(0));
    turn(&mut first, 0, vec![submit(1, 10), submit(2, 11)]);
    let jobs = [10, 11].map(|n| (first.live[&id(n)].job.clone(), None));
    let started = 400 * DAY;
    let mut desk = Desk::new(limits, Mono(started as u64));
    desk.restore(jobs.to_vec(), at(started));
    assert_eq!(moved(&turn(&mut desk, started + 1, vec![offer(1, &[FREE])]).1), [(10, StateWord::Assigned)]);
    assert_eq!(moved(&turn(&mut desk, started + grace, vec![]).1).last(), Some(&(11, StateWord::Expired)));
}

#[test]
fn what_is_done_with_a_result_until_it_is_decided_belongs_to_collect() {
    let mut desk = Desk::new(Limits::default(), Mono(0));
    turn(&mut desk, 0, vec![offer(1, &[FREE]), submit(1, 10)]);
    turn(&mut desk, 1, vec![report(2, 10, 1, 1, Event::Accepted { attempt: 1 })]);
    let Request::Report { ticket, from, seq, event, .. } =
        report(3, 10, 1, 2, Event::Finished { attempt: 1, end: End::success() })
    else {
        panic!("a report")
    };
    let timings = Timings { exec_ms: Some(5), collect_ms: Some(7), ..Timings::default() };
    let news = Box::new(News { timings, heard: Some(Mono(40)), ..News::default() });
    // The wall clock was set meanwhile.
    let groups =
        desk.decide(vec![Request::Report { ticket, from, seq, event, news }], Now { wall: Ms(-9), mono: Mono(60) });
    let [Write::Advance(done)] = groups[0].0.as_slice() else { panic!("{groups:?}") };
    let timings = &done.attempt.as_ref().unwrap().timings;
    assert_eq!((timings.exec_ms, timings.collect_ms), (Some(5), Some(27)));
}

/// Lets whoever holds the job lose it until it ends. Returns who lost it.
fn losers(desk: &mut Desk, offers: &[u128]) -> Vec<u128> {
    turn(desk, 0, offers.iter().map(|n| offer(*n, &[FREE])).chain([submit(1, 10)]).collect());
    let mut losers = Vec::new();
    while let Some(lease) = desk.live.get(&id(10)).and_then(|live| live.job.state.lease().cloned()) {
        let (by, attempt) = (lease.worker.raw(), lease.attempt);
        losers.push(by);
        let end = End::because(Reason::VmLost, "gone");
        let lost = report(3, 10, by, 2, Event::Finished { attempt, end });
        turn(desk, 1, vec![report(2, 10, by, 1, Event::Accepted { attempt }), lost]);
    }
    assert!(!desk.live.contains_key(&id(10)), "it ended");
    losers
}

#[test]
fn after_a_start_a_job_waits_for_workers_that_have_not_connected_yet() {
    let grace = Limits::default().startup_grace_ms as i64;
    for (when, waits) in [(grace - 1, true), (grace, false)] {
        let mut before = Desk::new(Limits::default(), Mono(0));
        turn(&mut before, 0, vec![offer(3, &[FREE]), submit(1, 10)]);
        let mut job = before.live[&id(10)].job.clone();
        job.state.tries.lost = 2;
        let attempt = before.live[&id(10)].attempt.clone();
        let mut desk = Desk::new(Limits::default(), Mono(0));
        desk.restore(vec![(job, attempt)], at(0));
        let end = End::because(Reason::VmLost, "gone");
        turn(&mut desk, when, vec![report(2, 10, 3, 1, Event::Finished { attempt: 1, end })]);
        assert_eq!(desk.live.contains_key(&id(10)), waits, "{when}");
    }
}

#[test]
fn a_job_ends_by_the_farms_fault_only_when_every_worker_has_lost_it_or_too_many_have() {
    let farm = |workers: std::ops::RangeInclusive<u128>| {
        let mut desk = Desk::new(Limits::default(), Mono(0));
        losers(&mut desk, &workers.collect::<Vec<_>>())
    };
    assert_eq!(farm(1..=1), [1, 1, 1]);
    assert_eq!(farm(1..=2), [1, 2, 1]);
    assert_eq!(farm(1..=4), [1, 2, 3, 4], "the fourth gets it too");
    assert_eq!(farm(1..=9), [1, 2, 3, 4, 5, 6], "it does not go through the whole farm");
}

#[test]
fn a_fact_stays_what_it_was_said_to_be_first() {
    let mut desk = Desk::new(Limits::default(), Mono(0));
    turn(&mut desk, 0, vec![offer(1, &[FREE]), submit(1, 10)]);
    let say = |seq, event, facts: &[(&str, &str)]| {
        let mut request = report(2, 10, 1, seq, event);
        if let Request::Report { news, .. } = &mut request {
            news.facts = facts.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        }
        request
    };
    let phase = |phase| Event::Phase { attempt: 1, phase };
    let (groups, _) = turn(
        &mut desk,
        1,
        vec![
            say(1, Event::Accepted { attempt: 1 }, &[]),
            say(2, phase(Phase::Executing), &[("image", "r/a:1"), ("vm_source", "warm")]),
            say(3, phase(Phase::Collecting), &[("image", "r/b:1"), ("image_digest", "sha256:ab")]),
        ],
    );
    let [Write::Advance(last)] = groups[2].0.as_slice() else { panic!("{groups:?}") };
    let facts = last.attempt.as_ref().unwrap().facts.iter().map(|(name, value)| format!("{name}={value}"));
    assert_eq!(facts.collect::<Vec<_>>(), ["image=r/a:1", "image_digest=sha256:ab", "vm_source=warm"]);
}
