//! T: every migration meets a database with rows in it, and a version works on the schema of the next one.

use std::fs;
use std::path::Path;

use alloy_tests::pg;
use orchestrator::store::Store;
use orchestrator::store::sql::{SqlStore, postgres_migrations, sqlite_migrations};
use sqlx::migrate::{Migration, Migrator};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, SqlSafeStr, SqliteConnection};

use crate::tidy::scan::root;

/// Rows for what each migration made or changed, put in before the next one. The order is that of their making.
const SAMPLES: &[(i64, &[&str])] = &[
    (
        1,
        &[
            "INSERT INTO jobs (id, id_tail, org_id, version, state, attempt, state_json, spec, created_at_ms, created_by, events) \
             VALUES ('job_1', 1, 'org_1', 1, 'queued', 0, '{}', '{}', 1, 'me', 1)",
            "INSERT INTO attempts (job_id, attempt, org_id, worker_id, assigned_at_ms, timings, seq) \
             VALUES ('job_1', 1, 'org_1', 'wrk_1', 1, '{}', 0)",
            "INSERT INTO events (job_id, seq, org_id, at_ms, attempt, kind, state) \
             VALUES ('job_1', 1, 'org_1', 1, 0, 'submitted', 'queued')",
            "INSERT INTO artifacts (job_id, attempt, path, org_id, size_bytes, sha256, mode) VALUES ('job_1', 1, 'a', 'org_1', 1, \
             '0000000000000000000000000000000000000000000000000000000000000000', 420)",
            "INSERT INTO idempotency (org_id, caller, key, body, job_id, created_at_ms) VALUES ('org_1', 'me', 'k', \
             '0000000000000000000000000000000000000000000000000000000000000000', 'job_1', 1)",
            "INSERT INTO workers (id, org_id, name, public_key, labels, host_labels, version, epoch, boot, draining, enrolled_at_ms, \
             revoked) VALUES ('wrk_1', 'org_1', 'mini', '0000000000000000000000000000000000000000000000000000000000000000', '{}', \
             '{}', '0', 0, '', FALSE, 1, FALSE)",
            "INSERT INTO tokens (id, org_id, hash, kind, role, name, shown, labels, created_at_ms) VALUES ('tok_1', 'org_1', \
             '0000000000000000000000000000000000000000000000000000000000000000', 'ci', 'admin', 'n', 's', '{}', 1)",
            "INSERT INTO blobs (digest, kind, org_id, size_bytes, object, created_at_ms) VALUES \
             ('0000000000000000000000000000000000000000000000000000000000000000', 'chunk', 'org_1', 1, 'o', 1)",
            "INSERT INTO meta (name, value) VALUES ('a', 'b')",
        ],
    ),
    (
        2,
        &[
            "INSERT INTO images (org_id, name, want, pinned, workers, labels, generation, at_ms) VALUES ('org_1', 'i', 'present', \
           FALSE, '[]', '{}', 1, 1)",
        ],
    ),
    (
        3,
        &[
            "INSERT INTO members (user_id, org_id, role, created_at_ms) VALUES ('00000000-0000-0000-0000-000000000001', 'org_1', \
           'admin', 1)",
        ],
    ),
    (
        1000,
        &[
            "INSERT INTO orchestrators (id, version, started_at_ms, seen_at_ms) VALUES ('orc_1', '0', 1, 1)",
            "INSERT INTO sessions (worker_id, orchestrator_id, epoch, offer) VALUES ('wrk_1', 'orc_1', 1, '{}')",
            "INSERT INTO log_chunks (job_id, attempt, start_at, bytes) VALUES ('job_1', 1, 0, 'x')",
            "INSERT INTO log_parts (job_id, attempt, start_at, end_at, object) VALUES ('job_1', 1, 1, 2, 'o')",
            "INSERT INTO log_seals (job_id, attempt, len, sha256) VALUES ('job_1', 1, 2, \
             '0000000000000000000000000000000000000000000000000000000000000000')",
        ],
    ),
    (1001, &[]),
    (1002, &[]),
    (
        4,
        &[
            "INSERT INTO trash (object, root, at_ms, taken_at_ms, gone) VALUES ('o', 'o', 1, 2, TRUE)",
            "INSERT INTO retention (org_id, jobs_days) VALUES ('org_1', 7)",
        ],
    ),
    (1003, &[]),
    (1010, &[]),
];

