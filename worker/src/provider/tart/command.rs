//! S: one run of the `tart` program: its argument list, its environment, its deadline, the last of what it said.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};
use tokio::sync::{RwLock, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::says::{Ended, Trouble, judge, tail};
use crate::provider::{VmError, VmFault};

/// What is kept of each stream of a command. Lists of hundreds of VMs fit.
const KEPT: usize = 1 << 20;
/// What is longer is no line.
const LINE: usize = 4 << 10;
/// A child of `tart` may hold its streams open after it has ended.
const DRAIN: Duration = Duration::from_secs(1);
/// From a polite signal to one that cannot be ignored.
const GRACE: Duration = Duration::from_secs(5);

/// The commands that only look.
pub(super) const QUICK: Duration = Duration::from_secs(30);
/// A copy-on-write clone is done in a second; one that has to copy a whole image is not.
pub(super) const CLONE: Duration = Duration::from_secs(600);
pub(super) const STOP: Duration = Duration::from_secs(20);

/// How `tart` is called on this host.
#[derive(Debug, Clone)]
pub(super) struct Tart {
    pub(super) program: PathBuf,
    pub(super) home: PathBuf,
    /// Whoever has it for writing runs alone: every command but a pull and a clone throws unfinished downloads away.
    pub(super) gate: Arc<RwLock<()>>,
    /// What nobody waits for any more is killed, and may still finish what it was at.
    ending: TaskTracker,
}

/// Hears each line of a command's standard output.
pub(super) type Said = Arc<dyn Fn(&str) + Send + Sync>;

impl Tart {
    pub(super) fn new(program: PathBuf, home: PathBuf) -> Self {
        let ending = TaskTracker::new();
        ending.close();
        Self { program, home, gate: Arc::default(), ending }
    }

    /// Waits until every command that nobody waited for has ended, but not for one that cannot be killed.
    pub(super) async fn settled(&self) {
        let _stuck = tokio::time::timeout(GRACE, self.ending.wait()).await;
    }

    /// Runs a command to its end, or to its deadline: then it is killed, and that is an error of its own.
    pub(super) async fn run(&self, args: &[&str], deadline: Duration) -> Result<Ended, VmError> {
        let _alone = if args.first() == Some(&"clone") { None } else { Some(self.gate.read().await) };
        self.watched(args, deadline, Signal::SIGTERM, None, &CancellationToken::new()).await
    }

    /// Like [`Tart::run`], for a command that is of no use later: absent while it would have to wait for another one.
    pub(super) async fn run_now(&self, args: &[&str], deadline: Duration) -> Option<Result<Ended, VmError>> {
        let _alone = self.gate.try_read().ok()?;
        Some(self.watched(args, deadline, Signal::SIGTERM, None, &CancellationToken::new()).await)
    }

    /// Like [`Tart::run`], for a command that must succeed: whatever it says otherwise is judged.
    pub(super) async fn must(&self, args: &[&str], deadline: Duration) -> Result<Result<String, Failed>, VmError> {
        let ended = self.run(args, deadline).await?;
        Ok(match ended.status {
            Some(0) => Ok(ended.out),
            Some(_) | None => Err(Failed { trouble: judge(&ended), says: tail(&ended) }),
        })
    }

    /// Runs a command that may go on as long as it says something new: `silence` is how long it may say nothing. Each
    /// line is passed to `said`. `stop` ends it early, which is an error of its own, too.
    pub(super) async fn watched(
        &self,
        args: &[&str],
        silence: Duration,
        polite: Signal,
        said: Option<Said>,
        stop: &CancellationToken,
    ) -> Result<Ended, VmError> {
        let what = args.first().copied().unwrap_or_default();
        let mut child = self.spawn(args)?;
        let (beat, mut beats) = watch::channel(());
        let mut talks = said.is_some();
        let (out, err) = (Kept::default(), Kept::default());
        let mut readers = JoinSet::new();
        readers.spawn(out.clone().read(child.stdout.take(), beat.clone(), said));
        readers.spawn(err.clone().read(child.stderr.take(), beat, None));
        let mut running = Running { child: Some(child), ending: self.ending.clone() };
        let status = loop {
            tokio::select! {
                biased;
                status = running.wait() => break status,
                // Closed streams: only its end is left to wait for.
                more = beats.changed(), if talks => talks = more.is_ok(),
                () = stop.cancelled() => {
                    running.end(polite).await;
                    return Err(VmError::farm(VmFault::Start, format!("tart {what} was broken off: nobody waits for it")));
                }
                () = tokio::time::sleep(silence) => {
                    running.end(polite).await;
                    return Err(VmError::farm(VmFault::Start, format!("tart {what} did not end in time and was killed")));
                }
            }
        };
        let status = status.map_err(|error| VmError::farm(VmFault::Start, format!("tart {what}: {error}")))?;
        let _held_open = tokio::time::timeout(DRAIN, async { while readers.join_next().await.is_some() {} }).await;
        Ok(Ended { status: status.code(), out: out.text(), err: err.text() })
    }

    fn spawn(&self, args: &[&str]) -> Result<Child, VmError> {
        let what = args.first().copied().unwrap_or_default();
        Command::new(&self.program)
            .args(args)
            .envs(environment(&self.home))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| {
                let tail = format!("{} {what} does not start: {error}", self.program.display());
                VmError { retry: false, ..VmError::farm(VmFault::Host, tail) }
            })
    }
}

