//! S: `alloy image`: which images the workers have, and which they shall have.

use std::collections::BTreeMap;

use alloy_shared::env::Ms;
use alloy_shared::id::{Labels, WorkerId};
use alloy_shared::wire::image::{ImageReport, ImageView, ImageWant, PinRequest, PullRequest, WorkerImage};
use indicatif::ProgressBar;

use crate::context::{App, Farm};
use crate::farm::Hosted;
use crate::output::talk::Tone;
use crate::output::{Failure, ago, duration, exit, plural, print, print_json, size, stdout_is_terminal, table};
use crate::signals::Signals;

/// Between two looks at how far the workers are.
const LOOK_MS: u64 = 500;
/// So long the removal of an image is waited for. A worker that brings another one meanwhile removes it later.
const REMOVE_MS: u64 = 2 * 60_000;
/// A wait that is over this soon is not worth a line.
const QUIET_MS: u64 = 1_000;
/// Where nobody watches, progress is a line each time so much more has come.
const STEP_PERCENT: u8 = 10;

/// Bring, list, keep and remove images of VMs
#[derive(Debug, clap::Subcommand)]
pub(crate) enum ImageVerb {
    Pull(PullArgs),
    /// Show the images, and how far each worker is with them
    #[command(visible_alias = "ls")]
    List,
    Rm(RmArgs),
    Pin(PinArgs),
}

/// Have workers bring an image now, as its registry has it, and keep it
#[derive(Debug, clap::Args)]
pub(crate) struct PullArgs {
    /// Name in a registry, with a tag or a digest
    image: String,
    /// Only this worker (name, id, or the id's end); may be repeated
    #[arg(short, long, value_name = "WORKER")]
    worker: Vec<String>,
    /// Only workers with this label; may be repeated
    #[arg(short, long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// Return at once; the workers go on
    #[arg(short, long)]
    detach: bool,
}

/// Remove an image from every worker where nothing needs it
#[derive(Debug, clap::Args)]
pub(crate) struct RmArgs {
    image: String,
}

/// Keep an image from being evicted
#[derive(Debug, clap::Args)]
pub(crate) struct PinArgs {
    image: String,
    /// Let it go again
    #[arg(long)]
    off: bool,
}

pub(crate) async fn image(app: &App, verb: &ImageVerb) -> Result<i32, Failure> {
    let hosted = Hosted::open_to_read(app).await?;
    let farm = hosted.farm();
    match verb {
        ImageVerb::Pull(args) => pull(app, farm, args).await,
        ImageVerb::List => list(app, farm).await,
        ImageVerb::Rm(args) => remove(app, farm, args).await,
        ImageVerb::Pin(args) => pin(app, farm, args).await,
    }
}

async fn pull(app: &App, farm: &Farm, args: &PullArgs) -> Result<i32, Failure> {
    let mut labels = Labels::default();
    for pair in &args.label {
        labels.insert_pair(pair).map_err(|error| Failure::usage(format!("--label: {error}")))?;
    }
    let labels: BTreeMap<String, String> =
        labels.iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let mut workers = Vec::new();
    for worker in &args.worker {
        workers.push(super::admin::find(farm, worker).await?.id);
    }
    let mut signals = Signals::install()?;
    let request = PullRequest { name: args.image.clone(), workers, labels };
    let mut view = farm.client.pull_image(&request).await.map_err(|error| Failure::of(error, &farm.url))?;
    if view.workers.iter().all(|worker| !worker.wanted) {
        app.talk.warn("no worker that makes VMs is meant; those that come later bring it");
    }
    for worker in view.workers.iter().filter(|worker| worker.wanted && !worker.connected) {
        app.talk.say(&format!("{} is away: it brings the image when it is back", worker.worker_name));
    }
    let wish = view.generation;
    let mut shown = Shown::default();
    loop {
        if args.detach {
            break;
        }
        shown.show(app, &view);
        if view.generation != wish {
            shown.clear();
            return Err(Failure::error("somebody changed the wish meanwhile").hint("alloy image list"));
        }
        if view.workers.iter().filter(|worker| counts(worker)).all(|worker| is_over(worker, wish)) {
            break;
        }
        let look = async {
            app.env.sleep_until(app.env.now().mono + LOOK_MS).await;
            one(farm, &view.name).await
        };
        view = match signals.unless_told(look).await {
            Ok(view) => view?,
            Err(stopped) => {
                shown.clear();
                app.talk.hint("the workers go on: `alloy image list` shows how far they are");
                return Err(stopped);
            }
        };
    }
    shown.clear();
    finish(app, &view, wish, args.detach)
}

