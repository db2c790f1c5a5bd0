//! What every provider of VMs promises: one set of cases, over the plain host and over the simulated `tart`.
//!
//! Where the two differ on purpose, the case says so: a plain host tells a signal apart from a status, and in a VM what
//! hides from its command's end lives until the VM is destroyed.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use alloy_shared::env::{Env, Mono};
use alloy_shared::id::Digest;
use alloy_shared::limits::Limits;
use alloy_shared::runtime::SystemEnv;
use alloy_tests::farm::{IMAGE, Provider, bin_dir};
use alloy_tests::observe::{until, until_blocking};
use alloy_tests::process::{Found, processes_in};
use alloy_tests::sim_host::{self, Profile, SimHost};
use anyhow::{Context as _, Result};
use bytes::Bytes;
use nix::fcntl::{Flock, FlockArg};
use serde_json::json;
use tempfile::TempDir;
use tokio::sync::watch;
use worker::provider::host::{self, HOST_IMAGE, Host};
use worker::provider::tart::{self, Settings, TartHost};
use worker::provider::{
    Command, Exec, ExecInput, ExecOutput, Exit, Guest, GuestFile, ImageRef, Listing, Misfit, NetworkPolicy, Run, Shape,
    Signal, VmFault, VmName, VmProvider, inbox_of, vm_dir,
};

on_every_provider! {
    what_a_command_is_given_and_what_it_says_arrive_as_they_are,
    what_is_sent_in_and_taken_out_stays_within_the_workspace,
    a_command_is_stopped_with_all_that_it_started,
    a_vm_that_is_destroyed_leaves_nothing,
}

/// A provider on a host of its own.
struct Bed {
    state: TempDir,
    vms: Arc<dyn VmProvider>,
    image: Digest,
    mac: Option<SimHost>,
    /// Guards kill when nobody says any more that they need not.
    fence: watch::Sender<Mono>,
}

impl Bed {
    async fn new(provider: Provider) -> Result<Bed> {
        let state = tempfile::Builder::new().prefix("alloy-provider-").tempdir()?;
        let fence = watch::Sender::new(Mono(u64::MAX));
        let state_dir = state.path().to_owned();
        let (vms, mac): (Arc<dyn VmProvider>, _) = match provider {
            Provider::Host => {
                let env: Arc<dyn Env> = Arc::new(SystemEnv::detached());
                let (user, path) = ("somebody".to_owned(), std::env::var("PATH")?);
                let guard = bin_dir().join("worker");
                let setup = host::Setup { state_dir, guard, user, path, env, fence: fence.subscribe() };
                (Arc::new(Host::new(setup)?), None)
            }
            Provider::Tart => {
                let mac = SimHost::new(sim_host::Setup::default())?;
                mac.publish(IMAGE, &Profile::default())?;
                (Arc::new(tart_of(&mac, mac.home(), state_dir, fence.subscribe()).await?), Some(mac))
            }
        };
        let image = match provider {
            Provider::Host => vms.find(&ImageRef(HOST_IMAGE.into())).await?.context("a host has its image")?,
            Provider::Tart => vms.pull(&ImageRef(IMAGE.into()), &watch::Sender::default(), &Default::default()).await?,
        };
        Ok(Bed { state, vms, image, mac, fence })
    }

    /// A VM that was made, booted and given to a job.
    async fn guest(&self, number: u64) -> Result<(VmName, Arc<dyn Guest>)> {
        let vm = VmName::mint(7, number);
        self.vms.create(&vm, &self.image, &Shape::default()).await?;
        let guest = self.vms.boot(&vm, &self.inbox(&vm)).await?;
        self.vms.restrict(&vm, &NetworkPolicy::Default).await?;
        Ok((vm, guest))
    }

    fn inbox(&self, vm: &VmName) -> PathBuf {
        inbox_of(self.state.path(), vm)
    }

    /// Processes with this in their command line, in VMs and outside.
    fn running(&self, what: &str) -> Vec<Found> {
        let mut found = processes_in(self.state.path());
        found.extend(self.mac.iter().flat_map(SimHost::processes));
        found.retain(|process| process.line.contains(what));
        found
    }

    fn gone(&self, what: &str) -> Result<()> {
        until_blocking(&format!("`{what}` is gone"), Duration::from_secs(15), || self.running(what).is_empty())
    }
}

