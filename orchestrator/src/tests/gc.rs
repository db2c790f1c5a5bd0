//! What goes, and what stays: the collector over the memory stores, day by day.

use std::sync::Arc;

use alloy_shared::env::Ms;
use alloy_shared::id::{AttemptRef, DEFAULT_ORG, Digest, JobId, WorkerId};
use alloy_shared::wire::job::{End, JobSpec, Timings};
use alloy_shared::wire::source::{Entry, EntryKind, Manifest, PACK_END, PackFrame};
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt as _, stream};

use super::{TestEnv, app_with, get, token};
use crate::App;
use crate::blobs::{self, BlobKey, Blobs, log_object};
use crate::gc::Collector;
use crate::job::{Lease, State, Step, Tries};
use crate::keep::DAY_MS;
use crate::ops::upload::Depot;
use crate::pack;
use crate::store::tidy::{RetentionRow, Tidy};
use crate::store::write::InsertJob;
use crate::store::{Artifact, Attempt, BlobKind, Group, Guard, Job, Scope, Write};

struct World {
    app: Arc<App>,
    clock: Arc<TestEnv>,
    mem: blobs::Mem,
}

impl World {
    async fn new() -> Self {
        let (mem, clock) = (blobs::Mem::default(), TestEnv::new());
        let world = Self { app: app_with(Blobs::Mem(mem.clone()), clock.clone(), None).await, clock, mem };
        world.days(0);
        world
    }

    fn now(&self) -> Ms {
        self.app.env.now().wall
    }

    fn days(&self, days: u64) {
        self.clock.advance(days * DAY_MS);
        self.mem.tell_time(self.now());
    }

