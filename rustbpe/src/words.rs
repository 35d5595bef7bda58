use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, spawn};

use hashbrown::HashTable;
use rayon::prelude::*;

use crate::key::{self, Key};
use crate::{Error, Splitter};

/// Texts in one buffer, on their way to the threads that count.
#[derive(Debug, Default)]
pub struct Texts {
    text: String,
    ends: Vec<usize>,
}

impl Texts {
    /// Enough that handing it over costs nothing, little enough that memory stays flat.
    const FULL: usize = 1 << 20;

    /// Copies a text into the buffer.
    pub fn push(&mut self, text: &str) {
        self.text.push_str(text);
        self.ends.push(self.text.len());
    }

    /// Whether it is time to hand the buffer over.
    pub fn is_full(&self) -> bool {
        self.text.len() >= Self::FULL
    }

    fn iter(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| &self.text[start..end])
    }
}

/// Counts the distinct pieces of texts on threads of its own. Memory grows with the distinct pieces, not with the
/// text: few buffers wait in the queue, and who adds more has to wait as well.
#[derive(Debug)]
pub struct WordCounter {
    queue: SyncSender<Texts>,
    threads: Vec<JoinHandle<Result<Words, Error>>>,
}

impl WordCounter {
    /// Counts pieces as `splitter` cuts them, on as many threads as the current rayon pool has.
    pub fn new(splitter: &Splitter) -> Self {
        let n = rayon::current_num_threads();
        let (queue, waiting) = sync_channel(n);
        let waiting = Arc::new(Mutex::new(waiting));
        let threads = (0..n).map(|_| {
            // a splitter each: threads that share a regex wait for each other
            let (splitter, waiting) = (splitter.clone(), Arc::clone(&waiting));
            spawn(move || count(&splitter, &waiting))
        });
        Self { threads: threads.collect(), queue }
    }

    /// Adds the pieces of `texts`; waits while the queue is full.
    ///
    /// # Errors
    /// [`Error::Split`] if the pattern fails on a text, perhaps one that was added before.
    pub fn add(&mut self, texts: Texts) -> Result<(), Error> {
        let failed = self.threads.iter().any(JoinHandle::is_finished); // the queue is still open: only by an error
        if failed || self.queue.send(texts).is_err() {
            let ended = self.threads.drain(..).filter(|thread| !failed || thread.is_finished());
            return ended.map(joined).try_for_each(|words| words.map(drop));
        }
        Ok(())
    }

    /// The counts, when all texts are done.
    ///
    /// # Errors
    /// As for [`add`](Self::add).
    pub fn finish(self) -> Result<WordCounts, Error> {
        drop(self.queue);
        let parts = self.threads.into_iter().map(joined).collect::<Result<_, _>>()?;
        Ok(WordCounts { parts })
    }
}

