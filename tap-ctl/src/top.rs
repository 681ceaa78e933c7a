//! `tap-ctl top`: what the disks are doing, as a table that renews itself.
//!
//! Two surveys give rates, rates a table of 80 columns (`table`); both are pure. `screen` shows tables and reads keys; `run` is the
//! course of things, on a terminal and for scripts.

mod run;
mod screen;
mod table;

use std::collections::HashMap;
use std::time::Duration;

use crate::list::Filter;
use crate::proto::{Histogram, Minor, RingEntry, Stats};
use crate::survey::{Disk, Survey};

pub use run::run;

/// How to show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Which disks.
    pub filter: Filter,
    /// Print one table after the other, and read no keys.
    pub batch: bool,
    /// So many tables; `None`: until the end.
    pub times: Option<u32>,
    /// The time between two.
    pub delay: Duration,
    /// What comes first.
    pub sort: Sort,
}

/// What the disks are sorted by, the greatest first; what is equal is in the order of the devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sort {
    /// Domain and device, the smallest first.
    #[default]
    Device,
    /// Requests in a second.
    Iops,
    /// Bytes in a second.
    Bytes,
    /// The time that the slowest hundredth of the requests take at least.
    Latency,
    /// Requests in flight.
    Queue,
    /// Share of what was found in a cache.
    Hits,
}

impl Sort {
    /// All, with the key that chooses each and its name for `-s`.
    pub const ALL: [(Sort, char, &'static str); 6] = [
        (Sort::Device, 'd', "device"),
        (Sort::Iops, 'i', "iops"),
        (Sort::Bytes, 'b', "bytes"),
        (Sort::Latency, 'l', "latency"),
        (Sort::Queue, 'u', "queue"),
        (Sort::Hits, 'h', "hits"),
    ];

    /// Its name for `-s`.
    pub fn name(self) -> &'static str {
        Sort::ALL.into_iter().find(|(sort, ..)| *sort == self).map_or("", |(_, _, name)| name)
    }

    /// By its name.
    pub fn named(text: &str) -> Option<Sort> {
        Sort::ALL.into_iter().find(|(_, _, name)| *name == text).map(|(sort, ..)| sort)
    }

    fn key(key: char) -> Option<Sort> {
        Sort::ALL.into_iter().find(|(_, its, _)| *its == key).map(|(sort, ..)| sort)
    }
}

/// What a disk does.
#[derive(Clone, Debug, PartialEq)]
struct Row {
    pid: i32,
    minor: Minor,
    /// Its first frontend.
    frontend: Option<RingEntry>,
    /// How many others it has.
    others: usize,
    /// In a second.
    reads: f64,
    writes: f64,
    read_bytes: f64,
    write_bytes: f64,
    /// In microseconds, of reads and writes; `None`: there were none.
    median: Option<u64>,
    slowest: Option<u64>,
    outstanding: u64,
    /// In percent; `None`: there is no cache, or nothing was looked for.
    hits: Option<f64>,
    paused: bool,
    image: String,
}

impl Row {
    fn iops(&self) -> f64 {
        self.reads + self.writes
    }

    fn bytes(&self) -> f64 {
        self.read_bytes + self.write_bytes
    }
}

/// What all disks have done between two surveys. A disk that is new has done all it ever did since then.
fn rates(before: &Survey, now: &Survey, sort: Sort) -> Vec<Row> {
    let seconds = now.taken.saturating_duration_since(before.taken).as_secs_f64().max(0.001);
    let known: HashMap<(i32, Minor), &Stats> =
        before.disks.iter().map(|disk| ((disk.pid, disk.minor), &disk.stats)).collect();
    let mut rows: Vec<Row> = now
        .disks
        .iter()
        .map(|disk| row(disk, known.get(&(disk.pid, disk.minor)).copied(), seconds))
        .collect();
    rows.sort_by(|one, other| order(one, other, sort));
    rows
}

fn row(disk: &Disk, before: Option<&Stats>, seconds: f64) -> Row {
    let Disk { pid, minor, stats } = disk;
    // An image that was closed and another opened in its place begins anew.
    let before = before.filter(|then| then.image == stats.image && then.requests.read <= stats.requests.read);
    let rate = |count: fn(&Stats) -> u64| {
        let more = count(stats).saturating_sub(before.map_or(0, count));
        // Exact below 2^53, which no rate reaches.
        more as f64 / seconds
    };
    let mut times =
        stats.latency.read.since(&before.map_or_else(Histogram::default, |b| b.latency.read.clone()));
    let writes = before.map_or_else(Histogram::default, |before| before.latency.write.clone());
    times.add(&stats.latency.write.since(&writes));
    Row {
        pid: *pid,
        minor: *minor,
        frontend: stats.rings.first().map(|ring| ring.entry),
        others: stats.rings.len().saturating_sub(1),
        reads: rate(|stats| stats.requests.read),
        writes: rate(|stats| stats.requests.write),
        read_bytes: rate(|stats| stats.sectors.read) * 512.0,
        write_bytes: rate(|stats| stats.sectors.write) * 512.0,
        median: times.quantile(500),
        slowest: times.quantile(990),
        outstanding: stats.outstanding,
        hits: hits(stats, before),
        paused: stats.paused,
        image: stats.image.to_string(),
    }
}

/// The share of the sectors that were found in the cache.
fn hits(stats: &Stats, before: Option<&Stats>) -> Option<f64> {
    let now = stats.disk.cache?;
    let then = before.and_then(|before| before.disk.cache).unwrap_or_default();
    let (hits, misses) = (now.hits.saturating_sub(then.hits), now.misses.saturating_sub(then.misses));
    let all = hits.saturating_add(misses);
    (all > 0).then(|| hits as f64 * 100.0 / all as f64)
}

fn order(one: &Row, other: &Row, sort: Sort) -> std::cmp::Ordering {
    let devices =
        |row: &Row| (row.frontend.is_none(), row.frontend.map(|f| (f.domid, f.vdev)), row.pid, row.minor);
    let sorted = match sort {
        Sort::Device => std::cmp::Ordering::Equal,
        Sort::Iops => other.iops().total_cmp(&one.iops()),
        Sort::Bytes => other.bytes().total_cmp(&one.bytes()),
        Sort::Latency => other.slowest.cmp(&one.slowest),
        Sort::Queue => other.outstanding.cmp(&one.outstanding),
        Sort::Hits => other.hits.unwrap_or(-1.0).total_cmp(&one.hits.unwrap_or(-1.0)),
    };
    sorted.then_with(|| devices(one).cmp(&devices(other)))
}

#[cfg(test)]
mod tests;
