//! D: flags, environment and `worker.toml` → [`Config`].

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use alloy_shared::config::{File, Key, Layers, Origin, Problem, Setting, parse};
use alloy_shared::id::Labels;
use alloy_shared::limits::{DISK_FLOOR as DISK_FLOOR_BYTES, FLOORS_MAX, Limits, MACOS_GUESTS_MAX, SLOTS_MAX};
use alloy_shared::runtime::LogFormat;
use alloy_shared::wire::image::canonical;
use alloy_shared::wire::network;

use crate::provider::host::HOST_IMAGE;
use crate::provider::tart::Settings;
use crate::provider::{ImageRef, Shape};
use crate::vm_demand::Wish;

/// What the command line of `worker run` may say. Everything else comes from the environment or the file.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Flags {
    /// Directory for key, spool, cache and VMs [default: ~/.local/share/alloy/worker]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<String>,
    /// What runs the jobs: tart, or host (on this machine itself, without any isolation)
    #[arg(long, value_name = "PROVIDER")]
    pub provider: Option<String>,
    /// How many jobs may run at once [default: 2]
    #[arg(long, value_name = "N")]
    pub slots: Option<String>,
    /// Label that this worker offers; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE")]
    pub labels: Vec<String>,
    /// Form of the log on stderr: compact, pretty or json
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// Keep the log in this file, at most 80 MiB of it, instead of on stderr
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<String>,
    /// Configuration file [default: ~/.config/alloy/worker.toml]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// What makes VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Provider {
    Tart,
    /// A directory and a process group of this machine: no isolation. Chosen by a person, never by default.
    Host,
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

/// What a worker is told. Of this [`Config::wish`] may change while it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where its farm is. Absent: where it was enrolled.
    pub url: Option<String>,
    pub state_dir: PathBuf,
    pub provider: Provider,
    pub slots: usize,
    /// What VMs are cloned from unless a job says otherwise.
    pub image: String,
    /// Images of which so many idle slots hold a warm VM, whatever was asked for lately.
    pub min_idle: Vec<(String, usize)>,
    /// Bytes that all images together may take. Absent: images are evicted only where the disk is full.
    pub image_budget: Option<u64>,
    pub tart: Settings,
    /// Where the programs `pre-job` and `post-job` lie, if there are any.
    pub hooks_dir: PathBuf,
    pub labels: Labels,
    pub log_format: LogFormat,
    /// Absent: stderr.
    pub log_file: Option<PathBuf>,
    pub limits: Limits,
}

const URL: Key = Key { name: "url", flag: None, variable: Some("ORCHESTRATOR_URL") };
const STATE_DIR: Key = Key { name: "state_dir", flag: Some("--state-dir"), variable: Some("ALLOY_STATE_DIR") };
const PROVIDER: Key = Key { name: "provider", flag: Some("--provider"), variable: Some("ALLOY_PROVIDER") };
const SLOTS: Key = Key { name: "vm_pool_size", flag: Some("--slots"), variable: Some("VM_POOL_SIZE") };
const IMAGE: Key = Key { name: "base_image", flag: None, variable: Some("TART_BASE_IMAGE") };
const IMAGE_BUDGET: Key = Key { name: "image_budget_gib", flag: None, variable: Some("ALLOY_IMAGE_BUDGET_GIB") };
const HOOKS_DIR: Key = Key { name: "hooks_dir", flag: None, variable: Some("ALLOY_HOOKS_DIR") };
const MIN_IDLE: Key = Key { name: "min_idle", flag: None, variable: Some("ALLOY_MIN_IDLE") };
const LABELS: Key = Key { name: "labels", flag: Some("--label"), variable: Some("ALLOY_LABELS") };
const LOG_FORMAT: Key = Key { name: "log_format", flag: Some("--log-format"), variable: Some("ALLOY_LOG_FORMAT") };
const LOG_FILE: Key = Key { name: "log_file", flag: Some("--log-file"), variable: Some("ALLOY_LOG_FILE") };
const DISK_FLOOR: Key = Key { name: "disk_floor_mib", flag: None, variable: Some("ALLOY_DISK_FLOOR_MIB") };
const TIME_SCALE: Key = Key { name: "time_scale", flag: None, variable: Some("ALLOY_TIME_SCALE") };

