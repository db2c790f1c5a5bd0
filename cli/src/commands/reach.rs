//! S: whether the farm that a run goes to answers, and lets a job ask for so much, before a tree is packed for it.

use std::pin::pin;

use alloy_shared::client::ClientError;
use alloy_shared::wire::FieldError;
use alloy_shared::wire::farm::Info;
use alloy_shared::wire::job::JobSpec;

use crate::context::{App, Farm};
use crate::output::{Failure, Fault, duration};

/// A wait that is over this soon is not worth a line.
const QUIET_MS: u64 = 1_000;
const AGAIN_MS: u64 = 500;

/// Waits for the farm's first answer, and says so when that takes long. None: it answers, and the request that matters will
/// tell what is wrong.
pub(super) async fn reach(app: &App, farm: &Farm, patience_ms: u64) -> Result<Option<Info>, Failure> {
    let started = app.env.now().mono;
    let mut answer = pin!(ask(app, farm, patience_ms));
    tokio::select! {
        biased;
        answer = &mut answer => return answer,
        () = app.env.sleep_until(started + QUIET_MS) => {}
    }
    app.talk.warn(&format!("no farm answers at {}: waiting for it, up to {}", farm.url, duration(patience_ms)));
    let answer = answer.await;
    if answer.is_ok() {
        app.talk.say("the farm is there");
    }
    answer
}

async fn ask(app: &App, farm: &Farm, patience_ms: u64) -> Result<Option<Info>, Failure> {
    let until = app.env.now().mono + patience_ms;
    loop {
        match farm.client.info().await {
            Ok(info) => return Ok(Some(info)),
            Err(error) if may_come(&error) && app.env.now().mono < until => {
                app.env.sleep_until(app.env.now().mono + AGAIN_MS).await;
            }
            Err(error @ ClientError::Unreachable { .. }) => return Err(Failure::of(error, &farm.url)),
            Err(ClientError::Problem(_) | ClientError::Protocol { .. }) => return Ok(None),
        }
    }
}

/// True for a farm that may be restarting, and for a network that is not there yet. A name that stands for no machine comes
/// from a mistake.
fn may_come(error: &ClientError) -> bool {
    match error {
        ClientError::Unreachable { unknown_host, .. } => !unknown_host,
        ClientError::Problem(_) | ClientError::Protocol { .. } => false,
    }
}

/// Refuses times that this farm lets no job ask for.
pub(super) fn check_times(spec: &JobSpec, info: &Info) -> Result<(), Failure> {
    let times = [
        ("timeout_ms", spec.timeout_ms, info.timeout_max_ms),
        ("queue_timeout_ms", spec.queue_timeout_ms, info.queue_timeout_max_ms),
    ];
    let faults: Vec<FieldError> = times
        .into_iter()
        .filter_map(|(field, asked, most)| asked.zip(most).map(|(asked, most)| (field, asked, most)))
        .filter(|(_, asked, most)| asked > most)
        .map(|(field, _, most)| FieldError {
            field: field.to_owned(),
            message: format!("is at most {} on this farm", duration(most)),
        })
        .collect();
    if faults.is_empty() {
        return Ok(());
    }
    Err(Failure::wrong_fields(Fault::Error, &faults).hint("leave it out to have the farm's default"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_farm_that_may_come_back_is_waited_for_and_a_name_that_means_nothing_is_not() {
        let away = |unknown_host| ClientError::Unreachable { url: String::new(), why: String::new(), unknown_host };
        assert!(may_come(&away(false)) && !may_come(&away(true)));
        assert!(!may_come(&ClientError::protocol("")));
    }

    #[test]
    fn a_time_beyond_the_farms_limit_is_refused_and_one_at_it_is_not() {
        let info = |most| Info {
            version: String::new(),
            protocol_min: 1,
            protocol_max: 1,
            capabilities: vec![],
            base_url: String::new(),
            time: String::new(),
            timeout_max_ms: most,
            queue_timeout_max_ms: most,
            storage: None,
        };
        let spec = JobSpec { timeout_ms: Some(60_001), queue_timeout_ms: Some(60_000), ..JobSpec::default() };
        let failure = check_times(&spec, &info(Some(60_000))).unwrap_err();
        assert_eq!(failure.message, "--timeout is at most 1m 00s on this farm");
        assert!(check_times(&spec, &info(Some(60_001))).is_ok() && check_times(&spec, &info(None)).is_ok());
    }
}
