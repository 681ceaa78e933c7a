//! Statistics as text.
//!
//! XenServer's storage manager reads the output of `tap-ctl stats`; its names, odd ones included, are kept
//! (xapi-project/blktap, `drivers/tapdisk-vbd.c:tapdisk_vbd_stats` and `drivers/td-stats.c`). What it has no name for is
//! shown by `tap-ctl stats --full`, with the names of [`Stats`].

use serde_json::{Value, json};

use crate::proto::{Histogram, ImageStats, ImageType, ReadWrite, RingStats, Stats, latency};

/// Requests in flight of one image at most; what XenServer's tapdisk says for its drivers.
const MAX_REQUESTS: u64 = 352;

/// One line of JSON, as XenServer's tapdisk writes it.
pub fn xenserver(stats: &Stats) -> String {
    let Stats { image, disk, .. } = stats;
    let images: Vec<String> = disk
        .images
        .iter()
        .enumerate()
        .map(|(depth, image)| self::image(image, depth, stats.outstanding))
        .collect();
    // An object whose keys repeat, one for each frontend, is what is read: so it is put together as text.
    let rings: String = stats.rings.iter().map(|ring| format!(", \"xenbus\": {}", xenbus(ring))).collect();
    let mirror_failed = u8::from(disk.mirror.as_ref().is_some_and(|mirror| mirror.failed.is_some()));
    // In sectors.
    let redirected = disk.standby.as_ref().map_or(0, |standby| standby.written / 512);
    format!(
        "{{ \"name\": {}, \"secs\": {}, \"images\": [ {} ]{rings}, \"FIXME_enospc_redirect_count\": {redirected}, \
         \"nbd_mirror_failed\": {mirror_failed}, \"reqs_outstanding\": {}, \"read_caching\": {} }}",
        text(&image.to_string()),
        pair(stats.sectors),
        images.join(", "),
        stats.outstanding,
        text(if disk.cache.is_some() || disk.local_cache.is_some() { "true" } else { "false" }),
    )
}

/// One line of JSON with everything there is.
pub fn full(stats: &Stats) -> String {
    full_value(stats).to_string()
}

/// The same, to be part of something larger.
pub fn full_value(stats: &Stats) -> Value {
    let mut value = serde_json::to_value(stats).unwrap_or_default();
    let times = stats.latency.named().map(|(name, histogram)| (name.to_owned(), times(histogram)));
    value["latency"] = Value::Object(times.into_iter().collect());
    value
}

/// In microseconds; `buckets` are pairs of a bucket's end and how many requests took less, but no less than the bucket before.
fn times(histogram: &Histogram) -> Value {
    let buckets = histogram.counts.iter().enumerate().filter(|(_, count)| **count > 0);
    json!({
        "count": histogram.count(),
        "mean_us": histogram.mean(),
        "p50_us": histogram.quantile(500),
        "p90_us": histogram.quantile(900),
        "p99_us": histogram.quantile(990),
        "p999_us": histogram.quantile(999),
        "max_us": histogram.max_us,
        "sum_us": histogram.sum_us,
        "buckets": buckets.map(|(index, count)| (latency::beyond(index), count)).collect::<Vec<_>>(),
    })
}

fn image(stats: &ImageStats, depth: usize, outstanding: u64) -> String {
    // Requests wait at the leaf, whatever layer their data comes from.
    let pending = if depth == 0 { outstanding } else { 0 };
    format!(
        "{{ \"name\": {}, \"hits\": {}, \"fail\": {}, \"driver\": {{ \"type\": {}, \"name\": {}, \"status\": \
         {{ \"reqs\": {{ \"max\": {MAX_REQUESTS}, \"pending\": {pending} }} }} }} }}",
        text(&stats.image.path),
        pair(stats.hits),
        pair(stats.fail),
        disk_type(stats.image.kind),
        text(stats.image.kind.name()),
    )
}

/// `DISK_TYPE_*` of `drivers/tapdisk-disktype.h`; -1 for a type it has not.
fn disk_type(kind: ImageType) -> i8 {
    match kind.name() {
        "aio" => 0,
        "sync" => 1,
        "vmdk" => 2,
        "vhdsync" => 3,
        "vhd" => 4,
        "ram" => 5,
        "qcow" => 6,
        "x-chain" => 14,
        "nbd" => 17,
        _ => -1,
    }
}

fn xenbus(ring: &RingStats) -> Value {
    json!({
        "pool": "td-xenblkif",
        "domid": ring.entry.domid,
        "devid": ring.entry.vdev,
        "reqs": [ring.taken, ring.answered],
        "kicks": [ring.kicked, ring.kicks],
        "errors": { "msg": ring.malformed, "map": 0, "vbd": 0, "img": ring.failed },
    })
}

fn pair(counts: ReadWrite) -> String {
    format!("[ {}, {} ]", counts.read, counts.write)
}

fn text(text: &str) -> Value {
    Value::from(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{CacheStats, MirrorStats, StandbyStats};
    use crate::testing::{some_ring, some_stats};

    #[test]
    fn the_storage_manager_finds_the_names_it_knows() {
        let expected = concat!(
            r#"{ "name": "vhd:/a \"b", "secs": [ 24, 8 ], "images": [ "#,
            r#"{ "name": "/a \"b", "hits": [ 8, 8 ], "fail": [ 0, 0 ], "driver": { "type": 4, "name": "vhd", "#,
            r#""status": { "reqs": { "max": 352, "pending": 2 } } } }, "#,
            r#"{ "name": "/p", "hits": [ 16, 0 ], "fail": [ 0, 0 ], "driver": { "type": 0, "name": "aio", "#,
            r#""status": { "reqs": { "max": 352, "pending": 0 } } } } ], "FIXME_enospc_redirect_count": 0, "#,
            r#""nbd_mirror_failed": 0, "reqs_outstanding": 2, "read_caching": "false" }"#,
        );
        assert_eq!(xenserver(&some_stats()), expected);
        serde_json::from_str::<Value>(expected).unwrap();
    }

    #[test]
    fn frontends_mirrors_and_caches_have_their_places() {
        let mut stats = some_stats();
        stats.rings = vec![RingStats { queues: 2, ..some_ring() }];
        stats.disk.mirror =
            Some(MirrorStats { copied: 1, total: 2, failed: Some("gone".into()), stuck_ms: None });
        stats.disk.cache = Some(CacheStats::default());
        let value: Value = serde_json::from_str(&xenserver(&stats)).unwrap();
        assert_eq!(value["xenbus"]["reqs"], json!([5, 3]));
        assert_eq!((&value["nbd_mirror_failed"], &value["read_caching"]), (&json!(1), &json!("true")));
        let image = "vhd:/s".parse().unwrap();
        stats.disk.standby = Some(StandbyStats { image, serving: true, written: 4096 });
        let value: Value = serde_json::from_str(&xenserver(&stats)).unwrap();
        assert_eq!(value["FIXME_enospc_redirect_count"], json!(8));
        let value: Value = serde_json::from_str(&full(&stats)).unwrap();
        assert_eq!(value["disk"]["mirror"]["failed"], json!("gone"));
        let read = &value["latency"]["read"];
        assert_eq!(
            (&read["count"], &read["mean_us"], &read["max_us"]),
            (&json!(3), &json!(1100), &json!(3000))
        );
        assert_eq!(read["buckets"], json!([[112, 1], [224, 1], [3072, 1]]));
        assert_eq!(value["latency"]["flush"]["p99_us"], Value::Null);
    }
}
