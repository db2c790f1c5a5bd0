//! P: what goes because nobody needs it any more: step by step, each bounded, each safe to repeat and to leave off. Rows go
//! first, by writes that look again; an object goes when nothing has named it for a while.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::sync::Arc;

use alloy_shared::env::{Mono, Ms};
use alloy_shared::id::{AttemptRef, Digest, JobId, OrgId};
use alloy_shared::wire::ErrorCode;
use nix::errno::Errno;
use tracing::{error, info, warn};

use crate::App;
use crate::blobs::{BlobKey, Listed, log_object, log_of};
use crate::keep::Policy;
use crate::ops::OpError;
use crate::ops::upload::Depot;
use crate::store::tidy::{BlobCursor, Tidy, TrashCursor, TrashRow};
use crate::store::{BlobKind, Group, Scope, Write};

/// Rows of one step.
const PAGE: u32 = 256;
/// Statements of one commit. A miss says them all again, each between two more, and a distant database takes its time for
/// every one of them.
const AT_ONCE: usize = 64;
/// Blobs of one write, which are two statements each at most, and objects.
const BUNCH: usize = AT_ONCE / 2;
/// Objects that are deleted in one step.
const OBJECTS: u32 = 64;
/// So many deletions that fail in a row are the store's fault, and not their objects'.
const FAILING: u32 = 4;
/// Between two steps others write.
const PAUSE_MS: u64 = 20;
/// Steps of one turn, where the one who does them has other duties.
const STEPS: u32 = 16;
/// Orchestrators that were not heard for so many graces are forgotten.
const DEAD_GRACES: u64 = 7;
const KINDS: [BlobKind; 3] = [BlobKind::Manifest, BlobKind::Chunk, BlobKind::Artifact];

/// Where a look at everything is.
#[derive(Debug, Default)]
enum Stage {
    /// Rows of a farm that did not know when blobs are used.
    #[default]
    Adopt,
    /// Sources of jobs that have not ended are in use, however long that takes.
    Live(Option<JobId>),
    Jobs(Option<(Ms, JobId)>),
    Attempts(Option<(Ms, AttemptRef)>),
    Blobs(usize, Option<BlobCursor>),
    Trash(Option<TrashCursor>),
    /// Objects that nobody ever registered, or whose way to the trash was cut off.
    Objects(Option<BlobKey>),
}

/// How much went in one look.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Gone {
    pub jobs: u64,
    pub logs: u64,
    pub files: u64,
    pub blobs: u64,
    pub objects: u64,
}

/// One look at everything after the other.
#[derive(Debug, Default)]
pub struct Collector {
    stage: Stage,
    /// When this look began to note what live jobs need. It may have been frozen since.
    noted: Option<Ms>,
    due: Option<Mono>,
    objects_due: Option<Mono>,
    gone: Gone,
    /// Objects that could not be deleted, one after the other.
    failing: u32,
    /// Where a look gave up because of them: the next one begins there.
    gave_up: Option<TrashCursor>,
}

/// Does it for a farm with one orchestrator.
pub async fn run(app: Arc<App>) {
    let mut collector = Collector::default();
    loop {
        collector.turn(&app).await;
        app.env.sleep_until(app.env.now().mono + PAUSE_MS.max(collector.rest_ms(&app))).await;
    }
}

impl Collector {
    fn rest_ms(&self, app: &App) -> u64 {
        self.due.map_or(0, |due| due.since(app.env.now().mono))
    }

    /// Some steps, if it is time for them.
    pub async fn turn(&mut self, app: &Arc<App>) {
        let now = app.env.now().mono;
        // The first look has time: what starts has other things to do.
        let due = *self.due.get_or_insert(now + app.keep.every_ms / 6);
        if now < due {
            return;
        }
        for _ in 0..STEPS {
            match self.step(app).await {
                Ok(true) => {}
                Ok(false) => {
                    self.due = Some(now + app.keep.every_ms);
                    return self.tell();
                }
                Err(error) => {
                    warn!(%error, "what is old stays for now");
                    (self.stage, self.due) = (Stage::default(), Some(now + app.keep.every_ms / 6));
                    return;
                }
            }
        }
    }

    fn tell(&mut self) {
        let Gone { jobs, logs, files, blobs, objects } = std::mem::take(&mut self.gone);
        if jobs + logs + files + blobs + objects > 0 {
            info!("gone: {jobs} jobs, {logs} logs, artifacts of {files} attempts, {blobs} blobs, {objects} objects");
        }
    }

