//! Jobs through a queue on Postgres, all contenders side by side on one server that syncs: how many a second go from their
//! submit through their claim to their end, and how long one waits for its claim when little happens.
//!
//! A submit is durable before it is answered; a claim is durable before the worker hears of it, an end before the worker goes
//! on. Nobody waits for anything else, and no work is done. The crates are built in with the feature `peers`; without it they are
//! "not measured". Where a sync is slow, a claim after one of them against a claim after two is all that latency can show.

#[cfg(feature = "peers")]
mod crates;
mod ours;
mod plain;
mod waiting;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use alloy_shared::wire::job::JobSpec;
use anyhow::{Context as _, Result, bail};
use async_trait::async_trait;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::floors::{Floors, quantile};
use super::report::{Better, Row};
use super::{Options, ms, rounds};
use crate::observe::{PATIENCE, now};
use crate::pg::Lasting;

/// So many submit at once, and so many workers claim.
const CLIENTS: usize = 64;
/// Submitted and not finished: clients wait beyond it.
const OPEN_MAX: usize = 2_000;
/// Between two submits where latency is measured.
const STEP: Duration = Duration::from_millis(20);
const WARM_UP: Duration = Duration::from_millis(500);

/// A queue whose workers run.
#[async_trait]
trait Queue: Send + Sync {
    /// Returns when the job is durable.
    async fn submit(&self, number: u64) -> Result<()>;
    async fn stop(&self);
}

/// What a contender is for in this round: one that tells its workers of each job is fast with few and slow with many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum For {
    Rate,
    Latency,
}

const PLAIN: &str = "one SKIP LOCKED transaction per job";
const GRAPHILE: &str = "graphile_worker";
const APALIS: &str = "apalis-postgres";

/// What every contender carries, so that the sizes are the same.
fn spec(number: u64) -> JobSpec {
    JobSpec { argv: vec!["true".into(), number.to_string()], ..JobSpec::default() }
}

fn number_of(spec: &JobSpec) -> u64 {
    spec.argv.get(1).and_then(|word| word.parse().ok()).unwrap_or(u64::MAX)
}

/// What became of the jobs, as their workers saw it.
struct Books {
    since: Mutex<HashMap<u64, Instant>>,
    waited_ms: Mutex<Vec<f64>>,
    /// For jobs that are not finished.
    room: Semaphore,
    finished: watch::Sender<u64>,
    broken: Mutex<Option<String>>,
}

impl Default for Books {
    fn default() -> Self {
        Self {
            since: Mutex::default(),
            waited_ms: Mutex::default(),
            room: Semaphore::new(OPEN_MAX),
            finished: watch::Sender::new(0),
            broken: Mutex::default(),
        }
    }
}

impl Books {
    fn submits(&self, number: u64) {
        self.since.lock().unwrap_or_else(PoisonError::into_inner).insert(number, now());
    }

    fn claims(&self, number: u64) {
        let since = self.since.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
        if let Some(since) = since {
            self.waited_ms.lock().unwrap_or_else(PoisonError::into_inner).push(ms(since));
        }
    }

    fn finishes(&self) {
        self.finished.send_modify(|count| *count += 1);
        self.room.add_permits(1);
    }

    fn breaks(&self, why: impl std::fmt::Display) {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why.to_string());
        self.finished.send_modify(|_| {});
        self.room.close();
    }

    fn finished(&self) -> u64 {
        *self.finished.borrow()
    }

    /// Until so many jobs are finished.
    async fn until(&self, count: u64) -> Result<()> {
        let mut finished = self.finished.subscribe();
        let done = finished.wait_for(|finished| *finished >= count || self.check().is_err());
        let heard = tokio::time::timeout(PATIENCE, done).await.is_ok();
        anyhow::ensure!(heard, "{} of {count} jobs finished", self.finished());
        self.check()
    }

    fn check(&self) -> Result<()> {
        match &*self.broken.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(why) => bail!("a worker: {why}"),
            None => Ok(()),
        }
    }
}

