//! P: one attempt from its assignment to the free slot, straight down: vm, source, exec, collect, report, teardown.
//!
//! Every stage is measured by its own clock. The first thing that goes wrong decides how the attempt ends; an attempt
//! that is fenced says nothing more, because it is not ours any more.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use alloy_shared::env::{Env, Mono, Ms, backoff, span};
use alloy_shared::id::{AttemptRef, Digest};
use alloy_shared::limits;
use alloy_shared::wire::job::{Blame, End, Phase, Reason, Timings};
use alloy_shared::wire::session::{Assignment, Report, ResultReport, fact};
use futures_util::FutureExt;
use tokio::sync::mpsc;

use crate::artifacts::{self, CollectError, Missed};
use crate::ctx::Ctx;
use crate::job_env::{Place, job_env};
use crate::provider::{Command, Exec, ExecInput, ExecOutput, Exit, NetworkPolicy, Run, Signal, VmError, VmFault};
use crate::session::{Input, KillReason, Stop};
use crate::sources::SourceError;
use crate::spool::Cut;
use crate::upstream::{Grant, TransferError};
use crate::vm_pool::Claimed;

mod hook;

/// Between two tries to fetch sources.
const STAGE_PAUSE_MS: u64 = 500;
const STAGE_PAUSE_CAP_MS: u64 = 10_000;
/// Between two looks whether the log of a held command has room again.
const PRESSURE_LOOK_MS: u64 = 100;

/// Why an attempt goes no further.
#[derive(Debug)]
enum Ended {
    End(End),
    /// Nothing is to be said about it.
    Silent,
}

struct Attempt {
    ctx: Arc<Ctx>,
    at: AttemptRef,
    assignment: Assignment,
    stop: mpsc::Receiver<Stop>,
    grant: Grant,
    timings: Timings,
    claimed: Option<Claimed>,
    /// What its hook is told of a VM that it has no more.
    left: Option<BTreeMap<String, String>>,
    /// How the command ended, once it has.
    end: Option<End>,
    /// How the attempt ended, once it has. Absent to its end if nothing is to be said about it.
    told: Option<End>,
    /// Artifacts that were reported.
    artifacts: AtomicU32,
}

/// Runs one attempt to its end. It reports by `ctx.inputs` only, and says `Closed` last, whatever happens.
pub async fn run_attempt(ctx: Arc<Ctx>, assignment: Assignment, stop: mpsc::Receiver<Stop>) {
    let at = assignment.attempt;
    let teardown_ms = match AssertUnwindSafe(run(Arc::clone(&ctx), assignment, stop)).catch_unwind().await {
        Ok(teardown_ms) => teardown_ms,
        Err(_panic) => {
            // Unwinding gave the VM back. The session makes a result for an attempt that closes without one.
            tracing::error!(attempt = %at, "the executor panicked");
            0
        }
    };
    let _session_is_gone = ctx.inputs.send(Input::Closed { attempt: at, teardown_ms }).await;
}

async fn run(ctx: Arc<Ctx>, assignment: Assignment, stop: mpsc::Receiver<Stop>) -> u64 {
    let at = assignment.attempt;
    let grant = Grant { attempt: at, token: assignment.grant.clone() };
    let mut attempt = Attempt {
        ctx,
        at,
        assignment,
        stop,
        grant,
        timings: Timings::default(),
        claimed: None,
        left: None,
        end: None,
        told: None,
        artifacts: AtomicU32::new(0),
    };
    let ended = attempt.stages().await;
    attempt.report(ended).await;
    attempt.teardown().await
}

impl Attempt {
    async fn stages(&mut self) -> Result<(), Ended> {
        self.enter(Phase::Preparing, None).await?;
        self.vm().await?;
        self.source().await?;
        let vm = self.timings.vm.as_ref().map(|vm| vm.sentence(self.timings.vm_ms));
        self.enter(Phase::Executing, vm).await?;
        self.exec().await?;
        self.enter(Phase::Collecting, None).await?;
        self.collect().await
    }

