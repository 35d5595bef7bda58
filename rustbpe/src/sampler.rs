//! Drawing tokens from logits.

use crate::lanes::{Any, exp};

/// How tokens are drawn; see Request in nanochat/engine.py.
pub struct Sampler {
    /// 0 draws the likeliest.
    pub temperature: f32,
    /// 0 and more than there are: off.
    pub top_k: usize,
    pub top_p: f32,
    pub min_p: f32,
}

impl Sampler {
    /// The token that the number `uniform` from 0 to 1 picks, by float32 logits. Of equal logits the first counts as
    /// the larger.
    pub fn draw(&self, logits: &[f32], uniform: f32) -> usize {
        let keys: Vec<i32> = logits.iter().map(|&logit| key(logit)).collect();
        let most = keys.iter().copied().max().unwrap_or_default();
        let first = keys.iter().position(|&key| key == most).unwrap_or_default();
        if self.temperature == 0.0 {
            return first;
        }
        let (peak, per_unit) = (logits[first], 1.0 / self.temperature);
        let weight = |&token: &usize| {
            let x = (logits[token] - peak) * per_unit;
            if x > -87.0 { exp::<Any>(x) } else { 0.0 } // exp() gives no less than e^-87
        };
        let top_k = self.top_k > 0 && self.top_k < logits.len();
        let mut all = 0.0; // the weights that top_p is a share of
        let tokens: Vec<usize> = if top_k {
            largest(&keys, self.top_k)
        } else if self.top_p < 1.0 {
            all = (0..logits.len()).map(|token| weight(&token)).sum();
            let enough = |tokens: &[usize]| tokens.iter().map(weight).sum::<f32>() >= self.top_p * all;
            let mut k = 64;
            loop {
                let tokens = largest(&keys, k);
                if tokens.len() == logits.len() || enough(&tokens) {
                    break tokens;
                }
                k *= 8;
            }
        } else {
            (0..logits.len()).collect()
        };
        let mut weights: Vec<f32> = tokens.iter().map(weight).collect();
        if self.top_p < 1.0 {
            if top_k {
                all = weights.iter().sum();
            }
            let mut before = 0.0;
            let kept = weights.iter().take_while(|&&weight| {
                let keep = before < self.top_p * all;
                before += weight;
                keep
            });
            let kept = kept.count().max(1);
            weights.truncate(kept);
        }
        let mut total = 0.0;
        for weight in &mut weights {
            if *weight >= self.min_p {
                total += *weight; // the likeliest has 1
            }
            *weight = total;
        }
        let picked = weights.partition_point(|&sum| sum <= uniform * total);
        tokens[picked.min(weights.len() - 1)]
    }
}

/// A whole number that is larger for a larger value.
fn key(x: f32) -> i32 {
    let bits = x.to_bits() as i32;
    bits ^ ((bits >> 31) as u32 >> 1) as i32
}

/// Where the `k` largest keys are, the largest first.
fn largest(keys: &[i32], k: usize) -> Vec<usize> {
    let k = k.min(keys.len());
    // Keys of at least the k-th largest of these are k at least, and seldom many more.
    let parts = keys.chunks((keys.len() / (2 * k)).max(1));
    let mut peaks: Vec<i32> = parts.filter_map(|part| part.iter().copied().max()).collect();
    let enough = *peaks.select_nth_unstable_by(k - 1, |a, b| b.cmp(a)).1;
    let large = keys.iter().enumerate().filter(|&(_, &key)| key >= enough);
    let mut found: Vec<i64> = large.map(|(i, &key)| i64::from(!key) << 32 | i as i64).collect();
    found.sort_unstable();
    found.iter().take(k).map(|&found| (found & 0xffff_ffff) as usize).collect()
}
