//! T: names of things. Every id is a type of its own, parsed once at the door.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::Digest as _;

use crate::env::Ms;
use crate::limits;

const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
pub const ID_CHARS: usize = 26;
/// The shortest ending of a job's id that may stand for it.
pub const ID_ENDING_MIN: usize = 6;

/// What was wrong with a name that somebody typed or sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {why}")]
pub struct BadName {
    pub what: &'static str,
    pub why: String,
}

/// Bytes of a name that people give.
const NAME_MAX: usize = 63;

/// Checks the name of a worker or a token, and takes the blanks around it off.
pub fn check_name(text: &str) -> Result<&str, BadName> {
    let text = text.trim();
    if text.is_empty() || text.len() > NAME_MAX || text.chars().any(char::is_control) {
        return Err(bad("name", format!("is 1 to {NAME_MAX} bytes without control characters")));
    }
    Ok(text)
}

fn bad(what: &'static str, why: impl Into<String>) -> BadName {
    BadName { what, why: why.into() }
}

/// A UUIDv7: 48 bits of wall time, then dice. Sorts by time of creation.
fn uuid_v7(now: Ms, dice: (u64, u64)) -> u128 {
    let time = (now.0.max(0) as u128 & 0xffff_ffff_ffff) << 80;
    let version = 0x7u128 << 76;
    let a = u128::from(dice.0 & 0xfff) << 64;
    let variant = 0b10u128 << 62;
    let b = u128::from(dice.1 & 0x3fff_ffff_ffff_ffff);
    time | version | a | variant | b
}

/// A key for a request that may be sent again. Keys sort by time: those of one moment lie side by side in a store's index.
pub fn request_key(now: Ms, dice: (u64, u64)) -> String {
    format!("{:032x}", uuid_v7(now, dice))
}

fn encode(value: u128) -> [u8; ID_CHARS] {
    let mut out = [b'0'; ID_CHARS];
    let mut rest = value;
    for slot in out.iter_mut().rev() {
        *slot = ALPHABET[(rest & 31) as usize];
        rest >>= 5;
    }
    out
}

fn decode(text: &str) -> Option<u128> {
    if text.len() != ID_CHARS || text.as_bytes()[0] > b'7' {
        return None;
    }
    text.bytes().try_fold(0u128, |sum, c| {
        let digit = ALPHABET.iter().position(|a| *a == c)?;
        Some((sum << 5) | digit as u128)
    })
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u128);

        impl $name {
            pub const PREFIX: &'static str = $prefix;
            /// Makes a new id from the time and two throws of the dice.
            pub fn mint(now: Ms, dice: (u64, u64)) -> Self { Self(uuid_v7(now, dice)) }
            pub const fn from_raw(raw: u128) -> Self { Self(raw) }
            pub const fn raw(self) -> u128 { self.0 }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str($prefix)?;
                let text = encode(self.0);
                f.write_str(std::str::from_utf8(&text).map_err(|_| fmt::Error)?)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { fmt::Display::fmt(self, f) }
        }
        impl FromStr for $name {
            type Err = BadName;
            fn from_str(text: &str) -> Result<Self, BadName> {
                text.strip_prefix($prefix)
                    .and_then(decode)
                    .map(Self)
                    .ok_or_else(|| bad($what, concat!("is written ", $prefix, " and 26 characters").to_owned()))
            }
        }
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> { s.collect_str(self) }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

id!(/** What was asked. */ JobId, "a job id", "job_");
id!(/** A worker's identity, given at enrolment. */ WorkerId, "a worker id", "wkr_");
id!(/** A tenant. */ OrgId, "an organisation id", "org_");
id!(/** A credential's public name. */ TokenId, "a token id", "tok_");
id!(/** One run of a worker daemon, from start to end. */ BootId, "a boot id", "boot_");

/// A person, by the id that the sign-in service gave: a UUID, written in lower case with hyphens.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UserId(u128);

impl UserId {
    pub const fn from_raw(raw: u128) -> Self {
        Self(raw)
    }
    pub const fn raw(self) -> u128 {
        self.0
    }
}

impl fmt::Display for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hex = format!("{:032x}", self.0);
        write!(f, "{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
    }
}

impl fmt::Debug for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for UserId {
    type Err = BadName;
    fn from_str(text: &str) -> Result<Self, BadName> {
        let hyphen = |at: usize| matches!(at, 8 | 13 | 18 | 23);
        let fits = |(at, c): (usize, u8)| if hyphen(at) { c == b'-' } else { c.is_ascii_hexdigit() };
        if text.len() != 36 || !text.bytes().enumerate().all(fits) {
            return Err(bad("a user id", "is a UUID, like 3f0c2f1e-8a51-4c1e-9d0b-6f1f3f0f9a11"));
        }
        let hex: String = text.chars().filter(|c| *c != '-').collect();
        u128::from_str_radix(&hex, 16).map(Self).map_err(|_| bad("a user id", "is a UUID"))
    }
}

