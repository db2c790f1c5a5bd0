//! D: the checks of a Mac: what a VM needs of the login session, and what keeps the machine up.

use super::facts::{Facts, Keychain, Mac};
use super::{Code, Fix, Report};
use crate::config::Provider;

/// Checked on a Mac only.
pub(super) const CODES: [Code; 14] = [
    Code::System,
    Code::User,
    Code::LoginSession,
    Code::Keychain,
    Code::KeychainLock,
    Code::AutoLogin,
    Code::FileVault,
    Code::Sleep,
    Code::AppNap,
    Code::PowerFailure,
    Code::Updates,
    Code::DhcpLease,
    Code::DhcpPool,
    Code::LocalNetwork,
];

/// The guest agent's channel is there from this version on.
const MACOS_MIN: u32 = 14;
/// From this version on a VM needs the open keychain, and programs need a permission for the local network.
const MACOS_STRICT: u32 = 15;
const LEASE_MAX_S: u64 = 3_600;
const LEASE_DEFAULT_S: u64 = 86_400;
/// Of the 253 addresses of the VMs' network.
const LEASES_MANY: usize = 200;
const INTERNET_SHARING: &str = "/Library/Preferences/SystemConfiguration/com.apple.InternetSharing.default.plist";

pub(super) fn examine(facts: &Facts, mac: &Mac, report: &mut Report) {
    system(mac, report);
    match facts.provider {
        Provider::Tart => {
            session(facts, mac, report);
            keychain(mac, report);
            dhcp(mac, report);
            local_network(mac, report);
        }
        Provider::Host => {
            for code in [
                Code::User,
                Code::LoginSession,
                Code::Keychain,
                Code::KeychainLock,
                Code::DhcpLease,
                Code::DhcpPool,
                Code::LocalNetwork,
            ] {
                report.not_checked(code, "the provider is host, which needs no VM");
            }
        }
    }
    boot(facts, mac, report);
    power(mac, report);
    app_nap(mac, report);
    updates(mac, report);
}

fn system(mac: &Mac, report: &mut Report) {
    let fix = Fix::by_hand("System Settings, General, Software Update");
    let Some((major, minor)) = report.look(Code::System, &mac.version) else { return };
    if mac.arch != "arm64" {
        report.error(
            Code::System,
            format!("a Mac with {}: VMs need Apple Silicon", mac.arch),
            Fix::by_hand("use another Mac"),
        );
    } else if *major < MACOS_MIN {
        report.error(
            Code::System,
            format!("macOS {major}.{minor}: guests are not reached before macOS {MACOS_MIN}"),
            fix,
        );
    } else {
        report.ok(Code::System, format!("macOS {major}.{minor} on Apple Silicon"));
    }
}

fn session(facts: &Facts, mac: &Mac, report: &mut Report) {
    if mac.root {
        let fix = Fix::by_hand("run it as the user who is logged in on the screen");
        report.error(Code::User, "this runs as root, for whom no macOS guest starts", fix);
    } else {
        report.ok(Code::User, facts.user.clone());
    }
    match report.look(Code::LoginSession, &mac.gui_session) {
        Some(true) => report.ok(Code::LoginSession, format!("{} is logged in on the screen", facts.user)),
        Some(false) => report.error(
            Code::LoginSession,
            format!("{} is not logged in on the screen: no macOS guest starts", facts.user),
            Fix::by_hand("log in on the screen (or by Screen Sharing), and switch automatic login on"),
        ),
        None => {}
    }
}

fn keychain(mac: &Mac, report: &mut Report) {
    let file = "login.keychain-db";
    match report.look(Code::Keychain, &mac.keychain) {
        Some(Keychain::Open) => {
            report.ok(Code::Keychain, "the login keychain is open");
            report.ok(Code::KeychainLock, "it does not lock itself");
        }
        Some(Keychain::LocksItself) => {
            report.ok(Code::Keychain, "the login keychain is open");
            report.warning(
                Code::KeychainLock,
                "it locks itself after a while: from then on no macOS guest starts",
                Fix::told("keep it open while the user is logged in", &[&["security", "set-keychain-settings", file]]),
            );
        }
        Some(Keychain::Locked) => report.error(
            Code::Keychain,
            "the login keychain is locked: no macOS guest starts",
            Fix::told(
                "asks for its password; a login on the screen opens it too",
                &[&["security", "unlock-keychain", file]],
            ),
        ),
        Some(Keychain::Missing) => report.error(
            Code::Keychain,
            "there is no login keychain: no macOS guest starts",
            Fix::by_hand("log in on the screen once: that makes it"),
        ),
        None => report.not_checked(Code::KeychainLock, "the keychain's state is not known"),
    }
}

/// What is needed for the worker to come back after a reboot.
fn boot(facts: &Facts, mac: &Mac, report: &mut Report) {
    let auto = |report: &mut Report, text: String| {
        report.warning(
            Code::AutoLogin,
            text,
            Fix::told(
                "System Settings, Users & Groups, Automatically log in as; or, which asks for the password:",
                &[&["sudo", "sysadminctl", "-autologin", "set", "-userName", &facts.user]],
            ),
        );
    };
    match report.look(Code::AutoLogin, &mac.auto_login) {
        Some(Some(user)) if *user == facts.user => {
            report.ok(Code::AutoLogin, format!("{user} is logged in after a boot"))
        }
        Some(Some(user)) => auto(report, format!("after a boot {user} is logged in, not {}", facts.user)),
        Some(None) => auto(report, "after a boot nobody is logged in, and no job runs".to_owned()),
        None => {}
    }
    match report.look(Code::FileVault, &mac.file_vault) {
        Some(true) => report.warning(
            Code::FileVault,
            "FileVault is on: after a boot this Mac waits for a password at its screen, and automatic login is not possible",
            Fix::by_hand(
                "on a Mac in a locked room: sudo fdesetup disable. Else somebody must be there after every reboot (sudo fdesetup authrestart skips one)",
            ),
        ),
        Some(false) => report.ok(Code::FileVault, "off"),
        None => {}
    }
}

