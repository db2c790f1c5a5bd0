//! S: a database as it was at one moment, beside the process that writes it; and what a file like that says it needs.

use std::path::{Path, PathBuf};
use std::time::Duration;

use alloy_shared::limits;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions as _, Connection as _};

use super::blob::META;
use super::open::{MIGRATIONS, OpenError};
use super::tables::Tables;
use super::{SqlStore, fault, statements};

// They read a whole file that nobody else uses.
statements! {
    OBJECTS = "SELECT DISTINCT object FROM blobs";
    ENDED_LOGS = "SELECT job_id, attempt, log_len FROM attempts WHERE log_len > 0";
    LOGS_LEFT = "SELECT job_id, attempt, log_len FROM attempts WHERE log_len > 0 AND log_gone_at_ms IS NULL";
    HAS_RETENTION = "SELECT COUNT(*) AS found FROM _sqlx_migrations WHERE version = 4";
}

/// What must lie beside a database for it to be whole.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needs {
    /// Keys of objects.
    pub objects: Vec<String>,
    /// Logs of attempts that are closed: job, attempt, length.
    pub logs: Vec<(String, i64, u64)>,
}

/// The newest migration of this build.
pub fn schema() -> i64 {
    MIGRATIONS.iter().map(|(version, _, _)| *version).max().unwrap_or(0)
}

/// Copies the database at one moment into a new file, while others write it. Nothing is synced.
pub async fn copy_at_once(from: &Path, to: &Path) -> Result<(), OpenError> {
    let options = SqliteConnectOptions::new()
        .filename(from)
        .read_only(true)
        .busy_timeout(Duration::from_millis(limits::STORE_BUSY_MS))
        .pragma("temp_store", "MEMORY");
    let mut conn = named(from, options.disable_statement_logging().connect().await)?;
    let done = sqlx::query("VACUUM INTO ?1").bind(to.display().to_string()).execute(&mut conn).await;
    named(from, done)?;
    Ok(conn.close().await?)
}

/// Gives a copy the tables of this version. One of a newer version is refused: what it has more would be left behind.
pub async fn upgrade(copy: &Path) -> Result<(), OpenError> {
    let mut tables = Tables::file(copy).await?;
    tables.refuse_newer().await?;
    tables.close().await?;
    SqlStore::open_sqlite(copy).await?.close().await;
    Ok(())
}

/// Checks a file that nobody writes, to its last page, and reads what it needs.
pub async fn examine(path: &Path) -> Result<Needs, OpenError> {
    let options = SqliteConnectOptions::new().filename(path).read_only(true).immutable(true);
    let mut conn = named(path, options.disable_statement_logging().connect().await)?;
    let needs = read(&mut conn, path).await?;
    conn.close().await?;
    Ok(needs)
}

/// Reads what a file needs that nobody writes and that was examined as it is.
pub async fn needs_of(path: &Path) -> Result<Needs, OpenError> {
    let options = SqliteConnectOptions::new().filename(path).read_only(true).immutable(true);
    let mut conn = named(path, options.disable_statement_logging().connect().await)?;
    let needs = needs(&mut conn, path).await?;
    conn.close().await?;
    Ok(needs)
}

/// A named value of a database that somebody may be writing.
pub async fn meta_of(path: &Path, name: &str) -> Result<Option<String>, OpenError> {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .read_only(true)
        .busy_timeout(Duration::from_millis(limits::STORE_BUSY_MS));
    let mut conn = named(path, options.disable_statement_logging().connect().await)?;
    let row: Option<(String, String)> = named(path, sqlx::query_as(META).bind(name).fetch_optional(&mut conn).await)?;
    conn.close().await?;
    Ok(row.map(|(_, value)| value))
}

async fn read(conn: &mut SqliteConnection, path: &Path) -> Result<Needs, OpenError> {
    let found = sqlx::query_scalar::<_, String>("PRAGMA integrity_check(10)").fetch_all(&mut *conn).await;
    let found = named(path, found)?;
    if found != ["ok"] {
        return Err(OpenError::Damaged { path: path.to_owned(), found: found.join("; ") });
    }
    needs(conn, path).await
}

async fn needs(conn: &mut SqliteConnection, path: &Path) -> Result<Needs, OpenError> {
    let objects = named(path, sqlx::query_scalar(OBJECTS).fetch_all(&mut *conn).await)?;
    // A backup of an earlier version has all of its logs.
    let retains: i64 = named(path, sqlx::query_scalar(HAS_RETENTION).fetch_one(&mut *conn).await)?;
    let logs = if retains > 0 { LOGS_LEFT } else { ENDED_LOGS };
    let logs: Vec<(String, i64, i64)> = named(path, sqlx::query_as(logs).fetch_all(&mut *conn).await)?;
    let logs = logs.into_iter().map(|(job, attempt, len)| (job, attempt, u64::try_from(len).unwrap_or(0))).collect();
    Ok(Needs { objects, logs })
}

/// Says which file is damaged.
fn named<T>(path: &Path, done: Result<T, sqlx::Error>) -> Result<T, OpenError> {
    done.map_err(|error| match fault::damage(&error) {
        Some(found) => OpenError::Damaged { path: PathBuf::from(path), found },
        None => OpenError::Db(error),
    })
}
