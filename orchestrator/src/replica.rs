//! P: one of several orchestrators of a farm. It says that it and its workers live, hears what the others changed, and counts
//! workers as lost that none of them has heard. Truth is in the database; a note only says that it is worth a look.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use alloy_shared::env::{Mono, Ms};
use alloy_shared::id::{AttemptRef, Labels, WorkerId};
use alloy_shared::limits::{self, Limits};
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::App;
use crate::desk::{Offer, Request};
use crate::gc::Collector;
use crate::hub::{LiveWorker, Told};
use crate::logs::Logs;
use crate::store::StoreError;
use crate::store::sql::Shared;
use crate::store::sql::shared::{Changed, Duties, Ear, Elsewhere, Silent};

/// Between two notes: what happens meanwhile is told by one.
const QUIET_MS: u64 = 20;
/// So many looks without a note, and the connection for notes is asked whether it is there.
const SILENT_LOOKS: u32 = 3;
/// Between two looks at logs that are followed here and written elsewhere.
const AUDIENCE_MS: u64 = 200;
/// As far the database's clock may run ahead of this process's between two beats, or behind what it said. Behind a step silence is
/// no measure.
const STEP_MS: u64 = 5_000;
/// Jobs that are read at once.
const PAGE: u32 = 2 * limits::COMMIT_GROUPS_MAX as u32;

/// What an orchestrator needs to be one of several.
pub struct Replica {
    pub shared: Shared,
    /// Where the first look begins.
    pub horizon: String,
    /// The desk has something to tell.
    pub spoken: mpsc::Receiver<()>,
}

/// Since when this process has written signs of life without a break, its own standing still included.
#[derive(Default)]
struct Contact(Mutex<Option<Unbroken>>);

struct Unbroken {
    first: Mono,
    last: Mono,
    asked: Clocks,
}

/// What time it was here when the database was asked, and there when it answered.
#[derive(Debug, Clone, Copy)]
struct Clocks {
    here: Mono,
    there: Ms,
}

impl Clocks {
    /// The database's clock went ahead since, by more than time went by.
    fn stepped(&self, now: Mono, there: Ms) -> bool {
        there.since(self.there) > now.since(self.here) + STEP_MS
    }
}

impl Contact {
    /// Notes a beat that was written, or that one was not. A step of the database's clock breaks the contact as well: signs of
    /// life from before look older than they are. Returns whether there was one.
    fn is(&self, asked: Option<Clocks>, now: Mono, break_ms: u64) -> bool {
        let mut unbroken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = unbroken.take().filter(|one| now.since(one.last) <= break_ms);
        let Some(asked) = asked else { return false };
        let stepped = before.as_ref().is_some_and(|one| one.asked.stepped(now, asked.there));
        let first = before.filter(|_| !stepped).map_or(now, |one| one.first);
        *unbroken = Some(Unbroken { first, last: now, asked });
        stepped
    }

    /// Whether the database's clock went on as it should between the last beat and an answer of this moment.
    fn agrees(&self, now: Mono, there: Ms) -> bool {
        let unbroken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        unbroken.as_ref().is_some_and(|one| !one.asked.stepped(now, there))
    }

    fn lasts_ms(&self, now: Mono, break_ms: u64) -> u64 {
        let unbroken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        unbroken.as_ref().filter(|one| now.since(one.last) <= break_ms).map_or(0, |one| now.since(one.first))
    }

    /// For how long yet silence is no measure: while the database was away nobody could write whom he heard, and while this
    /// process stood still it heard nobody. 0: it is one.
    fn young_ms(&self, now: Mono, limits: &Limits) -> u64 {
        limits.startup_grace_ms.saturating_sub(self.lasts_ms(now, limits.suspect_ms()))
    }
}

/// Starts what it does although nobody asks.
pub fn begin(app: &Arc<App>, replica: Replica) {
    let Replica { shared, horizon, spoken } = replica;
    let contact = Arc::new(Contact::default());
    let env = app.env.clone();
    info!("this orchestrator is {} of the farm", shared.me());
    env.spawn("beat", Box::pin(beat(app.clone(), shared.clone(), contact.clone())));
    env.spawn("speak", Box::pin(speak(app.clone(), shared.clone(), spoken)));
    env.spawn("look", Box::pin(look(app.clone(), shared.clone(), horizon)));
    env.spawn("others", Box::pin(others(app.clone(), shared.clone(), contact.clone())));
    env.spawn("audience", Box::pin(audience(app.clone())));
    env.spawn("reap", Box::pin(reap(app.clone(), shared.clone(), contact)));
    env.spawn("duties", Box::pin(duties(app.clone(), shared)));
}

