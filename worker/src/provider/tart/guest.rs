//! S: a guest of a Tart VM: every act is a script, sent over the agent or, to images without one, over SSH.
//!
//! What a guest says is hostile input: every answer has a limit, every act of ours a deadline, its own or its caller's, and a
//! guest that is silent for too long under a command counts as lost.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use alloy_shared::env::{Env, Mono};
use alloy_shared::id::printable;
use alloy_shared::wire::source::check_path;
use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::listing::{self, INSIDE};
use super::says::GuestOs;
use super::script::{self, Job, Mark, Part, READER, Unmark, quote};
use super::ssh::Ssh;
use crate::artifacts::Matcher;
use crate::provider::agent::{self, Said};
use crate::provider::blocking::blocking;
use crate::provider::{
    ArtifactRule, BootTimes, Command, Exec, ExecInput, ExecOutput, Exit, Guest, Listing, Run, Signal, VmError, VmFault,
};

#[cfg(test)]
mod following;
#[cfg(test)]
mod waiting;

/// Chunks between the guest and the spool.
const CHUNKS: usize = 64;
/// What one of our own acts may answer.
const ANSWER_MAX: usize = 64 << 10;
/// What the list of a workspace may be long.
const LIST_MAX: usize = 64 << 20;
/// How often a guest with a command is asked whether it lives, and how long it has to say so.
const PULSE_MS: u64 = 20_000;
const SILENCE: Duration = Duration::from_secs(60);
const SIGNAL: Duration = Duration::from_secs(10);

/// The way to a guest's shell.
#[derive(Debug, Clone)]
pub(super) enum Way {
    /// The agent behind this socket.
    Agent(PathBuf),
    Ssh(Ssh),
}

/// What a guest said of itself when it was ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct About {
    pub(super) os: GuestOs,
    pub(super) user: String,
    pub(super) home: String,
    pub(super) path: String,
    pub(super) tmp: String,
    /// Where it sees the inbox.
    pub(super) inbox: String,
}

pub(super) struct TartGuest {
    pub(super) env: Arc<dyn Env>,
    pub(super) way: Way,
    pub(super) about: About,
    pub(super) workspace: String,
    /// Why the VM is no more, once it is not.
    pub(super) ended: watch::Receiver<Option<VmError>>,
    pub(super) commands: AtomicU32,
    pub(super) booted: BootTimes,
}

/// A script that runs in a guest. Dropping it ends the stream, and with it the script.
struct Running {
    said: mpsc::Receiver<Said>,
    unmark: Unmark,
    /// To be told once the last bytes were.
    lost: Option<VmError>,
    _stop: DropGuard,
}

/// The next of what a script wrote.
enum Next {
    Bytes(Bytes),
    End(Bytes, i32),
    Lost(VmError),
}

impl Running {
    async fn next(&mut self) -> Next {
        if let Some(error) = self.lost.take() {
            return Next::Lost(error);
        }
        let error = match self.said.recv().await {
            Some(Said::Bytes(chunk)) => match self.unmark.push(chunk) {
                Part::Bytes(bytes) => return Next::Bytes(bytes),
                Part::End(bytes, status) => return Next::End(bytes, status),
                Part::Torn => lost("the guest's output is torn"),
            },
            // A stream that ends before its mark has not run to its end, whatever status it gives.
            Some(Said::Exit(code)) => lost(&format!("the guest's shell ended with {code} before its command")),
            Some(Said::Lost(error)) => error,
            None => lost("the way to the guest closed"),
        };
        let rest = self.unmark.rest();
        if rest.is_empty() {
            return Next::Lost(error);
        }
        self.lost = Some(error);
        Next::Bytes(rest)
    }
}

impl Way {
    fn run(&self, env: &Arc<dyn Env>, script: Bytes, mark: Mark) -> Running {
        let (said, hears) = mpsc::channel(CHUNKS);
        let stop = CancellationToken::new();
        let (way, ends) = (self.clone(), stop.clone());
        env.spawn(
            "guest_script",
            Box::pin(async move {
                match way {
                    Self::Agent(socket) => agent::exec(&socket, &READER, script, said, ends).await,
                    Self::Ssh(ssh) => ssh.exec(script, said, ends).await,
                }
            }),
        );
        Running { said: hears, unmark: Unmark::new(mark), lost: None, _stop: stop.drop_guard() }
    }

