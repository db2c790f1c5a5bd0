//! The farm without its CLI: `curl` as the document shows it, and archives that want to do harm.

mod archives;

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::Command;

use alloy_shared::id::Digest;
use alloy_shared::wire::source::{Entry, EntryKind, Manifest};
use alloy_tests::farm::{Farm, Provider, Setup, isolated, output};
use alloy_tests::observe::Api;
use anyhow::{Context as _, Result, ensure};
use archives::{CANARY, hostile};
use reqwest::Method;
use serde_json::Value;

on_every_provider! {
    the_curl_example_runs_as_it_stands_in_the_document,
}

/// The block of shell after a heading of `docs/API.md`.
fn example(heading: &str) -> Result<String> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/API.md");
    let text = fs::read_to_string(path)?;
    let (_, after) = text.split_once(heading).with_context(|| format!("no heading `{heading}`"))?;
    let (_, block) = after.split_once("```sh\n").context("no block of shell")?;
    Ok(block.split_once("```").context("the block ends")?.0.to_owned())
}

async fn the_curl_example_runs_as_it_stands_in_the_document(provider: Provider) -> Result<()> {
    let farm = Farm::start(Setup::default().on(provider)).await?;
    let example = example("## Without the CLI")?;
    let lines: Vec<_> = example.lines().filter(|line| !line.trim().is_empty()).collect();
    assert_eq!(lines.len(), 4, "four lines: {lines:#?}");

    let tree = farm.scratch("MyApp")?;
    let elsewhere = farm.scratch("elsewhere")?;
    fs::write(tree.join("Makefile"), "app.txt: source.txt\n\t@echo building; tr a-z A-Z < source.txt > app.txt\n")?;
    fs::write(tree.join("source.txt"), "made by curl\n")?;
    let netrc = farm.dir().join("home/.netrc");
    let mut file = fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(netrc)?;
    writeln!(file, "machine 127.0.0.1 login alloy password {}", farm.token())?;

    let mut bash = isolated("bash".as_ref(), farm.dir());
    // The artifact is saved where the last line runs.
    let script = format!("set -euo pipefail\ncd {}\n{example}", tree.display());
    let script = script.replace("curl -fsSO", &format!("cd {}; curl -fsSO", elsewhere.display()));
    bash.arg("-c").arg(script).env("ALLOY_URL", farm.url());
    let out = output(bash).await?;
    let (said, erred) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    ensure!(out.status.success(), "{}\n{said}\n{erred}", out.status);
    assert!(said.contains("building\n"), "the log came through: {said}");
    assert!(said.trim_end().ends_with("true"), "the exit code was 0: {said}");
    assert_eq!(fs::read_to_string(elsewhere.join("app.txt"))?, "MADE BY CURL\n");
    Ok(())
}

