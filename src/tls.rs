//! The TLS settings for Postgres and Redis: which certificates are trusted, and which one we present.
//!
//! Knows files and certificates, but no protocols. Files are read again for each connection, so that a renewed
//! certificate takes effect without a restart. A mistake here lets a third party read the connection or pose as the
//! server.

use ::ring::digest::{SHA256, SHA384, SHA512, digest};
use der::asn1::ObjectIdentifier;
use der::{Decode, Reader, SliceReader, TagMode, TagNumber};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{
    CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature, verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, InconsistentKeys, OtherError, RootCertStore,
    SignatureScheme,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio_rustls::rustls;

/// What is verified about the server's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verify {
    /// Nothing. Protects against passive eavesdropping only.
    Nothing,
    /// That a trusted authority signed it.
    Chain,
    /// In addition, that it names the host we connected to.
    ChainAndHost,
}

/// Which authorities are trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Roots {
    /// The operating system's certificate store.
    System,
    /// A PEM file.
    File(PathBuf),
}

/// The client certificate and its key, as PEM files.
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

/// A file of certificates or keys that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    #[error("{} cannot be read as PEM: {error}", path.display())]
    Pem { path: PathBuf, error: String },
    #[error("{} holds no certificate: it must be PEM, with BEGIN CERTIFICATE", path.display())]
    NoCertificate { path: PathBuf },
    #[error("this machine has no root certificates: install ca-certificates, or configure a file that contains them")]
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
        let key_provider = provider.key_provider;
        let verifier = Arc::new(self.verifier(provider)?);
        let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
        let config = match &self.identity {
            None => builder.with_no_client_auth(),
            Some(Identity { certificate, key }) => {
                let chain = certificates(certificate)?;
                let secret = PrivateKeyDer::from_pem_file(key)
                    .map_err(|error| TlsError::Pem { path: key.clone(), error: error.to_string() })?;
                let unusable = |error: Error| TlsError::Identity {
                    certificate: certificate.clone(),
                    key: key.clone(),
                    error: error.to_string(),
                };
                let secret = key_provider.load_private_key(secret).map_err(unusable)?;
                let certified = CertifiedKey::new(chain, secret);
                // A certificate that cannot be parsed here is left for the server to judge.
                if let Err(error @ Error::InconsistentKeys(InconsistentKeys::KeyMismatch)) = certified.keys_match() {
                    return Err(unusable(error));
                }
                builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified)))
            }
        };
        Ok(Arc::new(config))
    }

    fn verifier(&self, provider: Arc<CryptoProvider>) -> Result<Verifier, TlsError> {
        if self.verify == Verify::Nothing {
            return Ok(Verifier { verify: self.verify, chain: None, named: Vec::new(), provider });
        }
        let mut roots = RootCertStore::empty();
        let named = match &self.roots {
            Roots::File(path) => {
                let named = certificates(path)?;
                if roots.add_parsable_certificates(named.iter().cloned()).0 == 0 {
                    return Err(TlsError::NoCertificate { path: path.clone() });
                }
                named
            }
            Roots::System => {
                if roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs).0 == 0 {
                    return Err(TlsError::NoSystemRoots);
                }
                Vec::new()
            }
        };
        let chain = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build();
        let chain = Some(chain.map_err(|error| TlsError::Setup(error.to_string()))?);
        Ok(Verifier { verify: self.verify, chain, named, provider })
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

/// Verifies the certificate as strictly as configured. In any case the server must prove that it holds the
/// certificate's key.
#[derive(Debug)]
struct Verifier {
    verify: Verify,
    /// `None` if nothing is verified.
    chain: Option<Arc<WebPkiServerVerifier>>,
    /// Certificates that are trusted individually.
    named: Vec<CertificateDer<'static>>,
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
            // The name is checked last, so everything else was valid.
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if self.verify == Verify::Chain => Ok(ServerCertVerified::assertion()),
            // `openssl req -x509` makes a CA certificate, which a server then uses. If that certificate itself is
            // trusted, no other signature is needed. Its dates were checked before.
            Err(error)
                if is(&error, &webpki::Error::CaUsedAsEndEntity)
                    && self.named.iter().any(|named| named == end_entity) =>
            {
                if self.verify == Verify::ChainAndHost {
                    verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
                }
                Ok(ServerCertVerified::assertion())
            }
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        let verified = verify_tls12_signature(message, cert, dss, algorithms);
        verified.or_else(|error| self.verify_signature_of_version_1(message, cert, dss, error))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        let verified = verify_tls13_signature(message, cert, dss, algorithms);
        verified.or_else(|error| self.verify_signature_of_version_1(message, cert, dss, error))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl Verifier {
    /// For decades, `openssl x509 -req` made certificates of version 1, which webpki does not read. If nothing is
    /// verified, only the key is needed, and that is in the same place.
    fn verify_signature_of_version_1(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
        error: Error,
    ) -> Result<HandshakeSignatureValid, Error> {
        match Certificate::read(cert) {
            Ok(Certificate { public_key, .. }) if is(&error, &webpki::Error::UnsupportedCertVersion) => {
                let algorithms = &self.provider.signature_verification_algorithms;
                verify_tls13_signature_with_raw_key(message, &public_key.into(), dss, algorithms)
            }
            Ok(_) | Err(_) => Err(error),
        }
    }
}

/// Whether a certificate was rejected for this reason.
fn is(error: &Error, reason: &webpki::Error) -> bool {
    let Error::InvalidCertificate(CertificateError::Other(OtherError(cause))) = error else { return false };
    cause.downcast_ref() == Some(reason)
}

/// The parts of a certificate that are used, of any version.
struct Certificate<'a> {
    /// The subjectPublicKeyInfo.
    public_key: &'a [u8],
    /// The algorithm of its signature.
    algorithm: ObjectIdentifier,
}

