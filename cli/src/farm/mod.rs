//! S: the farm that a command works with: one elsewhere, one on this machine, or (feature `farm`) one inside this process.

mod data;
#[cfg(feature = "farm")]
pub(crate) mod here;
#[cfg(feature = "farm")]
mod host;
#[cfg(feature = "farm")]
pub(crate) mod up;

use alloy_shared::id::JobId;
use alloy_shared::wire::job::JobView;

use crate::context::{App, Farm};
use crate::follow::{OnInterrupt, Signals};
use crate::output::Failure;
use data::{DataDir, Lock};

/// Jobs on this machine are remembered under this name: the port changes with every start.
const LOCAL: &str = "local";
/// A farm that is starting has written down its address after this time.
const START_MS: u64 = 20_000;
const LOOK_AGAIN_MS: u64 = 20;
const NO_ISOLATION: &str =
    "jobs run on this machine itself, as you: there is no virtual machine and no isolation (provider `host`)";

/// A farm for the length of one command.
pub(crate) enum Hosted {
    /// It goes on without this command.
    Guest(Farm),
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
            return Ok(Self::Guest(app.farm()?));
        }
        let hosted = Self::open_local(app, Purpose::Run).await?;
        app.talk.warn(NO_ISOLATION);
        Ok(hosted)
    }

    /// A farm whose jobs are only looked at.
    pub(crate) async fn open_to_read(app: &App) -> Result<Self, Failure> {
        if app.globals.local { Self::open_local(app, Purpose::Read).await } else { Ok(Self::Guest(app.farm()?)) }
    }

    /// A client of the farm that runs on this machine, or else its host. Between two looks somebody may start or stop one.
    async fn open_local(app: &App, purpose: Purpose) -> Result<Self, Failure> {
        let data = DataDir::new(&app.places.data);
        let until = app.env.now().mono + START_MS;
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
                return Ok(Self::Guest(farm));
            }
            if app.env.now().mono >= until {
                let by = holder.map_or(String::new(), |pid| format!(" (process {pid})"));
                let dir = data.farm();
                return Err(Failure::error(format!(
                    "{} is in use{by}, by a farm that tells no address",
                    dir.display()
                ))
                .hint("if it is an orchestrator of its own, name it: --url URL"));
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
        Ok(match host::start(app, data, wish).await? {
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
            Self::Guest(farm) => farm,
            #[cfg(feature = "farm")]
            Self::Host(host) => &host.farm,
        }
    }

    /// Returns when the farm can take a job.
    pub(crate) async fn ready(&self, app: &App) -> Result<(), Failure> {
        match self {
            Self::Guest(_) => Ok(()),
            #[cfg(feature = "farm")]
            Self::Host(host) => host.ready(app).await.map(drop),
        }
    }

    /// Returns when the worker in this process has stopped by itself.
    pub(crate) async fn fault(&self) -> String {
        match self {
            Self::Guest(_) => std::future::pending().await,
            #[cfg(feature = "farm")]
            Self::Host(host) => host.fault().await,
        }
    }

    /// Refuses to wait for a job in a farm that is only looked at: nothing moves in it.
    pub(crate) fn can_follow(&self, job: &JobView) -> Result<(), Failure> {
        match self {
            Self::Guest(_) => Ok(()),
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
            Self::Guest(_) => app.globals.local,
            #[cfg(feature = "farm")]
            Self::Host(_) => false,
        }
    }

    /// Lets go of the farm. A host waits for every job in it, whoever sent it.
    pub(crate) async fn close(self, app: &App, signals: &mut Signals) {
        match self {
            Self::Guest(_) => {}
            #[cfg(feature = "farm")]
            Self::Host(host) => {
                let all_ended = host.wait_for_jobs(app, signals).await;
                host.stop(!all_ended).await;
            }
        }
    }

    pub(crate) fn tell_detached(&self, app: &App, job: JobId) {
        match self {
            Self::Guest(_) => app.tell_detached(job, OnInterrupt::Cancel),
            // It cannot be followed elsewhere; what happens to it is said while the farm closes.
            #[cfg(feature = "farm")]
            Self::Host(_) => {}
        }
    }

    /// Nobody reads the job's output. A farm of its own goes on with it; one in this process would live for nobody.
    pub(crate) async fn abandon(&self, app: &App, job: JobId) {
        match self {
            Self::Guest(_) => {
                app.talk.say(&format!("Nobody reads standard output any more; {job} goes on."));
                app.talk.hint(&format!("alloy attach {job}   follows it again; alloy cancel {job} ends it"));
            }
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
