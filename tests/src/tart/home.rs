//! `TART_HOME` on disk: VM directories, their configuration, remote names and the cache of images.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use super::context::{Sim, dice, wall};
use super::image::Profile;
use super::{Failure, lock};

pub(crate) const GB: u64 = 1_000_000_000;
pub(crate) const MIB: u64 = 1 << 20;
/// The part of a VM directory that only the simulator has: its profile, and below `guest` what the guest wrote.
const EXTRA: &str = "sim.json";

/// `config.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Config {
    pub(crate) version: u32,
    pub(crate) os: String,
    pub(crate) arch: String,
    pub(crate) ecid: String,
    pub(crate) hardware_model: String,
    pub(crate) cpu_count_min: u64,
    pub(crate) cpu_count: u64,
    pub(crate) memory_size_min: u64,
    pub(crate) memory_size: u64,
    pub(crate) mac_address: String,
    pub(crate) display: Display,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) display_refit: Option<bool>,
    pub(crate) disk_format: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Display {
    pub(crate) width: u64,
    pub(crate) height: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) unit: Option<String>,
}

/// `sim.json`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Extra {
    pub(crate) profile: Profile,
    /// Bytes that the guest wrote, beside those of the image.
    pub(crate) grown: u64,
    /// When the saved state was made.
    pub(crate) suspended_at_ms: Option<i64>,
    /// What the saved state was made with; a restore with anything else fails.
    pub(crate) saved_with: Option<String>,
}

impl Config {
    pub(crate) fn of(profile: &Profile) -> Config {
        Config {
            version: 1,
            os: profile.os.clone(),
            arch: "arm64".into(),
            ecid: STANDARD.encode(dice().to_be_bytes()),
            hardware_model: STANDARD.encode("VirtualMac2,1"),
            cpu_count_min: profile.cpu_min,
            cpu_count: profile.cpu,
            memory_size_min: profile.memory_mib_min * MIB,
            memory_size: profile.memory_mib * MIB,
            mac_address: new_mac(),
            display: Display { width: 1024, height: 768, unit: None },
            display_refit: None,
            disk_format: "raw".into(),
        }
    }

    pub(crate) fn read(path: &Path) -> Result<Config, Failure> {
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    }

    /// In place, as `tart` does it: a reader can meet half of it.
    pub(crate) fn write(&self, path: &Path) -> Result<(), Failure> {
        Ok(fs::write(path, serde_json::to_vec(self)?)?)
    }
}

/// A unicast address of local administration.
pub(crate) fn new_mac() -> String {
    let bytes = dice().to_be_bytes();
    let first = (bytes[0] & 0xfc) | 0x02;
    let rest = bytes[1..6].iter().map(|byte| format!(":{byte:02x}"));
    format!("{first:02x}{}", rest.collect::<String>())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Running,
    Suspended,
    Stopped,
}

impl State {
    pub(crate) fn text(self) -> &'static str {
        match self {
            State::Running => "running",
            State::Suspended => "suspended",
            State::Stopped => "stopped",
        }
    }
}

/// A directory with the files of a VM or of an image.
#[derive(Debug, Clone)]
pub(crate) struct VmDir {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
}

impl VmDir {
    pub(crate) fn local(sim: &Sim, name: &str) -> VmDir {
        VmDir { name: name.to_owned(), path: sim.vms().join(name) }
    }

    /// The VM of that name, which must be complete.
    pub(crate) fn open(sim: &Sim, name: &str) -> Result<VmDir, Failure> {
        let vm = VmDir::local(sim, name);
        if name.contains('/') || !vm.exists() {
            return Err(Failure::no_vm(name));
        }
        vm.complete()?;
        touch(&vm.path);
        Ok(vm)
    }

    pub(crate) fn exists(&self) -> bool {
        self.config_path().exists()
    }

    pub(crate) fn complete(&self) -> Result<(), Failure> {
        let missing = ["config.json", "disk.img", "nvram.bin"].iter().filter(|name| !self.path.join(name).exists());
        let missing: Vec<_> = missing.copied().collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(Failure::Bare(format!("VM is missing files for a supported layout: {}", missing.join(", "))))
    }

    pub(crate) fn config_path(&self) -> PathBuf {
        self.path.join("config.json")
    }

    pub(crate) fn state_path(&self) -> PathBuf {
        self.path.join("state.vzvmsave")
    }

    pub(crate) fn disk_path(&self) -> PathBuf {
        self.path.join("disk.img")
    }

    /// Where the guest's own files are.
    pub(crate) fn guest_path(&self) -> PathBuf {
        self.path.join("guest")
    }

    pub(crate) fn config(&self) -> Result<Config, Failure> {
        Config::read(&self.config_path())
    }

