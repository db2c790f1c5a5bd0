//! S: looks at this machine: asks its programs and reads its files, and changes nothing.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use alloy_shared::client::{Client, Options};
use alloy_shared::env::{Env, Ms};
use alloy_shared::limits::{HOST_ANSWER_MAX, HOST_ASK_MS};
use nix::sys::resource::{Resource, getrlimit};
use plist::Value;

use crate::config::{Config, Provider};
use crate::doctor::facts::{
    Disk, Fact, Facts, Farm, FarmSeen, FileMode, Identity, Mac, Service, Softnet, System, Tart, count_leases,
    count_vm_processes, parse_file_vault, parse_keychain, parse_power, parse_version,
};
use crate::host::{self, HostError};
use crate::provider::tart::probe;

/// Filters a guest's network; it comes with the VMs' program.
const SOFTNET: &str = "softnet";

/// Where to look. A test looks elsewhere.
pub struct World {
    pub system: System,
    /// Finds programs.
    pub path: OsString,
    /// Stands for `/` in front of the system's own files.
    pub root: PathBuf,
    pub home: PathBuf,
    pub user: String,
    pub uid: u32,
    /// As in `arm64`.
    pub arch: String,
    /// The name of the worker's service.
    pub service: String,
    /// If it is not below the home directory.
    pub tart_home: Option<PathBuf>,
}

/// How a program ended and what it said.
struct Ran {
    /// Absent: it did not end in time.
    status: Option<i32>,
    out: String,
    err: String,
}

impl World {
    fn file(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// The program's own place, links resolved: an installation may be replaced by another behind the link.
    fn find(&self, program: &str) -> Option<PathBuf> {
        let runs = |path: &PathBuf| path.metadata().is_ok_and(|meta| meta.is_file() && meta.mode() & 0o111 != 0);
        std::env::split_paths(&self.path).map(|dir| dir.join(program)).find(runs)
    }

    async fn ask(&self, program: &str, args: &[&str]) -> Fact<Ran> {
        let path = self.find(program).ok_or_else(|| format!("there is no `{program}` on the path"))?;
        self.ask_at(&path, args).await
    }

    async fn ask_at(&self, program: &Path, args: &[impl AsRef<OsStr>]) -> Fact<Ran> {
        let shown = || program.display();
        let mut command = tokio::process::Command::new(program);
        command.args(args).env("PATH", &self.path).env("LC_ALL", "C").envs(probe::VARIABLES);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let ran = tokio::time::timeout(Duration::from_millis(HOST_ASK_MS), command.output()).await;
        let text = |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(HOST_ANSWER_MAX)]).into_owned();
        match ran {
            Ok(Ok(out)) => {
                // A signal's end is an end like any other that says nothing.
                Ok(Ran {
                    status: Some(out.status.code().unwrap_or(-1)),
                    out: text(&out.stdout),
                    err: text(&out.stderr),
                })
            }
            Ok(Err(error)) => Err(format!("{}: {error}", shown())),
            Err(_) => Ok(Ran { status: None, out: String::new(), err: String::new() }),
        }
    }

    /// What a program prints if it succeeds.
    async fn told(&self, program: &str, args: &[&str]) -> Fact<String> {
        self.ask(program, args).await?.told(program)
    }

    /// A value of a property list; absent if there is no such file or key.
    fn preference(&self, path: &Path, key: &str) -> Fact<Option<Value>> {
        match std::fs::File::open(path) {
            Ok(file) => {
                let list = Value::from_reader(std::io::BufReader::new(file));
                let list = list.map_err(|error| format!("{}: {error}", path.display()))?;
                Ok(list.into_dictionary().and_then(|mut keys| keys.remove(key)))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    }
}

impl Ran {
    fn told(self, program: &str) -> Fact<String> {
        match self.status {
            Some(0) => Ok(self.out),
            Some(code) => {
                let why = self.err.trim().lines().next().unwrap_or("no reason given").to_owned();
                Err(format!("`{program}` failed (exit {code}): {why}"))
            }
            None => Err(format!("`{program}` did not answer within {HOST_ASK_MS} ms")),
        }
    }
}

/// Everything that the checks ask for.
pub async fn gather(world: &World, config: &Config, env: Arc<dyn Env>) -> Facts {
    let identity = match host::Identity::load(&config.state_dir) {
        Ok(found) => Identity::Joined { name: found.name, url: found.url },
        Err(HostError::NotJoined { .. }) => Identity::Missing,
        Err(error) => Identity::Damaged(error.to_string()),
    };
    let url = config.url.clone().or(match &identity {
        Identity::Joined { url, .. } => Some(url.clone()),
        Identity::Missing | Identity::Damaged(_) => None,
    });
    let mac = match world.system {
        System::Macos => Some(look_at_mac(world, env.now().wall).await),
        System::Linux | System::Other => None,
    };
    Facts {
        system: world.system,
        provider: config.provider,
        slots: config.slots,
        image: config.image.clone(),
        user: world.user.clone(),
        state_dir: config.state_dir.clone(),
        identity,
        files: modes(world, &config.state_dir),
        disks: disks(world, config),
        farm: match url {
            Some(url) => Some(look_at_farm(url, &env).await),
            None => None,
        },
        clock_kept: clock_kept(world).await,
        tart: tart(world).await,
        softnet: softnet(world).await,
        service: service(world).await,
        open_files: getrlimit(Resource::RLIMIT_NOFILE)
            .map(|(soft, _)| soft)
            .map_err(|error| format!("the limit of open files: {error}")),
        mac,
    }
}

/// The state directory, and what in it is secret or must not be another's.
fn modes(world: &World, state_dir: &Path) -> Vec<FileMode> {
    let private = |path: &PathBuf| path.extension().is_some_and(|end| end == "key") || path.ends_with("identity.json");
    let inside = std::fs::read_dir(state_dir).into_iter().flatten().flatten().map(|entry| entry.path()).filter(private);
    let mut paths: Vec<PathBuf> = inside.collect();
    paths.push(state_dir.to_owned());
    paths.sort();
    let mode = |path: PathBuf| {
        let meta = std::fs::symlink_metadata(&path).ok()?;
        Some(FileMode { path, mode: meta.mode() & 0o7777, ours: meta.uid() == world.uid })
    };
    paths.into_iter().filter_map(mode).collect()
}

fn disks(world: &World, config: &Config) -> Vec<Fact<Disk>> {
    let mut places = vec![(config.state_dir.clone(), false)];
    if config.provider == Provider::Tart {
        let images = world.tart_home.clone().unwrap_or_else(|| world.home.join(".tart"));
        places.push((images, true));
    }
    let look = |(path, images): (PathBuf, bool)| {
        // What does not exist yet will be made on the disk of what does.
        let there = path.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
        let free = host::disk_free(there).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Disk { path, free, images })
    };
    places.into_iter().map(look).collect()
}

