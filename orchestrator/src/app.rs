//! P: one orchestrator, whole: what it stands on, how it begins, how it says goodbye.

use std::collections::BTreeSet;
use std::sync::Arc;

use alloy_shared::env::{Env, Ms};
use alloy_shared::id::JobId;
use alloy_shared::limits::Limits;
use alloy_shared::secret::Secret;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::auth::sign_in::SignIn;
use crate::auth::{Auth, Grants};
use crate::blobs::Blobs;
use crate::desk::{Answer, Request};
use crate::desk_loop::{self, Door};
use crate::gc;
use crate::hub::Hub;
use crate::keep::Keep;
use crate::log_sync::LogSync;
use crate::logs::Logs;
use crate::replica::{self, Replica};
use crate::session::drive::sweep;
use crate::store::sql::Shared;
use crate::store::{Store, StoreError};
use crate::wake::Wake;

/// Between two looks whether the books let go of all attempts.
const LOOK_AGAIN_MS: u64 = 20;

/// Everything that handles a request gets a reference to it.
pub struct App {
    pub store: Arc<dyn Store>,
    pub desk: Door,
    pub hub: Arc<Hub>,
    pub wake: Arc<Wake>,
    pub logs: Arc<Logs>,
    pub log_sync: LogSync,
    /// The farm as this orchestrator shares it with others; absent: it is the only one.
    pub shared: Option<Shared>,
    pub blobs: Arc<Blobs>,
    pub env: Arc<dyn Env>,
    pub limits: Limits,
    /// What is kept, and for how long.
    pub keep: Keep,
    pub auth: Auth,
    pub grants: Grants,
    /// Where people and workers reach this farm; without a slash at its end.
    pub base_url: String,
    /// Forwarded addresses are believed.
    pub behind_proxy: bool,
    /// Bytes for new tokens: the operating system's, or a test's.
    pub random: fn() -> [u8; 32],
    /// Cancelled when nothing new is taken: streams end, sessions say goodbye.
    pub stopping: CancellationToken,
    /// Requests for new jobs under way. Closed, none is taken any more.
    pub submits: TaskTracker,
    /// The sessions of workers; the stop waits for their goodbyes.
    pub sessions: TaskTracker,
}

/// What an orchestrator stands on.
pub struct Ground {
    pub store: Arc<dyn Store>,
    pub logs: Logs,
    pub blobs: Arc<Blobs>,
    /// There may be other orchestrators of this farm.
    pub shared: Option<Shared>,
    pub env: Arc<dyn Env>,
    pub limits: Limits,
    pub keep: Keep,
    /// The farm's own secret.
    pub secret: Secret<[u8; 32]>,
    pub base_url: String,
    pub behind_proxy: bool,
    pub random: fn() -> [u8; 32],
    /// Takes tokens of a sign-in service; without it, only the farm's own are good.
    pub sign_in: Option<SignIn>,
    pub stopping: CancellationToken,
}

impl App {
    /// Loads the live jobs. Nobody is served yet.
    pub async fn on(ground: Ground) -> Result<Arc<Self>, StoreError> {
        let Ground {
            store,
            logs,
            blobs,
            shared,
            env,
            limits,
            keep,
            secret,
            base_url,
            behind_proxy,
            random,
            sign_in,
            stopping,
        } = ground;
        let hub = Arc::new(Hub::new(limits.clone(), env.now().mono));
        let wake = Arc::new(Wake::default());
        let logs = Arc::new(logs);
        // What changes from here on is learned from the others, also what the desk loads meanwhile.
        let horizon = match &shared {
            Some(shared) => Some(shared.horizon().await?),
            None => None,
        };
        let (speak, spoken) = shared.as_ref().map(|_| mpsc::channel(1)).unzip();
        let limited = limits.clone();
        let desk = desk_loop::spawn(store.clone(), hub.clone(), wake.clone(), env.clone(), limited, speak).await?;
        let app = Arc::new(Self {
            log_sync: LogSync::spawn(logs.clone(), hub.clone(), wake.clone(), &env),
            shared: shared.clone(),
            auth: Auth::new(env.clone()).with(sign_in),
            grants: Grants::new(&secret),
            base_url,
            behind_proxy,
            random,
            submits: TaskTracker::new(),
            sessions: TaskTracker::new(),
            blobs,
            store,
            desk,
            hub,
            wake,
            logs,
            env,
            limits,
            keep,
            stopping,
        });
        if let (Some(shared), Some(horizon), Some(spoken)) = (shared, horizon, spoken) {
            replica::begin(&app, Replica { shared, horizon, spoken });
        }
        Ok(app)
    }

    /// Starts what an orchestrator does although nobody asks.
    pub fn begin(self: &Arc<Self>) {
        if self.shared.is_none() {
            self.env.spawn("sweep", Box::pin(sweep(self.clone())));
            self.env.spawn("gc", Box::pin(gc::run(self.clone())));
        }
    }

    /// Counts every attempt as lost that a worker holds by the books: the farm was restored from a backup, nothing of then runs
    /// any more, and what its workers say of it is news of another history.
    pub async fn let_go_of_leases(&self) {
        while let Answer::Holders(holders) = self.desk.ask(|ticket| Request::Holders { ticket }).await {
            if holders.is_empty() {
                return;
            }
            for worker in holders {
                self.desk.tell(Request::Silent(worker)).await;
            }
            // A commit that failed left some of them.
            self.env.sleep_until(self.env.now().mono + LOOK_AGAIN_MS).await;
        }
    }

    /// When it returns, no further job comes into being: what a look at the live jobs shows is all there is.
    pub async fn take_no_more_jobs(&self) {
        self.submits.close();
        self.submits.wait().await;
    }

    /// Takes jobs as before.
    pub fn take_jobs_again(&self) {
        self.submits.reopen();
    }

    /// Gives these jobs to no worker, as long as this process is the farm's host.
    pub async fn leave_asleep(&self, jobs: BTreeSet<JobId>) {
        // Without an answer the desk is gone, and gives no job to anybody.
        let _ = self.desk.ask(|ticket| Request::Asleep { ticket, jobs }).await;
    }

    /// Tells the workers to come back and waits until their sessions have ended. False: some did not in time.
    pub async fn say_goodbye(&self, grace_ms: u64) -> bool {
        self.hub.stop();
        self.sessions.close();
        tokio::select! {
            biased;
            () = self.sessions.wait() => true,
            () = self.env.sleep_until(self.env.now().mono + grace_ms) => false,
        }
    }

    /// What time it is for the books: where several orchestrators write them, their database tells.
    pub async fn books_time(&self) -> Result<Ms, StoreError> {
        match &self.shared {
            Some(shared) => shared.clock().await,
            None => Ok(self.env.now().wall),
        }
    }

    /// The last thing of all: log bytes become durable.
    pub async fn settle(&self) {
        if !self.log_sync.flush().await {
            tracing::warn!("the last log bytes are perhaps not on the disk; their workers still have them");
        }
    }
}
