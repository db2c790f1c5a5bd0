//! S: host care, for the worker's own binary and for `alloy worker`: look at the machine and mend it, install the service.

pub mod gather;

use std::ffi::{OsStr, OsString};
use std::io::{IsTerminal as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use alloy_shared::runtime::SystemEnv;
use nix::unistd::{Uid, User};
use serde::Serialize;

use crate::config::{Config, Flags};
use crate::doctor::facts::System;
use crate::doctor::{Report, Severity, examine};
use crate::host::{self, Identity};
use crate::install::{CARRIED, Manager, SERVICE, Service, Step, check_name, service_path};
use crate::program::{complain, resolve, resolve_for, variables};
use gather::{World, gather};

/// Between two tries of a step that waits for something.
const STEP_PAUSE_S: u32 = 2;

#[derive(Debug, clap::Args)]
pub struct Doctor {
    /// Mend what can be mended without risk; each command is printed before it runs
    #[arg(long)]
    pub fix: bool,
    /// The service of `worker install`
    #[arg(long, value_name = "NAME", default_value = SERVICE)]
    pub service: String,
    #[command(flatten)]
    pub flags: Flags,
}

#[derive(Debug, clap::Args)]
pub struct Install {
    /// Print what would be written and run, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Stop the service and remove what was written
    #[arg(long)]
    pub uninstall: bool,
    /// What the service is called; a second worker on this machine needs another one
    #[arg(long, value_name = "NAME", default_value = SERVICE)]
    pub service: String,
    /// For root on Linux: who the worker runs as
    #[arg(long, value_name = "NAME")]
    pub user: Option<String>,
    #[command(flatten)]
    pub flags: Flags,
}

/// A command of `--fix`, and how it went.
#[derive(Debug, Serialize)]
struct Applied {
    command: Vec<String>,
    ok: bool,
}

#[derive(Serialize)]
struct Shown<'a> {
    errors: usize,
    warnings: usize,
    #[serde(flatten)]
    report: &'a Report,
    applied: &'a [Applied],
}

/// Looks at this machine. Ends with 0 if nothing is an error, 1 if something is, 2 if the configuration cannot be used.
pub async fn doctor(verb: &Doctor, json: bool) -> ExitCode {
    let config = match resolve(&verb.flags) {
        Ok(config) => config,
        Err(problems) => return complain(&problems, ExitCode::from(2)),
    };
    if let Err(why) = check_name(&verb.service) {
        return complain(&why, ExitCode::from(2));
    }
    let world = world(&verb.service);
    let env = Arc::new(SystemEnv::detached());
    let mut report = examine(&gather(&world, &config, Arc::clone(&env) as _).await);
    let mut applied = Vec::new();
    if verb.fix {
        applied = mend(&report).await;
        if !applied.is_empty() {
            report = examine(&gather(&world, &config, env).await);
        }
    }
    let printed = if json { print_json(&report, &applied) } else { print(&person(&report)) };
    if let Err(error) = printed {
        return complain(&format!("standard output: {error}"), ExitCode::FAILURE);
    }
    if report.count(Severity::Error) == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn world(service: &str) -> World {
    let uid = Uid::current();
    let variables = variables();
    let arch = match std::env::consts::ARCH {
        "aarch64" => "arm64",
        other => other,
    };
    World {
        system: System::parse(std::env::consts::OS),
        path: search_path(),
        root: PathBuf::from("/"),
        home: variables.get("HOME").map(PathBuf::from).unwrap_or_else(|| PathBuf::from("/")),
        user: host::user(),
        uid: uid.as_raw(),
        arch: arch.to_owned(),
        service: service.to_owned(),
        tart_home: variables.get("TART_HOME").map(PathBuf::from),
    }
}

/// This process's path, and behind it where the system's own tools lie: a shell by SSH may not have them.
fn search_path() -> OsString {
    let mut path = OsString::from(host::login_path());
    path.push(":/opt/homebrew/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin");
    path
}

/// Runs the commands of the automatic fixes, one after the other. One that fails ends its finding's fix, not the others.
async fn mend(report: &Report) -> Vec<Applied> {
    let mut applied: Vec<Applied> = Vec::new();
    let terminal = std::io::stdin().is_terminal();
    for finding in &report.findings {
        let Some(fix) = finding.fix.as_ref().filter(|fix| fix.automatic) else { continue };
        for command in &fix.commands {
            if applied.iter().any(|done| done.command == *command) {
                continue;
            }
            eprintln!("+ {}", shell(command));
            let ok = run(command, terminal).await;
            applied.push(Applied { command: command.clone(), ok });
            if !ok {
                break;
            }
        }
    }
    applied
}

/// Runs one command of a fix. Without a terminal sudo may not wait for a password that nobody types.
async fn run(command: &[String], terminal: bool) -> bool {
    let Some((program, args)) = command.split_first() else { return false };
    let mut process = tokio::process::Command::new(program);
    if program == "sudo" && !terminal {
        process.arg("-n");
    }
    let stdin = if terminal { Stdio::inherit() } else { Stdio::null() };
    // Standard output is for the findings.
    process.args(args).env("PATH", search_path()).stdin(stdin).stdout(std::io::stderr());
    match process.status().await {
        Ok(status) if status.success() => true,
        Ok(status) => {
            eprintln!("  failed: {status}");
            if program == "sudo" && !terminal {
                eprintln!("  it needs root: type it in a terminal");
            }
            false
        }
        Err(error) => {
            eprintln!("  failed: {program}: {error}");
            false
        }
    }
}

/// The report as a person reads it.
fn person(report: &Report) -> String {
    let mut out = String::new();
    for finding in &report.findings {
        let mark = match finding.severity {
            Severity::Ok => '✓',
            Severity::Note => '·',
            Severity::Warning => '!',
            Severity::Error => '✗',
        };
        out.push_str(&format!("{mark} {:<14} {}\n", finding.code, finding.text));
        let Some(fix) = &finding.fix else { continue };
        if !fix.text.is_empty() {
            out.push_str(&format!("    {}\n", fix.text));
        }
        for command in &fix.commands {
            let by = if fix.automatic { "   (--fix does it)" } else { "" };
            out.push_str(&format!("    $ {}{by}\n", shell(command)));
        }
    }
    // Many checks may have one reason.
    let mut reasons: Vec<(&str, Vec<&str>)> = Vec::new();
    for missing in &report.not_checked {
        match reasons.iter_mut().find(|(why, _)| *why == missing.why) {
            Some((_, codes)) => codes.push(missing.code.as_str()),
            None => reasons.push((&missing.why, vec![missing.code.as_str()])),
        }
    }
    for (why, codes) in reasons {
        out.push_str(&format!("? not checked: {}\n    {why}\n", codes.join(", ")));
    }
    let (errors, warnings) = (report.count(Severity::Error), report.count(Severity::Warning));
    out.push_str(&match (errors, warnings) {
        (0, 0) => "Nothing is wrong with what was checked.\n".to_owned(),
        (errors, warnings) => format!("Errors: {errors}. Warnings: {warnings}.\n"),
    });
    out
}

fn print_json(report: &Report, applied: &[Applied]) -> std::io::Result<()> {
    let (errors, warnings) = (report.count(Severity::Error), report.count(Severity::Warning));
    let mut text = serde_json::to_string_pretty(&Shown { errors, warnings, report, applied })?;
    text.push('\n');
    print(&text)
}

fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // Who stopped reading knows enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        done => done,
    }
}

