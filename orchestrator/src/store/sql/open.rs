//! S: opening and closing a database: its settings, its version, its schema, its health.

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use alloy_shared::limits;
use sqlx::migrate::{MigrateError, Migration, MigrationType, Migrator};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection as _, SqlSafeStr};

use super::conn::Db;
use super::reach::{PREPARED, address, connect, refuse_pooling, said, told};
use super::shared::SET;
use super::{Shared, SqlStore, fault};
use crate::broken::Broken;

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("SQLite {found} can lose a write after its log is reset; {}.{}.{} or newer is needed", SQLITE_MIN.0, SQLITE_MIN.1, SQLITE_MIN.2)]
    OldSqlite { found: String },
    /// The file is damaged; the text is SQLite's own.
    #[error("{} is damaged: {found}; restore it from a backup", path.display())]
    Damaged { path: PathBuf, found: String },
    #[error(
        "port 6543 is a transaction pooler, which keeps neither prepared statements nor locks between transactions; \
         use the direct connection or the session pooler on port 5432"
    )]
    TransactionPooler,
    #[error(
        "the database is behind a pooler that gives every transaction another connection, which keeps neither locks nor \
         notes: let the pooler work in session mode, or connect to the database itself"
    )]
    PooledByTransaction,
    #[error(
        "the database's address cannot be read: {0}; it is postgres://USER:PASSWORD@HOST:PORT/DATABASE, and a password is \
         percent-encoded in it: %23 for #, %2F for /, %3F for ?, %40 for @"
    )]
    Url(String),
    /// A Postgres does not do what it is asked for, in its own words; the rest is what to do about it.
    #[error("the database at {at}: {why}; {hint}")]
    Postgres { at: String, why: String, hint: &'static str },
    /// It has been through a migration that this version does not know.
    #[error(
        "the database is of a newer version (migration {0}) and holds what this one does not know: use the `alloy` of the \
         version that the farm runs"
    )]
    Newer(i64),
    #[error("the database's schema cannot be brought up to date: {0}")]
    Migrate(#[from] MigrateError),
    #[error("{}: the database cannot be opened: {why}", path.display())]
    File { path: PathBuf, why: String },
    #[error("the database cannot be used: {0}")]
    Db(#[from] sqlx::Error),
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
}

impl OpenError {
    /// The address makes no sense, whatever is there.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Url(_) | Self::TransactionPooler => true,
            Self::OldSqlite { .. }
            | Self::Damaged { .. }
            | Self::Postgres { .. }
            | Self::PooledByTransaction
            | Self::Newer(_)
            | Self::Migrate(_)
            | Self::File { .. }
            | Self::Db(_)
            | Self::Io { .. } => false,
        }
    }
}

/// The first version without the WAL-reset bug.
const SQLITE_MIN: (u32, u32, u32) = (3, 51, 3);
type Migrations = &'static [(i64, &'static str, &'static str)];
pub(super) const MIGRATIONS: Migrations = &[
    (1, "farm", include_str!("../../../migrations/0001_farm.sql")),
    (2, "images", include_str!("../../../migrations/0002_images.sql")),
    (3, "members", include_str!("../../../migrations/0003_members.sql")),
    (4, "retention", include_str!("../../../migrations/0004_retention.sql")),
];
/// What only Postgres has. Their numbers begin above all that both engines may ever have.
const POSTGRES_ONLY: Migrations = &[
    (1000, "side_by_side", include_str!("../../../migrations/postgres/1000_side_by_side.sql")),
    (1001, "row_security", include_str!("../../../migrations/postgres/1001_row_security.sql")),
    (1002, "views", include_str!("../../../migrations/postgres/1002_views.sql")),
    (1003, "retention_security", include_str!("../../../migrations/postgres/1003_retention_security.sql")),
    (1010, "swift_jobs", include_str!("../../../migrations/postgres/1010_swift_jobs.sql")),
];
/// A connection that does not answer for so long is no longer one.
const RELEASE: Duration = Duration::from_secs(1);
/// What a migration waits for a table that somebody reads: whoever comes behind it waits too.
const MIGRATION_LOCK: &str = "SET lock_timeout = '10s'";
/// Migrations take their time.
const MIGRATION: &str = "SET statement_timeout = 0";

