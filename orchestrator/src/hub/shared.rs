//! P: the hub of one of several orchestrators: what it writes of its workers, and what it knows of the others'.

use std::collections::BTreeSet;
use std::sync::Arc;

use alloy_shared::env::Mono;
use alloy_shared::id::WorkerId;
use alloy_shared::wire::image::Inventory;
use alloy_shared::wire::session::SlotView;
use serde::{Deserialize, Serialize};

use super::{Hub, LiveWorker, Mail};
use crate::store::sql::shared::{Heard, Own};

/// What a worker has to offer, as orchestrators tell each other.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
pub struct Told {
    #[serde(default)]
    pub slots: Vec<SlotView>,
    #[serde(default)]
    pub images: Arc<Inventory>,
    #[serde(default)]
    pub stopping: bool,
    #[serde(default)]
    pub trouble: Option<String>,
}

impl Hub {
    /// The workers with a session here, and of their offers those that the books do not have.
    pub fn heard(&self, now: Mono) -> Vec<Heard> {
        let state = self.state();
        let mut heard = Vec::new();
        for (worker, entry) in state.workers.iter().filter(|(_, entry)| entry.session.is_some()) {
            let told = Told {
                slots: entry.slots.clone(),
                images: Arc::clone(&entry.images),
                stopping: entry.stopping,
                trouble: entry.trouble.clone(),
            };
            let offer = serde_json::to_string(&told).unwrap_or_else(|_| unreachable!("an offer is plain data"));
            heard.push(Heard {
                worker: *worker,
                epoch: entry.epoch,
                age_ms: now.since(entry.seen),
                offer: (offer != entry.told).then_some(offer),
            });
        }
        heard
    }

    /// The books know now what was heard at `at`, of those whose newest session is here.
    pub fn wrote(&self, heard: Vec<Heard>, own: &BTreeSet<WorkerId>, at: Mono) {
        let mut state = self.state();
        for one in heard.into_iter().filter(|one| own.contains(&one.worker)) {
            if let Some(entry) = state.workers.get_mut(&one.worker).filter(|entry| entry.epoch == one.epoch) {
                entry.written = entry.written.max(Some(at - one.age_ms));
                entry.told = one.offer.unwrap_or(std::mem::take(&mut entry.told));
            }
        }
    }

    /// The books knew of the worker when its session was opened.
    pub fn opened_at(&self, worker: WorkerId, epoch: i64, at: Mono) {
        if let Some(entry) = self.state().workers.get_mut(&worker).filter(|entry| entry.epoch == epoch) {
            entry.written = entry.written.max(Some(at));
        }
    }

    /// Whether a heartbeat may be answered: the books must have heard of the worker not long ago, because whoever looks at them
    /// counts its leases from there.
    pub fn may_answer(&self, worker: WorkerId, now: Mono) -> bool {
        let written = self.state().workers.get(&worker).and_then(|entry| entry.written);
        written.is_none_or(|written| now.since(written) <= self.limits.expiry_ms)
    }

    /// Workers with a session here.
    pub fn present(&self) -> Vec<WorkerId> {
        let state = self.state();
        state.workers.iter().filter(|(_, entry)| entry.session.is_some()).map(|(worker, _)| *worker).collect()
    }

    /// What the books say of workers with sessions here: one that has gone elsewhere is let go.
    pub fn compare(&self, own: &[Own]) {
        for one in own {
            let mut state = self.state();
            let Some(entry) = state.workers.get_mut(&one.worker) else { continue };
            if entry.epoch < one.epoch {
                if let Some(session) = entry.session.take() {
                    let another = entry.boot.is_some_and(|boot| !one.boot.is_empty() && boot.to_string() != one.boot);
                    if another {
                        // A full mailbox belongs to a session that is about to be cut anyway.
                        let _ = session.mailbox.try_send(Mail::Superseded);
                    }
                }
                continue;
            }
            drop(state);
            if one.revoked {
                self.revoke(one.worker);
            } else {
                self.set_drain(one.worker, one.draining);
            }
        }
    }

    /// All workers that are with other orchestrators.
    pub fn set_elsewhere(&self, workers: Vec<(WorkerId, LiveWorker)>, now: Mono) {
        let mut state = self.state();
        state.elsewhere = workers.into_iter().map(|(worker, live)| (worker, (live, now))).collect();
    }
}
