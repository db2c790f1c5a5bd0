//! The softnet child of a run, and the checks of the control descriptor.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::Stdio;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockType, UnixAddr, getpeername, getsockopt, sockopt};
use tokio::process::{Child, Command};

use crate::tart::context::Sim;
use crate::tart::fault::{Faults, find};
use crate::tart::home::{Config, VmDir};
use crate::tart::run_args::Network;
use crate::tart::{Done, Failure};

/// A softnet that has not been started yet: it is a child of the runtime.
#[derive(Debug)]
pub(crate) struct Softnet {
    command: std::process::Command,
    /// Our end of the network cable. When it closes, softnet ends.
    cable: OwnedFd,
}

#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) child: Child,
    _cable: OwnedFd,
}

impl Softnet {
    pub(crate) fn start(self) -> Result<Running, Failure> {
        let child = Command::from(self.command).spawn()?;
        Ok(Running { child, _cable: self.cable })
    }
}

fn failed(why: &str) -> Failure {
    Failure::Error(format!("InitializationFailed(why: \"{why}\")"))
}

/// What `tart` refuses before it starts anything.
pub(crate) fn check(control_fd: Option<i32>) -> Done {
    let Some(number) = control_fd else { return Ok(()) };
    if number <= 2 {
        return Err(failed("Softnet control file descriptor must be greater than 2"));
    }
    let fd = inherited(number);
    match getsockopt(&fd, sockopt::SockType) {
        Err(error) => {
            return Err(failed(&format!("Softnet control file descriptor is not a socket: {}", error.desc())));
        }
        Ok(kind) if kind != SockType::Stream => {
            return Err(failed("Softnet control file descriptor must be a Unix stream socket"));
        }
        Ok(_) => {}
    }
    let name = nix::sys::socket::getsockname::<nix::sys::socket::SockaddrStorage>(number);
    if !name.is_ok_and(|name| nix::sys::socket::SockaddrLike::family(&name) == Some(AddressFamily::Unix)) {
        return Err(failed("Softnet control file descriptor must be a Unix stream socket"));
    }
    match getpeername::<UnixAddr>(number) {
        Ok(_) => Ok(()),
        Err(error) => Err(failed(&format!("Softnet control file descriptor is not connected: {}", error.desc()))),
    }
}

#[expect(unsafe_code, reason = "a number on the command line is how the parent says which descriptor it left open")]
fn inherited(number: i32) -> BorrowedFd<'static> {
    // SAFETY: nobody in this process opens or closes descriptors by number; a wrong one is an error of the next call.
    unsafe { BorrowedFd::borrow_raw(number) }
}

/// Prepares the child; nothing for networks without it.
pub(crate) fn start(sim: &Sim, vm: &VmDir, config: &Config, network: &Network) -> Result<Option<Softnet>, Failure> {
    let Network::Softnet { host_only, options, control_fd } = network else { return Ok(None) };
    let faults = Faults::of(sim, "softnet", &vm.name);
    let program = if find(&faults, "missing").is_some() { None } else { find_in_path("softnet") };
    let program = program.ok_or_else(|| failed("softnet not found in PATH"))?;
    // The real cable carries datagrams, but of those not every system tells when the other end has gone, and there are no
    // frames of a guest without a network.
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    let mut command = std::process::Command::new(program);
    command.args(["--vm-fd", "0", "--vm-mac-address", &config.mac_address]).args(options);
    if *host_only {
        command.args(["--vm-net-type", "host"]);
    }
    command.env("SIM_TART_VM", &vm.name).env("SIM_TART_HOST", &sim.host).stdin(OwnedFd::from(theirs));
    if let Some(fault) = faults.first() {
        command.env("SIM_SOFTNET_FAULT", &fault.name);
        if let Some(file) = fault.text("file") {
            command.env("SIM_SOFTNET_FAULT_FILE", file);
        }
    }
    match control_fd {
        None => {
            command.stdout(Stdio::null());
        }
        Some(number) => {
            let fd = inherited(*number);
            command.args(["--control-fd", "1"]).stdout(Stdio::from(fd.try_clone_to_owned()?));
            // No other child of ours shall hold it.
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        }
    }
    Ok(Some(Softnet { command, cable: ours.into() }))
}

fn find_in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|path| path.is_file())
}