    async fn vm(&mut self) -> Result<(), Ended> {
        let (ctx, start) = (Arc::clone(&self.ctx), self.mono());
        let image = self.assignment.spec.image.clone();
        let network = NetworkPolicy::from(&self.assignment.spec.network);
        let claim = ctx.pool.claim(self.at, image.as_deref(), network);
        let claimed = or_stop(&mut self.stop, claim).await;
        let ready = match claimed {
            Ok(Ok(claimed)) => {
                self.timings.vm = claimed.stages.map(Box::new);
                self.claimed = Some(claimed);
                self.pre_job().await
            }
            Ok(Err(error)) => Err(vm_ended(&error)),
            Err(ended) => Err(ended),
        };
        self.timings.vm_ms = Some(self.mono().since(start));
        ready
    }

    async fn source(&mut self) -> Result<(), Ended> {
        let (Some(source), Some(claimed)) = (self.assignment.source, &self.claimed) else { return Ok(()) };
        let (ctx, start) = (Arc::clone(&self.ctx), self.mono());
        let now = ctx.env.now();
        let deadline = now.mono + ctx.limits.stage_source_ms;
        let mut broke_off = None;
        let stage = async {
            let tar = staged(&ctx, source, &claimed.inbox, &self.grant, now.wall, &mut broke_off).await;
            claimed.guest.unpack(tar.map_err(|error| source_ended(&error))?, "").await.map_err(|error| vm_ended(&error))
        };
        let staged = or_stop(&mut self.stop, by(&ctx.env, deadline, stage)).await;
        self.timings.source_ms = Some(self.mono().since(start));
        let why = broke_off.map(|error| format!(": {error}")).unwrap_or_default();
        staged?.unwrap_or_else(|_late| Err(internal(&format!("sources were not staged in time{why}"))))
    }

    async fn exec(&mut self) -> Result<(), Ended> {
        let start = self.mono();
        let done = self.run_command(start).await;
        self.timings.exec_ms = Some(self.mono().since(start));
        self.end = Some(done?);
        Ok(())
    }

    async fn run_command(&mut self, start: Mono) -> Result<End, Ended> {
        let Some(claimed) = &self.claimed else { return Err(internal("there is no VM")) };
        let command = self.command(claimed);
        let mut exec = claimed.guest.exec(&command).await.map_err(|error| vm_ended(&error))?;
        let mut stopping: Option<Stopping> = None;
        let mut wake = start + self.assignment.timeout_ms;
        let mut pressure = Pressure::default();
        loop {
            let (now, limits) = (self.mono(), &self.ctx.limits);
            let tight = || self.ctx.spool.is_tight();
            // Once it is to go, what it prints is taken, for its end comes behind that.
            let held = stopping.is_none() && pressure.holds(now, limits.log_pressure_ms, tight);
            tokio::select! {
                biased;
                stop = next_stop(&mut self.stop) => match (stop, &stopping) {
                    (Stop::Kill(KillReason::Shutdown), _) => return Err(Ended::End(drained())),
                    // Dropping the command kills it.
                    (Stop::Kill(KillReason::Fenced | KillReason::LeaseLost), _) => return Err(Ended::Silent),
                    (Stop::Cancel { grace_ms }, None) => {
                        wake = self.ctx.env.now().mono + grace_ms;
                        stopping = Some(Stopping::begin(&exec, End::because(Reason::UserCanceled, "canceled")).await);
                    }
                    // The grace that runs is the one that counts.
                    (Stop::Cancel { .. }, Some(_)) => {}
                },
                // Before the output: a command that never pauses must not outrun its own end.
                () = self.ctx.env.sleep_until(wake) => match &mut stopping {
                    None => {
                        wake = self.ctx.env.now().mono + self.assignment.cancel_grace_ms;
                        let most = span(self.assignment.timeout_ms);
                        let end = End::because(Reason::RunTimeout, format!("the command ran longer than {most}"));
                        stopping = Some(Stopping::begin(&exec, end).await);
                    }
                    Some(stopping) if stopping.killed => {
                        let error = VmError::farm(VmFault::Lost, "the command could not be killed");
                        return Err(lost(&error, Some(stopping)));
                    }
                    Some(stopping) => {
                        wake = self.ctx.env.now().mono + self.ctx.limits.kill_budget_ms;
                        stopping.kill(&exec).await;
                    }
                },
                () = self.ctx.env.sleep_until(now + PRESSURE_LOOK_MS), if held => {
                    self.ctx.spool.make_room(self.at).await.map_err(|error| spool_ended(&error))?;
                }
                output = exec.output.recv(), if !held => match output {
                    Some(ExecOutput::Bytes(bytes)) => {
                        let len = self.ctx.spool.append(self.at, bytes).await.map_err(|error| spool_ended(&error))?;
                        self.tell(Input::Spooled { attempt: self.at, len }).await?;
                    }
                    Some(ExecOutput::Exit(exit)) => return Ok(ended_by(exit, stopping)),
                    Some(ExecOutput::Lost(error)) => return Err(lost(&error, stopping.as_ref())),
                    None => {
                        let error = VmError::farm(VmFault::Lost, "the command's channel closed");
                        return Err(lost(&error, stopping.as_ref()));
                    }
                },
            }
        }
    }

