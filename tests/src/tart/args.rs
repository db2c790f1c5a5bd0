//! The table of commands, and parsing as `tart`'s own parser does it: exit 64 with the usage, flags anywhere, and for `exec`
//! everything after the name untouched.

use super::context::{Sim, Version};
use super::{Failure, say};

/// One command: its arguments (`...` at the end: one or more; `[...]`: may be absent) and its flags (`=`: with a value).
struct Spec {
    name: &'static str,
    about: &'static str,
    arguments: &'static [&'static str],
    flags: &'static [&'static str],
}

const COMMANDS: &[Spec] = &[
    Spec {
        name: "create",
        about: "Create a VM",
        arguments: &["name"],
        flags: &["from-ipsw=", "linux", "disk-size=", "disk-format="],
    },
    Spec {
        name: "clone",
        about: "Clone a VM",
        arguments: &["source-name", "new-name"],
        flags: &["insecure", "concurrency=", "prune-limit=", "stacked", "?deduplicate", "2.40:overwrite"],
    },
    Spec {
        name: "run",
        about: "Run a VM",
        arguments: &["name"],
        flags: &[
            "no-graphics",
            "serial",
            "serial-path=",
            "no-audio",
            "no-clipboard",
            "recovery",
            "vnc",
            "vnc-experimental",
            "disk=",
            "rosetta=",
            "dir=",
            "nested",
            "net-bridged=",
            "net-softnet",
            "net-softnet-allow=",
            "net-softnet-block=",
            "net-softnet-expose=",
            "2.35:net-softnet-control-fd=",
            "net-host",
            "root-disk-opts=",
            "suspendable",
            "capture-system-keys",
            "no-trackpad",
            "no-pointer",
            "no-keyboard",
            "2.40:no-usb-accessories",
        ],
    },
    Spec {
        name: "set",
        about: "Modify VM's configuration",
        arguments: &["name"],
        flags: &[
            "cpu=",
            "memory=",
            "display=",
            "display-refit",
            "no-display-refit",
            "random-mac",
            "random-serial",
            "disk=",
            "disk-size=",
        ],
    },
    Spec { name: "get", about: "Get a VM's configuration", arguments: &["name"], flags: &["format="] },
    Spec { name: "list", about: "List created VMs", arguments: &[], flags: &["source=", "format=", "quiet"] },
    Spec {
        name: "login",
        about: "Login to a registry",
        arguments: &["host"],
        flags: &["username=", "password-stdin", "insecure", "no-validate"],
    },
    Spec { name: "logout", about: "Logout from a registry", arguments: &["host"], flags: &[] },
    Spec { name: "ip", about: "Get VM's IP address", arguments: &["name"], flags: &["wait=", "resolver="] },
    Spec {
        name: "exec",
        about: "Execute a command in a running VM",
        arguments: &["name", "command..."],
        flags: &["i", "t"],
    },
    Spec {
        name: "pull",
        about: "Pull a VM from a registry",
        arguments: &["remote-name"],
        flags: &["insecure", "concurrency=", "?deduplicate"],
    },
    Spec {
        name: "push",
        about: "Push a VM to a registry",
        arguments: &["local-name", "remote-names..."],
        flags: &["insecure", "concurrency=", "chunk-size=", "label=", "populate-cache"],
    },
    Spec { name: "import", about: "Import VM from a compressed .tvm file", arguments: &["path", "name"], flags: &[] },
    Spec { name: "export", about: "Export VM to a compressed .tvm file", arguments: &["name", "[path]"], flags: &[] },
    Spec {
        name: "prune",
        about: "Prune OCI and IPSW caches or local VMs",
        arguments: &[],
        flags: &["entries=", "older-than=", "space-budget=", "?cache-budget=", "?gc"],
    },
    Spec { name: "rename", about: "Rename a local VM", arguments: &["name", "new-name"], flags: &[] },
    Spec { name: "stop", about: "Stop a VM", arguments: &["name"], flags: &["timeout="] },
    Spec { name: "delete", about: "Delete a VM", arguments: &["name..."], flags: &[] },
    Spec { name: "suspend", about: "Suspend a VM", arguments: &["name"], flags: &[] },
    Spec { name: "fqn", about: "Get a fully-qualified VM name", arguments: &["name"], flags: &[] },
];

const SHORT: &[(&str, &str)] = &[("-t", "timeout"), ("-q", "quiet")];

