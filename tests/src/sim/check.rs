//! The invariants I1 to I14, checked where they could be broken: each commit, each command that starts, each frame that a
//! follower gets. Everything that is stored is looked at again every so many steps and at the end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use alloy_shared::id::{AttemptRef, JobId, WorkerId};
use alloy_shared::wire::job::{Blame, EventKind, StateWord};
use orchestrator::blobs;
use orchestrator::job::Step;
use orchestrator::logs;
use orchestrator::store::tidy::Tidy;
use orchestrator::store::write::{Advance, CloseAttempt, InsertJob};
use orchestrator::store::{Artifact, Attempt, BlobKind, Guard, Job, JobEventRow, Write};
use worker::provider::VmName;

use super::cover::{Cover, NEVER, legal_steps};
use super::exec::Sim;
use super::kept::KeptCheck;
use super::log_check::{LogCheck, check_log};
use super::plan::{self, Plan};

/// How long after its end an attempt's command may still run, whatever went wrong.
const GONE_MS: u64 = 60_000;

pub struct Check {
    sim: Sim,
    pub cover: Cover,
    state: Mutex<State>,
    legal: BTreeSet<(&'static str, &'static str)>,
    pub logs: LogCheck,
    pub blobs: blobs::Mem,
    pub kept: KeptCheck,
}

#[derive(Default)]
struct State {
    violations: Vec<String>,
    /// As the commits have them.
    jobs: BTreeMap<JobId, Job>,
    attempts: BTreeMap<AttemptRef, Attempt>,
    /// When each ended, by the world's clock: by its commit, and by the orchestrator's word.
    ended: BTreeMap<AttemptRef, u64>,
    dated: BTreeMap<AttemptRef, u64>,
    accepted: BTreeSet<JobId>,
    slots: BTreeMap<WorkerId, usize>,
    /// Keys that jobs were asked for with.
    asked: usize,
    plans: BTreeMap<JobId, Plan>,
    /// Commands that run.
    alive: BTreeMap<AttemptRef, VmName>,
    /// Attempts that ended by their worker's result: their logs are whole.
    reported: BTreeSet<AttemptRef>,
    /// Jobs that are no longer kept.
    pruned: BTreeSet<JobId>,
}

