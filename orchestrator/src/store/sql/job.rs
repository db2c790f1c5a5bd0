//! S: jobs, attempts, events, artifacts and idempotency keys.

use std::io;
use std::sync::Arc;

use alloy_shared::id::{AttemptRef, Digest, JobId, OrgId, WorkerId};
use alloy_shared::wire::job::{StateWord, Timings};
use serde::Serialize;
use serde_json::Serializer;
use serde_json::ser::{CharEscape, CompactFormatter, Formatter};
use sqlx::postgres::PgPool;

use super::SqlStore;
use super::conn::{Args, Conn, Reader, Row};
use super::fault::{self, Fault};
use super::wide::Kind::{Int as I, Text as T};
use super::wide::{Chain, Ending, GUARDS, LINKS, Wide};
use crate::job::{State, Step};
use crate::store::write::{Advance, CloseAttempt, InsertJob};
use crate::store::{Artifact, Attempt, Guard, Job, JobEventRow, JobFilter, Miss, Scope, StoreError, Write};

super::statements! {
    INSERT_KEY = "INSERT INTO idempotency (caller, key, org_id, body, job_id, created_at_ms) \
        VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (caller, key, org_id) DO NOTHING";
    KEY = "SELECT job_id, body FROM idempotency WHERE caller = $1 AND key = $2 AND org_id = $3";
    INSERT_JOB = "INSERT INTO jobs (id, id_tail, org_id, version, state, phase, reason, attempt, worker_id, finished_at_ms, \
        state_json, events, spec, source, created_at_ms, created_by) \
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16) ON CONFLICT (id) DO NOTHING";
    // The only text that changes a job. The cast lets SQLite look for jobs by id alone: with many rows it would else
    // rather walk through all jobs.
    ADVANCE_JOB = "WITH new (id, version, state, phase, reason, attempt, worker_id, finished_at_ms, state_json, events, \
        held_attempt, held_by, held_epoch, held_unseen) AS (VALUES (CAST($1 AS TEXT), CAST($2 AS BIGINT), CAST($3 AS TEXT), \
        CAST($4 AS TEXT), CAST($5 AS TEXT), CAST($6 AS BIGINT), CAST($7 AS TEXT), CAST($8 AS BIGINT), CAST($9 AS TEXT), \
        CAST($10 AS BIGINT), CAST($11 AS BIGINT), CAST($12 AS TEXT), CAST($13 AS BIGINT), CAST($14 AS BIGINT))) \
        UPDATE jobs SET version = new.version, state = new.state, phase = new.phase, reason = new.reason, \
        attempt = new.attempt, worker_id = new.worker_id, finished_at_ms = new.finished_at_ms, \
        state_json = new.state_json, events = new.events FROM new \
        WHERE jobs.id = CAST(new.id AS TEXT) AND jobs.version = new.version - 1 \
        AND (new.held_by IS NULL OR jobs.worker_id = new.held_by) \
        AND (new.held_attempt IS NULL OR (jobs.attempt = new.held_attempt AND EXISTS \
        (SELECT 1 FROM workers WHERE workers.id = new.held_by AND workers.epoch = new.held_epoch))) \
        AND (new.held_unseen IS NULL OR EXISTS (SELECT 1 FROM workers WHERE workers.id = new.held_by \
        AND (workers.seen_at_ms IS NULL OR workers.seen_at_ms < new.held_unseen)))";
    // A close may have been heard before the report that it follows: its two numbers stay.
    PUT_ATTEMPT = "INSERT INTO attempts (job_id, attempt, org_id, worker_id, assigned_at_ms, ended_at_ms, outcome, end_json, \
        timings, teardown_ms, seq, log_len, facts) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13) \
        ON CONFLICT (job_id, attempt) DO UPDATE SET ended_at_ms = excluded.ended_at_ms, outcome = excluded.outcome, \
        end_json = excluded.end_json, timings = excluded.timings, seq = excluded.seq, facts = excluded.facts, \
        teardown_ms = COALESCE(excluded.teardown_ms, attempts.teardown_ms), \
        log_len = COALESCE(excluded.log_len, attempts.log_len)";
    CLOSE_ATTEMPT = "WITH closed (job_id, attempt, worker_id, teardown_ms, log_len) AS (VALUES (CAST($1 AS TEXT), \
        CAST($2 AS BIGINT), CAST($3 AS TEXT), CAST($4 AS BIGINT), CAST($5 AS BIGINT))) \
        UPDATE attempts SET teardown_ms = closed.teardown_ms, log_len = closed.log_len FROM closed \
        WHERE attempts.job_id = CAST(closed.job_id AS TEXT) AND attempts.attempt = CAST(closed.attempt AS BIGINT) \
        AND attempts.worker_id = CAST(closed.worker_id AS TEXT)";
    INSERT_EVENT = "INSERT INTO events (job_id, seq, org_id, at_ms, attempt, kind, state, phase, reason, worker_id, message, \
        artifact) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)";
    // A path that is reported again is the same file.
    INSERT_ARTIFACT = "INSERT INTO artifacts (job_id, attempt, path, org_id, size_bytes, sha256, mode, link) \
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (job_id, attempt, path) DO NOTHING";

    JOB = "SELECT id, org_id, version, state, state_json, spec, source, created_at_ms, created_by, events FROM jobs \
        WHERE id = $1 AND (org_id = $2 OR $2 IS NULL)";
    JOBS_ENDING = "SELECT id FROM jobs WHERE id_tail = $1 AND (org_id = $2 OR $2 IS NULL) \
        AND substr(id, length(id) - length($3) + 1) = $3 ORDER BY id LIMIT 2";
    JOBS_OF_ORG = "SELECT id, org_id, version, state, state_json, spec, source, created_at_ms, created_by, events FROM jobs \
        WHERE org_id = $1 AND id < $2 AND state IN ($3, $4, $5, $6, $7, $8, $9, $10, $11, $12) ORDER BY id DESC LIMIT $13";
    JOBS_OF_CALLER = "SELECT id, org_id, version, state, state_json, spec, source, created_at_ms, created_by, events FROM jobs \
        WHERE created_by = $1 AND id < $2 AND state IN ($3, $4, $5, $6, $7, $8, $9, $10, $11, $12) \
        AND (org_id = $14 OR $14 IS NULL) ORDER BY id DESC LIMIT $13";
    JOBS_OF_FARM = "SELECT id, org_id, version, state, state_json, spec, source, created_at_ms, created_by, events FROM jobs \
        WHERE id < $1 AND state IN ($2, $3, $4, $5, $6, $7, $8, $9, $10, $11) ORDER BY id DESC LIMIT $12";
    LIVE_JOBS = "SELECT id, org_id, version, state, state_json, spec, source, created_at_ms, created_by, events FROM jobs \
        WHERE finished_at_ms IS NULL AND id > $1 ORDER BY id LIMIT $2";
    HELD_JOBS = "SELECT id, org_id, version, state, state_json, spec, source, created_at_ms, created_by, events FROM jobs \
        WHERE worker_id = $1 ORDER BY id";
    ATTEMPTS = "SELECT job_id, attempt, org_id, worker_id, assigned_at_ms, ended_at_ms, end_json, timings, teardown_ms, seq, \
        log_len, facts, log_gone_at_ms, files_gone_at_ms FROM attempts WHERE job_id = $1 AND (org_id = $2 OR $2 IS NULL) ORDER BY attempt";
    ATTEMPT = "SELECT job_id, attempt, org_id, worker_id, assigned_at_ms, ended_at_ms, end_json, timings, teardown_ms, seq, \
        log_len, facts, log_gone_at_ms, files_gone_at_ms FROM attempts WHERE job_id = $1 AND attempt = $3 AND (org_id = $2 OR $2 IS NULL)";
    EVENTS = "SELECT job_id, seq, at_ms, attempt, kind, state, phase, reason, worker_id, message, artifact FROM events \
        WHERE job_id = $1 AND seq > $3 AND (org_id = $2 OR $2 IS NULL) ORDER BY seq LIMIT $4";
    ARTIFACTS = "SELECT job_id, attempt, path, org_id, size_bytes, sha256, mode, link FROM artifacts \
        WHERE job_id = $1 AND (org_id = $2 OR $2 IS NULL)";
    ARTIFACT = "SELECT job_id, attempt, path, org_id, size_bytes, sha256, mode, link FROM artifacts \
        WHERE job_id = $1 AND attempt = $3 AND path = $4 AND (org_id = $2 OR $2 IS NULL)";
}

