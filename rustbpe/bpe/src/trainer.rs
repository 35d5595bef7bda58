//! Greedy BPE: finds the merges of counted words.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::ops::Range;
use std::time::{Duration, Instant};

use hashbrown::HashMap;
use hashbrown::hash_map::Entry;
use rayon::prelude::*;

use crate::{Error, WordCounts, key};

/// Two adjacent token ids, left and right.
pub type Pair = (u32, u32);

/// Time between two calls of `tick`.
const TICK: Duration = Duration::from_millis(100);

/// The floor is divided by this when no pair reaches it any more.
const FLOOR_STEP: u64 = 8;

/// Pairs are counted in at most 2^20 buckets: 4 MiB for each of at most 8 threads.
const MAX_BUCKET_BITS: u32 = 20;
const MAX_PARTS: usize = 8;

/// The number of parts in which pairs are counted in parallel.
fn parts() -> usize {
    rayon::current_num_threads().min(MAX_PARTS)
}

/// The merges of greedy BPE, in order: merge `i` joins its pair into token `256 + i`.
///
/// Each step merges the most frequent pair in all words, from left to right and without overlap. Of equally frequent
/// pairs, the smaller one is merged (left id first). There are `vocab_size - 256` merges, or fewer when no pairs are
/// left. `tick` is called about ten times a second with the number of merges done; an error from it ends the training.
///
/// # Errors
/// [`Error::VocabTooSmall`] below 256, [`Error::TooManyWords`] beyond 4 GiB of distinct words, or an error of `tick`.
pub fn train<E: From<Error>>(
    words: WordCounts,
    vocab_size: u32,
    tick: impl FnMut(usize) -> Result<(), E>,
) -> Result<Vec<Pair>, E> {
    let n_merges = vocab_size.checked_sub(256).ok_or(Error::VocabTooSmall(vocab_size))?;
    // The words take most of the memory, so their tokens have the smallest type that fits.
    if vocab_size <= 1 << u16::BITS {
        find_merges(State::<u16>::new(words)?, n_merges, tick)
    } else {
        find_merges(State::<u32>::new(words)?, n_merges, tick)
    }
}

fn find_merges<T: Token, E: From<Error>>(
    mut state: State<T>,
    n_merges: u32,
    mut tick: impl FnMut(usize) -> Result<(), E>,
) -> Result<Vec<Pair>, E> {
    let mut merges = Vec::new();
    let mut last_tick = Instant::now();
    while merges.len() < n_merges as usize {
        let Some(pair) = state.pop_most_frequent() else { break };
        state.merge(pair, 256 + merges.len() as u32);
        merges.push(pair);
        if last_tick.elapsed() >= TICK {
            tick(merges.len())?;
            last_tick = Instant::now();
        }
    }
    tick(merges.len())?;
    Ok(merges)
}

/// The type of token ids in words.
trait Token: Copy + Eq + Send + Sync + From<u8> + Into<u32> {
    /// Narrows an id that is known to fit.
    fn of(id: u32) -> Self;
}

impl Token for u16 {
    fn of(id: u32) -> Self {
        id as Self
    }
}

impl Token for u32 {
    fn of(id: u32) -> Self {
        id
    }
}

/// A pair, and its count when it was pushed on the heap. Counts only fall after that, so a stale top is pushed back with
/// its current count.
#[derive(PartialEq, Eq)]
struct Candidate {
    count: u64,
    pair: Pair,
}

