//! Element-wise operations and reductions on slices.
//!
//! The public functions run on one thread with any available instruction set. The forward pass uses the same code,
//! compiled into its own loop.

use crate::Error;
use crate::attention::Attention;
use crate::element::{Bf16, CacheElement};
use crate::isa::{Isa, Kernel, Simd};
use crate::memory::SharedSlice;
use crate::simd::{self, fold_lanes};

/// Runs `$body`, in which `$S` is the instruction set, as a kernel with the arguments `$arg`.
macro_rules! run_on {
    ($isa:expr, $S:ident, |$($arg:ident: $type:ty),+| $body:expr) => {{
        struct Op<'a>($($type,)+ std::marker::PhantomData<&'a ()>);
        impl<'a> Kernel for Op<'a> {
            type Output = ();

            #[inline(always)]
            unsafe fn run<$S: Simd>(self) {
                let Self($($arg,)+ _) = self;
                $body
            }
        }
        $isa.check()?.run(Op($($arg,)+ std::marker::PhantomData));
        Ok(())
    }};
}

/// Replaces each value by e^value, with a relative error of 1e-7 from -87 to 88; values outside are clamped.
///
/// # Errors
/// [`Error::Isa`] if the CPU has no `isa`.
pub fn exp(isa: Isa, values: &mut [f32]) -> Result<(), Error> {
    run_on!(isa, S, |values: &'a mut [f32]| values.iter_mut().for_each(|x| *x = simd::exp::<S>(*x)))
}

/// Replaces each value by `cap * tanh(value / cap)`.
///
/// # Errors
/// [`Error::Isa`] if the CPU has no `isa`.
pub fn softcap(isa: Isa, values: &mut [f32], cap: f32) -> Result<(), Error> {
    run_on!(isa, S, |values: &'a mut [f32], cap: f32| softcap_as::<S>(values, cap))
}

/// Replaces the values by their softmax.
///
/// # Errors
/// [`Error::Isa`] if the CPU has no `isa`.
pub fn softmax(isa: Isa, values: &mut [f32]) -> Result<(), Error> {
    run_on!(isa, S, |values: &'a mut [f32]| softmax_as::<S>(values))
}

/// Causal attention of the last `T` tokens of a row, for the `group` query heads that share a key and value head.
///
/// `queries` and `out` are (T, group, head_dim); `keys` and `values` (columns, head_dim), the last `T` columns those of
/// the queries' own tokens.
///
/// # Errors
/// [`Error::Isa`] if the CPU has no `isa`; [`Error::Length`] if the lengths are no multiples of `head_dim` or do not
/// match, or if there are more tokens than columns.
pub fn attention<E: CacheElement>(
    isa: Isa,
    queries: &[f32],
    keys: &[E],
    values: &[E],
    head_dim: usize,
    group: usize,
    out: &mut [f32],
) -> Result<(), Error> {
    let width = head_dim.checked_mul(group).filter(|&width| width > 0);
    let width = width.ok_or(Error::Config { name: "head_dim * group", given: 0, expected: "1 or more" })?;
    let (n_tokens, columns) = (queries.len() / width, keys.len() / head_dim);
    Error::check_length("queries", queries.len(), Some(n_tokens.min(columns) * width))?;
    Error::check_length("keys", keys.len(), Some(columns * head_dim))?;
    Error::check_length("values", values.len(), Some(keys.len()))?;
    Error::check_length("out", out.len(), Some(queries.len()))?;
    if n_tokens == 0 {
        return Ok(());
    }
    let (out, stride) = (SharedSlice::new(out), width);
    isa.check()?.run(Attention {
        head_dim,
        group,
        n_tokens,
        queries,
        query_stride: stride,
        keys,
        values,
        out,
        out_stride: stride,
    });
    Ok(())
}

/// Divides `x` by its root mean square: x / sqrt(mean(x^2) + eps).
#[inline(always)]
pub fn rms_norm(x: &mut [f32], eps: f32) {
    let scale = inverse_rms(x, eps);
    x.iter_mut().for_each(|x| *x *= scale);
}

/// 1 / sqrt(mean(x^2) + eps).
#[inline(always)]
pub fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let lanes = fold_lanes(x, 0.0, |sum, x| sum + x * x);
    1.0 / (lanes.iter().sum::<f32>() / x.len() as f32 + eps).sqrt()
}

/// Rotary embedding of one head: rotates each pair (`x[i]`, `x[i + d / 2]`) by minus the angle whose cosine and sine are
/// `cos[i]` and `sin[i]`.
///
/// # Panics
/// If `cos` or `sin` are shorter than `d / 2`, half the length of `head`.
#[inline(always)]
pub fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = head.len() / 2;
    let (first, second) = head.split_at_mut(half);
    let (cos, sin, second) = (&cos[..half], &sin[..half], &mut second[..half]);
    for i in 0..half {
        let (a, b) = (first[i], second[i]);
        first[i] = a * cos[i] + b * sin[i];
        second[i] = b * cos[i] - a * sin[i];
    }
}

/// Writes the nearest bfloat16 of each value to `to`, up to the shorter length.
#[inline(always)]
pub fn round_to_bf16(values: &[f32], to: &mut [Bf16]) {
    to.iter_mut().zip(values).for_each(|(to, &x)| *to = Bf16::from_f32(x));
}

/// cap * tanh(x / cap) = cap - 2 cap / (e^(2 x / cap) + 1).
#[inline(always)]
pub(crate) fn softcap_as<S: Simd>(values: &mut [f32], cap: f32) {
    for value in values {
        *value = cap - 2.0 * cap / (simd::exp::<S>(*value * (2.0 / cap)) + 1.0);
    }
}

#[inline(always)]
pub(crate) fn softmax_as<S: Simd>(values: &mut [f32]) {
    let max = fold_lanes(values, f32::MIN, |a, b| if b > a { b } else { a }).into_iter().fold(f32::MIN, f32::max);
    for value in values.iter_mut() {
        *value = simd::exp::<S>(*value - max);
    }
    let sum: f32 = fold_lanes(values, 0.0, |a, b| a + b).iter().sum();
    values.iter_mut().for_each(|value| *value /= sum);
}
