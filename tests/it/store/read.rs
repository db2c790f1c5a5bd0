//! T: what the reads show, to whom and in which order, on all three stores; and what a damaged row does.

use alloy_shared::env::Ms;
use alloy_shared::id::{DEFAULT_ORG, JobId};
use alloy_shared::secret::TokenKind;
use alloy_shared::wire::job::{End, EventKind, StateWord};
use orchestrator::store::write::InsertJob;
use orchestrator::store::{Guard, JobFilter, Scope, Store, StoreError, Write};
use sqlx::{Connection, Executor, PgConnection, SqliteConnection};

use super::given::{self, Dice, advance, assigned, attempt, insert, job_id, queued, worker_id};
use super::{on_each, put, stores};

/// Jobs 0 to 9: even ones are ours, odd ones another organisation's; 4 and 5 are assigned, 6 and 7 have ended.
async fn ten_jobs(store: &dyn Store) {
    for n in 0..10 {
        let mut job = queued(job_id(n));
        job.org = given::org(n % 2);
        job.created_by = if n < 8 { "tok_me" } else { "tok_you" }.to_owned();
        put(store, insert(job.clone(), None)).await.unwrap();
        if (4..8).contains(&n) {
            let held = assigned(&job, worker_id(1));
            put(store, advance(&held, Guard::Version, Some(attempt(&held, worker_id(1))))).await.unwrap();
            if n >= 6 {
                put(store, advance(&given::done(&held, End::success()), Guard::Version, None)).await.unwrap();
            }
        }
    }
}

#[tokio::test]
async fn jobs_are_listed_newest_first_by_filter_and_page() {
    on_each(async |store| {
        ten_jobs(store).await;
        let list = async |scope: Scope, filter: JobFilter, limit| {
            let jobs = store.jobs(&scope, &filter, limit).await.unwrap();
            jobs.iter().map(|job| (0..10).find(|n| job_id(*n) == job.id).unwrap()).collect::<Vec<_>>()
        };
        let own = Scope::org(DEFAULT_ORG);
        let all = JobFilter::default();
        assert_eq!(list(own, all.clone(), 99).await, [8, 6, 4, 2, 0]);
        assert_eq!(list(own, all.clone(), 2).await, [8, 6]);
        assert_eq!(list(own, JobFilter { before: Some(job_id(6)), ..all.clone() }, 2).await, [4, 2]);
        assert_eq!(list(Scope::farm(), all.clone(), 3).await, [9, 8, 7]);
        let ended = JobFilter { states: vec![StateWord::Succeeded], ..all.clone() };
        assert_eq!(list(own, ended.clone(), 99).await, [6]);
        assert_eq!(list(Scope::farm(), ended, 99).await, [7, 6]);
        let two = JobFilter { states: vec![StateWord::Assigned, StateWord::Queued], ..all.clone() };
        assert_eq!(list(own, two.clone(), 99).await, [8, 4, 2, 0]);
        let mine = JobFilter { created_by: Some("tok_me".to_owned()), ..two };
        assert_eq!(list(own, mine.clone(), 99).await, [4, 2, 0]);
        assert_eq!(list(Scope::farm(), mine, 99).await, [5, 4, 3, 2, 1, 0]);
        let live = store.live(Some(job_id(2)), 3).await.unwrap();
        assert_eq!(live.iter().map(|job| job.id).collect::<Vec<_>>(), [3, 4, 5].map(job_id));
        assert_eq!(store.live(None, 99).await.unwrap().len(), 8);
        let held = store.held(&worker_id(1)).await.unwrap();
        assert_eq!(held.iter().map(|job| job.id).collect::<Vec<_>>(), [4, 5].map(job_id));
        assert_eq!(store.held(&worker_id(2)).await.unwrap(), []);
    })
    .await;
}