impl Serialize for UserId {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for UserId {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// So many last characters of a job's id are enough to name it.
pub const ENDING_CHARS: usize = 6;
const ENDING_MASK: u32 = (1 << (5 * ENDING_CHARS)) - 1;
/// Odd, so that no two turns give the same ending.
const SPREAD: u32 = 0x1e35_a7bd;
const GATHER: u32 = inverse(SPREAD);

/// What undoes a multiplication by `odd`: each step doubles the number of right bits.
const fn inverse(odd: u32) -> u32 {
    let (mut found, mut steps) = (odd, 0);
    while steps < 5 {
        found = found.wrapping_mul(2u32.wrapping_sub(odd.wrapping_mul(found)));
        steps += 1;
    }
    found
}

impl JobId {
    /// The same id with an ending that stands for `turn`, a number that counts jobs. So jobs that are made one after the
    /// other look different to people, never end alike, and still lie side by side in an index of turns.
    pub fn in_turn(self, turn: u32) -> Self {
        let ending = turn.wrapping_mul(SPREAD) & ENDING_MASK;
        Self((self.0 & !u128::from(ENDING_MASK)) | u128::from(ending))
    }

    /// The number that the id's last six characters stand for.
    pub fn turn(self) -> u32 {
        turn((self.0 & u128::from(ENDING_MASK)) as u32)
    }

    /// The turn of all ids that end in this text; none do if it is too short.
    pub fn turn_of(ending: &str) -> Option<u32> {
        let last = ending.as_bytes().last_chunk::<ENDING_CHARS>()?;
        let digits = last.iter().map(|c| ALPHABET.iter().position(|a| a == c));
        digits.into_iter().try_fold(0, |sum, digit| Some((sum << 5) | digit? as u32)).map(turn)
    }
}

fn turn(ending: u32) -> u32 {
    ending.wrapping_mul(GATHER) & ENDING_MASK
}

/// The organisation that exists from the first start.
pub const DEFAULT_ORG: OrgId = OrgId::from_raw(0x0001_0000_0000_7000_8000_0000_0000_0001);

/// One try at a job. The number is the fence: only the newest attempt may change the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttemptRef {
    pub job: JobId,
    pub attempt: u32,
}

impl fmt::Display for AttemptRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.job, self.attempt)
    }
}

/// SHA-256 of some bytes, written as 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    pub fn of(bytes: &[u8]) -> Self {
        Self(sha2::Sha256::digest(bytes).into())
    }
    pub fn from_hasher(hasher: sha2::Sha256) -> Self {
        Self(hasher.finalize().into())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const HEX: &[u8; 16] = b"0123456789abcdef";
        let mut out = [0u8; 64];
        for (i, byte) in self.0.iter().enumerate() {
            out[2 * i] = HEX[usize::from(byte >> 4)];
            out[2 * i + 1] = HEX[usize::from(byte & 15)];
        }
        f.write_str(std::str::from_utf8(&out).map_err(|_| fmt::Error)?)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = BadName;
    fn from_str(text: &str) -> Result<Self, BadName> {
        let wrong = || bad("digest", "is 64 lower-case hex digits of a SHA-256");
        if text.len() != 64 {
            return Err(wrong());
        }
        let nibble = |c: u8| match c {
            b'0'..=b'9' => Ok(c - b'0'),
            b'a'..=b'f' => Ok(c - b'a' + 10),
            _ => Err(wrong()),
        };
        let mut out = [0u8; 32];
        for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
        }
        Ok(Self(out))
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// `key=value` pairs. A worker offers them, a job requires them.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Labels(BTreeMap<String, String>);

impl Labels {
    pub const MAX: usize = 32;

    /// Checks and adds one label.
    pub fn insert(&mut self, key: &str, value: &str) -> Result<(), BadName> {
        check_label_part("label key", key)?;
        check_label_part("label value", value)?;
        if self.0.len() >= Self::MAX && !self.0.contains_key(key) {
            return Err(bad("labels", format!("are at most {}", Self::MAX)));
        }
        self.0.insert(key.to_owned(), value.to_owned());
        Ok(())
    }

    /// Reads one `key=value` as typed on a command line.
    pub fn insert_pair(&mut self, pair: &str) -> Result<(), BadName> {
        let (key, value) =
            pair.split_once('=').ok_or_else(|| bad("label", format!("`{}` is not key=value", printable(pair))))?;
        self.insert(key, value)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v.as_str()))
    }

    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// True when these labels, a worker's, contain every one that a job requires.
    pub fn matches(&self, required: &Labels) -> bool {
        required.0.iter().all(|(key, value)| self.0.get(key) == Some(value))
    }
}

impl TryFrom<&BTreeMap<String, String>> for Labels {
    type Error = BadName;
    fn try_from(raw: &BTreeMap<String, String>) -> Result<Self, BadName> {
        let mut labels = Labels::default();
        for (key, value) in raw {
            labels.insert(key, value)?;
        }
        Ok(labels)
    }
}

