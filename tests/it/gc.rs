//! T: what a farm removes, and what it never does, on real programs: files with SQLite, and several orchestrators on Postgres with
//! a bucket. A day of these farms is a part of a second, and nothing is old until somebody says how long things are kept.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use alloy_tests::farm::{Farm, Setup, output, upload_tree};
use alloy_tests::observe::{Api, until};
use alloy_tests::several::Several;
use anyhow::{Context as _, Result, ensure};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, SqliteConnection};

const DAY_MS: &str = "600";
/// Where an upload to the bucket that nobody went on with would lie.
const STRAY: &str = "org_0004000000e008000000000001/packs/00000000000000010000000000000002";

enum Place {
    Files(Box<Farm>),
    Shared(Box<Several>),
}

fn keep_for_ever() -> Vec<(String, String)> {
    let days = ["JOBS", "ARTIFACTS", "LOGS", "SOURCES"].map(|what| (format!("ALLOY_KEEP_{what}_DAYS"), "0".to_owned()));
    days.into_iter().chain([("ALLOY_KEEP_DAY_MS".to_owned(), DAY_MS.to_owned())]).collect()
}

async fn files() -> Result<Place> {
    let setup = Setup { slots: 1, time_scale: 10, orchestrator_env: keep_for_ever(), ..Setup::default() };
    Ok(Place::Files(Box::new(Farm::start(setup).await?)))
}

async fn shared() -> Result<Place> {
    Ok(Place::Shared(Box::new(Several::start_with(2, 1, 1, 10, keep_for_ever()).await?)))
}

impl Place {
    fn api(&self) -> Api {
        match self {
            Self::Files(farm) => farm.api(),
            Self::Shared(farm) => farm.api(),
        }
    }

    fn dir(&self) -> &Path {
        match self {
            Self::Files(farm) => farm.dir(),
            Self::Shared(farm) => farm.dir(),
        }
    }

    fn tree(&self, name: &str) -> Result<PathBuf> {
        let tree = self.dir().join("trees").join(name);
        std::fs::create_dir_all(&tree)?;
        std::fs::write(tree.join("a.txt"), format!("{name}\n").repeat(20))?;
        Ok(tree)
    }

    fn alloy_in(&self, tree: &Path, args: &[&str]) -> Command {
        let mut command = match self {
            Self::Files(farm) => farm.alloy(args),
            Self::Shared(farm) => farm.alloy(args),
        };
        command.current_dir(tree);
        command
    }

    /// `alloy ARGS`: its exit code, and what it says on standard output and on standard error.
    async fn alloy(&self, args: &[&str]) -> Result<(i32, String, String)> {
        let out = output(self.alloy_in(&self.dir().join("home"), args)).await?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok((out.status.code().unwrap_or(-1), text(out.stdout), text(out.stderr)))
    }

    fn bytes_dir(&self) -> PathBuf {
        match self {
            Self::Files(farm) => farm.farm_dir().join("blobs/objects"),
            Self::Shared(farm) => farm.s3.file("several"),
        }
    }

    /// The names of all objects, as they lie on the disk or in the bucket, but for the mark that says whose bucket it is.
    fn objects(&self) -> Result<BTreeSet<String>> {
        let mut found = BTreeSet::new();
        let root = self.bytes_dir();
        walk(&root, &mut |path| {
            let name = path.strip_prefix(&root).ok().and_then(Path::to_str);
            found.extend(name.filter(|name| *name != "owner").map(str::to_owned));
        });
        Ok(found)
    }

    /// How much is left of logs.
    async fn logs_left(&self) -> Result<i64> {
        match self {
            Self::Files(farm) => {
                let mut count = 0;
                walk(&farm.farm_dir().join("logs"), &mut |_| count += 1);
                Ok(count)
            }
            Self::Shared(_) => {
                let mut left = 0;
                for table in ["log_chunks", "log_parts", "log_seals"] {
                    left += self.number(&format!("SELECT COUNT(*) FROM {table}")).await?;
                }
                Ok(left)
            }
        }
    }

    async fn number(&self, text: &str) -> Result<i64> {
        let text = AssertSqlSafe(text.to_owned());
        match self {
            Self::Files(farm) => {
                let path = farm.farm_dir().join("alloy.db");
                let mut conn = SqliteConnection::connect(path.to_str().context("a path is text")?).await?;
                Ok(sqlx::query_scalar(text).fetch_one(&mut conn).await?)
            }
            Self::Shared(farm) => {
                let mut conn = PgConnection::connect(&farm.database).await?;
                Ok(sqlx::query_scalar(text).fetch_one(&mut conn).await?)
            }
        }
    }

