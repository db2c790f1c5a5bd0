//! What a farm removes: nothing too early, and nothing that somebody refers to.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use alloy_shared::env::Ms;
use alloy_shared::id::{AttemptRef, Digest, JobId, OrgId};
use alloy_shared::wire::source::Manifest;
use bytes::Bytes;
use futures_util::FutureExt as _;
use orchestrator::blobs::{self, BlobKey};
use orchestrator::keep::Keep;
use orchestrator::store::mem::MemStore;
use orchestrator::store::{Artifact, BlobKind, Job, Place, Scope, Store as _};

use super::exec::BEGIN;

/// By so much the orchestrator's clock may be wrong, twice: when something was noted and when it is looked at.
const CLOCK_MS: u64 = 2 * 30_000;
pub struct KeptCheck {
    pub keep: Keep,
    store: Arc<MemStore>,
    blobs: blobs::Mem,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// When each job ended, by the world's clock.
    over: BTreeMap<JobId, u64>,
    /// Since when the orchestrator stood still last, and until when.
    still: (u64, u64),
    frozen: Option<u64>,
    /// Artifacts that an attempt lists.
    listed: BTreeMap<(AttemptRef, String), Artifact>,
}

impl KeptCheck {
    pub fn new(keep: Keep, store: Arc<MemStore>, blobs: blobs::Mem) -> Self {
        Self { keep, store, blobs, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The orchestrator stands still from now on.
    pub fn freezes(&self, now: u64) {
        self.state().frozen = Some(now);
    }

    /// It goes on, if it stood still. Times that follow soon upon each other are one.
    pub fn thaws(&self, now: u64) {
        let mut state = self.state();
        let Some(from) = state.frozen.take() else { return };
        let (first, last) = state.still;
        state.still = (if from <= last + CLOCK_MS { first } else { from }, now);
    }

    /// When something ended, of which the books say it was at `at`, and which is committed now. An orchestrator that stands still
    /// dates an end before and commits it after that.
    pub fn dated(&self, at: Ms, now: u64) -> u64 {
        let (from, to) = self.state().still;
        let first = if now <= to + CLOCK_MS { from } else { now };
        at.since(BEGIN).clamp(first, now)
    }

    pub fn over(&self, job: JobId, ended: u64) {
        self.state().over.insert(job, ended);
    }

    pub fn listed(&self, artifact: &Artifact) {
        self.state().listed.insert((artifact.at, artifact.path.clone()), artifact.clone());
    }

    /// An attempt lists no artifacts any more.
    pub fn unlisted(&self, at: &AttemptRef) {
        self.state().listed.retain(|(listed, _), _| listed != at);
    }

    /// Whether a job may go, or something of an attempt that ended then.
    pub fn may_go(&self, job: &JobId, ended: Option<u64>, span_ms: u64, now: u64) -> Result<(), String> {
        let over = self.state().over.get(job).copied().ok_or_else(|| format!("{job} has not ended"))?;
        let age = now - ended.unwrap_or(over);
        match span_ms > 0 && age + CLOCK_MS >= span_ms {
            true => Ok(()),
            false => Err(format!("{job}: {age} ms after its end, and it is kept for {span_ms} ms")),
        }
    }

    /// The bytes of the object that a blob lies in, and where they are.
    fn bytes(&self, org: OrgId, kind: BlobKind, digest: &Digest) -> Option<(Place, Bytes)> {
        let row = self.store.blobs(&Scope::org(org), kind, &[*digest]).now_or_never()?.ok()?.pop()?;
        let bytes = self.blobs.object(&BlobKey::parse(row.place.object())?)?;
        Some((row.place, bytes))
    }

    /// The bytes of something that lies alone.
    pub fn alone(&self, org: OrgId, kind: BlobKind, digest: &Digest) -> Option<Bytes> {
        self.bytes(org, kind, digest).map(|(_, bytes)| bytes)
    }

    /// All that these jobs need is there, and every artifact that is listed.
    pub fn all_there(&self, live: &[Job]) -> Result<(), String> {
        for job in live {
            let Some(source) = job.source else { continue };
            self.source(job.org, &source).map_err(|why| format!("{} needs {source}: {why}", job.id))?;
        }
        let listed: Vec<Artifact> = self.state().listed.values().cloned().collect();
        for artifact in listed {
            let bytes = self.alone(artifact.org, BlobKind::Artifact, &artifact.sha256);
            if bytes.is_none_or(|bytes| bytes.len() as u64 != artifact.size) {
                return Err(format!("{} of {} is listed and not there", artifact.path, artifact.at));
            }
        }
        Ok(())
    }

    fn source(&self, org: OrgId, digest: &Digest) -> Result<(), String> {
        let text = self.alone(org, BlobKind::Manifest, digest).ok_or("its manifest is gone")?;
        let needed = Manifest::decode(&text).map_err(|error| error.to_string())?.blobs();
        for chunk in needed {
            let (place, bytes) =
                self.bytes(org, BlobKind::Chunk, &chunk).ok_or_else(|| format!("its chunk {chunk} is gone"))?;
            if let Place::Packed { frame_at, stored, .. } = place
                && (bytes.len() as u64) < frame_at + u64::from(stored)
            {
                return Err(format!("the pack of its chunk {chunk} has {} bytes", bytes.len()));
            }
        }
        Ok(())
    }

    /// What is left of a farm that nobody has used for long enough.
    pub fn left(&self) -> Vec<String> {
        let jobs = self.store.jobs(&Scope::farm(), &Default::default(), u32::MAX).now_or_never();
        let jobs = jobs.and_then(Result::ok).unwrap_or_default().into_iter().map(|job| job.id.to_string());
        jobs.chain(self.blobs.keys().iter().map(ToString::to_string)).collect()
    }
}

#[cfg(test)]
mod tests {
    use alloy_shared::mem_disk::MemDisk;

    use super::*;

    #[test]
    fn an_end_is_dated_before_its_commit_only_if_the_orchestrator_stood_still_between() {
        let disk = Arc::new(MemDisk::default());
        let kept = KeptCheck::new(Keep::default(), Arc::default(), blobs::Mem::on(disk));
        let said = |ms: i64| Ms(BEGIN.0 + ms);
        assert_eq!(kept.dated(said(400_000), 480_000), 480_000, "nothing kept it from its commit");
        for (from, to) in [(410_000, 450_000), (455_000, 470_000)] {
            kept.freezes(from);
            kept.thaws(to);
        }
        kept.thaws(475_000);
        assert_eq!(kept.dated(said(420_000), 480_000), 420_000);
        assert_eq!(kept.dated(said(100_000), 480_000), 410_000, "not before it stood still");
        assert_eq!(kept.dated(said(500_000), 480_000), 480_000, "a clock is ahead");
        assert_eq!(kept.dated(said(600_000), 630_000), 630_000, "that is long ago");
    }
}
