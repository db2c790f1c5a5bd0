//! P: the images of this worker: brings what is wanted, one at a time, evicts what nobody needs, tells the farm what is here.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use alloy_shared::env::{Env, Mono};
use alloy_shared::id::Digest;
use alloy_shared::limits::{HELD_MAX, Limits};
use alloy_shared::wire::image::{ImageReport, ImageWish, Inventory, PullProgress};
use futures_util::future::{BoxFuture, OptionFuture, select_all};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::image_book::BookFile;
use crate::image_plan::{Book, Images, Next, USED_STEP_MS};
use crate::image_shelf::{Shelf, Use, Want};
use crate::provider::{ImageRef, VmError, VmFault, VmProvider};
use crate::session::{Input, Inputs};

/// Between two looks at what others may have done to the images of this host.
const LOOK_MS: u64 = 10 * 60_000;
/// After a look that failed.
const LOOK_AGAIN_MS: u64 = 5_000;
/// Progress is told to the farm at most this often.
const TELL_MS: u64 = 500;

/// One to bring it, one to use it, and one for what others do meanwhile.
const ROUNDS: usize = 3;

/// What a store is made of.
pub struct ImageSetup {
    pub env: Arc<dyn Env>,
    pub limits: Limits,
    pub provider: Arc<dyn VmProvider>,
    pub inputs: Inputs,
    /// What it remembers over a restart.
    pub book: BookFile,
    /// What idle slots are made of: always wanted. The first is what a job gets that names none.
    pub kept: Vec<ImageRef>,
    /// Bytes for all images together.
    pub budget: Option<u64>,
}

pub struct ImageStore {
    provider: Arc<dyn VmProvider>,
    shelf: Arc<Mutex<Shelf>>,
    asks: mpsc::Sender<Ask>,
    wishes: watch::Sender<Option<Vec<ImageWish>>>,
    kept: watch::Sender<Vec<ImageRef>>,
    here: watch::Receiver<BTreeSet<ImageRef>>,
    /// A look at an image is over.
    over: Arc<Notify>,
}

/// A name that is being looked at. When that is over, however it ended, the store decides anew what may go.
struct Wanted {
    want: Option<Want>,
    over: Arc<Notify>,
}

impl Drop for Wanted {
    fn drop(&mut self) {
        drop(self.want.take());
        self.over.notify_one();
    }
}

struct Ask {
    image: ImageRef,
    /// On this host, as far as the provider knows.
    here: Option<Digest>,
    /// The count of removals before it was asked.
    seen: u64,
    reply: oneshot::Sender<Result<Use, VmError>>,
}

impl ImageStore {
    pub fn start(setup: ImageSetup) -> Arc<Self> {
        let (asks, asked) = mpsc::channel(HELD_MAX);
        let (wishes, wished) = watch::channel(None);
        let (tell_here, here) = watch::channel(BTreeSet::new());
        let (kept, keeps) = watch::channel(setup.kept.clone());
        let (env, provider) = (Arc::clone(&setup.env), Arc::clone(&setup.provider));
        let runner = Runner::new(setup, tell_here);
        let (shelf, over) = (Arc::clone(&runner.shelf), Arc::clone(&runner.over));
        env.spawn("images", Box::pin(runner.run(asked, wished, keeps)));
        Arc::new(Self { provider, shelf, asks, wishes, kept, here, over })
    }

    /// The image for a VM. Brings it if it is not here, which may take an hour; dropping the future ends the wait only.
    pub async fn get(&self, image: &ImageRef) -> Result<Use, VmError> {
        Ok(self.fetch(image).await?.0)
    }

