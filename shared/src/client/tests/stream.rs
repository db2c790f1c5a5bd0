use base64::Engine as _;
use bytes::Bytes;
use tokio::sync::mpsc;

use super::*;
use crate::id::{AttemptRef, Digest};
use crate::wire::job::{EventKind, FeedCursor, FeedFrame, JobEvent, LogFrame};
use crate::wire::source::{BlobRequest, PACK_END, PackFrame};

fn event(seq: u64) -> FeedFrame {
    FeedFrame::Event(JobEvent {
        seq,
        at: String::new(),
        attempt: 1,
        kind: EventKind::Phase,
        state: StateWord::Running,
        phase: None,
        reason: None,
        worker: None,
        message: None,
        artifact: None,
    })
}

fn log(attempt: u32, offset: u64, bytes: &[u8]) -> FeedFrame {
    FeedFrame::Log(LogFrame::new(attempt, offset, bytes))
}

fn end() -> FeedFrame {
    FeedFrame::End { job: Box::new(view(StateWord::Succeeded)) }
}

fn lines(frames: &[FeedFrame]) -> Vec<u8> {
    frames.iter().flat_map(|frame| [serde_json::to_vec(frame).unwrap(), b"\n".to_vec()].concat()).collect()
}

async fn all<T>(mut rx: mpsc::Receiver<Result<T, ClientError>>) -> (Vec<T>, Option<ClientError>) {
    let mut out = Vec::new();
    while let Some(item) = rx.recv().await {
        match item {
            Ok(item) => out.push(item),
            Err(error) => {
                assert!(rx.recv().await.is_none(), "an error is the last thing");
                return (out, Some(error));
            }
        }
    }
    (out, None)
}

#[tokio::test]
async fn a_cut_feed_goes_on_at_its_cursor() {
    let bench = Bench::new();
    let mut first = lines(&[event(1), event(2), log(1, 0, b"hello")]);
    first.extend_from_slice(b"\n{\"type\":\"log\",\"att");
    let unknown = b"{\"type\":\"weather\",\"sun\":1}\n{\"type\":\"event\",\"seq\":3,\"kind\":\"new_kind\"}\n";
    let third = [lines(&[event(2), log(1, 3, b"lo \xff")]), unknown.to_vec(), lines(&[event(4), end()])].concat();
    let mut answers =
        vec![chunked(200, &[], &first, false), problem(ErrorCode::Unavailable), chunked(200, &[], &third, true)]
            .into_iter();
    let server = Server::start(move |_: &Heard| answers.next().unwrap()).await;
    let (items, error) = all(bench.client(&server.url).feed(JOB, FeedCursor::default())).await;
    assert_eq!(error, None);
    let frames: Vec<&FeedFrame> = items
        .iter()
        .filter_map(|item| match item {
            FeedItem::Frame(frame) => Some(frame),
            FeedItem::Reconnecting { .. } | FeedItem::Reconnected => None,
        })
        .collect();
    assert_eq!(frames, [&event(1), &event(2), &log(1, 0, b"hello"), &log(1, 5, b" \xff"), &event(4), &end()]);
    let FeedItem::Reconnecting { tries: 1, .. } = &items[3] else { panic!("{:?}", items[3]) };
    assert_eq!(items[4], FeedItem::Reconnecting { tries: 2, why: "it is unavailable".into() });
    assert_eq!(items[5], FeedItem::Reconnected);
    let cursors: Vec<String> = server.heard().iter().map(|heard| heard.query("cursor").unwrap().to_owned()).collect();
    assert_eq!(cursors, ["0.0.0", "2.1.5", "2.1.5"]);
    assert_eq!(server.heard()[0].header("accept"), "application/x-ndjson");
}

/// A job of two attempts with bytes of every kind, and its log.
fn long_job(dice: &mut Dice) -> (Vec<FeedFrame>, Vec<u8>) {
    let (mut frames, mut whole) = (vec![event(1)], Vec::new());
    let mut seq = 1;
    for attempt in 1..=2 {
        let mut offset = 0;
        for _ in 0..40 {
            let bytes: Vec<u8> = (0..dice.below(300)).map(|_| b"abc\n\"\xc3\xbc\xff"[dice.below(8)]).collect();
            frames.push(log(attempt, offset, &bytes));
            offset += bytes.len() as u64;
            whole.extend_from_slice(&bytes);
            if dice.below(4) == 0 {
                seq += 1;
                frames.push(event(seq));
            }
        }
    }
    frames.push(end());
    (frames, whole)
}

