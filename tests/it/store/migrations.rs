//! T: every migration meets a database with rows in it, and a version works on the schema of the next one.

use alloy_tests::pg;
use orchestrator::store::sql::{SqlStore, postgres_migrations, sqlite_migrations};
use orchestrator::store::{Scope, Store};
use sqlx::migrate::{Migration, Migrator};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, SqliteConnection};

use super::given::{insert, job_id, queued};
use super::put;

/// Rows for what each migration made or changed, put in before the next one.
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
        4,
        &[
            "INSERT INTO trash (object, root, at_ms, gone) VALUES ('o', 'o', 1, FALSE)",
            "INSERT INTO retention (org_id, jobs_days) VALUES ('org_1', 7)",
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
    (1003, &[]),
];

fn samples(version: i64) -> &'static [&'static str] {
    let found = SAMPLES.iter().find(|(of, _)| *of == version);
    found.unwrap_or_else(|| panic!("migration {version} needs rows that the next one meets")).1
}

fn tables_made(migrations: &[Migration]) -> Vec<String> {
    let lines = migrations.iter().flat_map(|one| one.sql.as_str().lines());
    lines.filter_map(|line| Some(line.strip_prefix("CREATE TABLE ")?.split(' ').next()?.to_owned())).collect()
}

/// Runs each migration on what the ones before it left, with rows in all of it, and counts the rows in the end.
macro_rules! each_on_rows {
    ($conn:ident, $migrations:ident) => {
        for upto in 1..=$migrations.len() {
            let all = $migrations[..upto].to_vec();
            let version = all[upto - 1].version;
            Migrator::with_migrations(all)
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

#[tokio::test]
async fn each_migration_is_applied_to_a_database_that_is_not_empty() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("farm.db");
    let url = format!("sqlite://{}?mode=rwc", path.display());
    let (ours, theirs) = (sqlite_migrations(), postgres_migrations());
    let mut sqlite = SqliteConnection::connect(&url).await.unwrap();
    each_on_rows!(sqlite, ours);
    sqlite.close().await.unwrap();
    let url = pg::empty_database().await;
    let mut postgres = PgConnection::connect(&url).await.unwrap();
    each_on_rows!(postgres, theirs);
    // Nothing is left to do for an orchestrator.
    for store in [SqlStore::open_sqlite(&path).await.unwrap(), SqlStore::open_postgres(&url).await.unwrap()] {
        assert_eq!(store.meta("a").await.unwrap().as_deref(), Some("b"));
        store.close().await;
    }
}

/// What a newer version may add without telling this one.
const EXPANDED: &[&str] = &[
    "ALTER TABLE jobs ADD COLUMN later TEXT",
    "ALTER TABLE workers ADD COLUMN later BIGINT NOT NULL DEFAULT 7",
    "CREATE TABLE later (id TEXT NOT NULL PRIMARY KEY)",
];

#[tokio::test]
async fn a_version_works_on_the_schema_of_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("farm.db");
    let url = pg::empty_database().await;
    SqlStore::open_sqlite(&path).await.unwrap().close().await;
    SqlStore::open_postgres(&url).await.unwrap().close().await;
    let text = EXPANDED.join(";\n");
    let later = |version| {
        let text = sqlx::SqlSafeStr::into_sql_str(AssertSqlSafe(text.clone()));
        Migration::new(version, "later".into(), sqlx::migrate::MigrationType::Simple, text, false)
    };
    let mut sqlite = SqliteConnection::connect(&path.display().to_string()).await.unwrap();
    let all = [sqlite_migrations(), vec![later(900)]].concat();
    Migrator::with_migrations(all).run(&mut sqlite).await.unwrap();
    sqlite.close().await.unwrap();
    let mut postgres = PgConnection::connect(&url).await.unwrap();
    let all = [postgres_migrations(), vec![later(1900)]].concat();
    Migrator::with_migrations(all).run(&mut postgres).await.unwrap();
    for store in [SqlStore::open_sqlite(&path).await.unwrap(), SqlStore::open_postgres(&url).await.unwrap()] {
        put(&store, insert(queued(job_id(1)), None)).await.unwrap();
        assert!(store.job(&Scope::farm(), &job_id(1)).await.unwrap().is_some());
        store.close().await;
    }
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
