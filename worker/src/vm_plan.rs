//! D: what to do with the slots: which VM to make ahead, which to throw away, which waiting claim gets which.
//!
//! A slot is room for one VM. The pool is nothing but the state of the slots that no job has: there is no extra capacity.
//! Work that waits comes before spares, a VM serves at most one attempt, and a slot is free again only when its VM is gone.

use alloy_shared::env::Mono;
use alloy_shared::id::AttemptRef;
use alloy_shared::wire::session::{SlotState, SlotView};
use alloy_shared::wire::vm::Miss;

use crate::provider::{ImageRef, VmName};
use crate::vm_care::Host;
use crate::vm_demand::{self, Share};

/// Faults in a row after which a slot is not offered for a while.
pub const SLOT_FAULTS_MAX: u32 = 3;
const RETRY_MS: u64 = 1_000;
/// Between two looks whether other images should be warm, while what was asked for fades.
const REVIEW_MS: u64 = 60_000;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Slot {
    /// Empty. After a fault it rests until `rest`.
    Cold {
        faults: u32,
        rest: Mono,
    },
    Cloning {
        vm: VmName,
        image: ImageRef,
        faults: u32,
    },
    Booting {
        vm: VmName,
        image: ImageRef,
        faults: u32,
    },
    Warm {
        vm: VmName,
        image: ImageRef,
        since: Mono,
    },
    Claimed {
        vm: VmName,
        image: ImageRef,
        attempt: AttemptRef,
    },
    /// Its VM is being destroyed.
    Recycling {
        vm: VmName,
        attempt: Option<AttemptRef>,
        faults: u32,
    },
    /// Its VM would not go, or several did not come.
    Quarantined {
        vm: Option<VmName>,
        attempt: Option<AttemptRef>,
        until: Mono,
        faults: u32,
    },
}

/// A claim that has no VM yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    pub attempt: AttemptRef,
    pub image: ImageRef,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View<'a> {
    pub slots: &'a [Slot],
    /// In the order they came.
    pub waiting: &'a [Waiting],
    /// What idle slots may keep warm: images that are on this host.
    pub shares: &'a [Share],
    /// How many slots may be in use.
    pub size: usize,
    pub warm_age_max_ms: u64,
    pub host: Host,
    /// When guards kill every VM. What is made after that is killed at once.
    pub fence: Mono,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PoolAction {
    /// Clone and boot a VM in this cold slot.
    Make { slot: usize, image: ImageRef },
    /// Destroy this slot's VM.
    Unmake { slot: usize },
    /// Give this warm slot to the waiting claim with this number.
    Give { slot: usize, claim: usize },
    /// The rest is over: the slot may be used again.
    Release { slot: usize },
}

/// Decides what can be done at once. Performing it changes the slots, so the same view never asks twice.
pub fn plan(view: &View<'_>, now: Mono) -> Vec<PoolAction> {
    let used = vec![false; view.slots.len()];
    let mut plan = Plan { view, now, used, makes: makes(view, now), ahead: Vec::new(), actions: Vec::new() };
    plan.shrink();
    plan.serve();
    plan.probe();
    plan.spare();
    plan.refresh();
    plan.swap();
    plan.actions
}

/// A plan in the making.
struct Plan<'a> {
    view: &'a View<'a>,
    now: Mono,
    /// Slots whose next state is settled.
    used: Vec<bool>,
    /// How many VMs may still be made.
    makes: usize,
    /// Images of the spares that this plan makes.
    ahead: Vec<&'a ImageRef>,
    actions: Vec<PoolAction>,
}

impl<'a> Plan<'a> {
    /// Slots beyond the pool's size make nothing, and hold nothing warm.
    fn shrink(&mut self) {
        for (index, surplus) in
            surplus(self.view.slots, self.view.waiting.len(), self.view.size).into_iter().enumerate()
        {
            match &self.view.slots[index] {
                Slot::Warm { .. } if surplus => self.unmake(index),
                Slot::Cold { .. } | Slot::Cloning { .. } | Slot::Booting { .. } | Slot::Recycling { .. } => {
                    self.used[index] = surplus;
                }
                Slot::Warm { .. } | Slot::Claimed { .. } | Slot::Quarantined { .. } => {}
            }
        }
    }

