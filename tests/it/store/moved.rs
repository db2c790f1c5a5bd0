//! T: every row of every table goes from one engine to the other, and follows what changes; no table is forgotten.

use alloy_tests::observe::until;
use alloy_tests::pg;
use orchestrator::store::sql::tables::{Known, Tables, bring, copy_to_file};
use orchestrator::store::sql::{CATALOGUE, SqlStore};
use sqlx::{AssertSqlSafe, Column, Connection, Executor, PgConnection, SqlSafeStr, SqliteConnection, Statement};

use super::migrations::file_with_rows;

/// What has no place in another database: it belongs to this one, or to who uses it right now.
const LEFT: &[&str] = &["_sqlx_migrations", "orchestrators", "sessions"];
/// Logs are files on the one side and these on the other: they are moved as logs, byte by byte.
const LOGS: &[&str] = &["log_chunks", "log_parts", "log_seals"];
/// Columns that Postgres fills by itself.
const OWN: &[(&str, &str)] = &[("jobs", "changed"), ("jobs", "changed_by")];

const FILE_TABLES: &str = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'";
const SHARED_TABLES: &str = "SELECT table_name::TEXT FROM information_schema.tables WHERE table_schema = 'public' AND table_type = 'BASE TABLE'";
const SHARED_COLUMNS: &str =
    "SELECT column_name::TEXT FROM information_schema.columns WHERE table_schema = 'public' AND table_name = $1";

/// The columns of the text that reads a table to be moved.
async fn columns_moved(file: &mut SqliteConnection, table: &str) -> Vec<String> {
    let name = format!("ALL_{}", table.to_uppercase());
    let text = CATALOGUE.iter().flat_map(|part| part.iter()).find(|(known, _)| *known == name);
    let (_, text) = text.unwrap_or_else(|| {
        panic!("table {table} is neither moved (store/sql/tables.rs) nor named here as what is left behind")
    });
    let text = file.prepare(text.into_sql_str()).await.unwrap();
    let mut columns: Vec<String> = text.columns().iter().map(|column| column.name().to_owned()).collect();
    columns.sort();
    columns
}

#[tokio::test]
async fn every_table_and_every_column_is_moved_or_named_as_left_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("farm.db");
    file_with_rows(&path).await;
    let url = pg::database().await;
    let (mut from, mut to) = (Tables::file(&path).await.unwrap(), Tables::postgres(&url).await.unwrap());
    let here = bring(&mut from, &mut to, &mut Known::default()).await.unwrap();
    let there = to.tally(None).await.unwrap();
    assert_eq!(here, there);

    let mut file = SqliteConnection::connect(path.to_str().unwrap()).await.unwrap();
    let mut shared = PgConnection::connect(&url).await.unwrap();
    let tables: Vec<String> = sqlx::query_scalar(FILE_TABLES).fetch_all(&mut file).await.unwrap();
    let mut moved: Vec<String> = tables.into_iter().filter(|table| !LEFT.contains(&table.as_str())).collect();
    for table in &moved {
        let tally = there.iter().find(|(name, _)| name == table);
        assert_eq!(tally.unwrap_or_else(|| panic!("{table} is not moved")).1.rows, 1, "{table}");
        let columns = columns_moved(&mut file, table).await;
        let info = AssertSqlSafe(format!("SELECT name FROM pragma_table_info('{table}') ORDER BY name"));
        let has: Vec<String> = sqlx::query_scalar(info).fetch_all(&mut file).await.unwrap();
        assert_eq!(columns, has, "the columns of {table} in a file");
        let mut has: Vec<String> = sqlx::query_scalar(SHARED_COLUMNS).bind(table).fetch_all(&mut shared).await.unwrap();
        has.retain(|column| !OWN.contains(&(table.as_str(), column.as_str())));
        has.sort();
        assert_eq!(columns, has, "the columns of {table} in Postgres");
    }
    moved.extend(LEFT.iter().chain(LOGS).map(|table| (*table).to_owned()));
    moved.sort();
    let mut all: Vec<String> = sqlx::query_scalar(SHARED_TABLES).fetch_all(&mut shared).await.unwrap();
    all.sort();
    assert_eq!(all, moved, "a table of Postgres alone is moved in a way of its own, or named as left behind");

    // And back.
    let back = dir.path().join("back.db");
    copy_to_file(&mut to, &back).await.unwrap();
    assert_eq!(Tables::file(&back).await.unwrap().tally(None).await.unwrap(), here);
}

