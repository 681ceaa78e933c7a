//! What may be asked of an open, and is not offered. To ignore it would give the caller another disk than the one asked for.

use tap_ctl::proto::OpenParams;

/// The name of the first thing in `params` that is not offered.
pub(super) fn refusal(params: &OpenParams) -> Option<&'static str> {
    let asked = [(params.standby, "a secondary image that waits (-s)")];
    asked.into_iter().find_map(|(asked, name)| asked.then_some(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_image_is_offered_and_what_is_not_is_named() {
        let plain = OpenParams::new("vhd:/a".parse().unwrap());
        assert_eq!(refusal(&plain), None);
        let asked = OpenParams { standby: true, ..plain };
        assert_eq!(refusal(&asked), Some("a secondary image that waits (-s)"));
    }
}
