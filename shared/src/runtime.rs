//! S: what a daemon stands on: the system's clock, dice and tasks, the two-stage stop, and log output.

use std::io::IsTerminal as _;
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use nix::time::{ClockId, clock_gettime};
use rand::TryRng as _;
use rand::rngs::SysRng;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

use crate::env::{Env, Mono, Ms, Now};

/// After the hard stop tasks have this long to let go; then they are dropped.
const HARD_STOP_MS: u64 = 10_000;
/// A wall clock that steps back by less than this stands still for as long; a larger step is a correction.
const STEP_BACK_MAX_MS: i64 = 60_000;

/// The variable that chooses what is logged, in the form `info,orchestrator=debug`.
pub const LOG_VARIABLE: &str = "ALLOY_LOG";

/// How a daemon ends. The first signal stops it softly: take nothing new, finish what is held. The second one, or the
/// time-out, stops it hard: let go of everything. A task that panics stops it softly and makes it a failure.
#[derive(Debug, Clone, Default)]
pub struct Lifecycle {
    pub soft: CancellationToken,
    pub hard: CancellationToken,
    /// Every task that the end waits for.
    pub tracker: TaskTracker,
    /// Tasks are dropped.
    gone: CancellationToken,
    failed: Arc<AtomicBool>,
}

impl Lifecycle {
    /// A life without signals, for a daemon inside another program. Its owner cancels `soft` and `hard`.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets SIGTERM and SIGINT stop this life.
    pub fn install_signals(&self) -> std::io::Result<()> {
        let mut term = signal(SignalKind::terminate())?;
        let mut int = signal(SignalKind::interrupt())?;
        let life = self.clone();
        // Outside the tracker: the end does not wait for further signals.
        start(async move {
            loop {
                let name = tokio::select! {
                    biased;
                    () = life.gone.cancelled() => return,
                    Some(()) = term.recv() => "SIGTERM",
                    Some(()) = int.recv() => "SIGINT",
                    else => return,
                };
                life.signal(name);
            }
        });
        Ok(())
    }

    fn signal(&self, name: &str) {
        if self.soft.is_cancelled() {
            tracing::warn!("{name} again: stopping at once");
            self.hard.cancel();
        } else {
            tracing::info!("{name}: finishing what is held, taking nothing new");
            self.soft.cancel();
        }
    }

    /// Stops softly and ends as a failure.
    pub fn fail(&self) {
        self.failed.store(true, Ordering::Relaxed);
        self.soft.cancel();
    }

    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// Waits for the stop, then `grace_ms` for the tasks, then stops hard. Afterwards no task runs any more.
    pub async fn wait(self, grace_ms: u64) -> ExitCode {
        tokio::select! {
            biased;
            () = self.hard.cancelled() => self.soft.cancel(),
            () = self.soft.cancelled() => {}
        }
        self.tracker.close();
        let late = tokio::select! {
            biased;
            () = self.tracker.wait() => false,
            () = self.hard.cancelled() => false,
            () = tokio::time::sleep(Duration::from_millis(grace_ms)) => true,
        };
        if late {
            tracing::warn!(
                tasks = self.tracker.len(),
                "tasks still run {grace_ms} ms after the stop; stopping at once"
            );
        }
        self.hard.cancel();
        if tokio::time::timeout(Duration::from_millis(HARD_STOP_MS), self.tracker.wait()).await.is_err() {
            tracing::warn!(tasks = self.tracker.len(), "tasks do not end by themselves and are dropped");
        }
        self.gone.cancel();
        self.tracker.wait().await;
        if self.has_failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
    }
}

/// Starts a task that nobody tracks.
#[allow(clippy::disallowed_methods, reason = "the one place below `Env` and `Lifecycle`")]
fn start(task: impl Future<Output = ()> + Send + 'static) {
    drop(tokio::spawn(task));
}

/// The clock that goes on while the machine sleeps: a lease does, too.
#[cfg(target_os = "linux")]
const CLOCK: ClockId = ClockId::CLOCK_BOOTTIME;
#[cfg(not(target_os = "linux"))]
const CLOCK: ClockId = ClockId::CLOCK_MONOTONIC;
/// Timers stand still while the machine sleeps, so a long wait looks at the clock in between: it is late by this at most.
const WAIT_SLICE: Duration = Duration::from_secs(10);

