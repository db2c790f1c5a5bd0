//! D: what makes a worker start by itself: the files of a service, and the commands that load or remove it.
//!
//! On a Mac it is a LaunchAgent of the login session: a VM needs the session's unlocked keychain, which no daemon has. On
//! Linux it is a systemd unit, of the user or, for root, of the system.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use plist::{Dictionary, Value};

/// How the service is called unless told otherwise.
pub const SERVICE: &str = "alloy-worker";
/// From the polite signal to the hard one. A worker that shall finish its jobs first is drained first: a shutdown of the
/// machine waits for nobody's job.
const STOP_S: u32 = 120;
/// Between two starts of a worker that ends by itself.
const RESTART_S: u32 = 10;
/// launchd gives a job 256 open files, of which a build's artifacts need more.
const OPEN_FILES: u32 = 65_536;
const LAUNCH_PATH: &str = "/opt/homebrew/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin";

/// Variables that a worker reads and that the service gets as they are now. A credential is none of them: these files can
/// be read by everybody on the machine.
pub const CARRIED: [&str; 12] = [
    "ORCHESTRATOR_URL",
    "ALLOY_PROVIDER",
    "ALLOY_LABELS",
    "ALLOY_LOG",
    "ALLOY_LOG_FORMAT",
    "ALLOY_TIME_SCALE",
    "ALLOY_DATA_DIR",
    "VM_POOL_SIZE",
    "TART_BASE_IMAGE",
    "TART_HOME",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
];

/// Who starts the worker, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Manager {
    /// launchd, at the user's login.
    LaunchAgent { uid: u32 },
    /// systemd, at the user's login, or at boot if the user lingers.
    UserUnit,
    /// systemd, at boot, as this user.
    SystemUnit { user: String },
}

/// A worker as a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    pub name: String,
    pub manager: Manager,
    /// The program and its arguments.
    pub command: Vec<String>,
    pub variables: BTreeMap<String, String>,
    /// Of the user that the worker runs as.
    pub home: PathBuf,
    /// Where that user's own configuration lies.
    pub config_home: PathBuf,
    /// What programs the worker finds.
    pub path: String,
}

/// A file that is written or removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    pub path: PathBuf,
    pub text: String,
}

/// One command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub argv: Vec<String>,
    /// It is right that it fails if there was nothing to do.
    pub may_fail: bool,
    /// Tried again for so long: what it waits for ends by itself.
    pub patience_s: u32,
}

/// What installing does, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub dirs: Vec<PathBuf>,
    pub file: Written,
    pub steps: Vec<Step>,
    /// What the person should know afterwards.
    pub notes: Vec<String>,
}

/// What removing does, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removal {
    pub before: Vec<Step>,
    pub file: PathBuf,
    pub after: Vec<Step>,
}

/// Refuses a name that would be another path, another unit or a flag.
pub fn check_name(name: &str) -> Result<(), String> {
    let fine = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let starts = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if starts && name.len() <= 64 && name.chars().all(fine) {
        Ok(())
    } else {
        Err("a service's name is up to 64 of a-z, 0-9, `.`, `_` and `-`, and starts with a letter or digit".to_owned())
    }
}

impl Service {
    /// The file that its manager reads.
    pub fn file(&self) -> PathBuf {
        match &self.manager {
            Manager::LaunchAgent { .. } => self.home.join("Library/LaunchAgents").join(format!("{}.plist", self.name)),
            Manager::UserUnit => self.config_home.join("systemd/user").join(self.unit()),
            Manager::SystemUnit { .. } => Path::new("/etc/systemd/system").join(self.unit()),
        }
    }

    fn unit(&self) -> String {
        format!("{}.service", self.name)
    }

    /// On a Mac the worker writes and bounds its own log: launchd never rotates the file that it opened, and newsyslog
    /// cannot make a process write into the new one. On Linux the journal does it.
    pub fn log_file(home: &Path, name: &str) -> PathBuf {
        home.join("Library/Logs/Alloy").join(format!("{name}.log"))
    }

