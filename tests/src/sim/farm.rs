//! The daemons of a simulated farm and who restarts them. Each is the product's own, put together from memory and from the
//! simulator's seams; what outlives a process stands here.

use std::cell::Cell;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use alloy_shared::env::Env as _;
use alloy_shared::id::{DEFAULT_ORG, Labels, WorkerId};
use alloy_shared::limits::Limits;
use alloy_shared::mem_disk::MemDisk;
use alloy_shared::runtime::Lifecycle;
use alloy_shared::secret::Secret;
use alloy_shared::wire::farm::{EnrolRequest, InviteRequest, Role};
use alloy_shared::wire::network;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::FutureExt as _;
use orchestrator::auth::Principal;
use orchestrator::blobs::{self, Blobs};
use orchestrator::keep::Keep;
use orchestrator::logs::{self, Logs};
use orchestrator::ops::access;
use orchestrator::{App, Ground};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;
use worker::body::{self, Parts};
use worker::hooks::Hooks;
use worker::image_book::BookFile;
use worker::provider::ImageRef;
use worker::session::Fence;
use worker::session::drive::{Me, Over};
use worker::sources::Sources;
use worker::spool::{self, Spool};
use worker::vm_demand::Wish;

use super::check::Check;
use super::exec::{Node, Sim};
use super::net::{Front, Line};
use super::seams::{SimStore, SimUpstream};
use super::vms::{Host, OWN_IMAGE, SimVms};

/// A process that a supervisor keeps running while its machine has power.
pub struct Unit {
    pub node: Node,
    powered: watch::Sender<bool>,
    /// The life of the process that runs now.
    life: Mutex<Lifecycle>,
    /// How long until it is started again.
    pause_ms: u64,
}

impl Unit {
    fn new(node: Node) -> Self {
        Self { node, powered: watch::Sender::new(true), life: Mutex::default(), pause_ms: 3_000 }
    }

    pub fn set_power(&self, on: bool) {
        self.powered.send_replace(on);
    }

    /// Tells the process to end in order.
    pub fn stop(&self) {
        self.life.lock().unwrap_or_else(PoisonError::into_inner).soft.cancel();
    }

    fn begin(&self) -> Lifecycle {
        let life = Lifecycle::new();
        *self.life.lock().unwrap_or_else(PoisonError::into_inner) = life.clone();
        life
    }

    async fn has_power(&self) {
        let mut powered = self.powered.subscribe();
        let _the_world_is_over = powered.wait_for(|on| *on).await.map(drop);
    }
}

/// The orchestrator's machine.
pub struct Centre {
    pub sim: Sim,
    pub unit: Unit,
    pub front: Arc<Front>,
    pub store: Arc<SimStore>,
    pub logs: logs::Mem,
    pub blobs: blobs::Mem,
    pub disk: Arc<MemDisk>,
    limits: Limits,
    keep: Keep,
}

thread_local! {
    static TOKENS: Cell<u64> = const { Cell::new(0) };
}

/// Bytes for tokens: all that matters is that two are not the same.
fn random() -> [u8; 32] {
    let mut bytes = [9; 32];
    let next = TOKENS.with(|count| count.replace(count.get() + 1));
    bytes[..8].copy_from_slice(&next.to_le_bytes());
    bytes
}

pub fn admin() -> Principal {
    Principal { org: DEFAULT_ORG, caller: "tok_sim".to_owned(), name: "sim".to_owned(), role: Role::Admin }
}

impl Centre {
    pub fn new(sim: Sim, store: Arc<SimStore>, disk: Arc<MemDisk>, limits: Limits, drift: i64) -> Self {
        TOKENS.with(|count| count.set(0));
        let (logs, blobs) = (store.check.logs.stored.clone(), store.check.blobs.clone());
        let keep = store.check.kept.keep;
        let unit = Unit::new(sim.node(drift));
        Self { sim, unit, front: Arc::default(), store, logs, blobs, disk, limits, keep }
    }

    /// Keeps an orchestrator running.
    pub async fn supervise(self: Arc<Self>) {
        loop {
            self.unit.has_power().await;
            let env = self.sim.start(self.unit.node);
            self.logs.reopen();
            let (life, dead) = (self.unit.begin(), CancellationToken::new());
            let (me, machine, gone) = (self.clone(), env.clone(), dead.clone().drop_guard());
            let process = async move {
                let _gone = gone;
                me.serve(machine, life).await;
            };
            env.spawn("orchestrator", process.boxed());
            dead.cancelled().await;
            self.front.set(None);
            self.sim.kill(self.unit.node);
            self.sim.sleep(self.sim.between(100, self.unit.pause_ms)).await;
        }
    }

    async fn serve(&self, env: Arc<super::exec::SimEnv>, life: Lifecycle) {
        let ground = Ground {
            store: self.store.clone(),
            logs: Logs::Mem(self.logs.clone()),
            blobs: Arc::new(Blobs::Mem(self.blobs.clone())),
            shared: None,
            env,
            limits: self.limits.clone(),
            keep: self.keep,
            secret: Secret::new([5; 32]),
            base_url: "http://farm.sim".to_owned(),
            behind_proxy: false,
            random,
            sign_in: None,
            stopping: life.soft.clone(),
        };
        // A store that is away at the start: the supervisor tries again.
        let Ok(app) = App::on(ground).await else { return };
        app.begin();
        self.front.set(Some(app.clone()));
        life.soft.cancelled().await;
        app.say_goodbye(self.limits.stop_ms / 2).await;
        app.settle().await;
    }