fn joined(thread: JoinHandle<Result<Words, Error>>) -> Result<Words, Error> {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// One thread's work: takes texts until the queue is closed.
fn count(splitter: &Splitter, waiting: &Mutex<Receiver<Texts>>) -> Result<Words, Error> {
    let mut words = Words::default();
    loop {
        let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(texts) = next else { return Ok(words) };
        for text in texts.iter() {
            splitter.split(text, |piece| words.add(text.as_bytes(), piece, 1))?;
        }
    }
}

/// How often each distinct piece occurs.
#[derive(Debug)]
pub struct WordCounts {
    parts: Vec<Words>,
}

impl WordCounts {
    /// The counts of texts that are at hand.
    ///
    /// # Errors
    /// As for [`WordCounter::add`].
    pub fn of<T: AsRef<str>>(splitter: &Splitter, texts: impl IntoIterator<Item = T>) -> Result<Self, Error> {
        let mut counter = WordCounter::new(splitter);
        let mut batch = Texts::default();
        for text in texts {
            batch.push(text.as_ref());
            if batch.is_full() {
                counter.add(std::mem::take(&mut batch))?;
            }
        }
        counter.add(batch)?;
        counter.finish()
    }

    /// All words in one table; their order depends on the threads, the counts do not.
    pub(crate) fn join(self) -> Words {
        let join = |one: Words, other: Words| {
            let (mut large, small) = if one.len() < other.len() { (other, one) } else { (one, other) };
            small.for_each(|word, count| large.add(word, 0..word.len(), count));
            large
        };
        self.parts.into_par_iter().reduce(Words::default, join)
    }
}

/// Distinct words and their counts. Most are short enough to be integers in the table itself; the others are in one
/// arena.
#[derive(Debug, Default)]
pub(crate) struct Words {
    short: HashTable<Short>,
    long: HashTable<Long>,
    bytes: Vec<u8>,
}

#[derive(Debug)]
struct Short {
    key: Key,
    count: u64,
}

#[derive(Debug)]
struct Long {
    bytes: Range<usize>,
    count: u64,
}

impl Words {
    /// Counts `text[word]` another `count` times.
    #[inline]
    fn add(&mut self, text: &[u8], word: Range<usize>, count: u64) {
        match key::of(text, word.clone()) {
            Some(key) => self.add_short(key, count),
            None => self.add_long(&text[word], count),
        }
    }

    #[inline]
    fn add_short(&mut self, key: Key, count: u64) {
        self.short
            .entry(key::hash(key), |short| short.key == key, |short| key::hash(short.key))
            .and_modify(|short| short.count += count)
            .or_insert(Short { key, count });
    }

    fn add_long(&mut self, word: &[u8], count: u64) {
        let Self { long, bytes, .. } = self;
        let hash = key::hash_bytes(word);
        if let Some(known) = long.find_mut(hash, |known| &bytes[known.bytes.clone()] == word) {
            known.count += count;
            return;
        }
        let start = bytes.len();
        bytes.extend_from_slice(word);
        let new = Long { bytes: start..bytes.len(), count };
        long.insert_unique(hash, new, |known| key::hash_bytes(&bytes[known.bytes.clone()]));
    }

    /// How many words there are.
    pub(crate) fn len(&self) -> usize {
        self.short.len() + self.long.len()
    }

    /// Calls `each(word, count)` for all words.
    pub(crate) fn for_each(&self, mut each: impl FnMut(&[u8], u64)) {
        for short in &self.short {
            let (bytes, len) = key::bytes(short.key);
            each(&bytes[..len], short.count);
        }
        for long in &self.long {
            each(&self.bytes[long.bytes.clone()], long.count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GPT4_PATTERN;

    fn counts(texts: &[&str]) -> Vec<(Vec<u8>, u64)> {
        let splitter = Splitter::new(GPT4_PATTERN).unwrap();
        let mut all = Vec::new();
        WordCounts::of(&splitter, texts).unwrap().join().for_each(|word, count| all.push((word.to_vec(), count)));
        all.sort();
        all
    }

    #[test]
    fn counts_survive_many_buffers_and_threads() {
        let text = "to be or not to be, incomprehensibilities ".repeat(1000);
        let expected = [
            (" ", 1),
            (" be", 2000),
            (" incomprehensibilities", 1000),
            (" not", 1000),
            (" or", 1000),
            (" to", 1999),
            (",", 1000),
            ("to", 1),
        ];
        assert_eq!(counts(&vec![&text[..]; 100]), expected.map(|(word, n)| (word.into(), 100 * n)));
    }

    #[test]
    fn counts_are_64_bit() {
        let mut words = Words::default();
        for _ in 0..3 {
            words.add(b"the", 0..3, u64::from(u32::MAX));
        }
        words.for_each(|word, count| assert_eq!((word, count), (&b"the"[..], 3 * u64::from(u32::MAX))));
    }

    #[test]
    fn words_of_15_16_and_17_bytes_are_kept_apart() {
        let words = ["a".repeat(15), "a".repeat(16), "a".repeat(17), "a".repeat(14) + "\0"];
        let texts: Vec<&str> = words.iter().map(String::as_str).collect();
        let splitter = Splitter::new(r"(?s).+").unwrap();
        let mut n = 0;
        WordCounts::of(&splitter, &texts).unwrap().join().for_each(|word, count| {
            assert!(words.iter().any(|w| w.as_bytes() == word) && count == 1);
            n += 1;
        });
        assert_eq!(n, 4);
    }
}
