//! S: from a clone to a guest that can take a command, and from a warm guest to one that is ready for this job.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use alloy_shared::env::Mono;
use bytes::Bytes;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::command::{Failed, QUICK, environment};
use super::guest::{About, TartGuest, Way, gone};
use super::says::{Ended, GuestOs, judge, parse_os, tail};
use super::script::quote;
use super::softnet::Control;
use super::ssh::Ssh;
use super::{TartHost, locks, vm_error};
use crate::guard::leash::{Leash, Wires};
use crate::guard::{CONTROL_FD, Launch};
use crate::provider::{BootTimes, ExecOutput, NetworkPolicy, VmError, VmFault, VmName, VmProvider as _, vm_dir};

/// What is kept of what `tart run` says.
const WORDS_MAX: usize = 16 << 10;
/// One try to reach a guest that may still be booting.
const TRY: Duration = Duration::from_secs(5);
const TRY_PAUSE_MS: u64 = 100;
/// Between two looks whether a guest without agent can be reached by SSH.
const SSH_PAUSE_MS: u64 = 2_000;
/// Preparing a guest: a name, a directory, the share.
const PREPARE: Duration = Duration::from_secs(30);
/// The share's name in a guest.
const SHARE: &str = "inbox";
/// How wrong a guest's clock may be.
const CLOCK_SLACK_MS: i64 = 1_000;
/// Longer paths do not fit into a socket's address.
const SOCKET_PATH_MAX: usize = 100;

/// A VM that runs.
pub(super) struct Vm {
    pub(super) guest: OnceLock<Arc<TartGuest>>,
    os: GuestOs,
    /// Absent without a filter that takes orders.
    control: OnceLock<tokio::sync::Mutex<Control>>,
    ended: watch::Receiver<Option<VmError>>,
    doom: CancellationToken,
    running: TaskTracker,
}

impl Vm {
    /// Kills `tart run` and what it started, and returns when they are gone.
    pub(super) async fn end(&self) {
        self.doom.cancel();
        self.running.close();
        self.running.wait().await;
    }

    fn why_ended(&self) -> Option<VmError> {
        self.ended.borrow().clone()
    }
}

impl TartHost {
    /// Starts a VM under a guard and returns when it holds its lock: another may be made from then on. Whoever drops this
    /// meanwhile leaves a VM that [`destroy`](crate::provider::VmProvider::destroy) finds.
    pub(super) async fn start(&self, vm: &VmName, inbox: &Path) -> Result<Arc<Vm>, VmError> {
        let got = self.tart.must(&["get", vm.as_str(), "--format", "json"], QUICK).await?;
        let got = got.map_err(|failed| vm_error(VmFault::Start, "get", &failed))?;
        let os = parse_os(&got).map_err(|why| VmError::farm(VmFault::Start, why))?;
        let dir = vm_dir(&self.setup.state_dir, vm);
        let _one = self.making.lock().await;
        let place = locks::place(&self.setup.settings.host_dir)?;
        let filter = if self.restricts() { Some(Door::open(&dir)?) } else { None };
        let leash = Leash::start(&self.setup.guard, dir.join("guard-0"));
        let leash = leash.map_err(|error| VmError::io(VmFault::Start, "start a guard", &error))?;
        let launch = self.launch(vm, inbox, &dir, filter.as_ref());
        let (tell_end, ended) = watch::channel(None);
        let (doom, running) = (CancellationToken::new(), TaskTracker::new());
        let (input, orders) = mpsc::channel(1);
        let (bytes, output) = mpsc::channel(16);
        let wires = Wires {
            env: Arc::clone(&self.setup.env),
            fence: self.setup.fence.clone(),
            doom: doom.clone(),
            input: orders,
            output: bytes,
        };
        let run = async move {
            leash.run(launch, wires).await;
            // Only a VM that is gone leaves its place to another.
            drop(place);
        };
        self.setup.env.spawn("tart_run", Box::pin(running.track_future(run)));
        self.setup.env.spawn("tart_words", Box::pin(listen(output, tell_end, input)));
        let machine = Arc::new(Vm { guest: OnceLock::new(), os, control: OnceLock::new(), ended, doom, running });
        self.live().insert(vm.clone(), Arc::clone(&machine));
        if let Some(door) = filter {
            match door.control(&machine.ended).await {
                Ok(control) => _ = machine.control.set(tokio::sync::Mutex::new(control)),
                Err(error) => {
                    machine.end().await;
                    return Err(error);
                }
            }
        }
        self.wait_for_lock(vm, &machine).await?;
        Ok(machine)
    }