/// Brings the tables to this version, after whoever does the same.
async fn migrate(options: &PgConnectOptions) -> Result<(), OpenError> {
    let mut conn = connect(options).await?;
    sqlx::query(MIGRATION).execute(&mut conn).await?;
    // Freed with the connection.
    sqlx::migrate::Migrate::lock(&mut conn).await?;
    sqlx::query(MIGRATION_LOCK).execute(&mut conn).await?;
    ours(postgres_migrations()).run(&mut conn).await.map_err(|error| match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => told(options, error),
        error => error.into(),
    })?;
    Ok(conn.close().await?)
}

impl SqlStore {
    /// Opens the file, or makes it. The caller holds the directory's `DataLock`.
    pub async fn open_sqlite(path: &Path) -> Result<Self, OpenError> {
        let at = || path.to_owned();
        Self::open_file(path).await.map_err(|error| match (damage(&error), error) {
            (Some(found), _) => OpenError::Damaged { path: at(), found },
            (None, OpenError::Db(_)) if path.is_dir() => {
                OpenError::File { path: at(), why: "it is a directory".into() }
            }
            (None, OpenError::Db(error)) => OpenError::File { path: at(), why: said(&error) },
            (None, error) => error,
        })
    }

    async fn open_file(path: &Path) -> Result<Self, OpenError> {
        let mut marker = path.as_os_str().to_owned();
        marker.push(".open");
        let marker = PathBuf::from(marker);
        let write = SqlitePoolOptions::new()
            .max_connections(1)
            .acquire_timeout(Duration::from_millis(limits::STORE_COMMIT_MS))
            .test_before_acquire(false)
            .idle_timeout(None)
            .max_lifetime(None)
            .connect_with(sqlite(path).create_if_missing(true).pragma("cache_size", "-65536"))
            .await?;
        check_version(&write).await?;
        let unclean = fs::exists(&marker).map_err(|error| OpenError::Io { path: marker.clone(), error })?;
        if unclean {
            settle_log(&write).await?;
            check_pages(&write, path).await?;
        }
        fs::write(&marker, "").map_err(|error| OpenError::Io { path: marker.clone(), error })?;
        migrator(MIGRATIONS).run(&write).await?;
        let read = SqlitePoolOptions::new()
            .max_connections(limits::STORE_READERS)
            .acquire_timeout(Duration::from_millis(limits::STORE_READ_MS))
            .test_before_acquire(false)
            .idle_timeout(None)
            .max_lifetime(None)
            .connect_with(sqlite(path).read_only(true).pragma("cache_size", "-16384"))
            .await?;
        Ok(Self { db: Db::Sqlite { write, read }, marker: Some(marker), broken: Broken::default(), shared: None })
    }

    /// Opens a direct or session-mode connection.
    pub async fn open_postgres(url: &str) -> Result<Self, OpenError> {
        Self::open_pool(address(url)?, None).await
    }

    /// The same as one of several orchestrators, under this name.
    pub async fn open_shared(url: &str, me: String) -> Result<Self, OpenError> {
        let options = address(url)?;
        refuse_pooling(&options).await?;
        Self::open_pool(options, Some(me)).await
    }

    async fn open_pool(options: PgConnectOptions, me: Option<String>) -> Result<Self, OpenError> {
        let options = options.application_name("alloy").statement_cache_capacity(PREPARED).disable_statement_logging();
        let (names, values) = settings(me.clone().unwrap_or_default());
        let pool = PgPoolOptions::new()
            .max_connections(limits::STORE_CONNECTIONS)
            .acquire_timeout(Duration::from_millis(limits::STORE_CONNECT_MS))
            .after_connect(move |conn, _| {
                let (names, values) = (names.clone(), values.clone());
                Box::pin(async move {
                    // Not at connecting: poolers refuse most of what may be said there.
                    sqlx::query(SET).bind(names).bind(values).execute(&mut *conn).await?;
                    Ok(())
                })
            })
            // One that was in use a moment ago is there: to ask it each time would be one more exchange for each commit.
            .test_before_acquire(false)
            .before_acquire(|conn, lately| {
                Box::pin(async move {
                    if lately.idle_for >= IDLE_TRUSTED {
                        conn.ping().await?;
                    }
                    Ok(true)
                })
            })
            // It asks whoever was let go of in the middle of an answer, and without this for as long as the kernel likes.
            .after_release(|conn, _| {
                Box::pin(async move {
                    match tokio::time::timeout(RELEASE, conn.ping()).await {
                        Ok(asked) => asked.map(|()| true),
                        Err(_) => Err(sqlx::Error::PoolTimedOut),
                    }
                })
            })
            .connect_with(options.clone())
            .await
            .map_err(|error| told(&options, error))?;
        migrate(&options).await?;
        let shared = me.map(|me| Shared::new(pool.clone(), me));
        Ok(Self { db: Db::Postgres(pool), marker: None, broken: Broken::default(), shared })
    }

