use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use alloy_shared::id::Digest;
use alloy_shared::runtime::SystemEnv;

use super::*;
use crate::sources::tests::{cached, small_disk, small_limits};

#[tokio::test]
async fn a_disk_is_full_only_when_the_cache_has_nothing_more_to_give() {
    for (blobs, others, left, told) in [(9u8, 900_000, 70_000, None), (1, 985_000, 0, Some(true))] {
        let dir = tempfile::tempdir().unwrap();
        let (cache, taken, limits) = (dir.path().join("cache"), Arc::new(AtomicU64::new(0)), small_limits());
        for n in 0..blobs {
            let name = Digest::of(&[n]).to_string();
            std::fs::create_dir_all(cache.join(&name[..2])).unwrap();
            std::fs::write(cache.join(&name[..2]).join(name), vec![n; 10_000]).unwrap();
        }
        let free = || small_disk(&cache, 1_000_000, &taken);
        let sources = Arc::new(Sources::open_keeping(&cache, 1 << 20, &limits, free()).unwrap());
        assert_eq!(cached(&cache), u64::from(blobs) * 10_000);
        taken.store(others, Ordering::Relaxed);
        let (over, looks, free) = (CancellationToken::new(), AtomicU32::new(0), free());
        let free: FreeBytes = Box::new({
            let over = over.clone();
            move || {
                // One look before the cache is asked to give, one after.
                if looks.fetch_add(1, Ordering::Relaxed) == 1 {
                    over.cancel();
                }
                free()
            }
        });
        let (door, mut inputs) = mpsc::channel(4);
        let disk = Disk { free, floor: limits.disk_floor, sources };
        watch_disk(Arc::new(SystemEnv::detached()), disk, door, over).await;
        assert_eq!(inputs.try_recv().ok().map(|input| matches!(input, Input::Full(true))), told);
        assert_eq!(cached(&cache), left);
    }
}
