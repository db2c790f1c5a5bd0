//! P: the images of this worker: brings what is wanted, one at a time, evicts what nobody needs, tells the farm what is here.

use std::collections::BTreeSet;
use std::sync::Arc;

use alloy_shared::env::{Env, Mono};
use alloy_shared::id::Digest;
use alloy_shared::limits::{HELD_MAX, Limits};
use alloy_shared::wire::image::{ImageReport, ImageWish, Inventory, PullProgress};
use futures_util::future::{BoxFuture, OptionFuture, select_all};
use tokio::sync::{mpsc, oneshot, watch};

use crate::image_book::BookFile;
use crate::image_plan::{Images, Next};
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
    asks: mpsc::Sender<Ask>,
    wishes: watch::Sender<Option<Vec<ImageWish>>>,
    kept: watch::Sender<Vec<ImageRef>>,
    here: watch::Receiver<BTreeSet<ImageRef>>,
}

/// An image that somebody uses. It is not evicted before this is dropped.
#[derive(Debug, Clone)]
pub struct Use(Arc<Digest>);

impl Use {
    pub fn digest(&self) -> Digest {
        *self.0
    }
}

struct Ask {
    image: ImageRef,
    /// On this host at the moment, as far as the provider knows.
    here: Option<Digest>,
    reply: oneshot::Sender<Result<Use, VmError>>,
}

impl ImageStore {
    pub fn start(setup: ImageSetup) -> Arc<Self> {
        let (asks, asked) = mpsc::channel(HELD_MAX);
        let (wishes, wished) = watch::channel(None);
        let (tell_here, here) = watch::channel(BTreeSet::new());
        let (kept, keeps) = watch::channel(setup.kept.clone());
        let (env, provider) = (Arc::clone(&setup.env), Arc::clone(&setup.provider));
        env.spawn("images", Box::pin(Runner::new(setup, tell_here).run(asked, wished, keeps)));
        Arc::new(Self { provider, asks, wishes, kept, here })
    }

