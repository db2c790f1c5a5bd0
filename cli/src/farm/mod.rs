//! S: the farm that a command works with: one elsewhere, one on this machine, or (feature `farm`) one inside this process.

#[cfg(feature = "farm")]
pub(crate) mod admin;
mod data;
#[cfg(feature = "farm")]
pub(crate) mod here;
#[cfg(feature = "farm")]
mod host;
mod lease;
#[cfg(feature = "farm")]
mod leave;
#[cfg(feature = "farm")]
pub(crate) mod up;

use alloy_shared::id::JobId;
use alloy_shared::wire::job::JobView;

use crate::context::{App, Farm};
use crate::output::Failure;
use crate::signals::Signals;
use data::{DataDir, Holder, Lock};
pub(crate) use lease::Lease;

/// Jobs on this machine are remembered under this name: the port changes with every start.
const LOCAL: &str = "local";
/// A farm that is starting has written down its address after this time.
const START_MS: u64 = 20_000;
const LOOK_AGAIN_MS: u64 = 20;
/// A wait that is over this soon is not worth a line.
const QUIET_MS: u64 = 1_000;
/// Between two looks whether the host of the farm still lives.
const HOST_LOOK_MS: u64 = 500;
const NO_ISOLATION: &str =
    "jobs run on this machine itself, as you: there is no virtual machine and no isolation (provider `host`)";

fn orchestrator_of_its_own(data: &DataDir, pid: u32) -> Failure {
    let token = data.token_file().display().to_string();
    let dir = data.farm();
    Failure::error(format!("an orchestrator (process {pid}) runs on {}, so `--local` cannot", dir.display())).hint(format!(
        "use it, without --local: alloy login http://localhost:3000 --with-token <'{}'   (or where it listens)\nor stop it, or set ALLOY_DATA_DIR to another directory",
        token.replace('\'', r"'\''")
    ))
}

/// What to say of a farm that lets nobody in: an `alloy` that reads it waits for somebody itself, for its pager perhaps.
fn silent_farm(data: &DataDir, holder: Option<(u32, Holder)>) -> Failure {
    let dir = data.farm().display().to_string();
    match holder {
        Some((pid, Holder::Alloy { command })) => {
            Failure::error(format!("{dir} is in use by another command (process {pid}: `{command}`)")).hint(format!(
                "wait until it ends, or end it: kill {pid}   (`alloy logs --local` ends when all of its output is read)"
            ))
        }
        Some((pid, Holder::Orchestrator | Holder::Unknown)) => {
            Failure::error(format!("{dir} is in use (process {pid}), by a farm that tells no address"))
                .hint("if it is an orchestrator of its own, name it: --url URL")
        }
        None => Failure::error(format!("{dir} is in use, by a farm that tells no address"))
            .hint("if it is an orchestrator of its own, name it: --url URL"),
    }
}

/// A farm for the length of one command.
pub(crate) enum Hosted {
    /// It goes on without this command.
    Guest {
        farm: Farm,
        /// The process that runs it, if it is this machine's.
        host: Option<u32>,
    },
    /// It lives in this process.
    #[cfg(feature = "farm")]
    Host(Box<host::Host>),
}

/// What a farm is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Run,
    Read,
}

#[cfg_attr(
    not(feature = "farm"),
    allow(unused_variables, reason = "without a farm inside there is nothing to wait for and nothing to stop")
)]
impl Hosted {
    /// A farm that runs jobs.
    pub(crate) async fn open(app: &App) -> Result<Self, Failure> {
        if !app.globals.local {
            return Ok(Self::Guest { farm: app.farm()?, host: None });
        }
        let hosted = Self::open_local(app, Purpose::Run).await?;
        app.talk.warn(NO_ISOLATION);
        Ok(hosted)
    }

    /// A farm whose jobs are only looked at.
    pub(crate) async fn open_to_read(app: &App) -> Result<Self, Failure> {
        if app.globals.local {
            Self::open_local(app, Purpose::Read).await
        } else {
            Ok(Self::Guest { farm: app.farm()?, host: None })
        }
    }

    /// A client of the farm that runs on this machine, or else its host. Between two looks somebody may start or stop one.
    async fn open_local(app: &App, purpose: Purpose) -> Result<Self, Failure> {
        let data = DataDir::new(&app.places.data);
        let started = app.env.now().mono;
        let (until, mut said, mut examined) = (started + START_MS, false, None);
        loop {
            let holder = match data.lock()? {
                Lock::Taken { pid } => pid,
                Lock::Free => match Self::host(app, &data, purpose).await? {
                    Some(hosted) => return Ok(hosted),
                    None => None,
                },
            };
            if let Some(note) = holder.and_then(|pid| data.note(Some(pid))) {
                note.check()?;
                let mut farm = app.farm_at(note.url, Some(data.token()?))?;
                farm.name = LOCAL.into();
                return Ok(Self::Guest { farm, host: Some(note.pid) });
            }
            if let Some(pid) = holder
                && examined.replace(pid) != holder
                && Holder::of(pid) == Holder::Orchestrator
            {
                return Err(orchestrator_of_its_own(&data, pid));
            }
            let now = app.env.now().mono;
            if now >= until {
                return Err(silent_farm(&data, holder.map(|pid| (pid, Holder::of(pid)))));
            }
            if !said && now.since(started) >= QUIET_MS {
                said = true;
                let by = holder.map_or(String::new(), |pid| format!(" (process {pid})"));
                app.talk.say(&format!(
                    "Another command has the farm of this machine, or starts or stops it{by}; waiting for it."
                ));
            }
            app.env.sleep_until(app.env.now().mono + LOOK_AGAIN_MS).await;
        }
    }

