//! P: one of several orchestrators of a farm. It says that it and its workers live, hears what the others changed, and counts
//! workers as lost that none of them has heard. Truth is in the database; a note only says that it is worth a look.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use alloy_shared::env::Mono;
use alloy_shared::id::{AttemptRef, Labels};
use alloy_shared::limits;
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::App;
use crate::desk::{Offer, Request};
use crate::gc::Collector;
use crate::hub::{LiveWorker, Told};
use crate::logs::Logs;
use crate::store::StoreError;
use crate::store::sql::Shared;
use crate::store::sql::shared::{Changed, Duties, Ear, Elsewhere};

/// Between two notes: what happens meanwhile is told by one.
const QUIET_MS: u64 = 20;
/// Between two looks at logs that are followed here and written elsewhere.
const AUDIENCE_MS: u64 = 200;
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
}

impl Contact {
    fn is(&self, there: bool, now: Mono, break_ms: u64) {
        let mut unbroken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let first = unbroken.as_ref().filter(|one| now.since(one.last) <= break_ms).map_or(now, |one| one.first);
        *unbroken = there.then_some(Unbroken { first, last: now });
    }

    fn lasts_ms(&self, now: Mono, break_ms: u64) -> u64 {
        let unbroken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        unbroken.as_ref().filter(|one| now.since(one.last) <= break_ms).map_or(0, |one| now.since(one.first))
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
    env.spawn("others", Box::pin(others(app.clone(), shared.clone())));
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
        contact.is(done.is_ok(), app.env.now().mono, app.limits.suspect_ms());
        match done {
            Ok(own) => app.hub.wrote(heard, &BTreeSet::from_iter(own), at),
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
    let mut ear = None;
    loop {
        if let Err(error) = learn(&app, &shared, &mut since).await {
            warn!(%error, "what other orchestrators changed cannot be read");
        }
        let until = app.env.now().mono + app.limits.poll_floor_ms;
        tokio::select! {
            biased;
            () = hear(&shared, &mut ear) => {}
            () = app.env.sleep_until(until) => {}
        }
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
    let mut from = Changed { at: since.clone(), ..Changed::default() };
    loop {
        let (jobs, last) = shared.changed(&from, PAGE).await?;
        let whole = jobs.len() < PAGE as usize;
        if !jobs.is_empty() {
            app.desk.tell(Request::Loaded(jobs)).await;
        }
        match last.filter(|_| !whole) {
            Some(last) => from = last,
            None => break,
        }
    }
    *since = next;
    Ok(())
}

/// Compares the books with the sessions here, and reads who is elsewhere.
async fn others(app: Arc<App>, shared: Shared) {
    let mut wishes = None;
    loop {
        if let Err(error) = compare(&app, &shared, &mut wishes).await {
            warn!(%error, "what the farm's other workers do cannot be read");
        }
        app.env.sleep_until(app.env.now().mono + app.limits.poll_floor_ms).await;
    }
}

async fn compare(app: &App, shared: &Shared, wishes: &mut Option<String>) -> Result<(), StoreError> {
    app.hub.compare(&shared.own(&app.hub.present()).await?);
    let now_wished = Some(shared.wishes().await?);
    if *wishes != now_wished {
        *wishes = now_wished;
        app.hub.wishes_moved();
    }
    let now = app.env.now().mono;
    let elsewhere = shared.elsewhere(2 * app.limits.heartbeat_ms).await?;
    let (mut offers, mut lives) = (Vec::new(), Vec::new());
    for worker in elsewhere {
        let told: Told = serde_json::from_str(&worker.offer).unwrap_or_default();
        // One whose orchestrator is away comes back: until then nobody may say that there is no such worker.
        let counts = !worker.left && (worker.lives || worker.silent_ms <= app.limits.expiry_ms);
        lives.push((worker.worker, live(&worker, &told)));
        if counts {
            offers.push(offer(worker, told));
        }
    }
    app.hub.set_elsewhere(lives, now);
    app.desk.tell(Request::Elsewhere(offers)).await;
    Ok(())
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
    let Elsewhere { worker: id, name, labels: given, host_labels, draining, .. } = worker;
    let mut labels: Labels = host_labels;
    for (key, value) in given.iter() {
        // Together they may be more than the most, then the rest stays out.
        if labels.insert(key, value).is_err() {
            break;
        }
    }
    let draining = draining || told.stopping;
    Offer { worker: id, name, labels, slots: told.slots, images: told.images, draining }
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
    loop {
        app.env.sleep_until(app.env.now().mono + limits.heartbeat_ms).await;
        // While the database was away nobody could write whom he heard; while this process stood still it heard nobody.
        if contact.lasts_ms(app.env.now().mono, limits.suspect_ms()) < limits.startup_grace_ms {
            continue;
        }
        match shared.silent(2 * limits.heartbeat_ms, limits.expiry_ms, 2 * limits.expiry_ms).await {
            Ok(silent) => {
                for (worker, since) in silent {
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
        for now in [0, 90, 190] {
            contact.is(true, Mono(now), 100);
        }
        assert_eq!((lasts(200), lasts(290), lasts(291)), (200, 290, 0), "it stands still since 190");
        contact.is(true, Mono(500), 100);
        assert_eq!(lasts(550), 50);
        contact.is(false, Mono(560), 100);
        contact.is(true, Mono(570), 100);
        assert_eq!(lasts(600), 30);
    }
}
