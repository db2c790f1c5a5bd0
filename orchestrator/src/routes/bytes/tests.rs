use alloy_shared::env::{Env, Ms};
use alloy_shared::id::{DEFAULT_ORG, JobId, Labels, OrgId, TokenId, WorkerId};
use alloy_shared::limits::Limits;
use alloy_shared::runtime::SystemEnv;
use alloy_shared::secret::{Secret, Token, TokenKind};
use alloy_shared::wire::farm::Role;
use alloy_shared::wire::job::{JobSpec, Phase, Timings};
use alloy_shared::wire::source::{PACK_END, PackFrame, PackReader};
use axum::http::{Method, Request};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use super::*;
use crate::auth::{Auth, Grants};
use crate::blobs::Blobs;
use crate::hub::Hub;
use crate::job::{Lease, State as JobState, Step, Tries};
use crate::log_sync::LogSync;
use crate::logs::Files;
use crate::store::mem::MemStore;
use crate::store::write::InsertJob;
use crate::store::{Artifact, Attempt, Group, Store, TokenRow, Write};
use crate::wake::Wake;

struct World {
    app: Arc<App>,
    token: String,
    stranger: String,
    at: AttemptRef,
}

struct Answer {
    status: u16,
    headers: HeaderMap,
    body: Bytes,
}

impl Answer {
    fn header(&self, name: &str) -> &str {
        header_text(&self.headers, name).unwrap_or("")
    }
    fn code(&self) -> String {
        serde_json::from_slice::<serde_json::Value>(&self.body).unwrap()["code"].as_str().unwrap_or_default().to_owned()
    }
}

async fn token(store: &MemStore, org: OrgId, n: u8) -> String {
    let token = Token::mint(TokenKind::Personal, [n; 32]);
    let row = TokenRow {
        id: TokenId::from_raw(n.into()),
        org,
        hash: token.hash(),
        kind: TokenKind::Personal,
        role: Role::Developer,
        name: format!("dev {n}"),
        shown: token.shown(),
        labels: Labels::default(),
        created_at: Ms(0),
        expires_at: None,
        revoked_at: None,
        used_by: None,
    };
    store.commit(&[Group(vec![Write::AddToken(row)])]).await.unwrap();
    token.expose().to_owned()
}

/// A farm with one running job.
async fn world() -> World {
    world_with(Logs::memory()).await
}

async fn world_with(logs: Logs) -> World {
    let env: Arc<dyn Env> = Arc::new(SystemEnv::detached());
    let store = Arc::new(MemStore::default());
    let hub = Arc::new(Hub::new(Limits::default(), env.now().mono));
    let (wake, logs) = (Arc::new(Wake::default()), Arc::new(logs));
    let door =
        crate::desk_loop::spawn(store.clone(), hub.clone(), wake.clone(), env.clone(), Limits::default(), None).await;
    let at = AttemptRef { job: JobId::from_raw(5), attempt: 2 };
    insert_job(&store, at).await;
    let app = App {
        desk: door.unwrap(),
        log_sync: LogSync::spawn(logs.clone(), hub.clone(), wake.clone(), &env),
        auth: Auth::new(env.clone()),
        grants: Grants::new(&Secret::new([7; 32])),
        base_url: "http://localhost:3000".to_owned(),
        behind_proxy: false,
        random: || [1; 32],
        shared: None,
        stopping: CancellationToken::new(),
        submits: tokio_util::task::TaskTracker::new(),
        sessions: tokio_util::task::TaskTracker::new(),
        keep: crate::keep::Keep::default(),
        limits: Limits::default(),
        blobs: Arc::new(Blobs::memory()),
        store: store.clone(),
        hub,
        wake,
        logs,
        env,
    };
    let (own, other) = (token(&store, DEFAULT_ORG, 1).await, token(&store, OrgId::from_raw(9), 2).await);
    World { app: Arc::new(app), token: own, stranger: other, at }
}

