//! S: the one way to talk to a farm.
//!
//! Plain requests carry a retry budget, streams resume by themselves from where they are. A request is sent again only if
//! that cannot do a thing twice. Nothing waits for ever: requests have a deadline, streams have one between two bytes.

mod call;
mod link;
mod stream;
mod transfer;

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use self::call::Call;
pub use self::stream::{FeedItem, LogQuery};
use crate::env::{Env, Ms};
use crate::id::{JobId, TokenId, UserId, WorkerId, printable};
use crate::limits;
use crate::secret::Secret;
use crate::wire::farm::{
    DrainRequest, EnrolRequest, Enrolled, Info, Invite, InviteRequest, MemberList, MemberRequest, MemberView,
    RetentionRequest, RetentionView, TokenCreated, TokenList, TokenRequest, TokenView, WhoAmI, WorkerList, WorkerView,
};
use crate::wire::image::{ImageList, ImageView, PinRequest, PullRequest, RemoveRequest};
use crate::wire::job::{ArtifactList, JobPage, JobView, StateWord, SubmitJob};
use crate::wire::{ErrorCode, Problem, header, path};

const CONNECT_MS: u64 = 5_000;
/// Where the farm is and who asks.
#[derive(Debug, Clone)]
pub struct Options {
    /// `http://host:port` or `https://…`, with or without a path in front of `/v1`.
    pub url: String,
    pub token: Option<Secret<String>>,
    /// The `User-Agent`.
    pub agent: String,
}

/// A farm's API. Cheap to clone; clones share their connections.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    /// For hosts that get no token.
    elsewhere: Arc<OnceLock<reqwest::Client>>,
    base: Arc<str>,
    token: Option<Secret<String>>,
    env: Arc<dyn Env>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("base", &self.base).finish_non_exhaustive()
    }
}

/// Why there is no answer. Its text never holds a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientError {
    /// Nobody answers at this address, or not to the end.
    Unreachable {
        url: String,
        why: String,
        /// Its name stands for no machine, as far as this one can tell.
        unknown_host: bool,
    },
    /// The farm refused.
    Problem(Problem),
    /// Something answered that does not speak as a farm does.
    Protocol { why: String, hint: Option<String> },
}

impl ClientError {
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Problem(problem) => Some(problem),
            Self::Unreachable { .. } | Self::Protocol { .. } => None,
        }
    }

    /// The reason in one line, without the address and without advice.
    pub fn why(&self) -> &str {
        match self {
            Self::Unreachable { why, .. } => why,
            Self::Problem(problem) => &problem.message,
            Self::Protocol { why, .. } => why.lines().next().unwrap_or_default(),
        }
    }

    /// What may help, for whoever reads it.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::Unreachable { .. } => None,
            Self::Problem(problem) => problem.hint.as_deref(),
            Self::Protocol { hint, .. } => hint.as_deref(),
        }
    }

    /// The whole of it in one sentence, where there is room for no more.
    pub fn sentence(&self) -> String {
        let said = match self {
            Self::Unreachable { url, why, .. } => format!("cannot reach the farm at {url}: {why}"),
            Self::Problem(_) | Self::Protocol { .. } => self.why().to_owned(),
        };
        self.hint().map_or_else(|| said.clone(), |hint| format!("{said}; {hint}"))
    }

    /// Something that no farm says, where there is nothing to advise.
    pub fn protocol(why: impl Into<String>) -> Self {
        Self::Protocol { why: why.into(), hint: None }
    }

    /// How long the farm asks to be left alone.
    pub fn retry_after_ms(&self) -> u64 {
        self.problem().and_then(|problem| problem.retry_after_s).unwrap_or(0).saturating_mul(1000)
    }
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable { url, why, .. } => write!(f, "cannot reach the farm at {url}: {why}"),
            Self::Protocol { why, hint } => {
                f.write_str(why)?;
                hint.as_ref().map_or(Ok(()), |hint| write!(f, "\n  hint: {hint}"))
            }
            Self::Problem(problem) => {
                f.write_str(&problem.message)?;
                for error in &problem.errors {
                    write!(f, "\n  {}: {}", error.field, error.message)?;
                }
                if let Some(hint) = &problem.hint {
                    write!(f, "\n  hint: {hint}")?;
                }
                match &problem.request_id {
                    Some(id) if problem.status >= 500 => write!(f, "\n  request id: {id}"),
                    Some(_) | None => Ok(()),
                }
            }
        }
    }
}

