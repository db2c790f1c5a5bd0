//! D: how many days things are kept.

use alloy_shared::config::{Key, Layers};

use crate::keep::{DAY_MS, Keep};

const JOBS: Key = Key { name: "keep_jobs_days", flag: None, variable: Some("ALLOY_KEEP_JOBS_DAYS") };
const ARTIFACTS: Key = Key { name: "keep_artifacts_days", flag: None, variable: Some("ALLOY_KEEP_ARTIFACTS_DAYS") };
const LOGS: Key = Key { name: "keep_logs_days", flag: None, variable: Some("ALLOY_KEEP_LOGS_DAYS") };
const SOURCES: Key = Key { name: "keep_sources_days", flag: None, variable: Some("ALLOY_KEEP_SOURCES_DAYS") };
const DAY: Key = Key { name: "keep_day_ms", flag: None, variable: Some("ALLOY_KEEP_DAY_MS") };
/// So short a day still has an hour that a look fits into.
const DAY_MS_MIN: u64 = 100;

impl Keep {
    pub(super) fn take(layers: &mut Layers) -> Self {
        let base = Self::default().days();
        let spans = [(JOBS, base[0]), (ARTIFACTS, base[1]), (LOGS, base[2]), (SOURCES, base[3])];
        let spans = spans.map(|(key, base)| layers.take(key, base, days));
        Self::of_days(spans, layers.take(DAY, DAY_MS, day))
    }
}

fn days(text: &str) -> Result<u32, String> {
    let days = text.trim().parse().ok().filter(|days| *days <= alloy_shared::limits::KEEP_DAYS_MAX);
    days.ok_or_else(|| {
        format!("is no number of days from 0, which is for ever, to {}", alloy_shared::limits::KEEP_DAYS_MAX)
    })
}

fn day(text: &str) -> Result<u64, String> {
    let ms = text.trim().parse().ok().filter(|ms| (DAY_MS_MIN..=DAY_MS).contains(ms));
    ms.ok_or_else(|| format!("is a number of milliseconds from {DAY_MS_MIN} to {DAY_MS}"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::{Config, Flags};
    use super::*;

    fn resolve(name: &str, value: &str) -> Result<Keep, String> {
        let variables = BTreeMap::from([("HOME", "/home/u"), (name, value)].map(|(n, v)| (n.to_owned(), v.to_owned())));
        match Config::resolve(&Flags::default(), &variables, None) {
            Ok((config, _)) => Ok(config.keep),
            Err(problems) => Err(problems[0].name.clone()),
        }
    }

    #[test]
    fn days_are_told_by_four_variables() {
        let base = Keep::default();
        assert_eq!(resolve("ALLOY_KEEP_JOBS_DAYS", "7"), Ok(Keep { jobs_ms: 7 * DAY_MS, ..base }));
        assert_eq!(resolve("ALLOY_KEEP_ARTIFACTS_DAYS", "0"), Ok(Keep { artifacts_ms: 0, ..base }));
        assert_eq!(resolve("ALLOY_KEEP_LOGS_DAYS", "1"), Ok(Keep { logs_ms: DAY_MS, ..base }));
        assert_eq!(resolve("ALLOY_KEEP_SOURCES_DAYS", "36500"), Ok(Keep { sources_ms: 36_500 * DAY_MS, ..base }));
        let short = Keep::of_days([90, 30, 90, 14], 500);
        assert_eq!((resolve("ALLOY_KEEP_DAY_MS", "500"), short.grace_ms), (Ok(short), 500));
        for wrong in ["0", "99", "86400001"] {
            assert_eq!(resolve("ALLOY_KEEP_DAY_MS", wrong), Err("keep_day_ms".to_owned()), "{wrong}");
        }
        for wrong in ["-1", "1.5", "36501", "a day"] {
            assert_eq!(resolve("ALLOY_KEEP_LOGS_DAYS", wrong), Err("keep_logs_days".to_owned()), "{wrong}");
        }
    }
}
