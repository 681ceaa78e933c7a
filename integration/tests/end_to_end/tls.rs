//! A disk on a TCP port by TLS, under other people's clients with certificates that are right and wrong.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Child;

use integration::rig::Rig;
use nbd::wire::{OPTION_MAGIC, OPTION_REPLY_MAGIC};

use crate::nbd::{run, serve, succeed};
use crate::support::{MIB, pattern, raw, rig};

/// Who signs, and whom: our server, a client, one whose certificate is revoked, and one who is signed by somebody else.
struct Certificates(tempfile::TempDir);

/// What OpenSSL has to know: the kinds of certificates, and what a list of revoked ones needs.
const CONFIG: &str = "\
[req]\n\
distinguished_name = name\n\
[name]\n\
[signer]\n\
basicConstraints = critical, CA:TRUE\n\
[signed]\n\
basicConstraints = CA:FALSE\n\
subjectAltName = DNS:localhost, IP:127.0.0.1\n\
[ca]\n\
default_ca = us\n\
[us]\n\
database = DIR/index\n\
crlnumber = DIR/number\n\
default_md = sha256\n\
default_crl_days = 2\n";

impl Certificates {
    /// `None` where there is no OpenSSL.
    fn new() -> Option<Certificates> {
        let made = Certificates(tempfile::tempdir().unwrap());
        std::fs::write(made.path("config"), CONFIG.replace("DIR", made.0.path().to_str().unwrap())).unwrap();
        std::fs::write(made.path("index"), "").unwrap();
        std::fs::write(made.path("number"), "01\n").unwrap();
        for signer in ["ours", "others"] {
            made.sign(None, signer, signer, "ca")?;
        }
        made.sign(Some("ours"), "server", "server", "server")?;
        made.copy("ours/ca-cert.pem", "server/ca-cert.pem");
        for (signer, client) in [("ours", "client"), ("ours", "revoked"), ("others", "stranger")] {
            made.sign(Some(signer), client, client, "client")?;
            // All of them know us.
            made.copy("ours/ca-cert.pem", &format!("{client}/ca-cert.pem"));
        }
        std::fs::create_dir(made.path("nobody")).unwrap();
        made.copy("ours/ca-cert.pem", "nobody/ca-cert.pem");
        Some(made)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn copy(&self, from: &str, to: &str) {
        std::fs::copy(self.path(from), self.path(to)).unwrap();
    }

    /// A certificate and its key, in a folder; signed by itself where there is no signer.
    fn sign(&self, signer: Option<&str>, name: &str, folder: &str, kind: &str) -> Option<()> {
        std::fs::create_dir(self.path(folder)).unwrap();
        let (config, subject) = (self.text("config"), format!("/CN={name}"));
        let (key, certificate) =
            (self.text(&format!("{folder}/{kind}-key.pem")), self.text(&format!("{folder}/{kind}-cert.pem")));
        let mut args = vec!["req", "-x509", "-config", &config, "-days", "2", "-nodes", "-subj", &subject];
        args.extend(["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]);
        args.extend(["-keyout", &key, "-out", &certificate]);
        args.extend(["-extensions", if signer.is_some() { "signed" } else { "signer" }]);
        let signed_by =
            signer.map(|signer| ["cert", "key"].map(|what| self.text(&format!("{signer}/ca-{what}.pem"))));
        if let Some([certificate, key]) = &signed_by {
            args.extend(["-CA", certificate, "-CAkey", key]);
        }
        succeed("openssl", &args).map(drop)
    }

    /// From now on a client is not to be let in any more.
    fn revoke(&self, client: &str) {
        let certificate = self.text(&format!("{client}/client-cert.pem"));
        let [config, cert, key] =
            ["config", "ours/ca-cert.pem", "ours/ca-key.pem"].map(|name| self.text(name));
        let common = ["ca", "-config", &config, "-cert", &cert, "-keyfile", &key];
        succeed("openssl", &[&common[..], &["-revoke", &certificate]].concat()).unwrap();
        let list = self.text("server/ca-crl.pem");
        succeed("openssl", &[&common[..], &["-gencrl", "-out", &list]].concat()).unwrap();
    }
}

/// A running `tap-ctl nbd-tls`.
struct Door {
    process: Child,
    port: String,
}

impl Door {
    fn open(rig: &Rig, (pid, minor): (i32, &str), certificates: &Path) -> Door {
        let (pid, folder) = (pid.to_string(), certificates.to_str().unwrap());
        let args = ["nbd-tls", "-p", &pid, "-m", minor, "-l", "127.0.0.1:0", "-c", folder];
        let mut process = rig.start_tap_ctl(&args);
        let mut line = String::new();
        BufReader::new(process.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let Some(port) = line.trim_end().strip_prefix("nbds://127.0.0.1:") else {
            let mut why = String::new();
            process.stderr.as_mut().unwrap().read_to_string(&mut why).unwrap();
            panic!("{line:?}: {why}");
        };
        Door { port: port.to_owned(), process }
    }

    /// For a client with what is in a folder.
    fn uri(&self, client: &Path) -> String {
        format!("nbds://localhost:{}/?tls-certificates={}", self.port, client.display())
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// What a connection brings until it ends, after the bytes that are sent.
fn answers(port: &str, said: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(format!("127.0.0.1:{port}")).unwrap();
    stream.write_all(said).unwrap();
    let mut heard = Vec::new();
    // Bytes that the other side has not read when it closes reset the connection.
    let _ = stream.read_to_end(&mut heard);
    heard
}

#[test]
fn m81_plain_text_behind_a_request_for_tls_is_not_heard() {
    let rig = rig();
    let Some(certificates) = Certificates::new() else { return };
    let (socket, minor) = serve(&rig, &["-a", &raw(&rig, "disk.img", MIB).1]);
    let pid = rig.host.control().parse_vbd_path(&socket).unwrap().0;
    let door = Door::open(&rig, (pid, &minor), &certificates.path("server"));
    let option = |number: u32| [&OPTION_MAGIC.to_be_bytes()[..], &number.to_be_bytes(), &[0; 4]].concat();
    let (starttls, list) = (option(5), option(3));
    let heard = answers(&door.port, &[&3_u32.to_be_bytes()[..], &starttls, &list].concat());
    // The greeting and the consent, then at most an alert.
    let consent =
        [&OPTION_REPLY_MAGIC.to_be_bytes()[..], &starttls[8..12], &[0, 0, 0, 1, 0, 0, 0, 0]].concat();
    assert_eq!(heard[18..38], consent);
    assert!(!heard[38..].windows(8).any(|bytes| bytes == OPTION_REPLY_MAGIC.to_be_bytes()), "{heard:?}");
}

#[test]
fn a_disk_is_had_by_tls_with_a_certificate_and_not_otherwise() {
    let rig = rig();
    let Some(certificates) = Certificates::new() else { return };
    let (image, params) = raw(&rig, "disk.img", 8 * MIB);
    let (socket, minor) = serve(&rig, &["-a", &params]);
    let pid = rig.host.control().parse_vbd_path(&socket).unwrap().0;
    let door = Door::open(&rig, (pid, &minor), &certificates.path("server"));
    let client = door.uri(&certificates.path("client"));
    let Some(told) = succeed("nbdinfo", &["--json", &client]) else { return };
    for fact in ["\"TLS\": true", "\"export-size\": 8388608", "\"can_multi_conn\": true", "base:allocation"] {
        assert!(told.contains(fact), "{fact}: {told}");
    }
    // Much at once and both ways.
    let (source, target) = (rig.path("source"), rig.path("target"));
    let content = pattern(3, 8 * MIB);
    std::fs::write(&source, &content).unwrap();
    succeed("nbdcopy", &["--flush", source.to_str().unwrap(), &client]).unwrap();
    assert!(std::fs::read(&image).unwrap() == content);
    succeed("nbdcopy", &[&client, target.to_str().unwrap()]).unwrap();
    assert!(std::fs::read(&target).unwrap() == content);
    let credentials = format!("tls-creds-x509,id=us,endpoint=client,dir={}", certificates.text("client"));
    let options = format!("driver=nbd,host=localhost,port={},tls-creds=us", door.port);
    let qemu_io = [
        "--object",
        &credentials,
        "--image-opts",
        "-c",
        "write -P 9 1M 2M",
        "-c",
        "read -P 9 1M 2M",
        &options,
    ];
    let done = succeed("qemu-io", &qemu_io).unwrap();
    assert!(!done.contains("failed"), "{done}");
    assert!(std::fs::read(&image).unwrap()[MIB..3 * MIB].iter().all(|&byte| byte == 9));

    // Another process serves the disk now.
    assert_eq!(rig.tap_ctl(&["upgrade", "--all"]).code, 0);
    succeed("nbdinfo", &["--size", &client]).unwrap();

    let refused = |uri: &str, why: &str| {
        let output = run("nbdinfo", &["--size", uri]).unwrap();
        assert!(!output.status.success() && output.stdout.is_empty(), "{why}: {output:?}");
    };
    refused(&format!("nbd://localhost:{}", door.port), "clear text");
    refused(&door.uri(&certificates.path("stranger")), "signed by somebody else");
    refused(&door.uri(&certificates.path("nobody")), "no certificate");
    succeed("nbdinfo", &["--size", &door.uri(&certificates.path("revoked"))]).unwrap();
    certificates.revoke("revoked");
    drop(door);
    let pid =
        rig.tap_ctl(&["list"]).out.split_once("pid=").unwrap().1.split_once(' ').unwrap().0.parse().unwrap();
    let door = Door::open(&rig, (pid, &minor), &certificates.path("server"));
    refused(&door.uri(&certificates.path("revoked")), "revoked");
    succeed("nbdinfo", &["--size", &door.uri(&certificates.path("client"))]).unwrap();
}
