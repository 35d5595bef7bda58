//! The trainer and the encoder against slow ones that are obviously right.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

use rustbpe::{Error, GPT4_PATTERN, Pair, Splitter, Tokenizer, WordCounts, train};

/// A linear congruential generator (Knuth's MMIX constants): the tests need no crate for randomness.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }

    /// Short texts over few letters, so that ties and repeated letters are common.
    fn texts(&mut self, alphabet: &[char]) -> Vec<String> {
        let text = |r: &mut Self| (0..r.below(60)).map(|_| alphabet[r.below(alphabet.len())]).collect();
        (0..1 + self.below(30)).map(|_| text(self)).collect()
    }
}

const ALPHABETS: [&[char]; 4] =
    [&['a'], &['a', 'b'], &['a', 'b', 'c', ' '], &['a', 'é', '漢', '1', ' ', '\n', '\'', 's']];

fn pieces(text: &str) -> Vec<Vec<u32>> {
    static SPLITTER: LazyLock<Splitter> = LazyLock::new(|| Splitter::new(GPT4_PATTERN).unwrap());
    let mut out = Vec::new();
    let push = |piece: &str| {
        out.push(piece.bytes().map(u32::from).collect());
        Ok(())
    };
    SPLITTER.split(text, push).unwrap();
    out
}

fn replace(tokens: &mut Vec<u32>, pair: Pair, token: u32) {
    let mut i = 0;
    while i + 1 < tokens.len() {
        if (tokens[i], tokens[i + 1]) == pair {
            tokens.splice(i..i + 2, [token]);
        }
        i += 1;
    }
}

/// Counts all pairs anew for every merge.
fn naive_train(texts: &[String], vocab_size: u32) -> Vec<Pair> {
    let mut words: Vec<_> = texts.iter().flat_map(|text| pieces(text)).collect();
    let mut merges = Vec::new();
    for token in 256..vocab_size {
        let mut counts = HashMap::<Pair, u64>::new();
        for pair in words.iter().flat_map(|word| word.windows(2)) {
            *counts.entry((pair[0], pair[1])).or_default() += 1;
        }
        let Some((&pair, _)) = counts.iter().max_by_key(|&(&pair, &count)| (count, Reverse(pair))) else { break };
        words.iter_mut().for_each(|word| replace(word, pair, token));
        merges.push(pair);
    }
    merges
}

fn fast_train(texts: &[String], vocab_size: u32, threads: usize) -> Vec<Pair> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let mut words = WordCounts::new(GPT4_PATTERN).unwrap();
        texts.chunks(7).for_each(|buffer| words.add_texts(buffer).unwrap());
        train(words, vocab_size, |_| Ok::<(), Error>(())).unwrap()
    })
}

#[test]
fn merges_are_the_naive_ones_on_any_number_of_threads() {
    let mut random = Random(1);
    for round in 0..80 {
        let texts = random.texts(ALPHABETS[round % ALPHABETS.len()]);
        let vocab_size = 256 + random.below(60) as u32;
        let expected = naive_train(&texts, vocab_size);
        assert_eq!(fast_train(&texts, vocab_size, 1), expected, "{texts:?}");
        assert_eq!(fast_train(&texts, vocab_size, 4), expected, "{texts:?}");
    }
}

#[test]
fn encoding_replays_the_merges_and_no_two_tokens_have_the_same_bytes() {
    let mut random = Random(2);
    for round in 0..80 {
        let alphabet = ALPHABETS[round % ALPHABETS.len()];
        let merges = fast_train(&random.texts(alphabet), 400, 2);
        let tokenizer = Tokenizer::new(Splitter::new(GPT4_PATTERN).unwrap(), merges.clone());
        for text in random.texts(alphabet) {
            let mut expected = pieces(&text);
            for (&pair, token) in merges.iter().zip(256..) {
                expected.iter_mut().for_each(|word| replace(word, pair, token));
            }
            assert_eq!(tokenizer.encode(&text).unwrap(), expected.concat(), "{text:?}");
        }
        let bytes = tokenizer.token_bytes();
        assert_eq!(bytes.len(), 256 + merges.len());
        assert_eq!(bytes.iter().collect::<HashSet<_>>().len(), bytes.len());
    }
}

#[test]
fn a_long_word_is_encoded_in_near_linear_time() {
    let merges = fast_train(&["a".repeat(64)], 262, 1);
    let tokenizer = Tokenizer::new(Splitter::new(GPT4_PATTERN).unwrap(), merges);
    assert_eq!(tokenizer.encode(&"a".repeat(1 << 18)).unwrap().len(), 1 << 12); // the longest token is 64 letters
}
