//! S: the operator's own programs around each job, on this host: `pre-job` before anything of the job enters its VM,
//! `post-job` when the job has ended.
//!
//! They are trusted and run as the worker's user, under a guard like everything else: what a hook started is gone when the
//! hook has ended, was late, or the daemon has died. What they say goes to the worker's log, up to a bound.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use alloy_shared::env::{Env, Mono};
use alloy_shared::id::AttemptRef;
use alloy_shared::limits::{HOOK_LINE_MAX, HOOK_WORDS_MAX};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::guard::leash::{Leash, Wires};
use crate::guard::{self, Launch};
use crate::host;
use crate::provider::{ExecInput, ExecOutput, Exit};

/// Where the marks of running hooks lie, below the state directory.
const RUNS: &str = "hook-runs";
/// What an earlier run left is dead by then, or is told.
const SWEEP_BUDGET: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    PreJob,
    PostJob,
}

impl Hook {
    /// Its file's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PreJob => "pre-job",
            Self::PostJob => "post-job",
        }
    }
}

/// What hooks stand on.
pub struct Setup {
    /// Where the programs lie. A directory or a program that is not there is no hook.
    pub dir: PathBuf,
    pub state_dir: PathBuf,
    /// The binary that has [`guard::SUBCOMMAND`].
    pub guard: PathBuf,
    pub env: Arc<dyn Env>,
}

pub struct Hooks {
    /// Absent: there are none.
    setup: Option<Setup>,
    nonce: u32,
    runs: AtomicU32,
}

impl Hooks {
    /// Kills what hooks of an earlier run have left, if their guards were killed too.
    pub async fn open(setup: Setup) -> Self {
        let runs = setup.state_dir.join(RUNS);
        let swept = tokio::task::spawn_blocking(move || sweep(&runs)).await;
        if !matches!(swept, Ok(true)) {
            tracing::warn!("processes of a hook of an earlier run do not die");
        }
        Self { nonce: setup.env.dice() as u32, setup: Some(setup), runs: AtomicU32::new(0) }
    }

    /// Hooks of a host without any.
    pub fn none() -> Self {
        Self { nonce: 0, setup: None, runs: AtomicU32::new(0) }
    }

    /// Runs a hook to its end, if there is one. An error says in a sentence's end what was wrong with it. Dropping the
    /// future kills the hook.
    pub async fn run(
        &self,
        hook: Hook,
        attempt: AttemptRef,
        about: BTreeMap<String, String>,
        within_ms: u64,
    ) -> Result<(), String> {
        let Some(setup) = &self.setup else { return Ok(()) };
        let program = setup.dir.join(hook.name());
        if !is_there(&program).await? {
            return Ok(());
        }
        let run = setup.state_dir.join(RUNS).join(self.next());
        let leash = start_guard(&setup.guard, &run).map_err(|error| format!("cannot be guarded: {error}"))?;
        let env = setup.env.as_ref();
        let (input, orders) = mpsc::channel::<ExecInput>(1);
        let (bytes, output) = mpsc::channel(16);
        let doom = CancellationToken::new();
        let wires = Wires {
            env: Arc::clone(&setup.env),
            // A hook is the operator's and not the attempt's: no lease ends it.
            fence: watch::channel(Mono(u64::MAX)).1,
            doom: doom.clone(),
            input: orders,
            output: bytes,
        };
        let launch = setup.launch(hook, &program, &run, about);
        env.spawn("hook", Box::pin(leash.run(launch, wires)));
        let _kills = (doom.drop_guard(), input);
        let mut words = Words { hook: hook.name(), attempt, line: Vec::new(), left: HOOK_WORDS_MAX, dropped: 0 };
        tokio::select! {
            biased;
            exit = listen(output, &mut words) => exit,
            () = env.sleep_until(env.now().mono + within_ms) => Err(format!("was not done after {within_ms} ms")),
        }
    }

    fn next(&self) -> String {
        format!("{:08x}-{}", self.nonce, self.runs.fetch_add(1, Ordering::Relaxed))
    }
}

