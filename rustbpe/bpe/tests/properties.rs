//! Properties of any text: the scanner splits as the regex does, and encoding equals replaying the merges.

#![allow(clippy::unwrap_used)] // a test may panic

mod replay;

use proptest::prelude::*;
use rustbpe::{Error, GPT4_PATTERN, Pair, Splitter, Tokenizer, WordCounts, train};

/// Texts of characters that the pattern treats specially, and of any others.
fn texts() -> impl Strategy<Value = String> {
    let special = prop::sample::select(
        "aZſé漢٣½7 \t\r\n\u{a0}\u{85}\u{2028}\u{3000}'’.,-_\u{301}\u{200d}\u{378}😀\u{10FFFF}sdmtlvre"
            .chars()
            .collect::<Vec<_>>(),
    );
    let part = prop_oneof![
        8 => special.clone().prop_map(String::from),
        2 => any::<char>().prop_map(String::from),
        1 => prop::sample::select(vec!["'s", "'LL", "'ve", "'Re", "'ſ", "  ", "\r\n"]).prop_map(String::from),
        1 => (special, 1..40usize).prop_map(|(c, n)| c.to_string().repeat(n)),
    ];
    prop::collection::vec(part, 0..40).prop_map(|parts| parts.concat())
}

fn pieces<'t>(pattern: &str, text: &'t str) -> Vec<&'t str> {
    let mut out = Vec::new();
    Splitter::new(pattern).unwrap().split(text, |piece| out.push(&text[piece])).unwrap();
    out
}

/// Greedy BPE that counts all pairs again for each merge; ties go to the smallest pair.
fn naive(texts: &[String], n_merges: usize) -> Vec<Pair> {
    let mut words: Vec<Vec<u32>> = texts
        .iter()
        .flat_map(|text| pieces(GPT4_PATTERN, text))
        .map(|piece| piece.bytes().map(u32::from).collect())
        .collect();
    let mut merges = Vec::new();
    while merges.len() < n_merges {
        let mut counts = std::collections::BTreeMap::new();
        for pair in words.iter().flat_map(|word| word.windows(2)) {
            *counts.entry((pair[0], pair[1])).or_insert(0) += 1;
        }
        let Some((&pair, _)) = counts.iter().max_by_key(|&(pair, count)| (*count, std::cmp::Reverse(*pair))) else {
            break;
        };
        let token = 256 + merges.len() as u32;
        for word in &mut words {
            replay::join(word, pair, token);
        }
        merges.push(pair);
    }
    merges
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn the_scanner_splits_as_the_regex_does(text in texts(), digits in 1..=3) {
        let pattern = GPT4_PATTERN.replace("{1,2}", &format!("{{1,{digits}}}"));
        prop_assert_eq!(pieces(&pattern, &text), pieces(&format!("(?:{pattern})"), &text));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn merges_are_those_of_a_naive_trainer_and_encode_as_when_replayed(
        corpus in prop::collection::vec(texts(), 1..8),
        text in texts(),
        n_merges in 0..200usize,
    ) {
        let splitter = Splitter::new(GPT4_PATTERN).unwrap();
        let words = WordCounts::of(&splitter, &corpus).unwrap();
        let merges = train(words, 256 + n_merges as u32, |_| Ok::<(), Error>(())).unwrap();
        prop_assert_eq!(&merges, &naive(&corpus, n_merges));
        let tokenizer = Tokenizer::new(splitter.clone(), merges.clone());
        for text in corpus.iter().chain([&text]) {
            let expected: Vec<u32> = pieces(GPT4_PATTERN, text).iter().flat_map(|p| replay::replay(&merges, p)).collect();
            prop_assert_eq!(&tokenizer.encode_dropping(text, 0.0).unwrap(), &expected);
            prop_assert_eq!(tokenizer.encode(text).unwrap(), expected);
        }
        let bytes = tokenizer.token_bytes();
        for dropout in [0.1, 0.5, 1.0] {
            let ids = tokenizer.encode_dropping(&text, dropout).unwrap();
            prop_assert_eq!(ids.iter().flat_map(|&id| bytes[id as usize].clone()).collect::<Vec<u8>>(), text.as_bytes());
            if dropout == 1.0 {
                // Longer pieces are encoded without dropout.
                let ids_of = |p: &&str| if p.len() > 200 { replay::replay(&merges, p).len() } else { p.len() };
                let expected: usize = pieces(GPT4_PATTERN, &text).iter().map(ids_of).sum();
                prop_assert_eq!(ids.len(), expected);
            }
        }
        let again = Tokenizer::from_tokens(splitter, &tokenizer.token_bytes()).unwrap();
        prop_assert_eq!(again.token_bytes(), tokenizer.token_bytes());
        prop_assert_eq!(again.encode(&text), tokenizer.encode(&text));
    }
}
