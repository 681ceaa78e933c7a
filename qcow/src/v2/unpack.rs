//! Compressed clusters.

use std::io::Read;

use format::Packed;
use format::inflate::{Wrapping, inflate};
use ruzstd::decoding::StreamingDecoder;

use super::Error;
use super::header::Compression;

/// Unpacks just one cluster. The output is as long as the buffer, so that no input can ask for more memory. The last of the
/// input may belong to somebody else.
pub(super) fn unpack(
    compression: Compression,
    packed: &Packed,
    bytes: &[u8],
    into: &mut [u8],
) -> Result<(), Error> {
    let damaged = |reason| Error::Packed { offset: packed.offset, reason };
    match compression {
        Compression::Zlib => inflate(Wrapping::Raw, bytes, into).map_err(damaged)?,
        Compression::Zstd => {
            let mut left = into;
            let mut input = bytes;
            // QEMU may write more than one frame.
            while !left.is_empty() {
                let mut frame =
                    StreamingDecoder::new(&mut input).map_err(|_| damaged("it is no Zstandard frame"))?;
                let mut filled = 0_usize;
                loop {
                    let rest = left.get_mut(filled..).unwrap_or_default();
                    if rest.is_empty() {
                        break;
                    }
                    match frame.read(rest).map_err(|_| damaged("the Zstandard frame is damaged"))? {
                        0 => break,
                        count => filled = filled.saturating_add(count),
                    }
                }
                if filled == 0 {
                    return Err(damaged("the Zstandard frame is shorter than a cluster"));
                }
                left = left.get_mut(filled..).unwrap_or_default();
            }
        }
    }
    Ok(())
}
