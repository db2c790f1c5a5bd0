//! D: flags, environment and `orchestrator.toml` → [`Config`].

use core::net::SocketAddr;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use alloy_shared::config::{File, Key, Layers, Origin, Problem, Setting, parse};
use alloy_shared::limits::{DISK_FLOOR as DISK_FLOOR_BYTES, Limits};
use alloy_shared::runtime::LogFormat;
use clap::{Parser, Subcommand};

mod database;
mod keep;
mod s3;
mod supabase;

pub use database::Database;
pub use s3::S3;
pub use supabase::Supabase;

use crate::keep::Keep;

/// The orchestrator of an Alloy build farm.
#[derive(Debug, Parser)]
#[command(name = "orchestrator", version)]
pub struct Cli {
    #[command(flatten)]
    pub flags: Flags,
    #[command(subcommand)]
    pub verb: Option<Verb>,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Look at the configuration
    Config {
        #[command(subcommand)]
        verb: ConfigVerb,
    },
}

#[derive(Debug, Subcommand)]
pub enum ConfigVerb {
    /// Show every value
    Show {
        /// Also show where each value comes from
        #[arg(long)]
        origin: bool,
    },
}

/// What the command line may say. Everything else comes from the environment or the file.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Flags {
    /// Address and port to listen on [default: 127.0.0.1:3000]
    #[arg(long, global = true, value_name = "ADDR:PORT")]
    pub listen: Option<String>,
    /// URL under which people and workers reach this farm [default: http://localhost:PORT]
    #[arg(long, global = true, value_name = "URL")]
    pub base_url: Option<String>,
    /// Directory for database, logs and blobs [default: ~/.local/share/alloy]
    #[arg(long, global = true, value_name = "DIR")]
    pub data_dir: Option<String>,
    /// A proxy in front of it speaks TLS: other addresses than loopback are allowed
    #[arg(long, global = true)]
    pub behind_proxy: bool,
    /// Form of the log on stderr: compact, pretty or json
    #[arg(long, global = true, value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// Configuration file [default: ~/.config/alloy/orchestrator.toml]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// What an orchestrator is told. It does not change while it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub listen: SocketAddr,
    /// Absent: `http://localhost` and the port.
    pub base_url: Option<String>,
    /// The directory that holds `farm/`.
    pub data_dir: PathBuf,
    /// A proxy in front speaks TLS and writes `X-Forwarded-For`.
    pub behind_proxy: bool,
    pub log_format: LogFormat,
    /// Whose sign-in tokens are taken.
    pub supabase: Option<Supabase>,
    pub database: Database,
    pub limits: Limits,
    pub keep: Keep,
    /// Absent: objects are files in the data directory.
    pub s3: Option<S3>,
}

const LISTEN: Key = Key { name: "listen", flag: Some("--listen"), variable: Some("ALLOY_LISTEN") };
const BASE_URL: Key = Key { name: "base_url", flag: Some("--base-url"), variable: Some("BASE_URL") };
const DATA_DIR: Key = Key { name: "data_dir", flag: Some("--data-dir"), variable: Some("ALLOY_DATA_DIR") };
const BEHIND_PROXY: Key =
    Key { name: "behind_proxy", flag: Some("--behind-proxy"), variable: Some("ALLOY_BEHIND_PROXY") };
const LOG_FORMAT: Key = Key { name: "log_format", flag: Some("--log-format"), variable: Some("ALLOY_LOG_FORMAT") };
const JOB_TIMEOUT: Key = Key { name: "job_timeout_minutes", flag: None, variable: Some("JOB_TIMEOUT_MINUTES") };
const DISK_FLOOR: Key = Key { name: "disk_floor_mib", flag: None, variable: Some("ALLOY_DISK_FLOOR_MIB") };
const TIME_SCALE: Key = Key { name: "time_scale", flag: None, variable: Some("ALLOY_TIME_SCALE") };

const TIME_SCALE_MAX: u64 = 20;

