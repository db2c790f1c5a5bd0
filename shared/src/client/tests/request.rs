use super::*;
use crate::wire::FieldError;
use crate::wire::farm::Role;
use crate::wire::job::JobSpec;

fn submit() -> SubmitJob {
    SubmitJob { spec: JobSpec { shell: Some("make".into()), ..JobSpec::default() }, source: None }
}

/// Gives these answers in order.
fn script(answers: Vec<Vec<u8>>) -> impl FnMut(&Heard) -> Vec<u8> + Send + 'static {
    let mut answers = answers.into_iter();
    move |_| answers.next().expect("no request beyond the script")
}

#[tokio::test]
async fn a_submit_is_repeated_with_the_same_key_and_body() {
    let bench = Bench::new();
    let cut = b"HTTP/1.1 201 Created\r\ncontent-length: 500\r\n\r\n{".to_vec();
    let server = Server::start(script(vec![
        problem(ErrorCode::Unavailable),
        cut,
        vec![],
        problem(ErrorCode::StorageFull),
        problem(ErrorCode::TooManyRequests),
        json(&view(StateWord::Queued)),
    ]))
    .await;
    let job = bench.client(&server.url).submit(&submit(), "key-1").await.unwrap();
    assert_eq!(job, view(StateWord::Queued));
    let heard = server.heard();
    assert_eq!(heard.len(), 6);
    assert!(heard.iter().all(|again| *again == heard[0]), "{heard:#?}");
    assert_eq!(heard[0].line, "POST /v1/jobs");
    assert_eq!(heard[0].header("idempotency-key"), "key-1");
    assert_eq!(heard[0].header("authorization"), format!("Bearer {TOKEN}"));
    assert_eq!(serde_json::from_slice::<SubmitJob>(&heard[0].body).unwrap(), submit());
}

#[tokio::test]
async fn a_retry_waits_as_long_as_the_farm_says() {
    let bench = Bench::new();
    let later = Problem { retry_after_s: Some(3), ..Problem::new(ErrorCode::TooManyRequests, "later") };
    let later = reply(429, &[], &serde_json::to_vec(&later).unwrap());
    let mut answers = vec![later, json(&view(StateWord::Queued))].into_iter();
    let (clock, times) = (bench.clone(), Arc::new(Mutex::new(Vec::new())));
    let list = times.clone();
    let server = Server::start(move |_: &Heard| {
        list.lock().unwrap().push(clock.now().mono);
        answers.next().unwrap()
    })
    .await;
    let client = bench.client(&server.url);
    bench.pass(1, client.job(JOB)).await.unwrap();
    let times = times.lock().unwrap().clone();
    assert!(times.len() == 2 && times[1].since(times[0]) >= 3_000, "{times:?}");
}

#[tokio::test]
async fn a_wait_longer_than_the_budget_is_not_begun() {
    let bench = Bench::new();
    // As long as the whole budget is too long too.
    for (word, header) in [(Some(10), None), (Some(11), None), (None, Some("11"))] {
        let problem = Problem { retry_after_s: word, ..Problem::new(ErrorCode::Unavailable, "tomorrow") };
        let body = serde_json::to_vec(&problem).unwrap();
        let headers: Vec<(&str, &str)> = header.iter().map(|value| ("retry-after", *value)).collect();
        let answer = reply(503, &headers, &body);
        let server = Server::start(move |_: &Heard| answer.clone()).await;
        let error = bench.client(&server.url).info().await.unwrap_err();
        assert_eq!((error.why(), server.heard().len()), ("tomorrow", 1));
        assert_eq!(error.retry_after_ms(), word.unwrap_or(11) * 1_000, "from wherever it was said");
    }
    // Nor one that no clock can count, after one that was sat out.
    let bench = Bench::new();
    let later = ["1", "18446744073709551615"].map(|s| reply(503, &[("retry-after", s)], b"later"));
    let server = Server::start(script(later.to_vec())).await;
    let client = bench.client(&server.url);
    let error = bench.pass(1, client.info()).await.unwrap_err();
    assert!(error.why().contains("later"), "{error}");
    assert_eq!(server.heard().len(), 2);
}

#[tokio::test]
async fn what_must_not_happen_twice_is_repeated_only_if_it_did_not_happen() {
    let request = TokenRequest { name: "ci".into(), role: Role::Developer, ci: true, ttl_s: None };
    let cut = problem(ErrorCode::IncompleteBody);
    let rows = [(vec![], 1), (problem(ErrorCode::Internal), 1), (problem(ErrorCode::TooManyRequests), 2), (cut, 2)];
    for (first, tries) in rows {
        let bench = Bench::new();
        let server = Server::start(script(vec![first, problem(ErrorCode::Forbidden)])).await;
        bench.client(&server.url).create_token(&request).await.unwrap_err();
        assert_eq!(server.heard().len(), tries);
    }
}