impl<'de> Deserialize<'de> for Labels {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let raw = BTreeMap::<String, String>::deserialize(d)?;
        Labels::try_from(&raw).map_err(serde::de::Error::custom)
    }
}

fn check_label_part(what: &'static str, text: &str) -> Result<(), BadName> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/' | ':' | '+');
    if text.is_empty() || text.len() > 63 {
        return Err(bad(what, format!("`{}` is not 1 to 63 characters long", printable(text))));
    }
    match text.chars().find(|c| !fine(*c)) {
        Some(c) => {
            Err(bad(what, format!("`{}` holds {c:?}; allowed are letters, digits and . _ - / : +", printable(text))))
        }
        None => Ok(()),
    }
}

/// A stranger's text, shortened and without control characters, fit for a message.
pub fn printable(text: &str) -> String {
    printable_to(80, text)
}

/// The same for a sentence, of which so many characters may be needed.
pub fn printable_to(most: usize, text: &str) -> String {
    let mut out: String = text.chars().take(most).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if text.chars().nth(most).is_some() {
        out.push('…');
    }
    out
}

/// As much of a text as a message may have.
pub fn shorten(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(limits::MESSAGE_MAX));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_its_text_and_sorts_by_time() {
        let early = JobId::mint(Ms(1_000), (7, 9));
        let late = JobId::mint(Ms(2_000), (0, 0));
        assert_eq!(early.to_string().parse::<JobId>().unwrap(), early);
        assert_eq!(early.to_string().len(), 4 + 26);
        assert!(early < late && early.to_string() < late.to_string());
    }

    #[test]
    fn a_user_id_is_a_uuid_in_lower_case() {
        let text = "3f0c2f1e-8a51-4c1e-9d0b-6f1f3f0f9a11";
        let id: UserId = text.to_uppercase().parse().unwrap();
        assert_eq!((id, id.to_string().as_str()), (text.parse().unwrap(), text));
        assert_eq!(UserId::from_raw(1).to_string(), "00000000-0000-0000-0000-000000000001");
        for bad in
            ["", "me", "3f0c2f1e8a514c1e9d0b6f1f3f0f9a11", &text[1..], &text.replace('3', "+"), &text.replace('-', "0")]
        {
            assert!(bad.parse::<UserId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_ending_stands_for_a_turn() {
        let id = JobId::mint(Ms(1_000), (7, u64::MAX));
        for turn in [0, 1, 2, 0x1234_5678, ENDING_MASK, u32::MAX] {
            let made = id.in_turn(turn);
            let text = made.to_string();
            assert_eq!(made.turn(), turn & ENDING_MASK);
            assert_eq!(text[..24], id.to_string()[..24], "only the ending changes");
            for chars in [ENDING_CHARS, 7, 30] {
                assert_eq!(JobId::turn_of(&text[30 - chars..]), Some(made.turn()));
            }
            assert_ne!(text[29..], id.in_turn(turn.wrapping_add(1)).to_string()[29..], "neighbours look different");
        }
        for none in ["", "12345", "12345u", "ABCDEF", "12345é"] {
            assert_eq!(JobId::turn_of(none), None, "{none}");
        }
    }

    #[test]
    fn request_keys_sort_by_time() {
        let keys =
            [request_key(Ms(1), (u64::MAX, u64::MAX)), request_key(Ms(2), (0, 0)), request_key(Ms(i64::MAX), (0, 0))];
        assert!(keys.is_sorted() && keys.iter().all(|key| key.len() == 32), "{keys:?}");
    }

    #[test]
    fn wrong_ids_are_refused() {
        for text in [
            "",
            "job_",
            "job_8zzzzzzzzzzzzzzzzzzzzzzzzz",
            "wkr_00000000000000000000000000",
            "job_0000000000000000000000000I",
        ] {
            assert!(text.parse::<JobId>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_digest_is_what_sha256sum_prints() {
        let digest = Digest::of(b"abc");
        assert_eq!(digest.to_string(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        assert!("BA7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad".parse::<Digest>().is_err());
    }

    #[test]
    fn labels_match_when_the_worker_has_a_superset() {
        let mut worker = Labels::default();
        for pair in ["os=macos", "chip=m4", "xcode=16.4"] {
            worker.insert_pair(pair).unwrap();
        }
        let mut job = Labels::default();
        assert!(worker.matches(&job));
        job.insert("chip", "m4").unwrap();
        assert!(worker.matches(&job));
        job.insert("site", "berlin").unwrap();
        assert!(!worker.matches(&job));
        for wrong in ["", "x", "=1", "a=", "a b=1", "a=\u{1b}[31m"] {
            assert!(job.insert_pair(wrong).is_err(), "{wrong:?}");
        }
    }
}
