//! S: what is done to a farm's data on the orchestrator's own machine: backups, the way back, and the move to Postgres.

use std::path::PathBuf;
use std::sync::Arc;

use alloy_shared::config::{Origin, Problem};
use orchestrator::backup::elsewhere::Source;
use orchestrator::backup::restore::{RestoreError, restore};
use orchestrator::backup::{self, BackupError};
use orchestrator::config::{Config, Database, Flags};
use orchestrator::moving::{self, Begun, Counts, Heard, MoveError, Mover, To};
use orchestrator::program::read_file;
use orchestrator::store::sql::{DataLock, LockError, OpenError};
use tokio_util::sync::CancellationToken;

use super::host::{problems_failure, variables};
use crate::context::App;
use crate::output::talk::Tone;
use crate::output::{Failure, Fault, exit, plural, print_json, size};
use crate::signals::Signals;

const NO_FARM_HINT: &str = "run it on the orchestrator's machine, and name its --data-dir";
const ADDRESS: &str = "postgres://USER:PASSWORD@HOST:5432/DATABASE";
/// Between two looks whether the farm has stopped.
const LOOK_AGAIN_MS: u64 = 100;

/// Back up, restore and move the farm of this machine
#[derive(Debug, clap::Subcommand)]
pub(crate) enum DataVerb {
    Backup(BackupArgs),
    Restore(RestoreArgs),
    MigrateDb(MigrateArgs),
}

/// Copy the farm's data, whole or not at all; the farm may run meanwhile
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  alloy admin backup /mnt/backups/alloy/farm-$(date +%F)")]
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

/// Move the farm into an empty Postgres, and its bytes into a bucket; most of it while the farm runs
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  alloy admin migrate-db --to-database postgres://alloy@db/farm --to-s3 s3://farm-bytes/alloy\n\n\
    It may be interrupted and goes on where it was. The bucket's endpoint and keys are variables, as for the orchestrator."
)]
pub(crate) struct MigrateArgs {
    /// Address of the Postgres [default: DATABASE_URL]
    #[arg(long, value_name = "URL")]
    to_database: Option<String>,
    /// Bucket for the bytes; without it they stay where they are [default: ALLOY_S3_URL]
    #[arg(long, value_name = "s3://BUCKET/PREFIX")]
    to_s3: Option<String>,
    /// Bring what there is by now and leave the rest to another time
    #[arg(long)]
    copy_only: bool,
    /// Leave out what the farm has lost or damaged already
    #[arg(long)]
    leave_damaged: bool,
    #[command(flatten)]
    data: Data,
}

#[derive(Debug, clap::Args)]
struct Data {
    /// The orchestrator's data directory [default: ~/.local/share/alloy]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// The orchestrator's configuration file [default: ~/.config/alloy/orchestrator.toml, without --data-dir]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    elsewhere: Elsewhere,
}

/// The options by which every other command finds its farm, here only to be refused.
#[derive(Debug, clap::Args)]
struct Elsewhere {
    #[arg(long, hide = true)]
    url: Option<String>,
    #[arg(long, hide = true)]
    context: Option<String>,
    #[arg(long, hide = true)]
    local: bool,
}

impl Elsewhere {
    fn refuse(&self) -> Result<(), Failure> {
        let given = [("--url", self.url.is_some()), ("--context", self.context.is_some()), ("--local", self.local)];
        match given.iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(Failure::usage(format!(
                "{flag} chooses a farm to talk to; this talks to none, it works on a farm's data on this machine"
            ))
            .hint(NO_FARM_HINT)),
            None => Ok(()),
        }
    }
}

#[derive(Debug, clap::Args)]
struct Place {
    #[command(flatten)]
    data: Data,
    /// Address of the farm's Postgres [default: DATABASE_URL, if DATABASE_MODE is not local]
    #[arg(long, value_name = "URL")]
    database_url: Option<String>,
}