    fn command(&self, claimed: &Claimed) -> Command {
        let (spec, now) = (&self.assignment.spec, self.ctx.env.now());
        let digest = claimed.digest.to_string();
        let place = Place {
            worker: &self.ctx.worker_name,
            image: &claimed.image.0,
            image_digest: &digest,
            vm_source: claimed.vm_source(),
        };
        let deadline = now.wall.plus(self.assignment.timeout_ms);
        let env = job_env(&self.assignment, &place, claimed.guest.workspace(), deadline);
        let run = match &spec.shell {
            Some(line) => Run::Shell(line.clone()),
            None => Run::Argv(spec.argv.clone()),
        };
        Command { run, env, workdir: String::new() }
    }

    /// Collects whatever way the command ended. What goes wrong here counts only if the command itself went well.
    async fn collect(&mut self) -> Result<(), Ended> {
        let (ctx, start) = (Arc::clone(&self.ctx), self.mono());
        let Some(claimed) = &self.claimed else { return Ok(()) };
        let deadline = start + ctx.limits.collect_ms;
        let canceled = self.end.as_ref().is_some_and(|end| end.reason == Some(Reason::UserCanceled));
        let work = async {
            let rules = artifacts::parse(&self.assignment.spec.artifacts);
            let rules = rules.map_err(|error| user(Reason::ArtifactMissing, &error))?;
            let collected = artifacts::collect(&ctx, &claimed.guest, &rules, &self.grant, &self.artifacts).await;
            collected.map_err(collect_ended)
        };
        let collected = or_stop_again(&mut self.stop, canceled, by(&ctx.env, deadline, work)).await;
        self.timings.collect_ms = Some(self.mono().since(start));
        let late = |_late| Err(internal("artifacts were not delivered in time"));
        let verdict = match collected?.unwrap_or_else(late) {
            Ok(Missed { must, warnings }) => {
                if let Some(end) = &mut self.end {
                    end.warnings = warnings;
                }
                match must.is_empty() {
                    true => Ok(()),
                    false => Err(user(Reason::ArtifactMissing, &format!("no file matches {}", must.join(", ")))),
                }
            }
            Err(ended) => Err(ended),
        };
        match (verdict, &mut self.end) {
            (Err(Ended::End(worse)), Some(end)) if end.reason.is_none() => {
                *end = End { exit_code: end.exit_code, warnings: std::mem::take(&mut end.warnings), ..worse };
                Ok(())
            }
            (Err(Ended::End(also)), Some(end)) => {
                end.message = format!("{}; {}", end.message, also.message);
                Ok(())
            }
            (verdict, _) => verdict,
        }
    }