static KEYS_WIDE: Wide = Wide::new(INSERT_KEY, &[T, T, T, T, T, I]);
static JOBS_WIDE: Wide = Wide::new(INSERT_JOB, &[T, I, T, I, T, T, T, I, T, I, T, I, T, T, I, T]);
static ADVANCES_WIDE: Wide = Wide::new(ADVANCE_JOB, &[T, I, T, T, T, I, T, I, T, I, I, T, I, I]);
static ATTEMPTS_WIDE: Wide = Wide::new(PUT_ATTEMPT, &[T, I, T, T, I, I, T, T, T, I, I, I, T]);
static CLOSES_WIDE: Wide = Wide::new(CLOSE_ATTEMPT, &[T, I, T, I, I]);
static EVENTS_WIDE: Wide = Wide::new(INSERT_EVENT, &[T, I, T, I, I, T, T, T, T, T, T, T]);
static ARTIFACTS_WIDE: Wide = Wide::new(INSERT_ARTIFACT, &[T, I, T, T, I, T, I, T]);
/// In the order in which they are sent: what is guarded, then the books.
pub(super) static CHAIN: Chain =
    Chain::new([&KEYS_WIDE, &JOBS_WIDE, &ADVANCES_WIDE, &CLOSES_WIDE, &ATTEMPTS_WIDE, &EVENTS_WIDE, &ARTIFACTS_WIDE]);