const TART: Key = Key { name: "tart_program", flag: None, variable: Some("ALLOY_TART") };
const TART_HOME: Key = Key { name: "tart_home", flag: None, variable: Some("TART_HOME") };
const HOST_DIR: Key = Key { name: "host_dir", flag: None, variable: Some("ALLOY_HOST_DIR") };
const VM_CPUS: Key = Key { name: "vm_cpus", flag: None, variable: Some("ALLOY_VM_CPUS") };
const VM_MEMORY: Key = Key { name: "vm_memory_mib", flag: None, variable: Some("ALLOY_VM_MEMORY_MIB") };
const UNFILTERED: Key =
    Key { name: "allow_unfiltered_network", flag: None, variable: Some("ALLOY_ALLOW_UNFILTERED_NETWORK") };
const GUEST_USER: Key = Key { name: "guest_user", flag: None, variable: Some("ALLOY_GUEST_USER") };
const GUEST_PASSWORD: Key = Key { name: "guest_password", flag: None, variable: Some("ALLOY_GUEST_PASSWORD") };

const DEFAULT_IMAGE: &str = "ghcr.io/cirruslabs/macos-sonoma-xcode:latest";
const DEFAULT_SLOTS: usize = 2;
/// Below the state directory.
const HOOKS: &str = "hooks";
const TIME_SCALE_MAX: u64 = 20;

impl Config {
    /// For a worker inside another program: jobs run on this machine itself.
    pub fn embedded(url: String, state_dir: PathBuf) -> Self {
        Self {
            url: Some(url),
            hooks_dir: state_dir.join(HOOKS),
            state_dir,
            provider: Provider::Host,
            slots: DEFAULT_SLOTS,
            image: DEFAULT_IMAGE.to_owned(),
            min_idle: Vec::new(),
            image_budget: None,
            tart: Settings::default(),
            labels: Labels::default(),
            log_format: LogFormat::Compact,
            log_file: None,
            limits: Limits::default(),
        }
    }

    /// Puts the layers on top of each other.
    pub fn resolve(
        flags: &Flags,
        variables: &BTreeMap<String, String>,
        file: Option<File>,
    ) -> Result<(Self, Vec<Setting>), Vec<Problem>> {
        let mut layers = Layers::new(given(flags), variables.clone(), file);
        let url = layers.take(URL, String::new(), checked_url);
        let default_dir = default_dir(variables).map(|dir| dir.display().to_string()).unwrap_or_default();
        let state_dir = layers.take(STATE_DIR, default_dir, |text| Ok(text.to_owned()));
        let provider = layers.take(PROVIDER, Provider::Tart, parse_provider);
        let slots = layers.take(SLOTS, DEFAULT_SLOTS, parse("is no number of slots"));
        let image = layers.take(IMAGE, DEFAULT_IMAGE.to_owned(), |text| Ok(text.trim().to_owned()));
        let budget_gib = layers.take(IMAGE_BUDGET, 0, parse("is no number of GiB"));
        let min_idle = layers.take(MIN_IDLE, String::new(), |text| parse_floors(text).map(|_| text.to_owned()));
        let tart = tart_settings(&mut layers, variables);
        let hooks_dir = layers.take(HOOKS_DIR, format!("{state_dir}/{HOOKS}"), |text| Ok(text.to_owned()));
        let labels = layers.take(LABELS, String::new(), |text| parse_labels(text).map(|_| text.to_owned()));
        let known = |text: &str| text.parse::<LogFormat>().map(|_| text.to_owned());
        let log_format = layers.take(LOG_FORMAT, "compact".to_owned(), known);
        let log_file = layers.take(LOG_FILE, String::new(), |text| Ok(text.to_owned()));
        let floor_mib: u64 = layers.take(DISK_FLOOR, DISK_FLOOR_BYTES >> 20, parse("is no number of MiB"));
        let scale = layers.take(TIME_SCALE, 1, parse("is no whole number"));
        if !Path::new(&state_dir).is_absolute() {
            let why = "is no absolute path, and without HOME there is no default".to_owned();
            layers.problem(STATE_DIR.name, layers.origin(STATE_DIR), why);
        }
        if layers.origin(HOOKS_DIR) != Origin::Default && !Path::new(&hooks_dir).is_absolute() {
            layers.problem(HOOKS_DIR.name, layers.origin(HOOKS_DIR), "is no absolute path".to_owned());
        }
        if !log_file.is_empty() && !Path::new(&log_file).is_absolute() {
            layers.problem(LOG_FILE.name, layers.origin(LOG_FILE), "is no absolute path".to_owned());
        }
        if let Some(why) = bad_slots(slots, provider) {
            layers.problem(SLOTS.name, layers.origin(SLOTS), why);
        }
        if floor_mib == 0 {
            layers.problem(DISK_FLOOR.name, layers.origin(DISK_FLOOR), "is at least 1".to_owned());
        }
        if scale == 0 || scale > TIME_SCALE_MAX {
            layers.problem(TIME_SCALE.name, layers.origin(TIME_SCALE), format!("is 1 to {TIME_SCALE_MAX}"));
        }
        let limits = Limits { disk_floor: floor_mib.saturating_mul(1 << 20), ..Limits::scaled(scale) };
        if let Err(why) = limits.validate() {
            layers.problem("limits", Origin::Default, why);
        }
        let config = Self {
            url: Some(url).filter(|url| !url.is_empty()),
            hooks_dir: PathBuf::from(hooks_dir),
            state_dir: PathBuf::from(state_dir),
            provider,
            slots,
            image,
            min_idle: parse_floors(&min_idle).unwrap_or_default(),
            image_budget: Some(budget_gib).filter(|gib| *gib > 0).map(|gib: u64| gib.saturating_mul(1 << 30)),
            tart,
            labels: parse_labels(&labels).unwrap_or_default(),
            log_format: log_format.parse().unwrap_or(LogFormat::Compact),
            log_file: Some(log_file).filter(|path| !path.is_empty()).map(PathBuf::from),
            limits,
        };
        layers.finish().map(|settings| (config, settings))
    }
}

