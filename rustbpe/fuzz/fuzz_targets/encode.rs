//! A tokenizer trained on the first half of any text encodes the second as when its merges are replayed.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rustbpe::{Error, GPT4_PATTERN, Splitter, Tokenizer, WordCounts, train};

fuzz_target!(|texts: (&str, &str)| {
    let splitter = Splitter::new(GPT4_PATTERN).unwrap();
    let words = WordCounts::of(&splitter, [texts.0]).unwrap();
    let merges = train(words, 320, |_| Ok::<(), Error>(())).unwrap();
    let tokenizer = Tokenizer::new(splitter.clone(), merges.clone());
    for text in [texts.0, texts.1] {
        let mut expected: Vec<u32> = Vec::new();
        splitter
            .split(text, |piece| {
                let mut tokens: Vec<u32> = text[piece].bytes().map(u32::from).collect();
                for (&(left, right), token) in merges.iter().zip(256..) {
                    let mut i = 0;
                    while i + 1 < tokens.len() {
                        if (tokens[i], tokens[i + 1]) == (left, right) {
                            tokens[i] = token;
                            tokens.remove(i + 1);
                        }
                        i += 1;
                    }
                }
                expected.extend(tokens);
            })
            .unwrap();
        assert_eq!(tokenizer.encode(text).unwrap(), expected);
        assert_eq!(tokenizer.encode(text).unwrap(), expected); // from the cache
    }
});