    /// Runs our own steps and returns their status and what they wrote.
    pub(super) async fn ask(
        &self,
        env: &Arc<dyn Env>,
        steps: &str,
        most: usize,
        within: Duration,
    ) -> Result<(i32, Vec<u8>), VmError> {
        let answer = tokio::time::timeout(within, self.hear(env, steps, most)).await;
        answer.unwrap_or_else(|_late| Err(lost("the guest does not answer")))
    }

    /// Like [`Way::ask`], for as long as the caller waits.
    async fn hear(&self, env: &Arc<dyn Env>, steps: &str, most: usize) -> Result<(i32, Vec<u8>), VmError> {
        let mark = Mark::new(env.dice());
        let mut running = self.run(env, script::steps(steps, &mark), mark);
        let mut said = Vec::new();
        loop {
            match running.next().await {
                Next::Bytes(bytes) => said.extend_from_slice(&bytes),
                Next::End(bytes, status) => {
                    said.extend_from_slice(&bytes);
                    return Ok((status, said));
                }
                Next::Lost(error) => return Err(error),
            }
            if said.len() > most {
                return Err(VmError::user(VmFault::File, "the guest says too much"));
            }
        }
    }
}

impl TartGuest {
    /// How long it takes is the job's doing: its stage has the deadline.
    async fn must(&self, doing: &str, steps: &str) -> Result<Vec<u8>, VmError> {
        let (status, said) = self.way.hear(&self.env, steps, LIST_MAX).await?;
        match status {
            0 => Ok(said),
            _ => Err(refused(doing, status, &said)),
        }
    }

    /// Our own steps, for whoever prepares the guest.
    pub(super) async fn ask(&self, steps: &str, within: Duration) -> Result<(i32, Vec<u8>), VmError> {
        self.way.ask(&self.env, steps, ANSWER_MAX, within).await
    }

    fn environment(&self, command: &Command) -> Vec<(String, String)> {
        let own = [
            ("HOME", &self.about.home),
            ("USER", &self.about.user),
            ("PATH", &self.about.path),
            ("TMPDIR", &self.about.tmp),
        ];
        let named = |name: &str| command.env.contains_key(name);
        let own =
            own.into_iter().filter(|(name, _)| !named(name)).map(|(name, value)| (name.to_owned(), value.clone()));
        own.chain(command.env.iter().map(|(name, value)| (name.clone(), value.clone()))).collect()
    }

    fn argv(&self, run: &Run) -> Vec<String> {
        let shell: &[&str] = match self.about.os {
            // A login shell, because that is where PATH is set up for developers.
            GuestOs::Mac => &["/bin/zsh", "-lc"],
            GuestOs::Linux => &["/bin/sh", "-c"],
        };
        match run {
            Run::Argv(argv) => argv.clone(),
            Run::Shell(line) => shell.iter().map(|word| (*word).to_owned()).chain([line.clone()]).collect(),
        }
    }
}

#[async_trait]
impl Guest for TartGuest {
    fn workspace(&self) -> &str {
        &self.workspace
    }

    async fn unpack(&self, tar: &str, into: &str) -> Result<(), VmError> {
        let tar = quote(&format!("{}/{tar}", self.about.inbox));
        let into = quote(&below(&self.workspace, into)?);
        self.must("unpack the sources", &format!("mkdir -p {into} && tar -xpf {tar} -C {into}")).await.map(|_said| ())
    }

    async fn exec(&self, command: &Command) -> Result<Exec, VmError> {
        let number = self.commands.fetch_add(1, Ordering::Relaxed);
        let group = format!("{}/.alloy/group-{number}", self.about.home);
        let (argv, env) = (self.argv(&command.run), self.environment(command));
        let dir = below(&self.workspace, &command.workdir)?;
        let mark = Mark::new(self.env.dice());
        let script = script::job(&Job { argv: &argv, env: &env, dir: &dir, group: &group }, &mark);
        let running = self.way.run(&self.env, script, mark);
        let (input, orders) = mpsc::channel(4);
        let (bytes, output) = mpsc::channel(CHUNKS);
        let follower = Follower {
            env: Arc::clone(&self.env),
            way: self.way.clone(),
            group,
            running,
            orders,
            output: bytes,
            ended: self.ended.clone(),
        };
        self.env.spawn("guest_exec", Box::pin(follower.follow()));
        Ok(Exec { input, output })
    }