async fn look_at_farm(url: String, env: &Arc<dyn Env>) -> Farm {
    let options = Options { url: url.clone(), token: None, agent: crate::upstream::agent() };
    let client = match Client::new(options, Arc::clone(env)) {
        Ok(client) => client,
        Err(error) => return Farm { url, seen: Err(error.sentence()) },
    };
    let before = env.now();
    let asked = tokio::time::timeout(Duration::from_millis(HOST_ASK_MS), client.ready()).await;
    let after = env.now();
    // Its clock was read at some moment between question and answer, and tells whole seconds.
    let skew_ms = |theirs: Ms| before.wall.since(theirs.plus(999)).max(theirs.since(after.wall));
    let seen = match asked {
        Ok(Ok(theirs)) => Ok(FarmSeen { skew_ms: theirs.map(skew_ms), took_ms: after.mono.since(before.mono) }),
        Ok(Err(error)) => Err(error.sentence()),
        Err(_) => Err(format!("{url} does not answer within {HOST_ASK_MS} ms")),
    };
    Farm { url, seen }
}

async fn clock_kept(world: &World) -> Fact<bool> {
    match world.system {
        System::Linux => {
            let told = world.told("timedatectl", &["show", "--property=NTPSynchronized", "--value"]).await?;
            Ok(told.trim() == "yes")
        }
        System::Macos => Err("whether a time service keeps it is told to root only".to_owned()),
        System::Other => Err("not known how to ask this system".to_owned()),
    }
}

async fn tart(world: &World) -> Option<Tart> {
    let path = world.find(probe::PROGRAM)?;
    let version = ask_tart(world, probe::VERSION).await.map(|text| text.trim().to_owned());
    let listed = ask_tart(world, probe::LIST).await.and_then(|text| probe::parse_list(&text));
    Some(Tart { path, version, listed })
}

async fn ask_tart(world: &World, args: &[&str]) -> Fact<String> {
    world.told(probe::PROGRAM, args).await
}

async fn softnet(world: &World) -> Option<Softnet> {
    let path = world.find(SOFTNET)?;
    let real = path.canonicalize().unwrap_or_else(|_| path.clone());
    let set_uid = real.metadata().is_ok_and(|meta| meta.uid() == 0 && meta.mode() & 0o4000 != 0);
    let help = [OsStr::new("-n"), real.as_os_str(), OsStr::new("--help")];
    let by_sudo = match world.find("sudo") {
        Some(sudo) if !set_uid => world.ask_at(&sudo, &help).await.is_ok_and(|ran| ran.status == Some(0)),
        Some(_) | None => false,
    };
    Some(Softnet { path: real, set_uid, by_sudo })
}

