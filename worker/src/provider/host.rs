//! S: a directory and a process group instead of a VM. There is no isolation, and the daemon says so when it starts.
//!
//! A "VM" is `STATE/vms/NAME` with an inbox, a workspace, a home and a directory for temporary files. Its commands run
//! as the daemon's user under a guard that is started when the VM boots, so that a claim costs no fork. A path that is
//! not UTF-8 cannot be a state directory: it would not survive the environment of a job.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use alloy_shared::env::{Env, Mono};
use alloy_shared::id::Digest;
use alloy_shared::wire::image::PullProgress;
use alloy_shared::wire::source::check_path;
use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::blocking::{blocking, joined};
use super::{
    ArtifactRule, Command, Exec, Guest, Image, ImageRef, Listing, NetworkPolicy, Run, Shape, VmError, VmFault, VmName,
    VmProvider, vm_dir,
};
use crate::guard::leash::{Leash, READ_MAX, Wires};
use crate::guard::{self, Launch};

mod files;
#[cfg(test)]
pub(crate) mod tests;

/// The only image that a plain host has: itself.
pub const HOST_IMAGE: &str = "host";
/// Chunks between the log pipe and the spool: with full ones, 1 MiB.
const CHUNKS: usize = 4;
/// Nothing of a VM lives longer than this after it was told to go.
const KILL_BUDGET: Duration = Duration::from_secs(10);

/// What the host provider needs to know of its host.
pub struct Setup {
    pub state_dir: PathBuf,
    /// The binary that has [`guard::SUBCOMMAND`].
    pub guard: PathBuf,
    pub user: String,
    /// The commands' PATH: the daemon's own.
    pub path: String,
    pub env: Arc<dyn Env>,
    /// When guards must kill by themselves.
    pub fence: watch::Receiver<Mono>,
}

pub struct Host {
    setup: Arc<Setup>,
    live: Mutex<HashMap<VmName, Arc<HostGuest>>>,
    /// VMs whose directories are still to be made. Whoever made one may be gone, and it be destroyed before it is there.
    making: Arc<Mutex<HashSet<VmName>>>,
}

impl Host {
    pub fn new(setup: Setup) -> Result<Self, VmError> {
        if setup.state_dir.to_str().is_none() || !setup.state_dir.is_absolute() {
            let why = format!("{:?} is no absolute path in UTF-8", setup.state_dir);
            return Err(VmError::policy(VmFault::Start, why));
        }
        let vms = setup.state_dir.join("vms");
        // A large tree takes long: neither the daemon's start nor its end waits for this thread.
        let trying = std::thread::Builder::new().name("gone".into()).spawn(move || files::remove_gone(&vms));
        if let Err(error) = trying {
            tracing::debug!(%error, "what was set aside is not tried again");
        }
        Ok(Self { setup: Arc::new(setup), live: Mutex::default(), making: Arc::default() })
    }

    fn dir(&self, vm: &VmName) -> String {
        vm_dir(&self.setup.state_dir, vm).to_string_lossy().into_owned()
    }
}

