//! D: a plain tar, as `tar | curl` sends it, read strictly in one pass and turned into a manifest and blobs.
//!
//! Readers of tar differ in what they forgive, and archives are smuggled through the differences. So this one forgives
//! nothing: what it does not know, what is said twice, and what does not add up is refused, with the entry's name.
//!
//! Accepted: regular files, directories, symbolic links (verbatim, as in any source), hard links to earlier files; ustar,
//! PAX and GNU long names; a leading `./`. Only the owner's executable bit is kept. Left out, because macOS adds them by
//! itself: AppleDouble files `._*` and `.DS_Store`. Several gzip members or zstd frames in a row are one stream, as their
//! tools write and read them; anything else after the end is refused.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::io::{BufRead as _, BufReader, ErrorKind, Read};
use std::rc::Rc;

use alloy_shared::id::{Digest, printable};
use alloy_shared::limits;
use alloy_shared::wire::source::{BadSource, Entry, EntryKind, Manifest, check_path};
use bytes::Bytes;

mod header;
#[cfg(test)]
mod tests;

use header::{Extended, Header, Kind};

/// The first MiB of an archive may expand as it likes.
const RATIO_FREE: u64 = 1 << 20;
/// zstd's default bound: a stream cannot make us hold more than this window.
const WINDOW_LOG_MAX: u32 = 27;

/// How an archive is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Plain,
    Gzip,
    Zstd,
}

impl Format {
    /// By the first bytes.
    fn sniff(first: &[u8]) -> Self {
        match first {
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            [0x1f, 0x8b, ..] => Self::Gzip,
            _ => Self::Plain,
        }
    }
}

/// Why there is no manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unread {
    Bad(BadSource),
    /// Whoever takes the blobs wants no more.
    Stopped,
}

impl From<BadSource> for Unread {
    fn from(bad: BadSource) -> Self {
        Self::Bad(bad)
    }
}

fn bad<T>(why: impl Into<String>) -> Result<T, Unread> {
    Err(Unread::Bad(BadSource::Pack(why.into())))
}

fn bad_entry<T>(path: &[u8], why: &str) -> Result<T, Unread> {
    let path = printable(&String::from_utf8_lossy(path));
    Err(Unread::Bad(BadSource::Path { path, why: why.to_owned() }))
}

/// Takes some blobs; false: wants no more.
pub type Take<'a> = dyn FnMut(Vec<(Digest, Bytes)>) -> bool + 'a;

/// Reads an archive to its very end.
pub fn read<'a>(input: impl Read + 'a, format: Option<Format>, take: &'a mut Take<'a>) -> Result<Manifest, Unread> {
    read_up_to(limits::MANIFEST_ENTRIES_MAX, input, format, take)
}

/// Blobs are handed over in bunches of about a frame, each once.
fn read_up_to<'a>(
    entries_max: usize,
    input: impl Read + 'a,
    format: Option<Format>,
    take: &'a mut Take<'a>,
) -> Result<Manifest, Unread> {
    let stored = Rc::new(Cell::new(0));
    let mut input = BufReader::new(Counter { input, count: stored.clone() });
    let format = match format {
        Some(format) => format,
        None => Format::sniff(input.fill_buf().map_err(|error| unreadable(&error))?),
    };
    let plain: Box<dyn Read + 'a> = match format {
        Format::Plain => Box::new(input),
        Format::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        Format::Zstd => {
            let decoder = zstd::stream::read::Decoder::with_buffer(input).and_then(|mut decoder| {
                decoder.window_log_max(WINDOW_LOG_MAX)?;
                Ok(decoder)
            });
            Box::new(decoder.map_err(|error| unreadable(&error))?)
        }
    };
    let mut walk = Walk {
        tape: Tape { input: plain, stored, read: 0 },
        take,
        entries: Vec::new(),
        paths: HashMap::new(),
        manifest_len: 0,
        headers: 0,
        entries_max,
        total: 0,
        bunch: Vec::new(),
        bunch_len: 0,
        sent: HashSet::new(),
    };
    walk.run()?;
    walk.flush()?;
    Ok(Manifest::new(drop_filled_dirs(walk.entries))?)
}

