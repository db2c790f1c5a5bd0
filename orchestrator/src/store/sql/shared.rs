//! S: what orchestrators of one farm on Postgres tell each other through it: who lives, who has which worker, what changed.
//! Every time in here is the database's.

use alloy_shared::env::Ms;
use alloy_shared::id::{Labels, OrgId, WorkerId};
use alloy_shared::limits;
use sqlx::postgres::{PgConnection, PgListener, PgPool};
use sqlx::{Acquire as _, Connection as _, Row as _};
use tracing::warn;

use super::conn::{Reader, Row};
use super::fault::{self, asked, within};
use super::{SqlStore, job, statements};
use crate::store::{Attempt, Job, StoreError};

// Postgres alone runs them; a test prepares them there.
statements! {
    BEAT = "INSERT INTO orchestrators (id, version, started_at_ms, seen_at_ms) \
        VALUES ($1, $2, (EXTRACT(EPOCH FROM clock_timestamp()) * 1000)::BIGINT, (EXTRACT(EPOCH FROM clock_timestamp()) * 1000)::BIGINT) \
        ON CONFLICT (id) DO UPDATE SET seen_at_ms = excluded.seen_at_ms RETURNING seen_at_ms AS now";
    // In the order of their ids: two orchestrators may write the same worker.
    HEARD = "WITH heard AS (SELECT workers.id, now.age_ms FROM workers \
        JOIN UNNEST($1::TEXT[], $2::BIGINT[], $3::BIGINT[]) AS now (worker_id, epoch, age_ms) \
        ON workers.id = now.worker_id AND workers.epoch = now.epoch ORDER BY workers.id FOR UPDATE OF workers) \
        UPDATE workers SET seen_at_ms = GREATEST(seen_at_ms, (EXTRACT(EPOCH FROM clock_timestamp()) * 1000)::BIGINT - heard.age_ms) \
        FROM heard WHERE workers.id = heard.id RETURNING workers.id";
    // Each time that the books know was behind the clock when it was written: the clock went back since, and nobody would count as
    // silent before it is as late again. In the order of their ids, as above.
    AHEAD = "WITH ahead AS (SELECT id FROM workers \
        WHERE seen_at_ms > (EXTRACT(EPOCH FROM clock_timestamp()) * 1000)::BIGINT + $1 ORDER BY id FOR UPDATE) \
        UPDATE workers SET seen_at_ms = (EXTRACT(EPOCH FROM clock_timestamp()) * 1000)::BIGINT FROM ahead WHERE workers.id = ahead.id";
    OFFERED = "INSERT INTO sessions (worker_id, orchestrator_id, epoch, offer) \
        SELECT new.worker_id, $1, new.epoch, new.offer FROM UNNEST($2::TEXT[], $3::BIGINT[], $4::TEXT[]) AS new (worker_id, epoch, offer) \
        JOIN workers ON workers.id = new.worker_id AND workers.epoch = new.epoch ORDER BY new.worker_id \
        ON CONFLICT (worker_id) DO UPDATE SET orchestrator_id = excluded.orchestrator_id, epoch = excluded.epoch, \
        offer = excluded.offer WHERE sessions.epoch <= excluded.epoch";
    FORGET = "DELETE FROM orchestrators WHERE id = $1";
    FORGET_DEAD = "DELETE FROM orchestrators WHERE seen_at_ms < (EXTRACT(EPOCH FROM clock_timestamp()) * 1000)::BIGINT - $1";
    OWN = "SELECT id, epoch, boot, draining, revoked FROM workers WHERE id = ANY($1)";
    WISHES = "SELECT COALESCE(md5(string_agg(concat_ws(' ', org_id, name, want, pinned, generation, workers, labels), ',' \
        ORDER BY org_id, name)), '') AS wishes FROM images";
    // Also the last word of a session that a newer one has followed, whose orchestrator has not written of it yet: the worker is
    // somewhere all the time.
    ELSEWHERE = "SELECT workers.id, workers.org_id, workers.name, workers.labels, workers.host_labels, workers.draining, workers.boot, sessions.offer, \
        (EXTRACT(EPOCH FROM clock_timestamp()) * 1000)::BIGINT - workers.seen_at_ms AS silent_ms, \
        COALESCE(orchestrators.seen_at_ms > (EXTRACT(EPOCH FROM clock_timestamp()) * 1000)::BIGINT - $2, FALSE) AS lives \
        FROM sessions JOIN workers ON workers.id = sessions.worker_id \
        LEFT JOIN orchestrators ON orchestrators.id = sessions.orchestrator_id \
        WHERE sessions.orchestrator_id <> $1 AND workers.revoked = FALSE";
    // A worker whose orchestrator lives was not heard by it. Of one whose orchestrator is away, or has not yet said that it has
    // the newest session, nobody knows: that one may have answered it for as long as it may without writing.
    SILENT = "WITH clock AS (SELECT (EXTRACT(EPOCH FROM clock_timestamp()) * 1000)::BIGINT AS now) \
        SELECT workers.id, clock.now, \
        clock.now - (CASE WHEN orchestrators.seen_at_ms > clock.now - $1 THEN $2::BIGINT ELSE $3::BIGINT END) AS unseen_since \
        FROM clock CROSS JOIN workers LEFT JOIN sessions ON sessions.worker_id = workers.id AND sessions.epoch = workers.epoch \
        LEFT JOIN orchestrators ON orchestrators.id = sessions.orchestrator_id \
        WHERE workers.id IN (SELECT jobs.worker_id FROM jobs WHERE jobs.worker_id IS NOT NULL) AND (workers.seen_at_ms IS NULL \
        OR workers.seen_at_ms < clock.now - (CASE WHEN orchestrators.seen_at_ms > clock.now - $1 THEN $2::BIGINT ELSE $3::BIGINT END))";
    SET = "SELECT set_config(told.name, told.value, FALSE) FROM UNNEST($1::TEXT[], $2::TEXT[]) AS told (name, value)";
    BACKEND = "SELECT pg_backend_pid()";
    CLOCK = "SELECT (EXTRACT(EPOCH FROM clock_timestamp()) * 1000)::BIGINT AS now";
    HORIZON = "SELECT pg_current_snapshot()::TEXT AS horizon";
    // What has begun since, and what was open then: two walks through the index. One walk from the oldest that was open, which may
    // be another database's and old, would read all that has ended meanwhile. In a database that was copied rows have numbers of
    // the old one, above all that this one has given: they are no news.
    CHANGED = "SELECT jobs.id, jobs.org_id, version, state, state_json, spec, source, created_at_ms, created_by, events, \
        attempts.job_id, attempts.attempt, attempts.worker_id, assigned_at_ms, ended_at_ms, end_json, timings, teardown_ms, seq, \
        log_len, facts, log_gone_at_ms, files_gone_at_ms, jobs.changed::TEXT AS changed FROM (\
        (SELECT id FROM jobs WHERE changed >= GREATEST($1::xid8, pg_snapshot_xmax($5::pg_snapshot)) \
        AND changed < pg_snapshot_xmax(pg_current_snapshot()) AND (changed, id) > ($1::xid8, $4) \
        AND changed_by IS DISTINCT FROM $2 ORDER BY changed, id LIMIT $3) UNION ALL \
        (SELECT id FROM jobs WHERE changed = ANY (ARRAY(SELECT pg_snapshot_xip($5::pg_snapshot))) \
        AND changed < pg_snapshot_xmax(pg_current_snapshot()) AND (changed, id) > ($1::xid8, $4) \
        AND changed_by IS DISTINCT FROM $2 ORDER BY changed, id LIMIT $3)) AS news JOIN jobs ON jobs.id = news.id \
        LEFT JOIN attempts ON attempts.job_id = jobs.id AND attempts.attempt = jobs.attempt \
        ORDER BY jobs.changed, jobs.id LIMIT $3";
    NOTIFY = "SELECT pg_notify('alloy', $1)";
    LOCK_DUTIES = "SELECT pg_try_advisory_lock(72617265, 1) AS mine";
}

