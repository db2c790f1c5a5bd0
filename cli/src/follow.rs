//! S: follows one job: its log to standard output, its fortunes to standard error, and the keyboard's wishes to the farm.

use std::future::{Future, pending};
use std::pin::Pin;

use alloy_shared::client::{ClientError, FeedItem};
use alloy_shared::env::Ms;
use alloy_shared::id::JobId;
use alloy_shared::wire::job::{
    ArtifactView, Blame, EventKind, FeedCursor, FeedFrame, JobEvent, JobView, LogFrame, Outcome, Reason, StateWord,
};
use bytes::Bytes;
use indicatif::ProgressBar;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use crate::context::{App, Farm};
use crate::output::talk::Tone;
use crate::output::{Failure, Fault, Sink, duration};

/// A job that starts at once is not worth a look at why it waits.
const FIRST_LOOK_MS: u64 = 400;
const LOOK_AGAIN_MS: u64 = 2_000;

/// What a person or a CI system wants of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    Interrupt,
    Terminate,
}

pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    pub(crate) fn install() -> Result<Self, Failure> {
        let listen = |kind| signal(kind).map_err(|error| Failure::io("signals", &error));
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    /// Waits for the next wish. May be dropped while it waits.
    pub(crate) async fn next(&mut self) -> Told {
        tokio::select! {
            biased;
            Some(()) = self.interrupt.recv() => Told::Interrupt,
            Some(()) = self.terminate.recv() => Told::Terminate,
            // The terminal is gone: whoever typed the command cannot say what to do with the job.
            Some(()) = self.hangup.recv() => Told::Terminate,
            else => pending().await,
        }
    }

    /// Does some work that a wish to stop may drop.
    pub(crate) async fn unless_told<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Failure> {
        tokio::select! {
            biased;
            _ = self.next() => Err(Failure::new(Fault::Interrupted, "interrupted")),
            done = work => Ok(done),
        }
    }
}

/// What Ctrl-C means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnInterrupt {
    /// `run`: the job is this command's; the first one cancels it, the second one lets go.
    Cancel,
    /// `attach`: the job is somebody's; letting go is all.
    Detach,
}

#[derive(Debug)]
pub(crate) enum Ending {
    Ended(Box<JobView>),
    /// The job goes on without us.
    Detached,
}

type Answer<T> = Option<Pin<Box<dyn Future<Output = Result<T, ClientError>> + Send>>>;

async fn answer<T>(waiting: &mut Answer<T>) -> Result<T, ClientError> {
    let result = match waiting {
        Some(future) => future.await,
        None => pending().await,
    };
    *waiting = None;
    result
}

/// A follower of one job.
pub(crate) struct Follower<'a> {
    app: &'a App,
    farm: &'a Farm,
    id: JobId,
    on_interrupt: OnInterrupt,
    arrivals: Option<mpsc::Sender<ArtifactView>>,
    /// Bytes that standard output has not taken yet.
    unwritten: Option<Bytes>,
    /// What comes is thrown away.
    mute: bool,
    log: LogPlace,
    cancel: Answer<JobView>,
    canceled_by_us: bool,
    look: Answer<JobView>,
    waiting: Option<ProgressBar>,
    waiting_reason: Option<String>,
    named_worker: bool,
    ended: Option<Box<JobView>>,
}

impl<'a> Follower<'a> {
    pub(crate) fn new(app: &'a App, farm: &'a Farm, id: JobId, on_interrupt: OnInterrupt) -> Self {
        Self {
            app,
            farm,
            id,
            on_interrupt,
            arrivals: None,
            unwritten: None,
            mute: false,
            log: LogPlace::default(),
            cancel: None,
            canceled_by_us: false,
            look: None,
            waiting: None,
            waiting_reason: None,
            named_worker: false,
            ended: None,
        }
    }

    /// Artifacts are announced here as they become ready.
    pub(crate) fn announce(mut self, arrivals: mpsc::Sender<ArtifactView>) -> Self {
        self.arrivals = Some(arrivals);
        self
    }

    /// The wish to stop came before the job had a name.
    pub(crate) fn already_told(mut self) -> Self {
        self.told(Told::Interrupt);
        self
    }