    /// Like [`ImageStore::get`]; true if it was not here.
    pub async fn fetch(&self, image: &ImageRef) -> Result<(Use, bool), VmError> {
        // No removal begins from here on. One that is under way makes void what the provider says meanwhile.
        let _wanted = Wanted { want: Some(lock(&self.shelf).want(image)), over: Arc::clone(&self.over) };
        let mut brought = None;
        for _ in 0..ROUNDS {
            let seen = lock(&self.shelf).images.removals();
            let here = self.provider.find(image).await?;
            let (reply, answer) = oneshot::channel();
            self.asks.send(Ask { image: image.clone(), here, seen, reply }).await.map_err(|_| over())?;
            let used = answer.await.map_err(|_| over())??;
            // What was brought may be another one by now: the provider says what the name stands for.
            if here == Some(used.digest()) {
                return Ok((used, brought.is_some()));
            }
            brought = Some(used);
        }
        drop(brought);
        Err(VmError::farm(VmFault::Pull, format!("{image} was brought several times and is not there")))
    }

    /// The image for a VM if it is here, at once: whoever decides to make one has it before anybody can decide to remove it.
    pub fn hold(&self, image: &ImageRef) -> Option<Use> {
        lock(&self.shelf).hold_named(image)
    }

    /// True if a VM could be made of it at this moment.
    pub fn has(&self, image: &ImageRef) -> bool {
        lock(&self.shelf).images.has(image)
    }

    /// What the farm wishes: the whole list.
    pub fn wish(&self, wishes: Vec<ImageWish>) {
        self.wishes.send_replace(Some(wishes));
    }

    /// Other images are always wanted from here on.
    pub fn keep(&self, kept: Vec<ImageRef>) {
        self.kept.send_replace(kept);
    }

    /// Those of the images always wanted of which VMs can be made at once; changes are seen by the receiver.
    pub fn here(&self) -> watch::Receiver<BTreeSet<ImageRef>> {
        self.here.clone()
    }
}

fn lock(shelf: &Mutex<Shelf>) -> MutexGuard<'_, Shelf> {
    shelf.lock().unwrap_or_else(PoisonError::into_inner)
}

fn over() -> VmError {
    VmError::farm(VmFault::Lost, "the store of images has ended")
}

/// The end of a piece of work.
enum Done {
    Pulled { image: ImageRef, result: Result<Digest, VmError> },
    Removed { what: String, result: Result<(), VmError> },
}

struct Runner {
    setup: ImageSetup,
    shelf: Arc<Mutex<Shelf>>,
    book: BookFile,
    /// What was written down last.
    kept: Book,
    /// After a write that failed: a disk stays full for a while.
    save_at: Mono,
    waiting: Vec<(ImageRef, oneshot::Sender<Result<Use, VmError>>)>,
    work: Option<BoxFuture<'static, Done>>,
    progress: watch::Sender<PullProgress>,
    /// Breaks off the pull that runs.
    stop: CancellationToken,
    tell_here: watch::Sender<BTreeSet<ImageRef>>,
    over: Arc<Notify>,
    look_at: Mono,
    told: Option<Vec<ImageReport>>,
    tell_at: Mono,
}

impl Runner {
    fn new(setup: ImageSetup, tell_here: watch::Sender<BTreeSet<ImageRef>>) -> Self {
        let book = setup.book.clone();
        let (pulls, known) = (setup.provider.pulls(), book.load());
        let images = Images::new(&setup.kept, setup.budget, pulls, setup.limits.clone(), known.clone());
        Self {
            kept: known,
            save_at: Mono(0),
            shelf: Arc::new(Mutex::new(Shelf::new(images))),
            book,
            waiting: Vec::new(),
            work: None,
            progress: watch::channel(PullProgress::default()).0,
            stop: CancellationToken::new(),
            tell_here,
            over: Arc::default(),
            look_at: Mono(0),
            told: None,
            tell_at: Mono(0),
            setup,
        }
    }

