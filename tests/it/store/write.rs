//! T: what each kind of write does and when it misses, on all three stores.

use alloy_shared::env::Ms;
use alloy_shared::id::{AttemptRef, DEFAULT_ORG, Digest, Labels, OrgId};
use alloy_shared::secret::TokenKind;
use alloy_shared::wire::farm::Role;
use alloy_shared::wire::job::{End, EventKind, Reason};
use orchestrator::store::write::{Advance, CloseAttempt, InsertJob, OpenSession, SetWorker};
use orchestrator::store::{BlobKind, Group, Guard, ImageRow, MemberRow, Miss, Place, Scope, Write};

use super::given::{self, advance, assigned, attempt, insert, job_id, key, queued, worker_id};
use super::{on_each, put};

#[tokio::test]
async fn a_new_job_is_inserted_once_with_its_books() {
    on_each(async |store| {
        let job = assigned(&queued(job_id(1)), worker_id(1));
        let first = attempt(&job, worker_id(1));
        let events = vec![given::event(&job, 1, EventKind::Submitted), given::event(&job, 2, EventKind::Assigned)];
        let write = Write::InsertJob(Box::new(InsertJob {
            job: job.clone(),
            key: None,
            attempt: Some(first.clone()),
            events: events.clone(),
        }));
        assert_eq!(put(store, write.clone()).await, Ok(job.version));
        assert_eq!(store.job(&Scope::farm(), &job.id).await.unwrap(), Some(job.clone()));
        assert_eq!(store.attempts(&Scope::farm(), &job.id).await.unwrap(), [first]);
        assert_eq!(store.events(&Scope::farm(), &job.id, 0, 9).await.unwrap(), events);
        assert_eq!(put(store, write).await, Err(Miss::Stale), "the same job again");
    })
    .await;
}

#[tokio::test]
async fn a_key_is_used_once_per_caller() {
    on_each(async |store| {
        assert_eq!(put(store, insert(queued(job_id(1)), Some(key("k", "one")))).await, Ok(1));
        let exists = Err(Miss::Exists { job: job_id(1), body: Digest::of(b"one") });
        for (id, body) in [(1, "one"), (2, "one"), (2, "two")] {
            assert_eq!(put(store, insert(queued(job_id(id)), Some(key("k", body)))).await, exists);
        }
        assert_eq!(store.job(&Scope::farm(), &job_id(2)).await.unwrap(), None);
        let known = async |key| store.keyed(&DEFAULT_ORG, "tok_me", key).await.unwrap();
        assert_eq!(known("k").await, Some((job_id(1), Digest::of(b"one"))));
        assert_eq!(store.keyed(&OrgId::from_raw(77), "tok_me", "k").await, Ok(None), "another organisation's");
        assert_eq!(store.keyed(&DEFAULT_ORG, "tok_you", "k").await, Ok(None), "another caller's");
        assert_eq!(put(store, insert(queued(job_id(1)), Some(key("fresh", "one")))).await, Err(Miss::Stale));
        assert_eq!(known("fresh").await, None);
        let other = orchestrator::store::write::IdempotencyKey { caller: "tok_you".to_owned(), ..key("k", "two") };
        assert_eq!(put(store, insert(queued(job_id(3)), Some(other))).await, Ok(1), "another caller's");
        assert_eq!(
            put(store, insert(queued(job_id(4)), Some(key("fresh", "one")))).await,
            Ok(1),
            "a miss keeps no key"
        );
    })
    .await;
}

#[tokio::test]
async fn an_advance_needs_the_version_before_it() {
    on_each(async |store| {
        let job = queued(job_id(1));
        put(store, insert(job.clone(), None)).await.unwrap();
        let next = assigned(&job, worker_id(1));
        let write = advance(&next, Guard::Version, Some(attempt(&next, worker_id(1))));
        assert_eq!(put(store, write.clone()).await, Ok(2));
        assert_eq!(store.job(&Scope::farm(), &job.id).await.unwrap(), Some(next.clone()));
        assert_eq!(put(store, write).await, Err(Miss::Stale), "once more");
        let unknown = assigned(&queued(job_id(2)), worker_id(1));
        assert_eq!(put(store, advance(&unknown, Guard::Version, None)).await, Err(Miss::Stale));
        assert_eq!(store.events(&Scope::farm(), &job.id, 0, 9).await.unwrap().len(), 2);
    })
    .await;
}

