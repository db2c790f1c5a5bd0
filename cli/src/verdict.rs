//! D: the last line about a job: how it ended, why, and what to do about it.

use alloy_shared::env::Ms;
use alloy_shared::wire::job::{Blame, JobView, Outcome, Reason};

use crate::context::App;
use crate::output::duration;
use crate::output::talk::Tone;

/// The last line about a job.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) tone: Tone,
    pub(crate) mark: &'static str,
    pub(crate) text: String,
    pub(crate) took: Option<String>,
    pub(crate) hint: Option<&'static str>,
}

pub(crate) fn verdict(job: &JobView) -> Verdict {
    let outcome = job.outcome.unwrap_or(Outcome::Errored);
    let why = why(job);
    let (tone, mark, text) = match outcome {
        Outcome::Succeeded => (Tone::Good, "✓", "succeeded".to_owned()),
        Outcome::Failed => (Tone::Bad, "✗", format!("failed: {why}")),
        Outcome::TimedOut => (Tone::Bad, "⏱", format!("timed out: {why}")),
        Outcome::Canceled if why.starts_with("canceled") => (Tone::Note, "⊘", why),
        Outcome::Canceled => (Tone::Note, "⊘", format!("canceled: {why}")),
        Outcome::Expired => (Tone::Bad, "!", format!("expired: {why}")),
        Outcome::Errored => (Tone::Bad, "!", format!("not run to its end: {why}")),
    };
    let ms = |at: &str| Ms::parse_rfc3339(at);
    let took = job.finished_at.as_deref().and_then(ms).zip(ms(&job.created_at)).map(|(end, start)| end.since(start));
    Verdict { tone, mark, text, took: took.map(duration), hint: hint(job) }
}

fn why(job: &JobView) -> String {
    // A message that only repeats the word before it says nothing.
    let repeats = |message: &str| job.outcome.is_some_and(|outcome| outcome.as_str() == message);
    let message = job.message.as_ref().filter(|message| !message.is_empty() && !repeats(message));
    match message {
        // How it went at the worker does not tell why it was canceled.
        Some(_) if job.reason == Some(Reason::ParentCanceled) => {}
        Some(message) => return message.clone(),
        None => {}
    }
    match (job.reason, job.signal, job.exit_code) {
        (Some(Reason::ScriptFailure), Some(signal), _) => format!("the command was killed by signal {signal}"),
        (Some(Reason::ScriptFailure), None, Some(code)) => format!("the command exited {code}"),
        (Some(reason), _, _) => words(reason).to_owned(),
        (None, _, _) => "the farm does not say why".to_owned(),
    }
}

pub(crate) const fn words(reason: Reason) -> &'static str {
    match reason {
        Reason::ScriptFailure => "the command failed",
        Reason::HookFailure => "a hook failed",
        Reason::SourceError => "the sources could not be laid out",
        Reason::ArtifactMissing => "an artifact that must exist is missing",
        Reason::ArtifactChanged => "an artifact changed while it was collected",
        Reason::RunTimeout => "the command ran longer than it may",
        Reason::NoOutputTimeout => "the command said nothing for too long",
        Reason::UserCanceled => "by a user",
        Reason::Superseded => "a newer job took its place",
        Reason::ParentCanceled => "the command or the job that it belonged to is gone",
        Reason::QueueExpired => "no worker had a slot in time",
        Reason::VmStartFailure => "the virtual machine did not start",
        Reason::VmLost => "the virtual machine was lost",
        Reason::WorkerLost => "the worker was lost",
        Reason::WorkerDrained => "the worker was taken out of service",
        Reason::OutOfDisk => "the worker's disk is full",
        Reason::ImagePullFailure => "the image could not be pulled",
        Reason::InternalError => "a fault inside the farm",
        Reason::ConfigError => "the worker is not set up for it",
        Reason::SignatureRejected => "a signature was rejected",
    }
}

