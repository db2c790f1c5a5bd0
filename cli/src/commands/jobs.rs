//! S: the verbs on jobs that exist: attach, logs, list, status.

use alloy_shared::client::{JobQuery, LogQuery};
use alloy_shared::env::Ms;
use alloy_shared::id::BadName;
use alloy_shared::limits;
use alloy_shared::wire::farm::WorkerState;
use alloy_shared::wire::job::{JobSpec, JobView, LogFrame, StateWord, Timings};

use crate::context::{App, Farm};
use crate::farm::Hosted;
use crate::follow::{Ending, Follower, OnInterrupt};
use crate::output::{
    Failure, Fault, Sink, ago, duration, exit, job_exit, print, print_json, stdout_is_terminal, table,
};
use crate::signals::Signals;
use crate::verdict::verdict;

const COMMAND_SHOWN: usize = 48;
const COMMAND_LEAST: usize = 8;

/// Follow a job from its first byte to its end; exits with the job's own code
#[derive(Debug, clap::Args)]
pub(crate) struct AttachArgs {
    /// Id, at least 6 of its last characters, or URL; default: the latest job of this directory
    pub(crate) job: Option<String>,
}

/// Print a job's log
#[derive(Debug, clap::Args)]
pub(crate) struct LogsArgs {
    /// Id, at least 6 of its last characters, or URL; default: the latest job of this directory
    pub(crate) job: Option<String>,
    /// Go on until the attempt has ended
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Log of this attempt; default: the newest
    #[arg(long, value_name = "N")]
    pub(crate) attempt: Option<u32>,
}

/// List jobs, newest first
#[derive(Debug, clap::Args)]
pub(crate) struct ListArgs {
    /// Only jobs in this state; may be repeated
    #[arg(long, value_name = "STATE", value_parser = state_word)]
    pub(crate) state: Vec<StateWord>,
    /// Only my own
    #[arg(long)]
    pub(crate) mine: bool,
    /// How many
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) limit: u32,
    /// Print ids only
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// Show one job
#[derive(Debug, clap::Args)]
pub(crate) struct StatusArgs {
    /// Id, at least 6 of its last characters, or URL; default: the latest job of this directory
    pub(crate) job: Option<String>,
}

pub(crate) async fn attach(app: &App, args: &AttachArgs) -> Result<i32, Failure> {
    let mut signals = Signals::install()?;
    let hosted = Hosted::open_to_read(app).await?;
    let farm = hosted.farm();
    let job = app.job(farm, args.job.as_deref()).await?;
    hosted.can_follow(&job)?;
    app.talk.headline(&job.id.to_string(), &job.url);
    let mut follower = Follower::new(app, farm, job.id, OnInterrupt::Detach)?;
    match follower.run(&mut signals, hosted.vanished(app)).await? {
        Ending::Detached { cancel_heard } => {
            app.tell_detached(job.id, cancel_heard);
            Ok(exit::INTERRUPTED)
        }
        Ending::FarmGone => Err(Failure::error("the farm of this machine ended before the job did")
            .hint("alloy up          starts one, which goes on with the job")),
        Ending::Ended(job) => {
            app.tell_end(&job);
            let (code, origin) = job_exit(&job);
            if app.talk.json() {
                print_json(&serde_json::json!({
                    "type": "result", "job": job, "exit_code": code, "exit_origin": origin,
                }))?;
            }
            Ok(code)
        }
    }
}

pub(crate) async fn logs(app: &App, args: &LogsArgs) -> Result<i32, Failure> {
    let mut signals = Signals::install()?;
    let hosted = Hosted::open_to_read(app).await?;
    let farm = hosted.farm();
    let job = app.job(farm, args.job.as_deref()).await?;
    if args.follow {
        hosted.can_follow(&job)?;
    }
    let attempt = args.attempt.unwrap_or(job.attempt);
    if attempt == 0 || attempt > job.attempt {
        if args.attempt.is_none() && args.follow && !job.state.is_terminal() {
            // Nothing has been written yet: the feed knows when the first attempt begins.
            return attach(app, &AttachArgs { job: Some(job.id.to_string()) }).await;
        }
        let why = if args.attempt.is_some() {
            format!("{} has no attempt {attempt}, it has {}", job.id, job.attempt)
        } else {
            format!("{} has no log: it was never started", job.id)
        };
        return Err(Failure::new(Fault::NotFound, why));
    }
    let mut sink = Sink::stdout(&app.talk).map_err(|error| Failure::io("standard output", &error))?;
    let query = LogQuery { attempt: Some(attempt), offset: 0, follow: args.follow };
    match signals.unless_told(copy_log(app, farm, &job, query, &mut sink)).await {
        Ok(outcome) => outcome?,
        Err(failure) => {
            if args.follow {
                app.tell_detached(job.id, None);
                return Ok(exit::INTERRUPTED);
            }
            return Err(failure);
        }
    }
    signals.unless_told(sink.finish()).await??;
    Ok(exit::OK)
}

