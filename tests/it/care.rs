//! Host care as its user sees it: what the doctor says and mends, what an installation writes and runs.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

use alloy_tests::farm::{Farm, Setup, bin_dir, isolated, output};
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use worker::doctor::Code;

use crate::tidy::scan::root;

fn report(out: &Output) -> Result<Value> {
    serde_json::from_slice(&out.stdout).with_context(|| {
        format!(
            "stdout is one object: {}\n{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        )
    })
}

fn finding<'a>(report: &'a Value, code: &str) -> Option<&'a Value> {
    report["findings"].as_array()?.iter().find(|finding| finding["code"] == code)
}

fn doctor(farm: &Farm, args: &[&str]) -> Command {
    let mut doctor = farm.command("worker");
    doctor.arg("doctor").args(["--json", "--provider", "host", "--state-dir"]).arg(farm.worker_dir(0)).args(args);
    doctor
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_doctor_finds_an_open_key_mends_it_and_notices_a_farm_that_is_away() -> Result<()> {
    let mut farm = Farm::orchestrator_only(Setup::default()).await?;
    farm.enrol(0).await?;
    let key = farm.worker_dir(0).join("worker.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644))?;
    let out = output(doctor(&farm, &[])).await?;
    let found = report(&out)?;
    assert_eq!(out.status.code(), Some(1), "{found:#}");
    let open = finding(&found, "file_modes").context("the key")?;
    assert_eq!(
        (open["severity"].as_str(), open["fix"]["automatic"].as_bool()),
        (Some("error"), Some(true)),
        "{open:#}"
    );
    assert_eq!(finding(&found, "orchestrator").context("the farm")?["severity"], "ok", "{found:#}");
    assert_eq!(finding(&found, "identity").context("the worker")?["severity"], "ok");
    assert_eq!(fs::metadata(&key)?.permissions().mode() & 0o777, 0o644, "nothing is mended unasked");
    assert!(found["not_checked"].as_array().is_some_and(|list| list.iter().all(|entry| entry["why"].is_string())));

    let out = output(doctor(&farm, &["--fix"])).await?;
    let found = report(&out)?;
    assert_eq!(finding(&found, "file_modes").context("the key")?["severity"], "ok", "{found:#}");
    let talk = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(talk.contains(&format!("+ chmod go-rwx {}", key.display())), "each command is printed: {talk}");
    assert!(found["applied"].as_array().is_some_and(|list| list.iter().any(|done| done["ok"] == true)), "{found:#}");
    assert_eq!(fs::metadata(&key)?.permissions().mode() & 0o777, 0o600);
    assert_eq!(out.status.code(), Some(i32::from(found["errors"] != 0)));

    farm.kill_orchestrator();
    // By the other name, for a person.
    let mut away = farm.command("alloy");
    away.args(["worker", "doctor", "--provider", "host", "--state-dir"]).arg(farm.worker_dir(0));
    let out = output(away).await?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert_eq!(out.status.code(), Some(1), "{text}");
    let line = text.lines().find(|line| line.starts_with("✗ orchestrator")).context(text.clone())?;
    assert!(line.contains(&farm.address().to_string()), "{line}");
    Ok(())
}

#[test]
fn every_code_of_the_doctor_has_its_row() {
    let page = fs::read_to_string(root().join("docs/OPERATIONS.md")).unwrap();
    for code in Code::ALL {
        assert!(page.contains(&format!("| `{code}` |")), "docs/OPERATIONS.md has no row of `{code}`");
    }
}

/// A place to install into: `systemctl` writes down its arguments.
fn stage(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir.join("bin"))?;
    fs::create_dir_all(dir.join("home"))?;
    let script = format!("#!/bin/sh\necho \"$*\" >>'{}'\n", dir.join("calls").display());
    for name in ["systemctl", "launchctl"] {
        let path = dir.join("bin").join(name);
        fs::write(&path, &script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

fn install(dir: &Path, args: &[&str]) -> Command {
    let mut install = isolated(&bin_dir().join("worker"), dir);
    let path = format!("{}:{}", dir.join("bin").display(), std::env::var("PATH").unwrap_or_default());
    install.env("PATH", path).args(["install", "--provider", "host"]);
    // Root installs for a named user.
    if nix::unistd::Uid::current().is_root() {
        install.args(["--user", "daemon"]);
    }
    install.args(args);
    install
}

#[tokio::test]
async fn an_installation_is_shown_before_it_is_made() -> Result<()> {
    let dir = tempfile::tempdir()?;
    stage(dir.path())?;
    let state = dir.path().join("my state");
    let mut shown = install(dir.path(), &["--dry-run", "--service", "alloy-test-only", "--state-dir"]);
    shown.arg(&state);
    let out = output(shown).await?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{text}{}", String::from_utf8_lossy(&out.stderr));
    assert!(text.contains(&state.display().to_string()) && text.contains("alloy-test-only"), "{text}");
    assert!(!dir.path().join("calls").exists() && !state.exists(), "nothing is done");
    assert_eq!(fs::read_dir(dir.path().join("home"))?.count(), 0, "nothing is written");
    verify_unit(dir.path(), &text)?;
    let out = output(install(dir.path(), &["--service", "../x"])).await?;
    assert_eq!(out.status.code(), Some(2), "{}", String::from_utf8_lossy(&out.stderr));
    // A machine that is no worker yet would only fail every ten seconds.
    let mut early = install(dir.path(), &["--service", "alloy-test-only", "--state-dir"]);
    early.arg(&state);
    let out = output(early).await?;
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("worker join"), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(!dir.path().join("calls").exists());
    Ok(())
}

/// Asks systemd, where it is, whether it would take the unit.
fn verify_unit(dir: &Path, shown: &str) -> Result<()> {
    let Some(at) = shown.find("[Unit]") else { return Ok(()) };
    let unit: String =
        shown[at..].lines().filter(|line| !line.starts_with("$ ")).map(|line| format!("{line}\n")).collect();
    let path = dir.join("alloy-test-only.service");
    fs::write(&path, unit)?;
    match Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output() {
        Ok(out) => {
            let said = String::from_utf8_lossy(&out.stderr).into_owned();
            let ours: Vec<&str> = said.lines().filter(|line| line.contains("alloy-test-only")).collect();
            ensure!(ours.is_empty(), "{ours:#?}");
            Ok(())
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_keeps_its_log_in_a_file_of_its_own() -> Result<()> {
    let farm = Farm::orchestrator_only(Setup::default()).await?;
    let log = farm.dir().join("own/worker.log");
    let mut run = farm.command("worker");
    run.args(["run", "--provider", "host", "--state-dir"]).arg(farm.worker_dir(7)).arg("--log-file").arg(&log);
    run.env("ALLOY_LOG", "info");
    // It is no worker of any farm and says so; with its log open first.
    let out = output(run).await?;
    assert!(!out.status.success());
    assert!(log.exists(), "{}", String::from_utf8_lossy(&out.stderr));
    Ok(())
}
