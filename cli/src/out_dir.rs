//! S: writes a job's artifacts below one directory and nowhere else.
//!
//! Names and links come from a stranger's virtual machine. Every directory on the way is opened on its own, relative to the
//! one before it and never through a link, so that nothing that lies in the tree, or is put there meanwhile, can lead a
//! write elsewhere. A file appears whole and verified, or not at all.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use alloy_shared::id::Digest;
use alloy_shared::wire::job::ArtifactView;
use alloy_shared::wire::source::{check_path, link_stays_inside};
use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat, renameat};
use nix::sys::signal::kill;
use nix::sys::stat::{Mode, SFlag, fstatat, mkdirat};
use nix::unistd::{Pid, UnlinkatFlags, symlinkat, unlinkat};
use sha2::Digest as _;

/// The directory beside the sources that collects everything.
pub(crate) const COLLECTION: &str = "alloy-out";
const LATEST: &str = "latest";
/// Of a file that is not whole yet.
const PART: &str = ".alloy-part";
/// Directories in one another that are looked into for halves of files: each is held open.
const SWEPT_DEEP: u32 = 64;
const DIR_FLAGS: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// Why an artifact is not on the disk.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OutError {
    /// Its name or target leads out of the directory. The others are not concerned.
    #[error("{0}")]
    Unsafe(String),
    /// Something else lies where a directory must be.
    #[error("{0}")]
    InTheWay(String),
    #[error("{0}")]
    Damaged(String),
    #[error("{path}: {error}")]
    Io { path: String, error: io::Error },
}

impl OutError {
    fn io(path: &str, error: impl Into<io::Error>) -> Self {
        Self::Io { path: path.to_owned(), error: error.into() }
    }
}

/// An open directory that artifacts are written into.
#[derive(Debug)]
pub(crate) struct OutDir {
    root: OwnedFd,
    shown: PathBuf,
}

impl OutDir {
    /// A directory that the user named: links on the way to it are the user's own.
    pub(crate) fn at(path: &Path) -> Result<Self, OutError> {
        let shown = path.display().to_string();
        fs::create_dir_all(path).map_err(|error| OutError::io(&shown, error))?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = open(path, flags, Mode::empty()).map_err(|error| OutError::io(&shown, error))?;
        Ok(Self { root, shown: path.to_owned() })
    }

    /// `<dir>/alloy-out/<job>`, with `latest` pointing at it. The collection ignores itself, for git and for Alloy.
    pub(crate) fn of_job(dir: &Path, job: &str) -> Result<Self, OutError> {
        let collection = dir.join(COLLECTION);
        let shown = collection.display().to_string();
        let base = Self::at(dir)?;
        let all = Self { root: base.enter(&base.root, COLLECTION, &shown)?, shown: collection };
        all.ignore_itself()?;
        let root = all.enter(&all.root, job, job)?;
        sweep(&root, SWEPT_DEEP);
        all.point_latest_at(job)?;
        Ok(Self { root, shown: all.shown.join(job) })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.shown
    }

    /// Starts a file. It gets its name in [`Incoming::finish`].
    pub(crate) fn create(&self, artifact: &ArtifactView) -> Result<Incoming, OutError> {
        let (dir, name) = self.parent(&artifact.path)?;
        let temp = temp_name(&name);
        let mode = if artifact.mode & 0o111 == 0 { 0o644 } else { 0o755 };
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mode = Mode::from_bits_truncate(mode);
        // What a killed process of the same number left under this name is half of some file.
        let _ = unlinkat(&dir, temp.as_str(), UnlinkatFlags::NoRemoveDir);
        let file = openat(&dir, temp.as_str(), flags, mode).map_err(|error| OutError::io(&artifact.path, error))?;
        let expected = artifact.clone();
        Ok(Incoming {
            dir,
            name,
            temp,
            file: File::from(file),
            hasher: sha2::Sha256::new(),
            written: 0,
            expected,
            done: false,
        })
    }

    /// Makes a link whose target stays inside, whatever else is linked where.
    pub(crate) fn link(&self, path: &str, target: &str) -> Result<(), OutError> {
        if !link_stays_inside(path, target) || climbs_after_descending(target) {
            return Err(OutError::Unsafe(format!("`{path}` is a link that leaves the directory (to `{target}`)")));
        }
        let (dir, name) = self.parent(path)?;
        let temp = temp_name(&name);
        let _ = unlinkat(&dir, temp.as_str(), UnlinkatFlags::NoRemoveDir);
        let made =
            symlinkat(target, &dir, temp.as_str()).and_then(|()| renameat(&dir, temp.as_str(), &dir, name.as_str()));
        made.map_err(|error| {
            let _ = unlinkat(&dir, temp.as_str(), UnlinkatFlags::NoRemoveDir);
            OutError::io(path, error)
        })
    }