/// Slots are VMs with tart, and macOS counts them.
fn bad_slots(slots: usize, provider: Provider) -> Option<String> {
    let (most, why) = match provider {
        Provider::Tart => (MACOS_GUESTS_MAX, " with the provider tart: macOS runs two macOS guests on a host at most"),
        Provider::Host => (SLOTS_MAX, ""),
    };
    (slots == 0 || slots > most).then(|| format!("is 1 to {most}{why}"))
}

/// The provider that somebody chose, whatever else is wrong with the layers.
pub fn chosen_provider(
    flags: &Flags,
    variables: &BTreeMap<String, String>,
    file: Option<File>,
) -> Result<Option<Provider>, Problem> {
    let mut layers = Layers::new(given(flags), variables.clone(), file);
    let provider = layers.take_given(PROVIDER, parse_provider);
    let problems = layers.finish().err().unwrap_or_default();
    problems.into_iter().find(|problem| problem.name == PROVIDER.name).map_or(Ok(provider), Err)
}

impl Config {
    /// What idle slots hold, by the names that the farm uses.
    pub fn wish(&self) -> Wish {
        let (image, floors) = match self.provider {
            Provider::Tart => (self.image.as_str(), self.min_idle.as_slice()),
            Provider::Host => (HOST_IMAGE, [].as_slice()),
        };
        let floors = floors.iter().map(|(image, count)| (ImageRef(canonical(image)), *count)).collect();
        Wish { slots: self.slots, image: ImageRef(canonical(image)), floors }
    }
}

fn tart_settings(layers: &mut Layers, variables: &BTreeMap<String, String>) -> Settings {
    let standard = Settings::default();
    let home = variables.get("HOME").map(|home| format!("{home}/.tart")).unwrap_or_default();
    let program = layers.take(TART, standard.program.display().to_string(), |text| Ok(text.to_owned()));
    let home = layers.take(TART_HOME, home, |text| Ok(text.to_owned()));
    let host_dir = layers.take(HOST_DIR, standard.host_dir.display().to_string(), |text| Ok(text.to_owned()));
    if !Path::new(&host_dir).is_absolute() {
        layers.problem(HOST_DIR.name, layers.origin(HOST_DIR), "is no absolute path".to_owned());
    }
    let cpus = layers.take(VM_CPUS, 0, parse("is no number of CPUs"));
    let memory_mib = layers.take(VM_MEMORY, 0, parse("is no number of MiB"));
    let unfiltered = layers.take(UNFILTERED, false, parse("is neither `true` nor `false`"));
    let guest_user = layers.take(GUEST_USER, standard.guest_user, |text| Ok(text.to_owned()));
    let password = layers.take_secret(GUEST_PASSWORD, "is empty", |text| (!text.is_empty()).then(|| text.to_owned()));
    if (1..4).contains(&cpus) {
        layers.problem(VM_CPUS.name, layers.origin(VM_CPUS), "is 4 or more: macOS guests freeze with fewer".to_owned());
    }
    let given = |n: u32| Some(n).filter(|n| *n > 0);
    Settings {
        program: PathBuf::from(program),
        home: PathBuf::from(home),
        host_dir: PathBuf::from(host_dir),
        shape: Shape { cpus: given(cpus), memory_mib: given(memory_mib) },
        unfiltered,
        guest_user,
        guest_password: password.unwrap_or(standard.guest_password),
    }
}