/// A directory is listed only when it is empty; others follow from what is in them.
fn drop_filled_dirs(mut entries: Vec<Entry>) -> Vec<Entry> {
    let mut paths: Vec<&str> = entries.iter().map(|entry| entry.path.as_str()).collect();
    paths.sort_unstable();
    let is_filled = |dir: &str| {
        let below = format!("{dir}/");
        let next = paths.partition_point(|path| *path < below.as_str());
        paths.get(next).is_some_and(|path| path.starts_with(&below))
    };
    let filled = |entry: &Entry| entry.kind == EntryKind::Dir && is_filled(&entry.path);
    let mut filled = entries.iter().map(filled).collect::<Vec<_>>().into_iter();
    entries.retain(|_| !filled.next().unwrap_or(false));
    entries
}

fn unreadable(error: &std::io::Error) -> Unread {
    let why = match error.kind() {
        ErrorKind::UnexpectedEof => "the archive is cut off".to_owned(),
        _ => format!("the archive does not decompress, or bytes follow its end: {error}"),
    };
    Unread::Bad(BadSource::Pack(why))
}

struct Counter<R> {
    input: R,
    count: Rc<Cell<u64>>,
}

impl<R: Read> Read for Counter<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let len = self.input.read(buffer)?;
        self.count.set(self.count.get() + len as u64);
        Ok(len)
    }
}

/// The unpacked archive, watched for bombs.
struct Tape<'a> {
    input: Box<dyn Read + 'a>,
    stored: Rc<Cell<u64>>,
    read: u64,
}

impl Tape<'_> {
    /// Fills the buffer as far as there is something.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, Unread> {
        let mut len = 0;
        while len < buffer.len() {
            match self.input.read(&mut buffer[len..]) {
                Ok(0) => break,
                Ok(more) => len += more,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(unreadable(&error)),
            }
        }
        self.read += len as u64;
        if self.read > RATIO_FREE && self.read / limits::RATIO_MAX > self.stored.get() {
            return bad(format!("the archive is a bomb: it expands more than {} times", limits::RATIO_MAX));
        }
        Ok(len)
    }

    fn exact(&mut self, buffer: &mut [u8], path: &[u8]) -> Result<(), Unread> {
        if self.fill(buffer)? < buffer.len() { bad_entry(path, "the archive is cut off here") } else { Ok(()) }
    }

    /// `len` bytes and what fills up their last block.
    fn data(&mut self, len: u64, path: &[u8]) -> Result<Vec<u8>, Unread> {
        let mut bytes = vec![0; len as usize];
        self.exact(&mut bytes, path)?;
        self.padding(len, path)?;
        Ok(bytes)
    }

    fn padding(&mut self, len: u64, path: &[u8]) -> Result<(), Unread> {
        let rest = (header::BLOCK as u64 - len % header::BLOCK as u64) % header::BLOCK as u64;
        let mut zeros = [0; header::BLOCK];
        self.exact(&mut zeros[..rest as usize], path)
    }

    /// After the first of the two zero blocks nothing but zeros may come, and then the end.
    fn end(&mut self) -> Result<(), Unread> {
        let mut block = vec![0; 64 << 10];
        let mut len = 0;
        loop {
            let more = self.fill(&mut block)?;
            if block[..more].iter().any(|byte| *byte != 0) {
                return bad("bytes follow the archive's end");
            }
            len += more;
            if more < block.len() {
                break;
            }
        }
        if len < header::BLOCK { bad("the archive is cut off within its end") } else { Ok(()) }
    }
}

