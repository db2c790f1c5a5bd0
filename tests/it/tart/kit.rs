//! A `tart` under test: its path, its environment, names that nobody used before, and runs that end with the test.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use alloy_tests::observe::{PATIENCE, until_blocking};
use alloy_tests::sim_host::{Profile, Setup, SimHost};
use nix::sys::signal::Signal;

/// The image that the cases clone.
pub(crate) const BASE: &str = "registry.test/alloy/base:latest";

/// How an invocation ended and what it said.
#[derive(Debug)]
pub(crate) struct Out {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Out {
    /// Asserts the exit code and both streams, to the byte.
    #[track_caller]
    pub(crate) fn is(&self, code: i32, stdout: &str, stderr: &str) {
        assert_eq!((self.status.code(), &*self.stdout, &*self.stderr), (Some(code), stdout, stderr));
    }

    #[track_caller]
    pub(crate) fn ok(&self) -> &str {
        assert!(self.status.success(), "{self:?}");
        &self.stdout
    }

    #[track_caller]
    pub(crate) fn fails(&self, code: i32, text: &str) {
        assert_eq!(self.status.code(), Some(code), "{self:?}");
        assert!(self.stderr.contains(text), "no `{text}` in {self:?}");
    }
}

pub(crate) struct Kit {
    tart: PathBuf,
    image: String,
    sim: Option<SimHost>,
    names: RefCell<Vec<String>>,
    scratch: tempfile::TempDir,
}

impl Kit {
    /// The `tart` of the environment, or a simulated host of its own with one cached image.
    pub(crate) fn any() -> Kit {
        match std::env::var_os("ALLOY_TEST_TART") {
            None => Kit::sim(Setup::default()),
            Some(path) => {
                let image = std::env::var("ALLOY_TEST_TART_IMAGE").expect("ALLOY_TEST_TART_IMAGE names a cached image");
                Kit::over(PathBuf::from(path), image, None)
            }
        }
    }

    pub(crate) fn sim(setup: Setup) -> Kit {
        let host = SimHost::new(setup).expect("a simulated host");
        host.publish(BASE, &Profile::default()).expect("an image");
        let kit = Kit::over(host.tart_path(), BASE.to_owned(), Some(host));
        kit.tart(&["pull", BASE]).ok();
        kit
    }

    fn over(tart: PathBuf, image: String, sim: Option<SimHost>) -> Kit {
        Kit { tart, image, sim, names: RefCell::default(), scratch: tempfile::tempdir().expect("a directory") }
    }

    /// The simulated host; panics where there is a real one.
    pub(crate) fn host(&self) -> &SimHost {
        self.sim.as_ref().expect("this case needs the simulator")
    }

    pub(crate) fn is_simulated(&self) -> bool {
        self.sim.is_some()
    }

    pub(crate) fn image(&self) -> &str {
        &self.image
    }

    pub(crate) fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    pub(crate) fn home(&self) -> PathBuf {
        match &self.sim {
            Some(host) => host.home(),
            None => std::env::var_os("TART_HOME")
                .map_or_else(|| PathBuf::from(std::env::var_os("HOME").expect("a home")).join(".tart"), PathBuf::from),
        }
    }

    pub(crate) fn vm_dir(&self, name: &str) -> PathBuf {
        self.home().join("vms").join(name)
    }

    pub(crate) fn command(&self, args: &[impl AsRef<OsStr>]) -> Command {
        let mut command = Command::new(&self.tart);
        command.args(args).stdin(Stdio::null());
        match &self.sim {
            Some(host) => {
                command.env_clear().envs(host.env());
            }
            None => {
                command.env("TART_NO_AUTO_PRUNE", "1").env("CI", "1");
            }
        }
        command
    }

    pub(crate) fn tart(&self, args: &[impl AsRef<OsStr>]) -> Out {
        output(&mut self.command(args))
    }

    /// A name nobody used; what has it at the end is stopped and deleted.
    pub(crate) fn name(&self) -> String {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("kit-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        self.names.borrow_mut().push(name.clone());
        name
    }

    /// A fresh, stopped clone of the image.
    pub(crate) fn vm(&self) -> String {
        let name = self.name();
        self.tart(&["clone", self.image(), &name]).ok();
        name
    }

    /// `tart run NAME --no-graphics FLAGS`, once it holds its lock.
    pub(crate) fn start(&self, name: &str, flags: &[&str]) -> Run<'_> {
        let run = self.spawn(name, flags);
        self.wait_for("the VM runs", || self.state(name) == "running");
        run
    }

    pub(crate) fn spawn(&self, name: &str, flags: &[&str]) -> Run<'_> {
        self.spawn_with(name, flags, |_| ())
    }

