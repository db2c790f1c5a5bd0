//! S: `alloy up`: a farm on this machine, for everybody who may reach it, until a signal.

use std::net::SocketAddr;

use alloy_shared::secret::Token;

use super::data::{DataDir, Lock};
use super::host::{Host, Start, UpFlags, Wish, start};
use crate::context::{App, ConfigFile, Context, DEFAULT_URL};
use crate::output::talk::Tone;
use crate::output::{Failure, duration, exit, plural, print_json};
use crate::signals::Signals;

const CONTEXT: &str = "local";

/// Start a farm on this machine: orchestrator and worker in one process
#[derive(Debug, clap::Args)]
pub(crate) struct UpArgs {
    /// Address and port to listen on [default: 127.0.0.1:3000]
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    /// A proxy in front speaks TLS: other addresses than loopback are allowed
    #[arg(long)]
    behind_proxy: bool,
    /// URL under which people and workers reach this farm [default: http://localhost:PORT]
    #[arg(long, value_name = "URL")]
    base_url: Option<String>,
}

pub(crate) async fn up(app: &App, args: &UpArgs) -> Result<i32, Failure> {
    let globals = &app.globals;
    if globals.url.is_some() || globals.context.is_some() {
        return Err(Failure::usage("`alloy up` starts a farm here; --url and --context name one elsewhere"));
    }
    let mut signals = Signals::install()?;
    let started = app.env.now().mono;
    app.talk.say(&format!("alloy {} · orchestrator and worker on this machine", env!("CARGO_PKG_VERSION")));
    let data = DataDir::new(&app.places.data);
    let starting = async {
        let told = UpFlags {
            listen: args.listen.map(|addr| addr.to_string()),
            behind_proxy: args.behind_proxy,
            base_url: args.base_url.clone(),
        };
        match start(app, &data, &Wish::Up(told)).await? {
            Start::Running(host) => Ok(host),
            Start::Taken => Err(taken(&data)),
        }
    };
    let host = signals.unless_told(starting).await??;
    let mut outcome = tell_ready(app, &host, app.env.now().mono.since(started), &mut signals).await;
    let at_once = match &outcome {
        Ok(()) => {
            tokio::select! {
                biased;
                _ = signals.next() => !host.drain(app, &mut signals).await,
                why = host.fault(app) => {
                    outcome = Err(Failure::error(format!("the worker of this machine stopped: {why}")));
                    true
                }
            }
        }
        Err(_) => true,
    };
    host.stop(at_once).await;
    outcome.map(|()| exit::OK)
}

fn taken(data: &DataDir) -> Failure {
    let pid = match data.lock() {
        Ok(Lock::Taken { pid }) => pid,
        Ok(Lock::Free) | Err(_) => None,
    };
    let by = pid.map_or(String::new(), |pid| format!(" (process {pid})"));
    let failure =
        Failure::error(format!("a farm runs on this machine already{by}: {} is in use", data.farm().display()));
    match data.note(pid) {
        Some(note) => failure.hint(format!("it answers at {}; `alloy run --local` uses it", note.url)),
        None => failure.hint("stop it first, or set ALLOY_DATA_DIR to another directory"),
    }
}

async fn tell_ready(app: &App, host: &Host, took_ms: u64, signals: &mut Signals) -> Result<(), Failure> {
    let talk = &app.talk;
    let data = app.places.data.display();
    talk.verdict(Tone::Good, "  ✓", &format!("orchestrator   {}   (data: {data})", host.base_url), None);
    let worker = signals.unless_told(host.ready(app)).await??;
    if let Some(worker) = &worker {
        let slots = plural(u64::from(worker.slots), "slot");
        talk.verdict(Tone::Good, "  ✓", &format!("worker         {}, {slots}", worker.name), None);
    }
    let token = Token::parse(host.token.expose()).map_err(|why| Failure::error(format!("the admin's token: {why}")))?;
    let path = app.store_token(&host.base_url, &token)?;
    let context = add_context(app, &host.base_url)?;
    talk.verdict(Tone::Good, "  ✓", &format!("signed in      as admin{context}, token in {}", path.display()), None);
    talk.warn(super::NO_ISOLATION);
    if talk.json() {
        print_json(&serde_json::json!({ "url": host.base_url, "worker": worker, "data_dir": app.places.data }))?;
    }
    talk.say(&format!("Ready in {}. In another terminal:", duration(took_ms)));
    talk.say("  cd your-app && alloy run -c 'xcodebuild build'");
    talk.say("  alloy worker invite     adds another Mac");
    Ok(())
}

/// A farm at the usual address needs no name; another one gets it, and counts if nothing else does.
fn add_context(app: &App, url: &str) -> Result<String, Failure> {
    let mut file = ConfigFile::load(&app.places)?;
    if url == DEFAULT_URL && file.current.is_none() {
        return Ok(String::new());
    }
    let context = Context { url: url.to_owned() };
    if file.contexts.get(CONTEXT) != Some(&context) || file.current.is_none() {
        file.contexts.insert(CONTEXT.to_owned(), context);
        file.current.get_or_insert_with(|| CONTEXT.to_owned());
        file.save(&app.places)?;
    }
    Ok(format!(", context {CONTEXT}"))
}