    fn launch(&self, vm: &VmName, inbox: &Path, dir: &Path, filter: Option<&Door>) -> Launch {
        let mut argv = vec![self.tart.program.display().to_string()];
        argv.extend(run_line(vm, inbox, !self.setup.settings.unfiltered, filter.is_some()));
        // A variable that is no text is none of `tart`'s.
        let mut env: BTreeMap<String, String> = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        env.extend(environment(&self.tart.home));
        Launch {
            argv,
            env: env.into_iter().collect(),
            dir: dir.display().to_string(),
            vm_dir: dir.display().to_string(),
            control: filter.map(|door| door.path.display().to_string()),
        }
    }

    /// `control.sock` is bound after the VM has started, which is after its lock was taken.
    async fn wait_for_lock(&self, vm: &VmName, machine: &Vm) -> Result<(), VmError> {
        let socket = self.vm_home(vm).join("control.sock");
        let until = self.setup.env.now().mono + self.setup.boot_ms;
        while !socket.exists() {
            if let Some(error) = machine.why_ended() {
                return Err(error);
            }
            if self.setup.env.now().mono >= until {
                machine.end().await;
                return Err(VmError::farm(VmFault::Start, "the VM did not start in time"));
            }
            self.setup.env.sleep_until(self.setup.env.now().mono + TRY_PAUSE_MS / 4).await;
        }
        Ok(())
    }

    /// Waits until the guest answers, then prepares it: a name of its own, an empty workspace, the share.
    /// `start` is when the VM was started, `runs` since when it runs.
    pub(super) async fn ready(
        &self,
        vm: &VmName,
        machine: &Vm,
        (start, runs): (Mono, Mono),
    ) -> Result<Arc<TartGuest>, VmError> {
        let until = self.setup.env.now().mono + self.setup.boot_ms;
        let way = self.way(vm, machine, until).await?;
        let steps = preparation(machine.os, vm);
        let (status, said) = way.ask(&self.setup.env, &steps, 64 << 10, PREPARE).await?;
        let said = String::from_utf8_lossy(&said).into_owned();
        let about = about(machine.os, &said).filter(|_| status == 0);
        let about = about.ok_or_else(|| {
            let last = said.lines().next_back().unwrap_or_default().to_owned();
            VmError::farm(VmFault::Start, format!("the guest could not be prepared (status {status}): {last}"))
        })?;
        Ok(Arc::new(TartGuest {
            env: Arc::clone(&self.setup.env),
            way,
            workspace: format!("{}/workspace", about.home),
            about,
            ended: machine.ended.clone(),
            commands: AtomicU32::new(0),
            booted: BootTimes {
                boot_ms: Some(runs.since(start)),
                agent_ms: Some(self.setup.env.now().mono.since(runs)),
            },
        }))
    }

