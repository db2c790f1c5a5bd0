//! T: a source tree as data: the manifest that names every file, and packs of blobs.
//!
//! A manifest is text: the line `{"alloy_manifest":1}`, then one JSON object an entry, sorted by path bytes. Its digest is the
//! SHA-256 of exactly those bytes. A pack is a sequence of frames, each `u32 big-endian header length | JSON header |
//! bytes`, ended by a zero length; a frame's bytes are one zstd frame, or raw, and hold the blobs that its header lists.

use std::collections::HashSet;

use bytes::{Buf, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use crate::id::{Digest, printable};
use crate::limits;

const FIRST_LINE: &str = "{\"alloy_manifest\":1}";
const HEADER_MAX: usize = 8 << 20;
/// A stored frame is never longer than this: incompressible content is stored raw.
const STORED_MAX: u64 = (limits::BLOB_MAX + limits::FRAME_TARGET) as u64;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadSource {
    #[error("{path}: {why}")]
    Path { path: String, why: String },
    #[error("{0}")]
    Manifest(String),
    #[error("{0}")]
    Pack(String),
    #[error("blob {expected} has other bytes: they hash to {actual}")]
    Digest { expected: Digest, actual: Digest },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    pub path: String,
    pub kind: EntryKind,
    /// 0o755 for executables and directories, 0o644 for the rest.
    pub mode: u32,
    pub size: u64,
    /// A file's pieces in order. Empty for an empty file.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub chunks: Vec<Digest>,
    /// A symbolic link's target, verbatim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryKind {
    File,
    /// Listed only when empty; others follow from their files.
    Dir,
    Symlink,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    entries: Vec<Entry>,
}

impl Entry {
    fn encode(&self, out: &mut Vec<u8>) {
        serde_json::to_writer(out, self).unwrap_or_else(|_| unreachable!("an entry is plain data"));
    }
}

impl Manifest {
    /// Sorts and checks the entries.
    pub fn new(mut entries: Vec<Entry>) -> Result<Self, BadSource> {
        entries.sort_by(|a, b| a.path.as_bytes().cmp(b.path.as_bytes()));
        check_entries(&entries)?;
        Ok(Self { entries })
    }

    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64 + self.entries.len() * 160);
        out.extend_from_slice(FIRST_LINE.as_bytes());
        out.push(b'\n');
        for entry in &self.entries {
            entry.encode(&mut out);
            out.push(b'\n');
        }
        out
    }

    /// Reads the canonical form and nothing else: what decodes encodes to the same bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, BadSource> {
        if bytes.len() > limits::MANIFEST_BYTES_MAX {
            return Err(BadSource::Manifest(format!(
                "the manifest is larger than {} bytes",
                limits::MANIFEST_BYTES_MAX
            )));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| BadSource::Manifest("the manifest is not UTF-8".into()))?;
        let rest = text
            .strip_prefix(FIRST_LINE)
            .and_then(|rest| rest.strip_prefix('\n'))
            .ok_or_else(|| BadSource::Manifest(format!("the first line is not {FIRST_LINE}")))?;
        if !rest.is_empty() && !rest.ends_with('\n') {
            return Err(BadSource::Manifest("the last line is cut off".into()));
        }
        let mut entries = Vec::new();
        let mut again = Vec::new();
        for (number, line) in rest.split_terminator('\n').enumerate() {
            if entries.len() >= limits::MANIFEST_ENTRIES_MAX {
                return Err(BadSource::Manifest(format!("more than {} entries", limits::MANIFEST_ENTRIES_MAX)));
            }
            let entry: Entry = serde_json::from_str(line)
                .map_err(|error| BadSource::Manifest(format!("line {}: {error}", number + 2)))?;
            // Line by line: a second copy of a large manifest would be large too.
            again.clear();
            entry.encode(&mut again);
            if again != line.as_bytes() {
                let why = format!("line {}: the manifest is not in its canonical form", number + 2);
                return Err(BadSource::Manifest(why));
            }
            entries.push(entry);
        }
        check_entries(&entries)?;
        Ok(Self { entries })
    }

    pub fn digest(&self) -> Digest {
        Digest::of(&self.encode())
    }

    /// Every blob that the tree needs, once.
    pub fn blobs(&self) -> Vec<Digest> {
        let mut seen = HashSet::new();
        self.entries.iter().flat_map(|entry| &entry.chunks).filter(|digest| seen.insert(**digest)).copied().collect()
    }

    pub fn total_bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.size).sum()
    }
}