    /// Says how it ended, after the last byte of the log is on disk.
    async fn report(&mut self, ended: Result<(), Ended>) {
        let end = match (ended, self.end.take()) {
            (Err(Ended::Silent), _) => return,
            (Err(Ended::End(end)), _) | (Ok(()), Some(end)) => end,
            (Ok(()), None) => End::because(Reason::InternalError, "the command has no end"),
        };
        self.told = Some(end.clone());
        let (log_len, end) = match self.ctx.spool.seal_log(self.at).await {
            Ok(log_len) => (log_len, end),
            Err(error) => {
                tracing::error!(attempt = %self.at, %error, "the log cannot be completed");
                match (self.ctx.spool.sync(self.at).await, spool_ended(&error)) {
                    (Ok(log_len), Ended::End(end)) => (log_len, end),
                    // Without a readable spool nothing can be promised: the session reports for us.
                    (Err(_), _) | (Ok(_), Ended::Silent) => return,
                }
            }
        };
        let mut end = end;
        match self.ctx.spool.cut(self.at) {
            Ok(cut) => end.warnings.extend(cut.map(cut_warning)),
            Err(error) => tracing::warn!(attempt = %self.at, %error, "whether the log was cut is not known"),
        }
        let facts = self.facts();
        if may_begin_anew(&end, self.assignment.spec.retries) {
            // Elsewhere, as soon as this is told: nothing of it runs here by then.
            self.release().await;
        }
        let report = Report::Result(Box::new(ResultReport {
            end,
            timings: self.timings.clone(),
            log_len,
            artifacts: self.artifacts.load(Ordering::Relaxed),
            facts,
        }));
        let _session_is_gone = self.tell(Input::Report { attempt: self.at, report }).await;
    }

    async fn teardown(mut self) -> u64 {
        let start = self.mono();
        self.give_back().await;
        self.mono().since(start)
    }

    async fn enter(&mut self, phase: Phase, message: Option<String>) -> Result<(), Ended> {
        let report = Report::Phase { phase, timings: self.timings.clone(), message, facts: self.facts() };
        self.tell(Input::Report { attempt: self.at, report }).await
    }

    /// What the job's record keeps of the VM.
    fn facts(&self) -> BTreeMap<String, String> {
        let Some(claimed) = &self.claimed else { return BTreeMap::new() };
        let mut facts = vec![
            (fact::IMAGE.to_owned(), claimed.image.0.clone()),
            (fact::IMAGE_DIGEST.to_owned(), format!("sha256:{}", claimed.digest)),
        ];
        facts.extend(claimed.vm_source().map(|source| (fact::VM_SOURCE.to_owned(), source.to_owned())));
        facts.into_iter().collect()
    }

    /// A session that is gone means that the daemon is stopping hard: there is nobody to report to.
    async fn tell(&self, input: Input) -> Result<(), Ended> {
        self.ctx.inputs.send(input).await.map_err(|_| Ended::Silent)
    }

    fn mono(&self) -> Mono {
        self.ctx.env.now().mono
    }
}

/// Holds a command back whose log has no room: what it prints stays in its pipe.
#[derive(Debug, Default)]
struct Pressure {
    until: Option<Mono>,
    spent: bool,
}

impl Pressure {
    /// Whether to wait. Once the time is used up, the log goes on without its middle.
    fn holds(&mut self, now: Mono, patience_ms: u64, is_tight: impl Fn() -> bool) -> bool {
        if self.spent || !is_tight() {
            self.until = None;
            return false;
        }
        self.spent = now >= *self.until.get_or_insert(now + patience_ms);
        !self.spent
    }
}

/// A command that was told to go, and how its attempt will end.
struct Stopping {
    end: End,
    killed: bool,
}

