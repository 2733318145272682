//! One end of the tunnel over rustls with aws-lc-rs; tests/interop/run.py says how it is called and what it prints.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Instant;
use std::{env, error, process};

use aws_lc_rs::signature::{PqdsaKeyPair, ML_DSA_65_SIGNING};
use rustls::client::ResolvesClientCert;
use rustls::crypto::aws_lc_rs::{default_provider, kx_group};
use rustls::crypto::{CryptoProvider, SupportedKxGroup, WebPkiSupportedAlgorithms};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, Signer, SigningKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use rustls::{SignatureAlgorithm, SignatureScheme, StreamOwned};
use webpki::aws_lc_rs::{ML_DSA_65, ML_DSA_87};

const NEW_CONN: u8 = 1;
const DATA: u8 = 2;
const INIT: u8 = 4;
const WELCOME: u8 = 5;
const WINDOW: u8 = 6;
const EOF: u8 = 7;
const PING: u8 = 8;
const PONG: u8 = 9;
const BLOCKED: u8 = 11;

const TOTAL: usize = 1 << 20;
const OWN_WINDOW: usize = 2 * TOTAL; // so nothing has to be granted
const MOST_SENT: usize = 65527;

type Outcome<T> = Result<T, Box<dyn error::Error>>;

static ALGORITHMS: WebPkiSupportedAlgorithms = WebPkiSupportedAlgorithms {
    all: &[ML_DSA_65, ML_DSA_87],
    mapping: &[
        (SignatureScheme::ML_DSA_65, &[ML_DSA_65]),
        (SignatureScheme::ML_DSA_87, &[ML_DSA_87]),
    ],
};

/// rustls signs with ML-DSA only where somebody does it for it.
#[derive(Debug)]
struct Key(Arc<PqdsaKeyPair>);

impl SigningKey for Key {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        offered
            .contains(&SignatureScheme::ML_DSA_65)
            .then(|| Box::new(Key(self.0.clone())) as Box<dyn Signer>)
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::Unknown(9)
    }
}

impl Signer for Key {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        let mut signature = vec![0; ML_DSA_65_SIGNING.signature_len()];
        self.0
            .sign(message, &mut signature)
            .map_err(|_| rustls::Error::General("ML-DSA".into()))?;
        Ok(signature)
    }

    fn scheme(&self) -> SignatureScheme {
        SignatureScheme::ML_DSA_65
    }
}

/// A certificate that is shown whatever the other end asks for: it is to refuse what is wrong.
#[derive(Debug)]
struct Shown(Option<Arc<CertifiedKey>>);

impl ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.clone()
    }

    fn has_certs(&self) -> bool {
        self.0.is_some()
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.clone()
    }
}

fn shown(folder: &str, name: &str) -> Outcome<Arc<Shown>> {
    if name == "-" {
        return Ok(Arc::new(Shown(None)));
    }
    let chain = CertificateDer::pem_file_iter(format!("{folder}/{name}.crt"))?.collect::<Result<_, _>>()?;
    let der = PrivateKeyDer::from_pem_file(format!("{folder}/{name}.key"))?;
    let pair = PqdsaKeyPair::from_pkcs8(&ML_DSA_65_SIGNING, der.secret_der())?;
    let key = CertifiedKey::new(chain, Arc::new(Key(Arc::new(pair))));
    Ok(Arc::new(Shown(Some(Arc::new(key)))))
}

fn roots(folder: &str) -> Outcome<Arc<RootCertStore>> {
    let mut store = RootCertStore::empty();
    store.add(CertificateDer::from_pem_file(format!("{folder}/ca.crt"))?)?;
    Ok(Arc::new(store))
}

fn provider(group: &str) -> Outcome<Arc<CryptoProvider>> {
    let group: &'static dyn SupportedKxGroup = match group {
        "X25519MLKEM768" => kx_group::X25519MLKEM768,
        "X25519" => kx_group::X25519,
        other => return Err(format!("unsupported {other}").into()),
    };
    Ok(Arc::new(CryptoProvider {
        kx_groups: vec![group],
        signature_verification_algorithms: ALGORITHMS,
        ..default_provider()
    }))
}

fn send(conn: &mut impl Write, kind: u8, id: u32, payload: &[u8]) -> Outcome<()> {
    let mut frame = vec![kind];
    frame.extend(id.to_be_bytes());
    frame.extend((payload.len() as u32).to_be_bytes());
    frame.extend(payload);
    conn.write_all(&frame)?;
    Ok(conn.flush()?)
}

fn read(conn: &mut impl Read) -> Outcome<(u8, u32, Vec<u8>)> {
    let mut header = [0; 9];
    conn.read_exact(&mut header)?;
    let mut payload = vec![0; u32::from_be_bytes(header[5..].try_into()?) as usize];
    conn.read_exact(&mut payload)?;
    Ok((header[0], u32::from_be_bytes(header[1..5].try_into()?), payload))
}