fn check_entries(entries: &[Entry]) -> Result<(), BadSource> {
    if entries.len() > limits::MANIFEST_ENTRIES_MAX {
        return Err(BadSource::Manifest(format!("more than {} entries", limits::MANIFEST_ENTRIES_MAX)));
    }
    let mut total = 0u64;
    let mut leaves: HashSet<&str> = HashSet::with_capacity(entries.len());
    for pair in entries.windows(2) {
        if pair[0].path.as_bytes() >= pair[1].path.as_bytes() {
            return Err(path_error(&pair[1].path, "entries are not sorted, or one is listed twice"));
        }
    }
    for entry in entries {
        check_entry(entry)?;
        total = total.saturating_add(entry.size);
        if entry.kind != EntryKind::Dir {
            leaves.insert(&entry.path);
        }
    }
    if total > limits::SOURCE_BYTES_MAX {
        return Err(BadSource::Manifest(format!("the tree has more than {} bytes", limits::SOURCE_BYTES_MAX)));
    }
    // A file or a link cannot have something below it: writing through a link is how archives escape.
    for entry in entries {
        let mut parent = entry.path.as_str();
        while let Some((up, _)) = parent.rsplit_once('/') {
            if leaves.contains(up) {
                return Err(path_error(&entry.path, &format!("lies below `{}`, which is no directory", printable(up))));
            }
            parent = up;
        }
    }
    Ok(())
}

fn check_entry(entry: &Entry) -> Result<(), BadSource> {
    check_path(&entry.path)?;
    let fail = |why: &str| Err(path_error(&entry.path, why));
    if !matches!(entry.mode, 0o644 | 0o755) {
        return fail("its mode is neither 0644 nor 0755");
    }
    match entry.kind {
        EntryKind::File => {
            if entry.target.is_some() {
                return fail("is a file with a link target");
            }
            let pieces = entry.chunks.len() as u64;
            let most = pieces.saturating_mul(limits::BLOB_MAX as u64);
            if (entry.size == 0) != entry.chunks.is_empty() || entry.size < pieces || entry.size > most {
                return fail("its size does not fit its number of chunks");
            }
        }
        EntryKind::Dir => {
            if entry.target.is_some() || !entry.chunks.is_empty() || entry.size != 0 {
                return fail("is a directory with content");
            }
        }
        EntryKind::Symlink => {
            let target = entry.target.as_deref().unwrap_or("");
            if target.is_empty() || target.len() > limits::PATH_MAX || target.contains('\0') {
                return fail("its link target is empty, too long, or holds a NUL");
            }
            if !entry.chunks.is_empty() || entry.size != 0 {
                return fail("is a link with content");
            }
        }
    }
    Ok(())
}

fn path_error(path: &str, why: &str) -> BadSource {
    BadSource::Path { path: printable(path), why: why.to_owned() }
}

/// The rules for every path from outside: relative, inside the root, plain components.
pub fn check_path(path: &str) -> Result<(), BadSource> {
    let fail = |why: &str| Err(path_error(path, why));
    if path.is_empty() {
        return fail("the path is empty");
    }
    if path.len() > limits::PATH_MAX {
        return fail("the path is longer than 1024 bytes");
    }
    if path.contains('\0') {
        return fail("the path holds a NUL");
    }
    if path.starts_with('/') {
        return fail("the path is absolute");
    }
    let mut depth = 0;
    for part in path.split('/') {
        depth += 1;
        match part {
            "" => return fail("the path has an empty component"),
            "." => return fail("the path has a `.` component"),
            ".." => return fail("the path leaves the root"),
            _ if part.len() > 255 => return fail("a component is longer than 255 bytes"),
            _ => {}
        }
    }
    if depth > limits::PATH_DEPTH_MAX { fail("the path is deeper than 64 directories") } else { Ok(()) }
}