/// The rows of several writes, table by table.
#[derive(Default)]
struct Rows {
    keys: Args,
    jobs: Args,
    advances: Args,
    closes: Args,
    /// How many rows the four above must touch.
    guarded: u64,
    attempts: Args,
    events: Args,
    artifacts: Args,
}

/// Writes of different jobs. Returns false if a guard held one of them back; what was written is then for the caller to undo.
pub(super) async fn write(conn: &mut Conn<'_>, writes: &[&Write]) -> Result<bool, Fault> {
    let rows = Rows::of(writes);
    let guarded = rows.guarded;
    Ok(rows.write(conn).await?.iter().sum::<u64>() == guarded)
}

/// The same as a transaction of its own, which is one exchange with Postgres. Returns false if nothing was written, because a
/// guard or a rule of the schema held one of them back.
pub(super) async fn write_at_once(pool: &PgPool, writes: &[&Write]) -> Result<bool, StoreError> {
    let rows = Rows::of(writes);
    let guarded = rows.guarded;
    let Some((text, args)) = CHAIN.whole(rows.all(), guarded, Ending::Check).map_err(fault::of)? else {
        return Ok(true);
    };
    let mut conn = pool.acquire().await.map_err(fault::of)?;
    match sqlx::query_with(text, args).execute(&mut *conn).await {
        Ok(_) => Ok(true),
        Err(error) => fault::of_whole(error).map(|()| false),
    }
}

