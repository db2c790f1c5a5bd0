//! S: work that would hold up a thread of the runtime.

use tokio::task::JoinHandle;

use super::{VmError, VmFault};

/// Does work with files, or with a stranger's words, away from the runtime's threads. It goes on when nobody waits for it
/// any more.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, VmError> + Send + 'static,
) -> Result<T, VmError> {
    joined(tokio::task::spawn_blocking(work)).await
}

/// Waits for such work that somebody else keeps track of.
pub(super) async fn joined<T>(work: JoinHandle<Result<T, VmError>>) -> Result<T, VmError> {
    match work.await {
        Ok(done) => done,
        Err(_panicked) => Err(VmError::farm(VmFault::Lost, "a file task ended early")),
    }
}
