//! A simulated Mac for tests: one directory with a `TART_HOME` (or several), a registry, leases, faults and a journal, and
//! the environment in which a worker finds the simulated `tart` first. Nothing of it may be left when a test ends.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use crate::observe::{PATIENCE, until_blocking};
use crate::process::{Found, processes_in, signal};
pub use crate::tart::fault::NAMES as FAULTS;
pub use crate::tart::image::{Agent, Boot, Profile};
pub use crate::tart::journal::Entry;
pub use crate::tart::softnet::Policy;
use crate::tart::{self, host};

/// What a test wants of its host.
#[derive(Debug, Clone)]
pub struct Setup {
    pub version: &'static str,
    /// Divides every simulated delay.
    pub time_scale: f64,
    /// Guests of their own roots and namespaces, where this process may make them.
    pub isolated: bool,
    /// The first published form of softnet's control protocol.
    pub first_softnet: bool,
    /// Paths that no guest may see, besides the host's own.
    pub hidden: Vec<PathBuf>,
}

impl Default for Setup {
    fn default() -> Self {
        Self { version: "2.35.0", time_scale: 100.0, isolated: true, first_softnet: false, hidden: Vec::new() }
    }
}

pub struct SimHost {
    dir: TempDir,
    setup: Setup,
    registry: PathBuf,
}

impl SimHost {
    pub fn new(setup: Setup) -> Result<SimHost> {
        let dir = tempfile::Builder::new().prefix("sim-mac-").tempdir()?;
        let registry = dir.path().join("mac/registry");
        let host = SimHost { dir, setup, registry };
        for dir in [host.home(), host.host(), host.bin(), host.registry.clone(), host.dir().join("user")] {
            fs::create_dir_all(dir)?;
        }
        for program in ["tart", "softnet"] {
            symlink(built(program)?, host.bin().join(program))?;
        }
        Ok(host)
    }

