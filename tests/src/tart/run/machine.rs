//! A VM that runs: its guest, its sockets, and whatever happens first.

use std::fs;
use std::net::{Ipv4Addr, TcpListener as StdTcpListener};
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncWrite, AsyncWriteExt as _, BufReader, Lines};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::process::{Child, Command};
use tokio::sync::mpsc as async_mpsc;

use super::network::{Running, Softnet};
use super::{error, save};
use crate::tart::context::{Sim, wall_ms};
use crate::tart::fault::{Fault, Faults, find};
use crate::tart::guest::{REBOOT, Spec};
use crate::tart::home::{Config, VmDir};
use crate::tart::run_args::Flags;
use crate::tart::timeline::{Phase, Timeline, Trigger};
use crate::tart::vsock::{self, Vsock};
use crate::tart::{Done, Failure, fault, home, lease, lock, say};

/// How long saving takes.
const SAVE_SECONDS: f64 = 2.0;

/// How a run ended, when the exit code is not that of an error.
pub(crate) enum Ended {
    Quietly,
    Failed(String),
    FailedSilently,
}

pub(crate) struct Machine<'a> {
    pub(crate) sim: &'a Sim,
    pub(crate) vm: &'a VmDir,
    pub(crate) config: &'a Config,
    pub(crate) flags: &'a Flags,
    pub(crate) faults: &'a [Fault],
    pub(crate) suspendable: bool,
    pub(crate) restored: bool,
    pub(crate) softnet: Option<Softnet>,
}

/// What a boot of the guest has, and what the proxies see of it.
struct Guest {
    child: Child,
    channel: Lines<BufReader<OwnedReadHalf>>,
    answer: OwnedWriteHalf,
    vsock: Arc<Vsock>,
}

#[derive(Default)]
struct Doors {
    agent: AtomicBool,
    guest: Mutex<Option<Arc<Vsock>>>,
}

/// What happened first.
enum Event {
    Signal(Signal),
    GuestEnded(Option<i32>),
    GuestAsks(Value),
    SoftnetEnded,
    Due,
    Triggered,
    Control(UnixStream),
    Ssh(tokio::net::TcpStream),
}

impl Machine<'_> {
    pub(crate) fn live(&mut self, signals: mpsc::Receiver<Signal>) -> Result<Ended, Failure> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let ended = runtime.block_on(tokio::task::LocalSet::new().run_until(self.watch(signals)));
        // Connections that are still open end with the process.
        runtime.shutdown_background();
        ended
    }

    async fn watch(&mut self, signals: mpsc::Receiver<Signal>) -> Result<Ended, Failure> {
        let mut signals = forward(signals);
        let mut softnet = self.softnet.take().map(Softnet::start).transpose()?;
        let profile = self.vm.extra().profile;
        let mut boot = if self.restored { profile.resume } else { profile.boot };
        let mut boots = 0;
        let mut trigger = Trigger::of(self.sim, self.faults);
        let doors = Arc::new(Doors::default());
        let mut control = None;
        loop {
            let mut life = Life {
                machine: self,
                timeline: Timeline::new(self.sim, &profile, boot, self.faults, boots),
                guest: None,
                ip: None,
                ssh: None,
            };
            let ended = life.one_boot(&mut signals, &mut softnet, &mut trigger, &doors, &mut control).await;
            doors.agent.store(false, Ordering::Relaxed);
            *doors.guest.lock().expect("nobody panics with it") = None;
            life.end_guest().await;
            match ended? {
                Some(ended) => return Ok(ended),
                None => (boots, boot) = (boots + 1, profile.boot),
            }
        }
    }

    fn spec(&self) -> Spec {
        let extra = self.vm.extra();
        // The clock of a resumed guest stands where it was saved.
        let stale = match extra.suspended_at_ms {
            Some(saved) if self.restored => (saved - wall_ms()) / 1000,
            _ => 0,
        };
        let offset = find(self.faults, "clock_offset").map_or(stale, |fault| fault.seconds() as i64);
        let mut hidden = vec![self.sim.home.clone(), self.sim.host.clone()];
        hidden.extend(self.sim.hidden.iter().cloned());
        Spec {
            dir: self.vm.path.clone(),
            runner: std::process::id().cast_signed(),
            os: self.config.os.clone(),
            mac: self.config.mac_address.clone(),
            home: extra.profile.home().to_owned(),
            isolated: self.sim.isolated,
            agent: extra.profile.agent.of(self.sim.version),
            shares: self.flags.shares.clone(),
            hidden,
            disk_free_mib: extra.profile.disk_free_mib,
            clock_offset: offset,
            host_key: extra.profile.sshd.then(|| host_key(self.sim)).flatten(),
        }
    }

    fn start_guest(&self) -> Result<Guest, Failure> {
        for share in &self.flags.shares {
            if !share.path.exists() {
                return Err(Failure::Bare(error(2, "A directory sharing device configuration is invalid.")));
            }
        }
        fs::create_dir_all(self.vm.guest_path())?;
        let (listener, vsock) = vsock::listen()?;
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let (hear, answer) = UnixStream::from_std(ours)?.into_split();
        let consoles = self.sim.host.join("console");
        fs::create_dir_all(&consoles)?;
        let console = fs::File::options().create(true).append(true).open(consoles.join(&self.vm.name))?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(if self.sim.isolated { "__vm" } else { "__init" }).arg(serde_json::to_string(&self.spec())?);
        command.stdin(OwnedFd::from(listener)).stdout(OwnedFd::from(theirs)).stderr(Stdio::from(console));
        let child = command.process_group(0).spawn()?;
        Ok(Guest { child, channel: BufReader::new(hear).lines(), answer, vsock: Arc::new(vsock) })
    }
}

