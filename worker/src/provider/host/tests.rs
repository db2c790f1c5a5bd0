use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::Stdio;

use alloy_shared::env::Now;
use alloy_shared::limits;
use alloy_shared::runtime::SystemEnv;
use nix::fcntl::{OFlag, openat};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal as Number, kill};
use nix::sys::stat::Mode;
use nix::unistd::Pid;

use super::*;
use crate::guard::tests::{eventually, guard_program, is_alive, pid_in};
use crate::provider::{ExecInput, ExecOutput, Exit, GuestFile, Misfit, RuleKind, Signal, inbox_of};

/// A host provider in a directory of its own.
pub(crate) struct Fixture {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) env: Arc<dyn Env>,
    pub(crate) fence: watch::Sender<Mono>,
    pub(crate) host: Arc<Host>,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::at(dir)
    }

    fn at(dir: tempfile::TempDir) -> Self {
        let env: Arc<dyn Env> = Arc::new(SystemEnv::detached());
        let fence = watch::Sender::new(Mono(u64::MAX));
        let host = host_in(dir.path(), Arc::clone(&env), fence.subscribe());
        Self { dir, env, fence, host }
    }

    async fn guest(&self) -> (VmName, Arc<dyn Guest>) {
        let vm = VmName::mint(7, 1);
        let image = self.host.find(&ImageRef(HOST_IMAGE.into())).await.unwrap().unwrap();
        self.host.create(&vm, &image, &Shape::default()).await.unwrap();
        let guest = self.host.boot(&vm, &inbox_of(self.dir.path(), &vm)).await.unwrap();
        (vm, guest)
    }

    fn work(&self) -> PathBuf {
        vm_dir(self.dir.path(), &VmName::mint(7, 1)).join("work")
    }
}

fn host_in(dir: &Path, env: Arc<dyn Env>, fence: watch::Receiver<Mono>) -> Arc<Host> {
    let setup = Setup {
        state_dir: dir.to_owned(),
        guard: guard_program(dir),
        user: "somebody".into(),
        path: "/usr/local/bin:/usr/bin:/bin".into(),
        env,
        fence,
    };
    Arc::new(Host::new(setup).unwrap())
}

fn shell(line: &str) -> Command {
    // The tests' own shell, on every system.
    argv(&["/bin/sh", "-c", line])
}

fn argv(words: &[&str]) -> Command {
    let words = words.iter().map(|word| (*word).to_owned()).collect();
    Command { run: Run::Argv(words), env: BTreeMap::new(), workdir: String::new() }
}

async fn finish(mut exec: Exec) -> (Vec<u8>, ExecOutput) {
    let mut log = Vec::new();
    loop {
        match exec.output.recv().await.expect("an end") {
            ExecOutput::Bytes(bytes) => log.extend_from_slice(&bytes),
            end => {
                assert_eq!(exec.output.recv().await, None);
                return (log, end);
            }
        }
    }
}

async fn run(guest: &Arc<dyn Guest>, command: &Command) -> (String, ExecOutput) {
    let (log, end) = finish(guest.exec(command).await.unwrap()).await;
    (String::from_utf8(log).unwrap(), end)
}

#[tokio::test]
async fn output_and_errors_are_one_stream_in_the_order_written() {
    let fixture = Fixture::new();
    let (_, guest) = fixture.guest().await;
    let line = "i=0; while [ $i -lt 300 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done; exit 7";
    let (log, end) = run(&guest, &shell(line)).await;
    let expected: String = (0..300).map(|i| format!("out {i}\nerr {i}\n")).collect();
    assert_eq!(log, expected);
    assert_eq!(end, ExecOutput::Exit(Exit::Code(7)));
}

#[tokio::test]
async fn every_byte_of_a_long_log_arrives() {
    let fixture = Fixture::new();
    let (_, guest) = fixture.guest().await;
    let (log, end) = run(&guest, &shell("head -c 8000000 /dev/zero | tr '\\0' x; printf end")).await;
    assert_eq!((log.len(), log.ends_with("xend")), (8_000_003, true));
    assert_eq!(end, ExecOutput::Exit(Exit::Code(0)));
}

