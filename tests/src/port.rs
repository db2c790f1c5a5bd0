//! Ports for daemons that are found again after a restart: no other test takes one while its owner is down.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, bail};
use nix::fcntl::{Flock, FlockArg};

/// The system gives none of these to anybody by itself.
const FIRST: u16 = 12_000;
const COUNT: u32 = 10_000;

/// The guards of this process's ports, to its end.
static HELD: Mutex<Vec<Flock<File>>> = Mutex::new(Vec::new());

/// One that no other test on this machine gets as long as this process lives.
pub fn own_address() -> Result<SocketAddr> {
    let first = std::process::id().wrapping_mul(7) % COUNT;
    for step in 0..COUNT {
        let port = FIRST + u16::try_from((first + step) % COUNT)?;
        let guard = std::env::temp_dir().join(format!("alloy-test-port-{port}"));
        // One of another user is taken.
        let Ok(file) = File::options().create(true).append(true).open(guard) else { continue };
        let Ok(held) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { continue };
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if TcpListener::bind(address).is_ok() {
            HELD.lock().unwrap_or_else(PoisonError::into_inner).push(held);
            return Ok(address);
        }
    }
    bail!("no port is free")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_given_once_and_can_be_listened_on_again_and_again() {
        let (one, other) = (own_address().unwrap(), own_address().unwrap());
        assert_ne!(one, other);
        for _ in 0..3 {
            TcpListener::bind(one).unwrap();
        }
    }
}
