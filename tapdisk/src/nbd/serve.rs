//! Serving clients, on the disk's thread.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::{Rc, Weak};

use blkif::Sector;
use nbd::ErrorCode;
use nbd::server::{Agreed, CONTEXT, Job, Offer, chunk_header, error_reply, judge, simple_header};
use nbd::wire::{Extent, Request, chunk, extent};
use nix::errno::Errno;
use zerocopy::IntoBytes;

use super::Client;
use super::stream::{Gone, Stream};
use crate::buf::{Buf, MAX_DATA, Pool};
use crate::flight::{Operation, What};
use crate::image::{Disk, Holds};
use crate::io::Io;

/// Connections of a disk at the same time: enough for 16 disks on it, each with the four that it uses.
const MAX_CLIENTS: usize = 64;

/// Requests of a client in flight.
const DEPTH: usize = 16;

/// Memory of a client for data, in bytes: some of the largest parts in which requests are moved.
const MEMORY: usize = 6 * MAX_DATA;

/// Extents of one reply at most.
const MAX_EXTENTS: usize = 512;

/// Where a disk comes from for each request: while it is paused, it has to be waited for.
pub trait Source {
    /// Keeps the disk from being taken away.
    type Held: std::ops::Deref<Target = Disk>;

    /// The disk for a request, as soon as it is there; `None` if there will be none.
    fn hold(&self, what: What) -> impl Future<Output = Option<Self::Held>>;
}

/// The clients of a disk.
#[derive(Debug, Default)]
pub struct Clients {
    streams: RefCell<Vec<Weak<Stream>>>,
    stopped: Cell<bool>,
}

impl Clients {
    /// Takes a client in; what is to be run for it, or nothing if there is no room.
    pub fn enter<S: Source + 'static>(
        &self,
        Client { socket, offer, agreed }: Client,
        source: Rc<S>,
        io: &Io,
    ) -> Vec<impl Future<Output = ()> + 'static> {
        let mut streams = self.streams.borrow_mut();
        streams.retain(|stream| stream.strong_count() > 0);
        if self.stopped.get() || streams.len() >= MAX_CLIENTS {
            log::warn!("an NBD client is sent away: the disk has {} already, or is closed", streams.len());
            return Vec::new();
        }
        // Apart from the rings': a client that takes no replies keeps what it has.
        let pool = Pool::new(io.scheduler.clone(), MEMORY).ok();
        let stream = pool.as_ref().and_then(|pool| Stream::new(socket, io, pool));
        let (Some(pool), Some(stream)) = (pool, stream) else {
            log::warn!("an NBD client is sent away: no memory");
            return Vec::new();
        };
        let stream = Rc::new(stream);
        streams.push(Rc::downgrade(&stream));
        let served = Rc::new(Served { stream, pool, offer, agreed, source });
        (0..DEPTH).map(|_| serve(served.clone())).collect()
    }

    /// Whether they were sent away.
    pub fn is_stopped(&self) -> bool {
        self.stopped.get()
    }

    /// Sends all clients away. Requests that have begun are carried out.
    pub fn stop(&self) {
        self.stopped.set(true);
        for stream in self.streams.take() {
            if let Some(stream) = stream.upgrade() {
                stream.close();
            }
        }
    }
}

/// A client being served.
struct Served<S> {
    stream: Rc<Stream>,
    pool: Rc<Pool>,
    offer: Offer,
    agreed: Agreed,
    source: Rc<S>,
}

/// One of a client's tasks: takes a request, carries it out, answers, until the client is gone.
async fn serve<S: Source>(served: Rc<Served<S>>) {
    while !served.stream.is_gone() && served.next().await == Ok(()) {}
}

/// What is left to do for a request when its payload was taken.
enum Task {
    Do(Job),
    /// A write whose data is in memory.
    Write {
        offset: u64,
        fua: bool,
        data: Buf,
    },
    /// It was carried out.
    Answer(Result<(), ErrorCode>),
}

impl<S: Source> Served<S> {
    async fn next(&self) -> Result<(), Gone> {
        let (request, task) = {
            let _reading = self.stream.reading.take().await;
            if self.stream.is_gone() {
                return Err(Gone);
            }
            let bytes: [u8; size_of::<Request>()] = self.stream.take().await?;
            let request: Request = zerocopy::transmute!(bytes);
            let task = self.take_payload(&request).await?;
            (request, task)
        };
        let cookie = request.cookie.get();
        match task {
            // What is in flight is carried out; nobody waits for its replies.
            Task::Do(Job::Disconnect) => Err(self.stream.close()),
            Task::Do(Job::Read { offset, len, whole }) => self.read(cookie, offset, len, whole).await,
            Task::Do(Job::Status { offset, len, one }) => self.status(cookie, offset, len, one).await,
            Task::Do(job) => {
                let done = self.carry_out(job).await;
                self.answer(cookie, done).await
            }
            Task::Write { offset, fua, data } => {
                let done = self.write(offset, fua, &data).await;
                drop(data);
                self.answer(cookie, done).await
            }
            Task::Answer(done) => self.answer(cookie, done).await,
        }
    }