    pub fn plan(&self) -> Result<Plan, String> {
        let file = self.file();
        let parent = file.parent().map(Path::to_owned);
        let mut dirs: Vec<PathBuf> = parent.into_iter().collect();
        let (text, steps, notes) = match &self.manager {
            Manager::LaunchAgent { uid } => {
                dirs.push(self.home.join("Library/Logs/Alloy"));
                (self.launch_agent()?, self.launch_steps(*uid), self.launch_notes())
            }
            Manager::UserUnit => (self.unit_text(None)?, self.systemd_steps(), self.unit_notes()),
            Manager::SystemUnit { user } => (self.unit_text(Some(user))?, self.systemd_steps(), Vec::new()),
        };
        Ok(Plan { dirs, file: Written { path: file, text }, steps, notes })
    }

    pub fn removal(&self) -> Removal {
        let (before, after) = match &self.manager {
            Manager::LaunchAgent { uid } => {
                (vec![step(&["launchctl", "bootout", &self.target(*uid)], true)], Vec::new())
            }
            Manager::UserUnit | Manager::SystemUnit { .. } => (
                vec![self.systemctl(&["disable", "--now", &self.unit()], true)],
                vec![self.systemctl(&["daemon-reload"], true)],
            ),
        };
        Removal { before, file: self.file(), after }
    }

    fn target(&self, uid: u32) -> String {
        format!("gui/{uid}/{}", self.name)
    }

    fn launch_steps(&self, uid: u32) -> Vec<Step> {
        let file = self.file().display().to_string();
        vec![
            // The one that is loaded now would go on with the old file.
            step(&["launchctl", "bootout", &self.target(uid)], true),
            step(&["launchctl", "enable", &self.target(uid)], false),
            // Refused while the old worker still ends.
            Step {
                patience_s: STOP_S + RESTART_S,
                ..step(&["launchctl", "bootstrap", &format!("gui/{uid}"), &file], false)
            },
        ]
    }

    fn launch_notes(&self) -> Vec<String> {
        vec![
            "it runs while this user is logged in on the screen: switch automatic login on, FileVault off".to_owned(),
            format!("its log: {}", Self::log_file(&self.home, &self.name).display()),
            "check this Mac: worker doctor".to_owned(),
        ]
    }

    fn unit_notes(&self) -> Vec<String> {
        vec!["it runs while this user is logged in; from boot on: loginctl enable-linger".to_owned()]
    }

    fn systemctl(&self, args: &[&str], may_fail: bool) -> Step {
        let mut argv = vec!["systemctl"];
        match self.manager {
            Manager::UserUnit => argv.push("--user"),
            Manager::LaunchAgent { .. } | Manager::SystemUnit { .. } => {}
        }
        argv.extend(args);
        step(&argv, may_fail)
    }

    fn systemd_steps(&self) -> Vec<Step> {
        vec![
            self.systemctl(&["daemon-reload"], false),
            self.systemctl(&["enable", &self.unit()], false),
            // Also starts one that does not run.
            self.systemctl(&["restart", &self.unit()], false),
        ]
    }

    fn launch_agent(&self) -> Result<String, String> {
        let text = |text: &str| Value::String(text.to_owned());
        let limit = || {
            let mut limit = Dictionary::new();
            limit.insert("NumberOfFiles".to_owned(), Value::Integer(OPEN_FILES.into()));
            Value::Dictionary(limit)
        };
        let mut variables = Dictionary::new();
        variables.insert("PATH".to_owned(), text(&self.path));
        for (name, value) in &self.variables {
            variables.insert(name.clone(), text(value));
        }
        // What is printed before the log is open, or by a panic. The worker empties it at its start.
        let stderr = Self::log_file(&self.home, &self.name).with_extension("stderr");
        let stderr = text(&stderr.display().to_string());
        let keys = [
            ("Label", text(&self.name)),
            ("ProgramArguments", Value::Array(self.command.iter().map(|word| text(word)).collect())),
            ("EnvironmentVariables", Value::Dictionary(variables)),
            ("WorkingDirectory", text(&self.home.display().to_string())),
            // The login session on the screen, and no other: only there is the keychain open.
            ("LimitLoadToSessionType", text("Aqua")),
            ("RunAtLoad", Value::Boolean(true)),
            ("KeepAlive", Value::Boolean(true)),
            ("ThrottleInterval", Value::Integer(RESTART_S.into())),
            ("ExitTimeOut", Value::Integer(STOP_S.into())),
            // Anything less is throttled, naps, and has its disk work put last.
            ("ProcessType", text("Interactive")),
            ("SoftResourceLimits", limit()),
            ("HardResourceLimits", limit()),
            ("StandardOutPath", stderr.clone()),
            ("StandardErrorPath", stderr),
        ];
        let agent: Dictionary = keys.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let mut out = Vec::new();
        Value::Dictionary(agent).to_writer_xml(&mut out).map_err(|error| format!("the property list: {error}"))?;
        out.push(b'\n');
        String::from_utf8(out).map_err(|error| format!("the property list: {error}"))
    }