    /// The image for a VM. Brings it if it is not here, which may take an hour; dropping the future ends the wait only.
    pub async fn get(&self, image: &ImageRef) -> Result<Use, VmError> {
        let mut brought = None;
        for _ in 0..ROUNDS {
            let here = self.provider.find(image).await?;
            let (reply, answer) = oneshot::channel();
            self.asks.send(Ask { image: image.clone(), here, reply }).await.map_err(|_| over())?;
            let used = answer.await.map_err(|_| over())??;
            // What was brought may be gone again, or be another one by now: the provider says what the name stands for.
            match here {
                Some(_) => return Ok(used),
                None => brought = Some(used),
            }
        }
        drop(brought);
        Err(VmError::farm(VmFault::Pull, format!("{image} was brought several times and is not there")))
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
    images: Images,
    book: BookFile,
    waiting: Vec<(ImageRef, oneshot::Sender<Result<Use, VmError>>)>,
    /// One for each image that is or was used; more than one owner: it is.
    uses: Vec<Arc<Digest>>,
    work: Option<BoxFuture<'static, Done>>,
    progress: watch::Sender<PullProgress>,
    tell_here: watch::Sender<BTreeSet<ImageRef>>,
    look_at: Mono,
    told: Option<Vec<ImageReport>>,
    tell_at: Mono,
}

impl Runner {
    fn new(setup: ImageSetup, tell_here: watch::Sender<BTreeSet<ImageRef>>) -> Self {
        let book = setup.book.clone();
        let (pulls, known) = (setup.provider.pulls(), book.load());
        Self {
            images: Images::new(&setup.kept, setup.budget, pulls, setup.limits.clone(), known),
            book,
            waiting: Vec::new(),
            uses: Vec::new(),
            work: None,
            progress: watch::channel(PullProgress::default()).0,
            tell_here,
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
            let env = Arc::clone(&self.setup.env);
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
                    self.images.wish(wishes.unwrap_or_default());
                }
                Ok(()) = keeps.changed() => {
                    self.setup.kept.clone_from(&*keeps.borrow_and_update());
                    self.images.keep(&self.setup.kept);
                }
                Ok(()) = progress.changed() => self.images.progress(*progress.borrow_and_update()),
                () = gone => {}
                () = env.sleep_until(wake) => {}
            }
        }
    }

    /// Does what can be done at once. Returns when to look again.
    async fn turn(&mut self) -> Mono {
        let now = self.setup.env.now();
        if now.mono >= self.look_at {
            self.look().await;
        }
        self.uses.retain(|used| Arc::strong_count(used) > 1);
        self.images.uses(self.uses.iter().map(|used| **used).collect::<BTreeSet<_>>());
        // The farm hears of a failure before the job that it ends: it must not send the next one here.
        let tell = self.tell(now.mono).await;
        self.answer(now.mono);
        let before = self.images.book().clone();
        let wake = match self.images.next(now.mono) {
            Next::Pull(image) => self.pull(image),
            Next::BreakOff => {
                self.setup.provider.break_off();
                None
            }
            Next::Remove(digest) => self.remove(digest),
            Next::Untag(tag) => self.untag(tag),
            Next::Wait(wake) => wake,
        };
        if before != *self.images.book() {
            self.save();
        }
        self.tell_here.send_if_modified(|known| {
            let here: BTreeSet<_> = self.setup.kept.iter().filter(|image| self.images.has(image)).cloned().collect();
            std::mem::replace(known, here.clone()) != here
        });
        let more = self.tell(now.mono).await;
        [wake, tell, more].into_iter().flatten().fold(self.look_at, Mono::min)
    }

    /// Asks the provider what is here.
    async fn look(&mut self) {
        let found = self.setup.provider.images().await;
        let now = self.setup.env.now();
        self.look_at = now.mono + if found.is_ok() { LOOK_MS } else { LOOK_AGAIN_MS };
        match found {
            Ok(images) => self.images.found(images, now.wall),
            Err(error) => tracing::warn!(%error, "the images of this host cannot be listed"),
        }
    }

    fn ask(&mut self, ask: Ask) {
        let now = self.setup.env.now();
        if let Some(digest) = ask.here.filter(|digest| self.images.used(*digest, now.wall)) {
            let _asker_is_gone = ask.reply.send(Ok(self.hold(digest)));
            return self.save();
        }
        if ask.here.is_none() {
            self.images.missed(&ask.image);
        }
        match self.images.ask(&ask.image, now.mono) {
            Ok(()) => self.waiting.push((ask.image, ask.reply)),
            Err(error) => {
                let _asker_is_gone = ask.reply.send(Err(error));
            }
        }
    }

    fn hold(&mut self, digest: Digest) -> Use {
        match self.uses.iter().find(|used| ***used == digest) {
            Some(known) => Use(Arc::clone(known)),
            None => {
                let used = Arc::new(digest);
                self.uses.push(Arc::clone(&used));
                Use(used)
            }
        }
    }

    /// Answers those who wait for an image that came or failed, and forgets those who are gone.
    fn answer(&mut self, now: Mono) {
        for (image, reply) in std::mem::take(&mut self.waiting) {
            self.images.unask(&image);
            if reply.is_closed() {
                continue;
            }
            let digest = self.images.digest_of(&image);
            match digest {
                Some(digest) => {
                    let _asker_is_gone = reply.send(Ok(self.hold(digest)));
                }
                None => match self.images.ask(&image, now) {
                    Ok(()) => self.waiting.push((image, reply)),
                    Err(error) => {
                        let _asker_is_gone = reply.send(Err(error));
                    }
                },
            }
        }
    }

    fn pull(&mut self, image: ImageRef) -> Option<Mono> {
        let (provider, progress) = (Arc::clone(&self.setup.provider), self.progress.clone());
        progress.send_replace(PullProgress::default());
        self.work = Some(Box::pin(async move {
            let result = provider.pull(&image, &progress).await;
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
                self.images.pulled(&result, now.mono, now.wall, self.setup.env.dice());
                self.save();
            }
            Done::Removed { what, result } => {
                if let Err(error) = result {
                    tracing::warn!(image = what, %error, "an image cannot be removed");
                }
                self.images.removed();
            }
        }
        self.look_at = now.mono;
    }

    fn save(&self) {
        if let Err(error) = self.book.save(self.images.book()) {
            tracing::warn!(%error, "which images were used when is not written down");
        }
    }

    /// Tells the session what changed. Returns when more is to be told.
    async fn tell(&mut self, now: Mono) -> Option<Mono> {
        let view = self.images.view(now);
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
        let own = self.images.own().to_owned();
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
