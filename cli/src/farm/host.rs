//! S: a farm inside this process: the same orchestrator on a loopback port, and a worker that enrols itself by the normal
//! call. Nothing of it is special but that both live and end with a command.

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use alloy_shared::env::Env as _;
use alloy_shared::id::JobId;
use alloy_shared::runtime::{Lifecycle, LogFormat, SystemEnv, telemetry};
use alloy_shared::secret::Secret;
use alloy_shared::wire::farm::{InviteRequest, WorkerState, WorkerView};
use alloy_shared::wire::job::Reason;
use alloy_shared::wire::{ErrorCode, PROTOCOL};
use orchestrator::ServeError;
use orchestrator::auth::Principal;
use orchestrator::ops::{self, OpError};
use orchestrator::store::sql::LockError;
use tokio::sync::watch;
use worker::Daemon;
use worker::host::{HostError, Identity};

use super::data::{DataDir, Note};
use super::here::own_binary;
use super::lease::{Alive, Dead, Leases};
use crate::context::{App, Farm};
use crate::output::{Failure, Fault};

/// The worker says hello after this time, or something is wrong with it.
const READY_MS: u64 = 30_000;
const LOOK_AGAIN_MS: u64 = 10;
/// Between two looks for jobs whose command is dead.
const LEASES_LOOK_MS: u64 = 1_000;
/// An orderly end. What is not over then is cut: every part of the farm heals from a crash.
const STOP_MS: u64 = 10_000;

/// What a host is wanted for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wish {
    /// Jobs are looked at.
    Read,
    /// Jobs run.
    Work,
    /// For others, until a signal: at the address that the configuration names.
    Up(UpFlags),
}

/// What `alloy up` is told on the command line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct UpFlags {
    pub(crate) listen: Option<String>,
    pub(crate) behind_proxy: bool,
    pub(crate) base_url: Option<String>,
}

pub(crate) enum Start {
    Running(Box<Host>),
    /// Somebody else was faster.
    Taken,
}

/// A running farm.
pub(crate) struct Host {
    pub(crate) farm: Farm,
    /// Under which address people see it.
    pub(crate) base_url: String,
    pub(crate) token: Secret<String>,
    pub(super) data: DataDir,
    pub(super) app: Arc<orchestrator::App>,
    orchestrator: Lifecycle,
    pub(super) worker: Option<LocalWorker>,
    /// Jobs that this farm does not run: nobody waits for them here.
    pub(super) asleep: BTreeSet<JobId>,
}

pub(super) struct LocalWorker {
    pub(super) id: alloy_shared::id::WorkerId,
    pub(super) life: Lifecycle,
    /// Why it stopped by itself; its other end is gone when the worker is.
    fault: watch::Receiver<Option<String>>,
}

pub(crate) async fn start(app: &App, data: &DataDir, wish: &Wish) -> Result<Start, Failure> {
    // A command may become the host a second time, after somebody else's farm ended under it.
    static LOGGING: OnceLock<Result<(), String>> = OnceLock::new();
    LOGGING.get_or_init(|| telemetry(LogFormat::Compact, "error")).clone().map_err(Failure::usage)?;
    let config = orchestrator_config(data, wish, variables())?;
    let life = Lifecycle::new();
    let env = Arc::new(SystemEnv::new(life.clone()));
    let served = match orchestrator::serve(config, env, life.clone()).await {
        Ok(served) => served,
        Err(ServeError::Lock(LockError::Taken { .. })) => return Ok(Start::Taken),
        Err(error) => {
            let fault = if error.is_usage() { Fault::Usage } else { Fault::Error };
            return Err(Failure::new(fault, format!("the farm does not start: {error}")));
        }
    };
    let url = format!("http://{}", served.addr);
    let opened = data.token().and_then(|token| Ok((app.farm_at(url.clone(), Some(token.clone()))?, token)));
    let (mut farm, token) = match opened {
        Ok(opened) => opened,
        Err(failure) => {
            stop(life, STOP_MS).await;
            return Err(failure);
        }
    };
    farm.name = super::LOCAL.into();
    let mut host = Host {
        farm,
        base_url: served.base_url,
        token,
        data: data.clone(),
        app: served.app,
        orchestrator: life,
        worker: None,
        asleep: BTreeSet::new(),
    };
    match host.finish_start(app, url, wish).await {
        Ok(()) => Ok(Start::Running(Box::new(host))),
        Err(failure) => {
            host.stop(false).await;
            Err(failure)
        }
    }
}