/// Writes one new job, and tells a known key from a known job.
pub(super) async fn insert(conn: &mut Conn<'_>, insert: &InsertJob) -> Result<Option<Miss>, Fault> {
    let [keys, jobs, ..] = Rows::default().key(insert).insert(insert).write(conn).await?;
    if let Some(key) = insert.key.as_ref().filter(|_| keys == 0) {
        let args = Args::new().text(&key.caller).text(&key.key).text(key.org);
        let Some(row) = conn.first(KEY, args).await? else { return Ok(Some(Miss::Stale)) };
        let (job, body) = keyed(&row)?;
        return Ok(Some(Miss::Exists { job, body }));
    }
    Ok(if jobs == 1 { None } else { Some(Miss::Stale) })
}

fn keyed(row: &Row) -> Result<(JobId, Digest), StoreError> {
    let row = Reader::new(row, "idempotency", "job_id");
    Ok((row.parsed("job_id")?, row.parsed("body")?))
}

impl Rows {
    /// In the same order whoever writes them: of two that lock the same rows one waits for the other, and not each for each.
    fn of(writes: &[&Write]) -> Self {
        let mut inserts: Vec<&InsertJob> = Vec::new();
        inserts.extend(writes.iter().filter_map(|write| match write {
            Write::InsertJob(insert) => Some(&**insert),
            _ => None,
        }));
        inserts.sort_by_key(|insert| insert.key.as_ref().map(|key| (key.org, &key.caller, &key.key)));
        let keys = inserts.into_iter().fold(Self::default(), Self::key);
        let mut writes = writes.to_vec();
        writes.sort_by_key(|write| match write {
            Write::InsertJob(insert) => Some(insert.job.id),
            Write::Advance(advance) => Some(advance.next.id),
            Write::CloseAttempt(close) => Some(close.at.job),
            _ => None,
        });
        writes.into_iter().fold(keys, |rows, write| match write {
            Write::InsertJob(insert) => rows.insert(insert),
            Write::Advance(advance) => rows.advance(advance),
            Write::CloseAttempt(close) => rows.close(close),
            Write::Enrol(_)
            | Write::SetWorker(_)
            | Write::RevokeWorker { .. }
            | Write::OpenSession(_)
            | Write::Seen { .. }
            | Write::AddToken(_)
            | Write::RevokeToken { .. }
            | Write::SetImage(_)
            | Write::DropImage { .. }
            | Write::SetMember(_)
            | Write::DropMember { .. }
            | Write::AddBlobs(_)
            | Write::Tidy(_)
            | Write::AddMeta { .. } => rows,
        })
    }

    /// In the order of the chain.
    fn all(self) -> [Args; LINKS] {
        [self.keys, self.jobs, self.advances, self.closes, self.attempts, self.events, self.artifacts]
    }

    /// Returns how many rows each of the guarded texts touched.
    async fn write(self, conn: &mut Conn<'_>) -> Result<[u64; GUARDS], Fault> {
        let guarded = self.guarded;
        Ok(conn.run_chain(&CHAIN, self.all(), guarded).await?)
    }

    fn key(mut self, insert: &InsertJob) -> Self {
        if let Some(key) = &insert.key {
            let id = self.keys.text(&key.caller).text(&key.key).text(key.org);
            self.keys = id.text(key.body).text(insert.job.id).int(insert.job.created_at.0);
            self.guarded += 1;
        }
        self
    }

    fn insert(mut self, insert: &InsertJob) -> Self {
        let job = &insert.job;
        let id = self.jobs.text(job.id).int(job.id.turn().into()).text(job.org).int(job.version);
        let state = state_columns(id, job);
        self.jobs = state.text(json(&*job.spec)).maybe_text(job.source).int(job.created_at.0).text(&job.created_by);
        self.guarded += 1;
        self.books(job, &insert.attempt, &insert.events)
    }