#[tokio::test]
async fn commands_end_as_a_shell_would_say() {
    let fixture = Fixture::new();
    let (_, guest) = fixture.guest().await;
    std::fs::write(fixture.work().join("plain"), "x").unwrap();
    for (command, end, said) in [
        (shell("kill -9 $$"), Exit::Signal(9), ""),
        (argv(&["true"]), Exit::Code(0), ""),
        (argv(&["no-such-program-here"]), Exit::Code(127), "alloy: no-such-program-here: command not found\n"),
        (argv(&["./plain"]), Exit::Code(126), "alloy: ./plain: permission denied\n"),
        (shell("cat; pwd | sed 's,.*/,,'"), Exit::Code(0), "work\n"),
        (Command { run: Run::Shell("echo $((1 + 1))".into()), ..argv(&[]) }, Exit::Code(0), "2\n"),
    ] {
        assert_eq!(run(&guest, &command).await, (said.to_owned(), ExecOutput::Exit(end)), "{command:?}");
    }
}

#[tokio::test]
async fn a_command_finds_exactly_the_environment_it_was_given() {
    let fixture = Fixture::new();
    let (vm, guest) = fixture.guest().await;
    let env = [("A", "b c\nd"), ("USER", "else"), ("ALLOY_VM_DIR", "/")];
    let env: BTreeMap<_, _> = env.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    let (log, _) = run(&guest, &Command { env, ..argv(&["/usr/bin/env", "-0"]) }).await;
    let dir = vm_dir(fixture.dir.path(), &vm);
    let dir = dir.display();
    let mut found: Vec<&str> = log.split_terminator('\0').collect();
    found.sort();
    let expected = [
        "A=b c\nd".to_owned(),
        format!("ALLOY_VM_DIR={dir}"),
        format!("HOME={dir}/home"),
        "PATH=/usr/local/bin:/usr/bin:/bin".to_owned(),
        format!("TMPDIR={dir}/tmp"),
        "USER=else".to_owned(),
    ];
    assert_eq!(found, expected);
}

/// Leaves a process behind that has forked twice, has a session of its own and ignores SIGTERM.
const DAEMON: &str =
    "(setsid sh -c 'trap \"\" TERM; echo $$ > daemon; while :; do sleep 1; done' </dev/null >/dev/null 2>&1 &)";

#[tokio::test]
async fn what_ignores_the_request_to_stop_is_killed_wherever_it_hides() {
    let fixture = Fixture::new();
    let (_, guest) = fixture.guest().await;
    let line = format!("trap '' TERM; {DAEMON}; echo up; while :; do sleep 1; done");
    let mut exec = guest.exec(&shell(&line)).await.unwrap();
    assert_eq!(exec.output.recv().await, Some(ExecOutput::Bytes(Bytes::from_static(b"up\n"))));
    let daemon = pid_in(&fixture.work().join("daemon"));
    exec.input.send(ExecInput::Signal(Signal::Term)).await.unwrap();
    exec.input.send(ExecInput::Signal(Signal::Kill)).await.unwrap();
    assert_eq!(finish(exec).await.1, ExecOutput::Exit(Exit::Signal(9)));
    assert!(!is_alive(daemon));
}

#[tokio::test]
async fn a_request_to_stop_reaches_the_whole_tree_and_gives_it_time() {
    let fixture = Fixture::new();
    let (_, guest) = fixture.guest().await;
    let line = "sh -c 'trap \"echo child; exit 0\" TERM; echo up; while :; do sleep 0.01; done' & \
                trap 'exit 3' TERM; wait; wait";
    let mut exec = guest.exec(&shell(line)).await.unwrap();
    assert_eq!(exec.output.recv().await, Some(ExecOutput::Bytes(Bytes::from_static(b"up\n"))));
    exec.input.send(ExecInput::Signal(Signal::Term)).await.unwrap();
    let (log, end) = finish(exec).await;
    // Shells also say that their `sleep` was terminated.
    assert!(log.ends_with(b"child\n"), "{}", String::from_utf8_lossy(&log));
    assert_eq!(end, ExecOutput::Exit(Exit::Code(3)));
}