/// The VMs of one worker of this Mac.
async fn tart_of(mac: &SimHost, home: PathBuf, state_dir: PathBuf, fence: watch::Receiver<Mono>) -> Result<TartHost> {
    let settings =
        Settings { program: on_its_host(mac)?, home, host_dir: mac.dir().join("mac"), ..Settings::default() };
    let limits = Limits::default();
    let setup = tart::Setup {
        settings,
        state_dir,
        guard: bin_dir().join("worker"),
        env: Arc::new(SystemEnv::detached()),
        fence,
        boot_ms: limits.boot_ms,
        agent_grace_ms: limits.agent_grace_ms,
        pull_stall_ms: limits.pull_stall_ms,
    };
    Ok(TartHost::open(setup).await?)
}

/// The simulated `tart` as a program that needs nothing of the environment but its home.
fn on_its_host(mac: &SimHost) -> Result<PathBuf> {
    let exports = mac
        .env()
        .into_iter()
        .filter(|(name, _)| name != "TART_HOME")
        .map(|(name, value)| format!("export {name}='{value}'\n"));
    let program = mac.dir().join("tart");
    let script = format!("#!/bin/sh\n{}exec '{}' \"$@\"\n", exports.collect::<String>(), mac.tart_path().display());
    fs::write(&program, script)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok(program)
}

fn sh(line: &str) -> Command {
    argv(&["/bin/sh", "-c", line])
}

fn argv(words: &[&str]) -> Command {
    let words = words.iter().map(|word| (*word).to_owned()).collect();
    Command { run: Run::Argv(words), env: BTreeMap::new(), workdir: String::new() }
}

/// The code that a shell would give for this end.
fn code(end: &ExecOutput) -> Option<i32> {
    match end {
        ExecOutput::Exit(Exit::Code(code)) => Some(*code),
        ExecOutput::Exit(Exit::Signal(number)) => Some(128 + number),
        ExecOutput::Bytes(_) | ExecOutput::Lost(_) => None,
    }
}

async fn finish(mut exec: Exec) -> Result<(String, ExecOutput)> {
    let mut log = Vec::new();
    loop {
        match exec.output.recv().await.context("a command has an end")? {
            ExecOutput::Bytes(bytes) => log.extend_from_slice(&bytes),
            end => {
                assert_eq!(exec.output.recv().await, None, "nothing follows the end");
                return Ok((String::from_utf8(log)?, end));
            }
        }
    }
}

async fn run(guest: &Arc<dyn Guest>, command: &Command) -> Result<(String, Option<i32>)> {
    let (log, end) = finish(guest.exec(command).await?).await?;
    Ok((log, code(&end)))
}

/// Runs a line that must succeed, and returns what it said.
async fn said(guest: &Arc<dyn Guest>, line: &str) -> Result<String> {
    let (log, code) = run(guest, &sh(line)).await?;
    assert_eq!(code, Some(0), "{line}: {log}");
    Ok(log)
}

async fn what_a_command_is_given_and_what_it_says_arrive_as_they_are(provider: Provider) -> Result<()> {
    let bed = Bed::new(provider).await?;
    let (vm, guest) = bed.guest(1).await?;

    let line = "i=0; while [ $i -lt 300 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done; printf end; exit 7";
    let both: String = (0..300).map(|i| format!("out {i}\nerr {i}\n")).collect();
    assert_eq!(run(&guest, &sh(line)).await?, (format!("{both}end"), Some(7)));
    let long = said(&guest, "head -c 3000000 /dev/zero | tr '\\0' x; printf end").await?;
    assert_eq!((long.len(), long.ends_with("xend")), (3_000_003, true), "every byte arrives");

    said(&guest, "echo > plain; mkdir 'sub dir'").await?;
    let ends = [
        (sh("exit 255"), 255),
        (sh("kill -9 $$"), 137),
        (sh("kill -TERM $$"), 143),
        (argv(&["true"]), 0),
        (argv(&["no-such-program-here"]), 127),
        (argv(&["./plain"]), 126),
        // Its input is at its end.
        (sh("cat; read line || exit 9"), 9),
    ];
    for (command, expected) in ends {
        assert_eq!(run(&guest, &command).await?.1, Some(expected), "{command:?}");
    }
    let plain = argv(&["printf", "[%s]", "a b", "$HOME", "*", "it's", ""]);
    assert_eq!(run(&guest, &plain).await?, ("[a b][$HOME][*][it's][]".into(), Some(0)));
    let shell = Command { run: Run::Shell("echo $((1 + 1)) \"$X\"".into()), ..in_env(&[("X", "y")]) };
    assert_eq!(run(&guest, &shell).await?, ("2 y\n".into(), Some(0)));

    let given = [("A", "b c\nd'"), ("USER", "else")];
    let (env, _) = run(&guest, &Command { run: Run::Argv(vec!["env".into(), "-0".into()]), ..in_env(&given) }).await?;
    let env: BTreeMap<_, _> = env.split_terminator('\0').filter_map(|line| line.split_once('=')).collect();
    assert_eq!((env.get("A"), env.get("USER")), (Some(&"b c\nd'"), Some(&"else")), "{env:?}");
    assert!(["HOME", "PATH", "TMPDIR"].iter().all(|name| env.contains_key(name)), "{env:?}");
    // Cargo gives these to a test; no command may see anything of a daemon's.
    assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some() && !env.contains_key("CARGO_MANIFEST_DIR"), "{env:?}");
    said(&guest, "cd \"$HOME\" && cd \"$TMPDIR\" && echo > file").await?;

    assert_eq!(said(&guest, "pwd -P").await?.trim_end(), guest.workspace());
    let below = Command { workdir: "sub dir".into(), ..sh("pwd -P") };
    assert_eq!(run(&guest, &below).await?, (format!("{}/sub dir\n", guest.workspace()), Some(0)));
    let nowhere = Command { workdir: "not there".into(), ..sh("true") };
    assert_ne!(run(&guest, &nowhere).await?.1, Some(0));
    bed.vms.destroy(&vm).await?;
    Ok(())
}

