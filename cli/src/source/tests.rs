use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};

use super::*;

struct Tree(tempfile::TempDir);

impl Tree {
    fn new(files: &[(&str, &str)]) -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        for (name, text) in files {
            tree.write(name, text);
        }
        tree
    }
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
    fn write(&self, name: &str, text: &str) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), text).unwrap();
    }
    fn scan(&self) -> Result<Scan, Failure> {
        scan(self.0.path(), false)
    }
    fn names(&self) -> Vec<String> {
        let scan = self.scan().unwrap();
        scan.manifest.entries().iter().map(|entry| entry.path.clone()).collect()
    }
}

#[test]
fn ignore_rules_count_and_hidden_files_go() {
    let tree = Tree::new(&[
        (".gitignore", "target/\n*.log\n"),
        (".alloyignore", "!keep.log\nlarge/\n"),
        (".hidden/x", "1"),
        ("src/main.c", "1"),
        ("src/.gitignore", "gen.c\n"),
        ("src/gen.c", "1"),
        ("target/out", "1"),
        ("a.log", "1"),
        ("keep.log", "1"),
        ("large/film", "1"),
        (".git/config", "1"),
        ("sub/.git", "gitdir: elsewhere"),
        ("alloy-out/job_1/x", "1"),
        (".DS_Store", "1"),
        (".ignore", "src/\n"),
    ]);
    assert_eq!(
        tree.names(),
        [".alloyignore", ".gitignore", ".hidden/x", ".ignore", "keep.log", "src/.gitignore", "src/main.c", "sub"]
    );
}

#[test]
fn rules_above_the_root_count_within_a_repository_only() {
    let tree = Tree::new(&[(".gitignore", "*\n"), ("app/main.c", "1")]);
    let below = |tree: &Tree| scan(&tree.path("app"), false).unwrap().files();
    assert_eq!(below(&tree), 1);
    fs::create_dir(tree.path(".git")).unwrap();
    assert_eq!(below(&tree), 0);
    let warnings = scan(&tree.path("app"), false).unwrap().warnings;
    assert!(warnings.iter().any(|warning| warning.contains("nothing is sent")), "{warnings:?}");
}

#[test]
fn rules_above_a_repository_do_not_count_and_those_between_its_top_and_the_root_do() {
    let tree = Tree::new(&[
        (".gitignore", "*\n"),
        ("repo/.git/config", "1"),
        ("repo/.gitignore", "/apps/one/gen/\n*.log\n"),
        ("repo/apps/.gitignore", "!keep.log\n/one/local\n"),
        ("repo/apps/one/main.c", "1"),
        ("repo/apps/one/a.log", "1"),
        ("repo/apps/one/keep.log", "1"),
        ("repo/apps/one/local", "1"),
        ("repo/apps/one/gen/x", "1"),
        ("repo/apps/one/deep/gen/x", "1"),
        ("repo/apps/two/main.c", "1"),
        ("repo/top.c", "1"),
    ]);
    let names = |dir: &str| -> Vec<String> {
        let scan = scan(&tree.path(dir), false).unwrap();
        assert_eq!(scan.warnings, [""; 0]);
        scan.manifest.entries().iter().map(|entry| entry.path.clone()).collect()
    };
    assert_eq!(names("repo/apps/one"), ["deep/gen/x", "keep.log", "main.c"]);
    assert_eq!(names("repo/apps/two"), ["main.c"]);
    assert_eq!(names("repo").len(), 7);
}

#[test]
fn links_modes_and_empty_directories_survive() {
    let tree = Tree::new(&[("bin/run", "#!/bin/sh\n"), ("bin/data", "x"), ("empty-file", "")]);
    fs::set_permissions(tree.path("bin/run"), fs::Permissions::from_mode(0o4711)).unwrap();
    fs::create_dir_all(tree.path("a/b/empty")).unwrap();
    symlink("../../etc/passwd", tree.path("a/out")).unwrap();
    symlink("bin", tree.path("dirlink")).unwrap();
    let scan = tree.scan().unwrap();
    let shown: Vec<(String, EntryKind, u32, Option<String>)> =
        scan.manifest.entries().iter().map(|e| (e.path.clone(), e.kind, e.mode, e.target.clone())).collect();
    let row = |path: &str, kind, mode, target: Option<&str>| (path.to_owned(), kind, mode, target.map(str::to_owned));
    assert_eq!(
        shown,
        [
            row("a/b/empty", EntryKind::Dir, 0o755, None),
            row("a/out", EntryKind::Symlink, 0o644, Some("../../etc/passwd")),
            row("bin/data", EntryKind::File, 0o644, None),
            row("bin/run", EntryKind::File, 0o755, None),
            row("dirlink", EntryKind::Symlink, 0o644, Some("bin")),
            row("empty-file", EntryKind::File, 0o644, None),
        ]
    );
}

