//! Which ciphers TLS uses here, in both directions.
//!
//! Why: the bytes of images are many, and AES-128-GCM costs a third less than AES-256, and is as good
//! here.
//! How: the provider of the whole program, with AES-128-GCM first.
//! Never: adds or removes a cipher.
//! Start at [`provider`].

use rustls::CipherSuite;
use rustls::crypto::CryptoProvider;

/// Preferred to all others.
const LIGHT: [CipherSuite; 3] = [
    CipherSuite::TLS13_AES_128_GCM_SHA256,
    CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
];

/// The provider, named explicitly: nothing depends on what was installed for the process.
pub(crate) fn provider() -> CryptoProvider {
    let mut provider = rustls::crypto::ring::default_provider();
    // Stable: TLS 1.3 stays ahead of 1.2, and ChaCha20 behind AES.
    provider.cipher_suites.sort_by_key(|suite| {
        let old = suite.version().version != rustls::ProtocolVersion::TLSv1_3;
        (old, !LIGHT.contains(&suite.suite()))
    });
    provider
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aes_128_is_first_and_nothing_is_lost() {
        let (ours, theirs) = (provider(), rustls::crypto::ring::default_provider());
        assert_eq!(ours.cipher_suites[0].suite(), CipherSuite::TLS13_AES_128_GCM_SHA256);
        assert_eq!(ours.cipher_suites.len(), theirs.cipher_suites.len());
    }
}
