use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use hashbrown::HashMap;

use crate::{Error, WordCounts};

/// Two adjacent token ids, left and right.
pub type Pair = (u32, u32);

/// How often the caller hears of progress, and can stop the training.
const TICK: Duration = Duration::from_millis(100);

/// The merges of greedy BPE, in order: merge `i` joins its pair into token `256 + i`.
///
/// Each step merges the pair that occurs most often in the words, from left to right and without overlap; of pairs
/// that occur equally often, the smaller one (left id first). There are `vocab_size - 256` merges, or fewer when no
/// pairs are left. `tick` is called about ten times a second with the number of merges done; an error from it ends
/// the training.
///
/// # Errors
/// [`Error::VocabTooSmall`] below 256, [`Error::TooManyWords`] beyond 2^32 distinct words, or whatever `tick` returns.
pub fn train<E: From<Error>>(
    words: WordCounts,
    vocab_size: u32,
    mut tick: impl FnMut(usize) -> Result<(), E>,
) -> Result<Vec<Pair>, E> {
    let n_merges = vocab_size.checked_sub(256).ok_or(Error::VocabTooSmall(vocab_size))?;
    let mut state = State::new(words)?;
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

/// A pair's count when it was put on the heap. Counts only fall after that, so a stale top is lowered and put back.
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

/// Where a pair is.
#[derive(Clone, Default)]
struct Sites {
    /// Occurrences in the text as it is now.
    count: u64,
    /// Words that contain the pair, or once did; each is listed once.
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

struct State {
    words: Words,
    sites: HashMap<Pair, Sites>,
    heap: BinaryHeap<Candidate>,
}

impl State {
    fn new(counts: WordCounts) -> Result<Self, Error> {
        let words = Words::new(counts)?;
        let mut of_bytes = vec![Sites::default(); 256 * 256]; // the first pairs are bytes: no hashing needed
        for (id, word) in words.words.iter().enumerate() {
            for pair in words.tokens[word.start..word.start + word.len].windows(2) {
                of_bytes[(pair[0] * 256 + pair[1]) as usize].add(id as u32, word.count);
            }
        }
        let seen = of_bytes.into_iter().enumerate().filter(|(_, sites)| sites.count > 0);
        let sites: HashMap<Pair, Sites> = seen.map(|(i, sites)| ((i as u32 / 256, i as u32 % 256), sites)).collect();
        let heap = sites.iter().map(|(&pair, sites)| Candidate { count: sites.count, pair }).collect();
        Ok(Self { words, sites, heap })
    }

    fn pop_most_frequent(&mut self) -> Option<Pair> {
        loop {
            let top = self.heap.pop()?;
            match self.sites.get(&top.pair)?.count {
                0 => _ = self.sites.remove(&top.pair),
                count if count < top.count => self.heap.push(Candidate { count, ..top }),
                _ => return Some(top.pair),
            }
        }
    }

    /// Replaces `pair` by `token` in every word. The pairs that gain all contain `token`, so they are all new.
    fn merge(&mut self, pair: Pair, token: u32) {
        let Self { words, sites, heap } = self;
        let mut born = Vec::new();
        for word in sites.remove(&pair).unwrap_or_default().words {
            words.merge(word, pair, token, |lost, gained, count| {
                if let Some(sites) = sites.get_mut(&lost) {
                    sites.count -= count; // absent only if it is `pair` itself, overlapping as in "aaa"
                }
                let sites = sites.entry(gained).or_insert_with(|| {
                    born.push(gained);
                    Sites::default()
                });
                sites.add(word, count);
            });
        }
        heap.extend(born.into_iter().map(|pair| Candidate { count: sites[&pair].count, pair }));
    }
}

/// The distinct words as tokens, one behind the other in one arena; a word shrinks in place as its pairs merge.
struct Words {
    tokens: Vec<u32>,
    words: Vec<Word>,
}

struct Word {
    start: usize,
    len: usize,
    count: u64,
}

impl Words {
    fn new(counts: WordCounts) -> Result<Self, Error> {
        let (mut tokens, mut words) = (Vec::new(), Vec::new());
        for (word, count) in counts.join()?.iter() {
            words.push(Word { start: tokens.len(), len: word.len(), count });
            tokens.extend(word.iter().map(|&byte| u32::from(byte)));
        }
        Ok(Self { tokens, words })
    }

    /// Replaces `pair` by `token` in one word, from left to right, and calls `changed(lost, gained, count)` for each
    /// neighbouring pair that an occurrence turns into another.
    fn merge(&mut self, word: u32, pair: Pair, token: u32, mut changed: impl FnMut(Pair, Pair, u64)) {
        let Word { start, ref mut len, count } = self.words[word as usize];
        let tokens = &mut self.tokens[start..start + *len];
        let (mut read, mut written) = (0, 0);
        while read < tokens.len() {
            if tokens[read] == pair.0 && tokens.get(read + 1) == Some(&pair.1) {
                if written > 0 {
                    let left = tokens[written - 1];
                    changed((left, pair.0), (left, token), count);
                }
                if let Some(&right) = tokens.get(read + 2) {
                    changed((pair.1, right), (token, right), count);
                }
                tokens[written] = token;
                read += 2;
            } else {
                tokens[written] = tokens[read];
                read += 1;
            }
            written += 1;
        }
        *len = written;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merges(texts: &[&str], vocab_size: u32) -> Vec<Pair> {
        let mut words = WordCounts::new(r"\S+").unwrap();
        words.add_texts(texts).unwrap();
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
    fn nothing_to_learn_is_no_error() {
        assert_eq!(merges(&[], 300), []);
        assert_eq!(merges(&["a b c"], 300), []);
        assert_eq!(merges(&["ab"], 256), []);
    }

    #[test]
    fn a_vocabulary_without_room_for_the_bytes_is_an_error() {
        let result = train(WordCounts::new("").unwrap(), 255, |_| Ok::<(), Error>(()));
        assert_eq!(result, Err(Error::VocabTooSmall(255)));
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
        assert_eq!(train(WordCounts::new("").unwrap(), 300, |_| Err(Stop)), Err(Stop));
    }
}
