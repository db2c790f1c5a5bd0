//! S: `alloy worker` and `alloy token`: who works for the farm and who may use it.

use std::collections::BTreeMap;

use alloy_shared::id::{Labels, TokenId, WorkerId};
use alloy_shared::wire::farm::{DrainRequest, InviteRequest, Role, TokenRequest, TokenView, WorkerState, WorkerView};

use crate::context::{App, Farm};
use crate::farm::Hosted;
use crate::job_arg::JobArg;
use crate::output::talk::Tone;
use crate::output::{Failure, Fault, ago, exit, plural, print, print_json, stdout_is_terminal, table};
use crate::signals::Signals;

/// Between two looks at a worker that drains.
const DRAIN_LOOK_MS: u64 = 1_000;

/// Add, list and drain workers
#[derive(Debug, clap::Subcommand)]
pub(crate) enum WorkerVerb {
    Invite(InviteArgs),
    #[cfg(feature = "farm")]
    Join(crate::farm::here::JoinArgs),
    #[cfg(feature = "farm")]
    Run(Box<crate::farm::here::RunArgs>),
    #[cfg(feature = "farm")]
    Doctor(Box<crate::farm::here::DoctorArgs>),
    #[cfg(feature = "farm")]
    Install(Box<crate::farm::here::InstallArgs>),
    /// Show the workers: state, slots, labels
    #[command(visible_alias = "ls")]
    List,
    Drain(DrainArgs),
    Resume(ResumeArgs),
    Rm(RmArgs),
}

/// Make an invitation: what to type on the new Mac
#[derive(Debug, clap::Args)]
pub(crate) struct InviteArgs {
    /// Label that the new worker will carry
    #[arg(short, long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// How long the invitation is good for
    #[arg(long, value_name = "TIME", value_parser = super::run::milliseconds)]
    ttl: Option<u64>,
}

/// Take a worker out of service: it finishes what it has and takes no more
#[derive(Debug, clap::Args)]
pub(crate) struct DrainArgs {
    /// Name, id, or at least 6 of the id's last characters
    worker: String,
    /// Why, for the others
    #[arg(long)]
    note: Option<String>,
    /// Return when its last job has ended
    #[arg(long)]
    wait: bool,
}

/// Put a worker back into service
#[derive(Debug, clap::Args)]
pub(crate) struct ResumeArgs {
    /// Name, id, or at least 6 of the id's last characters
    worker: String,
}

/// Take a worker out of the farm for ever; what it holds is tried elsewhere
#[derive(Debug, clap::Args)]
pub(crate) struct RmArgs {
    /// Name, id, or at least 6 of the id's last characters
    worker: String,
}

/// Make, list and revoke tokens
#[derive(Debug, clap::Subcommand)]
pub(crate) enum TokenVerb {
    Create(CreateArgs),
    /// Show the tokens, without the secret part
    #[command(visible_alias = "ls")]
    List,
    Revoke(RevokeArgs),
}

/// Make a token; it is printed once
#[derive(Debug, clap::Args)]
pub(crate) struct CreateArgs {
    /// Whose, or what it is for
    name: String,
    /// viewer, developer or admin
    #[arg(long, default_value = "developer", value_parser = role)]
    role: Role,
    /// For a CI system instead of a person
    #[arg(long)]
    ci: bool,
    /// How long it is good for: 90d, 12h; default: for ever
    #[arg(long, value_name = "TIME", value_parser = super::run::milliseconds)]
    ttl: Option<u64>,
}

/// Make a token void, at once and for ever
#[derive(Debug, clap::Args)]
pub(crate) struct RevokeArgs {
    /// Id, as `alloy token list` shows it
    id: TokenId,
}

pub(super) fn role(text: &str) -> Result<Role, String> {
    Role::parse(text).ok_or_else(|| "a role is viewer, developer or admin".to_owned())
}

