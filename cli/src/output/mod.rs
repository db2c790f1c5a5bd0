//! S: what a command says and how it ends: exit codes, failures, words for sizes and times, tables, standard output.
//!
//! Standard output is data, standard error is talk. [`Sink`] is the only way to standard output for bytes of a job;
//! [`talk::Talk`] is the only way to standard error.

pub(crate) mod sanitize;
pub(crate) mod talk;

use std::fs::File;
use std::io::{IsTerminal as _, Write as _};
use std::os::fd::AsFd as _;

use alloy_shared::client::ClientError;
use alloy_shared::env::Ms;
use alloy_shared::wire::job::{ExitOrigin, JobView};
use alloy_shared::wire::{ErrorCode, FieldError, Problem};
use bytes::Bytes;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

use sanitize::Sanitizer;

/// Chunks that wait for a slow reader of standard output before the follower waits too.
const SINK_QUEUE: usize = 16;

const AWAY_HINT: &str = "the farm is there and cannot work just now: try again in a moment";
const DOCTOR_HINT: &str = "alloy doctor      compares the versions of both sides";

/// What the process exits with. `alloy run` and `alloy attach` exit with the job's own number once there is one.
pub(crate) mod exit {
    pub(crate) const OK: i32 = 0;
    pub(crate) const ERROR: i32 = 1;
    pub(crate) const USAGE: i32 = 2;
    pub(crate) const FORBIDDEN: i32 = 4;
    pub(crate) const NOT_FOUND: i32 = 5;
    pub(crate) const UNREACHABLE: i32 = 7;
    /// `alloy run` without a job: nothing ran, and it is not the command's fault.
    pub(crate) const NO_JOB: i32 = 125;
    /// Interrupted from the keyboard.
    pub(crate) const INTERRUPTED: i32 = 130;
    /// As a shell tells of a program that SIGPIPE ended: scripts know that one from an error.
    pub(crate) const PIPE: i32 = 141;
}

/// Why a command did not succeed, as far as the exit code is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Error,
    Usage,
    /// No token is there that could be one, or the farm knows none like it: it is revoked, has expired, or is another farm's.
    Unauthenticated,
    Forbidden,
    NotFound,
    /// Nobody answers, or somebody who cannot work just now: the farm starts, stops, or its database is away.
    Unreachable,
    Interrupted,
    /// Nobody reads standard output any more: nothing is left to say.
    Pipe,
}

impl Fault {
    const fn exit_code(self) -> i32 {
        match self {
            Self::Error => exit::ERROR,
            Self::Usage => exit::USAGE,
            Self::Unauthenticated | Self::Forbidden => exit::FORBIDDEN,
            Self::NotFound => exit::NOT_FOUND,
            Self::Unreachable => exit::UNREACHABLE,
            Self::Interrupted => exit::INTERRUPTED,
            Self::Pipe => exit::PIPE,
        }
    }

    /// The code of `alloy run` while there is no job.
    const fn exit_code_before_job(self) -> i32 {
        match self {
            Self::Usage => exit::USAGE,
            Self::Interrupted => exit::INTERRUPTED,
            Self::Pipe => exit::PIPE,
            Self::Error | Self::Unauthenticated | Self::Forbidden | Self::NotFound | Self::Unreachable => exit::NO_JOB,
        }
    }

    const fn word(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Usage => "usage",
            Self::Unauthenticated => "unauthenticated",
            Self::Forbidden => "forbidden",
            Self::NotFound => "not_found",
            Self::Unreachable => "unreachable",
            Self::Interrupted => "interrupted",
            Self::Pipe => "broken_pipe",
        }
    }

    const fn of(code: ErrorCode) -> Self {
        match code {
            ErrorCode::Unauthenticated => Self::Unauthenticated,
            ErrorCode::Forbidden => Self::Forbidden,
            ErrorCode::NotFound | ErrorCode::Gone => Self::NotFound,
            ErrorCode::Unavailable => Self::Unreachable,
            ErrorCode::InvalidBody
            | ErrorCode::IncompleteBody
            | ErrorCode::InvalidSpec
            | ErrorCode::InvalidParameter
            | ErrorCode::MethodNotAllowed
            | ErrorCode::IdempotencyMismatch
            | ErrorCode::InvalidTransition
            | ErrorCode::SourceIncomplete
            | ErrorCode::DigestMismatch
            | ErrorCode::InvalidSource
            | ErrorCode::NoSuchWorker
            | ErrorCode::OffsetMismatch
            | ErrorCode::RangeNotSatisfiable
            | ErrorCode::TooLarge
            | ErrorCode::TooManyRequests
            | ErrorCode::UnsupportedProtocol
            | ErrorCode::Superseded
            | ErrorCode::Fenced
            | ErrorCode::StorageFull
            | ErrorCode::Internal => Self::Error,
        }
    }
}

