//! S: how the host of a farm leaves it: whom it waits for, what it says meanwhile, and what a person's Ctrl-C means then.
//!
//! The farm of `alloy run --local` waits for the jobs of other commands: the first Ctrl-C says whose they are, the second
//! cancels them, the third stops at once. The farm of `alloy up` lets end what runs and leaves the queue as it is; the second
//! Ctrl-C stops at once.

use std::collections::{BTreeMap, BTreeSet};

use alloy_shared::client::{ClientError, JobQuery};
use alloy_shared::env::Mono;
use alloy_shared::id::JobId;
use alloy_shared::limits::PAGE_MAX;
use alloy_shared::wire::job::{JobView, Reason, StateWord};
use orchestrator::ops;

use super::host::Host;
use super::lease::Alive;
use crate::commands::jobs::command;
use crate::context::App;
use crate::output::{Failure, plural};
use crate::signals::{Signals, Told};

const JOBS_LOOK_MS: u64 = 100;
/// A wait that is over this soon is not worth a line.
const QUIET_MS: u64 = 1_000;
/// Jobs that were canceled have ended by now, and their commands have heard it.
const CANCELED_MS: u64 = 30_000;
const LIVE: [StateWord; 4] = [StateWord::Queued, StateWord::Assigned, StateWord::Running, StateWord::Canceling];
/// Jobs that are named in one sentence.
const NAMED: usize = 3;

/// What is still in the farm.
#[derive(Default)]
struct Left {
    jobs: Vec<JobView>,
    living: Vec<Alive>,
}

impl Host {
    /// A farm for the length of a command runs what somebody waits for. Jobs that `alloy up` left in the queue, or that it
    /// ran when it was killed, stay until it is started again.
    pub(super) async fn leave_asleep(&mut self, app: &App, living: &[Alive]) -> Result<(), Failure> {
        let mut jobs: BTreeSet<JobId> = BTreeSet::new();
        let mut cursor = None;
        loop {
            let page = self.live_jobs(cursor).await.map_err(|error| Failure::of(error, &self.farm.url))?;
            jobs.extend(page.0.iter().map(|job| job.id));
            cursor = page.1;
            if cursor.is_none() {
                break;
            }
        }
        for attended in self.jobs_of(living).await.keys() {
            jobs.remove(attended);
        }
        if jobs.is_empty() {
            return Ok(());
        }
        app.talk.warn(&asleep(jobs.len()));
        app.talk.hint("alloy up   runs them; alloy list --local   shows them");
        self.app.leave_asleep(jobs.clone()).await;
        self.asleep = jobs;
        Ok(())
    }

    /// The jobs of commands that live, and the processes of these commands.
    async fn jobs_of(&self, living: &[Alive]) -> BTreeMap<JobId, String> {
        let mut found = BTreeMap::new();
        let Some(who) = self.user().await else { return found };
        for alive in living {
            if let Ok(Some((job, _))) = self.app.store.keyed(&who.org, &who.caller, &alive.key).await {
                found.insert(job, alive.pid.clone());
            }
        }
        found
    }

    async fn live_jobs(&self, cursor: Option<String>) -> Result<(Vec<JobView>, Option<String>), ClientError> {
        let query = JobQuery { limit: Some(PAGE_MAX), cursor, state: LIVE.to_vec(), mine: false };
        let page = self.farm.client.jobs(&query).await?;
        Ok((page.jobs, page.next_cursor))
    }

    /// What cannot be asked is not waited for.
    async fn left(&self, app: &App) -> Left {
        let living = self.end_unwanted(app).await;
        let (mut jobs, _) = self.live_jobs(None).await.unwrap_or_default();
        jobs.retain(|job| !self.asleep.contains(&job.id));
        Left { jobs, living }
    }

