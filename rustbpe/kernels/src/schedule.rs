//! Parallel loops with a barrier after each, run by the caller and threads of the current rayon pool.
//!
//! A stage is a loop over chunks. A worker takes the next chunk of the stage until none is left, waits until all chunks
//! are done, and goes on to the next stage. No one waits for a worker that has not started: the caller alone can do all
//! the work, and a worker that comes late finds nothing to do.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::isa::{Isa, Kernel, Simd};

/// Polls of the barrier before a worker yields its core.
const SPINS: usize = 1 << 12;

/// Work in stages.
pub(crate) trait Work: Sync {
    /// A worker's own buffers.
    type Scratch: Default;

    /// Does one chunk of a stage. Implementations are `#[inline(always)]`.
    ///
    /// # Safety
    /// The CPU must have the instructions of `S`; each chunk must be done once, and all chunks of earlier stages must be
    /// done.
    unsafe fn run_chunk<S: Simd>(&self, stage: usize, chunk: usize, scratch: &mut Self::Scratch);
}

/// The progress of one stage.
struct Stage {
    chunks: usize,
    taken: AtomicUsize,
    done: AtomicUsize,
}

/// What the workers share.
struct Shared {
    stages: Vec<Stage>,
    isa: Isa,
    /// A `Work` on the stack of [`run_stages`], without its type, so that the threads' closures are `'static`.
    work: *const (),
    /// [`run_worker`] for the type of `work`.
    run: unsafe fn(&Self),
}

// SAFETY: `work` points to a `Work`, which is Sync; `run_stages` states when it is valid.
unsafe impl Send for Shared {}
// SAFETY: as for Send.
unsafe impl Sync for Shared {}

/// Runs all chunks of all stages of `work` on up to `threads` threads, the caller's among them.
///
/// `chunks` has the number of chunks of each stage. A panic in a chunk aborts the process.
///
/// # Safety
/// `work`'s chunks must be sound to run in any order and in parallel, with a barrier after each stage.
pub(crate) unsafe fn run_stages<W: Work>(work: &W, chunks: impl Iterator<Item = usize>, isa: Isa, threads: usize) {
    let stage = |chunks| Stage { chunks, taken: AtomicUsize::new(0), done: AtomicUsize::new(0) };
    let work = std::ptr::from_ref(work).cast();
    let shared = Arc::new(Shared { stages: chunks.map(stage).collect(), isa, work, run: run_worker::<W> });
    for _ in 1..threads {
        let shared = Arc::clone(&shared);
        // SAFETY: `work` is only dereferenced for a chunk, all chunks are done when the caller's `run` returns, and
        // until then `work` is borrowed.
        rayon::spawn(move || unsafe { (shared.run)(&shared) });
    }
    // SAFETY: `work` is borrowed.
    unsafe { (shared.run)(&shared) };
}

/// Takes part until all stages are done.
///
/// # Safety
/// `shared.work` must point to a `W` until all chunks of all stages are done.
unsafe fn run_worker<W: Work>(shared: &Shared) {
    struct Worker<'a, W>(&'a Shared, *const W);
    impl<W: Work> Kernel for Worker<'_, W> {
        type Output = ();

        #[inline(always)]
        unsafe fn run<S: Simd>(self) {
            let Self(shared, work) = self;
            let mut scratch = W::Scratch::default();
            let abort = AbortOnPanic;
            for (i, stage) in shared.stages.iter().enumerate() {
                loop {
                    let chunk = stage.taken.fetch_add(1, Ordering::Relaxed);
                    if chunk >= stage.chunks {
                        break;
                    }
                    // SAFETY: this chunk is not done, so `work` is valid; the counter gave it to this worker only, and
                    // the barriers before saw earlier stages done. The caller guarantees the instructions of S.
                    unsafe { (*work).run_chunk::<S>(i, chunk, &mut scratch) };
                    stage.done.fetch_add(1, Ordering::Release);
                }
                let mut spins = 0;
                while stage.done.load(Ordering::Acquire) < stage.chunks {
                    spins += 1;
                    if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
                }
            }
            std::mem::forget(abort);
        }
    }
    shared.isa.run(Worker(shared, shared.work.cast::<W>()));
}

/// Aborts the process when it is dropped: the other workers would wait for the chunk of a panicking one forever, or use
/// memory that its unwinding frees.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        std::process::abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each chunk of a stage adds up what the stage before wrote.
    struct Sums(Vec<Vec<AtomicUsize>>);

    impl Work for Sums {
        type Scratch = ();

        unsafe fn run_chunk<S: Simd>(&self, stage: usize, chunk: usize, (): &mut ()) {
            let sum = match stage.checked_sub(1) {
                Some(before) => self.0[before].iter().map(|x| x.load(Ordering::Relaxed)).sum(),
                None => 1,
            };
            self.0[stage][chunk].fetch_add(sum, Ordering::Relaxed);
        }
    }

    #[test]
    fn every_chunk_runs_once_and_after_the_stages_before() {
        let counts = [3, 5, 0, 4, 1, 7];
        for threads in [1, 2, 5] {
            for _ in 0..if cfg!(miri) { 2 } else { 50 } {
                let sums = Sums(counts.iter().map(|&n| (0..n).map(|_| AtomicUsize::new(0)).collect()).collect());
                // SAFETY: all accesses are atomic.
                unsafe { run_stages(&sums, counts.into_iter(), Isa::detect(), threads) };
                let values = |stage: usize| sums.0[stage].iter().map(|x| x.load(Ordering::Relaxed)).collect::<Vec<_>>();
                assert_eq!(values(1), [3; 5]);
                assert_eq!(values(3), [0; 4]); // the sum over a stage without chunks
                assert_eq!(values(0), [1; 3]);
            }
        }
    }
}