    async fn read(&self, path: &str, limit: u64) -> Result<mpsc::Receiver<Bytes>, VmError> {
        below(&self.workspace, path)?;
        let (workspace, file) = (quote(&self.workspace), quote(&format!("./{path}")));
        let mark = Mark::new(self.env.dice());
        let steps = format!(
            "{INSIDE}cd {workspace} && inside {file} && [ -f {file} ] && [ ! -L {file} ] && head -c {limit} {file} 2>/dev/null"
        );
        let mut running = self.way.run(&self.env, script::steps(&steps, &mark), mark);
        let (tx, rx) = mpsc::channel(CHUNKS);
        self.env.spawn(
            "guest_read",
            Box::pin(async move {
                loop {
                    let (bytes, more) = match running.next().await {
                        Next::Bytes(bytes) => (bytes, true),
                        Next::End(bytes, 0) => (bytes, false),
                        // A short stream is how the reader learns of it.
                        Next::End(..) | Next::Lost(_) => return,
                    };
                    if !bytes.is_empty() && tx.send(bytes).await.is_err() || !more {
                        return;
                    }
                }
            }),
        );
        Ok(rx)
    }

    fn boot_times(&self) -> BootTimes {
        self.booted
    }

    async fn ended(&self) -> VmError {
        gone(&mut self.ended.clone()).await
    }

    async fn list(&self, rules: &[ArtifactRule]) -> Result<Listing, VmError> {
        let matcher = Matcher::new(rules).map_err(|error| VmError::user(VmFault::File, error.to_string()))?;
        let said = self.must("list the workspace", &listing::script(&self.workspace, &matcher)).await?;
        read_listing(said, matcher).await
    }
}

/// Reads a list on a thread of its own, which leaves it soon after nobody waits for it any more.
async fn read_listing(said: Vec<u8>, matcher: Matcher) -> Result<Listing, VmError> {
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let _while_waited_for = stop.drop_guard();
    blocking(move || listing::parse(&said, &matcher, || stopped.is_cancelled())).await
}

/// A path of the workspace, as the guest sees it.
fn below(workspace: &str, path: &str) -> Result<String, VmError> {
    if path.is_empty() {
        return Ok(workspace.to_owned());
    }
    check_path(path).map_err(|error| VmError::user(VmFault::File, error.to_string()))?;
    Ok(format!("{workspace}/{path}"))
}

fn lost(why: &str) -> VmError {
    VmError::farm(VmFault::Lost, why)
}

fn refused(doing: &str, status: i32, said: &[u8]) -> VmError {
    let said = String::from_utf8_lossy(said);
    let last = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
    let what = if last.contains("No space left") { VmFault::Disk } else { VmFault::File };
    VmError::farm(what, format!("{doing}: {} (status {status})", printable(last)))
}

/// Passes a command's output on, sends it signals, and watches whether its guest lives.
struct Follower {
    env: Arc<dyn Env>,
    way: Way,
    group: String,
    running: Running,
    orders: mpsc::Receiver<ExecInput>,
    output: mpsc::Sender<ExecOutput>,
    ended: watch::Receiver<Option<VmError>>,
}

impl Follower {
    async fn follow(mut self) {
        let (rest, last) = self.run().await;
        if rest.is_empty() || self.output.send(ExecOutput::Bytes(rest)).await.is_ok() {
            let _nobody_asks = self.output.send(last).await;
        }
    }

    /// Returns the last that it wrote, and how it ended.
    async fn run(&mut self) -> (Bytes, ExecOutput) {
        let pulse = pulse(Arc::clone(&self.env), self.way.clone());
        tokio::pin!(pulse);
        // One chunk waits for its room in here, not behind a send: whoever holds the output back still gives orders. The
        // news that the VM is gone needs room as well, and comes after all that was printed.
        let mut waiting = Bytes::new();
        loop {
            tokio::select! {
                biased;
                order = self.orders.recv() => match order {
                    Some(ExecInput::Signal(signal)) => self.signal(signal),
                    None => return (Bytes::new(), self.left("nobody follows the command")),
                },
                room = self.output.reserve(), if !waiting.is_empty() => match room {
                    Ok(room) => room.send(ExecOutput::Bytes(std::mem::take(&mut waiting))),
                    Err(_closed) => return (Bytes::new(), self.left("nobody reads the command's output")),
                },
                next = self.running.next(), if waiting.is_empty() => match next {
                    Next::Bytes(bytes) => waiting = bytes,
                    Next::End(bytes, status) => return (bytes, ExecOutput::Exit(Exit::Code(status))),
                    // The VM's own end says more than a stream that broke off.
                    Next::Lost(error) => {
                        let error = why_lost(&mut self.ended, error).await;
                        return (Bytes::new(), ExecOutput::Lost(under_a_command(error)));
                    }
                },
                error = gone(&mut self.ended), if waiting.is_empty() => {
                    return (Bytes::new(), ExecOutput::Lost(under_a_command(error)));
                }
                error = &mut pulse, if waiting.is_empty() => return (Bytes::new(), ExecOutput::Lost(error)),
            }
        }
    }

