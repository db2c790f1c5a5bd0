//! D: which image to bring next, which to remove, and what to say of each.
//!
//! What an attempt waits for comes before what the farm wishes. An image that a VM, a waiting job, a wish, a pin or the idle
//! slots need is never removed to make room; of the others the one that was not used for longest goes first.

use std::collections::{BTreeMap, BTreeSet};

use alloy_shared::env::{Mono, Ms, backoff};
use alloy_shared::id::Digest;
use alloy_shared::limits::{IMAGES_MAX, Limits, TROUBLE_MAX};
use alloy_shared::wire::image::{ImageReport, ImageWant, ImageWish, PullFailed, PullProgress, canonical};

use crate::provider::{Image, ImageRef, VmError, VmFault};

/// Between two looks at an image that somebody still uses and that shall go.
const IN_USE_LOOK_MS: u64 = 5_000;
/// At least this, and a throw of the dice that grows, before a removal that failed is tried again.
const STUCK_PAUSE_MS: u64 = 1_000;
const STUCK_PAUSE_CAP_MS: u64 = 10 * 60_000;

/// A daemon that was killed may have forgotten this much of when an image was used.
pub const USED_STEP_MS: u64 = 60_000;

/// What outlives the daemon.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Book {
    /// The newest wish that was fulfilled, by image.
    pub done: BTreeMap<String, i64>,
    pub used_at: BTreeMap<Digest, Ms>,
}

impl Book {
    /// Whether it is worth writing down after `kept` was. When an image was used need not be known to the second, and a VM
    /// is made for every job.
    pub fn is_news_after(&self, kept: &Self) -> bool {
        let as_good = |(digest, at): (&Digest, &Ms)| {
            kept.used_at.get(digest).is_some_and(|kept| at.0.abs_diff(kept.0) < USED_STEP_MS)
        };
        self.done != kept.done || self.used_at.len() != kept.used_at.len() || !self.used_at.iter().all(as_good)
    }
}

/// A pull that did not bring its image.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Failed {
    error: VmError,
    /// In a row.
    tries: u32,
    /// Nobody asks the registry again before.
    until: Mono,
}

/// A tag or an image that would not go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stuck {
    /// In a row.
    tries: u32,
    /// Nobody tries to remove it before.
    until: Mono,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Busy {
    Pulling {
        name: String,
        /// Fulfilled if it comes.
        generation: i64,
        progress: PullProgress,
        broken_off: bool,
    },
    Removing(Digest),
    Untagging(String),
}

/// What to do, and when to ask again at the latest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    Pull(ImageRef),
    /// Nobody wants what is being pulled any more: others wait for their turn.
    BreakOff,
    Remove(Digest),
    /// The image has other tags.
    Untag(ImageRef),
    Wait(Option<Mono>),
}

#[derive(Debug)]
pub struct Images {
    /// What idle slots are made of: always wanted. The first is what a job gets that names none.
    kept: Vec<String>,
    /// Bytes that all images together may take; absent: whatever the disk has.
    budget: Option<u64>,
    limits: Limits,
    pulls: bool,
    cached: Vec<Image>,
    wishes: BTreeMap<String, ImageWish>,
    /// How many wait for each.
    asked: BTreeMap<String, u32>,
    in_use: BTreeSet<Digest>,
    /// Somebody is just looking whether they are here.
    wanted: BTreeSet<String>,
    failed: BTreeMap<String, Failed>,
    /// By tag or by digest.
    stuck: BTreeMap<String, Stuck>,
    busy: Option<Busy>,
    /// Removals begun and removals over: what was seen of the disk before the last of them may not hold.
    removals: u64,
    /// A pull met a full disk.
    short_of_room: bool,
    book: Book,
}

impl Images {
    pub fn new(kept: &[ImageRef], budget: Option<u64>, pulls: bool, limits: Limits, book: Book) -> Self {
        Self {
            kept: kept.iter().map(|image| canonical(&image.0)).collect(),
            budget,
            limits,
            pulls,
            cached: Vec::new(),
            wishes: BTreeMap::new(),
            asked: BTreeMap::new(),
            in_use: BTreeSet::new(),
            wanted: BTreeSet::new(),
            failed: BTreeMap::new(),
            stuck: BTreeMap::new(),
            busy: None,
            removals: 0,
            short_of_room: false,
            book,
        }
    }

