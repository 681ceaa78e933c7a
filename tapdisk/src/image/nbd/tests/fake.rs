//! A server that misbehaves when it is told to.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use nbd::flags::TransmissionFlags;
use nbd::wire::{
    Command, Fixed, Greeting, InfoBlockSize, InfoExport, MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionCode,
    OptionHeader, OptionReply, OptionReplyHeader, Request, SIMPLE_MAGIC, Simple, info,
};
use zerocopy::IntoBytes;

/// What to do with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Carry it out and answer.
    Serve,
    /// Carry it out, then close the connection.
    ServeSilently,
    /// Close the connection.
    HangUp,
    /// Answer as if it were another request.
    WrongCookie,
    /// Answer with this error.
    Fail(u32),
    /// Half an answer, then close the connection.
    Torn,
    /// Say nothing.
    Ignore,
    /// Close all connections and lose what was not flushed, as by a crash.
    Crash,
}

/// What a test decides: the number of the connection, of the request on it, and the request.
pub type Script = Box<dyn FnMut(usize, usize, &Request) -> Act + Send>;

/// The disk, and what of it is durable.
#[derive(Debug, Default)]
pub struct Disk {
    pub now: Vec<u8>,
    pub durable: Vec<u8>,
    pub commands: Vec<(Command, u64, u32)>,
    /// How much was carried out for each connection.
    pub served: BTreeMap<usize, usize>,
    /// All there have been, but those that a crash has closed.
    connections: BTreeMap<usize, UnixStream>,
}

impl Disk {
    /// What was not flushed is lost.
    pub fn forget(&mut self) {
        self.now = self.durable.clone();
    }