/// A manifest with one file, and whether the farm says that it has everything of it.
async fn is_stored(api: &Api, content: &[u8]) -> Result<bool> {
    let digest = Digest::of(content);
    let entry = Entry {
        path: "canary".into(),
        kind: EntryKind::File,
        mode: 0o644,
        size: content.len() as u64,
        chunks: vec![digest],
        target: None,
    };
    let manifest = Manifest::new(vec![entry])?;
    let path = format!("/v1/sources/{}", manifest.digest());
    let answer = api.request(Method::PUT, &path).body(manifest.encode()).send().await?;
    let status = answer.status();
    let body = answer.text().await?;
    ensure!(status.is_success(), "{status}: {body}");
    let told: Value = serde_json::from_str(&body)?;
    told["complete"].as_bool().context("an answer tells whether it is complete")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_archives_are_refused_by_name_and_nothing_of_them_is_stored() -> Result<()> {
    let farm = Farm::start(Setup { workers: 0, ..Setup::default() }).await?;
    let api = farm.api();
    let dir = farm.scratch("archives")?;
    for case in hostile() {
        let file = dir.join(case.name);
        fs::write(&file, &case.bytes)?;
        let mut curl = Command::new("curl");
        curl.args(["-sS", "-X", "POST", "-H", "Transfer-Encoding: chunked", "-w", "\n%{http_code}"]);
        curl.arg("-H").arg(format!("Authorization: Bearer {}", farm.token()));
        curl.arg("-H").arg(format!("Content-Type: {}", case.kind));
        curl.arg("-T").arg(&file).arg(format!("{}/v1/jobs?command=true", farm.url()));
        let out = output(curl).await?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let (body, status) = text.rsplit_once('\n').context("curl writes the status")?;
        assert_eq!(status, "422", "{}: {body}", case.name);
        let problem: Value = serde_json::from_str(body).with_context(|| body.to_owned())?;
        assert_eq!(problem["code"], "invalid_source", "{}: {problem}", case.name);
        assert!(problem.to_string().contains(case.named), "{} does not name {}: {problem}", case.name, case.named);
        assert!(!is_stored(&api, CANARY).await?, "{}: its files are stored", case.name);
    }
    assert_eq!(api.get("/v1/jobs").await?["jobs"], serde_json::json!([]), "no job was made");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_tree_by_tar_and_by_manifest_has_the_same_digest() -> Result<()> {
    let farm = Farm::start(Setup::default()).await?;
    let tree = farm.scratch("tree")?;
    fs::create_dir(tree.join("dir"))?;
    fs::create_dir(tree.join("empty"))?;
    fs::write(tree.join("dir/a"), CANARY)?;
    std::os::unix::fs::symlink("a", tree.join("dir/link"))?;
    let mut digests = Vec::new();
    for (kind, flag) in [("application/gzip", "-cz"), ("application/zstd", "-c --zstd"), ("application/x-tar", "-c")] {
        let line = format!(
            "tar {flag} . | curl -fsS -T- -H 'Content-Type: {kind}' -H 'Authorization: Bearer {}' -X POST {}/v1/sources",
            farm.token(),
            farm.url()
        );
        let mut bash = isolated("bash".as_ref(), farm.dir());
        bash.arg("-c").arg(line).current_dir(&tree);
        let out = output(bash).await?;
        ensure!(out.status.success(), "{kind}: {}", String::from_utf8_lossy(&out.stderr));
        let told: Value = serde_json::from_slice(&out.stdout)?;
        assert_eq!(told["complete"], true);
        digests.push(told["digest"].as_str().context("a digest")?.to_owned());
    }
    let mut run = farm.alloy(&["run", "-c", "echo $ALLOY_SOURCE_DIGEST; ls"]);
    run.current_dir(&tree);
    let out = output(run).await?;
    let log = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(log.ends_with("dir\nempty\n"), "{log}\n{}", String::from_utf8_lossy(&out.stderr));
    digests.push(log.lines().next().context("a line")?.to_owned());
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
    assert!(is_stored(&farm.api(), CANARY).await?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_pack_or_manifest_is_refused_and_not_stored() -> Result<()> {
    let farm = Farm::start(Setup { workers: 0, ..Setup::default() }).await?;
    let api = farm.api();
    use alloy_shared::wire::source::{PACK_END, PackFrame};
    let frame = PackFrame::pack(&[(Digest::of(CANARY), CANARY.into())], 3);
    let mut pack = frame.encode_header().to_vec();
    pack.extend_from_slice(&frame.stored);
    pack.extend_from_slice(&PACK_END);
    let lie = PackFrame::pack(&[(Digest::of(b"another"), CANARY.into())], 3);
    let mut wrong = lie.encode_header().to_vec();
    wrong.extend_from_slice(&lie.stored);
    wrong.extend_from_slice(&PACK_END);
    let cut = pack[..pack.len() - 6].to_vec();
    let unended = pack[..pack.len() - 4].to_vec();
    let garbage = [pack.clone(), b"tail".to_vec()].concat();
    for (name, body) in [("wrong digest", wrong), ("cut", cut), ("unended", unended), ("garbage", garbage)] {
        let answer = api.request(Method::POST, "/v1/packs").body(body).send().await?;
        let (status, text) = (answer.status().as_u16(), answer.text().await?);
        assert_eq!(status, 422, "{name}: {text}");
        assert!(text.contains("digest_mismatch") || text.contains("invalid_source"), "{name}: {text}");
        assert!(!is_stored(&api, CANARY).await?, "{name}");
    }
    let answer = api.request(Method::POST, "/v1/packs").body(pack).send().await?;
    assert!(answer.status().is_success(), "{}", answer.text().await?);
    assert!(is_stored(&api, CANARY).await?);
    // A manifest under another digest than its own.
    let path = format!("/v1/sources/{}", Digest::of(b"else"));
    let answer = api.request(Method::PUT, &path).body(Manifest::default().encode()).send().await?;
    assert_eq!(answer.status().as_u16(), 422);
    assert!(answer.text().await?.contains("digest_mismatch"));
    Ok(())
}