/// What went wrong, for the person who typed the command.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub(crate) fault: Fault,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
    problem: Option<Box<Problem>>,
    /// There is a job, or there may be one.
    of_a_job: bool,
}

impl Failure {
    pub(crate) fn new(fault: Fault, message: impl Into<String>) -> Self {
        Self { fault, message: message.into(), hint: None, problem: None, of_a_job: false }
    }
    pub(crate) fn error(message: impl Into<String>) -> Self {
        Self::new(Fault::Error, message)
    }
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Fault::Usage, message)
    }
    pub(crate) fn pipe() -> Self {
        Self::new(Fault::Pipe, "nobody reads standard output")
    }
    pub(crate) fn io(what: &str, error: &std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::BrokenPipe => Self::pipe(),
            _ => Self::error(format!("{what}: {error}")),
        }
    }
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// A client's error, with the hints that only the CLI can give.
    pub(crate) fn of(error: ClientError, url: &str) -> Self {
        match error {
            ClientError::Unreachable { why, .. } => {
                let failure = Self::new(Fault::Unreachable, format!("no farm answers at {url}: {why}"));
                failure.hint("alloy up          starts a farm on this machine; --url URL names another one")
            }
            ClientError::Protocol { why, hint } => {
                let hint = hint.unwrap_or_else(|| DOCTOR_HINT.to_owned());
                Self::error(format!("{url} answers, but not as a farm does: {why}")).hint(hint)
            }
            ClientError::Problem(problem) => Self::of_problem(problem, url),
        }
    }

    /// Wrong fields of a job, in the words of the command line.
    pub(crate) fn wrong_fields(fault: Fault, faults: &[FieldError]) -> Self {
        let lines: Vec<String> =
            faults.iter().map(|fault| format!("{} {}", flag_of(&fault.field), fault.message)).collect();
        Self::new(fault, lines.join("; "))
    }

    fn of_problem(problem: Problem, url: &str) -> Self {
        if problem.code == ErrorCode::InvalidSpec && !problem.errors.is_empty() {
            let told = Self::wrong_fields(Fault::of(problem.code), &problem.errors);
            return Self { hint: problem.hint.clone(), problem: Some(Box::new(problem)), ..told };
        }
        let hint = match problem.code {
            ErrorCode::Unauthenticated => Some(format!("alloy login {url} --with-token      in CI: set ALLOY_TOKEN")),
            ErrorCode::Unavailable => problem.hint.clone().or_else(|| Some(AWAY_HINT.to_owned())),
            _ => problem.hint.clone(),
        };
        let message = match problem.code {
            ErrorCode::Unauthenticated => format!("not signed in to {url}: {}", problem.message),
            _ => problem.message.clone(),
        };
        let fault = Fault::of(problem.code);
        Self { hint, problem: Some(Box::new(problem)), ..Self::new(fault, message) }
    }

    /// It is about a job that is there, or that the farm may have: nobody may take it for `nothing ran`.
    pub(crate) fn of_a_job(self) -> Self {
        Self { of_a_job: true, ..self }
    }

    /// What the process exits with for it. `alloy run` has a code of its own while there is certainly no job.
    pub(crate) fn exit_code(&self, runs_a_job: bool) -> i32 {
        if runs_a_job && !self.of_a_job { self.fault.exit_code_before_job() } else { self.fault.exit_code() }
    }

    /// True if nobody answered, or somebody who cannot work just now.
    pub(crate) fn farm_is_away(&self) -> bool {
        self.fault == Fault::Unreachable
    }

    /// The lines of standard error, without colours.
    pub(crate) fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = vec![("error", sanitize::one_line(&self.message))];
        if let Some(problem) = &self.problem {
            let told = problem.errors.iter().filter(|e| !self.message.contains(&e.message));
            lines.extend(told.map(|e| ("", sanitize::one_line(&format!("{}: {}", flag_of(&e.field), e.message)))));
        }
        if let Some(hint) = &self.hint {
            lines.extend(hint.lines().map(|line| ("hint", sanitize::one_line(line))));
        }
        if let Some(id) = self.problem.as_ref().and_then(|problem| problem.request_id.as_ref()) {
            lines.push(("request", sanitize::one_line(id)));
        }
        lines
    }

    /// The same for programs.
    pub(crate) fn json(&self, exit_code: i32) -> serde_json::Value {
        let mut out = match &self.problem {
            Some(problem) => serde_json::to_value(problem).unwrap_or_default(),
            None => serde_json::json!({ "code": self.fault.word() }),
        };
        if let Some(fields) = out.as_object_mut() {
            fields.insert("type".into(), "error".into());
            fields.insert("message".into(), self.message.clone().into());
            if let Some(hint) = &self.hint {
                fields.insert("hint".into(), hint.clone().into());
            }
            fields.insert("exit_code".into(), exit_code.into());
            fields.insert("exit_origin".into(), ExitOrigin::Alloy.as_str().into());
        }
        out
    }
}