/// Two rows that change, and change back, and go; and what refers to them.
const CHANGES: &[&[&str]] = &[
    &["UPDATE members SET role = 'viewer'", "UPDATE workers SET draining = TRUE"],
    &["UPDATE members SET role = 'admin'", "UPDATE workers SET draining = FALSE"],
    &["DELETE FROM members", "UPDATE trash SET gone = FALSE", "UPDATE attempts SET log_gone_at_ms = 5"],
    &["DELETE FROM artifacts", "DELETE FROM events", "DELETE FROM attempts", "DELETE FROM jobs", "DELETE FROM blobs"],
];

#[tokio::test]
async fn rows_that_change_and_change_back_and_go_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("farm.db");
    file_with_rows(&path).await;
    let url = pg::database().await;
    let mut to = Tables::postgres(&url).await.unwrap();
    let mut known = Known::default();
    for changes in [&[][..]].iter().chain(CHANGES) {
        let mut file = SqliteConnection::connect(path.to_str().unwrap()).await.unwrap();
        for change in *changes {
            let done = file.execute(*change).await.unwrap();
            assert_eq!(done.rows_affected(), 1, "{change}");
        }
        file.close().await.unwrap();
        let mut from = Tables::file(&path).await.unwrap();
        let here = bring(&mut from, &mut to, &mut known).await.unwrap();
        assert_eq!(here, to.tally(None).await.unwrap(), "after {changes:?}");
        from.close().await.unwrap();
        // Whoever begins anew learns what is there, and brings nothing.
        known = Known::default();
        to.tally(Some(&mut known)).await.unwrap();
    }
    let mut shared = PgConnection::connect(&url).await.unwrap();
    let left: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM jobs").fetch_one(&mut shared).await.unwrap();
    assert_eq!(left, 0);
}

const IMPATIENT: &[&str] =
    &["statement_timeout = '500ms'", "lock_timeout = '500ms'", "idle_in_transaction_session_timeout = '500ms'"];

#[tokio::test]
async fn a_server_that_is_impatient_by_itself_cuts_no_copy_short() {
    let url = pg::database().await;
    let mut other = PgConnection::connect(&url).await.unwrap();
    let name: String = sqlx::query_scalar("SELECT current_database()").fetch_one(&mut other).await.unwrap();
    for setting in IMPATIENT {
        other.execute(AssertSqlSafe(format!("ALTER DATABASE {name} SET {setting}"))).await.unwrap();
    }
    let mut tables = Tables::postgres(&url).await.unwrap();
    tables.hold_still().await.unwrap();
    let before = tables.tally(None).await.unwrap();
    // It lives through what another one of this database is cut off for: idle in a transaction, then waiting.
    let mut idle = PgConnection::connect(&url).await.unwrap();
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut idle).await.unwrap();
    idle.execute("BEGIN").await.unwrap();
    until("who is idle in a transaction is cut off", async || {
        let there = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)";
        let there: bool = sqlx::query_scalar(there).bind(pid).fetch_one(&mut other).await?;
        Ok((!there).then_some(()))
    })
    .await;
    let Tables::Postgres(conn) = &mut tables else { panic!("of a Postgres") };
    let lock = "SELECT pg_advisory_lock(1)";
    other.execute(lock).await.unwrap();
    let asked = conn.execute(lock);
    let lets_go = async {
        let mut waits = PgConnection::connect(&url).await.unwrap();
        waits.execute(lock).await.unwrap_err();
        other.execute("SELECT pg_advisory_unlock(1)").await.unwrap();
    };
    let (locked, ()) = tokio::join!(asked, lets_go);
    locked.unwrap();
    assert_eq!(tables.tally(None).await.unwrap(), before);
}

#[tokio::test]
async fn a_database_of_a_newer_version_is_not_moved_by_an_older_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("farm.db");
    SqlStore::open_sqlite(&path).await.unwrap().close().await;
    super::migrations::expand_file(&path).await;
    let url = pg::database().await;
    super::migrations::expand_postgres(&url).await;
    for mut tables in [Tables::file(&path).await.unwrap(), Tables::postgres(&url).await.unwrap()] {
        let refused = tables.refuse_newer().await.unwrap_err().to_string();
        assert!(refused.contains("of a newer version"), "{refused}");
    }
}
