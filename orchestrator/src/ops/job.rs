//! P: operations on jobs: submit, cancel, a worker's reports, and how a job is shown.

use std::collections::BTreeMap;
use std::sync::Arc;

use alloy_shared::env::{Mono, Ms};
use alloy_shared::id::{
    AttemptRef, Digest, ID_CHARS, ID_ENDING_MIN, JobId, Labels, OrgId, WorkerId, printable, shorten,
};
use alloy_shared::limits;
use alloy_shared::wire::farm::WorkerState;
use alloy_shared::wire::image::canonical;
use alloy_shared::wire::job::{End, JobView, Reason, SubmitJob, Timings, required_labels};
use alloy_shared::wire::session::{ArtifactReport, Report, ResultReport, fact};
use alloy_shared::wire::source::check_path;
use alloy_shared::wire::spec::check;
use alloy_shared::wire::{ErrorCode, path};
use tracing::{info, warn};

use super::OpError;
use super::upload::Depot;
use crate::App;
use crate::auth::Principal;
use crate::desk::{Answer, By, From, News, Request};
use crate::desk_loop::with_attempt;
use crate::job::{Event, Refused};
use crate::pick::wish;
use crate::session::io::Settled;
use crate::store::write::{CloseAttempt, IdempotencyKey};
use crate::store::{Artifact, Attempt, Job, Scope, StoreError};

pub struct Submitted {
    pub job: Job,
    /// False: the idempotency key was known and this is its job.
    pub created: bool,
}

pub async fn submit(app: &App, who: &Principal, body: SubmitJob, key: Option<String>) -> Result<Submitted, OpError> {
    // Taken before the look: whoever closes the door then waits for this one, or this one sees it closed.
    let _under_way = app.submits.token();
    let key = key.map(|key| idempotency_key(who, key, &body)).transpose()?;
    // First of all: what has become of the farm since must not refuse the retry of a submit that succeeded.
    if let Some(key) = &key
        && let Some((job, first)) = app.store.keyed(&key.org, &key.caller, &key.key).await?
    {
        return submitted_before(app, who, key, &job, &first).await;
    }
    if app.submits.is_closed() {
        return Err(OpError::refused(ErrorCode::Unavailable, "the farm is stopping and takes no new jobs"));
    }
    let len = serde_json::to_vec(&body.spec).map_or(0, |spec| spec.len());
    if len > limits::SPEC_MAX {
        let why = format!("the job's spec has {len} bytes, at most {} are taken", limits::SPEC_MAX);
        return Err(OpError::refused(ErrorCode::InvalidSpec, why).hint("put what is long into a file of the source"));
    }
    app.blobs.room()?;
    if let Some(digest) = body.source
        && !depot(app, who.org).freshen(&digest, app.env.now().wall).await?
    {
        let why = format!("source {digest} is not here, or its upload was not finished");
        return Err(OpError::refused(ErrorCode::SourceIncomplete, why).hint("upload the source, then submit again"));
    }
    somebody_qualifies(app, who, &body).await?;
    somebody_has_the_image(app, who, &body).await?;
    let id = app.desk.new_job(&*app.env);
    let by = By { org: who.org, caller: who.caller.to_string() };
    let (body, asked) = (Arc::new(body), key.clone());
    let answer = app.desk.ask(|ticket| Request::Submit { ticket, id, by, body, key: asked }).await;
    match (answer, key) {
        (Answer::Job(job), _) => {
            info!(job.id = %id, "job {id} submitted");
            Ok(Submitted { job: *job, created: true })
        }
        // Two at once: the other one was faster.
        (Answer::Exists { job, body }, Some(key)) => submitted_before(app, who, &key, &job, &body).await,
        (Answer::Rejected(errors), _) => Err(OpError::Refused {
            code: ErrorCode::InvalidSpec,
            message: errors
                .iter()
                .map(|fault| format!("{} {}", fault.field, fault.message))
                .collect::<Vec<_>>()
                .join("; "),
            hint: None,
            errors,
        }),
        (Answer::Full, _) => {
            let why = format!("the farm holds {} live jobs, as many as it takes", limits::LIVE_JOBS_MAX);
            Err(OpError::refused(ErrorCode::TooManyRequests, why).hint("try again when some have ended"))
        }
        (other, _) => Err(unavailable(&other)),
    }
}

