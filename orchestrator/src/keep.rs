//! D: what is kept, and for how long.
//!
//! | What | Goes when |
//! |---|---|
//! | a job with its events, attempts and idempotency key | it ended long enough ago, and the books of all its attempts are closed |
//! | an attempt's log, its artifacts | it ended long enough ago, its job has ended, and its books are closed |
//! | a source | no job that has not ended names it, and nobody relied on it for long enough and a grace more |
//! | a chunk | nobody relied on it for two graces longer than that: all chunks of a source that is there are there |
//! | the bytes of an artifact | no attempt lists it, and nobody relied on it for two graces |
//! | an object, a log's bytes | nothing names it for a grace |
//!
//! Who relies on a blob says so in the books, unless it was said less than a grace ago. That write and the one that drops the
//! blob meet in the blob's row, so that one of them finds the other.

use std::collections::BTreeMap;

use alloy_shared::env::Ms;
use alloy_shared::id::OrgId;

use crate::store::BlobKind;
use crate::store::tidy::{Ended, Fade, Fading, RetentionRow, Tidy};

pub const DAY_MS: u64 = 24 * 60 * 60 * 1_000;
/// Attempts whose books were never closed are waited for so many graces: their worker is gone for good.
const OPEN_GRACES: u64 = 30;
/// The name of what was deleted is not used again for so many graces.
const NAME_GRACES: u64 = 30;

/// How long things are kept, in milliseconds; 0: for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    pub jobs_ms: u64,
    pub artifacts_ms: u64,
    pub logs_ms: u64,
    pub sources_ms: u64,
    /// What nobody refers to any more stays so long. What is relied on again within it is not noted again.
    pub grace_ms: u64,
    /// Between two looks at what may go.
    pub every_ms: u64,
    /// What an organisation's days are, and the unit of all that is above. Shorter only where somebody tests.
    pub day_ms: u64,
}

impl Default for Keep {
    fn default() -> Self {
        Self::of_days([90, 30, 90, 14], DAY_MS)
    }
}

impl Keep {
    /// Of so many days for jobs, artifacts, logs and sources; 0: for ever.
    pub fn of_days([jobs, artifacts, logs, sources]: [u32; 4], day_ms: u64) -> Self {
        let span_ms = |days: u32| u64::from(days) * day_ms;
        Self {
            jobs_ms: span_ms(jobs),
            artifacts_ms: span_ms(artifacts),
            logs_ms: span_ms(logs),
            sources_ms: span_ms(sources),
            grace_ms: day_ms,
            every_ms: day_ms / 24,
            day_ms,
        }
    }

    /// The days again, in the same order.
    pub fn days(&self) -> [u32; 4] {
        let days = |span_ms: u64| u32::try_from(span_ms / self.day_ms.max(1)).unwrap_or(u32::MAX);
        [self.jobs_ms, self.artifacts_ms, self.logs_ms, self.sources_ms].map(days)
    }
}

/// What the farm and its organisations want to be kept, at one moment.
#[derive(Debug, Clone)]
pub struct Policy {
    farm: Keep,
    orgs: BTreeMap<OrgId, Keep>,
    now: Ms,
    /// When it was last noted what live jobs need, before anything was dropped: what goes is told from there.
    noted: Ms,
}

/// The latest time that is longer ago than this.
fn ago(now: Ms, span_ms: u64) -> Ms {
    Ms(now.0.saturating_sub_unsigned(span_ms))
}

impl Policy {
    pub fn new(farm: Keep, rows: &[RetentionRow], now: Ms) -> Self {
        let day_ms = farm.day_ms;
        let or = |days: Option<u32>, farm: u64| days.map_or(farm, |days| u64::from(days) * day_ms);
        let keep = |row: &RetentionRow| Keep {
            jobs_ms: or(row.jobs_days, farm.jobs_ms),
            artifacts_ms: or(row.artifacts_days, farm.artifacts_ms),
            logs_ms: or(row.logs_days, farm.logs_ms),
            sources_ms: or(row.sources_days, farm.sources_ms),
            ..farm
        };
        Self { farm, orgs: rows.iter().map(|row| (row.org, keep(row))).collect(), now, noted: now }
    }

