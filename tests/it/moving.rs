//! A farm on SQLite that is moved to Postgres and a bucket, and backups that go back to either.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use alloy_tests::chaos::Dice;
use alloy_tests::farm::{Farm, Setup, full, isolated_orchestrator, output};
use alloy_tests::load::{self, Known, Load, check};
use alloy_tests::noise::sha256_of;
use alloy_tests::observe::{Api, until};
use alloy_tests::pg;
use alloy_tests::process::Daemon;
use alloy_tests::s3::{Odds, S3};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sqlx::{Connection as _, Executor as _, PgConnection};

use crate::store::migrations::{expand_file, expand_postgres};

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

/// What a farm has that was lived in.
struct Lived {
    jobs: Vec<String>,
    /// Of a CI.
    token: String,
    /// A tree with one file.
    source: Value,
}

/// Jobs with logs and artifacts, one log that is long, one with a source, a token and a member.
async fn lived_in(farm: &Farm) -> Result<Lived> {
    let api = farm.api();
    let tree = farm.scratch("tree")?;
    fs::write(tree.join("input"), "what the source has\n")?;
    let source = farm.upload(&tree).await?;
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
    jobs.push(reads_source(&api, &source).await?);
    Ok(Lived { jobs, token: token["token"].as_str().context("a token")?.to_owned(), source })
}

/// Runs a job on a source that the farm has, and sees that it got it.
async fn reads_source(api: &Api, source: &Value) -> Result<String> {
    let job = api.post("/v1/jobs", &json!({ "spec": { "shell": "cat input" }, "source": source })).await?;
    let id = job["id"].as_str().context("an id")?.to_owned();
    let job = api.end(&id).await;
    ensure!(job["state"] == "succeeded", "{job}");
    ensure!(api.log(&id).await? == b"what the source has\n");
    Ok(id)
}

