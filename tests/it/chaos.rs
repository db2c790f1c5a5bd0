//! What breaks on purpose: processes killed and frozen in every phase of a job, networks that hold, lose and delay, floods.

mod aim;
mod freeze;
mod kill;
mod net;
