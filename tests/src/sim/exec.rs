//! The simulator's executor: one thread, a virtual clock, seeded dice. Tasks belong to nodes; a crash drops all tasks of a
//! node between two polls, wherever each of them waits.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use alloy_shared::env::{Env, Mono, Ms, Now};
use async_trait::async_trait;
use futures_util::future::BoxFuture;

/// A process: the tasks that die together. Node 0 is the world, which never dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node(pub usize);

pub const WORLD: Node = Node(0);

/// More polls than this without the clock moving are a loop that waits for nothing.
const POLLS_AT_ONCE: u64 = 3_000_000;
/// The wall time at which every seed begins.
pub(super) const BEGIN: Ms = Ms(1_767_225_600_000);

#[derive(Clone)]
pub struct Sim(Arc<Inner>);

struct Inner {
    core: Mutex<Core>,
    ready: Arc<Ready>,
}

/// Tasks to be polled, by stamp and slot. In order of their stamps: in which order they were woken is not always the seed's,
/// as a `watch` wakes its receivers in an order of its own dice.
#[derive(Default)]
struct Ready(Mutex<BTreeSet<(u64, usize)>>);

struct TaskWaker {
    slot: usize,
    stamp: u64,
    queued: AtomicBool,
    ready: Arc<Ready>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::Relaxed) {
            lock(&self.ready.0).insert((self.stamp, self.slot));
        }
    }
}

struct Task {
    node: Node,
    stamp: u64,
    name: &'static str,
    /// Absent while it is polled.
    future: Option<BoxFuture<'static, ()>>,
    waker: Arc<TaskWaker>,
}

struct Process {
    /// Raised with every start: what an earlier life spawns is nobody's.
    life: u64,
    alive: bool,
    frozen: bool,
    /// Ready tasks of a frozen process.
    parked: Vec<(u64, usize)>,
    /// It dies after so many more polls.
    doom: Option<u64>,
    wall_ms: i64,
    born: u64,
    /// How much faster its monotonic clock runs, in millionths.
    drift: i64,
}

struct Core {
    now: u64,
    dice: u64,
    stamps: u64,
    tasks: Vec<Option<Task>>,
    free: Vec<usize>,
    timers: BTreeMap<(u64, u64), Waker>,
    nodes: Vec<Process>,
    trace: DefaultHasher,
    polls: u64,
    /// Polls since the clock moved.
    at_once: u64,
    /// Tasks that panicked or never wait.
    broken: Vec<String>,
}

thread_local! {
    static CLOCK: Cell<u64> = const { Cell::new(0) };
}

