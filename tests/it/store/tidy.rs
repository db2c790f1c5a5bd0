//! T: what each write that removes something looks at, on all three stores, also when two meet.

use alloy_shared::env::Ms;
use alloy_shared::id::{AttemptRef, DEFAULT_ORG};
use alloy_shared::wire::job::End;
use futures_util::future::join;
use orchestrator::store::tidy::{Fade, RetentionRow, Tidy};
use orchestrator::store::write::{Advance, CloseAttempt};
use orchestrator::store::{Blob, BlobKind, Guard, Job, Miss, Place, Scope, Store, Write};

use super::given::{self, OTHER_ORG, advance, assigned, attempt, done, insert, job_id, key, queued, worker_id};
use super::{on_each, put, stores};

fn tidy(write: Tidy) -> Write {
    Write::Tidy(Box::new(write))
}

fn used(n: usize, kind: BlobKind, at: i64) -> Blob {
    Blob { used_at: Ms(at), ..given::blob(n, kind) }
}

async fn there(store: &dyn Store, blob: &Blob) -> bool {
    !store.blobs(&Scope::org(blob.org), blob.kind, &[blob.digest]).await.unwrap().is_empty()
}

/// A job with an attempt that lists an artifact; ended at 9, its attempt at 8.
async fn ended_job(store: &dyn Store, n: usize, closed: bool) -> (Job, AttemptRef) {
    let job = queued(job_id(n));
    put(store, insert(job.clone(), Some(key(&n.to_string(), "x")))).await.unwrap();
    let held = assigned(&job, worker_id(1));
    put(store, advance(&held, Guard::Version, Some(attempt(&held, worker_id(1))))).await.unwrap();
    let over = done(&held, End::success());
    let mut row = attempt(&held, worker_id(1));
    row.ended_at = Some(Ms(8));
    let Write::Advance(write) = advance(&over, Guard::Version, Some(row)) else { unreachable!() };
    let artifacts = vec![given::artifact(over.attempt(), "app")];
    put(store, Write::Advance(Box::new(Advance { artifacts, ..*write }))).await.unwrap();
    if closed {
        let close = CloseAttempt { at: over.attempt(), worker: worker_id(1), teardown_ms: 1, log_len: 5 };
        put(store, Write::CloseAttempt(close)).await.unwrap();
    }
    let at = over.attempt();
    (over, at)
}

#[tokio::test]
async fn what_is_used_or_referred_to_is_not_dropped() {
    on_each(async |store| {
        let (_, at) = ended_job(store, 1, true).await;
        let listed = Blob { digest: given::artifact(at, "app").sha256, ..used(1, BlobKind::Artifact, 4) };
        let mut needs = queued(job_id(2));
        let source = used(3, BlobKind::Manifest, 4);
        needs.source = Some(source.digest);
        put(store, insert(needs.clone(), None)).await.unwrap();
        let foreign = Blob { org: OTHER_ORG, ..source.clone() };
        let (old, fresh) = (used(4, BlobKind::Chunk, 4), used(5, BlobKind::Chunk, 60));
        let unknown = used(6, BlobKind::Chunk, 0);
        let all = vec![listed.clone(), source.clone(), foreign.clone(), old.clone(), fresh.clone(), unknown.clone()];
        put(store, Write::AddBlobs(all.clone())).await.unwrap();
        let drop = tidy(Tidy::DropBlobs { blobs: all.clone(), unused_since: Ms(50), at: Ms(100) });
        assert_eq!(put(store, drop.clone()).await, Ok(2));
        for (blob, stays) in
            [(&listed, true), (&source, true), (&foreign, false), (&old, false), (&fresh, true), (&unknown, true)]
        {
            assert_eq!(there(store, blob).await, stays, "{blob:?}");
        }
        // Their objects are named like their numbers: 3 is the other organisation's source too, so it stays.
        let thrown = store.trash(Ms(101), None, 9).await.unwrap();
        assert_eq!(thrown.iter().map(|row| row.object.as_str()).collect::<Vec<_>>(), ["object/4"]);
        let fade = Fade { attempt: at, ended_before: Ms(50), open_before: Ms(0), at: Ms(100) };
        assert_eq!(put(store, tidy(Tidy::DropFiles(fade))).await, Ok(0));
        assert_eq!(store.artifacts(&Scope::farm(), &at.job).await.unwrap(), []);
        let over = done(&assigned(&needs, worker_id(1)), End::success());
        let steps = [assigned(&needs, worker_id(1)), over];
        for step in steps {
            put(store, advance(&step, Guard::Version, None)).await.unwrap();
        }
        assert_eq!(put(store, drop).await, Ok(2), "nobody refers to them any more");
        assert!(!there(store, &listed).await && !there(store, &source).await);
        assert_eq!(put(store, tidy(Tidy::Adopt { kind: BlobKind::Chunk, at: Ms(70), most: 9 })).await, Ok(1));
        let unused = store.unused(BlobKind::Chunk, Ms(99), None, 9).await.unwrap();
        assert_eq!(unused.iter().map(|blob| blob.used_at).collect::<Vec<_>>(), [Ms(60), Ms(70)]);
    })
    .await;
}

