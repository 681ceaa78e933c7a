//! What comes before a certificate is needed; the rest is tested with other people's clients, by the end-to-end tests.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::UnixListener;

use super::*;

/// Our side and the other side of a connection.
fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let theirs = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (listener.accept().unwrap().0, theirs)
}

/// What is done with a client that says this.
fn guarded(said: &[u8], patience: Duration) -> io::Result<HandshakeFlags> {
    let (ours, mut theirs) = connection();
    theirs.write_all(said).unwrap();
    guard(&mut Within { client: &ours, end: Instant::now() + patience })
}

fn option(number: u32) -> Vec<u8> {
    [&OPTION_MAGIC.to_be_bytes()[..], &number.to_be_bytes(), &[0; 4]].concat()
}

#[test]
fn a_client_comes_to_tls_only_by_asking_for_it() {
    let flags = 3_u32.to_be_bytes();
    let asks = [&flags[..], &option(3), &option(5)].concat();
    assert_eq!(guarded(&asks, PATIENCE).unwrap(), HandshakeFlags::ALL);
    let abort = [&flags[..], &option(2)].concat();
    assert!(guarded(&abort, PATIENCE).is_err());
}

#[test]
fn a_client_that_says_too_little_is_given_up() {
    let error = guarded(&[0, 0], Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock), "{error}");
}

#[test]
fn the_disk_is_told_what_the_client_has_said() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    for (greets_with, is_ours) in [(MAGIC, true), (OPTION_MAGIC, false)] {
        std::thread::scope(|scope| {
            let begun = scope.spawn(|| begin(&socket, HandshakeFlags::ALL));
            let (mut server, _) = listener.accept().unwrap();
            server.write_all(&greets_with.to_be_bytes()).unwrap();
            server.write_all(&[&OPTION_MAGIC.to_be_bytes()[..], &[0, 3]].concat()).unwrap();
            let begun = begun.join().unwrap();
            assert_eq!(begun.is_ok(), is_ours, "{begun:?}");
            let mut flags = [0; 4];
            assert_eq!((server.read_exact(&mut flags).is_ok(), flags[3] == 3), (is_ours, is_ours));
        });
    }
}

#[test]
fn a_folder_without_certificates_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let address = (Ipv4Addr::LOCALHOST, 0).into();
    let error = Door::open(address, folder.path(), "/nowhere".into()).unwrap_err().to_string();
    assert!(error.contains("ca-cert.pem"), "{error}");
    std::fs::write(folder.path().join("ca-cert.pem"), "nothing").unwrap();
    let error = Door::open(address, folder.path(), "/nowhere".into()).unwrap_err().to_string();
    assert!(error.contains("there is no certificate in it"), "{error}");
}
