//! T: secrets that cannot be printed by accident, and the grammar of tokens.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::id::Digest;

const BASE62: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
const BODY: usize = 32;
const CHECK: usize = 6;

/// A value whose `Debug` form is `***` and which has no `Display`. Read it with [`Secret::expose`], at the last moment.
/// It serializes as itself, because the wire must carry it: log lines use `Debug`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret<T>(T);

impl<T> Secret<T> {
    pub const fn new(value: T) -> Self {
        Self(value)
    }
    pub const fn expose(&self) -> &T {
        &self.0
    }
}

impl<T> fmt::Debug for Secret<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// What a token is for. The prefix makes it findable by secret scanners.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TokenKind {
    /// A person's.
    Personal,
    /// A CI system's.
    Ci,
    /// Enrols one worker, once.
    Join,
    /// One attempt's blobs, for the worker that runs it. Dies with the attempt.
    Job,
}

impl TokenKind {
    pub const ALL: [TokenKind; 4] = [Self::Personal, Self::Ci, Self::Join, Self::Job];

    pub const fn prefix(self) -> &'static str {
        match self {
            Self::Personal => "alloy_pat_",
            Self::Ci => "alloy_ci_",
            Self::Join => "alloy_join_",
            Self::Job => "alloy_job_",
        }
    }
}

/// A token whose form and check digits were verified. Whether anybody knows it is another question.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    pub kind: TokenKind,
    text: Secret<String>,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}***", self.kind.prefix())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadToken {
    #[error("it does not start with one of alloy_pat_, alloy_ci_, alloy_join_, alloy_job_")]
    Prefix,
    #[error("its length is wrong; was it copied whole?")]
    Length,
    #[error("its check digits do not fit; a character is wrong")]
    Check,
}

impl Token {
    /// Makes a token of 32 characters from 32 random bytes; 190 bits.
    pub fn mint(kind: TokenKind, random: [u8; 32]) -> Self {
        let mut text = String::from(kind.prefix());
        // 256 mod 62 favours eight characters slightly: 0.04 bits lost over the whole token.
        text.extend(random.iter().map(|byte| char::from(BASE62[usize::from(*byte) % 62])));
        let check = check_digits(&text);
        text.push_str(&check);
        Self { kind, text: Secret::new(text) }
    }

    pub fn parse(text: &str) -> Result<Self, BadToken> {
        let kind = TokenKind::ALL.into_iter().find(|kind| text.starts_with(kind.prefix())).ok_or(BadToken::Prefix)?;
        let tail = &text[kind.prefix().len()..];
        if tail.len() != BODY + CHECK || !tail.bytes().all(|c| c.is_ascii_alphanumeric()) {
            return Err(BadToken::Length);
        }
        let (head, check) = text.split_at(text.len() - CHECK);
        if check_digits(head) != check {
            return Err(BadToken::Check);
        }
        Ok(Self { kind, text: Secret::new(text.to_owned()) })
    }

    pub fn expose(&self) -> &str {
        self.text.expose()
    }

    /// What is stored: the token itself never is.
    pub fn hash(&self) -> Digest {
        Digest::of(self.expose().as_bytes())
    }

    /// The part that may be shown: the prefix and the last four characters.
    pub fn shown(&self) -> String {
        let text = self.expose();
        format!("{}…{}", self.kind.prefix(), &text[text.len() - 4..])
    }
}

fn check_digits(text: &str) -> String {
    let mut rest = crc32fast::hash(text.as_bytes());
    let mut out = [b'0'; CHECK];
    for slot in out.iter_mut().rev() {
        *slot = BASE62[(rest % 62) as usize];
        rest /= 62;
    }
    out.iter().map(|c| char::from(*c)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minted_token_parses_and_a_changed_one_does_not() {
        for kind in TokenKind::ALL {
            let token = Token::mint(kind, [200; 32]);
            assert_eq!(Token::parse(token.expose()).unwrap(), token);
            assert_eq!(token.expose().len(), kind.prefix().len() + 38);
            for at in kind.prefix().len()..token.expose().len() {
                let mut typo = token.expose().as_bytes().to_vec();
                typo[at] = if typo[at] == b'x' { b'y' } else { b'x' };
                assert_eq!(Token::parse(std::str::from_utf8(&typo).unwrap()), Err(BadToken::Check), "typo at {at}");
            }
        }
        assert_eq!(Token::parse("ghp_abc"), Err(BadToken::Prefix));
        assert_eq!(Token::parse("alloy_pat_abc"), Err(BadToken::Length));
    }

    #[test]
    fn a_secret_is_not_printed() {
        let token = Token::mint(TokenKind::Personal, [7; 32]);
        assert_eq!(format!("{token:?}"), "alloy_pat_***");
        assert_eq!(format!("{:?}", Secret::new("hunter2")), "***");
    }
}