fn in_env(pairs: &[(&str, &str)]) -> Command {
    let env = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    Command { env, ..argv(&[]) }
}

/// An archive as a worker makes it of a job's sources.
fn sources() -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut file = |name: &str, mode: u32, body: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_mode(mode);
        header.set_mtime(1_000_000_000);
        header.set_size(body.len() as u64);
        tar.append_data(&mut header, name, body)
    };
    file("a.txt", 0o644, b"one")?;
    file("sub/deep/run", 0o755, b"#!/bin/sh\necho ran\n")?;
    let mut link = tar::Header::new_gnu();
    link.set_entry_type(tar::EntryType::Symlink);
    link.set_size(0);
    tar.append_link(&mut link, "sub/up", "../a.txt")?;
    tar.append_link(&mut link, "out", "/etc/passwd")?;
    Ok(tar.into_inner()?)
}

async fn listing(guest: &Arc<dyn Guest>, rules: &[&str]) -> Result<Listing> {
    let rules: Vec<_> = rules.iter().map(|rule| (*rule).to_owned()).collect();
    Ok(guest.list(&worker::artifacts::parse(&rules)?).await?)
}

/// Path, size, mode of a file and target of a link.
async fn list(guest: &Arc<dyn Guest>, rules: &[&str]) -> Result<Vec<String>> {
    let files = listing(guest, rules).await?.files;
    let shown = |file: GuestFile| match file.link {
        Some(to) => format!("{} -> {to}", file.path),
        None => format!("{} {} {:o}", file.path, file.size, file.mode),
    };
    Ok(files.into_iter().map(shown).collect())
}

/// Every byte that comes; a refusal gives none.
async fn read(guest: &Arc<dyn Guest>, path: &str, limit: u64) -> Vec<u8> {
    let Ok(mut bytes) = guest.read(path, limit).await else { return Vec::new() };
    let mut all = Vec::new();
    while let Some(chunk) = bytes.recv().await {
        all.extend_from_slice(&chunk);
    }
    all
}

