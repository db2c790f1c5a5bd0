//! A farm whose connections go through proxies and whose history is written down. A job on it is a real `alloy run` beside a
//! follower of the feed; when the stage is left, the history is checked and nothing may be left over.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use nix::sys::signal::Signal;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::Dice;
use super::follow::{self, Progress};
use super::watch::{Watch, running};
use crate::farm::{Farm, Provider, Setup, bin_dir};
use crate::history::{Recorder, Seen, check};
use crate::noise;
use crate::observe::{Api, PATIENCE, is_terminal, until};
use crate::process::signal;
use crate::proxy::Proxy;
use crate::teller;

pub struct Stage {
    pub farm: Farm,
    /// Between users and the farm.
    pub front: Proxy,
    /// Between each worker and the farm.
    pub links: Vec<Proxy>,
    pub recorder: Recorder,
    pub dice: Dice,
    pub dir: PathBuf,
    name: String,
    slots: usize,
    jobs: BTreeMap<String, Known>,
    made: u64,
    watch: Option<Watch>,
}

/// A job of this stage.
struct Known {
    /// What it prints if it comes to its end.
    prints: Option<u64>,
    /// Reads on to the end, whoever else looks at it.
    follower: watch::Receiver<Progress>,
}

/// A client process; its output of both kinds lies in files.
pub struct Client {
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

impl Client {
    pub fn start(mut command: Command, dir: &Path) -> Result<Client> {
        fs::create_dir_all(dir)?;
        let (out, err) = (dir.join("out"), dir.join("err"));
        let child = command.stdin(Stdio::null()).stdout(File::create(&out)?).stderr(File::create(&err)?).spawn()?;
        Ok(Client { child, out, err })
    }

    pub fn kill(&mut self) {
        signal(self.pid(), Signal::SIGKILL);
        let _gone = self.child.wait();
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid is small")
    }

    pub fn has_ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    pub async fn ends(&mut self) -> Result<ExitStatus> {
        let said = self.said();
        let status = until(&format!("a client has ended: {said}"), async || Ok(self.has_ended())).await;
        Ok(status)
    }

    pub fn printed(&self) -> Vec<u8> {
        fs::read(&self.out).unwrap_or_default()
    }

    pub fn said(&self) -> String {
        fs::read_to_string(&self.err).unwrap_or_default()
    }

    /// The job that it named.
    pub fn job(&self) -> Option<String> {
        let said = self.said();
        let (_, rest) = said.split_once("job_")?;
        let id: String = rest.chars().take_while(char::is_ascii_alphanumeric).collect();
        (id.len() == 26).then(|| format!("job_{id}"))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What a run shall do.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// Of [`crate::teller`]; `{gate}` is the run's own gate.
    pub steps: Vec<String>,
    /// Bytes of the artifact that comes back.
    pub artifact: u64,
    /// Bytes of the tree that goes along.
    pub tree: u64,
}

/// A run under way.
pub struct Run {
    pub client: Client,
    pub dir: PathBuf,
    pub gate: PathBuf,
    pub plan: Plan,
    /// The artifact's name, which no other run's has: the farm has none of its bytes.
    pub artifact: String,
}

impl Run {
    pub fn open_gate(&self) -> Result<()> {
        Ok(fs::write(&self.gate, "")?)
    }
}

impl Stage {
    pub async fn new(name: &str, setup: Setup, provider: Provider, dice: Dice) -> Result<Stage> {
        let (workers, slots) = (setup.workers, setup.slots);
        let mut farm = Farm::orchestrator_only(Setup { time_scale: setup.time_scale, ..setup.on(provider) }).await?;
        let (front, mut links) = (Proxy::open(farm.address()).await?, Vec::new());
        for _ in 0..workers {
            let link = Proxy::open(farm.address()).await?;
            farm.add_worker_through(link.url()).await?;
            links.push(link);
        }
        farm.all_connected().await;
        let dir = farm.scratch("stage")?;
        fs::create_dir_all(dir.join("printed"))?;
        let recorder = Recorder::create(&dir.join("history"))?;
        let watch = Some(Watch::start(recorder.clone(), slots));
        let name = name.to_owned();
        Ok(Stage { farm, front, links, recorder, dice, dir, name, slots, jobs: BTreeMap::new(), made: 0, watch })
    }

