//! The frontend's half of a connection: which ring, where, how to read it.
//!
//! All keys are read in one transaction, because some frontends write them one by one. Rules of Xen's `blkif.h`, with
//! the choices Linux's xen-blkback makes where it is silent (`connect_ring` and `read_per_ring_refs` in
//! drivers/block/xen-blkback/xenbus.c): nothing is clamped, what is out of range refuses the device.

use std::collections::HashSet;

use blkif::{Abi, RingOrder, keys};
use nix::errno::Errno;
use tap_ctl::proto::{Polling, QueueParams, RingParams};
use xenstore::path::Escaped;
use xenstore::value::{ValueError, parse_u32};
use xenstore::{Client, Error};

use crate::features::{self, MAX_RING_ORDER, Offer};
use crate::input::{frontend_key, optional};
use crate::paths::DeviceId;
use crate::problem::Problem;

/// Why there is no ring to connect.
#[derive(Debug)]
enum Failure {
    /// XenStore did not answer.
    Store(Error),
    /// The guest's keys are wrong.
    Guest(Problem),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        match error.errno() {
            // The guest decides who may read its keys.
            Some(Errno::EACCES) => Failure::Guest(Problem::new(Errno::EACCES, error.to_string())),
            _ => Failure::Store(error),
        }
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Failure {
        Failure::Guest(problem)
    }
}

/// What a connection depends on besides the frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// What was offered and may be asked for.
    pub offer: Offer,
    /// The toolstack lets the guest write.
    pub writable: bool,
    /// Discard was offered.
    pub discard: bool,
    /// The toolstack's wishes.
    pub polling: Polling,
}

/// Reads the rings of the frontend in the directory `frontend`.
///
/// # Errors
///
/// Outside: those of the connection. Inside: what is wrong with the guest's keys.
pub fn ring(
    store: &mut Client,
    id: DeviceId,
    frontend: &[u8],
    terms: Terms,
) -> Result<Result<RingParams, Problem>, Error> {
    let outcome = store.transact(|store, tx| {
        let mut get = |key: &str| Ok(optional(store, tx, frontend_key(frontend, key))?);
        params(id, terms, &mut get)
    });
    match outcome {
        Ok(params) => Ok(Ok(params)),
        Err(Failure::Guest(problem)) => Ok(Err(problem)),
        Err(Failure::Store(error)) => Err(error),
    }
}

/// Looks a key of the frontend's directory up.
type Get<'a> = dyn FnMut(&str) -> Result<Option<Vec<u8>>, Failure> + 'a;

fn params(id: DeviceId, terms: Terms, get: &mut Get<'_>) -> Result<RingParams, Failure> {
    let most = terms.offer.max_queues;
    let protocol = get(keys::PROTOCOL)?;
    let abi = Abi::from_protocol_key(protocol.as_deref())
        .map_err(|error| Problem::new(Errno::EPROTONOSUPPORT, error.to_string()))?;
    let count = match number(get, keys::MULTI_QUEUE_NUM_QUEUES)? {
        None => 1,
        Some(count) if (1..=most).contains(&count) => count,
        Some(count) => return Err(out_of_range(keys::MULTI_QUEUE_NUM_QUEUES, count, 1, most)),
    };
    let order = number(get, keys::RING_PAGE_ORDER)?;
    let mut queues = Vec::new();
    for index in 0..count {
        // With a single queue its keys stand in the frontend's directory itself, however it was announced.
        let prefix = if count == 1 { String::new() } else { format!("{}/", keys::queue(index)) };
        queues.push(queue(&prefix, order, get)?);
    }
    refuse_sharing(&queues)?;
    Ok(RingParams {
        domid: id.domid.0,
        vdev: id.vdev.0,
        protocol: abi.protocol_name().to_owned(),
        queues,
        readonly: !terms.writable,
        persistent: features::PERSISTENT && is_set(get, keys::FEATURE_PERSISTENT)?,
        discard: terms.discard,
        polling: terms.polling,
    })
}