struct Walk<'a> {
    tape: Tape<'a>,
    take: &'a mut Take<'a>,
    entries: Vec<Entry>,
    /// Every path that was named, with its place in `entries`; none for what was left out.
    paths: HashMap<String, Option<usize>>,
    manifest_len: usize,
    headers: usize,
    entries_max: usize,
    total: u64,
    bunch: Vec<(Digest, Bytes)>,
    bunch_len: usize,
    sent: HashSet<Digest>,
}

impl Walk<'_> {
    fn run(&mut self) -> Result<(), Unread> {
        let mut extended = Extended::default();
        let mut block = [0; header::BLOCK];
        loop {
            match self.tape.fill(&mut block)? {
                0 => return bad("the archive is cut off: its end is missing"),
                header::BLOCK => {}
                _ => return bad("the archive is cut off within a header"),
            }
            if block.iter().all(|byte| *byte == 0) {
                if !extended.is_empty() {
                    return bad("an extended header without an entry");
                }
                return self.tape.end();
            }
            self.headers += 1;
            if self.headers > 3 * self.entries_max {
                return bad(format!("the archive has more than {} entries", self.entries_max));
            }
            let header = Header::read(&block)?;
            match header.kind {
                Kind::Pax | Kind::PaxGlobal | Kind::LongName | Kind::LongLink => self.extend(&header, &mut extended)?,
                Kind::File | Kind::Dir | Kind::Symlink | Kind::HardLink => {
                    self.entry(extended.apply(header)?)?;
                    extended = Extended::default();
                }
            }
        }
    }

    fn extend(&mut self, header: &Header, extended: &mut Extended) -> Result<(), Unread> {
        if header.size > limits::ARCHIVE_HEADER_MAX {
            return bad_entry(&header.path, "an extended header of more than 1 MiB");
        }
        let data = self.tape.data(header.size, &header.path)?;
        extended.read(header, &data)
    }

    fn entry(&mut self, header: Header) -> Result<(), Unread> {
        let Some(path) = plain_path(&header)? else { return Ok(()) };
        if self.paths.len() >= self.entries_max {
            return bad(format!("the archive has more than {} entries", self.entries_max));
        }
        if self.paths.contains_key(&path) {
            return bad_entry(&header.path, "is in the archive twice");
        }
        let entry = match header.kind {
            Kind::File => {
                let kept = !is_litter(&path);
                let (size, chunks) = self.content(&header, kept)?;
                kept.then_some((EntryKind::File, size, chunks, None))
            }
            Kind::Dir => Some((EntryKind::Dir, 0, Vec::new(), None)),
            Kind::Symlink => Some((EntryKind::Symlink, 0, Vec::new(), Some(link_target(&header)?))),
            Kind::HardLink => {
                let earlier = self.earlier_file(&header)?;
                Some((EntryKind::File, earlier.size, earlier.chunks.clone(), None))
            }
            Kind::Pax | Kind::PaxGlobal | Kind::LongName | Kind::LongLink => None,
        };
        let Some((kind, size, chunks, target)) = entry else {
            self.lengthen(path.len())?;
            self.paths.insert(path, None);
            return Ok(());
        };
        self.total = self.total.saturating_add(if header.kind == Kind::HardLink { size } else { 0 });
        self.check_total(&header.path, 0)?;
        self.lengthen(160 + path.len() + target.as_ref().map_or(0, String::len) + 67 * chunks.len())?;
        let executable = kind == EntryKind::Dir || (kind == EntryKind::File && header.mode & 0o100 != 0);
        let mode = if executable { 0o755 } else { 0o644 };
        self.paths.insert(path.clone(), Some(self.entries.len()));
        self.entries.push(Entry { path, kind, mode, size, chunks, target });
        Ok(())
    }

    /// What is left out is remembered, too.
    fn lengthen(&mut self, by: usize) -> Result<(), Unread> {
        self.manifest_len += by;
        if self.manifest_len > limits::MANIFEST_BYTES_MAX {
            return bad(format!("the archive's list is longer than {} bytes", limits::MANIFEST_BYTES_MAX));
        }
        Ok(())
    }

    fn check_total(&self, path: &[u8], more: u64) -> Result<(), Unread> {
        if self.total.saturating_add(more) > limits::SOURCE_BYTES_MAX {
            return bad_entry(path, "with it the archive has more bytes than a source may have");
        }
        Ok(())
    }

    fn content(&mut self, header: &Header, kept: bool) -> Result<(u64, Vec<Digest>), Unread> {
        self.check_total(&header.path, header.size)?;
        self.total += header.size;
        let piece = if header.size > limits::BLOB_MAX as u64 { limits::BLOB_PIECE } else { limits::BLOB_MAX } as u64;
        let mut chunks = Vec::new();
        let mut left = header.size;
        while left > 0 {
            let mut bytes = vec![0; left.min(piece) as usize];
            self.tape.exact(&mut bytes, &header.path)?;
            left -= bytes.len() as u64;
            if kept {
                let digest = Digest::of(&bytes);
                chunks.push(digest);
                self.hand_over(digest, bytes.into())?;
            }
        }
        self.tape.padding(header.size, &header.path)?;
        Ok((header.size, chunks))
    }

    fn hand_over(&mut self, digest: Digest, bytes: Bytes) -> Result<(), Unread> {
        if !self.sent.insert(digest) {
            return Ok(());
        }
        if self.bunch_len + bytes.len() > limits::FRAME_TARGET {
            self.flush()?;
        }
        self.bunch_len += bytes.len();
        self.bunch.push((digest, bytes));
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Unread> {
        self.bunch_len = 0;
        let bunch = std::mem::take(&mut self.bunch);
        if bunch.is_empty() || (self.take)(bunch) { Ok(()) } else { Err(Unread::Stopped) }
    }

    /// The content of a hard link is that of the file it names, which must have come before.
    fn earlier_file(&self, header: &Header) -> Result<&Entry, Unread> {
        let target = plain_text(&header.link, &header.path)?;
        let target = strip_dot(&target);
        if let Err(error) = check_path(target) {
            return bad_entry(&header.path, &format!("is a hard link to {error}"));
        }
        let entry = self.paths.get(target).copied().flatten().and_then(|index| self.entries.get(index));
        match entry.filter(|entry| entry.kind == EntryKind::File) {
            Some(entry) => Ok(entry),
            None => {
                let why = format!("is a hard link to `{}`, which is no earlier file of the archive", printable(target));
                bad_entry(&header.path, &why)
            }
        }
    }
}

