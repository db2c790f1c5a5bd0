//! The conformance kit: what a driver may rely on, as black-box cases over the path of a `tart`. The modules of the first
//! group run against any `tart` (`ALLOY_TEST_TART`, with `ALLOY_TEST_TART_IMAGE` naming a cached macOS image with the guest
//! agent); those of the second group need the simulator, which is the default. Each case cites the section of the contract
//! that it checks.

mod kit;

mod agent;
mod commands;
mod exec;
mod json;
mod life;
mod state;

mod faults;
mod host;
mod isolation;
mod pull;
mod releases;
mod softnet;
