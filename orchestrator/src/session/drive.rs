//! P: runs a session's core over a link and performs its effects.

use std::collections::BTreeSet;
use std::sync::Arc;

use alloy_shared::env::{Env, Mono, Ms};
use alloy_shared::id::{AttemptRef, Labels, OrgId, WorkerId};
use alloy_shared::wire::image::Inventory;
use alloy_shared::wire::job::Reason;
use alloy_shared::wire::path;
use alloy_shared::wire::session::{
    Assignment, BadFrame, Frame, Hello, Link, LogChunk, Order, Report, SlotView, ToOrchestrator, ToWorker,
};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt as _, StreamExt};
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::core::Core;
use super::io::{Effect, Input, NotStored, Settled};
use crate::App;
use crate::desk::{From, Offer, Request};
use crate::hub::Mail;
use crate::logs::LogError;
use crate::ops;
use crate::store::{Group, Job, Scope, StoreError, Write};

/// Serves one connection of a worker until it is over.
pub async fn drive(app: Arc<App>, worker: WorkerId, link: Link) {
    let nonce = format!("{:016x}{:016x}", app.env.dice(), app.env.dice());
    let core = Core::new(worker, nonce.clone(), app.limits.clone(), app.env.now());
    let Link { tx, rx } = link;
    let mut session = Session {
        app,
        worker,
        nonce,
        core,
        tx,
        rx,
        open: None,
        settling: FuturesUnordered::new(),
        name: String::new(),
        given_labels: Labels::default(),
        over: false,
        left: false,
        own: BTreeSet::new(),
        measuring: BTreeSet::new(),
    };
    session.run().await;
    session.close().await;
}

struct Open {
    epoch: i64,
    /// The worker's.
    org: OrgId,
    mail: mpsc::Receiver<Mail>,
}

struct Session {
    app: Arc<App>,
    worker: WorkerId,
    nonce: String,
    core: Core,
    tx: mpsc::Sender<Frame>,
    rx: mpsc::Receiver<Frame>,
    open: Option<Open>,
    settling: FuturesUnordered<BoxFuture<'static, Input>>,
    name: String,
    given_labels: Labels,
    over: bool,
    /// The worker said goodbye, or was revoked.
    left: bool,
    /// Attempts that the books know as this worker's: no other's log is touched.
    own: BTreeSet<AttemptRef>,
    /// Attempts whose logs are being measured.
    measuring: BTreeSet<AttemptRef>,
}

impl Session {
    async fn run(&mut self) {
        let mut next = Some(Input::Tick);
        while let Some(input) = next {
            if let Input::Measured { attempt, .. } = &input {
                self.measuring.remove(attempt);
            }
            let effects = self.core.handle(input, self.app.env.now());
            for effect in effects {
                self.perform(effect).await;
                // The worker may have another session by now: nothing more is said in the name of this one.
                if self.over {
                    return;
                }
            }
            next = self.wait().await;
        }
    }