#[tokio::test]
async fn a_feed_cut_anywhere_loses_and_doubles_nothing() {
    for seed in 0..20 {
        println!("seed {seed}");
        let mut dice = Dice(seed);
        let (frames, whole) = long_job(&mut dice);
        let bench = Bench::new();
        let sent = frames.clone();
        let server = Server::start(move |heard: &Heard| {
            let cursor: FeedCursor = heard.query("cursor").unwrap().parse().unwrap();
            // What a server may send: everything after the cursor, or a little before it.
            let from = sent
                .iter()
                .scan(FeedCursor::default(), |at, frame| {
                    at.advance(frame);
                    Some(*at)
                })
                .take_while(|at| (at.attempt, at.offset) <= (cursor.attempt, cursor.offset) && at.event <= cursor.event)
                .count();
            let body = lines(&sent[from.saturating_sub(dice.below(3))..]);
            let whole = dice.below(8) == 0;
            let cut = if whole { body.len() } else { dice.below(body.len()) };
            chunked(200, &[], &body[..cut], dice.below(2) == 0)
        })
        .await;
        let (items, error) = all(bench.client(&server.url).feed(JOB, FeedCursor::default())).await;
        assert_eq!(error, None, "seed {seed}");
        let (mut got, mut events) = (Vec::new(), 0);
        for item in &items {
            match item {
                FeedItem::Frame(FeedFrame::Log(frame)) => got.extend(frame.bytes().unwrap()),
                FeedItem::Frame(FeedFrame::Event(event)) => {
                    events += 1;
                    assert_eq!(event.seq, events, "seed {seed}");
                }
                FeedItem::Frame(FeedFrame::Worker(_) | FeedFrame::End { .. })
                | FeedItem::Reconnecting { .. }
                | FeedItem::Reconnected => {}
            }
        }
        assert!(got == whole, "seed {seed}: {} of {} bytes", got.len(), whole.len());
        assert_eq!(events as usize, frames.iter().filter(|frame| matches!(frame, FeedFrame::Event(_))).count());
        assert_eq!(items.last(), Some(&FeedItem::Frame(end())), "seed {seed}");
    }
}

#[tokio::test]
async fn a_feed_with_a_gap_or_nonsense_is_asked_once_more_and_then_an_error() {
    for (body, why) in [
        (lines(&[event(2)]), "event 2 of the feed follows event 0"),
        (lines(&[log(1, 9, b"x")]), "jumps from byte 0 to 9 of attempt 1"),
        (b"<html>\n".to_vec(), "a line of the feed is not understood"),
        (b"{\"type\":\"log\",\"attempt\":1,\"offset\":0}\n".to_vec(), "damaged"),
        (b"{\"type\":\"end\"}\n".to_vec(), "a line of the feed is not understood"),
    ] {
        let bench = Bench::new();
        let server = Server::start(move |_: &Heard| chunked(200, &[], &body, true)).await;
        let (items, error) = all(bench.client(&server.url).feed(JOB, FeedCursor::default())).await;
        let error = error.unwrap().to_string();
        assert!(error.contains(why), "{error}");
        assert_eq!((items.len(), server.heard().len()), (2, 2), "{items:?}");
    }
}

#[tokio::test]
async fn a_feed_that_is_refused_ends_with_the_refusal() {
    let bench = Bench::new();
    let server = Server::start(|_: &Heard| problem(ErrorCode::NotFound)).await;
    let (items, error) = all(bench.client(&server.url).feed(JOB, FeedCursor::default())).await;
    assert_eq!(items, []);
    assert_eq!(error.unwrap().problem().unwrap().code, ErrorCode::NotFound);
}