/// The file that is read if none is named.
pub fn default_file(variables: &BTreeMap<String, String>) -> Option<PathBuf> {
    home(variables, "XDG_CONFIG_HOME", ".config").map(|dir| dir.join("alloy/worker.toml"))
}

/// The state directory if none is named: `worker/` in the data directory.
pub fn default_dir(variables: &BTreeMap<String, String>) -> Option<PathBuf> {
    let data = variables.get("ALLOY_DATA_DIR").filter(|dir| !dir.is_empty()).map(PathBuf::from);
    let data = data.or_else(|| home(variables, "XDG_DATA_HOME", ".local/share").map(|dir| dir.join("alloy")));
    data.map(|dir| dir.join("worker"))
}

fn home(variables: &BTreeMap<String, String>, base: &str, below: &str) -> Option<PathBuf> {
    let dir = |name: &str| variables.get(name).filter(|path| Path::new(path).is_absolute()).map(PathBuf::from);
    dir(base).or_else(|| dir("HOME").map(|home| home.join(below)))
}

fn given(flags: &Flags) -> Vec<(&'static str, String)> {
    let texts = [
        ("--state-dir", &flags.state_dir),
        ("--provider", &flags.provider),
        ("--slots", &flags.slots),
        ("--log-format", &flags.log_format),
        ("--log-file", &flags.log_file),
    ];
    let mut given: Vec<_> = texts.into_iter().filter_map(|(flag, text)| Some((flag, text.clone()?))).collect();
    if !flags.labels.is_empty() {
        given.push(("--label", flags.labels.join(",")));
    }
    given
}

fn parse_provider(text: &str) -> Result<Provider, String> {
    let known = [Provider::Tart, Provider::Host].into_iter().find(|provider| provider.to_string() == text);
    known.ok_or_else(|| format!("is neither `{}` nor `{}`", Provider::Tart, Provider::Host))
}

/// `IMAGE=COUNT` pairs between commas.
fn parse_floors(text: &str) -> Result<Vec<(String, usize)>, String> {
    let mut floors: Vec<(String, usize)> = Vec::new();
    for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
        let known = pair.rsplit_once('=').map(|(image, count)| (image.trim(), count.trim().parse()));
        let Some((image, Ok(count))) = known.filter(|(image, _)| !image.is_empty()) else {
            return Err(format!("has `{pair}`, which is not like `IMAGE=1`"));
        };
        if count > SLOTS_MAX || floors.len() == FLOORS_MAX {
            return Err(format!("names at most {} images, and {} slots each", FLOORS_MAX, SLOTS_MAX));
        }
        if floors.iter().any(|(known, _)| known == image) {
            return Err(format!("names `{image}` twice"));
        }
        floors.push((image.to_owned(), count));
    }
    Ok(floors)
}

/// `key=value` pairs between commas.
fn parse_labels(text: &str) -> Result<Labels, String> {
    let mut labels = Labels::default();
    for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
        labels.insert_pair(pair).map_err(|bad| bad.to_string())?;
    }
    if labels.get(network::LABEL.0).is_some() {
        return Err(format!("{} is for the worker itself to say", network::LABEL.0));
    }
    Ok(labels)
}

