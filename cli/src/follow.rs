//! S: follows one job: its log to standard output, its fortunes to standard error, and the keyboard's wishes to the farm.

use std::future::{Future, pending};
use std::pin::{Pin, pin};

use alloy_shared::client::{ClientError, FeedItem};
use alloy_shared::env::backoff;
use alloy_shared::id::JobId;
use alloy_shared::wire::ErrorCode;
use alloy_shared::wire::job::{EventKind, FeedCursor, FeedFrame, JobEvent, JobView, LogFrame, Phase, StateWord};
use bytes::Bytes;
use indicatif::ProgressBar;
use tokio::sync::{mpsc, oneshot};

use crate::context::{App, Farm};
use crate::download::News;
use crate::output::{Failure, Fault, Sink};
use crate::signals::{Signals, Told};
use crate::verdict::words;

/// Between two tries of a cancel.
const CANCEL_AGAIN_MS: u64 = 500;
const CANCEL_AGAIN_CAP_MS: u64 = 2_000;
/// So long a cancel may still arrive when the follower is told to let go.
const LAST_WORD_MS: u64 = 5_000;
/// A job that starts at once is not worth a look at why it waits.
const FIRST_LOOK_MS: u64 = 400;
const LOOK_AGAIN_MS: u64 = 2_000;

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
    /// The job goes on without us. If it was to be canceled: whether the farm has heard so.
    Detached {
        cancel_heard: Option<bool>,
    },
    /// The farm ended under the job. Whoever opens it again follows on from here, see [`Follower::moved_to`].
    FarmGone,
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

/// How far a cancel is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cancel {
    NotAsked,
    OnItsWay,
    Heard,
}

/// A follower of one job.
pub(crate) struct Follower<'a> {
    app: &'a App,
    farm: Farm,
    id: JobId,
    on_interrupt: OnInterrupt,
    arrivals: Option<mpsc::Sender<News>>,
    /// None when standard output has every byte.
    sink: Option<Sink>,
    /// Bytes that standard output has not taken yet.
    unwritten: Option<Bytes>,
    /// What comes is thrown away.
    mute: bool,
    /// The newest event that was seen.
    event: u64,
    log: LogPlace,
    cancel: Cancel,
    cancel_answer: Answer<JobView>,
    look: Answer<JobView>,
    /// The worker's name is being asked for: its line comes before the output.
    naming: bool,
    reconnecting: bool,
    waiting: Option<ProgressBar>,
    waiting_reason: Option<String>,
    named_worker: bool,
    ended: Option<Box<JobView>>,
}

impl<'a> Follower<'a> {
    pub(crate) fn new(app: &'a App, farm: &Farm, id: JobId, on_interrupt: OnInterrupt) -> Result<Self, Failure> {
        let sink = Sink::stdout(&app.talk).map_err(|error| Failure::io("standard output", &error))?;
        Ok(Self {
            app,
            farm: farm.clone(),
            id,
            on_interrupt,
            arrivals: None,
            sink: Some(sink),
            unwritten: None,
            mute: false,
            event: 0,
            log: LogPlace::default(),
            cancel: Cancel::NotAsked,
            cancel_answer: None,
            look: None,
            naming: false,
            reconnecting: false,
            waiting: None,
            waiting_reason: None,
            named_worker: false,
            ended: None,
        })
    }

    /// Artifacts are announced here as they become ready.
    pub(crate) fn announce(&mut self, arrivals: Option<mpsc::Sender<News>>) {
        self.arrivals = arrivals;
    }

    /// The wish to stop came before the job had a name.
    pub(crate) fn already_told(&mut self) {
        self.told(Told::Interrupt);
    }

    /// The farm with the job is elsewhere: what was printed stays printed, and a cancel goes there.
    pub(crate) fn moved_to(&mut self, farm: &Farm) {
        self.farm = farm.clone();
        (self.look, self.naming, self.reconnecting) = (None, false, false);
        if self.cancel == Cancel::OnItsWay {
            self.send_cancel();
        }
    }

