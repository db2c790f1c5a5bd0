//! T: logs in rows and objects: what two orchestrators make of one log.

use std::sync::Arc;

use alloy_shared::env::Ms;
use alloy_shared::id::{AttemptRef, Digest, JobId};
use alloy_tests::pg;
use anyhow::Result;
use bytes::Bytes;
use orchestrator::blobs::{BlobKey, Blobs};
use orchestrator::broken::Care;
use orchestrator::logs::{Chunks, LogError, Logs};
use orchestrator::store::sql::chunks::ChunkTable;
use sqlx::PgPool;

const AT: AttemptRef = AttemptRef { job: JobId::from_raw(7), attempt: 1 };

/// The logs of so many orchestrators that share a database and a place for objects.
async fn orchestrators(count: usize) -> Result<(PgPool, Vec<Logs>)> {
    orchestrators_on(Blobs::memory(), count).await
}

async fn orchestrators_on(blobs: Blobs, count: usize) -> Result<(PgPool, Vec<Logs>)> {
    let pool = PgPool::connect(&pg::database().await).await?;
    let blobs = Arc::new(blobs);
    let logs = (0..count).map(|_| Logs::Chunks(Chunks::new(ChunkTable(pool.clone()), blobs.clone())));
    Ok((pool.clone(), logs.collect()))
}

fn bytes(len: usize, seed: u64) -> Bytes {
    alloy_tests::noise::range(seed, 0, len as u64).into()
}

/// All that can be read from the beginning.
async fn whole(logs: &Logs) -> Result<Vec<u8>> {
    logs.measure(&AT).await?;
    let mut all: Vec<u8> = Vec::new();
    loop {
        let chunks = logs.read(&AT, all.len() as u64, 300_000).await?;
        if chunks.is_empty() {
            return Ok(all);
        }
        chunks.iter().for_each(|chunk| all.extend_from_slice(chunk));
    }
}

fn compact(logs: &Logs) -> &Chunks {
    match logs {
        Logs::Chunks(chunks) => chunks,
        Logs::Files(_) | Logs::Mem(_) => unreachable!("made of rows"),
    }
}

async fn count(pool: &PgPool, table: &str) -> Result<i64> {
    let text = format!("SELECT COUNT(*) FROM {table}");
    Ok(sqlx::query_scalar(sqlx::AssertSqlSafe(text)).fetch_one(pool).await?)
}

#[tokio::test]
async fn bytes_are_read_when_they_are_committed_and_what_comes_twice_is_stored_once() -> Result<()> {
    let (_, logs) = orchestrators(1).await?;
    let logs = &logs[0];
    assert_eq!(logs.append(&AT, 0, Bytes::from_static(b"abc")).await?, 3);
    assert_eq!((logs.len(&AT).await?, whole(logs).await?), (0, Vec::new()));
    assert_eq!(logs.sync().await?, [(AT, 3)]);
    assert_eq!(logs.append(&AT, 1, Bytes::from_static(b"bcde")).await?, 5);
    assert!(matches!(logs.append(&AT, 9, Bytes::from_static(b"x")).await, Err(LogError::Gap { have: 5 })));
    logs.sync().await?;
    assert_eq!(whole(logs).await?, b"abcde");
    assert_eq!(logs.read(&AT, 2, 2).await?.concat(), b"cd");
    let sha256 = logs.seal(&AT).await?;
    assert_eq!((sha256, logs.seal(&AT).await?), (Digest::of(b"abcde"), sha256));
    assert!(matches!(logs.append(&AT, 5, Bytes::from_static(b"f")).await, Err(LogError::Sealed)));
    Ok(())
}

#[tokio::test]
async fn two_that_write_one_log_meet_and_go_on() -> Result<()> {
    let (_, logs) = orchestrators(2).await?;
    let all = bytes(3_000_000, 5);
    // Each has some of it, in no order, and more than the other one knows.
    let mut at = [0, 0];
    for turn in 0..12 {
        let who = turn % 2;
        let to = ((turn + 1) * 250_000).min(all.len());
        logs[who].append(&AT, at[who] as u64, all.slice(at[who]..to)).await?;
        at[who] = to;
        if turn % 3 == 2 {
            logs[1 - who].sync().await?;
        }
        logs[who].sync().await?;
    }
    for log in &logs {
        assert!(whole(log).await? == all);
        assert_eq!(log.seal(&AT).await?, Digest::of(&all));
    }
    Ok(())
}

