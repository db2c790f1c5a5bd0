//! D: who uses which image at this moment. To use one and to remove one are decided here, one after the other: what has a
//! user is not removed, and what is being removed gets none.

use std::collections::BTreeSet;
use std::sync::Arc;

use alloy_shared::env::{Mono, Ms};
use alloy_shared::id::Digest;
use alloy_shared::wire::image::{ImageReport, canonical};

use crate::image_plan::{Images, Next};
use crate::provider::ImageRef;

/// An image that somebody uses. It is not removed before this and its clones are dropped.
#[derive(Debug, Clone)]
pub struct Use(Arc<Digest>);

impl Use {
    pub fn digest(&self) -> Digest {
        *self.0
    }
}

/// A name that somebody is about to use. No removal of what it stands for begins before this is dropped.
#[derive(Debug)]
pub struct Want {
    _name: Arc<String>,
}

#[derive(Debug)]
pub struct Shelf {
    pub images: Images,
    /// One for each image that is or was used; more than one owner: it is.
    uses: Vec<Arc<Digest>>,
    /// One for each look; more than one owner: it is not over.
    wants: Vec<Arc<String>>,
}

impl Shelf {
    pub fn new(images: Images) -> Self {
        Self { images, uses: Vec::new(), wants: Vec::new() }
    }

    pub fn want(&mut self, image: &ImageRef) -> Want {
        self.refresh();
        let wanted = Arc::new(canonical(&image.0));
        self.wants.push(Arc::clone(&wanted));
        Want { _name: wanted }
    }

    /// What VMs of this name are made of, if it is here and stays.
    pub fn hold_named(&mut self, image: &ImageRef) -> Option<Use> {
        self.images.digest_of(image).map(|digest| self.hold(digest))
    }

    /// An image that the provider was seen to have at this count of removals.
    pub fn hold_seen(&mut self, digest: Digest, seen: u64, now: Ms) -> Option<Use> {
        self.images.used(digest, seen, now).then(|| self.hold(digest))
    }

    fn hold(&mut self, digest: Digest) -> Use {
        match self.uses.iter().find(|used| ***used == digest) {
            Some(known) => Use(Arc::clone(known)),
            None => {
                let used = Arc::new(digest);
                self.uses.push(Arc::clone(&used));
                Use(used)
            }
        }
    }

    /// Decides what to do, with those in view who use an image at this moment.
    pub fn next(&mut self, now: Mono) -> Next {
        self.refresh();
        self.images.next(now)
    }

    pub fn view(&mut self, now: Mono) -> Vec<ImageReport> {
        self.refresh();
        self.images.view(now)
    }

    fn refresh(&mut self) {
        self.uses.retain(|used| Arc::strong_count(used) > 1);
        self.wants.retain(|wanted| Arc::strong_count(wanted) > 1);
        let wanted = self.wants.iter().map(|wanted| (**wanted).clone()).collect::<BTreeSet<_>>();
        self.images.uses(self.uses.iter().map(|used| **used).collect(), wanted);
    }
}

#[cfg(test)]
mod tests;
