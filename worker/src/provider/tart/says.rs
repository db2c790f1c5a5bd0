//! D: what `tart` says and what it means. Exit codes lie, so status and text are judged together, and what is not known is
//! called unknown.

use alloy_shared::id::Digest;
use serde::Deserialize;

use crate::provider::VmName;

/// How a `tart` command ended: its status (absent: killed by a signal) and the last of both its streams.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) status: Option<i32>,
    pub(super) out: String,
    pub(super) err: String,
}

/// What kept a `tart` command from doing its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trouble {
    /// The VM or the image in the cache does not exist.
    Missing,
    /// The VM runs, so it cannot be deleted.
    Running,
    NotRunning,
    /// The host runs as many macOS VMs as it may, whoever started them.
    Limit,
    /// A stale lock below tart, which a VM that is gone has left.
    Locked,
    /// The keychain or the login session of this user: no VM starts here until somebody acts.
    Session,
    /// Softnet is missing, not allowed or has died: a VM without its filter must not run.
    Filter,
    DiskFull,
    /// A `config.json` of some VM cannot be read, which stops every clone.
    Config,
    /// The registry does not have it, or not for us.
    Refused,
    /// The registry cannot be reached or is ill.
    Registry,
    /// The network attachment of a running VM went away.
    Unplugged,
    /// The guest crashed or stopped by itself.
    Stopped,
    /// The image was made for a newer macOS.
    HostTooOld,
    /// Something vanished under a command's hands: worth one more try.
    Race,
    Usage,
    Unknown,
}

/// Judges a command that did not do what it should. The texts are matched without regard to case and where they may be.
pub(super) fn judge(ended: &Ended) -> Trouble {
    let text = format!("{}\n{}", ended.err, ended.out).to_lowercase();
    let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
    let table: &[(&[&str], Trouble)] = &[
        // What a VM that ran ended of may quote errors that are the host's where they keep a VM from starting.
        (&["network attachment"], Trouble::Unplugged),
        (&["guest has stopped the virtual machine"], Trouble::Stopped),
        (&["exceeds the system limit"], Trouble::Limit),
        (&["failed to lock auxiliary storage"], Trouble::Locked),
        (&["enough space", "code=640", "no space left", "disk full", "os error 28"], Trouble::DiskFull),
        (
            &[
                "seckeycreaterandomkey",
                "failed to generate keypair",
                "interaction is not allowed",
                "vzerrordomain code=-9",
                "vzerrordomain code=1 ",
                "vzerrordomain code=1\"",
            ],
            Trouble::Session,
        ),
        (&["softnet", "root privileges are required"], Trouble::Filter),
        (
            &[
                "does not exist",
                "doesn't point to a digest",
                "missing files for a supported layout",
                "missing some of its files",
            ],
            Trouble::Missing,
        ),
        (&["is not running"], Trouble::NotRunning),
        (&["is already running", "is running"], Trouble::Running),
        (&["host macos version is outdated"], Trouble::HostTooOld),
        (&["code: 401", "code: 403", "code: 404", "invalid credentials"], Trouble::Refused),
        (
            &[
                "unexpectedhttpstatuscode",
                "error pulling image",
                "nsurlerrordomain",
                "connection",
                "could not be found",
                "offline",
                "timed out",
            ],
            Trouble::Registry,
        ),
        (
            &[
                "keynotfound",
                "datacorrupted",
                "typemismatch",
                "decodingerror",
                "correct format",
                "isn’t in the correct",
                "decoding",
            ],
            Trouble::Config,
        ),
        (&["no such file"], Trouble::Race),
        (&["usage: tart"], Trouble::Usage),
    ];
    table.iter().find(|(words, _)| says(words)).map_or(Trouble::Unknown, |(_, trouble)| *trouble)
}

impl Trouble {
    /// True when no VM of this host will fare better until somebody looks after the host.
    pub(super) fn is_of_the_host(self) -> bool {
        match self {
            Self::Session | Self::Filter | Self::Config | Self::Usage => true,
            Self::Missing
            | Self::Limit
            | Self::Locked
            | Self::Running
            | Self::NotRunning
            | Self::DiskFull
            | Self::Refused
            | Self::Registry
            | Self::Unplugged
            | Self::Stopped
            | Self::HostTooOld
            | Self::Race
            | Self::Unknown => false,
        }
    }
}

