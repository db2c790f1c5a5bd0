//! Guests of a simulated host see nothing of each other and nothing of the host, and nothing of them stays. Without root
//! there are no namespaces, and nothing here to show.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use alloy_tests::sim_host::{Profile, Setup};

use super::kit::{BASE, Kit};

fn isolated() -> Option<Kit> {
    let possible = nix::unistd::geteuid().is_root() && cfg!(target_os = "linux");
    if !possible {
        eprintln!("SKIPPED: namespaces need root on Linux");
    }
    possible.then(|| Kit::sim(Setup::default()))
}

#[test]
fn files_processes_and_ports_of_one_guest_are_invisible_to_the_next_and_to_its_neighbour() {
    let Some(kit) = isolated() else { return };
    let mark = "mkdir -p $HOME/w /var/tmp/w; for f in $HOME/w /tmp /var/tmp/w /usr/local /etc; do echo x > $f/canary; done; \
                hostname marked; setsid sleep 7654 >/dev/null 2>&1 </dev/null & \
                setsid bash -c 'exec 3<>/dev/tcp/127.0.0.1/1 2>/dev/null; true' ; true";
    let look = "ls -d $HOME/w/canary /tmp/canary /var/tmp/w/canary /usr/local/canary /etc/canary 2>/dev/null; \
                hostname; ps -axo args= | grep -c '^sleep 7654'; ls /proc | grep -c '^[0-9]'";
    let first = kit.boot(&[]);
    first.shell(mark).ok();
    let listener = "perl -e 'use IO::Socket; my $s = IO::Socket::INET->new(LocalPort => 8123, Listen => 1); \
                    open(F, \">/tmp/listens\"); close F; sleep 1000' >/dev/null 2>&1 </dev/null &";
    first.shell(listener).ok();
    kit.wait_for("the port listens", || first.shell("test -e /tmp/listens").status.success());
    let check = |out: String| {
        let lines: Vec<_> = out.lines().collect();
        assert_eq!(lines[..2], ["admins-Virtual-Machine", "0"], "{out}");
        assert!(lines[2].parse::<u32>().unwrap() < 10, "only its own processes: {out}");
    };
    let port = "perl -e 'use IO::Socket; exit(IO::Socket::INET->new(PeerAddr => \"127.0.0.1:8123\") ? 0 : 7)'";
    first.shell(port).ok();
    let neighbour = kit.boot(&[]);
    check(neighbour.shell(look).ok().to_owned());
    assert_eq!(neighbour.shell(port).status.code(), Some(7));
    assert!(TcpStream::connect("127.0.0.1:8123").is_err(), "nor does the host see it");
    first.stop();
    neighbour.stop();
    let next = kit.boot(&[]);
    check(next.shell(look).ok().to_owned());
    next.stop();
}

#[test]
fn a_guest_sees_neither_the_hosts_vms_nor_its_disks_nor_its_network() {
    let Some(kit) = isolated() else { return };
    let other = kit.vm();
    let run = kit.boot(&[]);
    let home = kit.home().display().to_string();
    assert_ne!(run.exec(&["ls", &format!("{home}/vms/{other}")]).status.code(), Some(0));
    assert_eq!(run.shell("ls /tmp | wc -l; ls /dev | grep -c -E 'vda|sda|nvme|mem|kmsg'").stdout, "0\n0\n");
    assert_eq!(run.shell("grep -v lo: /proc/net/dev | tail -n +3 | wc -l").ok(), "0\n");
    // The machine's clock and kernel are not the guest's.
    assert_ne!(run.shell("/usr/lib/sim-tart/date.real -s 2001-01-01").status.code(), Some(0));
    assert_ne!(run.shell("mknod /tmp/disk b 254 0").status.code(), Some(0));
    run.stop();
}