    /// The next thing to handle; `None` when the connection or the mailbox is gone.
    async fn wait(&mut self) -> Option<Input> {
        let wake = self.core.next_wake();
        let mail = async {
            match &mut self.open {
                Some(open) => open.mail.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            letter = mail => letter.map(|letter| read(letter, &self.app)),
            Some(settled) = self.settling.next(), if !self.settling.is_empty() => Some(settled),
            frame = self.rx.recv() => match frame {
                Some(frame) => self.frame(frame).await,
                None => Some(Input::Unlinked),
            },
            () = self.app.env.sleep_until(wake) => Some(Input::Tick),
        }
    }

    async fn frame(&mut self, frame: Frame) -> Option<Input> {
        let heard = match &frame {
            Frame::Binary(bytes) => LogChunk::decode(bytes).map(Input::HeardLog),
            Frame::Text(text) => ToOrchestrator::decode(text).map(Input::Heard),
        };
        match heard {
            Ok(input) => Some(input),
            Err(BadFrame::Unknown(message)) => {
                self.send(ToWorker::Unsupported { message }.encode()).await;
                Some(Input::Tick)
            }
            Err(error) => {
                warn!(worker.id = %self.worker, %error, "worker {} sent a frame that is not ours; hanging up", self.worker);
                None
            }
        }
    }

    async fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Open(hello) => self.open(*hello).await,
            // The books have not heard of the worker for too long: it has to find an orchestrator that can write.
            Effect::Send(ToWorker::HeartbeatAck { .. })
                if !self.app.hub.may_answer(self.worker, self.app.env.now().mono) => {}
            Effect::Send(message) => self.send(message.encode()).await,
            Effect::Assign { job, handle } => self.assign(*job, handle).await,
            Effect::Append { attempt, offset, bytes } => self.append(attempt, offset, bytes).await,
            Effect::Measure { attempt } => self.measure(attempt).await,
            Effect::Settle { attempt, seq, report } => self.settle(attempt, seq, report),
            Effect::NotHeld { attempt, message } => self.not_held(attempt, message).await,
            Effect::Close { attempt, teardown_ms, log_len } => {
                self.own.remove(&attempt);
                if let Some(from) = self.from(attempt) {
                    // Sealing reads the whole log: the session goes on meanwhile.
                    let app = self.app.clone();
                    let close = async move { ops::job::close(&app, from, teardown_ms, log_len).await };
                    self.app.env.spawn("close", Box::pin(close));
                }
            }
            Effect::Offer { labels, slots, images, draining, stopping, trouble } => {
                self.app.hub.offered(self.worker, &slots, &images, stopping, trouble);
                self.offer(labels, slots, images, draining).await;
            }
            Effect::Wish => self.wish().await,
            Effect::Left => self.left = true,
            Effect::Seen => self.app.hub.seen(self.worker, self.app.env.now().mono),
            Effect::Hangup(why) => {
                info!(worker.id = %self.worker, why, "session of worker {} is over: {why}", self.worker);
                self.over = true;
            }
        }
    }

    async fn open(&mut self, hello: Hello) {
        let asked_at = self.app.env.now().mono;
        let opened = match ops::access::open_session(&self.app, &hello, &self.nonce).await {
            Ok(opened) => opened,
            Err(reject) => return self.later(refused(reject)),
        };
        let (epoch, org) = (opened.epoch, opened.org);
        // Subscribe before you look: what changes from here on comes by mail.
        let boot = Some(hello.boot).filter(|_| !self.rx.is_closed());
        let mail = self.app.hub.open(self.worker, epoch, boot, self.app.env.now().mono);
        self.open = Some(Open { epoch, org, mail });
        if self.app.shared.is_some() {
            self.app.hub.opened_at(self.worker, epoch, asked_at);
        }
        info!(worker.id = %self.worker, epoch, "worker {} connected", opened.name);
        let (scope, store) = (Scope::farm(), &self.app.store);
        let read =
            async { Ok::<_, StoreError>((store.worker(&scope, &self.worker).await?, store.held(&self.worker).await?)) };
        match read.await {
            // It was revoked while its session was being opened, before there was a mailbox to tell it.
            Ok((Some(worker), _)) if worker.revoked => self.later(refused(ops::access::revoked())),
            Ok((Some(worker), jobs)) => {
                self.name = worker.name;
                self.given_labels = worker.labels;
                self.own.extend(jobs.iter().map(Job::attempt));
                self.later(Input::Opened { epoch, jobs, draining: worker.draining });
            }
            Ok((None, _)) => self.over = true,
            Err(error) => {
                warn!(worker.id = %self.worker, %error, "what worker {} holds cannot be read", self.worker);
                self.over = true;
            }
        }
    }

    /// Whether the books say that this attempt is or was this worker's. `None`: they cannot be read.
    async fn owns(&mut self, attempt: AttemptRef) -> Option<bool> {
        if self.own.contains(&attempt) {
            return Some(true);
        }
        match self.app.store.attempt(&Scope::farm(), &attempt).await {
            Ok(Some(row)) if row.worker == self.worker => {
                self.own.insert(attempt);
                Some(true)
            }
            Ok(_) => Some(false),
            Err(error) => {
                warn!(%attempt, %error, "whose attempt it is cannot be read");
                None
            }
        }
    }

    /// Feeds an input to the core in a turn of its own.
    fn later(&self, input: Input) {
        self.settling.push(Box::pin(std::future::ready(input)));
    }

    fn from(&self, at: AttemptRef) -> Option<From> {
        self.open.as_ref().map(|open| From { at, worker: self.worker, epoch: open.epoch })
    }

    async fn assign(&mut self, job: Job, handle: u32) {
        let attempt = job.attempt();
        if self.open.as_ref().is_none_or(|open| open.org != job.org) {
            // An orchestrator that goes by labels only placed it here. A worker that has it already keeps it to its end.
            return self.not_held(attempt, "it was given to a worker of another organisation".to_owned()).await;
        }
        self.own.insert(attempt);
        self.app.logs.begin(&attempt);
        let limits = &self.app.limits;
        let timeout_ms = job.spec.timeout_ms.unwrap_or(limits.job_timeout_ms).min(limits.job_timeout_max_ms);
        let assignment = Assignment {
            attempt,
            handle,
            org: job.org,
            spec: (*job.spec).clone(),
            source: job.source,
            grant: self.app.grants.mint(&attempt),
            timeout_ms,
            cancel_grace_ms: limits.cancel_grace_ms,
            job_url: format!("{}{}", self.app.base_url, path::job(job.id)),
        };
        self.send(ToWorker::Order { order: Order::Assign(Box::new(assignment)) }.encode()).await;
    }

    async fn not_held(&mut self, attempt: AttemptRef, message: String) {
        let Some(from) = self.from(attempt) else { return };
        let app = self.app.clone();
        let tell = async move { ops::job::not_held(&app, from, Reason::WorkerLost, message).await };
        match self.app.shared {
            // While the database is away the worker is answered all the same.
            Some(_) => self.settling.push(Box::pin(tell.map(|()| Input::Tick))),
            None => tell.await,
        }
    }

    async fn append(&mut self, attempt: AttemptRef, offset: u64, bytes: Bytes) {
        if self.owns(attempt).await != Some(true) {
            warn!(%attempt, worker.id = %self.worker, "worker {} sent log bytes of an attempt that is not its own", self.worker);
            self.over = true;
            return;
        }
        let result = match self.app.logs.append(&attempt, offset, bytes).await {
            Ok(len) => {
                self.app.log_sync.dirty(attempt, self.worker);
                self.app.wake.logged(attempt.job);
                Ok(len)
            }
            Err(LogError::Gap { have }) => Err(NotStored::Gap { have }),
            Err(error) => {
                warn!(%attempt, %error, "log bytes of {attempt} were not stored; the worker keeps them");
                Err(match error {
                    LogError::Sealed | LogError::TooLong | LogError::Damaged { .. } => NotStored::Never,
                    LogError::Full | LogError::Away(_) | LogError::Io { .. } | LogError::Gap { .. } => NotStored::Later,
                })
            }
        };
        self.later(Input::Appended { attempt, result });
    }

    /// Finds out how long a log is. A database that is away comes back; until then the session goes on.
    async fn measure(&mut self, attempt: AttemptRef) {
        match self.owns(attempt).await {
            Some(true) => {}
            // Books that came back from a backup may not know it: then nothing of it is wanted.
            Some(false) => return self.send(ToWorker::Order { order: Order::ResultAck { attempt } }.encode()).await,
            None => return self.later(Input::NotMeasured { attempt }),
        }
        if !self.measuring.insert(attempt) {
            return;
        }
        let app = self.app.clone();
        self.settling.push(Box::pin(async move {
            loop {
                let len = match app.logs.resume(&attempt).await {
                    Ok(len) => len,
                    Err(_) if app.shared.is_some() => {
                        app.env.sleep_until(app.env.now().mono + app.limits.poll_floor_ms).await;
                        continue;
                    }
                    Err(_) => 0,
                };
                return Input::Measured { attempt, len };
            }
        }));
    }

    fn settle(&mut self, attempt: AttemptRef, seq: u64, report: Report) {
        let Some(from) = self.from(attempt) else { return };
        let app = self.app.clone();
        self.settling.push(Box::pin(async move {
            loop {
                let result = ops::job::settle(&app, from, seq, report.clone()).await;
                if result != Settled::Failed || app.shared.is_none() {
                    return Input::Settled { attempt, seq, result };
                }
                // A database that is away comes back. Until then the worker keeps its session: no other could be opened.
                app.env.sleep_until(app.env.now().mono + app.limits.poll_floor_ms).await;
            }
        }));
    }

    /// Sends what the farm wishes of images. Whoever cannot read it begins anew.
    async fn wish(&mut self) {
        let (scope, store) = (Scope::farm(), &self.app.store);
        let read =
            async { Ok::<_, StoreError>((store.worker(&scope, &self.worker).await?, store.images(&scope).await?)) };
        match read.await {
            Ok((Some(worker), rows)) => {
                let wishes = ops::images::wishes(&rows, &worker);
                self.send(ToWorker::Images { wishes }.encode()).await;
            }
            Ok((None, _)) => self.over = true,
            Err(error) => {
                warn!(worker.id = %self.worker, %error, "what images worker {} shall have cannot be read", self.worker);
                self.over = true;
            }
        }
    }

    async fn offer(&mut self, host: Labels, slots: Vec<SlotView>, images: Arc<Inventory>, draining: bool) {
        let Some(open) = &self.open else { return };
        let (worker, org, name, mut labels) = (self.worker, open.org, self.name.clone(), host);
        for (key, value) in self.given_labels.iter() {
            if let Err(error) = labels.insert(key, value) {
                warn!(worker.id = %self.worker, %error, "a label of worker {} does not fit", self.worker);
            }
        }
        let offer = Offer { worker, org, name, labels, slots, images, draining };
        self.app.desk.tell(Request::Offer(offer)).await;
    }

    /// A worker that does not read for as long as silence lasts is as good as gone.
    async fn send(&mut self, frame: Frame) {
        let deadline: Mono = self.app.env.now().mono + self.app.limits.link_silent_ms;
        let env: &dyn Env = &*self.app.env;
        let sent = tokio::select! {
            biased;
            sent = self.tx.send(frame) => sent.is_ok(),
            () = env.sleep_until(deadline) => false,
        };
        self.over |= !sent;
    }

    async fn close(self) {
        let Some(open) = self.open else { return };
        if !self.app.hub.close(self.worker, open.epoch, self.left) {
            return;
        }
        self.app.desk.tell(Request::Gone { worker: self.worker, left: self.left }).await;
        // Where orchestrators share a farm, the books know already.
        let at = if self.app.shared.is_some() { Ms(0) } else { self.app.env.now().wall };
        let seen = Write::Seen { worker: self.worker, at, left: self.left };
        if let Err(error) = self.app.store.commit(&[Group(vec![seen])]).await {
            warn!(worker.id = %self.worker, %error, "when worker {} was last seen was not written", self.worker);
        }
    }
}

