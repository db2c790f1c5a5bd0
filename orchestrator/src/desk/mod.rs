//! D: every live job and every free slot, and the order in which things are decided.
//!
//! `decide` takes what was asked since the last commit, changes its own picture at once and returns the groups of writes
//! that make it true; `committed` takes what the store did with them and returns the answers and effects. Between the two
//! nothing may be answered: an answer follows the commit. There are never two commits in flight.

mod asked;
mod books;
mod due;
mod ended;
mod rooms;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use alloy_shared::env::{Mono, Ms, Now};
use alloy_shared::id::{AttemptRef, JobId, Labels, WorkerId};
use alloy_shared::limits::{self, Limits};
use alloy_shared::wire::job::{Reason, SubmitJob};

use crate::admit::admit;
use crate::job::{self, Event, Refused, Rules, Step};
use crate::pick::{self, Waiting};
use crate::store::write::{CloseAttempt, IdempotencyKey, InsertJob};
use crate::store::{Attempt, Committed, Group, Guard, Job, Miss, StoreError, Write};
pub use asked::{Answer, By, Effect, From, News, Offer, Request, Ticket};
use due::Due;
use ended::Ended;
use rooms::Away;

/// A job in memory with all that decides about it.
#[derive(Debug, Clone)]
struct Live {
    job: Job,
    attempt: Option<Attempt>,
    rules: Rules,
    required: Labels,
    /// It was found in the store: those who could take it, or who have it, may not have had the time to come.
    found: bool,
    due: Option<Due>,
}

/// A group that waits for its commit.
enum Draft {
    Insert { ticket: Ticket, insert: Box<InsertJob> },
    Advance { ticket: Option<Ticket>, advance: Box<crate::store::write::Advance>, left: Option<WorkerId> },
    Close { ticket: Ticket, close: CloseAttempt },
}

pub struct Desk {
    limits: Limits,
    /// Jobs that were leased or waited before the start are not overdue before this: workers had no time to come back.
    patient_until: Mono,
    /// Before this nobody may say that there is no such worker: at the start, and when the books were away, those who would be
    /// one had no time to come back.
    expecting_until: Mono,
    live: BTreeMap<JobId, Live>,
    /// Waiting jobs, oldest first.
    queue: BTreeSet<(Ms, JobId)>,
    deadlines: BTreeSet<(Mono, JobId)>,
    leased: BTreeMap<WorkerId, BTreeSet<AttemptRef>>,
    offers: BTreeMap<WorkerId, Offer>,
    /// Workers whose connection is gone without a goodbye.
    away: BTreeMap<WorkerId, Away>,
    /// Offers to other orchestrators.
    elsewhere: BTreeMap<WorkerId, Offer>,
    /// There may be other orchestrators.
    shared: bool,
    /// Kept where there may be others.
    ended: Ended,
    /// What workers said lately may not have been heard before this: what they were to say is not overdue.
    deaf_until: Mono,
    /// When it was last asked to decide.
    decided: Mono,
    /// What is to be told although nothing was written for it.
    news: Vec<Effect>,
    /// Jobs that no worker gets.
    asleep: BTreeSet<JobId>,
    drafts: Vec<Draft>,
    /// Position among the drafts of jobs that are being inserted.
    fresh: BTreeMap<JobId, usize>,
    /// Deadlines of the jobs that the drafts change, as they were before: they hold again if the commit misses.
    before: BTreeMap<JobId, Due>,
    /// Answers that need no write of their own, and the job whose picture they rest on.
    answers: Vec<(Ticket, Option<JobId>, Answer)>,
}

impl Desk {
    pub fn new(limits: Limits, started: Mono) -> Self {
        Self {
            patient_until: started + limits.startup_grace_ms,
            expecting_until: started + limits.startup_grace_ms,
            limits,
            live: BTreeMap::new(),
            queue: BTreeSet::new(),
            deadlines: BTreeSet::new(),
            leased: BTreeMap::new(),
            offers: BTreeMap::new(),
            away: BTreeMap::new(),
            elsewhere: BTreeMap::new(),
            shared: false,
            ended: Ended::default(),
            deaf_until: started,
            decided: started,
            news: Vec::new(),
            asleep: BTreeSet::new(),
            drafts: Vec::new(),
            fresh: BTreeMap::new(),
            before: BTreeMap::new(),
            answers: Vec::new(),
        }
    }

    /// The same as one of several orchestrators.
    pub fn shared(self) -> Self {
        Self { shared: true, ..self }
    }

