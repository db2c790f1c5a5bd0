//! What differs between releases of `tart`, of the agent and of images: one machine has only one of each (contract 10.1).

use std::os::unix::net::UnixStream as StdStream;

use alloy_tests::sim_host::{Agent, Profile, Setup};

use super::agent::{Answer, answers, exec, field, shell};
use super::kit::Kit;

#[test]
fn releases_differ_in_schema_and_flags() {
    for (version, size, overwrite, control) in
        [("2.30.0", "SizeOnDisk", false, false), ("2.35.0", "Size", false, true), ("2.40.0", "Size", true, true)]
    {
        let kit = Kit::sim(Setup { version, ..Setup::default() });
        assert_eq!(kit.tart(&["--version"]).ok(), format!("{version}\n"));
        let vm = kit.vm();
        let all = kit.list();
        let entry = all.iter().find(|entry| entry["Name"] == *vm).expect("it is listed");
        assert!(entry[size].is_u64(), "{version}: {entry}");
        assert_eq!(entry["Accessed"].is_string(), version != "2.30.0", "{entry}");
        let help = |command: &str| kit.tart(&[command, "--help"]).ok().to_owned();
        assert_eq!(help("clone").contains("--overwrite"), overwrite, "{version}");
        assert_eq!(help("run").contains("--net-softnet-control-fd"), control, "{version}");
        // 1.2: onto an existing name, silently or not at all.
        let again = kit.tart(&["clone", kit.image(), &vm]);
        if overwrite {
            again.fails(64, &format!("VM \"{vm}\" already exists, use --overwrite to replace it"));
            kit.tart(&["clone", kit.image(), &vm, "--overwrite"]).is(0, "", "");
        } else {
            again.is(0, "", "");
        }
    }
}

#[test]
fn while_the_agent_is_not_there_connections_are_closed_without_a_byte() {
    let kit = Kit::sim(Setup { time_scale: 10.0, ..Setup::default() });
    let run = kit.start(&kit.vm(), &[]);
    let link = kit.scratch().join("vm");
    std::os::unix::fs::symlink(kit.vm_dir(&run.name), &link).unwrap();
    let mut connected = None;
    kit.wait_for("the socket is bound", || {
        connected = StdStream::connect(link.join("control.sock")).ok();
        connected.is_some()
    });
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut connected.unwrap(), &mut bytes).unwrap();
    assert!(bytes.is_empty(), "{bytes:?}");
    run.stop();
}

#[tokio::test]
async fn an_old_agent_ignores_the_later_fields_and_a_new_one_tells_the_signal() {
    let kit = Kit::sim(Setup::default());
    let boot = |agent: Agent, name: &str| {
        kit.host().publish(name, &Profile { agent, ..Profile::default() }).unwrap();
        let vm = kit.name();
        kit.tart(&["clone", name, &vm]).ok();
        vm
    };
    let (old, new) = (boot(Agent::V0_9, "registry.test/alloy/old:1"), boot(Agent::V0_12, "registry.test/alloy/new:1"));
    let run = kit.boot_named(&old, &[]);
    let (_send, stream) = exec(&kit, &run, shell("pwd", &[field(8, b"/usr")])).await.unwrap();
    assert_eq!(answers(stream).await, [Answer::Out(b"/Users/admin\n".to_vec()), Answer::Exit(0)]);
    run.stop();
    let run = kit.boot_named(&new, &[]);
    let (_send, stream) = exec(&kit, &run, shell("kill -9 $$", &[])).await.unwrap();
    assert_eq!(answers(stream).await, [Answer::Exit(137)]);
    run.stop();
}

#[test]
fn a_vanilla_image_has_an_address_and_no_agent() {
    let kit = Kit::sim(Setup::default());
    kit.host().publish("registry.test/alloy/vanilla:latest", &Profile::vanilla()).unwrap();
    let vm = kit.name();
    kit.tart(&["clone", "registry.test/alloy/vanilla:latest", &vm]).ok();
    let run = kit.start(&vm, &[]);
    kit.tart(&["ip", "--wait", "60", &vm]).ok();
    run.exec(&["true"]).fails(1, "is the Tart Guest Agent running?");
    run.stop();
}
