//! The scanner splits any text as the regex does.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use rustbpe::{GPT4_PATTERN, Splitter};

static SPLITTERS: LazyLock<[Splitter; 2]> = LazyLock::new(|| {
    // The group makes the pattern unknown, so it goes to the regex engine.
    [GPT4_PATTERN.to_owned(), format!("(?:{GPT4_PATTERN})")].map(|pattern| Splitter::new(&pattern).unwrap())
});

fuzz_target!(|text: &str| {
    let [ours, theirs] = SPLITTERS.each_ref().map(|splitter| {
        let mut pieces = Vec::new();
        splitter.split(text, |piece| pieces.push(piece)).unwrap();
        pieces
    });
    assert_eq!(ours, theirs);
});