#[tokio::test]
async fn whoever_wrote_first_reads_what_another_one_added() -> Result<()> {
    let (_, logs) = orchestrators(2).await?;
    logs[0].append(&AT, 0, Bytes::from_static(b"first ")).await?;
    logs[0].sync().await?;
    assert_eq!(logs[1].measure(&AT).await?, 6);
    logs[1].append(&AT, 6, Bytes::from_static(b"second")).await?;
    logs[1].sync().await?;
    assert_eq!(whole(&logs[0]).await?, b"first second");
    assert_eq!(logs[0].append(&AT, 12, Bytes::from_static(b"!")).await?, 13);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_is_measured_while_its_rows_are_committed_keeps_every_byte() -> Result<()> {
    let (_, mut logs) = orchestrators(1).await?;
    let logs = Arc::new(logs.remove(0));
    let all = bytes(400_000, 11);
    let mut measuring = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let logs = logs.clone();
        measuring.spawn(async move { while logs.measure(&AT).await.is_ok() {} });
    }
    // What is still to be committed is what could be taken for it.
    let mut sent = 0;
    while sent < all.len() {
        let (one, two) = ((sent + 700).min(all.len()), (sent + 1_400).min(all.len()));
        logs.append(&AT, sent as u64, all.slice(sent..one)).await?;
        let (done, more) = tokio::join!(logs.sync(), logs.append(&AT, one as u64, all.slice(one..two)));
        done?;
        more?;
        sent = two;
    }
    logs.sync().await?;
    measuring.abort_all();
    assert!(whole(&logs).await? == all);
    assert_eq!(logs.seal(&AT).await?, Digest::of(&all));
    Ok(())
}

