//! S: `alloy artifacts`: the list, and files of one's choice.

use std::path::PathBuf;

use alloy_shared::id::Digest;
use alloy_shared::wire::job::{ArtifactView, JobView};
use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use sha2::Digest as _;
use tokio::sync::mpsc;

use super::run::tell_artifacts;
use crate::context::{App, Farm};
use crate::download::{Downloader, News, Target};
use crate::farm::Hosted;
use crate::job_arg::JobArg;
use crate::output::{Failure, Fault, Sink, exit, print, print_json, size, stdout_is_terminal, table};
use crate::signals::Signals;

/// List a job's artifacts, or get them
#[derive(Debug, clap::Args)]
pub(crate) struct ArtifactsArgs {
    #[command(subcommand)]
    pub(crate) verb: Option<ArtifactsVerb>,
    /// Id, at least 6 of its last characters, or URL; default: the latest job of this directory
    pub(crate) job: Option<String>,
}

#[derive(Debug, clap::Subcommand)]
pub(crate) enum ArtifactsVerb {
    Get(GetArgs),
}

/// Download artifacts, verified
#[derive(Debug, clap::Args)]
pub(crate) struct GetArgs {
    /// Job first (default: the latest of this directory), then globs (default: all)
    #[arg(value_name = "JOB|GLOB")]
    pub(crate) what: Vec<String>,
    /// Directory to write to, or `-` for one file on standard output; default: ./alloy-out/JOB
    #[arg(short, long, value_name = "DIR")]
    pub(crate) output: Option<PathBuf>,
}

pub(crate) async fn artifacts(app: &App, args: &ArtifactsArgs) -> Result<i32, Failure> {
    if let (Some(_), Some(job)) = (&args.verb, &args.job) {
        return Err(Failure::usage(format!("`{job}` stands before `get`; the job comes after it")));
    }
    let hosted = Hosted::open_to_read(app).await?;
    match &args.verb {
        Some(ArtifactsVerb::Get(args)) => get(app, hosted.farm(), args).await,
        None => list(app, hosted.farm(), args.job.as_deref()).await,
    }
}

async fn list(app: &App, farm: &Farm, job: Option<&str>) -> Result<i32, Failure> {
    let job = app.job(farm, job).await?;
    let list = farm.client.artifacts(job.id).await.map_err(|error| Failure::of(error, &farm.url))?;
    if app.talk.json() {
        print_json(&list)?;
        return Ok(exit::OK);
    }
    if list.artifacts.is_empty() {
        app.talk.say(&format!("{} has no artifacts.", job.id));
    }
    let rows: Vec<Vec<String>> = list.artifacts.iter().map(row).collect();
    print(&table(&["NAME", "SIZE", "SHA-256"], &rows, stdout_is_terminal()))?;
    Ok(exit::OK)
}

fn row(artifact: &ArtifactView) -> Vec<String> {
    match &artifact.link {
        Some(target) => vec![format!("{} -> {target}", artifact.path), "link".into(), "–".into()],
        None => vec![artifact.path.clone(), size(artifact.size_bytes), artifact.sha256.to_string()],
    }
}

async fn get(app: &App, farm: &Farm, args: &GetArgs) -> Result<i32, Failure> {
    let mut signals = Signals::install()?;
    let (job, globs_given) = split(&args.what);
    let globs = patterns(globs_given)?;
    let job = app.job(farm, job).await?;
    let list = farm.client.artifacts(job.id).await.map_err(|error| Failure::of(error, &farm.url))?;
    let chosen: Vec<ArtifactView> =
        list.artifacts.into_iter().filter(|artifact| chosen(globs.as_ref(), &artifact.path)).collect();
    if chosen.is_empty() {
        return Err(none_of(&job, globs_given));
    }
    if args.output.as_deref().is_some_and(|path| path.as_os_str() == "-") {
        let [one] = chosen.as_slice() else {
            return Err(Failure::usage(format!("{} artifacts are meant; `-o -` takes one", chosen.len())));
        };
        return signals.unless_told(to_stdout(app, farm, &job, one)).await?;
    }
    let target = match &args.output {
        Some(dir) => Target::Dir(app.dir.join(dir)),
        None => Target::Collection(app.dir.clone()),
    };
    let downloader = Downloader { client: farm.client.clone(), job: job.id, target, talk: app.talk.clone() };
    let (tx, rx) = mpsc::channel(1);
    // The channel has room for it.
    let _ = tx.try_send(News::All(chosen));
    let report = signals.unless_told(downloader.run(rx)).await?;
    if app.talk.json() {
        let saved: Vec<_> =
            report.saved.iter().map(|(path, size)| serde_json::json!({ "path": path, "size_bytes": size })).collect();
        print_json(
            &serde_json::json!({ "dir": report.dir, "saved": saved, "not_created": report.unsafe_ones.values().collect::<Vec<_>>() }),
        )?;
    }
    Ok(if tell_artifacts(app, &report) { exit::OK } else { exit::ERROR })
}

fn none_of(job: &JobView, globs: &[String]) -> Failure {
    let what = match globs {
        [] => format!("{} has no artifacts", job.id),
        [one] => format!("no artifact of {} matches `{one}`", job.id),
        many => format!("no artifact of {} matches any of `{}`", job.id, many.join("`, `")),
    };
    Failure::new(Fault::NotFound, what).hint(format!("alloy artifacts {}   lists them", job.id))
}

