//! S: how a job is named on the command line, and the job that is meant.

use alloy_shared::id::JobId;
use alloy_shared::wire::job::JobView;

use crate::context::{App, Farm, check_url, farm_name};
use crate::output::{Failure, Fault};

/// How a job is named on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum JobArg {
    Id(JobId),
    /// At least six of an id's last characters.
    Tail(String),
    Latest,
}

impl JobArg {
    pub(crate) const TAIL_MIN: usize = 6;

    pub(crate) fn parse(text: Option<&str>) -> Result<Self, Failure> {
        let Some(text) = text else { return Ok(Self::Latest) };
        let refused = |why: &str| {
            Err(Failure::usage(format!("`{text}` names no job: {why}"))
                .hint("an id, at least 6 of its last characters, or a URL"))
        };
        let name = if text.contains("://") {
            let path = text.split(['?', '#']).next().unwrap_or(text);
            match path.split('/').find(|part| part.starts_with(JobId::PREFIX)) {
                Some(part) => part,
                None => return refused("there is no job id in this URL"),
            }
        } else {
            text
        };
        let name = name.to_ascii_lowercase();
        if name.starts_with(JobId::PREFIX) {
            return match name.parse() {
                Ok(id) => Ok(Self::Id(id)),
                Err(error) => refused(&error.why),
            };
        }
        if name.len() < Self::TAIL_MIN {
            return refused("it is too short");
        }
        if !looks_like_tail(&name) {
            return refused("an id ends in digits and letters other than i, l, o and u");
        }
        Ok(Self::Tail(name))
    }

    /// True when an argument that may be a job or a pattern is surely meant as a job.
    pub(crate) fn looks_like_job(text: &str) -> bool {
        text.starts_with(JobId::PREFIX)
            || text.contains("://")
            || (text.len() >= Self::TAIL_MIN && looks_like_tail(text))
    }
}

/// The farm in a job's URL.
fn farm_of(url: &str) -> Option<String> {
    let (before, _) = url.split_once(JobId::PREFIX)?;
    let before = before.trim_end_matches('/');
    check_url(before.strip_suffix("/jobs").unwrap_or(before)).ok()
}

fn looks_like_tail(text: &str) -> bool {
    text.len() <= 26 && text.bytes().all(|b| b.is_ascii_digit() || (b.is_ascii_lowercase() && !b"ilou".contains(&b)))
}

impl App {
    /// The job that an argument means: an id, its last characters, a URL, or the latest one of this directory.
    pub(crate) async fn job(&self, farm: &Farm, asked: Option<&str>) -> Result<JobView, Failure> {
        let found = match JobArg::parse(asked)? {
            JobArg::Id(id) => farm.client.job(id).await,
            JobArg::Tail(tail) => farm.client.find_job(&tail).await,
            JobArg::Latest => farm.client.job(self.latest(farm)?).await,
        };
        found.map_err(|error| {
            let failure = Failure::of(error, &farm.url);
            if let Some(other) = asked.and_then(farm_of).filter(|other| farm_name(other) != farm_name(&farm.url))
                && matches!(failure.fault, Fault::NotFound | Fault::Unreachable)
            {
                let why = format!("this job is of another farm, {other}; this command asked {}", farm.url);
                return Failure::new(failure.fault, why).hint(format!("--url {other}   asks that one"));
            }
            if failure.fault != Fault::NotFound {
                return failure;
            }
            let message = match asked {
                Some(text) => format!("there is no job `{text}`"),
                None => "the latest job of this directory is gone from the farm".to_owned(),
            };
            Failure::new(Fault::NotFound, message).hint("alloy list        shows the jobs of this farm")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_named_in_four_ways() {
        let id = JobId::from_raw(0x0192_0000_0000_7000_8000_1234_5678_9abc);
        let text = id.to_string();
        let tail = &text[text.len() - 6..];
        for (arg, expected) in [
            (None, JobArg::Latest),
            (Some(text.as_str()), JobArg::Id(id)),
            (Some(tail), JobArg::Tail(tail.to_owned())),
            (Some(&*format!("http://farm:3000/jobs/{text}?x=1#L5")), JobArg::Id(id)),
        ] {
            assert_eq!(JobArg::parse(arg).unwrap(), expected);
        }
        for wrong in ["abc", "job_123", "hello!", "*.zip", "http://farm/jobs", "iiiiii"] {
            assert_eq!(JobArg::parse(Some(wrong)).unwrap_err().fault, Fault::Usage, "{wrong}");
        }
        for (url, farm) in [
            ("http://farm:3000/v1/jobs/job_1/log", Some("http://farm:3000")),
            ("https://farm/prefix/jobs/job_1", Some("https://farm/prefix")),
            ("job_1", None),
        ] {
            assert_eq!(farm_of(url).as_deref(), farm, "{url}");
        }
        assert!(!JobArg::looks_like_job("*.zip") && !JobArg::looks_like_job("MyApp.app"));
    }
}
