//! S: `alloy run`: scan, upload, submit, follow, download, and the command's own exit code.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use alloy_shared::id::{Labels, request_key};
use alloy_shared::limits;
use alloy_shared::wire::job::{ExitOrigin, JobSpec, JobView, SubmitJob};
use alloy_shared::wire::network::Network;
use serde::Serialize;

use super::reach::{check_times, reach};
use super::submit::{Submit, submit};
use crate::context::{App, DEFAULT_ORIGIN, Farm};
use crate::download::{Downloads, Report};
use crate::farm::{Hosted, Lease};
use crate::follow::{Ending, Follower, OnInterrupt};
use crate::output::{Failure, Fault, exit, job_exit, plural, print, print_json, size};
use crate::signals::Signals;
use crate::source::{self, Scan, git, upload};

/// Farms on this machine that may end under a command before it becomes the host itself.
const LOCAL_TRIES: u32 = 5;
/// An orchestrator restarts in less.
const RESTART_MS: u64 = 12_000;

const EXAMPLES: &str = "\
Examples:
  alloy run -c 'xcodebuild test -scheme MyApp'
  alloy run --artifact 'build/*.ipa' --env CONFIGURATION=Release -- make ipa
  alloy run --local -c 'echo hello'

The tree that goes is the directory that you are in (or -C DIR), also if it lies within a repository, and the
command starts at the top of its copy. To send a whole repository and work below:
  alloy run -C \"$(git rev-parse --show-toplevel)\" -c 'cd app && make'

Standard output is exactly the job's log; everything else goes to standard error.
Exit code: the command's own; 128+n if signal n killed it; 124 timed out; 130 canceled;
125 if the farm could not run it; 7 if the farm fell silent, and the job may go on;
2 for a command line that makes no sense.";

/// Run a command on the farm, in this working tree
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct RunArgs {
    /// Line for the shell
    #[arg(short = 'c', value_name = "LINE", conflicts_with = "argv", required_unless_present = "argv")]
    pub(crate) shell: Option<String>,
    /// Program and arguments, run without a shell
    #[arg(last = true, value_name = "PROGRAM ARGS")]
    pub(crate) argv: Vec<String>,
    /// Variable of the command's environment; KEY alone takes the value from here
    #[arg(short, long, value_name = "KEY[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Files to bring back: a glob; `=GLOB` must match, `!GLOB` leaves out
    #[arg(short, long, value_name = "GLOB")]
    pub(crate) artifact: Vec<String>,
    /// How long the command may run: 90s, 10m, 2h
    #[arg(long, value_name = "TIME", value_parser = milliseconds)]
    pub(crate) timeout: Option<u64>,
    /// How long the job may wait for a slot
    #[arg(long, value_name = "TIME", value_parser = milliseconds)]
    pub(crate) queue_timeout: Option<u64>,
    /// Label that the worker must have
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub(crate) label: Vec<String>,
    /// How often a command that failed is tried again
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=i64::from(limits::RETRIES_MAX)))]
    pub(crate) retries: u32,
    /// Image of the virtual machine
    #[arg(long, value_name = "IMAGE")]
    pub(crate) image: Option<String>,
    /// Whom the virtual machine may talk to: `none`, `default`, or `allow=` and IPv4 ranges with commas between
    #[arg(long, value_name = "POLICY")]
    pub(crate) network: Option<Network>,
    /// Print the job's id and leave
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Leave the artifacts on the farm
    #[arg(long)]
    pub(crate) no_download: bool,
    /// Send private keys and .env files too
    #[arg(long)]
    pub(crate) allow_secret_files: bool,
}

/// The last line of `--json`.
#[derive(Serialize)]
struct Last<'a> {
    r#type: &'static str,
    job: &'a JobView,
    exit_code: i32,
    exit_origin: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    artifacts_dir: Option<PathBuf>,
}