    pub fn slots(&self) -> usize {
        self.slots
    }

    /// The administrator's view, past the proxy.
    pub fn api(&self) -> Api {
        self.farm.api()
    }

    /// A directory of its own for something that is made now.
    pub fn fresh(&mut self, what: &str) -> Result<PathBuf> {
        self.made += 1;
        let dir = self.dir.join(format!("{what}-{}", self.made));
        fs::create_dir_all(&dir)?;
        Ok(dir)
    }

    /// `alloy ARGS` through the proxy.
    pub fn alloy(&self, args: &[&str]) -> Command {
        let mut command = self.farm.alloy(args);
        command.env("ORCHESTRATOR_URL", self.front.url());
        command
    }

    /// Starts `alloy run` with this plan.
    pub fn run(&mut self, plan: Plan) -> Result<Run> {
        let dir = self.fresh("run")?;
        let (tree, gate) = (dir.join("tree"), dir.join("gate"));
        fs::create_dir(&tree)?;
        if plan.tree > 0 {
            let seed = noise::mix(self.made ^ noise::stream(&self.name, 0));
            fs::write(tree.join("big"), noise::range(seed, 0, plan.tree))?;
        }
        let program = match self.farm.has_macs() {
            // Guests see nothing of their host.
            true => {
                fs::copy(self.stripped()?, tree.join("noise"))?;
                "./noise".to_owned()
            }
            false => bin_dir().join("noise").display().to_string(),
        };
        let mut args = vec!["run".to_owned()];
        let artifact = format!("{}-{}.bin", self.name, self.made);
        if plan.artifact > 0 {
            args.extend(["--artifact".to_owned(), artifact.clone()]);
        }
        args.extend(["--".to_owned(), program, "tell".to_owned()]);
        if plan.artifact > 0 {
            args.push(format!("file:{artifact}:{}", plan.artifact));
        }
        args.extend(plan.steps.iter().map(|step| step.replace("{gate}", &gate.display().to_string())));
        if !self.farm.has_macs() {
            args.push(format!("told:{}", self.dir.join("printed").display()));
        }
        let mut command = self.alloy(&args.iter().map(String::as_str).collect::<Vec<_>>());
        command.current_dir(&tree);
        Ok(Run { client: Client::start(command, &dir)?, dir, gate, plan, artifact })
    }

    /// The program that jobs in VMs take along, without what a debugger wants: that is most of it.
    fn stripped(&self) -> Result<PathBuf> {
        let path = self.dir.join("noise");
        if !path.exists() {
            fs::copy(bin_dir().join("noise"), &path)?;
            // Without the tool it is only larger.
            let _stripped = Command::new("strip").arg(&path).status();
        }
        Ok(path)
    }

    /// Submits a job that shall succeed, without a client process, under a key, and follows it.
    pub async fn submit(&mut self, steps: &[String]) -> Result<(String, watch::Receiver<Progress>)> {
        self.made += 1;
        let key = format!("{}-{}", self.name, self.made);
        let mut argv = vec![bin_dir().join("noise").display().to_string(), "tell".to_owned()];
        argv.extend(steps.iter().cloned());
        argv.push(format!("told:{}", self.dir.join("printed").display()));
        self.recorder.write(Seen::Submit { key: key.clone(), retries: 0 });
        let request = self.api().request(Method::POST, "/v1/jobs").header("idempotency-key", &key);
        let answer: Value = request.json(&json!({ "spec": { "argv": argv } })).send().await?.json().await?;
        let job = answer["id"].as_str().with_context(|| answer.to_string())?.to_owned();
        self.recorder.write(Seen::Answer { key, job: Some(job.clone()) });
        let progress = self.follow(&job, steps);
        Ok((job, progress))
    }

    /// A job of this stage that does these steps and shall succeed, and its follower.
    pub fn follow(&mut self, job: &str, steps: &[String]) -> watch::Receiver<Progress> {
        let prints = teller::length(steps);
        self.recorder.write(Seen::Job { job: job.to_owned(), retries: 0, ends: "succeeded".into() });
        if let Some(len) = prints {
            self.recorder.write(Seen::Planned { job: job.to_owned(), len });
        }
        let follower = follow::feed(self.api(), job, "feed", self.recorder.clone());
        let known = Known { prints, follower: follower.clone() };
        assert!(self.jobs.insert(job.to_owned(), known).is_none(), "{job} is followed already");
        follower
    }

