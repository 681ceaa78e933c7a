//! fio, doing the same to the same file.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;

use super::Measured;
use super::guest::Load;
use super::machine::Cpus;

/// What fio gets with io_uring and O_DIRECT.
pub fn fio(cpus: &Cpus, file: &Path, load: &Load, time: Duration) -> anyhow::Result<Measured> {
    let direction = if load.write { "write" } else { "read" };
    let kind = if load.random { format!("rand{direction}") } else { direction.to_owned() };
    let output = cpus
        .command("fio")
        .args(["--name=peer", "--ioengine=io_uring", "--direct=1", "--time_based", "--norandommap"])
        .args(["--randrepeat=0", "--output-format=json"])
        .arg(format!("--filename={}", file.display()))
        .arg(format!("--rw={kind}"))
        .arg(format!("--bs={}", load.block))
        .arg(format!("--iodepth={}", load.depth))
        .arg(format!("--runtime={}", time.as_secs().max(1)))
        .output()
        .context("cannot run fio")?;
    let text = String::from_utf8_lossy(&output.stdout);
    // A warning may stand before the JSON.
    let json = text.find('{').and_then(|start| text.get(start..)).unwrap_or_default();
    let value: serde_json::Value = serde_json::from_str(json).with_context(|| {
        format!("fio does not answer in JSON: {text}{}", String::from_utf8_lossy(&output.stderr))
    })?;
    let job = &value["jobs"][0];
    let number = |value: &serde_json::Value| value.as_f64().filter(|number| *number > 0.0);
    let rate = number(&job[direction]["iops"]).context("fio did no I/O")?;
    // Percent of the time that it ran.
    let busy = number(&job["usr_cpu"]).unwrap_or(0.0) + number(&job["sys_cpu"]).unwrap_or(0.0);
    Ok(Measured { rate, cpu: busy * 1e4 / rate })
}
