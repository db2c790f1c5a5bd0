//! `alloy` as its user meets it: pipes, exit codes, artifacts, terminals, sources that must not go.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use alloy_shared::secret::{Token, TokenKind};
use alloy_tests::farm::{Farm, Provider, Setup, bin_dir, isolated, output};
use alloy_tests::noise::sha256_of;
use alloy_tests::process::processes_in;
use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

mod admin;
mod artifacts;
mod leaving;
mod local;
mod lost;
mod refused;
mod terminal;
mod words;

on_every_provider! {
    two_runs_at_once_put_their_own_jobs_output_on_stdout_as_written_and_exit_with_its_code,
    a_command_gets_arguments_as_they_are_and_no_shell_touches_them,
    uncommitted_edits_go_there_and_the_artifact_comes_back_byte_for_byte,
    the_exit_codes_are_those_of_the_table,
}

/// `alloy` without any farm, in a home of its own. Checks at the end that no process is left.
struct Alone(TempDir);

impl Alone {
    fn new() -> Result<Alone> {
        let dir = tempfile::Builder::new().prefix("alloy-alone-").tempdir()?;
        fs::create_dir(dir.path().join("home"))?;
        fs::create_dir(dir.path().join("tree"))?;
        Ok(Alone(dir))
    }

    fn tree(&self) -> std::path::PathBuf {
        self.0.path().join("tree")
    }

    fn data(&self) -> std::path::PathBuf {
        self.0.path().join("data")
    }

    fn alloy(&self, args: &[&str]) -> Command {
        let mut command = isolated(&bin_dir().join("alloy"), self.0.path());
        command.args(args).current_dir(self.tree());
        command
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        let left = processes_in(self.0.path());
        left.iter().for_each(|found| alloy_tests::process::signal(found.pid, nix::sys::signal::Signal::SIGKILL));
        assert!(left.is_empty() || std::thread::panicking(), "left over: {left:#?}");
    }
}