impl Config {
    /// For a farm inside another program: loopback, any free port, no proxy.
    pub fn embedded(data_dir: PathBuf) -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            base_url: None,
            data_dir,
            behind_proxy: false,
            log_format: LogFormat::Compact,
            supabase: None,
            database: Database::Local,
            limits: Limits::default(),
            keep: Keep::default(),
            s3: None,
        }
    }

    /// Puts the layers on top of each other.
    pub fn resolve(
        flags: &Flags,
        variables: &BTreeMap<String, String>,
        file: Option<File>,
    ) -> Result<(Self, Vec<Setting>), Vec<Problem>> {
        let mut layers = Layers::new(given(flags), variables.clone(), file);
        let local = SocketAddr::from(([127, 0, 0, 1], 3000));
        let listen = layers.take(LISTEN, local, parse("is no address with a port, like 127.0.0.1:3000"));
        let port = match listen.port() {
            0 => "PORT".to_owned(),
            port => port.to_string(),
        };
        let base_url = layers.take(BASE_URL, format!("http://localhost:{port}"), checked_url);
        let home = home(variables, "XDG_DATA_HOME", ".local/share");
        let default_dir = home.map(|dir| dir.join("alloy")).unwrap_or_default();
        let data_dir = layers.take(DATA_DIR, default_dir.display().to_string(), |text| Ok(text.to_owned()));
        let behind_proxy = layers.take(BEHIND_PROXY, false, parse("is neither true nor false"));
        let known = |text: &str| text.parse::<LogFormat>().map(|_| text.to_owned());
        let log_format = layers.take(LOG_FORMAT, "compact".to_owned(), known);
        let database = Database::take(&mut layers);
        let supabase = Supabase::take(&mut layers);
        let minutes =
            layers.take(JOB_TIMEOUT, Limits::default().job_timeout_ms / 60_000, parse("is no number of minutes"));
        let floor_mib: u64 = layers.take(DISK_FLOOR, DISK_FLOOR_BYTES >> 20, parse("is no number of MiB"));
        let scale = layers.take(TIME_SCALE, 1, parse("is no whole number"));
        let s3 = S3::take(&mut layers);
        let keep = Keep::take(&mut layers);

        let limits = Limits {
            job_timeout_ms: minutes.saturating_mul(60_000),
            disk_floor: floor_mib.saturating_mul(1 << 20),
            ..Limits::scaled(scale)
        };
        let config = Self {
            listen,
            // The port that is bound is known later.
            base_url: Some(base_url).filter(|_| layers.origin(BASE_URL) != Origin::Default),
            data_dir: PathBuf::from(&data_dir),
            behind_proxy,
            log_format: log_format.parse().unwrap_or(LogFormat::Compact),
            supabase,
            database,
            limits,
            keep,
            s3,
        };
        if data_dir.is_empty() {
            let why = "there is neither HOME nor XDG_DATA_HOME: say where the data shall be".to_owned();
            layers.problem(DATA_DIR.name, Origin::Default, why);
        }
        if minutes == 0 || config.limits.job_timeout_ms > config.limits.job_timeout_max_ms {
            let most = config.limits.job_timeout_max_ms / 60_000;
            layers.problem(JOB_TIMEOUT.name, layers.origin(JOB_TIMEOUT), format!("is 1 to {most} minutes"));
        }
        if floor_mib == 0 {
            layers.problem(DISK_FLOOR.name, layers.origin(DISK_FLOOR), "is at least 1".to_owned());
        }
        if scale == 0 || scale > TIME_SCALE_MAX {
            layers.problem(TIME_SCALE.name, layers.origin(TIME_SCALE), format!("is 1 to {TIME_SCALE_MAX}"));
        }
        if let Err(why) = config.check() {
            layers.problem(LISTEN.name, layers.origin(LISTEN), why);
        }
        layers.finish().map(|settings| (config, settings))
    }

    /// What must hold however a configuration came to be.
    pub fn check(&self) -> Result<(), String> {
        if !self.listen.ip().is_loopback() && !self.behind_proxy {
            return Err(format!(
                "{} can be reached from other machines, and without TLS anybody on the way reads tokens: put a proxy that \
                 speaks TLS in front and say --behind-proxy, or listen on 127.0.0.1",
                self.listen
            ));
        }
        self.limits.validate()
    }

    /// Database, logs, blobs, lock and first token.
    pub fn farm_dir(&self) -> PathBuf {
        self.data_dir.join("farm")
    }

    /// The farm's URL once its port is known.
    pub fn url(&self, bound: SocketAddr) -> String {
        self.base_url.clone().unwrap_or_else(|| format!("http://localhost:{}", bound.port()))
    }
}

/// The file that is read if none is named.
pub fn default_file(variables: &BTreeMap<String, String>) -> Option<PathBuf> {
    home(variables, "XDG_CONFIG_HOME", ".config").map(|dir| dir.join("alloy/orchestrator.toml"))
}

fn home(variables: &BTreeMap<String, String>, base: &str, below: &str) -> Option<PathBuf> {
    let dir = |name: &str| variables.get(name).filter(|path| Path::new(path).is_absolute()).map(PathBuf::from);
    dir(base).or_else(|| dir("HOME").map(|home| home.join(below)))
}

fn given(flags: &Flags) -> Vec<(&'static str, String)> {
    let texts = [
        ("--listen", &flags.listen),
        ("--base-url", &flags.base_url),
        ("--data-dir", &flags.data_dir),
        ("--log-format", &flags.log_format),
    ];
    let mut given: Vec<_> = texts.into_iter().filter_map(|(flag, text)| Some((flag, text.clone()?))).collect();
    if flags.behind_proxy {
        given.push(("--behind-proxy", "true".to_owned()));
    }
    given
}

