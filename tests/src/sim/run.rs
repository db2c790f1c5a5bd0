//! Many seeds on all cores: the committed ones first, then as many as there is time for. One in a hundred is run twice and
//! must leave the same trace.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, Once, PoisonError};

use alloy_shared::env::Env as _;
use alloy_shared::runtime::SystemEnv;
use anyhow::{Context as _, Result, bail};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;

use super::cover::Seen;
use super::exec::virtual_ms;
use super::{Outcome, run_seed};

pub const HELP: &str = "\
sim [--seeds N] [--seconds S] [--hours H] [--first SEED]   run at least N seeds of H hours, and for at least S seconds
sim --seed SEED [--hours H] [--log FILTER]                 run one seed; with what its daemons say, on virtual time";

/// A run this long must have seen everything.
const SEEDS_FOR_ALL: u64 = 200;
/// After so many failures no further seed is begun.
const FAILURES_MAX: usize = 5;
/// Seeds that failed once. They run first, always.
const KNOWN: &str = include_str!("seeds.txt");

#[derive(Debug, Clone)]
pub struct Options {
    pub seeds: u64,
    pub seconds: u64,
    /// Thousandths of simulated hours.
    pub hours_milli: u64,
    pub first: Option<u64>,
    pub seed: Option<u64>,
    pub log: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self { seeds: SEEDS_FOR_ALL, seconds: 120, hours_milli: 2_000, first: None, seed: None, log: None }
    }
}

impl Options {
    /// Reads a command line. `None`: the help was asked for.
    pub fn parse(args: impl Iterator<Item = String>) -> Result<Option<Self>> {
        let mut options = Self::default();
        let mut args = args;
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value\n{HELP}"));
            match arg.as_str() {
                "--seeds" => options.seeds = value()?.parse()?,
                "--seconds" => options.seconds = value()?.parse()?,
                "--hours" => options.hours_milli = (value()?.parse::<f64>()? * 1_000.0) as u64,
                "--first" => options.first = Some(value()?.parse()?),
                "--seed" => options.seed = Some(value()?.parse()?),
                "--log" => options.log = Some(value()?),
                "--help" | "-h" => return Ok(None),
                _ => bail!("unknown argument `{arg}`\n{HELP}"),
            }
        }
        Ok(Some(options))
    }
}

/// The committed seeds with their hours in thousandths.
pub fn known() -> Vec<(u64, u64)> {
    let line = |line: &str| {
        let mut words = line.split('#').next().unwrap_or("").split_whitespace();
        let seed = words.next()?.parse().expect("a seed");
        let hours: f64 = words.next().map_or(2.0, |hours| hours.parse().expect("hours"));
        Some((seed, (hours * 1_000.0) as u64))
    };
    KNOWN.lines().filter_map(line).collect()
}

/// Runs what the options say and returns whether all was well.
pub fn main(options: &Options) -> bool {
    match options.seed {
        Some(seed) => one(options, seed),
        None => many(options),
    }
}

fn one(options: &Options, seed: u64) -> bool {
    if let Some(filter) = &options.log {
        let logs = tracing_subscriber::fmt().with_env_filter(EnvFilter::new(filter)).with_timer(VirtualTime);
        logs.with_ansi(false).init();
    }
    let outcome = run_seed(seed, options.hours_milli);
    println!("{}", told(&outcome));
    for (fault, count) in &outcome.seen.faults {
        println!("  {count:6} {fault:?}");
    }
    for (end, count) in &outcome.seen.ends {
        println!("  {count:6} {end}");
    }
    outcome.violations.is_empty()
}

/// Stamps log lines with the time of the world that they are from.
struct VirtualTime;

impl FormatTime for VirtualTime {
    fn format_time(&self, writer: &mut Writer<'_>) -> std::fmt::Result {
        write!(writer, "{:>10}", virtual_ms())
    }
}

/// What all threads add up to.
#[derive(Default)]
struct Sum {
    seen: Seen,
    seeds: u64,
    twice: u64,
    virtual_ms: u64,
    polls: u64,
    jobs: usize,
    attempts: usize,
    failures: Vec<String>,
}