/// Writes when each worker was heard, all of them in one transaction with the sign of life of this orchestrator.
async fn beat(app: Arc<App>, shared: Shared, contact: Arc<Contact>) {
    let step = (app.limits.heartbeat_ms / 5).max(1);
    loop {
        let at = app.env.now().mono;
        let heard = app.hub.heard(at);
        let done = shared.beat(env!("CARGO_PKG_VERSION"), &heard).await;
        let clocks = done.as_ref().ok().map(|beat| Clocks { here: at, there: beat.now });
        if contact.is(clocks, app.env.now().mono, app.limits.suspect_ms()) {
            warn!("the database's clock went ahead: for a while nobody counts as silent");
        }
        match done {
            Ok(beat) => app.hub.wrote(heard, &BTreeSet::from_iter(beat.own), at),
            Err(error) => {
                warn!(%error, "the database is away: workers are answered for as long as the books know of them")
            }
        }
        app.env.sleep_until(at + step).await;
    }
}

/// Passes on that the desk changed something that another orchestrator may wait for.
async fn speak(app: Arc<App>, shared: Shared, mut spoken: mpsc::Receiver<()>) {
    while spoken.recv().await.is_some() {
        if let Err(error) = shared.notify().await {
            warn!(%error, "other orchestrators learn of a change at their next look");
        }
        app.env.sleep_until(app.env.now().mono + QUIET_MS).await;
    }
}

/// Takes over what other orchestrators decided, as soon as they say so, and every poll floor.
async fn look(app: Arc<App>, shared: Shared, mut since: String) {
    let mut ear: Option<Ear> = None;
    let mut silent = 0;
    loop {
        if let Err(error) = learn(&app, &shared, &mut since).await {
            warn!(%error, "what other orchestrators changed cannot be read");
        }
        let until = app.env.now().mono + app.limits.poll_floor_ms;
        tokio::select! {
            biased;
            () = hear(&shared, &mut ear) => silent = 0,
            () = app.env.sleep_until(until) => silent += 1,
        }
        if silent >= SILENT_LOOKS {
            silent = 0;
            if let Some(listening) = &mut ear
                && !answers(&app, listening).await
            {
                warn!("the connection for notes is gone without a word: another one is opened");
                ear = None;
            }
        }
    }
}

/// Whether the connection for notes answers before the next look is due.
async fn answers(app: &App, ear: &mut Ear) -> bool {
    tokio::select! {
        biased;
        there = ear.listens() => there,
        () = app.env.sleep_until(app.env.now().mono + app.limits.poll_floor_ms) => false,
    }
}

/// Returns when another orchestrator has said something. Without a connection it never does.
async fn hear(shared: &Shared, ear: &mut Option<Ear>) {
    let listening = match ear {
        Some(listening) => listening,
        None => match shared.listen().await {
            Ok(fresh) => ear.insert(fresh),
            Err(_) => return std::future::pending().await,
        },
    };
    if listening.heard().await.is_err() {
        *ear = None;
    }
}

async fn learn(app: &App, shared: &Shared, since: &mut String) -> Result<(), StoreError> {
    // What is under way now may become visible behind a page that has been read: the next look begins here.
    let next = shared.horizon().await?;
    let mut from = Changed::since(since);
    loop {
        let (jobs, last) = shared.changed(&from, PAGE).await?;
        if !jobs.is_empty() {
            app.desk.tell(Request::Loaded(jobs)).await;
        }
        match last {
            Some(last) => from = last,
            None => break,
        }
    }
    *since = next;
    Ok(())
}

/// Compares the books with the sessions here, and reads who is elsewhere.
async fn others(app: Arc<App>, shared: Shared, contact: Arc<Contact>) {
    let mut known = Known::default();
    loop {
        if let Err(error) = compare(&app, &shared, &contact, &mut known).await {
            warn!(%error, "what the farm's other workers do cannot be read");
        }
        let for_ms = contact.young_ms(app.env.now().mono, &app.limits);
        if for_ms > 0 {
            app.desk.tell(Request::Expect { for_ms }).await;
        }
        app.env.sleep_until(app.env.now().mono + app.limits.poll_floor_ms).await;
    }
}

/// What the last look at the others found.
#[derive(Default)]
struct Known {
    wishes: Option<String>,
    /// The workers that counted.
    counted: BTreeSet<WorkerId>,
}