/// A worker with a session here, as it was heard last.
#[derive(Debug, Clone, PartialEq)]
pub struct Heard {
    pub worker: WorkerId,
    pub epoch: i64,
    pub age_ms: u64,
    /// What it has to offer, if that changed since it was last written.
    pub offer: Option<String>,
}

/// A sign of life was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Beat {
    /// The database's time before anything of it was written.
    pub now: Ms,
    /// The workers whose newest session is still here.
    pub own: Vec<WorkerId>,
}

/// A worker that holds jobs and was not heard since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Silent {
    pub worker: WorkerId,
    pub since: Ms,
    /// What time it was in the database when it said so.
    pub now: Ms,
}

/// What the books say of a worker with a session here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Own {
    pub worker: WorkerId,
    pub epoch: i64,
    /// The process of the newest session.
    pub boot: String,
    pub draining: bool,
    pub revoked: bool,
}

/// A worker whose session is with another orchestrator.
#[derive(Debug, Clone, PartialEq)]
pub struct Elsewhere {
    pub worker: WorkerId,
    pub org: OrgId,
    pub name: String,
    pub labels: Labels,
    pub host_labels: Labels,
    pub draining: bool,
    pub left: bool,
    pub offer: String,
    pub silent_ms: u64,
    /// That orchestrator was heard a moment ago.
    pub lives: bool,
}

