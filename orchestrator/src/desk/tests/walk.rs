//! A long random walk of the desk over the memory store: submits, workers that come, report, vanish and repeat
//! themselves, commits that fail. After every step the desk's picture is the store's truth.

use std::collections::BTreeMap;

use alloy_shared::env::Mono;
use alloy_shared::id::{DEFAULT_ORG, Digest, OrgId, TokenId};
use alloy_shared::secret::TokenKind;
use alloy_shared::wire::farm::Role;
use alloy_shared::wire::job::{End, EventKind, JobSpec, Phase};
use alloy_shared::wire::session::{SlotState, SlotView};
use futures_util::FutureExt;

use super::super::*;
use crate::store::mem::MemStore;
use crate::store::write::{Enrol, OpenSession};
use crate::store::{Scope, Store, TokenRow};

const WORKERS: u128 = 3;
const OTHER_ORG: OrgId = OrgId::from_raw(DEFAULT_ORG.raw() + 1);
const SLOTS: usize = 2;
const STEPS: u32 = 4_000;

struct World {
    dice: u64,
    /// The wall clock jumps, the other one does not.
    now: Now,
    desk: Desk,
    store: MemStore,
    /// Each worker's newest session; 0: it never connected.
    epochs: BTreeMap<WorkerId, i64>,
    /// What each worker runs, and the number of its newest report.
    runs: BTreeMap<(WorkerId, AttemptRef), u64>,
    last: u128,
    accepted: BTreeSet<JobId>,
    ended: BTreeMap<JobId, i64>,
    retries: u64,
    /// When each event of an attempt was first decided.
    since: BTreeMap<(AttemptRef, EventKind), Mono>,
    overdue: u64,
}

/// The memory store never waits.
fn at_once<T>(work: impl Future<Output = T>) -> T {
    work.now_or_never().unwrap()
}

/// The last worker is another organisation's.
fn org_of(worker: &WorkerId) -> OrgId {
    if worker.raw() == WORKERS { OTHER_ORG } else { DEFAULT_ORG }
}

fn enrolment(n: u128) -> Vec<Group> {
    let org = org_of(&WorkerId::from_raw(n));
    let hash = Digest::of(&n.to_be_bytes());
    let token = TokenRow {
        id: TokenId::from_raw(n),
        org,
        hash,
        kind: TokenKind::Join,
        role: Role::Viewer,
        name: String::new(),
        shown: String::new(),
        labels: Labels::default(),
        created_at: Ms(0),
        expires_at: Some(Ms(i64::MAX)),
        revoked_at: None,
        used_by: None,
    };
    let enrol = Enrol { token: hash, at: Ms(1), worker: crate::store::Worker { org, ..crate::tests::enrolled(n) } };
    vec![Group(vec![Write::AddToken(token)]), Group(vec![Write::Enrol(Box::new(enrol))])]
}

impl World {
    fn new(seed: u64) -> Self {
        let store = MemStore::default();
        for n in 1..=WORKERS {
            let done = at_once(store.commit(&enrolment(n))).unwrap();
            assert!(done.groups.iter().all(Result::is_ok), "{done:?}");
        }
        Self {
            dice: seed,
            now: Now { wall: Ms(1_000), mono: Mono(1_000) },
            desk: Desk::new(Limits::default(), Mono(0)),
            store,
            epochs: (1..=WORKERS).map(|n| (WorkerId::from_raw(n), 0)).collect(),
            runs: BTreeMap::new(),
            last: 0,
            accepted: BTreeSet::new(),
            ended: BTreeMap::new(),
            retries: 0,
            since: BTreeMap::new(),
            overdue: 0,
        }
    }

