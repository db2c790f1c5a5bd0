//! T: a job as users and programs see it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::farm::WorkerState;
pub use super::feed::{EventKind, FeedCursor, FeedFrame, JobEvent, LogFrame, WorkerNews};
use super::network::{self, Network};
use super::vm::VmStages;
use crate::id::{BadName, Digest, JobId, Labels, OrgId, WorkerId};

/// What to run and how. Exactly one of `shell` and `argv`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// A line for the shell: `/bin/zsh -lc` on macOS guests, `/bin/sh -c` elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shell: Option<String>,
    /// A program and its arguments, run without a shell.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub argv: Vec<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Globs relative to the workspace. `=GLOB` must match, `!GLOB` leaves out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub artifacts: Vec<String>,
    /// Labels that the worker must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// The VM image. Absent: the worker's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Whom the VM may talk to. Anything but the default requires a worker that can restrict a VM.
    #[serde(default, skip_serializing_if = "Network::is_default")]
    pub network: Network,
    /// Milliseconds the command may run. Absent: the farm's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Milliseconds the job may wait for a slot. Absent: the farm's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_timeout_ms: Option<u64>,
    /// How often a command that failed is tried again. Farm faults are retried by themselves and not counted here.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub retries: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub git: Option<GitInfo>,
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// Where the working tree stood. A record, not an instruction.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct GitInfo {
    pub commit: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    pub dirty: bool,
}

/// Body of `POST /v1/jobs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SubmitJob {
    pub spec: JobSpec,
    /// Digest of an uploaded manifest. Absent: the workspace is empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub source: Option<Digest>,
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $what:literal { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$vdoc])* $variant,)+ }

        impl $name {
            pub const ALL: &'static [$name] = &[$($name::$variant,)+];
            pub const fn as_str(self) -> &'static str { match self { $($name::$variant => $word,)+ } }
        }
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.write_str(self.as_str()) }
        }
        impl std::str::FromStr for $name {
            type Err = BadName;
            fn from_str(text: &str) -> Result<Self, BadName> {
                match text { $($word => Ok($name::$variant),)+ _ => Err(BadName { what: $what, why: format!("is one of {}", [$($word,)+].join(", ")) }) }
            }
        }
    };
}

pub(super) use words;

words!(/** Where a job is, in one word. */ StateWord, "a state" {
    Queued = "queued",
    Assigned = "assigned",
    Running = "running",
    Canceling = "canceling",
    Succeeded = "succeeded",
    Failed = "failed",
    TimedOut = "timed_out",
    Canceled = "canceled",
    Expired = "expired",
    Errored = "errored",
});

impl StateWord {
    pub const fn is_terminal(self) -> bool {
        match self {
            Self::Queued | Self::Assigned | Self::Running | Self::Canceling => false,
            Self::Succeeded | Self::Failed | Self::TimedOut | Self::Canceled | Self::Expired | Self::Errored => true,
        }
    }
}

words!(/** What the running attempt is doing. */ Phase, "a phase" {
    Preparing = "preparing",
    Executing = "executing",
    Collecting = "collecting",
});

words!(/** How a job ended. */ Outcome, "an outcome" {
    Succeeded = "succeeded",
    Failed = "failed",
    TimedOut = "timed_out",
    Canceled = "canceled",
    Expired = "expired",
    Errored = "errored",
});

impl From<Outcome> for StateWord {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Succeeded => Self::Succeeded,
            Outcome::Failed => Self::Failed,
            Outcome::TimedOut => Self::TimedOut,
            Outcome::Canceled => Self::Canceled,
            Outcome::Expired => Self::Expired,
            Outcome::Errored => Self::Errored,
        }
    }
}

words!(/** Who has to act on an end that is no success. */ Blame, "a blame" {
    /** The command, its sources or its artifact rules. */ User = "user",
    /** A worker, a VM, a disk. Retried by itself. */ Farm = "farm",
    /** A limit or a decision. */ Policy = "policy",
});

