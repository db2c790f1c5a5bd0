//! Alloy and its peers, measured side by side in one run: A-B-A-B, with the machine's floors recorded in every round. A round
//! in which a floor moved by more than twice is thrown away and repeated. A peer that is not there is "not measured".

pub mod desk;
pub mod floors;
pub mod idle;
pub mod path;
pub mod peers;
pub mod queue;
pub mod report;
pub mod warm;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use crate::farm::{Farm, Setup};
use crate::observe::{now, until};
use floors::Floors;
use report::{Better, Report, Row};

/// Rounds may be repeated this often in all, then the machine is too busy and the report says so.
const REPEATS_MAX: usize = 6;

#[derive(Debug, Clone)]
pub struct Options {
    pub rounds: usize,
    /// Smaller counts, to see that it works.
    pub quick: bool,
    pub out: PathBuf,
    /// Only cases whose name contains this.
    pub only: Option<String>,
}

/// Milliseconds since `from`.
pub fn ms(from: std::time::Instant) -> f64 {
    from.elapsed().as_secs_f64() * 1e3
}

pub async fn run(options: &Options) -> Result<Report> {
    let mut report = Report::new(options);
    let wants = |name: &str| options.only.as_deref().is_none_or(|only| name.contains(only));
    if wants("hello") {
        report.rows.extend(hello(options, &mut report.floors).await?);
    }
    if wants("log") {
        report.rows.push(log(options, &mut report.floors).await?);
    }
    if wants("desk") {
        report.rows.push(desk::row(options, &mut report.floors).await?);
    }
    if wants("queue") {
        report.rows.extend(queue::rows(options, &mut report.floors).await?);
    }
    if wants("submit") {
        report.rows.push(submit(options).await?);
    }
    if wants("idle") {
        report.rows.extend(idle::rows(options).await?);
    }
    if wants("warm") {
        report.rows.extend(warm::rows(options, &mut report.floors).await?);
    }
    report.save(&options.out)?;
    Ok(report)
}

/// Calls `round` until there are enough in which the floors held still, and notes in the rows how many were repeated. The
/// samples of a round in which a floor moved are taken back.
async fn rounds(
    options: &Options,
    floors: &mut Vec<Floors>,
    rows: &mut [Row],
    mut round: impl AsyncFnMut(&mut [Row]) -> Result<()>,
) -> Result<()> {
    let (mut kept, mut repeats) = (0, 0);
    while kept < options.rounds {
        let marks: Vec<_> = rows.iter().map(Row::mark).collect();
        let before = floors::measure()?;
        round(rows).await?;
        let after = floors::measure()?;
        let moved = before.moved(&after);
        floors.extend([before, after]);
        if moved && repeats < REPEATS_MAX {
            repeats += 1;
            rows.iter_mut().zip(marks).for_each(|(row, mark)| row.rewind(&mark));
        } else {
            kept += 1;
        }
    }
    for row in rows.iter_mut().filter(|_| repeats > 0) {
        row.note = format!("{}; {repeats} rounds repeated because a floor moved", row.note);
    }
    Ok(())
}

/// Submit to the first byte of output of `echo hi`, and the wall time of `alloy run -c true`.
async fn hello(options: &Options, floors: &mut Vec<Floors>) -> Result<Vec<Row>> {
    let farm = Farm::start(Setup { workers: 1, slots: 2, time_scale: 1, ..Setup::default() }).await?;
    let slurm = peers::Slurm::start(&farm.scratch("slurm")?).await?;
    let spooler = peers::Spooler::find(&farm.scratch("tsp")?);
    let tries = if options.quick { 5 } else { 40 };
    let api = farm.api();
    let mut first = Row::new("submit → first output of `echo hi`", "ms", Better::Lower, "at most 1/5 of srun");
    first.note = "one worker, one client, over HTTP".into();
    let mut run = Row::new("`alloy run -c true`, wall time", "ms", Better::Lower, "under 60 ms");
    run.note = "an empty tree, the process from its start to its end".into();
    let mut rows = [first, run];
    path::hello(&api).await?;
    rounds(options, floors, &mut rows, async |rows| {
        let mut ours = Vec::new();
        let mut cli = Vec::new();
        for _ in 0..tries {
            ours.push(path::hello(&api).await?);
        }
        rows[0].ours(ours);
        rows[0].peer("srun (slurm)", timed(tries, slurm.as_ref().map(peers::Slurm::hello))?);
        rows[0].peer("tsp (task-spooler)", timed(tries, spooler.as_ref().map(peers::Spooler::hello))?);
        for _ in 0..tries {
            let started = now();
            let out = crate::farm::output(farm.alloy(&["run", "-c", "true"])).await?;
            cli.push(ms(started));
            anyhow::ensure!(out.status.success(), "alloy run: {}", String::from_utf8_lossy(&out.stderr));
        }
        rows[1].ours(cli);
        Ok(())
    })
    .await?;
    Ok(rows.into())
}

