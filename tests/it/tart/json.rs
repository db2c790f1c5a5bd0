//! Shapes of `list` and `get`, versions and help (contract 1.7, 1.8, appendix A; kit case 10).

use std::collections::BTreeSet;

use serde_json::Value;

use super::kit::Kit;

fn keys(value: &Value) -> BTreeSet<&str> {
    value.as_object().expect("an object").keys().map(String::as_str).collect()
}

#[test]
fn list_is_pretty_json_with_escaped_slashes_and_both_names_of_an_image() {
    let kit = Kit::any();
    let vm = kit.vm();
    let text = kit.tart(&["list", "--format", "json"]).ok().to_owned();
    assert!(text.starts_with("[\n  {\n    \"") && text.ends_with("\n  }\n]\n"), "{text}");
    let name = kit.image().replace('/', "\\/");
    assert!(text.contains(&format!("\"Name\" : \"{name}\"")), "{text}");
    let all: Vec<Value> = serde_json::from_str(&text).expect("JSON");
    let of = |name: &str| all.iter().find(|entry| entry["Name"] == name).unwrap_or_else(|| panic!("{name}: {text}"));
    let local = of(&vm);
    let expected = ["Accessed", "Disk", "Name", "Running", "Size", "Source", "State"].into();
    assert!(keys(local).is_superset(&expected), "{local}");
    assert_eq!((local["Source"].as_str(), local["State"].as_str()), (Some("local"), Some("stopped")));
    assert_eq!(local["Running"], false);
    assert!(local["Disk"].is_u64() && local["Size"].is_u64(), "1.7: integers: {local}");
    let accessed = local["Accessed"].as_str().expect("a string");
    assert!(accessed.len() == 20 && accessed.ends_with('Z') && accessed.as_bytes()[10] == b'T', "{accessed}");
    let digest = kit.tart(&["fqn", kit.image()]).ok().trim().to_owned();
    assert_eq!((of(kit.image())["Source"].as_str(), of(&digest)["Source"].as_str()), (Some("OCI"), Some("OCI")));
    // Sorted by name, the local group first.
    let sources: Vec<_> = all.iter().map(|entry| entry["Source"] == "OCI").collect();
    assert!(sources.is_sorted(), "{text}");
}

#[test]
fn list_filters_by_source_and_can_be_quiet() {
    let kit = Kit::any();
    let vm = kit.vm();
    let local = kit.tart(&["list", "--source", "local", "-q"]).ok().to_owned();
    assert!(local.lines().any(|line| line == vm) && !local.contains('/'), "{local}");
    let oci = kit.tart(&["list", "--source", "oci", "--quiet"]).ok().to_owned();
    assert!(oci.lines().any(|line| line == kit.image()) && !oci.contains(&vm), "{oci}");
    assert!(kit.tart(&["list"]).ok().starts_with("Source"), "the default is text with a heading");
}

#[test]
fn get_has_a_string_for_size_and_follows_the_state() {
    let kit = Kit::any();
    let run = kit.start(&kit.vm(), &[]);
    let get = |name: &str| kit.tart(&["get", name, "--format", "json"]).ok().to_owned();
    let text = get(&run.name);
    assert!(text.starts_with("{\n  \"") && text.contains("\" : "), "{text}");
    let value: Value = serde_json::from_str(&text).expect("JSON");
    let expected = ["CPU", "Disk", "DiskFormat", "Display", "Memory", "OS", "Running", "Size", "State"].into();
    assert!(keys(&value).is_superset(&expected), "{value}");
    assert_eq!((value["OS"].as_str(), value["State"].as_str()), (Some("darwin"), Some("running")));
    assert_eq!((&value["Running"], value["DiskFormat"].as_str()), (&Value::Bool(true), Some("raw")));
    assert!(value["CPU"].is_u64() && value["Memory"].is_u64() && value["Disk"].is_u64(), "{value}");
    let (whole, digits) = value["Size"].as_str().expect("1.8: a string").split_once('.').expect("a point");
    assert!(whole.parse::<u64>().is_ok() && digits.len() == 3, "{value}");
    let name = run.name.clone();
    run.stop();
    let value: Value = serde_json::from_str(&get(&name)).expect("JSON");
    assert_eq!((value["State"].as_str(), &value["Running"]), (Some("stopped"), &Value::Bool(false)));
}

#[test]
fn version_is_bare_and_help_names_the_flags_that_a_probe_looks_for() {
    let kit = Kit::any();
    let out = kit.tart(&["--version"]);
    let version = out.ok().trim();
    assert!(version.split('.').all(|part| part.parse::<u32>().is_ok()), "{version}");
    let help = |command: &str| kit.tart(&[command, "--help"]).ok().to_owned();
    let run = help("run");
    for flag in ["--no-graphics", "--no-audio", "--no-clipboard", "--dir", "--net-softnet-allow", "--suspendable"] {
        assert!(run.contains(flag), "{flag}: {run}");
    }
    assert!(help("clone").contains("--prune-limit") && help("set").contains("--random-mac"));
    let root = kit.tart(&["--help"]).ok().to_owned();
    assert!(root.contains("SUBCOMMANDS:") && root.contains("exec") && !root.contains("fqn"), "{root}");
}
