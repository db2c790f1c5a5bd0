//! What goes into the product's parts and what comes out of them, as small values, so that one step is told from another
//! quickly.

use alloy_shared::id::{AttemptRef, BootId, DEFAULT_ORG, Labels};
use alloy_shared::secret::Secret;
use alloy_shared::wire::PROTOCOL;
use alloy_shared::wire::session::{Assignment, Held, Hello, LogChunk, Order, Report, ToOrchestrator, ToWorker};
use bytes::Bytes;
use orchestrator::job::Event;
use orchestrator::logs::{LogError, Logs};
use orchestrator::session::io::{Effect as ServerEffect, Input as ServerIn, NotStored, Settled};
use worker::session::{Effect as WorkerEffect, Input as WorkerIn, KillReason, Stop as WorkerStop};
use worker::spool::Spool;

use super::super::mutant::Mutant;
use super::super::pool::Identity;
use super::books::{NOW, attempt, now, worker_id};
use super::ends::When;
use super::state::{LOG_MAX, Log, Spooled, Stop, byte};
use super::{Protocol, Text};

/// What a worker's core is told.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum WorkerInput {
    Unlinked,
    Heard(u32),
    Report { attempt: u8, report: u32 },
    Recorded { attempt: u8, seq: u64 },
    Spooled { attempt: u8, len: u8 },
    Closed(u8),
    Room,
    Wake,
    LeaseEnds,
}

/// What a session's core at the orchestrator is told.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ServerInput {
    Tick,
    Heard(u32),
    /// The session is in the books.
    Opened(u32),
    /// The job changed.
    Job(u32),
    Settled {
        attempt: u8,
        seq: u64,
        fate: Fate,
    },
    Appended {
        attempt: u8,
        stored: Stored,
    },
    Durable {
        attempt: u8,
        len: u8,
    },
    Measured {
        attempt: u8,
        len: u8,
    },
}

/// `Settled`, as a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fate {
    Applied,
    Fenced,
    Gap(u64),
    Missing(u8),
    Failed,
}

/// What became of bytes, as a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stored {
    Len(u8),
    Gap(u8),
    Never,
}

/// What a worker's core wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WorkerDoes {
    Post(u32),
    Record { attempt: u8, seq: u64, report: u32 },
    Start(u8),
    Stop { attempt: u8, how: Stop, lease_lost: bool },
    Forget(u8),
    Leased,
}

/// What a session's core at the orchestrator wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerDoes {
    Post(u32),
    /// Posted within the same step: a session is opened in one.
    Welcome(u32),
    Append {
        attempt: u8,
        offset: u64,
        bytes: Vec<u8>,
    },
    Measure(u8),
    Settle {
        attempt: u8,
        seq: u64,
        report: u32,
    },
    NotHeld(u8),
    Close {
        attempt: u8,
        log_len: u64,
    },
    Hangup,
}

/// A core after a step, and what it wants done.
pub type WorkerStep = (u32, Vec<WorkerDoes>);
pub type ServerStep = (u32, Vec<ServerDoes>);

pub fn number(at: AttemptRef) -> u8 {
    at.attempt as u8
}

impl Protocol {
    pub fn text(&self, text: Text) -> u32 {
        self.known.texts.put(Identity::of(&text), text)
    }

    pub fn report(&self, report: Report) -> u32 {
        self.known.reports.put(Identity::of(&report), report)
    }

    pub fn append(&self, log: Log, offset: u64, bytes: &[u8]) -> (Log, Stored) {
        let question = (log, offset as u8, bytes.to_vec());
        *self.known.appends.answer(question, |(log, offset, bytes)| stored(*log, *offset, bytes))
    }