    /// Removes a file that turned out not to be the job's, and the directories that were there for nothing else.
    pub(crate) fn remove(&self, path: &str) -> Result<(), OutError> {
        let (dir, name) = self.parent(path)?;
        match unlinkat(&dir, name.as_str(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(error) => return Err(OutError::io(path, error)),
        }
        let mut below = path;
        while let Some((above, _)) = below.rsplit_once('/') {
            let (dir, name) = self.parent(above)?;
            if unlinkat(&dir, name.as_str(), UnlinkatFlags::RemoveDir).is_err() {
                // Something else is in it.
                break;
            }
            below = above;
        }
        Ok(())
    }

    /// Opens the directory that a path lies in, making what is missing, and gives the last component.
    fn parent(&self, path: &str) -> Result<(OwnedFd, String), OutError> {
        check_path(path).map_err(|error| OutError::Unsafe(error.to_string()))?;
        let mut parts = path.split('/').peekable();
        let mut dir = self.root.try_clone().map_err(|error| OutError::io(path, error))?;
        loop {
            let part = parts.next().unwrap_or_default();
            if parts.peek().is_none() {
                return Ok((dir, part.to_owned()));
            }
            dir = self.enter(&dir, part, path)?;
        }
    }

    fn enter(&self, dir: &OwnedFd, name: &str, path: &str) -> Result<OwnedFd, OutError> {
        match mkdirat(dir, name, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(OutError::io(path, error)),
        }
        match openat(dir, name, DIR_FLAGS, Mode::empty()) {
            Ok(fd) => Ok(fd),
            Err(Errno::ELOOP | Errno::ENOTDIR) => {
                let (way, why): (fn(String) -> OutError, _) = if is_link(dir, name) {
                    (OutError::Unsafe, "a link")
                } else {
                    (OutError::InTheWay, "no directory")
                };
                Err(way(format!("`{path}` is not written: `{name}` on the way to it is {why}")))
            }
            Err(error) => Err(OutError::io(path, error)),
        }
    }

    fn ignore_itself(&self) -> Result<(), OutError> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        match openat(&self.root, ".gitignore", flags, Mode::from_bits_truncate(0o644)) {
            Ok(fd) => File::from(fd).write_all(b"*\n").map_err(|error| OutError::io(".gitignore", error)),
            Err(Errno::EEXIST) => Ok(()),
            Err(error) => Err(OutError::io(".gitignore", error)),
        }
    }

    fn point_latest_at(&self, job: &str) -> Result<(), OutError> {
        match fstatat(&self.root, LATEST, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFLNK => {
                return Err(OutError::Unsafe(format!("`{COLLECTION}/{LATEST}` exists and is no link of Alloy's")));
            }
            Ok(_) | Err(Errno::ENOENT) => {}
            Err(error) => return Err(OutError::io(LATEST, error)),
        }
        self.link(LATEST, job)
    }
}

fn is_link(dir: &OwnedFd, name: &str) -> bool {
    fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)
        .is_ok_and(|stat| SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFLNK)
}

/// `a/..` is the root only if `a` is no link: a target that climbs after it went down is not judged by its text.
fn climbs_after_descending(target: &str) -> bool {
    let mut down = false;
    target.split('/').any(|part| match part {
        "" | "." => false,
        ".." => down,
        _ => {
            down = true;
            false
        }
    })
}

