//! Random walks over the plan: jobs of several images come and go, VMs come up, time passes, the wish changes.

use alloy_shared::limits::SLOTS_MAX;

use super::*;
use crate::vm_demand::{Demand, HALF_LIFE_MS, Wish};

const NAMES: [&str; 4] = ["a", "b", "c", "d"];
const AGE_MS: u64 = 4 * 60 * 60_000;

struct World {
    dice: u64,
    now: Mono,
    slots: Vec<Slot>,
    waiting: Vec<Waiting>,
    demand: Demand,
    wish: Wish,
    made: u64,
    jobs: u32,
    /// Warm VMs, not too old, that were given up for another spare.
    swaps: u32,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut world = Self {
            dice: seed,
            now: NOW,
            slots: vec![cold(), cold()],
            waiting: Vec::new(),
            demand: Demand::default(),
            wish: Wish { slots: 2, image: image("a"), floors: Vec::new() },
            made: 0,
            jobs: 0,
            swaps: 0,
        };
        if world.roll(2) == 0 {
            world.wish.floors = vec![(image(NAMES[world.roll(4) as usize]), 1)];
        }
        world
    }

    fn roll(&mut self, sides: u64) -> u64 {
        self.dice = self.dice.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.dice;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }

    /// Plans and performs until nothing more is to be done.
    fn plan(&mut self) -> Vec<PoolAction> {
        let mut all = Vec::new();
        for round in 0.. {
            assert!(round < 10, "the plan has no end: {:?}", self.slots);
            let spent = spent(&self.slots, self.waiting.len(), self.wish.slots);
            self.slots.truncate(self.slots.len() - spent);
            let shares = self.demand.shares(&self.wish, self.now);
            let view = View {
                slots: &self.slots,
                waiting: &self.waiting,
                shares: &shares,
                size: self.wish.slots,
                warm_age_max_ms: AGE_MS,
                host: Host::Well,
                fence: Mono(u64::MAX),
            };
            let actions = plan(&view, self.now);
            if actions.is_empty() {
                break;
            }
            self.perform(&actions);
            all.extend(actions);
        }
        all
    }

    fn perform(&mut self, actions: &[PoolAction]) {
        let mut given = Vec::new();
        for action in actions {
            match action {
                PoolAction::Make { slot, image } => {
                    assert!(matches!(self.slots[*slot], Slot::Cold { .. }), "{action:?}");
                    self.made += 1;
                    let vm = VmName::mint(1, self.made);
                    self.slots[*slot] = Slot::Cloning { vm, image: image.clone(), faults: 0 };
                }
                PoolAction::Unmake { slot } => {
                    let Slot::Warm { vm, since, .. } = self.slots[*slot].clone() else { panic!("{action:?}") };
                    let is_spare = self.waiting.is_empty() && self.slots.len() <= self.wish.slots;
                    self.swaps += u32::from(is_spare && self.now.since(since) < AGE_MS);
                    self.slots[*slot] = Slot::Recycling { vm, attempt: None, faults: 0 };
                }
                PoolAction::Give { slot, claim } => {
                    let Slot::Warm { vm, image, .. } = self.slots[*slot].clone() else { panic!("{action:?}") };
                    let waiting = &self.waiting[*claim];
                    assert_eq!(waiting.image, image);
                    self.slots[*slot] = Slot::Claimed { vm, image, attempt: waiting.attempt };
                    given.push(*claim);
                }
                PoolAction::Release { slot } => self.slots[*slot] = cold(),
            }
        }
        given.sort_unstable();
        given.into_iter().rev().for_each(|claim| _ = self.waiting.remove(claim));
        let vms = self.slots.iter().filter(|slot| !matches!(slot, Slot::Cold { .. })).count();
        assert!(vms <= 2, "never more than two: {:?}", self.slots);
    }

    /// One slot goes on.
    fn advance(&mut self, slot: usize) {
        self.slots[slot] = match self.slots[slot].clone() {
            Slot::Cloning { vm, image, faults } => Slot::Booting { vm, image, faults },
            Slot::Booting { vm, image, .. } => Slot::Warm { vm, image, since: self.now },
            Slot::Claimed { vm, attempt, .. } => Slot::Recycling { vm, attempt: Some(attempt), faults: 0 },
            Slot::Recycling { .. } => Slot::Cold { faults: 0, rest: self.now },
            same @ (Slot::Cold { .. } | Slot::Warm { .. } | Slot::Quarantined { .. }) => same,
        };
    }

    fn asks(&mut self, name: &str) {
        self.jobs += 1;
        self.demand.asked(&image(name), name != self.wish.image.0, self.now);
        self.waiting.push(Waiting { attempt: attempt(self.jobs), image: image(name) });
    }

    /// Lets everything come to rest.
    fn settle(&mut self) {
        for round in 0.. {
            assert!(round < 200, "no rest: {:?} {:?}", self.slots, self.waiting);
            let planned = self.plan();
            let before = self.slots.clone();
            (0..self.slots.len()).for_each(|slot| self.advance(slot));
            if planned.is_empty() && before == self.slots && self.waiting.is_empty() {
                return;
            }
        }
    }

    fn warm(&self, name: &str) -> usize {
        self.slots.iter().filter(|slot| matches!(slot, Slot::Warm { image, .. } if image.0 == name)).count()
    }

    fn step(&mut self) {
        match self.roll(10) {
            0 => {
                let name = NAMES[self.roll(4) as usize];
                let busy = self.slots.iter().filter(|slot| matches!(slot, Slot::Claimed { .. })).count();
                if busy + self.waiting.len() < self.wish.slots {
                    self.asks(name);
                }
            }
            1 => self.now = self.now + self.roll(HALF_LIFE_MS),
            2 if self.roll(10) == 0 => {
                self.wish.slots = 1 + self.roll(2) as usize;
                while self.slots.len() < self.wish.slots {
                    self.slots.push(cold());
                }
            }
            _ => {
                let slot = self.roll(self.slots.len() as u64) as usize;
                self.advance(slot);
            }
        }
        self.plan();
    }
}