    /// One step. False: the look is over.
    pub async fn step(&mut self, app: &Arc<App>) -> Result<bool, OpError> {
        if matches!(self.stage, Stage::Adopt) && !app.blobs.is_ours().await? {
            error!("the mark of the bucket's owner is gone, or another farm's: nothing is removed there");
            return Ok(false);
        }
        let rows = app.store.retention(&Scope::farm()).await?;
        let now = app.books_time().await?;
        if matches!(self.stage, Stage::Live(None)) {
            self.noted = Some(now);
        }
        let policy = Policy::new(app.keep, &rows, now).noted(self.noted.unwrap_or(now));
        let next = match std::mem::take(&mut self.stage) {
            Stage::Adopt => self.adopt(app, &policy).await?,
            Stage::Live(after) => live(app, &policy, after).await?,
            Stage::Jobs(after) => self.jobs(app, &policy, after).await?,
            Stage::Attempts(after) => self.attempts(app, &policy, after).await?,
            Stage::Blobs(kind, after) => self.blobs(app, &policy, kind, after).await?,
            Stage::Trash(after) => self.trash(app, &policy, after).await?,
            Stage::Objects(after) => {
                let next = self.objects(app, &policy, after).await?;
                self.stage = next.map_or(Stage::Adopt, |last| Stage::Objects(Some(last)));
                return Ok(!matches!(self.stage, Stage::Adopt));
            }
        };
        self.stage = next;
        Ok(true)
    }

    async fn adopt(&mut self, app: &App, policy: &Policy) -> Result<Stage, OpError> {
        if let Some(shared) = &app.shared {
            shared.forget_dead(DEAD_GRACES * app.keep.grace_ms).await?;
        }
        let mut adopted = 0;
        for kind in KINDS {
            let write = Tidy::Adopt { kind, at: policy.now(), most: PAGE };
            adopted += commit(app, vec![write]).await?.into_iter().flatten().sum::<i64>();
        }
        Ok(if adopted > 0 { Stage::Adopt } else { Stage::Live(None) })
    }

    async fn jobs(&mut self, app: &App, policy: &Policy, after: Option<(Ms, JobId)>) -> Result<Stage, OpError> {
        let Some(before) = policy.jobs_before() else { return Ok(Stage::Attempts(None)) };
        let page = app.store.ended(before, after, PAGE).await?;
        let done = commit(app, page.iter().filter_map(|ended| policy.job(ended)).collect()).await?;
        self.gone.jobs += done.iter().flatten().count() as u64;
        Ok(page.last().map_or(Stage::Attempts(None), |last| Stage::Jobs(Some((last.at, last.job)))))
    }

    async fn attempts(
        &mut self,
        app: &App,
        policy: &Policy,
        after: Option<(Ms, AttemptRef)>,
    ) -> Result<Stage, OpError> {
        let Some(before) = policy.attempts_before() else { return Ok(Stage::Blobs(0, None)) };
        let page = app.store.fading(before, after, PAGE).await?;
        let writes: Vec<Tidy> = page.iter().flat_map(|left| policy.attempt(left)).collect();
        let logs: Vec<bool> = writes.iter().map(|write| matches!(write, Tidy::DropLog(_))).collect();
        for (is_log, done) in logs.into_iter().zip(commit(app, writes).await?) {
            let counter = if is_log { &mut self.gone.logs } else { &mut self.gone.files };
            *counter += u64::from(done.is_some());
        }
        Ok(page.last().map_or(Stage::Blobs(0, None), |last| Stage::Attempts(Some((last.ended_at, last.attempt)))))
    }

    async fn blobs(
        &mut self,
        app: &App,
        policy: &Policy,
        index: usize,
        after: Option<BlobCursor>,
    ) -> Result<Stage, OpError> {
        let Some(kind) = KINDS.get(index).copied() else {
            self.failing = 0;
            return Ok(Stage::Trash(self.gave_up.take()));
        };
        let Some(before) = policy.blobs_before(kind) else { return Ok(Stage::Blobs(index + 1, None)) };
        let page = app.store.unused(kind, before, after, PAGE).await?;
        let last = page.last().map(|blob| (blob.used_at, blob.digest, blob.org));
        let mut by_cut: BTreeMap<Ms, Vec<_>> = BTreeMap::new();
        for blob in page {
            if let Some(cut) = policy.blobs(kind, blob.org).filter(|cut| blob.used_at < *cut) {
                by_cut.entry(cut).or_default().push(blob);
            }
        }
        let drop = |unused_since, blobs| Tidy::DropBlobs { blobs, unused_since, at: policy.now() };
        let mut writes = Vec::new();
        for (cut, blobs) in by_cut {
            writes.extend(blobs.chunks(BUNCH).map(|some| drop(cut, some.to_vec())));
        }
        let done = commit(app, writes).await?;
        self.gone.blobs += done.into_iter().flatten().sum::<i64>().unsigned_abs();
        Ok(last.map_or(Stage::Blobs(index + 1, None), |last| Stage::Blobs(index, Some(last))))
    }