impl Data {
    /// As the orchestrator is told by the same variables and file, with this database and this bucket if they are named.
    fn config(&self, app: &App, database: Option<&str>, bucket: Option<&str>) -> Result<Config, Failure> {
        let mut variables = variables();
        variables.retain(|name, _| !matches!(name.as_str(), "BASE_URL" | "ALLOY_LISTEN" | "ALLOY_BEHIND_PROXY"));
        if let Some(url) = database {
            if !["postgres://", "postgresql://"].iter().any(|start| url.starts_with(start)) {
                return Err(Failure::usage("the database's address does not begin with postgres://").hint(ADDRESS));
            }
            variables.insert("DATABASE_URL".to_owned(), url.to_owned());
            variables.insert("DATABASE_MODE".to_owned(), "postgres".to_owned());
        }
        if let Some(url) = bucket {
            variables.insert("ALLOY_S3_URL".to_owned(), url.to_owned());
        }
        let here = |path: &PathBuf| app.dir.join(path);
        // A directory that is named is a farm that is named: the usual file may tell of another one.
        let file = match (&self.config, &self.data_dir) {
            (None, Some(_)) => None,
            (named, _) => read_file(named.as_ref().map(here).as_deref(), &variables).map_err(Failure::usage)?,
        };
        let flags = Flags {
            data_dir: self.data_dir.as_ref().map(|dir| here(dir).display().to_string()),
            // Nothing listens here.
            listen: Some("127.0.0.1:0".to_owned()),
            ..Flags::default()
        };
        let resolved = Config::resolve(&flags, &variables, file);
        resolved.map(|(config, _)| config).map_err(|problems| {
            let problems = problems.into_iter().map(|problem| if bucket.is_some() { blamed(problem) } else { problem });
            problems_failure(&problems.collect::<Vec<_>>())
        })
    }
}

/// The orchestrator knows a bucket by its variable; here an option has named it.
fn blamed(problem: Problem) -> Problem {
    match problem.origin {
        Origin::Variable("ALLOY_S3_URL") => Problem { origin: Origin::Flag("--to-s3"), ..problem },
        _ => problem,
    }
}

impl Place {
    fn config(&self, app: &App) -> Result<Config, Failure> {
        self.data.config(app, self.database_url.as_deref(), None)
    }
}

fn postgres(config: &Config) -> Option<&str> {
    match &config.database {
        Database::Postgres(url) => Some(url.expose()),
        Database::Local => None,
    }
}

pub(crate) async fn admin(app: &App, verb: &DataVerb) -> Result<i32, Failure> {
    let data = match verb {
        DataVerb::Backup(args) => &args.place.data,
        DataVerb::Restore(args) => &args.place.data,
        DataVerb::MigrateDb(args) => &args.data,
    };
    data.elsewhere.refuse()?;
    match verb {
        DataVerb::Backup(args) => take(app, args).await,
        DataVerb::Restore(args) => bring_back(app, args).await,
        DataVerb::MigrateDb(args) => migrate(app, args).await,
    }
}

async fn take(app: &App, args: &BackupArgs) -> Result<i32, Failure> {
    let target = app.dir.join(&args.target);
    let (config, at) = (args.place.config(app)?, app.env.now().wall.rfc3339());
    let farm = config.farm_dir();
    let (database, bucket) = (postgres(&config), config.s3.as_ref());
    let (mut signals, stop) = (Signals::install()?, CancellationToken::new());
    let taking = async {
        match (database, bucket) {
            (None, None) => backup::take(&farm, &target, at, &stop).await,
            _ => {
                let source = Source { farm: &farm, database, bucket };
                backup::elsewhere::take(source, &target, at, app.env.clone(), &stop).await
            }
        }
    };
    // It removes what it has copied, unless it is told a second time.
    let (taken, _) = signals.finish_unless_told_twice(taking, || stop.cancel()).await?;
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
        BackupError::NoFarm(_) => failure.hint(NO_FARM_HINT),
        BackupError::Exists(_) => failure.hint("a new directory for each backup; old ones can be deleted as a whole"),
        BackupError::Nowhere(_) => failure.hint("mount the disk for backups, or make the directory first"),
        BackupError::NoFarmThere => {
            failure.hint("DATABASE_URL names the farm's database; a move into it may not be over")
        }
        BackupError::Database(error) => database_hint(failure, error),
        BackupError::Stopped => Failure::new(Fault::Interrupted, failure.message),
        BackupError::Left { .. }
        | BackupError::Foreign(_)
        | BackupError::Busy(_)
        | BackupError::Moved(_)
        | BackupError::Objects(_)
        | BackupError::Blob(_)
        | BackupError::Place(_)
        | BackupError::Io { .. } => failure,
    }
}