/// The virtual time of this thread's world: what its log lines are stamped with.
pub fn virtual_ms() -> u64 {
    CLOCK.with(Cell::get)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The next number of a splitmix generator.
fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Sim {
    pub fn new(seed: u64) -> Self {
        let core = Core {
            now: 0,
            dice: seed.wrapping_mul(0xd134_2543_de82_ef95),
            stamps: 0,
            tasks: Vec::new(),
            free: Vec::new(),
            timers: BTreeMap::new(),
            nodes: Vec::new(),
            trace: DefaultHasher::new(),
            polls: 0,
            at_once: 0,
            broken: Vec::new(),
        };
        let sim = Self(Arc::new(Inner { core: Mutex::new(core), ready: Arc::default() }));
        sim.node(0);
        sim
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        lock(&self.0.core)
    }

    /// A process that has not started. Its clock runs `drift` millionths too fast.
    pub fn node(&self, drift: i64) -> Node {
        let mut core = self.core();
        let (born, is_world) = (core.now, core.nodes.is_empty());
        core.nodes.push(Process {
            life: 0,
            alive: is_world,
            frozen: false,
            parked: Vec::new(),
            doom: None,
            wall_ms: 0,
            born,
            drift,
        });
        Node(core.nodes.len() - 1)
    }

    /// Starts a process and gives it its machine. Its dice and its clock are the seed's.
    pub fn start(&self, node: Node) -> Arc<SimEnv> {
        let mut core = self.core();
        let process = &mut core.nodes[node.0];
        process.life += 1;
        process.alive = true;
        (process.frozen, process.doom) = (false, None);
        Arc::new(SimEnv { sim: self.clone(), node, life: process.life })
    }

    /// The world's own machine.
    pub fn world(&self) -> Arc<SimEnv> {
        Arc::new(SimEnv { sim: self.clone(), node: WORLD, life: 0 })
    }

    /// Ends a process at once: every future of it is dropped where it waits.
    pub fn kill(&self, node: Node) {
        let dead: Vec<BoxFuture<'static, ()>> = {
            let mut core = self.core();
            core.nodes[node.0].alive = false;
            core.nodes[node.0].doom = None;
            core.nodes[node.0].frozen = false;
            core.nodes[node.0].parked.clear();
            let slots: Vec<usize> = (0..core.tasks.len())
                .filter(|slot| core.tasks[*slot].as_ref().is_some_and(|task| task.node == node))
                .collect();
            core.free.extend(&slots);
            slots.into_iter().filter_map(|slot| core.tasks[slot].take()?.future).collect()
        };
        drop(dead);
    }

    /// Ends the world: every task is dropped. Tasks hold the world that holds them, so that without this nothing of it goes.
    pub fn end(&self) {
        let (tasks, timers) = {
            let mut core = self.core();
            core.nodes.iter_mut().for_each(|process| process.alive = false);
            core.free.clear();
            (std::mem::take(&mut core.tasks), std::mem::take(&mut core.timers))
        };
        drop((tasks, timers));
    }

    /// The process dies after so many more polls of its tasks.
    pub fn doom(&self, node: Node, polls: u64) {
        self.core().nodes[node.0].doom = Some(polls);
    }

    /// No process dies of what was decided before.
    pub fn spare_all(&self) {
        self.core().nodes.iter_mut().for_each(|process| process.doom = None);
    }

    pub fn is_alive(&self, node: Node) -> bool {
        self.core().nodes[node.0].alive
    }

    pub fn freeze(&self, node: Node, on: bool) {
        let mut core = self.core();
        core.nodes[node.0].frozen = on;
        if !on {
            let parked = std::mem::take(&mut core.nodes[node.0].parked);
            lock(&self.0.ready.0).extend(parked);
        }
    }

    /// Sets the wall clock of a process's machine off by so much.
    pub fn set_wall(&self, node: Node, off_ms: i64) {
        self.core().nodes[node.0].wall_ms = off_ms;
    }

    pub fn now(&self) -> u64 {
        self.core().now
    }

    /// A number below `sides`.
    pub fn roll(&self, sides: u64) -> u64 {
        splitmix(&mut self.core().dice) % sides.max(1)
    }

    /// True so many times in a thousand.
    pub fn chance(&self, per_mille: u64) -> bool {
        self.roll(1_000) < per_mille
    }

    pub fn between(&self, from: u64, to: u64) -> u64 {
        from + self.roll(to.saturating_sub(from) + 1)
    }

    pub async fn sleep(&self, ms: u64) {
        let at = self.now() + ms;
        Sleep { sim: self.clone(), at, key: None }.await;
    }

    /// Adds to the trace that two runs of a seed must have in common.
    pub fn note(&self, what: impl Hash) {
        what.hash(&mut self.core().trace);
    }

    pub fn trace(&self) -> u64 {
        self.core().trace.finish()
    }

    pub fn polls(&self) -> u64 {
        self.core().polls
    }

    /// Tasks that panicked or never wait.
    pub fn take_broken(&self) -> Vec<String> {
        std::mem::take(&mut self.core().broken)
    }

    fn spawn(&self, node: Node, life: u64, name: &'static str, future: BoxFuture<'static, ()>) {
        let mut core = self.core();
        let process = &core.nodes[node.0];
        if !process.alive || process.life != life {
            drop(core);
            return drop(future);
        }
        core.stamps += 1;
        let stamp = core.stamps;
        let slot = core.free.pop().unwrap_or(core.tasks.len());
        let waker = Arc::new(TaskWaker { slot, stamp, queued: AtomicBool::new(false), ready: self.0.ready.clone() });
        waker.wake_by_ref();
        let task = Task { node, stamp, name, future: Some(future), waker };
        if slot == core.tasks.len() {
            core.tasks.push(Some(task));
        } else {
            core.tasks[slot] = Some(task);
        }
    }

    /// Runs until `end` or until `step`, which is asked after every poll, says that it is over.
    pub fn run(&self, end: u64, mut step: impl FnMut() -> bool) {
        loop {
            while let Some(next) = self.pick() {
                if self.poll(next) && (!step() || !self.core().broken.is_empty()) {
                    return;
                }
            }
            if !self.advance(end) {
                return;
            }
        }
    }

    /// One of the ready tasks, whichever the dice say.
    fn pick(&self) -> Option<(u64, usize)> {
        let len = lock(&self.0.ready.0).len();
        let at = match len {
            0 => return None,
            1 => 0,
            len => self.roll(len as u64) as usize,
        };
        let mut ready = lock(&self.0.ready.0);
        let next = ready.iter().nth(at).copied()?;
        ready.remove(&next);
        Some(next)
    }

    /// False if there was nothing to poll.
    fn poll(&self, (stamp, slot): (u64, usize)) -> bool {
        let (mut future, waker) = {
            let mut guard = self.core();
            let core = &mut *guard;
            let Some(task) = core.tasks.get_mut(slot).and_then(Option::as_mut).filter(|task| task.stamp == stamp)
            else {
                return false;
            };
            let process = &mut core.nodes[task.node.0];
            if process.frozen {
                process.parked.push((stamp, slot));
                return false;
            }
            let Some(future) = task.future.take() else { return false };
            task.waker.queued.store(false, Ordering::Relaxed);
            (core.now, task.node.0, task.name.len()).hash(&mut core.trace);
            core.polls += 1;
            core.at_once += 1;
            if core.at_once > POLLS_AT_ONCE {
                core.broken.push(format!("`{}` never waits", task.name));
            }
            (future, task.waker.clone())
        };
        let waker = Waker::from(waker);
        let polled = {
            let mut context = Context::from_waker(&waker);
            let poll = std::panic::AssertUnwindSafe(|| future.as_mut().poll(&mut context));
            std::panic::catch_unwind(poll)
        };
        let doomed = self.polled((stamp, slot), future, &polled);
        if polled.is_err() {
            self.core().broken.push("a task panicked".to_owned());
        }
        if let Some(node) = doomed {
            self.kill(node);
        }
        true
    }

    /// Puts the future back or drops it. Returns the node if its last poll is done.
    fn polled(
        &self,
        (stamp, slot): (u64, usize),
        future: BoxFuture<'static, ()>,
        polled: &std::thread::Result<Poll<()>>,
    ) -> Option<Node> {
        let mut guard = self.core();
        let core = &mut *guard;
        let task = core.tasks[slot].as_mut().filter(|task| task.stamp == stamp);
        let Some(task) = task else {
            // Its process was killed while it ran.
            drop(guard);
            drop(future);
            return None;
        };
        let node = task.node;
        let gone = if matches!(polled, Ok(Poll::Pending)) {
            task.future = Some(future);
            None
        } else {
            core.tasks[slot] = None;
            core.free.push(slot);
            Some(future)
        };
        let doom = &mut core.nodes[node.0].doom;
        let over = *doom == Some(0);
        *doom = doom.map(|left| left.saturating_sub(1));
        drop(guard);
        drop(gone);
        over.then_some(node)
    }

    /// Turns the clock to the next timer. False: there is none before `end`, and it is `end`.
    fn advance(&self, end: u64) -> bool {
        let due = {
            let mut core = self.core();
            let Some(((at, _), _)) = core.timers.first_key_value() else {
                core.now = core.now.max(end);
                return false;
            };
            if *at > end {
                core.now = core.now.max(end);
                return false;
            }
            core.now = core.now.max(*at);
            core.at_once = 0;
            CLOCK.with(|clock| clock.set(core.now));
            let next = (core.now + 1, 0);
            let later = core.timers.split_off(&next);
            std::mem::replace(&mut core.timers, later)
        };
        due.into_values().for_each(Waker::wake);
        true
    }
}