fn finish(app: &App, view: &ImageView, wish: i64, detached: bool) -> Result<i32, Failure> {
    let mut failed = 0;
    for worker in view.workers.iter().filter(|worker| counts(worker) && !detached) {
        let name = &worker.worker_name;
        match (&worker.report.failed, has_it(worker, wish)) {
            (_, true) => app.talk.verdict(Tone::Good, "✓", &format!("{name} has {}", short(&worker.report)), None),
            (Some(why), false) => {
                failed += 1;
                app.talk.verdict(Tone::Bad, "✗", &format!("{name} cannot get it: {}", why.message), None);
            }
            (None, false) => {}
        }
    }
    if app.talk.json() {
        print_json(view)?;
    }
    Ok(if failed > 0 { exit::ERROR } else { exit::OK })
}

/// Whose end is waited for.
fn counts(worker: &WorkerImage) -> bool {
    worker.wanted && worker.connected
}

fn has_it(worker: &WorkerImage, wish: i64) -> bool {
    worker.report.digest.is_some() && worker.report.generation >= wish
}

/// It has it, or the registry does not give it. Anything else is tried again.
fn is_over(worker: &WorkerImage, wish: i64) -> bool {
    has_it(worker, wish) || worker.report.failed.as_ref().is_some_and(|failed| failed.refused)
}

async fn one(farm: &Farm, name: &str) -> Result<ImageView, Failure> {
    let list = farm.client.images().await.map_err(|error| Failure::of(error, &farm.url))?;
    let found = list.images.into_iter().find(|view| view.name == name);
    found.ok_or_else(|| Failure::error(format!("the farm knows nothing of {name} any more")))
}

/// What was shown of each worker's progress.
#[derive(Default)]
struct Shown {
    bars: BTreeMap<WorkerId, ProgressBar>,
    lines: BTreeMap<WorkerId, (&'static str, u8)>,
}

impl Shown {
    fn show(&mut self, app: &App, view: &ImageView) {
        for worker in view.workers.iter().filter(|worker| counts(worker)) {
            let now = stage(&worker.report, view.generation);
            if app.talk.live() {
                self.bar(app, worker, &now);
            } else {
                self.line(app, worker, &now);
            }
        }
    }

    fn bar(&mut self, app: &App, worker: &WorkerImage, now: &Stage) {
        let total = worker.report.pulling.and_then(|pulling| pulling.total_bytes).unwrap_or(0);
        let bar = self.bars.entry(worker.worker).or_insert_with(|| app.talk.bytes_bar(&worker.worker_name, total));
        if total > 0 {
            bar.set_length(total);
            bar.set_position(total / 100 * u64::from(now.percent));
        }
        bar.set_message(now.text.clone());
    }

    fn line(&mut self, app: &App, worker: &WorkerImage, now: &Stage) {
        let step = (now.word, now.percent / STEP_PERCENT);
        if self.lines.insert(worker.worker, step) != Some(step) {
            app.talk.say(&format!("{}: {}", worker.worker_name, now.text));
        }
    }

