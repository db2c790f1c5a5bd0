//! What `alloy` says to programs and to people who typed something else than they meant.

use alloy_tests::farm::{Farm, Setup, output};
use alloy_tests::observe::{PATIENCE, until};
use alloy_tests::process::Daemon;
use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{Alone, text, told};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_json_every_line_on_stderr_is_json_and_the_last_is_the_error() -> Result<()> {
    let farm = Farm::start(Setup::default()).await?;
    let cases: [(&[&str], i32, &str); 7] = [
        (&["--json", "run"], 2, "usage"),
        (&["run", "make", "--json"], 2, "usage"),
        (&["--json", "rnu"], 2, "usage"),
        (&["--json", "list", "--state", "lost"], 2, "usage"),
        (&["--json", "run", "--env", "1A=x", "-c", "true"], 2, "usage"),
        (&["--json", "run", "--label", "planet=mars", "-c", "true"], 125, "no_such_worker"),
        (&["--json", "status", "zzzzzz"], 5, "not_found"),
    ];
    for (args, exit, code) in cases {
        let out = output(farm.alloy(args)).await?;
        assert_eq!(out.status.code(), Some(exit), "{args:?}: {}", told(&out));
        let lines = text(&out.stderr);
        let lines = lines.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>();
        let lines = lines.with_context(|| told(&out))?;
        let [error] = lines.as_slice() else { panic!("{args:?}: {}", told(&out)) };
        assert_eq!((error["type"].as_str(), error["code"].as_str()), (Some("error"), Some(code)), "{error}");
        assert_eq!((error["exit_code"].as_i64(), error["exit_origin"].as_str()), (Some(exit.into()), Some("alloy")));
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{error}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_job_is_refused_before_its_tree_is_packed_and_in_words_of_the_command_line() -> Result<()> {
    let alone = Alone::new()?;
    // Nobody is asked: there is no farm.
    let out = output(alone.alloy(&["run", "--env", "1A=x", "--artifact", "/etc/*", "-c", "true"])).await?;
    assert_eq!(out.status.code(), Some(2), "{}", told(&out));
    let said = text(&out.stderr);
    assert!(said.contains("--env 1A ") && said.contains("--artifact (number 1) "), "{said}");
    assert!(!said.contains("packing") && said.matches("1A").count() == 1, "{said}");
    let out = output(alone.alloy(&["help"])).await?;
    assert!(out.status.success() && text(&out.stdout).contains("Usage: alloy"), "{}", told(&out));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn local_says_what_to_do_about_an_orchestrator_on_its_data_directory() -> Result<()> {
    let farm = Farm::orchestrator_only(Setup::default()).await?;
    let mut run = farm.command("alloy");
    run.args(["run", "--local", "-c", "true"]).current_dir(farm.scratch("tree")?);
    let out = output(run).await?;
    assert_eq!(out.status.code(), Some(125), "{}", told(&out));
    let said = text(&out.stderr);
    assert!(said.contains("an orchestrator (process ") && said.contains("alloy login "), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_waits_for_a_named_farm_that_restarts() -> Result<()> {
    let mut farm = Farm::start(Setup::default()).await?;
    for (name, word) in [("empty", "waiting for it"), ("full", "waiting for it")] {
        let tree = farm.scratch(name)?;
        if name == "full" {
            std::fs::write(tree.join("file"), "content")?;
        }
        farm.kill_orchestrator();
        let mut run = farm.alloy(&["run", "-c", "echo it ran"]);
        run.current_dir(&tree);
        let mut run = Daemon::start(name, run, &farm.scratch("logs")?.join(name))?;
        until("it waits", async || Ok(run.log_text().contains(word).then_some(()))).await;
        farm.start_orchestrator().await?;
        let status = run.wait(PATIENCE)?;
        assert_eq!(status.code(), Some(0), "{}", run.log_text());
        assert!(run.log_text().contains("it ran\n"), "{}", run.log_text());
        assert_eq!(run.log_text().matches(word).count(), 1, "one line: {}", run.log_text());
    }
    farm.all_connected().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_not_heard_is_named_once_and_once_more_when_it_is_back() -> Result<()> {
    let mut farm = Farm::start(Setup { time_scale: 4, ..Setup::default() }).await?;
    let gate = farm.dir().join("gate");
    let line = format!("echo up; while [ ! -e {} ]; do sleep 0.05; done", gate.display());
    let mut run = Daemon::start("run", farm.alloy(&["run", "-c", &line]), &farm.scratch("logs")?.join("run"))?;
    until("the command runs", async || Ok(run.log_text().contains("up\n").then_some(()))).await;
    farm.worker(0).signal(nix::sys::signal::Signal::SIGSTOP);
    until("the farm says it", async || Ok(run.log_text().contains("was not heard for").then_some(()))).await;
    let job = farm.api().get("/v1/jobs").await?["jobs"][0].clone();
    let workers = farm.api().get("/v1/workers").await?;
    farm.worker(0).signal(nix::sys::signal::Signal::SIGCONT);
    assert_eq!(job["worker_state"], "suspect", "{job}");
    assert_eq!(workers["workers"][0]["state"], "suspect", "{workers}");
    until("it is back", async || Ok(run.log_text().contains("is heard again").then_some(()))).await;
    std::fs::write(&gate, "")?;
    assert_eq!(run.wait(PATIENCE)?.code(), Some(0), "{}", run.log_text());
    let said = run.log_text();
    assert_eq!((said.matches("was not heard for").count(), said.matches("is heard again").count()), (1, 1), "{said}");
    assert!(said.contains("counts as lost at 20"), "{said}");
    let id = job["id"].as_str().context("a job")?;
    let kinds = farm.api().events(id).await?;
    assert!(kinds.iter().all(|event| event["type"] != "worker"), "it is not in the books: {kinds:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn source_ls_lists_what_a_run_would_refuse_and_marks_it() -> Result<()> {
    let alone = Alone::new()?;
    std::fs::write(alone.tree().join("fine"), "1")?;
    std::fs::write(alone.tree().join(".env"), "TOKEN=1")?;
    let out = output(alone.alloy(&["source", "ls"])).await?;
    assert_eq!(out.status.code(), Some(0), "{}", told(&out));
    assert_eq!(text(&out.stdout), ".env  (secret: environment variables)\nfine\n", "{}", told(&out));
    assert!(text(&out.stderr).contains("1 file looks like a secret"), "{}", told(&out));
    let out = output(alone.alloy(&["source", "ls", "--json"])).await?;
    let lines = text(&out.stdout).lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>()?;
    assert_eq!((&lines[0]["secret"], &lines[1]["secret"]), (&"environment variables".into(), &Value::Null));
    let out = output(alone.alloy(&["source", "ls", "--allow-secret-files"])).await?;
    assert!(!text(&out.stderr).contains("refuses"), "{}", told(&out));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_time_out_beyond_the_farms_limit_is_refused_before_the_tree_is_packed() -> Result<()> {
    let farm = Farm::orchestrator_only(Setup::default()).await?;
    let tree = farm.scratch("tree")?;
    std::fs::write(tree.join("file"), "content")?;
    let mut run = farm.alloy(&["run", "--timeout", "9999h", "-c", "true"]);
    run.current_dir(&tree);
    let out = output(run).await?;
    assert_eq!(out.status.code(), Some(125), "{}", told(&out));
    let said = text(&out.stderr);
    assert!(said.contains("--timeout is at most ") && !said.contains("packing"), "{}", told(&out));
    Ok(())
}