    /// The agent as soon as it answers. A guest that answers by SSH long before has none.
    async fn way(&self, vm: &VmName, machine: &Vm, until: Mono) -> Result<Way, VmError> {
        let agent = Way::Agent(self.socket(vm)?);
        let env = &self.setup.env;
        let grace_ms = self.setup.agent_grace_ms;
        let (mut next_ssh, mut by_ssh) = (env.now().mono + grace_ms / 2, None);
        loop {
            if let Some(error) = machine.why_ended() {
                return Err(error);
            }
            let last = match agent.ask(env, ":", 1024, TRY).await {
                Ok((0, _)) => return Ok(agent),
                Ok((status, _)) => format!("the guest's shell ended with {status}"),
                Err(error) => error.tail,
            };
            let now = env.now().mono;
            match &by_ssh {
                Some((way, since)) if now.since(*since) >= grace_ms => return Ok(Way::clone(way)),
                None if now >= next_ssh => {
                    by_ssh = self.ssh(vm).await?.map(|way| (way, now));
                    next_ssh = env.now().mono + SSH_PAUSE_MS;
                }
                Some(_) | None => {}
            }
            if now >= until {
                return Err(VmError::farm(VmFault::Start, format!("the guest was not ready in time: {last}")));
            }
            env.sleep_until(now + TRY_PAUSE_MS).await;
        }
    }

    /// The socket's path, or a link to it where the path is too long for an address.
    fn socket(&self, vm: &VmName) -> Result<PathBuf, VmError> {
        let socket = self.vm_home(vm).join("control.sock");
        if socket.as_os_str().len() <= SOCKET_PATH_MAX {
            return Ok(socket);
        }
        let link = std::env::temp_dir().join(format!("{vm}.sock"));
        let _an_old_one = std::fs::remove_file(&link);
        let made = std::os::unix::fs::symlink(&socket, &link);
        made.map(|()| link).map_err(|error| VmError::io(VmFault::Start, "link the VM's socket", &error))
    }

    /// SSH, if somebody answers there and is this VM: addresses are handed on and lists of them grow old.
    async fn ssh(&self, vm: &VmName) -> Result<Option<Way>, VmError> {
        let Ok(address) = self.tart.must(&["ip", vm.as_str()], QUICK).await? else { return Ok(None) };
        let ssh = Ssh::new(self.login.clone(), address.trim().to_owned(), &self.setup.state_dir);
        let way = Way::Ssh(ssh.map_err(|error| VmError::io(VmFault::Start, "write the askpass program", &error))?);
        let Some(mac) = locks::mac(&self.vm_home(vm).join("config.json")) else { return Ok(None) };
        let steps = "ifconfig -a 2>/dev/null; cat /sys/class/net/*/address 2>/dev/null; true";
        Ok(match way.ask(&self.setup.env, steps, 64 << 10, TRY).await {
            Ok((_, said)) if String::from_utf8_lossy(&said).to_lowercase().contains(&mac) => Some(way),
            Ok(_) | Err(_) => None,
        })
    }

    /// The last look before a job: its network policy is in force, the clock is right, the workspace is empty.
    pub(super) async fn hand_over(&self, vm: &VmName, machine: &Vm, network: &NetworkPolicy) -> Result<(), VmError> {
        match machine.control.get() {
            Some(control) => {
                let enforced = control.lock().await.enforce(network).await;
                enforced.map_err(|why| VmError::farm(VmFault::Network, why))?;
            }
            None if *network == NetworkPolicy::Default => {}
            None => {
                let why = "this worker has no packet filter that takes a job's own policy";
                return Err(VmError::policy(VmFault::Network, why));
            }
        }
        let guest = machine.guest.get().ok_or_else(|| VmError::farm(VmFault::Lost, format!("{vm} was not booted")))?;
        let before = self.setup.env.now().wall.0;
        let (status, said) = guest.ask(&handover(&guest.workspace, before / 1000), PREPARE).await?;
        let said = String::from_utf8_lossy(&said);
        if status != 0 {
            let last = said.lines().next_back().unwrap_or_default();
            return Err(VmError::farm(VmFault::Lost, format!("the guest is not as it was made: {last}")));
        }
        let after = self.setup.env.now().wall.0;
        let clock = said.trim().lines().next_back().and_then(|line| line.parse::<i64>().ok()).map(|secs| secs * 1000);
        match clock {
            Some(at) if at + CLOCK_SLACK_MS + 999 >= before && at <= after + CLOCK_SLACK_MS => Ok(()),
            clock => {
                Err(VmError::farm(VmFault::Lost, format!("the guest's clock is wrong and cannot be set: {clock:?}")))
            }
        }
    }
}

