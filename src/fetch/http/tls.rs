//! TLS as a source wants it: whom to trust, and who we are.
//!
//! Why: private registries have authorities of their own, and some want a client's certificate.
//! How: the system's authorities, and those of the source besides; one configuration with the
//! client's certificate, for the source's own origin, and one without, for whoever it redirects to.
//! Never: turns verification off.
//! Start at [`Tls::new`].

use std::sync::Arc;

use rustls::ClientConfig;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls_platform_verifier::Verifier;

use super::access::{Access, unusable};
use super::secret::{AccessError, Trust};
use crate::ciphers::provider;

/// Certificates and keys, read and parsed.
pub(super) struct Tls {
    authorities: Vec<CertificateDer<'static>>,
    identity: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
    provider: Arc<CryptoProvider>,
}

impl Tls {
    pub(super) fn new(access: &Access, trust: &Trust) -> Result<Self, AccessError> {
        let mut authorities = Vec::new();
        if let Some(ca) = &access.ca {
            authorities = certificates("CA bundle", &trust.read("CA bundle", ca)?)?;
        }
        let identity = match (&access.cert, &access.key) {
            (Some(cert), Some(key)) => {
                let what = "client certificate";
                let chain = certificates(what, &trust.read(what, cert)?)?;
                let pem = trust.read("client key", key)?;
                let key = PrivateKeyDer::from_pem_slice(pem.as_bytes())
                    .map_err(|_| unusable("client key", "it holds no PEM private key"))?;
                Some((chain, key))
            }
            _ => None,
        };
        let tls = Self { authorities, identity, provider: Arc::new(provider()) };
        // What does not fit together is found before the first connection.
        if tls.identity.is_some() {
            let rule = "certificate and key do not belong together";
            tls.config(true).map_err(|_| unusable("client certificate", rule))?;
        }
        Ok(tls)
    }

    /// True if there is a client's certificate.
    pub(super) fn has_identity(&self) -> bool {
        self.identity.is_some()
    }

    /// A configuration; with the client's certificate if it is for the source's own origin.
    pub(super) fn config(&self, own: bool) -> Result<ClientConfig, rustls::Error> {
        let extra = self.authorities.iter().cloned();
        let verifier = Verifier::new_with_extra_roots(extra, Arc::clone(&self.provider))?;
        let builder = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = match self.identity.as_ref().filter(|_| own) {
            Some((chain, key)) => builder.with_client_auth_cert(chain.clone(), key.clone_key())?,
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }
}

fn certificates(
    what: &'static str,
    pem: &str,
) -> Result<Vec<CertificateDer<'static>>, AccessError> {
    CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .ok()
        .filter(|found| !found.is_empty())
        .ok_or_else(|| unusable(what, "it holds no PEM certificate"))
}
