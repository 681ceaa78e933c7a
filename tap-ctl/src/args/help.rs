//! What each command is for, in sentences for its `--help`.

/// A sentence or two about a command; empty for one that is not known.
pub(super) fn about(command: &str) -> &'static str {
    match command {
        "list" => {
            "Lists tapdisks, their disks, and minors that nobody serves. An entry is shown if it agrees with every option \
             given; nothing to show is no failure."
        }
        "allocate" => "Takes the lowest free minor and prints its marker.",
        "free" => "Gives a minor back that no tapdisk has charge of.",
        "create" => {
            "Allocates a minor, starts a tapdisk, attaches and opens; undoes all of it where a step fails."
        }
        "destroy" => {
            "Closes a disk, detaches it and frees its minor. The tapdisk ends with its last disk. With -f, one that does \
             not close its disk in time (-t, 5 s) is killed."
        }
        "spawn" => "Starts a tapdisk and prints its process id.",
        "attach" => "Puts a tapdisk in charge of a minor.",
        "detach" => "Takes a minor away from its tapdisk, which ends with its last one.",
        "open" => {
            "Opens an image. The type is one of aio, vhd, qcow, qcow2, vmdk, nbd, ram, null and x-chain."
        }
        "close" => "Disconnects all frontends of a disk and closes its image.",
        "pause" => {
            "Ends what is in flight and closes the image, so that others may work on it. Frontends wait."
        }
        "unpause" => "Opens the image of a paused disk again, or another one, and goes on.",
        "snapshot" => {
            "Makes a new image that takes all writes from now on, and has the present one as its parent."
        }
        "resize" => "Makes a disk larger under its guest.",
        "limit" => "Changes what a disk may do in a second.",
        "stats" => {
            "Prints what a disk has done, as the JSON that XenServer's storage manager reads, or all of it."
        }
        "upgrade" => {
            "Has other tapdisks, of the program that is installed now, go on with the disks of one tapdisk, or of all. \
             Guests wait for a moment. Prints who serves each disk now."
        }
        "top" => {
            "Shows what all disks do, live. Keys: d, i, b, l, u and h sort by device, requests, bytes, latency, queue and \
             cache hits; q quits."
        }
        "metrics" => {
            "Serves the numbers of all disks to Prometheus until it is ended, at /metrics. Only this host can reach it: a \
             socket of mode 0600, or a loopback address."
        }
        "nbd-tls" => {
            "Serves a disk by NBD on a TCP port until it is ended, to clients whose certificates are signed as ca-cert.pem \
             says, and by TLS only. Prints the URI. ca-crl.pem, if it is there, names certificates that are revoked."
        }
        _ => "",
    }
}

/// Columns of a terminal.
const COLUMNS: usize = 80;

/// The text in lines that a terminal of 80 columns shows whole, broken at blanks; lines but the first are indented by `indent`
/// columns. What stands between blanks is never broken.
pub(super) fn fold(text: &str, indent: usize) -> String {
    let mut folded = String::new();
    let mut column = 0;
    // A blank belongs to the word behind it, so that the indentation and alignment of the first line stay.
    for (place, piece) in pieces(text).enumerate() {
        let width = piece.chars().count();
        if place > 0 && column + width > COLUMNS {
            folded.push('\n');
            folded.extend(std::iter::repeat_n(' ', indent));
            folded.push_str(piece.trim_start());
            column = indent + piece.trim_start().chars().count();
        } else {
            folded.push_str(piece);
            column += width;
        }
    }
    folded.trim_end().to_owned()
}

/// The words of a text, each with the blanks before it.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let word = rest.find(|letter| letter != ' ')?;
        let end = rest.split_at(word).1.find(' ').map_or(rest.len(), |length| word + length);
        let (piece, more) = rest.split_at(end);
        rest = more;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::super::{COMMANDS, help_of, usage};
    use super::{about, fold};

    #[test]
    fn a_long_line_is_broken_at_blanks_before_column_80() {
        let words = ["word"; 40].join(" ");
        let folded = fold(&format!("  name   {words}"), 9);
        let lines: Vec<&str> = folded.lines().collect();
        assert!(lines.len() > 1 && lines.iter().all(|line| line.len() <= 80), "{folded}");
        assert!(lines[0].starts_with("  name   word word"), "{folded}");
        assert!(lines[1..].iter().all(|line| line.starts_with("         word")), "{folded}");
        assert_eq!(folded.split_whitespace().count(), 41);
        let unbreakable = "x".repeat(100);
        assert_eq!(fold(&format!("a {unbreakable} b"), 2), format!("a\n  {unbreakable}\n  b"));
        assert_eq!((fold("", 4).as_str(), fold("  a   ", 4).as_str()), ("", "  a"));
    }

    #[test]
    fn every_command_has_a_line_in_the_usage_and_a_help_of_its_own() {
        let usage = usage();
        let begin = usage.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
        assert_eq!(begin.count(), COMMANDS.len());
        for (command, _) in COMMANDS {
            assert!(about(command).ends_with('.'), "{command}");
            let help = help_of(command);
            assert!(help.starts_with(&format!("usage: tap-ctl {command}")), "{help}");
            assert!(help.lines().all(|line| line.len() <= 80), "{help}");
        }
    }
}
