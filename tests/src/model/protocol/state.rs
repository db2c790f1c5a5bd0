//! What one state of the protocol's model is, and what can happen in it.

/// One attempt's log at the orchestrator. Each byte says whose it is: worker, attempt, offset.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Log {
    pub bytes: [u8; LOG_MAX],
    pub len: u8,
    /// What survives a crash.
    pub durable: u8,
    pub sealed: bool,
}

/// More than an attempt says, so that a log with something twice can be seen.
pub const LOG_MAX: usize = 4;
/// What an attempt says.
pub const LOG_LEN: u8 = 2;

pub fn byte(worker: u8, attempt: u8, offset: u8) -> u8 {
    worker << 6 | attempt << 3 | offset
}

impl Log {
    pub fn stored(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// The orchestrator's end of a session: its epoch and its core by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Session {
    pub worker: u8,
    pub epoch: u8,
    pub core: u32,
}

/// A worker's process, its disk and what it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Worker {
    /// The core of its session, by number.
    pub core: u32,
    /// The session that its socket belongs to, as far as it knows.
    pub link: Option<u8>,
    pub leased: bool,
    pub spool: [Option<Spooled>; 2],
    pub runs: [Run; 2],
}

/// What lies on a worker's disk of one attempt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Spooled {
    pub len: u8,
    /// Recorded reports by number, in their order from 1.
    pub reports: [Option<u32>; 3],
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Run {
    #[default]
    Nothing,
    /// The command runs in its VM.
    Command { stop: Stop },
    /// The result is said; the VM goes.
    Teardown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stop {
    No,
    Cancel,
    Kill,
}

/// A message under way, by the number of its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Msg {
    pub up: bool,
    pub worker: u8,
    pub epoch: u8,
    pub text: u32,
}

/// What may still happen besides the usual course of things.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Budget {
    /// Of any kind: messages lost, repeated or overtaken, connections cut, processes killed, leases that end, workers called
    /// silent too early, deadlines that pass, VMs that die.
    pub misfortunes: u8,
    /// Of these, processes killed.
    pub crashes: u8,
    pub cancels: u8,
    pub beats: u8,
}

/// What only the checker remembers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Memory {
    /// A cancel was answered with success.
    pub canceled: bool,
    /// A worker was called silent while it could still hold a lease: clocks were not kept.
    pub early: bool,
    pub crashed_worker: bool,
    pub crashed_server: bool,
    pub ends: u8,
    pub attempt_ends: [u8; 2],
    pub starts: [u8; 2],
    /// The result was once applied through this session.
    pub result_by: [u8; 2],
    /// A report of an attempt that was not the newest ended the job.
    pub ended_by_stranger: bool,
    /// A session that was not its worker's newest changed the job.
    pub stale_session_wrote: bool,
}

/// A report that was heard in a session and is being settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Settling {
    pub worker: u8,
    pub epoch: u8,
    pub attempt: u8,
    pub seq: u64,
    /// By number.
    pub report: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Farm {
    /// By number.
    pub books: u32,
    pub logs: [Log; 2],
    /// The newest of each worker.
    pub sessions: [Option<Session>; 2],
    /// Connections that are cut, from which something may still be read.
    pub old: Vec<Session>,
    pub workers: [Worker; 2],
    /// What is under way: grouped by connection and direction, in the order of sending.
    pub net: Vec<Msg>,
    pub left: Budget,
    pub memory: Memory,
    /// A report whose fate a slow store has not decided yet.
    pub settling: Option<Settling>,
    /// Only for a mutant: a change that was acknowledged and is not written yet.
    pub unwritten: Option<super::books::Ask>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// A worker's offer reaches the desk while the job waits.
    Offer(u8),
    Cancel,
    Overdue,
    Silent(u8),
    /// Logs reach the disk.
    Sync,
    /// The orchestrator dies and comes back.
    CrashServer,
    Connect(u8),
    Cut(u8),
    /// The daemon dies, and its VMs with it; it comes back.
    CrashWorker(u8),
    /// A heartbeat is due, or a pause is over.
    Wake(u8),
    LeaseEnds(u8),
    SendLog(u8),
    /// The command says a byte.
    Say(u8, u8),
    /// The command ends.
    Finish(u8, u8),
    /// The VM dies under its command.
    Break(u8, u8),
    /// The VM is gone.
    Close(u8, u8),
    /// A message comes, and with a misfortune before one that was sent earlier.
    Deliver(Msg),
    /// It comes, and will come again.
    Repeat(Msg),
    Lose(Msg),
    /// A report comes, and the store is slow to decide about it.
    DeliverSlowly(Msg),
    /// The slow store has decided.
    Settle,
    /// Only of a mutant.
    Write,
}
