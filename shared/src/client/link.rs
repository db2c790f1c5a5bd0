//! S: bytes that a farm does not send itself: a link in place of them opens by itself, and gets no token.

use std::time::Duration;

use reqwest::header::{ETAG, LOCATION, RANGE};
use reqwest::{Response, StatusCode, Url};

use super::call::{Call, Failure, Kind, root_cause, within};
use super::{CONNECT_MS, Client, ClientError, is_loopback, unreachable};

/// An answer whose body comes from the farm or from where it points to.
pub(super) struct Linked {
    pub(super) response: Response,
    /// The farm's word for these bytes.
    pub(super) etag: Option<String>,
}

impl Client {
    /// One try, to the head of a successful answer, through a link if the farm gives one.
    pub(super) async fn open_linked(&self, call: &Call) -> Result<Linked, Failure> {
        let response = self.open_unjudged(call).await?;
        let etag = response.headers().get(ETAG).and_then(|tag| tag.to_str().ok()).map(str::to_owned);
        if response.status() != StatusCode::TEMPORARY_REDIRECT {
            return Ok(Linked { response: self.judge(response).await?, etag });
        }
        let link = response.headers().get(LOCATION).and_then(|to| to.to_str().ok()).and_then(|to| Url::parse(to).ok());
        let link = link.filter(|link| link.host_str().is_some() && self.may_follow(link));
        let Some(link) = link else {
            return Err(Failure::last(
                "the farm gives a link that is no safe address; who runs it must look at its object store",
            ));
        };
        Ok(Linked { response: self.follow(call, link).await?, etag })
    }

    /// Bytes of a farm with TLS do not travel without it.
    fn may_follow(&self, link: &Url) -> bool {
        match link.scheme() {
            "https" => true,
            "http" => self.base.starts_with("http://") || is_loopback(link),
            _ => false,
        }
    }

    async fn follow(&self, call: &Call, link: Url) -> Result<Response, Failure> {
        // The query is what opens it: it is named nowhere.
        let place = link.origin().ascii_serialization();
        let cut = |why: String| Failure::new(Kind::Cut, unreachable(&place, why));
        let http = self.elsewhere(&link).map_err(|error| cut(root_cause(&error)))?;
        let mut request = http.get(link);
        if let Some(range) = call.header_value(RANGE.as_str()) {
            request = request.header(RANGE, range);
        }
        let response = match within(&*self.env, call.deadline_ms(), request.send()).await {
            Some(Ok(response)) => response,
            Some(Err(error)) => return Err(cut(root_cause(&error))),
            None => return Err(cut(format!("no answer within {} s", call.deadline_ms() / 1000))),
        };
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        // The next try asks the farm for a new link.
        let why = format!("the farm's object store at {place} answers {status}");
        let kind =
            if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS { Kind::Busy } else { Kind::Wrong };
        Err(Failure::new(kind, ClientError::protocol(why)))
    }

    /// A client of its own for other hosts, which knows no token.
    fn elsewhere(&self, link: &Url) -> Result<reqwest::Client, reqwest::Error> {
        if link.scheme() == "https"
            && let Some(known) = self.elsewhere.get()
        {
            return Ok(known.clone());
        }
        let mut builder = reqwest::Client::builder()
            .connect_timeout(Duration::from_millis(CONNECT_MS))
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never());
        if link.scheme() == "http" {
            builder = builder.tls_certs_only([]);
        }
        if is_loopback(link) {
            builder = builder.no_proxy();
        }
        let http = builder.build()?;
        if link.scheme() == "https" {
            return Ok(self.elsewhere.get_or_init(|| http).clone());
        }
        Ok(http)
    }
}
