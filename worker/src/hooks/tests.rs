use std::fs;
use std::time::Duration;

use alloy_shared::id::JobId;
use alloy_shared::runtime::SystemEnv;

use super::*;
use crate::guard::tests::guard_program;

const AT: AttemptRef = AttemptRef { job: JobId::from_raw(5), attempt: 1 };

struct Rig {
    dir: tempfile::TempDir,
    hooks: Hooks,
}

impl Rig {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("hooks")).unwrap();
        let setup = Setup {
            dir: dir.path().join("hooks"),
            state_dir: dir.path().to_owned(),
            guard: guard_program(dir.path()),
            env: Arc::new(SystemEnv::detached()),
        };
        Self { hooks: Hooks::open(setup).await, dir }
    }

    fn write(&self, hook: Hook, script: &str, mode: u32) {
        let path = self.dir.path().join("hooks").join(hook.name());
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    async fn run(&self, hook: Hook, within_ms: u64) -> Result<(), String> {
        let about = BTreeMap::from([("ALLOY_JOB_ID".to_owned(), AT.job.to_string())]);
        tokio::time::timeout(Duration::from_secs(60), self.hooks.run(hook, AT, about, within_ms)).await.unwrap()
    }
}

#[tokio::test]
async fn a_hook_that_is_not_there_is_none_and_one_that_is_finds_what_it_is_told() {
    let rig = Rig::new().await;
    assert_eq!(rig.run(Hook::PreJob, 60_000).await, Ok(()));
    rig.write(Hook::PreJob, "env | sort > told; pwd >> told; [ ! -t 0 ]", 0o755);
    assert_eq!(rig.run(Hook::PreJob, 60_000).await, Ok(()));
    let told = fs::read_to_string(rig.dir.path().join("hooks/told")).unwrap();
    for line in [format!("ALLOY_JOB_ID={}", AT.job), "ALLOY_HOOK=pre-job".to_owned()] {
        assert!(told.lines().any(|told| told == line), "{line} in {told}");
    }
    assert!(!told.contains("CARGO"), "nothing of the daemon's own: {told}");
    assert_eq!(rig.run(Hook::PostJob, 60_000).await, Ok(()), "each has a file of its own");
}

#[tokio::test]
async fn a_hook_that_fails_says_how() {
    let rig = Rig::new().await;
    for (script, mode, says) in [
        ("exit 3", 0o755, "ended with status 3"),
        ("kill -9 $$", 0o755, "was ended by signal 9"),
        ("true", 0o644, "chmod +x"),
        ("true", 0o775, "chmod go-w"),
    ] {
        rig.write(Hook::PreJob, script, mode);
        let said = rig.run(Hook::PreJob, 60_000).await.unwrap_err();
        assert!(said.contains(says), "{script}: {said}");
    }
    let left = fs::read_dir(rig.dir.path().join(RUNS)).unwrap().count();
    assert_eq!(left, 0, "no mark is left of a hook that has ended");
}

#[tokio::test]
async fn a_late_hook_is_killed_with_all_that_it_started() {
    let rig = Rig::new().await;
    rig.write(Hook::PreJob, "(sleep 600; echo) & echo $! > child; exec sleep 600", 0o755);
    let said = rig.run(Hook::PreJob, 10_000).await.unwrap_err();
    assert!(said.contains("10000 ms"), "{said}");
    let pid = fs::read_to_string(rig.dir.path().join("hooks/child")).unwrap();
    let pid = nix::unistd::Pid::from_raw(pid.trim().parse().unwrap());
    let gone = async {
        while nix::sys::signal::kill(pid, None).is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), gone).await.expect("it is killed");
}

#[test]
fn what_a_hook_says_is_bounded() {
    let mut words = Words { hook: "pre-job", attempt: AT, line: Vec::new(), left: 10, dropped: 0 };
    words.hear(b"abc\nde");
    assert_eq!((words.line.as_slice(), words.left), (&b"de"[..], 4));
    words.hear(b"fghijkl");
    assert_eq!((words.line.as_slice(), words.left, words.dropped), (&b"defghi"[..], 0, 3));
    let mut long = Words { hook: "pre-job", attempt: AT, line: Vec::new(), left: usize::MAX, dropped: 0 };
    long.hear(&vec![b'x'; HOOK_LINE_MAX + 1]);
    assert_eq!(long.line.len(), 1);
}
