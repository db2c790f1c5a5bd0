//! One step of the protocol's model: an action, what the product makes of it, and what follows from that until nothing
//! follows. Stands for the loops of `session::drive` at both ends, which perform what the cores decide.

//! One step of the protocol's model: an action, what the product makes of it, and what follows from that until nothing
//! follows. Stands for the loops of `session::drive` at both ends, which perform what the cores decide.

use std::collections::VecDeque;

use alloy_shared::wire::job::{End, Reason, Timings};
use alloy_shared::wire::session::{Report, ResultReport};
use orchestrator::desk::Answer;
use orchestrator::job::Step as JobStep;
use orchestrator::session::core::Core as ServerCore;

use super::super::mutant::Mutant;
use super::super::pool::Identity;
use super::Protocol;
use super::books::{Ask, Done, NOW, index_of, worker_id};
use super::ends::Daemon;
use super::io::{Fate, ServerDoes, ServerInput, WorkerDoes, WorkerInput, held};
use super::state::{Action, Farm, Msg, Run, Session, Settling, Stop};

/// What is still to be done within a step.
enum Todo {
    Worker(u8, WorkerInput),
    Server { worker: u8, epoch: u8, input: ServerInput },
}

/// A state that is being changed.
struct Turn<'m> {
    model: &'m Protocol,
    farm: Farm,
    /// What is to be settled in this step waits.
    slow: bool,
    todo: VecDeque<Todo>,
}

impl Protocol {
    /// The state after the action; `None` if it cannot happen.
    pub fn step(&self, farm: &Farm, action: &Action) -> Option<Farm> {
        let mut turn = Turn { model: self, farm: farm.clone(), slow: false, todo: VecDeque::new() };
        turn.farm.left.misfortunes -= super::rules::cost(self, farm, action);
        turn.act(action)?;
        while let Some(todo) = turn.todo.pop_front() {
            match todo {
                Todo::Worker(w, input) => turn.worker(w, input),
                Todo::Server { worker, epoch, input } => turn.server(worker, epoch, input),
            }
        }
        turn.tidy();
        Some(turn.farm)
    }

    pub fn ask(&self, books: u32, ask: Ask) -> &(u32, Done) {
        self.known.asked.answer((books, ask), |(books, ask)| {
            let event = match ask {
                Ask::Report { event, .. } => Some(self.known.events.get(*event)),
                Ask::Offer(_)
                | Ask::Cancel
                | Ask::Overdue
                | Ask::Silent(_)
                | Ask::NotHeld { .. }
                | Ask::Close { .. }
                | Ask::OpenSession(_) => None,
            };
            let mut done = self.known.books.get(*books).ask(ask, event);
            if self.is(Mutant::AttemptNumberReused) && matches!(done.books.job.state.step, JobStep::Queued { .. }) {
                done.books.job.state.tries.made = 0;
                done.books.attempts.clear();
            }
            (self.known.books.put(Identity::of(&done.books), done.books.clone()), done)
        })
    }
}

impl<'m> Turn<'m> {
    fn act(&mut self, action: &Action) -> Option<()> {
        let farm = &mut self.farm;
        match *action {
            Action::Offer(w) => self.ask(Ask::Offer(w)),
            Action::Cancel => {
                farm.left.cancels -= 1;
                let done = self.asked(Ask::Cancel);
                self.farm.memory.canceled |= matches!(done.1.answer, Some(Answer::Job(_)));
                self.entered(done);
            }
            Action::Overdue => self.ask(Ask::Overdue),
            Action::Silent(w) => {
                farm.memory.early |= !super::rules::is_timely(self.model, farm, w);
                self.ask(Ask::Silent(w));
            }
            Action::Sync => self.sync(),
            Action::CrashServer => self.crash_server(),
            Action::Connect(w) => self.connect(w)?,
            Action::Cut(w) => {
                self.unlink(w);
                self.todo.push_back(Todo::Worker(w, WorkerInput::Unlinked));
            }
            Action::CrashWorker(w) => self.crash_worker(w),
            Action::Wake(w) => {
                farm.left.beats -= 1;
                self.todo.push_back(Todo::Worker(w, WorkerInput::Wake));
            }
            Action::LeaseEnds(w) => {
                farm.workers[usize::from(w)].leased = false;
                self.todo.push_back(Todo::Worker(w, WorkerInput::LeaseEnds));
            }
            Action::SendLog(w) => self.todo.push_back(Todo::Worker(w, WorkerInput::Room)),
            Action::Say(w, a) => {
                let spool = farm.workers[usize::from(w)].spool[usize::from(a) - 1].as_mut()?;
                spool.len += 1;
                let len = spool.len;
                self.todo.push_back(Todo::Worker(w, WorkerInput::Spooled { attempt: a, len }));
            }
            Action::Finish(w, a) => self.finish(w, a, false),
            Action::Break(w, a) => self.finish(w, a, true),
            Action::Close(w, a) => {
                farm.workers[usize::from(w)].runs[usize::from(a) - 1] = Run::Nothing;
                self.todo.push_back(Todo::Worker(w, WorkerInput::Closed(a)));
            }
            Action::Deliver(msg) => {
                self.take(&msg);
                self.deliver(msg);
            }
            Action::Repeat(msg) => self.deliver(msg),
            Action::Lose(msg) => self.take(&msg),
            Action::DeliverSlowly(msg) => {
                self.slow = true;
                self.take(&msg);
                self.deliver(msg);
            }
            Action::Settle => {
                let settling = farm.settling.take()?;
                self.settle_now(settling);
            }
            Action::Write => {
                let ask = farm.unwritten.take()?;
                self.ask(ask);
            }
        }
        Some(())
    }

