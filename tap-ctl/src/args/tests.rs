use super::*;
use crate::proto::{Limits, Secondary};

fn line(text: &str) -> Result<Command, UsageError> {
    parse(&text.split_whitespace().map(OsString::from).collect::<Vec<_>>())
}

const TARGET: Target = Target { pid: 12, minor: Minor(3) };

#[test]
fn the_lines_of_the_hotplug_script_are_understood() {
    let filter = Filter { kind: Some("vhd".into()), path: Some("/a".into()), ..Filter::default() };
    assert_eq!(line("list -t vhd -f /a"), Ok(Command::List(filter)));
    assert_eq!(line("allocate"), Ok(Command::Allocate));
    assert_eq!(line("spawn"), Ok(Command::Spawn(None)));
    assert_eq!(line("attach -p 12 -m 3"), Ok(Command::Attach(TARGET)));
    let image: ImageSpec = "vhd:/a".parse().unwrap();
    let plain = Opening { params: Box::new(OpenParams::new(image)), encrypted: false };
    assert_eq!(line("open -p 12 -m 3 -a vhd:/a"), Ok(Command::Open(TARGET, plain)));
    assert_eq!(line("detach -p 12 -m 3"), Ok(Command::Detach(TARGET)));
    assert_eq!(line("free -m 3"), Ok(Command::Free(Minor(3))));
    assert_eq!(line("destroy -p 12 -m 3"), Ok(Command::Destroy(TARGET, None, false)));
    let five = Some(Duration::from_secs(5));
    assert_eq!(line("destroy -p 12 -m 3 -f -t 5"), Ok(Command::Destroy(TARGET, five, true)));
}

#[test]
fn options_may_be_joined_and_in_any_order() {
    let image: ImageSpec = "aio:/x".parse().unwrap();
    let params = OpenParams { readonly: true, buffered: true, ..OpenParams::new(image) };
    let opening = Opening { params: Box::new(params), encrypted: false };
    assert_eq!(line("open -RD -aaio:/x -m3 -p12"), Ok(Command::Open(TARGET, opening.clone())));
    assert_eq!(line("create -D -d name -R -a aio:/x"), Ok(Command::Create(opening, None)));
    assert_eq!(line("close -f -t 9 -p 12 -m 3"), Ok(Command::Close(TARGET, Some(Duration::from_secs(9)))));
}

#[test]
fn no_command_and_an_unknown_one_ask_for_help() {
    for text in ["", "frobnicate", "reboot -p 1 -m 1", "--help"] {
        assert_eq!(line(text), Ok(Command::Help), "{text:?}");
    }
    assert_eq!(line("open -h"), Ok(Command::HelpOn("open")));
}

#[test]
fn wrong_options_and_values_are_refused() {
    for text in [
        "open",
        "open -p 12",
        "open -p 12 -m 3",
        "open -p x -m 3 -a vhd:/a",
        "open -p 12 -m 3 -a /a",
        "open -p 12 -m 3 -a qcow9:/a",
        "attach -p 0 -m 3",
        "attach -p -1 -m 3",
        "attach -p +1 -m 3",
        "free -m 16384",
        "free",
        "free -p 1 -m 1",
        "spawn extra",
        "allocate -z",
        "close -p 1 -m 1 -t 0",
        "list -p",
        "list -a vhd:/a",
        "destroy -m 1",
    ] {
        assert!(line(text).is_err(), "{text:?}");
    }
}

#[test]
fn the_options_that_open_an_image_are_passed_on() {
    let text = "open -p 12 -m 3 -a vhd:/a -r -e 5 -2 vhd:/b -s -t 30 -C /log -E --limit iops=9,bps=1M";
    let Ok(Command::Open(TARGET, opening)) = line(text) else { panic!() };
    let expected = OpenParams {
        secondary: Some("vhd:/b".parse().unwrap()),
        standby: true,
        log: Some("/log".into()),
        local_cache: true,
        shared_parent: Some(Minor(5)),
        parent: None,
        timeout: Some(30),
        limit: Limits { iops: 9, bps: 1 << 20, ..Limits::default() },
        ..OpenParams::new("vhd:/a".parse().unwrap())
    };
    assert_eq!((*opening.params, opening.encrypted), (expected, true));
    for text in ["-s", "-x", "-2 /b", "-e 99999", "-t x", "--limit iops", "-C"] {
        assert!(line(&format!("create -a vhd:/a {text}")).is_err(), "{text:?}");
    }
    let Ok(Command::Create(opening, None)) = line("create -a vhd:/a -2 null") else { panic!() };
    assert_eq!(opening.params.secondary, None);
}