#[tokio::test]
async fn logs_files_and_jobs_go_when_they_may() {
    on_each(async |store| {
        let (closed, at) = ended_job(store, 1, true).await;
        let (open, still_open) = ended_job(store, 2, false).await;
        let running = assigned(&queued(job_id(3)), worker_id(1));
        put(store, insert(queued(job_id(3)), None)).await.unwrap();
        put(store, advance(&running, Guard::Version, Some(attempt(&running, worker_id(1))))).await.unwrap();
        let fade = |attempt, ended, open| Fade { attempt, ended_before: Ms(ended), open_before: Ms(open), at: Ms(77) };
        let stale = Err(Miss::Stale);
        for (fade, done) in [
            (fade(at, 8, 0), &stale),
            (fade(still_open, 50, 7), &stale),
            (fade(running.attempt(), 50, 50), &stale),
            (fade(at, 9, 0), &Ok(0)),
            (fade(at, 9, 0), &stale),
            (fade(still_open, 50, 8), &Ok(0)),
        ] {
            for write in [Tidy::DropLog(fade), Tidy::DropFiles(fade)] {
                assert_eq!(put(store, tidy(write.clone())).await, *done, "{write:?}");
            }
        }
        let kept = store.attempt(&Scope::farm(), &at).await.unwrap().unwrap();
        assert_eq!((kept.log_gone_at, kept.files_gone_at, kept.log_len), (Some(Ms(77)), Some(Ms(77)), Some(5)));
        assert_eq!(store.fading(Ms(i64::MAX), None, 9).await.unwrap(), []);
        let logs: Vec<String> = store.trash(Ms(78), None, 9).await.unwrap().into_iter().map(|row| row.object).collect();
        assert_eq!(logs, [at, still_open].map(|at| format!("logs/{}/1", at.job)));

        let prune =
            |job, ended, open| tidy(Tidy::Prune { job, ended_before: Ms(ended), open_before: Ms(open), at: Ms(80) });
        for (job, ended, open_before, done) in [
            (closed.id, 9, 0, &stale),
            (open.id, 50, 7, &stale),
            (running.id, 50, 50, &stale),
            (job_id(9), 50, 50, &stale),
            (closed.id, 10, 0, &Ok(0)),
            (closed.id, 10, 0, &stale),
            (open.id, 50, 8, &Ok(0)),
        ] {
            assert_eq!(put(store, prune(job, ended, open_before)).await, *done, "{job} {ended} {open_before}");
        }
        for id in [closed.id, open.id] {
            let scope = Scope::farm();
            assert_eq!(store.job(&scope, &id).await.unwrap(), None);
            assert_eq!(store.attempts(&scope, &id).await.unwrap(), []);
            assert_eq!(store.events(&scope, &id, 0, 9).await.unwrap(), []);
        }
        assert_eq!(store.keyed(&DEFAULT_ORG, "tok_me", "1").await.unwrap(), None);
        assert_eq!(store.attempts(&Scope::farm(), &running.id).await.unwrap().len(), 1);
        assert_eq!(store.ended(Ms(i64::MAX), None, 9).await.unwrap(), []);
    })
    .await;
}