async fn insert_job(store: &MemStore, at: AttemptRef) {
    let worker = WorkerId::from_raw(3);
    let lease = Lease { attempt: at.attempt, worker, assigned_at: Ms(1), avoid: Vec::new() };
    let state = JobState {
        tries: Tries { made: at.attempt, lost: 1, failed: 0 },
        step: Step::Running { lease, accepted_at: Ms(2), phase: Phase::Executing },
    };
    let job = Job {
        id: at.job,
        org: DEFAULT_ORG,
        version: 1,
        state,
        spec: Arc::new(JobSpec { shell: Some("make".to_owned()), ..JobSpec::default() }),
        source: None,
        created_at: Ms(0),
        created_by: "dev".to_owned(),
        events: 0,
    };
    let attempt = Attempt {
        at,
        org: DEFAULT_ORG,
        worker,
        assigned_at: Ms(1),
        ended_at: None,
        end: None,
        timings: Timings::default(),
        seq: 0,
        facts: Default::default(),
        log_len: None,
        log_gone_at: None,
        files_gone_at: None,
    };
    let insert = InsertJob { job, key: None, attempt: Some(attempt), events: Vec::new() };
    store.commit(&[Group(vec![Write::InsertJob(Box::new(insert))])]).await.unwrap().groups[0].clone().unwrap();
}

impl World {
    async fn send(
        &self,
        token: &str,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Body>,
    ) -> Answer {
        let mut request =
            Request::builder().method(method).uri(path).header("authorization", format!("Bearer {token}"));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(body.into()).unwrap();
        let response = crate::routes::router(self.app.clone()).oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        Answer { status: parts.status.as_u16(), headers: parts.headers, body }
    }

    /// The body of an answer that goes on.
    async fn stream(&self, url: &str) -> axum::body::BodyDataStream {
        let authorization = format!("Bearer {}", self.token);
        let request = Request::get(url).header("authorization", authorization).body(Body::empty()).unwrap();
        let response = crate::routes::router(self.app.clone()).oneshot(request).await.unwrap();
        assert_eq!(response.status(), 200);
        response.into_body().into_data_stream()
    }

    async fn get(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        self.send(&self.token, Method::GET, path, headers, Body::empty()).await
    }

    fn grant(&self) -> String {
        self.app.grants.mint(&self.at).expose().clone()
    }

    async fn log(&self, attempt: u32, bytes: &'static [u8]) {
        let at = AttemptRef { attempt, ..self.at };
        let have = self.app.logs.len(&at).await.unwrap();
        self.app.logs.append(&at, have, Bytes::from_static(bytes)).await.unwrap();
    }

    /// Puts an artifact as the worker would, and into the job's books.
    async fn artifact(&self, path: &str, bytes: &'static [u8], link: Option<&str>) -> Digest {
        let artifact = |digest| Artifact {
            at: self.at,
            org: DEFAULT_ORG,
            path: path.to_owned(),
            size: bytes.len() as u64,
            sha256: digest,
            mode: 0o644,
            link: link.map(str::to_owned),
        };
        let digest = Digest::of(bytes);
        let place = path::attempt_artifact(&self.at, &digest);
        let answer =
            self.send(&self.grant(), Method::PUT, &place, &[("content-length", &bytes.len().to_string())], bytes).await;
        assert_eq!(answer.status, 201, "{:?}", answer.body);
        self.advance(0, vec![artifact(digest)]).await;
        digest
    }

    /// Puts files and new attempts into the job's books.
    async fn advance(&self, attempts: u32, artifacts: Vec<Artifact>) {
        let mut job = self.app.store.job(&Scope::farm(), &self.at.job).await.unwrap().unwrap();
        job.version += 1;
        job.state.tries.made += attempts;
        let advance = crate::store::write::Advance {
            next: job,
            guard: crate::store::Guard::Version,
            attempt: None,
            events: Vec::new(),
            artifacts,
        };
        let group = Group(vec![Write::Advance(Box::new(advance))]);
        self.app.store.commit(&[group]).await.unwrap().groups[0].clone().unwrap();
    }
}