async fn compare(app: &App, shared: &Shared, contact: &Contact, known: &mut Known) -> Result<(), StoreError> {
    app.hub.compare(&shared.own(&app.hub.present()).await?);
    let wishes = Some(shared.wishes().await?);
    if known.wishes != wishes {
        known.wishes = wishes;
        app.hub.wishes_moved();
    }
    let now = app.env.now().mono;
    let elsewhere = shared.elsewhere(2 * app.limits.heartbeat_ms).await?;
    let young = contact.young_ms(app.env.now().mono, &app.limits) > 0;
    let (mut offers, mut lives) = (Vec::new(), Vec::new());
    for worker in elsewhere {
        let told: Told = serde_json::from_str(&worker.offer).unwrap_or_default();
        let counts = counts(&worker, young && known.counted.contains(&worker.worker), app.limits.expiry_ms);
        lives.push((worker.worker, live(&worker, &told)));
        if counts {
            offers.push(offer(worker, told));
        }
    }
    known.counted = offers.iter().map(|offer| offer.worker).collect();
    app.hub.set_elsewhere(lives, now);
    app.desk.tell(Request::Elsewhere(offers)).await;
    Ok(())
}

/// Whether a job may wait for it. One that is away, or whose orchestrator is, comes back: until then nobody may say that there is
/// no such worker. `kept`: it counted before the database was away, when nobody could write whom he heard.
fn counts(worker: &Elsewhere, kept: bool, expiry_ms: u64) -> bool {
    // An orchestrator that does not write may still answer it for as long as a lease lasts.
    let most_ms = if worker.lives { expiry_ms } else { 2 * expiry_ms };
    !worker.left && (kept || worker.silent_ms <= most_ms)
}

fn live(worker: &Elsewhere, told: &Told) -> LiveWorker {
    LiveWorker {
        silent_ms: worker.silent_ms,
        connected: worker.lives && !worker.left,
        left: worker.left,
        slots: told.slots.clone(),
        images: Arc::clone(&told.images),
        stopping: told.stopping,
        trouble: told.trouble.clone(),
    }
}

fn offer(worker: Elsewhere, told: Told) -> Offer {
    let Elsewhere { worker: id, org, name, labels: given, host_labels, draining, .. } = worker;
    let mut labels: Labels = host_labels;
    for (key, value) in given.iter() {
        // Together they may be more than the most, then the rest stays out.
        if labels.insert(key, value).is_err() {
            break;
        }
    }
    let draining = draining || told.stopping;
    Offer { worker: id, org, name, labels, slots: told.slots, images: told.images, draining }
}

/// Wakes those who follow a log here that is written elsewhere.
async fn audience(app: Arc<App>) {
    let Logs::Chunks(chunks) = &*app.logs else { return };
    let mut known: HashMap<AttemptRef, u64> = HashMap::new();
    loop {
        app.env.sleep_until(app.env.now().mono + AUDIENCE_MS).await;
        let jobs = app.wake.listened();
        if jobs.is_empty() {
            known.clear();
            continue;
        }
        // A follower looks by itself every poll floor.
        let Ok(ends) = chunks.ends(&jobs).await else { continue };
        let now: HashMap<AttemptRef, u64> = ends.into_iter().collect();
        for (at, end) in &now {
            if known.get(at).is_some_and(|before| before < end) || !known.contains_key(at) && *end > 0 {
                app.wake.logged(at.job);
            }
        }
        known = now;
    }
}

/// Counts as lost what workers held that were not heard by anybody. Every orchestrator does it: the write itself looks again.
async fn reap(app: Arc<App>, shared: Shared, contact: Arc<Contact>) {
    let limits = &app.limits;
    let lasts = || contact.young_ms(app.env.now().mono, limits) == 0;
    loop {
        app.env.sleep_until(app.env.now().mono + limits.heartbeat_ms).await;
        // That the database is away is said by the beat.
        if let Ok(workers @ 1..) = shared.not_ahead(STEP_MS).await {
            warn!(workers, "the database's clock went back: workers that were heard before count as heard now");
        }
        if !lasts() {
            continue;
        }
        match shared.silent(2 * limits.heartbeat_ms, limits.expiry_ms, 2 * limits.expiry_ms).await {
            Ok(silent) => {
                // The step of a clock shows here before the next beat, or in one that came meanwhile.
                let agrees = |one: &Silent| contact.agrees(app.env.now().mono, one.now);
                if !silent.iter().all(agrees) || !lasts() {
                    continue;
                }
                for Silent { worker, since, .. } in silent {
                    warn!(worker.id = %worker, "worker {worker} was not heard for too long; its attempts are lost");
                    app.desk.tell(Request::Unseen(worker, since)).await;
                }
            }
            Err(error) => warn!(%error, "which workers are silent cannot be read"),
        }
    }
}