/// How far a look at changed jobs has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// What the look before this one saw.
    seen: String,
    /// Behind this job among those of that transaction.
    at: String,
    job: String,
}

impl Changed {
    /// The beginning of a look at what changed since that horizon.
    pub fn since(horizon: &str) -> Self {
        Self { seen: horizon.to_owned(), at: "0".to_owned(), job: String::new() }
    }
}

/// A farm's database as orchestrators share it.
#[derive(Debug, Clone)]
pub struct Shared {
    pool: PgPool,
    /// This orchestrator's name among them.
    me: String,
}

fn failed(error: sqlx::Error) -> StoreError {
    fault::of(error)
}

impl Shared {
    pub(super) fn new(pool: PgPool, me: String) -> Self {
        Self { pool, me }
    }

    pub fn me(&self) -> &str {
        &self.me
    }

    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// Says that this orchestrator lives and when each of its workers was heard, in one transaction.
    pub async fn beat(&self, version: &str, heard: &[Heard]) -> Result<Beat, StoreError> {
        within(limits::STORE_READ_MS, StoreError::Unavailable, self.write_beat(version, heard)).await
    }

    async fn write_beat(&self, version: &str, heard: &[Heard]) -> Result<Beat, StoreError> {
        let mut tx = self.pool.begin().await.map_err(failed)?;
        let beat = sqlx::query(BEAT).bind(&self.me).bind(version).fetch_one(&mut *tx).await.map_err(failed)?;
        let ids: Vec<String> = heard.iter().map(|one| one.worker.to_string()).collect();
        let epochs: Vec<i64> = heard.iter().map(|one| one.epoch).collect();
        let ages: Vec<i64> = heard.iter().map(|one| i64::try_from(one.age_ms).unwrap_or(i64::MAX / 2)).collect();
        let rows = sqlx::query(HEARD).bind(&ids).bind(&epochs).bind(&ages).fetch_all(&mut *tx).await.map_err(failed)?;
        let told = heard.iter().filter_map(|one| Some((one.worker.to_string(), one.epoch, one.offer.clone()?)));
        let (mut ids, mut epochs, mut offers) = (Vec::new(), Vec::new(), Vec::new());
        for (id, epoch, offer) in told {
            ids.push(id);
            epochs.push(epoch);
            offers.push(offer);
        }
        if !ids.is_empty() {
            let offered = sqlx::query(OFFERED).bind(&self.me).bind(&ids).bind(&epochs).bind(&offers);
            offered.execute(&mut *tx).await.map_err(failed)?;
        }
        tx.commit().await.map_err(failed)?;
        let own = rows.iter().map(|row| parsed(row.get("id"), "workers", "id")).collect::<Result<_, _>>()?;
        Ok(Beat { now: Ms(beat.get("now")), own })
    }

