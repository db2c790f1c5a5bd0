//! A farm of several orchestrators on one Postgres and one bucket, behind a balancer that gives each connection to the next
//! of them that answers.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::farm::{bin_dir, isolated, told_address};
use crate::observe::{Api, until};
use crate::pg;
use crate::port;
use crate::process::Daemon;
use crate::s3::S3;

pub struct Several {
    pub s3: S3,
    pub database: String,
    scale: u64,
    token: String,
    orchestrators: Vec<Member>,
    workers: Vec<Daemon>,
    /// More variables of every orchestrator.
    env: Vec<(String, String)>,
    balancer: SocketAddr,
    dir: TempDir,
    _balancing: JoinSet<()>,
}

struct Member {
    daemon: Option<Daemon>,
    address: SocketAddr,
}

impl Several {
    /// Starts so many orchestrators, and workers with so many slots each that go through the balancer.
    pub async fn start(orchestrators: usize, workers: usize, slots: usize, scale: u64) -> Result<Several> {
        Self::start_with(orchestrators, workers, slots, scale, Vec::new()).await
    }

    /// The same with more variables for every orchestrator.
    pub async fn start_with(
        orchestrators: usize,
        workers: usize,
        slots: usize,
        scale: u64,
        env: Vec<(String, String)>,
    ) -> Result<Several> {
        let dir = tempfile::Builder::new().prefix("alloy-several-").tempdir()?;
        for name in ["logs", "home"] {
            std::fs::create_dir(dir.path().join(name))?;
        }
        let mut addresses = Vec::new();
        for _ in 0..orchestrators {
            addresses.push(port::own_address()?);
        }
        let mut balancing = JoinSet::new();
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let balancer = listener.local_addr()?;
        balancing.spawn(balance(listener, addresses.clone()));
        let mut farm = Several {
            s3: S3::start().await?,
            database: pg::empty_database().await,
            scale,
            token: String::new(),
            orchestrators: addresses.into_iter().map(|address| Member { daemon: None, address }).collect(),
            workers: Vec::new(),
            env,
            balancer,
            dir,
            _balancing: balancing,
        };
        for number in 0..orchestrators {
            farm.start_orchestrator(number).await?;
        }
        for number in 0..workers {
            farm.add_worker(number, slots).await?;
        }
        farm.all_connected().await;
        Ok(farm)
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir.path().join("logs").join(format!("{name}.log"))
    }

    pub fn dir(&self) -> &std::path::Path {
        self.dir.path()
    }

    /// What an orchestrator said.
    pub fn said(&self, number: usize) -> String {
        std::fs::read_to_string(self.log(&format!("orchestrator-{number}"))).unwrap_or_default()
    }

    pub fn command(&self, program: &str) -> std::process::Command {
        let mut command = isolated(&bin_dir().join(program), self.dir.path());
        command.env("ALLOY_TIME_SCALE", self.scale.to_string()).current_dir(self.dir.path().join("home"));
        command
    }

    /// `alloy ARGS`, through the balancer.
    pub fn alloy(&self, args: &[&str]) -> std::process::Command {
        let mut command = self.command("alloy");
        command.args(args).env("ORCHESTRATOR_URL", self.url()).env("ALLOY_TOKEN", &self.token);
        command
    }

    pub async fn start_orchestrator(&mut self, number: usize) -> Result<()> {
        let member = &self.orchestrators[number];
        ensure!(member.daemon.is_none(), "it runs");
        let mut command = self.command("orchestrator");
        let data = self.dir.path().join(format!("data-{number}"));
        command.arg("--data-dir").arg(&data).arg("--listen").arg(member.address.to_string());
        command.env("DATABASE_MODE", "postgres").env("DATABASE_URL", &self.database).env("BASE_URL", self.url());
        command.envs(self.s3.env("several")).envs(self.env.iter().cloned());
        let name = format!("orchestrator-{number}");
        let before = self.said(number).len();
        let mut daemon = Daemon::start(&name, command, &self.log(&name))?;
        until("an orchestrator listens", async || {
            let text = daemon.log_text();
            ensure!(daemon.has_ended().is_none(), "it ended: {text}");
            Ok(told_address(&text[before..]))
        })
        .await;
        self.orchestrators[number].daemon = Some(daemon);
        if self.token.is_empty() {
            let text = std::fs::read_to_string(data.join("farm/admin.token")).context("the first admin's token")?;
            self.token = text.trim().to_owned();
        }
        Ok(())
    }

