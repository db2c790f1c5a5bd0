//! S: what goes: jobs, logs and artifacts that are old, blobs that nobody uses, the trash.

use std::collections::BTreeSet;

use alloy_shared::env::Ms;
use alloy_shared::id::{AttemptRef, JobId, OrgId};

use super::SqlStore;
use super::blob::{blob, kind_word};
use super::conn::{Args, Conn, Reader, Row};
use super::farm::orgs;
use super::fault::Fault;
use super::wide::Kind::{Int as I, Text as T};
use super::wide::Wide;
use crate::blobs::root_of;
use crate::store::tidy::{BlobCursor, Ended, Fade, Fading, RetentionRow, Tidy, TrashCursor, TrashRow};
use crate::store::{Blob, BlobKind, Miss, Scope, StoreError};

super::statements! {
    ADOPT_BLOBS = "UPDATE blobs SET used_at_ms = $1 WHERE (digest, kind, org_id) IN (SELECT digest, kind, org_id FROM blobs \
        WHERE kind = $2 AND used_at_ms = 0 ORDER BY digest, org_id LIMIT $3)";
    USE_BLOB = "WITH asked (digest, kind, org_id, at) AS (VALUES (CAST($1 AS TEXT), CAST($2 AS TEXT), CAST($3 AS TEXT), \
        CAST($4 AS BIGINT))) UPDATE blobs SET used_at_ms = CASE WHEN blobs.used_at_ms > asked.at THEN blobs.used_at_ms ELSE asked.at END \
        FROM asked WHERE blobs.digest = CAST(asked.digest AS TEXT) AND blobs.kind = CAST(asked.kind AS TEXT) \
        AND blobs.org_id = CAST(asked.org_id AS TEXT)";
    // An artifact stays as long as an attempt lists it, a source as long as a job that has not ended names it.
    DROP_BLOB = "DELETE FROM blobs WHERE digest = $1 AND kind = $2 AND org_id = $3 AND used_at_ms < $4 AND used_at_ms > 0 \
        AND (kind <> 'artifact' OR NOT EXISTS (SELECT 1 FROM artifacts WHERE artifacts.sha256 = $1 AND artifacts.org_id = $3)) \
        AND (kind <> 'manifest' OR NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.source = $1 AND jobs.org_id = $3 \
        AND jobs.finished_at_ms IS NULL))";
    // What was deleted under this name before and is here again has to go again.
    TRASH_OBJECT = "INSERT INTO trash (object, root, at_ms, gone) SELECT CAST($1 AS TEXT), CAST($2 AS TEXT), CAST($3 AS BIGINT), FALSE \
        WHERE NOT EXISTS (SELECT 1 FROM blobs WHERE blobs.object = CAST($1 AS TEXT)) \
        ON CONFLICT (object) DO UPDATE SET gone = FALSE, at_ms = excluded.at_ms WHERE trash.gone = TRUE";
    DROP_LOG = "UPDATE attempts SET log_gone_at_ms = $5 WHERE job_id = $1 AND attempt = $2 AND log_gone_at_ms IS NULL \
        AND ended_at_ms < $3 AND (log_len IS NOT NULL OR assigned_at_ms < $4) \
        AND EXISTS (SELECT 1 FROM jobs WHERE jobs.id = $1 AND jobs.finished_at_ms IS NOT NULL)";
    DROP_FILES = "UPDATE attempts SET files_gone_at_ms = $5 WHERE job_id = $1 AND attempt = $2 AND files_gone_at_ms IS NULL \
        AND ended_at_ms < $3 AND (log_len IS NOT NULL OR assigned_at_ms < $4) \
        AND EXISTS (SELECT 1 FROM jobs WHERE jobs.id = $1 AND jobs.finished_at_ms IS NOT NULL)";
    UNLIST_ARTIFACTS = "DELETE FROM artifacts WHERE job_id = $1 AND attempt = $2";
    // The last of these finds whether the job may go; if not, all is undone.
    TRASH_LOGS = "INSERT INTO trash (object, root, at_ms, gone) SELECT 'logs/' || job_id || '/' || attempt, \
        'logs/' || job_id || '/' || attempt, CAST($2 AS BIGINT), FALSE FROM attempts WHERE job_id = $1 AND log_gone_at_ms IS NULL \
        ON CONFLICT (object) DO NOTHING";
    PRUNE_ARTIFACTS = "DELETE FROM artifacts WHERE job_id = $1";
    PRUNE_EVENTS = "DELETE FROM events WHERE job_id = $1";
    PRUNE_ATTEMPTS = "DELETE FROM attempts WHERE job_id = $1 AND (log_len IS NOT NULL OR assigned_at_ms < $2)";
    PRUNE_KEYS = "DELETE FROM idempotency WHERE job_id = $1";
    PRUNE_JOB = "DELETE FROM jobs WHERE id = $1 AND finished_at_ms < $2 \
        AND NOT EXISTS (SELECT 1 FROM attempts WHERE attempts.job_id = $1)";
    LEAVE_TRASH = "DELETE FROM trash WHERE object = $1 AND taken_at_ms IS NULL \
        AND EXISTS (SELECT 1 FROM blobs WHERE blobs.object = $1)";
    TAKE_TRASH = "UPDATE trash SET taken_at_ms = $2 WHERE object = $1 AND gone = FALSE AND at_ms < $3 \
        AND NOT EXISTS (SELECT 1 FROM blobs WHERE blobs.object = $1)";
    BURNT = "UPDATE trash SET gone = TRUE, at_ms = $2 WHERE object = $1 AND taken_at_ms IS NOT NULL";
    FORGET_TRASH = "DELETE FROM trash WHERE gone = TRUE AND at_ms < $1";
    SET_RETENTION = "INSERT INTO retention (org_id, jobs_days, artifacts_days, logs_days, sources_days) VALUES ($1, $2, $3, $4, $5) \
        ON CONFLICT (org_id) DO UPDATE SET jobs_days = excluded.jobs_days, artifacts_days = excluded.artifacts_days, \
        logs_days = excluded.logs_days, sources_days = excluded.sources_days";

    ENDED = "SELECT id, org_id, finished_at_ms FROM jobs WHERE finished_at_ms IS NOT NULL AND finished_at_ms < $1 \
        AND (finished_at_ms, id) > ($2, $3) ORDER BY finished_at_ms, id LIMIT $4";
    FADING = "SELECT job_id, attempt, org_id, ended_at_ms, log_gone_at_ms, files_gone_at_ms FROM attempts \
        WHERE (log_gone_at_ms IS NULL OR files_gone_at_ms IS NULL) AND ended_at_ms < $1 \
        AND (ended_at_ms, job_id, attempt) > ($2, $3, $4) ORDER BY ended_at_ms, job_id, attempt LIMIT $5";
    UNUSED = "SELECT digest, kind, org_id, size_bytes, object, frame_at, stored_bytes, zstd, frame_bytes, raw_at, created_at_ms, \
        used_at_ms FROM blobs WHERE kind = $1 AND used_at_ms < $2 AND (used_at_ms, digest, org_id) > ($3, $4, $5) \
        ORDER BY used_at_ms, digest, org_id LIMIT $6";
    TRASH = "SELECT object, root, at_ms, taken_at_ms, gone FROM trash WHERE gone = FALSE AND at_ms < $1 \
        AND (at_ms, object) > ($2, $3) ORDER BY at_ms, object LIMIT $4";
    TRASHED = "SELECT object, root, at_ms, taken_at_ms, gone FROM trash WHERE root = $1";
    NAMED = "WITH asked (object) AS (VALUES (CAST($1 AS TEXT))) SELECT asked.object FROM asked \
        WHERE EXISTS (SELECT 1 FROM blobs WHERE blobs.object = CAST(asked.object AS TEXT)) \
        OR EXISTS (SELECT 1 FROM trash WHERE trash.object = CAST(asked.object AS TEXT) AND trash.gone = FALSE)";
    RETENTION = "SELECT org_id, jobs_days, artifacts_days, logs_days, sources_days FROM retention WHERE org_id BETWEEN $1 AND $2";
}

