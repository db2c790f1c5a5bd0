//! `pull` (contract 1.12; kit cases 6 and 7).

use std::process::Stdio;

use alloy_tests::sim_host::{Profile, Setup};
use nix::sys::signal::Signal;
use serde_json::json;

use super::kit::{BASE, Kit, killed_by};

const NAME: &str = "registry.test/alloy/xcode:26";

fn published() -> Kit {
    let kit = Kit::sim(Setup::default());
    kit.host().publish(NAME, &Profile { cpu: 6, ..Profile::default() }).unwrap();
    kit
}

/// Layers that are finished in the work place.
fn finished(kit: &Kit) -> usize {
    let entries = kit.tmp_entries();
    let below =
        entries.iter().flat_map(|entry| std::fs::read_dir(kit.home().join("tmp").join(entry)).into_iter().flatten());
    below.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("layer-")).count()
}

#[test]
fn progress_is_on_stdout_and_the_registry_is_always_asked() {
    let kit = published();
    let out = kit.tart(&["pull", NAME]);
    let text = out.ok();
    assert!(
        text.starts_with(&format!(
            "pulling {NAME}...\npulling manifest...\npulling disk (25.0 GB compressed)...\n0%\n"
        ))
    );
    assert!(text.ends_with("\n100%\npulling NVRAM...\n") && out.stderr.is_empty(), "{out:?}");
    let digest = kit.tart(&["fqn", NAME]).ok().trim().to_owned();
    let again = format!("pulling {NAME}...\npulling manifest...\n{digest} image is already cached and linked!\n");
    kit.tart(&["pull", NAME]).is(0, &again, "");
    kit.host().faults(&[json!({"command": "pull", "fault": "offline", "times": 0})]);
    kit.tart(&["pull", NAME]).fails(1, "Error: ");
    // A clone of a cached image never asks.
    kit.tart(&["clone", NAME, &kit.name()]).is(0, "", "");
}

#[test]
fn an_uncached_image_is_pulled_by_clone() {
    let kit = published();
    let vm = kit.name();
    let out = kit.tart(&["clone", NAME, &vm]);
    assert!(out.ok().starts_with(&format!("pulling {NAME}...\n")), "{out:?}");
    assert_eq!(kit.state(&vm), "stopped");
    kit.tart(&["clone", "registry.test/no/such:image", "x"])
        .fails(1, "Error: UnexpectedHTTPStatusCode(when: \"pulling manifest\", code: 404, details: \"");
}

#[test]
fn a_killed_pull_is_resumed_unless_another_command_collects_it() {
    let kit = published();
    for collected in [false, true] {
        kit.host().faults(&[json!({"command": "pull", "fault": "killed", "percent": 50})]);
        assert!(killed_by(&kit.tart(&["pull", NAME]), Signal::SIGKILL));
        kit.host().faults(&[]);
        assert_eq!(finished(&kit), 10);
        if collected {
            kit.list();
            assert_eq!(finished(&kit), 0, "1.12: the unlocked work place is garbage");
        }
        kit.tart(&["pull", NAME]).ok();
        assert!(kit.tmp_entries().is_empty());
        kit.tart(&["delete", NAME]).is(0, "", "");
    }
}

#[test]
fn an_interrupted_pull_leaves_nothing() {
    let kit = published();
    kit.host().faults(&[json!({"command": "pull", "fault": "stall", "percent": 50})]);
    let mut command = kit.command(&["pull", NAME]);
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    kit.wait_for("half of it is there", || finished(&kit) == 10);
    alloy_tests::process::signal(i32::try_from(child.id()).unwrap(), Signal::SIGINT);
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(1), "{out:?}");
    assert!(kit.tmp_entries().is_empty());
}

#[test]
fn one_pull_per_registry_host_and_the_second_waits() {
    let kit = published();
    kit.host().faults(&[json!({"command": "pull", "fault": "stall", "percent": 50})]);
    let mut first = kit.command(&["pull", NAME]).stdout(Stdio::null()).spawn().unwrap();
    kit.wait_for("half of it is there", || finished(&kit) == 10);
    let other = "registry.test/alloy/other:latest";
    kit.host().publish(other, &Profile { cpu: 7, ..Profile::default() }).unwrap();
    let said = kit.scratch().join("said");
    let mut second = kit.command(&["pull", other]).stdout(std::fs::File::create(&said).unwrap()).spawn().unwrap();
    let text = || std::fs::read_to_string(&said).unwrap();
    kit.wait_for("the second waits", || text().ends_with("waiting for lock...\n"));
    // 1.1: SIGINT does nothing to a waiter, SIGTERM does.
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(second.wait().unwrap().success(), "{}", text());
    kit.list();
}

#[test]
fn a_moved_tag_drops_the_old_digest_unless_it_was_pulled_by_its_name() {
    let kit = published();
    kit.tart(&["pull", NAME]).ok();
    let first = kit.tart(&["fqn", NAME]).ok().trim().to_owned();
    let vm = kit.name();
    kit.tart(&["clone", NAME, &vm]).ok();
    kit.host().publish(NAME, &Profile { cpu: 8, ..Profile::default() }).unwrap();
    let listed = |name: &str| kit.list().iter().any(|entry| entry["Name"] == name);
    assert!(listed(&first), "a clone does not refresh a tag");
    kit.tart(&["pull", NAME]).ok();
    let second = kit.tart(&["fqn", NAME]).ok().trim().to_owned();
    assert!(!listed(&first) && listed(&second) && first != second);
    assert_eq!(kit.state(&vm), "stopped", "clones are independent");
    kit.tart(&["pull", &second]).ok();
    kit.host().publish(NAME, &Profile { cpu: 9, ..Profile::default() }).unwrap();
    kit.tart(&["pull", NAME]).ok();
    assert!(listed(&second), "pinned by digest");
    kit.tart(&["delete", &second]).is(0, "", "");
    assert!(!listed(&second) && listed(NAME));
}

#[test]
fn the_registry_and_the_line_fail_in_their_own_words() {
    let kit = published();
    let fault = |fault: serde_json::Value| {
        kit.host().faults(&[fault]);
        kit.tart(&["pull", NAME])
    };
    for code in [401, 404, 503] {
        let text = format!("Error: UnexpectedHTTPStatusCode(when: \"pulling manifest\", code: {code}, details: \"");
        fault(json!({"command": "pull", "fault": "status", "code": code})).fails(1, &text);
    }
    let out = fault(json!({"command": "pull", "fault": "reset", "times_reset": 2}));
    assert_eq!(out.ok().matches("attempting to re-try...").count(), 2);
    kit.tart(&["delete", NAME]).ok();
    fault(json!({"command": "pull", "fault": "reset", "times_reset": 9})).fails(1, "The network connection was lost.");
    fault(json!({"command": "pull", "fault": "no_space"})).fails(1, "No space left on device");
    let out = fault(json!({"command": "pull", "fault": "lock_held", "seconds": 1}));
    assert!(out.ok().contains("\nwaiting for lock...\n"), "{out:?}");
    assert!(kit.tart(&["pull", BASE]).ok().ends_with("image is already cached and linked!\n"));
}