/// What is known of the job, from one farm of this machine to the next.
#[derive(Default)]
struct Pursuit<'a> {
    job: Option<JobView>,
    follower: Option<Follower<'a>>,
    /// What was asked for, once it was sent: the same key stands for the same request.
    sent: Option<SubmitJob>,
    /// Says to the farms of this machine that somebody wants the job.
    lease: Option<Lease>,
}

/// How it went with one farm.
enum Round {
    Over(i32),
    /// It ended under the job.
    FarmGone,
}

pub(crate) async fn run(app: &App, args: &RunArgs) -> Result<i32, Failure> {
    let spec = spec(args, &App::var)?;
    let mut signals = Signals::install()?;
    if args.detach && app.globals.local {
        return Err(Failure::usage("--detach needs a farm that outlives this command")
            .hint("alloy up          starts one; then run without --local"));
    }
    // One key for all tries: whatever farm of this machine answers, there is one job.
    let key = request_key(app.env.now().wall, (app.env.dice(), app.env.dice()));
    let mut pursuit = Pursuit::default();
    let outcome = pursue(app, args, (spec, &key), &mut signals, &mut pursuit).await;
    outcome.map_err(|failure| if pursuit.job.is_some() { failure.of_a_job() } else { failure })
}

/// From farm to farm, until the job is over or nothing can come of it any more.
async fn pursue<'a>(
    app: &'a App,
    args: &RunArgs,
    (spec, key): (JobSpec, &str),
    signals: &mut Signals,
    pursuit: &mut Pursuit<'a>,
) -> Result<i32, Failure> {
    let mut tries = 0;
    loop {
        let hosted = open(app, signals, pursuit).await?;
        let outcome = run_on(app, args, (spec.clone(), key), &hosted, signals, pursuit).await;
        let gone = match &outcome {
            Ok(Round::FarmGone) => true,
            Ok(Round::Over(_)) => false,
            Err(failure) => pursuit.job.is_none() && failure.farm_is_away(),
        };
        let again = gone && hosted.may_vanish(app) && tries < LOCAL_TRIES;
        if !again {
            // Whoever waits for this farm's jobs need not wait for this one's reader any more.
            (pursuit.follower, pursuit.lease) = (None, None);
            hosted.close(app, signals).await;
            return match outcome? {
                Round::Over(code) => Ok(code),
                Round::FarmGone => Err(Failure::error("the farms of this machine end one after the other")),
            };
        }
        hosted.close(app, signals).await;
        tries += 1;
    }
}

/// Opens the farm. Once there is a job in it, a wish to stop is a cancel, which needs the farm.
async fn open(app: &App, signals: &mut Signals, pursuit: &mut Pursuit<'_>) -> Result<Hosted, Failure> {
    if let Some(follower) = &mut pursuit.follower {
        app.talk.warn("the farm of this machine is gone; opening it again to follow the job");
        // To its end also when told: half a farm that is dropped keeps its lock, and the cancel needs a whole one.
        let heard = || app.talk.say("The job is canceled as soon as the farm is open.  (Ctrl-C again to leave)");
        let opened = signals.finish_unless_told_twice(Hosted::open(app), heard).await;
        if let (Err(_), Some(lease)) = (&opened, &mut pursuit.lease) {
            // Whoever opens the farm next ends the job.
            lease.stays(true);
        }
        let (opened, told) = opened?;
        if told {
            follower.already_told();
        }
        return opened;
    }
    signals.unless_told(Hosted::open(app)).await?
}