pub(crate) async fn worker(app: &App, verb: &WorkerVerb) -> Result<i32, Failure> {
    match verb {
        WorkerVerb::Invite(args) => invite(app, Hosted::open_to_read(app).await?.farm(), args).await,
        #[cfg(feature = "farm")]
        WorkerVerb::Join(args) => crate::farm::here::join(app, args).await,
        #[cfg(feature = "farm")]
        WorkerVerb::Run(args) => crate::farm::here::run(app, args).await,
        #[cfg(feature = "farm")]
        WorkerVerb::Doctor(args) => crate::farm::here::doctor(app, args).await,
        #[cfg(feature = "farm")]
        WorkerVerb::Install(args) => crate::farm::here::install(args).await,
        WorkerVerb::List => list(app, Hosted::open_to_read(app).await?.farm()).await,
        WorkerVerb::Drain(args) => drain(app, Hosted::open_to_read(app).await?.farm(), args).await,
        WorkerVerb::Resume(args) => resume(app, Hosted::open_to_read(app).await?.farm(), args).await,
        WorkerVerb::Rm(args) => remove(app, Hosted::open_to_read(app).await?.farm(), args).await,
    }
}

async fn invite(app: &App, farm: &Farm, args: &InviteArgs) -> Result<i32, Failure> {
    let mut labels = Labels::default();
    for pair in &args.label {
        labels.insert_pair(pair).map_err(|error| Failure::usage(format!("--label: {error}")))?;
    }
    let labels: BTreeMap<String, String> =
        labels.iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let request = InviteRequest { labels, ttl_s: args.ttl.map(|ms| ms.div_ceil(1_000)) };
    let invite = farm.client.invite(&request).await.map_err(|error| Failure::of(error, &farm.url))?;
    if app.talk.json() {
        print_json(&invite)?;
        return Ok(exit::OK);
    }
    app.talk.say("Type this on the new Mac:");
    print(&format!("{}\n", crate::output::sanitize::one_line(&invite.command)))?;
    app.talk.hint(&format!("it enrols one worker and is good until {}", invite.expires_at));
    Ok(exit::OK)
}

async fn list(app: &App, farm: &Farm) -> Result<i32, Failure> {
    let list = farm.client.workers().await.map_err(|error| Failure::of(error, &farm.url))?;
    if app.talk.json() {
        print_json(&list)?;
        return Ok(exit::OK);
    }
    if list.workers.is_empty() {
        app.talk.say("No workers yet.");
        app.talk.hint("alloy worker invite   adds one");
    }
    let now = app.env.now().wall;
    let rows: Vec<Vec<String>> = list.workers.iter().map(|worker| worker_row(worker, now)).collect();
    let head = ["NAME", "STATE", "SLOTS", "LABELS", "VERSION", "SEEN", "ID"];
    print(&table(&head, &rows, stdout_is_terminal()))?;
    Ok(exit::OK)
}

fn worker_row(worker: &WorkerView, now: alloy_shared::env::Ms) -> Vec<String> {
    let icon = match worker.state {
        WorkerState::Ready => "○",
        WorkerState::Busy => "●",
        WorkerState::Draining | WorkerState::Drained => "⏸",
        WorkerState::Suspect | WorkerState::Lost => "✗",
        WorkerState::Offline => "–",
    };
    let notes: Vec<&str> = [&worker.drain_note, &worker.trouble].into_iter().flatten().map(String::as_str).collect();
    let note = if notes.is_empty() { String::new() } else { format!(": {}", notes.join("; ")) };
    let labels: Vec<String> = worker.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    vec![
        worker.name.clone(),
        format!("{icon} {}{note}", worker.state.as_str()),
        format!("{}/{}", worker.slots_busy, worker.slots),
        if labels.is_empty() { "–".into() } else { labels.join(",") },
        worker.version.clone(),
        worker.last_seen_at.as_deref().map_or_else(|| "never".into(), |at| ago(at, now)),
        worker.id.to_string(),
    ]
}