fn many(options: &Options) -> bool {
    let clock = SystemEnv::detached();
    let begun = clock.now();
    let first = options.first.unwrap_or(begun.wall.0 as u64);
    let (next, failed) = (AtomicU64::new(0), AtomicUsize::new(0));
    let known = known();
    let sum = Mutex::new(Sum::default());
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let enough = index >= known.len() as u64 + options.seeds
                        && clock.now().mono.since(begun.mono) >= options.seconds * 1_000;
                    if enough || failed.load(Ordering::Relaxed) >= FAILURES_MAX {
                        return;
                    }
                    let (seed, hours) = match known.get(index as usize) {
                        Some(known) => *known,
                        None => (first + index - known.len() as u64, options.hours_milli),
                    };
                    if let Some(failure) = add(&sum, seed, hours, index % 100 == 0) {
                        failed.fetch_add(1, Ordering::Relaxed);
                        eprintln!("{failure}");
                    }
                }
            });
        }
    });
    let wall_ms = clock.now().mono.since(begun.mono).max(1);
    let sum = sum.into_inner().unwrap_or_else(PoisonError::into_inner);
    summary(&sum, first, wall_ms)
}

/// Runs a seed and adds it up. Returns why it failed.
fn add(sum: &Mutex<Sum>, seed: u64, hours_milli: u64, twice: bool) -> Option<String> {
    let outcome = run_seed(seed, hours_milli);
    let again = twice.then(|| run_seed(seed, hours_milli));
    let mut failure = (!outcome.violations.is_empty()).then(|| told(&outcome));
    if let Some(again) = again.as_ref().filter(|again| again.trace != outcome.trace) {
        failure = Some(format!("seed {seed} is not the same run twice: {:x} and {:x}", outcome.trace, again.trace));
    }
    let failure = failure.map(|failure| format!("{failure}\n  replay: {}", replay(seed, hours_milli)));
    let mut sum = sum.lock().unwrap_or_else(PoisonError::into_inner);
    sum.seeds += 1;
    sum.twice += u64::from(again.is_some());
    sum.jobs += outcome.jobs;
    sum.attempts += outcome.attempts;
    for run in [Some(outcome), again].into_iter().flatten() {
        sum.virtual_ms += run.virtual_ms;
        sum.polls += run.polls;
        sum.seen.add(run.seen);
    }
    sum.failures.extend(failure.clone());
    failure
}

fn replay(seed: u64, hours_milli: u64) -> String {
    let hours = match hours_milli == Options::default().hours_milli {
        true => String::new(),
        false => format!(" --hours {}", hours_milli as f64 / 1_000.0),
    };
    format!("cargo sim --seed {seed}{hours}")
}

fn told(outcome: &Outcome) -> String {
    let Outcome { seed, violations, trace, virtual_ms, polls, jobs, attempts, .. } = outcome;
    let mut text = format!(
        "seed {seed}: {jobs} jobs, {attempts} attempts, {:.2} h, {polls} polls, trace {trace:016x}",
        *virtual_ms as f64 / 3.6e6
    );
    for violation in violations {
        let _ = write!(text, "\n  {violation}");
    }
    text
}

fn summary(sum: &Sum, first: u64, wall_ms: u64) -> bool {
    let hours = sum.virtual_ms as f64 / 3.6e6;
    let speed = sum.virtual_ms as f64 / wall_ms as f64;
    println!(
        "{} seeds from {first} ({} of them twice), {} jobs, {} attempts, {:.1} M polls; {hours:.0} simulated hours in {:.0} s: {speed:.0} times real time, {:.1} h a second",
        sum.seeds,
        sum.twice,
        sum.jobs,
        sum.attempts,
        sum.polls as f64 / 1e6,
        wall_ms as f64 / 1e3,
        hours * 1e3 / wall_ms as f64,
    );
    let counts = |name: String, count: u64| format!("{name} {count}");
    let faults: Vec<String> = sum.seen.faults.iter().map(|(fault, n)| counts(format!("{fault:?}"), *n)).collect();
    let steps: Vec<String> = sum.seen.steps.iter().map(|((from, to), n)| counts(format!("{from}→{to}"), *n)).collect();
    let ends: Vec<String> = sum.seen.ends.iter().map(|(end, n)| counts(end.clone(), *n)).collect();
    let gone: Vec<String> = sum.seen.gone.iter().map(|(what, n)| counts((*what).to_owned(), *n)).collect();
    println!("faults: {}\ntransitions: {}\nends: {}", faults.join(", "), steps.join(", "), ends.join(", "));
    println!("gone: {}", gone.join(", "));
    let missing = sum.seen.missing();
    if !missing.is_empty() {
        println!("never seen: {}", missing.join(", "));
    }
    for failure in &sum.failures {
        println!("FAILED {failure}");
    }
    sum.failures.is_empty() && (missing.is_empty() || sum.seeds < SEEDS_FOR_ALL)
}

