//! Ctrl-C in a real terminal: tmux.

use std::path::{Path, PathBuf};

use alloy_tests::farm::{Farm, Provider, Setup, bin_dir, isolated, output};
use alloy_tests::observe::until;
use anyhow::{Context as _, Result, ensure};

use super::told;

on_every_provider! {
    the_first_ctrl_c_cancels_and_waits_for_the_end,
    the_second_ctrl_c_detaches_and_tells_the_job,
}

/// A terminal of its own on a server of its own, with a person's environment: nothing in it says `CI`.
struct Terminal {
    dir: PathBuf,
}

impl Terminal {
    /// Runs `alloy ARGS` in it; the shell then writes the exit code.
    fn start(farm: &Farm, args: &str) -> Result<Terminal> {
        Self::start_wide(farm, 120, args)
    }

    fn start_wide(farm: &Farm, columns: u16, args: &str) -> Result<Terminal> {
        let terminal = Terminal { dir: farm.dir().to_owned() };
        let alloy = bin_dir().join("alloy");
        let line = format!(
            "cd {home}; export ORCHESTRATOR_URL={url} ALLOY_TOKEN={token}; {alloy} {args}; echo exit=$?; cat",
            home = farm.dir().join("home").display(),
            url = farm.url(),
            token = farm.token(),
            alloy = alloy.display(),
        );
        terminal.tmux(&["new-session", "-d", "-x", &columns.to_string(), "-y", "40", &line])?;
        Ok(terminal)
    }

    fn tmux(&self, args: &[&str]) -> Result<String> {
        let mut tmux = isolated(Path::new("tmux"), &self.dir);
        let out = tmux.arg("-S").arg(self.dir.join("tmux")).args(args).output().context("tmux")?;
        ensure!(out.status.success(), "tmux {args:?}: {}", String::from_utf8_lossy(&out.stderr));
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    async fn shows(&self, text: &str) -> Result<String> {
        let screen = until(&format!("the terminal shows `{text}`"), async || {
            let screen = self.tmux(&["capture-pane", "-p", "-S", "-"])?;
            ensure!(screen.contains(text), "{screen}");
            Ok(Some(screen))
        })
        .await;
        Ok(screen)
    }

    fn ctrl_c(&self) -> Result<()> {
        self.tmux(&["send-keys", "C-c"]).map(|_| ())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Fails only if the server has ended by itself.
        let _ = self.tmux(&["kill-server"]);
    }
}

async fn the_first_ctrl_c_cancels_and_waits_for_the_end(provider: Provider) -> Result<()> {
    let farm = Farm::start(Setup::default().on(provider)).await?;
    let terminal =
        Terminal::start(&farm, "run -c 'trap \"echo ending; exit 0\" TERM; echo up; while :; do sleep 0.1; done'")?;
    terminal.shows("up").await?;
    terminal.ctrl_c()?;
    let screen = terminal.shows("exit=130").await?;
    assert!(screen.contains("anceled"), "{screen}");
    let jobs = farm.api().get("/v1/jobs").await?;
    assert_eq!(jobs["jobs"][0]["state"], "canceled", "the end was waited for: {screen}");
    Ok(())
}

async fn the_second_ctrl_c_detaches_and_tells_the_job(provider: Provider) -> Result<()> {
    let farm = Farm::start(Setup::default().on(provider)).await?;
    // It takes its time to end, nearly all that it is granted: whoever looks finds it still canceling.
    let command = "trap : TERM; echo up; i=0; while [ $i -lt 90 ]; do sleep 0.1; i=$((i+1)); done";
    let terminal = Terminal::start(&farm, &format!("run -c '{command}'"))?;
    terminal.shows("up").await?;
    terminal.ctrl_c()?;
    terminal.shows("Ctrl-C again").await?;
    let jobs = until("the farm knows of the cancel", async || {
        let jobs = farm.api().get("/v1/jobs").await?;
        Ok((jobs["jobs"][0]["state"] == "canceling").then_some(jobs))
    })
    .await;
    terminal.ctrl_c()?;
    let screen = terminal.shows("exit=").await?;
    let id = jobs["jobs"][0]["id"].as_str().context("a job")?;
    assert!(screen.contains("detach") && screen.contains(&id[id.len() - 6..]), "{screen}");
    assert_eq!(farm.api().job(id).await?["state"], "canceling", "it goes on without us: {screen}");
    farm.api().end(id).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_is_cut_for_a_terminal_and_whole_in_a_file() -> Result<()> {
    let farm = Farm::start(Setup::default()).await?;
    let command = "true a-command-that-is-wider-than-it";
    let out = output(farm.alloy(&["run", "-c", command])).await?;
    ensure!(out.status.success(), "{}", told(&out));
    let again = bin_dir().join("alloy");
    let terminal = Terminal::start_wide(&farm, 80, &format!("list > list.txt; {} list", again.display()))?;
    let screen = terminal.shows("exit=0").await?;
    assert!(screen.contains('…') && !screen.contains(command), "{screen}");
    let list = std::fs::read_to_string(farm.dir().join("home/list.txt"))?;
    assert!(list.contains(command), "{list}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancel_without_a_job_asks_a_person_and_takes_only_a_yes() -> Result<()> {
    let farm = Farm::start(Setup::default()).await?;
    let alloy = bin_dir().join("alloy");
    let cancel = format!("{0} cancel; echo first=$?; {0} cancel", alloy.display());
    let terminal = Terminal::start(&farm, &format!("run --detach -c 'sleep 600'; {cancel}"))?;
    terminal.shows("[y/N]").await?;
    let id = farm.api().get("/v1/jobs").await?["jobs"][0]["id"].as_str().context("a job")?.to_owned();
    terminal.tmux(&["send-keys", "Enter"])?;
    let screen = terminal.shows("first=1").await?;
    assert!(screen.contains(&id) && screen.contains("sleep 600"), "it says which one: {screen}");
    assert!(farm.api().job(&id).await?["finished_at"].is_null());
    terminal.tmux(&["send-keys", "y", "Enter"])?;
    terminal.shows("exit=0").await?;
    assert_eq!(farm.api().end(&id).await["state"], "canceled");
    Ok(())
}
