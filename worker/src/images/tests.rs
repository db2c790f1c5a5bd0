use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;

use alloy_shared::env::{Ms, Now};
use alloy_shared::runtime::SystemEnv;
use alloy_shared::wire::image::ImageWant;
use async_trait::async_trait;
use tokio::sync::{RwLock, Semaphore};

use super::*;
use crate::provider::{Guest, Image, NetworkPolicy, Shape, VmName};

/// A registry whose pulls end when a permit is given.
struct Fake {
    here: Mutex<BTreeMap<String, u64>>,
    pulls: Semaphore,
    /// Of looks for one image, and of removals.
    finds: Semaphore,
    removes: Semaphore,
    removing: Mutex<Vec<Digest>>,
    faults: Mutex<Vec<VmError>>,
    pulled: Mutex<Vec<String>>,
    /// A pull lets nobody list the images.
    gate: RwLock<()>,
}

#[async_trait]
impl VmProvider for Fake {
    async fn list(&self) -> Result<Vec<VmName>, VmError> {
        Ok(vec![])
    }
    async fn images(&self) -> Result<Vec<Image>, VmError> {
        let _shared = self.gate.read().await;
        let image = |(name, size): (&String, &u64)| Image {
            digest: Digest::of(name.as_bytes()),
            names: vec![ImageRef(name.clone())],
            size_bytes: *size,
            removable: true,
        };
        Ok(self.here.lock().unwrap().iter().map(image).collect())
    }
    fn pulls(&self) -> bool {
        true
    }
    async fn find(&self, image: &ImageRef) -> Result<Option<Digest>, VmError> {
        self.finds.acquire().await.unwrap().forget();
        Ok(self.here.lock().unwrap().contains_key(&image.0).then(|| Digest::of(image.0.as_bytes())))
    }
    async fn pull(
        &self,
        image: &ImageRef,
        progress: &watch::Sender<PullProgress>,
        stop: &CancellationToken,
    ) -> Result<Digest, VmError> {
        let _alone = self.gate.write().await;
        progress.send_replace(PullProgress { percent: 40, total_bytes: Some(9) });
        self.pulled.lock().unwrap().push(image.0.clone());
        tokio::select! {
            biased;
            () = stop.cancelled() => return Err(VmError::farm(VmFault::Pull, "broken off")),
            permit = self.pulls.acquire() => permit.unwrap().forget(),
        }
        if let Some(error) = self.faults.lock().unwrap().pop() {
            return Err(error);
        }
        self.here.lock().unwrap().insert(image.0.clone(), 10);
        Ok(Digest::of(image.0.as_bytes()))
    }
    async fn remove(&self, image: &Digest) -> Result<(), VmError> {
        self.removing.lock().unwrap().push(*image);
        self.removes.acquire().await.unwrap().forget();
        self.here.lock().unwrap().retain(|name, _| Digest::of(name.as_bytes()) != *image);
        Ok(())
    }
    async fn create(&self, _: &VmName, _: &Digest, _: &Shape) -> Result<(), VmError> {
        Ok(())
    }
    async fn boot(&self, _: &VmName, _: &Path) -> Result<Arc<dyn Guest>, VmError> {
        Err(VmError::farm(VmFault::Start, "none"))
    }
    async fn restrict(&self, _: &VmName, _: &NetworkPolicy) -> Result<(), VmError> {
        Ok(())
    }
    async fn destroy(&self, _: &VmName) -> Result<(), VmError> {
        Ok(())
    }
}

struct Rig {
    fake: Arc<Fake>,
    store: Arc<ImageStore>,
    inputs: mpsc::Receiver<Input>,
    _dir: tempfile::TempDir,
}

impl Rig {
    fn new(here: &[&str], budget: Option<u64>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let book = BookFile::new(dir.path());
        Self::with(here, budget, Arc::new(SystemEnv::detached()), book, dir)
    }

