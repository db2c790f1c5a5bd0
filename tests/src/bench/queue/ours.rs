//! Alloy: the desk's loop on a store that orchestrators share, and sessions that finish each job as soon as they hear of it.

use std::sync::Arc;

use alloy_shared::env::{Env, Ms};
use alloy_shared::id::{DEFAULT_ORG, Digest, Labels, TokenId, WorkerId, request_key};
use alloy_shared::limits::Limits;
use alloy_shared::runtime::SystemEnv;
use alloy_shared::secret::TokenKind;
use alloy_shared::wire::farm::Role;
use alloy_shared::wire::job::{End, SubmitJob};
use alloy_shared::wire::session::{SlotState, SlotView};
use anyhow::{Context as _, Result, bail};
use async_trait::async_trait;
use orchestrator::desk::{Answer, By, From, Offer, Request};
use orchestrator::desk_loop::{self, Door};
use orchestrator::hub::{Hub, Mail};
use orchestrator::job::{Event, Step};
use orchestrator::store::sql::SqlStore;
use orchestrator::store::write::{Enrol, IdempotencyKey, OpenSession};
use orchestrator::store::{Group, Job, Store as _, TokenRow, Worker, Write};
use orchestrator::wake::Wake;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{Books, Queue, number_of, spec};

/// Workers, and the slots of each.
pub(super) type Hosts = (usize, usize);
pub(super) const MANY: Hosts = (8, 64);

/// A job that was given to a worker, and who may report its end.
pub(super) type Held = (Box<Job>, From);

pub(super) struct Ours {
    door: Door,
    env: Arc<dyn Env>,
    store: Arc<SqlStore>,
    tasks: tokio::sync::Mutex<JoinSet<()>>,
}

impl Ours {
    /// With `held`, jobs that are given to workers go there and are not finished.
    pub(super) async fn start(
        url: &str,
        (workers, slots): Hosts,
        books: Arc<Books>,
        held: Option<mpsc::Sender<Held>>,
    ) -> Result<Self> {
        let store = Arc::new(SqlStore::open_shared(url, "bench".into()).await?);
        let env: Arc<dyn Env> = Arc::new(SystemEnv::detached());
        let limits = Limits::default();
        let hub = Arc::new(Hub::new(limits.clone(), env.now().mono));
        let (speak, mut spoken) = mpsc::channel(1);
        let door =
            desk_loop::spawn(store.clone(), hub.clone(), Arc::new(Wake::default()), env.clone(), limits, Some(speak))
                .await?;
        let mut tasks = JoinSet::new();
        let shared = store.shared().context("a shared store")?.clone();
        tasks.spawn(async move {
            while spoken.recv().await.is_some() {
                // Others would hear of it; there are none.
                let _ = shared.notify().await;
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        });
        for number in 0..workers {
            let (worker, epoch) = enrol(&store, number).await?;
            let letters = hub.open(worker, epoch, None, env.now().mono);
            tasks.spawn(session(letters, door.clone(), (worker, epoch), books.clone(), held.clone()));
            door.tell(Request::Offer(offer(worker, number, slots))).await;
        }
        Ok(Self { door, env, store, tasks: tokio::sync::Mutex::new(tasks) })
    }

    pub(super) fn door(&self) -> &Door {
        &self.door
    }
}

#[async_trait]
impl Queue for Ours {
    async fn submit(&self, number: u64) -> Result<()> {
        let by = By { org: DEFAULT_ORG, caller: "bench".into() };
        let key = IdempotencyKey {
            org: DEFAULT_ORG,
            caller: by.caller.clone(),
            key: request_key(self.env.now().wall, (self.env.dice(), self.env.dice())),
            body: Digest::of(b"bench"),
        };
        let (id, body) = (self.door.new_job(&*self.env), Arc::new(SubmitJob { spec: spec(number), source: None }));
        match self.door.ask(|ticket| Request::Submit { ticket, id, by, body, key: Some(key) }).await {
            Answer::Job(_) => Ok(()),
            other => bail!("a submit was refused: {other:?}"),
        }
    }

    async fn stop(&self) {
        self.tasks.lock().await.shutdown().await;
        self.store.close().await;
    }
}

/// Reports the end of a job.
pub(super) async fn finish(door: &Door, from: From) -> Result<()> {
    let event = Event::Finished { attempt: from.at.attempt, end: End::success() };
    match door.ask(|ticket| Request::Report { ticket, from, seq: 1, event, news: Box::default() }).await {
        Answer::Job(_) => Ok(()),
        other => bail!("an end was refused: {other:?}"),
    }
}

async fn session(
    mut letters: mpsc::Receiver<Mail>,
    door: Door,
    (worker, epoch): (WorkerId, i64),
    books: Arc<Books>,
    held: Option<mpsc::Sender<Held>>,
) {
    let mut ends = JoinSet::new();
    while let Some(mail) = letters.recv().await {
        while ends.try_join_next().is_some() {}
        let Mail::Job(job) = mail else { continue };
        if !matches!(job.state.step, Step::Assigned { .. }) {
            continue;
        }
        books.claims(number_of(&job.spec));
        let from = From { at: job.attempt(), worker, epoch };
        if let Some(held) = &held {
            // Whoever counts them may have gone.
            let _ = held.send((job, from)).await;
            continue;
        }
        let (door, books) = (door.clone(), books.clone());
        ends.spawn(async move {
            match finish(&door, from).await {
                Ok(()) => books.finishes(),
                Err(error) => books.breaks(error),
            }
        });
    }
    books.breaks("its session was cut");
}

fn offer(worker: WorkerId, number: usize, slots: usize) -> Offer {
    let free = SlotView { state: SlotState::Warm, attempt: None, image: None };
    Offer {
        worker,
        org: DEFAULT_ORG,
        name: format!("mini-{number}"),
        labels: Labels::default(),
        slots: vec![free; slots],
        images: Arc::default(),
        draining: false,
    }
}

/// A worker with a session, as the books know it.
async fn enrol(store: &SqlStore, number: usize) -> Result<(WorkerId, i64)> {
    let id = WorkerId::mint(Ms(1), (0, number as u64));
    let token = TokenRow {
        id: TokenId::mint(Ms(1), (0, number as u64)),
        org: DEFAULT_ORG,
        hash: Digest::of(format!("token {number}").as_bytes()),
        kind: TokenKind::Join,
        role: Role::Developer,
        name: format!("token {number}"),
        shown: String::new(),
        labels: Labels::default(),
        created_at: Ms(1),
        expires_at: None,
        revoked_at: None,
        used_by: None,
    };
    let worker = Worker {
        id,
        org: DEFAULT_ORG,
        name: format!("mini-{number}"),
        public_key: Digest::of(format!("worker {number}").as_bytes()).0,
        labels: Labels::default(),
        host_labels: Labels::default(),
        version: String::new(),
        epoch: 0,
        boot: String::new(),
        draining: false,
        drain_note: None,
        enrolled_at: Ms(1),
        seen_at: None,
        revoked: false,
    };
    let enrol = Enrol { token: token.hash, at: Ms(2), worker };
    let open =
        OpenSession { worker: id, boot: "b".into(), labels: Labels::default(), version: String::new(), at: Ms(3) };
    let writes = [Write::AddToken(token), Write::Enrol(Box::new(enrol)), Write::OpenSession(Box::new(open))];
    let done = store.commit(&writes.map(|write| Group(vec![write]))).await?;
    match done.groups.last() {
        Some(Ok(numbers)) => Ok((id, *numbers.first().context("an epoch")?)),
        other => bail!("a session was refused: {other:?}"),
    }
}
