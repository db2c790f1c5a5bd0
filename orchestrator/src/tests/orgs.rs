//! What an orchestrator that knows no organisations may have left behind: a job that was given to another one's worker.

use std::sync::Arc;

use alloy_shared::id::{DEFAULT_ORG, JobId, Labels, OrgId};
use alloy_shared::secret::TokenKind;
use alloy_shared::wire::farm::Role;
use alloy_shared::wire::job::{FeedCursor, FeedFrame, StateWord};
use alloy_shared::wire::session::{Frame, Heartbeat, Link, Order, SlotState, SlotView, ToOrchestrator, ToWorker};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;

use super::access::hello;
use super::{app, post, token_of};
use crate::App;
use crate::desk::{Answer, Offer, Request};
use crate::feed;
use crate::ops::workers;
use crate::session::drive;
use crate::store::{Scope, Worker};

const OTHER_ORG: OrgId = OrgId::from_raw(DEFAULT_ORG.raw() + 1);

fn key() -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&[5; 32]).unwrap()
}

/// A worker of the first organisation that a job of this one was given to, before it heard of it.
async fn given(app: &Arc<App>, org: OrgId) -> (Worker, JobId) {
    let worker = super::worker(app, DEFAULT_ORG, key().public_key().as_ref().try_into().unwrap()).await;
    let blind = Offer {
        worker: worker.id,
        org,
        name: worker.name.clone(),
        labels: Labels::default(),
        slots: vec![SlotView { state: SlotState::Warm, attempt: None, image: None }],
        images: Default::default(),
        draining: false,
    };
    app.desk.tell(Request::Offer(blind)).await;
    let (_, token) = token_of(app, org, TokenKind::Personal, Role::Developer).await;
    let job = post(app, "/v1/jobs", &token, r#"{"spec":{"shell":"true"}}"#).await.json();
    assert_eq!(job["state"], "assigned", "{job}");
    app.desk.tell(Request::Gone { worker: worker.id, left: true }).await;
    let answer = app.desk.ask(|ticket| Request::Holders { ticket }).await;
    assert_eq!(answer, Answer::Holders([worker.id].into()));
    (worker, job["id"].as_str().unwrap().parse().unwrap())
}

#[tokio::test]
async fn a_worker_is_not_given_a_job_of_another_organisation_that_the_books_say_is_its_own() {
    for (org, gets_it) in [(DEFAULT_ORG, true), (OTHER_ORG, false)] {
        let (app, _) = app().await;
        let (worker, job) = given(&app, org).await;
        let shown = workers::view(&app, worker.clone()).await.unwrap().jobs;
        assert_eq!(shown, Vec::from_iter(gets_it.then(|| job.to_string())), "its list names its organisation's only");

        let (tx, said) = mpsc::channel(64);
        let (says, rx) = mpsc::channel(64);
        let (assigned, ()) =
            tokio::join!(assigned(says, said, &worker), drive::drive(app.clone(), worker.id, Link { tx, rx }));
        assert_eq!(assigned, gets_it);
        let job = app.store.job(&Scope::farm(), &job).await.unwrap().unwrap();
        let (state, lost) = if gets_it { (StateWord::Assigned, 0) } else { (StateWord::Queued, 1) };
        assert_eq!((job.state.word(), job.state.tries.lost), (state, lost));
    }
}

/// Opens the worker's session and says whether it is given a job before its first heartbeat is acknowledged.
async fn assigned(says: mpsc::Sender<Frame>, mut said: mpsc::Receiver<Frame>, worker: &Worker) -> bool {
    let mut assigned = false;
    loop {
        let Frame::Text(text) = said.recv().await.unwrap() else { panic!("a worker is sent no bytes") };
        let answer = match ToWorker::decode(&text).unwrap() {
            ToWorker::Challenge { nonce } => ToOrchestrator::Hello(Box::new(hello(&key(), worker.id, &nonce))),
            ToWorker::Welcome(_) => {
                let (slots, held) = (Vec::new(), Vec::new());
                ToOrchestrator::Heartbeat(Heartbeat { n: 1, heard: 0, slots, held, draining: false, trouble: None })
            }
            ToWorker::Order { order: Order::Assign(_) } => {
                assigned = true;
                continue;
            }
            ToWorker::HeartbeatAck { .. } => return assigned,
            ToWorker::Reject { message, .. } => panic!("{message}"),
            _ => continue,
        };
        says.send(answer.encode()).await.unwrap();
    }
}

#[tokio::test]
async fn whoever_follows_a_job_hears_of_no_worker_of_another_organisation() {
    for (org, hears) in [(DEFAULT_ORG, true), (OTHER_ORG, false)] {
        let (app, clock) = app().await;
        let (worker, job) = given(&app, org).await;
        clock.advance(app.limits.suspect_ms());
        let mut feed = feed::follow(app.clone(), Scope::org(org), job, FeedCursor::default());
        for kind in ["submitted", "assigned"] {
            let Some((_, FeedFrame::Event(event))) = feed.recv().await else { panic!("an event") };
            assert_eq!(event.kind.as_str(), kind);
        }
        // Nothing in memory waits: what the first look found has been sent.
        match feed.try_recv() {
            Ok((_, FeedFrame::Worker(news))) => assert_eq!((hears, news.worker_name), (true, worker.name)),
            Err(TryRecvError::Empty) => assert!(!hears),
            other => panic!("{other:?}"),
        }
    }
}