    /// When something is due although nobody asks.
    pub fn next_wake(&self) -> Option<Mono> {
        let due = self.deadlines.first().map(|(at, _)| (*at).max(self.deaf_until));
        due.into_iter().chain(self.away.values().map(|away| away.until)).min()
    }

    pub fn live_count(&self) -> usize {
        self.live.len()
    }

    /// Takes the truth from the store, at the start and after a miss.
    pub fn restore(&mut self, jobs: Vec<(Job, Option<Attempt>)>, now: Now) {
        for (job, attempt) in jobs {
            self.take_over(job, attempt, false, now);
        }
    }

    /// `learned`: another orchestrator has it from its clients, and began its term by a clock of its own.
    fn take_over(&mut self, job: Job, attempt: Option<Attempt>, learned: bool, now: Now) {
        let known = self.before.remove(&job.id);
        let due = known.or(self.remove(&job.id).and_then(|live| live.due));
        if job.state.is_done() {
            return self.ends(job.id);
        }
        // With nobody connected yet who could take it, each worker that comes may be the one that has not lost it.
        let untried = !self.offers.values().any(|offer| offer.org == job.org);
        let rules = Rules { untried, ..Rules::of(&job.spec, &self.limits) };
        let required = alloy_shared::wire::job::required_labels(&job.spec).unwrap_or_default();
        let term = job.state.term(&rules).filter(|_| learned && matches!(job.state.step, Step::Queued { .. }));
        let due = match term {
            Some(term) => due.filter(|due| due.is_of(term)).or(Some(Due::whole(term, now.mono))),
            None => due,
        };
        self.put(Live { job, attempt, rules, required, found: due.is_none(), due }, now);
    }

    pub fn decide(&mut self, requests: Vec<Request>, now: Now) -> Vec<Group> {
        self.before.clear();
        self.decided = now.mono;
        for request in requests {
            self.take(request, now);
        }
        self.away.retain(|_, away| now.mono < away.until);
        self.due(now);
        self.refuse(now);
        self.place(now);
        self.drafts.iter().map(Draft::group).collect()
    }

    fn take(&mut self, request: Request, now: Now) {
        match request {
            Request::Submit { ticket, id, by, body, key } => self.submit(ticket, id, by, &body, key, now),
            Request::Cancel { ticket, job, reason } => {
                self.change(Some(ticket), job, &Event::CancelAsked { reason }, Guard::Version, None, now);
            }
            Request::Report { ticket, from, seq, event, news } => self.report(ticket, from, seq, &event, *news, now),
            Request::NotHeld { ticket, from, reason, message } => {
                let event = Event::Lost { attempt: from.at.attempt, reason, message };
                self.change(Some(ticket), from.at.job, &event, fence(from), None, now);
            }
            Request::Close { ticket, close } => self.drafts.push(Draft::Close { ticket, close }),
            Request::Offer(offer) => {
                self.away.remove(&offer.worker);
                self.offers.insert(offer.worker, offer);
            }
            Request::Gone { worker, left } => self.gone(worker, left, now),
            Request::Silent(worker) => self.silent(worker, None, now),
            Request::Unseen(worker, since) => self.silent(worker, Some(since), now),
            Request::Loaded(jobs) => self.loaded(jobs, now),
            Request::Elsewhere(offers) => {
                self.elsewhere = offers.into_iter().map(|offer| (offer.worker, offer)).collect();
                self.away.retain(|id, _| !self.elsewhere.contains_key(id));
            }
            Request::Expect { for_ms } => self.expect(now.mono + for_ms),
            Request::Holders { ticket } => {
                let holders = self.leased.iter().filter(|(_, held)| !held.is_empty()).map(|(id, _)| *id).collect();
                self.answers.push((ticket, None, Answer::Holders(holders)));
            }
            Request::Asleep { ticket, jobs } => {
                self.asleep = jobs;
                self.answers.push((ticket, None, Answer::Done));
            }
            Request::Why { ticket, job } => {
                let why = self.why_not(&job);
                self.answers.push((ticket, Some(job), Answer::Why(why)));
            }
        }
    }

