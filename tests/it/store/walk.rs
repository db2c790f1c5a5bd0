//! T: a random walk. The same random groups go to all three stores; every answer and every read must be the same. A
//! fourth store, a model, gets the groups one by one: a batch does what its groups do in a row.

use std::collections::BTreeMap;

use alloy_shared::env::Ms;
use alloy_shared::id::{AttemptRef, DEFAULT_ORG, JobId, Labels, TokenId, UserId};
use alloy_shared::secret::TokenKind;
use alloy_shared::wire::farm::Role;
use alloy_shared::wire::image::ImageWant;
use alloy_shared::wire::job::StateWord;
use orchestrator::store::mem::MemStore;
use orchestrator::store::tidy::{Fade, RetentionRow, Tidy};
use orchestrator::store::write::{Advance, CloseAttempt, Enrol, InsertJob, OpenSession, SetWorker};
use orchestrator::store::{
    Artifact, Attempt, Blob, BlobKind, Group, Guard, ImageRow, Job, JobFilter, MemberRow, Miss, Place, Scope, Store,
    Worker, Write,
};

use super::given::{self, Dice, any_end, any_event, any_job, any_state, any_timings, job_id, org, worker_id};
use super::stores;

const STEPS: usize = 400;
const JOBS: usize = 40;
const WORKERS: usize = 4;
const TOKENS: usize = 8;

#[tokio::test]
async fn three_stores_walk_together() {
    for seed in [1, 2] {
        println!("seed {seed}");
        walk(Dice(seed)).await;
    }
}

async fn walk(mut dice: Dice) {
    let stores = stores().await;
    let model = MemStore::default();
    let mut hits: BTreeMap<&'static str, usize> = BTreeMap::new();
    for step in 0..STEPS {
        let mut groups = Vec::new();
        let mut expected = Vec::new();
        for _ in 0..1 + dice.below(12) {
            let writes = if dice.once_in(6) { dice.below(4) } else { 1 };
            let mut group = Vec::new();
            for _ in 0..writes {
                group.push(any_write(&mut dice, &model).await);
            }
            let group = Group(group);
            let result = plain(model.commit(std::slice::from_ref(&group)).await.unwrap().groups.remove(0));
            *hits.entry(word(&group, &result)).or_default() += 1;
            expected.push(result);
            groups.push(group);
        }
        for (name, store) in &stores.all {
            let done = store.commit(&groups).await.unwrap().groups;
            let done: Vec<_> = done.into_iter().map(plain).collect();
            assert_eq!(done, expected, "step {step} on {name}: {groups:#?}");
        }
        if step % 40 == 39 {
            let shown = everything(&model).await;
            for (name, store) in &stores.all {
                for (expected, found) in shown.iter().zip(everything(&**store).await) {
                    assert_eq!(found, *expected, "after step {step} on {name}");
                }
            }
        }
    }
    // A walk that never gets anywhere proves nothing.
    for kind in ["insert ok", "advance ok", "close ok", "several ok", "insert miss", "advance miss", "several miss"] {
        assert!(hits.get(kind).is_some_and(|times| *times > 5), "{kind}: {hits:?}");
    }
}

fn word(group: &Group, result: &Result<Vec<i64>, Miss>) -> &'static str {
    match (group.0.as_slice(), result.is_ok()) {
        ([Write::InsertJob(_)], true) => "insert ok",
        ([Write::InsertJob(_)], false) => "insert miss",
        ([Write::Advance(_)], true) => "advance ok",
        ([Write::Advance(_)], false) => "advance miss",
        ([Write::CloseAttempt(_)], true) => "close ok",
        ([_], _) => "other",
        (_, true) => "several ok",
        (_, false) => "several miss",
    }
}

/// The engines say in their own words why they refuse a row.
fn plain(result: Result<Vec<i64>, Miss>) -> Result<Vec<i64>, Miss> {
    result.map_err(|miss| match miss {
        Miss::Corrupt(_) => Miss::Corrupt(String::new()),
        Miss::Stale | Miss::Exists { .. } => miss,
    })
}

