use fancy_regex::{Regex, RegexBuilder};

use crate::Error;

/// GPT-4's split pattern, with digits in groups of one or two instead of one to three.
pub const GPT4_PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)",
    r"|[^\r\n\p{L}\p{N}]?+\p{L}+",
    r"|\p{N}{1,2}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*",
    r"|\s*[\r\n]",
    r"|\s+(?!\S)",
    r"|\s+",
);

/// Cuts text into the pieces that merges never cross.
#[derive(Debug, Clone)]
pub struct Splitter {
    pattern: String,
    regex: Regex,
}

impl Splitter {
    /// A splitter for `pattern`; pieces are its matches, and text between them is left out.
    ///
    /// # Errors
    /// [`Error::Pattern`] if `pattern` is not a regular expression.
    pub fn new(pattern: &str) -> Result<Self, Error> {
        let regex = RegexBuilder::new(pattern)
            .backtrack_limit(usize::MAX) // a long run of spaces takes a step back for each: no error
            .build()
            .map_err(|e| Error::Pattern(e.to_string()))?;
        Ok(Self { pattern: pattern.to_owned(), regex })
    }

    /// The pattern as it was given.
    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Calls `each` with every piece of `text`, in order.
    ///
    /// # Errors
    /// [`Error::Split`] if the pattern fails on this text, or whatever `each` returns.
    pub fn split<'t>(&self, text: &'t str, mut each: impl FnMut(&'t str) -> Result<(), Error>) -> Result<(), Error> {
        for piece in self.regex.find_iter(text) {
            each(piece.map_err(|e| Error::Split(e.to_string()))?.as_str())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(text: &str) -> Vec<&str> {
        let mut out = Vec::new();
        let splitter = Splitter::new(GPT4_PATTERN).unwrap();
        let push = |piece| {
            out.push(piece);
            Ok(())
        };
        splitter.split(text, push).unwrap();
        out
    }

    #[test]
    fn words_numbers_and_contractions() {
        assert_eq!(pieces("I'LL pay 12345 (now)"), ["I", "'LL", " pay", " ", "12", "34", "5", " (", "now", ")"]);
    }

    #[test]
    fn spaces_and_newlines() {
        assert_eq!(pieces("a  b\r\n\n c  \n"), ["a", " ", " b", "\r\n\n", " c", "  \n"]);
    }

    #[test]
    fn nothing_is_lost() {
        let text = "Ünïcödé 漢字 ½ ٣٤٥\u{200b}e\u{301} \u{3000}\u{a0}x'S''ve!!\r\n\t\t.";
        assert_eq!(pieces(text).concat(), text);
    }

    #[test]
    fn a_long_run_of_spaces_is_no_error() {
        let text = " ".repeat(50_000) + "x";
        assert_eq!(pieces(&text).len(), 2);
    }

    #[test]
    fn a_bad_pattern_is_an_error() {
        assert!(matches!(Splitter::new("(["), Err(Error::Pattern(_))));
    }
}