/// The answer to a key that is known: its job, if `first`, the body that it came with, is this one's too.
async fn submitted_before(
    app: &App,
    who: &Principal,
    key: &IdempotencyKey,
    job: &JobId,
    first: &Digest,
) -> Result<Submitted, OpError> {
    if *first != key.body {
        let why = "this idempotency key was used for another request";
        return Err(OpError::refused(ErrorCode::IdempotencyMismatch, why).hint("use a new key for a new job"));
    }
    let job = app.store.job(&who.scope(), job).await?.ok_or_else(|| OpError::not_found("job"))?;
    Ok(Submitted { job, created: false })
}

fn depot(app: &App, org: OrgId) -> Depot<'_> {
    Depot { store: &*app.store, blobs: &app.blobs, env: &app.env, fresh_ms: app.keep.grace_ms, org }
}

/// Says that something of an attempt is no longer kept, if that is so.
pub async fn check_kept(
    app: &App,
    scope: &Scope,
    at: &AttemptRef,
    what: &str,
    gone_at: impl Fn(&Attempt) -> Option<Ms>,
) -> Result<(), OpError> {
    let gone = app.store.attempt(scope, at).await?.as_ref().and_then(gone_at);
    match gone {
        None => Ok(()),
        Some(gone_at) => {
            let day = gone_at.rfc3339();
            let what = format!("the {what} of attempt {}", at.attempt);
            let why = format!("{what}: no longer kept, removed on {}", day.get(..10).unwrap_or(&day));
            let hint = "an admin sees how long things are kept: alloy admin retention show";
            Err(OpError::refused(ErrorCode::Gone, why).hint(hint))
        }
    }
}

fn idempotency_key(who: &Principal, key: String, body: &SubmitJob) -> Result<IdempotencyKey, OpError> {
    let fine =
        (1..=limits::IDEMPOTENCY_KEY_MAX).contains(&key.len()) && key.bytes().all(|c| (0x21..=0x7e).contains(&c));
    if !fine {
        let why = "Idempotency-Key is 1 to 128 printable ASCII characters without spaces";
        return Err(OpError::refused(ErrorCode::InvalidParameter, why));
    }
    let text = serde_json::to_vec(body).unwrap_or_default();
    Ok(IdempotencyKey { org: who.org, caller: who.caller.to_string(), key, body: Digest::of(&text) })
}

/// A job whose labels no enrolled worker has would wait for ever: it is refused at once.
async fn somebody_qualifies(app: &App, who: &Principal, body: &SubmitJob) -> Result<(), OpError> {
    let Ok(required) = required_labels(&body.spec) else { return Ok(()) };
    if required.is_empty() {
        return Ok(());
    }
    let workers = app.store.workers(&who.scope()).await?;
    let fits = |own: &Labels, host: &Labels| {
        required.iter().all(|(key, value)| own.get(key).or_else(|| host.get(key)) == Some(value))
    };
    if workers.iter().any(|worker| !worker.revoked && fits(&worker.labels, &worker.host_labels)) {
        return Ok(());
    }
    if check(&body.spec).is_err() {
        // The desk names what is wrong with it, which is what has to change first.
        return Ok(());
    }
    let wanted: Vec<String> = required.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let wanted = wanted.join(", ");
    let why = format!("no worker of this farm has the labels {wanted}{}", wish(&wanted));
    Err(OpError::refused(ErrorCode::NoSuchWorker, why).hint("`alloy worker list` shows the labels there are"))
}