#[test]
fn killing_a_vm_kills_everything_in_it_and_leaves_no_mount() {
    let Some(kit) = isolated() else { return };
    let mut mounts = Vec::new();
    for _ in 0..3 {
        let run = kit.boot(&[]);
        run.shell(
            "for i in 1 2 3 4 5; do setsid sh -c 'trap \"\" TERM HUP INT; while :; do sleep 9876; done' \
                   >/dev/null 2>&1 </dev/null & done; mkdir -p $HOME/deep/er; chmod 000 $HOME/deep",
        )
        .ok();
        let inside = || kit.host().processes().iter().filter(|found| found.line.contains("9876")).count();
        kit.wait_for("they all run", || inside() >= 10);
        run.signal(nix::sys::signal::Signal::SIGKILL);
        let vm = run.name.clone();
        run.end();
        kit.tart(&["delete", &vm]).is(0, "", "");
        kit.wait_for("all of it is gone", || kit.host().processes().is_empty());
        mounts.push(std::fs::read_to_string("/proc/self/mounts").unwrap().lines().count());
        kit.host().assert_no_leak();
    }
    assert!(mounts.windows(2).all(|pair| pair[0] == pair[1]), "{mounts:?}");
}

#[test]
fn a_stopped_vm_is_wholly_gone_when_stop_returns() {
    let Some(kit) = isolated() else { return };
    let run = kit.boot(&[]);
    run.shell("for i in 1 2 3 4 5 6 7 8; do setsid sleep 5432 >/dev/null 2>&1 </dev/null & done").ok();
    run.signal(nix::sys::signal::Signal::SIGINT);
    let out = run.end();
    assert_eq!(out.stdout, "Stopping VM...\n");
    // No wait: the end of `run` is the end of the guest.
    assert_eq!(kit.host().processes(), []);
}

#[test]
fn ssh_reaches_the_guest_at_its_address_with_its_password() {
    let Some(kit) = isolated() else { return };
    if !std::path::Path::new("/usr/sbin/sshd").exists() {
        eprintln!("SKIPPED: no OpenSSH server");
        return;
    }
    kit.host().publish("registry.test/alloy/vanilla:latest", &Profile::vanilla()).unwrap();
    let vm = kit.name();
    kit.tart(&["clone", "registry.test/alloy/vanilla:latest", &vm]).ok();
    let run = kit.start(&vm, &[]);
    let ip = kit.tart(&["ip", "--wait", "60", &vm]).ok().trim().to_owned();
    kit.wait_for("sshd answers", || TcpStream::connect((&*ip, 22)).is_ok());
    let askpass = kit.scratch().join("askpass");
    std::fs::write(&askpass, "#!/bin/sh\necho admin\n").unwrap();
    std::fs::set_permissions(&askpass, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut ssh = std::process::Command::new("ssh");
    ssh.args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]);
    ssh.args([&format!("admin@{ip}"), "whoami; pwd; hostname; exit 3"]).stdin(std::process::Stdio::null());
    ssh.env("SSH_ASKPASS", &askpass).env("SSH_ASKPASS_REQUIRE", "force").env("DISPLAY", ":0");
    super::kit::output(&mut ssh).is(3, "admin\n/Users/admin\nadmins-Virtual-Machine\n", "");
    // Its agent is absent, as in every vanilla image.
    assert_eq!(run.exec(&["true"]).status.code(), Some(1));
    run.stop();
    assert!(TcpStream::connect((&*ip, 22)).is_err());
}

#[test]
fn a_full_disk_is_full_for_the_guest_only() {
    let Some(kit) = isolated() else { return };
    kit.host().publish(BASE, &Profile { disk_free_mib: Some(8), ..Profile::default() }).unwrap();
    kit.tart(&["pull", BASE]).ok();
    let run = kit.boot(&[]);
    let out = run.shell("head -c 20000000 /dev/zero > $HOME/big");
    assert!(out.status.code() != Some(0) && out.stderr.contains("No space left on device"), "{out:?}");
    run.stop();
}

#[test]
fn output_of_a_guest_may_be_anything() {
    let Some(kit) = isolated() else { return };
    let run = kit.boot(&[]);
    // F26: many bytes, no line end, no UTF-8.
    let mut command = kit.command(&[
        "exec",
        &run.name,
        "/bin/sh",
        "-c",
        "printf '\\377\\376'; head -c 100000000 /dev/zero; printf end",
    ]);
    let mut child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let (mut out, mut len, mut last) = (child.stdout.take().unwrap(), 0, Vec::new());
    let mut buffer = vec![0; 1 << 16];
    while let Ok(read @ 1..) = out.read(&mut buffer) {
        len += read;
        last.extend(&buffer[..read]);
        let from = last.len().saturating_sub(3);
        last.drain(..from);
    }
    assert!(child.wait().unwrap().success());
    assert_eq!((len, &*last), (100_000_005, &b"end"[..]));
    std::io::stderr().flush().unwrap();
    run.stop();
}
