//! Two organisations on one farm: each one's jobs run on its own workers.

use std::path::{Path, PathBuf};
use std::process::Command;

use alloy_shared::env::Ms;
use alloy_shared::id::{DEFAULT_ORG, Labels, OrgId, TokenId};
use alloy_shared::secret::{Token, TokenKind};
use alloy_shared::wire::farm::Role;
use alloy_tests::farm::{Farm, Setup};
use alloy_tests::observe::{Api, PATIENCE, until};
use alloy_tests::process::Daemon;
use alloy_tests::several::Several;
use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use orchestrator::store::sql::SqlStore;
use orchestrator::store::{Group, Store as _, TokenRow, Write};
use serde_json::{Value, json};

/// An admin of a second organisation, which only who has the books can make. Returns the token.
async fn second_admin(store: SqlStore) -> Result<String> {
    let token = Token::mint(TokenKind::Personal, [7; 32]);
    let row = TokenRow {
        id: TokenId::from_raw(7),
        org: OrgId::from_raw(DEFAULT_ORG.raw() + 1),
        hash: token.hash(),
        kind: TokenKind::Personal,
        role: Role::Admin,
        name: "their admin".to_owned(),
        shown: token.shown(),
        labels: Labels::default(),
        created_at: Ms(1),
        expires_at: None,
        revoked_at: None,
        used_by: None,
    };
    let done = store.commit(&[Group(vec![Write::AddToken(row)])]).await?;
    ensure!(done.groups.iter().all(Result::is_ok), "{done:?}");
    store.close().await;
    Ok(token.expose().to_owned())
}

/// A worker that one organisation has enrolled.
struct Mac {
    daemon: Daemon,
    state: PathBuf,
}

impl Mac {
    async fn join(api: &Api, name: &str, dir: &Path, command: impl Fn(&str) -> Command) -> Result<Mac> {
        let invite = api.post("/v1/workers/invites", &json!({})).await?;
        let token = invite["token"].as_str().context("an invitation has a token")?;
        let state = dir.join(name);
        let mut join = command("worker");
        join.arg("join").arg(&api.url).arg(token).args(["--name", name, "--state-dir"]).arg(&state);
        let out = join.output()?;
        ensure!(out.status.success(), "worker join: {}", String::from_utf8_lossy(&out.stderr));
        let mut run = command("worker");
        run.args(["run", "--provider", "host", "--state-dir"]).arg(&state);
        run.env("VM_POOL_SIZE", "2").env("ALLOY_DISK_FLOOR_MIB", "8");
        let daemon = Daemon::start(name, run, &dir.join("logs").join(format!("{name}.log")))?;
        Ok(Mac { daemon, state })
    }

    fn stop(mut self) -> Result<()> {
        self.daemon.signal(Signal::SIGTERM);
        let status = self.daemon.wait(PATIENCE)?;
        ensure!(status.success(), "{status}: {}", self.daemon.log_text());
        Ok(())
    }
}

impl Drop for Mac {
    fn drop(&mut self) {
        if self.daemon.has_ended().is_none() {
            self.daemon.kill();
            eprintln!("--- {}\n{}", self.state.display(), self.daemon.log_text());
        }
    }
}

/// The names of the workers that a caller is shown as connected.
async fn ready(api: &Api) -> Result<Vec<Value>> {
    let list = api.get("/v1/workers").await?;
    let workers = list["workers"].as_array().context("a list")?;
    let there = |worker: &&Value| matches!(worker["state"].as_str(), Some("ready" | "busy"));
    Ok(workers.iter().filter(there).map(|worker| worker["name"].clone()).collect())
}

/// Both organisations' view of one orchestrator.
struct View {
    ours: Api,
    theirs: Api,
}

async fn each_runs_on_its_own(views: &[View], dir: &Path, command: impl Fn(&str) -> Command) -> Result<()> {
    let their_mac = Mac::join(&views[0].theirs, "theirs", dir, &command).await?;
    let mut waiting = Vec::new();
    for View { ours, theirs } in views {
        until("their worker is there", async || Ok((ready(theirs).await? == ["theirs"]).then_some(()))).await;
        waiting.push(ours.shell("true").await?);
    }
    // It has room, and takes jobs that came later.
    for View { theirs, .. } in views {
        let id = theirs.shell("true").await?;
        let job = theirs.end(&id).await;
        ensure!(job["state"] == "succeeded" && job["worker_name"] == "theirs", "{job}");
    }
    for (View { ours, .. }, id) in views.iter().zip(&waiting) {
        let job = ours.job(id).await?;
        ensure!(job["state"] == "queued" && job["waiting_reason"] == "no worker is connected", "{job}");
        ensure!(ready(ours).await?.is_empty());
    }

    let our_mac = Mac::join(&views[0].ours, "ours", dir, &command).await?;
    let mut jobs: Vec<(&Api, &str, String)> = Vec::new();
    for (View { ours, .. }, id) in views.iter().zip(waiting) {
        jobs.push((ours, "ours", id));
    }
    for _ in 0..4 {
        for View { ours, theirs } in views {
            jobs.push((ours, "ours", ours.shell("sleep 0.1").await?));
            jobs.push((theirs, "theirs", theirs.shell("sleep 0.1").await?));
        }
    }
    for (api, whose, id) in jobs {
        let job = api.end(&id).await;
        ensure!(job["state"] == "succeeded" && job["worker_name"] == whose && job["attempt"] == 1, "{whose}: {job}");
    }
    our_mac.stop()?;
    their_mac.stop()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_runs_on_a_worker_of_its_own_organisation_or_says_that_there_is_none() -> Result<()> {
    let mut farm = Farm::orchestrator_only(Setup::default()).await?;
    farm.stop_orchestrator()?;
    let variables = farm.orchestrator_env();
    let store = match variables.iter().find(|(name, _)| name == "DATABASE_URL") {
        Some((_, url)) => SqlStore::open_postgres(url).await?,
        None => SqlStore::open_sqlite(&farm.farm_dir().join("alloy.db")).await?,
    };
    let token = second_admin(store).await?;
    farm.start_orchestrator().await?;
    let view = View { ours: farm.api(), theirs: Api::new(&farm.url(), Some(&token)) };
    each_runs_on_its_own(&[view], farm.dir(), |program| farm.command(program)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whichever_orchestrator_has_the_worker_another_organisations_job_waits() -> Result<()> {
    let farm = Several::start(2, 0, 2, 10).await?;
    let token = second_admin(SqlStore::open_postgres(&farm.database).await?).await?;
    let views = [0, 1].map(|number| {
        let ours = farm.api_of(number);
        View { theirs: Api::new(&ours.url, Some(&token)), ours }
    });
    each_runs_on_its_own(&views, farm.dir(), |program| farm.command(program)).await
}
