use std::hash::BuildHasher;
use std::sync::{Mutex, PoisonError};

use hashbrown::{DefaultHashBuilder, HashTable};
use rayon::prelude::*;

use crate::{Error, Splitter};

/// How often each distinct piece occurs. Memory is bounded by the distinct pieces, not by the text.
#[derive(Debug, Default)]
pub struct WordCounts {
    /// One table a thread, each with the pieces that its thread happened to see; joined when they are read.
    shards: Vec<Mutex<Shard>>,
}

impl WordCounts {
    /// No words yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Splits `texts` on all threads of the current rayon pool and adds up the pieces.
    ///
    /// # Errors
    /// [`Error::Split`] if the pattern fails on a text, [`Error::TooManyWords`] beyond 2^32 distinct pieces.
    pub fn add_texts<T: AsRef<str> + Sync>(&mut self, texts: &[T], splitter: &Splitter) -> Result<(), Error> {
        if self.shards.is_empty() {
            self.shards.resize_with(rayon::current_num_threads(), Mutex::default);
        }
        let shards = &self.shards;
        texts.par_iter().try_for_each(|text| {
            let thread = rayon::current_thread_index().unwrap_or(0);
            let shard = &mut *shards[thread % shards.len()].lock().unwrap_or_else(PoisonError::into_inner);
            splitter.split(text.as_ref(), |piece| shard.add(piece.as_bytes(), 1))
        })
    }

    /// All words and their counts in one table; the order depends on the threads, the contents do not.
    pub(crate) fn join(self) -> Result<Shard, Error> {
        let mut shards = self.shards.into_iter().map(|s| s.into_inner().unwrap_or_else(PoisonError::into_inner));
        let mut all = shards.next().unwrap_or_default();
        for shard in shards {
            for (word, count) in shard.iter() {
                all.add(word, count)?;
            }
        }
        Ok(all)
    }
}

/// Words in one arena, found again by hash.
#[derive(Debug, Default)]
pub(crate) struct Shard {
    bytes: Vec<u8>,
    words: Vec<Word>,
    index: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

#[derive(Debug)]
struct Word {
    start: usize,
    len: usize,
    count: u64,
}

impl Word {
    fn of<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        &bytes[self.start..self.start + self.len]
    }
}

impl Shard {
    fn add(&mut self, word: &[u8], count: u64) -> Result<(), Error> {
        let Self { bytes, words, index, hasher } = self;
        let hash = hasher.hash_one(word);
        if let Some(&found) = index.find(hash, |&w| words[w as usize].of(bytes) == word) {
            words[found as usize].count += count;
            return Ok(());
        }
        let id = u32::try_from(words.len()).map_err(|_| Error::TooManyWords)?;
        words.push(Word { start: bytes.len(), len: word.len(), count });
        bytes.extend_from_slice(word);
        index.insert_unique(hash, id, |&w| hasher.hash_one(words[w as usize].of(bytes)));
        Ok(())
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&[u8], u64)> {
        self.words.iter().map(|w| (w.of(&self.bytes), w.count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GPT4_PATTERN;

    #[test]
    fn counts_survive_many_buffers_and_threads() {
        let splitter = Splitter::new(GPT4_PATTERN).unwrap();
        let mut words = WordCounts::new();
        for _ in 0..10 {
            words.add_texts(&vec!["to be or not to be"; 100], &splitter).unwrap();
        }
        let joined = words.join().unwrap();
        let mut counts: Vec<_> = joined.iter().collect();
        counts.sort();
        let expected: [(&[u8], u64); 5] =
            [(b" be", 2000), (b" not", 1000), (b" or", 1000), (b" to", 1000), (b"to", 1000)];
        assert_eq!(counts, expected);
    }

    #[test]
    fn counts_are_64_bit() {
        let mut shard = Shard::default();
        for _ in 0..3 {
            shard.add(b"the", u64::from(u32::MAX)).unwrap();
        }
        assert_eq!(shard.iter().next(), Some((&b"the"[..], 3 * u64::from(u32::MAX))));
    }
}