#[tokio::test]
async fn what_a_command_leaves_behind_ends_with_it_and_holds_up_nothing() {
    let fixture = Fixture::new();
    let (_, guest) = fixture.guest().await;
    // One holds the log open, the other has let go of everything.
    let line = format!("sleep 600 & {DAEMON}; while ! [ -s daemon ]; do sleep 0.01; done; echo done; exit 4");
    assert_eq!(run(&guest, &shell(&line)).await, ("done\n".to_owned(), ExecOutput::Exit(Exit::Code(4))));
    assert!(!is_alive(pid_in(&fixture.work().join("daemon"))));
}

#[tokio::test]
async fn a_dropped_command_is_killed() {
    let fixture = Fixture::new();
    let (_, guest) = fixture.guest().await;
    let exec = guest.exec(&shell("echo $$ > pid; exec sleep 600")).await.unwrap();
    let pid = tokio::task::spawn_blocking({
        let file = fixture.work().join("pid");
        move || pid_in(&file)
    });
    let pid = pid.await.unwrap();
    drop(exec);
    let gone = tokio::task::spawn_blocking(move || eventually("its end", || (!is_alive(pid)).then_some(())));
    gone.await.unwrap();
}

#[tokio::test]
async fn a_guard_kills_at_the_fence_without_being_told() {
    let fixture = Fixture::new();
    let Now { mono, .. } = fixture.env.now();
    let (_, guest) = fixture.guest().await;
    let exec = guest.exec(&shell("sleep 600")).await.unwrap();
    fixture.fence.send_replace(mono + 60_000);
    fixture.fence.send_replace(mono);
    assert_eq!(finish(exec).await.1, ExecOutput::Lost(VmError::fenced()), "and does not say that it ended by itself");
}

#[test]
fn a_vm_that_is_given_up_before_it_is_made_leaves_nothing() {
    let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).build().unwrap();
    runtime.block_on(async {
        let fixture = Fixture::new();
        let (vm, image, shape) = (VmName::mint(7, 2), Digest::of(b"any"), Shape::default());
        for destroyed_first in [false, true] {
            // The one thread for files is busy.
            let (go, wait) = std::sync::mpsc::channel::<()>();
            let busy = tokio::task::spawn_blocking(move || wait.recv());
            let mut make = Box::pin(fixture.host.create(&vm, &image, &shape));
            assert!(futures_util::poll!(&mut make).is_pending());
            drop(make);
            if destroyed_first {
                lock(&fixture.host.making).remove(&vm);
            }
            go.send(()).unwrap();
            busy.await.unwrap().unwrap();
            if !destroyed_first {
                fixture.host.destroy(&vm).await.unwrap();
            }
            // Behind all work before it.
            assert_eq!(fixture.host.list().await.unwrap(), [], "destroyed first: {destroyed_first}");
        }
    });
}

#[tokio::test]
async fn destroy_kills_and_removes_and_may_be_asked_twice() {
    let fixture = Fixture::new();
    let (vm, guest) = fixture.guest().await;
    let line = format!("{DAEMON}; mkdir -p a/b; echo x > a/b/c; chmod 0 a/b; chmod 500 a; echo up; sleep 600");
    let mut exec = guest.exec(&shell(&line)).await.unwrap();
    assert_eq!(exec.output.recv().await, Some(ExecOutput::Bytes(Bytes::from_static(b"up\n"))));
    let daemon = pid_in(&fixture.work().join("daemon"));
    fixture.host.destroy(&vm).await.unwrap();
    assert!(!is_alive(daemon) && !vm_dir(fixture.dir.path(), &vm).exists());
    assert_eq!(fixture.host.list().await.unwrap(), []);
    fixture.host.destroy(&vm).await.unwrap();
}

#[tokio::test]
async fn a_killed_guard_is_noticed_and_its_orphans_die_with_the_vm() {
    let fixture = Fixture::new();
    let (vm, guest) = fixture.guest().await;
    let mut exec = guest.exec(&shell(&format!("{DAEMON}; echo up; sleep 600"))).await.unwrap();
    assert_eq!(exec.output.recv().await, Some(ExecOutput::Bytes(Bytes::from_static(b"up\n"))));
    let daemon = pid_in(&fixture.work().join("daemon"));
    let record = std::fs::read_to_string(vm_dir(fixture.dir.path(), &vm).join("guard-0")).unwrap();
    let guard = record.split(' ').nth(1).unwrap().parse().unwrap();
    kill(Pid::from_raw(guard), Number::SIGKILL).unwrap();
    let (_, end) = finish(exec).await;
    assert!(matches!(&end, ExecOutput::Lost(error) if error.what == VmFault::Lost), "{end:?}");
    fixture.host.destroy(&vm).await.unwrap();
    assert!(!is_alive(daemon));
}

