//! A farm of real processes on loopback ports in one temporary directory. Dropping it stops it in order and checks that
//! nothing is left: no process, no VM directory, no live job that the test did not declare.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::mount::{CutDisk, Mount};
use crate::observe::{Api, PATIENCE, until, until_blocking};
use crate::port;
use crate::process::{Daemon, Found, processes_in, signal};
use crate::sim_host::{self, Profile, SimHost};

mod backend;
mod told;

use told::{live_jobs, read_token};
pub use told::{told_address, upload_tree, vm_dirs};

/// How long a daemon may take to stop. Longer than its own grace.
const STOP: Duration = Duration::from_secs(40);

/// What a test wants of its farm.
#[derive(Debug, Clone)]
pub struct Setup {
    pub workers: usize,
    pub slots: usize,
    /// Divides the lease timings.
    pub time_scale: u64,
    /// Each worker makes VMs on a simulated Mac of its own; all of them pull from one registry.
    pub macs: Option<sim_host::Setup>,
    pub image: Profile,
    /// What goes wrong on each simulated Mac from its first moment on.
    pub faults: Vec<Vec<Value>>,
    /// Of each worker's images; 0: none.
    pub image_budget_gib: u64,
    /// What both daemons keep free; 0: what they keep by themselves.
    pub disk_floor_mib: u64,
    /// The orchestrator's data, and each worker's state, on a disk of its own of so many MiB.
    pub farm_disk_mib: Option<u64>,
    pub worker_disk_mib: Option<u64>,
    /// Whose disk can lose its power.
    pub cuts: Option<Cuts>,
    /// More variables of the orchestrator.
    pub orchestrator_env: Vec<(String, String)>,
}

/// The one of the farm's daemons whose disk can lose its power.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cuts {
    Orchestrator,
    /// The first worker.
    Worker,
}

/// What the workers of a farm run their jobs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provider {
    /// The worker's own host.
    Host,
    /// VMs of a simulated Mac.
    Tart,
}

impl Setup {
    /// The same with workers of this kind. VMs boot on a clock of their own, so leases are not scaled beyond them.
    pub fn on(self, provider: Provider) -> Self {
        match provider {
            Provider::Host => self,
            Provider::Tart => {
                Self { macs: Some(sim_host::Setup::default()), time_scale: self.time_scale.min(10), ..self }
            }
        }
    }
}

/// What the workers' VMs are made of.
pub const IMAGE: &str = "registry.test/alloy/base:latest";

impl Default for Setup {
    fn default() -> Self {
        Self {
            workers: 1,
            slots: 2,
            time_scale: 1,
            macs: None,
            image: Profile::default(),
            faults: Vec::new(),
            image_budget_gib: 0,
            disk_floor_mib: 0,
            farm_disk_mib: None,
            worker_disk_mib: None,
            cuts: None,
            orchestrator_env: Vec::new(),
        }
    }
}

pub struct Farm {
    /// Before the directory that they lie in.
    mounts: Vec<Mount>,
    disk: Option<CutDisk>,
    /// Where its bytes lie, if not in files.
    _bucket: Option<crate::s3::S3>,
    dir: TempDir,
    setup: Setup,
    address: SocketAddr,
    token: String,
    orchestrator: Option<Daemon>,
    workers: Vec<Option<Daemon>>,
    macs: Vec<SimHost>,
    /// Where a worker finds the orchestrator, if it goes through a proxy.
    routes: Vec<Option<String>>,
    /// The test leaves jobs behind on purpose.
    pub leaves_live_jobs: bool,
}

impl Farm {
    /// Starts the orchestrator and the workers, and waits until every slot is announced.
    pub async fn start(setup: Setup) -> Result<Farm> {
        let mut farm = Farm::orchestrator_only(setup).await?;
        for number in 0..farm.setup.workers {
            farm.add_mac()?;
            if let Some(mib) = farm.setup.worker_disk_mib {
                farm.mounts.push(Mount::tmpfs(&farm.worker_dir(number), mib)?);
            }
            farm.enrol(number).await?;
            farm.workers.push(None);
            farm.start_worker(number)?;
        }
        farm.all_connected().await;
        Ok(farm)
    }

