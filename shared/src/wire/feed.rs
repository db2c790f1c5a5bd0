//! T: the feed of one job, frame by frame, and where a follower is in it.

use serde::{Deserialize, Serialize};

use super::job::{ArtifactView, JobView, Phase, Reason, StateWord, words};
use crate::id::{BadName, WorkerId};

/// One line of the feed. `event` and `log` carry the cursor to go on from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FeedFrame {
    Event(JobEvent),
    Log(LogFrame),
    Worker(WorkerNews),
    /// The last frame: nothing follows.
    End {
        job: Box<JobView>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct JobEvent {
    /// From 1, without a gap.
    pub seq: u64,
    pub at: String,
    pub attempt: u32,
    pub kind: EventKind,
    pub state: StateWord,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    pub worker: Option<WorkerId>,
    /// One sentence for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact: Option<Box<ArtifactView>>,
}

/// The worker that holds the job is not heard, or is heard again. It is told from what the farm hears at this moment: it is
/// no part of the job's record, and whoever comes later hears it only while it is so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct WorkerNews {
    pub at: String,
    pub attempt: u32,
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub worker: WorkerId,
    pub worker_name: String,
    /// False: it is back.
    pub silent: bool,
    /// When the worker's attempt counts as lost, if nothing is heard until then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost_at: Option<String>,
    /// One sentence for people.
    pub message: String,
}

words!(/** What an event tells. */ EventKind, "a kind of event" {
    Submitted = "submitted",
    Assigned = "assigned",
    Accepted = "accepted",
    Phase = "phase",
    Artifact = "artifact",
    CancelRequested = "cancel_requested",
    /** An attempt ended and the job goes back to the queue. */ Requeued = "requeued",
    Finished = "finished",
});

/// A slice of an attempt's log. Exactly one of `text` and `base64`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct LogFrame {
    pub attempt: u32,
    /// Offset of the first byte.
    pub offset: u64,
    /// The bytes, when they are whole UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base64: Option<String>,
}

impl LogFrame {
    pub fn new(attempt: u32, offset: u64, bytes: &[u8]) -> Self {
        use base64::Engine as _;
        match std::str::from_utf8(bytes) {
            Ok(text) => Self { attempt, offset, text: Some(text.to_owned()), base64: None },
            Err(_) => Self {
                attempt,
                offset,
                text: None,
                base64: Some(base64::engine::general_purpose::STANDARD.encode(bytes)),
            },
        }
    }

    /// The bytes again; `None` if the frame is damaged.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        use base64::Engine as _;
        match (&self.text, &self.base64) {
            (Some(text), None) => Some(text.as_bytes().to_vec()),
            (None, Some(encoded)) => base64::engine::general_purpose::STANDARD.decode(encoded).ok(),
            (None, None) | (Some(_), Some(_)) => None,
        }
    }
}

/// Where a follower is: the last event it saw, and how far into which attempt's log. Written `event.attempt.offset`;
/// it is the id of every SSE message, and `?cursor=` or `Last-Event-ID` takes it back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct FeedCursor {
    pub event: u64,
    pub attempt: u32,
    pub offset: u64,
}

impl std::fmt::Display for FeedCursor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.event, self.attempt, self.offset)
    }
}

impl std::str::FromStr for FeedCursor {
    type Err = BadName;
    fn from_str(text: &str) -> Result<Self, BadName> {
        let wrong = || BadName { what: "a cursor", why: "is written event.attempt.offset, three numbers".to_owned() };
        let mut parts = text.split('.');
        let mut next = || parts.next().ok_or_else(wrong);
        let cursor = Self {
            event: next()?.parse().map_err(|_| wrong())?,
            attempt: next()?.parse().map_err(|_| wrong())?,
            offset: next()?.parse().map_err(|_| wrong())?,
        };
        if parts.next().is_some() { Err(wrong()) } else { Ok(cursor) }
    }
}

impl FeedCursor {
    /// The cursor after this frame.
    pub fn advance(&mut self, frame: &FeedFrame) {
        match frame {
            FeedFrame::Event(event) => self.event = event.seq,
            FeedFrame::Log(log) => {
                self.attempt = log.attempt;
                let len = match (&log.text, &log.base64) {
                    (Some(text), _) => text.len() as u64,
                    (None, _) => log.bytes().map_or(0, |bytes| bytes.len() as u64),
                };
                self.offset = log.offset + len;
            }
            FeedFrame::Worker(_) | FeedFrame::End { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_frame_carries_any_bytes() {
        for bytes in [&b""[..], b"plain\n", b"\xff\x00half \xc3", "ü\r\n".as_bytes()] {
            let frame = LogFrame::new(1, 5, bytes);
            assert_eq!(frame.bytes().unwrap(), bytes);
            let mut cursor = FeedCursor::default();
            cursor.advance(&FeedFrame::Log(frame));
            assert_eq!(cursor.offset, 5 + bytes.len() as u64);
        }
    }

    #[test]
    fn a_cursor_survives_its_text() {
        let cursor = FeedCursor { event: 3, attempt: 2, offset: 1 << 40 };
        assert_eq!(cursor.to_string().parse::<FeedCursor>().unwrap(), cursor);
        for wrong in ["", "1", "1.2", "1.2.3.4", "a.b.c", "1.2.-3"] {
            assert!(wrong.parse::<FeedCursor>().is_err(), "{wrong}");
        }
    }
}