    /// How much this attempt printed, which came to its end: by its own word, else by its plan. The farm is not asked.
    pub fn printed(&self, job: &str, attempt: u32) -> Result<u64> {
        match fs::read_to_string(self.dir.join("printed").join(format!("{job}.{attempt}"))) {
            Ok(told) => Ok(told.parse()?),
            Err(_) => self.jobs.get(job).and_then(|known| known.prints).with_context(|| format!("{job} has no plan")),
        }
    }

    /// All jobs that the farm has.
    pub async fn listed(&self) -> Result<Vec<String>> {
        let (mut jobs, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = self.api().get(&format!("/v1/jobs?limit=200{cursor}")).await?;
            let rows = page["jobs"].as_array().context("a page of jobs")?;
            jobs.extend(rows.iter().filter_map(|job| job["id"].as_str()).map(str::to_owned));
            match page["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return Ok(jobs),
            }
        }
    }

    /// Jobs that nobody has named yet: their client died before it could.
    pub async fn unnamed(&self) -> Result<Vec<String>> {
        Ok(self.listed().await?.into_iter().filter(|job| !self.jobs.contains_key(job)).collect())
    }

    /// Waits until the worker's newest session is open.
    pub async fn all_online(&self) {
        let api = self.api();
        let count = self.links.len();
        until("every worker is online", async || {
            let list = api.get("/v1/workers").await?;
            let away = ["suspect", "lost", "offline"];
            let online = list["workers"]
                .as_array()
                .context("a list")?
                .iter()
                .filter(|worker| worker["state"].as_str().is_some_and(|state| !away.contains(&state)));
            Ok((online.count() == count).then_some(()))
        })
        .await;
    }

    /// The number of the worker that has the job.
    pub async fn holder(&self, job: &str) -> Result<usize> {
        let view = self.api().job(job).await?;
        let name = view["worker_name"].as_str().with_context(|| format!("nobody has {view}"))?;
        Ok(name.trim_start_matches("mini-").parse()?)
    }

    /// Waits until the job has ended and its follower was told so, lets another one read all of it again, and writes down
    /// all that is left of it.
    pub async fn settle(&mut self, job: &str) -> Result<Value> {
        let api = self.api();
        let view = api.end(job).await;
        self.recorder.end("api", &view);
        let known = self.jobs.get(job).with_context(|| format!("nobody follows {job}"))?;
        told_the_end(job, known.follower.clone()).await?;
        let attempts = 1..=u32::try_from(view["attempt"].as_u64().unwrap_or(0))?;
        for attempt in attempts.clone() {
            let len = stored(&api, job, attempt).await?.len() as u64;
            self.recorder.write(Seen::Readable { job: job.to_owned(), attempt, len });
        }
        told_the_end(job, follow::feed(api.clone(), job, "late", self.recorder.clone())).await?;
        for attempt in attempts {
            let bytes = stored(&api, job, attempt).await?;
            let (len, sum) = (bytes.len() as u64, noise::sum(&bytes));
            self.recorder.write(Seen::Stored { job: job.to_owned(), attempt, len, sum });
            if let Ok(printed) = fs::read_to_string(self.dir.join("printed").join(format!("{job}.{attempt}"))) {
                self.recorder.write(Seen::Printed { job: job.to_owned(), attempt, len: printed.parse()? });
            }
        }
        let list = api.get(&format!("/v1/jobs/{job}/artifacts")).await?;
        for artifact in list["artifacts"].as_array().context("a list")? {
            let path = artifact["path"].as_str().context("a path")?;
            let request = api.request(Method::GET, &format!("/v1/jobs/{job}/artifacts/{path}"));
            let bytes = request.send().await?.error_for_status()?.bytes().await?;
            self.recorder.write(Seen::Artifact {
                job: job.to_owned(),
                path: path.to_owned(),
                size: artifact["size_bytes"].as_u64().unwrap_or(0),
                sha256: artifact["sha256"].as_str().unwrap_or_default().to_owned(),
                got_size: bytes.len() as u64,
                got_sha256: noise::sha256_of(&bytes),
            });
        }
        Ok(view)
    }

