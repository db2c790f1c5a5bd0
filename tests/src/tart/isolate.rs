//! A guest of its own: root, processes, host name, network. Linux has what that takes; elsewhere a guest is a directory.

use std::fs;
use std::path::{Component, Path};
use std::process::Command;

use super::guest::{Share, Spec, kill_descendants};
use super::shims;

/// Where macOS guests see their shares.
const SHARES: &str = "/Volumes/My Shared Files";
/// Where a guest that must mount by tag finds it.
pub(crate) const TAGS: &str = "/.virtiofs";
const AUTOMOUNT: &str = "com.apple.virtio-fs.automount";

#[cfg(target_os = "linux")]
pub(crate) use linux::{
    become_reaper, descendants, die_with_parent, enter, kill_all, new_namespaces, without_dangerous_rights,
};

#[cfg(not(target_os = "linux"))]
pub(crate) use plain::{
    become_reaper, descendants, die_with_parent, enter, kill_all, new_namespaces, without_dangerous_rights,
};

/// Makes the directory that stands for the guest's root where there are no namespaces.
pub(crate) fn lay_out(spec: &Spec) -> std::io::Result<()> {
    let root = spec.root();
    make_below(&spec.dir.join("guest"), Path::new("root"))?;
    make_below(&root, Path::new(&spec.home))?;
    let seeds = spec.dir.join("guest/upper");
    if seeds.exists() && !root.join(".seeded").exists() {
        Command::new("cp").arg("-R").arg(seeds.join(".")).arg(&root).status()?;
        fs::write(root.join(".seeded"), "")?;
    }
    for share in &spec.shares {
        let place = place_of(spec, share);
        make_below(&root, Path::new(&place).parent().unwrap_or(Path::new("/")))?;
        let place = root.join(place.trim_start_matches('/'));
        // What is there belongs to an earlier run: nothing, a link, or an empty directory above named shares.
        let _ = fs::remove_file(&place).or_else(|_| fs::remove_dir(&place));
        std::os::unix::fs::symlink(&share.path, &place)?;
    }
    Ok(())
}

/// Where the share appears.
fn place_of(spec: &Spec, share: &Share) -> String {
    let below = share.name.as_ref().map_or_else(String::new, |name| format!("/{name}"));
    match &share.tag {
        None if spec.is_darwin() => format!("{SHARES}{below}"),
        tag => format!("{TAGS}/{}{below}", tag.as_deref().unwrap_or(AUTOMOUNT)),
    }
}

fn write_all(root: &Path, spec: &Spec) -> std::io::Result<()> {
    make_below(root, Path::new(&spec.home))?;
    shims::install(root, spec)
}

/// Makes a directory of the guest, and none above its root: a guest whose `run` was killed may still be on its way up when
/// its VM is deleted, and must not bring the VM's directory back.
pub(crate) fn make_below(root: &Path, dir: &Path) -> std::io::Result<()> {
    let mut at = root.to_owned();
    for part in dir.components().filter(|part| matches!(part, Component::Normal(_))) {
        at.push(part);
        match fs::create_dir(&at) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && at.is_dir() => {}
            made => made?,
        }
    }
    Ok(())
}