async fn bring_back(app: &App, args: &RestoreArgs) -> Result<i32, Failure> {
    let (from, config) = (app.dir.join(&args.backup), args.place.config(app)?);
    if let Some(database) = postgres(&config) {
        return bring_back_there(app, &from, database, &config).await;
    }
    let farm = config.farm_dir();
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
        RestoreError::Damaged { .. } => failure
            .hint("restore another backup, or remove farm.restoring: until then no farm starts in this data directory"),
        RestoreError::Other(_) => {
            failure.hint("run it again: until it is whole, no farm starts in this data directory")
        }
        RestoreError::List { .. } | RestoreError::Occupied(_) | RestoreError::Mounted(_) => failure,
    }
}

/// Into a Postgres, and into a bucket if one is named.
async fn bring_back_there(app: &App, from: &std::path::Path, database: &str, config: &Config) -> Result<i32, Failure> {
    let farm = config.farm_dir();
    let lock = DataLock::acquire(&farm).map_err(|error| Failure::error(error.to_string()))?;
    let to = To { database: database.to_owned(), bucket: config.s3.clone() };
    let (line, heard) = progress(app, "Restoring");
    let restored = moving::restore(from, &farm, to, app.env.now().wall, heard, app.env.clone()).await;
    line.finish_and_clear();
    drop(lock);
    let (head, counts) = restored.map_err(|error| move_failure(&error))?;
    if app.talk.json() {
        let Counts { rows, objects, logs, bytes } = &counts;
        print_json(
            &serde_json::json!({ "rows": rows, "objects": objects, "logs": logs, "bytes": bytes, "taken_at": head.taken_at }),
        )?;
    }
    app.talk.verdict(Tone::Good, "✓", &format!("{}, as of {}", told(&counts), head.taken_at), None);
    app.talk.hint(
        "start one orchestrator. Its first start waits until a minute after this, so that no worker still runs what the \
         old farm gave it",
    );
    Ok(exit::OK)
}

fn told(counts: &Counts) -> String {
    let Counts { rows, objects, logs, bytes } = counts;
    format!("{}, {}, {}, {}", plural(*rows, "row"), plural(*objects, "object"), plural(*logs, "log"), size(*bytes))
}

/// A line that says how far it is, while a person watches.
fn progress(app: &App, label: &str) -> (indicatif::ProgressBar, Heard) {
    let line = app.talk.spinner(label, "");
    let shown = line.clone();
    let heard = move |counts: &Counts| {
        let Counts { objects, logs, bytes, .. } = counts;
        shown.set_message(format!("{}, {}, {}", plural(*objects, "object"), plural(*logs, "log"), size(*bytes)));
    };
    (line, Arc::new(heard))
}

/// What programs read of a move.
fn json(state: &str, to: &str, counts: &Counts, damaged: &[String]) -> serde_json::Value {
    let Counts { rows, objects, logs, bytes } = counts;
    serde_json::json!({
        "state": state, "to": to, "rows": rows, "objects": objects, "logs": logs, "bytes": bytes, "damaged": damaged,
    })
}

async fn migrate(app: &App, args: &MigrateArgs) -> Result<i32, Failure> {
    let given = args.to_database.clone().or_else(|| App::var("DATABASE_URL"));
    let database = given.ok_or_else(|| {
        Failure::usage("no database is named that the farm shall move to: give --to-database, or set DATABASE_URL")
            .hint(format!("alloy admin migrate-db --to-database {ADDRESS}"))
    })?;
    let config = args.data.config(app, Some(&database), args.to_s3.as_deref())?;
    let mut signals = Signals::install()?;
    let to = To { database, bucket: config.s3.clone() };
    let moved = signals.unless_told(move_farm(app, args, &config, to)).await;
    moved.map_err(|failure| failure.hint("what was brought stays there: the same command goes on from here"))?
}

