//! S: the program around [`crate::serve`]: reads the world's configuration, shows it or starts with it.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use alloy_shared::config::{File, Origin, Setting};
use alloy_shared::limits;
use alloy_shared::runtime::{Lifecycle, SystemEnv, telemetry};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::{Cli, Config, ConfigVerb, Flags, Verb, default_file};

const USAGE: u8 = 2;
/// A Postgres remarks on what is as it should be.
const LEVEL: &str = "info,sqlx::postgres::notice=warn";

/// Runs until a signal; the exit code of the process.
pub async fn run(cli: Cli) -> ExitCode {
    let (config, settings) = match load(&cli.flags) {
        Ok(loaded) => loaded,
        Err(problems) => {
            problems.iter().for_each(|problem| eprintln!("orchestrator: {problem}"));
            return ExitCode::from(USAGE);
        }
    };
    match cli.verb {
        Some(Verb::Config { verb: ConfigVerb::Show { origin } }) => {
            print!("{}", shown(&settings, origin));
            ExitCode::SUCCESS
        }
        None => serve(config, idle_address(&settings)).await,
    }
}

/// Somebody set the address of a database and did not say that the farm is there.
fn idle_address(settings: &[Setting]) -> bool {
    let is_set = |name: &str| settings.iter().any(|set| set.name == name && set.origin != Origin::Default);
    is_set("database_url") && !is_set("database_mode")
}

async fn serve(config: Config, idle_address: bool) -> ExitCode {
    let life = Lifecycle::new();
    let ready = telemetry(config.log_format, LEVEL)
        .and_then(|()| life.install_signals().map_err(|error| format!("signals cannot be caught: {error}")));
    if let Err(why) = ready {
        eprintln!("orchestrator: {why}");
        return ExitCode::FAILURE;
    }
    if idle_address {
        tracing::warn!("DATABASE_URL is set and not used: DATABASE_MODE=postgres puts the farm into that database");
    }
    raise_open_files();
    let stop_ms = config.limits.stop_ms;
    let env = Arc::new(SystemEnv::new(life.clone()));
    match crate::serve(config, env, life.clone()).await {
        Ok(_served) => life.wait(stop_ms).await,
        Err(error) => {
            eprintln!("orchestrator: {error}");
            if error.is_usage() { ExitCode::from(USAGE) } else { ExitCode::FAILURE }
        }
    }
}

/// Systems start a program with few open files, often 256 or 1,024, and let it ask for more.
fn raise_open_files() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        let most = hard.min(limits::OPEN_FILES).max(soft);
        if soft < most {
            setrlimit(Resource::RLIMIT_NOFILE, most, hard)?;
        }
        Ok(most)
    });
    match raised {
        Ok(have) if have >= limits::OPEN_FILES => {}
        Ok(have) => tracing::warn!("{have} files may be open; a busy farm needs {}", limits::OPEN_FILES),
        Err(error) => tracing::warn!(%error, "cannot ask for the {} open files of a busy farm", limits::OPEN_FILES),
    }
}

fn load(flags: &Flags) -> Result<(Config, Vec<Setting>), Vec<String>> {
    let variables: BTreeMap<String, String> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    let file = read_file(flags.config.as_deref(), &variables).map_err(|problem| vec![problem])?;
    Config::resolve(flags, &variables, file).map_err(|problems| problems.iter().map(ToString::to_string).collect())
}

/// The file that is named, which must be there, else the usual one if it is there.
pub fn read_file(named: Option<&Path>, variables: &BTreeMap<String, String>) -> Result<Option<File>, String> {
    let Some(path) = named.map(Path::to_owned).or_else(|| default_file(variables)) else { return Ok(None) };
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some(File { path: path.display().to_string(), text })),
        Err(error) if error.kind() == ErrorKind::NotFound && named.is_none() => Ok(None),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

fn shown(settings: &[Setting], origin: bool) -> String {
    let line = |set: &Setting| match origin {
        true => format!("{} = {:?}  # {}\n", set.name, set.value, set.origin),
        false => format!("{} = {:?}\n", set.name, set.value),
    };
    settings.iter().map(line).collect()
}
