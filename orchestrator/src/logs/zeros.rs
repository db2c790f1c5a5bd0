//! S: zeros at the end of a log's file: a power cut's, or the log's own. Once a log is known to be whole and ends in zeros,
//! that is written down beside it, in `ATTEMPT.whole`.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use alloy_shared::limits;

use super::files::read_at;
use crate::blobs::sync_dir;
use crate::sums::BLOCK;

/// Where the zeros begin that the file ends with, as far back as bytes may be that no worker was told are durable, and not
/// among those that are known to be the log's.
pub(super) fn begin(file: &File, log: &Path, len: u64) -> io::Result<u64> {
    let least = len.saturating_sub(limits::LOG_WINDOW).max(known(log)?).min(len);
    let mut end = len;
    while end > least {
        let start = end.saturating_sub(BLOCK).max(least);
        let block = read_at(file, start, (end - start) as usize)?;
        match block.iter().rposition(|byte| *byte != 0) {
            Some(last) => return Ok(start + last as u64 + 1),
            None => end = start,
        }
    }
    Ok(end)
}

/// How much of the log was written down to be its own.
fn known(log: &Path) -> io::Result<u64> {
    match fs::read(note_of(log)) {
        Ok(bytes) => Ok(bytes.try_into().map_or(0, u64::from_le_bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    }
}

/// The log has these bytes, and they are durable.
pub(super) fn keep(file: &File, log: &Path, len: u64) -> io::Result<()> {
    let ends_in_zero = len > 0 && read_at(file, len - 1, 1)?[..] == [0];
    if !ends_in_zero || known(log)? >= len {
        return Ok(());
    }
    replace(&note_of(log), &len.to_le_bytes())
}

fn note_of(log: &Path) -> PathBuf {
    log.with_extension("whole")
}

/// Puts a file there that is whole and durable, or none.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut temp = path.as_os_str().to_owned();
    temp.push(".new");
    let file = File::create(&temp)?;
    file.write_all_at(bytes, 0)?;
    file.sync_all()?;
    fs::rename(&temp, path)?;
    sync_dir(path.parent().unwrap_or(path))
}