/// Why a command that had to succeed did not.
#[derive(Debug, Clone)]
pub(super) struct Failed {
    pub(super) trouble: Trouble,
    pub(super) says: String,
}

/// What `tart` must find in its environment: never to prune by itself, never to redraw lines or open windows.
pub(super) fn environment(home: &Path) -> [(String, String); 3] {
    [
        ("TART_HOME".to_owned(), home.display().to_string()),
        ("TART_NO_AUTO_PRUNE".to_owned(), "1".to_owned()),
        ("CI".to_owned(), "1".to_owned()),
    ]
}

/// A command that runs. Dropping it kills it.
struct Running {
    child: Option<Child>,
    ending: TaskTracker,
}

impl Running {
    async fn wait(&mut self) -> io::Result<ExitStatus> {
        match &mut self.child {
            Some(child) => child.wait().await,
            None => std::future::pending().await,
        }
    }

    async fn end(&mut self, polite: Signal) {
        if let Some(pid) = self.child.as_ref().and_then(Child::id) {
            let _gone = kill(Pid::from_raw(pid as i32), polite);
        }
        if tokio::time::timeout(GRACE, self.wait()).await.is_err()
            && let Some(child) = &mut self.child
        {
            let _gone = child.kill().await;
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take()
            && child.id().is_some()
        {
            self.ending.spawn(async move { child.kill().await });
        }
    }
}

/// The last of a stream.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Kept {
    async fn read(self, stream: Option<impl AsyncRead + Unpin>, beat: watch::Sender<()>, said: Option<Said>) {
        let (Some(mut stream), mut chunk) = (stream, vec![0; 8 << 10]) else { return };
        let (mut rest, mut last) = (String::new(), String::new());
        while let Ok(len @ 1..) = stream.read(&mut chunk).await {
            self.add(&chunk[..len]);
            rest.push_str(&String::from_utf8_lossy(&chunk[..len]));
            while let Some((line, after)) = rest.split_once('\n') {
                let line = line.trim();
                if let Some(said) = &said {
                    said(line);
                }
                // A line that is said again is no progress.
                if line != last {
                    beat.send_replace(());
                    last = line.to_owned();
                }
                rest = after.to_owned();
            }
            if rest.len() > LINE {
                rest.clear();
            }
        }
    }

    fn add(&self, chunk: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend_from_slice(chunk);
        if kept.len() > 2 * KEPT {
            let surplus = kept.len() - KEPT;
            kept.drain(..surplus);
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_command_that_nobody_waits_for_is_gone_once_all_is_settled() {
        let dir = tempfile::tempdir().unwrap();
        let tart = Tart::new(PathBuf::from("sh"), dir.path().to_owned());
        let said = dir.path().join("pid");
        let script = format!("echo $$ >{0}.new; mv {0}.new {0}; exec sleep 600", said.display());
        let pid = {
            let args = ["-c", &script];
            let mut run = std::pin::pin!(tart.run(&args, QUICK));
            loop {
                tokio::select! {
                    ended = &mut run => panic!("it ended: {ended:?}"),
                    () = tokio::task::yield_now() => {}
                }
                if let Ok(text) = std::fs::read_to_string(&said) {
                    break Pid::from_raw(text.trim().parse().unwrap());
                }
            }
        };
        tart.settled().await;
        assert_eq!(kill(pid, None), Err(nix::errno::Errno::ESRCH));
        tart.settled().await;
    }
}
