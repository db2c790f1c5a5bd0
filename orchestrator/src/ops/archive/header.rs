//! D: one header block of a tar, and the extended headers before it.

use super::{Unread, bad, bad_entry};

pub(super) const BLOCK: usize = 512;
/// An octal size field ends here; a larger size is in the PAX header, and the field then says nothing.
const OCTAL_MAX: u64 = 0o77777777777;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    HardLink,
    Symlink,
    Dir,
    Pax,
    PaxGlobal,
    LongName,
    LongLink,
}

#[derive(Debug, Clone)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) path: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) mode: u32,
    pub(super) size: u64,
}

impl Header {
    pub(super) fn read(block: &[u8; BLOCK]) -> Result<Self, Unread> {
        let raw = tar::Header::from_byte_slice(block);
        let path = raw.path_bytes().into_owned();
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        let field: u32 = block[148..156].iter().map(|byte| u32::from(*byte)).sum();
        if raw.cksum().ok() != Some(sum - field + 8 * u32::from(b' ')) {
            return bad_entry(&path, "its header's checksum is wrong");
        }
        let magic = &block[257..265];
        if magic != b"ustar\x0000" && magic != b"ustar  \0" && magic.iter().any(|byte| *byte != 0) {
            return bad_entry(&path, "its header is of a format that nobody knows");
        }
        let size = match number(&block[124..136]) {
            Some(size) => size,
            None => return bad_entry(&path, "its size is no number"),
        };
        let Some(mode) = number(&block[100..108]).map(|mode| mode as u32) else {
            return bad_entry(&path, "its mode is no number");
        };
        let kind = match block[156] {
            b'0' | 0 => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'5' => Kind::Dir,
            b'x' => Kind::Pax,
            b'g' => Kind::PaxGlobal,
            b'L' => Kind::LongName,
            b'K' => Kind::LongLink,
            b'3' => return bad_entry(&path, "is a character device"),
            b'4' => return bad_entry(&path, "is a block device"),
            b'6' => return bad_entry(&path, "is a FIFO"),
            b'7' => return bad_entry(&path, "is a contiguous file, which nobody writes"),
            b'S' => return bad_entry(&path, "is a sparse file; write the archive without --sparse"),
            b's' => return bad_entry(&path, "is a socket"),
            b'M' | b'N' | b'V' | b'D' | b'A' | b'E' | b'I' | b'X' => {
                return bad_entry(&path, "is of a kind that only its own tar understands");
            }
            other => return bad_entry(&path, &format!("is of the unknown kind {:?}", char::from(other))),
        };
        let link = raw.link_name_bytes().map(std::borrow::Cow::into_owned).unwrap_or_default();
        Ok(Self { kind, path, link, mode, size })
    }

    /// Judges the entry once its extended headers are applied.
    fn check(self) -> Result<Self, Unread> {
        if self.path.contains(&0) || self.link.contains(&0) {
            return bad_entry(&self.path, "its name or target holds a NUL");
        }
        match self.kind {
            Kind::Dir | Kind::Symlink | Kind::HardLink if self.size != 0 => {
                bad_entry(&self.path, "is a directory or link with content")
            }
            Kind::File | Kind::Dir if !self.link.is_empty() => {
                bad_entry(&self.path, "is no link and has a link's target")
            }
            _ => Ok(self),
        }
    }
}