/// True when a link at `path` to `target` stays inside the root, judged by the text alone.
pub fn link_stays_inside(path: &str, target: &str) -> bool {
    if target.starts_with('/') {
        return false;
    }
    let mut depth = path.split('/').count() as i64 - 1;
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => depth -= 1,
            _ => depth += 1,
        }
        if depth < 0 {
            return false;
        }
    }
    true
}

/// Answer of `PUT /v1/sources/{digest}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SourceStatus {
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub digest: Digest,
    /// True when a job may name this source.
    pub complete: bool,
    /// Blobs to send in packs, then `PUT` the manifest again.
    #[cfg_attr(feature = "openapi", schema(value_type = Vec<String>))]
    pub missing: Vec<Digest>,
}

/// Answer of `POST /v1/packs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct PackStored {
    pub blobs: u64,
    pub bytes: u64,
}

/// Body of the worker's blob request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct BlobRequest {
    #[cfg_attr(feature = "openapi", schema(value_type = Vec<String>))]
    pub digests: Vec<Digest>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Codec {
    Zstd,
    Raw,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FrameBlob {
    pub digest: Digest,
    pub size: u32,
}

/// What stands before a frame's bytes. Blobs lie in the unpacked bytes in this order, without a gap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FrameHeader {
    pub codec: Codec,
    /// Bytes that follow.
    pub stored: u32,
    pub blobs: Vec<FrameBlob>,
}

impl FrameHeader {
    pub fn raw_len(&self) -> u64 {
        self.blobs.iter().map(|blob| u64::from(blob.size)).sum()
    }

    fn check(&self) -> Result<(), BadSource> {
        let fail = |why: &str| Err(BadSource::Pack(why.to_owned()));
        if self.blobs.is_empty() {
            return fail("a frame without blobs");
        }
        if self.blobs.iter().any(|blob| blob.size == 0 || blob.size as usize > limits::BLOB_MAX) {
            return fail("a blob of no bytes, or of more than 8 MiB");
        }
        if self.raw_len() > STORED_MAX || u64::from(self.stored) > STORED_MAX + 4096 {
            return fail("a frame of more than 9 MiB");
        }
        match self.codec {
            Codec::Raw if u64::from(self.stored) != self.raw_len() => {
                fail("a raw frame whose length is not that of its blobs")
            }
            Codec::Raw | Codec::Zstd => Ok(()),
        }
    }
}

/// One frame, compressed as received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackFrame {
    pub header: FrameHeader,
    pub stored: Bytes,
}

impl PackFrame {
    /// Compresses blobs into one frame; stores them raw where compression gains less than a sixteenth.
    pub fn pack(blobs: &[(Digest, Bytes)], level: i32) -> Self {
        let list =
            blobs.iter().map(|(digest, bytes)| FrameBlob { digest: *digest, size: bytes.len() as u32 }).collect();
        let mut raw = Vec::with_capacity(blobs.iter().map(|(_, bytes)| bytes.len()).sum());
        for (_, bytes) in blobs {
            raw.extend_from_slice(bytes);
        }
        let (codec, stored) = match zstd::bulk::compress(&raw, level) {
            Ok(small) if small.len() < raw.len() - raw.len() / 16 => (Codec::Zstd, small),
            Ok(_) | Err(_) => (Codec::Raw, raw),
        };
        Self { header: FrameHeader { codec, stored: stored.len() as u32, blobs: list }, stored: stored.into() }
    }

    pub fn encode_header(&self) -> Bytes {
        let json = serde_json::to_vec(&self.header).unwrap_or_else(|_| unreachable!("a header is plain data"));
        let mut out = BytesMut::with_capacity(4 + json.len());
        out.extend_from_slice(&(json.len() as u32).to_be_bytes());
        out.extend_from_slice(&json);
        out.freeze()
    }

