//! T: the conversation between a worker and the orchestrator, on one WebSocket that the worker opens.
//!
//! Text frames are JSON control messages, binary frames are log chunks. Every report of an attempt has a number from 1,
//! is on the worker's disk before it is sent, is sent again until it is acknowledged, and is applied once. An
//! acknowledgement follows the durable commit. Unknown fields are ignored, unknown messages answered `unsupported`.

use std::collections::BTreeMap;

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::ErrorCode;
use super::image::{ImageWish, Inventory};
use super::job::{End, JobSpec, Phase, Timings};
use crate::id::{AttemptRef, BootId, Digest, Labels, OrgId, WorkerId};
use crate::limits;
use crate::secret::Secret;

/// What travels on the socket, and in the simulated network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    Text(String),
    Binary(Bytes),
}

/// One end of a session. A closed channel is a cut connection.
#[derive(Debug)]
pub struct Link {
    pub tx: mpsc::Sender<Frame>,
    pub rx: mpsc::Receiver<Frame>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToOrchestrator {
    Hello(Box<Hello>),
    Heartbeat(Heartbeat),
    /// An attempt's news, numbered.
    Report {
        attempt: AttemptRef,
        seq: u64,
        report: Report,
    },
    /// The slot is free and the last log byte was sent. Changes only the attempt's books.
    Closed {
        attempt: AttemptRef,
        teardown_ms: u64,
        log_len: u64,
    },
    /// Which images there are; the whole truth, at the start and with every change.
    Images(Inventory),
    Goodbye {
        reason: String,
    },
    /// The other side sent a message of this type, which this build does not know.
    Unsupported {
        message: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ToWorker {
    /// The first message: sign this.
    Challenge {
        nonce: String,
    },
    Welcome(Welcome),
    /// The session does not come about.
    Reject {
        code: ErrorCode,
        message: String,
        retry_after_ms: Option<u64>,
    },
    /// Renews the lease from the time the heartbeat was sent. Carries what is wanted, so a lost order heals in one beat.
    HeartbeatAck {
        n: u64,
        orders: Vec<Order>,
    },
    Order {
        order: Order,
    },
    /// Reports up to `seq` are durable.
    EventAck {
        attempt: AttemptRef,
        seq: u64,
    },
    /// The result cannot be accepted yet: resend from here.
    Missing {
        attempt: AttemptRef,
        seq: u64,
        log_len: u64,
        artifacts: Vec<Digest>,
    },
    /// Log bytes below `durable` are on disk.
    LogAck {
        attempt: AttemptRef,
        durable: u64,
    },
    /// Take no more, finish what is held.
    Drain {
        on: bool,
    },
    /// What the farm wishes of images: the whole list, at the start and with every change.
    Images {
        wishes: Vec<ImageWish>,
    },
    Superseded,
    /// The orchestrator is stopping: come back after this.
    Reconnect {
        after_ms: u64,
    },
    Unsupported {
        message: String,
    },
}

/// What the orchestrator wants of one attempt. `reconcile(job, held)` decides it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub enum Order {
    Assign(Box<Assignment>),
    /// Go on; the log is durable up to here and reports up to `seq`.
    Continue {
        attempt: AttemptRef,
        handle: u32,
        log_durable: u64,
        seq: u64,
    },
    Cancel {
        attempt: AttemptRef,
        grace_ms: u64,
    },
    /// The attempt is not yours any more: destroy its VM, forget it.
    Fence {
        attempt: AttemptRef,
    },
    /// The result is durable: spool and state may go.
    ResultAck {
        attempt: AttemptRef,
    },
}

impl Order {
    pub fn attempt(&self) -> AttemptRef {
        match self {
            Self::Assign(assignment) => assignment.attempt,
            Self::Continue { attempt, .. }
            | Self::Cancel { attempt, .. }
            | Self::Fence { attempt }
            | Self::ResultAck { attempt } => *attempt,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub protocol_min: u32,
    pub protocol_max: u32,
    #[serde(default)]
    pub capabilities: Vec<String>,
    pub worker: WorkerId,
    pub boot: BootId,
    /// Ed25519 over [`signed_text`], base64.
    pub signature: String,
    pub version: String,
    /// Facts of the host: os, arch, hostname, … The labels given at enrolment win.
    pub labels: Labels,
    pub slots: Vec<SlotView>,
    pub held: Vec<Held>,
    #[serde(default)]
    pub draining: bool,
    /// What a person should look after on its host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

/// What a worker signs to open a session.
pub fn signed_text(nonce: &str, worker: WorkerId, boot: BootId) -> String {
    format!("alloy worker session\n{nonce}\n{worker}\n{boot}\n")
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    pub protocol: u32,
    pub epoch: i64,
    pub heartbeat_ms: u64,
    pub self_fence_ms: u64,
    pub kill_budget_ms: u64,
    /// True while the operator wants this worker drained.
    pub draining: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    pub n: u64,
    /// The newest heartbeat whose acknowledgement was heard before this one was sent: what was said before that
    /// acknowledgement, the worker knows.
    #[serde(default)]
    pub heard: u64,
    pub slots: Vec<SlotView>,
    pub held: Vec<Held>,
    #[serde(default)]
    pub draining: bool,
    /// What a person should look after on its host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

/// One slot as the orchestrator needs to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotView {
    pub state: SlotState,
    /// The attempt that has it, until the slot is clean again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<AttemptRef>,
    /// The image of its warm VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SlotState {
    Cold,
    Cloning,
    Booting,
    Warm,
    Claimed,
    Held,
    Recycling,
    Quarantined,
}

impl SlotState {
    /// True when a job may be sent to it.
    pub const fn is_free(self) -> bool {
        match self {
            Self::Cold | Self::Cloning | Self::Booting | Self::Warm => true,
            Self::Claimed | Self::Held | Self::Recycling | Self::Quarantined => false,
        }
    }
}

/// One attempt that a worker has on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    pub attempt: AttemptRef,
    pub state: HeldState,
    /// Log bytes in the spool.
    pub log_len: u64,
    /// The number of its newest report.
    pub seq: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeldState {
    Running,
    /// The command has ended and its result is on disk.
    ResultPending,
    /// The daemon died under it: its VM is gone, its log tail may still be sent.
    Lost,
}

/// The worker's right to run one attempt, with all that it needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    pub attempt: AttemptRef,
    /// Names the attempt in log chunks of this session.
    pub handle: u32,
    pub org: OrgId,
    pub spec: JobSpec,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Digest>,
    /// Fetches blobs and puts artifacts of this attempt, while it is open. Never enters the guest.
    pub grant: Secret<String>,
    pub timeout_ms: u64,
    pub cancel_grace_ms: u64,
    pub job_url: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "snake_case")]
pub enum Report {
    Accepted,
    /// This worker cannot run it; nothing was started.
    Refused {
        message: String,
    },
    Phase {
        phase: Phase,
        timings: Timings,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        message: Option<String>,
        /// What the job record keeps of the VM, once there is one: see [`fact`].
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        facts: BTreeMap<String, String>,
    },
    Artifact(ArtifactReport),
    Result(Box<ResultReport>),
}

/// Names of the facts of an attempt that its record keeps. Others are dropped.
pub mod fact {
    /// The image as it was asked for.
    pub const IMAGE: &str = "image";
    /// What the VM was cloned from.
    pub const IMAGE_DIGEST: &str = "image_digest";
    /// `warm` or `cold`, where there is a VM.
    pub const VM_SOURCE: &str = "vm_source";
    pub const ALL: [&str; 3] = [IMAGE, IMAGE_DIGEST, VM_SOURCE];
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArtifactReport {
    pub path: String,
    pub size: u64,
    pub sha256: Digest,
    pub mode: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResultReport {
    pub end: End,
    pub timings: Timings,
    /// The whole log's length; the result waits until the orchestrator has as much.
    pub log_len: u64,
    pub artifacts: u32,
    /// What the job record keeps of the VM: see [`fact`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub facts: BTreeMap<String, String>,
}

/// A slice of log on the wire: `u8 version=1 | u32 handle | u64 offset | u32 length | u32 crc32c(bytes) | bytes`, big-endian.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogChunk {
    pub handle: u32,
    pub offset: u64,
    pub bytes: Bytes,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadFrame {
    #[error("a log chunk is damaged: {0}")]
    Chunk(&'static str),
    #[error("a message is no JSON of ours: {0}")]
    Message(String),
    #[error("unknown message `{0}`")]
    Unknown(String),
}

impl LogChunk {
    /// What stands before the bytes.
    pub const HEADER: usize = 1 + 4 + 8 + 4 + 4;

    pub fn encode(&self) -> Frame {
        let mut frame = BytesMut::with_capacity(Self::HEADER + self.bytes.len());
        frame.put_bytes(0, Self::HEADER);
        frame.put_slice(&self.bytes);
        Self::finish(frame, self.handle, self.offset)
    }

    /// Makes a frame of the log's bytes, which were read behind `HEADER` bytes of room, without moving them.
    pub fn finish(mut frame: BytesMut, handle: u32, offset: u64) -> Frame {
        let (mut header, bytes) = frame.split_at_mut(Self::HEADER);
        header.put_u8(1);
        header.put_u32(handle);
        header.put_u64(offset);
        header.put_u32(bytes.len() as u32);
        header.put_u32(crc32c::crc32c(bytes));
        Frame::Binary(frame.freeze())
    }

    pub fn decode(frame: &Bytes) -> Result<Self, BadFrame> {
        if frame.len() < Self::HEADER || frame[0] != 1 {
            return Err(BadFrame::Chunk("no header of version 1"));
        }
        let number = |at: usize| u32::from_be_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]]);
        let offset = u64::from(number(5)) << 32 | u64::from(number(9));
        let bytes = frame.slice(Self::HEADER..);
        if bytes.len() != number(13) as usize || bytes.len() > limits::LOG_CHUNK_MAX {
            return Err(BadFrame::Chunk("its length is wrong"));
        }
        if crc32c::crc32c(&bytes) != number(17) {
            return Err(BadFrame::Chunk("its checksum is wrong"));
        }
        Ok(Self { handle: number(1), offset, bytes })
    }
}

impl ToOrchestrator {
    pub fn encode(&self) -> Frame {
        encode(self)
    }
    pub fn decode(text: &str) -> Result<Self, BadFrame> {
        decode(text, &["hello", "heartbeat", "report", "closed", "images", "goodbye", "unsupported"])
    }
}

impl ToWorker {
    pub fn encode(&self) -> Frame {
        encode(self)
    }
    pub fn decode(text: &str) -> Result<Self, BadFrame> {
        decode(
            text,
            &[
                "challenge",
                "welcome",
                "reject",
                "heartbeat_ack",
                "order",
                "event_ack",
                "missing",
                "log_ack",
                "drain",
                "images",
                "superseded",
                "reconnect",
                "unsupported",
            ],
        )
    }
}

fn encode<T: Serialize>(message: &T) -> Frame {
    Frame::Text(serde_json::to_string(message).unwrap_or_else(|_| unreachable!("a message is plain data")))
}

fn decode<'a, T: Deserialize<'a>>(text: &'a str, known: &[&str]) -> Result<T, BadFrame> {
    #[derive(Deserialize)]
    struct Kind {
        r#type: String,
    }
    serde_json::from_str(text).map_err(|error| match serde_json::from_str::<Kind>(text) {
        Ok(kind) if !known.contains(&kind.r#type.as_str()) => BadFrame::Unknown(crate::id::printable(&kind.r#type)),
        Ok(_) | Err(_) => BadFrame::Message(error.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::JobId;

    #[test]
    fn a_log_chunk_survives_and_a_damaged_one_is_noticed() {
        let chunk = LogChunk { handle: 7, offset: (5 << 32) + 3, bytes: Bytes::from_static(b"line\nno end") };
        let Frame::Binary(wire) = chunk.encode() else { panic!("binary") };
        assert_eq!(LogChunk::decode(&wire).unwrap(), chunk);
        for at in [0, 13, 16, 17, 21, wire.len() - 1] {
            let mut bad = wire.to_vec();
            bad[at] ^= 1;
            assert!(LogChunk::decode(&bad.into()).is_err(), "flip at {at}");
        }
        assert!(LogChunk::decode(&wire.slice(..wire.len() - 1)).is_err());
    }

    #[test]
    fn an_unknown_message_is_told_from_a_broken_one() {
        assert_eq!(ToWorker::decode(r#"{"type":"sing"}"#), Err(BadFrame::Unknown("sing".into())));
        assert!(matches!(ToWorker::decode(r#"{"type":"drain"}"#), Err(BadFrame::Message(_))));
        assert_eq!(ToWorker::decode(r#"{"type":"drain","on":true,"new_field":1}"#), Ok(ToWorker::Drain { on: true }));
    }

    #[test]
    fn orders_survive_json() {
        let attempt = AttemptRef { job: JobId::from_raw(1), attempt: 2 };
        for order in [
            Order::Fence { attempt },
            Order::Cancel { attempt, grace_ms: 10 },
            Order::Continue { attempt, handle: 1, log_durable: 2, seq: 3 },
        ] {
            let Frame::Text(text) = (ToWorker::Order { order: order.clone() }).encode() else { panic!("text") };
            assert_eq!(ToWorker::decode(&text).unwrap(), ToWorker::Order { order });
        }
    }
}
