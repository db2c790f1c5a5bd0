//! The invariants that can be seen from outside, one function each. Nothing here asks the farm anything.

use std::collections::{BTreeMap, BTreeSet};

use super::{Line, Seen, Vm};
use crate::noise;

/// A VM of an ended attempt is gone after this.
const GONE_MS: u64 = 60_000;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    pub invariant: &'static str,
    pub what: String,
}

/// What one job's history says, in the order of its lines.
#[derive(Default)]
struct Job<'a> {
    retries: u32,
    /// How it must end, if a test knows that.
    ends: Option<&'a str>,
    events: BTreeMap<&'a str, Vec<Event<'a>>>,
    ends_seen: Vec<End<'a>>,
    /// Who was told an end.
    told: BTreeSet<&'a str>,
    printed: BTreeMap<u32, u64>,
    planned: Option<u64>,
    stored: BTreeMap<u32, (u64, u64)>,
    logs: BTreeMap<&'a str, Vec<Piece>>,
    /// The line with which each follower of the feed began.
    began: BTreeMap<&'a str, usize>,
    /// What could be read of attempts, and at which line.
    readable: Vec<(usize, u32, u64)>,
    /// Whose raw log of an attempt came to its end.
    through: BTreeSet<(&'a str, u32)>,
    /// When the first observer saw that an attempt ended.
    over: BTreeMap<u32, u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Event<'a> {
    seq: u64,
    attempt: u32,
    kind: &'a str,
    state: &'a str,
    reason: Option<&'a str>,
}

#[derive(PartialEq, Eq, Debug)]
struct End<'a> {
    attempt: u32,
    state: &'a str,
    exit_code: Option<i64>,
    lost: u64,
    blame: Option<&'a str>,
}

struct Piece {
    attempt: u32,
    offset: u64,
    len: u64,
    sum: u64,
}

#[derive(Default)]
struct Book<'a> {
    jobs: BTreeMap<&'a str, Job<'a>>,
    /// Keys with the jobs that were named in answers to them.
    answers: BTreeMap<&'a str, BTreeSet<&'a str>>,
    listed: Option<BTreeSet<&'a str>>,
    running: Vec<(u64, &'a [Vm])>,
    last: u64,
}

/// Every invariant that this history breaks.
pub fn check(history: &[Line]) -> Vec<Violation> {
    let book = read(history);
    let mut found = Vec::new();
    let mut say = |invariant, what| found.push(Violation { invariant, what });
    accepted_jobs_are_there(&book, &mut say);
    for (name, job) in &book.jobs {
        let mut say = |invariant, what: String| say(invariant, format!("{name}: {what}"));
        attempts_end_once(job, &mut say);
        jobs_end_once(job, &mut say);
        attempts_are_numbered(job, &mut say);
        stored_logs_are_what_was_printed(name, job, &mut say);
        followers_read_the_stored_log(name, job, &mut say);
        nobody_is_charged_for_the_farm(job, &mut say);
        events_go_on_without_a_gap(job, &mut say);
    }
    artifacts_are_what_is_listed(history, &mut say);
    vms_are_few_and_used_once(&book, &mut say);
    one_attempt_lives(&book, &mut say);
    found
}

