//! S: the worker's program: run, join, and the guard of one job.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use worker::config::Flags;
use worker::{guard, program};

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
        }
    })
}