/// A write that mostly fits what the model holds, and sometimes does not.
async fn any_write(dice: &mut Dice, model: &MemStore) -> Write {
    match dice.below(24) {
        20..24 => Write::Tidy(Box::new(any_tidy(dice))),
        0..6 => any_insert(dice),
        6..12 => any_advance(dice, model).await,
        12 | 13 => {
            let at = any_attempt_ref(dice);
            let known = model.attempt(&Scope::farm(), &at).await.unwrap().map(|attempt| attempt.worker);
            let worker = known.filter(|_| !dice.once_in(4)).unwrap_or(worker_id(dice.below(WORKERS)));
            let (teardown_ms, log_len) = (dice.next() >> 20, dice.next() >> 20);
            Write::CloseAttempt(CloseAttempt { at, worker, teardown_ms, log_len })
        }
        14 => any_farm_write(dice),
        15 => {
            let n = dice.below(TOKENS);
            let worker = any_worker(dice);
            Write::Enrol(Box::new(Enrol { token: given::token(n, TokenKind::Join).hash, at: dice.ms(), worker }))
        }
        16 => Write::OpenSession(Box::new(OpenSession {
            worker: worker_id(dice.below(WORKERS)),
            boot: dice.text(),
            labels: labels(dice),
            version: dice.text(),
            at: dice.ms(),
        })),
        17 => Write::AddBlobs((0..dice.below(20)).map(|_| any_blob(dice)).collect()),
        18 => Write::AddMeta { name: dice.of(&["a", "b", "c"]), value: dice.text() },
        _ => {
            let worker = worker_id(dice.below(WORKERS));
            let (draining, note) = (dice.once_in(2), dice.maybe(Dice::text));
            Write::SetWorker(SetWorker { org: org(dice.below(2)), worker, draining, note })
        }
    }
}

fn any_tidy(dice: &mut Dice) -> Tidy {
    let at = dice.ms();
    let (ended_before, open_before) = (dice.ms(), dice.ms());
    let fade = Fade { attempt: any_attempt_ref(dice), ended_before, open_before, at };
    let kind = dice.of(&[BlobKind::Chunk, BlobKind::Manifest, BlobKind::Artifact]);
    let object = |dice: &mut Dice| format!("o/{}", dice.below(30));
    match dice.below(12) {
        0 => Tidy::Adopt { kind, at, most: dice.below(5) as u32 },
        1 => {
            let mut digests: Vec<_> = (0..dice.below(4)).map(|_| given::digest(dice.below(60))).collect();
            digests.sort();
            digests.dedup();
            Tidy::Use { org: org(dice.below(2)), kind, digests, at }
        }
        2 | 3 => {
            let blobs = (0..dice.below(20)).map(|_| any_blob(dice)).collect();
            Tidy::DropBlobs { blobs, unused_since: dice.ms(), at }
        }
        4 => Tidy::DropLog(fade),
        5 => Tidy::DropFiles(fade),
        6 => Tidy::Prune { job: job_id(dice.below(JOBS)), ended_before, open_before, at },
        7 => Tidy::Trash { objects: (0..dice.below(4)).map(|_| object(dice)).collect(), at },
        8 => Tidy::TakeTrash { object: object(dice), before: dice.ms(), at },
        9 => Tidy::Burnt { object: object(dice), at },
        10 => Tidy::Forget { before: dice.ms() },
        _ => Tidy::SetRetention(RetentionRow {
            org: org(dice.below(2)),
            jobs_days: dice.maybe(|dice| dice.below(9) as u32),
            artifacts_days: dice.maybe(|dice| dice.below(9) as u32),
            logs_days: None,
            sources_days: dice.maybe(|dice| dice.below(9) as u32),
        }),
    }
}

fn any_farm_write(dice: &mut Dice) -> Write {
    let n = dice.below(TOKENS);
    match dice.below(9) {
        7 => {
            let (org, role) = (org(dice.below(2)), dice.of(&Role::ALL));
            let (email, created_at) = (dice.maybe(Dice::text), dice.ms());
            Write::SetMember(MemberRow { org, role, email, created_at, ..given::member(dice.below(5)) })
        }
        8 => Write::DropMember { org: org(dice.below(2)), user: given::member(dice.below(5)).user },
        5 => {
            let name = dice.of(&["r/a:1", "r/b:1", "base"]);
            let row = given::image(name, 1 + dice.below(9) as i64);
            let pinned = dice.once_in(2) && row.want != ImageWant::Absent;
            Write::SetImage(ImageRow { org: org(dice.below(2)), pinned, labels: labels(dice), ..row })
        }
        6 => Write::DropImage { org: org(dice.below(2)), name: dice.of(&["r/a:1", "base"]).to_owned() },
        2 => Write::RevokeWorker { org: org(dice.below(2)), worker: worker_id(dice.below(WORKERS)) },
        0 => Write::Seen { worker: worker_id(dice.below(WORKERS)), at: dice.ms(), left: dice.once_in(3) },
        1 => {
            let id = given::token(n, TokenKind::Join).id;
            Write::RevokeToken { org: org(dice.below(2)), id, at: dice.ms() }
        }
        _ => {
            let mut token = given::token(n, dice.of(&[TokenKind::Join, TokenKind::Join, TokenKind::Ci]));
            token.org = org(dice.below(2));
            (token.role, token.name, token.labels) = (dice.of(&Role::ALL), dice.text(), labels(dice));
            (token.created_at, token.expires_at) = (dice.ms(), dice.maybe(Dice::ms));
            if dice.once_in(5) {
                token.id = TokenId::from_raw(dice.next().into());
            }
            Write::AddToken(token)
        }
    }
}

