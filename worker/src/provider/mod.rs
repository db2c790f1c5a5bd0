//! T: what a virtual machine can do for a job. Tart, the plain host and a simulation offer the same two traits.
//!
//! A provider makes and destroys VMs, a guest is one that can run a command. Guests are strangers: every list and every
//! byte that comes out of one is bounded and checked by whoever asked.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use alloy_shared::id::{BadName, Digest, shorten};
use alloy_shared::wire::image::PullProgress;
use alloy_shared::wire::job::Blame;
use alloy_shared::wire::network::Network;
use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

mod agent;
mod blocking;
pub mod host;
mod listing;
pub mod tart;

pub use alloy_shared::wire::rule::{ArtifactRule, RuleKind};
use listing::Room;
pub use listing::{Listing, Misfit, Unfit};

#[async_trait]
pub trait VmProvider: Send + Sync {
    /// Lists the VMs of this worker, whatever state they are in, and no others.
    async fn list(&self) -> Result<Vec<VmName>, VmError>;
    /// Lists the images that a VM can be made of at once.
    async fn images(&self) -> Result<Vec<Image>, VmError>;
    /// True if images come from somewhere else. Otherwise there are those that there are.
    fn pulls(&self) -> bool;
    /// The image's digest, if VMs can be made of it at once. Asks nobody beyond this host.
    async fn find(&self, image: &ImageRef) -> Result<Option<Digest>, VmError>;
    /// Brings an image onto this host as its name stands for it now, however long that takes while it goes on. `stop` breaks
    /// it off, which is an error then. What was downloaded stays of use after a failure.
    async fn pull(
        &self,
        image: &ImageRef,
        progress: &watch::Sender<PullProgress>,
        stop: &CancellationToken,
    ) -> Result<Digest, VmError>;
    /// Removes an image with all its names. VMs that were made of it stay. One that is gone already is a success.
    async fn remove(&self, image: &Digest) -> Result<(), VmError>;
    /// Removes one of several tags of an image. One that is gone already is a success.
    async fn untag(&self, tag: &ImageRef) -> Result<(), VmError> {
        Err(VmError::farm(VmFault::Destroy, format!("images have one name each here: {tag} cannot go alone")))
    }
    async fn create(&self, vm: &VmName, image: &Digest, shape: &Shape) -> Result<(), VmError>;
    /// Returns when a command can run. The guest sees `inbox` read-only.
    async fn boot(&self, vm: &VmName, inbox: &Path) -> Result<Arc<dyn Guest>, VmError>;
    /// False where a job runs on the host itself: there is no VM that could be warm or cold.
    fn makes_vms(&self) -> bool {
        true
    }
    /// True when it can put another network policy than its own default in force.
    fn restricts(&self) -> bool {
        false
    }
    /// Puts the job's network policy in force and confirms it; on any doubt it fails and the VM is not used.
    async fn restrict(&self, vm: &VmName, network: &NetworkPolicy) -> Result<(), VmError>;
    /// Kills and removes the VM with its directory on the host. A VM that is gone already is a success.
    async fn destroy(&self, vm: &VmName) -> Result<(), VmError>;
}

#[async_trait]
pub trait Guest: Send + Sync {
    /// The absolute path of the workspace, as commands in the guest see it.
    fn workspace(&self) -> &str;
    /// Unpacks the archive of this name, which lies in the inbox, into a directory of the workspace (`""`: the workspace).
    /// The caller has the deadline, here and for [`Guest::list`]: what a job brings and leaves may be large.
    async fn unpack(&self, tar: &str, into: &str) -> Result<(), VmError>;
    async fn exec(&self, command: &Command) -> Result<Exec, VmError>;
    /// Streams a file of the workspace, at most `limit` bytes. A stream that ends short of the listed size means that
    /// the file changed or that the guest is lost.
    async fn read(&self, path: &str, limit: u64) -> Result<mpsc::Receiver<Bytes>, VmError>;
    /// Lists what the rules take in the workspace. What cannot be taken out spoils nothing: it is named beside the rest.
    async fn list(&self, rules: &[ArtifactRule]) -> Result<Listing, VmError>;
    /// How long its boot took, as far as its provider tells the parts apart.
    fn boot_times(&self) -> BootTimes {
        BootTimes::default()
    }
    /// Returns when the guest is no more, though nobody has asked it to go, and says why.
    async fn ended(&self) -> VmError {
        std::future::pending().await
    }
}

