//! The queue that everybody writes first: a table, a partial index, `FOR UPDATE SKIP LOCKED`. A submit, a claim and an end are a
//! transaction each.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use async_trait::async_trait;
use sqlx::Executor as _;
use sqlx::postgres::{PgListener, PgPool, PgPoolOptions};
use tokio::sync::{Mutex, Notify};
use tokio::task::JoinSet;

use super::{Books, CLIENTS, For, Queue, number_of, spec};

/// More of them are slower here.
const CONNECTIONS: u32 = 32;
const SCHEMA: &str = "CREATE TABLE queue (id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, state TEXT NOT NULL, \
    payload TEXT NOT NULL, worker TEXT, created_at TIMESTAMPTZ NOT NULL DEFAULT now(), claimed_at TIMESTAMPTZ, \
    finished_at TIMESTAMPTZ); CREATE INDEX queue_waiting ON queue (id) WHERE state = 'queued'";
const SUBMIT: &str = "INSERT INTO queue (state, payload) VALUES ('queued', $1)";
const SUBMIT_AND_TELL: &str =
    "WITH new AS (INSERT INTO queue (state, payload) VALUES ('queued', $1)) SELECT pg_notify('queue', '')";
const CLAIM: &str = "UPDATE queue SET state = 'assigned', worker = $1, claimed_at = now() WHERE id = (SELECT id FROM queue \
    WHERE state = 'queued' ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED) RETURNING id, payload";
const FINISH: &str = "UPDATE queue SET state = 'succeeded', finished_at = now() WHERE id = $1";

pub(super) struct Plain {
    pool: PgPool,
    submit: &'static str,
    tasks: Mutex<JoinSet<()>>,
}

impl Plain {
    pub(super) async fn start(url: &str, what: For, books: Arc<Books>) -> Result<Self> {
        let pool = PgPoolOptions::new().max_connections(CONNECTIONS).test_before_acquire(false).connect(url).await?;
        pool.execute(SCHEMA).await?;
        let (mut tasks, told) = (JoinSet::new(), Arc::new(Notify::new()));
        // With many jobs there is always one more: telling of each would only cost.
        let (submit, floor) = match what {
            For::Rate => (SUBMIT, Duration::from_millis(5)),
            For::Latency => (SUBMIT_AND_TELL, Duration::from_secs(1)),
        };
        if what == For::Latency {
            let mut listener = PgListener::connect(url).await?;
            listener.listen("queue").await?;
            let told = told.clone();
            tasks.spawn(async move {
                // One job, one worker.
                while listener.recv().await.is_ok() {
                    told.notify_one();
                }
            });
        }
        for number in 0..CLIENTS {
            let (pool, told, books) = (pool.clone(), told.clone(), books.clone());
            tasks.spawn(async move {
                let name = format!("worker {number}");
                loop {
                    match turn(&pool, &name, &books).await {
                        Ok(true) => {}
                        Ok(false) => {
                            // Late or early, it looks.
                            let _ = tokio::time::timeout(floor, told.notified()).await;
                        }
                        Err(error) => return books.breaks(error),
                    }
                }
            });
        }
        Ok(Self { pool, submit, tasks: Mutex::new(tasks) })
    }
}

/// True: there was a job, and it is finished.
async fn turn(pool: &PgPool, name: &str, books: &Books) -> Result<bool> {
    let claimed: Option<(i64, String)> = sqlx::query_as(CLAIM).bind(name).fetch_optional(pool).await?;
    let Some((id, payload)) = claimed else { return Ok(false) };
    books.claims(number_of(&serde_json::from_str(&payload)?));
    sqlx::query(FINISH).bind(id).execute(pool).await?;
    books.finishes();
    Ok(true)
}

#[async_trait]
impl Queue for Plain {
    async fn submit(&self, number: u64) -> Result<()> {
        sqlx::query(self.submit).bind(serde_json::to_string(&spec(number))?).execute(&self.pool).await?;
        Ok(())
    }

    async fn stop(&self) {
        self.tasks.lock().await.shutdown().await;
        self.pool.close().await;
    }
}