/// Ends at a moment of the world's clock.
struct Sleep {
    sim: Sim,
    at: u64,
    key: Option<(u64, u64)>,
}

impl Future for Sleep {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let sim = self.sim.clone();
        let mut core = sim.core();
        if core.now >= self.at {
            if let Some(key) = self.key.take() {
                core.timers.remove(&key);
            }
            return Poll::Ready(());
        }
        let key = match self.key {
            Some(key) => key,
            None => {
                core.stamps += 1;
                (self.at, core.stamps)
            }
        };
        core.timers.insert(key, context.waker().clone());
        drop(core);
        self.key = Some(key);
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            let waker = self.sim.core().timers.remove(&key);
            drop(waker);
        }
    }
}

/// The machine of one life of one process.
pub struct SimEnv {
    sim: Sim,
    node: Node,
    life: u64,
}

impl SimEnv {
    /// The moment of the world's clock at which this machine's shows `at`.
    fn global(&self, at: Mono) -> u64 {
        let core = self.sim.core();
        let process = &core.nodes[self.node.0];
        if at.0 > u64::MAX / 4 {
            return u64::MAX / 4;
        }
        let scaled = u128::from(at.0) * 1_000_000;
        let speed = (1_000_000 + process.drift) as u128;
        process.born + scaled.div_ceil(speed) as u64
    }
}

