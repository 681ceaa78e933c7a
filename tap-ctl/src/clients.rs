//! Clients of an endpoint, each with a thread.

use std::io;
use std::sync::Arc;

/// Has `attend` see to each client that `accept` brings, in a thread called `name`, for ever; more than `most` at the same time are
/// sent away.
///
/// # Errors
///
/// When no more clients can be accepted.
pub(crate) fn serve<C: Send + 'static>(
    name: &str,
    most: usize,
    mut accept: impl FnMut() -> io::Result<C>,
    attend: impl Fn(C) + Clone + Send + 'static,
) -> io::Result<()> {
    let places = Arc::new(());
    loop {
        let client = match accept() {
            Ok(client) => client,
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => return Err(error),
        };
        // Each thread has a share of it, and we have one.
        if Arc::strong_count(&places) > most {
            log::debug!("{name}: there are {most} clients already");
            continue;
        }
        let (place, attend) = (places.clone(), attend.clone());
        std::thread::Builder::new().name(name.into()).spawn(move || {
            let _place = place;
            attend(client);
        })?;
    }
}