    /// Follows to the end, or until told to let go. When it returns, standard output has every byte.
    pub(crate) async fn run(mut self, signals: &mut Signals, mut sink: Sink) -> Result<Ending, Failure> {
        let mut feed = self.farm.client.feed(self.id, FeedCursor::default());
        let ending = loop {
            if self.mute {
                self.unwritten = None;
            }
            if self.unwritten.is_none()
                && let Some(job) = self.ended.take()
            {
                break Ending::Ended(job);
            }
            let bytes = self.unwritten.clone();
            tokio::select! {
                biased;
                told = signals.next() => if self.told(told) { break Ending::Detached },
                result = answer(&mut self.cancel) => self.canceled(result),
                result = answer(&mut self.look) => self.looked(result),
                outcome = sink.write(bytes.clone().unwrap_or_default()), if bytes.is_some() => {
                    self.written(outcome)?;
                    self.unwritten = None;
                }
                item = feed.recv(), if bytes.is_none() => self.item(item)?,
            }
        };
        self.stop_waiting();
        match ending {
            Ending::Ended(_) if self.mute => Ok(ending),
            Ending::Detached => Ok(ending),
            Ending::Ended(_) => {
                signals.unless_told(sink.finish()).await??;
                Ok(ending)
            }
        }
    }

    /// A job that is being canceled is waited for even if its last words reach nobody: the terminal may be gone.
    fn written(&mut self, outcome: Result<(), Failure>) -> Result<(), Failure> {
        match outcome {
            Ok(()) => Ok(()),
            Err(_) if self.canceled_by_us => {
                self.mute = true;
                Ok(())
            }
            Err(failure) if failure.fault == Fault::Pipe => Err(failure),
            Err(failure) => {
                Err(failure
                    .hint(format!("alloy attach {0}   follows the job again; alloy cancel {0} ends it", self.id)))
            }
        }
    }

    /// True when the follower shall let go.
    fn told(&mut self, told: Told) -> bool {
        match (self.on_interrupt, told) {
            (OnInterrupt::Detach, Told::Interrupt | Told::Terminate) => return true,
            (OnInterrupt::Cancel, Told::Interrupt) if self.canceled_by_us => return true,
            (OnInterrupt::Cancel, Told::Interrupt | Told::Terminate) => {}
        }
        if !self.canceled_by_us {
            self.canceled_by_us = true;
            self.cancel();
            self.stop_waiting();
            let again = if told == Told::Interrupt { "  (Ctrl-C again to detach)" } else { "" };
            self.app.talk.say(&format!("Canceling {}…{again}", self.id));
        }
        false
    }

    /// Starts the cancel in a task of its own: a terminal that stands still must not hold it up.
    fn cancel(&mut self) {
        let (client, id) = (self.farm.client.clone(), self.id);
        let (tx, rx) = oneshot::channel();
        let work = async move {
            // Nobody waits for the answer when the follower let go.
            let _ = tx.send(client.cancel(id).await);
        };
        self.app.env.spawn("cancel", Box::pin(work));
        self.cancel = Some(Box::pin(async move {
            match rx.await {
                Ok(result) => result,
                Err(_) => Err(ClientError::Protocol("the cancel ended early".into())),
            }
        }));
    }

    fn canceled(&mut self, result: Result<JobView, ClientError>) {
        if let Err(error) = result {
            let failure = Failure::of(error, &self.farm.url);
            self.app.talk.warn(&format!("the cancel did not arrive: {}", failure.message));
            // The next Ctrl-C tries again.
            self.canceled_by_us = false;
        }
    }

    fn item(&mut self, item: Option<Result<FeedItem, ClientError>>) -> Result<(), Failure> {
        match item {
            Some(Ok(FeedItem::Frame(frame))) => self.frame(frame),
            Some(Ok(FeedItem::Reconnecting { tries, why })) => {
                self.app.talk.warn(&format!("reconnecting… ({tries})  {why}"));
                Ok(())
            }
            Some(Ok(FeedItem::Reconnected)) => {
                self.app.talk.say("reconnected, nothing is lost");
                Ok(())
            }
            Some(Err(error)) => {
                Err(Failure::of(error, &self.farm.url)
                    .hint(format!("alloy attach {}   follows the job again", self.id)))
            }
            None => Err(Failure::error("the feed ended before the job did").hint(format!("alloy attach {}", self.id))),
        }
    }

