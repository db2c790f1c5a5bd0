//! The one integration binary. Names of tests are sentences about what a user sees.

mod access;
mod care;
mod cli;
mod follow;
mod hooks;
mod image;
mod images;
mod job;
mod prose;
mod store;
mod tart;
mod tidy;
mod vm;
mod wire;
mod worker;