/// A command as one types it.
fn shell(command: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@,+".contains(c);
    let word = |word: &String| {
        if !word.is_empty() && word.chars().all(plain) {
            word.clone()
        } else {
            format!("'{}'", word.replace('\'', r"'\''"))
        }
    };
    command.iter().map(word).collect::<Vec<_>>().join(" ")
}

/// Installs or removes the service. `program` starts a worker if `--flags` of `worker run` follow: `worker run`,
/// `alloy worker run`.
pub async fn install(verb: &Install, program: Vec<String>) -> ExitCode {
    let (service, state_dir) = match service(verb, program) {
        Ok(both) => both,
        Err(why) => return complain(&why, ExitCode::from(2)),
    };
    let done = match (verb.uninstall, verb.dry_run) {
        (false, false) => write(&service, &state_dir, &search_path()).await,
        (true, false) => remove(&service, &search_path()).await,
        (uninstall, true) => show(&service, uninstall),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => complain(&why, ExitCode::FAILURE),
    }
}

/// The service, and the state directory of its worker.
fn service(verb: &Install, program: Vec<String>) -> Result<(Service, PathBuf), String> {
    check_name(&verb.service)?;
    let mut variables = variables();
    let system = System::parse(std::env::consts::OS);
    let root = Uid::current().is_root();
    let (manager, home) = match (system, root, &verb.user) {
        (System::Macos, false, None) => (Manager::LaunchAgent { uid: Uid::current().as_raw() }, own_home()?),
        (System::Macos, _, _) => {
            return Err(
                "type it as the user who is logged in on the screen, without sudo: a VM needs that session".to_owned()
            );
        }
        (System::Linux, true, Some(name)) => {
            let user = User::from_name(name).map_err(|error| format!("--user {name}: {error}"))?;
            let user = user.ok_or_else(|| format!("--user {name}: there is no such user"))?;
            (Manager::SystemUnit { user: user.name }, user.dir)
        }
        // Whose it is does not matter any more.
        (System::Linux, true, None) if verb.uninstall => (Manager::SystemUnit { user: String::new() }, own_home()?),
        (System::Linux, true, None) => {
            return Err("say with --user who the worker shall run as, or type it as that user without sudo".to_owned());
        }
        (System::Linux, false, None) => (Manager::UserUnit, own_home()?),
        (System::Linux, false, Some(_)) => return Err("only root installs for another user".to_owned()),
        (System::Other, _, _) => return Err("there is no service manager known for this system".to_owned()),
    };
    if let Manager::SystemUnit { .. } = &manager {
        // Root's own places are not that user's.
        variables.retain(|name, _| !name.starts_with("XDG_"));
        variables.insert("HOME".to_owned(), home.display().to_string());
    }
    let config = resolve_for(&verb.flags, &variables)?;
    let mut command = program;
    command.extend(flags(&verb.flags, &config)?);
    if let (Manager::LaunchAgent { .. }, None) = (&manager, &config.log_file) {
        command.extend(["--log-file".to_owned(), Service::log_file(&home, &verb.service).display().to_string()]);
    }
    let carried = CARRIED.iter().filter_map(|name| Some(((*name).to_owned(), variables.get(*name)?.clone())));
    let config_home = variables.get("XDG_CONFIG_HOME").map_or_else(|| home.join(".config"), PathBuf::from);
    let path = service_path(&manager, &host::login_path());
    let variables = carried.collect();
    let name = verb.service.clone();
    Ok((Service { name, manager, command, variables, home, config_home, path }, config.state_dir))
}