    /// The blobs, each checked against its digest.
    pub fn unpack(&self) -> Result<Vec<(Digest, Bytes)>, BadSource> {
        self.header.check()?;
        let want = self.header.raw_len() as usize;
        let raw = match self.header.codec {
            Codec::Raw => self.stored.clone(),
            Codec::Zstd => zstd::bulk::decompress(&self.stored, want)
                .map_err(|error| BadSource::Pack(format!("a frame does not decompress: {error}")))?
                .into(),
        };
        if raw.len() != want {
            return Err(BadSource::Pack(format!("a frame unpacks to {} bytes, its header says {want}", raw.len())));
        }
        let mut rest = raw;
        let mut out = Vec::with_capacity(self.header.blobs.len());
        for blob in &self.header.blobs {
            let bytes = rest.split_to(blob.size as usize);
            let actual = Digest::of(&bytes);
            if actual != blob.digest {
                return Err(BadSource::Digest { expected: blob.digest, actual });
            }
            out.push((blob.digest, bytes));
        }
        Ok(out)
    }
}

/// The four bytes that end a pack. A pack without them was cut off.
pub const PACK_END: [u8; 4] = [0; 4];

/// Cuts a stream of bytes into frames. `push` what arrived, `next` until it gives nothing, `finish` at the end.
#[derive(Debug, Default)]
pub struct PackReader {
    buffer: BytesMut,
    header: Option<FrameHeader>,
    ended: bool,
}

impl PackReader {
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    pub fn next_frame(&mut self) -> Result<Option<PackFrame>, BadSource> {
        if self.ended {
            return if self.buffer.is_empty() {
                Ok(None)
            } else {
                Err(BadSource::Pack("bytes after the pack's end".into()))
            };
        }
        if self.header.is_none() {
            let Some(prefix) = self.buffer.first_chunk::<4>() else { return Ok(None) };
            let len = u32::from_be_bytes(*prefix) as usize;
            if len == 0 {
                self.buffer.advance(4);
                self.ended = true;
                return self.next_frame();
            }
            if len > HEADER_MAX {
                return Err(BadSource::Pack("a frame header of more than 8 MiB".into()));
            }
            if self.buffer.len() < 4 + len {
                return Ok(None);
            }
            let header: FrameHeader = serde_json::from_slice(&self.buffer[4..4 + len])
                .map_err(|error| BadSource::Pack(format!("a frame header is no header: {error}")))?;
            header.check()?;
            self.buffer.advance(4 + len);
            self.header = Some(header);
        }
        match self.header.take() {
            Some(header) if self.buffer.len() >= header.stored as usize => {
                let stored = self.buffer.split_to(header.stored as usize).freeze();
                Ok(Some(PackFrame { header, stored }))
            }
            waiting => {
                self.header = waiting;
                Ok(None)
            }
        }
    }