fn samples(version: i64) -> &'static [&'static str] {
    SAMPLES.iter().find(|(of, _)| *of == version).map_or(&[], |(_, rows)| rows)
}

fn tables_made(migrations: &[Migration]) -> Vec<String> {
    let lines = migrations.iter().flat_map(|one| one.sql.as_str().lines());
    lines.filter_map(|line| Some(line.strip_prefix("CREATE TABLE ")?.split(' ').next()?.to_owned())).collect()
}

/// Runs each migration, in the order in which a farm that has seen them all went through them, on what the ones before it left,
/// with rows in all of it; and counts the rows in the end.
macro_rules! each_on_rows {
    ($conn:ident, $migrations:ident) => {
        let ours = |version: &i64| $migrations.iter().any(|one| one.version == *version);
        let order: Vec<i64> = SAMPLES.iter().map(|(version, _)| *version).filter(ours).collect();
        assert_eq!(
            order.len(),
            $migrations.len(),
            "each has its rows that the next one meets, and its place in the order"
        );
        for upto in 1..=order.len() {
            let (before, version) = (&order[..upto], order[upto - 1]);
            let known: Vec<_> = $migrations.iter().filter(|one| before.contains(&one.version)).cloned().collect();
            Migrator::with_migrations(known)
                .run(&mut $conn)
                .await
                .unwrap_or_else(|why| panic!("migration {version}: {why}"));
            for text in samples(version) {
                $conn.execute(*text).await.unwrap_or_else(|why| panic!("after {version}: {text}: {why}"));
            }
        }
        for table in tables_made(&$migrations) {
            let text = AssertSqlSafe(format!("SELECT COUNT(*) FROM {table}"));
            let rows: i64 = sqlx::query_scalar(text).fetch_one(&mut $conn).await.unwrap();
            assert_eq!(rows, 1, "{table} keeps its row, and has one");
        }
    };
}

/// A file that went through all migrations, with a row in every table.
pub(super) async fn file_with_rows(path: &Path) {
    let migrations = sqlite_migrations();
    let url = format!("sqlite://{}?mode=rwc", path.display());
    let mut sqlite = SqliteConnection::connect(&url).await.unwrap();
    each_on_rows!(sqlite, migrations);
    sqlite.close().await.unwrap();
}

#[tokio::test]
async fn each_migration_is_applied_to_a_database_that_is_not_empty() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("farm.db");
    file_with_rows(&path).await;
    let url = pg::empty_database().await;
    let (mut postgres, migrations) = (PgConnection::connect(&url).await.unwrap(), postgres_migrations());
    each_on_rows!(postgres, migrations);
    // Nothing is left to do for an orchestrator.
    for store in [SqlStore::open_sqlite(&path).await.unwrap(), SqlStore::open_postgres(&url).await.unwrap()] {
        assert_eq!(store.meta("a").await.unwrap().as_deref(), Some("b"));
        store.close().await;
    }
}

/// The texts of the version before the newest migration: name, text, and whether Postgres alone was sent it.
fn spoken_before() -> Vec<(String, String, bool)> {
    let newest = sqlite_migrations().iter().map(|one| one.version).max().unwrap();
    let path = root().join(format!("tests/it/store/spoken/{:04}.sql", newest - 1));
    let file = fs::read_to_string(&path).unwrap_or_else(|why| {
        panic!(
            "{}: {why}: keep there what the version before said: docs/decisions/0014-expand-first.md",
            path.display()
        )
    });
    let lines: Vec<&str> = file.lines().skip(1).collect();
    let pairs = lines.chunks_exact(2).map(|pair| {
        let name = pair[0].strip_prefix("-- ").unwrap();
        (name.to_owned(), pair[1].to_owned(), name.ends_with("(Postgres)"))
    });
    pairs.collect()
}