    fn unit_text(&self, user: Option<&str>) -> Result<String, String> {
        let mut words = Vec::new();
        for word in &self.command {
            words.push(unit_word(word, true)?);
        }
        let mut lines = vec!["[Unit]".to_owned(), "Description=Worker of an Alloy build farm".to_owned()];
        if user.is_some() {
            lines.extend(["Wants=network-online.target".to_owned(), "After=network-online.target".to_owned()]);
        }
        // Tried again for ever: a farm that is away for a night must not need a hand at its workers.
        lines.extend(["StartLimitIntervalSec=0", "", "[Service]", "Type=exec"].map(str::to_owned));
        lines.extend(user.map(|user| format!("User={user}")));
        lines.push(format!("ExecStart={}", words.join(" ")));
        lines.push(format!("Environment={}", unit_word(&format!("PATH={}", self.path), false)?));
        for (name, value) in &self.variables {
            lines.push(format!("Environment={}", unit_word(&format!("{name}={value}"), false)?));
        }
        lines.extend([
            "Restart=always".to_owned(),
            format!("RestartSec={RESTART_S}"),
            // A configuration that cannot be used, and a farm that refuses this worker, need a person.
            format!("RestartPreventExitStatus=2 {}", crate::program::REFUSED),
            // The signal is for the worker, which ends its jobs itself; what is left after it is killed.
            "KillMode=mixed".to_owned(),
            format!("TimeoutStopSec={STOP_S}"),
            // A build that eats all memory is killed alone.
            "OOMPolicy=continue".to_owned(),
            "TasksMax=infinity".to_owned(),
            format!("LimitNOFILE={OPEN_FILES}"),
            String::new(),
            "[Install]".to_owned(),
        ]);
        lines.push(format!("WantedBy={}", if user.is_some() { "multi-user.target" } else { "default.target" }));
        Ok(lines.join("\n") + "\n")
    }
}

/// The search path of the service: where the usual programs lie, and what the installing shell has besides, without
/// directories that are gone with a session.
pub fn service_path(manager: &Manager, current: &str) -> String {
    match manager {
        Manager::LaunchAgent { .. } => {
            let known: Vec<&str> = LAUNCH_PATH.split(':').collect();
            let more = current
                .split(':')
                .filter(|dir| dir.starts_with('/') && !known.contains(dir) && !dir.starts_with("/tmp/"));
            known.iter().copied().chain(more).collect::<Vec<_>>().join(":")
        }
        Manager::UserUnit => current.to_owned(),
        // What lies in root's home is not for others.
        Manager::SystemUnit { .. } => {
            current.split(':').filter(|dir| !dir.starts_with("/root/")).collect::<Vec<_>>().join(":")
        }
    }
}

fn step(argv: &[&str], may_fail: bool) -> Step {
    Step { argv: argv.iter().map(|word| (*word).to_owned()).collect(), may_fail, patience_s: 0 }
}

/// One word of a unit, quoted. systemd expands `%` everywhere and `$` in commands.
fn unit_word(word: &str, command: bool) -> Result<String, String> {
    if word.chars().any(char::is_control) {
        return Err(format!("a unit cannot hold {word:?}"));
    }
    let mut out = String::from('"');
    for c in word.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '%' => out.push_str("%%"),
            '$' if command => out.push_str("$$"),
            c => out.push(c),
        }
    }
    out.push('"');
    Ok(out)
}

#[cfg(test)]
mod tests;
