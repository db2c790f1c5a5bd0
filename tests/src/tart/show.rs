//! `list`, `get` and `fqn`, to the byte.

use std::time::SystemTime;

use serde_json::Value;

use super::args::Parsed;
use super::context::{Sim, Version, dice, iso, wall};
use super::fault::{Fault, find};
use super::home::{GB, RemoteName, State, VmDir, cached_images, local_vms};
use super::{Done, Failure, host, say};

pub(crate) fn list(sim: &Sim, parsed: &Parsed, faults: &[Fault]) -> Done {
    let mut rows = Vec::new();
    if parsed.value("source") != Some("oci") {
        rows.extend(local_vms(sim).into_iter().map(|vm| ("local", vm)));
    }
    if parsed.value("source") != Some("local") {
        rows.extend(cached_images(sim).into_iter().map(|image| ("OCI", image)));
    }
    if parsed.has("quiet") {
        rows.iter().for_each(|(_, vm)| say(&vm.name));
        return Ok(());
    }
    if parsed.value("format") != Some("json") {
        say(&table(&rows));
        return Ok(());
    }
    let old = sim.version == Version::V2_30 || find(faults, "old_schema").is_some();
    let extra = find(faults, "extra_keys").is_some();
    let objects: Vec<_> = rows.iter().map(|(source, vm)| entry(source, vm, old, extra)).collect();
    if objects.is_empty() {
        say("[\n\n]");
        return Ok(());
    }
    let texts: Vec<_> = objects.into_iter().map(|members| format!("  {}", object(members, "  "))).collect();
    say(&format!("[\n{}\n]", texts.join(",\n")));
    Ok(())
}

fn entry(source: &str, vm: &VmDir, old: bool, extra: bool) -> Vec<(&'static str, Value)> {
    let state = if source == "local" { vm.state() } else { State::Stopped };
    let allocated = host::allocated(vm) / GB;
    let mut members = vec![
        ("Source", source.into()),
        ("Name", vm.name.as_str().into()),
        ("Disk", (vm.disk_bytes() / GB).into()),
        ("Running", (state == State::Running).into()),
        ("State", state.text().into()),
    ];
    if old {
        members.push(("Size", allocated.into()));
        members.push(("SizeOnDisk", allocated.into()));
    } else {
        members.push(("Size", allocated.into()));
        members.push(("Accessed", iso(vm.accessed()).into()));
    }
    if extra {
        members.push(("FutureKey", Value::Object([("Nested".to_owned(), Value::Null)].into_iter().collect())));
    }
    members
}

pub(crate) fn get(sim: &Sim, parsed: &Parsed) -> Done {
    let vm = VmDir::open(sim, &parsed.names[0])?;
    let (config, state) = (vm.config()?, vm.state());
    let size = host::allocated(&vm) as f64 / GB as f64;
    let display = format!(
        "{}x{}{}",
        config.display.width,
        config.display.height,
        config.display.unit.as_deref().unwrap_or_default()
    );
    let members: Vec<(&str, Value)> = vec![
        ("OS", config.os.into()),
        ("CPU", config.cpu_count.into()),
        ("Memory", (config.memory_size >> 20).into()),
        ("Disk", (vm.disk_bytes() / GB).into()),
        ("DiskFormat", config.disk_format.into()),
        ("Size", format!("{size:.3}").into()),
        ("Display", display.into()),
        ("Running", (state == State::Running).into()),
        ("State", state.text().into()),
    ];
    if parsed.value("format") == Some("json") {
        say(&object(members, ""));
        return Ok(());
    }
    let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let names: Vec<_> = members.iter().map(|(name, _)| *name).collect();
    let values: Vec<_> = members.iter().map(|(_, value)| plain(value)).collect();
    say(&format!("{}\n{}", names.join("\t"), values.join("\t")));
    Ok(())
}

pub(crate) fn fqn(sim: &Sim, parsed: &Parsed) -> Done {
    let name = &parsed.names[0];
    match RemoteName::parse(name) {
        None => say(name),
        Some(remote) => {
            let digest = remote.cached_digest(sim).ok_or_else(|| {
                let text = format!("OCI storage error: {remote} is not a digest and doesn't point to a digest");
                Failure::Bare(text)
            })?;
            say(&remote.with(&digest).to_string());
        }
    }
    Ok(())
}

/// Members in an order that nobody may rely on, with ` : ` and escaped slashes.
fn object(mut members: Vec<(&'static str, Value)>, indent: &str) -> String {
    let length = members.len();
    for index in (1..length).rev() {
        members.swap(index, (dice() % (index as u64 + 1)) as usize);
    }
    let lines: Vec<_> = members
        .into_iter()
        .map(|(name, value)| format!("{indent}  \"{name}\" : {}", value.to_string().replace('/', "\\/")))
        .collect();
    format!("{{\n{}\n{indent}}}", lines.join(",\n"))
}

/// For people only.
fn table(rows: &[(&str, VmDir)]) -> String {
    let mut lines = vec!["Source Name Disk Size Accessed State".to_owned()];
    lines.extend(rows.iter().map(|(source, vm)| {
        let state = if *source == "local" { vm.state() } else { State::Stopped };
        let size = host::allocated(vm) / GB;
        format!("{source} {} {} {size} {} {}", vm.name, vm.disk_bytes() / GB, relative(vm.accessed()), state.text())
    }));
    lines.join("\n")
}

fn relative(time: SystemTime) -> String {
    let minutes = wall().duration_since(time).unwrap_or_default().as_secs() / 60;
    format!("{minutes} minutes ago")
}
