//! S: how this machine knows a farm: login, contexts, configuration, completions, and what is wrong if it does not work.

use std::io::{IsTerminal as _, Read as _};

use alloy_shared::env::Ms;
use alloy_shared::limits::DISK_FLOOR;
use alloy_shared::secret::Token;
use alloy_shared::wire::PROTOCOL;
use alloy_shared::wire::farm::{Info, Storage};
use clap::CommandFactory as _;
use serde::Serialize;

use crate::Cli;
use crate::context::{App, ConfigFile, Context, Farm, check_token, check_url, without_user};
use crate::farm::Hosted;
use crate::output::talk::Tone;
use crate::output::{Failure, Fault, exit, print, print_json, size, stdout_is_terminal, table};

/// A longer first line of standard input is no token.
const TOKEN_INPUT_MAX: u64 = 4_096;
/// Stamps of both sides are compared by people: a larger difference misleads them.
const SKEW_MAX_MS: u64 = 30_000;

/// Store a token for a farm, and make that farm the current context
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  printf %s \"$TOKEN\" | alloy login http://farm.local:3000 --with-token")]
pub(crate) struct LoginArgs {
    /// The farm; default: the one that counts here
    farm: Option<String>,
    /// Read the token from standard input
    #[arg(long, required = true)]
    with_token: bool,
    /// Name of the context; default: the farm's host
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
}

/// List, choose and remove contexts: named farms
#[derive(Debug, clap::Subcommand)]
pub(crate) enum ContextVerb {
    /// List contexts; `*` marks the current one
    #[command(visible_alias = "list")]
    Ls,
    /// Make a context the current one
    Use { name: String },
    /// Remove a context and its token
    Rm { name: String },
}

/// Show the configuration
#[derive(Debug, clap::Subcommand)]
pub(crate) enum ConfigVerb {
    /// Show every value that counts here
    Show {
        /// Also where each value comes from
        #[arg(long)]
        origin: bool,
    },
}

/// Print completions for a shell
#[derive(Debug, clap::Args)]
pub(crate) struct CompletionsArgs {
    shell: clap_complete::Shell,
}

pub(crate) async fn login(app: &App, args: &LoginArgs) -> Result<i32, Failure> {
    let url = match &args.farm {
        Some(url) => check_url(url).map_err(|why| Failure::usage(format!("`{}` {why}", without_user(url))))?,
        None => app.choice()?.url,
    };
    if let Some(name) = &args.name {
        ConfigFile::check_name(name)?;
    }
    let mut file = ConfigFile::load(&app.places)?;
    let token = read_token()?;
    let farm = app.farm_at(url.clone(), Some(check_token(token.expose(), "standard input")?))?;
    let who = farm.client.whoami().await.map_err(|error| match Failure::of(error, &url) {
        failure if failure.fault == Fault::Unauthenticated => {
            Failure::new(Fault::Unauthenticated, format!("{url} does not know this token"))
                .hint("was it revoked, or is it for another farm?")
        }
        failure => failure,
    })?;
    let path = app.store_token(&url, &token)?;
    let name = args.name.clone().unwrap_or_else(|| name_for(&file, &url));
    file.contexts.insert(name.clone(), Context { url: url.clone() });
    file.current = Some(name.clone());
    file.save(&app.places)?;
    app.talk.verdict(
        Tone::Good,
        "✓",
        &format!(
            "Signed in to {url} as {} ({}) · context {name} · token {} in {}",
            who.name,
            who.role.as_str(),
            token.shown(),
            path.display()
        ),
        None,
    );
    if app.talk.json() {
        print_json(
            &serde_json::json!({ "url": url, "context": name, "name": who.name, "role": who.role, "org": who.org }),
        )?;
    }
    Ok(exit::OK)
}

fn read_token() -> Result<Token, Failure> {
    if std::io::stdin().is_terminal() {
        return Err(Failure::usage(
            "the token comes from standard input, not from the keyboard: it would stay on the screen",
        )
        .hint("printf %s \"$TOKEN\" | alloy login URL --with-token"));
    }
    let mut text = String::new();
    let read = std::io::stdin().lock().take(TOKEN_INPUT_MAX).read_to_string(&mut text);
    read.map_err(|error| Failure::io("standard input", &error))?;
    Token::parse(text.trim())
        .map_err(|why| Failure::new(Fault::Unauthenticated, format!("standard input holds no token: {why}")))
}

