//! T: time, dice and tasks as arguments. The daemons take them from the system, a test takes them from a seed.

use std::ops::{Add, Sub};

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

/// Wall time in milliseconds since the Unix epoch. For stamps that people read, never for deadlines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ms(pub i64);

impl Ms {
    /// RFC 3339 in UTC with milliseconds, as the API writes times.
    pub fn rfc3339(self) -> String {
        match jiff::Timestamp::from_millisecond(self.0) {
            Ok(at) => format!("{at:.3}"),
            Err(_) => String::new(),
        }
    }
    /// A time as HTTP's `Date` tells it, to the second.
    pub fn parse_http_date(text: &str) -> Option<Self> {
        let at = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(text).ok()?;
        Some(Self(at.as_millisecond()))
    }

    pub fn parse_rfc3339(text: &str) -> Option<Self> {
        text.parse::<jiff::Timestamp>().ok().map(|at| Self(at.as_millisecond()))
    }
    pub fn plus(self, ms: u64) -> Self {
        Self(self.0.saturating_add_unsigned(ms))
    }
    /// Milliseconds from `earlier` to here; 0 if the clock went back.
    pub fn since(self, earlier: Ms) -> u64 {
        u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0)
    }
}

/// How long something lasts, as a person would write it: `250ms`, `2s`, `1m 30s`, `24h`.
pub fn span(ms: u64) -> String {
    if ms < 1_000 || ms < 60_000 && !ms.is_multiple_of(1_000) {
        return format!("{ms}ms");
    }
    let seconds = ms / 1_000;
    let parts = [(seconds / 3_600, "h"), (seconds / 60 % 60, "m"), (seconds % 60, "s")];
    let parts: Vec<String> = parts.into_iter().filter(|(n, _)| *n > 0).map(|(n, unit)| format!("{n}{unit}")).collect();
    parts.join(" ")
}

/// Monotonic milliseconds since an origin of the process's own. For deadlines, never for people.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mono(pub u64);

impl Mono {
    pub fn since(self, earlier: Mono) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<u64> for Mono {
    type Output = Mono;
    fn add(self, ms: u64) -> Mono {
        Mono(self.0.saturating_add(ms))
    }
}

impl Sub<u64> for Mono {
    type Output = Mono;
    fn sub(self, ms: u64) -> Mono {
        Mono(self.0.saturating_sub(ms))
    }
}

/// One moment on both clocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Now {
    pub wall: Ms,
    pub mono: Mono,
}

/// The machine around a procedure: clock, timer, tasks, dice.
#[async_trait]
pub trait Env: Send + Sync {
    fn now(&self) -> Now;
    async fn sleep_until(&self, at: Mono);
    /// Starts a task that ends with the daemon. The name is what logs and panics call it.
    fn spawn(&self, name: &'static str, task: BoxFuture<'static, ()>);
    fn dice(&self) -> u64;
}

/// Delay before try number `tries` (from 0): exponential with full jitter, so that a herd spreads out.
pub fn backoff(tries: u32, base_ms: u64, cap_ms: u64, dice: u64) -> u64 {
    let ceiling = base_ms.saturating_mul(1u64 << tries.min(20)).min(cap_ms).max(1);
    dice % (ceiling + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_is_written_as_a_person_writes_it() {
        for (ms, text) in [
            (0, "0ms"),
            (100, "100ms"),
            (1_000, "1s"),
            (1_500, "1500ms"),
            (60_000, "1m"),
            (90_000, "1m 30s"),
            (3_600_000, "1h"),
            (5_430_999, "1h 30m 30s"),
            (86_400_000, "24h"),
        ] {
            assert_eq!(span(ms), text);
        }
    }

    #[test]
    fn backoff_grows_to_its_cap_and_never_beyond() {
        for tries in 0..80 {
            for dice in [0, 1, 499, u64::MAX] {
                assert!(backoff(tries, 500, 15_000, dice) <= 15_000);
            }
        }
        assert!(backoff(0, 500, 15_000, 500) <= 500);
        assert_eq!(backoff(10, 500, 15_000, 15_000), 15_000);
    }

    #[test]
    fn times_are_rfc3339_in_utc() {
        assert_eq!(Ms(1_700_000_000_123).rfc3339(), "2023-11-14T22:13:20.123Z");
        assert_eq!(Ms::parse_rfc3339("2023-11-14T22:13:20.123Z"), Some(Ms(1_700_000_000_123)));
        assert_eq!(Ms::parse_http_date("Tue, 14 Nov 2023 22:13:20 GMT"), Some(Ms(1_700_000_000_000)));
        assert_eq!(Ms::parse_http_date("now"), None);
    }
}
