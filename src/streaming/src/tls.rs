//! What a server needs to speak TLS: its certificate chain and key, both in PEM.

use std::{fs, path::Path, sync::Arc};

use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {why}")]
pub struct Error {
    path: String,
    why: String,
}

/// Loads a certificate chain and its key.
pub fn load(certificate: &Path, key: &Path) -> Result<Arc<ServerConfig>, Error> {
    let read = |path: &Path| fs::read(path).map_err(|error| failed(path, error));
    let chain = CertificateDer::pem_slice_iter(&read(certificate)?).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(|error| failed(certificate, error))?;
    let secret = PrivateKeyDer::from_pem_slice(&read(key)?).map_err(|error| failed(key, error))?;
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, secret));
    Ok(Arc::new(config.map_err(|error| failed(certificate, error))?))
}

fn failed(path: &Path, why: impl std::fmt::Display) -> Error {
    Error { path: path.display().to_string(), why: why.to_string() }
}