    /// Waits for the jobs that still run here: others may have sent them. The end of the worker ends the wait. Once there is
    /// no job, none is taken any more, and only then does the last look count. False if the farm is to stop at once.
    pub(crate) async fn wait_for_jobs(&self, app: &App, signals: &mut Signals) -> bool {
        let (mut said, mut last_look, mut asked) = (None, false, false);
        let mut until: Option<Mono> = None;
        let quiet_until = app.env.now().mono + QUIET_MS;
        loop {
            let look = async {
                // A guest may still fetch what came of its job, or be about to submit one.
                let left = self.left(app).await;
                let any = !left.living.is_empty() || !left.jobs.is_empty();
                if last_look && any {
                    self.app.take_jobs_again();
                }
                if any {
                    app.env.sleep_until(app.env.now().mono + JOBS_LOOK_MS).await;
                }
                left
            };
            let looked = tokio::select! {
                biased;
                told = signals.next() => Err(told),
                left = look => Ok(left),
            };
            let Left { jobs, living } = match looked {
                Ok(left) => left,
                Err(told) => {
                    if std::mem::take(&mut last_look) {
                        self.app.take_jobs_again();
                    }
                    match self.told(app, told, &mut asked, signals).await {
                        Wait::On => {}
                        Wait::ForCancels => until = Some(app.env.now().mono + CANCELED_MS),
                        Wait::NoMore => return false,
                    }
                    continue;
                }
            };
            if until.is_some_and(|until| app.env.now().mono >= until) {
                return false;
            }
            if jobs.is_empty() && living.is_empty() {
                if last_look {
                    return true;
                }
                // Nobody has a job here at this moment: a wish to stop needs no question.
                last_look = tokio::select! {
                    biased;
                    _ = signals.next() => return false,
                    () = self.app.take_no_more_jobs() => true,
                };
                continue;
            }
            last_look = false;
            if self.worker.as_ref().is_some_and(|local| local.ended().is_some()) {
                return false;
            }
            if app.env.now().mono < quiet_until {
                continue;
            }
            tell_wait(app, &jobs, &mut said);
        }
    }

    /// What a wish to stop means while others have jobs here.
    async fn told(&self, app: &App, told: Told, asked: &mut bool, signals: &mut Signals) -> Wait {
        let left = self.left(app).await;
        let jobs: Vec<JobView> = left.jobs.into_iter().filter(|job| job.state != StateWord::Canceling).collect();
        if jobs.is_empty() {
            return Wait::NoMore;
        }
        if told == Told::Interrupt && !std::mem::replace(asked, true) {
            let owners = self.jobs_of(&left.living).await;
            for job in &jobs {
                let whose =
                    owners.get(&job.id).map_or("nobody waits for it".to_owned(), |pid| format!("of process {pid}"));
                app.talk.say(&format!("{} ({}): `{}`, {whose}", job.id, job.state, command(&job.spec)));
            }
            app.talk.say("This process is their farm: waiting.  (Ctrl-C again cancels what others have here)");
            return Wait::On;
        }
        app.talk.say(&format!(
            "Canceling {} of others: {}…  (Ctrl-C stops at once)",
            plural(jobs.len() as u64, "job"),
            named(&jobs)
        ));
        let Some(who) = self.user().await else { return Wait::NoMore };
        let cancel = async {
            for job in jobs {
                // One that ended in the meantime needs no cancel; any other is still there at the next look.
                let _ = ops::job::cancel_for(&self.app, &who, job.id, Reason::UserCanceled).await;
            }
        };
        tokio::select! {
            biased;
            _ = signals.next() => Wait::NoMore,
            () = cancel => Wait::ForCancels,
        }
    }

    /// Lets the jobs end that run here; the others stay in the queue. False if a second wish to stop came.
    pub(super) async fn drain(&self, app: &App, signals: &mut Signals) -> bool {
        let Some(local) = &self.worker else { return true };
        tokio::select! {
            biased;
            _ = signals.next() => return stop_at_once(app),
            () = self.app.take_no_more_jobs() => {}
        }
        local.life.soft.cancel();
        let (jobs, _) = self.live_jobs(None).await.unwrap_or_default();
        let (waiting, running): (Vec<JobView>, Vec<JobView>) =
            jobs.into_iter().partition(|job| job.state == StateWord::Queued);
        let (here, elsewhere): (Vec<JobView>, Vec<JobView>) =
            running.into_iter().partition(|job| job.worker == Some(local.id));
        tell_drain(app, &waiting, &here, &elsewhere);
        let ended = async {
            loop {
                app.env.sleep_until(app.env.now().mono + JOBS_LOOK_MS).await;
                let living = self.end_unwanted(app).await;
                if local.ended().is_some() && !self.are_reading(&living).await {
                    return;
                }
            }
        };
        tokio::select! {
            biased;
            _ = signals.next() => stop_at_once(app),
            () = ended => true,
        }
    }

