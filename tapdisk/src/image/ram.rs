//! RAM disks: raw images in memory, for scratch space. Their content is gone when the last disk that has them open is closed.
//!
//! | argument | content at first | shared |
//! |---|---|---|
//! | `SIZE` | zeros | by nobody |
//! | `SIZE:NAME` | zeros | by all disks of this tapdisk that name it |
//! | `PATH` | that of a raw file or block device, which is never written | by all disks of this tapdisk that name the file |
//!
//! A size is a number of bytes, or one with K, M, G or T. The memory is an anonymous file (memfd), so that it is an image
//! like any other: I/O, threads, discarding and growing need no code of their own, and what was never written or was
//! discarded takes no memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use blkif::ids::SECTOR_SIZE;
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use tap_ctl::proto::null_size;

use super::OpenError;
use super::file::{ImageFile, Locked, Mode};
use crate::porter;

/// The disks that can be shared, by what they are shared by.
static SHARED: Mutex<BTreeMap<Content, Weak<Locked>>> = Mutex::new(BTreeMap::new());

/// Bytes of a source that are read at a time; so many zeros take no memory.
const CHUNK: usize = 64 << 10;

/// What a RAM disk is made of.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Content {
    Zeros { bytes: u64 },
    Named { name: String },
    File { path: PathBuf },
}

/// What the argument asks for: content, and for a named disk its size in bytes.
fn parse(argument: &str) -> (Content, Option<u64>) {
    let (size, name) = match argument.split_once(':') {
        Some((size, name)) => (size, Some(name)),
        None => (argument, None),
    };
    match (null_size(size), name) {
        (Some(bytes), None) => (Content::Zeros { bytes }, Some(bytes)),
        (Some(bytes), Some(name)) => (Content::Named { name: name.to_owned() }, Some(bytes)),
        (None, _) => (Content::File { path: argument.into() }, None),
    }
}

/// The file with what a RAM disk holds at first.
pub fn source(argument: &str) -> Option<PathBuf> {
    match parse(argument).0 {
        Content::File { path } => Some(path),
        Content::Zeros { .. } | Content::Named { .. } => None,
    }
}

/// Opens the RAM disk that the argument of `ram:` asks for; makes it if no other disk of this process has it open.
pub fn open(argument: &str) -> Result<ImageFile, OpenError> {
    let refuse = |errno: Errno, text: String| OpenError::new(Path::new(argument), errno, text);
    let failed = |error: std::io::Error| OpenError::io(Path::new(argument), "cannot make a RAM disk", &error);
    let name = format!("ram:{argument}");
    let (content, size) = parse(argument);
    let content = match content {
        Content::Zeros { bytes } => {
            return memory(bytes).and_then(|file| ImageFile::nameless(&name, file)).map_err(failed);
        }
        Content::File { path } => {
            let path = porter::resolve(&path).map_err(|e| OpenError::io(&path, "cannot resolve", &e))?;
            Content::File { path }
        }
        Content::Named { .. } => content,
    };
    // Held while a disk is filled: who opens the same one meanwhile finds it complete.
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    shared.retain(|_, file| file.strong_count() > 0);
    let file = match shared.get(&content).and_then(Weak::upgrade) {
        Some(file) => file,
        None => {
            let file = match (&content, size) {
                (Content::File { path }, _) => copy_of(path)?,
                (_, size) => memory(size.unwrap_or(0)).map_err(failed)?,
            };
            shared.insert(content, Arc::downgrade(&file));
            file
        }
    };
    let image = ImageFile::nameless(&name, file).map_err(failed)?;
    if let Some(asked) = size.filter(|&asked| asked > image.len()) {
        let text = format!("is open already, with {} bytes, not {asked}", image.len());
        return Err(refuse(Errno::EINVAL, text));
    }
    Ok(image)
}

/// Memory of `bytes` zeros.
fn memory(bytes: u64) -> std::io::Result<Arc<Locked>> {
    let file = File::from(memfd_create(c"xenio-ram-disk", MFdFlags::MFD_CLOEXEC)?);
    file.set_len(bytes)?;
    Ok(Arc::new(file.into()))
}