    fn submit(&mut self, ticket: Ticket, id: JobId, by: By, body: &SubmitJob, key: Option<IdempotencyKey>, now: Now) {
        let required = match admit(&body.spec, &self.limits) {
            Ok(required) => required,
            Err(faults) => return self.answers.push((ticket, None, Answer::Rejected(faults))),
        };
        if self.live.len() >= limits::LIVE_JOBS_MAX {
            return self.answers.push((ticket, None, Answer::Full));
        }
        let job = Job {
            id,
            org: by.org,
            version: 1,
            state: job::State::new(now.wall),
            spec: Arc::new(body.spec.clone()),
            source: body.source,
            created_at: now.wall,
            created_by: by.caller,
            events: 1,
        };
        let events = vec![books::submitted(&job, now.wall)];
        let rules = Rules::of(&job.spec, &self.limits);
        self.fresh.insert(id, self.drafts.len());
        let insert = Box::new(InsertJob { job: job.clone(), key, attempt: None, events });
        self.drafts.push(Draft::Insert { ticket, insert });
        self.put(Live { job, attempt: None, rules, required, found: false, due: None }, now);
    }

    fn report(&mut self, ticket: Ticket, from: From, seq: u64, event: &Event, mut news: News, now: Now) {
        if let (Some(heard), Some(collect_ms)) = (news.heard, &mut news.timings.collect_ms) {
            *collect_ms = collect_ms.saturating_add(now.mono.since(heard));
        }
        let Some(live) = self.live.get(&from.at.job) else {
            return self.answers.push((ticket, None, Answer::NotLive));
        };
        let current = live.attempt.as_ref().filter(|attempt| attempt.at == from.at && attempt.worker == from.worker);
        let answer = match current {
            None => Some(Answer::Refused(Refused::Stale)),
            Some(attempt) if seq <= attempt.seq => Some(Answer::Applied),
            Some(attempt) if seq > attempt.seq + 1 => Some(Answer::Gap { have: attempt.seq }),
            Some(_) => None,
        };
        match answer {
            Some(answer) => self.answers.push((ticket, Some(from.at.job), answer)),
            None => self.change(Some(ticket), from.at.job, event, fence(from), Some((seq, news)), now),
        }
    }

    /// The one way from an event to a draft.
    fn change(
        &mut self,
        ticket: Option<Ticket>,
        id: JobId,
        event: &Event,
        guard: Guard,
        report: Option<(u64, News)>,
        now: Now,
    ) {
        let Some(live) = self.live.get(&id) else {
            if let Some(ticket) = ticket {
                self.answers.push((ticket, None, Answer::NotLive));
            }
            return;
        };
        let state = match job::apply(&live.job.state, event, now.wall, &self.rules(live, now)) {
            Ok(state) => state,
            // Numbered news that changes no state is still written: its number must be remembered.
            Err(Refused::Already | Refused::Impossible) if report.is_some() => live.job.state.clone(),
            Err(refused) => {
                if let Some(ticket) = ticket {
                    self.answers.push((ticket, Some(id), Answer::Refused(refused)));
                }
                return;
            }
        };
        let mut next = live.clone();
        if let Some(due) = next.due {
            self.before.entry(id).or_insert(due);
        }
        let change = books::enter(&mut next, state, event, report, now.wall);
        let left = live.job.state.lease().map(|lease| lease.worker).filter(|_| next.job.state.lease().is_none());
        self.draft(ticket, guard, &mut next, change, left);
        self.put(next, now);
    }

    fn draft(
        &mut self,
        ticket: Option<Ticket>,
        guard: Guard,
        next: &mut Live,
        change: books::Change,
        left: Option<WorkerId>,
    ) {
        // A job that is not in the store yet changes in its insert: it is born assigned.
        if let Some(Draft::Insert { insert, .. }) = self.fresh.get(&next.job.id).and_then(|at| self.drafts.get_mut(*at))
            && ticket.is_none()
        {
            insert.events.extend(change.events);
            insert.attempt = next.attempt.clone();
            next.job.version = insert.job.version;
            insert.job = next.job.clone();
            return;
        }
        let advance = crate::store::write::Advance {
            next: next.job.clone(),
            guard,
            attempt: next.attempt.clone().filter(|_| change.attempt),
            events: change.events,
            artifacts: change.artifacts,
        };
        self.drafts.push(Draft::Advance { ticket, advance: Box::new(advance), left });
    }

    /// Takes over what other orchestrators decided. What is known already is no news.
    fn loaded(&mut self, jobs: Vec<(Job, Option<Attempt>)>, now: Now) {
        for (job, attempt) in jobs {
            let known = self.live.get(&job.id);
            if known.is_some_and(|live| live.job.version >= job.version) || self.ended.has(&job.id) {
                continue;
            }
            let holder = |job: &Job| job.state.lease().map(|lease| lease.worker);
            let left = known.and_then(|live| holder(&live.job)).filter(|had| holder(&job) != Some(*had));
            self.news.push(Effect::Learned { job: Box::new(job.clone()), left });
            self.take_over(job, attempt, true, now);
        }
    }