#[tokio::test]
async fn problems_arrive_whole_and_print_readably() {
    let bench = Bench::new();
    let sent = Problem {
        errors: vec![FieldError { field: "labels.chip".into(), message: "is empty".into() }],
        ..Problem::new(ErrorCode::InvalidSpec, "the job's spec is wrong").hint("see `alloy run --help`")
    };
    let body = serde_json::to_vec(&sent).unwrap();
    let server = Server::start(move |_: &Heard| reply(422, &[], &body)).await;
    let error = bench.client(&server.url).submit(&submit(), "k").await.unwrap_err();
    assert_eq!(error.problem(), Some(&sent));
    let text = "the job's spec is wrong\n  labels.chip: is empty\n  hint: see `alloy run --help`";
    assert_eq!(error.to_string(), text);
    assert_eq!(server.heard().len(), 1);
}

#[tokio::test]
async fn answers_that_are_not_a_farms_are_named_and_hold_no_token() {
    let newer = br#"{"status":418,"code":"teapot","message":"no coffee","hint":"drink tea"}"#;
    let secret = format!("{{\"version\":\"{TOKEN}\",\"protocol_min\":\"{TOKEN}\"}}");
    for (answer, expect, tries) in [
        (reply(502, &[], b"<html>Bad Gateway</html>"), "answered 502 Bad Gateway by something that is not a farm", 8),
        (reply(500, &[], b"upstream\x1b[31m broke"), "answered 500 Internal Server Error: upstream\u{fffd}[31m", 8),
        (reply(418, &[], newer), "no coffee (418 I'm a teapot)\n  hint: drink tea", 1),
        (reply(302, &[("location", "https://farm/")], b""), "to https://farm/; use that address", 1),
        (reply(200, &[], b"<html>welcome</html>"), "no answer of a farm (line 1, column 1)", 1),
        (reply(200, &[], secret.as_bytes()), "no answer of a farm", 1),
    ] {
        let bench = Bench::new();
        let server = Server::start(move |_: &Heard| answer.clone()).await;
        let error = bench.client(&server.url).info().await.unwrap_err();
        assert_eq!(matches!(error, ClientError::Unreachable { .. }), expect.contains("502"), "{error}");
        assert!(error.problem().is_none() && error.to_string().contains(expect), "{error}");
        assert!(!format!("{error}{error:?}").contains(TOKEN), "{error}");
        assert_eq!(server.heard().len(), tries, "{error}");
    }
}

#[tokio::test]
async fn nobody_at_the_address_is_unreachable() {
    let bench = Bench::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let error = bench.client(&format!("{url}/")).info().await.unwrap_err();
    let ClientError::Unreachable { url: at, why, unknown_host: false } = &error else { panic!("{error}") };
    assert_eq!(*at, url);
    assert!(why.contains("refused"), "{why}");
}

#[tokio::test]
async fn a_farm_without_tls_is_told_from_an_absent_one() {
    let bench = Bench::new();
    let raw = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", raw.local_addr().unwrap());
    let client = bench.client(&url);
    let plain = async {
        let (mut socket, _) = raw.accept().await.unwrap();
        socket.write_all(&reply(400, &[], b"")).await.unwrap();
        socket
    };
    let (answer, _socket) = tokio::join!(client.info(), plain);
    let error = answer.unwrap_err();
    let (why, hint) = ("it speaks no TLS there", format!("{} may be its address", url.replace("https", "http")));
    let expected = ClientError::Protocol { why: why.to_owned(), hint: Some(hint.clone()) };
    assert_eq!(error, expected, "and it is not asked again");
    assert_eq!((error.why(), error.hint()), (why, Some(&*hint)));
    assert_eq!(error.sentence(), format!("{why}; {hint}"));
    assert_eq!(error.to_string(), format!("{why}\n  hint: {hint}"));
}

#[test]
fn a_name_that_does_not_resolve_is_known_by_what_the_system_says() {
    let error = std::net::ToSocketAddrs::to_socket_addrs(&("no-such-host.invalid", 1)).unwrap_err();
    let error = error.to_string();
    let (from, _) = error.split_once(": ").unwrap();
    for (why, names_no_host) in [
        ("Name or service not known", true),
        ("No address associated with hostname", true),
        ("nodename nor servname provided, or not known", true),
        ("Name does not resolve", true),
        ("Temporary failure in name resolution", false),
        ("Non-recoverable failure in name resolution", false),
        ("Try again", false),
    ] {
        assert_eq!(call::names_no_host(&format!("{from}: {why}")), names_no_host, "{why}");
    }
    assert!(!call::names_no_host("Connection refused (os error 111)"));
}

#[tokio::test]
async fn a_silent_farm_is_given_up() {
    let bench = Bench::new();
    let mut server = Server::start(|_: &Heard| Reply::Hold(vec![])).await;
    let client = bench.client(&server.url);
    let (answer, ()) = tokio::join!(client.info(), async {
        server.count.wait_for(|count| *count == 1).await.unwrap();
        bench.advance(30_000);
    });
    assert!(answer.unwrap_err().to_string().ends_with("no answer within 30 s"));
}