#[tokio::test]
async fn a_fence_names_attempt_worker_and_session() {
    on_each(async |store| {
        let token = given::token(1, TokenKind::Join);
        put(store, Write::AddToken(token.clone())).await.unwrap();
        put(store, given::enrol(1, &token)).await.unwrap();
        put(store, session(1)).await.unwrap();
        let job = queued(job_id(1));
        put(store, insert(job.clone(), None)).await.unwrap();
        let held = assigned(&job, worker_id(1));
        put(store, advance(&held, Guard::Version, Some(attempt(&held, worker_id(1))))).await.unwrap();
        let ended = given::done(&held, End::success());
        let fence = |attempt, worker, epoch| Guard::Fence { attempt, worker: worker_id(worker), epoch };
        for wrong in
            [fence(2, 1, 1), fence(1, 2, 1), fence(1, 1, 2), Guard::Silent { worker: worker_id(2), unseen_since: None }]
        {
            assert_eq!(put(store, advance(&ended, wrong, None)).await, Err(Miss::Stale), "{wrong:?}");
        }
        assert_eq!(put(store, session(1)).await, Ok(2), "a newer session");
        assert_eq!(put(store, advance(&ended, fence(1, 1, 1), None)).await, Err(Miss::Stale));
        assert_eq!(put(store, advance(&ended, fence(1, 1, 2), None)).await, Ok(3));
        let other = queued(job_id(2));
        put(store, insert(other.clone(), None)).await.unwrap();
        let held = assigned(&other, worker_id(1));
        put(store, advance(&held, Guard::Version, Some(attempt(&held, worker_id(1))))).await.unwrap();
        let lost = given::done(&held, End::success());
        let seen = store.worker(&Scope::farm(), &worker_id(1)).await.unwrap().unwrap().seen_at.unwrap();
        let since = |at| Guard::Silent { worker: worker_id(1), unseen_since: Some(at) };
        assert_eq!(put(store, advance(&lost, since(seen), None)).await, Err(Miss::Stale), "it was heard then");
        assert_eq!(put(store, advance(&lost, since(seen.plus(1)), None)).await, Ok(3), "and not since");
        let again = given::done(&ended, End::success());
        let silent = Guard::Silent { worker: worker_id(1), unseen_since: None };
        assert_eq!(put(store, advance(&again, silent, None)).await, Err(Miss::Stale), "nobody holds it any more");
    })
    .await;
}

#[tokio::test]
async fn an_attempt_keeps_what_a_close_has_said() {
    on_each(async |store| {
        let job = queued(job_id(1));
        put(store, insert(job.clone(), None)).await.unwrap();
        let held = assigned(&job, worker_id(1));
        let open = attempt(&held, worker_id(1));
        put(store, advance(&held, Guard::Version, Some(open.clone()))).await.unwrap();
        let close = |worker| {
            Write::CloseAttempt(CloseAttempt { at: open.at, worker: worker_id(worker), teardown_ms: 8, log_len: 77 })
        };
        assert_eq!(put(store, close(2)).await, Err(Miss::Stale), "another worker's");
        assert_eq!(put(store, close(1)).await, Ok(0));
        assert_eq!(put(store, close(1)).await, Ok(0), "and again");
        let mut ended = open.clone();
        (ended.end, ended.ended_at, ended.seq) = (Some(End::success()), Some(Ms(9)), 4);
        ended.timings.exec_ms = Some(5);
        let next = given::done(&held, End::success());
        put(store, advance(&next, Guard::Version, Some(ended.clone()))).await.unwrap();
        (ended.log_len, ended.timings.teardown_ms) = (Some(77), Some(8));
        assert_eq!(store.attempt(&Scope::farm(), &open.at).await.unwrap(), Some(ended));
    })
    .await;
}

