//! Two crates that people use. A job counts as finished when its handler returns: what they write after that is theirs.

use std::sync::Arc;

use alloy_shared::wire::job::JobSpec as Spec;
use anyhow::{Result, anyhow};
use apalis::prelude::{BoxDynError, Data, TaskSink as _, WorkerBuilder, WorkerBuilderExt as _};
use apalis_postgres::{Config, PostgresStorage};
use async_trait::async_trait;
use graphile_worker::{
    IntoTaskHandlerResult, JobSpec, LocalQueueConfig, TaskHandler, WorkerContext, WorkerOptions, WorkerUtils,
};
use serde::{Deserialize, Serialize};
use sqlx::postgres::{PgPool, PgPoolOptions};
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use super::{Books, CLIENTS, For, Queue, number_of, spec};

const CONNECTIONS: u32 = 32;

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Work {
    spec: Spec,
}

fn done(work: &Work, books: &Books) {
    books.claims(number_of(&work.spec));
    books.finishes();
}

async fn pool(url: &str) -> Result<PgPool> {
    Ok(PgPoolOptions::new().max_connections(CONNECTIONS).test_before_acquire(false).connect(url).await?)
}

#[derive(Clone)]
struct Shown(Arc<Books>);

impl std::fmt::Debug for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the books")
    }
}

impl TaskHandler for Work {
    const IDENTIFIER: &'static str = "work";

    async fn run(self, ctx: WorkerContext) -> impl IntoTaskHandlerResult {
        match ctx.get_ext::<Shown>() {
            Some(books) => {
                done(&self, &books.0);
                Ok(())
            }
            None => Err("no books".to_owned()),
        }
    }
}

pub(super) struct Graphile {
    utils: WorkerUtils,
    pool: PgPool,
    tasks: Mutex<JoinSet<()>>,
}

impl Graphile {
    pub(super) async fn start(url: &str, what: For, books: Arc<Books>) -> Result<Self> {
        let pool = pool(url).await?;
        let options = WorkerOptions::default()
            .concurrency(CLIENTS)
            .pg_pool(pool.clone())
            .define_job::<Work>()
            .add_extension(Shown(books.clone()))
            .listen_os_shutdown_signals(false);
        let options = match what {
            For::Rate => options.local_queue(LocalQueueConfig::builder().size(500).build()),
            For::Latency => options,
        };
        let worker = options.init().await?;
        let utils = worker.create_utils();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            if let Err(error) = worker.run().await {
                books.breaks(error);
            }
        });
        Ok(Self { utils, pool, tasks: Mutex::new(tasks) })
    }
}

#[async_trait]
impl Queue for Graphile {
    async fn submit(&self, number: u64) -> Result<()> {
        self.utils.add_job(Work { spec: spec(number) }, JobSpec::default()).await?;
        Ok(())
    }

    async fn stop(&self) {
        self.tasks.lock().await.shutdown().await;
        self.pool.close().await;
    }
}

pub(super) struct Apalis {
    storage: PostgresStorage<Work>,
    pool: PgPool,
    tasks: Mutex<JoinSet<()>>,
}

async fn work(work: Work, books: Data<Arc<Books>>) -> Result<(), BoxDynError> {
    done(&work, &books);
    Ok(())
}

impl Apalis {
    pub(super) async fn start(url: &str, books: Arc<Books>) -> Result<Self> {
        let pool = pool(url).await?;
        PostgresStorage::<()>::setup(&pool).await?;
        let config = Config::default().queue("work").batch_size(CLIENTS);
        let storage = PostgresStorage::<Work>::new(&pool).with_config(config);
        let mut tasks = JoinSet::new();
        let (backend, at) = (storage.clone(), books.clone());
        tasks.spawn(async move {
            let worker =
                WorkerBuilder::new("bench").backend(backend.with_pubsub()).data(at).concurrency(CLIENTS).build(work);
            if let Err(error) = worker.run().await {
                books.breaks(error);
            }
        });
        Ok(Self { storage, pool, tasks: Mutex::new(tasks) })
    }
}

#[async_trait]
impl Queue for Apalis {
    async fn submit(&self, number: u64) -> Result<()> {
        let mut storage = self.storage.clone();
        storage.push(Work { spec: spec(number) }).await.map_err(|error| anyhow!("{error}"))
    }

    async fn stop(&self) {
        self.tasks.lock().await.shutdown().await;
        self.pool.close().await;
    }
}