/// What an invocation asks for.
#[derive(Debug)]
pub(crate) struct Parsed {
    pub(crate) command: &'static str,
    pub(crate) names: Vec<String>,
    flags: Vec<(&'static str, String)>,
}

impl Parsed {
    pub(crate) fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|(name, _)| *name == flag)
    }

    pub(crate) fn values<'a>(&'a self, flag: &'a str) -> impl Iterator<Item = &'a str> {
        self.flags.iter().filter(move |(name, _)| *name == flag).map(|(_, value)| value.as_str())
    }

    pub(crate) fn value(&self, flag: &str) -> Option<&str> {
        self.flags.iter().rev().find(|(name, _)| *name == flag).map(|(_, value)| value.as_str())
    }

    pub(crate) fn number(&self, flag: &str) -> Result<Option<u64>, Failure> {
        let Some(text) = self.value(flag) else { return Ok(None) };
        let number = text.parse().ok();
        number.map(Some).ok_or_else(|| Failure::Usage(format!("The value '{text}' is invalid for '--{flag} <{flag}>'")))
    }

    /// The VM that faults match: for `clone` and `rename` the new one.
    pub(crate) fn vm(&self) -> &str {
        let index = usize::from(matches!(self.command, "clone" | "rename" | "import"));
        self.names.get(index).map_or("", String::as_str)
    }
}

/// Returns nothing where help or the version was all that was asked for.
pub(crate) fn parse(sim: &Sim, words: &[String]) -> Result<Option<Parsed>, Failure> {
    let Some(first) = words.first().map(String::as_str).filter(|word| !matches!(*word, "--help" | "-h" | "help"))
    else {
        say(&root_help());
        return Ok(None);
    };
    if first == "--version" {
        // The fault "version" belongs to no command.
        let version = super::fault::version(sim).unwrap_or_else(|| sim.version.text().to_owned());
        say(&version);
        return Ok(None);
    }
    let Some(spec) = COMMANDS.iter().find(|spec| spec.name == first) else {
        return Err(Failure::RootUsage(format!("Unexpected argument '{first}'")));
    };
    let mut parsed = Parsed { command: spec.name, names: Vec::new(), flags: Vec::new() };
    let mut rest = words[1..].iter();
    while let Some(word) = rest.next() {
        if matches!(&**word, "--help" | "-h") {
            say(&help(sim, spec));
            return Ok(None);
        }
        if !word.starts_with('-') || word == "-" {
            parsed.names.push(word.clone());
            // Everything after the name is the guest's.
            if spec.name == "exec" {
                parsed.names.extend(rest.cloned());
                break;
            }
            continue;
        }
        let (name, inline) = match word.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (word.as_str(), None),
        };
        let Some((flag, takes_value)) = find_flag(sim, spec, name) else {
            return Err(Failure::Usage(format!("Unknown option '{name}'")));
        };
        let value = match (takes_value, inline) {
            (false, _) => String::new(),
            (true, Some(value)) => value,
            (true, None) => {
                rest.next().cloned().ok_or_else(|| Failure::Usage(format!("Missing value for '{name} <{flag}>'")))?
            }
        };
        parsed.flags.push((flag, value));
    }
    check_count(spec, &parsed.names)?;
    check_values(&parsed)?;
    Ok(Some(parsed))
}

fn find_flag(sim: &Sim, spec: &Spec, word: &str) -> Option<(&'static str, bool)> {
    let long = SHORT.iter().find(|(short, _)| *short == word).map_or_else(
        || word.strip_prefix("--").or_else(|| word.strip_prefix('-').filter(|name| name.len() == 1)),
        |(_, long)| Some(long),
    )?;
    // `exec` has a `-t` of its own.
    let long = if spec.name == "exec" && word == "-t" { "t" } else { long };
    spec.flags.iter().filter_map(|flag| shown(sim, flag)).map(|(flag, _)| flag).find_map(|flag| {
        let (name, takes_value) = flag.strip_suffix('=').map_or((flag, false), |name| (name, true));
        (name == long).then_some((name, takes_value))
    })
}

/// The flag without its marks, and whether help names it; nothing where this release does not have it.
fn shown(sim: &Sim, flag: &'static str) -> Option<(&'static str, bool)> {
    let (since, flag) = match flag.split_once(':') {
        Some(("2.35", flag)) => (Version::V2_35, flag),
        Some((_, flag)) => (Version::V2_40, flag),
        None => (Version::V2_30, flag),
    };
    (sim.version >= since).then(|| flag.strip_prefix('?').map_or((flag, true), |flag| (flag, false)))
}

