//! S: what a move has brought and read back, so that the next run need not do it again. A line that was cut off is none.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;

use alloy_shared::id::Digest;
use serde::{Deserialize, Serialize};

/// An object or a log whose bytes were read again where they went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Brought {
    pub(super) name: String,
    pub(super) len: u64,
    pub(super) sha256: Digest,
    /// Nothing more comes.
    pub(super) last: bool,
}

#[derive(Debug, Default)]
pub(super) struct Journal {
    file: Option<File>,
    known: HashMap<String, Brought>,
}

impl Journal {
    /// Goes on with the journal of the move that has this name, or begins one.
    pub(super) fn open(path: &Path, name: &str) -> io::Result<Self> {
        let text = match std::fs::read_to_string(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            read => read?,
        };
        let mut lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
        let own = lines.next() == Some(name);
        let known: HashMap<_, _> = lines
            .filter_map(|line| serde_json::from_str::<Brought>(line).ok())
            .map(|brought| (brought.name.clone(), brought))
            .collect();
        let mut file = OpenOptions::new().append(true).create(true).open(path)?;
        if !own {
            file.set_len(0)?;
            writeln!(file, "{name}")?;
            return Ok(Self { file: Some(file), known: HashMap::new() });
        }
        if !text.ends_with('\n') {
            writeln!(file)?;
        }
        Ok(Self { file: Some(file), known })
    }

    /// The first word of the name of the move that the journal there is of.
    pub(super) fn of(path: &Path) -> io::Result<Option<String>> {
        let text = match std::fs::read_to_string(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read?,
        };
        let name = text.split_once('\n').map_or("", |(name, _)| name);
        Ok(name.split(' ').next().filter(|id| !id.is_empty()).map(str::to_owned))
    }

    pub(super) fn get(&self, name: &str) -> Option<&Brought> {
        self.known.get(name)
    }

    pub(super) fn add(&mut self, brought: Brought) -> io::Result<()> {
        if let Some(file) = &mut self.file {
            writeln!(file, "{}", serde_json::to_string(&brought).map_err(io::Error::other)?)?;
        }
        self.known.insert(brought.name.clone(), brought);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn brought(name: &str) -> Brought {
        Brought { name: name.into(), len: 3, sha256: Digest::of(b"abc"), last: true }
    }

    #[test]
    fn a_journal_goes_on_behind_a_line_that_was_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        assert_eq!(Journal::of(&path).unwrap(), None);
        let mut first = Journal::open(&path, "one").unwrap();
        first.add(brought("a")).unwrap();
        first.add(brought("b")).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 9]).unwrap();
        assert_eq!(Journal::of(&path).unwrap().as_deref(), Some("one"));
        let mut second = Journal::open(&path, "one").unwrap();
        assert_eq!((second.get("a"), second.get("b")), (Some(&brought("a")), None));
        second.add(brought("c")).unwrap();
        let third = Journal::open(&path, "one").unwrap();
        assert!(third.get("a").is_some() && third.get("c").is_some() && third.get("b").is_none());
        assert!(Journal::open(&path, "two").unwrap().get("a").is_none(), "another move knows nothing of it");
        assert!(Journal::open(&path, "one").unwrap().get("a").is_none());
    }
}