/// Carries one stream: what comes goes back, or `own` goes out and comes back.
fn echo(conn: &mut (impl Read + Write), own: Option<Vec<u8>>) -> Outcome<()> {
    let is_echo = own.is_none();
    let (mut pending, mut got) = (own.clone().unwrap_or_default(), Vec::new());
    let (mut credit, mut said, mut ended) = (65536, false, !is_echo);
    let (mut sent_eof, mut got_eof) = (false, false);
    while !(sent_eof && got_eof) {
        while !pending.is_empty() && credit > 0 {
            let count = pending.len().min(credit).min(MOST_SENT);
            send(conn, DATA, 1, &pending[..count])?;
            pending.drain(..count);
            credit -= count;
            said = false;
        }
        if !pending.is_empty() && !said {
            send(conn, BLOCKED, 1, b"")?;
            said = true;
        }
        if pending.is_empty() && ended && !sent_eof {
            send(conn, EOF, 1, b"")?;
            sent_eof = true;
            continue;
        }
        match read(conn)? {
            (PING, _, payload) => send(conn, PONG, 0, &payload)?,
            (WINDOW, 1, payload) => credit += u32::from_be_bytes(payload[..].try_into()?) as usize,
            (DATA, 1, payload) => {
                if is_echo {
                    pending.extend(&payload);
                }
                got.extend(payload);
            }
            (EOF, 1, _) => (got_eof, ended) = (true, true),
            (PONG | BLOCKED, _, _) => {}
            (kind, id, _) => return Err(format!("frame {kind} for stream {id}").into()),
        }
    }
    if got.len() != TOTAL || own.is_some_and(|own| own != got) {
        return Err(format!("{} bytes came back", got.len()).into());
    }
    println!("echo {}", got.len());
    // A close with bytes unread would be a reset: so only when all that was sent has arrived.
    send(conn, PING, 0, b"the last")?;
    while read(conn)? != (PONG, 0, b"the last".to_vec()) {}
    Ok(())
}

fn client(address: &str, folder: &str, name: &str, group: &str, times: usize) -> Outcome<()> {
    let config = ClientConfig::builder_with_provider(provider(group)?)
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(roots(folder)?)
        .with_client_cert_resolver(shown(folder, name)?);
    let config = Arc::new(config);
    let host = ServerName::try_from("localhost")?;
    for _ in 1..times {
        let mut sock = TcpStream::connect(address)?;
        sock.set_nodelay(true)?;
        let mut secure = ClientConnection::new(config.clone(), host.clone())?;
        let begun = Instant::now();
        while secure.is_handshaking() || secure.wants_write() {
            secure.complete_io(&mut sock)?;
        }
        println!("handshake {}", begun.elapsed().as_micros() as f64 / 1000.0);
        secure.send_close_notify();
        secure.complete_io(&mut sock)?;
    }
    let mut conn = StreamOwned::new(ClientConnection::new(config, host)?, TcpStream::connect(address)?);
    let instance = format!("{:032x}", process::id());
    let text = format!("0:127.0.0.1:80\nversion=1\nwindow={OWN_WINDOW}\ninstance={instance}");
    send(&mut conn, INIT, 0, text.as_bytes())?;
    send(&mut conn, PING, 0, b"12345678")?;
    loop {
        match read(&mut conn)? {
            (WELCOME, _, payload) => {
                for line in String::from_utf8(payload)?.lines() {
                    if let Some(port) = line.strip_prefix("port=") {
                        println!("welcome {port}");
                    }
                }
            }
            (PING, _, payload) => send(&mut conn, PONG, 0, &payload)?,
            (NEW_CONN, _, _) => break,
            _ => {}
        }
    }
    echo(&mut conn, None)?;
    conn.conn.send_close_notify();
    Ok(conn.conn.complete_io(&mut conn.sock).map(|_| ())?)
}

fn server(folder: &str, name: &str, group: &str) -> Outcome<()> {
    let provider = provider(group)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(folder)?, provider.clone()).build()?;
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(shown(folder, name)?);
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("listening {}", listener.local_addr()?.port());
    let (mut sock, _) = listener.accept()?;
    sock.set_nodelay(true)?;
    let mut secure = ServerConnection::new(Arc::new(config))?;
    let begun = Instant::now();
    while secure.is_handshaking() {
        secure.complete_io(&mut sock)?;
    }
    println!("handshake {}", begun.elapsed().as_micros() as f64 / 1000.0);
    let mut conn = StreamOwned::new(secure, sock);
    if read(&mut conn)?.0 != INIT {
        return Err("no INIT".into());
    }
    println!("init");
    let text = format!("version=1\nport=4711\nwindow={OWN_WINDOW}");
    send(&mut conn, WELCOME, 0, text.as_bytes())?;
    send(&mut conn, PING, 0, b"12345678")?;
    send(&mut conn, NEW_CONN, 1, b"203.0.113.7:51234")?;
    echo(&mut conn, Some(b"0123456789abcdef".repeat(TOTAL / 16)))?;
    conn.conn.send_close_notify();
    Ok(conn.conn.complete_io(&mut conn.sock).map(|_| ())?)
}

fn main() {
    let words: Vec<String> = env::args().collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let outcome = match words[1..] {
        ["version"] => {
            let lock = include_str!("../Cargo.lock");
            let version = |name: &str| {
                let behind = lock.split(&format!("name = \"{name}\"\nversion = \"")).nth(1);
                behind.and_then(|text| text.split('"').next()).unwrap_or("?").to_owned()
            };
            println!("rustls {}, aws-lc-rs {}", version("rustls"), version("aws-lc-rs"));
            Ok(())
        }
        ["client", address, folder, name, group, times] => {
            client(address, folder, name, group, times.parse().unwrap_or(1))
        }
        ["server", folder, name, group] => server(folder, name, group),
        _ => Err("unknown arguments".into()),
    };
    if let Err(error) = outcome {
        let text = error.to_string();
        println!("{}{text}", if text.starts_with("unsupported ") { "" } else { "failed " });
        process::exit(1);
    }
}
