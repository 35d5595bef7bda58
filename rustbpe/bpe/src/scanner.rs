//! GPT-4's split pattern without a regex engine: one pass over the bytes, with one character of lookahead.
//!
//! The alternatives of the pattern begin with different kinds of characters, so the first character (and the second,
//! after a space or a mark) decides which one matches. Each position is read at most twice; a run of white space may be
//! read once more for the next piece.

use std::ops::Range;
use std::sync::LazyLock;

use regex_syntax::hir::{Class, HirKind};

/// The kinds of characters that the pattern distinguishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// `[^\s\p{L}\p{N}]`
    Mark,
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
    /// `[\r\n]`
    Newline,
    /// `\s` but not `[\r\n]`
    Space,
    /// The end of the text.
    End,
}

/// The kinds of all characters, in pages of 256. Equal pages are stored once.
struct Kinds {
    page_of: Vec<u8>,
    pages: Vec<[Kind; 256]>,
}

/// Built from the regex engine's tables, so that both use the same version of Unicode.
static KINDS: LazyLock<Kinds> = LazyLock::new(|| {
    let mut kinds = vec![Kind::Mark; 0x11_0000];
    for (class, kind) in [(r"\p{L}", Kind::Letter), (r"\p{N}", Kind::Number), (r"\s", Kind::Space)] {
        let parsed = regex_syntax::parse(class).map(|parsed| parsed.into_kind());
        let Ok(HirKind::Class(Class::Unicode(ranges))) = parsed else { unreachable!("{class} is a Unicode class") };
        for range in ranges.iter() {
            kinds[range.start() as usize..=range.end() as usize].fill(kind);
        }
    }
    kinds['\r' as usize] = Kind::Newline;
    kinds['\n' as usize] = Kind::Newline;
    let mut pages: Vec<[Kind; 256]> = Vec::new();
    let page_of = kinds.as_chunks().0.iter().map(|page| {
        let index = pages.iter().position(|known| known == page).unwrap_or_else(|| {
            pages.push(*page);
            pages.len() - 1
        });
        index as u8
    });
    let page_of = page_of.collect();
    assert!(pages.len() <= 256, "{} distinct pages do not fit into u8", pages.len());
    Kinds { page_of, pages }
});

/// Splits text into pieces.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scanner {
    /// Digits per piece, at most.
    pub(crate) max_digits: usize,
}

impl Scanner {
    /// Calls `each` with the range of every piece, in order. The pieces cover `text`.
    pub(crate) fn split(self, text: &str, mut each: impl FnMut(Range<usize>)) {
        let text = Text { bytes: text.as_bytes(), kinds: &KINDS, ascii: &KINDS.pages[0] };
        let mut start = 0;
        while start < text.bytes.len() {
            let end = self.piece(&text, start);
            each(start..end);
            start = end;
        }
    }

    /// The end of the piece that starts at `start`.
    fn piece(self, text: &Text, start: usize) -> usize {
        let (first, second) = text.at(start);
        match first {
            Kind::Letter => text.skip_letters(second),
            Kind::Number => {
                let mut end = second;
                for _ in 1..self.max_digits {
                    let (Kind::Number, next) = text.at(end) else { break };
                    end = next;
                }
                end
            }
            Kind::Mark => {
                if let Some(end) = text.contraction(start) {
                    return end;
                }
                match text.at(second) {
                    (Kind::Letter, next) => text.skip_letters(next),
                    _ => text.skip(text.skip(second, Kind::Mark), Kind::Newline),
                }
            }
            Kind::Space => match text.at(second) {
                (Kind::Letter, next) => text.skip_letters(next),
                (Kind::Mark, next) if text.bytes[start] == b' ' => {
                    text.skip(text.skip(next, Kind::Mark), Kind::Newline)
                }
                _ => text.white_space(start),
            },
            Kind::Newline => text.white_space(start),
            Kind::End => start,
        }
    }
}

struct Text<'t> {
    bytes: &'t [u8],
    kinds: &'t Kinds,
    ascii: &'t [Kind; 256],
}