    /// Workers that were heard by so much later than now count as heard now. Returns how many there were.
    pub async fn not_ahead(&self, by_ms: u64) -> Result<u64, StoreError> {
        Ok(asked(sqlx::query(AHEAD).bind(ms(by_ms)).execute(&self.pool)).await?.rows_affected())
    }

    /// What time it is in the database.
    pub async fn clock(&self) -> Result<Ms, StoreError> {
        let row = asked(sqlx::query(CLOCK).fetch_one(&self.pool)).await?;
        Ok(Ms(row.get("now")))
    }

    /// This orchestrator stops in order: nobody need wait whether it comes back.
    pub async fn forget(&self) -> Result<(), StoreError> {
        asked(sqlx::query(FORGET).bind(&self.me).execute(&self.pool)).await?;
        Ok(())
    }

    /// Forgets orchestrators that were not heard for so long.
    pub async fn forget_dead(&self, silent_ms: u64) -> Result<(), StoreError> {
        asked(sqlx::query(FORGET_DEAD).bind(ms(silent_ms)).execute(&self.pool)).await?;
        Ok(())
    }

    pub async fn own(&self, workers: &[WorkerId]) -> Result<Vec<Own>, StoreError> {
        let ids: Vec<String> = workers.iter().map(WorkerId::to_string).collect();
        let rows = asked(sqlx::query(OWN).bind(&ids).fetch_all(&self.pool)).await?;
        let own = |row: sqlx::postgres::PgRow| {
            Ok(Own {
                worker: parsed(row.get("id"), "workers", "id")?,
                epoch: row.get("epoch"),
                boot: row.get("boot"),
                draining: row.get("draining"),
                revoked: row.get("revoked"),
            })
        };
        rows.into_iter().map(own).collect()
    }

    /// A text that changes with every wish for an image.
    pub async fn wishes(&self) -> Result<String, StoreError> {
        let row = asked(sqlx::query(WISHES).fetch_one(&self.pool)).await?;
        Ok(row.get("wishes"))
    }

    pub async fn elsewhere(&self, fresh_ms: u64) -> Result<Vec<Elsewhere>, StoreError> {
        let all = sqlx::query(ELSEWHERE).bind(&self.me).bind(ms(fresh_ms));
        let rows = asked(all.fetch_all(&self.pool)).await?;
        let elsewhere = |row: sqlx::postgres::PgRow| {
            let (lives, silent_ms): (bool, Option<i64>) = (row.get("lives"), row.get("silent_ms"));
            let row = Row::Postgres(row);
            let row = Reader::new(&row, "workers", "id");
            Ok(Elsewhere {
                worker: row.parsed("id")?,
                org: row.parsed("org_id")?,
                name: row.text("name")?,
                labels: row.json("labels")?,
                host_labels: row.json("host_labels")?,
                draining: row.flag("draining")?,
                left: row.text("boot")?.is_empty(),
                offer: row.text("offer")?,
                silent_ms: silent_ms.and_then(|ms| u64::try_from(ms).ok()).unwrap_or(0),
                lives,
            })
        };
        Ok(readable(rows, elsewhere))
    }

    /// Workers that hold jobs and were not heard for too long.
    pub async fn silent(&self, fresh_ms: u64, expiry_ms: u64, long_ms: u64) -> Result<Vec<Silent>, StoreError> {
        let all = sqlx::query(SILENT).bind(ms(fresh_ms)).bind(ms(expiry_ms)).bind(ms(long_ms));
        let rows = asked(all.fetch_all(&self.pool)).await?;
        let silent = |row: &sqlx::postgres::PgRow| {
            let (since, now) = (Ms(row.get("unseen_since")), Ms(row.get("now")));
            Ok(Silent { worker: parsed(row.get("id"), "workers", "id")?, since, now })
        };
        rows.iter().map(silent).collect()
    }

    /// From where on [`Shared::changed`] must look next time, if it looks after this.
    pub async fn horizon(&self) -> Result<String, StoreError> {
        let row = asked(sqlx::query(HORIZON).fetch_one(&self.pool)).await?;
        Ok(row.get("horizon"))
    }