impl Check {
    pub fn new(sim: Sim, logs: logs::Mem, blobs: blobs::Mem, kept: KeptCheck) -> Self {
        let legal = legal_steps().into_iter().filter(|step| !NEVER.contains(step)).collect();
        Self { sim, cover: Cover::default(), state: Mutex::default(), legal, logs: LogCheck::new(logs), blobs, kept }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that an invariant is broken. The run ends with it.
    pub fn fail(&self, invariant: &str, what: impl Into<String>) {
        let at = self.sim.now();
        self.state().violations.push(format!("{invariant} at {at} ms: {}", what.into()));
    }

    pub fn is_clean(&self) -> bool {
        self.state().violations.is_empty()
    }

    pub fn violations(&self) -> Vec<String> {
        self.state().violations.clone()
    }

    // --- what is heard of --------------------------------------------------------------------------------------------

    pub fn planned(&self, job: JobId, plan: Plan) {
        self.state().plans.insert(job, plan);
    }

    pub fn plan_of(&self, at: &AttemptRef) -> Option<Plan> {
        self.state().plans.get(&at.job).copied()
    }

    /// A worker that has joined, and how many jobs it runs at once.
    pub fn joined(&self, worker: WorkerId, slots: usize) {
        self.state().slots.insert(worker, slots);
    }

    /// A job is asked for with a new key.
    pub fn asked(&self) {
        self.state().asked += 1;
    }

    /// I1: what was accepted is there.
    pub fn accepted(&self, job: JobId) {
        let known = self.state().jobs.contains_key(&job);
        self.state().accepted.insert(job);
        if !known {
            self.fail("I1", format!("{job} was accepted and is in no commit"));
        }
    }

    /// I9: no other attempt of the job has a live command. I8: an attempt runs in one VM.
    pub fn command_started(&self, at: AttemptRef, vm: &VmName, host: usize) {
        let other =
            self.state().alive.iter().find(|(other, _)| other.job == at.job).map(|(other, vm)| (*other, vm.clone()));
        if let Some((other, where_)) = other {
            self.fail("I9", format!("{at} starts on host {host} while {other} runs in {where_}"));
        }
        self.state().alive.insert(at, vm.clone());
    }

    pub fn command_ended(&self, at: &AttemptRef) {
        self.state().alive.remove(at);
    }

    pub fn vm_dead(&self, vm: &VmName) {
        self.state().alive.retain(|_, other| other != vm);
    }

    // --- commits -----------------------------------------------------------------------------------------------------

    /// A write that the store has made true, and the number that it gave back.
    pub fn committed(&self, write: &Write, number: i64) {
        match write {
            Write::InsertJob(insert) => self.inserted(insert),
            Write::Advance(advance) => self.advanced(advance),
            Write::CloseAttempt(close) => self.closed(close),
            Write::Tidy(tidy) => self.tidied(tidy, number),
            Write::Enrol(_)
            | Write::SetWorker(_)
            | Write::RevokeWorker { .. }
            | Write::OpenSession(_)
            | Write::Seen { .. }
            | Write::AddToken(_)
            | Write::RevokeToken { .. }
            | Write::SetImage(_)
            | Write::DropImage { .. }
            | Write::SetMember(_)
            | Write::DropMember { .. }
            | Write::AddBlobs(_)
            | Write::AddMeta { .. } => {}
        }
    }

    fn inserted(&self, insert: &InsertJob) {
        let job = &insert.job;
        if let Ok(plan) = job.spec.shell.as_deref().unwrap_or_default().parse() {
            self.planned(job.id, plan);
        }
        self.events(job, 0, &insert.events);
        self.attempt_row(None, job, insert.attempt.as_ref());
        if job.state.word() != StateWord::Queued {
            self.cover.step((StateWord::Queued, job.state.word()));
        }
        self.over(job);
        if self.state().jobs.insert(job.id, job.clone()).is_some() {
            self.fail("I4", format!("{} is inserted twice", job.id));
        }
    }

    fn advanced(&self, advance: &Advance) {
        let next = &advance.next;
        let Some(before) = self.state().jobs.get(&next.id).cloned() else {
            return self.fail("I1", format!("{} moves and was never inserted", next.id));
        };
        let (from, to) = (before.state.word(), next.state.word());
        self.transition(&before, next, advance);
        if from != to {
            self.cover.step((from, to));
        }
        self.events(next, before.events, &advance.events);
        self.attempt_row(Some(&before), next, advance.attempt.as_ref());
        self.charges(&before, next, advance.attempt.as_ref());
        advance.artifacts.iter().for_each(|artifact| self.listed(artifact));
        self.over(next);
        let moved = Job { version: next.version, state: next.state.clone(), events: next.events, ..before };
        self.state().jobs.insert(next.id, moved);
    }

    fn over(&self, job: &Job) {
        if let Step::Done { at, .. } = &job.state.step {
            self.kept.over(job.id, self.kept.dated(*at, self.sim.now()));
        }
    }

    /// I3, I14: what has ended stays so; no step that the table does not have; a worker's word counts for its attempt only.
    fn transition(&self, before: &Job, next: &Job, advance: &Advance) {
        let (from, to) = (before.state.word(), next.state.word());
        if before.state.is_done() {
            self.fail("I3", format!("{} moves from {from} to {to}", next.id));
        }
        if from != to && !self.legal.contains(&(from.as_str(), to.as_str())) {
            self.fail("I14", format!("{} moves from {from} to {to}, which no rule allows", next.id));
        }
        if next.version != before.version + 1 {
            self.fail("I3", format!("{}: version {} follows {}", next.id, next.version, before.version));
        }
        if let Guard::Fence { attempt, .. } = advance.guard
            && attempt != before.state.tries.made
        {
            self.fail("I3", format!("attempt {attempt} moves {}, which is at {}", next.id, before.state.tries.made));
        }
        if let Step::Done { end, .. } = &next.state.step {
            let reason = end.reason.map_or("none", |reason| reason.as_str());
            self.cover.end(format!("{} {reason}", end.outcome()));
        }
    }

    /// I14: numbers without a gap, and the last one tells the state.
    fn events(&self, job: &Job, before: u64, events: &[JobEventRow]) {
        for (event, seq) in events.iter().zip(before + 1..) {
            if event.seq != seq {
                self.fail("I14", format!("{}: event {} where {seq} was due", job.id, event.seq));
            }
        }
        if job.events != before + events.len() as u64 {
            self.fail("I14", format!("{}: {} events, {} were told", job.id, job.events, before + events.len() as u64));
        }
        if let Some(last) = events.last()
            && last.state != job.state.word()
        {
            self.fail("I14", format!("{} is {} and its last event says {}", job.id, job.state.word(), last.state));
        }
        let ends = events.iter().filter(|event| event.kind == EventKind::Finished).count();
        if job.state.is_done() != (ends == 1) {
            self.fail("I14", format!("{} is {} with {ends} events of its end", job.id, job.state.word()));
        }
    }

    /// I2, I4: an attempt ends once; numbers go up by one, and the next begins when the last has ended.
    fn attempt_row(&self, before: Option<&Job>, next: &Job, row: Option<&Attempt>) {
        let made = before.map_or(0, |job| job.state.tries.made);
        let now = next.state.tries.made;
        if now > made {
            if now != made + 1 || row.is_none_or(|row| row.at.attempt != now) {
                self.fail("I4", format!("{}: attempt {now} follows {made}", next.id));
            }
            let first = AttemptRef { job: next.id, attempt: 0 };
            let last = AttemptRef { attempt: u32::MAX, ..first };
            let open =
                self.state().attempts.range(first..=last).find(|(_, row)| row.ended_at.is_none()).map(|(at, _)| *at);
            if let Some(open) = open {
                self.fail("I4", format!("{open} is open while attempt {now} begins"));
            }
        }
        let Some(row) = row else { return };
        let known = self.state().attempts.get(&row.at).cloned();
        if let Some(known) = &known
            && known.ended_at.is_some()
            && (known.ended_at, &known.end) != (row.ended_at, &row.end)
        {
            self.fail("I2", format!("{} ends a second time", row.at));
        }
        if known.as_ref().is_some_and(|known| row.seq < known.seq) {
            self.fail("I2", format!("{}: report {} after a later one", row.at, row.seq));
        }
        if row.ended_at.is_some() && known.as_ref().is_none_or(|known| known.ended_at.is_none()) {
            if known.is_some_and(|known| row.seq > known.seq) {
                self.state().reported.insert(row.at);
            }
            self.ended(row);
        }
        self.state().attempts.insert(row.at, row.clone());
    }

    /// I5, I12: an attempt whose command came to its own end has its whole log on the disk.
    fn ended(&self, row: &Attempt) {
        let now = self.sim.now();
        self.state().ended.insert(row.at, now);
        if let Some(at) = row.ended_at {
            let dated = self.kept.dated(at, now);
            self.state().dated.insert(row.at, dated);
        }
        let own = row
            .end
            .as_ref()
            .is_some_and(|end| end.exit_code.is_some() && end.reason.is_none_or(|r| r.blame() == Blame::User));
        let Some(plan) = self.plan_of(&row.at).filter(|_| own) else { return };
        let (durable, log) = (self.logs.durable(&row.at), self.logs.read(&row.at, 0));
        match check_log(&row.at, &log) {
            Ok(stands_for) if stands_for < plan.log => {
                self.fail("I5", format!("{} ended with a log of {stands_for} bytes; it wrote {}", row.at, plan.log));
            }
            Err(why) => self.fail("I5", format!("{}: {why}", row.at)),
            Ok(_) if durable < log.len() as u64 => {
                self.fail("I12", format!("{} ended and only {durable} bytes of its log are durable", row.at));
            }
            Ok(_) => {}
        }
    }

    /// I10: only a command's own failure is charged to its retries, and it is tried again only if that was asked for.
    fn charges(&self, before: &Job, next: &Job, row: Option<&Attempt>) {
        let (was, is) = (before.state.tries, next.state.tries);
        let blame = row.and_then(|row| row.end.as_ref()).and_then(|end| end.blame());
        let requeued = matches!(next.state.step, Step::Queued { .. });
        if is.failed > was.failed && (blame != Some(Blame::User) || is.failed > next.spec.retries) {
            self.fail("I10", format!("{}: charged for an end by {blame:?}; {} retries", next.id, next.spec.retries));
        }
        if requeued && blame == Some(Blame::User) && is.failed == was.failed {
            self.fail("I10", format!("{}: a failure of the command is tried again uncharged", next.id));
        }
        if requeued && matches!(blame, None | Some(Blame::Policy)) {
            self.fail("I10", format!("{}: tried again after {blame:?}", next.id));
        }
    }

    /// I7: a listed artifact is there, with these bytes.
    fn listed(&self, artifact: &Artifact) {
        self.kept.listed(artifact);
        let object = self.kept.alone(artifact.org, BlobKind::Artifact, &artifact.sha256);
        let whole = object.as_ref().is_some_and(|bytes| {
            bytes.len() as u64 == artifact.size && alloy_shared::id::Digest::of(bytes) == artifact.sha256
        });
        let number = (0..8).find(|number| plan::file_name(*number) == artifact.path);
        let true_bytes = number.is_some_and(|number| plan::file_digest(&artifact.at, number) == artifact.sha256);
        if !whole || !true_bytes {
            self.fail("I7", format!("{} of {}: stored {whole}, as written {true_bytes}", artifact.path, artifact.at));
        }
    }

    /// I5, I7: what is old may go, and nothing else.
    fn tidied(&self, tidy: &Tidy, number: i64) {
        let (keep, now) = (self.kept.keep, self.sim.now());
        let may = match tidy {
            Tidy::DropLog(fade) | Tidy::DropFiles(fade) => {
                let is_log = matches!(tidy, Tidy::DropLog(_));
                let (what, span_ms) = if is_log { ("logs", keep.logs_ms) } else { ("artifacts", keep.artifacts_ms) };
                let ended = self.state().dated.get(&fade.attempt).copied();
                self.cover.gone(what);
                self.no_longer(&fade.attempt, is_log, !is_log);
                self.kept.may_go(&fade.attempt.job, ended, span_ms, now)
            }
            Tidy::Prune { job, .. } => {
                self.cover.gone("jobs");
                let (first, last) = (AttemptRef { job: *job, attempt: 0 }, AttemptRef { job: *job, attempt: u32::MAX });
                let attempts: Vec<AttemptRef> = self.state().attempts.range(first..=last).map(|(at, _)| *at).collect();
                attempts.iter().for_each(|at| self.no_longer(at, true, true));
                self.state().pruned.insert(*job);
                self.kept.may_go(job, None, keep.jobs_ms, now)
            }
            Tidy::DropBlobs { .. } if number > 0 => {
                self.cover.gone("blobs");
                Ok(())
            }
            Tidy::Burnt { .. } => {
                self.cover.gone("objects");
                Ok(())
            }
            Tidy::Adopt { .. }
            | Tidy::Use { .. }
            | Tidy::DropBlobs { .. }
            | Tidy::Trash { .. }
            | Tidy::TakeTrash { .. }
            | Tidy::Forget { .. }
            | Tidy::SetRetention(_) => Ok(()),
        };
        may.unwrap_or_else(|why| self.fail("I5", why));
    }

    fn no_longer(&self, at: &AttemptRef, log: bool, files: bool) {
        if log {
            self.logs.gone(at);
        }
        if files {
            self.kept.unlisted(at);
        }
    }

    /// True once a job is no longer kept.
    pub fn is_pruned(&self, job: JobId) -> bool {
        self.state().pruned.contains(&job)
    }

    fn closed(&self, close: &CloseAttempt) {
        let known = self.state().attempts.get(&close.at).cloned();
        if known.is_none_or(|row| row.worker != close.worker) {
            self.fail("I2", format!("{} is closed by a worker that never had it", close.at));
        }
    }

    // --- everything --------------------------------------------------------------------------------------------------

    /// I5, I7: what live jobs need and what is listed has not been removed.
    pub fn all_there(&self) {
        let live: Vec<Job> = self.state().jobs.values().filter(|job| !job.state.is_done()).cloned().collect();
        self.kept.all_there(&live).unwrap_or_else(|why| self.fail("I7", why));
    }

    /// What has not gone of all that the farm ever had.
    pub fn left(&self) -> Vec<String> {
        let logs = self.logs.left();
        self.kept.left().into_iter().chain(logs.iter().map(|at| format!("the log of {at}"))).collect()
    }

    /// I5, I8, I9 over all that there is. `calm`: no fault is under way.
    pub fn full(&self, claimed: &[(usize, Vec<AttemptRef>)], running: &[usize]) {
        if let Some((host, count)) = running.iter().enumerate().find(|(_, count)| **count > 2) {
            self.fail("I8", format!("host {host} runs {count} VMs"));
        }
        let attempts: Vec<AttemptRef> = self.state().attempts.keys().copied().collect();
        for at in attempts {
            self.logs.look(&at).unwrap_or_else(|why| self.fail("I5", why));
        }
        let now = self.sim.now();
        let late: Vec<AttemptRef> = {
            let state = self.state();
            let over = |at: &&AttemptRef| state.ended.get(*at).is_some_and(|ended| now > ended + GONE_MS);
            state.alive.keys().filter(over).copied().collect()
        };
        for at in late {
            self.fail("I8", format!("{at} ended {GONE_MS} ms ago and its command still runs"));
        }
        let mut seen = BTreeSet::new();
        for (host, attempts) in claimed {
            for at in attempts {
                if !seen.insert(*at) {
                    self.fail("I8", format!("{at} has a second VM, on host {host}"));
                }
            }
        }
    }

    /// I6, for one that got the end of a feed.
    pub fn followed(&self, at: &AttemptRef, got: &[u8]) {
        let whole = self.state().reported.contains(at);
        self.logs.followed(at, got, whole).unwrap_or_else(|why| self.fail("I6", why));
    }

    /// How a job ended, and in which attempt; nothing while it has not.
    pub fn end_of(&self, job: JobId) -> Option<(StateWord, u32)> {
        let state = self.state();
        let job = state.jobs.get(&job).filter(|job| job.state.is_done())?;
        Some((job.state.word(), job.state.tries.made))
    }

    /// I8: no worker has more jobs than slots. While things go wrong one that has ended may still stand in the books.
    pub fn rooms(&self) {
        for (worker, jobs, slots) in self.leased() {
            if jobs > slots {
                self.fail("I8", format!("{worker} has {jobs} jobs and {slots} slots"));
            }
        }
    }

    /// True if every slot has a job.
    pub fn is_full(&self) -> bool {
        self.leased().iter().all(|(_, jobs, slots)| jobs == slots)
    }

    /// The workers with the jobs that they have by the books, and their slots.
    fn leased(&self) -> Vec<(WorkerId, usize, usize)> {
        let state = self.state();
        let leases = |worker: &WorkerId| {
            let has = |job: &&Job| job.state.lease().is_some_and(|lease| lease.worker == *worker);
            state.jobs.values().filter(has).count()
        };
        state.slots.iter().map(|(worker, slots)| (*worker, leases(worker), *slots)).collect()
    }

    /// True while a command of the job runs.
    pub fn is_alive(&self, job: JobId) -> bool {
        self.state().alive.keys().any(|at| at.job == job)
    }

    /// Jobs that have not ended.
    pub fn open(&self) -> Vec<JobId> {
        let state = self.state();
        state.jobs.values().filter(|job| !job.state.is_done()).map(|job| job.id).collect()
    }

    pub fn counts(&self) -> (usize, usize) {
        let state = self.state();
        (state.jobs.len(), state.attempts.len())
    }

    /// I1, I4, I5, I6, I11 at the end: every accepted job has ended, none is there that nobody asked for, and all logs are
    /// whole.
    pub fn at_the_end(&self) {
        let attempts: Vec<AttemptRef> = self.state().attempts.keys().copied().collect();
        for at in attempts {
            self.logs.look_at_all(&at).unwrap_or_else(|why| self.fail("I5", why));
        }
        let reported = self.state().reported.clone();
        self.logs.at_the_end(&reported).unwrap_or_else(|why| self.fail("end", why));
        let asked = self.state().asked;
        let jobs = self.counts().0;
        if jobs > asked {
            self.fail("I4", format!("{asked} jobs were asked for, and {jobs} are there"));
        }
        let lost: Vec<String> = {
            let state = self.state();
            let open = |id: &&JobId| state.jobs.get(*id).is_none_or(|job| !job.state.is_done());
            let tell = |id: &JobId| format!("{id} {:?}", state.jobs.get(id).map(|job| job.state.clone()));
            state.accepted.iter().filter(open).map(tell).collect()
        };
        if !lost.is_empty() {
            self.fail("I11", format!("the faults are over and these have not ended: {lost:?}"));
        }
        let alive: Vec<AttemptRef> = self.state().alive.keys().copied().collect();
        if !alive.is_empty() {
            self.fail("I11", format!("every job has ended and these commands run: {alive:?}"));
        }
    }
}
