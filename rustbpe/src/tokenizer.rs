use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use hashbrown::{HashMap, HashTable};
use rayon::prelude::*;

use crate::key::{self, Key};
use crate::{Error, Pair, Splitter};

/// A split pattern and its merges: all that it takes to encode.
#[derive(Debug)]
pub struct Tokenizer {
    splitter: Splitter,
    merges: Vec<Pair>,
    tokens: HashMap<Pair, u32>,
    /// What threads learnt while they encoded, for the next ones.
    caches: Mutex<Vec<Cache>>,
}

impl Tokenizer {
    /// A tokenizer from `merges` as [`train`](crate::train) returns them: merge `i` makes token `256 + i`.
    pub fn new(splitter: Splitter, merges: Vec<Pair>) -> Self {
        let tokens = merges.iter().copied().zip(256..).collect();
        Self { splitter, merges, tokens, caches: Mutex::default() }
    }

    /// A tokenizer from the bytes of its tokens, as [`token_bytes`](Self::token_bytes) lists them.
    ///
    /// # Errors
    /// [`Error::Tokens`] if they are not the 256 bytes and then, each time, two earlier tokens joined.
    pub fn from_tokens<B: AsRef<[u8]>>(splitter: Splitter, tokens: &[B]) -> Result<Self, Error> {
        let mut tokenizer = Self::new(splitter, Vec::new());
        let (mut parts, mut ids) = (Vec::new(), Vec::new());
        for (id, token) in tokens.iter().map(AsRef::as_ref).enumerate() {
            ids.clear();
            tokenizer.merge_scanning(token, &mut parts, &mut ids);
            match ids[..] {
                [byte] if id < 256 && byte as usize == id => {}
                [left, right] if id >= 256 => {
                    tokenizer.tokens.insert((left, right), id as u32);
                    tokenizer.merges.push((left, right));
                }
                _ => return Err(Error::Tokens(id)),
            }
        }
        if tokens.len() < 256 {
            return Err(Error::Tokens(tokens.len()));
        }
        Ok(tokenizer)
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
        let caches = || self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        let mut cache = caches().pop().unwrap_or_default();
        let mut ids = Vec::with_capacity(text.len() / 3);
        let result = self.splitter.split(text, |piece| self.encode_piece(text.as_bytes(), piece, &mut cache, &mut ids));
        caches().push(cache);
        result.map(|()| ids)
    }

    /// The token ids of each text, on all threads of the current rayon pool.
    ///
    /// # Errors
    /// As for [`encode`](Self::encode), of the first text that fails.
    pub fn encode_batch<T: AsRef<str> + Sync>(&self, texts: &[T]) -> Result<Vec<Vec<u32>>, Error> {
        texts.par_iter().map(|text| self.encode(text.as_ref())).collect()
    }

    fn encode_piece(&self, text: &[u8], piece: Range<usize>, cache: &mut Cache, ids: &mut Vec<u32>) {
        let Some(key) = key::of(text, piece.clone()) else {
            return if piece.len() <= MAX_SCANNED {
                self.merge_scanning(&text[piece], &mut cache.parts, ids);
            } else {
                self.merge_with_heap(&text[piece], ids);
            };
        };
        let hash = key::hash(key);
        if let Some(known) = cache.words.find(hash, |known| known.key == key) {
            ids.extend_from_slice(&cache.ids[known.start as usize..][..known.len as usize]);
            return;
        }
        let first = ids.len();
        self.merge_scanning(&text[piece], &mut cache.parts, ids);
        cache.insert(hash, key, &ids[first..]);
    }

    fn rank(&self, left: u32, right: u32) -> u32 {
        self.tokens.get(&(left, right)).copied().unwrap_or(u32::MAX)
    }

    /// Joins the leftmost pair of lowest rank until none is left, looking for it from the start each time: O(n^2), but
    /// faster than a heap for a word.
    fn merge_scanning(&self, piece: &[u8], parts: &mut Vec<Part>, ids: &mut Vec<u32>) {
        parts.clear();
        parts.extend(piece.iter().map(|&byte| Part { token: u32::from(byte), rank: u32::MAX }));
        for i in 1..parts.len() {
            parts[i - 1].rank = self.rank(parts[i - 1].token, parts[i].token);
        }
        while let Some((i, &Part { rank, .. })) = parts.iter().enumerate().min_by_key(|(_, part)| part.rank) {
            if rank == u32::MAX {
                break;
            }
            parts[i].token = rank;
            parts.remove(i + 1);
            parts[i].rank = parts.get(i + 1).map_or(u32::MAX, |next| self.rank(rank, next.token));
            if i > 0 {
                parts[i - 1].rank = self.rank(parts[i - 1].token, rank);
            }
        }
        ids.extend(parts.iter().map(|part| part.token));
    }

    /// The same in O(n log n): neighbours are a linked list, and the heap may hold pairs that are gone, known by the
    /// tokens they name.
    fn merge_with_heap(&self, piece: &[u8], ids: &mut Vec<u32>) {
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

/// Longer pieces are merged with a heap.
const MAX_SCANNED: usize = 200;

/// A token of a word, and the rank of the pair that it makes with the next one.
#[derive(Debug)]
struct Part {
    token: u32,
    rank: u32,
}

/// The tokens of short words that one thread has met.
#[derive(Debug, Default)]
struct Cache {
    words: HashTable<Known>,
    ids: Vec<u32>,
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Known {
    key: Key,
    start: u32,
    len: u32,
}

impl Cache {
    /// Words that are kept, about 4 MiB of them; then all are forgotten, and the frequent ones are soon back.
    const MAX_WORDS: usize = 1 << 16;

    fn insert(&mut self, hash: u64, key: Key, ids: &[u32]) {
        if self.words.len() == Self::MAX_WORDS {
            self.words.clear();
            self.ids.clear();
        }
        let known = Known { key, start: self.ids.len() as u32, len: ids.len() as u32 };
        self.ids.extend_from_slice(ids);
        self.words.insert_unique(hash, known, |known| key::hash(known.key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GPT4_PATTERN, WordCounts, train};

    #[test]
    fn both_ways_of_merging_give_the_same_tokens() {
        let text = "the cat sat on the mat with the other cats; banana bandana ananas aaaaaaaaaaaaaaaaaaaaaaaaaa";
        let splitter = Splitter::new(GPT4_PATTERN).unwrap();
        let merges = train(WordCounts::of(&splitter, [text]).unwrap(), 300, |_| Ok::<(), Error>(())).unwrap();
        let tokenizer = Tokenizer::new(splitter, merges);
        for start in 0..text.len() {
            for end in start..text.len() {
                let (mut scanned, mut heaped) = (Vec::new(), Vec::new());
                tokenizer.merge_scanning(&text.as_bytes()[start..end], &mut Vec::new(), &mut scanned);
                tokenizer.merge_with_heap(&text.as_bytes()[start..end], &mut heaped);
                assert_eq!(scanned, heaped);
            }
        }
    }

    #[test]
    fn the_cache_forgets_and_stays_right() {
        let splitter = Splitter::new(GPT4_PATTERN).unwrap();
        let tokenizer = Tokenizer::new(splitter, vec![(b'a'.into(), b'b'.into())]);
        let text: String =
            (0..3 * Cache::MAX_WORDS).map(|i| format!(" ab{}", (b'a' + (i % 26) as u8) as char)).collect();
        let again: Vec<u32> = text.split_inclusive(' ').flat_map(|word| tokenizer.encode(word).unwrap()).collect();
        assert_eq!(tokenizer.encode(&text).unwrap().len(), again.len());
    }
}
