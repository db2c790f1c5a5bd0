use alloy_shared::id::JobId;

use super::*;

mod walk;

const NOW: Mono = Mono(100_000);
const AHEAD: Mono = Mono(NOW.0 + 1);

fn image(name: &str) -> ImageRef {
    ImageRef(name.into())
}
fn own() -> Vec<Share> {
    vec![Share { image: image("a"), floor: 0, heat: 1_500 }]
}
fn vm() -> VmName {
    VmName::mint(1, 1)
}
fn cold() -> Slot {
    Slot::Cold { faults: 0, rest: Mono(0) }
}
fn warm(name: &str, since: u64) -> Slot {
    Slot::Warm { vm: vm(), image: image(name), since: Mono(since) }
}
fn booting(name: &str) -> Slot {
    Slot::Booting { vm: vm(), image: image(name), faults: 0 }
}
fn claimed() -> Slot {
    Slot::Claimed { vm: vm(), image: image("a"), attempt: attempt(9) }
}
fn recycling() -> Slot {
    Slot::Recycling { vm: vm(), attempt: None, faults: 0 }
}
fn attempt(n: u32) -> AttemptRef {
    AttemptRef { job: JobId::from_raw(1), attempt: n }
}
fn wants(name: &str) -> Waiting {
    Waiting { attempt: attempt(1), image: image(name) }
}

fn check(slots: &[Slot], waiting: &[Waiting], expected: &[PoolAction]) {
    check_on(Host::Well, slots, waiting, expected);
}

fn check_on(host: Host, slots: &[Slot], waiting: &[Waiting], expected: &[PoolAction]) {
    let view = View { slots, waiting, shares: &own(), size: slots.len(), warm_age_max_ms: 50_000, host, fence: AHEAD };
    assert_eq!(plan(&view, NOW), expected, "{slots:?} {waiting:?}");
}

#[test]
fn the_plan_of_each_view() {
    use PoolAction::{Give, Make, Release, Unmake};
    let make = |slot, name: &str| Make { slot, image: image(name) };
    check(&[cold(), cold()], &[], &[make(0, "a"), make(1, "a")]);
    check(&[warm("a", 99_000), claimed()], &[], &[]);
    check(&[cold(), warm("a", 99_000)], &[wants("a")], &[Give { slot: 1, claim: 0 }, make(0, "a")]);
    check(&[warm("a", 99_000)], &[wants("a"), wants("a")], &[Give { slot: 0, claim: 0 }]);
    check(&[booting("a"), cold()], &[wants("a")], &[make(1, "a")]);
    check(&[cold(), cold()], &[wants("b")], &[make(0, "b"), make(1, "a")]);
    check(&[warm("a", 99_000), claimed()], &[wants("b")], &[Unmake { slot: 0 }]);
    check(&[booting("a")], &[wants("b")], &[]);
    check(&[warm("a", 1)], &[], &[Unmake { slot: 0 }]);
    // A VM past its age is not given away either.
    check(&[warm("a", 1)], &[wants("a")], &[Unmake { slot: 0 }]);
    check(&[Slot::Cold { faults: 1, rest: NOW + 1 }], &[wants("a")], &[]);
    let stuck_vm = |until| Slot::Quarantined { vm: Some(vm()), attempt: None, until, faults: 1 };
    check(&[stuck_vm(NOW), stuck_vm(NOW + 1)], &[], &[Unmake { slot: 0 }]);
    check(&[rested(3, 60_000, Mono(0))], &[], &[Release { slot: 0 }]);
}

#[test]
fn a_claim_of_another_image_costs_one_spare_and_no_more() {
    use PoolAction::Unmake;
    let spare = || warm("a", 99_000);
    check(&[spare(), spare()], &[wants("b")], &[Unmake { slot: 0 }]);
    check(&[recycling(), spare()], &[wants("b")], &[]);
    // Two claims are two slots.
    check(&[recycling(), spare()], &[wants("b"), wants("b")], &[Unmake { slot: 1 }]);
    // One that ends a job is as good; a claim of what is warm leaves it to the other.
    check(&[recycling(), spare()], &[wants("b"), wants("a")], &[PoolAction::Give { slot: 1, claim: 1 }]);
    let ill = Host::Ill { probe: NOW };
    check_on(ill, &[spare(), spare()], &[], &[Unmake { slot: 0 }]);
    check_on(ill, &[recycling(), spare()], &[], &[]);
}

#[test]
fn a_host_that_rests_makes_no_vms_and_an_ill_one_tries_one() {
    use PoolAction::{Give, Make};
    let make = |slot| Make { slot, image: image("a") };
    let resting = |until| Host::Resting { until };
    check_on(resting(NOW + 1), &[cold(), warm("a", 99_000)], &[wants("a")], &[Give { slot: 1, claim: 0 }]);
    check_on(resting(NOW), &[cold(), cold()], &[], &[make(0), make(1)]);
    let ill = |probe| Host::Ill { probe };
    check_on(ill(NOW + 1), &[cold(), cold()], &[wants("a")], &[]);
    check_on(ill(NOW), &[cold(), cold()], &[], &[make(0)]);
    check_on(ill(NOW), &[booting("a"), cold()], &[], &[]);
    // What is warm is all that it has: it is not thrown away for an image that may never come.
    check_on(ill(NOW), &[warm("b", 99_000), booting("b")], &[wants("a")], &[]);
    check_on(ill(NOW + 1), &[warm("a", 99_000), claimed()], &[], &[]);
    check_on(ill(NOW), &[claimed(), warm("a", 99_000)], &[], &[PoolAction::Unmake { slot: 1 }]);
}

