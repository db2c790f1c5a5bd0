//! P: the store as a model: what the SQL must agree with, and what the simulator runs on. Ordered maps only, so that the
//! same writes give the same answers on every run.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use alloy_shared::env::Ms;
use alloy_shared::id::{AttemptRef, Digest, JobId, OrgId, TokenId, UserId, WorkerId};
use alloy_shared::secret::TokenKind;
use async_trait::async_trait;

use super::tidy::{BlobCursor, Ended, Fading, RetentionRow, TrashCursor, TrashRow};
use super::write::{Advance, CloseAttempt, Enrol, IdempotencyKey, InsertJob, OpenSession};
use super::{
    Artifact, Attempt, Blob, BlobKind, Committed, Group, Guard, ImageRow, Job, JobEventRow, JobFilter, MemberRow, Miss,
    Scope, Store, StoreError, TokenRow, Worker, Write,
};

mod tidy;

#[derive(Debug, Default)]
pub struct MemStore(Mutex<Tables>);

#[derive(Debug, Default, Clone)]
struct Tables {
    jobs: BTreeMap<JobId, Job>,
    attempts: BTreeMap<AttemptRef, Attempt>,
    /// With the job's organisation.
    events: BTreeMap<(JobId, u64), (OrgId, JobEventRow)>,
    artifacts: BTreeMap<(AttemptRef, String), Artifact>,
    keys: BTreeMap<(OrgId, String, String), (JobId, Digest)>,
    workers: BTreeMap<WorkerId, Worker>,
    tokens: BTreeMap<TokenId, TokenRow>,
    members: BTreeMap<(UserId, OrgId), MemberRow>,
    blobs: BTreeMap<(Digest, BlobKind, OrgId), Blob>,
    images: BTreeMap<(OrgId, String), ImageRow>,
    meta: BTreeMap<String, String>,
    trash: BTreeMap<String, TrashRow>,
    retention: BTreeMap<OrgId, RetentionRow>,
}

impl Tables {
    /// All of it or nothing of it.
    fn group(&mut self, group: &Group) -> Result<Vec<i64>, Miss> {
        // One write checks everything before it changes anything; only several need a way back.
        let before = (group.0.len() > 1).then(|| self.clone());
        let done = group.0.iter().map(|write| self.write(write)).collect();
        if let (Err(_), Some(before)) = (&done, before) {
            *self = before;
        }
        done
    }

    fn write(&mut self, write: &Write) -> Result<i64, Miss> {
        match write {
            Write::InsertJob(insert) => self.insert_job(insert),
            Write::Advance(advance) => self.advance(advance),
            Write::CloseAttempt(close) => self.close_attempt(close),
            Write::Enrol(enrol) => self.enrol(enrol),
            Write::OpenSession(open) => self.open_session(open),
            Write::SetWorker(set) => {
                let own = self.workers.get_mut(&set.worker).filter(|worker| worker.org == set.org);
                let worker = own.ok_or(Miss::Stale)?;
                worker.draining = set.draining;
                worker.drain_note = set.note.clone();
                Ok(0)
            }
            Write::RevokeWorker { org, worker } => {
                let own = self.workers.get_mut(worker).filter(|worker| worker.org == *org);
                own.ok_or(Miss::Stale)?.revoked = true;
                Ok(0)
            }
            Write::Seen { worker, at, left } => {
                let worker = self.workers.get_mut(worker).ok_or(Miss::Stale)?;
                worker.seen_at = worker.seen_at.max(Some(*at));
                if *left {
                    worker.boot.clear();
                }
                Ok(0)
            }
            Write::AddToken(token) => {
                if self.tokens.contains_key(&token.id) || self.tokens.values().any(|known| known.hash == token.hash) {
                    return Err(Miss::Stale);
                }
                self.tokens.insert(token.id, token.clone());
                Ok(0)
            }
            Write::RevokeToken { org, id, at } => {
                let token = self.tokens.get_mut(id).filter(|token| token.org == *org).ok_or(Miss::Stale)?;
                token.revoked_at = token.revoked_at.or(Some(*at));
                Ok(0)
            }
            Write::SetMember(row) => {
                let known = self.members.entry((row.user, row.org)).or_insert_with(|| row.clone());
                known.role = row.role;
                known.email = row.email.clone().or(known.email.take());
                Ok(0)
            }
            Write::DropMember { org, user } => self.members.remove(&(*user, *org)).map(|_| 0).ok_or(Miss::Stale),
            Write::SetImage(row) => {
                let place = (row.org, row.name.clone());
                if self.images.get(&place).is_some_and(|known| known.generation > row.generation) {
                    return Err(Miss::Stale);
                }
                self.images.insert(place, row.clone());
                Ok(0)
            }
            Write::DropImage { org, name } => self.images.remove(&(*org, name.clone())).map(|_| 0).ok_or(Miss::Stale),
            Write::Tidy(write) => self.tidy(write),
            Write::AddBlobs(blobs) => {
                self.keep_objects(blobs)?;
                for blob in blobs {
                    self.blobs.entry((blob.digest, blob.kind, blob.org)).or_insert_with(|| blob.clone());
                }
                Ok(0)
            }
            Write::AddMeta { name, value } => {
                self.meta.entry((*name).to_owned()).or_insert_with(|| value.clone());
                Ok(0)
            }
        }
    }