    fn ends(&mut self, id: JobId) {
        if self.shared {
            self.ended.note(id);
        }
    }

    fn silent(&mut self, worker: WorkerId, unseen_since: Option<Ms>, now: Now) {
        self.offers.remove(&worker);
        self.away.remove(&worker);
        let held: Vec<AttemptRef> = self.leased.get(&worker).into_iter().flatten().copied().collect();
        for at in held {
            let seconds = self.limits.expiry_ms / 1000;
            let message = format!("the worker was not heard for {seconds} s, longer than its lease on the job lasts");
            let event = Event::Lost { attempt: at.attempt, reason: Reason::WorkerLost, message };
            self.change(None, at.job, &event, Guard::Silent { worker, unseen_since }, None, now);
        }
    }

    fn due(&mut self, now: Now) {
        if now.mono < self.deaf_until {
            return;
        }
        let due: Vec<JobId> = self
            .deadlines
            .iter()
            .take_while(|(at, _)| *at <= now.mono)
            .take(limits::COMMIT_GROUPS_MAX)
            .map(|(_, id)| *id)
            .collect();
        for id in due {
            let why = self.why_not(&id).map(|why| why.late()).unwrap_or_default();
            self.change(None, id, &Event::DeadlinePassed { why }, Guard::Version, None, now);
        }
    }

    fn place(&mut self, now: Now) {
        if self.queue.is_empty() || self.offers.is_empty() {
            return;
        }
        let mut rooms = self.rooms_expected();
        let awake = self.queue.iter().filter(|(_, id)| !self.asleep.contains(id));
        let waiting = awake.filter_map(|(_, id)| self.live.get(id)).map(|live| Waiting {
            id: live.job.id,
            org: live.job.org,
            required: &live.required,
            image: rooms::image_of(live),
            avoid: match &live.job.state.step {
                Step::Queued { avoid, .. } => avoid,
                Step::Assigned { .. } | Step::Running { .. } | Step::Canceling { .. } | Step::Done { .. } => &[],
            },
        });
        for (id, worker) in pick::pick(waiting, &mut rooms) {
            self.change(None, id, &Event::Assigned { worker }, Guard::Version, None, now);
        }
    }

    /// Takes what the store did and returns what follows. An error means that nothing was written; `repeated`, that an
    /// earlier try of the same commit may have been.
    pub fn committed(&mut self, done: Result<Committed, StoreError>, repeated: bool, now: Mono) -> Vec<Effect> {
        if done.is_err() || now.since(self.decided) >= self.limits.accept_ms {
            // What workers had to say meanwhile waits behind it.
            self.deaf_until = now + self.limits.accept_ms;
        }
        let drafts = std::mem::take(&mut self.drafts);
        let answers = std::mem::take(&mut self.answers);
        self.fresh.clear();
        let mut effects = std::mem::take(&mut self.news);
        effects.reserve(drafts.len() * 2 + answers.len());
        let mut suspect = BTreeMap::new();
        let failed = done.is_err();
        let results: Vec<Result<(), Missed>> = match done {
            Ok(done) => done.groups.into_iter().map(|group| group.map(|_| ()).map_err(Missed::Group)).collect(),
            Err(error) => drafts.iter().map(|_| Err(Missed::All(error.clone()))).collect(),
        };
        for (draft, result) in drafts.into_iter().zip(results) {
            match result {
                Ok(()) => self.done(draft, &mut effects),
                Err(missed) if repeated && missed.is_own(&draft) => {
                    suspect.extend(draft.job().map(|id| (id, None)));
                    self.done(draft, &mut effects);
                }
                Err(missed) => self.missed(draft, missed, &mut suspect, &mut effects),
            }
        }
        for (ticket, job, answer) in answers {
            let unsound = failed || job.is_some_and(|id| suspect.contains_key(&id));
            effects.push(Effect::Answer { ticket, answer: if unsound { Answer::Stale } else { answer } });
        }
        effects.extend(suspect.into_iter().map(|(job, left)| Effect::Reload { job, left }));
        effects
    }