#[tokio::test]
async fn a_foreign_row_looks_like_none() {
    on_each(async |store| {
        ten_jobs(store).await;
        let (foreign, own) = (Scope::org(given::OTHER_ORG), Scope::org(DEFAULT_ORG));
        let id = job_id(4);
        let at = store.job(&own, &id).await.unwrap().unwrap().attempt();
        assert_eq!(store.job(&foreign, &id).await.unwrap(), None);
        assert_eq!(store.attempts(&foreign, &id).await.unwrap(), []);
        assert_eq!(store.attempt(&foreign, &at).await.unwrap(), None);
        assert_eq!(store.events(&foreign, &id, 0, 9).await.unwrap(), []);
        assert_eq!(store.attempts(&own, &id).await.unwrap().len(), 1);
        assert!(store.attempt(&own, &at).await.unwrap().is_some());
        assert_eq!(store.events(&own, &id, 0, 9).await.unwrap().len(), 2);
        let suffix = &id.to_string()[10..];
        assert_eq!(store.jobs_ending(&own, suffix).await.unwrap(), [id]);
        assert_eq!(store.jobs_ending(&foreign, suffix).await.unwrap(), []);
        let (join, personal) = (given::token(1, TokenKind::Join), given::token(2, TokenKind::Personal));
        let mut later = given::token(3, TokenKind::Ci);
        later.created_at = Ms(99);
        for token in [&join, &personal, &later] {
            put(store, Write::AddToken(token.clone())).await.unwrap();
        }
        put(store, given::enrol(1, &join)).await.unwrap();
        assert_eq!(store.tokens(&own).await.unwrap(), [later, personal], "newest first, without join tokens");
        assert_eq!(store.tokens(&foreign).await.unwrap(), []);
        assert_eq!(store.workers(&foreign).await.unwrap(), []);
        assert_eq!(store.worker(&foreign, &worker_id(1)).await.unwrap(), None);
        assert_eq!(store.worker_by_key(&given::worker(1).public_key).await.unwrap(), Some(given::worker(1)));
        assert_eq!(store.worker_by_key(&[0; 32]).await.unwrap(), None);
    })
    .await;
}

#[tokio::test]
async fn events_go_on_after_a_cursor() {
    on_each(async |store| {
        let job = queued(job_id(1));
        let events: Vec<_> = (1..=9).map(|seq| given::event(&job, seq, EventKind::Phase)).collect();
        let write = InsertJob { job: job.clone(), key: None, attempt: None, events: events.clone() };
        put(store, Write::InsertJob(Box::new(write))).await.unwrap();
        let read = async |after, limit| store.events(&Scope::farm(), &job.id, after, limit).await.unwrap();
        assert_eq!(read(0, 4).await, events[..4]);
        assert_eq!(read(4, 4).await, events[4..8]);
        assert_eq!(read(9, 4).await, []);
        assert_eq!(read(u64::MAX, 4).await, []);
    })
    .await;
}

#[tokio::test]
async fn a_job_is_found_by_the_end_of_its_id() {
    on_each(async |store| {
        // Same last seven characters, then six, then one.
        let ids = [0x0000_0001_2345_6789u128, 0xff00_0001_2345_6789, 0x0fff_f0fd_2345_6789, 0x0000_0000_0000_0009];
        for id in ids.map(JobId::from_raw) {
            put(store, insert(queued(id), None)).await.unwrap();
        }
        let text = JobId::from_raw(ids[0]).to_string();
        for (chars, found) in [(30, 1), (26, 1), (7, 2), (6, 2), (5, 0), (0, 0)] {
            let suffix = &text[text.len() - chars..];
            assert_eq!(store.jobs_ending(&Scope::farm(), suffix).await.unwrap().len(), found, "{suffix}");
        }
        for unknown in ["zzzzzz", "ABCDEF", "%", "_", "e'f", "é", &format!("x{text}")] {
            assert_eq!(store.jobs_ending(&Scope::farm(), unknown).await.unwrap(), [], "{unknown}");
        }
    })
    .await;
}

#[tokio::test]
async fn any_job_comes_back_as_it_went_in() {
    let seed = 11;
    println!("seed {seed}");
    on_each(async |store| {
        let mut dice = Dice(seed);
        for n in 0..200 {
            let mut job = given::any_job(&mut dice, job_id(n));
            (job.version, job.events) = (1 + dice.below(1_000) as i64, dice.next() >> 30);
            put(store, insert(job.clone(), None)).await.unwrap();
            assert_eq!(store.job(&Scope::farm(), &job.id).await.unwrap(), Some(job));
        }
    })
    .await;
}

/// Runs one statement on both databases, behind the stores' backs.
async fn meddle(stores: &super::Stores, text: &'static str) {
    let mut sqlite = SqliteConnection::connect(stores.sqlite.to_str().unwrap()).await.unwrap();
    sqlite.execute(text).await.unwrap();
    let mut postgres = PgConnection::connect(&stores.postgres).await.unwrap();
    postgres.execute(text).await.unwrap();
}

#[tokio::test]
async fn a_damaged_row_is_named() {
    let stores = stores().await;
    for (_, store) in &stores.all {
        put(&**store, insert(queued(job_id(1)), None)).await.unwrap();
    }
    let id = job_id(1).to_string();
    for (text, column) in [
        ("UPDATE jobs SET spec = '{'", "spec"),
        ("UPDATE jobs SET org_id = 'nobody'", "org_id"),
        ("UPDATE jobs SET state_json = '{}'", "state_json"),
    ] {
        meddle(&stores, text).await;
        for (name, store) in &stores.all[1..] {
            let read = store.job(&Scope::farm(), &job_id(1)).await;
            assert_eq!(read, Err(StoreError::Corrupt { table: "jobs", id: id.clone(), column }), "{name}");
        }
    }
}
