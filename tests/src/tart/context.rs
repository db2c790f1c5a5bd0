//! What an invocation knows of its world: places, version, the speed of time.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use super::Failure;

/// A release, as far as it changes behaviour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    V2_30,
    V2_35,
    V2_40,
}

impl Version {
    fn parse(text: &str) -> Version {
        match text.rsplit_once('.').map_or(text, |(head, _)| head) {
            "2.30" | "2" if text.starts_with("2.30") => Version::V2_30,
            "2.40" | "2" if text.starts_with("2.40") => Version::V2_40,
            _ => Version::V2_35,
        }
    }

    pub(crate) fn text(self) -> &'static str {
        match self {
            Version::V2_30 => "2.30.0",
            Version::V2_35 => "2.35.0",
            Version::V2_40 => "2.40.0",
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Sim {
    pub(crate) home: PathBuf,
    pub(crate) host: PathBuf,
    pub(crate) registry: PathBuf,
    pub(crate) version: Version,
    scale: f64,
    pub(crate) faults: Option<PathBuf>,
    pub(crate) journal: Option<PathBuf>,
    pub(crate) isolated: bool,
    pub(crate) hidden: Vec<PathBuf>,
    pub(crate) prunes: bool,
    pub(crate) ci: bool,
}

impl Sim {
    pub(crate) fn from_env() -> Sim {
        let path = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let text = |name: &str| std::env::var(name).unwrap_or_default();
        let home = path("TART_HOME").or_else(|| path("HOME").map(|home| home.join(".tart")));
        let home = absolute(home.unwrap_or_else(|| PathBuf::from("/.tart")));
        let host = path("SIM_TART_HOST").map(absolute);
        let host = host.unwrap_or_else(|| home.parent().unwrap_or(Path::new("/")).join("sim-tart-host"));
        Sim {
            registry: path("SIM_TART_REGISTRY").map_or_else(|| host.join("registry"), absolute),
            version: Version::parse(&text("SIM_TART_VERSION")),
            scale: text("SIM_TART_TIME_SCALE").parse().ok().filter(|scale| *scale > 0.0).unwrap_or(1.0),
            faults: path("SIM_TART_FAULTS"),
            journal: path("SIM_TART_JOURNAL"),
            isolated: nix::unistd::geteuid().is_root()
                && cfg!(target_os = "linux")
                && text("SIM_TART_ISOLATION") != "none",
            hidden: std::env::split_paths(&text("SIM_TART_HIDE")).filter(|p| p.is_absolute()).collect(),
            prunes: std::env::var_os("TART_NO_AUTO_PRUNE").is_none(),
            ci: std::env::var_os("CI").is_some(),
            home,
            host,
        }
    }

    pub(crate) fn make_home(&self) -> Result<(), Failure> {
        for dir in [self.vms(), self.tmp(), self.home.join("cache/OCIs"), self.host.clone()] {
            if !dir.is_dir() {
                std::fs::create_dir_all(&dir).map_err(|error| {
                    let place = self.home.display();
                    Failure::Bare(format!(
                        "TART_HOME is invalid: {place} does not exist, yet we can't create it: {error}"
                    ))
                })?;
            }
        }
        Ok(())
    }

    pub(crate) fn vms(&self) -> PathBuf {
        self.home.join("vms")
    }

    pub(crate) fn tmp(&self) -> PathBuf {
        self.home.join("tmp")
    }

    /// A simulated delay, on this machine's clock.
    pub(crate) fn scaled(&self, seconds: f64) -> Duration {
        Duration::from_secs_f64((seconds / self.scale).max(0.0))
    }

    pub(crate) fn pause(&self, seconds: f64) {
        std::thread::sleep(self.scaled(seconds));
    }
}

fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

/// The simulator's clock: it stands outside of the farm.
#[expect(clippy::disallowed_methods, reason = "a program outside of the farm with a clock of its own")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

#[expect(clippy::disallowed_methods, reason = "a program outside of the farm with a clock of its own")]
pub(crate) fn wall() -> SystemTime {
    SystemTime::now()
}

pub(crate) fn wall_ms() -> i64 {
    let since = wall().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// Dice without a seed: identities must differ between processes.
pub(crate) fn dice() -> u64 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_i64(wall_ms());
    hasher.write_u32(std::process::id());
    hasher.finish()
}

/// ISO-8601 in UTC, to the second.
pub(crate) fn iso(time: SystemTime) -> String {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Civil date from days since the epoch, counted in eras of 400 years that begin in March.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let index = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * index + 2) / 5 + 1;
    let month = if index < 10 { index + 3 } else { index - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let at = |seconds| iso(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_787_048_430), "2026-08-18T10:20:30Z");
        assert_eq!(at(4_107_542_399), "2100-02-28T23:59:59Z");
    }
}