    /// The number of what a report tells the desk.
    pub fn event_of(&self, report: u32, attempt: u8) -> u32 {
        *self.known.event_of.answer((report, attempt), |(report, attempt)| {
            let attempt = u32::from(*attempt);
            let event = match self.known.reports.get(*report) {
                Report::Accepted => Event::Accepted { attempt },
                Report::Refused { message } => Event::Refused { attempt, message: message.clone() },
                Report::Result(result) => Event::Finished { attempt, end: result.end.clone() },
                Report::Phase { .. } | Report::Artifact(_) => unreachable!("no command of the model says so"),
            };
            self.known.events.put(Identity::of(&event), event)
        })
    }

    /// A step of worker `w`'s core.
    pub fn worker_step(&self, w: u8, core: u32, input: WorkerInput) -> &WorkerStep {
        self.known.worker_steps.answer((core, input, w), |(core, input, w)| {
            let mut daemon = self.known.daemons.get(*core).clone();
            let (input, when) = worker_input(self, input);
            let effects = daemon.handle(input, when);
            let does = effects.into_iter().filter_map(|effect| self.worker_does(*w, effect)).collect();
            (self.known.daemons.put(daemon.identity(), daemon), does)
        })
    }

    /// The core and the hello of a worker that dials now.
    pub fn hello(&self, w: u8, core: u32) -> Option<(u32, u32)> {
        *self.known.hellos.answer((core, w), |(core, w)| {
            let mut daemon = self.known.daemons.get(*core).clone();
            daemon.handle(WorkerIn::Linked, When::Now);
            let challenge = ToWorker::Challenge { nonce: String::new() };
            let effects = daemon.handle(WorkerIn::Heard(challenge), When::Now);
            let hello = effects.into_iter().find_map(|effect| match effect {
                WorkerEffect::Hello { slots, held, draining, trouble, .. } => Some(Hello {
                    protocol_min: *PROTOCOL.start(),
                    protocol_max: *PROTOCOL.end(),
                    capabilities: Vec::new(),
                    worker: worker_id(*w),
                    boot: BootId::from_raw(1),
                    signature: String::new(),
                    version: String::new(),
                    labels: Labels::default(),
                    slots,
                    held,
                    draining,
                    trouble,
                }),
                _ => None,
            })?;
            let hello = self.text(Text::Up(ToOrchestrator::Hello(Box::new(hello))));
            Some((self.known.daemons.put(daemon.identity(), daemon), hello))
        })
    }

    fn worker_does(&self, w: u8, effect: WorkerEffect) -> Option<WorkerDoes> {
        Some(match effect {
            WorkerEffect::Send(message) => WorkerDoes::Post(self.text(Text::Up(message))),
            WorkerEffect::SendLog { attempt: at, handle, from, len } => {
                let (from, a) = (from as u8, number(at));
                let bytes: Vec<u8> = (from..from + len as u8).map(|offset| byte(w, a, offset)).collect();
                let chunk = LogChunk { handle, offset: u64::from(from), bytes: bytes.into() };
                WorkerDoes::Post(self.text(Text::Log(chunk)))
            }
            WorkerEffect::Record { attempt: at, seq, report } => {
                WorkerDoes::Record { attempt: number(at), seq, report: self.report(report) }
            }
            WorkerEffect::Start(assignment) => WorkerDoes::Start(number(assignment.attempt)),
            WorkerEffect::Stop { attempt: at, how } => WorkerDoes::Stop {
                attempt: number(at),
                how: match how {
                    WorkerStop::Cancel { .. } => Stop::Cancel,
                    WorkerStop::Kill(_) => Stop::Kill,
                },
                lease_lost: how == WorkerStop::Kill(KillReason::LeaseLost),
            },
            WorkerEffect::Forget { attempt: at } => WorkerDoes::Forget(number(at)),
            WorkerEffect::FenceAt(_) => WorkerDoes::Leased,
            WorkerEffect::Hangup(why) => unreachable!("nothing in the model makes a worker hang up: {why:?}"),
            WorkerEffect::Dial { .. }
            | WorkerEffect::Hello { .. }
            | WorkerEffect::Release { .. }
            | WorkerEffect::Upload { .. }
            | WorkerEffect::Wish(_) => return None,
        })
    }

