//! What the store under an image asks for and can do: block sizes, and discarding. Told by sysfs for block devices
//! (`Documentation/ABI/stable/sysfs-block` of Linux), by statx(2) for files.
//!
//! Invariants this file owns:
//!
//! 1. a descriptor given to a system call is borrowed for the call, so it is open;
//! 2. the memory given to statx(2) is as long as the kernel's `struct statx`, and `struct statx` is plain integers.
#![expect(unsafe_code, reason = "system calls that nix does not wrap")]

use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use tap_ctl::proto::Discard;

/// `STATX_DIOALIGN` of `linux/stat.h`, Linux 6.1.
const STATX_DIOALIGN: libc::c_uint = 0x2000;
/// Where `stx_dio_mem_align` and `stx_dio_offset_align` lie in `struct statx`, counted in 8 bytes.
const STATX_DIO_WORD: usize = 19;
/// Length of `struct statx`, counted in 8 bytes.
const STATX_WORDS: usize = 32;

/// The largest unit in which a file's room is given back; a network file system may name a megabyte as its block size.
const MAX_FILE_GRANULARITY: u32 = 64 << 10;

/// A page in KiB, the unit of `max_sectors_kb`.
const PAGE_KIB: u32 = 4;

/// The store of an image, as it was when the image was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Store {
    /// Bytes; offsets and lengths of I/O past the page cache are multiples of it. A power of two from 512 on.
    pub block_size: u32,
    /// Bytes; addresses of memory for I/O past the page cache are multiples of it. A power of two.
    pub memory_align: u32,
    /// Bytes that are written as cheaply as a part of them. A power of two from `block_size` on.
    pub physical_block_size: u32,
    /// Bytes that one operation moves at most without being split. io_uring hands what must be split to a thread.
    pub most: u32,
    /// What can be discarded, if anything. Of a file not known before [`Store::try_file`].
    pub discard: Option<Discard>,
}

impl Store {
    /// Asks the system about an open file or block device. Nothing of its content changes.
    pub fn of(file: &File, metadata: &Metadata, writable: bool) -> Store {
        let (memory_align, offset_align) = direct_alignment(file).unwrap_or((512, 512));
        let store = if metadata.file_type().is_block_device() {
            let number = metadata.rdev();
            let device = format!("/sys/dev/block/{}:{}", libc::major(number), libc::minor(number));
            let secure = writable && can_erase(file);
            Queue::read(Path::new(&device)).store(memory_align, secure)
        } else {
            let block_size = power_of_two(offset_align, 512);
            let device = metadata.dev();
            let device = format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device));
            let most = Queue::read(Path::new(&device)).most();
            Store { block_size, memory_align, physical_block_size: block_size, most, discard: None }
        };
        Store { discard: store.discard.filter(|_| writable), ..store }
    }

    /// Finds out whether room of a regular file can be given back, by doing so behind its end. Only for who has locked it for
    /// writing: somebody else's file may have grown meanwhile.
    pub fn try_file(&mut self, file: &File) -> io::Result<()> {
        let metadata = file.metadata()?;
        let granularity = u32::try_from(metadata.blksize()).unwrap_or(MAX_FILE_GRANULARITY);
        let granularity =
            power_of_two(granularity, self.block_size).min(MAX_FILE_GRANULARITY.max(self.block_size));
        let discard = Discard { granularity, alignment: 0, secure: false };
        self.discard = can_punch(file, metadata.len()).then_some(discard);
        Ok(())
    }
}

/// `value` if it is a power of two and at least `least`, else `least`.
fn power_of_two(value: u32, least: u32) -> u32 {
    if value.is_power_of_two() { value.max(least) } else { least }
}

/// What sysfs says of a block device; 0 where it says nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Queue {
    logical_block_size: u32,
    physical_block_size: u32,
    discard_granularity: u32,
    discard_max_bytes: u64,
    discard_alignment: u32,
    max_sectors_kb: u32,
}

impl Queue {
    /// Reads the attributes of `/sys/dev/block/M:N`. A partition has its disk's queue.
    fn read(device: &Path) -> Queue {
        let text = |path: PathBuf| std::fs::read_to_string(path).ok();
        let number = |name: &str| -> Option<u64> {
            let own = text(device.join("queue").join(name));
            let text = own.or_else(|| text(device.join("../queue").join(name)))?;
            text.trim().parse().ok()
        };
        let short = |name: &str| number(name).and_then(|number| u32::try_from(number).ok()).unwrap_or(0);
        Queue {
            logical_block_size: short("logical_block_size"),
            physical_block_size: short("physical_block_size"),
            discard_granularity: short("discard_granularity"),
            discard_max_bytes: number("discard_max_bytes").unwrap_or(0),
            // -1 if a partition lies across the units: then no place in it is better than another.
            discard_alignment: text(device.join("discard_alignment"))
                .and_then(|text| text.trim().parse().ok())
                .unwrap_or(0),
            max_sectors_kb: short("max_sectors_kb"),
        }
    }

    /// Whole pages, so that the parts of a transfer stay aligned.
    fn most(&self) -> u32 {
        match (self.max_sectors_kb / PAGE_KIB).checked_mul(PAGE_KIB * 1024) {
            None | Some(0) => u32::MAX,
            Some(most) => most,
        }
    }

