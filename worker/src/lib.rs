//! S: the worker: runs jobs of a farm on this machine.
//!
//! [`session`] is the conversation with the orchestrator, [`executor`] runs one attempt from top to bottom, [`vm_pool`]
//! holds the VMs, [`spool`] what must survive. [`body`] puts them together; [`serve`] is the daemon whole, with the
//! configured provider and the network.

pub mod artifacts;
pub mod body;
pub mod care;
pub mod config;
pub mod ctx;
pub mod doctor;
pub mod executor;
pub mod guard;
pub mod hooks;
pub mod host;
pub mod image_book;
pub mod image_plan;
pub mod image_shelf;
pub mod images;
pub mod install;
pub mod job_env;
mod lock;
pub mod log_file;
pub mod program;
pub mod provider;
pub mod session;
pub mod sources;
pub mod spool;
pub mod upstream;
pub mod vm_care;
pub mod vm_demand;
pub mod vm_plan;
pub mod vm_pool;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use alloy_shared::client::{Client, ClientError, Options};
use alloy_shared::env::Env;
use alloy_shared::id::{BadName, check_name};
use alloy_shared::runtime::Lifecycle;
use alloy_shared::secret::{BadToken, Secret, Token, TokenKind};
use alloy_shared::wire::farm::EnrolRequest;
use tokio::sync::watch;

use crate::body::Parts;
use crate::config::{Config, Provider};
use crate::hooks::Hooks;
use crate::host::{HostError, HostFacts, Identity, Key, StateDir};
use crate::image_book::BookFile;
use crate::provider::host::{Host, Setup};
use crate::provider::tart::{self, TartHost};
use crate::provider::{VmError, VmProvider};
use crate::session::Fence;
use crate::session::drive::{Me, Over};
use crate::sources::Sources;
use crate::spool::Spool;
use crate::upstream::{Https, Upstream};
use crate::vm_demand::Wish;

/// Source blobs kept between jobs, on a disk that has room for so many.
const CACHE_BYTES: u64 = 20 << 30;

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Host(#[from] HostError),
    #[error("{path}: {source}")]
    State { path: PathBuf, source: io::Error },
    #[error("{0}")]
    Farm(ClientError),
    #[error("{0}")]
    Provider(VmError),
    #[error("{0}\nALLOY_PROVIDER=host runs jobs on this machine itself, without any isolation")]
    NoTart(VmError),
    #[error("the session ended: {0}")]
    Over(Over),
}

/// A worker that owns its state directory and knows who it is.
pub struct Daemon {
    config: Config,
    state: StateDir,
    identity: Identity,
    key: Key,
    facts: HostFacts,
    fence: Arc<Fence>,
    wishes: watch::Sender<Wish>,
}

impl Daemon {
    pub fn open(config: Config) -> Result<Self, RunError> {
        let state = StateDir::lock(&config.state_dir)?;
        let identity = Identity::load(state.path())?;
        let key = Key::load(state.path(), &identity)?;
        let wishes = watch::channel(config.wish()).0;
        Ok(Self { config, state, identity, key, facts: HostFacts::read(), fence: Arc::new(Fence::new()), wishes })
    }