    /// The objects that the books name.
    async fn named(&self) -> Result<BTreeSet<String>> {
        let text = "SELECT DISTINCT object FROM blobs";
        let found: Vec<String> = match self {
            Self::Files(farm) => {
                let path = farm.farm_dir().join("alloy.db");
                let mut conn = SqliteConnection::connect(path.to_str().context("a path is text")?).await?;
                sqlx::query_scalar(text).fetch_all(&mut conn).await?
            }
            Self::Shared(farm) => {
                let mut conn = PgConnection::connect(&farm.database).await?;
                sqlx::query_scalar(text).fetch_all(&mut conn).await?
            }
        };
        Ok(found.into_iter().collect())
    }

    /// `kill -9` of one orchestrator.
    fn kill(&mut self, number: usize) {
        match self {
            Self::Files(farm) => farm.kill_orchestrator(),
            Self::Shared(farm) => farm.kill_orchestrator(number),
        }
    }

    async fn start(&mut self, number: usize) -> Result<()> {
        match self {
            Self::Files(farm) => farm.start_orchestrator().await,
            Self::Shared(farm) => farm.start_orchestrator(number).await,
        }
    }

    /// A job that has the only slot until the gate opens.
    async fn block(&self) -> Result<(String, PathBuf)> {
        let (api, gate) = (self.api(), self.dir().join("gate"));
        let id = api.shell(&format!("while [ ! -e {} ]; do sleep 0.05; done", gate.display())).await?;
        until("it runs", async || Ok((api.job(&id).await?["state"] == "running").then_some(()))).await;
        Ok((id, gate))
    }
}

fn walk(dir: &Path, each: &mut impl FnMut(&Path)) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { walk(&path, each) } else { each(&path) }
    }
}

/// The status of a request, and the problem that it is answered with.
async fn problem(api: &Api, path: &str) -> Result<(StatusCode, Value)> {
    let answer = api.request(Method::GET, path).send().await?;
    let status = answer.status();
    Ok((status, serde_json::from_slice(&answer.bytes().await?).unwrap_or(Value::Null)))
}