    /// A step of the core of worker `w`'s session `epoch`.
    pub fn server_step(&self, w: u8, epoch: u8, core: u32, input: ServerInput) -> &ServerStep {
        self.known.server_steps.answer((core, input, w, epoch), |(core, input, w, epoch)| {
            let mut core = self.known.cores.get(*core).clone();
            let effects = core.handle(server_input(self, input, *w, *epoch), NOW);
            let does = effects.into_iter().filter_map(|effect| self.server_does(effect)).collect();
            (self.known.cores.put(Identity::of(&core), core), does)
        })
    }

    fn server_does(&self, effect: ServerEffect) -> Option<ServerDoes> {
        Some(match effect {
            ServerEffect::Send(ToWorker::Challenge { .. }) => return None,
            ServerEffect::Send(message @ ToWorker::Welcome(_)) => ServerDoes::Welcome(self.text(Text::Down(message))),
            ServerEffect::Send(message) => ServerDoes::Post(self.text(Text::Down(message))),
            ServerEffect::Assign { job, handle } => {
                let order = Order::Assign(Box::new(Assignment { handle, ..assignment(job.attempt()) }));
                ServerDoes::Post(self.text(Text::Down(ToWorker::Order { order })))
            }
            ServerEffect::Append { attempt: at, offset, bytes } => {
                ServerDoes::Append { attempt: number(at), offset, bytes: bytes.to_vec() }
            }
            ServerEffect::Measure { attempt: at } => ServerDoes::Measure(number(at)),
            ServerEffect::Settle { attempt: at, seq, report } => {
                ServerDoes::Settle { attempt: number(at), seq, report: self.report(report) }
            }
            ServerEffect::NotHeld { attempt: at, .. } => ServerDoes::NotHeld(number(at)),
            ServerEffect::Close { attempt: at, log_len, .. } => ServerDoes::Close { attempt: number(at), log_len },
            ServerEffect::Hangup(_) => ServerDoes::Hangup,
            ServerEffect::Open(_)
            | ServerEffect::Offer { .. }
            | ServerEffect::Wish
            | ServerEffect::Seen
            | ServerEffect::Left => return None,
        })
    }
}

/// Appends by the product's own logs.
fn stored(log: Log, offset: u8, bytes: &[u8]) -> (Log, Stored) {
    let logs = Logs::memory();
    let at = attempt(1);
    now(logs.append(&at, 0, Bytes::copy_from_slice(log.stored()))).expect("what was stored can be stored");
    if log.sealed {
        now(logs.seal(&at)).expect("memory never fails");
    }
    match now(logs.append(&at, u64::from(offset), Bytes::copy_from_slice(bytes))) {
        Ok(len) => {
            let all: Vec<u8> = now(logs.read(&at, 0, 64)).expect("memory never fails").concat();
            let mut next = log;
            next.len = len.min(LOG_MAX as u64) as u8;
            next.bytes[..usize::from(next.len)].copy_from_slice(&all[..usize::from(next.len)]);
            (next, Stored::Len(next.len))
        }
        Err(LogError::Gap { have }) => (log, Stored::Gap(have as u8)),
        Err(_) => (log, Stored::Never),
    }
}

/// What a daemon that starts finds on its disk, by the product's own spool.
pub fn held(model: &Protocol, spool: &[Option<Spooled>; 2]) -> Vec<(Held, Vec<(u64, Report)>)> {
    let memory = Spool::memory();
    for (a, spooled) in (1..).zip(spool) {
        let Some(spooled) = spooled else { continue };
        let at = attempt(a);
        now(memory.begin(&assignment(at))).expect("memory never fails");
        now(memory.append(at, vec![0; usize::from(spooled.len)].into())).expect("memory never fails");
        let reports: Vec<(u64, Report)> = (1..)
            .zip(spooled.reports.iter().flatten())
            .map(|(seq, report)| (seq, model.known.reports.get(*report).clone()))
            .collect();
        now(memory.record(at, &reports)).expect("memory never fails");
    }
    let (memory, held) = memory.reopen().expect("memory never fails");
    held.into_iter()
        .map(|held| (held.clone(), now(memory.reports(held.attempt, 0)).expect("memory never fails")))
        .collect()
}

