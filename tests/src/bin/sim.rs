//! `sim`: the farm in a seed, many times. `cargo sim` builds and runs it.

use std::process::ExitCode;

use alloy_tests::sim::run::{HELP, Options, main as run};

fn main() -> anyhow::Result<ExitCode> {
    let Some(options) = Options::parse(std::env::args().skip(1))? else {
        println!("{HELP}");
        return Ok(ExitCode::SUCCESS);
    };
    Ok(if run(&options) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
