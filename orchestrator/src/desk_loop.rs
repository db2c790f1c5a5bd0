//! P: the desk's loop: drain what was asked, decide, commit once, answer. [`Door::ask`] is the desk's only door.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use alloy_shared::env::{Env, Mono, backoff};
use alloy_shared::id::{JobId, WorkerId};
use alloy_shared::limits::{self, Limits};
use tokio::sync::{mpsc, oneshot};
use tracing::{error, warn};

use crate::desk::{Answer, Desk, Effect, Request, Ticket};
use crate::hub::Hub;
use crate::job::{State, Step};
use crate::store::{Attempt, Committed, Group, Job, Scope, Store, StoreError};
use crate::wake::Wake;

/// After so long a job that could not be read is read again.
const UNREADABLE_MS: u64 = 60_000;

/// A request, and who waits for its answer.
type Asked = (Request, Option<(Ticket, oneshot::Sender<Answer>)>);

/// Where requests go in.
#[derive(Clone)]
pub struct Door {
    tx: mpsc::Sender<Asked>,
    tickets: Arc<AtomicU64>,
    /// Counts new jobs, from anywhere: what an earlier process counted is somewhere else.
    turns: Arc<AtomicU32>,
}

impl Door {
    /// The id of a new job.
    pub fn new_job(&self, env: &dyn Env) -> JobId {
        let id = JobId::mint(env.now().wall, (env.dice(), env.dice()));
        id.in_turn(self.turns.fetch_add(1, Ordering::Relaxed))
    }

    /// Asks and waits for the answer, which follows the commit.
    pub async fn ask(&self, request: impl FnOnce(Ticket) -> Request) -> Answer {
        let ticket = self.tickets.fetch_add(1, Ordering::Relaxed);
        let (answer, waiting) = oneshot::channel();
        let gone = || Answer::Failed(StoreError::Unavailable("the orchestrator is stopping".to_owned()));
        if self.tx.send((request(ticket), Some((ticket, answer)))).await.is_err() {
            return gone();
        }
        waiting.await.unwrap_or_else(|_| gone())
    }

    /// Says something that needs no answer.
    pub async fn tell(&self, request: Request) {
        if self.tx.send((request, None)).await.is_err() {
            warn!("the desk is closed; a message to it was dropped");
        }
    }
}

/// Tells other orchestrators that there is something to look at. A full one has something to tell already.
pub type Speak = mpsc::Sender<()>;

/// Loads the live jobs and starts the loop. Returns when the desk is ready to decide.
pub async fn spawn(
    store: Arc<dyn Store>,
    hub: Arc<Hub>,
    wake: Arc<Wake>,
    env: Arc<dyn Env>,
    limits: Limits,
    speak: Option<Speak>,
) -> Result<Door, StoreError> {
    let desk = Desk::new(limits, env.now().mono);
    let mut desk = if speak.is_some() { desk.shared() } else { desk };
    let mut after = None;
    loop {
        let jobs = store.live(after, limits::PAGE_MAX).await?;
        let Some(last) = jobs.last() else { break };
        after = Some(last.id);
        let mut loaded = Vec::with_capacity(jobs.len());
        for job in jobs {
            loaded.push(with_attempt(&*store, job).await?);
        }
        // Loading decides nothing that must be written: no offers are known yet, and overdue jobs are found by the loop.
        desk.restore(loaded, env.now());
    }
    let (tx, rx) = mpsc::channel(limits::DESK_QUEUE);
    let turns = Arc::new(AtomicU32::new(env.dice() as u32));
    let door = Door { tx, tickets: Arc::new(AtomicU64::new(1)), turns };
    let (waiting, unreadable) = (HashMap::new(), BTreeMap::new());
    let task = Loop { desk, store, hub, wake, env: env.clone(), rx, waiting, speak, unreadable };
    env.spawn("desk", Box::pin(task.run()));
    Ok(door)
}

/// A job as a desk has it.
pub(crate) async fn with_attempt(store: &dyn Store, job: Job) -> Result<(Job, Option<Attempt>), StoreError> {
    let attempt = match job.state.tries.made {
        0 => None,
        _ => store.attempt(&Scope::farm(), &job.attempt()).await?,
    };
    Ok((job, attempt))
}

struct Loop {
    desk: Desk,
    store: Arc<dyn Store>,
    hub: Arc<Hub>,
    wake: Arc<Wake>,
    env: Arc<dyn Env>,
    rx: mpsc::Receiver<Asked>,
    waiting: HashMap<Ticket, oneshot::Sender<Answer>>,
    speak: Option<Speak>,
    /// Jobs that could not be read, when they are read again, and the worker that may have lost each unheard.
    unreadable: BTreeMap<JobId, (Mono, Option<WorkerId>)>,
}

