//! T: a farm whose state and logs are in Postgres: one orchestrator, and what it refuses to work with.

mod logs;

use std::fs;
use std::path::Path;
use std::process::Command;

use alloy_tests::farm::{Farm, Setup, bin_dir, isolated, isolated_orchestrator};
use alloy_tests::observe::until;
use alloy_tests::pg;
use alloy_tests::process::{Daemon, signal};
use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use sqlx::{Connection as _, PgConnection};

/// A farm on a database of its own.
fn on_postgres(url: &str, setup: Setup) -> Setup {
    let variables = [("DATABASE_MODE", "postgres"), ("DATABASE_URL", url)];
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
    Setup { orchestrator_env: variables.into(), ..setup }
}

fn said(mut command: Command) -> Result<(Option<i32>, String)> {
    let out = command.output()?;
    Ok((out.status.code(), String::from_utf8(out.stdout)?))
}

/// What an orchestrator says that does not start.
fn refusal(dir: &Path, url: &str) -> Result<String> {
    Ok(refused(isolated_orchestrator(dir, &dir.join("other")), url)?.1)
}

/// With which exit code a program does not start on a database, and what it says.
fn refused(mut command: Command, url: &str) -> Result<(Option<i32>, String)> {
    let out = command.env("DATABASE_MODE", "postgres").env("DATABASE_URL", url).output()?;
    ensure!(!out.status.success(), "it started");
    Ok((out.status.code(), String::from_utf8(out.stderr)?))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_runs_and_its_log_is_read_again_after_a_restart() -> Result<()> {
    let url = pg::empty_database().await;
    let setup = Setup { time_scale: 10, ..Setup::default() };
    let mut farm = Farm::start(on_postgres(&url, setup)).await?;
    let (code, out) = said(farm.alloy(&["run", "-c", "seq 1 200000; exit 3"]))?;
    let expect: String = (1..=200_000).map(|n| format!("{n}\n")).collect();
    ensure!(code == Some(3) && out == expect, "{code:?}, {} bytes of {}", out.len(), expect.len());
    let elsewhere = refusal(farm.dir(), &url)?;
    ensure!(elsewhere.contains("lie in files of another data directory"), "{elsewhere}");
    farm.stop_orchestrator()?;
    farm.start_orchestrator().await?;
    ensure!(said(farm.alloy(&["logs"]))?.1 == expect);
    Ok(())
}

/// A process that stands still until this is dropped.
struct Frozen(i32);

impl Frozen {
    fn new(pid: i32) -> Self {
        signal(pid, Signal::SIGSTOP);
        Self(pid)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        signal(self.0, Signal::SIGCONT);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_for_notes_that_says_nothing_any_more_is_replaced() -> Result<()> {
    let url = pg::empty_database().await;
    let _farm = Farm::orchestrator_only(on_postgres(&url, Setup { time_scale: 10, ..Setup::default() })).await?;
    let mut conn = PgConnection::connect(&url).await?;
    let text =
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%' AND pid <> $1";
    let mut listens = async |but: i32| Ok(sqlx::query_scalar(text).bind(but).fetch_optional(&mut conn).await?);
    let first: i32 = until("it listens", async || listens(0).await).await;
    let _frozen = Frozen::new(first);
    let _second: i32 = until("it listens on another connection", async || listens(first).await).await;
    Ok(())
}

#[tokio::test]
async fn a_pooler_that_mixes_connections_is_refused_and_one_that_keeps_them_apart_is_not() -> Result<()> {
    let url = pg::empty_database().await;
    let dir = tempfile::tempdir()?;
    let mut up = isolated(&bin_dir().join("alloy"), dir.path());
    up.args(["up", "--listen", "127.0.0.1:0"]);
    for command in [isolated_orchestrator(dir.path(), &dir.path().join("other")), up] {
        let (code, known) = refused(command, "postgres://postgres@127.0.0.1:6543/farm")?;
        ensure!(code == Some(2) && known.contains("port 6543 is a transaction pooler"), "{code:?}: {known}");
    }

    let (_mixing, pooled) = pooler(dir.path(), &url, "transaction", 11_543).await?;
    let mixed = refusal(dir.path(), &pooled)?;
    ensure!(mixed.contains("let the pooler work in session mode"), "{mixed}");

    let (_keeping, pooled) = pooler(dir.path(), &url, "session", 11_544).await?;
    let mut farm = Farm::start(on_postgres(&pooled, Setup { time_scale: 10, ..Setup::default() })).await?;
    let (code, out) = said(farm.alloy(&["run", "-c", "echo through it"]))?;
    ensure!((code, out.as_str()) == (Some(0), "through it\n"), "{code:?} {out}");
    farm.stop_orchestrator()?;
    farm.start_orchestrator().await?;
    Ok(())
}

struct Pooler(Daemon);

impl Drop for Pooler {
    fn drop(&mut self) {
        self.0.kill();
    }
}

/// A PgBouncer in front of a database, and the database's address through it.
async fn pooler(dir: &Path, url: &str, mode: &str, port: u16) -> Result<(Pooler, String)> {
    let (_, rest) = url.split_once("@localhost/").unwrap_or_default();
    let (database, socket) = rest.split_once("?host=").unwrap_or_default();
    let home = dir.join(mode);
    fs::create_dir(&home)?;
    let (users, config) = (home.join("users"), home.join("pgbouncer.ini"));
    fs::write(&users, "\"postgres\" \"\"\n")?;
    let text = format!(
        "[databases]\n{database} = host={socket}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
         auth_type = trust\nauth_file = {}\npool_mode = {mode}\ndefault_pool_size = 40\nmax_client_conn = 100\n",
        users.display()
    );
    fs::write(&config, text)?;
    for path in [dir, &home] {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    }
    // It does not run as root.
    let mut command = Command::new("sh");
    let line = "PATH=$PATH:/usr/sbin; if [ \"$(id -u)\" = 0 ]; then as='setpriv --reuid=postgres --regid=postgres --init-groups'; fi; \
        exec ${as:-} pgbouncer \"$1\"";
    command.args(["-c", line, "sh"]).arg(&config);
    let daemon = Pooler(Daemon::start("pgbouncer", command, &dir.join(format!("{mode}.log")))?);
    until("the pooler listens", async || {
        let text = daemon.0.log_text();
        ensure!(text.contains("listening on") || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok(), "{text}");
        Ok(Some(()))
    })
    .await;
    Ok((daemon, format!("postgres://postgres@127.0.0.1:{port}/{database}")))
}
