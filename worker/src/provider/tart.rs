//! S: macOS VMs by the `tart` program: the only place that spells its name.
//!
//! What `tart` promises and what it does are two things. Names are never used twice; clones, settings and starts go one
//! after the other on a host, because `tart` reads every VM's settings when it makes one; `tart run` is watched by a guard
//! and any end of it that nobody asked for is the farm's fault, whatever status it gives; a VM is gone when `tart` no
//! longer lists it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use alloy_shared::env::{Env, Mono};
use alloy_shared::id::Digest;
use alloy_shared::secret::Secret;
use alloy_shared::wire::image::PullProgress;
use async_trait::async_trait;
use nix::sys::signal::{Signal, kill};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::boot::Vm;
use self::command::{CLONE, Failed, QUICK, STOP, Tart};
use self::says::{Trouble, Version, is_remote, ours, parse_list, parse_version, repository};
use self::ssh::Login;
use self::unfinished::Unfinished;
use super::{Guest, Image, ImageRef, NetworkPolicy, Shape, VmError, VmFault, VmName, VmProvider, vm_dir};

mod boot;
mod command;
mod guest;
mod images;
mod listing;
mod locks;
pub mod probe;
mod says;
mod script;
mod softnet;
mod ssh;
mod unfinished;

/// The oldest release that has what is used here: `exec`'s socket and `list` as JSON.
const OLDEST: Version = Version(2, 28, 0);
/// The first one whose packet filter takes orders while the VM runs.
const LIVE_FILTER: Version = Version(2, 34, 0);
/// How often a VM that still counts as running is asked to go.
const DELETE_TRIES: u32 = 40;
const DELETE_PAUSE_MS: u64 = 250;
/// Every user of a Mac may write there, and nothing tidies it up.
#[cfg(target_os = "macos")]
const HOST_DIR: &str = "/Users/Shared/alloy";
#[cfg(not(target_os = "macos"))]
const HOST_DIR: &str = "/tmp/alloy";

/// What a person decides about the VMs of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The `tart` program, as a path or a name to find.
    pub program: PathBuf,
    /// Where it keeps VMs and images.
    pub home: PathBuf,
    /// Where all workers of this host count the VMs that run.
    pub host_dir: PathBuf,
    /// Every VM's size.
    pub shape: Shape,
    /// VMs may run without a packet filter: they reach whatever this host reaches.
    pub unfiltered: bool,
    pub guest_user: String,
    pub guest_password: Secret<String>,
}

impl Default for Settings {
    /// What the public images are made with.
    fn default() -> Self {
        Self {
            program: PathBuf::from("tart"),
            home: PathBuf::new(),
            host_dir: PathBuf::from(HOST_DIR),
            shape: Shape::default(),
            unfiltered: false,
            guest_user: "admin".to_owned(),
            guest_password: Secret::new("admin".to_owned()),
        }
    }
}

/// What the provider needs to know of its host.
pub struct Setup {
    pub settings: Settings,
    pub state_dir: PathBuf,
    /// The binary that has [`crate::guard::SUBCOMMAND`].
    pub guard: PathBuf,
    pub env: Arc<dyn Env>,
    /// When guards must kill by themselves.
    pub fence: watch::Receiver<Mono>,
    pub boot_ms: u64,
    /// A guest that answers by SSH this long, and not by its agent, has none.
    pub agent_grace_ms: u64,
    /// A download without any progress for this long is broken off.
    pub pull_stall_ms: u64,
}

pub struct TartHost {
    setup: Setup,
    tart: Tart,
    version: Version,
    /// One clone, setting or start at a time.
    making: tokio::sync::Mutex<()>,
    /// One download at a time: `tart` would let a second one wait in silence.
    pulling: tokio::sync::Mutex<()>,
    /// What broke off and may be resumed.
    unfinished: Unfinished,
    live: Mutex<HashMap<VmName, Arc<Vm>>>,
    /// What a digest is called here.
    names: Mutex<HashMap<Digest, String>>,
    login: Login,
    _only_one: crate::lock::Held,
}

impl TartHost {
    /// Looks whether `tart` is here and is one that is known, and makes sure that no other worker uses its VMs.
    pub async fn open(setup: Setup) -> Result<Self, VmError> {
        let Settings { program, home, guest_user, guest_password, .. } = setup.settings.clone();
        let unfinished = Unfinished::open(&home, setup.env.now().mono);
        let tart = Tart::new(program, home);
        let out = tart
            .must(&["--version"], QUICK)
            .await?
            .map_err(|failed| host(&format!("tart --version: {}", failed.says)))?;
        let version = parse_version(&out).ok_or_else(|| host(&format!("`{}` is no version of tart", out.trim())))?;
        if version < OLDEST {
            return Err(host(&format!("tart {} is too old: {}.{} or newer is needed", out.trim(), OLDEST.0, OLDEST.1)));
        }
        let only_one = claim(tart.home.clone()).await?;
        let login = Login { user: guest_user, password: guest_password };
        Ok(Self {
            setup,
            tart,
            version,
            making: tokio::sync::Mutex::default(),
            pulling: tokio::sync::Mutex::default(),
            unfinished,
            live: Mutex::default(),
            names: Mutex::default(),
            login,
            _only_one: only_one,
        })
    }