fn own_home() -> Result<PathBuf, String> {
    let home = variables().get("HOME").map(PathBuf::from).filter(|home| home.is_absolute());
    home.ok_or_else(|| "there is no HOME".to_owned())
}

/// The flags of `worker run` as the service needs them: paths absolute, since it starts in another directory.
fn flags(flags: &Flags, config: &Config) -> Result<Vec<String>, String> {
    let mut out = vec!["--state-dir".to_owned(), config.state_dir.display().to_string()];
    let mut push = |flag: &str, value: &Option<String>| {
        if let Some(value) = value {
            out.extend([flag.to_owned(), value.clone()]);
        }
    };
    push("--provider", &flags.provider);
    push("--slots", &flags.slots);
    push("--log-format", &flags.log_format);
    push("--log-file", &config.log_file.as_ref().map(|path| path.display().to_string()));
    for label in &flags.labels {
        out.extend(["--label".to_owned(), label.clone()]);
    }
    if let Some(file) = &flags.config {
        let file = std::path::absolute(file).map_err(|error| format!("{}: {error}", file.display()))?;
        out.extend(["--config".to_owned(), file.display().to_string()]);
    }
    Ok(out)
}

async fn write(service: &Service, state_dir: &Path, path: &OsStr) -> Result<(), String> {
    let plan = service.plan()?;
    // A machine that is no worker yet would only be started in vain again and again.
    Identity::load(state_dir).map_err(|error| error.to_string())?;
    for dir in &plan.dirs {
        std::fs::create_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    }
    write_file(&plan.file.path, &plan.file.text).map_err(|error| format!("{}: {error}", plan.file.path.display()))?;
    eprintln!("wrote {}", plan.file.path.display());
    for step in &plan.steps {
        perform(step, path).await?;
    }
    for note in &plan.notes {
        eprintln!("{note}");
    }
    Ok(())
}

async fn remove(service: &Service, path: &OsStr) -> Result<(), String> {
    let removal = service.removal();
    for step in &removal.before {
        perform(step, path).await?;
    }
    match std::fs::remove_file(&removal.file) {
        Ok(()) => eprintln!("removed {}", removal.file.display()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("{} was not there", removal.file.display());
        }
        Err(error) => return Err(format!("{}: {error}", removal.file.display())),
    }
    for step in &removal.after {
        perform(step, path).await?;
    }
    Ok(())
}

/// Prints what would be done, in the order in which it would.
fn show(service: &Service, uninstall: bool) -> Result<(), String> {
    let line = |argv: &[String]| format!("$ {}\n", shell(argv));
    let steps = |steps: &[Step]| steps.iter().map(|step| line(&step.argv)).collect::<String>();
    let text = if uninstall {
        let removal = service.removal();
        let file = line(&["rm".to_owned(), removal.file.display().to_string()]);
        steps(&removal.before) + &file + &steps(&removal.after)
    } else {
        let plan = service.plan()?;
        let dir = |dir: &PathBuf| line(&["mkdir".to_owned(), "-p".to_owned(), dir.display().to_string()]);
        let dirs = plan.dirs.iter().map(dir).collect::<String>();
        dirs + &format!("# {}\n{}", plan.file.path.display(), plan.file.text) + &steps(&plan.steps)
    };
    print(&text).map_err(|error| format!("standard output: {error}"))
}