#[tokio::test]
async fn an_artifact_is_registered_once_and_needs_its_attempt() {
    on_each(async |store| {
        let job = queued(job_id(1));
        put(store, insert(job.clone(), None)).await.unwrap();
        let held = assigned(&job, worker_id(1));
        let books = Some(attempt(&held, worker_id(1)));
        let files = |paths: &[&str]| paths.iter().map(|path| given::artifact(held.attempt(), path)).collect();
        let with = |artifacts, attempt| {
            let Write::Advance(write) = advance(&held, Guard::Version, attempt) else { unreachable!() };
            Write::Advance(Box::new(Advance { artifacts, ..*write }))
        };
        let orphan = put(store, with(files(&["a"]), None)).await;
        assert!(matches!(orphan, Err(Miss::Corrupt(_))), "{orphan:?}");
        assert_eq!(store.job(&Scope::farm(), &job.id).await.unwrap(), Some(job.clone()), "nothing of it stays");
        assert_eq!(put(store, with(files(&["b", "B", "a", "b"]), books)).await, Ok(2));
        let listed = store.artifacts(&Scope::farm(), &job.id).await.unwrap();
        for file in &listed {
            let found = async |scope, at, path| store.artifact(&scope, &at, path).await.unwrap();
            assert_eq!(found(Scope::org(file.org), file.at, &file.path).await.as_ref(), Some(file));
            let later = AttemptRef { attempt: file.at.attempt + 1, ..file.at };
            assert_eq!(found(Scope::farm(), later, "no such file").await, None);
            assert_eq!(found(Scope::org(given::OTHER_ORG), file.at, &file.path).await, None);
        }
        assert_eq!(listed, files(&["B", "a", "b"]), "by bytes, each once");
    })
    .await;
}

#[tokio::test]
async fn a_group_happens_whole_or_not_at_all() {
    on_each(async |store| {
        let (one, two) = (queued(job_id(1)), queued(job_id(2)));
        let stale = advance(&assigned(&queued(job_id(9)), worker_id(1)), Guard::Version, None);
        let meta = |name, value: &str| Write::AddMeta { name, value: value.to_owned() };
        let mut twice = given::event(&two, 1, EventKind::Submitted);
        twice.message = Some("the same number".to_owned());
        let Write::InsertJob(double) = insert(two.clone(), Some(key("k", "x"))) else { unreachable!() };
        let refused =
            Write::InsertJob(Box::new(InsertJob { events: vec![double.events[0].clone(), twice], ..*double }));
        let groups = [
            Group(vec![insert(one.clone(), None), meta("a", "1")]),
            Group(vec![meta("b", "2"), insert(two.clone(), None), stale.clone()]),
            Group(vec![refused]),
            Group(vec![]),
            Group(vec![stale]),
            Group(vec![meta("c", "3")]),
        ];
        let done = store.commit(&groups).await.unwrap().groups;
        assert_eq!(done[0], Ok(vec![1, 0]));
        assert_eq!(done[1], Err(Miss::Stale));
        assert!(matches!(done[2], Err(Miss::Corrupt(_))), "{:?}", done[2]);
        assert_eq!((&done[3], &done[4], &done[5]), (&Ok(vec![]), &Err(Miss::Stale), &Ok(vec![0])));
        assert_eq!(store.job(&Scope::farm(), &one.id).await.unwrap(), Some(one));
        assert_eq!(store.job(&Scope::farm(), &two.id).await.unwrap(), None);
        for (name, value) in [("a", Some("1")), ("b", None), ("c", Some("3"))] {
            assert_eq!(store.meta(name).await.unwrap().as_deref(), value, "{name}");
        }
        assert_eq!(put(store, insert(two, Some(key("k", "x")))).await, Ok(1), "its key went with it");
    })
    .await;
}

