use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::Pid;

use super::*;

const RECORD: &str = "ALLOY_TEST_GUARD_RECORD";

/// Writes a program into `dir` that is a guard: this test binary, running only [`guard_process`].
pub(crate) fn guard_program(dir: &Path) -> PathBuf {
    let path = dir.join("guard");
    let own = std::env::current_exe().unwrap();
    let own = own.display();
    let script = format!(
        "#!/bin/sh\n{RECORD}=\"$2\" exec '{own}' --exact guard::tests::guard_process --nocapture 3>&1 >/dev/null\n"
    );
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Not a test by itself: the guard that other tests start.
#[test]
fn guard_process() {
    let Some(record) = std::env::var_os(RECORD) else { return };
    // The harness talks on standard output; what the guard says goes to where the script put it.
    let words = std::fs::OpenOptions::new().write(true).open("/dev/fd/3").unwrap();
    nix::unistd::dup2_stdout(&words).unwrap();
    nix::unistd::close(3).unwrap();
    let failed = main([record]) != ExitCode::SUCCESS;
    std::process::exit(i32::from(failed));
}

/// Waits for a fact, for at most half a minute.
pub(crate) fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    for _ in 0..3_000 {
        if let Some(seen) = look() {
            return seen;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("it never came: {what}");
}

pub(crate) fn is_alive(pid: Pid) -> bool {
    tree::started_at(pid).is_some()
}

/// The process number that a command wrote.
pub(crate) fn pid_in(file: &Path) -> Pid {
    eventually("a process number", || {
        let text = std::fs::read_to_string(file).ok()?;
        text.strip_suffix('\n')?.parse().ok().map(Pid::from_raw)
    })
}

#[test]
fn programs_are_looked_up_as_a_shell_does() {
    let dir = tempfile::tempdir().unwrap();
    let make = |name: &str, mode| {
        std::fs::create_dir_all(dir.path().join("bin")).unwrap();
        std::fs::write(dir.path().join(name), "").unwrap();
        std::fs::set_permissions(dir.path().join(name), std::fs::Permissions::from_mode(mode)).unwrap();
    };
    make("bin/run", 0o755);
    make("bin/plain", 0o644);
    make("here", 0o755);
    let path = format!("/nowhere:{}", dir.path().join("bin").display());
    let find = |name: &str| find_program(name, &path, dir.path()).map_err(|(code, _)| code);
    assert_eq!(find("run"), Ok(dir.path().join("bin/run")));
    assert_eq!(find("./here"), Ok(dir.path().join("./here")));
    assert_eq!(find("plain"), Err(126));
    assert_eq!(find("./bin"), Err(126));
    for absent in ["here", "nothing", "", "./nothing"] {
        assert_eq!(find(absent), Err(127), "{absent}");
    }
}

#[test]
fn a_process_is_known_by_its_start_and_an_impostor_is_not_killed() {
    let mut sleeper = Command::new("sleep").arg("60").spawn().unwrap();
    let pid = Pid::from_raw(sleeper.id() as i32);
    let dir = tempfile::tempdir().unwrap();
    let record = dir.path().join("guard-0");
    std::fs::write(&record, format!("command {pid} 1\n")).unwrap();
    assert!(sweep(std::slice::from_ref(&record), "/nowhere", Duration::from_secs(20)));
    assert!(is_alive(pid), "its number was used again by a stranger");
    std::fs::write(&record, format!("guard {pid} {}\n", tree::started_at(pid).unwrap())).unwrap();
    assert!(sweep(&[record], "/nowhere", Duration::from_secs(20)));
    assert!(!is_alive(pid));
    sleeper.wait().unwrap();
}

#[test]
fn only_the_mark_makes_a_process_the_vms() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().to_str().unwrap();
    let start = |key: &str| Command::new("sleep").arg("60").env(key, place).spawn().unwrap();
    let (mut users, mut jobs) = (start("HOME"), start(MARK));
    // A process that is just being started shows no environment yet.
    let environment = format!("/proc/{}/environ", jobs.id());
    while cfg!(target_os = "linux") && std::fs::read(&environment).unwrap().is_empty() {
        std::thread::yield_now();
    }
    assert!(sweep(&[], place, Duration::from_secs(20)));
    let pid = |child: &std::process::Child| Pid::from_raw(child.id() as i32);
    assert_eq!((is_alive(pid(&users)), is_alive(pid(&jobs))), (true, false));
    users.kill().unwrap();
    users.wait().unwrap();
    jobs.wait().unwrap();
}
