//! The files of a folder of certificates, named as QEMU and libnbd name them.
//!
//! | file | holds |
//! |---|---|
//! | `ca-cert.pem` | who signs the certificates of clients |
//! | `ca-crl.pem`, if it is there | which of those are revoked |
//! | `server-cert.pem` | our own certificate, and others up to one that clients know |
//! | `server-key.pem` | its key |
//!
//! A client without a certificate is refused: there is no other authentication.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};

/// What is wrong with a folder.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// A file cannot be read, or holds something else.
    #[error("{}: {why}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: pem::Error,
    },
    /// Nothing in a file is a certificate.
    #[error("{}: there is no certificate in it", .0.display())]
    Empty(PathBuf),
    /// Those who sign cannot be used.
    #[error("ca-cert.pem or ca-crl.pem: {0}")]
    Authority(#[from] VerifierBuilderError),
    /// The certificates cannot be used, or do not belong to the key.
    #[error(transparent)]
    Tls(#[from] rustls::Error),
}

/// Everything of one kind in a file.
fn all<T: PemObject>(path: PathBuf) -> Result<Vec<T>, Unusable> {
    let read = T::pem_file_iter(&path).and_then(Iterator::collect::<Result<Vec<T>, _>>);
    match read {
        Ok(found) if found.is_empty() => Err(Unusable::Empty(path)),
        Ok(found) => Ok(found),
        Err(why) => Err(Unusable::File { path, why }),
    }
}

/// TLS 1.2 and 1.3, with a certificate on each side.
pub(super) fn config(folder: &Path) -> Result<Arc<ServerConfig>, Unusable> {
    let mut signers = RootCertStore::empty();
    for signer in all::<CertificateDer<'_>>(folder.join("ca-cert.pem"))? {
        signers.add(signer)?;
    }
    let revoked = folder.join("ca-crl.pem");
    let revoked =
        if revoked.exists() { all::<CertificateRevocationListDer<'_>>(revoked)? } else { Vec::new() };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let clients = WebPkiClientVerifier::builder_with_provider(signers.into(), provider.clone())
        .with_crls(revoked)
        .build()?;
    let ours = all(folder.join("server-cert.pem"))?;
    let key = folder.join("server-key.pem");
    let key = PrivateKeyDer::from_pem_file(&key).map_err(|why| Unusable::File { path: key, why })?;
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(clients)
        .with_single_cert(ours, key)?;
    Ok(config.into())
}
