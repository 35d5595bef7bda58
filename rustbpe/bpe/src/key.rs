//! Words of up to 15 bytes as a pair of integers, which hash and compare faster than byte strings.

use std::ops::Range;

use crate::Pair;

/// A word's bytes, zero padding, and its length in the last byte.
pub(crate) type Key = [u64; 2];

/// Bytes of the longest word that has a key.
const MAX: usize = 15;

/// The key of `text[word]`; `None` if the word is too long.
#[inline]
pub(crate) fn of(text: &[u8], word: Range<usize>) -> Option<Key> {
    let len = word.len();
    if len > MAX {
        return None;
    }
    // One load and a mask, wherever 16 bytes are left to read.
    Some(match text.get(word.start..).and_then(<[u8]>::first_chunk) {
        Some(bytes) => with_length(u128::from_le_bytes(*bytes) & ((1 << (8 * len)) - 1), len),
        None => padded(&text[word]),
    })
}

/// The key of a word of up to MAX bytes.
#[inline]
fn padded(word: &[u8]) -> Key {
    let mut bytes = [0; 16];
    bytes[..word.len()].copy_from_slice(word);
    with_length(u128::from_le_bytes(bytes), word.len())
}

#[inline]
fn with_length(bytes: u128, len: usize) -> Key {
    let key = bytes | (len as u128) << 120;
    [key as u64, (key >> 64) as u64]
}

/// The inverse of [`of`]: the padded bytes and the word's length.
pub(crate) fn bytes(key: Key) -> ([u8; 16], usize) {
    let bytes = (u128::from(key[0]) | u128::from(key[1]) << 64).to_le_bytes();
    (bytes, usize::from(bytes[15]))
}

/// Multiplies and folds the 128-bit product, as wyhash does.
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

/// A hash of any number of bytes.
pub(crate) fn hash_bytes(bytes: &[u8]) -> u64 {
    bytes.chunks(MAX).fold(0, |seed, chunk| {
        let [low, high] = padded(chunk);
        hash([low ^ seed, high])
    })
}
