mod fence;
mod held;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Mutex;

use alloy_shared::id::{AttemptRef, Digest, JobId};
use alloy_shared::limits::{HOST_FAULTS_MAX, STUCK_TRIES_MAX};
use alloy_shared::runtime::SystemEnv;
use alloy_shared::wire::image::PullProgress;
use alloy_shared::wire::session::SlotState;
use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{Notify, Semaphore, watch};

use super::*;
use crate::images::ImageSetup;
use crate::provider::{ArtifactRule, Command, Exec, Image, Listing, NetworkPolicy, Shape};

/// VMs that are only names, and faults on demand.
#[derive(Default)]
struct Fake {
    alive: Mutex<BTreeSet<VmName>>,
    seen: Mutex<Vec<String>>,
    /// What the next VMs have instead of a start.
    boots_fail: Mutex<Vec<VmFault>>,
    boot_hangs: bool,
    /// Boots wait for this.
    starts: Option<Semaphore>,
    /// One guest that nobody uses.
    dies: Arc<Notify>,
    lists_fail: Mutex<u32>,
    destroys_fail: Mutex<u32>,
    /// A VM that stays as long as any other one does.
    last: Option<VmName>,
    unrestricted: Mutex<bool>,
    /// VMs whose policy is in doubt.
    unfit: Mutex<u32>,
    /// Images that are not here and can be brought.
    away: Mutex<BTreeSet<String>>,
    /// The images of the VMs that were made.
    made: Mutex<Vec<Digest>>,
    /// Looks for an image, and removals, wait for these.
    finds: Option<Semaphore>,
    removes: Option<Semaphore>,
    removing: Mutex<Vec<Digest>>,
    leaving: Mutex<Option<Digest>>,
}

const IMAGES: [&str; 4] = ["own", "other", "third", "r/own:latest"];

async fn pass(gate: &Option<Semaphore>) {
    if let Some(gate) = gate {
        gate.acquire().await.unwrap().forget();
    }
}

impl Fake {
    fn boots(&self, faults: &[VmFault]) {
        *self.boots_fail.lock().unwrap() = faults.to_vec();
    }
}

/// Dies when it is told to.
struct NoGuest(Arc<Notify>);

fn fault(left: &Mutex<u32>, what: VmFault) -> Result<(), VmError> {
    let mut left = left.lock().unwrap();
    match *left {
        0 => Ok(()),
        _ => {
            *left -= 1;
            Err(VmError::farm(what, "on demand"))
        }
    }
}

#[async_trait]
impl VmProvider for Fake {
    async fn list(&self) -> Result<Vec<VmName>, VmError> {
        fault(&self.lists_fail, VmFault::Lost)?;
        Ok(self.alive.lock().unwrap().iter().cloned().collect())
    }
    async fn images(&self) -> Result<Vec<Image>, VmError> {
        let image = |name: &str| Image {
            digest: Digest::of(name.as_bytes()),
            names: vec![ImageRef(name.into())],
            size_bytes: 1,
            removable: true,
        };
        let away = self.away.lock().unwrap();
        Ok(IMAGES.into_iter().filter(|name| !away.contains(*name)).map(image).collect())
    }
    fn pulls(&self) -> bool {
        true
    }
    async fn find(&self, image: &ImageRef) -> Result<Option<Digest>, VmError> {
        pass(&self.finds).await;
        let is_here = image.0 != "absent" && !self.away.lock().unwrap().contains(&image.0);
        Ok(is_here.then(|| Digest::of(image.0.as_bytes())))
    }
    async fn pull(
        &self,
        image: &ImageRef,
        _: &watch::Sender<PullProgress>,
        _: &CancellationToken,
    ) -> Result<Digest, VmError> {
        match self.away.lock().unwrap().remove(&image.0) || IMAGES.contains(&image.0.as_str()) {
            true => Ok(Digest::of(image.0.as_bytes())),
            false => Err(VmError::policy(VmFault::NoImage, "absent")),
        }
    }
    async fn remove(&self, image: &Digest) -> Result<(), VmError> {
        self.removing.lock().unwrap().push(*image);
        *self.leaving.lock().unwrap() = Some(*image);
        pass(&self.removes).await;
        *self.leaving.lock().unwrap() = None;
        let gone = IMAGES.into_iter().filter(|name| Digest::of(name.as_bytes()) == *image);
        self.away.lock().unwrap().extend(gone.map(str::to_owned));
        Ok(())
    }
    async fn create(&self, vm: &VmName, image: &Digest, _: &Shape) -> Result<(), VmError> {
        let is_gone = |name: &String| Digest::of(name.as_bytes()) == *image;
        assert!(!self.away.lock().unwrap().iter().any(is_gone), "there is no such image");
        assert_ne!(*self.leaving.lock().unwrap(), Some(*image), "it is being removed");
        self.made.lock().unwrap().push(*image);
        assert!(self.alive.lock().unwrap().insert(vm.clone()), "a name is never used twice");
        Ok(())
    }
    async fn boot(&self, _: &VmName, _: &Path) -> Result<Arc<dyn Guest>, VmError> {
        if self.boot_hangs {
            return std::future::pending().await;
        }
        pass(&self.starts).await;
        if let Some(what) = self.boots_fail.lock().unwrap().pop() {
            return Err(VmError::farm(what, "on demand"));
        }
        Ok(Arc::new(NoGuest(Arc::clone(&self.dies))))
    }
    async fn restrict(&self, _: &VmName, _: &NetworkPolicy) -> Result<(), VmError> {
        fault(&self.unfit, VmFault::Network)?;
        match *self.unrestricted.lock().unwrap() {
            true => Err(VmError::farm(VmFault::Network, "not in force")),
            false => Ok(()),
        }
    }
    async fn destroy(&self, vm: &VmName) -> Result<(), VmError> {
        fault(&self.destroys_fail, VmFault::Destroy)?;
        if self.last.as_ref() == Some(vm) && self.alive.lock().unwrap().len() > 1 {
            return Err(VmError::farm(VmFault::Destroy, "it stays"));
        }
        self.alive.lock().unwrap().remove(vm);
        self.seen.lock().unwrap().push(format!("destroyed {vm}"));
        Ok(())
    }
}