#[tokio::test]
async fn bytes_that_come_late_to_a_log_in_objects_change_nothing_of_it() -> Result<()> {
    let all = bytes(5_000_000, 13);
    for (late_from, late_to) in [(0, 900_000), (300_000, 1_200_000)] {
        let (pool, fresh) = orchestrators(2).await?;
        // One has more than it could store when its worker went to the other one, which has the log's end.
        fresh[0].append(&AT, 0, all.slice(..late_from)).await?;
        fresh[0].sync().await?;
        fresh[0].append(&AT, late_from as u64, all.slice(late_from..late_to)).await?;
        fresh[1].append(&AT, late_from as u64, all.slice(late_from..late_from + 700_000)).await?;
        let mut at = late_from + 700_000;
        while at < all.len() {
            fresh[1].sync().await?;
            let to = (at + 1_000_000).min(all.len());
            fresh[1].append(&AT, at as u64, all.slice(at..to)).await?;
            at = to;
        }
        assert_eq!(fresh[1].seal(&AT).await?, Digest::of(&all));
        while compact(&fresh[1]).compact().await? > 0 {}
        fresh[0].sync().await?;
        assert!(matches!(fresh[0].append(&AT, 0, all.slice(..10)).await, Err(LogError::Sealed)));
        while compact(&fresh[1]).compact().await? > 0 {}
        assert_eq!(count(&pool, "log_chunks").await?, 0);
        for log in &fresh {
            assert!(whole(log).await? == all, "{late_from}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_late_row_across_the_end_of_an_object_keeps_what_lies_behind_it() -> Result<()> {
    let (pool, logs) = orchestrators(2).await?;
    let all = bytes(6_000_000, 17);
    for start in (0..5_000_000).step_by(500_000) {
        logs[1].append(&AT, start as u64, all.slice(start..start + 500_000)).await?;
        logs[1].sync().await?;
    }
    assert_eq!(compact(&logs[1]).compact().await?, 1);
    let end: i64 = sqlx::query_scalar("SELECT MAX(end_at) FROM log_parts").fetch_one(&pool).await?;
    let across = end as usize - 200_000;
    // As it would come from one that stood still.
    let row = "INSERT INTO log_chunks (job_id, attempt, start_at, bytes) VALUES ($1, 1, $2, $3)";
    let late = sqlx::query(row).bind(AT.job.to_string()).bind(across as i64);
    late.bind(&all[across..across + 600_000]).execute(&pool).await?;
    logs[1].append(&AT, 5_000_000, all.slice(5_000_000..)).await?;
    logs[1].sync().await?;
    assert!(whole(&logs[0]).await? == all);
    assert_eq!(logs[1].seal(&AT).await?, Digest::of(&all));
    while compact(&logs[0]).compact().await? > 0 {}
    assert_eq!(count(&pool, "log_chunks").await?, 0);
    for log in &logs {
        assert!(whole(log).await? == all);
    }
    Ok(())
}

#[tokio::test]
async fn rows_become_objects_while_the_log_is_written_and_read() -> Result<()> {
    let (pool, logs) = orchestrators(2).await?;
    let all = bytes(11_000_000, 9);
    let mut moved = 0;
    for start in (0..all.len()).step_by(1_000_000) {
        logs[0].append(&AT, start as u64, all.slice(start..(start + 1_000_000).min(all.len()))).await?;
        logs[0].sync().await?;
        moved += compact(&logs[1]).compact().await?;
        assert!(whole(&logs[1]).await? == all[..(start + 1_000_000).min(all.len())], "{start}");
    }
    assert!(moved >= 2, "{moved}");
    assert_eq!(logs[1].seal(&AT).await?, Digest::of(&all));
    compact(&logs[1]).compact().await?;
    assert_eq!(count(&pool, "log_chunks").await?, 0, "a finished log lies in objects");
    assert!(whole(&logs[0]).await? == all && whole(&logs[1]).await? == all);
    Ok(())
}

#[tokio::test]
async fn rot_in_an_object_of_a_log_is_told_and_not_shown() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let blobs = Blobs::open(dir.path().to_owned(), Ms(0), Care::default()).await?;
    let (_, logs) = orchestrators_on(blobs, 2).await?;
    logs[0].append(&AT, 0, bytes(300_000, 5)).await?;
    logs[0].seal(&AT).await?;
    compact(&logs[0]).compact_own().await?;
    assert_eq!(whole(&logs[1]).await?.len(), 300_000);
    let part = dir.path().join("objects").join(BlobKey::log(&AT, 0, 300_000).as_str());
    let mut rotten = std::fs::read(&part)?;
    rotten[200_000] ^= 1;
    std::fs::write(&part, rotten)?;
    let told = logs[1].read(&AT, 100_000, 1_000).await;
    assert!(matches!(told, Err(LogError::Damaged { from: 0, to: 300_000 })), "{told:?}");
    Ok(())
}

#[tokio::test]
async fn whoever_wrote_a_log_moves_it_and_what_is_left_over_is_moved_by_another() -> Result<()> {
    let (pool, logs) = orchestrators(2).await?;
    let all = bytes(9_500_000, 21);
    for start in (0..all.len()).step_by(500_000) {
        logs[0].append(&AT, start as u64, all.slice(start..start + 500_000)).await?;
        logs[0].sync().await?;
        compact(&logs[1]).compact_own().await?;
        assert_eq!(count(&pool, "log_parts").await?, start as i64 / 4_500_000, "it is not the other one's");
        compact(&logs[0]).compact_own().await?;
        assert_eq!(count(&pool, "log_parts").await?, (start as i64 + 500_000) / 4_500_000, "{start}");
    }
    assert_eq!(logs[0].seal(&AT).await?, Digest::of(&all));
    compact(&logs[0]).compact_own().await?;
    assert_eq!((count(&pool, "log_chunks").await?, count(&pool, "log_parts").await?), (0, 3));
    assert!(whole(&logs[1]).await? == all);

    // One that was killed before it could finish the log of an attempt that has ended.
    let at = AttemptRef { job: JobId::from_raw(8), attempt: 1 };
    logs[0].append(&at, 0, all.slice(..1_000)).await?;
    logs[0].sync().await?;
    assert_eq!(compact(&logs[1]).compact().await?, 0, "it may go on");
    for text in [
        "INSERT INTO jobs (id, id_tail, org_id, version, state, attempt, state_json, spec, created_at_ms, created_by, events) \
         VALUES ($1, 1, 'org_1', 1, 'queued', 0, '{}', '{}', 1, 'me', 1)",
        "INSERT INTO attempts (job_id, attempt, org_id, worker_id, assigned_at_ms, ended_at_ms, timings, seq) \
         VALUES ($1, 1, 'org_1', 'wrk_1', 1, 2, '{}', 0)",
    ] {
        sqlx::query(text).bind(at.job.to_string()).execute(&pool).await?;
    }
    assert_eq!(compact(&logs[1]).compact().await?, 1);
    assert_eq!(count(&pool, "log_chunks").await?, 0);
    Ok(())
}