fn read(history: &[Line]) -> Book<'_> {
    let mut book = Book::default();
    for (index, Line { at, seen }) in history.iter().enumerate() {
        book.last = *at;
        match seen {
            Seen::Submit { key, .. } => drop(book.answers.entry(key).or_default()),
            Seen::Answer { key, job } => {
                let retries = history.iter().find_map(|line| match &line.seen {
                    Seen::Submit { key: asked, retries } if asked == key => Some(*retries),
                    _ => None,
                });
                if let Some(job) = job {
                    book.answers.entry(key).or_default().insert(job);
                    book.jobs.entry(job).or_default().retries = retries.unwrap_or(0);
                }
            }
            Seen::Job { job, retries, ends } => {
                let known = book.jobs.entry(job).or_default();
                (known.retries, known.ends) = (*retries, Some(ends.as_str()));
            }
            Seen::Event { who, job, seq, attempt, kind, state, reason } => {
                let job = book.jobs.entry(job).or_default();
                if matches!(kind.as_str(), "requeued" | "finished") {
                    job.over.entry(*attempt).or_insert(*at);
                }
                job.began.entry(who).or_insert(index);
                let event = Event { seq: *seq, attempt: *attempt, kind, state, reason: reason.as_deref() };
                job.events.entry(who).or_default().push(event);
            }
            Seen::Log { who, job, attempt, offset, len, sum } => {
                let pieces = book.jobs.entry(job).or_default().logs.entry(who).or_default();
                pieces.push(Piece { attempt: *attempt, offset: *offset, len: *len, sum: *sum });
            }
            Seen::End { who, job, attempt, state, exit_code, lost, blame } => {
                let job = book.jobs.entry(job).or_default();
                job.told.insert(who);
                let (exit_code, lost, blame) = (*exit_code, *lost, blame.as_deref());
                job.ends_seen.push(End { attempt: *attempt, state, exit_code, lost, blame });
            }
            Seen::Through { who, job, attempt } => {
                book.jobs.entry(job).or_default().through.insert((who, *attempt));
            }
            Seen::Printed { job, attempt, len } => {
                book.jobs.entry(job).or_default().printed.insert(*attempt, *len);
            }
            Seen::Planned { job, len } => book.jobs.entry(job).or_default().planned = Some(*len),
            Seen::Readable { job, attempt, len } => {
                book.jobs.entry(job).or_default().readable.push((index, *attempt, *len));
            }
            Seen::Stored { job, attempt, len, sum } => {
                book.jobs.entry(job).or_default().stored.insert(*attempt, (*len, *sum));
            }
            Seen::Running { vms } => book.running.push((*at, vms)),
            Seen::Listed { jobs } => book.listed = Some(jobs.iter().map(String::as_str).collect()),
            Seen::Artifact { .. } | Seen::Killed { .. } | Seen::Back { .. } => {}
        }
    }
    book
}

/// I1: what was accepted is there and has ended, and one key is one job.
fn accepted_jobs_are_there(book: &Book<'_>, say: &mut impl FnMut(&'static str, String)) {
    for (key, jobs) in &book.answers {
        if jobs.len() > 1 {
            say("I1", format!("the key {key} gave {jobs:?}"));
        }
    }
    for (name, job) in &book.jobs {
        if book.listed.as_ref().is_some_and(|listed| !listed.contains(name)) {
            say("I1", format!("{name} was accepted and is not there"));
        }
        match (job.ends_seen.last(), job.ends) {
            (None, _) => say("I1", format!("{name} was accepted and nobody saw it end")),
            (Some(end), Some(must)) if end.state != must => {
                say("I1", format!("{name} ended as {} and not as {must}", end.state));
            }
            (Some(_), _) => {}
        }
    }
}

/// The events of the observer who saw most.
fn story<'j, 'a>(job: &'j Job<'a>) -> &'j [Event<'a>] {
    job.events.values().max_by_key(|events| events.len()).map_or(&[], Vec::as_slice)
}

/// I2.
fn attempts_end_once(job: &Job<'_>, say: &mut impl FnMut(&'static str, String)) {
    let mut ended = BTreeSet::new();
    for event in story(job).iter().filter(|event| matches!(event.kind, "requeued" | "finished")) {
        if event.attempt > 0 && !ended.insert(event.attempt) {
            say("I2", format!("attempt {} ended twice", event.attempt));
        }
    }
}

