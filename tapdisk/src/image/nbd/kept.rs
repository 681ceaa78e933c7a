//! Copies of what the server has acknowledged and not yet made durable.
//!
//! A server that dies takes the writes in its cache along, and the one that answers the next connection does not say whether
//! it is the same. So every write is kept until a flush that was sent after its acknowledgement has been answered, and
//! after a reconnection all that are kept are sent again, in the order of their acknowledgements, before anything
//! else. Writing what is there already changes nothing.
//!
//! Trimmed bytes need not be kept: what they hold is undefined.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

/// Bytes kept at most before writers wait for a flush; those in flight come on top.
pub const MOST: usize = 32 << 20;

/// An acknowledged write.
#[derive(Debug)]
pub struct Write {
    number: u64,
    /// Byte position.
    pub offset: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// The writes that are kept.
#[derive(Debug, Default)]
pub struct Kept {
    inner: RefCell<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    writes: VecDeque<Rc<Write>>,
    bytes: usize,
    next: u64,
}

/// Everything that was kept before.
#[derive(Clone, Copy, Debug)]
pub struct Mark(u64);

impl Kept {
    /// Keeps a write that was acknowledged now.
    pub fn add(&self, offset: u64, bytes: Vec<u8>) {
        let mut inner = self.inner.borrow_mut();
        let number = inner.next;
        inner.next += 1;
        inner.bytes += bytes.len();
        inner.writes.push_back(Rc::new(Write { number, offset, bytes }));
    }

    /// Whether a flush is due.
    pub fn is_full(&self) -> bool {
        self.inner.borrow().bytes >= MOST
    }

    /// What a flush that is sent now covers.
    pub fn mark(&self) -> Mark {
        Mark(self.inner.borrow().next)
    }

    /// A flush was answered: what it covers need not be kept any more.
    pub fn forget(&self, Mark(end): Mark) {
        let mut inner = self.inner.borrow_mut();
        let count = inner.writes.partition_point(|write| write.number < end);
        let bytes: usize = inner.writes.drain(..count).map(|write| write.bytes.len()).sum();
        inner.bytes -= bytes;
    }

    /// The oldest write that came after `last`, or the oldest of all.
    pub fn after(&self, last: Option<&Write>) -> Option<Rc<Write>> {
        let inner = self.inner.borrow();
        let first = last.map_or(0, |last| last.number + 1);
        let at = inner.writes.partition_point(|write| write.number < first);
        inner.writes.get(at).cloned()
    }

    /// How many are kept.
    pub fn len(&self) -> usize {
        self.inner.borrow().writes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_covers_what_was_kept_before_it_was_sent() {
        let kept = Kept::default();
        kept.add(0, vec![1; 512]);
        let mark = kept.mark();
        kept.add(512, vec![2; 1024]);
        kept.forget(mark);
        let rest = kept.after(None).unwrap();
        assert_eq!((rest.offset, rest.bytes.len(), kept.len()), (512, 1024, 1));
        assert!(kept.after(Some(&rest)).is_none());
        kept.forget(kept.mark());
        assert!(kept.after(None).is_none() && !kept.is_full());
    }

    #[test]
    fn all_are_found_in_the_order_of_their_acknowledgements() {
        let kept = Kept::default();
        for offset in [7, 3, 5] {
            kept.add(offset, vec![0; MOST / 3 + 1]);
        }
        assert!(kept.is_full());
        let (mut last, mut seen) = (None, Vec::new());
        while let Some(write) = kept.after(last.as_deref()) {
            seen.push(write.offset);
            last = Some(write);
        }
        assert_eq!(seen, [7, 3, 5]);
    }
}
