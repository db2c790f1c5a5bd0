//! S: what moves and backups ask of a Postgres besides its tables: that one moves at a time, and all logs as they are at one moment.

use alloy_shared::id::{AttemptRef, Digest};
use bytes::Bytes;
use sqlx::Row as _;
use sqlx::postgres::{PgConnection, PgPool};

use super::chunks::{LOG_SEAL, Part, READ_CHUNKS, ROW_MAX};
use super::open::OpenError;
use super::reach::plain_postgres;
use super::statements;

// Postgres alone runs them.
statements! {
    // Some of these only newer versions have.
    WITHOUT_LIMITS = "SELECT set_config(name, '0', FALSE) FROM pg_settings WHERE name IN ('statement_timeout', 'lock_timeout', \
        'idle_in_transaction_session_timeout', 'idle_session_timeout', 'transaction_timeout')";
    EXPORT_VIEW = "SELECT pg_export_snapshot()";
    LOCK_MOVE = "SELECT pg_try_advisory_lock(72617265, 2) AS mine";
    LOCK_LETTING_GO = "SELECT pg_advisory_lock(72617265, 3)";
    FORGET_RESTORED = "DELETE FROM meta WHERE name = 'restored'";
    ALL_LOGS = "SELECT job_id, attempt FROM log_chunks UNION SELECT job_id, attempt FROM log_parts \
        UNION SELECT job_id, attempt FROM log_seals";
    PARTS_OF_LOG = "SELECT start_at, end_at, object FROM log_parts WHERE job_id = $1 AND attempt = $2 ORDER BY start_at";
}

/// Held by the one who moves a farm into a database, as long as its connection stands.
pub struct MoveLock {
    _conn: PgConnection,
}

impl MoveLock {
    /// `None`: somebody else has it.
    pub async fn take(url: &str) -> Result<Option<Self>, OpenError> {
        let mut conn = plain_postgres(url).await?;
        let mine: bool = sqlx::query_scalar(LOCK_MOVE).fetch_one(&mut conn).await?;
        Ok(mine.then_some(Self { _conn: conn }))
    }
}

/// Held by the one who lets go of what a restored farm held, as long as its connection stands.
pub struct Turn {
    _conn: PgConnection,
}

/// Waits for whoever has its turn.
pub async fn one_after_another(pool: &PgPool) -> Result<Turn, OpenError> {
    let mut conn = pool.acquire().await?.detach();
    // It may take long.
    sqlx::query("SET statement_timeout = 0").execute(&mut conn).await?;
    sqlx::query(LOCK_LETTING_GO).execute(&mut conn).await?;
    Ok(Turn { _conn: conn })
}

/// The farm that was restored here is one like any other from now on.
pub async fn forget_restored(pool: &PgPool) -> Result<(), OpenError> {
    sqlx::query(FORGET_RESTORED).execute(pool).await?;
    Ok(())
}

fn size(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

/// The logs of a connection that stands still.
pub struct LogsThen<'a>(pub &'a mut PgConnection);

impl LogsThen<'_> {
    pub async fn all(&mut self) -> Result<Vec<AttemptRef>, OpenError> {
        let rows: Vec<(String, i64)> = sqlx::query_as(ALL_LOGS).fetch_all(&mut *self.0).await?;
        let mut all: Vec<AttemptRef> = rows
            .iter()
            .filter_map(|(job, attempt)| {
                Some(AttemptRef { job: job.parse().ok()?, attempt: u32::try_from(*attempt).ok()? })
            })
            .collect();
        all.sort_by_key(|at| (at.job, at.attempt));
        Ok(all)
    }

    pub async fn parts(&mut self, at: &AttemptRef) -> Result<Vec<Part>, OpenError> {
        let asked = sqlx::query(PARTS_OF_LOG).bind(at.job.to_string()).bind(i64::from(at.attempt));
        let rows = asked.fetch_all(&mut *self.0).await?;
        let part = |row: sqlx::postgres::PgRow| Part {
            start: size(row.get("start_at")),
            end: size(row.get("end_at")),
            object: row.get("object"),
        };
        Ok(rows.into_iter().map(part).collect())
    }

    /// The rows with bytes of `from..to`.
    pub async fn rows(&mut self, at: &AttemptRef, from: u64, to: u64) -> Result<Vec<(u64, Bytes)>, OpenError> {
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let asked = sqlx::query(READ_CHUNKS).bind(at.job.to_string()).bind(i64::from(at.attempt));
        let asked = asked.bind(number(from)).bind(number(to)).bind(number(ROW_MAX));
        let rows = asked.fetch_all(&mut *self.0).await?;
        let row = |row: sqlx::postgres::PgRow| (size(row.get("start_at")), Bytes::from(row.get::<Vec<u8>, _>("bytes")));
        Ok(rows.into_iter().map(row).collect())
    }

    pub async fn seal(&mut self, at: &AttemptRef) -> Result<Option<(u64, Digest)>, OpenError> {
        let asked = sqlx::query(LOG_SEAL).bind(at.job.to_string()).bind(i64::from(at.attempt));
        let row = asked.fetch_optional(&mut *self.0).await?;
        let seal = |row: sqlx::postgres::PgRow| {
            let sha256: String = row.get("sha256");
            Some((size(row.get("len")), sha256.parse().ok()?))
        };
        Ok(row.and_then(seal))
    }
}
