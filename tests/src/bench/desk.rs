//! Submits inside one process, durable in SQLite: the desk with its group commit, against four connections that make one
//! `BEGIN IMMEDIATE` transaction of each. The rows are the same: the peer copies, column by column, what the desk wrote.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use alloy_shared::env::Env;
use alloy_shared::id::{DEFAULT_ORG, Digest, request_key};
use alloy_shared::limits::Limits;
use alloy_shared::runtime::SystemEnv;
use alloy_shared::wire::job::{JobSpec, SubmitJob};
use anyhow::{Context as _, Result, bail};
use orchestrator::desk::{Answer, By, Request};
use orchestrator::desk_loop::{self, Door};
use orchestrator::hub::Hub;
use orchestrator::store::sql::SqlStore;
use orchestrator::store::write::IdempotencyKey;
use orchestrator::wake::Wake;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{AssertSqlSafe, Row as _};
use tokio::task::JoinSet;

use super::report::{Better, Row};
use super::{Options, floors::Floors, rounds};
use crate::observe::now;

const CLIENTS: usize = 256;
const CONNECTIONS: u32 = 4;
const TABLES: [&str; 3] = ["jobs", "events", "idempotency"];

pub async fn row(options: &Options, floors: &mut Vec<Floors>) -> Result<Row> {
    let time = Duration::from_secs(if options.quick { 1 } else { 3 });
    let mut row =
        Row::new("durable submits in one process, 256 clients", "jobs/s", Better::Higher, "at least 20 times");
    row.note = "synchronous=FULL on both sides, the same three rows a job, keys as `alloy run` makes them".into();
    rounds(options, floors, std::slice::from_mut(&mut row), async |rows| {
        let dir = tempfile::tempdir()?;
        rows[0].ours(vec![by_the_desk(&dir.path().join("a.db"), time).await?]);
        // The peer starts as empty, but for the rows that it copies.
        let other = dir.path().join("b.db");
        by_the_desk(&other, Duration::ZERO).await?;
        rows[0].peer("4 connections, BEGIN IMMEDIATE each", Some(vec![one_by_one(&other, time).await?]));
        Ok(())
    })
    .await?;
    Ok(row)
}

async fn by_the_desk(file: &Path, time: Duration) -> Result<f64> {
    let store = Arc::new(SqlStore::open_sqlite(file).await?);
    let env: Arc<dyn Env> = Arc::new(SystemEnv::detached());
    let limits = Limits::default();
    let hub = Arc::new(Hub::new(limits.clone(), env.now().mono));
    let door = desk_loop::spawn(store.clone(), hub, Arc::new(Wake::default()), env.clone(), limits, None).await?;
    let count = Arc::new(AtomicU64::new(0));
    let (started, mut clients) = (now(), JoinSet::new());
    for _ in 0..CLIENTS {
        clients.spawn(submit_until(door.clone(), env.clone(), started + time, count.clone()));
    }
    while let Some(client) = clients.join_next().await {
        client??;
    }
    let rate = count.load(Ordering::Relaxed) as f64 / started.elapsed().as_secs_f64();
    store.close().await;
    Ok(rate)
}

async fn submit_until(door: Door, env: Arc<dyn Env>, end: std::time::Instant, count: Arc<AtomicU64>) -> Result<()> {
    let spec = JobSpec { argv: vec!["true".into()], ..JobSpec::default() };
    let body = Arc::new(SubmitJob { spec, source: None });
    loop {
        let id = door.new_job(&*env);
        let by = By { org: DEFAULT_ORG, caller: "bench".into() };
        let key = IdempotencyKey {
            org: DEFAULT_ORG,
            caller: by.caller.clone(),
            key: request_key(env.now().wall, (env.dice(), env.dice())),
            body: Digest::of(b"bench"),
        };
        let (body, key) = (body.clone(), Some(key));
        match door.ask(|ticket| Request::Submit { ticket, id, by, body, key }).await {
            Answer::Job(_) => count.fetch_add(1, Ordering::Relaxed),
            _ => bail!("a submit was refused"),
        };
        if now() >= end {
            return Ok(());
        }
    }
}

async fn one_by_one(file: &Path, time: Duration) -> Result<f64> {
    let connect = SqliteConnectOptions::new()
        .filename(file)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(Duration::from_secs(30))
        .pragma("mmap_size", "0")
        .pragma("temp_store", "MEMORY")
        .pragma("cache_size", "-65536")
        .pragma("wal_autocheckpoint", "4000");
    let pool =
        SqlitePoolOptions::new().max_connections(CONNECTIONS).test_before_acquire(false).connect_with(connect).await?;
    let copies = Arc::new(copies(&pool).await?);
    let count = Arc::new(AtomicU64::new(0));
    let env = Arc::new(SystemEnv::detached());
    let (started, mut clients) = (now(), JoinSet::new());
    for _ in 0..CLIENTS {
        let (pool, copies, count, env) = (pool.clone(), copies.clone(), count.clone(), env.clone());
        clients.spawn(async move {
            while now() < started + time {
                // In the order of time, as the desk's.
                let id = request_key(env.now().wall, (env.dice(), env.dice()));
                let mut transaction = pool.begin_with("BEGIN IMMEDIATE").await?;
                for copy in copies.iter() {
                    sqlx::query(AssertSqlSafe(copy.clone())).bind(&id).execute(&mut *transaction).await?;
                }
                transaction.commit().await?;
                count.fetch_add(1, Ordering::Relaxed);
            }
            anyhow::Ok(())
        });
    }
    while let Some(client) = clients.join_next().await {
        client??;
    }
    let rate = count.load(Ordering::Relaxed) as f64 / started.elapsed().as_secs_f64();
    pool.close().await;
    Ok(rate)
}

/// For each table a statement that inserts one of the desk's rows again under another job.
async fn copies(pool: &SqlitePool) -> Result<Vec<String>> {
    let mut out = Vec::new();
    for table in TABLES {
        let info = format!("SELECT name FROM pragma_table_info('{table}')");
        let rows = sqlx::query(AssertSqlSafe(info)).fetch_all(pool).await?;
        let columns: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        anyhow::ensure!(!columns.is_empty(), "no table {table}");
        let own = |column: &String| match (table, column.as_str()) {
            ("jobs", "id") | (_, "job_id") | ("idempotency", "key") => "?1".to_owned(),
            _ => column.clone(),
        };
        let values: Vec<_> = columns.iter().map(own).collect();
        out.push(format!(
            "INSERT INTO {table} ({}) SELECT {} FROM {table} LIMIT 1",
            columns.join(", "),
            values.join(", ")
        ));
    }
    out.first().context("tables")?;
    Ok(out)
}