fn labels(dice: &mut Dice) -> Labels {
    let mut labels = Labels::default();
    for key in ["os", "chip", "xcode"] {
        if dice.once_in(2) {
            labels.insert(key, dice.of(&["a", "b", "16.4"])).unwrap();
        }
    }
    labels
}

fn any_insert(dice: &mut Dice) -> Write {
    let id = job_id(dice.below(JOBS));
    let mut job = any_job(dice, id);
    let count = dice.below(3) as u64;
    let events = (1..=count).map(|seq| any_event(dice, &job, seq)).collect();
    job.events = count;
    let attempt = dice.maybe(|dice| any_attempt(dice, &job));
    let mut key = dice.maybe(|dice| {
        let (name, body) = (dice.below(30).to_string(), dice.below(2).to_string());
        given::key(&name, &body)
    });
    if let Some(key) = &mut key {
        key.org = job.org;
    }
    Write::InsertJob(Box::new(InsertJob { job, key, attempt, events }))
}

async fn any_advance(dice: &mut Dice, model: &MemStore) -> Write {
    let id = job_id(dice.below(JOBS));
    let old = model.job(&Scope::farm(), &id).await.unwrap().unwrap_or_else(|| any_job(dice, id));
    let guard = any_guard(dice, &old, model).await;
    let ahead = dice.of(&[1, 1, 1, 1, 1, 1, 2, 0]);
    let worker = worker_id(dice.below(WORKERS));
    let count = dice.below(3) as u64;
    // Once in a while an event's number is taken already.
    let from = if dice.once_in(15) { old.events } else { old.events + 1 };
    let mut next = Job { version: old.version + ahead, state: any_state(dice, worker), ..old };
    let events = (from..from + count).filter(|seq| *seq > 0).map(|seq| any_event(dice, &next, seq)).collect();
    next.events = from + count;
    let attempt = dice.maybe(|dice| any_attempt(dice, &next));
    let artifacts = if attempt.is_some() || dice.once_in(8) {
        (0..dice.below(3)).map(|_| any_artifact(dice, &next)).collect()
    } else {
        Vec::new()
    };
    Write::Advance(Box::new(Advance { next, guard, attempt, events, artifacts }))
}

async fn any_guard(dice: &mut Dice, job: &Job, model: &MemStore) -> Guard {
    let Some(lease) = job.state.lease().filter(|_| !dice.once_in(4)) else { return Guard::Version };
    let worker = if dice.once_in(5) { worker_id(dice.below(WORKERS)) } else { lease.worker };
    let known = model.worker(&Scope::farm(), &worker).await.unwrap();
    let epoch = known.map_or(0, |worker| worker.epoch) + i64::from(dice.once_in(5));
    match dice.once_in(2) {
        true => Guard::Silent { worker, unseen_since: None },
        false => Guard::Fence { attempt: lease.attempt + u32::from(dice.once_in(6)), worker, epoch },
    }
}

fn any_attempt_ref(dice: &mut Dice) -> AttemptRef {
    AttemptRef { job: job_id(dice.below(JOBS)), attempt: 1 + dice.below(3) as u32 }
}

fn any_attempt(dice: &mut Dice, job: &Job) -> Attempt {
    let end = dice.maybe(any_end);
    Attempt {
        at: job.attempt(),
        org: job.org,
        worker: worker_id(dice.below(WORKERS)),
        assigned_at: dice.ms(),
        ended_at: end.as_ref().map(|_| dice.ms()),
        end,
        timings: any_timings(dice),
        seq: dice.next() >> 20,
        facts: dice.maybe(|dice| (dice.text(), dice.text())).into_iter().collect(),
        log_len: dice.maybe(|dice| dice.next() >> 20),
        log_gone_at: None,
        files_gone_at: None,
    }
}

fn any_artifact(dice: &mut Dice, job: &Job) -> Artifact {
    Artifact {
        at: job.attempt(),
        org: job.org,
        path: dice.text(),
        size: dice.next() >> 10,
        sha256: given::digest(dice.below(9)),
        mode: dice.of(&[0o644, 0o755]),
        link: dice.maybe(Dice::text),
    }
}

fn any_worker(dice: &mut Dice) -> Worker {
    let n = dice.below(WORKERS);
    Worker {
        org: org(dice.below(2)),
        name: dice.text(),
        public_key: given::digest(n + dice.below(2)).0,
        labels: labels(dice),
        enrolled_at: dice.ms(),
        revoked: dice.once_in(8),
        ..given::worker(n)
    }
}

