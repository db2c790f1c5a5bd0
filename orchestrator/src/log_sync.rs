//! P: makes log bytes durable, one round for all attempts, the next round started when the last one ends. An
//! acknowledgement to a worker follows the round that covers it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use alloy_shared::env::Env;
use alloy_shared::id::{AttemptRef, WorkerId};
use tokio::sync::{mpsc, oneshot};
use tracing::error;

use crate::hub::Hub;
use crate::logs::Logs;
use crate::wake::Wake;

/// Results that may wait for one round.
const WAITING: usize = 1_024;
/// After a round that failed the next one begins by itself.
const AGAIN_MS: u64 = 1_000;

#[derive(Clone)]
pub struct LogSync {
    tx: mpsc::Sender<Option<oneshot::Sender<bool>>>,
    writers: Arc<Mutex<BTreeMap<AttemptRef, WorkerId>>>,
}

impl LogSync {
    pub fn spawn(logs: Arc<Logs>, hub: Arc<Hub>, wake: Arc<Wake>, env: &Arc<dyn Env>) -> Self {
        let (tx, rx) = mpsc::channel(WAITING);
        let writers = Arc::new(Mutex::new(BTreeMap::new()));
        env.spawn("log_sync", Box::pin(run(logs, hub, wake, env.clone(), rx, writers.clone())));
        Self { tx, writers }
    }

    /// Bytes of this attempt were appended; its worker wants to know when they are durable.
    pub fn dirty(&self, attempt: AttemptRef, worker: WorkerId) {
        self.writers.lock().unwrap_or_else(PoisonError::into_inner).insert(attempt, worker);
        // A full queue means that a round is coming anyway.
        let _ = self.tx.try_send(None);
    }

    /// Returns true when everything that was appended before this call is durable.
    pub async fn flush(&self) -> bool {
        let (done, wait) = oneshot::channel();
        if self.tx.send(Some(done)).await.is_err() {
            return false;
        }
        wait.await.unwrap_or(false)
    }
}

async fn run(
    logs: Arc<Logs>,
    hub: Arc<Hub>,
    wake: Arc<Wake>,
    env: Arc<dyn Env>,
    mut rx: mpsc::Receiver<Option<oneshot::Sender<bool>>>,
    writers: Arc<Mutex<BTreeMap<AttemptRef, WorkerId>>>,
) {
    let mut again = false;
    while let Some(first) = next(&mut rx, &*env, again).await {
        let mut waiting: Vec<oneshot::Sender<bool>> = first.into_iter().collect();
        while let Ok(next) = rx.try_recv() {
            waiting.extend(next);
        }
        let whose = std::mem::take(&mut *writers.lock().unwrap_or_else(PoisonError::into_inner));
        let done = match logs.sync().await {
            Ok(_) => {
                if logs.shows_what_is_durable() {
                    whose.keys().for_each(|attempt| wake.logged(attempt.job));
                }
                let untold = tell(&logs, &hub, whose).await;
                again = !untold.is_empty();
                writers.lock().unwrap_or_else(PoisonError::into_inner).extend(untold);
                true
            }
            Err(error) => {
                // Not acknowledged: the worker keeps the bytes, and hears of them when they are.
                error!(%error, "log bytes could not be made durable");
                writers.lock().unwrap_or_else(PoisonError::into_inner).extend(whose);
                again = true;
                false
            }
        };
        for wait in waiting {
            let _ = wait.send(done);
        }
    }
}

/// The next round: when somebody asks for one. After one that failed, or told not all, it waits, and then begins by itself.
async fn next(
    rx: &mut mpsc::Receiver<Option<oneshot::Sender<bool>>>,
    env: &dyn Env,
    again: bool,
) -> Option<Option<oneshot::Sender<bool>>> {
    if again && !rx.is_closed() {
        env.sleep_until(env.now().mono + AGAIN_MS).await;
        return Some(None);
    }
    rx.recv().await
}

/// A worker that sent bytes which were durable before is told too: it waits for that to forget them. Returns whom nothing could
/// be told: one whose window is full sends nothing that would ask for another round.
async fn tell(logs: &Logs, hub: &Hub, whose: BTreeMap<AttemptRef, WorkerId>) -> BTreeMap<AttemptRef, WorkerId> {
    let mut untold = BTreeMap::new();
    for (attempt, worker) in whose {
        match logs.durable(&attempt).await {
            Ok(len) => hub.durable(worker, attempt, len),
            Err(error) => {
                error!(%attempt, %error, "how much of the log is durable cannot be read");
                untold.insert(attempt, worker);
            }
        }
    }
    untold
}

#[cfg(test)]
mod tests {
    use alloy_shared::env::Mono;
    use alloy_shared::id::{BootId, JobId};
    use alloy_shared::limits::Limits;

    use super::*;
    use crate::broken::Care;
    use crate::hub::Mail;
    use crate::tests::TestEnv;

    #[tokio::test]
    async fn a_worker_hears_what_is_durable_although_it_could_not_be_read_at_first() {
        let dir = tempfile::tempdir().unwrap();
        let (attempt, worker) = (AttemptRef { job: JobId::from_raw(7), attempt: 1 }, WorkerId::from_raw(1));
        let in_the_way = dir.path().join(attempt.job.to_string());
        std::fs::write(&in_the_way, "").unwrap();
        let logs = Arc::new(Logs::open(dir.path().to_owned(), Care::default()).unwrap());
        let (clock, hub) = (TestEnv::new(), Arc::new(Hub::new(Limits::default(), Mono(0))));
        let mut letters = hub.open(worker, 1, Some(BootId::from_raw(1)), Mono(0));
        let env: Arc<dyn Env> = clock.clone();
        let sync = LogSync::spawn(logs, hub, Arc::new(Wake::default()), &env);
        sync.dirty(attempt, worker);
        assert!(sync.flush().await && letters.is_empty());

        std::fs::remove_file(&in_the_way).unwrap();
        // Its window is full: it sends nothing, and nobody asks for a round.
        while letters.is_empty() {
            clock.advance(AGAIN_MS);
            tokio::task::yield_now().await;
        }
        assert!(matches!(letters.try_recv(), Ok(Mail::Durable { len: 0, .. })));
    }
}
