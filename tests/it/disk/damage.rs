//! A worker whose state directory is damaged starts all the same, and says which attempts are lost.

use std::fs;

use alloy_tests::chaos::Dice;
use alloy_tests::farm::{Farm, Setup, full};
use alloy_tests::load::{check, submit};
use alloy_tests::observe::{Api, now};
use anyhow::{Context as _, Result};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_with_damaged_records_starts_and_its_jobs_are_tried_again() -> Result<()> {
    let mut farm = Farm::start(Setup { workers: 1, slots: 2, time_scale: 1, ..Setup::default() }).await?;
    let mut dice = Dice::from_environment();
    let (mut done, often) = ([0; HARMS.len()], if full() { 8 } else { 1 });
    let lasts = time_of_a_job(&farm.api()).await?;
    let mut round = 0;
    while done.iter().any(|times| *times < often) {
        round += 1;
        assert!(round <= ROUNDS_MAX, "after {ROUNDS_MAX} rounds: {HARMS:?}: {done:?}");
        let api = farm.api();
        let ids =
            [submit(&api, 2 * round).await.context("taken")?, submit(&api, 2 * round + 1).await.context("taken")?];
        dice.instant(lasts).await;
        farm.kill_worker(0);
        let state = farm.worker_dir(0);
        let all = fs::read_dir(state.join("spool"))?.flatten();
        // What an earlier round set aside is no record any more.
        for entry in all.filter(|entry| !entry.file_name().to_string_lossy().starts_with('.')) {
            // Dealt in turn: the one that came least.
            let (_, kind) = done.iter().zip(0..).min().expect("there are some");
            done[kind] += u64::from(harm(&entry.path(), kind, &mut dice));
        }
        fs::write(state.join("spool/no attempt"), "x")?;
        fs::create_dir_all(state.join("spool").join(format!("job_{round}.1")))?;
        fs::write(state.join("images.json"), "{")?;
        farm.start_worker(0)?;
        until_ready(&farm).await;
        for (id, seed) in ids.iter().zip([2 * round, 2 * round + 1]) {
            check(&farm.api(), id, seed).await.with_context(|| format!("round {round}"))?;
        }
    }
    HARMS.iter().zip(done).for_each(|(harm, times)| println!("{harm}: {times} times"));
    farm.all_connected().await;
    let log = fs::read_to_string(farm.dir().join("logs/worker-0.log"))?;
    assert!(log.contains("set aside"), "{log}");
    Ok(())
}

/// How long, in milliseconds, a record is there to be harmed.
async fn time_of_a_job(api: &Api) -> Result<u64> {
    let from = now();
    check(api, &submit(api, 0).await.context("taken")?, 0).await?;
    Ok(u64::try_from(from.elapsed().as_millis())?.max(2))
}

/// What a failing disk does to a record.
const HARMS: [&str; 6] =
    ["a torn journal", "a wrong byte", "no journal", "no log", "an empty log", "a file in place of the directory"];
/// A record is there to be harmed in many rounds.
const ROUNDS_MAX: u64 = 120;

/// False if there was nothing to harm: the record may have been deleted meanwhile.
fn harm(attempt: &std::path::Path, kind: usize, dice: &mut Dice) -> bool {
    let (journal, log) = (attempt.join("journal"), attempt.join("log.0"));
    let bytes = fs::read(&journal).unwrap_or_default();
    if bytes.is_empty() || !log.exists() {
        return false;
    }
    let at = usize::try_from(dice.roll(bytes.len() as u64)).expect("small");
    let done = match kind {
        0 => fs::write(&journal, &bytes[..at]),
        1 => {
            let mut flipped = bytes;
            flipped[at] ^= 0x55;
            fs::write(&journal, flipped)
        }
        2 => fs::remove_file(&journal),
        3 => fs::remove_file(log),
        4 => fs::write(log, ""),
        _ => fs::remove_dir_all(attempt).and_then(|()| fs::write(attempt, "a file")),
    };
    done.is_ok()
}

/// The worker is there again, busy or not.
async fn until_ready(farm: &Farm) {
    let api = farm.api();
    alloy_tests::observe::until("the worker is back", async || {
        let list = api.get("/v1/workers").await?;
        let state = list["workers"][0]["state"].as_str().unwrap_or_default().to_owned();
        Ok(matches!(&*state, "ready" | "busy").then_some(()))
    })
    .await;
}
