//! P: the live sessions of workers: their mailboxes, when each was last heard, what each offers.

mod shared;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use alloy_shared::env::Mono;
use alloy_shared::id::{AttemptRef, BootId, WorkerId};
use alloy_shared::limits::Limits;
use alloy_shared::wire::image::Inventory;
use alloy_shared::wire::session::SlotView;
use tokio::sync::mpsc;

use crate::store::Job;
pub use shared::Told;

/// Letters that wait for one session. A session that does not read them is cut and reconciles anew.
const MAILBOX: usize = 512;

#[derive(Debug)]
pub enum Mail {
    Job(Box<Job>),
    Durable {
        attempt: AttemptRef,
        len: u64,
    },
    Superseded,
    Drain {
        on: bool,
    },
    /// What the farm wishes of images changed.
    Wishes,
    /// The worker does not belong to the farm any more.
    Revoked,
    /// The orchestrator stops: tell the worker to come back.
    Stop,
}

/// A worker as it is at this moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveWorker {
    pub silent_ms: u64,
    pub connected: bool,
    /// It said goodbye.
    pub left: bool,
    pub slots: Vec<SlotView>,
    pub images: Arc<Inventory>,
    /// By its own word.
    pub stopping: bool,
    /// What a person should look after there.
    pub trouble: Option<String>,
}

/// What the farm does not hear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Silence {
    pub ms: u64,
    pub lost_at: Mono,
}

struct Entry {
    seen: Mono,
    /// The newest session's, whether it still lives or not.
    epoch: i64,
    /// The process that opened it. Absent: it was gone when that was done.
    boot: Option<BootId>,
    session: Option<Session>,
    left: bool,
    slots: Vec<SlotView>,
    images: Arc<Inventory>,
    stopping: bool,
    trouble: Option<String>,
    /// Where orchestrators share a farm: up to when the books know that it was heard.
    written: Option<Mono>,
    /// The offer that the books have.
    told: String,
}

struct Session {
    mailbox: mpsc::Sender<Mail>,
}

pub struct Hub {
    state: Mutex<State>,
    limits: Limits,
}

struct State {
    workers: BTreeMap<WorkerId, Entry>,
    /// Workers that are with other orchestrators, as they were at some moment.
    elsewhere: BTreeMap<WorkerId, (LiveWorker, Mono)>,
    /// Nobody counts as silent from before this moment.
    listening_since: Mono,
}

/// True if both are known and differ.
fn are_two(one: Option<BootId>, other: Option<BootId>) -> bool {
    one.zip(other).is_some_and(|(one, other)| one != other)
}

