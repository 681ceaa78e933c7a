//! Converts, compares and describes disk images of every format that tapdisk serves.

mod commands;

use std::process::ExitCode;

use commands::Usage;

const HELP: &str = "\
Converts, compares and describes disk images. Formats: raw (aio), vhd (vpc), qcow, qcow2, vmdk, and for reading also
nbd, ram, x-chain and null. A format is never guessed: -f and -F say what an image is.

tap-img convert -f FORMAT -O FORMAT [-n] [-q] [--cached] [--key FILE] SOURCE TARGET
    Copies a disk, with all that its parents hold, into a new image; -n: into one that exists and is large enough.
tap-img compare -f FORMAT [-F FORMAT] [-s] [-q] A B
    Exits with 0 if two disks are alike, 1 if they differ, 2 after an error. A longer one may end in zeros; -s: it may not.
tap-img info -f FORMAT [--json] IMAGE
    Tells of an image and its parents.
tap-img map -f FORMAT [--json] IMAGE
    Tells which sectors hold data, and in which image.
tap-img check -f FORMAT [--json] [-q] IMAGE
    Exits with 0 if the image is in order, 2 if it is damaged, 3 if room in its file is lost, 63 if its format has no check.
tap-img create -f FORMAT IMAGE SIZE
    Makes an empty image; SIZE in bytes, or with K, M, G or T.

--cached    through the page cache
--key FILE  what an encrypted image is encrypted with
-q          no output but errors
";

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let mut args = lexopt::Parser::from_env();
    let name = match args.next() {
        Ok(Some(lexopt::Arg::Value(name))) => name.to_string_lossy().into_owned(),
        Ok(Some(lexopt::Arg::Long("help") | lexopt::Arg::Short('h'))) => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Ok(Some(other)) => return fail(1, &other.unexpected().into()),
        Ok(None) => return fail(1, &Usage::error("what shall be done? (--help tells)").into()),
        Err(error) => return fail(1, &error.into()),
    };
    // Of these two the exit code 1 has a meaning of its own.
    let failed = if name == "compare" { 2 } else { 1 };
    match commands::run(&name, args) {
        Ok(code) => ExitCode::from(code),
        Err(error) => fail(failed, &error),
    }
}

fn fail(code: u8, error: &anyhow::Error) -> ExitCode {
    eprintln!("tap-img: {error:#}");
    ExitCode::from(code)
}
