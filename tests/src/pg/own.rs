//! A Postgres of one test, which stops it, kills it and starts it again.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;

use super::{MISSING, programs};
use crate::observe::until_blocking;
use crate::process::{is_alive, signal};

pub struct Own {
    dir: tempfile::TempDir,
    bin: PathBuf,
    pub address: SocketAddr,
}

impl Own {
    /// Makes it on this port of loopback and starts it.
    pub fn start_on(port: u16) -> Result<Own> {
        let bin = programs().with_context(|| MISSING)?;
        let dir = tempfile::Builder::new().prefix("alloy-pg").tempdir_in("/tmp")?;
        let own = Own { dir, bin, address: SocketAddr::from(([127, 0, 0, 1], port)) };
        own.run("chown", &[])?;
        own.run("initdb", &["-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C"])?;
        own.start()?;
        Ok(own)
    }

    /// Through whatever listens at this address.
    pub fn url_at(&self, address: SocketAddr) -> String {
        format!("postgres://postgres@{address}/postgres?sslmode=disable")
    }

    pub fn url(&self) -> String {
        self.url_at(self.address)
    }

    pub fn start(&self) -> Result<()> {
        let dir = self.dir.path().display();
        let options = format!(
            "-c listen_addresses=127.0.0.1 -c port={} -c unix_socket_directories={dir} -c fsync=off -c max_connections=100",
            self.address.port()
        );
        let log = format!("{dir}/server");
        self.run("pg_ctl", &["-w", "-t", "60", "-l", &log, "start", "-o", &options])
    }

    /// At once: whoever is connected is cut off.
    pub fn stop(&self) -> Result<()> {
        self.run("pg_ctl", &["-w", "-m", "fast", "stop"])
    }

    /// As the system ends it: none of its processes says a word.
    pub fn kill(&self) -> Result<()> {
        let text = std::fs::read_to_string(self.dir.path().join("data/postmaster.pid"))?;
        let pid: i32 = text.lines().next().context("a number")?.trim().parse()?;
        let children = Command::new("pgrep").args(["-P", &pid.to_string()]).output()?;
        let children: Vec<i32> =
            String::from_utf8_lossy(&children.stdout).lines().filter_map(|line| line.trim().parse().ok()).collect();
        signal(pid, Signal::SIGKILL);
        children.iter().for_each(|child| signal(*child, Signal::SIGKILL));
        until_blocking("every process of the database is gone", Duration::from_secs(20), || {
            !is_alive(pid) && !children.iter().any(|child| is_alive(*child))
        })
    }

    /// Runs one of its programs on its data, as who may.
    fn run(&self, program: &str, args: &[&str]) -> Result<()> {
        let root = nix::unistd::Uid::effective().is_root();
        let dir = self.dir.path();
        if program == "chown" {
            let done = !root || Command::new("chown").arg("postgres").arg(dir).status()?.success();
            ensure!(done, "chown {}", dir.display());
            return Ok(());
        }
        let mut command = Command::new(if root { "setpriv" } else { "env" });
        if root {
            command.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]);
        }
        let talk = std::fs::File::create(dir.join("talk"))?;
        command.arg(self.bin.join(program)).arg("-D").arg(dir.join("data")).args(args);
        command.stdin(Stdio::null()).stdout(talk.try_clone()?).stderr(talk).current_dir(dir);
        let status = command.status()?;
        ensure!(status.success(), "{program}: {}", std::fs::read_to_string(dir.join("talk")).unwrap_or_default());
        Ok(())
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // It may not run.
        let _ = self.run("pg_ctl", &["-w", "-m", "immediate", "stop"]);
    }
}
