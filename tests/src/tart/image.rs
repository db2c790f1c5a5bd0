//! What an image is, beyond the files that `tart` itself would have: how big, how fast to boot, what its guest can do.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::context::Version;

/// Seconds from the start of `run`, before scaling.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Boot {
    pub vm_started: f64,
    pub lease: f64,
    pub sshd: f64,
    pub agent: f64,
}

/// The guest agent of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Agent {
    None,
    /// Without `env`, `workdir` and `detach`.
    V0_9,
    V0_11,
    /// Reports a signal as 128 + n.
    V0_12,
    /// As old as the release of `tart`.
    OfTheRelease,
}

impl Agent {
    pub(crate) fn of(self, version: Version) -> Agent {
        match (self, version) {
            (Agent::OfTheRelease, Version::V2_30) => Agent::V0_9,
            (Agent::OfTheRelease, Version::V2_35) => Agent::V0_11,
            (Agent::OfTheRelease, Version::V2_40) => Agent::V0_12,
            (Agent::None | Agent::V0_9 | Agent::V0_11 | Agent::V0_12, _) => self,
        }
    }
}

/// One image of the registry, as a test describes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Profile {
    /// `darwin` or `linux`.
    pub os: String,
    pub agent: Agent,
    pub sshd: bool,
    pub cpu_min: u64,
    pub cpu: u64,
    pub memory_mib_min: u64,
    pub memory_mib: u64,
    pub disk_gb: u64,
    /// What the disk really takes.
    pub allocated_gb: f64,
    pub compressed_gb: f64,
    pub layers: u32,
    /// How long a whole pull takes, before scaling.
    pub pull_seconds: f64,
    pub boot: Boot,
    pub resume: Boot,
    /// Limits the guest's root to a file system of this size, which is empty again at every boot.
    pub disk_free_mib: Option<u64>,
    /// Files of the guest's root by absolute path.
    pub files: BTreeMap<String, String>,
}

impl Default for Profile {
    fn default() -> Profile {
        Profile {
            os: "darwin".into(),
            agent: Agent::OfTheRelease,
            sshd: true,
            cpu_min: 4,
            cpu: 4,
            memory_mib_min: 4096,
            memory_mib: 8192,
            disk_gb: 50,
            allocated_gb: 27.0,
            compressed_gb: 25.0,
            layers: 20,
            pull_seconds: 20.0,
            boot: Boot { vm_started: 1.0, lease: 12.0, sshd: 18.0, agent: 25.0 },
            resume: Boot { vm_started: 1.0, lease: 1.0, sshd: 2.0, agent: 2.0 },
            disk_free_mib: None,
            files: BTreeMap::new(),
        }
    }
}

impl Profile {
    pub fn linux() -> Profile {
        Profile {
            os: "linux".into(),
            cpu_min: 1,
            disk_gb: 20,
            allocated_gb: 4.0,
            compressed_gb: 2.0,
            ..Profile::default()
        }
    }

    /// Without the agent, as the vanilla images are.
    pub fn vanilla() -> Profile {
        Profile { agent: Agent::None, ..Profile::default() }
    }

    pub(crate) fn home(&self) -> &'static str {
        if self.os == "darwin" { "/Users/admin" } else { "/home/admin" }
    }
}