fn queue(prefix: &str, order: Option<u32>, get: &mut Get<'_>) -> Result<QueueParams, Failure> {
    let single = format!("{prefix}{}", keys::RING_REF);
    let ring_refs = match order {
        // Without the key only `ring-ref` counts: a previous driver may have left `ring-ref0` behind.
        None => vec![required(get, &single)?],
        Some(0) if get(&single)?.is_some_and(|value| !value.is_empty()) => vec![required(get, &single)?],
        Some(order) => {
            let order = RingOrder::new(order)
                .filter(|order| *order <= MAX_RING_ORDER)
                .ok_or_else(|| out_of_range(keys::RING_PAGE_ORDER, order, 0, MAX_RING_ORDER.get()))?;
            (0..order.pages())
                .map(|page| required(get, &format!("{single}{page}")))
                .collect::<Result<_, _>>()?
        }
    };
    let name = format!("{prefix}{}", keys::EVENT_CHANNEL);
    match required(get, &name)? {
        // Port 0 is never handed out.
        0 => Err(Problem::new(Errno::EINVAL, format!("the frontend's {name} is 0")).into()),
        port => Ok(QueueParams { ring_refs, port }),
    }
}

/// A ring page or event channel that serves two purposes would let two queues corrupt each other.
fn refuse_sharing(queues: &[QueueParams]) -> Result<(), Problem> {
    let mut refs = HashSet::new();
    if let Some(twice) = queues.iter().flat_map(|queue| &queue.ring_refs).find(|gref| !refs.insert(**gref)) {
        return Err(Problem::new(Errno::EINVAL, format!("the frontend names ring grant {twice} twice")));
    }
    let mut ports = HashSet::new();
    if let Some(twice) = queues.iter().find(|queue| !ports.insert(queue.port)) {
        return Err(Problem::new(
            Errno::EINVAL,
            format!("the frontend names event channel {} twice", twice.port),
        ));
    }
    Ok(())
}

fn number(get: &mut Get<'_>, key: &str) -> Result<Option<u32>, Failure> {
    let Some(value) = get(key)? else {
        return Ok(None);
    };
    let refuse = |error: ValueError| {
        Problem::new(Errno::EINVAL, format!("the frontend's {key} is \"{}\": {error}", Escaped(&value)))
    };
    Ok(Some(parse_u32(&value).map_err(refuse)?))
}

/// Whether a flag is set. A value that is no number counts as 0, as blkback has it: without the feature the guest is served
/// just as well.
fn is_set(get: &mut Get<'_>, key: &str) -> Result<bool, Failure> {
    Ok(get(key)?.is_some_and(|value| parse_u32(&value).is_ok_and(|number| number != 0)))
}

fn required(get: &mut Get<'_>, key: &str) -> Result<u32, Failure> {
    let missing = || Problem::new(Errno::ENOENT, format!("the frontend's {key} is missing"));
    number(get, key)?.ok_or_else(|| missing().into())
}