/// Runs a peer's command until its first byte of output, so often.
fn timed(tries: usize, command: Option<impl Fn() -> std::process::Command>) -> Result<Option<Vec<f64>>> {
    let Some(command) = command else { return Ok(None) };
    (0..tries).map(|_| peers::until_first_byte(command())).collect::<Result<Vec<_>>>().map(Some)
}

/// One job's output to one follower, against a pipe and ssh.
async fn log(options: &Options, floors: &mut Vec<Floors>) -> Result<Row> {
    let bytes: u64 = if options.quick { 64 << 20 } else { 1 << 30 };
    let farm = Farm::start(Setup { workers: 1, slots: 1, time_scale: 1, ..Setup::default() }).await?;
    let file = farm.scratch("log")?.join("bytes");
    path::fill(&file, bytes)?;
    let ssh = peers::Ssh::start(&farm.scratch("ssh")?)?;
    let api = farm.api();
    let mut row = Row::new(
        &format!("log of {} MiB to one follower", bytes >> 20),
        "MB/s",
        Better::Higher,
        "at least 0.3 of the pipe, faster than ssh",
    );
    row.note = "page cache and free memory warm".into();
    let spare = farm.scratch("spare")?.join("bytes");
    let rate = |seconds: f64| bytes as f64 / 1e6 / seconds;
    rounds(options, floors, std::slice::from_mut(&mut row), async |rows| {
        floors::touch(&spare, 3 * bytes)?;
        let (seconds, id) = path::log(&api, &file, bytes).await?;
        rows[0].ours(vec![rate(seconds)]);
        // What still works on the log must not take the peers' time.
        let seal = farm.farm_dir().join("logs").join(id).join("1.seal");
        until("the log is sealed", async || Ok(seal.exists().then_some(()))).await;
        rows[0].peer("raw pipe", Some(vec![rate(peers::drain(peers::cat(&file), bytes)?)]));
        let over_ssh = ssh.as_ref().map(|ssh| peers::drain(ssh.cat(&file), bytes)).transpose()?;
        rows[0].peer("ssh localhost cat", over_ssh.map(|seconds| vec![rate(seconds)]));
        Ok(())
    })
    .await?;
    Ok(row)
}

/// Submits over HTTP, durable, by many clients at once; afterwards everything acknowledged must exist.
async fn submit(options: &Options) -> Result<Row> {
    let mut row = Row::new("submit over HTTP, 64 clients", "jobs/s", Better::Higher, "told, no aim");
    let each = Duration::from_secs(if options.quick { 1 } else { 5 });
    let mut acknowledged = 0;
    for _ in 0..options.rounds {
        // Each round has a farm of its own: one holds only so many live jobs.
        let mut farm = Farm::start(Setup { workers: 0, ..Setup::default() }).await?;
        farm.leaves_live_jobs = true;
        // One token is held to a number of calls a second: every client has its own.
        let mut clients = Vec::new();
        for number in 0..64 {
            clients.push(path::client(&farm.api(), number).await?);
        }
        let started = now();
        let ids = path::submit_for(&clients, each).await?;
        row.ours(vec![ids.len() as f64 / started.elapsed().as_secs_f64()]);
        farm.kill_orchestrator();
        farm.start_orchestrator().await?;
        let there = path::all_jobs(&farm.api()).await?;
        let lost = ids.iter().filter(|id| !there.contains(*id)).count();
        anyhow::ensure!(lost == 0, "{lost} of {} acknowledged jobs are gone after kill -9", ids.len());
        acknowledged += ids.len();
    }
    row.note = format!("{acknowledged} jobs, each still there after kill -9");
    Ok(row)
}

/// Where the report goes unless it is said: cargo's target directory.
pub fn default_out() -> PathBuf {
    let exe = std::env::current_exe().unwrap_or_default();
    exe.ancestors().nth(2).unwrap_or(Path::new("target")).join("bench")
}