#[tokio::test]
async fn a_retried_job_does_not_show_what_an_earlier_attempt_left() {
    let world = world().await;
    world.artifact("app", b"of the lost attempt", None).await;
    let list = format!("{}/artifacts", path::job(world.at.job));
    let shown = async || serde_json::from_slice::<ArtifactList>(&world.get(&list, &[]).await.body).unwrap().artifacts;
    assert_eq!(shown().await.len(), 1);
    world.advance(1, Vec::new()).await;
    assert!(shown().await.is_empty());
    assert_eq!(world.get(&path::job_artifact(world.at.job, "app"), &[]).await.status, 404);
}

#[tokio::test]
async fn a_source_travels_from_a_developer_to_a_worker() {
    let world = world().await;
    let blobs: Vec<(Digest, Bytes)> =
        [&b"one"[..], b"two", b"three"].iter().map(|bytes| (Digest::of(bytes), Bytes::from_static(bytes))).collect();
    let entries = blobs.iter().enumerate().map(|(n, (digest, bytes))| alloy_shared::wire::source::Entry {
        path: format!("f{n}"),
        kind: alloy_shared::wire::source::EntryKind::File,
        mode: 0o644,
        size: bytes.len() as u64,
        chunks: vec![*digest],
        target: None,
    });
    let manifest = alloy_shared::wire::source::Manifest::new(entries.collect()).unwrap();
    let (digest, text) = (manifest.digest(), manifest.encode());
    let packed = zstd::bulk::compress(&text, 3).unwrap();
    let url = path::source(&digest);
    let encoding = [("content-encoding", "zstd")];
    let first = world.send(&world.token, Method::PUT, &url, &encoding, packed).await;
    let status: SourceStatus = serde_json::from_slice(&first.body).unwrap();
    assert_eq!((first.status, status.complete, status.missing.len()), (200, false, 3));
    let frame = PackFrame::pack(&blobs, 3);
    let pack = [&frame.encode_header()[..], &frame.stored, &PACK_END].concat();
    let wrong = world.send(&world.token, Method::POST, path::PACKS, &[], pack[..pack.len() - 1].to_vec()).await;
    assert_eq!((wrong.status, wrong.code().as_str()), (422, "invalid_source"));
    let stored = world.send(&world.token, Method::POST, path::PACKS, &[], pack).await;
    assert_eq!(serde_json::from_slice::<PackStored>(&stored.body).unwrap(), PackStored { blobs: 3, bytes: 11 });
    let second = world.send(&world.token, Method::PUT, &url, &[], text.clone()).await;
    assert!(serde_json::from_slice::<SourceStatus>(&second.body).unwrap().complete);

    let asked = serde_json::to_vec(&BlobRequest { digests: vec![blobs[1].0] }).unwrap();
    let json = [("content-type", "application/json")];
    let blobs_url = path::attempt_blobs(&world.at);
    let got = world.send(&world.grant(), Method::POST, &blobs_url, &json, asked.clone()).await;
    assert_eq!(got.status, 200);
    let mut reader = PackReader::default();
    reader.push(&got.body);
    assert!(reader.next_frame().unwrap().unwrap().unpack().unwrap().contains(&blobs[1]));
    assert!(reader.next_frame().unwrap().is_none());
    reader.finish().unwrap();
    for wrong in [&world.token, &world.app.grants.mint(&AttemptRef { attempt: 1, ..world.at }).expose().clone()] {
        assert_eq!(world.send(wrong, Method::POST, &blobs_url, &json, asked.clone()).await.status, 401);
    }
    let none = world.send(&world.grant(), Method::GET, &path::attempt_source(&world.at), &[], Body::empty()).await;
    assert_eq!(none.code(), "not_found");
}

