//! S: a log file that never grows beyond its bound, whoever started the daemon.
//!
//! The file's name always names the newest part; `NAME.1` is the part before it, and so on. Whoever follows by name (`tail -F`)
//! sees every line.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use alloy_shared::limits::{DAEMON_LOG_BYTES, DAEMON_LOGS};

#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: File,
    len: u64,
    /// Before a new part is begun.
    cap: u64,
}

impl LogFile {
    /// Continues the file, or makes it with its directory.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::open_with(path, DAEMON_LOG_BYTES)
    }

    fn open_with(path: &Path, cap: u64) -> io::Result<Self> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let file = append_to(path)?;
        let len = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, len, cap })
    }

    fn part(&self, number: u32) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{number}"));
        name.into()
    }

    /// Opens the new part before it moves the others: without room for open files none is pushed out.
    fn begin_new(&mut self) -> io::Result<()> {
        let mut new = self.path.clone().into_os_string();
        new.push(".new");
        let file = append_to(Path::new(&new))?;
        for number in (1..DAEMON_LOGS).rev() {
            ignore_missing(std::fs::rename(self.part(number), self.part(number + 1)))?;
        }
        ignore_missing(std::fs::rename(&self.path, self.part(1)))?;
        std::fs::rename(&new, &self.path).inspect_err(|_| {
            // It is still written to, and the next try moves it once more.
            std::fs::rename(self.part(1), &self.path).ok();
        })?;
        (self.file, self.len) = (file, 0);
        Ok(())
    }
}

impl Write for LogFile {
    /// Takes the line whole: a line is never in two parts.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.len > 0 && self.len.saturating_add(line.len() as u64) > self.cap {
            // Where none can be begun the part that there is grows on.
            let _ = self.begin_new();
        }
        self.file.write_all(line)?;
        self.len += line.len() as u64;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

fn ignore_missing(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: &Path) -> String {
        std::fs::read_to_string(path).unwrap_or_default()
    }

    #[test]
    fn the_parts_are_bounded_whole_lines_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("logs/worker.log");
        let mut log = LogFile::open_with(&path, 40).unwrap();
        for number in 0..60 {
            log.write_all(format!("line {number:03}\n").as_bytes()).unwrap();
        }
        drop(log);
        let mut log = LogFile::open_with(&path, 40).unwrap();
        log.write_all(b"after a restart\n").unwrap();
        let names = (1..=DAEMON_LOGS).rev().map(|number| log.part(number)).chain([path.clone()]);
        let texts: Vec<String> = names.map(|part| read(&part)).collect();
        assert!(texts.iter().all(|text| !text.is_empty() && text.len() <= 40 && text.ends_with('\n')), "{texts:?}");
        let all = texts.concat();
        let lines: Vec<&str> = all.lines().collect();
        let numbers: Vec<u32> = lines.iter().filter_map(|line| line.strip_prefix("line ")?.parse().ok()).collect();
        assert_eq!(numbers, (60 - numbers.len() as u32..60).collect::<Vec<_>>());
        assert_eq!(lines.last(), Some(&"after a restart"));
        assert_eq!(std::fs::read_dir(dir.path().join("logs")).unwrap().count(), 1 + DAEMON_LOGS as usize);
    }

    #[test]
    fn a_part_that_cannot_be_begun_pushes_none_out_and_no_line_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = LogFile::open_with(&dir.path().join("w.log"), 4).unwrap();
        for line in ["one\n", "two\n"] {
            log.write_all(line.as_bytes()).unwrap();
        }
        let in_the_way = dir.path().join("w.log.new");
        std::fs::create_dir(&in_the_way).unwrap();
        for line in ["3\n", "4\n", "5\n", "6\n", "7\n"] {
            log.write_all(line.as_bytes()).unwrap();
        }
        assert_eq!((read(&log.part(1)), read(&log.path)), ("one\n".into(), "two\n3\n4\n5\n6\n7\n".into()));
        std::fs::remove_dir(&in_the_way).unwrap();
        log.write_all(b"8\n").unwrap();
        assert_eq!((read(&log.part(2)), read(&log.path)), ("one\n".into(), "8\n".into()));
    }

    #[test]
    fn a_line_longer_than_the_bound_is_taken_whole() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = LogFile::open_with(&dir.path().join("w.log"), 4).unwrap();
        assert_eq!(log.write(b"longer than four\n").unwrap(), 17);
        assert_eq!(log.write(b"b\n").unwrap(), 2);
        assert_eq!(read(&log.part(1)), "longer than four\n");
        assert_eq!(read(&log.path), "b\n");
    }
}
