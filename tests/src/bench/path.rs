//! The whole path of a job over HTTP, as an outside client sees it.

use std::collections::HashSet;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures_util::StreamExt as _;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::ms;
use crate::noise;
use crate::observe::{Api, now};

/// From the submit of `echo hi` to its first byte of output, in milliseconds.
pub async fn hello(api: &Api) -> Result<f64> {
    let started = now();
    let id = api.submit(json!({ "argv": ["echo", "hi"] })).await?;
    let answer = api.request(Method::GET, &format!("/v1/jobs/{id}/log?follow=1")).send().await?;
    let mut body = answer.bytes_stream();
    let first = body.next().await.context("some output")??;
    let took = ms(started);
    ensure!(first.starts_with(b"h"), "{first:?}");
    while let Some(rest) = body.next().await {
        rest?;
    }
    // The slot is free again before the next one starts.
    api.end(&id).await;
    Ok(took)
}

/// A file of this many bytes, in the page cache.
pub fn fill(path: &Path, bytes: u64) -> Result<()> {
    let mut file = File::create(path)?;
    for block in noise::blocks(1, bytes) {
        file.write_all(&block)?;
    }
    Ok(())
}

/// Seconds from the first to the last byte of a job that writes the file, at one follower; and the job's id.
pub async fn log(api: &Api, file: &Path, bytes: u64) -> Result<(f64, String)> {
    let id = api.submit(json!({ "argv": ["cat", file] })).await?;
    let answer = api.request(Method::GET, &format!("/v1/jobs/{id}/log?follow=1")).send().await?;
    let mut body = answer.bytes_stream();
    let (mut started, mut seen) = (None, 0);
    while let Some(chunk) = body.next().await {
        started.get_or_insert_with(now);
        seen += chunk?.len() as u64;
    }
    let took = ms(started.context("some output")?) / 1e3;
    ensure!(seen == bytes, "{seen} of {bytes} bytes");
    let job = api.end(&id).await;
    ensure!(job["state"] == "succeeded", "{job}");
    Ok((took, id))
}

/// A client with a token of its own.
pub async fn client(api: &Api, number: usize) -> Result<Api> {
    let made = api.post("/v1/tokens", &json!({ "name": format!("client-{number}"), "role": "developer" })).await?;
    Ok(Api::new(&api.url, Some(made["token"].as_str().context("a token")?)))
}

/// Submits from all clients at once for this long; the ids that were acknowledged.
pub async fn submit_for(clients: &[Api], time: Duration) -> Result<Vec<String>> {
    let end = now() + time;
    let mut tasks = JoinSet::new();
    for client in clients {
        let api = client.clone();
        tasks.spawn(async move {
            let mut ids = Vec::new();
            while now() < end {
                ids.push(api.submit(json!({ "argv": ["true"] })).await?);
            }
            anyhow::Ok(ids)
        });
    }
    let mut all = Vec::new();
    while let Some(ids) = tasks.join_next().await {
        all.extend(ids??);
    }
    Ok(all)
}

/// The ids of all jobs, page by page.
pub async fn all_jobs(api: &Api) -> Result<HashSet<String>> {
    let mut ids = HashSet::new();
    let mut cursor = String::new();
    loop {
        let page = api.get(&format!("/v1/jobs?limit=200{cursor}")).await?;
        let jobs = page["jobs"].as_array().context("a page")?;
        ids.extend(jobs.iter().filter_map(|job: &Value| job["id"].as_str().map(str::to_owned)));
        match page["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return Ok(ids),
        }
    }
}