impl<'a> Certificate<'a> {
    /// <https://www.rfc-editor.org/rfc/rfc5280#section-4.1>
    fn read(bytes: &'a [u8]) -> der::Result<Self> {
        SliceReader::new(bytes)?.sequence(|certificate| {
            let public_key = certificate.sequence(|fields| {
                // Version 1 has no version field. The key is preceded by serialNumber, signature, issuer, validity and
                // subject.
                fields.context_specific::<u8>(TagNumber(0), TagMode::Explicit)?;
                for _ in 0..5 {
                    fields.tlv_bytes()?;
                }
                let public_key = fields.tlv_bytes()?;
                skip_rest(fields)?;
                der::Result::Ok(public_key)
            })?;
            let algorithm = certificate.sequence(|fields| {
                let algorithm = ObjectIdentifier::decode(fields)?;
                skip_rest(fields)?;
                der::Result::Ok(algorithm)
            })?;
            skip_rest(certificate)?;
            Ok(Self { public_key, algorithm })
        })
    }
}

fn skip_rest<'a>(fields: &mut impl Reader<'a>) -> der::Result<()> {
    while !fields.is_finished() {
        fields.tlv_bytes()?;
    }
    Ok(())
}

/// Returns the data for channel binding: the hash of the server's certificate, by the hash function of its signature,
/// but at least SHA-256. `None` if the signature has no hash function, as with Ed25519.
/// <https://www.rfc-editor.org/rfc/rfc5929#section-4.1>
pub fn server_end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    let hash = match Certificate::read(certificate).ok()?.algorithm.to_string().as_str() {
        // With RSA: MD5, SHA-1, SHA-256; 384; 512.
        "1.2.840.113549.1.1.4" | "1.2.840.113549.1.1.5" | "1.2.840.113549.1.1.11" => &SHA256,
        "1.2.840.113549.1.1.12" => &SHA384,
        "1.2.840.113549.1.1.13" => &SHA512,
        // With ECDSA: SHA-1, SHA-256; 384; 512.
        "1.2.840.10045.4.1" | "1.2.840.10045.4.3.2" => &SHA256,
        "1.2.840.10045.4.3.3" => &SHA384,
        "1.2.840.10045.4.3.4" => &SHA512,
        _ => return None,
    };
    Some(digest(hash, certificate).as_ref().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::PublicKeyData;

    #[test]
    fn a_certificate_that_is_trusted_by_name_is_good_for_its_time_and_its_hosts() {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2030, 1, 1);
        let certificate = params.self_signed(&key).unwrap();
        let named = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&named, certificate.pem()).unwrap();
        let verified = |verify, certificate: &rcgen::Certificate, host: &'static str, year: u64| {
            let settings = TlsSettings { verify, roots: Roots::File(named.path().to_owned()), identity: None };
            let verifier = settings.verifier(Arc::new(ring::default_provider())).unwrap();
            let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs((year - 1970) * 31_557_600));
            let host = ServerName::try_from(host).unwrap();
            verifier.verify_server_cert(certificate.der(), &[], &host, &[], now).is_ok()
        };
        assert!(verified(Verify::ChainAndHost, &certificate, "localhost", 2025));
        assert!(!verified(Verify::ChainAndHost, &certificate, "other", 2025));
        assert!(verified(Verify::Chain, &certificate, "other", 2025));
        for verify in [Verify::Chain, Verify::ChainAndHost] {
            assert!(!verified(verify, &certificate, "localhost", 2031));
            assert!(!verified(verify, &certificate, "localhost", 2019));
            let alike = params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap();
            assert!(!verified(verify, &alike, "localhost", 2025));
        }
    }

    #[test]
    fn a_login_is_bound_by_the_hash_of_the_certificates_signature() {
        for (algorithm, bytes) in [
            (&rcgen::PKCS_ECDSA_P256_SHA256, Some(32)),
            (&rcgen::PKCS_ECDSA_P384_SHA384, Some(48)),
            (&rcgen::PKCS_ED25519, None),
        ] {
            let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
            let certificate = rcgen::CertificateParams::new(vec!["h".to_owned()]).unwrap().self_signed(&key).unwrap();
            let der = certificate.der();
            assert_eq!(Certificate::read(der).unwrap().public_key, key.subject_public_key_info());
            assert_eq!(server_end_point(der).map(|hash| hash.len()), bytes);
            for end in 0..der.len() {
                assert_eq!(server_end_point(&der[..end]), None);
            }
        }
        for bytes in [&b""[..], &[0x30, 0x80], &[0x30, 0x84, 0xff, 0xff, 0xff, 0xff], &[0x30, 2, 0x30, 0]] {
            assert_eq!(server_end_point(bytes), None);
        }
    }
}
