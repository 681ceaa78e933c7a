//! The bytes of an image while it is opened.

use std::fmt;
use std::io;

/// Exact read of the range that begins at a byte offset and is as long as the buffer. Less is an error of kind
/// [`io::ErrorKind::UnexpectedEof`].
pub type ReadAt<'a> = dyn FnMut(u64, &mut [u8]) -> io::Result<()> + 'a;

/// The bytes of an image while it is opened.
pub struct Source<'a> {
    /// Length of the file or device in bytes.
    pub size: u64,
    /// True for a regular file, false for a block device.
    pub regular: bool,
    /// Reads the image.
    pub read: &'a mut ReadAt<'a>,
}

impl fmt::Debug for Source<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source")
            .field("size", &self.size)
            .field("regular", &self.regular)
            .finish_non_exhaustive()
    }
}

impl Source<'_> {
    /// Reads `len` bytes from `offset` on. The range is checked first, so a length from the image allocates no more than the
    /// image is long.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] for a range that the file does not have; what the read says.
    pub fn bytes(&mut self, offset: u64, len: u64) -> io::Result<Vec<u8>> {
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut bytes = vec![0; usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?];
        (self.read)(offset, &mut bytes)?;
        Ok(bytes)
    }
}