fn assignment(attempt: AttemptRef) -> Assignment {
    Assignment {
        attempt,
        handle: 0,
        org: DEFAULT_ORG,
        spec: Default::default(),
        source: None,
        grant: Secret::new(String::new()),
        timeout_ms: 0,
        cancel_grace_ms: 0,
        job_url: String::new(),
    }
}

fn worker_input(model: &Protocol, input: &WorkerInput) -> (WorkerIn, When) {
    let input = match *input {
        WorkerInput::Unlinked => WorkerIn::Unlinked,
        WorkerInput::Heard(text) => match model.known.texts.get(text) {
            Text::Down(message) => WorkerIn::Heard(message.clone()),
            Text::Up(_) | Text::Log(_) => unreachable!("a worker hears the orchestrator"),
        },
        WorkerInput::Report { attempt: a, report } => {
            WorkerIn::Report { attempt: attempt(a), report: model.known.reports.get(report).clone() }
        }
        WorkerInput::Recorded { attempt: a, seq } => WorkerIn::Recorded { attempt: attempt(a), seq },
        WorkerInput::Spooled { attempt: a, len } => WorkerIn::Spooled { attempt: attempt(a), len: u64::from(len) },
        WorkerInput::Closed(a) => WorkerIn::Closed { attempt: attempt(a), teardown_ms: 0 },
        WorkerInput::Room => WorkerIn::Room,
        WorkerInput::Wake => return (WorkerIn::Tick, When::AtWake),
        WorkerInput::LeaseEnds => return (WorkerIn::Tick, When::AtFence),
    };
    (input, When::Now)
}

fn server_input(model: &Protocol, input: &ServerInput, w: u8, epoch: u8) -> ServerIn {
    match *input {
        ServerInput::Tick => ServerIn::Tick,
        ServerInput::Heard(text) => match model.known.texts.get(text).clone() {
            Text::Up(ToOrchestrator::Heartbeat(mut beat)) if model.is(Mutant::SilenceBelieved) => {
                beat.heard = u64::MAX;
                ServerIn::Heard(ToOrchestrator::Heartbeat(beat))
            }
            Text::Up(message) => ServerIn::Heard(message),
            Text::Log(chunk) => ServerIn::HeardLog(chunk),
            Text::Down(_) => unreachable!("the orchestrator hears a worker"),
        },
        ServerInput::Opened(books) => {
            let books = model.known.books.get(books);
            let jobs = if books.holder() == Some(w) { vec![books.job.clone()] } else { Vec::new() };
            ServerIn::Opened { epoch: i64::from(epoch), jobs, draining: false }
        }
        ServerInput::Job(books) => ServerIn::Job(model.known.books.get(books).job.clone()),
        ServerInput::Settled { attempt: a, seq, fate } => ServerIn::Settled {
            attempt: attempt(a),
            seq,
            result: match fate {
                Fate::Applied => Settled::Applied,
                Fate::Fenced => Settled::Fenced,
                Fate::Gap(have) => Settled::Gap { have },
                Fate::Missing(len) => Settled::Missing { log_len: u64::from(len), artifacts: Vec::new() },
                Fate::Failed => Settled::Failed,
            },
        },
        ServerInput::Appended { attempt: a, stored } => ServerIn::Appended {
            attempt: attempt(a),
            result: match stored {
                Stored::Len(len) => Ok(u64::from(len)),
                Stored::Gap(have) => Err(NotStored::Gap { have: u64::from(have) }),
                Stored::Never => Err(NotStored::Never),
            },
        },
        ServerInput::Durable { attempt: a, len } => ServerIn::Durable { attempt: attempt(a), len: u64::from(len) },
        ServerInput::Measured { attempt: a, len } => ServerIn::Measured { attempt: attempt(a), len: u64::from(len) },
    }
}