    fn take(&mut self, msg: &Msg) {
        self.farm.net.retain(|other| other != msg);
    }

    fn deliver(&mut self, msg: Msg) {
        let Msg { worker, epoch, text, .. } = msg;
        self.todo.push_back(match msg.up {
            true => Todo::Server { worker, epoch, input: ServerInput::Heard(text) },
            false => Todo::Worker(worker, WorkerInput::Heard(text)),
        });
    }

    fn post(&mut self, up: bool, worker: u8, epoch: u8, text: u32) {
        let msg = Msg { up, worker, epoch, text };
        // A connection is there at both ends, or nothing gets through.
        let heard = match up {
            true => self.session(worker, epoch).is_some(),
            false => self.farm.workers[usize::from(worker)].link == Some(epoch),
        };
        if heard && !self.farm.net.contains(&msg) {
            let link = |msg: &Msg| (msg.up, msg.worker, msg.epoch);
            let at = self.farm.net.partition_point(|other| link(other) <= link(&msg));
            self.farm.net.insert(at, msg);
        }
    }

    fn session(&mut self, worker: u8, epoch: u8) -> Option<&mut Session> {
        let Farm { sessions, old, .. } = &mut self.farm;
        let all = sessions[usize::from(worker)].iter_mut().chain(old.iter_mut());
        all.into_iter().find(|session| session.worker == worker && session.epoch == epoch)
    }

    /// Forgets connections from which nothing can come any more.
    fn tidy(&mut self) {
        let Farm { net, old, settling, .. } = &mut self.farm;
        let settles = |s: &Session| settling.is_some_and(|slow| (slow.worker, slow.epoch) == (s.worker, s.epoch));
        old.retain(|session| {
            settles(session)
                || net.iter().any(|msg| msg.up && (msg.worker, msg.epoch) == (session.worker, session.epoch))
        });
        old.sort();
    }

    // --- what happens to processes and connections

    /// A worker opens a session: from its dial to the welcome in one step, because nothing else of it is under way.
    fn connect(&mut self, w: u8) -> Option<()> {
        let known = &self.model.known;
        let (at, hello) = self.model.hello(w, self.farm.workers[usize::from(w)].core)?;
        self.farm.workers[usize::from(w)].core = at;
        let opened = self.model.ask(self.farm.books, Ask::OpenSession(w));
        self.farm.books = opened.0;
        let epoch = opened.1.books.epochs[usize::from(w)] as u8;
        self.farm.old.extend(self.farm.sessions[usize::from(w)].take());
        self.farm.workers[usize::from(w)].link = Some(epoch);
        let core = ServerCore::new(worker_id(w), String::new(), super::books::limits(), NOW);
        let core = known.cores.put(Identity::of(&core), core);
        self.farm.sessions[usize::from(w)] = Some(Session { worker: w, epoch, core });
        for input in [ServerInput::Tick, ServerInput::Heard(hello), ServerInput::Opened(self.farm.books)] {
            self.tell(w, epoch, input);
        }
        Some(())
    }

    /// The worker's end of the connection is gone. What it had sent may still arrive.
    fn unlink(&mut self, w: u8) {
        self.farm.workers[usize::from(w)].link = None;
        self.farm.net.retain(|msg| msg.up || msg.worker != w);
        self.farm.old.extend(self.farm.sessions[usize::from(w)].take());
    }

