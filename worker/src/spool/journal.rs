//! D: the journal's lines: a checksum, then one JSON record. A torn or damaged line ends what can be trusted.

use alloy_shared::id::Digest;
use alloy_shared::wire::session::{Assignment, Report};
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Assignment(Box<Assignment>),
    Report { seq: u64, report: Report },
}

/// Everything before the first damage.
#[derive(Debug, Default)]
pub(super) struct Journal {
    pub(super) assignment: Option<Assignment>,
    pub(super) reports: Vec<(u64, Report)>,
    /// Bytes that were understood.
    pub(super) good: usize,
    /// A complete line was wrong: more than the torn end of an interrupted write.
    pub(super) damaged: bool,
}

pub(super) fn assignment_line(assignment: &Assignment) -> Vec<u8> {
    encode(&Line::Assignment(Box::new(assignment.clone())))
}

pub(super) fn report_line(seq: u64, report: &Report) -> Vec<u8> {
    encode(&Line::Report { seq, report: report.clone() })
}

fn encode(line: &Line) -> Vec<u8> {
    let json = serde_json::to_string(line).unwrap_or_else(|_| unreachable!("a record is plain data"));
    format!("{:08x} {json}\n", checksum(json.as_bytes())).into_bytes()
}

pub(super) fn read(bytes: &[u8]) -> Journal {
    let mut journal = Journal::default();
    while let Some(end) = bytes[journal.good..].iter().position(|byte| *byte == b'\n') {
        let Some(line) = decode(&bytes[journal.good..journal.good + end]) else {
            journal.damaged = true;
            break;
        };
        match line {
            Line::Assignment(assignment) => journal.assignment = Some(*assignment),
            Line::Report { seq, report } => journal.reports.push((seq, report)),
        }
        journal.good += end + 1;
    }
    journal
}

fn decode(line: &[u8]) -> Option<Line> {
    let (check, json) = line.split_at_checked(9)?;
    let check = u32::from_str_radix(std::str::from_utf8(check).ok()?.strip_suffix(' ')?, 16).ok()?;
    if check == checksum(json) { serde_json::from_slice(json).ok() } else { None }
}

/// Four bytes of the SHA-256: they tell a torn or rotten line from a whole one.
fn checksum(json: &[u8]) -> u32 {
    let [a, b, c, d, ..] = Digest::of(json).0;
    u32::from_be_bytes([a, b, c, d])
}
