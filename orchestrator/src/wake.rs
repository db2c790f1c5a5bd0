//! P: "something about this job moved". Only numbers travel; readers look for themselves, and look again every poll floor
//! even when nothing was said.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use alloy_shared::env::Env;
use alloy_shared::id::JobId;
use tokio::sync::watch;

/// How often each kind of news was announced.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Moves {
    events: u64,
    log: u64,
}

type Jobs = Mutex<HashMap<JobId, watch::Sender<Moves>>>;

#[derive(Default)]
pub struct Wake {
    jobs: Arc<Jobs>,
}

impl Wake {
    fn jobs(&self) -> MutexGuard<'_, HashMap<JobId, watch::Sender<Moves>>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Subscribes. Do it before you look.
    pub fn job(&self, id: JobId) -> Listener {
        let mut moves = self.jobs().entry(id).or_insert_with(|| watch::channel(Moves::default()).0).subscribe();
        let seen = *moves.borrow_and_update();
        Listener { jobs: self.jobs.clone(), id, moves, seen }
    }

    /// The job has a new event.
    pub fn moved(&self, id: JobId) {
        self.tell(id, |moves| moves.events += 1);
    }

    /// The job's log grew.
    pub fn logged(&self, id: JobId) {
        self.tell(id, |moves| moves.log += 1);
    }

    fn tell(&self, id: JobId, count: impl FnOnce(&mut Moves)) {
        if let Some(sender) = self.jobs().get(&id) {
            sender.send_modify(count);
        }
    }

    /// The jobs that somebody waits for.
    pub fn listened(&self) -> Vec<JobId> {
        self.jobs().keys().copied().collect()
    }

    /// How many wait for news of this job.
    pub fn audience(&self, id: JobId) -> usize {
        self.jobs().get(&id).map_or(0, watch::Sender::receiver_count)
    }
}

pub struct Listener {
    jobs: Arc<Jobs>,
    id: JobId,
    moves: watch::Receiver<Moves>,
    seen: Moves,
}

impl Listener {
    /// Returns when something moved since the last return, or when `floor_ms` have passed. True: look at the events too.
    pub async fn wait(&mut self, env: &dyn Env, floor_ms: u64) -> bool {
        let floor = env.now().mono + floor_ms;
        tokio::select! {
            biased;
            changed = self.moves.changed() => {
                let moves = *self.moves.borrow_and_update();
                let events = changed.is_err() || moves.events != self.seen.events;
                self.seen = moves;
                events
            }
            () = env.sleep_until(floor) => true,
        }
    }
}

impl Drop for Listener {
    /// The last one to leave takes the job's entry along.
    fn drop(&mut self) {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if jobs.get(&self.id).is_some_and(|sender| sender.receiver_count() <= 1) {
            jobs.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_remembered_who_does_not_listen() {
        let (wake, id) = (Wake::default(), JobId::from_raw(1));
        let (first, second) = (wake.job(id), wake.job(id));
        assert_eq!(wake.audience(id), 2);
        drop(first);
        assert_eq!(wake.audience(id), 1);
        drop(second);
        assert!(wake.jobs().is_empty());
    }
}