    /// Takes what belongs to a request out of the stream.
    async fn take_payload(&self, request: &Request) -> Result<Task, Gone> {
        let judged = judge(request, &self.offer, self.agreed).ok_or_else(|| self.stream.close())?;
        let payload = judged.payload as usize;
        match judged.job {
            Ok(Job::Write { offset, fua, .. }) if payload <= MAX_DATA => {
                let data = self.memory(payload).await?;
                self.stream.take_into(&data).await?;
                Ok(Task::Write { offset, fua, data })
            }
            Ok(Job::Write { offset, fua, .. }) => {
                self.write_long(offset, payload, fua).await.map(Task::Answer)
            }
            job => {
                self.stream.skip(payload).await?;
                Ok(job.map_or_else(|error| Task::Answer(Err(error)), Task::Do))
            }
        }
    }

    async fn memory(&self, len: usize) -> Result<Buf, Gone> {
        self.pool.data_soon(len).await.ok_or_else(|| self.stream.close())
    }

    /// The disk, for an operation on `len` bytes from `offset` on.
    async fn disk(&self, operation: Operation, offset: u64, len: u64) -> Result<S::Held, ErrorCode> {
        let what = What { operation, sector: offset / 512, sectors: len / 512 };
        self.source.hold(what).await.ok_or(ErrorCode::Shutdown)
    }

    async fn write(&self, offset: u64, fua: bool, data: &Buf) -> Result<(), ErrorCode> {
        let disk = self.disk(Operation::Write, offset, data.len() as u64).await?;
        disk.write(Sector(offset / 512), data).await.map_err(code)?;
        if fua { disk.flush().await.map_err(code) } else { Ok(()) }
    }

    /// A write that is too long for one piece of memory: part by part, while the client sends it.
    async fn write_long(&self, offset: u64, len: usize, fua: bool) -> Result<Result<(), ErrorCode>, Gone> {
        let mut done = Ok(());
        let (mut at, mut left) = (offset, len);
        while left > 0 && done.is_ok() {
            let data = self.memory(left.min(MAX_DATA)).await?;
            self.stream.take_into(&data).await?;
            left -= data.len();
            done = self.write(at, fua && left == 0, &data).await;
            at += data.len() as u64;
        }
        self.stream.skip(left).await?;
        Ok(done)
    }

    /// Reads and answers.
    async fn read(&self, cookie: u64, offset: u64, len: u32, whole: bool) -> Result<(), Gone> {
        let chunked = self.agreed.structured;
        let total = len as usize;
        let first = self.read_part(offset, total.min(MAX_DATA)).await?;
        let mut part = match first {
            Ok(part) => part,
            Err(error) => return self.reply(&error_reply(cookie, error, chunked)).await,
        };
        let writing = self.stream.writing.take().await;
        let in_one = whole || total <= MAX_DATA;
        if !chunked {
            self.stream.put(&simple_header(cookie, None)).await?;
        } else if in_one {
            self.stream.put(&chunk_header(cookie, chunk::DATA, true, &offset.to_be_bytes(), len)).await?;
        }
        let mut at = 0;
        loop {
            let end = at + part.len();
            if chunked && !in_one {
                let more = u32::try_from(part.len()).unwrap_or(u32::MAX);
                let here = (offset + at as u64).to_be_bytes();
                let header = chunk_header(cookie, chunk::DATA, end == total, &here, more);
                self.stream.put(&header).await?;
            }
            self.stream.put_buf(&part, 0..part.len()).await?;
            drop(part);
            at = end;
            if at == total {
                break;
            }
            part = match self.read_part(offset + at as u64, (total - at).min(MAX_DATA)).await? {
                Ok(part) => part,
                Err(error) if chunked && !in_one => {
                    self.stream.put(&error_reply(cookie, error, true)).await?;
                    break;
                }
                // What was promised can neither be sent nor taken back.
                Err(_) => return Err(self.stream.close()),
            };
        }
        self.stream.end_of_reply().await?;
        drop(writing);
        Ok(())
    }

    async fn read_part(&self, offset: u64, len: usize) -> Result<Result<Buf, ErrorCode>, Gone> {
        let part = self.memory(len).await?;
        let disk = match self.disk(Operation::Read, offset, len as u64).await {
            Ok(disk) => disk,
            Err(error) => return Ok(Err(error)),
        };
        let done = disk.read(Sector(offset / 512), &part).await;
        Ok(done.map(|()| part).map_err(code))
    }