fn check_count(spec: &Spec, names: &[String]) -> Result<(), Failure> {
    let required = spec.arguments.iter().filter(|name| !name.starts_with('['));
    if let Some(missing) = required.clone().nth(names.len()) {
        let label = missing.trim_end_matches("...");
        return Err(Failure::Usage(format!("Missing expected argument '<{label}>{}'", &missing[label.len()..])));
    }
    let endless = spec.arguments.last().is_some_and(|last| last.ends_with("..."));
    match names.get(spec.arguments.len()) {
        Some(extra) if !endless => Err(Failure::Usage(format!("Unexpected argument '{extra}'"))),
        _ => Ok(()),
    }
}

/// What validation at parse time refuses, whatever the state of the host.
fn check_values(parsed: &Parsed) -> Result<(), Failure> {
    let one_of = |flag: &str, allowed: &[&str]| match parsed.value(flag) {
        Some(value) if !allowed.contains(&value) => Err(Failure::Usage(format!(
            "The value '{value}' is invalid for '--{flag} <{flag}>'. Please provide one of '{}'.",
            allowed.join("' or '")
        ))),
        _ => Ok(()),
    };
    one_of("format", &["text", "json"])?;
    one_of("source", &["local", "oci"])?;
    one_of("resolver", &["dhcp", "arp", "agent"])?;
    one_of("entries", &["caches", "vms"])?;
    for flag in ["concurrency", "wait", "timeout", "cpu", "memory", "disk-size", "older-than", "space-budget"] {
        parsed.number(flag)?;
    }
    if parsed.number("concurrency")? == Some(0) {
        return Err(Failure::Usage("network concurrency cannot be less than 1".into()));
    }
    let new = match parsed.command {
        "clone" | "rename" | "import" => parsed.names.get(1).map(|name| ("new-name", name)),
        "create" => parsed.names.first().map(|name| ("name", name)),
        _ => None,
    };
    match new {
        Some((label, name)) if name.contains('/') => Err(Failure::Usage(format!("<{label}> should be a local name"))),
        _ => Ok(()),
    }
}

/// The two lines after an error of exit 64.
pub(crate) fn usage(sim: &Sim, command: &str) -> String {
    match COMMANDS.iter().find(|spec| spec.name == command) {
        None => "Usage: tart <subcommand>\n  See 'tart --help' for more information.".to_owned(),
        Some(spec) => format!("Usage: {}\n  See 'tart {command} --help' for more information.", synopsis(sim, spec)),
    }
}

fn synopsis(sim: &Sim, spec: &Spec) -> String {
    let mut text = format!("tart {}", spec.name);
    let arguments = spec.arguments.iter().map(|name| match name.strip_prefix('[') {
        Some(name) => format!(" [<{}>]", name.trim_end_matches(']')),
        None => format!(" <{}>{}", name.trim_end_matches("..."), if name.ends_with("...") { " ..." } else { "" }),
    });
    text.extend(arguments);
    for (flag, visible) in spec.flags.iter().filter_map(|flag| shown(sim, flag)) {
        if visible {
            text.push_str(&format!(" [{}]", spelled(flag)));
        }
    }
    text
}

fn spelled(flag: &str) -> String {
    match flag.strip_suffix('=') {
        Some(name) => format!("--{name} <{name}>"),
        None if flag.len() == 1 => format!("-{flag}"),
        None => format!("--{flag}"),
    }
}

fn help(sim: &Sim, spec: &Spec) -> String {
    let mut text = format!("OVERVIEW: {}\n\nUSAGE: {}\n", spec.about, synopsis(sim, spec));
    if !spec.arguments.is_empty() {
        text.push_str("\nARGUMENTS:\n");
        for name in spec.arguments {
            text.push_str(&format!("  <{}>\n", name.trim_matches(['[', ']', '.'])));
        }
    }
    text.push_str("\nOPTIONS:\n");
    for (flag, visible) in spec.flags.iter().filter_map(|flag| shown(sim, flag)) {
        if visible {
            text.push_str(&format!("  {}\n", spelled(flag)));
        }
    }
    text.push_str("  --version               Show the version.\n  -h, --help              Show help information.\n");
    text
}

fn root_help() -> String {
    let mut text = "USAGE: tart <subcommand>\n\nOPTIONS:\n  --version               Show the version.\n  \
                    -h, --help              Show help information.\n\nSUBCOMMANDS:\n"
        .to_owned();
    for spec in COMMANDS.iter().filter(|spec| spec.name != "fqn") {
        text.push_str(&format!("  {:<23} {}\n", spec.name, spec.about));
    }
    text.push_str("\n  See 'tart help <subcommand>' for detailed help.");
    text
}