/// A token of the right form that no farm knows.
fn stranger() -> Token {
    Token::mint(TokenKind::Personal, [42; 32])
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn told(out: &Output) -> String {
    format!("exit {:?}\n--- stdout\n{}\n--- stderr\n{}", out.status.code(), text(&out.stdout), text(&out.stderr))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_local_run_puts_the_jobs_output_on_stdout_its_own_talk_on_stderr_and_exits_with_its_code() -> Result<()> {
    let alone = Alone::new()?;
    let out = output(alone.alloy(&["run", "--local", "-c", "echo out; echo err >&2; exit 7"])).await?;
    assert_eq!(text(&out.stdout), "out\nerr\n", "{}", told(&out));
    assert_eq!(out.status.code(), Some(7), "{}", told(&out));
    assert!(text(&out.stderr).contains("no isolation"), "{}", told(&out));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_local_runs_at_once_both_work() -> Result<()> {
    let alone = Alone::new()?;
    let run = |word: &str| output(alone.alloy(&["run", "--local", "-c", &format!("sleep 0.5; echo {word}")]));
    let (one, two) = tokio::try_join!(run("one"), run("two"))?;
    assert_eq!((one.status.code(), text(&one.stdout)), (Some(0), "one\n".into()), "{}", told(&one));
    assert_eq!((two.status.code(), text(&two.stdout)), (Some(0), "two\n".into()), "{}", told(&two));
    let list = output(alone.alloy(&["list", "--local", "--json"])).await?;
    let jobs: Value = serde_json::from_slice(&list.stdout).with_context(|| told(&list))?;
    assert_eq!(jobs["jobs"].as_array().map(Vec::len), Some(2), "both are in the same books: {jobs}");
    Ok(())
}

async fn two_runs_at_once_put_their_own_jobs_output_on_stdout_as_written_and_exit_with_its_code(
    provider: Provider,
) -> Result<()> {
    let farm = Farm::start(Setup::default().on(provider)).await?;
    let run = |line: &str| output(farm.alloy(&["run", "-c", line]));
    let lines = "i=0; while [ $i -lt 200 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done; exit 3";
    let (one, two) = tokio::try_join!(run("echo out; echo err >&2; exit 7"), run(lines))?;
    assert_eq!((one.status.code(), text(&one.stdout)), (Some(7), "out\nerr\n".into()), "{}", told(&one));
    let both: String = (0..200).map(|i| format!("out {i}\nerr {i}\n")).collect();
    assert_eq!((two.status.code(), text(&two.stdout)), (Some(3), both), "{}", told(&two));
    Ok(())
}

async fn a_command_gets_arguments_as_they_are_and_no_shell_touches_them(provider: Provider) -> Result<()> {
    let farm = Farm::start(Setup::default().on(provider)).await?;
    let tree = farm.scratch("tree")?;
    let mut run = farm.alloy(&["run", "--", "printf", "[%s]", "a b", "$HOME", "*", "it's"]);
    run.current_dir(&tree);
    let out = output(run).await?;
    assert_eq!(text(&out.stdout), "[a b][$HOME][*][it's]", "{}", told(&out));
    Ok(())
}

async fn uncommitted_edits_go_there_and_the_artifact_comes_back_byte_for_byte(provider: Provider) -> Result<()> {
    let farm = Farm::start(Setup { workers: 2, ..Setup::default() }.on(provider)).await?;
    let tree = farm.scratch("tree")?;
    git(&tree, &["init", "-q"])?;
    fs::write(tree.join("text"), "committed")?;
    fs::write(tree.join(".gitignore"), "ignored\n")?;
    fs::write(tree.join("script.sh"), "#!/bin/sh\ncat text; cat new; ls ignored\n")?;
    std::os::unix::fs::symlink("text", tree.join("link"))?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(tree.join("script.sh"), mode)?;
    git(&tree, &["add", "."])?;
    git(&tree, &["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"])?;
    fs::write(tree.join("text"), "edited ")?;
    fs::write(tree.join("new"), "untracked ")?;
    fs::write(tree.join("ignored"), "stays here")?;

    let command = "./script.sh; readlink link; mkdir -p out; head -c 3000000 /dev/urandom > out/app; chmod +x out/app; \
                   sha256sum out/app";
    let mut run = farm.alloy(&["run", "--artifact", "out/**", "-c", command]);
    run.current_dir(&tree);
    let out = output(run).await?;
    let log = text(&out.stdout);
    assert!(log.starts_with("edited untracked ") && log.contains("ignored"), "{}", told(&out));
    assert!(log.contains("\ntext\n"), "the link is a link there: {}", told(&out));
    let there = log.lines().last().and_then(|line| line.split(' ').next()).context("a digest")?;
    let here = tree.join("alloy-out/latest/out/app");
    assert_eq!(sha256_of(&fs::read(&here)?), there, "{}", told(&out));
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&here)?.permissions());
    assert_eq!(mode & 0o777, 0o755);
    ensure!(out.status.success(), told(&out));
    let again = git(&tree, &["status", "--porcelain", "alloy-out"])?;
    assert_eq!(again, "", "what was downloaded ignores itself");
    Ok(())
}

fn git(tree: &Path, args: &[&str]) -> Result<String> {
    let out = Command::new("git").args(args).current_dir(tree).env("GIT_CONFIG_GLOBAL", "/dev/null").output()?;
    ensure!(out.status.success(), "git {args:?}: {}", told(&out));
    Ok(text(&out.stdout))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn json_output_is_json_and_says_whose_exit_code_it_is() -> Result<()> {
    let farm = Farm::start(Setup::default()).await?;
    let tree = farm.scratch("tree")?;
    // Where its artifacts should go there will be a file.
    let late = format!("echo x > a; echo mine > {}/alloy-out", tree.display());
    for (command, code, origin) in [("exit 125", 125, "command"), ("true", 0, "command"), (&late, 1, "alloy")] {
        let mut run = farm.alloy(&["run", "--json", "--artifact", "a", "-c", command]);
        run.current_dir(&tree);
        let out = output(run).await?;
        assert_eq!(out.status.code(), Some(code), "{}", told(&out));
        let last = text(&out.stdout).lines().last().map(str::to_owned).context("output")?;
        let end: Value = serde_json::from_str(&last).with_context(|| told(&out))?;
        let end = if end["exit_code"].is_null() { end["job"].clone() } else { end };
        assert_eq!(
            (end["exit_code"].as_i64(), end["exit_origin"].as_str()),
            (Some(code.into()), Some(origin)),
            "{last}"
        );
    }
    Ok(())
}

async fn the_exit_codes_are_those_of_the_table(provider: Provider) -> Result<()> {
    let farm = Farm::start(Setup::default().on(provider)).await?;
    let cases: [(&[&str], i32); 9] = [
        (&["run", "--timeout", "2s", "-c", "sleep 60"], 124),
        (&["run", "-c", "kill -TERM $$"], 143),
        (&["run", "--artifact", "=missing/*", "-c", "true"], 1),
        (&["run"], 2),
        (&["run", "--no-such-flag"], 2),
        (&["run", "--label", "planet=mars", "-c", "true"], 125),
        (&["status", "job_00000000000000000000000001"], 5),
        (&["logs", "zzzzzz"], 5),
        (&["list"], 0),
    ];
    for (args, code) in cases {
        let out = output(farm.alloy(args)).await?;
        assert_eq!(out.status.code(), Some(code), "alloy {args:?}: {}", told(&out));
    }
    let mut stranger = farm.alloy(&["list"]);
    stranger.env_remove("ALLOY_TOKEN");
    let out = output(stranger).await?;
    assert_eq!(out.status.code(), Some(4), "{}", told(&out));
    assert!(text(&out.stderr).contains("alloy login"), "{}", told(&out));
    let mut stranger = farm.alloy(&["run", "-c", "true"]);
    let unknown = self::stranger();
    stranger.env("ALLOY_TOKEN", unknown.expose());
    let out = output(stranger).await?;
    assert_eq!(out.status.code(), Some(125), "{}", told(&out));
    assert!(!told(&out).contains(unknown.expose()), "{}", told(&out));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_farm_out_of_reach_is_125_from_run_and_7_elsewhere_with_a_hint() -> Result<()> {
    let alone = Alone::new()?;
    for (args, code) in
        [(&["run", "-c", "true"][..], 125), (&["list"], 7), (&["token", "list"], 7), (&["worker", "list"], 7)]
    {
        let mut command = alone.alloy(args);
        // A port that nobody listens on: it was free a moment ago and is the discard service's.
        command.env("ORCHESTRATOR_URL", "http://127.0.0.1:9").env("ALLOY_TOKEN", stranger().expose());
        let out = output(command).await?;
        assert_eq!(out.status.code(), Some(code), "alloy {args:?}: {}", told(&out));
        let said = text(&out.stderr);
        assert!(said.contains("127.0.0.1:9") && said.contains("hint"), "alloy {args:?}: {}", told(&out));
        assert_eq!(said.contains("waiting for it, up to 12s"), args[0] == "run", "alloy {args:?}: {}", told(&out));
        assert_eq!(text(&out.stdout), "", "talk goes to stderr");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sources_that_must_not_go_are_refused_by_name() -> Result<()> {
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::net::UnixListener;
    let farm = Farm::start(Setup::default()).await?;
    type Make = fn(&Path) -> Result<()>;
    let cases: [(&str, Make, &str); 4] = [
        ("fifo", |tree| Ok(nix::unistd::mkfifo(&tree.join("a-fifo"), nix::sys::stat::Mode::S_IRWXU)?), "a-fifo"),
        ("socket", |tree| Ok(UnixListener::bind(tree.join("a-socket")).map(drop)?), "a-socket"),
        ("name", |tree| Ok(fs::write(tree.join(std::ffi::OsStr::from_bytes(b"bad-\xff-name")), "")?), "bad-"),
        (
            "key",
            |tree| Ok(fs::write(tree.join("id_ed25519"), "-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n")?),
            "id_ed25519",
        ),
    ];
    for (name, make, named) in cases {
        let tree = farm.scratch(name)?;
        fs::write(tree.join("good"), "")?;
        make(&tree)?;
        let mut run = farm.alloy(&["run", "-c", "echo ran"]);
        run.current_dir(&tree);
        let out = output(run).await?;
        assert_eq!(out.status.code(), Some(125), "{name}: {}", told(&out));
        assert!(text(&out.stderr).contains(named), "{name}: {}", told(&out));
        assert_eq!(text(&out.stdout), "", "{name}");
    }
    assert_eq!(farm.api().get("/v1/jobs").await?["jobs"], serde_json::json!([]), "no job was made");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn detach_attach_logs_status_list_cancel_and_artifacts_speak_of_the_same_job() -> Result<()> {
    let farm = Farm::start(Setup::default()).await?;
    let tree = farm.scratch("tree")?;
    let alloy = async |args: &[&str]| {
        let mut command = farm.alloy(args);
        command.current_dir(&tree);
        output(command).await
    };
    let out = alloy(&["run", "--detach", "--artifact", "a.txt", "-c", "echo hello; echo content > a.txt"]).await?;
    let id = text(&out.stdout).trim().to_owned();
    assert!(id.starts_with("job_") && out.status.success(), "{}", told(&out));
    let tail = &id[id.len() - 8..];
    // An id, its last characters, a URL, or nothing: my latest job here.
    let url = format!("{}/jobs/{id}", farm.url());
    for name in [Some(id.as_str()), Some(tail), Some(&url), None] {
        let args: Vec<_> = ["attach"].into_iter().chain(name).collect();
        let out = alloy(&args).await?;
        assert_eq!((text(&out.stdout).as_str(), out.status.code()), ("hello\n", Some(0)), "{name:?}: {}", told(&out));
    }
    let out = alloy(&["logs", tail]).await?;
    assert_eq!(text(&out.stdout), "hello\n", "{}", told(&out));
    let out = alloy(&["status", tail, "--json"]).await?;
    let status: Value = serde_json::from_slice(&out.stdout).with_context(|| told(&out))?;
    assert_eq!((status["id"].as_str(), status["state"].as_str()), (Some(id.as_str()), Some("succeeded")));
    let out = alloy(&["list"]).await?;
    assert!(text(&out.stdout).contains(tail), "{}", told(&out));
    let out = alloy(&["artifacts", "get", tail, "a.txt", "-o", "-"]).await?;
    assert_eq!(text(&out.stdout), "content\n", "{}", told(&out));
    let out = alloy(&["cancel", tail]).await?;
    assert!(text(&out.stderr).contains("already"), "{}", told(&out));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_that_names_no_job_ends_none() -> Result<()> {
    let farm = Farm::start(Setup::default()).await?;
    let tree = farm.scratch("tree")?;
    let alloy = async |args: &[&str]| {
        let mut command = farm.alloy(args);
        command.current_dir(&tree);
        output(command).await
    };
    let out = alloy(&["run", "--detach", "-c", "sleep 600"]).await?;
    let id = text(&out.stdout).trim().to_owned();
    for (args, said) in
        [(&["cancel"][..], "--latest"), (&["cancel", ""], "names no job"), (&["cancel", &id, ""], "names no job")]
    {
        let out = alloy(args).await?;
        assert_eq!(out.status.code(), Some(2), "{args:?}: {}", told(&out));
        assert!(text(&out.stderr).contains(said), "{args:?}: {}", told(&out));
        let job = farm.api().job(&id).await?;
        assert!(job["finished_at"].is_null() && job["state"] != "canceling", "{args:?}: {job}");
    }
    let out = alloy(&["cancel", "--latest"]).await?;
    assert_eq!(out.status.code(), Some(0), "{}", told(&out));
    assert_eq!(farm.api().end(&id).await["state"], "canceled");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tree_that_changes_while_it_is_read_is_noticed_and_named() -> Result<()> {
    use std::io::Write as _;
    use std::sync::atomic::{AtomicBool, Ordering};
    let farm = Farm::start(Setup::default()).await?;
    let tree = farm.scratch("tree")?;
    let path = tree.join("restless.log");
    fs::write(&path, vec![7; 32 << 20])?;
    let stop = std::sync::Arc::new(AtomicBool::new(false));
    let (stopped, grown) = (stop.clone(), path.clone());
    let writer = std::thread::spawn(move || -> Result<()> {
        let mut file = fs::File::options().append(true).open(grown)?;
        while !stopped.load(Ordering::Relaxed) {
            file.write_all(b"more\n")?;
        }
        Ok(())
    });
    let mut run = farm.alloy(&["run", "-c", "true"]);
    run.current_dir(&tree);
    let out = output(run).await?;
    stop.store(true, Ordering::Relaxed);
    writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    assert_eq!(out.status.code(), Some(125), "{}", told(&out));
    assert!(text(&out.stderr).contains("restless.log"), "{}", told(&out));
    Ok(())
}

/// What happened, without times and names.
fn story(out: &Output) -> Result<Vec<String>> {
    let lines = text(&out.stdout);
    let frames = lines.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>()?;
    let events = frames.iter().filter(|frame| frame["type"] == "event");
    Ok(events.map(|e| format!("{} {} {} {}", e["kind"], e["state"], e["phase"], e["attempt"])).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_local_run_has_the_same_events_as_one_over_separate_processes() -> Result<()> {
    let (farm, alone) = (Farm::start(Setup::default()).await?, Alone::new()?);
    for command in ["echo x > a", "exit 3"] {
        let args = ["run", "--json", "--artifact", "a", "-c", command];
        let apart = output(farm.alloy(&args)).await?;
        let local = output(alone.alloy(&[&["run", "--local"], &args[1..]].concat())).await?;
        let (apart, local) =
            (story(&apart).with_context(|| told(&apart))?, story(&local).with_context(|| told(&local))?);
        assert!(apart.len() >= 6, "{apart:?}");
        assert_eq!(apart, local, "{command}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_farm_of_alloy_up_serves_other_commands_until_it_is_stopped() -> Result<()> {
    let alone = Alone::new()?;
    let mut up = alloy_tests::process::Daemon::start(
        "up",
        alone.alloy(&["up", "--listen", "127.0.0.1:0"]),
        &alone.0.path().join("up.log"),
    )?;
    let ready = alloy_tests::observe::until_blocking("alloy up is ready", alloy_tests::observe::PATIENCE, || {
        up.log_text().contains("http://") || up.has_ended().is_some()
    });
    ready.with_context(|| up.log_text())?;
    let out = output(alone.alloy(&["run", "--local", "-c", "echo over there"])).await?;
    assert_eq!(
        (text(&out.stdout).as_str(), out.status.code()),
        ("over there\n", Some(0)),
        "{}\n{}",
        told(&out),
        up.log_text()
    );
    let out = output(alone.alloy(&["run", "--local", "--detach", "-c", "true"])).await?;
    assert_eq!(out.status.code(), Some(2), "{}", told(&out));
    assert!(text(&out.stderr).contains("alloy up"), "{}", told(&out));
    let log = up.log_text();
    let (_, url) = log.split_once("http://").context("a URL")?;
    let port = url.split(|c: char| c == ':' || c.is_whitespace() || c == '/').nth(1).context("a port")?;
    let out = output(Alone::new()?.alloy(&["up", "--listen", &format!("127.0.0.1:{port}")])).await?;
    assert_eq!(out.status.code(), Some(1), "{}", told(&out));
    assert!(text(&out.stderr).contains("takes another port"), "{}", told(&out));
    up.signal(nix::sys::signal::Signal::SIGTERM);
    let status = up.wait(alloy_tests::observe::PATIENCE)?;
    assert!(status.success(), "{status}: {}", up.log_text());
    Ok(())
}