#[test]
fn a_running_disk_is_paused_changed_limited_and_asked() {
    assert_eq!(line("pause -p 12 -m 3"), Ok(Command::Pause(TARGET, None)));
    assert_eq!(line("pause -p 12 -m 3 -t 5"), Ok(Command::Pause(TARGET, Some(Duration::from_secs(5)))));
    assert_eq!(line("unpause -p 12 -m 3"), Ok(Command::Unpause(TARGET, Reopen::default())));
    let change = Reopen {
        image: Some("vhd:/b".parse().unwrap()),
        secondary: Some(Secondary::Nothing),
        standby: false,
        log: Some("/log".into()),
    };
    assert_eq!(line("unpause -p 12 -m 3 -a vhd:/b -2 null -c /log"), Ok(Command::Unpause(TARGET, change)));
    let child: crate::proto::ImageSpec = "vhd:/c".parse().unwrap();
    let five = Some(Duration::from_secs(5));
    assert_eq!(line("snapshot -p 12 -m 3 -a vhd:/c"), Ok(Command::Snapshot(TARGET, child.clone(), None)));
    assert_eq!(line("snapshot -p 12 -m 3 -a vhd:/c -t 5"), Ok(Command::Snapshot(TARGET, child, five)));
    assert_eq!(line("limit -p 12 -m 3"), Ok(Command::Limit(TARGET, LimitChange::default())));
    let change = LimitChange { iops: Some(0), burst_bps: Some(4096), ..LimitChange::default() };
    assert_eq!(line("limit -p 12 -m 3 --iops 0 --burst-bps=4K"), Ok(Command::Limit(TARGET, change)));
    assert_eq!(line("stats -p 12 -m 3"), Ok(Command::Stats(TARGET, false)));
    assert_eq!(line("stats -p 12 -m 3 --full"), Ok(Command::Stats(TARGET, true)));
    for text in
        ["snapshot -p 12 -m 3", "limit -p 12 -m 3 --reads 1", "pause -p 12", "unpause -m 3", "stats -f"]
    {
        assert!(line(text).is_err(), "{text:?}");
    }
}

#[test]
fn relative_images_become_absolute_and_absolute_ones_stay() {
    let Ok(Command::Create(opening, None)) = line("create -a vhd:disk.vhd") else { panic!() };
    assert_eq!(opening.params.image.path, std::path::absolute("disk.vhd").unwrap().to_str().unwrap());
    let Ok(Command::Create(opening, None)) = line("create -a vhd:/a//b/../c") else { panic!() };
    assert_eq!(opening.params.image.path, "/a//b/../c");
}

#[test]
fn the_address_of_an_nbd_server_is_no_path() {
    let Ok(Command::Create(opening, None)) = line("create -a nbd:unix:/run/a:disk -2 nbd://host/x") else {
        panic!()
    };
    assert_eq!(opening.params.image.path, "unix:/run/a:disk");
    assert_eq!(opening.params.secondary.map(|image| image.path), Some("//host/x".into()));
}

#[test]
fn the_size_of_a_null_image_is_no_path() {
    let Ok(Command::Create(opening, Some("pool"))) = line("create -a null:64G --engine pool") else {
        panic!()
    };
    assert_eq!(opening.params.image.path, "64G");
}

