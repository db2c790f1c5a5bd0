//! S: the list of a backup's files: a line that says what it is, a line for each file, and a line that closes it.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Component, Path};

use alloy_shared::id::Digest;
use serde::{Deserialize, Serialize};

/// Its name in the backup.
pub const LIST: &str = "backup.jsonl";
const FORMAT: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Of this list and of the directory around it.
    pub format: u32,
    /// The version of Alloy that took it.
    pub alloy: String,
    /// The newest migration that this version knew.
    pub schema: i64,
    pub taken_at: String,
}

impl Head {
    pub fn new(schema: i64, taken_at: String) -> Self {
        Self { format: FORMAT, alloy: env!("CARGO_PKG_VERSION").to_owned(), schema, taken_at }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Relative, with slashes.
    pub path: String,
    pub size: u64,
    pub sha256: Digest,
}

/// The last line: how many files, and the digest of all lines before it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct End {
    files: usize,
    sha256: Digest,
}

#[derive(Debug, thiserror::Error)]
pub enum ListError {
    #[error("it has no {LIST}: it was cut off, or is no backup")]
    None,
    #[error("its {LIST} is cut off or damaged")]
    Damaged,
    #[error("it has format {found}, and this version of alloy knows {FORMAT}: use a newer one")]
    Format { found: u32 },
    #[error("it was taken by alloy {alloy}, whose database is newer than this version's: use that one, or a newer one")]
    Schema { alloy: String },
    #[error("{LIST}: {0}")]
    Io(io::Error),
}

/// Writes the list into a backup that is complete otherwise.
pub fn write(dir: &Path, head: &Head, entries: &[Entry]) -> io::Result<()> {
    let mut text = line(head)?;
    for entry in entries {
        text.push_str(&line(entry)?);
    }
    let end = End { files: entries.len(), sha256: Digest::of(text.as_bytes()) };
    text.push_str(&line(&end)?);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(dir.join(LIST))?;
    file.write_all(text.as_bytes())
}

fn line<T: Serialize>(value: &T) -> io::Result<String> {
    Ok(serde_json::to_string(value).map_err(io::Error::other)? + "\n")
}

/// Reads a list that is whole and that this version understands.
pub fn read(dir: &Path, schema: i64) -> Result<(Head, Vec<Entry>), ListError> {
    let text = match fs::read_to_string(dir.join(LIST)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(ListError::None),
        read => read.map_err(ListError::Io)?,
    };
    let (head, _) = text.split_once('\n').ok_or(ListError::Damaged)?;
    let head: Head = serde_json::from_str(head).map_err(|_| ListError::Damaged)?;
    if head.format != FORMAT {
        return Err(ListError::Format { found: head.format });
    }
    let body = text.strip_suffix('\n').ok_or(ListError::Damaged)?;
    let (lines, end) = body.rsplit_once('\n').ok_or(ListError::Damaged)?;
    let end: End = serde_json::from_str(end).map_err(|_| ListError::Damaged)?;
    let entries: Result<Vec<Entry>, _> = lines.lines().skip(1).map(serde_json::from_str).collect();
    let entries = entries.map_err(|_| ListError::Damaged)?;
    let whole = end.files == entries.len() && end.sha256 == Digest::of(format!("{lines}\n").as_bytes());
    if !whole || !entries.iter().all(|entry| is_inside(&entry.path)) {
        return Err(ListError::Damaged);
    }
    if head.schema > schema {
        return Err(ListError::Schema { alloy: head.alloy });
    }
    Ok((head, entries))
}

fn is_inside(path: &str) -> bool {
    !path.is_empty() && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)))
}