#[test]
fn what_cannot_travel_is_refused_by_name() {
    let tree = Tree::new(&[("fine", "1")]);
    nix::unistd::mkfifo(&tree.path("my-pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let failure = tree.scan().unwrap_err();
    assert!(failure.message.contains("my-pipe is a FIFO"), "{}", failure.message);

    let tree = Tree::new(&[("fine", "1")]);
    let _socket = std::os::unix::net::UnixListener::bind(tree.path("my-socket")).unwrap();
    assert!(tree.scan().unwrap_err().message.contains("my-socket is a socket"));

    let tree = Tree::new(&[("fine", "1")]);
    // macOS refuses to make such a name, which is as good.
    if fs::write(tree.0.path().join(std::ffi::OsStr::from_bytes(b"caf\xe9")), "1").is_ok() {
        let message = tree.scan().unwrap_err().message;
        assert!(message.contains("caf\u{fffd} is a name that is not UTF-8"), "{message}");
    }
}

#[test]
fn every_name_that_cannot_go_is_told_at_once_up_to_twenty() {
    let tree = Tree::new(&[("fine", "1")]);
    let deep: String = (0..limits::PATH_DEPTH_MAX).map(|_| "d/").collect();
    for n in 0..3 {
        nix::unistd::mkfifo(&tree.path(&format!("pipe-{n}")), nix::sys::stat::Mode::S_IRWXU).unwrap();
        tree.write(&format!("{deep}deep-{n}"), "1");
    }
    let message = tree.scan().unwrap_err().message;
    for n in 0..3 {
        assert!(message.contains(&format!("pipe-{n} is a FIFO")), "{message}");
    }
    assert_eq!(message.matches("cannot go: the path is deeper than 64 directories").count(), 3, "{message}");
    let tree = Tree::new(&[("fine", "1")]);
    for n in 10..35 {
        nix::unistd::mkfifo(&tree.path(&format!("pipe-{n}")), nix::sys::stat::Mode::S_IRWXU).unwrap();
    }
    let message = tree.scan().unwrap_err().message;
    assert!(message.contains("pipe-29") && !message.contains("pipe-30"), "{message}");
    assert!(message.ends_with("and 5 files more"), "{message}");
}

#[test]
fn secrets_stay_at_home_unless_allowed() {
    let tree = Tree::new(&[("app/.env", "TOKEN=1"), ("id_rsa", "k"), ("fine", "1")]);
    let failure = tree.scan().unwrap_err();
    assert!(failure.message.contains("app/.env (") && failure.message.contains("id_rsa ("), "{}", failure.message);
    assert!(failure.hint.unwrap().contains("--allow-secret-files"));
    let all = scan(tree.0.path(), true).unwrap();
    assert_eq!((all.files(), all.secrets.keys().map(String::as_str).collect()), (3, vec!["app/.env", "id_rsa"]));
    tree.write(".gitignore", ".env\nid_rsa\n");
    assert_eq!(tree.names(), [".gitignore", "app", "fine"]);

    let tree = Tree::new(&[("notes.txt", "-----BEGIN EC PRIVATE KEY-----\nMHc=\n"), (".npmrc", "//r/:_authToken=x\n")]);
    let failure = tree.scan().unwrap_err();
    for named in ["notes.txt (holds a private key)", ".npmrc (holds a token)"] {
        assert!(failure.message.contains(named), "{}", failure.message);
    }
}

#[test]
fn large_files_are_cut_and_small_ones_are_not() {
    let tree = Tree::new(&[]);
    let large: Vec<u8> = (0..limits::BLOB_MAX as u32 + 5).map(|i| (i >> 3) as u8).collect();
    fs::write(tree.path("large"), &large).unwrap();
    fs::write(tree.path("whole"), &large[..limits::BLOB_MAX]).unwrap();
    let scan = tree.scan().unwrap();
    let [cut, whole] = scan.manifest.entries() else { panic!("two files") };
    let expected: Vec<_> = large.chunks(limits::BLOB_PIECE).map(alloy_shared::id::Digest::of).collect();
    assert_eq!(cut.chunks, expected);
    assert_eq!(whole.chunks, [alloy_shared::id::Digest::of(&large[..limits::BLOB_MAX])]);
}

#[test]
fn a_tree_that_changed_since_it_was_read_is_noticed_and_named() {
    let tree = Tree::new(&[("a", "1"), ("dir/b", "2")]);
    let walked = walk::walk(&tree.0.path().canonicalize().unwrap()).unwrap();
    walk::assert_unchanged(tree.0.path(), &walked.found).unwrap();
    let before = fs::metadata(tree.path("dir/b")).unwrap().modified().unwrap();
    tree.write("dir/b", "3");
    // The same length and the same time of writing: the inode's own clock still tells.
    fs::File::options().write(true).open(tree.path("dir/b")).unwrap().set_modified(before).unwrap();
    let message = walk::assert_unchanged(tree.0.path(), &walked.found).unwrap_err().message;
    assert!(message.contains("dir/b was written to"), "{message}");
    fs::remove_file(tree.path("dir/b")).unwrap();
    let message = walk::assert_unchanged(tree.0.path(), &walked.found).unwrap_err().message;
    assert!(message.contains("dir/b vanished"), "{message}");
}

#[test]
fn names_that_differ_in_case_are_warned_about() {
    let pairs = case_collisions(["README", "src/a", "Readme", "src/A", "other"].into_iter());
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    assert_eq!(pairs, [pair("README", "Readme"), pair("src/A", "src/a")]);
    assert!(case_collisions(["a", "b", "A/b", "A/c"].into_iter()).len() <= 1);
}

#[test]
fn the_digest_does_not_depend_on_the_order_of_reading() {
    let names: Vec<String> = (0..200).map(|n| format!("d{}/f{n}", n % 7)).collect();
    let tree = Tree::new(&names.iter().map(|name| (name.as_str(), name.as_str())).collect::<Vec<_>>());
    let first = tree.scan().unwrap().manifest.digest();
    for _ in 0..5 {
        assert_eq!(tree.scan().unwrap().manifest.digest(), first);
    }
}

#[test]
fn a_tree_that_is_no_directory_is_refused() {
    let tree = Tree::new(&[("file", "1")]);
    assert!(scan(&tree.path("file"), false).is_err());
    assert!(scan(&tree.path("nothing"), false).is_err());
}