async fn run_on<'a>(
    app: &'a App,
    args: &RunArgs,
    (spec, key): (JobSpec, &str),
    hosted: &Hosted,
    signals: &mut Signals,
    pursuit: &mut Pursuit<'a>,
) -> Result<Round, Failure> {
    let farm = hosted.farm();
    let job = match pursuit.job.clone() {
        Some(job) => {
            pursuit.follower.iter_mut().for_each(|follower| follower.moved_to(farm));
            job
        }
        None => {
            let (job, told) = start(app, args, (spec, key), hosted, signals, pursuit).await?;
            pursuit.job = Some(job.clone());
            if args.detach && !told {
                if app.talk.json() {
                    print_json(&job)?
                } else {
                    print(&format!("{}\n", job.id))?
                }
                return Ok(Round::Over(exit::OK));
            }
            let follower = pursuit.follower.insert(Follower::new(app, farm, job.id, OnInterrupt::Cancel)?);
            if told {
                follower.already_told();
            }
            job
        }
    };
    let Some(follower) = &mut pursuit.follower else { return Err(Failure::error("nobody follows the job")) };
    let mut downloads =
        (!args.no_download && !job.spec.artifacts.is_empty()).then(|| Downloads::start(app, farm, &job));
    follower.announce(downloads.as_ref().map(|downloads| downloads.arrivals.clone()));
    let ending = tokio::select! {
        biased;
        why = hosted.fault(app) => {
            hosted.abandon(app, job.id).await;
            Err(Failure::error(format!("the worker of this machine stopped: {why}")))
        }
        ending = follower.run(signals, hosted.vanished(app)) => ending,
    };
    if !matches!(ending, Ok(Ending::Ended(_)))
        && let Some(downloads) = &mut downloads
    {
        downloads.stop().await;
    }
    match ending? {
        Ending::FarmGone => Ok(Round::FarmGone),
        Ending::Detached { cancel_heard } => {
            hosted.tell_detached(app, job.id, cancel_heard);
            Ok(Round::Over(exit::INTERRUPTED))
        }
        Ending::Ended(job) => {
            follower.announce(None);
            finish(app, farm, &job, downloads, signals).await.map(Round::Over)
        }
    }
}

/// From the tree to the job; true if it shall be canceled at once.
async fn start(
    app: &App,
    args: &RunArgs,
    (spec, key): (JobSpec, &str),
    hosted: &Hosted,
    signals: &mut Signals,
    pursuit: &mut Pursuit<'_>,
) -> Result<(JobView, bool), Failure> {
    let (asked, is_farm) = match pursuit.sent.clone() {
        // Only farms of this machine are tried one after the other.
        Some(sent) => (sent, true),
        None => prepare(app, args, spec, hosted, signals).await?,
    };
    signals.unless_told(hosted.ready(app)).await??;
    // After an upload the farm is known to be there.
    let patience_ms = match asked.source {
        Some(_) if !hosted.may_vanish(app) => RESTART_MS,
        Some(_) | None => first_answer_ms(app, hosted)?,
    };
    if app.globals.local && pursuit.lease.is_none() {
        pursuit.lease = Some(Lease::take(app, key)?);
    }
    let job = pursuit.sent.insert(asked);
    let this = Submit { farm: hosted.farm(), job, key, patience_ms, is_farm };
    let (job, told) = submit(app, &this, signals, pursuit.lease.as_mut()).await?;
    app.remember(hosted.farm(), job.id);
    app.talk.headline(&job.id.to_string(), &job.url);
    Ok((job, told))
}

/// Reads the tree and sends it; true if whoever listens there has spoken as a farm does.
async fn prepare(
    app: &App,
    args: &RunArgs,
    mut spec: JobSpec,
    hosted: &Hosted,
    signals: &mut Signals,
) -> Result<(SubmitJob, bool), Failure> {
    let patience_ms = first_answer_ms(app, hosted)?;
    let reached = reach(app, hosted.farm(), patience_ms);
    // A limit of the farm's that may matter is asked for before the work that it may spare; else both are done at once.
    let asks_for_time = spec.timeout_ms.is_some() || spec.queue_timeout_ms.is_some();
    let mut is_farm = app.globals.local;
    if asks_for_time && let Some(info) = signals.unless_told(reach(app, hosted.farm(), patience_ms)).await?? {
        check_times(&spec, &info)?;
        is_farm = true;
    }
    let (reached, scan, git, ignored) = signals
        .unless_told(async {
            let tree = read_tree(app, args.allow_secret_files);
            let reached = async { if asks_for_time || app.globals.local { Ok(None) } else { reached.await } };
            tokio::join!(reached, tree, git::record(&app.dir), git::tracked_but_ignored(&app.dir))
        })
        .await?;
    let scan = scan?;
    is_farm |= reached?.is_some();
    if let Some(warning) = scan.left_out(ignored) {
        app.talk.warn(&warning);
    }
    spec.git = git;
    let source = if scan.manifest.entries().is_empty() {
        None
    } else {
        Some(signals.unless_told(send_tree(app, hosted, &scan)).await??)
    };
    is_farm |= source.is_some();
    Ok((SubmitJob { spec, source }, is_farm))
}