/// The context that has this URL already, or one named after the host.
fn name_for(file: &ConfigFile, url: &str) -> String {
    if let Some((name, _)) = file.contexts.iter().find(|(_, context)| context.url == url) {
        return name.clone();
    }
    let host = url.split_once("://").map_or(url, |(_, rest)| rest);
    let host: String = host
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '.' | '-') { c } else { '-' })
        .take(50)
        .collect();
    let host = host.trim_matches('-').to_owned();
    let free = |name: &String| !file.contexts.contains_key(name);
    let numbered = (2..).map(|n| format!("{host}-{n}"));
    std::iter::once(host.clone()).chain(numbered).find(free).unwrap_or(host)
}

#[derive(Serialize)]
struct ContextView<'a> {
    name: &'a str,
    url: &'a str,
    current: bool,
    signed_in: bool,
}

pub(crate) fn context(app: &App, verb: &ContextVerb) -> Result<i32, Failure> {
    let mut file = ConfigFile::load(&app.places)?;
    match verb {
        ContextVerb::Ls => list_contexts(app, &file)?,
        ContextVerb::Use { name } => {
            let context = file.contexts.get(name).ok_or_else(|| no_context(name))?;
            app.talk.verdict(Tone::Good, "✓", &format!("{name} ({}) counts from here on", context.url), None);
            file.current = Some(name.clone());
            file.save(&app.places)?;
        }
        ContextVerb::Rm { name } => {
            let context = file.contexts.remove(name).ok_or_else(|| no_context(name))?;
            if file.current.as_ref() == Some(name) {
                file.current = None;
            }
            if !file.contexts.values().any(|other| other.url == context.url) {
                app.forget_token(&context.url)?;
            }
            file.save(&app.places)?;
            app.talk.verdict(Tone::Good, "✓", &format!("{name} is removed, with its token"), None);
        }
    }
    Ok(exit::OK)
}

fn no_context(name: &str) -> Failure {
    Failure::new(Fault::NotFound, format!("there is no context `{name}`")).hint("alloy context ls")
}

fn list_contexts(app: &App, file: &ConfigFile) -> Result<(), Failure> {
    let mut views = Vec::new();
    for (name, context) in &file.contexts {
        views.push(ContextView {
            name,
            url: &context.url,
            current: file.current.as_ref() == Some(name),
            signed_in: app.token_for(&context.url)?.is_some(),
        });
    }
    if app.talk.json() {
        return print_json(&serde_json::json!({ "contexts": views }));
    }
    if views.is_empty() {
        app.talk.say("No contexts yet.");
        app.talk.hint("alloy login URL --with-token   adds one");
    }
    let rows: Vec<Vec<String>> = views
        .iter()
        .map(|view| {
            let mark = if view.current { "*" } else { " " };
            vec![mark.into(), view.name.into(), view.url.into(), if view.signed_in { "yes" } else { "no" }.into()]
        })
        .collect();
    print(&table(&["", "NAME", "URL", "SIGNED IN"], &rows, stdout_is_terminal()))
}

#[derive(Serialize)]
struct Setting {
    key: &'static str,
    value: String,
    origin: String,
}

pub(crate) fn config(app: &App, verb: &ConfigVerb) -> Result<i32, Failure> {
    let ConfigVerb::Show { origin } = verb;
    let settings = settings(app)?;
    if app.talk.json() {
        print_json(&serde_json::json!({ "settings": settings }))?;
        return Ok(exit::OK);
    }
    let rows: Vec<Vec<String>> = settings
        .into_iter()
        .map(|setting| {
            let mut row = vec![setting.key.to_owned(), setting.value];
            row.extend(origin.then_some(setting.origin));
            row
        })
        .collect();
    let head: &[&str] = if *origin { &["KEY", "VALUE", "ORIGIN"] } else { &["KEY", "VALUE"] };
    print(&table(head, &rows, stdout_is_terminal()))?;
    Ok(exit::OK)
}

fn settings(app: &App) -> Result<Vec<Setting>, Failure> {
    let choice = app.choice()?;
    let setting = |key, value: String, origin: &str| Setting { key, value, origin: origin.to_owned() };
    let token = match app.token_for(&choice.url)? {
        Some((token, origin)) => {
            let shown = Token::parse(token.expose()).map_or_else(|_| "***".to_owned(), |token| token.shown());
            setting("token", shown, &origin)
        }
        None => setting("token", "–".into(), "none"),
    };
    let place = |names: [&str; 2]| {
        let set = names.into_iter().find(|name| App::var(name).is_some_and(|value| value.starts_with('/')));
        set.unwrap_or("default").to_owned()
    };
    let places = &app.places;
    Ok(vec![
        setting("url", choice.url.clone(), &choice.origin),
        setting("context", choice.context.unwrap_or_else(|| "–".into()), &choice.origin),
        token,
        setting("config_file", places.config.display().to_string(), &place(["XDG_CONFIG_HOME"; 2])),
        setting("state_dir", places.state.display().to_string(), &place(["XDG_STATE_HOME"; 2])),
        setting("data_dir", places.data.display().to_string(), &place(["ALLOY_DATA_DIR", "XDG_DATA_HOME"])),
    ])
}