/// Among many neighbours that are written together, one misses.
#[tokio::test]
async fn a_miss_among_many_is_told_from_its_neighbours() {
    on_each(async |store| {
        put(store, insert(queued(job_id(500)), Some(key("taken", "x")))).await.unwrap();
        let mut groups: Vec<Group> =
            (0..150).map(|n| Group(vec![insert(queued(job_id(n)), Some(key(&n.to_string(), "x")))])).collect();
        groups[70] = Group(vec![insert(queued(job_id(70)), Some(key("taken", "y")))]);
        groups[140] = Group(vec![insert(queued(job_id(3)), None)]);
        let done = store.commit(&groups).await.unwrap().groups;
        for (n, result) in done.iter().enumerate() {
            match n {
                70 => assert_eq!(*result, Err(Miss::Exists { job: job_id(500), body: Digest::of(b"x") })),
                140 => assert_eq!(*result, Err(Miss::Stale)),
                _ => assert_eq!(*result, Ok(vec![1]), "{n}"),
            }
        }
        assert_eq!(store.live(None, 1_000).await.unwrap().len(), 149);
        let steps: Vec<Group> = (0..150)
            .map(|n| Group(vec![advance(&assigned(&queued(job_id(n)), worker_id(n % 7)), Guard::Version, None)]))
            .collect();
        let done = store.commit(&steps).await.unwrap().groups;
        let missed: Vec<usize> = (0..150).filter(|n| done[*n] == Err(Miss::Stale)).collect();
        assert_eq!(missed, [70, 140]);
    })
    .await;
}

#[tokio::test]
async fn a_commit_sees_its_own_earlier_groups() {
    on_each(async |store| {
        let job = queued(job_id(1));
        let held = assigned(&job, worker_id(1));
        let ended = given::done(&held, End::because(Reason::WorkerLost, "gone"));
        let steps = [insert(job, None), advance(&held, Guard::Version, None), advance(&ended, Guard::Version, None)];
        let groups = steps.map(|write| Group(vec![write]));
        let done = store.commit(&groups).await.unwrap().groups;
        assert_eq!(done, [Ok(vec![1]), Ok(vec![2]), Ok(vec![3])]);
        assert_eq!(store.job(&Scope::farm(), &ended.id).await.unwrap(), Some(ended));
        assert_eq!(store.commit(&[]).await.unwrap().groups, []);
    })
    .await;
}

fn session(n: usize) -> Write {
    let mut labels = Labels::default();
    labels.insert("chip", "m4").unwrap();
    let boot = format!("boot {n}");
    Write::OpenSession(Box::new(OpenSession {
        worker: worker_id(n),
        boot,
        labels,
        version: "1.2".to_owned(),
        at: Ms(60),
    }))
}

#[tokio::test]
async fn a_join_token_enrols_one_worker() {
    on_each(async |store| {
        let usable = given::token(1, TokenKind::Join);
        let mut expired = given::token(2, TokenKind::Join);
        expired.expires_at = Some(Ms(50));
        let personal = given::token(3, TokenKind::Personal);
        let revoked = given::token(4, TokenKind::Join);
        for token in [&usable, &expired, &personal, &revoked] {
            assert_eq!(put(store, Write::AddToken(token.clone())).await, Ok(0));
        }
        assert_eq!(put(store, Write::AddToken(usable.clone())).await, Err(Miss::Stale), "the same token");
        put(store, Write::RevokeToken { org: revoked.org, id: revoked.id, at: Ms(2) }).await.unwrap();
        let unknown = given::token(9, TokenKind::Join);
        for token in [&expired, &personal, &revoked, &unknown] {
            assert_eq!(put(store, given::enrol(1, token)).await, Err(Miss::Stale), "{}", token.name);
        }
        assert_eq!(store.workers(&Scope::farm()).await.unwrap(), []);
        assert_eq!(put(store, given::enrol(1, &usable)).await, Ok(0));
        assert_eq!(put(store, given::enrol(2, &usable)).await, Err(Miss::Stale), "used");
        assert_eq!(store.workers(&Scope::farm()).await.unwrap(), [given::worker(1)]);
        assert_eq!(store.token(&usable.hash).await.unwrap().unwrap().used_by, Some(worker_id(1)));
        let second = given::token(5, TokenKind::Join);
        put(store, Write::AddToken(second.clone())).await.unwrap();
        let clash = put(store, given::enrol(1, &second)).await;
        assert!(matches!(clash, Err(Miss::Corrupt(_))), "the same key twice: {clash:?}");
        assert_eq!(store.token(&second.hash).await.unwrap(), Some(second), "and its token is not used up");
    })
    .await;
}

