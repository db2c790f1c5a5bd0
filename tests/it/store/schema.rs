//! T: the schema and the statements themselves: they mean the same on both engines, use indexes, and refuse what no state
//! machine makes.

use std::collections::BTreeSet;
use std::path::Path;

use alloy_tests::pg;
use orchestrator::store::sql::{CATALOGUE, CATALOGUE_OF_POSTGRES, OpenError, SqlStore, made_for_postgres};
use orchestrator::store::{Scope, Store, StoreError};
use sqlx::{
    AssertSqlSafe, Column, Connection, Either, Executor, PgConnection, Row, SqlSafeStr, SqliteConnection, Statement,
};

use super::given::{self, insert, job_id, queued, worker_id};
use super::{put, stores};

async fn connections(stores: &super::Stores) -> (SqliteConnection, PgConnection) {
    let sqlite = SqliteConnection::connect(stores.sqlite.to_str().unwrap()).await.unwrap();
    (sqlite, PgConnection::connect(&stores.postgres).await.unwrap())
}

fn texts() -> impl Iterator<Item = (&'static str, &'static str)> {
    CATALOGUE.iter().flat_map(|part| part.iter().copied())
}

#[tokio::test]
async fn every_statement_means_the_same_on_both_engines() {
    let stores = stores().await;
    let (mut sqlite, mut postgres) = connections(&stores).await;
    let count = |found: Option<Either<usize, usize>>| match found {
        Some(Either::Left(n) | Either::Right(n)) => n,
        None => 0,
    };
    for (name, text) in texts() {
        let a = (&mut sqlite).prepare(text.into_sql_str()).await.unwrap_or_else(|e| panic!("{name} on SQLite: {e}"));
        let b =
            (&mut postgres).prepare(text.into_sql_str()).await.unwrap_or_else(|e| panic!("{name} on Postgres: {e}"));
        let left = count(a.parameters().map(|found| found.map_left(<[_]>::len)));
        let right = count(b.parameters().map(|found| found.map_left(<[_]>::len)));
        assert_eq!(left, right, "{name}: parameters");
        let left: Vec<_> = a.columns().iter().map(|column| column.name().to_owned()).collect();
        let right: Vec<_> = b.columns().iter().map(|column| column.name().to_owned()).collect();
        assert_eq!(left, right, "{name}: columns");
    }
    for (name, text) in texts_of_postgres() {
        (&mut postgres).prepare(text.into_sql_str()).await.unwrap_or_else(|e| panic!("{name} on Postgres: {e}"));
    }
    for text in made_for_postgres() {
        let said = AssertSqlSafe(text.clone()).into_sql_str();
        (&mut postgres).prepare(said).await.unwrap_or_else(|e| panic!("{text}: {e}"));
    }
    let all = || texts().chain(texts_of_postgres());
    let names: BTreeSet<_> = all().map(|(name, _)| name).collect();
    assert_eq!(names.len(), all().count(), "two texts have the same name");
}

fn texts_of_postgres() -> impl Iterator<Item = (&'static str, &'static str)> {
    CATALOGUE_OF_POSTGRES.iter().flat_map(|part| part.iter().copied())
}

#[test]
fn no_sql_stands_outside_the_catalogue() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../orchestrator/src/store/sql");
    let verbs = ["SELECT ", "INSERT ", "UPDATE ", "DELETE ", "WITH ", "SAVEPOINT ", "ROLLBACK ", "RELEASE ", "MERGE "];
    let mut found = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let source = std::fs::read_to_string(&path).unwrap();
        let product = source.split("#[cfg(test)]\nmod tests").next().unwrap();
        for line in product.lines() {
            let Some((before, after)) = line.split_once('"') else { continue };
            if !verbs.iter().any(|verb| after.starts_with(verb)) || after.starts_with("SELECT sqlite_version()") {
                continue;
            }
            found += 1;
            let name = before.trim().trim_end_matches(" =");
            let mut all = texts().chain(texts_of_postgres());
            assert!(all.any(|(known, _)| known == name), "{}: `{line}` is in no list", path.display());
        }
    }
    assert_eq!(found, texts().chain(texts_of_postgres()).count());
}

#[tokio::test]
async fn every_statement_searches_by_an_index() {
    let stores = stores().await;
    let (mut sqlite, _) = connections(&stores).await;
    // A backup reads its own copy from end to end, and a farm that moves goes as a whole.
    let whole = |name: &str| ["OBJECTS", "ENDED_LOGS", "LOGS_LEFT"].contains(&name) || name.starts_with("ALL_");
    for (name, text) in texts().filter(|(name, text)| !text.contains("SAVEPOINT") && !whole(name)) {
        let explain = AssertSqlSafe(format!("EXPLAIN QUERY PLAN {text}"));
        for row in sqlite.fetch_all(explain).await.unwrap() {
            let step: String = row.get("detail");
            let given = ["SCAN new", "SCAN closed", "SCAN asked", "SCAN CONSTANT ROW"];
            let scans = step.starts_with("SCAN") && !given.contains(&step.as_str());
            // What one worker holds, and two ids at most, are sorted after they are found.
            let sorts = step.contains("TEMP B-TREE") && !["HELD_JOBS", "JOBS_ENDING"].contains(&name);
            assert!(!scans && !sorts, "{name}: {step}");
        }
    }
}

