//! Whether stored bytes are an attempt's log: a prefix of what it wrote, or such a prefix, a line that counts what is left
//! out, and the end.

use alloy_shared::id::AttemptRef;

use super::plan::differs;

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

    use super::super::plan::log_bytes;
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
}
