//! Options in the manner of `getopt(3)`: single letters, some with a value.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::str::FromStr;

use super::Failure;

/// The options of a command line; of an option given twice the last one counts.
#[derive(Debug, Default)]
pub(crate) struct Args {
    options: HashMap<char, OsString>,
    operands: Vec<OsString>,
}

impl Args {
    /// Parses by a specification as of `getopt`: letters, those with a value followed by a colon. The error is text for
    /// the user, a line or nothing: `-h` only asks for the usage.
    pub(crate) fn parse(spec: &str, args: impl Iterator<Item = OsString>) -> Result<Self, String> {
        let mut parsed = Self::default();
        let mut parser = lexopt::Parser::from_args(args);
        while let Some(arg) = parser.next().map_err(|error| format!("{error}\n"))? {
            match arg {
                lexopt::Arg::Short('h') => return Err(String::new()),
                lexopt::Arg::Short(letter) => {
                    let value = match takes_value(spec, letter) {
                        None => return Err(format!("invalid option -- '{letter}'\n")),
                        Some(false) => OsString::new(),
                        Some(true) => parser.value().map_err(|error| format!("{error}\n"))?,
                    };
                    parsed.options.insert(letter, value);
                }
                lexopt::Arg::Long(name) => return Err(format!("invalid option '--{name}'\n")),
                lexopt::Arg::Value(value) => parsed.operands.push(value),
            }
        }
        Ok(parsed)
    }

    pub(crate) fn has(&self, letter: char) -> bool {
        self.options.contains_key(&letter)
    }

    pub(crate) fn path(&self, letter: char) -> Option<&Path> {
        self.text(letter).map(Path::new)
    }

    pub(crate) fn text(&self, letter: char) -> Option<&OsStr> {
        self.options.get(&letter).map(OsString::as_os_str)
    }

    /// The number given for an option.
    pub(crate) fn number<T: FromStr>(&self, letter: char) -> Result<Option<T>, Failure> {
        let Some(value) = self.options.get(&letter) else { return Ok(None) };
        let number = value.to_str().and_then(|text| text.parse().ok());
        number.map(Some).ok_or_else(|| {
            Failure::new(libc::EINVAL, format!("invalid number for -{letter}: {}", value.display()))
        })
    }

    pub(crate) fn operands(&self) -> &[OsString] {
        &self.operands
    }
}

/// Whether an option takes a value, `None` if there is no such option.
fn takes_value(spec: &str, letter: char) -> Option<bool> {
    let (_, rest) = spec.split_once(letter).filter(|_| letter != ':')?;
    Some(rest.starts_with(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Args, String> {
        Args::parse("n:s:v", args.iter().map(OsString::from))
    }

    #[test]
    fn options_may_be_joined_and_repeated() {
        let args = parse(&["-vn", "a", "-s3", "file", "-n", "b"]).unwrap();
        assert!(args.has('v') && !args.has('x'));
        assert_eq!(args.path('n'), Some(Path::new("b")));
        assert_eq!(args.number::<u32>('s').unwrap(), Some(3));
        assert_eq!(args.operands(), ["file"]);
    }

    #[test]
    fn wrong_command_lines_are_refused() {
        for wrong in [&["-x"][..], &["-n"], &["--name"], &["-h"], &["-:"]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
        assert!(parse(&["-s", "-1"]).unwrap().number::<u32>('s').is_err());
    }
}
