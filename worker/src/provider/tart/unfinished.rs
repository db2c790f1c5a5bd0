//! S: downloads that broke off. `tart` resumes one when its image is pulled again, and throws all of them away at the next
//! command that is neither a pull nor a clone, unless somebody has a lock on it. So somebody has.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use alloy_shared::env::Mono;
use nix::fcntl::{Flock, FlockArg};

use super::locks::entries;

/// A download that nobody took up again for this long is not worth its room.
const KEPT_MS: u64 = 60 * 60_000;
/// Downloads are named by a hash, which is this long; what clones make is not.
const NAME: usize = 32;

#[derive(Debug)]
pub(super) struct Unfinished {
    tmp: PathBuf,
    held: Mutex<Vec<Held>>,
}

#[derive(Debug)]
struct Held {
    name: String,
    since: Mono,
    _lock: Flock<File>,
}

impl Unfinished {
    /// Holds what an earlier daemon left.
    pub(super) fn open(home: &std::path::Path, now: Mono) -> Self {
        let unfinished = Self { tmp: home.join("tmp"), held: Mutex::default() };
        unfinished.hold(now);
        unfinished
    }

    /// Locks every unfinished download that nobody works on.
    pub(super) fn hold(&self, now: Mono) {
        let mut held = self.held();
        for name in entries(&self.tmp) {
            let is_download = name.len() == NAME && name.bytes().all(|c| c.is_ascii_hexdigit());
            if !is_download || held.iter().any(|held| held.name == name) {
                continue;
            }
            let Ok(dir) = File::open(self.tmp.join(&name)) else { continue };
            if let Ok(lock) = Flock::lock(dir, FlockArg::LockSharedNonblock) {
                held.push(Held { name, since: now, _lock: lock });
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.held().is_empty()
    }

    pub(super) fn release(&self) {
        self.held().clear();
    }

    /// Lets go of what was kept for too long.
    pub(super) fn forget_old(&self, now: Mono) {
        self.held().retain(|held| now.since(held.since) < KEPT_MS);
    }

    fn held(&self) -> MutexGuard<'_, Vec<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_download_is_locked_until_it_is_released_or_old() {
        let home = tempfile::tempdir().unwrap();
        let work = home.path().join("tmp/0123456789abcdef0123456789abcdef");
        for dir in [&work, &home.path().join("tmp/7B1C0A0E-0000-4000-8000-000000000000")] {
            std::fs::create_dir_all(dir).unwrap();
        }
        let free = || Flock::lock(File::open(&work).unwrap(), FlockArg::LockExclusiveNonblock).is_ok();
        let unfinished = Unfinished::open(home.path(), Mono(0));
        assert!(!free() && unfinished.held().len() == 1, "what a clone makes is its own");
        unfinished.hold(Mono(5));
        assert_eq!(unfinished.held().len(), 1, "once");
        unfinished.forget_old(Mono(KEPT_MS - 1));
        assert!(!free());
        unfinished.forget_old(Mono(KEPT_MS));
        assert!(free() && unfinished.is_empty());
        unfinished.hold(Mono(0));
        unfinished.release();
        assert!(free());
        let _working = Flock::lock(File::open(&work).unwrap(), FlockArg::LockExclusiveNonblock).unwrap();
        unfinished.hold(Mono(0));
        assert!(unfinished.is_empty(), "somebody works on it");
    }
}