    /// Lets go of the database in good order: what follows a stop without it is a check of every page.
    pub async fn close(&self) {
        if self.broken.is_told() {
            // Closing would write. The next start finds the marker, and the log as it is.
            return;
        }
        match &self.db {
            Db::Sqlite { write, read } => {
                read.close().await;
                write.close().await;
            }
            Db::Postgres(pool) => pool.close().await,
        }
        if let Some(marker) = &self.marker
            && let Err(error) = fs::remove_file(marker)
        {
            tracing::warn!(path = %marker.display(), %error, "the next start will check the whole database");
        }
    }
}

/// For so long a connection that lay idle is taken as it is.
const IDLE_TRUSTED: Duration = Duration::from_secs(1);

/// What each connection to Postgres is told: names and values.
fn settings(me: String) -> (Vec<&'static str>, Vec<String>) {
    let patience = [
        ("statement_timeout", limits::STORE_READ_MS.to_string()),
        ("idle_in_transaction_session_timeout", (limits::STORE_READ_MS + 1_000).to_string()),
        ("alloy.by", me),
    ];
    // Every text here searches by an index for few rows. A plan that is made once for all, by a table that was small at the time,
    // or for an array of unknown length, would else walk through a table that has grown.
    let plans = ["enable_seqscan", "enable_hashjoin", "enable_mergejoin", "jit"].map(|name| (name, "off".to_owned()));
    // A host that lost its power does not say that its connections are over. The server asks, and after some 20 s what they
    // locked is free again, above all the right to the duties. It does not ask while an answer is on its way: that one has as long.
    let keepalives = [
        ("tcp_keepalives_idle", "10"),
        ("tcp_keepalives_interval", "5"),
        ("tcp_keepalives_count", "3"),
        ("tcp_user_timeout", "20000"),
    ];
    let keepalives = keepalives.map(|(name, value)| (name, value.to_owned()));
    patience.into_iter().chain(plans).chain(keepalives).unzip()
}

fn sqlite(path: &Path) -> SqliteConnectOptions {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(Duration::from_millis(limits::STORE_BUSY_MS))
        .statement_cache_capacity(PREPARED)
        .pragma("mmap_size", "0")
        .pragma("temp_store", "MEMORY")
        // A checkpoint costs two syncs: one for 16 MiB of log is cheaper than one for 4, and a start still reads it at once.
        .pragma("wal_autocheckpoint", "4000")
        .pragma("journal_size_limit", "67108864")
        .disable_statement_logging();
    full_sync(options)
}

/// Plain fsync leaves the bytes in the drive's cache here.
#[cfg(target_os = "macos")]
fn full_sync(options: SqliteConnectOptions) -> SqliteConnectOptions {
    options.pragma("fullfsync", "1").pragma("checkpoint_fullfsync", "1")
}

#[cfg(not(target_os = "macos"))]
fn full_sync(options: SqliteConnectOptions) -> SqliteConnectOptions {
    options
}

async fn check_version(pool: &SqlitePool) -> Result<(), OpenError> {
    let found: String = sqlx::query_scalar("SELECT sqlite_version()").fetch_one(pool).await?;
    if parse_version(&found).is_some_and(|version| version >= SQLITE_MIN) {
        Ok(())
    } else {
        Err(OpenError::OldSqlite { found })
    }
}

fn parse_version(text: &str) -> Option<(u32, u32, u32)> {
    let mut parts = text.split('.').map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??, parts.next()??))
}

