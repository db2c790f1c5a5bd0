//! T: what an attempt's VM cost, and why none was waiting.

use serde::{Deserialize, Serialize};

/// How an attempt came by its VM. The stages are the VM's own: those of a warm one were over before the job was there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct VmStages {
    /// The VM waited for the attempt, and not the other way round.
    pub warm: bool,
    /// Why the attempt had to wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<Miss>,
    /// How long the attempt waited for its image to come onto the host, if it was not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pull_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clone_ms: Option<u64>,
    /// From the start of the VM until it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_ms: Option<u64>,
    /// Until somebody in the guest answers and has prepared it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_ms: Option<u64>,
    /// The last look before the command: network policy, clock, empty workspace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_ms: Option<u64>,
}

impl VmStages {
    /// Says for people what the attempt's command runs in, and how long that took: `vm_ms` is the whole stage.
    pub fn sentence(&self, vm_ms: Option<u64>) -> String {
        let after = vm_ms.map_or(String::new(), |ms| format!(" after {}", time(ms)));
        if self.warm {
            return format!("in a warm VM{after}");
        }
        let why = self.why.map_or(String::new(), |why| format!(": {}", why.sentence()));
        let made = [("clone", self.clone_ms), ("boot", self.boot_ms), ("agent", self.agent_ms)];
        let made: Vec<_> = made.into_iter().filter_map(|(name, ms)| Some(format!("{name} {}", time(ms?)))).collect();
        let made = if made.is_empty() { String::new() } else { format!(" ({})", made.join(", ")) };
        format!("in a cold VM{after}{why}{made}")
    }
}

/// `38ms`, `25.1s`.
fn time(ms: u64) -> String {
    if ms < 1_000 { format!("{ms}ms") } else { format!("{}.{}s", ms / 1_000, ms % 1_000 / 100) }
}

/// Why no warm VM was waiting for an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Miss {
    NoWarmVm,
    Booting,
    Recycling,
    TooOld,
    Died,
    StartFailed,
    Host,
    Network,
    Unfit,
    /// A cause that this build does not know.
    #[serde(other)]
    Other,
}

impl Miss {
    pub const ALL: [Self; 10] = [
        Self::NoWarmVm,
        Self::Booting,
        Self::Recycling,
        Self::TooOld,
        Self::Died,
        Self::StartFailed,
        Self::Host,
        Self::Network,
        Self::Unfit,
        Self::Other,
    ];

    pub const fn sentence(self) -> &'static str {
        match self {
            Self::NoWarmVm => "no warm VM of this image",
            Self::Booting => "the pool was still booting one",
            Self::Recycling => "the VM of an earlier job was still going",
            Self::TooOld => "the warm VM was too old",
            Self::Died => "the warm VM had died",
            Self::StartFailed => "VMs had failed to start",
            Self::Host => "the host was resting after a fault",
            Self::Network => "the warm VM did not take the job's network policy",
            Self::Unfit => "the warm VM was not as it was made",
            Self::Other => "of another cause",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_words_and_sentences_and_unknown_ones_are_taken() {
        let sentences: std::collections::BTreeSet<_> = Miss::ALL.into_iter().map(Miss::sentence).collect();
        assert_eq!(sentences.len(), Miss::ALL.len());
        for miss in Miss::ALL {
            let word = serde_json::to_string(&miss).unwrap();
            assert_eq!(serde_json::from_str::<Miss>(&word).unwrap(), miss, "{word}");
        }
        assert_eq!(serde_json::from_str::<Miss>(r#""of_a_later_build""#).unwrap(), Miss::Other);
    }

    #[test]
    fn a_hit_is_told_with_its_time_and_a_miss_with_its_cause_and_its_parts() {
        let cold = VmStages { why: Some(Miss::TooOld), ..VmStages::default() };
        assert_eq!(cold.sentence(None), "in a cold VM: the warm VM was too old");
        let cold = VmStages { clone_ms: Some(230), boot_ms: Some(25_190), ..cold };
        let told = "in a cold VM after 26.0s: the warm VM was too old (clone 230ms, boot 25.1s)";
        assert_eq!(cold.sentence(Some(26_049)), told);
        assert_eq!(VmStages { warm: true, ..cold }.sentence(Some(38)), "in a warm VM after 38ms");
    }
}