/// I3: one end, by the newest attempt, and it never changes.
fn jobs_end_once(job: &Job<'_>, say: &mut impl FnMut(&'static str, String)) {
    let events = story(job);
    let ends: Vec<_> = events.iter().filter(|event| event.kind == "finished").collect();
    if ends.len() > 1 {
        say("I3", format!("it finished {} times", ends.len()));
    }
    let newest = events.iter().map(|event| event.attempt).max().unwrap_or(0);
    for end in &ends {
        let by_policy = matches!(end.state, "canceled" | "expired");
        if end.attempt != newest && !by_policy {
            say("I3", format!("attempt {} ended it, the newest is {newest}", end.attempt));
        }
    }
    if let Some((first, others)) = job.ends_seen.split_first()
        && let Some(other) = others.iter().find(|other| *other != first)
    {
        say("I3", format!("its end was {first:?}, then {other:?}"));
    }
}

/// I4: attempts are 1, 2, … and each begins after the one before has ended.
fn attempts_are_numbered(job: &Job<'_>, say: &mut impl FnMut(&'static str, String)) {
    let (mut begun, mut open) = (0, false);
    for event in story(job) {
        match event.kind {
            "assigned" => {
                if event.attempt != begun + 1 {
                    say("I4", format!("attempt {} follows {begun}", event.attempt));
                }
                if open {
                    say("I4", format!("attempt {} began before {begun} had ended", event.attempt));
                }
                (begun, open) = (event.attempt, true);
            }
            "requeued" | "finished" => open = false,
            _ if event.attempt > begun => {
                say("I4", format!("{} of attempt {} before it began", event.kind, event.attempt))
            }
            _ => {}
        }
    }
}

/// The attempt that told how the job ended.
fn newest(job: &Job<'_>) -> Option<u32> {
    job.ends_seen.last().map(|end| end.attempt).filter(|attempt| *attempt > 0)
}

/// I5: what is stored is what was printed, and all of it if the attempt told how it ended. How much that is nobody takes
/// from the farm.
fn stored_logs_are_what_was_printed(name: &str, job: &Job<'_>, say: &mut impl FnMut(&'static str, String)) {
    for (attempt, (len, sum)) in &job.stored {
        if noise::sum(&noise::range(noise::stream(name, *attempt), 0, *len)) != *sum {
            say("I5", format!("the stored log of attempt {attempt} is not what it printed"));
        }
        let told =
            job.ends_seen.iter().any(|end| end.attempt == *attempt && matches!(end.state, "succeeded" | "failed"));
        let printed = job.printed.get(attempt).copied();
        for right in printed.into_iter().chain(job.planned) {
            if *len > right || told && *len < right {
                say("I5", format!("attempt {attempt} printed {right} bytes, {len} are stored"));
            }
        }
        if told && printed.or(job.planned).is_none() {
            say("I5", format!("nobody knows how much attempt {attempt} printed"));
        }
    }
    if let Some(attempt) = newest(job).filter(|attempt| !job.stored.contains_key(attempt)) {
        say("I5", format!("nobody looked at the stored log of attempt {attempt}"));
    }
}