    #[cfg(feature = "farm")]
    async fn host(app: &App, data: &DataDir, purpose: Purpose) -> Result<Option<Self>, Failure> {
        let wish = match purpose {
            Purpose::Run => host::Wish::Work,
            Purpose::Read => host::Wish::Read,
        };
        Ok(match host::start(app, data, &wish).await? {
            host::Start::Running(host) => Some(Self::Host(host)),
            host::Start::Taken => None,
        })
    }

    /// For logs and lists a host is only looked into and ends with its process: nothing runs in it.
    #[cfg(not(feature = "farm"))]
    async fn host(_app: &App, _data: &DataDir, _purpose: Purpose) -> Result<Option<Self>, Failure> {
        Err(Failure::error("no farm runs on this machine, and this build of alloy has none inside")
            .hint("--url URL uses one elsewhere"))
    }

    pub(crate) fn farm(&self) -> &Farm {
        match self {
            Self::Guest { farm, .. } => farm,
            #[cfg(feature = "farm")]
            Self::Host(host) => &host.farm,
        }
    }

    /// Returns when the farm can take a job.
    pub(crate) async fn ready(&self, app: &App) -> Result<(), Failure> {
        match self {
            Self::Guest { .. } => Ok(()),
            #[cfg(feature = "farm")]
            Self::Host(host) => host.ready(app).await.map(drop),
        }
    }

    /// Returns when the worker in this process has stopped by itself.
    pub(crate) async fn fault(&self, app: &App) -> String {
        match self {
            Self::Guest { .. } => std::future::pending().await,
            #[cfg(feature = "farm")]
            Self::Host(host) => host.fault(app).await,
        }
    }

    /// Refuses to wait for a job in a farm that is only looked at: nothing moves in it.
    pub(crate) fn can_follow(&self, job: &JobView) -> Result<(), Failure> {
        match self {
            Self::Guest { .. } => Ok(()),
            #[cfg(feature = "farm")]
            Self::Host(_) if job.state.is_terminal() => Ok(()),
            #[cfg(feature = "farm")]
            Self::Host(_) => {
                Err(Failure::error(format!("{} is {}, and no farm runs on this machine", job.id, job.state))
                    .hint("alloy up          starts one, which goes on with the job"))
            }
        }
    }

    /// True if the farm may end at any time before it has this command's job: its host waits for jobs, not for uploads.
    pub(crate) fn may_vanish(&self, app: &App) -> bool {
        match self {
            Self::Guest { .. } => app.globals.local,
            #[cfg(feature = "farm")]
            Self::Host(_) => false,
        }
    }

    /// Lets go of the farm. A host waits for every job in it, whoever sent it.
    pub(crate) async fn close(self, app: &App, signals: &mut Signals) {
        match self {
            Self::Guest { .. } => {}
            #[cfg(feature = "farm")]
            Self::Host(host) => {
                let all_ended = host.wait_for_jobs(app, signals).await;
                host.stop(!all_ended).await;
            }
        }
    }

    pub(crate) fn tell_detached(&self, app: &App, job: JobId, cancel_heard: Option<bool>) {
        match self {
            Self::Guest { .. } => app.tell_detached(job, cancel_heard),
            // It cannot be followed elsewhere; what happens to it is said while the farm closes.
            #[cfg(feature = "farm")]
            Self::Host(_) => {}
        }
    }

    /// Returns when the farm of this machine is run by its host no more, nor by the one that this command found.
    pub(crate) async fn vanished(&self, app: &App) {
        let Self::Guest { host: Some(host), .. } = self else { return std::future::pending().await };
        let data = DataDir::new(&app.places.data);
        loop {
            app.env.sleep_until(app.env.now().mono + HOST_LOOK_MS).await;
            match data.lock() {
                Ok(Lock::Taken { pid }) if pid.is_none_or(|pid| pid == *host) => {}
                Ok(Lock::Taken { .. } | Lock::Free) => return,
                // It says nothing about the host.
                Err(_) => {}
            }
        }
    }

    /// Nothing runs the job any more: the worker inside this process is gone.
    pub(crate) async fn abandon(&self, app: &App, job: JobId) {
        match self {
            Self::Guest { .. } => {}
            #[cfg(feature = "farm")]
            Self::Host(host) => {
                if let Err(error) = host.farm.client.cancel(job).await {
                    let failure = Failure::of(error, &host.farm.url);
                    app.talk.warn(&format!("{job} could not be canceled: {}", failure.message));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_keeps_others_out_of_the_farm_is_named_as_what_it_is() {
        let data = DataDir::new(std::path::Path::new("/data"));
        let reader = Holder::Alloy { command: "alloy logs".into() };
        let failure = silent_farm(&data, Some((41, reader)));
        let hint = failure.hint.unwrap();
        assert!(failure.message.ends_with("(process 41: `alloy logs`)"), "{}", failure.message);
        assert!(hint.contains("kill 41") && !hint.contains("--url"), "{hint}");
        for (holder, by) in [(Some((41, Holder::Unknown)), " (process 41)"), (None, "")] {
            let failure = silent_farm(&data, holder);
            assert!(failure.message.contains(&format!("is in use{by}, by a farm")), "{}", failure.message);
            assert!(failure.hint.unwrap().contains("--url"));
        }
    }
}