#[test]
fn nothing_is_made_behind_the_fence_and_nothing_is_given_up_for_it() {
    let planned = |slots: &[Slot], waiting: &[Waiting], host, fence| {
        let shares = [Share { image: image("a"), floor: 1, heat: 9_000 }];
        let view = View { slots, waiting, shares: &shares, size: slots.len(), warm_age_max_ms: 50_000, host, fence };
        plan(&view, NOW)
    };
    let spare = || warm("b", 99_000);
    for (slots, waiting, host) in [
        (vec![cold(), cold()], vec![], Host::Well),
        (vec![cold(), spare()], vec![wants("a")], Host::Well),
        (vec![spare(), spare()], vec![wants("a")], Host::Well),
        (vec![spare(), spare()], vec![], Host::Well),
        (vec![cold()], vec![], Host::Resting { until: NOW }),
        (vec![spare()], vec![], Host::Ill { probe: NOW }),
    ] {
        assert_eq!(planned(&slots, &waiting, host, NOW), [], "{slots:?}");
        assert_ne!(planned(&slots, &waiting, host, AHEAD), [], "{slots:?}");
    }
    assert_eq!(planned(&[spare()], &[wants("b")], Host::Well, NOW), [PoolAction::Give { slot: 0, claim: 0 }]);
}

#[test]
fn nothing_is_made_ahead_of_an_image_that_is_not_here() {
    let (slots, waiting) = ([cold(), cold()], [wants("b")]);
    let view = View {
        slots: &slots,
        waiting: &waiting,
        shares: &[],
        size: 2,
        warm_age_max_ms: 50_000,
        host: Host::Well,
        fence: AHEAD,
    };
    assert_eq!(plan(&view, NOW), [PoolAction::Make { slot: 0, image: image("b") }]);
}

#[test]
fn the_pool_wakes_when_something_becomes_due() {
    let wake = |slots: &[Slot]| {
        let (shares, size) = (own(), slots.len());
        next_wake(
            &View {
                slots,
                waiting: &[],
                shares: &shares,
                size,
                warm_age_max_ms: 50_000,
                host: Host::Well,
                fence: AHEAD,
            },
            NOW,
        )
    };
    assert_eq!(wake(&[claimed(), booting("a")]), None);
    assert_eq!(wake(&[warm("a", 99_000), rested(1, 60_000, NOW)]), Some(NOW + 1_000));
    assert_eq!(wake(&[warm("a", 99_000)]), Some(Mono(149_000)));
}

#[test]
fn a_waiting_claim_takes_a_free_slot_from_the_offer() {
    let shown = views(&[claimed(), booting("a"), cold()], &[wants("a")], 3);
    let states: Vec<_> = shown.iter().map(|view| (view.state, view.attempt)).collect();
    let taken = SlotState::Claimed;
    assert_eq!(states, [(taken, Some(attempt(9))), (taken, Some(attempt(1))), (SlotState::Cold, None)]);
}

#[test]
fn faults_rest_a_slot_and_many_close_it() {
    assert_eq!(rested(0, 60_000, NOW), Slot::Cold { faults: 0, rest: NOW });
    assert_eq!(rested(2, 60_000, NOW), Slot::Cold { faults: 2, rest: NOW + 2_000 });
    assert!(matches!(rested(3, 60_000, NOW), Slot::Quarantined { vm: None, .. }));
    assert!(!views(&[rested(3, 60_000, NOW)], &[], 1)[0].state.is_free());
}

#[test]
fn a_miss_has_a_cause() {
    let because = |why| Some((image("a"), why));
    let table: &[(Host, Slot, Gap, Miss)] = &[
        (Host::Well, warm("b", 99_000), None, Miss::NoWarmVm),
        (Host::Well, booting("b"), because(Miss::Died), Miss::NoWarmVm),
        (Host::Well, booting("a"), None, Miss::Booting),
        (Host::Well, booting("a"), because(Miss::Recycling), Miss::Booting),
        (Host::Well, booting("a"), because(Miss::Died), Miss::Died),
        (Host::Well, warm("a", 1), None, Miss::TooOld),
        (Host::Well, recycling(), because(Miss::TooOld), Miss::TooOld),
        (Host::Well, recycling(), because(Miss::Recycling), Miss::Recycling),
        (Host::Well, recycling(), Some((image("b"), Miss::Recycling)), Miss::NoWarmVm),
        (Host::Well, rested(3, 60_000, NOW), because(Miss::StartFailed), Miss::StartFailed),
        (Host::Ill { probe: NOW }, cold(), None, Miss::Host),
    ];
    for (host, slot, gap, expected) in table {
        let slots = [claimed(), slot.clone()];
        let view = View {
            slots: &slots,
            waiting: &[],
            shares: &own(),
            size: slots.len(),
            warm_age_max_ms: 50_000,
            host: *host,
            fence: AHEAD,
        };
        assert_eq!(miss(&view, &[None, gap.clone()], &image("a"), NOW), *expected, "{slot:?} {gap:?}");
    }
}