#[tokio::test]
async fn sessions_drains_and_sightings_change_their_worker() {
    on_each(async |store| {
        let token = given::token(1, TokenKind::Join);
        put(store, Write::AddToken(token.clone())).await.unwrap();
        put(store, given::enrol(1, &token)).await.unwrap();
        assert_eq!((put(store, session(1)).await, put(store, session(1)).await), (Ok(1), Ok(2)));
        assert_eq!(put(store, session(2)).await, Err(Miss::Stale));
        let seen = |n, at| Write::Seen { worker: worker_id(n), at: Ms(at), left: false };
        assert_eq!(put(store, seen(1, 90)).await, Ok(0));
        assert_eq!(put(store, seen(1, 80)).await, Ok(0), "late news");
        assert_eq!(put(store, seen(2, 80)).await, Err(Miss::Stale));
        let drain = |org| {
            let note = Some("disk".to_owned());
            Write::SetWorker(SetWorker { org, worker: worker_id(1), draining: true, note })
        };
        assert_eq!(put(store, drain(given::OTHER_ORG)).await, Err(Miss::Stale));
        assert_eq!(put(store, drain(given::worker(1).org)).await, Ok(0));
        let found = store.worker(&Scope::farm(), &worker_id(1)).await.unwrap().unwrap();
        assert_eq!((found.epoch, &*found.boot, &*found.version), (2, "boot 1", "1.2"));
        assert_eq!((found.seen_at, found.draining, found.drain_note.as_deref()), (Some(Ms(90)), true, Some("disk")));
        assert_eq!(found.host_labels.get("chip"), Some("m4"));
        assert_eq!(found.labels, given::worker(1).labels);
        let left = Write::Seen { worker: worker_id(1), at: Ms(91), left: true };
        assert_eq!(put(store, left).await, Ok(0));
        let found = store.worker(&Scope::farm(), &worker_id(1)).await.unwrap().unwrap();
        assert_eq!((found.seen_at, &*found.boot), (Some(Ms(91)), ""), "it said goodbye");
        let revoke = |org| Write::RevokeWorker { org, worker: worker_id(1) };
        assert_eq!(put(store, revoke(given::OTHER_ORG)).await, Err(Miss::Stale));
        assert_eq!(put(store, session(1)).await, Ok(3));
        assert_eq!((put(store, revoke(found.org)).await, put(store, revoke(found.org)).await), (Ok(0), Ok(0)));
        assert_eq!(put(store, session(1)).await, Err(Miss::Stale), "a revoked worker opens no session");
        assert!(store.worker(&Scope::farm(), &worker_id(1)).await.unwrap().unwrap().revoked);
    })
    .await;
}

#[tokio::test]
async fn a_token_is_revoked_once_and_by_its_own_organisation() {
    on_each(async |store| {
        let token = given::token(1, TokenKind::Ci);
        put(store, Write::AddToken(token.clone())).await.unwrap();
        let revoke = |org, at| Write::RevokeToken { org, id: token.id, at: Ms(at) };
        assert_eq!(put(store, revoke(given::OTHER_ORG, 5)).await, Err(Miss::Stale));
        assert_eq!(put(store, revoke(token.org, 6)).await, Ok(0));
        assert_eq!(put(store, revoke(token.org, 7)).await, Ok(0));
        assert_eq!(store.token(&token.hash).await.unwrap().unwrap().revoked_at, Some(Ms(6)));
    })
    .await;
}