impl Text<'_> {
    /// The kind of the character at `i`, and the start of the next one.
    #[inline]
    fn at(&self, i: usize) -> (Kind, usize) {
        match self.bytes.get(i) {
            Some(&byte) if byte < 0x80 => (self.ascii[byte as usize], i + 1),
            Some(&byte) => self.at_wide(byte, i),
            None => (Kind::End, i),
        }
    }

    /// The same for a multi-byte character that starts with `byte`.
    fn at_wide(&self, byte: u8, i: usize) -> (Kind, usize) {
        let tail = |n: usize| usize::from(self.bytes[i + n] & 0x3F);
        let (code, len) = match byte {
            ..0xE0 => (usize::from(byte & 0x1F) << 6 | tail(1), 2),
            0xE0..0xF0 => (usize::from(byte & 0x0F) << 12 | tail(1) << 6 | tail(2), 3),
            _ => (usize::from(byte & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3), 4),
        };
        (self.kinds.pages[usize::from(self.kinds.page_of[code >> 8])][code & 0xFF], i + len)
    }

    /// The end of the run of `kind` that starts at `i`.
    #[inline]
    fn skip(&self, mut i: usize, kind: Kind) -> usize {
        loop {
            match self.at(i) {
                (other, next) if other == kind => i = next,
                _ => return i,
            }
        }
    }

    /// The end of the run of letters at `i`. Reads eight bytes at a time while they are ASCII.
    #[inline]
    fn skip_letters(&self, mut i: usize) -> usize {
        loop {
            while let Some(eight) = self.bytes.get(i..).and_then(<[u8]>::first_chunk) {
                let letters = leading_letters(u64::from_le_bytes(*eight));
                i += letters;
                if letters < 8 {
                    break;
                }
            }
            match self.at(i) {
                (Kind::Letter, next) => i = next,
                _ => return i,
            }
        }
    }

    /// The end of `'(?i:[sdmt]|ll|ve|re)` at `start`. `(?i:s)` includes the long s.
    fn contraction(&self, start: usize) -> Option<usize> {
        let rest = self.bytes[start..].strip_prefix(b"'")?;
        let lower = |i: usize| rest.get(i).map(u8::to_ascii_lowercase);
        match (lower(0)?, lower(1)) {
            (b's' | b'd' | b'm' | b't', _) => Some(start + 2),
            (b'l', Some(b'l')) | (b'v' | b'r', Some(b'e')) => Some(start + 3),
            _ => rest.starts_with("ſ".as_bytes()).then_some(start + 3),
        }
    }

    /// The end of `\s*[\r\n]|\s+(?!\S)|\s+` at `start`: after the last line break of the run of white space. Without a
    /// line break, the end of the run if it ends the text, else its last character, which may begin the next piece.
    fn white_space(&self, start: usize) -> usize {
        let (mut end, mut last, mut broken) = (start, start, None);
        loop {
            match self.at(end) {
                (Kind::Newline, next) => (last, end, broken) = (end, next, Some(next)),
                (Kind::Space, next) => (last, end) = (end, next),
                (Kind::End, _) => return broken.unwrap_or(end),
                _ => return broken.unwrap_or(if last > start { last } else { end }),
            }
        }
    }
}

/// The number of ASCII letters at the start of eight bytes; the lowest byte is the first.
///
/// Compares all eight at once: adding sets a byte's high bit if the byte is at least the bound.
#[inline]
fn leading_letters(eight: u64) -> usize {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x80 * ONES;
    let lower = (eight | (0x20 * ONES)) & !HIGH; // 7 bits each, so that no sum carries into the next byte
    let from_a = lower + (0x80 - u64::from(b'a')) * ONES;
    let beyond_z = lower + (0x80 - u64::from(b'z') - 1) * ONES;
    let letters = from_a & !beyond_z & !eight & HIGH;
    ((letters ^ HIGH).trailing_zeros() / 8) as usize
}
