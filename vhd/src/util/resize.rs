//! `vhd-util resize`: growing an image in place, as far as its allocation table has room.

use std::io::Write;

use super::args::Args;
use super::disk::Disk;
use super::{Failure, errno_of, in_use, wrong_usage};
use crate::{Error, OpenOptions};

pub(super) const OPTIONS: &str = "n:s:j:f";
pub(super) const USAGE: &str = "options: <-n name> <-s size (in MB)> <-f fast resize> [-h help]";

pub(super) fn run(args: &Args, _out: &mut dyn Write) -> Result<(), Failure> {
    let path = args.path('n').ok_or_else(wrong_usage)?;
    let size = args.number::<u64>('s')?.ok_or_else(wrong_usage)?;
    if !args.has('f') {
        let text = "this version resizes with -f only: within the room that 'vhd-util create -S' provides";
        return Err(Failure::new(libc::ENOSYS, text));
    }
    let failure = |error: &Error| Failure::new(error.errno(), format!("resize failed: {error}"));
    let opening = |errno: i32| Failure::new(errno, format!("error opening {}: -{errno}", path.display()));
    let disk = Disk::open(path, true).map_err(|error| opening(errno_of(&error)))?;
    // A program that serves the image knows a size of its own, and is asked to change it. Readers do not mind.
    disk.lock(false).map_err(|error| in_use(path, &error))?;
    let options = OpenOptions { writable: true, allow_encrypted: true, ..OpenOptions::default() };
    let mut vhd = disk.vhd(&options).map_err(|error| opening(error.errno()))?;
    let sectors = size.saturating_mul(2048);
    // Nothing else is under way in an image that was opened just now.
    if let Some(resize) = vhd.begin_resize(sectors).map_err(|error| failure(&error))? {
        disk.carry_out(&resize)?;
        vhd.resize_done();
    }
    Ok(())
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
            ("resize -s 700 -j journal", 38, "-f only"),
            ("resize -f", 22, "options:"),
        ] {
            let (found, said) = vhd_util(line, &image);
            assert!(found == code && said.contains(text), "{line}: {found} {said}");
        }
        assert_eq!(vhd_util("query -v", &image).1, "600\n");
    }
}