/// One boot of a guest, from its start to its end or its reboot.
struct Life<'a> {
    machine: &'a Machine<'a>,
    timeline: Timeline,
    guest: Option<Guest>,
    ip: Option<Ipv4Addr>,
    ssh: Option<TcpListener>,
}

impl Life<'_> {
    /// Nothing for a reboot.
    async fn one_boot(
        &mut self,
        signals: &mut async_mpsc::Receiver<Signal>,
        softnet: &mut Option<Running>,
        trigger: &mut Option<Trigger>,
        doors: &Arc<Doors>,
        control: &mut Option<UnixListener>,
    ) -> Result<Option<Ended>, Failure> {
        loop {
            let due = trigger.as_mut().and_then(|trigger| trigger.due(&self.timeline));
            let event = tokio::select! {
                biased;
                Some(signal) = signals.recv() => Event::Signal(signal),
                () = softnet_end(softnet) => Event::SoftnetEnded,
                event = guest_event(&mut self.guest) => event,
                () = sleep_until(due) => Event::Triggered,
                () = sleep_until(self.timeline.next()) => Event::Due,
                Some(stream) = accept(control) => Event::Control(stream),
                Some(stream) = accept_ssh(&self.ssh) => Event::Ssh(stream),
            };
            match event {
                Event::Signal(signal) => {
                    if let Some(ended) = self.on_signal(signal).await? {
                        return Ok(Some(ended));
                    }
                }
                Event::SoftnetEnded => {
                    let text = "RuntimeFailed(why: \"Softnet process terminated prematurely\")";
                    return Ok(Some(Ended::Failed(text.into())));
                }
                Event::GuestEnded(Some(code)) if code == i32::from(REBOOT) => return Ok(None),
                Event::GuestEnded(_) => {
                    say("guest has stopped the virtual machine");
                    return Ok(Some(Ended::Quietly));
                }
                Event::GuestAsks(question) => self.answer(&question).await,
                Event::Triggered => {
                    if trigger.as_ref().is_some_and(Trigger::is_ripe) {
                        let how = trigger.take().map(|trigger| trigger.how).unwrap_or_default();
                        if let Some(ended) = die(&how, softnet).await {
                            return Ok(Some(ended));
                        }
                    }
                }
                Event::Due => self.reach(doors, control)?,
                Event::Control(stream) => self.proxy(doors, stream, "8080"),
                Event::Ssh(stream) => self.proxy(doors, stream, "22"),
            }
        }
    }

    fn reach(&mut self, doors: &Arc<Doors>, control: &mut Option<UnixListener>) -> Done {
        let machine = self.machine;
        match self.timeline.reach() {
            None => {}
            Some(Phase::Started) => {
                let guest = machine.start_guest()?;
                *doors.guest.lock().expect("nobody panics with it") = Some(guest.vsock.clone());
                self.guest = Some(guest);
                if control.is_none() {
                    *control = Some(bind_control()?);
                }
            }
            Some(Phase::Lease) => {
                let duplicate = find(machine.faults, "duplicate_lease").and_then(|fault| fault.text("of"));
                if let Some(other) = duplicate {
                    self.take_lease_of(other)?;
                    return Ok(());
                }
                let mut listener = None;
                let ip = lease::grant(machine.sim, &machine.config.mac_address, |ip| bind_ssh(ip, &mut listener))?;
                self.ip = Some(ip);
                // It answers from the phase of sshd on.
                self.ssh = None;
                drop(listener);
            }
            Some(Phase::Sshd) => {
                let mut listener = None;
                if self.ip.is_some_and(|ip| bind_ssh(ip, &mut listener))
                    && let Some(listener) = listener
                {
                    listener.set_nonblocking(true)?;
                    self.ssh = Some(TcpListener::from_std(listener)?);
                }
            }
            Some(Phase::Agent) => doors.agent.store(true, Ordering::Relaxed),
        }
        Ok(())
    }

    fn take_lease_of(&mut self, other: &str) -> Done {
        let machine = self.machine;
        let other = home::VmDir::local(machine.sim, other).config()?;
        if let Some(found) = lease::of(&machine.sim.host, &other.mac_address)? {
            lease::duplicate(machine.sim, &machine.config.mac_address, found.ip)?;
            self.ip = Some(found.ip);
        }
        Ok(())
    }

    async fn on_signal(&mut self, signal: Signal) -> Result<Option<Ended>, Failure> {
        match signal {
            Signal::SIGINT if find(self.machine.faults, "ignore_interrupt").is_some() => Ok(None),
            Signal::SIGINT => {
                say("Stopping VM...");
                Ok(Some(Ended::Quietly))
            }
            Signal::SIGUSR1 => Ok(Some(self.suspend().await?)),
            _ => {
                say("Requesting guest OS to stop...");
                // A macOS guest shows a dialog that nobody sees.
                if self.machine.config.os != "darwin"
                    && let Some(guest) = &mut self.guest
                {
                    let _ = guest.answer.write_all(b"{\"halt\":true}\n").await;
                }
                Ok(None)
            }
        }
    }

    async fn suspend(&mut self) -> Result<Ended, Failure> {
        let machine = self.machine;
        let supported = machine.suspendable && machine.config.os == "darwin";
        if !supported || find(machine.faults, "suspend_fails").is_some() {
            let text = error(1, "The virtual machine configuration does not support saving.");
            say(&format!("Failed to suspend the VM: {text}"));
            return Ok(Ended::FailedSilently);
        }
        say("pausing VM to take a snapshot...");
        say("creating a snapshot...");
        if find(machine.faults, "suspend_hangs").is_some() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(machine.sim.scaled(SAVE_SECONDS)).await;
        save(machine.vm, machine.config, machine.flags)?;
        say("snapshot created successfully! shutting down the VM...");
        Ok(Ended::Quietly)
    }

    async fn answer(&mut self, question: &Value) {
        let machine = self.machine;
        let answer = match question["ask"].as_str() {
            Some("ip") => json!({ "ip": self.ip.map(|ip| ip.to_string()) }),
            Some("exec") => {
                let struck = Faults::of(machine.sim, "guest-exec", &machine.vm.name);
                let fault = struck.first();
                json!({ "fault": fault.map(|f| &f.name), "seconds": fault.map_or(0.0, |f| machine.sim.scaled(f.seconds()).as_secs_f64()) })
            }
            _ => Value::Null,
        };
        if let Some(guest) = &mut self.guest {
            let _ = guest.answer.write_all(format!("{answer}\n").as_bytes()).await;
        }
    }

    /// Bytes between a connection of the host and a port of the guest. A port that refuses looks like a close.
    fn proxy<S>(&self, doors: &Arc<Doors>, mut stream: S, port: &'static str)
    where
        S: AsyncRead + AsyncWrite + Unpin + 'static,
    {
        let open = port == "22" || doors.agent.load(Ordering::Relaxed);
        let absent =
            port != "22" && find(&Faults::of(self.machine.sim, "agent", &self.machine.vm.name), "absent").is_some();
        let guest = doors.guest.lock().expect("nobody panics with it").clone();
        let Some(vsock) = guest.filter(|_| open && !absent) else { return };
        tokio::task::spawn_local(async move {
            let Ok(mut inside) = vsock.connect().await else { return };
            if inside.write_all(format!("{port}\n").as_bytes()).await.is_ok() {
                let _ = tokio::io::copy_bidirectional_with_sizes(&mut stream, &mut inside, 1 << 16, 1 << 16).await;
            }
        });
    }

    /// Waits until nothing of the guest is left.
    async fn end_guest(&mut self) {
        let Some(mut guest) = self.guest.take() else { return };
        if let (true, Some(pid)) = (self.machine.sim.isolated, guest.child.id()) {
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM);
        }
        // Without a namespace the guest sees the end of the channel and kills what it has.
        let _ = guest.answer.shutdown().await;
        drop(guest.answer);
        let _ = guest.child.wait().await;
        while let Ok(Some(_)) = guest.channel.next_line().await {}
    }
}

