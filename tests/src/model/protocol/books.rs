//! The orchestrator's books in the model: one job, its attempts and the epochs of two workers. Every change is decided
//! by the product's `Desk` (and so by `job::apply`) and made by the product's `MemStore`, guards included.

use alloy_shared::env::{Mono, Ms, Now};
use alloy_shared::id::{AttemptRef, DEFAULT_ORG, Digest, JobId, Labels, TokenId, WorkerId};
use alloy_shared::limits::Limits;
use alloy_shared::secret::TokenKind;
use alloy_shared::wire::farm::Role;
use alloy_shared::wire::job::{JobSpec, Reason};
use alloy_shared::wire::session::{SlotState, SlotView};
use futures_util::FutureExt as _;
use orchestrator::desk::{Answer, Desk, Effect, From, News, Offer, Request};
use orchestrator::job::{Event, State};
use orchestrator::store::mem::MemStore;
use orchestrator::store::write::{Advance, CloseAttempt, Enrol, InsertJob, OpenSession};
use orchestrator::store::{Attempt, Group, Guard, Job, Scope, Store, TokenRow, Worker, Write};

pub const JOB: JobId = JobId::from_raw(7);
/// Time stands still in the model: what time alone brings about is an action of its own.
pub const NOW: Now = Now { wall: Ms(1_000_000), mono: Mono(1_000_000_000) };

pub fn worker_id(w: u8) -> WorkerId {
    WorkerId::from_raw(u128::from(w) + 1)
}

pub fn index_of(id: WorkerId) -> u8 {
    (id.raw() - 1) as u8
}

pub fn attempt(n: u8) -> AttemptRef {
    AttemptRef { job: JOB, attempt: u32::from(n) }
}

/// Limits under which a job has two attempts.
pub fn limits() -> Limits {
    Limits { lost_max: 1, lost_hosts_max: 1, ..Limits::default() }
}

#[derive(Debug, Clone)]
pub struct Books {
    pub job: Job,
    pub attempts: Vec<Attempt>,
    pub epochs: [i64; 2],
}

/// What is asked of the desk.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Ask {
    /// This worker has a free slot.
    Offer(u8),
    Cancel,
    /// The state has lasted as long as it may.
    Overdue,
    Silent(u8),
    /// A worker's numbered news; its event by its number in the model's pool.
    Report {
        attempt: u8,
        worker: u8,
        epoch: u8,
        seq: u64,
        event: u32,
    },
    NotHeld {
        attempt: u8,
        worker: u8,
        epoch: u8,
    },
    Close {
        attempt: u8,
        worker: u8,
        log_len: u64,
    },
    OpenSession(u8),
}

/// What the desk and the store made of it.
#[derive(Debug)]
pub struct Done {
    pub books: Books,
    pub answer: Option<Answer>,
    /// Whose attempt the change ended or took away, if the job changed.
    pub moved: Option<Option<u8>>,
}

impl Default for Books {
    /// A job that waits.
    fn default() -> Self {
        let spec = JobSpec { shell: Some("make".into()), ..JobSpec::default() };
        let job = Job {
            id: JOB,
            org: DEFAULT_ORG,
            version: 1,
            state: State::new(NOW.wall),
            spec: spec.into(),
            source: None,
            created_at: NOW.wall,
            created_by: String::new(),
            events: 1,
        };
        Self { job, attempts: Vec::new(), epochs: [0; 2] }
    }
}

impl Books {
    pub fn row(&self, n: u8) -> Option<&Attempt> {
        self.attempts.get(usize::from(n).checked_sub(1)?)
    }

    pub fn holder(&self) -> Option<u8> {
        self.job.state.lease().map(|lease| index_of(lease.worker))
    }

    /// The newest attempt's number.
    pub fn made(&self) -> u8 {
        self.job.state.tries.made as u8
    }

    /// A store of the product that says what these books say.
    fn store(&self) -> MemStore {
        let store = MemStore::default();
        let mut writes = Vec::new();
        for w in 0..2u8 {
            let token = Digest::of(&[w]);
            writes.push(Write::AddToken(token_row(w, token)));
            writes.push(Write::Enrol(Box::new(Enrol { token, at: NOW.wall, worker: enrolled(w) })));
            writes.extend((0..self.epochs[usize::from(w)]).map(|_| open(w)));
        }
        let mut rows = self.attempts.clone();
        let newest = rows.pop();
        let earlier = rows.len() as i64;
        let first = Job { version: self.job.version - earlier, ..self.job.clone() };
        let mut rows = rows.into_iter().chain(newest);
        writes.push(Write::InsertJob(Box::new(InsertJob {
            job: first,
            key: None,
            attempt: rows.next(),
            events: Vec::new(),
        })));
        for (n, row) in (1..).zip(rows) {
            let next = Job { version: self.job.version - earlier + n, ..self.job.clone() };
            let (events, artifacts) = (Vec::new(), Vec::new());
            let advance = Advance { next, guard: Guard::Version, attempt: Some(row), events, artifacts };
            writes.push(Write::Advance(Box::new(advance)));
        }
        for write in writes {
            let done = now(store.commit(&[Group(vec![write])])).expect("memory never fails");
            assert!(done.groups.iter().all(Result::is_ok), "the store refuses the books: {done:?}");
        }
        store
    }