    async fn run(
        mut self,
        mut asked: mpsc::Receiver<Ask>,
        mut wished: watch::Receiver<Option<Vec<ImageWish>>>,
        mut keeps: watch::Receiver<Vec<ImageRef>>,
    ) {
        let mut progress = self.progress.subscribe();
        loop {
            let wake = self.turn().await;
            let (env, over) = (Arc::clone(&self.setup.env), Arc::clone(&self.over));
            let gone = async {
                if self.waiting.is_empty() {
                    return std::future::pending().await;
                }
                select_all(self.waiting.iter_mut().map(|(_, reply)| Box::pin(reply.closed()))).await;
            };
            tokio::select! {
                biased;
                ask = asked.recv() => match ask {
                    Some(ask) => self.ask(ask),
                    None => return,
                },
                Some(done) = OptionFuture::from(self.work.as_mut()) => self.finish(done),
                Ok(()) = wished.changed() => {
                    let wishes = wished.borrow_and_update().clone();
                    self.shelf().images.wish(wishes.unwrap_or_default());
                }
                Ok(()) = keeps.changed() => {
                    self.setup.kept.clone_from(&*keeps.borrow_and_update());
                    self.shelf().images.keep(&self.setup.kept);
                }
                Ok(()) = progress.changed() => self.shelf().images.progress(*progress.borrow_and_update()),
                () = gone => {}
                () = over.notified() => {}
                () = env.sleep_until(wake) => {}
            }
        }
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        lock(&self.shelf)
    }

    /// Does what can be done at once. Returns when to look again.
    async fn turn(&mut self) -> Mono {
        let now = self.setup.env.now();
        // Work stands still while this task waits for the answer, and the answer may have to wait for the work.
        if self.work.is_none() && now.mono >= self.look_at {
            self.look().await;
        }
        // The farm hears of a failure before the job that it ends: it must not send the next one here.
        let tell = self.tell(now.mono).await;
        self.answer(now.mono);
        let next = self.shelf().next(now.mono);
        let wake = match next {
            Next::Pull(image) => self.pull(image),
            Next::BreakOff => {
                self.stop.cancel();
                None
            }
            Next::Remove(digest) => self.remove(digest),
            Next::Untag(tag) => self.untag(tag),
            Next::Wait(wake) => wake,
        };
        let save = self.save();
        let here: BTreeSet<ImageRef> = {
            let shelf = self.shelf();
            self.setup.kept.iter().filter(|image| shelf.images.has(image)).cloned().collect()
        };
        self.tell_here.send_if_modified(|known| std::mem::replace(known, here.clone()) != here);
        let more = self.tell(now.mono).await;
        let look = self.work.is_none().then_some(self.look_at);
        [wake, tell, save, more, look].into_iter().flatten().min().unwrap_or(Mono(u64::MAX))
    }

    /// Asks the provider what is here.
    async fn look(&mut self) {
        let found = self.setup.provider.images().await;
        let now = self.setup.env.now();
        self.look_at = now.mono + if found.is_ok() { LOOK_MS } else { LOOK_AGAIN_MS };
        match found {
            Ok(images) => self.shelf().images.found(images, now.wall),
            Err(error) => tracing::warn!(%error, "the images of this host cannot be listed"),
        }
    }

    fn ask(&mut self, ask: Ask) {
        let now = self.setup.env.now();
        let used = ask.here.and_then(|digest| self.shelf().hold_seen(digest, ask.seen, now.wall));
        if let Some(used) = used {
            let _asker_is_gone = ask.reply.send(Ok(used));
            self.save();
            return;
        }
        if ask.here.is_none() {
            self.shelf().images.missed(&ask.image);
        }
        let asked = self.shelf().images.ask(&ask.image, now.mono);
        match asked {
            Ok(()) => self.waiting.push((ask.image, ask.reply)),
            Err(error) => {
                let _asker_is_gone = ask.reply.send(Err(error));
            }
        }
    }

    /// Answers those who wait for an image that came or failed, and forgets those who are gone.
    fn answer(&mut self, now: Mono) {
        for (image, reply) in std::mem::take(&mut self.waiting) {
            let mut shelf = lock(&self.shelf);
            shelf.images.unask(&image);
            if reply.is_closed() {
                continue;
            }
            let answer = match shelf.hold_named(&image) {
                Some(used) => Ok(used),
                None => match shelf.images.ask(&image, now) {
                    Ok(()) => {
                        self.waiting.push((image, reply));
                        continue;
                    }
                    Err(error) => Err(error),
                },
            };
            let _asker_is_gone = reply.send(answer);
        }
    }

