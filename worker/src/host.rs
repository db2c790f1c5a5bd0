//! S: this machine: its facts, the state directory and who owns it, the worker's identity, free disk.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use alloy_shared::id::{Labels, WorkerId};
use alloy_shared::wire::network;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use serde::{Deserialize, Serialize};

use crate::lock::{self, NotTaken};

const LOCK: &str = "lock";
const IDENTITY: &str = "identity.json";
const KEY: &str = "worker.key";
/// The key of a worker that takes the place of one whose key is `KEY`, and so on in turn.
const OTHER_KEY: &str = "worker.other.key";

#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error("another worker{pid} uses {dir}; stop it, or give this one a directory of its own (ALLOY_STATE_DIR)")]
    Taken { dir: PathBuf, pid: String },
    #[error("{dir} holds no worker's identity; enrol this machine first: `worker join URL TOKEN`")]
    NotJoined { dir: PathBuf },
    #[error("{path}: {why}")]
    Damaged { path: PathBuf, why: String },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

fn io_at(path: &Path) -> impl FnOnce(io::Error) -> HostError + '_ {
    move |source| HostError::Io { path: path.to_owned(), source }
}

/// A state directory that no other worker uses. Dropping it, also by dying, sets it free.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    _lock: lock::Held,
}

impl StateDir {
    pub fn lock(path: &Path) -> Result<Self, HostError> {
        make_dir(path)?;
        let file = path.join(LOCK);
        match lock::take(&file) {
            Ok(held) => Ok(Self { path: path.to_owned(), _lock: held }),
            Err(NotTaken::Taken { pid }) => {
                let pid = pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default();
                Err(HostError::Taken { dir: path.to_owned(), pid })
            }
            Err(NotTaken::Io(error)) => Err(io_at(&file)(error)),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// What `join` leaves behind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The farm that this worker belongs to.
    pub url: String,
    pub worker: WorkerId,
    pub name: String,
    /// The key's file, relative to the state directory.
    pub key: String,
}

impl Identity {
    pub fn load(dir: &Path) -> Result<Self, HostError> {
        let path = dir.join(IDENTITY);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| HostError::Damaged { path, why: format!("{error}; enrol this machine again") }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(HostError::NotJoined { dir: dir.to_owned() }),
            Err(error) => Err(io_at(&path)(error)),
        }
    }

    pub(crate) fn save(dir: &Path, url: &str, worker: WorkerId, name: &str, key: &str) -> Result<Self, HostError> {
        let identity = Self { url: url.to_owned(), worker, name: name.to_owned(), key: key.to_owned() };
        let text = serde_json::to_vec_pretty(&identity).unwrap_or_else(|_| unreachable!("an identity is plain data"));
        write_new(&dir.join(IDENTITY), &text)?;
        Ok(identity)
    }

    /// Removes what a worker leaves that another one has taken the place of: its key, and attempts that only it might have
    /// finished.
    pub(crate) fn clear_away(self, dir: &Path) -> Result<(), HostError> {
        let (key, spool) = (dir.join(&self.key), dir.join("spool"));
        for (path, removed) in [(&key, fs::remove_file(&key)), (&spool, fs::remove_dir_all(&spool))] {
            match removed {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_at(path)(error)),
                Ok(()) | Err(_) => {}
            }
        }
        Ok(())
    }
}

/// The worker's Ed25519 key. It never leaves this machine.
#[derive(Debug)]
pub struct Key(Ed25519KeyPair);

impl Key {
    pub fn load(dir: &Path, identity: &Identity) -> Result<Self, HostError> {
        Self::read(&dir.join(&identity.key))
    }