    fn advance(mut self, advance: &Advance) -> Self {
        let next = &advance.next;
        let state = state_columns(self.advances.text(next.id).int(next.version), next);
        let (attempt, worker, epoch, unseen) = match advance.guard {
            Guard::Version => (None, None, None, None),
            Guard::Fence { attempt, worker, epoch } => (Some(i64::from(attempt)), Some(worker), Some(epoch), None),
            Guard::Silent { worker, unseen_since } => (None, Some(worker), None, unseen_since.map(|at| at.0)),
        };
        self.advances = state.maybe_int(attempt).maybe_text(worker).maybe_int(epoch).maybe_int(unseen);
        self.guarded += 1;
        for file in &advance.artifacts {
            let at = self.artifacts.text(file.at.job).int(file.at.attempt.into()).text(&file.path).text(file.org);
            self.artifacts = at.size(file.size).text(file.sha256).int(file.mode.into()).maybe_text(file.link.as_ref());
        }
        self.books(next, &advance.attempt, &advance.events)
    }

    fn close(mut self, close: &CloseAttempt) -> Self {
        let at = self.closes.text(close.at.job).int(close.at.attempt.into()).text(close.worker);
        self.closes = at.size(close.teardown_ms).size(close.log_len);
        self.guarded += 1;
        self
    }

    fn books(mut self, job: &Job, attempt: &Option<Attempt>, events: &[JobEventRow]) -> Self {
        if let Some(attempt) = attempt {
            let timings = Timings { teardown_ms: None, ..attempt.timings.clone() };
            self.attempts = self
                .attempts
                .text(attempt.at.job)
                .int(attempt.at.attempt.into())
                .text(attempt.org)
                .text(attempt.worker)
                .int(attempt.assigned_at.0)
                .maybe_int(attempt.ended_at.map(|at| at.0))
                .maybe_text(attempt.end.as_ref().map(|end| end.outcome()))
                .maybe_text(attempt.end.as_ref().map(json))
                .text(json(&timings))
                .maybe_size(attempt.timings.teardown_ms)
                .size(attempt.seq)
                .maybe_size(attempt.log_len)
                .text(json(&attempt.facts));
        }
        for event in events {
            let id = self.events.text(event.job).size(event.seq).text(job.org).int(event.at.0);
            let what = id.int(event.attempt.into()).text(event.kind).text(event.state).maybe_text(event.phase);
            let why = what.maybe_text(event.reason).maybe_text(event.worker);
            self.events = why.maybe_text(event.message.as_ref()).maybe_text(event.artifact.as_ref());
        }
        self
    }
}

/// `state` to `events`, as INSERT_JOB and ADVANCE_JOB both have them.
fn state_columns(args: Args, job: &Job) -> Args {
    let (finished_at, reason) = match &job.state.step {
        Step::Done { end, at } => (Some(at.0), end.reason),
        Step::Queued { .. } | Step::Assigned { .. } | Step::Running { .. } | Step::Canceling { .. } => (None, None),
    };
    args.text(job.state.word())
        .maybe_text(job.state.phase())
        .maybe_text(reason)
        .int(job.state.tries.made.into())
        .maybe_text(job.state.lease().map(|lease| lease.worker))
        .maybe_int(finished_at)
        .text(json(&job.state))
        .size(job.events)
}

/// Postgres reads no NUL as jsonb either, and one in what a worker said would keep a whole view from being read.
struct NoNul;

impl Formatter for NoNul {
    fn write_char_escape<W: ?Sized + io::Write>(&mut self, to: &mut W, escape: CharEscape) -> io::Result<()> {
        match escape {
            CharEscape::AsciiControl(0) => to.write_all("\u{fffd}".as_bytes()),
            other => CompactFormatter.write_char_escape(to, other),
        }
    }
}

pub(super) fn json<T: Serialize>(value: &T) -> String {
    let mut out = Vec::new();
    let written = value.serialize(&mut Serializer::with_formatter(&mut out, NoNul));
    let text = written.ok().and_then(|()| String::from_utf8(out).ok());
    text.unwrap_or_else(|| unreachable!("a row's parts are plain data"))
}

