//! A farm on SQLite that is moved to Postgres and a bucket, and backups that go back to either.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use alloy_tests::chaos::Dice;
use alloy_tests::farm::{Farm, Setup, full, isolated_orchestrator, output};
use alloy_tests::load::{self, check};
use alloy_tests::noise::sha256_of;
use alloy_tests::observe::{Api, until};
use alloy_tests::pg;
use alloy_tests::process::Daemon;
use alloy_tests::s3::S3;
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

const STOP: Duration = Duration::from_secs(60);
const USER: &str = "3f0c2f1e-8a51-4c1e-9d0b-6f1f3f0f9a11";

/// What an orchestrator is told of a database and a place in a bucket.
fn there(database: &str, s3: &S3, prefix: &str) -> Vec<(String, String)> {
    [s3.env(prefix), only_database(database)].concat()
}

fn only_database(url: &str) -> Vec<(String, String)> {
    let variables = [("DATABASE_MODE", "postgres"), ("DATABASE_URL", url)];
    variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
}

/// `alloy admin ARGS` with the bucket's keys.
fn admin(farm: &Farm, variables: &[(String, String)], args: &[&str]) -> std::process::Command {
    let words: Vec<&str> = ["admin"].iter().chain(args).copied().collect();
    let mut command = farm.alloy(&words);
    command.envs(variables.iter().cloned());
    command
}