    pub(crate) fn extra(&self) -> Extra {
        let text = fs::read(self.path.join(EXTRA)).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    pub(crate) fn write_extra(&self, extra: &Extra) -> Result<(), Failure> {
        Ok(fs::write(self.path.join(EXTRA), serde_json::to_vec(extra)?)?)
    }

    /// The pid of the process that runs it.
    pub(crate) fn runner(&self) -> Option<i32> {
        lock::holder(File::open(self.config_path()).ok()?).ok().flatten()
    }

    pub(crate) fn state(&self) -> State {
        if self.runner().is_some() {
            State::Running
        } else if self.state_path().exists() {
            State::Suspended
        } else {
            State::Stopped
        }
    }

    pub(crate) fn disk_bytes(&self) -> u64 {
        fs::metadata(self.disk_path()).map_or(0, |found| found.len())
    }

    pub(crate) fn accessed(&self) -> SystemTime {
        fs::metadata(&self.path).and_then(|found| found.accessed()).unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// Makes the files of an image that nobody has used yet.
    pub(crate) fn fill(&self, profile: &Profile) -> Result<(), Failure> {
        fs::create_dir_all(&self.path)?;
        Config::of(profile).write(&self.config_path())?;
        File::create(self.disk_path())?.set_len(profile.disk_gb * GB)?;
        fs::write(self.path.join("nvram.bin"), b"nvram")?;
        self.write_extra(&Extra { profile: profile.clone(), ..Extra::default() })?;
        for (path, text) in &profile.files {
            let file = self.guest_path().join("upper").join(path.trim_start_matches('/'));
            fs::create_dir_all(file.parent().expect("a file is in a directory"))?;
            fs::write(file, text)?;
        }
        Ok(())
    }
}

/// "Access" is the time of the directory, set at every opening.
pub(crate) fn touch(path: &Path) {
    set_accessed(path, wall());
}

pub(crate) fn set_accessed(path: &Path, time: SystemTime) {
    let times = fs::FileTimes::new().set_accessed(time).set_modified(time);
    // A directory that went meanwhile was not accessed.
    let _ = File::open(path).and_then(|dir| dir.set_times(times));
}

pub(crate) fn never() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1)
}

/// Every local VM by name.
pub(crate) fn local_vms(sim: &Sim) -> Vec<VmDir> {
    let entries = fs::read_dir(sim.vms()).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut vms: Vec<_> = names.map(|name| VmDir::local(sim, &name)).filter(VmDir::exists).collect();
    vms.sort_by(|a, b| a.name.cmp(&b.name));
    vms
}

/// `host[:port]/path[:tag|@sha256:hex]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RemoteName {
    pub(crate) host: String,
    pub(crate) path: String,
    pub(crate) reference: Reference,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reference {
    Tag(String),
    Digest(String),
}

impl RemoteName {
    /// Nothing for a local name: that has no slash.
    pub(crate) fn parse(text: &str) -> Option<RemoteName> {
        let (host, rest) = text.split_once('/')?;
        let (path, reference) = match rest.split_once('@') {
            Some((path, digest)) => (path, Reference::Digest(digest.to_owned())),
            None => match rest.rsplit_once(':') {
                Some((path, tag)) => (path, Reference::Tag(tag.to_owned())),
                None => (rest, Reference::Tag("latest".to_owned())),
            },
        };
        let valid =
            !host.is_empty() && !path.is_empty() && !path.split('/').any(|part| matches!(part, "" | "." | ".."));
        valid.then(|| RemoteName { host: host.to_owned(), path: path.to_owned(), reference })
    }

    pub(crate) fn with(&self, digest: &str) -> RemoteName {
        RemoteName { reference: Reference::Digest(digest.to_owned()), ..self.clone() }
    }

    /// The directory of the host, which is the lock of its pulls.
    pub(crate) fn host_dir(&self, sim: &Sim) -> PathBuf {
        sim.home.join("cache/OCIs").join(self.host.replace(':', "%3A"))
    }

    /// The directory of the digest, or the link of the tag.
    pub(crate) fn cached(&self, sim: &Sim) -> PathBuf {
        let (Reference::Tag(last) | Reference::Digest(last)) = &self.reference;
        self.host_dir(sim).join(&self.path).join(last)
    }

    /// The digest that the cache has for it.
    pub(crate) fn cached_digest(&self, sim: &Sim) -> Option<String> {
        let path = self.cached(sim);
        match &self.reference {
            Reference::Digest(digest) => path.join("config.json").exists().then(|| digest.clone()),
            Reference::Tag(_) => {
                let target = fs::read_link(&path).ok()?;
                let there = path.join("config.json").exists();
                there.then(|| target.to_string_lossy().into_owned())
            }
        }
    }
}

impl std::fmt::Display for RemoteName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.reference {
            Reference::Tag(tag) => write!(f, "{}/{}:{tag}", self.host, self.path),
            Reference::Digest(digest) => write!(f, "{}/{}@{digest}", self.host, self.path),
        }
    }
}

/// Every tag and every digest of the cache, by name.
pub(crate) fn cached_images(sim: &Sim) -> Vec<VmDir> {
    let mut found = Vec::new();
    let root = sim.home.join("cache/OCIs");
    walk_images(&root, &mut Vec::new(), &mut found);
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

fn walk_images(dir: &Path, above: &mut Vec<String>, found: &mut Vec<VmDir>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(last) = entry.file_name().into_string() else { continue };
        let path = entry.path();
        let is_link = path.is_symlink();
        if path.join("config.json").exists() {
            let separator = if is_link { ':' } else { '@' };
            let name = format!("{}{separator}{last}", above.join("/").replace("%3A", ":"));
            found.push(VmDir { name, path });
        } else if path.is_dir() && !is_link {
            above.push(last);
            walk_images(&path, above, found);
            above.pop();
        }
    }
}