/// Memory with the content of a raw image, in whole sectors.
fn copy_of(path: &Path) -> Result<Arc<Locked>, OpenError> {
    let failed = |error: std::io::Error| OpenError::io(path, "cannot be read into memory", &error);
    // Locked while it is read, so that nobody changes it meanwhile.
    let source = ImageFile::open(path, Mode::Shared, false)?;
    if source.len() < SECTOR_SIZE {
        return Err(OpenError::empty(path));
    }
    let bytes = source.len() / SECTOR_SIZE * SECTOR_SIZE;
    let target = memory(bytes).map_err(failed)?;
    let mut reader = source.reader()?.take(bytes);
    let (mut chunk, mut at) = (Vec::with_capacity(CHUNK), 0);
    while at < bytes {
        chunk.clear();
        let read = reader.by_ref().take(CHUNK as u64).read_to_end(&mut chunk).map_err(failed)?;
        if read == 0 {
            return Err(OpenError::file(path, "has become shorter while it was read:", Errno::EIO));
        }
        if chunk.iter().any(|&byte| byte != 0) {
            target.file().write_all_at(&chunk, at).map_err(failed)?;
        }
        at += read as u64;
    }
    Ok(target)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn written(image: &ImageFile, bytes: &[u8], at: u64) {
        image.keep().file().write_all_at(bytes, at).unwrap();
    }

    fn read(image: &ImageFile, at: u64) -> [u8; 4] {
        let mut bytes = [0; 4];
        image.reader().unwrap().read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    #[test]
    fn the_argument_is_a_size_a_name_or_a_path() {
        assert_eq!(parse("64K"), (Content::Zeros { bytes: 65536 }, Some(65536)));
        assert_eq!(parse("64K:a:b"), (Content::Named { name: "a:b".into() }, Some(65536)));
        for path in ["/srv/a", "/srv/a:b", "./64K", "0", ""] {
            assert_eq!(parse(path), (Content::File { path: path.into() }, None));
        }
    }

    #[test]
    fn disks_without_a_name_are_apart_and_named_ones_are_one_while_open() {
        let (a, b) = (open("64K").unwrap(), open("64K").unwrap());
        written(&a, b"here", 512);
        assert_eq!((read(&a, 512), read(&b, 512)), (*b"here", [0; 4]));

        let (c, d) = (open("64K:shared").unwrap(), open("64K:shared").unwrap());
        written(&c, b"both", 0);
        drop(c);
        assert_eq!(read(&d, 0), *b"both");
        assert_eq!(open("128K:shared").unwrap_err().errno(), Errno::EINVAL);
        drop(d);
        assert_eq!(read(&open("128K:shared").unwrap(), 0), [0; 4]);
    }

    #[test]
    fn an_initial_image_is_copied_and_never_written() {
        let source = tempfile::NamedTempFile::new().unwrap();
        source.as_file().set_len((4 << 20) + 100).unwrap();
        source.as_file().write_all_at(b"data", 3 << 20).unwrap();
        let path = source.path().to_str().unwrap();
        let image = open(path).unwrap();
        assert_eq!((image.len(), read(&image, 3 << 20)), (4 << 20, *b"data"));
        let blocks = image.keep().file().metadata().unwrap().blocks();
        assert!(blocks * 512 <= 2 * CHUNK as u64, "zeros take memory: {blocks} sectors");
        written(&image, b"over", 3 << 20);
        assert_eq!(read(&open(path).unwrap(), 3 << 20), *b"over");
        drop(image);
        assert_eq!(read(&open(path).unwrap(), 3 << 20), *b"data");
    }

    #[test]
    fn an_initial_image_that_is_missing_empty_or_being_written_is_refused() {
        let source = tempfile::NamedTempFile::new().unwrap();
        let path = source.path().to_str().unwrap();
        assert_eq!(open(path).unwrap_err().errno(), Errno::EINVAL);
        source.as_file().set_len(4096).unwrap();
        let writer = ImageFile::open(source.path(), Mode::Exclusive, false).unwrap();
        assert_eq!(open(path).unwrap_err().errno(), Errno::EBUSY);
        drop(writer);
        open(path).unwrap();
        assert_eq!(open("/nonexistent").unwrap_err().errno(), Errno::ENOENT);
    }
}
