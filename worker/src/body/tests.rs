use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use alloy_shared::id::{AttemptRef, Digest, JobId, Labels, WorkerId};
use alloy_shared::runtime::SystemEnv;
use alloy_shared::wire::image::PullProgress;
use alloy_shared::wire::session::Link;
use async_trait::async_trait;
use bytes::Bytes;

use super::*;
use crate::hooks;
use crate::provider::{Guest, Image, ImageRef, NetworkPolicy, Shape, VmError, VmFault, VmName};
use crate::sources::tests::{cached, small_disk, small_limits};
use crate::spool::SpoolFile;
use crate::upstream::{Blobs, DialError, Grant, TransferError};

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

/// A host with a VM of an earlier run that goes at the second try, if at all, and a farm that cannot be reached. Both note
/// what came first.
struct World {
    goes: bool,
    seen: mpsc::Sender<&'static str>,
    vms: Mutex<Vec<VmName>>,
    tries: AtomicU32,
}

#[async_trait]
impl VmProvider for World {
    async fn list(&self) -> Result<Vec<VmName>, VmError> {
        Ok(self.vms.lock().unwrap().clone())
    }
    async fn images(&self) -> Result<Vec<Image>, VmError> {
        Ok(Vec::new())
    }
    fn pulls(&self) -> bool {
        false
    }
    async fn find(&self, _: &ImageRef) -> Result<Option<Digest>, VmError> {
        Ok(None)
    }
    async fn pull(
        &self,
        image: &ImageRef,
        _: &watch::Sender<PullProgress>,
        _: &CancellationToken,
    ) -> Result<Digest, VmError> {
        Err(VmError::policy(VmFault::NoImage, image.0.clone()))
    }
    async fn remove(&self, _: &Digest) -> Result<(), VmError> {
        Ok(())
    }
    async fn create(&self, _: &VmName, _: &Digest, _: &Shape) -> Result<(), VmError> {
        Err(VmError::farm(VmFault::Start, "no VM starts here"))
    }
    async fn boot(&self, _: &VmName, _: &Path) -> Result<Arc<dyn Guest>, VmError> {
        Err(VmError::farm(VmFault::Start, "no VM starts here"))
    }
    async fn restrict(&self, _: &VmName, _: &NetworkPolicy) -> Result<(), VmError> {
        Ok(())
    }
    async fn destroy(&self, vm: &VmName) -> Result<(), VmError> {
        if !self.goes || self.tries.fetch_add(1, Ordering::Relaxed) == 0 {
            return Err(VmError::farm(VmFault::Destroy, "it does not go"));
        }
        self.vms.lock().unwrap().retain(|other| other != vm);
        let _later = self.seen.try_send("gone");
        Ok(())
    }
}

#[async_trait]
impl Upstream for World {
    async fn dial(&self) -> Result<Link, DialError> {
        let _later = self.seen.try_send("dial");
        Err(DialError::Unreachable("not in this test".into()))
    }
    async fn manifest(&self, _: &Grant) -> Result<Bytes, TransferError> {
        Err(TransferError::Refused("not in this test".into()))
    }
    async fn fetch(&self, _: &Grant, _: &[Digest]) -> Result<Blobs, TransferError> {
        Err(TransferError::Refused("not in this test".into()))
    }
    async fn put(&self, _: &Grant, _: &SpoolFile) -> Result<Digest, TransferError> {
        Err(TransferError::Refused("not in this test".into()))
    }
}

#[tokio::test]
async fn a_vm_that_does_not_go_keeps_a_worker_from_the_farm_while_its_job_could_run_twice_and_no_longer() {
    let hour = 60 * 60_000;
    for (state, expiry_ms, goes, first) in [
        (None, hour, false, "dial"),
        (Some(HeldState::ResultPending), hour, false, "dial"),
        (Some(HeldState::Lost), hour, true, "gone"),
        (Some(HeldState::Lost), 10, false, "dial"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (seen, mut sees) = mpsc::channel(1);
        let vms = Mutex::new(vec![VmName::mint(7, 1)]);
        let world = Arc::new(World { goes, seen, vms, tries: AtomicU32::new(0) });
        let life = Lifecycle::new();
        let env: Arc<dyn Env> = Arc::new(SystemEnv::new(life.clone()));
        let attempt = AttemptRef { job: JobId::from_raw(1), attempt: 1 };
        let wish = Wish { slots: 1, image: ImageRef("own".into()), floors: Vec::new() };
        let hooks = hooks::Setup {
            dir: dir.path().join("hooks"),
            state_dir: dir.path().to_owned(),
            guard: dir.path().join("guard"),
            env: Arc::clone(&env),
        };
        let parts = Parts {
            env,
            limits: Limits { heartbeat_ms: 10, expiry_ms, ..Limits::default() },
            provider: Arc::clone(&world) as _,
            upstream: world,
            hooks: Hooks::open(hooks).await,
            spool: Spool::memory(),
            held: state.into_iter().map(|state| Held { attempt, state, log_len: 0, seq: 0 }).collect(),
            sources: Sources::open(&dir.path().join("cache"), 1 << 20).unwrap(),
            book: BookFile::memory(),
            me: Me {
                worker: WorkerId::from_raw(1),
                version: "0".into(),
                labels: Labels::default(),
                sign: Box::new(str::to_owned),
            },
            name: "mini".into(),
            fence: Arc::new(Fence::new()),
            state_dir: dir.path().to_owned(),
            wishes: watch::channel(wish).1,
            image_budget: None,
            free: Box::new(|| Ok(u64::MAX)),
        };
        let watch = async {
            assert_eq!(sees.recv().await, Some(first), "{state:?} {expiry_ms}");
            life.soft.cancel();
        };
        let both = async { tokio::join!(run(parts, &life), watch).0 };
        let over = tokio::time::timeout(std::time::Duration::from_secs(60), both).await.expect("it stops");
        assert_eq!(over, Over::Stopped);
    }
}
