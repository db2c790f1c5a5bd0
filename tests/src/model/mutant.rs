//! Rules of the farm, each broken by itself, and the check that notices.

use super::{outage, protocol::rules};

/// A broken rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mutant {
    /// A result is taken from any attempt.
    NoFenceOnComplete,
    /// Log bytes are stored wherever the log ends.
    NoOffsetCheck,
    /// A result stands on a log that is not there yet.
    CompleteBeforeLog,
    /// The attempt after a lost one has its number.
    AttemptNumberReused,
    /// Log bytes of any attempt go into the newest one's log.
    NoFenceOnLog,
    /// A result that comes again ends the job again.
    CompleteTwice,
    /// A report is acknowledged before it is committed.
    AckBeforeCommit,
    /// Log bytes are acknowledged before they are synced.
    AckBeforeSync,
    /// A report counts whatever session it comes from.
    StaleEpochAccepted,
    /// The orchestrator forgets a cancel when it restarts.
    CancelLost,
    /// A result that is sent again in a new session is not known again.
    ResentResultCounts,
    /// A worker is called lost right after the orchestrator's start.
    ExpireInGrace,
    /// A worker goes on when its lease ends.
    NoSelfFence,
    /// An attempt that a heartbeat does not name counts as lost, also before the worker heard of it.
    SilenceBelieved,
    /// A command outlives its worker's daemon.
    VmOutlivesDaemon,
    /// A worker whose owner is blind is lost as early as any other.
    ExpiryNotExtended,
    /// Any blind orchestrator answers any worker.
    AckFromNonOwner,
    /// What was heard during an outage is not written after it.
    NoFlush,
    /// Provisional answers keep a lease for ever.
    UnboundedProvisionalAcks,
    /// A worker gives its lease up when the orchestrator does.
    LateFence,
    /// Nobody answers without the database.
    NoProvisionalAcks,
    /// A worker that said hello elsewhere still believes its old owner's provisional answers.
    HelloForgotten,
}

impl Mutant {
    pub const PROTOCOL: [Self; 15] = [
        Self::NoFenceOnComplete,
        Self::NoOffsetCheck,
        Self::CompleteBeforeLog,
        Self::AttemptNumberReused,
        Self::NoFenceOnLog,
        Self::CompleteTwice,
        Self::AckBeforeCommit,
        Self::AckBeforeSync,
        Self::StaleEpochAccepted,
        Self::CancelLost,
        Self::ResentResultCounts,
        Self::ExpireInGrace,
        Self::NoSelfFence,
        Self::SilenceBelieved,
        Self::VmOutlivesDaemon,
    ];
    pub const OUTAGE: [Self; 7] = [
        Self::ExpiryNotExtended,
        Self::AckFromNonOwner,
        Self::NoFlush,
        Self::UnboundedProvisionalAcks,
        Self::LateFence,
        Self::NoProvisionalAcks,
        Self::HelloForgotten,
    ];

    pub fn all() -> impl Iterator<Item = Self> {
        Self::PROTOCOL.into_iter().chain(Self::OUTAGE)
    }

    /// The name on the command line.
    pub fn name(self) -> String {
        let mut name = String::new();
        for c in format!("{self:?}").chars() {
            if c.is_uppercase() && !name.is_empty() {
                name.push('-');
            }
            name.extend(c.to_lowercase());
        }
        name
    }

    /// The check that notices it.
    pub fn caught_by(self) -> &'static str {
        match self {
            Self::NoFenceOnComplete => rules::NEWEST_ENDS,
            Self::NoOffsetCheck | Self::NoFenceOnLog => rules::PREFIX,
            Self::CompleteBeforeLog => rules::WHOLE_LOG,
            Self::AttemptNumberReused => rules::STARTS_ONCE,
            Self::CompleteTwice => rules::ENDS_ONCE,
            Self::AckBeforeCommit | Self::AckBeforeSync => rules::ACK_DURABLE,
            Self::StaleEpochAccepted => rules::NO_STALE_SESSION,
            Self::CancelLost => rules::CANCEL_STAYS,
            Self::ResentResultCounts => rules::ATTEMPT_ENDS_ONCE,
            Self::ExpireInGrace | Self::NoSelfFence | Self::SilenceBelieved | Self::VmOutlivesDaemon => rules::ONE_VM,
            Self::ExpiryNotExtended
            | Self::AckFromNonOwner
            | Self::NoFlush
            | Self::UnboundedProvisionalAcks
            | Self::LateFence
            | Self::HelloForgotten => outage::VM_GONE_FIRST,
            Self::NoProvisionalAcks => outage::OUTAGE_IS_BORNE,
        }
    }
}
