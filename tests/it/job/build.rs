//! Real projects: a C project of 646 files with its own build system, and this repository.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use alloy_tests::farm::{Farm, Provider, Setup, full, output};
use alloy_tests::noise::sha256_of;
use anyhow::{Context as _, Result, bail, ensure};

use crate::tidy::scan::root;

on_every_provider! {
    a_real_c_project_with_uncommitted_edits_builds_and_its_binary_comes_back_and_runs,
    this_repository_builds_itself,
}

/// The unpacked sources that tests/run fetched. Without it: a skip that is told, or a failure in the gate.
fn c_project() -> Result<Option<PathBuf>> {
    let named = std::env::var_os("ALLOY_TEST_C_PROJECT").map(PathBuf::from);
    match named.filter(|path| path.join("programs/Makefile").exists()) {
        Some(path) => Ok(Some(path)),
        None if std::env::var_os("ALLOY_TEST_GATE").is_some() => bail!("no C project in ALLOY_TEST_C_PROJECT"),
        None => {
            eprintln!("SKIPPED: set ALLOY_TEST_C_PROJECT, or use tests/run, which fetches the sources of libzstd");
            Ok(None)
        }
    }
}

fn run(program: &str, args: &[&str], dir: &Path) -> Result<String> {
    let out = Command::new(program).args(args).current_dir(dir).env("GIT_CONFIG_GLOBAL", "/dev/null").output()?;
    ensure!(out.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    Ok(String::from_utf8(out.stdout)?)
}

async fn a_real_c_project_with_uncommitted_edits_builds_and_its_binary_comes_back_and_runs(
    provider: Provider,
) -> Result<()> {
    let Some(project) = c_project()? else { return Ok(()) };
    let farm = Farm::start(Setup { workers: 2, slots: 1, time_scale: 1, ..Setup::default() }.on(provider)).await?;
    let tree = farm.scratch("c")?.join("zstd");
    run("cp", &["-a", project.to_str().context("a plain path")?, tree.to_str().context("a plain path")?], farm.dir())?;
    run("git", &["init", "-q"], &tree)?;
    run("git", &["add", "-A"], &tree)?;
    run("git", &["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "as packaged"], &tree)?;
    let main = tree.join("programs/zstdcli.c");
    let text = fs::read_to_string(&main)?;
    ensure!(text.contains("Yann Collet"), "the sources changed");
    fs::write(&main, text.replace("Yann Collet", "an uncommitted edit"))?;

    let mut build = farm.alloy(&["run", "--artifact", "programs/zstd", "-c"]);
    build.arg("make -j2 -C programs zstd && sha256sum programs/zstd").current_dir(&tree);
    let out = output(build).await?;
    let log = String::from_utf8_lossy(&out.stdout).into_owned();
    ensure!(out.status.success(), "{}\n{log}\n{}", out.status, String::from_utf8_lossy(&out.stderr));
    let there = log.lines().last().and_then(|line| line.split(' ').next()).context("a digest")?;
    let binary = tree.join("alloy-out/latest/programs/zstd");
    assert_eq!(sha256_of(&fs::read(&binary)?), there, "the same bytes on both sides");
    let version = run(binary.to_str().context("a plain path")?, &["-V"], &tree)?;
    assert!(version.contains("an uncommitted edit"), "{version}");
    Ok(())
}

async fn this_repository_builds_itself(provider: Provider) -> Result<()> {
    let farm = Farm::start(Setup { workers: 1, slots: 1, time_scale: 1, ..Setup::default() }.on(provider)).await?;
    let tree = farm.scratch("self")?;
    // What git knows, as it is on disk.
    let copy = format!(
        "git ls-files -z --cached --others --exclude-standard | xargs -0 cp -P --parents -t {}",
        tree.display()
    );
    run("bash", &["-c", &copy], &root())?;
    let home = std::env::var("HOME")?;
    let place = |name: &str, below: &str| {
        let path = std::env::var(name).unwrap_or_else(|_| format!("{home}/{below}"));
        format!("{name}={path}")
    };
    let (cargo, rustup) = (place("CARGO_HOME", ".cargo"), place("RUSTUP_HOME", ".rustup"));
    let path = format!("PATH={}", std::env::var("PATH")?);
    // The gate asks whether the tree arrives as a workspace that resolves; the full run builds it.
    let cargo_does = if full() { "build --offline -p alloy-shared" } else { "metadata --offline --no-deps >/dev/null" };
    // A login shell, which is what a Mac's guest has, makes its own PATH.
    let command = &format!("export PATH=\"$CARGO_HOME/bin:$PATH\"; cargo {cargo_does}");
    let mut build =
        farm.alloy(&["run", "--env", &cargo, "--env", &rustup, "--env", &path, "--timeout", "20m", "-c", command]);
    build.current_dir(&tree);
    let out = output(build).await?;
    ensure!(
        out.status.success(),
        "{}\n{}\n{}",
        out.status,
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(())
}
