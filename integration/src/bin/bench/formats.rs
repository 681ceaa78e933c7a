//! What formats cost: against raw on the same disk, along a chain, while an image grows, against qemu-nbd, and on NBD servers.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::{Map, Value, json};
use vhd::{DiskType, NewImage, NewParent, Uuid};

use super::guest::Load;
use super::machine::Cpus;
use super::{Bench, Measured, RAW, median};

const READ: Load = RAW;
const WRITE: Load = Load { write: true, ..RAW };
/// Allocates an image.
const FILL: Load = Load { write: true, random: false, block: 1 << 20, depth: 4, ..RAW };
/// Images of the chain, the leaf included.
const DEPTH: u8 = 30;

/// An image that is removed in the end.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // Left behind it takes room, and that is all.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Compares; the images lie beside `file`, a raw one of the bench's capacity.
pub fn run(bench: &Bench<'_>, file: &Path) -> anyhow::Result<()> {
    let folder = file.parent().context("the image's folder")?;
    let wanted = |name: &str| name.contains(&bench.options.only);
    let mut figures = Map::new();
    if wanted("allocated") {
        figures.insert("allocated".into(), allocated(bench, file, folder)?);
    }
    if wanted("chain") {
        figures.insert("chain".into(), chain(bench, folder)?);
    }
    if wanted("growing") {
        figures.insert("growing".into(), growing(bench, folder)?);
    }
    if wanted("nbd") {
        figures.insert("nbd".into(), super::nbd::run(bench)?);
    }
    let figures = Value::Object(figures);
    std::fs::write(&bench.options.json, format!("{figures:#}\n"))
        .with_context(|| format!("cannot write {}", bench.options.json.display()))
}

/// Fully allocated images against raw.
fn allocated(bench: &Bench<'_>, file: &Path, folder: &Path) -> anyhow::Result<Value> {
    let images = [("vhd", folder.join("bench.vhd")), ("qcow2", folder.join("bench.qcow2"))];
    for (format, path) in &images {
        create(format, path, bench.capacity)?;
        bench.fill(&format!("{format}:{}", path.display()))?;
    }
    let images = images.map(|(format, path)| (format, Scratch(path)));
    println!(
        "{:32} {:>12} {:>12} {:>12} {:>12} {:>12}",
        "allocated", "raw", "vhd", "ratio", "qcow2", "ratio"
    );
    let mut figures = Map::new();
    for (name, load) in [("rr4k_qd32", READ), ("rw4k_qd32", WRITE)] {
        let mut rounds = [Vec::new(), Vec::new(), Vec::new()];
        for _ in 0..bench.options.rounds {
            rounds[0].push(bench.ours(&format!("aio:{}", file.display()), &load)?);
            for ((format, path), round) in images.iter().zip(&mut rounds[1..]) {
                round.push(bench.ours(&format!("{format}:{}", path.0.display()), &load)?);
            }
        }
        let [raw, vhd, qcow2] = rounds.map(|rounds| median(&rounds).rate);
        println!("{name:32} {raw:12.0} {vhd:12.0} {:12.3} {qcow2:12.0} {:12.3}", vhd / raw, qcow2 / raw);
        figures.insert(name.into(), json!({"raw": raw, "vhd": vhd, "qcow2": qcow2}));
    }
    Ok(Value::Object(figures))
}

/// Reads through a chain whose data is all in the image at its end, against that image alone.
fn chain(bench: &Bench<'_>, folder: &Path) -> anyhow::Result<Value> {
    let base = folder.join("bench-1.vhd");
    create("vhd", &base, bench.capacity)?;
    bench.fill(&format!("vhd:{}", base.display()))?;
    let mut files = vec![Scratch(base)];
    for number in 2..=DEPTH {
        let name = format!("bench-{}.vhd", number - 1);
        let parent = NewParent { uuid: uuid(number - 1), timestamp: 0, path: format!("./{name}"), name };
        let path = folder.join(format!("bench-{number}.vhd"));
        create_vhd(&path, bench.capacity, number, Some(parent))?;
        files.push(Scratch(path));
    }
    let spec =
        |file: Option<&Scratch>| file.map_or(String::new(), |file| format!("vhd:{}", file.0.display()));
    let (mut alone, mut deep) = (Vec::new(), Vec::new());
    for _ in 0..bench.options.rounds {
        alone.push(bench.ours(&spec(files.first()), &READ)?);
        deep.push(bench.ours(&spec(files.last()), &READ)?);
    }
    let (alone, deep) = (median(&alone).rate, median(&deep).rate);
    println!("{:32} {:>12} {:>12} {:>12}", "chain", "1 image", "30 images", "ratio");
    println!("{:32} {alone:12.0} {deep:12.0} {:12.3}", "rr4k_qd32", deep / alone);
    Ok(json!({"depth_1": alone, "depth_30": deep}))
}