/// The user's variables count here as they do for the daemon of its own; where it listens is this command's business.
fn orchestrator_config(
    data: &DataDir,
    wish: &Wish,
    mut variables: BTreeMap<String, String>,
) -> Result<orchestrator::config::Config, Failure> {
    let mut flags = orchestrator::config::Flags {
        data_dir: Some(data.root().display().to_string()),
        ..orchestrator::config::Flags::default()
    };
    match wish {
        Wish::Up(told) => {
            flags.listen.clone_from(&told.listen);
            flags.base_url.clone_from(&told.base_url);
            flags.behind_proxy = told.behind_proxy;
        }
        Wish::Read | Wish::Work => {
            flags.listen = Some("127.0.0.1:0".into());
            variables.retain(|name, _| name != "BASE_URL" && name != "ALLOY_BEHIND_PROXY");
        }
    }
    let resolved = orchestrator::config::Config::resolve(&flags, &variables, None);
    resolved.map(|(config, _)| config).map_err(|problems| problems_failure(&problems))
}

fn worker_config(url: String, dir: &Path) -> Result<worker::config::Config, Failure> {
    let mut variables = variables();
    variables.retain(|name, _| name != "ORCHESTRATOR_URL");
    let embedded = worker::config::Config::embedded(url, dir.to_owned());
    let flags = worker::config::Flags {
        state_dir: Some(dir.display().to_string()),
        provider: Some(embedded.provider.to_string()),
        ..worker::config::Flags::default()
    };
    let resolved = worker::config::Config::resolve(&flags, &variables, None);
    let (config, _) = resolved.map_err(|problems| problems_failure(&problems))?;
    Ok(worker::config::Config { url: embedded.url, ..config })
}

pub(super) fn problems_failure(problems: &[alloy_shared::config::Problem]) -> Failure {
    let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
    Failure::usage(lines.join("; "))
}

pub(super) fn variables() -> BTreeMap<String, String> {
    // A variable that is no text is none of ours.
    std::env::vars_os().filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?))).collect()
}

impl Host {
    async fn finish_start(&mut self, app: &App, url: String, wish: &Wish) -> Result<(), Failure> {
        if *wish == Wish::Read {
            // Without a note nobody joins: this farm is gone in a moment, and has no worker.
            return Ok(());
        }
        // Before there is a worker: what is ended here does not run again.
        let living = self.end_unwanted(app).await;
        if *wish == Wish::Work {
            self.leave_asleep(app, &living).await?;
        }
        self.worker = Some(self.start_worker(app, &url).await?);
        self.data.write_note(&Note {
            url,
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol_min: *PROTOCOL.start(),
            protocol_max: *PROTOCOL.end(),
        })
    }

    async fn start_worker(&self, app: &App, url: &str) -> Result<LocalWorker, Failure> {
        let dir = self.data.worker();
        let id = self.enrol(app, url, &dir).await?;
        let daemon = Daemon::open(worker_config(url.to_owned(), &dir)?)
            .map_err(|error| Failure::error(format!("the worker does not start: {error}")))?;
        let life = Lifecycle::new();
        let env = Arc::new(SystemEnv::new(life.clone()));
        let (noted, fault) = watch::channel(None);
        let (system, ending, guard) = (env.clone(), life.clone(), own_binary()?);
        let task = async move {
            if let Err(error) = worker::serve(daemon, system, &ending, guard).await {
                noted.send_replace(Some(error.to_string()));
            }
        };
        env.spawn("worker", Box::pin(task));
        Ok(LocalWorker { id, life, fault })
    }

    /// Enrols the worker of this machine once. A farm that was made anew does not know the old one.
    async fn enrol(&self, app: &App, url: &str, dir: &Path) -> Result<alloy_shared::id::WorkerId, Failure> {
        let fail = |error| Failure::of(error, url);
        match Identity::load(dir) {
            Ok(identity) => {
                let known = self.farm.client.workers().await.map_err(fail)?;
                if known.workers.iter().any(|worker| worker.id == identity.worker) {
                    return Ok(identity.worker);
                }
            }
            Err(HostError::NotJoined { .. }) => {}
            Err(error) => return Err(Failure::error(error.to_string())),
        }
        let invite = self.farm.client.invite(&InviteRequest::default()).await.map_err(fail)?;
        let joined = worker::join(dir, url, invite.token.expose(), None, true, app.env.clone()).await;
        joined
            .map(|identity| identity.worker)
            .map_err(|error| Failure::error(format!("the worker cannot join: {error}")))
    }