    fn with(here: &[&str], budget: Option<u64>, env: Arc<dyn Env>, book: BookFile, dir: tempfile::TempDir) -> Self {
        let fake = Arc::new(Fake {
            here: Mutex::new(here.iter().map(|name| ((*name).to_owned(), 10)).collect()),
            pulls: Semaphore::new(0),
            finds: Semaphore::new(Semaphore::MAX_PERMITS),
            removes: Semaphore::new(Semaphore::MAX_PERMITS),
            removing: Mutex::default(),
            faults: Mutex::default(),
            pulled: Mutex::default(),
            gate: RwLock::default(),
        });
        let (tx, inputs) = mpsc::channel(1_000);
        let store = ImageStore::start(ImageSetup {
            env,
            limits: Limits::scaled(20),
            provider: Arc::clone(&fake) as Arc<dyn VmProvider>,
            inputs: tx,
            book,
            kept: vec![ImageRef("r/own:1".into())],
            budget,
        });
        Self { fake, store, inputs, _dir: dir }
    }

    /// Waits for an inventory in which this holds of the image.
    async fn until(&mut self, name: &str, holds: impl Fn(Option<&ImageReport>) -> bool) {
        let look = async {
            loop {
                if let Some(Input::Images(inventory)) = self.inputs.recv().await
                    && holds(inventory.images.iter().find(|report| report.name == name))
                {
                    return;
                }
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(30), look).await.expect("the inventory came to this");
    }
}

/// A clock that a test moves.
struct Clock {
    ms: watch::Sender<u64>,
    system: SystemEnv,
}

#[async_trait]
impl Env for Clock {
    fn now(&self) -> Now {
        let ms = *self.ms.borrow();
        Now { wall: Ms(ms as i64), mono: Mono(ms) }
    }
    async fn sleep_until(&self, at: Mono) {
        self.ms.subscribe().wait_for(|now| *now >= at.0).await.unwrap();
    }
    fn spawn(&self, name: &'static str, task: BoxFuture<'static, ()>) {
        self.system.spawn(name, task);
    }
    fn dice(&self) -> u64 {
        0
    }
}

fn wish(name: &str, want: ImageWant) -> ImageWish {
    ImageWish { name: name.into(), want, pinned: false, generation: 3 }
}

fn is_here(report: Option<&ImageReport>) -> bool {
    report.is_some_and(|report| report.digest.is_some())
}

#[tokio::test]
async fn an_image_is_brought_for_whoever_waits_and_its_progress_is_told() {
    let mut rig = Rig::new(&["r/own:1"], None);
    let (store, image) = (Arc::clone(&rig.store), ImageRef("r/job:1".into()));
    let fake = Arc::clone(&rig.fake);
    let pulling = |report: Option<&ImageReport>| report.and_then(|report| report.pulling).map(|now| now.percent);
    let look = async {
        rig.until("r/job:1", |report| pulling(report) == Some(40)).await;
        fake.pulls.add_permits(1);
    };
    let (one, two, ()) = tokio::join!(store.get(&image), store.get(&image), look);
    assert_eq!(one.unwrap().digest(), two.unwrap().digest());
    assert_eq!(*rig.fake.pulled.lock().unwrap(), ["r/job:1"], "once for both");
    rig.until("r/job:1", is_here).await;
}

#[tokio::test]
async fn a_failure_is_told_to_whoever_waits_and_to_the_next_one_without_asking_again() {
    let mut rig = Rig::new(&["r/own:1"], None);
    rig.fake.faults.lock().unwrap().push(VmError::policy(VmFault::NoImage, "404"));
    rig.fake.pulls.add_permits(1);
    for _ in 0..2 {
        let error = rig.store.get(&ImageRef("r/no:1".into())).await.unwrap_err();
        assert_eq!((error.what, error.tail.as_str()), (VmFault::NoImage, "404"));
    }
    assert_eq!(rig.fake.pulled.lock().unwrap().len(), 1);
    rig.until("r/no:1", |report| report.is_some_and(|report| report.failed.as_ref().is_some_and(|f| f.refused))).await;
}

#[tokio::test]
async fn wishes_are_fulfilled_and_what_is_used_outlives_the_budget() {
    let mut rig = Rig::new(&["r/own:1", "r/used:1"], Some(25));
    let used = rig.store.get(&ImageRef("r/used:1".into())).await.unwrap();
    assert!(rig.store.here().wait_for(|here| !here.is_empty()).await.is_ok());
    rig.store.wish(vec![wish("r/new:1", ImageWant::Present)]);
    rig.fake.pulls.add_permits(1);
    rig.until("r/new:1", |report| report.is_some_and(|report| report.generation == 3)).await;
    assert!(rig.fake.here.lock().unwrap().contains_key("r/used:1"));
    drop(used);
    rig.until("r/used:1", |report| report.is_none()).await;
    assert!(rig.fake.here.lock().unwrap().contains_key("r/new:1"), "a wish is kept whatever the budget");
}

#[tokio::test]
async fn a_wish_to_remove_is_fulfilled() {
    let mut rig = Rig::new(&["r/own:1", "r/x:1"], None);
    rig.until("r/x:1", is_here).await;
    rig.store.wish(vec![wish("r/x:1", ImageWant::Absent), wish("r/own:1", ImageWant::Absent)]);
    rig.until("r/x:1", |report| report.is_some_and(|r| r.digest.is_none() && r.generation == 3)).await;
    assert_eq!(rig.fake.here.lock().unwrap().keys().collect::<Vec<_>>(), ["r/own:1"], "idle slots need it");
}

#[tokio::test]
async fn what_somebody_is_about_to_use_is_not_evicted_while_he_looks_for_it() {
    let mut rig = Rig::new(&["r/own:1", "r/x:1"], Some(15));
    rig.fake.finds.forget_permits(Semaphore::MAX_PERMITS);
    let (store, fake, image) = (Arc::clone(&rig.store), Arc::clone(&rig.fake), ImageRef("r/x:1".into()));
    let look = async {
        // By then the store has decided more than once.
        store.wish(vec![wish("r/own:1", ImageWant::Present)]);
        fake.pulls.add_permits(1);
        rig.until("r/own:1", |report| report.is_some_and(|report| report.generation == 3)).await;
        assert!(fake.removing.lock().unwrap().is_empty());
        fake.finds.add_permits(1);
    };
    let (used, ()) = tokio::join!(store.get(&image), look);
    drop(used.unwrap());
    rig.until("r/x:1", |report| report.is_none()).await;
}

#[tokio::test]
async fn who_comes_while_an_image_is_being_removed_gets_it_after_it_was_brought_again() {
    let mut rig = Rig::new(&["r/own:1", "r/x:1"], Some(15));
    rig.fake.removes.forget_permits(Semaphore::MAX_PERMITS);
    rig.until("r/x:1", is_here).await;
    while rig.fake.removing.lock().unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    let image = ImageRef("r/x:1".into());
    let mut get = std::pin::pin!(rig.store.get(&image));
    for _ in 0..100 {
        assert!(futures_util::poll!(get.as_mut()).is_pending(), "it is still there, and goes");
        tokio::task::yield_now().await;
    }
    rig.fake.removes.add_permits(1);
    rig.fake.pulls.add_permits(1);
    let used = get.await.unwrap();
    assert_eq!(*rig.fake.pulled.lock().unwrap(), ["r/x:1"]);
    assert!(rig.fake.here.lock().unwrap().contains_key("r/x:1") && used.digest() == Digest::of(b"r/x:1"));
}

#[tokio::test]
async fn what_is_brought_beyond_the_budget_is_brought_once_and_stays_while_it_is_used() {
    let mut rig = Rig::new(&["r/own:1"], Some(15));
    rig.fake.pulls.add_permits(9);
    let used = rig.store.get(&ImageRef("r/x:1".into())).await.unwrap();
    assert_eq!(*rig.fake.pulled.lock().unwrap(), ["r/x:1"]);
    assert!(rig.fake.removing.lock().unwrap().is_empty());
    drop(used);
    rig.until("r/x:1", |report| report.is_none()).await;
}

#[tokio::test]
async fn a_look_that_is_given_up_lets_what_it_kept_go_at_once() {
    let mut rig = Rig::new(&["r/own:1", "r/x:1"], None);
    rig.until("r/x:1", |report| report.is_some()).await;
    rig.fake.finds.forget_permits(Semaphore::MAX_PERMITS);
    let image = ImageRef("r/x:1".into());
    let store = Arc::clone(&rig.store);
    let mut look = Box::pin(store.get(&image));
    assert!(futures_util::poll!(look.as_mut()).is_pending());
    let wish = ImageWish { name: "r/x:1".into(), want: ImageWant::Absent, pinned: false, generation: 1 };
    rig.store.wish(vec![wish]);
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(*rig.fake.removing.lock().unwrap(), [], "somebody looks at it");
    drop(look);
    rig.until("r/x:1", |report| report.is_none_or(|report| report.digest.is_none())).await;
    assert_eq!(*rig.fake.removing.lock().unwrap(), [Digest::of(b"r/x:1")]);
}

#[tokio::test]
async fn a_pull_that_nobody_wants_is_broken_off_and_the_next_one_is_not() {
    let mut rig = Rig::new(&["r/own:1"], None);
    let is_pulling = |report: Option<&ImageReport>| report.is_some_and(|report| report.pulling.is_some());
    rig.store.wish(vec![wish("r/x:1", ImageWant::Present)]);
    rig.until("r/x:1", is_pulling).await;
    rig.store.wish(vec![wish("r/y:1", ImageWant::Present)]);
    rig.until("r/y:1", is_pulling).await;
    rig.fake.pulls.add_permits(1);
    rig.until("r/y:1", is_here).await;
    assert_eq!(*rig.fake.pulled.lock().unwrap(), ["r/x:1", "r/y:1"]);
}

#[tokio::test]
async fn a_look_that_falls_due_during_a_pull_comes_after_it_and_keeps_nobody_waiting() {
    let clock = Arc::new(Clock { ms: watch::Sender::new(0), system: SystemEnv::detached() });
    let dir = tempfile::tempdir().unwrap();
    let mut rig = Rig::with(&["r/own:1"], None, clock.clone(), BookFile::memory(), dir);
    rig.store.wish(vec![wish("r/x:1", ImageWant::Present)]);
    rig.until("r/x:1", |report| report.is_some_and(|report| report.pulling.is_some())).await;
    rig.fake.here.lock().unwrap().insert("r/by_hand:1".into(), 10);
    clock.ms.send_replace(LOOK_MS);
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    let own = ImageRef("r/own:1".into());
    let asked = tokio::time::timeout(std::time::Duration::from_secs(30), rig.store.get(&own)).await;
    asked.expect("an ask is answered during a pull").unwrap();
    rig.fake.pulls.add_permits(1);
    rig.until("r/by_hand:1", is_here).await;
}

#[tokio::test]
async fn what_cannot_be_written_down_is_tried_again_after_a_while_and_not_at_every_turn() {
    let clock = Arc::new(Clock { ms: watch::Sender::new(0), system: SystemEnv::detached() });
    let dir = tempfile::tempdir().unwrap();
    // A disk that takes nothing: the directory is missing.
    let state = dir.path().join("state");
    let book = BookFile::new(&state);
    let mut rig = Rig::with(&["r/own:1"], None, clock.clone(), book.clone(), dir);
    let is_pulling = |report: Option<&ImageReport>| report.is_some_and(|report| report.pulling.is_some());
    // A turn that tells this has tried to write before.
    rig.store.here().wait_for(|here| !here.is_empty()).await.unwrap();
    std::fs::create_dir(&state).unwrap();
    for (ms, name) in [(0, "r/x:1"), (USED_STEP_MS - 1, "r/y:1")] {
        clock.ms.send_replace(ms);
        rig.store.wish(vec![wish(name, ImageWant::Present)]);
        rig.until(name, is_pulling).await;
        rig.fake.pulls.add_permits(1);
        rig.until(name, is_here).await;
        assert_eq!(book.load(), Book::default(), "after {ms} ms");
    }
    clock.ms.send_replace(USED_STEP_MS);
    let written = async {
        while book.load() == Book::default() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), written).await.expect("it is written down by itself");
    assert_eq!(book.load().used_at.len(), 3);
}
