//! Encoding with merges.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use hashbrown::{HashMap, HashTable};
use rayon::prelude::*;

use crate::key::{self, Key};
use crate::{Error, Pair, Splitter};

/// A byte-level BPE tokenizer: a split pattern and merges.
#[derive(Debug)]
pub struct Tokenizer {
    splitter: Splitter,
    merges: Vec<Pair>,
    /// The token that each pair merges into.
    tokens: HashTable<(Pair, u32)>,
    /// The same for pairs of bytes, at `left << 8 | right`; NONE for others.
    of_bytes: Vec<u32>,
    /// Caches that no thread is using.
    caches: Mutex<Vec<Cache>>,
}

impl Tokenizer {
    /// A tokenizer from the merges that [`train`](crate::train) returns: merge `i` makes token `256 + i`.
    pub fn new(splitter: Splitter, merges: Vec<Pair>) -> Self {
        let mut tokenizer = Self {
            splitter,
            merges: Vec::new(),
            tokens: HashTable::new(),
            of_bytes: vec![NONE; 256 * 256],
            caches: Mutex::default(),
        };
        for pair in merges {
            tokenizer.push(pair);
        }
        tokenizer
    }

    /// A tokenizer from the bytes of its tokens in the order of [`token_bytes`](Self::token_bytes).
    ///
    /// # Errors
    /// [`Error::Tokens`] unless they are the 256 bytes followed by tokens that merge two earlier ones.
    pub fn from_tokens<B: AsRef<[u8]>>(splitter: Splitter, tokens: &[B]) -> Result<Self, Error> {
        let mut tokenizer = Self::new(splitter, Vec::new());
        let (mut parts, mut ids) = (Parts::default(), Vec::new());
        for (id, token) in tokens.iter().map(AsRef::as_ref).enumerate() {
            ids.clear();
            tokenizer.merge_scanning(token, &mut parts, &mut ids);
            match ids[..] {
                [byte] if id < 256 && byte as usize == id => {}
                [left, right] if id >= 256 => tokenizer.push((left, right)),
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

    /// The bytes of every token, in the order of the ids. A token's id is its rank.
    ///
    /// No two tokens have the same bytes, so ranks can be stored by bytes, as in tiktoken. Proof: while a token grows,
    /// merges do not cross its borders, so its merges depend on its bytes alone, and equal bytes end in the same pair.
    /// (Only runs of one token could differ, by the offset at which pairs start; but an odd offset would merge across the
    /// border.) For the same reason, always merging the neighbors of lowest rank gives the same ids as replaying all
    /// merges in order.
    pub fn token_bytes(&self) -> Vec<Vec<u8>> {
        let mut bytes: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        for &(left, right) in &self.merges {
            bytes.push([&bytes[left as usize][..], &bytes[right as usize][..]].concat());
        }
        bytes
    }

    /// The token ids of `text`; names of special tokens are treated as text.
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

    /// The token ids of `text` with BPE dropout (Provilkov et al. 2020): whenever the next merge of a piece is chosen,
    /// each possible one is left out with the probability `dropout`. Equal texts get equal ids. Pieces of more than
    /// 200 bytes are encoded without dropout.
    ///
    /// # Errors
    /// As for [`encode`](Self::encode).
    pub fn encode_dropping(&self, text: &str, dropout: f64) -> Result<Vec<u32>, Error> {
        let (mut ids, mut parts) = (Vec::with_capacity(text.len() / 2), Parts::default());
        let mut random = Random(key::hash_bytes(text.as_bytes()));
        self.splitter.split(text, |piece| match &text.as_bytes()[piece] {
            piece if piece.len() > MAX_SCANNED => self.merge_with_heap(piece, &mut ids),
            piece => self.merge_dropping(piece, &mut parts, &mut ids, || random.next() < dropout),
        })?;
        Ok(ids)
    }

    /// The token ids of each text, on all threads of the current rayon pool. A `dropout` above 0 is that of
    /// [`encode_dropping`](Self::encode_dropping).
    ///
    /// # Errors
    /// As for [`encode`](Self::encode).
    pub fn encode_batch<T: AsRef<str> + Sync>(&self, texts: &[T], dropout: f64) -> Result<Vec<Vec<u32>>, Error> {
        let encode = |text: &str| if dropout > 0.0 { self.encode_dropping(text, dropout) } else { self.encode(text) };
        texts.par_iter().map(|text| encode(text.as_ref())).collect()
    }

    fn encode_piece(&self, text: &[u8], piece: Range<usize>, cache: &mut Cache, ids: &mut Vec<u32>) {
        let first = ids.len();
        let Some(key) = key::of(text, piece.clone()) else {
            let piece = &text[piece];
            if piece.len() > MAX_SCANNED {
                self.merge_with_heap(piece, ids);
            } else if let Some(known) = cache.long.get(piece) {
                ids.extend_from_slice(known);
            } else {
                self.merge_scanning(piece, &mut cache.parts, ids);
                cache.insert_long(piece, &ids[first..]);
            }
            return;
        };
        let hash = key::hash(key);
        if let Some(known) = cache.short.find(hash, |known| known.key == key) {
            ids.extend_from_slice(&cache.ids[known.start as usize..][..known.len as usize]);
            return;
        }
        self.merge_scanning(&text[piece], &mut cache.parts, ids);
        cache.insert_short(hash, key, &ids[first..]);
    }

    /// The token that two tokens merge into, or [`NONE`].
    #[inline]
    fn rank(&self, left: u32, right: u32) -> u32 {
        let pair = (left, right);
        self.tokens.find(key::hash_pair(pair), |(known, _)| *known == pair).map_or(NONE, |&(_, token)| token)
    }

    /// Adds the next merge.
    fn push(&mut self, pair: Pair) {
        let token = 256 + self.merges.len() as u32;
        self.merges.push(pair);
        self.tokens.insert_unique(key::hash_pair(pair), (pair, token), |(pair, _)| key::hash_pair(*pair));
        if pair.0 < 256 && pair.1 < 256 {
            self.of_bytes[(pair.0 << 8 | pair.1) as usize] = token;
        }
    }

    /// Merges the leftmost pair of lowest rank until none is left, by scanning all pairs each time. This takes O(n^2),
    /// but is faster than a heap for short pieces.
    fn merge_scanning(&self, piece: &[u8], parts: &mut Parts, ids: &mut Vec<u32>) {
        let Parts { tokens, ranks } = parts;
        tokens.clear();
        tokens.extend(piece.iter().map(|&byte| u32::from(byte)));
        ranks.clear();
        ranks.extend(piece.windows(2).map(|pair| self.of_bytes[usize::from(pair[0]) << 8 | usize::from(pair[1])]));
        while let Some(&rank) = ranks.iter().min()
            && rank != NONE
            && let Some(i) = ranks.iter().position(|&other| other == rank)
        {
            tokens[i] = rank;
            tokens.remove(i + 1);
            ranks.remove(i);
            if let Some(next) = ranks.get_mut(i) {
                *next = self.rank(rank, tokens[i + 1]);
            }
            if i > 0 {
                ranks[i - 1] = self.rank(tokens[i - 1], rank);
            }
        }
        ids.extend_from_slice(tokens);
    }

    /// [`merge_scanning`](Self::merge_scanning), but pairs for which `drops` returns true are left out of a scan.
    fn merge_dropping(&self, piece: &[u8], parts: &mut Parts, ids: &mut Vec<u32>, mut drops: impl FnMut() -> bool) {
        let tokens = &mut parts.tokens;
        tokens.clear();
        tokens.extend(piece.iter().map(|&byte| u32::from(byte)));
        let mut candidate = |(i, pair): (usize, &[u32])| match self.rank(pair[0], pair[1]) {
            NONE => None,
            rank => (!drops()).then_some((rank, i)),
        };
        while let Some((rank, i)) = tokens.windows(2).enumerate().filter_map(&mut candidate).min() {
            tokens[i] = rank;
            tokens.remove(i + 1);
        }
        ids.extend_from_slice(tokens);
    }

    /// [`merge_scanning`](Self::merge_scanning) in O(n log n): tokens are a linked list, and pairs wait on a heap. A pair
    /// on the heap is stale if its two tokens are not there any more.
    fn merge_with_heap(&self, piece: &[u8], ids: &mut Vec<u32>) {
        const GONE: u32 = u32::MAX;
        let n = piece.len();
        let mut tokens: Vec<u32> = piece.iter().map(|&byte| u32::from(byte)).collect();
        let mut next: Vec<usize> = (1..=n).collect(); // n is the end
        let mut previous: Vec<usize> = (0..n).map(|i| i.wrapping_sub(1)).collect(); // out of range for 0
        let candidate = |tokens: &[u32], left: usize, right: usize| {
            let pair = (*tokens.get(left)?, *tokens.get(right)?);
            Some(self.rank(pair.0, pair.1)).filter(|&rank| rank != NONE).map(|rank| Reverse((rank, left, right)))
        };
        let mut heap: BinaryHeap<_> = (1..n).filter_map(|right| candidate(&tokens, right - 1, right)).collect();
        while let Some(Reverse((rank, left, right))) = heap.pop() {
            if (tokens[left], tokens[right]) != self.merges[rank as usize - 256] {
                continue; // stale
            }
            tokens[left] = rank;
            tokens[right] = GONE;
            next[left] = next[right];
            if let Some(back) = previous.get_mut(next[left]) {
                *back = left;
            }
            heap.extend(candidate(&tokens, previous[left], left));
            heap.extend(candidate(&tokens, left, next[left]));
        }
        ids.extend(tokens.into_iter().filter(|&token| token != GONE));
    }
}

/// Bytes of the longest piece that is merged by scanning.
const MAX_SCANNED: usize = 200;

/// A generator of random numbers: `SplitMix64` (Steele et al. 2014), in [0, 1).
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Marks pairs that no merge joins.
const NONE: u32 = u32::MAX;

/// Buffers for merging: the tokens of a piece, and the token that each would merge into with the next one.
#[derive(Debug, Default)]
struct Parts {
    tokens: Vec<u32>,
    ranks: Vec<u32>,
}

/// Tokens of words that were encoded before. Each is used by one thread at a time.
#[derive(Debug, Default)]
struct Cache {
    short: HashTable<Known>,
    ids: Vec<u32>,
    long: HashMap<Box<[u8]>, Box<[u32]>>,
    parts: Parts,
}

#[derive(Debug)]
struct Known {
    key: Key,
    start: u32,
    len: u32,
}

impl Cache {
    /// Cached words, at most: a few MiB. A full cache is cleared; frequent words are soon back.
    const MAX_SHORT: usize = 1 << 16;
    const MAX_LONG: usize = 1 << 15;

    fn insert_short(&mut self, hash: u64, key: Key, ids: &[u32]) {
        if self.short.len() == Self::MAX_SHORT {
            self.short.clear();
            self.ids.clear();
        }
        let known = Known { key, start: self.ids.len() as u32, len: ids.len() as u32 };
        self.ids.extend_from_slice(ids);
        self.short.insert_unique(hash, known, |known| key::hash(known.key));
    }

    fn insert_long(&mut self, word: &[u8], ids: &[u32]) {
        if self.long.len() == Self::MAX_LONG {
            self.long.clear();
        }
        self.long.insert(word.into(), ids.into());
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
                tokenizer.merge_scanning(&text.as_bytes()[start..end], &mut Parts::default(), &mut scanned);
                tokenizer.merge_with_heap(&text.as_bytes()[start..end], &mut heaped);
                assert_eq!(scanned, heaped);
            }
        }
    }

    #[test]
    fn the_cache_forgets_and_stays_right() {
        let splitter = Splitter::new(GPT4_PATTERN).unwrap();
        let tokenizer = Tokenizer::new(splitter, vec![(b'a'.into(), b'b'.into())]);
        let letters = |i: usize| (0..5).map(move |place| (b'a' + (i / 16_usize.pow(place) % 16) as u8) as char);
        let word = |i: usize| letters(i).chain(" abababababababab".chars().take(3 + i % 2 * 14)).collect::<String>();
        let words: Vec<String> = (0..3 * Cache::MAX_SHORT).map(word).collect();
        for _ in 0..2 {
            let text = words.concat();
            let ids = tokenizer.encode(&text).unwrap();
            let tokens = tokenizer.token_bytes();
            assert_eq!(ids.iter().flat_map(|&id| tokens[id as usize].clone()).collect::<Vec<u8>>(), text.as_bytes());
            assert!(ids.windows(2).all(|pair| pair != [97, 98]));
        }
    }
}
