//! What a stop at any moment can leave of a storage.

use super::{Memory, Op, Random, SECTOR};

/// Shows `visit` what a storage that began as `start` may hold after a stop within or behind the first operations of `log`:
/// for every number of operations, including none and all, `each` states (at least 2). The first is that of a process that
/// has died: everything, in order. In the others the machine has stopped: what a flush has made durable is there, and of
/// what came later
/// - a prefix of the sectors, or any of them; writes are torn between any two sectors (and so reordered: no two states
///   differ by the order of writes that do not overlap);
/// - a prefix of the changes of length, as file systems keep them in order; a write beyond a length that was lost makes the
///   file longer or is lost with it.
pub fn crash_states(
    start: &Memory,
    log: &[Op],
    each: usize,
    random: &mut Random,
    mut visit: impl FnMut(usize, Memory, &mut Random),
) {
    let mut durable = start.clone();
    durable.log.clear();
    let mut now = durable.clone();
    let mut flushed = 0;
    for done in 0..=log.len() {
        if let Some(op) = done.checked_sub(1).map(|last| &log[last]) {
            now.apply(op);
            if *op == Op::Flush {
                flushed = done;
                durable = now.clone();
            }
        }
        visit(done, now.clone(), random);
        for _ in 1..each {
            let mut state = durable.clone();
            lose(&mut state, &log[flushed..done], random);
            visit(done, state, random);
        }
    }
}

/// Applies a part of the operations since the last flush.
fn lose(state: &mut Memory, log: &[Op], random: &mut Random) {
    let lengths = log.iter().enumerate().filter_map(|(i, op)| match op {
        Op::SetLen(len) => Some((i, *len)),
        _ => None,
    });
    let mut lengths = lengths.collect::<Vec<_>>();
    lengths.truncate(random.below(lengths.len() + 1));
    let mut pieces = pieces(log);
    // A truncation that is there has taken along what was written behind it before.
    pieces.retain(|(i, op)| lengths.iter().all(|(at, len)| i > at || end(op) <= *len));
    if random.once_in(3) {
        pieces.truncate(random.below(pieces.len() + 1));
    } else {
        let (kept, of) = (random.below(5), 4);
        pieces.retain(|_| random.below(of) < kept);
        shuffle(&mut pieces, random);
    }
    for (_, len) in lengths {
        state.apply(&Op::SetLen(len));
    }
    let extends = state.regular && random.once_in(2);
    for (_, piece) in pieces {
        if extends || end(&piece) <= state.bytes.len() as u64 {
            state.apply(&piece);
        }
    }
}

/// Writes to one sector may arrive in any order too: a device promises none before a flush.
fn shuffle(pieces: &mut [(usize, Op)], random: &mut Random) {
    if random.once_in(2) {
        random.shuffle(pieces);
    }
}

/// The sectors of all writes, with the number of the operation.
fn pieces(log: &[Op]) -> Vec<(usize, Op)> {
    let mut pieces = Vec::new();
    for (i, op) in log.iter().enumerate() {
        match op {
            Op::Write(offset, bytes) => {
                let sectors = (*offset..).step_by(SECTOR).zip(bytes.chunks(SECTOR));
                pieces.extend(sectors.map(|(offset, sector)| (i, Op::Write(offset, sector.to_vec()))));
            }
            Op::Zero(range) => {
                let sectors = range.clone().step_by(SECTOR);
                pieces.extend(sectors.map(|at| (i, Op::Zero(at..range.end.min(at + SECTOR as u64)))));
            }
            Op::SetLen(_) | Op::Flush => {}
        }
    }
    pieces
}

/// First byte behind a piece.
fn end(piece: &Op) -> u64 {
    match piece {
        Op::Write(offset, bytes) => offset + bytes.len() as u64,
        Op::Zero(range) => range.end,
        Op::SetLen(len) => *len,
        Op::Flush => 0,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn states(log: &[Op]) -> BTreeSet<(usize, Vec<u8>)> {
        let mut found = BTreeSet::new();
        let start = Memory::of(vec![0; 2 * SECTOR], true);
        super::super::seeds(40, |random| {
            crash_states(&start, log, 6, random, |done, state, _| {
                found.insert((done, state.bytes.chunks(SECTOR).map(|sector| sector[0]).collect()));
            });
        });
        found
    }

    #[test]
    fn writes_are_lost_torn_and_reordered_until_they_are_flushed() {
        let log = [Op::Write(0, vec![1; 1024]), Op::Write(512, vec![2; 512]), Op::Flush];
        let found = states(&log);
        let after = |done| found.iter().filter(move |(d, _)| *d == done).map(|(_, state)| &state[..]);
        assert!(after(0).eq([[0, 0]]));
        assert!(after(1).eq([[0, 0], [0, 1], [1, 0], [1, 1]]));
        assert!(after(2).eq([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]));
        assert!(after(3).eq([[1, 2]]), "what is flushed is there");
    }

    #[test]
    fn a_file_grows_by_a_write_or_not_and_a_lost_truncation_is_as_if_it_never_was() {
        let log = [Op::SetLen(512), Op::Write(1024, vec![3; 512])];
        let found = states(&log);
        let lengths = found.iter().filter(|(done, _)| *done == 2).map(|(_, state)| &state[..]);
        assert!(lengths.eq([&[0][..], &[0, 0], &[0, 0, 3]]), "{found:?}");
    }
}
