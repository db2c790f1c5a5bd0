//! D: what is right and wrong with this machine as a worker: facts in, findings out.
//!
//! [`facts`] says what can be known, [`common`] and [`mac`] hold one function a check. A fact that could not be had becomes
//! an entry under "not checked", never a finding: nothing is called fine that nobody looked at.

pub mod common;
pub mod facts;
pub mod mac;

use std::fmt;

use serde::Serialize;

use facts::{Facts, System};

/// What a finding is about. The word is stable: scripts may compare it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    AppNap,
    AutoLogin,
    Clock,
    DhcpLease,
    DhcpPool,
    Disk,
    FileModes,
    FileVault,
    ForeignVms,
    Identity,
    Keychain,
    KeychainLock,
    Limits,
    LocalNetwork,
    LoginSession,
    Orchestrator,
    PowerFailure,
    Provider,
    Service,
    Sleep,
    Softnet,
    System,
    TartVersion,
    Updates,
    User,
}

impl Code {
    pub const ALL: [Code; 25] = [
        Self::AppNap,
        Self::AutoLogin,
        Self::Clock,
        Self::DhcpLease,
        Self::DhcpPool,
        Self::Disk,
        Self::FileModes,
        Self::FileVault,
        Self::ForeignVms,
        Self::Identity,
        Self::Keychain,
        Self::KeychainLock,
        Self::Limits,
        Self::LocalNetwork,
        Self::LoginSession,
        Self::Orchestrator,
        Self::PowerFailure,
        Self::Provider,
        Self::Service,
        Self::Sleep,
        Self::Softnet,
        Self::System,
        Self::TartVersion,
        Self::Updates,
        Self::User,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::AppNap => "app_nap",
            Self::AutoLogin => "auto_login",
            Self::Clock => "clock",
            Self::DhcpLease => "dhcp_lease",
            Self::DhcpPool => "dhcp_pool",
            Self::Disk => "disk",
            Self::FileModes => "file_modes",
            Self::FileVault => "file_vault",
            Self::ForeignVms => "foreign_vms",
            Self::Identity => "identity",
            Self::Keychain => "keychain",
            Self::KeychainLock => "keychain_lock",
            Self::Limits => "limits",
            Self::LocalNetwork => "local_network",
            Self::LoginSession => "login_session",
            Self::Orchestrator => "orchestrator",
            Self::PowerFailure => "power_failure",
            Self::Provider => "provider",
            Self::Service => "service",
            Self::Sleep => "sleep",
            Self::Softnet => "softnet",
            Self::System => "system",
            Self::TartVersion => "tart_version",
            Self::Updates => "updates",
            Self::User => "user",
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    Ok,
    /// Worth knowing; nothing is wrong.
    Note,
    /// It works today, and not after the next reboot, update or full disk.
    Warning,
    /// This worker cannot do its work.
    Error,
}

/// What mends it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fix {
    /// For a person, if it takes more than the commands.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub text: String,
    /// Program and arguments. The first word `sudo` says that it needs root.
    pub commands: Vec<Vec<String>>,
    /// `--fix` runs the commands by itself: they can be taken back, and they lower no protection.
    pub automatic: bool,
}

impl Fix {
    pub fn by_hand(text: impl Into<String>) -> Self {
        Self { text: text.into(), commands: Vec::new(), automatic: false }
    }

    pub fn automatic(commands: &[&[&str]]) -> Self {
        Self { text: String::new(), commands: words(commands), automatic: true }
    }

    /// Commands that a person shall decide about.
    pub fn told(text: impl Into<String>, commands: &[&[&str]]) -> Self {
        Self { text: text.into(), commands: words(commands), automatic: false }
    }
}

fn words(commands: &[&[&str]]) -> Vec<Vec<String>> {
    commands.iter().map(|argv| argv.iter().map(|word| (*word).to_owned()).collect()).collect()
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub code: Code,
    pub severity: Severity,
    pub text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<Fix>,
}

/// A check that could not be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NotChecked {
    pub code: Code,
    pub why: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    pub findings: Vec<Finding>,
    pub not_checked: Vec<NotChecked>,
}

impl Report {
    pub fn count(&self, severity: Severity) -> usize {
        self.findings.iter().filter(|finding| finding.severity == severity).count()
    }

    fn push(&mut self, code: Code, severity: Severity, text: impl Into<String>, fix: Option<Fix>) {
        self.findings.push(Finding { code, severity, text: text.into(), fix });
    }

    pub fn ok(&mut self, code: Code, text: impl Into<String>) {
        self.push(code, Severity::Ok, text, None);
    }

    pub fn note(&mut self, code: Code, text: impl Into<String>, fix: Fix) {
        self.push(code, Severity::Note, text, Some(fix));
    }

    pub fn warning(&mut self, code: Code, text: impl Into<String>, fix: Fix) {
        self.push(code, Severity::Warning, text, Some(fix));
    }

    pub fn error(&mut self, code: Code, text: impl Into<String>, fix: Fix) {
        self.push(code, Severity::Error, text, Some(fix));
    }

    pub fn not_checked(&mut self, code: Code, why: impl Into<String>) {
        self.not_checked.push(NotChecked { code, why: why.into() });
    }

    /// Looks at a fact if it is known.
    fn look<'a, T>(&mut self, code: Code, fact: &'a facts::Fact<T>) -> Option<&'a T> {
        match fact {
            Ok(known) => Some(known),
            Err(why) => {
                self.not_checked(code, why.clone());
                None
            }
        }
    }
}

/// Every check, in the order in which a person would mend things.
pub fn examine(facts: &Facts) -> Report {
    let mut report = Report::default();
    common::provider(facts, &mut report);
    common::identity(facts, &mut report);
    common::file_modes(facts, &mut report);
    common::orchestrator(facts, &mut report);
    common::clock(facts, &mut report);
    common::disk(facts, &mut report);
    common::tart(facts, &mut report);
    common::softnet(facts, &mut report);
    common::foreign_vms(facts, &mut report);
    common::service(facts, &mut report);
    common::limits(facts, &mut report);
    match (&facts.system, &facts.mac) {
        (System::Macos, Some(mac)) => mac::examine(facts, mac, &mut report),
        (System::Macos, None) => report.not_checked(Code::System, "nothing of this Mac was looked at"),
        (System::Linux | System::Other, _) => {
            for code in mac::CODES {
                report.not_checked(code, "there is such a thing on a Mac only");
            }
        }
    }
    report
}

#[cfg(test)]
mod tests;