words!(/** Why a job did not succeed. */ Reason, "a reason" {
    ScriptFailure = "script_failure",
    HookFailure = "hook_failure",
    SourceError = "source_error",
    ArtifactMissing = "artifact_missing",
    ArtifactChanged = "artifact_changed",
    RunTimeout = "run_timeout",
    NoOutputTimeout = "no_output_timeout",
    UserCanceled = "user_canceled",
    Superseded = "superseded",
    ParentCanceled = "parent_canceled",
    QueueExpired = "queue_expired",
    VmStartFailure = "vm_start_failure",
    VmLost = "vm_lost",
    WorkerLost = "worker_lost",
    WorkerDrained = "worker_drained",
    OutOfDisk = "out_of_disk",
    ImagePullFailure = "image_pull_failure",
    InternalError = "internal_error",
    ConfigError = "config_error",
    SignatureRejected = "signature_rejected",
});

impl Reason {
    pub const fn outcome(self) -> Outcome {
        match self {
            Self::ScriptFailure
            | Self::HookFailure
            | Self::SourceError
            | Self::ArtifactMissing
            | Self::ArtifactChanged => Outcome::Failed,
            Self::RunTimeout | Self::NoOutputTimeout => Outcome::TimedOut,
            Self::UserCanceled | Self::Superseded | Self::ParentCanceled => Outcome::Canceled,
            Self::QueueExpired => Outcome::Expired,
            Self::VmStartFailure
            | Self::VmLost
            | Self::WorkerLost
            | Self::WorkerDrained
            | Self::OutOfDisk
            | Self::ImagePullFailure
            | Self::InternalError
            | Self::ConfigError
            | Self::SignatureRejected => Outcome::Errored,
        }
    }

    pub const fn blame(self) -> Blame {
        match self {
            Self::ScriptFailure
            | Self::HookFailure
            | Self::SourceError
            | Self::ArtifactMissing
            | Self::ArtifactChanged => Blame::User,
            Self::RunTimeout
            | Self::NoOutputTimeout
            | Self::UserCanceled
            | Self::Superseded
            | Self::ParentCanceled
            | Self::QueueExpired
            | Self::ConfigError
            | Self::SignatureRejected => Blame::Policy,
            Self::VmStartFailure
            | Self::VmLost
            | Self::WorkerLost
            | Self::WorkerDrained
            | Self::OutOfDisk
            | Self::ImagePullFailure
            | Self::InternalError => Blame::Farm,
        }
    }
}

/// The end of an attempt, and of the job unless it is tried again. No reason: it succeeded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct End {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// The command's own code, if it ran to its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// One sentence for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// What was probably not meant, and did not decide the end. Sentences for people.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

impl End {
    pub fn success() -> Self {
        Self { reason: None, exit_code: Some(0), signal: None, message: String::new(), warnings: Vec::new() }
    }
    pub fn because(reason: Reason, message: impl Into<String>) -> Self {
        let (message, warnings) = (message.into(), Vec::new());
        Self { reason: Some(reason), exit_code: None, signal: None, message, warnings }
    }
    pub fn outcome(&self) -> Outcome {
        self.reason.map_or(Outcome::Succeeded, Reason::outcome)
    }
    pub fn blame(&self) -> Option<Blame> {
        self.reason.map(Reason::blame)
    }

    /// What `alloy run` exits with, and where the number comes from.
    pub fn run_exit(&self) -> (i32, ExitOrigin) {
        match self.outcome() {
            Outcome::Succeeded => (0, ExitOrigin::Command),
            Outcome::Failed => match (self.signal, self.exit_code) {
                (Some(signal), _) => (128 + signal, ExitOrigin::Command),
                (None, Some(code)) if code != 0 => (code, ExitOrigin::Command),
                (None, _) => (1, ExitOrigin::Alloy),
            },
            Outcome::TimedOut => (124, ExitOrigin::Alloy),
            Outcome::Canceled => (130, ExitOrigin::Alloy),
            Outcome::Expired | Outcome::Errored => (125, ExitOrigin::Alloy),
        }
    }
}