    pub fn own(&self) -> &str {
        self.kept.first().map_or("", String::as_str)
    }

    /// Others are always wanted from here on.
    pub fn keep(&mut self, kept: &[ImageRef]) {
        self.kept = kept.iter().map(|image| canonical(&image.0)).collect();
    }

    pub fn book(&self) -> &Book {
        &self.book
    }

    /// What the provider has.
    pub fn found(&mut self, images: Vec<Image>, now: Ms) {
        self.cached = images;
        self.cached.truncate(IMAGES_MAX);
        let there: BTreeSet<Digest> = self.cached.iter().map(|image| image.digest).collect();
        self.book.used_at.retain(|digest, _| there.contains(digest));
        for digest in there {
            self.book.used_at.entry(digest).or_insert(now);
        }
        let cached = &self.cached;
        let is_of = |image: &Image, what: &String| {
            image.digest.to_string() == *what || image.names.iter().any(|name| name.0 == *what)
        };
        self.stuck.retain(|what, _| cached.iter().any(|image| is_of(image, what)));
        let names: Vec<String> = self.failed.keys().filter(|name| self.digest(name).is_some()).cloned().collect();
        // Whoever brought it: what is there did not fail, unless the farm wishes a newer one.
        for name in names {
            if !self.is_due(&name) {
                self.failed.remove(&name);
            }
        }
    }

    /// The farm's wishes, all of them. A worker that brings no images has no part in them.
    pub fn wish(&mut self, wishes: Vec<ImageWish>) {
        let most = if self.pulls { IMAGES_MAX } else { 0 };
        let known = wishes.into_iter().take(most).map(|wish| (canonical(&wish.name), wish));
        let old = std::mem::replace(&mut self.wishes, known.collect());
        // A new wish does not wait for the end of an old failure's pause.
        for (name, wish) in &self.wishes {
            if old.get(name).is_none_or(|old| old.generation < wish.generation) {
                self.failed.remove(name);
            }
        }
        let wishes = &self.wishes;
        self.book.done.retain(|name, _| wishes.contains_key(name));
    }

    /// What VMs are made of or will be, and the names that somebody is about to use.
    pub fn uses(&mut self, in_use: BTreeSet<Digest>, wanted: BTreeSet<String>) {
        self.in_use = in_use;
        self.wanted = wanted;
    }

    /// Somebody waits for it. Says why not, if it failed a moment ago.
    pub fn ask(&mut self, image: &ImageRef, now: Mono) -> Result<(), VmError> {
        let name = canonical(&image.0);
        if !self.pulls {
            let why = format!("this worker brings no images: it runs jobs in `{}`, and not in `{name}`", self.own());
            let error = VmError::policy(VmFault::NoImage, why);
            // The farm is told, so that it does not send the next one.
            let until = now + self.limits.pull_refused_ms;
            self.failed.insert(name, Failed { error: error.clone(), tries: 1, until });
            return Err(error);
        }
        match self.failed.get(&name).filter(|failed| failed.until > now) {
            Some(failed) => Err(failed.error.clone()),
            None => {
                *self.asked.entry(name).or_default() += 1;
                Ok(())
            }
        }
    }

    /// The provider does not find it, whatever was known of it: somebody else removed it.
    pub fn missed(&mut self, image: &ImageRef) {
        if let Some(digest) = self.digest_of(image) {
            self.cached.retain(|image| image.digest != digest);
        }
    }

    /// One who waited is gone, served or not.
    pub fn unask(&mut self, image: &ImageRef) {
        let name = canonical(&image.0);
        if let Some(waiting) = self.asked.get_mut(&name) {
            *waiting -= 1;
            if *waiting == 0 {
                self.asked.remove(&name);
            }
        }
    }

    /// A VM is made of it. False: it is being removed, or may have been since it was seen, at this count of removals.
    pub fn used(&mut self, digest: Digest, seen: u64, now: Ms) -> bool {
        if self.is_leaving(digest) || seen != self.removals {
            return false;
        }
        self.in_use.insert(digest);
        self.book.used_at.insert(digest, now);
        true
    }

    pub fn progress(&mut self, now: PullProgress) {
        if let Some(Busy::Pulling { progress, .. }) = &mut self.busy {
            *progress = now;
        }
    }

