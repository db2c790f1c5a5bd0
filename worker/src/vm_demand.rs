//! D: which images idle slots keep warm: floors that a person sets, and beyond them what was asked for lately.

use std::collections::{BTreeMap, VecDeque};

use alloy_shared::env::Mono;
use alloy_shared::limits::{DEMAND_MAX, FLOORS_MAX};

use crate::provider::ImageRef;

/// After so long a request counts half.
pub const HALF_LIFE_MS: u64 = 15 * 60_000;
/// What one request counts for at its moment.
const REQUEST: u64 = 1_000;
/// What the worker's own image counts for without any request.
const OWN: u64 = 1_500;

/// What a person wants of a pool. It may change while the pool runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    pub slots: usize,
    /// What a job without an image of its own gets.
    pub image: ImageRef,
    /// So many idle slots hold a warm VM of this image, the first ones first.
    pub floors: Vec<(ImageRef, usize)>,
}

impl Wish {
    /// The images that are always wanted, the worker's own first.
    pub fn kept(&self) -> Vec<ImageRef> {
        let floors = self.floors.iter().take(FLOORS_MAX).map(|(image, _)| image);
        [&self.image].into_iter().chain(floors).cloned().collect()
    }
}

/// What speaks for keeping an image warm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    pub image: ImageRef,
    pub floor: usize,
    pub heat: u64,
}

/// The requests of late, of all images together.
#[derive(Debug, Default)]
pub struct Demand(VecDeque<Request>);

#[derive(Debug)]
struct Request {
    at: Mono,
    image: ImageRef,
    /// It said which image it wants. Else it wants the worker's own, whatever that is.
    named: bool,
}

impl Demand {
    pub fn asked(&mut self, image: &ImageRef, named: bool, now: Mono) {
        if self.0.len() == DEMAND_MAX {
            self.0.pop_front();
        }
        self.0.push_back(Request { at: now, image: image.clone(), named });
    }

    /// No spare of this image shall be made for what was asked before.
    pub fn forget(&mut self, image: &ImageRef) {
        self.0.retain(|asked| asked.image != *image);
    }

    /// The worker's own image is another one from here on: who asked for none by name would get that.
    pub fn rename(&mut self, old: &ImageRef, new: &ImageRef) {
        let unnamed = self.0.iter_mut().filter(|asked| !asked.named && asked.image == *old);
        unnamed.for_each(|asked| asked.image.clone_from(new));
    }

    /// The images that may be kept warm: the worker's own first, then those with a floor.
    pub fn shares(&self, wish: &Wish, now: Mono) -> Vec<Share> {
        let mut heats: BTreeMap<&ImageRef, u64> = BTreeMap::new();
        for asked in &self.0 {
            *heats.entry(&asked.image).or_default() += heat(now.since(asked.at));
        }
        let floors = wish.floors.iter().take(FLOORS_MAX).map(|(image, floor)| (image, *floor));
        let mut shares: Vec<Share> = Vec::new();
        for (image, floor) in [(&wish.image, 0)].into_iter().chain(floors) {
            match shares.iter_mut().find(|share| share.image == *image) {
                Some(share) => share.floor = share.floor.max(floor),
                None => {
                    let heat = heats.remove(image).unwrap_or(0);
                    shares.push(Share { image: image.clone(), floor, heat });
                }
            }
        }
        shares[0].heat += OWN;
        let asked = heats.into_iter().filter(|(_, heat)| *heat > 0);
        shares.extend(asked.map(|(image, heat)| Share { image: image.clone(), floor: 0, heat }));
        shares
    }
}

fn heat(age_ms: u64) -> u64 {
    let halves = age_ms / HALF_LIFE_MS;
    let whole = REQUEST.checked_shr(u32::try_from(halves).unwrap_or(u32::MAX)).unwrap_or(0);
    // A straight line between the halvings.
    whole - whole * (age_ms % HALF_LIFE_MS) / (2 * HALF_LIFE_MS)
}

/// The image that one more idle slot should hold, beside spares of which `have` tells how many there are.
pub fn next(shares: &[Share], have: impl Fn(&ImageRef) -> usize) -> Option<&Share> {
    let short = shares.iter().find(|share| have(&share.image) < share.floor);
    // Of equals the first.
    short.or_else(|| shares.iter().rev().max_by_key(|share| share.heat / (have(&share.image) as u64 + 1)))
}

/// What the last one of `have` spares of this image is worth.
pub fn worth(shares: &[Share], image: &ImageRef, have: usize) -> u64 {
    let heat = shares.iter().find(|share| share.image == *image).map_or(0, |share| share.heat);
    heat / have.max(1) as u64
}

/// Whether a warm spare of `old` should make room for one more of `new`. It costs a boot, so the difference must be clear;
/// what this says it does not take back until somebody asks again.
pub fn is_worth_it(shares: &[Share], new: &Share, old: &ImageRef, have: impl Fn(&ImageRef) -> usize) -> bool {
    let floor = shares.iter().find(|share| share.image == *old).map_or(0, |share| share.floor);
    let (has, mine) = (have(old), have(&new.image));
    if new.image == *old || has <= floor {
        return false;
    }
    mine < new.floor || 2 * worth(shares, &new.image, mine + 1) >= 3 * worth(shares, old, has) + REQUEST
}

#[cfg(test)]
mod tests;