    fn depot(&self) -> Depot<'_> {
        let app = &self.app;
        Depot { store: &*app.store, blobs: &app.blobs, env: &app.env, fresh_ms: DAY_MS, org: DEFAULT_ORG }
    }

    /// A look at everything, by one who has not looked before.
    async fn collect(&self) {
        let mut collector = Collector::default();
        while collector.step(&self.app).await.unwrap() {}
    }

    /// Time passes, with a look at everything each day.
    async fn pass(&self, days: u64) {
        for _ in 0..days {
            self.days(1);
            self.collect().await;
        }
    }

    fn keys(&self) -> Vec<String> {
        self.mem.keys().iter().map(ToString::to_string).collect()
    }

    async fn commit(&self, write: Write) {
        let done = self.app.store.commit(&[Group(vec![write])]).await.unwrap();
        assert!(done.groups[0].is_ok(), "{done:?}");
    }

    /// Uploads a source as the command line does.
    async fn upload(&self, files: &[&str]) -> Digest {
        let (digest, text, blobs) = tree(files);
        let status = self.depot().put_source(digest, text.clone()).await.unwrap();
        if !status.complete {
            let blobs: Vec<_> = blobs.into_iter().filter(|(digest, _)| status.missing.contains(digest)).collect();
            self.depot().pack(packed(&blobs)).await.unwrap();
            assert!(self.depot().put_source(digest, text).await.unwrap().complete);
        }
        digest
    }

    /// Everything of the source can be had, as an attempt has it.
    async fn whole(&self, source: Digest) -> bool {
        let Ok((_, mut body)) = self.depot().manifest(&source).await else { return false };
        let mut text = BytesMut::new();
        while let Some(part) = body.next().await {
            text.extend_from_slice(&part.unwrap());
        }
        let needed = Manifest::decode(&text).unwrap().blobs();
        let Ok(mut body) = self.depot().source_blobs(&needed).await else { return false };
        while let Some(part) = body.next().await {
            if part.is_err() {
                return false;
            }
        }
        true
    }

    async fn artifact(&self, bytes: &'static [u8]) -> Digest {
        let digest = Digest::of(bytes);
        let body = stream::iter([Ok(Bytes::from_static(bytes))]).boxed();
        let have = self.depot().artifact_progress(&digest).await.unwrap();
        if !have.complete {
            let body = if have.have > 0 {
                stream::iter([Ok(Bytes::from_static(&bytes[have.have as usize..]))]).boxed()
            } else {
                body
            };
            assert!(self.depot().artifact(digest, have.have, bytes.len() as u64, body).await.unwrap().complete);
        }
        digest
    }

    /// A job with one attempt that has left a log and an artifact, and has ended now.
    async fn job(&self, n: u128, source: Option<Digest>, file: Option<Digest>, closed: bool) -> AttemptRef {
        let at = AttemptRef { job: JobId::from_raw(n), attempt: 1 };
        let worker = WorkerId::from_raw(1);
        let lease = Lease { attempt: 1, worker, assigned_at: self.now(), avoid: Vec::new() };
        let tries = Tries { made: 1, lost: 0, failed: 0 };
        let job = Job {
            id: at.job,
            org: DEFAULT_ORG,
            version: 1,
            state: State { tries, step: Step::Assigned { lease } },
            spec: Arc::new(JobSpec { shell: Some("make".to_owned()), ..JobSpec::default() }),
            source,
            created_at: self.now(),
            created_by: "dev".to_owned(),
            events: 0,
        };
        let attempt = Attempt {
            at,
            org: DEFAULT_ORG,
            worker,
            assigned_at: self.now(),
            ended_at: None,
            end: None,
            timings: Timings::default(),
            seq: 0,
            facts: Default::default(),
            log_len: closed.then_some(3),
            log_gone_at: None,
            files_gone_at: None,
        };
        let insert = InsertJob { job, key: None, attempt: Some(attempt), events: Vec::new() };
        self.commit(Write::InsertJob(Box::new(insert))).await;
        self.app.logs.append(&at, 0, Bytes::from_static(b"log")).await.unwrap();
        if let Some(sha256) = file {
            let (path, org) = ("app".to_owned(), DEFAULT_ORG);
            let file = Artifact { at, org, path, size: 5, sha256, mode: 0o644, link: None };
            self.advance(at, vec![file], false).await;
        }
        at
    }

    async fn end(&self, at: AttemptRef) {
        self.advance(at, Vec::new(), true).await;
    }

    async fn advance(&self, at: AttemptRef, artifacts: Vec<Artifact>, done: bool) {
        let scope = Scope::farm();
        let mut next = self.app.store.job(&scope, &at.job).await.unwrap().unwrap();
        let mut attempt = self.app.store.attempt(&scope, &at).await.unwrap();
        next.version += 1;
        if done {
            next.state.step = Step::Done { end: End::success(), at: self.now() };
            if let Some(attempt) = &mut attempt {
                attempt.ended_at = Some(self.now());
            }
        }
        let advance =
            crate::store::write::Advance { next, guard: Guard::Version, attempt, events: Vec::new(), artifacts };
        self.commit(Write::Advance(Box::new(advance))).await;
    }
}

type Tree = (Digest, Bytes, Vec<(Digest, Bytes)>);

fn tree(files: &[&str]) -> Tree {
    let blobs: Vec<_> =
        files.iter().map(|text| (Digest::of(text.as_bytes()), Bytes::from((*text).to_owned()))).collect();
    let file = |(n, (digest, bytes)): (usize, &(Digest, Bytes))| Entry {
        path: format!("f{n}"),
        kind: EntryKind::File,
        mode: 0o644,
        size: bytes.len() as u64,
        chunks: vec![*digest],
        target: None,
    };
    let manifest = Manifest::new(blobs.iter().enumerate().map(file).collect()).unwrap();
    (manifest.digest(), Bytes::from(manifest.encode()), blobs)
}

fn packed(blobs: &[(Digest, Bytes)]) -> blobs::Body {
    let parts = [pack::encode(&PackFrame::pack(blobs, 3)), Bytes::from_static(&PACK_END)];
    stream::iter(parts.map(Ok)).boxed()
}

