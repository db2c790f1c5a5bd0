//! A random walk of the core against a small orchestrator, with cut links, crashes on both sides and a slow disk.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::*;

const SEEDS: u64 = 400;
const STEPS: usize = 1_500;

enum Up {
    Hello(Vec<Held>),
    Say(ToOrchestrator),
    Log { handle: u32, from: u64, len: u64 },
}

/// What the orchestrator knows of one attempt.
#[derive(Default)]
struct Job {
    handle: u32,
    assigned: bool,
    applied: u64,
    stored: u64,
    durable: u64,
    result: bool,
    /// Stored bytes were lost again: what was under way may leave a gap.
    lossy: bool,
    /// The job needs nothing more of this attempt.
    over: bool,
    canceled: bool,
}

/// What the disk of the worker knows of one attempt, and what runs there.
#[derive(Default)]
struct Disk {
    log: u64,
    reports: Vec<(u64, Report)>,
    pending: VecDeque<(u64, Report)>,
    executor: Option<Executor>,
}

#[derive(Default)]
struct Executor {
    stopped: bool,
    done: bool,
}

struct World {
    core: Core,
    ms: u64,
    dice: u64,
    boots: u128,
    dialing: bool,
    up: Option<VecDeque<Up>>,
    down: VecDeque<ToWorker>,
    welcomed: bool,
    beats: BTreeMap<u64, u64>,
    hello_at: u64,
    /// The lease as an onlooker computes it.
    lease: u64,
    disks: BTreeMap<AttemptRef, Disk>,
    jobs: BTreeMap<AttemptRef, Job>,
    started: BTreeSet<AttemptRef>,
    handles: u32,
    calm: bool,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut world = Self {
            core: with_a_slot(Vec::new(), BootId::from_raw(0)),
            ms: 0,
            dice: seed,
            boots: 0,
            dialing: false,
            up: None,
            down: VecDeque::new(),
            welcomed: false,
            beats: BTreeMap::new(),
            hello_at: 0,
            lease: 0,
            disks: BTreeMap::new(),
            jobs: BTreeMap::new(),
            started: BTreeSet::new(),
            handles: 0,
            calm: false,
        };
        world.give(Input::Tick);
        world
    }

    fn roll(&mut self, sides: u64) -> u64 {
        self.dice = self.dice.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.dice;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }

    fn give(&mut self, input: Input) {
        let dice = self.roll(u64::MAX);
        for effect in self.core.handle(input, now(self.ms), dice) {
            self.perform(effect);
        }
        assert!(self.core.attempts.len() <= limits::HELD_MAX);
        if self.ms >= self.lease {
            let alive = self.disks.values().any(|disk| disk.executor.as_ref().is_some_and(|e| !e.stopped && !e.done));
            assert!(!alive, "no lease, and an executor was not told to stop");
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Dial { .. } => {
                self.cut();
                self.dialing = true;
            }
            Effect::Hangup(_) => self.cut(),
            Effect::Hello { held, .. } => {
                self.hello_at = self.ms;
                self.push(Up::Hello(held));
            }
            Effect::Send(message) => self.said(message),
            Effect::SendLog { attempt, handle, from, len } => {
                let job = &self.jobs[&attempt];
                assert_eq!(handle, job.handle, "the handle of this session");
                assert!(from + u64::from(len) <= self.disks[&attempt].log, "only what is in the spool");
                assert!(len > 0 && len as usize <= limits::LOG_CHUNK_MAX);
                self.push(Up::Log { handle, from, len: u64::from(len) });
            }
            Effect::Release { attempt, durable } => {
                assert!(durable <= self.disks[&attempt].log, "what was never spooled is not given up");
            }
            Effect::Record { attempt, seq, report } => {
                self.disks.get_mut(&attempt).unwrap().pending.push_back((seq, report));
            }
            Effect::Start(assignment) => {
                assert!(self.ms < self.lease, "a start without a lease");
                assert!(self.started.insert(assignment.attempt), "a second start of {}", assignment.attempt);
                let disk = Disk { executor: Some(Executor::default()), ..Disk::default() };
                assert!(self.disks.insert(assignment.attempt, disk).is_none());
            }
            Effect::Stop { attempt, .. } => {
                if let Some(executor) = &mut self.disks.get_mut(&attempt).unwrap().executor {
                    executor.stopped = true;
                }
            }
            Effect::Upload { .. } => panic!("this orchestrator misses no artifacts"),
            Effect::Forget { attempt } => {
                let disk = self.disks.remove(&attempt).unwrap();
                assert!(disk.executor.is_none(), "forgotten while it runs");
                assert!(self.jobs[&attempt].over, "forgotten before the job was done with it");
            }
            Effect::Wish(_) => panic!("this orchestrator wishes nothing"),
            Effect::FenceAt(at) => assert_eq!(at.0, self.lease, "the guards' fence is the lease"),
        }
    }

    fn said(&mut self, message: ToOrchestrator) {
        match &message {
            ToOrchestrator::Report { attempt, seq, report } if !matches!(report, Report::Refused { .. }) => {
                let on_disk = &self.disks[attempt].reports;
                assert!(on_disk.contains(&(*seq, report.clone())), "report {seq} was sent before it was on disk");
            }
            ToOrchestrator::Heartbeat(beat) => {
                self.beats.insert(beat.n, self.ms);
            }
            _ => {}
        }
        self.push(Up::Say(message));
    }

    fn push(&mut self, up: Up) {
        self.up.as_mut().expect("sent without a link").push_back(up);
    }

    fn cut(&mut self) {
        self.up = None;
        self.down.clear();
        self.welcomed = false;
        self.beats.clear();
    }

    /// One thing happens.
    fn step(&mut self) {
        match self.roll(40) {
            0..3 => {
                let most = if self.calm { 500 } else { 4_000 };
                let by = self.roll(most);
                // The daemon's timer is never late in this world, but for a pause of the whole process.
                let wake = self.core.next_wake().0.max(self.ms);
                let pause = !self.calm && self.roll(50) == 0;
                self.ms = if pause { self.ms + 10 * by } else { (self.ms + by).min(wake) };
                if !pause {
                    self.give(Input::Tick);
                }
            }
            3..10 => self.orchestrator_hears(),
            10..17 => self.worker_hears(),
            17..23 => self.executor_acts(),
            23..27 => self.disk_writes(),
            27..32 if self.core.has_log() => self.give(Input::Room),
            32 if self.dialing => self.dial(),
            33 if !self.calm && self.up.is_some() && self.roll(8) == 0 => {
                self.cut();
                self.give(Input::Unlinked);
            }
            34 if !self.calm && self.jobs.len() < 12 => self.submit(),
            35 if !self.calm && self.roll(20) == 0 => self.crash_worker(),
            36 if !self.calm && self.roll(20) == 0 => self.crash_orchestrator(),
            37 => self.sync(),
            38 if !self.calm && self.roll(10) == 0 => self.end_one(),
            _ => {}
        }
    }

    fn dial(&mut self) {
        self.dialing = false;
        if !self.calm && self.roll(3) == 0 {
            return self.give(Input::Unlinked);
        }
        self.up = Some(VecDeque::new());
        self.down.push_back(ToWorker::Challenge { nonce: "n".into() });
        self.give(Input::Linked);
    }

    fn submit(&mut self) {
        self.handles += 1;
        let at = AttemptRef { job: JobId::from_raw(u128::from(self.handles)), attempt: 1 };
        self.jobs.insert(at, Job { handle: self.handles, ..Job::default() });
        if self.welcomed {
            self.assign(at);
        }
    }

    fn assign(&mut self, at: AttemptRef) {
        let job = self.jobs.get_mut(&at).unwrap();
        job.assigned = true;
        self.down.push_back(ToWorker::Order { order: Order::Assign(assignment(at, job.handle)) });
    }

    /// A user cancels, or the farm gives a silent worker's attempt away.
    fn end_one(&mut self) {
        let pick = self.roll(12) as u32 + 1;
        let gone = self.roll(2) == 0 && self.ms > self.lease;
        for (at, job) in &mut self.jobs {
            if job.handle == pick && !job.over {
                job.canceled = true;
                job.over |= gone;
                if self.welcomed {
                    let order = if job.over {
                        Order::Fence { attempt: *at }
                    } else {
                        Order::Cancel { attempt: *at, grace_ms: 1 }
                    };
                    self.down.push_back(ToWorker::Order { order });
                }
            }
        }
    }

    fn crash_worker(&mut self) {
        self.cut();
        self.boots += 1;
        let mut held = Vec::new();
        for (at, disk) in &mut self.disks {
            disk.executor = None;
            disk.pending.clear();
            let seq = disk.reports.last().map_or(0, |(seq, _)| *seq);
            let ended = matches!(disk.reports.last(), Some((_, Report::Result(_))));
            let state = if ended { HeldState::ResultPending } else { HeldState::Lost };
            held.push((Held { attempt: *at, state, log_len: disk.log, seq }, disk.reports.clone()));
        }
        self.core = with_a_slot(held, BootId::from_raw(self.boots));
        self.lease = 0;
        self.dialing = false;
        self.give(Input::Tick);
    }

    fn crash_orchestrator(&mut self) {
        for job in self.jobs.values_mut() {
            job.stored = job.durable;
        }
        if self.up.is_some() {
            self.cut();
            self.give(Input::Unlinked);
        }
    }

    fn sync(&mut self) {
        for (at, job) in &mut self.jobs {
            if job.durable < job.stored {
                job.durable = job.stored;
                if self.welcomed {
                    self.down.push_back(ToWorker::LogAck { attempt: *at, durable: job.durable });
                }
            }
        }
    }

    fn disk_writes(&mut self) {
        let skip = self.roll(4) as usize;
        let Some((at, disk)) = self.disks.iter_mut().filter(|(_, disk)| !disk.pending.is_empty()).nth(skip) else {
            return;
        };
        let (at, (seq, report)) = (*at, disk.pending.pop_front().unwrap());
        disk.reports.push((seq, report));
        self.give(Input::Recorded { attempt: at, seq });
    }

    fn executor_acts(&mut self) {
        let (skip, act, len) = (self.roll(3) as usize, self.roll(12), self.roll(200_000));
        let Some((at, disk)) = self.disks.iter_mut().filter(|(_, disk)| disk.executor.is_some()).nth(skip) else {
            return;
        };
        let at = *at;
        let Some(executor) = &mut disk.executor else { return };
        if executor.done {
            disk.executor = None;
            return self.give(Input::Closed { attempt: at, teardown_ms: 3 });
        }
        let end = self.calm || executor.stopped || act == 0;
        if end {
            executor.done = true;
            let log_len = disk.log;
            return self.give(Input::Report { attempt: at, report: result(log_len) });
        }
        if act < 3 {
            return self.give(Input::Report { attempt: at, report: phase() });
        }
        disk.log += len;
        let len = disk.log;
        self.give(Input::Spooled { attempt: at, len });
    }

    fn worker_hears(&mut self) {
        let Some(message) = self.down.pop_front() else { return };
        let fence = Limits::default().self_fence_ms;
        match &message {
            ToWorker::Welcome(_) => self.lease = self.lease.max(self.hello_at + fence),
            ToWorker::HeartbeatAck { n, .. } => {
                let sent_at = self.beats.get(n).copied().unwrap_or(0);
                self.lease = self.lease.max(sent_at + fence);
            }
            _ => {}
        }
        self.give(Input::Heard(message));
    }

    fn orchestrator_hears(&mut self) {
        let Some(up) = self.up.as_mut().and_then(VecDeque::pop_front) else { return };
        match up {
            Up::Hello(held) => {
                self.welcomed = true;
                let Input::Heard(welcome) = welcome() else { unreachable!() };
                self.down.push_back(welcome);
                for job in self.jobs.values_mut() {
                    // Each session names attempts anew.
                    job.handle += 1_000;
                }
                self.reconcile(&held, true);
            }
            Up::Say(ToOrchestrator::Heartbeat(beat)) => {
                self.down.push_back(ToWorker::HeartbeatAck { n: beat.n, orders: Vec::new() });
                self.reconcile(&beat.held, false);
            }
            Up::Say(ToOrchestrator::Report { attempt, seq, report }) => self.settle(attempt, seq, report),
            Up::Say(ToOrchestrator::Closed { attempt, log_len, .. }) => {
                let job = &self.jobs[&attempt];
                assert!(job.over && job.stored >= log_len, "closed before its log was here");
            }
            Up::Say(_) => {}
            Up::Log { handle, from, len } => {
                let mut gap = None;
                let job = self.jobs.values_mut().find(|job| job.handle == handle).expect("a handle of this session");
                if from <= job.stored {
                    job.stored = job.stored.max(from + len);
                } else {
                    assert!(job.lossy, "bytes {}..{from} were skipped", job.stored);
                    gap = Some((handle, job.stored));
                }
                if let Some((handle, log_durable)) = gap {
                    let attempt = *self.jobs.iter().find(|(_, job)| job.handle == handle).unwrap().0;
                    let order = Order::Continue { attempt, handle, log_durable, seq: 0 };
                    self.down.push_back(ToWorker::Order { order });
                }
            }
        }
    }

    fn settle(&mut self, attempt: AttemptRef, seq: u64, report: Report) {
        let refuse = self.roll(6) == 0;
        let job = self.jobs.get_mut(&attempt).unwrap();
        if matches!(report, Report::Refused { .. }) {
            job.over = true;
            return;
        }
        if job.over && !job.result {
            return self.down.push_back(ToWorker::Order { order: Order::Fence { attempt } });
        }
        if seq > job.applied {
            assert_eq!(seq, job.applied + 1, "reports come in order");
            if let Report::Result(result) = &report {
                assert!(job.lossy || job.stored >= result.log_len, "the result came before its log");
                if refuse {
                    job.lossy = true;
                    job.stored /= 2;
                    job.durable = job.durable.min(job.stored);
                }
                if job.stored < result.log_len {
                    let missing = ToWorker::Missing { attempt, seq: seq - 1, log_len: job.stored, artifacts: vec![] };
                    return self.down.push_back(missing);
                }
                // A result is acknowledged when all of it is durable.
                job.durable = job.stored;
                job.result = true;
                job.over = true;
            }
            job.applied = seq;
        }
        let order = ToWorker::Order { order: Order::ResultAck { attempt } };
        self.down.push_back(if job.result { order } else { ToWorker::EventAck { attempt, seq: job.applied } });
    }

    fn reconcile(&mut self, held: &[Held], is_hello: bool) {
        let mut assign = Vec::new();
        for (at, job) in &mut self.jobs {
            let go_on =
                Order::Continue { attempt: *at, handle: job.handle, log_durable: job.durable, seq: job.applied };
            let order = match held.iter().find(|held| held.attempt == *at) {
                None if !job.over && is_hello && job.applied == 0 && !job.canceled => {
                    assign.push(*at);
                    continue;
                }
                None if !job.over && is_hello => {
                    job.over = true;
                    continue;
                }
                None => continue,
                Some(Held { state: HeldState::Lost, .. }) => {
                    job.over = true;
                    go_on
                }
                Some(_) if job.result => Order::ResultAck { attempt: *at },
                Some(_) if job.over => Order::Fence { attempt: *at },
                Some(Held { state: HeldState::Running, .. }) if job.canceled && !is_hello => {
                    Order::Cancel { attempt: *at, grace_ms: 1 }
                }
                Some(_) => go_on,
            };
            self.down.push_back(ToWorker::Order { order });
        }
        for at in assign {
            self.assign(at);
        }
    }
}

#[test]
fn whatever_happens_nothing_is_skipped_doubled_or_started_without_a_lease() {
    let first: u64 = 0xa110_0000;
    let mut ends = BTreeMap::new();
    for seed in first..first + SEEDS {
        println!("seed {seed:#x}");
        let mut world = World::new(seed);
        for _ in 0..STEPS {
            world.step();
        }
        // The faults stop: everything comes to its end.
        world.calm = true;
        let mut steps = 0;
        while !world.core.is_empty() || world.jobs.values().any(|job| job.assigned && !job.over) {
            world.step();
            steps += 1;
            assert!(steps < 200_000, "stuck: {:?} {:#?}", world.core.held(), world.core);
        }
        for job in world.jobs.values() {
            *ends.entry((job.result, job.canceled)).or_insert(0u32) += 1;
        }
    }
    println!("{ends:?}");
    for kind in [(true, false), (true, true), (false, false), (false, true)] {
        assert!(ends.get(&kind).is_some_and(|n| *n > 50), "the walk hardly ever ended so: {ends:?}");
    }
}
