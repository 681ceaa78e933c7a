//! A simulated domain's memory and grant table.
//!
//! One file, `dom<N>.mem`, is the domain: what is not in it the backend cannot reach, and whoever maps the file sees
//! what the guest sees.
//!
//! | page | holds |
//! |---|---|
//! | 0 | word 0: 1 while the domain lives; word 1: [`Refusal`] bits; word 2: pages that others have mapped now |
//! | 1 to 64 | the grant table: 32768 entries of 8 bytes |
//! | 65 to 96 | for each entry a u32: how often it is mapped now |
//! | from 97 on | the guest's pages; a *frame* is a page's number in the file |
//!
//! A grant entry is laid out as in Xen's `grant_table.h`, version 1: flags u16, domid u16, frame u32. Xen counts mappings in the
//! entry's flags; a counter beside it does the same, and says how many there are. A process that is killed leaves its
//! mappings counted, unlike on Xen.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use blkif::ids::PAGE_SIZE;
use blkif::{DomId, GrantRef};
use gntdev::Access;

use super::memory::SharedFile;

const TABLE_PAGES: usize = 64;
const COUNT_PAGES: usize = 32;
const FIRST_FRAME: usize = 1 + TABLE_PAGES + COUNT_PAGES;
const ENTRY_SIZE: usize = 8;
/// Entries of a grant table: those of 64 pages, Xen's default limit.
const ENTRIES: u32 = 32768;
/// The entries that Xen's tools use for console and XenStore; never given out.
const RESERVED_ENTRIES: u32 = 8;
const ALIVE: u32 = 1;

// Byte offsets in page 0.
const LIFE: usize = 0;
const REFUSALS: usize = 4;
const MAPPED: usize = 8;

const PERMIT_ACCESS: u32 = 1;
const READ_ONLY: u32 = 4;

/// The number of a page of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frame(pub u32);

/// Why a grant cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GrantFault {
    /// No such entry in the table.
    BadReference,
    /// The entry gives nothing, or not to us, or not for writing.
    Denied,
    /// The entry gives a page that the domain does not have.
    BadFrame,
}

/// What the hypervisor refuses for a domain's grants, good ones included, as it does when it is out of some resource.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refusal {
    /// Every mapping.
    pub maps: bool,
    /// Every copy.
    pub copies: bool,
}

/// A domain's memory as any process may see it.
#[derive(Debug)]
pub struct DomainMemory {
    memory: SharedFile,
}

impl DomainMemory {
    /// The path of a domain's memory in the simulated hypervisor's folder.
    pub fn path(dir: &Path, dom: DomId) -> PathBuf {
        dir.join(format!("dom{dom}.mem"))
    }

    /// Opens the memory of a living domain.
    pub fn open(dir: &Path, dom: DomId) -> io::Result<DomainMemory> {
        let memory = SharedFile::open(&DomainMemory::path(dir, dom))?;
        if memory.size() < FIRST_FRAME * PAGE_SIZE {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("memory of domain {dom} is too short"),
            ));
        }
        Ok(DomainMemory { memory })
    }

    /// Whether the domain still exists.
    pub fn is_alive(&self) -> bool {
        self.memory.word(LIFE).load(Ordering::Acquire) == ALIVE
    }

    /// The mapped file.
    pub fn memory(&self) -> &SharedFile {
        &self.memory
    }

    /// The page behind a grant to `grantee`, if the grant allows the access; as a byte offset in the file.
    pub fn granted_page(&self, gref: GrantRef, grantee: DomId, access: Access) -> Result<usize, GrantFault> {
        if gref.0 >= ENTRIES {
            return Err(GrantFault::BadReference);
        }
        let at = entry_offset(gref);
        // Acquire: the frame is read after the flags that make it valid.
        let head = self.memory.word(at).load(Ordering::Acquire);
        let frame = self.memory.word(at + 4).load(Ordering::Relaxed);
        let (flags, domid) = (head & 0xffff, head >> 16);
        let readable = flags & PERMIT_ACCESS != 0 && domid == u32::from(grantee.0);
        let writable = readable && flags & READ_ONLY == 0;
        if !(writable || readable && access == Access::ReadOnly) {
            return Err(GrantFault::Denied);
        }
        self.page(Frame(frame)).ok_or(GrantFault::BadFrame)
    }

    /// What is refused at present.
    pub fn refusal(&self) -> Refusal {
        let bits = self.memory.word(REFUSALS).load(Ordering::Acquire);
        Refusal { maps: bits & 1 != 0, copies: bits & 2 != 0 }
    }

    /// Counts a page that was mapped through a grant.
    pub fn count_map(&self, gref: GrantRef) {
        self.memory.word(count_offset(gref)).fetch_add(1, Ordering::AcqRel);
        self.memory.word(MAPPED).fetch_add(1, Ordering::AcqRel);
    }

    /// Counts a page that is not mapped any more.
    pub fn count_unmap(&self, gref: GrantRef) {
        let before = self.memory.word(count_offset(gref)).fetch_sub(1, Ordering::AcqRel);
        assert!(before > 0, "grant {gref} was unmapped more often than mapped");
        self.memory.word(MAPPED).fetch_sub(1, Ordering::AcqRel);
    }

    /// Byte offset of a frame, if the domain has it.
    fn page(&self, frame: Frame) -> Option<usize> {
        let offset = usize::try_from(frame.0).ok()?.checked_mul(PAGE_SIZE)?;
        let end = offset.checked_add(PAGE_SIZE)?;
        (offset >= FIRST_FRAME * PAGE_SIZE && end <= self.memory.size()).then_some(offset)
    }
}