    fn store(&self, memory_align: u32, secure: bool) -> Store {
        let block_size = power_of_two(self.logical_block_size, 512);
        // A unit that is no power of two (thin provisioning in odd chunks) consists of some that are.
        let granularity = match self.discard_granularity {
            0 => block_size,
            unit => (1 << unit.trailing_zeros()).max(block_size),
        };
        let alignment = self.discard_alignment & (granularity - 1);
        Store {
            block_size,
            memory_align,
            physical_block_size: power_of_two(self.physical_block_size, block_size),
            most: self.most(),
            discard: (self.discard_max_bytes > 0).then_some(Discard { granularity, alignment, secure }),
        }
    }
}

/// What direct I/O on a file asks of memory addresses and of file offsets, in bytes. `None` if the kernel or the file
/// system does not tell.
fn direct_alignment(file: &File) -> Option<(u32, u32)> {
    let mut words = [0_u64; STATX_WORDS];
    let flags = libc::AT_EMPTY_PATH;
    // SAFETY: invariants 1 and 2; the path is an empty C string.
    let done = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), flags, STATX_DIOALIGN, words.as_mut_ptr().cast())
    };
    // The kernel's first word: which of the fields it has filled in, then the preferred block size.
    let half = |word: u64, second: bool| {
        let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
        u32::from_ne_bytes(if second { [e, f, g, h] } else { [a, b, c, d] })
    };
    if done != 0 || half(words[0], false) & STATX_DIOALIGN == 0 {
        return None;
    }
    let (memory, offset) = (half(words[STATX_DIO_WORD], false), half(words[STATX_DIO_WORD], true));
    // Zeros: no direct I/O on this file.
    (memory.is_power_of_two() && offset.is_power_of_two()).then_some((memory, offset))
}

/// Whether the file system can give back room of a file: asked behind the file's end, where there is nothing to lose.
fn can_punch(file: &File, len: u64) -> bool {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let behind = len.next_multiple_of(1 << 20);
    i64::try_from(behind).is_ok_and(|behind| fallocate(file, flags, behind, 4096).is_ok())
}

mod ioctl {
    //! `linux/fs.h`. The argument is first byte and length in bytes.
    nix::ioctl_write_ptr_bad!(blkdiscard, nix::request_code_none!(0x12, 119), [u64; 2]);
    nix::ioctl_write_ptr_bad!(blksecdiscard, nix::request_code_none!(0x12, 125), [u64; 2]);
}

/// Whether a block device can erase. Asked with a range that is no sectors: the kernel looks at that only if it can.
fn can_erase(file: &File) -> bool {
    erase_range(file.as_raw_fd(), &[1, 1]) == Err(Errno::EINVAL)
}

fn erase_range(fd: RawFd, range: &[u64; 2]) -> Result<(), Errno> {
    // SAFETY: invariant 1; the kernel reads two integers.
    unsafe { ioctl::blksecdiscard(fd, range) }.map(drop)
}

/// Discards a byte range of a block device, blocking. `secure`: and makes what it held unreadable.
pub fn discard(file: &File, range: &Range<u64>, secure: bool) -> io::Result<()> {
    let fd = file.as_raw_fd();
    let range = [range.start, range.end.saturating_sub(range.start)];
    if secure {
        return Ok(erase_range(fd, &range)?);
    }
    // SAFETY: invariant 1; the kernel reads two integers.
    unsafe { ioctl::blkdiscard(fd, &range) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sysfs(folder: &Path, attributes: &[(&str, &str)]) {
        for (name, text) in attributes {
            let path = folder.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, format!("{text}\n")).unwrap();
        }
    }

    #[test]
    fn a_partition_has_its_disks_queue_and_its_own_alignment() {
        let dir = tempfile::tempdir().unwrap();
        let disk = [
            ("queue/logical_block_size", "512"),
            ("queue/physical_block_size", "4096"),
            ("queue/discard_granularity", "1048576"),
            ("queue/discard_max_bytes", "2147450880"),
            ("queue/max_sectors_kb", "127"),
            ("discard_alignment", "0"),
            ("sda1/discard_alignment", "65536"),
        ];
        sysfs(dir.path(), &disk);
        let store = |device: &Path| Queue::read(device).store(512, false);
        let expected = Store {
            block_size: 512,
            memory_align: 512,
            physical_block_size: 4096,
            most: 124 << 10,
            discard: Some(Discard { granularity: 1 << 20, alignment: 0, secure: false }),
        };
        assert_eq!(store(dir.path()), expected);
        let part = Discard { granularity: 1 << 20, alignment: 65536, secure: false };
        assert_eq!(store(&dir.path().join("sda1")), Store { discard: Some(part), ..expected });
    }

    #[test]
    fn odd_answers_of_sysfs_become_usable_ones() {
        let queue = Queue { logical_block_size: 4096, discard_granularity: 196_608, ..Queue::default() };
        let store = queue.store(512, true);
        assert_eq!((store.block_size, store.physical_block_size, store.discard), (4096, 4096, None));
        let discard = Queue { discard_max_bytes: 1, ..queue }.store(512, true).discard.unwrap();
        assert_eq!(discard, Discard { granularity: 65536, alignment: 0, secure: true });
        assert_eq!(Queue::read(Path::new("/nonexistent")).store(512, false).block_size, 512);
    }

    #[test]
    fn a_file_is_asked_without_being_changed() {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 5000], 0).unwrap();
        let metadata = file.metadata().unwrap();
        let mut store = Store::of(&file, &metadata, true);
        assert!(store.block_size.is_power_of_two() && store.block_size >= 512);
        store.try_file(&file).unwrap();
        assert_eq!(Store::of(&file, &metadata, false), Store { discard: None, ..store });
        assert_eq!(file.metadata().unwrap().len(), 5000);
        assert!(!can_erase(&file));
    }
}
