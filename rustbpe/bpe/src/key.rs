//! Words of up to 15 bytes as a pair of integers, which is faster to hash and compare than bytes.

use std::ops::Range;

use crate::Pair;

/// The bytes, zeros, and in the last byte the length.
pub(crate) type Key = [u64; 2];

/// The longest word that has a key.
const MAX: usize = 15;

/// The key of `text[word]`, if it is short enough.
#[inline]
pub(crate) fn of(text: &[u8], word: Range<usize>) -> Option<Key> {
    let len = word.len();
    if len > MAX {
        return None;
    }
    // one load and a mask, wherever 16 bytes are left to read
    let all = match text.get(word.start..word.start + 16) {
        Some(bytes) => u128::from_le_bytes(bytes.try_into().expect("16 bytes")) & ((1 << (8 * len)) - 1),
        None => {
            let mut bytes = [0; 16];
            bytes[..len].copy_from_slice(&text[word]);
            u128::from_le_bytes(bytes)
        }
    };
    let key = all | (len as u128) << 120;
    Some([key as u64, (key >> 64) as u64])
}

/// The word again: its bytes, and how many of them count.
pub(crate) fn bytes(key: Key) -> ([u8; 16], usize) {
    let bytes = (u128::from(key[0]) | u128::from(key[1]) << 64).to_le_bytes();
    (bytes, usize::from(bytes[15]))
}

/// Multiplies and folds the product, as wyhash and its heirs do.
#[inline]
pub(crate) fn hash(key: Key) -> u64 {
    let product = u128::from(key[0] ^ 0x9E37_79B9_7F4A_7C15) * u128::from(key[1] ^ 0xD6E8_FEB8_6659_FD93);
    product as u64 ^ (product >> 64) as u64
}

/// A hash of two adjacent tokens.
#[inline]
pub(crate) fn hash_pair((left, right): Pair) -> u64 {
    hash([u64::from(left) << 32 | u64::from(right), 0])
}

/// A hash of bytes of any number.
pub(crate) fn hash_bytes(bytes: &[u8]) -> u64 {
    bytes.chunks(MAX).fold(0, |seed, chunk| {
        let [low, high] = of(chunk, 0..chunk.len()).expect("a chunk is short");
        hash([low ^ seed, high])
    })
}
