//! S: the orchestrator as a library: what it is made of, and how it starts and stops.
//!
//! A request comes in through [`routes`], which knows who is calling ([`auth`]) and answers with problems ([`error`]).
//! It reads through [`store`] and changes things through [`ops`]; jobs change at the [`desk`] alone, which applies
//! [`job`], admits by [`admit`] and chooses by [`pick`], and whose loop ([`desk_loop`]) commits. What moved is told to
//! the workers' sessions by [`hub`] and to followers by [`wake`].

use std::sync::Arc;

use alloy_shared::env::Env;
use alloy_shared::limits::Limits;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub mod admit;
pub mod auth;
pub mod blobs;
pub mod config;
pub mod desk;
pub mod desk_loop;
pub mod error;
pub mod feed;
pub mod hub;
pub mod job;
pub mod listen;
pub mod log_sync;
pub mod logs;
pub mod ops;
pub mod pack;
pub mod pick;
pub mod routes;
pub mod session;
pub mod store;
pub mod sums;
pub mod wake;

use auth::{Auth, Grants};
use blobs::Blobs;
use desk_loop::Door;
use hub::Hub;
use log_sync::LogSync;
use logs::Logs;
use store::Store;
use wake::Wake;

/// The name under which the store keeps the farm's own secret.
pub const FARM_SECRET: &str = "farm_secret";

/// One orchestrator, whole. Everything that handles a request gets a reference to it.
pub struct App {
    pub store: Arc<dyn Store>,
    pub desk: Door,
    pub hub: Arc<Hub>,
    pub wake: Arc<Wake>,
    pub logs: Arc<Logs>,
    pub blobs: Arc<Blobs>,
    pub log_sync: LogSync,
    pub env: Arc<dyn Env>,
    pub limits: Limits,
    pub auth: Auth,
    pub grants: Grants,
    /// Where people and workers reach this farm; without a slash at its end.
    pub base_url: String,
    /// Forwarded addresses are believed.
    pub behind_proxy: bool,
    /// Bytes for new tokens: the operating system's, or a test's.
    pub random: fn() -> [u8; 32],
    /// Cancelled when nothing new is taken: streams end, sessions say goodbye.
    pub stopping: CancellationToken,
    /// The sessions of workers; the stop waits for their goodbyes.
    pub sessions: TaskTracker,
}