    fn insert_job(&mut self, insert: &InsertJob) -> Result<i64, Miss> {
        let job = &insert.job;
        let key = insert
            .key
            .as_ref()
            .map(|IdempotencyKey { org, caller, key, body }| ((*org, caller.clone(), key.clone()), (job.id, *body)));
        if let Some((name, _)) = &key
            && let Some((job, body)) = self.keys.get(name)
        {
            return Err(Miss::Exists { job: *job, body: *body });
        }
        if self.jobs.contains_key(&job.id) {
            return Err(Miss::Stale);
        }
        self.check_events(&insert.events)?;
        self.keys.extend(key);
        self.jobs.insert(job.id, job.clone());
        self.books(job, &insert.attempt, &insert.events);
        Ok(job.version)
    }

    fn advance(&mut self, advance: &Advance) -> Result<i64, Miss> {
        let next = &advance.next;
        let job = self.jobs.get(&next.id).filter(|job| job.version == next.version - 1).ok_or(Miss::Stale)?;
        if !self.holds(job, advance.guard) {
            return Err(Miss::Stale);
        }
        self.check_events(&advance.events)?;
        for file in &advance.artifacts {
            let new = advance.attempt.as_ref().is_some_and(|attempt| attempt.at == file.at);
            if !new && !self.attempts.contains_key(&file.at) {
                return Err(Miss::Corrupt(format!("{} has no attempt {}", file.path, file.at)));
            }
        }
        // What was asked stays as it was; only where the job is moves.
        let moved = Job { version: next.version, state: next.state.clone(), events: next.events, ..job.clone() };
        self.jobs.insert(next.id, moved);
        self.books(next, &advance.attempt, &advance.events);
        for file in &advance.artifacts {
            self.artifacts.entry((file.at, file.path.clone())).or_insert_with(|| file.clone());
        }
        Ok(next.version)
    }

    fn holds(&self, job: &Job, guard: Guard) -> bool {
        let leased_to = job.state.lease().map(|lease| lease.worker);
        match guard {
            Guard::Version => true,
            Guard::Silent { worker, unseen_since } => {
                let seen = self.workers.get(&worker).and_then(|worker| worker.seen_at);
                leased_to == Some(worker) && unseen_since.is_none_or(|since| seen.is_none_or(|seen| seen < since))
            }
            Guard::Fence { attempt, worker, epoch } => {
                leased_to == Some(worker)
                    && job.state.tries.made == attempt
                    && self.workers.get(&worker).is_some_and(|worker| worker.epoch == epoch)
            }
        }
    }

