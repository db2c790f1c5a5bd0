//! S: the farm that a command works with: one elsewhere, one on this machine, or (feature `farm`) one inside this process.

mod data;
#[cfg(feature = "farm")]
pub(crate) mod here;

use alloy_shared::id::JobId;

use crate::context::{App, Farm};
use crate::follow::{OnInterrupt, Signals};
use crate::output::Failure;
use data::{DataDir, Lock};

/// A farm that is starting has written down its address after this time.
const START_MS: u64 = 20_000;
const LOOK_AGAIN_MS: u64 = 20;

/// A farm for the length of one command.
pub(crate) struct Hosted {
    farm: Farm,
}

impl Hosted {
    /// A farm that runs jobs.
    pub(crate) async fn open(app: &App) -> Result<Self, Failure> {
        if app.globals.local { Self::open_local(app).await } else { Ok(Self { farm: app.farm()? }) }
    }

    /// A farm whose jobs are only looked at.
    pub(crate) async fn open_to_read(app: &App) -> Result<Self, Failure> {
        Self::open(app).await
    }

    async fn open_local(app: &App) -> Result<Self, Failure> {
        let data = DataDir::new(&app.places.data);
        let until = app.env.now().mono + START_MS;
        loop {
            let Lock::Taken { pid } = data.lock()? else {
                return Err(Failure::error("no farm runs on this machine, and this build has none inside"));
            };
            if let Some(note) = data.note(pid) {
                note.check()?;
                let mut farm = app.farm_at(note.url, Some(data.token()?))?;
                farm.name = "local".into();
                return Ok(Self { farm });
            }
            if app.env.now().mono >= until {
                let by = pid.map_or(String::new(), |pid| format!(" (process {pid})"));
                return Err(Failure::error(format!(
                    "{} is in use{by}, by a farm that tells no address",
                    data.farm().display()
                ))
                .hint("if it is an orchestrator of its own, name it: --url URL"));
            }
            app.env.sleep_until(app.env.now().mono + LOOK_AGAIN_MS).await;
        }
    }

    pub(crate) fn farm(&self) -> &Farm {
        &self.farm
    }

    pub(crate) async fn close(self, _app: &App, _signals: &mut Signals) {}

    pub(crate) fn tell_detached(&self, app: &App, job: JobId) {
        app.tell_detached(job, OnInterrupt::Cancel);
    }
}