impl Stopping {
    async fn begin(exec: &Exec, end: End) -> Self {
        // A closed input: the command has just ended, and its output says so.
        let _ended = exec.input.send(ExecInput::Signal(Signal::Term)).await;
        Self { end, killed: false }
    }

    async fn kill(&mut self, exec: &Exec) {
        let _ended = exec.input.send(ExecInput::Signal(Signal::Kill)).await;
        self.killed = true;
    }
}

/// How an attempt ends whose command does not. One that was told to go ends as it was to: another try would only come to that
/// again, and the VM goes in any case.
fn lost(error: &VmError, stopping: Option<&Stopping>) -> Ended {
    match stopping {
        // Without a lease it is not ours to say.
        Some(Stopping { end, .. }) if error.what != VmFault::Fenced => {
            Ended::End(End { message: format!("{}; {error}", end.message), ..end.clone() })
        }
        Some(_) | None => vm_ended(error),
    }
}

fn ended_by(exit: Exit, stopping: Option<Stopping>) -> End {
    let (exit_code, signal) = match exit {
        Exit::Code(code) => (Some(code), None),
        Exit::Signal(signal) => (None, Some(signal)),
    };
    match (stopping, exit) {
        (Some(stopping), _) => End { exit_code, signal, ..stopping.end },
        (None, Exit::Code(0)) => End::success(),
        (None, Exit::Code(code)) => {
            End { exit_code, signal, ..End::because(Reason::ScriptFailure, format!("the command exited with {code}")) }
        }
        (None, Exit::Signal(number)) => {
            let message = format!("the command was ended by signal {number}");
            End { exit_code, signal, ..End::because(Reason::ScriptFailure, message) }
        }
    }
}

async fn next_stop(stop: &mut mpsc::Receiver<Stop>) -> Stop {
    match stop.recv().await {
        Some(stop) => stop,
        // Nobody can stop it any more; its lease still can, by the guard.
        None => std::future::pending().await,
    }
}

/// Waits for the work unless it is told to stop.
async fn or_stop<T>(stop: &mut mpsc::Receiver<Stop>, work: impl Future<Output = T>) -> Result<T, Ended> {
    or_stop_again(stop, false, work).await
}

/// Like [`or_stop`], for an attempt that may have been canceled already.
async fn or_stop_again<T>(
    stop: &mut mpsc::Receiver<Stop>,
    canceled: bool,
    work: impl Future<Output = T>,
) -> Result<T, Ended> {
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            biased;
            stop = next_stop(stop) => match stop {
                Stop::Cancel { .. } if canceled => {}
                Stop::Cancel { .. } => return Err(Ended::End(End::because(Reason::UserCanceled, "canceled"))),
                Stop::Kill(KillReason::Shutdown) => return Err(Ended::End(drained())),
                Stop::Kill(KillReason::Fenced | KillReason::LeaseLost) => return Err(Ended::Silent),
            },
            done = &mut work => return Ok(done),
        }
    }
}

/// Stages a source. A transfer that breaks off is taken up again where it stopped, for as long as the caller waits: the
/// farm may be restarting. The newest of them is told in `broke_off`.
async fn staged(
    ctx: &Ctx,
    source: Digest,
    inbox: &Path,
    grant: &Grant,
    now: Ms,
    broke_off: &mut Option<TransferError>,
) -> Result<&'static str, SourceError> {
    let hold = ctx.sources.hold(source);
    let mut tries = 0;
    let staged = loop {
        match ctx.sources.stage(&hold, inbox, ctx.upstream.as_ref(), grant, now).await {
            Err(SourceError::Transfer(error @ TransferError::Broken(_))) => {
                let pause_ms = backoff(tries, STAGE_PAUSE_MS, STAGE_PAUSE_CAP_MS, ctx.env.dice());
                tracing::warn!(attempt = %grant.attempt, %error, "sources did not come; trying again");
                tries = tries.saturating_add(1);
                *broke_off = Some(error);
                ctx.env.sleep_until(ctx.env.now().mono + pause_ms).await;
            }
            done => break done,
        }
    };
    ctx.sources.let_go(hold).await;
    staged
}

