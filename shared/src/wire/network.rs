//! T: whom a job's VM may talk to, as people write it, and the label of workers that can see to it.

use core::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::id::printable;

/// The label of a worker that can put a job's own policy in force. A job that asks for one requires it.
pub const LABEL: (&str, &str) = ("network-policy", "per-job");

/// Whom the job's VM may talk to. IPv6 is never let through.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// The worker's own: in a VM the public internet, no private ranges and no other VM.
    #[default]
    Default,
    /// Nobody at all.
    None,
    /// These IPv4 ranges, written `10.1.0.0/16`, and nobody else. Names resolve only if the resolver's address is among them.
    Allow(Vec<String>),
}

impl Network {
    pub fn is_default(&self) -> bool {
        *self == Self::Default
    }
}

/// As on a command line: `none`, `default` or `allow=RANGE,…`. The ranges are checked with the spec.
impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("allow=")) {
            ("default", _) => Ok(Self::Default),
            ("none", _) => Ok(Self::None),
            (_, Some(ranges)) => Ok(Self::Allow(ranges.split(',').map(|range| range.trim().to_owned()).collect())),
            (other, None) => Err(format!("is none, default or allow=10.1.0.0/16,…, not `{}`", printable(other))),
        }
    }
}

/// Checks one range of an allow list. What is wrong is said with what to write in its place.
pub fn check_range(text: &str) -> Result<(), String> {
    let shown = printable(text);
    let Some((address, bits)) = text.split_once('/') else {
        return Err(match text.parse::<Ipv4Addr>() {
            Ok(address) => format!("`{shown}` is an address, not a range: write {address}/32"),
            Err(_) => format!("`{shown}` is no IPv4 range such as 10.1.0.0/16"),
        });
    };
    let length = bits.parse::<u32>().ok().filter(|n| *n <= 32 && n.to_string() == bits);
    let (Ok(address), Some(length)) = (address.parse::<Ipv4Addr>(), length) else {
        return Err(match address.contains(':') {
            true => format!("`{shown}` is IPv6, which is never let through: ranges are IPv4, such as 10.1.0.0/16"),
            false => format!("`{shown}` is no IPv4 range such as 10.1.0.0/16"),
        });
    };
    if length == 0 {
        return Err(format!("`{shown}` is everybody: leave the policy out, or list the ranges that the job needs"));
    }
    let network = Ipv4Addr::from_bits(address.to_bits() & (u32::MAX << (32 - length)));
    match network == address {
        true => Ok(()),
        false => Err(format!("`{shown}` does not start at its range's first address: write {network}/{length}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_read_as_it_is_typed() {
        let allow = |ranges: &[&str]| Network::Allow(ranges.iter().map(|range| (*range).to_owned()).collect());
        for (text, policy) in [
            ("default", Network::Default),
            ("none", Network::None),
            ("allow=10.0.0.0/8", allow(&["10.0.0.0/8"])),
            ("allow=10.0.0.0/8, 192.168.7.1/32", allow(&["10.0.0.0/8", "192.168.7.1/32"])),
            ("allow=", allow(&[""])),
        ] {
            assert_eq!(text.parse(), Ok(policy), "{text}");
        }
        for wrong in ["", "None", "off", "allow", "10.0.0.0/8", "block=10.0.0.0/8"] {
            assert!(wrong.parse::<Network>().unwrap_err().contains("allow=10.1.0.0/16"), "{wrong}");
        }
    }

    #[test]
    fn a_range_is_told_what_to_be() {
        for fine in ["10.0.0.0/8", "192.168.64.1/32", "0.0.0.0/1", "128.0.0.0/1", "172.16.0.0/12"] {
            assert_eq!(check_range(fine), Ok(()), "{fine}");
        }
        for (wrong, says) in [
            ("", "no IPv4 range such as"),
            ("example.com", "no IPv4 range such as"),
            ("@host", "no IPv4 range such as"),
            ("10.1.2.3", "write 10.1.2.3/32"),
            ("10.1.2.3/8", "write 10.0.0.0/8"),
            ("10.0.0.0/33", "no IPv4 range such as"),
            ("10.0.0.0/", "no IPv4 range such as"),
            ("10.0.0.0/08", "no IPv4 range such as"),
            ("10.0.0.0/+8", "no IPv4 range such as"),
            ("10.0.0/8", "no IPv4 range such as"),
            ("10.0.0.0/8:80", "no IPv4 range such as"),
            ("out 10.0.0.0/8", "no IPv4 range such as"),
            ("fd00::/8", "IPv6"),
            ("0.0.0.0/0", "everybody"),
        ] {
            let said = check_range(wrong).unwrap_err();
            assert!(said.contains(says), "{wrong}: {said}");
        }
    }
}
