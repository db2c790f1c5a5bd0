//! D: the checks that every system has.

use alloy_shared::id::{printable, printable_to};
use alloy_shared::limits::DISK_FLOOR;

use super::facts::{Disk, Facts, Identity, Listed, Service, System, image_bytes, parse_version};
use super::{Code, Fix, Report};
use crate::config::Provider;
use crate::provider::VmName;
use crate::provider::tart::probe::PROGRAM;

/// Clocks further apart make deadlines and log times wrong.
const SKEW_MAX_MS: u64 = 30_000;
/// Of a client's sentence, whose end says most: a library's words, which the client has cut, and the address before them.
const SENTENCE_MAX: usize = 500;
/// What the jobs of one slot may write before it hurts.
const SLOT_BYTES: u64 = 30_000_000_000;
/// On `host`: the cache of sources and a build.
const HOST_BYTES: u64 = 30_000_000_000;
const OPEN_FILES_MIN: u64 = 4_096;
/// Older ones have no way to run a command in the guest.
const TART_MIN: (u32, u32) = (2, 27);
/// Older ones cannot change a running VM's network: a job with its own policy boots cold.
const TART_GOOD: (u32, u32) = (2, 34);
/// A fault that hurts a worker: in versions from the first one up to, but not with, the second.
struct Bad {
    from: (u32, u32),
    to: (u32, u32),
    why: &'static str,
}
const TART_BAD: [Bad; 1] =
    [Bad { from: (2, 27), to: (2, 33), why: "one core spins after the input of a command in a guest has ended" }];

pub(super) fn provider(facts: &Facts, report: &mut Report) {
    match (facts.provider, facts.system) {
        (Provider::Host, _) => report.note(
            Code::Provider,
            format!("jobs run on this machine itself, as {}, without any isolation", facts.user),
            Fix::by_hand("on a Mac: provider = \"tart\" in worker.toml runs every job in a VM of its own"),
        ),
        (Provider::Tart, System::Macos) => {
            report.ok(
                Code::Provider,
                format!("{} slots, a VM of {} for every job", facts.slots, printable(&facts.image)),
            );
        }
        (Provider::Tart, System::Linux | System::Other) => report.error(
            Code::Provider,
            "VMs are made by tart, which runs on Macs only",
            Fix::by_hand("--provider host runs jobs on this machine itself, without any isolation"),
        ),
    }
}

pub(super) fn identity(facts: &Facts, report: &mut Report) {
    let join = || Fix::by_hand("an admin makes an invitation (alloy worker invite), then here: worker join URL TOKEN");
    match &facts.identity {
        Identity::Joined { name, url } => {
            report.ok(Code::Identity, format!("{} of {}", printable(name), printable(url)));
        }
        Identity::Missing => {
            report.error(Code::Identity, format!("{} holds no worker's identity", facts.state_dir.display()), join());
        }
        Identity::Damaged(why) => report.error(Code::Identity, why.clone(), join()),
    }
}

pub(super) fn file_modes(facts: &Facts, report: &mut Report) {
    let mut good = 0;
    for file in &facts.files {
        let path = file.path.display().to_string();
        if !file.ours {
            report.error(
                Code::FileModes,
                format!("{path} does not belong to {}", facts.user),
                Fix::told("if this worker is to run as this user", &[&["sudo", "chown", "-R", &facts.user, &path]]),
            );
        } else if file.mode & 0o077 != 0 {
            report.error(
                Code::FileModes,
                format!("{path} is open to others (mode {:o})", file.mode & 0o7777),
                Fix::automatic(&[&["chmod", "go-rwx", &path]]),
            );
        } else {
            good += 1;
        }
    }
    if facts.files.is_empty() {
        report.not_checked(Code::FileModes, format!("there is nothing in {} yet", facts.state_dir.display()));
    } else if good == facts.files.len() {
        report.ok(Code::FileModes, "key and state are for their owner alone");
    }
}

pub(super) fn orchestrator(facts: &Facts, report: &mut Report) {
    let Some(farm) = &facts.farm else {
        return report.not_checked(Code::Orchestrator, "this machine has joined no farm");
    };
    match &farm.seen {
        Err(why) => {
            let fix = Fix::by_hand("is the orchestrator up, and does this machine's network let it out there?");
            report.error(Code::Orchestrator, printable_to(SENTENCE_MAX, why), fix);
        }
        Ok(seen) => report.ok(Code::Orchestrator, format!("ready at {} ({} ms)", printable(&farm.url), seen.took_ms)),
    }
}

