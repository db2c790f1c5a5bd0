//! S: work that would hold up a thread of the runtime.

use super::{VmError, VmFault};

/// Does work with files, or with a stranger's words, away from the runtime's threads. It goes on when nobody waits for it
/// any more.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, VmError> + Send + 'static,
) -> Result<T, VmError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(_panicked) => Err(VmError::farm(VmFault::Lost, "a file task ended early")),
    }
}
