//! A tokenizer trained on one text encodes that and another as replaying its merges does.
#![no_main]

#[path = "../../tests/replay/mod.rs"]
mod replay;

use libfuzzer_sys::fuzz_target;
use rustbpe::{Error, GPT4_PATTERN, Splitter, Tokenizer, WordCounts, train};

fuzz_target!(|texts: (&str, &str)| {
    let splitter = Splitter::new(GPT4_PATTERN).unwrap();
    let words = WordCounts::of(&splitter, [texts.0]).unwrap();
    let merges = train(words, 320, |_| Ok::<(), Error>(())).unwrap();
    let tokenizer = Tokenizer::new(splitter.clone(), merges.clone());
    for text in [texts.0, texts.1] {
        let mut expected: Vec<u32> = Vec::new();
        splitter.split(text, |piece| expected.extend(replay::replay(&merges, &text[piece]))).unwrap();
        assert_eq!(tokenizer.encode(text).unwrap(), expected);
        assert_eq!(tokenizer.encode(text).unwrap(), expected); // from the cache
    }
});