/// Monotonic time since some moment of this machine's, sleep included.
///
/// # Panics
/// If the operating system has no such clock.
pub fn uptime() -> Duration {
    match clock_gettime(CLOCK) {
        Ok(time) => time.into(),
        Err(error) => panic!("the operating system does not tell the time: {error}"),
    }
}

/// Time, dice and tasks of this machine.
#[derive(Debug)]
pub struct SystemEnv {
    life: Lifecycle,
    origin: Duration,
    last_wall: AtomicI64,
}

impl SystemEnv {
    pub fn new(lifecycle: Lifecycle) -> Self {
        Self { life: lifecycle, origin: uptime(), last_wall: AtomicI64::new(i64::MIN) }
    }

    /// For a command that has no stop of its own: tasks end with the process.
    pub fn detached() -> Self {
        Self::new(Lifecycle::new())
    }
}

#[async_trait]
impl Env for SystemEnv {
    #[allow(clippy::disallowed_methods, reason = "the one place that reads the clocks")]
    fn now(&self) -> Now {
        let wall = match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(since) => i64::try_from(since.as_millis()).unwrap_or(i64::MAX),
            Err(_) => 0,
        };
        let mut shown = wall;
        let update = |last| {
            shown = settle(last, wall);
            Some(shown)
        };
        // The update always gives a value, so this cannot fail.
        let _ = self.last_wall.fetch_update(Ordering::Relaxed, Ordering::Relaxed, update);
        let mono = u64::try_from(uptime().saturating_sub(self.origin).as_millis()).unwrap_or(u64::MAX);
        Now { wall: Ms(shown), mono: Mono(mono) }
    }

    async fn sleep_until(&self, at: Mono) {
        if at == Mono(u64::MAX) {
            return std::future::pending().await;
        }
        let at = self.origin.saturating_add(Duration::from_millis(at.0));
        loop {
            let left = at.saturating_sub(uptime());
            tokio::time::sleep(left.min(WAIT_SLICE)).await;
            if uptime() >= at {
                return;
            }
        }
    }

    fn spawn(&self, name: &'static str, task: BoxFuture<'static, ()>) {
        let life = self.life.clone();
        let guarded = async move {
            let done = tokio::select! {
                biased;
                () = life.gone.cancelled() => return,
                done = AssertUnwindSafe(task).catch_unwind() => done,
            };
            if let Err(panic) = done {
                life.fail();
                tracing::error!("task {name} panicked: {}; stopping", panic_text(&*panic));
            }
        };
        start(self.life.tracker.track_future(guarded.instrument(tracing::info_span!("task", task.name = name))));
    }

    #[allow(clippy::disallowed_methods, reason = "the one place that throws dice")]
    fn dice(&self) -> u64 {
        rand::Rng::next_u64(&mut rand::rng())
    }
}

/// The wall time to show: small steps back are waited out, so that stamps of one process keep their order.
fn settle(last: i64, read: i64) -> i64 {
    if read < last && last.saturating_sub(read) < STEP_BACK_MAX_MS { last } else { read }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (None, Some(text)) => text,
        (None, None) => "no message",
    }
}

/// Random bytes from the operating system, for keys and tokens.
///
/// # Panics
/// If the operating system has none to give: nothing that needs them can go on safely.
pub fn random_bytes<const N: usize>() -> [u8; N] {
    let mut out = [0; N];
    match SysRng.try_fill_bytes(&mut out) {
        Ok(()) => out,
        Err(error) => panic!("the operating system gives no random bytes: {error}"),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Several lines an event, for a developer.
    Pretty,
    /// One JSON object an event, for a machine.
    Json,
    /// One line an event, for a person.
    Compact,
}

impl std::str::FromStr for LogFormat {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "pretty" => Ok(Self::Pretty),
            "json" => Ok(Self::Json),
            "compact" => Ok(Self::Compact),
            _ => Err("is one of pretty json compact".to_owned()),
        }
    }
}