#[tokio::test]
async fn opening_twice_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("farm.db");
    let url = pg::empty_database().await;
    for again in [false, true] {
        let sqlite = SqlStore::open_sqlite(&path).await.unwrap();
        let postgres = SqlStore::open_postgres(&url).await.unwrap();
        for store in [&sqlite, &postgres] {
            assert_eq!(store.job(&Scope::farm(), &job_id(1)).await.unwrap().is_some(), again);
            if !again {
                put(store, insert(queued(job_id(1)), None)).await.unwrap();
            }
            store.close().await;
            let closed = store.job(&Scope::farm(), &job_id(1)).await;
            assert!(matches!(closed, Err(StoreError::Unavailable(_))), "{closed:?}");
        }
    }
}

#[tokio::test]
async fn a_damaged_file_is_noticed_after_an_unclean_stop() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("farm.db");
    let store = SqlStore::open_sqlite(&path).await.unwrap();
    for n in 0..200 {
        put(&store, insert(queued(job_id(n)), None)).await.unwrap();
    }
    store.close().await;
    let marker = dir.path().join("farm.db.open");
    assert!(!marker.exists(), "a clean stop leaves no marker");
    let mut bytes = std::fs::read(&path).unwrap();
    let pages = bytes.len() / 4096;
    for page in 10..pages {
        bytes[page * 4096..page * 4096 + 64].fill(0xee);
    }
    std::fs::write(&path, bytes).unwrap();
    std::fs::write(&marker, "").unwrap();
    let opened = SqlStore::open_sqlite(&path).await;
    assert!(matches!(opened, Err(OpenError::Damaged { .. })), "{opened:?}");
    assert!(marker.exists(), "it is not opened next time either");
}

#[tokio::test]
async fn a_stop_without_close_is_checked_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("farm.db");
    let first = SqlStore::open_sqlite(&path).await.unwrap();
    put(&first, insert(queued(job_id(1)), None)).await.unwrap();
    drop(first);
    assert!(dir.path().join("farm.db.open").exists());
    let second = SqlStore::open_sqlite(&path).await.unwrap();
    assert!(second.job(&Scope::farm(), &job_id(1)).await.unwrap().is_some());
}

#[tokio::test]
async fn a_transaction_pooler_is_refused_by_name() {
    let refused = SqlStore::open_postgres("postgres://farm@db.example:6543/postgres").await.unwrap_err();
    assert!(matches!(refused, OpenError::TransactionPooler), "{refused:?}");
    assert!(refused.to_string().contains("5432"), "it says what to use");
    assert!(matches!(SqlStore::open_postgres("no url").await, Err(OpenError::Url(_))));
}