pub(crate) fn completions(args: &CompletionsArgs) -> Result<i32, Failure> {
    let mut out = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "alloy", &mut out);
    print(&String::from_utf8_lossy(&out))?;
    Ok(exit::OK)
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    ok: bool,
    text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

impl Finding {
    fn good(check: &'static str, text: impl Into<String>) -> Self {
        Self { check, ok: true, text: text.into(), hint: None }
    }
    fn bad(check: &'static str, failure: Failure) -> Self {
        Self { check, ok: false, text: failure.message, hint: failure.hint }
    }
    fn of(check: &'static str, outcome: Result<String, Failure>) -> Self {
        outcome.map_or_else(|failure| Self::bad(check, failure), |text| Self::good(check, text))
    }
}

pub(crate) async fn doctor(app: &App) -> Result<i32, Failure> {
    let mut findings = Vec::new();
    match Hosted::open_to_read(app).await {
        Ok(hosted) => examine_farm(app, hosted.farm(), &mut findings).await,
        Err(failure) => findings.push(Finding::bad("configuration", failure)),
    }
    findings.push(Finding::of("state", probe_dir(&app.places.state)));
    findings.push(Finding::of("data", probe_dir(&app.places.data)));
    let problems = findings.iter().filter(|finding| !finding.ok).count();
    if app.talk.json() {
        print_json(&serde_json::json!({ "problems": problems, "findings": findings }))?;
    } else {
        for finding in &findings {
            let mark = if finding.ok { "✓" } else { "✗" };
            let text = crate::output::sanitize::one_line(&finding.text);
            print(&format!("{mark} {:<14} {text}\n", finding.check))?;
            for line in finding.hint.iter().flat_map(|hint| hint.lines()) {
                print(&format!("    hint: {}\n", crate::output::sanitize::one_line(line)))?;
            }
        }
        let last = if problems == 0 {
            "Nothing is wrong.".to_owned()
        } else {
            format!("{} found.", crate::output::plural(problems as u64, "problem"))
        };
        print(&format!("{last}\n"))?;
    }
    Ok(if problems == 0 { exit::OK } else { exit::ERROR })
}

async fn examine_farm(app: &App, farm: &Farm, findings: &mut Vec<Finding>) {
    let before = app.env.now().wall;
    let info = match farm.client.info().await {
        Ok(info) => info,
        Err(error) => {
            findings.push(Finding::bad("orchestrator", Failure::of(error, &farm.url)));
            return;
        }
    };
    let after = app.env.now().wall;
    findings
        .push(Finding::good("orchestrator", format!("{} at {} ({} ms)", info.version, farm.url, after.since(before))));
    findings.push(Finding::of("protocol", protocol(&info)));
    findings.push(Finding::of("clock", clock(&info, before, after)));
    findings.extend(info.storage.map(|storage| Finding::of("storage", storage_of(storage))));
    let who = farm.client.whoami().await.map_err(|error| Failure::of(error, &farm.url));
    let signed_in = who.is_ok();
    findings.push(Finding::of("token", who.map(|who| format!("{} ({})", who.name, who.role.as_str()))));
    if signed_in {
        let workers = farm.client.workers().await.map_err(|error| Failure::of(error, &farm.url));
        findings.push(Finding::of(
            "workers",
            workers.and_then(|list| {
                let slots: u32 = list
                    .workers
                    .iter()
                    .filter(|w| w.state.as_str() == "ready" || w.state.as_str() == "busy")
                    .map(|w| w.slots)
                    .sum();
                if slots == 0 {
                    return Err(Failure::error("no worker is connected: jobs would wait")
                        .hint("alloy worker invite   adds one"));
                }
                Ok(crate::output::plural(u64::from(slots), "slot"))
            }),
        ));
    }
}

/// The farm's own disk, wherever the farm is.
fn storage_of(storage: Storage) -> Result<String, Failure> {
    let (free, floor) = (size(storage.free_bytes), size(storage.floor_bytes));
    if storage.is_full() {
        return Err(Failure::error(format!("the farm's disk is full: {free} free")).hint(format!(
            "it takes no new job and no upload below {floor}: free space on the orchestrator's machine"
        )));
    }
    Ok(format!("{free} free on the farm's disk"))
}

