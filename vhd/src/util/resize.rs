//! `vhd-util resize`: in place with `-f`, as far as the allocation table has room, or under a journal.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use format::Format;
use format::blocking::carry_out;

use super::args::Args;
use super::disk::{Disk, sync_folder, undo};
use super::{Failure, errno_of, in_use, wrong_usage};
use crate::enlarge::{self, Point};
use crate::journal;
use crate::{DiskType, Error, OpenOptions, Vhd};

pub(super) const OPTIONS: &str = "n:s:j:f";
pub(super) const USAGE: &str = "options: <-n name> <-s size (in MB)> (<-j journal>|<-f fast>) [-h help]\n\nWithout -f the \
                                image must not be in use, and what the resize changes is kept in the journal until it \
                                is complete: 'vhd-util revert' undoes what was cut short. An image made with -S <msize> \
                                has room for the metadata of a disk of <msize>, and up to that it can be resized with \
                                -f, in use too and without a journal.";

pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let path = args.path('n').ok_or_else(wrong_usage)?;
    let size = args.number::<u64>('s')?.ok_or_else(wrong_usage)?;
    let sectors = size.saturating_mul(2048);
    match (args.path('j'), args.has('f')) {
        (None, true) => fast(path, sectors),
        (Some(journal), false) => journalled(path, sectors, journal, out),
        _ => Err(wrong_usage()),
    }
}

fn failure(error: &Error) -> Failure {
    Failure::new(error.errno(), format!("resize failed: {error}"))
}

fn open_vhd(disk: &Disk, path: &Path) -> Result<Vhd, Failure> {
    let options = OpenOptions { writable: true, allow_encrypted: true, ..OpenOptions::default() };
    let vhd = disk.vhd(&options);
    let vhd = vhd.map_err(|error| Failure::opening(path, error.errno()))?;
    if vhd.footer().tap_version().is_none() {
        let text = format!("{} not created by xen; resize not supported", path.display());
        return Err(Failure::new(libc::EINVAL, text));
    }
    Ok(vhd)
}

fn fast(path: &Path, sectors: u64) -> Result<(), Failure> {
    let mut disk = Disk::open(path, true).map_err(|error| Failure::opening(path, errno_of(&error)))?;
    // A program that serves the image knows a size of its own, and is asked to change it. Readers do not mind.
    disk.lock(false).map_err(|error| in_use(path, &error))?;
    let mut vhd = open_vhd(&disk, path)?;
    // Nothing else is under way in an image that was opened just now.
    if let Some(steps) = vhd.begin_resize(sectors).map_err(|error| failure(&error))? {
        carry_out(&mut disk, &steps)?;
        vhd.resize_ended(true);
    }
    Ok(())
}

fn journalled(path: &Path, sectors: u64, journal: &Path, out: &mut dyn Write) -> Result<(), Failure> {
    let mut disk = Disk::open(path, true).map_err(|error| Failure::opening(path, errno_of(&error)))?;
    disk.lock(true).map_err(|error| in_use(path, &error))?;
    let mut vhd = open_vhd(&disk, path)?;
    if sectors < vhd.sectors() && vhd.kind() != DiskType::Fixed {
        writeln!(out, "dynamic shrink not fully implemented")?;
        return Err(Failure::new(libc::ENOSYS, format!("resize failed: -{}", libc::ENOSYS)));
    }
    if sectors == vhd.sectors() {
        return Ok(());
    }
    if vhd.needs_tidying(disk.size, disk.regular) {
        carry_out(&mut disk, &vhd.tidying_steps())?;
        vhd = open_vhd(&disk, path)?;
    }
    let mut file = create_journal(journal)?;
    let mut at = |point: Point| stop_at(point.variable());
    let result = enlarge::resize(&vhd, &mut disk, &mut file, sectors, &mut at);
    match result {
        Ok(()) => drop_journal(journal, &mut file),
        Err(error @ Error::Stopped { .. }) => Err(error.into()),
        Err(error) => {
            writeln!(out, "resize failed: {error}")?;
            undo(&mut disk, &mut file)?;
            drop_journal(journal, &mut file)?;
            Err(Failure::silent(error.errno()))
        }
    }
}

/// Stops where storage managers' tests want to see what a stop leaves.
pub(super) fn stop_at(point: &'static str) -> Result<(), Error> {
    match std::env::var_os(point) {
        None => Ok(()),
        Some(_) => Err(Error::Stopped { point }),
    }
}

/// Makes a journal in a new file, or opens a block device for it.
pub(super) fn create_journal(path: &Path) -> Result<File, Failure> {
    let device = fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
    let mut options = File::options();
    options.read(true).write(true).create_new(!device);
    let file = options.open(path).and_then(|file| sync_folder(path).map(|()| file));
    file.map_err(|error| {
        let errno = errno_of(&error);
        Failure::new(errno, format!("creating journal failed: -{errno}"))
    })
}

/// Ends a journal that is not needed any more.
pub(super) fn drop_journal(path: &Path, file: &mut File) -> Result<(), Failure> {
    if file.metadata()?.file_type().is_block_device() {
        return Ok(journal::void(file)?);
    }
    Ok(fs::remove_file(path).and_then(|()| sync_folder(path))?)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::path::Path;

    use crate::util;

    fn vhd_util(line: &str, image: &Path) -> (i32, String) {
        let mut args = line.split_whitespace().map(OsString::from).collect::<Vec<_>>();
        args.extend(["-n".into(), image.into()]);
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = util::run(args, &mut out, &mut err);
        (code, String::from_utf8(out).unwrap())
    }

    #[test]
    fn an_image_with_room_grows_and_stays_valid() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("a.vhd");
        assert_eq!(vhd_util("create -s 8 -S 600", &image).0, 0);
        assert_eq!(vhd_util("resize -s 600 -f", &image), (0, String::new()));
        assert_eq!(vhd_util("query -v -S", &image).1, "600\n600\n");
        assert!(vhd_util("check", &image).1.contains("is valid"));
        for (line, code, text) in [
            ("resize -s 602 -f", 22, "has room for"),
            ("resize -s 8 -f", 22, "fewer"),
            ("resize -f", 22, "options:"),
        ] {
            let (found, said) = vhd_util(line, &image);
            assert!(found == code && said.contains(text), "{line}: {found} {said}");
        }
        assert_eq!(vhd_util("query -v", &image).1, "600\n");
    }
}
