//! The simulated `softnet` that the simulated `tart` starts.

use std::process::ExitCode;

fn main() -> ExitCode {
    alloy_tests::tart::softnet::main(std::env::args().skip(1))
}