    /// The file for the key of the next worker here.
    pub fn spare(old: Option<&Identity>) -> &'static str {
        if old.is_some_and(|old| old.key == KEY) { OTHER_KEY } else { KEY }
    }

    /// The key of an earlier try to join, or a new one: so a repeated try enrols the same worker.
    pub fn load_or_make(dir: &Path, file: &str) -> Result<Self, HostError> {
        make_dir(dir)?;
        let path = dir.join(file);
        if !path.exists() {
            let key = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
                .map_err(|_| HostError::Damaged { path: path.clone(), why: "no random bytes for a key".into() })?;
            write_new(&path, key.as_ref())?;
        }
        Self::read(&path)
    }

    fn read(path: &Path) -> Result<Self, HostError> {
        let bytes = fs::read(path).map_err(io_at(path))?;
        Ed25519KeyPair::from_pkcs8(&bytes)
            .map(Self)
            .map_err(|error| HostError::Damaged { path: path.to_owned(), why: format!("is no Ed25519 key: {error}") })
    }

    /// Base64 of the public half.
    pub fn public(&self) -> String {
        STANDARD.encode(self.0.public_key())
    }

    /// Base64 of the signature.
    pub fn sign(&self, text: &str) -> String {
        STANDARD.encode(self.0.sign(text.as_bytes()))
    }
}

/// What a farm may know of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    pub hostname: String,
    /// `macos`, `linux`.
    pub os: String,
    /// `arm64`, `x86_64`.
    pub arch: String,
    /// This worker's.
    pub version: String,
    pub cpus: u32,
}

impl HostFacts {
    pub fn read() -> Self {
        let hostname = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
        let arch = match std::env::consts::ARCH {
            "aarch64" => "arm64",
            other => other,
        };
        Self {
            hostname: hostname.unwrap_or_else(|| "unknown".to_owned()),
            os: std::env::consts::OS.to_owned(),
            arch: arch.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
        }
    }

    /// The labels that every worker has by itself, and then the configured ones, which win. Only the provider says
    /// whether this worker `restricts` a job's network.
    pub fn labels(&self, name: &str, configured: &Labels, restricts: bool) -> Labels {
        let mut labels = Labels::default();
        let ability = restricts.then_some(network::LABEL);
        let configured = configured.iter().filter(|(key, _)| *key != network::LABEL.0);
        let facts = [
            ("os", &*self.os),
            ("arch", &*self.arch),
            ("hostname", &*self.hostname),
            ("name", name),
            ("version", &*self.version),
        ];
        // Configured ones come first: together they may be more than fit.
        for (key, value) in ability.into_iter().chain(configured).chain(facts) {
            if labels.get(key).is_none() && labels.insert(key, &plain(value)).is_err() {
                tracing::warn!(key, "there are too many labels; this one is left out");
            }
        }
        labels
    }
}

/// The name of the user whom this process runs as.
pub fn user() -> String {
    match nix::unistd::User::from_uid(nix::unistd::getuid()) {
        Ok(Some(user)) => user.name,
        Ok(None) | Err(_) => "nobody".to_owned(),
    }
}

/// This process's search path, or the one of a system without further installations.
pub fn login_path() -> String {
    std::env::var("PATH")
        .ok()
        .filter(|path| !path.is_empty())
        .unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".to_owned())
}

/// A fact as a label's value: what a label cannot hold becomes `-`.
fn plain(text: &str) -> String {
    let fine = |c: char| c.is_ascii_alphanumeric() || "._-/:+".contains(c);
    let text: String = text.chars().take(63).map(|c| if fine(c) { c } else { '-' }).collect();
    if text.is_empty() { "unknown".to_owned() } else { text }
}

/// Asks how many bytes are free on a disk.
pub type FreeBytes = Box<dyn Fn() -> io::Result<u64> + Send + Sync>;

/// Bytes that this process may still write below `path`.
#[allow(clippy::useless_conversion, reason = "on macOS the count of blocks has 32 bits")]
pub fn disk_free(path: &Path) -> io::Result<u64> {
    let stat = nix::sys::statvfs::statvfs(path)?;
    Ok(u64::from(stat.blocks_available()) * u64::from(stat.fragment_size()))
}

fn make_dir(path: &Path) -> Result<(), HostError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io_at(path))
}