    fn crash_worker(&mut self, w: u8) {
        self.farm.left.crashes -= 1;
        self.farm.memory.crashed_worker = true;
        self.unlink(w);
        let model = self.model;
        let worker = &mut self.farm.workers[usize::from(w)];
        if !model.is(Mutant::VmOutlivesDaemon) {
            worker.runs = [Run::Nothing; 2];
        }
        let daemon = Daemon::start(held(model, &worker.spool));
        worker.leased = false;
        worker.core = model.known.daemons.put(daemon.identity(), daemon);
    }

    fn crash_server(&mut self) {
        let farm = &mut self.farm;
        farm.left.crashes -= 1;
        farm.memory.crashed_server = true;
        farm.sessions = [None; 2];
        farm.old.clear();
        farm.net.retain(|msg| !msg.up);
        (farm.settling, farm.unwritten) = (None, None);
        for log in &mut farm.logs {
            log.len = log.durable;
            log.bytes[usize::from(log.durable)..].fill(0);
        }
        if self.model.is(Mutant::CancelLost) {
            let mut books = self.model.known.books.get(farm.books).clone();
            if let JobStep::Canceling { lease, .. } = &books.job.state.step {
                books.job.state.step = JobStep::Assigned { lease: lease.clone() };
                farm.books = self.model.known.books.put(Identity::of(&books), books);
            }
        }
    }

    fn finish(&mut self, w: u8, a: u8, broken: bool) {
        let worker = &mut self.farm.workers[usize::from(w)];
        let run = &mut worker.runs[usize::from(a) - 1];
        let canceled = *run == Run::Command { stop: Stop::Cancel };
        *run = Run::Teardown;
        let len = worker.spool[usize::from(a) - 1].map_or(0, |spool| spool.len);
        let end = match (broken, canceled) {
            (true, _) => End::because(Reason::VmLost, ""),
            (false, true) => End::because(Reason::UserCanceled, ""),
            (false, false) => End::success(),
        };
        let report = self.model.report(Report::Result(Box::new(ResultReport {
            end,
            timings: Timings::default(),
            log_len: u64::from(len),
            artifacts: 0,
            facts: Default::default(),
        })));
        self.todo.push_back(Todo::Worker(w, WorkerInput::Report { attempt: a, report }));
    }

    // --- the worker's end

    fn worker(&mut self, w: u8, input: WorkerInput) {
        let worker = &mut self.farm.workers[usize::from(w)];
        let (core, does) = self.model.worker_step(w, worker.core, input);
        worker.core = *core;
        for what in does {
            self.perform_worker(w, what);
        }
    }

    fn perform_worker(&mut self, w: u8, what: &WorkerDoes) {
        let worker = &mut self.farm.workers[usize::from(w)];
        match *what {
            WorkerDoes::Post(text) => {
                if let Some(epoch) = worker.link {
                    self.post(true, w, epoch, text);
                }
            }
            WorkerDoes::Record { attempt, seq, report } => {
                if let Some(spool) = &mut worker.spool[usize::from(attempt) - 1] {
                    spool.reports[seq as usize - 1] = Some(report);
                    self.todo.push_back(Todo::Worker(w, WorkerInput::Recorded { attempt, seq }));
                }
            }
            WorkerDoes::Start(attempt) => {
                let a = usize::from(attempt) - 1;
                worker.spool[a].get_or_insert_default();
                worker.runs[a] = Run::Command { stop: Stop::No };
                self.farm.memory.starts[a] = (self.farm.memory.starts[a] + 1).min(2);
            }
            WorkerDoes::Stop { attempt, how, lease_lost } => {
                let deaf = lease_lost && self.model.is(Mutant::NoSelfFence);
                if let Run::Command { stop } = &mut worker.runs[usize::from(attempt) - 1]
                    && !deaf
                {
                    *stop = how.max(*stop);
                }
            }
            WorkerDoes::Forget(attempt) => worker.spool[usize::from(attempt) - 1] = None,
            WorkerDoes::Leased => worker.leased = true,
        }
    }

    // --- the orchestrator's end

    fn server(&mut self, w: u8, epoch: u8, input: ServerInput) {
        let model = self.model;
        let Some(session) = self.session(w, epoch) else { return };
        let (core, does) = model.server_step(w, epoch, session.core, input);
        session.core = *core;
        for what in does {
            self.perform_server(w, epoch, what);
        }
    }

