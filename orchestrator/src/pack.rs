//! D: many small blobs in one object. An object is a pack as it travels, frames with their headers, so that a frame is
//! checked once, stored as received, and sent on as stored.

use std::collections::BTreeMap;
use std::collections::HashSet;

use alloy_shared::env::Ms;
use alloy_shared::id::{Digest, OrgId};
use alloy_shared::wire::source::{BadSource, Codec, PackFrame, PackReader};
use bytes::{Bytes, BytesMut};

use crate::store::{Blob, BlobKind, Place};

/// A frame on the wire: its header, then its bytes.
pub fn encode(frame: &PackFrame) -> Bytes {
    let header = frame.encode_header();
    let mut out = BytesMut::with_capacity(header.len() + frame.stored.len());
    out.extend_from_slice(&header);
    out.extend_from_slice(&frame.stored);
    out.freeze()
}

/// Reads one stored frame.
pub fn decode(bytes: &[u8]) -> Result<PackFrame, BadSource> {
    let mut reader = PackReader::default();
    reader.push(bytes);
    let frame = reader.next_frame()?;
    frame.ok_or_else(|| BadSource::Pack("a stored frame is cut off".to_owned()))
}

/// Succeeds when every blob of a frame has the bytes that its digest says; returns how many bytes they are.
pub fn verify(frame: &PackFrame) -> Result<u64, BadSource> {
    frame.unpack().map(|blobs| blobs.iter().map(|(_, bytes)| bytes.len() as u64).sum())
}

/// Where a frame's blobs are, once it lies at `frame_at` of `object`. `stored` counts its header too.
pub fn rows(org: OrgId, object: &str, at: Ms, frame_at: u64, stored: u32, frame: &PackFrame) -> Vec<Blob> {
    let raw_len = frame.header.raw_len() as u32;
    let zstd = match frame.header.codec {
        Codec::Zstd => true,
        Codec::Raw => false,
    };
    let mut raw_at = 0;
    let mut out = Vec::with_capacity(frame.header.blobs.len());
    for blob in &frame.header.blobs {
        let place = Place::Packed { object: object.to_owned(), frame_at, stored, zstd, raw_len, raw_at };
        raw_at += blob.size;
        let (digest, size) = (blob.digest, u64::from(blob.size));
        out.push(Blob { org, digest, kind: BlobKind::Chunk, size, place, created_at: at, used_at: at });
    }
    out
}

/// One read of the blob store, and what of it to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameRead {
    pub object: String,
    pub at: u64,
    pub stored: u32,
    pub send: Portion,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Portion {
    /// The frame as it is: at least half of it is wanted. Its other blobs travel with it, and receivers leave them alone.
    Whole,
    /// These blobs of the frame, in a frame of their own.
    Some(Vec<Digest>),
    /// The object is the blob.
    Blob(Digest),
}

/// The fewest reads that give these blobs, in the order of objects and offsets, each frame once.
pub fn plan(blobs: &[Blob]) -> Vec<FrameRead> {
    struct Frame {
        stored: u32,
        raw_len: u32,
        wanted: u64,
        digests: Vec<Digest>,
    }
    let mut seen = HashSet::new();
    let mut frames: BTreeMap<(&str, u64), Frame> = BTreeMap::new();
    let mut out = Vec::new();
    for blob in blobs.iter().filter(|blob| seen.insert(blob.digest)) {
        match &blob.place {
            Place::Alone { object } => out.push(FrameRead {
                object: object.clone(),
                at: 0,
                stored: u32::try_from(blob.size).unwrap_or(u32::MAX),
                send: Portion::Blob(blob.digest),
            }),
            Place::Packed { object, frame_at, stored, raw_len, .. } => {
                let fresh = || Frame { stored: *stored, raw_len: *raw_len, wanted: 0, digests: Vec::new() };
                let frame = frames.entry((object, *frame_at)).or_insert_with(fresh);
                frame.wanted += blob.size;
                frame.digests.push(blob.digest);
            }
        }
    }
    out.extend(frames.into_iter().map(|((object, at), frame)| FrameRead {
        object: object.to_owned(),
        at,
        stored: frame.stored,
        send: if frame.wanted * 2 >= u64::from(frame.raw_len) { Portion::Whole } else { Portion::Some(frame.digests) },
    }));
    out
}

