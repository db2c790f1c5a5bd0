//! `ip`: it asks the lease file or the agent, and never whether the VM runs.

use std::net::Ipv4Addr;
use std::time::Duration;

use super::args::Parsed;
use super::context::{Sim, now};
use super::fault::{Fault, find};
use super::home::{Config, VmDir};
use super::vm::REAL_PATIENCE;
use super::{Done, Failure, exec, lease, say};

pub(crate) fn ip(sim: &Sim, parsed: &Parsed, faults: &[Fault]) -> Done {
    let vm = VmDir::open(sim, &parsed.names[0])?;
    if parsed.number("wait")?.is_some_and(|wait| wait > 65_535) {
        return Err(Failure::Usage("The value is invalid for '--wait <wait>'".into()));
    }
    if find(faults, "malformed").is_some() {
        return Err(Failure::Error("malformed DHCP leases file".into()));
    }
    if let Some(text) = find(faults, "answer").and_then(|fault| fault.text("text")) {
        say(text);
        return Ok(());
    }
    let resolver = parsed.value("resolver").unwrap_or("dhcp");
    let config = vm.config()?;
    let wait = parsed.number("wait")?.unwrap_or(0);
    let end = now() + sim.scaled(wait as f64).max(REAL_PATIENCE.min(Duration::from_secs(wait)));
    loop {
        if find(faults, "no_address").is_none()
            && let Some(ip) = resolve(sim, &vm, &config, resolver)?
        {
            say(&ip.to_string());
            return Ok(());
        }
        // So that even `--wait 0` takes a second to fail.
        sim.pause(1.0);
        if now() >= end {
            break;
        }
    }
    let mut text = "no IP address found".to_owned();
    if vm.runner().is_none() {
        text.push_str(", is your VM running?");
    }
    if resolver == "agent" {
        text.push_str(" (also make sure that Guest agent for Tart is running inside of a VM)");
    }
    if resolver == "arp" && config.os == "linux" {
        text.push_str(" (not all Linux distributions are compatible with the ARP resolver)");
    }
    Err(Failure::Bare(text))
}

fn resolve(sim: &Sim, vm: &VmDir, config: &Config, resolver: &str) -> Result<Option<Ipv4Addr>, Failure> {
    match resolver {
        // The client ids of stock Linux guests are invisible here.
        "dhcp" | "arp" => Ok(lease::of(&sim.host, &config.mac_address)?.map(|lease| lease.ip)),
        _ if vm.runner().is_none() => Ok(None),
        _ => exec::resolve_ip(sim, vm),
    }
}
