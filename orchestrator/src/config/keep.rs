//! D: how many days things are kept.

use alloy_shared::config::{Key, Layers};

use crate::keep::{DAY_MS, Keep};

const JOBS: Key = Key { name: "keep_jobs_days", flag: None, variable: Some("ALLOY_KEEP_JOBS_DAYS") };
const ARTIFACTS: Key = Key { name: "keep_artifacts_days", flag: None, variable: Some("ALLOY_KEEP_ARTIFACTS_DAYS") };
const LOGS: Key = Key { name: "keep_logs_days", flag: None, variable: Some("ALLOY_KEEP_LOGS_DAYS") };
const SOURCES: Key = Key { name: "keep_sources_days", flag: None, variable: Some("ALLOY_KEEP_SOURCES_DAYS") };

impl Keep {
    pub(super) fn take(layers: &mut Layers) -> Self {
        let base = Self::default();
        let mut span_ms =
            |key: Key, base_ms: u64| u64::from(layers.take(key, (base_ms / DAY_MS) as u32, days)) * DAY_MS;
        Self {
            jobs_ms: span_ms(JOBS, base.jobs_ms),
            artifacts_ms: span_ms(ARTIFACTS, base.artifacts_ms),
            logs_ms: span_ms(LOGS, base.logs_ms),
            sources_ms: span_ms(SOURCES, base.sources_ms),
            ..base
        }
    }
}

fn days(text: &str) -> Result<u32, String> {
    let days = text.trim().parse().ok().filter(|days| *days <= alloy_shared::limits::KEEP_DAYS_MAX);
    days.ok_or_else(|| {
        format!("is no number of days from 0, which is for ever, to {}", alloy_shared::limits::KEEP_DAYS_MAX)
    })
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
        for wrong in ["-1", "1.5", "36501", "a day"] {
            assert_eq!(resolve("ALLOY_KEEP_LOGS_DAYS", wrong), Err("keep_logs_days".to_owned()), "{wrong}");
        }
    }
}
