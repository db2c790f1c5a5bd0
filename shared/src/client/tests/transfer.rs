use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::*;
use crate::id::{AttemptRef, Digest};
use crate::wire::source::{PackFrame, PackReader, PackStored, SourceStatus};

const AT: AttemptRef = AttemptRef { job: JOB, attempt: 1 };

fn grant() -> Secret<String> {
    Secret::new("alloy_job_grant".to_owned())
}

/// A channel that holds these and then ends.
fn full<T>(items: Vec<T>) -> mpsc::Receiver<T> {
    let (tx, rx) = mpsc::channel(items.len().max(1));
    for item in items {
        assert!(tx.try_send(item).is_ok());
    }
    rx
}

#[tokio::test]
async fn a_long_manifest_travels_compressed_and_is_repeated() {
    for (len, encoding) in [(10, ""), (1 << 20, "zstd")] {
        let manifest = Bytes::from(vec![b'm'; len]);
        let digest = Digest::of(&manifest);
        let status = SourceStatus { digest, complete: false, missing: vec![digest] };
        let mut answers = vec![problem(ErrorCode::Unavailable), json(&status)].into_iter();
        let bench = Bench::new();
        let server = Server::start(move |_: &Heard| answers.next().unwrap()).await;
        assert_eq!(bench.client(&server.url).put_source(&digest, manifest.clone()).await.unwrap(), status);
        let heard = server.heard();
        assert_eq!((heard.len(), &heard[0]), (2, &heard[1]));
        assert_eq!(heard[0].line, format!("PUT /v1/sources/{digest}"));
        assert_eq!(heard[0].header("content-encoding"), encoding);
        let body = if encoding.is_empty() {
            heard[0].body.clone()
        } else {
            assert!(heard[0].body.len() < len / 10);
            zstd::bulk::decompress(&heard[0].body, len).unwrap()
        };
        assert_eq!(body, manifest);
    }
}

#[tokio::test]
async fn a_pack_arrives_whole_and_its_progress_adds_up() {
    let blobs: Vec<Vec<(Digest, Bytes)>> = (0..3u32)
        .map(|n| {
            let bytes: Bytes = (0..200_000u32).map(|i| (i.wrapping_mul(2_654_435_761 + n) >> 11) as u8).collect();
            vec![(Digest::of(&bytes), bytes)]
        })
        .collect();
    let stored = PackStored { blobs: 3, bytes: 600_000 };
    let answer = json(&stored);
    let bench = Bench::new();
    let server = Server::start(move |_: &Heard| answer.clone()).await;
    let frames = full(blobs.iter().map(|blobs| PackFrame::pack(blobs, 1)).collect());
    let sent = Arc::new(AtomicU64::new(0));
    let count = sent.clone();
    let client = bench.client(&server.url);
    let add = move |bytes| {
        count.fetch_add(bytes, Ordering::Relaxed);
    };
    let result = client.send_pack(frames, add).await;
    assert_eq!(result.unwrap(), stored);
    let heard = server.heard();
    assert_eq!((heard.len(), heard[0].line.as_str()), (1, "POST /v1/packs"));
    assert_eq!(sent.load(Ordering::Relaxed), heard[0].body.len() as u64);
    let mut reader = PackReader::default();
    reader.push(&heard[0].body);
    let mut got = Vec::new();
    while let Some(frame) = reader.next_frame().unwrap() {
        got.push(frame.unpack().unwrap());
    }
    reader.finish().unwrap();
    assert_eq!(got, blobs);
}

#[tokio::test]
async fn an_upload_is_not_repeated_by_itself() {
    let bench = Bench::new();
    let server = Server::start(|_: &Heard| problem(ErrorCode::Unavailable)).await;
    let error = bench.client(&server.url).send_pack(full(vec![]), |_| {}).await.unwrap_err();
    assert_eq!(error.problem().unwrap().code, ErrorCode::Unavailable);
    assert_eq!(server.heard().len(), 1);
}