async fn move_farm(app: &App, args: &MigrateArgs, config: &Config, to: To) -> Result<i32, Failure> {
    let farm = config.farm_dir();
    let (line, heard) = progress(app, "Bringing");
    let begun = Mover::open(&farm, to, heard, app.env.clone()).await.map_err(|error| move_failure(&error))?;
    let mut mover = match begun {
        Begun::Going(mover) => mover,
        Begun::Done { to } => {
            line.finish_and_clear();
            if app.talk.json() {
                print_json(&serde_json::json!({ "state": "moved", "to": to }))?;
            }
            app.talk.verdict(Tone::Good, "✓", &format!("the farm is in {to}"), None);
            return Ok(exit::OK);
        }
    };
    let to = mover.to().to_owned();
    let mut counts = mover.bulk().await.map_err(|error| move_failure(&error))?;
    app.talk.step("Brought", &told(&counts));
    while mover.lags() {
        counts = mover.bulk().await.map_err(|error| move_failure(&error))?;
        app.talk.step("By now", &told(&counts));
    }
    line.finish_and_clear();
    for damaged in mover.damaged() {
        app.talk.warn(damaged);
    }
    if args.copy_only {
        if app.talk.json() {
            print_json(&json("copied", &to, &counts, mover.damaged()))?;
        }
        app.talk.hint("run it again without --copy-only to bring what is new, with the farm stopped, and to finish");
        return Ok(exit::OK);
    }
    let lock = stopped(app, &farm).await?;
    let (counts, left) = mover.finish(&lock, args.leave_damaged).await.map_err(|error| move_failure(&error))?;
    if app.talk.json() {
        print_json(&json("moved", &to, &counts, &left))?;
    }
    app.talk.verdict(Tone::Good, "✓", &format!("{}, all compared; the farm is in {to}", told(&counts)), None);
    if !left.is_empty() {
        app.talk.warn(&format!("left out, because it is damaged here: {}", left.join("; ")));
    }
    let bucket = if config.s3.is_some() { ", and ALLOY_S3_URL with its keys" } else { " and the same --data-dir" };
    app.talk.hint(&format!("start the orchestrator now, with DATABASE_MODE=postgres, DATABASE_URL{bucket}"));
    Ok(exit::OK)
}

/// The farm's lock, as soon as nobody runs it.
async fn stopped(app: &App, farm: &std::path::Path) -> Result<DataLock, Failure> {
    let mut said = false;
    loop {
        match DataLock::acquire(farm) {
            Ok(lock) => return Ok(lock),
            Err(LockError::Taken { pid, .. }) if !said => {
                let by = pid.map_or(String::new(), |pid| format!(" (process {pid})"));
                let wish = format!("Stop the orchestrator{by} now; jobs go on meanwhile for up to 40 seconds.");
                // Programs must hear it too: nothing goes on without it.
                if app.talk.json() {
                    app.talk.warn(&wish)
                } else {
                    app.talk.say(&wish)
                }
                said = true;
            }
            Err(LockError::Taken { .. }) => {}
            Err(error) => return Err(Failure::error(error.to_string())),
        }
        app.env.sleep_until(app.env.now().mono + LOOK_AGAIN_MS).await;
    }
}

fn move_failure(error: &MoveError) -> Failure {
    let failure = Failure::error(error.to_string());
    match error {
        MoveError::NoFarm(_) => failure.hint(NO_FARM_HINT),
        MoveError::Damaged(_) => failure.hint("put it back from a backup, or say --leave-damaged"),
        MoveError::Occupied(_) => failure.hint("createdb makes an empty database: name that one"),
        MoveError::Busy(_) => failure.hint("wait until it has ended, or stop it: either can be run again"),
        MoveError::Wrong { .. } => failure.hint("run it again: what is right there is not brought again"),
        MoveError::Differs { .. } => failure.hint("nothing says that the farm is there: the old one is still the farm"),
        MoveError::InBucket(_) => failure.hint("leave --to-s3 and ALLOY_S3_URL out, or name the same place"),
        MoveError::NotOurs(_) => failure.hint("name another bucket or prefix with --to-s3 or ALLOY_S3_URL"),
        MoveError::Database(error) | MoveError::Backup(BackupError::Database(error)) => database_hint(failure, error),
        MoveError::InUse(_)
        | MoveError::List { .. }
        | MoveError::BadBackup { .. }
        | MoveError::Gone(_)
        | MoveError::Place(_)
        | MoveError::Store(_)
        | MoveError::Bucket(_)
        | MoveError::Blob(_)
        | MoveError::Log(_)
        | MoveError::Backup(_)
        | MoveError::Io { .. } => failure,
    }
}

fn database_hint(failure: Failure, error: &OpenError) -> Failure {
    match error {
        OpenError::Url(_) | OpenError::TransactionPooler => Failure::usage(failure.message),
        OpenError::Migrate(_) => {
            failure.hint("its tables are not those of any version of Alloy: give the farm a database of its own")
        }
        OpenError::OldSqlite { .. }
        | OpenError::Damaged { .. }
        | OpenError::PooledByTransaction
        | OpenError::Newer(_)
        | OpenError::Postgres { .. }
        | OpenError::File { .. }
        | OpenError::Db(_)
        | OpenError::Io { .. } => failure,
    }
}
