//! Against other people's servers, where they are installed.

use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::super::several;
use super::*;

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a server and waits until its socket is there. `None` if the program is not installed.
fn start(program: &str, arguments: &[&str], socket: &Path) -> Option<Server> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
    let mut server = match command.spawn() {
        Ok(child) => Server(child),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("{program} is not installed: nothing is tested");
            return None;
        }
        Err(error) => panic!("{program}: {error}"),
    };
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        assert!(server.0.try_wait().unwrap().is_none(), "{program} has ended");
        std::thread::yield_now();
    }
    Some(server)
}

fn exercise(bed: &Bed, spec: &str, sparse: bool) {
    let nbd = Rc::new(Nbd::open(spec, false, quick(), &bed.io).unwrap());
    assert_eq!(nbd.sectors(), 16384);
    load(bed, &nbd, 32, 8);
    bed.run();
    bed.spawn(async move |io| {
        let large = pattern(4096, 2048, 3);
        write(&nbd, &io, 4096, &large).await.unwrap();
        nbd.flush(&io).await.unwrap();
        nbd.discard(&io, Sector(8192), 1024).await.unwrap();
        assert_eq!(read(&nbd, &io, 4096, 2048).await.unwrap(), large);
        assert!(!nbd.allocation(&io, Sector(4096), 2048).await.unwrap().0);
        let (zero, count) = nbd.allocation(&io, Sector(12288), 4096).await.unwrap();
        assert!(count > 0 && (zero || !sparse));
    });
    bed.run();
}

#[test]
fn qemu_nbd_and_its_image_agree_with_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (dir.path().join("disk"), dir.path().join("socket"));
    std::fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let (image_text, socket_text) = (image.to_str().unwrap(), socket.to_str().unwrap());
    let arguments =
        ["-f", "raw", "-x", "disk", "-e", "4", "-t", "--discard=unmap", "-k", socket_text, image_text];
    let Some(_server) = start("qemu-nbd", &arguments, &socket) else { return };
    for engine in ENGINES {
        exercise(&Bed::new(engine), &format!("unix:{socket_text}:disk"), true);
        let bytes = std::fs::read(&image).unwrap();
        assert_eq!(bytes[4096 * 512..6144 * 512], pattern(4096, 2048, 3), "{engine}");
    }
    let bed = Bed::new(EngineChoice::Auto);
    let error = Nbd::open(&format!("unix:{socket_text}:other"), false, quick(), &bed.io).unwrap_err();
    assert!(error.to_string().contains("no such export"), "{error}");
}

#[test]
fn qemu_nbd_that_is_killed_and_started_again_goes_unnoticed() {
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (dir.path().join("disk"), dir.path().join("socket"));
    std::fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let (image_text, socket_text) = (image.to_str().unwrap(), socket.to_str().unwrap());
    let arguments = ["-f", "raw", "-t", "-k", socket_text, image_text];
    let Some(server) = start("qemu-nbd", &arguments, &socket) else { return };
    let bed = Bed::new(EngineChoice::Auto);
    let nbd = Rc::new(Nbd::open(socket_text, false, quick(), &bed.io).unwrap());
    load(&bed, &nbd, 8, 4);
    bed.run();
    drop(server);
    std::fs::remove_file(&socket).unwrap();
    load(&bed, &nbd, 8, 4);
    bed.executor.run_ready();
    let _again = start("qemu-nbd", &arguments, &socket);
    bed.run();
}

/// Passes connections on, and cuts each but the first after so many bytes for the server, all with what is under way.
fn cutting(path: &Path, server: PathBuf, bytes: u64) {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        for (number, client) in listener.incoming().map_while(Result::ok).enumerate() {
            let server = UnixStream::connect(&server).unwrap();
            let (from, to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut &from, &mut &to));
            std::thread::spawn(move || {
                let most = if number == 0 { u64::MAX } else { bytes * number as u64 };
                // Whoever ends it, it has ended.
                let _ = std::io::copy(&mut (&client).take(most), &mut &server);
                let _ = (client.shutdown(Shutdown::Both), server.shutdown(Shutdown::Both));
            });
        }
    });
}

#[test]
fn connections_to_qemu_nbd_that_are_cut_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (image, socket, cut) = (dir.path().join("disk"), dir.path().join("socket"), dir.path().join("cut"));
    std::fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let arguments = ["-f", "raw", "-e", "8", "-t", "-k", socket.to_str().unwrap(), image.to_str().unwrap()];
    let Some(_server) = start("qemu-nbd", &arguments, &socket) else { return };
    cutting(&cut, socket, 300_000);
    for engine in ENGINES {
        let bed = Bed::new(engine);
        let nbd = Rc::new(Nbd::open(cut.to_str().unwrap(), false, quick(), &bed.io).unwrap());
        while nbd.connections.len() < several::MOST {
            load(&bed, &nbd, 64, 4);
            bed.run();
        }
        load(&bed, &nbd, 64, 64);
        bed.run();
        bed.spawn(async move |io| nbd.flush(&io).await.unwrap());
        bed.run();
        let bytes = std::fs::read(&image).unwrap();
        for task in 0..64_u64 {
            let at = task as usize * 64 * 512;
            assert!(bytes[at..at + 512] == pattern(task * 64, 1, 63), "{engine}: task {task}");
        }
    }
}

#[test]
fn nbdkit_that_takes_one_client_only_serves_it() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let socket_text = socket.to_str().unwrap();
    let arguments = ["-f", "-U", socket_text, "--filter=limit", "memory", "8M", "limit=1"];
    let Some(_server) = start("nbdkit", &arguments, &socket) else { return };
    let bed = Bed::new(EngineChoice::Auto);
    let nbd = Rc::new(Nbd::open(socket_text, false, quick(), &bed.io).unwrap());
    load(&bed, &nbd, 64, 32);
    bed.run();
    assert_eq!(nbd.connections.len(), 1);
}

#[test]
fn nbdkit_answers_in_chunks_and_with_large_blocks() {
    let dir = tempfile::tempdir().unwrap();
    for (number, filters) in [&[][..], &["--filter=blocksize-policy"][..]].iter().enumerate() {
        let socket = dir.path().join(number.to_string());
        let socket_text = socket.to_str().unwrap();
        let mut arguments = vec!["-f", "-U", socket_text];
        arguments.extend_from_slice(filters);
        arguments.extend(["memory", "8M"]);
        if !filters.is_empty() {
            arguments.extend([
                "blocksize-minimum=4096",
                "blocksize-preferred=4096",
                "blocksize-maximum=64k",
                "blocksize-error-policy=error",
            ]);
        }
        let Some(_server) = start("nbdkit", &arguments, &socket) else { return };
        for engine in ENGINES {
            exercise(&Bed::new(engine), &format!("nbd+unix:///?socket={socket_text}"), false);
        }
    }
}
