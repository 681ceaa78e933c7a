//! What several connections to an NBD server are worth. How many there are the server decides: by how many it takes, and by not
//! announcing that several are one.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use serde_json::{Map, Value, json};

use super::formats::Server;
use super::guest::{Load, Wait};
use super::{Bench, RAW, median};

/// Connections that a server allows.
const CONNECTIONS: [u8; 3] = [1, 2, 4];

/// The guest sleeps, so that the server has a processor as well.
const LOADS: [(&str, Load); 2] = [
    ("rr4k_qd32", Load { wait: Wait::Events, ..RAW }),
    ("rw4k_qd32", Load { write: true, wait: Wait::Events, ..RAW }),
];

/// A way to serve.
#[derive(Clone, Copy, Debug)]
struct Case {
    name: &'static str,
    nbdkit: bool,
    tcp: bool,
    /// For each request, on each of nbdkit's threads.
    delayed: bool,
}

const CASES: [Case; 4] = [
    Case { name: "qemu-nbd, unix", nbdkit: false, tcp: false, delayed: false },
    Case { name: "qemu-nbd, TCP", nbdkit: false, tcp: true, delayed: false },
    Case { name: "nbdkit, unix", nbdkit: true, tcp: false, delayed: false },
    Case { name: "nbdkit, unix, 1 ms away", nbdkit: true, tcp: false, delayed: true },
];

/// Compares. The disk is in memory, so that the way to it is what counts.
pub fn run(bench: &Bench<'_>) -> anyhow::Result<Value> {
    println!("{:32} {:>10} {:>14} {:>14} {:>14}", "nbd", "", "1 connection", "at most 2", "at most 4");
    let mut figures = Map::new();
    for case in &CASES {
        for (load_name, load) in &LOADS {
            let mut rounds = CONNECTIONS.map(|_| Vec::new());
            for _ in 0..bench.options.rounds {
                for (connections, round) in CONNECTIONS.iter().zip(&mut rounds) {
                    let folder = tempfile::tempdir_in("/dev/shm")?;
                    let (_server, image) = start(case, *connections, folder.path(), bench.capacity)?;
                    round.push(bench.ours(&image, load)?);
                }
            }
            let [one, two, four] = rounds.map(|round| median(&round).rate);
            println!("{:32} {load_name:>10} {one:14.0} {two:14.0} {four:14.0}", case.name);
            figures
                .insert(format!("{}, {load_name}", case.name), json!({"one": one, "two": two, "four": four}));
        }
    }
    Ok(Value::Object(figures))
}

/// Starts a server; the disk's name for a tapdisk comes with it.
fn start(case: &Case, connections: u8, folder: &Path, size: u64) -> anyhow::Result<(Server, String)> {
    let socket = folder.join("nbd");
    let port = if case.tcp { Some(free_port()?) } else { None };
    let mut command = if case.nbdkit {
        nbdkit(case, connections, &socket, size)
    } else {
        qemu_nbd(connections, &socket, port, folder, size)?
    };
    let child = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().context("cannot run a server")?;
    let (server, start) = (Server(child), Instant::now());
    let listens = || match port {
        Some(port) => std::net::TcpStream::connect(("127.0.0.1", port)).is_ok(),
        None => socket.exists(),
    };
    while !listens() {
        anyhow::ensure!(start.elapsed() < Duration::from_secs(10), "{} does not listen", case.name);
        std::thread::sleep(Duration::from_millis(10));
    }
    let place = port.map_or_else(|| format!("unix:{}", socket.display()), |port| format!("127.0.0.1:{port}"));
    Ok((server, format!("nbd:{place}")))
}

/// A port that was free a moment ago.
fn free_port() -> anyhow::Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn nbdkit(case: &Case, connections: u8, socket: &Path, size: u64) -> Command {
    let mut command = Command::new("nbdkit");
    command.arg("-f").arg("-U").arg(socket).args(["--filter=limit", "--filter=multi-conn"]);
    if case.delayed {
        command.arg("--filter=delay");
    }
    command.arg("memory").arg(size.to_string()).arg(format!("limit={connections}"));
    let mode = if connections == 1 { "disable" } else { "auto" };
    command.arg(format!("multi-conn-mode={mode}"));
    if case.delayed {
        command.args(["rdelay=1ms", "wdelay=1ms"]);
    }
    command
}

fn qemu_nbd(
    connections: u8,
    socket: &Path,
    port: Option<u16>,
    folder: &Path,
    size: u64,
) -> anyhow::Result<Command> {
    let image = folder.join("disk");
    std::fs::File::create(&image)?.set_len(size)?;
    let mut command = Command::new("qemu-nbd");
    command.args(["-t", "-f", "raw", "-e", &connections.to_string()]);
    match port {
        Some(port) => command.args(["-b", "127.0.0.1", "-p", &port.to_string()]),
        None => command.arg("-k").arg(socket),
    };
    command.arg(image);
    Ok(command)
}
