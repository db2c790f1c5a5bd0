//! S: signing in with a service of somebody else's: its public keys, fetched and kept.
//!
//! What is known stays known while the service is away. A key that nobody knows is asked for, at most twice a minute; keys
//! that grow old are asked for again while the old ones serve.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use alloy_shared::env::{Env, Mono};
use alloy_shared::limits;
use alloy_shared::secret::Secret;

use super::jwt::{BadJwt, Person, PublicKey, Rules, Unverified, published};
use crate::config::Supabase;

/// Why somebody is not signed in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotIn {
    #[error(transparent)]
    Bad(#[from] BadJwt),
    /// The service has not yet said which keys are its own.
    #[error("the sign-in service does not answer")]
    Away,
}

pub struct SignIn {
    rules: Rules,
    keys: Arc<Published>,
}

impl SignIn {
    pub fn new(config: &Supabase, env: Arc<dyn Env>) -> Result<Self, reqwest::Error> {
        let issuer = format!("{}/auth/v1", config.url);
        let keys = Published {
            url: format!("{issuer}/.well-known/jwks.json"),
            http: client(&config.url)?,
            env,
            known: Mutex::default(),
            asking: tokio::sync::Mutex::default(),
        };
        Ok(Self { rules: Rules::new(issuer, config.jwt_secret.as_ref()), keys: Arc::new(keys) })
    }

    /// Whose token this is.
    pub async fn check(&self, text: &Secret<String>) -> Result<Person, NotIn> {
        let token = Unverified::parse(text.expose())?;
        let keys = match token.needs() {
            None => Arc::default(),
            Some(kid) => self.keys.with(kid).await.ok_or(NotIn::Away)?,
        };
        Ok(token.verify(&self.rules, &keys, self.keys.env.now().wall)?)
    }
}

fn client(url: &str) -> Result<reqwest::Client, reqwest::Error> {
    // An error says that a provider is installed, which is all that is wanted.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("alloy/", env!("CARGO_PKG_VERSION")))
        .timeout(Duration::from_millis(limits::SIGN_IN_KEYS_WAIT_MS))
        // Keys come from where the configuration says, and from nowhere else.
        .redirect(reqwest::redirect::Policy::none());
    if url.starts_with("http://") {
        // Plain HTTP is for this machine only.
        builder = builder.tls_certs_only([]).no_proxy();
    }
    builder.build()
}

/// The keys that the service publishes.
struct Published {
    url: String,
    http: reqwest::Client,
    env: Arc<dyn Env>,
    known: Mutex<Known>,
    /// Held by who asks the service.
    asking: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Known {
    keys: Arc<Vec<PublicKey>>,
    /// When they came.
    at: Option<Mono>,
    /// When the service was last asked, with whatever success.
    asked: Option<Mono>,
}

impl Known {
    fn has(&self, kid: &str) -> bool {
        self.keys.iter().any(|key| key.kid == kid)
    }

    fn is_fresh(&self, now: Mono) -> bool {
        self.at.is_some_and(|at| now.since(at) < limits::SIGN_IN_KEYS_FRESH_MS)
    }

    /// The service is left alone for a while after each question.
    fn may_ask(&self, now: Mono) -> bool {
        let pause = if self.at.is_some() { limits::SIGN_IN_KEYS_AGAIN_MS } else { limits::SIGN_IN_KEYS_FIRST_MS };
        self.asked.is_none_or(|asked| now.since(asked) >= pause)
    }
}

impl Published {
    /// All keys, after looking for this one. `None`: there are none yet.
    async fn with(self: &Arc<Self>, kid: &str) -> Option<Arc<Vec<PublicKey>>> {
        let now = self.env.now().mono;
        let (has, fresh, may_ask) = self.look(|known| (known.has(kid), known.is_fresh(now), known.may_ask(now)));
        match (has, fresh || !may_ask) {
            (true, true) => {}
            // The old keys serve meanwhile.
            (true, false) => {
                let own = self.clone();
                let refresh = async move {
                    if let Ok(_asking) = own.asking.try_lock() {
                        own.ask().await;
                    }
                };
                self.env.spawn("sign-in keys", Box::pin(refresh));
            }
            (false, _) => {
                let _asking = self.asking.lock().await;
                // Somebody else may have asked while this one waited.
                let now = self.env.now().mono;
                if self.look(|known| !known.has(kid) && known.may_ask(now)) {
                    self.ask().await;
                }
            }
        }
        self.look(|known| known.at.map(|_| known.keys.clone()))
    }

    async fn ask(&self) {
        let fetched = self.fetch().await;
        let now = self.env.now().mono;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.asked = Some(now);
        match fetched {
            Ok(keys) => {
                known.keys = Arc::new(keys);
                known.at = Some(now);
            }
            Err(why) => tracing::warn!("the keys of the sign-in service cannot be fetched: {why}"),
        }
    }

    async fn fetch(&self) -> Result<Vec<PublicKey>, String> {
        let mut answer = self.http.get(&self.url).send().await.map_err(|error| error.to_string())?;
        if !answer.status().is_success() {
            return Err(format!("{} answers {}", self.url, answer.status()));
        }
        let mut document = Vec::new();
        while let Some(part) = answer.chunk().await.map_err(|error| error.to_string())? {
            document.extend_from_slice(&part);
            if document.len() > limits::SIGN_IN_KEYS_MAX {
                return Err(format!("{} has more than {} bytes", self.url, limits::SIGN_IN_KEYS_MAX));
            }
        }
        published(&document).map_err(|error| format!("{} is no set of keys: {error}", self.url))
    }

    fn look<T>(&self, look: impl FnOnce(&Known) -> T) -> T {
        look(&self.known.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
pub(crate) mod tests;