    fn vm_home(&self, vm: &VmName) -> PathBuf {
        self.tart.home.join("vms").join(vm.as_str())
    }

    fn live(&self) -> std::sync::MutexGuard<'_, HashMap<VmName, Arc<Vm>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn listed(&self) -> Result<Vec<says::Listed>, VmError> {
        let mut last = String::new();
        // A VM that goes while it is listed makes the whole call fail.
        for _ in 0..3 {
            match self.tart.must(&["list", "--format", "json"], QUICK).await? {
                Ok(out) => match parse_list(&out) {
                    Ok(listed) => return Ok(listed),
                    Err(why) => last = why,
                },
                Err(failed) => last = failed.says,
            }
        }
        Err(VmError::farm(VmFault::Lost, format!("tart list: {last}")))
    }

    fn vm_home_of(&self, name: &str) -> PathBuf {
        self.tart.home.join("vms").join(name)
    }

    async fn clone_vm(&self, vm: &VmName, image: &str) -> Result<(), VmError> {
        let mut tried = false;
        loop {
            let failed = match self.tart.must(&["clone", image, vm.as_str()], CLONE).await? {
                Ok(_) => return Ok(()),
                Err(failed) => failed,
            };
            match failed.trouble {
                // The collector of another `tart` may take a new clone's directory away.
                Trouble::Race if !tried => tried = true,
                Trouble::Config if !tried => {
                    self.remove_broken().await?;
                    tried = true;
                }
                _ => return Err(vm_error(VmFault::Start, "clone", &failed)),
            }
        }
    }

    /// Removes VMs of ours whose settings cannot be read, because one such stops every clone. A stranger's is named.
    async fn remove_broken(&self) -> Result<(), VmError> {
        for name in locks::broken(&self.tart.home.join("vms")) {
            if VmName::parse(&name).is_err() {
                let config = self.vm_home_of(&name).join("config.json");
                return Err(host(&format!(
                    "{} cannot be read, which stops every clone; delete that VM",
                    config.display()
                )));
            }
            let _judged_by_the_clone = self.tart.run(&["delete", &name], QUICK).await?;
        }
        Ok(())
    }

    /// Stops a VM that runs, whoever started it. It is killed at once where a download keeps `tart` from being asked.
    async fn stop(&self, vm: &VmName) {
        let ended = self.tart.run_now(&["stop", "--timeout", "5", vm.as_str()], STOP).await;
        tracing::debug!(vm.id = %vm, ?ended, "stop");
        if let Some(pid) = locks::holder(&self.vm_home(vm).join("config.json")) {
            let _gone = kill(pid, Signal::SIGKILL);
        }
    }

    async fn delete(&self, vm: &VmName) -> Result<(), VmError> {
        let mut last = String::new();
        for _ in 0..DELETE_TRIES {
            match self.tart.must(&["delete", vm.as_str()], QUICK).await? {
                Ok(_) => return Ok(()),
                Err(Failed { trouble: Trouble::Missing, .. }) => return Ok(()),
                Err(failed) => last = failed.says,
            }
            self.stop(vm).await;
            self.setup.env.sleep_until(self.setup.env.now().mono + DELETE_PAUSE_MS).await;
        }
        Err(VmError::farm(VmFault::Destroy, format!("tart delete {vm}: {last}")))
    }
}

#[async_trait]
impl VmProvider for TartHost {
    /// What `tart` lists, what lies in its directory and what lies in ours: a half-made VM may be in one of them only.
    async fn list(&self) -> Result<Vec<VmName>, VmError> {
        let mut names = ours(&self.listed().await?);
        for dir in [self.tart.home.join("vms"), self.setup.state_dir.join("vms")] {
            names.extend(locks::entries(&dir).iter().filter_map(|name| VmName::parse(name).ok()));
        }
        names.sort();
        names.dedup();
        Ok(names)
    }

    async fn images(&self) -> Result<Vec<Image>, VmError> {
        self.cache().await
    }

    fn pulls(&self) -> bool {
        true
    }

    async fn find(&self, image: &ImageRef) -> Result<Option<Digest>, VmError> {
        self.cached(image).await
    }

    async fn pull(
        &self,
        image: &ImageRef,
        progress: &watch::Sender<PullProgress>,
        stop: &CancellationToken,
    ) -> Result<Digest, VmError> {
        self.bring(image, progress, stop).await
    }

