//! The lease file of the host's DHCP server, and the addresses that it gives out. An address is one of the loopback network,
//! so that a guest's SSH can be reached where the system has the whole of it.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use super::context::{Sim, wall_ms};
use super::{Failure, lock};

/// What softnet sets; the system's own 86 400 s exhaust the pool, which no simulated host should do.
const LEASE_SECONDS: f64 = 600.0;
/// However fast the simulated clock: whoever asks for an address does so in real time.
const REAL_SECONDS_MIN: u64 = 30;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lease {
    pub(crate) ip: Ipv4Addr,
    pub(crate) mac: String,
    pub(crate) expiry: i64,
}

pub(crate) fn path(host: &Path) -> PathBuf {
    host.join("dhcpd_leases")
}

/// The valid leases. A missing file has none; a malformed one is an error.
pub(crate) fn read(host: &Path) -> Result<Vec<Lease>, Failure> {
    let Ok(text) = fs::read_to_string(path(host)) else { return Ok(Vec::new()) };
    let malformed = || Failure::Error("malformed DHCP leases file".into());
    let mut leases = Vec::new();
    let mut block: Option<(Option<Ipv4Addr>, Option<String>, Option<i64>)> = None;
    for line in text.lines().map(str::trim_start) {
        match (line, &mut block) {
            ("{", None) => block = Some((None, None, None)),
            ("}", Some((ip, mac, expiry))) => {
                if let (Some(ip), Some(mac), Some(expiry)) = (ip.take(), mac.take(), expiry.take()) {
                    leases.push(Lease { ip, mac, expiry });
                }
                block = None;
            }
            (line, Some((ip, mac, expiry))) => {
                let (key, value) = line.split_once('=').ok_or_else(malformed)?;
                match key {
                    "ip_address" => *ip = Some(value.parse().map_err(|_| malformed())?),
                    "hw_address" => *mac = value.strip_prefix("1,").map(full_mac),
                    "lease" => *expiry = Some(hex(value).ok_or_else(malformed)?),
                    _ => {}
                }
            }
            ("", None) => {}
            (_, None) => return Err(malformed()),
        }
    }
    if block.is_some() {
        return Err(malformed());
    }
    let now = wall_ms() / 1000;
    leases.retain(|lease| lease.expiry > now);
    Ok(leases)
}

fn hex(text: &str) -> Option<i64> {
    i64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

/// With the zeros that the lease file leaves out.
fn full_mac(short: &str) -> String {
    let octets = short
        .split(':')
        .map(|octet| u8::from_str_radix(octet, 16).map_or_else(|_| octet.into(), |n| format!("{n:02x}")));
    octets.collect::<Vec<_>>().join(":")
}

fn short_mac(mac: &str) -> String {
    let octets = mac.split(':').map(|octet| octet.trim_start_matches('0')).map(|o| if o.is_empty() { "0" } else { o });
    octets.collect::<Vec<_>>().join(":")
}

/// The newest lease of this MAC.
pub(crate) fn of(host: &Path, mac: &str) -> Result<Option<Lease>, Failure> {
    let leases = read(host)?;
    Ok(leases.into_iter().filter(|lease| lease.mac == mac).max_by_key(|lease| lease.expiry))
}

fn expiry(sim: &Sim) -> i64 {
    wall_ms() / 1000 + sim.scaled(LEASE_SECONDS).as_secs().max(REAL_SECONDS_MIN) as i64
}

/// Gives this MAC an address that `usable` accepts, the one that it had if there is one.
pub(crate) fn grant(sim: &Sim, mac: &str, mut usable: impl FnMut(Ipv4Addr) -> bool) -> Result<Ipv4Addr, Failure> {
    fs::create_dir_all(&sim.host)?;
    let _held = lock::exclusive_file(&sim.host.join("dhcpd.lock"))?;
    let mut leases = read(&sim.host).unwrap_or_default();
    let had = leases.iter().find(|lease| lease.mac == mac).map(|lease| lease.ip).filter(|ip| usable(*ip));
    let taken: Vec<_> = leases.iter().map(|lease| lease.ip).collect();
    // Hosts of one machine begin at different places.
    let network =
        sim.host.as_os_str().as_encoded_bytes().iter().fold(7_u32, |sum, b| sum.wrapping_mul(31) + u32::from(*b));
    let base = u32::from(Ipv4Addr::new(127, 64, 0, 0)) + ((network & 0x3fff) << 8);
    let free = || (2..255).map(|last| Ipv4Addr::from(base + last)).filter(|ip| !taken.contains(ip));
    // Where the machine's own sshd has the port on every address, guests are without SSH.
    let ip = had.or_else(|| free().find(|ip| usable(*ip))).or_else(|| free().next());
    let ip = ip.ok_or_else(|| Failure::Error("no address is left".into()))?;
    leases.retain(|lease| lease.mac != mac);
    let expiry = expiry(sim);
    leases.push(Lease { ip, mac: mac.to_owned(), expiry });
    write(&sim.host, &leases)?;
    Ok(ip)
}

/// Claims this very address, whoever has it.
pub(crate) fn duplicate(sim: &Sim, mac: &str, ip: Ipv4Addr) -> Result<(), Failure> {
    let _held = lock::exclusive_file(&sim.host.join("dhcpd.lock"))?;
    let mut leases = read(&sim.host)?;
    let expiry = expiry(sim);
    leases.push(Lease { ip, mac: mac.to_owned(), expiry });
    Ok(write(&sim.host, &leases)?)
}

fn write(host: &Path, leases: &[Lease]) -> std::io::Result<()> {
    let mut text = String::new();
    for lease in leases {
        let mac = short_mac(&lease.mac);
        text.push_str(&format!(
            "{{\n\tname=admins-Virtual-Machine\n\tip_address={}\n\thw_address=1,{mac}\n\tidentifier=1,{mac}\n\tlease=0x{:x}\n}}\n",
            lease.ip, lease.expiry
        ));
    }
    let part = host.join("dhcpd_leases.part");
    fs::write(&part, text)?;
    fs::rename(part, path(host))
}