/// A domain from the inside: it allocates pages, reads and writes them, and grants them to others.
///
/// Dropping it destroys the domain: nobody can open it or use its grants any more. Pages that others have mapped stay
/// with them until they unmap.
pub struct SimDomain {
    id: DomId,
    path: PathBuf,
    memory: DomainMemory,
    free_frames: BTreeSet<Frame>,
    free_entries: BTreeSet<GrantRef>,
}

impl fmt::Debug for SimDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimDomain").field("id", &self.id).field("path", &self.path).finish_non_exhaustive()
    }
}

impl SimDomain {
    /// Creates a domain of `pages` pages in the simulated hypervisor's folder, which must exist.
    ///
    /// # Errors
    ///
    /// `AlreadyExists` if a domain of that number lives.
    pub fn create(dir: &Path, id: DomId, pages: u32) -> io::Result<SimDomain> {
        let path = DomainMemory::path(dir, id);
        let total = FIRST_FRAME + pages as usize;
        let memory = DomainMemory { memory: SharedFile::create(&path, total * PAGE_SIZE)? };
        memory.memory.word(LIFE).store(ALIVE, Ordering::Release);
        let frames = (FIRST_FRAME..total).map(|frame| Frame(u32::try_from(frame).unwrap_or(u32::MAX)));
        Ok(SimDomain {
            id,
            path,
            memory,
            free_frames: frames.collect(),
            free_entries: (RESERVED_ENTRIES..ENTRIES).map(GrantRef).collect(),
        })
    }

    /// The domain's number.
    pub fn id(&self) -> DomId {
        self.id
    }

    /// Takes `count` free pages that follow each other; the first of them.
    ///
    /// # Panics
    ///
    /// If there are none: the test made the domain too small.
    pub fn allocate(&mut self, count: u32) -> Frame {
        let fits = |first: &&Frame| (1..count).all(|i| self.free_frames.contains(&Frame(first.0 + i)));
        let first = *self.free_frames.iter().find(fits).expect("the simulated domain is out of memory");
        for i in 0..count {
            self.free_frames.remove(&Frame(first.0 + i));
        }
        first
    }

    /// Gives `count` pages from `first` on back. Grants of them should be revoked.
    pub fn free(&mut self, first: Frame, count: u32) {
        self.free_frames.extend((0..count).map(|i| Frame(first.0 + i)));
    }

    /// Grants a page to another domain.
    ///
    /// # Panics
    ///
    /// If the grant table is full.
    pub fn grant(&mut self, frame: Frame, to: DomId, access: Access) -> GrantRef {
        let gref = self.free_entries.pop_first().expect("the simulated grant table is full");
        self.set_grant(gref, frame, to, access);
        gref
    }

    /// Overwrites a grant entry, in use or not, with any frame at all.
    pub fn set_grant(&self, gref: GrantRef, frame: Frame, to: DomId, access: Access) {
        let flags = PERMIT_ACCESS | if access == Access::ReadOnly { READ_ONLY } else { 0 };
        let at = entry_offset(gref);
        self.memory.memory.word(at + 4).store(frame.0, Ordering::Relaxed);
        self.memory.memory.word(at).store(flags | u32::from(to.0) << 16, Ordering::Release);
    }

    /// Takes a grant back, also from under a mapping, which keeps its pages.
    pub fn revoke(&mut self, gref: GrantRef) {
        self.memory.memory.word(entry_offset(gref)).store(0, Ordering::Release);
        self.free_entries.insert(gref);
    }

    /// How often the page behind a grant is mapped by others now.
    pub fn mappings(&self, gref: GrantRef) -> u32 {
        self.memory.memory.word(count_offset(gref)).load(Ordering::Acquire)
    }

    /// Pages of this domain that others have mapped now, one mapped twice counting twice.
    pub fn mapped_pages(&self) -> u32 {
        self.memory.memory.word(MAPPED).load(Ordering::Acquire)
    }

    /// Makes the hypervisor refuse operations on this domain's grants, from now on.
    pub fn refuse(&self, refusal: Refusal) {
        let bits = u32::from(refusal.maps) | u32::from(refusal.copies) << 1;
        self.memory.memory.word(REFUSALS).store(bits, Ordering::Release);
    }

    /// Byte offset of a page in [`SimDomain::memory`].
    ///
    /// # Panics
    ///
    /// If the domain has no such page.
    pub fn offset(&self, frame: Frame) -> usize {
        self.memory.page(frame).expect("a frame of this domain")
    }

    /// The domain's memory.
    pub fn memory(&self) -> &SharedFile {
        &self.memory.memory
    }

    /// Copies bytes out of the page `frame`, from byte `offset` in it.
    pub fn read(&self, frame: Frame, offset: usize, to: &mut [u8]) {
        self.memory().read(self.offset(frame) + offset, to);
    }

    /// Copies bytes into the page `frame`, from byte `offset` in it.
    pub fn write(&self, frame: Frame, offset: usize, from: &[u8]) {
        self.memory().write(self.offset(frame) + offset, from);
    }
}

impl Drop for SimDomain {
    fn drop(&mut self) {
        self.memory.memory.word(LIFE).store(0, Ordering::Release);
        if let Err(error) = std::fs::remove_file(&self.path) {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Byte offset of a grant entry in the file.
fn entry_offset(gref: GrantRef) -> usize {
    PAGE_SIZE + gref.0 as usize * ENTRY_SIZE
}

/// Byte offset in the file of a grant entry's counter of mappings.
fn count_offset(gref: GrantRef) -> usize {
    (1 + TABLE_PAGES) * PAGE_SIZE + gref.0 as usize * size_of::<u32>()
}