    /// True while a command of this machine still fetches what came of its job.
    async fn are_reading(&self, living: &[Alive]) -> bool {
        for id in self.jobs_of(living).await.keys() {
            if self.farm.client.job(*id).await.is_ok_and(|job| job.state.is_terminal()) {
                return true;
            }
        }
        false
    }
}

/// Says what the host waits for when that changes: a number of jobs, or none and a command that still reads.
fn tell_wait(app: &App, jobs: &[JobView], said: &mut Option<usize>) {
    if said.replace(jobs.len()) == Some(jobs.len()) {
        return;
    }
    if jobs.is_empty() {
        return app
            .talk
            .say("another command still reads from the farm of this process: waiting for it  (Ctrl-C stops at once)");
    }
    app.talk.say(&still_here(jobs));
}

fn asleep(jobs: usize) -> String {
    let stay = if jobs == 1 { "stays" } else { "stay" };
    format!("{} that nobody waits for {stay} in the queue of this machine's farm", plural(jobs as u64, "job"))
}

fn still_here(jobs: &[JobView]) -> String {
    let (many, first) = (plural(jobs.len() as u64, "job"), named(jobs));
    let whose = if jobs.len() == 1 { "its end" } else { "their end" };
    format!("{many} still in the farm of this process ({first}): waiting for {whose}  (Ctrl-C says whose)")
}

fn end_first(jobs: &[JobView]) -> String {
    let (run, end) = if jobs.len() == 1 { ("runs", "ends") } else { ("run", "end") };
    format!("{} that {run} here {end} first ({})", plural(jobs.len() as u64, "job"), named(jobs))
}

fn stop_at_once(app: &App) -> bool {
    app.talk.say("Stopping at once.");
    false
}

/// How the host goes on after a wish to stop.
enum Wait {
    On,
    ForCancels,
    NoMore,
}

fn tell_drain(app: &App, waiting: &[JobView], here: &[JobView], elsewhere: &[JobView]) {
    let mut told = Vec::new();
    if !here.is_empty() {
        told.push(end_first(here));
    }
    if !waiting.is_empty() {
        told.push(format!("{} in the queue for the next start", plural(waiting.len() as u64, "job")));
    }
    if !elsewhere.is_empty() {
        let many = plural(elsewhere.len() as u64, "job");
        told.push(format!("{many} on other workers for 40 s without this farm, then again at the next start"));
    }
    let again = if here.is_empty() { "" } else { "  (Ctrl-C again stops at once; what runs then starts over)" };
    match told.as_slice() {
        [] => app.talk.say("Stopping."),
        told => app.talk.say(&format!("Stopping: {}.{again}", told.join("; "))),
    }
}

/// The first few.
fn named(jobs: &[JobView]) -> String {
    let mut ids: Vec<String> = jobs.iter().take(NAMED).map(|job| job.id.to_string()).collect();
    ids.extend((jobs.len() > NAMED).then(|| "…".to_owned()));
    ids.join(", ")
}

#[cfg(test)]
mod tests {
    use alloy_shared::wire::job::End;

    use super::*;

    #[test]
    fn one_job_is_one_and_two_are_two() {
        let job = crate::verdict::tests::ended(&End::success());
        let (id, jobs) = (job.id, [job.clone(), job]);
        assert_eq!(end_first(&jobs[..1]), format!("1 job that runs here ends first ({id})"));
        assert_eq!(end_first(&jobs), format!("2 jobs that run here end first ({id}, {id})"));
        assert!(still_here(&jobs[..1]).contains("waiting for its end") && still_here(&jobs).contains("for their end"));
        assert_eq!(asleep(1), "1 job that nobody waits for stays in the queue of this machine's farm");
        assert_eq!(asleep(2), "2 jobs that nobody waits for stay in the queue of this machine's farm");
    }
}
