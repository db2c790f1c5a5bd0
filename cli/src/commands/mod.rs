//! S: the list of commands.

pub(crate) mod admin;
pub(crate) mod artifacts;
pub(crate) mod cancel;
pub(crate) mod image;
pub(crate) mod jobs;
pub(crate) mod member;
mod reach;
pub(crate) mod retention;
pub(crate) mod run;
pub(crate) mod setup;
mod submit;

use alloy_shared::wire::source::{Entry, EntryKind};

use crate::context::App;
use crate::output::sanitize::one_line;
use crate::output::{Failure, exit, plural, print, print_json, size};
use crate::source;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    Run(Box<run::RunArgs>),
    #[cfg(feature = "farm")]
    Up(crate::farm::up::UpArgs),
    #[command(subcommand)]
    Admin(AdminVerb),
    Attach(jobs::AttachArgs),
    Logs(jobs::LogsArgs),
    #[command(visible_aliases = ["ls", "jobs", "ps"])]
    List(jobs::ListArgs),
    Status(jobs::StatusArgs),
    Cancel(cancel::CancelArgs),
    Artifacts(artifacts::ArtifactsArgs),
    #[command(subcommand)]
    Source(SourceVerb),
    #[command(subcommand)]
    Worker(admin::WorkerVerb),
    #[command(subcommand, visible_alias = "images")]
    Image(image::ImageVerb),
    Login(setup::LoginArgs),
    #[command(subcommand)]
    Context(setup::ContextVerb),
    #[command(subcommand)]
    Token(admin::TokenVerb),
    #[command(subcommand)]
    Config(setup::ConfigVerb),
    /// Look whether this machine and the farm understand each other
    Doctor,
    Completions(setup::CompletionsArgs),
}

/// Look after the farm: its members, how long it keeps things, and on its own machine its data
#[derive(Debug, clap::Subcommand)]
pub(crate) enum AdminVerb {
    #[command(subcommand)]
    Member(member::MemberVerb),
    #[command(subcommand)]
    Retention(retention::RetentionVerb),
    #[cfg(feature = "farm")]
    #[command(flatten)]
    Data(crate::farm::admin::DataVerb),
}

/// Look at what would be sent
#[derive(Debug, clap::Subcommand)]
pub(crate) enum SourceVerb {
    /// List every path that a job started here would get
    #[command(visible_alias = "list")]
    Ls {
        /// Also the sizes
        #[arg(long)]
        size: bool,
        /// Include private keys and .env files
        #[arg(long)]
        allow_secret_files: bool,
    },
}

impl Command {
    /// True if a failure before there is a job has a code of its own.
    pub(crate) fn runs_a_job(&self) -> bool {
        matches!(self, Self::Run(_))
    }

    pub(crate) async fn perform(&self, app: &App) -> Result<i32, Failure> {
        match self {
            Self::Run(args) => run::run(app, args).await,
            #[cfg(feature = "farm")]
            Self::Up(args) => crate::farm::up::up(app, args).await,
            Self::Admin(AdminVerb::Member(verb)) => member::member(app, verb).await,
            Self::Admin(AdminVerb::Retention(verb)) => retention::retention(app, verb).await,
            #[cfg(feature = "farm")]
            Self::Admin(AdminVerb::Data(verb)) => crate::farm::admin::admin(app, verb).await,
            Self::Attach(args) => jobs::attach(app, args).await,
            Self::Logs(args) => jobs::logs(app, args).await,
            Self::List(args) => jobs::list(app, args).await,
            Self::Status(args) => jobs::status(app, args).await,
            Self::Cancel(args) => cancel::cancel(app, args).await,
            Self::Artifacts(args) => artifacts::artifacts(app, args).await,
            Self::Source(SourceVerb::Ls { size, allow_secret_files }) => source_ls(app, *size, *allow_secret_files),
            Self::Image(verb) => image::image(app, verb).await,
            Self::Worker(verb) => admin::worker(app, verb).await,
            Self::Login(args) => setup::login(app, args).await,
            Self::Context(verb) => setup::context(app, verb),
            Self::Token(verb) => admin::token(app, verb).await,
            Self::Config(verb) => setup::config(app, verb),
            Self::Doctor => setup::doctor(app).await,
            Self::Completions(args) => setup::completions(args),
        }
    }
}

/// Lists also what `alloy run` would refuse, and marks it: whoever looks wants to see why.
fn source_ls(app: &App, with_size: bool, allow_secret_files: bool) -> Result<i32, Failure> {
    let scan = source::scan(&app.dir, true)?;
    for warning in &scan.warnings {
        app.talk.warn(warning);
    }
    let mark = |path: &str| scan.secrets.get(path).copied();
    if app.talk.json() {
        for entry in scan.manifest.entries() {
            print_json(&Listed { entry, secret: mark(&entry.path) })?;
        }
    } else {
        print(&lines(&scan, with_size))?;
        let total = size(scan.manifest.total_bytes());
        app.talk.say(&format!("{}, {total}, manifest {}", plural(scan.files(), "file"), scan.manifest.digest()));
    }
    if !scan.secrets.is_empty() && !allow_secret_files {
        let (many, verb) =
            (plural(scan.secrets.len() as u64, "file"), if scan.secrets.len() == 1 { "looks" } else { "look" });
        app.talk.warn(&format!("{many} {verb} like a secret: `alloy run` refuses this tree"));
        app.talk.hint("list it in .gitignore or .alloyignore, or send it with --allow-secret-files");
    }
    Ok(exit::OK)
}

/// One line of `--json`.
#[derive(serde::Serialize)]
struct Listed<'a> {
    #[serde(flatten)]
    entry: &'a Entry,
    /// Why it looks like a secret.
    #[serde(skip_serializing_if = "Option::is_none")]
    secret: Option<&'static str>,
}

fn lines(scan: &source::Scan, with_size: bool) -> String {
    let mut out = String::new();
    for entry in scan.manifest.entries() {
        if with_size {
            out.push_str(&format!("{:>9}  ", size(entry.size)));
        }
        out.push_str(&one_line(&entry.path));
        match &entry.target {
            Some(target) => out.push_str(&format!(" -> {}", one_line(target))),
            None if entry.kind == EntryKind::Dir => out.push('/'),
            None => {}
        }
        if let Some(why) = scan.secrets.get(&entry.path) {
            out.push_str(&format!("  (secret: {why})"));
        }
        out.push('\n');
    }
    out
}
