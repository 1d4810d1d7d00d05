//! Whom an encrypted connection trusts, and who we are on it: rustls settings for Postgres and Redis alike.
//!
//! Knows files and certificates, no protocol. Files are read anew for each connection, so that a renewed certificate
//! counts without a restart. Wrong here means: a stranger reads along, or is taken for the server.

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio_rustls::rustls;

/// What has to be right about the server's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verify {
    /// Nothing: against listeners only.
    Nothing,
    /// Somebody that we trust signed it.
    Chain,
    /// And it names the host that we asked for.
    ChainAndHost,
}

/// Whose signature counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Roots {
    /// The machine's own store.
    System,
    /// PEM.
    File(PathBuf),
}

/// Our own certificate and its key, PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsSettings {
    pub verify: Verify,
    pub roots: Roots,
    pub identity: Option<Identity>,
}

/// A file that should hold certificates or a key does not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    #[error("{} cannot be read as PEM: {error}", path.display())]
    Pem { path: PathBuf, error: String },
    #[error("{} holds no certificate: it must be PEM, with BEGIN CERTIFICATE", path.display())]
    NoCertificate { path: PathBuf },
    #[error("this machine has no root certificates: install ca-certificates, or name a file of them")]
    NoSystemRoots,
    #[error("the certificate {} and the key {} cannot be used: {error}", certificate.display(), key.display())]
    Identity { certificate: PathBuf, key: PathBuf, error: String },
    #[error("TLS cannot be set up: {0}")]
    Setup(String),
}

impl TlsSettings {
    /// Reads the files.
    pub fn client_config(&self) -> Result<Arc<ClientConfig>, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone());
        let builder = builder.with_safe_default_protocol_versions().map_err(setup)?;
        let verifier = Arc::new(Verifier { verify: self.verify, chain: self.chain(&provider)?, provider });
        let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
        let config = match &self.identity {
            None => builder.with_no_client_auth(),
            Some(Identity { certificate, key }) => {
                let chain = certificates(certificate)?;
                let secret = PrivateKeyDer::from_pem_file(key)
                    .map_err(|error| TlsError::Pem { path: key.clone(), error: error.to_string() })?;
                builder.with_client_auth_cert(chain, secret).map_err(|error| TlsError::Identity {
                    certificate: certificate.clone(),
                    key: key.clone(),
                    error: error.to_string(),
                })?
            }
        };
        Ok(Arc::new(config))
    }

    /// `None` where nothing is to be verified.
    fn chain(&self, provider: &Arc<CryptoProvider>) -> Result<Option<Arc<WebPkiServerVerifier>>, TlsError> {
        if self.verify == Verify::Nothing {
            return Ok(None);
        }
        let found = match &self.roots {
            Roots::File(path) => certificates(path)?,
            Roots::System => rustls_native_certs::load_native_certs().certs,
        };
        let mut roots = RootCertStore::empty();
        let (taken, _) = roots.add_parsable_certificates(found);
        match (&self.roots, taken) {
            (Roots::File(path), 0) => return Err(TlsError::NoCertificate { path: path.clone() }),
            (Roots::System, 0) => return Err(TlsError::NoSystemRoots),
            (Roots::File(_) | Roots::System, _) => {}
        }
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build();
        verifier.map(Some).map_err(|error| TlsError::Setup(error.to_string()))
    }
}

fn setup(error: Error) -> TlsError {
    TlsError::Setup(error.to_string())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let unreadable =
        |error: rustls::pki_types::pem::Error| TlsError::Pem { path: path.to_owned(), error: error.to_string() };
    let found = CertificateDer::pem_file_iter(path).map_err(unreadable)?;
    let found = found.collect::<Result<Vec<_>, _>>().map_err(unreadable)?;
    if found.is_empty() { Err(TlsError::NoCertificate { path: path.to_owned() }) } else { Ok(found) }
}

/// As strict as it is told to be; whoever is at the other end must always prove to hold the certificate's key.
#[derive(Debug)]
struct Verifier {
    verify: Verify,
    chain: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        match chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            // The name is looked at last: everything else was right.
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if self.verify == Verify::Chain => Ok(ServerCertVerified::assertion()),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