/// I6: each follower's bytes begin with the first one, join on and are right; who followed the feed is told the end, and has
/// all of the newest attempt then.
fn followers_read_the_stored_log(name: &str, job: &Job<'_>, say: &mut impl FnMut(&'static str, String)) {
    let mut got = BTreeMap::<(&str, u32), u64>::new();
    for (who, pieces) in &job.logs {
        let mut attempt = 0;
        for piece in pieces {
            if piece.attempt < attempt {
                say("I6", format!("{who} went back from attempt {attempt} to {}", piece.attempt));
            }
            attempt = piece.attempt;
            let at = got.entry((who, attempt)).or_default();
            if piece.offset != *at {
                say("I6", format!("{who} got byte {} of attempt {attempt} where {at} follows", piece.offset));
            }
            *at = piece.offset + piece.len;
            let right = noise::range(noise::stream(name, attempt), piece.offset, piece.len);
            if noise::sum(&right) != piece.sum {
                say("I6", format!("{who} got wrong bytes at {} of attempt {attempt}", piece.offset));
            }
        }
    }
    for (who, began) in &job.began {
        for (_, attempt, len) in job.readable.iter().filter(|(index, ..)| index < began) {
            let at = got.get(&(who, *attempt)).copied().unwrap_or(0);
            if job.told.contains(who) && at < *len {
                say("I6", format!("{who} came later and has {at} bytes of attempt {attempt}, {len} were there"));
            }
        }
    }
    for ((who, attempt), at) in &got {
        if let Some((len, _)) = job.stored.get(attempt).filter(|(len, _)| at > len) {
            say("I6", format!("{who} has {at} bytes of attempt {attempt}, {len} are stored"));
        }
    }
    let Some(newest) = newest(job) else { return };
    for who in job.events.keys().filter(|who| !job.told.contains(*who)) {
        say("I6", format!("{who} follows and was never told the end"));
    }
    let feeds = job.events.keys().copied();
    let raws = job.through.iter().filter(|(_, attempt)| *attempt == newest).map(|(who, _)| *who);
    for who in feeds.chain(raws) {
        let at = got.get(&(who, newest)).copied().unwrap_or(0);
        if let Some((len, _)) = job.stored.get(&newest).filter(|(len, _)| at < *len) {
            say("I6", format!("{who} saw the end with {at} bytes of attempt {newest}, {len} are stored"));
        }
    }
}

/// I7.
fn artifacts_are_what_is_listed(history: &[Line], say: &mut impl FnMut(&'static str, String)) {
    for line in history {
        let Seen::Artifact { job, path, size, sha256, got_size, got_sha256 } = &line.seen else { continue };
        let right = noise::sha256(noise::stream(path, 0), *size);
        if (size, sha256) != (got_size, got_sha256) || right != *got_sha256 {
            say(
                "I7",
                format!("{job}: {path} is listed with {size} bytes {sha256}, {got_size} bytes {got_sha256} came"),
            );
        }
    }
}

/// I8: a host runs no more VMs than it may, each for one attempt, and none long after the attempt's end.
fn vms_are_few_and_used_once(book: &Book<'_>, say: &mut impl FnMut(&'static str, String)) {
    let (mut used, mut late) = (BTreeMap::<(&str, &str), (&str, u32)>::new(), BTreeSet::new());
    for (index, (_, vms)) in book.running.iter().enumerate() {
        let mut hosts = BTreeMap::<&str, BTreeSet<&str>>::new();
        for vm in vms.iter().filter(|vm| book.jobs.contains_key(vm.job.as_str())) {
            // A process whose VM is dying above it has no name any more.
            if !vm.name.is_empty() {
                let here = hosts.entry(&vm.host).or_default();
                here.insert(&vm.name);
                if here.len() > vm.room {
                    say("I8", format!("{} runs {here:?} and may run {}", vm.host, vm.room));
                }
                let first = used.entry((&vm.host, &vm.name)).or_insert((&vm.job, vm.attempt));
                if *first != (vm.job.as_str(), vm.attempt) {
                    say("I8", format!("{} served {first:?}, then {}.{}", vm.name, vm.job, vm.attempt));
                }
            }
            // It was there until the next look, whatever else came and went since the attempt's end.
            let until = book.running.get(index + 1).map_or(book.last, |(next, _)| *next);
            let over = book.jobs[vm.job.as_str()].over.get(&vm.attempt);
            let is_late = over.is_some_and(|over| until.saturating_sub(*over) > GONE_MS);
            if is_late && late.insert((&vm.host, &vm.name, &vm.job, vm.attempt)) {
                say("I8", format!("{} ran on after the end of {}.{}", vm.name, vm.job, vm.attempt));
            }
        }
    }
}