    /// An object is taken, deleted, and said to be gone. Whoever comes after a crash does it again. What cannot be deleted is left
    /// to another look.
    async fn trash(&mut self, app: &App, policy: &Policy, after: Option<TrashCursor>) -> Result<Stage, OpError> {
        let page = app.store.trash(policy.trash_before(), after, OBJECTS).await?;
        let Some(last) = page.last().map(|row| (row.at, row.object.clone())) else {
            self.failing = 0;
            commit(app, vec![Tidy::Forget { before: policy.names_before() }]).await?;
            return Ok(Stage::Objects(None));
        };
        for row in page {
            let (object, before, at) = (row.object.clone(), policy.trash_before(), policy.now());
            let taken = commit(app, vec![Tidy::TakeTrash { object, before, at }]).await?;
            if !taken.contains(&Some(1)) {
                continue;
            }
            if let Err(error) = burn(app, &row).await {
                warn!(%error, object = %row.object, "an object that nobody needs cannot be deleted");
                self.failing += 1;
                if self.failing == FAILING {
                    (self.failing, self.gave_up) = (0, Some((row.at, row.object)));
                    return Err(error);
                }
                continue;
            }
            commit(app, vec![Tidy::Burnt { object: row.object, at: policy.now() }]).await?;
            (self.gone.objects, self.failing) = (self.gone.objects + 1, 0);
        }
        Ok(Stage::Trash(Some(last)))
    }

    /// A page of all objects: what nothing names, and is no longer on its way to be named, goes to the trash. Names that no farm
    /// gives are not looked at.
    async fn objects(
        &mut self,
        app: &App,
        policy: &Policy,
        after: Option<BlobKey>,
    ) -> Result<Option<BlobKey>, OpError> {
        let now = app.env.now().mono;
        if after.is_none() && self.objects_due.is_some_and(|due| now < due) {
            return Ok(None);
        }
        let page = app.blobs.list("", after.as_ref()).await?;
        let last = page.last().map(|listed| listed.key.clone());
        let is_old = |listed: &Listed| listed.key.is_made() && listed.modified < policy.trash_before();
        let old = page.into_iter().filter(is_old);
        let (mut objects, mut logs) = (Vec::new(), BTreeSet::new());
        for listed in old {
            match log_of(listed.key.as_str()) {
                Some(at) => {
                    logs.insert(at);
                }
                None => objects.push(listed.key.as_str().to_owned()),
            }
        }
        for at in logs {
            // The parts of a log that is kept belong to it, also those that nothing names yet.
            let known = app.store.attempt(&Scope::farm(), &at).await?;
            if known.is_none_or(|attempt| attempt.log_gone_at.is_some()) {
                objects.push(log_object(&at));
            }
        }
        let named: BTreeSet<String> = app.store.named(&objects).await?.into_iter().collect();
        objects.retain(|object| !named.contains(object));
        let throw = |some: &[String]| Tidy::Trash { objects: some.to_vec(), at: policy.now() };
        commit(app, objects.chunks(BUNCH).map(throw).collect()).await?;
        if last.is_none() {
            self.objects_due = Some(now + app.keep.grace_ms);
        }
        Ok(last)
    }
}

/// Notes that sources of jobs that have not ended are in use, before anything that is not may go.
async fn live(app: &Arc<App>, policy: &Policy, after: Option<JobId>) -> Result<Stage, OpError> {
    let page = app.store.live(after, PAGE).await?;
    let Some(last) = page.last().map(|job| job.id) else { return Ok(Stage::Jobs(None)) };
    let sources: BTreeSet<(OrgId, Digest)> = page.iter().filter_map(|job| Some((job.org, job.source?))).collect();
    for (org, source) in sources {
        let whole = match depot(app, org).freshen(&source, policy.now()).await {
            Ok(whole) => whole,
            // No later look reads it either, and what everybody else keeps must not hang on it.
            Err(error) if is_lost(&error) => {
                warn!(%error, %source, "a source cannot be read");
                false
            }
            Err(error) => return Err(error),
        };
        if !whole {
            let job = page.iter().find(|job| (job.org, job.source) == (org, Some(source))).map(|job| job.id);
            let job = job.unwrap_or(last);
            warn!(%job, %source, "a job that has not ended needs a source that is not whole");
        }
    }
    Ok(Stage::Live(Some(last)))
}