/// What a field of a job is called on the command line.
fn flag_of(field: &str) -> String {
    let field = field.trim_start_matches('/');
    let (noun, rest) = field.split_at(field.find(['.', '/', '[']).unwrap_or(field.len()));
    let name = rest.trim_matches(['.', '/', '[', ']']);
    let number = || name.parse::<usize>().map_or_else(|_| String::new(), |n| format!(" (number {})", n + 1));
    match noun {
        "shell" => "the line of -c".to_owned(),
        "argv" => format!("the command's words{}", number()),
        "env" => format!("--env {name}").trim_end().to_owned(),
        "artifacts" => format!("--artifact{}", number()),
        "labels" => format!("--label {name}").trim_end().to_owned(),
        "image" => "--image".to_owned(),
        "network" => match rest.split_once('[') {
            Some((_, n)) => {
                format!("--network (range {})", n.trim_end_matches(']').parse().map_or(0, |n: usize| n + 1))
            }
            None => "--network".to_owned(),
        },
        "timeout_ms" => "--timeout".to_owned(),
        "queue_timeout_ms" => "--queue-timeout".to_owned(),
        "retries" => "--retries".to_owned(),
        other => other.to_owned(),
    }
}

/// What a finished job's command line exits with.
pub(crate) fn job_exit(job: &JobView) -> (i32, ExitOrigin) {
    let code = job.exit_code.unwrap_or(exit::NO_JOB);
    (code, job.exit_origin.unwrap_or(ExitOrigin::Alloy))
}

/// `48.2 MB`: powers of ten, one digit, as disks are sold and Finder counts.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..999_950 => format!("{:.1} kB", bytes as f64 / 1e3),
        999_950..999_950_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        999_950_000.. => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

/// `1,204`.
pub(crate) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// `1 file`, `1,204 files`.
pub(crate) fn plural(n: u64, noun: &str) -> String {
    format!("{} {noun}{}", count(n), if n == 1 { "" } else { "s" })
}

/// `0.4s`, `1m 32s`, `2h 5m`.
pub(crate) fn duration(ms: u64) -> String {
    let seconds = ms / 1_000;
    match ms {
        0..10_000 => format!("{}.{}s", seconds, ms % 1_000 / 100),
        10_000..60_000 => format!("{seconds}s"),
        60_000..3_600_000 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        3_600_000.. => format!("{}h {:02}m", seconds / 3_600, seconds / 60 % 60),
    }
}

/// `now`, `2m ago`: for people; JSON carries the stamp.
pub(crate) fn ago(at: &str, now: Ms) -> String {
    let Some(then) = Ms::parse_rfc3339(at) else { return String::from("?") };
    let seconds = now.since(then) / 1_000;
    match seconds {
        0..5 => "now".to_owned(),
        5..60 => format!("{seconds}s ago"),
        60..3_600 => format!("{}m ago", seconds / 60),
        3_600..86_400 => format!("{}h ago", seconds / 3_600),
        86_400.. => format!("{}d ago", seconds / 86_400),
    }
}

/// Columns as wide as their widest cell. Tab-separated and without a head when a program reads it.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>], for_people: bool) -> String {
    let mut out = String::new();
    if !for_people {
        for row in rows {
            out.push_str(&row.iter().map(|cell| sanitize::one_line(cell)).collect::<Vec<_>>().join("\t"));
            out.push('\n');
        }
        return out;
    }
    let head: Vec<String> = head.iter().map(|cell| (*cell).to_owned()).collect();
    let all: Vec<Vec<String>> = std::iter::once(&head)
        .chain(rows)
        .map(|row| row.iter().map(|cell| sanitize::one_line(cell)).collect())
        .collect();
    let width = |column: usize| all.iter().filter_map(|row| row.get(column)).map(|c| c.chars().count()).max();
    let widths: Vec<usize> = (0..head.len()).map(|column| width(column).unwrap_or(0)).collect();
    for row in &all {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', width + 2 - cell.chars().count().min(*width)));
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// Writes text that Alloy itself made to standard output.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = anstream::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|e| Failure::io("standard output", &e))
}