    /// True if VMs can be made of it at once.
    pub fn has(&self, image: &ImageRef) -> bool {
        self.digest_of(image).is_some()
    }

    /// What VMs of this name are made of, if it is here and stays.
    pub fn digest_of(&self, image: &ImageRef) -> Option<Digest> {
        self.digest(&canonical(&image.0)).filter(|digest| !self.is_leaving(*digest))
    }

    /// Goes with every look at the disk.
    pub fn removals(&self) -> u64 {
        self.removals
    }

    fn is_leaving(&self, digest: Digest) -> bool {
        self.busy == Some(Busy::Removing(digest))
    }

    /// Decides what to do, and takes note that it is being done.
    pub fn next(&mut self, now: Mono) -> Next {
        // After a while of rest the next failure is the first one again.
        let rest = self.limits.pull_retry_cap_ms;
        self.failed.retain(|_, failed| failed.until + rest > now);
        let over = self.failed.values().map(|failed| failed.until).filter(|until| *until > now).min();
        if self.break_off() {
            return Next::BreakOff;
        }
        if self.busy.is_some() || !self.pulls {
            return Next::Wait(over);
        }
        let next = self.decide(now);
        self.busy = match &next {
            Next::Pull(image) => {
                let generation = self.wishes.get(&image.0).map_or(0, |wish| wish.generation);
                let progress = PullProgress::default();
                Some(Busy::Pulling { name: image.0.clone(), generation, progress, broken_off: false })
            }
            Next::Remove(digest) => {
                self.removals += 1;
                Some(Busy::Removing(*digest))
            }
            Next::Untag(tag) => Some(Busy::Untagging(tag.0.clone())),
            Next::BreakOff | Next::Wait(_) => None,
        };
        next
    }

    /// True, once, when the pull that runs is for nobody.
    fn break_off(&mut self) -> bool {
        let Some(Busy::Pulling { name, broken_off: false, .. }) = &self.busy else { return false };
        let about_to = self.asked.contains_key(name) || self.wanted.contains(name);
        if about_to || self.kept.contains(name) || self.is_due(name) {
            return false;
        }
        if let Some(Busy::Pulling { broken_off, .. }) = &mut self.busy {
            *broken_off = true;
        }
        true
    }

    fn decide(&mut self, now: Mono) -> Next {
        if self.short_of_room {
            self.short_of_room = false;
            if let Some(digest) = self.evictable(now) {
                return Next::Remove(digest);
            }
        }
        let Unwanted { gone, tags, kept } = self.unwanted();
        for name in gone {
            let generation = self.wishes.get(&name).map_or(0, |wish| wish.generation);
            self.book.done.insert(name, generation);
        }
        if let Some(tag) = tags.iter().find(|tag| !self.is_kept(tag) && !self.is_stuck(tag, now)) {
            return Next::Untag(ImageRef(tag.clone()));
        }
        let goes = |digest: &Digest| !self.is_protected(digest) && !self.is_stuck(&digest.to_string(), now);
        if let Some(digest) = kept.iter().copied().find(goes) {
            return Next::Remove(digest);
        }
        let over = self.budget.is_some_and(|budget| self.total() > budget);
        if let Some(digest) = self.evictable(now).filter(|_| over) {
            return Next::Remove(digest);
        }
        let due: Vec<&String> = self.due();
        let rested = |name: &&&String| self.failed.get(**name).is_none_or(|failed| failed.until <= now);
        if let Some(name) = due.iter().find(rested) {
            return Next::Pull(ImageRef((**name).clone()));
        }
        let retries = due.iter().filter_map(|name| self.failed.get(*name)).map(|failed| failed.until).min();
        let looks = (over || !kept.is_empty() || !tags.is_empty()).then_some(now + IN_USE_LOOK_MS);
        let over_failures = self.failed.values().map(|failed| failed.until).filter(|until| *until > now).min();
        let unstuck = self.stuck.values().map(|stuck| stuck.until).filter(|until| *until > now).min();
        Next::Wait(retries.into_iter().chain(looks).chain(over_failures).chain(unstuck).min())
    }