    async fn add_worker(&mut self, number: usize, slots: usize) -> Result<()> {
        let invite = self.api().post("/v1/workers/invites", &json!({})).await?;
        let token = invite["token"].as_str().context("an invitation has a token")?;
        let state = self.dir.path().join(format!("worker-{number}"));
        let mut join = self.command("worker");
        join.arg("join").arg(self.url()).arg(token).args(["--name", &format!("mini-{number}")]);
        join.arg("--state-dir").arg(&state);
        let out = join.output()?;
        ensure!(out.status.success(), "worker join: {}", String::from_utf8_lossy(&out.stderr));
        let mut run = self.command("worker");
        run.args(["run", "--provider", "host", "--state-dir"]).arg(&state).env("VM_POOL_SIZE", slots.to_string());
        run.env("ALLOY_DISK_FLOOR_MIB", "8");
        let name = format!("worker-{number}");
        self.workers.push(Daemon::start(&name, run, &self.log(&name))?);
        Ok(())
    }

    /// The balancer's.
    pub fn url(&self) -> String {
        format!("http://{}", self.balancer)
    }

    pub fn api(&self) -> Api {
        Api::new(&self.url(), Some(&self.token))
    }

    /// One orchestrator's.
    pub fn api_of(&self, number: usize) -> Api {
        Api::new(&format!("http://{}", self.orchestrators[number].address), Some(&self.token))
    }

    pub fn kill_orchestrator(&mut self, number: usize) {
        if let Some(mut daemon) = self.orchestrators[number].daemon.take() {
            daemon.kill();
        }
    }

    pub fn orchestrator(&self, number: usize) -> Option<&Daemon> {
        self.orchestrators[number].daemon.as_ref()
    }

    /// Waits until every orchestrator that runs knows that every worker is there.
    pub async fn all_connected(&self) {
        for number in 0..self.orchestrators.len() {
            if self.orchestrators[number].daemon.is_none() {
                continue;
            }
            let api = self.api_of(number);
            until("every worker is connected", async || {
                let list = api.get("/v1/workers").await?;
                let ready = |worker: &&Value| matches!(worker["state"].as_str(), Some("ready" | "busy"));
                let count = list["workers"].as_array().into_iter().flatten().filter(ready).count();
                ensure!(count == self.workers.len(), "{list}");
                Ok(Some(()))
            })
            .await;
        }
    }
}

impl Drop for Several {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            worker.kill();
        }
        for member in &mut self.orchestrators {
            if let Some(daemon) = &mut member.daemon {
                daemon.kill();
            }
        }
        if std::thread::panicking() {
            for entry in std::fs::read_dir(self.dir.path().join("logs")).into_iter().flatten().flatten() {
                let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
                let lines: Vec<&str> = text.lines().collect();
                eprintln!("--- {}\n{}", entry.path().display(), lines[lines.len().saturating_sub(60)..].join("\n"));
            }
        }
    }
}

async fn balance(listener: TcpListener, members: Vec<SocketAddr>) {
    let (turn, members) = (AtomicUsize::new(0), Arc::new(members));
    let mut connections = JoinSet::new();
    while let Ok((mut client, _)) = listener.accept().await {
        let (first, members) = (turn.fetch_add(1, Ordering::Relaxed), members.clone());
        connections.spawn(async move {
            for step in 0..members.len() {
                if let Ok(mut member) = TcpStream::connect(members[(first + step) % members.len()]).await {
                    let _ = (client.set_nodelay(true), member.set_nodelay(true));
                    // Either side may go at any time.
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut member).await;
                    return;
                }
            }
        });
        while connections.try_join_next().is_some() {}
    }
}
