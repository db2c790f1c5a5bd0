//! P: the orchestrator's end of a worker's session: a pure core, the table it reconciles by, and the loop that runs it.

pub mod core;
pub mod drive;
pub mod io;
pub mod reconcile;
mod track;

#[cfg(test)]
mod tests;
