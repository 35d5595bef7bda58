use std::cmp::Reverse;
use std::collections::BinaryHeap;

use hashbrown::HashMap;

use crate::{Error, Pair, Splitter};

/// A split pattern and its merges: all that it takes to encode.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    splitter: Splitter,
    merges: Vec<Pair>,
    tokens: HashMap<Pair, u32>,
}

impl Tokenizer {
    /// A tokenizer from `merges` as [`train`](crate::train) returns them: merge `i` makes token `256 + i`.
    pub fn new(splitter: Splitter, merges: Vec<Pair>) -> Self {
        let tokens = merges.iter().copied().zip(256..).collect();
        Self { splitter, merges, tokens }
    }

    /// The split pattern.
    pub fn pattern(&self) -> &str {
        self.splitter.pattern()
    }

    /// The bytes of every token, in the order of the ids: a token's id is its rank.
    ///
    /// No two tokens have the same bytes, so that the ranks can be kept in a map from bytes, as tiktoken does. Why:
    /// merges never cross a token's borders while it grows, so how its bytes merge depends on those bytes alone, and
    /// the same bytes end in the same pair wherever they stand. (Only runs of one token could differ, by where the
    /// pairing starts; but an odd offset would pair across the border.) For the same reason, joining the neighbours
    /// whose bytes have the lowest rank gives the same ids as replaying the merges.
    pub fn token_bytes(&self) -> Vec<Vec<u8>> {
        let mut bytes: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        for &(left, right) in &self.merges {
            bytes.push([&bytes[left as usize][..], &bytes[right as usize][..]].concat());
        }
        bytes
    }

    /// The token ids of `text`. There are no special tokens.
    ///
    /// # Errors
    /// [`Error::Split`] if the split pattern fails on this text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let mut ids = Vec::new();
        self.splitter.split(text, |piece| {
            self.encode_piece(piece.as_bytes(), &mut ids);
            Ok(())
        })?;
        Ok(ids)
    }

    /// Joins the leftmost pair of lowest rank until none is left, in O(n log n): neighbours are a linked list, and
    /// the heap may hold pairs that are gone, known by the tokens they name.
    fn encode_piece(&self, piece: &[u8], ids: &mut Vec<u32>) {
        const GONE: u32 = u32::MAX;
        let n = piece.len();
        let mut tokens: Vec<u32> = piece.iter().map(|&byte| u32::from(byte)).collect();
        let mut next: Vec<usize> = (1..=n).collect(); // n is the end
        let mut previous: Vec<usize> = (0..n).map(|i| i.wrapping_sub(1)).collect(); // of 0: out of range
        let job = |tokens: &[u32], left: usize, right: usize| {
            let pair = (*tokens.get(left)?, *tokens.get(right)?);
            let rank = *self.tokens.get(&pair)?;
            Some(Reverse((rank, left, right)))
        };
        let mut heap: BinaryHeap<_> = (1..n).filter_map(|right| job(&tokens, right - 1, right)).collect();
        while let Some(Reverse((rank, left, right))) = heap.pop() {
            if (tokens[left], tokens[right]) != self.merges[rank as usize - 256] {
                continue; // one of the two is gone
            }
            tokens[left] = rank;
            tokens[right] = GONE;
            next[left] = next[right];
            if let Some(back) = previous.get_mut(next[left]) {
                *back = left;
            }
            heap.extend(job(&tokens, previous[left], left));
            heap.extend(job(&tokens, left, next[left]));
        }
        ids.extend(tokens.into_iter().filter(|&token| token != GONE));
    }
}