/// Writes a file for the owner alone, whole or not at all.
fn write_new(path: &Path, bytes: &[u8]) -> Result<(), HostError> {
    let temp = path.with_extension(format!("new-{}", std::process::id()));
    let written = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temp)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temp, path)?;
        File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    };
    written().map_err(io_at(path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_second_worker_on_the_same_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("worker");
        let first = StateDir::lock(&state).unwrap();
        let refused = StateDir::lock(&state).unwrap_err().to_string();
        assert!(refused.contains(&format!("(pid {})", std::process::id())), "{refused}");
        assert!(refused.contains("ALLOY_STATE_DIR"), "{refused}");
        drop(first);
        StateDir::lock(&state).unwrap();
    }

    #[test]
    fn a_key_is_made_once_for_its_owner_alone_and_signs() {
        let dir = tempfile::tempdir().unwrap();
        let key = Key::load_or_make(dir.path(), KEY).unwrap();
        assert_eq!(Key::load_or_make(dir.path(), KEY).unwrap().public(), key.public());
        let mode = fs::metadata(dir.path().join(KEY)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let public = STANDARD.decode(key.public()).unwrap();
        let verifier = ring::signature::UnparsedPublicKey::new(&ring::signature::ED25519, &public);
        let signature = STANDARD.decode(key.sign("hello")).unwrap();
        verifier.verify(b"hello", &signature).unwrap();
        assert!(verifier.verify(b"hell0", &signature).is_err());
        fs::write(dir.path().join(KEY), "no key").unwrap();
        assert!(Key::load_or_make(dir.path(), KEY).unwrap_err().to_string().contains("no Ed25519 key"));
    }

    #[test]
    fn an_identity_survives_and_its_absence_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Identity::load(dir.path()).unwrap_err().to_string().contains("worker join"));
        let saved = Identity::save(dir.path(), "http://farm:3000", WorkerId::from_raw(5), "mini-1", KEY).unwrap();
        assert_eq!(Identity::load(dir.path()).unwrap(), saved);
        fs::write(dir.path().join(IDENTITY), "{").unwrap();
        assert!(matches!(Identity::load(dir.path()), Err(HostError::Damaged { .. })));
    }

    #[test]
    fn a_worker_that_takes_anothers_place_has_a_key_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let first = Key::load_or_make(dir.path(), Key::spare(None)).unwrap().public();
        let old = Identity::save(dir.path(), "http://farm", WorkerId::from_raw(1), "a", Key::spare(None)).unwrap();
        let file = Key::spare(Some(&old));
        let second = Key::load_or_make(dir.path(), file).unwrap().public();
        assert!(first != second && Key::load_or_make(dir.path(), file).unwrap().public() == second);
        fs::create_dir_all(dir.path().join("spool/attempt")).unwrap();
        let new = Identity::save(dir.path(), "http://farm", WorkerId::from_raw(2), "b", file).unwrap();
        old.clear_away(dir.path()).unwrap();
        assert_eq!(Key::load(dir.path(), &new).unwrap().public(), second);
        assert!(!dir.path().join("spool").exists() && !dir.path().join(KEY).exists());
        assert_eq!(Key::spare(Some(&new)), KEY);
    }

    #[test]
    fn facts_become_labels_and_configured_ones_win() {
        let facts = HostFacts {
            hostname: "Ann's Mac mini".into(),
            os: "macos".into(),
            arch: "arm64".into(),
            version: "0.1.0".into(),
            cpus: 8,
        };
        let mut configured = Labels::default();
        configured.insert_pair("os=macos-15").unwrap();
        configured.insert_pair("site=berlin").unwrap();
        configured.insert_pair("network-policy=per-job").unwrap();
        let labels = facts.labels("mini-1", &configured, false);
        let shown: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        assert_eq!(
            shown,
            ["arch=arm64", "hostname=Ann-s-Mac-mini", "name=mini-1", "os=macos-15", "site=berlin", "version=0.1.0"]
        );
        let able = facts.labels("mini-1", &configured, true);
        assert_eq!((able.get("network-policy"), able.iter().count()), (Some("per-job"), labels.iter().count() + 1));
        assert!(disk_free(Path::new("/")).unwrap() > 0 && HostFacts::read().cpus > 0);
    }
}