    fn add_mac(&mut self) -> Result<()> {
        let Some(setup) = self.setup.macs.clone() else { return Ok(()) };
        let mac = match self.macs.first() {
            Some(first) => SimHost::with_registry_of(setup, first)?,
            None => SimHost::new(setup)?,
        };
        mac.publish(IMAGE, &self.setup.image)?;
        if let Some(faults) = self.setup.faults.get(self.macs.len()) {
            mac.faults(faults);
        }
        self.macs.push(mac);
        Ok(())
    }

    /// The simulated Mac of this worker.
    pub fn mac(&self, number: usize) -> &SimHost {
        &self.macs[number]
    }

    /// True if its workers make VMs.
    pub fn has_macs(&self) -> bool {
        self.setup.macs.is_some()
    }

    /// An orchestrator without a worker.
    pub async fn orchestrator_only(setup: Setup) -> Result<Farm> {
        let (bucket, orchestrator_env) = backend::of(&setup).await?;
        let setup = Setup { orchestrator_env, ..setup };
        let dir = tempfile::Builder::new().prefix("alloy-farm-").tempdir()?;
        fs::create_dir(dir.path().join("logs"))?;
        fs::create_dir(dir.path().join("home"))?;
        let mounts = match setup.farm_disk_mib {
            Some(mib) => vec![Mount::tmpfs(&dir.path().join("data"), mib)?],
            None => Vec::new(),
        };
        let at = match setup.cuts {
            Some(Cuts::Orchestrator) => Some("data"),
            Some(Cuts::Worker) => Some("worker-0"),
            None => None,
        };
        let disk = at.map(|at| CutDisk::new(&dir.path().join("disk"), &dir.path().join(at))).transpose()?;
        let mut farm = Farm {
            mounts,
            disk,
            _bucket: bucket,
            dir,
            setup,
            address: port::own_address()?,
            token: String::new(),
            orchestrator: None,
            workers: Vec::new(),
            macs: Vec::new(),
            routes: Vec::new(),
            leaves_live_jobs: false,
        };
        farm.start_orchestrator().await?;
        Ok(farm)
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn token(&self) -> &str {
        &self.token
    }

    /// The administrator's view.
    pub fn api(&self) -> Api {
        Api::new(&self.url(), Some(&self.token))
    }

    pub fn farm_dir(&self) -> PathBuf {
        self.dir().join("data").join("farm")
    }

    pub fn worker_dir(&self, number: usize) -> PathBuf {
        self.dir().join(format!("worker-{number}"))
    }

    /// A directory for a test's own files.
    pub fn scratch(&self, name: &str) -> Result<PathBuf> {
        let path = self.dir().join("scratch").join(name);
        fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// One of our programs, in an environment that has nothing of the machine's but its `PATH`.
    pub fn command(&self, program: &str) -> Command {
        let mut command = isolated(&bin_dir().join(program), self.dir());
        command.env("ALLOY_TIME_SCALE", self.setup.time_scale.to_string());
        if self.setup.disk_floor_mib > 0 {
            command.env("ALLOY_DISK_FLOOR_MIB", self.setup.disk_floor_mib.to_string());
        }
        command
    }

    /// `alloy ARGS`, talking to this farm, in the scratch directory.
    pub fn alloy(&self, args: &[&str]) -> Command {
        let mut command = self.command("alloy");
        command.args(args).env("ORCHESTRATOR_URL", self.url()).env("ALLOY_TOKEN", &self.token);
        command.current_dir(self.dir().join("home"));
        command
    }

    pub fn orchestrator_command(&self, listen: SocketAddr) -> Command {
        let mut command = self.command("orchestrator");
        command.arg("--data-dir").arg(self.dir().join("data")).arg("--listen").arg(listen.to_string());
        command.envs(self.setup.orchestrator_env.iter().cloned());
        command
    }

    /// The next start of the orchestrator has these variables in place of those of the setup.
    pub fn set_orchestrator_env(&mut self, variables: Vec<(String, String)>) {
        self.setup.orchestrator_env = variables;
    }

    /// What the orchestrator is told of where its state and bytes are, for a command that looks there too.
    pub fn orchestrator_env(&self) -> Vec<(String, String)> {
        self.setup.orchestrator_env.clone()
    }

    /// The next start of the orchestrator finds nothing of the farm.
    pub async fn lose_data(&mut self) -> Result<()> {
        let env = std::mem::take(&mut self.setup.orchestrator_env);
        self.setup.orchestrator_env = backend::emptied(&self.farm_dir(), env).await?;
        Ok(())
    }

    /// Starts it, on the farm's own port.
    pub async fn start_orchestrator(&mut self) -> Result<()> {
        ensure!(self.orchestrator.is_none(), "it runs");
        let mut daemon =
            Daemon::start("orchestrator", self.orchestrator_command(self.address), &self.log("orchestrator"))?;
        let dir = self.farm_dir();
        let found = until("the orchestrator has written its address", async || {
            if let Some(status) = daemon.has_ended() {
                return Ok(Some(Err(anyhow::anyhow!("the orchestrator ended: {status}\n{}", daemon.log_text()))));
            }
            Ok(told_address(&daemon.log_text()).zip(read_token(&dir)).map(Ok))
        })
        .await;
        let (address, token) = found?;
        (self.address, self.token) = (address, token);
        self.orchestrator = Some(daemon);
        let open = Api::new(&self.url(), None);
        until("the orchestrator is ready", async || {
            let answer = open.request(reqwest::Method::GET, "/readyz").send().await?;
            Ok(answer.status().is_success().then_some(()))
        })
        .await;
        Ok(())
    }

    /// Invites and joins a worker; its key lies in its own state directory.
    pub async fn enrol(&self, number: usize) -> Result<()> {
        let invite = self.api().post("/v1/workers/invites", &serde_json::json!({})).await?;
        let token = invite["token"].as_str().context("an invitation has a token")?;
        let mut join = self.command("worker");
        join.arg("join").arg(self.url()).arg(token).args(["--name", &format!("mini-{number}")]);
        join.arg("--state-dir").arg(self.worker_dir(number));
        let out = join.output()?;
        ensure!(out.status.success(), "worker join: {}", String::from_utf8_lossy(&out.stderr));
        Ok(())
    }

    /// Adds a worker that runs jobs on this machine itself, and returns its number.
    pub async fn add_host_worker(&mut self) -> Result<usize> {
        let number = self.workers.len();
        self.enrol(number).await?;
        self.workers.push(None);
        self.start_worker(number)?;
        self.all_connected().await;
        Ok(number)
    }

    /// Adds a worker, on a simulated Mac of its own if the setup says so, that finds the orchestrator at `route`.
    pub async fn add_worker_through(&mut self, route: String) -> Result<usize> {
        let number = self.workers.len();
        self.add_mac()?;
        self.enrol(number).await?;
        self.workers.push(None);
        self.routes.resize(number, None);
        self.routes.push(Some(route));
        self.start_worker(number)?;
        Ok(number)
    }

    pub fn start_worker(&mut self, number: usize) -> Result<()> {
        ensure!(self.workers[number].is_none(), "it runs");
        let (run, name) = (self.worker_command(number)?, format!("worker-{number}"));
        self.workers[number] = Some(Daemon::start(&name, run, &self.log(&name))?);
        Ok(())
    }

    pub fn worker_command(&self, number: usize) -> Result<Command> {
        let mut run = self.command("worker");
        run.arg("run").arg("--state-dir").arg(self.worker_dir(number));
        if !self.worker_file(number).exists() {
            self.configure_worker(number, self.setup.slots, IMAGE, "")?;
        }
        run.arg("--config").arg(self.worker_file(number));
        match self.macs.get(number) {
            Some(mac) => run.args(["--provider", "tart"]).envs(mac.env()),
            None => run.args(["--provider", "host"]),
        };
        if let Some(Some(route)) = self.routes.get(number) {
            run.env("ORCHESTRATOR_URL", route);
        }
        run.env("ALLOY_IMAGE_BUDGET_GIB", self.setup.image_budget_gib.to_string());
        Ok(run)
    }

    fn worker_file(&self, number: usize) -> PathBuf {
        self.dir().join(format!("worker-{number}.toml"))
    }

    /// Writes the file of a worker, who reads it when it starts and with a SIGHUP.
    pub fn configure_worker(&self, number: usize, slots: usize, image: &str, more: &str) -> Result<()> {
        let text = format!("vm_pool_size = {slots}\nbase_image = \"{image}\"\n{more}\n");
        Ok(fs::write(self.worker_file(number), text)?)
    }

    pub fn worker(&mut self, number: usize) -> &mut Daemon {
        self.workers[number].as_mut().expect("this worker runs")
    }

    pub fn orchestrator(&mut self) -> &mut Daemon {
        self.orchestrator.as_mut().expect("the orchestrator runs")
    }

    /// The disk whose power can be cut.
    pub fn disk(&self) -> &CutDisk {
        self.disk.as_ref().expect("the setup asks for one")
    }

    /// Puts the disk back to what a cut left. Whoever used it must have ended.
    pub fn go_on_after(&mut self, cut: &Path) -> Result<()> {
        let disk = self.disk.take().context("the setup asks for one")?;
        self.disk = Some(disk.go_on_after(cut)?);
        Ok(())
    }

    /// Waits for an orchestrator that ends by itself. Returns how, and all that it said.
    pub fn ended_orchestrator(&mut self) -> Result<(ExitStatus, String)> {
        let mut daemon = self.orchestrator.take().context("the orchestrator runs")?;
        let status = daemon.wait(STOP)?;
        Ok((status, daemon.log_text()))
    }

    /// `kill -9`.
    pub fn kill_worker(&mut self, number: usize) {
        self.workers[number].take().expect("this worker runs").kill();
    }

    pub fn kill_orchestrator(&mut self) {
        self.orchestrator.take().expect("the orchestrator runs").kill();
    }

    /// SIGTERM, and the end of it.
    pub fn stop_orchestrator(&mut self) -> Result<()> {
        let mut daemon = self.orchestrator.take().context("the orchestrator runs")?;
        daemon.signal(Signal::SIGTERM);
        let status = daemon.wait(STOP)?;
        ensure!(status.success(), "the orchestrator ended with {status}");
        Ok(())
    }

    /// Waits for a worker that ends by itself. Returns how, and all that it said.
    pub fn ended_worker(&mut self, number: usize) -> Result<(ExitStatus, String)> {
        let mut daemon = self.workers[number].take().context("this worker runs")?;
        let status = daemon.wait(STOP)?;
        Ok((status, daemon.log_text()))
    }

    /// SIGTERM, and the end of it.
    pub fn stop_worker(&mut self, number: usize) -> Result<()> {
        let mut daemon = self.workers[number].take().context("this worker runs")?;
        daemon.signal(Signal::SIGTERM);
        daemon.wait(STOP)?;
        Ok(())
    }

    /// Waits until every running worker is connected with all its slots free.
    pub async fn all_connected(&self) {
        let api = self.api();
        let running = self.workers.iter().flatten().count();
        let slots = u64::try_from(self.setup.slots).unwrap_or(u64::MAX);
        until("every worker is connected and idle", async || {
            let list = api.get("/v1/workers").await?;
            let workers = list["workers"].as_array().context("a list")?;
            let ready = workers.iter().filter(|worker| worker["state"] == "ready" && worker["slots"] == slots);
            Ok((ready.filter(|worker| worker["slots_busy"] == 0).count() == running).then_some(()))
        })
        .await;
    }

    /// Waits until every slot holds a VM that is ready. A plain host is ready at once.
    pub async fn all_warm(&self) {
        if self.macs.is_empty() {
            return;
        }
        let api = self.api();
        until("every slot holds a warm VM", async || {
            let list = api.get("/v1/workers").await?;
            let workers = list["workers"].as_array().context("a list")?;
            let warm = |worker: &Value| worker["slots_warm"] == worker["slots"];
            Ok((!workers.is_empty() && workers.iter().all(warm)).then_some(()))
        })
        .await;
    }

    /// Every process of a worker and of the jobs that it runs, wherever these run.
    pub fn processes(&self, number: usize) -> Vec<Found> {
        let mut found = processes_in(&self.worker_dir(number));
        found.extend(self.macs.get(number).map(SimHost::processes).unwrap_or_default());
        found.sort_by_key(|process| process.pid);
        found.dedup_by_key(|process| process.pid);
        found
    }

    /// Sends a tree as `curl` would, and returns its digest for a job to name.
    pub async fn upload(&self, tree: &Path) -> Result<Value> {
        upload_tree(&self.api(), tree).await
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir().join("logs").join(format!("{name}.log"))
    }

    /// Stops all, workers first, as an operator would.
    fn stop_all(&mut self) -> Result<()> {
        for daemon in self.workers.iter().flatten() {
            daemon.signal(Signal::SIGTERM);
        }
        for daemon in self.workers.iter_mut().flatten() {
            let status = daemon.wait(STOP)?;
            ensure!(status.success(), "{} ended with {status}", daemon.name);
        }
        if let Some(daemon) = &mut self.orchestrator {
            daemon.signal(Signal::SIGTERM);
            let status = daemon.wait(STOP)?;
            ensure!(status.success(), "the orchestrator ended with {status}");
        }
        Ok(())
    }

    fn check_and_stop(&mut self) -> Result<()> {
        if self.orchestrator.is_some() && !self.leaves_live_jobs {
            let live = live_jobs(self.api())?;
            ensure!(live.is_empty(), "the test leaves live jobs: {live:?}");
        }
        self.stop_all()?;
        let dir = self.dir().to_owned();
        until_blocking("no process of the farm is left", Duration::from_secs(15), || processes_in(&dir).is_empty())
            .with_context(|| format!("left: {:#?}", processes_in(&dir)))?;
        for number in 0..self.workers.len() {
            let left = vm_dirs(&self.worker_dir(number));
            ensure!(left.is_empty(), "VM directories are left: {left:?}");
        }
        for mac in &self.macs {
            until_blocking("no process of the simulated Mac is left", PATIENCE, || mac.processes().is_empty())
                .with_context(|| format!("left: {:#?}", mac.processes()))?;
            ensure!(mac.leaks().is_empty(), "left on a simulated Mac: {:#?}", mac.leaks());
        }
        Ok(())
    }

    fn print_logs(&self) {
        let Ok(entries) = fs::read_dir(self.dir().join("logs")) else { return };
        for entry in entries.flatten() {
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            let from = text.len().saturating_sub(8_000);
            let from = (from..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(0);
            eprintln!("--- {} ---\n{}", entry.path().display(), &text[from..]);
        }
    }
}

impl Drop for Farm {
    fn drop(&mut self) {
        let failing = std::thread::panicking();
        let checked = if failing { Ok(()) } else { self.check_and_stop() };
        if failing || checked.is_err() {
            self.print_logs();
        }
        for daemon in self.workers.iter_mut().flatten().chain(&mut self.orchestrator) {
            daemon.kill();
        }
        for found in processes_in(self.dir.path()) {
            signal(found.pid, Signal::SIGKILL);
        }
        if let Err(error) = checked {
            panic!("the farm did not end clean: {error:#}");
        }
    }
}

/// A program in an environment that has nothing of the machine's but its `PATH`; all that it keeps lies below `dir`.
pub fn isolated(program: &Path, dir: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().current_dir(dir).stdin(Stdio::null());
    for name in ["PATH", "LANG", "TMPDIR", "RUST_BACKTRACE", "ALLOY_LOG"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    let home = dir.join("home");
    command.env("HOME", &home).env("XDG_CONFIG_HOME", home.join("config")).env("XDG_DATA_HOME", home.join("share"));
    command.env("XDG_CACHE_HOME", home.join("cache")).env("XDG_STATE_HOME", home.join("state"));
    command.env("ALLOY_DATA_DIR", dir.join("data"));
    command
}

/// Where the programs are: `ALLOY_TEST_BIN_DIR`, else beside the test that runs.
pub fn bin_dir() -> PathBuf {
    let dir = match std::env::var_os("ALLOY_TEST_BIN_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => {
            let test = std::env::current_exe().expect("a test knows its own path");
            test.ancestors().nth(2).expect("tests lie in target/PROFILE/deps").to_owned()
        }
    };
    for program in ["alloy", "orchestrator", "worker", "noise"] {
        let there = dir.join(program).exists();
        assert!(there, "no `{program}` in {}: run `cargo build --workspace --bins`, or tests/run", dir.display());
    }
    dir
}

/// True when the large counts are asked for.
pub fn full() -> bool {
    std::env::var_os("ALLOY_TEST_FULL").is_some()
}

/// Runs a command to its end off the async threads.
pub async fn output(mut command: Command) -> Result<Output> {
    let shown = format!("{command:?}");
    tokio::task::spawn_blocking(move || command.output()).await?.with_context(|| shown)
}

/// An orchestrator on other data than its farm's, on a free port.
pub fn isolated_orchestrator(dir: &Path, data: &Path) -> Command {
    let mut command = isolated(&bin_dir().join("orchestrator"), dir);
    command.arg("--data-dir").arg(data).args(["--listen", "127.0.0.1:0"]).env("ALLOY_DISK_FLOOR_MIB", "1");
    command
}
