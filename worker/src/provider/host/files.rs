//! S: a workspace on the host's own disk: unpack into it, list and read what a stranger's command left there, remove it.

use std::collections::HashSet;
use std::fs::{DirBuilder, File, FileTimes, Metadata, OpenOptions, Permissions};
use std::io::{self, BufReader, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use alloy_shared::id::printable;
use alloy_shared::limits;
use alloy_shared::wire::source::check_path;
use bytes::Bytes;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::{AccessFlags, access};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::artifacts::Matcher;
use crate::provider::{GuestFile, Listing, Misfit, Room, VmError, VmFault};

/// How much of an archive is read at once.
const PIECE: usize = 1 << 20;
/// Names of the guards' records in a VM's directory start with this.
pub(super) const RECORD: &str = "guard-";
/// Names of directories beside the VMs that could not be removed with theirs start with this.
pub(super) const GONE: &str = ".gone-";

pub(super) fn records(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(RECORD)).map(|entry| entry.path()).collect()
}

/// Unpacks an archive of files, directories and links into a directory that nobody else writes to. Links are data: they
/// are made as they are, and nothing is ever written through one, whether this archive made it or not.
pub(super) fn unpack(tar: &Path, into: &Path, stop: &CancellationToken) -> Result<(), VmError> {
    let broken = |error: &std::io::Error| VmError::io(VmFault::File, "read the source archive", error);
    let file = File::open(tar).map_err(|error| broken(&error))?;
    let mut archive = tar::Archive::new(BufReader::with_capacity(PIECE, Wanted { file, stop }));
    let mut made = Made { root: into.to_owned(), dirs: HashSet::new() };
    make_dir(into).map_err(|error| VmError::io(VmFault::File, "make the workspace", &error))?;
    let (mut count, mut total) = (0usize, 0u64);
    for entry in archive.entries().map_err(|error| broken(&error))? {
        let mut entry = entry.map_err(|error| broken(&error))?;
        count += 1;
        total = total.saturating_add(entry.size());
        if count > limits::MANIFEST_ENTRIES_MAX || total > limits::SOURCE_BYTES_MAX {
            return Err(VmError::user(VmFault::File, "the source archive has too many entries or bytes"));
        }
        unpack_entry(&mut entry, &mut made)?;
    }
    Ok(())
}

/// A file that cannot be read any more once its reader was told to stop.
struct Wanted<'a> {
    file: File,
    stop: &'a CancellationToken,
}

impl Read for Wanted<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let len = self.file.read(out)?;
        match self.stop.is_cancelled() {
            true => Err(io::Error::other("nobody waits for it any more")),
            false => Ok(len),
        }
    }
}

/// Directories known to be real ones below the root.
struct Made {
    root: PathBuf,
    dirs: HashSet<PathBuf>,
}

impl Made {
    /// Makes every directory of `path`, refusing to pass through anything else.
    fn dir(&mut self, path: &Path) -> Result<(), String> {
        let mut at = PathBuf::new();
        for part in path.components() {
            at.push(part);
            if self.dirs.contains(&at) {
                continue;
            }
            let full = self.root.join(&at);
            match std::fs::symlink_metadata(&full) {
                Ok(meta) if meta.is_dir() => {}
                Ok(_) => {
                    return Err(format!("lies below `{}`, which is no directory", printable(&at.to_string_lossy())));
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    DirBuilder::new().mode(0o755).create(&full).map_err(|error| error.to_string())?;
                }
                Err(error) => return Err(error.to_string()),
            }
            self.dirs.insert(at.clone());
        }
        Ok(())
    }
}

