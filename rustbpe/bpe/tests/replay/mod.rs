//! Reference encoding by replaying all merges, for the properties and the fuzz targets.

use rustbpe::Pair;

/// Replaces every occurrence of `pair` by `token`, from the left.
pub fn join(tokens: &mut Vec<u32>, pair: Pair, token: u32) {
    let mut i = 0;
    while i + 1 < tokens.len() {
        if (tokens[i], tokens[i + 1]) == pair {
            tokens[i] = token;
            tokens.remove(i + 1);
        }
        i += 1;
    }
}

/// The tokens of `piece` after all merges in order.
pub fn replay(merges: &[Pair], piece: &str) -> Vec<u32> {
    let mut tokens: Vec<u32> = piece.bytes().map(u32::from).collect();
    for (&pair, token) in merges.iter().zip(256..) {
        join(&mut tokens, pair, token);
    }
    tokens
}
