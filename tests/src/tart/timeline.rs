//! What a boot reaches, and when.

use std::time::{Duration, Instant};

use super::context::{Sim, now};
use super::fault::{Fault, LOOK, find};
use super::image::{Agent, Boot, Profile};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    Started,
    Lease,
    Sshd,
    Agent,
}

impl Phase {
    pub(crate) fn parse(text: &str) -> Option<Phase> {
        match text {
            "vm_started" => Some(Phase::Started),
            "lease" => Some(Phase::Lease),
            "sshd" => Some(Phase::Sshd),
            "agent" => Some(Phase::Agent),
            _ => None,
        }
    }
}

/// The phases that are still to come, the next one last.
#[derive(Debug)]
pub(crate) struct Timeline {
    due: Vec<(Instant, Phase)>,
    /// What keeps the agent from coming.
    late: Option<Fault>,
    pub(crate) reached: Option<Phase>,
}

impl Timeline {
    /// `boots` counts those of this run before.
    pub(crate) fn new(sim: &Sim, profile: &Profile, boot: Boot, faults: &[Fault], boots: u32) -> Timeline {
        let start = now();
        let at = |seconds: f64| start + sim.scaled(seconds);
        let later = |name: &str| find(faults, name).map_or(0.0, Fault::seconds);
        let hangs = find(faults, "boot_hang").is_some();
        let mut due = vec![(at(boot.vm_started), Phase::Started)];
        if !hangs && find(faults, "no_lease").is_none() {
            due.push((at(boot.lease + later("late_lease")), Phase::Lease));
        }
        if !hangs && profile.sshd {
            due.push((at(boot.sshd), Phase::Sshd));
        }
        let lost = boots > 0 && find(faults, "agent_lost_by_reboot").is_some();
        if !hangs && !lost && profile.agent != Agent::None {
            due.push((at(boot.agent + later("agent_late")), Phase::Agent));
        }
        due.sort_by_key(|(when, phase)| std::cmp::Reverse((*when, *phase)));
        Timeline { due, late: find(faults, "agent_late").cloned(), reached: None }
    }

    pub(crate) fn next(&self) -> Option<Instant> {
        let (when, phase) = *self.due.last()?;
        Some(if Self::is_held(&self.late, phase) { when.max(now() + LOOK) } else { when })
    }

    fn is_held(late: &Option<Fault>, phase: Phase) -> bool {
        phase == Phase::Agent && late.as_ref().is_some_and(Fault::holds)
    }

    pub(crate) fn reach(&mut self) -> Option<Phase> {
        let (_, phase) = self.due.pop_if(|(_, phase)| !Self::is_held(&self.late, *phase))?;
        self.reached = self.reached.max(Some(phase));
        Some(phase)
    }
}

/// A death on order: at a phase, some time later, or when a file appears.
#[derive(Debug)]
pub(crate) struct Trigger {
    pub(crate) how: String,
    at: Phase,
    after: Duration,
    file: Option<std::path::PathBuf>,
    reached: Option<Instant>,
}

impl Trigger {
    pub(crate) fn of(sim: &Sim, faults: &[Fault]) -> Option<Trigger> {
        let fault = find(faults, "die")?;
        Some(Trigger {
            how: fault.text("how").unwrap_or("crash").to_owned(),
            at: fault.text("at").and_then(Phase::parse).unwrap_or(Phase::Started),
            after: sim.scaled(fault.number("after").unwrap_or(0.0)),
            file: fault.text("file").map(Into::into),
            reached: None,
        })
    }

    /// When to look, or nothing while its phase is not reached.
    pub(crate) fn due(&mut self, timeline: &Timeline) -> Option<Instant> {
        if timeline.reached < Some(self.at) {
            return None;
        }
        let reached = *self.reached.get_or_insert_with(now);
        let due = reached + self.after;
        Some(if self.file.is_some() { due.max(now() + LOOK) } else { due })
    }

    pub(crate) fn is_ripe(&self) -> bool {
        self.file.as_ref().is_none_or(|file| file.exists())
    }
}
