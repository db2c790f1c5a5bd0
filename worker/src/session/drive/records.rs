//! P: reports on their way to the disk.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use alloy_shared::env::Env;
use alloy_shared::id::AttemptRef;
use alloy_shared::wire::session::Report;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;

use crate::spool::Spool;

pub(super) struct Recorded {
    pub(super) attempt: AttemptRef,
    pub(super) reports: Vec<(u64, Report)>,
    pub(super) result: io::Result<()>,
}

/// Reports on their way to the disk: in order for one attempt, at the same time for several, one sync for what piled up.
#[derive(Default)]
pub(super) struct Records {
    pub(super) running: FuturesUnordered<BoxFuture<'static, Recorded>>,
    busy: BTreeSet<AttemptRef>,
    pub(super) waiting: BTreeMap<AttemptRef, Vec<(u64, Report)>>,
}

impl Records {
    pub(super) fn push(&mut self, attempt: AttemptRef, seq: u64, report: Report, spool: &Arc<Spool>) {
        self.waiting.entry(attempt).or_default().push((seq, report));
        if !self.busy.contains(&attempt) {
            self.next(attempt, spool);
        }
    }

    pub(super) fn next(&mut self, attempt: AttemptRef, spool: &Arc<Spool>) {
        self.busy.remove(&attempt);
        if let Some(reports) = self.waiting.remove(&attempt) {
            self.busy.insert(attempt);
            self.running.push(Box::pin(record(attempt, reports, spool.clone())));
        }
    }

    /// The same again after a pause: what hindered it may have passed.
    pub(super) fn repeat(
        &mut self,
        attempt: AttemptRef,
        reports: Vec<(u64, Report)>,
        env: Arc<dyn Env>,
        pause_ms: u64,
        spool: &Arc<Spool>,
    ) {
        let spool = spool.clone();
        self.running.push(Box::pin(async move {
            env.sleep_until(env.now().mono + pause_ms).await;
            record(attempt, reports, spool).await
        }));
    }
}

async fn record(attempt: AttemptRef, reports: Vec<(u64, Report)>, spool: Arc<Spool>) -> Recorded {
    let result = spool.record(attempt, &reports).await;
    Recorded { attempt, reports, result }
}