fn unpack_entry(entry: &mut tar::Entry<'_, impl Read>, made: &mut Made) -> Result<(), VmError> {
    let raw = entry.path_bytes().into_owned();
    let shown = printable(&String::from_utf8_lossy(&raw));
    let refuse = |why: &str| VmError::user(VmFault::File, format!("{shown}: {why}"));
    let name = std::str::from_utf8(&raw).map_err(|_| refuse("the path is not UTF-8"))?;
    let name = name.strip_suffix('/').unwrap_or(name);
    check_path(name).map_err(|error| VmError::user(VmFault::File, error.to_string()))?;
    let path = Path::new(name);
    if let Some(parent) = path.parent() {
        made.dir(parent).map_err(|why| refuse(&why))?;
    }
    let full = made.root.join(path);
    match entry.header().entry_type() {
        tar::EntryType::Regular => {
            let header = entry.header();
            let mode = if header.mode().unwrap_or(0) & 0o111 == 0 { 0o644 } else { 0o755 };
            let mtime = UNIX_EPOCH + Duration::from_secs(header.mtime().unwrap_or(0));
            // `create_new` neither follows a link nor writes to what is there.
            let done = OpenOptions::new().write(true).create_new(true).mode(mode).open(&full).and_then(|mut file| {
                std::io::copy(entry, &mut file)?;
                // The daemon's umask is not the job's.
                file.set_permissions(Permissions::from_mode(mode))?;
                file.set_times(FileTimes::new().set_accessed(mtime).set_modified(mtime))
            });
            match done {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Err(refuse("is there twice")),
                done => done.map_err(|error| VmError::io(VmFault::File, &shown, &error)),
            }
        }
        tar::EntryType::Directory => made.dir(path).map_err(|why| refuse(&why)),
        tar::EntryType::Symlink => {
            let target = entry.link_name_bytes().ok_or_else(|| refuse("is a link to nothing"))?;
            let target = std::str::from_utf8(&target).map_err(|_| refuse("is a link to a name that is not UTF-8"))?;
            match std::os::unix::fs::symlink(target, &full) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Err(refuse("is there twice")),
                done => done.map_err(|error| VmError::io(VmFault::File, &shown, &error)),
            }
        }
        _ => Err(refuse("is no file, directory or symbolic link")),
    }
}

fn make_dir(dir: &Path) -> std::io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(dir)
}

/// Lists what the rules take, without following a link anywhere.
pub(super) fn list(root: &Path, rules: &Matcher, stop: &CancellationToken) -> Result<Listing, VmError> {
    list_up_to(root, rules, limits::WORKSPACE_ENTRIES_MAX, stop)
}

/// Like [`list`], looking at `most` entries at most.
pub(super) fn list_up_to(
    root: &Path,
    rules: &Matcher,
    most: usize,
    stop: &CancellationToken,
) -> Result<Listing, VmError> {
    let mut found = Found { most, stop: stop.clone(), ..Found::default() };
    for base in rules.bases() {
        // A base is plain text; on the way there a link is no directory either.
        match real_dirs(root, &base) {
            Ok(true) => visit(root, &base, rules, &mut found)?,
            Ok(false) => {}
            Err(closed) => found.close(&closed, rules),
        }
    }
    Ok(found.listing.sorted())
}

#[derive(Default)]
struct Found {
    listing: Listing,
    room: Room,
    /// Entries that were looked at, and how many may be.
    seen: usize,
    most: usize,
    stop: CancellationToken,
}

impl Found {
    /// Names a directory that lets nobody in or through, if a rule leads there.
    fn close(&mut self, dir: &Path, rules: &Matcher) {
        if rules.may_take_below(&dir.to_string_lossy()) {
            self.listing.refuse(dir.as_os_str().as_bytes().to_vec(), Misfit::Closed);
        }
    }
}

/// True when all above `path` are directories. The error is one that lets nobody through.
fn real_dirs(root: &Path, path: &str) -> Result<bool, PathBuf> {
    let mut at = PathBuf::new();
    let parents = path.rsplit_once('/').map_or("", |(up, _)| up);
    for part in parents.split('/').filter(|part| !part.is_empty()) {
        match std::fs::symlink_metadata(root.join(&at).join(part)) {
            Ok(meta) if meta.is_dir() => at.push(part),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(at),
            Ok(_) | Err(_) => return Ok(false),
        }
    }
    Ok(true)
}

/// Looks at `start` and all below it. A stack of its own: a stranger decides how deep directories go. It holds names of
/// directories only.
fn visit(root: &Path, start: &str, rules: &Matcher, found: &mut Found) -> Result<(), VmError> {
    let mut todo: Vec<PathBuf> = look(root, start.into(), rules, found)?.into_iter().collect();
    while let Some(path) = todo.pop() {
        let failed = |error: std::io::Error| VmError::io(VmFault::File, &printable(&path.to_string_lossy()), &error);
        let entries = match std::fs::read_dir(root.join(&path)) {
            Ok(entries) => entries,
            Err(error) => match error.kind() {
                io::ErrorKind::PermissionDenied => {
                    found.close(&path, rules);
                    continue;
                }
                // It has gone since.
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => continue,
                _ => return Err(failed(error)),
            },
        };
        for entry in entries {
            let entry = entry.map_err(failed)?;
            found.seen += 1;
            if found.stop.is_cancelled() {
                return Err(VmError::farm(VmFault::Lost, "nobody waits for the list any more"));
            }
            if found.seen > found.most {
                let why = format!("the artifact rules lead to more than {} entries; name narrower ones", found.most);
                return Err(VmError::user(VmFault::File, why));
            }
            todo.extend(look(root, path.join(entry.file_name()), rules, found)?);
        }
    }
    Ok(())
}

