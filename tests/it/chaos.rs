//! What breaks on purpose: processes killed and frozen in every phase of a job, networks that hold, lose and delay, an
//! orchestrator that restarts again and again, floods.

mod aim;
mod flood;
mod freeze;
mod kill;
mod net;
mod restart;