/// Writes one value as one line of JSON to standard output.
pub(crate) fn print_json<T: Serialize>(value: &T) -> Result<(), Failure> {
    let mut line = serde_json::to_string(value).map_err(|e| Failure::error(format!("JSON: {e}")))?;
    line.push('\n');
    print(&line)
}

pub(crate) fn stdout_is_terminal() -> bool {
    std::io::stdout().is_terminal()
}

/// A thread that writes a job's bytes to standard output, so that a reader that stands still cannot keep Ctrl-C from
/// being heard. A terminal gets them cleaned, everything else gets them as they are.
pub(crate) struct Sink {
    queue: mpsc::Sender<Bytes>,
    /// None when its report was read.
    done: Option<oneshot::Receiver<std::io::Result<()>>>,
}

impl Sink {
    pub(crate) fn stdout(talk: &talk::Talk) -> std::io::Result<Self> {
        let terminal = stdout_is_terminal();
        let cleaner = terminal.then(Sanitizer::default);
        // A bar and a line share the terminal. A pipe may stand still, and nobody else may wait for it then.
        let bars = terminal.then(|| talk.bars());
        // Past the standard library's buffer, which looks for line ends and writes twice for each chunk.
        let mut stdout = File::from(std::io::stdout().as_fd().try_clone_to_owned()?);
        Self::start(cleaner, move |bytes| match &bars {
            Some(bars) if stdout.is_terminal() => bars.suspend(|| stdout.write_all(bytes)),
            Some(_) | None => stdout.write_all(bytes),
        })
    }

    fn start(
        cleaner: Option<Sanitizer>,
        write: impl FnMut(&[u8]) -> std::io::Result<()> + Send + 'static,
    ) -> std::io::Result<Self> {
        let (queue, rx) = mpsc::channel(SINK_QUEUE);
        let (report, done) = oneshot::channel();
        std::thread::Builder::new().name("stdout".into()).spawn(move || {
            // Nobody waits for the report any more when the process is about to exit.
            let _ = report.send(pump(rx, cleaner, write));
        })?;
        Ok(Self { queue, done: Some(done) })
    }

    /// Hands bytes over; an error means that earlier ones could not be written.
    pub(crate) async fn write(&mut self, bytes: Bytes) -> Result<(), Failure> {
        match self.queue.send(bytes).await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.report().await.err().unwrap_or_else(Failure::pipe)),
        }
    }

    pub(crate) async fn write_json<T: Serialize>(&mut self, value: &T) -> Result<(), Failure> {
        let mut line = serde_json::to_vec(value).map_err(|e| Failure::error(format!("JSON: {e}")))?;
        line.push(b'\n');
        self.write(line.into()).await
    }

    /// Returns when every byte is written.
    pub(crate) async fn finish(mut self) -> Result<(), Failure> {
        let (closed, _) = mpsc::channel(1);
        drop(std::mem::replace(&mut self.queue, closed));
        self.report().await
    }

    async fn report(&mut self) -> Result<(), Failure> {
        let Some(done) = &mut self.done else { return Err(Failure::pipe()) };
        let outcome = done.await;
        self.done = None;
        match outcome {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Failure::io("standard output", &error)),
            Err(_) => Err(Failure::error("the thread that writes standard output died")),
        }
    }
}

fn pump(
    mut rx: mpsc::Receiver<Bytes>,
    mut cleaner: Option<Sanitizer>,
    mut write: impl FnMut(&[u8]) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let mut clean = Vec::new();
    let mut open_line = false;
    while let Some(bytes) = rx.blocking_recv() {
        match &mut cleaner {
            None => write(&bytes)?,
            Some(cleaner) => {
                clean.clear();
                cleaner.push(&bytes, &mut clean);
                open_line = clean.last().map_or(open_line, |byte| *byte != b'\n');
                write(&clean)?;
            }
        }
    }
    clean.clear();
    if let Some(cleaner) = &mut cleaner {
        cleaner.finish(&mut clean);
        // What Alloy says next begins on a line of its own.
        if clean.last().map_or(open_line, |byte| *byte != b'\n') {
            clean.push(b'\n');
        }
        write(&clean)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