/// No two files on their way in share a name, however alike the names that they will get.
fn temp_name(name: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let short: String = name.chars().take(40).collect();
    format!(".{short}.{}-{}{PART}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// The process that writes a file of this name, if it is the name of one that is not whole yet.
fn writer_of(name: &str) -> Option<Pid> {
    let (_, writer) = name.strip_prefix('.')?.strip_suffix(PART)?.rsplit_once('.')?;
    let (pid, number) = writer.split_once('-')?;
    number.parse::<u64>().ok()?;
    pid.parse().ok().filter(|pid| *pid > 0).map(Pid::from_raw)
}

/// Removes the halves of files that killed processes left. What cannot be looked into or removed stays: it is in nobody's way.
fn sweep(dir: &OwnedFd, deep: u32) {
    let Ok(mut entries) = Dir::openat(dir, ".", DIR_FLAGS, Mode::empty()) else { return };
    for entry in entries.iter().flatten() {
        let Ok(name) = entry.file_name().to_str() else { continue };
        let is_dir = entry.file_type() == Some(Type::Directory) && !matches!(name, "." | "..");
        if is_dir && deep > 0 {
            if let Ok(below) = openat(dir, name, DIR_FLAGS, Mode::empty()) {
                sweep(&below, deep - 1);
            }
        } else if writer_of(name).is_some_and(|pid| kill(pid, None) == Err(Errno::ESRCH)) {
            let _ = unlinkat(dir, name, UnlinkatFlags::NoRemoveDir);
        }
    }
}

/// A file on its way in. Dropped unfinished, it leaves nothing.
#[derive(Debug)]
pub(crate) struct Incoming {
    dir: OwnedFd,
    name: String,
    temp: String,
    file: File,
    hasher: sha2::Sha256,
    written: u64,
    expected: ArtifactView,
    done: bool,
}

impl Incoming {
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), OutError> {
        let path = &self.expected.path;
        self.written += bytes.len() as u64;
        if self.written > self.expected.size_bytes {
            return Err(OutError::Damaged(format!("`{path}` is longer than {} bytes", self.expected.size_bytes)));
        }
        self.hasher.update(bytes);
        self.file.write_all(bytes).map_err(|error| OutError::io(path, error))
    }

    /// Checks length and digest; only then does the file get its name.
    pub(crate) fn finish(mut self) -> Result<(), OutError> {
        let path = &self.expected.path;
        let (want, have) = (self.expected.size_bytes, self.written);
        if want != have {
            return Err(OutError::Damaged(format!("`{path}` has {have} bytes, not {want}")));
        }
        let digest = Digest::from_hasher(std::mem::take(&mut self.hasher));
        if digest != self.expected.sha256 {
            return Err(OutError::Damaged(format!("`{path}` arrived damaged: its SHA-256 is {digest}")));
        }
        renameat(self.dir.as_fd(), self.temp.as_str(), self.dir.as_fd(), self.name.as_str())
            .map_err(|error| OutError::io(path, error))?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.done {
            // If even this fails, a hidden part file is left behind.
            let _ = unlinkat(self.dir.as_fd(), self.temp.as_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn view(path: &str, bytes: &[u8]) -> ArtifactView {
        ArtifactView {
            path: path.into(),
            size_bytes: bytes.len() as u64,
            sha256: Digest::of(bytes),
            mode: 0o644,
            link: None,
        }
    }

    fn put(out: &OutDir, path: &str, bytes: &[u8]) -> Result<(), OutError> {
        let mut file = out.create(&view(path, bytes))?;
        file.write(bytes)?;
        file.finish()
    }

    fn files(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_job_gets_its_directory_and_latest_points_at_it() {
        let dir = tempfile::tempdir().unwrap();
        for job in ["job_a", "job_b"] {
            let out = OutDir::of_job(dir.path(), job).unwrap();
            put(&out, "deep/er/file", job.as_bytes()).unwrap();
        }
        let all = dir.path().join(COLLECTION);
        assert_eq!(fs::read_link(all.join(LATEST)).unwrap(), Path::new("job_b"));
        assert_eq!(fs::read(all.join("latest/deep/er/file")).unwrap(), b"job_b");
        assert_eq!(fs::read(all.join("job_a/deep/er/file")).unwrap(), b"job_a");
        assert_eq!(fs::read(all.join(".gitignore")).unwrap(), b"*\n");
    }

    #[test]
    fn halves_of_files_stay_only_while_their_writer_lives() {
        let mut gone = std::process::Command::new("true").spawn().unwrap();
        gone.wait().unwrap();
        let dir = tempfile::tempdir().unwrap();
        OutDir::of_job(dir.path(), "job_a").unwrap();
        let job = dir.path().join(COLLECTION).join("job_a");
        fs::create_dir(job.join("deep")).unwrap();
        let part = |pid: u32| format!(".app.zip.{pid}-3{PART}");
        let (mine, its) = (part(std::process::id()), part(gone.id()));
        let strange = [format!(".app.-1-3{PART}"), format!(".app.{}-x{PART}", gone.id()), format!("app{PART}")];
        for name in strange.iter().chain([&mine, &its]) {
            fs::write(job.join(name), "half").unwrap();
            fs::write(job.join("deep").join(name), "half").unwrap();
        }
        OutDir::of_job(dir.path(), "job_a").unwrap();
        for dir in [job.join("deep"), job] {
            assert!(!dir.join(&its).exists() && dir.join(&mine).exists(), "{:?}", files(&dir));
            assert!(
                strange.iter().all(|name| dir.join(name).exists()),
                "others may have such files: {:?}",
                files(&dir)
            );
        }
    }

    #[test]
    fn modes_are_two_and_content_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let out = OutDir::at(dir.path()).unwrap();
        put(&out, "tool", b"old").unwrap();
        let mut file = out.create(&ArtifactView { mode: 0o4777, ..view("tool", b"new") }).unwrap();
        file.write(b"new").unwrap();
        file.finish().unwrap();
        assert_eq!(fs::read(dir.path().join("tool")).unwrap(), b"new");
        assert_eq!(fs::metadata(dir.path().join("tool")).unwrap().permissions().mode() & 0o7777, 0o755);
    }

    #[test]
    fn files_that_arrive_at_once_do_not_meet() {
        let dir = tempfile::tempdir().unwrap();
        let out = OutDir::at(dir.path()).unwrap();
        let name = |n: u32| format!("{}{n}", "long".repeat(20));
        let bytes = |n: u32| format!("content {n}").into_bytes();
        let mut open: Vec<Incoming> = (0..3).map(|n| out.create(&view(&name(n), &bytes(n))).unwrap()).collect();
        for (n, file) in (0..).zip(&mut open) {
            file.write(&bytes(n)).unwrap();
        }
        for file in open {
            file.finish().unwrap();
        }
        for n in 0..3 {
            assert_eq!(fs::read(dir.path().join(name(n))).unwrap(), bytes(n));
        }
    }

    #[test]
    fn damaged_or_cut_content_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let out = OutDir::at(dir.path()).unwrap();
        for bytes in [&b"other"[..], b"goo", b"good and more"] {
            let mut file = out.create(&view("f", b"good!")).unwrap();
            let outcome = file.write(bytes).and_then(|()| file.finish());
            assert!(matches!(outcome, Err(OutError::Damaged(_))), "{outcome:?}");
        }
        drop(out.create(&view("f", b"good!")).unwrap());
        assert_eq!(files(dir.path()), [""; 0]);
    }

    #[test]
    fn names_and_links_cannot_lead_out() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        let out = OutDir::at(&dir.path().join("out")).unwrap();
        for path in ["../outside/x", "/etc/x", "a/../../x", "", "a//b", "."] {
            assert!(matches!(put(&out, path, b"x"), Err(OutError::Unsafe(_))), "{path}");
            assert!(out.link(path, "y").is_err(), "{path}");
        }
        for (path, target) in
            [("l", "/etc"), ("l", ".."), ("a/l", "../../x"), ("l", "self/../.."), ("sub/l", "../here/..")]
        {
            assert!(matches!(out.link(path, target), Err(OutError::Unsafe(_))), "{path} -> {target}");
        }
        // Planted in the tree, whether as an artifact or by somebody else: not followed.
        symlink(&outside, dir.path().join("out/planted")).unwrap();
        out.link("inner", "a").unwrap();
        put(&out, "a/file", b"1").unwrap();
        for path in ["planted/x", "planted/deep/x", "inner/x"] {
            assert!(matches!(put(&out, path, b"x"), Err(OutError::Unsafe(_))), "{path}");
        }
        let kept_out = put(&out, "a/file/x", b"x");
        assert!(matches!(kept_out, Err(OutError::InTheWay(_))), "what leads nowhere else is left out for no reason");
        assert_eq!(files(&outside), [""; 0]);
        // A file takes a link's place; the link's target is not touched.
        fs::write(outside.join("victim"), "safe").unwrap();
        symlink(outside.join("victim"), dir.path().join("out/victim")).unwrap();
        put(&out, "victim", b"mine").unwrap();
        assert_eq!(fs::read(outside.join("victim")).unwrap(), b"safe");
        assert_eq!(fs::read(dir.path().join("out/victim")).unwrap(), b"mine");
    }

    #[test]
    fn links_that_stay_inside_arrive() {
        let dir = tempfile::tempdir().unwrap();
        let out = OutDir::at(dir.path()).unwrap();
        put(&out, "App.framework/Versions/A/App", b"bin").unwrap();
        out.link("App.framework/Versions/Current", "A").unwrap();
        out.link("App.framework/App", "Versions/Current/App").unwrap();
        out.link("App.framework/up", "../App.framework/App").unwrap();
        assert_eq!(fs::read(dir.path().join("App.framework/App")).unwrap(), b"bin");
        out.link("App.framework/App", "Versions/A/App").unwrap();
        assert_eq!(fs::read_link(dir.path().join("App.framework/App")).unwrap(), Path::new("Versions/A/App"));
        out.remove("App.framework/App").unwrap();
        assert_eq!(files(&dir.path().join("App.framework")), ["Versions", "up"]);
        out.remove("App.framework/Versions/Current").unwrap();
        out.remove("App.framework/Versions/A/App").unwrap();
        assert_eq!(files(&dir.path().join("App.framework")), ["up"], "no empty directory is left");
    }

    #[test]
    fn a_collection_that_is_a_link_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        symlink(elsewhere.path(), dir.path().join(COLLECTION)).unwrap();
        assert!(matches!(OutDir::of_job(dir.path(), "job_a"), Err(OutError::Unsafe(_))));
        assert_eq!(files(elsewhere.path()), [""; 0]);
    }
}