#[tokio::test]
async fn an_artifact_is_put_from_its_offset() {
    let bench = Bench::new();
    let server = Server::start(|_: &Heard| reply(204, &[], b"")).await;
    let client = bench.client(&server.url);
    let digest = Digest::of(b"0123456789");
    for (offset, total, parts, range, length) in [
        (0, 10, vec!["01234", "", "56789"], "bytes 0-9/10", "10"),
        (4, 10, vec!["456789"], "bytes 4-9/10", "6"),
        (0, 0, vec![], "bytes */0", "0"),
        (10, 10, vec![], "bytes */10", "0"),
    ] {
        let body = full(parts.iter().map(|part| Bytes::from_static(part.as_bytes())).collect());
        client.put_attempt_artifact(&AT, &grant(), &digest, offset, total, body).await.unwrap();
        let heard = server.heard().pop().unwrap();
        assert_eq!(heard.line, format!("PUT /v1/attempts/{JOB}/1/artifacts/{digest}"));
        assert_eq!((heard.header("content-range"), heard.header("content-length")), (range, length));
        assert_eq!(heard.header("authorization"), "Bearer alloy_job_grant");
        assert_eq!(heard.body, parts.concat().as_bytes());
    }
    let beyond = client.put_attempt_artifact(&AT, &grant(), &digest, 11, 10, full(vec![])).await;
    assert!(beyond.unwrap_err().to_string().contains("has no byte 11"));
}

#[tokio::test]
async fn a_body_that_ends_early_is_never_a_whole_artifact() {
    let bench = Bench::new();
    let server = Server::start(|_: &Heard| reply(204, &[], b"")).await;
    let body = full(vec![Bytes::from_static(b"0123")]);
    let digest = Digest::of(b"0123456789");
    let result = bench.client(&server.url).put_attempt_artifact(&AT, &grant(), &digest, 0, 10, body).await;
    assert!(matches!(result, Err(ClientError::Unreachable { .. })), "{result:?}");
    assert!(server.heard().is_empty(), "no whole request arrived");
}

#[tokio::test]
async fn a_length_is_asked_with_head() {
    for (answer, expect) in [
        (reply(200, &[("alloy-offset", "77")], b""), Ok(77)),
        (reply(200, &[], b""), Ok(0)),
        (reply(404, &[], b""), Ok(0)),
        (reply(409, &[], b""), Err(Some(ErrorCode::Fenced))),
        (reply(401, &[], b""), Err(Some(ErrorCode::Unauthenticated))),
        (reply(200, &[("alloy-offset", "x")], b""), Err(None)),
    ] {
        let bench = Bench::new();
        let server = Server::start(move |_: &Heard| answer.clone()).await;
        let got = bench.client(&server.url).attempt_artifact_len(&AT, &grant(), &Digest::of(b"")).await;
        assert_eq!(got.map_err(|error| error.problem().map(|problem| problem.code)), expect);
        assert!(server.heard()[0].line.starts_with("HEAD /v1/attempts/"));
    }
}

#[tokio::test]
async fn an_upload_that_stalls_is_given_up_but_a_slow_source_is_not() {
    let bench = Bench::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = bench.client(&format!("http://{}", listener.local_addr().unwrap()));
    let digest = Digest::of(b"");
    let (tx, body) = mpsc::channel(1);
    let total = 1 << 30;
    let grant = grant();
    let upload = client.put_attempt_artifact(&AT, &grant, &digest, 0, total, body);
    let was_slow = std::cell::Cell::new(false);
    let feeder = async {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut head = [0; 1];
        // The request is on its way and its body waits for the source: time alone does not end it.
        socket.read_exact(&mut head).await.unwrap();
        bench.advance(1_000_000);
        // Lets the upload look at its clock before there is anything to send.
        tokio::task::yield_now().await;
        tx.send(Bytes::from_static(b"first")).await.unwrap();
        let mut seen = Vec::new();
        while !seen.ends_with(b"first") {
            socket.read_buf(&mut seen).await.unwrap();
        }
        was_slow.set(true);
        // Nobody reads any more: the buffers of the kernel fill up, and then nothing moves.
        let zeros = Bytes::from(vec![0; 8 << 20]);
        bench.pass(1_000, async { while tx.send(zeros.clone()).await.is_ok() {} }).await;
    };
    let result = tokio::select! {
        biased;
        result = upload => result,
        () = feeder => panic!("the body was dropped before the upload was given up"),
    };
    assert!(was_slow.get(), "given up while the source was waited for");
    assert!(result.unwrap_err().to_string().ends_with("nothing moved for 120 s"));
}