fn out_of_range(key: &str, value: u32, low: u32, high: u32) -> Failure {
    let message = format!("the frontend's {key} is {value}, offered are {low} to {high}");
    Problem::new(Errno::EINVAL, message).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use blkif::{DomId, VdevId};
    use proptest::prelude::*;
    use std::collections::HashMap;

    const TERMS: Terms = Terms {
        offer: Offer { max_queues: 4 },
        writable: true,
        discard: true,
        polling: Polling { duration_us: Some(50), idle_threshold: 5 },
    };
    const ONE_PAGE: [(&str, &str); 3] =
        [("ring-ref", "8"), ("event-channel", "9"), ("protocol", "x86_64-abi")];

    fn read_bytes(keys: &[(&str, &[u8])]) -> Result<RingParams, Problem> {
        let map: HashMap<String, Vec<u8>> =
            keys.iter().map(|(key, value)| ((*key).to_owned(), value.to_vec())).collect();
        let id = DeviceId { domid: DomId(7), vdev: VdevId(51712) };
        params(id, TERMS, &mut |key| Ok(map.get(key).cloned())).map_err(|failure| match failure {
            Failure::Guest(problem) => problem,
            Failure::Store(error) => panic!("{error}"),
        })
    }

    /// The keys of a one-page frontend with some of them replaced or added.
    fn read(changes: &[(&str, &str)]) -> Result<RingParams, Problem> {
        let keys: Vec<(&str, &[u8])> =
            ONE_PAGE.iter().chain(changes).map(|(key, value)| (*key, value.as_bytes())).collect();
        read_bytes(&keys)
    }

    fn without(absent: &str, changes: &[(&str, &str)]) -> Result<RingParams, Problem> {
        let kept = ONE_PAGE.iter().filter(|(key, _)| *key != absent).chain(changes);
        read_bytes(&kept.map(|(key, value)| (*key, value.as_bytes())).collect::<Vec<_>>())
    }

    fn refs(params: Result<RingParams, Problem>) -> Vec<u32> {
        params.unwrap().queues.remove(0).ring_refs
    }

    #[test]
    fn one_page_and_several_are_read() {
        let params = read(&[]).unwrap();
        assert_eq!((params.domid, params.vdev, params.readonly), (7, 51712, false));
        assert_eq!(params.protocol, "x86_64-abi");
        assert_eq!((params.discard, params.polling), (true, TERMS.polling));
        assert_eq!(params.queues, [QueueParams { ring_refs: vec![8], port: 9 }]);
        let two = [("ring-page-order", "1"), ("ring-ref0", "20"), ("ring-ref1", "21")];
        assert_eq!(refs(read(&two)), [20, 21]);
    }

    #[test]
    fn order_zero_takes_ring_ref_and_else_ring_ref0() {
        assert_eq!(refs(read(&[("ring-page-order", "0"), ("ring-ref0", "20")])), [8]);
        let zero = [("ring-page-order", "0"), ("ring-ref0", "20")];
        assert_eq!(refs(without("ring-ref", &zero)), [20]);
        assert_eq!(refs(read(&[("ring-page-order", "0"), ("ring-ref", ""), ("ring-ref0", "20")])), [20]);
    }

    #[test]
    fn several_pages_are_never_inferred_from_what_a_previous_driver_left() {
        assert_eq!(refs(read(&[("ring-ref0", "20"), ("ring-ref1", "21")])), [8]);
        assert!(without("ring-ref", &[("ring-ref0", "20")]).is_err());
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn an_absent_protocol_means_the_old_32_bit_layout() {
        assert_eq!(without("protocol", &[]).unwrap().protocol, "x86_32-abi");
    }

    #[test]
    fn grants_are_persistent_only_for_a_frontend_that_says_so_clearly() {
        assert!(!read(&[]).unwrap().persistent);
        for (value, persistent) in [
            ("1", true),
            ("2", true),
            ("0", false),
            ("", false),
            ("yes", false),
            ("-1", false),
            (" 1", false),
        ] {
            assert_eq!(read(&[("feature-persistent", value)]).unwrap().persistent, persistent, "{value:?}");
        }
    }

    #[test]
    fn an_unknown_protocol_is_refused() {
        assert!(read(&[("protocol", "sparc-abi")]).is_err());
        assert!(read(&[("protocol", "")]).is_err());
    }

    #[test]
    fn h43_numbers_are_strict() {
        let long = "1".repeat(3000);
        for value in
            ["18446744073709551616", "-1", "0x10", " 8", "8\n", "", "4294967296", "+8", long.as_str()]
        {
            for key in ["ring-ref", "event-channel", "ring-page-order", "multi-queue-num-queues"] {
                let problem = read(&[(key, value)]).unwrap_err();
                assert!(problem.message.contains(key), "{key}: {problem}");
            }
        }
        let hostile: &[u8] = b"\xff\x1b[2J\0";
        let problem =
            read_bytes(&[("ring-ref", hostile), ("event-channel", b"9"), ("protocol", b"x86_64-abi")])
                .unwrap_err();
        assert!(problem.message.is_ascii() && !problem.message.contains('\x1b'), "{problem}");
    }

    #[test]
    fn h44_orders_and_queue_counts_beyond_the_offer_are_refused() {
        for order in ["5", "31", "32", "64", "4294967295"] {
            assert!(read(&[("ring-page-order", order)]).is_err(), "{order}");
        }
        for count in ["0", "5", "65536", "4294967295"] {
            assert!(read(&[("multi-queue-num-queues", count)]).is_err(), "{count}");
        }
        assert!(read(&[("multi-queue-num-queues", "1")]).is_ok());
    }

    #[test]
    fn h45_missing_and_shared_queues_are_refused() {
        let mut keys = vec![("multi-queue-num-queues", "4")];
        let names: Vec<(String, String, String)> = (0..4)
            .map(|i| {
                (format!("queue-{i}/ring-ref"), format!("queue-{i}/event-channel"), (40 + i).to_string())
            })
            .collect();
        for (ring, port, value) in &names {
            keys.push((ring, value));
            keys.push((port, value));
        }
        assert_eq!(read(&keys).unwrap().queues.len(), 4);
        let lacking: Vec<_> = keys.iter().copied().filter(|(key, _)| *key != "queue-2/ring-ref").collect();
        assert_eq!(read(&lacking).unwrap_err().errno, Errno::ENOENT as i32);
        let same_ring = [keys.as_slice(), &[("queue-2/ring-ref", "40")]].concat();
        assert!(read(&same_ring).unwrap_err().message.contains("grant 40 twice"));
        let same_port = [keys.as_slice(), &[("queue-2/event-channel", "40")]].concat();
        assert!(read(&same_port).unwrap_err().message.contains("event channel 40 twice"));
        let pages = [("ring-page-order", "1"), ("ring-ref0", "5"), ("ring-ref1", "5")];
        assert!(read(&pages).unwrap_err().message.contains("grant 5 twice"));
    }

    #[test]
    fn h46_event_channel_zero_is_refused_and_large_ones_are_left_to_xen() {
        assert!(read(&[("event-channel", "0")]).is_err());
        assert_eq!(read(&[("event-channel", "2147483648")]).unwrap().queues[0].port, 1 << 31);
        assert_eq!(read(&[("ring-ref", "4294967295")]).unwrap().queues[0].ring_refs, [u32::MAX]);
    }

    proptest! {
        #[test]
        fn any_values_give_a_ring_within_the_offer_or_a_problem(
            values in prop::collection::hash_map(
                prop::sample::select(vec![
                    "protocol", "multi-queue-num-queues", "ring-page-order", "ring-ref", "ring-ref0", "ring-ref1",
                    "event-channel", "queue-0/ring-ref", "queue-1/ring-ref", "queue-0/event-channel",
                    "queue-1/event-channel", "feature-persistent",
                ]),
                prop_oneof![
                    4 => (0u32..6).prop_map(|number| number.to_string().into_bytes()),
                    1 => Just(b"x86_64-abi".to_vec()),
                    1 => prop::collection::vec(any::<u8>(), 0..12),
                ],
                0..10,
            ),
        ) {
            let keys: Vec<(&str, &[u8])> = values.iter().map(|(key, value)| (*key, value.as_slice())).collect();
            if let Ok(params) = read_bytes(&keys) {
                prop_assert!((1..=4).contains(&params.queues.len()));
                for queue in params.queues {
                    prop_assert!(queue.port != 0);
                    prop_assert!([1, 2, 4, 8, 16].contains(&queue.ring_refs.len()));
                }
            }
        }
    }
}