async fn drain(app: &App, farm: &Farm, args: &DrainArgs) -> Result<i32, Failure> {
    let mut signals = Signals::install()?;
    let worker = find(farm, &args.worker).await?;
    let request = DrainRequest { note: args.note.clone() };
    let mut view = farm.client.drain(worker.id, &request).await.map_err(|error| Failure::of(error, &farm.url))?;
    tell_drain(app, &view);
    while args.wait && view.state == WorkerState::Draining {
        let look = async {
            app.env.sleep_until(app.env.now().mono + DRAIN_LOOK_MS).await;
            find(farm, &worker.id.to_string()).await
        };
        view = signals.unless_told(look).await??;
        if view.state != WorkerState::Draining {
            tell_drain(app, &view);
        }
    }
    if app.talk.json() {
        print_json(&view)?;
    }
    Ok(exit::OK)
}

fn tell_drain(app: &App, view: &WorkerView) {
    let left = view.slots_busy;
    if left > 0 {
        app.talk.step("Draining", &format!("{}: {} left", view.name, plural(u64::from(left), "job")));
    } else {
        app.talk.verdict(Tone::Good, "✓", &format!("{} is {}", view.name, view.state.as_str()), None);
    }
}

async fn resume(app: &App, farm: &Farm, args: &ResumeArgs) -> Result<i32, Failure> {
    let worker = find(farm, &args.worker).await?;
    let view = farm.client.resume(worker.id).await.map_err(|error| Failure::of(error, &farm.url))?;
    app.talk.verdict(Tone::Good, "✓", &format!("{} is {}", view.name, view.state.as_str()), None);
    if app.talk.json() {
        print_json(&view)?;
    }
    Ok(exit::OK)
}

async fn remove(app: &App, farm: &Farm, args: &RmArgs) -> Result<i32, Failure> {
    let worker = find(farm, &args.worker).await?;
    farm.client.revoke_worker(worker.id).await.map_err(|error| Failure::of(error, &farm.url))?;
    app.talk.verdict(Tone::Good, "✓", &format!("{} does not belong to the farm any more", worker.name), None);
    if !worker.jobs.is_empty() {
        let jobs = plural(worker.jobs.len() as u64, "job");
        app.talk.hint(&format!("it held {jobs}: tried elsewhere within about a minute"));
    }
    if app.talk.json() {
        print_json(&serde_json::json!({ "removed": worker.id, "name": worker.name, "jobs": worker.jobs }))?;
    }
    Ok(exit::OK)
}

/// The worker that this text means.
pub(crate) async fn find(farm: &Farm, text: &str) -> Result<WorkerView, Failure> {
    let list = farm.client.workers().await.map_err(|error| Failure::of(error, &farm.url))?;
    pick(list.workers, text)
}

/// The one worker that a name, an id or an id's end means.
fn pick(workers: Vec<WorkerView>, text: &str) -> Result<WorkerView, Failure> {
    let id = text.parse::<WorkerId>().ok();
    let tail = (text.len() >= JobArg::TAIL_MIN).then(|| text.to_ascii_lowercase());
    let meant = |worker: &WorkerView| {
        worker.name == text
            || Some(worker.id) == id
            || tail.as_ref().is_some_and(|tail| worker.id.to_string().ends_with(tail.as_str()))
    };
    let mut found: Vec<WorkerView> = workers.into_iter().filter(meant).collect();
    match (found.pop(), found.is_empty()) {
        (Some(worker), true) => Ok(worker),
        (Some(_), false) => Err(Failure::usage(format!("`{text}` means more than one worker")).hint("give the id")),
        (None, _) => {
            Err(Failure::new(Fault::NotFound, format!("there is no worker `{text}`")).hint("alloy worker list"))
        }
    }
}