/// A job in an image that every enrolled worker says it cannot get would only come back: it is refused at once. A worker
/// that is away may be able to.
async fn somebody_has_the_image(app: &App, who: &Principal, body: &SubmitJob) -> Result<(), OpError> {
    let (Some(image), Ok(required)) = (&body.spec.image, required_labels(&body.spec)) else { return Ok(()) };
    let (name, now) = (canonical(image), app.env.now().mono);
    let mut why = None;
    for worker in app.store.workers(&who.scope()).await? {
        let fits = |(key, value)| worker.labels.get(key).or_else(|| worker.host_labels.get(key)) == Some(value);
        if worker.revoked || !required.iter().all(fits) {
            continue;
        }
        let Some(live) = app.hub.view(&worker.id, now).filter(|live| live.connected) else { return Ok(()) };
        let report = live.images.images.iter().find(|report| report.name == name);
        let failed = report.and_then(|report| report.failed.as_ref());
        if report.is_some_and(|report| report.digest.is_some()) {
            return Ok(());
        }
        let refused = failed.filter(|failed| failed.refused).map(|failed| failed.message.clone());
        let Some(message) = live.images.brings_none().or(refused) else { return Ok(()) };
        why = why.or(Some(format!("{}: {message}", worker.name)));
    }
    match why {
        Some(why) => {
            Err(OpError::refused(ErrorCode::NoSuchWorker, format!("no worker can get the image {image}: {why}"))
                .hint("`alloy image list` shows the images there are"))
        }
        // There is no worker yet.
        None => Ok(()),
    }
}

pub async fn cancel(app: &App, who: &Principal, id: JobId) -> Result<Job, OpError> {
    cancel_for(app, who, id, Reason::UserCanceled).await
}

/// Cancels a job for this reason.
pub async fn cancel_for(app: &App, who: &Principal, id: JobId, reason: Reason) -> Result<Job, OpError> {
    for _ in 0..3 {
        let job = app.store.job(&who.scope(), &id).await?.ok_or_else(|| OpError::not_found("job"))?;
        if job.state.is_done() {
            return already_done(job);
        }
        match app.desk.ask(|ticket| Request::Cancel { ticket, job: id, reason }).await {
            Answer::Job(job) => return Ok(*job),
            Answer::Refused(Refused::Already) => return Ok(job),
            Answer::NotLive => tell_the_desk(app, id).await?,
            Answer::Refused(_) | Answer::Stale => {}
            other => return Err(unavailable(&other)),
        }
    }
    Err(OpError::refused(ErrorCode::Unavailable, "the job kept changing; try again"))
}

/// Tells the desk of a job that another orchestrator has: by itself it learns of it at its next look.
async fn tell_the_desk(app: &App, id: JobId) -> Result<(), StoreError> {
    if app.shared.is_some()
        && let Some(job) = app.store.job(&Scope::farm(), &id).await?
    {
        app.desk.tell(Request::Loaded(vec![with_attempt(&*app.store, job).await?])).await;
    }
    Ok(())
}

fn already_done(job: Job) -> Result<Job, OpError> {
    use alloy_shared::wire::job::StateWord;
    match job.state.word() {
        StateWord::Canceled => Ok(job),
        word => Err(OpError::refused(ErrorCode::InvalidTransition, format!("the job has already ended: {word}"))),
    }
}

fn unavailable(answer: &Answer) -> OpError {
    let why = match answer {
        Answer::Failed(error) => return OpError::Store(error.clone()),
        other => format!("the desk answered {other:?}"),
    };
    warn!(why, "an operation did not come about");
    OpError::refused(ErrorCode::Unavailable, "the farm cannot decide that at the moment")
        .hint("try again in a few seconds")
}

/// Applies a worker's report, or says what it must send first.
pub async fn settle(app: &App, from: From, seq: u64, report: Report) -> Settled {
    let (event, news) = match check_report(app, from, report).await {
        Ok(checked) => checked,
        Err(settled) => return settled,
    };
    for _ in 0..3 {
        let (event, news) = (event.clone(), Box::new(news.clone()));
        match app.desk.ask(|ticket| Request::Report { ticket, from, seq, event, news }).await {
            Answer::Job(_) | Answer::Applied => return Settled::Applied,
            Answer::Gap { have } if app.shared.is_none() => return Settled::Gap { have },
            answer @ (Answer::Gap { .. } | Answer::Refused(_) | Answer::NotLive) => {
                match in_the_books(app, from, seq, &answer).await {
                    Ok(Some(settled)) => return settled,
                    Ok(None) => {}
                    Err(error) => {
                        warn!(attempt = %from.at, %error, "cannot read the attempt");
                        return Settled::Failed;
                    }
                }
            }
            // The picture was not true and has been loaded again: decide once more.
            Answer::Stale => {}
            Answer::Failed(error) => {
                warn!(attempt = %from.at, %error, "a report was not settled");
                return Settled::Failed;
            }
            Answer::Exists { .. }
            | Answer::Rejected(_)
            | Answer::Full
            | Answer::Done
            | Answer::Holders(_)
            | Answer::Why(_) => return Settled::Failed,
        }
    }
    Settled::Failed
}