static USES_WIDE: Wide = Wide::new(USE_BLOB, &[T, T, T, I]);
static NAMED_WIDE: Wide = Wide::new(NAMED, &[T]);
pub(super) static WIDE: [&Wide; 2] = [&USES_WIDE, &NAMED_WIDE];

type Written = Result<Result<i64, Miss>, Fault>;

pub(super) async fn write(conn: &mut Conn<'_>, write: &Tidy) -> Written {
    let touched = match write {
        Tidy::Adopt { kind, at, most } => {
            let args = Args::new().int(at.0).text(kind_word(*kind)).int((*most).into());
            conn.run(ADOPT_BLOBS, args).await?
        }
        Tidy::Use { org, kind, digests, at } => {
            let mut args = Args::new();
            for digest in digests {
                args = args.text(digest).text(kind_word(*kind)).text(org).int(at.0);
            }
            if conn.run_wide(WIDE[0], args).await? != digests.len() as u64 {
                return Ok(Err(Miss::Stale));
            }
            0
        }
        Tidy::DropBlobs { blobs, unused_since, at } => drop_blobs(conn, blobs, *unused_since, *at).await?,
        Tidy::DropLog(fade) => return drop_log(conn, fade).await,
        Tidy::DropFiles(fade) => return drop_files(conn, fade).await,
        Tidy::Prune { job, ended_before, open_before, at } => {
            return prune(conn, job, *ended_before, *open_before, *at).await;
        }
        Tidy::Trash { objects, at } => {
            for object in objects {
                trash(conn, object, *at).await?;
            }
            0
        }
        Tidy::TakeTrash { object, before, at } => {
            conn.run(LEAVE_TRASH, Args::new().text(object)).await?;
            conn.run(TAKE_TRASH, Args::new().text(object).int(at.0).int(before.0)).await?
        }
        Tidy::Burnt { object, at } => {
            conn.run(BURNT, Args::new().text(object).int(at.0)).await?;
            0
        }
        Tidy::Forget { before } => {
            conn.run(FORGET_TRASH, Args::new().int(before.0)).await?;
            0
        }
        Tidy::SetRetention(row) => {
            let mut args = Args::new().text(row.org);
            for days in [row.jobs_days, row.artifacts_days, row.logs_days, row.sources_days] {
                args = args.maybe_int(days.map(i64::from));
            }
            conn.run(SET_RETENTION, args).await?;
            0
        }
    };
    Ok(Ok(i64::try_from(touched).unwrap_or(i64::MAX)))
}

