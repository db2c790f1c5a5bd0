//! All logs: whether stored bytes are what an attempt wrote, whether followers got what is stored, and whether in the end the
//! farm has all that a worker's disk had.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use alloy_shared::id::AttemptRef;
use bytes::Bytes;
use futures_util::FutureExt as _;
use orchestrator::logs::{self, Logs};

use super::plan::{differs, log_bytes};

pub struct LogCheck {
    pub stored: logs::Mem,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Logs that are no longer kept.
    gone: BTreeSet<AttemptRef>,
    /// What was written, by attempt.
    produced: BTreeMap<AttemptRef, u64>,
    /// So much of a stored log was looked at, and is the attempt's own first bytes.
    looked: BTreeMap<AttemptRef, u64>,
    /// The longest that a worker's disk was seen to have of a log.
    spooled: BTreeMap<AttemptRef, u64>,
    /// What a power cut left on a worker's disk of a log that was longer.
    torn: BTreeMap<AttemptRef, u64>,
    /// What followers got of lost attempts beyond what was stored then.
    ahead: BTreeMap<AttemptRef, Bytes>,
}

impl LogCheck {
    pub fn new(stored: logs::Mem) -> Self {
        Self { stored, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn read(&self, at: &AttemptRef, from: u64) -> Bytes {
        let parts = Logs::Mem(self.stored.clone()).read(at, from, u32::MAX).now_or_never().and_then(Result::ok);
        parts.and_then(|parts| parts.into_iter().next()).unwrap_or_default()
    }

    pub fn durable(&self, at: &AttemptRef) -> u64 {
        Logs::Mem(self.stored.clone()).durable(at).now_or_never().and_then(Result::ok).unwrap_or(0)
    }

    fn len(&self, at: &AttemptRef) -> u64 {
        Logs::Mem(self.stored.clone()).len(at).now_or_never().and_then(Result::ok).unwrap_or(0)
    }

    pub fn produced(&self, at: &AttemptRef, upto: u64) {
        self.state().produced.insert(*at, upto);
    }

    pub fn gone(&self, at: &AttemptRef) {
        self.state().gone.insert(*at);
    }

    fn is_gone(&self, at: &AttemptRef) -> bool {
        self.state().gone.contains(at)
    }

    /// Logs that should have gone, and have not.
    pub fn left(&self) -> Vec<AttemptRef> {
        let all: Vec<AttemptRef> = self.state().produced.keys().copied().collect();
        all.into_iter().filter(|at| self.len(at) > 0).collect()
    }

    /// What a worker's disk has at this moment.
    pub fn spooled(&self, held: &BTreeMap<AttemptRef, u64>) {
        let mut state = self.state();
        for (at, len) in held {
            let most = state.spooled.entry(*at).or_default();
            *most = (*most).max(*len);
        }
    }

    /// A power cut took from a worker's disk what was not synced.
    pub fn torn(&self, before: &BTreeMap<AttemptRef, u64>, after: &BTreeMap<AttemptRef, u64>) {
        let mut state = self.state();
        for (at, len) in before {
            let left = after.get(at).copied().unwrap_or(0);
            if left < *len {
                state.torn.insert(*at, left);
                state.spooled.insert(*at, left);
            }
        }
    }

    /// I5: what came to a stored log since the last look is what the attempt wrote.
    pub fn look(&self, at: &AttemptRef) -> Result<(), String> {
        let stored = self.len(at);
        let looked = self.state().looked.get(at).copied().filter(|looked| *looked <= stored).unwrap_or(0);
        if looked == stored || differs(at, looked, &self.read(at, looked)).is_none() {
            self.is_written(at, stored)?;
            self.state().looked.insert(*at, stored);
            return Ok(());
        }
        self.look_at_all(at)
    }

    /// I5: a stored log is what the attempt wrote.
    pub fn look_at_all(&self, at: &AttemptRef) -> Result<(), String> {
        let stands_for = check_log(at, &self.read(at, 0)).map_err(|why| format!("{at}: {why}"))?;
        self.is_written(at, stands_for)
    }

    fn is_written(&self, at: &AttemptRef, stands_for: u64) -> Result<(), String> {
        let produced = self.state().produced.get(at).copied().unwrap_or(0);
        match stands_for > produced {
            true => Err(format!("{at}: {stands_for} bytes are stored, {produced} were written")),
            false => Ok(()),
        }
    }

    /// I6: what a follower got of an attempt is what is stored. `whole`: the attempt ended by its worker's result. Else its
    /// tail may come later, and a follower may have seen of it what the orchestrator's disk has lost since: that comes again.
    pub fn followed(&self, at: &AttemptRef, got: &[u8], whole: bool) -> Result<(), String> {
        if self.is_gone(at) {
            return Ok(());
        }
        let stored = self.read(at, 0);
        if stored.starts_with(got) && !(whole && stored.len() > got.len()) {
            return Ok(());
        }
        if !whole && got.starts_with(&stored) {
            let mut state = self.state();
            let most = state.ahead.entry(*at).or_default();
            if most.len() < got.len() {
                *most = Bytes::copy_from_slice(got);
            }
            return Ok(());
        }
        Err(format!("{at}: a follower got {} bytes, {} are stored", got.len(), stored.len()))
    }

    /// Nothing more comes. I5: all that workers' disks had is here. I6: so is all that followers got, but for what the
    /// orchestrator's disk lost before a sync and a power cut took from the worker's before it was sent again. Zeros
    /// at the end of a log that is not whole may be gone too: a daemon that starts takes them for a power cut's.
    pub fn at_the_end(&self, whole: &BTreeSet<AttemptRef>) -> Result<(), String> {
        let is_zeros = |at: &AttemptRef, bytes: &[u8]| !whole.contains(at) && bytes.iter().all(|byte| *byte == 0);
        let state = self.state();
        let stays = |at: &&AttemptRef| !state.gone.contains(at);
        for (at, spooled) in state.spooled.iter().filter(|(at, _)| stays(at)) {
            let stored = self.len(at);
            if stored < *spooled && !is_zeros(at, &log_bytes(at, stored, *spooled)) {
                return Err(format!("I5: {at}: its worker had {spooled} bytes of its log, {stored} are stored"));
            }
        }
        for (at, got) in state.ahead.iter().filter(|(at, _)| stays(at)) {
            let stored = self.read(at, 0);
            let torn = state.torn.get(at).is_some_and(|left| *left <= stored.len() as u64);
            let rest = got.strip_prefix(&*stored);
            let gone_here_and_there = rest.is_some_and(|rest| torn || is_zeros(at, rest));
            if !stored.starts_with(got) && !gone_here_and_there {
                return Err(format!("I6: {at}: a follower got {} bytes, {} came to stay", got.len(), stored.len()));
            }
        }
        Ok(())
    }
}

const MARK: &[u8] = b"\n[alloy: ";

/// How many written bytes the stored ones stand for, or what is wrong with them.
pub fn check_log(at: &AttemptRef, stored: &[u8]) -> Result<u64, String> {
    let Some(wrong) = differs(at, 0, stored) else { return Ok(stored.len() as u64) };
    let wrong = wrong as usize;
    // The first bytes of the line may be those that the log would have there.
    let from = wrong.saturating_sub(MARK.len());
    let head = (from..=wrong).find(|start| stored[*start..].starts_with(MARK));
    let head = head.ok_or_else(|| format!("byte {wrong} of {} is not what was written", stored.len()))?;
    let line_end = stored[head + 1..].iter().position(|byte| *byte == b'\n').ok_or("its last line has no end")?;
    let line = std::str::from_utf8(&stored[head + 1..head + 1 + line_end]).map_err(|error| error.to_string())?;
    let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [dropped, kept] = numbers[..] else { return Err(format!("`{line}` counts nothing")) };
    let tail = &stored[head + 1 + line_end + 1..];
    let begins = head as u64 + dropped;
    if tail.len() as u64 > kept || differs(at, begins, tail).is_some() {
        return Err(format!("after `{line}` stand {} other bytes", tail.len()));
    }
    Ok(begins + tail.len() as u64)
}

#[cfg(test)]
mod tests {
    use alloy_shared::id::JobId;
    use alloy_shared::mem_disk::MemDisk;

    use super::*;

    #[test]
    fn a_log_is_a_prefix_or_says_exactly_what_is_missing() {
        let at = AttemptRef { job: JobId::from_raw(3), attempt: 1 };
        let log = log_bytes(&at, 0, 1_000);
        assert_eq!(check_log(&at, &log), Ok(1_000));
        assert_eq!(check_log(&at, b""), Ok(0));
        for head in [0, 60, 61, 100] {
            let cut = |dropped: u64| {
                let mut text = log[..head].to_vec();
                text.extend(
                    format!("\n[alloy: {dropped} bytes of log are left out here, its last 100 follow]\n").bytes(),
                );
                text.extend(&log[900..]);
                text
            };
            assert_eq!(check_log(&at, &cut(900 - head as u64)), Ok(1_000), "{head}");
            assert!(check_log(&at, &cut(901 - head as u64)).is_err(), "{head}");
        }
        let mut wrong = log.to_vec();
        wrong[500] ^= 2;
        assert!(check_log(&at, &wrong).is_err());
        wrong.remove(500);
        assert!(check_log(&at, &wrong).is_err());
    }
    fn at() -> AttemptRef {
        AttemptRef { job: JobId::from_raw(3), attempt: 1 }
    }

    /// A log of so many bytes.
    fn with_log(len: u64) -> LogCheck {
        let logs = logs::Mem::on(std::sync::Arc::new(MemDisk::default()));
        let append = Logs::Mem(logs.clone()).append(&at(), 0, log_bytes(&at(), 0, len)).now_or_never();
        assert!(append.unwrap().is_ok());
        let check = LogCheck::new(logs);
        check.produced(&at(), 1_000);
        check
    }

    #[test]
    fn a_log_that_is_ahead_of_the_stored_one_must_come_unless_two_disks_lost_it() {
        let got = log_bytes(&at(), 0, 80);
        let check = with_log(80);
        assert_eq!((check.followed(&at(), &got, true), check.at_the_end(&BTreeSet::new())), (Ok(()), Ok(())));
        assert!(check.followed(&at(), &got[..70], true).is_err() && check.followed(&at(), &got[..70], false).is_ok());
        let check = with_log(50);
        assert!(check.followed(&at(), &got, true).is_err() && check.followed(&at(), &got[1..], false).is_err());
        assert!(check.followed(&at(), &got, false).is_ok() && check.at_the_end(&BTreeSet::new()).is_err());
        let held = |len| BTreeMap::from([(at(), len)]);
        check.torn(&held(90), &held(60));
        assert!(check.at_the_end(&BTreeSet::new()).is_err(), "the worker still had ten bytes more than came");
        check.torn(&held(60), &held(50));
        assert_eq!(check.at_the_end(&BTreeSet::new()), Ok(()));
    }

    #[test]
    fn zeros_that_an_attempt_without_an_end_wrote_last_may_go() {
        let check = with_log(50);
        let got = |last: [u8; 3]| [&log_bytes(&at(), 0, 50)[..], &last].concat();
        assert_eq!((check.followed(&at(), &got([0; 3]), false), check.at_the_end(&BTreeSet::new())), (Ok(()), Ok(())));
        assert!(check.followed(&at(), &got([0; 3]), true).is_err());
        let check = with_log(50);
        assert!(check.followed(&at(), &got([0, 0, 1]), false).is_ok() && check.at_the_end(&BTreeSet::new()).is_err());
    }

    #[test]
    fn what_a_worker_had_on_its_disk_comes_in_the_end() {
        let check = with_log(50);
        check.spooled(&BTreeMap::from([(at(), 50)]));
        assert_eq!((check.look(&at()), check.at_the_end(&BTreeSet::new())), (Ok(()), Ok(())));
        check.spooled(&BTreeMap::from([(at(), 51)]));
        assert!(check.at_the_end(&BTreeSet::new()).is_err());
        check.produced(&at(), 49);
        assert!(check.look(&at()).is_err() && check.look_at_all(&at()).is_err());
    }
}