    /// Work comes before spares.
    fn serve(&mut self) {
        let (view, now) = (self.view, self.now);
        let mut unmet = Vec::new();
        for (claim, waiting) in view.waiting.iter().enumerate() {
            match pick(view.slots, &self.used, |slot| is_warm(slot, &waiting.image, view, now)) {
                Some(slot) => {
                    self.used[slot] = true;
                    self.actions.push(PoolAction::Give { slot, claim });
                }
                None => unmet.push(&waiting.image),
            }
        }
        for image in unmet {
            if let Some(slot) = pick(view.slots, &self.used, |slot| is_coming(slot, image)) {
                self.used[slot] = true;
            } else if self.makes == 0 {
                // A warm VM of another image may be all that this host still has.
            } else if let Some(slot) = pick(view.slots, &self.used, |slot| is_rested(slot, now)) {
                self.make(slot, image);
            } else if let Some(slot) = pick(view.slots, &self.used, is_leaving) {
                // It will have this one: no spare has to go for it as well.
                self.used[slot] = true;
            } else if let Some(slot) = self.least() {
                self.unmake(slot);
            }
        }
    }

    /// Whether an ill host is well again shows only when a VM is made.
    fn probe(&mut self) {
        let has_room = self.view.slots.iter().any(|slot| matches!(slot, Slot::Cold { .. }) || is_leaving(slot));
        if let Host::Ill { .. } = self.view.host
            && self.makes > 0
            && !has_room
            && let Some(slot) = self.least()
        {
            self.unmake(slot);
        }
    }

    /// Fills empty slots.
    fn spare(&mut self) {
        while self.makes > 0
            && let Some(slot) = pick(self.view.slots, &self.used, |slot| is_rested(slot, self.now))
            && let Some(share) = vm_demand::next(self.view.shares, |image| self.spares(image))
        {
            self.make(slot, &share.image);
            self.ahead.push(&share.image);
        }
    }

    fn refresh(&mut self) {
        for (index, slot) in self.view.slots.iter().enumerate().filter(|(index, _)| !self.used[*index]) {
            match slot {
                Slot::Warm { since, .. } if self.now.since(*since) >= self.view.warm_age_max_ms => {
                    self.actions.push(PoolAction::Unmake { slot: index });
                }
                Slot::Quarantined { vm: Some(_), until, .. } if *until <= self.now => {
                    self.actions.push(PoolAction::Unmake { slot: index });
                }
                Slot::Quarantined { vm: None, until, .. } if *until <= self.now => {
                    self.actions.push(PoolAction::Release { slot: index });
                }
                Slot::Cold { .. }
                | Slot::Cloning { .. }
                | Slot::Booting { .. }
                | Slot::Warm { .. }
                | Slot::Claimed { .. }
                | Slot::Recycling { .. }
                | Slot::Quarantined { .. } => {}
            }
        }
    }

    /// Gives up one spare for an image that is wanted more. One at a time, and the next only when that one is warm: an
    /// image that does not start must not cost the whole pool.
    fn swap(&mut self) {
        let changes = |slot: &Slot| match slot {
            Slot::Cold { .. } | Slot::Cloning { .. } | Slot::Booting { .. } | Slot::Recycling { .. } => true,
            Slot::Warm { .. } | Slot::Claimed { .. } | Slot::Quarantined { .. } => false,
        };
        if self.view.host != Host::Well
            || self.makes == 0
            || !self.actions.is_empty()
            || self.view.slots.iter().any(changes)
        {
            return;
        }
        let Some(new) = vm_demand::next(self.view.shares, |image| self.spares(image)) else { return };
        let is_worth = |old: &ImageRef| vm_demand::is_worth_it(self.view.shares, new, old, |image| self.spares(image));
        let old = self.spare_slots().filter(|(_, old)| is_worth(old)).min_by_key(|(_, old)| self.worth(old));
        if let Some((slot, _)) = old {
            self.unmake(slot);
        }
    }

    /// The warm spare that will be missed the least.
    fn least(&self) -> Option<usize> {
        self.spare_slots().min_by_key(|(_, image)| self.worth(image)).map(|(slot, _)| slot)
    }

    fn spare_slots(&self) -> impl Iterator<Item = (usize, &'a ImageRef)> {
        self.view.slots.iter().enumerate().filter(move |(index, _)| !self.used[*index]).filter_map(|(index, slot)| {
            match slot {
                Slot::Warm { image, .. } => Some((index, image)),
                Slot::Cold { .. }
                | Slot::Cloning { .. }
                | Slot::Booting { .. }
                | Slot::Claimed { .. }
                | Slot::Recycling { .. }
                | Slot::Quarantined { .. } => None,
            }
        })
    }

    fn worth(&self, image: &ImageRef) -> u64 {
        vm_demand::worth(self.view.shares, image, self.spares(image))
    }

    /// Spares of this image, with those that come.
    fn spares(&self, wanted: &ImageRef) -> usize {
        let is_spare = |(index, slot): (usize, &Slot)| {
            !self.used[index] && (is_coming(slot, wanted) || is_warm(slot, wanted, self.view, self.now))
        };
        let here = self.view.slots.iter().enumerate().filter(|found| is_spare(*found)).count();
        here + self.ahead.iter().filter(|image| **image == wanted).count()
    }

