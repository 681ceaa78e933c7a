use std::collections::{HashMap, HashSet};
use std::time::Instant;

use super::*;
use crate::proto::{CacheStats, Minor, StoreOperation};
use crate::testing::{some_ring, some_stats};

fn survey() -> Survey {
    let disk = |pid, path: &str| {
        let mut stats = some_stats();
        stats.image = path.parse().unwrap();
        stats.rings = vec![some_ring()];
        stats.late = 4;
        stats.oldest_ms = Some(12_500);
        stats.store = Some(StoreOperation {
            age_ms: 12_250,
            operation: "read".to_owned(),
            offset: 0,
            bytes: 4096,
            file: path.to_owned(),
        });
        if pid == 4711 {
            let failed = Some("no space".to_owned());
            stats.disk.mirror = Some(MirrorStats { copied: 512, total: 1024, failed, stuck_ms: Some(30) });
        }
        stats.disk.cache = Some(CacheStats { hits: 9, misses: 1, bytes: 4096, limit: 8192 });
        Disk { pid, minor: Minor(3), stats }
    };
    let disks = vec![disk(4711, "vhd:/srv/a \"b\"\\\n.vhd"), disk(4712, "aio:/b")];
    Survey { taken: Instant::now(), disks, problems: Vec::new() }
}

/// What Prometheus's `expfmt` parser and `promtool check metrics` ask of a text: HELP and TYPE once and before the samples,
/// samples of a family together and once each, names and labels well formed, buckets that grow up to `+Inf`, which is `_count`.
fn check(text: &str) -> HashMap<String, f64> {
    assert!(text.ends_with('\n'));
    let mut types: HashMap<&str, &str> = HashMap::new();
    let (mut current, mut samples) = ("", HashMap::new());
    let mut buckets: HashMap<String, (f64, f64)> = HashMap::new();
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let (what, name, rest) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
            match what {
                "HELP" => {
                    assert!(!types.contains_key(name), "{name} comes twice");
                    assert!(rest.ends_with('.'), "{line}");
                    current = name;
                }
                "TYPE" => {
                    assert_eq!(current, name);
                    assert!(["counter", "gauge", "histogram"].contains(&rest), "{line}");
                    // What promtool's linter says of names.
                    assert_eq!(rest == "counter", name.ends_with("_total"), "{line}");
                    types.insert(name, rest);
                }
                _ => panic!("{line}"),
            }
            continue;
        }
        let (key, value) = line.rsplit_once(' ').unwrap();
        let value: f64 = value.parse().unwrap();
        let (name, labels) = key.split_once('{').unwrap_or((key, "}"));
        let kind = types[current];
        let family = match kind {
            "histogram" => {
                ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap()
            }
            _ => name,
        };
        assert_eq!(family, current, "{line}");
        assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{line}");
        check_labels(labels.strip_suffix('}').unwrap());
        assert!(samples.insert(key.to_owned(), value).is_none(), "{line} comes twice");
        if let Some((series, le)) = labels.strip_suffix("\"}").and_then(|labels| labels.rsplit_once(",le=\""))
        {
            let le = if le == "+Inf" { f64::INFINITY } else { le.parse().unwrap() };
            let (end, count) = buckets.insert(series.to_owned(), (le, value)).unwrap_or((0.0, 0.0));
            assert!(le > end && value >= count, "{line}");
        }
    }
    for (series, (le, count)) in buckets {
        assert_eq!(le, f64::INFINITY);
        assert_eq!(samples[&format!("xenio_disk_request_duration_seconds_count{{{series}}}")], count);
    }
    samples
}

fn check_labels(mut labels: &str) {
    let mut seen = HashSet::new();
    while let Some((name, rest)) = labels.split_once("=\"") {
        assert!(seen.insert(name.trim_start_matches(',')), "{labels}");
        let mut escaped = false;
        let end = rest.find(|c| {
            let ends = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        });
        labels = &rest[end.unwrap() + 1..];
        assert!(labels.is_empty() || labels.starts_with(','), "{labels}");
    }
    assert_eq!(labels, "");
}

#[test]
fn the_text_is_what_prometheus_reads() {
    let samples = check(&text(&survey()));
    let disk = r#"pid="4711",minor="3""#;
    let value = |name: &str, more: &str| samples[&format!("{name}{{{disk}{more}}}")];
    assert_eq!(value("xenio_disk_requests_total", r#",operation="read""#), 3.0);
    assert_eq!(value("xenio_disk_bytes_total", r#",operation="read""#), 24.0 * 512.0);
    assert_eq!(value("xenio_disk_cache_sectors_total", r#",result="hit""#), 9.0);
    assert_eq!(value("xenio_disk_late_requests", ""), 4.0);
    assert_eq!(value("xenio_disk_oldest_request_seconds", ""), 12.5);
    assert_eq!(value("xenio_disk_oldest_store_operation_seconds", ""), 12.25);
    assert_eq!(value("xenio_disk_mirror_failed", ""), 1.0);
    assert_eq!(value("xenio_disk_mirror_copied_bytes", ""), 512.0);
    assert_eq!(value("xenio_disk_mirror_stuck_seconds", ""), 0.03);
    assert!(!samples.contains_key(r#"xenio_disk_mirror_failed{pid="4712",minor="3"}"#), "it has no mirror");
    let latency = "xenio_disk_request_duration_seconds";
    // 100, 200 and 3000 µs.
    for (le, count) in
        [("0.000064", 0.0), ("0.000128", 1.0), ("0.000256", 2.0), ("0.004096", 3.0), ("+Inf", 3.0)]
    {
        let more = format!(r#",operation="read",le="{le}""#);
        assert_eq!(value(&format!("{latency}_bucket"), &more), count, "{le}");
    }
    assert_eq!(value(&format!("{latency}_sum"), r#",operation="read""#), 0.0033);
    let labels = r#",type="vhd",path="/srv/a \"b\"\\\n.vhd""#;
    assert_eq!(value("xenio_disk_info", labels), 1.0);
    assert_eq!(samples[r#"xenio_frontend_requests_total{pid="4711",minor="3",domid="7",vdev="51712"}"#], 5.0);
}

#[test]
fn without_disks_there_is_a_text_all_the_same() {
    let empty = Survey { disks: Vec::new(), ..survey() };
    let samples = check(&text(&empty));
    assert_eq!(samples, HashMap::from([("xenio_scrape_problems".to_owned(), 0.0)]));
}

#[test]
fn promtool_agrees() {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let started = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut promtool) = started else {
        eprintln!("not checked: there is no promtool here");
        return;
    };
    promtool.stdin.take().unwrap().write_all(text(&survey()).as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}

#[test]
fn times_are_told_in_seconds_without_rounding() {
    for (micros, text) in [
        (0, "0"),
        (16, "0.000016"),
        (1_000_000, "1"),
        (16_777_216, "16.777216"),
        (u64::MAX, "18446744073709.551615"),
    ] {
        assert_eq!(seconds(micros), text);
    }
}
