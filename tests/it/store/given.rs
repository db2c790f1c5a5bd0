//! T: rows for the store's tests, plain ones and random ones.

use std::sync::Arc;

use alloy_shared::env::Ms;
use alloy_shared::id::{AttemptRef, DEFAULT_ORG, Digest, JobId, Labels, OrgId, TokenId, UserId, WorkerId};
use alloy_shared::secret::TokenKind;
use alloy_shared::wire::farm::Role;
use alloy_shared::wire::image::ImageWant;
use alloy_shared::wire::job::{End, EventKind, GitInfo, JobSpec, Phase, Reason, Timings};
use alloy_shared::wire::network::Network;
use alloy_shared::wire::vm::VmStages;
use orchestrator::job::{Lease, State, Step, Then, Tries};
use orchestrator::store::write::{Advance, Enrol, IdempotencyKey, InsertJob};
use orchestrator::store::{
    Artifact, Attempt, Blob, BlobKind, Guard, ImageRow, Job, JobEventRow, MemberRow, Place, TokenRow, Worker, Write,
};

pub(super) const OTHER_ORG: OrgId = OrgId::from_raw(DEFAULT_ORG.raw() + 1);

/// A seeded die: the same numbers on every run.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    /// True once in `n` times.
    pub(super) fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
    pub(super) fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
    pub(super) fn maybe<T>(&mut self, value: impl FnOnce(&mut Self) -> T) -> Option<T> {
        if self.once_in(2) { Some(value(self)) } else { None }
    }
    pub(super) fn ms(&mut self) -> Ms {
        Ms(1_700_000_000_000 + self.below(1_000_000_000) as i64)
    }
    /// Text with everything that quoting, sorting and encoding could stumble over.
    pub(super) fn text(&mut self) -> String {
        let parts = ["a", "B", "_", "-", "é", "ß", "'", "\"", "\\", "%", "$1", "?", "\n", "日", " ", "z", "Z", "0"];
        (0..1 + self.below(6)).map(|_| self.of(&parts)).collect()
    }
}

pub(super) fn org(n: usize) -> OrgId {
    if n == 0 { DEFAULT_ORG } else { OTHER_ORG }
}