/// The line of `tart run`. A VM is started before anybody knows whose it will be: a job's own policy is put in force by
/// the control channel and stands in no line.
fn run_line(vm: &VmName, inbox: &Path, filtered: bool, controlled: bool) -> Vec<String> {
    let mut argv: Vec<String> =
        ["run", vm.as_str(), "--no-graphics", "--no-audio", "--no-clipboard"].map(str::to_owned).into();
    argv.push(format!("--dir={SHARE}:{}:ro", inbox.display()));
    argv.push("--root-disk-opts=sync=none".to_owned());
    if filtered {
        argv.push("--net-softnet".to_owned());
    }
    if controlled {
        argv.push(format!("--net-softnet-control-fd={CONTROL_FD}"));
    }
    argv
}

/// Follows what `tart run` says, to tell why it ended: no end of it is one that was asked for, as far as a job goes.
async fn listen(
    mut output: mpsc::Receiver<ExecOutput>,
    ended: watch::Sender<Option<VmError>>,
    _input: mpsc::Sender<crate::provider::ExecInput>,
) {
    let mut words: Vec<u8> = Vec::new();
    let status = loop {
        match output.recv().await {
            Some(ExecOutput::Bytes(bytes)) => keep(&mut words, &bytes),
            Some(ExecOutput::Exit(crate::provider::Exit::Code(code))) => break Some(code),
            // Killed by its guard, whatever it said.
            Some(ExecOutput::Lost(error)) if error.what == VmFault::Fenced => {
                ended.send_replace(Some(error));
                return;
            }
            Some(ExecOutput::Exit(crate::provider::Exit::Signal(_)) | ExecOutput::Lost(_)) | None => break None,
        }
    };
    let end = Ended { status, out: String::from_utf8_lossy(&words).into_owned(), err: String::new() };
    let failed = Failed { trouble: judge(&end), says: tail(&end) };
    ended.send_replace(Some(vm_error(VmFault::Lost, "run", &failed)));
}

fn keep(words: &mut Vec<u8>, bytes: &Bytes) {
    words.extend_from_slice(bytes);
    let surplus = words.len().saturating_sub(WORDS_MAX);
    words.drain(..surplus);
}

/// Where the guard connects to, to give `tart run` its end of the filter's control channel.
struct Door {
    path: PathBuf,
    listener: UnixListener,
}

impl Door {
    fn open(dir: &Path) -> Result<Self, VmError> {
        let inside = dir.join("net");
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let short = inside.as_os_str().len() <= SOCKET_PATH_MAX;
        let path = if short { inside } else { std::env::temp_dir().join(format!("{name}.net")) };
        let _an_old_one = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path);
        let listener =
            listener.map_err(|error| VmError::io(VmFault::Start, "open the filter's control socket", &error))?;
        Ok(Self { path, listener })
    }

    async fn control(self, ended: &watch::Receiver<Option<VmError>>) -> Result<Control, VmError> {
        let mut ended = ended.clone();
        let accepted = tokio::select! {
            biased;
            accepted = tokio::time::timeout(QUICK, self.listener.accept()) => accepted,
            error = gone(&mut ended) => return Err(error),
        };
        let _gone_with_the_directory = std::fs::remove_file(&self.path);
        match accepted {
            Ok(Ok((stream, _))) => Ok(Control::new(stream)),
            Ok(Err(error)) => Err(VmError::io(VmFault::Start, "the filter's control socket", &error)),
            Err(_late) => Err(VmError::farm(VmFault::Start, "the guard did not come for the filter's control socket")),
        }
    }
}

