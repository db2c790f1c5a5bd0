//! S: the worker's verbs, for its own binary and for `alloy worker`: run the daemon, join a farm.

use std::collections::BTreeMap;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use alloy_shared::config::File;
use alloy_shared::runtime::{Lifecycle, SystemEnv, telemetry, telemetry_into};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::config::{Config, Flags, Provider, default_dir, default_file};
use crate::host::HostError;
use crate::log_file::LogFile;
use crate::session::drive::Over;
use crate::vm_demand::Wish;
use crate::{Daemon, JoinError, RunError, join};

/// The daemon's exit code when the farm refuses this worker: `alloy`'s own for a credential that is not taken.
pub const REFUSED: u8 = 4;

const LEVEL: &str = "info";
/// A supervisor's file of our standard error, before it is emptied.
const STDERR_MAX: u64 = 1 << 20;

#[derive(Debug, Clone, clap::Args)]
pub struct Join {
    /// The farm, as in http://farm.example.com:3000
    pub url: String,
    /// What `alloy worker invite` printed
    pub token: String,
    /// How the farm shall call this worker [default: this machine's name]
    #[arg(long)]
    pub name: Option<String>,
    /// Give up the worker that this directory belongs to, and join as a new one
    #[arg(long)]
    pub force: bool,
    /// Directory for the worker's key and state [default: ~/.local/share/alloy/worker]
    #[arg(long, value_name = "DIR", env = "ALLOY_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    /// What will run the jobs, tart or host: names it in the command that starts the worker
    #[arg(long, value_name = "PROVIDER")]
    pub provider: Option<String>,
}

/// Runs the daemon until a signal, or until the farm refuses it. `guard` is a binary that knows the guard's subcommand.
pub async fn run(flags: &Flags, guard: PathBuf) -> ExitCode {
    let config = match resolve(flags) {
        Ok(config) => config,
        Err(problems) => return complain(&problems, ExitCode::from(2)),
    };
    if let Err(error) = start_log(&config) {
        return complain(&error, ExitCode::from(2));
    }
    // It ends a process that has no answer to it, also one that waits for its state directory.
    let hangups = match signal(SignalKind::hangup()) {
        Ok(hangups) => hangups,
        Err(error) => return complain(&format!("signals: {error}"), ExitCode::FAILURE),
    };
    let daemon = match Daemon::open(config) {
        Ok(daemon) => daemon,
        Err(error @ RunError::Host(HostError::NotJoined { .. })) => {
            return complain(&format!("{error}\nan admin makes the token: alloy worker invite"), ExitCode::from(2));
        }
        Err(error) => return complain(&error.to_string(), ExitCode::FAILURE),
    };
    let life = Lifecycle::new();
    if let Err(error) = life.install_signals() {
        return complain(&format!("signals: {error}"), ExitCode::FAILURE);
    }
    let grace_ms = daemon.config().limits.drain_ms;
    let env = Arc::new(SystemEnv::new(life.clone()));
    let reload = reload(hangups, flags.clone(), daemon.config().clone(), daemon.wishes(), life.soft.clone());
    alloy_shared::env::Env::spawn(&*env, "hangups", Box::pin(reload));
    let ending = life.clone();
    let system: Arc<SystemEnv> = Arc::clone(&env);
    let refused = Arc::new(AtomicBool::new(false));
    let is_refused = Arc::clone(&refused);
    let task = async move {
        match crate::serve(daemon, system, &ending, guard).await {
            Ok(()) => ending.soft.cancel(),
            Err(error) => {
                tracing::error!("{error}");
                is_refused.store(matches!(error, RunError::Over(Over::Refused { .. })), Ordering::Relaxed);
                ending.fail();
            }
        }
    };
    alloy_shared::env::Env::spawn(&*env, "worker", Box::pin(task));
    let code = life.wait(grace_ms).await;
    if refused.load(Ordering::Relaxed) { ExitCode::from(REFUSED) } else { code }
}

/// Reads the configuration again with each SIGHUP. The pool follows what may change; for the rest a restart is asked for.
async fn reload(
    mut hangups: Signal,
    flags: Flags,
    running: Config,
    wishes: watch::Sender<Wish>,
    over: CancellationToken,
) {
    loop {
        tokio::select! {
            biased;
            () = over.cancelled() => return,
            hangup = hangups.recv() => if hangup.is_none() { return },
        }
        match resolve(&flags) {
            Ok(config) => {
                let same = Config {
                    slots: running.slots,
                    image: running.image.clone(),
                    min_idle: running.min_idle.clone(),
                    ..config.clone()
                };
                if same != running {
                    tracing::warn!("of the new configuration, only slots and images count before a restart");
                }
                wishes.send_if_modified(|wish| std::mem::replace(wish, config.wish()) != *wish);
            }
            Err(problems) => tracing::error!(%problems, "the configuration stays as it was"),
        }
    }
}

fn start_log(config: &Config) -> Result<(), String> {
    let Some(path) = &config.log_file else { return telemetry(config.log_format, LEVEL) };
    let file = LogFile::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
    empty_stderr();
    telemetry_into(config.log_format, LEVEL, Box::new(file))
}

/// What a supervisor collects of a worker with a log of its own is what was said before the log was open, and panics. It
/// is emptied once it is long, since nobody rotates it.
fn empty_stderr() {
    let Ok(stderr) = std::io::stderr().as_fd().try_clone_to_owned().map(std::fs::File::from) else { return };
    if stderr.metadata().is_ok_and(|meta| meta.is_file() && meta.len() > STDERR_MAX) {
        // One that cannot be emptied grows on.
        let _ = stderr.set_len(0);
    }
}