#[tokio::test]
async fn a_source_goes_when_nobody_uses_it_and_its_bytes_after_it() {
    let world = World::new().await;
    let (old, kept) = (world.upload(&["one", "both"]).await, world.upload(&["two", "both"]).await);
    for _ in 0..30 {
        world.pass(1).await;
        assert_eq!(world.upload(&["two", "both"]).await, kept);
        assert!(world.whole(kept).await);
    }
    assert!(!world.depot().has_source(&old).await.unwrap());
    let known = async |text: &str| {
        let digest = Digest::of(text.as_bytes());
        !world.app.store.blobs(&Scope::farm(), BlobKind::Chunk, &[digest]).await.unwrap().is_empty()
    };
    assert_eq!((known("one").await, known("two").await, known("both").await), (false, true, true));
    // The pack of the first source also holds what both share.
    assert_eq!(world.keys().iter().filter(|key| key.contains("/packs/")).count(), 2);
    assert_eq!(world.keys().iter().filter(|key| key.contains("/manifests/")).count(), 1);
    world.pass(40).await;
    assert_eq!(world.keys(), [""; 0], "in the end nothing is left");
    assert_eq!(world.upload(&["two", "both"]).await, kept, "and it can come again");
    world.pass(3).await;
    assert!(world.whole(kept).await);
}

#[tokio::test]
async fn a_job_that_waits_keeps_its_source_whole_however_long_it_waits() {
    let world = World::new().await;
    let source = world.upload(&["one", "two"]).await;
    let at = world.job(1, Some(source), None, true).await;
    world.pass(60).await;
    assert!(world.whole(source).await);
    world.end(at).await;
    world.pass(40).await;
    assert!(!world.whole(source).await);
    assert_eq!(world.keys(), [""; 0]);
}

#[tokio::test]
async fn a_source_that_is_lost_holds_up_nothing_else() {
    let world = World::new().await;
    let old = world.job(1, None, None, true).await;
    world.end(old).await;
    world.days(98);
    let source = world.upload(&["one", "two"]).await;
    let waits = world.job(2, Some(source), None, true).await;
    world.days(2);
    world.app.blobs.delete(&BlobKey::alone(DEFAULT_ORG, BlobKind::Manifest, &source)).await.unwrap();
    world.collect().await;
    let is_there = async |at: AttemptRef| world.app.store.job(&Scope::farm(), &at.job).await.unwrap().is_some();
    assert_eq!((is_there(old).await, is_there(waits).await), (false, true));
}

#[tokio::test]
async fn after_a_long_stop_of_the_farm_live_jobs_still_have_all() {
    let world = World::new().await;
    let source = world.upload(&["one", "two"]).await;
    world.job(1, Some(source), None, true).await;
    world.days(400);
    world.collect().await;
    world.pass(5).await;
    assert!(world.whole(source).await);
}

/// It is frozen after it noted what is needed, for longer than anything is kept, and goes on.
#[tokio::test]
async fn a_collector_that_was_frozen_for_long_drops_nothing_that_a_live_job_needs() {
    for steps in 1..12 {
        let world = World::new().await;
        let source = world.upload(&["one", "two"]).await;
        world.job(1, Some(source), None, true).await;
        let mut collector = Collector::default();
        for _ in 0..steps {
            if !collector.step(&world.app).await.unwrap() {
                break;
            }
        }
        world.days(40);
        while collector.step(&world.app).await.unwrap() {}
        world.pass(5).await;
        assert!(world.whole(source).await, "frozen after {steps} steps");
    }
}

#[tokio::test]
async fn a_submit_of_a_source_that_was_not_used_for_long_keeps_all_of_it() {
    let world = World::new().await;
    let source = world.upload(&["one", "two"]).await;
    world.days(16);
    assert!(world.depot().freshen(&source, world.now()).await.unwrap(), "what a submit does");
    world.pass(10).await;
    assert!(world.whole(source).await);
    world.pass(10).await;
    assert!(!world.depot().freshen(&source, world.now()).await.unwrap());
}

