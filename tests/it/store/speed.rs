//! T: group commit at work: the figures are printed, what is asserted is that each group did what it should.

use std::time::Instant;

use alloy_shared::wire::job::{End, EventKind};
use orchestrator::store::write::{Advance, InsertJob};
use orchestrator::store::{Group, Guard, Store, Write};

use super::given::{assigned, attempt, done, event, job_id, key, queued, worker_id};
use super::stores;

/// The groups of `count` jobs from the first to the last: inserted as assigned, then done.
fn lives(from: usize, count: usize) -> Vec<Vec<Group>> {
    let (mut first, mut last) = (Vec::new(), Vec::new());
    for n in from..from + count {
        let held = given_job(n);
        let worker = worker_id(n % 8);
        let books = attempt(&held, worker);
        let events = vec![event(&held, 1, EventKind::Submitted), event(&held, 2, EventKind::Assigned)];
        let insert =
            InsertJob { job: held.clone(), key: Some(key(&n.to_string(), "b")), attempt: Some(books.clone()), events };
        first.push(Group(vec![Write::InsertJob(Box::new(insert))]));
        let next = done(&held, End::success());
        let ended = orchestrator::store::Attempt {
            ended_at: Some(alloy_shared::env::Ms(9)),
            end: Some(End::success()),
            seq: 4,
            ..books
        };
        let events = vec![event(&next, 3, EventKind::Finished)];
        let guard = Guard::Silent { worker, unseen_since: None };
        let advance = Advance { next, guard, attempt: Some(ended), events, artifacts: Vec::new() };
        last.push(Group(vec![Write::Advance(Box::new(advance))]));
    }
    vec![first, last]
}

fn given_job(n: usize) -> orchestrator::store::Job {
    let held = assigned(&queued(job_id(n)), worker_id(n % 8));
    orchestrator::store::Job { version: 1, ..held }
}

async fn run(store: &dyn Store, name: &str, batch: usize, batches: usize) {
    let started = now();
    let mut groups = 0;
    for n in 0..batches {
        for commit in lives(1_000_000 * batch + n * batch, batch) {
            let result = store.commit(&commit).await.unwrap();
            assert!(result.groups.iter().all(Result::is_ok), "{:?}", result.groups);
            groups += commit.len();
        }
    }
    let per_second = groups as f64 / started.elapsed().as_secs_f64();
    println!("{name}: {groups} groups, {batch} in a commit: {per_second:.0} groups/s");
}

#[tokio::test]
async fn group_commit_carries_many_groups() {
    for (name, store) in &stores().await.all[1..] {
        run(&**store, name, 1, 20).await;
        run(&**store, name, 256, 4).await;
    }
}

/// The only clock here: it is for the printed figures.
#[allow(clippy::disallowed_methods)]
fn now() -> Instant {
    Instant::now()
}
