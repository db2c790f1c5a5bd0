//! T: what the artifact rules of a job lead to in a guest: files that can be taken out, and what cannot.

use alloy_shared::id::printable;
use alloy_shared::limits;
use alloy_shared::wire::source::{BadSource, check_path};

use super::{GuestFile, VmError, VmFault};

/// How much of a path is shown.
const SHOWN_MAX: usize = 200;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    /// Sorted by path.
    pub files: Vec<GuestFile>,
    /// What a rule takes and nobody can have, sorted by path: [`limits::ARTIFACTS_MAX`] at most.
    pub unfit: Vec<Unfit>,
    /// How many there are beyond those.
    pub unfit_more: u64,
}

/// Something in a workspace that a rule takes and that is no artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit {
    /// As the guest's file system has it.
    pub path: Vec<u8>,
    pub why: Misfit,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    #[error("its name is not UTF-8")]
    Name,
    #[error("it is a link to a name that is not UTF-8")]
    Target,
    #[error("it is a link to a name of more than {} bytes", limits::PATH_MAX)]
    LongTarget,
    #[error("it is a pipe")]
    Pipe,
    #[error("it is a socket")]
    Socket,
    #[error("it is a device")]
    Device,
    #[error("it cannot be read")]
    Unreadable,
    /// Of a directory: nobody can say what lies in it.
    #[error("it is a directory that cannot be read")]
    Closed,
    /// No path that we would write.
    #[error("{0}")]
    Path(String),
    /// Of a directory: what lies below it is longer or deeper than paths may be.
    #[error("paths below it have more than {} bytes or {} directories", limits::PATH_MAX, limits::PATH_DEPTH_MAX)]
    Deep,
}

impl Misfit {
    /// True of a directory that stands for what may lie below it.
    pub fn hides(&self) -> bool {
        match self {
            Self::Closed | Self::Deep => true,
            Self::Name
            | Self::Target
            | Self::LongTarget
            | Self::Pipe
            | Self::Socket
            | Self::Device
            | Self::Unreadable
            | Self::Path(_) => false,
        }
    }

    /// The last directory that may be spoken of on the way to a path that is longer or deeper than paths may be. No rule
    /// is asked about a path before this: what that costs grows with the path, and a stranger decides how long it is.
    pub fn too_deep(path: &[u8]) -> Option<&[u8]> {
        let (mut above, mut depth) = (0, 1);
        let start = path.iter().take(limits::PATH_MAX + 1).enumerate();
        for (at, _) in start.filter(|(_, byte)| **byte == b'/').take(limits::PATH_DEPTH_MAX) {
            above = at;
            depth += 1;
        }
        (path.len() > limits::PATH_MAX || depth > limits::PATH_DEPTH_MAX).then(|| &path[..above])
    }

    /// The path as a text, if an artifact can be called so.
    pub fn check_path(path: &[u8]) -> Result<&str, Misfit> {
        let path = std::str::from_utf8(path).map_err(|_| Misfit::Name)?;
        check_path(path).map_err(|error| {
            Misfit::Path(match error {
                BadSource::Path { why, .. } | BadSource::Manifest(why) | BadSource::Pack(why) => why,
                BadSource::Digest { .. } => error.to_string(),
            })
        })?;
        Ok(path)
    }

    /// What a link leads to as a text, if the farm takes it.
    pub fn check_target(target: Vec<u8>) -> Result<String, Misfit> {
        match target.len() > limits::PATH_MAX {
            true => Err(Misfit::LongTarget),
            false => String::from_utf8(target).map_err(|_| Misfit::Target),
        }
    }
}

impl Unfit {
    /// The path as rules see it.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.path).into_owned()
    }

    /// The path for people: what cannot be printed is escaped, and of a long one only the end is left.
    pub fn shown(&self) -> String {
        if self.path.is_empty() {
            return ".".to_owned();
        }
        let mut shown = String::new();
        for chunk in self.path.utf8_chunks() {
            for c in chunk.valid().chars() {
                match c {
                    '\\' => shown.push_str("\\\\"),
                    c if c.is_control() => shown.extend(c.escape_default()),
                    c => shown.push(c),
                }
            }
            shown.push_str(&chunk.invalid().escape_ascii().to_string());
        }
        match shown.chars().count().checked_sub(SHOWN_MAX) {
            Some(over @ 1..) => format!("…{}", shown.chars().skip(over).collect::<String>()),
            Some(0) | None => shown,
        }
    }
}

/// How many bytes a listing has so far, and whether one more file may be among them.
#[derive(Debug, Default)]
pub(super) struct Room {
    bytes: u64,
}

impl Room {
    /// Adds a file to what is taken, or says which limit of a job's artifacts that would break.
    pub(super) fn take(&mut self, listing: &mut Listing, file: GuestFile) -> Result<(), VmError> {
        let refuse = |why: String| Err(VmError::user(VmFault::File, format!("{}: {why}", printable(&file.path))));
        if listing.files.len() >= limits::ARTIFACTS_MAX {
            return refuse(format!("there are more than {} artifacts", limits::ARTIFACTS_MAX));
        }
        match self.bytes.checked_add(file.size) {
            Some(bytes) if bytes <= limits::ARTIFACT_BYTES_MAX => self.bytes = bytes,
            Some(_) | None => {
                return refuse(format!("the artifacts have more than {} bytes", limits::ARTIFACT_BYTES_MAX));
            }
        }
        listing.files.push(file);
        Ok(())
    }
}