#[tokio::test]
async fn what_the_version_before_says_is_understood() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("farm.db");
    SqlStore::open_sqlite(&path).await.unwrap().close().await;
    let mut sqlite = SqliteConnection::connect(path.to_str().unwrap()).await.unwrap();
    let mut postgres = PgConnection::connect(&pg::database().await).await.unwrap();
    let demanded = "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'public' \
        AND is_nullable = 'NO' AND column_default IS NULL";
    let demanded: Vec<(String, String)> = sqlx::query_as(demanded).fetch_all(&mut postgres).await.unwrap();
    let texts = spoken_before();
    assert!(texts.len() > 50, "{}", texts.len());
    for (name, text, postgres_alone) in texts {
        let text = || AssertSqlSafe(text.clone()).into_sql_str();
        (&mut postgres).prepare(text()).await.unwrap_or_else(|why| panic!("{name} on Postgres: {why}"));
        if !postgres_alone {
            (&mut sqlite).prepare(text()).await.unwrap_or_else(|why| panic!("{name} on SQLite: {why}"));
        }
        let said = text();
        let Some((_, rest)) = said.as_str().split_once("INSERT INTO ") else { continue };
        let (table, columns) = rest.split_once(" (").unwrap();
        let columns: Vec<&str> = columns.split(')').next().unwrap().split(", ").collect();
        for (_, column) in demanded.iter().filter(|(of, _)| of == table) {
            assert!(columns.contains(&column.as_str()), "{name} does not say {table}.{column}, which must be said now");
        }
    }
}

/// What a newer version may add without telling this one.
pub(crate) const EXPANDED: &[&str] = &[
    "ALTER TABLE jobs ADD COLUMN later TEXT",
    "ALTER TABLE workers ADD COLUMN later BIGINT NOT NULL DEFAULT 7",
    "CREATE TABLE later (id TEXT NOT NULL PRIMARY KEY)",
];

/// A migration that this version does not know.
fn later(version: i64) -> Migration {
    let text = AssertSqlSafe(EXPANDED.join(";\n")).into_sql_str();
    Migration::new(version, "later".into(), sqlx::migrate::MigrationType::Simple, text, false)
}

/// Brings a farm's file to the version after this one.
pub(crate) async fn expand_file(path: &Path) {
    let mut sqlite = SqliteConnection::connect(path.to_str().unwrap()).await.unwrap();
    let all = [sqlite_migrations(), vec![later(900)]].concat();
    Migrator::with_migrations(all).run(&mut sqlite).await.unwrap();
    sqlite.close().await.unwrap();
}

/// The same of a farm's Postgres.
pub(crate) async fn expand_postgres(url: &str) {
    let mut postgres = PgConnection::connect(url).await.unwrap();
    let all = [postgres_migrations(), vec![later(1900)]].concat();
    Migrator::with_migrations(all).run(&mut postgres).await.unwrap();
    postgres.close().await.unwrap();
}

#[test]
fn a_migration_only_adds() {
    for migration in [sqlite_migrations(), postgres_migrations()].concat() {
        let statements =
            migration.sql.as_str().lines().filter(|line| !line.starts_with("--")).collect::<Vec<_>>().join("\n");
        for taken in ["DROP TABLE", "DROP COLUMN", "RENAME ", "ALTER COLUMN id", "SET NOT NULL"] {
            assert!(
                !statements.contains(taken),
                "migration {} says {taken}: the version before it still runs; see docs/decisions/0014-expand-first.md",
                migration.version
            );
        }
        for line in statements.split(';').filter(|one| one.contains("ADD COLUMN") && one.contains("NOT NULL")) {
            assert!(line.contains("DEFAULT"), "the version before it inserts rows without that column: {line}");
        }
    }
}
