//! S: logs in Postgres: rows of bytes that no object holds yet, the objects, and what finished logs were.

use alloy_shared::id::{AttemptRef, Digest, JobId};
use alloy_shared::limits;
use bytes::Bytes;
use sqlx::Row as _;
use sqlx::postgres::{PgPool, PgRow};

use super::fault::{self, asked, within};
use super::statements;
use crate::store::StoreError;

statements! {
    // A row that is there already has been written by somebody else: the whole commit fails. A log that is finished gets none.
    ADD_CHUNKS = "INSERT INTO log_chunks (job_id, attempt, start_at, bytes) SELECT new.job_id, new.attempt, new.start_at, new.bytes \
        FROM UNNEST($1::TEXT[], $2::BIGINT[], $3::BIGINT[], $4::BYTEA[]) AS new (job_id, attempt, start_at, bytes) WHERE NOT EXISTS \
        (SELECT 1 FROM log_seals AS s WHERE s.job_id = new.job_id AND s.attempt = new.attempt)";
    // Whoever appends to a log while it is moved to an object must see either all of its rows or the object. Of rows that came
    // late the last one may end before another.
    LOG_END = "SELECT GREATEST(COALESCE((SELECT MAX(end_at) FROM (SELECT start_at + length(bytes) AS end_at FROM log_chunks \
        WHERE job_id = $1 AND attempt = $2 ORDER BY start_at DESC LIMIT 8) AS c), 0), \
        COALESCE((SELECT MAX(end_at) FROM log_parts WHERE job_id = $1 AND attempt = $2), 0)) AS len";
    LOG_ENDS = "SELECT jobs.id AS job_id, jobs.attempt, GREATEST(\
        COALESCE((SELECT MAX(end_at) FROM (SELECT start_at + length(bytes) AS end_at FROM log_chunks AS c WHERE c.job_id = jobs.id \
        AND c.attempt = jobs.attempt ORDER BY start_at DESC LIMIT 8) AS ends), 0), COALESCE((SELECT MAX(end_at) FROM log_parts AS p WHERE p.job_id = jobs.id \
        AND p.attempt = jobs.attempt), 0)) AS len \
        FROM UNNEST($1::TEXT[]) AS asked (job_id) JOIN jobs ON jobs.id = asked.job_id WHERE jobs.attempt >= 1";
    // No row is longer than the fifth.
    READ_CHUNKS = "SELECT start_at, bytes FROM log_chunks WHERE job_id = $1 AND attempt = $2 \
        AND start_at > $3::BIGINT - $5::BIGINT AND start_at < $4 AND start_at + length(bytes) > $3 ORDER BY start_at";
    LOG_PART = "SELECT start_at, end_at, object FROM log_parts WHERE job_id = $1 AND attempt = $2 AND start_at <= $3 \
        AND end_at > $3 ORDER BY start_at DESC LIMIT 1";
    LOG_SEAL = "SELECT len, sha256 FROM log_seals WHERE job_id = $1 AND attempt = $2";
    ADD_SEAL = "INSERT INTO log_seals (job_id, attempt, len, sha256) VALUES ($1, $2, $3, $4) \
        ON CONFLICT (job_id, attempt) DO NOTHING";
    ADD_PART = "INSERT INTO log_parts (job_id, attempt, start_at, end_at, object) VALUES ($1, $2, $3, $4, $5) \
        ON CONFLICT (job_id, attempt, start_at) DO NOTHING";
    // A row that goes on behind them stays.
    DROP_CHUNKS = "DELETE FROM log_chunks WHERE job_id = $1 AND attempt = $2 AND start_at >= $3 AND start_at < $4 \
        AND start_at + length(bytes) <= $4";
    REMOVE_CHUNKS = "DELETE FROM log_chunks WHERE job_id = $1 AND attempt = $2";
    REMOVE_PARTS = "DELETE FROM log_parts WHERE job_id = $1 AND attempt = $2";
    REMOVE_SEAL = "DELETE FROM log_seals WHERE job_id = $1 AND attempt = $2";
    // Logs with much in rows, and finished ones with anything in them.
    LOGS_TO_MOVE = "SELECT c.job_id, c.attempt FROM log_chunks AS c GROUP BY c.job_id, c.attempt \
        HAVING SUM(length(c.bytes)) >= $1 OR EXISTS (SELECT 1 FROM log_seals AS s \
        WHERE s.job_id = c.job_id AND s.attempt = c.attempt) OR EXISTS (SELECT 1 FROM attempts AS a \
        WHERE a.job_id = c.job_id AND a.attempt = c.attempt AND a.ended_at_ms IS NOT NULL) LIMIT $2";
    FIRST_ROW = "SELECT MIN(start_at) AS start_at FROM log_chunks WHERE job_id = $1 AND attempt = $2";
}