    /// The same for one who noted at this time what is needed, and may have been frozen since.
    pub fn noted(self, at: Ms) -> Self {
        Self { noted: at.min(self.now), ..self }
    }

    pub fn now(&self) -> Ms {
        self.now
    }

    fn of(&self, org: OrgId) -> &Keep {
        self.orgs.get(&org).unwrap_or(&self.farm)
    }

    fn cut(&self, span_ms: u64) -> Option<Ms> {
        (span_ms > 0).then(|| ago(self.now, span_ms))
    }

    /// Before this something may go for somebody. `None`: everything is kept for ever.
    fn first(&self, span: impl Fn(&Keep) -> u64) -> Option<Ms> {
        let all = self.orgs.values().chain([&self.farm]);
        all.filter_map(|keep| self.cut(span(keep))).max()
    }

    pub fn jobs_before(&self) -> Option<Ms> {
        self.first(|keep| keep.jobs_ms)
    }

    pub fn attempts_before(&self) -> Option<Ms> {
        self.first(|keep| keep.logs_ms).max(self.first(|keep| keep.artifacts_ms))
    }

    pub fn blobs_before(&self, kind: BlobKind) -> Option<Ms> {
        let all = self.orgs.values().chain([&self.farm]);
        all.filter_map(|keep| self.unused_since(kind, keep)).max()
    }

    fn open_before(&self) -> Ms {
        ago(self.now, OPEN_GRACES * self.farm.grace_ms)
    }

    /// What to write of a job that has ended.
    pub fn job(&self, ended: &Ended) -> Option<Tidy> {
        let ended_before = self.cut(self.of(ended.org).jobs_ms).filter(|before| ended.at < *before)?;
        Some(Tidy::Prune { job: ended.job, ended_before, open_before: self.open_before(), at: self.now })
    }

    /// What to write of an attempt that has ended.
    pub fn attempt(&self, left: &Fading) -> Vec<Tidy> {
        let keep = self.of(left.org);
        let fade = |there: bool, span_ms: u64| {
            let ended_before = self.cut(span_ms).filter(|before| there && left.ended_at < *before)?;
            Some(Fade { attempt: left.attempt, ended_before, open_before: self.open_before(), at: self.now })
        };
        let log = fade(left.log, keep.logs_ms).map(Tidy::DropLog);
        let files = fade(left.files, keep.artifacts_ms).map(Tidy::DropFiles);
        log.into_iter().chain(files).collect()
    }

    /// Blobs of this kind go that nobody relied on since.
    pub fn blobs(&self, kind: BlobKind, org: OrgId) -> Option<Ms> {
        self.unused_since(kind, self.of(org))
    }

    fn unused_since(&self, kind: BlobKind, keep: &Keep) -> Option<Ms> {
        let grace = self.farm.grace_ms;
        let sources = (keep.sources_ms > 0).then(|| ago(self.noted, keep.sources_ms));
        match kind {
            BlobKind::Manifest => sources.map(|before| ago(before, grace)),
            BlobKind::Chunk => sources.map(|before| ago(before, 3 * grace)),
            BlobKind::Artifact => Some(ago(self.noted, 2 * grace)),
        }
    }

    /// Objects go that wait since.
    pub fn trash_before(&self) -> Ms {
        ago(self.now, self.farm.grace_ms)
    }

    /// Names of deleted objects are forgotten that are older.
    pub fn names_before(&self) -> Ms {
        ago(self.now, NAME_GRACES * self.farm.grace_ms)
    }
}

#[cfg(test)]
mod tests {
    use alloy_shared::id::{AttemptRef, DEFAULT_ORG, JobId};

    use super::*;

    const OTHER: OrgId = OrgId::from_raw(7);
    const NOW: Ms = Ms(1_000 * DAY_MS as i64);

    fn day(days: i64) -> Ms {
        Ms(NOW.0 - days * DAY_MS as i64)
    }

    fn policy(rows: &[RetentionRow]) -> Policy {
        Policy::new(Keep::default(), rows, NOW)
    }

    fn row(jobs: Option<u32>, artifacts: Option<u32>, logs: Option<u32>, sources: Option<u32>) -> RetentionRow {
        let [jobs_days, artifacts_days, logs_days, sources_days] = [jobs, artifacts, logs, sources];
        RetentionRow { org: OTHER, jobs_days, artifacts_days, logs_days, sources_days }
    }