struct Late;

async fn by<T>(env: &Arc<dyn Env>, deadline: Mono, work: impl Future<Output = T>) -> Result<T, Late> {
    tokio::select! {
        biased;
        done = work => Ok(done),
        () = env.sleep_until(deadline) => Err(Late),
    }
}

/// Whether the farm may begin the job anew when it hears this end.
fn may_begin_anew(end: &End, retries: u32) -> bool {
    match end.blame() {
        Some(Blame::Farm) => true,
        Some(Blame::User) => retries > 0,
        // A worker that accepted too late is told to cancel as well.
        Some(Blame::Policy) => end.reason == Some(Reason::UserCanceled),
        None => false,
    }
}

fn cut_warning(cut: Cut) -> String {
    let why = match cut.disk_full {
        true => "the worker's disk was full while the job wrote its log".to_owned(),
        false => format!("the log is longer than {} GiB", limits::LOG_CAP >> 30),
    };
    format!("{why}; {} bytes in its middle were dropped", cut.bytes)
}

fn drained() -> End {
    End::because(Reason::WorkerDrained, "the worker is stopping")
}

fn internal(message: &str) -> Ended {
    Ended::End(End::because(Reason::InternalError, message))
}

fn user(reason: Reason, message: &impl std::fmt::Display) -> Ended {
    Ended::End(End::because(reason, message.to_string()))
}

fn vm_ended(error: &VmError) -> Ended {
    let reason = match (error.what, error.blame) {
        (VmFault::Disk, _) => Reason::OutOfDisk,
        (VmFault::File, Blame::User) => Reason::SourceError,
        (VmFault::Network, Blame::Policy) => Reason::ConfigError,
        (VmFault::NoImage | VmFault::Pull, _) => Reason::ImagePullFailure,
        // Nothing of the job has run here: it goes elsewhere, uncharged.
        (VmFault::Host | VmFault::Full | VmFault::Taken, _) => Reason::WorkerDrained,
        (VmFault::Start | VmFault::Network | VmFault::Destroy, _) => Reason::VmStartFailure,
        (VmFault::Lost, _) => Reason::VmLost,
        (VmFault::Fenced, _) => Reason::WorkerLost,
        (VmFault::File, Blame::Farm | Blame::Policy) => Reason::InternalError,
    };
    Ended::End(End::because(reason, error.to_string()))
}

fn spool_ended(error: &std::io::Error) -> Ended {
    Ended::End(End::because(disk_reason(error), format!("the worker's spool: {error}")))
}

fn disk_reason(error: &std::io::Error) -> Reason {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Reason::OutOfDisk,
        _ => Reason::InternalError,
    }
}

fn source_ended(error: &SourceError) -> Ended {
    let reason = match error {
        SourceError::NoTree(_) => Reason::SourceError,
        // A job was taken only because the farm had its whole tree: whatever does not arrive is the farm's fault.
        SourceError::Corrupt(_) | SourceError::Transfer(_) => Reason::InternalError,
        SourceError::Disk(error) => disk_reason(error),
    };
    Ended::End(End::because(reason, error.to_string()))
}

fn collect_ended(error: CollectError) -> Ended {
    match error {
        CollectError::Vm(error) if error.blame == Blame::User => user(Reason::ArtifactMissing, &error),
        CollectError::Vm(error) => vm_ended(&error),
        CollectError::Changed(path) => user(Reason::ArtifactChanged, &format!("{path} changed while it was collected")),
        CollectError::Spool(error) => spool_ended(&error),
        CollectError::Transfer(error) => internal(&format!("an artifact could not be delivered: {error}")),
        CollectError::Stopping => Ended::Silent,
    }
}

#[cfg(test)]
mod tests;