    /// A host whose images come from the registry of another one.
    pub fn with_registry_of(setup: Setup, other: &SimHost) -> Result<SimHost> {
        let mut host = SimHost::new(setup)?;
        host.registry = other.registry.clone();
        Ok(host)
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn home(&self) -> PathBuf {
        self.other_home("tart-home")
    }

    /// A second `TART_HOME` of the same host: another user's, say.
    pub fn other_home(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    fn host(&self) -> PathBuf {
        self.dir().join("mac")
    }

    /// The directory with `tart` and `softnet`.
    pub fn bin(&self) -> PathBuf {
        self.dir().join("bin")
    }

    pub fn tart_path(&self) -> PathBuf {
        self.bin().join("tart")
    }

    /// Homebrew replaced it, or nobody installed it.
    pub fn uninstall(&self, program: &str) -> io::Result<()> {
        fs::remove_file(self.bin().join(program))
    }

    /// What a worker, or a test's own `tart`, runs with.
    pub fn env(&self) -> Vec<(String, String)> {
        let text = |path: PathBuf| path.to_str().expect("a temporary directory has a plain name").to_owned();
        let machine = std::env::var("PATH").unwrap_or_else(|_| "/usr/bin:/bin".into());
        // Of other hosts on this machine a guest shall see nothing either.
        let hidden = self.setup.hidden.iter().cloned().chain([std::env::temp_dir()]);
        let hidden: Vec<_> = hidden.map(|path| path.display().to_string()).collect();
        let mut env = vec![
            ("PATH", format!("{}:{machine}", text(self.bin()))),
            ("HOME", text(self.dir().join("user"))),
            ("TART_HOME", text(self.home())),
            ("ALLOY_HOST_DIR", text(self.host())),
            ("TART_NO_AUTO_PRUNE", "1".into()),
            ("CI", "1".into()),
            ("SIM_TART_HOST", text(self.host())),
            ("SIM_TART_REGISTRY", text(self.registry.clone())),
            ("SIM_TART_VERSION", self.setup.version.into()),
            ("SIM_TART_TIME_SCALE", self.setup.time_scale.to_string()),
            ("SIM_TART_FAULTS", text(self.dir().join("faults.json"))),
            ("SIM_TART_JOURNAL", text(self.journal_path())),
            ("SIM_TART_HIDE", hidden.join(":")),
        ];
        if !self.setup.isolated {
            env.push(("SIM_TART_ISOLATION", "none".into()));
        }
        if self.setup.first_softnet {
            env.push(("SIM_TART_SOFTNET", "revision".into()));
        }
        env.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    /// `tart ARGS` on this host.
    pub fn tart(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.tart_path());
        command.args(args).env_clear().envs(self.env());
        command
    }

    /// Puts an image into the registry, or moves its tag, and returns the digest.
    pub fn publish(&self, name: &str, profile: &Profile) -> Result<String> {
        let text = serde_json::to_vec(profile)?;
        let hex: String = Sha256::digest(&text).iter().map(|byte| format!("{byte:02x}")).collect();
        let digest = format!("sha256:{hex}");
        let (repository, tag) = name.rsplit_once(':').context("an image is published by its tag")?;
        let repository = self.registry.join(repository);
        for (dir, file, text) in [("manifests", &*digest, &*text), ("tags", tag, digest.as_bytes())] {
            fs::create_dir_all(repository.join(dir))?;
            let part = repository.join(dir).join(format!("{file}.part"));
            fs::write(&part, text)?;
            fs::rename(part, repository.join(dir).join(file))?;
        }
        Ok(digest)
    }

    /// Replaces the fault rules; nothing was counted for the new ones yet.
    pub fn faults(&self, rules: &[Value]) {
        let path = self.dir().join("faults.json");
        let part = path.with_extension("part");
        fs::write(&part, serde_json::to_vec(rules).expect("rules are JSON")).expect("a file");
        // Without rules nothing counts, so no invocation can meet new rules with old counts.
        let _ = fs::remove_file(&path);
        let _ = fs::remove_file(path.with_extension("counts"));
        fs::rename(part, path).expect("a file");
    }

    /// Room on the disk of the host.
    pub fn set_capacity_gb(&self, gb: f64) -> io::Result<()> {
        host::Facts { capacity_gb: gb }.write(&self.host())
    }

    /// Heals what only a reboot heals. VMs that run must be stopped first.
    pub fn reboot(&self) -> io::Result<()> {
        host::reboot(&self.host())
    }

    pub fn lease_file(&self) -> PathBuf {
        tart::lease::path(&self.host())
    }

    fn journal_path(&self) -> PathBuf {
        self.dir().join("journal")
    }

    /// Every invocation so far, in the order of starting.
    pub fn journal(&self) -> Vec<Entry> {
        tart::journal::read(&self.journal_path()).unwrap_or_default()
    }

    /// The policy of a VM's softnet, as it was set last.
    pub fn softnet_policy(&self, vm: &str) -> Option<Policy> {
        serde_json::from_slice(&fs::read(tart::softnet::policy_path(&self.host(), vm)).ok()?).ok()
    }

    /// What the guest's own processes said about their troubles.
    pub fn console(&self, vm: &str) -> String {
        fs::read_to_string(self.host().join("console").join(vm)).unwrap_or_default()
    }

    /// Names of local VMs, also of incomplete ones.
    pub fn vms(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(self.home().join("vms")).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    /// Processes of this host: `tart`, `softnet`, guests and everything in them.
    pub fn processes(&self) -> Vec<Found> {
        let mut found = processes_in(self.dir());
        let inside = namespaces_of(&found);
        found.extend(
            processes_in_namespaces(&inside)
                .into_iter()
                .filter(|new| !found.iter().any(|f| f.pid == new.pid))
                .collect::<Vec<_>>(),
        );
        found
    }

    /// What a host at rest must not have: VMs, processes with their namespaces, mounts, work in `tmp`.
    pub fn leaks(&self) -> Vec<String> {
        let mut leaks: Vec<_> = self.vms().into_iter().map(|vm| format!("VM {vm}")).collect();
        leaks.extend(self.processes().into_iter().map(|found| format!("process {} {}", found.pid, found.line)));
        let needle = self.dir().display().to_string();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        leaks.extend(mounts.lines().filter(|line| line.contains(&needle)).map(|line| format!("mount {line}")));
        let tmp = fs::read_dir(self.home().join("tmp")).into_iter().flatten().flatten();
        leaks.extend(tmp.map(|entry| format!("tmp {}", entry.file_name().display())));
        leaks
    }

    /// Waits until the last process has gone; anything else that is left fails at once.
    #[track_caller]
    pub fn assert_no_leak(&self) {
        let gone = until_blocking("no process of the simulated host is left", PATIENCE, || self.processes().is_empty());
        assert!(gone.is_ok() && self.leaks().is_empty(), "left on the simulated host: {:#?}", self.leaks());
    }
}

impl Drop for SimHost {
    fn drop(&mut self) {
        for found in self.processes() {
            signal(found.pid, nix::sys::signal::Signal::SIGKILL);
        }
        let _ = until_blocking("the simulated host is empty", PATIENCE, || self.processes().is_empty());
    }
}

/// The executable beside this test's own.
fn built(name: &str) -> Result<PathBuf> {
    let dir = crate::farm::bin_dir();
    let path = dir.join(name);
    anyhow::ensure!(path.exists(), "no `{name}` in {}: cargo build -p alloy-tests --bins", dir.display());
    Ok(path.canonicalize()?)
}

/// The PID namespaces of these processes that are not ours.
#[cfg(target_os = "linux")]
fn namespaces_of(found: &[Found]) -> BTreeSet<u64> {
    use std::os::unix::fs::MetadataExt as _;
    let of = |pid: &str, kind: &str| fs::metadata(format!("/proc/{pid}/ns/{kind}")).map(|found| found.ino()).ok();
    let own = of("self", "pid");
    found
        .iter()
        .flat_map(|found| [of(&found.pid.to_string(), "pid"), of(&found.pid.to_string(), "pid_for_children")])
        .flatten()
        .filter(|ino| Some(*ino) != own)
        .collect()
}

#[cfg(target_os = "linux")]
fn processes_in_namespaces(namespaces: &BTreeSet<u64>) -> Vec<Found> {
    use std::os::unix::fs::MetadataExt as _;
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let ino = fs::metadata(entry.path().join("ns/pid")).ok()?.ino();
            let line = fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default().replace('\0', " ");
            namespaces.contains(&ino).then_some(Found { pid, line, state: '?' })
        })
        .collect()
}

#[cfg(not(target_os = "linux"))]
fn namespaces_of(_: &[Found]) -> BTreeSet<u64> {
    BTreeSet::new()
}

#[cfg(not(target_os = "linux"))]
fn processes_in_namespaces(_: &BTreeSet<u64>) -> Vec<Found> {
    Vec::new()
}