/// Octal digits between spaces and NULs, or a base-256 number without a sign.
fn number(field: &[u8]) -> Option<u64> {
    if let Some((0x80, rest)) = field.split_first() {
        let (high, low) = rest.split_at(rest.len().saturating_sub(8));
        if high.iter().any(|byte| *byte != 0) {
            return None;
        }
        return Some(low.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)));
    }
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    let (text, rest) = field.split_at(end);
    let text = text.trim_ascii();
    if rest.iter().any(|byte| !matches!(byte, 0 | b' ')) {
        return None;
    }
    text.iter().try_fold(0u64, |sum, digit| match digit {
        b'0'..=b'7' => sum.checked_mul(8)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

/// What extended headers say about the entry that follows.
#[derive(Debug, Default)]
pub(super) struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    pax: bool,
}

impl Extended {
    pub(super) fn is_empty(&self) -> bool {
        !self.pax && self.path.is_none() && self.link.is_none()
    }

    pub(super) fn read(&mut self, header: &Header, data: &[u8]) -> Result<(), Unread> {
        match header.kind {
            Kind::LongName => set(&mut self.path, long(data), "path"),
            Kind::LongLink => set(&mut self.link, long(data), "link target"),
            Kind::Pax if self.pax => bad("two PAX headers for one entry"),
            Kind::Pax => {
                self.pax = true;
                self.records(data, false)
            }
            Kind::PaxGlobal => self.records(data, true),
            Kind::File | Kind::Dir | Kind::Symlink | Kind::HardLink => Ok(()),
        }
    }

    /// Records are `LENGTH KEY=VALUE\n`, the length that of the whole record.
    fn records(&mut self, mut data: &[u8], global: bool) -> Result<(), Unread> {
        while !data.is_empty() {
            let Some((key, value, rest)) = record(data) else { return bad("a PAX header that cannot be read") };
            data = rest;
            let name = String::from_utf8_lossy(key);
            match key {
                b"path" | b"linkpath" | b"size" if global => {
                    return bad(format!("a global PAX header that sets `{name}` for all entries"));
                }
                // Half of the readers take the newline for the record's end, and would see another name.
                b"path" | b"linkpath" if value.contains(&b'\n') => {
                    return bad_entry(value, "its name in the PAX header holds a newline");
                }
                b"path" => set(&mut self.path, value, "path")?,
                b"linkpath" => set(&mut self.link, value, "link target")?,
                b"size" => {
                    let size = std::str::from_utf8(value).ok().filter(|text| text.bytes().all(|c| c.is_ascii_digit()));
                    match size.and_then(|text| text.parse().ok()) {
                        Some(size) if self.size.is_none() => self.size = Some(size),
                        _ => return bad("a PAX header with two sizes, or one that is no number"),
                    }
                }
                b"hdrcharset" if value != b"ISO-IR 10646 2000 UTF-8" => {
                    return bad("a PAX header whose names are not UTF-8");
                }
                b"SCHILY.realsize" => return bad("a sparse file; write the archive without --sparse"),
                _ if key.starts_with(b"GNU.sparse.") => {
                    return bad("a sparse file; write the archive without --sparse");
                }
                // Times, owners, attributes, comments: nothing that a source keeps.
                _ => {}
            }
        }
        Ok(())
    }

    /// The entry as it is meant.
    pub(super) fn apply(self, mut header: Header) -> Result<Header, Unread> {
        if let Some(path) = self.path {
            header.path = path;
        }
        if let Some(link) = self.link {
            header.link = link;
        }
        // Before directories had a kind of their own, a slash at the end of a file's name marked them.
        if header.kind == Kind::File && header.path.ends_with(b"/") {
            header.kind = Kind::Dir;
        }
        match self.size {
            Some(size) if size == header.size => {}
            Some(size) if size > OCTAL_MAX && matches!(header.size, 0 | OCTAL_MAX) => header.size = size,
            Some(_) => return bad_entry(&header.path, "its two sizes differ"),
            None => {}
        }
        header.check()
    }
}

fn set(slot: &mut Option<Vec<u8>>, value: &[u8], what: &str) -> Result<(), Unread> {
    if slot.is_some() || value.is_empty() {
        return bad_entry(value, &format!("the {what} is given twice, or empty"));
    }
    *slot = Some(value.to_vec());
    Ok(())
}

/// GNU's long names end in a NUL.
fn long(data: &[u8]) -> &[u8] {
    data.strip_suffix(&[0]).unwrap_or(data)
}

fn record(data: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = data.iter().take(8).position(|byte| *byte == b' ')?;
    let digits = std::str::from_utf8(&data[..space]).ok().filter(|text| text.bytes().all(|c| c.is_ascii_digit()))?;
    let len: usize = digits.parse().ok()?;
    let (record, rest) = data.split_at_checked(len)?;
    let body = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|byte| *byte == b'=')?;
    (equals > 0).then(|| (&body[..equals], &body[equals + 1..], rest))
}