fn hint(job: &JobView) -> Option<&'static str> {
    match (job.reason?, job.blame?) {
        (Reason::RunTimeout, _) => Some("--timeout 90m gives it longer"),
        (Reason::QueueExpired, _) => Some("alloy worker list shows who could run it; --queue-timeout waits longer"),
        (Reason::ArtifactMissing, _) => Some("a glob with `=` in front must match; without it, it may match nothing"),
        // The same name would end the same way.
        (Reason::ImagePullFailure, _) => Some("alloy image list shows the images there are; --image names another one"),
        (_, Blame::Farm) => Some("the farm's fault, not the command's: run it again, or ask who keeps the workers"),
        (_, Blame::User | Blame::Policy) => None,
    }
}

impl App {
    /// Says how a job ended.
    pub(crate) fn tell_end(&self, job: &JobView) {
        let verdict = verdict(job);
        self.talk.verdict(verdict.tone, verdict.mark, &verdict.text, verdict.took.as_deref());
        if let Some(hint) = verdict.hint {
            self.talk.hint(hint);
        }
        for warning in &job.warnings {
            self.talk.warn(warning);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use alloy_shared::id::{DEFAULT_ORG, JobId};
    use alloy_shared::wire::job::{End, JobSpec, Timings};

    use super::*;

    /// A job that ended like this, ninety-two seconds after it began.
    pub(crate) fn ended(end: &End) -> JobView {
        let (exit_code, exit_origin) = end.run_exit();
        JobView {
            id: JobId::from_raw(7),
            org: DEFAULT_ORG,
            state: end.outcome().into(),
            phase: None,
            spec: JobSpec::default(),
            source: None,
            attempt: 1,
            worker: None,
            worker_name: None,
            worker_state: None,
            image: None,
            image_digest: None,
            vm_source: None,
            lost: 0,
            created_at: "2026-01-02T03:04:05.000Z".into(),
            finished_at: Some("2026-01-02T03:05:37.000Z".into()),
            waiting_reason: None,
            outcome: Some(end.outcome()),
            reason: end.reason,
            blame: end.blame(),
            message: Some(end.message.clone()).filter(|message| !message.is_empty()),
            exit_code: Some(exit_code),
            warnings: end.warnings.clone(),
            exit_origin: Some(exit_origin),
            signal: end.signal,
            timings: Timings::default(),
            url: "http://farm/jobs/7".into(),
        }
    }

    #[test]
    fn every_end_has_a_line_that_says_why() {
        let failed = |exit_code, signal| End { exit_code, signal, ..End::because(Reason::ScriptFailure, "") };
        for (end, mark, text) in [
            (End::success(), "✓", "succeeded"),
            (failed(Some(7), None), "✗", "failed: the command exited 7"),
            (failed(None, Some(9)), "✗", "failed: the command was killed by signal 9"),
            (End::because(Reason::RunTimeout, ""), "⏱", "timed out: the command ran longer than it may"),
            (End::because(Reason::UserCanceled, ""), "⊘", "canceled: by a user"),
            (End::because(Reason::UserCanceled, "canceled"), "⊘", "canceled: by a user"),
            (End::because(Reason::UserCanceled, "canceled while it waited"), "⊘", "canceled while it waited"),
            (
                End::because(Reason::ParentCanceled, "canceled; the worker was lost meanwhile"),
                "⊘",
                "canceled: the command or the job that it belonged to is gone",
            ),
            (End::because(Reason::QueueExpired, ""), "!", "expired: no worker had a slot in time"),
            (End::because(Reason::WorkerLost, "m1 went silent"), "!", "not run to its end: m1 went silent"),
        ] {
            let verdict = verdict(&ended(&end));
            assert_eq!((verdict.mark, verdict.text.as_str(), verdict.took.as_deref()), (mark, text, Some("1m 32s")));
        }
        for reason in Reason::ALL {
            let hint = verdict(&ended(&End::because(*reason, ""))).hint.unwrap_or_default();
            let again = reason.blame() == Blame::Farm && *reason != Reason::ImagePullFailure;
            assert_eq!(hint.contains("run it again"), again, "{reason:?}: {hint}");
            assert_eq!(hint.contains("alloy image list"), *reason == Reason::ImagePullFailure, "{reason:?}: {hint}");
        }
    }
}
