//! D: the script that lists what a guest's workspace holds, and what its answer means.
//!
//! The answer is records that end with a NUL, which no path can hold: kind, size, mode and path of each, and after a link a
//! record with its target. Everything in it is a stranger's word.

use std::collections::HashSet;

use alloy_shared::id::printable;
use alloy_shared::limits;

use super::script::quote;
use crate::artifacts::Matcher;
use crate::provider::{GuestFile, Listing, Misfit, Room, VmError, VmFault};

/// A step that succeeds for a path `./…` without a link above its last part.
pub(super) const INSIDE: &str = r#"inside() {
at=.
rest=${1#./}
while :; do
case $rest in */*) ;; *) return 0 ;; esac
at=$at/${rest%%/*}
rest=${rest#*/}
if [ -L "$at" ]; then return 1; fi
done
}
"#;

/// A step that succeeds for a path `./…` if a directory above its last part lets nobody through: that one is `$at` then.
const CLOSED: &str = r#"closed() {
at=.
rest=${1#./}
while :; do
if [ -d "$at" ] && [ ! -x "$at" ]; then return 0; fi
case $rest in */*) ;; *) return 1 ;; esac
at=$at/${rest%%/*}
rest=${rest#*/}
done
}
"#;

/// Lists what the rules lead to and is no directory, and each directory that lets nobody in or through, or is deeper than any
/// path may be: nobody looks into that. The `stat` of macOS ends what it says with newlines only, so that a name that holds
/// one is asked for by itself.
///
/// The status says whether the list is whole. `find` starts nothing itself, so a status of 1 means no more than that it
/// was not let in somewhere, or that something went while it looked: that is told by records, or no loss.
pub(super) fn script(workspace: &str, matcher: &Matcher) -> String {
    let place = |base: &String| if base.is_empty() { ".".to_owned() } else { quote(&format!("./{base}")) };
    let bases = matcher.bases().iter().map(place).collect::<Vec<_>>().join(" ");
    let workspace = quote(workspace);
    // Of what is longer the system itself would say nothing.
    let long = "./".len() + limits::PATH_MAX;
    let (deep, look) = (limits::PATH_DEPTH_MAX, limits::PATH_DEPTH_MAX + 1);
    format!(
        r#"{INSIDE}{CLOSED}newline='
'
walk() {{
each=$1
shift
ends=$({{ {{ find "$@" -print0 2>/dev/null; echo $? >&3; }} | xargs -0 sh -c "$each" sh >&4 2>/dev/null; echo $? >&3; }} 3>&1)
case $ends in [01]"$newline"0) ;; *) exit 1 ;; esac
}}
exec 4>&1
if ! cd {workspace} 2>/dev/null; then
if [ -d {workspace} ]; then printf 'c 0 0 .\0'; fi
exit 0
fi
set --
for base in {bases}; do
inside "$base" || continue
if closed "$base"; then printf 'c 0 0 %s\0' "$at"; continue; fi
if [ -e "$base" ] || [ -L "$base" ]; then set -- "$@" "$base"; fi
done
[ $# -gt 0 ] || exit 0
walk 'for odd do
if [ ${{#odd}} -gt {long} ]; then kind=c
elif [ -d "$odd" ]; then
kind=c
if [ -r "$odd" ] && [ -x "$odd" ]; then
[ ${{#odd}} -gt {deep} ] || continue
rest=$odd
parts=0
while case $rest in */*) ;; *) false ;; esac; do
rest=${{rest#*/}}
parts=$((parts + 1))
done
[ $parts -gt {deep} ] || continue
fi
elif [ -f "$odd" ]; then
kind=u
if [ -r "$odd" ]; then continue; fi
elif [ -p "$odd" ]; then kind=p
elif [ -S "$odd" ]; then kind=s
elif [ -e "$odd" ]; then kind=d
else continue
fi
printf "%s 0 0 %s\0" "$kind" "$odd"
done
exit 0' "$@" -maxdepth {look} ! -type l ! '(' -type f -perm -444 ')'
if stat --version >/dev/null 2>&1; then
walk '[ $# -eq 0 ] || stat --printf "f %s %a %n\0" "$@"
[ $? -le 1 ]' "$@" -maxdepth {look} -type f
else
walk '[ $# -eq 0 ] || stat -f "f %z %Lp %N" "$@" | LC_ALL=C tr "\n" "\0"' "$@" -maxdepth {look} -type f ! -path "*$newline*"
walk 'for file do said=$(stat -f "%z %Lp" "$file") && printf "f %s %s\0" "$said" "$file"; done
exit 0' "$@" -maxdepth {look} -type f -path "*$newline*"
fi
walk 'for link do to=$(readlink "$link") && printf "l 0 777 %s\0%s\0" "$link" "$to"; done
exit 0' "$@" -maxdepth {look} -type l"#
    )
}

/// One record, before anybody has believed it.
struct Record<'a> {
    kind: u8,
    size: u64,
    mode: u32,
    path: &'a [u8],
}

fn record(bytes: &[u8]) -> Option<Record<'_>> {
    let mut words = bytes.splitn(4, |byte| *byte == b' ');
    let (kind, size, mode, path) = (words.next()?, words.next()?, words.next()?, words.next()?);
    let [kind] = kind else { return None };
    let text = |word| std::str::from_utf8(word).ok();
    Some(Record {
        kind: *kind,
        size: text(size)?.parse().ok()?,
        mode: u32::from_str_radix(text(mode)?, 8).ok()?,
        path: if path == b"." { b"" } else { path.strip_prefix(b"./")? },
    })
}

/// Reads what the guest said, until somebody has `stopped` it: much can be said, and each record is held against all rules.
pub(super) fn parse(said: &[u8], matcher: &Matcher, stopped: impl Fn() -> bool) -> Result<Listing, VmError> {
    let broken = |bytes: &[u8]| {
        let line = printable(&String::from_utf8_lossy(bytes));
        VmError::user(VmFault::File, format!("the guest's list of files cannot be read: {line}"))
    };
    let (mut listing, mut room, mut unreadable) = (Listing::default(), Room::default(), HashSet::new());
    let mut records = said.split_inclusive(|byte| *byte == 0);
    let mut next = || match records.next() {
        Some(bytes) => bytes.strip_suffix(b"\0").map(Some).ok_or_else(|| broken(bytes)),
        None => Ok(None),
    };
    while let Some(bytes) = next()? {
        if stopped() {
            return Err(VmError::farm(VmFault::Lost, "nobody waits for the guest's list of files"));
        }
        let Record { kind, size, mode, path } = record(bytes).ok_or_else(|| broken(bytes))?;
        let (odd, target) = match kind {
            b'f' => (None, None),
            b'l' => (None, Some(next()?.ok_or_else(|| broken(bytes))?)),
            b'p' => (Some(Misfit::Pipe), None),
            b's' => (Some(Misfit::Socket), None),
            b'd' => (Some(Misfit::Device), None),
            b'u' => (Some(Misfit::Unreadable), None),
            b'c' => (Some(Misfit::Closed), None),
            _ => return Err(broken(bytes)),
        };
        if let Some(above) = Misfit::too_deep(path) {
            if matcher.may_take_below(&String::from_utf8_lossy(above)) {
                listing.refuse(above.to_vec(), Misfit::Deep);
            }
            continue;
        }
        let text = String::from_utf8_lossy(path);
        let wanted = if kind == b'c' { matcher.may_take_below(&text) } else { matcher.takes(&text) };
        // What is said of a file that cannot be read comes before its size.
        if !wanted || unreadable.contains(path) {
            continue;
        }
        if kind == b'u' {
            unreadable.insert(path);
        }
        match fit(odd, path, target) {
            Ok((path, link)) => {
                let mode = if mode & 0o111 == 0 { 0o644 } else { 0o755 };
                let size = if link.is_some() { 0 } else { size };
                room.take(&mut listing, GuestFile { path: path.to_owned(), size, mode, link })?;
            }
            Err(why) => listing.refuse(path.to_vec(), why),
        }
    }
    Ok(listing.sorted())
}

/// The path and a link's target as texts, if this can be an artifact.
fn fit<'a>(odd: Option<Misfit>, path: &'a [u8], target: Option<&[u8]>) -> Result<(&'a str, Option<String>), Misfit> {
    if let Some(odd) = odd {
        return Err(odd);
    }
    let path = Misfit::check_path(path)?;
    let target = target.map(|to| Misfit::check_target(to.to_vec())).transpose()?;
    Ok((path, target))
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::process::CommandExt as _;
    use std::path::Path;

    use alloy_shared::wire::job::Blame;
    use nix::fcntl::{OFlag, openat};
    use nix::sys::stat::{Mode, mkdirat};

    use super::*;
    use crate::artifacts::parse as parse_rules;
    use crate::provider::Unfit;
    use crate::provider::listing::shut::{STRANGER, Shut};

    fn rules(texts: &[&str]) -> Matcher {
        let texts: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
        Matcher::new(&parse_rules(&texts).unwrap()).unwrap()
    }

    fn parsed(said: &[u8], matcher: &Matcher) -> Result<Listing, VmError> {
        parse(said, matcher, || false)
    }

    /// What a shell makes of it, with these tools before the system's own.
    fn listed(dir: &Path, texts: &[&str], tools: &Path) -> Listing {
        let matcher = rules(texts);
        let out = shell(dir, &matcher, tools).output().unwrap();
        assert!(out.status.success() && out.stderr.is_empty(), "{out:?}");
        parsed(&out.stdout, &matcher).unwrap()
    }

    fn shell(dir: &Path, matcher: &Matcher, tools: &Path) -> std::process::Command {
        let mut shell = std::process::Command::new("/bin/sh");
        let path = format!("{}:/usr/bin:/bin", tools.display());
        shell.arg("-c").arg(script(dir.to_str().unwrap(), matcher)).env("PATH", path);
        shell
    }

    /// A directory with a program of this name before the system's own.
    fn tool(name: &str, script: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join(name);
        std::fs::write(&program, script).unwrap();
        for path in [dir.path(), &program] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        dir
    }

    /// A directory with a `stat` that takes what the one of macOS takes.
    fn mac_tools() -> tempfile::TempDir {
        let script = r#"#!/bin/sh
[ "$1" = -f ] || exit 1
case $2 in
'f %z %Lp %N') form='f %s %a %n' ;;
'%z %Lp') form='%s %a' ;;
*) exit 2 ;;
esac
shift 2
exec /usr/bin/stat -c "$form" "$@"
"#;
        tool("stat", script)
    }

    #[test]
    fn a_listing_is_what_a_shell_makes_of_a_workspace() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(at("out/deep dir")).unwrap();
        for name in ["out/deep dir/a b.txt", "out/new\nline", "out/skip.o", "other"] {
            std::fs::write(at(name), "12345").unwrap();
        }
        std::os::unix::fs::symlink("deep dir", at("out/link")).unwrap();
        std::os::unix::fs::symlink("out", at("alias")).unwrap();
        nix::unistd::mkfifo(&at("out/pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("out/socket")).unwrap();
        let odd = |name: &[u8]| at("out").join(std::ffi::OsStr::from_bytes(name));
        std::fs::write(odd(b"b\xffd"), "").unwrap();
        std::os::unix::fs::symlink(std::ffi::OsStr::from_bytes(b"\xff"), at("out/to odd")).unwrap();
        let texts = ["out", "!**/*.o", "gone/*", "alias/deep dir/*", "alias/link"];
        let (mac, linux) = (mac_tools(), tempfile::tempdir().unwrap());
        for tools in [mac.path(), linux.path()] {
            let Listing { files, unfit, unfit_more } = listed(dir.path(), &texts, tools);
            let shown: Vec<_> =
                files.iter().map(|file| (file.path.as_str(), file.size, file.mode, file.link.as_deref())).collect();
            let expected = [
                ("out/deep dir/a b.txt", 5, 0o644, None),
                ("out/link", 0, 0o755, Some("deep dir")),
                ("out/new\nline", 5, 0o644, None),
            ];
            assert_eq!(shown, expected);
            let unfit: Vec<_> = unfit.into_iter().map(|unfit| (unfit.shown(), unfit.why)).collect();
            let expected = [
                ("out/b\\xffd", Misfit::Name),
                ("out/pipe", Misfit::Pipe),
                ("out/socket", Misfit::Socket),
                ("out/to odd", Misfit::Target),
            ];
            assert_eq!(unfit, expected.map(|(name, why)| (name.to_owned(), why)));
            assert_eq!(unfit_more, 0);
        }
        assert_eq!(listed(dir.path(), &["gone"], linux.path()), Listing::default());
    }

    #[test]
    fn what_cannot_be_read_is_named_and_the_rest_is_taken() {
        let shut = Shut::new();
        let (mac, linux) = (mac_tools(), tempfile::tempdir().unwrap());
        for tools in [mac.path(), linux.path()] {
            shut.check(|texts| {
                let matcher = rules(texts);
                let mut shell = shell(&shut.work(), &matcher, tools);
                if nix::unistd::Uid::effective().is_root() {
                    shell.uid(STRANGER).gid(STRANGER);
                }
                let out = shell.output().unwrap();
                assert!(out.status.success() && out.stderr.is_empty(), "{out:?}");
                parsed(&out.stdout, &matcher).unwrap()
            });
        }
        let gone = shut.work().join("gone");
        assert_eq!(listed(&gone, &["out"], linux.path()), Listing::default(), "a job may remove all that it has");
    }

    #[test]
    fn what_goes_while_it_is_listed_is_no_loss_and_a_list_that_is_cut_off_is_none() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "b\nc", "kept"] {
            std::fs::write(dir.path().join(name), "12345").unwrap();
        }
        std::os::unix::fs::symlink("kept", dir.path().join("to")).unwrap();
        let goes = tool("find", "#!/bin/sh\n/usr/bin/find \"$@\"\nprintf './gone\\0./gone\\ntoo\\0'\nexit 1\n");
        let mac = mac_tools();
        std::fs::copy(mac.path().join("stat"), goes.path().join("stat")).unwrap();
        for _ in ["macOS", "Linux"] {
            let paths: Vec<_> =
                listed(dir.path(), &["*"], goes.path()).files.into_iter().map(|file| file.path).collect();
            assert_eq!(paths, ["a", "b\nc", "kept", "to"]);
            let _the_next_has_the_systems_own = std::fs::remove_file(goes.path().join("stat"));
        }
        for (name, script) in [
            ("find", "#!/bin/sh\nprintf './a\\0'\nkill -9 $$\n"),
            ("find", "#!/bin/sh\nexit 127\n"),
            ("xargs", "#!/bin/sh\ncat >/dev/null\nkill -9 $$\n"),
            ("stat", "#!/bin/sh\n[ \"$1\" = --version ] || kill -9 $$\n"),
            ("readlink", "#!/bin/sh\nkill -9 $PPID\n"),
        ] {
            let tools = tool(name, script);
            let out = shell(dir.path(), &rules(&["*"]), tools.path()).output().unwrap();
            assert_eq!(out.status.code(), Some(1), "{name}: {out:?}");
        }
    }

    #[test]
    fn directories_without_end_are_named_and_the_rest_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("f"), "x").unwrap();
        // The path of the second ones is longer than an argument of a command can be.
        for name in ["d".to_owned(), "e".repeat(200)] {
            let mut at = std::fs::File::open(dir.path()).unwrap();
            for _ in 0..700 {
                mkdirat(&at, &name[..], Mode::S_IRWXU).unwrap();
                at = openat(&at, &name[..], OFlag::O_DIRECTORY, Mode::empty()).unwrap().into();
            }
            openat(&at, "f", OFlag::O_CREAT, Mode::S_IRWXU).unwrap();
        }
        let (mac, linux) = (mac_tools(), tempfile::tempdir().unwrap());
        for tools in [mac.path(), linux.path()] {
            let Listing { files, unfit, .. } = listed(dir.path(), &["**"], tools);
            assert_eq!(files.iter().map(|file| &file.path[..]).collect::<Vec<_>>(), ["f"]);
            assert_eq!(unfit.into_iter().map(|unfit| unfit.why).collect::<Vec<_>>(), [Misfit::Deep, Misfit::Deep]);
        }
    }

    #[test]
    fn a_guest_that_lies_about_its_files_is_refused() {
        let matcher = rules(&["**"]);
        for lie in [
            "f 5 644 /etc/passwd\0",
            "f -5 644 ./x\0",
            "f 5 999 ./x\0",
            "q 5 644 ./x\0",
            "ff 5 644 ./x\0",
            "f 5\0",
            "l 0 777 ./x\0",
            "f 5 644 ./cut",
            "l 0 777 ./x\0cut",
            "find: ./y: Permission denied\nf 5 644 ./x\0",
            "\0",
        ] {
            assert!(parsed(lie.as_bytes(), &matcher).is_err(), "{lie}");
        }
        let outside = parsed(b"f 5 644 ./../x\0f 5 644 ./ok\0l 0 777 .//y\0z\0", &matcher).unwrap();
        let paths: Vec<_> = outside.files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!((paths, outside.unfit.len()), (vec!["ok"], 2), "nothing that leaves the workspace is asked for");
        let others = parsed(b"f 5 644 ./\xff\0p 0 0 ./pipe\0f 5 644 ./mine\0", &rules(&["mine"])).unwrap();
        assert_eq!((others.files.len(), others.unfit.len()), (1, 0), "nobody wants it");
    }

    #[test]
    fn a_path_without_end_is_named_by_a_directory_and_no_rule_is_asked_about_it() {
        let deepest = ["a"; limits::PATH_DEPTH_MAX].join("/");
        for (texts, named) in [
            (&["**/zz"][..], true),
            (&["a"], true),
            (&["*.txt"], false),
            (&["**/zz", "!a"], false),
            (&["**/zz", "!**/a"], false),
        ] {
            // A rule would be at the second one for hours.
            for levels in [limits::PATH_DEPTH_MAX, 1 << 20] {
                let said = format!("f 1 644 ./{}f\0f 1 644 ./b/zz\0", "a/".repeat(levels));
                let Listing { unfit, .. } = parsed(said.as_bytes(), &rules(texts)).unwrap();
                let deep = Unfit { path: deepest.clone().into_bytes(), why: Misfit::Deep };
                assert_eq!(unfit, if named { vec![deep] } else { vec![] }, "{texts:?} {levels}");
            }
        }
    }

    #[test]
    fn more_bytes_than_a_job_may_leave_are_refused_as_the_users_own() {
        let most = limits::ARTIFACT_BYTES_MAX;
        let fits = format!("f {most} 644 ./a\0f 9 644 ./other\0l {most} 777 ./l\0a\0");
        let files = parsed(fits.as_bytes(), &rules(&["a", "l"])).unwrap().files;
        assert_eq!(files.iter().map(|file| file.size).collect::<Vec<_>>(), [most, 0], "a link has no bytes");
        for said in [format!("f {} 644 ./a\0", most + 1), format!("f {most} 644 ./a\0f {} 644 ./b\0", u64::MAX)] {
            let error = parsed(said.as_bytes(), &rules(&["*"])).unwrap_err();
            assert_eq!((error.what, error.blame, error.retry), (VmFault::File, Blame::User, false));
            assert!(error.tail.contains("more than 17179869184 bytes"), "{error}");
        }
    }

    #[test]
    fn a_link_leads_no_further_than_the_farm_takes() {
        let to = "t".repeat(limits::PATH_MAX);
        let said = format!("l 0 777 ./far\0{to}t\0l 0 777 ./near\0{to}\0");
        let Listing { files, unfit, .. } = parsed(said.as_bytes(), &rules(&["*"])).unwrap();
        assert_eq!(
            files.iter().map(|file| (&file.path[..], file.link.as_ref())).collect::<Vec<_>>(),
            [("near", Some(&to))]
        );
        assert_eq!(unfit, [Unfit { path: b"far".to_vec(), why: Misfit::LongTarget }]);
    }

    #[test]
    fn a_list_that_nobody_waits_for_is_not_read_to_its_end() {
        let left = std::cell::Cell::new(3);
        let stopped = || left.replace(left.get() - 1) == 0;
        assert!(parse(&b"f 1 644 ./x\0".repeat(1000), &rules(&["**"]), stopped).is_err());
    }
}