    pub(crate) fn spawn_with(&self, name: &str, flags: &[&str], change: impl FnOnce(&mut Command)) -> Run<'_> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let path = |stream| self.scratch().join(format!("{name}.{}.{stream}", NEXT.load(Ordering::Relaxed)));
        NEXT.fetch_add(1, Ordering::Relaxed);
        let (stdout, stderr) = (path("out"), path("err"));
        let mut command = self.command(&["run", name, "--no-graphics"]);
        command.args(flags).process_group(0);
        command.stdout(File::create(&stdout).expect("a file")).stderr(File::create(&stderr).expect("a file"));
        change(&mut command);
        let child = command.spawn().expect("tart starts");
        Run { kit: self, name: name.to_owned(), child: Some(child), stdout, stderr }
    }

    /// A running clone whose agent answers.
    pub(crate) fn boot(&self, flags: &[&str]) -> Run<'_> {
        self.boot_named(&self.vm(), flags)
    }

    pub(crate) fn boot_named(&self, name: &str, flags: &[&str]) -> Run<'_> {
        let run = self.start(name, flags);
        run.ready();
        run
    }

    #[track_caller]
    pub(crate) fn wait_for(&self, what: &str, look: impl FnMut() -> bool) {
        until_blocking(what, PATIENCE, look).expect("patience");
    }

    pub(crate) fn list(&self) -> Vec<serde_json::Value> {
        let out = self.tart(&["list", "--format", "json"]);
        serde_json::from_str(out.ok()).expect("an array of objects")
    }

    /// `State` as `list` has it, or nothing where the VM is not listed.
    pub(crate) fn state(&self, name: &str) -> String {
        let all = self.list();
        let found = all.iter().find(|vm| vm["Name"] == name);
        found.map_or_else(String::new, |vm| vm["State"].as_str().expect("a string").to_owned())
    }

    /// What lies below `TART_HOME/tmp`.
    pub(crate) fn tmp_entries(&self) -> Vec<String> {
        let entries = fs::read_dir(self.home().join("tmp")).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().into_string().expect("a plain name")).collect()
    }
}

impl Drop for Kit {
    fn drop(&mut self) {
        for name in self.names.borrow().iter() {
            let _ = self.tart(&["stop", "--timeout", "5", name]);
            let _ = self.tart(&["delete", name]);
        }
        if let (Some(host), false) = (&self.sim, std::thread::panicking()) {
            host.assert_no_leak();
        }
    }
}

pub(crate) fn output(command: &mut Command) -> Out {
    let out = command.output().expect("tart starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Out { status: out.status, stdout: text(&out.stdout), stderr: text(&out.stderr) }
}

/// A `tart run` with its streams in files.
pub(crate) struct Run<'a> {
    kit: &'a Kit,
    pub(crate) name: String,
    child: Option<Child>,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Run<'_> {
    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.as_ref().expect("it runs").id()).expect("a pid is small")
    }

    pub(crate) fn signal(&self, signal: Signal) {
        alloy_tests::process::signal(self.pid(), signal);
    }

    /// Waits until the guest agent runs a command.
    #[track_caller]
    pub(crate) fn ready(&self) {
        self.kit.wait_for("the agent answers", || self.kit.tart(&["exec", &self.name, "true"]).status.success());
    }

    pub(crate) fn exec(&self, command: &[&str]) -> Out {
        self.kit.tart(&[&["exec", self.name.as_str()], command].concat())
    }

    pub(crate) fn shell(&self, text: &str) -> Out {
        self.exec(&["/bin/sh", "-c", text])
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.as_mut().expect("it runs").try_wait().expect("a child").is_some()
    }

    pub(crate) fn stdout_so_far(&self) -> String {
        fs::read_to_string(&self.stdout).expect("its file")
    }

    /// Waits for the end, which must come by itself.
    #[track_caller]
    pub(crate) fn end(mut self) -> Out {
        self.kit.wait_for("`tart run` ends", || self.has_ended());
        let status = self.child.take().expect("it ran").wait().expect("a child");
        let read = |path: &Path| String::from_utf8_lossy(&fs::read(path).expect("its file")).into_owned();
        Out { status, stdout: read(&self.stdout), stderr: read(&self.stderr) }
    }

    /// `tart stop`, and the end of the run.
    #[track_caller]
    pub(crate) fn stop(self) -> Out {
        self.kit.tart(&["stop", &self.name]).is(0, "", "");
        self.end()
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub(crate) fn killed_by(out: &Out, signal: Signal) -> bool {
    out.status.signal() == Some(signal as i32)
}