#[tokio::test]
async fn a_tar_is_taken_and_a_wrong_one_is_refused_by_name() {
    let world = world().await;
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(3);
    header.set_mode(0o644);
    builder.append_data(&mut header, "a/b", &b"abc"[..]).unwrap();
    let tar = builder.into_inner().unwrap();
    let done = world
        .send(&world.token, Method::POST, path::SOURCES, &[("content-type", "application/x-tar")], tar.clone())
        .await;
    let status: SourceStatus = serde_json::from_slice(&done.body).unwrap();
    assert_eq!((done.status, status.complete), (201, true));
    let cut = world.send(&world.token, Method::POST, path::SOURCES, &[], tar[..700].to_vec()).await;
    assert_eq!((cut.status, cut.code().as_str()), (422, "invalid_source"));
    assert!(String::from_utf8_lossy(&cut.body).contains("a/b"));
    let text = world.send(&world.token, Method::POST, path::SOURCES, &[("content-type", "text/html")], tar).await;
    assert_eq!((text.status, text.code().as_str()), (400, "invalid_body"));
}

#[tokio::test]
async fn a_log_is_read_by_offset_and_by_range() {
    let world = world().await;
    world.log(1, b"the first try").await;
    world.log(2, b"0123456789").await;
    let url = path::job_log(world.at.job);
    let whole = world.get(&url, &[]).await;
    assert_eq!((whole.status, &whole.body[..]), (200, &b"0123456789"[..]));
    assert_eq!(whole.header("content-type"), "text/plain; charset=utf-8");
    assert_eq!(whole.header("x-content-type-options"), "nosniff");
    assert!(whole.header("content-security-policy").starts_with("sandbox"));
    assert_eq!((whole.header("alloy-attempt"), whole.header("alloy-offset")), ("2", "0"));
    assert_eq!(whole.header("content-length"), "10");
    assert_eq!(&world.get(&format!("{url}?attempt=1"), &[]).await.body[..], b"the first try");
    let tail = world.get(&format!("{url}?offset=7"), &[]).await;
    assert_eq!((tail.status, &tail.body[..], tail.header("alloy-offset")), (200, &b"789"[..], "7"));
    assert_eq!(world.get(&format!("{url}?offset=10"), &[]).await.body.len(), 0);
    let part = world.get(&url, &[("range", "bytes=2-4")]).await;
    assert_eq!((part.status, &part.body[..], part.header("content-range")), (206, &b"234"[..], "bytes 2-4/10"));
    for (url, range) in [(url.clone(), "bytes=10-"), (format!("{url}?offset=11"), "bytes=0-")] {
        let none = world.get(&url, &[("range", range)]).await;
        assert_eq!((none.status, none.header("content-range")), (416, "bytes */10"));
        assert_eq!(none.code(), "range_not_satisfiable");
    }
    for wrong in ["attempt=3", "attempt=0"] {
        assert_eq!(world.get(&format!("{url}?{wrong}"), &[]).await.status, 404);
    }
    for wrong in ["follow=maybe", "offset=-1", "ofset=1"] {
        assert_eq!(world.get(&format!("{url}?{wrong}"), &[]).await.status, 400);
    }
    assert_eq!(world.send(&world.stranger, Method::GET, &url, &[], Body::empty()).await.status, 404);
}

#[tokio::test]
async fn a_followed_log_is_cut_when_the_farm_stops_and_not_before() {
    let world = world().await;
    world.log(2, b"so far ").await;
    let url = format!("{}?follow=1&offset=3", path::job_log(world.at.job));
    let mut body = world.stream(&url).await;
    assert_eq!(&body.next().await.unwrap().unwrap()[..], b"far ");
    world.log(2, b"and on").await;
    world.app.wake.logged(world.at.job);
    assert_eq!(&body.next().await.unwrap().unwrap()[..], b"and on");
    world.app.stopping.cancel();
    assert!(body.next().await.unwrap().is_err());
}