    fn frame(&mut self, frame: FeedFrame) -> Result<(), Failure> {
        if self.app.talk.json() {
            let mut line = serde_json::to_vec(&frame).map_err(|error| Failure::error(format!("JSON: {error}")))?;
            line.push(b'\n');
            self.unwritten = Some(line.into());
        }
        match frame {
            FeedFrame::Event(event) => self.event(event),
            FeedFrame::Log(log) => {
                let bytes = self.log.take(&log).map_err(|why| Failure::error(format!("{}: {why}", self.id)))?;
                if !self.app.talk.json() && !bytes.is_empty() {
                    self.stop_waiting();
                    self.unwritten = Some(bytes);
                }
            }
            FeedFrame::End { job } => self.ended = Some(job),
        }
        Ok(())
    }

    fn event(&mut self, event: JobEvent) {
        match event.kind {
            EventKind::Submitted => {
                if event.state == StateWord::Queued {
                    self.look_in(FIRST_LOOK_MS);
                }
            }
            EventKind::Assigned => {
                self.stop_waiting();
                self.named_worker = false;
                self.look_in(0);
            }
            EventKind::Accepted | EventKind::Phase | EventKind::Finished => {}
            EventKind::Artifact => {
                if let (Some(arrivals), Some(artifact)) = (&self.arrivals, event.artifact) {
                    // What does not fit is found in the list at the end.
                    let _ = arrivals.try_send(*artifact);
                }
            }
            EventKind::CancelRequested => {
                if !self.canceled_by_us {
                    self.app.talk.say("the job is being canceled");
                }
            }
            EventKind::Requeued => {
                let why = event.message.or_else(|| event.reason.map(|reason| words(reason).to_owned()));
                let why = why.map_or(String::new(), |why| format!(": {why}"));
                self.app.talk.warn(&format!("attempt {} is over{why}; trying again", event.attempt));
                self.look_in(FIRST_LOOK_MS);
            }
        }
    }

    fn look_in(&mut self, delay_ms: u64) {
        let (client, id, env) = (self.farm.client.clone(), self.id, self.app.env.clone());
        self.look = Some(Box::pin(async move {
            if delay_ms > 0 {
                env.sleep_until(env.now().mono + delay_ms).await;
            }
            client.job(id).await
        }));
    }

    /// A look only decorates: that it failed is told by the feed, if it matters.
    fn looked(&mut self, result: Result<JobView, ClientError>) {
        let Ok(job) = result else { return };
        match job.state {
            StateWord::Queued => {
                self.show_waiting(job.waiting_reason.unwrap_or_else(|| "waiting for a free slot".to_owned()));
                self.look_in(LOOK_AGAIN_MS);
            }
            StateWord::Assigned | StateWord::Running => {
                if let Some(name) = job.worker_name.filter(|_| !self.named_worker) {
                    self.named_worker = true;
                    let image = job.spec.image.map_or(String::new(), |image| format!(" · {image}"));
                    let again = if job.attempt > 1 { format!(" · attempt {}", job.attempt) } else { String::new() };
                    self.app.talk.step("Running", &format!("on {name}{image}{again}"));
                }
            }
            StateWord::Canceling
            | StateWord::Succeeded
            | StateWord::Failed
            | StateWord::TimedOut
            | StateWord::Canceled
            | StateWord::Expired
            | StateWord::Errored => {}
        }
    }

    fn show_waiting(&mut self, reason: String) {
        if self.waiting_reason.as_ref() == Some(&reason) {
            return;
        }
        if !self.app.talk.live() {
            self.app.talk.step("Queued", &reason);
        } else if let Some(bar) = &self.waiting {
            bar.set_message(crate::output::sanitize::one_line(&reason));
        } else {
            self.waiting = Some(self.app.talk.spinner("Queued", &reason));
        }
        self.waiting_reason = Some(reason);
    }

    fn stop_waiting(&mut self) {
        self.waiting_reason = None;
        if let Some(bar) = self.waiting.take() {
            bar.finish_and_clear();
        }
    }
}

/// How far into which attempt's log the terminal is. The client already sees to it that bytes come once and in order;
/// a log with a hole in it is worse than none, so it is checked where it is printed.
#[derive(Debug, Default)]
struct LogPlace {
    attempt: u32,
    offset: u64,
}

