//! What the qcow tools of Xen's blktap share: `qcow-create`, `img2qcow` and `qcow2raw`.
//!
//! Their command lines and usage texts are those of Xen 4.2's `tools/blktap2/drivers`. Like them they exit with 255 after a
//! usage error or a failure. Other than they, all three ask before they destroy a file that is not empty, and none touches an
//! image that is in use.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail};
use format::blocking::Storage;
use format::{MetaWrite, SECTOR_SIZE};
use qcow::{v1, v2};
use tap_ctl::proto::ImageType;
use tapdisk::reactor::EngineChoice;

use crate::BUFFERS;
use crate::copy::copy;
use crate::create::claim;
use crate::progress::Progress;
use crate::source::Image;

/// How an image of Xen's tools is to be made.
#[derive(Debug, Clone)]
pub struct NewQcow {
    /// Version 2 instead of 1.
    pub version_2: bool,
    /// Sectors of the disk; over a backing file it gets the size of that.
    pub sectors: u64,
    /// Make the file as long as it will ever need to be.
    pub reserve: bool,
}

/// Runs a tool to its exit code: `work` gets the arguments, and answers `None` if they are not as `usage` says.
pub fn run(usage: &str, work: impl FnOnce(lexopt::Parser) -> anyhow::Result<Option<()>>) -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    match work(lexopt::Parser::from_env()) {
        Ok(Some(())) => return ExitCode::SUCCESS,
        Ok(None) => eprintln!("Qcow-utils: v1.0.0\nusage: {usage}"),
        Err(error) => eprintln!("{error:#}"),
    }
    ExitCode::from(255)
}

/// Just as many names and no options; `None` for anything else.
pub fn names<const N: usize>(mut parser: lexopt::Parser) -> anyhow::Result<Option<[String; N]>> {
    let mut names = Vec::new();
    while let Some(arg) = parser.next()? {
        let lexopt::Arg::Value(name) = arg else { return Ok(None) };
        names.push(text(&name)?);
    }
    Ok(names.try_into().ok())
}

/// A name as text.
pub fn text(name: &OsStr) -> anyhow::Result<String> {
    name.to_str().map(str::to_owned).with_context(|| format!("the name {} is not UTF-8", name.display()))
}

/// Whether a file may be written over: asks on the terminal if it is there and not empty.
///
/// # Errors
/// The standard input cannot be read, or the file not be looked at.
pub fn may_overwrite(path: &Path) -> anyhow::Result<bool> {
    match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(error).with_context(|| path.display().to_string()),
        Ok(metadata) if metadata.is_file() && metadata.len() == 0 => return Ok(true),
        Ok(_) => {}
    }
    print!("{} already exists. Write over it? (y or n) ", path.display());
    io::stdout().flush()?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    Ok(answer.trim_start().starts_with(['y', 'Y']))
}

impl NewQcow {
    /// Makes the image in place of whatever the file holds.
    ///
    /// # Errors
    /// No such image is possible, its backing file cannot serve, or the file cannot be written.
    pub fn create(&self, path: &Path, backing: Option<&Path>) -> anyhow::Result<()> {
        let backing = backing.map(Below::find).transpose()?;
        let (len, writes) = if self.version_2 { self.version_2(backing)? } else { self.version_1(backing)? };
        let mut file = claim(path)?;
        put(&mut file, len, &writes).with_context(|| format!("{}: cannot be written", path.display()))
    }

    fn version_1(&self, backing: Option<Below>) -> anyhow::Result<(u64, Vec<MetaWrite>)> {
        let new = v1::NewImage {
            sectors: backing.as_ref().map_or(self.sectors, |below| below.sectors),
            flavour: v1::Flavour::Xen { reserve: self.reserve },
            backing: backing.map(|below| v1::Backing { name: below.name, mtime: below.mtime }),
            encrypted: false,
        };
        let bytes = new.build()?;
        Ok((bytes.len, bytes.writes))
    }

    fn version_2(&self, backing: Option<Below>) -> anyhow::Result<(u64, Vec<MetaWrite>)> {
        if self.reserve {
            bail!("-r is only for qcow images of version 1");
        }
        let mut new = v2::NewImage::new(backing.as_ref().map_or(self.sectors, |below| below.sectors));
        new.backing = backing.map(|below| v2::Backing { name: below.name, format: Some("raw".to_owned()) });
        let bytes = new.build()?;
        Ok((bytes.len, bytes.writes))
    }
}

/// A raw backing file.
struct Below {
    name: Vec<u8>,
    sectors: u64,
    mtime: u32,
}

impl Below {
    fn find(path: &Path) -> anyhow::Result<Below> {
        let wrong = || path.display().to_string();
        let path = path.canonicalize().with_context(wrong)?;
        let file = File::open(&path).with_context(wrong)?;
        let mut magic = [0; 4];
        let size = file.size().with_context(wrong)?;
        if file.read_at(0, &mut magic).is_ok() && magic == *b"QFI\xfb" {
            bail!("{}: is an image itself; a backing file is raw", path.display());
        }
        Ok(Below {
            name: path.as_os_str().as_bytes().to_vec(),
            sectors: size / SECTOR_SIZE,
            mtime: u32::try_from(file.metadata().with_context(wrong)?.mtime()).unwrap_or(0),
        })
    }
}

fn put(file: &mut File, len: u64, writes: &[MetaWrite]) -> io::Result<()> {
    if !file.is_regular()? {
        return Err(io::Error::other("it is a device; these images lie in files"));
    }
    file.set_len(0)?;
    file.set_len(len)?;
    for write in writes {
        file.write_at(write.offset, &write.bytes)?;
    }
    file.sync_all()
}

/// Copies all of one disk to another, which reads as zeros so far, with progress on a terminal.
///
/// # Errors
/// What cannot be opened, read or written.
pub fn transfer(from: (ImageType, String), to: (ImageType, String)) -> anyhow::Result<()> {
    let task = async move |io| -> anyhow::Result<()> {
        let from = Image::new(from.0, &from.1).open(&io, false)?;
        let name = to.1;
        let to = Image::new(to.0, &name).open(&io, true)?;
        let progress = Progress::new(from.sectors());
        let copied = copy(&io, &from, &to, true, &progress).await;
        progress.end();
        copied?;
        to.close().await.with_context(|| format!("{name}: cannot close it"))
    };
    tapdisk::alone::run(EngineChoice::Auto, BUFFERS, task).context("the I/O engine failed")?
}