#[tokio::test]
async fn a_followed_log_that_cannot_be_read_on_is_cut_and_not_ended() {
    let dir = tempfile::tempdir().unwrap();
    let files = |dir: &tempfile::TempDir| Logs::Files(Files::open(dir.path().to_owned(), 0).unwrap());
    let before = files(&dir);
    let world = world_with(files(&dir)).await;
    before.append(&world.at, 0, Bytes::from_static(b"rotten")).await.unwrap();
    before.seal(&world.at).await.unwrap();
    let name = format!("{}/{}.log", world.at.job, world.at.attempt);
    std::fs::write(dir.path().join(name), b"r0tten").unwrap();
    let mut body = world.stream(&format!("{}?follow=1", path::job_log(world.at.job))).await;
    assert!(body.next().await.unwrap().is_err());
}

#[tokio::test]
async fn an_upload_of_an_artifact_goes_on_and_ends_verified() {
    let world = world().await;
    let bytes = b"0123456789";
    let digest = Digest::of(bytes);
    let (url, grant) = (path::attempt_artifact(&world.at, &digest), world.grant());
    let have = async || {
        let head = world.send(&grant, Method::HEAD, &url, &[], Body::empty()).await;
        (head.status, head.header("alloy-offset").to_owned())
    };
    assert_eq!(have().await, (200, "0".to_owned()));
    let put = async |range: &str, bytes: &'static [u8]| {
        world.send(&grant, Method::PUT, &url, &[("content-range", range)], bytes).await
    };
    assert_eq!(put("bytes 0-3/10", b"0123").await.status, 202);
    assert_eq!(have().await.1, "3");
    assert_eq!(put("bytes 3-9/10", b"34").await.code(), "incomplete_body");
    assert_eq!(put("bytes 8-9/10", b"89").await.code(), "offset_mismatch");
    assert_eq!(put("bytes 8-7/10", b"").await.code(), "invalid_parameter");
    assert_eq!(have().await.1, "4");
    let done = put("bytes 4-9/10", b"456789").await;
    assert_eq!((done.status, done.header("alloy-offset")), (201, "10"));
    assert_eq!(have().await.1, "10");
    assert_eq!(put("bytes */10", b"").await.status, 201);
    let empty = path::attempt_artifact(&world.at, &Digest::of(b""));
    assert_eq!(
        world.send(&grant, Method::PUT, &empty, &[("content-range", "bytes */0")], Body::empty()).await.status,
        201
    );
    let other = path::attempt_artifact(&world.at, &Digest::of(b"other"));
    let wrong = world.send(&grant, Method::PUT, &other, &[("content-range", "bytes 0-4/5")], &b"wrong"[..]).await;
    assert_eq!((wrong.status, wrong.code().as_str()), (422, "digest_mismatch"));
    assert_eq!(world.send(&world.token, Method::PUT, &url, &[], Body::empty()).await.status, 401);
}