pub(super) fn clock(facts: &Facts, report: &mut Report) {
    let set = || match facts.system {
        System::Macos => Fix::automatic(&[&["sudo", "sntp", "-sS", "time.apple.com"]]),
        System::Linux | System::Other => Fix::automatic(&[&["sudo", "timedatectl", "set-ntp", "true"]]),
    };
    let seen = facts.farm.as_ref().and_then(|farm| farm.seen.as_ref().ok());
    match seen.and_then(|seen| seen.skew_ms) {
        Some(skew_ms) if skew_ms > SKEW_MAX_MS => {
            report.error(Code::Clock, format!("differs from the farm's by {} s", skew_ms / 1_000), set());
            return;
        }
        Some(skew_ms) => {
            report.ok(Code::Clock, format!("differs from the farm's by {} s at most", skew_ms / 1_000 + 1))
        }
        None => report.not_checked(Code::Clock, "there is no orchestrator's clock to compare with"),
    }
    match &facts.clock_kept {
        Ok(true) => report.ok(Code::Clock, "kept by a network time service"),
        Ok(false) => report.warning(Code::Clock, "no network time service keeps it", set()),
        Err(why) => report.not_checked(Code::Clock, why.clone()),
    }
}

pub(super) fn disk(facts: &Facts, report: &mut Report) {
    for fact in &facts.disks {
        let Some(disk) = report.look(Code::Disk, fact) else { continue };
        let need = needed(facts, disk);
        let text = format!("{}: {} GB free", disk.path.display(), disk.free / 1_000_000_000);
        let fix = Fix::by_hand(
            "remove images that no job uses and other large files, or name another disk (ALLOY_STATE_DIR, TART_HOME)",
        );
        if disk.free < DISK_FLOOR {
            report.error(Code::Disk, format!("{text}; below 1 GB nothing new is taken"), fix);
        } else if disk.free < need {
            let what = if disk.images { "the image and what the slots write" } else { "sources and builds" };
            report.warning(Code::Disk, format!("{text}; {what} may take {} GB", need / 1_000_000_000), fix);
        } else {
            report.ok(Code::Disk, text);
        }
    }
}

/// Room that this worker may want on a disk, over what it has taken.
fn needed(facts: &Facts, disk: &Disk) -> u64 {
    match (facts.provider, disk.images) {
        (Provider::Host, _) => HOST_BYTES,
        (Provider::Tart, false) => DISK_FLOOR,
        (Provider::Tart, true) => {
            let listed = facts.tart.as_ref().and_then(|tart| tart.listed.as_ref().ok());
            let there = listed.is_some_and(|list| list.iter().any(|entry| entry.image && entry.name == facts.image));
            let image = if there { 0 } else { image_bytes(&facts.image) };
            image + SLOT_BYTES * facts.slots as u64
        }
    }
}

pub(super) fn tart(facts: &Facts, report: &mut Report) {
    let Some(tart) = &facts.tart else {
        match facts.provider {
            Provider::Host => report.not_checked(Code::TartVersion, "the provider is host, which needs no tart"),
            Provider::Tart => report.error(
                Code::TartVersion,
                "there is no tart on the path",
                Fix::told("see tart.run for the tap's name today", &[&["brew", "install", "openai/tools/tart"]]),
            ),
        }
        return;
    };
    let upgrade = || Fix::told("drain this worker first", &[&["brew", "upgrade", PROGRAM]]);
    let Some(text) = report.look(Code::TartVersion, &tart.version) else { return };
    let shown = format!("{} at {}", printable(text), tart.path.display());
    match parse_version(text) {
        None => report.note(
            Code::TartVersion,
            format!("{shown} is no released version"),
            Fix::by_hand("a worker finds out by itself what it can do; prefer a release"),
        ),
        Some(version) if version < TART_MIN => {
            report.error(Code::TartVersion, format!("{shown} is too old: it runs no command in a guest"), upgrade());
        }
        Some(version) => match TART_BAD.iter().find(|bad| (bad.from..bad.to).contains(&version)) {
            Some(Bad { why, .. }) => {
                report.warning(Code::TartVersion, format!("{shown} has a known fault: {why}"), upgrade())
            }
            None if version < TART_GOOD => report.warning(
                Code::TartVersion,
                format!("{shown} cannot change a running VM's network: jobs with their own policy boot cold"),
                upgrade(),
            ),
            None => report.ok(Code::TartVersion, shown),
        },
    }
}

