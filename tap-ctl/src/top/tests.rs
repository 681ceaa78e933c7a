use std::time::{Duration, Instant};

use super::*;
use crate::proto::latency::{BUCKETS, bucket};
use crate::proto::{CacheStats, RingStats};
use crate::testing::some_stats;

fn ring(domid: u16, vdev: u32) -> RingStats {
    let entry = RingEntry { domid, vdev };
    RingStats { entry, queues: 1, taken: 0, answered: 0, kicked: 0, kicks: 0, malformed: 0, failed: 0 }
}

fn disk(minor: u16, image: &str, change: impl FnOnce(&mut Stats)) -> Disk {
    let mut stats = some_stats();
    stats.image = image.parse().unwrap();
    change(&mut stats);
    Disk { pid: 4711, minor: Minor(minor), stats }
}

fn read(stats: &mut Stats, requests: u64, micros: u64) {
    stats.requests.read += requests;
    stats.sectors.read += requests * 8;
    stats.latency.read.counts.resize(BUCKETS, 0);
    stats.latency.read.counts[bucket(micros)] += requests;
    stats.latency.read.max_us = stats.latency.read.max_us.max(micros);
}

/// Two surveys, two seconds apart.
fn surveys() -> (Survey, Survey) {
    let start = Instant::now();
    let busy = |more| {
        disk(0, "vhd:/srv/images/debian.vhd", |stats| {
            stats.rings = vec![ring(7, 51712)];
            stats.disk.cache = Some(CacheStats { hits: more / 2, misses: more / 2, bytes: 0, limit: 0 });
            read(stats, more, 240);
            stats.outstanding = 32;
        })
    };
    let shared = |more| {
        disk(1, "aio:/dev/vg/shared", |stats| {
            stats.rings = vec![ring(2, 51728), ring(3, 51728)];
            stats.requests.write += more;
            stats.sectors.write += more * 2048;
        })
    };
    let idle =
        disk(2, "qcow2:/srv/a folder/with a very long name/of a disk.qcow2", |stats| stats.paused = true);
    let survey = |taken, disks| Survey { taken, disks, problems: Vec::new() };
    let first = survey(start, vec![busy(100), shared(5), idle.clone()]);
    let second = survey(start + Duration::from_secs(2), vec![busy(50_100), shared(205), idle]);
    (first, second)
}

fn table(sort: Sort, problems: usize) -> Vec<String> {
    let (before, now) = surveys();
    table::lines(&rates(&before, &now, sort), problems, sort, table::COLUMNS)
}

#[test]
fn a_table_fits_eighty_columns() {
    let expected = [
        "3 disks, 25.1k IOPS, 102 MB/s read, 105 MB/s written                   by device",
        "  DOM DEV    READ/S WRIT/S  R MB/S W MB/S   P50   P99 QUE HIT% IMAGE",
        "    2 xvdb+1      0    100       0    105     -     -   2    - ..:/dev/vg/shared",
        "    7 xvda    25.0k      0     102      0 239us 255us  32   50 ..ages/debian.vhd",
        "    - -           0      0       0      0     -     -   2    - ..of a disk.qcow2",
    ];
    let lines = table(Sort::Device, 0);
    assert!(lines.iter().all(|line| line.chars().count() <= 80), "{lines:#?}");
    assert_eq!(lines, expected, "{lines:#?}");
}

#[test]
fn the_greatest_comes_first() {
    let first = |sort| table(sort, 0)[2].split_whitespace().nth(1).unwrap().to_owned();
    let firsts = Sort::ALL.map(|(sort, ..)| first(sort));
    assert_eq!(firsts, ["xvdb+1", "xvda", "xvdb+1", "xvda", "xvda", "xvda"]);
}

#[test]
fn what_does_not_answer_is_told() {
    assert!(table(Sort::Iops, 2)[0].contains(" written, 2 not answering "));
}

#[test]
fn a_disk_that_was_opened_anew_begins_at_zero() {
    let (mut before, now) = surveys();
    for disk in &mut before.disks {
        disk.stats.requests.read = u64::MAX;
        disk.stats.sectors.read = u64::MAX;
    }
    let rows = rates(&before, &now, Sort::Iops);
    assert_eq!(rows[0].reads, (50_100.0 + 3.0) / 2.0);
}

#[test]
fn every_key_and_every_name_chooses_its_column() {
    for (sort, key, name) in Sort::ALL {
        assert_eq!((Sort::key(key), Sort::named(name), sort.name()), (Some(sort), Some(sort), name));
    }
    assert_eq!((Sort::key('q'), Sort::named("size")), (None, None));
}
