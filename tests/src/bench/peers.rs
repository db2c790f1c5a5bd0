//! Peers found on this machine, each started by the bench itself on loopback, in a directory of its own.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::ms;
use crate::observe::{now, until_blocking};

/// A program on the `PATH` or where servers are.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let more = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(more).map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// From before the start of the command to the first byte of its output.
pub fn until_first_byte(mut command: Command) -> Result<f64> {
    let started = now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let mut out = child.stdout.take().context("a pipe")?;
    let mut byte = [0; 1];
    let read = out.read(&mut byte)?;
    let took = ms(started);
    ensure!(read == 1, "{command:?} wrote nothing");
    std::io::copy(&mut out, &mut std::io::sink())?;
    ensure!(child.wait()?.success(), "{command:?} failed");
    Ok(took)
}

/// Seconds until all of the command's output is read, in chunks as large as a follower's.
pub fn drain(mut command: Command, bytes: u64) -> Result<f64> {
    let started = now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let mut out = child.stdout.take().context("a pipe")?;
    let (mut buffer, mut seen) = (vec![0; 64 << 10], 0);
    loop {
        match out.read(&mut buffer)? {
            0 => break,
            n => seen += n as u64,
        }
    }
    let took = ms(started) / 1e3;
    ensure!(child.wait()?.success() && seen == bytes, "{command:?}: {seen} of {bytes} bytes");
    Ok(took)
}

pub fn cat(file: &Path) -> Command {
    let mut cat = Command::new("cat");
    cat.arg(file);
    cat
}

/// Children that end with the bench.
struct Children(Vec<Child>);

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// slurmctld and slurmd on loopback.
pub struct Slurm {
    conf: PathBuf,
    _children: Children,
}

impl Slurm {
    pub async fn start(dir: &Path) -> Result<Option<Slurm>> {
        let (Some(ctld), Some(slurmd), Some(_)) = (find("slurmctld"), find("slurmd"), find("srun")) else {
            return Ok(None);
        };
        let host = nix::unistd::gethostname()?.into_string().unwrap_or_default();
        let host = host.split('.').next().unwrap_or_default().to_owned();
        let (one, two) = (free_port()?, free_port()?);
        let conf = dir.join("slurm.conf");
        let user = std::env::var("USER").unwrap_or_else(|_| "root".into());
        let text = format!(
            "ClusterName=bench\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={one}\nSlurmdPort={two}\n\
             AuthType=auth/none\nCredType=cred/none\nSlurmUser={user}\nSlurmdUser={user}\n\
             StateSaveLocation={d}/state\nSlurmdSpoolDir={d}/spool\nSlurmctldPidFile={d}/ctld.pid\n\
             SlurmdPidFile={d}/slurmd.pid\nSlurmctldLogFile={d}/ctld.log\nSlurmdLogFile={d}/slurmd.log\n\
             ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nSelectType=select/cons_tres\n\
             SwitchType=switch/none\nMpiDefault=none\nReturnToService=2\n\
             NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN\n\
             PartitionName=p Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:8\n",
            d = dir.display()
        );
        fs::write(&conf, text)?;
        fs::create_dir_all(dir.join("state"))?;
        fs::create_dir_all(dir.join("spool"))?;
        let start = |program: &Path| {
            let mut daemon = Command::new(program);
            daemon.arg("-D").env("SLURM_CONF", &conf).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            daemon.spawn()
        };
        let children = Children(vec![start(&ctld)?, start(&slurmd)?]);
        let slurm = Slurm { conf, _children: children };
        let ready =
            until_blocking("slurm runs a job", Duration::from_secs(30), || until_first_byte(slurm.hello()()).is_ok());
        if let Err(error) = ready {
            eprintln!("slurm is installed and does not run here, so it is not measured: {error:#}");
            return Ok(None);
        }
        Ok(Some(slurm))
    }

    pub fn hello(&self) -> impl Fn() -> Command + use<> {
        let conf = self.conf.clone();
        move || {
            let mut srun = Command::new("srun");
            srun.args(["-n1", "echo", "hi"]).env("SLURM_CONF", &conf);
            srun
        }
    }
}

/// task-spooler with a socket of its own.
pub struct Spooler {
    program: PathBuf,
    socket: PathBuf,
}

impl Spooler {
    pub fn find(dir: &Path) -> Option<Spooler> {
        Some(Spooler { program: find("tsp")?, socket: dir.join("s") })
    }

    pub fn hello(&self) -> impl Fn() -> Command + use<> {
        let (program, socket) = (self.program.clone(), self.socket.clone());
        move || {
            let mut tsp = Command::new(&program);
            tsp.args(["-nf", "echo", "hi"]).env("TS_SOCKET", &socket);
            tsp
        }
    }
}

impl Drop for Spooler {
    fn drop(&mut self) {
        // Its server outlives its clients.
        let _ = Command::new(&self.program).arg("-K").env("TS_SOCKET", &self.socket).status();
    }
}

/// sshd on a high loopback port with keys of its own.
pub struct Ssh {
    dir: PathBuf,
    port: u16,
    _children: Children,
}

impl Ssh {
    pub fn start(dir: &Path) -> Result<Option<Ssh>> {
        let (Some(sshd), Some(_), Some(keygen)) = (find("sshd"), find("ssh"), find("ssh-keygen")) else {
            return Ok(None);
        };
        for name in ["host", "user"] {
            let key = dir.join(name);
            let done = Command::new(&keygen).args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status()?;
            ensure!(done.success(), "ssh-keygen");
        }
        fs::copy(dir.join("user.pub"), dir.join("authorized"))?;
        // Debian's sshd wants it; without the right to make it there is no measurement.
        if fs::create_dir_all("/run/sshd").is_err() {
            return Ok(None);
        }
        let port = free_port()?;
        let mut daemon = Command::new(sshd);
        daemon.args(["-D", "-e", "-f", "/dev/null", "-o", "StrictModes=no", "-o", "UsePAM=no", "-o", "PidFile=none"]);
        daemon.args(["-o", "PermitRootLogin=yes", "-o", &format!("ListenAddress=127.0.0.1:{port}")]);
        daemon.args(["-o", &format!("AuthorizedKeysFile={}", dir.join("authorized").display())]);
        daemon.arg("-h").arg(dir.join("host")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let ssh = Ssh { dir: dir.to_owned(), port, _children: Children(vec![daemon.spawn()?]) };
        let ready =
            until_blocking("ssh answers", Duration::from_secs(20), || until_first_byte(ssh.command("echo hi")).is_ok());
        if let Err(error) = ready {
            eprintln!("sshd is installed and does not take us, so it is not measured: {error:#}");
            return Ok(None);
        }
        Ok(Some(ssh))
    }

    fn command(&self, line: &str) -> Command {
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "/dev/null", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]);
        ssh.args(["-o", "BatchMode=yes", "-o", "Compression=no", "-p", &self.port.to_string(), "-i"]);
        ssh.arg(self.dir.join("user")).arg("127.0.0.1").arg(line);
        ssh
    }

    pub fn cat(&self, file: &Path) -> Command {
        self.command(&format!("cat {}", file.display()))
    }
}

/// A port that is free at this moment, for peers that cannot choose one themselves.
fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
