//! S: the worker: runs jobs of a farm on this machine.

pub mod artifacts;
pub mod executor;
pub mod guard;
pub mod host;
pub mod job_env;
pub mod provider;
pub mod session;
pub mod sources;
pub mod spool;
pub mod upstream;
pub mod vm_plan;
pub mod vm_pool;

use std::path::Path;
use std::sync::Arc;

use alloy_shared::client::{Client, ClientError, Options};
use alloy_shared::env::Env;
use alloy_shared::secret::{BadToken, Secret, Token, TokenKind};
use alloy_shared::wire::farm::EnrolRequest;

use crate::host::{HostError, HostFacts, Identity, Key, StateDir};

#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error("the join token is not one: {0}")]
    Token(BadToken),
    #[error("the token is no join token; `alloy worker invite` makes one")]
    Kind,
    #[error(transparent)]
    Host(#[from] HostError),
    #[error("{0}")]
    Farm(ClientError),
}

/// Enrols this machine at a farm. Tried again with the same state directory it is the same worker.
pub async fn join(
    state_dir: &Path,
    url: &str,
    token: &str,
    name: Option<&str>,
    env: Arc<dyn Env>,
) -> Result<Identity, JoinError> {
    let parsed = Token::parse(token.trim()).map_err(JoinError::Token)?;
    if parsed.kind != TokenKind::Join {
        return Err(JoinError::Kind);
    }
    let state = StateDir::lock(state_dir)?;
    let key = Key::load_or_make(state.path())?;
    let name = name.map_or_else(|| HostFacts::read().hostname, str::to_owned);
    let options = Options { url: url.to_owned(), token: None, agent: upstream::agent() };
    let client = Client::new(options, env).map_err(JoinError::Farm)?;
    let request = EnrolRequest { token: Secret::new(parsed.expose().to_owned()), public_key: key.public(), name };
    let enrolled = client.enrol(&request).await.map_err(JoinError::Farm)?;
    Ok(Identity::save(state.path(), client.url(), enrolled.worker, &enrolled.name)?)
}
