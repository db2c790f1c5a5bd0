//! S: reads a tree in parallel: names, modes, link targets, and the digests of every piece of every file.

use std::collections::HashSet;
use std::fs::{self, File, Metadata};
use std::io::Read as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use alloy_shared::id::{Digest, printable};
use alloy_shared::limits;
use alloy_shared::wire::source::{BadSource, EntryKind, check_path};
use ignore::{DirEntry, ParallelVisitor, ParallelVisitorBuilder, WalkBuilder, WalkState};
use nix::fcntl::OFlag;
use sha2::Digest as _;

use super::{NAMED_MAX, piece_len, secret};
use crate::output::Failure;

const READ_BUFFER: usize = 256 << 10;

/// Never part of a source: history, our own output, Finder's notes.
const LEFT_OUT: [&str; 3] = [".git", "alloy-out", ".DS_Store"];

#[derive(Debug)]
pub(super) struct Found {
    pub(super) path: String,
    pub(super) kind: EntryKind,
    pub(super) mode: u32,
    pub(super) size: u64,
    pub(super) chunks: Vec<Digest>,
    pub(super) target: Option<String>,
    /// What makes it look like a secret.
    pub(super) secret: Option<&'static str>,
    stamp: Stamp,
}

/// What changes when somebody writes to a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    len: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    inode: u64,
}

impl Stamp {
    fn of(meta: &Metadata) -> Self {
        Self {
            len: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
            inode: meta.ino(),
        }
    }
}

#[derive(Debug)]
pub(super) struct Refused {
    pub(super) path: String,
    pub(super) why: String,
}

#[derive(Debug, Default)]
pub(super) struct Walked {
    pub(super) found: Vec<Found>,
    pub(super) refused: Vec<Refused>,
    pub(super) warnings: Vec<String>,
}

pub(super) fn walk(root: &Path) -> Result<Walked, Failure> {
    // Rules from above the root count within one repository only: a stray ~/.gitignore must not empty a tree. So the walk
    // starts at the repository's top and goes down to the root, past everything else.
    let top = root.ancestors().find(|dir| dir.join(".git").exists()).unwrap_or(root);
    let mut builder = WalkBuilder::new(top);
    let below = root.to_owned();
    builder
        .hidden(false)
        .ignore(false)
        .git_global(false)
        .require_git(false)
        .parents(false)
        .add_custom_ignore_filename(".alloyignore")
        .filter_entry(move |entry| {
            let left_out = || LEFT_OUT.iter().any(|name| entry.file_name().as_encoded_bytes() == name.as_bytes());
            below.starts_with(entry.path()) || (entry.path().starts_with(&below) && !left_out())
        });
    let all = Mutex::new(Walked::default());
    let outputs = own_outputs();
    let reached = AtomicBool::new(false);
    builder.build_parallel().visit(&mut Visitors { root, outputs: &outputs, all: &all, reached: &reached });
    let mut walked = all.into_inner().unwrap_or_else(PoisonError::into_inner);
    if !reached.into_inner() {
        walked.warnings.push(format!(
            "nothing is sent: an ignore rule of the repository {} leaves out {}",
            top.display(),
            root.display()
        ));
    }
    if walked.found.len() > limits::MANIFEST_ENTRIES_MAX {
        return Err(Failure::error(format!(
            "{} has more than {} files; is it the directory you meant?",
            root.display(),
            limits::MANIFEST_ENTRIES_MAX
        ))
        .hint("alloy run -C DIR names the tree to send; .alloyignore leaves files out"));
    }
    Ok(walked)
}

/// Looks at every file again after all were read: a build that mixes two states of a tree is worth nothing.
pub(super) fn assert_unchanged(root: &Path, found: &[Found]) -> Result<(), Failure> {
    for found in found.iter().filter(|found| found.kind == EntryKind::File) {
        match fs::symlink_metadata(root.join(&found.path)) {
            Ok(meta) if Stamp::of(&meta) == found.stamp => {}
            Ok(_) => return Err(changed(&found.path, "was written to")),
            Err(_) => return Err(changed(&found.path, "vanished")),
        }
    }
    Ok(())
}

/// The failure for a file that was not the same at two looks.
pub(super) fn changed(path: &str, how: &str) -> Failure {
    Failure::error(format!("the tree changed while it was read: {} {how}", printable(path)))
        .hint("run it again when nothing writes there, or list the file in .alloyignore")
}

/// Files that this process's own output goes to: `alloy run … >build.log` must not send, or wait for, build.log.
fn own_outputs() -> HashSet<(u64, u64)> {
    let mut out = HashSet::new();
    for stat in
        [nix::sys::stat::fstat(std::io::stdout()), nix::sys::stat::fstat(std::io::stderr())].into_iter().flatten()
    {
        // The fields have other types on other systems.
        #[allow(clippy::unnecessary_cast, clippy::useless_conversion)]
        out.insert((stat.st_dev as u64, stat.st_ino as u64));
    }
    out
}

struct Visitors<'a> {
    root: &'a Path,
    outputs: &'a HashSet<(u64, u64)>,
    all: &'a Mutex<Walked>,
    /// Whether no rule kept the walk from the root itself.
    reached: &'a AtomicBool,
}

impl<'a> ParallelVisitorBuilder<'a> for Visitors<'a> {
    fn build(&mut self) -> Box<dyn ParallelVisitor + 'a> {
        Box::new(Visitor {
            root: self.root,
            outputs: self.outputs,
            all: self.all,
            reached: self.reached,
            own: Walked::default(),
            buffer: vec![0; READ_BUFFER],
        })
    }
}