    fn tell(&mut self, worker: u8, epoch: u8, input: ServerInput) {
        self.todo.push_back(Todo::Server { worker, epoch, input });
    }

    fn perform_server(&mut self, w: u8, epoch: u8, what: &ServerDoes) {
        match what {
            ServerDoes::Welcome(text) => self.todo.push_back(Todo::Worker(w, WorkerInput::Heard(*text))),
            ServerDoes::Post(text) => self.post(false, w, epoch, *text),
            ServerDoes::Append { attempt, offset, bytes } => self.append(w, epoch, *attempt, *offset, bytes),
            ServerDoes::Measure(attempt) => {
                if self.owns(w, *attempt) {
                    let len = self.farm.logs[usize::from(*attempt) - 1].durable;
                    self.tell(w, epoch, ServerInput::Measured { attempt: *attempt, len });
                }
            }
            ServerDoes::Settle { attempt, seq, report } => {
                let (attempt, seq, report) = (*attempt, *seq, *report);
                let settling = Settling { worker: w, epoch, attempt, seq, report };
                if self.slow && self.farm.settling.is_none() {
                    self.farm.settling = Some(settling);
                } else {
                    self.settle_now(settling);
                }
            }
            ServerDoes::NotHeld(attempt) => self.ask(Ask::NotHeld { attempt: *attempt, worker: w, epoch }),
            ServerDoes::Close { attempt, log_len } => {
                let done = self.asked(Ask::Close { attempt: *attempt, worker: w, log_len: *log_len });
                self.entered(done);
                let log = &mut self.farm.logs[usize::from(*attempt) - 1];
                if done.1.answer == Some(Answer::Done) && u64::from(log.len) >= *log_len {
                    (log.sealed, log.durable) = (true, log.len);
                }
            }
            ServerDoes::Hangup => {
                self.farm.old.retain(|old| (old.worker, old.epoch) != (w, epoch));
                let newest = &mut self.farm.sessions[usize::from(w)];
                *newest = newest.filter(|session| session.epoch != epoch);
            }
        }
    }

    /// `session::drive` stores no byte of an attempt that the books do not know as this worker's.
    fn owns(&self, w: u8, a: u8) -> bool {
        self.model.known.books.get(self.farm.books).row(a).is_some_and(|row| index_of(row.worker) == w)
    }

    fn append(&mut self, w: u8, epoch: u8, attempt: u8, offset: u64, bytes: &[u8]) {
        if !self.owns(w, attempt) {
            return self.perform_server(w, epoch, &ServerDoes::Hangup);
        }
        let a = match self.model.is(Mutant::NoFenceOnLog) {
            true => self.model.known.books.get(self.farm.books).made(),
            false => attempt,
        };
        let log = self.farm.logs[usize::from(a) - 1];
        let offset = if self.model.is(Mutant::NoOffsetCheck) { u64::from(log.len) } else { offset };
        let (next, stored) = self.model.append(log, offset, bytes);
        self.farm.logs[usize::from(a) - 1] = next;
        self.tell(w, epoch, ServerInput::Appended { attempt, stored });
        if self.model.is(Mutant::AckBeforeSync) && next != log {
            self.tell(w, epoch, ServerInput::Durable { attempt: a, len: next.len });
        }
    }

    /// Brings all logs to the disk, and tells the workers whose they are.
    fn sync(&mut self) {
        for a in 1..=2u8 {
            let log = &mut self.farm.logs[usize::from(a) - 1];
            if log.durable == log.len {
                continue;
            }
            log.durable = log.len;
            let len = log.len;
            let owner = self.model.known.books.get(self.farm.books).row(a).map(|row| index_of(row.worker));
            if let Some(session) = owner.and_then(|w| self.farm.sessions[usize::from(w)]) {
                let Session { worker, epoch, .. } = session;
                self.tell(worker, epoch, ServerInput::Durable { attempt: a, len });
            }
        }
    }

    fn settle_now(&mut self, settling: Settling) {
        let fate = self.settle(settling);
        let Settling { worker, epoch, attempt, seq, .. } = settling;
        self.tell(worker, epoch, ServerInput::Settled { attempt, seq, fate });
    }