    fn check_events(&self, events: &[JobEventRow]) -> Result<(), Miss> {
        for (at, event) in events.iter().enumerate() {
            let twice = events[..at].iter().any(|other| (other.job, other.seq) == (event.job, event.seq));
            if twice || self.events.contains_key(&(event.job, event.seq)) {
                return Err(Miss::Corrupt(format!("{} has an event {} already", event.job, event.seq)));
            }
        }
        Ok(())
    }

    fn books(&mut self, job: &Job, attempt: &Option<Attempt>, events: &[JobEventRow]) {
        if let Some(new) = attempt {
            let old = self.attempts.get(&new.at);
            // A close may have been heard before the report that it follows: its two numbers stay.
            let mut kept = Attempt { log_len: new.log_len.or(old.and_then(|old| old.log_len)), ..new.clone() };
            (kept.log_gone_at, kept.files_gone_at) =
                old.map_or((None, None), |old| (old.log_gone_at, old.files_gone_at));
            kept.timings.teardown_ms = new.timings.teardown_ms.or(old.and_then(|old| old.timings.teardown_ms));
            if let Some(old) = old {
                (kept.org, kept.worker, kept.assigned_at) = (old.org, old.worker, old.assigned_at);
            }
            self.attempts.insert(kept.at, kept);
        }
        self.events.extend(events.iter().map(|event| ((event.job, event.seq), (job.org, event.clone()))));
    }

    fn close_attempt(&mut self, close: &CloseAttempt) -> Result<i64, Miss> {
        let own = self.attempts.get_mut(&close.at).filter(|attempt| attempt.worker == close.worker);
        let attempt = own.ok_or(Miss::Stale)?;
        attempt.timings.teardown_ms = Some(close.teardown_ms);
        attempt.log_len = Some(close.log_len);
        Ok(0)
    }

    fn enrol(&mut self, enrol: &Enrol) -> Result<i64, Miss> {
        let worker = &enrol.worker;
        let usable = |token: &&mut TokenRow| {
            token.hash == enrol.token
                && token.org == worker.org
                && token.kind == TokenKind::Join
                && token.used_by.is_none()
                && token.revoked_at.is_none()
                && token.expires_at.is_none_or(|at| at > enrol.at)
        };
        let token = self.tokens.values_mut().find(usable).ok_or(Miss::Stale)?;
        let known = |other: &Worker| other.id == worker.id || other.public_key == worker.public_key;
        if self.workers.values().any(known) {
            return Err(Miss::Corrupt(format!("{} or its key is enrolled already", worker.id)));
        }
        token.used_by = Some(worker.id);
        self.workers.insert(worker.id, worker.clone());
        Ok(0)
    }

    fn open_session(&mut self, open: &OpenSession) -> Result<i64, Miss> {
        let worker = self.workers.get_mut(&open.worker).filter(|worker| !worker.revoked).ok_or(Miss::Stale)?;
        worker.epoch += 1;
        worker.boot = open.boot.clone();
        worker.host_labels = open.labels.clone();
        worker.version = open.version.clone();
        worker.seen_at = Some(open.at);
        Ok(worker.epoch)
    }
}

impl MemStore {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        // Nothing panics while it holds the lock, so what is in there is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All attempts of a job.
fn attempts_of(job: &JobId) -> std::ops::RangeInclusive<AttemptRef> {
    AttemptRef { job: *job, attempt: 0 }..=AttemptRef { job: *job, attempt: u32::MAX }
}

#[async_trait]
impl Store for MemStore {
    async fn commit(&self, groups: &[Group]) -> Result<Committed, StoreError> {
        let mut tables = self.tables();
        Ok(Committed { groups: groups.iter().map(|group| tables.group(group)).collect() })
    }

    async fn job(&self, scope: &Scope, id: &JobId) -> Result<Option<Job>, StoreError> {
        Ok(self.tables().jobs.get(id).filter(|job| scope.sees(job.org)).cloned())
    }

    async fn keyed(&self, org: &OrgId, caller: &str, key: &str) -> Result<Option<(JobId, Digest)>, StoreError> {
        Ok(self.tables().keys.get(&(*org, caller.to_owned(), key.to_owned())).copied())
    }

