//! S: what is done to a farm's data on the orchestrator's own machine: backups, and the way back.

use std::path::PathBuf;

use orchestrator::backup::restore::{RestoreError, restore};
use orchestrator::backup::{self, BackupError};

use super::data::DataDir;
use crate::context::App;
use crate::output::talk::Tone;
use crate::output::{Failure, exit, plural, print_json, size};

/// Back up and restore the farm of this machine
#[derive(Debug, clap::Subcommand)]
pub(crate) enum DataVerb {
    Backup(BackupArgs),
    Restore(RestoreArgs),
}

/// Copy the farm's data, whole or not at all; the farm may run meanwhile
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  alloy admin backup /mnt/backups/farm-$(date +%F)")]
pub(crate) struct BackupArgs {
    /// Directory to make; it must not be there yet
    #[arg(value_name = "DIR")]
    target: PathBuf,
    #[command(flatten)]
    place: Place,
}

/// Make the farm of a backup, on a machine where there is none; stop the old one for good before
#[derive(Debug, clap::Args)]
pub(crate) struct RestoreArgs {
    /// What `alloy admin backup` made
    #[arg(value_name = "DIR")]
    backup: PathBuf,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, clap::Args)]
struct Place {
    /// The orchestrator's data directory [default: ~/.local/share/alloy]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

impl Place {
    fn farm(&self, app: &App) -> PathBuf {
        match &self.data_dir {
            Some(dir) => app.dir.join(dir).join("farm"),
            None => DataDir::new(&app.places.data).farm(),
        }
    }
}

pub(crate) async fn admin(app: &App, verb: &DataVerb) -> Result<i32, Failure> {
    match verb {
        DataVerb::Backup(args) => take(app, args).await,
        DataVerb::Restore(args) => bring_back(app, args).await,
    }
}

async fn take(app: &App, args: &BackupArgs) -> Result<i32, Failure> {
    let target = app.dir.join(&args.target);
    let taken = backup::take(&args.place.farm(app), &target, app.env.now().wall.rfc3339()).await;
    let taken = taken.map_err(|error| backup_failure(&error))?;
    if app.talk.json() {
        let files = taken.files;
        print_json(
            &serde_json::json!({ "backup": target, "files": files, "bytes": taken.bytes, "missing": taken.missing }),
        )?;
    }
    let what = format!("{}, {}", plural(taken.files as u64, "file"), size(taken.bytes));
    app.talk.verdict(Tone::Good, "✓", &format!("{what} in {}", target.display()), None);
    if taken.missing.is_empty() {
        return Ok(exit::OK);
    }
    for missing in &taken.missing {
        app.talk.warn(missing);
    }
    let count = plural(taken.missing.len() as u64, "file");
    Err(Failure::error(format!("the farm itself has lost or damaged {count}; everything else is in the backup"))
        .hint("an older backup may have them"))
}

fn backup_failure(error: &BackupError) -> Failure {
    let failure = Failure::error(error.to_string());
    match error {
        BackupError::NoFarm(_) => failure.hint("run it on the orchestrator's machine, and name its --data-dir"),
        BackupError::Exists(_) => failure.hint("a new directory for each backup; old ones can be deleted as a whole"),
        BackupError::Busy(_)
        | BackupError::Bucket(_)
        | BackupError::Place(_)
        | BackupError::Database(_)
        | BackupError::Io { .. } => failure,
    }
}

async fn bring_back(app: &App, args: &RestoreArgs) -> Result<i32, Failure> {
    let (from, farm) = (app.dir.join(&args.backup), args.place.farm(app));
    let restored = restore(&from, &farm, app.env.now().wall).await.map_err(|error| restore_failure(&error))?;
    let (files, bytes) = (restored.files, restored.bytes);
    if app.talk.json() {
        print_json(
            &serde_json::json!({ "farm": farm, "files": files, "bytes": bytes, "taken_at": restored.head.taken_at }),
        )?;
    }
    let what = format!("{}, {}, as of {}", plural(files as u64, "file"), size(bytes), restored.head.taken_at);
    app.talk.verdict(Tone::Good, "✓", &format!("{what} in {}", farm.display()), None);
    app.talk.hint(
        "start the orchestrator. Its first start waits until a minute after this, so that no worker still runs what \
         the old farm gave it",
    );
    Ok(exit::OK)
}

fn restore_failure(error: &RestoreError) -> Failure {
    let failure = Failure::error(error.to_string());
    match error {
        RestoreError::Live(_) => failure.hint("a farm that runs cannot be replaced: stop it first"),
        RestoreError::List { .. }
        | RestoreError::Damaged { .. }
        | RestoreError::Occupied(_)
        | RestoreError::Other(_) => failure,
    }
}