fn protocol(info: &Info) -> Result<String, Failure> {
    if info.protocol_min > *PROTOCOL.end() || info.protocol_max < *PROTOCOL.start() {
        return Err(Failure::error(format!(
            "the farm speaks {} to {}, this alloy {} to {}",
            info.protocol_min,
            info.protocol_max,
            PROTOCOL.start(),
            PROTOCOL.end()
        ))
        .hint("bring both to the same version; if it is `alloy up`, restart it"));
    }
    Ok(format!("{} to {}", info.protocol_min, info.protocol_max))
}

/// The farm's clock was read at some moment between question and answer.
fn clock(info: &Info, before: Ms, after: Ms) -> Result<String, Failure> {
    let theirs = Ms::parse_rfc3339(&info.time).ok_or_else(|| Failure::error(format!("`{}` is no time", info.time)))?;
    let skew = before.since(theirs).max(theirs.since(after));
    if skew > SKEW_MAX_MS {
        return Err(Failure::error(format!("differs from the farm's by {}", crate::output::duration(skew)))
            .hint("set both by the network: macOS: sudo sntp -sS time.apple.com"));
    }
    Ok(format!("differs by less than {} ms", skew.max(after.since(before)).max(1)))
}

/// Writes a file where Alloy keeps its own, and looks how much room there is.
fn probe_dir(dir: &std::path::Path) -> Result<String, Failure> {
    let probe = dir.join("doctor-was-here");
    crate::context::write_private(&probe, b"")?;
    // A probe that stays is an empty file.
    let _ = std::fs::remove_file(&probe);
    let stat =
        nix::sys::statvfs::statvfs(dir).map_err(|error| Failure::error(format!("{}: {error}", dir.display())))?;
    // The fields have other types on other systems.
    #[allow(clippy::unnecessary_cast, clippy::useless_conversion)]
    let free = (stat.blocks_available() as u64).saturating_mul(stat.fragment_size() as u64);
    if free < DISK_FLOOR {
        return Err(Failure::error(format!("{}: {} free", dir.display(), size(free)))
            .hint(format!("Alloy takes nothing new below {}", size(DISK_FLOOR))));
    }
    Ok(format!("{}, {} free", dir.display(), size(free)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(time: &str) -> Info {
        Info {
            version: "0.1.0".into(),
            protocol_min: 1,
            protocol_max: 3,
            capabilities: vec![],
            base_url: String::new(),
            time: time.into(),
            timeout_max_ms: None,
            queue_timeout_max_ms: None,
            storage: None,
        }
    }

    #[test]
    fn a_context_gets_a_name_from_its_host() {
        let mut file = ConfigFile::default();
        assert_eq!(name_for(&file, "http://farm.local:3000"), "farm.local-3000");
        file.contexts.insert("farm.local-3000".into(), Context { url: "http://other".into() });
        assert_eq!(name_for(&file, "http://farm.local:3000"), "farm.local-3000-2");
        file.contexts.insert("office".into(), Context { url: "http://farm.local:3000".into() });
        assert_eq!(name_for(&file, "http://farm.local:3000"), "office");
        ConfigFile::check_name(&name_for(&file, "https://[::1]:3000/prefix")).unwrap();
    }

    #[test]
    fn clocks_and_protocols_are_compared() {
        let at = |text: &str| Ms::parse_rfc3339(text).unwrap();
        let (before, after) = (at("2026-01-01T00:00:00Z"), at("2026-01-01T00:00:01Z"));
        for (time, fine) in [
            ("2026-01-01T00:00:00.500Z", true),
            ("2026-01-01T00:00:20Z", true),
            ("2026-01-01T00:05:00Z", false),
            ("2025-12-31T23:00:00Z", false),
            ("yesterday", false),
        ] {
            assert_eq!(clock(&info(time), before, after).is_ok(), fine, "{time}");
        }
        assert!(protocol(&info("")).is_ok());
        assert!(protocol(&Info { protocol_min: 9, protocol_max: 9, ..info("") }).is_err());
    }

    #[test]
    fn a_farm_without_room_is_a_problem() {
        assert!(storage_of(Storage { free_bytes: 2 << 30, floor_bytes: 1 << 30 }).unwrap().contains("free"));
        let full = storage_of(Storage { free_bytes: 1 << 20, floor_bytes: 1 << 30 }).unwrap_err();
        assert!(full.message.contains("full") && full.hint.is_some_and(|hint| hint.contains("free space")));
    }

    #[test]
    fn a_directory_is_probed_by_writing() {
        let dir = tempfile::tempdir().unwrap();
        assert!(probe_dir(&dir.path().join("new")).unwrap().contains("free"));
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(probe_dir(&dir.path().join("file")).is_err());
    }
}
