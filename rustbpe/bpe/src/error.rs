use std::fmt;

/// What can go wrong. Messages show what was given and what was expected.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The split pattern is not a regular expression.
    Pattern(String),
    /// The split pattern failed on a text, for example on too much backtracking.
    Split(String),
    /// The vocabulary is smaller than the 256 bytes.
    VocabTooSmall(u32),
    /// The distinct pieces of the texts exceed 4 GiB.
    TooManyWords,
    /// The token with this id is missing, or is not a merge of two earlier ones.
    Tokens(usize),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Pattern(why) => write!(f, "the split pattern is not a valid regular expression: {why}"),
            Error::Split(why) => write!(f, "the split pattern failed on a text: {why}"),
            Error::VocabTooSmall(size) => {
                write!(f, "vocab_size={size} is too small: the 256 bytes are tokens, so expected 256 or more")
            }
            Error::Tokens(id) => write!(
                f,
                "token {id} is not as expected: the first 256 are the bytes, each later one merges two earlier ones"
            ),
            Error::TooManyWords => write!(f, "the distinct pieces of the texts exceed 4 GiB"),
        }
    }
}

impl std::error::Error for Error {}