impl Setup {
    /// Nothing of the daemon's own environment is passed on but what a program needs to find things.
    fn launch(&self, hook: Hook, program: &Path, run: &Path, about: BTreeMap<String, String>) -> Launch {
        let mut env = about;
        env.insert("ALLOY_HOOK".to_owned(), hook.name().to_owned());
        env.insert("PATH".to_owned(), host::login_path());
        env.insert("USER".to_owned(), host::user());
        if let Ok(home) = std::env::var("HOME") {
            env.insert("HOME".to_owned(), home);
        }
        Launch {
            argv: vec![program.display().to_string()],
            env: env.into_iter().collect(),
            dir: self.dir.display().to_string(),
            vm_dir: run.display().to_string(),
            control: None,
        }
    }
}

/// A program that others may change is nobody's word.
async fn is_there(program: &Path) -> Result<bool, String> {
    match tokio::fs::metadata(program).await {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(format!("cannot be read: {}: {error}", program.display())),
        Ok(meta) if !meta.is_file() || meta.permissions().mode() & 0o111 == 0 => {
            Err(format!("is no program: chmod +x {}", program.display()))
        }
        Ok(meta) if meta.permissions().mode() & 0o022 != 0 => {
            Err(format!("may be changed by others: chmod go-w {}", program.display()))
        }
        Ok(_) => Ok(true),
    }
}

fn start_guard(program: &Path, run: &Path) -> std::io::Result<Leash> {
    if let Some(dir) = run.parent() {
        std::fs::create_dir_all(dir)?;
    }
    Leash::start(program, run.to_owned())
}

fn sweep(runs: &Path) -> bool {
    let left = std::fs::read_dir(runs).into_iter().flatten().flatten().map(|entry| entry.path());
    left.fold(true, |clean, run| {
        let gone = guard::sweep(std::slice::from_ref(&run), &run.display().to_string(), SWEEP_BUDGET);
        clean & (gone && std::fs::remove_file(&run).is_ok())
    })
}

async fn listen(mut output: mpsc::Receiver<ExecOutput>, words: &mut Words) -> Result<(), String> {
    loop {
        match output.recv().await {
            Some(ExecOutput::Bytes(bytes)) => words.hear(&bytes),
            Some(ExecOutput::Exit(Exit::Code(0))) => return Ok(()),
            Some(ExecOutput::Exit(Exit::Code(code))) => return Err(format!("ended with status {code}")),
            Some(ExecOutput::Exit(Exit::Signal(signal))) => return Err(format!("was ended by signal {signal}")),
            Some(ExecOutput::Lost(error)) => return Err(format!("was lost: {error}")),
            None => return Err("was lost".to_owned()),
        }
    }
}

/// What a hook says, as lines of the worker's log.
struct Words {
    hook: &'static str,
    attempt: AttemptRef,
    line: Vec<u8>,
    /// Bytes that the log still takes.
    left: usize,
    dropped: usize,
}

impl Words {
    fn hear(&mut self, bytes: &[u8]) {
        let (kept, beyond) = bytes.split_at(bytes.len().min(self.left));
        self.left -= kept.len();
        self.dropped += beyond.len();
        for byte in kept {
            match byte {
                b'\n' => self.tell(),
                byte => self.line.push(*byte),
            }
            if self.line.len() >= HOOK_LINE_MAX {
                self.tell();
            }
        }
    }

    fn tell(&mut self) {
        let line = String::from_utf8_lossy(&self.line).escape_debug().to_string();
        tracing::info!(attempt = %self.attempt, "{}: {line}", self.hook);
        self.line.clear();
    }
}

impl Drop for Words {
    /// However the hook ended, what it said last is what explains it.
    fn drop(&mut self) {
        if !self.line.is_empty() {
            self.tell();
        }
        if self.dropped > 0 {
            tracing::warn!(attempt = %self.attempt, "{}: {} bytes more are not logged", self.hook, self.dropped);
        }
    }
}

#[cfg(test)]
mod tests;