pub(super) fn job_id(n: usize) -> JobId {
    JobId::mint(Ms(1_700_000_000_000 + n as i64), (n as u64, (n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

pub(super) fn worker_id(n: usize) -> WorkerId {
    WorkerId::mint(Ms(1_600_000_000_000), (0, n as u64))
}

pub(super) fn digest(n: usize) -> Digest {
    Digest::of(&n.to_be_bytes())
}

pub(super) fn queued(id: JobId) -> Job {
    Job {
        id,
        org: DEFAULT_ORG,
        version: 1,
        state: State::new(Ms(5)),
        spec: Arc::new(JobSpec { shell: Some("true".to_owned()), ..JobSpec::default() }),
        source: None,
        created_at: Ms(5),
        created_by: "tok_me".to_owned(),
        events: 1,
    }
}

pub(super) fn event(job: &Job, seq: u64, kind: EventKind) -> JobEventRow {
    JobEventRow {
        job: job.id,
        seq,
        at: Ms(6),
        attempt: job.state.tries.made,
        kind,
        state: job.state.word(),
        phase: job.state.phase(),
        reason: None,
        worker: job.state.lease().map(|lease| lease.worker),
        message: None,
        artifact: None,
    }
}

pub(super) fn key(name: &str, body: &str) -> IdempotencyKey {
    let (caller, key) = ("tok_me".to_owned(), name.to_owned());
    IdempotencyKey { org: DEFAULT_ORG, caller, key, body: Digest::of(body.as_bytes()) }
}

pub(super) fn insert(job: Job, key: Option<IdempotencyKey>) -> Write {
    let events = vec![event(&job, 1, EventKind::Submitted)];
    Write::InsertJob(Box::new(InsertJob { job, key, attempt: None, events }))
}

/// The job with its first attempt on this worker.
pub(super) fn assigned(job: &Job, worker: WorkerId) -> Job {
    let lease = Lease { attempt: 1, worker, assigned_at: Ms(7), avoid: Vec::new() };
    let state = State { tries: Tries { made: 1, lost: 0, failed: 0 }, step: Step::Assigned { lease } };
    Job { version: job.version + 1, state, events: job.events + 1, ..job.clone() }
}

pub(super) fn done(job: &Job, end: End) -> Job {
    let state = State { step: Step::Done { end, at: Ms(9) }, ..job.state.clone() };
    Job { version: job.version + 1, state, events: job.events + 1, ..job.clone() }
}

pub(super) fn attempt(job: &Job, worker: WorkerId) -> Attempt {
    Attempt {
        at: job.attempt(),
        org: job.org,
        worker,
        assigned_at: Ms(7),
        ended_at: None,
        end: None,
        timings: Timings::default(),
        seq: 0,
        facts: Default::default(),
        log_len: None,
        log_gone_at: None,
        files_gone_at: None,
    }
}

pub(super) fn artifact(at: AttemptRef, path: &str) -> Artifact {
    let sha256 = Digest::of(path.as_bytes());
    Artifact { at, org: DEFAULT_ORG, path: path.to_owned(), size: 3, sha256, mode: 0o644, link: None }
}

/// An advance with one event and whatever attempt it is given.
pub(super) fn advance(next: &Job, guard: Guard, attempt: Option<Attempt>) -> Write {
    let events = vec![event(next, next.events, EventKind::Phase)];
    Write::Advance(Box::new(Advance { next: next.clone(), guard, attempt, events, artifacts: Vec::new() }))
}

pub(super) fn worker(n: usize) -> Worker {
    let mut labels = Labels::default();
    labels.insert("os", "macos").unwrap();
    Worker {
        id: worker_id(n),
        org: DEFAULT_ORG,
        name: format!("mini-{n}"),
        public_key: digest(n).0,
        labels,
        host_labels: Labels::default(),
        version: String::new(),
        epoch: 0,
        boot: String::new(),
        draining: false,
        drain_note: None,
        enrolled_at: Ms(3),
        seen_at: None,
        revoked: false,
    }
}

pub(super) fn token(n: usize, kind: TokenKind) -> TokenRow {
    TokenRow {
        id: TokenId::mint(Ms(1_600_000_000_000), (1, n as u64)),
        org: DEFAULT_ORG,
        hash: digest(1_000 + n),
        kind,
        role: Role::Developer,
        name: format!("token {n}"),
        shown: format!("{}…abcd", kind.prefix()),
        labels: Labels::default(),
        created_at: Ms(n as i64),
        expires_at: None,
        revoked_at: None,
        used_by: None,
    }
}

pub(super) fn enrol(n: usize, token: &TokenRow) -> Write {
    Write::Enrol(Box::new(Enrol { token: token.hash, at: Ms(50), worker: worker(n) }))
}

pub(super) fn image(name: &str, generation: i64) -> ImageRow {
    let mut labels = Labels::default();
    labels.insert("chip", "m4").unwrap();
    ImageRow {
        org: DEFAULT_ORG,
        name: name.to_owned(),
        want: ImageWant::Present,
        pinned: false,
        workers: vec![worker_id(1)],
        labels,
        generation,
        at: Ms(8),
    }
}

pub(super) fn member(n: usize) -> MemberRow {
    MemberRow {
        user: UserId::from_raw(n as u128),
        org: DEFAULT_ORG,
        role: Role::Developer,
        email: Some(format!("{n}@farm.test")),
        created_at: Ms(n as i64),
    }
}

pub(super) fn blob(n: usize, kind: BlobKind) -> Blob {
    let place = Place::Alone { object: format!("object/{n}") };
    Blob { org: DEFAULT_ORG, digest: digest(n), kind, size: n as u64, place, created_at: Ms(4), used_at: Ms(4) }
}

/// Any state that the types can say and the schema allows.
pub(super) fn any_state(dice: &mut Dice, worker: WorkerId) -> State {
    let made = 1 + dice.below(3) as u32;
    let tries = Tries { made, lost: dice.below(3) as u32, failed: dice.below(3) as u32 };
    let lease = Lease { attempt: made, worker, assigned_at: dice.ms(), avoid: Vec::new() };
    let phase = dice.of(Phase::ALL);
    let reason = dice.of(Reason::ALL);
    let step = match dice.below(7) {
        0 => Step::Queued { since: dice.ms(), avoid: dice.maybe(|_| worker).into_iter().collect() },
        1 => Step::Assigned { lease },
        2 | 3 => Step::Running { lease, accepted_at: dice.ms(), phase },
        4 => {
            let then = if dice.once_in(2) { Then::End(reason) } else { Then::Requeue(reason) };
            Step::Canceling { lease, since: dice.ms(), then }
        }
        5 => Step::Done { end: End::success(), at: dice.ms() },
        _ => Step::Done { end: any_end(dice), at: dice.ms() },
    };
    State { tries, step }
}

pub(super) fn any_end(dice: &mut Dice) -> End {
    End {
        reason: dice.maybe(|dice| dice.of(Reason::ALL)),
        exit_code: dice.maybe(|dice| dice.below(256) as i32),
        signal: dice.maybe(|dice| dice.below(32) as i32),
        message: dice.maybe(|dice| dice.text()).unwrap_or_default(),
        warnings: vec!["no file matches".to_owned()],
    }
}

pub(super) fn any_timings(dice: &mut Dice) -> Timings {
    Timings {
        queue_ms: dice.maybe(|dice| dice.next() >> 20),
        assign_ms: dice.maybe(|dice| dice.next() >> 20),
        vm_ms: dice.maybe(|dice| dice.next() >> 20),
        source_ms: None,
        exec_ms: dice.maybe(|dice| dice.next() >> 20),
        collect_ms: None,
        teardown_ms: dice.maybe(|dice| dice.next() >> 20),
        vm: dice
            .maybe(|dice| VmStages { warm: true, clone_ms: Some(dice.next() >> 20), ..VmStages::default() })
            .map(Box::new),
    }
}

pub(super) fn any_spec(dice: &mut Dice) -> JobSpec {
    JobSpec {
        shell: dice.maybe(Dice::text),
        argv: (0..dice.below(3)).map(|_| dice.text()).collect(),
        env: (0..dice.below(3)).map(|_| (dice.text(), dice.text())).collect(),
        artifacts: (0..dice.below(2)).map(|_| dice.text()).collect(),
        labels: (0..dice.below(2)).map(|_| (dice.text(), dice.text())).collect(),
        image: dice.maybe(Dice::text),
        network: match dice.below(3) {
            0 => Network::Default,
            1 => Network::None,
            _ => Network::Allow((0..dice.below(3)).map(|_| dice.text()).collect()),
        },
        timeout_ms: dice.maybe(Dice::next),
        queue_timeout_ms: dice.maybe(Dice::next),
        retries: dice.below(4) as u32,
        git: dice.maybe(|dice| GitInfo { commit: dice.text(), branch: dice.maybe(Dice::text), dirty: dice.once_in(2) }),
    }
}

pub(super) fn any_job(dice: &mut Dice, id: JobId) -> Job {
    let worker = worker_id(dice.below(4));
    Job {
        id,
        org: org(dice.below(2)),
        version: 1,
        state: any_state(dice, worker),
        spec: Arc::new(any_spec(dice)),
        source: dice.maybe(|dice| digest(dice.below(10))),
        created_at: dice.ms(),
        created_by: dice.of(&["tok_me", "tok_you"]).to_owned(),
        events: 0,
    }
}

pub(super) fn any_event(dice: &mut Dice, job: &Job, seq: u64) -> JobEventRow {
    JobEventRow {
        reason: dice.maybe(|dice| dice.of(Reason::ALL)),
        message: dice.maybe(Dice::text),
        artifact: dice.maybe(Dice::text),
        ..event(job, seq, dice.of(EventKind::ALL))
    }
}
