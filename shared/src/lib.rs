//! What every part of Alloy agrees on.
//!
//! `wire` holds each type that crosses a process border; [`id`], [`limits`] and [`env`] hold the vocabulary, the bounds and
//! the clock that all deciders take as arguments. [`client`] is the one way to talk to a farm. [`runtime`] and [`config`]
//! start a daemon. Nothing here knows about jobs in a database, virtual machines or terminals.

pub mod client;
pub mod config;
pub mod env;
pub mod id;
pub mod limits;
pub mod mem_disk;
pub mod room;
pub mod runtime;
pub mod secret;
pub mod wire;