    async fn jobs_ending(&self, scope: &Scope, suffix: &str) -> Result<Vec<JobId>, StoreError> {
        if JobId::turn_of(suffix).is_none() {
            return Ok(Vec::new());
        }
        let tables = self.tables();
        let seen = tables.jobs.values().filter(|job| scope.sees(job.org)).map(|job| job.id);
        Ok(seen.filter(|id| id.to_string().ends_with(suffix)).take(2).collect())
    }

    async fn jobs(&self, scope: &Scope, filter: &JobFilter, limit: u32) -> Result<Vec<Job>, StoreError> {
        let wanted = |job: &&Job| {
            scope.sees(job.org)
                && filter.before.is_none_or(|before| job.id < before)
                && filter.created_by.as_ref().is_none_or(|by| *by == job.created_by)
                && (filter.states.is_empty() || filter.states.contains(&job.state.word()))
        };
        Ok(self.tables().jobs.values().rev().filter(wanted).take(limit as usize).cloned().collect())
    }

    async fn live(&self, after: Option<JobId>, limit: u32) -> Result<Vec<Job>, StoreError> {
        let wanted = |job: &&Job| !job.state.is_done() && after.is_none_or(|after| job.id > after);
        Ok(self.tables().jobs.values().filter(wanted).take(limit as usize).cloned().collect())
    }

    async fn held(&self, worker: &WorkerId) -> Result<Vec<Job>, StoreError> {
        let held = |job: &&Job| job.state.lease().is_some_and(|lease| lease.worker == *worker);
        Ok(self.tables().jobs.values().filter(held).cloned().collect())
    }

    async fn attempts(&self, scope: &Scope, job: &JobId) -> Result<Vec<Attempt>, StoreError> {
        let tables = self.tables();
        let all = tables.attempts.range(attempts_of(job)).map(|(_, attempt)| attempt);
        Ok(all.filter(|attempt| scope.sees(attempt.org)).cloned().collect())
    }

    async fn attempt(&self, scope: &Scope, at: &AttemptRef) -> Result<Option<Attempt>, StoreError> {
        Ok(self.tables().attempts.get(at).filter(|attempt| scope.sees(attempt.org)).cloned())
    }

    async fn events(&self, scope: &Scope, job: &JobId, after: u64, limit: u32) -> Result<Vec<JobEventRow>, StoreError> {
        let tables = self.tables();
        let all = tables.events.range((*job, 0)..=(*job, u64::MAX)).map(|(_, row)| row);
        let seen = all.filter(|(org, event)| scope.sees(*org) && event.seq > after).map(|(_, event)| event);
        Ok(seen.take(limit as usize).cloned().collect())
    }

    async fn artifacts(&self, scope: &Scope, job: &JobId) -> Result<Vec<Artifact>, StoreError> {
        let tables = self.tables();
        let from = (AttemptRef { job: *job, attempt: 0 }, String::new());
        let all = tables.artifacts.range(from..).map(|(_, file)| file);
        Ok(all.take_while(|file| file.at.job == *job).filter(|file| scope.sees(file.org)).cloned().collect())
    }

    async fn artifact(&self, scope: &Scope, at: &AttemptRef, path: &str) -> Result<Option<Artifact>, StoreError> {
        let found = self.tables().artifacts.get(&(*at, path.to_owned())).cloned();
        Ok(found.filter(|file| scope.sees(file.org)))
    }

    async fn worker(&self, scope: &Scope, id: &WorkerId) -> Result<Option<Worker>, StoreError> {
        Ok(self.tables().workers.get(id).filter(|worker| scope.sees(worker.org)).cloned())
    }

    async fn worker_by_key(&self, public_key: &[u8; 32]) -> Result<Option<Worker>, StoreError> {
        Ok(self.tables().workers.values().find(|worker| worker.public_key == *public_key).cloned())
    }

    async fn workers(&self, scope: &Scope) -> Result<Vec<Worker>, StoreError> {
        let tables = self.tables();
        let mut seen: Vec<Worker> = tables.workers.values().filter(|worker| scope.sees(worker.org)).cloned().collect();
        seen.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
        Ok(seen)
    }

