//! P: the hub of one of several orchestrators: what it writes of its workers, and what it knows of the others'.

use std::collections::BTreeSet;
use std::sync::Arc;

use alloy_shared::env::Mono;
use alloy_shared::id::WorkerId;
use alloy_shared::wire::image::Inventory;
use alloy_shared::wire::session::SlotView;
use serde::{Deserialize, Serialize};

use super::{Entry, Hub, LiveWorker, Mail};
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
    /// The workers with a session here, and of their offers those that the books do not have. Also those whose session is over
    /// and of which the books do not know how lately they were heard: what they were answered last may have kept them going.
    pub fn heard(&self, now: Mono) -> Vec<Heard> {
        let state = self.state();
        let mut heard = Vec::new();
        let owed = |entry: &Entry| entry.written.is_some_and(|written| written < entry.seen);
        for (worker, entry) in state.workers.iter().filter(|(_, entry)| entry.session.is_some() || owed(entry)) {
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
                offer: (offer != entry.told && entry.session.is_some()).then_some(offer),
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

#[cfg(test)]
mod tests {
    use alloy_shared::id::BootId;
    use alloy_shared::limits::Limits;

    use super::*;

    const WORKER: WorkerId = WorkerId::from_raw(1);

    fn boot(n: u128) -> BootId {
        BootId::from_raw(n)
    }

    fn own(epoch: i64, of: u128) -> Own {
        Own { worker: WORKER, epoch, boot: boot(of).to_string(), draining: false, revoked: false }
    }

    fn hub() -> (Hub, tokio::sync::mpsc::Receiver<Mail>, u64) {
        let limits = Limits::default();
        let hub = Hub::new(limits.clone(), Mono(0));
        let letters = hub.open(WORKER, 5, Some(boot(1)), Mono(0));
        (hub, letters, limits.expiry_ms)
    }

    #[test]
    fn a_heartbeat_is_answered_while_the_books_heard_of_the_worker_lately() {
        let (hub, _letters, expiry_ms) = hub();
        assert!(hub.may_answer(WORKER, Mono(10 * expiry_ms)), "the one orchestrator of a farm keeps no such books");
        hub.opened_at(WORKER, 4, Mono(100));
        assert!(hub.may_answer(WORKER, Mono(10 * expiry_ms)), "that was another session");
        hub.opened_at(WORKER, 5, Mono(0));
        assert!(hub.may_answer(WORKER, Mono(expiry_ms)) && !hub.may_answer(WORKER, Mono(expiry_ms + 1)));
        hub.seen(WORKER, Mono(expiry_ms));
        let heard = hub.heard(Mono(expiry_ms + 50));
        assert_eq!((heard[0].age_ms, heard[0].epoch), (50, 5));
        hub.wrote(heard.clone(), &BTreeSet::new(), Mono(expiry_ms + 50));
        assert!(!hub.may_answer(WORKER, Mono(expiry_ms + 50)), "its newest session is elsewhere");
        hub.wrote(heard, &BTreeSet::from([WORKER]), Mono(expiry_ms + 50));
        assert!(hub.may_answer(WORKER, Mono(2 * expiry_ms)) && !hub.may_answer(WORKER, Mono(2 * expiry_ms + 1)));
    }

    #[test]
    fn how_lately_a_worker_was_heard_is_written_also_when_its_session_is_over() {
        let (hub, _letters, _) = hub();
        hub.opened_at(WORKER, 5, Mono(0));
        hub.seen(WORKER, Mono(40));
        hub.close(WORKER, 5, false);
        let heard = hub.heard(Mono(60));
        assert_eq!(heard, [Heard { worker: WORKER, epoch: 5, age_ms: 20, offer: None }]);
        hub.wrote(heard, &BTreeSet::from([WORKER]), Mono(60));
        assert_eq!(hub.heard(Mono(70)), []);
    }

    #[test]
    fn an_offer_is_written_when_it_changed() {
        let (hub, _letters, _) = hub();
        let first = hub.heard(Mono(1));
        assert!(first[0].offer.is_some());
        hub.wrote(first, &BTreeSet::from([WORKER]), Mono(1));
        assert_eq!(hub.heard(Mono(2))[0].offer, None);
    }

    #[test]
    fn a_worker_that_went_elsewhere_is_let_go_and_another_process_is_told_why() {
        for (of, told) in [(1, false), (2, true)] {
            let (hub, mut letters, _) = hub();
            hub.compare(&[own(5, 1)]);
            assert_eq!(hub.present(), [WORKER]);
            hub.compare(&[own(6, of)]);
            assert_eq!(hub.present(), []);
            let mut heard = std::iter::from_fn(|| letters.try_recv().ok());
            assert_eq!(heard.any(|mail| matches!(mail, Mail::Superseded)), told);
            assert!(letters.is_closed());
        }
    }

    #[test]
    fn what_people_decided_at_another_one_reaches_the_session_here() {
        let (hub, mut letters, _) = hub();
        hub.compare(&[Own { draining: true, ..own(5, 1) }]);
        assert!(matches!(letters.try_recv(), Ok(Mail::Drain { on: true })) && letters.is_empty());
        hub.compare(&[Own { revoked: true, ..own(5, 1) }]);
        assert!(matches!(letters.try_recv(), Ok(Mail::Revoked)));
    }

    #[test]
    fn a_worker_elsewhere_is_seen_until_it_comes_here() {
        let (hub, away) = (Hub::new(Limits::default(), Mono(0)), WorkerId::from_raw(2));
        let live = LiveWorker {
            silent_ms: 70,
            connected: true,
            left: false,
            slots: Vec::new(),
            images: Arc::default(),
            stopping: false,
            trouble: None,
        };
        hub.set_elsewhere(vec![(away, live)], Mono(1_000));
        let view = hub.view(&away, Mono(1_500)).unwrap();
        assert_eq!((view.silent_ms, view.connected), (570, true));
        let _letters = hub.open(away, 1, None, Mono(2_000));
        assert_eq!(hub.view(&away, Mono(2_001)).unwrap().silent_ms, 1);
        hub.close(away, 1, false);
        hub.set_elsewhere(Vec::new(), Mono(3_000));
        assert!(!hub.view(&away, Mono(3_000)).unwrap().connected);
    }
}
