//! What a simulated job does, written into its command line, and bytes that anybody can compute again: of a log by its
//! offset, of an artifact by its name.

use std::str::FromStr;

use alloy_shared::id::{AttemptRef, Digest};
use bytes::Bytes;

/// One job's command, as the guest acts it out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Plan {
    pub run_ms: u64,
    pub log: u64,
    /// The command's own code in its first `fails` attempts; afterwards it is 0.
    pub code: i32,
    pub fails: u32,
    pub files: u64,
    /// It goes on when it is told to stop, until it is killed.
    pub stubborn: u64,
    /// It writes all at once and then is quiet.
    pub burst: u64,
}

impl Plan {
    pub fn line(&self) -> String {
        format!(
            "act {} {} {} {} {} {} {}",
            self.run_ms, self.log, self.code, self.fails, self.files, self.stubborn, self.burst
        )
    }

    pub fn exit(&self, attempt: u32) -> i32 {
        if attempt <= self.fails { self.code } else { 0 }
    }
}

impl FromStr for Plan {
    type Err = anyhow::Error;
    fn from_str(text: &str) -> anyhow::Result<Self> {
        let rest = text.strip_prefix("act ").ok_or_else(|| anyhow::anyhow!("`{text}` is no plan"))?;
        let numbers = rest.split(' ').map(str::parse).collect::<Result<Vec<u64>, _>>()?;
        let [run_ms, log, code, fails, files, stubborn, burst] = numbers[..] else { anyhow::bail!("seven numbers") };
        Ok(Self { run_ms, log, code: code as i32, fails: fails as u32, files, stubborn, burst })
    }
}

fn mix(text: u64) -> u64 {
    let mut z = text.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^ (z >> 27)
}

fn key(at: &AttemptRef) -> u64 {
    mix(at.job.raw() as u64 ^ (at.job.raw() >> 64) as u64 ^ u64::from(at.attempt) << 40)
}

/// The byte at this offset of an attempt's log. One log in four is no text at all.
fn byte(key: u64, offset: u64) -> u8 {
    let raw = (mix(key ^ (offset >> 3)) >> (8 * (offset & 7))) as u8;
    match (key & 3, offset % 61) {
        (0, _) => raw,
        (_, 60) => b'\n',
        (_, 20) => 0xc3,
        (_, 21) => 0xbc,
        _ => b'a' + raw % 26,
    }
}

pub fn log_bytes(at: &AttemptRef, from: u64, to: u64) -> Bytes {
    let key = key(at);
    (from..to).map(|offset| byte(key, offset)).collect()
}

/// The first offset from `from` on at which these bytes are not the attempt's log.
pub fn differs(at: &AttemptRef, from: u64, bytes: &[u8]) -> Option<u64> {
    let key = key(at);
    let wrong = bytes.iter().enumerate().position(|(index, have)| *have != byte(key, from + index as u64));
    wrong.map(|index| from + index as u64)
}

pub fn file_name(number: u64) -> String {
    format!("out/{number}.bin")
}

/// The bytes of an artifact of this attempt.
pub fn file_bytes(at: &AttemptRef, number: u64) -> Bytes {
    let key = mix(key(at) ^ number << 50);
    (0..key % 20_000).map(|offset| byte(key & !3, offset)).collect()
}

pub fn file_digest(at: &AttemptRef, number: u64) -> Digest {
    Digest::of(&file_bytes(at, number))
}

#[cfg(test)]
mod tests {
    use alloy_shared::id::JobId;

    use super::*;

    #[test]
    fn a_plan_survives_its_line_and_a_log_can_be_computed_again() {
        let plan = Plan { run_ms: 5, log: 6, code: 7, fails: 1, files: 2, stubborn: 1, burst: 1 };
        assert_eq!(plan.line().parse::<Plan>().unwrap(), plan);
        let at = AttemptRef { job: JobId::from_raw(9), attempt: 2 };
        let mut bytes = log_bytes(&at, 100, 300).to_vec();
        assert_eq!(differs(&at, 100, &bytes), None);
        bytes[7] ^= 1;
        assert_eq!(differs(&at, 100, &bytes), Some(107));
        assert!(differs(&at, 101, &log_bytes(&at, 100, 300)).is_some());
    }
}