/// The bytes themselves are gone or damaged. All else may pass, and what was not noted because of it must not go.
fn is_lost(error: &OpError) -> bool {
    match error {
        OpError::Io { error, .. } => {
            error.kind() == ErrorKind::InvalidData || error.raw_os_error() == Some(Errno::EIO as i32)
        }
        OpError::Refused { code, .. } => {
            matches!(code, ErrorCode::InvalidSource | ErrorCode::DigestMismatch | ErrorCode::NotFound)
        }
        OpError::Missing(_) | OpError::Store(_) => false,
    }
}

fn depot(app: &App, org: OrgId) -> Depot<'_> {
    Depot { store: &*app.store, blobs: &app.blobs, env: &app.env, fresh_ms: app.keep.grace_ms, org }
}

async fn burn(app: &App, row: &TrashRow) -> Result<(), OpError> {
    match log_of(&row.object) {
        Some(at) => {
            app.logs.remove(&at).await?;
            // Its parts, where it has any.
            let prefix = format!("{}/", row.object);
            loop {
                let page = app.blobs.list(&prefix, None).await?;
                if page.is_empty() {
                    return Ok(());
                }
                for part in page {
                    app.blobs.delete(&part.key).await?;
                }
            }
        }
        None => match BlobKey::parse(&row.object) {
            Some(key) => Ok(app.blobs.delete(&key).await?),
            None => Ok(()),
        },
    }
}

/// Each write by itself; one that misses changes nothing. The number of each that did not.
async fn commit(app: &App, writes: Vec<Tidy>) -> Result<Vec<Option<i64>>, OpError> {
    let mut numbers = Vec::with_capacity(writes.len());
    for some in portions(writes) {
        let done = app.store.commit(&some).await?.groups;
        numbers.extend(done.into_iter().map(|group| group.ok().and_then(|all| all.first().copied())));
    }
    Ok(numbers)
}

/// The writes in their order, in as many commits as their statements need.
fn portions(writes: Vec<Tidy>) -> Vec<Vec<Group>> {
    let (mut portions, mut room) = (Vec::new(), 0);
    for write in writes {
        let statements = statements(&write);
        let group = Group(vec![Write::Tidy(Box::new(write))]);
        match portions.last_mut() {
            Some(last) if statements <= room => Vec::push(last, group),
            Some(_) | None => {
                room = AT_ONCE;
                portions.push(vec![group]);
            }
        }
        room = room.saturating_sub(statements);
    }
    portions
}

/// As how many statements the database gets a write, at most.
fn statements(write: &Tidy) -> usize {
    match write {
        Tidy::DropBlobs { blobs, .. } => 2 * blobs.len(),
        Tidy::Trash { objects, .. } => objects.len(),
        Tidy::Prune { .. } => 6,
        Tidy::DropLog(_) | Tidy::DropFiles(_) | Tidy::TakeTrash { .. } => 2,
        Tidy::Adopt { .. } | Tidy::Use { .. } | Tidy::Burnt { .. } | Tidy::Forget { .. } | Tidy::SetRetention(_) => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_is_small_enough_for_a_distant_database() {
        let job =
            |n: u32| Tidy::Prune { job: JobId::from_raw(n.into()), ended_before: Ms(0), open_before: Ms(0), at: Ms(0) };
        let object = |n: u32| Tidy::TakeTrash { object: n.to_string(), before: Ms(0), at: Ms(0) };
        let objects = |n: u32| Tidy::Trash { objects: vec![n.to_string(); n as usize % (BUNCH + 1)], at: Ms(0) };
        for write in [job as fn(u32) -> Tidy, object, objects] {
            let writes: Vec<Tidy> = (0..PAGE).map(write).collect();
            let portions = portions(writes.clone());
            let of = |group: &Group| match &group.0[..] {
                [Write::Tidy(write)] => (**write).clone(),
                other => panic!("{other:?}"),
            };
            let most = portions.iter().map(|some| some.iter().map(|group| statements(&of(group))).sum::<usize>()).max();
            assert!(most.is_some_and(|most| most <= AT_ONCE), "{most:?}");
            assert!(portions.len() <= writes.len() / 2, "{}", portions.len());
            assert_eq!(portions.iter().flatten().map(of).collect::<Vec<_>>(), writes, "all of them, in their order");
        }
    }
}