    #[test]
    fn a_job_goes_when_its_organisation_keeps_it_no_longer() {
        for (org, wish, ended, goes) in [
            (DEFAULT_ORG, Some(1), 89, false),
            (DEFAULT_ORG, Some(1), 90, false),
            (DEFAULT_ORG, Some(1), 91, true),
            (OTHER, Some(1), 2, true),
            (OTHER, Some(0), 900, false),
            (OTHER, None, 91, true),
            (OTHER, Some(200), 91, false),
        ] {
            let policy = policy(&[row(wish, None, None, None)]);
            let written = policy.job(&Ended { job: JobId::from_raw(1), org, at: day(ended) });
            assert_eq!(written.is_some(), goes, "{wish:?} {ended}");
        }
        assert_eq!(policy(&[]).jobs_before(), Some(day(90)));
        assert_eq!(policy(&[row(Some(1), None, None, None)]).jobs_before(), Some(day(1)), "the first of all");
        let for_ever = Policy::new(Keep { jobs_ms: 0, ..Keep::default() }, &[], NOW);
        assert_eq!(for_ever.jobs_before(), None);
    }

    #[test]
    fn logs_and_artifacts_go_each_at_its_own_time_and_once() {
        let attempt = AttemptRef { job: JobId::from_raw(1), attempt: 2 };
        for (ended, log, files, goes) in [
            (29, true, true, [false, false]),
            (31, true, true, [false, true]),
            (31, true, false, [false, false]),
            (91, true, true, [true, true]),
            (91, false, true, [false, true]),
        ] {
            let left = Fading { attempt, org: DEFAULT_ORG, ended_at: day(ended), log, files };
            let written = policy(&[]).attempt(&left);
            let has = [
                written.iter().any(|write| matches!(write, Tidy::DropLog(_))),
                written.iter().any(|write| matches!(write, Tidy::DropFiles(_))),
            ];
            assert_eq!(has, goes, "{ended} days, log {log}, artifacts {files}");
        }
    }

    #[test]
    fn a_chunk_outlives_every_source_that_it_may_belong_to() {
        for wish in [None, Some(1), Some(14), Some(0)] {
            let policy = policy(&[row(None, None, None, wish)]);
            let [source, chunk] = [BlobKind::Manifest, BlobKind::Chunk].map(|kind| policy.blobs(kind, OTHER));
            match (source, chunk) {
                (None, None) => assert_eq!(wish, Some(0)),
                // A source's chunks were noted at most a grace before it was.
                (Some(source), Some(chunk)) => assert!(source.since(chunk) >= 2 * DAY_MS, "{wish:?}"),
                other => panic!("{other:?}"),
            }
            assert_eq!(policy.blobs(BlobKind::Artifact, OTHER), Some(day(2)), "artifacts by who lists them");
        }
        assert_eq!(policy(&[]).blobs(BlobKind::Manifest, DEFAULT_ORG), Some(day(15)));
    }

    #[test]
    fn what_was_noted_long_ago_drops_nothing_that_was_in_use_then() {
        let late = policy(&[]).noted(day(40));
        assert_eq!(late.blobs(BlobKind::Manifest, DEFAULT_ORG), Some(day(55)));
        assert_eq!(late.blobs(BlobKind::Chunk, DEFAULT_ORG), Some(day(57)));
        assert_eq!(late.blobs(BlobKind::Artifact, DEFAULT_ORG), Some(day(42)));
        assert_eq!(late.jobs_before(), Some(day(90)), "what depends on no note does not wait");
        assert_eq!(
            policy(&[]).noted(day(-3)).blobs(BlobKind::Manifest, DEFAULT_ORG),
            Some(day(15)),
            "a clock went back"
        );
    }

    #[test]
    fn days_become_spans_and_days_again() {
        assert_eq!(Keep::default().days(), [90, 30, 90, 14]);
        let short = Keep::of_days([3, 0, 2, 1], 1_000);
        assert_eq!((short.days(), short.grace_ms, short.logs_ms), ([3, 0, 2, 1], 1_000, 2_000));
        let policy = Policy::new(short, &[row(Some(5), None, None, None)], NOW);
        assert_eq!(policy.of(OTHER).jobs_ms, 5_000);
    }
}