/// Moves log rows into objects: each orchestrator those of its own logs, and one of them now and then what others left. That one
/// also removes what is old.
async fn duties(app: Arc<App>, shared: Shared) {
    let Logs::Chunks(chunks) = &*app.logs else { return };
    let mut mine: Option<Duties> = None;
    let mut collector = Collector::default();
    let mut look_due = app.env.now().mono;
    loop {
        app.env.sleep_until(app.env.now().mono + app.limits.heartbeat_ms).await;
        if let Err(error) = chunks.compact_own().await {
            warn!(%error, "log bytes stay in the database for now");
        }
        let held = match &mut mine {
            Some(duties) => duties.still_held().await,
            None => false,
        };
        if !held {
            mine = shared.duties().await.ok().flatten();
        }
        if mine.is_none() {
            continue;
        }
        if app.env.now().mono >= look_due {
            match chunks.compact().await {
                Ok(0) => look_due = app.env.now().mono + app.keep.every_ms / 6,
                Ok(_) => {}
                Err(error) => {
                    warn!(%error, "log bytes of others stay in the database for now");
                    look_due = app.env.now().mono + app.keep.every_ms / 60;
                }
            }
        }
        collector.turn(&app).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_that_was_away_and_a_process_that_stood_still_both_begin_anew() {
        let contact = Contact::default();
        let lasts = |now| contact.lasts_ms(Mono(now), 100);
        assert_eq!(lasts(0), 0);
        let beat = |now| contact.is(Some(clocks(now, now)), Mono(now), 100);
        for now in [0, 90, 190] {
            beat(now);
        }
        assert_eq!((lasts(200), lasts(290), lasts(291)), (200, 290, 0), "it stands still since 190");
        beat(500);
        assert_eq!(lasts(550), 50);
        contact.is(None, Mono(560), 100);
        beat(570);
        assert_eq!(lasts(600), 30);
    }

    #[test]
    fn a_worker_elsewhere_that_nobody_could_write_of_counts_until_everybody_had_time_to_write() {
        let limits = Limits::default();
        let (expiry_ms, grace_ms) = (limits.expiry_ms, limits.startup_grace_ms);
        let one = |silent_ms, lives, left| Elsewhere {
            worker: WorkerId::from_raw(1),
            org: alloy_shared::id::DEFAULT_ORG,
            name: String::new(),
            labels: Labels::default(),
            host_labels: Labels::default(),
            draining: false,
            left,
            offer: String::new(),
            silent_ms,
            lives,
        };
        for (silent_ms, lives, left, counted, kept) in [
            (expiry_ms, true, false, true, true),
            (expiry_ms + 1, true, false, false, true),
            (expiry_ms + 1, false, false, true, true),
            (2 * expiry_ms + 1, false, false, false, true),
            (0, true, true, false, false),
        ] {
            let both = [false, true].map(|kept| counts(&one(silent_ms, lives, left), kept, expiry_ms));
            assert_eq!(both, [counted, kept], "{silent_ms} ms, lives: {lives}, left: {left}");
        }
        let contact = Contact::default();
        assert_eq!(contact.young_ms(Mono(7), &limits), grace_ms, "nothing was written yet");
        for now in (0..=grace_ms).step_by(1_000) {
            contact.is(Some(clocks(now, now)), Mono(now), limits.suspect_ms());
        }
        assert_eq!([1, 0].map(|before| contact.young_ms(Mono(grace_ms - before), &limits)), [1, 0]);
        contact.is(None, Mono(grace_ms + 1), limits.suspect_ms());
        assert_eq!(contact.young_ms(Mono(grace_ms + 1), &limits), grace_ms);
    }

    fn clocks(here: u64, there: u64) -> Clocks {
        Clocks { here: Mono(here), there: Ms(there as i64) }
    }

    #[test]
    fn a_clock_that_goes_ahead_makes_nobody_silent() {
        let contact = Contact::default();
        let lasts = |now| contact.lasts_ms(Mono(now), 10_000);
        // When it is asked, when it answers, and what time it is there; whether it stepped, and how long all has been well.
        for (asked, answered, there, stepped, well_ms) in [
            (0, 10, 1_000_000, false, 0),
            (5_000, 5_010, 1_005_010, false, 5_000),
            (10_000, 10_010, 1_014_000, false, 10_000),
            (15_000, 15_010, 1_135_000, true, 0),
            (20_000, 20_010, 1_140_000, false, 5_000),
            // Back, and an answer that took its time.
            (25_000, 25_010, 1_000_000, false, 10_000),
            (30_000, 34_000, 1_009_000, false, 18_990),
        ] {
            assert_eq!(contact.is(Some(clocks(asked, there)), Mono(answered), 10_000), stepped, "at {asked}");
            assert_eq!(lasts(answered), well_ms, "at {asked}");
        }
        let agrees = |now, there| contact.agrees(Mono(now), Ms(there));
        assert!(agrees(35_000, 1_014_000) && agrees(35_000, 0) && agrees(35_000, 1_019_000));
        assert!(!agrees(35_000, 1_019_001), "the step shows before the next beat");
        contact.is(None, Mono(36_000), 10_000);
        assert!(!agrees(36_000, 1_015_000), "nobody knows");
    }
}
