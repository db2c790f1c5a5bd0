//! A worker between two sessions: nothing is given to it, and nothing is decided as if there were no such worker.

use super::orgs::{ended, grace, ours, with_image};
use super::*;

fn gone(n: u128, left: bool) -> Request {
    Request::Gone { worker: worker(n), left }
}

/// Worker 1 cannot get the image; worker 2 has it, and a job on its one slot; job 10 waits for it.
fn waits_for_the_other() -> Desk {
    let mut desk = Desk::new(Limits::default(), Mono(0));
    turn(&mut desk, grace(), vec![Request::Offer(with_image(ours(2, 1), false)), submit(1, 9)]);
    let (_, effects) = turn(&mut desk, grace(), vec![Request::Offer(with_image(ours(1, 1), true)), submit(2, 10)]);
    assert_eq!(moved(&effects), [(10, StateWord::Queued)]);
    turn(&mut desk, grace(), vec![report(3, 9, 2, 1, Event::Accepted { attempt: 1 })]);
    desk
}

#[test]
fn a_job_waits_for_a_worker_whose_link_is_cut_until_that_is_lost() {
    let mut desk = waits_for_the_other();
    assert_eq!(moved(&turn(&mut desk, grace() + 1, vec![gone(2, false)]).1), []);
    let lost = grace() + 1 + Limits::default().expiry_ms as i64;
    assert_eq!(moved(&turn(&mut desk, lost - 1, vec![]).1), []);
    assert_eq!(desk.next_wake(), Some(Mono(lost as u64)), "nobody else says that it is time");
    let message = ended(&turn(&mut desk, lost, vec![]).1);
    assert!(message.contains("404"), "{message}");
}

#[test]
fn a_worker_that_comes_back_in_time_gets_the_job_that_waited_for_it() {
    let mut desk = waits_for_the_other();
    turn(&mut desk, grace() + 1, vec![gone(2, false)]);
    let (_, effects) = turn(&mut desk, grace() + 2, vec![Request::Offer(with_image(ours(2, 2), false))]);
    assert_eq!(moved(&effects), [(10, StateWord::Assigned)]);
}

#[test]
fn for_a_worker_that_said_goodbye_or_is_silent_for_too_long_nobody_waits() {
    for then in [vec![gone(2, true)], vec![gone(2, false), Request::Silent(worker(2))]] {
        let mut desk = waits_for_the_other();
        let (_, effects) = turn(&mut desk, grace() + 1, then);
        assert!(moved(&effects).contains(&(10, StateWord::Errored)), "{effects:?}");
    }
}

#[test]
fn a_worker_that_is_with_another_orchestrator_counts_for_as_long_as_it_is_there() {
    let mut desk = waits_for_the_other();
    let there = Request::Elsewhere(vec![with_image(ours(2, 1), false)]);
    let late = grace() + 2 * Limits::default().expiry_ms as i64;
    assert_eq!(moved(&turn(&mut desk, grace() + 1, vec![gone(2, false), there]).1), []);
    assert_eq!(moved(&turn(&mut desk, late, vec![]).1), []);
    let (_, effects) = turn(&mut desk, late + 1, vec![Request::Elsewhere(vec![])]);
    assert_eq!(moved(&effects), [(10, StateWord::Errored)]);
}

#[test]
fn after_the_books_were_away_everybody_has_time_to_come_back() {
    // Its link was cut, or it was with another orchestrator.
    for elsewhere in [false, true] {
        let mut desk = waits_for_the_other();
        let there = elsewhere.then(|| Request::Elsewhere(vec![with_image(ours(2, 1), false)]));
        turn(&mut desk, grace() + 1, [gone(2, false)].into_iter().chain(there).collect());
        let lost = grace() + 1 + Limits::default().expiry_ms as i64;
        let expect = || Request::Expect { for_ms: Limits::default().startup_grace_ms };
        let nobody = elsewhere.then(|| Request::Elsewhere(vec![]));
        let requests = nobody.into_iter().chain([expect()]).collect();
        assert_eq!(moved(&turn(&mut desk, lost, requests).1), [], "elsewhere: {elsewhere}");
        assert_eq!(moved(&turn(&mut desk, lost + grace() - 1, vec![]).1), [], "elsewhere: {elsewhere}");
        let (_, effects) = turn(&mut desk, lost + grace(), vec![]);
        assert_eq!(moved(&effects), [(10, StateWord::Errored)], "elsewhere: {elsewhere}");
    }
}

#[test]
fn a_job_that_was_lost_too_often_still_goes_to_a_worker_that_is_just_away() {
    let mut desk = Desk::new(Limits::default(), Mono(0));
    turn(&mut desk, grace(), [1, 2, 3, 4].map(|n| offer(n, &[FREE])).into_iter().chain([submit(1, 10)]).collect());
    turn(&mut desk, grace(), vec![gone(4, false)]);
    for n in 1..=3 {
        let end = End::because(Reason::VmLost, "gone");
        let accepted = report(2, 10, n.into(), 1, Event::Accepted { attempt: n });
        turn(&mut desk, grace(), vec![accepted, report(3, 10, n.into(), 2, Event::Finished { attempt: n, end })]);
    }
    assert_eq!(desk.live[&id(10)].job.state.word(), StateWord::Queued);
    assert_eq!(moved(&turn(&mut desk, grace(), vec![offer(4, &[FREE])]).1), [(10, StateWord::Assigned)]);
}