    fn clear(&mut self) {
        self.bars.values().for_each(ProgressBar::finish_and_clear);
        self.bars.clear();
    }
}

/// How far a worker is.
struct Stage {
    word: &'static str,
    percent: u8,
    text: String,
}

fn stage(report: &ImageReport, wish: i64) -> Stage {
    let stage = |word, percent, text: String| Stage { word, percent, text };
    match (&report.pulling, &report.failed) {
        (Some(pulling), _) => {
            let of = pulling.total_bytes.map_or(String::new(), |bytes| format!(" of {}", size(bytes)));
            stage("pulling", pulling.percent, format!("pulling, {} %{of}", pulling.percent))
        }
        (None, Some(failed)) if failed.refused => stage("refused", 0, format!("cannot be had: {}", failed.message)),
        (None, Some(failed)) => stage("failed", 0, format!("did not come, trying again soon: {}", failed.message)),
        (None, None) if report.digest.is_some() && report.generation >= wish => stage("here", 100, "here".to_owned()),
        (None, None) if report.waiting => stage("waiting", 0, "waits for another image".to_owned()),
        (None, None) if report.digest.is_some() => stage("here", 100, "here".to_owned()),
        (None, None) => stage("asked", 0, "asked".to_owned()),
    }
}

async fn list(app: &App, farm: &Farm) -> Result<i32, Failure> {
    let list = farm.client.images().await.map_err(|error| Failure::of(error, &farm.url))?;
    if app.talk.json() {
        print_json(&list)?;
        return Ok(exit::OK);
    }
    let now = app.env.now().wall;
    let rows: Vec<Vec<String>> = list.images.iter().flat_map(|view| rows(view, now)).collect();
    if rows.is_empty() {
        app.talk.say("No images yet.");
        app.talk.hint("alloy image pull NAME   has the workers bring one");
    }
    let head = ["IMAGE", "KEPT", "WORKER", "STATE", "DIGEST", "SIZE", "USED"];
    print(&table(&head, &rows, stdout_is_terminal()))?;
    Ok(exit::OK)
}

/// One row a worker; one without for an image that nobody has and somebody wants.
fn rows(view: &ImageView, now: Ms) -> Vec<Vec<String>> {
    let kept = match (view.pinned, view.want) {
        (true, ImageWant::Present) => "wanted, pinned",
        (true, ImageWant::Absent | ImageWant::None) => "pinned",
        (false, ImageWant::Present) => "wanted",
        (false, ImageWant::Absent | ImageWant::None) => "–",
    };
    let nothing = || "–".to_owned();
    let row = |worker: &WorkerImage| {
        let report = &worker.report;
        let state = match stage(report, 0).text {
            _ if !worker.connected => "away".to_owned(),
            text if report.in_use && report.pulling.is_none() && report.digest.is_some() => format!("{text}, in use"),
            text => text,
        };
        let used = report.used_at_ms.map_or_else(nothing, |at| ago(&Ms(at).rfc3339(), now));
        vec![
            view.name.clone(),
            kept.to_owned(),
            worker.worker_name.clone(),
            state,
            short(report),
            report.size_bytes.map_or_else(nothing, size),
            used,
        ]
    };
    let is_told = |worker: &&WorkerImage| {
        let report = &worker.report;
        worker.wanted
            || report.digest.is_some()
            || report.pulling.is_some()
            || report.failed.is_some()
            || report.waiting
    };
    let mut rows: Vec<Vec<String>> = view.workers.iter().filter(is_told).map(row).collect();
    if rows.is_empty() && (view.pinned || view.want == ImageWant::Present) {
        let mut lonely = vec![view.name.clone(), kept.to_owned()];
        lonely.extend((0..5).map(|_| nothing()));
        rows.push(lonely);
    }
    rows
}

/// `sha256:0123456789ab`, or a dash.
fn short(report: &ImageReport) -> String {
    report.digest.as_ref().map_or_else(|| "–".into(), |digest| digest.chars().take("sha256:".len() + 12).collect())
}

async fn remove(app: &App, farm: &Farm, args: &RmArgs) -> Result<i32, Failure> {
    let mut signals = Signals::install()?;
    let mut view = farm.client.remove_image(&args.image).await.map_err(|error| Failure::of(error, &farm.url))?;
    let wish = view.generation;
    let started = app.env.now().mono;
    let mut said = false;
    loop {
        let passed_ms = app.env.now().mono.since(started);
        let open = awaited(&view, wish, passed_ms);
        if open.is_empty() {
            break;
        }
        if passed_ms >= QUIET_MS && !std::mem::replace(&mut said, true) {
            let most = duration(REMOVE_MS);
            app.talk.say(&format!("waiting for {} to remove it, up to {most}", open.join(", ")));
        }
        let look = async {
            app.env.sleep_until(app.env.now().mono + LOOK_MS).await;
            one(farm, &view.name).await
        };
        view = signals.unless_told(look).await??;
    }
    let keepers = keepers(&view);
    if keepers.is_empty() {
        app.talk.verdict(Tone::Good, "✓", &format!("no worker has {} any more", view.name), None);
    } else {
        let text =
            format!("{} is still on {}: {}", view.name, plural(keepers.len() as u64, "worker"), keepers.join(", "));
        app.talk.verdict(Tone::Note, "–", &text, None);
        app.talk
            .hint("what is away, uses it or is bringing another image removes it later; a worker's own image stays");
    }
    if app.talk.json() {
        print_json(&view)?;
    }
    Ok(exit::OK)
}

/// Whose removal is waited for after so long: nobody's once the wish is another one.
fn awaited(view: &ImageView, wish: i64, passed_ms: u64) -> Vec<&str> {
    if view.generation != wish || passed_ms >= REMOVE_MS {
        return Vec::new();
    }
    names(view, |worker| is_open(worker, wish))
}

/// Who has it at the end of the wait.
fn keepers(view: &ImageView) -> Vec<&str> {
    names(view, |worker| worker.report.digest.is_some())
}

/// Whose removal is worth a wait. One that needs the image says so and keeps it until then.
fn is_open(worker: &WorkerImage, wish: i64) -> bool {
    worker.connected && worker.report.generation < wish && !worker.report.in_use
}

fn names(view: &ImageView, counts: impl Fn(&WorkerImage) -> bool) -> Vec<&str> {
    view.workers.iter().filter(|worker| counts(worker)).map(|worker| worker.worker_name.as_str()).collect()
}

async fn pin(app: &App, farm: &Farm, args: &PinArgs) -> Result<i32, Failure> {
    let request = PinRequest { name: args.image.clone(), pinned: !args.off };
    let view = farm.client.pin_image(&request).await.map_err(|error| Failure::of(error, &farm.url))?;
    let how = if view.pinned { "is pinned: no worker evicts it" } else { "may be evicted" };
    app.talk.verdict(Tone::Good, "✓", &format!("{} {how}", view.name), None);
    if app.talk.json() {
        print_json(&view)?;
    }
    Ok(exit::OK)
}

#[cfg(test)]
mod tests {
    use alloy_shared::wire::image::{PullFailed, PullProgress};