async fn die(how: &str, softnet: &mut Option<Running>) -> Option<Ended> {
    match how {
        "kill" => fault::die_of("KILL"),
        "stop" => say("guest has stopped the virtual machine"),
        "network" => {
            say("virtual machine's network attachment <VZVmnetNetworkDeviceAttachment> has been disconnected \
                          with error: Error Domain=VZErrorDomain Code=1 \"Internal Network Error\"")
        }
        "error" => return Some(Ended::Failed(error(1, "Internal Virtualization error."))),
        "softnet" => {
            if let Some(softnet) = softnet {
                let _ = softnet.child.start_kill();
            }
            return None;
        }
        _ => say(&format!(
            "guest has stopped the virtual machine due to error: {}",
            error(1, "The virtual machine stopped unexpectedly.")
        )),
    }
    Some(Ended::Quietly)
}

/// The path is relative, because that of a socket must be short.
fn bind_control() -> Result<UnixListener, Failure> {
    match fs::remove_file("control.sock") {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    Ok(UnixListener::bind("control.sock")?)
}

/// Whether this host can use the address; where ports below 1024 are not for us, an address without SSH.
fn bind_ssh(ip: Ipv4Addr, listener: &mut Option<StdTcpListener>) -> bool {
    match StdTcpListener::bind((ip, 22)) {
        Ok(bound) => {
            *listener = Some(bound);
            true
        }
        Err(error) => error.kind() == std::io::ErrorKind::PermissionDenied,
    }
}

/// The key of every guest of this host; nothing where there is no OpenSSH.
fn host_key(sim: &Sim) -> Option<std::path::PathBuf> {
    let path = sim.host.join("ssh_host_key");
    if !std::path::Path::new("/usr/sbin/sshd").exists() {
        return None;
    }
    if !path.exists() {
        let _held = lock::exclusive_file(&sim.host.join("ssh_host_key.lock")).ok()?;
        if !path.exists() {
            let mut keygen = std::process::Command::new("ssh-keygen");
            keygen.args(["-q", "-t", "ed25519", "-N", "", "-C", "guest", "-f"]).arg(&path).stdin(Stdio::null());
            keygen.stdout(Stdio::null()).status().ok()?;
        }
    }
    path.exists().then_some(path)
}

fn forward(signals: mpsc::Receiver<Signal>) -> async_mpsc::Receiver<Signal> {
    let (tell, heard) = async_mpsc::channel(8);
    std::thread::spawn(move || {
        while let Ok(signal) = signals.recv() {
            if tell.blocking_send(signal).is_err() {
                return;
            }
        }
    });
    heard
}

async fn softnet_end(softnet: &mut Option<Running>) {
    match softnet {
        Some(running) => {
            let _ = running.child.wait().await;
        }
        None => std::future::pending().await,
    }
}

async fn guest_event(guest: &mut Option<Guest>) -> Event {
    let Some(guest) = guest else { return std::future::pending().await };
    tokio::select! {
        biased;
        Ok(Some(line)) = guest.channel.next_line() => Event::GuestAsks(serde_json::from_str(&line).unwrap_or(Value::Null)),
        status = guest.child.wait() => Event::GuestEnded(status.ok().and_then(|status| status.code())),
    }
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

async fn accept(listener: &Option<UnixListener>) -> Option<UnixStream> {
    match listener {
        Some(listener) => listener.accept().await.ok().map(|(stream, _)| stream),
        None => std::future::pending().await,
    }
}

async fn accept_ssh(listener: &Option<TcpListener>) -> Option<tokio::net::TcpStream> {
    match listener {
        Some(listener) => listener.accept().await.ok().map(|(stream, _)| stream),
        None => std::future::pending().await,
    }
}