#[async_trait]
impl Guest for NoGuest {
    fn workspace(&self) -> &str {
        "/work"
    }
    async fn unpack(&self, _: &str, _: &str) -> Result<(), VmError> {
        Ok(())
    }
    async fn exec(&self, _: &Command) -> Result<Exec, VmError> {
        Err(VmError::farm(VmFault::Lost, "no guest"))
    }
    async fn read(&self, _: &str, _: u64) -> Result<mpsc::Receiver<Bytes>, VmError> {
        Err(VmError::farm(VmFault::Lost, "no guest"))
    }
    async fn list(&self, _: &[ArtifactRule]) -> Result<Listing, VmError> {
        Ok(Listing::default())
    }
    async fn ended(&self) -> VmError {
        self.0.notified().await;
        VmError::farm(VmFault::Lost, "on demand")
    }
}

fn wish(slots: usize, own: &str, floors: &[(&str, usize)]) -> Wish {
    let floors = floors.iter().map(|(image, count)| (ImageRef((*image).into()), *count)).collect();
    Wish { slots, image: ImageRef(own.into()), floors }
}

struct Rig {
    fake: Arc<Fake>,
    pool: Arc<VmPool>,
    images: Arc<ImageStore>,
    inputs: mpsc::Receiver<Input>,
    fence: watch::Sender<Mono>,
}

impl Rig {
    async fn new(slots: usize, fake: Fake) -> Self {
        Self::with(slots, fake, None).await
    }

    /// Each image takes one of the budget.
    async fn with(slots: usize, fake: Fake, budget: Option<u64>) -> Self {
        let fake = Arc::new(fake);
        let (tx, inputs) = mpsc::channel(1_000);
        let fence = watch::Sender::new(Mono(u64::MAX));
        let env: Arc<dyn Env> = Arc::new(SystemEnv::detached());
        let images = ImageStore::start(ImageSetup {
            env: Arc::clone(&env),
            limits: Limits::default(),
            provider: Arc::clone(&fake) as Arc<dyn VmProvider>,
            inputs: tx.clone(),
            book: crate::image_book::BookFile::memory(),
            kept: vec![ImageRef("own".into())],
            budget,
        });
        let setup = PoolSetup {
            env,
            images: Arc::clone(&images),
            limits: Limits { quarantine_ms: 200, ..Limits::default() },
            provider: Arc::clone(&fake) as Arc<dyn VmProvider>,
            inputs: tx,
            fence: fence.subscribe(),
            state_dir: "/state".into(),
            wish: wish(slots, "own", &[]),
        };
        Self { fake, pool: VmPool::start(setup).await, images, inputs, fence }
    }

    async fn claim(&self, n: u32) -> Result<Claimed, VmError> {
        self.pool.claim(attempt(n), None, NetworkPolicy::Default).await
    }