async fn drop_blobs(conn: &mut Conn<'_>, blobs: &[Blob], unused_since: Ms, at: Ms) -> Result<u64, Fault> {
    let (mut dropped, mut objects) = (0, BTreeSet::new());
    for blob in blobs {
        let id = Args::new().text(blob.digest).text(kind_word(blob.kind)).text(blob.org);
        let went = conn.run(DROP_BLOB, id.int(unused_since.0)).await?;
        if went > 0 {
            objects.insert(blob.place.object());
        }
        dropped += went;
    }
    for object in objects {
        trash(conn, object, at).await?;
    }
    Ok(dropped)
}

async fn trash(conn: &mut Conn<'_>, object: &str, at: Ms) -> Result<(), Fault> {
    conn.run(TRASH_OBJECT, Args::new().text(object).text(root_of(object)).int(at.0)).await?;
    Ok(())
}

fn fade_args(fade: &Fade) -> Args {
    let attempt = Args::new().text(fade.attempt.job).int(fade.attempt.attempt.into());
    attempt.int(fade.ended_before.0).int(fade.open_before.0).int(fade.at.0)
}

async fn drop_log(conn: &mut Conn<'_>, fade: &Fade) -> Written {
    if conn.run(DROP_LOG, fade_args(fade)).await? == 0 {
        return Ok(Err(Miss::Stale));
    }
    trash(conn, &crate::blobs::log_object(&fade.attempt), fade.at).await?;
    Ok(Ok(0))
}

async fn drop_files(conn: &mut Conn<'_>, fade: &Fade) -> Written {
    if conn.run(DROP_FILES, fade_args(fade)).await? == 0 {
        return Ok(Err(Miss::Stale));
    }
    let attempt = Args::new().text(fade.attempt.job).int(fade.attempt.attempt.into());
    conn.run(UNLIST_ARTIFACTS, attempt).await?;
    Ok(Ok(0))
}

async fn prune(conn: &mut Conn<'_>, job: &JobId, ended_before: Ms, open_before: Ms, at: Ms) -> Written {
    let id = || Args::new().text(job);
    conn.run(TRASH_LOGS, id().int(at.0)).await?;
    conn.run(PRUNE_ARTIFACTS, id()).await?;
    conn.run(PRUNE_EVENTS, id()).await?;
    conn.run(PRUNE_ATTEMPTS, id().int(open_before.0)).await?;
    conn.run(PRUNE_KEYS, id()).await?;
    // An attempt whose books are open has stayed, and holds it back.
    let went = conn.run(PRUNE_JOB, id().int(ended_before.0)).await?;
    Ok(if went == 1 { Ok(0) } else { Err(Miss::Stale) })
}

impl SqlStore {
    pub(super) async fn read_ended(
        &self,
        before: Ms,
        after: Option<(Ms, JobId)>,
        limit: u32,
    ) -> Result<Vec<Ended>, StoreError> {
        let (at, job) = after.map_or((0, String::new()), |(at, job)| (at.0, job.to_string()));
        let rows = self.rows(ENDED, Args::new().int(before.0).int(at).text(job).int(limit.into())).await?;
        let ended = |row: &Row| {
            let row = Reader::new(row, "jobs", "id");
            Ok(Ended { job: row.parsed("id")?, org: row.parsed("org_id")?, at: row.ms("finished_at_ms")? })
        };
        rows.iter().map(ended).collect()
    }