/// The first argument is the job if it can be one.
fn split(what: &[String]) -> (Option<&str>, &[String]) {
    match what.split_first() {
        Some((first, rest)) if JobArg::looks_like_job(first) => (Some(first), rest),
        Some(_) | None => (None, what),
    }
}

fn patterns(globs: &[String]) -> Result<Option<GlobSet>, Failure> {
    if globs.is_empty() {
        return Ok(None);
    }
    let mut set = GlobSetBuilder::new();
    for text in globs {
        // A pattern without a slash means the name, wherever the file lies.
        let pattern = if text.contains('/') { text.clone() } else { format!("**/{text}") };
        let glob = GlobBuilder::new(&pattern).literal_separator(true).build();
        set.add(glob.map_err(|error| Failure::usage(format!("`{text}` is no glob: {}", error.kind())))?);
    }
    set.build().map(Some).map_err(|error| Failure::usage(error.to_string()))
}

fn chosen(globs: Option<&GlobSet>, path: &str) -> bool {
    globs.is_none_or(|globs| globs.is_match(path))
}

/// The digest is known only at the end: a reader sees the exit code, as it does with every stream.
async fn to_stdout(app: &App, farm: &Farm, job: &JobView, artifact: &ArtifactView) -> Result<i32, Failure> {
    if artifact.link.is_some() {
        return Err(Failure::usage(format!("`{}` is a link: it has no bytes", artifact.path)));
    }
    let mut sink = Sink::stdout(&app.talk).map_err(|error| Failure::io("standard output", &error))?;
    let mut hasher = sha2::Sha256::new();
    let mut bytes = farm.client.download(job.id, &artifact.path, 0);
    while let Some(piece) = bytes.recv().await {
        let piece = piece.map_err(|error| Failure::of(error, &farm.url))?;
        hasher.update(&piece);
        sink.write(piece).await?;
    }
    sink.finish().await?;
    let digest = Digest::from_hasher(hasher);
    if digest != artifact.sha256 {
        return Err(Failure::error(format!("`{}` arrived damaged: its SHA-256 is {digest}", artifact.path)));
    }
    Ok(exit::OK)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::Cli;
    use crate::commands::Command;

    fn split_of(words: &[&str]) -> (Option<String>, Vec<String>) {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let (job, globs) = split(&words);
        (job.map(str::to_owned), globs.to_vec())
    }

    #[test]
    fn the_first_argument_may_be_a_job_or_a_glob() {
        assert_eq!(split_of(&[]), (None, vec![]));
        assert_eq!(split_of(&["*.zip"]), (None, vec!["*.zip".into()]));
        assert_eq!(split_of(&["abc123", "*.zip"]), (Some("abc123".into()), vec!["*.zip".into()]));
        assert_eq!(split_of(&["http://f/jobs/job_1"]), (Some("http://f/jobs/job_1".into()), vec![]));
        assert_eq!(split_of(&["MyApp.app.zip"]), (None, vec!["MyApp.app.zip".into()]));
    }

    #[test]
    fn flags_that_every_command_takes_may_stand_before_get() {
        let parse = |line: &[&str]| match Cli::try_parse_from([&["alloy", "artifacts"], line].concat()).unwrap().command
        {
            Command::Artifacts(args) => (args.job, args.verb.map(|ArtifactsVerb::Get(args)| args.what)),
            other => panic!("{other:?}"),
        };
        let get = |what: &[&str]| (None, Some(what.iter().map(|word| (*word).to_owned()).collect()));
        assert_eq!(parse(&["--local", "get", "*.zip"]), get(&["*.zip"]));
        assert_eq!(parse(&["get", "--local", "*.zip"]), get(&["*.zip"]));
        assert_eq!(parse(&["--local", "abc123"]), (Some("abc123".to_owned()), None));
    }

    #[test]
    fn what_matches_nothing_is_named() {
        let job = crate::verdict::tests::ended(&alloy_shared::wire::job::End::success());
        let told = |globs: &[&str]| {
            let globs: Vec<String> = globs.iter().map(|glob| (*glob).to_owned()).collect();
            none_of(&job, &globs).message.replace(&job.id.to_string(), "it")
        };
        assert_eq!(told(&[]), "it has no artifacts");
        assert_eq!(told(&["*.zip"]), "no artifact of it matches `*.zip`");
        assert_eq!(told(&["*.zip", "a"]), "no artifact of it matches any of `*.zip`, `a`");
    }

    #[test]
    fn globs_choose_by_name_or_by_path() {
        let globs = |list: &[&str]| patterns(&list.iter().map(|glob| (*glob).to_owned()).collect::<Vec<_>>()).unwrap();
        for (list, path, hit) in [
            (&[][..], "a/b.zip", true),
            (&["*.zip"], "b.zip", true),
            (&["*.zip"], "a/b.zip", true),
            (&["a/*.zip"], "a/b.zip", true),
            (&["a/*.zip"], "a/c/b.zip", false),
            (&["a/**"], "a/c/b.zip", true),
            (&["x", "*.txt"], "b.zip", false),
        ] {
            assert_eq!(chosen(globs(list).as_ref(), path), hit, "{list:?} {path}");
        }
        assert_eq!(patterns(&["[".to_owned()]).unwrap_err().fault, Fault::Usage);
    }
}