/// A process whose sync failed leaves a log that reads well and lies in memory only: the disk may lack pages of it for ever,
/// and what is appended behind them would be cut off with them. So the whole log goes into the database first.
async fn settle_log(pool: &SqlitePool) -> Result<(), OpenError> {
    let (busy, _, _): (i64, i64, i64) = sqlx::query_as("PRAGMA wal_checkpoint(TRUNCATE)").fetch_one(pool).await?;
    if busy != 0 {
        tracing::warn!("another process reads the database: its log is settled later");
    }
    Ok(())
}

async fn check_pages(pool: &SqlitePool, path: &Path) -> Result<(), OpenError> {
    tracing::info!(path = %path.display(), "the farm did not stop in good order: checking the database");
    let found: Vec<String> = sqlx::query_scalar("PRAGMA quick_check(10)").fetch_all(pool).await?;
    match found.as_slice() {
        [only] if only == "ok" => Ok(()),
        _ => Err(OpenError::Damaged { path: path.to_owned(), found: found.join("; ") }),
    }
}

/// Some damage is met before it is looked for.
fn damage(error: &OpenError) -> Option<String> {
    let error = match error {
        OpenError::Db(error) | OpenError::Migrate(MigrateError::Execute(error)) => error,
        OpenError::Migrate(_)
        | OpenError::OldSqlite { .. }
        | OpenError::Damaged { .. }
        | OpenError::TransactionPooler
        | OpenError::PooledByTransaction
        | OpenError::Url(_)
        | OpenError::Postgres { .. }
        | OpenError::File { .. }
        | OpenError::Newer(_)
        | OpenError::Io { .. } => return None,
    };
    fault::damage(error)
}

/// All that a farm's Postgres goes through, in this order.
pub fn postgres_migrations() -> Vec<Migration> {
    [migrations(MIGRATIONS), migrations(POSTGRES_ONLY)].concat()
}

fn migrator(list: Migrations) -> Migrator {
    ours(migrations(list))
}

/// A newer version may have added to the schema: nothing of it is in the way of this one until the version after that.
fn ours(list: Vec<Migration>) -> Migrator {
    let mut migrator = Migrator::with_migrations(list);
    migrator.set_ignore_missing(true);
    migrator
}

/// The migrations of a farm's SQLite file, in their order.
pub fn sqlite_migrations() -> Vec<Migration> {
    migrations(MIGRATIONS)
}

fn migrations(list: Migrations) -> Vec<Migration> {
    let migration = |(version, name, text): &(i64, &'static str, &'static str)| {
        Migration::new(*version, (*name).into(), MigrationType::Simple, text.into_sql_str(), false)
    };
    list.iter().map(migration).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Group, Store as _, StoreError, Write};

    #[tokio::test]
    async fn a_database_whose_disk_failed_commits_nothing_and_is_checked_by_the_next_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("alloy.db");
        let store = SqlStore::open_sqlite(&path).await.unwrap();
        let add = |name| [Group(vec![Write::AddMeta { name, value: "v".into() }])];
        store.commit(&add("before")).await.unwrap();
        store.broken().tell("a test", &"EIO");
        assert!(matches!(store.commit(&add("after")).await, Err(StoreError::Broken(_))));
        store.close().await;
        assert!(dir.path().join("alloy.db.open").exists(), "it did not end well");
        let log = dir.path().join("alloy.db-wal");
        assert!(fs::metadata(&log).unwrap().len() > 0);
        let next = SqlStore::open_sqlite(&path).await.unwrap();
        assert_eq!(fs::metadata(&log).unwrap().len(), 0, "all of it is in the database itself");
        assert_eq!(next.meta("before").await.unwrap().as_deref(), Some("v"));
        assert_eq!(next.meta("after").await.unwrap(), None);
    }

    #[test]
    fn versions_compare_by_their_numbers() {
        for (text, fine) in [("3.51.3", true), ("3.51.2", false), ("3.9.99", false), ("3.100.0", true), ("4", false)] {
            assert_eq!(parse_version(text).is_some_and(|version| version >= SQLITE_MIN), fine, "{text}");
        }
    }
}
