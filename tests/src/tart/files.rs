//! The garbage collection before other commands, `prune`, `export` and `import`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::args::Parsed;
use super::context::{Sim, dice, wall};
use super::home::{State, VmDir, cached_images, local_vms, new_mac};
use super::vm::remove_tree;
use super::{Done, Failure, host, lock, say};

/// Deletes every entry of `tmp` that nobody works in.
pub(crate) fn collect_garbage(sim: &Sim) {
    let entries = fs::read_dir(sim.tmp()).into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()) {
        match lock::try_exclusive(&path) {
            Ok(None) => {}
            Ok(Some(_held)) => {
                let gone = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                if let Err(error) = gone {
                    eprintln!("Failed to perform garbage collection: {error}");
                }
            }
            // Somebody else was faster.
            Err(_) => {}
        }
    }
}

pub(crate) fn prune(sim: &Sim, parsed: &Parsed) -> Done {
    let older = parsed.number("older-than")?;
    let budget = parsed.number("space-budget")?.or(parsed.number("cache-budget")?);
    if older.is_none() && budget.is_none() && !parsed.has("gc") {
        return Err(Failure::Usage("at least one pruning criteria must be specified".into()));
    }
    let is_vms = parsed.value("entries") == Some("vms");
    let mut entries = if is_vms {
        // A running one is skipped; a suspended one is not.
        local_vms(sim).into_iter().filter(|vm| vm.state() != State::Running).collect::<Vec<_>>()
    } else {
        cached_images(sim).into_iter().filter(|image| !image.path.is_symlink()).collect()
    };
    entries.sort_by_key(VmDir::accessed);
    let remove = |vm: &VmDir| if is_vms { remove_tree(&vm.path) } else { host::remove_image(&vm.path) };
    if let Some(days) = older {
        let since = wall() - Duration::from_secs(days * 86_400);
        let (old, young): (Vec<_>, Vec<_>) = entries.into_iter().partition(|vm| vm.accessed() <= since);
        old.iter().try_for_each(remove)?;
        entries = young;
    }
    if let Some(budget) = budget {
        let mut left = budget << 30;
        // The most recently used stay.
        for vm in entries.iter().rev() {
            match left.checked_sub(host::allocated(vm)) {
                Some(rest) => left = rest,
                None => {
                    left = 0;
                    remove(vm)?;
                }
            }
        }
    }
    Ok(())
}

pub(crate) fn export(sim: &Sim, parsed: &Parsed) -> Done {
    let vm = VmDir::open(sim, &parsed.names[0])?;
    let path = parsed.names.get(1).map_or_else(|| PathBuf::from(format!("{}.tvm", vm.name)), PathBuf::from);
    say("exporting...");
    tar(&["-cSf"], &path, &vm.path, "export")
}

pub(crate) fn import(sim: &Sim, parsed: &Parsed) -> Done {
    let (path, name) = (&parsed.names[0], &parsed.names[1]);
    say("importing...");
    let _global = lock::exclusive(&sim.home)?;
    let work = sim.tmp().join(format!("import-{:x}", dice()));
    fs::create_dir(&work)?;
    let _held = lock::exclusive(&work)?;
    tar(&["-xSf"], Path::new(path), &work, "import")?;
    let vm = VmDir { name: name.clone(), path: work.clone() };
    vm.complete()?;
    let mut config = vm.config()?;
    for other in local_vms(sim) {
        if other.config()?.mac_address == config.mac_address {
            config.mac_address = new_mac();
        }
    }
    config.write(&vm.config_path())?;
    let target = VmDir::local(sim, name);
    if target.path.exists() {
        remove_tree(&target.path)?;
    }
    Ok(fs::rename(&work, &target.path)?)
}

fn tar(mode: &[&str], archive: &Path, dir: &Path, what: &str) -> Done {
    let archive = std::path::absolute(archive)?;
    let out = Command::new("tar").args(mode).arg(archive).arg("-C").arg(dir).arg(".").output()?;
    if out.status.success() {
        return Ok(());
    }
    Err(Failure::Bare(format!("VM {what} failed: {}", String::from_utf8_lossy(&out.stderr).trim_end())))
}
