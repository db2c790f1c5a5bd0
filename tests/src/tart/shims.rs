//! What a guest has that the machine below it lacks or must not give away: user `admin`, `zsh`, `sudo`, a clock that can be
//! wrong, and the commands that end a machine.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use super::guest::Spec;
use super::isolate;

const OURS: &str = "usr/lib/sim-tart";

/// Shows the time shifted by the seconds in a file; setting it changes the file. The machine's clock is not the guest's to set.
const DATE: &str = r#"#!/bin/sh
real=/usr/lib/sim-tart/date.real
clock=/usr/lib/sim-tart/clock
read -r off < "$clock"
set_to() { echo $(($1 - $($real +%s))) > "$clock"; exit 0; }
utc= format=
for arg; do
  if [ "$format" = wait ]; then format=$arg; continue; fi
  case $arg in
    -s | --set) want=1 ;;
    -s*) set_to "$($real $utc -d "${arg#-s}" +%s)" ;;
    --set=*) set_to "$($real $utc -d "${arg#--set=}" +%s)" ;;
    -f) format=wait ;;
    -u) utc=-u ;;
    -[dr]* | --date* | --reference*) exec $real "$@" ;;
    +* | -*) ;;
    *)
      if [ -n "$want" ]; then set_to "$($real $utc -d "$arg" +%s)"; fi
      if [ "$format" = %s ]; then set_to "$arg"; fi
      sec=${arg#*.}; [ "$sec" = "$arg" ] && sec=0
      d=${arg%.*}
      mm=${d%??????????}; d=${d#$mm}; dd=${d%????????}; d=${d#$dd}; h=${d%??????}; d=${d#$h}; m=${d%????}; y=${d#$m}
      set_to "$($real $utc -d "$y-$mm-$dd $h:$m:$sec" +%s)" ;;
  esac
done
[ "$off" = 0 ] && exec $real "$@"
now=$($real +%s.%N)
exec $real -d "@$((${now%.*} + off)).${now#*.}" "$@"
"#;

const SUDO: &str = r#"#!/bin/sh
while :; do
  case $1 in
    -u | -g | -p | -C | -h | -r | -t) shift 2 ;;
    --) shift; break ;;
    -*) shift ;;
    *=*) export "$1"; shift ;;
    *) break ;;
  esac
done
[ $# -gt 0 ] || exit 0
exec "$@"
"#;

const HALT: &str = "#!/bin/sh\nexec kill -USR1 1\n";
const REBOOT: &str = "#!/bin/sh\nexec kill -USR2 1\n";
const SHUTDOWN: &str = "#!/bin/sh\ncase \" $* \" in *' -r '*) exec kill -USR2 1 ;; *) exec kill -USR1 1 ;; esac\n";
const TIME_SYNC: &str = "#!/bin/sh\necho 0 > /usr/lib/sim-tart/clock\n";
const SW_VERS: &str = "#!/bin/sh\ncase $1 in\n  -productVersion | --productVersion) echo 15.6 ;;\n  *) \
                       printf 'ProductName:\\t\\tmacOS\\nProductVersion:\\t\\t15.6\\nBuildVersion:\\t\\t24G84\\n' ;;\nesac\n";
const SCUTIL: &str =
    "#!/bin/sh\ncase $1:$2 in\n  --set:HostName) exec hostname \"$3\" ;;\n  --get:*) exec hostname ;;\nesac\n";
/// `mount -t virtiofs TAG DIR` of Linux guests ends here.
const MOUNT_VIRTIOFS: &str = "#!/bin/sh\nexec mount --bind \"/.virtiofs/$1\" \"$2\"\n";

/// The password is `admin`.
const SHADOW: &str =
    "$6$simtart$4YEfXsmDv/V86MOwjKcOnBMlMXNcuwh0cnGm1Oun.0YcoNwbVI.PXxN/bVjfn6u7CjBUI9YWICvbQ1BnsKDE//";

pub(crate) const SSHD_CONFIG: &str = "/usr/lib/sim-tart/sshd_config";

/// Writes what is missing into the guest's root. What a boot before has written stays; the clock does not.
pub(crate) fn install(root: &Path, spec: &Spec) -> io::Result<()> {
    let ours = root.join(OURS);
    let first = !ours.exists();
    if first {
        isolate::make_below(root, Path::new(OURS))?;
        accounts(root, spec)?;
        programs(root, spec)?;
        sshd(root, spec)?;
    }
    // Its only real interface is the loopback; this is how it tells its hardware address.
    let card = format!("#!/bin/sh\nprintf 'en0: flags=8863<UP>\\n\\tether %s\\n' '{}'\n", spec.mac);
    script(&root.join("usr/sbin/ifconfig"), &card)?;
    fs::write(ours.join("clock"), format!("{}\n", spec.clock_offset))
}

fn accounts(root: &Path, spec: &Spec) -> io::Result<()> {
    let etc = root.join("etc");
    let shell = if root.join("bin/bash").exists() { "/bin/bash" } else { "/bin/sh" };
    // Its own commands run with all rights that a guest has, so that password-less `sudo` is true of it.
    prepend(&etc.join("passwd"), &format!("admin:x:0:0:admin:{}:{shell}\n", spec.home))?;
    prepend(&etc.join("shadow"), &format!("admin:{SHADOW}:19000:0:99999:7:::\n"))
}

fn prepend(path: &Path, line: &str) -> io::Result<()> {
    let old = fs::read_to_string(path).unwrap_or_default();
    fs::write(path, format!("{line}{old}"))
}

fn programs(root: &Path, spec: &Spec) -> io::Result<()> {
    let bin = root.join("usr/bin");
    if bin.join("date").exists() {
        fs::rename(bin.join("date"), root.join(OURS).join("date.real"))?;
        script(&bin.join("date"), DATE)?;
    }
    for (name, text) in [("halt", HALT), ("poweroff", HALT), ("reboot", REBOOT), ("shutdown", SHUTDOWN)] {
        script(&root.join("usr/sbin").join(name), text)?;
    }
    if !bin.join("sudo").exists() {
        script(&bin.join("sudo"), SUDO)?;
    }
    script(&root.join("usr/sbin/mount.virtiofs"), MOUNT_VIRTIOFS)?;
    if spec.is_darwin() {
        script(&root.join("usr/sbin/mount_virtiofs"), MOUNT_VIRTIOFS)?;
        script(&bin.join("sw_vers"), SW_VERS)?;
        script(&root.join("usr/sbin/scutil"), SCUTIL)?;
        script(&bin.join("sntp"), TIME_SYNC)?;
        if !bin.join("zsh").exists() && bin.join("bash").exists() {
            symlink("bash", bin.join("zsh"))?;
        }
    }
    Ok(())
}

fn script(path: &Path, text: &str) -> io::Result<()> {
    // A program of the machine below may be a link to one that must stay.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

fn sshd(root: &Path, spec: &Spec) -> io::Result<()> {
    let Some(host_key) = &spec.host_key else { return Ok(()) };
    let key = root.join(OURS).join("host_key");
    let config = "HostKey /usr/lib/sim-tart/host_key\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication yes\n\
                  StrictModes no\nUseDNS no\nPidFile none\nSubsystem sftp internal-sftp\n";
    fs::write(root.join(SSHD_CONFIG.trim_start_matches('/')), config)?;
    // The same key in every clone of an image, as with the real ones.
    fs::copy(host_key, &key)?;
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600))
}
