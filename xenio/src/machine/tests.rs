//! The rules of the module's documentation, each checked on every view there is.

use super::*;

const PHASES: [Phase; 5] =
    [Phase::Initialising, Phase::InitWait, Phase::Connected, Phase::Closing, Phase::Closed];

const STATES: [XenbusState; 9] = [
    XenbusState::Unknown,
    XenbusState::Initialising,
    XenbusState::InitWait,
    XenbusState::Initialised,
    XenbusState::Connected,
    XenbusState::Closing,
    XenbusState::Closed,
    XenbusState::Reconfiguring,
    XenbusState::Reconfigured,
];

fn owns() -> Vec<Own> {
    [Own::Absent, Own::Odd].into_iter().chain(PHASES.map(Own::Is)).collect()
}

fn frontends() -> Vec<Frontend> {
    [Frontend::Gone, Frontend::Bogus].into_iter().chain(STATES.map(Frontend::Is)).collect()
}

/// Calls `check` with every view.
fn every_view(mut check: impl FnMut(View)) {
    let bit = |bits: u32, position: u32| bits >> position & 1 == 1;
    for own in owns() {
        for frontend in frontends() {
            for tap in [Tap::Unnamed, Tap::New, Tap::Asking, Tap::Ready, Tap::Lost] {
                for ring in [Ring::Unknown, Ring::Down, Ring::Busy, Ring::Up] {
                    for bits in 0..1 << 8 {
                        check(View {
                            own,
                            frontend,
                            online: bit(bits, 0),
                            hotplug: bit(bits, 1),
                            defect: bit(bits, 2),
                            tap,
                            ring,
                            moved: bit(bits, 3),
                            announced: bit(bits, 4),
                            published: bit(bits, 5),
                            problem: bit(bits, 6),
                            failed: bit(bits, 7),
                        });
                    }
                }
            }
        }
    }
}

fn usual(own: Phase, frontend: XenbusState) -> View {
    View {
        own: Own::Is(own),
        frontend: Frontend::Is(frontend),
        online: true,
        hotplug: true,
        defect: false,
        tap: Tap::Ready,
        ring: Ring::Down,
        moved: false,
        announced: false,
        published: true,
        problem: false,
        failed: false,
    }
}

/// What the world may look like after an action has been carried out.
fn outcomes(view: View, action: Action) -> Vec<View> {
    let own = |phase| View { own: Own::Is(phase), ..view };
    match action {
        Action::InitWait => vec![View { problem: false, ..own(Phase::InitWait) }],
        Action::Publish => vec![View { published: true, ..view }],
        Action::Resize => vec![View { published: true, ..view }],
        Action::Announce => vec![View { announced: true, published: true, ..own(Phase::Connected) }],
        Action::Closing => vec![own(Phase::Closing)],
        Action::Closed => vec![View { problem: false, ..own(Phase::Closed) }],
        Action::Fail => vec![View { failed: true, problem: false, ..own(Phase::Closing) }],
        Action::Ask => {
            let found =
                |ring| View { tap: Tap::Ready, ring, announced: ring == Ring::Up, moved: false, ..view };
            let mut after = vec![found(Ring::Down), View { tap: Tap::Lost, ring: Ring::Down, ..view }];
            if view.ring == Ring::Unknown {
                after.push(found(Ring::Up));
            }
            after
        }
        Action::Connect => {
            let up = View { ring: Ring::Up, announced: false, moved: false, ..view };
            let died = View { tap: Tap::Lost, ..view };
            vec![up, died, View { problem: true, ..view }]
        }
        Action::Disconnect => vec![View { ring: Ring::Down, ..view }, View { ring: Ring::Busy, ..view }],
        Action::Forget => Vec::new(),
    }
}

#[test]
fn acting_again_and_again_comes_to_rest() {
    fn settles(view: View, steps: u32, start: View) {
        assert!(steps < 16, "no end from {start:?}, now {view:?}");
        if let Some(action) = decide(&view) {
            for next in outcomes(view, action) {
                settles(next, steps + 1, start);
            }
        }
    }
    every_view(|view| settles(view, 0, view));
}

#[test]
fn a_ring_is_connected_only_with_hotplug_tapdisk_and_a_frontend_that_has_one() {
    every_view(|view| {
        if decide(&view) == Some(Action::Connect) {
            assert!(view.hotplug && view.tap == Tap::Ready && view.ring == Ring::Down, "{view:?}");
            assert!(view.frontend.has_ring() && view.published && !view.defect, "{view:?}");
        }
    });
}

#[test]
fn connected_is_written_only_for_a_ring_that_is_up() {
    every_view(|view| {
        if decide(&view) == Some(Action::Announce) {
            assert!(view.ring == Ring::Up && view.frontend.has_ring() && !view.announced, "{view:?}");
        }
    });
}