impl Hub {
    pub fn new(limits: Limits, now: Mono) -> Self {
        Self {
            state: Mutex::new(State { workers: BTreeMap::new(), elsewhere: BTreeMap::new(), listening_since: now }),
            limits,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a session. The older of two of the same worker is over: that may be this one, if its opening took so long
    /// that the worker has come back meanwhile. It is told that it is superseded only by another process whose connection
    /// stands (`boot`). One process may have both sessions, and a process that is gone may have begun the later one: then the
    /// older is only cut, and comes back if need be.
    pub fn open(&self, worker: WorkerId, epoch: i64, boot: Option<BootId>, now: Mono) -> mpsc::Receiver<Mail> {
        let (mailbox, letters) = mpsc::channel(MAILBOX);
        let mut state = self.state();
        if let Some(newer) = state.workers.get(&worker).filter(|entry| entry.epoch > epoch) {
            if are_two(newer.boot, boot) {
                // Its mailbox is new and has room.
                let _ = mailbox.try_send(Mail::Superseded);
            }
            return letters;
        }
        let entry = state.workers.entry(worker).or_insert_with(|| Entry {
            seen: now,
            epoch,
            boot,
            session: None,
            left: false,
            slots: Vec::new(),
            images: Arc::default(),
            stopping: false,
            trouble: None,
            written: None,
            told: String::new(),
        });
        entry.seen = now;
        entry.told.clear();
        entry.left = false;
        entry.epoch = epoch;
        let another = are_two(std::mem::replace(&mut entry.boot, boot), boot);
        if let Some(old) = entry.session.replace(Session { mailbox })
            && another
        {
            // A full mailbox belongs to a session that is about to be cut anyway.
            let _ = old.mailbox.try_send(Mail::Superseded);
        }
        letters
    }

    /// Forgets the session, unless a newer one has taken its place. True if it was the newest.
    pub fn close(&self, worker: WorkerId, epoch: i64, left: bool) -> bool {
        let mut state = self.state();
        match state.workers.get_mut(&worker) {
            Some(entry) if entry.epoch == epoch => {
                entry.session = None;
                entry.left = left;
                true
            }
            Some(_) | None => false,
        }
    }

    pub fn seen(&self, worker: WorkerId, now: Mono) {
        if let Some(entry) = self.state().workers.get_mut(&worker) {
            entry.seen = now;
        }
    }

    pub fn offered(
        &self,
        worker: WorkerId,
        slots: &[SlotView],
        images: &Arc<Inventory>,
        stopping: bool,
        trouble: Option<String>,
    ) {
        if let Some(entry) = self.state().workers.get_mut(&worker) {
            entry.slots = slots.to_vec();
            entry.images = Arc::clone(images);
            entry.stopping = stopping;
            entry.trouble = trouble;
        }
    }

    /// A job changed: the worker that has it and the one that had it are told. True if both, as far as there are any, and one
    /// at least, have a session here.
    pub fn moved(&self, job: &Job, left: Option<WorkerId>) -> bool {
        let holder = job.state.lease().map(|lease| lease.worker);
        let concerned: Vec<WorkerId> = holder.into_iter().chain(left.filter(|left| Some(*left) != holder)).collect();
        let told = concerned.iter().filter(|worker| self.post(**worker, Mail::Job(Box::new(job.clone())))).count();
        told > 0 && told == concerned.len()
    }

    pub fn durable(&self, worker: WorkerId, attempt: AttemptRef, len: u64) {
        let _gone = self.post(worker, Mail::Durable { attempt, len });
    }

    pub fn set_drain(&self, worker: WorkerId, on: bool) {
        let _gone = self.post(worker, Mail::Drain { on });
    }

    pub fn revoke(&self, worker: WorkerId) {
        let _gone = self.post(worker, Mail::Revoked);
    }

    /// Tells every session that the wishes for images changed.
    pub fn wishes_moved(&self) {
        self.post_all(|| Mail::Wishes);
    }

    /// Tells every session that the orchestrator stops.
    pub fn stop(&self) {
        self.post_all(|| Mail::Stop);
    }

    fn post_all(&self, mail: impl Fn() -> Mail) {
        let workers: Vec<WorkerId> = self.state().workers.keys().copied().collect();
        for worker in workers {
            self.post(worker, mail());
        }
    }

    /// True if the worker has a session here.
    fn post(&self, worker: WorkerId, mail: Mail) -> bool {
        let mut state = self.state();
        let Some(entry) = state.workers.get_mut(&worker) else { return false };
        let Some(session) = &entry.session else { return false };
        if session.mailbox.try_send(mail).is_err() {
            // Dropping the sender ends the session; the next one starts from the truth.
            entry.session = None;
        }
        true
    }

    pub fn view(&self, worker: &WorkerId, now: Mono) -> Option<LiveWorker> {
        let state = self.state();
        let here = state.workers.get(worker);
        if here.is_none_or(|entry| entry.session.is_none())
            && let Some((live, at)) = state.elsewhere.get(worker)
        {
            return Some(LiveWorker { silent_ms: live.silent_ms + now.since(*at), ..live.clone() });
        }
        here.map(|entry| LiveWorker {
            silent_ms: now.since(entry.seen),
            connected: entry.session.is_some(),
            left: entry.left,
            slots: entry.slots.clone(),
            images: Arc::clone(&entry.images),
            stopping: entry.stopping,
            trouble: entry.trouble.clone(),
        })
    }

    /// True while this process has listened for too short a time to call anybody lost.
    pub fn is_in_grace(&self, now: Mono) -> bool {
        now.since(self.state().listening_since) < self.limits.startup_grace_ms
    }

    /// Of these workers, the ones that were not heard for longer than a lease lasts.
    pub fn silent(&self, workers: impl IntoIterator<Item = WorkerId>, now: Mono) -> Vec<WorkerId> {
        let state = self.state();
        if now.since(state.listening_since) < self.limits.startup_grace_ms {
            return Vec::new();
        }
        let since = |worker: &WorkerId| state.workers.get(worker).map_or(state.listening_since, |entry| entry.seen);
        workers.into_iter().filter(|worker| now.since(since(worker)) > self.limits.expiry_ms).collect()
    }

    /// For how long a worker was not heard, and when what it holds counts as lost if that goes on.
    pub fn silence(&self, worker: &WorkerId, now: Mono) -> Silence {
        let state = self.state();
        let listening = state.listening_since;
        let here = state.workers.get(worker).map(|entry| entry.seen);
        let elsewhere = state.elsewhere.get(worker).map(|(live, at)| *at - live.silent_ms);
        let seen = here.max(elsewhere).map_or(listening, |seen| seen.max(listening));
        let lost_at = (seen + self.limits.expiry_ms).max(listening + self.limits.startup_grace_ms);
        Silence { ms: now.since(seen), lost_at }
    }

    /// This process itself was away: what it did not hear proves nothing.
    pub fn listen_anew(&self, now: Mono) {
        self.state().listening_since = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot(n: u128) -> Option<BootId> {
        Some(BootId::from_raw(n))
    }

    #[test]
    fn nobody_is_silent_before_the_grace_and_after_it_only_who_was_not_heard() {
        let limits = Limits::default();
        let hub = Hub::new(limits.clone(), Mono(0));
        let (a, b) = (WorkerId::from_raw(1), WorkerId::from_raw(2));
        assert!(hub.silent([a, b], Mono(limits.startup_grace_ms - 1)).is_empty());
        let _letters = hub.open(a, 1, boot(1), Mono(limits.startup_grace_ms));
        let later = Mono(limits.expiry_ms + 1);
        assert_eq!(hub.silent([a, b], later), [b]);
        hub.listen_anew(later);
        assert!(hub.silent([a, b], later + 10).is_empty() && hub.is_in_grace(later + 10));
    }

    #[test]
    fn silence_counts_from_when_somebody_listened() {
        let limits = Limits::default();
        let hub = Hub::new(limits.clone(), Mono(0));
        let worker = WorkerId::from_raw(1);
        assert_eq!(hub.silence(&worker, Mono(9)), Silence { ms: 9, lost_at: Mono(limits.startup_grace_ms) });
        let _letters = hub.open(worker, 1, boot(1), Mono(70_000));
        hub.seen(worker, Mono(80_000));
        let lost_at = Mono(80_000 + limits.expiry_ms);
        assert_eq!(hub.silence(&worker, Mono(95_000)), Silence { ms: 15_000, lost_at });
        hub.listen_anew(Mono(200_000));
        assert_eq!(hub.silence(&worker, Mono(200_000)).ms, 0);
    }

    #[test]
    fn the_newest_session_wins() {
        let hub = Hub::new(Limits::default(), Mono(0));
        let worker = WorkerId::from_raw(1);
        let mut old = hub.open(worker, 1, boot(1), Mono(0));
        let mut new = hub.open(worker, 2, boot(2), Mono(1));
        assert!(matches!(old.try_recv(), Ok(Mail::Superseded)));
        hub.set_drain(worker, true);
        assert!(matches!(new.try_recv(), Ok(Mail::Drain { on: true })));
        assert!(!hub.close(worker, 1, true) && !hub.view(&worker, Mono(1)).unwrap().left);
        assert!(hub.close(worker, 2, true) && hub.view(&worker, Mono(1)).unwrap().left);
        let _back = hub.open(worker, 3, boot(2), Mono(2));
        assert!(!hub.view(&worker, Mono(2)).unwrap().left);
    }

    #[test]
    fn a_session_that_was_opened_late_does_not_supersede_the_one_that_followed_it() {
        let hub = Hub::new(Limits::default(), Mono(0));
        let worker = WorkerId::from_raw(1);
        let mut new = hub.open(worker, 2, boot(2), Mono(0));
        let mut late = hub.open(worker, 1, boot(1), Mono(5));
        assert!(matches!(late.try_recv(), Ok(Mail::Superseded)) && late.is_closed());
        hub.set_drain(worker, true);
        assert!(matches!(new.try_recv(), Ok(Mail::Drain { on: true })));
        assert!(!hub.close(worker, 1, false) && hub.view(&worker, Mono(9)).unwrap().connected);
    }

    #[test]
    fn neither_a_session_of_the_same_process_nor_one_of_a_process_that_is_gone_sends_a_worker_away() {
        for (what, first, second) in [
            ("in turn", (1, boot(1)), (2, boot(1))),
            ("late", (2, boot(1)), (1, boot(1))),
            ("gone", (1, boot(1)), (2, None)),
        ] {
            let hub = Hub::new(Limits::default(), Mono(0));
            let worker = WorkerId::from_raw(1);
            let mut letters = [first, second].map(|(epoch, boot)| hub.open(worker, epoch, boot, Mono(0)));
            letters.sort_by_key(|letters| !letters.is_closed());
            let [old, new] = &mut letters;
            assert!(matches!(old.try_recv(), Err(mpsc::error::TryRecvError::Disconnected)), "{what}");
            hub.set_drain(worker, true);
            assert!(matches!(new.try_recv(), Ok(Mail::Drain { on: true })), "{what}");
        }
    }

    #[test]
    fn a_session_that_does_not_read_its_letters_is_cut() {
        let hub = Hub::new(Limits::default(), Mono(0));
        let worker = WorkerId::from_raw(1);
        let mut letters = hub.open(worker, 1, boot(1), Mono(0));
        (0..=MAILBOX).for_each(|_| hub.set_drain(worker, true));
        let mut read = 0;
        while letters.try_recv().is_ok() {
            read += 1;
        }
        assert_eq!(read, MAILBOX);
        assert!(letters.is_closed() || matches!(letters.try_recv(), Err(mpsc::error::TryRecvError::Disconnected)));
    }
}