    /// Succeeds when the pack was whole.
    pub fn finish(&self) -> Result<(), BadSource> {
        if self.ended && self.buffer.is_empty() { Ok(()) } else { Err(BadSource::Pack("the pack is cut off".into())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, content: &[u8]) -> Entry {
        let chunks = if content.is_empty() { vec![] } else { vec![Digest::of(content)] };
        Entry {
            path: path.into(),
            kind: EntryKind::File,
            mode: 0o644,
            size: content.len() as u64,
            chunks,
            target: None,
        }
    }

    fn link(path: &str, target: &str) -> Entry {
        Entry {
            path: path.into(),
            kind: EntryKind::Symlink,
            mode: 0o644,
            size: 0,
            chunks: vec![],
            target: Some(target.into()),
        }
    }

    #[test]
    fn a_manifest_survives_its_text_in_any_order_of_entries() {
        let a = Manifest::new(vec![file("b", b"2"), file("a/x", b""), link("l", "../../etc")]).unwrap();
        let b = Manifest::new(vec![link("l", "../../etc"), file("a/x", b""), file("b", b"2")]).unwrap();
        assert_eq!(a.digest(), b.digest());
        assert_eq!(Manifest::decode(&a.encode()).unwrap(), a);
        assert_eq!(Manifest::decode(&Manifest::default().encode()).unwrap(), Manifest::default());
    }

    #[test]
    fn the_canonical_form_is_fixed() {
        let manifest = Manifest::new(vec![file("a", b"abc")]).unwrap();
        let expected = "{\"alloy_manifest\":1}\n{\"path\":\"a\",\"kind\":\"file\",\"mode\":420,\"size\":3,\"chunks\":[\"ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad\"]}\n";
        assert_eq!(String::from_utf8(manifest.encode()).unwrap(), expected);
    }

    #[test]
    fn hostile_paths_are_refused_by_name() {
        for path in
            ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/.", "a\0b", &"x".repeat(300), &"a/".repeat(65)]
        {
            assert!(check_path(path).is_err(), "{path:?}");
        }
        for entries in [
            vec![file("a", b"1"), file("a", b"2")],
            vec![link("a", "/tmp"), file("a/b", b"1")],
            vec![file("a", b"1"), file("a/b/c", b"1")],
            vec![Entry { mode: 0o4755, ..file("a", b"1") }],
            vec![Entry { size: 0, ..file("a", b"1") }],
            vec![Entry { size: 1 << 40, ..file("a", b"1") }],
        ] {
            assert!(Manifest::new(entries.clone()).is_err(), "{entries:?}");
        }
    }

    #[test]
    fn text_that_is_not_canonical_is_refused() {
        let good = String::from_utf8(Manifest::new(vec![file("a", b"abc"), file("b", b"")]).unwrap().encode()).unwrap();
        for wrong in [
            good.replace("{\"path\"", "{ \"path\""),
            good.replace("\"a\"", "\"c\""),
            good.trim_end().to_owned(),
            good.replace("manifest\":1", "manifest\":2"),
            format!("{good}\n"),
        ] {
            assert!(Manifest::decode(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn links_are_judged_by_their_text() {
        for (path, target, inside) in [
            ("a/l", "../b", true),
            ("a/l", "../../b", false),
            ("l", "a/../b", true),
            ("l", "..", false),
            ("a/b/l", "../../c", true),
            ("l", "/etc", false),
            ("a/l", "../../a/b", false),
        ] {
            assert_eq!(link_stays_inside(path, target), inside, "{path} -> {target}");
        }
    }

    fn sample() -> Vec<(Digest, Bytes)> {
        let blobs: [Vec<u8>; 3] =
            [b"hello ".repeat(1000), vec![7], (0..5000u32).map(|i| ((i * i) >> 3) as u8).collect()];
        blobs.into_iter().map(|bytes| (Digest::of(&bytes), bytes.into())).collect()
    }

    #[test]
    fn a_pack_cut_anywhere_is_noticed_and_a_whole_one_survives_any_split() {
        let frame = PackFrame::pack(&sample(), 3);
        let mut wire = frame.encode_header().to_vec();
        wire.extend_from_slice(&frame.stored);
        wire.extend_from_slice(&PACK_END);
        for step in [1, 7, 4096, wire.len()] {
            let mut reader = PackReader::default();
            let mut blobs = Vec::new();
            for part in wire.chunks(step) {
                reader.push(part);
                while let Some(frame) = reader.next_frame().unwrap() {
                    blobs.extend(frame.unpack().unwrap());
                }
            }
            reader.finish().unwrap();
            assert_eq!(blobs, sample());
        }
        for cut in 0..wire.len() {
            let mut reader = PackReader::default();
            reader.push(&wire[..cut]);
            while reader.next_frame().unwrap().is_some() {}
            assert!(reader.finish().is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn changed_bytes_never_pass_as_the_blob() {
        for codec_level in [3, 19] {
            let good = PackFrame::pack(&sample(), codec_level);
            for at in (0..good.stored.len()).step_by(97) {
                let mut bytes = good.stored.to_vec();
                bytes[at] ^= 0x20;
                let bad = PackFrame { stored: bytes.into(), ..good.clone() };
                if let Ok(blobs) = bad.unpack() {
                    assert_eq!(blobs, sample(), "flip at {at} gave other bytes");
                }
            }
        }
    }
}
