//! Unpacking of compressed units.

use flate2::{Decompress, FlushDecompress, Status};

/// What is around a deflate stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrapping {
    /// Nothing (RFC 1951), as in qcow and qcow2.
    Raw,
    /// Header and checksum of zlib (RFC 1950), as in VMDK.
    Zlib,
}

/// Unpacks a unit into `into`, which it must fill exactly. Memory is bounded by that, whatever the stream says; bytes behind
/// the stream's end do not matter. A raw stream whose end mark is missing counts if the unit is full, as in QEMU.
///
/// # Errors
/// What is wrong with the stream.
pub fn inflate(wrapping: Wrapping, bytes: &[u8], into: &mut [u8]) -> Result<(), &'static str> {
    let mut stream = Decompress::new(wrapping == Wrapping::Zlib);
    let mut ended = false;
    while !ended && stream.total_out() < into.len() as u64 {
        ended = step(&mut stream, bytes, into)?;
    }
    if stream.total_out() < into.len() as u64 {
        return Err("compressed data unpack to less than a unit");
    }
    // The end of the stream may still be ahead; there must not be another byte before it.
    let mut beyond = [0];
    let mut moved = true;
    while moved && !ended {
        let consumed = stream.total_in();
        let status = stream.decompress(rest(bytes, consumed), &mut beyond, FlushDecompress::None);
        ended = match status {
            Ok(status) => status == Status::StreamEnd,
            Err(_) => return Err("compressed data are damaged"),
        };
        if stream.total_out() > into.len() as u64 {
            return Err("compressed data unpack to more than a unit");
        }
        moved = stream.total_in() != consumed;
    }
    if wrapping == Wrapping::Zlib && !ended {
        return Err("compressed data end without their checksum");
    }
    Ok(())
}

/// Goes on filling `into`; returns whether the stream has ended.
fn step(stream: &mut Decompress, bytes: &[u8], into: &mut [u8]) -> Result<bool, &'static str> {
    let (consumed, produced) = (stream.total_in(), stream.total_out());
    let room = usize::try_from(produced).ok().and_then(|at| into.get_mut(at..)).unwrap_or_default();
    let status = stream
        .decompress(rest(bytes, consumed), room, FlushDecompress::None)
        .map_err(|_| "compressed data are damaged")?;
    let moved = stream.total_in() != consumed || stream.total_out() != produced;
    match status {
        Status::StreamEnd => Ok(true),
        _ if moved => Ok(false),
        _ => Err("compressed data end too early"),
    }
}

fn rest(bytes: &[u8], from: u64) -> &[u8] {
    usize::try_from(from).ok().and_then(|at| bytes.get(at..)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::{DeflateEncoder, ZlibEncoder};

    use super::*;

    fn unit(len: u32) -> Vec<u8> {
        (0..len).map(|i| (i * i / 7 % 253) as u8).collect()
    }

    fn pack(wrapping: Wrapping, unit: &[u8]) -> Vec<u8> {
        match wrapping {
            Wrapping::Raw => {
                let mut encoder = DeflateEncoder::new(Vec::new(), Compression::best());
                encoder.write_all(unit).unwrap();
                encoder.finish().unwrap()
            }
            Wrapping::Zlib => {
                let mut encoder = ZlibEncoder::new(Vec::new(), Compression::best());
                encoder.write_all(unit).unwrap();
                encoder.finish().unwrap()
            }
        }
    }

    const BOTH: [Wrapping; 2] = [Wrapping::Raw, Wrapping::Zlib];

    #[test]
    fn a_unit_comes_back_also_with_other_bytes_behind_it() {
        for wrapping in BOTH {
            let mut packed = pack(wrapping, &unit(65536));
            packed.extend([0xff; 300]);
            let mut into = vec![0; 65536];
            inflate(wrapping, &packed, &mut into).unwrap();
            assert!(into == unit(65536), "{wrapping:?}");
        }
    }

    #[test]
    fn a_unit_of_another_length_is_refused() {
        for wrapping in BOTH {
            for len in [0, 1, 511, 513, 4096] {
                let packed = pack(wrapping, &unit(len));
                assert!(inflate(wrapping, &packed, &mut [0; 512]).is_err(), "{wrapping:?} {len}");
            }
            assert!(inflate(wrapping, &pack(wrapping, &vec![0; 1 << 20]), &mut [0; 512]).is_err());
        }
    }

    #[test]
    fn damage_is_refused_or_gives_a_unit_and_never_hangs() {
        for wrapping in BOTH {
            let packed = pack(wrapping, &unit(4096));
            for at in 0..packed.len() {
                let mut damaged = packed.clone();
                damaged[at] ^= 0x55;
                let _ = inflate(wrapping, &damaged, &mut [0; 4096]);
                assert!(inflate(wrapping, &packed[..at.saturating_sub(8)], &mut [0; 4096]).is_err());
            }
            assert!(inflate(wrapping, &[], &mut [0; 4096]).is_err());
        }
    }
}