    use super::*;

    fn on(name: &str, report: ImageReport) -> WorkerImage {
        let worker = WorkerId::from_raw(name.len() as u128);
        WorkerImage { worker, worker_name: name.into(), connected: true, wanted: true, report }
    }

    fn here(generation: i64) -> ImageReport {
        let digest = Some(format!("sha256:{}", "ab".repeat(32)));
        ImageReport { name: "r/a:1".into(), digest, size_bytes: Some(27 << 30), generation, ..ImageReport::default() }
    }

    fn failed(refused: bool) -> ImageReport {
        ImageReport { failed: Some(PullFailed { message: "404".into(), refused }), ..ImageReport::default() }
    }

    #[test]
    fn a_pull_is_over_for_a_worker_when_it_has_the_image_or_cannot_have_it() {
        let pulling = PullProgress { percent: 37, total_bytes: Some(25_000_000_000) };
        for (report, text, over) in [
            (ImageReport::default(), "asked", false),
            (ImageReport { waiting: true, ..here(3) }, "waits for another image", false),
            (ImageReport { pulling: Some(pulling), ..here(3) }, "pulling, 37 % of 25.0 GB", false),
            (here(7), "here", true),
            (failed(true), "cannot be had: 404", true),
            (failed(false), "did not come, trying again soon: 404", false),
        ] {
            let worker = on("mini", report);
            assert_eq!((stage(&worker.report, 7).text.as_str(), is_over(&worker, 7)), (text, over));
        }
    }

    #[test]
    fn a_removal_waits_for_workers_that_are_there_and_have_not_done_it() {
        let using = ImageReport { in_use: true, ..here(7) };
        let mut away = on("away", here(7));
        away.connected = false;
        let gone = ImageReport { digest: None, ..here(8) };
        let workers = vec![on("still", here(7)), on("gone", gone), on("uses", using), away];
        let view = ImageView { name: "r/a:1".into(), want: ImageWant::Absent, pinned: false, generation: 8, workers };
        for (wish, passed_ms, expected) in
            [(8, 0, &["still"][..]), (8, REMOVE_MS - 1, &["still"]), (8, REMOVE_MS, &[]), (7, 0, &[])]
        {
            assert_eq!(awaited(&view, wish, passed_ms), expected, "{wish} after {passed_ms} ms");
        }
        assert_eq!(keepers(&view), ["still", "uses", "away"], "who was waited for in vain too");
    }

    #[test]
    fn rows_say_who_has_what_and_what_is_kept() {
        let mut away = on("shed", ImageReport::default());
        away.connected = false;
        let in_use = ImageReport { in_use: true, ..here(7) };
        let mut view = ImageView {
            name: "r/a:1".into(),
            want: ImageWant::Present,
            pinned: true,
            generation: 7,
            workers: vec![on("mini", in_use), away],
        };
        let shown: Vec<String> = rows(&view, Ms(0)).iter().map(|row| row.join(" ")).collect();
        let digest = "sha256:abababababab";
        let expected = [
            format!("r/a:1 wanted, pinned mini here, in use {digest} 29.0 GB –"),
            "r/a:1 wanted, pinned shed away – – –".into(),
        ];
        assert_eq!(shown, expected);
        view.workers.clear();
        assert_eq!(rows(&view, Ms(0)), [["r/a:1", "wanted, pinned", "–", "–", "–", "–", "–"].map(str::to_owned)]);
        (view.pinned, view.want) = (false, ImageWant::Absent);
        assert_eq!(rows(&view, Ms(0)), Vec::<Vec<String>>::new());
    }
}