    /// Where to say what is wanted of the pool from here on, while the daemon runs.
    pub fn wishes(&self) -> watch::Sender<Wish> {
        self.wishes.clone()
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    fn url(&self) -> &str {
        self.config.url.as_deref().unwrap_or(&self.identity.url)
    }

    /// The provider that the configuration names. There is no other if it is not there.
    async fn provider(&self, env: &Arc<dyn Env>, guard: PathBuf) -> Result<Arc<dyn VmProvider>, RunError> {
        match self.config.provider {
            Provider::Tart => {
                let setup = tart::Setup {
                    settings: self.config.tart.clone(),
                    state_dir: self.state.path().to_owned(),
                    guard,
                    env: Arc::clone(env),
                    fence: self.fence.watch(),
                    boot_ms: self.config.limits.boot_ms,
                    agent_grace_ms: self.config.limits.agent_grace_ms,
                    pull_stall_ms: self.config.limits.pull_stall_ms,
                };
                Ok(Arc::new(TartHost::open(setup).await.map_err(RunError::NoTart)?))
            }
            Provider::Host => {
                tracing::warn!("jobs run on this machine itself, as this user, without any isolation");
                let setup = Setup {
                    state_dir: self.state.path().to_owned(),
                    guard,
                    user: host::user(),
                    path: host::login_path(),
                    env: Arc::clone(env),
                    fence: self.fence.watch(),
                };
                Ok(Arc::new(Host::new(setup).map_err(RunError::Provider)?))
            }
        }
    }

    /// Runs until `life` stops it.
    pub async fn run(
        self,
        env: Arc<dyn Env>,
        life: &Lifecycle,
        provider: Arc<dyn VmProvider>,
        upstream: Arc<dyn Upstream>,
        hooks: Hooks,
    ) -> Result<(), RunError> {
        let dir = self.state.path().to_owned();
        let at = |name: &str| {
            let path = dir.join(name);
            move |source| RunError::State { path, source }
        };
        let (spool, held) =
            Spool::open_keeping(&dir.join("spool"), self.config.limits.disk_reserve()).map_err(at("spool"))?;
        let cache = dir.join("cache");
        let free = Box::new({
            let cache = cache.clone();
            move || host::disk_free(&cache)
        });
        let sources = Sources::open_keeping(&cache, CACHE_BYTES, &self.config.limits, free).map_err(at("cache"))?;
        tracing::info!(worker.id = %self.identity.worker, name = %self.identity.name, url = self.url(), "starting");
        let Self { config, state, identity, key, facts, fence, wishes } = self;
        let labels = facts.labels(&identity.name, &config.labels, provider.restricts());
        let sign = Box::new(move |text: &str| key.sign(text));
        let parts = Parts {
            env,
            limits: config.limits,
            provider,
            upstream,
            hooks,
            spool,
            held,
            sources,
            book: BookFile::new(&dir),
            me: Me { worker: identity.worker, labels, version: facts.version, sign },
            name: identity.name,
            fence,
            state_dir: dir.clone(),
            wishes: wishes.subscribe(),
            image_budget: config.image_budget,
            free: Box::new(move || host::disk_free(&dir)),
        };
        let over = body::run(parts, life).await;
        // The lock on the state directory outlives all that uses it.
        drop(state);
        match over {
            Over::Stopped => Ok(()),
            over @ (Over::Superseded | Over::Refused { .. } | Over::Spool(_)) => Err(RunError::Over(over)),
        }
    }
}

/// The daemon whole: the configured provider and the network. `guard` is a binary that knows [`guard::SUBCOMMAND`].
pub async fn serve(daemon: Daemon, env: Arc<dyn Env>, life: &Lifecycle, guard: PathBuf) -> Result<(), RunError> {
    let setup = hooks::Setup {
        dir: daemon.config.hooks_dir.clone(),
        state_dir: daemon.state.path().to_owned(),
        guard: guard.clone(),
        env: Arc::clone(&env),
    };
    let hooks = Hooks::open(setup).await;
    let provider = daemon.provider(&env, guard).await?;
    let upstream = Https::new(daemon.url(), daemon.identity.worker, Arc::clone(&env)).map_err(RunError::Farm)?;
    daemon.run(env, life, provider, Arc::new(upstream), hooks).await
}

#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error("the join token is not one: {0}")]
    Token(BadToken),
    #[error("the token is no join token; `alloy worker invite` makes one")]
    Kind,
    #[error("--name: {}", .0.why)]
    Name(BadName),
    #[error(
        "{dir} belongs to worker {name} of {url} already; --force gives that one up and joins as a new one, another --state-dir keeps both"
    )]
    Joined { dir: PathBuf, name: String, url: String },
    #[error(transparent)]
    Host(#[from] HostError),
    #[error("{0}")]
    Farm(ClientError),
}