#[tokio::test]
async fn known_blobs_and_values_stay_as_they_are() {
    on_each(async |store| {
        let known = given::blob(1, BlobKind::Chunk);
        let mut moved = known.clone();
        moved.place =
            Place::Packed { object: "pack".to_owned(), frame_at: 1, stored: 2, zstd: true, raw_len: 9, raw_at: 3 };
        let many: Vec<_> = (1..100).map(|n| given::blob(n, BlobKind::Chunk)).collect();
        assert_eq!(put(store, Write::AddBlobs(vec![known.clone()])).await, Ok(0));
        assert_eq!(put(store, Write::AddBlobs(vec![moved.clone(), known.clone()])).await, Ok(0));
        assert_eq!(put(store, Write::AddBlobs(many)).await, Ok(0));
        let mut other = moved.clone();
        other.org = given::OTHER_ORG;
        put(store, Write::AddBlobs(vec![other.clone()])).await.unwrap();
        let asked = [known.digest, known.digest, given::digest(777)];
        let scope = Scope::org(known.org);
        assert_eq!(store.blobs(&scope, BlobKind::Chunk, &asked).await.unwrap(), std::slice::from_ref(&known));
        assert_eq!(store.blobs(&scope, BlobKind::Manifest, &asked).await.unwrap(), []);
        assert_eq!(store.blobs(&Scope::farm(), BlobKind::Chunk, &asked).await.unwrap(), [known, other]);
        let all: Vec<_> = (0..150).map(given::digest).collect();
        assert_eq!(store.blobs(&scope, BlobKind::Chunk, &all).await.unwrap().len(), 99);
        for value in ["first", "second"] {
            put(store, Write::AddMeta { name: "secret", value: value.to_owned() }).await.unwrap();
        }
        assert_eq!(store.meta("secret").await.unwrap().as_deref(), Some("first"));
    })
    .await;
}

#[tokio::test]
async fn an_older_wish_for_an_image_changes_nothing() {
    on_each(async |store| {
        let first = given::image("r/a:1", 5);
        assert_eq!(put(store, Write::SetImage(first.clone())).await, Ok(0));
        assert_eq!(put(store, Write::SetImage(given::image("r/a:1", 4))).await, Err(Miss::Stale));
        let other = ImageRow { org: given::OTHER_ORG, ..given::image("r/a:1", 1) };
        assert_eq!(put(store, Write::SetImage(other.clone())).await, Ok(0), "another organisation's");
        assert_eq!(store.images(&Scope::org(DEFAULT_ORG)).await.unwrap(), std::slice::from_ref(&first));
        let pinned = ImageRow { pinned: true, workers: Vec::new(), ..first };
        assert_eq!(put(store, Write::SetImage(pinned.clone())).await, Ok(0), "the same wish, changed");
        assert_eq!(store.images(&Scope::farm()).await.unwrap(), [pinned.clone(), other]);
        let drop = |org| Write::DropImage { org, name: "r/a:1".to_owned() };
        assert_eq!(put(store, drop(OrgId::from_raw(77))).await, Err(Miss::Stale));
        assert_eq!(put(store, drop(given::OTHER_ORG)).await, Ok(0));
        assert_eq!(store.images(&Scope::farm()).await.unwrap(), [pinned]);
    })
    .await;
}

#[tokio::test]
async fn a_member_is_set_again_and_dropped_by_its_own_organisation() {
    on_each(async |store| {
        let first = given::member(1);
        let other = MemberRow { org: given::OTHER_ORG, role: Role::Viewer, ..given::member(1) };
        for row in [&first, &other, &given::member(2)] {
            assert_eq!(put(store, Write::SetMember(row.clone())).await, Ok(0));
        }
        assert_eq!(store.memberships(&first.user).await.unwrap(), [first.clone(), other.clone()]);
        assert_eq!(store.memberships(&given::member(3).user).await.unwrap(), []);
        let own = Scope::org(DEFAULT_ORG);
        assert_eq!(store.members(&own).await.unwrap(), [first.clone(), given::member(2)]);
        let raised = MemberRow { role: Role::Admin, email: None, created_at: Ms(99), ..first.clone() };
        assert_eq!(put(store, Write::SetMember(raised)).await, Ok(0));
        let kept = MemberRow { role: Role::Admin, ..first.clone() };
        assert_eq!(store.members(&own).await.unwrap()[0], kept, "the time and the email stay");
        let drop = |org| Write::DropMember { org, user: first.user };
        assert_eq!(put(store, drop(OrgId::from_raw(77))).await, Err(Miss::Stale));
        assert_eq!(
            (put(store, drop(DEFAULT_ORG)).await, put(store, drop(DEFAULT_ORG)).await),
            (Ok(0), Err(Miss::Stale))
        );
        assert_eq!(store.memberships(&first.user).await.unwrap(), [other]);
    })
    .await;
}
