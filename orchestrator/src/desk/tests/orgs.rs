//! Two organisations on one farm: a job runs on its own one's workers, and no other's decide anything about it.

use alloy_shared::id::OrgId;
use alloy_shared::wire::image::{ImageReport, Inventory, PullFailed};

use super::*;

const OTHER_ORG: OrgId = OrgId::from_raw(DEFAULT_ORG.raw() + 1);

fn desk() -> Desk {
    Desk::new(Limits::default(), Mono(0))
}

/// When everybody had time to come back.
pub(super) fn grace() -> i64 {
    Limits::default().startup_grace_ms as i64
}

pub(super) fn ours(n: u128, slots: usize) -> Offer {
    let Request::Offer(offer) = offer(n, &vec![FREE; slots]) else { unreachable!() };
    offer
}

/// A worker of another organisation.
fn theirs(n: u128, slots: usize) -> Offer {
    Offer { org: OTHER_ORG, name: "stranger".into(), ..ours(n, slots) }
}

fn their_job(ticket: Ticket, n: u128) -> Request {
    let Request::Submit { id, body, key, .. } = submit(ticket, n) else { unreachable!() };
    Request::Submit { ticket, id, by: By { org: OTHER_ORG, caller: "they".into() }, body, key }
}

/// The worker has asked for its own image: `refused` says what came of it.
pub(super) fn with_image(offer: Offer, refused: bool) -> Offer {
    let failed = refused.then(|| PullFailed { message: "404".into(), refused });
    let digest = (!refused).then(|| "sha256:ab".to_owned());
    let report = ImageReport { name: "r/own:1".into(), digest, failed, ..ImageReport::default() };
    let images = Inventory { pulls: true, own: "r/own:1".into(), images: vec![report] };
    Offer { images: Arc::new(images), ..offer }
}

fn holder(desk: &Desk, n: u128) -> Option<WorkerId> {
    desk.live.get(&id(n)).and_then(|live| live.job.state.lease()).map(|lease| lease.worker)
}

#[test]
fn a_job_runs_on_a_worker_of_its_own_organisation_however_many_others_are_free() {
    let mut desk = desk();
    let offers = [theirs(1, 3), ours(2, 1)].map(Request::Offer);
    let jobs = [submit(1, 10), submit(2, 11), their_job(3, 12)];
    turn(&mut desk, 0, offers.into_iter().chain(jobs).collect());
    assert_eq!([10, 11, 12].map(|n| holder(&desk, n)), [Some(worker(2)), None, Some(worker(1))]);
    assert_eq!(desk.why_not(&id(11)), Some(pick::WhyNot::Busy { workers: 1, slots: 1 }));
}

#[test]
fn with_strangers_only_a_job_waits_as_if_nobody_were_connected() {
    // Connected here, or to another orchestrator of the farm.
    for away in [false, true] {
        let mut desk = desk();
        let strangers = [theirs(1, 1), with_image(theirs(2, 1), true)];
        let offers = match away {
            false => strangers.map(Request::Offer).into(),
            true => vec![Request::Elsewhere(strangers.into())],
        };
        turn(&mut desk, grace(), offers.into_iter().chain([submit(1, 10)]).collect());
        assert_eq!((holder(&desk, 10), desk.why_not(&id(10))), (None, Some(pick::WhyNot::NoWorker)), "away: {away}");
        let late = grace() + Limits::default().queue_timeout_ms as i64;
        let (_, effects) = turn(&mut desk, late, vec![]);
        assert_eq!(ended(&effects), "no worker took it in time: no worker is connected", "away: {away}");
    }
}

pub(super) fn ended(effects: &[Effect]) -> String {
    let Some(Effect::Moved { job, .. }) = effects.first() else { panic!("{effects:?}") };
    let Step::Done { end, .. } = &job.state.step else { panic!("{job:?}") };
    end.message.clone()
}

#[test]
fn what_a_strangers_registry_says_of_an_image_neither_ends_a_job_nor_keeps_it_waiting() {
    let mut desk = desk();
    let refused = with_image(theirs(1, 1), true);
    let (_, effects) = turn(&mut desk, grace(), vec![Request::Offer(refused), submit(1, 10)]);
    assert_eq!(moved(&effects), [(10, StateWord::Queued)], "they cannot get it");
    // They have it by now, which is of no use here.
    let offers = [with_image(theirs(1, 1), false), with_image(ours(2, 1), true)].map(Request::Offer);
    let (_, effects) = turn(&mut desk, grace() + 1, offers.into_iter().collect());
    assert_eq!(moved(&effects), [(10, StateWord::Errored)]);
    assert_eq!(ended(&effects), "no worker can get the image r/own:1: w2: 404");
}

#[test]
fn a_stranger_who_has_not_lost_a_job_is_no_other_chance_for_it() {
    let mut desk = desk();
    turn(&mut desk, 0, vec![Request::Offer(theirs(7, 1))]);
    assert_eq!(losers(&mut desk, &[1]), [1, 1, 1]);
}

#[test]
fn a_job_that_is_taken_over_while_only_strangers_are_connected_waits_for_its_own_to_come_back() {
    for (connected, waits) in [(theirs(7, 1), true), (ours(3, 1), false)] {
        let mut before = desk();
        turn(&mut before, 0, vec![offer(3, &[FREE]), submit(1, 10)]);
        let Live { mut job, attempt, .. } = before.live[&id(10)].clone();
        job.state.tries.lost = 2;
        let mut desk = desk();
        turn(&mut desk, 0, vec![Request::Offer(connected)]);
        desk.restore(vec![(job, attempt)], at(0));
        let end = End::because(Reason::VmLost, "gone");
        turn(&mut desk, 1, vec![report(2, 10, 3, 1, Event::Finished { attempt: 1, end })]);
        assert_eq!(desk.live.contains_key(&id(10)), waits);
    }
}
