//! Followers: late ones, cut ones, several at once. All end with the bytes that the command wrote.

use alloy_tests::farm::{Farm, Provider, Setup, bin_dir, full};
use alloy_tests::noise::{sha256, sha256_of};
use alloy_tests::observe::{Api, until};
use alloy_tests::proxy::{Cuts, Proxy};
use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use futures_util::StreamExt as _;
use serde_json::{Value, json};

on_every_provider! {
    followers_that_are_early_late_or_cut_ten_times_end_with_the_same_bytes,
}

const SEED: u64 = 42;

fn size() -> u64 {
    if full() { 100_000_000 } else { 10_000_000 }
}

async fn noisy_job(farm: &Farm, bytes: u64) -> Result<String> {
    let tree = farm.scratch("noise")?;
    std::fs::copy(bin_dir().join("noise"), tree.join("noise"))?;
    let spec = json!({ "argv": ["./noise", SEED.to_string(), bytes.to_string()] });
    let job = farm.api().post("/v1/jobs", &json!({ "spec": spec, "source": farm.upload(&tree).await? })).await?;
    Ok(job["id"].as_str().context("a job has an id")?.to_owned())
}

/// Follows the raw log, going on from the last byte after each cut; gives up after a hundred of them.
async fn follow_raw(api: &Api, id: &str) -> Result<Vec<u8>> {
    let mut log = Vec::new();
    for _ in 0..100 {
        let path = format!("/v1/jobs/{id}/log?follow=1&offset={}", log.len());
        let Ok(answer) = api.request(reqwest::Method::GET, &path).send().await else { continue };
        ensure!(answer.status().is_success(), "{}: {}", answer.status(), answer.text().await?);
        let mut body = answer.bytes_stream();
        let whole = loop {
            match body.next().await {
                Some(Ok(bytes)) => log.extend_from_slice(&bytes),
                Some(Err(_)) => break false,
                None => break true,
            }
        };
        if whole {
            return Ok(log);
        }
    }
    anyhow::bail!("a hundred connections were not enough")
}

/// What a follower of the feed has.
#[derive(Default)]
struct Feed {
    log: Vec<u8>,
    events: Vec<u64>,
    cursor: (u64, u64, u64),
    ended: bool,
}

impl Feed {
    /// Reads one connection until it ends or is cut. Whatever does not join on is a fault.
    async fn read_on(&mut self, api: &Api, id: &str) -> Result<()> {
        let (event, attempt, offset) = self.cursor;
        let path = format!("/v1/jobs/{id}/feed?cursor={event}.{attempt}.{offset}");
        let request = api.request(reqwest::Method::GET, &path).header("accept", "application/x-ndjson");
        let Ok(answer) = request.send().await else { return Ok(()) };
        ensure!(answer.status().is_success(), "{}", answer.status());
        let mut body = answer.bytes_stream();
        let mut rest = Vec::new();
        while let Some(Ok(bytes)) = body.next().await {
            rest.extend_from_slice(&bytes);
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                if line.len() > 1 {
                    self.take(&serde_json::from_slice(&line)?)?;
                }
            }
        }
        Ok(())
    }

    fn take(&mut self, frame: &Value) -> Result<()> {
        match frame["type"].as_str() {
            Some("event") => {
                let seq = frame["seq"].as_u64().unwrap_or(0);
                ensure!(seq == self.cursor.0 + 1, "event {seq} after {}", self.cursor.0);
                self.events.push(seq);
                self.cursor.0 = seq;
            }
            Some("log") => {
                let bytes = match (frame["text"].as_str(), frame["base64"].as_str()) {
                    (Some(text), None) => text.as_bytes().to_vec(),
                    (None, Some(text)) => base64::engine::general_purpose::STANDARD.decode(text)?,
                    (_, _) => anyhow::bail!("neither text nor base64: {frame}"),
                };
                let offset = frame["offset"].as_u64().unwrap_or(u64::MAX);
                ensure!(offset == self.log.len() as u64, "offset {offset} after {}", self.log.len());
                self.log.extend_from_slice(&bytes);
                self.cursor.1 = frame["attempt"].as_u64().unwrap_or(0);
                self.cursor.2 = self.log.len() as u64;
            }
            Some("end") => self.ended = true,
            Some(_) | None => {}
        }
        Ok(())
    }
}