impl LogPlace {
    fn take(&mut self, frame: &LogFrame) -> Result<Bytes, String> {
        let bytes = Bytes::from(frame.bytes().ok_or("a piece of the log is damaged")?);
        if frame.attempt > self.attempt {
            *self = Self { attempt: frame.attempt, offset: 0 };
        }
        if frame.attempt < self.attempt {
            return Ok(Bytes::new());
        }
        let seen = self.offset.checked_sub(frame.offset).ok_or_else(|| {
            format!("{} bytes of the log are missing at byte {}", frame.offset - self.offset, self.offset)
        })?;
        let seen = usize::try_from(seen).unwrap_or(usize::MAX).min(bytes.len());
        let fresh = bytes.slice(seen..);
        self.offset += fresh.len() as u64;
        Ok(fresh)
    }
}

/// The last line about a job.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) tone: Tone,
    pub(crate) mark: &'static str,
    pub(crate) text: String,
    pub(crate) took: Option<String>,
    pub(crate) hint: Option<&'static str>,
}

pub(crate) fn verdict(job: &JobView) -> Verdict {
    let outcome = job.outcome.unwrap_or(Outcome::Errored);
    let why = why(job);
    let (tone, mark, text) = match outcome {
        Outcome::Succeeded => (Tone::Good, "✓", "succeeded".to_owned()),
        Outcome::Failed => (Tone::Bad, "✗", format!("failed: {why}")),
        Outcome::TimedOut => (Tone::Bad, "⏱", format!("timed out: {why}")),
        Outcome::Canceled if why.starts_with("canceled") => (Tone::Note, "⊘", why),
        Outcome::Canceled => (Tone::Note, "⊘", format!("canceled: {why}")),
        Outcome::Expired => (Tone::Bad, "!", format!("expired: {why}")),
        Outcome::Errored => (Tone::Bad, "!", format!("not run to its end: {why}")),
    };
    let ms = |at: &str| Ms::parse_rfc3339(at);
    let took = job.finished_at.as_deref().and_then(ms).zip(ms(&job.created_at)).map(|(end, start)| end.since(start));
    Verdict { tone, mark, text, took: took.map(duration), hint: hint(job) }
}

fn why(job: &JobView) -> String {
    // A message that only repeats the word before it says nothing.
    let repeats = |message: &str| job.outcome.is_some_and(|outcome| outcome.as_str() == message);
    if let Some(message) = job.message.as_ref().filter(|message| !message.is_empty() && !repeats(message)) {
        return message.clone();
    }
    match (job.reason, job.signal, job.exit_code) {
        (Some(Reason::ScriptFailure), Some(signal), _) => format!("the command was killed by signal {signal}"),
        (Some(Reason::ScriptFailure), None, Some(code)) => format!("the command exited {code}"),
        (Some(reason), _, _) => words(reason).to_owned(),
        (None, _, _) => "the farm does not say why".to_owned(),
    }
}

pub(crate) const fn words(reason: Reason) -> &'static str {
    match reason {
        Reason::ScriptFailure => "the command failed",
        Reason::HookFailure => "a hook failed",
        Reason::SourceError => "the sources could not be laid out",
        Reason::ArtifactMissing => "an artifact that must exist is missing",
        Reason::ArtifactChanged => "an artifact changed while it was collected",
        Reason::RunTimeout => "the command ran longer than it may",
        Reason::NoOutputTimeout => "the command said nothing for too long",
        Reason::UserCanceled => "by a user",
        Reason::Superseded => "a newer job took its place",
        Reason::ParentCanceled => "the job it belongs to was canceled",
        Reason::QueueExpired => "no worker had a slot in time",
        Reason::VmStartFailure => "the virtual machine did not start",
        Reason::VmLost => "the virtual machine was lost",
        Reason::WorkerLost => "the worker was lost",
        Reason::WorkerDrained => "the worker was taken out of service",
        Reason::OutOfDisk => "the worker's disk is full",
        Reason::ImagePullFailure => "the image could not be pulled",
        Reason::InternalError => "a fault inside the farm",
        Reason::ConfigError => "the worker is not set up for it",
        Reason::SignatureRejected => "a signature was rejected",
    }
}

fn hint(job: &JobView) -> Option<&'static str> {
    match (job.reason?, job.blame?) {
        (Reason::RunTimeout, _) => Some("--timeout 90m gives it longer"),
        (Reason::QueueExpired, _) => Some("alloy worker list shows who could run it; --queue-timeout waits longer"),
        (Reason::ArtifactMissing, _) => Some("a glob with `=` in front must match; without it, it may match nothing"),
        (_, Blame::Farm) => Some("the farm's fault, not the command's: run it again, or ask who keeps the workers"),
        (_, Blame::User | Blame::Policy) => None,
    }
}