fn refused(reject: ops::access::Reject) -> Input {
    let ops::access::Reject { code, message, retry_after_ms } = reject;
    Input::Refused { code, message, retry_after_ms }
}

fn read(letter: Mail, app: &App) -> Input {
    match letter {
        Mail::Job(job) => Input::Job(*job),
        Mail::Durable { attempt, len } => Input::Durable { attempt, len },
        Mail::Superseded => Input::Superseded,
        Mail::Drain { on } => Input::Drain { on },
        Mail::Wishes => Input::Wishes,
        Mail::Revoked => refused(ops::access::revoked()),
        Mail::Stop => Input::Stop { after_ms: app.env.dice() % app.limits.heartbeat_ms.max(1) },
    }
}

/// Looks for workers that hold jobs and were not heard for longer than a lease lasts.
pub async fn sweep(app: Arc<App>) {
    let step = app.limits.heartbeat_ms;
    let mut last = app.env.now().mono;
    loop {
        app.env.sleep_until(last + step).await;
        let now = app.env.now().mono;
        // This process was stopped or asleep: what it did not hear proves nothing.
        if now.since(last) > step + app.limits.link_silent_ms {
            app.hub.listen_anew(now);
        }
        last = now;
        let answer = app.desk.ask(|ticket| Request::Holders { ticket }).await;
        let crate::desk::Answer::Holders(holders) = answer else { continue };
        for worker in app.hub.silent(holders, now) {
            warn!(worker.id = %worker, "worker {worker} was not heard for too long; its attempts are lost");
            app.desk.tell(Request::Silent(worker)).await;
        }
    }
}

/// The most that waits in a link's channels before the sender has to.
pub const LINK_FRAMES: usize = 64;