async fn service(world: &World) -> Fact<Service> {
    match world.system {
        System::Macos => {
            let target = format!("gui/{}/{}", world.uid, world.service);
            let ran = world.ask("launchctl", &["print", &target]).await?;
            let file = world.home.join(format!("Library/LaunchAgents/{}.plist", world.service));
            Ok(match ran.status {
                Some(0) if ran.out.contains("state = running") => Service::Running,
                Some(0) => Service::Stopped,
                Some(_) | None if file.exists() => Service::Stopped,
                Some(_) | None => Service::Missing,
            })
        }
        System::Linux => {
            let unit = format!("{}.service", world.service);
            let system = world.ask("systemctl", &["is-enabled", &unit]).await?;
            if system.status == Some(0) {
                let active = world.ask("systemctl", &["is-active", &unit]).await?;
                return Ok(if active.status == Some(0) { Service::Running } else { Service::Stopped });
            }
            let user = world.ask("systemctl", &["--user", "is-enabled", &unit]).await?;
            if user.status != Some(0) {
                return Ok(Service::Missing);
            }
            let active = world.ask("systemctl", &["--user", "is-active", &unit]).await?;
            let lingers = world.told("loginctl", &["show-user", &world.user, "--property=Linger", "--value"]).await;
            Ok(match (active.status, lingers) {
                (Some(0), Ok(text)) if text.trim() == "yes" => Service::Running,
                (Some(0), Ok(_) | Err(_)) => Service::RunningUntilLogout,
                (Some(_) | None, _) => Service::Stopped,
            })
        }
        System::Other => Err("not known how to ask this system".to_owned()),
    }
}

async fn look_at_mac(world: &World, now: Ms) -> Mac {
    let settings = |name: &str| world.file(&format!("/Library/Preferences/{name}.plist"));
    let lease = world.preference(&settings("SystemConfiguration/com.apple.InternetSharing.default"), "bootpd");
    let lease = lease.map(|found| {
        let seconds = found.and_then(Value::into_dictionary)?.remove("DHCPLeaseTimeSecs")?;
        seconds.as_unsigned_integer()
    });
    let global = world.home.join("Library/Preferences/.GlobalPreferences.plist");
    let session = format!("gui/{}", world.uid);
    let keychain = world.home.join("Library/Keychains/login.keychain-db");
    Mac {
        version: match world.told("sw_vers", &["-productVersion"]).await {
            Ok(text) => parse_version(&text).ok_or_else(|| format!("`{}` is no version of macOS", text.trim())),
            Err(why) => Err(why),
        },
        arch: world.arch.clone(),
        root: world.uid == 0,
        gui_session: world.ask("launchctl", &["print", &session]).await.map(|ran| ran.status == Some(0)),
        keychain: match world.ask("security", &["show-keychain-info", &keychain.display().to_string()]).await {
            Ok(ran) => parse_keychain(ran.status, &format!("{}{}", ran.out, ran.err)),
            Err(why) => Err(why),
        },
        power: world.told("pmset", &["-g"]).await.map(|text| parse_power(&text)),
        app_nap_off: world.preference(&global, "NSAppSleepDisabled").map(is_true),
        auto_login: world
            .preference(&settings("com.apple.loginwindow"), "autoLoginUser")
            .map(|found| found.and_then(Value::into_string)),
        file_vault: match world.told("fdesetup", &["status"]).await {
            Ok(text) => parse_file_vault(&text),
            Err(why) => Err(why),
        },
        updates_automatic: world
            .preference(&settings("com.apple.SoftwareUpdate"), "AutomaticallyInstallMacOSUpdates")
            .map(is_true),
        dhcp_lease_s: lease,
        dhcp_live: leases(&world.file("/var/db/dhcpd_leases"), now),
        vm_processes: world.told("ps", &["-axo", "comm="]).await.map(|text| count_vm_processes(&text)),
    }
}

/// Preferences hold a truth as a truth or as a number.
fn is_true(value: Option<Value>) -> bool {
    value.is_some_and(|value| value.as_boolean() == Some(true) || value.as_unsigned_integer() == Some(1))
}

fn leases(path: &Path, now: Ms) -> Fact<usize> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(count_leases(&text, u64::try_from(now.0 / 1_000).unwrap_or(0))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

#[cfg(test)]
mod tests;