async fn what_is_sent_in_and_taken_out_stays_within_the_workspace(provider: Provider) -> Result<()> {
    let bed = Bed::new(provider).await?;
    let (vm, guest) = bed.guest(1).await?;
    fs::write(bed.inbox(&vm).join("s.tar"), sources()?)?;
    guest.unpack("s.tar", "").await?;
    guest.unpack("s.tar", "more").await?;
    let look = "cat sub/up; ./sub/deep/run; readlink out; cat more/a.txt; ls";
    assert_eq!(said(&guest, look).await?, "oneran\n/etc/passwd\nonea.txt\nmore\nout\nsub\n");
    for bad in [("absent.tar", ""), ("s.tar", "../x"), ("s.tar", "/tmp")] {
        assert!(guest.unpack(bad.0, bad.1).await.is_err(), "{bad:?}");
    }

    let make = "mkdir -p made/sub .hid; echo 12345 > made/a; echo x > made/sub/run; chmod 755 made/sub/run; \
                echo s > made/skip.o; ln -s /etc made/etc; ln -s a made/link; ln -s made alias; ln -s /etc/passwd p; \
                mkfifo made/pipe; echo h > .hid/f; mkdir odd; touch odd/plain \"odd/$(printf 'b\\377d')\"; \
                mkdir \"odd/d$(printf '\\377')\"; touch \"odd/d$(printf '\\377')/deep\" 'odd/new\nline'; \
                ln -s \"$(printf '\\377')\" odd/link";
    said(&guest, make).await?;
    let all = ["made/a 6 644", "made/etc -> /etc", "made/link -> a", "made/sub/run 2 755"];
    assert_eq!(list(&guest, &["made", "!**/*.o"]).await?, all);
    let through_links = ["alias/a", "made/etc/passwd", "alias/*", "made/etc/**"];
    assert_eq!(list(&guest, &through_links).await?, [""; 0], "no link is followed");
    assert_eq!(
        list(&guest, &["*/*/run", "made/sub", "made/sub/run"]).await?,
        ["made/sub/run 2 755", "sub/deep/run 19 755"]
    );
    assert_eq!(list(&guest, &["nothing", "!made"]).await?, [""; 0]);
    assert_eq!(list(&guest, &[".hid/*", "odd/plain"]).await?, [".hid/f 2 644", "odd/plain 0 644"]);
    let Listing { files, unfit, .. } = listing(&guest, &["odd", "made/p*", "made/a"]).await?;
    assert_eq!(files.iter().map(|file| &file.path[..]).collect::<Vec<_>>(), ["made/a", "odd/new\nline", "odd/plain"]);
    let unfit: Vec<_> = unfit.into_iter().map(|unfit| (unfit.shown(), unfit.why)).collect();
    let expected = [
        ("made/pipe", Misfit::Pipe),
        ("odd/b\\xffd", Misfit::Name),
        ("odd/d\\xff/deep", Misfit::Name),
        ("odd/link", Misfit::Target),
    ];
    assert_eq!(unfit, expected.map(|(name, why)| (name.to_owned(), why)), "it is named, and spoils nothing");

    assert_eq!(read(&guest, "made/a", 100).await, b"12345\n");
    assert_eq!(read(&guest, "made/a", 4).await, b"1234", "no more than is asked for");
    let long = said(&guest, "head -c 1000000 /dev/urandom > long; sha256sum long").await?;
    let sum = alloy_tests::noise::sha256_of(&read(&guest, "long", 2_000_000).await);
    assert!(long.starts_with(&sum), "{long}");
    for outside in ["alias/a", "p", "made/etc/passwd", "made/pipe", "made", "../x", "/etc/passwd", "absent", "made/a/x"]
    {
        assert_eq!(read(&guest, outside, 100).await, b"", "{outside}");
    }
    bed.vms.destroy(&vm).await?;
    Ok(())
}

/// Leaves a process that has forked twice, has a session of its own and ignores SIGTERM.
const HIDDEN: &str = "(setsid sh -c 'trap \"\" TERM; while :; do sleep 4321; done' </dev/null >/dev/null 2>&1 &)";

async fn up(guest: &Arc<dyn Guest>, line: &str) -> Result<Exec> {
    let mut exec = guest.exec(&sh(line)).await?;
    assert_eq!(exec.output.recv().await, Some(ExecOutput::Bytes(Bytes::from_static(b"up\n"))), "{line}");
    Ok(exec)
}

async fn a_command_is_stopped_with_all_that_it_started(provider: Provider) -> Result<()> {
    let bed = Bed::new(provider).await?;
    let (vm, guest) = bed.guest(1).await?;

    // Asked to stop, all of it has time to say its last words.
    let line = "trap 'wait; echo parent; exit 3' TERM; \
                sh -c 'trap \"echo child; exit 0\" TERM; echo up; while :; do sleep 0.01; done' & wait; wait";
    let exec = up(&guest, line).await?;
    exec.input.send(ExecInput::Signal(Signal::Term)).await?;
    let (log, end) = finish(exec).await?;
    assert!(log.contains("child\n") && code(&end) == Some(3), "{log} {end:?}");

    // What does not want to is killed.
    let exec = up(&guest, "trap '' TERM; (sleep 1234; sleep 1234) & echo up; while :; do sleep 1234; done").await?;
    assert!(!bed.running("sleep 1234").is_empty());
    exec.input.send(ExecInput::Signal(Signal::Term)).await?;
    exec.input.send(ExecInput::Signal(Signal::Kill)).await?;
    assert_eq!(code(&finish(exec).await?.1), Some(137));
    bed.gone("sleep 1234")?;

    // What is left when the command ends holds up nothing and ends with it, the log open or not.
    assert_eq!(
        run(&guest, &sh("sleep 1235 & sleep 1235 >/dev/null 2>&1 & echo done; exit 4")).await?,
        ("done\n".into(), Some(4))
    );
    bed.gone("sleep 1235")?;

    // Nobody listens any more.
    drop(up(&guest, "echo up; sleep 1236; sleep 1236").await?);
    bed.gone("sleep 1236")?;

    let hides = up(&guest, &format!("{HIDDEN}; echo up; sleep 4321")).await?;
    until_blocking("it hides", Duration::from_secs(15), || bed.running("sleep 4321").len() >= 2)?;
    bed.vms.destroy(&vm).await?;
    assert!(!matches!(finish(hides).await?.1, ExecOutput::Exit(Exit::Code(0))), "no success");
    bed.gone("sleep 4321")
}