pub(crate) async fn token(app: &App, verb: &TokenVerb) -> Result<i32, Failure> {
    let hosted = Hosted::open_to_read(app).await?;
    let farm = hosted.farm();
    let fail = |error| Failure::of(error, &farm.url);
    match verb {
        TokenVerb::Create(args) => {
            let request = TokenRequest {
                name: args.name.clone(),
                role: args.role,
                ci: args.ci,
                ttl_s: args.ttl.map(|ms| ms.div_ceil(1_000)),
            };
            let created = farm.client.create_token(&request).await.map_err(fail)?;
            if app.talk.json() {
                print_json(&created)?;
            } else {
                app.talk.say(&format!("Token {} for {}; it is not shown again:", created.view.id, created.view.name));
                print(&format!("{}\n", created.token.expose()))?;
            }
        }
        TokenVerb::List => {
            let list = farm.client.tokens().await.map_err(fail)?;
            if app.talk.json() {
                print_json(&list)?;
            } else {
                let now = app.env.now().wall;
                let rows: Vec<Vec<String>> = list.tokens.iter().map(|token| token_row(token, now)).collect();
                let head = ["ID", "NAME", "ROLE", "TOKEN", "MADE", "EXPIRES"];
                print(&table(&head, &rows, stdout_is_terminal()))?;
            }
        }
        TokenVerb::Revoke(args) => {
            let view = farm.client.revoke_token(args.id).await.map_err(fail)?;
            app.talk.verdict(Tone::Good, "✓", &format!("{} ({}) is void", view.id, view.name), None);
            if app.talk.json() {
                print_json(&view)?;
            }
        }
    }
    Ok(exit::OK)
}

fn token_row(token: &TokenView, now: alloy_shared::env::Ms) -> Vec<String> {
    let expires =
        if token.revoked { "revoked".to_owned() } else { token.expires_at.clone().unwrap_or_else(|| "never".into()) };
    vec![
        token.id.to_string(),
        token.name.clone(),
        token.role.as_str().to_owned(),
        token.shown.clone(),
        ago(&token.created_at, now),
        expires,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(raw: u128, name: &str) -> WorkerView {
        WorkerView {
            id: WorkerId::from_raw(raw),
            name: name.into(),
            state: WorkerState::Ready,
            labels: BTreeMap::new(),
            slots: 2,
            slots_busy: 0,
            slots_warm: 0,
            version: "0.1.0".into(),
            last_seen_at: None,
            drain_note: None,
            trouble: None,
            jobs: Vec::new(),
        }
    }

    #[test]
    fn a_worker_is_named_by_name_id_or_the_ids_end() {
        let all =
            || vec![worker(1 << 20, "kitchen"), worker(1 << 90, "shed"), worker(1 << 91, "twin"), worker(5, "twin")];
        let id = WorkerId::from_raw(1 << 20).to_string();
        for text in ["kitchen", id.as_str(), &id[id.len() - 6..]] {
            assert_eq!(pick(all(), text).unwrap().name, "kitchen", "{text}");
        }
        assert_eq!(pick(all(), "twin").unwrap_err().fault, Fault::Usage);
        assert_eq!(pick(all(), "attic").unwrap_err().fault, Fault::NotFound);
        assert_eq!(pick(all(), "000000").unwrap_err().fault, Fault::Usage);
    }

    #[test]
    fn rows_say_what_matters() {
        let now = alloy_shared::env::Ms(0);
        let mut shed = worker(1, "shed");
        shed.state = WorkerState::Draining;
        shed.drain_note = Some("new disk".into());
        shed.labels.insert("chip".into(), "m4".into());
        assert_eq!(worker_row(&shed, now)[..4], ["shed", "⏸ draining: new disk", "0/2", "chip=m4"].map(str::to_owned));
        shed.trouble = Some("reboot it".into());
        assert_eq!(worker_row(&shed, now)[1], "⏸ draining: new disk; reboot it");
        assert_eq!(role("admin"), Ok(Role::Admin));
        assert!(role("root").is_err());
    }
}
