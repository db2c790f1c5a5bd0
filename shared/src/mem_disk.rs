//! P: the disk that memory stands for: how long a sync takes, whether there is room, whether it fails. As it is made it
//! never fails and takes no time; the simulator makes it slow, full and broken.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::env::Env;

#[derive(Default)]
pub struct MemDisk {
    env: Option<Arc<dyn Env>>,
    sync_ms: AtomicU64,
    full: AtomicBool,
    broken: AtomicBool,
}

impl MemDisk {
    /// A disk whose syncs take time, by the clock and the dice of `env`.
    pub fn on(env: Arc<dyn Env>) -> Self {
        Self { env: Some(env), ..Self::default() }
    }

    /// The longest that a sync takes.
    pub fn set_sync_ms(&self, ms: u64) {
        self.sync_ms.store(ms, Ordering::Relaxed);
    }

    pub fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::Relaxed);
    }

    pub fn set_broken(&self, broken: bool) {
        self.broken.store(broken, Ordering::Relaxed);
    }

    pub fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// Whether a write has room.
    pub fn room(&self) -> io::Result<()> {
        if self.is_full() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    /// Returns when what was written before is on the disk, or may not be.
    pub async fn sync(&self) -> io::Result<()> {
        let most = self.sync_ms.load(Ordering::Relaxed);
        if let Some(env) = self.env.as_ref().filter(|_| most > 0) {
            env.sleep_until(env.now().mono + env.dice() % (most + 1)).await;
        }
        if self.broken.load(Ordering::Relaxed) { Err(io::Error::other("the disk fails")) } else { Ok(()) }
    }
}

impl fmt::Debug for MemDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemDisk").field("full", &self.full).field("broken", &self.broken).finish_non_exhaustive()
    }
}
