//! Statistics for Prometheus, in its text format, version 0.0.4.
//!
//! `tap-ctl metrics` asks the tapdisks when it is asked itself. It is a process of its own: xenio must never wait for a tapdisk
//! and holds rights over all of XenStore, a tapdisk knows of no other; and one that asks when asked has nothing to keep, nothing to
//! get out of date and no cost between two scrapes.

pub mod serve;

use std::fmt::{Display, Write};

use crate::proto::{Histogram, ImageStats, MirrorStats, ReadWrite, Stats};
use crate::survey::{Disk, Survey};

/// Ends of the histograms' buckets, as powers of two in microseconds: 16 µs to 17 s, all of them ends of ours too.
const BUCKET_ENDS: std::ops::RangeInclusive<u32> = 4..=24;

/// All metrics.
pub fn text(survey: &Survey) -> String {
    let mut text = Text(String::new());
    let disks = &survey.disks;
    text.family("xenio_scrape_problems", "gauge", "Tapdisks that did not answer.");
    text.sample("xenio_scrape_problems", "", survey.problems.len());
    text.family("xenio_disk_info", "gauge", "An open disk, and its image.");
    for disk in disks {
        let image = &disk.stats.image;
        let labels = format!(r#"{},type="{}",path="{}""#, name(disk), image.kind.name(), escape(&image.path));
        text.sample("xenio_disk_info", &labels, 1);
    }
    per_direction(&mut text, disks);
    per_disk(&mut text, disks);
    per_mirror(&mut text, disks);
    latencies(&mut text, disks);
    per_image(&mut text, disks);
    per_frontend(&mut text, disks);
    text.0
}

fn per_direction(text: &mut Text, disks: &[Disk]) {
    text.family("xenio_disk_requests_total", "counter", "Requests of guests that were answered.");
    for disk in disks {
        let requests = disk.stats.requests;
        for (operation, count) in [("read", requests.read), ("write", requests.write)] {
            let labels = format!(r#"{},operation="{operation}""#, name(disk));
            text.sample("xenio_disk_requests_total", &labels, count);
        }
    }
    text.family("xenio_disk_bytes_total", "counter", "Bytes moved for guests.");
    for disk in disks {
        let sectors = disk.stats.sectors;
        for (operation, count) in [("read", sectors.read), ("write", sectors.write)] {
            let labels = format!(r#"{},operation="{operation}""#, name(disk));
            text.sample("xenio_disk_bytes_total", &labels, count.saturating_mul(512));
        }
    }
}

/// A metric that every disk has.
type OfDisk = (&'static str, &'static str, &'static str, fn(&Disk) -> u64);

const OF_DISK: [OfDisk; 5] = [
    ("xenio_disk_paused", "gauge", "1 while the disk is paused.", |disk| disk.stats.paused.into()),
    ("xenio_disk_outstanding", "gauge", "Requests in flight.", |disk| disk.stats.outstanding),
    ("xenio_disk_late_requests", "gauge", "Requests in flight for longer than ten seconds.", |disk| {
        disk.stats.late
    }),
    ("xenio_disk_held", "gauge", "Requests that are never answered, because the disk was stopped.", |disk| {
        disk.stats.held
    }),
    (
        "xenio_disk_throttled_total",
        "counter",
        "How often requests had to wait because of the disk's limits.",
        |disk| disk.stats.throttled,
    ),
];

/// How long something has been going on: a time in milliseconds, or nothing, which is told as 0.
type Age = (&'static str, &'static str, fn(&Stats) -> Option<u64>);

const AGES: [Age; 2] = [
    ("xenio_disk_oldest_request_seconds", "Age of the oldest request in flight.", |stats| stats.oldest_ms),
    (
        "xenio_disk_oldest_store_operation_seconds",
        "Age of the oldest operation on a file or device that the system has not ended.",
        |stats| stats.store.as_ref().map(|operation| operation.age_ms),
    ),
];

fn per_disk(text: &mut Text, disks: &[Disk]) {
    for (metric, kind, help, value) in OF_DISK {
        text.family(metric, kind, help);
        for disk in disks {
            text.sample(metric, &name(disk), value(disk));
        }
    }
    for (metric, help, age) in AGES {
        text.family(metric, "gauge", help);
        for disk in disks {
            text.sample(metric, &name(disk), seconds(age(&disk.stats).unwrap_or(0).saturating_mul(1000)));
        }
    }
    let caches = || disks.iter().filter_map(|disk| Some((name(disk), disk.stats.disk.cache?)));
    text.family("xenio_disk_cache_sectors_total", "counter", "Sectors looked for in the read cache.");
    for (disk, cache) in caches() {
        for (result, count) in [("hit", cache.hits), ("miss", cache.misses)] {
            let labels = format!(r#"{disk},result="{result}""#);
            text.sample("xenio_disk_cache_sectors_total", &labels, count);
        }
    }
    text.family("xenio_disk_cache_bytes", "gauge", "Bytes that the read cache holds.");
    for (disk, cache) in caches() {
        text.sample("xenio_disk_cache_bytes", &disk, cache.bytes);
    }
}

/// A number of a secondary image; only disks with one have it.
type OfMirror = (&'static str, &'static str, fn(&MirrorStats) -> String);

const OF_MIRROR: [OfMirror; 4] = [
    ("xenio_disk_mirror_failed", "1 if a secondary image gets no more writes.", |mirror| {
        u8::from(mirror.failed.is_some()).to_string()
    }),
    ("xenio_disk_mirror_copied_bytes", "Bytes on which both images are known to agree.", |mirror| {
        mirror.copied.to_string()
    }),
    ("xenio_disk_mirror_size_bytes", "Bytes on which both images are to agree.", |mirror| {
        mirror.total.to_string()
    }),
    (
        "xenio_disk_mirror_stuck_seconds",
        "For how long a secondary image has had something to do and has finished nothing.",
        |mirror| seconds(mirror.stuck_ms.unwrap_or(0).saturating_mul(1000)),
    ),
];

fn per_mirror(text: &mut Text, disks: &[Disk]) {
    for (metric, help, value) in OF_MIRROR {
        text.family(metric, "gauge", help);
        for disk in disks {
            if let Some(mirror) = &disk.stats.disk.mirror {
                text.sample(metric, &name(disk), value(mirror));
            }
        }
    }
    let metric = "xenio_disk_standby_serving";
    text.family(metric, "gauge", "1 once a standby image takes the writes, because the first is full.");
    for disk in disks {
        if let Some(standby) = &disk.stats.disk.standby {
            text.sample(metric, &name(disk), u8::from(standby.serving));
        }
    }
}

fn latencies(text: &mut Text, disks: &[Disk]) {
    let metric = "xenio_disk_request_duration_seconds";
    text.family(metric, "histogram", "How long requests took, from being taken to being answered.");
    for disk in disks {
        for (operation, histogram) in disk.stats.latency.named() {
            text.histogram(metric, &format!(r#"{},operation="{operation}""#, name(disk)), histogram);
        }
    }
}

/// A counter of each image of a chain.
type OfImage = (&'static str, &'static str, fn(&ImageStats) -> ReadWrite);

const OF_IMAGE: [OfImage; 2] = [
    (
        "xenio_image_sectors_total",
        "Sectors found in and written to each image of a chain; depth 0 is the leaf.",
        |image| image.hits,
    ),
    ("xenio_image_failures_total", "Transfers of each image of a chain that failed.", |image| image.fail),
];

fn per_image(text: &mut Text, disks: &[Disk]) {
    for (metric, help, value) in OF_IMAGE {
        text.family(metric, "counter", help);
        for disk in disks {
            for (depth, image) in disk.stats.disk.images.iter().enumerate() {
                let ReadWrite { read, write } = value(image);
                for (operation, count) in [("read", read), ("write", write)] {
                    let labels = format!(r#"{},depth="{depth}",operation="{operation}""#, name(disk));
                    text.sample(metric, &labels, count);
                }
            }
        }
    }
}

/// A metric of each frontend.
type OfRing = (&'static str, &'static str, fn(&crate::proto::RingStats) -> u64);

const OF_RING: [OfRing; 4] = [
    ("xenio_frontend_requests_total", "Requests taken from a frontend's rings.", |ring| ring.taken),
    ("xenio_frontend_errors_total", "Requests of a frontend that were answered with an error.", |ring| {
        ring.failed
    }),
    ("xenio_frontend_malformed_total", "Requests of a frontend that make no sense.", |ring| ring.malformed),
    ("xenio_frontend_notifications_total", "Notifications sent to a frontend.", |ring| ring.kicks),
];

fn per_frontend(text: &mut Text, disks: &[Disk]) {
    for (metric, help, value) in OF_RING {
        text.family(metric, "counter", help);
        for disk in disks {
            for ring in &disk.stats.rings {
                let entry = ring.entry;
                let labels = format!(r#"{},domid="{}",vdev="{}""#, name(disk), entry.domid, entry.vdev);
                text.sample(metric, &labels, value(ring));
            }
        }
    }
}

/// The labels that tell a disk from all others of this host.
fn name(disk: &Disk) -> String {
    format!(r#"pid="{}",minor="{}""#, disk.pid, disk.minor)
}

/// Of a label's value.
fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Microseconds as seconds, exactly.
fn seconds(micros: u64) -> String {
    let (whole, rest) = (micros / 1_000_000, micros % 1_000_000);
    let text = format!("{whole}.{rest:06}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// The text being written. Writing to a string does not fail.
struct Text(String);

impl Text {
    fn family(&mut self, metric: &str, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP {metric} {help}\n# TYPE {metric} {kind}\n");
    }

    fn sample(&mut self, metric: &str, labels: &str, value: impl Display) {
        let _ = match labels {
            "" => writeln!(self.0, "{metric} {value}"),
            _ => writeln!(self.0, "{metric}{{{labels}}} {value}"),
        };
    }

    fn histogram(&mut self, metric: &str, labels: &str, histogram: &Histogram) {
        for power in BUCKET_ENDS {
            let end = 1 << power;
            let le = format!(r#"{labels},le="{}""#, seconds(end));
            self.sample(&format!("{metric}_bucket"), &le, histogram.below(end));
        }
        let count = histogram.count();
        self.sample(&format!("{metric}_bucket"), &format!(r#"{labels},le="+Inf""#), count);
        self.sample(&format!("{metric}_sum"), labels, seconds(histogram.sum_us));
        self.sample(&format!("{metric}_count"), labels, count);
    }
}

#[cfg(test)]
mod tests;