pub(super) fn softnet(facts: &Facts, report: &mut Report) {
    if facts.provider == Provider::Host {
        return report.not_checked(Code::Softnet, "the provider is host, whose jobs have this machine's network");
    }
    let Some(softnet) = &facts.softnet else {
        return report.error(
            Code::Softnet,
            "there is no softnet on the path: guests would reach this machine's network without a filter",
            Fix::told("it comes with tart", &[&["brew", "install", "openai/tools/softnet"]]),
        );
    };
    let path = softnet.path.display().to_string();
    if softnet.set_uid {
        report.ok(Code::Softnet, format!("{path}, set-uid root"));
    } else if softnet.by_sudo {
        report.ok(Code::Softnet, format!("{path}, by sudo without a password"));
    } else {
        report.error(
            Code::Softnet,
            format!("{path} may not run as root, which it needs while it starts"),
            Fix::told(
                "give it the right once, and again after every upgrade of it (it drops the right after its start)",
                &[&["sudo", "chown", "root", &path], &["sudo", "chmod", "u+s", &path]],
            ),
        );
    }
}

/// VMs of others take the slots of ours: two macOS guests are the limit of the whole machine.
pub(super) fn foreign_vms(facts: &Facts, report: &mut Report) {
    let listed = match &facts.tart {
        Some(tart) => report.look(Code::ForeignVms, &tart.listed),
        None => None,
    };
    let running: Vec<&Listed> = listed.into_iter().flatten().filter(|vm| vm.running && !vm.image).collect();
    let foreign: Vec<String> =
        running.iter().filter(|vm| VmName::parse(&vm.name).is_err()).map(|vm| printable(&vm.name)).collect();
    let processes = facts.mac.as_ref().and_then(|mac| report.look(Code::ForeignVms, &mac.vm_processes));
    let unlisted = processes.map_or(0, |processes| processes.saturating_sub(running.len()));
    if !foreign.is_empty() {
        let stop: Vec<String> = foreign.iter().map(|name| format!("stop {name}")).collect();
        report.warning(
            Code::ForeignVms,
            format!("VMs that are not ours run here: {}", foreign.join(", ")),
            Fix::by_hand(format!("if they hold macOS, they take slots: {}", stop.join(", "))),
        );
    }
    if unlisted > 0 {
        report.warning(
            Code::ForeignVms,
            format!("{unlisted} more virtual machines run here, of another user or program"),
            Fix::by_hand("if they hold macOS, they take slots: quit UTM, VirtualBuddy, other runners; Linux VMs (Docker) do no harm"),
        );
    }
    if foreign.is_empty() && unlisted == 0 && (listed.is_some() || processes.is_some()) {
        report.ok(Code::ForeignVms, "no VM of anybody else runs");
    } else if listed.is_none() && processes.is_none() && facts.tart.is_none() && facts.mac.is_none() {
        report.not_checked(Code::ForeignVms, "there is nothing here that runs such VMs");
    }
}

pub(super) fn service(facts: &Facts, report: &mut Report) {
    let Some(service) = report.look(Code::Service, &facts.service) else { return };
    match service {
        Service::Running => report.ok(Code::Service, "installed and running"),
        Service::RunningUntilLogout => report.warning(
            Code::Service,
            "it runs while this user is logged in, and not after a reboot",
            Fix::automatic(&[&["sudo", "loginctl", "enable-linger", &facts.user]]),
        ),
        Service::Stopped => report.warning(
            Code::Service,
            "installed, but it does not run",
            Fix::by_hand("worker install writes and starts it again; its log says why it ended"),
        ),
        Service::Missing => report.note(
            Code::Service,
            "no service starts this worker",
            Fix::by_hand("worker install makes one that starts by itself"),
        ),
    }
}

pub(super) fn limits(facts: &Facts, report: &mut Report) {
    let Some(open_files) = report.look(Code::Limits, &facts.open_files) else { return };
    if *open_files < OPEN_FILES_MIN {
        report.warning(
            Code::Limits,
            format!("a process of this user may open {open_files} files only"),
            Fix::by_hand("the service of worker install sets its own limit; for a shell: ulimit -n 65536"),
        );
    } else {
        report.ok(Code::Limits, format!("{open_files} open files a process"));
    }
}