/// Makes a fresh guest ours. It prints what [`about`] reads.
fn preparation(os: GuestOs, vm: &VmName) -> String {
    let name = quote(vm.as_str());
    let (rename, share, path) = match os {
        GuestOs::Mac => (
            format!("for kind in ComputerName LocalHostName HostName; do sudo -n scutil --set $kind {name}; done"),
            format!("inbox='/Volumes/My Shared Files/{SHARE}'"),
            r#"/bin/zsh -lc 'printf %s "$PATH"'"#,
        ),
        GuestOs::Linux => (
            format!("$root hostname {name}"),
            format!(
                "$root mkdir -p /mnt/alloy && $root mount -t virtiofs com.apple.virtio-fs.automount /mnt/alloy; inbox=/mnt/alloy/{SHARE}"
            ),
            r#"/bin/sh -lc 'printf %s "$PATH"'"#,
        ),
    };
    format!(
        r#"user=$(id -un)
home=$(eval "echo ~$user")
HOME=$home; export HOME
root=; [ "$(id -u)" = 0 ] || root='sudo -n'
{rename} >/dev/null 2>&1
{share}
[ -d "$inbox" ] || {{ echo "the share is not mounted"; exit 1; }}
rm -rf "$home/workspace" "$home/.alloy" && mkdir -p "$home/workspace" "$home/.alloy" || exit 1
tmp=$(getconf DARWIN_USER_TEMP_DIR 2>/dev/null) || tmp=/tmp
echo "user=$user"
echo "home=$home"
echo "tmp=$tmp"
echo "inbox=$inbox"
echo "path=$({path})""#
    )
}

fn about(os: GuestOs, said: &str) -> Option<About> {
    let of = |key: &str| {
        let value = said.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        value.filter(|value| !value.is_empty()).map(str::to_owned)
    };
    let absolute = |key: &str| of(key).filter(|path| path.starts_with('/'));
    Some(About {
        os,
        user: of("user")?,
        home: absolute("home")?,
        path: of("path")?,
        tmp: absolute("tmp")?,
        inbox: absolute("inbox")?,
    })
}

