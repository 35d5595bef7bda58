//! Sampling of token ids from logits.

use crate::isa::Portable;
use crate::simd::exp;

/// Settings of sampling; see `Request` in nanochat/engine.py.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampler {
    /// Divides the logits; 0 = greedy.
    pub temperature: f32,
    /// Keeps this many of the most likely tokens; 0 = all.
    pub top_k: usize,
    /// Keeps the most likely tokens that together have this probability; 1 = all.
    pub top_p: f32,
    /// Keeps tokens at least this likely, relative to the most likely one; 0 = all.
    pub min_p: f32,
}

impl Sampler {
    /// The token id at quantile `uniform`, from 0 to 1, of the distribution that `logits` and the settings give.
    ///
    /// `None` if there are no logits. Of equal logits, the lower id counts as more likely.
    pub fn sample(&self, logits: &[f32], uniform: f32) -> Option<usize> {
        let keys: Vec<i32> = logits.iter().map(|&logit| sort_key(logit)).collect();
        let max_key = keys.iter().copied().max()?;
        let most_likely = keys.iter().position(|&key| key == max_key)?;
        if self.temperature == 0.0 {
            return Some(most_likely);
        }
        let (max_logit, inverse_temperature) = (logits[most_likely], 1.0 / self.temperature);
        // Probability relative to the most likely token's.
        let weight = |&token: &usize| {
            let x = (logits[token] - max_logit) * inverse_temperature;
            if x > -87.0 { exp::<Portable>(x) } else { 0.0 } // exp() clamps at e^-87
        };
        let has_top_k = self.top_k > 0 && self.top_k < logits.len();
        let mut top_p_total = 0.0; // sum of the weights that top_p is a share of
        let tokens: Vec<usize> = if has_top_k {
            largest(&keys, self.top_k)
        } else if self.top_p < 1.0 {
            top_p_total = (0..logits.len()).map(|token| weight(&token)).sum();
            let suffices = |tokens: &[usize]| tokens.iter().map(weight).sum::<f32>() >= self.top_p * top_p_total;
            let mut k = 64;
            loop {
                let tokens = largest(&keys, k);
                if tokens.len() == logits.len() || suffices(&tokens) {
                    break tokens;
                }
                k *= 8;
            }
        } else {
            (0..logits.len()).collect()
        };
        let mut weights: Vec<f32> = tokens.iter().map(weight).collect();
        if self.top_p < 1.0 {
            if has_top_k {
                top_p_total = weights.iter().sum();
            }
            let mut before = 0.0;
            let kept = weights.iter().take_while(|&&weight| {
                let keep = before < self.top_p * top_p_total;
                before += weight;
                keep
            });
            let kept = kept.count().max(1);
            weights.truncate(kept);
        }
        let mut cumulative = 0.0;
        for weight in &mut weights {
            if *weight >= self.min_p {
                cumulative += *weight; // the most likely token's is 1
            }
            *weight = cumulative;
        }
        let index = weights.partition_point(|&sum| sum <= uniform * cumulative);
        Some(tokens[index.min(weights.len() - 1)])
    }
}

/// An integer with the order of the float: a larger value has a larger key.
fn sort_key(x: f32) -> i32 {
    let bits = x.to_bits() as i32;
    bits ^ ((bits >> 31) as u32 >> 1) as i32
}

/// The indices of the `k` largest keys, the largest first; equal keys by index.
fn largest(keys: &[i32], k: usize) -> Vec<usize> {
    let k = k.min(keys.len());
    // At least k keys reach the k-th largest maximum of 2k parts, and seldom many more.
    let parts = keys.chunks((keys.len() / (2 * k)).max(1));
    let mut maxima: Vec<i32> = parts.filter_map(|part| part.iter().copied().max()).collect();
    let threshold = *maxima.select_nth_unstable_by(k - 1, |a, b| b.cmp(a)).1;
    let large = keys.iter().enumerate().filter(|&(_, &key)| key >= threshold);
    // Inverted key in the upper half, index in the lower half.
    let mut sorted: Vec<i64> = large.map(|(i, &key)| i64::from(!key) << 32 | i as i64).collect();
    sorted.sort_unstable();
    sorted.iter().take(k).map(|&packed| (packed & 0xffff_ffff) as usize).collect()
}