    /// Stands for `ops::job::settle`.
    fn settle(&mut self, what: Settling) -> Fate {
        let model = self.model;
        let Settling { worker: w, attempt: a, seq, .. } = what;
        let mut from = what;
        let mut is_result = false;
        if let Report::Result(result) = model.known.reports.get(what.report) {
            is_result = true;
            if !model.is(Mutant::CompleteBeforeLog)
                && let Err(fate) = self.check_log(a, result.log_len)
            {
                return fate;
            }
            if model.is(Mutant::NoFenceOnComplete) {
                from = self.as_the_newest(what);
            }
        }
        if model.is(Mutant::StaleEpochAccepted) {
            from.epoch = model.known.books.get(self.farm.books).epochs[usize::from(from.worker)] as u8;
        }
        let event = model.event_of(from.report, from.attempt);
        let ask = Ask::Report { attempt: from.attempt, worker: from.worker, epoch: from.epoch, seq: from.seq, event };
        if model.is(Mutant::AckBeforeCommit) {
            self.farm.unwritten = Some(ask);
            return Fate::Applied;
        }
        let done = self.asked(ask);
        self.watch_report(what, is_result, done);
        self.entered(done);
        match &done.1.answer {
            Some(Answer::Job(_) | Answer::Applied) => Fate::Applied,
            Some(Answer::Gap { have }) => Fate::Gap(*have),
            Some(Answer::Refused(_) | Answer::NotLive) => {
                let books = model.known.books.get(self.farm.books);
                let known = books.row(a).is_some_and(|row| index_of(row.worker) == w && row.seq >= seq);
                if known { Fate::Applied } else { Fate::Fenced }
            }
            _ => Fate::Failed,
        }
    }

    /// A result stands only on a log that is whole and durable.
    fn check_log(&mut self, a: u8, log_len: u64) -> Result<(), Fate> {
        let have = self.farm.logs[usize::from(a) - 1].len;
        if log_len > 0 && u64::from(have) < log_len {
            return Err(Fate::Missing(have));
        }
        if log_len > 0 {
            self.sync();
        }
        Ok(())
    }

    fn as_the_newest(&self, from: Settling) -> Settling {
        let books = self.model.known.books.get(self.farm.books);
        match (books.holder(), books.attempts.last()) {
            (Some(worker), Some(row)) => {
                let epoch = books.epochs[usize::from(worker)] as u8;
                Settling { worker, epoch, attempt: books.made(), seq: row.seq + 1, ..from }
            }
            _ => from,
        }
    }

    /// What the checker remembers of a report that changed the job.
    fn watch_report(&mut self, from: Settling, is_result: bool, done: &(u32, Done)) {
        let Settling { worker: w, epoch, attempt: a, .. } = from;
        let before = self.model.known.books.get(self.farm.books);
        let changed = matches!(done.1.answer, Some(Answer::Job(_)));
        let memory = &mut self.farm.memory;
        if changed {
            memory.stale_session_wrote |= before.epochs[usize::from(w)] != i64::from(epoch);
            memory.ended_by_stranger |= is_result && (before.made() != a || before.holder() != Some(w));
        }
        if !is_result {
            return;
        }
        let by = &mut memory.result_by[usize::from(a) - 1];
        let again = *by != 0 && !changed;
        if again && self.model.is(Mutant::CompleteTwice) && before.job.state.is_done() && *by == epoch {
            memory.ends = 2;
        }
        if again && self.model.is(Mutant::ResentResultCounts) && *by != epoch {
            memory.attempt_ends[usize::from(a) - 1] = 2;
        }
        if changed && (self.model.is(Mutant::CompleteTwice) || self.model.is(Mutant::ResentResultCounts)) {
            *by = epoch;
        }
    }

    // --- the books

    fn asked(&self, ask: Ask) -> &'m (u32, Done) {
        self.model.ask(self.farm.books, ask)
    }

    fn ask(&mut self, ask: Ask) {
        let done = self.asked(ask);
        self.entered(done);
    }

    /// The books are as the store left them: whom it concerns is told.
    fn entered(&mut self, (number, done): &(u32, Done)) {
        let before = self.model.known.books.get(self.farm.books);
        self.farm.books = *number;
        let memory = &mut self.farm.memory;
        let (was, is) = (&before.job.state, &done.books.job.state);
        if !was.is_done() && is.is_done() {
            memory.ends += 1;
        }
        if was.lease().is_some() && is.lease().is_none() {
            memory.attempt_ends[usize::from(before.made()) - 1] += 1;
        }
        if let Some(left) = done.moved {
            let holder = done.books.holder();
            for w in holder.into_iter().chain(left.filter(|left| Some(*left) != holder)) {
                if let Some(Session { worker, epoch, .. }) = self.farm.sessions[usize::from(w)] {
                    self.tell(worker, epoch, ServerInput::Job(*number));
                }
            }
        }
    }
}