async fn said(command: std::process::Command) -> Result<(bool, String)> {
    let out = output(command).await?;
    Ok((out.status.success(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned()))
}

/// `alloy admin migrate-db` to a database and the bucket.
fn migrate(farm: &Farm, database: &str, s3: &S3, args: &[&str]) -> std::process::Command {
    let (mut words, place) = (vec!["migrate-db", "--to-database", database, "--to-s3"], s3.env("moved"));
    words.push(&place[0].1);
    words.extend(args);
    admin(farm, &place, &words)
}

/// All that the API tells of jobs that have ended, and of who may do what.
async fn all_of(api: &Api, jobs: &[String]) -> Result<Vec<Value>> {
    let mut all = Vec::new();
    for id in jobs {
        let artifacts = api.get(&format!("/v1/jobs/{id}/artifacts")).await?;
        let log = sha256_of(&api.log(id).await?);
        all.push(json!([api.job(id).await?, api.events(id).await?, log, artifacts]));
    }
    for path in ["/v1/tokens", "/v1/members"] {
        all.push(api.get(path).await?);
    }
    let workers = api.get("/v1/workers").await?;
    let names = workers["workers"].as_array().context("a list")?.iter().map(|one| json!([one["id"], one["name"]]));
    all.push(Value::Array(names.collect()));
    Ok(all)
}

/// Jobs with logs and artifacts, one log that is long, a token of its own and a member. Returns the jobs.
async fn lived_in(farm: &Farm) -> Result<(Vec<String>, String)> {
    let api = farm.api();
    let mut jobs = Vec::new();
    for seed in 1..=6 {
        jobs.push(load::submit(&api, seed).await.context("it is taken")?);
    }
    let long = api.shell("seq 1 900000; seq 1 10 >&2").await?;
    let token = api.post("/v1/tokens", &json!({ "name": "ci", "role": "developer" })).await?;
    let member = api.request(reqwest::Method::PUT, &format!("/v1/members/{USER}")).json(&json!({ "role": "viewer" }));
    ensure!(member.send().await?.status().is_success());
    for (seed, id) in (1..=6).zip(&jobs) {
        check(&api, id, seed).await?;
    }
    ensure!(api.end(&long).await["state"] == "succeeded");
    ensure!(api.log(&long).await?.len() > 5 << 20);
    jobs.push(long);
    Ok((jobs, token["token"].as_str().context("a token")?.to_owned()))
}

/// A command that waits for a file.
fn waits(gate: &Path) -> String {
    format!("echo attempt $ALLOY_JOB_ATTEMPT; while [ ! -e {} ]; do sleep 0.05; done; echo through", gate.display())
}

/// What an orchestrator says that does not start on this farm's data.
async fn refusal(farm: &Farm, variables: &[(String, String)]) -> Result<String> {
    let mut command = isolated_orchestrator(farm.dir(), &farm.dir().join("data"));
    command.envs(variables.iter().cloned());
    let (fine, told) = said(command).await?;
    ensure!(!fine, "it started: {told}");
    Ok(told)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_farm_is_moved_while_a_build_runs() -> Result<()> {
    let (s3, database) = (S3::start().await?, pg::empty_database().await);
    let mut farm = Farm::start(Setup { workers: 2, ..Setup::default() }).await?;
    let (mut jobs, token) = lived_in(&farm).await?;
    let gate = farm.scratch("gate")?.join("open");
    let runs = farm.api().shell(&waits(&gate)).await?;
    farm.api().log_has(&runs, "attempt 1").await;
    let (fine, told) = said(migrate(&farm, &database, &s3, &["--copy-only"])).await?;
    ensure!(fine && told.contains("run it again without --copy-only"), "{told}");
    let unfinished = refusal_elsewhere(&farm, &there(&database, &s3, "moved")).await?;
    ensure!(unfinished.contains("is being moved into it"), "{unfinished}");

    // What happens later is brought later.
    let later = load::submit(&farm.api(), 7).await.context("it is taken")?;
    check(&farm.api(), &later, 7).await?;
    jobs.push(later);
    let gone = farm.api().request(reqwest::Method::DELETE, &format!("/v1/members/{USER}")).send().await?;
    ensure!(gone.status().is_success());
    let before = all_of(&farm.api(), &jobs).await?;
    let log = farm.dir().join("logs/migrate.log");
    let mut moving = Daemon::start("migrate", migrate(&farm, &database, &s3, &[]), &log)?;
    until("it waits for the orchestrator's end", async || {
        ensure!(moving.has_ended().is_none(), "{}", moving.log_text());
        Ok(moving.log_text().contains("Stop the orchestrator").then_some(()))
    })
    .await;
    farm.stop_orchestrator()?;
    let ended = moving.wait(STOP)?;
    ensure!(ended.success(), "{}", moving.log_text());
    let old = refusal(&farm, &[]).await?;
    ensure!(old.contains("this farm was moved to postgres://"), "{old}");

    farm.set_orchestrator_env(there(&database, &s3, "moved"));
    farm.start_orchestrator().await?;
    until("both workers are back", async || {
        let workers = farm.api().get("/v1/workers").await?;
        let all = workers["workers"].as_array().context("a list")?.clone();
        Ok(all.iter().all(|one| one["state"] == "ready" || one["state"] == "busy").then_some(()))
    })
    .await;
    let after = all_of(&farm.api(), &jobs).await?;
    for (before, after) in before.iter().zip(&after) {
        ensure!(before == after, "before: {before}\nafter: {after}");
    }
    fs::write(&gate, "")?;
    let job = farm.api().end(&runs).await;
    ensure!(job["state"] == "succeeded" && job["attempt"] == 1, "{job}");
    ensure!(farm.api().log(&runs).await? == b"attempt 1\nthrough\n");
    let ours = Api::new(&farm.url(), Some(&token));
    let again = load::submit(&ours, 1).await.context("it is taken")?;
    check(&ours, &again, 1).await?;
    let same = load::submit(&farm.api(), 7).await.context("it is taken")?;
    ensure!(same == jobs[7], "a key that was used is known");
    let (fine, told) = said(migrate(&farm, &database, &s3, &[])).await?;
    ensure!(fine && told.contains("the farm is in postgres://"), "{told}");
    Ok(())
}

/// The same as [`refusal`], on a data directory of its own: the farm's own is in use.
async fn refusal_elsewhere(farm: &Farm, variables: &[(String, String)]) -> Result<String> {
    let mut command = isolated_orchestrator(farm.dir(), &farm.scratch("elsewhere")?);
    command.envs(variables.iter().cloned());
    let (fine, told) = said(command).await?;
    ensure!(!fine, "it started: {told}");
    Ok(told)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_that_is_killed_goes_on_where_it_was() -> Result<()> {
    let mut dice = Dice::from_environment();
    let (s3, database) = (S3::start().await?, pg::empty_database().await);
    let mut farm = Farm::start(Setup { time_scale: 10, ..Setup::default() }).await?;
    let (jobs, _) = lived_in(&farm).await?;
    let before = all_of(&farm.api(), &jobs).await?;
    farm.stop_orchestrator()?;
    let mut cut = 0;
    for round in 0..if full() { 40 } else { 8 } {
        let log = farm.dir().join(format!("logs/move-{round}.log"));
        let mut moving = Daemon::start("move", migrate(&farm, &database, &s3, &[]), &log)?;
        dice.instant(100 + 100 * round).await;
        if moving.has_ended().is_some() {
            break;
        }
        moving.kill();
        cut += 1;
    }
    println!("{cut} moves were cut off");
    let (fine, told) = said(migrate(&farm, &database, &s3, &[])).await?;
    ensure!(fine && cut > 0, "{told}");
    farm.set_orchestrator_env(there(&database, &s3, "moved"));
    farm.start_orchestrator().await?;
    farm.all_connected().await;
    let after = all_of(&farm.api(), &jobs).await?;
    for (before, after) in before.iter().zip(&after) {
        ensure!(before == after, "before: {before}\nafter: {after}");
    }
    // Another farm finds it taken.
    let other = Farm::orchestrator_only(Setup::default()).await?;
    let (fine, told) = said(migrate(&other, &database, &s3, &["--copy-only"])).await?;
    ensure!(!fine && told.contains("holds another farm"), "{told}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_object_is_named_and_keeps_a_farm_from_being_moved() -> Result<()> {
    let (s3, database) = (S3::start().await?, pg::empty_database().await);
    let mut farm = Farm::start(Setup { time_scale: 10, ..Setup::default() }).await?;
    let (jobs, _) = lived_in(&farm).await?;
    let artifacts = files_below(&farm.farm_dir().join("blobs/objects"))?;
    let bad = artifacts.iter().find(|path| path.to_string_lossy().contains("/artifacts/")).context("an artifact")?;
    let mut bytes = fs::read(bad)?;
    bytes[0] ^= 1;
    fs::write(bad, bytes)?;
    farm.stop_orchestrator()?;
    let name = bad.file_name().context("a name")?.to_string_lossy().into_owned();
    let (fine, told) = said(migrate(&farm, &database, &s3, &[])).await?;
    ensure!(!fine && told.contains(&format!("{name} is damaged")) && told.contains("--leave-damaged"), "{told}");
    ensure!(refusal(&farm, &there(&database, &s3, "moved")).await?.contains("is being moved into it"));
    let (fine, told) = said(migrate(&farm, &database, &s3, &["--leave-damaged"])).await?;
    ensure!(fine && told.contains(&name), "{told}");
    farm.set_orchestrator_env(there(&database, &s3, "moved"));
    farm.start_orchestrator().await?;
    farm.all_connected().await;
    ensure!(farm.api().job(&jobs[0]).await?["state"] == "succeeded");
    Ok(())
}

fn files_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() { found.extend(files_below(&path)?) } else { found.push(path) }
    }
    Ok(found)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_database_alone_is_moved_and_the_bytes_stay() -> Result<()> {
    let database = pg::empty_database().await;
    let mut farm = Farm::start(Setup { time_scale: 10, ..Setup::default() }).await?;
    let (jobs, _) = lived_in(&farm).await?;
    let before = all_of(&farm.api(), &jobs).await?;
    farm.stop_orchestrator()?;
    let (fine, told) = said(admin(&farm, &[], &["migrate-db", "--to-database", &database])).await?;
    ensure!(fine && told.contains("the same --data-dir"), "{told}");
    ensure!(refusal(&farm, &[]).await?.contains("this farm was moved to"));
    farm.set_orchestrator_env(only_database(&database));
    farm.start_orchestrator().await?;
    farm.all_connected().await;
    let after = all_of(&farm.api(), &jobs).await?;
    for (before, after) in before.iter().zip(&after) {
        ensure!(before == after, "before: {before}\nafter: {after}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_of_either_kind_comes_back_in_either() -> Result<()> {
    let (s3, database) = (S3::start().await?, pg::empty_database().await);
    let first = there(&database, &s3, "first");
    let setup = Setup { time_scale: 20, orchestrator_env: first.clone(), ..Setup::default() };
    let mut farm = Farm::start(setup).await?;
    let (jobs, _) = lived_in(&farm).await?;
    let gate = farm.scratch("gate")?.join("open");
    let runs = farm.api().shell(&waits(&gate)).await?;
    farm.api().log_has(&runs, "attempt 1").await;
    let before = all_of(&farm.api(), &jobs).await?;
    let backup = farm.dir().join("one").display().to_string();
    let (fine, told) = said(admin(&farm, &first, &["backup", &backup])).await?;
    ensure!(fine, "{told}");
    farm.kill_orchestrator();
    farm.leaves_live_jobs = true;

    // From Postgres to files.
    fs::rename(farm.farm_dir(), farm.dir().join("lost"))?;
    let (fine, told) = said(admin(&farm, &[], &["restore", &backup])).await?;
    ensure!(fine, "{told}");
    farm.set_orchestrator_env(Vec::new());
    farm.start_orchestrator().await?;
    same(&farm, &jobs, &before).await?;
    fs::write(&gate, "")?;
    ensure!(farm.api().end(&runs).await["state"] == "succeeded");

    // From files to Postgres.
    let (backup, before) = (farm.dir().join("two").display().to_string(), all_of(&farm.api(), &jobs).await?);
    let (fine, told) = said(admin(&farm, &[], &["backup", &backup])).await?;
    ensure!(fine, "{told}");
    farm.stop_orchestrator()?;
    fs::rename(farm.farm_dir(), farm.dir().join("lost-too"))?;
    let (fine, told) = said(admin(&farm, &first, &["restore", &backup])).await?;
    ensure!(!fine && told.contains("holds another farm"), "{told}");
    let second = there(&pg::empty_database().await, &s3, "second");
    let (fine, told) = said(admin(&farm, &second, &["restore", &backup])).await?;
    ensure!(fine, "{told}");
    farm.set_orchestrator_env(second);
    farm.start_orchestrator().await?;
    same(&farm, &jobs, &before).await?;

    // The same without a bucket.
    farm.stop_orchestrator()?;
    fs::rename(farm.farm_dir(), farm.dir().join("lost-again"))?;
    let third = only_database(&pg::empty_database().await);
    let (fine, told) = said(admin(&farm, &third, &["restore", &backup])).await?;
    ensure!(fine, "{told}");
    farm.set_orchestrator_env(third);
    farm.start_orchestrator().await?;
    same(&farm, &jobs, &before).await
}

async fn same(farm: &Farm, jobs: &[String], before: &[Value]) -> Result<()> {
    until("the worker is back", async || {
        let workers = farm.api().get("/v1/workers").await?;
        Ok((workers["workers"][0]["state"] != "offline").then_some(()))
    })
    .await;
    let after = all_of(&farm.api(), jobs).await?;
    for (before, after) in before.iter().zip(&after) {
        ensure!(before == after, "before: {before}\nafter: {after}");
    }
    Ok(())
}