    /// Names whose wish to be absent holds.
    fn unwanted(&self) -> Unwanted {
        let mut unwanted = Unwanted::default();
        let is_tag = |name: &str| !name.contains('@');
        for (name, wish) in &self.wishes {
            if wish.want != ImageWant::Absent || self.done(name) >= wish.generation {
                continue;
            }
            match self.cached.iter().find(|image| image.names.iter().any(|own| own.0 == *name)) {
                None => unwanted.gone.push(name.clone()),
                Some(image) if is_tag(name) && image.names.iter().any(|own| is_tag(&own.0) && own.0 != *name) => {
                    unwanted.tags.push(name.clone());
                }
                Some(image) => unwanted.kept.push(image.digest),
            }
        }
        unwanted
    }

    /// Images to bring, in this order.
    fn due(&self) -> Vec<&String> {
        let mut due: Vec<&String> = self.asked.keys().filter(|name| self.digest(name).is_none()).collect();
        due.extend(self.kept.iter().filter(|name| self.digest(name).is_none()));
        let mut wished: Vec<&String> = self.wishes.keys().filter(|name| self.is_due(name)).collect();
        wished.sort_by_key(|name| self.wishes.get(*name).map(|wish| wish.generation));
        due.extend(wished);
        due
    }

    fn is_due(&self, name: &str) -> bool {
        self.wishes.get(name).is_some_and(|wish| {
            wish.want == ImageWant::Present && (self.done(name) < wish.generation || self.digest(name).is_none())
        })
    }

    fn done(&self, name: &str) -> i64 {
        self.book.done.get(name).copied().unwrap_or(0)
    }

    fn digest(&self, name: &str) -> Option<Digest> {
        self.cached.iter().find(|image| image.names.iter().any(|own| own.0 == name)).map(|image| image.digest)
    }

    fn total(&self) -> u64 {
        self.cached.iter().filter(|image| image.removable).map(|image| image.size_bytes).sum()
    }

    /// Of those that nobody needs, the one that was not used for longest.
    fn evictable(&self, now: Mono) -> Option<Digest> {
        let goes = |digest: &Digest| !self.is_protected(digest) && !self.is_stuck(&digest.to_string(), now);
        let free = self.cached.iter().map(|image| image.digest).filter(goes);
        free.min_by_key(|digest| (self.book.used_at.get(digest).copied().unwrap_or(Ms(0)), *digest))
    }

    /// The name is wanted.
    fn is_kept(&self, name: &str) -> bool {
        let wished = |wish: &ImageWish| wish.pinned || wish.want == ImageWant::Present;
        self.kept.iter().any(|kept| kept == name)
            || self.asked.contains_key(name)
            || self.wanted.contains(name)
            || self.wishes.get(name).is_some_and(wished)
    }

    fn is_protected(&self, digest: &Digest) -> bool {
        let kept = |name: &ImageRef| self.is_kept(&name.0);
        let image = self.cached.iter().find(|image| image.digest == *digest);
        self.in_use.contains(digest) || image.is_some_and(|image| !image.removable || image.names.iter().any(kept))
    }

    /// It would not go a moment ago.
    fn is_stuck(&self, what: &str, now: Mono) -> bool {
        self.stuck.get(what).is_some_and(|stuck| stuck.until > now)
    }

    /// The pull is over.
    pub fn pulled(&mut self, result: &Result<Digest, VmError>, now: Mono, wall: Ms, dice: u64) {
        let Some(Busy::Pulling { name, generation, broken_off, .. }) = self.busy.take() else { return };
        match result {
            // It says nothing about the image.
            Err(_) if broken_off => {}
            Ok(digest) => {
                self.failed.remove(&name);
                self.book.used_at.insert(*digest, wall);
                if generation > 0 {
                    self.book.done.insert(name, generation);
                }
            }
            Err(error) if error.what == VmFault::Disk && self.evictable(now).is_some() => self.short_of_room = true,
            Err(error) => {
                let tries = self.failed.get(&name).map_or(0, |failed| failed.tries) + 1;
                let pause = if is_refusal(error) {
                    self.limits.pull_refused_ms
                } else {
                    let most = self.limits.pull_retry_ms.saturating_mul(1 << tries.min(16).saturating_sub(1));
                    most.min(self.limits.pull_retry_cap_ms)
                };
                // Not all workers ask a registry again at the same moment.
                let until = now + pause - dice % (pause / 4 + 1);
                let error = if error.what == VmFault::Disk { self.no_room(&name, error) } else { error.clone() };
                self.failed.insert(name, Failed { error, tries, until });
            }
        }
    }