/// One thread's share. It is merged when the thread ends.
struct Visitor<'a> {
    root: &'a Path,
    outputs: &'a HashSet<(u64, u64)>,
    all: &'a Mutex<Walked>,
    reached: &'a AtomicBool,
    own: Walked,
    buffer: Vec<u8>,
}

impl Drop for Visitor<'_> {
    fn drop(&mut self) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.found.append(&mut self.own.found);
        all.refused.append(&mut self.own.refused);
        all.warnings.append(&mut self.own.warnings);
        all.warnings.truncate(NAMED_MAX);
    }
}

impl ParallelVisitor for Visitor<'_> {
    fn visit(&mut self, entry: Result<DirEntry, ignore::Error>) -> WalkState {
        match entry {
            Ok(entry) => {
                if let Some(error) = entry.error() {
                    self.own.warnings.push(format!("an ignore rule was not understood: {error}"));
                }
                if self.root.starts_with(entry.path()) {
                    self.reached.fetch_or(entry.path() == self.root, Ordering::Relaxed);
                    return WalkState::Continue;
                }
                let name = entry.path().strip_prefix(self.root).unwrap_or(entry.path());
                match self.look(&entry, name) {
                    Ok(Some(found)) => self.own.found.push(found),
                    Ok(None) => {}
                    Err(why) => self.own.refused.push(Refused { path: printable(&name.to_string_lossy()), why }),
                }
            }
            Err(error) => self.own.refused.push(Refused { path: String::new(), why: error.to_string() }),
        }
        if self.own.found.len() > limits::MANIFEST_ENTRIES_MAX { WalkState::Quit } else { WalkState::Continue }
    }
}

impl Visitor<'_> {
    fn look(&mut self, entry: &DirEntry, name: &Path) -> Result<Option<Found>, String> {
        let path = name.to_str().ok_or("is a name that is not UTF-8")?.to_owned();
        match check_path(&path) {
            Ok(()) => {}
            Err(BadSource::Path { why, .. }) => return Err(format!("cannot go: {why}")),
            Err(bad) => return Err(bad.to_string()),
        }
        let meta = fs::symlink_metadata(entry.path()).map_err(|error| error.to_string())?;
        let stamp = Stamp::of(&meta);
        let kind = meta.file_type();
        let found =
            |kind, mode, size, chunks, target| Found { path, kind, mode, size, chunks, target, secret: None, stamp };
        if kind.is_dir() {
            Ok(Some(found(EntryKind::Dir, 0o755, 0, Vec::new(), None)))
        } else if kind.is_symlink() {
            let target = fs::read_link(entry.path()).map_err(|error| error.to_string())?;
            let target = target.to_str().ok_or("is a link whose target is not UTF-8")?.to_owned();
            Ok(Some(found(EntryKind::Symlink, 0o644, 0, Vec::new(), Some(target))))
        } else if kind.is_file() {
            if self.outputs.contains(&(meta.dev(), meta.ino())) {
                return Ok(None);
            }
            let (chunks, held) = self.hash(entry.path(), stamp)?;
            let mode = if meta.mode() & 0o100 == 0 { 0o644 } else { 0o755 };
            let found = found(EntryKind::File, mode, stamp.len, chunks, None);
            Ok(Some(Found { secret: secret::by_name(&found.path).or(held), ..found }))
        } else if kind.is_fifo() {
            Err("is a FIFO".into())
        } else if kind.is_socket() {
            Err("is a socket".into())
        } else {
            Err("is a device".into())
        }
    }

    /// Digests of the file's pieces, and what its head holds that must not travel. What is read must be what the stamp says,
    /// before and after.
    fn hash(&mut self, path: &Path, stamp: Stamp) -> Result<(Vec<Digest>, Option<&'static str>), String> {
        const CHANGED: &str = "changed while it was read";
        let text = |error: std::io::Error| error.to_string();
        let mut file = open(path).map_err(text)?;
        let piece = piece_len(stamp.len);
        let (mut chunks, mut hasher, mut in_piece, mut total) = (Vec::new(), sha2::Sha256::new(), 0u64, 0u64);
        let mut held = None;
        loop {
            let room = usize::try_from(piece.saturating_sub(in_piece)).unwrap_or(READ_BUFFER).clamp(1, READ_BUFFER);
            let n = file.read(&mut self.buffer[..room]).map_err(text)?;
            if n == 0 {
                break;
            }
            if total == 0 {
                held = secret::by_content(path, &self.buffer[..n]);
            }
            total += n as u64;
            in_piece += n as u64;
            if total > stamp.len {
                return Err(CHANGED.into());
            }
            hasher.update(&self.buffer[..n]);
            if in_piece == piece {
                chunks.push(Digest::from_hasher(std::mem::take(&mut hasher)));
                in_piece = 0;
            }
        }
        if in_piece > 0 {
            chunks.push(Digest::from_hasher(hasher));
        }
        let after = file.metadata().map_err(text)?;
        if total != stamp.len || Stamp::of(&after) != stamp {
            return Err(CHANGED.into());
        }
        Ok((chunks, held))
    }
}

/// Opens a file that must not be a link, and never waits for the other end of a FIFO.
pub(super) fn open(path: &Path) -> std::io::Result<File> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    fs::OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)
}