const DAEMON_DIR: &str = "ALLOY_TEST_DAEMON_DIR";

/// Not a test by itself: a daemon with a running command, for others to kill.
#[tokio::test]
async fn daemon_process() {
    let Some(dir) = std::env::var_os(DAEMON_DIR) else { return };
    let env: Arc<dyn Env> = Arc::new(SystemEnv::detached());
    let fence = watch::Sender::new(Mono(u64::MAX));
    let host = host_in(Path::new(&dir), env, fence.subscribe());
    let vm = VmName::mint(7, 1);
    host.create(&vm, &Digest::of(b""), &Shape::default()).await.unwrap();
    let guest = host.boot(&vm, &inbox_of(Path::new(&dir), &vm)).await.unwrap();
    let exec =
        guest.exec(&shell(&format!("trap '' TERM HUP; {DAEMON}; echo $$ > pid; while :; do sleep 1; done"))).await;
    finish(exec.unwrap()).await;
}

#[tokio::test]
async fn nothing_outlives_a_killed_daemon_and_the_next_one_cleans_up() {
    let dir = tempfile::tempdir().unwrap();
    let mut daemon = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "provider::host::tests::daemon_process"])
        .env(DAEMON_DIR, dir.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let work = vm_dir(dir.path(), &VmName::mint(7, 1)).join("work");
    let (command, hidden) = (pid_in(&work.join("pid")), pid_in(&work.join("daemon")));
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    eventually("the end of all processes", || (!is_alive(command) && !is_alive(hidden)).then_some(()));
    let fixture = Fixture::at(dir);
    let left = fixture.host.list().await.unwrap();
    assert_eq!(left, [VmName::mint(7, 1)]);
    fixture.host.destroy(&left[0]).await.unwrap();
    assert_eq!(fixture.host.list().await.unwrap(), []);
}

const CRAMPED_DIR: &str = "ALLOY_TEST_CRAMPED_DIR";
/// Beyond any path's length, and deeper than a cramped process may have files open.
const DEEP: usize = 60;

/// Not a test by itself: a daemon that cannot delete what its job left, whoever runs it. Another one can.
#[tokio::test]
async fn cramped_process() {
    let Some(dir) = std::env::var_os(CRAMPED_DIR) else { return };
    let env: Arc<dyn Env> = Arc::new(SystemEnv::detached());
    let host = host_in(Path::new(&dir), env, watch::Sender::new(Mono(u64::MAX)).subscribe());
    let vm = VmName::mint(7, 1);
    host.create(&vm, &Digest::of(b""), &Shape::default()).await.unwrap();
    let work = vm_dir(Path::new(&dir), &vm).join("work");
    for n in 0..50 {
        std::fs::create_dir(work.join(format!("d{n}"))).unwrap();
        std::fs::write(work.join(format!("d{n}/plain")), "x").unwrap();
    }
    let name = "deep".repeat(60);
    let mut at = std::os::fd::OwnedFd::from(std::fs::File::open(&work).unwrap());
    for _ in 0..DEEP {
        nix::sys::stat::mkdirat(&at, name.as_str(), Mode::S_IRWXU).unwrap();
        at = openat(&at, name.as_str(), OFlag::O_DIRECTORY, Mode::empty()).unwrap();
    }
    drop(at);
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 40, most).unwrap();
    let error = files::remove(&vm_dir(Path::new(&dir), &vm)).unwrap_err().to_string();
    assert!(error.starts_with("work/deep"), "{error}");
    host.destroy(&vm).await.unwrap();
    host.destroy(&vm).await.unwrap();
    assert_eq!(host.list().await.unwrap(), []);
}

