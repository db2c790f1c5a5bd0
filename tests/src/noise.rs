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

/// The stream that an attempt prints: its byte at an offset is a function of job, attempt and offset, so whoever reads some
/// bytes and knows where they belong can tell alone whether they are right.
pub fn stream(job: &str, attempt: u32) -> u64 {
    job.bytes().fold(mix(u64::from(attempt)), |state, byte| mix(state ^ u64::from(byte)))
}

/// The bytes `[from, from + len)` of a stream.
pub fn range(seed: u64, from: u64, len: u64) -> Vec<u8> {
    let (first, end) = (from / BLOCK as u64, from + len);
    let mut out: Vec<u8> = (first..end.div_ceil(BLOCK as u64)).flat_map(|index| block(seed, index)).collect();
    out.drain(..usize::try_from(from - first * BLOCK as u64).unwrap_or(usize::MAX).min(out.len()));
    out.truncate(usize::try_from(len).unwrap_or(usize::MAX));
    out
}

/// What a record keeps of bytes: enough to tell other bytes, another order, or another length.
pub fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(bytes.len() as u64, |state, word| {
        let mut padded = [0; 8];
        padded[..word.len()].copy_from_slice(word);
        mix(state ^ u64::from_le_bytes(padded))
    })
}

/// The bytes `[from, from + len)` of a flood: 4 KiB blocks that begin with their number and have no line end. Cheap to make.
pub fn flood(from: u64, len: u64) -> Vec<u8> {
    let (first, end) = (from / BLOCK as u64, from + len);
    let mut out = vec![b'.'; usize::try_from(end.div_ceil(BLOCK as u64) - first).unwrap_or(0) * BLOCK];
    for (index, block) in (first..).zip(out.chunks_mut(BLOCK)) {
        block[..16].copy_from_slice(format!("{index:016x}").as_bytes());
    }
    out.drain(..usize::try_from(from - first * BLOCK as u64).unwrap_or(usize::MAX).min(out.len()));
    out.truncate(usize::try_from(len).unwrap_or(usize::MAX));
    out
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
    fn any_range_is_that_part_of_the_stream() {
        let (noise, flooded) = (range(7, 0, 20_000), flood(0, 20_000));
        for (from, len) in [(0, 1), (4_095, 2), (5_000, 9_000), (19_999, 1), (8_192, 0)] {
            let part = from as usize..(from + len) as usize;
            assert_eq!(range(7, from, len), noise[part.clone()], "{from} {len}");
            assert_eq!(flood(from, len), flooded[part], "{from} {len}");
        }
        assert_eq!(noise, blocks(7, 20_000).flatten().collect::<Vec<_>>());
        assert!(!flooded.contains(&b'\n'));
        let streams = [stream("job_a", 1), stream("job_a", 2), stream("job_b", 1)];
        assert!(streams[0] != streams[1] && streams[0] != streams[2]);
        assert!(sum(b"ab") != sum(b"ba") && sum(b"a") != sum(b"a\0") && sum(&noise[..99]) != sum(&noise[..98]));
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