impl Loop {
    async fn run(mut self) {
        let mut failures = 0;
        while let Some(requests) = self.gather().await {
            let groups = self.desk.decide(requests, self.env.now());
            let (done, repeated) = self.commit(&groups).await;
            let failed = done.is_err();
            for effect in self.desk.committed(done, repeated, self.env.now().mono) {
                self.perform(effect).await;
            }
            self.read_again().await;
            failures = if failed { failures + 1 } else { 0 };
            // What is overdue stays so while nothing can be written: without a pause the loop would spin.
            if failed {
                self.pause(failures).await;
            }
        }
    }

    /// One commit. One whose fate is unknown is repeated until it is known; true: it was.
    async fn commit(&self, groups: &[Group]) -> (Result<Committed, StoreError>, bool) {
        if groups.is_empty() {
            return (Ok(Committed { groups: Vec::new() }), false);
        }
        let mut tries = 0;
        loop {
            match self.store.commit(groups).await {
                Ok(done) => return (Ok(done), tries > 0),
                Err(error) if tries > 0 || matches!(error, StoreError::Unknown(_) | StoreError::Broken(_)) => {
                    warn!(groups = groups.len(), %error, "the fate of a commit is unknown; repeating it");
                    tries += 1;
                    self.pause(tries).await;
                }
                Err(error) => {
                    error!(groups = groups.len(), %error, "the store did not commit");
                    return (Err(error), false);
                }
            }
        }
    }

    async fn pause(&self, tries: u32) {
        let delay = backoff(tries, 50, 2_000, self.env.dice());
        self.env.sleep_until(self.env.now().mono + delay).await;
    }

    /// Everything that was asked by now; waits for the first. `None`: all doors are gone.
    async fn gather(&mut self) -> Option<Vec<Request>> {
        let mut requests = Vec::new();
        let due = self.desk.next_wake().into_iter().chain(self.unreadable.values().map(|(at, _)| *at)).min();
        tokio::select! {
            biased;
            asked = self.rx.recv() => self.note(asked?, &mut requests),
            () = until(&*self.env, due) => {}
        }
        while requests.len() < limits::COMMIT_GROUPS_MAX {
            match self.rx.try_recv() {
                Ok(asked) => self.note(asked, &mut requests),
                Err(_) => break,
            }
        }
        Some(requests)
    }

    fn note(&mut self, (request, waiting): Asked, requests: &mut Vec<Request>) {
        if let Some((ticket, answer)) = waiting {
            self.waiting.insert(ticket, answer);
        }
        requests.push(request);
    }

    async fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Answer { ticket, answer } => {
                if let Some(waiting) = self.waiting.remove(&ticket) {
                    // The asker may have gone; the commit stands all the same.
                    let _ = waiting.send(answer);
                }
            }
            Effect::Moved { job, left } => {
                self.wake.moved(job.id);
                let heard = self.hub.moved(&job, left);
                self.speak(&job.state, heard);
            }
            Effect::Learned { job, left } => {
                self.wake.moved(job.id);
                self.hub.moved(&job, left);
            }
            Effect::Reload { job, left } => self.reload(job, left).await,
        }
    }

    fn speak(&self, state: &State, heard: bool) {
        if let Some(speak) = self.speak.as_ref().filter(|_| concerns_others(state, heard)) {
            let _ = speak.try_send(());
        }
    }

    async fn read_again(&mut self) {
        let now = self.env.now().mono;
        let due: Vec<_> = self.unreadable.extract_if(.., |_, (at, _)| *at <= now).collect();
        for (id, (_, left)) in due {
            self.reload(id, left).await;
        }
    }

    /// Nothing is decided about a job whose picture is not true; the loop waits for the store.
    async fn reload(&mut self, id: JobId, left: Option<WorkerId>) {
        let mut tries = 0;
        loop {
            let loaded = match self.store.job(&Scope::farm(), &id).await {
                Ok(Some(job)) => with_attempt(&*self.store, job).await.map(Some),
                Ok(None) => Ok(None),
                Err(error) => Err(error),
            };
            match loaded {
                Ok(Some((job, attempt))) => {
                    // Whoever was to hear of a change may have missed it: a session that takes the job for its worker's own
                    // would assign it again.
                    self.wake.moved(id);
                    let heard = self.hub.moved(&job, left);
                    // So may others: the change may be this desk's own, written by a commit whose answer was lost.
                    self.speak(&job.state, heard);
                    return self.desk.restore(vec![(job, attempt)], self.env.now());
                }
                Ok(None) => return,
                // A newer orchestrator may have written it. It is theirs then, and all other jobs wait for this desk. Or the
                // database could not read it, which may pass.
                Err(error @ StoreError::Corrupt { .. }) if self.speak.is_some() => {
                    self.unreadable.insert(id, (self.env.now().mono + UNREADABLE_MS, left));
                    return error!(job.id = %id, %error, "job {id} cannot be read and is left to other orchestrators for now");
                }
                Err(error) => {
                    warn!(job.id = %id, %error, "cannot reload job; trying again");
                    tries += 1;
                    self.pause(tries).await;
                }
            }
        }
    }
}

