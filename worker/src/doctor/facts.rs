//! D: what can be known of this machine, and how the answers of its programs are read.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::config::Provider;

/// Something that was looked at, or why it was not.
pub type Fact<T> = Result<T, String>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum System {
    Macos,
    Linux,
    Other,
}

impl System {
    /// From the word of `std::env::consts::OS`.
    pub fn parse(word: &str) -> Self {
        match word {
            "macos" => Self::Macos,
            "linux" => Self::Linux,
            _ => Self::Other,
        }
    }
}

/// What a check may ask for. Paths are as the person would type them.
#[derive(Debug, Clone)]
pub struct Facts {
    pub system: System,
    pub provider: Provider,
    pub slots: usize,
    pub image: String,
    pub user: String,
    pub state_dir: PathBuf,
    pub identity: Identity,
    /// State directory, identity and key, as far as they exist.
    pub files: Vec<FileMode>,
    pub disks: Vec<Fact<Disk>>,
    /// Absent: it is not known which farm.
    pub farm: Option<Farm>,
    /// A network time service says that it keeps the clock.
    pub clock_kept: Fact<bool>,
    /// Absent: no such program on the path.
    pub tart: Option<Tart>,
    pub softnet: Option<Softnet>,
    pub service: Fact<Service>,
    /// Files that one process may open.
    pub open_files: Fact<u64>,
    /// On a Mac.
    pub mac: Option<Mac>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    Missing,
    Damaged(String),
    Joined { name: String, url: String },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileMode {
    pub path: PathBuf,
    pub mode: u32,
    /// The user who asks owns it.
    pub ours: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    pub path: PathBuf,
    pub free: u64,
    /// Images lie here.
    pub images: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Farm {
    pub url: String,
    pub seen: Fact<FarmSeen>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FarmSeen {
    /// Between its clock and ours, at least. Absent: it does not tell the time.
    pub skew_ms: Option<u64>,
    pub took_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tart {
    pub path: PathBuf,
    /// What it says to `--version`.
    pub version: Fact<String>,
    pub listed: Fact<Vec<Listed>>,
}

/// A line of its list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub name: String,
    pub image: bool,
    pub running: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Softnet {
    pub path: PathBuf,
    /// It belongs to root and has the set-uid bit.
    pub set_uid: bool,
    /// Sudo starts it without a password.
    pub by_sudo: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// No file of a service of this name.
    Missing,
    Stopped,
    Running,
    /// Of a user who does not linger: it ends when the user logs out, and does not start at boot.
    RunningUntilLogout,
}

#[derive(Debug, Clone)]
pub struct Mac {
    /// As in 15.6.
    pub version: Fact<(u32, u32)>,
    pub arch: String,
    pub root: bool,
    pub gui_session: Fact<bool>,
    pub keychain: Fact<Keychain>,
    pub power: Fact<BTreeMap<String, u64>>,
    pub app_nap_off: Fact<bool>,
    /// Who is logged in by itself after a boot.
    pub auto_login: Fact<Option<String>>,
    pub file_vault: Fact<bool>,
    pub updates_automatic: Fact<bool>,
    /// Absent: the default of a day.
    pub dhcp_lease_s: Fact<Option<u64>>,
    /// Addresses that are taken now.
    pub dhcp_live: Fact<usize>,
    /// Virtual machines of Apple's framework, whoever started them.
    pub vm_processes: Fact<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keychain {
    Missing,
    Locked,
    /// It locks itself after a while, or when the machine sleeps.
    LocksItself,
    Open,
}

/// `major.minor`; what follows does not matter.
pub fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.trim().split('.');
    let major = parts.next()?.parse().ok()?;
    let minor = parts.next().map_or(Some(0), |minor| minor.parse().ok())?;
    Some((major, minor))
}

/// What `pmset -g` says: lines of a name and a number.
pub fn parse_power(text: &str) -> BTreeMap<String, u64> {
    let setting = |line: &str| {
        let mut words = line.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
    };
    text.lines().filter_map(setting).collect()
}

/// What `fdesetup status` says.
pub fn parse_file_vault(text: &str) -> Fact<bool> {
    if text.contains("FileVault is On") {
        Ok(true)
    } else if text.contains("FileVault is Off") {
        Ok(false)
    } else {
        Err(format!("FileVault's state is not known: {}", first_line(text)))
    }
}

/// How `security show-keychain-info` ended and what it said. A locked keychain asks for its password, which nobody gives.
pub fn parse_keychain(status: Option<i32>, text: &str) -> Fact<Keychain> {
    match status {
        Some(0) if text.contains("timeout=") || text.contains("lock-on-sleep") => Ok(Keychain::LocksItself),
        Some(0) => Ok(Keychain::Open),
        // No time-out ends the question of a locked keychain but ours.
        None => Ok(Keychain::Locked),
        Some(_) if text.contains("interaction is not allowed") => Ok(Keychain::Locked),
        Some(_) if text.contains("could not be found") => Ok(Keychain::Missing),
        Some(code) => Err(format!("the keychain's state is not known (exit {code}): {}", first_line(text))),
    }
}

/// Leases in the file of the address server that have not run out. `lease` is the end of one, in hexadecimal.
pub fn count_leases(text: &str, now_s: u64) -> usize {
    let ends = text.lines().filter_map(|line| line.trim().strip_prefix("lease=0x"));
    ends.filter_map(|hex| u64::from_str_radix(hex.trim(), 16).ok()).filter(|end| *end > now_s).count()
}

/// Processes in the output of `ps -axo comm=` that each hold one virtual machine.
pub fn count_vm_processes(text: &str) -> usize {
    text.lines().filter(|line| line.trim_end().ends_with("com.apple.Virtualization.VirtualMachine")).count()
}

/// Bytes that an image takes on a disk, by the families of the public ones. Their own sizes stand nowhere before the pull.
pub fn image_bytes(image: &str) -> u64 {
    let gb = match image {
        _ if ["ubuntu", "debian", "fedora", "linux"].iter().any(|word| image.contains(word)) => 20,
        _ if image.contains("-vanilla") => 30,
        _ if image.contains("-base") => 50,
        _ if image.contains("runner") => 350,
        _ => 140,
    };
    gb * 1_000_000_000
}

fn first_line(text: &str) -> &str {
    text.trim().lines().next().unwrap_or("no answer")
}