/// Random writes to images without any data, against qemu-nbd and fio's nbd engine.
fn growing(bench: &Bench<'_>, folder: &Path) -> anyhow::Result<Value> {
    println!("{:32} {:>12} {:>12} {:>12}", "growing, rw4k_qd32", "ours", "qemu-nbd", "ratio");
    let mut figures = Map::new();
    for (format, theirs) in [("vhd", "vpc"), ("qcow2", "qcow2")] {
        let (mut ours, mut peers) = (Vec::new(), Vec::new());
        for _ in 0..bench.options.rounds {
            let image = Scratch(folder.join(format!("bench-growing.{format}")));
            create(format, &image.0, bench.capacity)?;
            ours.push(bench.ours(&format!("{format}:{}", image.0.display()), &WRITE)?);
            let image = Scratch(folder.join(format!("bench-peer.{format}")));
            qemu_img(theirs, &image.0, bench.capacity)?;
            peers.push(qemu_nbd(&bench.cpus, theirs, &image.0, bench.options.time)?);
        }
        let (ours, peer) = (median(&ours).rate, median(&peers).rate);
        println!("{format:32} {ours:12.0} {peer:12.0} {:12.3}", ours / peer);
        figures.insert(format.into(), json!({"ours": ours, "qemu_nbd": peer}));
    }
    Ok(Value::Object(figures))
}

fn create(format: &str, path: &Path, size: u64) -> anyhow::Result<()> {
    // A leftover would count as there.
    let _ = std::fs::remove_file(path);
    match format {
        "vhd" => create_vhd(path, size, 1, None),
        other => qemu_img(other, path, size),
    }
}

fn uuid(number: u8) -> Uuid {
    Uuid([number; 16])
}

fn create_vhd(path: &Path, size: u64, number: u8, parent: Option<NewParent>) -> anyhow::Result<()> {
    let kind = if parent.is_some() { DiskType::Differencing } else { DiskType::Dynamic };
    let image = NewImage {
        kind,
        size,
        max_size: 0,
        block_size: vhd::header::DEFAULT_BLOCK_SIZE,
        uuid: uuid(number),
        timestamp: 0,
        parent,
        key: None,
    };
    let bytes = image.build(None)?;
    let file = std::fs::File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    file.set_len(bytes.len)?;
    for write in bytes.writes {
        std::os::unix::fs::FileExt::write_all_at(&file, &write.bytes, write.offset)?;
    }
    Ok(())
}

fn qemu_img(format: &str, path: &Path, size: u64) -> anyhow::Result<()> {
    let status = Command::new("qemu-img")
        .args(["create", "-q", "-f", format])
        .arg(path)
        .arg(size.to_string())
        .status()
        .context("cannot run qemu-img")?;
    anyhow::ensure!(status.success(), "qemu-img does not create {}", path.display());
    Ok(())
}

/// A server that ends with us.
pub struct Server(pub Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What fio gets from qemu-nbd, with the same durability: past the page cache.
fn qemu_nbd(cpus: &Cpus, format: &str, image: &Path, time: Duration) -> anyhow::Result<Measured> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("nbd");
    let server = cpus
        .command("qemu-nbd")
        .args(["--cache=none", "--persistent", "-f", format, "-k"])
        .arg(&socket)
        .arg(image)
        .stdin(Stdio::null())
        .spawn()
        .context("cannot run qemu-nbd")?;
    let server = Server(server);
    cpus.pin_backend(i32::try_from(server.0.id())?)?;
    let start = Instant::now();
    while !socket.exists() {
        anyhow::ensure!(start.elapsed() < Duration::from_secs(10), "qemu-nbd does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    // On the guest's CPU, as this thread is.
    let output = Command::new("fio")
        .args(["--name=peer", "--ioengine=nbd", "--rw=randwrite", "--bs=4096", "--iodepth=32"])
        .args(["--time_based", "--norandommap", "--randrepeat=0", "--output-format=json"])
        .arg(format!("--uri=nbd+unix:///?socket={}", socket.display()))
        .arg(format!("--runtime={}", time.as_secs().max(1)))
        .output()
        .context("cannot run fio")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let json = text.find('{').and_then(|start| text.get(start..)).unwrap_or_default();
    let value: Value =
        serde_json::from_str(json).with_context(|| format!("fio does not answer in JSON: {text}"))?;
    let rate = value["jobs"][0]["write"]["iops"].as_f64().context("fio did no I/O")?;
    Ok(Measured { rate, cpu: f64::NAN })
}

impl Bench<'_> {
    /// Writes all of an image once.
    fn fill(&self, image: &str) -> anyhow::Result<()> {
        let (rig, device, mut guest) = self.scene(image, &FILL)?;
        let mut left = self.capacity / FILL.block as u64;
        while left > 0 {
            let outcome = guest.run(Duration::from_secs(1))?;
            left = left.saturating_sub(outcome.requests);
        }
        rig.destroy(&device);
        Ok(())
    }
}