#[tokio::test]
async fn what_cannot_be_deleted_is_set_aside_and_tried_again_at_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    let cramped = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "provider::host::tests::cramped_process"])
        .env(CRAMPED_DIR, dir.path())
        .output()
        .unwrap();
    assert!(cramped.status.success(), "{cramped:?}");
    let vms = dir.path().join("vms");
    let left = || -> Vec<PathBuf> { std::fs::read_dir(&vms).unwrap().map(|entry| entry.unwrap().path()).collect() };
    let [aside] = &left()[..] else { panic!("{:?}", left()) };
    let name = aside.file_name().unwrap().to_str().unwrap();
    assert!(name.starts_with(&format!(".gone-{}-", VmName::mint(7, 1))), "{name}");
    assert_eq!(std::fs::read_dir(aside.join("work")).unwrap().count(), 1, "the rest is gone");
    let fixture = Fixture::at(dir);
    assert_eq!(fixture.host.list().await.unwrap(), []);
    eventually("its removal", || left().is_empty().then_some(()));
}

#[test]
fn what_is_set_aside_takes_nobodys_name_and_goes_alone() {
    let dir = tempfile::tempdir().unwrap();
    let vms = dir.path().join("vms");
    let vm = vms.join(VmName::mint(7, 1).as_str());
    let put = |unique| {
        std::fs::create_dir_all(vm.join("work")).unwrap();
        files::set_aside(&vm, unique).unwrap()
    };
    assert_ne!(put(1), put(2));
    assert!(files::set_aside(&vm, 3).is_err(), "there is nothing");
    std::fs::write(vms.join("file"), "x").unwrap();
    files::remove_gone(&vms);
    assert_eq!(std::fs::read_dir(&vms).unwrap().count(), 1);
}

#[tokio::test]
async fn other_images_are_refused() {
    let fixture = Fixture::new();
    let error =
        fixture.host.pull(&ImageRef("macos-15".into()), &Default::default(), &Default::default()).await.unwrap_err();
    assert_eq!((error.what, error.retry), (VmFault::NoImage, false));
}

// ---- files

