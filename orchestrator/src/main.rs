//! S: the orchestrator's program: parse, resolve, serve.

use std::process::ExitCode;

use clap::Parser as _;
use orchestrator::config::Cli;

#[tokio::main]
async fn main() -> ExitCode {
    orchestrator::program::run(Cli::parse()).await
}
