//! What a run has seen: every kind of fault, and every transition that the life of a job allows. What was never seen was
//! never tested.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use alloy_shared::wire::job::StateWord;

macro_rules! faults {
    ($($name:ident,)+) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Fault { $($name,)+ }
        impl Fault {
            pub const ALL: &'static [Fault] = &[$(Fault::$name,)+];
        }
    };
}

faults! {
    SlowLine,
    BlackUp,
    BlackDown,
    Partition,
    Cut,
    LostReply,
    WorkerKilled,
    WorkerFrozen,
    WorkerDrained,
    WorkerPower,
    OrchestratorKilled,
    OrchestratorFrozen,
    OrchestratorRestarted,
    OrchestratorPower,
    WorkerDiskFull,
    WorkerDiskBroken,
    OrchestratorDiskFull,
    OrchestratorDiskBroken,
    SlowDisk,
    StoreAway,
    StoreFull,
    CommitLost,
    CommitUnknown,
    WorkerWall,
    OrchestratorWall,
    Fenced,
    CloneFails,
    BootFails,
    BootHangs,
    RestrictFails,
    DiesBusy,
    DiesWarm,
    DestroyFails,
    UnpackFails,
    FileChanges,
    PullRefused,
    PullBroken,
    SubmitRepeated,
    FollowerCut,
    CancelAsked,
    LogTorn,
    SpoolTorn,
}

/// From one state of a job to another.
pub type Step = (StateWord, StateWord);

#[derive(Default)]
pub struct Cover(Mutex<Seen>);

/// How often each thing was seen. Two of them can be added.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    pub faults: BTreeMap<Fault, u64>,
    pub steps: BTreeMap<(&'static str, &'static str), u64>,
    pub ends: BTreeMap<String, u64>,
    /// What was removed because it was old.
    pub gone: BTreeMap<&'static str, u64>,
}

/// What a farm removes.
pub const GONE: [&str; 5] = ["jobs", "logs", "artifacts", "blobs", "objects"];

impl Cover {
    pub fn fault(&self, fault: Fault) {
        tracing::debug!(?fault, "something breaks");
        *self.seen().faults.entry(fault).or_default() += 1;
    }

    pub fn step(&self, (from, to): Step) {
        *self.seen().steps.entry((from.as_str(), to.as_str())).or_default() += 1;
    }

    pub fn end(&self, how: String) {
        *self.seen().ends.entry(how).or_default() += 1;
    }

    pub fn gone(&self, what: &'static str) {
        *self.seen().gone.entry(what).or_default() += 1;
    }

    pub fn take(&self) -> Seen {
        self.seen().clone()
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seen {
    pub fn add(&mut self, other: Seen) {
        other.faults.into_iter().for_each(|(what, count)| *self.faults.entry(what).or_default() += count);
        other.steps.into_iter().for_each(|(what, count)| *self.steps.entry(what).or_default() += count);
        other.ends.into_iter().for_each(|(what, count)| *self.ends.entry(what).or_default() += count);
        other.gone.into_iter().for_each(|(what, count)| *self.gone.entry(what).or_default() += count);
    }

    /// Faults and transitions that never happened.
    pub fn missing(&self) -> Vec<String> {
        let faults =
            Fault::ALL.iter().filter(|fault| !self.faults.contains_key(fault)).map(|fault| format!("{fault:?}"));
        let legal = legal_steps();
        let steps = legal.into_iter().filter(|step| !NEVER.contains(step) && !self.steps.contains_key(step));
        let gone =
            GONE.into_iter().filter(|what| !self.gone.contains_key(what)).map(|what| format!("old {what} that go"));
        faults.chain(steps.map(|(from, to)| format!("{from} → {to}"))).chain(gone).collect()
    }
}

/// What `apply` allows and no worker brings about that keeps to the protocol: an end is never the first of its reports, and
/// it says that a job was canceled only after the order to cancel it, which follows the state.
pub const NEVER: &[(&str, &str)] = &[
    ("assigned", "canceled"),
    ("assigned", "failed"),
    ("assigned", "succeeded"),
    ("assigned", "timed_out"),
    ("running", "canceled"),
];

/// Every change of state that `apply` allows, from the table that its own tests keep true.
pub fn legal_steps() -> Vec<(&'static str, &'static str)> {
    let page = include_str!("../../../docs/ARCHITECTURE.md");
    let table = page.split("## The life of a job").nth(1).unwrap_or("").split("```").nth(1).unwrap_or("");
    let line = |line: &'static str| {
        let (from, rest) = line.split_once('→')?;
        Some((from.trim(), rest.split_whitespace().next()?))
    };
    table.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_transitions_is_read_whole() {
        let legal = legal_steps();
        assert!(legal.len() > 20 && legal.contains(&("queued", "expired")), "{legal:?}");
        for (from, to) in legal.iter().chain(NEVER) {
            assert!(from.parse::<StateWord>().is_ok() && to.parse::<StateWord>().is_ok(), "{from} → {to}");
        }
        assert!(NEVER.iter().all(|step| legal.contains(step)));
        let missing = Seen::default().missing();
        assert_eq!(missing.len(), Fault::ALL.len() + legal.len() - NEVER.len() + GONE.len());
    }
}