/// A path as the manifest has it. `None`: the root itself.
fn plain_path(header: &Header) -> Result<Option<String>, Unread> {
    let text = plain_text(&header.path, &header.path)?;
    let path = strip_dot(&text);
    let path = match path.strip_suffix('/') {
        Some(dir) if header.kind == Kind::Dir && !dir.is_empty() => dir,
        _ => path,
    };
    if header.kind == Kind::Dir && matches!(path, "" | ".") && text.starts_with('.') {
        return Ok(None);
    }
    check_path(path)?;
    Ok(Some(path.to_owned()))
}

fn plain_text(bytes: &[u8], path: &[u8]) -> Result<String, Unread> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => bad_entry(path, "the name is not UTF-8"),
    }
}

fn link_target(header: &Header) -> Result<String, Unread> {
    match plain_text(&header.link, &header.path)? {
        target if target.is_empty() => bad_entry(&header.path, "is a link without a target"),
        target => Ok(target),
    }
}

fn strip_dot(mut path: &str) -> &str {
    while let Some(rest) = path.strip_prefix("./") {
        path = rest.trim_start_matches('/');
    }
    path
}

fn is_litter(path: &str) -> bool {
    let name = path.rsplit_once('/').map_or(path, |(_, name)| name);
    name.starts_with("._") || name == ".DS_Store"
}
