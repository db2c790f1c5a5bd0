//! What the tests are made of: a farm of real processes, an observer with its own clock, a proxy that cuts connections, and
//! a source of log bytes that anybody can compute again.

pub mod bench;
pub mod farm;
pub mod noise;
pub mod observe;
pub mod process;
pub mod proxy;
