//! `pull` from a registry that is a directory: `HOST/PATH/tags/TAG` holds a digest, `HOST/PATH/manifests/DIGEST` a profile.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::args::Parsed;
use super::context::Sim;
use super::fault::{Fault, die_of, find};
use super::home::{Reference, RemoteName, VmDir, touch};
use super::image::Profile;
use super::vm::collect_unreferenced;
use super::watch::Cancelled;
use super::{Done, Failure, host, lock, say};

/// How often a broken connection is tried.
const ATTEMPTS: u64 = 5;

pub(crate) fn pull(sim: &Sim, parsed: &Parsed, faults: &[Fault]) -> Done {
    let name = &parsed.names[0];
    let Some(remote) = RemoteName::parse(name) else {
        say(&format!("\"{name}\" is a local image, nothing to pull here!"));
        return Ok(());
    };
    fetch(sim, &remote, faults)
}

pub(crate) fn fetch(sim: &Sim, remote: &RemoteName, faults: &[Fault]) -> Done {
    let cancelled = Cancelled::by_interrupt();
    say(&format!("pulling {remote}..."));
    say("pulling manifest...");
    let (digest, profile) = manifest(sim, remote, faults)?;
    let pinned = remote.with(&digest);
    if remote.cached_digest(sim).as_deref() == Some(&digest) {
        say(&format!("{pinned} image is already cached and linked!"));
        mark_explicit(sim, remote);
        return Ok(());
    }
    let host_dir = remote.host_dir(sim);
    fs::create_dir_all(&host_dir)?;
    let held = match lock::try_exclusive(&host_dir)? {
        Some(held) if find(faults, "lock_held").is_none() => held,
        other => {
            drop(other);
            say("waiting for lock...");
            if let Some(fault) = find(faults, "lock_held") {
                sim.pause(fault.seconds());
            }
            lock::exclusive(&host_dir)?
        }
    };
    if pinned.cached_digest(sim).is_some() {
        if matches!(remote.reference, Reference::Tag(_)) {
            say(&format!("{pinned} image is already cached! creating a symlink..."));
        }
    } else {
        download(sim, remote, &profile, faults, &cancelled)?;
        fs::create_dir_all(pinned.cached(sim).parent().expect("an image is in a directory"))?;
        fs::rename(work_dir(sim, remote).join("image"), pinned.cached(sim))?;
        fs::remove_dir_all(work_dir(sim, remote))?;
    }
    link(sim, remote, &pinned, &digest)?;
    mark_explicit(sim, remote);
    drop(held);
    Ok(())
}

/// Always asks the registry, whatever the cache has.
fn manifest(sim: &Sim, remote: &RemoteName, faults: &[Fault]) -> Result<(String, Profile), Failure> {
    if let Some(fault) = find(faults, "status") {
        return Err(status(fault.number("code").unwrap_or(500.0) as u16));
    }
    if find(faults, "offline").is_some() {
        for _ in 1..ATTEMPTS {
            say("Error pulling image: \"The Internet connection appears to be offline.\", attempting to re-try...");
            sim.pause(1.0);
        }
        return Err(Failure::Error("The Internet connection appears to be offline.".into()));
    }
    let repository = sim.registry.join(&remote.host).join(&remote.path);
    let digest = match &remote.reference {
        Reference::Digest(digest) => digest.clone(),
        Reference::Tag(tag) => {
            let text = fs::read_to_string(repository.join("tags").join(tag)).map_err(|_| status(404))?;
            text.trim().to_owned()
        }
    };
    let text = fs::read(repository.join("manifests").join(&digest)).map_err(|_| status(404))?;
    Ok((digest, serde_json::from_slice(&text)?))
}

fn status(code: u16) -> Failure {
    let details = match code {
        401 => "authentication required",
        404 => "manifest unknown",
        _ => "",
    };
    let text = format!("UnexpectedHTTPStatusCode(when: \"pulling manifest\", code: {code}, details: \"{details}\")");
    Failure::Error(text)
}