impl std::error::Error for ClientError {}

/// Which jobs to list, newest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JobQuery {
    pub limit: Option<u32>,
    pub cursor: Option<String>,
    /// Any of these; none: all. Sent as `state=queued,running`.
    pub state: Vec<StateWord>,
    pub mine: bool,
}

impl Client {
    pub fn new(options: Options, env: Arc<dyn Env>) -> Result<Self, ClientError> {
        let base = base_url(&options.url)?;
        if let Some(token) = &options.token {
            call::bearer(token)?;
        }
        // An error says that a provider is installed, which is all that is wanted.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = reqwest::Client::builder()
            .user_agent(&options.agent)
            .connect_timeout(Duration::from_millis(CONNECT_MS))
            .tcp_keepalive(Duration::from_secs(15))
            .http2_keep_alive_interval(Duration::from_secs(10))
            // A redirected POST would arrive as a GET, and a token could follow it elsewhere.
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never());
        if base.scheme() == "http" {
            // Reading the system's certificates takes longer than a short command may.
            builder = builder.tls_certs_only([]);
        }
        if is_loopback(&base) {
            builder = builder.no_proxy();
        }
        let base: Arc<str> = base.as_str().trim_end_matches('/').into();
        let http = builder.build().map_err(|error| unreachable(&base, call::root_cause(&error)))?;
        Ok(Self { http, elsewhere: Arc::default(), base, token: options.token, env })
    }

    pub fn url(&self) -> &str {
        &self.base
    }

    pub async fn info(&self) -> Result<Info, ClientError> {
        self.ask(Call::get(path::INFO)).await
    }

    /// Asks, without any credential, whether the farm takes requests. The answer is its clock's time to the second, if it
    /// tells it.
    pub async fn ready(&self) -> Result<Option<Ms>, ClientError> {
        let failed = |failure: call::Failure| failure.error;
        let mut response = self.open(&Call::get(path::READYZ)).await.map_err(failed)?;
        let date = response.headers().get(reqwest::header::DATE).and_then(|date| date.to_str().ok());
        let date = date.and_then(Ms::parse_http_date);
        let body = self.collect(&mut response, limits::PROBLEM_MAX).await.map_err(failed)?;
        // A farm whose disk is full says so in a second line.
        if body.split(|byte| *byte == b'\n').next().map(<[u8]>::trim_ascii) != Some(b"ready") {
            return Err(ClientError::protocol(format!("what answers at {} is no farm", self.base)));
        }
        Ok(date)
    }

    pub async fn whoami(&self) -> Result<WhoAmI, ClientError> {
        self.ask(Call::get(path::WHOAMI)).await
    }

    /// Submits a job. The same key with the same job gives the same job, however often it is sent.
    pub async fn submit(&self, job: &SubmitJob, key: &str) -> Result<JobView, ClientError> {
        self.ask(Call::post(path::JOBS).json(job).header(header::IDEMPOTENCY_KEY, key)).await
    }

    pub async fn job(&self, id: JobId) -> Result<JobView, ClientError> {
        self.ask(Call::get(path::job(id))).await
    }

    /// Finds a job by its id, or by at least six of its last characters that no other job has.
    pub async fn find_job(&self, text: &str) -> Result<JobView, ClientError> {
        if text.is_empty() || !text.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_') {
            let problem = Problem::new(ErrorCode::NotFound, format!("`{}` is no job", printable(text)));
            return Err(ClientError::Problem(
                problem.hint("give a job's id, or at least six of its last characters; `alloy list` shows them"),
            ));
        }
        self.ask(Call::get(format!("{}/{text}", path::JOBS))).await
    }

    pub async fn jobs(&self, query: &JobQuery) -> Result<JobPage, ClientError> {
        let mut call = Call::get(path::JOBS);
        if let Some(limit) = query.limit {
            call = call.query("limit", limit);
        }
        if let Some(cursor) = &query.cursor {
            call = call.query("cursor", cursor);
        }
        if !query.state.is_empty() {
            let words: Vec<&str> = query.state.iter().map(|state| state.as_str()).collect();
            call = call.query("state", words.join(","));
        }
        if query.mine {
            call = call.query("mine", true);
        }
        self.ask(call).await
    }

    pub async fn cancel(&self, id: JobId) -> Result<JobView, ClientError> {
        self.ask(Call::post(path::job_cancel(id))).await
    }

    pub async fn artifacts(&self, id: JobId) -> Result<ArtifactList, ClientError> {
        self.ask(Call::get(path::job_artifacts(id))).await
    }

    /// The same for who has just heard the farm: it is waited for as long as the job's output was.
    pub async fn artifacts_in_the_end(&self, id: JobId) -> Result<ArtifactList, ClientError> {
        self.ask(Call::get(path::job_artifacts(id)).patient()).await
    }

    /// Makes an invitation. Sent again only if it surely never arrived: an invitation nobody sees must not exist.
    pub async fn invite(&self, request: &InviteRequest) -> Result<Invite, ClientError> {
        self.ask(Call::post(path::WORKER_INVITES).json(request).once()).await
    }

    pub async fn enrol(&self, request: &EnrolRequest) -> Result<Enrolled, ClientError> {
        self.ask(Call::post(path::WORKER_ENROL).json(request)).await
    }

    pub async fn workers(&self) -> Result<WorkerList, ClientError> {
        self.ask(Call::get(path::WORKERS)).await
    }

    pub async fn drain(&self, id: WorkerId, request: &DrainRequest) -> Result<WorkerView, ClientError> {
        self.ask(Call::post(path::worker_drain(id)).json(request)).await
    }

    pub async fn resume(&self, id: WorkerId) -> Result<WorkerView, ClientError> {
        self.ask(Call::post(path::worker_resume(id))).await
    }

    /// Takes a worker out of the farm for ever.
    pub async fn revoke_worker(&self, id: WorkerId) -> Result<(), ClientError> {
        self.tell(Call::delete(path::worker(id))).await
    }

    /// Makes a token. Sent again only if it surely never arrived: a token nobody sees must not exist.
    pub async fn images(&self) -> Result<ImageList, ClientError> {
        self.ask(Call::get(path::IMAGES)).await
    }

    /// Sent again it is one more wish, which is the same wish.
    pub async fn pull_image(&self, request: &PullRequest) -> Result<ImageView, ClientError> {
        self.ask(Call::post(path::IMAGES).json(request)).await
    }

    pub async fn pin_image(&self, request: &PinRequest) -> Result<ImageView, ClientError> {
        self.ask(Call::post(path::IMAGE_PIN).json(request)).await
    }

    pub async fn remove_image(&self, name: &str) -> Result<ImageView, ClientError> {
        self.ask(Call::post(path::IMAGE_REMOVE).json(&RemoveRequest { name: name.to_owned() })).await
    }

    pub async fn create_token(&self, request: &TokenRequest) -> Result<TokenCreated, ClientError> {
        self.ask(Call::post(path::TOKENS).json(request).once()).await
    }

    pub async fn tokens(&self) -> Result<TokenList, ClientError> {
        self.ask(Call::get(path::TOKENS)).await
    }

    pub async fn revoke_token(&self, id: TokenId) -> Result<TokenView, ClientError> {
        self.ask(Call::delete(path::token(id))).await
    }

    pub async fn members(&self) -> Result<MemberList, ClientError> {
        self.ask(Call::get(path::MEMBERS)).await
    }

    pub async fn set_member(&self, id: UserId, request: &MemberRequest) -> Result<MemberView, ClientError> {
        self.ask(Call::put(path::member(id)).json(request)).await
    }

    pub async fn retention(&self) -> Result<RetentionView, ClientError> {
        self.ask(Call::get(path::RETENTION)).await
    }

    pub async fn set_retention(&self, request: &RetentionRequest) -> Result<RetentionView, ClientError> {
        self.ask(Call::put(path::RETENTION).json(request)).await
    }

    pub async fn remove_member(&self, id: UserId) -> Result<(), ClientError> {
        self.tell(Call::delete(path::member(id))).await
    }
}

fn unreachable(url: &str, why: impl Into<String>) -> ClientError {
    ClientError::Unreachable { url: url.to_owned(), why: why.into(), unknown_host: false }
}

fn base_url(text: &str) -> Result<reqwest::Url, ClientError> {
    // What stands before an `@` may be a password.
    let shown = printable(text.rsplit('@').next().unwrap_or(text));
    let wrong = |why: &str| unreachable(&shown, why);
    let url = reqwest::Url::parse(text).map_err(|_| wrong("this is no URL; http://host:3000 is one"))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(wrong("the address starts with neither http:// nor https://"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(wrong("the address holds a user name or password; a farm takes a token"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("the address of a farm has no `?` and no `#`"));
    }
    Ok(url)
}

fn is_loopback(url: &reqwest::Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}
