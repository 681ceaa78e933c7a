//! What a check of an image finds.

/// Problems that are described; of more, only the number is told.
const DESCRIBED: usize = 100;

/// The result of a check.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// What is wrong, at most 100 descriptions.
    pub problems: Vec<String>,
    /// How many problems there are.
    pub count: u64,
    /// Units (clusters, grains) in use, without compressed ones.
    pub units: u64,
    /// Compressed units.
    pub packed: u64,
    /// Bytes of the file that nothing refers to. Not wrong: where nothing is ever freed, a stop leaves some.
    pub unused: u64,
}

impl Report {
    /// Notes a problem.
    pub fn add(&mut self, problem: impl FnOnce() -> String) {
        self.count = self.count.saturating_add(1);
        if self.problems.len() < DESCRIBED {
            self.problems.push(problem());
        }
    }
}

/// Byte ranges of a file that are in use. Neighbours of a kind are one range, so that most images need few.
#[derive(Debug, Default)]
pub struct Used {
    ranges: Vec<(u64, u64, &'static str)>,
}

impl Used {
    /// Notes the use of a range.
    pub fn add(&mut self, start: u64, end: u64, what: &'static str) {
        match self.ranges.last_mut() {
            Some(last) if last.1 == start && last.2 == what => last.1 = end,
            _ => self.ranges.push((start, end, what)),
        }
    }

    /// Reports what overlaps, and counts what is in no range of a file of `size` bytes.
    pub fn judge(mut self, size: u64, report: &mut Report) {
        self.ranges.sort_unstable();
        let mut reached = (0, "");
        for (start, end, what) in self.ranges {
            if start < reached.0 {
                report.add(|| format!("{what} at byte {start} overlaps {}", reached.1));
            }
            report.unused = report.unused.saturating_add(start.saturating_sub(reached.0));
            if end > reached.0 {
                reached = (end, what);
            }
        }
        report.unused = report.unused.saturating_add(size.saturating_sub(reached.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlaps_are_told_and_gaps_counted() {
        let mut used = Used::default();
        for (start, end, what) in [(0, 10, "head"), (30, 40, "unit"), (40, 50, "unit"), (20, 31, "table")] {
            used.add(start, end, what);
        }
        let mut report = Report::default();
        used.judge(60, &mut report);
        assert_eq!((report.problems, report.count), (vec!["unit at byte 30 overlaps table".to_owned()], 1));
        assert_eq!(report.unused, 20);
    }

    #[test]
    fn a_thousand_problems_are_counted_and_a_hundred_told() {
        let mut report = Report::default();
        (0..1000).for_each(|i| report.add(|| format!("{i}")));
        assert_eq!((report.problems.len(), report.count), (100, 1000));
    }
}
