//! P: what goes, in the model.

use std::collections::BTreeSet;

use alloy_shared::env::Ms;
use alloy_shared::id::{AttemptRef, Digest, JobId};

use super::{Tables, attempts_of};
use crate::blobs::{log_object, root_of};
use crate::job::Step;
use crate::store::tidy::{BlobCursor, Ended, Fade, Fading, Tidy, TrashCursor, TrashRow};
use crate::store::{Attempt, Blob, BlobKind, Job, Miss};

/// When a job ended.
fn end_of(job: &Job) -> Option<Ms> {
    match &job.state.step {
        Step::Done { at, .. } => Some(*at),
        Step::Queued { .. } | Step::Assigned { .. } | Step::Running { .. } | Step::Canceling { .. } => None,
    }
}

fn is_open(attempt: &Attempt, open_before: Ms) -> bool {
    attempt.log_len.is_none() && attempt.assigned_at >= open_before
}

impl Tables {
    pub(super) fn tidy(&mut self, write: &Tidy) -> Result<i64, Miss> {
        match write {
            Tidy::Adopt { kind, at, most } => {
                let unknown = self.blobs.values_mut().filter(|blob| blob.kind == *kind && blob.used_at == Ms(0));
                let mut adopted = 0;
                for blob in unknown.take(*most as usize) {
                    blob.used_at = *at;
                    adopted += 1;
                }
                Ok(adopted)
            }
            Tidy::Use { org, kind, digests, at } => {
                let place = |digest: &Digest| (*digest, *kind, *org);
                if !digests.iter().all(|digest| self.blobs.contains_key(&place(digest))) {
                    return Err(Miss::Stale);
                }
                for digest in digests {
                    self.blobs.entry(place(digest)).and_modify(|blob| blob.used_at = blob.used_at.max(*at));
                }
                Ok(0)
            }
            Tidy::DropBlobs { blobs, unused_since, at } => Ok(self.drop_blobs(blobs, *unused_since, *at)),
            Tidy::DropLog(fade) => {
                self.fades(fade, |attempt| attempt.log_gone_at)?.log_gone_at = Some(fade.at);
                self.throw(&log_object(&fade.attempt), fade.at);
                Ok(0)
            }
            Tidy::DropFiles(fade) => {
                self.fades(fade, |attempt| attempt.files_gone_at)?.files_gone_at = Some(fade.at);
                self.artifacts.retain(|(at, _), _| *at != fade.attempt);
                Ok(0)
            }
            Tidy::Prune { job, ended_before, open_before, at } => self.prune(job, *ended_before, *open_before, *at),
            Tidy::Trash { objects, at } => {
                objects.iter().for_each(|object| self.throw(object, *at));
                Ok(0)
            }
            Tidy::TakeTrash { object, before, at } => Ok(self.take_trash(object, *before, *at)),
            Tidy::Burnt { object, at } => {
                if let Some(row) = self.trash.get_mut(object).filter(|row| row.taken_at.is_some()) {
                    (row.gone, row.at) = (true, *at);
                }
                Ok(0)
            }
            Tidy::Forget { before } => {
                self.trash.retain(|_, row| !row.gone || row.at >= *before);
                Ok(0)
            }
            Tidy::SetRetention(row) => {
                self.retention.insert(row.org, *row);
                Ok(0)
            }
        }
    }

    /// Takes the objects of new blobs out of the trash.
    pub(super) fn keep_objects(&mut self, blobs: &[Blob]) -> Result<(), Miss> {
        let objects: BTreeSet<&str> = blobs.iter().map(|blob| blob.place.object()).collect();
        let taken = |object: &&str| self.trash.get(*object).is_some_and(|row| row.taken_at.is_some());
        if objects.iter().any(taken) {
            return Err(Miss::Stale);
        }
        for object in objects {
            self.trash.remove(object);
        }
        Ok(())
    }

    fn holds_blobs(&self, object: &str) -> bool {
        self.blobs.values().any(|blob| blob.place.object() == object)
    }

    fn throw(&mut self, object: &str, at: Ms) {
        if self.holds_blobs(object) {
            return;
        }
        let fresh = || TrashRow {
            object: object.to_owned(),
            root: root_of(object).to_owned(),
            at,
            taken_at: None,
            gone: false,
        };
        let row = self.trash.entry(object.to_owned()).or_insert_with(fresh);
        if row.gone {
            (row.gone, row.at) = (false, at);
        }
    }

    fn take_trash(&mut self, object: &str, before: Ms, at: Ms) -> i64 {
        let named = self.holds_blobs(object);
        let Some(row) = self.trash.get_mut(object) else { return 0 };
        if named {
            if row.taken_at.is_none() {
                self.trash.remove(object);
            }
            return 0;
        }
        if row.gone || row.at >= before {
            return 0;
        }
        row.taken_at = Some(at);
        1
    }

    fn is_referred_to(&self, blob: &Blob) -> bool {
        match blob.kind {
            BlobKind::Chunk => false,
            BlobKind::Artifact => {
                self.artifacts.values().any(|file| file.sha256 == blob.digest && file.org == blob.org)
            }
            BlobKind::Manifest => {
                let names = |job: &Job| job.source == Some(blob.digest) && job.org == blob.org;
                self.jobs.values().any(|job| names(job) && end_of(job).is_none())
            }
        }
    }