#[tokio::test]
async fn an_object_leaves_the_trash_or_is_taken() {
    on_each(async |store| {
        let blob = |object: &str, n| {
            let place = Place::Alone { object: object.to_owned() };
            Write::AddBlobs(vec![Blob { place, ..used(n, BlobKind::Chunk, 4) }])
        };
        let throw = |object: &str| tidy(Tidy::Trash { objects: vec![object.to_owned()], at: Ms(10) });
        let take =
            |object: &str, before| tidy(Tidy::TakeTrash { object: object.to_owned(), before: Ms(before), at: Ms(30) });
        put(store, blob("named", 1)).await.unwrap();
        for object in ["named", "a", "b"] {
            put(store, throw(object)).await.unwrap();
        }
        let named = store.named(&["named", "a", "b", "c"].map(str::to_owned)).await.unwrap();
        assert_eq!(named, ["a", "b", "named"]);
        assert_eq!(store.trash(Ms(11), None, 9).await.unwrap().len(), 2, "what is named is no trash");
        assert_eq!(put(store, take("a", 10)).await, Ok(0), "too early");
        assert_eq!(put(store, blob("a", 2)).await, Ok(0));
        assert_eq!(put(store, take("a", 50)).await, Ok(0), "it left the trash");
        assert_eq!((put(store, take("b", 50)).await, put(store, take("b", 50)).await), (Ok(1), Ok(1)), "again");
        assert_eq!(put(store, blob("b", 3)).await, Err(Miss::Stale));
        let burnt = |at| tidy(Tidy::Burnt { object: "b".to_owned(), at: Ms(at) });
        put(store, burnt(40)).await.unwrap();
        assert_eq!(store.trash(Ms(99), None, 9).await.unwrap(), []);
        assert_eq!(put(store, blob("b", 3)).await, Err(Miss::Stale), "its name is not used again");
        assert_eq!(store.trashed("b").await.unwrap().len(), 1);
        put(store, throw("b")).await.unwrap();
        assert_eq!(put(store, take("b", 50)).await, Ok(1), "somebody put it there again");
        put(store, burnt(40)).await.unwrap();
        put(store, tidy(Tidy::Forget { before: Ms(40) })).await.unwrap();
        assert_eq!(put(store, blob("b", 3)).await, Err(Miss::Stale), "it is not old because it lay there for long");
        put(store, tidy(Tidy::Forget { before: Ms(41) })).await.unwrap();
        assert_eq!(store.trashed("b").await.unwrap(), []);
        assert_eq!(put(store, blob("b", 3)).await, Ok(0));
    })
    .await;
}

/// Whoever is first wins, and the other one hears of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_registers_and_who_deletes_never_both_succeed() {
    for (name, store) in &stores().await.all {
        let store = &**store;
        let mut taken = 0;
        for n in 0..100 {
            let object = format!("object/{n}");
            put(store, tidy(Tidy::Trash { objects: vec![object.clone()], at: Ms(10) })).await.unwrap();
            let add = Write::AddBlobs(vec![used(n, BlobKind::Chunk, 90)]);
            let take = tidy(Tidy::TakeTrash { object, before: Ms(50), at: Ms(60) });
            let (add, take) = match n % 2 {
                0 => join(put(store, add), put(store, take)).await,
                _ => {
                    let (take, add) = join(put(store, take), put(store, add)).await;
                    (add, take)
                }
            };
            assert_ne!(add.is_ok(), take == Ok(1), "{name} {n}: {add:?} {take:?}");
            taken += usize::from(take == Ok(1));
        }
        println!("{name}: {taken} of 100 were taken");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_relies_and_who_drops_never_both_succeed() {
    for (name, store) in &stores().await.all {
        let store = &**store;
        let mut dropped = 0;
        for n in 0..100 {
            let blob = used(n, BlobKind::Chunk, 4);
            put(store, Write::AddBlobs(vec![blob.clone()])).await.unwrap();
            let digests = vec![blob.digest];
            let rely = tidy(Tidy::Use { org: blob.org, kind: blob.kind, digests, at: Ms(60) });
            let drop = tidy(Tidy::DropBlobs { blobs: vec![blob.clone()], unused_since: Ms(50), at: Ms(61) });
            let (rely, drop) = match n % 2 {
                0 => join(put(store, rely), put(store, drop)).await,
                _ => {
                    let (drop, rely) = join(put(store, drop), put(store, rely)).await;
                    (rely, drop)
                }
            };
            assert_ne!(rely.is_ok(), drop == Ok(1), "{name} {n}: {rely:?} {drop:?}");
            assert_eq!(there(store, &blob).await, rely.is_ok());
            dropped += usize::from(drop == Ok(1));
        }
        println!("{name}: {dropped} of 100 were dropped");
    }
}

#[tokio::test]
async fn an_organisation_may_want_other_days() {
    on_each(async |store| {
        let row = RetentionRow {
            org: DEFAULT_ORG,
            jobs_days: Some(0),
            artifacts_days: None,
            logs_days: Some(9),
            sources_days: None,
        };
        let other = RetentionRow { org: OTHER_ORG, jobs_days: Some(3), ..row };
        for row in [row, other, RetentionRow { logs_days: None, ..row }] {
            assert_eq!(put(store, tidy(Tidy::SetRetention(row))).await, Ok(0));
        }
        let kept = RetentionRow { logs_days: None, ..row };
        assert_eq!(store.retention(&Scope::org(DEFAULT_ORG)).await.unwrap(), [kept]);
        assert_eq!(store.retention(&Scope::farm()).await.unwrap().len(), 2);
    })
    .await;
}
