//! Connections from the host into a guest. The listener is inherited by the guest, so it works across its namespaces, and
//! it vanishes with the last process that has it.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream as StdStream};

use tokio::net::UnixStream;

#[derive(Debug)]
pub(crate) struct Vsock {
    address: std::os::unix::net::SocketAddr,
    #[cfg(not(target_os = "linux"))]
    _dir: tempfile::TempDir,
}

impl Vsock {
    pub(crate) async fn connect(&self) -> io::Result<UnixStream> {
        let stream = StdStream::connect_addr(&self.address)?;
        stream.set_nonblocking(true)?;
        UnixStream::from_std(stream)
    }
}

/// In the abstract name space of the host's network, which guests do not share.
#[cfg(target_os = "linux")]
pub(crate) fn listen() -> io::Result<(UnixListener, Vsock)> {
    use std::os::linux::net::SocketAddrExt as _;
    let name = format!("sim-tart-{}-{:x}", std::process::id(), super::context::dice());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
    Ok((UnixListener::bind_addr(&address)?, Vsock { address }))
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn listen() -> io::Result<(UnixListener, Vsock)> {
    let dir = tempfile::Builder::new().prefix("sim-").tempdir_in("/tmp")?;
    let address = std::os::unix::net::SocketAddr::from_pathname(dir.path().join("v"))?;
    Ok((UnixListener::bind_addr(&address)?, Vsock { address, _dir: dir }))
}