/// Sends log events to stderr. `ALLOY_LOG` says which, `default_level` if it is not set. Called once a process.
pub fn telemetry(format: LogFormat, default_level: &str) -> Result<(), String> {
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|off| off.is_empty());
    telemetry_to(format, default_level, BoxMakeWriter::new(std::io::stderr), colours)
}

/// The same into a file that bounds itself.
pub fn telemetry_into(
    format: LogFormat,
    default_level: &str,
    file: Box<dyn std::io::Write + Send>,
) -> Result<(), String> {
    telemetry_to(format, default_level, BoxMakeWriter::new(Mutex::new(file)), false)
}

fn telemetry_to(format: LogFormat, default_level: &str, to: BoxMakeWriter, colours: bool) -> Result<(), String> {
    let wanted = std::env::var(LOG_VARIABLE).ok().filter(|text| !text.is_empty());
    let text = wanted.as_deref().unwrap_or(default_level);
    let filter = EnvFilter::try_new(text).map_err(|error| format!("{LOG_VARIABLE}: `{text}`: {error}"))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(to)
        .with_ansi(colours)
        // A terminal that has gone, a full disk: what cannot be logged is lost, and nothing else is.
        .log_internal_errors(false);
    let done = match format {
        LogFormat::Pretty => log.pretty().try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
        LogFormat::Compact => log.compact().try_init(),
    };
    done.map_err(|error| format!("log output: {error}"))
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    fn shown(code: ExitCode) -> String {
        format!("{code:?}")
    }

    #[tokio::test]
    async fn a_soft_stop_waits_for_tasks_and_succeeds() {
        let life = Lifecycle::new();
        let env = SystemEnv::new(life.clone());
        let (go, gone) = oneshot::channel::<()>();
        let (done, was_done) = oneshot::channel();
        let soft = life.soft.clone();
        env.spawn(
            "worker",
            Box::pin(async move {
                soft.cancelled().await;
                gone.await.unwrap();
                done.send(()).unwrap();
            }),
        );
        let end = life.clone().wait(60_000);
        life.signal("first");
        assert!(!life.hard.is_cancelled());
        go.send(()).unwrap();
        assert_eq!(shown(end.await), shown(ExitCode::SUCCESS));
        was_done.await.unwrap();
    }

    #[tokio::test]
    async fn a_second_signal_or_the_time_out_is_the_hard_stop() {
        for (signals, grace_ms) in [(2, 600_000), (1, 0)] {
            let life = Lifecycle::new();
            let env = SystemEnv::new(life.clone());
            let hard = life.hard.clone();
            env.spawn("worker", Box::pin(async move { hard.cancelled().await }));
            for _ in 0..signals {
                life.signal("signal");
            }
            assert_eq!(life.hard.is_cancelled(), signals == 2);
            assert_eq!(shown(life.clone().wait(grace_ms).await), shown(ExitCode::SUCCESS));
            assert!(life.tracker.is_empty() && life.hard.is_cancelled());
        }
    }

    #[tokio::test]
    async fn a_task_that_panics_stops_the_daemon_as_a_failure() {
        let life = Lifecycle::new();
        SystemEnv::new(life.clone()).spawn("clumsy", Box::pin(async { panic!("dropped it") }));
        assert_eq!(shown(life.clone().wait(60_000).await), shown(ExitCode::FAILURE));
        assert!(life.soft.is_cancelled() && life.has_failed());
    }

    #[test]
    fn small_steps_back_of_the_wall_clock_are_not_shown() {
        for (last, read, show) in [
            (i64::MIN, 5, 5),
            (1_000, 1_001, 1_001),
            (1_000, 1_000, 1_000),
            (1_000, 400, 1_000),
            (100_000, 40_001, 100_000),
            (100_000, 40_000, 40_000),
        ] {
            assert_eq!(settle(last, read), show, "{last} {read}");
        }
    }

    #[test]
    fn random_bytes_differ() {
        assert_ne!(random_bytes::<32>(), random_bytes::<32>());
    }

    #[tokio::test]
    async fn a_sleep_ends_at_its_time_on_the_same_clock() {
        let env = SystemEnv::detached();
        let at = env.now().mono + 3;
        env.sleep_until(at).await;
        assert!(env.now().mono >= at);
    }
}
