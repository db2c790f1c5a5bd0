//! T: the farm around the jobs: workers, invitations, tokens, versions.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::id::{OrgId, TokenId, UserId, WorkerId};
use crate::secret::Secret;

/// `GET /v1/info`: what a client needs to know before it signs in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Info {
    pub version: String,
    pub protocol_min: u32,
    pub protocol_max: u32,
    pub capabilities: Vec<String>,
    pub base_url: String,
    /// The orchestrator's wall clock, RFC 3339: `alloy doctor` compares it.
    pub time: String,
    /// The longest that a job may ask to run, and to wait. Absent: an older farm, which says so when the job comes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_max_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_timeout_max_ms: Option<u64>,
    /// The disk that the farm's bytes go to. Absent: they go to none of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<Storage>,
}

/// Free space, and how much of it the farm keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Storage {
    pub free_bytes: u64,
    /// With less than this free, no new job and no upload is taken (507, `storage_full`).
    pub floor_bytes: u64,
}

impl Storage {
    pub fn is_full(&self) -> bool {
        self.free_bytes < self.floor_bytes
    }
}

/// `GET /v1/whoami`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct WhoAmI {
    pub name: String,
    pub role: Role,
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub org: OrgId,
}

/// What a credential may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Reads jobs and workers.
    Viewer,
    /// Submits and cancels jobs.
    Developer,
    /// Also workers and tokens.
    Admin,
}

impl Role {
    pub const ALL: [Role; 3] = [Self::Viewer, Self::Developer, Self::Admin];
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Developer => "developer",
            Self::Admin => "admin",
        }
    }
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == text)
    }
}

/// Body of `POST /v1/workers/invites`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct InviteRequest {
    /// Labels that the new worker will carry.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Seconds until the invitation is void. Default and most: one day.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_s: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Invite {
    /// Shown once. Enrols one worker.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub token: Secret<String>,
    pub expires_at: String,
    /// What to type on the new Mac.
    pub command: String,
}

/// Body of `POST /v1/workers/enrol`. Sent again with the same key it gives the same worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct EnrolRequest {
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub token: Secret<String>,
    /// Ed25519, base64 of 32 bytes.
    pub public_key: String,
    pub name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Enrolled {
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub worker: WorkerId,
    pub name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum WorkerState {
    /// Connected, with a free slot.
    Ready,
    /// Connected, all slots taken.
    Busy,
    /// Takes no more, finishes what it has.
    Draining,
    /// Draining and empty.
    Drained,
    /// Its connection is gone, or it missed three heartbeats, or it was not heard yet since the orchestrator started.
    Suspect,
    /// It went without a word and did not come back in time.
    Lost,
    /// It was stopped, or it never connected.
    Offline,
}

impl WorkerState {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Busy => "busy",
            Self::Draining => "draining",
            Self::Drained => "drained",
            Self::Suspect => "suspect",
            Self::Lost => "lost",
            Self::Offline => "offline",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct WorkerView {
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub id: WorkerId,
    pub name: String,
    pub state: WorkerState,
    pub labels: BTreeMap<String, String>,
    pub slots: u32,
    pub slots_busy: u32,
    /// Slots whose VM waits for a job.
    #[serde(default)]
    pub slots_warm: u32,
    pub version: String,
    /// RFC 3339; absent if it never connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seen_at: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain_note: Option<String>,
    /// What a person should look after on its host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
    /// Jobs it holds.
    pub jobs: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct WorkerList {
    pub workers: Vec<WorkerView>,
}

/// Body of `POST /v1/workers/{id}/drain`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct DrainRequest {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// Body of `PUT /v1/members/{user_id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct MemberRequest {
    pub role: Role,
    /// For people only. Absent: the one that is known stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub email: Option<String>,
}

/// A person who signs in elsewhere and may use this farm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct MemberView {
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub user_id: UserId,
    pub role: Role,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub email: Option<String>,
    pub created_at: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct MemberList {
    pub members: Vec<MemberView>,
}

/// Body of `PUT /v1/retention`: how many days the organisation wants things to be kept. 0: for ever. Absent: as the farm does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct RetentionRequest {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jobs_days: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifacts_days: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logs_days: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sources_days: Option<u32>,
}

/// How long one kind of thing is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Kept {
    /// 0: for ever.
    pub days: u32,
    /// The organisation said so itself. Else it is what the farm keeps.
    pub own: bool,
    pub farm_days: u32,
}

/// What is kept of an organisation, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct RetentionView {
    pub jobs: Kept,
    pub artifacts: Kept,
    pub logs: Kept,
    pub sources: Kept,
}

/// Body of `POST /v1/tokens`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    pub name: String,
    pub role: Role,
    /// A CI system's token instead of a person's.
    #[serde(default)]
    pub ci: bool,
    /// Seconds until it is void. Absent: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_s: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TokenView {
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub id: TokenId,
    pub name: String,
    pub role: Role,
    /// Prefix and last four characters.
    pub shown: String,
    pub created_at: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<String>,
    pub revoked: bool,
}

/// Answer of `POST /v1/tokens`: the only time that the token is shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TokenCreated {
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub token: Secret<String>,
    pub view: TokenView,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TokenList {
    pub tokens: Vec<TokenView>,
}