#[tokio::test]
async fn logs_and_artifacts_go_before_their_job_and_the_answers_say_so() {
    let world = World::new().await;
    let file = world.artifact(b"bytes").await;
    let at = world.job(1, None, Some(file), true).await;
    world.end(at).await;
    let token = token(&world.app, alloy_shared::wire::farm::Role::Viewer).await;
    let short = RetentionRow {
        org: DEFAULT_ORG,
        jobs_days: Some(20),
        artifacts_days: Some(3),
        logs_days: Some(9),
        sources_days: None,
    };
    world.commit(Write::Tidy(Box::new(Tidy::SetRetention(short)))).await;
    let job = at.job;
    let (log, files) = (format!("/v1/jobs/{job}/log"), format!("/v1/jobs/{job}/artifacts"));
    world.pass(3).await;
    assert_eq!(get(&world.app, &format!("{files}/app"), &token).await.body, "bytes");
    assert_eq!(get(&world.app, &log, &token).await.body, "log");
    world.pass(1).await;
    for path in [files.clone(), format!("{files}/app")] {
        let answer = get(&world.app, &path, &token).await;
        assert_eq!((answer.status.as_u16(), answer.problem()), (410, "gone".to_owned()), "{path}");
        assert!(answer.body.contains("removed on 2023-11-18"), "{}", answer.body);
    }
    assert_eq!(get(&world.app, &log, &token).await.body, "log", "the log has its own time");
    world.pass(3).await;
    assert_eq!(world.keys(), [""; 0], "the bytes of the artifact");
    world.pass(3).await;
    let answer = get(&world.app, &log, &token).await;
    assert_eq!((answer.status.as_u16(), answer.problem()), (410, "gone".to_owned()));
    assert_eq!(world.app.logs.len(&at).await.unwrap(), 3, "its bytes stay for a grace");
    world.pass(2).await;
    assert_eq!(world.app.logs.len(&at).await.unwrap(), 0);
    assert_eq!(get(&world.app, &format!("/v1/jobs/{job}"), &token).await.status.as_u16(), 200);
    world.pass(9).await;
    assert_eq!(get(&world.app, &format!("/v1/jobs/{job}"), &token).await.status.as_u16(), 404);
    assert_eq!(world.app.store.attempts(&Scope::farm(), &job).await.unwrap(), []);
}

#[tokio::test]
async fn what_another_attempt_lists_stays() {
    let world = World::new().await;
    let file = world.artifact(b"bytes").await;
    let first = world.job(1, None, Some(file), true).await;
    world.end(first).await;
    world.days(29);
    assert_eq!(world.artifact(b"bytes").await, file, "nothing is sent");
    let second = world.job(2, None, Some(file), true).await;
    world.end(second).await;
    world.pass(20).await;
    assert!(world.app.store.artifacts(&Scope::farm(), &first.job).await.unwrap().is_empty());
    assert_eq!(world.app.store.artifacts(&Scope::farm(), &second.job).await.unwrap().len(), 1);
    assert!(world.depot().read_artifact(&file, None).await.is_ok());
    world.pass(20).await;
    assert!(world.depot().read_artifact(&file, None).await.is_err());
    assert_eq!(world.keys(), [""; 0]);
}

#[tokio::test]
async fn neither_a_live_job_nor_open_books_are_touched() {
    let world = World::new().await;
    let file = world.artifact(b"bytes").await;
    let live = world.job(1, None, Some(file), true).await;
    world.days(95);
    let open = world.job(2, None, None, false).await;
    world.end(open).await;
    world.pass(10).await;
    assert!(world.depot().read_artifact(&file, None).await.is_ok());
    assert_eq!(world.app.logs.len(&live).await.unwrap(), 3);
    let keep = RetentionRow {
        org: DEFAULT_ORG,
        jobs_days: Some(1),
        artifacts_days: Some(1),
        logs_days: Some(1),
        sources_days: Some(1),
    };
    world.commit(Write::Tidy(Box::new(Tidy::SetRetention(keep)))).await;
    world.pass(10).await;
    assert_eq!(world.app.logs.len(&open).await.unwrap(), 3, "its worker may come back with the rest");
    assert!(world.app.store.job(&Scope::farm(), &open.job).await.unwrap().is_some());
    world.pass(15).await;
    assert!(world.app.store.job(&Scope::farm(), &open.job).await.unwrap().is_none(), "it never did");
    assert!(world.app.store.job(&Scope::farm(), &live.job).await.unwrap().is_some());
}