    /// Enrols a worker by the farm's own way.
    async fn enrol(app: Arc<App>, name: String, public_key: String) -> Option<WorkerId> {
        let invite = access::invite(&app, &admin(), InviteRequest::default()).await.ok()?;
        let request = EnrolRequest { token: invite.token, public_key, name };
        Some(access::enrol(&app, request).await.ok()?.worker)
    }
}

/// A worker's machine.
pub struct Mini {
    pub sim: Sim,
    pub unit: Unit,
    pub host: Arc<Host>,
    pub line: Arc<Line>,
    pub spool: spool::mem::Mem,
    pub disk: Arc<MemDisk>,
    book: BookFile,
    key: [u8; 32],
    name: String,
    /// What its owner wants of the pool.
    wishes: watch::Sender<Wish>,
    limits: Limits,
    check: Arc<Check>,
}

impl Mini {
    pub fn new(sim: Sim, index: usize, line: Arc<Line>, check: Arc<Check>, limits: Limits) -> Self {
        let drift = sim.roll(1_001) as i64 - 500;
        let disk = Arc::new(MemDisk::on(sim.world()));
        // Half of the kill budget may pass until a VM is dead.
        let host = Arc::new(Host::new(sim.clone(), index, check.clone(), limits.kill_budget_ms * 9 / 10));
        Self {
            unit: Unit::new(sim.node(drift)),
            host,
            line,
            spool: spool::mem::Mem::on(disk.clone()),
            disk,
            book: BookFile::memory(),
            key: [index as u8 + 1; 32],
            name: format!("mini-{index}"),
            wishes: watch::Sender::new(Wish {
                slots: 1 + sim.roll(2) as usize,
                image: ImageRef(OWN_IMAGE.to_owned()),
                floors: Vec::new(),
            }),
            limits,
            check,
            sim,
        }
    }

    /// How many jobs it runs at once.
    pub fn slots(&self) -> usize {
        self.wishes.borrow().slots
    }

    fn pair(&self) -> Ed25519KeyPair {
        Ed25519KeyPair::from_seed_unchecked(&self.key).expect("32 bytes are a seed")
    }

    /// Joins the farm, then keeps a worker running.
    pub async fn supervise(self: Arc<Self>) {
        let public_key = STANDARD.encode(self.pair().public_key().as_ref());
        let worker = loop {
            let (name, public_key) = (self.name.clone(), public_key.clone());
            let call = self.line.call(move |app| Centre::enrol(app, name, public_key));
            if let Ok(Some(worker)) = call.await {
                break worker;
            }
            self.sim.sleep(1_000).await;
        };
        self.check.joined(worker, self.slots());
        loop {
            self.unit.has_power().await;
            self.live(worker).await;
            self.sim.kill(self.unit.node);
            self.sim.sleep(self.sim.between(100, self.unit.pause_ms)).await;
        }
    }

    /// One life of the daemon, however it ends.
    async fn live(&self, worker: WorkerId) {
        let env = self.sim.start(self.unit.node);
        let (life, dead) = (self.unit.begin(), CancellationToken::new());
        let parts = self.parts(worker, &env, dead.clone());
        let gone = dead.clone().drop_guard();
        let (told, over) = oneshot::channel();
        let process = async move {
            let _gone = gone;
            let over = body::run(parts, &life).await;
            let _ = told.send(over);
        };
        env.spawn("worker", process.boxed());
        dead.cancelled().await;
        match over.now_or_never() {
            Some(Ok(Over::Superseded | Over::Refused { .. })) => {
                self.check.fail("F21", format!("{} was sent away by its own farm", self.name));
            }
            Some(Ok(Over::Stopped | Over::Spool(_)) | Err(_)) | None => {}
        }
    }

    fn parts(&self, worker: WorkerId, env: &Arc<super::exec::SimEnv>, daemon: CancellationToken) -> Parts {
        let fence = Arc::new(Fence::new());
        let provider =
            SimVms { host: self.host.clone(), sim: self.sim.clone(), env: env.clone(), fence: fence.watch(), daemon };
        let upstream = SimUpstream { sim: self.sim.clone(), env: env.clone(), line: self.line.clone(), worker };
        let (spool, held) = Spool::Mem(self.spool.clone()).reopen().expect("memory opens");
        let mut labels = Labels::default();
        labels.insert(network::LABEL.0, network::LABEL.1).expect("a label");
        let (pair, disk) = (self.pair(), self.disk.clone());
        let sign = Box::new(move |text: &str| STANDARD.encode(pair.sign(text.as_bytes()).as_ref()));
        Parts {
            env: env.clone(),
            limits: self.limits.clone(),
            provider: Arc::new(provider),
            upstream: Arc::new(upstream),
            hooks: Hooks::none(),
            spool,
            held,
            sources: Sources::memory(),
            book: self.book.clone(),
            me: Me { worker, version: "0.1.0".to_owned(), labels, sign },
            name: self.name.clone(),
            fence,
            state_dir: PathBuf::from("/sim"),
            wishes: self.wishes.subscribe(),
            image_budget: None,
            free: Box::new(move || Ok(if disk.is_full() { 0 } else { 1 << 40 })),
        }
    }
}