/// The last words of a command, for people.
pub(super) fn tail(ended: &Ended) -> String {
    let last = |text: &str| text.lines().map(str::trim).rfind(|line| !line.is_empty()).map(str::to_owned);
    let words = [last(&ended.err), last(&ended.out)].into_iter().flatten().collect::<Vec<_>>().join("; ");
    let how = match ended.status {
        Some(status) => format!("status {status}"),
        None => "killed".to_owned(),
    };
    if words.is_empty() { how } else { format!("{words} ({how})") }
}

/// A line of `tart list --format json`. Keys come and go between versions: what is missing has a default.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Listed {
    pub(super) name: String,
    #[serde(default)]
    pub(super) source: String,
    #[serde(default)]
    running: bool,
    #[serde(default)]
    state: String,
    /// Gigabytes on the disk; a number or the text of one.
    #[serde(default)]
    size: serde_json::Value,
}

impl Listed {
    pub(super) fn is_running(&self) -> bool {
        self.running || self.state == "running"
    }

    pub(super) fn size_bytes(&self) -> u64 {
        let gigabytes = self.size.as_f64().or_else(|| self.size.as_str()?.trim().parse().ok());
        (gigabytes.unwrap_or(0.0).max(0.0) * 1e9) as u64
    }

    pub(super) fn is_image(&self) -> bool {
        self.source.eq_ignore_ascii_case("oci")
    }
}

pub(super) fn parse_list(out: &str) -> Result<Vec<Listed>, String> {
    serde_json::from_str(out).map_err(|error| format!("`tart list` cannot be read: {error}"))
}

/// The VMs in a list that carry names of ours.
pub(super) fn ours(listed: &[Listed]) -> Vec<VmName> {
    listed
        .iter()
        .filter(|vm| vm.source == "local" || vm.source.is_empty())
        .filter_map(|vm| VmName::parse(&vm.name).ok())
        .collect()
}

/// `host/name@sha256:…` → the digest.
pub(super) fn digest_of(fqn: &str) -> Option<Digest> {
    fqn.trim().rsplit_once("@sha256:").and_then(|(_, hex)| hex.parse().ok())
}

/// True for a name in a registry: any with a slash. Others are VMs of this host.
pub(super) fn is_remote(image: &str) -> bool {
    image.contains('/')
}

/// `host/name:tag` or `host/name@digest` → `host/name`.
pub(super) fn repository(image: &str) -> &str {
    let name = image.split_once('@').map_or(image, |(name, _)| name);
    match name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => repository,
        Some(_) | None => name,
    }
}

/// What a line of `tart pull` tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PullStep {
    /// The download begins: so much of it, compressed.
    Disk {
        total_bytes: u64,
    },
    Percent(u8),
    /// There is nothing to download, or it is done.
    Settled,
}

pub(super) fn pull_step(line: &str) -> Option<PullStep> {
    if let Some(size) = line.strip_prefix("pulling disk (") {
        let gigabytes = size.split_whitespace().next().and_then(|n| n.parse::<f64>().ok()).unwrap_or(0.0);
        return Some(PullStep::Disk { total_bytes: (gigabytes.max(0.0) * 1e9) as u64 });
    }
    // Where lines are drawn again, escape sequences stand before the number.
    let number = line.strip_suffix('%').map(|text| text.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap_or(""));
    if let Some(percent) = number.and_then(|text| text.parse::<u8>().ok()) {
        return Some(PullStep::Percent(percent.min(100)));
    }
    let settled = line.contains("is already cached") || line.starts_with("pulling NVRAM");
    settled.then_some(PullStep::Settled)
}

/// What a guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GuestOs {
    Mac,
    Linux,
}

#[derive(Deserialize)]
struct Got {
    #[serde(default, alias = "os", alias = "OS")]
    os: Option<String>,
}

/// `tart get --format json` → the guest's system. One that is not named is macOS.
pub(super) fn parse_os(out: &str) -> Result<GuestOs, String> {
    let got: Got = serde_json::from_str(out).map_err(|error| format!("`tart get` cannot be read: {error}"))?;
    Ok(match got.os.as_deref() {
        Some(os) if os.eq_ignore_ascii_case("linux") => GuestOs::Linux,
        Some(_) | None => GuestOs::Mac,
    })
}

/// A version as tart prints it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(pub(super) u32, pub(super) u32, pub(super) u32);