#[test]
fn what_is_looked_for_is_written_as_it_was_when_it_was_opened() {
    let here = std::path::absolute("disk").unwrap().to_str().unwrap().to_owned();
    for (options, path) in [
        ("-t null -f 64G", "64G"),
        ("-t ram -f 64M", "64M"),
        ("-t ram -f disk", &here),
        ("-t nbd -f unix:/s", "unix:/s"),
        ("-t nbd -f host:10809:disk", "host:10809:disk"),
        ("-t vhd -f disk", &here),
        ("-t unknown -f disk", &here),
        ("-f disk", &here),
    ] {
        let Ok(Command::List(filter)) = line(&format!("list {options}")) else { panic!("{options}") };
        assert_eq!(filter.path.as_deref(), Some(path), "{options}");
    }
}

#[test]
fn an_engine_is_chosen_where_a_tapdisk_is_started() {
    for name in ["auto", "uring", "pool"] {
        assert_eq!(line(&format!("spawn --engine {name}")), Ok(Command::Spawn(Some(name))));
        assert_eq!(line(&format!("spawn --engine={name}")), Ok(Command::Spawn(Some(name))));
    }
    let error = line("spawn --engine aio").unwrap_err();
    assert!(error.message.contains("uring, pool or auto"), "{error}");
    assert!(line("open -p 12 -m 3 -a vhd:/a --engine pool").is_err());
}

#[test]
fn a_new_size_is_in_mebibytes() {
    assert_eq!(line("resize -p 12 -m 3"), Ok(Command::Resize(TARGET, None)));
    assert_eq!(line("resize -p 12 -m 3 -s 4096"), Ok(Command::Resize(TARGET, Some(4 << 30))));
    for text in ["", "-p 12", "-m 3", "-p 12 -m 3 -s 0", "-p 12 -m 3 -s 1G", "-p 12 -m 3 -s -1"] {
        assert!(line(&format!("resize {text}")).is_err(), "{text:?}");
    }
    assert!(line("resize -p 12 -m 3 -s 99999999999999999").is_err());
}

#[test]
fn what_prints_can_print_json() {
    for command in ["list", "allocate", "spawn", "create -a aio:/x", "limit -p 12 -m 3"] {
        let plain = Box::new(line(command).unwrap());
        assert_eq!(line(&format!("{command} --json")), Ok(Command::Json(plain)), "{command}");
    }
    assert_eq!(line("stats -p 12 -m 3 --json"), Ok(Command::Stats(TARGET, true)));
    for text in ["free -m 3 --json", "attach -p 12 -m 3 --json", "metrics --json", "top --json"] {
        assert!(line(text).is_err(), "{text}");
    }
}

#[test]
fn a_port_with_tls_needs_all_that_it_is_made_of() {
    let door =
        TlsDoor { target: TARGET, address: "[::1]:10809".parse().unwrap(), certificates: "/pki".into() };
    assert_eq!(line("nbd-tls -p 12 -m 3 -l [::1]:10809 -c /pki"), Ok(Command::NbdTls(door)));
    for text in [
        "nbd-tls -p 12 -m 3 -l [::1]:10809",
        "nbd-tls -p 12 -m 3 -c /pki",
        "nbd-tls -l [::1]:10809 -c /pki",
        "nbd-tls -p 12 -m 3 -l localhost -c /pki",
        "nbd-tls -p 12 -m 3 -l 10809 -c /pki",
    ] {
        assert!(line(text).is_err(), "{text}");
    }
}

#[test]
fn top_and_metrics_have_their_options() {
    let options = top::Options {
        filter: Filter { minor: Some(Minor(3)), ..Filter::default() },
        batch: true,
        times: Some(2),
        delay: Duration::from_secs(5),
        sort: top::Sort::Iops,
    };
    assert_eq!(line("top -b -n 2 -d 5 -s iops -m 3"), Ok(Command::Top(options)));
    assert_eq!(line("metrics"), Ok(Command::Metrics(None)));
    let address = metrics::serve::Address::Unix("/run/x".into());
    assert_eq!(line("metrics -l /run/x"), Ok(Command::Metrics(Some(address))));
    for text in ["top -n 0", "top -s size", "top -d 0", "metrics -l 0.0.0.0:80", "metrics -p 1", "list -b"] {
        assert!(line(text).is_err(), "{text}");
    }
}
