//! What a wrapper checks of its buffers before it launches: lengths, device, alignment, and that nothing it writes is
//! also read or written through another argument.

#![forbid(unsafe_code)]

use super::Device;
use crate::{Error, Result};
use cudarc::driver::{CudaStream, DevicePtr};
use std::sync::Arc;

/// Buffers of one operation, checked one by one as they are added.
#[derive(Debug)]
pub struct Operands<'a> {
    operation: &'static str,
    stream: &'a Arc<CudaStream>,
    seen: Vec<Operand>,
}

#[derive(Debug)]
struct Operand {
    name: &'static str,
    begin: u64,
    end: u64,
    written: bool,
}

/// What 16-byte accesses need.
const ALIGNMENT: u64 = 16;

impl<'a> Operands<'a> {
    /// For an operation planned on `device` and launched on `stream`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the stream is another device's.
    pub fn new(operation: &'static str, device: &Device, stream: &'a Arc<CudaStream>) -> Result<Self> {
        if stream.context() != device.context() {
            let problem = format!(
                "planned on GPU {}, but the stream is of GPU {}",
                device.gpu().ordinal,
                stream.context().ordinal()
            );
            return Err(Error::Shape { operation, problem });
        }
        Ok(Self { operation, stream, seen: Vec::new() })
    }

    /// A buffer that is only read: `length` elements.
    ///
    /// # Errors
    /// [`Error::Shape`] when it is of another length or device, is not aligned to 16 bytes, or overlaps one that is
    /// written.
    pub fn read<T>(&mut self, name: &'static str, buffer: &impl DevicePtr<T>, length: usize) -> Result<()> {
        self.add(name, buffer, length, false)
    }

    /// A buffer that is written: `length` elements.
    ///
    /// # Errors
    /// As for [`read`](Self::read), and when it overlaps any other.
    pub fn write<T>(&mut self, name: &'static str, buffer: &impl DevicePtr<T>, length: usize) -> Result<()> {
        self.add(name, buffer, length, true)
    }

    fn add<T>(
        &mut self,
        name: &'static str,
        buffer: &impl DevicePtr<T>,
        length: usize,
        written: bool,
    ) -> Result<()> {
        let wrong = |problem| Err(Error::Shape { operation: self.operation, problem });
        if buffer.len() != length {
            return wrong(format!("{name}: {} elements, where {length} are needed", buffer.len()));
        }
        if buffer.stream().context() != self.stream.context() {
            return wrong(format!("{name}: lies on another device than the stream"));
        }
        let (begin, _order) = buffer.device_ptr(self.stream);
        if begin % ALIGNMENT != 0 {
            return wrong(format!(
                "{name}: begins {} bytes after a multiple of {ALIGNMENT}; let the view begin at one",
                begin % ALIGNMENT
            ));
        }
        let end = begin + buffer.num_bytes() as u64;
        let clash = self
            .seen
            .iter()
            .find(|other| (written || other.written) && begin < other.end && other.begin < end);
        if let Some(other) = clash {
            return wrong(format!("{name} and {} overlap, and at least one is written", other.name));
        }
        self.seen.push(Operand { name, begin, end, written });
        Ok(())
    }
}