    fn roll(&mut self, sides: u64) -> u64 {
        self.dice = self.dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.dice >> 33) % sides
    }

    fn next(&mut self) -> u128 {
        self.last += 1;
        self.last
    }

    fn some_worker(&mut self) -> WorkerId {
        WorkerId::from_raw(1 + u128::from(self.roll(WORKERS as u64)))
    }

    fn some_job(&mut self) -> JobId {
        let all: Vec<JobId> = self.accepted.iter().copied().collect();
        if all.is_empty() { JobId::from_raw(1) } else { all[self.roll(all.len() as u64) as usize] }
    }

    fn request(&mut self) -> Request {
        let ticket = self.next() as Ticket;
        match self.roll(12) {
            0 | 1 => {
                let spec = JobSpec { shell: Some("x".into()), retries: self.roll(2) as u32, ..JobSpec::default() };
                let org = if self.roll(WORKERS as u64) == 0 { OTHER_ORG } else { DEFAULT_ORG };
                let by = By { org, caller: "me".into() };
                let id = JobId::from_raw(self.next());
                Request::Submit { ticket, id, by, body: Arc::new(SubmitJob { spec, source: None }), key: None }
            }
            2 => Request::Cancel { ticket, job: self.some_job(), reason: Reason::UserCanceled },
            3 => {
                let worker = self.some_worker();
                // What it ran dies with it.
                self.runs.retain(|(holder, _), _| *holder != worker);
                Request::Silent(worker)
            }
            4 => Request::Gone { worker: self.some_worker(), left: self.roll(2) == 0 },
            5..=7 => self.offer(),
            _ => self.report(ticket),
        }
    }

    /// A heartbeat, sometimes over a new session.
    fn offer(&mut self) -> Request {
        let worker = self.some_worker();
        if self.epochs[&worker] == 0 || self.roll(6) == 0 {
            let open = OpenSession {
                worker,
                boot: String::new(),
                labels: Labels::default(),
                version: String::new(),
                at: self.now.wall,
            };
            let done = at_once(self.store.commit(&[Group(vec![Write::OpenSession(Box::new(open))])])).unwrap();
            self.epochs.insert(worker, done.groups[0].as_ref().unwrap()[0]);
        }
        // It hears of what it was given, as reconciliation would tell it.
        for job in at_once(self.store.held(&worker)).unwrap() {
            self.runs.entry((worker, job.attempt())).or_insert(0);
        }
        let held: Vec<AttemptRef> =
            self.runs.keys().filter(|(holder, _)| *holder == worker).map(|(_, at)| *at).collect();
        let slots = (0..SLOTS.max(held.len()))
            .map(|slot| match held.get(slot) {
                Some(at) => SlotView { state: SlotState::Claimed, attempt: Some(*at), image: None },
                None => SlotView { state: SlotState::Warm, attempt: None, image: None },
            })
            .collect();
        Request::Offer(Offer {
            worker,
            org: org_of(&worker),
            name: String::new(),
            labels: Labels::default(),
            slots,
            images: Default::default(),
            draining: self.roll(8) == 0,
        })
    }

    fn report(&mut self, ticket: Ticket) -> Request {
        let all: Vec<((WorkerId, AttemptRef), u64)> = self.runs.iter().map(|(run, seq)| (*run, *seq)).collect();
        if all.is_empty() {
            return Request::Holders { ticket };
        }
        let ((worker, at), seq) = all[self.roll(all.len() as u64) as usize];
        let attempt = at.attempt;
        // Mostly the next report, sometimes an old one again, sometimes one too far.
        let seq = seq + self.roll(3).min(1) + u64::from(self.roll(9) == 0);
        let event = match self.roll(8) {
            _ if seq <= 1 => Event::Accepted { attempt },
            0..=2 => Event::Phase { attempt, phase: Phase::ALL[self.roll(3) as usize] },
            3 => Event::Finished { attempt, end: End::because(Reason::ScriptFailure, "no") },
            4 => Event::Finished { attempt, end: End::because(Reason::VmLost, "gone") },
            _ => Event::Finished { attempt, end: End::success() },
        };
        let stale_session = i64::from(self.roll(20) == 0);
        let from = From { at, worker, epoch: self.epochs[&worker] - stale_session };
        if self.roll(25) == 0 {
            self.runs.remove(&(worker, at));
            return Request::NotHeld { ticket, from, reason: Reason::WorkerLost, message: "gone".into() };
        }
        Request::Report { ticket, from, seq: seq.max(1), event, news: Box::default() }
    }

    fn turn(&mut self) {
        let passed = self.roll(20_000);
        let set = if self.roll(40) == 0 { self.roll(20) as i64 * 86_400_000 - 10 * 86_400_000 } else { 0 };
        self.now = Now { wall: Ms(self.now.wall.plus(passed).0 + set), mono: self.now.mono + passed };
        let count = 1 + self.roll(6);
        let requests: Vec<Request> = (0..count).map(|_| self.request()).collect();
        let groups = self.desk.decide(requests, self.now);
        self.check_terms(&groups);
        let (done, repeated) = match self.roll(12) {
            0 => (Err(StoreError::Unavailable("away".into())), false),
            // It was committed, nobody heard of it, and it is tried again.
            1 => {
                at_once(self.store.commit(&groups)).unwrap();
                (Ok(at_once(self.store.commit(&groups)).unwrap()), true)
            }
            _ => (Ok(at_once(self.store.commit(&groups)).unwrap()), false),
        };
        for effect in self.desk.committed(done, repeated, self.now.mono) {
            match effect {
                Effect::Moved { job, .. } | Effect::Learned { job, .. } => self.moved(&job),
                Effect::Reload { job, .. } => self.reload(&job),
                Effect::Answer { .. } => {}
            }
        }
    }

    /// Whatever the wall clock says, a term ends when it has lasted.
    fn check_terms(&mut self, groups: &[Group]) {
        let rules = Rules::of(&JobSpec::default(), &Limits::default());
        let events = groups.iter().flat_map(|group| &group.0).flat_map(|write| match write {
            Write::InsertJob(insert) => insert.events.as_slice(),
            Write::Advance(advance) => advance.events.as_slice(),
            _ => &[],
        });
        for event in events {
            let at = AttemptRef { job: event.job, attempt: event.attempt };
            let since = *self.since.entry((at, event.kind)).or_insert(self.now.mono);
            let begun = |kind| self.since.get(&(at, kind)).map_or(since, |begun| *begun);
            let (begun, least) = match (event.kind, event.reason) {
                (EventKind::CancelRequested, Some(Reason::RunTimeout)) => (begun(EventKind::Accepted), rules.run_ms),
                (EventKind::CancelRequested, Some(Reason::WorkerLost)) => (begun(EventKind::Assigned), rules.accept_ms),
                (EventKind::Finished, Some(Reason::QueueExpired)) => panic!("nobody waits for a day here"),
                _ => continue,
            };
            assert!(self.now.mono.since(begun) >= least, "too early: {event:?}");
            self.overdue += 1;
        }
    }

    fn moved(&mut self, job: &Job) {
        self.accepted.insert(job.id);
        if job.state.is_done() {
            assert_eq!(self.ended.insert(job.id, job.version), None, "{} ended twice", job.id);
        } else {
            assert!(!self.ended.contains_key(&job.id), "{} changed after its end", job.id);
        }
        self.retries += u64::from(job.state.tries.made > 1);
        let truth = at_once(self.store.attempt(&Scope::farm(), &job.attempt())).unwrap();
        for (run, seq) in &mut self.runs {
            if run.1 == job.attempt() {
                *seq = (*seq).max(truth.as_ref().map_or(0, |attempt| attempt.seq));
            }
        }
        self.runs.retain(|(_, at), _| at.job != job.id || (!job.state.is_done() && at.attempt == job.state.tries.made));
    }

    fn reload(&mut self, id: &JobId) {
        let job = at_once(self.store.job(&Scope::farm(), id)).unwrap().unwrap();
        let attempt = at_once(self.store.attempt(&Scope::farm(), &job.attempt())).unwrap();
        self.accepted.insert(job.id);
        if job.state.is_done() {
            self.ended.entry(job.id).or_insert(job.version);
        }
        self.runs.retain(|(_, at), _| at.job != job.id || (!job.state.is_done() && at.attempt == job.state.tries.made));
        for (run, seq) in &mut self.runs {
            if run.1 == job.attempt() {
                *seq = (*seq).max(attempt.as_ref().map_or(0, |attempt| attempt.seq));
            }
        }
        self.desk.restore(vec![(job, attempt)], self.now);
    }

    fn check(&self) {
        let stored = at_once(self.store.live(None, 10_000)).unwrap();
        assert_eq!(stored.len(), self.desk.live.len());
        let mut leases: BTreeMap<WorkerId, usize> = BTreeMap::new();
        for job in &stored {
            let live = &self.desk.live[&job.id];
            assert_eq!(live.job, *job, "the desk's picture is the truth");
            assert_eq!(live.attempt, at_once(self.store.attempt(&Scope::farm(), &job.attempt())).unwrap());
            if let Some(lease) = job.state.lease() {
                *leases.entry(lease.worker).or_default() += 1;
                assert_eq!(org_of(&lease.worker), job.org, "{} runs on its own organisation's workers", job.id);
            }
        }
        for (worker, count) in leases {
            assert_eq!(self.desk.leased[&worker].len(), count);
            assert!(count <= SLOTS, "{worker} has {count} jobs on {SLOTS} slots");
        }
        for id in &self.accepted {
            let job = at_once(self.store.job(&Scope::farm(), id)).unwrap().expect("an accepted job is never lost");
            assert_eq!(job.state.is_done(), self.ended.contains_key(id));
        }
    }

    fn check_books(&self) {
        for id in &self.accepted {
            let events = at_once(self.store.events(&Scope::farm(), id, 0, 10_000)).unwrap();
            assert!(events.iter().map(|event| event.seq).eq(1..=events.len() as u64), "{id}: {events:?}");
            let attempts = at_once(self.store.attempts(&Scope::farm(), id)).unwrap();
            assert!(attempts.iter().map(|attempt| attempt.at.attempt).eq(1..=attempts.len() as u32));
            let open = attempts.iter().filter(|attempt| attempt.ended_at.is_none()).count();
            let job = at_once(self.store.job(&Scope::farm(), id)).unwrap().unwrap();
            assert_eq!(open, usize::from(job.state.lease().is_some()), "{id}: {attempts:?}");
        }
    }
}

#[test]
fn the_picture_is_the_truth_whatever_happens() {
    let seed = std::env::var("ALLOY_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(20_261_120);
    println!("ALLOY_SEED={seed}");
    for seed in seed..seed + 4 {
        let mut world = World::new(seed);
        for _ in 0..STEPS {
            world.turn();
            if world.roll(10) == 0 {
                world.check();
            }
        }
        world.check();
        world.check_books();
        assert!(world.overdue > 100, "{} terms ended", world.overdue);
        assert!(
            world.ended.len() > 500 && world.retries > 100,
            "{} ended, {} retried",
            world.ended.len(),
            world.retries
        );
    }
}