/// Enrols this machine at a farm. A try whose answer was lost and its repetition make one worker. A directory that has a
/// worker already takes a new one only by `force`, with a new key.
pub async fn join(
    state_dir: &Path,
    url: &str,
    token: &str,
    name: Option<&str>,
    force: bool,
    env: Arc<dyn Env>,
) -> Result<Identity, JoinError> {
    let parsed = Token::parse(token.trim()).map_err(JoinError::Token)?;
    if parsed.kind != TokenKind::Join {
        return Err(JoinError::Kind);
    }
    let name = name.map_or_else(|| HostFacts::read().hostname, str::to_owned);
    let name = check_name(&name).map_err(JoinError::Name)?.to_owned();
    let state = StateDir::lock(state_dir)?;
    let old = match Identity::load(state.path()) {
        Ok(old) if force => Some(old),
        Ok(Identity { url, name, .. }) => {
            return Err(JoinError::Joined { dir: state.path().to_owned(), name, url });
        }
        Err(HostError::NotJoined { .. } | HostError::Damaged { .. }) => None,
        Err(error @ (HostError::Taken { .. } | HostError::Io { .. })) => return Err(error.into()),
    };
    let file = Key::spare(old.as_ref());
    let key = Key::load_or_make(state.path(), file)?;
    let options = Options { url: url.to_owned(), token: None, agent: upstream::agent() };
    let client = Client::new(options, env).map_err(JoinError::Farm)?;
    let request = EnrolRequest { token: Secret::new(parsed.expose().to_owned()), public_key: key.public(), name };
    let enrolled = client.enrol(&request).await.map_err(JoinError::Farm)?;
    let identity = Identity::save(state.path(), client.url(), enrolled.worker, &enrolled.name, file)?;
    if let Some(old) = old {
        old.clear_away(state.path())?;
    }
    Ok(identity)
}

#[cfg(test)]
mod tests {
    use alloy_shared::id::WorkerId;
    use alloy_shared::runtime::SystemEnv;

    use super::*;

    #[tokio::test]
    async fn a_daemon_says_what_it_lacks() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::embedded("http://127.0.0.1:9".into(), dir.path().join("worker"));
        let error = Daemon::open(config.clone()).err().unwrap();
        assert!(error.to_string().contains("worker join"), "{error}");
        let file = Key::spare(None);
        Key::load_or_make(&config.state_dir, file).unwrap();
        Identity::save(&config.state_dir, "http://127.0.0.1:9", WorkerId::from_raw(1), "mini", file).unwrap();
        let first = Daemon::open(config.clone()).unwrap();
        assert!(Daemon::open(config.clone()).err().unwrap().to_string().contains("another worker"));
        drop(first);
        config.provider = Provider::Tart;
        let life = Lifecycle::new();
        let env = Arc::new(SystemEnv::new(life.clone()));
        let daemon = Daemon::open(config).unwrap();
        let error = serve(daemon, env, &life, PathBuf::from("/nowhere")).await.unwrap_err();
        assert!(error.to_string().contains("tart"), "{error}");
    }

    #[tokio::test]
    async fn a_directory_that_has_a_worker_keeps_it_until_it_is_forced() {
        let dir = tempfile::tempdir().unwrap();
        let file = Key::spare(None);
        Key::load_or_make(dir.path(), file).unwrap();
        let old = Identity::save(dir.path(), "http://127.0.0.1:9", WorkerId::from_raw(1), "mini", file).unwrap();
        let token = Token::mint(TokenKind::Join, [1; 32]);
        let join = async |force| {
            let env = Arc::new(SystemEnv::detached());
            join(dir.path(), "http://127.0.0.1:9", token.expose(), Some("other"), force, env).await.unwrap_err()
        };
        let error = join(false).await;
        assert!(matches!(&error, JoinError::Joined { name, .. } if name == "mini"), "{error}");
        assert!(error.to_string().contains("--force"), "{error}");
        // Nobody listens there: the old identity stays whole until a farm has taken the new one.
        assert!(matches!(join(true).await, JoinError::Farm(_)));
        assert_eq!(Identity::load(dir.path()).unwrap(), old);
        Key::load(dir.path(), &old).unwrap();
    }

    #[tokio::test]
    async fn only_a_join_token_joins() {
        let dir = tempfile::tempdir().unwrap();
        let personal = Token::mint(TokenKind::Personal, [1; 32]);
        for (token, want) in [("alloy_join_x", "copied whole"), (personal.expose(), "alloy worker invite")] {
            let env = Arc::new(SystemEnv::detached());
            let error = join(dir.path(), "http://127.0.0.1:9", token, None, false, env).await;
            let error = error.unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
        let token = Token::mint(TokenKind::Join, [1; 32]);
        for name in ["", "  ", "a\nb", &"x".repeat(64)] {
            let env = Arc::new(SystemEnv::detached());
            let error = join(dir.path(), "http://127.0.0.1:9", token.expose(), Some(name), false, env).await;
            assert!(matches!(error, Err(JoinError::Name(_))), "{name:?}: {error:?}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left of a refused try");
    }
}
