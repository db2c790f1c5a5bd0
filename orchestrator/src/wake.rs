//! P: "something about this job moved". Only the fact travels; readers look for themselves, and look again every
//! poll floor even when nothing was said.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use alloy_shared::env::Env;
use alloy_shared::id::JobId;
use tokio::sync::watch;

#[derive(Default)]
pub struct Wake {
    jobs: Mutex<HashMap<JobId, watch::Sender<()>>>,
}

impl Wake {
    /// Subscribes. Do it before you look.
    pub fn job(&self, id: JobId) -> Listener {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        Listener { moved: jobs.entry(id).or_insert_with(|| watch::channel(()).0).subscribe() }
    }

    /// Says that the job has news: an event, log bytes, its end.
    pub fn moved(&self, id: JobId) {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(sender) = jobs.get(&id) else { return };
        if sender.receiver_count() == 0 {
            jobs.remove(&id);
        } else {
            sender.send_replace(());
        }
    }

    /// How many wait for news of this job.
    pub fn audience(&self, id: JobId) -> usize {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.get(&id).map_or(0, watch::Sender::receiver_count)
    }
}

pub struct Listener {
    moved: watch::Receiver<()>,
}

impl Listener {
    /// Returns when something moved since the last return, or when `floor_ms` have passed.
    pub async fn wait(&mut self, env: &dyn Env, floor_ms: u64) {
        let floor = env.now().mono + floor_ms;
        tokio::select! {
            biased;
            _ = self.moved.changed() => {}
            () = env.sleep_until(floor) => {}
        }
    }
}
