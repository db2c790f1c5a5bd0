//! Brings a job into a phase and holds it there: by traps in the proxies, by gates in its command, by a hook, by a slow VM.
//! Each phase counts as reached when the farm, a proxy or the worker's disk says so; no clock is asked.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use alloy_tests::chaos::follow::Progress;
use alloy_tests::chaos::stage::{Plan, Run, Stage};
use alloy_tests::observe::{is_terminal, until};
use alloy_tests::process::processes_in;
use alloy_tests::proxy::{Sprung, Then, Way, Which};
use anyhow::{Result, ensure};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::json;
use tokio::sync::watch;

/// A phase of `reliability.md`.
pub(super) type Phase = u8;

/// A phase in which somebody speaks and somebody answers has several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Moment {
    Any,
    /// What was said was not heard.
    Unheard,
    /// It is being heard.
    Arriving,
    /// It was heard, and its answer was not.
    Unanswered,
}

pub(super) fn moments(phase: Phase) -> &'static [Moment] {
    match phase {
        0 => &[Moment::Unheard, Moment::Arriving, Moment::Unanswered],
        3 | 10 => &[Moment::Unheard, Moment::Unanswered],
        _ => &[Moment::Any],
    }
}

pub(super) const PHASES: [&str; 14] = [
    "submit received",
    "blob uploading",
    "queued",
    "assigned, not accepted",
    "VM booting",
    "source copying",
    "command quiet",
    "command with heavy logs",
    "command ended",
    "artifacts uploading",
    "result sent, not acked",
    "result acked",
    "VM teardown",
    "idle",
];

/// A job that is held in a phase.
#[derive(Default)]
pub(super) struct Aim {
    pub(super) run: Option<Run>,
    /// Absent as long as nobody was told that there is one.
    pub(super) job: Option<String>,
    pub(super) progress: Option<watch::Receiver<Progress>>,
    /// Jobs that keep every slot busy.
    pub(super) blockers: Vec<String>,
}