impl App {
    /// Says how a job ended.
    pub(crate) fn tell_end(&self, job: &JobView) {
        let verdict = verdict(job);
        self.talk.verdict(verdict.tone, verdict.mark, &verdict.text, verdict.took.as_deref());
        if let Some(hint) = verdict.hint {
            self.talk.hint(hint);
        }
    }

    pub(crate) fn tell_detached(&self, id: JobId, on_interrupt: OnInterrupt) {
        match on_interrupt {
            OnInterrupt::Cancel => self.talk.say(&format!("Detached from {id}; its cancel is on the way.")),
            OnInterrupt::Detach => self.talk.say(&format!("Detached from {id}; it goes on.")),
        }
        self.talk.hint(&format!("alloy attach {id}   follows it again"));
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use alloy_shared::id::DEFAULT_ORG;
    use alloy_shared::wire::job::{End, JobSpec, Timings};

    use super::*;

    /// A job that ended like this, ninety-two seconds after it began.
    pub(crate) fn ended(end: &End) -> JobView {
        let (exit_code, exit_origin) = end.run_exit();
        JobView {
            id: JobId::from_raw(7),
            org: DEFAULT_ORG,
            state: end.outcome().into(),
            phase: None,
            spec: JobSpec::default(),
            source: None,
            attempt: 1,
            worker: None,
            worker_name: None,
            lost: 0,
            created_at: "2026-01-02T03:04:05.000Z".into(),
            finished_at: Some("2026-01-02T03:05:37.000Z".into()),
            waiting_reason: None,
            outcome: Some(end.outcome()),
            reason: end.reason,
            blame: end.blame(),
            message: Some(end.message.clone()).filter(|message| !message.is_empty()),
            exit_code: Some(exit_code),
            exit_origin: Some(exit_origin),
            signal: end.signal,
            timings: Timings::default(),
            url: "http://farm/jobs/7".into(),
        }
    }

    #[test]
    fn every_end_has_a_line_that_says_why() {
        let failed =
            |exit_code, signal| End { reason: Some(Reason::ScriptFailure), exit_code, signal, message: String::new() };
        for (end, mark, text) in [
            (End::success(), "✓", "succeeded"),
            (failed(Some(7), None), "✗", "failed: the command exited 7"),
            (failed(None, Some(9)), "✗", "failed: the command was killed by signal 9"),
            (End::because(Reason::RunTimeout, ""), "⏱", "timed out: the command ran longer than it may"),
            (End::because(Reason::UserCanceled, ""), "⊘", "canceled: by a user"),
            (End::because(Reason::UserCanceled, "canceled"), "⊘", "canceled: by a user"),
            (End::because(Reason::UserCanceled, "canceled while it waited"), "⊘", "canceled while it waited"),
            (End::because(Reason::QueueExpired, ""), "!", "expired: no worker had a slot in time"),
            (End::because(Reason::WorkerLost, "m1 went silent"), "!", "not run to its end: m1 went silent"),
        ] {
            let verdict = verdict(&ended(&end));
            assert_eq!((verdict.mark, verdict.text.as_str(), verdict.took.as_deref()), (mark, text, Some("1m 32s")));
        }
        for reason in Reason::ALL {
            let verdict = verdict(&ended(&End::because(*reason, "")));
            assert_eq!(verdict.hint.is_some_and(|hint| hint.contains("farm's fault")), reason.blame() == Blame::Farm);
        }
    }

    #[test]
    fn the_log_is_printed_once_and_without_a_hole() {
        let mut place = LogPlace::default();
        let mut printed = Vec::new();
        for (attempt, offset, bytes) in [
            (1, 0, &b"hello "[..]),
            (1, 6, b"world\n"),
            (1, 6, b"world\n"),
            (1, 9, b"ld\nmore\n"),
            (2, 0, b"second\n"),
            (1, 17, b"late"),
            (2, 7, b"\xff\n"),
        ] {
            printed.extend_from_slice(&place.take(&LogFrame::new(attempt, offset, bytes)).unwrap());
        }
        assert_eq!(printed, b"hello world\nmore\nsecond\n\xff\n");
        assert!(place.take(&LogFrame::new(2, 100, b"x")).unwrap_err().contains("91 bytes"));
        let damaged = LogFrame { attempt: 2, offset: 9, text: None, base64: None };
        assert!(place.take(&damaged).is_err());
    }
}