    /// Waits until a follower of the job is there. Of one that does not come it is said how far everybody else is.
    pub async fn follows(
        &self,
        job: &str,
        progress: &mut watch::Receiver<Progress>,
        is_there: impl FnMut(&Progress) -> bool,
    ) -> Result<()> {
        let there = tokio::time::timeout(PATIENCE, progress.wait_for(is_there)).await.map(|there| there.map(drop));
        let at = progress.borrow().clone();
        match there {
            Ok(there) => there.context("the follower is gone"),
            Err(_late) => bail!("a follower of {job} waits in vain: {}", self.how_far(job, &at).await),
        }
    }

    async fn how_far(&self, job: &str, follower: &Progress) -> String {
        let view = self.api().job(job).await;
        let log = stored(&self.api(), job, follower.attempt.max(1)).await.map(|log| log.len());
        let spools: Vec<_> = (0..self.links.len()).map(|number| self.spooled(number)).collect();
        let vms = running(self.slots);
        format!("{follower:?}; the farm has {log:?} bytes of {view:?}; workers have {spools:?}; running: {vms:?}")
    }

    /// The logs in a worker's spool, and how long they are.
    fn spooled(&self, worker: usize) -> Vec<(PathBuf, u64)> {
        let inside = |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().flatten();
        let attempts = inside(self.farm.worker_dir(worker).join("spool"));
        let files = attempts.flat_map(|attempt| inside(attempt.path()));
        files.map(|file| (file.path(), file.metadata().map_or(0, |about| about.len()))).collect()
    }

    /// Settles everything, reads the history and lets no violation pass. Dropping the farm finds what is left over.
    pub async fn leave(mut self) -> Result<()> {
        for job in self.listed().await? {
            let view = self.api().job(&job).await?;
            ensure!(is_terminal(&view), "{}: left behind: {view}", self.name);
        }
        self.recorder.write(Seen::Listed { jobs: self.listed().await? });
        let looks = self.watch.take().map_or(0, |watch| watch.looks());
        let history = self.recorder.read()?;
        let broken = check(&history);
        println!("{}: {} lines of history, {looks} looks at the processes", self.name, history.len());
        if !broken.is_empty() {
            let kept = std::env::temp_dir().join(format!("alloy-history-{}-{}", self.name, std::process::id()));
            fs::copy(self.dir.join("history"), &kept)?;
            panic!("{}: broken, see {}: {broken:#?}", self.name, kept.display());
        }
        // Stopping takes its time, and blocks.
        tokio::task::block_in_place(|| drop(self));
        Ok(())
    }
}

async fn told_the_end(job: &str, mut follower: watch::Receiver<Progress>) -> Result<()> {
    let told = tokio::time::timeout(PATIENCE, follower.wait_for(|at| at.end.is_some())).await;
    told.with_context(|| format!("a follower of {job} is not told the end"))??;
    Ok(())
}

/// What can be read of an attempt's log.
async fn stored(api: &Api, job: &str, attempt: u32) -> Result<Bytes> {
    let answer = api.request(Method::GET, &format!("/v1/jobs/{job}/log?attempt={attempt}")).send().await?;
    Ok(answer.error_for_status()?.bytes().await?)
}

/// What a client printed of a job: what there was of each attempt, one behind the other, the last one whole.
pub fn is_what_was_printed(job: &str, attempts: u32, last: u64, printed: &[u8]) -> Result<()> {
    let whole = usize::try_from(last)?;
    ensure!(printed.len() >= whole, "{job}: {} bytes were printed, the last attempt has {whole}", printed.len());
    let (mut earlier, newest) = printed.split_at(printed.len() - whole);
    let right = noise::range(noise::stream(job, attempts), 0, last);
    ensure!(newest == right, "{job}: the last attempt's bytes are wrong");
    for attempt in 1..attempts {
        let right = noise::range(noise::stream(job, attempt), 0, earlier.len() as u64);
        let same = earlier.iter().zip(&right).take_while(|(printed, right)| printed == right).count();
        earlier = &earlier[same..];
    }
    ensure!(earlier.is_empty(), "{job}: {} bytes belong to no attempt", earlier.len());
    Ok(())
}
