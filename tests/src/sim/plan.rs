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

/// Writes what an attempt's log has from this offset on: lines with a letter of two bytes. One log in four is no text at all.
fn fill(key: u64, from: u64, out: &mut [u8]) {
    let word = |number: u64| mix(key ^ number).to_le_bytes();
    let within = (from & 7) as usize;
    let (head, words) = out.split_at_mut(((8 - within) & 7).min(out.len()));
    head.copy_from_slice(&word(from >> 3)[within..][..head.len()]);
    for (number, part) in (from.div_ceil(8)..).zip(words.chunks_mut(8)) {
        part.copy_from_slice(&word(number)[..part.len()]);
    }
    if key & 3 == 0 {
        return;
    }
    for byte in &mut *out {
        *byte = b'a' + (*byte & 15);
    }
    for (column, letter) in [(20, 0xc3), (21, 0xbc), (60, b'\n')] {
        let first = (column + 61 - from % 61) % 61;
        out.iter_mut().skip(first as usize).step_by(61).for_each(|byte| *byte = letter);
    }
}

fn bytes(key: u64, from: u64, to: u64) -> Bytes {
    let mut out = vec![0; (to - from) as usize];
    fill(key, from, &mut out);
    out.into()
}

pub fn log_bytes(at: &AttemptRef, from: u64, to: u64) -> Bytes {
    bytes(key(at), from, to)
}

/// The first offset from `from` on at which these bytes are not the attempt's log.
pub fn differs(at: &AttemptRef, from: u64, bytes: &[u8]) -> Option<u64> {
    let key = key(at);
    let mut due = [0; 4_096];
    for (have, begins) in bytes.chunks(due.len()).zip((from..).step_by(due.len())) {
        let due = &mut due[..have.len()];
        fill(key, begins, due);
        if have != due {
            let wrong = have.iter().zip(&*due).position(|(have, due)| have != due);
            return wrong.map(|index| begins + index as u64);
        }
    }
    None
}

pub fn file_name(number: u64) -> String {
    format!("out/{number}.bin")
}

/// The bytes of an artifact of this attempt.
pub fn file_bytes(at: &AttemptRef, number: u64) -> Bytes {
    let key = mix(key(at) ^ number << 50);
    bytes(key & !3, 0, key % 20_000)
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
        let whole = log_bytes(&at, 0, 10_000);
        assert!((0..9_000).step_by(997).all(|from| log_bytes(&at, from, 10_000) == whole[from as usize..]));
        assert_eq!(differs(&at, 5, &whole[5..]), None);
        let mut bytes = log_bytes(&at, 100, 300).to_vec();
        assert_eq!(differs(&at, 100, &bytes), None);
        bytes[7] ^= 1;
        assert_eq!(differs(&at, 100, &bytes), Some(107));
        assert!(differs(&at, 101, &log_bytes(&at, 100, 300)).is_some());
    }
}
