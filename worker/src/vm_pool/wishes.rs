//! P: what the pool learns while it runs: who asks for which image, and what a person wants of it from here on.

use std::collections::BTreeMap;

use alloy_shared::env::Mono;
use alloy_shared::limits::SLOTS_MAX;

use super::making::Held;
use super::{Claim, Runner};
use crate::provider::ImageRef;
use crate::vm_demand::{Share, Wish};
use crate::vm_plan::{PoolAction, Slot, spent};

impl Runner {
    pub(super) fn ask(&mut self, claim: Claim) {
        // Whoever is gone before the claim arrived has said so already.
        if claim.reply.is_closed() {
            return;
        }
        // One that comes again for another VM asks for nothing new.
        if claim.missed.is_none() {
            self.demand.asked(&claim.waiting.image, claim.named, self.setup.env.now().mono);
        }
        self.claims.push(claim);
    }

    /// What idle slots may keep warm: images that are on this host.
    pub(super) fn shares(&self, now: Mono) -> Vec<Share> {
        let mut shares = self.demand.shares(&self.setup.wish, now);
        shares.retain(|share| self.setup.images.has(&share.image));
        shares
    }

    /// The images of the VMs that shall be made: nobody removes them from here on, until the VMs are there. Or else the one
    /// that is gone since the plan was made.
    pub(super) fn hold(&self, actions: &[PoolAction]) -> Result<BTreeMap<ImageRef, Held>, ImageRef> {
        let mut held = BTreeMap::new();
        for action in actions {
            let image = match action {
                PoolAction::Make { image, .. } => image,
                PoolAction::Unmake { .. } | PoolAction::Give { .. } | PoolAction::Release { .. } => continue,
            };
            let claim = self.claims.iter().find(|claim| claim.waiting.image == *image);
            let used = claim.map(|claim| claim.image.clone()).or_else(|| self.setup.images.hold(image));
            let used = used.ok_or_else(|| image.clone())?;
            held.insert(image.clone(), Held { image: used, by_claim: claim.is_some() });
        }
        Ok(held)
    }

    pub(super) fn is_kept(&self, image: &ImageRef) -> bool {
        self.setup.wish.kept().contains(image)
    }

    /// A VM of this image did not come, and nobody waits for it: what was asked for lately is no reason for another one.
    pub(super) fn give_up(&mut self, image: &ImageRef) {
        if !self.is_kept(image) && !self.claims.iter().any(|claim| claim.waiting.image == *image) {
            self.demand.forget(image);
        }
    }

    pub(super) fn change(&mut self, mut wish: Wish) {
        wish.slots = wish.slots.clamp(1, SLOTS_MAX);
        tracing::info!(slots = wish.slots, image = %wish.image, floors = wish.floors.len(), "the pool changes");
        self.demand.rename(&self.setup.wish.image, &wish.image);
        self.setup.wish = wish;
        let count = self.setup.wish.slots.max(self.slots.len());
        self.resize(count);
    }

    /// Lets go of empty slots that are too many.
    pub(super) fn shrink(&mut self) {
        let spent = spent(&self.slots, self.claims.len(), self.setup.wish.slots);
        if spent > 0 {
            self.resize(self.slots.len() - spent);
        }
    }

    fn resize(&mut self, count: usize) {
        self.slots.resize(count, Slot::Cold { faults: 0, rest: Mono(0) });
        self.running.resize_with(count, || None);
        self.gaps.resize(count, None);
        self.watches.resize_with(count, || None);
        self.leaving.resize_with(count, || None);
        self.care.resize(count);
    }
}
