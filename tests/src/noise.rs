//! Log bytes that are a function of seed and offset alone: whoever follows a log can compute what it must be.

use sha2::{Digest as _, Sha256};

const BLOCK: usize = 4096;

/// The bytes `[0, len)` of the stream named `seed`, block by block. Lines have every length from none to several blocks, and
/// some bytes are no UTF-8.
pub fn blocks(seed: u64, len: u64) -> impl Iterator<Item = Vec<u8>> {
    let count = len.div_ceil(BLOCK as u64);
    (0..count).map(move |index| {
        let mut block = block(seed, index);
        block.truncate(usize::try_from(len - index * BLOCK as u64).unwrap_or(usize::MAX).min(BLOCK));
        block
    })
}

pub fn sha256(seed: u64, len: u64) -> String {
    let mut hash = Sha256::new();
    blocks(seed, len).for_each(|block| hash.update(&block));
    hex(&hash.finalize())
}

pub fn sha256_of(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn block(seed: u64, index: u64) -> Vec<u8> {
    let mut state = mix(seed ^ mix(index));
    // A quarter of the blocks has no line end at all, a quarter many, so lines of all lengths appear.
    let ends = match state % 4 {
        0 => 0,
        1 => 2,
        2 => 64,
        _ => 1024,
    };
    let mut out = Vec::with_capacity(BLOCK);
    while out.len() < BLOCK {
        state = mix(state);
        for byte in state.to_le_bytes() {
            out.push(match byte {
                0..=3 => byte | 0xf0,
                _ => b' ' + byte % 94,
            });
        }
    }
    for _ in 0..ends {
        state = mix(state);
        out[(state % BLOCK as u64) as usize] = b'\n';
    }
    out
}

/// One step of splitmix64.
pub fn mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_of_the_stream_is_the_shorter_stream() {
        let long: Vec<u8> = blocks(7, 50_001).flatten().collect();
        let short: Vec<u8> = blocks(7, 12_345).flatten().collect();
        assert_eq!(long.len(), 50_001);
        assert_eq!(long[..12_345], short[..]);
        assert_ne!(sha256(7, 12_345), sha256(8, 12_345));
    }

    #[test]
    fn lines_have_many_lengths_including_none() {
        let bytes: Vec<u8> = blocks(1, 1 << 20).flatten().collect();
        let lengths: std::collections::BTreeSet<_> = bytes.split(|byte| *byte == b'\n').map(<[u8]>::len).collect();
        assert!(lengths.contains(&0) && lengths.contains(&1) && lengths.len() > 100);
        assert!(lengths.last().is_some_and(|longest| *longest > 8192), "{lengths:?}");
        assert!(std::str::from_utf8(&bytes).is_err());
    }
}