impl SqlStore {
    pub(super) async fn read_job(&self, scope: &Scope, id: &JobId) -> Result<Option<Job>, StoreError> {
        let rows = self.rows(JOB, Args::new().text(id).maybe_text(scope.filter())).await?;
        rows.first().map(job).transpose()
    }

    pub(super) async fn read_keyed(
        &self,
        org: &OrgId,
        caller: &str,
        key: &str,
    ) -> Result<Option<(JobId, Digest)>, StoreError> {
        let rows = self.rows(KEY, Args::new().text(caller).text(key).text(org)).await?;
        rows.first().map(keyed).transpose()
    }

    pub(super) async fn read_jobs_ending(&self, scope: &Scope, suffix: &str) -> Result<Vec<JobId>, StoreError> {
        let Some(turn) = JobId::turn_of(suffix) else { return Ok(Vec::new()) };
        let args = Args::new().int(turn.into()).maybe_text(scope.filter()).text(suffix);
        let rows = self.rows(JOBS_ENDING, args).await?;
        rows.iter().map(|row| Reader::new(row, "jobs", "id").parsed("id")).collect()
    }

    pub(super) async fn read_jobs(
        &self,
        scope: &Scope,
        filter: &JobFilter,
        limit: u32,
    ) -> Result<Vec<Job>, StoreError> {
        let (text, first) = match (&filter.created_by, scope.filter()) {
            (Some(caller), _) => (JOBS_OF_CALLER, Args::new().text(caller)),
            (None, Some(org)) => (JOBS_OF_ORG, Args::new().text(org)),
            (None, None) => (JOBS_OF_FARM, Args::new()),
        };
        let before = filter.before.unwrap_or(JobId::from_raw(u128::MAX));
        let mut args = first.text(before);
        // The text has a place for each word there is; no wish means all of them.
        let wanted = if filter.states.is_empty() { StateWord::ALL } else { &filter.states };
        for at in 0..StateWord::ALL.len() {
            args = args.text(wanted.get(at).unwrap_or(&wanted[0]));
        }
        args = args.int(limit.into());
        if filter.created_by.is_some() {
            args = args.maybe_text(scope.filter());
        }
        self.rows(text, args).await?.iter().map(job).collect()
    }

    pub(super) async fn read_live(&self, after: Option<JobId>, limit: u32) -> Result<Vec<Job>, StoreError> {
        let after = after.map_or_else(String::new, |id| id.to_string());
        self.rows(LIVE_JOBS, Args::new().text(after).int(limit.into())).await?.iter().map(job).collect()
    }

    pub(super) async fn read_held(&self, worker: &WorkerId) -> Result<Vec<Job>, StoreError> {
        self.rows(HELD_JOBS, Args::new().text(worker)).await?.iter().map(job).collect()
    }

    pub(super) async fn read_attempts(&self, scope: &Scope, job: &JobId) -> Result<Vec<Attempt>, StoreError> {
        let rows = self.rows(ATTEMPTS, Args::new().text(job).maybe_text(scope.filter())).await?;
        rows.iter().map(attempt).collect()
    }

    pub(super) async fn read_attempt(&self, scope: &Scope, at: &AttemptRef) -> Result<Option<Attempt>, StoreError> {
        let args = Args::new().text(at.job).maybe_text(scope.filter()).int(at.attempt.into());
        self.rows(ATTEMPT, args).await?.first().map(attempt).transpose()
    }

    pub(super) async fn read_events(
        &self,
        scope: &Scope,
        job: &JobId,
        after: u64,
        limit: u32,
    ) -> Result<Vec<JobEventRow>, StoreError> {
        let after = i64::try_from(after).unwrap_or(i64::MAX);
        let args = Args::new().text(job).maybe_text(scope.filter()).int(after).int(limit.into());
        self.rows(EVENTS, args).await?.iter().map(event).collect()
    }