/// The parts of a boot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BootTimes {
    /// Until the VM runs.
    pub boot_ms: Option<u64>,
    /// From then until its guest is prepared.
    pub agent_ms: Option<u64>,
}

/// Where a VM's files on the host lie. The provider removes the directory with the VM.
pub fn vm_dir(state_dir: &Path, vm: &VmName) -> PathBuf {
    state_dir.join("vms").join(vm.as_str())
}

/// What the guest sees read-only.
pub fn inbox_of(state_dir: &Path, vm: &VmName) -> PathBuf {
    vm_dir(state_dir, vm).join("inbox")
}

/// A VM's name. It is never used twice, and its shape is all that tells our VMs from those that people keep beside them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmName(String);

impl VmName {
    const PREFIX: &'static str = "alloy-";

    /// Names the `n`-th VM of a daemon's run; `nonce` is the run's throw of the dice.
    pub fn mint(nonce: u32, n: u64) -> Self {
        Self(format!("{}{nonce:08x}-{n}", Self::PREFIX))
    }

    pub fn parse(text: &str) -> Result<Self, BadName> {
        let minted = || {
            let (nonce, n) = text.strip_prefix(Self::PREFIX)?.split_once('-')?;
            Some(Self::mint(u32::from_str_radix(nonce, 16).ok()?, n.parse().ok()?))
        };
        minted().filter(|name| name.0 == text).ok_or_else(|| BadName {
            what: "VM name",
            why: "is `alloy-`, eight hexadecimal digits, `-` and a number".to_owned(),
        })
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An image as people write it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageRef(pub String);

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    pub digest: Digest,
    /// What it is called here, in full.
    pub names: Vec<ImageRef>,
    pub size_bytes: u64,
    /// It was brought from somewhere and can be brought again. What is not must never be removed.
    pub removable: bool,
}

/// A VM's size. Absent: the image's own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shape {
    pub cpus: Option<u32>,
    pub memory_mib: Option<u32>,
}

/// Whom a guest may talk to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum NetworkPolicy {
    /// The provider's own default. VMs: the public internet, no private ranges. The plain host: whatever the host can reach.
    #[default]
    Default,
    /// Nobody at all.
    None,
    /// These IPv4 ranges and nobody else.
    Only(Vec<String>),
}

impl From<&Network> for NetworkPolicy {
    fn from(asked: &Network) -> Self {
        match asked {
            Network::Default => Self::Default,
            Network::None => Self::None,
            Network::Allow(ranges) => Self::Only(ranges.clone()),
        }
    }
}

/// A file or a link that a guest offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestFile {
    /// Relative to the workspace, with `/`.
    pub path: String,
    pub size: u64,
    /// 0o755 or 0o644.
    pub mode: u32,
    pub link: Option<String>,
}

/// A command for a guest. Its environment starts from nothing: the guest adds HOME, USER, PATH and TMPDIR where `env`
/// does not name them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    pub run: Run,
    pub env: BTreeMap<String, String>,
    /// Relative to the workspace; `""` is the workspace.
    pub workdir: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Run {
    /// A line for the guest's shell.
    Shell(String),
    /// A program and its arguments, without a shell.
    Argv(Vec<String>),
}

/// A command that runs. Dropping it kills the command.
#[derive(Debug)]
pub struct Exec {
    pub input: mpsc::Sender<ExecInput>,
    /// Ends with `Exit` or `Lost`. A channel that closes without either means lost, never success.
    pub output: mpsc::Receiver<ExecOutput>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecInput {
    Signal(Signal),
}

/// What may be sent to the command and everything that it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    Term,
    Kill,
}

#[derive(Debug, Clone, PartialEq)]
pub enum ExecOutput {
    /// Standard output and error, in the order written.
    Bytes(Bytes),
    /// The command and all that it started are gone, and every byte was sent.
    Exit(Exit),
    Lost(VmError),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    Code(i32),
    Signal(i32),
}

