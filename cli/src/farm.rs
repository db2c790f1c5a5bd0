//! S: the farm that a command works with: one that is there, or (feature `farm`) one inside this process.

use alloy_shared::id::JobId;

use crate::context::{App, Farm};
use crate::follow::Signals;
use crate::output::Failure;

/// A farm for the length of one command.
pub(crate) struct Hosted {
    farm: Farm,
}

impl Hosted {
    /// A farm that runs jobs.
    pub(crate) async fn open(app: &App) -> Result<Self, Failure> {
        if app.globals.local {
            return Err(Failure::usage("this build has no farm inside").hint("alloy run --url URL uses one elsewhere"));
        }
        Ok(Self { farm: app.farm()? })
    }

    /// A farm whose jobs are only looked at.
    pub(crate) async fn open_to_read(app: &App) -> Result<Self, Failure> {
        Self::open(app).await
    }

    pub(crate) fn farm(&self) -> &Farm {
        &self.farm
    }

    pub(crate) async fn close(self, _app: &App, _signals: &mut Signals) {}

    pub(crate) fn tell_detached(&self, app: &App, job: JobId) {
        app.tell_detached(job);
    }
}