impl Listing {
    pub fn refuse(&mut self, path: Vec<u8>, why: Misfit) {
        // All that lies too deep below one directory is told by it.
        if self.unfit.last().is_some_and(|last| last.path == path) {
            return;
        }
        match self.unfit.len() < limits::ARTIFACTS_MAX {
            true => self.unfit.push(Unfit { path, why }),
            false => self.unfit_more += 1,
        }
    }

    /// Brings all in order, each path once.
    pub fn sorted(mut self) -> Self {
        self.files.sort_by(|a, b| a.path.as_bytes().cmp(b.path.as_bytes()));
        self.files.dedup_by(|a, b| a.path == b.path);
        self.unfit.sort_by(|a, b| a.path.cmp(&b.path));
        self.unfit.dedup_by(|a, b| a.path == b.path);
        self
    }
}

#[cfg(test)]
pub(super) mod shut;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_shown_so_that_each_byte_can_be_told() {
        for (path, shown) in [
            (&b"out/plain \xc3\xa9"[..], "out/plain é".to_owned()),
            (b"", ".".to_owned()),
            (b"b\xffd/\xc3", "b\\xffd/\\xc3".to_owned()),
            (b"a\nb\\x\x1b[2J", "a\\nb\\\\x\\u{1b}[2J".to_owned()),
            (&[b'x'; 4096], format!("…{}", "x".repeat(SHOWN_MAX))),
        ] {
            assert_eq!(Unfit { path: path.to_vec(), why: Misfit::Name }.shown(), shown);
        }
    }

    #[test]
    fn more_than_can_be_named_is_counted() {
        let mut listing = Listing::default();
        for n in 0..limits::ARTIFACTS_MAX + 3 {
            listing.refuse(format!("{n}").into_bytes(), Misfit::Pipe);
        }
        assert_eq!((listing.unfit.len(), listing.unfit_more), (limits::ARTIFACTS_MAX, 3));
    }

    #[test]
    fn the_way_to_a_path_that_is_too_deep_ends_at_a_directory_that_is_not() {
        let deepest = ["d"; limits::PATH_DEPTH_MAX].join("/");
        let longest = "n".repeat(limits::PATH_MAX - 2);
        for (path, above) in [
            (String::new(), None),
            (deepest.clone(), None),
            (format!("{deepest}/f"), Some(&deepest[..])),
            (format!("{deepest}/{}", "d/".repeat(1 << 20)), Some(&deepest)),
            (format!("a/{longest}"), None),
            (format!("a/{longest}/f"), Some(&format!("a/{longest}"))),
            (format!("a/{longest}n"), Some("a")),
            ("n".repeat(limits::PATH_MAX + 1), Some("")),
        ] {
            assert_eq!(Misfit::too_deep(path.as_bytes()), above.map(str::as_bytes), "{:.80}", path);
            assert!(above.is_none_or(|above| Misfit::too_deep(above.as_bytes()).is_none()));
        }
    }

    #[test]
    fn what_is_refused_twice_in_a_row_counts_once() {
        let mut listing = Listing::default();
        (0..limits::ARTIFACTS_MAX + 3).for_each(|_| listing.refuse(b"deep".to_vec(), Misfit::Deep));
        assert_eq!((listing.unfit.len(), listing.unfit_more), (1, 0));
    }

    #[test]
    fn artifacts_have_room_up_to_their_limits_and_what_is_beyond_is_the_users() {
        let file = |size| GuestFile { path: "big".into(), size, mode: 0o644, link: None };
        let take = |sizes: &[u64]| {
            let (mut room, mut listing) = (Room::default(), Listing::default());
            sizes.iter().try_for_each(|size| room.take(&mut listing, file(*size)))
        };
        assert_eq!(take(&[limits::ARTIFACT_BYTES_MAX, 0]), Ok(()));
        assert_eq!(take(&[0; limits::ARTIFACTS_MAX]), Ok(()));
        let bytes = "big: the artifacts have more than 17179869184 bytes";
        for (sizes, why) in [
            (&[limits::ARTIFACT_BYTES_MAX + 1][..], bytes),
            (&[limits::ARTIFACT_BYTES_MAX, 1], bytes),
            (&[1, u64::MAX], bytes),
            (&[0; limits::ARTIFACTS_MAX + 1], "big: there are more than 10000 artifacts"),
        ] {
            assert_eq!(take(sizes), Err(VmError::user(VmFault::File, why)));
        }
    }

    #[test]
    fn a_path_that_no_artifact_may_have_says_why() {
        assert_eq!(Misfit::check_path(b"a/b"), Ok("a/b"));
        assert_eq!(Misfit::check_path(b"a/\xff"), Err(Misfit::Name));
        let deep = "d/".repeat(limits::PATH_DEPTH_MAX) + "f";
        let why = Misfit::check_path(deep.as_bytes()).unwrap_err().to_string();
        assert!(why.contains("deeper"), "{why}");
    }
}