#[tokio::test]
async fn a_silent_feed_is_left_and_an_unreachable_one_given_up() {
    let bench = Bench::new();
    let body = chunked(200, &[], &lines(&[event(1)]), false);
    let server = Server::start(move |_: &Heard| Reply::Hold(body.clone())).await;
    let mut feed = bench.client(&server.url).feed(JOB, FeedCursor::default());
    assert_eq!(feed.recv().await, Some(Ok(FeedItem::Frame(event(1)))));
    let mut reasons = Vec::new();
    let error = loop {
        match bench.pass(100, feed.recv()).await.unwrap() {
            Ok(FeedItem::Reconnecting { why, .. }) => reasons.push(why),
            Ok(FeedItem::Reconnected) => {}
            Ok(FeedItem::Frame(frame)) => panic!("{frame:?}"),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error}");
    assert_eq!(reasons[0], "nothing was heard for 30 s");
    assert!(bench.now().mono >= Mono(600_000), "given up at {:?}", bench.now().mono);
}

#[tokio::test]
async fn a_reader_that_leaves_ends_the_task() {
    let bench = Bench::new();
    let mut server = Server::start(|_: &Heard| Reply::Hold(vec![])).await;
    let feed = bench.client(&server.url).feed(JOB, FeedCursor::default());
    server.count.wait_for(|count| *count == 1).await.unwrap();
    assert_eq!(bench.life.tracker.len(), 1);
    drop(feed);
    bench.life.tracker.close();
    bench.life.tracker.wait().await;
}

#[tokio::test]
async fn a_log_cut_anywhere_is_read_once_and_to_its_end() {
    for seed in 0..20 {
        println!("seed {seed}");
        let mut dice = Dice(seed);
        let whole: Vec<u8> = (0..20_000).map(|_| dice.below(256) as u8).collect();
        let bytes = whole.clone();
        let follow = seed % 2 == 0;
        let bench = Bench::new();
        let server = Server::start(move |heard: &Heard| {
            if !heard.line.contains("/log") {
                return json(&view(StateWord::Succeeded));
            }
            let offset: usize = heard.query("offset").unwrap().parse().unwrap();
            // A server may begin earlier, if it says so.
            let start = offset - dice.below(offset.min(50) + 1);
            let start_text = start.to_string();
            let headers = [("alloy-attempt", "3"), ("alloy-offset", start_text.as_str())];
            let left = bytes.len() - start;
            // A followed log may end in good order before the attempt does.
            let orderly = heard.query("follow") == Some("1") && dice.below(2) == 0;
            let cut = if dice.below(6) == 0 { left } else { dice.below(left + 1) };
            chunked(200, &headers, &bytes[start..start + cut], orderly || cut == left)
        })
        .await;
        let query = LogQuery { attempt: None, offset: 0, follow };
        let (pieces, error) = all(bench.client(&server.url).log(JOB, query)).await;
        assert_eq!(error, None, "seed {seed}");
        assert!(pieces.concat() == whole, "seed {seed}");
        let attempts: Vec<Option<String>> = server
            .heard()
            .iter()
            .filter(|heard| heard.line.contains("/log"))
            .map(|heard| heard.query("attempt").map(str::to_owned))
            .collect();
        assert!(attempts[0].is_none() && attempts[1..].iter().all(|attempt| attempt.as_deref() == Some("3")));
    }
}

#[tokio::test]
async fn a_log_of_another_attempt_or_with_a_gap_is_an_error() {
    for (headers, why) in [
        (vec![("alloy-attempt", "4")], "attempt 4, asked was 3"),
        (vec![("alloy-attempt", "3"), ("alloy-offset", "6")], "starts at byte 6, asked was 5"),
    ] {
        let bench = Bench::new();
        let server = Server::start(move |_: &Heard| chunked(200, &headers, b"x", true)).await;
        let query = LogQuery { attempt: Some(3), offset: 5, follow: false };
        let (pieces, error) = all(bench.client(&server.url).log(JOB, query)).await;
        assert!(pieces.is_empty() && error.as_ref().unwrap().to_string().contains(why), "{error:?}");
    }
}

#[tokio::test]
async fn a_job_that_says_nothing_for_long_is_followed_until_it_does() {
    let bench = Bench::new();
    let mut silences = 0;
    let server = Server::start(move |heard: &Heard| {
        if !heard.line.contains("/log") {
            return Reply::Close(json(&view(if silences < 60 { StateWord::Running } else { StateWord::Succeeded })));
        }
        silences += 1;
        let headers = [("alloy-attempt", "1"), ("alloy-offset", "0")];
        let bytes = if silences < 60 { &b""[..] } else { b"done" };
        match heard.query("follow") {
            Some(_) => Reply::Hold(chunked(200, &headers, bytes, false)),
            None => Reply::Close(chunked(200, &[("alloy-attempt", "1"), ("alloy-offset", "4")], b"", true)),
        }
    })
    .await;
    let query = LogQuery { follow: true, ..LogQuery::default() };
    let (pieces, error) = bench.pass(100, all(bench.client(&server.url).log(JOB, query))).await;
    assert_eq!((pieces.concat(), error), (b"done".to_vec(), None));
    assert!(bench.now().mono >= Mono(30 * 60_000), "{:?}", bench.now().mono);
}

/// Serves a file with ranges, cut at random.
fn file_server(bytes: Vec<u8>, mut dice: Dice) -> impl FnMut(&Heard) -> Vec<u8> + Send + 'static {
    move |heard| {
        let asked = heard.header("range").strip_prefix("bytes=").and_then(|range| range.strip_suffix('-'));
        let start: usize = asked.map_or(0, |start| start.parse().unwrap());
        if asked.is_some() && start >= bytes.len() {
            return problem(ErrorCode::RangeNotSatisfiable);
        }
        let range = format!("bytes {start}-{}/{}", bytes.len().wrapping_sub(1), bytes.len());
        let partial = asked.is_some() && dice.below(4) > 0;
        let (status, from) = if partial { (206, start) } else { (200, 0) };
        let mut headers = vec![("etag", "\"abc\"")];
        if partial {
            headers.push(("content-range", &range));
        }
        let mut answer = reply(status, &headers, &bytes[from..]);
        answer.truncate(answer.len() - dice.below(bytes.len() - from));
        answer
    }
}

