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
        "top" => {
            "Shows what all disks do, live. Keys: d, i, b, l, u and h sort by device, requests, bytes, latency, queue and \
             cache hits; q quits."
        }
        "metrics" => {
            "Serves the numbers of all disks to Prometheus until it is ended, at /metrics. Only this host can reach it: a \
             socket of mode 0600, or a loopback address."
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::super::{COMMANDS, help_of, usage};
    use super::about;

    #[test]
    fn every_command_has_a_line_in_the_usage_and_a_help_of_its_own() {
        let usage = usage();
        assert_eq!(usage.lines().count(), COMMANDS.len() + 1);
        for (command, _) in COMMANDS {
            assert!(about(command).ends_with('.'), "{command}");
            let help = help_of(command);
            assert!(help.starts_with(&format!("usage: tap-ctl {command}")), "{help}");
            assert!(help.ends_with(&format!("\n{}\n", about(command))), "{help}");
        }
    }
}
