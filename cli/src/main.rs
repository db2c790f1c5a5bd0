//! S: `alloy`, the command line: parse, choose the farm, perform, exit with the right number.

mod commands;
mod context;
mod download;
mod farm;
mod follow;
mod job_arg;
mod out_dir;
mod output;
mod signals;
mod source;
mod usage;
mod verdict;

use std::sync::Arc;

use alloy_shared::runtime::SystemEnv;
use clap::Parser;

use commands::Command;
use context::{App, Globals, Places};
use output::talk::Talk;
use output::{Failure, Fault};

/// Build and test on your own Macs: the tree you work in, the command you type, its output, its exit code
#[derive(Debug, Parser)]
#[command(name = "alloy", version, propagate_version = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    pub(crate) command: Command,
}

fn main() -> std::process::ExitCode {
    #[cfg(feature = "farm")]
    if let Some(code) = farm::here::guard() {
        return code;
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let args: Vec<String> =
                std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
            std::process::exit(usage::complain(&error, &args));
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: the runtime does not start: {error}");
            std::process::exit(output::exit::ERROR);
        }
    };
    let code = runtime.block_on(perform(cli));
    // Whatever still runs in the background has nobody left to tell: a scan that was interrupted, a feed let go of.
    std::process::exit(code);
}

async fn perform(cli: Cli) -> i32 {
    let env = Arc::new(SystemEnv::detached());
    let ci = App::var("CI").is_some_and(|value| !matches!(value.as_str(), "" | "0" | "false"));
    let talk = Talk::new(env.clone(), cli.globals.json, ci);
    let outcome = match app(env, talk.clone(), cli.globals) {
        Ok(app) => cli.command.perform(&app).await,
        Err(failure) => Err(failure),
    };
    outcome.unwrap_or_else(|failure| {
        let code = failure.exit_code(cli.command.runs_a_job());
        if failure.fault != Fault::Pipe {
            talk.fail(&failure, code);
        }
        code
    })
}

fn app(env: Arc<SystemEnv>, talk: Talk, globals: Globals) -> Result<App, Failure> {
    let asked = globals.dir.clone().unwrap_or_else(|| ".".into());
    let dir = asked.canonicalize().map_err(|error| Failure::usage(format!("{}: {error}", asked.display())))?;
    Ok(App { env, talk, places: Places::resolve(&App::var)?, globals, dir })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_tree_of_commands_is_consistent() {
        Cli::command().debug_assert();
    }

    #[cfg(feature = "farm")]
    #[test]
    fn backups_are_for_the_machine_of_the_farm() {
        for line in ["admin backup /mnt/farm --data-dir /srv/alloy", "admin restore /mnt/farm --json"] {
            assert!(Cli::try_parse_from(std::iter::once("alloy").chain(line.split(' '))).is_ok(), "{line}");
        }
    }

    #[test]
    fn members_are_named_by_their_user_ids() {
        let user = "3f0c2f1e-8a51-4c1e-9d0b-6f1f3f0f9a11";
        let parses = |line: &str| Cli::try_parse_from(std::iter::once("alloy").chain(line.split(' '))).is_ok();
        for verb in ["list --json", "set USER --role admin --email a@b.test", "remove USER", "rm USER"] {
            assert!(parses(&format!("admin member {verb}").replace("USER", user)), "{verb}");
        }
        for verb in ["set ada", "set USER --role king", "remove"] {
            assert!(!parses(&format!("admin member {verb}").replace("USER", user)), "{verb}");
        }
    }

    #[test]
    fn what_the_pages_show_parses() {
        for line in [
            "run -c make --artifact build/*.ipa --env A=1 --label chip=m4 --timeout 10m",
            "run -- xcodebuild -scheme MyApp build",
            "run --local -c true --json",
            "--json run -c true --detach",
            "-C sub run -c true",
            #[cfg(feature = "farm")]
            "up --listen 127.0.0.1:4000",
            "attach",
            "attach abc123",
            "logs -f",
            "logs job_x --attempt 2",
            "list --state queued --state running --mine -n 5",
            "ls --local",
            "ps -q",
            "jobs",
            "status --json",
            "cancel a b c",
            "cancel --latest",
            "artifacts",
            "artifacts abc123",
            "artifacts get abc123 *.zip -o out/",
            "artifacts get -o -",
            "source ls --size",
            "worker invite --label m=4",
            "worker ls",
            #[cfg(feature = "farm")]
            "worker join http://farm:3000 alloy_join_x --name shed",
            #[cfg(feature = "farm")]
            "worker run --provider host --slots 3 --label site=attic",
            #[cfg(feature = "farm")]
            "worker doctor --fix --json --provider host",
            #[cfg(feature = "farm")]
            "worker install --dry-run --uninstall --service second --state-dir /srv/second",
            "image pull registry.test/mac/xcode:16 --worker shed --label chip=m4 --detach",
            "images ls",
            "image rm registry.test/mac/xcode:16",
            "image pin registry.test/mac/xcode:16 --off",
            "worker drain shed --wait --note disk",
            "worker resume shed",
            "worker rm shed",
            "login http://farm:3000 --with-token",
            "context ls",
            "context use home",
            "context rm home",
            "token create ci --role developer --ci --ttl 90d",
            "token list",
            "config show --origin",
            "doctor --url http://farm:3000",
            "completions zsh",
        ] {
            let words = std::iter::once("alloy").chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
        for line in [
            "",
            "frobnicate",
            "login http://farm",
            "list --state lost",
            "worker drain",
            "--url x --context y doctor",
            "cancel --latest a",
        ] {
            let words = std::iter::once("alloy").chain(line.split(' ').filter(|word| !word.is_empty()));
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
    }
}