/// An upload meets the collector in every order: whatever it was told is here stays readable, whatever it sent does too.
#[tokio::test]
async fn an_upload_and_the_collector_meet_in_every_order() {
    for days in 1..30 {
        for before in 0..20 {
            let world = World::new().await;
            world.upload(&["one", "two"]).await;
            let artifact = world.artifact(b"bytes").await;
            world.days(days);
            let mut collector = Collector::default();
            for _ in 0..before {
                if !collector.step(&world.app).await.unwrap() {
                    break;
                }
            }
            let (digest, text, blobs) = tree(&["one", "two"]);
            let first = world.depot().put_source(digest, text.clone()).await.unwrap();
            let had = world.depot().artifact_progress(&artifact).await.unwrap();
            while collector.step(&world.app).await.unwrap() {}
            if !first.complete {
                let missing: Vec<_> = blobs.into_iter().filter(|(blob, _)| first.missing.contains(blob)).collect();
                world.depot().pack(packed(&missing)).await.unwrap();
                world.collect().await;
                assert!(world.depot().put_source(digest, text).await.unwrap().complete, "{days} days, {before} steps");
            }
            assert!(had.complete || world.artifact(b"bytes").await == artifact);
            world.pass(1).await;
            assert!(world.whole(digest).await, "{days} days, {before} steps");
            let read = world.depot().read_artifact(&artifact, None).await;
            assert!(read.is_ok(), "{days} days, {before} steps");
        }
    }
}

/// It is killed after each of its steps in turn, again and again: what is left is in the trash or gone.
#[tokio::test]
async fn a_crash_between_any_two_steps_leaves_nothing_behind() {
    for steps in 1..16 {
        let world = World::new().await;
        let source = world.upload(&["one", "two"]).await;
        let file = world.artifact(b"bytes").await;
        let at = world.job(1, Some(source), Some(file), true).await;
        world.end(at).await;
        for _ in 0..140 {
            world.days(1);
            let mut collector = Collector::default();
            for _ in 0..steps {
                if !collector.step(&world.app).await.unwrap() {
                    break;
                }
            }
        }
        world.collect().await;
        world.pass(2).await;
        assert_eq!(world.keys(), [""; 0], "killed after {steps} steps");
        assert_eq!(world.app.logs.len(&at).await.unwrap(), 0, "killed after {steps} steps");
    }
}

#[tokio::test]
async fn an_object_that_was_taken_to_be_deleted_is_never_used_again() {
    let world = World::new().await;
    let file = world.artifact(b"bytes").await;
    let key = BlobKey::alone(DEFAULT_ORG, BlobKind::Artifact, &file);
    world.days(3);
    world.collect().await;
    let thrown = world.app.store.trashed(key.as_str()).await.unwrap();
    assert_eq!(thrown.len(), 1, "it waits in the trash");
    // One who thinks that it may delete the object now, and is very slow.
    let (object, now) = (key.to_string(), world.now());
    world.days(2);
    world.commit(Write::Tidy(Box::new(Tidy::TakeTrash { object, before: world.now(), at: now }))).await;
    assert_eq!(world.artifact(b"bytes").await, file);
    world.app.blobs.delete(&key).await.unwrap();
    assert!(world.depot().read_artifact(&file, None).await.is_ok(), "it has a fresh object");
    world.pass(1).await;
    assert!(world.depot().read_artifact(&file, None).await.is_ok());
    let rows = world.app.store.blobs(&Scope::farm(), BlobKind::Artifact, &[file]).await.unwrap();
    assert!(rows[0].place.object().starts_with(&format!("{key}_")), "{:?}", rows[0].place);
    assert_eq!(BlobKey::parse(rows[0].place.object()).unwrap().digest(), Some(file));
    // Whoever sent to the old place all the time is told to send again.
    let mut late = rows[0].clone();
    late.place = crate::store::Place::Alone { object: key.to_string() };
    late.digest = Digest::of(b"other");
    let done = world.app.store.commit(&[Group(vec![Write::AddBlobs(vec![late])])]).await.unwrap();
    assert!(done.groups[0].is_err());
}

#[tokio::test]
async fn a_name_is_remembered_from_its_deletion_on_however_late_that_came() {
    let world = World::new().await;
    let file = Digest::of(b"bytes");
    let key = BlobKey::alone(DEFAULT_ORG, BlobKind::Artifact, &file);
    let objects = vec![key.to_string()];
    world.commit(Write::Tidy(Box::new(Tidy::Trash { objects, at: world.now() }))).await;
    world.days(31);
    world.collect().await;
    world.artifact(b"bytes").await;
    let object = async || {
        let rows = world.app.store.blobs(&Scope::farm(), BlobKind::Artifact, &[file]).await.unwrap();
        rows.first().map(|row| row.place.object().to_owned())
    };
    assert!(object().await.unwrap().starts_with(&format!("{key}_")), "a late deletion must not hit it");
    world.pass(31).await;
    assert_eq!(object().await, None);
    world.artifact(b"bytes").await;
    assert!(object().await.unwrap().starts_with(&format!("{key}_")), "the fresh one's name was deleted since");
    world.pass(40).await;
    world.artifact(b"bytes").await;
    assert_eq!(object().await.unwrap(), key.to_string(), "in the end it is forgotten");
}