/// The farm tells of these jobs, and of who may do what, just what it told before.
async fn tells_the_same(farm: &Farm, jobs: &[String], before: &[Value]) -> Result<()> {
    let after = all_of(&farm.api(), jobs).await?;
    ensure!(before.len() == after.len());
    for (before, after) in before.iter().zip(&after) {
        ensure!(before == after, "before: {before}\nafter: {after}");
    }
    Ok(())
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
async fn a_farm_is_moved_while_builds_run() -> Result<()> {
    let (s3, database) = (S3::start().await?, pg::empty_database().await);
    let mut farm = Farm::start(Setup { workers: 2, slots: 3, ..Setup::default() }).await?;
    let Lived { mut jobs, token, source } = lived_in(&farm).await?;
    let gate = farm.scratch("gate")?.join("open");
    let runs = farm.api().shell(&waits(&gate)).await?;
    farm.api().log_has(&runs, "attempt 1").await;
    let builds = Load::on(&farm.api(), 3);
    let (fine, told) = said(migrate(&farm, &database, &s3, &["--copy-only"])).await?;
    ensure!(fine && told.contains("run it again without --copy-only"), "{told}");
    let unfinished = refusal_elsewhere(&farm, &there(&database, &s3, "moved")).await?;
    ensure!(unfinished.contains("is being moved into it"), "{unfinished}");
    let nothing = farm.dir().join("half").display().to_string();
    let (fine, told) = said(admin(&farm, &there(&database, &s3, "moved"), &["backup", &nothing])).await?;
    ensure!(!fine && told.contains("not a whole one"), "{told}");

    // What happens later is brought later, and what went is gone there too.
    let later = load::submit(&farm.api(), 907).await.context("it is taken")?;
    check(&farm.api(), &later, 907).await?;
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
    let (fine, told) = said(migrate(&farm, &database, &s3, &[])).await?;
    ensure!(!fine && told.contains("another move into postgres://"), "{told}");
    farm.stop_orchestrator()?;
    let ended = moving.wait(STOP)?;
    ensure!(ended.success() && moving.log_text().contains("all compared"), "{}", moving.log_text());
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
    tells_the_same(&farm, &jobs, &before).await?;
    fs::write(&gate, "")?;
    let job = farm.api().end(&runs).await;
    ensure!(job["state"] == "succeeded" && job["attempt"] == 1, "{job}");
    ensure!(farm.api().log(&runs).await? == b"attempt 1\nthrough\n");
    builds.hold(true);
    for Known { id, seed, .. } in builds.known() {
        let job = check(&farm.api(), &id, seed).await?;
        ensure!(job["attempt"] == 1, "no build is begun anew: {job}");
    }
    builds.stop().await;
    let ours = Api::new(&farm.url(), Some(&token));
    let again = load::submit(&ours, 1).await.context("it is taken")?;
    check(&ours, &again, 1).await?;
    reads_source(&ours, &source).await?;
    let same = load::submit(&farm.api(), 907).await.context("it is taken")?;
    ensure!(Some(&same) == jobs.last(), "a key that was used is known");
    let (fine, told) = said(migrate(&farm, &database, &s3, &[])).await?;
    ensure!(fine && told.contains("the farm is in postgres://"), "{told}");
    farm.leaves_live_jobs = true;
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
async fn a_copy_that_brought_much_looks_again() -> Result<()> {
    let (s3, database) = (S3::start().await?, pg::empty_database().await);
    let mut farm = Farm::orchestrator_only(Setup::default()).await?;
    farm.stop_orchestrator()?;
    for number in 1..=700 {
        let dir = farm.farm_dir().join(format!("logs/job_{number:026}"));
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("1.log"), format!("log {number}\n"))?;
    }
    for passes in [2, 1] {
        let (fine, told) = said(migrate(&farm, &database, &s3, &["--copy-only"])).await?;
        ensure!(fine && told.matches(", 700 logs, ").count() == passes, "{told}");
    }
    Ok(())
}

/// Kills a move again and again, each time after a little longer, until one is done. How often.
async fn cut_off(farm: &Farm, dice: &mut Dice, migrate: impl Fn() -> std::process::Command) -> Result<u64> {
    let mut cut = 0;
    while cut < if full() { 40 } else { 8 } {
        let log = farm.dir().join("logs/move.log");
        let mut moving = Daemon::start("move", migrate(), &log)?;
        dice.instant(100 + 100 * cut).await;
        if moving.has_ended().is_some() {
            break;
        }
        moving.kill();
        cut += 1;
    }
    println!("{cut} moves were cut off");
    Ok(cut)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_that_is_killed_goes_on_where_it_was() -> Result<()> {
    let mut dice = Dice::from_environment();
    let (s3, database) = (S3::start().await?, pg::empty_database().await);
    let mut farm = Farm::start(Setup { time_scale: 10, ..Setup::default() }).await?;
    let Lived { jobs, source, .. } = lived_in(&farm).await?;
    let before = all_of(&farm.api(), &jobs).await?;
    farm.stop_orchestrator()?;
    s3.faults.set(Odds { seed: dice.roll(1 << 30), errors: 5, lost_replies: 3, cut_bodies: 3 });
    let cut = cut_off(&farm, &mut dice, || migrate(&farm, &database, &s3, &["--copy-only"])).await?;
    s3.faults.set(Odds::default());
    let (fine, told) = said(migrate(&farm, &database, &s3, &["--copy-only"])).await?;
    ensure!(fine && cut > 0, "{told}");
    // All of it is there: the next one asks for what there is, and brings nothing.
    let asked = s3.faults.counts().requests;
    let (fine, told) = said(migrate(&farm, &database, &s3, &["--copy-only"])).await?;
    let asked = s3.faults.counts().requests - asked;
    ensure!(fine, "{told}");
    ensure!(asked < s3.objects()?.len() as u64, "{asked} requests for what was there already");
    // The last one may have been cut off after it was done.
    cut_off(&farm, &mut dice, || migrate(&farm, &database, &s3, &[])).await?;
    let (fine, told) = said(migrate(&farm, &database, &s3, &[])).await?;
    ensure!(fine && told.contains("the farm is in postgres://"), "{told}");
    farm.set_orchestrator_env(there(&database, &s3, "moved"));
    farm.start_orchestrator().await?;
    farm.all_connected().await;
    tells_the_same(&farm, &jobs, &before).await?;
    reads_source(&farm.api(), &source).await?;
    // Another farm finds it taken.
    let other = Farm::orchestrator_only(Setup::default()).await?;
    let (fine, told) = said(migrate(&other, &database, &s3, &["--copy-only"])).await?;
    ensure!(!fine && told.contains("holds a farm already"), "{told}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_object_is_named_and_keeps_a_farm_from_being_moved() -> Result<()> {
    let (s3, database) = (S3::start().await?, pg::empty_database().await);
    let mut farm = Farm::start(Setup { time_scale: 10, ..Setup::default() }).await?;
    let jobs = lived_in(&farm).await?.jobs;
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
    // Whoever asks for what is left out hears so; everything else is there.
    let mut lost = 0;
    for (seed, id) in (1..=6).zip(&jobs) {
        let asked = farm.api().request(reqwest::Method::GET, &format!("/v1/jobs/{id}/artifacts/result.bin"));
        if asked.send().await?.status().is_success() {
            check(&farm.api(), id, seed).await?;
        } else {
            lost += 1;
        }
    }
    ensure!(lost == 1, "{lost} artifacts cannot be had");
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
    let jobs = lived_in(&farm).await?.jobs;
    let before = all_of(&farm.api(), &jobs).await?;
    farm.stop_orchestrator()?;
    let (fine, told) = said(admin(&farm, &[], &["migrate-db", "--to-database", &database])).await?;
    ensure!(fine && told.contains("the same --data-dir"), "{told}");
    ensure!(refusal(&farm, &[]).await?.contains("this farm was moved to"));
    let env = only_database(&database);
    farm.set_orchestrator_env(env.clone());
    farm.start_orchestrator().await?;
    farm.all_connected().await;
    tells_the_same(&farm, &jobs, &before).await?;

    // The directory is known by what lies in it: another one in its place is not taken for it.
    farm.stop_orchestrator()?;
    let (there, aside) = (farm.farm_dir(), farm.dir().join("aside"));
    fs::rename(&there, &aside)?;
    ensure!(refusal(&farm, &env).await?.contains("lie in files of another data directory"));
    fs::remove_dir_all(&there)?;
    fs::rename(&aside, &there)?;
    farm.start_orchestrator().await?;
    farm.all_connected().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_database_alone_is_moved_and_the_bytes_stay_in_their_bucket() -> Result<()> {
    let (s3, database) = (S3::start().await?, pg::empty_database().await);
    let setup = Setup { time_scale: 10, orchestrator_env: s3.env("kept"), ..Setup::default() };
    let mut farm = Farm::start(setup).await?;
    let jobs = lived_in(&farm).await?.jobs;
    let before = all_of(&farm.api(), &jobs).await?;
    farm.stop_orchestrator()?;
    let (fine, told) = said(admin(&farm, &[], &["migrate-db", "--to-database", &database])).await?;
    ensure!(fine, "{told}");
    ensure!(refusal(&farm, &only_database(&database)).await?.contains("say ALLOY_S3_URL=s3://"));
    farm.set_orchestrator_env(there(&database, &s3, "kept"));
    farm.start_orchestrator().await?;
    farm.all_connected().await;
    tells_the_same(&farm, &jobs, &before).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_of_either_kind_comes_back_in_either() -> Result<()> {
    let (s3, database) = (S3::start().await?, pg::empty_database().await);
    let first = there(&database, &s3, "first");
    let setup = Setup { time_scale: 20, orchestrator_env: first.clone(), ..Setup::default() };
    let mut farm = Farm::start(setup).await?;
    let jobs = lived_in(&farm).await?.jobs;
    let gate = farm.scratch("gate")?.join("open");
    let runs = farm.api().shell(&waits(&gate)).await?;
    farm.api().log_has(&runs, "attempt 1").await;
    let before = all_of(&farm.api(), &jobs).await?;
    let backup = farm.dir().join("one").display().to_string();
    let (fine, told) = said(admin(&farm, &only_database(&database), &["backup", &backup])).await?;
    ensure!(!fine && told.contains("ALLOY_S3_URL is not set: say ALLOY_S3_URL=s3://"), "{told}");
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
    ensure!(!fine && told.contains("holds a farm already"), "{told}");
    ensure!(!farm.farm_dir().join("restoring").exists(), "it was begun");
    let second = there(&pg::empty_database().await, &s3, "second");
    restore_that_is_killed(&farm, &second, &backup).await?;
    farm.set_orchestrator_env(second);
    farm.start_orchestrator().await?;
    same(&farm, &jobs, &before).await?;

    // The same without a bucket.
    farm.stop_orchestrator()?;
    fs::rename(farm.farm_dir(), farm.dir().join("lost-again"))?;
    let third = only_database(&pg::empty_database().await);
    let parts = ["blobs", "restoring"].map(|name| farm.farm_dir().join(name));
    parts.iter().try_for_each(fs::create_dir_all)?;
    fs::write(parts[1].join("journal"), "of-another-move \n")?;
    refuses(admin(&farm, &third, &["restore", &backup]), 1, &["holds a farm already, or parts of one"]).await?;
    parts.iter().try_for_each(fs::remove_dir_all)?;
    let (fine, told) = said(admin(&farm, &third, &["restore", &backup])).await?;
    ensure!(fine, "{told}");
    farm.set_orchestrator_env(third);
    farm.start_orchestrator().await?;
    same(&farm, &jobs, &before).await
}

/// Each cut is later than the one before, until one comes too late.
async fn restore_that_is_killed(farm: &Farm, to: &[(String, String)], backup: &str) -> Result<()> {
    let mut dice = Dice::from_environment();
    for round in 0..if full() { 40 } else { 6 } {
        let log = farm.dir().join(format!("logs/restore-{round}.log"));
        let mut restoring = Daemon::start("restore", admin(farm, to, &["restore", backup]), &log)?;
        dice.instant(200 + 200 * round).await;
        restoring.kill();
        let status = restoring.has_ended().context("it has ended")?;
        if status.success() {
            return Ok(());
        }
        ensure!(status.code().is_none(), "it was not killed, it failed: {}", restoring.log_text());
    }
    let (fine, told) = said(admin(farm, to, &["restore", backup])).await?;
    ensure!(fine, "{told}");
    Ok(())
}

async fn same(farm: &Farm, jobs: &[String], before: &[Value]) -> Result<()> {
    until("the worker is back", async || {
        let workers = farm.api().get("/v1/workers").await?;
        Ok((workers["workers"][0]["state"] != "offline").then_some(()))
    })
    .await;
    tells_the_same(farm, jobs, before).await
}

/// The command fails with this exit code, and says these words, a hint among them.
async fn refuses(command: std::process::Command, code: i32, words: &[&str]) -> Result<()> {
    let out = output(command).await?;
    let told = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    ensure!(out.status.code() == Some(code), "{:?}: {told}", out.status);
    for word in words {
        ensure!(told.contains(word), "no `{word}` in: {told}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_moved_is_refused_with_a_hint() -> Result<()> {
    let s3 = S3::start().await?;
    let mut farm = Farm::orchestrator_only(Setup::default()).await?;
    let database = pg::empty_database().await;
    let to = |url: &str| migrate(&farm, url, &s3, &["--copy-only"]);
    let words = ["--to-database", "DATABASE_URL", "hint: alloy admin migrate-db --to-database postgres://"];
    refuses(admin(&farm, &[], &["migrate-db"]), 2, &words).await?;
    let nowhere = farm.scratch("nowhere")?.display().to_string();
    refuses(migrate(&farm, &database, &s3, &["--data-dir", &nowhere]), 1, &["there is no farm in", "hint: "]).await?;
    refuses(
        to("mysql://db/farm"),
        2,
        &["does not begin with postgres://", "hint: postgres://USER:PASSWORD@HOST:5432/DATABASE"],
    )
    .await?;
    refuses(to("postgres://farm@127.0.0.1:1/farm"), 1, &["127.0.0.1:1/farm", "is it running"]).await?;
    refuses(to("postgres://farm@127.0.0.1:6543/farm"), 2, &["port 6543 is a transaction pooler"]).await?;
    let bucket = ["migrate-db", "--to-database", &database, "--to-s3", "https://farm-bytes"];
    refuses(admin(&farm, &s3.env("moved"), &bucket), 2, &["s3_url (--to-s3)", "s3://bucket/prefix"]).await?;
    let wrong = s3.env("moved").into_iter().filter(|(name, _)| name != "AWS_SECRET_ACCESS_KEY").collect::<Vec<_>>();
    let args = ["migrate-db", "--to-database", &database];
    refuses(admin(&farm, &wrong, &args), 2, &["aws_secret_access_key", "is missing"]).await?;

    // A database in which another farm lives, and one in which somebody else does.
    let taken = pg::empty_database().await;
    let other = Farm::orchestrator_only(Setup { orchestrator_env: only_database(&taken), ..Setup::default() }).await?;
    refuses(to(&taken), 1, &["holds a farm already", "hint: createdb"]).await?;
    drop(other);
    let foreign = pg::empty_database().await;
    let mut conn = PgConnection::connect(&foreign).await?;
    conn.execute("CREATE TABLE jobs (mine TEXT)").await?;
    refuses(to(&foreign), 1, &["\"jobs\" already exists", "a farm needs a database of its own"]).await?;
    let theirs: i64 =
        sqlx::query_scalar("SELECT COUNT(*) FROM information_schema.tables WHERE table_schema = 'public'")
            .fetch_one(&mut conn)
            .await?;
    ensure!(theirs <= 2, "{theirs} tables are in somebody else's database");

    // One that a newer version has written, whose tables this one would leave behind.
    farm.stop_orchestrator()?;
    expand_file(&farm.farm_dir().join("alloy.db")).await;
    let newer = ["of a newer version", "use the `alloy` of the version"];
    refuses(migrate(&farm, &database, &s3, &[]), 1, &newer).await?;
    farm.start_orchestrator().await?;
    let words = ["--json", "admin", "migrate-db", "--to-database", &database];
    refuses(farm.alloy(&words), 1, &["\"type\":\"error\"", "\"exit_code\":1", "newer version"]).await?;
    let empty = only_database(&pg::empty_database().await);
    let backup = farm.dir().join("backup").display().to_string();
    refuses(admin(&farm, &empty, &["backup", &backup]), 1, &["there is no farm in that database", "hint: "]).await
}

/// A program knows the migrations that it was made with. The next version's add to what is there; the one before goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_orchestrator_starts_and_works_on_the_database_of_the_next_version() -> Result<()> {
    let database = pg::empty_database().await;
    for env in [Vec::new(), only_database(&database)] {
        let on_files = env.is_empty();
        let mut farm = Farm::start(Setup { time_scale: 10, orchestrator_env: env.clone(), ..Setup::default() }).await?;
        farm.set_orchestrator_env(env);
        let before = load::submit(&farm.api(), 1).await.context("it is taken")?;
        check(&farm.api(), &before, 1).await?;
        if on_files {
            farm.stop_orchestrator()?;
            expand_file(&farm.farm_dir().join("alloy.db")).await;
        } else {
            // The next version's orchestrator comes while this one works.
            let runs = farm.api().shell("echo begun; sleep 1").await?;
            farm.api().log_has(&runs, "begun").await;
            expand_postgres(&database).await;
            ensure!(farm.api().end(&runs).await["state"] == "succeeded");
            let during = load::submit(&farm.api(), 3).await.context("it is taken")?;
            check(&farm.api(), &during, 3).await?;
            farm.kill_orchestrator();
        }
        farm.start_orchestrator().await?;
        farm.all_connected().await;
        check(&farm.api(), &before, 1).await?;
        let after = load::submit(&farm.api(), 2).await.context("it is taken")?;
        check(&farm.api(), &after, 2).await?;
        // It has refused nothing, and takes nothing away from the next version.
        let log = farm.orchestrator().log_text();
        ensure!(!log.contains("ERROR"), "{log}");
        let (fine, told) = said(farm.alloy(&["worker", "list"])).await?;
        ensure!(fine && told.contains("mini-0"), "{told}");
    }
    let mut conn = PgConnection::connect(&database).await?;
    let kept: i64 =
        sqlx::query_scalar("SELECT COUNT(*) FROM _sqlx_migrations WHERE version = 1900").fetch_one(&mut conn).await?;
    ensure!(kept == 1);
    Ok(())
}