/// Takes one entry if the rules do. Returns the path of a directory, which is to be looked into.
fn look(root: &Path, path: PathBuf, rules: &Matcher, found: &mut Found) -> Result<Option<PathBuf>, VmError> {
    if let Some(above) = Misfit::too_deep(path.as_os_str().as_bytes()) {
        if rules.may_take_below(&String::from_utf8_lossy(above)) {
            found.listing.refuse(above.to_vec(), Misfit::Deep);
        }
        return Ok(None);
    }
    let full = root.join(&path);
    let meta = match std::fs::symlink_metadata(&full) {
        Ok(meta) => meta,
        Err(error) => {
            match error.kind() {
                // Its directory says what is in it and lets nobody through.
                io::ErrorKind::PermissionDenied => found.close(path.parent().unwrap_or(Path::new("")), rules),
                // It has gone since, or never was.
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {}
                _ if rules.takes(&path.to_string_lossy()) => {
                    found.listing.refuse(path.as_os_str().as_bytes().to_vec(), Misfit::Unreadable);
                }
                _ => {}
            }
            return Ok(None);
        }
    };
    let text = path.to_string_lossy();
    if !text.is_empty() && rules.excludes(&text) {
        return Ok(None);
    }
    if meta.is_dir() {
        drop(text);
        return Ok(Some(path));
    }
    if rules.takes(&text) {
        take(&full, path.as_os_str().as_bytes(), &meta, found)?;
    }
    Ok(None)
}

fn take(full: &Path, path: &[u8], meta: &Metadata, found: &mut Found) -> Result<(), VmError> {
    let (path, link) = match fit(full, path, meta) {
        Ok(fits) => fits,
        Err(Unreadable::Misfit(why)) => {
            found.listing.refuse(path.to_vec(), why);
            return Ok(());
        }
        Err(Unreadable::Disk(error)) => {
            return Err(VmError::user(VmFault::File, format!("{}: {error}", printable_bytes(path))));
        }
    };
    let size = if link.is_some() { 0 } else { meta.size() };
    let mode = if link.is_none() && meta.mode() & 0o111 != 0 { 0o755 } else { 0o644 };
    found.room.take(&mut found.listing, GuestFile { path: path.to_owned(), size, mode, link })
}

enum Unreadable {
    Misfit(Misfit),
    Disk(std::io::Error),
}

/// The path and a link's target as texts, if this can be an artifact.
fn fit<'a>(full: &Path, path: &'a [u8], meta: &Metadata) -> Result<(&'a str, Option<String>), Unreadable> {
    let kind = meta.file_type();
    let odd = match (kind.is_file() || kind.is_symlink(), kind.is_fifo(), kind.is_socket()) {
        (true, _, _) => None,
        (false, true, _) => Some(Misfit::Pipe),
        (false, false, true) => Some(Misfit::Socket),
        (false, false, false) => Some(Misfit::Device),
    };
    if let Some(odd) = odd {
        return Err(Unreadable::Misfit(odd));
    }
    let path = Misfit::check_path(path).map_err(Unreadable::Misfit)?;
    if !kind.is_symlink() {
        return match access(full, AccessFlags::R_OK) {
            Err(Errno::EACCES | Errno::EPERM) => Err(Unreadable::Misfit(Misfit::Unreadable)),
            Ok(()) | Err(_) => Ok((path, None)),
        };
    }
    let target = std::fs::read_link(full).map_err(Unreadable::Disk)?;
    let target = Misfit::check_target(target.into_os_string().into_vec()).map_err(Unreadable::Misfit)?;
    Ok((path, Some(target)))
}

fn printable_bytes(path: &[u8]) -> String {
    printable(&String::from_utf8_lossy(path))
}

