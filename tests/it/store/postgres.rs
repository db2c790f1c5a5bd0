//! T: what only a Postgres does: views, and news for other orchestrators.

use alloy_shared::env::Ms;
use alloy_shared::id::Labels;
use alloy_shared::secret::TokenKind;
use alloy_shared::wire::job::{End, Reason};
use alloy_tests::pg;
use orchestrator::store::sql::SqlStore;
use orchestrator::store::sql::shared::{Changed, Heard};
use orchestrator::store::write::{InsertJob, OpenSession};
use orchestrator::store::{Attempt, Guard, Write};
use sqlx::{Connection, Executor, PgConnection};

use super::given::{advance, assigned, attempt, done, enrol, insert, job_id, queued, token, worker_id};
use super::put;

#[tokio::test]
async fn what_a_worker_says_keeps_no_view_from_being_read() {
    let url = pg::database().await;
    let store = SqlStore::open_postgres(&url).await.unwrap();
    let mut end = End::because(Reason::WorkerLost, "a\0b");
    end.warnings.push("\0".to_owned());
    let given = assigned(&queued(job_id(1)), worker_id(1));
    let facts = [("image".to_owned(), "\0".to_owned())].into();
    let row = Attempt { end: Some(end.clone()), ended_at: Some(Ms(9)), facts, ..attempt(&given, worker_id(1)) };
    let write = InsertJob { job: done(&given, end), key: None, attempt: Some(row), events: Vec::new() };
    put(&store, Write::InsertJob(Box::new(write))).await.unwrap();
    let mut conn = PgConnection::connect(&url).await.unwrap();
    let text = "SELECT concat_ws(' ', ending ->> 'message', ending ->> 'warnings', facts ->> 'image') FROM alloy_views.attempts";
    let said: String = sqlx::query_scalar(text).fetch_one(&mut conn).await.unwrap();
    assert_eq!(said, "a\u{fffd}b [\"\u{fffd}\"] \u{fffd}");
}

#[tokio::test]
async fn a_copied_database_tells_no_old_news() {
    let url = pg::database().await;
    let other = SqlStore::open_shared(&url, "other".to_owned()).await.unwrap();
    let mine = SqlStore::open_shared(&url, "mine".to_owned()).await.unwrap();
    let shared = mine.shared().unwrap();
    let from = Changed::since(&shared.horizon().await.unwrap());
    let news = async || shared.changed(&from, 9).await.unwrap().0.len();
    let job = queued(job_id(1));
    put(&other, insert(job.clone(), None)).await.unwrap();
    assert_eq!(news().await, 1);

    // The rows as they were, in a database that counts its transactions from the beginning.
    let mut conn = PgConnection::connect(&url).await.unwrap();
    conn.execute("ALTER TABLE jobs DISABLE TRIGGER USER").await.unwrap();
    conn.execute("UPDATE jobs SET changed = '9223372036854775807'").await.unwrap();
    conn.execute("ALTER TABLE jobs ENABLE TRIGGER USER").await.unwrap();
    assert_eq!(news().await, 0, "it would be read at each look");
    let next = assigned(&job, worker_id(1));
    put(&other, advance(&next, Guard::Version, Some(attempt(&next, worker_id(1))))).await.unwrap();
    assert_eq!(news().await, 1, "what happens here is news");
}

#[tokio::test]
async fn a_job_that_cannot_be_read_hides_no_other() {
    let url = pg::database().await;
    let other = SqlStore::open_shared(&url, "other".to_owned()).await.unwrap();
    let mine = SqlStore::open_shared(&url, "mine".to_owned()).await.unwrap();
    let shared = mine.shared().unwrap();
    let from = Changed::since(&shared.horizon().await.unwrap());
    put(&other, insert(queued(job_id(1)), None)).await.unwrap();
    let mut conn = PgConnection::connect(&url).await.unwrap();
    let text = "UPDATE jobs SET state_json = '{\"step\":\"dreaming\"}'";
    assert_eq!(conn.execute(text).await.unwrap().rows_affected(), 1);
    put(&other, insert(queued(job_id(2)), None)).await.unwrap();
    // In one page, and where each is a page of its own.
    for limit in [9, 1] {
        let (mut page, mut known) = (Some(from.clone()), Vec::new());
        while let Some(at) = page {
            let (jobs, next) = shared.changed(&at, limit).await.unwrap();
            known.extend(jobs.into_iter().map(|(job, _)| job.id));
            page = next;
        }
        assert_eq!(known, [job_id(2)]);
    }
}

#[tokio::test]
async fn a_transaction_that_stays_open_makes_nobody_read_again_what_he_knows() {
    let url = pg::database().await;
    let other = SqlStore::open_shared(&url, "other".to_owned()).await.unwrap();
    let mine = SqlStore::open_shared(&url, "mine".to_owned()).await.unwrap();
    let shared = mine.shared().unwrap();
    let mut conn = PgConnection::connect(&url).await.unwrap();
    conn.execute("BEGIN; SELECT pg_current_xact_id()").await.unwrap();
    let news = async |since: &str| {
        let next = shared.horizon().await.unwrap();
        (shared.changed(&Changed::since(since), 9).await.unwrap().0.len(), next)
    };
    let begun = shared.horizon().await.unwrap();
    put(&other, insert(queued(job_id(1)), None)).await.unwrap();
    let (first, since) = news(&begun).await;
    assert_eq!((first, news(&since).await.0), (1, 0));

    // What it changes itself is seen at its end, behind what was read meanwhile.
    conn.execute("UPDATE jobs SET version = version + 1").await.unwrap();
    let (before, since) = news(&since).await;
    conn.execute("COMMIT").await.unwrap();
    let (after, since) = news(&since).await;
    assert_eq!((before, after, news(&since).await.0), (0, 1, 0));
}

#[tokio::test]
async fn a_worker_that_has_just_come_to_another_orchestrator_is_somewhere_all_the_time() {
    let url = pg::database().await;
    let there = SqlStore::open_shared(&url, "there".to_owned()).await.unwrap();
    let mine = SqlStore::open_shared(&url, "mine".to_owned()).await.unwrap();
    let worker = worker_id(1);
    let join = token(1, TokenKind::Join);
    put(&there, Write::AddToken(join.clone())).await.unwrap();
    put(&there, enrol(1, &join)).await.unwrap();
    let session = || {
        let (boot, version, labels) = ("b".to_owned(), String::new(), Labels::default());
        Write::OpenSession(Box::new(OpenSession { worker, boot, labels, version, at: Ms(7) }))
    };
    let epoch = put(&there, session()).await.unwrap();
    let heard = Heard { worker, epoch, age_ms: 0, offer: Some("{}".to_owned()) };
    there.shared().unwrap().beat("1", &[heard]).await.unwrap();
    let seen = async || {
        let all = mine.shared().unwrap().elsewhere(60_000).await.unwrap();
        all.into_iter().map(|one| one.worker).collect::<Vec<_>>()
    };
    assert_eq!(seen().await, [worker]);
    assert_eq!(put(&there, session()).await.unwrap(), epoch + 1);
    assert_eq!(seen().await, [worker], "nobody has written of the new session yet");
}
