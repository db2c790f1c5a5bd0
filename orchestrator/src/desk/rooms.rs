//! D: what the connected workers have to offer at this moment.

use std::collections::{BTreeMap, BTreeSet};

use alloy_shared::id::{AttemptRef, JobId, WorkerId};
use alloy_shared::wire::session::{SlotState, SlotView};

use super::{Desk, Offer};
use crate::job::Step;
use crate::pick::{self, Room, WhyNot};

impl Desk {
    pub(super) fn rooms(&self) -> BTreeMap<WorkerId, Room> {
        self.offers.iter().map(|(id, offer)| (*id, self.room(offer))).collect()
    }

    /// A slot is taken when the worker says so or when a job of ours is leased to it, counted once.
    fn room(&self, offer: &Offer) -> Room {
        let usable: Vec<&SlotView> = offer.slots.iter().filter(|slot| slot.state != SlotState::Quarantined).collect();
        let leased = self.leased.get(&offer.worker).into_iter().flatten().copied();
        let named: BTreeSet<AttemptRef> = usable.iter().filter_map(|slot| slot.attempt).chain(leased).collect();
        let nameless = usable.iter().filter(|slot| slot.attempt.is_none() && !slot.state.is_free()).count();
        let slots = usable.len() as u32;
        let taken = (named.len() + nameless) as u32;
        Room {
            name: offer.name.clone(),
            labels: offer.labels.clone(),
            draining: offer.draining,
            slots,
            free: slots.saturating_sub(taken),
        }
    }

    pub(super) fn why_not(&self, id: &JobId) -> Option<WhyNot> {
        let live = self.live.get(id)?;
        matches!(live.job.state.step, Step::Queued { .. }).then(|| pick::why_not(&live.required, &self.rooms()))
    }
}
