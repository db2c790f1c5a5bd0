//! S: hands a job to the farm, and tells a job that was refused from one that the farm may have all the same.

use alloy_shared::client::ClientError;
use alloy_shared::wire::ErrorCode;
use alloy_shared::wire::job::{JobView, SubmitJob};

use crate::context::{App, Farm};
use crate::farm::Lease;
use crate::output::{Failure, Fault};
use crate::signals::Signals;

const AGAIN_MS: u64 = 500;

/// A job on its way to a farm.
pub(super) struct Submit<'a> {
    pub(super) farm: &'a Farm,
    pub(super) job: &'a SubmitJob,
    /// The same key gives the same job, however often it is sent.
    pub(super) key: &'a str,
    /// So long the farm may take to restart.
    pub(super) patience_ms: u64,
    /// Who listens there has spoken as a farm does.
    pub(super) is_farm: bool,
}

/// Submits. The first Ctrl-C waits for the answer, because the job may exist by now; true if there was one, and the follower
/// shall cancel.
pub(super) async fn submit(
    app: &App,
    this: &Submit<'_>,
    signals: &mut Signals,
    mut lease: Option<&mut Lease>,
) -> Result<(JobView, bool), Failure> {
    if let Some(lease) = &mut lease {
        lease.stays(true);
    }
    let list = if app.globals.local { "alloy list --local" } else { "alloy list" };
    let interrupted = || {
        Failure::new(Fault::Interrupted, "interrupted while the job was submitted")
            .hint(format!("the farm may have it: {list}"))
    };
    let heard = || {
        app.talk.say("The job is being submitted; it is canceled as soon as it has a name.  (Ctrl-C again to leave)");
    };
    let answer = submit_patiently(app, this);
    let (result, told) = signals.finish_unless_told_twice(answer, heard).await.map_err(|_| interrupted())?;
    if let Some(lease) = &mut lease {
        lease.stays(result.as_ref().err().is_some_and(may_have_arrived));
    }
    match result {
        Ok(job) => Ok((job, told)),
        // Nobody wants another try.
        Err(_) if told => Err(interrupted()),
        Err(error) if may_have_job(&error, this.is_farm) => Err(unanswered(error, &this.farm.url, list)),
        Err(error) => Err(Failure::of(error, &this.farm.url)),
    }
}

/// Submits, for as long as the farm may take to restart.
async fn submit_patiently(app: &App, this: &Submit<'_>) -> Result<JobView, ClientError> {
    let until = app.env.now().mono + this.patience_ms;
    let mut said = false;
    loop {
        match this.farm.client.submit(this.job, this.key).await {
            Err(ClientError::Unreachable { why, .. }) if app.env.now().mono < until => {
                if !std::mem::replace(&mut said, true) {
                    let url = &this.farm.url;
                    app.talk.warn(&format!("no farm answers at {url}: waiting for it to come back  {why}"));
                }
                app.env.sleep_until(app.env.now().mono + AGAIN_MS).await;
            }
            result => {
                if said && result.is_ok() {
                    app.talk.say("the farm is back");
                }
                return result;
            }
        }
    }
}

/// True unless it is certain that no try of the submit arrived: a lease that stays for nothing costs nothing.
fn may_have_arrived(error: &ClientError) -> bool {
    match error {
        ClientError::Problem(problem) => problem.code.is_retryable(),
        ClientError::Unreachable { .. } | ClientError::Protocol { .. } => true,
    }
}

/// True if nobody can say that nothing runs. A full disk, say, is an answer to that; so is one of a server that is no farm.
fn may_have_job(error: &ClientError, is_farm: bool) -> bool {
    match error {
        ClientError::Problem(problem) => matches!(problem.code, ErrorCode::Unavailable | ErrorCode::Internal),
        ClientError::Unreachable { .. } => true,
        ClientError::Protocol { .. } => is_farm,
    }
}

fn unanswered(error: ClientError, url: &str, list: &str) -> Failure {
    let mut failure = Failure::of(error, url).of_a_job();
    failure.message = format!("the farm may have the job, and gave no answer that says so: {}", failure.message);
    failure.hint(format!("{list}      shows whether it is there; alloy cancel JOB ends it"))
}

#[cfg(test)]
mod tests {
    use alloy_shared::wire::Problem;

    use super::*;

    const URL: &str = "http://farm";

    fn problem(code: ErrorCode) -> ClientError {
        ClientError::Problem(Problem::new(code, "it is so"))
    }

    /// What `alloy run` ends with, and whether the lease of a local one stays.
    fn end(error: ClientError, is_farm: bool) -> (i32, bool) {
        let stays = may_have_arrived(&error);
        let failure =
            if may_have_job(&error, is_farm) { unanswered(error, URL, "alloy list") } else { Failure::of(error, URL) };
        (failure.exit_code(true), stays)
    }

    #[test]
    fn a_submit_without_an_answer_does_not_end_as_if_nothing_ran() {
        let away = ClientError::Unreachable { url: URL.into(), why: "it broke off".into(), unknown_host: false };
        let strange = || ClientError::protocol("answered 504");
        for (error, is_farm, expected) in [
            (away, true, (7, true)),
            (problem(ErrorCode::Unavailable), true, (7, true)),
            (problem(ErrorCode::Internal), true, (1, true)),
            (strange(), true, (1, true)),
            (strange(), false, (125, true)),
            (problem(ErrorCode::StorageFull), true, (125, true)),
            (problem(ErrorCode::TooManyRequests), true, (125, true)),
            (problem(ErrorCode::InvalidSpec), true, (125, false)),
            (problem(ErrorCode::Unauthenticated), true, (125, false)),
        ] {
            let said = format!("{error:?} {is_farm}");
            assert_eq!(end(error, is_farm), expected, "{said}");
        }
    }

    #[test]
    fn who_may_have_a_job_is_told_where_to_look() {
        let failure = unanswered(problem(ErrorCode::Unavailable), URL, "alloy list --local");
        assert!(failure.message.starts_with("the farm may have the job"), "{}", failure.message);
        assert!(failure.message.ends_with("it is so") && failure.farm_is_away());
        let hint = failure.hint.unwrap();
        assert!(hint.starts_with("alloy list --local ") && hint.contains("alloy cancel JOB"), "{hint}");
        assert!(!hint.contains("alloy up"), "{hint}");
    }
}