fn seeds() -> std::ops::Range<u64> {
    let first = 0x9001_0000;
    first..first + 60
}

#[test]
fn whatever_comes_two_vms_are_the_most_floors_hold_and_spares_do_not_take_turns() {
    for seed in seeds() {
        println!("seed {seed:#x}");
        let mut world = World::new(seed);
        for _ in 0..400 {
            world.step();
        }
        world.settle();
        assert_eq!(world.slots.len(), world.wish.slots, "{:?}", world.slots);
        for (name, floor) in &world.wish.floors {
            assert!(world.warm(&name.0) >= *floor, "the floor of {name}: {:?}", world.slots);
        }
        // Nobody asks any more: as time passes each slot may go back to the worker's own image, and that is all.
        world.swaps = 0;
        for _ in 0..12 * 60 {
            world.now = world.now + 60_000;
            world.settle();
        }
        assert!(world.swaps <= 4, "{} swaps without a request: {:?}", world.swaps, world.slots);
        let own: usize = world.wish.floors.iter().map(|(name, floor)| if name.0 == "a" { 0 } else { *floor }).sum();
        assert_eq!(world.warm("a"), world.wish.slots - own, "{:?}", world.slots);
    }
}

#[test]
fn jobs_that_alternate_between_images_cost_no_spare_of_either() {
    let mut world = World::new(1);
    world.wish.floors.clear();
    for round in 0..40 {
        world.asks(if round % 2 == 0 { "b" } else { "c" });
        world.settle();
        world.now = world.now + 60_000;
        if round == 9 {
            world.swaps = 0;
        }
    }
    assert_eq!((world.warm("b"), world.warm("c"), world.swaps), (1, 1, 0), "{:?}", world.slots);
}

#[test]
fn an_image_that_was_asked_for_repeatedly_is_wanted_by_the_next_plan() {
    for seed in seeds() {
        println!("seed {seed:#x}");
        let mut world = World::new(seed);
        world.wish.floors.clear();
        world.settle();
        assert_eq!(world.warm("a"), 2);
        (0..3).for_each(|_| world.demand.asked(&image("d"), true, world.now));
        // One of the two makes room at once, and what is made there next is the image that was asked for.
        let planned = world.plan();
        let [PoolAction::Unmake { slot }] = planned[..] else { panic!("{planned:?}") };
        world.advance(slot);
        assert_eq!(world.plan(), [PoolAction::Make { slot, image: image("d") }]);
        world.settle();
        assert_eq!(world.warm("d"), 1);
    }
}

#[test]
fn a_new_image_replaces_the_old_spares_one_by_one_and_leaves_jobs_alone() {
    let mut world = World::new(1);
    world.wish.floors.clear();
    world.settle();
    world.demand.rename(&image("a"), &image("b"));
    world.wish.image = image("b");
    let planned = world.plan();
    let [PoolAction::Unmake { slot }] = planned[..] else { panic!("{planned:?}") };
    world.advance(slot);
    world.plan();
    world.advance(slot);
    assert_eq!((world.plan(), world.warm("a")), (vec![], 1), "the other one stays until the new one is warm");
    world.settle();
    assert_eq!(world.warm("b"), 2);
}

#[test]
fn a_smaller_pool_lets_spares_go_first_and_work_end() {
    let slots = [claimed(), warm("a", 99_000), claimed()];
    assert_eq!(surplus(&slots, 0, 2), [false, true, false]);
    assert_eq!(surplus(&slots, 1, 2), [false, false, false], "a claim that waits will have a slot");
    assert_eq!(surplus(&slots, 0, SLOTS_MAX), [false, false, false]);
    let shown = views(&slots, &[], 2);
    assert!(!shown[1].state.is_free() && shown[0].attempt.is_some());
    assert_eq!(
        (spent(&[claimed(), cold()], 0, 1), spent(&[cold(), claimed()], 0, 1), spent(&[cold(), cold()], 0, 1)),
        (1, 0, 1)
    );
    let view = View {
        slots: &slots,
        waiting: &[],
        shares: &own(),
        size: 2,
        warm_age_max_ms: 50_000,
        host: Host::Well,
        fence: AHEAD,
    };
    assert_eq!(plan(&view, NOW), [PoolAction::Unmake { slot: 1 }]);
}
