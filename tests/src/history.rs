//! What was seen of a farm from outside, written down line by line while it happens, and judged afterwards: clients write
//! before and after each call, followers write each frame, a watcher writes which processes run. [`check`] reads such a
//! history without the farm and names every invariant that it breaks.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::noise;
use crate::observe::now;

mod check;
#[cfg(test)]
mod tests;

pub use check::{Violation, check};

/// One line of a history.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Milliseconds since the history began, by the observer's clock.
    pub at: u64,
    #[serde(flatten)]
    pub seen: Seen,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "seen", rename_all = "snake_case")]
pub enum Seen {
    /// A client is about to submit.
    Submit {
        key: String,
        retries: u32,
    },
    /// What came of it. No job: a refusal, or nobody answered.
    Answer {
        key: String,
        job: Option<String>,
    },
    /// A job is known by other means than an answer, and how it must end.
    Job {
        job: String,
        retries: u32,
        ends: String,
    },
    /// An event of a job's feed.
    Event {
        who: String,
        job: String,
        seq: u64,
        attempt: u32,
        kind: String,
        state: String,
        reason: Option<String>,
    },
    /// Bytes of a log, from a feed or from the raw log.
    Log {
        who: String,
        job: String,
        attempt: u32,
        offset: u64,
        len: u64,
        sum: u64,
    },
    /// Somebody was told how a job ended.
    End {
        who: String,
        job: String,
        attempt: u32,
        state: String,
        exit_code: Option<i64>,
        lost: u64,
        blame: Option<String>,
    },
    /// The raw log of an attempt came to its end.
    Through {
        who: String,
        job: String,
        attempt: u32,
    },
    /// How much an attempt printed, by its own word.
    Printed {
        job: String,
        attempt: u32,
        len: u64,
    },
    /// How much an attempt prints that comes to its end, as it was told before it began.
    Planned {
        job: String,
        len: u64,
    },
    /// So much of an attempt's log could be read: whoever comes later gets it too.
    Readable {
        job: String,
        attempt: u32,
        len: u64,
    },
    /// The whole stored log of an attempt, read when all was over.
    Stored {
        job: String,
        attempt: u32,
        len: u64,
        sum: u64,
    },
    /// An artifact that is listed, and what came when it was fetched.
    Artifact {
        job: String,
        path: String,
        size: u64,
        sha256: String,
        got_size: u64,
        got_sha256: String,
    },
    /// Every VM with a command of a job in it, by the list of processes. Written when it differs from the line before.
    Running {
        vms: Vec<Vm>,
    },
    /// All jobs that the farm knows, when all was over.
    Listed {
        jobs: Vec<String>,
    },
    /// A process was killed; it is back and does its work.
    Killed {
        process: String,
        phase: String,
    },
    Back {
        process: String,
        phase: String,
        took_ms: u64,
    },
}

/// A VM that runs a command.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Vm {
    pub host: String,
    /// How many the host may run.
    pub room: usize,
    pub name: String,
    pub job: String,
    pub attempt: u32,
}

/// Writes a history. Clones write the same one.
#[derive(Clone)]
pub struct Recorder {
    started: Instant,
    path: PathBuf,
    file: Arc<Mutex<File>>,
}

impl Recorder {
    pub fn create(path: &Path) -> Result<Recorder> {
        let file = File::create(path).with_context(|| path.display().to_string())?;
        Ok(Recorder { started: now(), path: path.to_owned(), file: Arc::new(Mutex::new(file)) })
    }

    pub fn write(&self, seen: Seen) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock: the order of the lines is the order of their times.
        let at = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let mut line = serde_json::to_vec(&Line { at, seen }).expect("plain data");
        line.push(b'\n');
        file.write_all(&line).expect("a history can be written");
    }

    pub fn log(&self, who: &str, job: &str, attempt: u32, offset: u64, bytes: &[u8]) {
        let (who, job, len) = (who.to_owned(), job.to_owned(), bytes.len() as u64);
        self.write(Seen::Log { who, job, attempt, offset, len, sum: noise::sum(bytes) });
    }

    pub fn event(&self, who: &str, job: &str, frame: &Value) {
        self.write(Seen::Event {
            who: who.to_owned(),
            job: job.to_owned(),
            seq: number(frame, "seq"),
            attempt: u32::try_from(number(frame, "attempt")).unwrap_or(u32::MAX),
            kind: word(frame, "kind").unwrap_or_default(),
            state: word(frame, "state").unwrap_or_default(),
            reason: word(frame, "reason"),
        });
    }

    /// A job's view that has an end.
    pub fn end(&self, who: &str, view: &Value) {
        self.write(Seen::End {
            who: who.to_owned(),
            job: word(view, "id").unwrap_or_default(),
            attempt: u32::try_from(number(view, "attempt")).unwrap_or(u32::MAX),
            state: word(view, "state").unwrap_or_default(),
            exit_code: view["exit_code"].as_i64(),
            lost: number(view, "lost"),
            blame: word(view, "blame"),
        });
    }

    /// All lines so far.
    pub fn read(&self) -> Result<Vec<Line>> {
        let lines = BufReader::new(File::open(&self.path)?).lines();
        lines.map(|line| Ok(serde_json::from_str(&line?)?)).collect()
    }
}

fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or(u64::MAX)
}

fn word(value: &Value, key: &str) -> Option<String> {
    value[key].as_str().map(str::to_owned)
}