impl Ord for Candidate {
    /// Most frequent first; equal counts go to the smaller pair.
    fn cmp(&self, other: &Self) -> Ordering {
        (self.count, Reverse(self.pair)).cmp(&(other.count, Reverse(other.pair)))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The occurrences of a pair.
#[derive(Default)]
struct Sites {
    /// Current number of occurrences in the text.
    count: u64,
    /// Words that contain the pair, or did; each is listed once.
    words: Vec<u32>,
}

impl Sites {
    fn add(&mut self, word: u32, count: u64) {
        self.count += count;
        if self.words.last() != Some(&word) {
            self.words.push(word);
        }
    }
}

/// The words with all merges so far, and the candidates for the next ones.
///
/// Most pairs are too rare ever to be merged, so only pairs that occur at least `floor` times are stored. A pair's count
/// only falls, so no other pair can reach the floor later, except new ones. When none is left, the floor is lowered and
/// the pairs are counted again, in words that are much shorter by then.
struct State<T> {
    words: Words<T>,
    floor: u64,
    sites: HashMap<Pair, Sites>,
    heap: BinaryHeap<Candidate>,
    left: Neighbors,
    right: Neighbors,
    lost: Vec<(Pair, u64)>,
}

impl<T: Token> State<T> {
    fn new(counts: WordCounts) -> Result<Self, Error> {
        let words = Words::new(counts)?;
        let mut state = Self {
            words,
            floor: u64::MAX,
            sites: HashMap::new(),
            heap: BinaryHeap::new(),
            left: Neighbors::default(),
            right: Neighbors::default(),
            lost: Vec::new(),
        };
        state.lower_floor();
        Ok(state)
    }

    fn pop_most_frequent(&mut self) -> Option<Pair> {
        loop {
            let Some(top) = self.heap.pop() else {
                if self.floor == 1 {
                    return None;
                }
                self.lower_floor();
                continue;
            };
            match self.sites.get(&top.pair) {
                Some(sites) if sites.count == top.count => return Some(top.pair),
                Some(sites) => self.heap.push(Candidate { count: sites.count, ..top }),
                None => {} // below the floor by now
            }
        }
    }

    /// Lowers the floor, and finds the pairs that reach it.
    ///
    /// Nearly all pairs are rare, and a table of all of them would take most of the memory. So they are first counted in
    /// hash buckets: no pair is more frequent than its bucket, and most buckets stay below the floor.
    fn lower_floor(&mut self) {
        let bits = (self.words.tokens.len() | 2).ilog2().min(MAX_BUCKET_BITS);
        let bucket = |pair| (key::hash_pair(pair) >> (u64::BITS - bits)) as usize;
        let counted = self.words.parts().map(|part| {
            let mut buckets = vec![0_u32; 1 << bits]; // saturating
            part.for_each_pair(|_, pair, count| {
                let sum = &mut buckets[bucket(pair)];
                *sum = sum.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
            });
            buckets
        });
        let join = |mut sums: Vec<u32>, others: Vec<u32>| {
            sums.iter_mut().zip(others).for_each(|(sum, other)| *sum = sum.saturating_add(other));
            sums
        };
        let buckets = counted.reduce_with(join).unwrap_or_default();
        let most = buckets.iter().copied().max().unwrap_or(0);
        self.floor = (u64::from(most).min(self.floor) / FLOOR_STEP).max(1);
        self.sites = HashMap::new();
        let n = parts();
        let parts = (0..n).into_par_iter().map(|i| {
            let mut sites: HashMap<Pair, Sites> = HashMap::new();
            self.words.all().for_each_pair(|word, pair, count| {
                let bucket = bucket(pair);
                if (bucket * n) >> bits == i && u64::from(buckets[bucket]) >= self.floor {
                    sites.entry(pair).or_default().add(word, count);
                }
            });
            sites.retain(|_, sites| sites.count >= self.floor);
            sites
        });
        for sites in parts.collect::<Vec<_>>() {
            self.sites.extend(sites);
        }
        self.heap = self.sites.iter().map(|(&pair, sites)| Candidate { count: sites.count, pair }).collect();
    }

    /// Replaces `pair` by `token` in every word.
    ///
    /// Each occurrence replaces its two pairs with its neighbors by pairs with `token`. These changes are summed by
    /// neighbor first, so that the map of pairs is updated once per neighbor and not once per occurrence.
    fn merge(&mut self, pair: Pair, token: u32) {
        let Self { words, floor, sites, heap, left, right, lost } = self;
        for word in sites.remove(&pair).unwrap_or_default().words {
            words.merge(word, pair, token, left, right);
        }
        let mut change = |old: Pair, new: Pair, gained: &mut Sites| {
            lost.push((old, gained.count));
            if gained.count >= *floor {
                heap.push(Candidate { count: gained.count, pair: new });
                sites.insert(new, std::mem::take(gained));
            }
        };
        left.drain(|neighbor, gained| change((neighbor, pair.0), (neighbor, token), gained));
        right.drain(|neighbor, gained| change((pair.1, neighbor), (token, neighbor), gained));
        // Losses come after all gains: in "abab", the pair (token, a) is gained and lost.
        for (old, count) in lost.drain(..) {
            if let Entry::Occupied(mut entry) = sites.entry(old) {
                entry.get_mut().count -= count;
                if entry.get().count < *floor {
                    entry.remove();
                }
            }
        }
    }
}

/// The neighbors of a merged pair on one side: how often and in which words each token occurs there.
#[derive(Default)]
struct Neighbors {
    sites: Vec<Sites>,
    seen: Vec<u32>,
}

impl Neighbors {
    fn add(&mut self, token: u32, word: u32, count: u64) {
        let i = token as usize;
        if i >= self.sites.len() {
            self.sites.resize_with(i + 1, Sites::default);
        }
        if self.sites[i].count == 0 {
            self.seen.push(token);
        }
        self.sites[i].add(word, count);
    }

    /// Calls `each` for every neighbor, and clears them.
    fn drain(&mut self, mut each: impl FnMut(u32, &mut Sites)) {
        for token in self.seen.drain(..) {
            let sites = &mut self.sites[token as usize];
            each(token, sites);
            sites.count = 0;
            sites.words.clear(); // a small allocation is kept for the next merge
            sites.words.shrink_to(16);
        }
    }
}

/// The distinct words as tokens, in one arena. A word shrinks in place as its pairs are merged.
struct Words<T> {
    tokens: Vec<T>,
    words: Vec<Word>,
}

struct Word {
    count: u64,
    start: u32,
    len: u32,
}

impl Word {
    fn range(&self) -> Range<usize> {
        self.start as usize..self.start as usize + self.len as usize
    }
}

impl<T: Token> Words<T> {
    fn new(counts: WordCounts) -> Result<Self, Error> {
        let (mut n, mut bytes) = (0, 0);
        for shard in &counts.shards {
            n += shard.len();
            bytes += shard.total_len();
        }
        if u32::try_from(bytes).is_err() {
            return Err(Error::TooManyWords);
        }
        let mut all = Self { tokens: Vec::with_capacity(bytes), words: Vec::with_capacity(n) };
        for shard in counts.shards {
            shard.for_each(|word, count| {
                all.words.push(Word { count, start: all.tokens.len() as u32, len: word.len() as u32 });
                all.tokens.extend(word.iter().map(|&byte| T::from(byte)));
            });
        }
        Ok(all)
    }

    fn all(&self) -> Part<'_, T> {
        Part { first: 0, words: &self.words, tokens: &self.tokens }
    }

    /// The words in one part per thread.
    fn parts(&self) -> impl ParallelIterator<Item = Part<'_, T>> {
        let len = self.words.len().div_ceil(parts()).max(1);
        let part = move |(i, words)| Part { first: (i * len) as u32, words, tokens: &self.tokens };
        self.words.par_chunks(len).enumerate().map(part)
    }