    pub(super) async fn read_fading(
        &self,
        before: Ms,
        after: Option<(Ms, AttemptRef)>,
        limit: u32,
    ) -> Result<Vec<Fading>, StoreError> {
        let (at, job, attempt) = match after {
            None => (0, String::new(), 0),
            Some((at, last)) => (at.0, last.job.to_string(), last.attempt.into()),
        };
        let args = Args::new().int(before.0).int(at).text(job).int(attempt).int(limit.into());
        let fading = |row: &Row| {
            let row = Reader::new(row, "attempts", "job_id");
            Ok(Fading {
                attempt: AttemptRef { job: row.parsed("job_id")?, attempt: row.size("attempt")? },
                org: row.parsed("org_id")?,
                ended_at: row.ms("ended_at_ms")?,
                log: row.maybe_ms("log_gone_at_ms")?.is_none(),
                files: row.maybe_ms("files_gone_at_ms")?.is_none(),
            })
        };
        self.rows(FADING, args).await?.iter().map(fading).collect()
    }

    pub(super) async fn read_unused(
        &self,
        kind: BlobKind,
        before: Ms,
        after: Option<BlobCursor>,
        limit: u32,
    ) -> Result<Vec<Blob>, StoreError> {
        let (at, digest, org) = match after {
            None => (1, String::new(), String::new()),
            Some((at, digest, org)) => (at.0, digest.to_string(), org.to_string()),
        };
        let args = Args::new().text(kind_word(kind)).int(before.0).int(at).text(digest).text(org).int(limit.into());
        self.rows(UNUSED, args).await?.iter().map(|row| blob(row, kind)).collect()
    }

    pub(super) async fn read_trash(
        &self,
        before: Ms,
        after: Option<TrashCursor>,
        limit: u32,
    ) -> Result<Vec<TrashRow>, StoreError> {
        let (at, object) = after.unwrap_or((Ms(-1), String::new()));
        let args = Args::new().int(before.0).int(at.0).text(object).int(limit.into());
        sorted(&self.rows(TRASH, args).await?)
    }

    pub(super) async fn read_trashed(&self, root: &str) -> Result<Vec<TrashRow>, StoreError> {
        sorted(&self.rows(TRASHED, Args::new().text(root)).await?)
    }

    pub(super) async fn read_named(&self, objects: &[String]) -> Result<Vec<String>, StoreError> {
        let args = objects.iter().fold(Args::new(), |args, object| args.text(object));
        let rows = self.rows_wide(WIDE[1], args).await?;
        let mut found: Vec<String> =
            rows.iter().map(|row| Reader::new(row, "trash", "object").text("object")).collect::<Result<_, _>>()?;
        found.sort();
        found.dedup();
        Ok(found)
    }

    pub(super) async fn read_retention(&self, scope: &Scope) -> Result<Vec<RetentionRow>, StoreError> {
        let (from, to): (OrgId, OrgId) = orgs(scope);
        let rows = self.rows(RETENTION, Args::new().text(from).text(to)).await?;
        let row = |row: &Row| {
            let row = Reader::new(row, "retention", "org_id");
            Ok(RetentionRow {
                org: row.parsed("org_id")?,
                jobs_days: row.maybe_size("jobs_days")?,
                artifacts_days: row.maybe_size("artifacts_days")?,
                logs_days: row.maybe_size("logs_days")?,
                sources_days: row.maybe_size("sources_days")?,
            })
        };
        let mut found: Vec<RetentionRow> = rows.iter().map(row).collect::<Result<_, StoreError>>()?;
        found.sort_by_key(|row| row.org);
        Ok(found)
    }
}

fn sorted(rows: &[Row]) -> Result<Vec<TrashRow>, StoreError> {
    let read = |row: &Row| {
        let row = Reader::new(row, "trash", "object");
        Ok(TrashRow {
            object: row.text("object")?,
            root: row.text("root")?,
            at: row.ms("at_ms")?,
            taken_at: row.maybe_ms("taken_at_ms")?,
            gone: row.flag("gone")?,
        })
    };
    let mut found: Vec<TrashRow> = rows.iter().map(read).collect::<Result<_, StoreError>>()?;
    found.sort_by(|a, b| (a.at, &a.object).cmp(&(b.at, &b.object)));
    Ok(found)
}
