//! Counting of distinct words, in parallel and in bounded memory.

use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, spawn};

use hashbrown::HashTable;

use crate::key::{self, Key};
use crate::{Error, Splitter};

/// Texts in one buffer, to be handed to the counting threads.
#[derive(Debug, Default)]
pub struct Texts {
    text: String,
    ends: Vec<usize>,
}

impl Texts {
    /// Bytes of a full buffer: enough to make the handover negligible, few enough to keep memory flat.
    const FULL: usize = 1 << 20;

    /// Appends a copy of `text`.
    pub fn push(&mut self, text: &str) {
        self.text.push_str(text);
        self.ends.push(self.text.len());
    }

    /// Whether the buffer should be handed over.
    pub fn is_full(&self) -> bool {
        self.text.len() >= Self::FULL
    }

    fn iter(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| &self.text[start..end])
    }
}

/// Counts the distinct pieces of texts on its own threads. Memory grows with the distinct pieces and not with the text:
/// the queue of buffers is short, and [`add`](Self::add) blocks while it is full.
#[derive(Debug)]
pub struct WordCounter {
    queue: SyncSender<Texts>,
    threads: Vec<JoinHandle<Result<(), Error>>>,
    shards: Arc<[Mutex<Words>; SHARDS]>,
}

/// Parts of the table of all words: threads seldom wait for each other, and growing one part needs little memory.
const SHARDS: usize = 8;

impl WordCounter {
    /// A counter of `splitter`'s pieces, with as many threads as the current rayon pool.
    pub fn new(splitter: &Splitter) -> Self {
        let n = rayon::current_num_threads();
        let (queue, waiting) = sync_channel(n.max(8));
        let waiting = Arc::new(Mutex::new(waiting));
        let shards = Arc::<[Mutex<Words>; SHARDS]>::default();
        let threads = (0..n).map(|_| {
            // One splitter per thread: threads that share a regex wait for each other.
            let (splitter, waiting, shards) = (splitter.clone(), Arc::clone(&waiting), Arc::clone(&shards));
            spawn(move || count(&splitter, &waiting, &*shards))
        });
        Self { threads: threads.collect(), queue, shards }
    }

    /// Counts the pieces of `texts`; blocks while the queue is full.
    ///
    /// # Errors
    /// [`Error::Split`] if the pattern failed on one of the texts so far.
    pub fn add(&mut self, texts: Texts) -> Result<(), Error> {
        let failed = self.threads.iter().any(JoinHandle::is_finished); // with an open queue: by an error
        if failed || self.queue.send(texts).is_err() {
            return self.threads.drain(..).filter(|thread| !failed || thread.is_finished()).try_for_each(joined);
        }
        Ok(())
    }

    /// Waits for all texts, and returns the counts.
    ///
    /// # Errors
    /// As for [`add`](Self::add).
    pub fn finish(self) -> Result<WordCounts, Error> {
        drop(self.queue);
        self.threads.into_iter().try_for_each(joined)?;
        let shards = self.shards.iter().map(|shard| std::mem::take(&mut *locked(shard)));
        Ok(WordCounts { shards: shards.collect() })
    }
}

fn joined(thread: JoinHandle<Result<(), Error>>) -> Result<(), Error> {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One thread's work: counts texts until the queue is closed, in a table that fits into its core's cache. A full table
/// is added to the shards.
fn count(splitter: &Splitter, waiting: &Mutex<Receiver<Texts>>, shards: &[Mutex<Words>]) -> Result<(), Error> {
    const FULL: usize = 1 << 16;
    let mut recent = Words::default();
    loop {
        let next = locked(waiting).recv();
        let Ok(texts) = next else { break };
        for text in texts.iter() {
            splitter.split(text, |piece| recent.add(text.as_bytes(), piece, 1))?;
            if recent.len() >= FULL {
                recent.move_to(shards);
            }
        }
    }
    recent.move_to(shards);
    Ok(())
}

/// The number of occurrences of each distinct piece.
#[derive(Debug)]
pub struct WordCounts {
    pub(crate) shards: Vec<Words>,
}

impl WordCounts {
    /// The counts of the pieces of `texts`.
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
}

/// Distinct words and their counts. Short words are integers in the table; the bytes of long ones are in an arena.
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
    /// Adds `count` to the count of `text[word]`.
    #[inline]
    fn add(&mut self, text: &[u8], word: Range<usize>, count: u64) {
        match key::of(text, word.clone()) {
            Some(key) => self.add_short(key::hash(key), key, count),
            None => self.add_long(key::hash_bytes(&text[word.clone()]), &text[word], count),
        }
    }

    #[inline]
    fn add_short(&mut self, hash: u64, key: Key, count: u64) {
        self.short
            .entry(hash, |short| short.key == key, |short| key::hash(short.key))
            .and_modify(|short| short.count += count)
            .or_insert(Short { key, count });
    }

    fn add_long(&mut self, hash: u64, word: &[u8], count: u64) {
        let Self { long, bytes, .. } = self;
        if let Some(known) = long.find_mut(hash, |known| &bytes[known.bytes.clone()] == word) {
            known.count += count;
            return;
        }
        let start = bytes.len();
        bytes.extend_from_slice(word);
        let new = Long { bytes: start..bytes.len(), count };
        long.insert_unique(hash, new, |known| key::hash_bytes(&bytes[known.bytes.clone()]));
    }

    /// Adds all counts to the shards, and clears this table.
    fn move_to(&mut self, shards: &[Mutex<Self>]) {
        for (i, shard) in shards.iter().enumerate() {
            let mut shard = locked(shard);
            let here = |hash: u64| (hash >> 32) as usize % shards.len() == i;
            for short in &self.short {
                let hash = key::hash(short.key);
                if here(hash) {
                    shard.add_short(hash, short.key, short.count);
                }
            }
            for long in &self.long {
                let word = &self.bytes[long.bytes.clone()];
                let hash = key::hash_bytes(word);
                if here(hash) {
                    shard.add_long(hash, word, long.count);
                }
            }
        }
        self.short.clear();
        self.long.clear();
        self.bytes.clear();
    }

    /// Bytes of all words together.
    pub(crate) fn total_len(&self) -> usize {
        self.short.iter().map(|short| key::bytes(short.key).1).sum::<usize>() + self.bytes.len()
    }

    /// The number of words.
    pub(crate) fn len(&self) -> usize {
        self.short.len() + self.long.len()
    }

    /// Calls `each(word, count)` for all words: the short ones sorted by their bytes, then the long ones.
    pub(crate) fn for_each(&self, mut each: impl FnMut(&[u8], u64)) {
        let mut sorted: Vec<&Short> = self.short.iter().collect();
        sorted.sort_unstable_by_key(|short| short.key.map(u64::swap_bytes));
        for short in sorted {
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

    fn counts(pattern: &str, texts: &[&str]) -> Vec<(Vec<u8>, u64)> {
        let splitter = Splitter::new(pattern).unwrap();
        let mut all = Vec::new();
        for shard in WordCounts::of(&splitter, texts).unwrap().shards {
            shard.for_each(|word, count| all.push((word.to_vec(), count)));
        }
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
        assert_eq!(counts(GPT4_PATTERN, &vec![&text[..]; 100]), expected.map(|(word, n)| (word.into(), 100 * n)));
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
        let mut words = ["a".repeat(14) + "\0", "a".repeat(15), "a".repeat(16), "a".repeat(17)];
        words.sort();
        let texts: Vec<&str> = words.iter().map(String::as_str).collect();
        assert_eq!(counts("(?s).+", &texts), words.map(|word| (word.into_bytes(), 1)));
    }
}