/// An object with a part of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    pub start: u64,
    pub end: u64,
    pub object: String,
}

/// The tables of logs.
#[derive(Debug, Clone)]
pub struct ChunkTable(pub PgPool);

fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn size(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

impl ChunkTable {
    /// Writes rows of any logs at once. `None`: one of them is there already, or a log is finished.
    pub async fn add(&self, rows: &[(AttemptRef, u64, Bytes)]) -> Result<Option<()>, StoreError> {
        let jobs: Vec<String> = rows.iter().map(|(at, ..)| at.job.to_string()).collect();
        let attempts: Vec<i64> = rows.iter().map(|(at, ..)| at.attempt.into()).collect();
        let starts: Vec<i64> = rows.iter().map(|(_, start, _)| number(*start)).collect();
        let bytes: Vec<&[u8]> = rows.iter().map(|(.., bytes)| &bytes[..]).collect();
        let insert = sqlx::query(ADD_CHUNKS).bind(&jobs).bind(&attempts).bind(&starts).bind(&bytes);
        let added = async {
            match insert.execute(&self.0).await {
                Ok(done) => Ok((done.rows_affected() == rows.len() as u64).then_some(())),
                Err(sqlx::Error::Database(error)) if error.is_unique_violation() => Ok(None),
                Err(error) => Err(fault::of_commit(error)),
            }
        };
        within(limits::STORE_COMMIT_MS, StoreError::Unknown, added).await
    }

    pub async fn end(&self, at: &AttemptRef) -> Result<u64, StoreError> {
        let row = asked(self.asked(LOG_END, at).fetch_one(&self.0)).await?;
        Ok(size(row.get("len")))
    }

    /// How long the logs of these jobs' newest attempts are.
    pub async fn ends(&self, jobs: &[JobId]) -> Result<Vec<(AttemptRef, u64)>, StoreError> {
        let jobs: Vec<String> = jobs.iter().map(JobId::to_string).collect();
        let rows = asked(sqlx::query(LOG_ENDS).bind(&jobs).fetch_all(&self.0)).await?;
        rows.iter().map(|row| Ok((attempt(row)?, size(row.get("len"))))).collect()
    }

    /// The rows with bytes of `from..to`.
    pub async fn rows(&self, at: &AttemptRef, from: u64, to: u64) -> Result<Vec<(u64, Bytes)>, StoreError> {
        let all = self.asked(READ_CHUNKS, at).bind(number(from)).bind(number(to)).bind(number(ROW_MAX));
        let rows = asked(all.fetch_all(&self.0)).await?;
        let read = rows.into_iter().map(|row| (size(row.get("start_at")), Bytes::from(row.get::<Vec<u8>, _>("bytes"))));
        Ok(read.collect())
    }

    /// The object with the byte at `from`, if one has it.
    pub async fn part(&self, at: &AttemptRef, from: u64) -> Result<Option<Part>, StoreError> {
        let row = asked(self.asked(LOG_PART, at).bind(number(from)).fetch_optional(&self.0)).await?;
        Ok(row.map(|row| Part {
            start: size(row.get("start_at")),
            end: size(row.get("end_at")),
            object: row.get("object"),
        }))
    }

    pub async fn seal(&self, at: &AttemptRef) -> Result<Option<(u64, Digest)>, StoreError> {
        let row = asked(self.asked(LOG_SEAL, at).fetch_optional(&self.0)).await?;
        let Some(row) = row else { return Ok(None) };
        let sha256: String = row.get("sha256");
        let corrupt = |_| StoreError::Corrupt { table: "log_seals", id: at.to_string(), column: "sha256" };
        Ok(Some((size(row.get("len")), sha256.parse().map_err(corrupt)?)))
    }

    /// The first seal stays.
    pub async fn add_seal(&self, at: &AttemptRef, len: u64, sha256: Digest) -> Result<(), StoreError> {
        let insert = self.asked(ADD_SEAL, at).bind(number(len)).bind(sha256.to_string());
        asked(insert.execute(&self.0)).await?;
        Ok(())
    }

    /// Removes all that is known of a log.
    pub async fn remove(&self, at: &AttemptRef) -> Result<(), StoreError> {
        let removed = async {
            let mut tx = self.0.begin().await.map_err(fault::of)?;
            for text in [REMOVE_CHUNKS, REMOVE_PARTS, REMOVE_SEAL] {
                self.asked(text, at).execute(&mut *tx).await.map_err(fault::of)?;
            }
            tx.commit().await.map_err(fault::of_commit)
        };
        within(limits::STORE_COMMIT_MS, StoreError::Unknown, removed).await
    }

    /// From here on an object has these bytes, and no row. Objects have those from `first` on already. False: another
    /// orchestrator has moved them.
    pub async fn moved(&self, at: &AttemptRef, first: u64, part: &Part) -> Result<bool, StoreError> {
        let moved = async {
            let mut tx = self.0.begin().await.map_err(fault::of)?;
            let insert = self.asked(ADD_PART, at).bind(number(part.start)).bind(number(part.end)).bind(&part.object);
            if insert.execute(&mut *tx).await.map_err(fault::of)?.rows_affected() == 0 {
                tx.rollback().await.map_err(fault::of)?;
                return Ok(false);
            }
            let delete = self.asked(DROP_CHUNKS, at).bind(number(first)).bind(number(part.end));
            delete.execute(&mut *tx).await.map_err(fault::of)?;
            tx.commit().await.map_err(fault::of_commit)?;
            Ok(true)
        };
        within(limits::STORE_COMMIT_MS, StoreError::Unknown, moved).await
    }

    /// Removes rows between these ends, of which objects have every byte. True: there were some.
    pub async fn drop_moved(&self, at: &AttemptRef, first: u64, end: u64) -> Result<bool, StoreError> {
        let delete = self.asked(DROP_CHUNKS, at).bind(number(first)).bind(number(end));
        Ok(asked(delete.execute(&self.0)).await?.rows_affected() > 0)
    }

    /// Logs with at least so many bytes in rows, and those to which nothing more belongs.
    pub async fn to_move(&self, bytes: u64, limit: u32) -> Result<Vec<AttemptRef>, StoreError> {
        let all = sqlx::query(LOGS_TO_MOVE).bind(number(bytes)).bind(i64::from(limit));
        asked(all.fetch_all(&self.0)).await?.iter().map(attempt).collect()
    }

    /// Where the first row of a log begins.
    pub async fn first(&self, at: &AttemptRef) -> Result<Option<u64>, StoreError> {
        let row = asked(self.asked(FIRST_ROW, at).fetch_one(&self.0)).await?;
        Ok(row.get::<Option<i64>, _>("start_at").map(size))
    }

    fn asked<'q>(
        &self,
        text: &'static str,
        at: &AttemptRef,
    ) -> sqlx::query::Query<'q, sqlx::Postgres, sqlx::postgres::PgArguments> {
        sqlx::query(text).bind(at.job.to_string()).bind(i64::from(at.attempt))
    }
}

/// The most bytes of one row.
pub const ROW_MAX: u64 = 1 << 20;

fn attempt(row: &PgRow) -> Result<AttemptRef, StoreError> {
    let job: String = row.get("job_id");
    let corrupt = |_| StoreError::Corrupt { table: "log_chunks", id: job.clone(), column: "job_id" };
    let id: JobId = job.parse().map_err(corrupt)?;
    Ok(AttemptRef { job: id, attempt: u32::try_from(row.get::<i64, _>("attempt")).unwrap_or(0) })
}