#[cfg(target_os = "linux")]
mod linux {
    use std::fs::{self, File};
    use std::os::fd::AsRawFd as _;
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use anyhow::{Context as _, Result};
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    use nix::sched::{CloneFlags, unshare};
    use nix::sys::prctl;
    use nix::sys::signal::{Signal, kill};
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, send, socket};
    use nix::unistd::Pid;

    use super::{Spec, kill_descendants, make_below, place_of, write_all};

    const NONE: Option<&str> = None;

    pub(crate) fn die_with_parent() {
        // The end of the channel to the host is the second way to notice.
        let _ = prctl::set_pdeathsig(Signal::SIGKILL);
    }

    pub(crate) fn become_reaper() {
        let _ = prctl::set_child_subreaper(true);
    }

    /// The next child is process 1 of a machine of its own.
    pub(crate) fn new_namespaces() -> Result<()> {
        let all = CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWNET;
        unshare(all).context("make namespaces")
    }

    /// Moves this process into the guest's root. Nothing of the host's tree can be reached afterwards.
    pub(crate) fn enter(spec: &Spec) -> Result<()> {
        mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).context("keep mounts to ourselves")?;
        // Relative from here: an overlay's options have no way to spell a comma.
        std::env::set_current_dir(spec.dir.join("guest"))?;
        if let Some(mib) = spec.disk_free_mib {
            fs::create_dir_all("small")?;
            tmpfs(Path::new("small"), &format!("size={mib}m,mode=755"))?;
            copy_seeds()?;
            overlay("small/upper", "small/work")?;
        } else if overlay("upper", "work").is_err() {
            // This file system cannot carry what a guest writes: memory does, and forgets it at the end.
            fs::create_dir_all("small")?;
            tmpfs(Path::new("small"), "mode=755")?;
            copy_seeds()?;
            overlay("small/upper", "small/work")?;
        }
        // From inside: by its path on the host it may be gone already, and the same path lead out of it.
        std::env::set_current_dir("root")?;
        furnish(Path::new("."), spec)?;
        nix::unistd::pivot_root(".", ".").context("pivot_root")?;
        umount2(".", MntFlags::MNT_DETACH).context("leave the host's root")?;
        std::env::set_current_dir("/")?;
        nix::unistd::sethostname(if spec.is_darwin() { "admins-Virtual-Machine" } else { "ubuntu" })?;
        loopback_up()
    }

    fn overlay(upper: &str, work: &str) -> Result<()> {
        for dir in [upper, work, "root"] {
            fs::create_dir_all(dir)?;
        }
        let options = format!("lowerdir=/,upperdir={upper},workdir={work}");
        mount(Some("overlay"), "root", Some("overlay"), MsFlags::empty(), Some(&*options)).context("mount the root")
    }

    fn copy_seeds() -> Result<()> {
        if Path::new("upper").exists() {
            Command::new("cp").args(["-a", "upper", "small/upper"]).status()?;
        }
        Ok(())
    }

    fn tmpfs(at: &Path, options: &str) -> Result<()> {
        let flags = MsFlags::MS_NOSUID;
        mount(Some("tmpfs"), at, Some("tmpfs"), flags, Some(options))
            .with_context(|| format!("tmpfs on {}", at.display()))
    }

    fn furnish(root: &Path, spec: &Spec) -> Result<()> {
        write_all(root, spec)?;
        for (target, kind) in [("proc", "proc"), ("sys", "sysfs")] {
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            let flags = if kind == "sysfs" { flags | MsFlags::MS_RDONLY } else { flags };
            mount(Some(kind), &root.join(target), Some(kind), flags, NONE).with_context(|| kind.to_owned())?;
        }
        devices(&root.join("dev"))?;
        tmpfs(&root.join("tmp"), "mode=1777")?;
        share(root, spec)?;
        // Last: what is hidden may lie above what was mounted from the host, never above what the guest needs.
        for hidden in &spec.hidden {
            let place = root.join(hidden.strip_prefix("/").unwrap_or(hidden));
            // Of the host's temporary files the guest's own hide everything.
            if place.is_dir() && place != root.join("tmp") {
                tmpfs(&place, "mode=755,size=64k")?;
            }
        }
        Ok(())
    }

    /// The devices that a program may expect, and none of the host's disks.
    fn devices(dev: &Path) -> Result<()> {
        tmpfs(dev, "mode=755")?;
        for name in ["null", "zero", "full", "random", "urandom", "tty"] {
            File::create(dev.join(name))?;
            bind(&Path::new("/dev").join(name), &dev.join(name), false)?;
        }
        for (name, target) in [
            ("fd", "/proc/self/fd"),
            ("stdin", "/proc/self/fd/0"),
            ("stdout", "/proc/self/fd/1"),
            ("stderr", "/proc/self/fd/2"),
            ("ptmx", "pts/ptmx"),
        ] {
            symlink(target, dev.join(name))?;
        }
        for name in ["pts", "shm"] {
            fs::create_dir(dev.join(name))?;
        }
        let options = Some("newinstance,ptmxmode=0666,mode=620");
        mount(Some("devpts"), &dev.join("pts"), Some("devpts"), MsFlags::MS_NOSUID, options).context("devpts")?;
        tmpfs(&dev.join("shm"), "mode=1777")
    }

    fn bind(from: &Path, to: &Path, read_only: bool) -> Result<()> {
        let what = || format!("bind {} at {}", from.display(), to.display());
        mount(Some(from), to, NONE, MsFlags::MS_BIND, NONE).with_context(what)?;
        if read_only {
            let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID;
            mount(NONE, to, NONE, flags, NONE).with_context(what)?;
        }
        Ok(())
    }

    fn share(root: &Path, spec: &Spec) -> Result<()> {
        for share in &spec.shares {
            let place = place_of(spec, share);
            make_below(root, Path::new(&place))?;
            let place = root.join(place.trim_start_matches('/'));
            fs::set_permissions(&place, fs::Permissions::from_mode(0o755))?;
            bind(&share.path, &place, share.read_only)?;
        }
        Ok(())
    }

    /// One message to the kernel: interface 1 of a new network namespace is its loopback.
    fn loopback_up() -> Result<()> {
        let route = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
        let (new_link, request, up) = (16_u16, 1_u16, 1_u32);
        let mut message = Vec::with_capacity(32);
        message.extend(32_u32.to_ne_bytes());
        message.extend(new_link.to_ne_bytes());
        message.extend(request.to_ne_bytes());
        message.extend([0; 8]);
        message.extend([0; 4]);
        message.extend(1_u32.to_ne_bytes());
        message.extend(up.to_ne_bytes());
        message.extend(up.to_ne_bytes());
        send(route.as_raw_fd(), &message, MsgFlags::empty())?;
        Ok(())
    }

    /// The agent's command line, without the rights by which a guest could change the host: its clock, its kernel, its disks.
    pub(crate) fn without_dangerous_rights(spec: &Spec) -> Command {
        let setpriv = Path::new("/usr/bin/setpriv");
        if !spec.isolated {
            return Command::new("/proc/self/exe");
        }
        if !setpriv.exists() {
            return Command::new("/proc/1/exe");
        }
        let mut command = Command::new(setpriv);
        command.arg("--bounding-set=-sys_time,-sys_module,-sys_rawio,-sys_boot,-mknod,-syslog");
        command.arg("/proc/1/exe");
        command
    }

    pub(crate) fn kill_all(spec: &Spec) {
        if spec.isolated {
            // Everybody in this namespace but process 1, which is us.
            let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
        } else {
            kill_descendants();
        }
    }

    /// Every process below `root`.
    pub(crate) fn descendants(root: i32) -> Vec<i32> {
        let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
        let parents: Vec<(i32, i32)> = pids
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter_map(|pid: i32| Some((pid, parent_of(&PathBuf::from(format!("/proc/{pid}/stat")))?)))
            .collect();
        let mut found = vec![root];
        let mut at = 0;
        while at < found.len() {
            let parent = found[at];
            found.extend(parents.iter().filter(|(_, above)| *above == parent).map(|(pid, _)| *pid));
            at += 1;
        }
        found.split_off(1)
    }

    /// Nothing for one that has ended and waits to be reaped.
    fn parent_of(stat: &Path) -> Option<i32> {
        let text = fs::read_to_string(stat).ok()?;
        let mut words = text.rsplit_once(") ")?.1.split(' ');
        let state = words.next()?;
        (state != "Z").then(|| words.next()?.parse().ok())?
    }
}