#[test]
fn a_size_is_told_only_to_a_frontend_in_operation_and_once() {
    every_view(|view| {
        if decide(&view) == Some(Action::Resize) {
            assert_eq!((view.own, view.ring), (Own::Is(Phase::Connected), Ring::Up), "{view:?}");
            assert!(view.announced && !view.moved && !view.published && !view.problem, "{view:?}");
            assert_eq!(decide(&View { published: true, ..view }), None, "{view:?}");
        }
    });
    let grown = View {
        ring: Ring::Up,
        announced: true,
        published: false,
        ..usual(Phase::Connected, XenbusState::Connected)
    };
    assert_eq!(decide(&grown), Some(Action::Resize));
}

#[test]
fn a_failed_disk_is_reported_under_its_guest_and_not_connected_again() {
    let failed = View {
        tap: Tap::Lost,
        ring: Ring::Up,
        announced: true,
        problem: true,
        ..usual(Phase::Connected, XenbusState::Connected)
    };
    assert_eq!(decide(&failed), Some(Action::Fail));
    let again = View { ring: Ring::Down, announced: false, problem: false, ..failed };
    for phase in [Phase::InitWait, Phase::Connected] {
        assert_eq!(decide(&View { own: Own::Is(phase), ..again }), Some(Action::Fail));
    }
}

#[test]
fn closed_is_written_only_after_the_ring_is_down() {
    every_view(|view| {
        if decide(&view) == Some(Action::Closed) {
            assert!(view.ring == Ring::Down && view.own != Own::Is(Phase::Closed), "{view:?}");
        }
    });
}

#[test]
fn no_state_is_written_twice_except_connected_for_a_new_ring_or_size() {
    every_view(|view| {
        let written = match decide(&view) {
            Some(Action::InitWait) => Phase::InitWait,
            Some(Action::Closing) => Phase::Closing,
            Some(Action::Closed) => Phase::Closed,
            _ => return,
        };
        assert_ne!(view.own, Own::Is(written), "{view:?}");
    });
}

#[test]
fn nothing_is_written_without_a_directory_or_into_an_odd_one() {
    every_view(|view| {
        let action = decide(&view);
        match view.own {
            Own::Absent => {
                assert!(matches!(action, None | Some(Action::Disconnect | Action::Forget)), "{view:?}");
                assert_eq!(action == Some(Action::Forget), view.ring == Ring::Down, "{view:?}");
            }
            Own::Odd => assert_eq!(action, None, "{view:?}"),
            Own::Is(_) => assert_ne!(action, Some(Action::Forget), "{view:?}"),
        }
    });
}

#[test]
fn init_wait_needs_neither_frontend_nor_hotplug_nor_tapdisk() {
    every_view(|view| {
        let closing = matches!(
            view.frontend,
            Frontend::Gone | Frontend::Is(XenbusState::Closing) | Frontend::Is(XenbusState::Closed)
        );
        let fresh = view.own == Own::Is(Phase::Initialising) && view.online && view.ring == Ring::Down;
        if fresh && !closing && !view.defect && !view.problem {
            assert_eq!(decide(&view), Some(Action::InitWait), "{view:?}");
        }
    });
}

#[test]
fn closing_is_answered_by_closing_and_the_ring_stays() {
    every_view(|view| {
        let Own::Is(phase) = view.own else { return };
        if view.frontend != Frontend::Is(XenbusState::Closing) || view.defect {
            return;
        }
        let settled = phase == Phase::Closing || (phase == Phase::Closed && !view.online);
        assert_eq!(decide(&view), (!settled).then_some(Action::Closing), "{view:?}");
    });
}

#[test]
fn closed_and_vanished_frontends_lead_to_closed_and_nothing_else() {
    every_view(|view| {
        let Own::Is(phase) = view.own else { return };
        if !matches!(view.frontend, Frontend::Gone | Frontend::Is(XenbusState::Closed)) || view.defect {
            return;
        }
        let expected = match view.ring {
            Ring::Up | Ring::Unknown => Some(Action::Disconnect),
            Ring::Busy => None,
            Ring::Down => (phase != Phase::Closed).then_some(Action::Closed),
        };
        assert_eq!(decide(&view), expected, "{view:?}");
    });
}

#[test]
fn the_toolstacks_closing_without_a_live_frontend_leads_to_closed() {
    for frontend in [Frontend::Is(XenbusState::Initialising), Frontend::Is(XenbusState::InitWait)] {
        for online in [false, true] {
            let view = View { frontend, online, ..usual(Phase::Closing, XenbusState::Unknown) };
            assert_eq!(decide(&view), Some(Action::Closed), "{view:?}");
        }
    }
    let bogus = View { frontend: Frontend::Bogus, ..usual(Phase::Closing, XenbusState::Unknown) };
    assert_eq!(decide(&bogus), None);
    assert_eq!(decide(&View { online: false, ..bogus }), Some(Action::Closed));
    assert_eq!(decide(&View { online: false, ring: Ring::Up, ..bogus }), Some(Action::Disconnect));
}