#[async_trait]
impl Env for SimEnv {
    fn now(&self) -> Now {
        let core = self.sim.core();
        let process = &core.nodes[self.node.0];
        let run = core.now - process.born;
        let mono = (u128::from(run) * (1_000_000 + process.drift) as u128 / 1_000_000) as u64;
        Now { wall: Ms(BEGIN.0 + core.now as i64 + process.wall_ms), mono: Mono(mono) }
    }
    async fn sleep_until(&self, at: Mono) {
        let at = self.global(at);
        Sleep { sim: self.sim.clone(), at, key: None }.await;
    }
    fn spawn(&self, name: &'static str, task: BoxFuture<'static, ()>) {
        self.sim.spawn(self.node, self.life, name, task);
    }
    fn dice(&self) -> u64 {
        splitmix(&mut self.sim.core().dice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc;

    fn chatter(seed: u64) -> (u64, Vec<(u64, u8)>) {
        let sim = Sim::new(seed);
        let said = Arc::new(Mutex::new(Vec::new()));
        let nodes = [sim.node(200), sim.node(-200)];
        let (tx, mut rx) = mpsc::channel(2);
        for (index, node) in nodes.into_iter().enumerate() {
            let (env, tx, sim) = (sim.start(node), tx.clone(), sim.clone());
            env.clone().spawn(
                "talk",
                Box::pin(async move {
                    for _ in 0..20 {
                        env.sleep_until(env.now().mono + sim.between(1, 50)).await;
                        tx.send(index as u8).await.unwrap();
                    }
                }),
            );
        }
        drop(tx);
        let (heard, clock) = (said.clone(), sim.clone());
        sim.world().spawn(
            "listen",
            Box::pin(async move {
                while let Some(who) = rx.recv().await {
                    lock(&heard).push((clock.now(), who));
                }
            }),
        );
        sim.doom(nodes[1], 9);
        sim.run(10_000, || true);
        assert!(sim.is_alive(nodes[0]) && !sim.is_alive(nodes[1]) && sim.now() == 10_000);
        let said = lock(&said).clone();
        (sim.trace(), said)
    }

    #[test]
    fn a_seed_is_the_same_run_again_and_a_crash_drops_what_waits() {
        let (trace, said) = chatter(1);
        assert_eq!((trace, &said), (chatter(1).0, &chatter(1).1));
        assert_ne!(trace, chatter(2).0);
        assert_eq!(said.iter().filter(|(_, who)| *who == 0).count(), 20);
        assert!(said.iter().filter(|(_, who)| *who == 1).count() < 20);
    }

    #[test]
    fn a_frozen_process_does_nothing_while_its_clock_goes_on() {
        let sim = Sim::new(3);
        let node = sim.node(0);
        let env = sim.start(node);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (told, clock) = (seen.clone(), env.clone());
        env.spawn(
            "tick",
            Box::pin(async move {
                loop {
                    clock.sleep_until(clock.now().mono + 100).await;
                    lock(&told).push(clock.now().mono.0);
                }
            }),
        );
        sim.run(250, || true);
        sim.freeze(node, true);
        sim.run(1_000, || true);
        sim.freeze(node, false);
        sim.run(1_150, || true);
        assert_eq!(*lock(&seen), [100, 200, 1_000, 1_100]);
    }
}
