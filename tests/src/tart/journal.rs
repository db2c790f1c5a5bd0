//! One JSON line per invocation, in the order of starting. The end is filled in later, so an invocation that was killed or
//! still runs has none.

use std::fs::{File, OpenOptions};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::context::{Sim, wall_ms};
use super::lock;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Entry {
    pub pid: u32,
    pub argv: Vec<String>,
    pub home: String,
    /// Whether `TART_NO_AUTO_PRUNE` and `CI` were set.
    pub no_auto_prune: bool,
    pub ci: bool,
    pub start_ms: i64,
    #[serde(default, skip_serializing)]
    pub end_ms: Option<i64>,
    #[serde(default, skip_serializing)]
    pub exit: Option<i32>,
}

/// Room for both members of the end, filled with blanks until it is known.
const END: usize = 48;

pub(crate) struct Journal(Option<(File, u64)>);

impl Journal {
    pub(crate) fn open(sim: &Sim, words: &[String]) -> Journal {
        Journal(sim.journal.as_ref().and_then(|path| begin(path, sim, words).ok()))
    }

    pub(crate) fn close(self, code: u8) {
        if let Some((file, at)) = self.0 {
            let end = format!(",\"end_ms\":{},\"exit\":{code}", wall_ms());
            // Nobody to tell: the invocation then looks killed.
            let _ = file.write_all_at(format!("{end:<END$}").as_bytes(), at);
        }
    }
}

fn begin(path: &Path, sim: &Sim, words: &[String]) -> std::io::Result<(File, u64)> {
    let _held = lock::exclusive_file(path)?;
    let mut file = OpenOptions::new().write(true).open(path)?;
    let at = file.seek(SeekFrom::End(0))?;
    let entry = Entry {
        pid: std::process::id(),
        argv: words.to_vec(),
        home: sim.home.display().to_string(),
        no_auto_prune: !sim.prunes,
        ci: sim.ci,
        start_ms: wall_ms(),
        end_ms: None,
        exit: None,
    };
    let mut line = serde_json::to_string(&entry)?;
    line.pop();
    let end_at = at + line.len() as u64;
    writeln!(file, "{line}{:END$}}}", "")?;
    Ok((file, end_at))
}

/// Every invocation so far.
pub fn read(path: &Path) -> std::io::Result<Vec<Entry>> {
    // Whoever begins a line holds it until the line is whole.
    let held = lock::exclusive_file(path)?;
    let text = std::fs::read_to_string(path)?;
    drop(held);
    text.lines().map(|line| serde_json::from_str(line).map_err(std::io::Error::other)).collect()
}