    async fn remove(&self, image: &Digest) -> Result<(), VmError> {
        self.evict(image).await
    }

    async fn untag(&self, tag: &ImageRef) -> Result<(), VmError> {
        self.delete_name(tag).await
    }

    async fn create(&self, vm: &VmName, image: &Digest, shape: &Shape) -> Result<(), VmError> {
        let name = self.names.lock().unwrap_or_else(PoisonError::into_inner).get(image).cloned();
        let name = name.ok_or_else(|| VmError::farm(VmFault::NoImage, format!("no image {image} was asked for")))?;
        let dirs = locks::make_private(&vm_dir(&self.setup.state_dir, vm));
        dirs.map_err(|error| VmError::io(VmFault::Start, "make the VM's directory", &error))?;
        let _one = self.making.lock().await;
        let exact = if is_remote(&name) { format!("{}@sha256:{image}", repository(&name)) } else { name };
        self.clone_vm(vm, &exact).await?;
        let own = &self.setup.settings.shape;
        let text = |n: Option<u32>| n.map(|n| n.to_string());
        let (cpus, memory) = (text(shape.cpus.or(own.cpus)), text(shape.memory_mib.or(own.memory_mib)));
        let mut args = vec!["set", vm.as_str(), "--random-mac"];
        args.extend(cpus.iter().flat_map(|n| ["--cpu", n]));
        args.extend(memory.iter().flat_map(|n| ["--memory", n]));
        let set = self.tart.must(&args, QUICK).await?;
        set.map(|_| ()).map_err(|failed| vm_error(VmFault::Start, "set", &failed))
    }

    async fn boot(&self, vm: &VmName, inbox: &Path) -> Result<Arc<dyn Guest>, VmError> {
        let start = self.setup.env.now().mono;
        let machine = self.start(vm, inbox).await?;
        let runs = self.setup.env.now().mono;
        let guest = self.ready(vm, &machine, (start, runs)).await?;
        machine.guest.set(Arc::clone(&guest)).map_err(|_| VmError::farm(VmFault::Start, "the VM was booted twice"))?;
        Ok(guest)
    }

    fn restricts(&self) -> bool {
        !self.setup.settings.unfiltered && self.version >= LIVE_FILTER
    }

    async fn restrict(&self, vm: &VmName, network: &NetworkPolicy) -> Result<(), VmError> {
        let machine = self.live().get(vm).cloned();
        let machine = machine.ok_or_else(|| VmError::farm(VmFault::Lost, format!("{vm} is gone")))?;
        self.hand_over(vm, &machine, network).await
    }

    async fn destroy(&self, vm: &VmName) -> Result<(), VmError> {
        // It stays among the live ones until it is gone: whoever is not waited for is asked again.
        let machine = self.live().get(vm).cloned();
        if let Some(machine) = machine {
            self.stop(vm).await;
            machine.end().await;
            self.live().remove(vm);
        }
        // A clone that was given up may still bring the VM into being.
        self.tart.settled().await;
        self.delete(vm).await?;
        if ours(&self.listed().await?).contains(vm) {
            return Err(VmError::farm(VmFault::Destroy, format!("{vm} was deleted and is still listed")));
        }
        // A VM without settings is none to `tart`, which leaves its disk behind.
        for dir in [self.vm_home(vm), vm_dir(&self.setup.state_dir, vm)] {
            locks::remove(&dir).map_err(|error| VmError::io(VmFault::Destroy, "remove the VM's directory", &error))?;
        }
        Ok(())
    }
}

/// It may wait for a lock that is about to be left.
async fn claim(home: PathBuf) -> Result<crate::lock::Held, VmError> {
    let why = format!("{} cannot be locked", home.display());
    let claimed = tokio::task::spawn_blocking(move || {
        locks::claim(&home).map_err(|error| host(&format!("{}: {error}", home.display())))
    });
    claimed.await.map_err(|_| host(&why))?
}

fn host(why: &str) -> VmError {
    VmError { retry: false, ..VmError::farm(VmFault::Host, why) }
}

/// What went wrong, in the words of the pool.
fn vm_error(what: VmFault, doing: &str, failed: &Failed) -> VmError {
    let tail = format!("tart {doing}: {}", failed.says);
    match failed.trouble {
        Trouble::DiskFull => VmError::farm(VmFault::Disk, tail),
        Trouble::Missing if doing != "run" => VmError::farm(VmFault::NoImage, tail),
        // Another host may be newer.
        Trouble::HostTooOld => VmError::farm(VmFault::NoImage, tail),
        Trouble::Limit | Trouble::Locked => VmError::farm(VmFault::Full, tail),
        Trouble::Refused => VmError { retry: false, ..VmError::policy(VmFault::NoImage, tail) },
        trouble if trouble.is_of_the_host() => VmError::farm(VmFault::Host, tail),
        _ => VmError::farm(what, tail),
    }
}