enum Item<'a> {
    File(&'a str, u32, &'a [u8]),
    Dir(&'a str),
    Link(&'a str, &'a str),
    Odd(&'a str, tar::EntryType),
}

/// Writes an archive without any of the checks that a decent writer makes.
fn archive(path: &Path, items: &[Item<'_>]) {
    let mut out = std::fs::File::create(path).unwrap();
    for item in items {
        let (name, kind, mode, body, link) = match item {
            Item::File(name, mode, body) => (name, tar::EntryType::Regular, *mode, *body, ""),
            Item::Dir(name) => (name, tar::EntryType::Directory, 0o755, &b""[..], ""),
            Item::Link(name, target) => (name, tar::EntryType::Symlink, 0o777, &b""[..], *target),
            Item::Odd(name, kind) => (name, *kind, 0o644, &b""[..], "x"),
        };
        let mut header = tar::Header::new_gnu();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_mtime(1_000_000_000);
        header.set_size(body.len() as u64);
        header.set_cksum();
        out.write_all(header.as_bytes()).unwrap();
        out.write_all(body).unwrap();
        out.write_all(&vec![0; body.len().next_multiple_of(512) - body.len()]).unwrap();
    }
    out.write_all(&[0; 1024]).unwrap();
}

#[tokio::test]
async fn sources_are_unpacked_as_they_were() {
    let fixture = Fixture::new();
    let (vm, guest) = fixture.guest().await;
    let items = [
        Item::File("a.txt", 0o640, b"one"),
        Item::Dir("empty/"),
        Item::Link("out", "/etc/passwd"),
        Item::File("sub/deep/run", 0o755, b""),
        Item::Link("sub/up", "../a.txt"),
    ];
    archive(&inbox_of(fixture.dir.path(), &vm).join("s.tar"), &items);
    guest.unpack("s.tar", "").await.unwrap();
    let (log, _) =
        run(&guest, &shell("find . -mindepth 1 -printf '%p %y %m %l\\n' | sort; stat -c %Y a.txt; cat sub/up")).await;
    let expected = "./a.txt f 644 \n./empty d 755 \n./out l 777 /etc/passwd\n./sub d 755 \n./sub/deep d 755 \n\
                    ./sub/deep/run f 755 \n./sub/up l 777 ../a.txt\n1000000000\none";
    assert_eq!(log, expected);
}

#[tokio::test]
async fn hostile_archives_are_refused_and_write_nothing_outside() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().to_str().unwrap();
    let absolute = format!("{target}/x");
    for items in [
        &[Item::File("../x", 0o644, b"x")][..],
        &[Item::File(&absolute, 0o644, b"x")],
        &[Item::File("a/../../x", 0o644, b"x")],
        &[Item::Link("l", target), Item::File("l/x", 0o644, b"x")],
        &[Item::Link("l", target), Item::Dir("l/x/")],
        &[Item::Link("l", &absolute), Item::File("l", 0o644, b"x")],
        &[Item::Link("l", target), Item::Dir("l/")],
        &[Item::File("a", 0o644, b"1"), Item::File("a", 0o644, b"2")],
        &[Item::File("a", 0o644, b"1"), Item::File("a/b", 0o644, b"2")],
        &[Item::Odd("l", tar::EntryType::Link)],
        &[Item::Odd("fifo", tar::EntryType::Fifo)],
        &[Item::Odd("dev", tar::EntryType::Char)],
        &[Item::File("", 0o644, b"x")],
    ] {
        let fixture = Fixture::new();
        let (vm, guest) = fixture.guest().await;
        archive(&inbox_of(fixture.dir.path(), &vm).join("s.tar"), items);
        let error = guest.unpack("s.tar", "").await.unwrap_err();
        assert_eq!(error.what, VmFault::File, "{error}");
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    }
}

#[tokio::test]
async fn a_vm_goes_after_the_unpacking_that_nobody_waits_for_any_more() {
    let fixture = Fixture::new();
    let (vm, guest) = fixture.guest().await;
    // An archive that goes on when this test says so.
    let (inbox, first, rest) =
        (inbox_of(fixture.dir.path(), &vm), fixture.dir.path().join("1"), fixture.dir.path().join("2"));
    archive(&first, &[Item::File("first", 0o644, b"x")]);
    archive(&rest, &[Item::File("rest", 0o644, b"x")]);
    nix::unistd::mkfifo(&inbox.join("s.tar"), Mode::S_IRWXU).unwrap();
    let mut pipe = std::fs::File::options().read(true).write(true).open(inbox.join("s.tar")).unwrap();
    pipe.write_all(&std::fs::read(first).unwrap()[..1024]).unwrap();
    let mut unpack = guest.unpack("s.tar", "");
    assert!(futures_util::poll!(&mut unpack).is_pending());
    let made = fixture.work().join("first");
    let made = tokio::task::spawn_blocking(move || eventually("the first file", || made.exists().then_some(())));
    made.await.unwrap();
    drop(unpack);
    let live = lock(&fixture.host.live)[&vm].clone();
    assert_eq!(live.running.len(), 1, "it goes on, and the VM's end waits for it");
    pipe.write_all(&std::fs::read(rest).unwrap()).unwrap();
    live.end().await;
    assert!(!fixture.work().join("rest").exists(), "it was told to stop");
    fixture.host.destroy(&vm).await.unwrap();
    assert_eq!(std::fs::read_dir(fixture.dir.path().join("vms")).unwrap().count(), 0, "nothing is set aside");
}

pub(super) fn rules(texts: &[&str]) -> Vec<ArtifactRule> {
    crate::artifacts::parse(&texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>()).unwrap()
}

#[tokio::test]
async fn a_list_names_files_and_links_and_follows_none() {
    let fixture = Fixture::new();
    let (_, guest) = fixture.guest().await;
    let line = "mkdir -p out/sub .hid /tmp/nothing; echo 12345 > out/a; echo x > out/sub/run; chmod 755 out/sub/run; \
                echo s > out/skip.o; ln -s /etc out/etc; ln -s a out/link; ln -s out alias; mkfifo out/pipe; echo h > .hid/f";
    assert_eq!(run(&guest, &shell(line)).await.1, ExecOutput::Exit(Exit::Code(0)));
    let list = async |texts: &[&str]| -> Vec<String> {
        let files = guest.list(&rules(texts)).await.unwrap().files;
        let shown = |file: GuestFile| {
            let link = file.link.map(|to| format!(" -> {to}")).unwrap_or_default();
            format!("{} {} {:o}{link}", file.path, file.size, file.mode)
        };
        files.into_iter().map(shown).collect()
    };
    let all = ["out/a 6 644", "out/etc 0 644 -> /etc", "out/link 0 644 -> a", "out/sub/run 2 755"];
    assert_eq!(list(&["out", "!**/*.o"]).await, all);
    assert_eq!(list(&["alias/a", "out/etc/passwd", "alias/*"]).await, [""; 0]);
    assert_eq!(list(&["**/run", "out/sub", "out/sub/run"]).await, ["out/sub/run 2 755"]);
    assert_eq!(list(&["**/f"]).await, [".hid/f 2 644"]);
    assert_eq!(list(&["nothing", "!out"]).await, [""; 0]);
    let kinds: Vec<RuleKind> = rules(&["=a", "!b", "c"]).into_iter().map(|rule| rule.kind).collect();
    assert_eq!(kinds, [RuleKind::Must, RuleKind::Exclude, RuleKind::Take]);
}

#[tokio::test]
async fn what_is_no_artifact_is_named_if_a_rule_wants_it() {
    let fixture = Fixture::new();
    let (_, guest) = fixture.guest().await;
    let line = "mkdir -p out \"out/d$(printf '\\377')\"; touch out/plain \"out/$(printf 'b\\377d')\" \
                \"out/d$(printf '\\377')/deep\"; mkfifo out/pipe; ln -s \"$(printf '\\377')\" out/link";
    run(&guest, &shell(line)).await;
    let _socket = std::os::unix::net::UnixListener::bind(fixture.work().join("out/socket")).unwrap();
    let plain = guest.list(&rules(&["out/plain"])).await.unwrap();
    assert_eq!((plain.files.len(), plain.unfit.len()), (1, 0));
    let all = guest.list(&rules(&["out"])).await.unwrap();
    assert_eq!(all.files, plain.files, "the rest is there");
    let unfit: Vec<_> = all.unfit.into_iter().map(|unfit| (unfit.shown(), unfit.why)).collect();
    let expected = [
        ("out/b\\xffd", Misfit::Name),
        ("out/d\\xff/deep", Misfit::Name),
        ("out/link", Misfit::Target),
        ("out/pipe", Misfit::Pipe),
        ("out/socket", Misfit::Socket),
    ];
    assert_eq!(unfit, expected.map(|(name, why)| (name.to_owned(), why)));
}

#[tokio::test]
async fn a_read_stays_inside_and_within_its_limit() {
    let fixture = Fixture::new();
    let (_, guest) = fixture.guest().await;
    run(&guest, &shell("mkdir d; printf 0123456789 > d/f; ln -s d l; ln -s d/f lf; ln -s /etc/passwd p; mkfifo q"))
        .await;
    let read = async |path: &str, limit| {
        let mut bytes = guest.read(path, limit).await?;
        let mut all = Vec::new();
        while let Some(chunk) = bytes.recv().await {
            all.extend_from_slice(&chunk);
        }
        Ok::<_, VmError>(all)
    };
    assert_eq!(read("d/f", 100).await.unwrap(), b"0123456789");
    assert_eq!(read("d/f", 4).await.unwrap(), b"0123");
    for outside in ["l/f", "lf", "p", "q", "d", "../home", "/etc/passwd", "nothing", "d/f/x"] {
        assert!(read(outside, 100).await.is_err(), "{outside}");
    }
}

#[test]
fn a_link_leads_no_further_than_the_farm_takes() {
    let dir = tempfile::tempdir().unwrap();
    let to = "t/".repeat(limits::PATH_MAX / 2);
    std::os::unix::fs::symlink(&to, dir.path().join("near")).unwrap();
    std::os::unix::fs::symlink(format!("{to}t"), dir.path().join("far")).unwrap();
    let matcher = crate::artifacts::Matcher::new(&rules(&["*"])).unwrap();
    let Listing { files, unfit, .. } = files::list(dir.path(), &matcher, &CancellationToken::new()).unwrap();
    assert_eq!(files.into_iter().map(|file| (file.path, file.link)).collect::<Vec<_>>(), [("near".into(), Some(to))]);
    let unfit: Vec<_> = unfit.into_iter().map(|unfit| (unfit.shown(), unfit.why.to_string())).collect();
    assert_eq!(unfit, [("far".to_owned(), "it is a link to a name of more than 1024 bytes".to_owned())]);
}