thread_local! {
    static PANICS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Remembers what panics on a thread, also where the product catches it.
pub fn catch_panics() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.with(|panics| panics.borrow_mut().push(info.to_string()));
            before(info);
        }));
    });
    take_panics();
}

pub fn take_panics() -> Vec<String> {
    PANICS.with(|panics| std::mem::take(&mut *panics.borrow_mut()))
}

#[cfg(test)]
mod tests {
    use super::super::cover::{Fault, GONE, legal_steps};
    use super::*;

    #[test]
    fn a_seed_leaves_the_same_trace_again_and_another_one_does_not() {
        let [first, again, other] = [11, 11, 12].map(|seed| run_seed(seed, 300));
        assert_eq!(first.violations, [""; 0]);
        assert_eq!((first.trace, first.polls, first.jobs), (again.trace, again.polls, again.jobs));
        assert_ne!(first.trace, other.trace);
        assert!(first.jobs > 0 && first.attempts > 0, "{first:?}");
    }

    /// In the end such a farm has nothing left, or the run fails.
    #[test]
    fn a_farm_that_keeps_things_for_minutes_removes_all_of_them() {
        let outcome = run_seed(13, 300);
        assert_eq!(outcome.violations, [""; 0]);
        let missing: Vec<&str> = GONE.into_iter().filter(|what| !outcome.seen.gone.contains_key(what)).collect();
        assert_eq!(missing, [""; 0]);
    }

    #[test]
    fn a_long_run_that_never_saw_a_fault_or_a_transition_fails() {
        let all = Seen {
            faults: Fault::ALL.iter().map(|fault| (*fault, 1)).collect(),
            steps: legal_steps().into_iter().map(|step| (step, 1)).collect(),
            gone: GONE.into_iter().map(|what| (what, 1)).collect(),
            ..Seen::default()
        };
        let sum = |seeds, seen: &Seen| Sum { seeds, seen: seen.clone(), ..Sum::default() };
        assert!(summary(&sum(SEEDS_FOR_ALL, &all), 1, 1));
        let (mut no_fault, mut no_step, mut no_end) = (all.clone(), all.clone(), all.clone());
        no_end.gone.remove("logs");
        no_fault.faults.remove(&Fault::Cut);
        no_step.steps.remove(&("running", "failed"));
        for lacking in [no_fault, no_step, no_end] {
            assert!(!summary(&sum(SEEDS_FOR_ALL, &lacking), 1, 1));
            assert!(summary(&sum(SEEDS_FOR_ALL - 1, &lacking), 1, 1), "a short look proves nothing");
        }
    }

    #[test]
    fn the_committed_seeds_can_be_read_and_options_too() {
        known();
        assert_eq!([replay(7, 2_000), replay(8, 500)], ["cargo sim --seed 7", "cargo sim --seed 8 --hours 0.5"]);
        let parse = |text: &str| Options::parse(text.split_whitespace().map(str::to_owned));
        let options = parse("--seeds 5 --seconds 0 --hours 0.5 --first 9").unwrap().unwrap();
        assert_eq!((options.seeds, options.seconds, options.hours_milli, options.first), (5, 0, 500, Some(9)));
        assert!(parse("--help").unwrap().is_none());
        assert!(parse("--seeds").is_err() && parse("--what").is_err());
    }
}
