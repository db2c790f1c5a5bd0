//! A worker whose state directory is damaged starts all the same, and says which attempts are lost.

use std::fs;

use alloy_tests::chaos::Dice;
use alloy_tests::farm::{Farm, Setup, full};
use alloy_tests::load::{check, submit};
use anyhow::{Context as _, Result};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_with_damaged_records_starts_and_its_jobs_are_tried_again() -> Result<()> {
    let mut farm = Farm::start(Setup { workers: 1, slots: 2, time_scale: 1, ..Setup::default() }).await?;
    let mut dice = Dice::from_environment();
    for round in 1..=if full() { 30 } else { 4 } {
        let api = farm.api();
        let ids =
            [submit(&api, 2 * round).await.context("taken")?, submit(&api, 2 * round + 1).await.context("taken")?];
        dice.instant(400).await;
        farm.kill_worker(0);
        let state = farm.worker_dir(0);
        for entry in fs::read_dir(state.join("spool"))?.flatten() {
            harm(&entry.path(), &mut dice);
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
    farm.all_connected().await;
    let log = fs::read_to_string(farm.dir().join("logs/worker-0.log"))?;
    assert!(log.contains("set aside"), "{log}");
    Ok(())
}

/// Does one of the things that a failing disk does to a record.
fn harm(attempt: &std::path::Path, dice: &mut Dice) {
    let journal = attempt.join("journal");
    let bytes = fs::read(&journal).unwrap_or_default();
    let at = usize::try_from(dice.roll(bytes.len().max(1) as u64)).expect("small");
    let done = match dice.roll(6) {
        0 => fs::write(&journal, &bytes[..at]),
        1 => {
            let mut flipped = bytes;
            if let Some(byte) = flipped.get_mut(at) {
                *byte ^= 0x55;
            }
            fs::write(&journal, flipped)
        }
        2 => fs::remove_file(&journal),
        3 => fs::remove_file(attempt.join("log.0")),
        4 => fs::write(attempt.join("log.0"), ""),
        _ => fs::remove_dir_all(attempt).and_then(|()| fs::write(attempt, "a file")),
    };
    // The record may have been deleted meanwhile.
    let _ = done;
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