    /// The end of the stream ends the script, not what it started.
    fn left(&self, why: &str) -> ExecOutput {
        self.signal(Signal::Kill);
        ExecOutput::Lost(lost(why))
    }

    fn signal(&self, signal: Signal) {
        let (env, way) = (Arc::clone(&self.env), self.way.clone());
        let steps = script::signal(&self.group, signal);
        self.env.spawn(
            "guest_signal",
            Box::pin(async move {
                if let Err(error) = way.ask(&env, &steps, ANSWER_MAX, SIGNAL).await {
                    tracing::warn!(%error, ?signal, "a command could not be told to stop");
                }
            }),
        );
    }
}

pub(super) async fn gone(ended: &mut watch::Receiver<Option<VmError>>) -> VmError {
    match ended.wait_for(Option::is_some).await {
        Ok(error) => error.clone().unwrap_or_else(|| lost("the VM ended")),
        Err(_closed) => lost("nobody watches the VM"),
    }
}

/// A VM that ran well enough for a command says nothing about its host by its end.
fn under_a_command(error: VmError) -> VmError {
    match error.what {
        VmFault::Fenced => error,
        _ => VmError { what: VmFault::Lost, ..error },
    }
}

/// A stream that breaks is often the first sign of a VM's end, whose words come a moment later.
async fn why_lost(ended: &mut watch::Receiver<Option<VmError>>, error: VmError) -> VmError {
    tokio::time::timeout(Duration::from_secs(1), gone(ended)).await.unwrap_or(error)
}

/// Returns when the guest has not answered for too long.
async fn pulse(env: Arc<dyn Env>, way: Way) -> VmError {
    loop {
        let next: Mono = env.now().mono + PULSE_MS;
        env.sleep_until(next).await;
        if let Err(error) = way.ask(&env, ":", ANSWER_MAX, SILENCE).await {
            return VmError::farm(VmFault::Lost, format!("the guest is silent: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_kept_back_for_the_end_comes_before_the_news_that_there_is_none() {
        let (says, said) = mpsc::channel(2);
        let unmark = Unmark::new(Mark::new(7));
        let mut running = Running { said, unmark, lost: None, _stop: CancellationToken::new().drop_guard() };
        says.send(Said::Bytes(Bytes::from_static(b"so far\x1ealloy-end-"))).await.unwrap();
        says.send(Said::Lost(lost("gone"))).await.unwrap();
        let mut bytes = Vec::new();
        let error = loop {
            match running.next().await {
                Next::Bytes(part) => bytes.extend_from_slice(&part),
                Next::End(..) => panic!("it has no end"),
                Next::Lost(error) => break error,
            }
        };
        assert_eq!((&*bytes, error), (&b"so far\x1ealloy-end-"[..], lost("gone")));
    }

    #[test]
    fn a_list_is_read_away_from_the_runtime() {
        let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).build().unwrap();
        runtime.block_on(async {
            let matcher = || Matcher::new(&crate::artifacts::parse(&["**".to_owned()]).unwrap()).unwrap();
            let listing = read_listing(b"f 1 644 ./x\0".to_vec(), matcher()).await.unwrap();
            assert_eq!(listing.files[0].path, "x");
            // The one thread for such work is busy.
            let (go, wait) = std::sync::mpsc::channel::<()>();
            let busy = tokio::task::spawn_blocking(move || wait.recv());
            let mut read = Box::pin(read_listing(b"f 1 644 ./x\0".to_vec(), matcher()));
            assert!(futures_util::poll!(&mut read).is_pending());
            drop(read);
            go.send(()).unwrap();
            busy.await.unwrap().unwrap();
        });
    }
}