words!(/** Whose exit code it is. */ ExitOrigin, "an origin" {
    Command = "command",
    Alloy = "alloy",
});

/// Milliseconds of each stage, every one from its own clock. A stage that did not happen is absent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Timings {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assign_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collect_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teardown_ms: Option<u64>,
    /// What `vm_ms` was spent on. Absent where a job runs on the host itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<Box<VmStages>>,
}

/// `GET /v1/jobs/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct JobView {
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub id: JobId,
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub org: OrgId,
    pub state: StateWord,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    pub spec: JobSpec,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub source: Option<Digest>,
    /// The newest attempt's number, from 1; 0 before the first.
    pub attempt: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub worker: Option<WorkerId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker_name: Option<String>,
    /// How the farm hears of the worker that holds the job at this moment: `suspect` when it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker_state: Option<WorkerState>,
    /// The image that the newest attempt runs in, and the digest that its VM was cloned from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_digest: Option<String>,
    /// `warm`: the VM waited for the newest attempt. `cold`: the attempt waited for the VM. Absent where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_source: Option<String>,
    /// Attempts that the farm lost. Not counted against `retries`.
    pub lost: u32,
    pub created_at: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<String>,
    /// Why a queued job waits, as a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting_reason: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blame: Option<Blame>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// What was probably not meant, as an artifact rule that matches nothing. The end is what it is without them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// The number that `alloy run` exits with, once the job has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_origin: Option<ExitOrigin>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// Stages of the newest attempt.
    pub timings: Timings,
    pub url: String,
}

/// `GET /v1/jobs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct JobPage {
    pub jobs: Vec<JobView>,
    /// Pass it as `?cursor=` for the next page. Absent: this was the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ArtifactView {
    /// Relative to the workspace, with `/`.
    pub path: String,
    pub size_bytes: u64,
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub sha256: Digest,
    /// Permission bits; only the executable bit is kept: 0o644 or 0o755.
    pub mode: u32,
    /// A symbolic link's target; then there are no bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ArtifactList {
    pub artifacts: Vec<ArtifactView>,
}

/// The labels that a worker must have for this spec: those that it names, and what follows from its wishes.
pub fn required_labels(spec: &JobSpec) -> Result<Labels, BadName> {
    let mut labels = Labels::try_from(&spec.labels)?;
    if !spec.network.is_default() {
        labels.insert(network::LABEL.0, network::LABEL.1)?;
    }
    Ok(labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_the_table() {
        let failed = |exit_code, signal| End { exit_code, signal, ..End::because(Reason::ScriptFailure, "") };
        assert_eq!(End::success().run_exit(), (0, ExitOrigin::Command));
        assert_eq!(failed(Some(7), None).run_exit(), (7, ExitOrigin::Command));
        assert_eq!(failed(None, Some(9)).run_exit(), (137, ExitOrigin::Command));
        let missing = End { exit_code: Some(0), ..End::because(Reason::ArtifactMissing, "") };
        assert_eq!(missing.run_exit(), (1, ExitOrigin::Alloy));
        for (reason, code) in [
            (Reason::RunTimeout, 124),
            (Reason::UserCanceled, 130),
            (Reason::QueueExpired, 125),
            (Reason::WorkerLost, 125),
            (Reason::ConfigError, 125),
        ] {
            assert_eq!(End::because(reason, "x").run_exit(), (code, ExitOrigin::Alloy), "{reason}");
        }
    }

    #[test]
    fn words_survive_json_and_text() {
        for reason in Reason::ALL {
            assert_eq!(serde_json::to_string(reason).unwrap(), format!("\"{reason}\""));
            assert_eq!(reason.as_str().parse::<Reason>().unwrap(), *reason);
        }
        for word in StateWord::ALL {
            assert_eq!(serde_json::to_string(word).unwrap(), format!("\"{word}\""));
        }
    }
}