/// Enrols this machine.
pub async fn enrol(verb: &Join) -> ExitCode {
    let state_dir = match verb.state_dir.clone().or_else(|| default_dir(&variables())) {
        Some(dir) => dir,
        None => return complain("there is no HOME: say --state-dir", ExitCode::from(2)),
    };
    let provider = match provider_of(verb.provider.as_deref()) {
        Ok(provider) => provider,
        Err(problems) => return complain(&problems, ExitCode::from(2)),
    };
    let env = Arc::new(SystemEnv::detached());
    match join(&state_dir, &verb.url, &verb.token, verb.name.as_deref(), verb.force, env).await {
        Ok(identity) => {
            eprintln!("{} is a worker of {} now.", identity.name, identity.url);
            eprintln!("Start it: {}", start_line(provider, &state_dir));
            ExitCode::SUCCESS
        }
        Err(error @ (JoinError::Token(_) | JoinError::Kind | JoinError::Name(_))) => {
            complain(&error.to_string(), ExitCode::from(2))
        }
        Err(error @ (JoinError::Joined { .. } | JoinError::Host(_) | JoinError::Farm(_))) => {
            complain(&error.to_string(), ExitCode::FAILURE)
        }
    }
}

/// What the worker will run its jobs with: whatever flag, environment or file choose, else what this system can have.
pub fn provider_of(flag: Option<&str>) -> Result<Provider, String> {
    let flags = Flags { provider: flag.map(str::to_owned), ..Flags::default() };
    Ok(chosen(&flags, &variables())?.unwrap_or(OWN_PROVIDER))
}

/// There is no `tart` but on a Mac.
const OWN_PROVIDER: Provider = if cfg!(target_os = "macos") { Provider::Tart } else { Provider::Host };

/// The provider that somebody chose. What else is wrong with the configuration is said when the worker starts.
fn chosen(flags: &Flags, variables: &BTreeMap<String, String>) -> Result<Option<Provider>, String> {
    let file = file_of(flags, variables)?;
    crate::config::chosen_provider(flags, variables, file).map_err(|problem| problem.to_string())
}

/// What starts a worker with this state directory from anywhere.
fn start_line(provider: Provider, state_dir: &Path) -> String {
    let dir = std::path::absolute(state_dir).unwrap_or_else(|_| state_dir.to_owned());
    format!("worker run --provider {provider} --state-dir '{}'", dir.display().to_string().replace('\'', r"'\''"))
}

pub(crate) fn variables() -> BTreeMap<String, String> {
    // A variable that is no text is none of ours.
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

pub(crate) fn resolve(flags: &Flags) -> Result<Config, String> {
    resolve_for(flags, &variables())
}

/// The configuration of a worker that will have these variables.
pub(crate) fn resolve_for(flags: &Flags, variables: &BTreeMap<String, String>) -> Result<Config, String> {
    match Config::resolve(flags, variables, file_of(flags, variables)?) {
        Ok((config, _)) => Ok(config),
        Err(problems) => {
            let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
            Err(lines.join("\n"))
        }
    }
}

/// The configuration file that is named, or the usual one where it is there.
fn file_of(flags: &Flags, variables: &BTreeMap<String, String>) -> Result<Option<File>, String> {
    match &flags.config {
        Some(path) => read(path).map(Some).map_err(|error| format!("{}: {error}", path.display())),
        None => match default_file(variables).map(|path| (read(&path), path)) {
            Some((Ok(file), _)) => Ok(Some(file)),
            Some((Err(error), path)) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(format!("{}: {error}", path.display()))
            }
            Some(_) | None => Ok(None),
        },
    }
}

fn read(path: &Path) -> std::io::Result<File> {
    Ok(File { path: path.display().to_string(), text: std::fs::read_to_string(path)? })
}

pub(crate) fn complain(what: &str, code: ExitCode) -> ExitCode {
    for line in what.lines() {
        eprintln!("worker: {line}");
    }
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_that_starts_a_worker_is_one_that_works() {
        let line = start_line(Provider::Host, Path::new("it's here"));
        let cwd = std::env::current_dir().unwrap();
        assert_eq!(line, format!(r"worker run --provider host --state-dir '{}/it'\''s here'", cwd.display()));
        let (_, dir) = line.split_once("--state-dir ").unwrap();
        assert!(dir.starts_with("'/"), "{dir}: only an absolute one is taken");
        assert!(start_line(Provider::Tart, Path::new("/s")).starts_with("worker run --provider tart "));
    }

    #[test]
    fn the_provider_of_the_line_is_the_one_that_was_chosen_anywhere() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("w.toml");
        std::fs::write(&file, "provider = \"tart\"\nvm_pool_size = 0\n").unwrap();
        let none = BTreeMap::new();
        let variable = BTreeMap::from([("ALLOY_PROVIDER".to_owned(), "host".to_owned())]);
        let flag = |text: &str| Flags { provider: Some(text.into()), config: Some(file.clone()), ..Flags::default() };
        let in_file = Flags { config: Some(file.clone()), ..Flags::default() };
        for (flags, variables, provider) in [
            (Flags::default(), &none, None),
            (Flags::default(), &variable, Some(Provider::Host)),
            (in_file.clone(), &none, Some(Provider::Tart)),
            (in_file, &variable, Some(Provider::Host)),
            (flag("tart"), &variable, Some(Provider::Tart)),
        ] {
            assert_eq!(chosen(&flags, variables), Ok(provider), "{flags:?}");
        }
        let problem = chosen(&flag("docker"), &none).unwrap_err();
        assert!(problem.contains("--provider") && problem.contains("docker"), "{problem}");
    }
}
