//! T: images of VMs: what the farm wants of them on a worker, what a worker says of them, and how people see both.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::id::WorkerId;

/// What the farm wants of one image on one worker. A list of them is the whole truth, each time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageWish {
    pub name: String,
    pub want: ImageWant,
    /// It is not evicted.
    #[serde(default)]
    pub pinned: bool,
    /// A worker fulfils each one once: `present` asks the registry again, `absent` removes it once.
    pub generation: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum ImageWant {
    /// Every worker that is meant shall have it.
    Present,
    /// It was removed. A job that needs it brings it again.
    Absent,
    /// It comes and goes as jobs need it.
    None,
}

impl ImageWant {
    pub const ALL: [Self; 3] = [Self::Present, Self::Absent, Self::None];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Present => "present",
            Self::Absent => "absent",
            Self::None => "none",
        }
    }
}

/// What a worker has. Sent whole with every change.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// False: nothing is brought here, jobs run in what there is.
    pub pulls: bool,
    /// What a job gets that names no image.
    #[serde(default)]
    pub own: String,
    pub images: Vec<ImageReport>,
}

impl Inventory {
    /// False as long as the worker has said nothing: its first word names what its jobs get.
    pub fn is_told(&self) -> bool {
        !self.own.is_empty()
    }

    /// True if no image can be had that is not here.
    pub fn is_bare(&self) -> bool {
        self.is_told() && !self.pulls
    }

    /// The same as a sentence.
    pub fn brings_none(&self) -> Option<String> {
        self.is_bare().then(|| format!("it brings no images and runs jobs in `{}`", self.own))
    }
}

/// One image on one worker, by one of its names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ImageReport {
    pub name: String,
    /// `sha256:…`; present if VMs can be made of it at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// Milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_at_ms: Option<i64>,
    /// A VM or a waiting job needs it: it is not removed now.
    #[serde(default)]
    pub in_use: bool,
    /// It waits for its turn to be brought.
    #[serde(default)]
    pub waiting: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pulling: Option<PullProgress>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<PullFailed>,
    /// The newest wish that was fulfilled.
    #[serde(default)]
    pub generation: i64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct PullProgress {
    pub percent: u8,
    /// What is to be downloaded, compressed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_bytes: Option<u64>,
}

/// Why an image did not come. The worker does not try before a while is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct PullFailed {
    /// In the registry's words, for people.
    pub message: String,
    /// Not to be had here: the registry says so, or the host is not fit for it. Otherwise trying again may help.
    pub refused: bool,
}

/// A name with the tag that it stands for.
pub fn canonical(name: &str) -> String {
    let last = name.rsplit('/').next().unwrap_or(name);
    // Without a slash it is a VM of the host, which has no tags.
    if name.contains('/') && !last.contains([':', '@']) { format!("{name}:latest") } else { name.to_owned() }
}

/// Body of `POST /v1/images`: workers shall have this image. Every worker that is named and has the labels is meant.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct PullRequest {
    pub name: String,
    /// Ids. None: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "openapi", schema(value_type = Vec<String>))]
    pub workers: Vec<WorkerId>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// Body of `POST /v1/images/pin`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct PinRequest {
    pub name: String,
    pub pinned: bool,
}

/// Body of `POST /v1/images/rm`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct RemoveRequest {
    pub name: String,
}

/// An image that the farm wants or that a worker has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ImageView {
    pub name: String,
    pub want: ImageWant,
    pub pinned: bool,
    /// The number of the newest wish, 0 if nobody ever wished anything.
    pub generation: i64,
    pub workers: Vec<WorkerImage>,
}

/// What one worker says of the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct WorkerImage {
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub worker: WorkerId,
    pub worker_name: String,
    pub connected: bool,
    /// The newest wish is meant for this worker.
    pub wanted: bool,
    #[serde(flatten)]
    pub report: ImageReport,
}

/// `GET /v1/images`, by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ImageList {
    pub images: Vec<ImageView>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_without_a_tag_means_the_latest() {
        for (name, expected) in [
            ("r.io/a/b", "r.io/a/b:latest"),
            ("r.io:5000/a/b", "r.io:5000/a/b:latest"),
            ("r.io/a/b:16", "r.io/a/b:16"),
            ("r.io/a/b@sha256:ab", "r.io/a/b@sha256:ab"),
            ("base", "base"),
        ] {
            assert_eq!(canonical(name), expected);
        }
    }
}