#[async_trait]
impl VmProvider for Host {
    async fn list(&self) -> Result<Vec<VmName>, VmError> {
        let vms = self.setup.state_dir.join("vms");
        blocking(move || {
            let entries = match std::fs::read_dir(&vms) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
                entries => entries.map_err(|error| VmError::io(VmFault::Lost, "list VMs", &error))?,
            };
            let mut names: Vec<VmName> =
                entries.flatten().filter_map(|entry| VmName::parse(entry.file_name().to_str()?).ok()).collect();
            names.sort();
            Ok(names)
        })
        .await
    }

    async fn images(&self) -> Result<Vec<Image>, VmError> {
        let names = vec![ImageRef(HOST_IMAGE.to_owned())];
        Ok(vec![Image { digest: Digest::of(HOST_IMAGE.as_bytes()), names, size_bytes: 0, removable: false }])
    }

    fn pulls(&self) -> bool {
        false
    }

    fn makes_vms(&self) -> bool {
        false
    }

    async fn find(&self, image: &ImageRef) -> Result<Option<Digest>, VmError> {
        Ok((image.0 == HOST_IMAGE).then(|| Digest::of(HOST_IMAGE.as_bytes())))
    }

    async fn pull(
        &self,
        image: &ImageRef,
        _progress: &watch::Sender<PullProgress>,
        _stop: &CancellationToken,
    ) -> Result<Digest, VmError> {
        self.find(image).await?.ok_or_else(|| {
            let why = format!("this worker runs jobs on the host; `{image}` is an image of VMs");
            VmError::policy(VmFault::NoImage, why)
        })
    }

    async fn remove(&self, _image: &Digest) -> Result<(), VmError> {
        Err(VmError::policy(VmFault::NoImage, "the host itself cannot be removed"))
    }

    async fn create(&self, vm: &VmName, _image: &Digest, _shape: &Shape) -> Result<(), VmError> {
        let (dir, making, name) = (vm_dir(&self.setup.state_dir, vm), Arc::clone(&self.making), vm.clone());
        lock(&making).insert(name.clone());
        blocking(move || {
            let mut making = lock(&making);
            if !making.remove(&name) {
                return Err(VmError::farm(VmFault::Start, "it was destroyed before it was made"));
            }
            let made = ["", "inbox", "work", "home", "tmp"].iter().try_for_each(|part| make_private(&dir.join(part)));
            made.map_err(|error| VmError::io(VmFault::Start, "make the VM's directory", &error))
        })
        .await
    }

    async fn boot(&self, vm: &VmName, inbox: &Path) -> Result<Arc<dyn Guest>, VmError> {
        let dir = self.dir(vm);
        let guest = Arc::new(HostGuest {
            workspace: format!("{dir}/work"),
            dir: PathBuf::from(&dir),
            inbox: inbox.to_owned(),
            setup: Arc::clone(&self.setup),
            spare: Mutex::new(None),
            guards: AtomicU32::new(0),
            doom: CancellationToken::new(),
            running: TaskTracker::new(),
        });
        let spare = guest.start_guard()?;
        *lock(&guest.spare) = Some(spare);
        lock(&self.live).insert(vm.clone(), Arc::clone(&guest));
        Ok(guest)
    }

    async fn restrict(&self, _vm: &VmName, network: &NetworkPolicy) -> Result<(), VmError> {
        match network {
            NetworkPolicy::Default => Ok(()),
            NetworkPolicy::None | NetworkPolicy::Only(_) => {
                let why = "this worker runs jobs on the host, whose network it cannot restrict";
                Err(VmError::policy(VmFault::Network, why))
            }
        }
    }

    async fn destroy(&self, vm: &VmName) -> Result<(), VmError> {
        let guest = lock(&self.live).remove(vm);
        if let Some(guest) = guest {
            guest.end().await;
        }
        let dir = vm_dir(&self.setup.state_dir, vm);
        let mark = self.dir(vm);
        let (name, making, unique) = (vm.clone(), Arc::clone(&self.making), self.setup.env.dice());
        blocking(move || {
            lock(&making).remove(&name);
            let records = files::records(&dir);
            // A guard that ended by itself has left no record and nothing alive.
            if !records.is_empty() && !guard::sweep(&records, &mark, KILL_BUDGET) {
                return Err(VmError::farm(VmFault::Destroy, format!("processes of {name} do not die")));
            }
            let Err(obstacle) = files::remove(&dir) else { return Ok(()) };
            // Nothing runs in it any more, so it takes no slot.
            let aside = files::set_aside(&dir, unique)
                .map_err(|_| VmError::io(VmFault::Destroy, "remove the VM's directory", &obstacle))?;
            tracing::warn!(
                vm.id = %name,
                "{} cannot be deleted and stays on the disk: {obstacle}. A job has left it, none of whose processes lives. \
                 Delete it as whoever owns what is in it, after unmounting what is mounted there; each start of this \
                 worker tries it again",
                aside.display()
            );
            Ok(())
        })
        .await
    }
}

struct HostGuest {
    workspace: String,
    dir: PathBuf,
    inbox: PathBuf,
    setup: Arc<Setup>,
    spare: Mutex<Option<Leash>>,
    guards: AtomicU32,
    doom: CancellationToken,
    running: TaskTracker,
}

impl HostGuest {
    fn start_guard(&self) -> Result<Leash, VmError> {
        let record = self.dir.join(format!("{}{}", files::RECORD, self.guards.fetch_add(1, Ordering::Relaxed)));
        Leash::start(&self.setup.guard, record).map_err(|error| VmError::io(VmFault::Start, "start a guard", &error))
    }

