//! Archives made by hand, byte by byte: ordinary writers refuse to write them. Each starts with an honest file.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::GzEncoder;

/// What the honest first file holds. Nothing else on the farm has these bytes.
pub(crate) const CANARY: &[u8] = b"the canary of the hostile archives: nobody may find it stored\n";

pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) bytes: Vec<u8>,
    /// What the refusal must name.
    pub(crate) named: &'static str,
}

pub(crate) fn hostile() -> Vec<Case> {
    let tar = |name, named, entries: Vec<u8>| Case { name, kind: "application/x-tar", bytes: whole(entries), named };
    let mut cases = vec![
        tar("leaves", "../evil", file("../evil", b"x")),
        tar("leaves-inside", "a/../../evil", file("a/../../evil", b"x")),
        tar("absolute", "/tmp/evil", file("/tmp/evil", b"x")),
        tar("char-device", "null", entry("null", b'3', "", b"")),
        tar("block-device", "disk", entry("disk", b'4', "", b"")),
        tar("fifo", "pipe", entry("pipe", b'6', "", b"")),
        tar("through-a-link", "a/evil", [entry("a", b'2', "/tmp", b""), file("a/evil", b"x")].concat()),
        tar("through-an-inner-link", "a/b", [entry("a", b'2', "..", b""), file("a/b", b"x")].concat()),
        tar("hard-link-out", "hard", entry("hard", b'1', "/etc/passwd", b"")),
        tar("hard-link-up", "hard", entry("hard", b'1', "../../etc/passwd", b"")),
        tar("hard-link-to-nothing", "hard", entry("hard", b'1', "absent", b"")),
        tar("twice", "twin", [file("twin", b"one"), file("twin", b"two")].concat()),
        tar("below-a-file", "twin/x", [file("twin", b"one"), file("twin/x", b"two")].concat()),
        tar("empty-name", "", file("", b"x")),
        tar("unknown-type", "odd", entry("odd", b'Z', "", b"")),
        tar("header-sum", "sum", bad_sum(file("sum", b"x"))),
        tar("pax-path", "../evil", [pax("path", "../evil"), file("fine", b"x")].concat()),
        tar("not-utf8", "name", raw_entry(b"bad\xffname", b'0', b"", b"x")),
    ];
    cases.extend(damaged());
    cases
}

/// Faults of the wrapping rather than of an entry.
fn damaged() -> Vec<Case> {
    let good = whole(Vec::new());
    let (gzip, zstd) = (gzip(&good), zstd_of(&good));
    let mut bad_crc = gzip.clone();
    let at = bad_crc.len() - 6;
    bad_crc[at] ^= 1;
    let mut bad_frame = zstd.clone();
    let at = bad_frame.len() - 1;
    bad_frame[at] ^= 1;
    let zeros = whole(file("zeros", &vec![0; 16 << 20]));
    let case = |name, kind, bytes, named| Case { name, kind, bytes, named };
    vec![
        case("gzip-crc", "application/gzip", bad_crc, "archive"),
        case("zstd-sum", "application/zstd", bad_frame, "archive"),
        case("gzip-tail", "application/gzip", [gzip.clone(), b"garbage".to_vec()].concat(), "archive"),
        case("zstd-tail", "application/zstd", [zstd.clone(), b"garbage".to_vec()].concat(), "archive"),
        case("tar-tail", "application/x-tar", [good.clone(), vec![b'x'; 512]].concat(), "archive"),
        case("cut-gzip", "application/gzip", gzip[..gzip.len() - 9].to_vec(), "archive"),
        case("cut-tar", "application/x-tar", good[..700].to_vec(), "archive"),
        case("gzip-bomb", "application/gzip", self::gzip(&zeros), "expands"),
        case("zstd-bomb", "application/zstd", zstd_of(&zeros), "expands"),
        case("no-archive", "application/x-tar", b"hello".repeat(300), "checksum"),
    ]
}

/// The honest file, the entries, and the two empty blocks.
fn whole(entries: Vec<u8>) -> Vec<u8> {
    [file("canary", CANARY), entries, vec![0; 1024]].concat()
}

fn file(path: &str, content: &[u8]) -> Vec<u8> {
    entry(path, b'0', "", content)
}

fn entry(path: &str, kind: u8, link: &str, content: &[u8]) -> Vec<u8> {
    raw_entry(path.as_bytes(), kind, link.as_bytes(), content)
}

/// A ustar header and its content, padded.
fn raw_entry(path: &[u8], kind: u8, link: &[u8], content: &[u8]) -> Vec<u8> {
    let mut header = [0u8; 512];
    header[..path.len()].copy_from_slice(path);
    header[100..108].copy_from_slice(b"0000644\0");
    header[108..116].copy_from_slice(b"0000000\0");
    header[116..124].copy_from_slice(b"0000000\0");
    header[124..136].copy_from_slice(format!("{:011o}\0", content.len()).as_bytes());
    header[136..148].copy_from_slice(b"00000000000\0");
    header[156] = kind;
    header[157..157 + link.len()].copy_from_slice(link);
    header[257..265].copy_from_slice(b"ustar\x0000");
    header[148..156].copy_from_slice(b"        ");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut out = header.to_vec();
    out.extend_from_slice(content);
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

fn bad_sum(mut entry: Vec<u8>) -> Vec<u8> {
    entry[149] ^= 1;
    entry
}

fn pax(key: &str, value: &str) -> Vec<u8> {
    let rest = format!(" {key}={value}\n");
    let length = (rest.len()..).find(|total| total.to_string().len() + rest.len() == *total).unwrap();
    entry("pax", b'x', "", format!("{length}{rest}").as_bytes())
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = GzEncoder::new(Vec::new(), Compression::best());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn zstd_of(bytes: &[u8]) -> Vec<u8> {
    let mut out = zstd::Encoder::new(Vec::new(), 3).unwrap();
    out.include_checksum(true).unwrap();
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}
