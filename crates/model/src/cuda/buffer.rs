//! Memory on a device that knows the type of its values and how many there are, so that copies are held to both. What a
//! type cannot say is the precision of a model, which is known when it runs: values in it are bytes here.

use std::{marker::PhantomData, ops::Range, sync::Arc};

use bytemuck::Pod;
use cudarc::driver::CudaSlice;

use super::window::Shareable;

/// Values on a device.
#[derive(Debug)]
pub(super) struct DeviceBuffer<T> {
    _owner: Owner,
    address: u64,
    len: usize,
    values: PhantomData<T>,
}

/// Some values of a buffer, one after another.
#[derive(Debug)]
pub(super) struct DeviceSlice<'b, T> {
    address: u64,
    len: usize,
    values: PhantomData<&'b T>,
}

/// Who gives memory back.
#[derive(Debug)]
enum Owner {
    /// This does, to the pool, in the order of the compute stream.
    Pool(CudaSlice<u8>),
    /// The last of all parts does.
    Part { _of: Arc<Shareable> },
}

impl Drop for Owner {
    fn drop(&mut self) {
        // It is given back below, by a call that takes the calling thread's device. An error comes back with the next call.
        if let Self::Pool(slice) = self {
            let _ = slice.stream().context().bind_to_thread();
        }
    }
}

impl<T> DeviceBuffer<T> {
    /// Memory from the pool that begins there and is long enough.
    pub(super) fn pooled(memory: CudaSlice<u8>, address: u64, len: usize) -> Self {
        assert!(len * size_of::<T>() <= memory.len(), "{len} values in {} bytes", memory.len());
        Self { _owner: Owner::Pool(memory), address, len, values: PhantomData }
    }

    /// A part of memory that may be shared, from byte `at` on.
    pub(super) fn part_of(shared: &Arc<Shareable>, at: usize, len: usize) -> Self {
        let bytes = len * size_of::<T>();
        assert!(at + bytes <= shared.bytes(), "a part of {bytes} bytes at {at} of {}", shared.bytes());
        assert!(at.is_multiple_of(align_of::<T>()), "a part at {at}");
        Self {
            _owner: Owner::Part { _of: shared.clone() },
            address: shared.address() + at as u64,
            len,
            values: PhantomData,
        }
    }

    /// Where it begins, as kernels are told.
    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// How many values.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn bytes(&self) -> u64 {
        (self.len * size_of::<T>()) as u64
    }

    pub(super) fn all(&self) -> DeviceSlice<'_, T> {
        DeviceSlice { address: self.address, len: self.len, values: PhantomData }
    }

    /// The values of a range, which it must hold.
    pub(super) fn slice(&self, range: Range<usize>) -> DeviceSlice<'_, T> {
        self.all().slice(range)
    }

    /// The first values, so many.
    pub(super) fn first(&self, len: usize) -> DeviceSlice<'_, T> {
        self.slice(0..len)
    }
}

impl<T> Clone for DeviceSlice<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for DeviceSlice<'_, T> {}

impl<'b, T> DeviceSlice<'b, T> {
    /// Where it begins, as kernels are told.
    pub(super) fn address(self) -> u64 {
        self.address
    }

    /// How many values.
    pub(super) fn len(self) -> usize {
        self.len
    }

    /// The values of a range, which it must hold.
    pub(super) fn slice(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "values {range:?} of {}", self.len);
        Self { address: self.address + (range.start * size_of::<T>()) as u64, len: range.len(), ..self }
    }
}

impl<'b, T: Pod> DeviceSlice<'b, T> {
    /// The same memory as bytes.
    pub(super) fn as_bytes(self) -> DeviceSlice<'b, u8> {
        DeviceSlice { address: self.address, len: self.len * size_of::<T>(), values: PhantomData }
    }
}

impl<'b> DeviceSlice<'b, u8> {
    /// The bytes as values, of which they must be whole ones, in their places.
    pub(super) fn cast<T: Pod>(self) -> DeviceSlice<'b, T> {
        let (size, align) = (size_of::<T>(), align_of::<T>() as u64);
        assert!(self.len.is_multiple_of(size) && self.address.is_multiple_of(align), "{} bytes of {size}", self.len);
        DeviceSlice { address: self.address, len: self.len / size, values: PhantomData }
    }
}