/// Sets a clock that is wrong, then prints it; fails where the workspace holds something.
fn handover(workspace: &str, now_s: i64) -> String {
    let workspace = quote(workspace);
    format!(
        r#"[ -d {workspace} ] && [ -z "$(ls -A {workspace})" ] || {{ echo "its workspace is not empty"; exit 1; }}
root=; [ "$(id -u)" = 0 ] || root='sudo -n'
off=$(($(date +%s) - {now_s}))
if [ "$off" -gt 1 ] || [ "$off" -lt -1 ]; then
$root date -u -s "@{now_s}" >/dev/null 2>&1 || $root date -u -f %s {now_s} >/dev/null 2>&1
fi
date +%s"#
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use alloy_shared::runtime::SystemEnv;
    use alloy_shared::secret::Secret;

    use super::*;
    use crate::provider::tart::command::Tart;
    use crate::provider::tart::ssh::Login;
    use crate::provider::tart::unfinished::Unfinished;
    use crate::provider::tart::{LIVE_FILTER, Settings, Setup};

    #[test]
    fn a_guest_says_who_it_is_or_is_refused() {
        let said = "noise\nuser=admin\nhome=/Users/admin\ntmp=/var/folders/x/T/\ninbox=/Volumes/My Shared Files/inbox\npath=/usr/bin:/bin\n";
        let known = about(GuestOs::Mac, said).unwrap();
        assert_eq!((known.user.as_str(), known.inbox.as_str()), ("admin", "/Volumes/My Shared Files/inbox"));
        for key in ["user", "home", "tmp", "inbox", "path"] {
            let without: String =
                said.lines().filter(|line| !line.starts_with(key)).map(|line| format!("{line}\n")).collect();
            assert_eq!(about(GuestOs::Mac, &without), None, "{key}");
        }
        assert_eq!(about(GuestOs::Mac, &said.replace("home=/", "home=")), None);
    }

    #[test]
    fn the_line_of_a_vm_is_headless_shares_nothing_to_write_and_is_filtered() {
        let line = |filtered, controlled| {
            run_line(&VmName::mint(1, 2), Path::new("/s/vms/alloy-1-2/inbox"), filtered, controlled).join(" ")
        };
        let plain = "run alloy-00000001-2 --no-graphics --no-audio --no-clipboard \
                     --dir=inbox:/s/vms/alloy-1-2/inbox:ro --root-disk-opts=sync=none";
        assert_eq!(line(true, true), format!("{plain} --net-softnet --net-softnet-control-fd=100"));
        // A `tart` whose filter takes no orders, and a host whose owner wants none.
        assert_eq!(line(true, false), format!("{plain} --net-softnet"));
        assert_eq!(line(false, false), plain);
    }

    /// A host whose `tart` cannot even be started.
    fn host(home: &Path) -> TartHost {
        let setup = Setup {
            settings: Settings { home: home.to_owned(), ..Settings::default() },
            state_dir: home.join("state"),
            guard: PathBuf::new(),
            env: Arc::new(SystemEnv::detached()),
            fence: watch::Sender::new(Mono(u64::MAX)).subscribe(),
            boot_ms: 60_000,
            agent_grace_ms: 60_000,
            pull_stall_ms: 60_000,
        };
        TartHost {
            tart: Tart::new(home.join("tart"), home.to_owned()),
            version: LIVE_FILTER,
            making: tokio::sync::Mutex::default(),
            pulling: tokio::sync::Mutex::default(),
            unfinished: Unfinished::open(home, Mono(0)),
            live: Mutex::default(),
            names: Mutex::default(),
            login: Login { user: String::new(), password: Secret::new(String::new()) },
            _only_one: locks::claim(home).unwrap(),
            setup,
        }
    }

    #[tokio::test]
    async fn a_vm_that_is_to_go_is_killed_even_while_a_download_keeps_tart_to_itself() {
        let home = tempfile::tempdir().unwrap();
        let (host, vm) = (host(home.path()), VmName::mint(1, 2));
        let (doom, running) = (CancellationToken::new(), TaskTracker::new());
        let machine = Vm {
            guest: OnceLock::new(),
            os: GuestOs::Mac,
            control: OnceLock::new(),
            ended: watch::channel(None).1,
            doom: doom.clone(),
            running,
        };
        host.live().insert(vm.clone(), Arc::new(machine));
        let _download = host.tart.gate.write().await;
        let killed = async {
            tokio::select! {
                biased;
                done = host.destroy(&vm) => panic!("nobody can be asked whether it is gone: {done:?}"),
                () = doom.cancelled() => {}
            }
        };
        tokio::time::timeout(Duration::from_secs(30), killed).await.expect("it is killed");
    }

    #[tokio::test]
    async fn a_vm_that_its_guard_has_fenced_says_so_and_any_other_one_is_lost() {
        let fenced = VmError::fenced();
        for (end, what) in [
            (ExecOutput::Lost(fenced), VmFault::Fenced),
            (ExecOutput::Lost(VmError::farm(VmFault::Lost, "the guard is gone")), VmFault::Lost),
            (ExecOutput::Exit(crate::provider::Exit::Signal(9)), VmFault::Lost),
        ] {
            let ((said, output), (tell, ended)) = (mpsc::channel(2), watch::channel(None));
            said.send(ExecOutput::Bytes(Bytes::from_static(b"Stopping VM...\n"))).await.unwrap();
            said.send(end).await.unwrap();
            listen(output, tell, mpsc::channel(1).0).await;
            assert_eq!(ended.borrow().as_ref().map(|error| error.what), Some(what));
        }
    }

    #[test]
    fn what_tart_says_is_kept_to_a_bound() {
        let mut words = Vec::new();
        for _ in 0..100 {
            keep(&mut words, &Bytes::from(vec![b'x'; 1000]));
        }
        keep(&mut words, &Bytes::from_static(b"last"));
        assert_eq!(words.len(), WORDS_MAX);
        assert!(words.ends_with(b"last"));
    }
}