    fn drop_blobs(&mut self, blobs: &[Blob], unused_since: Ms, at: Ms) -> i64 {
        let (mut dropped, mut objects) = (0, BTreeSet::new());
        for blob in blobs {
            let id = (blob.digest, blob.kind, blob.org);
            let Some(known) = self.blobs.get(&id) else { continue };
            let unused = known.used_at < unused_since && known.used_at > Ms(0);
            if unused && !self.is_referred_to(known) {
                self.blobs.remove(&id);
                objects.insert(blob.place.object());
                dropped += 1;
            }
        }
        objects.into_iter().for_each(|object| self.throw(object, at));
        dropped
    }

    fn fades(&mut self, fade: &Fade, gone: impl Fn(&Attempt) -> Option<Ms>) -> Result<&mut Attempt, Miss> {
        let over = self.jobs.get(&fade.attempt.job).is_some_and(|job| end_of(job).is_some());
        let may = |attempt: &&mut Attempt| {
            over && gone(attempt).is_none()
                && attempt.ended_at.is_some_and(|at| at < fade.ended_before)
                && !is_open(attempt, fade.open_before)
        };
        self.attempts.get_mut(&fade.attempt).filter(may).ok_or(Miss::Stale)
    }

    fn prune(&mut self, id: &JobId, ended_before: Ms, open_before: Ms, at: Ms) -> Result<i64, Miss> {
        let ended = self.jobs.get(id).and_then(end_of).is_some_and(|at| at < ended_before);
        let attempts: Vec<Attempt> = self.attempts.range(attempts_of(id)).map(|(_, attempt)| attempt.clone()).collect();
        if !ended || attempts.iter().any(|attempt| is_open(attempt, open_before)) {
            return Err(Miss::Stale);
        }
        for attempt in attempts {
            if attempt.log_gone_at.is_none() {
                let object = log_object(&attempt.at);
                let (root, taken_at, gone) = (object.clone(), None, false);
                self.trash.entry(object.clone()).or_insert(TrashRow { object, root, at, taken_at, gone });
            }
            self.attempts.remove(&attempt.at);
        }
        self.artifacts.retain(|(attempt, _), _| attempt.job != *id);
        self.events.retain(|(job, _), _| job != id);
        self.keys.retain(|_, (job, _)| job != id);
        self.jobs.remove(id);
        Ok(0)
    }

    // --- reads -------------------------------------------------------------------------------------------------------

    pub(super) fn ended(&self, before: Ms, after: Option<(Ms, JobId)>, limit: u32) -> Vec<Ended> {
        let ended = self.jobs.values().filter_map(|job| Some(Ended { job: job.id, org: job.org, at: end_of(job)? }));
        let behind = |ended: &Ended| match after {
            None => ended.at >= Ms(0),
            Some(after) => (ended.at, ended.job) > after,
        };
        let mut found: Vec<Ended> = ended.filter(|ended| ended.at < before && behind(ended)).collect();
        found.sort_by_key(|ended| (ended.at, ended.job));
        found.truncate(limit as usize);
        found
    }

    pub(super) fn fading(&self, before: Ms, after: Option<(Ms, AttemptRef)>, limit: u32) -> Vec<Fading> {
        let fading = |attempt: &Attempt| {
            let (log, files) = (attempt.log_gone_at.is_none(), attempt.files_gone_at.is_none());
            let left = Fading { attempt: attempt.at, org: attempt.org, ended_at: attempt.ended_at?, log, files };
            (left.log || left.files).then_some(left)
        };
        let behind = |left: &Fading| match after {
            None => left.ended_at >= Ms(0),
            Some(after) => (left.ended_at, left.attempt) > after,
        };
        let all = self.attempts.values().filter_map(fading);
        let mut found: Vec<Fading> = all.filter(|left| left.ended_at < before && behind(left)).collect();
        found.sort_by_key(|left| (left.ended_at, left.attempt));
        found.truncate(limit as usize);
        found
    }

    pub(super) fn unused(&self, kind: BlobKind, before: Ms, after: Option<BlobCursor>, limit: u32) -> Vec<Blob> {
        let place = |blob: &Blob| (blob.used_at, blob.digest, blob.org);
        let behind = |blob: &&Blob| match after {
            None => blob.used_at > Ms(0),
            Some(after) => place(blob) > after,
        };
        let of_kind = self.blobs.values().filter(|blob| blob.kind == kind && blob.used_at < before);
        let mut found: Vec<Blob> = of_kind.filter(behind).cloned().collect();
        found.sort_by_key(place);
        found.truncate(limit as usize);
        found
    }

    pub(super) fn trash(&self, before: Ms, after: Option<TrashCursor>, limit: u32) -> Vec<TrashRow> {
        let is_later = |row: &TrashRow| after.as_ref().is_none_or(|(at, object)| (row.at, &row.object) > (*at, object));
        let waits = self.trash.values().filter(|row| !row.gone && row.at < before && is_later(row));
        let mut found: Vec<TrashRow> = waits.cloned().collect();
        found.sort_by(|a, b| (a.at, &a.object).cmp(&(b.at, &b.object)));
        found.truncate(limit as usize);
        found
    }

    pub(super) fn trashed(&self, root: &str) -> Vec<TrashRow> {
        let mut found: Vec<TrashRow> = self.trash.values().filter(|row| row.root == root).cloned().collect();
        found.sort_by(|a, b| (a.at, &a.object).cmp(&(b.at, &b.object)));
        found
    }

    pub(super) fn named(&self, objects: &[String]) -> Vec<String> {
        let waits = |object: &str| self.trash.get(object).is_some_and(|row| !row.gone);
        let known = objects.iter().filter(|object| self.holds_blobs(object) || waits(object));
        known.cloned().collect::<BTreeSet<_>>().into_iter().collect()
    }
}