    /// Replaces `pair` by `token` in one word, from left to right, and adds its neighbors to `left` and `right`.
    fn merge(&mut self, id: u32, pair: Pair, token: u32, left: &mut Neighbors, right: &mut Neighbors) {
        let (first, second, token) = (T::of(pair.0), T::of(pair.1), T::of(token));
        let word = &mut self.words[id as usize];
        let (tokens, count) = (&mut self.tokens[word.range()], word.count);
        let (mut read, mut written) = (0, 0);
        while read < tokens.len() {
            if tokens[read] == first && tokens.get(read + 1) == Some(&second) {
                if written > 0 {
                    left.add(tokens[written - 1].into(), id, count);
                }
                if let Some(&next) = tokens.get(read + 2) {
                    right.add(next.into(), id, count);
                }
                tokens[written] = token;
                read += 2;
            } else {
                tokens[written] = tokens[read];
                read += 1;
            }
            written += 1;
        }
        word.len = written as u32;
    }
}

/// Consecutive words, from id `first` on.
struct Part<'a, T> {
    first: u32,
    words: &'a [Word],
    tokens: &'a [T],
}

impl<T: Token> Part<'_, T> {
    /// Calls `each(word, pair, count)` for all adjacent tokens.
    fn for_each_pair(&self, mut each: impl FnMut(u32, Pair, u64)) {
        for (id, word) in (self.first..).zip(self.words) {
            for pair in self.tokens[word.range()].windows(2) {
                each(id, (pair[0].into(), pair[1].into()), word.count);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Splitter;

    fn merges(texts: &[&str], vocab_size: u32) -> Vec<Pair> {
        let words = WordCounts::of(&Splitter::new(r"\S+").unwrap(), texts).unwrap();
        train(words, vocab_size, |_| Ok::<(), Error>(())).unwrap()
    }

    fn byte(c: char) -> u32 {
        c as u32
    }

    #[test]
    fn the_most_frequent_pair_comes_first() {
        assert_eq!(merges(&["abc abc xbc"], 258), [(byte('b'), byte('c')), (byte('a'), 256)]);
    }

    #[test]
    fn ties_go_to_the_smaller_pair() {
        assert_eq!(merges(&["ba ab"], 257), [(byte('a'), byte('b'))]);
        assert_eq!(merges(&["ac ab"], 257), [(byte('a'), byte('b'))]);
    }

    #[test]
    fn repeated_letters_merge_from_the_left_and_stop_when_pairs_run_out() {
        let a = byte('a');
        assert_eq!(merges(&["aaaaa"], 1000), [(a, a), (256, a), (256, 257)]);
    }

    #[test]
    fn rare_pairs_have_their_turn_when_the_frequent_ones_are_used_up() {
        let text = "xy ".repeat(10_000) + &"uv ".repeat(600) + "ab cd ab";
        assert_eq!(merges(&[&text], 1000).len(), 4);
    }

    #[test]
    fn nothing_to_learn_is_no_error() {
        assert_eq!(merges(&[], 300), []);
        assert_eq!(merges(&["a b c"], 300), []);
        assert_eq!(merges(&["ab"], 256), []);
    }

    fn no_words() -> WordCounts {
        WordCounts::of(&Splitter::new("").unwrap(), [""; 0]).unwrap()
    }

    #[test]
    fn a_vocabulary_without_room_for_the_bytes_is_an_error() {
        assert_eq!(train(no_words(), 255, |_| Ok::<(), Error>(())), Err(Error::VocabTooSmall(255)));
    }

    #[test]
    fn an_error_from_tick_ends_the_training() {
        #[derive(Debug, PartialEq)]
        struct Stop;
        impl From<Error> for Stop {
            fn from(_: Error) -> Self {
                Stop
            }
        }
        assert_eq!(train(no_words(), 300, |_| Err(Stop)), Err(Stop));
    }
}
