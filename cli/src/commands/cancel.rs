//! S: `alloy cancel`: which jobs are meant, and their end.

use std::io::{BufRead as _, IsTerminal as _};

use alloy_shared::wire::job::JobView;

use crate::commands::jobs::command;
use crate::context::{App, Farm};
use crate::farm::Hosted;
use crate::job_arg::JobArg;
use crate::output::sanitize::one_line;
use crate::output::talk::Tone;
use crate::output::{Failure, Fault, exit, print_json};

/// Cancel jobs
#[derive(Debug, clap::Args)]
pub(crate) struct CancelArgs {
    /// Ids, at least 6 of their last characters, or URLs
    pub(crate) jobs: Vec<String>,
    /// The latest job of this directory; without it and without a job, a person at a terminal is asked
    #[arg(long, conflicts_with = "jobs")]
    pub(crate) latest: bool,
}

pub(crate) async fn cancel(app: &App, args: &CancelArgs) -> Result<i32, Failure> {
    for job in &args.jobs {
        // Before anybody is asked, and before the first of them is canceled.
        JobArg::parse(Some(job))?;
    }
    let ask = args.jobs.is_empty() && !args.latest;
    if ask && !(std::io::stdin().is_terminal() && app.talk.live()) {
        return Err(Failure::usage("which job? `alloy cancel` takes the ids of jobs")
            .hint("alloy cancel --latest   cancels the latest job of this directory; alloy list shows them all"));
    }
    let hosted = Hosted::open_to_read(app).await?;
    let farm = hosted.farm();
    if args.jobs.is_empty() {
        let latest = app.job(farm, None).await?;
        if ask && !latest.state.is_terminal() && !agreed(app, &latest).await? {
            return Err(Failure::new(Fault::Error, format!("{} goes on: nothing is canceled", latest.id)));
        }
        cancel_one(app, farm, latest).await?;
        return Ok(exit::OK);
    }
    let mut worst = exit::OK;
    for asked in &args.jobs {
        let done = match app.job(farm, Some(asked)).await {
            Ok(job) => cancel_one(app, farm, job).await,
            Err(failure) => Err(failure),
        };
        if let Err(failure) = done {
            // One wrong id among several does not keep the others from being canceled.
            if args.jobs.len() < 2 {
                return Err(failure);
            }
            worst = failure.exit_code(false);
            app.talk.fail(&failure, worst);
        }
    }
    Ok(worst)
}

/// Asks the person at the terminal. Anything but a yes is a no.
async fn agreed(app: &App, job: &JobView) -> Result<bool, Failure> {
    let what = one_line(&command(&job.spec));
    app.talk.say(&format!("Cancel {} ({}: {what})?  [y/N]", job.id, job.state));
    let answer = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        std::io::stdin().lock().read_line(&mut line).map(|_| line)
    });
    let line = answer.await.map_err(|error| Failure::error(format!("the answer: {error}")))?;
    let line = line.map_err(|error| Failure::io("standard input", &error))?;
    Ok(matches!(line.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}

async fn cancel_one(app: &App, farm: &Farm, before: JobView) -> Result<(), Failure> {
    let id = before.id;
    if before.state.is_terminal() {
        app.talk.verdict(Tone::Note, "-", &format!("{id} already finished ({}): nothing to do", before.state), None);
        return if app.talk.json() { print_json(&before) } else { Ok(()) };
    }
    let after = farm.client.cancel(id).await.map_err(|error| Failure::of(error, &farm.url))?;
    let what = if after.state.is_terminal() { "canceled" } else { "is being canceled" };
    app.talk.verdict(Tone::Note, "⊘", &format!("{id} {what} (was {})", before.state), None);
    if app.talk.json() { print_json(&after) } else { Ok(()) }
}