    /// The next news of trouble.
    async fn trouble(&mut self) -> Option<Trouble> {
        let look = async {
            loop {
                if let Some(Input::Trouble(trouble)) = self.inputs.recv().await {
                    return trouble;
                }
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(30), look).await.expect("trouble was told")
    }

    /// Waits until the published slots are these, in any order, and returns nothing else.
    async fn slots(&mut self, expected: &[(SlotState, Option<u32>)]) {
        let mut expected: Vec<_> = expected.iter().map(|(state, n)| (*state, n.map(attempt))).collect();
        expected.sort();
        let look = async {
            loop {
                if let Some(Input::Slots(slots)) = self.inputs.recv().await {
                    let mut seen: Vec<_> = slots.iter().map(|slot| (slot.state, slot.attempt)).collect();
                    seen.sort();
                    if seen == expected {
                        return;
                    }
                }
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(30), look).await.expect("the slots came to this");
    }
}

async fn until(look: impl Fn() -> bool) {
    for _ in 0..3_000 {
        if look() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("it did not come to this");
}

/// Lets a claim come as far as it can while all slots are taken.
async fn waits(mut claim: std::pin::Pin<&mut impl Future<Output = Result<Claimed, VmError>>>) {
    for _ in 0..100 {
        assert!(futures_util::poll!(claim.as_mut()).is_pending());
        tokio::task::yield_now().await;
    }
}

fn attempt(n: u32) -> AttemptRef {
    AttemptRef { job: JobId::from_raw(1), attempt: n }
}

#[tokio::test]
async fn what_an_earlier_daemon_left_is_gone_before_slots_are_offered() {
    let old = VmName::mint(1, 1);
    let fake = Fake { alive: Mutex::new([old.clone()].into()), destroys_fail: Mutex::new(1), ..Fake::default() };
    let mut rig = Rig::new(1, fake).await;
    assert_eq!(*rig.fake.seen.lock().unwrap(), [format!("destroyed {old}")]);
    let told = rig.trouble().await.unwrap();
    assert!(told.drains && told.why.contains("of an earlier run"), "{told:?}");
    assert_eq!(rig.trouble().await, None);
    rig.slots(&[(SlotState::Warm, None)]).await;
}

#[tokio::test]
async fn a_vm_of_an_earlier_daemon_that_stays_keeps_no_other_one_alive() {
    let [stays, goes] = [VmName::mint(1, 1), VmName::mint(1, 2)];
    let fake =
        Fake { alive: Mutex::new([stays.clone(), goes.clone()].into()), last: Some(stays.clone()), ..Fake::default() };
    let rig = tokio::time::timeout(std::time::Duration::from_secs(30), Rig::new(1, fake)).await.unwrap();
    assert_eq!(rig.fake.seen.lock().unwrap()[..2], [goes, stays].map(|vm| format!("destroyed {vm}")));
}

#[tokio::test]
async fn what_an_earlier_daemon_had_begun_is_looked_for_behind_the_first_vm() {
    let mut rig = Rig::new(1, Fake { finds: Some(Semaphore::new(0)), ..Fake::default() }).await;
    let late = VmName::mint(1, 1);
    rig.fake.alive.lock().unwrap().insert(late.clone());
    rig.fake.finds.as_ref().unwrap().add_permits(100);
    until(|| rig.fake.seen.lock().unwrap().contains(&format!("destroyed {late}"))).await;
    rig.slots(&[(SlotState::Warm, None)]).await;
    assert_eq!(rig.fake.alive.lock().unwrap().len(), 1, "its own VM stays");
}

#[tokio::test]
async fn a_look_for_what_an_earlier_daemon_had_begun_is_repeated_where_it_failed() {
    let mut rig = Rig::new(1, Fake { finds: Some(Semaphore::new(0)), ..Fake::default() }).await;
    let late = VmName::mint(1, 1);
    rig.fake.alive.lock().unwrap().insert(late.clone());
    *rig.fake.lists_fail.lock().unwrap() = 1;
    rig.fake.finds.as_ref().unwrap().add_permits(100);
    until(|| *rig.fake.lists_fail.lock().unwrap() == 0).await;
    rig.slots(&[(SlotState::Warm, None)]).await;
    assert!(rig.fake.alive.lock().unwrap().contains(&late));
    drop(rig.claim(1).await.unwrap());
    until(|| rig.fake.seen.lock().unwrap().contains(&format!("destroyed {late}"))).await;
}

#[tokio::test]
async fn a_waiting_vm_is_a_hit_and_serves_one_attempt() {
    let mut rig = Rig::new(2, Fake::default()).await;
    rig.slots(&[(SlotState::Warm, None), (SlotState::Warm, None)]).await;
    let claimed = rig.claim(1).await.unwrap();
    let first = claimed.vm.clone();
    assert!(claimed.vm_source() == Some("warm") && claimed.inbox.starts_with("/state"));
    rig.slots(&[(SlotState::Claimed, Some(1)), (SlotState::Warm, None)]).await;
    rig.pool.release(claimed).await;
    assert!(!rig.fake.alive.lock().unwrap().contains(&first));
    rig.slots(&[(SlotState::Warm, None), (SlotState::Warm, None)]).await;
}

#[tokio::test]
async fn a_dropped_or_panicking_owner_frees_the_slot() {
    let mut rig = Rig::new(1, Fake::default()).await;
    drop(rig.claim(1).await.unwrap());
    rig.slots(&[(SlotState::Recycling, Some(1))]).await;
    let claimed = rig.claim(2).await.unwrap();
    let owner = async move {
        let _held = claimed;
        panic!("on purpose");
    };
    let ended: Result<(), _> = futures_util::FutureExt::catch_unwind(std::panic::AssertUnwindSafe(owner)).await;
    assert!(ended.is_err());
    rig.claim(3).await.unwrap();
}

#[tokio::test]
async fn a_claim_that_is_given_up_is_forgotten() {
    let mut rig = Rig::new(1, Fake::default()).await;
    let (held, pool) = (rig.claim(1).await.unwrap(), Arc::clone(&rig.pool));
    let mut second = std::pin::pin!(pool.claim(attempt(2), None, NetworkPolicy::Default));
    waits(second.as_mut()).await;
    second.set(pool.claim(attempt(3), None, NetworkPolicy::Default));
    waits(second.as_mut()).await;
    drop(held);
    let third = second.await.unwrap();
    assert!(third.stages.unwrap().why == Some(Miss::NoWarmVm));
    rig.slots(&[(SlotState::Claimed, Some(3))]).await;
}

#[tokio::test]
async fn a_vm_that_does_not_start_is_told_to_the_claim_and_costs_no_slot() {
    let fake = Fake { boots_fail: Mutex::new(vec![VmFault::Start]), ..Fake::default() };
    let mut rig = Rig::new(1, fake).await;
    let failed = rig.claim(1).await.map(|_| ());
    // The spare may have failed before the claim came; then the next VM serves it.
    assert!(failed.is_ok() || failed.is_err_and(|error| error.what == VmFault::Start));
    rig.slots(&[(SlotState::Warm, None)]).await;
    rig.claim(2).await.unwrap();
}

#[tokio::test]
async fn a_claim_gets_another_vm_when_one_does_not_start_and_hears_of_the_second() {
    for (faults, expect) in [(1, Ok(())), (2, Err(VmFault::Start))] {
        let mut rig = Rig::new(1, Fake::default()).await;
        rig.slots(&[(SlotState::Warm, None)]).await;
        rig.fake.boots(&vec![VmFault::Start; faults]);
        // Another image, so that no spare takes the faults away.
        let claimed = rig.pool.claim(attempt(1), Some("other"), NetworkPolicy::Default).await;
        assert_eq!(claimed.map(drop).map_err(|error| error.what), expect, "{faults}");
    }
}

#[tokio::test]
async fn a_vm_that_is_not_fit_is_replaced_once() {
    let mut rig = Rig::new(2, Fake::default()).await;
    rig.slots(&[(SlotState::Warm, None), (SlotState::Warm, None)]).await;
    *rig.fake.unfit.lock().unwrap() = 1;
    rig.claim(1).await.unwrap();
    assert_eq!(rig.fake.seen.lock().unwrap().len(), 1, "the unfit one is destroyed");
}

#[tokio::test]
async fn one_fault_of_the_host_sweeps_strays_and_costs_the_claim_nothing() {
    let mut rig = Rig::new(1, Fake::default()).await;
    rig.slots(&[(SlotState::Warm, None)]).await;
    let stray = VmName::mint(1, 1);
    rig.fake.alive.lock().unwrap().insert(stray.clone());
    rig.fake.boots(&[VmFault::Full]);
    rig.pool.claim(attempt(1), Some("other"), NetworkPolicy::Default).await.unwrap();
    until(|| !rig.fake.alive.lock().unwrap().contains(&stray)).await;
    assert_eq!(rig.fake.alive.lock().unwrap().len(), 1, "and no other");
}

#[tokio::test]
async fn an_ill_host_hands_claims_back_says_so_and_is_tried_again() {
    let mut rig = Rig::new(1, Fake::default()).await;
    rig.slots(&[(SlotState::Warm, None)]).await;
    rig.fake.boots(&[VmFault::Full; HOST_FAULTS_MAX as usize]);
    let error = rig.pool.claim(attempt(1), Some("other"), NetworkPolicy::Default).await.map(drop).unwrap_err();
    assert!(error.what == VmFault::Host && error.tail.contains("reboot"), "{error}");
    assert!(rig.trouble().await.is_some_and(|trouble| trouble.drains && trouble.why.contains("reboot")));
    assert_eq!(rig.trouble().await, None, "a VM that is tried later comes up");
    rig.claim(2).await.unwrap();
}

#[tokio::test]
async fn a_vm_that_never_goes_asks_for_a_reboot_until_it_is_gone() {
    let mut rig = Rig::new(1, Fake::default()).await;
    let claimed = rig.claim(1).await.unwrap();
    *rig.fake.destroys_fail.lock().unwrap() = STUCK_TRIES_MAX;
    drop(claimed);
    assert!(rig.trouble().await.is_some_and(|trouble| trouble.drains && trouble.why.contains("reboot")));
    assert_eq!(rig.trouble().await, None);
}

#[tokio::test]
async fn a_warm_vm_that_dies_is_replaced_before_anybody_wants_it() {
    let mut rig = Rig::new(2, Fake::default()).await;
    rig.slots(&[(SlotState::Warm, None), (SlotState::Warm, None)]).await;
    let held = rig.claim(1).await.unwrap();
    rig.slots(&[(SlotState::Claimed, Some(1)), (SlotState::Warm, None)]).await;
    rig.fake.dies.notify_one();
    rig.slots(&[(SlotState::Claimed, Some(1)), (SlotState::Recycling, None)]).await;
    rig.slots(&[(SlotState::Claimed, Some(1)), (SlotState::Warm, None)]).await;
    assert!(rig.fake.alive.lock().unwrap().contains(&held.vm), "a claimed one is its owner's to watch");
}

#[tokio::test]
async fn refusals_are_not_the_slots_fault() {
    let mut rig = Rig::new(1, Fake::default()).await;
    rig.slots(&[(SlotState::Warm, None)]).await;
    let absent = rig.pool.claim(attempt(1), Some("absent"), NetworkPolicy::Default).await.map(|_| ());
    assert_eq!(absent.unwrap_err().what, VmFault::NoImage);
    *rig.fake.unrestricted.lock().unwrap() = true;
    let open = rig.claim(2).await.map(|_| ());
    assert_eq!(open.unwrap_err().what, VmFault::Network);
    *rig.fake.unrestricted.lock().unwrap() = false;
    // The VM whose policy was in doubt is not used for anybody else.
    rig.slots(&[(SlotState::Recycling, Some(2))]).await;
    rig.claim(3).await.unwrap();
}

#[tokio::test]
async fn another_image_takes_the_place_of_a_spare() {
    let mut rig = Rig::new(1, Fake::default()).await;
    rig.slots(&[(SlotState::Warm, None)]).await;
    let claimed = rig.pool.claim(attempt(1), Some("other"), NetworkPolicy::Default).await.unwrap();
    assert_eq!((claimed.image.0.as_str(), claimed.digest), ("other", Digest::of(b"other")));
    let stages = claimed.stages.unwrap();
    assert_eq!((stages.warm, stages.why), (false, Some(Miss::NoWarmVm)));
    assert!(stages.clone_ms.is_some() && stages.boot_ms.is_some() && stages.clock_ms.is_some(), "{stages:?}");
}

#[tokio::test]
async fn the_way_of_an_image_onto_the_host_has_its_own_clock() {
    let fake = Fake { away: Mutex::new(["other".to_owned()].into()), ..Fake::default() };
    let rig = Rig::new(1, fake).await;
    let pulled = async |n| {
        let claimed = rig.pool.claim(attempt(n), Some("other"), NetworkPolicy::Default).await.unwrap();
        claimed.stages.is_some_and(|stages| stages.pull_ms.is_some())
    };
    assert!(pulled(1).await);
    assert!(!pulled(2).await, "it is here");
}

#[tokio::test]
async fn an_image_is_the_same_with_its_tag_and_without() {
    let mut rig = Rig::new(1, Fake::default()).await;
    rig.pool.change(wish(1, "r/own:latest", &[])).await;
    rig.slots(&[(SlotState::Recycling, None)]).await;
    rig.slots(&[(SlotState::Warm, None)]).await;
    for name in ["r/own", "r/own:latest"] {
        let claimed = rig.pool.claim(attempt(1), Some(name), NetworkPolicy::Default).await.unwrap();
        assert_eq!(
            (claimed.image.0.as_str(), claimed.stages.map(|it| it.warm)),
            ("r/own:latest", Some(true)),
            "{name}"
        );
        rig.pool.release(claimed).await;
        rig.slots(&[(SlotState::Warm, None)]).await;
    }
}

#[tokio::test]
async fn a_claim_whose_asker_is_gone_gets_nothing() {
    let rig = Rig::new(1, Fake::default()).await;
    let (frees, _freed) = mpsc::channel(1);
    let setup = PoolSetup {
        env: Arc::new(SystemEnv::detached()),
        images: Arc::clone(&rig.images),
        limits: Limits::default(),
        provider: Arc::clone(&rig.fake) as Arc<dyn VmProvider>,
        inputs: mpsc::channel(1).0,
        fence: rig.fence.subscribe(),
        state_dir: "/state".into(),
        wish: wish(1, "own", &[]),
    };
    let mut runner = Runner::new(setup, frees);
    let image = ImageRef("own".into());
    for is_gone in [true, false] {
        let (reply, answer) = oneshot::channel();
        let answer = (!is_gone).then_some(answer);
        let waiting = Waiting { attempt: attempt(1), image: image.clone() };
        let used = rig.images.get(&image).await.unwrap();
        runner.ask(Claim { waiting, image: used, named: false, reply, missed: None, failures: 0 });
        assert_eq!(runner.claims.len(), usize::from(!is_gone));
        drop(answer);
    }
}

#[tokio::test]
async fn a_claim_after_a_vm_that_was_not_fit_says_so() {
    let mut rig = Rig::new(2, Fake { unfit: Mutex::new(1), ..Fake::default() }).await;
    rig.slots(&[(SlotState::Warm, None), (SlotState::Warm, None)]).await;
    let stages = rig.claim(1).await.unwrap().stages.unwrap();
    assert_eq!((stages.warm, stages.why), (false, Some(Miss::Network)));
}

#[tokio::test]
async fn a_vm_that_will_not_go_closes_its_slot_until_it_is_gone() {
    let mut rig = Rig::new(1, Fake::default()).await;
    let claimed = rig.claim(1).await.unwrap();
    *rig.fake.destroys_fail.lock().unwrap() = 1;
    drop(claimed);
    rig.slots(&[(SlotState::Quarantined, Some(1))]).await;
    rig.slots(&[(SlotState::Warm, None)]).await;
}

#[tokio::test]
async fn close_gives_up_what_is_being_made() {
    let rig = Rig::new(1, Fake { boot_hangs: true, ..Fake::default() }).await;
    until(|| !rig.fake.alive.lock().unwrap().is_empty()).await;
    rig.pool.close().await;
    assert!(rig.fake.alive.lock().unwrap().is_empty());
}

#[tokio::test]
async fn close_destroys_what_nobody_has() {
    let mut rig = Rig::new(2, Fake::default()).await;
    rig.slots(&[(SlotState::Warm, None), (SlotState::Warm, None)]).await;
    rig.pool.close().await;
    assert!(rig.fake.alive.lock().unwrap().is_empty());
    assert!(rig.claim(1).await.is_err());
}

#[tokio::test]
async fn a_change_of_size_and_image_counts_at_once_and_leaves_jobs_alone() {
    let mut rig = Rig::new(2, Fake::default()).await;
    rig.slots(&[(SlotState::Warm, None), (SlotState::Warm, None)]).await;
    let held = rig.claim(1).await.unwrap();
    rig.pool.change(wish(1, "other", &[])).await;
    rig.slots(&[(SlotState::Claimed, Some(1))]).await;
    assert!(rig.fake.alive.lock().unwrap().contains(&held.vm));
    rig.pool.release(held).await;
    rig.slots(&[(SlotState::Warm, None)]).await;
    let next = rig.claim(2).await.unwrap();
    assert_eq!((next.image.0.as_str(), next.vm_source()), ("other", Some("warm")));
    rig.pool.change(wish(2, "other", &[])).await;
    rig.slots(&[(SlotState::Claimed, Some(2)), (SlotState::Warm, None)]).await;
}