#[tokio::test]
async fn a_download_goes_on_where_it_was_cut() {
    for seed in 0..20 {
        println!("seed {seed}");
        let mut dice = Dice(seed);
        let whole: Vec<u8> = (0..dice.below(30_000)).map(|i| i as u8).collect();
        let from = dice.below(whole.len() + 1);
        let bench = Bench::new();
        let server = Server::start(file_server(whole.clone(), dice)).await;
        let (pieces, error) = all(bench.client(&server.url).download(JOB, "out/a b.bin", from as u64)).await;
        assert_eq!(error, None, "seed {seed}");
        assert!(pieces.concat() == whole[from..], "seed {seed}");
        assert!(server.heard()[0].line.ends_with("/artifacts/out/a%20b.bin"), "{}", server.heard()[0].line);
    }
}

#[tokio::test]
async fn a_link_is_followed_from_where_the_download_is_and_without_the_token() {
    for seed in 0..20 {
        println!("seed {seed}");
        let mut dice = Dice(seed);
        let whole: Vec<u8> = (0..dice.below(30_000)).map(|i| i as u8).collect();
        let bench = Bench::new();
        let store = Server::start(file_server(whole.clone(), dice)).await;
        let link = format!("{}/bucket/object?X-Amz-Signature=hush", store.url);
        let farm = Server::start(move |_: &Heard| reply(307, &[("location", &link), ("etag", "\"1\"")], b"")).await;
        let (pieces, error) = all(bench.client(&farm.url).download(JOB, "a", 0)).await;
        assert_eq!(error, None, "seed {seed}");
        assert!(pieces.concat() == whole, "seed {seed}");
        assert!(farm.heard().iter().all(|heard| heard.header("authorization").ends_with(TOKEN)));
        for heard in store.heard() {
            assert!(heard.line.starts_with("GET /bucket/object?X-Amz-Signature=hush"), "{}", heard.line);
            assert!(!format!("{heard:?}").contains("alloy_pat"), "{heard:?}");
        }
    }
}

#[tokio::test]
async fn a_link_that_leads_nowhere_is_an_error_that_does_not_name_its_key() {
    let bench = Bench::new();
    let store = Server::start(|_: &Heard| reply(403, &[], b"<Error><Code>AccessDenied</Code></Error>")).await;
    let link = format!("{}/b/o?X-Amz-Signature=hush", store.url);
    let unsafe_link = "ftp://store/b/o?X-Amz-Signature=hush".to_owned();
    for (link, says) in [(link, "answers 403"), (unsafe_link, "no safe address")] {
        let farm = Server::start(move |_: &Heard| reply(307, &[("location", &link)], b"")).await;
        let (_, error) = all(bench.client(&farm.url).download(JOB, "a", 0)).await;
        let error = error.unwrap().to_string();
        assert!(error.contains(says) && !error.contains("hush"), "{error}");
    }
}