#[cfg(not(target_os = "linux"))]
mod plain {
    use std::process::Command;

    use super::{Spec, kill_descendants};

    pub(crate) fn die_with_parent() {}

    pub(crate) fn become_reaper() {}

    pub(crate) fn new_namespaces() -> anyhow::Result<()> {
        anyhow::bail!("there are no namespaces here")
    }

    pub(crate) fn enter(_: &Spec) -> anyhow::Result<()> {
        anyhow::bail!("there are no namespaces here")
    }

    pub(crate) fn without_dangerous_rights(_: &Spec) -> Command {
        Command::new(std::env::current_exe().expect("a program knows its path"))
    }

    pub(crate) fn kill_all(_: &Spec) {
        kill_descendants();
    }

    pub(crate) fn descendants(root: i32) -> Vec<i32> {
        let Ok(out) = Command::new("ps").args(["-axo", "pid=,ppid="]).output() else { return Vec::new() };
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let pairs: Vec<(i32, i32)> = text
            .lines()
            .filter_map(|line| {
                let mut words = line.split_whitespace().map(str::parse);
                Some((words.next()?.ok()?, words.next()?.ok()?))
            })
            .collect();
        let mut found = vec![root];
        let mut at = 0;
        while at < found.len() {
            let parent = found[at];
            found.extend(pairs.iter().filter(|(_, above)| *above == parent).map(|(pid, _)| *pid));
            at += 1;
        }
        found.split_off(1)
    }
}

#[cfg(test)]
mod tests {
    use super::super::image::Agent;
    use super::*;

    fn spec(dir: &Path) -> Spec {
        let share = Share { tag: None, name: Some("in".into()), path: "/nowhere".into(), read_only: true };
        Spec {
            dir: dir.to_owned(),
            runner: 1,
            os: "darwin".into(),
            mac: "7e:00:00:00:00:00".into(),
            home: "/Users/admin".into(),
            isolated: false,
            agent: Agent::OfTheRelease,
            shares: vec![share],
            hidden: Vec::new(),
            disk_free_mib: None,
            clock_offset: 0,
            host_key: None,
        }
    }

    #[test]
    fn a_guest_of_a_deleted_vm_makes_nothing_above_its_root() {
        let vms = tempfile::tempdir().unwrap();
        let spec = spec(&vms.path().join("vm"));
        assert!(lay_out(&spec).is_err());
        assert!(write_all(&spec.root(), &spec).is_err());
        assert!(make_below(&spec.root(), Path::new("/Users/admin")).is_err());
        assert_eq!(fs::read_dir(vms.path()).unwrap().count(), 0);

        fs::create_dir_all(spec.dir.join("guest")).unwrap();
        lay_out(&spec).unwrap();
        lay_out(&spec).unwrap();
        assert!(spec.root().join("Users/admin").is_dir());
        let place = spec.root().join(place_of(&spec, &spec.shares[0]).trim_start_matches('/'));
        assert_eq!(fs::read_link(place).unwrap(), Path::new("/nowhere"));
    }
}