pub async fn rows(options: &Options, floors: &mut Vec<Floors>) -> Result<Vec<Row>> {
    let server = Lasting::start();
    let (time, count) = if options.quick { (Duration::from_secs(1), 50) } else { (Duration::from_secs(5), 500) };
    let mut rate = Row::new(
        "queue on Postgres: submit → assign → finish, 64 clients",
        "jobs/s",
        Better::Higher,
        "at least 5 times each",
    );
    rate.note =
        "one server with fsync; in one process, without HTTP; a database of its own for each contender and round"
            .into();
    let half = "at most half of the best";
    let mut p50 = Row::new("queue on Postgres: submit → claimed at 50/s, p50", "ms", Better::Lower, half);
    p50.note = format!("{count} submits in each round, whenever it is their time; 64 idle workers");
    let mut p99 = Row::new("queue on Postgres: submit → claimed at 50/s, p99", "ms", Better::Lower, half);
    p99.note.clone_from(&p50.note);
    let mut rows = [rate, p50, p99];
    rounds(options, floors, &mut rows, async |rows| {
        for name in [None, Some(PLAIN), Some(GRAPHILE), Some(APALIS)] {
            let found = rate_of(&server, name, time).await.with_context(|| name.unwrap_or("Alloy"))?;
            put(&mut rows[0], name, found);
        }
        for name in [None, Some(PLAIN), Some(GRAPHILE), Some(APALIS)] {
            let found = latency_of(&server, name, count).await.with_context(|| name.unwrap_or("Alloy"))?;
            for (row, at) in rows[1..].iter_mut().zip([0.5, 0.99]) {
                put(row, name, found.as_ref().map(|samples| quantile(samples, at)));
            }
        }
        Ok(())
    })
    .await?;
    let mut rows = Vec::from(rows);
    rows.extend(waiting::rows(options, floors, &server).await?);
    Ok(rows)
}

fn put(row: &mut Row, name: Option<&str>, found: Option<f64>) {
    match name {
        None => row.ours(found.into_iter().collect()),
        Some(name) => row.peer(name, found.map(|value| vec![value])),
    }
}

/// `None`: this contender is not built in.
async fn start(url: &str, name: Option<&str>, what: For, books: &Arc<Books>) -> Result<Option<Arc<dyn Queue>>> {
    Ok(match name {
        None => Some(Arc::new(ours::Ours::start(url, ours::MANY, books.clone(), None).await?)),
        Some(PLAIN) => Some(Arc::new(plain::Plain::start(url, what, books.clone()).await?)),
        #[cfg(feature = "peers")]
        Some(GRAPHILE) => Some(Arc::new(crates::Graphile::start(url, what, books.clone()).await?)),
        #[cfg(feature = "peers")]
        Some(APALIS) => Some(Arc::new(crates::Apalis::start(url, books.clone()).await?)),
        Some(_) => None,
    })
}

async fn rate_of(server: &Lasting, name: Option<&str>, time: Duration) -> Result<Option<f64>> {
    let (url, books) = (server.database().await?, Arc::new(Books::default()));
    let Some(queue) = start(&url, name, For::Rate, &books).await? else { return Ok(None) };
    server.settle().await?;
    let (numbers, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let (queue, books, numbers, over) = (queue.clone(), books.clone(), numbers.clone(), over.clone());
        clients.spawn(async move {
            while !over.load(Ordering::Relaxed) {
                let Ok(room) = books.room.acquire().await else { return books.check() };
                room.forget();
                let number = numbers.fetch_add(1, Ordering::Relaxed);
                books.submits(number);
                queue.submit(number).await?;
            }
            anyhow::Ok(())
        });
    }
    tokio::time::sleep(WARM_UP).await;
    let (from, before) = (now(), books.finished());
    tokio::time::sleep(time).await;
    let done = books.finished() - before;
    let rate = done as f64 / from.elapsed().as_secs_f64();
    over.store(true, Ordering::Relaxed);
    // Nobody waits for room any more.
    books.room.close();
    while let Some(client) = clients.join_next().await {
        client??;
    }
    books.check()?;
    queue.stop().await;
    anyhow::ensure!(done > 0, "no job was finished");
    Ok(Some(rate))
}

async fn latency_of(server: &Lasting, name: Option<&str>, count: u64) -> Result<Option<Vec<f64>>> {
    let (url, books) = (server.database().await?, Arc::new(Books::default()));
    let Some(queue) = start(&url, name, For::Latency, &books).await? else { return Ok(None) };
    // The first ones find nothing prepared.
    let warm = CLIENTS as u64;
    for number in 0..warm {
        queue.submit(number).await?;
    }
    books.until(warm).await?;
    server.settle().await?;
    let (begin, mut submits) = (tokio::time::Instant::from_std(now()), JoinSet::new());
    for at in 0..count {
        tokio::time::sleep_until(begin + STEP * at as u32).await;
        let (queue, number) = (queue.clone(), warm + at);
        books.submits(number);
        submits.spawn(async move { queue.submit(number).await });
    }
    while let Some(submit) = submits.join_next().await {
        submit??;
    }
    books.until(warm + count).await?;
    queue.stop().await;
    let waited = std::mem::take(&mut *books.waited_ms.lock().unwrap_or_else(PoisonError::into_inner));
    anyhow::ensure!(waited.len() as u64 == count, "{} of {count} claims were seen", waited.len());
    Ok(Some(waited))
}
