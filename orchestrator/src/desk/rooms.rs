//! D: what the connected workers have to offer at this moment.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use alloy_shared::env::{Mono, Now};
use alloy_shared::id::{AttemptRef, JobId, WorkerId};
use alloy_shared::limits;
use alloy_shared::wire::image::{ImageReport, canonical};
use alloy_shared::wire::session::{SlotState, SlotView};

use super::{Desk, Live, Offer};
use crate::job::{Event, Rules, Step};
use crate::pick::{self, Room, Waiting, WhyNot};
use crate::store::Guard;

/// A worker between two sessions: it may be back at any moment, and nobody may say that there is no such worker.
pub(super) struct Away {
    offer: Offer,
    pub(super) until: Mono,
}

impl Desk {
    /// `left`: it said goodbye.
    pub(super) fn gone(&mut self, worker: WorkerId, left: bool, now: Now) {
        let offer = self.offers.remove(&worker);
        if let Some(offer) = offer.filter(|_| !left) {
            self.away.insert(worker, Away { offer, until: now.mono + self.limits.expiry_ms });
        }
    }

    /// Nobody who is expected back is given up before then.
    pub(super) fn expect(&mut self, until: Mono) {
        self.expecting_until = self.expecting_until.max(until);
        for away in self.away.values_mut() {
            away.until = away.until.max(until);
        }
    }

    /// The rooms of those who are connected and of those who are expected back. These have nothing free.
    pub(super) fn rooms_expected(&self) -> BTreeMap<WorkerId, Room> {
        let mut rooms = self.rooms();
        for (id, away) in &self.away {
            rooms.entry(*id).or_insert_with(|| Room { free: 0, ..self.room(&away.offer) });
        }
        rooms
    }

    pub(super) fn rooms(&self) -> BTreeMap<WorkerId, Room> {
        let elsewhere = self.elsewhere.iter().filter(|(id, _)| !self.offers.contains_key(id));
        let away = elsewhere.map(|(id, offer)| (*id, Room { free: 0, ..self.room(offer) }));
        self.offers.iter().map(|(id, offer)| (*id, self.room(offer))).chain(away).collect()
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
            org: offer.org,
            name: offer.name.clone(),
            labels: offer.labels.clone(),
            draining: offer.draining,
            slots,
            free: slots.saturating_sub(taken),
            images: Arc::clone(&offer.images),
            warm: usable
                .iter()
                .filter(|slot| slot.state == SlotState::Warm)
                .filter_map(|slot| slot.image.as_deref())
                .map(canonical)
                .collect(),
        }
    }

    /// The rules of a job as they are at this moment. Who else is there decides only when it may have been lost too often,
    /// and not before everybody had time to connect.
    pub(super) fn rules(&self, live: &Live, now: Now) -> Rules {
        let untried = live.job.state.lease().is_some_and(|lease| {
            let avoid = &lease.losers();
            let (id, org) = (live.job.id, live.job.org);
            let job = Waiting { id, org, required: &live.required, image: image_of(live), avoid };
            live.job.state.tries.lost >= live.rules.lost_max && pick::untried(job, &self.rooms_expected())
        });
        let untried = untried || live.rules.untried && now.mono < self.expecting_until;
        Rules { untried, ..live.rules.clone() }
    }

    pub(super) fn why_not(&self, id: &JobId) -> Option<WhyNot> {
        let live = self.live.get(id)?;
        if self.asleep.contains(id) && matches!(live.job.state.step, Step::Queued { .. }) {
            return Some(WhyNot::Asleep);
        }
        matches!(live.job.state.step, Step::Queued { .. })
            .then(|| pick::why_not(live.job.org, &live.required, image_of(live), &self.rooms()))
    }

    /// Ends jobs whose image is not to be had, once everybody had time to connect and say what they have.
    pub(super) fn refuse(&mut self, now: Now) {
        let refuses = |offer: &Offer| {
            let refused = |report: &ImageReport| report.failed.as_ref().is_some_and(|failed| failed.refused);
            offer.images.images.iter().any(refused)
        };
        if now.mono < self.expecting_until || self.queue.is_empty() || !self.offers.values().any(refuses) {
            return;
        }
        let rooms = self.rooms_expected();
        let awake = self.queue.iter().filter(|(_, id)| !self.asleep.contains(id));
        let oldest = awake.take(limits::COMMIT_GROUPS_MAX).filter_map(|(_, id)| self.live.get(id));
        let refusal = |live: &Live| pick::refusal(live.job.org, &live.required, image_of(live), &rooms);
        let refused: Vec<(JobId, String)> = oldest.filter_map(|live| Some((live.job.id, refusal(live)?))).collect();
        for (id, message) in refused {
            self.change(None, id, &Event::NoImage { message }, Guard::Version, None, now);
        }
    }
}

/// What it wants to run in; absent: the worker's own.
pub(super) fn image_of(live: &Live) -> Option<&str> {
    live.job.spec.image.as_deref()
}
