//! Runs a model, and says what it found.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::hash::Hash;
use std::time::Duration;

use stateright::{Checker, Expectation, HasDiscoveries, Model};

use super::mutant::Mutant;
use super::outage::Outage;
use super::protocol::{Bound, Protocol};

/// What became of one exploration.
#[derive(Debug)]
pub struct Report {
    pub states: usize,
    pub steps: usize,
    pub depth: usize,
    pub took: Duration,
    /// Checks that failed, each with the shortest trace to it.
    pub broken: Vec<(&'static str, Vec<String>)>,
    /// What was never seen, although it must be possible.
    pub unseen: Vec<&'static str>,
    /// What was seen, and after how many steps at the earliest.
    pub sights: Vec<(&'static str, usize)>,
}

/// Explores every state of a model. With a name, only until that check fails, on one thread: the trace is the shortest.
fn explore<M>(model: M, until: Option<&'static str>, steps_max: Option<usize>) -> Report
where
    M: Model + Send + Sync + 'static,
    M::State: Hash + Send + Sync + Clone + PartialEq + Debug + 'static,
    M::Action: Clone + PartialEq + Debug,
{
    let started = crate::observe::now();
    let (threads, finish) = match until {
        Some(check) => (1, HasDiscoveries::AnyOf(BTreeSet::from([check]))),
        // No name is missing from a set of them all: it goes on to the end.
        None => (2, HasDiscoveries::AllOf(BTreeSet::from(["the end"]))),
    };
    let mut builder = model.checker().threads(threads).finish_when(finish);
    if let Some(max) = steps_max {
        builder = builder.target_state_count(max);
    }
    let checker = builder.spawn_bfs().join();
    let mut report = Report {
        states: checker.unique_state_count(),
        steps: checker.state_count(),
        depth: checker.max_depth(),
        took: started.elapsed(),
        broken: Vec::new(),
        unseen: Vec::new(),
        sights: Vec::new(),
    };
    let found = checker.discoveries();
    for property in checker.model().properties() {
        let path = found.get(property.name).cloned().map(|path| path.into_actions());
        match (property.expectation, path) {
            (Expectation::Sometimes, None) => report.unseen.push(property.name),
            (Expectation::Sometimes, Some(path)) => report.sights.push((property.name, path.len())),
            (Expectation::Always | Expectation::Eventually, None) => {}
            (Expectation::Always | Expectation::Eventually, Some(path)) => {
                let actions = path.iter().map(|action| checker.model().format_action(action)).collect();
                report.broken.push((property.name, actions));
            }
        }
    }
    report
}

/// Explores the protocol, to the end or to so many steps.
pub fn protocol(bound: Bound, steps_max: Option<usize>) -> Report {
    explore(Protocol::new(bound, None), None, steps_max)
}

/// Explores the rule for outages to the end.
pub fn outage(changes: u8) -> Report {
    explore(Outage::new(changes, None), None, None)
}

/// Explores a mutant until its check notices.
pub fn mutant(mutant: Mutant) -> Report {
    let until = Some(mutant.caught_by());
    match Mutant::OUTAGE.contains(&mutant) {
        true => explore(Outage::new(Outage::SMALL, Some(mutant)), until, None),
        false => explore(Protocol::new(Bound::of(mutant), Some(mutant)), until, None),
    }
}

impl Report {
    /// True if every check holds and all that must be possible was seen.
    pub fn is_good(&self) -> bool {
        self.broken.is_empty() && self.unseen.is_empty()
    }

    /// The trace to the check that this mutant breaks.
    pub fn trace(&self, mutant: Mutant) -> Option<&[String]> {
        self.broken.iter().find(|(name, _)| *name == mutant.caught_by()).map(|(_, trace)| &trace[..])
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { states, steps, depth, took, .. } = self;
        writeln!(f, "{states} states, {steps} steps, depth {depth}, {:.1} s", took.as_secs_f64())?;
        for (check, trace) in &self.broken {
            writeln!(f, "BROKEN after {} steps: {check}", trace.len())?;
            trace.iter().try_for_each(|action| writeln!(f, "    {action}"))?;
        }
        self.unseen.iter().try_for_each(|what| writeln!(f, "NEVER SEEN: {what}"))?;
        self.sights.iter().try_for_each(|(what, steps)| writeln!(f, "seen after {steps:2} steps: {what}"))
    }
}
