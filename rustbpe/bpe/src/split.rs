//! Splitting of text into pieces, by the scanner or by a regex engine.

use std::ops::Range;

use fancy_regex::{Regex, RegexBuilder};

use crate::Error;
use crate::scanner::Scanner;

/// GPT-4's split pattern, with digits in groups of 1 or 2 instead of 1 to 3.
pub const GPT4_PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)",
    r"|[^\r\n\p{L}\p{N}]?+\p{L}+",
    r"|\p{N}{1,2}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*",
    r"|\s*[\r\n]",
    r"|\s+(?!\S)",
    r"|\s+",
);

/// Splits text into pieces. Merges never cross the border of a piece.
#[derive(Debug, Clone)]
pub struct Splitter {
    pattern: String,
    engine: Engine,
}

#[derive(Debug, Clone)]
enum Engine {
    /// For [`GPT4_PATTERN`] and its variants with other groups of digits: the same pieces, much faster.
    Scanner(Scanner),
    Regex(Regex),
}

impl Splitter {
    /// A splitter whose pieces are the matches of `pattern`. Text between matches is dropped.
    ///
    /// # Errors
    /// [`Error::Pattern`] if `pattern` is not a regular expression.
    pub fn new(pattern: &str) -> Result<Self, Error> {
        let engine = match digits_of(pattern) {
            Some(max_digits) => Engine::Scanner(Scanner { max_digits }),
            None => Engine::Regex(
                RegexBuilder::new(pattern)
                    .backtrack_limit(usize::MAX) // a long run of spaces backtracks once per space, which is no error
                    .build()
                    .map_err(|e| Error::Pattern(e.to_string()))?,
            ),
        };
        Ok(Self { pattern: pattern.to_owned(), engine })
    }

    /// The pattern that was given to [`new`](Self::new).
    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Calls `each` with the range of every piece of `text`, in order.
    ///
    /// # Errors
    /// [`Error::Split`] if the pattern fails on this text.
    pub fn split(&self, text: &str, mut each: impl FnMut(Range<usize>)) -> Result<(), Error> {
        match &self.engine {
            Engine::Scanner(scanner) => scanner.split(text, each),
            Engine::Regex(regex) => {
                for piece in regex.find_iter(text) {
                    each(piece.map_err(|e| Error::Split(e.to_string()))?.range());
                }
            }
        }
        Ok(())
    }
}

/// The largest group of digits, if `pattern` is [`GPT4_PATTERN`] up to the size of these groups.
fn digits_of(pattern: &str) -> Option<usize> {
    let (head, tail) = GPT4_PATTERN.split_once("{1,2}")?;
    let digits = pattern.strip_prefix(head)?.strip_suffix(tail)?;
    match digits.strip_prefix("{1,")?.strip_suffix('}')?.as_bytes() {
        [digit @ b'1'..=b'9'] => Some(usize::from(digit - b'0')),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces<'t>(pattern: &str, text: &'t str) -> Vec<&'t str> {
        let mut out = Vec::new();
        Splitter::new(pattern).unwrap().split(text, |piece| out.push(&text[piece])).unwrap();
        out
    }

    /// An equivalent pattern that goes to the regex engine, because the group makes it unknown.
    fn regex(pattern: &str) -> String {
        format!("(?:{pattern})")
    }

    #[test]
    fn words_numbers_and_contractions() {
        let text = "I'LL pay 12345 (now)";
        assert_eq!(pieces(GPT4_PATTERN, text), ["I", "'LL", " pay", " ", "12", "34", "5", " (", "now", ")"]);
        let three = GPT4_PATTERN.replace("{1,2}", "{1,3}");
        assert_eq!(pieces(&three, text), ["I", "'LL", " pay", " ", "123", "45", " (", "now", ")"]);
    }

    #[test]
    fn spaces_and_newlines() {
        assert_eq!(pieces(GPT4_PATTERN, "a  b\r\n\n c  \n"), ["a", " ", " b", "\r\n\n", " c", "  \n"]);
    }

    #[test]
    fn the_scanner_and_the_regex_agree_on_every_character_in_context() {
        let regex = regex(GPT4_PATTERN);
        let (scan, slow) = (Splitter::new(GPT4_PATTERN).unwrap(), Splitter::new(&regex).unwrap());
        assert!(matches!((&scan.engine, &slow.engine), (Engine::Scanner(_), Engine::Regex(_))));
        for block in (0..=0x10_FFFF).collect::<Vec<u32>>().chunks(512) {
            let text: String = block
                .iter()
                .filter_map(|&code| char::from_u32(code))
                .map(|c| format!("{c}{c}a{c} 1{c}'s{c}'{c}l  {c}.\n{c}"))
                .collect();
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            scan.split(&text, |piece| ours.push(piece)).unwrap();
            slow.split(&text, |piece| theirs.push(piece)).unwrap();
            assert_eq!(ours, theirs, "in the block of U+{:04X}", block[0]);
        }
    }

    #[test]
    fn the_scanner_and_the_regex_agree_on_all_short_texts() {
        let regex = regex(GPT4_PATTERN);
        let (scan, slow) = (Splitter::new(GPT4_PATTERN).unwrap(), Splitter::new(&regex).unwrap());
        let alphabet =
            ["a", "S", "ſ", "l", "'", "7", "½", " ", "\u{a0}", "\t", "\n", "\r", ".", "\u{301}", "漢", "\u{10FFFF}"];
        for number in 0..16_usize.pow(5) {
            let text: String = (0..5).map(|place| alphabet[number >> (4 * place) & 15]).collect();
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            scan.split(&text, |piece| ours.push(piece)).unwrap();
            slow.split(&text, |piece| theirs.push(piece)).unwrap();
            assert_eq!(ours, theirs, "{text:?}");
        }
    }

    #[test]
    fn long_runs_are_no_error() {
        for run in [" ", "\n", "a", "7", ".", "'", "漢", "\u{a0}"] {
            let text = run.repeat(50_000) + "x";
            assert_eq!(pieces(GPT4_PATTERN, &text).concat(), text);
        }
    }

    #[test]
    fn a_bad_pattern_is_an_error() {
        assert!(matches!(Splitter::new("(["), Err(Error::Pattern(_))));
    }
}