async fn perform(step: &Step, path: &OsStr) -> Result<(), String> {
    eprintln!("+ {}", shell(&step.argv));
    let Some((program, args)) = step.argv.split_first() else { return Ok(()) };
    let mut waited_s = 0;
    loop {
        let mut command = tokio::process::Command::new(program);
        command.args(args).env("PATH", path).stdin(Stdio::null()).stdout(std::io::stderr());
        if step.may_fail {
            command.stderr(Stdio::null());
        }
        match command.status().await {
            Ok(status) if status.success() || step.may_fail => return Ok(()),
            Ok(_) if waited_s < step.patience_s => {}
            Ok(status) => return Err(format!("{}: {status}", shell(&step.argv))),
            Err(error) => return Err(format!("{program}: {error}")),
        }
        tokio::time::sleep(Duration::from_secs(u64::from(STEP_PAUSE_S))).await;
        waited_s += STEP_PAUSE_S;
    }
}

/// Whole or not at all, readable for the service's manager.
fn write_file(path: &Path, text: &str) -> std::io::Result<()> {
    let temp = path.with_extension(format!("new-{}", std::process::id()));
    let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&temp)?;
    file.write_all(text.as_bytes())?;
    file.set_permissions(std::fs::Permissions::from_mode(0o644))?;
    file.sync_all()?;
    std::fs::rename(&temp, path)
}

#[cfg(test)]
mod tests {
    use alloy_shared::id::WorkerId;

    use super::*;

    fn program(dir: &Path, name: &str, script: &str) {
        let path = dir.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[tokio::test]
    async fn a_service_is_written_loaded_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let calls = dir.path().join("calls");
        for name in ["systemctl", "launchctl"] {
            // What is not loaded cannot be unloaded.
            let script = format!("echo \"{name} $*\" >>'{}'; test \"$1\" != bootout", calls.display());
            program(dir.path(), name, &script);
        }
        let path = OsString::from(format!("{}:/bin:/usr/bin", dir.path().display()));
        let state = dir.path().join("state");
        for manager in [Manager::UserUnit, Manager::LaunchAgent { uid: 501 }] {
            let service = Service {
                name: SERVICE.to_owned(),
                manager,
                command: vec!["/bin/worker".to_owned(), "run".to_owned()],
                variables: Default::default(),
                home: dir.path().join("home"),
                config_home: dir.path().join("home/.config"),
                path: "/bin".to_owned(),
            };
            let _ = std::fs::remove_dir_all(&state);
            let refused = write(&service, &state, &path).await.unwrap_err();
            assert!(refused.contains("worker join") && !service.file().exists(), "{refused}");
            std::fs::create_dir_all(&state).unwrap();
            Identity::save(&state, "http://farm", WorkerId::from_raw(1), "mini", "worker.key").unwrap();
            for _ in 0..2 {
                write(&service, &state, &path).await.unwrap();
                assert_eq!(std::fs::metadata(service.file()).unwrap().permissions().mode() & 0o777, 0o644);
            }
            remove(&service, &path).await.unwrap();
            assert!(!service.file().exists());
            remove(&service, &path).await.unwrap();
        }
        let calls = std::fs::read_to_string(calls).unwrap();
        for call in [
            "systemctl --user restart alloy-worker.service",
            "launchctl bootstrap gui/501 ",
            "launchctl bootout gui/501/",
        ] {
            assert!(calls.contains(call), "{call}: {calls}");
        }
    }

    #[tokio::test]
    async fn a_fix_that_fails_is_told_and_the_next_one_is_tried() {
        let mut report = Report::default();
        let dir = tempfile::tempdir().unwrap();
        let made = dir.path().join("made").display().to_string();
        let fix = |commands: &[&[&str]]| crate::doctor::Fix::automatic(commands);
        report.warning(crate::doctor::Code::Sleep, "a", fix(&[&["false"], &["touch", "/never/reached"]]));
        report.warning(crate::doctor::Code::AppNap, "b", fix(&[&["touch", &made]]));
        report.warning(crate::doctor::Code::AppNap, "again", fix(&[&["touch", &made]]));
        let told = crate::doctor::Fix::told("", &[&["touch", "/never/told"]]);
        report.warning(crate::doctor::Code::Softnet, "c", told);
        let applied: Vec<(String, bool)> =
            mend(&report).await.into_iter().map(|done| (shell(&done.command), done.ok)).collect();
        assert_eq!(applied, [("false".to_owned(), false), (format!("touch {made}"), true)]);
        assert!(Path::new(&made).exists());
    }

    #[test]
    fn a_command_is_shown_as_one_types_it() {
        let words = ["sudo", "x y", "it's", "", "-n"].map(str::to_owned);
        assert_eq!(shell(&words), r"sudo 'x y' 'it'\''s' '' -n");
    }
}