#[tokio::test]
async fn a_download_that_cannot_be_right_is_an_error() {
    let bench = Bench::new();
    let server = Server::start(file_server(vec![1; 10], Dice(1))).await;
    let client = bench.client(&server.url);
    let (pieces, error) = all(client.download(JOB, "a", 12)).await;
    assert!(pieces.is_empty());
    assert_eq!(error.unwrap().problem().unwrap().code, ErrorCode::RangeNotSatisfiable);
    let (_, error) = all(client.download(JOB, "../../tokens", 0)).await;
    assert!(error.unwrap().to_string().contains("leaves the root"));

    let mut tags = ["\"1\"", "\"2\""].into_iter();
    let server = Server::start(move |_: &Heard| {
        let mut answer = reply(200, &[("etag", tags.next().unwrap())], b"0123456789");
        answer.truncate(answer.len() - 5);
        answer
    })
    .await;
    let (pieces, error) = all(bench.client(&server.url).download(JOB, "a", 0)).await;
    assert_eq!(pieces.concat(), b"01234");
    assert!(error.unwrap().to_string().contains("was replaced"));
    assert_eq!(server.heard()[1].header("if-range"), "\"1\"");
}

#[tokio::test]
async fn blobs_of_a_cut_pack_are_asked_for_again_without_those_that_came() {
    let blobs: Vec<(Digest, Bytes)> =
        (0..6u8).map(|i| Bytes::from(vec![i; 100])).map(|bytes| (Digest::of(&bytes), bytes)).collect();
    let digests: Vec<Digest> = blobs.iter().map(|(digest, _)| *digest).collect();
    let stock = blobs.clone();
    let bench = Bench::new();
    let server = Server::start(move |heard: &Heard| {
        let asked: BlobRequest = serde_json::from_slice(&heard.body).unwrap();
        let mut pack = Vec::new();
        for blob in stock.iter().filter(|(digest, _)| asked.digests.contains(digest)) {
            let frame = PackFrame::pack(std::slice::from_ref(blob), 3);
            pack.extend_from_slice(&frame.encode_header());
            pack.extend_from_slice(&frame.stored);
            if asked.digests.len() > 4 && pack.len() > 300 {
                return chunked(200, &[], &pack[..pack.len() - 1], false);
            }
        }
        pack.extend_from_slice(&PACK_END);
        chunked(200, &[], &pack, true)
    })
    .await;
    let at = AttemptRef { job: JOB, attempt: 2 };
    let grant = Secret::new("alloy_job_grant".to_owned());
    let (frames, error) = all(bench.client(&server.url).attempt_blobs(&at, &grant, digests.clone())).await;
    assert_eq!(error, None);
    let got: Vec<(Digest, Bytes)> = frames.iter().flat_map(|frame| frame.unpack().unwrap()).collect();
    assert_eq!(got, blobs);
    let heard = server.heard();
    assert!(heard.len() == 2 && heard.iter().all(|heard| heard.header("authorization") == "Bearer alloy_job_grant"));
    let second: BlobRequest = serde_json::from_slice(&heard[1].body).unwrap();
    assert_eq!(second.digests, digests[digests.len() - second.digests.len()..]);
    assert!(second.digests.len() < digests.len());
}

#[test]
fn both_forms_of_a_log_frame_reach_the_same_bytes() {
    let text = base64::engine::general_purpose::STANDARD.encode(b"plain");
    let line = format!("{{\"type\":\"log\",\"attempt\":1,\"offset\":0,\"base64\":\"{text}\"}}");
    let mut cursor = FeedCursor { event: 0, attempt: 1, offset: 2 };
    let frame = super::super::stream::read_frame(line.as_bytes(), &mut cursor).unwrap().unwrap();
    assert_eq!(frame, log(1, 2, b"ain"));
    assert_eq!(cursor.offset, 5);
}
