//! D: checksums of stored bytes, block by block, so that a read of any part notices rot on the disk.
//!
//! A seal is `crc32c of each MiB | SHA-256 of all | length | crc32c of the seal so far | magic`, numbers little-endian.
//! It stands behind an object's bytes, or in a file beside a log.

use std::ops::Range;

use alloy_shared::id::Digest;
use sha2::Digest as _;

/// What is checked, and so read, at once.
pub const BLOCK: u64 = 1 << 20;
const MAGIC: &[u8; 8] = b"ALLOYSUM";
/// SHA-256, length, checksum, magic.
pub const FOOTER: u64 = 32 + 8 + 4 + 8;

/// Sums in the making.
#[derive(Debug, Clone, Default)]
pub struct Sums {
    sha: sha2::Sha256,
    blocks: Vec<u32>,
    open: u32,
    len: u64,
}

impl Sums {
    pub fn update(&mut self, mut bytes: &[u8]) {
        self.sha.update(bytes);
        while !bytes.is_empty() {
            let room = (BLOCK - self.len % BLOCK) as usize;
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.open = crc32c::crc32c_append(self.open, now);
            self.len += now.len() as u64;
            if self.len.is_multiple_of(BLOCK) {
                self.blocks.push(std::mem::take(&mut self.open));
            }
            bytes = later;
        }
    }

    pub fn so_far(&self) -> u64 {
        self.len
    }

    pub fn seal(mut self) -> Seal {
        if !self.len.is_multiple_of(BLOCK) {
            self.blocks.push(self.open);
        }
        Seal { len: self.len, sha256: Digest::from_hasher(self.sha), blocks: self.blocks }
    }
}

/// What stored bytes were when they were finished.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seal {
    pub len: u64,
    pub sha256: Digest,
    blocks: Vec<u32>,
}

impl Seal {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.blocks.len() * 4 + FOOTER as usize);
        for sum in &self.blocks {
            out.extend_from_slice(&sum.to_le_bytes());
        }
        out.extend_from_slice(&self.sha256.0);
        out.extend_from_slice(&self.len.to_le_bytes());
        let sum = crc32c::crc32c(&out);
        out.extend_from_slice(&sum.to_le_bytes());
        out.extend_from_slice(MAGIC);
        out
    }

    /// How long the seal is that ends in this footer. `None`: it is no footer.
    pub fn size(footer: &[u8]) -> Option<u64> {
        let rest = footer.strip_suffix(MAGIC)?;
        let len = u64::from_le_bytes(*rest.get(32..)?.first_chunk::<8>()?);
        len.div_ceil(BLOCK).checked_mul(4)?.checked_add(FOOTER)
    }

    /// How many bytes stand before the seal in a file of this length. `None`: it is too short for one.
    pub fn sealed_len(file: u64) -> Option<u64> {
        let rest = file.checked_sub(FOOTER)?;
        rest.checked_sub(4 * rest.div_ceil(BLOCK + 4))
    }

    /// Reads a whole seal. `None`: it is damaged.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let rest = bytes.strip_suffix(MAGIC)?;
        let (body, sum) = rest.split_last_chunk::<4>()?;
        if crc32c::crc32c(body) != u32::from_le_bytes(*sum) {
            return None;
        }
        let (rest, len) = body.split_last_chunk::<8>()?;
        let (sums, sha256) = rest.split_last_chunk::<32>()?;
        let len = u64::from_le_bytes(*len);
        let blocks: Vec<u32> =
            sums.chunks_exact(4).filter_map(|sum| sum.first_chunk()).copied().map(u32::from_le_bytes).collect();
        (blocks.len() as u64 == len.div_ceil(BLOCK) && sums.len() == blocks.len() * 4).then_some(Self {
            len,
            sha256: Digest(*sha256),
            blocks,
        })
    }

    /// The bytes of one block.
    pub fn block(&self, index: u64) -> Range<u64> {
        let start = index.saturating_mul(BLOCK).min(self.len);
        start..start.saturating_add(BLOCK).min(self.len)
    }

    /// True when these are the bytes that block `index` had.
    pub fn fits(&self, index: u64, bytes: &[u8]) -> bool {
        usize::try_from(index).ok().and_then(|index| self.blocks.get(index)) == Some(&crc32c::crc32c(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums(bytes: &[u8], step: usize) -> Seal {
        let mut sums = Sums::default();
        for part in bytes.chunks(step) {
            sums.update(part);
        }
        sums.seal()
    }

    #[test]
    fn a_file_tells_how_much_stands_before_its_seal() {
        for len in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 1, 1 << 40] {
            assert_eq!(Seal::sealed_len(len + 4 * len.div_ceil(BLOCK) + FOOTER), Some(len), "{len}");
        }
        assert_eq!(Seal::sealed_len(FOOTER - 1), None);
    }

    #[test]
    fn sums_do_not_depend_on_how_the_bytes_came() {
        for len in [0usize, 1, 1 << 20, (1 << 20) + 1, (3 << 20) - 1] {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 7 + i / 251) as u8).collect();
            let seal = sums(&bytes, 1 << 20);
            assert_eq!(seal, sums(&bytes, 65_521));
            assert_eq!(seal.sha256, Digest::of(&bytes));
            let text = seal.encode();
            assert_eq!(Seal::size(&text[text.len() - FOOTER as usize..]), Some(text.len() as u64));
            assert_eq!(Seal::decode(&text), Some(seal.clone()));
            for index in 0..(len as u64).div_ceil(BLOCK) {
                let range = seal.block(index);
                let block = &bytes[range.start as usize..range.end as usize];
                assert!(seal.fits(index, block));
                let mut rotten = block.to_vec();
                rotten[block.len() / 2] ^= 1;
                assert!(!seal.fits(index, &rotten));
            }
        }
    }

    #[test]
    fn a_damaged_seal_is_noticed() {
        let text = sums(&[5; 3_000_000], 4096).encode();
        for at in 0..text.len() {
            let mut wrong = text.clone();
            wrong[at] ^= 4;
            assert_eq!(Seal::decode(&wrong), None, "byte {at}");
        }
        for cut in 0..text.len() {
            assert_eq!(Seal::decode(&text[..cut]), None);
        }
    }
}