#[tokio::test]
async fn objects_that_nobody_registered_go_and_new_ones_are_spared() {
    let world = World::new().await;
    let put = async |name: &str| {
        let key = BlobKey::parse(name).unwrap();
        let body = stream::iter([Ok(Bytes::from_static(b"x"))]).boxed();
        world.app.blobs.put(&key, body, None).await.unwrap();
    };
    let [old, new] = [1, 2].map(|n| BlobKey::pack(DEFAULT_ORG, (0, n)).as_str().to_owned());
    let others = format!("ci/{old}");
    put(&others).await;
    put(&old).await;
    let at = AttemptRef { job: JobId::from_raw(9), attempt: 1 };
    put(&format!("{}/0000_0001", log_object(&at))).await;
    world.collect().await;
    assert_eq!(world.app.store.trash(Ms(i64::MAX), None, 9).await.unwrap(), [], "both may be on their way to be named");
    world.pass(2).await;
    put(&new).await;
    assert_eq!(world.app.store.trash(Ms(i64::MAX), None, 9).await.unwrap().len(), 2);
    world.pass(2).await;
    assert_eq!(world.keys(), [others, new], "another farm's below this one's prefix is not touched");
}

#[tokio::test]
async fn an_object_that_cannot_be_deleted_holds_up_no_other() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), TestEnv::new());
    let care = crate::broken::Care::default();
    let blobs = Blobs::open(dir.path().to_owned(), Ms(0), care).await.unwrap();
    let app = app_with(blobs, clock.clone(), None).await;
    clock.advance(DAY_MS);
    let keys: Vec<BlobKey> = (0..100).map(|n| BlobKey::pack(DEFAULT_ORG, (0, n))).collect();
    for key in &keys {
        app.blobs.put(key, stream::iter([Ok(Bytes::from_static(b"x"))]).boxed(), None).await.unwrap();
    }
    let stuck = [0, 1, 2, 70, 71, 72].map(|n: usize| &keys[n]);
    for key in stuck {
        let path = dir.path().join("objects").join(key.as_str());
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
    }
    let objects = keys.iter().map(|key| key.as_str().to_owned()).collect();
    let trash = Write::Tidy(Box::new(Tidy::Trash { objects, at: app.env.now().wall }));
    app.store.commit(&[Group(vec![trash])]).await.unwrap();
    clock.advance(2 * DAY_MS);
    let mut collector = Collector::default();
    while collector.step(&app).await.unwrap() {}
    let left = app.store.trash(Ms(i64::MAX), None, 200).await.unwrap();
    let mut left: Vec<String> = left.into_iter().map(|row| row.object).collect();
    left.sort();
    assert_eq!(left, stuck.map(|key| key.as_str().to_owned()));
    assert!(!dir.path().join("objects").join(keys[99].as_str()).exists());

    // From now on they are the oldest: a look gives up at them, and the next one begins behind.
    let new = BlobKey::pack(DEFAULT_ORG, (1, 0));
    app.blobs.put(&new, stream::iter([Ok(Bytes::from_static(b"x"))]).boxed(), None).await.unwrap();
    let objects = vec![new.as_str().to_owned()];
    let trash = Write::Tidy(Box::new(Tidy::Trash { objects, at: app.env.now().wall }));
    app.store.commit(&[Group(vec![trash])]).await.unwrap();
    clock.advance(2 * DAY_MS);
    let given_up = loop {
        match collector.step(&app).await {
            Ok(more) => assert!(more, "all of it was tried"),
            Err(error) => break error,
        }
    };
    assert!(given_up.to_string().contains("delete an object"), "{given_up}");
    while collector.step(&app).await.unwrap() {}
    assert!(!dir.path().join("objects").join(new.as_str()).exists());
}