/// Opens a regular file below the root, component by component, so that no link is followed even if one appears now.
pub(super) fn open_beneath(root: &Path, path: &str) -> Result<File, VmError> {
    let refuse = |why: &str| VmError::user(VmFault::File, format!("{}: {why}", printable(path)));
    check_path(path).map_err(|error| VmError::user(VmFault::File, error.to_string()))?;
    let step = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut at = File::open(root).map_err(|error| VmError::io(VmFault::File, "open the workspace", &error))?;
    let mut parts = path.split('/').peekable();
    while let Some(part) = parts.next() {
        // Without O_NONBLOCK, opening a pipe would wait for its writer.
        let last = if parts.peek().is_some() { OFlag::O_DIRECTORY } else { OFlag::O_NONBLOCK };
        let next = openat(&at, part, step | last, Mode::empty()).map_err(|error| refuse(error.desc()))?;
        at = File::from(next);
    }
    match at.metadata() {
        Ok(meta) if meta.is_file() => Ok(at),
        Ok(_) => Err(refuse("is no regular file")),
        Err(error) => Err(refuse(&error.to_string())),
    }
}

/// Sends a file's bytes. A failed read ends the stream short, which the reader notices.
pub(super) fn stream(file: File, limit: u64, tx: &mpsc::Sender<Bytes>) {
    let mut file = file.take(limit);
    loop {
        let mut chunk = vec![0; 256 << 10];
        let Ok(len @ 1..) = file.read(&mut chunk) else { return };
        chunk.truncate(len);
        if tx.blocking_send(chunk.into()).is_err() {
            return;
        }
    }
}

/// Removes a tree that its owner may have made unreadable. One that is gone already is a success. The error names the
/// first thing that stays; what else can be removed is, for it takes room.
pub(super) fn remove(dir: &Path) -> io::Result<()> {
    if remove_all(dir).is_ok() {
        return Ok(());
    }
    let obstacle = remove_each(dir);
    remove_all(dir).map_err(|error| obstacle.unwrap_or(error))
}

fn remove_all(dir: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Removes all below `dir` that can be, having given the owner every right on every directory. Returns what came first in
/// its way.
fn remove_each(dir: &Path) -> Option<io::Error> {
    let mut obstacle = None;
    let mut note = |path: &Path, done: io::Result<()>| match done {
        Err(error) if obstacle.is_none() && error.kind() != io::ErrorKind::NotFound => {
            let path = path.strip_prefix(dir).unwrap_or(path);
            obstacle = Some(io::Error::new(
                error.kind(),
                format!("{}: {error}", printable_bytes(path.as_os_str().as_bytes())),
            ));
        }
        Err(_) | Ok(()) => {}
    };
    let device = std::fs::symlink_metadata(dir).ok().filter(Metadata::is_dir)?.dev();
    let (mut dirs, mut next) = (vec![dir.to_owned()], 0);
    while let Some(at) = dirs.get(next).cloned() {
        next += 1;
        let _tells_later = std::fs::set_permissions(&at, Permissions::from_mode(0o700));
        let entries = match std::fs::read_dir(&at) {
            Ok(entries) => entries.flatten(),
            Err(error) => {
                note(&at, Err(error));
                continue;
            }
        };
        for entry in entries {
            let path = entry.path();
            match entry.metadata() {
                Ok(meta) if meta.is_dir() && meta.dev() == device => dirs.push(path),
                Ok(meta) if meta.is_dir() => note(&path, Err(io::Error::other("something is mounted there"))),
                Ok(_) => note(&path, std::fs::remove_file(&path)),
                Err(error) => note(&path, Err(error)),
            }
        }
    }
    for at in dirs.iter().skip(1).rev() {
        note(at, std::fs::remove_dir(at));
    }
    obstacle
}

/// Gives a directory that cannot be removed a name that no VM has, and returns its path.
pub(super) fn set_aside(dir: &Path, unique: u64) -> io::Result<PathBuf> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let aside = dir.with_file_name(format!("{GONE}{name}-{unique:016x}"));
    std::fs::rename(dir, &aside)?;
    Ok(aside)
}

/// Tries again to remove what was set aside. What stays was told about when that happened.
pub(super) fn remove_gone(vms: &Path) {
    for entry in std::fs::read_dir(vms).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(GONE)
            && let Err(error) = remove(&entry.path())
        {
            tracing::debug!(path = %entry.path().display(), %error, "it still cannot be removed");
        }
    }
}

#[cfg(test)]
mod tests;
