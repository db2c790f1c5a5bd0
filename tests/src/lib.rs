//! What the tests are made of: a farm of real processes, an observer with its own clock, a proxy that cuts connections,
//! a source of log bytes that anybody can compute again, and a Postgres of the run's own.

pub mod bench;
pub mod chaos;
pub mod farm;
pub mod history;
pub mod inject;
pub mod load;
pub mod model;
pub mod mount;
pub mod noise;
pub mod observe;
pub mod pg;
pub mod port;
pub mod process;
pub mod proxy;
pub mod s3;
pub mod several;
pub mod sim;
pub mod sim_host;
pub mod tart;
pub mod teller;
