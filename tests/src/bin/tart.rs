//! The simulated `tart`.

use std::process::ExitCode;

fn main() -> ExitCode {
    alloy_tests::tart::main(std::env::args_os().collect())
}
