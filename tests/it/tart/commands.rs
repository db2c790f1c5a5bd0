//! Exit status and both streams of the short commands (contract 1.1 to 1.9, 1.14; kit case 1).

use super::kit::Kit;

const NO_VM: &str = "the specified VM \"no-such-vm\" does not exist\n";

#[test]
fn a_missing_vm_is_exit_2_with_bare_text_except_for_run() {
    let kit = Kit::any();
    // 1.1: `run` checks in argument validation, which makes it 1 with a prefix.
    kit.tart(&["run", "no-such-vm", "--no-graphics"]).is(1, "", &format!("Error: {NO_VM}"));
    let others: [&[&str]; 7] = [
        &["get", "no-such-vm"],
        &["set", "no-such-vm", "--cpu", "4"],
        &["ip", "no-such-vm"],
        &["exec", "no-such-vm", "true"],
        &["stop", "no-such-vm"],
        &["suspend", "no-such-vm"],
        &["delete", "no-such-vm"],
    ];
    for args in others {
        kit.tart(args).is(2, "", NO_VM);
    }
    kit.tart(&["clone", "no-such-vm", "other"]).is(2, "", NO_VM);
}

#[test]
fn a_stopped_vm_cannot_be_stopped_suspended_or_entered() {
    let kit = Kit::any();
    let vm = kit.vm();
    let not_running = format!("VM \"{vm}\" is not running");
    kit.tart(&["stop", &vm]).is(2, "", &format!("{not_running}\n"));
    kit.tart(&["exec", &vm, "true"]).is(2, "", &format!("{not_running}\n"));
    // 1.1: wrapped twice.
    kit.tart(&["suspend", &vm]).is(2, "", &format!("VM \"{not_running}\" is not running\n"));
}

#[test]
fn rename_refuses_with_64_and_the_usage_of_the_root() {
    let kit = Kit::any();
    let (vm, other) = (kit.vm(), kit.vm());
    let out = kit.tart(&["rename", "no-such-vm", "x"]);
    out.fails(64, "Error: failed to rename a non-existent local VM: no-such-vm\nUsage: tart <subcommand>\n");
    assert!(out.stderr.ends_with("  See 'tart --help' for more information.\n"), "{out:?}");
    let taken = format!("Error: failed to rename VM {vm}, target VM {other} already exists, delete it first!\n");
    kit.tart(&["rename", &vm, &other]).fails(64, &taken);
    let new = kit.name();
    kit.tart(&["rename", &vm, &new]).is(0, "", "");
    assert_eq!((kit.state(&vm), kit.state(&new)), (String::new(), "stopped".to_owned()));
}

#[test]
fn clone_is_silent_and_copies_what_was_written() {
    let kit = Kit::any();
    let run = kit.boot(&[]);
    run.shell("echo kept > $HOME/kept; sync").ok();
    let first = run.name.clone();
    run.stop();
    let second = kit.name();
    kit.tart(&["clone", &first, &second]).is(0, "", "");
    let run = kit.start(&second, &[]);
    run.ready();
    assert_eq!(run.shell("cat $HOME/kept").ok(), "kept\n");
    run.stop();
    assert!(kit.tmp_entries().is_empty(), "clone works in tmp and leaves nothing there");
}

#[test]
fn a_name_with_a_slash_is_no_new_name() {
    let kit = Kit::any();
    let out = kit.tart(&["clone", kit.image(), "a/b"]);
    out.fails(64, "Error: <new-name> should be a local name\nUsage: tart clone <source-name> <new-name> [--insecure]");
    assert!(out.stderr.ends_with("\n  See 'tart clone --help' for more information.\n"), "{out:?}");
    assert_eq!(out.stdout, "");
}

#[test]
fn usage_errors_are_64_on_stderr() {
    let kit = Kit::any();
    let cases: [&[&str]; 8] = [
        &["clone", "only-one"],
        &["clone", "a", "b", "--concurrency", "0"],
        &["clone", "a", "b", "--no-such-flag"],
        &["list", "--source", "oci-or-so"],
        &["list", "--format", "yaml"],
        &["prune"],
        &["exec", "only-a-name"],
        &["no-such-command"],
    ];
    for args in cases {
        let out = kit.tart(args);
        out.fails(64, "Error: ");
        assert!(out.stderr.contains("\nUsage: tart "), "{args:?}: {out:?}");
        assert!(out.stderr.ends_with("--help' for more information.\n"), "{args:?}: {out:?}");
    }
    kit.tart(&["prune"]).fails(64, "at least one pruning criteria must be specified");
}

#[test]
fn the_second_clone_of_an_image_gets_a_mac_of_its_own() {
    let kit = Kit::any();
    let (first, second) = (kit.vm(), kit.vm());
    let config = |name: &str| -> serde_json::Value {
        let text = std::fs::read_to_string(kit.vm_dir(name).join("config.json")).expect("1.17: config.json");
        serde_json::from_str(&text).expect("JSON")
    };
    let (first, second) = (config(&first), config(&second));
    assert_ne!(first["macAddress"], second["macAddress"], "1.2: a MAC that a local VM has is replaced");
    // The identity of the machine is always copied.
    assert_eq!(first["ecid"], second["ecid"]);
    assert!(first["ecid"].is_string() && first["version"] == 1, "{first}");
}