async fn copy_log(app: &App, farm: &Farm, job: &JobView, query: LogQuery, sink: &mut Sink) -> Result<(), Failure> {
    let attempt = query.attempt.unwrap_or(job.attempt);
    let mut offset = query.offset;
    let mut bytes = farm.client.log(job.id, query);
    while let Some(piece) = bytes.recv().await {
        let piece = piece.map_err(|error| Failure::of(error, &farm.url))?;
        let len = piece.len() as u64;
        if app.talk.json() {
            sink.write_json(&LogFrame::new(attempt, offset, &piece)).await?;
        } else {
            sink.write(piece).await?;
        }
        offset += len;
    }
    Ok(())
}

pub(crate) async fn list(app: &App, args: &ListArgs) -> Result<i32, Failure> {
    let hosted = Hosted::open_to_read(app).await?;
    let farm = hosted.farm();
    let mut jobs: Vec<JobView> = Vec::new();
    let mut cursor = None;
    while (jobs.len() as u32) < args.limit {
        let limit = (args.limit - jobs.len() as u32).min(limits::PAGE_MAX);
        let query = JobQuery { limit: Some(limit), cursor, state: args.state.clone(), mine: args.mine };
        let page = farm.client.jobs(&query).await.map_err(|error| Failure::of(error, &farm.url))?;
        jobs.extend(page.jobs);
        cursor = page.next_cursor;
        if cursor.is_none() {
            break;
        }
    }
    if app.talk.json() {
        print_json(&serde_json::json!({ "jobs": jobs, "next_cursor": cursor }))?;
    } else if args.quiet {
        print(&jobs.iter().map(|job| format!("{}\n", job.id)).collect::<String>())?;
    } else {
        let now = app.env.now().wall;
        let mut rows: Vec<Vec<String>> = jobs.iter().map(|job| row(job, now)).collect();
        if rows.is_empty() {
            app.talk.say("No jobs.");
        }
        let head = ["JOB", "STATE", "COMMAND", "WORKER", "STARTED", "TOOK"];
        // Only the width of what is written to: a pipe or a file takes whole commands, whatever terminal stderr is.
        if let Some((width, _)) = terminal_size::terminal_size_of(std::io::stdout()) {
            fit(&head, &mut rows, usize::from(width.0));
        }
        print(&table(&head, &rows, stdout_is_terminal()))?;
    }
    Ok(exit::OK)
}

/// Shortens the commands until a row fits into a line of the terminal.
fn fit(head: &[&str], rows: &mut [Vec<String>], width: usize) {
    const COMMAND: usize = 2;
    const GAP: usize = 2;
    let widest = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([head[column].len()]).max().unwrap_or(0)
    };
    let others: usize = (0..head.len()).filter(|column| *column != COMMAND).map(|column| widest(column) + GAP).sum();
    let room = width.saturating_sub(others).max(COMMAND_LEAST);
    for row in rows {
        if row[COMMAND].chars().count() > room {
            row[COMMAND] = row[COMMAND].chars().take(room - 1).chain(['…']).collect();
        }
    }
}

/// Both spellings of the one word that has two.
fn state_word(text: &str) -> Result<StateWord, BadName> {
    if text == "cancelled" { Ok(StateWord::Canceled) } else { text.parse() }
}

fn row(job: &JobView, now: Ms) -> Vec<String> {
    vec![
        job.id.to_string(),
        format!("{} {}", icon(job.state), state(job)),
        command(&job.spec),
        job.worker_name.clone().unwrap_or_else(|| "–".into()),
        ago(&job.created_at, now),
        took(job, now),
    ]
}

fn took(job: &JobView, now: Ms) -> String {
    let end = job.finished_at.as_deref().and_then(Ms::parse_rfc3339).unwrap_or(now);
    Ms::parse_rfc3339(&job.created_at).map_or_else(|| "?".into(), |start| duration(end.since(start)))
}

fn state(job: &JobView) -> String {
    match job.phase {
        Some(phase) => format!("{} ({phase})", job.state),
        None => job.state.to_string(),
    }
}