    /// The same, and all connections end.
    fn crash(&mut self) {
        self.forget();
        for (_, stream) in std::mem::take(&mut self.connections) {
            // Its client may be faster.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// How a fake presents itself.
#[derive(Clone, Debug)]
pub struct Face {
    pub flags: TransmissionFlags,
    /// For each connection; the last one stays.
    pub sizes: Vec<u64>,
    pub minimum: u32,
    /// What was not flushed is lost with each connection.
    pub forgets: bool,
    /// Those behind so many are closed at once.
    pub most: usize,
}

impl Face {
    pub fn new(size: u64) -> Face {
        let flags = TransmissionFlags::HAS_FLAGS
            | TransmissionFlags::FLUSH
            | TransmissionFlags::FUA
            | TransmissionFlags::TRIM;
        Face { flags, sizes: vec![size], minimum: 512, forgets: false, most: usize::MAX }
    }

    /// One that promises that all its connections are one.
    pub fn several(size: u64) -> Face {
        let one = Face::new(size);
        Face { flags: one.flags | TransmissionFlags::MULTI_CONN, ..one }
    }
}

/// A server on a socket in a folder of its own; ends when it is dropped.
pub struct Fake {
    _dir: tempfile::TempDir,
    pub path: PathBuf,
    pub disk: Arc<Mutex<Disk>>,
    listener: Option<UnixListener>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Fake {
    pub fn start(face: Face, script: impl FnMut(usize, usize, &Request) -> Act + Send + 'static) -> Fake {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let bytes = vec![0; usize::try_from(face.sizes[0]).unwrap()];
        let disk = Disk { now: bytes.clone(), durable: bytes, ..Disk::default() };
        let disk = Arc::new(Mutex::new(disk));
        let (serving, shared) = (listener.try_clone().unwrap(), disk.clone());
        let thread = std::thread::spawn(move || serve(&serving, &face, Box::new(script), &shared));
        Fake { _dir: dir, path, disk, listener: Some(listener), thread: Some(thread) }
    }

    pub fn spec(&self) -> String {
        format!("unix:{}", self.path.display())
    }

    /// The server is gone; connecting fails from now on.
    pub fn remove(&mut self) {
        std::fs::remove_file(&self.path).unwrap();
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let (Some(listener), Some(thread)) = (self.listener.take(), self.thread.take()) {
            // Ends a waiting accept, and after it the thread.
            nix::sys::socket::shutdown(
                std::os::fd::AsRawFd::as_raw_fd(&listener),
                nix::sys::socket::Shutdown::Both,
            )
            .unwrap();
            drop(listener);
            if !std::thread::panicking() {
                thread.join().unwrap();
            }
        }
    }
}

/// Connections one after the other, or together if they are promised to be one.
fn serve(listener: &UnixListener, face: &Face, script: Script, disk: &Mutex<Disk>) {
    let script = Mutex::new(script);
    std::thread::scope(|scope| {
        for (connection, stream) in listener.incoming().map_while(Result::ok).enumerate() {
            if connection >= face.most {
                continue;
            }
            let size = *face.sizes.get(connection).or(face.sizes.last()).unwrap();
            let mut locked = disk.lock().unwrap();
            if face.forgets {
                locked.forget();
            }
            locked.connections.insert(connection, stream.try_clone().unwrap());
            drop(locked);
            let script = &script;
            let talk = move || {
                let act = |number, request: &_| (*script.lock().unwrap())(connection, number, request);
                // The client may go away at any moment.
                let _ =
                    handshake(&stream, face, size).and_then(|()| transmit(connection, &stream, disk, act));
                let _ = stream.shutdown(Shutdown::Both);
            };
            if face.flags.has(TransmissionFlags::MULTI_CONN) {
                scope.spawn(talk);
            } else {
                talk();
            }
        }
    });
}

fn handshake(mut stream: &UnixStream, face: &Face, size: u64) -> std::io::Result<()> {
    let hello = Greeting { magic: MAGIC.into(), option_magic: OPTION_MAGIC.into(), flags: 3.into() };
    stream.write_all(hello.as_bytes())?;
    stream.read_exact(&mut [0; 4])?;
    loop {
        let mut header = [0; 16];
        stream.read_exact(&mut header)?;
        let header = OptionHeader::take(&header).unwrap();
        let mut data = vec![0; header.len.get() as usize];
        stream.read_exact(&mut data)?;
        let mut reply = |kind: OptionReply, data: &[u8]| {
            let reply = OptionReplyHeader {
                magic: OPTION_REPLY_MAGIC.into(),
                option: header.option,
                kind: kind.number().into(),
                len: u32::try_from(data.len()).unwrap().into(),
            };
            stream.write_all(&[reply.as_bytes(), data].concat())
        };
        if header.option.get() != OptionCode::Go.number() {
            reply(OptionReply::Unsupported, &[])?;
            continue;
        }
        let export = InfoExport { kind: info::EXPORT.into(), size: size.into(), flags: face.flags.0.into() };
        let blocks = InfoBlockSize {
            kind: info::BLOCK_SIZE.into(),
            minimum: face.minimum.into(),
            preferred: 4096.max(face.minimum).into(),
            maximum: (1 << 20).into(),
        };
        reply(OptionReply::Info, export.as_bytes())?;
        reply(OptionReply::Info, blocks.as_bytes())?;
        return reply(OptionReply::Ack, &[]);
    }
}

/// `NBD_ESHUTDOWN`.
pub const SHUTDOWN: u32 = 108;

fn transmit(
    connection: usize,
    mut stream: &UnixStream,
    disk: &Mutex<Disk>,
    mut act: impl FnMut(usize, &Request) -> Act,
) -> std::io::Result<()> {
    for number in 0.. {
        let mut header = [0; 28];
        stream.read_exact(&mut header)?;
        let request = Request::take(&header).unwrap();
        let command = Command::from_number(request.command.get()).unwrap();
        let (offset, len) = (usize::try_from(request.offset.get()).unwrap(), request.len.get() as usize);
        let mut payload = vec![0; if command == Command::Write { len } else { 0 }];
        stream.read_exact(&mut payload)?;
        let act = act(number, &request);
        let mut disk = disk.lock().unwrap();
        if act == Act::Crash {
            disk.crash();
        }
        if !disk.connections.contains_key(&connection) {
            return Ok(());
        }
        if matches!(act, Act::Serve | Act::ServeSilently) {
            if command != Command::Disconnect {
                *disk.served.entry(connection).or_default() += 1;
            }
            disk.commands.push((command, request.offset.get(), request.len.get()));
            match command {
                Command::Write => disk.now[offset..offset + len].copy_from_slice(&payload),
                Command::Flush => disk.durable = disk.now.clone(),
                Command::Read => payload = disk.now[offset..offset + len].to_vec(),
                Command::Disconnect => return Ok(()),
                _ => {}
            }
        }
        drop(disk);
        let (error, cookie) = match act {
            Act::Fail(error) => (error, request.cookie.get()),
            Act::WrongCookie => (0, request.cookie.get() ^ 1),
            _ => (0, request.cookie.get()),
        };
        let reply = Simple { magic: SIMPLE_MAGIC.into(), error: error.into(), cookie: cookie.into() };
        let mut bytes = reply.as_bytes().to_vec();
        if command == Command::Read && error == 0 {
            bytes.extend_from_slice(&payload);
        }
        match act {
            Act::HangUp | Act::ServeSilently => return Ok(()),
            Act::Ignore => {}
            // One that is shutting down carries out nothing more that has come on the connection.
            Act::Fail(SHUTDOWN) => return stream.write_all(&bytes),
            Act::Torn => return stream.write_all(&bytes[..bytes.len() / 2]),
            _ => stream.write_all(&bytes)?,
        }
    }
    Ok(())
}