fn checked_url(text: &str) -> Result<String, String> {
    let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    let fine =
        |rest: &str| !rest.is_empty() && !rest.contains(|c: char| c.is_whitespace() || matches!(c, '?' | '#' | '@'));
    match rest {
        Some(rest) if fine(rest) => Ok(text.trim_end_matches('/').to_owned()),
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
        Config::resolve(&flags, &variables, Some(File { path: "o.toml".into(), text: file.into() }))
    }

    #[test]
    fn with_nothing_said_it_listens_on_loopback() {
        let (config, settings) = resolve(Flags::default(), &[], "").unwrap();
        let embedded = Config::embedded("/home/u/.local/share/alloy".into());
        assert_eq!(config, Config { listen: "127.0.0.1:3000".parse().unwrap(), ..embedded });
        assert_eq!(config.url(config.listen), "http://localhost:3000");
        assert!(settings.iter().all(|setting| setting.origin == Origin::Default));
    }

    #[test]
    fn the_url_that_counts_is_shown_though_nobody_said_it() {
        let shown = |listen: &str| {
            let flags = Flags { listen: Some(listen.into()), ..Flags::default() };
            let (config, settings) = resolve(flags, &[], "").unwrap();
            assert_eq!(config.base_url, None);
            settings.into_iter().find(|setting| setting.name == "base_url").unwrap().value
        };
        assert_eq!(shown("127.0.0.1:3000"), "http://localhost:3000");
        assert_eq!(shown("127.0.0.1:4000"), "http://localhost:4000");
        assert_eq!(shown("127.0.0.1:0"), "http://localhost:PORT");
    }

    #[test]
    fn every_layer_is_read() {
        let flags = Flags { listen: Some("[::1]:1".into()), behind_proxy: true, ..Flags::default() };
        let variables = [("BASE_URL", "https://f.example/"), ("JOB_TIMEOUT_MINUTES", "5"), ("ALLOY_LISTEN", "bad")];
        let (config, _) =
            resolve(flags, &variables, "data_dir = \"/d\"\nlog_format = \"json\"\ntime_scale = 10\ndisk_floor_mib = 8")
                .unwrap();
        assert_eq!(config.listen, "[::1]:1".parse().unwrap());
        assert_eq!(config.url(config.listen), "https://f.example");
        assert_eq!((config.farm_dir(), config.log_format), ("/d/farm".into(), LogFormat::Json));
        assert_eq!((config.limits.job_timeout_ms, config.limits.heartbeat_ms), (300_000, 500));
        assert!(config.behind_proxy);
        assert_eq!((config.limits.disk_floor, config.limits.disk_reserve()), (8 << 20, 4 << 20));
    }

    #[test]
    fn another_address_than_loopback_needs_a_proxy() {
        for address in ["0.0.0.0:3000", "[::]:3000", "192.168.1.4:80"] {
            let flags = |behind_proxy| Flags { listen: Some(address.into()), behind_proxy, ..Flags::default() };
            let problems = resolve(flags(false), &[], "").unwrap_err();
            assert!(problems[0].message.contains("--behind-proxy"), "{problems:?}");
            assert_eq!(problems[0].origin, Origin::Flag("--listen"));
            resolve(flags(true), &[], "").unwrap();
        }
    }

    #[test]
    fn a_database_that_is_shared_needs_an_address_that_is_shown_nowhere() {
        let problems = resolve(Flags::default(), &[("DATABASE_MODE", "postgres")], "").unwrap_err();
        assert!(problems[0].message.contains("DATABASE_URL"), "{problems:?}");
        let url = "postgres://farm:hunter2@db/farm";
        let variables = [("DATABASE_MODE", "supabase"), ("DATABASE_URL", url)];
        let (config, settings) = resolve(Flags::default(), &variables, "").unwrap();
        assert!(matches!(&config.database, Database::Postgres(kept) if kept.expose() == url));
        assert!(!format!("{settings:?}{config:?}").contains("hunter2"));
        let (config, _) = resolve(Flags::default(), &[("DATABASE_URL", url)], "").unwrap();
        assert_eq!(config.database, Database::Local, "nobody asked for it");
    }

    #[test]
    fn every_problem_is_told_with_its_origin() {
        let variables = [
            ("ALLOY_LISTEN", "3000"),
            ("BASE_URL", "farm"),
            ("DATABASE_MODE", "oracle"),
            ("JOB_TIMEOUT_MINUTES", "0"),
            ("ALLOY_TIME_SCALE", "21"),
            ("ALLOY_DISK_FLOOR_MIB", "0"),
        ];
        let problems = resolve(Flags::default(), &variables, "log_format = \"xml\"\nlisten_on = 1").unwrap_err();
        let mut names: Vec<&str> = problems.iter().map(|problem| problem.name.as_str()).collect();
        names.sort_unstable();
        let expect = [
            "base_url",
            "database_mode",
            "disk_floor_mib",
            "job_timeout_minutes",
            "listen",
            "listen_on",
            "log_format",
            "time_scale",
        ];
        assert_eq!(names, expect);
        assert!(
            problems.iter().any(|p| p.to_string().starts_with("base_url (environment BASE_URL): `farm` is no URL"))
        );
    }
}