const fn icon(state: StateWord) -> &'static str {
    match state {
        StateWord::Queued => "○",
        StateWord::Assigned => "◐",
        StateWord::Running | StateWord::Canceling => "●",
        StateWord::Succeeded => "✓",
        StateWord::Failed => "✗",
        StateWord::TimedOut => "⏱",
        StateWord::Canceled => "⊘",
        StateWord::Expired | StateWord::Errored => "!",
    }
}

pub(crate) fn command(spec: &JobSpec) -> String {
    let text = spec.shell.clone().unwrap_or_else(|| spec.argv.join(" "));
    let line = text.lines().next().unwrap_or_default();
    let mut short: String = line.chars().take(COMMAND_SHOWN).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

pub(crate) async fn status(app: &App, args: &StatusArgs) -> Result<i32, Failure> {
    let hosted = Hosted::open_to_read(app).await?;
    let job = app.job(hosted.farm(), args.job.as_deref()).await?;
    if app.talk.json() {
        print_json(&job)?;
        return Ok(exit::OK);
    }
    let rows: Vec<Vec<String>> =
        facts(&job, app.env.now().wall).into_iter().map(|(name, value)| vec![name.to_owned(), value]).collect();
    print(&format!("{} {}\n", icon(job.state), job.id))?;
    print(
        &table(&["", ""], &rows, stdout_is_terminal())
            .lines()
            .map(str::trim_end)
            .filter(|l| !l.is_empty())
            .map(|line| format!("  {line}\n"))
            .collect::<String>(),
    )?;
    Ok(exit::OK)
}

fn facts(job: &JobView, now: Ms) -> Vec<(&'static str, String)> {
    let mut facts = vec![("state", state(job)), ("command", command(&job.spec))];
    let mut fact = |name, value: Option<String>| facts.extend(value.map(|value| (name, value)));
    fact("waits for", job.waiting_reason.clone());
    if job.state.is_terminal() {
        fact("end", Some(verdict(job).text));
        fact("exit code", job.exit_code.map(|code| code.to_string()));
    }
    let silent = matches!(job.worker_state, Some(WorkerState::Suspect | WorkerState::Lost));
    let heard = job.worker_state.filter(|_| silent).map_or(String::new(), |state| format!(" ({})", state.as_str()));
    fact("worker", job.worker_name.as_ref().map(|name| format!("{name}{heard}")));
    fact("image", image(job));
    fact("attempt", (job.attempt > 0).then(|| job.attempt.to_string()));
    fact("lost", (job.lost > 0).then(|| format!("{} of them, by the farm", job.lost)));
    fact("submitted", Some(format!("{} ({})", job.created_at, ago(&job.created_at, now))));
    fact("took", Some(took(job, now)));
    fact("stages", stages(job));
    fact(
        "commit",
        job.spec.git.as_ref().map(|git| {
            let branch = git.branch.as_ref().map_or(String::new(), |branch| format!(" on {branch}"));
            format!("{}{branch}{}", git.commit, if git.dirty { ", with changes" } else { "" })
        }),
    );
    fact("url", Some(job.url.clone()));
    facts
}

/// What the newest attempt runs in: `NAME sha256:0123456789ab…, warm`.
fn image(job: &JobView) -> Option<String> {
    let name = job.image.as_ref()?;
    let digest = job.image_digest.as_ref().map_or(String::new(), |digest| {
        let shown: String = digest.chars().take("sha256:".len() + 12).collect();
        format!(" {shown}…")
    });
    let why =
        job.timings.vm.as_ref().and_then(|vm| vm.why).map_or(String::new(), |why| format!(": {}", why.sentence()));
    Some(format!("{name}{digest}{}", job.vm_source.as_ref().map_or(String::new(), |source| format!(", {source}{why}"))))
}

fn stages(job: &JobView) -> Option<String> {
    let t = &job.timings;
    let all = [
        ("queue", t.queue_ms),
        ("assign", t.assign_ms),
        ("vm", t.vm_ms),
        ("source", t.source_ms),
        ("exec", t.exec_ms),
        ("collect", t.collect_ms),
        ("teardown", t.teardown_ms),
    ];
    let shown: Vec<String> =
        all.iter().filter_map(|(name, ms)| ms.map(|ms| format!("{name} {}{}", precise(ms), within(name, t)))).collect();
    (!shown.is_empty()).then(|| shown.join(" · "))
}

/// What the job waited for within the stage `vm`; of a warm VM that is only the last look.
fn within(stage: &str, timings: &Timings) -> String {
    let Some(vm) = timings.vm.as_ref().filter(|_| stage == "vm") else { return String::new() };
    let made = [("clone", vm.clone_ms), ("boot", vm.boot_ms), ("agent", vm.agent_ms)];
    let made = made.into_iter().filter(|_| !vm.warm);
    let waited = [("pull", vm.pull_ms)].into_iter().chain(made).chain([("clock", vm.clock_ms)]);
    let shown: Vec<_> = waited.filter_map(|(name, ms)| ms.map(|ms| format!("{name} {}", precise(ms)))).collect();
    if shown.is_empty() { String::new() } else { format!(" ({})", shown.join(", ")) }
}

fn precise(ms: u64) -> String {
    if ms < 1_000 { format!("{ms}ms") } else { duration(ms) }
}

#[cfg(test)]
mod tests {
    use alloy_shared::wire::job::{End, Reason};
    use alloy_shared::wire::vm::{Miss, VmStages};

    use super::*;
    use crate::verdict::tests::ended;

    #[test]
    fn a_job_is_one_row_and_a_page_of_facts() {
        let mut job = ended(&End::because(Reason::WorkerLost, "m1 went silent"));
        job.spec.shell = Some("make all\nmake test".into());
        job.timings = Timings { queue_ms: Some(12), exec_ms: Some(61_000), ..Timings::default() };
        let now = Ms::parse_rfc3339("2026-01-02T03:14:05Z").unwrap();
        let row = row(&job, now);
        assert_eq!(row[1..], ["! errored", "make all…", "–", "10m ago", "1m 32s"].map(str::to_owned));
        let facts = facts(&job, now);
        let fact = |name: &str| facts.iter().find(|(key, _)| *key == name).map(|(_, value)| value.as_str());
        assert_eq!(fact("end"), Some("not run to its end: m1 went silent"));
        assert_eq!(fact("exit code"), Some("125"));
        assert_eq!(fact("stages"), Some("queue 12ms · exec 1m 01s"));
        assert_eq!(fact("waits for"), None);
        let job = JobView { worker_name: Some("shed".into()), worker_state: Some(WorkerState::Suspect), ..job };
        assert!(super::facts(&job, now).contains(&("worker", "shed (suspect)".to_owned())));
    }

    #[test]
    fn a_vm_is_told_with_its_stages_and_why_none_was_warm() {
        let mut job = ended(&End::success());
        job.image = Some("r/i:1".into());
        job.vm_source = Some("cold".into());
        let stages = VmStages { clone_ms: Some(900), boot_ms: Some(10), clock_ms: Some(30), ..VmStages::default() };
        let cold = VmStages { why: Some(Miss::NoWarmVm), pull_ms: Some(7), ..stages };
        job.timings = Timings { vm_ms: Some(950), vm: Some(Box::new(cold)), exec_ms: Some(5), ..Timings::default() };
        assert_eq!(image(&job).as_deref(), Some("r/i:1, cold: no warm VM of this image"));
        assert_eq!(
            super::stages(&job).as_deref(),
            Some("vm 950ms (pull 7ms, clone 900ms, boot 10ms, clock 30ms) · exec 5ms")
        );
        job.vm_source = Some("warm".into());
        job.timings.vm = Some(Box::new(VmStages { warm: true, ..stages }));
        assert_eq!(image(&job).as_deref(), Some("r/i:1, warm"));
        assert_eq!(super::stages(&job).as_deref(), Some("vm 950ms (clock 30ms) · exec 5ms"));
    }

    #[test]
    fn a_list_fits_the_terminal_at_the_cost_of_its_commands() {
        let head = ["JOB", "STATE", "COMMAND", "WORKER"];
        let row = |command: &str| vec!["job_1".into(), "queued".into(), command.to_owned(), "mini".into()];
        for (width, shown) in [(80, "xcodebuild test -scheme App"), (32, "xcodebui…"), (5, "xcodebu…")] {
            let mut rows = [row("xcodebuild test -scheme App"), row("make")];
            fit(&head, &mut rows, width);
            assert_eq!((rows[0][2].as_str(), rows[1][2].as_str()), (shown, "make"), "{width}");
        }
    }

    #[test]
    fn long_commands_are_cut_between_characters() {
        let spec = JobSpec { argv: vec!["ü".repeat(60)], ..JobSpec::default() };
        assert_eq!(command(&spec).chars().count(), COMMAND_SHOWN + 1);
        assert_eq!(command(&JobSpec { argv: vec!["ls".into(), "-l".into()], ..JobSpec::default() }), "ls -l");
    }
}
