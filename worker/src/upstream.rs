//! S: the way to the orchestrator: the session's socket, and the bytes of sources and artifacts over plain HTTPS.

mod https;

use alloy_shared::id::{AttemptRef, Digest};
use alloy_shared::secret::Secret;
use alloy_shared::wire::ErrorCode;
use alloy_shared::wire::session::Link;
use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;

pub use self::https::Https;
pub(crate) use self::https::agent;
use crate::spool::SpoolFile;

/// How a worker reaches its farm.
#[async_trait]
pub trait Upstream: Send + Sync {
    /// Opens a session's socket. The first frame that comes is the challenge.
    async fn dial(&self) -> Result<Link, DialError>;

    /// The manifest of the attempt's source, unchecked.
    async fn manifest(&self, grant: &Grant) -> Result<Bytes, TransferError>;

    /// A few thousand blobs at most, in any order, each checked against its digest. Others may come with them. A channel
    /// that closes before all came is a broken transfer.
    async fn fetch(&self, grant: &Grant, missing: &[Digest]) -> Result<Blobs, TransferError>;

    /// Sends an artifact from wherever an earlier try stopped. It returns once the farm has verified it.
    async fn put(&self, grant: &Grant, file: &SpoolFile) -> Result<Digest, TransferError>;
}

/// Blobs as they arrive.
pub type Blobs = mpsc::Receiver<Result<(Digest, Bytes), TransferError>>;

/// The right to one attempt's blobs, while it is open.
#[derive(Debug, Clone)]
pub struct Grant {
    pub attempt: AttemptRef,
    pub token: Secret<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DialError {
    /// The farm answered, and does not let this worker in.
    #[error("the farm refuses this worker ({}): {message}", code.as_str())]
    Refused { code: ErrorCode, message: String, retry_after_ms: Option<u64> },
    #[error("{0}")]
    Unreachable(String),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// The attempt is not this worker's any more.
    #[error("the attempt is fenced: {0}")]
    Fenced(String),
    /// The farm does not take or have these bytes; the same request will fail again.
    #[error("the farm refuses: {0}")]
    Refused(String),
    /// The retry budget is used up.
    #[error("the transfer broke off: {0}")]
    Broken(String),
    /// The file in the spool cannot be read.
    #[error("the spool cannot be read: {0}")]
    Spool(String),
}
