use super::*;

#[test]
fn every_fault_and_every_code_of_the_farm_has_its_exit_code() {
    for (fault, code, before_job) in [
        (Fault::Error, 1, 125),
        (Fault::Usage, 2, 2),
        (Fault::Unauthenticated, 4, 125),
        (Fault::Forbidden, 4, 125),
        (Fault::NotFound, 5, 125),
        (Fault::Unreachable, 7, 125),
        (Fault::Interrupted, 130, 130),
        (Fault::Pipe, 141, 141),
    ] {
        let failure = Failure::new(fault, "x");
        let (elsewhere, of_run) = (failure.exit_code(false), failure.exit_code(true));
        assert_eq!((elsewhere, of_run, failure.of_a_job().exit_code(true)), (code, before_job, code), "{fault:?}");
    }
    for code in ErrorCode::ALL {
        let expected = match code.http_status() {
            401 | 403 => 4,
            404 | 410 => 5,
            503 => 7,
            _ => 1,
        };
        let failure = Failure::of(ClientError::Problem(Problem::new(*code, "x")), "http://farm");
        assert_eq!(failure.exit_code(false), expected, "{code:?}");
    }
}

#[test]
fn a_farm_whose_database_is_away_is_asked_again_later() {
    let failure = |problem: Problem| Failure::of(ClientError::Problem(problem), "http://farm").hint.unwrap_or_default();
    let away = Problem::new(ErrorCode::Unavailable, "the database is away");
    assert!(failure(away.clone()).contains("try again"));
    assert_eq!(failure(Problem { hint: Some("tea".into()), ..away }), "tea", "the farm knows better");
}

#[test]
fn whoever_speaks_otherwise_gets_the_hint_that_came_with_it_or_the_doctor() {
    let why = "no coffee\n  hint: not one".to_owned();
    for (hint, expected) in [(Some("drink tea"), "drink tea"), (None, DOCTOR_HINT)] {
        let error = ClientError::Protocol { why: why.clone(), hint: hint.map(str::to_owned) };
        let failure = Failure::of(error, "http://pot");
        assert_eq!(failure.message, format!("http://pot answers, but not as a farm does: {why}"));
        assert_eq!(failure.hint.as_deref(), Some(expected));
    }
}

#[test]
fn a_failure_says_what_to_do_and_json_carries_the_code() {
    let problem = Problem::new(ErrorCode::Unauthenticated, "no token");
    let failure = Failure::of(ClientError::Problem(problem), "http://farm:3000");
    let text: Vec<String> = failure.lines().into_iter().map(|(_, line)| line).collect();
    assert!(text[0].contains("not signed in to http://farm:3000"), "{text:?}");
    assert!(text[1].contains("alloy login http://farm:3000"), "{text:?}");
    let json = failure.json(125);
    assert_eq!(json["code"], "unauthenticated");
    assert_eq!(json["exit_code"], 125);
    assert_eq!(json["exit_origin"], "alloy");
    assert_eq!(Failure::usage("x").json(2)["code"], "usage");
}

#[test]
fn a_wrong_field_is_told_once_and_by_its_flag() {
    for (field, flag) in [
        ("env.1A", "--env 1A"),
        ("/env/1A", "--env 1A"),
        ("artifacts[1]", "--artifact (number 2)"),
        ("argv[0]", "the command's words (number 1)"),
        ("labels.a b", "--label a b"),
        ("timeout_ms", "--timeout"),
    ] {
        assert_eq!(flag_of(field), flag);
    }
    let mut problem = Problem::new(ErrorCode::InvalidSpec, "timeout_ms is 9, at most 5 ms are allowed");
    problem.errors = vec![FieldError { field: "timeout_ms".into(), message: "is 9, at most 5 ms are allowed".into() }];
    let failure = Failure::of(ClientError::Problem(problem), "http://farm");
    let lines: Vec<String> = failure.lines().into_iter().map(|(_, line)| line).collect();
    assert_eq!(lines, ["--timeout is 9, at most 5 ms are allowed"]);
    assert_eq!(failure.json(125)["errors"][0]["field"], "timeout_ms", "programs get the field");
}