    pub(super) async fn read_artifacts(&self, scope: &Scope, job: &JobId) -> Result<Vec<Artifact>, StoreError> {
        let rows = self.rows(ARTIFACTS, Args::new().text(job).maybe_text(scope.filter())).await?;
        let mut found: Vec<Artifact> = rows.iter().map(artifact).collect::<Result<_, _>>()?;
        // Sorted here: a database sorts paths by the rules of its language.
        found.sort_by(|a, b| (a.at.attempt, &a.path).cmp(&(b.at.attempt, &b.path)));
        Ok(found)
    }

    pub(super) async fn read_artifact(
        &self,
        scope: &Scope,
        at: &AttemptRef,
        path: &str,
    ) -> Result<Option<Artifact>, StoreError> {
        let args = Args::new().text(at.job).maybe_text(scope.filter()).int(at.attempt.into()).text(path);
        self.rows(ARTIFACT, args).await?.first().map(artifact).transpose()
    }
}

pub(super) fn job(row: &Row) -> Result<Job, StoreError> {
    let row = Reader::new(row, "jobs", "id");
    let state: State = row.json("state_json")?;
    if state.word() != row.parsed("state")? {
        return Err(row.corrupt("state"));
    }
    Ok(Job {
        id: row.parsed("id")?,
        org: row.parsed("org_id")?,
        version: row.int("version")?,
        state,
        spec: Arc::new(row.json("spec")?),
        source: row.maybe_parsed("source")?,
        created_at: row.ms("created_at_ms")?,
        created_by: row.text("created_by")?,
        events: row.size("events")?,
    })
}

pub(super) fn attempt(row: &Row) -> Result<Attempt, StoreError> {
    let row = Reader::new(row, "attempts", "job_id");
    let timings: Timings = row.json("timings")?;
    Ok(Attempt {
        at: AttemptRef { job: row.parsed("job_id")?, attempt: row.size("attempt")? },
        org: row.parsed("org_id")?,
        worker: row.parsed("worker_id")?,
        assigned_at: row.ms("assigned_at_ms")?,
        ended_at: row.maybe_ms("ended_at_ms")?,
        end: row.maybe_json("end_json")?,
        timings: Timings { teardown_ms: row.maybe_size("teardown_ms")?, ..timings },
        seq: row.size("seq")?,
        log_len: row.maybe_size("log_len")?,
        log_gone_at: row.maybe_ms("log_gone_at_ms")?,
        files_gone_at: row.maybe_ms("files_gone_at_ms")?,
        facts: row.json("facts")?,
    })
}

fn event(row: &Row) -> Result<JobEventRow, StoreError> {
    let row = Reader::new(row, "events", "job_id");
    Ok(JobEventRow {
        job: row.parsed("job_id")?,
        seq: row.size("seq")?,
        at: row.ms("at_ms")?,
        attempt: row.size("attempt")?,
        kind: row.parsed("kind")?,
        state: row.parsed("state")?,
        phase: row.maybe_parsed("phase")?,
        reason: row.maybe_parsed("reason")?,
        worker: row.maybe_parsed("worker_id")?,
        message: row.maybe_text("message")?,
        artifact: row.maybe_text("artifact")?,
    })
}

fn artifact(row: &Row) -> Result<Artifact, StoreError> {
    let row = Reader::new(row, "artifacts", "path");
    Ok(Artifact {
        at: AttemptRef { job: row.parsed("job_id")?, attempt: row.size("attempt")? },
        org: row.parsed("org_id")?,
        path: row.text("path")?,
        size: row.size("size_bytes")?,
        sha256: row.parsed("sha256")?,
        mode: row.size("mode")?,
        link: row.maybe_text("link")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_json_has_no_nul_and_is_else_as_it_always_was() {
        assert_eq!(json(&"a\0b \\u0000\0"), "\"a\u{fffd}b \\\\u0000\u{fffd}\"");
        let others = ("\u{1}\n\"\\é", Some(1), [(); 2]);
        assert_eq!(json(&others), serde_json::to_string(&others).unwrap());
    }
}
