//! Buffers: aligned to cache lines, and shared between the workers of a forward pass.

use std::marker::PhantomData;

use crate::element::Element;
use crate::simd::CACHE_LINE;

/// One cache line of any elements.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct CacheLine([u8; CACHE_LINE]);

/// A vector of zeros that begins at a cache line, so that no aligned row of it straddles two lines.
pub(crate) struct AlignedVec<E> {
    lines: Vec<CacheLine>,
    len: usize,
    element: PhantomData<E>,
}

impl<E> Default for AlignedVec<E> {
    fn default() -> Self {
        Self { lines: Vec::new(), len: 0, element: PhantomData }
    }
}

impl<E: Element> AlignedVec<E> {
    pub(crate) fn zeros(len: usize) -> Self {
        let mut new = Self::default();
        new.resize(len);
        new
    }

    /// Changes the length. New elements are zero or what earlier ones left behind.
    pub(crate) fn resize(&mut self, len: usize) {
        self.lines.resize((len * size_of::<E>()).div_ceil(CACHE_LINE), CacheLine([0; CACHE_LINE]));
        self.len = len;
    }

    pub(crate) fn as_slice(&self) -> &[E] {
        // SAFETY: the lines are initialised, hold at least `len` elements and are aligned to 64 bytes, more than any
        // `Element` needs; an `Element` is valid for any bits. The borrow of `self` keeps them in place.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [E] {
        // SAFETY: as in `as_slice`, and the borrow of `self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// A mutable slice that several workers access at once, each a part of its own.
///
/// It does not borrow the slice, so two things are up to its users, who state them at each access:
/// - the slice outlives every access;
/// - while one worker writes an element, no other accesses it. Workers write disjoint elements within a stage, and read
///   what others wrote only after the barrier that ends the stage (see `schedule`).
pub(crate) struct SharedSlice<T> {
    start: *mut T,
    len: usize,
}

impl<T> Clone for SharedSlice<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SharedSlice<T> {}

// SAFETY: the accessors are unsafe, and their contract rules out data races; see above.
unsafe impl<T: Send> Send for SharedSlice<T> {}
// SAFETY: as for Send.
unsafe impl<T: Send + Sync> Sync for SharedSlice<T> {}

impl<T> SharedSlice<T> {
    pub(crate) fn new(slice: &mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len() }
    }

    /// The slice from element `first` on.
    #[inline(always)]
    pub(crate) fn skip(self, first: usize) -> Self {
        debug_assert!(first <= self.len);
        Self { start: self.start.wrapping_add(first), len: self.len - first }
    }

    /// `len` elements from `first` on.
    ///
    /// # Safety
    /// The elements must lie within the slice, which must outlive `'a`, and nobody may write them during `'a`.
    #[inline(always)]
    pub(crate) unsafe fn read<'a>(self, first: usize, len: usize) -> &'a [T] {
        debug_assert!(first + len <= self.len);
        // SAFETY: the caller guarantees that the elements exist and are not written.
        unsafe { std::slice::from_raw_parts(self.start.add(first), len) }
    }

    /// `len` elements from `first` on, to be written.
    ///
    /// # Safety
    /// The elements must lie within the slice, which must outlive `'a`, and nobody else may access them during `'a`.
    #[inline(always)]
    pub(crate) unsafe fn write<'a>(self, first: usize, len: usize) -> &'a mut [T] {
        debug_assert!(first + len <= self.len);
        // SAFETY: the caller guarantees that the elements exist and are this worker's.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first), len) }
    }
}