    /// Carries out a job without payload and without more of an answer than an error.
    async fn carry_out(&self, job: Job) -> Result<(), ErrorCode> {
        let (operation, offset, len) = match job {
            Job::Trim { offset, len, .. } | Job::Zero { offset, len, .. } => {
                (Operation::Discard, offset, len)
            }
            _ => (Operation::Flush, 0, 0),
        };
        let disk = self.disk(operation, offset, len.into()).await?;
        let flushed = match job {
            Job::Flush => true,
            Job::Trim { offset, len, fua } => {
                match disk.discard(Sector(offset / 512), u64::from(len) / 512, false).await {
                    // Nothing must be given up.
                    Ok(()) | Err(Errno::EOPNOTSUPP) => fua,
                    Err(errno) => return Err(code(errno)),
                }
            }
            Job::Zero { offset, len, fua, provision } => {
                self.zero(&disk, offset, len, provision).await?;
                fua
            }
            _ => false,
        };
        if flushed { disk.flush().await.map_err(code) } else { Ok(()) }
    }

    /// Writes zeros. Where there are some already, nothing is to be done, unless they are to take room.
    async fn zero(&self, disk: &Disk, offset: u64, len: u32, provision: bool) -> Result<(), ErrorCode> {
        let mut zeros = None;
        let (mut sector, end) = (offset / 512, (offset + u64::from(len)) / 512);
        while sector < end {
            let most = u32::try_from(end - sector).unwrap_or(u32::MAX);
            let run = disk.survey(Sector(sector), most).await.map_err(code)?;
            if provision || matches!(run.holds, Holds::Data { .. }) {
                let bytes = (run.count as usize).saturating_mul(512).min(MAX_DATA);
                let buf = match zeros.take().filter(|buf: &Buf| buf.len() == bytes) {
                    Some(buf) => buf,
                    None => {
                        let buf = self.pool.data_soon(bytes).await.ok_or(ErrorCode::NoMem)?;
                        buf.zero(0..bytes);
                        buf
                    }
                };
                disk.write(Sector(sector), &buf).await.map_err(code)?;
                sector += bytes as u64 / 512;
                zeros = Some(buf);
            } else {
                sector += u64::from(run.count.max(1));
            }
        }
        Ok(())
    }

    /// Tells what is allocated.
    async fn status(&self, cookie: u64, offset: u64, len: u32, one: bool) -> Result<(), Gone> {
        let answer = match self.extents(offset, len, one).await {
            Ok(extents) => {
                let mut content = CONTEXT.to_be_bytes().to_vec();
                extents.iter().for_each(|extent| content.extend_from_slice(extent.as_bytes()));
                chunk_header(cookie, chunk::BLOCK_STATUS, true, &content, 0)
            }
            Err(error) => error_reply(cookie, error, true),
        };
        self.reply(&answer).await
    }

    async fn extents(&self, offset: u64, len: u32, one: bool) -> Result<Vec<Extent>, ErrorCode> {
        let disk = self.disk(Operation::Survey, offset, len.into()).await?;
        let mut extents: Vec<(u32, u32)> = Vec::new();
        let (mut sector, end) = (offset / 512, (offset + u64::from(len)) / 512);
        while sector < end {
            let most = u32::try_from(end - sector).unwrap_or(u32::MAX);
            let run = disk.survey(Sector(sector), most).await.map_err(code)?;
            let flags = match run.holds {
                Holds::Data { .. } => 0,
                Holds::Zeros | Holds::Nothing => extent::HOLE | extent::ZERO,
            };
            let count = run.count.max(1);
            match extents.last() {
                Some((_, last)) if *last == flags => {}
                Some(_) if one || extents.len() >= MAX_EXTENTS => break,
                _ => extents.push((0, flags)),
            }
            if let Some((bytes, _)) = extents.last_mut() {
                *bytes += count * 512;
            }
            sector += u64::from(count);
        }
        Ok(extents.into_iter().map(|(len, flags)| Extent { len: len.into(), flags: flags.into() }).collect())
    }

    async fn answer(&self, cookie: u64, done: Result<(), ErrorCode>) -> Result<(), Gone> {
        self.reply(&simple_header(cookie, done.err())).await
    }

    async fn reply(&self, bytes: &[u8]) -> Result<(), Gone> {
        let _writing = self.stream.writing.take().await;
        self.stream.put(bytes).await?;
        self.stream.end_of_reply().await
    }
}

fn code(errno: Errno) -> ErrorCode {
    ErrorCode::from_errno(errno as i32)
}
