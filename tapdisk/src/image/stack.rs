//! `x-chain`: a text file that says which images a chain is made of, whatever the images themselves say.
//!
//! One `type:path` a line, the leaf first; below the last one follow the parents that it names. Empty lines, and lines that
//! begin with `#`, are skipped. `ro` behind a path, after a blank, is understood and changes nothing: only the leaf is ever
//! written, and whether it is says the open. Relative paths begin in the folder of the file. Whoever writes this file may
//! name any image, as on the command line.

use std::io::Read;
use std::path::Path;

use nix::errno::Errno;
use tap_ctl::proto::{ImageSpec, ImageType};

use super::OpenError;
use crate::porter::{self, How};

/// The longest file that is read, in bytes.
const MOST: u64 = 64 << 10;

/// The images of a chain that the administrator named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stack {
    /// Which may be written.
    pub leaf: ImageSpec,
    /// The nearest first.
    pub below: Vec<ImageSpec>,
}

/// Reads the file.
pub fn read(path: &Path) -> Result<Stack, OpenError> {
    let failed = |error: std::io::Error| OpenError::io(path, "cannot be read", &error);
    let mut file = porter::open(path, How::READ).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() || metadata.len() > MOST {
        return Err(OpenError::new(path, Errno::EINVAL, "is no short text file with the images of a chain"));
    }
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(failed)?;
    let folder = path.parent().unwrap_or(Path::new("."));
    parse(&text, folder).map_err(|why| OpenError::new(path, Errno::EINVAL, why))
}

fn parse(text: &str, folder: &Path) -> Result<Stack, String> {
    let lines = text.lines().map(str::trim).zip(1..);
    let lines = lines.filter(|(line, _)| !line.is_empty() && !line.starts_with('#'));
    let images: Result<Vec<ImageSpec>, String> = lines
        .map(|(line, number)| image(line, folder).map_err(|why| format!("line {number}: {why}")))
        .collect();
    let mut images = images?.into_iter();
    let leaf = images.next().ok_or("names no image")?;
    Ok(Stack { leaf, below: images.collect() })
}

fn image(line: &str, folder: &Path) -> Result<ImageSpec, String> {
    let line = line.strip_suffix(" ro").map_or(line, str::trim_end);
    let mut image: ImageSpec = line.parse().map_err(|error| format!("{error}"))?;
    match image.kind {
        ImageType::XChain => return Err("a chain of images cannot hold another one".into()),
        ImageType::Null | ImageType::Nbd => {}
        // What begins with a number is a size.
        ImageType::Ram if image.path.starts_with(|first: char| first.is_ascii_digit()) => {}
        _ => {
            let path = folder.join(&image.path);
            image.path = path.to_str().ok_or("the folder's name is no UTF-8")?.to_owned();
        }
    }
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::open;
    use crate::image::tests::{make, params, read as read_disk, run, snapshot, write};

    fn images(text: &str) -> Result<Vec<String>, String> {
        let stack = parse(text, Path::new("/srv"))?;
        Ok(std::iter::once(&stack.leaf).chain(&stack.below).map(ImageSpec::to_string).collect())
    }

    #[test]
    fn lines_name_the_images_from_the_leaf_down() {
        let text = "# golden\n\n vhd:leaf.vhd \naio:/images/base image.raw ro\nram:64M\nnbd:unix:/run/s\n";
        let expected = ["vhd:/srv/leaf.vhd", "aio:/images/base image.raw", "ram:64M", "nbd:unix:/run/s"]
            .map(String::from);
        assert_eq!(images(text).unwrap(), expected);
    }

    #[test]
    fn what_makes_no_chain_is_refused_with_its_line() {
        for (text, part) in [
            ("", "no image"),
            ("# only this\n", "no image"),
            ("vhd:a\nvalve:b", "line 2"),
            ("\n\nleaf", "line 3"),
            ("x-chain:b", "line 1"),
        ] {
            let why = images(text).unwrap_err();
            assert!(why.contains(part), "{text:?}: {why}");
        }
    }

    #[test]
    fn the_chain_is_what_the_file_says_and_below_the_last_image_what_that_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        make(&path("base"), 8);
        snapshot(&path("child"), &path("base"));
        std::fs::write(path("raw"), vec![7; 8 << 20]).unwrap();
        std::fs::write(path("chain"), "vhd:child\naio:raw ro\n").unwrap();
        std::fs::write(path("alone"), "vhd:child").unwrap();
        std::fs::write(path("twice"), "vhd:child\nvhd:base\nvhd:base\n").unwrap();
        let path = |name: &str| dir.path().join(name);
        let [chain, alone, twice] = ["chain", "alone", "twice"].map(path);
        run(move |io| async move {
            let disk = open(&params(ImageType::XChain, &chain, false), &io).unwrap();
            write(&disk, &io, 8, &[1; 512]).await.unwrap();
            assert_eq!(read_disk(&disk, &io, 7, 2).await, [[7; 512], [1; 512]].concat());
            disk.close().await.unwrap();
            drop(disk);
            let disk = open(&params(ImageType::XChain, &alone, false), &io).unwrap();
            assert_eq!(read_disk(&disk, &io, 7, 2).await, [[0; 512], [1; 512]].concat());
            drop(disk);
            let error = open(&params(ImageType::XChain, &twice, false), &io).unwrap_err();
            assert_eq!(error.errno(), Errno::ELOOP);
        });
    }
}
