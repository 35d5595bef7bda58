use std::hash::BuildHasher;
use std::sync::{Mutex, PoisonError};

use hashbrown::{DefaultHashBuilder, HashTable};
use rayon::prelude::*;

use crate::{Error, Splitter};

/// How often each distinct piece occurs. Memory is bounded by the distinct pieces, not by the text.
#[derive(Debug)]
pub struct WordCounts {
    workers: Vec<Mutex<Worker>>,
}

/// What one thread has seen. It has a splitter of its own, because threads that share a regex wait for each other:
/// two threads with one regex were slower than one thread (EPYC, 2026-11).
#[derive(Debug)]
struct Worker {
    splitter: Splitter,
    words: Words,
}

impl WordCounts {
    /// No words yet; texts will be cut by `pattern`, on all threads of the current rayon pool.
    ///
    /// # Errors
    /// [`Error::Pattern`] if `pattern` is not a regular expression.
    pub fn new(pattern: &str) -> Result<Self, Error> {
        let worker = |_| Ok(Mutex::new(Worker { splitter: Splitter::new(pattern)?, words: Words::default() }));
        Ok(Self { workers: (0..rayon::current_num_threads()).map(worker).collect::<Result<_, Error>>()? })
    }

    /// Splits `texts` and adds up the pieces.
    ///
    /// # Errors
    /// [`Error::Split`] if the pattern fails on a text, [`Error::TooManyWords`] beyond 2^32 distinct pieces.
    pub fn add_texts<T: AsRef<str> + Sync>(&mut self, texts: &[T]) -> Result<(), Error> {
        let workers = &self.workers;
        texts.par_iter().try_for_each(|text| {
            let thread = rayon::current_thread_index().unwrap_or(0);
            let worker = &mut *workers[thread % workers.len()].lock().unwrap_or_else(PoisonError::into_inner);
            let Worker { splitter, words } = worker;
            splitter.split(text.as_ref(), |piece| words.add(piece.as_bytes(), 1))
        })
    }

    /// All words and their counts in one table; the order depends on the threads, the contents do not.
    pub(crate) fn join(self) -> Result<Words, Error> {
        let workers = self.workers.into_iter().map(|w| w.into_inner().unwrap_or_else(PoisonError::into_inner));
        let mut joined = Words::default();
        for Worker { words, .. } in workers {
            if joined.words.is_empty() {
                joined = words;
                continue;
            }
            for (word, count) in words.iter() {
                joined.add(word, count)?;
            }
        }
        Ok(joined)
    }
}

/// Words in one arena, found again by hash.
#[derive(Debug, Default)]
pub(crate) struct Words {
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

impl Words {
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
        let mut words = WordCounts::new(GPT4_PATTERN).unwrap();
        for _ in 0..10 {
            words.add_texts(&vec!["to be or not to be"; 100]).unwrap();
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
        let mut words = Words::default();
        for _ in 0..3 {
            words.add(b"the", u64::from(u32::MAX)).unwrap();
        }
        assert_eq!(words.iter().next(), Some((&b"the"[..], 3 * u64::from(u32::MAX))));
    }
}