/// Installs the hook that holds a job between its result and its VM's end while the file `hold` is there.
pub(super) fn install_hooks(stage: &Stage) -> Result<()> {
    for number in 0..stage.links.len() {
        let hooks = stage.farm.worker_dir(number).join("hooks");
        fs::create_dir_all(&hooks)?;
        let path = hooks.join("post-job");
        let dir = stage.dir.display();
        let text = format!("#!/bin/sh\ntouch {dir}/post-$ALLOY_JOB_ID\nwhile [ -e {dir}/hold ]; do sleep 0.02; done\n");
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Lets go of everything that holds: what hung in the proxies is lost.
pub(super) fn lift(stage: &Stage, breaks: bool) -> Result<()> {
    for proxy in stage.links.iter().chain([&stage.front]) {
        if breaks {
            proxy.break_all();
        }
        proxy.heal();
    }
    for file in [stage.dir.join("hold"), slow_vms(stage)] {
        if file.exists() {
            // Whoever waits at a pipe is let through, and so is who comes to it before it is gone.
            let _both_ends = fs::File::options().read(true).write(true).open(&file)?;
            fs::remove_file(file)?;
        }
    }
    Ok(())
}

/// As long as this pipe is there, a VM that is to be slow goes no further.
fn slow_vms(stage: &Stage) -> std::path::PathBuf {
    stage.dir.join("slow-vms")
}

pub(super) fn blockers_gate(stage: &Stage) -> std::path::PathBuf {
    stage.dir.join("blockers")
}

/// Brings a new job into this phase. `by_follower`: it is the client that will be struck there.
pub(super) async fn reach(stage: &mut Stage, phase: Phase, moment: Moment, by_follower: bool) -> Result<Aim> {
    match phase {
        0 => submitted(stage, moment).await,
        1 => uploading(stage).await,
        2 => queued(stage).await,
        3 => assigned(stage, moment).await,
        4 | 12 => vm(stage, phase).await,
        5 => copying(stage).await,
        6 | 7 => executing(stage, phase).await,
        8 | 9 => collecting(stage, phase).await,
        10 => result_sent(stage, moment).await,
        11 if by_follower => downloading(stage).await,
        11 => result_acked(stage).await,
        13 => Ok(Aim::default()),
        _ => unreachable!("there are 14 phases"),
    }
}

fn steps(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

async fn sprung(trap: &mut watch::Receiver<Sprung>, is_there: impl FnMut(&Sprung) -> bool) -> Result<()> {
    tokio::time::timeout(alloy_tests::observe::PATIENCE, trap.wait_for(is_there)).await??;
    Ok(())
}

/// The run has named its job; from then on it is followed.
pub(super) async fn named(stage: &mut Stage, run: &Run) -> (String, watch::Receiver<Progress>) {
    let job = until("the run has named its job", async || {
        anyhow::ensure!(run.client.job().is_some(), "{}", run.client.said());
        Ok(run.client.job())
    })
    .await;
    let progress = stage.follow(&job, &run.plan.steps);
    (job, progress)
}

async fn held(stage: &mut Stage, run: Run) -> Aim {
    let (job, progress) = named(stage, &run).await;
    Aim { run: Some(run), job: Some(job), progress: Some(progress), blockers: Vec::new() }
}

/// The job's state, and its phase if it runs.
async fn is(stage: &Stage, aim: &Aim, state: &str, phase: Option<&str>) {
    let (api, job) = (stage.api(), aim.job.as_deref().expect("a named job"));
    until(&format!("{job} is {state} {phase:?}"), async || {
        let view = api.job(job).await?;
        anyhow::ensure!(view["state"] == state && phase.is_none_or(|phase| view["phase"] == phase), "{view}");
        Ok(Some(()))
    })
    .await;
}

async fn has_printed(stage: &Stage, aim: &mut Aim, bytes: u64) -> Result<()> {
    let (job, progress) = aim.job.as_ref().zip(aim.progress.as_mut()).expect("a followed job");
    stage.follows(job, progress, |at| at.has(bytes)).await
}

async fn submitted(stage: &mut Stage, moment: Moment) -> Result<Aim> {
    let then = if moment == Moment::Unheard { Then::HoldBody(0) } else { Then::HoldReply };
    let mut trap = stage.front.trap(Way::Up, "POST /v1/jobs HTTP", 1, then);
    let run = stage.run(unnamed_plan())?;
    sprung(&mut trap, |sprung| sprung.seen == 1 && (moment != Moment::Unanswered || sprung.answered == 1)).await?;
    ensure!(run.client.job().is_none(), "nobody has an answer");
    if moment != Moment::Arriving {
        let accepted = stage.unnamed().await?;
        ensure!(accepted.len() == usize::from(moment == Moment::Unanswered), "{moment:?}: {accepted:?}");
    }
    Ok(Aim { run: Some(run), ..Aim::default() })
}

async fn uploading(stage: &mut Stage) -> Result<Aim> {
    let mut trap = stage.front.trap(Way::Up, "POST /v1/packs", 1, Then::HoldBody(1_000));
    let run = stage.run(unnamed_plan())?;
    sprung(&mut trap, |sprung| sprung.seen == 1).await?;
    ensure!(run.client.job().is_none(), "nobody has an answer");
    Ok(Aim { run: Some(run), ..Aim::default() })
}

fn unnamed_plan() -> Plan {
    Plan { steps: steps(&["bytes:3000", "until:{gate}", "bytes:500"]), tree: 400_000, ..Plan::default() }
}

async fn queued(stage: &mut Stage) -> Result<Aim> {
    let gate = format!("until:{}", blockers_gate(stage).display());
    let mut blockers = Vec::new();
    for _ in 0..stage.links.len() * stage.slots() {
        let (job, mut progress) = stage.submit(&steps(&["bytes:2000", &gate])).await?;
        stage.follows(&job, &mut progress, |at| at.has(2_000)).await?;
        blockers.push(job);
    }
    let run = stage.run(Plan { steps: steps(&["bytes:3000"]), ..Plan::default() })?;
    let aim = Aim { blockers, ..held(stage, run).await };
    is(stage, &aim, "queued", None).await;
    Ok(aim)
}

async fn assigned(stage: &mut Stage, moment: Moment) -> Result<Aim> {
    // The worker has not heard of it, or nobody has heard that it accepted.
    let way = if moment == Moment::Unheard { Way::Down } else { Way::Up };
    stage.links.iter().for_each(|link| link.hold(way, Which::Sessions));
    let run = stage.run(Plan { steps: steps(&["bytes:3000", "until:{gate}"]), ..Plan::default() })?;
    let aim = held(stage, run).await;
    is(stage, &aim, "assigned", None).await;
    if way == Way::Up {
        let (job, dirs) = (aim.job.clone().expect("a named job"), spools(stage));
        until("the worker has accepted it", async || {
            Ok(dirs.iter().any(|dir| dir.join(format!("{job}.1/journal")).exists()).then_some(()))
        })
        .await;
    }
    Ok(aim)
}

fn spools(stage: &Stage) -> Vec<std::path::PathBuf> {
    (0..stage.links.len()).map(|number| stage.farm.worker_dir(number).join("spool")).collect()
}

/// A VM that boots for the job, or one that goes after it.
async fn vm(stage: &mut Stage, phase: Phase) -> Result<Aim> {
    let held_by = slow_vms(stage);
    mkfifo(&held_by, Mode::S_IRWXU)?;
    let slow = match phase {
        4 => json!({ "command": "run", "vm": "alloy-*", "times": 0, "fault": "agent_late", "while": held_by }),
        _ => json!({ "command": "delete", "vm": "alloy-*", "times": 1, "fault": "delay", "while": held_by }),
    };
    let doing = if phase == 4 { "tart run " } else { "tart delete " };
    if phase == 4 {
        // The warm VM is used up; the next one does not come up.
        stage.farm.all_warm().await;
        stage.farm.mac(0).faults(std::slice::from_ref(&slow));
        let first = stage.api().shell("true").await?;
        stage.follow(&first, &[]);
        stage.settle(&first).await?;
    } else {
        stage.farm.all_warm().await;
        stage.farm.mac(0).faults(std::slice::from_ref(&slow));
    }
    let run = stage.run(Plan { steps: steps(&["bytes:20000"]), ..Plan::default() })?;
    let aim = held(stage, run).await;
    match phase {
        4 => is(stage, &aim, "running", Some("preparing")).await,
        _ => is(stage, &aim, "succeeded", None).await,
    }
    let dir = stage.farm.mac(0).dir().to_owned();
    until(&format!("`{doing}` runs"), async || {
        Ok(processes_in(&dir).iter().any(|found| found.line.contains(doing)).then_some(()))
    })
    .await;
    stage.farm.mac(0).faults(&[]);
    Ok(aim)
}

async fn copying(stage: &mut Stage) -> Result<Aim> {
    let traps: Vec<_> =
        stage.links.iter().map(|link| link.trap(Way::Up, "/1/source HTTP", 1, Then::HoldReply)).collect();
    let run = stage.run(Plan { steps: steps(&["bytes:3000"]), tree: 50_000, ..Plan::default() })?;
    let aim = held(stage, run).await;
    until("a worker asks for the sources", async || {
        Ok(traps.iter().any(|trap| trap.borrow().answered == 1).then_some(()))
    })
    .await;
    is(stage, &aim, "running", Some("preparing")).await;
    Ok(aim)
}

async fn executing(stage: &mut Stage, phase: Phase) -> Result<Aim> {
    let (flow, least) = match phase {
        // Nothing of a host's is seen in a VM, no gate either.
        6 if stage.farm.has_macs() => ("stay:1", 5_000),
        6 => ("until:{gate}", 5_000),
        _ => ("flood:{gate}", 5_000 + stage.dice.roll(1_000_000)),
    };
    let run = stage.run(Plan { steps: steps(&["bytes:5000", flow, "bytes:77"]), ..Plan::default() })?;
    let mut aim = held(stage, run).await;
    has_printed(stage, &mut aim, least).await?;
    is(stage, &aim, "running", Some("executing")).await;
    Ok(aim)
}

async fn collecting(stage: &mut Stage, phase: Phase) -> Result<Aim> {
    // The command has ended and the worker asks how much of the artifact is there; or the artifact is on its way.
    let (words, then) = match phase {
        8 => ("HEAD /v1/attempts/", Then::HoldReply),
        _ => ("PUT /v1/attempts/", Then::HoldBody(1_000)),
    };
    let traps: Vec<_> = stage.links.iter().map(|link| link.trap(Way::Up, words, 1, then)).collect();
    let run = stage.run(Plan { steps: steps(&["bytes:3000"]), artifact: 300_000, ..Plan::default() })?;
    let aim = held(stage, run).await;
    until("the worker collects", async || Ok(traps.iter().any(|trap| trap.borrow().seen == 1).then_some(()))).await;
    is(stage, &aim, "running", Some("collecting")).await;
    Ok(aim)
}

async fn result_sent(stage: &mut Stage, moment: Moment) -> Result<Aim> {
    let run = stage.run(Plan { steps: steps(&["bytes:3000", "until:{gate}", "bytes:77"]), ..Plan::default() })?;
    let mut aim = held(stage, run).await;
    has_printed(stage, &mut aim, 3_000).await?;
    let job = aim.job.clone().expect("a named job");
    let link = stage.holder(&job).await?;
    // The farm does not have it, or has it and its word back is lost.
    let way = if moment == Moment::Unheard { Way::Up } else { Way::Down };
    stage.links[link].hold(way, Which::Sessions);
    aim.run.as_ref().expect("a run").open_gate()?;
    let journal = stage.farm.worker_dir(link).join(format!("spool/{job}.1/journal"));
    until("the result is on the worker's disk", async || {
        Ok(fs::read_to_string(&journal)?.contains("\"result\"").then_some(()))
    })
    .await;
    if way == Way::Down {
        is(stage, &aim, "succeeded", None).await;
        ensure!(journal.exists(), "the worker has let go of it without an answer");
    } else {
        ensure!(!is_terminal(&stage.api().job(&job).await?), "nobody has heard of the end");
    }
    Ok(aim)
}

async fn result_acked(stage: &mut Stage) -> Result<Aim> {
    fs::write(stage.dir.join("hold"), "")?;
    let traps: Vec<_> = stage.links.iter().map(|link| link.trap(Way::Down, "\"result_ack\"", 1, Then::Note)).collect();
    let run = stage.run(Plan { steps: steps(&["bytes:3000"]), artifact: 20_000, ..Plan::default() })?;
    let aim = held(stage, run).await;
    is(stage, &aim, "succeeded", None).await;
    let marked = stage.dir.join(format!("post-{}", aim.job.as_deref().unwrap_or_default()));
    until("the result is acknowledged and the VM still there", async || {
        Ok((traps.iter().any(|trap| trap.borrow().seen == 1) && marked.exists()).then_some(()))
    })
    .await;
    Ok(aim)
}

async fn downloading(stage: &mut Stage) -> Result<Aim> {
    let mut trap = stage.front.trap(Way::Up, ".bin HTTP", 1, Then::HoldReply);
    let run = stage.run(Plan { steps: steps(&["bytes:3000"]), artifact: 20_000, ..Plan::default() })?;
    let aim = held(stage, run).await;
    sprung(&mut trap, |sprung| sprung.answered == 1).await?;
    is(stage, &aim, "succeeded", None).await;
    Ok(aim)
}