    fn make(&mut self, slot: usize, image: &ImageRef) {
        self.used[slot] = true;
        self.makes -= 1;
        self.actions.push(PoolAction::Make { slot, image: image.clone() });
    }

    fn unmake(&mut self, slot: usize) {
        self.used[slot] = true;
        self.actions.push(PoolAction::Unmake { slot });
    }
}

/// Which slots are too many. Work keeps its slot, and a claim that waits will have one.
fn surplus(slots: &[Slot], waiting: usize, size: usize) -> Vec<bool> {
    let is_claimed = |slot: &Slot| matches!(slot, Slot::Claimed { .. });
    let mut room = size.saturating_sub(slots.iter().filter(|slot| is_claimed(slot)).count()).max(waiting);
    let is_surplus = |slot: &Slot| {
        if is_claimed(slot) {
            return false;
        }
        let over = room == 0;
        room = room.saturating_sub(1);
        over
    };
    slots.iter().map(is_surplus).collect()
}

/// How many of the last slots a pool of this size has no use for any more.
pub fn spent(slots: &[Slot], waiting: usize, size: usize) -> usize {
    let is_empty = |slot: &Slot| matches!(slot, Slot::Cold { .. } | Slot::Quarantined { vm: None, attempt: None, .. });
    let surplus = surplus(slots, waiting, size);
    let over = slots.len().saturating_sub(size);
    slots.iter().zip(surplus).rev().take(over).take_while(|(slot, surplus)| *surplus && is_empty(slot)).count()
}

/// How many VMs may be made at once, as far as the host and the lease go.
fn makes(view: &View<'_>, now: Mono) -> usize {
    let is_made = |slot: &Slot| match slot {
        Slot::Cloning { .. } | Slot::Booting { .. } => true,
        Slot::Cold { .. }
        | Slot::Warm { .. }
        | Slot::Claimed { .. }
        | Slot::Recycling { .. }
        | Slot::Quarantined { .. } => false,
    };
    match view.host {
        _ if view.fence <= now => 0,
        Host::Well => view.slots.len(),
        Host::Resting { until } if until <= now => view.slots.len(),
        Host::Ill { probe } if probe <= now && !view.slots.iter().any(is_made) => 1,
        Host::Resting { .. } | Host::Ill { .. } => 0,
    }
}

/// When to plan again if nothing happens before.
pub fn next_wake(view: &View<'_>, now: Mono) -> Option<Mono> {
    let due = |slot: &Slot| match slot {
        Slot::Cold { rest, .. } => Some(*rest),
        Slot::Warm { since, .. } => Some(*since + view.warm_age_max_ms),
        Slot::Quarantined { until, .. } => Some(*until),
        Slot::Cloning { .. } | Slot::Booting { .. } | Slot::Claimed { .. } | Slot::Recycling { .. } => None,
    };
    let host = match view.host {
        Host::Well => None,
        Host::Resting { until } => Some(until),
        Host::Ill { probe } => Some(probe),
    };
    // The worker's own image is wanted by itself: that does not fade.
    let fades = view.shares.iter().skip(1).any(|share| share.heat > 0).then(|| now + REVIEW_MS);
    view.slots.iter().filter_map(due).chain(host).chain(fades).filter(|at| *at > now).min()
}

/// The image whose warm VM a slot would have, and why it has none.
pub type Gap = Option<(ImageRef, Miss)>;

/// Why no warm VM waits for a claim of this image, if none does.
pub fn miss(view: &View<'_>, gaps: &[Gap], wanted: &ImageRef, now: Mono) -> Miss {
    let known = |index: usize| {
        let (image, why) = gaps.get(index)?.as_ref()?;
        (image == wanted).then_some(*why)
    };
    let of = |slot: (usize, &Slot)| match slot.1 {
        Slot::Warm { image, since, .. } if image == wanted && now.since(*since) >= view.warm_age_max_ms => {
            Some(Miss::TooOld)
        }
        Slot::Cloning { image, .. } | Slot::Booting { image, .. } if image == wanted => {
            Some(known(slot.0).filter(|why| *why != Miss::Recycling).unwrap_or(Miss::Booting))
        }
        Slot::Cold { .. } | Slot::Recycling { .. } | Slot::Quarantined { .. } => known(slot.0),
        Slot::Cloning { .. } | Slot::Booting { .. } | Slot::Warm { .. } | Slot::Claimed { .. } => None,
    };
    let host = match view.host {
        Host::Well => Miss::NoWarmVm,
        Host::Resting { .. } | Host::Ill { .. } => Miss::Host,
    };
    view.slots.iter().enumerate().find_map(of).unwrap_or(host)
}

