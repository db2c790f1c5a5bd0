//! S: the other way to a guest's shell, for images without the agent: the system's own `ssh`.
//!
//! A guest's host key is as old as its VM, so no key is remembered; that the other end is our VM is known by its hardware
//! address, which the caller asks for. The password goes to `ssh` by its askpass program, never in an argument list.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use alloy_shared::limits::LOG_CHUNK_MAX;
use alloy_shared::secret::Secret;
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::script::{READER, quote};
use crate::provider::agent::Said;
use crate::provider::{VmError, VmFault};

const ASKPASS: &str = "#!/bin/sh\nprintf '%s\\n' \"$ALLOY_GUEST_PASSWORD\"\n";

/// Who we are in a guest.
#[derive(Debug, Clone)]
pub(super) struct Login {
    pub(super) user: String,
    pub(super) password: Secret<String>,
}

#[derive(Debug, Clone)]
pub(super) struct Ssh {
    login: Login,
    /// `ADDRESS` or `ADDRESS:PORT`.
    address: String,
    askpass: PathBuf,
}

impl Ssh {
    /// `dir` is where the askpass program is kept.
    pub(super) fn new(login: Login, address: String, dir: &Path) -> std::io::Result<Self> {
        let askpass = dir.join("askpass");
        if !askpass.exists() {
            let new = dir.join(".askpass.new");
            std::fs::write(&new, ASKPASS)?;
            std::fs::set_permissions(&new, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
            std::fs::rename(&new, &askpass)?;
        }
        Ok(Self { login, address, askpass })
    }

    /// Runs a script in the guest. The channel ends with `Exit` or `Lost`.
    pub(super) async fn exec(&self, script: Bytes, said: mpsc::Sender<Said>, stop: CancellationToken) {
        let last = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            last = self.talk(script, &said) => last,
        };
        let last = last.unwrap_or_else(|why| Said::Lost(VmError::farm(VmFault::Lost, why)));
        let _nobody_asks = said.send(last).await;
    }

    async fn talk(&self, script: Bytes, said: &mpsc::Sender<Said>) -> Result<Said, String> {
        let (host, port) = match self.address.rsplit_once(':') {
            Some((host, port)) => (host, port),
            None => (self.address.as_str(), "22"),
        };
        let command: Vec<String> = READER.iter().map(|word| quote(word)).collect();
        let ssh = |error: std::io::Error| format!("ssh: {error}");
        let mut child = Command::new("ssh")
            .args(["-T", "-F", "/dev/null", "-p", port, "-l", &self.login.user])
            .args(OPTIONS.iter().flat_map(|option| ["-o", option]))
            .args([host, &command.join(" ")])
            .env("SSH_ASKPASS", &self.askpass)
            .env("SSH_ASKPASS_REQUIRE", "force")
            .env("DISPLAY", "none")
            .env("ALLOY_GUEST_PASSWORD", self.login.password.expose())
            .env_remove("SSH_AUTH_SOCK")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(ssh)?;
        let (Some(mut stdin), Some(mut stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("ssh has no pipes".to_owned());
        };
        let give = async move {
            // A guest that is not there closes the pipe, and the output says so.
            let _closed = stdin.write_all(&script).await;
            drop(stdin);
            std::future::pending::<()>().await
        };
        let hear = async {
            let mut buffer = BytesMut::new();
            loop {
                buffer.reserve(LOG_CHUNK_MAX);
                match stdout.read_buf(&mut buffer).await.map_err(ssh)? {
                    0 => break,
                    _ => said
                        .send(Said::Bytes(buffer.split().freeze()))
                        .await
                        .map_err(|_| "nobody listens".to_owned())?,
                }
            }
            let status = child.wait().await.map_err(ssh)?;
            Ok(Said::Exit(status.code().unwrap_or(255)))
        };
        tokio::select! {
            biased;
            heard = hear => heard,
            () = give => Err("ssh took no input".to_owned()),
        }
    }
}

const OPTIONS: [&str; 9] = [
    "StrictHostKeyChecking=no",
    "UserKnownHostsFile=/dev/null",
    "GlobalKnownHostsFile=/dev/null",
    "PreferredAuthentications=password,keyboard-interactive",
    "NumberOfPasswordPrompts=1",
    "ConnectTimeout=5",
    "ServerAliveInterval=15",
    "ServerAliveCountMax=4",
    "LogLevel=ERROR",
];