/// What the books say where the desk did not follow. A report that they already hold is acknowledged again; one that comes too
/// early waits for those before it; any other is fenced. `None`: another orchestrator gave the job out, or wrote what the worker
/// said last, and the desk is told now.
async fn in_the_books(app: &App, from: From, seq: u64, answer: &Answer) -> Result<Option<Settled>, StoreError> {
    let attempt = app.store.attempt(&Scope::farm(), &from.at).await?.filter(|attempt| attempt.worker == from.worker);
    Ok(match (attempt, answer) {
        (Some(attempt), _) if attempt.seq >= seq => Some(Settled::Applied),
        (Some(attempt), _) if attempt.ended_at.is_some() => Some(Settled::Fenced),
        (Some(attempt), Answer::Gap { have }) if attempt.seq <= *have => Some(Settled::Gap { have: attempt.seq }),
        (Some(_), _) if app.shared.is_some() => {
            tell_the_desk(app, from.at.job).await?;
            None
        }
        (Some(_) | None, _) => Some(Settled::Fenced),
    })
}

async fn check_report(app: &App, from: From, report: Report) -> Result<(Event, News), Settled> {
    let attempt = from.at.attempt;
    match report {
        Report::Accepted => Ok((Event::Accepted { attempt }, News::default())),
        Report::Refused { message } => Ok((Event::Refused { attempt, message: shorten(message) }, News::default())),
        Report::Phase { phase, timings, message, facts } => {
            let facts = kept(facts);
            let news = News { timings, message: message.map(shorten), facts, ..News::default() };
            Ok((Event::Phase { attempt, phase }, news))
        }
        Report::Artifact(report) => {
            let artifact = check_artifact(app, from.at, report).await?;
            Ok((Event::Artifact { attempt }, News { artifact: Some(artifact), ..News::default() }))
        }
        Report::Result(report) => {
            let ResultReport { end, timings, log_len, facts, .. } = *report;
            let heard = app.env.now().mono;
            check_log(app, from.at, log_len).await?;
            let signal = end.signal.filter(|signal| (1..=64).contains(signal));
            let warnings = end.warnings.into_iter().take(limits::WARNINGS_MAX).map(shorten).collect();
            let end = End { message: shorten(end.message), signal, warnings, ..end };
            Ok((
                Event::Finished { attempt, end },
                News { timings, facts: kept(facts), heard: Some(heard), ..News::default() },
            ))
        }
    }
}

/// The facts that an attempt's record has room for.
fn kept(facts: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let known = facts.into_iter().filter(|(name, _)| fact::ALL.contains(&name.as_str()));
    known.map(|(name, value)| (name, shorten(value))).collect()
}

/// An artifact is listed only if its bytes are here and hash to what it says.
async fn check_artifact(app: &App, at: AttemptRef, report: ArtifactReport) -> Result<Artifact, Settled> {
    let read = async {
        let job = app.store.job(&Scope::farm(), &at.job).await?;
        let Some(job) = job else { return Ok(None) };
        let stored = depot(app, job.org).has_artifact(&report.sha256).await?;
        Ok::<_, OpError>(Some((job.org, stored)))
    };
    let (org, size) = match read.await {
        Ok(Some(found)) => found,
        Ok(None) => return Err(Settled::Fenced),
        Err(error) => {
            warn!(attempt = %at, %error, "cannot check an artifact");
            return Err(Settled::Failed);
        }
    };
    let stored = report.link.is_some() || size == Some(report.size);
    if !stored {
        let log_len = app.logs.len(&at).await.unwrap_or(0);
        return Err(Settled::Missing { log_len, artifacts: vec![report.sha256] });
    }
    let target = report.link.as_deref().unwrap_or("");
    if check_path(&report.path).is_err() || target.len() > limits::PATH_MAX || report.size > i64::MAX as u64 {
        warn!(attempt = %at, "a worker reported an artifact that cannot be: {}", printable(&report.path));
        return Err(Settled::Fenced);
    }
    Ok(Artifact {
        at,
        org,
        path: report.path,
        size: report.size,
        sha256: report.sha256,
        mode: if report.mode & 0o111 == 0 { 0o644 } else { 0o755 },
        link: report.link,
    })
}