/// What no run of the state machine leads to, one fault each.
const ILLEGAL: &[&str] = &[
    "UPDATE jobs SET state = 'lost'",
    "UPDATE jobs SET version = 0",
    "UPDATE jobs SET events = -1",
    "UPDATE jobs SET org_id = NULL",
    "UPDATE jobs SET attempt = -1",
    "UPDATE jobs SET source = 'abc'",
    "UPDATE jobs SET state = 'running', worker_id = 'w', attempt = 1",
    "UPDATE jobs SET phase = 'executing'",
    "UPDATE jobs SET state = 'running', phase = 'sleeping', worker_id = 'w', attempt = 1",
    "UPDATE jobs SET state = 'assigned', attempt = 1",
    "UPDATE jobs SET state = 'assigned', worker_id = 'w', attempt = 0",
    "UPDATE jobs SET worker_id = 'w', attempt = 1",
    "UPDATE jobs SET state = 'canceling', attempt = 1",
    "UPDATE jobs SET finished_at_ms = 1",
    "UPDATE jobs SET state = 'succeeded'",
    "UPDATE jobs SET state = 'succeeded', finished_at_ms = 1, worker_id = 'w', attempt = 1",
    "UPDATE jobs SET state = 'succeeded', finished_at_ms = 1, reason = 'vm_lost'",
    "UPDATE jobs SET state = 'failed', finished_at_ms = 1",
    "UPDATE jobs SET state = 'failed', finished_at_ms = 1, reason = 'vm_lost'",
    "UPDATE jobs SET state = 'timed_out', finished_at_ms = 1, reason = 'user_canceled'",
    "UPDATE jobs SET state = 'canceled', finished_at_ms = 1, reason = 'run_timeout'",
    "UPDATE jobs SET state = 'expired', finished_at_ms = 1, reason = 'vm_lost'",
    "UPDATE jobs SET state = 'errored', finished_at_ms = 1, reason = 'script_failure'",
    "UPDATE jobs SET state = 'errored', finished_at_ms = 1, reason = 'bad_luck'",
    "UPDATE jobs SET reason = 'vm_lost'",
    "UPDATE attempts SET attempt = 0",
    "UPDATE attempts SET seq = -1",
    "UPDATE attempts SET outcome = 'failed', ended_at_ms = 1",
    "UPDATE attempts SET outcome = 'failed', end_json = '{}'",
    "UPDATE attempts SET end_json = '{}', ended_at_ms = 1",
    "UPDATE attempts SET outcome = 'queued', end_json = '{}', ended_at_ms = 1",
    "UPDATE attempts SET log_len = -1",
    "UPDATE attempts SET job_id = 'job_nowhere'",
    "UPDATE events SET kind = 'sang'",
    "UPDATE events SET state = 'lost'",
    "UPDATE events SET seq = 0",
    "UPDATE events SET job_id = 'job_nowhere'",
    "UPDATE tokens SET kind = 'master'",
    "UPDATE tokens SET role = 'root'",
    "UPDATE tokens SET used_by = 'w'",
    "UPDATE tokens SET hash = 'abc'",
    "UPDATE blobs SET kind = 'file'",
    "UPDATE blobs SET size_bytes = -1",
    "UPDATE blobs SET frame_at = 1",
    "UPDATE blobs SET frame_at = 1, stored_bytes = 1, zstd = TRUE, frame_bytes = 1, raw_at = 1",
    "UPDATE images SET want = 'perhaps'",
    "UPDATE images SET want = 'absent', pinned = TRUE",
    "UPDATE images SET generation = 0",
    "UPDATE images SET name = ''",
    "UPDATE members SET role = 'root'",
    "UPDATE members SET user_id = 'me'",
    "UPDATE members SET email = ''",
    "UPDATE blobs SET used_at_ms = -1",
    "INSERT INTO trash (object, root, at_ms, gone) VALUES ('o', 'o', 1, TRUE)",
    "INSERT INTO retention (org_id, jobs_days) VALUES ('o', -1)",
    "UPDATE meta SET value = NULL",
    "DELETE FROM jobs",
    "INSERT INTO artifacts (job_id, attempt, path, org_id, size_bytes, sha256, mode) VALUES ('j', 1, 'p', 'o', 1, 'x', 1)",
];

#[tokio::test]
async fn rows_that_no_state_machine_makes_are_refused() {
    use orchestrator::store::{BlobKind, Guard, Write};
    let stores = stores().await;
    let (mut sqlite, mut postgres) = connections(&stores).await;
    for (_, store) in &stores.all[1..] {
        let job = queued(job_id(1));
        put(&**store, insert(job.clone(), None)).await.unwrap();
        let held = given::assigned(&job, worker_id(1));
        let attempt = given::attempt(&held, worker_id(1));
        put(&**store, given::advance(&held, Guard::Version, Some(attempt))).await.unwrap();
        let back = orchestrator::store::Job { version: 3, state: job.state.clone(), ..held };
        let back = Write::Advance(Box::new(orchestrator::store::write::Advance {
            next: back,
            guard: Guard::Version,
            attempt: None,
            events: Vec::new(),
            artifacts: Vec::new(),
        }));
        put(&**store, back).await.unwrap();
        put(&**store, Write::AddToken(given::token(1, alloy_shared::secret::TokenKind::Ci))).await.unwrap();
        put(&**store, Write::AddBlobs(vec![given::blob(2, BlobKind::Chunk)])).await.unwrap();
        put(&**store, Write::SetImage(given::image("r/a:1", 1))).await.unwrap();
        put(&**store, Write::SetMember(given::member(1))).await.unwrap();
        put(&**store, Write::AddMeta { name: "a", value: "b".to_owned() }).await.unwrap();
    }
    for text in ILLEGAL {
        let refused = |result: Result<u64, sqlx::Error>, engine: &str| match result {
            Err(sqlx::Error::Database(error)) => {
                let kind = error.kind();
                assert!(!matches!(kind, sqlx::error::ErrorKind::Other), "{engine} refuses `{text}` for: {error}");
            }
            other => panic!("{engine} takes `{text}`: {other:?}"),
        };
        refused(sqlite.execute(*text).await.map(|done| done.rows_affected()), "SQLite");
        refused(postgres.execute(*text).await.map(|done| done.rows_affected()), "Postgres");
    }
}