    async fn blobs(&self, scope: &Scope, kind: BlobKind, digests: &[Digest]) -> Result<Vec<Blob>, StoreError> {
        let tables = self.tables();
        let asked: std::collections::BTreeSet<&Digest> = digests.iter().collect();
        let rows = asked.into_iter().flat_map(|digest| {
            let (from, to) = (OrgId::from_raw(0), OrgId::from_raw(u128::MAX));
            tables.blobs.range((*digest, kind, from)..=(*digest, kind, to))
        });
        Ok(rows.map(|(_, blob)| blob).filter(|blob| scope.sees(blob.org)).cloned().collect())
    }

    async fn token(&self, hash: &Digest) -> Result<Option<TokenRow>, StoreError> {
        Ok(self.tables().tokens.values().find(|token| token.hash == *hash).cloned())
    }

    async fn tokens(&self, scope: &Scope) -> Result<Vec<TokenRow>, StoreError> {
        let tables = self.tables();
        let shown = tables.tokens.values().filter(|token| scope.sees(token.org) && token.kind != TokenKind::Join);
        let mut shown: Vec<TokenRow> = shown.cloned().collect();
        shown.sort_by_key(|token| std::cmp::Reverse((token.created_at, token.id)));
        Ok(shown)
    }

    async fn memberships(&self, user: &UserId) -> Result<Vec<MemberRow>, StoreError> {
        let (from, to) = (OrgId::from_raw(0), OrgId::from_raw(u128::MAX));
        let tables = self.tables();
        let mut own: Vec<MemberRow> =
            tables.members.range((*user, from)..=(*user, to)).map(|(_, row)| row.clone()).collect();
        own.sort_by_key(|row| (row.created_at, row.org));
        Ok(own)
    }

    async fn members(&self, scope: &Scope) -> Result<Vec<MemberRow>, StoreError> {
        let tables = self.tables();
        let mut seen: Vec<MemberRow> = tables.members.values().filter(|row| scope.sees(row.org)).cloned().collect();
        seen.sort_by_key(|row| (row.created_at, row.user, row.org));
        Ok(seen)
    }

    async fn images(&self, scope: &Scope) -> Result<Vec<ImageRow>, StoreError> {
        let tables = self.tables();
        let mut seen: Vec<ImageRow> = tables.images.values().filter(|row| scope.sees(row.org)).cloned().collect();
        seen.sort_by(|a, b| (&a.name, a.org).cmp(&(&b.name, b.org)));
        Ok(seen)
    }

    async fn meta(&self, name: &str) -> Result<Option<String>, StoreError> {
        Ok(self.tables().meta.get(name).cloned())
    }

    async fn ended(&self, before: Ms, after: Option<(Ms, JobId)>, limit: u32) -> Result<Vec<Ended>, StoreError> {
        Ok(self.tables().ended(before, after, limit))
    }

    async fn fading(&self, before: Ms, after: Option<(Ms, AttemptRef)>, limit: u32) -> Result<Vec<Fading>, StoreError> {
        Ok(self.tables().fading(before, after, limit))
    }

    async fn unused(
        &self,
        kind: BlobKind,
        before: Ms,
        after: Option<BlobCursor>,
        limit: u32,
    ) -> Result<Vec<Blob>, StoreError> {
        Ok(self.tables().unused(kind, before, after, limit))
    }

    async fn trash(&self, before: Ms, after: Option<TrashCursor>, limit: u32) -> Result<Vec<TrashRow>, StoreError> {
        Ok(self.tables().trash(before, after, limit))
    }

    async fn trashed(&self, root: &str) -> Result<Vec<TrashRow>, StoreError> {
        Ok(self.tables().trashed(root))
    }

    async fn named(&self, objects: &[String]) -> Result<Vec<String>, StoreError> {
        Ok(self.tables().named(objects))
    }

    async fn retention(&self, scope: &Scope) -> Result<Vec<RetentionRow>, StoreError> {
        Ok(self.tables().retention.values().filter(|row| scope.sees(row.org)).copied().collect())
    }
}