fn any_blob(dice: &mut Dice) -> Blob {
    let size = dice.below(1_000) as u64;
    let object = format!("o/{}", dice.below(30));
    let place = match dice.once_in(2) {
        true => Place::Alone { object },
        false => Place::Packed {
            object,
            frame_at: dice.next() >> 10,
            stored: dice.next() as u32,
            zstd: dice.once_in(2),
            raw_len: size as u32 + 1_000,
            raw_at: dice.below(1_000) as u32,
        },
    };
    let kind = dice.of(&[BlobKind::Chunk, BlobKind::Manifest, BlobKind::Artifact]);
    let (created_at, used_at) = (dice.ms(), dice.ms());
    Blob { org: org(dice.below(2)), digest: given::digest(dice.below(60)), kind, size, place, created_at, used_at }
}

/// All that a store shows, read in every way there is.
async fn everything(store: &dyn Store) -> Vec<String> {
    let mut shown = Vec::new();
    let mut show = |what: &dyn std::fmt::Debug| shown.push(format!("{what:#?}"));
    let scopes = [Scope::farm(), Scope::org(DEFAULT_ORG), Scope::org(given::OTHER_ORG)];
    for scope in &scopes {
        for id in (0..JOBS).map(job_id) {
            show(&store.job(scope, &id).await.unwrap());
            show(&store.attempts(scope, &id).await.unwrap());
            show(&store.attempt(scope, &AttemptRef { job: id, attempt: 2 }).await.unwrap());
            show(&store.events(scope, &id, 1, 3).await.unwrap());
            show(&store.events(scope, &id, 0, 1_000).await.unwrap());
            show(&store.artifacts(scope, &id).await.unwrap());
            show(&store.jobs_ending(scope, &id.to_string()[24..]).await.unwrap());
        }
        for before in [None, Some(job_id(20)), Some(JobId::from_raw(0))] {
            for states in [vec![], vec![StateWord::Running], vec![StateWord::Failed, StateWord::Queued]] {
                for created_by in [None, Some("tok_me".to_owned())] {
                    let filter = JobFilter { states: states.clone(), created_by, before };
                    show(&store.jobs(scope, &filter, 5).await.unwrap());
                }
            }
        }
        show(&store.workers(scope).await.unwrap());
        show(&store.images(scope).await.unwrap());
        show(&store.members(scope).await.unwrap());
        show(&store.worker(scope, &worker_id(1)).await.unwrap());
        show(&store.tokens(scope).await.unwrap());
        let digests: Vec<_> = (0..70).rev().map(given::digest).collect();
        for kind in [BlobKind::Chunk, BlobKind::Manifest, BlobKind::Artifact] {
            show(&store.blobs(scope, kind, &digests).await.unwrap());
        }
    }
    for before in [Ms(1_700_000_500_000), Ms(i64::MAX)] {
        let ended = store.ended(before, None, 1_000).await.unwrap();
        show(&store.ended(before, ended.get(3).map(|one| (one.at, one.job)), 2).await.unwrap());
        show(&ended);
        let fading = store.fading(before, None, 1_000).await.unwrap();
        show(&store.fading(before, fading.get(3).map(|one| (one.ended_at, one.attempt)), 2).await.unwrap());
        show(&fading);
        for kind in [BlobKind::Chunk, BlobKind::Manifest, BlobKind::Artifact] {
            let unused = store.unused(kind, before, None, 1_000).await.unwrap();
            let third = unused.get(3).map(|blob| (blob.used_at, blob.digest, blob.org));
            show(&store.unused(kind, before, third, 2).await.unwrap());
            show(&unused);
        }
        show(&store.trash(before, None, 1_000).await.unwrap());
    }
    let objects: Vec<String> = (0..31).rev().map(|n| format!("o/{n}")).collect();
    show(&store.named(&objects).await.unwrap());
    for object in &objects {
        show(&store.trashed(object).await.unwrap());
    }
    show(&store.retention(&Scope::farm()).await.unwrap());
    show(&store.retention(&scopes[1]).await.unwrap());
    show(&store.live(None, 1_000).await.unwrap());
    show(&store.live(Some(job_id(10)), 3).await.unwrap());
    for n in 0..TOKENS {
        show(&store.held(&worker_id(n)).await.unwrap());
        show(&store.memberships(&UserId::from_raw(n as u128)).await.unwrap());
        show(&store.worker_by_key(&given::digest(n).0).await.unwrap());
        show(&store.token(&given::token(n, TokenKind::Join).hash).await.unwrap());
    }
    for name in ["a", "b", "c", "d"] {
        show(&store.meta(name).await.unwrap());
    }
    assert!(shown.iter().any(|text| text.contains("Running")), "there is something to compare at {:?}", Ms(0));
    shown
}
