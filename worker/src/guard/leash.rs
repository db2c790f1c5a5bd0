//! S: the daemon's end of a guard: starts it, hands it a command, passes on signals and fences, reads log and end.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use alloy_shared::env::{Env, Mono};
use alloy_shared::limits::LOG_CHUNK_MAX;
use bytes::BytesMut;
use nix::sys::signal::{Signal as Number, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::unix::pipe;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{Launch, Order, SUBCOMMAND, Word};
use crate::provider::{ExecInput, ExecOutput, Signal, VmError, VmFault};

#[cfg(test)]
mod tests;

/// Taken from a command's pipe at once: a flood costs few calls.
pub const READ_MAX: usize = 4 * LOG_CHUNK_MAX;
/// A chunk's buffer is replaced when it has less room than this.
const ROOM_MIN: usize = 8 << 10;
/// A guard whose leash is cut has this long to end. After that it goes on killing alone, and the VM counts as not destroyed.
const GUARD_END: Duration = Duration::from_secs(15);

/// A guard that waits for its command.
pub struct Leash {
    child: Child,
    stdin: ChildStdin,
    words: Lines<BufReader<ChildStdout>>,
    log: pipe::Receiver,
    record: PathBuf,
}

/// What a running command is connected to.
pub struct Wires {
    pub env: Arc<dyn Env>,
    /// When the guard must kill by itself; the end of time while no lease runs.
    pub fence: watch::Receiver<Mono>,
    /// The VM is being destroyed.
    pub doom: CancellationToken,
    pub input: mpsc::Receiver<ExecInput>,
    pub output: mpsc::Sender<ExecOutput>,
}

impl Leash {
    /// Starts `program __guard RECORD`. It does nothing until [`Leash::run`].
    pub fn start(program: &Path, record: PathBuf) -> std::io::Result<Self> {
        let (read, write) = std::io::pipe()?;
        widen(&read);
        let mut child = Command::new(program)
            .arg(SUBCOMMAND)
            .arg(&record)
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::from(write))
            .spawn()?;
        let gone = || std::io::Error::other("a guard without pipes");
        let stdin = child.stdin.take().ok_or_else(gone)?;
        let words = BufReader::new(child.stdout.take().ok_or_else(gone)?).lines();
        Ok(Self { child, stdin, words, log: pipe::Receiver::from_owned_fd(read.into())?, record })
    }

    /// True while the guard process lives.
    pub fn lives(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Lets go of a guard that never got a command.
    pub async fn drop_unused(self) {
        let Self { mut child, stdin, words, log, record } = self;
        drop((stdin, words, log));
        end_of(&mut child, &record).await;
    }

    /// Runs one command to its end. Nobody listening, a cut input or doom kill it.
    pub async fn run(mut self, launch: Launch, mut wires: Wires) {
        let mut told = Told::default();
        let order = Order::Run(launch);
        // The fence goes first: a daemon that dies between the two leaves no command without one.
        let fence = *wires.fence.borrow_and_update();
        let fenced = match fence {
            Mono(u64::MAX) => Ok(()),
            at => tell(&mut self.stdin, &Order::Fence { within_ms: at.since(wires.env.now().mono) }).await,
        };
        if fenced.is_ok() && tell(&mut self.stdin, &order).await.is_ok() {
            self.follow(&mut wires, &mut told).await;
        }
        let Self { mut child, stdin, log, record, words } = self;
        drop((stdin, words));
        let clean = end_of(&mut child, &record).await && told.end.is_some();
        if let (false, Some(pid)) = (clean, told.pid) {
            // The guard was killed: what it guarded is ours to kill. Its orphans are found when the VM is destroyed.
            let _gone = killpg(Pid::from_raw(pid), Number::SIGKILL);
        }
        drain(log, &wires.output).await;
        let silent = || ExecOutput::Lost(VmError::farm(VmFault::Lost, "the command's guard ended without a word"));
        let last = told.end.unwrap_or_else(silent);
        let _nobody_asks = wires.output.send(last).await;
    }

    async fn follow(&mut self, wires: &mut Wires, told: &mut Told) {
        let mut buffer = BytesMut::new();
        let (mut reading, mut fenced) = (true, true);
        loop {
            let order = tokio::select! {
                biased;
                () = wires.doom.cancelled() => return,
                input = wires.input.recv() => match input {
                    Some(ExecInput::Signal(Signal::Term)) => Order::Term,
                    Some(ExecInput::Signal(Signal::Kill)) => Order::Kill,
                    None => return,
                },
                moved = wires.fence.changed(), if fenced => {
                    let at = *wires.fence.borrow_and_update();
                    match (moved, at) {
                        (Ok(()), Mono(u64::MAX)) => continue,
                        (Ok(()), at) => Order::Fence { within_ms: at.since(wires.env.now().mono) },
                        // The daemon's wiring is gone: the last fence stands.
                        (Err(_), _) => { fenced = false; continue }
                    }
                }
                word = self.words.next_line() => match word.ok().flatten().and_then(|line| serde_json::from_str(&line).ok()) {
                    Some(word) => { told.hear(word); continue }
                    None => return,
                },
                more = pass_on(&mut self.log, &mut buffer, &wires.output), if reading => {
                    match more {
                        Passed::Bytes => {}
                        Passed::End => reading = false,
                        Passed::Deaf => return,
                    }
                    continue;
                }
            };
            if tell(&mut self.stdin, &order).await.is_err() {
                return self.hear_out(told).await;
            }
        }
    }

    /// Takes what a guard that has ended said before: a deaf guard is not a silent one.
    async fn hear_out(&mut self, told: &mut Told) {
        let words = async {
            while let Ok(Some(line)) = self.words.next_line().await {
                match serde_json::from_str(&line) {
                    Ok(word) => told.hear(word),
                    Err(_) => return,
                }
            }
        };
        // Its pipe ends with it. One that only stopped listening is ended by the caller.
        let _late = tokio::time::timeout(GUARD_END, words).await;
    }
}

#[derive(Default)]
struct Told {
    pid: Option<i32>,
    end: Option<ExecOutput>,
}

impl Told {
    fn hear(&mut self, word: Word) {
        match word {
            Word::Started { pid } => self.pid = Some(pid),
            Word::Exited(exit) => self.end = Some(ExecOutput::Exit(exit)),
            Word::Fenced => self.end = Some(ExecOutput::Lost(VmError::fenced())),
        }
    }
}

enum Passed {
    Bytes,
    End,
    Deaf,
}

/// Takes what the pipe holds, at most `READ_MAX`, and passes it on; waits for room first, so that bytes stay in the pipe.
async fn pass_on(log: &mut pipe::Receiver, buffer: &mut BytesMut, output: &mpsc::Sender<ExecOutput>) -> Passed {
    let Ok(room) = output.reserve().await else { return Passed::Deaf };
    if buffer.capacity() < ROOM_MIN {
        buffer.reserve(READ_MAX);
    }
    match log.read_buf(buffer).await {
        Ok(1..) => {
            room.send(ExecOutput::Bytes(buffer.split().freeze()));
            Passed::Bytes
        }
        Ok(0) | Err(_) => Passed::End,
    }
}

/// Passes on what lies in the pipe and waits for nothing: where orphans cannot be adopted, one may hold it open for ever.
/// It asks the pipe itself, because the runtime may not have heard yet that there is something to read.
async fn drain(log: pipe::Receiver, output: &mpsc::Sender<ExecOutput>) {
    let Ok(mut log) = log.into_nonblocking_fd().map(std::fs::File::from) else { return };
    loop {
        let mut chunk = vec![0; LOG_CHUNK_MAX];
        let Ok(len @ 1..) = log.read(&mut chunk) else { return };
        chunk.truncate(len);
        if output.send(ExecOutput::Bytes(chunk.into())).await.is_err() {
            return;
        }
    }
}

async fn tell(stdin: &mut ChildStdin, order: &Order) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(order)?;
    line.push(b'\n');
    stdin.write_all(&line).await?;
    stdin.flush().await
}

/// Waits for the guard, whose leash is cut. Returns true and removes its record if it ended by itself: then nothing is left.
async fn end_of(child: &mut Child, record: &Path) -> bool {
    match tokio::time::timeout(GUARD_END, child.wait()).await {
        Ok(Ok(status)) if status.success() => {
            let _kept_for_the_sweep = tokio::fs::remove_file(record).await;
            true
        }
        Ok(_) => false,
        Err(_late) => {
            tracing::error!(record = %record.display(), "a guard cannot kill what it guards; its processes may be stuck in the kernel");
            false
        }
    }
}

/// A wide pipe lets a command write on while the daemon is busy.
#[cfg(target_os = "linux")]
fn widen(pipe: &impl std::os::fd::AsFd) {
    // A system that grants less is slower and no worse.
    let _granted = nix::fcntl::fcntl(pipe, nix::fcntl::FcntlArg::F_SETPIPE_SZ(1 << 20));
}

#[cfg(not(target_os = "linux"))]
fn widen(_pipe: &impl std::os::fd::AsFd) {}
