//! S: where the working tree stands, as git says it. A record for people: without git, or when it is slow, there is none.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use alloy_shared::wire::job::GitInfo;
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;

/// A tree too large for git to look through in this time goes without the record.
const GIT_DEADLINE: Duration = Duration::from_secs(2);
/// The head of the answer says everything; whether a second file changed does not matter.
const ANSWER_MAX: u64 = 64 << 10;

pub(crate) async fn record(root: &Path) -> Option<GitInfo> {
    if !in_repository(root) {
        return None;
    }
    tokio::time::timeout(GIT_DEADLINE, ask(root)).await.ok().flatten()
}

/// Files that git keeps although a rule ignores them. Where the rules leave them out, the farm gets another tree than git has.
pub(crate) async fn tracked_but_ignored(root: &Path) -> Vec<String> {
    if !in_repository(root) {
        return Vec::new();
    }
    let list = git(root, &["ls-files", "-ci", "--exclude-standard", "-z", "--", "."]);
    let Ok(Some(answer)) = tokio::time::timeout(GIT_DEADLINE, list).await else { return Vec::new() };
    let names = answer.split_inclusive(|byte| *byte == 0).filter_map(|name| name.strip_suffix(b"\0"));
    names.filter_map(|name| String::from_utf8(name.to_vec()).ok()).collect()
}

/// Whether git would find a repository: a look at some names costs less than its start.
fn in_repository(root: &Path) -> bool {
    let told = std::env::var_os("GIT_DIR").is_some();
    told || root.canonicalize().is_ok_and(|root| root.ancestors().any(|dir| dir.join(".git").exists()))
}

async fn ask(root: &Path) -> Option<GitInfo> {
    parse(&git(root, &["status", "--porcelain=v2", "--branch", "-z", "--", "."]).await?)
}

/// The head of what git answers.
async fn git(root: &Path, args: &[&str]) -> Option<Vec<u8>> {
    let mut child = Command::new("git")
        // A file system monitor is a program that the repository names; a record is no reason to start it.
        .args(["-c", "core.fsmonitor=false"])
        .args(args)
        .current_dir(root)
        .env("GIT_OPTIONAL_LOCKS", "0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .ok()?;
    let mut answer = Vec::new();
    child.stdout.take()?.take(ANSWER_MAX).read_to_end(&mut answer).await.ok()?;
    Some(answer)
}

/// Reads `git status --porcelain=v2 --branch -z`.
fn parse(answer: &[u8]) -> Option<GitInfo> {
    let mut info = GitInfo::default();
    for record in answer.split(|byte| *byte == 0) {
        let Ok(text) = std::str::from_utf8(record) else {
            // Only file names can be that; a file that is listed has changed.
            info.dirty = true;
            continue;
        };
        match text.strip_prefix("# ").map(|rest| rest.split_once(' ').unwrap_or((rest, ""))) {
            Some(("branch.oid", "(initial)")) => {}
            Some(("branch.oid", oid)) => info.commit = oid.to_owned(),
            Some(("branch.head", "(detached)")) => {}
            Some(("branch.head", name)) => info.branch = Some(name.to_owned()),
            Some(_) => {}
            None => info.dirty |= !text.is_empty(),
        }
    }
    (!info.commit.is_empty()).then_some(info)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn tracked_files_that_a_rule_ignores_are_found() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(".gitignore"), "*.log\n").unwrap();
        for name in ["kept.log", "loose.log", "main.c"] {
            std::fs::write(dir.path().join(name), "1").unwrap();
        }
        git(dir.path(), &["init", "-q"]).await.unwrap();
        git(dir.path(), &["add", "-f", "kept.log", "main.c"]).await.unwrap();
        assert_eq!(tracked_but_ignored(dir.path()).await, ["kept.log"]);
        let scan = super::super::scan(dir.path(), false).unwrap();
        let warning = scan.left_out(vec!["kept.log".into(), "main.c".into()]).unwrap();
        assert!(warning.contains("kept.log") && !warning.contains("main.c"), "{warning}");
        assert_eq!(scan.left_out(vec!["main.c".into()]), None);
    }

    #[tokio::test]
    async fn a_record_is_found_from_below_the_repository_and_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("a/b");
        std::fs::create_dir_all(&below).unwrap();
        assert!(!in_repository(&below));
        git(dir.path(), &["init", "-q"]).await.unwrap();
        std::fs::write(below.join("f"), "1").unwrap();
        git(dir.path(), &["add", "."]).await.unwrap();
        let who = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "1"];
        git(dir.path(), &who).await.unwrap();
        assert_eq!(record(&below).await.map(|info| info.dirty), Some(false));
    }

    #[test]
    fn the_answer_of_git_becomes_a_record() {
        let head = b"# branch.oid 0123abcd\0# branch.head main\0# branch.upstream origin/main\0# branch.ab +1 -0\0";
        let clean = GitInfo { commit: "0123abcd".into(), branch: Some("main".into()), dirty: false };
        assert_eq!(parse(head), Some(clean.clone()));
        let dirty = [&head[..], b"? new \xff file\0"].concat();
        assert_eq!(parse(&dirty), Some(GitInfo { dirty: true, ..clean }));
        assert_eq!(parse(b"# branch.oid 01\0# branch.head (detached)\0").unwrap().branch, None);
        assert_eq!(parse(b"# branch.oid (initial)\0# branch.head main\0"), None);
        assert_eq!(parse(b""), None);
    }
}