/// I9.
fn one_attempt_lives(book: &Book<'_>, say: &mut impl FnMut(&'static str, String)) {
    for (at, vms) in &book.running {
        let mut live = BTreeMap::<&str, BTreeSet<u32>>::new();
        for vm in vms.iter().filter(|vm| book.jobs.contains_key(vm.job.as_str())) {
            live.entry(&vm.job).or_default().insert(vm.attempt);
        }
        for (job, attempts) in live.iter().filter(|(_, attempts)| attempts.len() > 1) {
            say("I9", format!("{job}: attempts {attempts:?} were alive at {at} ms"));
        }
    }
}

/// I10: a fault of the farm is tried again for nothing, a command's failure only as often as asked.
fn nobody_is_charged_for_the_farm(job: &Job<'_>, say: &mut impl FnMut(&'static str, String)) {
    let requeued: Vec<_> = story(job).iter().filter(|event| event.kind == "requeued").collect();
    let by_user = |event: &&&Event<'_>| {
        let users = ["script_failure", "hook_failure", "source_error", "artifact_missing", "artifact_changed"];
        event.reason.is_some_and(|reason| users.contains(&reason))
    };
    let failed = requeued.iter().filter(by_user).count();
    if failed as u64 > u64::from(job.retries) {
        say("I10", format!("it failed and was tried again {failed} times, {} were asked for", job.retries));
    }
    if let Some(end) = job.ends_seen.last() {
        let lost = (requeued.len() - failed) as u64;
        let ended_lost = u64::from(end.blame == Some("farm"));
        if !story(job).is_empty() && end.lost != lost && end.lost != lost + ended_lost {
            say("I10", format!("{lost} attempts were lost, {} are told", end.lost));
        }
        if end.blame == Some("farm") && end.state != "errored" {
            say("I10", format!("the farm's fault ended it as {}", end.state));
        }
    }
}

/// What may follow what: the state before, the event, the state after.
const LEGAL: &[(&str, &str, &[&str])] = &[
    ("", "submitted", &["queued", "assigned"]),
    ("queued", "assigned", &["assigned"]),
    ("assigned", "assigned", &["assigned"]),
    ("assigned", "accepted", &["running"]),
    ("running", "phase", &["running"]),
    ("canceling", "accepted", &["canceling"]),
    ("canceling", "phase", &["canceling"]),
    ("running", "artifact", &["running"]),
    ("canceling", "artifact", &["canceling"]),
    ("queued", "cancel_requested", &["canceled"]),
    ("assigned", "cancel_requested", &["canceling"]),
    ("running", "cancel_requested", &["canceling"]),
    ("canceling", "cancel_requested", &["canceling"]),
    ("assigned", "requeued", &["queued"]),
    ("running", "requeued", &["queued"]),
    ("canceling", "requeued", &["queued"]),
    ("queued", "finished", &["canceled", "expired", "errored"]),
    ("assigned", "finished", &["succeeded", "failed", "timed_out", "canceled", "errored"]),
    ("running", "finished", &["succeeded", "failed", "timed_out", "canceled", "errored"]),
    ("canceling", "finished", &["succeeded", "failed", "timed_out", "canceled", "errored"]),
];

/// I14: numbers from 1 on without a gap, the same event for everybody, and only what may follow.
fn events_go_on_without_a_gap(job: &Job<'_>, say: &mut impl FnMut(&'static str, String)) {
    let mut known = BTreeMap::<u64, Event<'_>>::new();
    for (who, events) in &job.events {
        for (expected, event) in (1..).zip(events) {
            if event.seq != expected {
                say("I14", format!("{who} got event {} where {expected} follows", event.seq));
                break;
            }
            let same = known.entry(event.seq).or_insert(*event);
            if same != event {
                say("I14", format!("event {} is {same:?}, for {who} it is {event:?}", event.seq));
            }
        }
    }
    let mut state = "";
    for event in story(job) {
        let legal =
            LEGAL.iter().any(|(from, kind, to)| *from == state && *kind == event.kind && to.contains(&event.state));
        if !legal {
            say("I14", format!("{} made `{state}` `{}`", event.kind, event.state));
        }
        state = event.state;
    }
}