#[test]
fn a_strangers_message_cannot_move_the_cursor() {
    let problem = Problem::new(ErrorCode::Internal, "\u{1b}[2Jgone\nerror: fake");
    let failure = Failure::of(ClientError::Problem(problem), "http://farm");
    assert!(failure.lines().iter().all(|(_, line)| !line.contains(['\u{1b}', '\n'])));
}

#[test]
fn words_for_numbers() {
    for (bytes, text) in [(0, "0 B"), (999, "999 B"), (1_500, "1.5 kB"), (48_200_000, "48.2 MB"), (999_960, "1.0 MB")] {
        assert_eq!(size(bytes), text);
    }
    for (ms, text) in [(0, "0.0s"), (440, "0.4s"), (44_000, "44s"), (92_000, "1m 32s"), (7_500_000, "2h 05m")] {
        assert_eq!(duration(ms), text);
    }
    assert_eq!((count(7), count(1_204), count(1_234_567)), ("7".into(), "1,204".into(), "1,234,567".into()));
    assert_eq!(plural(1, "file"), "1 file");
    assert_eq!(ago("2023-11-14T22:13:20Z", Ms(1_700_000_000_000 + 125_000)), "2m ago");
}

#[test]
fn a_table_lines_up_for_people_and_is_tabs_for_programs() {
    let rows = vec![vec!["a".to_owned(), "long cell".to_owned()], vec!["bcd".to_owned(), "x".to_owned()]];
    assert_eq!(table(&["N", "WHAT"], &rows, true), "N    WHAT\na    long cell\nbcd  x\n");
    assert_eq!(table(&["N", "WHAT"], &rows, false), "a\tlong cell\nbcd\tx\n");
}

#[tokio::test]
async fn a_sink_delivers_every_byte_and_reports_a_reader_that_left() {
    let (tx, rx) = std::sync::mpsc::channel();
    let mut sink = Sink::start(None, move |bytes| tx.send(bytes.to_vec()).map_err(std::io::Error::other)).unwrap();
    for part in [&b"\x1b[2J"[..], b"raw", b"\xff"] {
        sink.write(Bytes::from_static(part)).await.unwrap();
    }
    sink.finish().await.unwrap();
    assert_eq!(rx.iter().flatten().collect::<Vec<u8>>(), b"\x1b[2Jraw\xff");

    for (text, shown) in [("no end", "no end\n"), ("an end\n", "an end\n"), ("", "")] {
        let (tx, rx) = std::sync::mpsc::channel();
        let cleaner = Some(Sanitizer::default());
        let mut sink =
            Sink::start(cleaner, move |bytes| tx.send(bytes.to_vec()).map_err(std::io::Error::other)).unwrap();
        sink.write(Bytes::from_static(text.as_bytes())).await.unwrap();
        sink.finish().await.unwrap();
        assert_eq!(rx.iter().flatten().collect::<Vec<u8>>(), shown.as_bytes(), "at a terminal");
    }

    let gone = || std::io::Error::from(std::io::ErrorKind::BrokenPipe);
    let mut sink = Sink::start(None, move |_| Err(gone())).unwrap();
    while sink.write(Bytes::from_static(b"x")).await.is_ok() {}
    assert_eq!(sink.finish().await.unwrap_err().fault, Fault::Pipe);

    let full = || std::io::Error::from(std::io::ErrorKind::StorageFull);
    let mut sink = Sink::start(None, move |_| Err(full())).unwrap();
    let failure = loop {
        if let Err(failure) = sink.write(Bytes::from_static(b"x")).await {
            break failure;
        }
    };
    assert_eq!(failure.fault, Fault::Error);
    assert!(failure.message.contains("standard output: "), "{failure:?}");
}