fn checked_url(text: &str) -> Result<String, String> {
    let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    match rest {
        Some(rest)
            if !rest.is_empty() && !rest.contains(|c: char| c.is_whitespace() || matches!(c, '?' | '#' | '@')) =>
        {
            Ok(text.trim_end_matches('/').to_owned())
        }
        Some(_) | None => Err("is no URL like https://farm.example.com".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Resolved = Result<(Config, Vec<Setting>), Vec<Problem>>;

    fn resolve(flags: Flags, variables: &[(&str, &str)], file: &str) -> Resolved {
        let home = [("HOME", "/home/u")].iter().chain(variables);
        let variables = home.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Config::resolve(&flags, &variables, Some(File { path: "w.toml".into(), text: file.into() }))
    }

    #[test]
    fn with_nothing_said_two_slots_clone_the_default_image() {
        let (config, settings) = resolve(Flags::default(), &[], "").unwrap();
        let state_dir = PathBuf::from("/home/u/.local/share/alloy/worker");
        let embedded = Config::embedded(String::new(), state_dir);
        let tart = Settings { home: PathBuf::from("/home/u/.tart"), ..Settings::default() };
        assert_eq!(config, Config { url: None, provider: Provider::Tart, tart, ..embedded });
        assert!(settings.iter().all(|setting| setting.origin == Origin::Default));
    }

    #[test]
    fn flags_beat_variables_and_these_the_file() {
        let file = "vm_pool_size = 5\nbase_image = \"file\"\nprovider = \"host\"\n";
        let variables = [
            ("VM_POOL_SIZE", "4"),
            ("ORCHESTRATOR_URL", "http://farm:3000/"),
            ("ALLOY_DATA_DIR", "/data"),
            ("ALLOY_LABELS", "chip=m4, site=berlin"),
            ("ALLOY_TIME_SCALE", "10"),
            ("ALLOY_MIN_IDLE", "r:5000/a:1=1, b = 2"),
            ("ALLOY_DISK_FLOOR_MIB", "8"),
        ];
        let flags = Flags { slots: Some("3".into()), ..Flags::default() };
        let (config, _) = resolve(flags, &variables, file).unwrap();
        assert_eq!((config.slots, config.image.as_str(), config.provider), (3, "file", Provider::Host));
        assert_eq!(config.url.as_deref(), Some("http://farm:3000"));
        assert_eq!(config.state_dir, PathBuf::from("/data/worker"));
        assert_eq!(config.hooks_dir, PathBuf::from("/data/worker/hooks"));
        assert_eq!(config.labels.get("site"), Some("berlin"));
        assert_eq!(config.limits, Limits { disk_floor: 8 << 20, ..Limits::scaled(10) });
        assert_eq!(config.min_idle, [("r:5000/a:1".to_owned(), 1), ("b".to_owned(), 2)]);
        let flags = Flags { labels: vec!["a=1".into(), "b=2".into()], ..Flags::default() };
        let (config, _) = resolve(flags, &variables, file).unwrap();
        assert_eq!(config.labels.iter().collect::<Vec<_>>(), [("a", "1"), ("b", "2")]);
    }

    #[test]
    fn nobody_but_the_worker_says_that_it_can_restrict_a_network() {
        let problems = resolve(Flags::default(), &[("ALLOY_LABELS", "network-policy=per-job")], "").unwrap_err();
        assert!(problems.iter().any(|problem| problem.to_string().contains("for the worker itself")), "{problems:?}");
    }

    #[test]
    fn more_slots_than_a_mac_runs_guests_are_refused_for_vms_only() {
        for (provider, slots, fine) in [
            ("tart", "1", true),
            ("tart", "2", true),
            ("tart", "3", false),
            ("tart", "64", false),
            ("host", "64", true),
            ("host", "65", false),
        ] {
            let resolved = resolve(Flags::default(), &[("ALLOY_PROVIDER", provider), ("VM_POOL_SIZE", slots)], "");
            assert_eq!(resolved.is_ok(), fine, "{provider} {slots}");
            let Err(problems) = resolved else { continue };
            let text = problems.iter().map(ToString::to_string).collect::<String>();
            assert!(text.contains("environment VM_POOL_SIZE"), "{text}");
            let told = text.contains("is 1 to 2") && text.contains("macOS runs two macOS guests on a host at most");
            assert_eq!(told, provider == "tart", "{text}");
        }
    }

    #[test]
    fn every_problem_is_named_at_once() {
        let variables = [
            ("VM_POOL_SIZE", "0"),
            ("ALLOY_PROVIDER", "docker"),
            ("ALLOY_STATE_DIR", "here"),
            ("ALLOY_LOG_FILE", "here.log"),
            ("ALLOY_HOOKS_DIR", "here/hooks"),
            ("ALLOY_HOST_DIR", "here/host"),
            ("ORCHESTRATOR_URL", "farm"),
            ("ALLOY_LABELS", "x"),
            ("ALLOY_TIME_SCALE", "21"),
            ("ALLOY_MIN_IDLE", "a=1,a=2"),
            ("ALLOY_DISK_FLOOR_MIB", "much"),
        ];
        let problems = resolve(Flags::default(), &variables, "vm_pol_size = 1\n").unwrap_err();
        let names: Vec<&str> = problems.iter().map(|problem| problem.name.as_str()).collect();
        for name in [
            "vm_pool_size",
            "provider",
            "state_dir",
            "log_file",
            "hooks_dir",
            "host_dir",
            "url",
            "labels",
            "time_scale",
            "min_idle",
            "disk_floor_mib",
            "vm_pol_size",
        ] {
            assert!(names.contains(&name), "{name}: {problems:?}");
        }
        let text = problems.iter().map(ToString::to_string).collect::<String>();
        assert!(text.contains("environment ALLOY_PROVIDER") && text.contains("docker"), "{text}");
    }
}