/// Why a VM did not do what it was asked. `tail` is for people: the last words of whoever failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {tail}")]
pub struct VmError {
    pub what: VmFault,
    pub blame: Blame,
    /// True when the same call may succeed later or elsewhere.
    pub retry: bool,
    pub tail: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VmFault {
    #[error("no such image here")]
    NoImage,
    #[error("the image could not be pulled")]
    Pull,
    #[error("the VM did not start")]
    Start,
    /// No VM will start here until the host is looked after.
    #[error("this host cannot run VMs")]
    Host,
    /// The host counts as many VMs as it may run, or has something of a VM locked.
    #[error("this host has no room for a VM")]
    Full,
    /// Another worker of this host runs VMs in its places.
    #[error("another worker has this host's places for VMs")]
    Taken,
    #[error("the VM is lost")]
    Lost,
    #[error("the worker's lease on the job ended")]
    Fenced,
    #[error("the network policy is not in force")]
    Network,
    #[error("the disk is full")]
    Disk,
    #[error("the VM could not be removed")]
    Destroy,
    /// What lies in the workspace cannot be taken out, or what is sent cannot be put in.
    #[error("a file is refused")]
    File,
}

impl VmError {
    /// What runs without a lease is killed, whoever notices first.
    pub fn fenced() -> Self {
        Self::farm(VmFault::Fenced, "it did not reach the farm for too long, and killed the command")
    }

    /// Makes an error that the host or the VM is to blame for.
    pub fn farm(what: VmFault, tail: impl Into<String>) -> Self {
        Self { what, blame: Blame::Farm, retry: true, tail: shorten(tail.into()) }
    }

    /// Makes an error that the job's author is to blame for.
    pub fn user(what: VmFault, tail: impl Into<String>) -> Self {
        Self { what, blame: Blame::User, retry: false, tail: shorten(tail.into()) }
    }

    /// Makes an error that a limit or a decision is to blame for.
    pub fn policy(what: VmFault, tail: impl Into<String>) -> Self {
        Self { what, blame: Blame::Policy, retry: false, tail: shorten(tail.into()) }
    }

    /// A fault of this host's files: a full disk, or else `what`.
    pub fn io(what: VmFault, doing: &str, error: &std::io::Error) -> Self {
        let full = matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded);
        Self::farm(if full { VmFault::Disk } else { what }, format!("{doing}: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_says_without_end_fits_into_a_message() {
        let error = VmError::user(VmFault::Pull, "é".repeat(1 << 20));
        assert_eq!(error.tail.len(), alloy_shared::limits::MESSAGE_MAX);
    }

    #[test]
    fn a_vm_name_survives_its_text_and_strangers_are_refused() {
        let name = VmName::mint(0xdead_beef, 12);
        assert_eq!(name.as_str(), "alloy-deadbeef-12");
        assert_eq!(VmName::parse(name.as_str()), Ok(name));
        for wrong in ["", "base", "alloy-../x", "alloy-A", "my-alloy-1", "alloy-a/b"] {
            assert!(VmName::parse(wrong).is_err(), "{wrong}");
        }
        // What our own recipes make, and what people might.
        for theirs in ["alloy-macos-xcode", "alloy-linux", "alloy-golden-1", "alloy-deadbeef", "alloy-deadbeef-1-old"] {
            assert!(VmName::parse(theirs).is_err(), "{theirs}");
        }
        for near in ["alloy-DEADBEEF-1", "alloy-eadbeef-1", "alloy-+eadbeef-1", "alloy-deadbeef-", "alloy-deadbeef-01"]
        {
            assert!(VmName::parse(near).is_err(), "{near}");
        }
    }

    #[test]
    fn a_full_disk_is_told_from_other_faults() {
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        assert_eq!(VmError::io(VmFault::Start, "mkdir", &full).what, VmFault::Disk);
        let other = std::io::Error::from(std::io::ErrorKind::PermissionDenied);
        assert_eq!(VmError::io(VmFault::Start, "mkdir", &other).what, VmFault::Start);
    }
}
