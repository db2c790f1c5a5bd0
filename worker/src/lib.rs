//! S: the worker: runs jobs of a farm on this machine.

pub mod session;
pub mod spool;
pub mod upstream;