/// The same for every pull of this name, so that a killed one can be resumed.
fn work_dir(sim: &Sim, remote: &RemoteName) -> PathBuf {
    let hash = Sha256::digest(remote.to_string());
    let hex: String = hash.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    sim.tmp().join(hex)
}

fn download(sim: &Sim, remote: &RemoteName, profile: &Profile, faults: &[Fault], cancelled: &Cancelled) -> Done {
    let work = work_dir(sim, remote);
    fs::create_dir_all(&work)?;
    let _held = lock::exclusive(&work)?;
    if let Some(digest) = remote.cached_digest(sim) {
        host::first_in_line(&remote.with(&digest).cached(sim));
    }
    host::reclaim(sim, host::pull_need(profile.disk_gb), Path::new(""))?;
    let need = (profile.allocated_gb * 1e9) as u64;
    if find(faults, "no_space").is_some() || host::free(sim) < need {
        return Err(Failure::Error("The operation couldn’t be completed. No space left on device".into()));
    }
    say(&format!("pulling disk ({:.1} GB compressed)...", profile.compressed_gb));
    let result = layers(sim, profile, &work, faults, cancelled);
    if cancelled.is_set() {
        fs::remove_dir_all(&work)?;
        return Err(Failure::Error("CancellationError()".into()));
    }
    result?;
    say("pulling NVRAM...");
    let image = VmDir { name: remote.to_string(), path: work.join("image") };
    image.fill(profile)?;
    touch(&image.path);
    Ok(())
}

fn layers(sim: &Sim, profile: &Profile, work: &Path, faults: &[Fault], cancelled: &Cancelled) -> Done {
    let count = profile.layers.max(1);
    let at = |fault: &Fault| fault.number("percent").unwrap_or(50.0) as u32;
    let mut resets = find(faults, "reset").and_then(|fault| fault.number("times_reset")).unwrap_or(0.0) as u64;
    let mut tries = 1;
    say("0%");
    for layer in 0..count {
        let percent = layer * 100 / count;
        if find(faults, "killed").is_some_and(|fault| percent >= at(fault)) {
            die_of("KILL");
        }
        while find(faults, "stall").is_some_and(|fault| percent >= at(fault)) && !cancelled.is_set() {
            sim.pause(1.0);
        }
        while resets > 0 {
            resets -= 1;
            if tries == ATTEMPTS {
                return Err(Failure::Error("The network connection was lost.".into()));
            }
            tries += 1;
            say("Error pulling image: \"The network connection was lost.\", attempting to re-try...");
            sim.pause(1.0);
        }
        if cancelled.is_set() {
            return Ok(());
        }
        let finished = work.join(format!("layer-{layer}"));
        if !finished.exists() {
            sim.pause(profile.pull_seconds / f64::from(count));
            File::create(finished)?;
        }
        progress(sim, (layer + 1) * 100 / count);
    }
    Ok(())
}

fn progress(sim: &Sim, percent: u32) {
    if sim.ci {
        say(&format!("{percent}%"));
    } else {
        say(&format!("\u{1b}[1A\u{1b}[2K{percent}%"));
    }
}

/// Points the tag at the digest. What it pointed at goes, unless somebody wants it by its digest.
fn link(sim: &Sim, remote: &RemoteName, pinned: &RemoteName, digest: &str) -> Done {
    if matches!(remote.reference, Reference::Digest(_)) {
        return Ok(());
    }
    let tag = remote.cached(sim);
    let old = fs::read_link(&tag).ok();
    let part = tag.with_extension("part");
    std::os::unix::fs::symlink(digest, &part)?;
    fs::rename(part, &tag)?;
    match old {
        Some(old) if old.as_os_str() != digest => {
            collect_unreferenced(&pinned.with(&old.to_string_lossy()).cached(sim))
        }
        _ => Ok(()),
    }
}

fn mark_explicit(sim: &Sim, remote: &RemoteName) {
    if matches!(remote.reference, Reference::Digest(_)) {
        let _ = File::create(remote.cached(sim).join(".explicitly-pulled"));
    }
}
