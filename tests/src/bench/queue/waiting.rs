//! Alloy's queue with very many waiting jobs against the same queue with none: all slots are taken, a job is submitted, then one
//! ends and the oldest that waits takes its place.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::ours::{Held, Hosts, Ours, finish};
use super::{Books, Queue as _, STEP};
use crate::bench::floors::{Floors, quantile};
use crate::bench::report::{Better, Row};
use crate::bench::{Options, ms, rounds};
use crate::observe::now;
use crate::pg::Lasting;

const HOSTS: Hosts = (1, 8);
/// So many submit the jobs that wait.
const FILLERS: u64 = 256;
const NONE: &str = "none waiting";

struct Farm {
    ours: Arc<Ours>,
    held: mpsc::Receiver<Held>,
    running: Vec<Held>,
    next: u64,
}

impl Farm {
    async fn start(server: &Lasting, waiting: u64) -> Result<Self> {
        let (tell, mut held) = mpsc::channel(HOSTS.0 * HOSTS.1);
        let ours =
            Arc::new(Ours::start(&server.database().await?, HOSTS, Arc::new(Books::default()), Some(tell)).await?);
        let slots = HOSTS.1 as u64;
        let mut running = Vec::new();
        for number in 0..slots {
            ours.submit(number).await?;
            running.push(held.recv().await.context("a worker")?);
        }
        let mut fillers = JoinSet::new();
        for filler in 0..FILLERS {
            let ours = ours.clone();
            fillers.spawn(async move {
                for number in (filler..waiting).step_by(FILLERS as usize) {
                    ours.submit(slots + number).await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(filler) = fillers.join_next().await {
            filler??;
        }
        Ok(Self { ours, held, running, next: slots + waiting })
    }

    /// How long a submit took, and how long it was from a report of an end until the next job was with its worker.
    async fn step(&mut self) -> Result<(f64, f64)> {
        let from = now();
        self.ours.submit(self.next).await?;
        let submit = ms(from);
        self.next += 1;
        let (_, ended) = self.running.remove(0);
        let from = now();
        let (door, ours) = (self.ours.door().clone(), self.held.recv());
        let (done, given) = tokio::join!(finish(&door, ended), async { (ours.await, ms(from)) });
        done?;
        self.running.push(given.0.context("a worker")?);
        Ok((submit, given.1))
    }
}

pub(super) async fn rows(options: &Options, floors: &mut Vec<Floors>, server: &Lasting) -> Result<Vec<Row>> {
    let (waiting, steps) = if options.quick { (2_000, 50) } else { (100_000, 500) };
    let aim = "under 2 times: over 0.5";
    let row = |what: &str| Row::new(&format!("{what} with {waiting} jobs waiting, p99"), "ms", Better::Lower, aim);
    let mut rows = [row("submit on Postgres"), row("an end → the next job at its worker, on Postgres")];
    for row in &mut rows {
        row.note = format!("{steps} steps in each round, 50 a second");
    }
    let mut farms = [Farm::start(server, waiting).await?, Farm::start(server, 0).await?];
    server.settle().await?;
    rounds(options, floors, &mut rows, async |rows| {
        for (at, farm) in farms.iter_mut().enumerate() {
            let mut samples = (Vec::new(), Vec::new());
            let mut beat = tokio::time::interval(STEP);
            for _ in 0..steps {
                beat.tick().await;
                let (submit, dispatch) = farm.step().await?;
                samples.0.push(submit);
                samples.1.push(dispatch);
            }
            for (row, samples) in rows.iter_mut().zip([samples.0, samples.1]) {
                let p99 = vec![quantile(&samples, 0.99)];
                match at {
                    0 => row.ours(p99),
                    _ => row.peer(NONE, Some(p99)),
                }
            }
        }
        Ok(())
    })
    .await?;
    for farm in &farms {
        farm.ours.stop().await;
    }
    Ok(rows.into())
}