/// A result stands only on a log that is whole and durable.
async fn check_log(app: &App, at: AttemptRef, log_len: u64) -> Result<(), Settled> {
    if log_len == 0 {
        return Ok(());
    }
    if !app.log_sync.flush().await {
        return Err(Settled::Failed);
    }
    // A log whose sync failed has fallen back to what is durable: the rest must come again.
    match app.logs.durable(&at).await {
        Ok(durable) if durable >= log_len => app.logs.keep(&at, log_len).await.map_err(|_| Settled::Failed),
        Ok(durable) => Err(Settled::Missing { log_len: durable, artifacts: Vec::new() }),
        Err(_) => Err(Settled::Failed),
    }
}

/// The worker does not have an attempt that the books say it has.
pub async fn not_held(app: &App, from: From, reason: Reason, message: String) {
    let answer = app.desk.ask(|ticket| Request::NotHeld { ticket, from, reason, message }).await;
    if let Answer::Failed(error) = answer {
        warn!(attempt = %from.at, %error, "a lost attempt was not settled; the next heartbeat tries again");
    }
}

/// Ends an attempt's books: its slot is free, its log is whole.
pub async fn close(app: &App, from: From, teardown_ms: u64, log_len: u64) {
    let close = CloseAttempt { at: from.at, worker: from.worker, teardown_ms, log_len };
    let until = app.env.now().mono + app.limits.late_tail_ms;
    let answer = loop {
        let close = close.clone();
        let answer = app.desk.ask(|ticket| Request::Close { ticket, close }).await;
        let now = app.env.now().mono;
        if !matches!(answer, Answer::Failed(_)) || app.shared.is_none() || now >= until {
            break answer;
        }
        app.env.sleep_until(now + app.limits.poll_floor_ms).await;
    };
    match answer {
        Answer::Done => {
            // A log that is shorter than its worker says stays open for the rest.
            let sealed = match app.logs.len(&from.at).await {
                Ok(len) if len >= log_len => app.logs.seal(&from.at).await.map(drop),
                Ok(_) => Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = sealed {
                warn!(attempt = %from.at, %error, "the log was not sealed");
            }
        }
        other => warn!(attempt = %from.at, ?other, "an attempt's books were not closed"),
    }
}

/// Finds a job by its id, or by at least six unique last characters of it.
pub async fn resolve(app: &App, scope: &Scope, text: &str) -> Result<Job, OpError> {
    let id = match text.parse::<JobId>() {
        Ok(id) => id,
        Err(_) => {
            let fine = (ID_ENDING_MIN..ID_CHARS).contains(&text.len())
                && text.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
            if !fine {
                let why = format!(
                    "`{}` is no job id: job_ and {ID_CHARS} characters, or at least its last {ID_ENDING_MIN}",
                    printable(text)
                );
                return Err(OpError::refused(ErrorCode::InvalidParameter, why));
            }
            match app.store.jobs_ending(scope, text).await?.as_slice() {
                [] => return Err(OpError::not_found("job")),
                [id] => *id,
                [..] => {
                    let why = format!("more than one job ends in `{text}`");
                    return Err(OpError::refused(ErrorCode::InvalidParameter, why).hint("give more characters"));
                }
            }
        }
    };
    app.store.job(scope, &id).await?.ok_or_else(|| OpError::not_found("job"))
}

/// Returns the job once it has ended, or as it is at `until`.
pub async fn wait_terminal(app: &App, scope: &Scope, id: JobId, until: Mono) -> Result<Job, OpError> {
    let mut listener = app.wake.job(id);
    loop {
        let job = app.store.job(scope, &id).await?.ok_or_else(|| OpError::not_found("job"))?;
        let now = app.env.now().mono;
        if job.state.is_done() || now >= until {
            return Ok(job);
        }
        let floor = app.limits.poll_floor_ms.min(until.since(now));
        while !listener.wait(&*app.env, floor).await {}
    }
}

pub async fn view(app: &App, job: &Job) -> Result<JobView, OpError> {
    let views = views(app, std::slice::from_ref(job)).await?;
    views.into_iter().next().ok_or_else(|| OpError::not_found("job"))
}

pub async fn views(app: &App, jobs: &[Job]) -> Result<Vec<JobView>, OpError> {
    let mut holders: BTreeMap<WorkerId, (String, WorkerState)> = BTreeMap::new();
    let mut out = Vec::with_capacity(jobs.len());
    for job in jobs {
        let scope = Scope::org(job.org);
        let attempt = match job.state.tries.made {
            0 => None,
            _ => app.store.attempt(&scope, &job.attempt()).await?,
        };
        let worker = attempt.as_ref().map(|attempt| attempt.worker);
        if let Some(id) = worker
            && !holders.contains_key(&id)
            && let Some(known) = app.store.worker(&scope, &id).await?
        {
            let state = super::workers::state_of_holder(app, &known);
            holders.insert(id, (known.name, state));
        }
        let why = match job.state.step {
            crate::job::Step::Queued { .. } => why(app, job.id).await,
            crate::job::Step::Assigned { .. }
            | crate::job::Step::Running { .. }
            | crate::job::Step::Canceling { .. }
            | crate::job::Step::Done { .. } => None,
        };
        let holder = worker.and_then(|id| holders.get(&id).cloned());
        out.push(show(job, attempt.as_ref(), holder, why, &app.base_url));
    }
    Ok(out)
}

async fn why(app: &App, job: JobId) -> Option<String> {
    match app.desk.ask(|ticket| Request::Why { ticket, job }).await {
        Answer::Why(why) => why.map(|why| why.sentence()),
        _ => None,
    }
}

fn show(
    job: &Job,
    attempt: Option<&Attempt>,
    holder: Option<(String, WorkerState)>,
    why: Option<String>,
    base: &str,
) -> JobView {
    let (worker_name, worker_state) = holder.unzip();
    let done = match &job.state.step {
        crate::job::Step::Done { end, at } => Some((end, *at)),
        crate::job::Step::Queued { .. }
        | crate::job::Step::Assigned { .. }
        | crate::job::Step::Running { .. }
        | crate::job::Step::Canceling { .. } => None,
    };
    let exit = done.map(|(end, _)| end.run_exit());
    let fact = |name: &str| attempt.and_then(|attempt| attempt.facts.get(name).cloned());
    JobView {
        id: job.id,
        org: job.org,
        state: job.state.word(),
        phase: job.state.phase(),
        spec: (*job.spec).clone(),
        source: job.source,
        attempt: job.state.tries.made,
        worker: attempt.map(|attempt| attempt.worker),
        worker_name,
        worker_state: worker_state.filter(|_| job.state.lease().is_some()),
        image: fact(fact::IMAGE),
        image_digest: fact(fact::IMAGE_DIGEST),
        vm_source: fact(fact::VM_SOURCE),
        lost: job.state.tries.lost,
        created_at: job.created_at.rfc3339(),
        finished_at: done.map(|(_, at)| at.rfc3339()),
        waiting_reason: why,
        outcome: done.map(|(end, _)| end.outcome()),
        reason: done.and_then(|(end, _)| end.reason),
        blame: done.and_then(|(end, _)| end.blame()),
        message: done.map(|(end, _)| end.message.clone()).filter(|text| !text.is_empty()),
        warnings: done.map(|(end, _)| end.warnings.clone()).unwrap_or_default(),
        exit_code: exit.map(|(code, _)| code),
        exit_origin: exit.map(|(_, origin)| origin),
        signal: done.and_then(|(end, _)| end.signal),
        timings: attempt.map_or_else(Timings::default, |attempt| attempt.timings.clone()),
        url: format!("{base}{}", path::job(job.id)),
    }
}
