//! The simulated `tart`: an executable that behaves as the contract says, driven through arguments, environment, files and
//! signals only. It shares nothing with the driver that it tests. Every invocation is a process; the long-lived one is `run`,
//! which owns a guest: own root, processes, network and host name where it may make namespaces, a plain directory elsewhere.
//!
//! | Variable | Means |
//! |---|---|
//! | `SIM_TART_HOST` | directory of the simulated Mac: slots, leases, registry, softnet policies; shared by its `TART_HOME`s |
//! | `SIM_TART_REGISTRY` | the registry, if it is not the host's own |
//! | `SIM_TART_VERSION` | 2.30.0, 2.35.0 (default) or 2.40.0 |
//! | `SIM_TART_TIME_SCALE` | divides every simulated delay |
//! | `SIM_TART_FAULTS`, `SIM_TART_JOURNAL` | see [`fault`] and [`journal`] |
//! | `SIM_TART_ISOLATION` | `none`: a plain directory even where namespaces are possible |
//! | `SIM_TART_HIDE` | further paths, separated by `:`, that no guest may see |
//! | `SIM_TART_SOFTNET` | `revision`: the first published form of the control protocol |

mod agent;
mod args;
mod clone;
mod context;
mod exec;
pub mod fault;
mod files;
mod guest;
mod home;
pub(crate) mod host;
pub mod image;
mod ip;
mod isolate;
pub mod journal;
pub(crate) mod lease;
mod lock;
mod pull;
mod rpc;
mod run;
mod run_args;
mod shims;
mod show;
pub mod softnet;
mod timeline;
mod vm;
mod vsock;
mod watch;

use std::ffi::OsString;
use std::io::Write as _;
use std::process::ExitCode;

use args::Parsed;
use context::Sim;
use fault::{Fault, Faults};
use journal::Journal;

/// Why a command did not succeed, by how it is told.
#[derive(Debug)]
pub(crate) enum Failure {
    /// A known error: bare text, exit 1.
    Bare(String),
    /// The VM is not in the state that the command needs: bare text, exit 2.
    State(String),
    /// Any other error: `Error: ` and the text, exit 1.
    Error(String),
    /// A validation error of this command's arguments, exit 64.
    Usage(String),
    /// A validation error raised while executing: the usage is the root's, exit 64.
    RootUsage(String),
    /// Ends with this status and says nothing more.
    Silent(u8),
}

impl Failure {
    pub(crate) fn no_vm(name: &str) -> Failure {
        Failure::State(format!("the specified VM \"{name}\" does not exist"))
    }

    pub(crate) fn not_running(name: &str) -> Failure {
        Failure::State(format!("VM \"{name}\" is not running"))
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Failure {
        Failure::Error(error.to_string())
    }
}

impl From<nix::errno::Errno> for Failure {
    fn from(error: nix::errno::Errno) -> Failure {
        Failure::Error(error.desc().to_owned())
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Failure {
        Failure::Error(format!("The data couldn’t be read because it isn’t in the correct format. ({error})"))
    }
}

/// What a command gives back: text goes to stdout by `say`.
pub(crate) type Done = Result<(), Failure>;

/// The whole program.
pub fn main(argv: Vec<OsString>) -> ExitCode {
    let words: Vec<String> = argv.into_iter().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    if let Some(role) = words.first().filter(|word| word.starts_with("__")) {
        return guest::inner(role, words.get(1).map_or("", String::as_str));
    }
    watch::ignore_interrupts();
    let sim = Sim::from_env();
    let journal = Journal::open(&sim, &words);
    let code = match invoke(&sim, &words) {
        Ok(()) => 0,
        Err(failure) => report(&sim, words.first().map_or("", String::as_str), failure),
    };
    journal.close(code);
    ExitCode::from(code)
}

fn invoke(sim: &Sim, words: &[String]) -> Done {
    let Some(parsed) = args::parse(sim, words)? else { return Ok(()) };
    let faults = Faults::of(sim, parsed.command, parsed.vm());
    for fault in &faults {
        fault.strike_any(sim)?;
    }
    sim.make_home()?;
    if !matches!(parsed.command, "pull" | "clone") {
        files::collect_garbage(sim);
    }
    dispatch(sim, &parsed, &faults)
}

fn dispatch(sim: &Sim, parsed: &Parsed, faults: &[Fault]) -> Done {
    match parsed.command {
        "clone" => clone::clone(sim, parsed, faults),
        "create" => clone::create(sim, parsed),
        "delete" => vm::delete(sim, parsed, faults),
        "exec" => exec::exec(sim, parsed),
        "export" => files::export(sim, parsed),
        "fqn" => show::fqn(sim, parsed),
        "get" => show::get(sim, parsed),
        "import" => files::import(sim, parsed),
        "ip" => ip::ip(sim, parsed, faults),
        "list" => show::list(sim, parsed, faults),
        "login" => login(parsed),
        "logout" => Ok(()),
        "prune" => files::prune(sim, parsed),
        "pull" => pull::pull(sim, parsed, faults),
        "push" => Err(Failure::Error("this registry takes no images".into())),
        "rename" => vm::rename(sim, parsed),
        "run" => run::run(sim, parsed, faults),
        "set" => vm::set(sim, parsed, faults),
        "stop" => vm::stop(sim, parsed),
        "suspend" => vm::suspend(sim, parsed),
        other => unreachable!("`{other}` is not in the table of commands"),
    }
}

/// Credentials are taken from the environment by a worker; this one only validates.
fn login(parsed: &Parsed) -> Done {
    match (parsed.value("username").is_some(), parsed.has("password-stdin")) {
        (true, true) => Ok(()),
        (false, false) => Err(Failure::Error("Keychain returned unsuccessful status -25308".into())),
        _ => Err(Failure::Usage("both --username and --password-stdin are required".into())),
    }
}

/// Says what went wrong, as `tart` does, and returns the exit code.
fn report(sim: &Sim, command: &str, failure: Failure) -> u8 {
    let (text, code) = match failure {
        Failure::Bare(text) => (text, 1),
        Failure::State(text) => (text, 2),
        Failure::Error(text) => (format!("Error: {text}"), 1),
        Failure::Usage(text) => (format!("Error: {text}\n{}", args::usage(sim, command)), 64),
        Failure::RootUsage(text) => (format!("Error: {text}\n{}", args::usage(sim, "")), 64),
        Failure::Silent(code) => return code,
    };
    let _ = writeln!(std::io::stderr(), "{text}");
    code
}

/// A line on stdout. A reader that has gone away kills, as it does any program without a handler.
pub(crate) fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    if writeln!(out, "{line}").and_then(|()| out.flush()).is_err_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe) {
        fault::die_of("PIPE");
    }
}