    /// Follows to the end, until told to let go, or until `farm_gone` says that nobody will answer any more. At the end,
    /// standard output has every byte.
    pub(crate) async fn run(
        &mut self,
        signals: &mut Signals,
        farm_gone: impl Future<Output = ()>,
    ) -> Result<Ending, Failure> {
        let cursor = FeedCursor { event: self.event, attempt: self.log.attempt, offset: self.log.offset };
        let mut feed = self.farm.client.feed(self.id, cursor);
        let mut farm_gone = pin!(farm_gone);
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
            let may_read = bytes.is_none() && !self.naming;
            let Some(sink) = &mut self.sink else { return Err(Failure::pipe()) };
            tokio::select! {
                biased;
                told = signals.next() => if self.told(told) {
                    break Ending::Detached { cancel_heard: self.last_word(signals).await };
                },
                result = answer(&mut self.cancel_answer) => self.canceled(result),
                result = answer(&mut self.look) => self.looked(result),
                outcome = sink.write(bytes.clone().unwrap_or_default()), if bytes.is_some() => {
                    self.unwritten = None;
                    self.written(outcome)?;
                }
                item = feed.recv(), if may_read => if let Err(failure) = self.item(item) {
                    return Err(self.left_alone(failure, signals).await);
                },
                () = &mut farm_gone => break Ending::FarmGone,
            }
        };
        self.stop_waiting();
        match ending {
            Ending::Ended(_) if !self.mute => {
                let Some(sink) = self.sink.take() else { return Ok(ending) };
                match signals.unless_told(sink.finish()).await? {
                    // The job is over: nothing is left to cancel, and its end is its own.
                    Err(failure) if failure.fault != Fault::Pipe => Err(failure),
                    Ok(()) | Err(_) => Ok(ending),
                }
            }
            Ending::Ended(_) | Ending::Detached { .. } | Ending::FarmGone => Ok(ending),
        }
    }

    /// A job that is being canceled is waited for even if its last words reach nobody: the terminal may be gone. One whose
    /// output cannot be written is canceled, as a reader's leaving ends any other program in a pipe: no machine works for
    /// nobody.
    fn written(&mut self, outcome: Result<(), Failure>) -> Result<(), Failure> {
        let Err(failure) = outcome else { return Ok(()) };
        if self.cancel == Cancel::NotAsked && self.on_interrupt == OnInterrupt::Detach {
            return Err(match failure.fault {
                Fault::Pipe => failure,
                _ => {
                    failure.hint(format!("alloy attach {0}   follows the job again; alloy cancel {0} ends it", self.id))
                }
            });
        }
        self.mute = true;
        let why = match failure.fault {
            Fault::Pipe => "Nobody reads standard output any more",
            _ => &failure.message,
        };
        self.ask_to_cancel(&format!("{why}: canceling {}…  (Ctrl-C to detach)", self.id));
        Ok(())
    }

    /// True when the follower shall let go.
    fn told(&mut self, told: Told) -> bool {
        match (self.on_interrupt, told) {
            (OnInterrupt::Detach, Told::Interrupt | Told::Terminate) => return true,
            (OnInterrupt::Cancel, Told::Interrupt) if self.cancel != Cancel::NotAsked => return true,
            (OnInterrupt::Cancel, Told::Interrupt | Told::Terminate) => {}
        }
        let again = if told == Told::Interrupt { "  (Ctrl-C again to detach)" } else { "" };
        self.ask_to_cancel(&format!("Canceling {}…{again}", self.id));
        false
    }

    fn ask_to_cancel(&mut self, say: &str) {
        if self.cancel == Cancel::NotAsked {
            self.send_cancel();
            self.stop_waiting();
            self.app.talk.say(say);
        }
    }

    /// Sends the cancel, again and again until it arrives: twice is once. In a task of its own: a terminal that stands still
    /// must not hold it up.
    fn send_cancel(&mut self) {
        self.cancel = Cancel::OnItsWay;
        let (client, id) = (self.farm.client.clone(), self.id);
        let (env, talk) = (self.app.env.clone(), self.app.talk.clone());
        let (tx, rx) = oneshot::channel();
        let work = async move {
            let mut tries = 0;
            let result = loop {
                match client.cancel(id).await {
                    Err(error) if !tx.is_closed() && may_arrive_later(&error) => {
                        if tries == 0 {
                            talk.warn("the farm has not heard the cancel: it is sent again until it arrives");
                        }
                        tries += 1;
                        let pause_ms = cancel_pause_ms(&error, tries, env.dice());
                        env.sleep_until(env.now().mono + pause_ms).await;
                    }
                    result => break result,
                }
            };
            // Nobody waits for the answer when the follower let go.
            let _ = tx.send(result);
        };
        self.app.env.spawn("cancel", Box::pin(work));
        self.cancel_answer = Some(Box::pin(async move {
            match rx.await {
                Ok(result) => result,
                Err(_) => Err(ClientError::protocol("the cancel ended early")),
            }
        }));
    }

    fn canceled(&mut self, result: Result<JobView, ClientError>) {
        match result {
            Ok(_) => self.cancel = Cancel::Heard,
            // It ended by itself in the meantime, which the feed tells.
            Err(ClientError::Problem(problem)) if problem.code == ErrorCode::InvalidTransition => {
                self.cancel = Cancel::Heard;
            }
            Err(error) => {
                let failure = Failure::of(error, &self.farm.url);
                self.app.talk.warn(&format!("the cancel did not arrive: {}", failure.message));
                // The next Ctrl-C tries again.
                self.cancel = Cancel::NotAsked;
            }
        }
    }

    /// Lets a cancel that is on its way arrive, for a moment, before the process ends with it.
    async fn last_word(&mut self, signals: &mut Signals) -> Option<bool> {
        if self.cancel == Cancel::NotAsked {
            return None;
        }
        if self.cancel == Cancel::OnItsWay {
            self.app
                .talk
                .say("The cancel is on its way; waiting a moment for the farm to hear it.  (Ctrl-C leaves at once)");
            let until = self.app.env.now().mono + LAST_WORD_MS;
            tokio::select! {
                biased;
                _ = signals.next() => {}
                result = answer(&mut self.cancel_answer) => self.canceled(result),
                () = self.app.env.sleep_until(until) => {}
            }
        }
        Some(self.cancel == Cancel::Heard)
    }

    /// Nothing more comes of the job. A cancel that is on its way arrives first, and what became of it is said.
    async fn left_alone(&mut self, failure: Failure, signals: &mut Signals) -> Failure {
        self.stop_waiting();
        if let Some(heard) = self.last_word(signals).await {
            self.app.tell_detached(self.id, Some(heard));
        }
        failure
    }

    fn item(&mut self, item: Option<Result<FeedItem, ClientError>>) -> Result<(), Failure> {
        match item {
            Some(Ok(FeedItem::Frame(frame))) => self.frame(frame),
            Some(Ok(FeedItem::Reconnecting { why, .. })) => {
                if !std::mem::replace(&mut self.reconnecting, true) {
                    self.stop_waiting();
                    self.app.talk.warn(&format!("reconnecting…  {why}"));
                }
                Ok(())
            }
            Some(Ok(FeedItem::Reconnected)) => {
                if std::mem::replace(&mut self.reconnecting, false) {
                    self.app.talk.say("reconnected, nothing is lost");
                }
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
            FeedFrame::Worker(news) => {
                self.stop_waiting();
                if news.silent { self.app.talk.warn(&news.message) } else { self.app.talk.say(&news.message) }
            }
            FeedFrame::End { job } => self.ended = Some(job),
        }
        Ok(())
    }

    fn event(&mut self, event: JobEvent) {
        self.event = event.seq;
        match event.kind {
            EventKind::Submitted => {
                if event.state == StateWord::Queued {
                    self.look_in(FIRST_LOOK_MS);
                }
            }
            EventKind::Assigned => {
                self.stop_waiting();
                self.named_worker = false;
                self.naming = !self.app.talk.json();
                self.look_in(0);
            }
            EventKind::Phase => {
                if let (Some(Phase::Executing), Some(how)) = (event.phase, event.message) {
                    self.stop_waiting();
                    self.app.talk.step("Started", &how);
                }
            }
            EventKind::Accepted | EventKind::Finished => {}
            EventKind::Artifact => {
                if let (Some(arrivals), Some(artifact)) = (&self.arrivals, event.artifact) {
                    // What does not fit is found in the list at the end.
                    let _ = arrivals.try_send(News::Announced(artifact));
                }
            }
            EventKind::CancelRequested => {
                if self.cancel == Cancel::NotAsked {
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
        let named = !std::mem::replace(&mut self.naming, false);
        let Ok(job) = result else { return };
        match job.state {
            StateWord::Queued => {
                self.show_waiting(job.waiting_reason.unwrap_or_else(|| "waiting for a free slot".to_owned()));
                self.look_in(LOOK_AGAIN_MS);
            }
            StateWord::Assigned | StateWord::Running => self.name_worker(job),
            // It was fast; its output still comes after the line that says where it ran.
            StateWord::Canceling
            | StateWord::Succeeded
            | StateWord::Failed
            | StateWord::TimedOut
            | StateWord::Canceled
            | StateWord::Expired
            | StateWord::Errored => {
                if !named {
                    self.name_worker(job);
                }
            }
        }
    }

    fn name_worker(&mut self, job: JobView) {
        if let Some(name) = job.worker_name.filter(|_| !self.named_worker) {
            self.named_worker = true;
            let image = job.spec.image.map_or(String::new(), |image| format!(" · {image}"));
            let again = if job.attempt > 1 { format!(" · attempt {}", job.attempt) } else { String::new() };
            self.app.talk.step("Running", &format!("on {name}{image}{again}"));
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

/// Until a cancel is sent again. Somebody waits for it, and the job goes on meanwhile: not even the farm puts it off for long.
fn cancel_pause_ms(error: &ClientError, tries: u32, dice: u64) -> u64 {
    let pause_ms = CANCEL_AGAIN_MS + backoff(tries, CANCEL_AGAIN_MS, CANCEL_AGAIN_CAP_MS, dice);
    pause_ms.max(error.retry_after_ms().min(CANCEL_AGAIN_CAP_MS))
}

/// True if the farm did not get it, or could not act on it for now.
fn may_arrive_later(error: &ClientError) -> bool {
    match error {
        ClientError::Unreachable { .. } => true,
        ClientError::Problem(problem) => problem.code.is_retryable(),
        ClientError::Protocol { .. } => false,
    }
}

impl App {
    /// The last words about a job that goes on without us.
    pub(crate) fn tell_detached(&self, id: JobId, cancel_heard: Option<bool>) {
        match cancel_heard {
            None => self.talk.say(&format!("Detached from {id}; it goes on.")),
            Some(true) => self.talk.say(&format!("Detached from {id}; the farm has heard the cancel.")),
            Some(false) => {
                self.talk.warn(&format!("detached from {id}; the farm has NOT heard the cancel"));
                self.talk.hint(&format!("alloy cancel {id}   cancels it when the farm is back"));
            }
        }
        self.talk.hint(&format!("alloy attach {id}   follows it again"));
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

#[cfg(test)]
mod tests {
    use alloy_shared::wire::Problem;

    use super::*;

    #[test]
    fn a_cancel_is_sent_again_soon_however_long_the_farm_wants_to_be_left_alone() {
        let later = |retry_after_s| {
            ClientError::Problem(Problem { retry_after_s, ..Problem::new(ErrorCode::Unavailable, "later") })
        };
        for (retry_after_s, least_ms) in [(None, CANCEL_AGAIN_MS), (Some(1), 1_000), (Some(u64::MAX), 2_000)] {
            for (tries, dice) in [(1, 0), (7, 1_234_567), (u32::MAX, u64::MAX)] {
                let pause_ms = cancel_pause_ms(&later(retry_after_s), tries, dice);
                let most_ms = CANCEL_AGAIN_MS + CANCEL_AGAIN_CAP_MS;
                assert!((least_ms..=most_ms).contains(&pause_ms), "{retry_after_s:?} {tries} {dice}: {pause_ms}");
            }
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
