pub mod job;
pub mod ops;
pub mod store;
