use nix::unistd::{Gid, Uid};

use super::super::tests::rules;
use super::*;
use crate::provider::listing::shut::{STRANGER, Shut};

#[test]
fn what_lies_too_deep_is_named_by_a_directory_and_not_looked_into() {
    let dir = tempfile::tempdir().unwrap();
    let deepest = ["d"; limits::PATH_DEPTH_MAX].join("/");
    let below = dir.path().join(&deepest).join("e/e/e");
    std::fs::create_dir_all(&below).unwrap();
    for place in [dir.path(), &dir.path().join(&deepest), &below] {
        std::fs::write(place.join("f"), "x").unwrap();
    }
    let list = |texts: &[&str]| {
        // The directories of the way, and what lies in the first and the last of them.
        let most = limits::PATH_DEPTH_MAX + 3;
        let matcher = Matcher::new(&rules(texts)).unwrap();
        let Listing { files, unfit, .. } = list_up_to(dir.path(), &matcher, most, &CancellationToken::new()).unwrap();
        let unfit: Vec<_> =
            unfit.into_iter().map(|unfit| (String::from_utf8(unfit.path).unwrap(), unfit.why)).collect();
        (files.into_iter().map(|file| file.path).collect::<Vec<_>>(), unfit)
    };
    let deep = vec![(deepest, Misfit::Deep)];
    assert_eq!(list(&["**/f"]), (vec!["f".to_owned()], deep.clone()));
    assert_eq!(list(&["d"]), (vec![], deep));
    assert_eq!(list(&["f*"]), (vec!["f".to_owned()], vec![]), "what no rule leads to is no loss");
}

#[test]
fn a_workspace_with_too_many_entries_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a/1", "a/2", "b/3"] {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "x").unwrap();
    }
    let stop = CancellationToken::new();
    let list = |texts: &[&str], most| list_up_to(dir.path(), &Matcher::new(&rules(texts)).unwrap(), most, &stop);
    assert_eq!(list(&["**/*"], 5).unwrap().files.len(), 3);
    let error = list(&["**/*"], 4).unwrap_err();
    assert!(error.tail.contains("more than 4 entries"), "{error}");
    assert_eq!(list(&["**/*", "!a"], 4).unwrap().files.len(), 1, "what is excluded is not looked into");
    stop.cancel();
    assert!(list(&["**/*"], 5).is_err(), "nobody waits for it");
}

const STRANGER_RUNS: &str = "ALLOY_TEST_STRANGER_RUNS";

/// Not a test by itself: a worker that is not root, whoever runs the tests.
#[test]
fn stranger_process() {
    if std::env::var_os(STRANGER_RUNS).is_none() {
        return;
    }
    if Uid::effective().is_root() {
        nix::unistd::setgid(Gid::from_raw(STRANGER)).unwrap();
        nix::unistd::setuid(Uid::from_raw(STRANGER)).unwrap();
    }
    let shut = Shut::new();
    let list = |texts: &[&str]| {
        let matcher = Matcher::new(&rules(texts)).unwrap();
        list(&shut.work(), &matcher, &CancellationToken::new()).unwrap()
    };
    shut.check(list);
    std::fs::rename(shut.work(), shut.work().with_extension("gone")).unwrap();
    assert_eq!(list(&["out"]), Listing::default(), "a job may remove all that it has");
    std::fs::rename(shut.work().with_extension("gone"), shut.work()).unwrap();
}

#[test]
fn what_cannot_be_read_is_named_and_the_rest_is_taken() {
    let stranger = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "provider::host::files::tests::stranger_process"])
        .env(STRANGER_RUNS, "")
        .output()
        .unwrap();
    assert!(stranger.status.success(), "{stranger:?}");
}