    /// Takes the guard that waits, if it still lives, or starts one.
    fn take_guard(&self) -> Result<Leash, VmError> {
        let mut spare = lock(&self.spare).take();
        match spare.take_if(Leash::lives) {
            Some(spare) => Ok(spare),
            None => self.start_guard(),
        }
    }

    async fn end(&self) {
        self.doom.cancel();
        let spare = lock(&self.spare).take();
        if let Some(spare) = spare {
            spare.drop_unused().await;
        }
        self.running.close();
        self.running.wait().await;
    }

    /// Does work in the VM's directory, which is not removed before that has ended. It ends soon after it was told to stop,
    /// because the VM is to go or because nobody waits for it any more.
    async fn within_dir<T: Send + 'static>(
        &self,
        work: impl FnOnce(&CancellationToken) -> Result<T, VmError> + Send + 'static,
    ) -> Result<T, VmError> {
        let stop = self.doom.child_token();
        let _while_waited_for = stop.clone().drop_guard();
        joined(self.running.spawn_blocking(move || work(&stop))).await
    }

    fn launch(&self, command: &Command) -> Launch {
        let argv = match &command.run {
            Run::Argv(argv) => argv.clone(),
            Run::Shell(line) => SHELL.iter().map(|word| (*word).to_owned()).chain([line.clone()]).collect(),
        };
        let place = |part: &str| format!("{}/{part}", self.dir.display());
        let mut env = BTreeMap::from([
            ("HOME".to_owned(), place("home")),
            ("USER".to_owned(), self.setup.user.clone()),
            ("PATH".to_owned(), self.setup.path.clone()),
            ("TMPDIR".to_owned(), place("tmp")),
        ]);
        env.extend(command.env.iter().map(|(key, value)| (key.clone(), value.clone())));
        let dir = match command.workdir.as_str() {
            "" => self.workspace.clone(),
            below => format!("{}/{below}", self.workspace),
        };
        Launch { argv, env: env.into_iter().collect(), dir, vm_dir: self.dir.display().to_string(), control: None }
    }
}

/// What runs a shell line. On macOS a login shell, because that is where PATH is set up for developers.
#[cfg(target_os = "macos")]
const SHELL: &[&str] = &["/bin/zsh", "-lc"];
#[cfg(not(target_os = "macos"))]
const SHELL: &[&str] = &["/bin/sh", "-c"];

#[async_trait]
impl Guest for HostGuest {
    fn workspace(&self) -> &str {
        &self.workspace
    }

    async fn unpack(&self, tar: &str, into: &str) -> Result<(), VmError> {
        if !into.is_empty() {
            check_path(into).map_err(|error| VmError::user(VmFault::File, error.to_string()))?;
        }
        let (tar, into) = (self.inbox.join(tar), Path::new(&self.workspace).join(into));
        self.within_dir(move |stop| files::unpack(&tar, &into, stop)).await
    }

    async fn exec(&self, command: &Command) -> Result<Exec, VmError> {
        let guard = self.take_guard()?;
        let launch = self.launch(command);
        let (input, orders) = mpsc::channel(4);
        let (bytes, output) = mpsc::channel(CHUNKS);
        let wires = Wires {
            env: Arc::clone(&self.setup.env),
            fence: self.setup.fence.clone(),
            doom: self.doom.clone(),
            input: orders,
            output: bytes,
        };
        self.setup.env.spawn("host_exec", Box::pin(self.running.track_future(guard.run(launch, wires))));
        Ok(Exec { input, output })
    }

    async fn read(&self, path: &str, limit: u64) -> Result<mpsc::Receiver<Bytes>, VmError> {
        let (root, path) = (PathBuf::from(&self.workspace), path.to_owned());
        let file = blocking(move || files::open_beneath(&root, &path)).await?;
        let (tx, rx) = mpsc::channel(4);
        self.running.spawn_blocking(move || files::stream(file, limit, &tx));
        Ok(rx)
    }

    async fn list(&self, rules: &[ArtifactRule]) -> Result<Listing, VmError> {
        let rules =
            crate::artifacts::Matcher::new(rules).map_err(|error| VmError::user(VmFault::File, error.to_string()))?;
        let root = PathBuf::from(&self.workspace);
        self.within_dir(move |stop| files::list(&root, &rules, stop)).await
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn make_private(dir: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
}

const _: () = assert!(READ_MAX * CHUNKS == 1 << 20);
