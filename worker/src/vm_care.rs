//! D: whether this host can run VMs: what its faults come to, and when it is tried again.
//!
//! One fault of the host costs a pause, in which VMs that nobody has are looked for. Several in a row, with no VM that came
//! up between them, mean that the host is ill: it takes no jobs, says why, and tries one VM now and then, because a person
//! may have mended it. A VM that does not go takes a slot away from the operating system's count until the host restarts.

use alloy_shared::env::Mono;
use alloy_shared::limits::{HOST_FAULTS_MAX, Limits, MACOS_GUESTS_MAX, STUCK_TRIES_MAX, TROUBLE_MAX};

use crate::provider::{VmError, VmFault, VmName};

const PAUSE_MS: u64 = 1_000;
const REBOOT: &str = "VMs that are gone still count on this host: reboot it";
const LOOK: &str = "VMs do not start on this host: see `worker doctor` there";

/// When VMs may be made, as far as the host goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    Well,
    /// It had a fault and rests until then.
    Resting {
        until: Mono,
    },
    /// One VM is tried from then on.
    Ill {
        probe: Mono,
    },
}

/// What a VM that did not come says about its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing: it is about this one VM.
    Vm,
    /// Nothing at all: it was killed because the worker's lease had ended.
    Fenced,
    /// The host may be at fault: look for VMs that nobody has, and try again.
    Again,
    /// There is no room for a VM in this slot: close it for a while.
    Slot,
    /// The host is ill, as it was before or since this fault.
    Ill,
}

/// What a person should look after.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    pub why: String,
    /// No job should come here until somebody has.
    pub drains: bool,
}

#[derive(Debug)]
pub struct Care {
    quarantine_ms: u64,
    faults: u32,
    until: Mono,
    ill: Option<String>,
    slots: Vec<SlotCare>,
}

#[derive(Debug, Clone, Default)]
struct SlotCare {
    /// How often in a row there was no room for its VM, though other VMs run.
    refused: u32,
    /// Somebody else's VM has its place.
    short: bool,
    /// A VM that would not go, and how often it was asked.
    stuck: Option<(VmName, u32)>,
}

impl Care {
    pub fn new(slots: usize, limits: &Limits) -> Self {
        let slots = vec![SlotCare::default(); slots];
        Self { quarantine_ms: limits.quarantine_ms, faults: 0, until: Mono(0), ill: None, slots }
    }

    /// The pool has so many slots from here on; those that go are empty.
    pub fn resize(&mut self, slots: usize) {
        self.slots.resize(slots, SlotCare::default());
    }

    /// Judges why a VM did not come into this slot, while `others` of the slots have VMs.
    pub fn failed(&mut self, slot: usize, error: &VmError, others: usize, now: Mono) -> Verdict {
        match error.what {
            VmFault::Full if others > 0 => {
                let slot = &mut self.slots[slot];
                slot.refused = slot.refused.saturating_add(1);
                if slot.refused < HOST_FAULTS_MAX {
                    return Verdict::Again;
                }
                // With so many of ours a refusal is no fault.
                slot.short = others < MACOS_GUESTS_MAX;
                Verdict::Slot
            }
            VmFault::Taken => Verdict::Slot,
            VmFault::Fenced => Verdict::Fenced,
            VmFault::Full | VmFault::Host => self.host_failed(error, now),
            VmFault::NoImage
            | VmFault::Pull
            | VmFault::Start
            | VmFault::Lost
            | VmFault::Network
            | VmFault::Disk
            | VmFault::Destroy
            | VmFault::File => Verdict::Vm,
        }
    }

    /// Counts a fault of the host, whatever it was found by.
    pub fn host_failed(&mut self, error: &VmError, now: Mono) -> Verdict {
        self.faults = self.faults.saturating_add(1);
        if self.faults < HOST_FAULTS_MAX {
            self.until = now + PAUSE_MS * u64::from(self.faults);
            return Verdict::Again;
        }
        self.until = now + self.quarantine_ms;
        let cure = if error.what == VmFault::Full { REBOOT } else { LOOK };
        self.ill = Some(clip(&format!("{cure} ({})", error.tail)));
        Verdict::Ill
    }

    /// A VM came up in this slot: the host is well, whatever was said before.
    pub fn came_up(&mut self, slot: usize) {
        (self.faults, self.until, self.ill) = (0, Mono(0), None);
        (self.slots[slot].refused, self.slots[slot].short) = (0, false);
    }

    /// The VM in this slot was told to go and is still there.
    pub fn stuck(&mut self, slot: usize, vm: &VmName) {
        let tries = self.slots[slot].stuck.as_ref().map_or(0, |(_, tries)| *tries);
        self.slots[slot].stuck = Some((vm.clone(), tries.saturating_add(1)));
    }

    /// The VM in this slot is gone.
    pub fn gone(&mut self, slot: usize) {
        self.slots[slot].stuck = None;
    }

    pub fn host(&self) -> Host {
        match (&self.ill, self.faults) {
            (Some(_), _) => Host::Ill { probe: self.until },
            (None, 0) => Host::Well,
            (None, _) => Host::Resting { until: self.until },
        }
    }

    pub fn trouble(&self) -> Option<Trouble> {
        let drains = |why: String| Trouble { why, drains: true };
        let stuck = self.slots.iter().filter_map(|slot| slot.stuck.as_ref());
        let stuck = stuck
            .filter(|(_, tries)| *tries >= STUCK_TRIES_MAX)
            .map(|(vm, _)| drains(format!("{vm} does not go, even when it is killed: reboot this host")));
        let short = self.slots.iter().filter(|slot| slot.short).map(|_| Trouble {
            why: "a VM that is gone still counts on this host, which runs one less until it is rebooted".to_owned(),
            drains: false,
        });
        self.ill.clone().map(drains).into_iter().chain(stuck).chain(short).next()
    }
}

