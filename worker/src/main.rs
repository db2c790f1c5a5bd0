//! S: the worker's program: run, join, host care, and the guard of one job.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use worker::config::Flags;
use worker::{care, guard, program};

/// Runs jobs of an Alloy build farm on this machine.
#[derive(Debug, Parser)]
#[command(name = "worker", version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run the daemon: connect to the farm and take jobs
    Run(Flags),
    /// Enrol this machine at a farm
    Join(program::Join),
    /// Look whether this machine can be a good worker; exits 1 if something is wrong, 0 if not or only a warning
    Doctor(DoctorArgs),
    /// Start this machine's worker by itself from now on: a LaunchAgent on a Mac, a systemd unit on Linux
    Install(care::Install),
}

#[derive(Debug, clap::Args)]
struct DoctorArgs {
    #[command(flatten)]
    verb: care::Doctor,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    if args.next().is_some_and(|verb| verb == guard::SUBCOMMAND) {
        // Before any thread exists: the guard forks and masks signals for its process alone.
        return guard::main(args);
    }
    let cli = Cli::parse();
    let guard = match std::env::current_exe() {
        Ok(path) => path,
        Err(error) => {
            eprintln!("worker: its own path: {error}");
            return ExitCode::FAILURE;
        }
    };
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("worker: {error}");
            return ExitCode::FAILURE;
        }
    };
    runtime.block_on(async {
        match cli.verb {
            Verb::Run(flags) => program::run(&flags, guard).await,
            Verb::Join(verb) => program::enrol(&verb).await,
            Verb::Doctor(args) => care::doctor(&args.verb, args.json).await,
            Verb::Install(verb) => care::install(&verb, vec![guard.display().to_string(), "run".to_owned()]).await,
        }
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_tree_of_commands_is_consistent() {
        Cli::command().debug_assert();
    }
}