    /// What the product does when it is asked this. `event` is a report's.
    pub fn ask(&self, ask: &Ask, event: Option<&Event>) -> Done {
        let store = self.store();
        let mut desk = Desk::new(limits(), Mono(0));
        let current = self.attempts.last().filter(|row| row.at == self.job.attempt()).cloned();
        desk.restore(vec![(self.job.clone(), current)], NOW);
        let mut at = NOW;
        let request = match ask {
            Ask::Offer(w) => Some(Request::Offer(offer(*w))),
            Ask::Cancel => Some(Request::Cancel { ticket: 1, job: JOB, reason: Reason::UserCanceled }),
            Ask::Overdue => {
                at.mono = desk.next_wake().expect("only a live job is overdue");
                None
            }
            Ask::Silent(w) => Some(Request::Silent(worker_id(*w))),
            Ask::Report { attempt: n, worker, epoch, seq, .. } => Some(Request::Report {
                ticket: 1,
                from: from(*n, *worker, *epoch),
                seq: *seq,
                event: event.expect("a report has one").clone(),
                news: Box::new(News::default()),
            }),
            Ask::NotHeld { attempt: n, worker, epoch } => Some(Request::NotHeld {
                ticket: 1,
                from: from(*n, *worker, *epoch),
                reason: Reason::WorkerLost,
                message: String::new(),
            }),
            Ask::Close { attempt: n, worker, log_len } => {
                let close =
                    CloseAttempt { at: attempt(*n), worker: worker_id(*worker), teardown_ms: 0, log_len: *log_len };
                Some(Request::Close { ticket: 1, close })
            }
            Ask::OpenSession(w) => {
                now(store.commit(&[Group(vec![open(*w)])])).expect("memory never fails");
                None
            }
        };
        let groups = desk.decide(request.into_iter().collect(), at);
        let committed = now(store.commit(&groups));
        let effects = desk.committed(committed, false, at.mono);
        let (mut answer, mut moved) = (None, None);
        for effect in effects {
            match effect {
                Effect::Answer { answer: said, .. } => answer = Some(said),
                Effect::Moved { left, .. } | Effect::Learned { left, .. } => moved = Some(left.map(index_of)),
                Effect::Reload { .. } => {}
            }
        }
        Done { books: self.read(&store), answer, moved }
    }

    fn read(&self, store: &MemStore) -> Self {
        let scope = Scope::farm();
        let epoch = |w| now(store.worker(&scope, &worker_id(w))).ok().flatten().map_or(0, |worker| worker.epoch);
        Self {
            job: now(store.job(&scope, &JOB)).ok().flatten().expect("the job is there"),
            attempts: now(store.attempts(&scope, &JOB)).expect("memory never fails"),
            epochs: [epoch(0), epoch(1)],
        }
    }
}

/// The memory answers at once.
pub fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("nothing in memory waits")
}

fn from(n: u8, worker: u8, epoch: u8) -> From {
    From { at: attempt(n), worker: worker_id(worker), epoch: i64::from(epoch) }
}

fn offer(w: u8) -> Offer {
    Offer {
        worker: worker_id(w),
        org: DEFAULT_ORG,
        name: String::new(),
        labels: Labels::default(),
        slots: vec![SlotView { state: SlotState::Warm, attempt: None, image: None }],
        images: Default::default(),
        draining: false,
    }
}

fn open(w: u8) -> Write {
    let (labels, version) = (Labels::default(), String::new());
    Write::OpenSession(Box::new(OpenSession {
        worker: worker_id(w),
        boot: "boot".into(),
        labels,
        version,
        at: NOW.wall,
    }))
}

fn token_row(w: u8, hash: Digest) -> TokenRow {
    TokenRow {
        id: TokenId::from_raw(u128::from(w) + 1),
        org: DEFAULT_ORG,
        hash,
        kind: TokenKind::Join,
        role: Role::Viewer,
        name: String::new(),
        shown: String::new(),
        labels: Labels::default(),
        created_at: NOW.wall,
        expires_at: None,
        revoked_at: None,
        used_by: None,
    }
}

fn enrolled(w: u8) -> Worker {
    Worker {
        id: worker_id(w),
        org: DEFAULT_ORG,
        name: format!("mini-{w}"),
        public_key: [w; 32],
        labels: Labels::default(),
        host_labels: Labels::default(),
        version: String::new(),
        epoch: 0,
        boot: String::new(),
        draining: false,
        drain_note: None,
        enrolled_at: NOW.wall,
        seen_at: None,
        revoked: false,
    }
}