fn clip(text: &str) -> String {
    let plain: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let end = (0..=plain.len().min(TROUBLE_MAX)).rev().find(|at| plain.is_char_boundary(*at)).unwrap_or(0);
    plain[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Mono = Mono(100_000);

    fn care() -> Care {
        Care::new(2, &Limits::default())
    }
    fn error(what: VmFault) -> VmError {
        VmError::farm(what, "words")
    }

    fn why(care: &Care) -> Option<(String, bool)> {
        care.trouble().map(|trouble| (trouble.why, trouble.drains))
    }

    #[test]
    fn several_faults_of_the_host_in_a_row_make_it_ill_and_one_vm_makes_it_well() {
        let mut care = care();
        assert_eq!(care.failed(0, &error(VmFault::Host), 0, NOW), Verdict::Again);
        assert_eq!((care.host(), care.trouble()), (Host::Resting { until: NOW + 1_000 }, None));
        care.came_up(0);
        for n in 1..HOST_FAULTS_MAX {
            assert_eq!(care.failed(0, &error(VmFault::Host), 1, NOW), Verdict::Again, "{n}");
        }
        assert_eq!(care.failed(1, &error(VmFault::Host), 0, NOW), Verdict::Ill);
        assert_eq!(care.host(), Host::Ill { probe: NOW + Limits::default().quarantine_ms });
        let (text, drains) = why(&care).unwrap();
        assert!(
            drains && text.contains("worker doctor") && text.contains("words") && !text.contains("reboot"),
            "{text}"
        );
        assert_eq!(care.failed(0, &error(VmFault::Host), 0, NOW + 1), Verdict::Ill);
        care.came_up(1);
        assert_eq!((care.host(), care.trouble()), (Host::Well, None));
    }

    #[test]
    fn a_host_that_is_full_without_a_vm_of_ours_asks_for_a_reboot() {
        let mut care = care();
        for _ in 1..HOST_FAULTS_MAX {
            assert_eq!(care.failed(0, &error(VmFault::Full), 0, NOW), Verdict::Again);
        }
        assert_eq!(care.failed(0, &error(VmFault::Full), 0, NOW), Verdict::Ill);
        let (text, drains) = why(&care).unwrap();
        assert!(drains && text.contains("reboot"), "{text}");
    }

    #[test]
    fn a_slot_without_room_beside_others_is_closed_and_told_only_if_there_should_be_room() {
        for (others, told) in [(1, true), (2, false)] {
            let mut care = care();
            for _ in 1..HOST_FAULTS_MAX {
                assert_eq!(care.failed(1, &error(VmFault::Full), others, NOW), Verdict::Again);
            }
            assert_eq!(care.failed(1, &error(VmFault::Full), others, NOW), Verdict::Slot);
            // The next refusal closes it at once, whatever the other slot does.
            care.came_up(0);
            assert_eq!(care.failed(1, &error(VmFault::Full), others, NOW), Verdict::Slot);
            assert_eq!((care.host(), care.trouble().map(|it| it.drains)), (Host::Well, told.then_some(false)));
            care.came_up(1);
            assert_eq!(care.trouble(), None);
        }
    }

    #[test]
    fn a_host_whose_places_another_worker_has_is_well_and_its_slot_rests() {
        let mut care = care();
        for _ in 0..2 * HOST_FAULTS_MAX {
            assert_eq!(care.failed(0, &error(VmFault::Taken), 0, NOW), Verdict::Slot);
            assert_eq!((care.host(), care.trouble()), (Host::Well, None));
        }
    }

    #[test]
    fn other_faults_are_not_the_hosts() {
        let mut care = care();
        for what in [VmFault::Start, VmFault::Lost, VmFault::Disk, VmFault::Network, VmFault::NoImage, VmFault::Pull] {
            assert_eq!(care.failed(0, &error(what), 0, NOW), Verdict::Vm, "{what:?}");
        }
        assert_eq!(care.failed(0, &VmError::fenced(), 0, NOW), Verdict::Fenced);
        assert_eq!(care.host(), Host::Well);
    }

    #[test]
    fn a_vm_that_does_not_go_is_told_until_it_is_gone() {
        let (mut care, vm) = (care(), VmName::mint(1, 7));
        for _ in 0..STUCK_TRIES_MAX {
            assert_eq!(care.trouble(), None);
            care.stuck(1, &vm);
        }
        let (text, drains) = why(&care).unwrap();
        assert!(drains && text.contains(vm.as_str()) && text.contains("reboot"), "{text}");
        assert_eq!(care.host(), Host::Well, "the other slot may go on with what it has");
        care.gone(1);
        assert_eq!(care.trouble(), None);
    }

    #[test]
    fn what_is_told_is_short_and_plain() {
        let mut care = care();
        let long = VmError::farm(VmFault::Host, format!("a\nb\u{1b}[1m{}", "é".repeat(TROUBLE_MAX)));
        for _ in 0..HOST_FAULTS_MAX {
            care.failed(0, &long, 0, NOW);
        }
        let (text, _) = why(&care).unwrap();
        assert!(text.len() <= TROUBLE_MAX && !text.chars().any(char::is_control), "{text}");
    }
}