#[test]
fn set_changes_what_the_next_run_sees_and_validates() {
    let kit = Kit::any();
    let vm = kit.vm();
    let get = || -> serde_json::Value {
        serde_json::from_str(kit.tart(&["get", &vm, "--format", "json"]).ok()).expect("JSON")
    };
    let before = get();
    kit.tart(&["set", &vm, "--cpu", "5", "--memory", "9216", "--display", "1280x800"]).is(0, "", "");
    let after = get();
    assert_eq!((after["CPU"].as_i64(), after["Memory"].as_i64()), (Some(5), Some(9216)));
    assert_eq!(after["Display"], "1280x800");
    kit.tart(&["set", &vm, "--cpu", "0"]).fails(1, "");
    // 1.9: the configuration is written before the disk step fails.
    let out = kit.tart(&["set", &vm, "--cpu", "6", "--disk-size", "1"]);
    out.fails(1, "new disk size of 1000000000 should be larger than the current disk size of ");
    assert_eq!(get()["CPU"].as_i64(), Some(6));
    let bigger = before["Disk"].as_i64().expect("an integer") + 10;
    kit.tart(&["set", &vm, "--disk-size", &bigger.to_string()]).is(0, "", "");
    assert_eq!(get()["Disk"].as_i64(), Some(bigger));
    kit.tart(&["set", &vm, "--display", "wide"]).fails(64, "Error: ");
}

#[test]
fn delete_takes_names_in_order_and_stops_at_the_first_failure() {
    let kit = Kit::any();
    let (first, last) = (kit.vm(), kit.vm());
    kit.tart(&["delete", &first, "no-such-vm", &last]).is(2, "", NO_VM);
    assert_eq!((kit.state(&first), kit.state(&last)), (String::new(), "stopped".to_owned()));
    // 1.6: without its config.json it does not exist, and its bytes remain.
    std::fs::remove_file(kit.vm_dir(&last).join("config.json")).expect("1.17: config.json");
    kit.tart(&["delete", &last]).is(2, "", &format!("the specified VM \"{last}\" does not exist\n"));
    assert!(kit.vm_dir(&last).join("disk.img").exists());
    std::fs::remove_dir_all(kit.vm_dir(&last)).expect("cleaning up");
}

#[test]
fn a_broken_vm_directory_says_which_files_are_missing() {
    let kit = Kit::any();
    let vm = kit.vm();
    std::fs::remove_file(kit.vm_dir(&vm).join("nvram.bin")).expect("1.17: nvram.bin");
    let out = kit.tart(&["get", &vm]);
    assert_eq!(out.status.code(), Some(1), "{out:?}");
    assert!(out.stderr.contains("VM is missing"), "{out:?}");
    std::fs::remove_dir_all(kit.vm_dir(&vm)).expect("cleaning up");
}

#[test]
fn fqn_pins_the_digest_of_a_cached_tag() {
    let kit = Kit::any();
    let digest = kit.tart(&["fqn", kit.image()]).ok().trim().to_owned();
    let (name, hex) = digest.split_once("@sha256:").expect("1.14: host/ns@sha256:…");
    assert!(kit.image().starts_with(name) && hex.len() == 64, "{digest}");
    assert!(kit.list().iter().any(|entry| entry["Name"] == *digest), "the digest is listed beside the tag");
    let vm = kit.vm();
    kit.tart(&["fqn", &vm]).is(0, &format!("{vm}\n"), "");
    let absent = "registry.test/no/such:image";
    let text = format!("OCI storage error: {absent} is not a digest and doesn't point to a digest");
    kit.tart(&["fqn", absent]).fails(1, &text);
    kit.tart(&["pull", &vm]).is(0, &format!("\"{vm}\" is a local image, nothing to pull here!\n"), "");
}

#[test]
fn a_truncated_config_makes_every_clone_fail_until_that_vm_is_deleted() {
    let kit = Kit::any();
    let (culprit, other) = (kit.vm(), kit.vm());
    std::fs::write(kit.vm_dir(&culprit).join("config.json"), "{\"version\"").expect("a truncated file");
    let new = kit.name();
    let out = kit.tart(&["clone", kit.image(), &new]);
    assert_eq!(out.status.code(), Some(1), "1.15: {out:?}");
    assert!(out.stderr.starts_with("Error: "), "{out:?}");
    assert_eq!(kit.state(&new), "", "nothing is left of the failed clone");
    // `run` and `list` of others are not affected, and `delete` does not decode it.
    kit.start(&other, &[]).stop();
    kit.tart(&["delete", &culprit]).is(0, "", "");
    kit.tart(&["clone", kit.image(), &new]).is(0, "", "");
}