async fn a_vm_that_is_destroyed_leaves_nothing(provider: Provider) -> Result<()> {
    let bed = Bed::new(provider).await?;
    assert_eq!(bed.vms.list().await?, []);
    let (vm, guest) = bed.guest(1).await?;
    assert_eq!(bed.vms.list().await?, std::slice::from_ref(&vm));
    let leaves =
        "mkdir -p a/b; echo x > a/b/c; chmod 0 a/b; chmod 500 a; echo mark > \"$HOME/mark\"; echo x > \"$TMPDIR/mark\"";
    said(&guest, leaves).await?;
    drop(guest);
    bed.vms.destroy(&vm).await?;
    assert_eq!(bed.vms.list().await?, []);
    assert!(!vm_dir(bed.state.path(), &vm).exists());
    bed.gone("")?;
    // Asked again, there is nothing to do.
    bed.vms.destroy(&vm).await?;

    let (next, guest) = bed.guest(2).await?;
    assert_eq!(said(&guest, "ls -A; cat \"$HOME/mark\" 2>/dev/null || true").await?, "", "the next one is new");
    bed.vms.destroy(&next).await?;
    // Made and never booted.
    let unused = VmName::mint(7, 3);
    bed.vms.create(&unused, &bed.image, &Shape::default()).await?;
    bed.vms.destroy(&unused).await?;
    assert_eq!(bed.vms.list().await?, []);
    bed.gone("")?;
    if let Some(mac) = &bed.mac {
        mac.assert_no_leak();
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_boot_that_nobody_waits_for_keeps_its_place_until_it_is_destroyed() -> Result<()> {
    let bed = Bed::new(Provider::Tart).await?;
    let mac = bed.mac.as_ref().context("it is one of tart")?;
    mac.faults(&[json!({ "command": "run", "fault": "hang" })]);
    let vm = VmName::mint(7, 1);
    bed.vms.create(&vm, &bed.image, &Shape::default()).await?;
    let line = format!("run {vm}");
    let inbox = bed.inbox(&vm);
    let hangs = until("it hangs", async || Ok((!bed.running(&line).is_empty()).then_some(())));
    // What the pool does at its deadline.
    tokio::select! {
        booted = bed.vms.boot(&vm, &inbox) => anyhow::bail!("it booted: {:?}", booted.map(drop)),
        () = hangs => {}
    }
    let place = || {
        Flock::lock(fs::File::open(mac.dir().join("mac/vm-0.lock"))?, FlockArg::LockExclusiveNonblock)
            .map(drop)
            .map_err(|(_, errno)| std::io::Error::from(errno))
    };
    assert!(place().is_err(), "the next VM would be a third one");
    bed.vms.destroy(&vm).await?;
    assert_eq!(bed.running(&line).len(), 0);
    place()?;
    mac.assert_no_leak();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_workers_of_one_mac_run_two_vms_together() -> Result<()> {
    let bed = Bed::new(Provider::Tart).await?;
    let mac = bed.mac.as_ref().context("it is one of tart")?;
    let state = mac.dir().join("user/second");
    let other = tart_of(mac, mac.other_home("second-home"), state.clone(), bed.fence.subscribe()).await?;
    other.pull(&ImageRef(IMAGE.into()), &watch::Sender::default(), &Default::default()).await?;
    let (first, guest) = bed.guest(1).await?;
    let (second, _guest) = bed.guest(2).await?;
    drop(guest);

    let third = VmName::mint(8, 1);
    other.create(&third, &bed.image, &Shape::default()).await?;
    let refused = other.boot(&third, &inbox_of(&state, &third)).await.err().context("a third VM was started")?;
    assert!(refused.what == VmFault::Full && refused.tail.contains("another worker"), "{refused}");
    let runs = |vm: &VmName| mac.journal().iter().any(|entry| entry.argv.starts_with(&["run".into(), vm.to_string()]));
    assert!(runs(&second) && !runs(&third), "it was not even tried");

    bed.vms.destroy(&first).await?;
    drop(other.boot(&third, &inbox_of(&state, &third)).await?);
    other.destroy(&third).await?;
    bed.vms.destroy(&second).await?;
    mac.assert_no_leak();
    Ok(())
}