#[tokio::test]
async fn an_artifact_is_always_a_download() {
    let world = world().await;
    let page = b"<script>alert(1)</script>";
    let digest = world.artifact("out/evil page.html", page, None).await;
    world.artifact("out/link", b"", Some("evil page.html")).await;
    let list = world.get(&format!("{}/artifacts", path::job(world.at.job)), &[]).await;
    let list: ArtifactList = serde_json::from_slice(&list.body).unwrap();
    assert_eq!(list.artifacts.iter().map(|a| a.path.as_str()).collect::<Vec<_>>(), ["out/evil page.html", "out/link"]);
    let url = path::job_artifact(world.at.job, "out/evil page.html");
    let whole = world.get(&url, &[]).await;
    assert_eq!((whole.status, &whole.body[..]), (200, &page[..]));
    let etag = format!("\"{digest}\"");
    for (name, want) in [
        ("content-type", "application/octet-stream"),
        ("content-disposition", "attachment; filename=\"evil_page.html\"; filename*=UTF-8''evil%20page.html"),
        ("x-content-type-options", "nosniff"),
        ("content-security-policy", "sandbox; default-src 'none'"),
        ("accept-ranges", "bytes"),
        ("etag", &etag),
        ("content-length", "25"),
    ] {
        assert_eq!(whole.header(name), want, "{name}");
    }
    let part = world.get(&url, &[("range", "bytes=-9"), ("if-range", &etag)]).await;
    assert_eq!((part.status, &part.body[..], part.header("content-range")), (206, &b"</script>"[..], "bytes 16-24/25"));
    let stale = world.get(&url, &[("range", "bytes=-9"), ("if-range", "\"old\"")]).await;
    assert_eq!((stale.status, stale.body.len()), (200, 25));
    let behind = world.get(&url, &[("range", "bytes=25-")]).await;
    assert_eq!((behind.status, behind.header("content-range")), (416, "bytes */25"));
    assert_eq!(world.get(&url, &[("if-none-match", &etag)]).await.status, 304);
    let head = world.send(&world.token, Method::HEAD, &url, &[], Body::empty()).await;
    assert_eq!((head.status, head.header("content-length"), head.body.len()), (200, "25", 0));
    for wrong in ["out/link", "out", "out/evil", "../x"] {
        assert_eq!(world.get(&path::job_artifact(world.at.job, wrong), &[]).await.status, 404, "{wrong}");
    }
    assert_eq!(world.send(&world.stranger, Method::GET, &url, &[], Body::empty()).await.status, 404);
}

#[tokio::test]
async fn a_body_that_breaks_off_is_not_called_too_large() {
    let world = world().await;
    let broken = || Body::from_stream(stream::iter([Ok(Bytes::from_static(b"{")), Err(std::io::Error::other("cut"))]));
    let url = path::source(&Digest::of(b"x"));
    let cut = world.send(&world.token, Method::PUT, &url, &[], broken()).await;
    assert_eq!((cut.status, cut.code().as_str(), cut.header("retry-after")), (408, "incomplete_body", "1"));
    let json = [("content-type", "application/json")];
    let cut = world.send(&world.token, Method::POST, path::JOBS, &json, broken()).await;
    assert_eq!((cut.status, cut.code().as_str(), cut.header("retry-after")), (408, "incomplete_body", "1"));
    let long = vec![b' '; limits::JSON_BODY_MAX as usize + 1];
    assert_eq!(world.send(&world.token, Method::POST, path::JOBS, &json, long).await.code(), "too_large");
}

#[tokio::test]
async fn manifests_share_a_bounded_room_and_give_it_back() {
    let all: &'static Semaphore = Box::leak(Box::new(Semaphore::new(8)));
    let mut one = Room::new(all);
    one.hold(3 << 10).unwrap();
    one.hold(2 << 10).unwrap();
    one.hold((3 << 10) + 1).unwrap();
    assert_eq!(all.available_permits(), 4, "by the KiB, and what is held counts");
    let mut two = Room::new(all);
    assert_eq!(two.hold(5 << 10).unwrap_err().code(), ErrorCode::TooManyRequests);
    two.hold(4 << 10).unwrap();
    drop(one);
    drop(two);
    assert_eq!(all.available_permits(), 8);

    // What unpacks to more than there is room for is refused before it lies there.
    let text = vec![b'x'; 5 << 20];
    let small = zstd::bulk::compress(&text, 1).unwrap();
    let room: &'static Semaphore = Box::leak(Box::new(Semaphore::new(3 << 10)));
    let fault = unzstd(&small, Room::new(room)).map(drop).unwrap_err();
    assert_eq!((fault.code(), room.available_permits()), (ErrorCode::TooManyRequests, 3 << 10));
    let room: &'static Semaphore = Box::leak(Box::new(Semaphore::new(9 << 10)));
    let (whole, held) = unzstd(&small, Room::new(room)).unwrap();
    assert!(whole == text && room.available_permits() < 4 << 10, "held while it is used");
    drop(held);
    assert_eq!(room.available_permits(), 9 << 10);
}