#[tokio::test]
async fn waiting_for_the_end_asks_until_it_is_one() {
    let bench = Bench::new();
    let white = chunked(200, &[], b"\n\n", false);
    let answers = vec![json(&view(StateWord::Running)), vec![], white, json(&view(StateWord::Failed))];
    let server = Server::start(script(answers)).await;
    let done = bench.pass(1, bench.client(&server.url).job_wait(JOB)).await;
    assert_eq!(done.unwrap().state, StateWord::Failed);
    assert!(server.heard().iter().all(|heard| heard.query("wait") == Some("terminal")));
}

#[tokio::test]
async fn waiting_may_take_long_as_long_as_the_farm_shows_life() {
    let bench = Bench::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = bench.client(&format!("http://{}", listener.local_addr().unwrap()));
    let farm = async {
        let (mut socket, _) = listener.accept().await.unwrap();
        hear(&mut socket).await.unwrap();
        let view = serde_json::to_vec(&view(StateWord::Succeeded)).unwrap();
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", 30 + view.len());
        socket.write_all(head.as_bytes()).await.unwrap();
        for _ in 0..30 {
            socket.write_all(b"\n").await.unwrap();
            bench.sleep_until(bench.now().mono + 10_000).await;
        }
        socket.write_all(&view).await.unwrap();
    };
    let (done, ()) = bench.pass(5, async { tokio::join!(client.job_wait(JOB), farm) }).await;
    assert_eq!(done.unwrap().state, StateWord::Succeeded);
    assert!(bench.now().mono >= Mono(300_000));
}

#[tokio::test]
async fn questions_are_spelled_as_the_router_reads_them() {
    let bench = Bench::new();
    let server = Server::start(|_: &Heard| reply(404, &[], b"{}")).await;
    let client = bench.client(&server.url);
    let query = JobQuery {
        limit: Some(5),
        cursor: Some("a b".into()),
        state: vec![StateWord::Queued, StateWord::Running],
        mine: true,
    };
    client.jobs(&query).await.unwrap_err();
    client.jobs(&JobQuery::default()).await.unwrap_err();
    client.find_job("k3x9ab").await.unwrap_err();
    client.cancel(JOB).await.unwrap_err();
    client.drain(WorkerId::from_raw(1), &DrainRequest::default()).await.unwrap_err();
    client.revoke_token(TokenId::from_raw(1)).await.unwrap_err();
    for text in ["", "../tokens", "a b", "%2e%2e"] {
        let error = client.find_job(text).await.unwrap_err();
        assert_eq!(error.problem().map(|problem| problem.code), Some(ErrorCode::NotFound), "{text}");
    }
    let lines: Vec<String> = server.heard().into_iter().map(|heard| heard.line).collect();
    let expect = [
        "GET /v1/jobs?limit=5&cursor=a+b&state=queued%2Crunning&mine=true".to_owned(),
        "GET /v1/jobs".to_owned(),
        "GET /v1/jobs/k3x9ab".to_owned(),
        format!("POST /v1/jobs/{JOB}/cancel"),
        format!("POST /v1/workers/{}/drain", WorkerId::from_raw(1)),
        format!("DELETE /v1/tokens/{}", TokenId::from_raw(1)),
    ];
    assert_eq!(lines, expect);
}

#[test]
fn addresses_are_checked_and_never_show_a_password() {
    let bench = Bench::new();
    let open = |url: &str, token: &str| {
        let token = Some(Secret::new(token.to_owned()));
        Client::new(Options { url: url.into(), token, agent: "t".into() }, bench.clone())
    };
    for (url, base) in [
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:3000/", "http://[::1]:3000"),
        ("https://farm.example/alloy/", "https://farm.example/alloy"),
    ] {
        assert_eq!(open(url, TOKEN).unwrap().url(), base);
    }
    for url in [
        "",
        "localhost:3000",
        "farm",
        "ftp://farm",
        "http://me:hunter2@farm",
        "http://me:hunter2@fa rm",
        "http://farm/?a=1",
    ] {
        let error = open(url, TOKEN).unwrap_err().to_string();
        assert!(error.starts_with("cannot reach the farm at ") && !error.contains("hunter2"), "{error}");
    }
    let error = open("http://farm", "alloy_pat_a\nb").unwrap_err().to_string();
    assert!(error.contains("token") && !error.contains("alloy_pat"), "{error}");
}

#[tokio::test]
async fn only_a_farm_is_ready_and_it_tells_the_time() {
    let date = ("date", "Tue, 14 Nov 2023 22:13:20 GMT");
    let answers = vec![
        reply(200, &[date], b"ready\n"),
        reply(200, &[], b"ready\nstorage_full: 1 MiB is free\n"),
        reply(200, &[date], b"<html>please log in</html>"),
        problem(ErrorCode::Unavailable),
    ];
    let bench = Bench::new();
    let server = Server::start(script(answers)).await;
    let client = bench.client(&server.url);
    assert_eq!(client.ready().await, Ok(Some(Ms(1_700_000_000_000))));
    assert_eq!(client.ready().await, Ok(None));
    assert!(client.ready().await.unwrap_err().to_string().contains("is no farm"));
    assert_eq!(client.ready().await.unwrap_err().problem().map(|problem| problem.code), Some(ErrorCode::Unavailable));
}
