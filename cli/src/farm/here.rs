//! S: this machine as a worker: the same functions that the binary `worker` calls.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use worker::JoinError;
use worker::config::Provider;

use crate::context::{App, check_url, without_user};
use crate::output::talk::Tone;
use crate::output::{Failure, Fault, exit, print_json};

/// Make this machine a worker of a farm
#[derive(Debug, clap::Args)]
pub(crate) struct JoinArgs {
    /// The farm
    #[arg(value_name = "URL")]
    farm: String,
    /// What `alloy worker invite` printed
    token: String,
    /// What the farm calls this worker; default: the host's name
    #[arg(long)]
    name: Option<String>,
    /// Give up the worker that this directory belongs to, and join as a new one
    #[arg(long)]
    force: bool,
    /// What will run the jobs, tart or host: names it in the command that starts the worker
    #[arg(long, value_name = "PROVIDER")]
    provider: Option<String>,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Place {
    /// Where the worker keeps its key, logs and sources; a second worker on this machine needs its own [default: worker/ in the data directory]
    #[arg(long, value_name = "DIR", env = "ALLOY_STATE_DIR")]
    state_dir: Option<PathBuf>,
}

impl Place {
    pub(crate) fn dir(&self, app: &App) -> PathBuf {
        self.state_dir.as_ref().map_or_else(|| app.places.data.join("worker"), |dir| app.dir.join(dir))
    }
}

pub(crate) async fn join(app: &App, args: &JoinArgs) -> Result<i32, Failure> {
    let url = check_url(&args.farm).map_err(|why| Failure::usage(format!("`{}` {why}", without_user(&args.farm))))?;
    let dir = args.place.dir(app);
    let provider = worker::program::provider_of(args.provider.as_deref()).map_err(Failure::usage)?;
    let identity = worker::join(&dir, &url, &args.token, args.name.as_deref(), args.force, app.env.clone())
        .await
        .map_err(|error| join_failure(error, &url))?;
    if app.talk.json() {
        print_json(&serde_json::json!({
            "worker": identity.worker, "name": identity.name, "url": identity.url, "state_dir": dir,
        }))?;
    }
    app.talk.verdict(Tone::Good, "✓", &format!("{} ({}) belongs to {url}", identity.name, identity.worker), None);
    let named = args.place.state_dir.is_some().then_some(dir.as_path());
    app.talk.hint(&format!("{}   starts it", run_line(provider, named)));
    Ok(exit::OK)
}

/// What starts the worker that was joined: a directory of its own must be named again.
fn run_line(provider: Provider, state_dir: Option<&Path>) -> String {
    let start = format!("alloy worker run --provider {provider}");
    let Some(dir) = state_dir else { return start };
    format!("{start} --state-dir '{}'", dir.display().to_string().replace('\'', r"'\''"))
}

fn join_failure(error: JoinError, url: &str) -> Failure {
    match error {
        JoinError::Token(_) | JoinError::Kind => {
            Failure::new(Fault::Usage, error.to_string()).hint("an admin makes one: alloy worker invite")
        }
        JoinError::Name(_) => Failure::usage(error.to_string()),
        JoinError::Joined { .. } | JoinError::Host(_) => Failure::error(error.to_string()),
        JoinError::Farm(error) => {
            let failure = Failure::of(error, url);
            if !matches!(failure.fault, Fault::Unauthenticated | Fault::Forbidden) {
                return failure;
            }
            Failure::new(Fault::Forbidden, "the farm does not take this invitation: it was used, or it is too old")
                .hint("an admin makes a new one: alloy worker invite")
        }
    }
}

/// Run this machine's worker until a signal stops it
#[derive(Debug, clap::Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    flags: worker::config::Flags,
}

pub(crate) async fn run(app: &App, args: &RunArgs) -> Result<i32, Failure> {
    if app.globals.url.is_some() || app.globals.context.is_some() || app.globals.local {
        return Err(Failure::usage("a worker goes to the farm that it joined")
            .hint("alloy worker join URL TOKEN   joins another; ORCHESTRATOR_URL names the same farm's new address"));
    }
    Ok(exit_code(worker::program::run(&args.flags, own_binary()?).await))
}

/// Look whether this machine can be a good worker; exits 1 if something is wrong, 0 if not or only a warning
#[derive(Debug, clap::Args)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    verb: worker::care::Doctor,
}

pub(crate) async fn doctor(app: &App, args: &DoctorArgs) -> Result<i32, Failure> {
    Ok(exit_code(worker::care::doctor(&args.verb, app.talk.json()).await))
}

/// Start this machine's worker by itself from now on: a LaunchAgent on a Mac, a systemd unit on Linux
#[derive(Debug, clap::Args)]
pub(crate) struct InstallArgs {
    #[command(flatten)]
    verb: worker::care::Install,
}

pub(crate) async fn install(args: &InstallArgs) -> Result<i32, Failure> {
    let program = own_binary()?.display().to_string();
    let words = [program.as_str(), "worker", "run"].map(str::to_owned).to_vec();
    Ok(exit_code(worker::care::install(&args.verb, words).await))
}

fn exit_code(code: ExitCode) -> i32 {
    if code == ExitCode::SUCCESS {
        exit::OK
    } else if code == ExitCode::from(2) {
        exit::USAGE
    } else if code == ExitCode::from(worker::program::REFUSED) {
        exit::FORBIDDEN
    } else {
        exit::ERROR
    }
}

/// The binary that knows the guard's subcommand: this one.
pub(crate) fn own_binary() -> Result<PathBuf, Failure> {
    std::env::current_exe().map_err(|error| Failure::io("the path of this program", &error))
}

/// A worker inside this process starts this same binary as the guard of its commands.
pub(crate) fn guard() -> Option<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    let first: OsString = args.next()?;
    (first == worker::guard::SUBCOMMAND).then(|| worker::guard::main(args))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_that_starts_a_worker_names_its_directory() {
        assert_eq!(run_line(Provider::Tart, None), "alloy worker run --provider tart");
        let line = run_line(Provider::Host, Some(Path::new("/tmp/second one's")));
        assert_eq!(line, r"alloy worker run --provider host --state-dir '/tmp/second one'\''s'");
    }
}