    fn no_room(&self, name: &str, error: &VmError) -> VmError {
        let kept = self.cached.len();
        let gigabytes = self.total() as f64 / 1e9;
        let tail = format!("no room for {name}: all {kept} images here ({gigabytes:.0} GB) are needed; {}", error.tail);
        VmError { tail, ..error.clone() }
    }

    /// The removal is over. What it left of an image that would not go shows with the next look.
    pub fn removed(&mut self, is_gone: bool, now: Mono, dice: u64) {
        let what = match &self.busy {
            Some(Busy::Removing(digest)) => {
                self.removals += 1;
                if is_gone {
                    self.cached.retain(|image| image.digest != *digest);
                }
                digest.to_string()
            }
            Some(Busy::Untagging(tag)) => tag.clone(),
            Some(Busy::Pulling { .. }) | None => return,
        };
        self.busy = None;
        if is_gone {
            self.stuck.remove(&what);
            return;
        }
        let tries = self.stuck.get(&what).map_or(0, |stuck| stuck.tries + 1);
        let until = now + STUCK_PAUSE_MS + backoff(tries, STUCK_PAUSE_MS, STUCK_PAUSE_CAP_MS, dice);
        self.stuck.insert(what, Stuck { tries, until });
    }

    /// What to tell the farm, by name.
    pub fn view(&self, now: Mono) -> Vec<ImageReport> {
        let mut names: BTreeSet<String> = BTreeSet::new();
        for image in &self.cached {
            let tags: Vec<&ImageRef> = image.names.iter().filter(|name| !name.0.contains('@')).collect();
            let shown = if tags.is_empty() { image.names.iter().collect() } else { tags };
            names.extend(shown.into_iter().map(|name| name.0.clone()));
        }
        names.extend(self.wishes.keys().filter(|name| self.is_due(name) || self.digest(name).is_some()).cloned());
        names.extend(self.wishes.values().filter(|wish| wish.want == ImageWant::Absent).map(|w| canonical(&w.name)));
        names.extend(self.asked.keys().cloned());
        names.extend(self.failed.iter().filter(|(_, failed)| failed.until > now).map(|(name, _)| name.clone()));
        if self.pulls {
            names.extend(self.kept.iter().cloned());
        }
        names.into_iter().take(IMAGES_MAX).map(|name| self.report(name, now)).collect()
    }

    fn report(&self, name: String, now: Mono) -> ImageReport {
        let digest = self.digest(&name);
        let image = self.cached.iter().find(|image| Some(image.digest) == digest);
        let failed = self.failed.get(&name).filter(|failed| failed.until > now);
        let pulling = match &self.busy {
            Some(Busy::Pulling { name: busy, progress, .. }) if *busy == name => Some(*progress),
            Some(Busy::Pulling { .. } | Busy::Removing(_) | Busy::Untagging(_)) | None => None,
        };
        ImageReport {
            digest: digest.map(|digest| format!("sha256:{digest}")),
            size_bytes: image.map(|image| image.size_bytes),
            used_at_ms: digest.and_then(|digest| self.book.used_at.get(&digest)).map(|at| at.0),
            in_use: self.kept.contains(&name)
                || self.asked.contains_key(&name)
                || digest.is_some_and(|digest| self.in_use.contains(&digest)),
            waiting: pulling.is_none() && failed.is_none() && self.due().contains(&&name),
            pulling,
            failed: failed.map(|failed| PullFailed {
                message: failed.error.tail[..failed.error.tail.floor_char_boundary(TROUBLE_MAX)].to_owned(),
                refused: is_refusal(&failed.error),
            }),
            generation: self.done(&name),
            name,
        }
    }
}

/// What shall not be here.
#[derive(Default)]
struct Unwanted {
    /// It is not.
    gone: Vec<String>,
    /// It is one of several tags of its image.
    tags: Vec<String>,
    /// Their images are.
    kept: Vec<Digest>,
}

/// True if trying again would give the same answer.
fn is_refusal(error: &VmError) -> bool {
    error.what == VmFault::NoImage
}

#[cfg(test)]
mod tests;