    fn pull(&mut self, image: ImageRef) -> Option<Mono> {
        let (provider, progress) = (Arc::clone(&self.setup.provider), self.progress.clone());
        // Of this pull: one that was given up earlier takes no order of it.
        self.stop = CancellationToken::new();
        let stop = self.stop.clone();
        progress.send_replace(PullProgress::default());
        self.work = Some(Box::pin(async move {
            let result = provider.pull(&image, &progress, &stop).await;
            Done::Pulled { image, result }
        }));
        None
    }

    fn remove(&mut self, digest: Digest) -> Option<Mono> {
        tracing::info!(%digest, "removing an image");
        let provider = Arc::clone(&self.setup.provider);
        self.work = Some(Box::pin(async move {
            Done::Removed { what: digest.to_string(), result: provider.remove(&digest).await }
        }));
        None
    }

    fn untag(&mut self, tag: ImageRef) -> Option<Mono> {
        tracing::info!(%tag, "removing a tag of an image that has others");
        let provider = Arc::clone(&self.setup.provider);
        self.work =
            Some(Box::pin(async move { Done::Removed { result: provider.untag(&tag).await, what: tag.to_string() } }));
        None
    }

    fn finish(&mut self, done: Done) {
        self.work = None;
        let now = self.setup.env.now();
        match done {
            Done::Pulled { image, result } => {
                match &result {
                    Ok(digest) => tracing::info!(%image, %digest, "the image is here"),
                    Err(error) => tracing::warn!(%image, %error, "an image did not come"),
                }
                self.shelf().images.pulled(&result, now.mono, now.wall, self.setup.env.dice());
                self.save();
            }
            Done::Removed { what, result } => {
                if let Err(error) = &result {
                    tracing::warn!(image = what, %error, "an image cannot be removed");
                }
                self.shelf().images.removed(result.is_ok(), now.mono, self.setup.env.dice());
            }
        }
        self.look_at = now.mono;
    }

    /// Writes down what is worth it. Returns when to try again.
    fn save(&mut self) -> Option<Mono> {
        let book = self.shelf().images.book().clone();
        if !book.is_news_after(&self.kept) {
            return None;
        }
        let now = self.setup.env.now().mono;
        if now < self.save_at {
            return Some(self.save_at);
        }
        match self.book.save(&book) {
            Ok(()) => {
                self.kept = book;
                None
            }
            Err(error) => {
                tracing::warn!(%error, "which images were used when is not written down");
                self.save_at = now + USED_STEP_MS;
                Some(self.save_at)
            }
        }
    }

    /// Tells the session what changed. Returns when more is to be told.
    async fn tell(&mut self, now: Mono) -> Option<Mono> {
        let view = self.shelf().view(now);
        if self.told.as_ref() == Some(&view) {
            return None;
        }
        // Progress can wait, everything else cannot.
        let same = self.told.as_deref().is_some_and(|told| told.iter().map(still).eq(view.iter().map(still)));
        if same && now < self.tell_at {
            return Some(self.tell_at);
        }
        self.tell_at = now + TELL_MS;
        self.told = Some(view.clone());
        let own = self.shelf().images.own().to_owned();
        let inventory = Inventory { pulls: self.setup.provider.pulls(), own, images: view };
        // The session ends before the store when the daemon stops.
        let _session_is_gone = self.setup.inputs.send(Input::Images(inventory)).await;
        None
    }
}

/// A report without what changes all the time.
fn still(report: &ImageReport) -> ImageReport {
    ImageReport { pulling: report.pulling.map(|_| PullProgress::default()), ..report.clone() }
}

#[cfg(test)]
mod tests;