    fn done(&mut self, draft: Draft, effects: &mut Vec<Effect>) {
        match draft {
            Draft::Insert { ticket, insert } => {
                effects.push(Effect::Moved { job: Box::new(insert.job.clone()), left: None });
                effects.push(Effect::Answer { ticket, answer: Answer::Job(Box::new(insert.job)) });
            }
            Draft::Advance { ticket, advance, left } => {
                let job = Box::new(advance.next);
                if job.state.is_done() {
                    self.remove(&job.id);
                    self.ends(job.id);
                }
                // Sessions hear of the change before the answer to what caused it: they decide nothing more on the old state.
                let answer = ticket.map(|ticket| Effect::Answer { ticket, answer: Answer::Job(job.clone()) });
                effects.push(Effect::Moved { job, left });
                effects.extend(answer);
            }
            Draft::Close { ticket, .. } => effects.push(Effect::Answer { ticket, answer: Answer::Done }),
        }
    }

    fn missed(
        &mut self,
        draft: Draft,
        missed: Missed,
        suspect: &mut BTreeMap<JobId, Option<WorkerId>>,
        effects: &mut Vec<Effect>,
    ) {
        let answer = match missed {
            Missed::All(error) => Answer::Failed(error),
            Missed::Group(Miss::Stale) => Answer::Stale,
            Missed::Group(Miss::Exists { job, body }) => Answer::Exists { job, body },
            Missed::Group(Miss::Corrupt(why)) => Answer::Failed(StoreError::Unavailable(why)),
        };
        let (job, ticket) = match draft {
            Draft::Insert { ticket, insert } => {
                // It is in no store: there is nothing to load, and its slot is free again.
                self.remove(&insert.job.id);
                (None, Some(ticket))
            }
            Draft::Advance { ticket, advance, left } => (Some((advance.next.id, left)), ticket),
            Draft::Close { ticket, .. } => (None, Some(ticket)),
        };
        if let Some((id, left)) = job {
            self.remove(&id);
            // The first of its changes took it from whoever had it.
            let known = suspect.entry(id).or_default();
            *known = known.or(left);
        }
        if let Some(ticket) = ticket {
            effects.push(Effect::Answer { ticket, answer });
        }
    }

    fn put(&mut self, mut live: Live, now: Now) {
        let id = live.job.id;
        self.remove(&id);
        let holder = live.job.state.lease().map(|lease| lease.worker);
        let foreign = self.shared && holder.is_some_and(|worker| !self.offers.contains_key(&worker));
        // Whoever has the worker decides first, and knows first.
        let patience = if foreign { 2 * self.limits.expiry_ms } else { 0 };
        live.due = Due::of(&live, self.patient_until, patience, now);
        if let Some(due) = live.due {
            self.deadlines.insert((due.at, id));
        }
        if matches!(live.job.state.step, Step::Queued { .. }) {
            self.queue.insert((live.job.created_at, id));
        }
        if let Some(lease) = live.job.state.lease() {
            self.leased.entry(lease.worker).or_default().insert(live.job.attempt());
        }
        self.live.insert(id, live);
    }

    fn remove(&mut self, id: &JobId) -> Option<Live> {
        let live = self.live.remove(id)?;
        if let Some(due) = live.due {
            self.deadlines.remove(&(due.at, *id));
        }
        self.queue.remove(&(live.job.created_at, *id));
        if let Some(lease) = live.job.state.lease()
            && let Some(held) = self.leased.get_mut(&lease.worker)
        {
            held.remove(&live.job.attempt());
        }
        Some(live)
    }
}

enum Missed {
    All(StoreError),
    Group(Miss),
}

impl Missed {
    /// True when an insert met the job that its own first try had inserted.
    fn is_own(&self, draft: &Draft) -> bool {
        match (self, draft) {
            (Self::Group(Miss::Stale), Draft::Insert { .. }) => true,
            (Self::Group(Miss::Exists { job, .. }), Draft::Insert { insert, .. }) => *job == insert.job.id,
            (Self::All(_) | Self::Group(_), _) => false,
        }
    }
}

impl Draft {
    fn job(&self) -> Option<JobId> {
        match self {
            Self::Insert { insert, .. } => Some(insert.job.id),
            Self::Advance { advance, .. } => Some(advance.next.id),
            Self::Close { .. } => None,
        }
    }

    fn group(&self) -> Group {
        Group(vec![match self {
            Self::Insert { insert, .. } => Write::InsertJob(insert.clone()),
            Self::Advance { advance, .. } => Write::Advance(advance.clone()),
            Self::Close { close, .. } => Write::CloseAttempt(close.clone()),
        }])
    }
}

fn fence(from: From) -> Guard {
    Guard::Fence { attempt: from.at.attempt, worker: from.worker, epoch: from.epoch }
}

#[cfg(test)]
mod tests;
