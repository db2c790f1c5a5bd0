//! What the flags of `run` ask for, and the validation that comes before any lock.

use std::path::{Path, PathBuf};

use super::Failure;
use super::args::Parsed;
use super::guest::Share;

/// The network of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Network {
    Nat,
    Bridged,
    Softnet { host_only: bool, options: Vec<String>, control_fd: Option<i32> },
}

#[derive(Debug)]
pub(crate) struct Flags {
    pub(crate) network: Network,
    pub(crate) shares: Vec<Share>,
    pub(crate) suspendable: bool,
    /// What a saved state depends on, beside the configuration.
    pub(crate) devices: String,
}

impl Flags {
    pub(crate) fn of(parsed: &Parsed) -> Result<Flags, Failure> {
        let shares = parsed.values("dir").map(share).collect::<Result<Vec<_>, _>>()?;
        for share in &shares {
            let beside = shares.iter().filter(|other| other.tag == share.tag).count();
            if share.name.is_none() && beside > 1 {
                let text = "invalid --dir syntax: for multiple directory shares each one of them should be named";
                return Err(Failure::Usage(text.into()));
            }
        }
        let network = network(parsed)?;
        let devices = format!("{shares:?} {}", matches!(network, Network::Nat));
        Ok(Flags { network, shares: last_of_each(shares), suspendable: parsed.has("suspendable"), devices })
    }
}

fn network(parsed: &Parsed) -> Result<Network, Failure> {
    let mut options = Vec::new();
    for name in ["allow", "block", "expose"] {
        for value in parsed.values(&format!("net-softnet-{name}")) {
            options.extend([format!("--{name}"), value.to_owned()]);
        }
    }
    let control_fd = match parsed.value("net-softnet-control-fd") {
        Some(text) => Some(text.parse().map_err(|_| Failure::Usage("--net-softnet-control-fd is a number".into()))?),
        None => None,
    };
    let softnet = parsed.has("net-softnet") || !options.is_empty() || control_fd.is_some();
    let (bridged, host_only) = (parsed.has("net-bridged"), parsed.has("net-host"));
    if [bridged, softnet, host_only].into_iter().filter(|asked| *asked).count() > 1 {
        let text = "--net-bridged, --net-softnet and --net-host are mutually exclusive";
        return Err(Failure::Usage(text.into()));
    }
    Ok(match (softnet || host_only, bridged) {
        (true, _) => Network::Softnet { host_only, options, control_fd },
        (false, true) => Network::Bridged,
        (false, false) => Network::Nat,
    })
}

/// `[name:]path[:options]`.
fn share(text: &str) -> Result<Share, Failure> {
    let (rest, options) = match text.rsplit_once(':') {
        Some((rest, last)) if last.split(',').any(is_option) => (rest, last),
        _ => (text, ""),
    };
    let (name, path) = match rest.split_once(':') {
        Some((name, path)) => (Some(name.to_owned()), path),
        None => (None, rest),
    };
    if path.starts_with("http://") || path.starts_with("https://") {
        return Err(Failure::Error("archives by URL are not simulated".into()));
    }
    let path = match (path.strip_prefix("~/"), std::env::var_os("HOME")) {
        (Some(below), Some(home)) => PathBuf::from(home).join(below),
        _ => std::path::absolute(Path::new(path))?,
    };
    let tag = options.split(',').find_map(|option| option.strip_prefix("tag=")).map(str::to_owned);
    Ok(Share { tag, name, path, read_only: options.split(',').any(|option| option == "ro") })
}

fn is_option(word: &str) -> bool {
    word == "ro" || word.starts_with("tag=")
}

/// Of several shares with one name the last wins, silently.
fn last_of_each(shares: Vec<Share>) -> Vec<Share> {
    let mut kept: Vec<Share> = Vec::new();
    for share in shares {
        kept.retain(|other| (&other.tag, &other.name) != (&share.tag, &share.name));
        kept.push(share);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_name_a_path_and_options() {
        let plain = |text| share(text).expect("a share");
        assert_eq!(plain("/a"), Share { tag: None, name: None, path: "/a".into(), read_only: false });
        assert_eq!(plain("/a:ro"), Share { tag: None, name: None, path: "/a".into(), read_only: true });
        assert_eq!(
            plain("in:/a:b"),
            Share { tag: None, name: Some("in".into()), path: "/a:b".into(), read_only: false }
        );
        let tagged = Share { tag: Some("T".into()), name: Some("in".into()), path: "/a".into(), read_only: true };
        assert_eq!(plain("in:/a:tag=T,ro"), tagged);
    }
}
