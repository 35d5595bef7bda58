use std::fmt;

use crate::Isa;

/// What can go wrong. Messages show what was given and what was expected.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// A slice has the wrong number of elements.
    Length {
        /// The argument.
        name: &'static str,
        /// Its number of elements.
        given: usize,
        /// The number that the shapes ask for; `None` if it overflows.
        expected: Option<usize>,
    },
    /// A matrix or the cache has the wrong shape.
    Shape {
        /// The argument.
        name: String,
        /// Its shape.
        given: Vec<usize>,
        /// The shape that the model asks for.
        expected: Vec<usize>,
    },
    /// A number of the model's configuration is out of range.
    Config {
        /// The number's name.
        name: &'static str,
        /// The number.
        given: usize,
        /// What is allowed.
        expected: &'static str,
    },
    /// A token id is not below the number of embeddings.
    Token {
        /// The id.
        id: usize,
        /// The number of embeddings.
        vocab_size: usize,
    },
    /// The cache has too few rows or columns for the tokens.
    CacheFull {
        /// Rows that are needed.
        rows: usize,
        /// Columns that are needed.
        columns: usize,
        /// Rows of the cache.
        cache_rows: usize,
        /// Columns of the cache.
        cache_columns: usize,
    },
    /// This CPU has no such instruction set.
    Isa(Isa),
}

impl Error {
    pub(crate) fn check_length(name: &'static str, given: usize, expected: Option<usize>) -> Result<(), Self> {
        if expected == Some(given) { Ok(()) } else { Err(Self::Length { name, given, expected }) }
    }
}

impl Isa {
    /// This instruction set, if the CPU has it.
    pub(crate) fn check(self) -> Result<Self, Error> {
        if self.is_available() { Ok(self) } else { Err(Error::Isa(self)) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length { name, given, expected: Some(expected) } => {
                write!(f, "{name}: {given} elements given, {expected} expected")
            }
            Self::Length { name, given, expected: None } => {
                write!(f, "{name}: {given} elements given, and the expected number overflows")
            }
            Self::Shape { name, given, expected } => write!(f, "{name}: shape {given:?} given, {expected:?} expected"),
            Self::Config { name, given, expected } => write!(f, "{name}={given}: expected {expected}"),
            Self::Token { id, vocab_size } => {
                write!(f, "token {id} is not in the vocabulary: expected ids below {vocab_size}")
            }
            Self::CacheFull { rows, columns, cache_rows, cache_columns } => write!(
                f,
                "the cache of {cache_rows} rows and {cache_columns} columns is too small: the tokens need {rows} rows \
                 and {columns} columns"
            ),
            Self::Isa(isa) => write!(f, "this CPU has no {isa:?}"),
        }
    }
}

impl std::error::Error for Error {}