    /// Waits until the worker has said hello and what it runs jobs in: a job that names one of its labels would be refused
    /// before, and one that names an image taken that nobody can get.
    pub(crate) async fn ready(&self, app: &App) -> Result<Option<WorkerView>, Failure> {
        let Some(local) = &self.worker else { return Ok(None) };
        let until = app.env.now().mono + READY_MS;
        loop {
            let list = self.farm.client.workers().await.map_err(|error| Failure::of(error, &self.farm.url))?;
            let here = list.workers.into_iter().find(|worker| worker.id == local.id);
            let live = self.app.hub.view(&local.id, self.app.env.now().mono);
            let told = live.is_some_and(|live| live.images.is_told());
            if let Some(worker) = here.filter(|w| told && matches!(w.state, WorkerState::Ready | WorkerState::Busy)) {
                return Ok(Some(worker));
            }
            if let Some(why) = local.ended() {
                return Err(Failure::error(format!("the worker of this machine does not run: {why}")));
            }
            if app.env.now().mono >= until {
                return Err(Failure::error("the worker of this machine does not come up")
                    .hint("ALLOY_LOG=info shows what it does"));
            }
            app.env.sleep_until(app.env.now().mono + LOOK_AGAIN_MS).await;
        }
    }

    /// Ends the jobs of commands of `--local` that are dead, until the worker stops by itself. Returns the reason.
    pub(crate) async fn fault(&self, app: &App) -> String {
        let Some(local) = &self.worker else { return pending().await };
        let mut fault = local.fault.clone();
        loop {
            tokio::select! {
                biased;
                // The value is looked at below; that the sender is gone is an answer too.
                _ = fault.wait_for(Option::is_some) => return local.ended().unwrap_or_default(),
                () = app.env.sleep_until(app.env.now().mono + LEASES_LOOK_MS) => {}
            }
            if self.orchestrator.has_failed() {
                return "the farm itself had to end; its log says why".to_owned();
            }
            self.end_unwanted(app).await;
        }
    }

    /// Ends the jobs of commands that died without a word. Returns the leases of those that live.
    pub(super) async fn end_unwanted(&self, app: &App) -> Vec<Alive> {
        let Leases { dead, living } = Leases::look(&self.data, app.env.now().wall);
        if !dead.is_empty()
            && let Some(who) = self.user().await
        {
            for lease in dead {
                self.end_job_of(app, &who, lease).await;
            }
        }
        living
    }

    /// Whom the commands of this machine are to the farm.
    pub(super) async fn user(&self) -> Option<Principal> {
        let header = format!("Bearer {}", self.token.expose());
        // Without an answer the next look asks again.
        self.app.auth.principal(&*self.app.store, Some(&header)).await.ok()
    }

    /// What cannot be found out is looked at again later.
    async fn end_job_of(&self, app: &App, who: &Principal, lease: Dead) {
        let Ok(found) = self.app.store.keyed(&who.org, &who.caller, &lease.key).await else { return };
        let Some((job, _)) = found else {
            if lease.settled {
                lease.forget();
            }
            return;
        };
        match ops::job::cancel_for(&self.app, who, job, Reason::ParentCanceled).await {
            Ok(_) => {
                app.talk.say(&format!("{job} is ended: the command that started it is dead"));
                lease.forget();
            }
            // It has ended by itself.
            Err(OpError::Refused { code: ErrorCode::InvalidTransition | ErrorCode::NotFound, .. }) => lease.forget(),
            Err(OpError::Refused { .. } | OpError::Missing(_) | OpError::Store(_) | OpError::Io { .. }) => {}
        }
    }

    /// Ends the worker, then the orchestrator that hears its last words.
    pub(crate) async fn stop(self, at_once: bool) {
        self.data.remove_note();
        if let Some(worker) = self.worker {
            stop(worker.life, if at_once { 0 } else { STOP_MS }).await;
        }
        stop(self.orchestrator, STOP_MS).await;
    }
}

impl LocalWorker {
    /// Why it does not run any more.
    pub(super) fn ended(&self) -> Option<String> {
        let why = self.fault.borrow().clone();
        why.or_else(|| self.fault.has_changed().is_err().then(|| "it ended".to_owned()))
    }
}

async fn stop(life: Lifecycle, grace_ms: u64) {
    life.soft.cancel();
    // Its exit code is that of a daemon; this command has its own.
    let _ = life.wait(grace_ms).await;
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[test]
    fn a_farm_for_others_takes_the_flags_that_a_refusal_advises() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::new(dir.path());
        let config = |behind_proxy, base_url: Option<&str>| {
            let listen = Some("0.0.0.0:3000".into());
            let wish = Wish::Up(UpFlags { listen, behind_proxy, base_url: base_url.map(str::to_owned) });
            orchestrator_config(&data, &wish, BTreeMap::new())
        };
        let refused = config(false, None).unwrap_err();
        assert!(refused.message.contains("--behind-proxy"), "{}", refused.message);
        let line = ["alloy", "up", "--listen", "0.0.0.0:3000", "--behind-proxy", "--base-url", "https://farm.example"];
        assert!(crate::Cli::try_parse_from(line).is_ok());
        let config = config(true, Some("https://farm.example")).unwrap();
        assert!(config.behind_proxy);
        assert_eq!(config.url(config.listen), "https://farm.example");
    }
}