#[test]
fn the_toolstacks_closing_with_a_live_frontend_waits_for_it() {
    for state in [XenbusState::Initialised, XenbusState::Connected, XenbusState::Closing] {
        let view = View { online: false, ring: Ring::Up, announced: true, ..usual(Phase::Closing, state) };
        assert_eq!(decide(&view), None, "{view:?}");
    }
}

#[test]
fn a_frontend_that_begins_anew_after_closed_gets_init_wait_while_online() {
    let view = usual(Phase::Closed, XenbusState::Initialising);
    assert_eq!(decide(&view), Some(Action::InitWait));
    assert_eq!(decide(&View { online: false, ..view }), None);
    assert_eq!(decide(&View { failed: true, ..view }), None);
}

#[test]
fn firmware_that_goes_straight_to_connected_is_served() {
    assert_eq!(decide(&usual(Phase::InitWait, XenbusState::Connected)), Some(Action::Connect));
    assert_eq!(decide(&usual(Phase::Closed, XenbusState::Connected)), Some(Action::Connect));
}

#[test]
fn a_dead_tapdisk_is_reported_once_and_closing_waits_for_the_frontend() {
    let dead = View { tap: Tap::Lost, ..usual(Phase::Connected, XenbusState::Connected) };
    assert_eq!(decide(&dead), Some(Action::Fail));
    let reported = View { failed: true, own: Own::Is(Phase::Closing), ..dead };
    assert_eq!(decide(&reported), None);
    let closed = View { frontend: Frontend::Is(XenbusState::Closed), ..reported };
    assert_eq!(decide(&closed), Some(Action::Closed));
}

#[test]
fn no_attempt_follows_a_failure_before_the_frontend_closes() {
    every_view(|view| {
        let settled = !matches!(view.own, Own::Is(Phase::Initialising | Phase::InitWait | Phase::Connected));
        if view.failed && settled {
            let begins = [Action::InitWait, Action::Connect, Action::Announce, Action::Ask, Action::Publish];
            assert_ne!(decide(&view), Some(Action::Resize), "{view:?}");
            assert!(!decide(&view).is_some_and(|action| begins.contains(&action)), "{view:?}");
        }
    });
}

#[test]
fn a_restarted_xenio_asks_and_then_leaves_a_served_device_alone() {
    let found =
        View { tap: Tap::New, ring: Ring::Unknown, ..usual(Phase::Connected, XenbusState::Connected) };
    assert_eq!(decide(&found), Some(Action::Ask));
    let served = View { tap: Tap::Ready, ring: Ring::Up, announced: true, published: false, ..found };
    // The disk may have grown meanwhile.
    assert_eq!(decide(&served), Some(Action::Resize));
    assert_eq!(decide(&View { published: true, ..served }), None);
    // A frontend that waits has published a ring that nobody may have connected yet.
    let waiting = View { frontend: Frontend::Is(XenbusState::Initialised), ..found };
    assert_eq!(decide(&waiting), Some(Action::Disconnect));
    let lost = View { tap: Tap::Ready, ring: Ring::Down, ..found };
    assert_eq!(decide(&lost), Some(Action::Connect));
}

#[test]
fn a_frontend_resumed_in_place_is_connected_anew() {
    let moved = View {
        ring: Ring::Up,
        announced: true,
        moved: true,
        ..usual(Phase::Connected, XenbusState::Initialised)
    };
    assert_eq!(decide(&moved), Some(Action::Disconnect));
    assert_eq!(decide(&View { moved: false, ..moved }), None);
    assert_eq!(decide(&View { ring: Ring::Down, ..moved }), Some(Action::Connect));
}

#[test]
fn closing_then_a_new_ring_without_closed_is_disconnect_and_connect() {
    let back = View { ring: Ring::Up, announced: true, ..usual(Phase::Closing, XenbusState::Initialised) };
    assert_eq!(decide(&back), Some(Action::Disconnect));
    assert_eq!(decide(&View { ring: Ring::Down, announced: false, ..back }), Some(Action::Connect));
}

#[test]
fn a_defective_device_is_reported_closed_and_never_served() {
    every_view(|view| {
        if view.defect {
            let allowed = [Action::Fail, Action::Disconnect, Action::Closed, Action::Forget];
            assert!(decide(&view).is_none_or(|action| allowed.contains(&action)), "{view:?}");
        }
    });
}

#[test]
fn h50_nonsense_from_the_frontend_changes_nothing_for_a_device_in_operation() {
    let served = View { ring: Ring::Up, announced: true, ..usual(Phase::Connected, XenbusState::Connected) };
    for frontend in [
        Frontend::Bogus,
        Frontend::Is(XenbusState::Unknown),
        Frontend::Is(XenbusState::InitWait),
        Frontend::Is(XenbusState::Reconfiguring),
        Frontend::Is(XenbusState::Reconfigured),
    ] {
        assert_eq!(decide(&View { frontend, ..served }), None, "{frontend:?}");
    }
}