fn power(mac: &Mac, report: &mut Report) {
    let Some(power) = report.look(Code::Sleep, &mac.power) else {
        return report.not_checked(Code::PowerFailure, "the power settings are not known");
    };
    let awake = ["sleep", "disksleep", "displaysleep"];
    let asleep: Vec<String> = awake
        .iter()
        .filter_map(|name| power.get(*name).filter(|minutes| **minutes > 0).map(|minutes| format!("{name} {minutes}")))
        .collect();
    let set = Fix::automatic(&[&["sudo", "pmset", "-a", "sleep", "0", "disksleep", "0", "displaysleep", "0"]]);
    if power.get("sleep").is_some_and(|minutes| *minutes > 0) {
        report.error(Code::Sleep, format!("this Mac goes to sleep ({}, minutes)", asleep.join(", ")), set);
    } else if !asleep.is_empty() {
        report.warning(Code::Sleep, format!("parts of it go to sleep ({}, minutes)", asleep.join(", ")), set);
    } else {
        report.ok(Code::Sleep, "never");
    }
    match power.get("autorestart") {
        Some(0) => report.warning(
            Code::PowerFailure,
            "after a power failure this Mac stays off",
            Fix::automatic(&[&["sudo", "pmset", "-a", "autorestart", "1"]]),
        ),
        Some(_) => report.ok(Code::PowerFailure, "it starts again after a power failure"),
        None => report.not_checked(Code::PowerFailure, "this Mac has no such setting"),
    }
}

fn app_nap(mac: &Mac, report: &mut Report) {
    match report.look(Code::AppNap, &mac.app_nap_off) {
        Some(true) => report.ok(Code::AppNap, "off"),
        Some(false) => report.warning(
            Code::AppNap,
            "programs without a window may be slowed down (App Nap)",
            Fix::automatic(&[&["defaults", "write", "NSGlobalDomain", "NSAppSleepDisabled", "-bool", "true"]]),
        ),
        None => {}
    }
}

fn updates(mac: &Mac, report: &mut Report) {
    match report.look(Code::Updates, &mac.updates_automatic) {
        Some(false) => report.ok(Code::Updates, "macOS updates itself only when told"),
        Some(true) => report.warning(
            Code::Updates,
            "macOS updates itself and restarts in the middle of jobs",
            Fix::automatic(&[&[
                "sudo",
                "defaults",
                "write",
                "/Library/Preferences/com.apple.SoftwareUpdate",
                "AutomaticallyInstallMacOSUpdates",
                "-bool",
                "false",
            ]]),
        ),
        None => {}
    }
}

fn dhcp(mac: &Mac, report: &mut Report) {
    let shorter = Fix::automatic(&[&[
        "sudo",
        "defaults",
        "write",
        INTERNET_SHARING,
        "bootpd",
        "-dict",
        "DHCPLeaseTimeSecs",
        "-int",
        "600",
    ]]);
    if let Some(lease) = report.look(Code::DhcpLease, &mac.dhcp_lease_s) {
        let seconds = lease.unwrap_or(LEASE_DEFAULT_S);
        let text = format!("a VM's address stays taken for {seconds} s");
        if seconds > LEASE_MAX_S {
            report.warning(Code::DhcpLease, format!("{text}: after 253 VMs in that time a new one gets none"), shorter);
        } else {
            report.ok(Code::DhcpLease, text);
        }
    }
    match report.look(Code::DhcpPool, &mac.dhcp_live) {
        Some(live) if *live >= LEASES_MANY => report.error(
            Code::DhcpPool,
            format!("{live} of the VMs' 253 addresses are taken"),
            Fix::told(
                "shorten the lease, then forget the old ones while no VM runs",
                &[&["sudo", "rm", "/var/db/dhcpd_leases"]],
            ),
        ),
        Some(live) => report.ok(Code::DhcpPool, format!("{live} of the VMs' 253 addresses are taken")),
        None => {}
    }
}

/// The permission itself cannot be read.
fn local_network(mac: &Mac, report: &mut Report) {
    match report.look(Code::LocalNetwork, &mac.version) {
        Some((major, _)) if *major >= MACOS_STRICT => report.note(
            Code::LocalNetwork,
            "guests are reached through tart's socket, which needs no permission; an image without the guest agent is reached by SSH, which does",
            Fix::told(
                "only for such images, then restart: it lets every program of this Mac reach these addresses",
                &[&[
                    "sudo",
                    "defaults",
                    "write",
                    "com.apple.network.local-network",
                    "AllowedEthernetLocalNetworkAddresses",
                    "-array",
                    "192.168.64.0/24",
                ]],
            ),
        ),
        Some(_) => report.ok(Code::LocalNetwork, "this macOS asks for no permission"),
        None => {}
    }
}