/// Turns what a read gave into the frame to send.
pub fn pick(read: &FrameRead, bytes: Bytes) -> Result<Bytes, BadSource> {
    match &read.send {
        Portion::Whole => Ok(bytes),
        Portion::Some(wanted) => {
            let mut blobs = decode(&bytes)?.unpack()?;
            blobs.retain(|(digest, _)| wanted.contains(digest));
            Ok(encode(&PackFrame::pack(&blobs, RESEND_LEVEL)))
        }
        Portion::Blob(digest) => Ok(encode(&PackFrame::pack(&[(*digest, bytes)], RESEND_LEVEL))),
    }
}

/// What is packed only to be sent is compressed lightly.
const RESEND_LEVEL: i32 = 1;

#[cfg(test)]
mod tests {
    use alloy_shared::id::DEFAULT_ORG;

    use super::*;

    fn blob(text: String) -> (Digest, Bytes) {
        (Digest::of(text.as_bytes()), text.into())
    }

    #[test]
    fn what_is_planned_and_picked_is_what_was_asked() {
        let all: Vec<(Digest, Bytes)> = (0..60).map(|i| blob(format!("{i} ").repeat(10 + i * 7))).collect();
        let (mut object, mut index) = (Vec::new(), Vec::new());
        for blobs in all.chunks(10) {
            let frame = PackFrame::pack(blobs, 3);
            let bytes = encode(&frame);
            index.extend(rows(DEFAULT_ORG, "p", Ms(1), object.len() as u64, bytes.len() as u32, &frame));
            object.extend_from_slice(&bytes);
        }
        for (every, frames, whole) in [(1, 6, 6), (2, 6, 0), (10, 6, 0), (59, 2, 0)] {
            let mut asked: Vec<Blob> = index.iter().step_by(every).cloned().collect();
            asked.reverse();
            asked.extend(index.first().cloned());
            let reads = plan(&asked);
            assert_eq!(reads.len(), frames, "every {every}");
            assert!(reads.is_sorted_by_key(|read| read.at));
            assert!(reads.iter().filter(|read| read.send == Portion::Whole).count() >= whole);
            let mut got: BTreeMap<Digest, Bytes> = BTreeMap::new();
            for read in &reads {
                let stored = Bytes::copy_from_slice(&object[read.at as usize..][..read.stored as usize]);
                got.extend(decode(&pick(read, stored).unwrap()).unwrap().unpack().unwrap());
            }
            for blob in &asked {
                assert_eq!(got.get(&blob.digest), all.iter().find(|(d, _)| *d == blob.digest).map(|(_, b)| b));
            }
        }
    }

    #[test]
    fn a_frame_of_which_little_is_not_wanted_travels_as_it_is() {
        let all: Vec<(Digest, Bytes)> = (0..4).map(|i| blob(format!("{i}").repeat(100))).collect();
        let frame = PackFrame::pack(&all, 3);
        let bytes = encode(&frame);
        let index = rows(DEFAULT_ORG, "p", Ms(1), 0, bytes.len() as u32, &frame);
        for (asked, sent) in [(1, 1), (2, 4), (3, 4), (4, 4)] {
            let [read] = plan(&index[..asked]).try_into().unwrap();
            let travels = pick(&read, bytes.clone()).unwrap();
            assert_eq!(decode(&travels).unwrap().unpack().unwrap(), all[..sent], "{asked} asked");
        }
    }

    #[test]
    fn a_blob_alone_becomes_a_frame() {
        let (digest, bytes) = blob("alone".into());
        let place = Place::Alone { object: "o".into() };
        let row =
            Blob { org: DEFAULT_ORG, digest, kind: BlobKind::Chunk, size: 5, place, created_at: Ms(0), used_at: Ms(0) };
        let reads = plan(&[row]);
        assert_eq!((reads.len(), reads[0].stored), (1, 5));
        assert_eq!(decode(&pick(&reads[0], bytes.clone()).unwrap()).unwrap().unpack().unwrap(), vec![(digest, bytes)]);
    }

    #[test]
    fn a_frame_with_other_bytes_is_refused() {
        let frame = PackFrame::pack(&[blob("x".repeat(100)), blob("y".into())], 3);
        assert_eq!(verify(&frame), Ok(101));
        let mut wrong = frame.clone();
        wrong.header.blobs.swap(0, 1);
        assert!(verify(&wrong).is_err());
        assert!(decode(&encode(&frame)[..20]).is_err());
    }
}
