//! P: how long an organisation wants its things to be kept.

use alloy_shared::limits::KEEP_DAYS_MAX;
use alloy_shared::wire::farm::{Kept, RetentionRequest, RetentionView};
use tracing::info;

use super::OpError;
use super::access::{commit_one, wrong_field};
use crate::App;
use crate::auth::Principal;
use crate::store::Write;
use crate::store::tidy::{RetentionRow, Tidy};

pub async fn show(app: &App, who: &Principal) -> Result<RetentionView, OpError> {
    let row = app.store.retention(&who.scope()).await?.into_iter().find(|row| row.org == who.org);
    Ok(view(app, row.as_ref()))
}

/// All four at once: what is absent is kept as the farm does.
pub async fn set(app: &App, who: &Principal, request: RetentionRequest) -> Result<RetentionView, OpError> {
    let RetentionRequest { jobs_days, artifacts_days, logs_days, sources_days } = request;
    let named = [("jobs_days", jobs_days), ("artifacts_days", artifacts_days), ("logs_days", logs_days)];
    for (field, days) in named.into_iter().chain([("sources_days", sources_days)]) {
        if days.is_some_and(|days| days > KEEP_DAYS_MAX) {
            let why = format!("is a number of days from 1 to {KEEP_DAYS_MAX}, or 0, which is for ever");
            return Err(wrong_field(field, why).hint("leave it out to keep as long as the farm does"));
        }
    }
    let row = RetentionRow { org: who.org, jobs_days, artifacts_days, logs_days, sources_days };
    commit_one(app, Write::Tidy(Box::new(Tidy::SetRetention(row)))).await?;
    let view = view(app, Some(&row));
    let [jobs, artifacts, logs, sources] = [view.jobs, view.artifacts, view.logs, view.sources].map(|kept| kept.days);
    info!(
        "{} keeps jobs {jobs} days, artifacts {artifacts}, logs {logs}, sources {sources} from now on; 0 is for ever",
        who.org
    );
    Ok(view)
}

fn view(app: &App, row: Option<&RetentionRow>) -> RetentionView {
    let kept =
        |own: Option<u32>, farm_days: u32| Kept { days: own.unwrap_or(farm_days), own: own.is_some(), farm_days };
    let [jobs, artifacts, logs, sources] = app.keep.days();
    RetentionView {
        jobs: kept(row.and_then(|row| row.jobs_days), jobs),
        artifacts: kept(row.and_then(|row| row.artifacts_days), artifacts),
        logs: kept(row.and_then(|row| row.logs_days), logs),
        sources: kept(row.and_then(|row| row.sources_days), sources),
    }
}
