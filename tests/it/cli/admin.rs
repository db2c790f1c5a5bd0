//! `alloy admin` on the machine of the farm: what it refuses, and what it leaves behind then.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use alloy_tests::farm::output;
use alloy_tests::observe::until;
use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Alone, text, told};

/// A machine with a farm that has had one job.
async fn lived_in() -> Result<Alone> {
    let alone = Alone::new()?;
    let out = output(alone.alloy(&["run", "--local", "-c", "echo kept"])).await?;
    ensure!(out.status.success(), told(&out));
    Ok(alone)
}

/// A path on the machine, as a word of a command line.
fn on(alone: &Alone, name: &str) -> String {
    alone.0.path().join(name).display().to_string()
}

async fn admin(alone: &Alone, args: &[&str]) -> Result<Output> {
    output(alone.alloy(&[&["admin"], args].concat())).await
}

/// The command fails with this exit code, and says these words.
async fn refuses(command: Command, code: i32, words: &[&str]) -> Result<()> {
    let out = output(command).await?;
    ensure!(out.status.code() == Some(code), told(&out));
    for word in words {
        ensure!(text(&out.stderr).contains(word), "no `{word}` in: {}", told(&out));
    }
    Ok(())
}

/// The log of the only job of a backup.
fn log_in(backup: &str) -> Result<PathBuf> {
    let job = fs::read_dir(PathBuf::from(backup).join("logs"))?.next().context("a job")??;
    Ok(job.path().join("1.log"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_that_failed_is_run_again_and_no_empty_farm_takes_its_place() -> Result<()> {
    let (alone, new) = (lived_in().await?, Alone::new()?);
    let backup = on(&alone, "backup");
    let out = admin(&alone, &["backup", &backup]).await?;
    ensure!(out.status.success(), told(&out));
    let whole = fs::read(log_in(&backup)?)?;
    fs::write(log_in(&backup)?, "lost")?;
    refuses(new.alloy(&["admin", "restore", &backup]), 1, &["the backup is damaged", "hint: "]).await?;
    let left = on(&new, "data/farm.restoring");
    let words = ["a restore has not come to its end", "`alloy admin restore` again", &left];
    refuses(new.alloy(&["run", "--local", "-c", "true"]), 125, &words).await?;
    refuses(new.alloy(&["up", "--listen", "127.0.0.1:0"]), 1, &words).await?;

    fs::write(log_in(&backup)?, whole)?;
    let out = admin(&new, &["restore", &backup]).await?;
    ensure!(out.status.success(), told(&out));
    ensure!(!fs::exists(&left)?, "{left} is still there");
    let out = fs::read_to_string(log_in(&on(&new, "data/farm"))?)?;
    ensure!(out == "kept\n", "{out}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_farm_elsewhere_is_named_in_vain_to_what_works_on_the_data_here() -> Result<()> {
    let alone = lived_in().await?;
    let backup = on(&alone, "backup");
    for flags in [&["--url", "http://127.0.0.1:9"][..], &["--context", "home"], &["--local"]] {
        for verb in
            [&["backup", &backup][..], &["restore", &backup], &["migrate-db", "--to-database", "postgres://a@b/c"]]
        {
            let words = [flags[0], "on this machine", "hint: ", "--data-dir"];
            refuses(alone.alloy(&[&["admin"], verb, flags].concat()), 2, &words).await?;
            refuses(alone.alloy(&[flags, &["admin"], verb].concat()), 2, &words).await?;
        }
    }
    ensure!(!fs::exists(&backup)?, "a backup of another farm than the one that was named");
    let help = admin(&alone, &["backup", "--help"]).await?;
    ensure!(text(&help.stdout).contains("--data-dir") && !text(&help.stdout).contains("--url"), told(&help));
    // A variable that chooses a farm for every other command is in nobody's way.
    let mut command = alone.alloy(&["admin", "backup", &backup]);
    let out = output({
        command.env("ALLOY_URL", "http://127.0.0.1:9");
        command
    })
    .await?;
    ensure!(out.status.success(), told(&out));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_to_a_disk_that_is_not_mounted_makes_no_directory_in_its_place() -> Result<()> {
    let alone = lived_in().await?;
    let disk = on(&alone, "disk");
    let words = [&format!("{disk}/backups is not there")[..], "hint: mount the disk"];
    refuses(alone.alloy(&["admin", "backup", &format!("{disk}/backups/one")]), 1, &words).await?;
    ensure!(!fs::exists(&disk)?, "{disk} was made");
    fs::create_dir_all(format!("{disk}/backups"))?;
    // As a shell completes a directory.
    let out = admin(&alone, &["backup", &format!("{disk}/backups/one/")]).await?;
    ensure!(out.status.success(), told(&out));
    ensure!(fs::read_to_string(log_in(&format!("{disk}/backups/one"))?)? == "kept\n");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_farm_that_the_orchestrator_s_file_names_is_the_one_of_a_backup() -> Result<()> {
    let (alone, lived_in) = (Alone::new()?, lived_in().await?);
    let names = format!("listen = \"0.0.0.0:1\"\ndata_dir = \"{}\"\n", on(&lived_in, "data"));
    let (usual, other) = (on(&alone, "config/alloy/orchestrator.toml"), on(&alone, "other.toml"));
    let backup = |name: &str, more: &[&str]| {
        let target = on(&alone, name);
        let mut command = alone.alloy(&[&["admin", "backup", &target], more].concat());
        command.env_remove("ALLOY_DATA_DIR").env("XDG_CONFIG_HOME", on(&alone, "config"));
        (command, target)
    };
    refuses(backup("none", &[]).0, 1, &["there is no farm", "hint: "]).await?;
    refuses(backup("none", &["--config", &other]).0, 2, &[&other]).await?;
    fs::create_dir_all(on(&alone, "config/alloy"))?;
    for (file, more) in [(&usual, &[][..]), (&other, &["--config", &other])] {
        fs::write(file, &names)?;
        let (command, target) = backup(&format!("of-{}", more.len()), more);
        let out = output(command).await?;
        ensure!(out.status.success(), told(&out));
        ensure!(fs::read_to_string(log_in(&target)?)? == "kept\n");
        if more.is_empty() {
            let empty = on(&alone, "data");
            refuses(backup("none", &["--data-dir", &empty]).0, 1, &["there is no farm", &empty]).await?;
        }
        fs::remove_file(file)?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_is_interrupted_leaves_nothing() -> Result<()> {
    let alone = Alone::new()?;
    // It takes connections and never says a word.
    let silent = std::net::TcpListener::bind("127.0.0.1:0")?;
    let database = format!("postgres://farm@{}/farm?sslmode=disable", silent.local_addr()?);
    let backup = on(&alone, "backup");
    let mut command = alone.alloy(&["admin", "backup", &backup, "--database-url", &database]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let part = format!("{backup}.partial");
    until("it has begun", async || Ok(fs::exists(&part)?.then_some(()))).await;
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT)?;
    let status = child.wait()?;
    ensure!(status.code() == Some(130), "{status}");
    ensure!(!fs::exists(&part)? && !fs::exists(&backup)?, "something is left");
    Ok(())
}