async fn followers_that_are_early_late_or_cut_ten_times_end_with_the_same_bytes(provider: Provider) -> Result<()> {
    let farm = Farm::start(Setup::default().on(provider)).await?;
    let expected = sha256(SEED, size());
    let id = noisy_job(&farm, size()).await?;
    let plan = Cuts { seed: 3, cuts: 10, least: size() / 100, most: size() / 12 };
    let (raw_proxy, feed_proxy) =
        (Proxy::start(farm.address(), plan).await?, Proxy::start(farm.address(), plan).await?);

    let early = follow_raw_of(farm.api(), id.clone());
    let cut = follow_raw_of(Api::new(&format!("http://{}", raw_proxy.address), Some(farm.token())), id.clone());
    let cut_feed = follow_feed(Api::new(&format!("http://{}", feed_proxy.address), Some(farm.token())), id.clone());
    let (early, cut, feed) = tokio::try_join!(early, cut, cut_feed)?;
    assert_eq!(farm.api().end(&id).await["state"], "succeeded");
    let late = farm.api().log(&id).await?;

    assert_eq!(early.len() as u64, size());
    for (who, log) in [("early", &early), ("cut", &cut), ("cut feed", &feed.log), ("late", &late)] {
        assert_eq!(sha256_of(log), expected, "the {who} follower has {} bytes", log.len());
    }
    assert_eq!((raw_proxy.cuts_made(), feed_proxy.cuts_made()), (10, 10), "the connections were cut ten times");
    assert_eq!(feed.events, (1..=feed.events.len() as u64).collect::<Vec<_>>());
    Ok(())
}

async fn follow_raw_of(api: Api, id: String) -> Result<Vec<u8>> {
    follow_raw(&api, &id).await
}

async fn follow_feed(api: Api, id: String) -> Result<Feed> {
    let mut feed = Feed::default();
    for _ in 0..100 {
        feed.read_on(&api, &id).await?;
        if feed.ended {
            return Ok(feed);
        }
    }
    anyhow::bail!("a hundred connections were not enough")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lines_arrive_while_the_command_runs() -> Result<()> {
    let farm = Farm::start(Setup::default()).await?;
    let gate = farm.scratch("gate")?.join("open");
    let command = format!("printf 'no newline'; while [ ! -e {} ]; do sleep 0.05; done; echo", gate.display());
    let id = farm.api().shell(&command).await?;
    let path = format!("/v1/jobs/{id}/log?follow=1");
    let answer = farm.api().request(reqwest::Method::GET, &path).send().await?;
    let mut body = answer.bytes_stream();
    let mut seen = Vec::new();
    until("the unfinished line has arrived", async || {
        if let Some(bytes) = body.next().await {
            seen.extend_from_slice(&bytes?);
        }
        Ok((seen == b"no newline").then_some(()))
    })
    .await;
    assert_eq!(farm.api().job(&id).await?["state"], "running");
    std::fs::write(&gate, "")?;
    assert_eq!(farm.api().end(&id).await["state"], "succeeded");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_range_of_the_log_is_those_bytes() -> Result<()> {
    let farm = Farm::start(Setup::default()).await?;
    let id = noisy_job(&farm, 100_000).await?;
    farm.api().end(&id).await;
    let whole = farm.api().log(&id).await?;
    for (range, from, to) in [("bytes=0-9", 0, 10), ("bytes=99990-", 99_990, 100_000), ("bytes=-5", 99_995, 100_000)] {
        let request = farm.api().request(reqwest::Method::GET, &format!("/v1/jobs/{id}/log")).header("range", range);
        let answer = request.send().await?;
        assert_eq!(answer.status(), 206, "{range}");
        assert_eq!(answer.bytes().await?, whole[from..to], "{range}");
    }
    Ok(())
}

#[tokio::test]
async fn a_worker_keeps_little_of_a_flood_that_the_farm_has() -> Result<()> {
    let farm = Farm::start(Setup { workers: 1, slots: 1, ..Setup::default() }).await?;
    let program = bin_dir().join("noise");
    let line = format!("{} {SEED} 100000000; sleep 600", program.display());
    let job = farm.api().submit(json!({ "argv": ["sh", "-c", line] })).await?;
    let attempt = farm.worker_dir(0).join("spool").join(format!("{job}.1"));
    until("the worker has let go of what is stored", async || {
        let names = std::fs::read_dir(&attempt)?.map(|entry| Ok(entry?.file_name().into_string().unwrap_or_default()));
        let names = names.collect::<Result<Vec<_>>>()?;
        let last = names.contains(&"log.11".to_owned());
        Ok((last && !names.contains(&"log.2".to_owned())).then_some(()))
    })
    .await;
    farm.api().post(&format!("/v1/jobs/{job}/cancel"), &json!({})).await?;
    farm.api().end(&job).await;
    let log = follow_raw(&farm.api(), &job).await?;
    assert_eq!(sha256_of(&log), sha256(SEED, log.len() as u64), "{} bytes", log.len());
    Ok(())
}
