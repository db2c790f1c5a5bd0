//! The one integration binary. Names of tests are sentences about what a user sees.

mod store;
mod tidy;