/// The slots as the orchestrator knows them. A claim that waits takes a free slot from the offer: it will have it. A slot
/// beyond the pool's size is none.
pub fn views(slots: &[Slot], waiting: &[Waiting], size: usize) -> Vec<SlotView> {
    let surplus = surplus(slots, waiting.len(), size);
    let mut waiting = waiting.iter().map(|waiting| waiting.attempt);
    let shown = |slot: &Slot| {
        let (state, attempt, image) = match slot {
            Slot::Cold { .. } => (SlotState::Cold, None, None),
            Slot::Cloning { image, .. } => (SlotState::Cloning, None, Some(image)),
            Slot::Booting { image, .. } => (SlotState::Booting, None, Some(image)),
            Slot::Warm { image, .. } => (SlotState::Warm, None, Some(image)),
            Slot::Claimed { image, attempt, .. } => (SlotState::Claimed, Some(*attempt), Some(image)),
            Slot::Recycling { attempt, .. } => (SlotState::Recycling, *attempt, None),
            Slot::Quarantined { attempt, .. } => (SlotState::Quarantined, *attempt, None),
        };
        SlotView { state, attempt, image: image.map(|image| image.0.clone()) }
    };
    let mut views: Vec<SlotView> = slots.iter().map(shown).collect();
    for (view, _) in views.iter_mut().zip(surplus).filter(|(view, surplus)| *surplus && view.state.is_free()) {
        view.state = SlotState::Quarantined;
    }
    for view in views.iter_mut().filter(|view| view.state.is_free()) {
        match waiting.next() {
            Some(attempt) => (view.state, view.attempt) = (SlotState::Claimed, Some(attempt)),
            None => break,
        }
    }
    views
}

/// The slot after its VM came to nothing and is gone.
pub fn rested(faults: u32, quarantine_ms: u64, now: Mono) -> Slot {
    match faults {
        0 => Slot::Cold { faults, rest: now },
        1..SLOT_FAULTS_MAX => Slot::Cold { faults, rest: now + RETRY_MS * u64::from(faults) },
        _ => Slot::Quarantined { vm: None, attempt: None, until: now + quarantine_ms, faults: 0 },
    }
}

/// The slot after its VM would not go.
pub fn stuck(vm: VmName, attempt: Option<AttemptRef>, faults: u32, quarantine_ms: u64, now: Mono) -> Slot {
    let wait = if faults < SLOT_FAULTS_MAX { RETRY_MS } else { quarantine_ms };
    Slot::Quarantined { vm: Some(vm), attempt, until: now + wait, faults: faults + 1 }
}

fn pick(slots: &[Slot], used: &[bool], fits: impl Fn(&Slot) -> bool) -> Option<usize> {
    slots.iter().enumerate().position(|(index, slot)| !used[index] && fits(slot))
}

fn is_warm(slot: &Slot, wanted: &ImageRef, view: &View<'_>, now: Mono) -> bool {
    match slot {
        Slot::Warm { image, since, .. } => image == wanted && now.since(*since) < view.warm_age_max_ms,
        Slot::Cold { .. }
        | Slot::Cloning { .. }
        | Slot::Booting { .. }
        | Slot::Claimed { .. }
        | Slot::Recycling { .. }
        | Slot::Quarantined { .. } => false,
    }
}

fn is_coming(slot: &Slot, wanted: &ImageRef) -> bool {
    match slot {
        Slot::Cloning { image, .. } | Slot::Booting { image, .. } => image == wanted,
        Slot::Cold { .. }
        | Slot::Warm { .. }
        | Slot::Claimed { .. }
        | Slot::Recycling { .. }
        | Slot::Quarantined { .. } => false,
    }
}

fn is_leaving(slot: &Slot) -> bool {
    match slot {
        Slot::Recycling { .. } => true,
        Slot::Cold { .. }
        | Slot::Cloning { .. }
        | Slot::Booting { .. }
        | Slot::Warm { .. }
        | Slot::Claimed { .. }
        | Slot::Quarantined { .. } => false,
    }
}

fn is_rested(slot: &Slot, now: Mono) -> bool {
    match slot {
        Slot::Cold { rest, .. } => *rest <= now,
        Slot::Cloning { .. }
        | Slot::Booting { .. }
        | Slot::Warm { .. }
        | Slot::Claimed { .. }
        | Slot::Recycling { .. }
        | Slot::Quarantined { .. } => false,
    }
}

#[cfg(test)]
mod tests;