/// A development build counts as the newest.
pub(super) fn parse_version(out: &str) -> Option<Version> {
    let text = out.trim();
    if text == "SNAPSHOT" {
        return Some(Version(u32::MAX, 0, 0));
    }
    let mut parts = text.split('.').map(|part| part.parse().ok());
    Some(Version(parts.next()??, parts.next()??, parts.next().flatten().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_and_text_are_judged_together() {
        let judged = |text: &str| {
            let by = |out: &str, err: &str| judge(&Ended { status: Some(1), out: out.into(), err: err.into() });
            assert_eq!(by(text, ""), by("", text), "{text}");
            by("", text)
        };
        let crash = "guest has stopped the virtual machine due to error: Error Domain=VZErrorDomain Code=1 \"x\"";
        let unplugged =
            "virtual machine's network attachment <x> has been disconnected with error: VZErrorDomain Code=1 ";
        for (text, trouble) in [
            ("The number of VMs exceeds the system limit (other running VMs: a, b)", Trouble::Limit),
            ("Error Domain=VZErrorDomain Code=2 \"Failed to lock auxiliary storage.\"", Trouble::Locked),
            (
                "Error Domain=VZErrorDomain Code=1 Description=\"The virtual machine failed to start.\"",
                Trouble::Session,
            ),
            ("Error Domain=VZErrorDomain Code=-9 \"x\"", Trouble::Session),
            ("SecKeyCreateRandomKey_ios failed", Trouble::Session),
            (crash, Trouble::Stopped),
            (unplugged, Trouble::Unplugged),
            ("RuntimeFailed(why: \"Softnet process terminated prematurely\")", Trouble::Filter),
            ("the specified VM \"x\" does not exist", Trouble::Missing),
            ("VM \"x\" is running", Trouble::Running),
            ("Error: “disk.img” couldn’t be copied to “x” because there isn’t enough space.", Trouble::DiskFull),
            ("Error: The file “disk.img” couldn’t be opened: No such file or directory", Trouble::Race),
            ("what nobody has heard before", Trouble::Unknown),
        ] {
            assert_eq!(judged(text), trouble, "{text}");
        }
    }

    #[test]
    fn the_lines_of_a_pull_tell_how_far_it_is() {
        for (line, step) in [
            ("pulling r.io/a/b:latest...", None),
            ("pulling manifest...", None),
            ("waiting for lock...", None),
            ("pulling disk (25.0 GB compressed)...", Some(PullStep::Disk { total_bytes: 25_000_000_000 })),
            ("pulling disk (? GB compressed)...", Some(PullStep::Disk { total_bytes: 0 })),
            ("0%", Some(PullStep::Percent(0))),
            ("\u{1b}[1A\u{1b}[2K37%", Some(PullStep::Percent(37))),
            ("100%", Some(PullStep::Percent(100))),
            ("999%", None),
            ("pulling NVRAM...", Some(PullStep::Settled)),
            ("r.io/a/b@sha256:ab image is already cached and linked!", Some(PullStep::Settled)),
            ("r.io/a/b@sha256:ab image is already cached! creating a symlink...", Some(PullStep::Settled)),
        ] {
            assert_eq!(pull_step(line), step, "{line}");
        }
    }

    #[test]
    fn a_vm_that_somebody_named_is_not_ours_whatever_it_begins_with() {
        let listed = parse_list(
            r#"[{"Name":"alloy-macos-xcode","Source":"local"},{"Name":"alloy-00000001-2","Source":"local"},
                {"Name":"alloy-00000001-3","Source":"OCI"},{"Name":"alloy-linux","Source":"local"}]"#,
        );
        assert_eq!(ours(&listed.unwrap()), [VmName::mint(1, 2)]);
    }

    #[test]
    fn a_size_is_read_whatever_it_is_written_as() {
        let size = |text: &str| parse_list(text).unwrap()[0].size_bytes();
        assert_eq!(size(r#"[{"Name":"a","Source":"OCI","Size":27}]"#), 27_000_000_000);
        assert_eq!(size(r#"[{"Name":"a","Size":"2.5"}]"#), 2_500_000_000);
        assert_eq!(size(r#"[{"Name":"a","Size":null}]"#), 0);
        assert_eq!(size(r#"[{"Name":"a"}]"#), 0);
    }
}