/// Whether other orchestrators wait for this change. `heard`: those whom it concerns have heard of it here. One that waits may
/// be for a worker of theirs, whoever gave it back.
fn concerns_others(state: &State, heard: bool) -> bool {
    match state.step {
        Step::Queued { .. } => true,
        Step::Assigned { .. } | Step::Running { .. } | Step::Canceling { .. } => !heard,
        Step::Done { .. } => false,
    }
}

/// Returns at that time, or never.
async fn until(env: &dyn Env, at: Option<Mono>) {
    match at {
        Some(at) => env.sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use alloy_shared::env::Ms;
    use alloy_shared::wire::job::End;

    use super::*;
    use crate::job::{Lease, Tries};
    use crate::store::Write;
    use crate::store::mem::MemStore;
    use crate::store::write::InsertJob;
    use crate::tests::TestEnv;

    /// A loop beside others, in whose store the job waits that its desk does not have.
    async fn beside_others(state: State) -> (Loop, mpsc::Receiver<()>, Arc<TestEnv>, JobId) {
        let (env, limits, id) = (TestEnv::new(), Limits::default(), JobId::from_raw(10));
        let store = MemStore::default();
        let job = Job {
            id,
            org: alloy_shared::id::DEFAULT_ORG,
            version: 1,
            state,
            spec: Arc::default(),
            source: None,
            created_at: Ms(0),
            created_by: "me".into(),
            events: 0,
        };
        let insert = InsertJob { job, key: None, attempt: None, events: Vec::new() };
        let done = store.commit(&[Group(vec![Write::InsertJob(Box::new(insert))])]).await.unwrap();
        assert!(done.groups[0].is_ok());
        let (speak, spoken) = mpsc::channel(1);
        let beside = Loop {
            desk: Desk::new(limits.clone(), Mono(0)).shared(),
            store: Arc::new(store),
            hub: Arc::new(Hub::new(limits, Mono(0))),
            wake: Arc::default(),
            env: env.clone(),
            rx: mpsc::channel(1).1,
            waiting: HashMap::new(),
            speak: Some(speak),
            unreadable: BTreeMap::new(),
        };
        (beside, spoken, env, id)
    }

    #[tokio::test]
    async fn others_are_told_of_a_change_that_was_found_in_the_store() {
        let tries = Tries { made: 0, lost: 0, failed: 0 };
        for (step, told) in [
            (Step::Queued { since: Ms(0), avoid: Vec::new() }, true),
            (Step::Done { end: End::success(), at: Ms(0) }, false),
        ] {
            let (mut beside, mut spoken, _, id) = beside_others(State { tries, step }).await;
            beside.reload(id, None).await;
            assert_eq!(spoken.try_recv().is_ok(), told);
        }
    }

    #[tokio::test]
    async fn a_job_that_could_not_be_read_is_read_again_when_it_is_time() {
        let step = Step::Queued { since: Ms(0), avoid: Vec::new() };
        let state = State { tries: Tries { made: 0, lost: 0, failed: 0 }, step };
        let (mut beside, _spoken, env, id) = beside_others(state).await;
        beside.unreadable.insert(id, (Mono(UNREADABLE_MS), None));
        for (ms, known) in [(UNREADABLE_MS - 1, 0), (1, 1)] {
            env.advance(ms);
            beside.read_again().await;
            assert_eq!((beside.desk.live_count(), beside.unreadable.len()), (known, 1 - known));
        }
    }

    #[test]
    fn others_are_told_of_what_they_may_have_to_do_something_about() {
        let state = |step| State { tries: Tries { made: 1, lost: 0, failed: 0 }, step };
        let worker = WorkerId::from_raw(1);
        let lease = Lease { attempt: 1, worker, assigned_at: Ms(0), avoid: Vec::new() };
        for (step, unheard, heard) in [
            (Step::Queued { since: Ms(0), avoid: vec![worker] }, true, true),
            (Step::Assigned { lease }, true, false),
            (Step::Done { end: End::success(), at: Ms(0) }, false, false),
        ] {
            let state = state(step);
            assert_eq!([false, true].map(|by| concerns_others(&state, by)), [unheard, heard], "{state:?}");
        }
    }
}
