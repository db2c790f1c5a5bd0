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

/// Faults in a row after which a slot is not offered for a while.
pub const SLOT_FAULTS_MAX: u32 = 3;
const RETRY_MS: u64 = 1_000;

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
    /// What an idle slot keeps warm; absent while it is not on this host.
    pub image: Option<&'a ImageRef>,
    pub warm_age_max_ms: u64,
    pub host: Host,
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
    let mut actions = Vec::new();
    let mut used = vec![false; view.slots.len()];
    let mut unmet = Vec::new();
    let mut makes = makes(view, now);
    for (claim, waiting) in view.waiting.iter().enumerate() {
        match pick(view.slots, &used, |slot| is_warm(slot, &waiting.image, view, now)) {
            Some(slot) => {
                used[slot] = true;
                actions.push(PoolAction::Give { slot, claim });
            }
            None => unmet.push(&waiting.image),
        }
    }
    for image in unmet {
        let coming = pick(view.slots, &used, |slot| is_coming(slot, image));
        let room = || pick(view.slots, &used, |slot| is_rested(slot, now));
        let other = || pick(view.slots, &used, |slot| matches!(slot, Slot::Warm { .. }));
        if let Some(slot) = coming {
            used[slot] = true;
        } else if makes == 0 {
            // A warm VM of another image may be all that this host still has.
        } else if let Some(slot) = room() {
            (used[slot], makes) = (true, makes - 1);
            actions.push(PoolAction::Make { slot, image: image.clone() });
        } else if let Some(slot) = other() {
            used[slot] = true;
            actions.push(PoolAction::Unmake { slot });
        }
    }
    if let Host::Ill { .. } = view.host
        && makes > 0
        && !view.slots.iter().any(|slot| matches!(slot, Slot::Cold { .. }))
        && let Some(slot) = pick(view.slots, &used, |slot| matches!(slot, Slot::Warm { .. }))
    {
        // Whether the host is well again shows only when a VM is made.
        used[slot] = true;
        actions.push(PoolAction::Unmake { slot });
    }
    for (index, slot) in view.slots.iter().enumerate().filter(|(index, _)| !used[*index]) {
        match slot {
            Slot::Cold { rest, .. } if *rest <= now && makes > 0 => {
                if let Some(image) = view.image {
                    makes -= 1;
                    actions.push(PoolAction::Make { slot: index, image: image.clone() });
                }
            }
            Slot::Warm { since, .. } if now.since(*since) >= view.warm_age_max_ms => {
                actions.push(PoolAction::Unmake { slot: index });
            }
            Slot::Quarantined { vm: Some(_), until, .. } if *until <= now => {
                actions.push(PoolAction::Unmake { slot: index });
            }
            Slot::Quarantined { vm: None, until, .. } if *until <= now => {
                actions.push(PoolAction::Release { slot: index });
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
    actions
}

/// How many VMs may be made at once, as far as the host goes.
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
    view.slots.iter().filter_map(due).chain(host).filter(|at| *at > now).min()
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

/// The slots as the orchestrator knows them. A claim that waits takes a free slot from the offer: it will have it.
pub fn views(slots: &[Slot], waiting: &[Waiting]) -> Vec<SlotView> {
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