async fn until_gone(api: &Api, path: &str, code: StatusCode) -> Value {
    until(&format!("{path} is {code}"), async || {
        let (status, body) = problem(api, path).await?;
        Ok((status == code).then_some(body))
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_files_what_is_old_goes_and_says_so_and_what_is_needed_stays() -> Result<()> {
    goes_and_stays(files().await?).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_several_orchestrators_what_is_old_goes_and_says_so_and_what_is_needed_stays() -> Result<()> {
    goes_and_stays(shared().await?).await
}

async fn goes_and_stays(place: Place) -> Result<()> {
    let idle = place.tree("idle")?;
    runs(&place, &idle).await?;
    let api = place.api();
    let old = api.get("/v1/jobs").await?["jobs"][0]["id"].as_str().context("an id")?.to_owned();
    let (blocker, waits) = files_go(&place, &old).await?;
    logs_go(&place, &old).await?;

    let (code, shown, _) = place.alloy(&["admin", "retention", "set", "--jobs", "1", "--logs", "farm"]).await?;
    ensure!(code == 0 && shown.contains("logs\tfor ever\tthe farm\n"), "{shown}");
    for id in [&old, &waits, &blocker] {
        until_gone(&api, &format!("/v1/jobs/{id}"), StatusCode::NOT_FOUND).await;
    }
    let (code, _, said) = place.alloy(&["status", &old]).await?;
    ensure!(code == 5, "{said}");
    until("nothing is left", async || {
        let left = (place.objects()?, place.logs_left().await?);
        ensure!(left == (BTreeSet::new(), 0), "{left:?}");
        Ok(Some(()))
    })
    .await;

    // What has gone can come again.
    place.alloy(&["admin", "retention", "set", "--jobs", "farm", "--artifacts", "farm", "--sources", "farm"]).await?;
    runs(&place, &idle).await?;
    assert_eq!(std::fs::read(newest(&idle.join("alloy-out"))?.join("out.txt"))?, std::fs::read(idle.join("a.txt"))?);
    Ok(())
}

/// A job that leaves a log and an artifact.
async fn runs(place: &Place, tree: &Path) -> Result<()> {
    let run = ["run", "-c", "cp a.txt out.txt; echo the log", "--artifact", "out.txt"];
    let out = output(place.alloy_in(tree, &run)).await?;
    ensure!(out.status.code() == Some(0) && out.stdout == b"the log\n", "{out:?}");
    Ok(())
}

/// Artifacts and sources become old; a job that waits keeps its own. Returns it, and the one that it waited for.
async fn files_go(place: &Place, old: &str) -> Result<(String, String)> {
    let api = place.api();
    let (blocker, gate) = place.block().await?;
    let source = upload_tree(&api, &place.tree("needed")?).await?;
    let body = json!({ "spec": { "shell": "cat a.txt" }, "source": source });
    let waits = api.post("/v1/jobs", &body).await?["id"].as_str().context("an id")?.to_owned();

    let (code, shown, said) = place.alloy(&["admin", "retention", "show"]).await?;
    ensure!(code == 0 && shown.matches("\tfor ever\tthe farm\n").count() == 4, "{shown}{said}");
    let (code, shown, said) = place.alloy(&["admin", "retention", "set", "--artifacts", "1", "--sources", "1"]).await?;
    ensure!(
        code == 0 && shown.contains("\t1 day\tyou; the farm: for ever\n") && said.contains("within an hour"),
        "{shown}{said}"
    );

    let files = format!("/v1/jobs/{old}/artifacts");
    let told = until_gone(&api, &files, StatusCode::GONE).await;
    assert_eq!(told["code"], "gone", "{told}");
    ensure!(told["message"].as_str().is_some_and(|text| text.contains("removed on 20")), "{told}");
    ensure!(told["hint"].as_str().is_some_and(|text| text.contains("alloy admin retention show")), "{told}");
    assert_eq!(problem(&api, &format!("{files}/out.txt")).await?.0, StatusCode::GONE);
    for args in [vec!["artifacts", old], vec!["artifacts", "get", old]] {
        in_one_line(place, &args, "the artifacts of attempt 1").await?;
    }
    assert_eq!(place.alloy(&["logs", old]).await?.1, "the log\n", "the log is kept for ever");

    // Both trees were used last at the same time or so; only one of them goes, with its bytes.
    until("of two sources one is left, and no artifact", async || {
        let left = place.objects()?;
        let count = |word: &str| left.iter().filter(|name| name.contains(word)).count();
        Ok((count("/manifests/") == 1 && count("/artifacts/") == 0 && count("/packs/") == 1).then_some(()))
    })
    .await;
    std::fs::write(&gate, "")?;
    assert_eq!(api.end(&waits).await["state"], "succeeded");
    assert_eq!(
        api.log(&waits).await?,
        "needed\n".repeat(20).as_bytes(),
        "it waited for days, and had all that it came with"
    );
    api.end(&blocker).await;
    Ok((blocker, waits))
}

async fn logs_go(place: &Place, old: &str) -> Result<()> {
    let api = place.api();
    place.alloy(&["admin", "retention", "set", "--logs", "1"]).await?;
    let told = until_gone(&api, &format!("/v1/jobs/{old}/log"), StatusCode::GONE).await;
    ensure!(told["message"].as_str().is_some_and(|text| text.starts_with("the log of attempt 1")), "{told}");
    in_one_line(place, &["logs", old], "the log of attempt 1").await?;
    assert_eq!(place.alloy(&["status", old]).await?.0, 0, "the job itself is kept for ever");
    let attached = output(place.alloy_in(&place.dir().join("home"), &["attach", old])).await?;
    ensure!(attached.status.code() == Some(0) && attached.stdout.is_empty(), "its feed has an end: {attached:?}");
    Ok(())
}

fn newest(dir: &Path) -> Result<PathBuf> {
    let all: BTreeSet<PathBuf> = std::fs::read_dir(dir)?.flatten().map(|entry| entry.path()).collect();
    all.into_iter().next_back().context("something was downloaded")
}

/// A command about something that has gone says so in one line, then what to do; nothing on standard output.
async fn in_one_line(place: &Place, args: &[&str], what: &str) -> Result<()> {
    let (code, shown, said) = place.alloy(args).await?;
    let lines: Vec<&str> = said.lines().collect();
    ensure!(code == 5 && shown.is_empty(), "{args:?}: {code} {shown}{said}");
    ensure!(lines[1..].iter().all(|line| line.starts_with("  ")), "{args:?}: {said}");
    ensure!(lines.len() <= 3 && lines[0].contains(what) && lines[0].contains("removed on 20"), "{args:?}: {said}");
    let json: Vec<&str> = ["--json"].into_iter().chain(args.iter().copied()).collect();
    let (code, _, said) = place.alloy(&json).await?;
    let told: Value = serde_json::from_str(said.trim()).with_context(|| said.clone())?;
    ensure!(code == 5 && told["code"] == "gone", "{told}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn days_that_make_no_sense_are_refused_by_name() -> Result<()> {
    let farm = Farm::start(Setup { workers: 0, ..Setup::default() }).await?;
    let api = farm.api();
    let put = async |body: Value| -> Result<(StatusCode, Value)> {
        let answer = api.request(Method::PUT, "/v1/retention").json(&body).send().await?;
        Ok((answer.status(), answer.json().await?))
    };
    let shown = api.get("/v1/retention").await?;
    assert_eq!(shown["jobs"], json!({ "days": 90, "own": false, "farm_days": 90 }), "{shown}");
    let (status, told) = put(json!({ "logs_days": 36_501 })).await?;
    assert_eq!((status, &told["code"]), (StatusCode::BAD_REQUEST, &json!("invalid_body")), "{told}");
    assert_eq!(told["errors"][0]["field"], "logs_days", "{told}");
    ensure!(told["message"].as_str().is_some_and(|text| text.contains("36500")) && told["hint"].is_string(), "{told}");
    for wrong in [json!({ "logs_days": -1 }), json!({ "logs": 1 }), json!({ "jobs_days": "all" })] {
        let (status, told) = put(wrong).await?;
        assert_eq!((status, &told["code"]), (StatusCode::BAD_REQUEST, &json!("invalid_body")), "{told}");
    }
    assert_eq!(api.get("/v1/retention").await?, shown, "nothing of it was taken");
    let (status, set) = put(json!({ "jobs_days": 365, "sources_days": 0 })).await?;
    assert_eq!((status, &set["jobs"]), (StatusCode::OK, &json!({ "days": 365, "own": true, "farm_days": 90 })));
    assert_eq!((&set["sources"]["days"], &set["logs"]["own"]), (&json!(0), &json!(false)));
    let out = output(farm.alloy(&["admin", "retention", "set", "--logs", "30d"])).await?;
    assert_eq!(out.status.code(), Some(2), "{out:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_farm_that_is_killed_while_it_removes_things_leaves_nothing_half() -> Result<()> {
    is_killed(files().await?).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whichever_of_several_orchestrators_is_killed_while_it_removes_things_leaves_nothing_half() -> Result<()> {
    is_killed(shared().await?).await
}

async fn is_killed(mut place: Place) -> Result<()> {
    let api = place.api();
    let (blocker, gate) = place.block().await?;
    let source = upload_tree(&api, &place.tree("needed")?).await?;
    let body = json!({ "spec": { "shell": "cat a.txt" }, "source": source });
    let waits = api.post("/v1/jobs", &body).await?["id"].as_str().context("an id")?.to_owned();
    // So many that their removal outlasts the kills.
    let idle = 200;
    for n in 0..idle {
        upload_tree(&api, &place.tree(&format!("idle-{n}"))?).await?;
    }
    let stray = place.bytes_dir().join(STRAY);
    std::fs::create_dir_all(stray.parent().context("a directory")?)?;
    std::fs::write(&stray, "an upload that was cut off")?;
    let all = place.objects()?.len();
    assert_eq!(all, 2 * (idle + 1) + 1, "a manifest and a pack each, and the stray one");

    place.alloy(&["admin", "retention", "set", "--sources", "1"]).await?;
    let (mut left, mut hits) = (all, 0);
    for kill in 0..5 {
        until("some more have gone", async || {
            let now = place.objects()?.len();
            Ok((now + 6 <= left || now == 2).then_some(()))
        })
        .await;
        // Of two it is the one at work, but for the first time perhaps: the other one has only just come back.
        place.kill(kill % 2);
        let (objects, named) = (place.objects()?, place.named().await?);
        ensure!(named.is_subset(&objects), "kill {kill}: {:?} are named and not there", named.difference(&objects));
        hits += usize::from(objects.len() > 2);
        left = objects.len();
        place.start(kill % 2).await?;
    }
    ensure!(hits >= 2, "{hits} kills met it at work");
    until("what nobody needs has gone, the stray object too", async || {
        let (objects, named) = (place.objects()?, place.named().await?);
        ensure!(objects == named && objects.len() == 2, "{objects:?} {named:?}");
        Ok(Some(()))
    })
    .await;
    std::fs::write(&gate, "")?;
    assert_eq!(api.end(&waits).await["state"], "succeeded");
    assert_eq!(api.log(&waits).await?, "needed\n".repeat(20).as_bytes());
    assert_eq!(api.end(&blocker).await["state"], "succeeded");
    Ok(())
}