    /// Jobs that other orchestrators changed, as they are now, and where the next page begins if there is one.
    pub async fn changed(
        &self,
        from: &Changed,
        limit: u32,
    ) -> Result<(Vec<(Job, Option<Attempt>)>, Option<Changed>), StoreError> {
        let page = sqlx::query(CHANGED).bind(&from.at).bind(&self.me).bind(i64::from(limit)).bind(&from.job);
        let rows = asked(page.bind(&from.seen).fetch_all(&self.pool)).await?;
        let next = |row: &sqlx::postgres::PgRow| Changed {
            seen: from.seen.clone(),
            at: row.get("changed"),
            job: row.get("id"),
        };
        let last = rows.last().filter(|_| rows.len() >= limit as usize).map(next);
        let read = |row: sqlx::postgres::PgRow| {
            let row = Row::Postgres(row);
            let has_attempt = Reader::new(&row, "jobs", "id").maybe_text("job_id")?.is_some();
            Ok((job::job(&row)?, if has_attempt { Some(job::attempt(&row)?) } else { None }))
        };
        Ok((readable(rows, read), last))
    }

    /// Says to all others that there is something to look at.
    pub async fn notify(&self) -> Result<(), StoreError> {
        asked(sqlx::query(NOTIFY).bind(&self.me).execute(&self.pool)).await?;
        Ok(())
    }

    /// Hears what the others say.
    pub async fn listen(&self) -> Result<Ear, StoreError> {
        let listening = async {
            let mut listener = PgListener::connect_with(&self.pool).await?;
            listener.eager_reconnect(false);
            listener.listen("alloy").await?;
            Ok(listener)
        };
        Ok(Ear { listener: asked(listening).await?, me: self.me.clone() })
    }

    /// The right to the duties that one orchestrator does for all. `None`: another one has it.
    pub async fn duties(&self) -> Result<Option<Duties>, StoreError> {
        let mut conn = asked(self.pool.acquire()).await?.detach();
        let row = asked(sqlx::query(LOCK_DUTIES).fetch_one(&mut conn)).await?;
        Ok(row.get::<bool, _>("mine").then_some(Duties { conn }))
    }
}

/// Notes from other orchestrators.
pub struct Ear {
    listener: PgListener,
    me: String,
}

impl Ear {
    /// Whether the connection is still there. One that was forgotten on its way says nothing, as one does that has nothing to say.
    pub async fn listens(&mut self) -> bool {
        asked(async { self.listener.acquire().await?.ping().await }).await.is_ok()
    }

    /// Returns when another orchestrator said something. An error: listen anew, and look at once.
    pub async fn heard(&mut self) -> Result<(), StoreError> {
        loop {
            match self.listener.try_recv().await.map_err(failed)? {
                Some(note) if note.payload() == self.me => {}
                Some(_) => return Ok(()),
                None => return Err(StoreError::Unavailable("the connection for notes was cut".to_owned())),
            }
        }
    }
}

/// Held as long as its connection stands.
pub struct Duties {
    conn: PgConnection,
}

impl Duties {
    pub async fn still_held(&mut self) -> bool {
        asked(self.conn.ping()).await.is_ok()
    }
}

fn ms(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX / 4)
}

/// What can be read. One row that a newer orchestrator wrote, or a person, keeps nobody from hearing of the others.
fn readable<T>(
    rows: Vec<sqlx::postgres::PgRow>,
    read: impl Fn(sqlx::postgres::PgRow) -> Result<T, StoreError>,
) -> Vec<T> {
    let passed_over = |error: &StoreError| warn!(%error, "a row of another orchestrator is passed over");
    rows.into_iter().filter_map(|row| read(row).inspect_err(passed_over).ok()).collect()
}

fn parsed<T: std::str::FromStr>(text: String, table: &'static str, column: &'static str) -> Result<T, StoreError> {
    text.parse().map_err(|_| StoreError::Corrupt { table, id: text, column })
}

impl SqlStore {
    /// The farm as orchestrators share it; `None` on SQLite, where there is one.
    pub fn shared(&self) -> Option<&Shared> {
        self.shared.as_ref()
    }
}