/// After the end: what is left of the artifacts, and the exit code. A result whose files are not here is no success.
async fn finish(
    app: &App,
    farm: &Farm,
    job: &JobView,
    downloads: Option<Downloads>,
    signals: &mut Signals,
) -> Result<i32, Failure> {
    app.tell_end(job);
    let (mut code, mut origin) = job_exit(job);
    let mut artifacts_dir = None;
    if let Some(downloads) = downloads {
        let report = downloads.finish(farm, job, signals).await?;
        let complete = tell_artifacts(app, &report);
        if !complete && code == exit::OK {
            (code, origin) = (exit::ERROR, ExitOrigin::Alloy);
        }
        artifacts_dir = report.dir;
    }
    if app.talk.json() {
        let last = Last { r#type: "result", job, exit_code: code, exit_origin: origin.as_str(), artifacts_dir };
        match print_json(&last) {
            // The job's end is no other because nobody reads it.
            Err(failure) if failure.fault != Fault::Pipe => return Err(failure),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(code)
}

/// Says what arrived; true if nothing went wrong.
pub(crate) fn tell_artifacts(app: &App, report: &Report) -> bool {
    for why in report.unsafe_ones.values() {
        app.talk.warn(&format!("not created: {why}"));
    }
    if !report.saved.is_empty() {
        let files = plural(report.saved.len() as u64, "file");
        let dir = report.dir.as_ref().map_or(String::new(), |dir| format!("  → {}", shown(app, dir)));
        app.talk.step("Artifacts", &format!("{files}, {}{dir}", size(report.bytes())));
    }
    for failure in report.failed.values() {
        app.talk.fail(failure, exit::ERROR);
    }
    if !report.failed.is_empty() {
        app.talk.hint("alloy artifacts get   tries again");
    }
    report.failed.is_empty()
}

fn shown(app: &App, dir: &std::path::Path) -> String {
    match dir.strip_prefix(&app.dir) {
        Ok(below) => format!("./{}/", below.display()),
        Err(_) => format!("{}/", dir.display()),
    }
}

async fn read_tree(app: &App, allow_secret_files: bool) -> Result<Arc<Scan>, Failure> {
    let started = app.env.now().mono;
    let dir = app.dir.clone();
    let scanned = tokio::task::spawn_blocking(move || source::scan(&dir, allow_secret_files)).await;
    let scan = scanned.map_err(|error| Failure::error(format!("reading the tree: {error}")))??;
    for warning in &scan.warnings {
        app.talk.warn(warning);
    }
    let took = crate::output::duration(app.env.now().mono.since(started));
    let what = format!("{}, {}", plural(scan.files(), "file"), size(scan.manifest.total_bytes()));
    app.talk.step("Packing", &format!("{what}  ({took})"));
    Ok(Arc::new(scan))
}

async fn send_tree(app: &App, hosted: &Hosted, scan: &Arc<Scan>) -> Result<alloy_shared::id::Digest, Failure> {
    let started = app.env.now().mono;
    let patience = upload::Patience { first_ms: first_answer_ms(app, hosted)?, stalled_ms: upload::STALLED_MS };
    // A farm that may vanish does not come back at its address: another one is opened.
    let patience = if hosted.may_vanish(app) { upload::Patience::default() } else { patience };
    let (digest, moved) = upload::upload(&hosted.farm().client, &*app.env, scan, &app.talk, patience).await?;
    let took = crate::output::duration(app.env.now().mono.since(started));
    if moved.new_bytes > 0 {
        let known = scan.manifest.total_bytes().saturating_sub(moved.new_bytes);
        let known = if known > 0 { format!(", {} were there already", size(known)) } else { String::new() };
        app.talk.step("Uploading", &format!("{} sent{known}  ({took})", size(moved.sent_bytes)));
    } else {
        app.talk.step("Uploading", &format!("nothing: the farm has it all  ({took})"));
    }
    Ok(digest)
}

/// So long a farm that somebody named may take to restart. Nobody waits for one that was only guessed.
fn first_answer_ms(app: &App, hosted: &Hosted) -> Result<u64, Failure> {
    let named = !app.globals.local && !hosted.may_vanish(app) && app.choice()?.origin != DEFAULT_ORIGIN;
    Ok(if named { RESTART_MS } else { 0 })
}

/// What the arguments ask for. The farm checks the rest and names every wrong field.
fn spec(args: &RunArgs, var: &dyn Fn(&str) -> Option<String>) -> Result<JobSpec, Failure> {
    let mut env = BTreeMap::new();
    for pair in &args.env {
        let (key, value) = match pair.split_once('=') {
            Some((key, value)) => (key, value.to_owned()),
            None => {
                let value = var(pair).ok_or_else(|| {
                    Failure::usage(format!("--env {pair}: there is no such variable here"))
                        .hint(format!("--env {pair}=VALUE gives it one"))
                })?;
                (pair.as_str(), value)
            }
        };
        if key.is_empty() {
            return Err(Failure::usage("--env: the name is empty"));
        }
        env.insert(key.to_owned(), value);
    }
    let mut labels = Labels::default();
    for pair in &args.label {
        labels.insert_pair(pair).map_err(|error| Failure::usage(format!("--label: {error}")))?;
    }
    if args.shell.as_ref().is_some_and(|line| line.trim().is_empty()) {
        return Err(Failure::usage("-c: the line is empty"));
    }
    let spec = JobSpec {
        shell: args.shell.clone(),
        argv: args.argv.clone(),
        env,
        artifacts: args.artifact.clone(),
        labels: labels.iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
        image: args.image.clone(),
        network: args.network.clone().unwrap_or_default(),
        timeout_ms: args.timeout,
        queue_timeout_ms: args.queue_timeout,
        retries: args.retries,
        git: None,
    };
    // The farm's own rule, before a tree is packed and sent for nothing.
    alloy_shared::wire::spec::check(&spec).map_err(|faults| Failure::wrong_fields(Fault::Usage, &faults))?;
    Ok(spec)
}

/// Reads `90s`, `10m`, `1h30m`, `500ms`.
pub(crate) fn milliseconds(text: &str) -> Result<u64, String> {
    let wrong = || "write it as 90s, 10m or 1h30m".to_owned();
    let (mut rest, mut total) = (text, 0u64);
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, tail) = rest.split_at(digits);
        let unit = tail.len() - tail.trim_start_matches(|c: char| c.is_ascii_alphabetic()).len();
        let (unit, tail) = tail.split_at(unit);
        let factor = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(wrong()),
        };
        let number: u64 = number.parse().map_err(|_| wrong())?;
        total = number.checked_mul(factor).and_then(|ms| total.checked_add(ms)).ok_or_else(wrong)?;
        rest = tail;
    }
    if text.is_empty() {
        Err(wrong())
    } else if total == 0 {
        Err("it must be longer than nothing; leave it out to have the default".to_owned())
    } else {
        Ok(total)
    }
}

#[cfg(test)]
mod tests;
